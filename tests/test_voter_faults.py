"""Voters under power cuts, kills, pauses and a bad network: what was acknowledged stays, once, and in one order."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.voter import Pace
from tests.histories import Diary, History, check_diaries
from tests.linearizability import Verdict, check, check_versions
from tests.voting import CLIENTS, Cluster, Weather, cluster, run, until, world

CUTS = 200
SNAPPY = Pace(tick_seconds=0.02, election_ticks=10, snapshot_entries=40)


# Power cuts


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
                    await whole.level()
                    await check_diaries(whole.client(), diaries)
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)
            await whole.level()
            await check_diaries(whole.client(), diaries)
            assert in_the_middle > CUTS // 10
            assert sum(diary.counted for diary in diaries) > CUTS

    run(main, seed)


# Linearizability


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
        await history.look("last", whole.client())
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
