"""A conversation as it stands, given to a generator: no search, no sources."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from nexus.ports import Generator
from nexus.types import Delta, Prompt, Usage


@dataclass(frozen=True, slots=True)
class Tools:
    """What the pipeline is lent."""

    generator: Generator


@dataclass(slots=True)
class Generation:
    """What has come of a generation so far, of its first choice."""

    text: str = ""
    finish_reason: str = "stop"
    usage: Usage | None = None

    def add(self, delta: Delta) -> None:
        self.usage = delta.usage or self.usage
        if delta.choice == 0:
            self.text += delta.text
            self.finish_reason = delta.finish_reason or self.finish_reason


async def run(prompt: Prompt, tools: Tools) -> AsyncGenerator[Delta]:
    """The generation as it comes; closing this stops it. Raises what the generator raises."""
    async with aclosing(tools.generator.stream(prompt)) as deltas:
        async for delta in deltas:
            yield delta


async def collect(prompt: Prompt, tools: Tools) -> Generation:
    """A whole generation, for whoever does not want the pieces."""
    generation = Generation()
    async with aclosing(run(prompt, tools)) as deltas:
        async for delta in deltas:
            generation.add(delta)
    return generation
