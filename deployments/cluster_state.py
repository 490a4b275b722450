"""What the cluster looks like: what Ray, Serve, the machines, the coordinator and the stores say, side by side.

Each of them may be away. What one could not tell is None, and `unknown` says why; nothing waits for it for long.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from cluster.client import Absent
from cluster.gpu_leases import Claim
from cluster.inventory import LOCAL, Gpu, Inventory, Node, configured, differences
from cluster.meter import Vitals
from cluster.plan import Place, Plan
from cluster.raft import Status
from deployments.planning import gibibytes, models_of
from nexus.errors import Forbidden, NexusError, Unavailable
from nexus.ports import DocumentStore
from nexus.resident import Standing
from nexus.types import Principal

if TYPE_CHECKING:
    from deployments.gateway import Lent

VOTER = "voter"  # a want that is no deployment
UNWELL = ("UNHEALTHY", "DEPLOY_FAILED")
PATIENCE_SECONDS = 6.0  # for each of those that are asked; all at once

_COUNTING = ThreadPoolExecutor(1, "tally")  # whoever asks often has one count under way, and no more

Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class Joined:
    """A machine as Ray knows it; memory in bytes."""

    name: str
    address: str
    is_alive: bool
    labels: Mapping[str, str]
    cpus: float
    memory: int


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployment as Serve knows it: how many replicas run, and how many are about to."""

    name: str
    status: str
    running: int
    starting: int

    @property
    def want(self) -> str:
        """What it is, wherever it is."""
        return self.name.partition("@")[0]

    @property
    def node(self) -> str:
        """The machine it is pinned to, "" where there is one only."""
        return self.name.partition("@")[2]


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the coordinator keeps of the machines; no plan where none was applied. `embedders` are by collection."""

    plan: Plan | None
    drained: Sequence[str] = ()
    claims: Sequence[Claim] = ()
    embedders: Mapping[str, str] = field(default_factory=dict)


class Observing(Protocol):
    """Where a front door learns of the cluster. Each raises Unavailable where it cannot."""

    async def joined(self) -> Sequence[Joined]:
        """Every machine that Ray knows or knew, each once."""
        ...

    async def inventory(self) -> Inventory:
        """What the machines say they have; those that do not answer are left out."""
        ...

    async def deployed(self) -> Sequence[Deployed]: ...
    async def agreed(self) -> Agreed: ...

    async def told(self) -> Mapping[str, Vitals | None]:
        """What each machine that is or was there tells whoever measures; None of one that is away."""
        ...


@dataclass(frozen=True, slots=True)
class SeenGpu:
    """A GPU with what its machine's processes claimed of it, and what the plan puts there."""

    gpu: Gpu
    claims: Sequence[Claim]
    planned: Sequence[Place]


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as it is, or where it does not say, as it is described; `gpus` then are not known."""

    node: Node
    is_alive: bool
    gpus: Sequence[SeenGpu] | None


@dataclass(frozen=True, slots=True)
class Counted:
    """A collection, and what the caller may read of it; and how its tenant's part is searched, where that is known."""

    name: str
    documents: int
    chunks: int
    sequence: int
    index: Standing | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """The requests that an engine works on, and those on their way to it."""

    ongoing: int
    queued: int


@dataclass(frozen=True, slots=True)
class State:
    """Everything that could be had. `queues` are by deployment, where they are known."""

    machines: Sequence[Machine] | None
    agreed: Agreed | None
    deployed: Sequence[Deployed] | None
    queues: Mapping[str, Queue]
    voters: Sequence[Status | Absent] | None
    collections: Sequence[Counted] | None
    differences: Sequence[str]
    unknown: Mapping[str, str]


class Unobserved:
    """Nobody to ask: a front door over plain objects has no machines."""

    async def joined(self) -> Sequence[Joined]:
        raise Unavailable("this Nexus sees no machines")

    async def inventory(self) -> Inventory:
        raise Unavailable("this Nexus sees no machines")

    async def deployed(self) -> Sequence[Deployed]:
        raise Unavailable("this Nexus has no deployments")

    async def agreed(self) -> Agreed:
        raise Unavailable("this Nexus has no coordinator")

    async def told(self) -> Mapping[str, Vitals | None]:
        raise Unavailable("this Nexus sees no machines")


async def observe(here: Lent, principal: Principal) -> State:
    """Ask all at once, each for PATIENCE_SECONDS at most."""
    asked = _Asked({})
    observer = here.observer or Unobserved()
    (joined, seen, deployed, agreed, voters, collections, standings), loads = await asyncio.gather(
        asyncio.gather(
            asked.for_("nodes", observer.joined()),
            asked.for_("gpus", observer.inventory()),
            asked.for_("deployments", observer.deployed()),
            asked.for_("placement", observer.agreed()),
            asked.for_("coordinator", _describe(here)),
            asked.for_("collections", _count(here, principal)),
            asked.for_("indexes", _standings(here, principal)),
        ),
        asyncio.gather(*(asked.for_(f"queue of {name}", load()) for name, load in here.engines.items())),
    )
    described = configured(here.config).nodes if here.config.nodes else ()
    machines = None if joined is None else join(described, joined, seen, agreed)
    working = {name: sum(load) for name, load in zip(here.engines, loads, strict=True) if isinstance(load, list)}
    queues = _queues(here, deployed or (), working)
    by_name = {one.collection: one for one in standings or ()}
    collections = collections and [replace(one, index=by_name.get(one.name)) for one in collections]
    found = [] if machines is None else compare(described, machines, deployed, agreed)
    found += _other_embedders(here.config.models.embedder, agreed, collections or ())
    return State(machines, agreed, deployed, queues, voters, collections, found, asked.unknown)


def _other_embedders(configured: str, agreed: Agreed | None, collections: Sequence[Counted]) -> list[str]:
    """Of the caller's collections: what is live stays so, whatever the settings say by now."""
    known = {} if agreed is None else agreed.embedders
    return [
        f"collection {one.name!r} is searched with another embedder than models.embedder:"
        " `nexus reindex --status` says which, `nexus reindex` moves it"
        for one in collections
        if known.get(one.name, "") not in ("", configured)
    ]


@dataclass(frozen=True, slots=True)
class _Asked:
    unknown: dict[str, str]

    async def for_(self, part: str, asking: Awaitable[Told]) -> Told | None:
        """What is told; None, and the reason, where nothing is, or not in time."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await asking
        except TimeoutError:
            self.unknown[part] = f"no answer in {PATIENCE_SECONDS:g} seconds"
        except NexusError as error:
            self.unknown[part] = error.message
        return None


async def _describe(here: Lent) -> Sequence[Status | Absent]:
    if here.operator is None:
        raise Unavailable("this Nexus has no coordinator")
    return await here.operator.describe()


async def _count(here: Lent, principal: Principal) -> Sequence[Counted]:
    if "documents:read" not in principal.permissions:
        raise Forbidden("this key may not read documents")
    return await asyncio.get_running_loop().run_in_executor(_COUNTING, _counted, here.documents, principal)


async def _standings(here: Lent, principal: Principal) -> Sequence[Standing]:
    """Of the caller's tenant. How much of an index others may read besides is shown to administrators only."""
    found = [] if here.standings is None else await here.standings(principal.tenant)
    is_told = "admin" in principal.permissions
    return found if is_told else [replace(one, rows=None, bytes=None) for one in found]


def _counted(documents: DocumentStore, principal: Principal) -> list[Counted]:
    """Collections without a document for this caller are none of theirs."""
    found = documents.tally(principal)
    ours = [one for name in found if (one := documents.collection(name, principal.tenant)) is not None]
    return [Counted(one.name, *found[one.name], one.sequence) for one in ours]


def _queues(here: Lent, deployed: Sequence[Deployed], working: Mapping[str, int]) -> dict[str, Queue]:
    """By deployment, where there is one of a model on a machine: an engine goes by these two.

    What waits on the way to it is what the front door has under way there beyond what the engine works on.
    """
    models = models_of(here.config)
    engines = {one.name: _engine(models[one.want], one.node) for one in deployed if one.want in models}
    sent = Counter[str]()
    for member in here.balancer.report().members:
        sent[_engine(member.name, member.place)] += member.in_flight
    shared = Counter(engines.values())
    return {
        name: Queue(working[engine], max(0, sent[engine] - working[engine]))
        for name, engine in engines.items()
        if engine in working and shared[engine] == 1
    }


def _engine(model: str, node: str) -> str:
    return f"{model}@{node}" if node else model


# ── side by side ────────────────────────────────────────────────────────────────────────────────


def join(
    described: Sequence[Node], joined: Sequence[Joined], seen: Inventory | None, agreed: Agreed | None
) -> list[Machine]:
    """Every machine that is described or known, with what is claimed of its GPUs and planned for them."""
    wanted = {node.name: node for node in described}
    known = {one.name: one for one in joined}
    found = {} if seen is None else {node.name: node for node in seen.nodes}
    machines = []
    for name in dict.fromkeys([*wanted, *known]):
        is_alive = name in known and known[name].is_alive
        node = found.get(name) or wanted.get(name) or _as_joined(known[name])
        if name in known:
            node = replace(node, address=known[name].address, labels=known[name].labels)
        gpus = [_side_by_side(name, gpu, agreed) for gpu in node.gpus] if is_alive and name in found else None
        machines.append(Machine(node, is_alive, gpus))
    return machines


def _as_joined(machine: Joined) -> Node:
    return Node(machine.name, machine.address, machine.cpus, machine.memory)


def _side_by_side(node: str, gpu: Gpu, agreed: Agreed | None) -> SeenGpu:
    if agreed is None:
        return SeenGpu(gpu, (), ())
    claims = [one for one in agreed.claims if (one.node, one.gpu) == (node, gpu.index)]
    places = agreed.plan.places if agreed.plan else ()
    return SeenGpu(gpu, claims, [one for one in places if one.node == node and gpu.index in one.gpus])


def compare(
    described: Sequence[Node], machines: Sequence[Machine], deployed: Sequence[Deployed] | None, agreed: Agreed | None
) -> list[str]:
    """What is not as it is described, planned or wanted, a sentence each; what is not known is passed over."""
    there = Inventory(tuple(machine.node for machine in machines if machine.is_alive))
    found = [one.sentence for one in differences(Inventory(tuple(described)), there)] if described else []
    for machine in machines:
        found += [sentence for gpu in machine.gpus or () for sentence in _of_gpu(machine.node.name, gpu)]
    away = {machine.node.name for machine in machines if not machine.is_alive}  # which says enough
    found += [
        f"{one.name} is unhealthy: {one.running} of its replicas run; its log says why"
        for one in deployed or ()
        if one.status in UNWELL and one.node not in away
    ]
    if deployed is not None and agreed is not None and agreed.plan is not None:
        found += _not_running(agreed.plan, {one.name for one in deployed}, away)
    return found


def _not_running(plan: Plan, running: Collection[str], away: Collection[str]) -> Iterator[str]:
    """Models are called after their machines, but on a machine alone; voters are no deployments."""
    for want, node in dict.fromkeys((place.want, place.node) for place in plan.places):
        if want != VOTER and node not in away and not {want, f"{want}@{node}"} & set(running):
            name = want if node == LOCAL else f"{want}@{node}"
            yield f"{name} is planned and does not run: `nexus up` applies the plan"


def _of_gpu(node: str, seen: SeenGpu) -> Iterator[str]:
    name, gpu = f"GPU {seen.gpu.index} of {node}", seen.gpu
    planned = sum(place.gpu_bytes for place in seen.planned)
    if planned > gpu.free:
        yield (
            f"{name} has {gibibytes(gpu.free)} for Nexus, and {gibibytes(planned)} are planned there: free it, or"
            " `nexus up` plans around what others hold"
        )
    claimed = sum(claim.bytes for claim in seen.claims)
    if claimed > planned:
        yield f"{name}: replicas hold {gibibytes(claimed)}, and {gibibytes(planned)} are planned"
