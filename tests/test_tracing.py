"""Traces: one tree of spans over all that worked on a request, sent to a real collector, and no harm without one."""

import asyncio
import json
import logging
import threading
import warnings
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from opentelemetry import trace
from starlette.testclient import TestClient

from actors import hops
from deployments.gateway import build
from nexus import exporting, logs, tracing
from nexus.balancer import Balancer, Member, Weights
from nexus.config import Telemetry
from nexus.errors import Unavailable
from nexus.pipelines.rag import Tools
from nexus.types import Delta, Prompt, Usage
from nexus.vocabulary import FINGERPRINT, FIRST_PIECE
from tests.collector import Collector, Got, collecting, root_of
from tests.conftest import Door
from tests.running import free_port

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `ray.serve` uses what pydantic will remove
    from deployments.remote import Remote
    from tests.test_logs import InTasks

SECRET = "a-word-nobody-else-says"
CALLER = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@contextmanager
def traced(url: str, **settings: object) -> Iterator[None]:
    """This process as one that sends its spans; all that ended within are sent when the block ends."""
    tracing.begin(Telemetry(otlp_endpoint=url, **settings), "tester")
    try:
        yield
    finally:
        tracing.end(10)


@pytest.fixture(autouse=True)
def afterwards_there_are_no_spans() -> Iterator[None]:
    yield
    tracing.end()


@hops.hop
class Elsewhere:
    """The retriever in another process, as far as contexts go."""

    def __init__(self, door: Door) -> None:
        self._retriever = door.lent.retriever

    async def search(self, *arguments: object) -> object:
        return await asyncio.to_thread(tracing.within(asyncio.run), self._retriever.search(*arguments))  # type: ignore

    async def retrieve(self, *arguments: object) -> object:
        work = door_retrieve(self._retriever, *arguments)
        return await asyncio.to_thread(tracing.within(asyncio.run), work)


async def door_retrieve(retriever: object, *arguments: object) -> object:
    return await retriever.retrieve(*arguments)  # type: ignore[attr-defined]


class Talking:
    """A generator that says what it is told to, in pieces."""

    name, sees_images = "talker", False

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        for piece in self.pieces:
            if piece == "FAIL":
                raise Unavailable(f"away: {SECRET}")
            yield Delta(piece)
        yield Delta(finish_reason="stop")
        yield Delta(usage=Usage(7, len(self.pieces)))

    async def check(self) -> None: ...


@pytest.fixture
def talking(door: Door) -> Iterator[Door]:
    """A door whose retriever is a hop away, and whose generator talks."""
    far: object = Remote(InTasks(Elsewhere(door)))  # type: ignore[arg-type]
    balancer = Balancer([Member(Talking(f"{SECRET} ", "[1]."), 0.5, place="m1")], Weights(1, 1, 1), probe_seconds=5)
    rag = Tools(far.retrieve, balancer.generator("talker"), passages=5, passage_tokens=500, abstain_below=0.0)  # type: ignore[attr-defined]
    door.lent = replace(door.lent, retriever=far, rag=rag, balancer=balancer)  # type: ignore[arg-type]
    door.house.put("tea.md", f"tea is boiled at ninety degrees, {SECRET}", "coffee is roasted")
    with TestClient(build(door.lent), raise_server_exceptions=False) as client:
        yield replace(door, client=client)


def ask(door: Door, **headers: str) -> dict[str, object]:
    headers |= door.headers("acme")
    answer = door.client.post("/rag/query", json={"query": f"tea {SECRET}"}, headers=headers)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def children(spans: Sequence[Got], of: Got) -> list[str]:
    return sorted(one.name for one in spans if one.parent_id == of.span_id)


def named(spans: Sequence[Got], name: str) -> Got:
    (found,) = [one for one in spans if one.name == name]
    return found


# ── one request ─────────────────────────────────────────────────────────────────────────────────


def test_a_request_is_one_tree_and_its_answer_says_which(talking: Door, collector: Collector) -> None:
    with traced(collector.url):
        answer = ask(talking)
    spans = collector.spans
    assert {one.trace_id for one in spans} == {answer["trace_id"]}
    root = root_of(spans)
    assert root.name == "POST /rag/query" and root.parent_id == ""
    assert children(spans, root) == ["chat talker", "retrieval"]
    routes = [one for one in spans if one.name in ("embed", "search dense", "search text")]
    names = {one.span_id: one.name for one in spans}
    assert {(one.name, names[one.parent_id]) for one in routes} == {
        ("embed", "search"), ("search dense", "search"), ("search text", "search")
    }  # fmt: skip
    assert {"authority", "search"} <= set(children(spans, named(spans, "retrieval")))
    by_id = {one.span_id: one for one in spans}
    for one in spans:
        above = by_id.get(one.parent_id, one)
        assert above.start <= one.start <= one.end <= above.end, one.name


def test_what_phoenix_reads_is_in_the_spans(talking: Door, collector: Collector) -> None:
    with traced(collector.url, project="ours"):
        answer = ask(talking)
    spans = collector.spans
    assert {one.project for one in spans} == {"ours"} and {one.role for one in spans} == {"tester"}
    request, search, chat = root_of(spans), named(spans, "retrieval"), named(spans, "chat talker")
    kinds = {"POST /rag/query": "CHAIN", "retrieval": "RETRIEVER", "chat talker": "LLM", "embed": "EMBEDDING"}
    assert {name: named(spans, name).kind for name in kinds} == kinds
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["http.route"] == "/rag/query"
    assert chat.attributes["gen_ai.request.model"] == "talker" and chat.attributes["nexus.machine"] == "m1"
    assert chat.attributes["gen_ai.usage.input_tokens"] == 7 and chat.attributes["gen_ai.usage.output_tokens"] == 2
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert 0 < chat.attributes[FIRST_PIECE] < 60
    found = answer["sources"][0]  # type: ignore[index]
    assert search.attributes["retrieval.documents.0.document.id"] == found["document_id"]
    assert search.attributes["retrieval.documents.0.document.score"] > 0
    assert json.loads(search.attributes["retrieval.documents.0.document.metadata"])["chunk_id"] == found["chunk_id"]
    assert search.attributes["gen_ai.retrieval.top_k"] == 10
    assert named(spans, "embed").attributes[FINGERPRINT] == talking.house.embedder.fingerprint


@pytest.mark.parametrize("allowed", [False, True])
def test_texts_are_told_only_where_that_is_allowed(talking: Door, collector: Collector, allowed: bool) -> None:
    with traced(collector.url, record_text=allowed):
        ask(talking)
    told = [(one.name, key) for one in collector.spans for key, value in one.attributes.items() if SECRET in str(value)]
    wanted = [
        ("chat talker", "input.value"), ("chat talker", "output.value"), ("retrieval", "input.value"),
        ("retrieval", "retrieval.documents.0.document.content"),
    ] if allowed else []  # fmt: skip
    assert sorted(told) == wanted


def test_the_caller_s_trace_goes_on_here(talking: Door, collector: Collector) -> None:
    with traced(collector.url):
        answer = ask(talking, traceparent=CALLER)
    assert answer["trace_id"] == "ab" * 16 and root_of(collector.spans).parent_id == "cd" * 8
    assert {one.trace_id for one in collector.spans} == {"ab" * 16}


@pytest.mark.parametrize("nonsense", ["", "00-zz-1-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 9000])
def test_a_traceparent_that_is_none_is_as_if_it_were_not_there(
    talking: Door, collector: Collector, nonsense: str
) -> None:
    with traced(collector.url):
        answer = ask(talking, traceparent=nonsense)
    assert root_of(collector.spans).parent_id == "" and root_of(collector.spans).trace_id == answer["trace_id"]


def test_requests_at_once_do_not_mix(talking: Door, collector: Collector) -> None:
    with traced(collector.url):
        threads = [threading.Thread(target=ask, args=(talking,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    traces = {one.trace_id for one in collector.spans}
    assert len(traces) == 8
    for one in traces:
        spans = collector.of(one)
        assert root_of(spans).name == "POST /rag/query" and len(spans) == len(collector.spans) / 8


def test_a_stream_is_measured_to_its_last_piece(talking: Door, collector: Collector) -> None:
    with traced(collector.url):
        body = {"query": "tea", "stream": True}
        with talking.client.stream("POST", "/rag/query", json=body, headers=talking.headers("acme")) as answer:
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    assert json.loads(events[-1])["trace_id"] == root_of(collector.spans).trace_id
    assert children(collector.spans, root_of(collector.spans)) == ["chat talker", "retrieval"]


def test_a_document_s_steps_are_in_the_trace_of_who_sent_it(door: Door, collector: Collector) -> None:
    with traced(collector.url):
        body = {"filename": "a.md", "content": f"# Tea\n\n{SECRET}"}
        added = door.client.post("/rag/add_document", json=body, headers=door.headers())
    assert added.status_code == 201
    spans = [one for one in collector.spans if one.trace_id == root_of(collector.spans).trace_id]
    assert children(spans, root_of(spans)) == ["ingest embed", "ingest parse", "ingest publish"]
    assert children(spans, named(spans, "ingest parse")) == ["chunk", "read"]
    assert SECRET not in str(spans)


def test_who_waits_no_more_leaves_a_span_that_ends(collector: Collector) -> None:
    async def leave() -> None:
        stream = tracing.generated("m", "", Prompt(messages=()), Talking("a", "b", "c").stream(Prompt(messages=())))
        async with aclosing(stream) as deltas:
            assert (await anext(deltas)).text == "a"
            assert not trace.get_current_span().is_recording()  # the taker's is not the maker's

    with traced(collector.url):
        asyncio.run(leave())
    (span,) = collector.spans
    assert span.status == "" and span.end > span.start and span.attributes[FIRST_PIECE] > 0


def test_a_failure_is_named_and_its_words_are_not_told(talking: Door, collector: Collector) -> None:
    async def fail() -> None:
        stream = Talking("a", "FAIL").stream(Prompt(messages=()))
        async with aclosing(tracing.generated("m", "", Prompt(messages=()), stream)) as deltas:
            async for _ in deltas:
                pass

    with traced(collector.url):
        with pytest.raises(Unavailable):
            asyncio.run(fail())
        with pytest.raises(KeyError), tracing.span("inside"):
            raise KeyError(SECRET)
    assert {one.name: one.status for one in collector.spans} == {"chat m": "unavailable", "inside": "KeyError"}
    assert SECRET not in str(collector.spans)


# ── how much, and where to ──────────────────────────────────────────────────────────────────────


def test_of_all_traces_a_share_is_recorded_and_those_whole(talking: Door, collector: Collector) -> None:
    with traced(collector.url, sampling=0.5):
        answers = {str(ask(talking)["trace_id"]) for _ in range(20)}
    recorded = {one.trace_id for one in collector.spans}
    assert len(answers) == 20 and recorded < answers and recorded
    for one in recorded:
        assert children(collector.of(one), root_of(collector.of(one))) == ["chat talker", "retrieval"]


def test_a_caller_decides_that_it_is_not_recorded_and_not_that_it_is(talking: Door, collector: Collector) -> None:
    with traced(collector.url):
        ask(talking, traceparent=CALLER[:-1] + "0")
    with traced(collector.url, sampling=0.0):
        ask(talking, traceparent=CALLER)
    assert collector.spans == []


def test_the_collector_gets_the_key_and_the_headers_of_the_settings(collector: Collector) -> None:
    with traced(collector.url + "/", api_key="k-1", otlp_headers={"X-Team": "a"}), tracing.span("x"):
        pass
    (headers,) = collector.requests
    assert headers["path"] == "/v1/traces" and headers["content-type"] == "application/x-protobuf"
    assert (headers["authorization"], headers["x-team"]) == ("Bearer k-1", "a")


@pytest.mark.parametrize(
    ("settings", "url"),
    [("http://h:6006", "http://h:6006/v1/traces"), ("https://h/x/v1/traces", "https://h/x/v1/traces"),
     ("http://h/x/", "http://h/x/v1/traces")],
)  # fmt: skip
def test_an_endpoint_is_named_with_or_without_its_path(settings: str, url: str) -> None:
    assert Telemetry(otlp_endpoint=settings).traces_url == url


@pytest.mark.parametrize(
    "settings",
    [{"otlp_endpoint": "h:4317"}, {"otlp_endpoint": "grpc://h:4317"}, {"otlp_endpoint": "http://u:p@h"},
     {"otlp_endpoint": "http://h/?key=1"}, {"sampling": 1.5}, {"sampling": -1}, {"api_key": "a\r\nb: c"},
     {"otlp_headers": {"a b": "c"}}, {"otlp_headers": {"a": "c\n"}}, {"project": ""}],
)  # fmt: skip
def test_a_setting_that_cannot_be_meant_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Telemetry"):
        Telemetry(**settings)  # type: ignore[arg-type]


def test_a_key_is_shown_nowhere() -> None:
    made = Telemetry(otlp_endpoint="http://h", api_key="k-secret", otlp_headers={"a": "h-secret"})  # type: ignore[arg-type]
    assert "secret" not in repr(made) + made.model_dump_json() + str(made)


# ── without a collector ─────────────────────────────────────────────────────────────────────────


def test_without_an_endpoint_there_is_no_span_and_the_request_s_id_is_the_trace_s(talking: Door) -> None:
    tracing.begin(Telemetry(), "tester")
    with tracing.span("x") as made:
        assert not made.is_recording() and tracing.trace_id() == ""
    asked = talking.client.post(
        "/rag/query", json={"query": "tea"}, headers={**talking.headers("acme"), "x-request-id": "mine"}
    )
    assert asked.json()["trace_id"] == "mine"


def test_without_an_endpoint_the_caller_s_trace_is_still_named(talking: Door) -> None:
    assert ask(talking, traceparent=CALLER)["trace_id"] == "ab" * 16


def test_a_collector_that_is_away_is_said_once_and_once_that_it_is_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EXPORT_SECONDS", 0.2)
    port, now = free_port(), [0.0]
    exporter = exporting.Exporter(Telemetry(otlp_endpoint=f"http://127.0.0.1:{port}"), clock=lambda: now[0])
    caplog.set_level(logging.WARNING)
    for name in exporting.TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def send(count: int) -> str:
        return exporter.export([one_span() for _ in range(count)]).name

    assert [send(2), send(3)] == ["FAILURE", "FAILURE"]
    now[0] += exporting.REST_SECONDS
    assert send(1) == "FAILURE"
    assert [record.name for record in caplog.records] == ["nexus.tracing"]
    with collecting(port) as collector:
        assert send(1) == "FAILURE" and collector.requests == []  # it rests
        now[0] += exporting.REST_SECONDS
        assert [send(1), send(4)] == ["SUCCESS", "SUCCESS"]
        assert len(collector.spans) == 5
    exporter.shutdown()
    assert [record.getMessage() for record in caplog.records] == [
        "the collector of traces takes no spans; they are lost until it does",
        "the collector of traces takes spans again; 7 were lost",
    ]


def test_a_collector_that_refuses_is_as_one_that_is_away(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 401
    with traced(collector.url):
        for _ in range(3):
            with tracing.span("x"):
                pass
    assert [record.name for record in caplog.records] == ["nexus.tracing"]


def test_while_the_collector_is_away_nothing_is_recorded_but_what_it_is_tried_with(
    talking: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = [True]
    monkeypatch.setattr(exporting.Exporter, "is_heard", lambda _: heard[0])
    with collecting() as collector:
        with traced(collector.url):
            ask(talking)
            heard[0] = False
            answers = [ask(talking), ask(talking, traceparent=CALLER)]
        recorded = {one.trace_id for one in collector.spans}
    assert len(recorded) == 1 and not recorded & {str(answer["trace_id"]) for answer in answers}
    assert len(str(answers[0]["trace_id"])) == 32 and answers[1]["trace_id"] == "ab" * 16


def test_a_collector_is_heard_again_once_it_rested_and_not_while_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    now, heard = [0.0], []
    exporter = exporting.Exporter(Telemetry(otlp_endpoint="http://127.0.0.1:1"), clock=lambda: now[0])

    def send(self: object, spans: object) -> object:
        heard.append(exporter.is_heard())
        return exporting.SpanExportResult.FAILURE

    monkeypatch.setattr(exporting.OTLPSpanExporter, "export", send)
    assert exporter.is_heard()
    exporter.export([])
    assert not exporter.is_heard()
    now[0] += exporting.REST_SECONDS
    assert exporter.is_heard()
    exporter.export([])
    assert heard == [True, False] and not exporter.is_heard()


def test_a_collector_is_tried_again_after_an_attempt_that_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    exporter = exporting.Exporter(Telemetry(otlp_endpoint="http://127.0.0.1:1"), clock=lambda: now[0])
    monkeypatch.setattr(exporting.OTLPSpanExporter, "export", lambda *_: exporting.SpanExportResult.FAILURE)
    exporter.export([])
    now[0] += exporting.REST_SECONDS
    monkeypatch.setattr(exporting.OTLPSpanExporter, "export", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        exporter.export([])
    assert exporter.is_heard()


def one_span() -> trace.Span:
    from opentelemetry.sdk.trace import TracerProvider

    made = TracerProvider(shutdown_on_exit=False).get_tracer("test").start_span("one")
    made.end()
    return made


def test_answers_come_while_the_collector_swallows_all_and_says_nothing(talking: Door) -> None:
    """It accepts connections, and never answers: nobody waits for it, not even the end for longer than it may."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracing.begin(Telemetry(otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"), "tester")
        for _ in range(3):
            ask(talking)
        ended = threading.Event()
        ending = threading.Thread(target=lambda: (tracing.end(0.1), ended.set()))
        ending.start()
        assert ended.wait(exporting.EXPORT_SECONDS - 1)


def test_more_spans_than_the_queue_holds_cost_spans_and_no_memory(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "QUEUED_SPANS", 16)
    monkeypatch.setattr(exporting, "BATCH_SPANS", 16)
    collector.status = 503
    with traced(collector.url):
        for _ in range(1000):
            with tracing.span("x"):
                pass
        logging.getLogger("nexus.test").warning("it goes on")
    assert collector.spans == []


def test_a_process_of_its_own_logs_its_trace(collector: Collector, tmp_path: Path) -> None:
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    try:
        logs.begin("tester", tmp_path)
        with traced(collector.url), tracing.span("x"):
            logging.getLogger("nexus.test").warning("within")
    finally:
        root.handlers = before
        logging.getLogger("nexus").setLevel(logging.NOTSET)
    line = json.loads((tmp_path / logs.FILE).read_text().splitlines()[0])
    (span,) = collector.spans
    assert (line["trace_id"], line["span_id"]) == (span.trace_id, span.span_id)
