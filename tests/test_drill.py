"""What a drill measures, and whom it lets be broken."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deployments.drill import Beat, Fault, Outcome, faults, longest_gap, missing, show, table
from nexus.config import Config
from nexus.errors import InvalidRequest
from tests.running import ROOT, until

NODE = {"address": "10.0.0.1", "cpus": 1, "memory": "1GiB"}


@pytest.fixture
def config(tmp_path: Any) -> Config:
    nodes = {name: NODE for name in ("sark", "clu", "witness")}
    return Config(home=tmp_path, ray={"head": "witness"}, nodes=nodes)


def test_every_fault_there_is_or_those_named(config: Config) -> None:
    every = ["link:sark", "link:clu", "raylet:sark", "raylet:clu", "state:witness"]
    assert [str(fault) for fault in faults(config, [])] == every
    assert faults(config, ["raylet:clu"]) == [Fault("raylet", "clu")]
    with pytest.raises(InvalidRequest, match=r"'link:witness'.*link:sark"):  # on it the load would go with the link
        faults(config, ["link:witness"])


def beat(ended: float, kind: Any = "answer", is_done: bool = True) -> Beat:
    return Beat(kind, ended - 1, ended, is_done)


def test_the_longest_silence_counts_what_was_answered_well_alone() -> None:
    beats = [beat(1), beat(3), beat(4, is_done=False), beat(5, "document"), beat(8), beat(9)]
    assert longest_gap(beats, "answer", 2, 10) == 5
    assert longest_gap(beats, "answer", 8.5, 12) == 3, "until the end"
    assert longest_gap([], "answer", 0, 7) == 7


def test_whatever_is_not_as_it_should_be_is_named() -> None:
    nodes = [{"name": "sark", "alive": True}, {"name": "clu", "alive": True}]
    well, ill = {"name": "retriever", "status": "HEALTHY"}, {"name": "embedder@sark", "status": "UPDATING"}
    assert missing({"nodes": nodes, "deployments": [well]}) == []
    assert missing({"nodes": [*nodes, {"name": "witness", "alive": False}], "deployments": [well, ill]}) == [
        "witness does not answer", "embedder@sark is updating",
    ]  # fmt: skip
    (sentence,) = missing({"nodes": None, "deployments": [well], "unknown": {"nodes": "Ray does not answer"}})
    assert "Ray does not answer" in sentence
    assert missing({})


def test_an_outcome_is_shown_with_what_was_lost() -> None:
    outcome = Outcome("link:sark", 1.25, 42.0, Counter(answer=7), Counter(document=2), 1)
    head, row = table([outcome]).splitlines()
    assert head.split("  ")[0] == "fault" and "lost" in head
    assert row.split() == ["link:sark", "1.2", "s", "42", "s", "7", "answer", "2", "document", "1"]
    assert show(outcome)["lost"] == 1 and show(outcome)["done"] == {"answer": 7}


def test_what_was_set_off_happens_though_ray_ends_the_worker_and_its_children(tmp_path: Path) -> None:
    """Else a link that was cut would not be healed any more (RAY_kill_child_processes_on_worker_exit)."""
    mark = tmp_path / "done"
    worker = f"""
import psutil
from deployments.drill import set_off
set_off("touch {mark}")
for child in psutil.Process().children():
    child.kill()
"""
    subprocess.run([sys.executable, "-c", worker], cwd=ROOT, check=True)
    until(60, mark.exists)
