"""From a configuration to one Serve application: the only place where everything meets."""

import asyncio
import logging
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import RunTarget
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview
from starlette.types import ASGIApp

from actors import coordinator, meter, steward
from actors.coordinator import Operator, Placement
from actors.hops import LOGGING, begin
from actors.ingestor import Ingestor
from actors.pressure import Pressure
from actors.retriever import Retriever
from actors.vectors import Vectors
from cluster.inventory import Inventory, configured, differences
from cluster.plan import DRAINED, KEY, Place, Plan, decode, encode
from cluster.voter import Pace
from deployments import gateway, machines, models, planning
from deployments.observer import RayObserver
from deployments.reindexing import Reindexing
from deployments.remote import Remote
from nexus.access import KeyRing
from nexus.audit import Chain, Recorder
from nexus.cache import ResponseCache, cached
from nexus.config import Config, Triton, load_config
from nexus.image_hosts import ImageHosts
from nexus.jobs import Jobs
from nexus.memory import Memory
from nexus.models.triton import TritonPool
from nexus.pipelines.rag import Tools
from nexus.precision import resolved
from nexus.pressure import FirstTokens
from nexus.registry import find_module, open_interactions, open_part
from nexus.screening import ScreenedGenerator, open_screen
from nexus.sessions import Sessions
from nexus.summaries import Summarise, summarise
from nexus.tokens import Tokens

log = logging.getLogger("nexus.gateway")

APPLICATION = "nexus"
FAILED = ("UNHEALTHY", "DEPLOY_FAILED")
LOOK_SECONDS = 0.2
SHED_AT_ONCE = 256  # requests that are refused, or public, beside those that have a place or wait for one
GRACE_SECONDS = 3.0  # after a plan is in force; a copy of the last one is a second old at most


class Gateway:
    """The ingress replica: the HTTP application, with handles to the rest."""

    def __init__(
        self, config: Config, parts: dict[str, DeploymentHandle], bound: models.Handles | None
    ) -> None:  # fmt: skip
        begin("gateway", config.telemetry)
        self._config = config
        self._bound = bound
        self._parts = {name: Remote(handle) for name, handle in parts.items()}

    def __serve_build_asgi_app__(self) -> ASGIApp:
        config, doors = self._config, models.Doors.of(self._config, self._bound)
        parts = {**self._parts, "embedder": doors.open("embed", 0)}
        home = Path(config.home)
        documents = open_part("stores", config.stores.documents, home=home)
        retriever: Any = parts["retriever"]
        ingestor: Any = parts["ingestor"]
        answers = config.answers
        opened = models.open_models(config, doors, retriever)
        limit = config.scaling.first_token_seconds
        pressure = None if limit is None else Pressure(FirstTokens(limit, config.scaling.near))
        balancer = opened.balance(config, ignore if pressure is None else pressure.note)
        kept = config.cache
        keys = open_keys(config)
        cache = ResponseCache(kept.entries, kept.seconds, kept.max_bytes) if kept.entries else None
        return gateway.build(
            gateway.Lent(
                config=config,
                keys=keys,
                tokens=Tokens(keys, home, config.access),
                audit=Recorder(Chain(home, config.audit.file_bytes)),
                documents=documents,
                jobs=Jobs(home, config.limits.open_jobs),
                sessions=Sessions(documents, config.memory),
                memory=Memory(open_interactions(config.stores.documents, home=home), retriever, config.memory),
                retriever=retriever,
                ingestor=parts["ingestor"],
                policies=parts["ingestor"],
                reindexing=Reindexing(ingestor, retriever),
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
                observer=RayObserver(config),
                standings=retriever.standings,
                sharing=steward.open_sharing(config),
                fetch_picture=ImageHosts(config.models.image_hosts).fetch,
            ),
            says_request_id=False,
        )


def open_keys(config: Config) -> KeyRing:
    """The keys of this home. Those for development are said, each time, in the log of whoever takes them."""
    given = config.access.development_keys
    if given:
        log.warning(
            "%d development key(s) are accepted, which may do everything: set access.mode to production, and unset"
            " access.development_keys (VALID_API_KEYS), before anybody else can reach this",
            len(given),
        )
    return KeyRing(Path(config.home), [key.get_secret_value() for key in given], config.access.environment)


def ignore(seconds: float) -> None:
    """Nobody wants to know how long a request waited."""


def pace(config: Config) -> Pace:
    """The voters' clock."""
    return Pace(config.coordinator.tick_seconds)


def open_triton(triton: Triton) -> TritonPool | None:
    """The Triton servers of the configuration as one pool; None where there are none."""
    if not triton.servers:
        return None
    return TritonPool(triton.servers, triton.probe_seconds, triton.timeout_seconds)


class RemotePoolIngestor(Ingestor):
    """The ingestor, with the embedder pool one hop away."""

    def __init__(self, config: Config, vectors_address: str, bound: models.Handles | None) -> None:
        doors = models.Doors.of(config, bound)
        pool = doors.open("embed", 0)
        super().__init__(config, vectors_address, pool, _summariser(config, doors, pool))


def _summariser(config: Config, doors: models.Doors, pool: Any) -> Summarise | None:
    """The model that answers, asked for summaries behind the content rules; None where none are wanted."""
    if config.memory.compaction != "summarise":
        return None
    generator = models.open_models(config, doors, pool).balance(config, ignore).generator(config.models.answering)
    return partial(summarise, generator=ScreenedGenerator(generator, open_screen(config.content)))


class RemoteRerankerRetriever(Retriever):
    """The retriever, with the reranker one hop away where it has a process of its own."""

    def __init__(self, config: Config, vectors_address: str, bound: models.Handles | None) -> None:
        doors = models.Doors.of(config, bound)
        has_one = config.models.reranker is not None and doors.has("rerank", 0)
        super().__init__(config, vectors_address, doors.open("rerank", 0) if has_one else None)


def build(config: Config, vectors_port: int, bound: models.Handles | None) -> serve.Application:
    """The application: gateway over retriever, ingestor and, where it is ours to run, Milvus Lite.

    Each replica says how many requests it takes at once and how many may wait; past that, 503. What opens the home's
    files is on the head's machine. The models are those given, or else those of the cluster's own application.
    """
    here = models.Spot(config.ray.head or "")
    parts: dict[str, serve.Application] = {}
    address, settings = vectors_address(config, vectors_port), config.model_dump()
    if config.stores.vectors == "milvus-lite:":
        vectors = models.deployment("vectors", Vectors, 16, 64, here)
        parts["vectors"] = models.lasting(vectors.bind(str(config.home), vectors_port), config.home, vectors_port)
    retriever = models.deployment("retriever", RemoteRerankerRetriever, 32, 256, here)
    parts["retriever"] = models.lasting(retriever.bind(config, address, bound), settings, address)
    ingestor = models.deployment("ingestor", RemotePoolIngestor, 1024, 1024, here)
    parts["ingestor"] = models.lasting(ingestor.bind(config, address, bound), settings, address)
    at_once = config.places + config.limits.waiting + SHED_AT_ONCE
    ingress = models.deployment("gateway", serve.ingress()(Gateway), at_once, 1024, here)
    return models.lasting(ingress.bind(config, parts, bound), settings)


def vectors_address(config: Config, vectors_port: int) -> str:
    """Where the vector store answers: as configured, or our own Milvus Lite on its port."""
    return (
        f"milvus-lite://127.0.0.1:{vectors_port}" if config.stores.vectors == "milvus-lite:" else config.stores.vectors
    )


@dataclass(frozen=True, slots=True)
class Decision:
    """A plan to apply, the machines that are away, and what still runs on machines that are to be left."""

    plan: Plan
    away: frozenset[str]
    leaving: tuple[Place, ...]


async def start_voters(config: Config) -> None:
    """Those that the settings name, on their machines."""
    voters = {id: Placement(labels) for id, labels in config.voters.items()}
    await coordinator.start(voters, Path(config.home) / coordinator.FOLDER, pace(config))


async def decide(config: Config) -> Decision:
    """What goes where, by what the machines say of themselves, and for those that are away by the settings.

    Of the plan in force what still fits stays; a machine that is drained gets nothing. Raises ConfigError for what has
    no place, Unavailable.
    """
    client = await coordinator.connect()
    kept = await client.get(KEY)
    current = None if kept is None else decode(kept[0])
    drained = {key.removeprefix(DRAINED) for key, _, _ in await client.range(DRAINED)}
    described, seen = configured(config), await asyncio.to_thread(machines.look_at, config)
    for difference in differences(described, seen):
        print(f"note: {difference.sentence}", flush=True)
    there = await asyncio.to_thread(machines.plannable, config, seen)
    known = {node.name: node for node in (*described.nodes, *there.nodes)}
    inventory = Inventory(tuple(known[node.name] for node in described.nodes))
    plan = planning.plan_for(config, inventory, current, drained)
    leaving = [place for place in (current.places if current else ()) if place.node in drained]
    away = frozenset(known) - {node.name for node in there.nodes}
    return Decision(plan, away, tuple(place for place in leaving if place.node not in away))


async def put_in_force(plan: Plan) -> None:
    """From now on, and within a second everywhere, requests go where this plan has places."""
    await (await coordinator.connect()).put(KEY, encode(plan))


def start_actors(config: Config) -> None:
    """Those that are there before an application, and stay after it: voters and, where needed, stewards and meters."""
    asyncio.run(start_voters(config))
    if config.nodes or steward.has_blocks(config):
        steward.start(config)
    meter.start(config)


def main(ray_address: str, vectors_port: str, config_file: str = "") -> None:
    """Put the application on a running head; `deployments.running` calls this in a process of its own."""
    config = resolved(load_config(Path(config_file) if config_file else None))
    ray.init(address=ray_address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    start_actors(config)
    serve.start(
        proxy_location="HeadOnly" if config.nodes else "EveryNode",
        http_options={"host": config.http.host, "port": config.http.port, "keep_alive_timeout_s": 90},
        logging_config=LOGGING,
    )
    sys.exit(deploy_cluster(config, int(vectors_port)) if config.nodes else deploy_here(config, int(vectors_port)))


def deploy_here(config: Config, vectors_port: int) -> str | None:
    """All on one machine; where there are GPUs, each model has the share of them that a plan gives it."""
    plan = None
    if config.uses_gpus:
        plan = asyncio.run(decide(config)).plan
        asyncio.run(put_in_force(plan))
    return deploy({APPLICATION: build(config, vectors_port, models.deploy(config, without_machines(plan)))})


def without_machines(plan: Plan | None) -> Plan | None:
    """The plan of the only machine, whose deployments are named after no machine."""
    return None if plan is None else Plan(tuple(replace(place, node="") for place in plan.places))


def deploy_cluster(config: Config, vectors_port: int) -> str | None:
    """The models where the plan puts them, and what asks them on the head's machine.

    What leaves a drained machine runs there until its successors do and nobody asks it any more.
    """
    decided = asyncio.run(decide(config))
    applications = {APPLICATION: build(config, vectors_port, None)}
    if decided.leaving:
        both = Plan((*decided.plan.places, *decided.leaving))
        if failed := deploy({models.APPLICATION: models.build(config, both)}, decided.away):
            return failed
    asyncio.run(put_in_force(decided.plan))
    if decided.leaving:
        time.sleep(GRACE_SECONDS)
    return deploy({models.APPLICATION: models.build(config, decided.plan), **applications}, decided.away)


def deploy(applications: Mapping[str, serve.Application], away: Collection[str] = ()) -> str | None:
    """Return once all deployments are well but those on machines that are away; else why they cannot be."""
    targets = [RunTarget(one, name, "/" if name == APPLICATION else None) for name, one in applications.items()]
    serve.run_many(targets, wait_for_applications_running=False)
    return await_deployments(applications, away)


def await_deployments(applications: Collection[str], away: Collection[str]) -> str | None:
    """As `deploy`. What belongs to a machine that is away starts by itself when that comes."""
    while True:
        found = serve.status().applications
        states = [found[name] for name in applications]
        failed = [(name, one) for state in states for name, one in state.deployments.items() if one.status in FAILED]
        if any(state.status in FAILED for state in states):
            reasons = [f"{name}: {one.message.strip()}" for name, one in failed]
            return "\n".join(reasons) or " ".join(state.message for state in states)
        if all(state.status == "RUNNING" or _waits_for(away, state) for state in states):
            return None
        time.sleep(LOOK_SECONDS)


def _waits_for(away: Collection[str], state: ApplicationStatusOverview) -> bool:
    """Whether nothing but machines that are away keeps an application from running."""
    waiting = [name for name, one in state.deployments.items() if one.status != "HEALTHY"]
    return bool(waiting) and all(name.partition("@")[2] in away for name in waiting)


if __name__ == "__main__":
    main(*sys.argv[1:])
