"""OWASP's API risks and row Q14, at the front door: browsers, hosts, properties, objects, and what upstreams answer.

Rows that are proven elsewhere:
    API1   other tenants' rows in searches, answers, counts: tests/test_access.py, tests/test_gateway.py
    API2   credentials: tests/test_gateway.py (wrong keys), tests/test_access.py
    API4   bounds: tests/test_bounds.py, tests/test_poison.py, tests/test_uploads.py
    API5, API9   permissions and addresses: tests/test_permissions.py; ports: tests/system/test_system.py
    API7   pictures by URL (Q5): tests/test_image_hosts.py, tests/test_images.py
    API10  models that answer nonsense: tests/test_models_remote.py, tests/test_triton.py, tests/test_embedding.py
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from deployments import gateway
from deployments.gateway import Lent
from deployments.middleware import SAFE_HEADERS
from nexus.config import Config, Http
from nexus.errors import UpstreamInvalid
from tests.conftest import Door
from tests.raw import ask
from tests.routes import ROUTES

MANUAL = "# Gripper\n\nThe gripper closes with a torque of 4 N·m. Canary zanzibar-4711.\n"


@pytest.fixture(scope="module")
def door(shared_door: Door) -> Door:
    return shared_door


@dataclass(frozen=True)
class Theirs:
    """What another tenant has, by the names of the parameters that lead to it."""

    document_id: str
    job_id: str
    session_id: str
    model: str = "missing"
    number: str = "0"


@pytest.fixture(scope="module")
def theirs(door: Door) -> Theirs:
    body = {"filename": "ours.md", "content": "# Lamp\n\nThe lamp is green."}
    door.client.post("/rag/add_document", json=body, headers=door.headers("ours"))
    headers = door.headers("theirs", "owner")
    receipt = door.client.post(
        "/rag/add_document", json={"filename": "theirs.md", "content": MANUAL, "collection": "theirs"}, headers=headers
    ).json()
    gone = door.client.post(
        "/rag/add_document", json={"filename": "gone.md", "content": MANUAL}, headers=headers
    ).json()
    door.client.delete(f"/rag/documents/{gone['document_id']}", headers=headers)
    door.client.post("/mcp/a-session/add_context", json={"content": MANUAL}, headers=headers)
    return Theirs(receipt["document_id"], receipt["job_id"], "a-session")


OURS = {"document_id": "0" * 32, "job_id": "0" * 32, "session_id": "another-session"}
OBJECTS = [route for route in ROUTES if any(f"{{{name}" in route.path for name in OURS)]


@pytest.mark.parametrize("route", OBJECTS, ids=str)
def test_API1_another_tenants_object_is_as_one_that_is_not_there(door: Door, theirs: Theirs, route: Any) -> None:
    """The same status, and the same words but for the id that was asked for."""
    headers = {**door.headers("ours", "stranger"), "x-request-id": "the-same-one"}
    bodies = {"content": "ours"} if "add_context" in route.path else {"input": "What is the torque of the gripper?"}
    answers = []
    for ids in ({field.name: getattr(theirs, field.name) for field in fields(theirs)}, {"number": "0", **OURS}):
        path = route.path.replace(":path}", "}").format(**ids)
        body = bodies if route.has_body else None
        answer = door.client.request(route.method, path, json=body, headers=headers)
        assert "zanzibar" not in answer.text and "theirs.md" not in answer.text
        said = answer.text
        for one in ids.values():
            said = said.replace(one, "ID") if len(one) > 8 else said
        answers.append((answer.status_code, said))
    assert answers[0] == answers[1]
    by_session = "session_id" in route.path  # a session of that name is ours, and empty
    assert answers[0][0] in ((200,) if by_session or "deletions" in route.path else (404, 415))


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/rag/documents", None), ("GET", "/rag/documents?collection=theirs", None), ("GET", "/rag/jobs", None),
        ("GET", "/rag/deletions", None),
        ("POST", "/rag/search", {"query": "gripper torque canary", "explain": True}),
        ("POST", "/rag/search", {"query": "gripper torque", "filters": {"source": "theirs.md"}}),
        ("POST", "/rag/query", {"query": "What is the torque of the gripper?", "session_id": "a-session"}),
        ("POST", "/mcp/a-session/query", {"input": "What is the torque of the gripper?"}),
        ("GET", "/mcp/a-session/get_context", None),
        ("POST", "/v1/chat/completions",
         {"model": "nexus-rag", "messages": [{"role": "user", "content": "What is the torque of the gripper?"}]}),
    ],
)  # fmt: skip
def test_API1_nothing_listed_or_answered_is_another_tenants(
    door: Door, theirs: Theirs, method: str, path: str, body: Any
) -> None:
    answer = door.client.request(method, path, json=body, headers=door.headers("ours", "stranger"))
    assert answer.status_code == 200, answer.text
    for word in ("zanzibar", "theirs.md", "gone.md", theirs.document_id, theirs.job_id, "4 N·m"):
        assert word not in answer.text


@pytest.mark.parametrize("field", ["tenant", "tenant_id", "owner", "reader", "document_id", "epoch", "created_at"])
def test_API3_a_document_is_not_given_away_by_its_sender(door: Door, field: str) -> None:
    body = {"filename": "a.md", "content": MANUAL, field: "theirs"}
    answer = door.client.post("/rag/add_document", json=body, headers=door.headers("ours"))
    assert answer.status_code == 400
    assert [one["pointer"] for one in answer.json()["errors"]] == [f"/{field}"]


def test_API3_an_answer_has_only_the_fields_that_are_written_down(door: Door) -> None:
    headers = door.headers("fields")
    receipt = door.client.post(
        "/rag/add_document", json={"filename": "a.md", "content": MANUAL}, headers=headers
    ).json()
    assert set(receipt) == {"message", "document_id", "version", "title", "chunks", "sequence", "job_id"}
    shown = door.client.get(f"/rag/documents/{receipt['document_id']}", headers=headers).json()
    assert set(shown) == {
        "document_id", "version", "collection", "source", "title", "media_type", "metadata", "readers", "bytes",
        "chunks", "sequence", "created_at",
    }  # fmt: skip
    (hit,) = door.client.post("/rag/search", json={"query": "gripper"}, headers=headers).json()["hits"]
    assert set(hit) == {
        "document_id", "chunk_id", "score", "text", "title", "source", "heading", "page", "lines", "metadata",
    }  # fmt: skip
    inside = ("hash", "vector", "embedding", "tenant", "epoch", "audience", "digest")
    assert not [word for word in inside for one in (receipt, shown, hit) if word in one]


# ── API8 and Q14: what browsers are tricked into ────────────────────────────────────────────────


def behind(door: Door, **http: Any) -> TestClient:
    """The same door with other settings of `http`."""
    lent = {field.name: getattr(door.lent, field.name) for field in fields(Lent)}
    config = Config(home=door.lent.config.home, http={"allowed_hosts": ["testserver"], **http})
    return TestClient(gateway.build(Lent(**{**lent, "config": config})), raise_server_exceptions=False)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:8000", "localhost.", "",
        "0.0.0.0", "[::]", "127.0.0.1@evil.example", "evil.example#localhost", "localhost:80:80",
        "localhost, evil.example", "127.1", "2130706433", "0x7f.1",
        "[::ffff:127.0.0.1]", "testserver.", "TESTSERVER.evil", "localhost:٨٠",
    ],
)  # fmt: skip
def test_Q14_a_host_that_is_not_ours_is_refused(door: Door, host: str) -> None:
    encoded = host.encode().decode("latin-1")
    for path in ("/livez", "/rag/documents", "/v1/models"):
        answer = ask(door, "GET", path, {**door.headers(), "host": encoded})
        assert answer.status == 400
        assert b"host_not_allowed" in answer.body and answer.headers["cache-control"] == "no-store"
        assert b"evil" not in answer.body


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LocalHost:9", "[::1]", "[::1]:8000", "testserver"]
)
def test_Q14_loopback_and_the_names_in_the_settings_are_ours(door: Door, host: str) -> None:
    assert ask(door, "GET", "/rag/documents", {**door.headers(), "host": host}).status == 200


def test_Q14_two_hosts_are_none(door: Door) -> None:
    client = behind(door)
    headers = [("host", "localhost"), ("host", "evil.example")]
    assert client.get("/livez", headers=headers).status_code == 400


def test_Q14_the_address_that_is_listened_on_is_ours(door: Door) -> None:
    client = behind(door, host="10.1.2.3", behind_tls=True)
    assert client.get("/livez", headers={"host": "10.1.2.3:8000"}).status_code == 200
    assert client.get("/livez", headers={"host": "10.1.2.4:8000"}).status_code == 400


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example", "null", "http://testserver.evil.example", "http://testserver@evil.example", "file://",
        "http://testserver:81", "https://localhost", "", "chrome-extension://abc", "HTTP://EVIL.EXAMPLE",
    ],
)  # fmt: skip
def test_Q14_a_page_of_another_origin_may_not_ask(door: Door, origin: str, method: str) -> None:
    headers = {**door.headers(), "origin": origin}
    for path in ("/rag/documents", "/livez"):
        answer = door.client.request(method, path, headers=headers)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert "evil" not in answer.text and answer.headers["cache-control"] == "no-store"


def test_Q14_a_page_of_our_own_may(door: Door) -> None:
    for origin in ("http://testserver", "https://testserver"):
        assert door.client.get("/rag/documents", headers={**door.headers(), "origin": origin}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://athena.example.evil.example"])
def test_API8_a_preflight_of_a_stranger_gets_no_permission(door: Door, origin: str) -> None:
    client = behind(door, allowed_origins=["https://athena.example"])
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = client.options("/rag/search", headers=asked)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_API8_an_origin_in_the_settings_gets_it_but_no_cookies(door: Door) -> None:
    client = behind(door, allowed_origins=["https://athena.example"])
    for method in ("GET", "POST", "PUT", "DELETE"):
        asked = {"origin": "https://athena.example", "access-control-request-method": method}
        answer = client.options("/rag/search", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://athena.example"
        assert "access-control-allow-credentials" not in answer.headers
    answer = client.get("/rag/documents", headers={**door.headers(), "origin": "https://athena.example"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://athena.example"


@pytest.mark.parametrize("kind", ["text/plain", "text/plain;charset=UTF-8", "TEXT/PLAIN", " text/plain ; x=y"])
def test_Q14_json_as_text_is_refused(door: Door, kind: str) -> None:
    body = json.dumps({"query": "gripper"}).encode()
    answer = ask(door, "POST", "/rag/search", {**door.headers(), "content-type": kind}, body)
    assert answer.status == 415


def test_Q14_nothing_is_remembered_in_cookies(door: Door) -> None:
    key = door.headers()["authorization"].removeprefix("Bearer ")
    for name in ("authorization", "api_key", "session", "token", "x-api-key"):
        assert ask(door, "GET", "/rag/documents", {"cookie": f"{name}={key}"}).status == 401
    assert "set-cookie" not in door.client.get("/rag/documents", headers=door.headers()).headers


@pytest.mark.parametrize("method", ["TRACE", "TRACK", "CONNECT", "PROPFIND", "get", "G ET"])
def test_API8_methods_that_nothing_here_has_are_refused(door: Door, method: str) -> None:
    answer = ask(door, method, "/rag/documents", {**door.headers(), "x-secret": "zanzibar"})
    assert answer.status == 405
    assert b"zanzibar" not in answer.body and answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/livez", 200), ("GET", "/readyz", 200), ("GET", "/metrics", 200), ("GET", "/openapi.json", 200),
        ("GET", "/rag/documents", 200), ("GET", "/nowhere", 404), ("PATCH", "/rag/documents", 405),
        ("GET", "/v1/models", 200), ("OPTIONS", "/rag/documents", 405), ("HEAD", "/livez", 405),
    ],
)  # fmt: skip
def test_API8_every_answer_tells_browsers_to_do_nothing_with_it(
    door: Door, method: str, path: str, status: int
) -> None:
    answer = door.client.request(method, path, headers=door.headers())
    assert answer.status_code == status
    assert {name: answer.headers.get(name) for name in SAFE_HEADERS} == SAFE_HEADERS
    assert answer.headers["cache-control"] == "no-store"
    assert not {"server", "x-powered-by", "x-aspnet-version"} & set(answer.headers)
    assert "html" not in answer.headers["content-type"]


def test_API8_a_stream_says_the_same(door: Door) -> None:
    headers = door.headers("streams")
    door.client.post("/rag/add_document", json={"filename": "a.md", "content": MANUAL}, headers=headers)
    answer = door.client.post("/rag/query", json={"query": "What torque?", "stream": True}, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert {name: answer.headers.get(name) for name in SAFE_HEADERS} == SAFE_HEADERS
    assert answer.headers["cache-control"] == "no-store"


# ── API8: TLS, and what is refused at the start ─────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "192.168.1.2", "nexus.example", "127.0.0.2", "::2"])
def test_API8_listening_beyond_loopback_without_tls_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match=r"not loopback.*http\.behind_tls"):
        Http(host=host)
    assert Http(host=host, behind_tls=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_API8_loopback_needs_no_tls(host: str) -> None:
    assert Http(host=host).is_loopback


@pytest.mark.parametrize("host", ["", "a b", "host/path", "host\n", "user@host", "*"])
def test_API8_a_host_is_an_address_or_a_name(host: str) -> None:
    with pytest.raises(ValueError, match="host"):
        Http(host=host, behind_tls=True)


@pytest.mark.parametrize("name", ["*", "*.example", "https://a.example", "a.example:443", "", "A.example"])
def test_API8_no_pattern_is_taken_for_a_host(name: str) -> None:
    with pytest.raises(ValueError, match="allowed_hosts"):
        Http(allowed_hosts=(name,))


@pytest.mark.parametrize("origin", ["*", "null", "https://*.example", "a.example", "https://a.example/", "file://x"])
def test_API8_no_pattern_is_taken_for_an_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="allowed_origins"):
        Http(allowed_origins=(origin,))


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000"), ("10.0.0.5", "http://10.0.0.5:8000")],
)
def test_the_command_line_finds_whoever_listens_on_every_address(tmp_path: Path, host: str, url: str) -> None:
    assert Config(home=tmp_path, http={"host": host, "behind_tls": True}).url == url


# ── API10: what upstreams answer ────────────────────────────────────────────────────────────────


def test_API10_a_vector_store_that_gives_another_tenants_rows_gives_them_nobody(
    door: Door, theirs: Theirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = door.headers("ours", "stranger")
    door.client.post("/rag/add_document", json={"filename": "ours.md", "content": MANUAL}, headers=headers)
    vectors = door.house.hades.vectors
    everything = [(chunk_id, 1.0) for index in _indexes(door) for chunk_id in sorted(vectors.chunk_ids(index))]
    assert len(everything) >= 2
    for route in ("search_dense", "search_text"):
        monkeypatch.setattr(vectors, route, lambda *_: everything)
    answer = door.client.post("/rag/search", json={"query": "gripper torque", "k": 100}, headers=headers)
    assert {hit["source"] for hit in answer.json()["hits"]} == {"ours.md"}


def _indexes(door: Door) -> set[str]:
    return {collection.index for collection in door.house.hades.documents.collections()}


@pytest.mark.parametrize("row", [["no such chunk"], [""], ["x" * 10_000]], ids=["unknown", "empty", "long"])
def test_API10_a_vector_store_that_makes_rows_up_gives_nothing(
    door: Door, theirs: Theirs, monkeypatch: pytest.MonkeyPatch, row: Sequence[str]
) -> None:
    vectors = door.house.hades.vectors
    for route in ("search_dense", "search_text"):
        monkeypatch.setattr(vectors, route, lambda *_: [(one, 1.0) for one in row])
    answer = door.client.post("/rag/search", json={"query": "gripper"}, headers=door.headers("theirs"))
    assert (answer.status_code, answer.json()["hits"]) == (200, [])


@pytest.mark.parametrize(
    "spoil",
    [lambda rows: rows * np.nan, lambda rows: rows * np.inf, lambda rows: rows * 0, lambda rows: rows[:, :-1],
     lambda rows: rows[:-1], lambda rows: rows * 2],
    ids=["NaN", "infinity", "zero", "another dimension", "too few", "not of unit length"],
)  # fmt: skip
def test_API10_an_embedder_that_answers_nonsense_is_502_and_nothing_is_stored(
    door: Door, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any]
) -> None:
    headers = door.headers("nonsense")
    embed = door.house.embedder.embed
    monkeypatch.setattr(door.lent.ingestor.steps, "embedder", lambda *given: spoil(np.asarray(embed(*given))))
    answer = door.client.post("/rag/add_document", json={"filename": "a.md", "content": MANUAL}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (502, "upstream_invalid"), answer.text
    assert door.client.get("/rag/documents", headers=headers).json()["documents"] == []


def test_API10_a_model_that_answers_nonsense_is_502(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nonsense(*_: object) -> None:
        raise UpstreamInvalid("the embedder 'word-embedder' answered no vectors")

    monkeypatch.setattr(door.lent.embedders["word-embedder"], "embed", nonsense)
    body = {"model": "word-embedder", "input": "gripper"}
    answer = door.client.post("/v1/embeddings", json=body, headers=door.headers())
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_invalid")
