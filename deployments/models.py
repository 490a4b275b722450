"""The models of a configuration: deployments of those that Nexus runs, and all of them as objects to ask.

A model's place is its number among those of its task. One that another server runs, or that needs nothing,
has no deployment: the gateway asks it itself.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.embedder import Embedder
from actors.generator import Generator
from actors.reranker import Reranker
from deployments.gateway import ByEmbedding
from deployments.remote import Remote, RemoteEmbedder, RemoteEngine, RemoteGenerator, Threaded
from nexus.balancer import Balancer, Member, Weights
from nexus.config import Config, Served
from nexus.models import by_embedder, vllm
from nexus.ports import Generator as GeneratorPort
from nexus.registry import Task, open_model

ELSEWHERE = ("openai:", "nim:", by_embedder.ADDRESS)  # embedders and rerankers without weights of ours
IN_PROCESS = ("gguf:",)  # generators that would hold up whoever shares their process

ROLES: Mapping[Task, str] = {"generate": "generator", "embed": "embedder", "rerank": "reranker"}
Handles = Mapping[Task, Mapping[int, DeploymentHandle]]


def deployment(name: str, actor: type, at_once: int, waiting: int, replicas: int = 1) -> serve.Deployment:
    """An actor class as replicas of which each works on `at_once` requests; past `waiting` more, 503."""
    return serve.deployment(
        name=name,
        num_replicas=replicas,
        max_ongoing_requests=at_once,
        max_queued_requests=waiting,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )(actor)


def deploy(config: Config) -> dict[Task, dict[int, serve.Application]]:
    """The deployments of all models but the documents' embedder, by task and place."""
    tasks: tuple[Task, ...] = ("generate", "embed", "rerank")
    threads = config.models.embedder_threads or os.cpu_count() or 1
    made: dict[Task, dict[int, serve.Application]] = {}
    for task in tasks:
        models = list(enumerate(config.models.of_task(task)))
        applications = {place: _deploy(task, place, model, threads) for place, model in models[task == "embed" :]}
        made[task] = {place: one for place, one in applications.items() if one is not None}
    return made


def _deploy(task: Task, place: int, model: Served, threads: int) -> serve.Application | None:
    name, replicas = (
        f"{ {'generate': 'generator', 'embed': 'embedder', 'rerank': 'reranker'}[task] }-{place}",
        model.replicas,
    )
    if model.address.startswith(vllm.SCHEME):
        from actors import vllm as engines  # loads the engine's library, which only who asked for it has

        return engines.deploy(name, model)
    size = (replicas.at_once, replicas.waiting, replicas.least)
    if task == "generate":
        is_ours = model.address.startswith(IN_PROCESS)
        return deployment(name, Generator, *size).bind(model) if is_ours else None
    if model.address.startswith(ELSEWHERE):
        return None
    if task == "embed":
        return deployment(name, Embedder, *size).bind(model.address, threads, model.offered())
    return deployment(name, Reranker, *size).bind(model.address, threads, model.offered())


@dataclass(frozen=True)
class Models:
    """Every model by the name clients ask for; of equal names the first, but generators share theirs."""

    generators: Sequence[GeneratorPort]
    embedders: Mapping[str, Any]
    rerankers: Mapping[str, Any]

    def balance(self, config: Config) -> Balancer:
        models, usual = config.models.of_task("generate"), config.balancer
        members = [
            Member(generator, model.accuracy, in_auto=not model.address.startswith("extractive:"))
            for generator, model in zip(self.generators, models, strict=True)
        ]
        weights = Weights(usual.latency_weight, usual.throughput_weight, usual.accuracy_weight)
        return Balancer(members, weights, usual.probe_seconds)


def open_models(config: Config, handles: Handles, embedder: Any, retriever: Any) -> Models:
    """All models as objects to ask. `embedder` is the documents' own, `retriever` embeds a few texts at once."""
    of_task = config.models.of_task
    generators = [
        _open_generator(model, handles["generate"].get(place), retriever)
        for place, model in enumerate(of_task("generate"))
    ]
    embedders: dict[str, Any] = {}
    for place, model in enumerate(of_task("embed")):
        embedders.setdefault(model.called, _open_embedder(model, handles["embed"].get(place)) if place else embedder)
    rerankers: dict[str, Any] = {}
    for place, model in enumerate(of_task("rerank")):
        is_near = model.address == by_embedder.ADDRESS
        opened = ByEmbedding(embedder) if is_near else _open("rerank", model, handles["rerank"].get(place))
        rerankers.setdefault(model.called, opened)
    return Models(generators, embedders, rerankers)


def _open_generator(model: Served, handle: DeploymentHandle | None, retriever: Any) -> GeneratorPort:
    if handle is None:
        offered = {**model.offered(), "images": model.images, "embed": retriever.embed}
        opened: GeneratorPort = open_model("generate", model.address, **offered)
        return opened
    if model.address.startswith(vllm.SCHEME):
        sees = vllm.read_checkpoint(model.address).sees_images if model.images is None else model.images
        return RemoteEngine(model.called, sees, handle)
    return RemoteGenerator(model.called, bool(model.images), handle)


def _open_embedder(model: Served, handle: DeploymentHandle | None) -> Any:
    is_engine = handle is not None and model.address.startswith(vllm.SCHEME)
    return RemoteEmbedder(handle) if is_engine and handle is not None else _open("embed", model, handle)


def _open(task: Task, model: Served, handle: DeploymentHandle | None) -> Any:
    if handle is not None:
        return Remote(handle)
    return Threaded(open_model(task, model.address, **model.offered()), model.replicas.at_once)
