"""Counts and durations under the names that operators know, exact across processes and machines.

With NEXUS_COUNTS set, as `nexus up` does, each process adds to files of its own that outlive it
(counts.py), and `exposition` sums over all of them: a killed replica takes no counts with it. What is no sum but a
state (bytes free, machines there) is not kept: whoever is asked for metrics looks, and hands it in.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nexus import counts
from nexus.config import COUNTS
from nexus.counts import Counts, Reading

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

FOLDER = Path(os.environ[COUNTS]) if COUNTS in os.environ else None

if FOLDER is not None:
    counts.count_in(FOLDER)
_registry = CollectorRegistry()


def _counter(name: str, help: str, labels: Iterable[str] = ()) -> Counter:
    return Counter(name, help, tuple(labels), registry=_registry)


def _histogram(name: str, help: str, labels: Iterable[str] = ()) -> Histogram:
    return Histogram(name, help, tuple(labels), registry=_registry, buckets=SECONDS)


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
callers_refused = _counter(
    "share_callers_refused_total",
    "Who asked a steward and did not prove to be a member, or repeated a call.",
    ["reason"],
)
policy_evaluations = _counter(
    "policy_evaluations_total", "Policies evaluated, and how that ended.", ["policy_name", "result"]
)
data_movements = _counter(
    "data_movements_total", "Files moved and copied between tiers, by policies.", ["source", "target", "status"]
)
http_requests = _counter("http_requests_total", "Requests answered, by route and status.", ["route", "status"])
http_response = _histogram("http_response_duration_seconds", "From request to the end of its answer.", ["route"])

STATES = {
    "gpu_memory_bytes": ("Of each GPU: total, planned, or taken by others.", ("node", "gpu", "kind")),
    "gpu_utilization_ratio": ("Of the last moment, that a GPU computed.", ("node", "gpu")),
    "nexus_node_up": ("Whether a machine told what it counted; else its last counts stand.", ("node",)),
    "nexus_disk_bytes": ("Of the disk that holds a machine's home: total, or free.", ("node", "kind")),
    "nexus_memory_bytes": ("Of a machine: total, or used by whatever runs there.", ("node", "kind")),
    "coordinator_voters": ("Voters that have a vote, and those of them that answer.", ("kind",)),
    "coordinator_has_quorum": ("Whether a voter leads and enough follow.", ()),
    "coordinator_lag_entries": ("What the slowest voter that answers lacks of the log.", ()),
}


def count_document(outcome: str, chunks: int = 0) -> None:
    """A document has ended its ingestion; `chunks` of it were published."""
    ingest_documents.labels(outcome).inc()
    ingest_chunks.inc(chunks)


class States:
    """What is so at this moment, by the names in STATES."""

    def __init__(self) -> None:
        self.families = {name: GaugeMetricFamily(name, help, labels=labels) for name, (help, labels) in STATES.items()}

    def set(self, name: str, value: float, *labels: str) -> None:
        self.families[name].add_metric(labels, value)


def counted() -> Reading | None:
    """What the processes of this machine have counted; None where each counts for itself."""
    return None if FOLDER is None else counts.read(FOLDER)


def families(*elsewhere: Counts) -> Sequence[Metric]:
    """All that was counted, on this machine and elsewhere."""
    here = counted()
    return list(_registry.collect()) if here is None else counts.families(counts.add(here.counts, *elsewhere))


def exposition(counted: Iterable[Metric] | None = None, states: States | None = None) -> bytes:
    """Metrics in Prometheus' text format: those of this machine, unless others are given, and what is so now."""
    told = [*(families() if counted is None else counted)]
    told += [] if states is None else [family for family in states.families.values() if family.samples]
    registry = CollectorRegistry()
    registry.register(_Told(told))
    return generate_latest(registry)


@dataclass(frozen=True, eq=False)
class _Told(Collector):
    told: Sequence[Metric]

    def collect(self) -> Sequence[Metric]:
        return self.told
