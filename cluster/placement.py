"""What is wanted, and what there is: who goes where, or why it cannot."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.inventory import Inventory


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one replica of a model holds, in bytes over all its GPUs (or in host memory where it has none).

    `cache_bytes_per_token` is of the KV cache, 0 for a model that has none; `longest` is the most tokens of one
    request. Estimated by cluster/footprint.py.
    """

    weights: int
    overhead: int = 0
    cache_bytes_per_token: int = 0
    longest: int = 0


@dataclass(frozen=True, slots=True)
class Want:
    """Replicas of one kind. Each takes this much of one machine, and of each of `gpus` GPUs there.

    `name` is that of its deployment. A replica takes `gpu_share` of each of its GPUs' memory, or where that is 0 as
    many bytes as its footprint needs; of several GPUs it takes the whole. `nodes` are the machines it may be on, none
    for any. `is_apart`: no two replicas on one machine, as voters must be. Replicas up to `least` must have a place,
    those up to `most` get one where there is room.
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where one replica goes: its machine, the indices of its GPUs, and the bytes it takes of each."""

    want: str
    replica: int
    node: str
    gpus: tuple[int, ...] = ()
    gpu_bytes: int = 0
    cache_tokens: int = 0  # that its KV cache holds


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


def place(inventory: Inventory, wants: Sequence[Want], current: Plan | None = None) -> Plan:
    """A place for every want. Pure: equal arguments, equal plan; what `current` has stays where it still fits."""
    raise NotImplementedError
