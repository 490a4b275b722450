"""A plan on real Ray nodes with GPUs that are not there: where Ray put everything, in a process of its own.

    python -m tests.plan_applied NEXUS.YAML FILE     writes what Ray says into the file, as JSON

Engines and models are replaced by something still; all that says where they go is the product's own.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_placement_groups

from cluster.inventory import configured
from cluster.placement import place
from cluster.wants import wants_of
from deployments import app, models
from nexus.config import NODE_LABEL, Config, load_config

PREFIX = "SERVE_REPLICA::"


class Still:
    """In the place of a model: it takes what it is given, and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


def start_nodes(config: Config) -> Cluster:
    cluster = Cluster()
    for name, node in config.nodes.items():
        gpus = sum(some.count for some in node.gpus)
        cluster.add_node(
            num_cpus=int(node.cpus), num_gpus=gpus, labels={NODE_LABEL: name}, node_name=name,
            object_store_memory=80 * 2**20, include_dashboard=name == config.ray.head, dashboard_port=0,
        )  # fmt: skip
    cluster.wait_for_nodes()
    return cluster


def still(application: serve.Application) -> serve.Application:
    """As it is deployed, but for what it does, and without the arguments, which would load an engine's library."""
    bound = application._bound_deployment
    bare: dict[str, Any] = {} if bound.name == "roster" else {"_init_args": (), "_init_kwargs": {}}
    application._bound_deployment = bound.options(func_or_class=Still, _internal=True, **bare)
    return application


def where_they_are() -> dict[str, Any]:
    """By Ray's state API: every replica with its machine and what it takes, and every group of bundles."""
    names = {node["NodeID"]: node["Labels"][NODE_LABEL] for node in ray.nodes()}
    replicas = []
    for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True, limit=1000):
        if not actor.name.startswith(PREFIX):
            continue
        handle = ray.get_actor(actor.name, namespace="serve")
        gpus = ray.get(handle.__ray_call__.remote(lambda self: ray.get_gpu_ids()))
        taken = actor.required_resources.get("GPU", 0.0)
        deployment = actor.name.removeprefix(PREFIX).split("#")[1]
        replicas.append(
            {"deployment": deployment, "node": names[actor.node_id], "gpus": sorted(map(int, gpus)), "share": taken}
        )
    groups = [
        [(names[bundle["node_id"]], bundle["unit_resources"].get("GPU", 0.0)) for bundle in group.bundles]
        for group in list_placement_groups(filters=[("state", "=", "CREATED")], detail=True, limit=1000)
    ]
    return {"replicas": replicas, "groups": groups}


def main(file: str, said: str) -> None:
    config = load_config(Path(file))
    plan = place(configured(config), wants_of(config))
    assert not plan.refusals, plan.refusals
    cluster = start_nodes(config)
    try:
        ray.init(address=cluster.address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
        made, models.lasting = models.lasting, lambda application, *settings: made(still(application), *settings)
        serve.start(proxy_location="Disabled")
        failed = app.deploy({models.APPLICATION: models.build(config, plan)})
        assert failed is None, failed
        Path(said).write_text(json.dumps({"plan": [asdict(one) for one in plan.places], **where_they_are()}))
        serve.shutdown()
        ray.shutdown()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
