"""The coordinator on real Ray: three nodes with labels, a voter pinned to each, killed, cut down, and brought back."""

import asyncio
import fcntl
import gc
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from actors import coordination, coordinator
from actors.coordination import Coordination
from actors.coordinator import Client, Operator, Placement, connect, find_voter, find_voters, start
from cluster.client import Absent
from cluster.raft import Role
from cluster.voter import Pace
from nexus.errors import ConfigError, Conflict, InvalidRequest, NotFound, Unavailable
from nexus.ports import LiveIndex
from tests.histories import History
from tests.linearizability import Verdict, check, check_versions

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning"),  # Ray closes none
]

MACHINES = {1: "sark", 2: "clu", 3: "witness"}
PLACES = {id: Placement({"nexus.io/node": name}) for id, name in MACHINES.items()}
PACE = Pace(tick_seconds=0.03, snapshot_entries=200)
KILLS = 5


@pytest.fixture(scope="module")
def machines() -> Iterator[None]:
    """Three Ray nodes in this process's own cluster."""
    cluster = Cluster()
    for name in MACHINES.values():
        cluster.add_node(
            num_cpus=1, labels={"nexus.io/node": name}, object_store_memory=100 * 2**20, include_dashboard=False
        )
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()
    gc.collect()  # here, where what Ray left open is not held against another file's test


@pytest.fixture
def home(machines: None, tmp_path: Path) -> Iterator[Path]:
    """A folder for the voters of one test, which do not outlive it."""
    yield tmp_path
    for handle in find_voters().values():
        ray.kill(handle)


@asynccontextmanager
async def three(home: Path) -> AsyncIterator[Client]:
    await start(PLACES, home, PACE)
    yield await patient()


async def patient() -> Client:
    """One that sits out what a busy machine does to three voters."""
    return Client((await connect())._voters, patience_seconds=200)


async def leader_of(client: Client) -> int:
    return (await client.leader()).id


async def kill(id: int) -> None:
    """As the kernel does when memory ends: no word of farewell."""
    handle = find_voter(id)
    assert handle is not None
    os.kill(await handle.__ray_call__.remote(lambda self: os.getpid()), signal.SIGKILL)


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again; the test's own timeout ends it."""
    while not await is_so():
        await asyncio.sleep(0.05)


async def is_level(client: Client, voters: int) -> bool:
    statuses = await client.status()
    leaders = [one for one in statuses if one.role is Role.LEADER]
    return (
        len(statuses) == voters
        and len(leaders) == 1
        and all(one.match == leaders[0].last_index for one in leaders[0].progress.values())
    )


def test_three_voters_agree_and_stay_on_their_machines(home: Path) -> None:
    async def story() -> None:
        async with three(home) as client:
            revision = await client.put("a", b"1")
            assert await client.get("a") == (b"1", revision)
            assert await client.compare_and_set("a", 0, b"x") is None
            assert await client.compare_and_set("a", revision, b"2") == revision + 1
            assert await client.range("") == [("a", b"2", revision + 1)]
            assert await client.delete("a") and not await client.delete("a")
            lease = await client.grant(0.2)
            await client.put("leased", b"", lease=lease)
            await until(lambda: gone(client, "leased"))
            await until(lambda: is_level(client, 3))
            statuses = await client.status()
            assert [status.id for status in statuses] == [1, 2, 3]
            nodes = {
                id: await handle.__ray_call__.remote(
                    lambda self: ray.get_runtime_context().get_node_labels()["nexus.io/node"]
                )
                for id, handle in find_voters().items()
            }
            assert nodes == MACHINES

    asyncio.run(story())


async def gone(client: Client, key: str) -> bool:
    return await client.get(key) is None


def test_what_clients_see_is_linearizable_while_leaders_are_killed(home: Path) -> None:
    history = History()

    async def story() -> None:
        async with three(home) as client:
            over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                for name in range(5):
                    asked = history.of(name, await patient(), random.Random(name), over.is_set, pauses=(0.02,))
                    tasks.create_task(asked)
                for _ in range(KILLS):
                    await until(lambda: is_alive(client, 3))
                    before = history.known()
                    await kill(await leader_of(client))
                    await until(partial(enough, history, before + 10))
                over.set()

    asyncio.run(story())
    for judge in (check, check_versions):
        judgement = judge(history.operations)
        assert judgement.verdict is Verdict.LEGAL, judgement.explanation


async def is_alive(client: Client, voters: int) -> bool:
    return len(await client.status()) == voters


async def enough(history: History, number: int) -> bool:
    return history.known() >= number


def test_no_acknowledged_write_is_lost_and_none_done_twice_while_leaders_are_killed(home: Path) -> None:
    async def story() -> None:
        async with three(home) as client:
            over = asyncio.Event()
            written: list[str] = []

            async def write(number: int) -> None:
                revision = count = 0
                while not over.is_set():
                    count += 1
                    answer = await client.compare_and_set(f"count/{number}", revision, str(count).encode())
                    assert answer is not None, "done twice: the revision moved on without us"
                    revision = answer
                    await client.put(f"kept/{number}/{count}", b"")
                    written.append(f"kept/{number}/{count}")

            async with asyncio.TaskGroup() as tasks:
                for number in range(4):
                    tasks.create_task(write(number))
                for _ in range(KILLS):
                    await until(lambda: is_alive(client, 3))
                    before = len(written)
                    await kill(await leader_of(client))
                    await until(partial(longer, written, before + 20))
                over.set()
            assert {key for key, _, _ in await client.range("kept/")} == set(written)

    asyncio.run(story())


async def longer(written: list[str], number: int) -> bool:
    return len(written) >= number


def test_a_voter_without_its_disk_takes_no_part_and_a_new_one_takes_its_place(home: Path) -> None:
    async def story() -> None:
        async with three(home) as client:
            operator = Operator(home, PACE)
            await client.put("before", b"1")
            leader = await leader_of(client)
            victim = next(id for id in PLACES if id != leader)
            folder = home / f"voter-{victim}"
            folder.rename(home / "lost")
            await kill(victim)
            await until(lambda: is_absent(client, victim, "its disk is empty"))
            shutil.rmtree(home / "lost")
            assert await client.put("meanwhile", b"2")
            await operator.remove(victim)
            with pytest.raises(Conflict, match="none is used twice"):
                await operator.add(victim, PLACES[victim].labels)
            await operator.add(4, PLACES[victim].labels)
            client = await connect()
            await until(lambda: is_level(client, 3))
            assert {status.id for status in await client.status()} == {1, 2, 3, 4} - {victim}
            await operator.transfer(4)
            assert await leader_of(client) == 4
            assert [key for key, _, _ in await client.range("")] == ["before", "meanwhile"]
            with pytest.raises(NotFound):
                await operator.transfer(9)
            with pytest.raises(ConfigError, match="7 is no voter"):
                await start({**PLACES, 7: Placement()}, home, PACE)

    asyncio.run(story())


def test_a_voter_whose_last_process_still_ends_takes_part_once_that_has_ended(home: Path) -> None:
    async def story() -> None:
        async with three(home) as client:
            await client.put("before", b"1")
            with (home / "voter-2" / "lock").open("r+") as lock:
                held = asyncio.create_task(asyncio.to_thread(fcntl.lockf, lock, fcntl.LOCK_EX))  # once it is killed
                await kill(2)
                await held
                await until(lambda: is_absent(client, 2, "in use by another process"))
                await client.put("meanwhile", b"2")
            await until(lambda: is_level(client, 3))

    asyncio.run(story())


def test_a_fault_that_nobody_foresaw_ends_the_process_of_a_voter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(coordinator.os, "_exit", ended.append)

    async def story() -> None:
        voter = coordinator.Coordinator(1, str(tmp_path), "too long" * 1000)
        with pytest.raises(ValueError, match="identity"):
            await voter._disk

    asyncio.run(story())
    assert ended == [1]


def test_a_voter_that_no_machine_takes_hinders_neither_the_next_start_nor_its_own_return(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with three(home) as client:
            operator = Operator(home, PACE)
            with monkeypatch.context() as patch, pytest.raises(Unavailable, match="voter 4 does not start"):
                patch.setattr(coordinator, "START_SECONDS", 1.0)
                await operator.add(4, {"nexus.io/node": "nowhere"})
            with pytest.raises(InvalidRequest, match="two words"):
                await operator.add(4, {"nexus.io/node": "two words"})
            await start(PLACES, home, PACE)
            await until(is_nobody)
            await operator.add(4, PLACES[1].labels)
            assert (await client.leader()).members.voters == {1, 2, 3, 4}

    async def is_nobody() -> bool:
        return find_voter(4) is None

    asyncio.run(story())


async def is_absent(client: Client, id: int, why: str) -> bool:
    found = {one.id: one for one in await client.describe()}.get(id)
    return isinstance(found, Absent) and why in found.why


def test_all_stopped_and_started_again_know_everything_by_snapshot_and_log(home: Path) -> None:
    async def story() -> None:
        async with three(home) as client:
            for number in range(500):
                await client.put(f"key/{number % 50}", str(number).encode())
            before = await client.range("")
            for handle in find_voters().values():
                ray.kill(handle)
            await until(lambda: are_gone())
        async with three(home) as client:
            assert await client.range("") == before

    asyncio.run(story())


def test_with_one_machine_away_the_others_start_and_agree(home: Path) -> None:
    async def story() -> None:
        async with three(home) as client:
            await client.put("before", b"1")
            for handle in find_voters().values():
                ray.kill(handle)
            await until(lambda: are_gone())
        await start({**PLACES, 2: Placement({"nexus.io/node": "away"})}, home, PACE)
        client = await patient()
        assert (await client.get("before") or (b"",))[0] == b"1"
        await until(lambda: are_absent(client, [2]))

    asyncio.run(story())


async def are_absent(client: Client, ids: list[int]) -> bool:
    return [one.id for one in await client.describe() if isinstance(one, Absent)] == ids


async def are_gone() -> bool:
    return not find_voters()


def test_without_a_quorum_nothing_is_promised_and_what_is_known_can_be_read(home: Path) -> None:
    async def story() -> None:
        async with three(home) as client:
            await client.put("known", b"1")
            await until(lambda: is_level(client, 3))
            leader = await leader_of(client)
            for id in PLACES:
                if id != leader:
                    ray.kill(find_voter(id))
            impatient = Client(client._voters, patience_seconds=2)
            with pytest.raises(Unavailable, match="read-only: 1 of"):
                await impatient.put("known", b"2")
            with pytest.raises(Unavailable):
                await impatient.get("known")
            found = await impatient.get("known", fresh=False)
            assert found is not None and found[0] == b"1"

    asyncio.run(story())


# As the rest of Nexus asks it


@pytest.fixture
def several(home: Path) -> Iterator[list[Coordination]]:
    """What three processes would have, with a client of its own each."""

    asyncio.run(start(PLACES, home, PACE))
    each = [Coordination() for _ in range(3)]
    yield each
    for one in each:
        one.close()


def test_who_works_is_known_to_all_until_they_leave_or_fall_silent(
    several: list[Coordination], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, another, third = several
    one.stay("a")
    one.stay("a")
    another.stay("b")
    assert one.working() == another.working() == third.working() == {"a", "b"}
    another.leave("b")
    another.leave("b")
    assert third.working() == {"a"}
    monkeypatch.setattr(coordination, "LEASE_SECONDS", 0.5)
    another.stay("silent")
    while third.working() != {"a"}:
        pass  # the test's own timeout ends it
    monkeypatch.undo()
    another.stay("silent")
    assert third.working() == {"a", "silent"}


def test_all_agree_on_one_live_index_and_keep_to_it_without_a_quorum(several: list[Coordination], home: Path) -> None:
    with ThreadPoolExecutor(12) as threads:
        places = range(12)
        assert several[0].live_index("manuals") is None
        told = list(
            threads.map(lambda n: several[n % 2].point("manuals", LiveIndex(f"index {n}", f"model {n}")), places)
        )
    assert len(set(told)) == 1 and all(one.live_index("manuals") == told[0] for one in several[:2])
    assert several[2].live_index("manuals") == told[0]

    async def end_most() -> None:
        client = await connect()
        await until(lambda: is_level(client, 3))
        leader = await leader_of(client)
        for id in PLACES:
            if id != leader:
                ray.kill(find_voter(id))

    asyncio.run(end_most())
    with pytest.raises(Unavailable, match="read-only: 1 of"):
        several[0].stay("worker")
    assert several[0].live_index("manuals") == told[0]
    with closing(Coordination()) as new:
        assert new.live_index("manuals") == told[0]


def test_an_index_becomes_live_once_and_only_in_place_of_the_one_that_was(several: list[Coordination]) -> None:
    """Of many who would replace the same one, each with another, one does; to replace it with what is live is done."""
    first = several[0].point("manuals", LiveIndex("index", "model", "words:", 64))
    others = [LiveIndex(f"index {place}", f"model {place}", "wide:", 96) for place in range(12)]
    with ThreadPoolExecutor(12) as threads:
        won = list(threads.map(lambda n: several[n % 3].move("manuals", first, others[n]), range(12)))
    assert sum(won) == 1
    live = others[won.index(True)]
    assert {one.point("manuals", first) for one in several} == {live}
    assert several[1].move("manuals", first, live) and not several[1].move("manuals", first, others[won.index(False)])
    assert several[2].move("manuals", live, first) and several[2].live_index("manuals") == first
    assert not several[0].move("nowhere", first, live)


def test_what_was_agreed_on_elsewhere_is_known_in_a_while(several: list[Coordination]) -> None:
    one, another, _ = several
    assert another.live_index("late") is None
    live = one.point("late", LiveIndex("index", "model"))
    while another.live_index("late") is None:
        pass  # the test's own timeout ends it
    assert another.live_index("late") == live
