"""From a configuration to one Serve application: the only place where everything meets."""

import asyncio
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from actors import coordinator
from actors.coordinator import Operator, Placement
from actors.ingestor import Ingestor
from actors.retriever import Retriever
from actors.vectors import Vectors
from cluster.inventory import Inventory, configured
from cluster.placement import Plan
from cluster.voter import Pace
from deployments import gateway, machines, models, planning
from deployments.remote import Remote
from nexus.access import KeyRing
from nexus.cache import ResponseCache, cached
from nexus.config import Config, Triton, load_config
from nexus.image_hosts import ImageHosts
from nexus.jobs import Jobs
from nexus.models.triton import TritonPool
from nexus.pipelines.rag import Tools
from nexus.registry import find_module, open_part
from nexus.sessions import Sessions

APPLICATION = "nexus"
LOOK_SECONDS = 0.2


class Gateway:
    """The ingress replica: the HTTP application, with handles to the rest."""

    def __init__(self, config: Config, parts: dict[str, DeploymentHandle], handles: models.Handles) -> None:
        self._config = config
        self._parts = {name: Remote(handle) for name, handle in parts.items()}
        self._parts["embedder"] = models.door(handles["embed"][0])
        self._handles = handles

    def __serve_build_asgi_app__(self) -> ASGIApp:
        config, parts = self._config, self._parts
        home = Path(config.home)
        documents = open_part("stores", config.stores.documents, home=home)
        retriever: Any = parts["retriever"]
        answers = config.answers
        opened = models.open_models(config, self._handles, retriever)
        balancer = opened.balance(config)
        kept = config.cache
        cache = ResponseCache(kept.entries, kept.seconds, kept.max_bytes) if kept.entries else None
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
                cache=cache,
                embedders=opened.embedders,
                rerankers=opened.rerankers,
                count_tokens=find_module("models", config.models.embedder).open_tokenizer(config.models.embedder),
                rag=Tools(
                    retrieve=retriever.retrieve,
                    generator=cached(balancer.generator(config.models.answering), cache),
                    passages=answers.passages,
                    passage_tokens=answers.passage_tokens,
                    abstain_below=answers.abstain_below,
                    rewrite=config.rewrites,
                ),
                checks={
                    **{name: part.ready for name, part in parts.items()},
                    "documents": lambda: asyncio.to_thread(documents.check),
                },
                engines={name: engine.load for name, engine in opened.engines.items()},
                triton=open_triton(config.triton),
                operator=Operator(home / coordinator.FOLDER, pace(config)),
                fetch_picture=ImageHosts(config.models.image_hosts).fetch,
            ),
            says_request_id=False,
        )


def pace(config: Config) -> Pace:
    """The voters' clock."""
    return Pace(config.coordinator.tick_seconds)


def open_triton(triton: Triton) -> TritonPool | None:
    """The Triton servers of the configuration as one pool; None where there are none."""
    if not triton.servers:
        return None
    return TritonPool(triton.servers, triton.probe_seconds, triton.timeout_seconds)


class RemotePoolIngestor(Ingestor):
    """The ingestor, with the embedder pool one hop away, by machine."""

    def __init__(self, config: Config, vectors_address: str, pool: Mapping[str, DeploymentHandle]) -> None:
        super().__init__(config, vectors_address, models.door(pool))


class RemoteRerankerRetriever(Retriever):
    """The retriever, with the reranker one hop away where it has processes of its own, by machine."""

    def __init__(self, config: Config, vectors_address: str, reranker: Mapping[str, DeploymentHandle] | None) -> None:
        super().__init__(config, vectors_address, None if reranker is None else models.door(reranker))


def build(config: Config, vectors_port: int, plan: Plan | None = None) -> serve.Application:
    """The application: gateway over retriever, ingestor, models and, where it is ours to run, Milvus Lite.

    Each replica says how many requests it takes at once and how many may wait; past that, 503. What opens the home's
    files is on the head's machine; the models are where the plan puts them, without one where Ray has room.
    """
    here = models.Spot(config.ray.head or "")
    deployed = models.deploy(config, plan)
    parts: dict[str, Any] = {}
    address = vectors_address(config, vectors_port)
    if config.stores.vectors == "milvus-lite:":
        parts["vectors"] = models.deployment("vectors", Vectors, 16, 64, here).bind(str(config.home), vectors_port)
    reranker = None if config.models.reranker is None else deployed["rerank"].get(0)
    retriever = models.deployment("retriever", RemoteRerankerRetriever, 32, 256, here)
    parts["retriever"] = retriever.bind(config, address, reranker)
    ingestor = models.deployment("ingestor", RemotePoolIngestor, 1024, 1024, here)
    parts["ingestor"] = ingestor.bind(config, address, deployed["embed"][0])
    return models.deployment("gateway", serve.ingress()(Gateway), 256, 1024, here).bind(config, parts, deployed)


def vectors_address(config: Config, vectors_port: int) -> str:
    """Where the vector store answers: as configured, or our own Milvus Lite on its port."""
    return (
        f"milvus-lite://127.0.0.1:{vectors_port}" if config.stores.vectors == "milvus-lite:" else config.stores.vectors
    )


async def agree(config: Config) -> tuple[Plan | None, frozenset[str]]:
    """Start the voters, and have them keep the plan that is about to be applied, in a cluster or where there are GPUs.

    It is made of what the machines say of themselves, and of those that are away, what the settings say: what belongs
    there starts when they come. Of the plan before it what still fits stays; a machine that is drained gets nothing.
    With the plan, those that are away. Raises ConfigError for what has no place, Unavailable.
    """
    voters = {id: Placement(labels) for id, labels in config.voters.items()}
    await coordinator.start(voters, Path(config.home) / coordinator.FOLDER, pace(config))
    if not config.nodes and not config.uses_gpus:
        return None, frozenset()
    client = await coordinator.connect()
    kept = await client.get(planning.KEY)
    drained = {key.removeprefix(planning.DRAINED) for key, _, _ in await client.range(planning.DRAINED)}
    described, seen = configured(config), await asyncio.to_thread(machines.look_at, config)
    known = {node.name: node for node in (*described.nodes, *seen.nodes)}
    inventory = Inventory(tuple(known[node.name] for node in described.nodes))
    plan = planning.plan_for(config, inventory, planning.from_json(kept[0]) if kept else None, drained)
    await client.put(planning.KEY, planning.to_json(plan))
    if not config.nodes:
        return Plan(tuple(replace(place, node="") for place in plan.places)), frozenset()
    return plan, frozenset(known) - {node.name for node in seen.nodes}


def main(ray_address: str, vectors_port: str, config_file: str = "") -> None:
    """Put the application on a running head; `deployments.running` calls this in a process of its own."""
    config = load_config(Path(config_file) if config_file else None)
    ray.init(address=ray_address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    plan, away = asyncio.run(agree(config))
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": config.http.host, "port": config.http.port, "keep_alive_timeout_s": 90},
    )
    target = serve.RunTarget(build(config, int(vectors_port), plan), APPLICATION, "/")
    serve.run_many([target], wait_for_applications_running=False)
    here = {f"{place.want}@{place.node}" for place in plan.places if place.node not in away} if plan and away else set()
    sys.exit(await_deployments(here))


def await_deployments(here: Collection[str] = ()) -> str | None:
    """Return once all deployments are well, or at least those named where some are; else why they cannot be.

    What belongs to a machine that is away starts by itself when that comes.
    """
    while True:
        application = serve.status().applications[APPLICATION]
        found = {name: one.status for name, one in application.deployments.items()}
        failed = [name for name, status in found.items() if status in ("UNHEALTHY", "DEPLOY_FAILED")]
        if application.status == "RUNNING" or (here and all(found.get(name) == "HEALTHY" for name in here)):
            return None
        if application.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            reasons = [f"{name}: {application.deployments[name].message.strip()}" for name in failed]
            return "\n".join(reasons) or application.message
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
