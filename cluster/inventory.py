"""What the machines have: CPUs, memory, disks and GPUs, as their owner describes them and as they say themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field

NODE_LABEL = "nexus.io/node"  # which Ray carries, with the machine's name


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `taken` is what processes that are not of Nexus hold of its `memory` (both in bytes)."""

    index: int
    model: str
    memory: int
    taken: int = 0

    @property
    def free(self) -> int:
        """What Nexus may use of it, in bytes."""
        return max(0, self.memory - self.taken)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine. `memory` and `disks` (free space by folder) are in bytes; one without GPUs is normal."""

    name: str
    address: str
    cpus: float
    memory: int
    gpus: tuple[Gpu, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    disks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Inventory:
    """All machines, in the order of the configuration."""

    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)
