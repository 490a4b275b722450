"""What is wanted, who goes where, and what that leaves: values, without any choice in them."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil

from pydantic import TypeAdapter, ValidationError

from cluster.inventory import Inventory
from nexus.errors import UpstreamInvalid

KEY = "placement"  # of the plan in force, in the coordinator
DRAINED = "drained/"  # and a machine's name: nothing is to go there
GRAIN = 10_000  # parts of a resource that Ray tells apart


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one replica of a model holds, in bytes. Estimated by cluster/footprint.py.

    `weights` and `cache_bytes_per_token`, of the KV cache, are those of all its GPUs together; `overhead` is of
    each, and what its share has to have room for, `beside` of each, too, and comes on top of the share. `longest` is
    the most tokens of one request, 0 where there is no cache. The cache is the same on every tensor-parallel rank
    past `divides_by`, the number of KV heads; `heads` are those of attention, 0 where nobody knows. Without GPUs, all
    of it is host memory.
    """

    weights: int
    overhead: int = 0
    cache_bytes_per_token: int = 0
    longest: int = 0
    beside: int = 0
    divides_by: int = 1
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Want:
    """Replicas of one kind. Each takes this much of one machine, and of each of `gpus` GPUs there.

    `name` is that of its deployment. A replica takes `gpu_share` of each of its GPUs' memory, or where that is 0 as
    many bytes as its footprint needs; of several GPUs it takes the whole. `nodes` are the machines it may be on, none
    for any; `nodes_of_each` are those of each replica, by its number. `is_apart`: no two replicas on one machine, as
    voters must be. Replicas up to `least` must have a place, those up to `most` get one where there is room.
    """

    name: str
    least: int = 1
    most: int = 1
    cpus: float = 0.0
    memory: int = 0
    gpus: int = 0
    gpu_share: float = 0.0
    footprint: Footprint = Footprint(0)
    nodes: tuple[str, ...] = ()
    is_apart: bool = False
    nodes_of_each: tuple[tuple[str, ...], ...] = ()
    stages: int = 1  # of a pipeline, which its GPUs are divided between

    def nodes_of(self, replica: int) -> tuple[str, ...]:
        """The machines that one replica may be on, none for any."""
        return self.nodes_of_each[replica] if replica < len(self.nodes_of_each) else self.nodes

    @property
    def needed(self) -> int:
        """Bytes of each GPU without which it cannot answer its longest request."""
        cache = self.footprint.cache_bytes_per_token * self.footprint.longest
        return self.footprint.overhead + ceil((self.footprint.weights + cache) / max(1, self.gpus))

    def share_of(self, memory: int) -> int:
        """Bytes that a replica gives itself of a GPU with this memory."""
        return int(self.gpu_share * memory) if self.gpu_share else self.needed

    def taken_of(self, memory: int) -> int:
        """Bytes that a replica takes of a GPU with this memory."""
        return self.share_of(memory) + self.footprint.beside

    def works_in(self, memory: int) -> bool:
        """Whether its share of a GPU with this memory is enough, were the GPU its own."""
        return self.share_of(memory) >= self.needed and self.taken_of(memory) <= memory

    @property
    def works_on_host(self) -> bool:
        """Whether its KV cache, where it has one in host memory, holds its longest request."""
        return not self.footprint.cache_bytes_per_token or self.cache_tokens_of(0) >= self.footprint.longest

    def grains_of(self, memory: int) -> int:
        """The part of a GPU that Ray is asked for: of several all, of one what is taken, rounded up."""
        return GRAIN if self.gpus > 1 else max(1, -(-self.taken_of(memory) * GRAIN // memory))

    def cache_tokens_of(self, memory: int) -> int:
        """How many tokens its KV cache holds on GPUs with this memory each, or in its host memory."""
        footprint = self.footprint
        if not footprint.cache_bytes_per_token:
            return 0
        if not self.gpus:
            return max(0, self.memory - footprint.weights - footprint.overhead) // footprint.cache_bytes_per_token
        room = (self.share_of(memory) - footprint.overhead) * self.gpus - footprint.weights
        return max(0, room) // footprint.cache_bytes_per_token


@dataclass(frozen=True, slots=True)
class Place:
    """Where one replica goes: its machine, the indices of its GPUs, and what it takes.

    `gpu_bytes` it takes of each GPU, and `gpu_share` is what Ray is asked for of each (`num_gpus`).
    """

    want: str
    replica: int
    node: str
    gpus: tuple[int, ...] = ()
    gpu_bytes: int = 0
    cache_tokens: int = 0  # that its KV cache holds
    gpu_share: float = 0.0
    cpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A want that has no place: why, and the smallest change that would make it fit."""

    want: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Who goes where. With a refusal in it nothing of it is to be applied."""

    places: tuple[Place, ...]
    refusals: tuple[Refusal, ...] = ()


_PLAN = TypeAdapter(Plan)


def encode(plan: Plan) -> bytes:
    """A plan as the coordinator keeps it, in JSON."""
    return _PLAN.dump_json(plan)


def decode(content: bytes) -> Plan:
    """What `encode` wrote. Raises UpstreamInvalid for what is no plan."""
    try:
        return _PLAN.validate_json(content)
    except ValidationError:
        raise UpstreamInvalid(f"the coordinator keeps something under {KEY!r} that is no plan") from None


def make_way(plan: Plan, machine: str) -> Plan:
    """Without the last replica of each kind that has two on some machine and none on this one.

    So the next plan has one to place, and takes the emptiest machine for it.
    """
    there = {place.want for place in plan.places if place.node == machine}
    doubled: dict[str, Place] = {}
    counts = Counter((place.want, place.node) for place in plan.places)
    for place in plan.places:
        if place.want not in there and counts[place.want, place.node] > 1:
            doubled[place.want] = place
    given_up = set(doubled.values())
    return replace(plan, places=tuple(place for place in plan.places if place not in given_up))


# What a plan leaves


@dataclass(frozen=True, slots=True)
class GpuLeft:
    """What is free of one GPU: bytes, and the share that Ray may still give, 0 where a replica took it whole."""

    index: int
    memory: int
    share: float


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """What is free of one machine."""

    node: str
    cpus: float
    memory: int
    gpus: tuple[GpuLeft, ...]


def left(inventory: Inventory, plan: Plan) -> tuple[NodeLeft, ...]:
    """What each machine has left beside the plan, in the order of the inventory."""
    by_node: dict[str, list[Place]] = defaultdict(list)
    for place in plan.places:
        by_node[place.node].append(place)
    found = []
    for node in inventory.nodes:
        here = by_node[node.name]
        gpus = []
        for gpu in node.gpus:
            on_it = [place for place in here if gpu.index in place.gpus]
            share = round(1 - sum(place.gpu_share for place in on_it), 4)
            gpus.append(GpuLeft(gpu.index, gpu.free - sum(place.gpu_bytes for place in on_it), share))
        cpus = round(node.cpus - sum(place.cpus for place in here), 4)
        found.append(NodeLeft(node.name, cpus, node.memory - sum(place.memory for place in here), tuple(gpus)))
    return tuple(found)


# What changes from one plan to another


@dataclass(frozen=True, slots=True)
class Moves:
    """How one plan becomes another. False where nothing has to be done.

    Replicas of one want do the same, so one that ends and another that begins elsewhere are one that moved.
    """

    added: tuple[Place, ...] = ()
    removed: tuple[Place, ...] = ()
    moved: tuple[tuple[Place, Place], ...] = ()
    resized: tuple[tuple[Place, Place], ...] = ()  # of those that stay where they are

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.moved or self.resized)


def moves(old: Plan, new: Plan) -> Moves:
    """What has to be done for the new plan where the old one is in force."""
    before, after = _by_want(old.places), _by_want(new.places)
    added: list[Place] = []
    removed: list[Place] = []
    moved: list[tuple[Place, Place]] = []
    resized: list[tuple[Place, Place]] = []
    for want in dict.fromkeys([*after, *before]):
        leaving, coming = list(before[want]), list(after[want])
        for place in tuple(coming):
            if stays := next((one for one in leaving if (one.node, one.gpus) == (place.node, place.gpus)), None):
                leaving.remove(stays)
                coming.remove(place)
                if _size(stays) != _size(place):
                    resized.append((stays, place))
        moved += zip(leaving, coming, strict=False)
        removed += leaving[len(coming) :]
        added += coming[len(leaving) :]
    return Moves(tuple(added), tuple(removed), tuple(moved), tuple(resized))


def _by_want(places: Iterable[Place]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        found[place.want].append(place)
    return found


def _size(place: Place) -> tuple[float, ...]:
    return (place.gpu_bytes, place.gpu_share, place.cache_tokens, place.cpus, place.memory)
