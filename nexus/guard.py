"""A model as the guard: any that answers `safe`, or `unsafe` and its categories, as Llama Guard does."""

import re
from contextlib import aclosing
from typing import Literal

from nexus.errors import UpstreamInvalid
from nexus.ports import Generator, Judged
from nexus.types import Message, Prompt

MOST_TOKENS = 32
_CATEGORY = re.compile(r"[A-Za-z0-9_.\-]{1,32}")


class ModelGuard:
    """A Guard over a generator whose own chat template asks the question: it is given the turn to judge."""

    def __init__(self, generator: Generator) -> None:
        self.name = generator.name
        self._generator = generator

    async def judge(self, text: str, where: Literal["input", "output", "document"], asked: str = "") -> Judged:
        """See `Guard`."""
        turns = (Message("user", asked), Message("assistant", text)) if where == "output" else (Message("user", text),)
        prompt = Prompt(turns, max_tokens=MOST_TOKENS, temperature=0.0)
        async with aclosing(self._generator.stream(prompt)) as deltas:
            said = "".join([delta.text async for delta in deltas if delta.choice == 0])
        return read_verdict(said, self.name)


def read_verdict(said: str, name: str) -> Judged:
    """`safe`, or `unsafe` with categories on the next line. Raises UpstreamInvalid for anything else."""
    first, _, rest = said.strip().partition("\n")
    word = first.strip().lower()
    if word not in ("safe", "unsafe"):
        raise UpstreamInvalid(f"the guard {name!r} said neither 'safe' nor 'unsafe'")
    return Judged(word == "safe", tuple(_CATEGORY.findall(rest))[:16])
