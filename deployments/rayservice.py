"""Nexus on a Ray cluster that somebody else starts: what `serve deploy`, and KubeRay's RayService, import.

`nexus up` starts Ray itself and then deploys; here Ray is there, with the labels that the settings name, and Serve
calls these with the `args` of its file, wherever it likes. What has to happen on the head's machine, whose disk has the
home, happens there. Where the settings name machines, the file has two applications, `models` before `nexus`.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve

from cluster.bootstrap import prepare_home
from cluster.inventory import NODE_LABEL
from cluster.plan import Plan
from deployments import app
from deployments import models as cluster_models
from nexus.config import Config, Port, load_config
from nexus.errors import ConfigError
from nexus.versions import check_versions


class Arguments(BaseModel):
    """The `args` of an application: its settings, by default `NEXUS_CONFIG`, and the port for Milvus Lite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Path | None = None
    vectors_port: Port = 19531


def application(arguments: Arguments) -> serve.Application:
    """Nexus itself; on one machine, with its models. Raises ConfigError, Unavailable."""
    config = load_config(arguments.config)
    if config.nodes:
        return app.build(config, arguments.vectors_port, None)
    plan = on_head(config, prepare)
    return app.build(config, arguments.vectors_port, cluster_models.deploy(config, app.without_machines(plan)))


def models(arguments: Arguments) -> serve.Application:
    """A cluster's models, where a plan of the machines that are there puts them. Raises ConfigError, Unavailable."""
    config = load_config(arguments.config)
    plan = on_head(config, prepare)
    if plan is None or not config.nodes:
        raise ConfigError("there are no machines in the settings: take the application `models` out of Serve's file")
    return cluster_models.build(config, plan)


def on_head(config: Config, work: Callable[[Config], Any]) -> Any:
    """What the work returns, done on the head's machine."""
    place: dict[str, Any] = {"label_selector": {NODE_LABEL: config.ray.head}} if config.ray.head else {}
    return ray.get(ray.remote(work).options(num_cpus=0, **place).remote(config))


def prepare(config: Config) -> Plan | None:
    """All that has to be there before an application: those actors and a plan in force, where one is needed."""
    check_versions()
    prepare_home(Path(config.home))
    app.start_actors(config)
    if not (config.nodes or config.uses_gpus):
        return None
    plan = asyncio.run(app.decide(config)).plan
    asyncio.run(app.put_in_force(plan))
    return plan
