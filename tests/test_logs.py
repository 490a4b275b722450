"""What is logged: one JSON object a line whatever it holds, with the request it is about, in one file for all."""

import asyncio
import json
import logging
import multiprocessing
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from actors import hops
from nexus import logs
from nexus.background import begin_in_background
from nexus.tracing import carried
from tests.conftest import Door

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `ray.serve` uses what pydantic will remove
    from deployments.remote import Remote

log = logging.getLogger("nexus.test")
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    """Logging as a process of Nexus does; called, every line so far."""
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    root.handlers = []
    logs.begin("gateway", tmp_path, "a")
    yield lambda: read(tmp_path / logs.FILE)
    root.handlers = before
    logging.getLogger("nexus").setLevel(logging.NOTSET)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_says_when_how_grave_what_where_and_by_whom(lines: Lines) -> None:
    log.warning("%s is away", "a store", extra={"seconds": 1.5})
    (line,) = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("timestamp"))
    assert line.pop("process") > 0 and line.pop("version")
    assert line == {
        "event": "a store is away", "level": "warning", "logger": "nexus.test", "seconds": 1.5, "service": "nexus",
        "role": "gateway", "node": "a",
    }  # fmt: skip


def test_a_fault_is_a_field_with_its_traceback(lines: Lines) -> None:
    try:
        raise KeyError("x")
    except KeyError:
        log.exception("failed")
    (line,) = lines()
    assert line["event"] == "failed" and line["level"] == "error"
    assert line["exception"].startswith("Traceback") and "KeyError: 'x'" in line["exception"]


def test_libraries_are_heard_from_warnings_on_and_ours_from_what_happens_on(lines: Lines) -> None:
    for name in ("nexus.test", "library"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "said")
    assert [(line["logger"], line["level"]) for line in lines()] == [
        ("nexus.test", "info"), ("nexus.test", "warning"), ("library", "warning")
    ]  # fmt: skip


def test_a_second_beginning_takes_the_place_of_the_first(lines: Lines, tmp_path: Path) -> None:
    logs.begin("retriever", tmp_path)
    log.info("once")
    (line,) = lines()
    assert line["role"] == "retriever" and "node" not in line


ENDINGS = "\r\n\v\f\x1b[31m\x1c\x85\x9b2J\u2028\u2029\u202e\u2066\ufeff\x7f\0\ud800"


@pytest.mark.parametrize("said", [ENDINGS, f"a.md{ENDINGS}" + '", "level": "info"}', 'a"\\'])
def test_whatever_a_name_holds_it_makes_no_second_line(lines: Lines, tmp_path: Path, said: str) -> None:
    del logging.getLogger().handlers[1:]  # pytest's own, which pass on what no encoding takes
    log.warning("removed %s", said, extra={"source": said})
    raw = (tmp_path / logs.FILE).read_bytes()
    assert raw.count(b"\n") == 1 and len(raw.decode().splitlines()) == 1
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]", raw.decode())
    (line,) = lines()
    assert line["event"] == f"removed {said}" and line["source"] == said and line["level"] == "warning"


@settings(deadline=None)
@given(st.text(alphabet=st.characters()))
def test_any_text_is_one_line_that_says_it_again(said: str) -> None:
    shown = logs.formatter({}).format(logging.makeLogRecord({"msg": said, "levelname": "INFO", "name": "nexus"}))
    assert shown.splitlines() == [shown] and json.loads(shown)["event"] == said


KEY = f"nx_live_{'k' * 12}_{'s' * 43}_0123abcd"
TOKEN = f"eyJ{'h' * 20}.{'p' * 30}.{'s' * 43}"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (KEY, f"nx_live_{'k' * 12}_…"), (TOKEN, "…"), (f"Authorization: Bearer {KEY}", "Authorization: Bearer …"),
        ("basic dXNlcjpwYXNz", "basic …"), ("https://u:p@host/x", "https://…@host/x"),
        ("http://host:8000/a@b", "http://host:8000/a@b"), ("nx_ and eyJ", "nx_ and eyJ"),
    ],
)  # fmt: skip
def test_what_opens_a_door_is_not_written(lines: Lines, said: str, shown: str) -> None:
    log.warning("it was %s", said)
    try:
        raise ValueError(said)
    except ValueError:
        log.exception("failed", extra={"beside": said})
    first, second = lines()
    assert first["event"] == f"it was {shown}" and second["beside"] == shown
    assert f"ValueError: {shown}" in second["exception"]


def test_a_long_text_is_cut_in_its_middle(lines: Lines) -> None:
    log.warning("a%sz", "." * 10**6)
    (line,) = lines()
    assert len(line["event"]) <= logs.MOST_CHARACTERS + 3 and line["event"][0] + line["event"][-1] == "az"


def test_a_mistake_in_a_call_costs_the_line_and_nothing_else(
    lines: Lines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [one for one in logging.getLogger().handlers if one.name == logs.NAME]
    monkeypatch.setattr(logging.getLogger(), "handlers", own)  # pytest's own would raise
    log.warning("%d", "no number")
    log.warning("next")
    assert [line["event"] for line in lines()] == ["next"] and "Logging error" in capsys.readouterr().err


def test_a_disk_that_is_away_costs_lines_and_nothing_else(
    lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.warning("one")
    (tmp_path / "logs").rename(tmp_path / "elsewhere")
    (tmp_path / "logs").write_text("no folder")
    log.warning("two")
    assert "NotADirectoryError" in capsys.readouterr().err
    (tmp_path / "logs").unlink()
    log.warning("three")
    assert [line["event"] for line in lines()] == ["three"]


# ── the file ────────────────────────────────────────────────────────────────────────────────────


def write_many(file: Path, name: str, count: int) -> None:
    shared = logs.SharedFile(file, most_bytes=1_000, older=400)
    for number in range(count):
        shared.write(f"{name} {number} {'x' * 100}\n")


def test_processes_share_a_file_and_no_line_is_lost_or_broken_as_it_is_put_aside(tmp_path: Path) -> None:
    file, names, count = tmp_path / "logs" / "shared", "abcd", 500
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(file, name, count)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    files = list(file.parent.iterdir())
    written = [line for one in files for line in one.read_text().splitlines()]
    assert sorted(written) == sorted(f"{name} {n} {'x' * 100}" for name in names for n in range(count))
    assert len(files) > 100 and max(one.stat().st_size for one in files) < 1_000 + 4 * 120
    assert {one.stat().st_mode & 0o777 for one in files} == {0o600}


def test_no_more_than_so_many_older_files_are_kept(tmp_path: Path) -> None:
    shared = logs.SharedFile(tmp_path / "f", most_bytes=10, older=2)
    for number in range(6):
        shared.write(f"line {number} …\n")
    found = {one.name: one.read_text() for one in tmp_path.iterdir()}
    assert found == {"f": "line 5 …\n", "f.1": "line 4 …\n", "f.2": "line 3 …\n"}


# ── the request ─────────────────────────────────────────────────────────────────────────────────


def test_each_request_is_one_line_with_the_id_that_its_answer_says(lines: Lines, door: Door) -> None:
    asked = {**door.headers(), "x-request-id": "mine-1"}
    found = door.client.get("/rag/documents/secret-name", params={"x": "secret"}, headers=asked)
    door.client.get("/livez")
    lost = door.client.get("/rag/secret%0Aname")
    told = [line for line in lines() if line["logger"] == "nexus.requests"]
    assert [(line["method"], line["route"], line["status"], line["request_id"]) for line in told] == [
        ("GET", "/rag/documents/{document_id}", 404, "mine-1"),
        ("GET", None, lost.status_code, lost.headers["x-request-id"]),
    ]
    assert found.headers["x-request-id"] == "mine-1" and all(line["milliseconds"] > 0 for line in told)
    assert "secret" not in json.dumps(lines())


def test_a_fault_of_a_request_is_found_by_its_id(lines: Lines, door: Door) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    door.lent.retriever.search = fail  # type: ignore[method-assign]
    answer = door.client.post("/rag/search", json={"query": "x\r\nINFO y"}, headers=door.headers())
    assert answer.status_code == 500
    mine = [line for line in lines() if line.get("request_id") == answer.json()["request_id"]]
    assert [line["logger"] for line in mine] == ["nexus.gateway", "nexus.requests"]
    assert "a fault" in mine[0]["exception"]


@hops.hop
class Elsewhere:
    """An actor that says in which request and trace it thinks to be."""

    async def ask(self, value: int, more: int = 0) -> tuple[int, dict[str, str]]:
        log.info("asked")
        return value + more, carried()

    async def stream(self, count: int) -> Any:
        for number in range(count):
            log.info("streaming")
            yield number

    def plain(self) -> str:
        return "as it is"


class InTasks:
    """Serve's handle, which runs each call in a task with a context of its own."""

    def __init__(self, actor: object) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        class Called:
            def remote(_, *arguments: Any, **more: Any) -> "asyncio.Task[Any]":
                return begin_in_background(getattr(self.actor, method)(*arguments, **more))

        return Called()


def test_who_is_asked_elsewhere_goes_on_with_the_request_and_its_trace(lines: Lines) -> None:
    tracer = TracerProvider().get_tracer("test")

    async def ask(request_id: str) -> tuple[str, Any]:
        logs.bind(request_id)
        with tracer.start_as_current_span("asking") as span:
            _, told = await Remote(InTasks(Elsewhere())).ask(1)  # type: ignore[arg-type]
            return trace.format_trace_id(span.get_span_context().trace_id), told

    async def ask_at_once() -> list[tuple[str, Any]]:
        return await asyncio.gather(*(asyncio.create_task(ask(f"r{number}")) for number in range(20)))

    answers = asyncio.run(ask_at_once())
    assert [told["request_id"] for _, told in answers] == [f"r{number}" for number in range(20)]
    assert all(told["traceparent"].split("-")[1] == trace_id for trace_id, told in answers)
    logged = {(line["request_id"], line["trace_id"]) for line in lines()}
    assert logged == {(told["request_id"], trace_id) for trace_id, told in answers}


def test_a_hop_is_called_as_before_by_who_is_in_no_request(lines: Lines) -> None:
    async def ask() -> Any:
        actor = Elsewhere()
        return await actor.ask(1, more=2), [n async for n in actor.stream(3)], actor.plain()  # type: ignore[call-arg]

    assert asyncio.run(ask()) == ((3, {}), [0, 1, 2], "as it is")
    assert all("request_id" not in line and "trace_id" not in line for line in lines())


def test_a_stream_goes_on_with_the_request_until_its_end_and_ends_when_it_is_left(lines: Lines) -> None:
    async def ask() -> list[int]:
        stream = Elsewhere().stream(9, of={"request_id": "r"})  # type: ignore[call-arg]
        taken = [await anext(stream), await anext(stream)]
        await stream.aclose()
        return taken

    assert asyncio.run(ask()) == [0, 1]
    assert [line["request_id"] for line in lines()] == ["r", "r"]


def test_outside_a_process_of_its_own_an_actor_changes_no_logging() -> None:
    before = list(logging.getLogger().handlers)
    hops.begin("gateway")
    assert logging.getLogger().handlers == before
