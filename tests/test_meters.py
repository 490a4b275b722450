"""Counts of two machines, told by a real actor: it is killed, its machine is lost, and comes back without its disk."""

import asyncio
import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.cluster_utils import Cluster

from actors import meter
from actors.meter import Meters
from cluster.meter import Vitals
from deployments.gateway import Lent
from deployments.measuring import measure, states
from nexus import telemetry
from nexus.config import COUNTS, Config
from tests.test_counts import start

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning"),  # Ray closes none
]

HEAD, OTHER = "witness", "clu"
ONE_DOCUMENT = "from nexus import telemetry\ntelemetry.count_document('done', 7)"


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Two Ray nodes; the other one can be lost and made again. The head's counts are this process' own folder."""
    monkeypatch.setattr(telemetry, "FOLDER", tmp_path / HEAD / "metrics")
    there = Cluster()
    held = [there]  # nobody holds it when it is over: what Ray left open is to be collected here

    def make(name: str) -> Any:
        (tmp_path / name / "metrics").mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("NEXUS_HOME", str(tmp_path / name))  # of all that is started there
        monkeypatch.setenv(COUNTS, str(tmp_path / name / "metrics"))
        return held[0].add_node(
            num_cpus=1, labels={"nexus.io/node": name}, object_store_memory=100 * 2**20, include_dashboard=False
        )

    make(HEAD)
    others = [make(OTHER)]
    there.wait_for_nodes()
    ray.init(address=there.address, namespace="nexus", log_to_driver=False, logging_level="ERROR")

    def change(is_there: bool) -> None:
        if is_there:
            others.append(make(OTHER))
        else:
            held[0].remove_node(others.pop(), allow_graceful=False)

    yield change
    ray.shutdown()
    there.shutdown()
    held.clear()
    others.clear()
    del there
    gc.collect()


class Observer:
    """What is there of a front door's."""

    def __init__(self, config: Config) -> None:
        self._meters = Meters(config)

    async def told(self) -> Mapping[str, Vitals | None]:
        return await self._meters.ask([OTHER])

    async def agreed(self) -> None:
        return None


def test_sums_are_of_all_machines_and_never_go_back(machines: Callable[[bool], None], tmp_path: Path) -> None:
    nodes = {name: {"address": "127.0.0.1", "cpus": 1, "memory": 2**30} for name in (HEAD, OTHER)}
    config = Config(home=tmp_path / HEAD, nodes=nodes, ray={"head": HEAD})
    here = cast(Lent, SimpleNamespace(observer=Observer(config), config=config, operator=None))
    told: list[float] = []

    def count(name: str) -> None:
        start(tmp_path / name / "metrics", ONE_DOCUMENT).communicate()

    async def look() -> tuple[float, bool]:
        """The chunks counted everywhere, and whether the other machine answered."""
        measured = await measure(here)
        found = {sample.name: sample.value for family in measured.counted for sample in family.samples}
        shown = (await states(here, measured.told)).families["nexus_node_up"].samples
        up = {sample.labels["node"]: bool(sample.value) for sample in shown}
        assert up[HEAD]
        told.append(found.get("ingest_chunks_total", 0))
        return told[-1], up[OTHER]

    async def until(chunks: float, is_there: bool) -> None:
        while await look() != (chunks, is_there):
            await asyncio.sleep(0.1)

    async def story() -> None:
        meter.start(config)
        count(HEAD)
        await until(7, True)
        count(OTHER)
        await until(14, True)
        handle = ray.get_actor(f"{meter.NAME}{OTHER}", meter.NAMESPACE)
        doomed = await handle.__ray_call__.remote(lambda self: os.getpid())
        os.kill(doomed, signal.SIGKILL)
        count(OTHER)
        await until(21, True)
        machines(False)
        count(HEAD)
        await until(28, False)
        shutil.rmtree(tmp_path / OTHER / "metrics")
        machines(True)
        count(OTHER)
        await until(35, True)

    asyncio.run(story())
    assert told == sorted(told), "no sum went back"
