"""What is recorded of requests and commands: every denial, privileged action and answer, once, at its end."""

import asyncio
import csv
import errno
import io
import json
import os
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typer.testing import CliRunner

from cluster import bootstrap
from cluster.bootstrap import Instance
from cluster.inventory import Inventory
from deployments import cli, middleware, running
from deployments.audited import Audited
from deployments.auditing import recorded
from deployments.gateway import Lent, build
from nexus import audit
from nexus.access import KeyRing
from nexus.audit import Chain, Recorder, files_of
from nexus.audit_reading import read, verify
from nexus.balancer import Balancer, Member, Weights
from nexus.config import Audit, load_config
from nexus.errors import NotFound, Unavailable, UpstreamInvalid
from nexus.types import Delta, Principal, Prompt
from tests.conftest import Door
from tests.test_leaving import leave as leave_socket
from tests.test_leaving import run as run_within
from tests.test_leaving import serving

QUESTION = "What torque does the gripper close with?"
TEXT = "The gripper closes with a torque of 12 newton metres."
CANARY = "canary-7f3a"


def lines(door: Door) -> list[dict[str, Any]]:
    door.lent.audit.flush()
    return list(read(door.lent.config.home))


def add(door: Door, headers: dict[str, str], name: str = "gripper.md") -> str:
    answer = door.client.post("/rag/add_document", json={"filename": name, "content": TEXT}, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["document_id"])


def reopened(door: Door, **settings: object) -> TestClient:
    """The same door under other settings of the audit record."""
    config = door.lent.config.model_copy(update={"audit": Audit(**settings)})  # type: ignore[arg-type]
    given = {field.name: getattr(door.lent, field.name) for field in fields(Lent)}
    return TestClient(build(Lent(**{**given, "config": config})), raise_server_exceptions=False)


def no_space(descriptor: int, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """The disk is full; calling what this yields makes room."""
    write_all = audit.write_all
    monkeypatch.setattr(audit, "write_all", no_space)
    yield lambda: monkeypatch.setattr(audit, "write_all", write_all)
    monkeypatch.setattr(audit, "write_all", write_all)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────

CHAT = [{"role": "user", "content": QUESTION}]
ANSWERS: dict[str, tuple[str, dict[str, Any], str]] = {  # path, body, the model that answers
    "search": ("/rag/search", {"query": QUESTION}, ""),
    "query": ("/rag/query", {"query": QUESTION}, "extractive"),
    "query as a stream": ("/rag/query", {"query": QUESTION, "stream": True}, "extractive"),
    "session": ("/mcp/s1/query", {"input": QUESTION}, "extractive"),
    "chat with documents": ("/v1/chat/completions", {"model": "nexus-rag", "messages": CHAT}, "extractive"),
    "chat with documents as a stream": (
        "/v1/chat/completions", {"model": "nexus-rag", "messages": CHAT, "stream": True}, "extractive",
    ),
    "chat": ("/v1/chat/completions", {"model": "extractive", "messages": CHAT}, "extractive"),
    "chat with whichever model": ("/v1/chat/completions", {"model": "auto", "messages": CHAT}, "extractive"),
    "chat as a stream": (
        "/v1/chat/completions", {"model": "extractive", "messages": CHAT, "stream": True}, "extractive",
    ),
    "completion": ("/v1/completions", {"model": "extractive", "prompt": QUESTION}, "extractive"),
    "execute": ("/execute", {"template_name": "analyze_only", "initial_data": {"text": TEXT}}, "extractive"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_Q12_every_answer_says_who_asked_what_of_which_model_and_documents(door: Door, name: str) -> None:
    path, body, model = ANSWERS[name]
    headers = door.headers("acme", "alice")
    document = add(door, headers)
    answer = door.client.post(path, json=body, headers={**headers, "x-request-id": "the-one"})
    assert answer.status_code == 200, answer.text
    (line,) = lines(door)
    assert line["kind"] == "answer" and line["verdict"] == "answered" and line["status"] == 200
    assert (line["tenant"], line["subject"], line["request_id"]) == ("acme", "alice", "the-one")
    assert line.get("model", "") == model
    is_of_documents = path.startswith(("/rag", "/mcp")) or body.get("model") == "nexus-rag"
    assert line.get("documents", []) == ([document] if is_of_documents else [])
    assert line["action"] == f"POST {'/mcp/{session_id:path}/query' if path.startswith('/mcp') else path}"
    assert QUESTION not in files_of(door.lent.config.home)[0].read_text()


def test_Q12_count_equality_every_request_of_these_kinds_is_recorded_and_no_other(door: Door) -> None:
    ours, theirs = door.headers("acme", "alice"), door.headers("other", "mallory")
    document = add(door, ours)
    reader = door.headers("acme", "reader", "documents:read")
    want: Counter[tuple[str, str]] = Counter()

    def ask(count: int, kind: str | None, verdict: str, method: str, path: str, **given: Any) -> None:
        for _ in range(count):
            door.client.request(method, path, **given)
        if kind is not None:
            want[(kind, verdict)] += count

    ask(3, "answer", "answered", "POST", "/rag/query", json={"query": QUESTION}, headers=ours)
    ask(2, "denied", "denied", "POST", "/rag/query", json={"query": QUESTION})
    ask(2, "denied", "denied", "GET", "/rag/documents", headers={"x-api-key": "nx_wrong"})
    ask(4, "denied", "denied", "DELETE", f"/rag/documents/{document}", headers=reader)
    ask(2, "denied", "denied", "GET", f"/rag/documents/{document}", headers=theirs)
    ask(2, "privileged", "done", "POST", "/rag/vacuum", headers=ours)
    want[("privileged", "begun")] += 2
    ask(3, None, "", "GET", "/rag/documents", headers=ours)
    ask(2, None, "", "GET", "/livez")
    ask(2, None, "", "POST", "/rag/query", json={"nonsense": 1}, headers=ours)
    ask(1, None, "", "GET", "/nowhere", headers=ours)
    assert Counter((line["kind"], line["verdict"]) for line in lines(door)) == want
    assert verify(door.lent.config.home).faults == ()


def test_texts_are_kept_only_if_configured(door: Door) -> None:
    headers = door.headers()
    add(door, headers)
    body = {"query": f"{QUESTION} {CANARY}"}
    assert door.client.post("/rag/query", json=body, headers=headers).status_code == 200
    assert not any(line.keys() & {"question", "answer"} for line in lines(door))
    client = reopened(door, texts=True)
    answer = client.post("/rag/query", json={**body, "stream": True}, headers=headers)
    assert client.get("/rag/documents", headers=headers).status_code == 200
    *_, line = lines(door)
    assert CANARY in line["question"]
    assert line["answer"] == answer.text


def test_Q7_no_credential_is_in_the_record(door: Door) -> None:
    key, _ = door.keys.create("alice")
    wrong = f"nx_{CANARY}_{'x' * 43}_00000000"
    door.client.post("/rag/vacuum", headers={"authorization": f"Bearer {key}"})
    door.client.post(f"/rag/query?api_key={CANARY}", headers={"authorization": f"Bearer {wrong}"})
    assert len(lines(door)) == 3
    text = files_of(door.lent.config.home)[0].read_text()
    assert key.split("_")[3] not in text and CANARY not in text
    assert audit.read_key(door.lent.config.home).hex() not in text  # type: ignore[union-attr]


# ── denials and privileged actions ──────────────────────────────────────────────────────────────


def test_API1_anothers_object_is_recorded_with_its_id_and_who_asked(door: Door) -> None:
    document = add(door, door.headers("acme", "alice"))
    assert door.client.get(f"/rag/documents/{document}", headers=door.headers("other", "mallory")).status_code == 404
    (line,) = lines(door)
    assert (line["kind"], line["status"], line["reason"]) == ("denied", 404, "not_found")
    assert (line["tenant"], line["subject"], line["objects"]) == ("other", "mallory", [document])
    assert line["action"] == "GET /rag/documents/{document_id}"


@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        ({"host": "evil.example"}, 400, "host_not_allowed"),
        ({"origin": "https://evil.example"}, 403, "origin_not_allowed"),
        ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
    ],
)
def test_Q14_what_a_browser_was_tricked_into_is_recorded(
    door: Door, headers: dict[str, str], status: int, reason: str
) -> None:
    """Refused before anybody asks who it is, and a denial all the same."""
    answer = door.client.post("/rag/search", content=b"{}", headers={**door.headers(), **headers})
    assert answer.status_code == status and answer.headers["x-content-type-options"] == "nosniff"
    (line,) = lines(door)
    assert (line["kind"], line["verdict"], line["status"], line["reason"]) == ("denied", "denied", status, reason)
    assert line["action"] == "POST /rag/search" and "tenant" not in line


def test_API2_a_refused_credential_is_recorded_with_the_reason(door: Door) -> None:
    assert door.client.post("/rag/query", json={}, headers={"x-api-key": "x"}).status_code == 401
    (line,) = lines(door)
    assert (line["kind"], line["status"], line["reason"].partition(":")[0]) == ("denied", 401, "invalid_api_key")
    assert "tenant" not in line and line["action"] == "auth.failed: POST /rag/query"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/rag/vacuum"), ("POST", "/rag/fsck"), ("DELETE", "/rag/documents/ID"),
        ("DELETE", "/mcp/s1/clear_context"), ("POST", "/coordinator/snapshot"),
        ("DELETE", "/coordinator/voters/7"),
        ("POST", "/auth/keys"),
    ],
)  # fmt: skip
def test_API5_a_privileged_action_is_on_the_disk_before_it_is_done(
    door: Door, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = door.headers("acme", "alice")
    path = path.replace("ID", add(door, headers))
    status = door.client.request(method, path, headers=headers).status_code
    begun, ended = lines(door)
    assert (begun["kind"], begun["verdict"]) == ("privileged", "begun")
    assert (ended["kind"], ended["verdict"], ended["status"]) == (
        "privileged",
        "done" if status < 400 else "failed",
        status,
    )
    assert begun["request_id"] == ended["request_id"] and begun["action"] == ended["action"]
    assert begun["subject"] == ended["subject"] == "alice"
    assert begun.get("objects") == ended.get("objects")


def test_API5_who_may_not_is_denied_and_nothing_is_said_to_begin(door: Door) -> None:
    assert door.client.post("/rag/vacuum", headers=door.headers("acme", "bob", "infer")).status_code == 403
    (line,) = lines(door)
    assert (line["kind"], line["reason"], line["status"]) == ("denied", "forbidden", 403)


def test_Q12_a_full_disk_refuses_privileged_actions_and_nothing_is_done(door: Door, full: Callable[[], None]) -> None:
    headers = door.headers()
    document = add(door, headers)
    for method, path in (("DELETE", f"/rag/documents/{document}"), ("POST", "/rag/vacuum")):
        answer = door.client.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
    assert door.client.get(f"/rag/documents/{document}", headers=headers).status_code == 200
    assert door.client.post("/rag/query", json={"query": QUESTION}, headers=headers).status_code == 200
    full()
    assert door.client.request("DELETE", f"/rag/documents/{document}", headers=headers).status_code == 200
    kinds = Counter((line["kind"], line["verdict"], line.get("status")) for line in lines(door))
    assert kinds == {
        ("privileged", "failed", 507): 2, ("answer", "answered", 200): 1,
        ("privileged", "begun", None): 1, ("privileged", "done", 200): 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_Q12_a_full_disk_refuses_answers_where_the_record_is_required(
    door: Door, full: Callable[[], None], name: str
) -> None:
    path, body, _ = ANSWERS[name]
    headers = door.headers()
    add(door, headers)
    client = reopened(door, required=True)
    answer = client.post(path, json=body, headers=headers)
    assert (answer.status_code, "storage_full" in answer.text, "torque of 12" in answer.text) == (507, True, False)
    full()
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert [line["verdict"] for line in lines(door) if line.get("status") == 200] == (
        ["begun", "answered"] if body.get("stream") else ["answered"]
    )


# ── the layer alone ─────────────────────────────────────────────────────────────────────────────


async def run_layer(
    home: Path, app: ASGIApp, settings: Audit | None = None, fault: type[BaseException] | None = None
) -> tuple[list[dict[str, Any]], list[Message]]:
    """One request through the layer around this application; what was recorded, and what was sent."""
    recorder = Recorder(Chain(home))
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append({**message, "recorded": len(list(read(home)))})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope: Scope = {
        "type": "http", "method": "POST", "path": "/x", "headers": [],
        "state": {"request_id": "r", "principal": Principal("acme", "alice")},
    }  # fmt: skip
    layer = Audited(app, recorder, settings or Audit(), middleware.send_nexus_error)
    if fault is None:
        await layer(scope, receive, send)
    else:
        with pytest.raises(fault):
            await layer(scope, receive, send)
    recorder.close()
    return list(read(home)), sent


def answering(
    *bodies: bytes, status: int = 200, then: Callable[[], Awaitable[None]] | None = None, **facts: Any
) -> ASGIApp:
    """An application that sends these pieces, then does something, and ends unless that raised."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["audited"].update(facts)
        await send({"type": "http.response.start", "status": status, "headers": []})
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if then is not None:
            await then()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def leave() -> None:
    raise asyncio.CancelledError


async def break_down() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("then", "fault", "verdict", "reason"),
    [
        (None, None, "answered", None),
        (leave, asyncio.CancelledError, "left", "the caller left"),
        (break_down, ZeroDivisionError, "failed", None),
    ],
    ids=["ends", "is left", "breaks"],
)
def test_a_stream_is_recorded_at_its_end_however_it_ends(
    tmp_path: Path, then: Any, fault: Any, verdict: str, reason: str | None
) -> None:
    app = answering(b"one", b"two", then=then, model="m", documents=["d2", "d1", "d2"])
    (line,), _ = asyncio.run(run_layer(tmp_path, app, fault=fault))
    assert (line["verdict"], line.get("reason"), line["documents"]) == (verdict, reason, ["d2", "d1"])


@pytest.mark.parametrize("status", [401, 403, 429])
def test_Q12_every_refusing_status_is_a_denial(tmp_path: Path, status: int) -> None:
    (line,), _ = asyncio.run(run_layer(tmp_path, answering(status=status)))
    assert (line["kind"], line["status"], line["verdict"]) == ("denied", status, "denied")


def test_what_handlers_and_layers_add_is_in_the_record(tmp_path: Path) -> None:
    app = answering(model="m", verdict="redacted", reason="pii", action="ask", objects=["o"])
    (line,), _ = asyncio.run(run_layer(tmp_path, app))
    assert [line[name] for name in ("model", "verdict", "reason", "action", "objects")] == [
        "m", "redacted", "pii", "ask: POST /x", ["o"],
    ]  # fmt: skip


def test_a_request_that_ends_unanswered_is_recorded_as_left(tmp_path: Path) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["audited"]["model"] = "m"

    (line,), _ = asyncio.run(run_layer(tmp_path, app))
    assert (line["kind"], line["verdict"]) == ("answer", "left")


def test_where_it_is_required_nothing_leaves_before_its_record_is_on_the_disk(tmp_path: Path) -> None:
    written, sent = asyncio.run(run_layer(tmp_path, answering(b"one", model="m"), Audit(required=True)))
    assert [message["recorded"] for message in sent] == [1, 1, 1]
    assert [line["verdict"] for line in written] == ["begun", "answered"]


def test_an_answer_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "BATCH_SECONDS", 60)
    written, sent = asyncio.run(run_layer(tmp_path, answering(b"one", model="m")))
    assert [message["recorded"] for message in sent] == [0, 0, 0]
    assert [line["verdict"] for line in written] == ["answered"]


@pytest.mark.parametrize("path", ["/rag/query", "/v1/chat/completions"])
def test_who_leaves_in_the_middle_of_a_stream_is_recorded_with_the_documents_it_was_made_of(
    door: Door, path: str
) -> None:
    document = add(door, door.headers())

    async def test() -> None:
        async with serving(door) as served:
            said = f"{QUESTION} mark-1"
            asked = {"query": said, "model": "nexus-rag", "messages": [{"role": "user", "content": said}]}
            wanted = ("query",) if path == "/rag/query" else ("model", "messages")
            _, writer = await asyncio.open_connection(*served.address)
            writer.write(served.request(path, {"stream": True, **{name: asked[name] for name in wanted}}))
            await served.endless.when_opened("1").wait()
            await leave_socket(writer)
            await served.is_idle()

    run_within(test())
    (line,) = lines(door)
    assert (line["kind"], line["verdict"], line["model"]) == ("answer", "left", "endless")
    assert (line["documents"], line["reason"]) == ([document], "the caller left")


def test_a_stream_that_an_error_ends_is_recorded_as_failed(door: Door) -> None:
    class Breaking:
        name, sees_images = "breaking", False

        async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
            yield Delta("one ")
            raise UpstreamInvalid("nonsense")

        async def check(self) -> None: ...

    balancer = Balancer([Member(Breaking(), 1.0)], Weights(1, 1, 1), probe_seconds=5)
    client = TestClient(build(replace(door.lent, balancer=balancer)), raise_server_exceptions=False)
    body = {"model": "breaking", "messages": CHAT, "stream": True}
    assert "event: error" in client.post("/v1/chat/completions", json=body, headers=door.headers()).text
    (line,) = lines(door)
    assert (line["kind"], line["status"], line["verdict"], line["reason"]) == (
        "answer",
        200,
        "failed",
        "upstream_invalid",
    )


# ── commands ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
    return tmp_path


def nexus(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_commands_that_change_keys_are_recorded_before_and_after(home: Path) -> None:
    key = json.loads(nexus("key", "create", "ci", "--permission", "infer", "--json"))
    nexus("key", "revoke", key["id"])
    nexus("key", "revoke", "nobody", code=1)
    found = [(line["kind"], line["action"], line["verdict"], line.get("objects", [])) for line in read(home)]
    assert found == [
        ("command", "nexus key create", "begun", []),
        ("command", "nexus key create", "done", [key["id"], "tenant default", "infer"]),
        ("command", "nexus key revoke", "begun", [key["id"]]),
        ("command", "nexus key revoke", "done", [key["id"]]),
        ("command", "nexus key revoke", "begun", ["nobody"]),
        ("command", "nexus key revoke", "failed", ["nobody"]),
    ]
    assert all(line["subject"] for line in read(home))
    assert key["key"].split("_")[3] not in files_of(home)[0].read_text()


SOME = Instance("i" * 32, 0, "boot", "http://127.0.0.1:9", "127.0.0.1:6379", "http://y", 1, "/nonexistent", 0.0)
CLUSTER = """
nodes:
  sark: {address: 10.0.0.3, cpus: 8, memory: 16 GiB}
  clu: {address: 10.0.0.4, cpus: 8, memory: 16 GiB}
ray: {head: sark}
"""


def test_Q12_starting_and_stopping_are_recorded_before_and_after(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def act(what: str, result: object) -> Callable[..., object]:
        def do(*_: object, **__: object) -> object:
            last = list(read(home))[-1]
            done.append(f"{what} after {last['action']} {last['verdict']}")
            if isinstance(result, Exception):
                raise result
            return result

        return do

    monkeypatch.setattr(running, "ensure_up", act("up", (SOME, "started")))
    monkeypatch.setattr(bootstrap, "stop", act("down", True))
    nexus("up")
    nexus("down")
    monkeypatch.setattr(running, "ensure_up", act("up", Unavailable("no port")))
    nexus("up", code=1)
    (home / "nexus.yaml").write_text(CLUSTER)
    (home / "ray-token").touch(0o600)
    monkeypatch.setattr(bootstrap, "join_head", act("join", SOME))
    monkeypatch.setattr(bootstrap, "seen_here", lambda *_: Inventory(()))
    nexus("node", "start", "clu")
    nexus("node", "stop")
    assert done == [
        "up after nexus up begun", "down after nexus down begun", "up after nexus up begun",
        "join after nexus node start begun", "down after nexus node stop begun",
    ]  # fmt: skip
    found = [(line["action"], line["verdict"], line.get("reason", "")) for line in read(home)]
    assert [one for one in found if one[1] != "begun" and "key" not in one[0]] == [
        ("nexus up", "done", ""), ("nexus down", "done", ""), ("nexus up", "failed", "unavailable"),
        ("nexus node start", "done", ""), ("nexus node stop", "done", ""),
    ]  # fmt: skip
    assert all(line["kind"] == "command" and line["subject"] for line in read(home))
    assert [line["objects"] for line in read(home) if line["action"] == "nexus node start"] == [["clu"], ["clu"]]
    assert verify(home).faults == ()


def test_Q12_a_full_disk_refuses_a_start_but_no_stop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nexus("key", "create", "first")
    done: list[str] = []
    monkeypatch.setattr(running, "ensure_up", lambda *_: done.append("up"))
    monkeypatch.setattr(bootstrap, "stop", lambda *_: done.append("down"))
    monkeypatch.setattr(audit, "write_all", no_space)
    nexus("up", code=1)
    assert "nexus down is not recorded: the audit record cannot be written" in nexus("down")
    (home / "audit-key").chmod(0o644)
    assert "nexus node stop is not recorded: other users of this machine may read" in nexus("node", "stop")
    nexus("up", code=1)
    assert done == ["down", "down"]


def test_Q12_a_full_disk_refuses_commands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nexus("key", "create", "first")
    monkeypatch.setattr(audit, "write_all", no_space)
    nexus("key", "create", "second", code=1)
    ring = KeyRing(home)
    assert [key.name for key in ring.list()] == ["first"]
    ring.close()


def test_a_command_that_fails_says_why(home: Path) -> None:
    with pytest.raises(NotFound), recorded(load_config(), "nexus x", "o"):
        raise NotFound("no")
    with pytest.raises(ZeroDivisionError), recorded(load_config(), "nexus x"):
        raise ZeroDivisionError
    assert [(line["verdict"], line.get("reason")) for line in read(home)] == [
        ("begun", None), ("failed", "not_found"), ("begun", None), ("failed", None),
    ]  # fmt: skip


def write(home: Path, *events: audit.Event) -> None:
    chain = Chain(home)
    chain.append(events, durable=True)


def test_verify_names_the_line_and_exits_with_1(home: Path) -> None:
    nexus("audit", "verify", code=1)
    write(home, *(audit.Event("answer", tenant=f"t{number}") for number in range(3)))
    said = nexus("audit", "verify")
    assert "3 lines in 1 files, whole; head 3:" in said
    head = said.split()[-1]
    assert json.loads(nexus("audit", "verify", "--json", "--head", head))["whole"] is True
    (file,) = files_of(home)
    file.write_bytes(file.read_bytes().replace(b'"t1"', b'"t9"'))
    assert f"{file.name}:2: edited: " in nexus("audit", "verify", code=1)
    told = json.loads(nexus("audit", "verify", "--json", code=1))
    assert [(fault["what"], fault["line"]) for fault in told["faults"]] == [("edited", 2)]
    for wrong in ("3", "x:" + "0" * 64, "3:00", "9" * 99 + ":" + "0" * 64):
        nexus("audit", "verify", "--head", wrong, code=1)


def test_show_filters(home: Path) -> None:
    write(
        home,
        *(
            audit.Event(kind, tenant=tenant, subject=subject)
            for kind in ("answer", "denied")
            for tenant in "ab"
            for subject in "xy"
        ),
    )

    def shown(*options: str) -> list[str]:
        return [
            line["kind"][0] + line["tenant"] + line["subject"]
            for line in json.loads(nexus("audit", "show", "--json", *options))
        ]

    assert shown() == ["aax", "aay", "abx", "aby", "dax", "day", "dbx", "dby"]
    assert shown("--tenant", "a", "--kind", "denied") == ["dax", "day"]
    assert shown("--subject", "y", "--limit", "2") == ["day", "dby"]
    assert shown("--since", "2000-01-01") == shown()
    assert shown("--until", "2000-01-01") == shown("--since", "2999-01-01T00:00") == []
    assert len(nexus("audit", "show").splitlines()) == 8


def test_Q4_a_terminal_is_not_steered_by_what_was_recorded(home: Path) -> None:
    write(home, audit.Event("denied", "GET /\x1b[2J\r\nforged", subject="\u202eroot", reason="é"))
    said = nexus("audit", "show")
    assert said.count("\n") == 1 and "\x1b" not in said and "\r" not in said and "\u202e" not in said
    assert "\\x1b[2J" in said and "é" in said


def test_LLM05_export_is_formula_safe_and_bounded_in_time(home: Path, tmp_path: Path) -> None:
    write(home, audit.Event("denied", subject="=cmd|' /C calc'!A0", objects=["@x"]), audit.Event("answer"))
    out = tmp_path / "out.csv"
    nexus("audit", "export", "--format", "csv", "--out", str(out))
    assert out.stat().st_mode & 0o077 == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text(), newline="")))
    assert [row["subject"] for row in rows] == ["'=cmd|' /C calc'!A0", ""]
    assert rows[0]["objects"] == "'@x"
    jsonl = nexus("audit", "export").splitlines()
    assert [json.loads(line)["kind"] for line in jsonl] == ["denied", "answer"]
    assert nexus("audit", "export", "--until", "2000-01-01") == ""
    nexus("audit", "export", "--out", str(tmp_path), code=1)
