"""A conversation as it stands, given to a generator: no search, no sources."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from nexus.cache import Completer
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
    for delta in await take(prompt, tools):
        generation.add(delta)
    return generation


async def take(prompt: Prompt, tools: Tools) -> list[Delta]:
    """All of a generation at once; one that breaks off is begun again where the generator knows how."""
    if isinstance(tools.generator, Completer):
        return await tools.generator.complete(prompt)
    async with aclosing(run(prompt, tools)) as deltas:
        return [delta async for delta in deltas]
