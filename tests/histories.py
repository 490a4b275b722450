"""What clients of a coordinator do while it is tormented, and what they were told: for the checkers to judge."""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from cluster.client import Client
from nexus.errors import Unavailable
from tests.linearizability import UNKNOWN, Kind, Operation

KEYS = ("a", "b", "c")


@dataclass
class Diary:
    """What a client was told for certain, and what not."""

    kept: dict[str, int] = field(default_factory=dict)  # key -> the revision its one put was given
    unsure: set[str] = field(default_factory=set)
    counted: int = 0
    maybe_counted: int = 0
    own_revision: int = 0  # of the counter that nobody else sets
    unsure_counts: list[str] = field(default_factory=list)

    async def write(self, client: Client, name: str, pause: float = 0) -> None:
        """Until cancelled."""
        for number in count():
            key = f"diary/{name}/{number}"
            try:
                self.kept[key] = await client.put(key, key.encode())
            except Unavailable:
                self.unsure.add(key)
            with suppress(Unavailable):
                await self._count_up(client)
            await self._count_alone(client, f"diary/{name}/own/{len(self.unsure_counts)}")
            await asyncio.sleep(pause)

    async def _count_alone(self, client: Client, key: str) -> None:
        """Nobody else sets this key, so it is won each time, unless something was done twice; in doubt, use another."""
        try:
            answer = await client.compare_and_set(key, self.own_revision, b"")
        except Unavailable:
            self.unsure_counts.append(key)
            self.own_revision = 0
        else:
            assert answer is not None, f"{key} moved on without its only writer: a write was done twice"
            self.own_revision = answer

    async def _count_up(self, client: Client) -> None:
        """One step of a counter that all share."""
        found = await client.get("diary/counter")
        value, revision = found or (b"0", 0)
        try:
            won = await client.compare_and_set("diary/counter", revision, b"%d" % (int(value) + 1))
        except Unavailable:
            self.maybe_counted += 1
        else:
            self.counted += won is not None


async def check_diaries(client: Client, diaries: Sequence[Diary]) -> None:
    """Nothing acknowledged is lost, nothing was done twice. Those who write may go on: each waits for one answer."""
    kept = {key: (key.encode(), revision) for diary in diaries for key, revision in diary.kept.items()}
    sure = sum(diary.counted for diary in diaries)
    found = {key: (value, revision) for key, value, revision in await client.range("diary/")}
    counted = int(found.pop("diary/counter", (b"0", 0))[0])
    assert sure <= counted <= sum(diary.counted + diary.maybe_counted + 1 for diary in diaries)
    assert {key: found.get(key) for key in kept} == kept  # a second put would have given it another revision
    told = {key for diary in diaries for key in (*diary.kept, *diary.unsure)}
    assert len({key for key in found if "/own/" not in key} - told) <= len(diaries)


@dataclass
class History:
    """What clients asked and were told, in the order of one counter."""

    operations: list[Operation] = field(default_factory=list)
    moments: Any = field(default_factory=count)

    async def of(
        self, name: int, client: Client, chance: random.Random, has_ended: Callable[[], bool],
        pauses: Sequence[float] = (0, 0, 0.1),
    ) -> None:  # fmt: skip
        """One client's: an operation after another; of some it does not wait for the end."""
        revisions = dict.fromkeys(KEYS, 0)
        for number in count():
            if has_ended():
                return
            key, value = chance.choice(KEYS), f"{name}.{number}"
            kind = chance.choices(list(Kind), weights=(3, 4, 3, 1))[0]
            argument: Any = {Kind.PUT: value, Kind.COMPARE_AND_SET: (revisions[key], value)}.get(kind)
            called = next(self.moments)
            try:
                async with asyncio.timeout(0.01 if chance.random() < 0.03 else None):
                    result = await ask(client, key, kind, argument)
            except (Unavailable, TimeoutError):
                self.operations.append(Operation(name, key, kind, argument, UNKNOWN, called))
            else:
                self.operations.append(Operation(name, key, kind, argument, result, called, next(self.moments)))
                if result and kind is not Kind.DELETE:
                    revisions[key] = result[1] if kind is Kind.GET else result
            await asyncio.sleep(chance.choice(pauses))

    def known(self) -> int:
        """How many were answered."""
        return sum(operation.is_known for operation in self.operations)

    async def look(self, name: str, client: Client) -> None:
        """Read each key once."""
        for key in KEYS:
            called = next(self.moments)
            result = await ask(client, key, Kind.GET, None)
            self.operations.append(Operation(name, key, Kind.GET, None, result, called, next(self.moments)))


async def ask(client: Client, key: str, kind: Kind, argument: Any) -> Any:
    if kind is Kind.PUT:
        return await client.put(key, argument.encode())
    if kind is Kind.COMPARE_AND_SET:
        return await client.compare_and_set(key, argument[0], argument[1].encode())
    if kind is Kind.DELETE:
        return await client.delete(key)
    found = await client.get(key)
    return found and (found[0].decode(), found[1])
