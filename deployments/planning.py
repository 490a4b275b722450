"""Where everything will go, and what it leaves: `nexus plan`, and the plan that `nexus up` applies."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from cluster.bootstrap import GPUS_LABEL
from cluster.inventory import Gpu, Inventory, Node, configured, real
from cluster.placement import Place, Plan, Refusal, Want, left, moves, place
from cluster.wants import ROLES, name_of, wants_of
from nexus.config import Config
from nexus.errors import ConfigError

PLAIN_WIDTH = 110  # where no terminal says how wide it is

_PLACES = TypeAdapter(tuple[Place, ...])


def plan_for(config: Config, seen: Inventory | None, current: Plan | None, drained: Collection[str] = ()) -> Plan:
    """A plan that can be applied, on the machines that are seen, where any are. Raises ConfigError.

    The error says what has no place, why, and what would give it one.
    """
    plan = place(inventory_for(config, seen, drained), wants_for(config, drained), current)
    if plan.refusals:
        raise ConfigError("not everything wanted has a place. " + " ".join(map(refused, plan.refusals)))
    return plan


def inventory_for(config: Config, seen: Inventory | None, drained: Collection[str]) -> Inventory:
    """The machines described, as they are seen where that is known, without those that are drained."""
    described = configured(config)
    usable = described if seen is None else real(described, seen)
    return Inventory(tuple(node for node in usable.nodes if node.name not in drained))


def wants_for(config: Config, drained: Collection[str]) -> list[Want]:
    """What is wanted. While machines are drained, of each model one replica, and the others where there is room.

    The voters of these machines stay there until an operator removes them: none of them is to be placed.
    """
    wants = wants_of(config)
    if not drained:
        return wants
    fewer = [replace(want, least=min(want.least, 1), most=max(want.least, want.most)) for want in wants]
    return [_without(want, drained) if want.nodes_of_each else few for want, few in zip(wants, fewer, strict=True)]


def _without(want: Want, drained: Collection[str]) -> Want:
    """Without the replicas that belong to drained machines alone."""
    each = tuple(nodes for nodes in want.nodes_of_each if not nodes or set(nodes) - set(drained))
    return replace(want, least=len(each), most=len(each), nodes_of_each=each)


def refused(one: Refusal) -> str:
    """A refusal as a sentence."""
    return f"{one.want}: {one.reason}; {one.remedy}."


def models_of(config: Config) -> dict[str, str]:
    """The names that clients ask for, by those of the deployments."""
    return {
        name_of(task, place): model.called for task in ROLES for place, model in enumerate(config.models.of_task(task))
    }


# ── what the running Nexus says ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Told:
    """What `GET /status` tells a planner; `seen` and `plan` are None where it does not say.

    `given` are the GPUs that machines joined with: `nexus node start` leaves out those that others hold.
    """

    seen: Inventory | None = None
    plan: Plan | None = None
    why_no_plan: str = ""
    drained: Sequence[str] = ()
    given: Mapping[str, Collection[int]] = field(default_factory=dict)
    notes: Sequence[str] = ()  # for people: which machines are not planned as they are seen


def read_status(config: Config, status: Mapping[str, Any]) -> Told:
    """What a machine does not say of itself is as described."""
    unknown, drained = status["unknown"], status["drained"] or ()
    plan = None if status["placement"] is None else Plan(_PLACES.validate_python(status["placement"]))
    why = unknown.get("placement", "no plan is in force: the Nexus that runs is one machine without GPUs of its own")
    notes = [f"{name} is drained: nothing goes there" for name in drained]
    if status["nodes"] is None:
        notes.append(f"the machines are as described: {unknown['nodes']}")
        return Told(None, plan, why, drained, notes=notes)
    described = {node.name: node for node in configured(config).nodes}
    seen, given = [], {}
    for node in status["nodes"]:
        name = node["name"]
        if not node["alive"]:
            notes.append(f"{name} does not answer: it is planned as described")
        elif node["gpus"] is None:
            notes.append(f"{name} does not say which GPUs it has: they are as described")
        else:
            described[name] = _read_node(node)
            given[name] = {int(index) for index in node["labels"].get(GPUS_LABEL, "").split("-") if index}
        seen += [described[name]] if name in described else []
    return Told(Inventory(tuple(seen)), plan, why, drained, given if config.nodes else {}, notes)


def _read_node(node: Mapping[str, Any]) -> Node:
    gpus = (Gpu(one["index"], one["model"], one["memory_bytes"], one["taken_bytes"]) for one in node["gpus"])
    return Node(node["name"], node["address"], node["cpus"], node["memory_bytes"], tuple(gpus), node["labels"])


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan, with what it was made of, and the GPUs that were left out of it, by machine."""

    inventory: Inventory
    wants: Sequence[Want]
    plan: Plan
    left_out: Mapping[str, Collection[int]]


def draw(config: Config, told: Told) -> Draft:
    """The plan that `nexus up` would apply."""
    inventory, wants = inventory_for(config, told.seen, told.drained), wants_for(config, told.drained)
    given = Inventory(tuple(_given(node, told.given.get(node.name)) for node in inventory.nodes))
    left_out = {
        node.name: {gpu.index for gpu in node.gpus} - {gpu.index for gpu in rest.gpus}
        for node, rest in zip(inventory.nodes, given.nodes, strict=True)
    }
    return Draft(inventory, wants, place(given, wants, told.plan), left_out)


def _given(node: Node, indices: Collection[int] | None) -> Node:
    return node if indices is None else replace(node, gpus=tuple(gpu for gpu in node.gpus if gpu.index in indices))


# ── as JSON ─────────────────────────────────────────────────────────────────────────────────────


def describe(config: Config, draft: Draft) -> dict[str, Any]:
    """What goes where and what is left, by machine and GPU; sizes in bytes, those of a replica on each of its GPUs."""
    models, wanted = models_of(config), {want.name: want for want in draft.wants}
    shown = [(one, _replica(one, wanted[one.want], models.get(one.want))) for one in draft.plan.places]
    nodes = []
    for node, rest in zip(draft.inventory.nodes, left(draft.inventory, draft.plan), strict=True):
        here = [(one, replica) for one, replica in shown if one.node == node.name]
        gpus = [
            {
                "gpu": gpu.index, "model": gpu.model, "memory_bytes": gpu.memory, "taken_bytes": gpu.taken,
                "left_bytes": free.memory, "left_out": gpu.index in draft.left_out[node.name],
                "replicas": [replica for one, replica in here if gpu.index in one.gpus],
            }
            for gpu, free in zip(node.gpus, rest.gpus, strict=True)
        ]  # fmt: skip
        nodes.append({
            "node": node.name, "address": node.address, "cpus": node.cpus, "memory_bytes": node.memory, "gpus": gpus,
            "cpus_left": rest.cpus, "memory_left_bytes": rest.memory,
            "replicas": [replica for one, replica in here if not one.gpus],
        })  # fmt: skip
    return {"nodes": nodes, "refusals": [_refusal(one) for one in draft.plan.refusals]}


def _replica(one: Place, want: Want, model: str | None) -> dict[str, Any]:
    """What of its memory is not weights or overhead is the cache's, where it has one."""
    footprint, parts = want.footprint, max(1, len(one.gpus))
    size = one.gpu_bytes if one.gpus else one.memory
    weights, overhead = footprint.weights // parts, footprint.overhead + footprint.beside
    return {
        "deployment": one.want, "replica": one.replica, "model": model, "gpus": list(one.gpus), "bytes": size,
        "weights_bytes": weights, "cache_bytes": max(0, size - weights - overhead) if one.cache_tokens else 0,
        "overhead_bytes": overhead, "cache_tokens": one.cache_tokens,
        "concurrency": round(one.cache_tokens / footprint.longest, 1) if footprint.longest else None,
        "cpus": one.cpus, "memory_bytes": one.memory,
    }  # fmt: skip


def _refusal(one: Refusal) -> dict[str, str]:
    return {"deployment": one.want, "reason": one.reason, "remedy": one.remedy}


def describe_moves(old: Plan, new: Plan) -> dict[str, Any]:
    """What the new plan would change where the old one is in force."""
    found = moves(old, new)
    changed = len(found.added) + len(found.moved) + len(found.resized)
    return {
        "added": [asdict(one) for one in found.added],
        "removed": [asdict(one) for one in found.removed],
        "moved": [{"from": asdict(one), "to": asdict(other)} for one, other in found.moved],
        "resized": [{"from": asdict(one), "to": asdict(other)} for one, other in found.resized],
        "unchanged": len(new.places) - changed,
    }


# ── for people ──────────────────────────────────────────────────────────────────────────────────


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def open_console() -> Console:
    """Standard output: as wide as its terminal, or plain text where it is none."""
    console = Console(markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else Console(
        markup=False, highlight=False, emoji=False, no_color=True, width=PLAIN_WIDTH
    )  # fmt: skip


def print_plan(shown: Mapping[str, Any], console: Console) -> None:
    """What `describe` says."""
    for node in shown["nodes"]:
        cpus = f"{node['cpus_left']:g} of {node['cpus']:g} CPUs"
        memory = f"{gibibytes(node['memory_left_bytes'])} of {gibibytes(node['memory_bytes'])} of memory"
        console.print(f"{node['node']} ({node['address']}): {cpus} and {memory} left", soft_wrap=True)
        if node["gpus"]:
            console.print(_gpus(node["gpus"]))
        if node["replicas"]:
            counts = Counter(one["deployment"] for one in node["replicas"])
            names = [name if count == 1 else f"{count} × {name}" for name, count in counts.items()]
            console.print(f"  without a GPU: {', '.join(names)}", soft_wrap=True)
        console.print()
    replicas = {(one["deployment"], one["replica"]): one for one in _replicas(shown)}
    if any(one["model"] for one in replicas.values()):
        console.print(_models(replicas.values()))


def _table(*columns: str, numbers: Collection[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("  GPU", "model", "memory", "what is there", "left", numbers=("  GPU", "memory", "left"))
    for gpu in gpus:
        lines = [f"{gibibytes(gpu['taken_bytes'])} held by others"] if gpu["taken_bytes"] else []
        lines += ["left out when the machine joined"] if gpu["left_out"] else []
        lines += [f"{gibibytes(one['bytes'])} {_called(one)}" for one in gpu["replicas"]]
        table.add_row(
            str(gpu["gpu"]), gpu["model"], gibibytes(gpu["memory_bytes"]), "\n".join(lines) or "nothing",
            gibibytes(gpu["left_bytes"]),
        )  # fmt: skip
    return table


def _called(replica: Mapping[str, Any]) -> str:
    return f"{replica['deployment']} ({replica['model']})" if replica["model"] else str(replica["deployment"])


def _replicas(shown: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for node in shown["nodes"]:
        yield from (one for gpu in node["gpus"] for one in gpu["replicas"])
        yield from node["replicas"]


def _models(replicas: Iterable[Mapping[str, Any]]) -> Table:
    """What one replica of each model is expected to hold; a row for each size, where GPUs differ."""
    numbers = ("GPUs", "GiB", "weights", "cache", "overhead", "KV tokens", "at once")
    table = _table("each replica of", *numbers, numbers=numbers)
    rows: dict[tuple[str, ...], None] = {}
    for one in replicas:
        if one["model"]:
            parts = max(1, len(one["gpus"]))
            kinds = ("bytes", "weights_bytes", "cache_bytes", "overhead_bytes")
            sizes = [f"{parts * one[kind] / 2**30:.1f}" for kind in kinds]
            tokens = f"{one['cache_tokens']:,}" if one["cache_tokens"] else "-"
            at_once = "-" if one["concurrency"] is None else f"{one['concurrency']:g}"
            rows[(_called(one), str(len(one["gpus"])), *sizes, tokens, at_once)] = None
    for row in rows:
        table.add_row(*row)
    return table


def print_moves(shown: Mapping[str, Any], console: Console) -> None:
    """What `describe_moves` says."""
    lines = [f"added    {_where(one)}" for one in shown["added"]]
    lines += [f"removed  {_where(one)}" for one in shown["removed"]]
    lines += [f"moved    {_where(one['from'])} -> {_where(one['to'], short=True)}" for one in shown["moved"]]
    lines += [
        f"resized  {_where(one['to'])}: {gibibytes(_size(one['from']))} -> {gibibytes(_size(one['to']))}"
        for one in shown["resized"]
    ]
    for line in [*lines, f"{shown['unchanged']} unchanged"]:
        console.print(line, soft_wrap=True)


def _where(one: Mapping[str, Any], short: bool = False) -> str:
    gpus = f" GPU{'s' * (len(one['gpus']) > 1)} {', '.join(map(str, one['gpus']))}" if one["gpus"] else ""
    return f"{one['node']}{gpus}" if short else f"{one['want']} on {one['node']}{gpus}"


def _size(one: Mapping[str, Any]) -> int:
    return int(one["gpu_bytes"] if one["gpus"] else one["memory"])
