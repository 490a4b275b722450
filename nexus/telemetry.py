"""Counts and durations under the names that operators know, exact across processes.

With PROMETHEUS_MULTIPROC_DIR set, as `nexus up` does, each process adds to files of its own that
outlive it, and `exposition` sums over all of them: a killed replica takes no counts with it.
"""

import os
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_registry = CollectorRegistry()


def _counter(name: str, help: str, labels: Iterable[str] = ()) -> Counter:
    return Counter(name, help, tuple(labels), registry=_registry)


def _histogram(name: str, help: str, labels: Iterable[str] = ()) -> Histogram:
    return Histogram(name, help, tuple(labels), registry=_registry, buckets=SECONDS)


def _gauge(name: str, help: str, labels: Iterable[str] = ()) -> Gauge:
    """Of several processes, the one that set it last is right."""
    return Gauge(name, help, tuple(labels), registry=_registry, multiprocess_mode="mostrecent")


rag_queries = _counter("rag_queries_total", "Searches and questions answered.", ["query_type"])
rag_response = _histogram("rag_response_duration_seconds", "From request to full answer.", ["query_type"])
rag_stage = _histogram("rag_stage_duration_seconds", "One stage of a search or an answer.", ["stage"])
rag_first_token = _histogram("rag_time_to_first_token_seconds", "From request to the first piece of an answer.")
rerank_fallbacks = _counter(
    "rag_rerank_fallbacks_total", "Searches that kept their order because the reranker failed or rests.", ["reason"]
)
ingest_documents = _counter("ingest_documents_total", "Documents that ended their ingestion.", ["outcome"])
ingest_chunks = _counter("ingest_chunks_total", "Chunks published.")
ingest_yielded = _counter("ingest_yielded_seconds_total", "Seconds that batches waited so that answers came sooner.")
nims_inferences = _counter("nims_inferences_total", "Inferences that Triton servers answered.", ["model_name"])
nims_inference = _histogram("nims_inference_duration_seconds", "From tensors in to tensors out.", ["model_name"])
requests_refused = _counter(
    "requests_refused_total", "Requests that were more than their caller's quota, or than fits in.", ["reason"]
)
content_verdicts = _counter(
    "content_verdicts_total", "Texts in which a rule on content, the guard or the filter found something.",
    ["where", "rule", "action"],
)  # fmt: skip
data_shared = _counter("mcp_data_shared_total", "Blocks that were shared and acknowledged.", ["node_id", "data_type"])
replication = _histogram(
    "mcp_replication_duration_seconds", "From a block on its steward's disk to verified copies on others.", ["node_id"]
)
blocks_refused = _counter(
    "share_blocks_refused_total", "Copies that were missing, damaged or not what they should be.", ["node_id", "reason"]
)
blocks_repaired = _counter("share_blocks_repaired_total", "Such copies that were replaced by good ones.", ["node_id"])
policy_evaluations = _counter(
    "policy_evaluations_total", "Policies evaluated, and how that ended.", ["policy_name", "result"]
)
data_movements = _counter(
    "data_movements_total", "Files moved and copied between tiers, by policies.", ["source", "target", "status"]
)
gpu_memory = _gauge(
    "gpu_memory_bytes", "Of each GPU: total, planned, or taken by others, as of the last look.", ["node", "gpu", "kind"]
)


def count_document(outcome: str, chunks: int = 0) -> None:
    """A document has ended its ingestion; `chunks` of it were published."""
    ingest_documents.labels(outcome).inc()
    ingest_chunks.inc(chunks)


def exposition() -> bytes:
    """All metrics in Prometheus' text format, summed over the processes of this machine."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(_registry)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
