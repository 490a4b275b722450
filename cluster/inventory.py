"""What the machines have: CPUs, memory, disks and GPUs, as their owner describes them and as they say themselves."""

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import psutil
from pydantic import ByteSize

from nexus.config import Config
from nexus.config import Node as Described

NODE_LABEL = "nexus.io/node"  # which Ray carries, with the machine's name
LOCAL = "local"  # the only machine, where the settings name none
NEARLY = 0.9  # of what is on the box is as much as described: ECC, firmware and kernel keep up to a tenth
UNNOTICED_BYTES = 2**30  # of a GPU, which its driver, a display or a monitor takes; whoever computes takes more
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")

log = logging.getLogger("nexus.inventory")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `taken` is what processes that are not of Nexus hold of its `memory` (both in bytes).

    `used` is what all hold, in bytes, and `busy` the share of the last moment that it computed, where it says that.
    """

    index: int
    model: str
    memory: int
    taken: int = 0
    used: int = field(default=0, compare=False)
    busy: float | None = field(default=None, compare=False)

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


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as described: on which machine, of what kind, and for people also what to do."""

    node: str
    what: Literal["machine", "cpus", "memory", "disk", "gpus", "model", "gpu memory", "taken"]
    sentence: str


def _is_nobodys(process: int) -> bool:
    return False


# ── as their owner describes them ───────────────────────────────────────────────────────────────


def configured(config: Config, is_ours: Callable[[int], bool] = _is_nobodys) -> Inventory:
    """The machines of the settings; where they name none, this one, as it says itself."""
    if not config.nodes:
        return Inventory((look(LOCAL, "127.0.0.1", is_ours, [config.home]),))
    return Inventory(tuple(_as_described(name, node) for name, node in config.nodes.items()))


def _as_described(name: str, node: Described) -> Node:
    cards = [entry for entry in node.gpus for _ in range(entry.count)]
    gpus = tuple(Gpu(index, card.model, int(card.memory)) for index, card in enumerate(cards))
    disks = {folder: int(size) for folder, size in node.disks.items()}
    return Node(name, node.address, node.cpus, int(node.memory), gpus, dict(node.labels), disks)


# ── as they say themselves ──────────────────────────────────────────────────────────────────────


def look(
    name: str, address: str, is_ours: Callable[[int], bool] = _is_nobodys, disks: Iterable[str | os.PathLike[str]] = ()
) -> Node:
    """What this machine has now, and this process may use of it, with the free space at each of the folders `disks`.

    `is_ours` tells by its id whether a process is of Nexus: what others hold of a GPU is `taken`.
    """
    cpus, memory = _limits(CGROUPS, OWN_CGROUP)
    return Node(
        name, address, min(_usable_cpus(), cpus), int(min(psutil.virtual_memory().total, memory)), _gpus(is_ours),
        disks={str(folder): _free_bytes(Path(folder)) for folder in disks},
    )  # fmt: skip


def _usable_cpus() -> float:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1


def _limits(root: Path, own: Path) -> tuple[float, float]:
    """The CPUs and the bytes that control groups (v2) leave to this process; infinite where they do not say."""
    cpus = memory = math.inf
    with suppress(FileNotFoundError):  # where there is no Linux to ask
        for group in _groups(root, own.read_text()):
            with suppress(FileNotFoundError):
                quota, period = (group / "cpu.max").read_text().split()
                cpus = min(cpus, math.inf if quota == "max" else int(quota) / int(period))
            with suppress(FileNotFoundError):
                memory = min(memory, float((group / "memory.max").read_text().replace("max", "inf")))
    return cpus, memory


def _groups(root: Path, own: str) -> Iterator[Path]:
    """The group that this process is in and all above it: each may set a limit."""
    path = next((line.removeprefix("0::/") for line in own.splitlines() if line.startswith("0::/")), "")
    group = root / path
    yield group
    yield from (above for above in group.parents if above.is_relative_to(root))


def _free_bytes(folder: Path) -> int:
    """At the folder, or where it would be made."""
    folder = folder.absolute()
    return psutil.disk_usage(str(next(one for one in (folder, *folder.parents) if os.path.exists(one)))).free


def _gpus(is_ours: Callable[[int], bool]) -> tuple[Gpu, ...]:
    """The GPUs of this machine that a program could use; none without a driver, or NVML's bindings."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
        try:
            gpus = [_gpu(pynvml, index, is_ours) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return ()
    except pynvml.NVMLError as error:  # the machine is still good for what needs no GPU
        log.warning("the NVIDIA driver does not answer (%s), so no GPU is used; see what `nvidia-smi` says", error)
        return ()
    return tuple(gpu for gpu in gpus if gpu is not None)


def _gpu(nvml: ModuleType, index: int, is_ours: Callable[[int], bool]) -> Gpu | None:
    """None for one that no program could use as it is: the log says why, and the others serve."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if _is_divided(nvml, handle):
            log.warning("GPU %d is divided by MIG and left out; `nvidia-smi -i %d -mig 0` makes it one", index, index)
            return None
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        taken = _taken(memory.used, _holders(nvml, handle), is_ours)
        size = memory.total - memory.reserved
        return Gpu(index, nvml.nvmlDeviceGetName(handle), size, taken, memory.used, _busy(nvml, handle))
    except nvml.NVMLError as error:
        log.warning("GPU %d cannot be read (%s) and is left out; see what `nvidia-smi` says of it", index, error)
        return None


def _busy(nvml: ModuleType, handle: object) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NVMLError_NotSupported:  # by some virtual ones
        return None


def _is_divided(nvml: ModuleType, handle: object) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError_NotSupported:  # by most models
        return False


def _holders(nvml: ModuleType, handle: object) -> dict[int, int | None]:
    """The bytes that each process holds, by its id; None where NVML cannot tell. Some drivers list none."""
    held: dict[int, int | None] = {}
    lists = (nvml.nvmlDeviceGetGraphicsRunningProcesses_v3, nvml.nvmlDeviceGetComputeRunningProcesses_v3)
    for processes in lists:  # one that draws and computes is in both
        with suppress(nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_FunctionNotFound):
            held |= {process.pid: process.usedGpuMemory for process in processes(handle)}
    return held


def _taken(used: int, held: Mapping[int, int | None], is_ours: Callable[[int], bool]) -> int:
    """What others than Nexus hold of a GPU: what NVML says of each or, if it cannot tell, all that is not ours.

    It does not list a process in another container, or one that computes through MPS.
    """
    ours = {process for process in held if is_ours(process)}
    unlisted = used - sum(size or 0 for size in held.values())
    is_untold = any(held[process] is None for process in held.keys() - ours)
    if is_untold or (None not in held.values() and unlisted > UNNOTICED_BYTES):
        return max(0, used - sum(held[process] or 0 for process in ours))
    return sum(held[process] or 0 for process in held.keys() - ours)


# ── one against the other ───────────────────────────────────────────────────────────────────────


def differences(wanted: Inventory, seen: Inventory) -> list[Difference]:
    """What is not as described, machine by machine; nothing for what is equal, or better."""
    there, described = ({node.name: node for node in inventory.nodes} for inventory in (seen, wanted))
    found: list[Difference] = []
    for name, node in described.items():
        if name in there:
            found += [*_of_machine(node, there[name]), *_of_gpus(node, there[name])]
        else:
            sentence = f"{name} ({node.address}) has not joined: run `nexus node start` there, or remove nodes.{name}"
            found.append(Difference(name, "machine", sentence))
    for name, node in there.items():
        if name not in described:
            sentence = f"{name} ({node.address}) has joined and is not described: add it as nodes.{name}, or stop it"
            found.append(Difference(name, "machine", sentence))
    return found


def _of_machine(node: Node, there: Node) -> Iterator[Difference]:
    name = node.name
    if there.cpus < node.cpus:
        yield Difference(
            name, "cpus", f"{name} has {there.cpus:g} CPUs, not {node.cpus:g}: set nodes.{name}.cpus to {there.cpus:g}"
        )
    if there.memory < NEARLY * node.memory:
        yield Difference(
            name, "memory",
            f"{name} has {_size(there.memory)} of memory, not {_size(node.memory)}: lower nodes.{name}.memory, or see"
            " which limit or fault keeps the rest",
        )  # fmt: skip
    for folder, size in node.disks.items():
        if there.disks.get(folder, size) < size:
            yield Difference(
                name, "disk",
                f"{folder} on {name} has {_size(there.disks[folder])} free, not {_size(size)}: make room there, or"
                f" lower nodes.{name}.disks",
            )  # fmt: skip


def _of_gpus(node: Node, there: Node) -> Iterator[Difference]:
    name, settings = node.name, f"nodes.{node.name}.gpus"
    wanted, seen = ({gpu.index: gpu for gpu in one.gpus} for one in (node, there))
    if missing := sorted(wanted.keys() - seen.keys()):
        yield Difference(
            name, "gpus",
            f"{name} has {len(seen)} usable GPUs, not {len(wanted)}, and no {_list(missing)}: `nvidia-smi` there says"
            f" why (a card lost or divided by MIG, a driver that does not answer), or change {settings}",
        )  # fmt: skip
    if more := sorted(seen.keys() - wanted.keys()):
        yield Difference(
            name, "gpus", f"{name} also has {_list(more)}, which Nexus leaves alone: add to {settings} what it may use"
        )
    both = [(wanted[index], seen[index]) for index in sorted(wanted.keys() & seen.keys())]
    alike: dict[tuple[str, str, int, int], list[int]] = {}  # one sentence for all of which the same is to be said
    for described, gpu in both:
        alike.setdefault((described.model, gpu.model, described.memory, gpu.memory), []).append(gpu.index)
    for (model, other, memory, less), indices in alike.items():
        if not _is_model(model, other):
            yield Difference(name, "model", f"{_list(indices)} of {name}: {other}, not {model}: correct {settings}")
        if less < NEARLY * memory:
            yield Difference(
                name, "gpu memory",
                f"{_list(indices)} of {name}: {_size(less)} of memory, not {_size(memory)}: correct {settings}",
            )  # fmt: skip
    for described, gpu in both:
        if gpu.taken > described.taken + UNNOTICED_BYTES:
            yield Difference(
                name, "taken",
                f"others hold {_size(gpu.taken)} of GPU {gpu.index} of {name}, around which Nexus plans: to have it,"
                " end the processes that `nvidia-smi` lists there",
            )  # fmt: skip


def _is_model(described: str, reported: str) -> bool:
    """Whether every word described is reported: `H100` is an `NVIDIA H100 80GB HBM3`, and any is a `GPU`."""
    wanted, there = (set(re.findall("[a-z0-9]+", text.lower())) for text in (described, reported))
    return wanted - {"gpu"} <= there


def _list(indices: list[int]) -> str:
    return f"GPU{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _size(count: int) -> str:
    return ByteSize(count).human_readable()


def real(wanted: Inventory, seen: Inventory) -> Inventory:
    """What a plan is made of: the machines and GPUs described that are there, with no more than they have.

    A GPU's memory is what it reports; of a machine's CPUs, memory and disks Nexus takes no more than described.
    """
    there = {node.name: node for node in seen.nodes}
    return Inventory(tuple(_real(node, there[node.name]) for node in wanted.nodes if node.name in there))


def _real(node: Node, there: Node) -> Node:
    described = {gpu.index for gpu in node.gpus}
    return replace(
        node, cpus=min(node.cpus, there.cpus), memory=min(node.memory, there.memory),
        gpus=tuple(gpu for gpu in there.gpus if gpu.index in described),
        disks={folder: min(size, there.disks.get(folder, size)) for folder, size in node.disks.items()},
    )  # fmt: skip


def usable_gpus(node: Node) -> tuple[int, ...]:
    """The indices of the GPUs that nobody else computes on."""
    return tuple(gpu.index for gpu in node.gpus if gpu.taken <= UNNOTICED_BYTES)
