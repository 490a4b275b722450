"""What a configuration wants of the machines: every deployment, with what one replica of it takes."""

import os
from collections.abc import Iterator
from pathlib import Path

from cluster import footprint
from cluster.inventory import NODE_LABEL
from cluster.plan import Footprint, Want
from nexus.config import Config, Served
from nexus.errors import ConfigError
from nexus.models import by_embedder, vllm
from nexus.registry import Task

ROLES: dict[Task, str] = {"generate": "generator", "embed": "embedder", "rerank": "reranker"}
ELSEWHERE = ("openai:", "nim:", by_embedder.ADDRESS)  # embedders and rerankers without weights of ours
GGUF = "gguf:"
SENTENCE_TRANSFORMER = "sentence-transformer:"
ENCODERS = (SENTENCE_TRANSFORMER, footprint.CROSS_ENCODER)
STORES = "milvus-lite:"
MIB = 2**20
OWN_PARTS = {"gateway": 512 * MIB, "retriever": footprint.PROCESS, "ingestor": 512 * MIB, "vectors": 1024 * MIB}
VOTER = 256 * MIB


def wants_of(config: Config) -> list[Want]:
    """Every deployment of a configuration, under its name without a machine.

    Raises ConfigError where a model's folder is not here, or its memory cannot be told from its files.
    """
    return [*_parts(config), *_models(config), _voters(config)]


def _parts(config: Config) -> Iterator[Want]:
    """What works on the head's disk, or beside what does."""
    nodes = (config.ray.head,) if config.ray.head else ()
    embeds = _encoder(config.models.of_task("embed")[0], "cpu", 1)
    for name, memory in OWN_PARTS.items():
        if name == "ingestor":
            memory += config.parsing.workers * config.parsing.memory_bytes
        if name == "retriever" and embeds:
            memory = max(memory, embeds.weights + embeds.overhead)
        if name != "vectors" or config.stores.vectors == STORES:
            yield Want(name, memory=memory, nodes=nodes)


def _voters(config: Config) -> Want:
    """One on each machine that its labels name; in a cluster no two on one machine, whatever the labels say."""
    labels = [config.voters[number] for number in sorted(config.voters)]
    machines = {name: {NODE_LABEL: name, **node.labels} for name, node in config.nodes.items()}
    allowed = tuple(
        tuple(name for name, has in machines.items() if wanted.items() <= has.items()) if wanted else ()
        for wanted in labels
    )  # fmt: skip
    for number, wanted, names in zip(sorted(config.voters), labels, allowed, strict=True):
        if wanted and machines and not names:
            raise ConfigError(f"coordinator.voters: no machine of `nodes` has the labels of voter {number}: {wanted}")
    each = allowed if machines and any(allowed) else ()
    count = len(labels)
    return Want("voter", count, count, memory=VOTER, is_apart=bool(machines), nodes_of_each=each)


def _models(config: Config) -> Iterator[Want]:
    threads = config.models.embedder_threads or _cores(config)
    for task in ROLES:
        for place, model in enumerate(config.models.of_task(task)):
            if has_deployment(task, place, model):
                yield _want(name_of(task, place), model, threads)


def name_of(task: Task, place: int) -> str:
    """Of the deployment of a model; the documents' own embedder is the first."""
    return ROLES[task] if (task, place) == ("embed", 0) else f"{ROLES[task]}-{place}"


def has_deployment(task: Task, place: int, model: Served) -> bool:
    """Whether Nexus runs it in a process of its own: a generator only where it would hold up whoever asks it."""
    if model.address.startswith(vllm.SCHEME) or (task, place) == ("embed", 0):
        return True
    return model.address.startswith(GGUF) if task == "generate" else not model.address.startswith(ELSEWHERE)


def _cores(config: Config) -> int:
    """Of the machine that decides how many threads an embedder has."""
    return int(config.nodes[config.ray.head].cpus) if config.ray.head else os.cpu_count() or 1


def _want(name: str, model: Served, threads: int) -> Want:
    least, most = model.replicas.least, max(model.replicas.least, model.replicas.most)
    if model.address.startswith(vllm.SCHEME):
        return _engine(name, model, least, most)
    if model.address.startswith(GGUF):
        holds = footprint.of_gguf(model.address, model.context_length)
        memory = holds.weights + holds.overhead + holds.cache_bytes_per_token * holds.longest
        return Want(name, least, most, memory=memory, footprint=holds, nodes=model.nodes)
    at_once = min(threads, model.replicas.at_once)
    holds = _encoder(model, model.device, at_once) or Footprint(0, footprint.PROCESS)
    if model.device == "gpu":
        return Want(
            name,
            least,
            most,
            memory=footprint.PROCESS + footprint.CUDA_PROCESS,
            gpus=1,
            footprint=holds,
            nodes=model.nodes,
        )
    return Want(name, least, most, memory=holds.weights + holds.overhead, footprint=holds, nodes=model.nodes)


def _encoder(model: Served, device: footprint.Device, at_once: int) -> Footprint | None:
    """None for a model of another package, or one that is somewhere else: nobody knows what it holds."""
    return footprint.of_encoder(model.address, device, at_once) if model.address.startswith(ENCODERS) else None


def _engine(name: str, model: Served, least: int, most: int) -> Want:
    engine = model.engine
    footprint.require_folder(Path(model.address.removeprefix(vllm.SCHEME).partition("#")[0]), repr(model.address))
    holds = footprint.of_checkpoint(vllm.read_checkpoint(model.address).folder, engine, repr(model.address))
    if engine.device == "cpu":
        memory = holds.weights + holds.overhead + footprint.cpu_cache(engine)
        return Want(name, least, most, memory=memory, footprint=holds, nodes=model.nodes)
    gpus = engine.tensor_parallel * engine.pipeline_parallel
    return Want(
        name, least, most, cpus=gpus, memory=footprint.host_memory(engine), gpus=gpus,
        gpu_share=engine.memory_utilization, footprint=holds, nodes=model.nodes, stages=engine.pipeline_parallel,
    )  # fmt: skip
