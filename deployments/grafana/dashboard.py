"""The dashboard of Nexus, from which `python -m deployments.grafana.dashboard` writes `nexus.json`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "nexus.json"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH, HEIGHT = 8, 8  # of a panel; a row has 24
EVERY = "$__rate_interval"  # Grafana's own: as long as rates need


@dataclass(frozen=True)
class Panel:
    """A graph: what it shows, in Grafana's name of a unit, and each query with the name of its lines."""

    title: str
    unit: str
    queries: Mapping[str, str]
    help: str = ""


def rate(metric: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}[{EVERY}]))" if by else f"sum(rate({metric}[{EVERY}]))"


def quantile(share: float, metric: str, *by: str) -> str:
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'le', *by)})"


ROWS: Mapping[str, Sequence[Panel]] = {
    "Requests": (
        Panel("Requests by status", "reqps", {"{{status}}": rate("http_requests_total", "status")}),
        Panel(
            "Errors of ours", "percentunit",
            {"5xx": f'sum(rate(http_requests_total{{status=~"5.."}}[{EVERY}])) / {rate("http_requests_total")}'},
            "Of all requests, those that were answered with 500 and more.",
        ),
        Panel(
            "Time to answer, by what was asked", "s",
            {"p95 {{route}}": quantile(0.95, "http_response_duration_seconds", "route")},
        ),
        Panel("Refused", "reqps", {"{{reason}}": rate("requests_refused_total", "reason")}, "Quota, or no place."),
        Panel(
            "What content rules found", "ops", {"{{rule}} {{action}}": rate("content_verdicts_total", "rule", "action")}
        ),
    ),
    "Answers": (
        Panel("Searches and questions", "reqps", {"{{query_type}}": rate("rag_queries_total", "query_type")}),
        Panel(
            "Time to the whole answer", "s",
            {
                "p50 {{query_type}}": quantile(0.5, "rag_response_duration_seconds", "query_type"),
                "p95 {{query_type}}": quantile(0.95, "rag_response_duration_seconds", "query_type"),
            },
        ),
        Panel(
            "Time to the first words", "s",
            {name: quantile(share, "rag_time_to_first_token_seconds") for name, share in (("p50", 0.5), ("p95", 0.95))},
        ),
        Panel("Stages", "s", {"p95 {{stage}}": quantile(0.95, "rag_stage_duration_seconds", "stage")}),
        Panel("Without the reranker", "ops", {"{{reason}}": rate("rag_rerank_fallbacks_total", "reason")}),
        Panel(
            "Inferences on Triton", "ops",
            {
                "{{model_name}}": rate("nims_inferences_total", "model_name"),
                "p95 seconds {{model_name}}": quantile(0.95, "nims_inference_duration_seconds", "model_name"),
            },
        ),
    ),
    "Documents": (
        Panel("Documents", "ops", {"{{outcome}}": rate("ingest_documents_total", "outcome")}),
        Panel("Chunks", "ops", {"published": rate("ingest_chunks_total")}),
        Panel("Waited for answers", "percentunit", {"of a second": rate("ingest_yielded_seconds_total")}),
    ),
    "Blocks and files": (
        Panel("Shared", "ops", {"{{node_id}} {{data_type}}": rate("mcp_data_shared_total", "node_id", "data_type")}),
        Panel("Until copied", "s", {"p95 {{node_id}}": quantile(0.95, "mcp_replication_duration_seconds", "node_id")}),
        Panel(
            "Damaged copies", "ops",
            {
                "refused {{reason}}": rate("share_blocks_refused_total", "reason"),
                "repaired": rate("share_blocks_repaired_total"),
            },
        ),
        Panel("Strangers at stewards", "ops", {"refused {{reason}}": rate("share_callers_refused_total", "reason")}),
        Panel(
            "Policies", "ops",
            {"{{policy_name}} {{result}}": rate("policy_evaluations_total", "policy_name", "result")},
        ),
        Panel(
            "Files moved", "ops",
            {"{{source}} to {{target}}: {{status}}": rate("data_movements_total", "source", "target", "status")},
        ),
    ),
    "Machines": (
        Panel("Machines that answer", "short", {"{{node}}": "nexus_node_up"}),
        Panel(
            "Voters", "short",
            {"{{kind}}": "coordinator_voters", "quorum": "coordinator_has_quorum", "lag": "coordinator_lag_entries"},
        ),
        Panel("Disk free", "bytes", {"{{node}}": 'nexus_disk_bytes{kind="free"}'}),
        Panel("Memory used", "bytes", {"{{node}}": 'nexus_memory_bytes{kind="used"}'}),
        Panel("GPU memory", "bytes", {"{{node}} {{gpu}} {{kind}}": "gpu_memory_bytes"}),
        Panel("GPUs at work", "percentunit", {"{{node}} {{gpu}}": "gpu_utilization_ratio"}),
    ),
}  # fmt: skip


def build() -> dict[str, Any]:
    """Grafana's JSON model of it."""
    return {
        "uid": "nexus",
        "title": "Nexus",
        "tags": ["nexus"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": []},
        "annotations": {"list": []},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, below = 0, 0
    for title, panels in ROWS.items():
        number += 1
        place = {"x": 0, "y": below, "w": 24, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        below += 1
        for index, panel in enumerate(panels):
            number += 1
            across, down = index % (24 // WIDTH), index // (24 // WIDTH)
            place = {"x": across * WIDTH, "y": below + down * HEIGHT, "w": WIDTH, "h": HEIGHT}
            yield _panel(number, panel, place)
        below += HEIGHT * -(-len(panels) // (24 // WIDTH))


def _panel(number: int, panel: Panel, place: Mapping[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend}
        for index, (legend, expression) in enumerate(panel.queries.items())
    ]
    return {
        "id": number, "type": "timeseries", "title": panel.title, "description": panel.help, "datasource": DATASOURCE,
        "gridPos": place, "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }  # fmt: skip


def text() -> str:
    """As it is committed."""
    return json.dumps(build(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
