"""What a search costs over its parts: over HTTP, in process, and each part timed alone, in one run.

    python -m tests.bench.query              starts a Nexus of its own over 1,500 abstracts

The parts are measured on the same data: embedding the query, the dense route and the text route over the rows in
memory, and one Serve hop: a bare application beside Nexus, whose ingress asks one deployment (tests/bench/echo.py) as
the gateway asks the retriever. `ingress` is `/livez`, which ends in the gateway. `store` is both routes in the vector
server, which is asked for what memory has no room for. Rounds alternate, so that a busy moment of the machine falls on
all alike.
"""

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median

import httpx

from cluster import bootstrap
from nexus.hades import Hades
from nexus.ports import Scope
from nexus.registry import open_part
from nexus.resident import Resident
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.terms import shadow
from nexus.types import Principal, SearchRequest, Vector
from tests.bench import echo
from tests.bench.corpus import Judged, scifact
from tests.bench.quality import COLLECTION, PACKAGES, ingest
from tests.running import Running, running_nexus

DOCUMENTS = 1500
ROUNDS = 5
QUERIES = 40
CONCURRENT = 8


def open_retriever(nexus: Running) -> Retriever:
    """The same stores and the same model in this process."""
    instance = bootstrap.find_instance(nexus.home)
    assert instance is not None
    embedder = harness.open_embedder()
    documents = open_part("stores", "sqlite:", home=Path(nexus.home))
    vectors = open_part("stores", f"milvus-lite://127.0.0.1:{instance.vectors_port}")
    hades = Hades(documents, vectors, embedder.fingerprint, embedder.dimension)
    resident = Resident(hades, 2**31)
    resident.foresee()
    resident.settle()
    return Retriever(hades, embedder, RetrievalSettings(), resident=resident)


def subjects(http: httpx.Client, retriever: Retriever, hop: str) -> dict[str, Callable[[str], object]]:
    """Everything that is timed, as a function of the query."""
    principal, scope = Principal("default", "bench"), Scope("default")
    collection = retriever.hades.find_collection(COLLECTION, "default")
    vectors, embed = retriever.hades.vectors, retriever.embedder.embed
    assert retriever.resident is not None
    held = retriever.resident.serving(collection, "default")
    assert held is not None
    rows = held.rows

    @cache
    def vector_of(query: str) -> Vector:
        vector: Vector = embed([query])[0]
        return vector

    def store(query: str) -> object:
        found = vectors.search_dense(collection.index, vector_of(query), 100, scope)
        return found, vectors.search_text(collection.index, shadow(query), 100, scope)

    return {
        "http": lambda query: search(http, query),
        "process": lambda query: retriever.search(SearchRequest(query, collection=COLLECTION), principal),
        "embed": lambda query: embed([query]),
        "dense": lambda query: rows.search_dense(vector_of(query), 100, scope),
        "text": lambda query: rows.search_text(shadow(query), 100, scope),
        "store": store,
        "hop": lambda query: http.post(hop, json={"query": query, "collection": COLLECTION}).raise_for_status(),
        "ingress": lambda _: http.get("/livez").raise_for_status(),
    }


def search(http: httpx.Client, query: str) -> None:
    http.post("/rag/search", json={"query": query, "collection": COLLECTION}).raise_for_status()


def time_each(timed: dict[str, Callable[[str], object]], queries: list[str]) -> dict[str, list[float]]:
    """Milliseconds per call, subject by subject within each round, the order rotated."""
    for work in timed.values():
        for query in queries[:5]:
            work(query)
    spent: dict[str, list[float]] = {name: [] for name in timed}
    names = itertools.cycle(timed)
    for _ in range(ROUNDS):
        for _ in timed:
            name = next(names)
            for query in queries:
                if name in ("dense", "store"):
                    timed[name](query)  # the vector is cached now; only the search is timed
                started = time.perf_counter()
                timed[name](query)
                spent[name].append(1000 * (time.perf_counter() - started))
        next(names)
    return spent


def rate(work: Callable[[str], object], queries: list[str]) -> float:
    """Calls per second at the concurrency of the bench."""
    with ThreadPoolExecutor(CONCURRENT) as callers:
        started = time.perf_counter()
        list(callers.map(work, queries))
        return len(queries) / (time.perf_counter() - started)


def main() -> None:
    whole = scifact()
    kept = dict(itertools.islice(whole.documents.items(), DOCUMENTS))
    with running_nexus() as nexus, nexus.http() as http:
        ingest(http, Judged(kept, {}, {}))
        retriever = open_retriever(nexus)
        queries = list(whole.queries.values())[:QUERIES]
        timed = subjects(http, retriever, echo.start_beside(nexus))
        spent = time_each(timed, queries)
        many = queries * 5
        rates = [tuple(rate(timed[name], many) for name in ("http", "process", "hop")) for _ in range(3)]
        assert retriever.resident is not None
        retriever.resident.close()
        retriever.close()
    p50 = {name: median(values) for name, values in spent.items()}
    parts = p50["embed"] + p50["dense"] + p50["text"] + p50["hop"]
    rows = [(name, p50[name], harness.percentile(values, 0.95)) for name, values in spent.items()]
    harness.print_table(["part", "p50 ms", "p95 ms"], [*rows, ("parts in all", parts, 0.0)])
    http_rate, process_rate, hop_rate = (median(values) for values in zip(*rates, strict=True))
    figures = {
        "p50_ms": p50["http"],
        "p95_ms": harness.percentile(spent["http"], 0.95),
        "p50_over_parts": p50["http"] / parts,
        "p50_http_over_process": p50["http"] / p50["process"],
        "p50_ms_of_a_hop": p50["hop"],
        "p50_over_parts_and_ingress": p50["http"] / (parts - p50["hop"] + p50["ingress"]),
        "p50_store_over_rows": p50["store"] / (p50["dense"] + p50["text"]),
        "qps8": http_rate,
        "qps8_over_process": http_rate / process_rate,
        "qps8_over_hop": http_rate / hop_rate,
        "qps8_over_limit": http_rate / (2 * 1000 / (p50["embed"] + p50["dense"] + p50["text"])),
    }
    harness.print_result("query", figures, PACKAGES)


if __name__ == "__main__":
    main()
