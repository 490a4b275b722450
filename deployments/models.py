"""The models of a configuration: deployments of those that Nexus runs, and all of them as objects to ask.

A model's place is its number among those of its task. One that another server runs, or that needs nothing, has no
deployment: the gateway asks it itself.

In a cluster a model has a deployment on each machine that the plan gives it, and all of these are an application of
their own. Whoever asks knows them by name, on every machine on which the model may be, and is told where it is planned
now: so a new plan restarts nobody who asks, and a machine that is to be left gets no new request before it is.
"""

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.coordination import Coordination
from actors.embedder import Embedder
from actors.generator import Generator
from actors.hops import LOGGING
from actors.reranker import Reranker
from cluster.plan import Plan
from cluster.shares import Pool
from cluster.spots import Spot, spots
from cluster.wants import ROLES, has_deployment, name_of
from deployments.autoscaling import autoscaling, pools, sharing
from deployments.gateway import ByEmbedding
from deployments.remote import Remote, RemoteEmbedder, RemoteEngine, RemoteGenerator, Spread, Threaded
from deployments.whereabouts import Whereabouts
from nexus import __version__
from nexus.balancer import Balancer, Member, Weights, always
from nexus.config import Config, Served
from nexus.models import by_embedder, vllm
from nexus.ports import Generator as GeneratorPort
from nexus.registry import Task, open_model

Handles = Mapping[Task, Mapping[int, Mapping[str, DeploymentHandle]]]  # by place, and machine
ANYWHERE = Spot()
ONE: Mapping[str, Any] = {"num_replicas": 1}
GPU_REPEATS = 3  # of a start on a GPU that turns out to be taken, before `nexus up` says so
APPLICATION = "models"  # of a cluster


def deployment(
    name: str, actor: type, at_once: int, waiting: int, spot: Spot = ANYWHERE, size: Mapping[str, Any] = ONE
) -> Any:
    """An actor class as replicas of which each works on `at_once` requests; past `waiting` more, 503.

    `size` says how many there are: Serve's `num_replicas` or `autoscaling_config`.
    """
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": spot.gpus * spot.share}
    if spot.node:
        options["label_selector"] = spot.labels()
    return serve.deployment(
        name=name,
        max_ongoing_requests=at_once,
        max_queued_requests=waiting,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options=options,
        logging_config=LOGGING,
        **({"max_constructor_retry_count": GPU_REPEATS} if spot.gpus else {}),
        **size,
    )(actor)


def lasting(application: serve.Application, *settings: object) -> serve.Application:
    """The application, whose replicas go on when it is deployed again with equal settings, and with these only.

    By itself Serve takes whatever is deployed again for new. That a version says otherwise is not in its public words.
    """
    version = hashlib.sha256(pickle.dumps((__version__, settings))).hexdigest()
    application._bound_deployment = application._bound_deployment.options(version=version, _internal=True)
    return application


def deploy(config: Config, plan: Plan | None) -> dict[Task, dict[int, dict[str, serve.Application]]]:
    """The deployments of all models, by task, place and machine."""
    models = {
        (task, place): model
        for task in ROLES
        for place, model in enumerate(config.models.of_task(task))
        if has_deployment(task, place, model)
    }
    wants = {name_of(*which): model.replicas for which, model in models.items()}
    shared = pools(wants, plan, config.scaling.down_seconds)
    made: dict[Task, dict[int, dict[str, serve.Application]]] = {task: {} for task in ROLES}
    for (task, place), model in models.items():
        name = name_of(task, place)
        made[task][place] = {
            spot.node: _deploy(config, name, task, model, spot, shared) for spot in spots(name, model.replicas, plan)
        }
    return made


def _size(config: Config, name: str, model: Served, spot: Spot, shared: Mapping[str, Pool]) -> dict[str, Any]:
    """How many replicas a model has on one machine: fixed, by its requests, or by those of all that share its GPUs."""
    pool, scaling = shared.get(spot.node), config.scaling
    if pool is not None and pool.claim(spot.name(name)) is not None:
        is_watching = scaling.first_token_seconds is not None
        return {"autoscaling_config": sharing(pool, spot.name(name), is_watching)}
    if spot.most > spot.least:
        size = autoscaling(spot.least, spot.most, model.replicas.target, scaling.down_seconds)
        return {"autoscaling_config": size}
    return {"num_replicas": spot.least}


def _deploy(
    config: Config, name: str, task: Task, model: Served, spot: Spot, shared: Mapping[str, Pool]
) -> serve.Application:
    threads, size = config.models.embedder_threads or os.cpu_count() or 1, _size(config, name, model, spot, shared)
    if model.address.startswith(vllm.SCHEME):
        from actors import vllm as engines  # loads the engine's library, which only who asked for it has

        fixed = autoscaling(spot.least, spot.least, model.replicas.target)
        made = engines.deploy(spot.name(name), model, spot, size.get("autoscaling_config", fixed), config.telemetry)
    else:
        replicas = model.replicas
        actor = {"generate": Generator, "embed": Embedder, "rerank": Reranker}[task]
        deployed = deployment(spot.name(name), actor, replicas.at_once, replicas.waiting, spot, size)
        made = (
            deployed.bind(model, config.telemetry)
            if task == "generate"
            else deployed.bind(
                model.address, threads, model.offered(), gpu_bytes=spot.bytes, telemetry=config.telemetry
            )
        )
    return lasting(made, model.model_dump(), spot.node, spot.gpus, spot.share, spot.bytes, threads, config.telemetry)


class Roster:
    """The root of the models' application: it holds them together, and nobody asks it."""

    def __init__(self, deployed: Mapping[Task, Mapping[int, Mapping[str, DeploymentHandle]]]) -> None:
        """Nothing is kept: that they are arguments makes them part of the application."""


def build(config: Config, plan: Plan) -> serve.Application:
    """The application of a cluster's models, as a plan places them."""
    return lasting(deployment("roster", Roster, 1, 1, Spot(config.ray.head or "")).bind(deploy(config, plan)))


def find(config: Config) -> Handles:
    """Handles of all models in a cluster's application, on every machine on which each may be, whether it is or not."""
    found: dict[Task, dict[int, dict[str, DeploymentHandle]]] = {}
    for task in ROLES:
        models = dict(enumerate(config.models.of_task(task)))
        found[task] = {
            place: {
                node: DeploymentHandle(Spot(node).name(name_of(task, place)), APPLICATION)
                for node in model.nodes or config.nodes
            }
            for place, model in models.items()
            if has_deployment(task, place, model)
        }
    return found


@dataclass(frozen=True, slots=True)
class Doors:
    """The models' deployments, for a process that asks them: bound on one machine, by name in a cluster."""

    handles: Handles
    whereabouts: Whereabouts | None = None

    @classmethod
    def of(cls, config: Config, bound: Handles | None) -> "Doors":
        """Those that are bound, or else those of the cluster's application."""
        return cls(find(config), Whereabouts(Coordination())) if bound is None else cls(bound)

    def has(self, task: Task, place: int) -> bool:
        """Whether this model has deployments."""
        return place in self.handles[task]

    def each(self, task: Task, place: int) -> Mapping[str, DeploymentHandle]:
        """By machine; on one machine, under no name."""
        return self.handles[task][place]

    def is_planned(self, task: Task, place: int, node: str) -> bool:
        return self.whereabouts is None or self.whereabouts.is_planned(name_of(task, place), node)

    def open(self, task: Task, place: int) -> Any:
        """A model that any of its deployments can stand for, as one object to ask."""
        parts = {node: Remote(handle) for node, handle in self.each(task, place).items()}
        if self.whereabouts is None:
            return next(iter(parts.values()))
        return Spread(parts, partial(self.is_planned, task, place))


@dataclass(frozen=True)
class Models:
    """Every model by the name clients ask for; of equal names the first, but generators share theirs.

    `engines` are the deployments of engines by their names and machines.
    """

    members: Sequence[Member]
    embedders: Mapping[str, Any]
    rerankers: Mapping[str, Any]
    engines: Mapping[str, RemoteEngine]

    def balance(self, config: Config, note: Callable[[float], None]) -> Balancer:
        """`note` is told how long each request waited for its first token."""
        usual = config.balancer
        weights = Weights(usual.latency_weight, usual.throughput_weight, usual.accuracy_weight)
        return Balancer(self.members, weights, usual.probe_seconds, note=note)


def open_models(config: Config, doors: Doors, retriever: Any) -> Models:
    """All models as objects to ask; `retriever` embeds a few texts at once."""
    members: list[Member] = []
    engines: dict[str, RemoteEngine] = {}
    for place, model in enumerate(config.models.of_task("generate")):
        for node, generator in _open_generators(place, model, doors, retriever):
            in_auto = not model.address.startswith("extractive:")
            is_planned = partial(doors.is_planned, "generate", place, node) if node else always
            members.append(Member(generator, model.accuracy, in_auto, node, is_planned))
            if isinstance(generator, RemoteEngine):
                engines[f"{generator.name}@{node}" if node else generator.name] = generator
    embedders: dict[str, Any] = {}
    for place, model in enumerate(config.models.of_task("embed")):
        embedders.setdefault(model.called, _open_embedder(place, model, doors))
    of_documents = next(iter(embedders.values()))
    rerankers: dict[str, Any] = {}
    for place, model in enumerate(config.models.of_task("rerank")):
        is_near = model.address == by_embedder.ADDRESS
        opened = ByEmbedding(of_documents) if is_near else _open("rerank", place, model, doors)
        rerankers.setdefault(model.called, opened)
    return Models(members, embedders, rerankers, engines)


def _open_generators(place: int, model: Served, doors: Doors, retriever: Any) -> list[tuple[str, GeneratorPort]]:
    """With the machine that each is on."""
    if not doors.has("generate", place):
        offered = {**model.offered(), "images": model.images, "embed": retriever.embed}
        return [("", open_model("generate", model.address, **offered))]
    handles = doors.each("generate", place).items()
    if not model.address.startswith(vllm.SCHEME):
        return [(node, RemoteGenerator(model.called, bool(model.images), handle)) for node, handle in handles]
    sees = vllm.read_checkpoint(model.address).sees_images if model.images is None else model.images
    return [(node, RemoteEngine(model.called, sees, handle)) for node, handle in handles]


def _open_embedder(place: int, model: Served, doors: Doors) -> Any:
    if model.address.startswith(vllm.SCHEME):
        return RemoteEmbedder(doors.open("embed", place))
    return _open("embed", place, model, doors)


def _open(task: Task, place: int, model: Served, doors: Doors) -> Any:
    if doors.has(task, place):
        return doors.open(task, place)
    return Threaded(open_model(task, model.address, **model.offered()), model.replicas.at_once)
