"""Voters under power cuts, kills, pauses and a bad network: what was acknowledged stays, once, and in one order."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cluster.client import Client
from cluster.voter import Pace
from nexus.errors import Unavailable
from tests.linearizability import UNKNOWN, Kind, Operation, Verdict, check, check_versions
from tests.voting import CLIENTS, Cluster, Weather, cluster, run, until, world

CUTS = 200
SNAPPY = Pace(tick_seconds=0.02, election_ticks=10, snapshot_entries=40)
KEYS = ("a", "b", "c")


# Power cuts


@dataclass
class Diary:
    """What a client was told for certain, and what not."""

    kept: dict[str, int] = field(default_factory=dict)  # key -> the revision its one put was given
    unsure: set[str] = field(default_factory=set)
    counted: int = 0
    maybe_counted: int = 0

    async def write(self, client: Client, name: str) -> None:
        for number in count():
            key = f"{name}/{number}"
            try:
                self.kept[key] = await client.put(key, key.encode())
            except Unavailable:
                self.unsure.add(key)
            with suppress(Unavailable):
                await self._count_up(client)

    async def _count_up(self, client: Client) -> None:
        """One step of a counter that all share."""
        found = await client.get("counter")
        value, revision = found or (b"0", 0)
        try:
            won = await client.compare_and_set("counter", revision, b"%d" % (int(value) + 1))
        except Unavailable:
            self.maybe_counted += 1
        else:
            self.counted += won is not None


async def check_diaries(whole: Cluster, diaries: list[Diary]) -> None:
    """Those who write may go on meanwhile: each waits for one answer at most."""
    await whole.level()
    kept = {key: (key.encode(), revision) for diary in diaries for key, revision in diary.kept.items()}
    sure = sum(diary.counted for diary in diaries)
    found = {key: (value, revision) for key, value, revision in await whole.client().range("")}
    counted = int(found.pop("counter", (b"0", 0))[0])
    assert sure <= counted <= sum(diary.counted + diary.maybe_counted + 1 for diary in diaries)
    assert {key: found.get(key) for key in kept} == kept  # a second put would have given it another revision
    told = {key for diary in diaries for key in (*diary.kept, *diary.unsure)}
    assert len(set(found) - told) <= len(diaries)


@pytest.mark.parametrize("seed", [11, 12])
def test_power_cuts_lose_nothing_and_repeat_nothing(seed: int, tmp_path: Path) -> None:
    async def main() -> None:
        chance = world().random
        async with cluster(tmp_path, pace=SNAPPY) as whole:
            diaries = [Diary() for _ in range(4)]
            writers = [
                asyncio.create_task(diary.write(whole.client(), str(name))) for name, diary in enumerate(diaries)
            ]
            in_the_middle = 0
            for number in range(CUTS // 2):
                await asyncio.sleep(chance.uniform(0, 0.4))
                if chance.random() < 0.8:
                    whole.power.burn(chance.randrange(30))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.5):
                            await whole.out.wait()
                in_the_middle += whole.out.is_set()
                await whole.lose_power()
                if number % 10 == 9:
                    await check_diaries(whole, diaries)
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)
            await check_diaries(whole, diaries)
            assert in_the_middle > CUTS // 10
            assert sum(diary.counted for diary in diaries) > CUTS

    run(main, seed)


# Linearizability


@dataclass
class History:
    """What clients asked and were told, in the order of one counter."""

    operations: list[Operation] = field(default_factory=list)
    moments: Any = field(default_factory=count)

    async def of(self, name: int, client: Client, chance: random.Random, has_ended: Callable[[], bool]) -> None:
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
            await asyncio.sleep(chance.choice((0, 0, 0.1)))


async def ask(client: Client, key: str, kind: Kind, argument: Any) -> Any:
    if kind is Kind.PUT:
        return await client.put(key, argument.encode())
    if kind is Kind.COMPARE_AND_SET:
        return await client.compare_and_set(key, argument[0], argument[1].encode())
    if kind is Kind.DELETE:
        return await client.delete(key)
    found = await client.get(key)
    return found and (found[0].decode(), found[1])


async def kill_one(whole: Cluster, chance: random.Random) -> None:
    """The leader, more often than not."""
    id = whole.leader() if chance.random() < 0.7 else chance.choice(whole.ids)
    if id in whole.processes:
        await whole.kill(id)
        await asyncio.sleep(chance.uniform(0, 1.5))
        await whole.start(id)


async def suspend_one(whole: Cluster, chance: random.Random) -> None:
    process = whole.processes[whole.leader() or chance.choice(whole.ids)]
    process.suspend()
    await asyncio.sleep(chance.uniform(0.1, 2))
    process.resume()


async def cut_off_one(whole: Cluster, chance: random.Random) -> None:
    """From all other voters, or in some directions only; clients may reach it, or not."""
    id = whole.leader() or chance.choice(whole.ids)
    whole.network.isolate(id, whole.ids)
    if chance.random() < 0.5:
        whole.network.cuts -= {pair for pair in whole.network.cuts if chance.random() < 0.5}
    if chance.random() < 0.3:
        whole.network.cuts.add((CLIENTS, id) if chance.random() < 0.5 else (id, CLIENTS))
    await asyncio.sleep(chance.uniform(0.1, 2))
    whole.network.heal()


async def rain(whole: Cluster, chance: random.Random) -> None:
    whole.network.weather = Weather(chance.uniform(0, 0.2), chance.uniform(0, 0.3), chance.choice((0.002, 0.05, 0.2)))
    await asyncio.sleep(chance.uniform(0.1, 2))
    whole.network.weather = Weather()


async def lose_power(whole: Cluster, chance: random.Random) -> None:
    await whole.lose_power()


FAULTS: list[Callable[[Cluster, random.Random], Awaitable[None]]] = [
    kill_one, suspend_one, cut_off_one, rain, lose_power,
]  # fmt: skip


async def write_history(folder: Path) -> History:
    """Six clients and one fault after another; then calm, and a last look at each key."""
    chance, history = world().random, History()
    async with cluster(folder, pace=SNAPPY) as whole:
        is_calm = asyncio.Event()
        clients = [
            asyncio.create_task(history.of(name, whole.client(2.0), chance, is_calm.is_set)) for name in range(6)
        ]
        chosen = chance.sample(FAULTS, 3)
        for _ in range(8):
            await asyncio.sleep(chance.uniform(0, 0.3))
            await chance.choice(chosen)(whole, chance)
        is_calm.set()
        await asyncio.gather(*clients)
        await whole.level()
        last = whole.client()
        for key in KEYS:
            called = next(history.moments)
            result = await ask(last, key, Kind.GET, None)
            history.operations.append(Operation("last", key, Kind.GET, None, result, called, next(history.moments)))
    return history


@pytest.mark.parametrize("seed", range(12))
def test_what_clients_see_is_linearizable(seed: int, tmp_path: Path) -> None:
    async def main() -> None:
        history = await write_history(tmp_path)
        known = [operation for operation in history.operations if operation.is_known]
        assert len(known) > 100
        for judge in (check_versions, check):
            judgement = judge(history.operations)
            assert judgement.verdict is Verdict.LEGAL, judgement.explanation

    run(main, seed)


def test_a_seed_tells_the_same_story_twice(tmp_path: Path) -> None:
    stories: list[Any] = []
    for name in ("first", "second"):

        async def main(folder: Path = tmp_path / name) -> None:
            stories.append((await write_history(folder)).operations)

        run(main, 3)
    assert stories[0] == stories[1]


def test_a_voter_that_was_away_for_long_is_given_a_snapshot(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, pace=SNAPPY) as whole:
            client = whole.client()
            behind = next(id for id in whole.ids if id != whole.leader())
            await whole.kill(behind)
            for number in range(3 * SNAPPY.snapshot_entries):
                await client.put(f"{number}", b"")
            await until(lambda: whole.voter(whole.leader())._snapshot_index > SNAPPY.snapshot_entries)
            await whole.start(behind)
            await whole.level()
            assert whole.voter(behind)._snapshot_index > SNAPPY.snapshot_entries

    run(main)
