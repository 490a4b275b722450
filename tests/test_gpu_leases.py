"""Claims to GPUs: two at once never hold more than there is, and one ends with whoever holds it."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as some
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import coordinator, embedder, gpu_lease, reranker
from actors.coordination import Coordination
from actors.gpu_lease import GpuLease
from cluster.catalog import (
    Catalog,
    Command,
    Delete,
    Grant,
    KeepAlive,
    LeaseGone,
    OpenSession,
    Put,
    Revoke,
    decode_response,
    encode,
)
from cluster.gpu_leases import GPUS, Claim, claim, declare, held
from cluster.inventory import Gpu
from cluster.voter import Pace
from nexus.errors import OperatorError, Unavailable

ROOT = Path(__file__).parent.parent
GIB = 2**30
FULL = 80 * GIB


@types.coroutine
def travel() -> Generator[None, None, None]:
    """Something may happen elsewhere meanwhile."""
    yield


class Voters:
    """In place of a client of theirs: the real catalog, asked at one moment, heard of at a later one."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.were_fresh: list[bool] = []
        self._index = 0
        self._one_at_a_time = threading.Lock()
        self._session = self.do(OpenSession())

    def do(self, command: Command) -> int:
        with self._one_at_a_time:
            self._index += 1
            sender = () if isinstance(command, OpenSession) else (self._session, self._index, self._index)
            return int(decode_response(self.catalog.apply(self._index, encode(command, *sender))) or 0)

    async def _ask(self, command: Command) -> int:
        await travel()
        answer = self.do(command)
        await travel()
        return answer

    async def grant(self, seconds: float) -> int:
        return await self._ask(Grant(int(seconds * 1000)))

    async def keep_alive(self, lease: int) -> None:
        await self._ask(KeepAlive(lease))

    async def revoke(self, lease: int) -> bool:
        return bool(await self._ask(Revoke(lease)))

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return await self._ask(Put(key, value, lease))

    async def delete(self, key: str) -> bool:
        return bool(await self._ask(Delete(key)))

    async def range(self, prefix: str, fresh: bool = True) -> list[tuple[str, bytes, int]]:
        self.were_fresh.append(fresh)
        await travel()
        with self._one_at_a_time:
            found = self.catalog.range(prefix)
        await travel()
        return found


def wanted(holder: str, size: int = 10 * GIB, gpu: int = 0, node: str = "sark") -> Claim:
    return Claim(node, gpu, holder, size, 4711)


def to_end(work: Coroutine[Any, Any, Any]) -> Any:
    """What it returns, where nothing happens elsewhere."""
    while True:
        try:
            work.send(None)
        except StopIteration as end:
            return end.value


def grant(voters: Voters) -> int:
    return voters.do(Grant(10_000))


# Claims


def test_what_fits_is_held_and_what_does_not_is_refused_by_the_names_of_those_before_it() -> None:
    voters = Voters()
    for size, holder in ((50, "generator-0@sark#a"), (30, "embedder@sark#b")):
        to_end(claim(voters, wanted(holder, size * GIB), FULL, grant(voters)))
    with pytest.raises(OperatorError) as raised:
        to_end(claim(voters, wanted("reranker-0@sark#c", 1), FULL, grant(voters)))
    for part in ("reranker-0@sark#c takes 1B of GPU 0 of sark", "80.0GiB", "process 4711", "`nexus up`",
                 "generator-0@sark#a holds 50.0GiB", "embedder@sark#b holds 30.0GiB"):  # fmt: skip
        assert part in raised.value.message
    assert [one.holder for one in to_end(held(voters))] == ["embedder@sark#b", "generator-0@sark#a"]


def test_each_gpu_has_room_of_its_own() -> None:
    voters = Voters()
    places = [("sark", 1), ("sark", 2), ("sark", 10), ("sark", 11), ("clu", 1), ("sar", 1)]
    for node, gpu in places:
        to_end(claim(voters, wanted("it", FULL, gpu, node), FULL, grant(voters)))
    assert to_end(held(voters)) == [wanted("it", FULL, gpu, node) for node, gpu in sorted(places)]


def test_whoever_claims_reads_what_is_so_now_and_who_only_looks_needs_no_quorum() -> None:
    voters = Voters()
    to_end(claim(voters, wanted("it"), FULL, grant(voters)))
    to_end(held(voters))
    assert voters.were_fresh == [True, False]


def test_a_name_may_hold_what_names_hold() -> None:
    voters = Voters()
    to_end(claim(voters, wanted("a/b#c@d/e"), FULL, grant(voters)))
    assert to_end(held(voters)) == [wanted("a/b#c@d/e")]


def test_a_claim_ends_with_its_lease_and_what_is_held_already_is_declared_whatever_there_is() -> None:
    voters = Voters()
    lease = grant(voters)
    to_end(claim(voters, wanted("first", FULL), FULL, lease))
    to_end(declare(voters, wanted("second", FULL), grant(voters)))
    voters.do(Revoke(lease))
    assert to_end(held(voters)) == [wanted("second", FULL)]


def test_a_claim_whose_lease_ends_before_it_has_looked_is_none() -> None:
    voters = Voters()
    lease = grant(voters)
    work = claim(voters, wanted("late"), FULL, lease)
    while not voters.catalog.range(GPUS):
        work.send(None)
    voters.do(Revoke(lease))
    with pytest.raises(LeaseGone):
        to_end(work)


@dataclass(eq=False)
class Replica:
    """Who claims, holds for a while, and ends."""

    voters: Voters
    wanted: Claim
    outcome: str = "claiming"
    lease: int = 0

    def __post_init__(self) -> None:
        self.lease = grant(self.voters)
        self._work = claim(self.voters, self.wanted, FULL, self.lease)
        self.step()  # to where it is about to ask

    def step(self) -> None:
        if self.outcome == "claiming":
            try:
                self._work.send(None)
            except StopIteration:
                self.outcome = "holds"
            except (OperatorError, LeaseGone) as error:
                self.outcome = "refused" if isinstance(error, OperatorError) else "ended"

    def end(self) -> None:
        """It is killed, and its lease ends later; or, where it holds, it releases."""
        self._work.close()
        self.outcome = "ended"
        self.voters.do(Revoke(self.lease))


sizes = some.sampled_from([10 * GIB, 30 * GIB, 40 * GIB, 50 * GIB, 80 * GIB, 81 * GIB])


@settings(max_examples=1000, deadline=None)
@given(
    some.lists(sizes, min_size=2, max_size=6),
    some.lists(some.tuples(some.integers(0, 5), some.booleans()), max_size=40),
    some.booleans(),
)
def test_in_whatever_order_those_who_hold_never_hold_more_than_there_is(
    sizes: list[int], turns: list[tuple[int, bool]], some_end: bool
) -> None:
    voters = Voters()
    replicas = [Replica(voters, wanted(f"r{n}", size)) for n, size in enumerate(sizes)]
    to_the_end = [(number, False) for number in range(len(replicas)) for _ in range(8)]
    for number, is_last in [*turns, *to_the_end]:
        one = replicas[number % len(replicas)]
        if some_end and is_last:
            one.end()
        else:
            one.step()
        assert sum(one.wanted.bytes for one in replicas if one.outcome == "holds") <= FULL
    assert "claiming" not in {one.outcome for one in replicas}
    holding = {one.wanted for one in replicas if one.outcome == "holds"}
    assert set(to_end(held(voters))) == holding
    if not some_end and max(sizes) <= FULL:
        assert holding  # not all give way to each other
    free = FULL - sum(one.bytes for one in holding)
    if free:
        to_end(claim(voters, wanted("another", free), FULL, grant(voters)))  # nothing is left behind


# What a replica does


class Played:
    """Voters for a thread: what they keep, and whether they are away."""

    def __init__(self) -> None:
        self.voters = Voters()
        self.is_away = False
        self.heard = threading.Semaphore(0)
        self.before: Callable[[str], None] = lambda method: None

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*arguments: Any, **named: Any) -> Any:
            self.before(method)
            if self.is_away:
                self.heard.release()
                raise Unavailable("the coordinator does not answer")
            answer = to_end(getattr(self.voters, method)(*arguments, **named))
            self.heard.release()
            return answer

        return call

    def await_heard(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.heard.acquire(timeout=30)

    def held(self) -> list[Claim]:
        return list(to_end(held(self.voters)))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    monkeypatch.setattr(gpu_lease, "KEEP_SECONDS", 0.01)
    monkeypatch.setattr(gpu_lease, "PAUSE_SECONDS", 0.0)
    return Played()


def coordination(played: Played) -> Coordination:
    async def connect() -> Any:
        if played.is_away:
            raise Unavailable("there is no coordinator")
        return played

    return Coordination(connect)


GPUS_HERE = (Gpu(0, "H100", FULL), Gpu(1, "H100", FULL, taken=30 * GIB))


def lease(played: Played, *claims: Claim, look: Callable[[], Sequence[Gpu]] = lambda: GPUS_HERE) -> GpuLease:
    return GpuLease(coordination(played), claims, look)


def test_a_replica_holds_all_its_gpus_until_it_releases_them(played: Played) -> None:
    claims = [wanted("it", 80 * GIB), wanted("it", 50 * GIB, gpu=1)]
    holding = lease(played, *claims)
    assert played.held() == claims == list(holding.claims)
    holding.release()
    assert played.held() == []


def test_a_replica_that_is_refused_one_gpu_holds_none(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_lease, "PATIENCE_SECONDS", 0.0)
    other = lease(played, wanted("other", 1, gpu=1))
    with pytest.raises(OperatorError, match=r"GPU 1 of sark.*other"):
        lease(played, wanted("it"), wanted("it", 50 * GIB, gpu=1))
    assert played.held() == [wanted("other", 1, gpu=1)]
    other.release()


def test_what_others_hold_is_not_there_for_it(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_lease, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(OperatorError) as raised:
        lease(played, wanted("it"), wanted("it", 60 * GIB, gpu=1))
    for part in ("it takes 60.0GiB of GPU 1 of sark", "80.0GiB", "not of Nexus hold 30.0GiB", "nvidia-smi"):
        assert part in raised.value.message
    assert played.held() == []
    small = lease(played, wanted("small", gpu=1))
    with pytest.raises(OperatorError, match=r"has 50.0GiB for Nexus: small holds 10.0GiB"):
        lease(played, wanted("it", 50 * GIB, gpu=1))
    small.release()


def test_a_gpu_that_nvml_does_not_show_is_refused(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_lease, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(OperatorError, match=r"GPU 7 of sark.*nvidia-smi"):
        lease(played, wanted("it", gpu=7))


def test_what_a_dead_replica_held_is_waited_for(played: Played) -> None:
    """Its claim ends with its lease; its process, which NVML shows as a stranger's by now, a little later."""
    dead = grant(played.voters)
    to_end(declare(played.voters, wanted("dead", FULL), dead))
    looks: list[tuple[Gpu, ...]] = [(Gpu(0, "H100", FULL, taken=70 * GIB),)] * 2

    def look() -> Sequence[Gpu]:
        return looks.pop() if looks else GPUS_HERE

    def before(method: str) -> None:
        tries.append(method)
        if tries.count("range") == 3:
            played.voters.do(Revoke(dead))
            played.before = lambda method: None

    tries: list[str] = []
    played.before = before
    holding = lease(played, wanted("it", FULL), look=look)
    assert played.held() == [wanted("it", FULL)] and looks == []
    holding.release()


def test_a_coordinator_that_is_away_is_waited_for(played: Played) -> None:
    played.is_away = True
    asked: list[int] = []

    def look() -> Sequence[Gpu]:
        asked.append(1)
        played.is_away = len(asked) < 4
        return GPUS_HERE

    holding = lease(played, wanted("it"), look=look)
    assert played.held() == [wanted("it")]
    holding.release()


def test_a_lease_that_ends_while_it_is_claimed_with_is_another_one(played: Played) -> None:
    def before(method: str) -> None:
        if method == "range":
            played.voters.do(Revoke(last_lease(played)))
            played.before = lambda method: None

    played.before = before
    holding = lease(played, wanted("it"))
    assert played.held() == [wanted("it")]
    holding.release()


def last_lease(played: Played) -> int:
    return max(played.voters.catalog._leases)


def test_a_replica_that_lost_its_lease_goes_on_and_claims_again_whatever_came_meanwhile(played: Played) -> None:
    holding = lease(played, wanted("it", FULL))
    played.await_heard(8)  # it is kept alive
    played.is_away = True
    while played.heard.acquire(blocking=False):
        pass
    played.await_heard(3)  # and nothing comes of it
    played.voters.do(Revoke(holding._lease))
    to_end(claim(played.voters, wanted("new", FULL), FULL, grant(played.voters)))
    fails = ["put", "grant"]  # once each: it is away again in between

    def before(method: str) -> None:
        if method in fails:
            fails.remove(method)
            raise Unavailable("the coordinator does not answer")

    played.before, played.is_away = before, False
    played.await_heard(8)
    assert played.held() == [wanted("it", FULL), wanted("new", FULL)] and fails == []
    holding.release()
    assert played.held() == [wanted("new", FULL)]


@pytest.mark.parametrize("actor, opener", [(embedder.Embedder, embedder), (reranker.Reranker, reranker)])
def test_a_model_is_opened_when_its_memory_is_claimed_and_the_claim_ends_with_its_replica(
    actor: type, opener: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    holding = types.SimpleNamespace(release=lambda: steps.append("released"))
    monkeypatch.setattr(opener, "hold", lambda size: steps.append(size) or (holding if size else None))
    monkeypatch.setattr(opener, "open_model", lambda *arguments, **options: steps.append("opened"))
    monkeypatch.setattr(os, "setpriority", lambda *arguments: None)
    replica = actor("some:model", 1, gpu_bytes=5)
    assert steps == [5, "opened"]
    replica.__del__()
    assert steps == [5, "opened", "released"]
    actor("some:model", 1).__del__()
    assert steps[3:] == [0, "opened"]
    replica._gpus = None


def test_who_takes_nothing_of_a_gpu_asks_nobody() -> None:
    assert gpu_lease.hold(0) is None


# On real Ray

SYSTEM = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning"),  # Ray closes none
]
REPLICA = "SERVE_REPLICA::nexus#"


@dataclass
class Machine:
    """A Ray node named sark, with two GPUs that only NVML's double knows, and one voter."""

    nvml: Path

    def show(self, taken: Mapping[int, int], by: int = 0) -> None:
        gpus = [
            {"name": "NVIDIA H100 80GB HBM3", "total": FULL, "used": taken.get(index, 0),
             "compute": [{"pid": by, "memory": taken[index]}] if index in taken else []}
            for index in range(2)
        ]  # fmt: skip
        part = self.nvml.with_suffix(".part")
        part.write_text(json.dumps({"gpus": gpus}))
        part.replace(self.nvml)

    def start(self, name: str, gpu_bytes: int, gpus: float, patience: float = 0.0, **options: Any) -> Any:
        class Holding:
            def __init__(self, gpu_bytes: int, patience: float) -> None:
                gpu_lease.PATIENCE_SECONDS = patience
                self.held = gpu_lease.hold(gpu_bytes)

            def tell(self) -> tuple[list[int], int]:
                return sorted(map(int, ray.get_gpu_ids())), os.getpid()

            def end(self) -> None:
                assert self.held
                self.held.release()

        options = {"name": f"{REPLICA}{name}", "num_cpus": 0, "num_gpus": gpus, **options}
        return ray.remote(Holding).options(**options).remote(gpu_bytes, patience)

    def held(self) -> list[Claim]:
        async def ask() -> list[Claim]:
            return await held(await coordinator.connect())

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("gpus")
    machine, cluster = Machine(folder / "nvml.json"), Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_NVML", str(machine.nvml))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "nvml")]))
        cluster.add_node(
            num_cpus=2, num_gpus=2, labels={"nexus.io/node": "sark"}, object_store_memory=100 * 2**20,
            include_dashboard=False,
        )  # fmt: skip
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    asyncio.run(coordinator.start({1: coordinator.Placement()}, folder / "coordinator", Pace(tick_seconds=0.03)))
    yield machine
    ray.shutdown()
    cluster.shutdown()
    gc.collect()  # here, where what Ray left open is not held against another file's test


class TestOnRay:
    pytestmark = SYSTEM

    def test_replicas_that_fit_are_held_by_name_and_gpu_until_they_release(self, machine: Machine) -> None:
        machine.show({})
        one, two = machine.start("embedder@sark#1", 30 * GIB, 0.5), machine.start("reranker-0@sark#2", 20 * GIB, 1)
        told = {"embedder@sark#1": ray.get(one.tell.remote()), "reranker-0@sark#2": ray.get(two.tell.remote())}
        sizes = {"embedder@sark#1": 30 * GIB, "reranker-0@sark#2": 20 * GIB}
        expected = [Claim("sark", gpus[0], name, sizes[name], pid) for name, (gpus, pid) in told.items()]
        assert sorted(machine.held(), key=lambda claim: claim.holder) == expected
        ray.get(two.end.remote())
        assert machine.held() == [expected[0]]
        ray.get(one.end.remote())
        assert machine.held() == []
        for each in (one, two):
            ray.kill(each)

    def test_one_whose_gpu_a_stranger_holds_is_refused_and_says_who(self, machine: Machine) -> None:
        waiting = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        with subprocess.Popen(waiting, stdin=subprocess.PIPE, start_new_session=True) as stranger:
            machine.show({1: 70 * GIB}, by=stranger.pid)
            both = [machine.start(f"embedder@sark#{number}", 20 * GIB, 1) for number in (1, 2)]
            outcomes = []
            for one in both:
                try:
                    outcomes.append(ray.get(one.tell.remote())[0])
                except ActorDiedError as error:
                    outcomes.append(str(error))
            refused = next(one for one in outcomes if isinstance(one, str))
            assert [0] in outcomes
            for part in ("OperatorError", "takes 20.0GiB of GPU 1 of sark", "not of Nexus hold 70.0GiB", "nvidia-smi"):
                assert part in refused
            assert [claim.gpu for claim in machine.held()] == [0]
            ours = machine.held()[0].pid
            machine.show({1: 70 * GIB}, by=ours)  # who is no stranger
            third = machine.start("embedder@sark#3", 20 * GIB, 1)
            assert ray.get(third.tell.remote())[0] == [1]
            for one in (both[outcomes.index([0])], third):
                ray.get(one.end.remote())
                ray.kill(one)

    def test_an_engine_claims_the_gpus_of_its_bundles_before_its_workers_have_them(self, machine: Machine) -> None:
        machine.show({})
        group = placement_group([{"CPU": 1, "GPU": 0.9}] * 2, strategy="STRICT_PACK")
        there = PlacementGroupSchedulingStrategy(group, 0)
        engine = machine.start("generator-0@sark#1", 72 * GIB, 0, scheduling_strategy=there)
        gpus, pid = ray.get(engine.tell.remote())
        assert gpus == []
        assert machine.held() == [Claim("sark", gpu, "generator-0@sark#1", 72 * GIB, pid) for gpu in (0, 1)]
        with pytest.raises(ActorDiedError, match=r"generator-0@sark#1 holds 72.0GiB \(process \d+\)"):
            ray.get(machine.start("embedder@sark#2", 9 * GIB, 0.1).tell.remote())
        with pytest.raises(ActorDiedError, match=r"embedder@sark#2 takes 9.0GiB of a GPU, and Ray gave it none"):
            ray.get(machine.start("embedder@sark#2", 9 * GIB, 0).tell.remote())
        late = machine.start("embedder@sark#3", 9 * GIB, 0.1, patience=60.0)
        os.kill(pid, signal.SIGKILL)  # and its claims end with their lease
        gpus, pid = ray.get(late.tell.remote())
        assert machine.held() == [Claim("sark", gpus[0], "embedder@sark#3", 9 * GIB, pid)]
        ray.kill(late)
        remove_placement_group(group)


# An engine's replica, in a process of its own: whoever imports vLLM has all of it

ENGINE = """
import asyncio
from types import SimpleNamespace

from actors import vllm

steps = []


async def begin(self, config):
    steps.append(config)


async def end(self):
    steps.append("ended")


def hold(size):
    steps.append(size)
    return SimpleNamespace(release=lambda: steps.append("released"))


async def live():
    replica = vllm.Replica.__new__(vllm.Replica)
    await replica.__init__("settings", gpu_bytes=5)
    await replica.__del__()
    vllm.Replica.__del__ = lambda self: None


vllm.hold, vllm.LLMServer.__init__, vllm.LLMServer.__del__ = hold, begin, end
asyncio.run(live())
print(steps)
"""


@pytest.mark.system
def test_an_engine_starts_when_its_memory_is_claimed_and_the_claim_ends_with_it() -> None:
    done = subprocess.run([sys.executable, "-c", ENGINE], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[5, 'settings', 'ended', 'released']"], done.stderr
