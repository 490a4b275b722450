"""What `GET /status` answers, for people: short on one machine without GPUs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deployments.planning import gibibytes


def lines(state: Mapping[str, Any]) -> Iterator[str]:
    """Machines, GPUs and deployments where there is more than one machine or a GPU; collections; what is amiss."""
    nodes = state["nodes"] or ()
    if len(nodes) > 1 or any(node["gpus"] for node in nodes):
        for node in nodes:
            yield _machine(node, state["drained"] or ())
            yield from (_gpu(gpu) for gpu in node["gpus"] or ())
        for one in state["deployments"] or ():
            yield _deployment(one)
    if state["collections"]:
        counts = (f"{one['documents']} in {one['name']}" for one in state["collections"])
        yield f"  {'documents':<12} {', '.join(counts)}"
        yield from (_index(one) for one in state["collections"] if one.get("index"))
    for sentence in state["differences"]:
        yield f"  {'amiss':<12} {sentence}"
    for part, why in state["unknown"].items():
        if part != "coordinator":  # which has lines of its own
            yield f"  {'not known':<12} {part}: {why}"


def _index(collection: Mapping[str, Any]) -> str:
    index = collection["index"]
    size = f" ({index['rows']} rows, {index['bytes'] / 2**20:.1f} MiB)" if index.get("bytes") else ""
    where = "memory" if index["served_by"] == "resident" else "the vector store"
    why = f": {index['why']}" if "why" in index else ""
    return f"  {'index':<12} {collection['name']} is searched in {where}{size}{why}"


def _machine(node: Mapping[str, Any], drained: Sequence[str]) -> str:
    if not node["alive"]:
        return f"  {node['name']:<12} does not answer ({node['address']})"
    known = "" if node["gpus"] is not None else ", does not say which GPUs it has"
    mark = ", drained" if node["name"] in drained else ""
    return (
        f"  {node['name']:<12} {node['address']}, {node['cpus']:g} CPUs, {gibibytes(node['memory_bytes'])}{known}{mark}"
    )


def _gpu(gpu: Mapping[str, Any]) -> str:
    """What is planned there, what replicas say they hold, and what others do."""
    parts = [f"{gibibytes(one['bytes'])} planned for {one['deployment']}" for one in gpu["planned"]]
    parts += [f"{gibibytes(one['bytes'])} held by {one['holder']}" for one in gpu["claims"]]
    if gpu["taken_bytes"]:
        parts.append(f"{gibibytes(gpu['taken_bytes'])} held by others")
    return f"    GPU {gpu['index']:<6} {gpu['model']}, {gibibytes(gpu['memory_bytes'])}: {'; '.join(parts) or 'free'}"


def _deployment(one: Mapping[str, Any]) -> str:
    replicas = one["replicas"]
    parts = [f"{replicas['running']} running"]
    if replicas["starting"]:
        parts.append(f"{replicas['starting']} starting")
    if "ongoing" in one:
        parts.append(f"{one['ongoing']} requests, {one['queued']} waiting")
    model = f" ({one['model']})" if one["model"] else ""
    return f"  {one['name']}{model}: {one['status'].lower()}, {', '.join(parts)}"
