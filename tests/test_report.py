"""`GET /report`: response time, errors, GPUs and memory of a stated window, and what is not known told as such."""

import asyncio
from collections import Counter as Statuses
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from cluster.inventory import Gpu, Inventory
from deployments.history import History, Sums, sums_of
from nexus import telemetry
from tests.conftest import Door
from tests.test_gateway import add, check_problem
from tests.test_status import GIB, SEEN, Observer, opened


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counted:
    """Requests as the front door counts them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("http_requests_total", "", ["route", "status"], registry=self.registry)
        name = "http_response_duration_seconds"
        self.response = Histogram(name, "", ["route"], buckets=telemetry.SECONDS, registry=self.registry)

    def count(self, status: str, seconds: float, route: str = "rag", times: int = 1) -> None:
        for _ in range(times):
            self.requests.labels(route, status).inc()
            self.response.labels(route).observe(seconds)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counted = Counted()
    monkeypatch.setattr(telemetry, "families", lambda: list(counted.registry.collect()))
    yield counted


def test_a_window_holds_what_came_within_it_and_says_how_long_it_is(counted: Counted) -> None:
    clock = Clock()
    history = History(clock)

    async def main() -> None:
        counted.count("200", 0.2, times=7)
        await history.look()
        for minute in range(1, 11):
            clock.now = 1000.0 + 60 * minute
            counted.count("200", 0.2)
            counted.count("503", 0.2)
            await history.look()
        for seconds, minutes in ((300, 5), (60, 1), (599, 10), (3600, 10)):
            sums, window = await history.last(seconds)
            assert (sums.requests, sums.errors, window) == (2 * minutes, minutes, 60 * minutes), seconds
            assert sums.seconds == pytest.approx(0.4 * minutes)
        clock.now += 7200
        sums, window = await history.last(300)
        assert (sums.requests, window) == (0, 7200), "nobody looked for two hours, and none of that is made up"

    asyncio.run(main())


def test_probes_are_no_requests_and_who_left_is_no_error(counted: Counted) -> None:
    counted.count("200", 0.001, "livez", 50)
    counted.count("503", 0.001, "readyz", 50)
    counted.count("200", 0.001, "metrics", 50)
    counted.count("left", 2.0)
    counted.count("500", 1.0)
    sums = sums_of(counted.registry.collect(), 0.0)
    assert (sums.requests, sums.errors, sums.seconds) == (2, 1, 3.0)


@pytest.mark.parametrize(
    ("within", "share", "seconds"),
    [({0.1: 50, 0.25: 100, inf: 100}, 0.5, 0.1), ({0.1: 50, 0.25: 100, inf: 100}, 0.75, 0.175),
     ({0.1: 100, 0.25: 100, inf: 100}, 0.95, 0.095), ({0.1: 0, 0.25: 0, inf: 4}, 0.5, None), ({inf: 0}, 0.5, None),
     ({}, 0.5, None)],
)  # fmt: skip
def test_a_quantile_is_that_of_prometheus(within: dict[float, float], share: float, seconds: float | None) -> None:
    found = Sums(0.0, Statuses(), 0.0, within).quantile(share)
    assert found == (None if seconds is None else pytest.approx(seconds))


def read(client: Any, path: str = "/report") -> dict[str, Any]:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_a_report_tells_times_errors_gpus_and_memory(door: Door) -> None:
    observer = Observer()
    gpus = (Gpu(0, "H100", 80 * GIB, used=9 * GIB, busy=0.25), Gpu(1, "H100", 80 * GIB, used=GIB))
    observer.says["inventory"] = Inventory((replace(SEEN["sark"], gpus=gpus), SEEN["witness"]))
    add(door, headers=door.headers())
    with opened(door, observer) as client:
        read(client)
        for _ in range(9):
            assert client.post("/rag/search", json={"query": "torque"}).status_code == 200
        assert client.post("/v1/chat/completions", json={}).status_code == 400
        report = read(client)
        before = read(client, "/report?window=10")
    assert report["response_time"]["requests"] == report["error_rate"]["requests"] >= 10
    assert report["error_rate"]["rate"] == 0 and report["error_rate"]["errors"] == 0
    times = report["response_time"]
    assert 0 < times["p50_seconds"] <= times["p95_seconds"] and times["mean_seconds"] > 0
    assert 0 < report["window_seconds"] <= 60 and before["window_seconds"] <= 60
    assert report["gpu_usage"] == [
        {"node": "sark", "gpu": 0, "busy": 0.25, "used_bytes": 9 * GIB, "memory_bytes": 80 * GIB},
        {"node": "sark", "gpu": 1, "busy": None, "used_bytes": GIB, "memory_bytes": 80 * GIB},
    ]
    assert report["memory_usage"] == [
        {"node": "sark", "used_bytes": GIB, "total_bytes": 64 * GIB},
        {"node": "witness", "used_bytes": GIB, "total_bytes": 4 * GIB},
    ]
    assert report["unknown"] == {"machines.clu": "it does not answer", "gpu_usage.sark.1.busy": "this GPU does not say"}


def test_what_is_not_known_is_null_and_says_why(counted: Counted, door: Door) -> None:
    door.client.headers.update(door.headers())
    report = read(door.client)
    assert report["response_time"] is report["error_rate"] is report["gpu_usage"] is None
    assert report["unknown"]["response_time"] == report["unknown"]["error_rate"] and "nobody" in str(report)
    assert set(report["unknown"]) == {"response_time", "error_rate", "gpu_usage"}
    counted.count("200", 75.0, times=3)
    report = read(door.client)
    assert report["response_time"]["mean_seconds"] == 75 and report["response_time"]["p95_seconds"] is None
    assert "longest" in report["unknown"]["response_time.p95_seconds"]


def test_a_window_is_ten_seconds_to_an_hour(door: Door) -> None:
    headers = door.headers()
    for window in ("9", "3601", "x", "-1"):
        check_problem(door.client.get(f"/report?window={window}", headers=headers), 422, "/report")
