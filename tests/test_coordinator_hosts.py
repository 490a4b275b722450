"""The coordinator on three hosts with addresses of their own: links cut, voters paused and killed, in random order.

Each host has its Ray node and its voter, and the clients are on the head's. A host cut off from the head for longer
than Ray's health checks wait (some 15 s) would be given up by Ray; no cut here is that long.
"""

import asyncio
import os
import random
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.coordinator import Client, Placement, connect, find_voter, start
from cluster.bootstrap import STARTING
from cluster.raft import Role
from cluster.voter import Pace
from tests.histories import Diary, History, check_diaries
from tests.hosts import Hosts, hosts
from tests.linearizability import Operation, Verdict, check, check_versions
from tests.running import ROOT

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MACHINES = {1: "sark", 2: "clu", 3: "witness"}
HEAD = MACHINES[1]
PORT = 6379
PACE = Pace(snapshot_entries=200)
SHORTEST_SECONDS, LONGEST_SECONDS = 0.3, 2.5  # of a cut, and of a pause
CLIENTS = 4


@dataclass(frozen=True, slots=True)
class RayNodes:
    """One Ray node on each host."""

    hosts: Hosts
    environment: dict[str, str]
    folder: Path

    def start(self) -> None:
        self._start(HEAD)
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._start, [host for host in self.hosts.names if host != HEAD]))

    def _start(self, host: str) -> None:
        address = f"{self.hosts.address(HEAD)}:{PORT}"
        role = (
            ["--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor"]
            if host == HEAD
            else [f"--address={address}"]
        )
        self.hosts.run(
            host,
            [
                sys.executable, "-m", "cluster.bootstrap", "start", *role,
                "--dashboard-agent-listen-port=26001", "--dashboard-agent-grpc-port=26002",
                "--runtime-env-agent-port=26003", "--metrics-export-port=26004",
                f"--node-ip-address={self.hosts.address(host)}", f"--labels=nexus.io/node={host}", "--num-cpus=1",
                f"--object-store-memory={100 * 2**20}", f"--temp-dir={self.folder / host}", "--disable-usage-stats",
                "--include-log-monitor=False",
            ],
            self.environment,
            seconds=120,
        )  # fmt: skip

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In a driver on the head's host."""
        return self.hosts.call(HEAD, function, *arguments, environment=self.environment, seconds=180)


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "RAY_"))}
    environment = {
        **kept, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **STARTING,
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="nxh", ignore_cleanup_errors=True) as folder,
        hosts(*MACHINES.values()) as made,
    ):
        nodes = RayNodes(made, environment, Path(folder))
        nodes.start()
        yield nodes


# On the head's host


@dataclass
class Troubles:
    """What is done to one voter, or to its host, for a while."""

    hosts: Hosts
    chance: random.Random

    async def cut_off(self, id: int) -> None:
        """From both others."""
        self.hosts.isolate(MACHINES[id])
        await self.last()
        self.hosts.heal()

    async def cut_one_link(self, id: int) -> None:
        """One of three: two voters hear of each other by the third alone."""
        self.hosts.cut(MACHINES[id], MACHINES[self.chance.choice([other for other in MACHINES if other != id])])
        await self.last()
        self.hosts.heal()

    async def lose_answers(self, id: int) -> None:
        """It hears the clients, who do not hear it: what they asked for is done, and they ask again."""
        self.hosts.cut_one_way(MACHINES[id], HEAD)
        await self.last()
        self.hosts.heal()

    async def pause(self, id: int) -> None:
        process = await process_of(id)
        os.kill(process, signal.SIGSTOP)
        await self.last()
        os.kill(process, signal.SIGCONT)

    async def kill(self, id: int) -> None:
        os.kill(await process_of(id), signal.SIGKILL)

    async def last(self) -> None:
        await asyncio.sleep(self.chance.uniform(SHORTEST_SECONDS, LONGEST_SECONDS))

    async def all(self, client: Client) -> None:
        """Each kind twice, to the leader and to anyone, in any order; all voters are well between two of them."""
        kinds = [self.cut_off, self.cut_one_link, self.lose_answers, self.pause, self.kill]
        story = [(kind, is_leader) for kind in kinds for is_leader in (True, False)]
        for kind, is_leader in self.chance.sample(story, len(story)):
            id = (await client.leader()).id if is_leader else self.chance.choice(list(MACHINES))
            if kind == self.lose_answers and MACHINES[id] == HEAD:  # where the clients are
                id = self.chance.choice([other for other in MACHINES if MACHINES[other] != HEAD])
                if is_leader:
                    await client.transfer(id)
            print(f"{kind.__name__} voter {id}{' that leads' * is_leader}", flush=True)
            await kind(id)
            await level(client)


async def process_of(voter: int) -> int:
    handle = find_voter(voter)
    assert handle is not None
    return await handle.__ray_call__.remote(lambda self: os.getpid())


async def address_of(voter: int) -> str:
    handle = find_voter(voter)
    assert handle is not None
    return await handle.__ray_call__.remote(lambda self: ray.util.get_node_ip_address())


async def level(client: Client) -> int:
    """The term, once all three are there, and hold what was committed when this was asked."""
    goal = (await client.leader()).commit
    while True:
        statuses = await client.status()
        leaders = [one for one in statuses if one.role is Role.LEADER]
        if len(statuses) == 3 and len(leaders) == 1 and min(one.match for one in leaders[0].progress.values()) >= goal:
            return leaders[0].term
        await asyncio.sleep(0.05)


async def live_through(made: Hosts, folder: Path, seed: int) -> tuple[list[Operation], int]:
    """What the clients were told, and how many terms it took."""
    await start({id: Placement({"nexus.io/node": host}) for id, host in MACHINES.items()}, folder, PACE)
    client, history, is_calm = await connect(), History(), asyncio.Event()
    first = await level(client)
    assert {MACHINES[id]: await address_of(id) for id in MACHINES} == {host: made.address(host) for host in made.names}
    diaries = [Diary(), Diary()]
    writers = [
        asyncio.create_task(diary.write(await connect(), str(name), pause=0.02)) for name, diary in enumerate(diaries)
    ]
    clients = [
        asyncio.create_task(history.of(name, await connect(), random.Random(name), is_calm.is_set, pauses=(0, 0.1)))
        for name in range(CLIENTS)
    ]
    await Troubles(made, random.Random(seed)).all(client)
    is_calm.set()
    await asyncio.gather(*clients)
    for writer in writers:
        writer.cancel()
    ends = await asyncio.gather(*writers, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
    last = await level(client)
    await history.look("last", client)
    await check_diaries(client, diaries)
    return history.operations, last - first


def story(made: Hosts, folder: Path, seed: int) -> tuple[list[Operation], int]:
    ray.init(address=f"{made.address(HEAD)}:{PORT}", namespace="nexus", log_to_driver=False, logging_level="ERROR")
    return asyncio.run(live_through(made, folder, seed))


# What is told of it


@pytest.mark.parametrize("seed", [1])
def test_what_clients_see_is_linearizable_on_hosts_cut_off_paused_and_killed(seed: int, nodes: RayNodes) -> None:
    operations, terms = nodes.call(story, nodes.hosts, nodes.folder / "voters", seed)
    assert sum(operation.is_known for operation in operations) > 100
    assert terms >= 2  # leaders fell
    for judge in (check_versions, check):
        judgement = judge(operations)
        assert judgement.verdict is Verdict.LEGAL, judgement.explanation
