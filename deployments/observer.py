"""Ray, Serve, the machines and the voters as a front door in the cluster asks them."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from actors import coordinator
from actors.coordination import COLLECTIONS, read_live
from actors.meter import Meters
from cluster.client import Client
from cluster.gpu_leases import held
from cluster.inventory import LOCAL, Inventory
from cluster.meter import Vitals
from cluster.plan import DRAINED, KEY, decode
from deployments import machines
from deployments.cluster_state import Agreed, Deployed, Joined
from nexus.config import NODE_LABEL, Config
from nexus.errors import Unavailable

FRESH_SECONDS = 1.0
INVENTORY_SECONDS = 10.0  # to look at a machine takes a process there, and a silent one is waited for
KEPT_SECONDS = 120.0
STARTING = ("STARTING", "UPDATING", "RECOVERING")

Said = TypeVar("Said")


class RayObserver:
    """The port `Observing` of cluster_state.py. All its calls belong to one event loop."""

    def __init__(self, config: Config) -> None:
        self.joined = Look(joined, FRESH_SECONDS)
        look = partial(machines.look_at, config)
        self.inventory: Look[Inventory] = Look(look, INVENTORY_SECONDS, KEPT_SECONDS)
        if config.nodes:
            self.inventory.begin()
        self.deployed = Look(deployed, FRESH_SECONDS)
        self._voters: Client | None = None
        self._meters = Meters(config)

    async def told(self) -> Mapping[str, Vitals | None]:
        """As the port says; a machine that Ray has given up is not waited for."""
        joined = await self.joined()
        told = await self._meters.ask(one.name for one in joined if one.is_alive)
        return {**dict.fromkeys(one.name for one in joined), **told}

    async def agreed(self) -> Agreed:
        """As any voter has it, with or without a quorum."""
        if self._voters is None:
            self._voters = await coordinator.connect()
        plan, drained, claims, live = await asyncio.gather(
            self._voters.get(KEY, fresh=False), self._voters.range(DRAINED, fresh=False), held(self._voters),
            self._voters.range(COLLECTIONS, fresh=False),
        )  # fmt: skip
        names = [key.removeprefix(DRAINED) for key, _, _ in drained]
        embedders = {key.removeprefix(COLLECTIONS): read_live(value).embedder for key, value, _ in live}
        return Agreed(None if plan is None else decode(plan[0]), names, claims, embedders)


class Look(Generic[Said]):
    """What a call that blocks says. One is under way at a time, and everybody waits for it.

    It is made again after `fresh` seconds; meanwhile what was said last does, where that is no older than `kept`.
    """

    def __init__(self, ask: Callable[[], Said], fresh: float, kept: float = 0.0) -> None:
        self._ask, self._fresh, self._kept = ask, fresh, kept
        self._thread = ThreadPoolExecutor(1, "observer")
        self._asked: asyncio.Future[tuple[Said, float]] | None = None
        self._said: tuple[Said, float] | None = None

    def begin(self) -> None:
        """Ask before anybody waits for it."""
        self._thread.submit(self._listen)

    async def __call__(self) -> Said:
        said = self._said
        if said is not None and self._age(said) < self._fresh:
            return said[0]
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().run_in_executor(self._thread, self._listen)
        if said is not None and self._age(said) < self._kept:
            return said[0]
        return (await asyncio.shield(self._asked))[0]

    def _listen(self) -> tuple[Said, float]:
        said = (self._ask(), time.monotonic())
        self._said = said
        return said

    def _age(self, said: tuple[Said, float]) -> float:
        return time.monotonic() - said[1]


def joined() -> Sequence[Joined]:
    """The machines as Ray knows them; of one that came back only as it is now."""
    try:
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
    except RayError as error:
        raise Unavailable(f"Ray does not tell its machines: {error}") from None
    found = [_joined(node) for node in sorted(nodes, key=lambda node: bool(node["Alive"]))]
    return list({one.name: one for one in found}.values())


def _joined(node: dict[str, Any]) -> Joined:
    labels, resources = node.get("Labels") or {}, node.get("Resources") or {}
    ours = {key: value for key, value in labels.items() if not key.startswith("ray.io/")}
    return Joined(
        labels.get(NODE_LABEL, LOCAL), node["NodeManagerAddress"], bool(node["Alive"]), ours,
        resources.get("CPU", 0.0), int(resources.get("memory", 0)),
    )  # fmt: skip


def deployed() -> Sequence[Deployed]:
    """Every deployment, as Serve's controller knows it."""
    try:
        applications = serve.status().applications
    except (RayError, RayServeException) as error:
        raise Unavailable(f"Serve does not tell its deployments: {error}") from None
    return [_deployed(*one) for application in applications.values() for one in application.deployments.items()]


def _deployed(name: str, status: Any) -> Deployed:
    states = {str(getattr(state, "value", state)): count for state, count in status.replica_states.items()}
    starting = sum(states.get(state, 0) for state in STARTING)
    return Deployed(name, str(status.status.value), states.get("RUNNING", 0), starting)
