"""From a configuration to one Serve application: the only place where everything meets."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from actors.embedder import Embedder
from actors.ingestor import Ingestor
from actors.retriever import Retriever
from actors.vectors import Vectors
from deployments import gateway
from nexus.access import KeyRing
from nexus.config import Config, Triton, load_config
from nexus.errors import NexusError, Overloaded, Unavailable
from nexus.jobs import Jobs
from nexus.models.triton import TritonPool
from nexus.pipelines.rag import Tools
from nexus.registry import find_module, open_part
from nexus.sessions import Sessions

APPLICATION = "nexus"


class Remote:
    """A deployment as a plain object: its methods are awaited, its errors are the errors it raised."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except RayTaskError as error:
                cause = getattr(error, "cause", error)
                raise (cause if isinstance(cause, NexusError) else error) from None
            except BackPressureError as error:
                raise Overloaded("every place is taken; try again in a moment") from error
            except (RayActorError, DeploymentUnavailableError) as error:
                raise Unavailable("a part of Nexus is restarting; try again in a moment") from error

        return call


class Gateway:
    """The ingress replica: the HTTP application, with handles to the rest."""

    def __init__(self, config: Config, parts: dict[str, DeploymentHandle]) -> None:
        self._config = config
        self._parts = {name: Remote(handle) for name, handle in parts.items()}

    def __serve_build_asgi_app__(self) -> ASGIApp:
        config, parts = self._config, self._parts
        home = Path(config.home)
        documents = open_part("stores", config.stores.documents, home=home)
        retriever: Any = parts["retriever"]
        answers = config.answers
        return gateway.build(
            gateway.Lent(
                config=config,
                keys=KeyRing(home, [key.get_secret_value() for key in config.access.development_keys]),
                documents=documents,
                jobs=Jobs(home),
                sessions=Sessions(documents),
                retriever=retriever,
                ingestor=parts["ingestor"],
                embedder=parts["embedder"],
                embedder_name=config.models.embedder.partition(":")[2],
                count_tokens=find_module("models", config.models.embedder).open_tokenizer(config.models.embedder),
                rag=Tools(
                    retrieve=retriever.retrieve,
                    generator=open_part("models", config.models.generator, embed=retriever.embed),
                    passages=answers.passages,
                    passage_tokens=answers.passage_tokens,
                    abstain_below=answers.abstain_below,
                ),
                checks={
                    **{name: part.ready for name, part in parts.items()},
                    "documents": lambda: asyncio.to_thread(documents.check),
                },
                triton=open_triton(config.triton),
            ),
            says_request_id=False,
        )


def open_triton(triton: Triton) -> TritonPool | None:
    """The Triton servers of the configuration as one pool; None where there are none."""
    if not triton.servers:
        return None
    return TritonPool(triton.servers, triton.probe_seconds, triton.timeout_seconds)


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
    ingestor = _deploy("ingestor", RemotePoolIngestor, 1024, 1024)
    parts["ingestor"] = ingestor.bind(config, address, embedder)
    return _deploy("gateway", serve.ingress()(Gateway), 256, 1024).bind(config, parts)


def vectors_address(config: Config, vectors_port: int) -> str:
    """Where the vector store answers: as configured, or our own Milvus Lite on its port."""
    return (
        f"milvus-lite://127.0.0.1:{vectors_port}" if config.stores.vectors == "milvus-lite:" else config.stores.vectors
    )


def _deploy(name: str, actor: type, at_once: int, waiting: int) -> serve.Deployment:
    return serve.deployment(
        name=name,
        num_replicas=1,
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
