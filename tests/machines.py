"""Random machines and wants, a recount of what a plan takes, and a planner that tries everything: to judge plans by."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import ceil
from typing import Any

from cluster.inventory import Gpu, Inventory, Node
from cluster.placement import Footprint, Place, Plan, Want

GIB = 2**30


def machine(
    name: str,
    gpus: int = 0,
    *,
    memory: int = 1024,
    of_each: int = 80,
    cpus: float = 64,
    held: dict[int, float] | None = None,
) -> Node:
    """A machine, sizes in GiB; `held` is what others hold of its GPUs."""
    cards = tuple(Gpu(index, "H100", of_each * GIB, int((held or {}).get(index, 0) * GIB)) for index in range(gpus))
    return Node(name, name, cpus, memory * GIB, cards)


def engine(
    name: str, weights: float, *, share: float = 0.9, gpus: int = 1, least: int = 1, most: int = 0, **other: object
) -> Want:
    """An engine with a model of so many GiB; one request of 16,384 tokens has 2 GiB of cache."""
    footprint = Footprint(int(weights * GIB), GIB, 128 * 2**10, 16384, GIB // 2, 8, 32)
    return Want(name, least, max(least, most), gpus=gpus, gpu_share=share, footprint=footprint, **other)  # type: ignore[arg-type]


def small(name: str, size: float, *, least: int = 1, most: int = 0, **other: object) -> Want:
    """An encoder that takes so many GiB of a GPU."""
    return Want(name, least, max(least, most), gpus=1, footprint=Footprint(int(size * GIB)), **other)  # type: ignore[arg-type]


# ── random ones ─────────────────────────────────────────────────────────────────────────────────


def draw_inventory(dice: random.Random, most_nodes: int = 5, most_gpus: int = 8) -> Inventory:
    nodes = []
    for number in range(dice.randint(1, most_nodes)):
        size, model = dice.choice([(24, "A10"), (48, "A40"), (80, "H100")])
        count = dice.choice([0, *range(most_gpus + 1)])
        cards = [
            Gpu(index, model, size * GIB + dice.choice([0, 0, 7]), dice.choice([0] * 6 + [dice.randint(1, size * GIB)]))
            for index in range(count)
        ]
        cpus, memory = dice.choice([2, 4.5, 16, 64]), dice.choice([4, 16, 64, 256]) * GIB
        nodes.append(Node(f"n{number}", f"10.0.0.{number}", cpus, memory, tuple(cards)))
    return Inventory(tuple(nodes))


def draw_wants(dice: random.Random, inventory: Inventory, most: int = 7) -> list[Want]:
    return [_draw_want(dice, f"w{number}", inventory) for number in range(dice.randint(1, most))]


def _draw_want(dice: random.Random, name: str, inventory: Inventory) -> Want:
    """Mostly something that one of the machines could hold, if it held nothing else."""
    node = dice.choice(inventory.nodes)
    names = [one.name for one in inventory.nodes]
    least = dice.choice([1, 1, 1, 1, 2, 2, 3])
    common: dict[str, Any] = {
        "least": least, "most": least + dice.choice([0, 0, 1, 3]), "cpus": dice.choice([0, 0, 0, 0.5, 1, 2]),
        "memory": dice.choice([0, 0, dice.randint(1, node.memory // 2)]),
        "nodes": tuple({node.name, *dice.sample(names, dice.randint(1, len(names)))}) if dice.random() < 0.25 else (),
    }  # fmt: skip
    kind = dice.choice(["engine", "engine", "several", "several", "small", "small", "host", "apart", "cpu engine"])
    if kind == "host" or (not node.gpus and kind in ("engine", "several", "small") and dice.random() < 0.9):
        return Want(name, **common)
    if kind == "apart":
        each = tuple(tuple(dice.sample(names, 1)) if dice.random() < 0.3 else () for _ in range(common["most"]))
        return Want(name, is_apart=True, nodes_of_each=each if dice.random() < 0.5 else (), **common)
    if kind == "cpu engine":
        footprint = Footprint(dice.randint(1, GIB), GIB, 2**16, dice.choice([512, 8192]))
        return Want(name, footprint=footprint, **{**common, "memory": footprint.weights + GIB + dice.randint(1, GIB)})
    size = (dice.choice(node.gpus).memory if node.gpus else 80 * GIB) // GIB
    if kind == "small":
        return Want(name, gpus=1, footprint=Footprint(dice.randint(1, size * GIB // 3), dice.randint(0, GIB)), **common)
    gpus, stages = (1, 1) if kind == "engine" else dice.choice([(2, 1), (2, 2), (2, 1), (4, 1), (4, 2), (8, 1)])
    share = dice.choice([0.2, 0.37, 0.5, 0.5, 0.9])
    footprint = Footprint(
        int(dice.uniform(0.05, 1.0) * share * size * gpus * GIB), dice.randint(0, GIB), dice.randint(1, 2**19),
        dice.choice([512, 2048, 8192, 8192, 32768]), dice.choice([0, GIB // 2]), dice.choice([1, 4, 8]),
        dice.choice([0, 8, 28, 32]),
    )  # fmt: skip
    return Want(name, gpus=gpus, gpu_share=share, footprint=footprint, stages=stages, **common)


# ── the recount ─────────────────────────────────────────────────────────────────────────────────


def needed(want: Want) -> int:
    """Of each GPU: a part of the weights, the overhead, a part of one longest request's cache."""
    cache = want.footprint.cache_bytes_per_token * want.footprint.longest
    return want.footprint.overhead + ceil((want.footprint.weights + cache) / want.gpus)


def held(want: Want, memory: int) -> int:
    """What it takes of a GPU with this memory; 0 where it would not work there."""
    own = int(want.gpu_share * memory) if want.gpu_share else needed(want)
    return own + want.footprint.beside if own >= needed(want) else 0


def recount(inventory: Inventory, wants: Sequence[Want], plan: Plan) -> None:
    """Fails where the plan gives away more than there is, or a place that is not allowed, or too few."""
    refused = {refusal.want for refusal in plan.refusals}
    by_name = {want.name: want for want in wants}
    counts = Counter(place.want for place in plan.places)
    assert len({(place.want, place.replica) for place in plan.places}) == len(plan.places)
    assert refused <= by_name.keys() and counts.keys() <= by_name.keys()
    for want in wants:
        assert counts[want.name] <= want.most
        assert (counts[want.name] < want.least) == (want.name in refused), want.name
        nodes = [place.node for place in plan.places if place.want == want.name]
        assert not want.is_apart or len(set(nodes)) == len(nodes)
    for node in inventory.nodes:
        here = [place for place in plan.places if place.node == node.name]
        assert sum(by_name[place.want].memory for place in here) <= node.memory
        assert sum(by_name[place.want].cpus for place in here) <= node.cpus + 1e-9
        for gpu in node.gpus:
            on_it = [place for place in here if gpu.index in place.gpus]
            assert sum(place.gpu_bytes for place in on_it) <= gpu.memory - gpu.taken
            assert sum(round(place.gpu_share * 10_000) for place in on_it) <= 10_000
    for place in plan.places:
        _check_place(inventory[place.node], by_name[place.want], place, plan)


def _check_place(node: Node, want: Want, place: Place, plan: Plan) -> None:
    allowed = want.nodes_of_each[place.replica] if place.replica < len(want.nodes_of_each) else want.nodes
    assert not allowed or node.name in allowed
    assert 0 <= place.replica < want.most and (place.cpus, place.memory) == (want.cpus, want.memory)
    assert len(set(place.gpus)) == len(place.gpus) == want.gpus
    footprint = want.footprint
    if not want.gpus:
        assert (place.gpu_bytes, place.gpu_share) == (0, 0)
        if footprint.cache_bytes_per_token:
            room = want.memory - footprint.weights - footprint.overhead
            assert place.cache_tokens == room // footprint.cache_bytes_per_token >= footprint.longest
        return
    cards = [gpu for gpu in node.gpus if gpu.index in place.gpus]
    (memory,) = {gpu.memory for gpu in cards}
    assert place.gpu_bytes == held(want, memory) > 0
    assert len({gpu.model for gpu in cards}) == 1
    if want.gpus == 1:
        exact = place.gpu_bytes / memory
        assert exact <= place.gpu_share < exact + 0.0001 + 1e-12
    else:
        others = [one for one in plan.places if one is not place and one.node == node.name]
        assert place.gpu_share == 1 and not any(gpu.taken for gpu in cards)
        assert not any({*place.gpus} & {*one.gpus} for one in others)
    if footprint.cache_bytes_per_token:
        room = (place.gpu_bytes - footprint.beside - footprint.overhead) * want.gpus - footprint.weights
        assert place.cache_tokens == room // footprint.cache_bytes_per_token >= footprint.longest


# ── trying everything ───────────────────────────────────────────────────────────────────────────


def can_be_placed(inventory: Inventory, wants: Sequence[Want]) -> bool:
    """Whether the least of all wants has a place, found by trying everything."""
    replicas = [(want, number) for want in wants for number in range(want.least)]
    free: dict[tuple[str, int], int] = {(n.name, g.index): g.memory - g.taken for n in inventory.nodes for g in n.gpus}
    grains: Counter[tuple[str, int]] = Counter()
    memory, cpus = {n.name: n.memory for n in inventory.nodes}, {n.name: n.cpus for n in inventory.nodes}
    on: defaultdict[str, list[str]] = defaultdict(list)

    def ways(want: Want, number: int) -> Iterator[tuple[Node, tuple[Gpu, ...]]]:
        allowed = want.nodes_of_each[number] if number < len(want.nodes_of_each) else want.nodes
        for node in inventory.nodes:
            if (allowed and node.name not in allowed) or (want.is_apart and node.name in on[want.name]):
                continue
            if memory[node.name] < want.memory or cpus[node.name] + 1e-9 < want.cpus:
                continue
            for cards in combinations(node.gpus, want.gpus):
                if fits(want, node, cards):
                    yield node, cards

    def fits(want: Want, node: Node, cards: tuple[Gpu, ...]) -> bool:
        if not cards:
            room = want.memory - want.footprint.weights - want.footprint.overhead
            return room >= want.footprint.cache_bytes_per_token * want.footprint.longest or not want.footprint.longest
        if len({(card.model, card.memory) for card in cards}) > 1 or not held(want, cards[0].memory):
            return False
        if len(cards) > 1:
            return not any(card.taken or grains[node.name, card.index] for card in cards)
        (card,) = cards
        part = ceil(held(want, card.memory) * 10_000 / card.memory)
        return free[node.name, card.index] >= held(want, card.memory) and grains[node.name, card.index] + part <= 10_000

    def put(want: Want, node: Node, cards: tuple[Gpu, ...], sign: int) -> None:
        memory[node.name] -= sign * want.memory
        cpus[node.name] -= sign * want.cpus
        for card in cards:
            part = 10_000 if len(cards) > 1 else ceil(held(want, card.memory) * 10_000 / card.memory)
            free[node.name, card.index] -= sign * held(want, card.memory)
            grains[node.name, card.index] += sign * part

    def go_on(at: int) -> bool:
        if at == len(replicas):
            return True
        want, number = replicas[at]
        for node, cards in ways(want, number):
            put(want, node, cards, 1)
            on[want.name].append(node.name)
            if go_on(at + 1):
                return True
            on[want.name].pop()
            put(want, node, cards, -1)
        return False

    return go_on(0)


# ── doing what a refusal says ───────────────────────────────────────────────────────────────────


def heed(remedy: str, inventory: Inventory, want: Want) -> tuple[Inventory, list[Want]]:
    """What is there and what is wanted once somebody has done what a remedy says: by its words alone."""
    for pattern, act in REMEDIES.items():
        if said := re.fullmatch(pattern, remedy):
            return act(inventory, want, *said.groups())  # type: ignore[no-any-return,operator]
    raise AssertionError(f"nobody knows what to do: {remedy}")


def _set_share(inventory: Inventory, want: Want, before: str, after: str) -> tuple[Inventory, list[Want]]:
    assert float(before) == want.gpu_share
    return inventory, [replace(want, gpu_share=float(after))]


def _set_length(inventory: Inventory, want: Want, before: str, after: str) -> tuple[Inventory, list[Want]]:
    assert int(before) == want.footprint.longest > int(after)
    return inventory, [replace(want, footprint=replace(want.footprint, longest=int(after)))]


def _set_cache(inventory: Inventory, want: Want, before: str, after: str) -> tuple[Inventory, list[Want]]:
    assert int(before) == want.memory - want.footprint.weights - want.footprint.overhead
    return inventory, [replace(want, memory=want.memory + int(after) - int(before))]


def _set_ranks(inventory: Inventory, want: Want, before: str, after: str) -> tuple[Inventory, list[Want]]:
    assert int(before) * want.stages == want.gpus
    footprint = want.footprint
    assert not footprint.heads or footprint.heads % int(after) == 0
    copies = max(1, int(after) / footprint.divides_by) / max(1, int(before) / footprint.divides_by)
    cache = ceil(footprint.cache_bytes_per_token * copies)
    return inventory, [
        replace(want, gpus=int(after) * want.stages, footprint=replace(footprint, cache_bytes_per_token=cache))
    ]


def _allow(inventory: Inventory, want: Want, node: str) -> tuple[Inventory, list[Want]]:
    return inventory, [replace(want, nodes=(*want.nodes, node))]


def _free(inventory: Inventory, want: Want, indices: str, name: str, size: str) -> tuple[Inventory, list[Want]]:
    chosen = [int(index) for index in indices.split(", ")]
    cards = inventory[name].gpus
    assert abs(sum(gpu.taken for gpu in cards if gpu.index in chosen) / GIB - float(size.replace(",", ""))) < 0.06
    freed = tuple(replace(gpu, taken=0) if gpu.index in chosen else gpu for gpu in cards)
    return _with(inventory, replace(inventory[name], gpus=freed)), [want]


def _fewer(inventory: Inventory, want: Want, count: str) -> tuple[Inventory, list[Want]]:
    assert 0 < int(count) < want.least
    return inventory, [replace(want, least=want.least - int(count))]


def _more_memory(inventory: Inventory, want: Want, size: str, name: str) -> tuple[Inventory, list[Want]]:
    node = inventory[name]
    return _with(inventory, replace(node, memory=node.memory + ceil(float(size) * GIB))), [want]


def _more_cpus(inventory: Inventory, want: Want, count: str, name: str) -> tuple[Inventory, list[Want]]:
    node = inventory[name]
    return _with(inventory, replace(node, cpus=node.cpus + int(count))), [want]


def _more_like(
    inventory: Inventory, want: Want, count: str, name: str, is_named: str | None
) -> tuple[Inventory, list[Want]]:
    free = tuple(replace(gpu, taken=0) for gpu in inventory[name].gpus)
    return _add(inventory, want, replace(inventory[name], gpus=free), int(count), is_named)


def _made(
    inventory: Inventory,
    want: Want,
    who: str,
    memory: str,
    cpus: str,
    gpus: str | None,
    size: str | None,
    is_named: str | None,
) -> tuple[Inventory, list[Want]]:
    cards = tuple(Gpu(index, "new", int(size or 0) * GIB) for index in range(int(gpus or 0)))
    made = Node(who, who, int(cpus), ceil(float(memory) * GIB), cards)
    if count := re.fullmatch(r"(\d+) machines? more", who):
        return _add(inventory, want, made, int(count[1]), is_named)
    return Inventory((*inventory.nodes, made)), [want]


def _leave_out(inventory: Inventory, want: Want, name: str) -> tuple[Inventory, list[Want]]:
    assert name == want.name
    return inventory, []


def _with(inventory: Inventory, node: Node) -> Inventory:
    return Inventory(tuple(node if one.name == node.name else one for one in inventory.nodes))


def _add(
    inventory: Inventory, want: Want, node: Node, count: int, is_named: str | None
) -> tuple[Inventory, list[Want]]:
    assert bool(is_named) == bool(want.nodes)
    more = [replace(node, name=f"added{number}") for number in range(count)]
    nodes = (*want.nodes, *(one.name for one in more)) if want.nodes else ()
    return Inventory((*inventory.nodes, *more)), [replace(want, nodes=nodes)]


REMEDIES = {
    r"memory_utilization (\S+) → (\S+)": _set_share,
    r"max_model_len (\d+) → (\d+)": _set_length,
    r"cpu_cache_bytes (\d+) → (\d+)": _set_cache,
    r"tensor_parallel (\d+) → (\d+)": _set_ranks,
    r"let it be on (\S+), too": _allow,
    r"free GPUs? ([\d, ]+) of (\S+) \(([\d.,]+) GiB held by others\)": _free,
    r"(\d+) replicas? fewer": _fewer,
    r"([\d.]+) GiB more memory in (\S+)": _more_memory,
    r"(\d+) CPUs? more in (\S+)": _more_cpus,
    r"(\d+) machines? more like (\S+?)( that it may be on)?": _more_like,
    r"(.+) with ([\d.]+) GiB of memory and (\d+) CPUs(?:, and (\d+) GPUs? of (\d+) GiB)?( that it may be on)?": _made,
    r"leave (\S+) out": _leave_out,
}
