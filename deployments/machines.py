"""The machines as Ray knows them, and what each of them says it has."""

import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray._private.state import actors
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.bootstrap import GPUS_LABEL, find_instance, is_of_this_node, processes_of
from cluster.inventory import LOCAL, NODE_LABEL, Inventory, Node, configured, look, real
from nexus.config import Config

LOOK_SECONDS = 20.0  # a machine with much to do is slow to start a process
CALL_SECONDS = 5.0
PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Joined:
    """A machine that is in the cluster now: what Ray calls it, its address, and the GPUs that Ray was given there."""

    id: str
    name: str
    address: str
    gpus: tuple[int, ...]


def joined() -> list[Joined]:
    """The machines that Ray has now."""
    return [
        _joined(node["NodeID"], node["NodeManagerAddress"], node["Labels"]) for node in ray.nodes() if node["Alive"]
    ]


def _joined(id: str, address: str, labels: Mapping[str, str]) -> Joined:
    gpus = labels.get(GPUS_LABEL, "")
    return Joined(id, labels.get(NODE_LABEL, LOCAL), address, tuple(map(int, gpus.split("-"))) if gpus else ())


def look_at(config: Config) -> Inventory:
    """What every machine says it has, those of the settings first; one that does not answer is left out.

    Each is asked in a process there, all at once, for LOOK_SECONDS at most.
    """
    if not config.nodes:
        instance = find_instance(Path(config.home))
        ours = {process.pid for process in processes_of(instance)} if instance else set()
        return Inventory((look(LOCAL, "127.0.0.1", ours.__contains__, [config.home]),))
    order = list(config.nodes)
    machines = sorted(joined(), key=lambda one: order.index(one.name) if one.name in order else len(order))
    asked = [_ask(one, config.nodes[one.name].disks if one.name in config.nodes else ()) for one in machines]
    answered, late = ray.wait(asked, num_returns=len(asked), timeout=LOOK_SECONDS)
    for reference in late:
        ray.cancel(reference, force=True)
    found = [_answer(reference) for reference in asked if reference in answered]
    return Inventory(tuple(node for node in found if node is not None))


def plannable(config: Config, seen: Inventory) -> Inventory:
    """What a plan is made of: what is described and there, and of its GPUs those that Ray was given."""
    found = real(configured(config), seen)
    if not config.nodes:
        return found
    given = {one.name: one.gpus for one in joined()}
    return Inventory(
        tuple(
            replace(node, gpus=tuple(gpu for gpu in node.gpus if gpu.index in given.get(node.name, ())))
            for node in found.nodes
        )
    )


def _ask(machine: Joined, disks: Iterable[str]) -> "ray.ObjectRef[Node]":
    there = NodeAffinitySchedulingStrategy(machine.id, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there, "name": f"look at {machine.name}"}
    return ray.remote(_look).options(**options).remote(machine.name, machine.address, tuple(disks))


def _look(name: str, address: str, disks: Collection[str]) -> Node:
    return look(name, address, is_of_this_node, disks)


def _answer(reference: "ray.ObjectRef[Node]") -> Node | None:
    try:
        node: Node = ray.get(reference)
        return node
    except RayError:  # it left just now
        return None


def actors_on(name: str) -> list[str]:
    """The names of the actors that live on a machine."""
    ids = {machine.id for machine in joined() if machine.name == name}
    living = [actor for actor in actors().values() if actor["State"] == "ALIVE" and actor["Name"]]
    return sorted(actor["Name"] for actor in living if actor["Address"]["NodeID"] in ids)


def await_joined(ray_address: str, names: Collection[str], seconds: float) -> set[str]:
    """Which of these machines are there, once all are, or after so long; without being a driver."""
    ends = time.monotonic() + seconds
    state = GcsClient(address=ray_address)
    while True:
        nodes = state.get_all_node_info(timeout=CALL_SECONDS).values()
        there = {node.labels.get(NODE_LABEL, "") for node in nodes if node.state == GcsNodeInfo.ALIVE} & set(names)
        if len(there) == len(names) or time.monotonic() >= ends:
            return there
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    print(" ".join(await_joined(sys.argv[1], sys.argv[3:], float(sys.argv[2]))))
