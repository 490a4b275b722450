"""The dashboard and the alerts: as their builder writes them, of metrics that there are, in PromQL that can be read."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.inventory import Gpu, Inventory
from deployments.grafana import dashboard
from nexus import telemetry
from tests.conftest import Door
from tests.test_status import GIB, SEEN, Observer, opened

FOLDER = Path(dashboard.__file__).parent
OF_PROMETHEUS = {"up": {"job", "instance"}}  # what it makes itself of each scrape
ALERTS = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]


def expressions() -> Iterator[tuple[str, str]]:
    """Where each stands, and what it is."""
    for panel in dashboard.build()["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']!r}", target["expr"].replace(dashboard.EVERY, "5m")
    for rule in ALERTS:
        yield f"alert {rule['alert']}", rule["expr"]


EXPRESSIONS = list(expressions())


@pytest.fixture(scope="module")
def told(shared_door: Door) -> Mapping[str, set[str]]:
    """The labels of each sample that a front door of a cluster tells of, by name."""
    observer = Observer()
    gpu = Gpu(0, "H100", 80 * GIB, busy=0.5)
    observer.says["inventory"] = Inventory((replace(SEEN["sark"], gpus=(gpu,)),))
    with opened(shared_door, observer) as client:
        text = client.get("/metrics").raise_for_status().text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        names = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",)}.get(family.type, ("",))
        own = telemetry.STATES.get(family.name, ("", ()))[1] or labels_of(family.name)
        for name in names:
            found[family.name + name] = {*own, *(["le"] if name == "_bucket" else [])}
    return found


def labels_of(family: str) -> tuple[str, ...]:
    collectors = telemetry._registry._names_to_collectors
    return tuple(getattr(collectors.get(family), "_labelnames", ()))


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric in an expression, and the labels that it is selected by."""
    found: list[tuple[str, set[str]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(expression), visit)
    yield from found


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_each_expression_is_promql_over_metrics_and_labels_that_there_are(
    told: Mapping[str, set[str]], where: str, expression: str
) -> None:
    there = {**told, **OF_PROMETHEUS}
    found = list(selectors(expression))
    assert found, f"{where} asks for nothing"
    for name, labels in found:
        assert name in there, f"{where} asks for {name}, which nobody tells"
        assert labels <= there[name], f"{where} selects {name} by {labels - there[name]}"


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_what_is_grouped_by_is_a_label_of_what_is_grouped(
    told: Mapping[str, set[str]], where: str, expression: str
) -> None:
    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            (name, _), *_ = selectors(str(node.expr.prettify()))
            assert set(node.modifier.labels) <= told[name], f"{where}: {node.modifier.labels} of {name}"

    promql_parser.walk(promql_parser.parse(expression), visit)


def test_the_dashboard_that_is_committed_is_the_one_that_is_built() -> None:
    assert dashboard.FILE.read_text() == dashboard.text(), "python -m deployments.grafana.dashboard writes it anew"


def test_panels_do_not_cover_each_other() -> None:
    covered: set[tuple[int, int]] = set()
    panels = dashboard.build()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & covered and max(x for x, _ in cells) < 24, panel["title"]
        covered |= cells


def test_every_metric_that_nexus_has_is_on_the_dashboard(told: Mapping[str, set[str]]) -> None:
    shown = {name for _, expression in EXPRESSIONS for name, _ in selectors(expression)}
    families = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in shown}
    ours = {name for name in told if not name.endswith("_created")}
    missing = {name for name in ours if not any(name.startswith(family) for family in families)}
    assert not missing


def test_there_are_six_alerts_and_each_says_what_to_do() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS) == 6
    for rule in ALERTS:
        assert rule["for"] and rule["labels"]["severity"] in ("critical", "warning")
        assert "`" in rule["annotations"]["description"], "a command or an address to look at"


def test_provisioning_names_what_is_there() -> None:
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["uid"], source["type"]) == (dashboard.DATASOURCE["uid"], "prometheus")
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/nexus.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    assert yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["rule_files"] == ["alerts.yaml"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (Debian: prometheus)")
@pytest.mark.parametrize("arguments", [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts.test.yaml")])
def test_promtool_finds_the_alerts_silent_when_all_is_well_and_loud_when_it_is_not(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
