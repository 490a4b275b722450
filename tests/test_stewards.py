"""Stewards as real actors on three Ray nodes, each with a disk of its own: killed in the middle, lost with a node."""

import asyncio
import gc
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from actors import coordinator, steward
from actors.coordinator import Placement, find_voters
from actors.steward import RayStewards, find_steward
from cluster.channel import AGAIN, CALL, GREET, LATER, REFUSED
from cluster.directory import Directory
from cluster.sharing import Sharing
from cluster.voter import Pace
from nexus.config import Config
from nexus.errors import TryAgain
from tests.stewards import CLUSTER_KEY, NODES, content, read

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning"),  # Ray closes none
]

SHARES, AT_ONCE, KILL_AFTER = 80, 8, 25  # tests/bench/share.py has 200
TENANT = "acme"


@pytest.fixture(scope="module")
def lose() -> Iterator[Callable[[str], None]]:
    """Three Ray nodes in this process's own cluster, and how to lose one of them."""
    there = Cluster()
    held = [there]  # nobody holds it when it is over: what Ray left open is to be collected here
    for name in NODES:
        there.add_node(
            num_cpus=1, labels={"nexus.io/node": name}, object_store_memory=100 * 2**20, include_dashboard=False
        )
    there.wait_for_nodes()
    ray.init(address=there.address, namespace="nexus", log_to_driver=False, logging_level="ERROR")

    def lose_node(name: str) -> None:
        (node,) = [one for one in held[0].list_all_nodes() if one._ray_params.labels["nexus.io/node"] == name]
        held[0].remove_node(node, allow_graceful=False)

    yield lose_node
    for handle in [*find_voters().values(), *filter(None, map(find_steward, NODES))]:
        ray.kill(handle)
    ray.shutdown()
    there.shutdown()
    held.clear()
    del there
    gc.collect()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    nodes = {name: {"address": "127.0.0.1", "cpus": 1, "memory": 2**30} for name in NODES}
    sharing = {"key": CLUSTER_KEY, "copies": 2, "gone_seconds": 1}
    return Config(home=tmp_path, nodes=nodes, ray={"head": NODES[0]}, sharing=sharing)


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again, also while nobody answers; the test's own timeout ends it."""
    while True:
        with suppress(TryAgain):
            if await is_so():
                return
        await asyncio.sleep(0.1)


async def insist(sharing: Sharing, data_id: str, text: bytes) -> None:
    """Share a block, as any client would: again while it is told to."""
    while True:
        try:
            await sharing.put(TENANT, data_id, content(text))
            return
        except TryAgain:
            await asyncio.sleep(0.1)


async def require_all(directory: Directory, reach: RayStewards, wanted: dict[str, bytes]) -> None:
    """Every copy on record is there and good, on its own machine, and there are two of each."""
    entries = {entry.data_id: entry.record for entry in await directory.blocks(TENANT)}
    assert entries.keys() == wanted.keys()
    for data_id, record in entries.items():
        assert len(record.copies) == 2
        for node in record.copies:
            found = await reach.call(node, "open", TENANT, data_id)
            assert await reach.call(node, "piece", found.handle, 0) == wanted[data_id]
            await reach.call(node, "close", found.handle)


def test_what_was_acknowledged_outlives_a_killed_steward_and_a_lost_machine(
    lose: Callable[[str], None], config: Config
) -> None:
    rng = random.Random(4711)
    wanted = {f"block-{number}": rng.randbytes(rng.randint(1, 40_000)) for number in range(SHARES)}
    acknowledged: list[str] = []

    async def share_some(sharing: Sharing, ids: Iterator[str], doomed: int) -> None:
        for data_id in ids:
            await insist(sharing, data_id, wanted[data_id])
            acknowledged.append(data_id)
            if len(acknowledged) == KILL_AFTER:
                os.kill(doomed, signal.SIGKILL)

    async def story() -> None:
        await coordinator.start({1: Placement()}, config.home / "coordinator", Pace(0.03))
        homes = {name: str(config.home / name) for name in NODES}
        for home in homes.values():
            Path(home).mkdir(mode=0o700)
        handles = steward.start(config, homes)
        sharing = await steward.open_sharing(config)()

        for message in (GREET + b"{}", CALL + b"x" * 80, b"open"):  # with the cluster's token and no machine's key
            assert (await handles["clu"].ask.remote(message))[:1] in (REFUSED, AGAIN, LATER)

        async def are_there() -> bool:
            return len((await sharing.overview()).standings) == 3

        await until(are_there)
        doomed = await handles["clu"].__ray_call__.remote(lambda self: os.getpid())
        ids = iter(wanted)
        await asyncio.gather(*(share_some(sharing, ids, doomed) for _ in range(AT_ONCE)))
        await until(are_there)
        assert await handles["clu"].__ray_call__.remote(lambda self: os.getpid()) != doomed
        directory = Directory(await coordinator.connect())
        reach = RayStewards(config, directory, NODES[0])
        await require_all(directory, reach, wanted)
        lose("tron")

        async def is_restored() -> bool:
            return all("tron" not in entry.record.copies for entry in await directory.blocks(TENANT))

        await until(is_restored)
        await require_all(directory, reach, wanted)
        for data_id in random.Random(7).sample(sorted(wanted), 10):
            assert await read((await sharing.get(TENANT, data_id)).pieces) == wanted[data_id]

    asyncio.run(story())
