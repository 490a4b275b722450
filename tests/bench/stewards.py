"""What sharing between machines costs, and what it survives: three stewards as Ray actors, each with its own disk."""

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from actors import coordinator, steward
from actors.coordinator import Placement, find_voters
from actors.steward import RayStewards, find_steward
from cluster.directory import Directory
from cluster.sharing import Sharing
from cluster.steward import Settings, rank
from cluster.voter import Pace
from nexus.config import Config
from nexus.errors import BlockRefused, TryAgain
from tests.share_simulation import World
from tests.stewards import CLUSTER_KEY, NODES, Machines, at_once, content, read

MIB = 2**20
ROUNDS = 3
TENANT = "bench"
SHARES, AT_ONCE, KILL_AFTER = 200, 8, 60


@contextlib.contextmanager
def three_nodes() -> Iterator[Cluster]:
    """Ray nodes in this process's own cluster, and what was begun there until it ends."""
    cluster = Cluster()
    for name in NODES:
        cluster.add_node(
            num_cpus=1, labels={"nexus.io/node": name}, object_store_memory=200 * MIB, include_dashboard=False
        )
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        for handle in [*find_voters().values(), *filter(None, map(find_steward, NODES))]:
            ray.kill(handle)
        ray.shutdown()
        cluster.shutdown()


@dataclass(frozen=True)
class There:
    """The three stewards, and what asks them as the front door of the first machine does."""

    sharing: Sharing
    directory: Directory
    handles: dict[str, "ray.actor.ActorHandle[object]"]


async def begin(folder: Path) -> There:
    nodes = {name: {"address": "127.0.0.1", "cpus": 1, "memory": 2**30} for name in NODES}
    sharing = {"key": CLUSTER_KEY, "copies": 2, "gone_seconds": 1}
    config = Config(home=folder, nodes=nodes, ray={"head": NODES[0]}, sharing=sharing)
    await coordinator.start({1: Placement()}, folder / "coordinator", Pace(0.03))
    homes = {name: str(folder / name) for name in NODES}
    for home in homes.values():
        Path(home).mkdir(mode=0o700)
    handles = steward.start(config, homes)
    directory = Directory(await coordinator.connect())
    stewards = RayStewards(config, directory, NODES[0])
    there = There(Sharing(directory, stewards, steward.settings_of(config), NODES[0]), directory, handles)
    while len((await there.sharing.overview()).standings) < len(NODES):
        await asyncio.sleep(0.1)
    return there


async def measure_large(there: There, mib: int) -> dict[str, float]:
    """Seconds per GiB: shared with two copies, read where a copy is, and read where one is borrowed."""
    piece = os.urandom(MIB)
    own = next(f"a{n}" for n in range(100) if NODES[0] in rank(NODES, TENANT, f"a{n}")[:2])
    strange = next(f"a{n}" for n in range(100) if NODES[0] not in rank(NODES, TENANT, f"a{n}")[:2])

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(mib):
            yield piece

    async def put() -> None:
        await there.sharing.put(TENANT, own, pieces())

    async def get(data_id: str) -> None:
        found, size = await there.sharing.get(TENANT, data_id), 0
        async for part in found.pieces:
            size += len(part)
        assert size == mib * MIB

    await there.sharing.put(TENANT, strange, pieces())
    taken: dict[str, list[float]] = {"put": [], "get": [], "borrow": []}
    for _ in range(ROUNDS):
        for name, work in (("put", put()), ("get", get(own)), ("borrow", get(strange))):
            started = time.perf_counter()
            await work
            taken[name].append((time.perf_counter() - started) * 1024 / mib)
    return {f"{name}_seconds_per_gib": sorted(seconds)[ROUNDS // 2] for name, seconds in taken.items()}


async def survive(there: There, lose: Callable[[str], None]) -> dict[str, float]:
    """A steward is killed in the middle of many shares, then a machine lost: what of them was, and how long it took."""
    wanted = {f"b-{number}": os.urandom(20_000) for number in range(SHARES)}
    acknowledged: list[str] = []
    doomed = await there.handles["clu"].__ray_call__.remote(lambda self: os.getpid())
    started = time.perf_counter()
    ids = iter(wanted)

    async def share_some() -> None:
        for data_id in ids:
            while True:
                try:
                    await there.sharing.put(TENANT, data_id, content(wanted[data_id]))
                    break
                except TryAgain:
                    await asyncio.sleep(0.05)
            acknowledged.append(data_id)
            if len(acknowledged) == KILL_AFTER:
                os.kill(doomed, signal.SIGKILL)

    await asyncio.gather(*(share_some() for _ in range(AT_ONCE)))
    shared = time.perf_counter() - started
    lost = await _missing(there, wanted)
    lose("tron")
    began = time.perf_counter()
    while any(
        "tron" in entry.record.copies or len(entry.record.copies) < 2 for entry in await there.directory.blocks()
    ):
        await asyncio.sleep(0.1)
    restored = time.perf_counter() - began
    lost += await _missing(there, wanted)
    return {"kill_200_shares_seconds": shared, "lost_of_200": lost, "copied_anew_seconds": restored}


async def _missing(there: There, wanted: dict[str, bytes]) -> int:
    missing = 0
    for data_id, text in wanted.items():
        missing += await read((await there.sharing.get(TENANT, data_id)).pieces) != text
    return missing


def measure_sharing(mib: int) -> dict[str, float]:
    """All that needs real processes."""
    with tempfile.TemporaryDirectory(prefix="nxs") as name, three_nodes() as cluster:

        def lose(machine: str) -> None:
            (node,) = [one for one in cluster.list_all_nodes() if one._ray_params.labels["nexus.io/node"] == machine]
            cluster.remove_node(node, allow_graceful=False)

        async def story() -> dict[str, float]:
            there = await begin(Path(name))
            return {**await measure_large(there, mib), **await survive(there, lose)}

        return asyncio.run(story())


def flip_every_bit() -> dict[str, float]:
    """Of a small block, in the place of a good copy: each is refused and repaired, or with no other copy not shown."""
    logging.disable(logging.CRITICAL)
    asyncio.to_thread = at_once  # type: ignore[assignment]
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    text, counts = b"the gripper closes with 4 N m", {"bits": 0, "bits_refused_and_repaired": 0, "released": 0}

    async def story(folder: Path) -> None:
        there = Machines(folder, Settings(copies=2))
        for node in NODES:
            await there.start(node)
        first, second = (await there.sharing.put(TENANT, "a", content(text))).record.copies
        block = await there.block("a", TENANT)
        file, whole = there.file(first, block), there.file(first, block).read_bytes()
        keeper = there.stewards[first]
        for bit in range(8 * len(whole)):
            spoilt = bytearray(whole)
            spoilt[bit // 8] ^= 1 << bit % 8
            file.write_bytes(spoilt)
            repaired = keeper._repaired
            opened = await keeper.open(TENANT, "a")
            is_same = await keeper.piece(opened.handle, 0) == text
            await keeper.close(opened.handle)
            counts["bits"] += 1
            counts["bits_refused_and_repaired"] += is_same and keeper._repaired == repaired + 1
            file.write_bytes(spoilt)
            there.up.discard(second)
            try:
                await keeper.open(TENANT, "a")
                counts["released"] += 1
            except (BlockRefused, TryAgain):
                file.write_bytes(whole)
            there.up.add(second)
        there.stop()

    with tempfile.TemporaryDirectory(prefix="nxs") as name:
        asyncio.run(story(Path(name)))
    return dict(counts)


def simulate(seeds: Sequence[int]) -> dict[str, float]:
    """So many worlds of random faults (tests/share_simulation.py); raises at the first that loses something."""
    logging.disable(logging.CRITICAL)
    asyncio.to_thread = at_once  # type: ignore[assignment]
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    counts: dict[str, float] = {"seeds": len(seeds)}
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="nxs") as name:
            world = World(Path(name), seed)
            asyncio.run(world.run())
        for what, count in world.counts.items():
            counts[what] = counts.get(what, 0) + count
    return counts
