"""Whole generations kept for exactly equal prompts: bounded in number, in bytes and in time.

A prompt carries its tenant, its passages with their versions and readers, and the sequence they were read at, and all
of it is in the key: what was deleted or forbidden since makes another prompt, so the cache need not know of it.
"""

import pickle
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol, runtime_checkable

from cachetools import TTLCache

from nexus.ports import Generator
from nexus.types import Delta, Hit, Prompt, digest


class ResponseCache:
    """The least recently used goes first. Belongs to one event loop; several generators may share it."""

    def __init__(
        self, entries: int, seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """At most so many generations (0: none), of so many bytes in all, none older than so many clock seconds."""
        self._entries = entries
        self._kept: TTLCache[str, bytes, float] = TTLCache(max_bytes, seconds, clock, len)

    def get(self, key: str) -> list[Delta] | None:
        """What was put under this key, as a copy of its own."""
        kept = self._kept.get(key)
        return None if kept is None else pickle.loads(kept)

    def put(self, key: str, deltas: Sequence[Delta]) -> None:
        """Keep these. What alone is over the bound in bytes is not kept."""
        data = pickle.dumps(list(deltas))
        if self._entries == 0 or len(data) > self._kept.maxsize:
            return
        self._kept.pop(key, None)
        while len(self._kept) >= self._entries:
            self._kept.popitem()
        self._kept[key] = data


@runtime_checkable
class Completer(Protocol):
    """A generator that has its own way to a whole generation, such as one that may start again (balancer.py)."""

    async def complete(self, prompt: Prompt) -> list[Delta]: ...


class CompletingGenerator(Generator, Completer, Protocol):
    """A Generator with its own way to a whole generation."""


def cached(generator: CompletingGenerator, cache: ResponseCache | None, variant: str = "") -> CompletingGenerator:
    """The generator behind the cache, if there is one."""
    return generator if cache is None else CachedGenerator(generator, cache, variant)


class CachedGenerator:
    """A Generator that asks another one only for what it was not asked before."""

    def __init__(self, generator: Generator, cache: ResponseCache, variant: str = "") -> None:
        """`variant` is what else an answer depends on, such as the weights of a balanced choice."""
        self.name = generator.name
        self.sees_images = generator.sees_images
        self._generator = generator
        self._cache = cache
        self._variant = variant

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        """The deltas kept for this prompt, or those of the generator, which are kept once they were all taken."""
        key = key_of(self.name, prompt, self._variant)
        kept = self._cache.get(key)
        if kept is not None:
            for delta in kept:
                yield delta
            return
        fresh: list[Delta] = []
        async with aclosing(self._generator.stream(prompt)) as deltas:
            async for delta in deltas:
                fresh.append(delta)
                yield delta
        self._keep(key, prompt, fresh)

    async def complete(self, prompt: Prompt) -> list[Delta]:
        """All deltas of one generation, for who needs them whole."""
        if not isinstance(self._generator, Completer):
            async with aclosing(self.stream(prompt)) as deltas:
                return [delta async for delta in deltas]
        key = key_of(self.name, prompt, self._variant)
        kept = self._cache.get(key)
        if kept is not None:
            return kept
        fresh = await self._generator.complete(prompt)
        self._keep(key, prompt, fresh)
        return fresh

    async def check(self) -> None:
        await self._generator.check()

    def _keep(self, key: str, prompt: Prompt, deltas: Sequence[Delta]) -> None:
        if is_whole(prompt, deltas):
            self._cache.put(key, deltas)


def is_whole(prompt: Prompt, deltas: Sequence[Delta]) -> bool:
    """Whether every choice that was asked for, and each that came, has ended for a reason."""
    asked = prompt.options.get("n")
    ended = {delta.choice for delta in deltas if delta.finish_reason is not None}
    return ended == {delta.choice for delta in deltas} and len(ended) == (asked if isinstance(asked, int) else 1)


def key_of(name: str, prompt: Prompt, variant: str = "") -> str:
    """The identity of a prompt for the generator of this name.

    The text of a frozen value names every field of it and of what it holds, and tells 1, True and "1" apart; the
    order of options counts, since that of a schema's properties does. Left out of a passage is only how well it
    was found: scores may differ in the last digit, and the passage is the same.
    """
    passages = tuple(_without_scores(hit) for hit in prompt.passages)
    return digest(name, variant, repr(replace(prompt, passages=passages)))


def _without_scores(hit: Hit) -> Hit:
    return replace(hit, score=0.0, cosine=0.0, routes={})
