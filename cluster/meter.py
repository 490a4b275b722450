"""What a machine tells whoever measures: the counts of its processes, and how it does at this moment."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.bootstrap import is_of_this_node
from cluster.inventory import Node, look
from nexus import telemetry
from nexus.counts import Reading


@dataclass(frozen=True, slots=True)
class Vitals:
    """`disk` is the one that its home is on; all sizes are in bytes. No `reading` where each process counts alone."""

    reading: Reading | None
    node: Node
    memory_used: int
    disk: int
    disk_free: int


def tell(name: str, home: Path) -> Vitals:
    """For this machine."""
    disk = psutil.disk_usage(str(home))
    node = look(name, "", is_of_this_node)
    return Vitals(telemetry.counted(), node, psutil.virtual_memory().used, disk.total, disk.free)
