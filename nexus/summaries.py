"""Many texts in a few words of a model: what stays of interactions and sessions that have grown too old or too long."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from nexus.errors import UpstreamInvalid
from nexus.pipelines import chat, prompts
from nexus.ports import Generator
from nexus.types import Message, Prompt

INSTRUCTIONS = prompts.read("remember")
MOST_CHARACTERS = 12_000  # of the texts of one summary; of a longer one its beginning and its end
SUMMARY_TOKENS = 400
MOST_SUMMARY_CHARACTERS = 4_000

Item = TypeVar("Item")
Summarise = Callable[[Sequence[str], str], Awaitable[str]]


async def summarise(texts: Sequence[str], tenant: str, generator: Generator) -> str:
    """What a model makes of texts of this tenant. Raises what the generator raises, UpstreamInvalid for nothing."""
    prompt = Prompt(render(texts), max_tokens=SUMMARY_TOKENS, temperature=0.0, tenant=tenant)
    generation = await chat.collect(prompt, chat.Tools(generator))
    written = generation.text.strip()[:MOST_SUMMARY_CHARACTERS]
    if not written:
        raise UpstreamInvalid("the model was asked for a summary and said nothing")
    return written


def render(texts: Sequence[str]) -> tuple[Message, ...]:
    """The prompt that asks for a summary; none of the texts can end its own quotation."""
    share = MOST_CHARACTERS // max(1, len(texts))
    room = MOST_CHARACTERS - sum(min(len(text), share) for text in texts)
    quoted = []
    for text in texts:
        most = share + max(0, min(room, len(text) - share))
        room -= most - share
        quoted.append(f"<text>\n{prompts.fence(_cut(text, most), 'text')}\n</text>")
    return (Message("system", INSTRUCTIONS), Message("user", "\n\n".join(quoted)))


def gather(items: Sequence[Item], length: Callable[[Item], int], most: int = MOST_CHARACTERS) -> list[list[Item]]:
    """Items in order, in groups of which each is at most so long, or is one item."""
    groups: list[list[Item]] = []
    room = 0
    for item in items:
        if not groups or length(item) > room:
            groups.append([])
            room = most
        groups[-1].append(item)
        room -= length(item)
    return groups


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[…]\n{text[len(text) - most // 2 :]}"
