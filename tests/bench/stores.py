"""What the stores cost, side by side: milliseconds per store and operation, at two sizes.

    python -m tests.bench.stores [--chunks 1000 10000]

Each store is called as HADES calls it, in this process, and holds so many chunks in documents of ten. Figures are
medians. Of a document store: `stage` ten documents, `publish` them in one transaction, `read` the chunks of ten hits
with their documents, `as_of` (the verdicts on a hundred candidates at a past sequence), `search` (documents by a
filter of their metadata), `delete` one document, `retire` (claim one closed version and purge it). Of a vector store:
`stage` a hundred rows, `publish` (point an alias to another index and back), `read` (count the rows), `search_dense`
and `search_text` for the best hundred, `delete` a hundred rows; it has no past, so neither `as_of` nor `retire`.

ArangoDB is asked where NEXUS_TEST_ARANGO_URL names a server, Milvus where NEXUS_TEST_MILVUS_URL does. Without, the
tests' doubles stand in, at the smallest size and under their own names: **a double's times say nothing of ArangoDB or
Milvus**, only that the whole way to a server is walked.
"""

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import argparse
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nexus.filters import Compare
from nexus.hades import chunks_of, document_id_of, version_of
from nexus.ports import DocumentStore, IndexRow, Scope, Staged, VectorStore
from nexus.registry import open_part
from nexus.types import Document, Piece, Principal, Vectors
from tests import document_stores
from tests.milvus_server import MilvusServer

DIMENSION = 384
PER_DOCUMENT = 10
BATCH = 10  # documents
REPEATS = 15
HITS, CANDIDATES = 10, 100
WHO = Principal("acme", "bench")
PACKAGES = ("milvus-lite", "pymilvus", "python-arango")
MILVUS = os.environ.get("NEXUS_TEST_MILVUS_URL", "")
DOUBLES = ("arango_double", "milvus_double")
DOCUMENTS = ("memory", "sqlite", "arango" if document_stores.SERVER else "arango_double")
VECTORS = ("memory", "milvus_lite", "milvus" if MILVUS else "milvus_double")
OF_DOCUMENTS = ("stage", "publish", "read", "as_of", "search", "delete", "retire")
OF_VECTORS = ("stage", "publish", "read", "search_dense", "search_text", "delete")


class Times:
    """Milliseconds of each operation, call by call."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, operation: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._taken[operation].append((time.perf_counter() - started) * 1000)

    def median(self, operation: str) -> float:
        """Of the latest calls, which found the store at its full size."""
        return harness.median(self._taken[operation][-REPEATS:])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--chunks", type=int, nargs="+", default=[1_000, 10_000])
    sizes = sorted(arguments.parse_args().chunks)
    figures: dict[str, float] = {}
    for what, kinds, operations, measure in (
        ("documents", DOCUMENTS, OF_DOCUMENTS, measure_documents), ("vectors", VECTORS, OF_VECTORS, measure_vectors),
    ):  # fmt: skip
        rows: list[tuple[object, ...]] = []
        for size in sizes:
            for kind in kinds:
                if kind in DOUBLES and size != sizes[0]:
                    continue
                times = measure(kind, size)
                rows.append((kind, size, *(times.median(operation) for operation in operations)))
                figures |= {f"{what}_{kind}_{one}_ms_{size}": times.median(one) for one in operations}
        print(f"\n{what}: milliseconds", flush=True)
        harness.print_table((what, "chunks", *operations), rows)
    if doubles := [kind for kind in (*DOCUMENTS, *VECTORS) if kind in DOUBLES]:
        print(f"\n{' and '.join(doubles)}: of the tests; their times say nothing of the servers they stand in for")
    harness.print_result("stores", figures, PACKAGES)


# ── documents ───────────────────────────────────────────────────────────────────────────────────


def measure_documents(kind: str, size: int) -> Times:
    """Fill a document store, then ask it and empty it a little."""
    place = {"memory": "memory", "sqlite": "disk", "arango": "arango server", "arango_double": "arango"}[kind]
    times, dice = Times(), random.Random(0)
    with (
        tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder,
        document_stores.place(place, Path(folder)) as open_,
    ):
        store = open_()
        store.open_collection("default", "bench", "nx_bench")
        published: list[Document] = []
        chunk_ids: list[str] = []
        for start in range(0, size // PER_DOCUMENT, BATCH):
            batch = [make_staged(store, number) for number in range(start, start + BATCH)]
            with times.of("stage"):
                store.stage(batch)
            with times.of("publish"):
                published += store.publish([(staged.document, staged.epoch) for staged in batch])
            chunk_ids += [chunk.chunk_id for staged in batch for chunk in staged.chunks]
        for _ in range(REPEATS):
            hits, candidates = dice.sample(chunk_ids, HITS), dice.sample(chunk_ids, CANDIDATES)
            with times.of("read"):
                assert len(store.load(hits)) == HITS
            with times.of("as_of"):
                verdicts = store.verdicts("default", WHO, candidates, len(published) // 2)
            assert set(verdicts.values()) <= {"visible", "not yet"}
            with times.of("search"):
                assert store.matching("default", WHO, Compare("robot", "eq", ("HX-3",)), len(published), 1000)
        remove_documents(store, dice.sample(published, REPEATS), times)
        store.close()
    return times


def remove_documents(store: DocumentStore, documents: Sequence[Document], times: Times) -> None:
    for document in documents:
        with times.of("delete"):
            assert store.delete([document.document_id], WHO)
    later = time.time() + 60
    needless = store.needless(later, later)
    assert len(needless) == len(documents)
    for document in needless:
        with times.of("retire"):
            assert store.retire(document, later, later)
            assert store.purge(document)


def make_staged(store: DocumentStore, number: int) -> Staged:
    """Document `number` with its ten chunks; the same number gives the same one."""
    texts = [make_text(number * PER_DOCUMENT + ordinal) for ordinal in range(PER_DOCUMENT)]
    source = f"{number}.md"
    document = Document(
        document_id_of(WHO.tenant, "default", source), version_of(source, "p", "c", "e"), WHO.tenant, "default", source,
        source, "text/plain", {"robot": ("HX-3", "KM-6", "ZT-1")[number % 3], "year": 2000 + number % 20}, frozenset(),
        sum(map(len, texts)), PER_DOCUMENT,
    )  # fmt: skip
    chunks = chunks_of(document, [Piece(text, tokens=len(text.split())) for text in texts])
    return Staged(document, store.begin(document), chunks, texts, make_vectors(number, PER_DOCUMENT))


def make_text(seed: int) -> str:
    """Sixty words, as unevenly common as words are."""
    ranks = np.random.default_rng(seed).zipf(1.3, 60) % 20_000
    return " ".join(f"w{rank}" for rank in ranks)


def make_vectors(seed: int, count: int) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ── vectors ─────────────────────────────────────────────────────────────────────────────────────


def measure_vectors(kind: str, size: int) -> Times:
    """Fill an index, then ask it and empty it a little."""
    times, rows_per_call = Times(), BATCH * PER_DOCUMENT
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder, open_vectors(kind, Path(folder)) as store:
        full, other, live = (f"nx_bench_{os.getpid()}_{name}" for name in ("full", "other", "live"))
        for index in (full, other):
            store.open_index(index, DIMENSION)
        for start in range(0, size, rows_per_call):
            rows = make_rows(start, rows_per_call)
            with times.of("stage"):
                store.upsert(full, rows)
        store.flush(full)
        ask_vectors(store, (full, other, live), size, Times())  # the first query after a load is another matter
        for seed in range(REPEATS):
            ask_vectors(store, (full, other, live), seed, times)
        assert store.count(full) == size
        for start in range(0, min(size, REPEATS * rows_per_call), rows_per_call):
            with times.of("delete"):
                store.delete(full, [f"c{number}" for number in range(start, start + rows_per_call)])
        store.point_alias(live, other)
        store.drop_index(full)
    return times


def ask_vectors(store: VectorStore, names: tuple[str, str, str], seed: int, times: Times) -> None:
    full, other, live = names
    vector, text, scope = make_vectors(seed, 1)[0], make_text(seed), Scope(WHO.tenant)
    with times.of("publish"):
        store.point_alias(live, other)
        store.point_alias(live, full)
    with times.of("read"):
        store.count(full)
    with times.of("search_dense"):
        assert len(store.search_dense(full, vector, CANDIDATES, scope)) == CANDIDATES
    with times.of("search_text"):
        assert store.search_text(full, text, CANDIDATES, scope)


@contextmanager
def open_vectors(kind: str, folder: Path) -> Iterator[VectorStore]:
    double = MilvusServer(folder) if kind == "milvus_double" else None
    if double is not None:
        store = open_part("stores", f"milvus://127.0.0.1:{double.port}")
    elif kind == "milvus":
        store = open_part("stores", MILVUS)
    else:
        store = open_part("stores", f"{kind.replace('_', '-')}:", home=folder)
    yield store
    store.close()
    if double is not None:
        double.close()


def make_rows(start: int, count: int) -> list[IndexRow]:
    vectors = make_vectors(start, count)
    return [
        IndexRow(f"c{start + n}", f"d{(start + n) // PER_DOCUMENT}", WHO.tenant, make_text(start + n), vectors[n])
        for n in range(count)
    ]


if __name__ == "__main__":
    main()
