"""Why something has no place, and the smallest change that would give it one.

A remedy is one change of a setting, of what others hold or of the machines, and has been planned with: it gives the
want its least beside everything that has a place. Where several have none, each remedy is for one of them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, floor

from cluster.inventory import Gpu, Inventory, Node
from cluster.packing import Packing, Room
from cluster.plan import GRAIN, Footprint, Plan, Refusal, Want
from cluster.planner import LARGE, Solved, fits_alone, fits_beside, place_least, solve

GIB = 2**30
TRIED = 60  # changes at most for one want
FULLEST = 0.95  # of a GPU's memory, which no engine should be told to go past
SHORTEST = 16  # no fewer tokens than this part of what was wanted is called a remedy


@dataclass(frozen=True, slots=True)
class Change:
    """What to do, in words, and as what would then be there and be wanted."""

    says: str
    inventory: Inventory
    want: Want


def refuse(inventory: Inventory, wants: Sequence[Want], current: Plan | None, solved: Solved) -> tuple[Refusal, ...]:
    """A refusal for each want without its least."""
    refusals = []
    for want in wants:
        if want.name in solved.missing:
            is_alone = want.name in solved.alone
            packing = Packing(inventory) if is_alone else solved.packing
            place_least(packing, want)  # as many as there is room for, to see what the next one lacks
            reason = _explain(packing, want, is_alone)
            changes = list(islice(_changes(inventory, want, packing), TRIED))
            packing.release_all(want)
            refusals.append(Refusal(want.name, reason, _find_remedy(wants, current, solved, want, changes)))
    return tuple(refusals)


def _find_remedy(
    wants: Sequence[Want], current: Plan | None, solved: Solved, want: Want, changes: Sequence[Change]
) -> str:
    """The first change with which a plan for all that has a place, and for this, is none that refuses."""
    others = [other for other in wants if other.name not in solved.missing]
    places = solved.places(others)
    replicas = sum(other.least for other in (*others, want))
    for change in changes:
        if not fits_alone(change.inventory, change.want):
            continue
        changed = [*others, change.want]
        is_large = replicas * len(change.inventory.nodes) > LARGE
        if is_large and not fits_beside(change.inventory, changed, change.want, places):
            continue
        if not solve(change.inventory, changed, current).missing:
            return change.says
    return f"leave {want.name} out"


# Why


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def _explain(packing: Packing, want: Want, is_alone: bool) -> str:
    beside = "" if is_alone else " beside what else is wanted"
    return f"{packing.count(want)} of {want.least} replicas have a place{beside}; {_find_shortage(packing, want)}"


def _find_shortage(packing: Packing, want: Want) -> str:
    """What is too little on every machine that the next replica may be on."""
    rooms, names = _next_rooms(packing, want)
    if names and not any(name in packing.room_of for name in names):
        return f"of the machines it may be on there is none: {', '.join(names)}"
    if not rooms:
        return "each needs a machine of its own, and it has one on every machine that it may be on"
    roomy = max(rooms, key=lambda room: room.memory)
    if roomy.memory < want.memory:
        return (
            f"one needs {_gib(want.memory)} of host memory, and the most that is free is {_gib(roomy.memory)}"
            f" ({roomy.node.name})"
        )
    hosts = [room for room in rooms if room.has_host(want)]
    if not hosts:
        idle = max(rooms, key=lambda room: room.cpus)
        return (
            f"one needs {want.cpus:g} CPUs and {_gib(want.memory)} of host memory; {idle.node.name} has"
            f" {idle.cpus / GRAIN:g} CPUs and {_gib(idle.memory)} free"
        )
    if not want.gpus:
        return f"its KV cache holds {want.cache_tokens_of(0)} tokens, and one request may have {want.footprint.longest}"
    return _find_gpu_shortage(hosts, want)


def _next_rooms(packing: Packing, want: Want) -> tuple[list[Room], tuple[str, ...]]:
    """The machines that a replica without a place may be on, and how they are called where they were chosen."""
    missing = [replica for replica in range(want.least) if not packing.has(want, replica)] or [0]
    found = [(packing.rooms_for(want, replica), want.nodes_of(replica)) for replica in missing]
    return min(found, key=lambda one: len(one[0])) if want.nodes_of_each else found[0]


def _find_gpu_shortage(rooms: Sequence[Room], want: Want) -> str:
    gpus = [(room, one) for room in rooms for one in room.gpus]
    if not gpus:
        return f"none of its machines has a GPU: {', '.join(room.node.name for room in rooms[:8])}"
    largest = max((one.gpu.memory for _, one in gpus))
    if not any(want.works_in(one.gpu.memory) for _, one in gpus):
        return _explain_need(want, largest)
    if want.gpus > 1:
        count, room = max(((_count_whole(room, want), room) for room in rooms), key=lambda one: one[0])
        held = [str(one.gpu.index) for one in room.gpus if one.gpu.taken]
        others = f"; others hold some of its GPUs {', '.join(held)}" if held else ""
        has = f"{room.node.name} has {count} of one kind that nobody uses{others}"
        return f"one needs {want.gpus} whole GPUs of one machine; {has}"
    room, best = max(gpus, key=lambda one: min(one[1].free, one[1].grains * one[1].gpu.memory // GRAIN))
    free = min(best.free, best.grains * best.gpu.memory // GRAIN)
    others = f"; others hold {_gib(best.gpu.taken)} of it" if best.gpu.taken else ""
    return (
        f"one needs {_gib(want.taken_of(best.gpu.memory))} of a GPU, and the most that is free of one is {_gib(free)}"
        f" (GPU {best.gpu.index} of {room.node.name}{others})"
    )


def _explain_need(want: Want, memory: int) -> str:
    """Why a replica would not work even on the largest GPUs there are, though they were its own."""
    footprint = want.footprint
    parts = f"{_gib(footprint.weights / want.gpus)} weights, {_gib(footprint.overhead)} overhead"
    if footprint.longest:
        cache = footprint.cache_bytes_per_token * footprint.longest / want.gpus
        parts += f", {_gib(cache)} KV cache for one request of {footprint.longest} tokens"
    beside = f" and {_gib(footprint.beside)} beside that" if footprint.beside else ""
    has = f"{want.gpu_share:g} of {_gib(memory)} is {_gib(want.share_of(memory))}" if want.gpu_share else _gib(memory)
    each = f"each of {want.gpus} GPUs" if want.gpus > 1 else "its GPU"
    return f"one needs {_gib(want.needed)} of {each} ({parts}){beside}; of the largest there {has}"


def _count_whole(room: Room, want: Want) -> int:
    """Of one kind, with enough memory, that nobody uses."""
    kinds = Counter((one.gpu.model, one.gpu.memory) for one in room.gpus if one.is_whole)
    return max((count for (_, memory), count in kinds.items() if want.works_in(memory)), default=0)


# What would help


def _changes(inventory: Inventory, want: Want, packing: Packing) -> Iterator[Change]:
    """From a setting of its own to machines that are not there."""
    allowed = [node for node in inventory.nodes if not want.nodes or node.name in want.nodes]
    for says, changed in _settings(want, allowed, packing):
        yield Change(says, inventory, changed)
    if want.nodes and want.footprint.weights:  # others are where they are for a reason
        for node in inventory.nodes:
            if node.name not in want.nodes:
                yield Change(f"let it be on {node.name}, too", inventory, replace(want, nodes=(*want.nodes, node.name)))
    if want.gpus:
        for says, nodes in _freed(allowed, want):
            yield Change(says, _with(inventory, nodes), want)
    for says, changed in _other_divisions(want, allowed):
        yield Change(says, inventory, changed)
    for fewer in _counts(want.least - 1, want.least - packing.count(want)):
        says = f"{fewer} {'replica' if fewer == 1 else 'replicas'} fewer"
        yield Change(says, inventory, replace(want, least=want.least - fewer))
    for says, node in _grown(allowed, want, packing):
        yield Change(says, _with(inventory, [node]), want)
    yield from _machines(inventory, want)


def _settings(want: Want, nodes: Sequence[Node], packing: Packing) -> Iterator[tuple[str, Want]]:
    """Other sizes of an engine, the least change first."""
    footprint = want.footprint
    gpus = [gpu for node in nodes for gpu in node.gpus]
    if want.gpus and want.gpu_share:
        free = {(gpu.memory, gpu.free) for gpu in gpus}
        free |= {(one.gpu.memory, one.free) for node in nodes for one in packing.room_of[node.name].gpus}
        shares = {share for memory, most in free for share in _other_shares(want, memory, most)}
        for share in sorted(shares, key=lambda one: (abs(one - want.gpu_share), one)):
            yield f"memory_utilization {want.gpu_share:g} → {share:g}", replace(want, gpu_share=share)
    if footprint.cache_bytes_per_token:
        lengths = {want.cache_tokens_of(memory) for memory in ({gpu.memory for gpu in gpus} if want.gpus else {0})}
        for length in sorted({_rounded(length) for length in lengths}, reverse=True):
            if footprint.longest / SHORTEST <= length < footprint.longest:
                shorter = replace(want, footprint=replace(footprint, longest=length))
                yield f"max_model_len {footprint.longest} → {length}", shorter
    if footprint.cache_bytes_per_token and not want.gpus and not want.works_on_host:
        cache = want.memory - footprint.weights - footprint.overhead
        more = ceil(footprint.longest * footprint.cache_bytes_per_token / GIB) * GIB
        yield f"cpu_cache_bytes {cache} → {more}", replace(want, memory=want.memory + more - cache)


def _other_shares(want: Want, memory: int, free: int) -> Iterator[float]:
    """Shares in hundredths: the least with which it works, and the most that is free."""
    least = ceil(round(want.needed / memory * 100, 6)) / 100
    most = floor(round((min(free, memory) - want.footprint.beside) / memory * 100, 6)) / 100
    if want.gpu_share < least <= min(most, FULLEST):
        yield least
    if 0 < least <= most < want.gpu_share:
        yield most


def _rounded(tokens: int) -> int:
    step = 1024 if tokens >= 2048 else 64 if tokens >= 128 else 1
    return tokens // step * step


def _other_divisions(want: Want, nodes: Sequence[Node]) -> Iterator[tuple[str, Want]]:
    """The same engine over more GPUs, or over fewer."""
    if not want.gpus or not want.gpu_share:
        return
    most = max((len(node.gpus) for node in nodes), default=0)
    ranks = want.gpus // want.stages
    larger = [ranks * 2**power for power in range(1, 5) if want.stages * ranks * 2**power <= most]
    smaller = [ranks // 2**power for power in range(1, 5) if ranks % 2**power == 0]
    for other in [*larger, *smaller]:
        if not want.footprint.heads % other:
            footprint = _divided(want.footprint, ranks, other)
            yield f"tensor_parallel {ranks} → {other}", replace(want, gpus=want.stages * other, footprint=footprint)


def _divided(footprint: Footprint, before: int, ranks: int) -> Footprint:
    once = footprint.cache_bytes_per_token / max(1, before / footprint.divides_by)
    return replace(footprint, cache_bytes_per_token=ceil(once * max(1, ranks / footprint.divides_by)))


def _freed(nodes: Sequence[Node], want: Want) -> Iterator[tuple[str, list[Node]]]:
    """Machines where others let go of GPUs: for a replica on one GPU of one, else of as many as are in the way."""
    found: list[tuple[int, str, list[Node]]] = []
    for node in nodes:
        held = sorted((gpu for gpu in node.gpus if gpu.taken), key=lambda gpu: (gpu.taken, gpu.index))
        groups = [[gpu] for gpu in held] if want.gpus == 1 else [held[: count + 1] for count in range(len(held))]
        for group in groups:
            taken = sum(gpu.taken for gpu in group)
            indices = sorted(gpu.index for gpu in group)
            gpus = tuple(replace(gpu, taken=0) if gpu.index in indices else gpu for gpu in node.gpus)
            listed = f"GPU{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
            says = f"free {listed} of {node.name} ({_gib(taken)} held by others)"
            found.append((taken, says, [replace(node, gpus=gpus)]))
    found.sort(key=lambda one: one[:2])
    for _, says, freed in found:
        yield says, freed


def _grown(nodes: Sequence[Node], want: Want, packing: Packing) -> Iterator[tuple[str, Node]]:
    """Machines with as much more host memory, or as many more CPUs, as a replica lacks there."""
    found: list[tuple[float, int, str, Node]] = []
    for number, node in enumerate(nodes):
        for memory, cpus in ((node.memory, node.cpus), _host_left(packing, node)):
            if (lack := want.memory - memory) > 0:
                tenths = ceil(lack / GIB * 10)
                more = replace(node, memory=node.memory + tenths * GIB // 10 + 1)
                found.append((lack / GIB, number, f"{tenths / 10:.1f} GiB more memory in {node.name}", more))
            if (missing := ceil(round(want.cpus - cpus, 4))) > 0:
                more = replace(node, cpus=node.cpus + missing)
                found.append(
                    (missing, number, f"{missing} {'CPU' if missing == 1 else 'CPUs'} more in {node.name}", more)
                )
    found.sort(key=lambda one: one[:2])
    for _, _, says, grown in found:
        yield says, grown


def _host_left(packing: Packing, node: Node) -> tuple[int, float]:
    room = packing.room_of[node.name]
    return room.memory, room.cpus / GRAIN


def _machines(inventory: Inventory, want: Want) -> Iterator[Change]:
    """The machine that is gone; more like one that is there, the smallest kind first; else made to measure."""
    gone = [name for name in want.nodes if name not in {node.name for node in inventory.nodes}]
    made, has = _made_to_measure(want)
    if gone:
        yield _with_more(f"{gone[0]} with {has}", inventory, want, replace(made, name=gone[0]), 1)
    kinds = {
        (node.cpus, node.memory, tuple((gpu.model, gpu.memory) for gpu in node.gpus)): node
        for node in reversed(inventory.nodes)
    }
    by_size = sorted(kinds.values(), key=lambda node: (len(node.gpus), node.memory, node.cpus, node.name))
    where = " that it may be on" if want.nodes else ""
    for count in _counts(want.least):
        for node in by_size:
            free = replace(node, gpus=tuple(replace(gpu, taken=0) for gpu in node.gpus))
            yield _with_more(f"{_machine(count)} more like {node.name}{where}", inventory, want, free, count)
    for count in _counts(want.least):
        yield _with_more(f"{_machine(count)} more with {has}{where}", inventory, want, made, count)


def _counts(most: int, at_least: int = 1) -> list[int]:
    """Numbers to try, in steps of about an eighth."""
    found = []
    while at_least <= most:
        found.append(at_least)
        at_least += max(1, at_least // 8)
    return [*found, most] if found and found[-1] != most else found


def _made_to_measure(want: Want) -> tuple[Node, str]:
    """The smallest machine that holds one replica, and what is to be said of it."""
    tenths, cpus, memory = ceil(want.memory / GIB * 10), ceil(want.cpus), _memory_wanted(want)
    gpus = tuple(Gpu(index, "GPU", memory) for index in range(want.gpus))
    has = f"{tenths / 10:.1f} GiB of memory and {cpus} CPUs"
    if gpus:
        has += f", and {'1 GPU' if len(gpus) == 1 else f'{len(gpus)} GPUs'} of {memory // GIB} GiB"
    return Node("", "", cpus, tenths * GIB // 10 + 1, gpus), has


def _machine(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


def _memory_wanted(want: Want) -> int:
    """Of each GPU, in whole GiB, so that a replica works there."""
    at_least = want.needed / (want.gpu_share or 1)
    free_beside = want.footprint.beside / (1 - want.gpu_share) if want.gpu_share < 1 else 0
    if not want.gpu_share:
        at_least += want.footprint.beside
    return max(1, ceil(max(at_least, free_beside) / GIB)) * GIB


def _with(inventory: Inventory, nodes: Sequence[Node]) -> Inventory:
    """The inventory with these in the place of those of the same names."""
    changed = {node.name: node for node in nodes}
    return Inventory(tuple(changed.get(node.name, node) for node in inventory.nodes))


def _with_more(says: str, inventory: Inventory, want: Want, node: Node, count: int) -> Change:
    names = {one.name for one in inventory.nodes}
    fresh = [name for number in range(1, len(names) + count + 1) if (name := f"new-{number}") not in names][:count]
    called = [node.name] if node.name and node.name not in names else fresh
    more = Inventory((*inventory.nodes, *(replace(node, name=name) for name in called)))
    return Change(says, more, replace(want, nodes=tuple(dict.fromkeys((*want.nodes, *called)))) if want.nodes else want)
