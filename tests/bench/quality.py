"""nDCG@10 on scifact's test claims over HTTP: hybrid, text alone, dense alone.

python -m tests.bench.quality            starts a Nexus of its own, takes some minutes
python -m tests.bench.quality --limit 50 only so many claims
python -m tests.bench.quality --precision int8   the embedder at this precision, not at the one chosen here
"""

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import httpx

from tests.bench.corpus import Judged, ndcg, scifact
from tests.running import running_nexus

COLLECTION = "scifact"
SENDERS = 4
DEPTH = 100  # chunks asked for, so that ten different documents are among them
PACKAGES = ("ray", "milvus-lite", "pymilvus", "torch", "sentence-transformers")
WAYS = {"hybrid": None, "text": (0.0, 1.0), "dense": (1.0, 0.0)}


def ingest(http: httpx.Client, judged: Judged) -> dict[str, str]:
    """Send every abstract as a text file; returns the server's document id -> the collection's."""

    def send(item: tuple[int, tuple[str, str]]) -> tuple[str, str]:
        number, (document, text) = item
        body = {"filename": f"{number:06}.txt", "content": text, "collection": COLLECTION}
        answer = http.post("/rag/add_document", json=body).raise_for_status()
        return answer.json()["document_id"], document

    with ThreadPoolExecutor(SENDERS) as senders:
        return dict(senders.map(send, enumerate(judged.documents.items())))


def rank(http: httpx.Client, query: str, weights: tuple[float, float] | None, ids: dict[str, str]) -> list[str]:
    """Different documents of the hits, best first."""
    body: dict[str, object] = {"query": query, "k": DEPTH, "collection": COLLECTION}
    if weights is not None:
        body["hybrid"] = {"embedding_weight": weights[0], "text_weight": weights[1]}
    hits = http.post("/rag/search", json=body).raise_for_status().json()["hits"]
    return list(dict.fromkeys(ids[hit["document_id"]] for hit in hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="only so many claims")
    parser.add_argument("--precision", default="auto", help="of the embedder: auto, bf16, int8 or fp32")
    given = parser.parse_args()
    limit, judged = given.limit, scifact()
    with running_nexus(NEXUS_MODELS__PRECISION=given.precision) as nexus, nexus.http() as http:
        started = time.perf_counter()
        ids = ingest(http, judged)
        seconds = time.perf_counter() - started
        figures = {}
        for way, weights in WAYS.items():
            queries = list(judged.queries.items())[:limit]
            scores = [ndcg(rank(http, text, weights, ids), judged.gains[query]) for query, text in queries]
            figures[f"ndcg_{way}"] = round(mean(scores), 4)
    figures["ingest_documents_per_second"] = round(len(ids) / seconds, 1)
    harness.print_table(["figure", "value"], list(figures.items()))
    harness.print_result("quality", figures, PACKAGES)


if __name__ == "__main__":
    main()
