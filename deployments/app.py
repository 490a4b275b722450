"""From a configuration to one Serve application: the only place where everything meets."""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from actors.reranker import Reranker
from actors.retriever import Retriever
from actors.vectors import Vectors
from deployments import gateway
from nexus.access import KeyRing
from nexus.config import Config, Served, load_config
from nexus.errors import NexusError, Overloaded, Unavailable
from nexus.jobs import Jobs
from nexus.models import by_embedder
from nexus.pipelines.rag import Tools
from nexus.registry import Task, find_module, open_model, open_part
from nexus.sessions import Sessions

APPLICATION = "nexus"
ELSEWHERE = ("openai:", "nim:")  # models that another server runs


class Remote:
    """A deployment as a plain object: its methods are awaited, its errors are the errors it raised."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            answer = getattr(self._handle, method).remote(*arguments)
            try:
                return await answer
            except asyncio.CancelledError:
                answer.cancel()  # nobody waits for it any more
                raise
            except RayTaskError as error:
                cause = getattr(error, "cause", error)
                raise (cause if isinstance(cause, NexusError) else error) from None
            except BackPressureError as error:
                raise Overloaded("every place is taken; try again in a moment") from error
            except (RayActorError, DeploymentUnavailableError) as error:
                raise Unavailable("a part of Nexus is restarting; try again in a moment") from error

        return call


class Threaded:
    """A model of this process as deployments are: its methods are awaited, each call in a thread."""

    def __init__(self, model: object, threads: int) -> None:
        self._model = model
        self._threads = ThreadPoolExecutor(threads, "model")

    def __getattr__(self, method: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            work = getattr(self._model, method)
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

        return call


class Gateway:
    """The ingress replica: the HTTP application, with handles to the rest.

    `models` are the further embedders and the rerankers that are deployments, by the names clients ask for.
    """

    def __init__(
        self, config: Config, parts: dict[str, DeploymentHandle], models: dict[Task, dict[str, DeploymentHandle]]
    ) -> None:
        self._config = config
        self._parts = {name: Remote(handle) for name, handle in parts.items()}
        self._models = {
            task: {name: Remote(handle) for name, handle in handles.items()} for task, handles in models.items()
        }

    def __serve_build_asgi_app__(self) -> ASGIApp:
        config, parts = self._config, self._parts
        home = Path(config.home)
        documents = open_part("stores", config.stores.documents, home=home)
        retriever: Any = parts["retriever"]
        answers = config.answers
        embedders = _embedders(config, parts["embedder"], self._models["embed"])
        return gateway.build(
            gateway.Lent(
                config=config,
                keys=KeyRing(home, [key.get_secret_value() for key in config.access.development_keys]),
                documents=documents,
                jobs=Jobs(home),
                sessions=Sessions(documents),
                retriever=retriever,
                ingestor=parts["ingestor"],
                embedders=embedders,
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
                rerankers=_rerankers(config, parts["embedder"], self._models["rerank"]),
            ),
            says_request_id=False,
        )


class RemotePoolIngestor(Ingestor):
    """The ingestor, with the embedder pool one hop away."""

    def __init__(self, config: Config, vectors_address: str, pool: DeploymentHandle) -> None:
        super().__init__(config, vectors_address, Remote(pool))  # type: ignore[arg-type]


class RemoteRerankerRetriever(Retriever):
    """The retriever, with the reranker one hop away where it has a process of its own."""

    def __init__(self, config: Config, vectors_address: str, reranker: DeploymentHandle | None) -> None:
        super().__init__(config, vectors_address, None if reranker is None else Remote(reranker))  # type: ignore[arg-type]


def _is_ours(model: Served) -> bool:
    """Whether we load its weights, in a process of its own. The others are opened by whoever asks them."""
    return not model.address.startswith((*ELSEWHERE, by_embedder.ADDRESS))


def _named(models: Sequence[Served]) -> dict[str, Served]:
    """Models by the name clients ask for; of equal names the first."""
    named: dict[str, Served] = {}
    for model in models:
        named.setdefault(model.called, model)
    return named


def _embedders(config: Config, own: Any, deployed: Mapping[str, Any]) -> dict[str, Any]:
    """Every embedder by its name, the documents' own first."""
    first, *further = _named(config.models.of_task("embed")).items()
    return {first[0]: own, **{name: deployed.get(name) or _open("embed", model) for name, model in further}}


def _rerankers(config: Config, embedder: Any, deployed: Mapping[str, Any]) -> dict[str, Any]:
    """Every configured reranker by its name."""

    def find(name: str, model: Served) -> Any:
        if model.address == by_embedder.ADDRESS:
            return gateway.ByEmbedding(embedder)
        return deployed.get(name) or _open("rerank", model)

    return {name: find(name, model) for name, model in _named(config.models.of_task("rerank")).items()}


def _open(task: Task, model: Served) -> Threaded:
    return Threaded(open_model(task, model.address, **model.offered()), model.replicas.at_once)


def _deploy_models(config: Config, threads: int) -> dict[Task, dict[str, Any]]:
    """A deployment of each further embedder and of each reranker that is ours to run, by its name."""
    embedders = list(_named(config.models.of_task("embed")).items())[1:]
    rerankers = list(_named(config.models.of_task("rerank")).items())
    return {
        "embed": {
            name: _deploy(f"embedder-{number}", Embedder, model.replicas.at_once, model.replicas.waiting).bind(
                model.address, threads
            )
            for number, (name, model) in enumerate(embedders, 1)
            if _is_ours(model)
        },
        "rerank": {
            name: _deploy(
                f"reranker-{number}" if number else "reranker", Reranker, model.replicas.at_once, model.replicas.waiting
            ).bind(model.address, threads, model.offered())
            for number, (name, model) in enumerate(rerankers)
            if _is_ours(model)
        },
    }


def build(config: Config, vectors_port: int) -> serve.Application:
    """The application: gateway over retriever, ingestor, embedders, rerankers and, where it is ours, Milvus Lite.

    Each replica says how many requests it takes at once and how many may wait; past that, 503.
    """
    threads = config.models.embedder_threads or os.cpu_count() or 1
    embedder = _deploy("embedder", Embedder, 16, 256).bind(config.models.embedder, threads)
    parts: dict[str, Any] = {"embedder": embedder}
    address = vectors_address(config, vectors_port)
    if config.stores.vectors == "milvus-lite:":
        parts["vectors"] = _deploy("vectors", Vectors, 16, 64).bind(str(config.home), vectors_port)
    models = _deploy_models(config, threads)
    reranker = None if config.models.reranker is None else config.models.of_task("rerank")[0].called
    retriever = _deploy("retriever", RemoteRerankerRetriever, 32, 256)
    parts["retriever"] = retriever.bind(config, address, models["rerank"].get(reranker) if reranker else None)
    ingestor = _deploy("ingestor", RemotePoolIngestor, 1024, 1024)
    parts["ingestor"] = ingestor.bind(config, address, embedder)
    return _deploy("gateway", serve.ingress()(Gateway), 256, 1024).bind(config, parts, models)


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
