"""The command line's client: what it waits for, for how long, and what it says of it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from deployments import client as module
from deployments.cli import app
from deployments.client import LONGEST_PAUSE, MOST_PAUSED, PAUSES, Client
from deployments.gateway import build
from nexus.errors import InvalidRequest, NexusError, NotFound, RateLimited, TimedOut, Unavailable
from tests.conftest import Door
from tests.test_limits import Clock, limited

BUSY, AWAY = 429, 503


def answer(status: int, code: str = "rate_limit_exceeded", retry_after: str | None = "3") -> httpx.Response:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return httpx.Response(status, json={"detail": f"{code} it is", "code": code}, headers=headers)


GOOD = httpx.Response(200, json={"state": "done"})


class Scripted:
    """A client whose server gives these answers in turn, the last one for ever; the pauses it makes, what it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *answers: httpx.Response) -> None:
        monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=self._pause))
        self.answers, self.pauses, self.said, self.asked = list(answers), list[float](), list[str](), 0
        self.client = Client(tell=self.said.append)
        self.client._http.close()
        self.client._http = httpx.Client(transport=httpx.MockTransport(self._answer), base_url="http://nexus")

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


def test_a_429_is_waited_for_and_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nexus = Scripted(monkeypatch, tmp_path, answer(BUSY), answer(BUSY, retry_after="7"), GOOD)
    assert nexus.client.job("0") == {"state": "done"}
    assert (nexus.pauses, nexus.said) == ([3.0, 7.0], ["waiting: rate_limit_exceeded it is"])


def test_a_503_is_waited_for_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    away = [answer(AWAY, "unavailable", seconds) for seconds in (None, "2", "1", "9999", "x")]
    nexus = Scripted(monkeypatch, tmp_path, *away, GOOD)
    assert nexus.client.job("0") == {"state": "done"}
    assert nexus.pauses == [PAUSES[0], 2.0, PAUSES[2], LONGEST_PAUSE, PAUSES[4]]
    assert nexus.said == ["waiting: unavailable it is"]


@pytest.mark.parametrize("seconds", ["1", "7", "119", "121", "86400", None])
def test_a_429_that_persists_is_what_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: str | None
) -> None:
    nexus = Scripted(monkeypatch, tmp_path, answer(BUSY, "too_many_jobs", seconds))
    with pytest.raises(RateLimited, match="too_many_jobs it is"):
        nexus.client.announce([], "default")
    assert sum(nexus.pauses) <= MOST_PAUSED
    assert len(nexus.pauses) == int(MOST_PAUSED // float(seconds or PAUSES[0]))


def test_a_503_that_persists_is_what_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nexus = Scripted(monkeypatch, tmp_path, answer(AWAY, "unavailable", None))
    with pytest.raises(Unavailable):
        nexus.client.send("0", {0: b"x"})
    assert nexus.pauses == list(PAUSES)


def test_what_is_removed_or_listed_waits_its_turn_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = httpx.Response(200, json={"documents": [{"document_id": "d"}], "next": None})
    nexus = Scripted(monkeypatch, tmp_path, answer(BUSY), page)
    assert [one["document_id"] for one in nexus.client.documents()] == ["d"]
    nexus = Scripted(monkeypatch, tmp_path, answer(BUSY), httpx.Response(404, json={"detail": "x", "code": "x"}))
    nexus.client.remove("d")
    assert (nexus.asked, nexus.pauses) == (2, [3.0])


@pytest.mark.parametrize(
    ("status", "kind"), [(429, RateLimited), (503, Unavailable), (504, TimedOut), (422, InvalidRequest)]
)
def test_a_question_is_asked_once_and_its_error_is_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, kind: type[NexusError]
) -> None:
    nexus = Scripted(monkeypatch, tmp_path, answer(status, "x"))
    with pytest.raises(NexusError) as caught:
        nexus.client.call("POST", "/rag/query")
    assert (type(caught.value), caught.value.retry_after, nexus.asked, nexus.pauses) == (kind, 3.0, 1, [])


# `nexus add` against a whole front door


@pytest.fixture
def slow(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The command line asks a Nexus that takes two requests a minute; what it waits passes at once, on this clock."""
    clock = Clock()
    lent = replace(door.lent, config=limited(door, requests_per_minute=2), clock=clock)

    def pause(seconds: float) -> None:
        clock.now += seconds

    with TestClient(build(lent), raise_server_exceptions=False, headers=door.headers()) as client:

        def connect(**_: Any) -> TestClient:
            return client

        monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
        monkeypatch.setattr(module, "httpx", SimpleNamespace(
            Client=connect, TimeoutException=httpx.TimeoutException, HTTPError=httpx.HTTPError, Response=httpx.Response
        ))  # fmt: skip
        monkeypatch.setattr(client, "close", lambda: None)
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pause))
        yield clock


def test_nexus_add_goes_on_at_the_pace_that_its_key_may(
    slow: Clock, tmp_path_factory: pytest.TempPathFactory, door: Door
) -> None:
    folder = tmp_path_factory.mktemp("manuals")
    for n in range(3):
        (folder / f"{n}.md").write_text(f"# Heron {n}\n\nThe heron number {n} lives in Paris.\n")
    done = CliRunner().invoke(app, ["add", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counts"] == {"added": 3}
    assert done.stderr.count("waiting: this key: 2 requests a minute are allowed; try again in 30 s") == 1
    assert slow.now >= 30
    (folder / "0.md").unlink()
    done = CliRunner().invoke(app, ["add", str(folder), "--json", "--prune"])
    assert json.loads(done.stdout)["counts"] == {"unchanged": 2, "removed": 1}


def test_nexus_add_takes_nothing_of_its_own_home(slow: Clock, tmp_path: Path) -> None:
    """It holds the secret that tokens are signed with."""
    (tmp_path / "token-secret").write_text("secret")
    done = CliRunner().invoke(app, ["add", str(tmp_path)])
    assert isinstance(done.exception, NotFound) and "there are no files" in str(done.exception)
