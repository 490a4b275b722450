"""Failpoints: what they may be told, and that they do it, and nothing without being told."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nexus import failpoints
from nexus.config import load_config
from nexus.errors import ConfigError, NexusError
from nexus.failpoints import POINTS, FailpointReached, parse_failpoints, pass_through

POINT = "ingest.after_stage"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had just begun; afterwards, as it was."""
    monkeypatch.setattr(failpoints, "_active", None)
    monkeypatch.delenv("NEXUS_FAILPOINT", raising=False)
    monkeypatch.setenv("NEXUS_TESTING", "1")


def passes(point: str, times: int) -> list[int]:
    """Which of so many passes raised, counted from 1."""
    raised = []
    for number in range(1, times + 1):
        try:
            pass_through(point)
        except FailpointReached:
            raised.append(number)
    return raised


@pytest.mark.parametrize(
    "text",
    [
        "nonsense", f"{POINT}", f"{POINT}:", f"{POINT}:explode", f"{POINT}:kill@0", f"{POINT}:kill@-1",
        f"{POINT}:kill@",
        f"{POINT}:sleep", f"{POINT}:sleep:", f"{POINT}:sleep:long", f"{POINT}:sleep:-1", f"{POINT}:raise:2",
        f"{POINT}:raise,nonsense", "ingest.nowhere:kill", "kill",
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NEXUS_FAILPOINT"):
        parse_failpoints({"NEXUS_FAILPOINT": text, "NEXUS_TESTING": "1"})


def test_an_unknown_point_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"ingest\.between_stores"):
        parse_failpoints({"NEXUS_FAILPOINT": "ingest.nowhere:kill", "NEXUS_TESTING": "1"})


@pytest.mark.parametrize("text", ["", "  ", ","])
def test_nothing_asked_for_is_nothing(text: str) -> None:
    assert parse_failpoints({"NEXUS_FAILPOINT": text}) == {} == parse_failpoints({})


def test_several_are_separated_by_commas() -> None:
    found = parse_failpoints(
        {"NEXUS_FAILPOINT": f"{POINT}:kill@3, ingest.before_parse:sleep:0.5@2,ingest.inside_publish:raise",
         "NEXUS_TESTING": "1"}
    )  # fmt: skip
    assert {point: (one.action, one.seconds, one.nth) for point, one in found.items()} == {
        POINT: ("kill", 0, 3), "ingest.before_parse": ("sleep", 0.5, 2), "ingest.inside_publish": ("raise", 0, None)
    }  # fmt: skip


@pytest.mark.parametrize("testing", [None, "", "0", "yes"])
def test_without_testing_nexus_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, testing: str | None
) -> None:
    environment = {"NEXUS_FAILPOINT": f"{POINT}:raise", "NEXUS_HOME": str(tmp_path)}
    if testing is None:
        monkeypatch.delenv("NEXUS_TESTING")
    else:
        environment["NEXUS_TESTING"] = testing
        monkeypatch.setenv("NEXUS_TESTING", testing)
    with pytest.raises(ConfigError, match="NEXUS_TESTING=1"):
        load_config(environment=environment)
    monkeypatch.setenv("NEXUS_FAILPOINT", f"{POINT}:raise")
    with pytest.raises(ConfigError, match="NEXUS_TESTING=1"):
        pass_through(POINT)


def test_with_testing_it_does_and_the_points_are_checked(tmp_path: Path) -> None:
    environment = {"NEXUS_HOME": str(tmp_path), "NEXUS_TESTING": "1"}
    load_config(environment={**environment, "NEXUS_FAILPOINT": f"{POINT}:raise"})
    with pytest.raises(ConfigError, match="no point"):
        load_config(environment={**environment, "NEXUS_FAILPOINT": "ingest.nowhere:raise"})


def test_nothing_happens_where_nothing_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes(POINT, 3) == []
    monkeypatch.setattr(failpoints, "_active", None)
    monkeypatch.setenv("NEXUS_FAILPOINT", f"{POINT}:raise")
    assert [point for point in sorted(POINTS) if passes(point, 1)] == [POINT]


def test_raising_at_every_pass_or_at_the_nth_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_FAILPOINT", f"{POINT}:raise@3,ingest.before_stage:raise")
    assert passes(POINT, 5) == [3]
    assert passes("ingest.before_stage", 3) == [1, 2, 3]


def test_what_is_raised_stands_for_a_bug() -> None:
    assert not issubclass(FailpointReached, NexusError)


def test_sleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(failpoints.time, "sleep", slept.append)
    monkeypatch.setenv("NEXUS_FAILPOINT", f"{POINT}:sleep:1.5@2")
    assert passes(POINT, 3) == []
    assert slept == [1.5]


def test_killing(tmp_path: Path) -> None:
    """The process is gone at once, at the second pass: nothing is flushed or cleaned up."""
    script = (
        "from nexus.failpoints import pass_through\n"
        "try:\n"
        "    for number in range(5):\n"
        f"        pass_through({POINT!r})\n"
        "        print(number, flush=True)\n"
        "finally:\n"
        "    print('cleaned up', flush=True)\n"
    )
    environment = {**os.environ, "NEXUS_FAILPOINT": f"{POINT}:kill@2", "NEXUS_TESTING": "1"}
    child = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=Path(failpoints.__file__).parents[1],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (child.returncode, child.stdout) == (-signal.SIGKILL, "0\n")
