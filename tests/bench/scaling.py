"""Searches in memory as a collection grows: time, exactness, memory, and the first answer after a start.

    python -m tests.bench.scaling                 5,000, 20,000 and 100,000 chunks, some minutes
    python -m tests.bench.scaling 1000 4000       other numbers of chunks
    python -m tests.bench.scaling --whole 20000   of a whole Nexus: memory, and the first answer after a restart

Chunks are scifact's abstracts, over and over with a number of their own; their vectors are those of the first 500
abstracts with some noise, so that no two are the same. All is in one process: the model, SQLite and the rows in memory.
The memory of a whole Nexus is that of its processes, what they share counted once; its restart is timed from the
command on.
"""

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from nexus.hades import Hades, chunks_of, document_id_of, version_of
from nexus.ports import Embedder, Scope, Staged
from nexus.registry import open_part
from nexus.resident import Resident
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.types import Document, Piece, Principal, SearchRequest, Vectors, content_digest
from tests.bench.corpus import scifact
from tests.bench.quality import PACKAGES
from tests.running import Running, running_nexus, until

SIZES = (5_000, 20_000, 100_000)
EMBEDDED, QUERIES, AT_ONCE = 500, 100, 250
NOISE = 0.3
WHO = Principal("bench", "bench")
ROOM = 2**33
Stage = Callable[[Sequence[Staged]], None]


@dataclass(frozen=True)
class Measured:
    """One size. `memory` is what was taken, over the bytes of vectors and texts; `start` are seconds to an answer."""

    rows: int
    p50_ms: float
    p95_ms: float
    recall: float
    memory: float
    start: float


def put(
    hades: Hades, texts: Sequence[str], vectors: Vectors, first: int, stage: Stage, who: Principal, collection: str
) -> None:  # fmt: skip
    """Publish documents of one chunk each."""
    staged = []
    for number, (text, vector) in enumerate(zip(texts, vectors, strict=True), first):
        content = f"{number} {text}"
        document = Document(
            document_id_of(who.tenant, collection, f"{number}.txt"),
            version_of(content_digest(content.encode()), "p", "c", "e"),
            who.tenant, collection, f"{number}.txt", "", "text/plain", {}, frozenset(), len(content), 1,
        )  # fmt: skip
        chunks = chunks_of(document, [Piece(content, tokens=200)])
        staged.append(Staged(document, hades.begin(document), chunks, [content], vector[np.newaxis]))
    stage(staged)
    hades.publish([(one.document, one.epoch) for one in staged])


def grow(
    hades: Hades, texts: Sequence[str], base: Vectors, rows: int, stage: Stage, who: Principal = WHO,
    collection: str = "default",
) -> None:  # fmt: skip
    dice = np.random.default_rng(rows)
    for first in range(0, rows, AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, rows))
        noise = dice.standard_normal((len(numbers), base.shape[1])).astype(np.float32) / np.sqrt(base.shape[1])
        vectors = base[[number % len(base) for number in numbers]] + NOISE * noise
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        put(hades, [texts[number % len(texts)] for number in numbers], vectors, first, stage, who, collection)


def data_bytes(texts: Sequence[str], rows: int, dimension: int) -> int:
    """Of the vectors and texts of so many chunks."""
    return rows * dimension * 4 + sum(len(texts[n % len(texts)]) for n in range(rows))


def fill(nexus: Running, texts: Sequence[str], rows: int, collection: str = "default") -> int:
    """So many chunks more in both stores of a Nexus, which has the collection; none is embedded. Their `data_bytes`."""
    embedder = harness.open_embedder()
    vectors = open_part("stores", f"milvus-lite://127.0.0.1:{nexus.instance.vectors_port}")
    documents = open_part("stores", "sqlite:", home=nexus.home)
    fingerprint = next(one.fingerprint for one in documents.collections() if one.name == collection)
    hades = Hades(documents, vectors, fingerprint, embedder.dimension, embedder=harness.EMBEDDER)
    base = embedder.embed(texts[:EMBEDDED])
    grow(hades, texts, base, rows, hades.stage, Principal("default", "bench"), collection)
    documents.close()
    return data_bytes(texts, rows, embedder.dimension)


def measure(
    home: Path, embedder: Embedder, texts: Sequence[str], base: Vectors, queries: Sequence[str], rows: int
) -> Measured:
    documents = open_part("stores", "sqlite:", home=home)
    hades = Hades(documents, open_part("stores", "memory:"), embedder.fingerprint, embedder.dimension)
    grow(hades, texts, base, rows, documents.stage)
    first = Resident(hades, ROOM, home)  # which leaves its file
    first.foresee()
    first.settle()
    first.close()
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    held = Resident(hades, ROOM, home)
    retriever = Retriever(hades, embedder, RetrievalSettings(), resident=held)
    held.foresee()
    held.settle()
    retriever.search(SearchRequest(queries[0], graph="off"), WHO)
    start, taken = time.perf_counter() - started, psutil.Process().memory_info().rss - before
    spent = []
    for query in queries:
        began = time.perf_counter()
        retriever.search(SearchRequest(query, graph="off"), WHO)
        spent.append(1000 * (time.perf_counter() - began))
    size = data_bytes(texts, rows, embedder.dimension)
    recall = recalled(hades, held, embedder.embed(queries, "query"))
    held.close()
    retriever.close()
    documents.close()
    return Measured(rows, harness.median(spent), harness.percentile(spent, 0.95), recall, taken / size, start)


def recalled(hades: Hades, held: Resident, vectors: Vectors) -> float:
    """The share of the ten nearest, by brute force over the document store's vectors, that the dense route names."""
    serving = held.serving(hades.find_collection("default", WHO.tenant), WHO.tenant)
    assert serving is not None
    rows = serving.rows
    stored = hades.documents.vectors(sorted(rows.chunk_ids))
    ids, scores = list(stored), vectors @ np.stack(list(stored.values())).T
    shares = []
    for vector, exact in zip(vectors, scores, strict=True):
        best = {ids[place] for place in np.argsort(-exact, kind="stable")[:10]}
        shares.append(len(best & {i for i, _ in rows.search_dense(vector, 10, Scope(WHO.tenant))}) / 10)
    return float(np.mean(shares))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("sizes", type=int, nargs="*", default=SIZES)
    arguments.add_argument("--whole", type=int, metavar="CHUNKS")
    given = arguments.parse_args()
    corpus = scifact()
    texts, queries = list(corpus.documents.values()), list(itertools.islice(corpus.queries.values(), QUERIES))
    if given.whole:
        harness.print_result("scaling", measure_whole(texts, queries[0], given.whole), PACKAGES)
    else:
        measure_sizes(texts, queries, given.sizes)


def measure_whole(texts: Sequence[str], query: str, rows: int) -> dict[str, float]:
    """A Nexus before and after it has so many chunks; both are started, and asked once."""
    with running_nexus() as nexus:
        with nexus.http() as http:
            added = {"filename": "first.txt", "content": texts[0]}
            http.post("/rag/add_document", json=added).raise_for_status()
        empty = restart(nexus, query)
        size = fill(nexus, texts, rows)
        restart(nexus, query)  # which reads what came behind its back, and keeps it as what Nexus adds itself is kept
        full = restart(nexus, query)
    (empty_seconds, empty_bytes), (full_seconds, full_bytes) = empty, full
    names = ["chunks", "restart s", "memory MB"]
    harness.print_table(names, [(1, empty_seconds, empty_bytes / 1e6), (rows, full_seconds, full_bytes / 1e6)])
    return {
        "restart_over_empty": full_seconds / empty_seconds,
        "memory_over_bare_vectors_and_text": full_bytes / (empty_bytes + size),
        "added_memory_over_vectors_and_text": (full_bytes - empty_bytes) / size,
        "bare_mb": empty_bytes / 1e6,
    }


def restart(nexus: Running, query: str) -> tuple[float, float]:
    """Seconds from the command to an answer that memory gave, and the bytes that all processes have then."""
    nexus.must("down")
    started = time.perf_counter()
    nexus.must("up", "--wait", "240")
    with nexus.http() as http:
        http.post("/rag/search", json={"query": query}).raise_for_status()
        seconds = time.perf_counter() - started
        until(120, lambda: '"resident"' in http.get("/status").text)
        http.post("/rag/search", json={"query": query}).raise_for_status()
    return seconds, sum(process.memory_full_info().pss for process in nexus.processes(""))


def measure_sizes(texts: Sequence[str], queries: Sequence[str], sizes: Sequence[int]) -> None:
    """In this process."""
    started = time.perf_counter()
    embedder = harness.open_embedder()
    embedder.embed(queries[:1], "query")
    load = time.perf_counter() - started
    base = embedder.embed(texts[:EMBEDDED])
    found = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as home:
            found.append(measure(Path(home), embedder, texts, base, queries, rows))
    names = ["chunks", "p50 ms", "p95 ms", "recall@10", "memory/data", "start s"]
    harness.print_table(names, [(m.rows, m.p50_ms, m.p95_ms, m.recall, m.memory, m.start) for m in found])
    figures = {
        "p50_largest_over_smallest": found[-1].p50_ms / found[0].p50_ms, "recall": min(m.recall for m in found),
        "memory_over_vectors_and_text": found[-1].memory, "model_load_seconds": load,
    }  # fmt: skip
    figures |= {f"p50_ms_{m.rows}": m.p50_ms for m in found}
    figures |= {f"start_over_model_load_{m.rows}": (load + m.start) / load for m in found}
    harness.print_result("scaling", figures, PACKAGES)


if __name__ == "__main__":
    main()
