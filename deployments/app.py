"""From a configuration to one Serve application: the only place where everything meets."""

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from actors.embedder import Embedder
from actors.generator import Generator
from actors.ingestor import Ingestor
from actors.retriever import Retriever
from actors.vectors import Vectors
from deployments import gateway
from deployments.remote import Remote, RemoteEngine, RemoteGenerator
from nexus.access import KeyRing
from nexus.balancer import Balancer, Member, Weights
from nexus.config import Config, Served, load_config
from nexus.jobs import Jobs
from nexus.models import vllm
from nexus.pipelines.rag import Tools
from nexus.ports import Generator as GeneratorPort
from nexus.registry import find_module, open_model, open_part
from nexus.sessions import Sessions

APPLICATION = "nexus"


class Gateway:
    """The ingress replica: the HTTP application, with handles to the rest."""

    def __init__(
        self, config: Config, parts: dict[str, DeploymentHandle], generators: dict[int, DeploymentHandle]
    ) -> None:
        self._config = config
        self._parts = {name: Remote(handle) for name, handle in parts.items()}
        self._generators = generators

    def __serve_build_asgi_app__(self) -> ASGIApp:
        config, parts = self._config, self._parts
        home = Path(config.home)
        documents = open_part("stores", config.stores.documents, home=home)
        retriever: Any = parts["retriever"]
        answers = config.answers
        generators = _open_generators(config, self._generators, retriever)
        balancer = _balance(config, generators)
        return gateway.build(
            gateway.Lent(
                config=config,
                keys=KeyRing(home, [key.get_secret_value() for key in config.access.development_keys]),
                documents=documents,
                jobs=Jobs(home),
                sessions=Sessions(documents),
                retriever=retriever,
                ingestor=parts["ingestor"],
                balancer=balancer,
                embedder=parts["embedder"],
                embedder_name=config.models.embedder.partition(":")[2],
                count_tokens=find_module("models", config.models.embedder).open_tokenizer(config.models.embedder),
                rag=Tools(
                    retrieve=retriever.retrieve,
                    generator=balancer.generator(config.models.answering),
                    passages=answers.passages,
                    passage_tokens=answers.passage_tokens,
                    abstain_below=answers.abstain_below,
                ),
                checks={
                    **{name: part.ready for name, part in parts.items()},
                    "documents": lambda: asyncio.to_thread(documents.check),
                },
                engines={one.name: one.load for one in generators if isinstance(one, RemoteEngine)},
            ),
            says_request_id=False,
        )


class RemotePoolIngestor(Ingestor):
    """The ingestor, with the embedder pool one hop away."""

    def __init__(self, config: Config, vectors_address: str, pool: DeploymentHandle) -> None:
        super().__init__(config, vectors_address, Remote(pool))  # type: ignore[arg-type]


def build(config: Config, vectors_port: int) -> serve.Application:
    """The application: gateway over retriever, ingestor, embedder and, where it is ours to run, Milvus Lite.

    Each replica says how many requests it takes at once and how many may wait; past that, 503.
    """
    threads = config.models.embedder_threads or os.cpu_count() or 1
    embedder = _deploy("embedder", Embedder, 16, 256).bind(config.models.embedder, threads)
    parts: dict[str, Any] = {"embedder": embedder}
    address = vectors_address(config, vectors_port)
    if config.stores.vectors == "milvus-lite:":
        parts["vectors"] = _deploy("vectors", Vectors, 16, 64).bind(str(config.home), vectors_port)
    parts["retriever"] = _deploy("retriever", Retriever, 32, 256).bind(config, address)
    generators = {
        place: made
        for place, model in enumerate(config.models.of_task("generate"))
        if (made := _deploy_generator(place, model)) is not None
    }
    ingestor = _deploy("ingestor", RemotePoolIngestor, 1024, 1024)
    parts["ingestor"] = ingestor.bind(config, address, embedder)
    return _deploy("gateway", serve.ingress()(Gateway), 256, 1024).bind(config, parts, generators)


def _deploy_generator(place: int, model: Served) -> serve.Application | None:
    """Replicas for a model that needs processes of its own; None for one that the gateway asks itself."""
    name = f"generator-{place}"
    match model.address.partition(":")[0]:
        case "vllm":
            from actors.vllm import deploy  # loads the engine's library, which only those who asked for it have

            return deploy(name, model)
        case "gguf":
            at_once, waiting = model.replicas.at_once, model.replicas.waiting
            return _deploy(name, Generator, at_once, waiting, model.replicas.least).bind(model)
    return None


def _open_generators(config: Config, handles: dict[int, DeploymentHandle], retriever: Any) -> list[GeneratorPort]:
    """Every generator, in the order configured: those in replicas by their handles, the others opened here."""
    opened: list[GeneratorPort] = []
    for place, model in enumerate(config.models.of_task("generate")):
        if place not in handles:
            generator = open_model(
                "generate", model.address, name=model.called, api_key=model.api_key or config.models.api_key,
                timeout_seconds=model.timeout_seconds, images=model.images, embed=retriever.embed,
            )  # fmt: skip
            opened.append(generator)
        elif model.address.startswith(vllm.SCHEME):
            sees = vllm.read_checkpoint(model.address).sees_images if model.images is None else model.images
            opened.append(RemoteEngine(model.called, sees, handles[place]))
        else:
            opened.append(RemoteGenerator(model.called, bool(model.images), handles[place]))
    return opened


def _balance(config: Config, generators: Sequence[GeneratorPort]) -> Balancer:
    models, usual = config.models.of_task("generate"), config.balancer
    members = [Member(generator, model.accuracy) for generator, model in zip(generators, models, strict=True)]
    weights = Weights(usual.latency_weight, usual.throughput_weight, usual.accuracy_weight)
    return Balancer(members, weights, usual.probe_seconds)


def vectors_address(config: Config, vectors_port: int) -> str:
    """Where the vector store answers: as configured, or our own Milvus Lite on its port."""
    return (
        f"milvus-lite://127.0.0.1:{vectors_port}" if config.stores.vectors == "milvus-lite:" else config.stores.vectors
    )


def _deploy(name: str, actor: type, at_once: int, waiting: int, replicas: int = 1) -> serve.Deployment:
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


def main(ray_address: str, vectors_port: str, config_file: str = "") -> None:
    """Put the application on a running head; `deployments.running` calls this in a process of its own."""
    config = load_config(Path(config_file) if config_file else None)
    ray.init(address=ray_address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": config.http.host, "port": config.http.port, "keep_alive_timeout_s": 90},
    )
    try:
        serve.run(build(config, int(vectors_port)), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[APPLICATION].deployments
        reasons = [f"{name}: {one.message.strip()}" for name, one in deployments.items() if one.status == "UNHEALTHY"]
        sys.exit("\n".join(reasons) or str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
