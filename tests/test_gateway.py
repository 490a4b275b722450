"""The front door in one process: every route's good answer, and what bad input gets."""

import asyncio
import base64
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from deployments import middleware
from deployments.gateway import Lent, build
from nexus.errors import Overloaded, Unavailable
from tests.conftest import Door

MANUAL = "# Gripper\n\nThe gripper closes with a torque of 4 N·m. The gripper opens in two seconds.\n"

PROBLEM = {"type", "title", "status", "detail", "instance", "code", "request_id"}


def add(
    door: Door, name: str = "gripper.md", content: str = MANUAL, headers: dict | None = None, **fields: object
) -> dict:
    body = {"filename": name, "content": content, **fields}
    answer = door.client.post("/rag/add_document", json=body, headers=headers or door.headers())
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def check_problem(answer: object, status: int, path: str) -> dict:
    """RFC 9457, with a request id, and nothing of the inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert set(body) - {"errors"} == PROBLEM
    assert (body["status"], body["instance"]) == (status, path)
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return body


# ── documents ───────────────────────────────────────────────────────────────────────────────────


def test_a_document_is_added_found_listed_and_deleted(door: Door) -> None:
    headers = door.headers()
    receipt = add(door, headers=headers, metadata={"robot": "HX-3"})
    assert set(receipt) >= {"message", "document_id", "version", "chunks", "sequence"}
    assert receipt["chunks"] >= 1 and receipt["sequence"] == 1
    path = f"/rag/documents/{receipt['document_id']}"
    shown = door.client.get(path, headers=headers).json()
    assert (shown["title"], shown["source"], shown["metadata"]) == ("Gripper", "gripper.md", {"robot": "HX-3"})
    assert [d["document_id"] for d in door.client.get("/rag/documents", headers=headers).json()["documents"]] == [
        receipt["document_id"]
    ]
    gone = door.client.delete(path, headers=headers)
    assert (gone.status_code, gone.json()["deleted"], gone.json()["sequence"]) == (200, True, 2)
    assert door.client.get(path, headers=headers).status_code == 404
    assert door.client.delete(path, headers=headers).status_code == 404
    assert door.client.post("/rag/search", json={"query": "gripper"}, headers=headers).json()["hits"] == []


def test_the_versions_of_a_document_say_when_a_search_found_them(door: Door) -> None:
    headers = door.headers()
    first, second = add(door, headers=headers), add(door, content="# Gripper\n\nIt opens.", headers=headers)
    path = f"/rag/documents/{first['document_id']}/versions"
    latest, former = door.client.get(path, headers=headers).json()["versions"]
    assert (latest["version"], latest["sequence"], latest["until"]) == (second["version"], 2, None)
    assert (former["version"], former["sequence"], former["until"]) == (first["version"], 1, 2)
    assert door.client.get(path, headers=door.headers("other")).status_code == 404


def test_unchanged_content_is_200_with_the_same_ids(door: Door) -> None:
    headers = door.headers()
    first = add(door, headers=headers)
    again = door.client.post("/rag/add_document", json={"filename": "gripper.md", "content": MANUAL}, headers=headers)
    assert again.status_code == 200
    assert {k: again.json()[k] for k in ("document_id", "version", "chunks", "sequence")} == {
        k: first[k] for k in ("document_id", "version", "chunks", "sequence")
    }


def test_changed_content_is_a_new_version_of_the_same_document(door: Door) -> None:
    headers = door.headers()
    first, second = add(door, headers=headers), add(door, headers=headers, content="# Gripper\n\nIt was replaced.\n")
    assert first["document_id"] == second["document_id"] and first["version"] != second["version"]


def test_a_form_with_a_file_is_a_document(door: Door) -> None:
    answer = door.client.post(
        "/rag/add_document", files={"file": ("gripper.md", MANUAL.encode(), "text/markdown")},
        data={"filename": "folder/gripper.md", "metadata": '{"robot": "HX-3"}', "collection": "arms"},
        headers=door.headers(),
    )  # fmt: skip
    assert answer.status_code == 201
    shown = door.client.get(f"/rag/documents/{answer.json()['document_id']}", headers=door.headers()).json()
    assert (shown["source"], shown["collection"], shown["metadata"]) == ("folder/gripper.md", "arms", {"robot": "HX-3"})


def test_listing_pages(door: Door) -> None:
    headers = door.headers()
    for n in range(3):
        add(door, f"{n}.md", headers=headers)
    first = door.client.get("/rag/documents?limit=2", headers=headers).json()
    second = door.client.get(f"/rag/documents?limit=2&after={first['next']}", headers=headers).json()
    assert (len(first["documents"]), len(second["documents"]), second["next"]) == (2, 1, None)


@pytest.mark.parametrize(
    ("name", "content", "status", "words"),
    [
        ("empty.md", "", 422, "empty"),
        ("blank.md", "  \n \n", 422, ""),
        ("x\x00y.md", MANUAL, 422, "control"),
        (" ", MANUAL, 422, "name"),
        ("n" * 2000, MANUAL, 422, ""),
        ("big.md", "x" * (2 * 2**20), 413, "at most"),
    ],
)
def test_documents_that_cannot_be_taken(door: Door, name: str, content: str, status: int, words: str) -> None:
    answer = door.client.post("/rag/add_document", json={"filename": name, "content": content}, headers=door.headers())
    assert words in check_problem(answer, status, "/rag/add_document")["detail"]


def test_binary_files_are_refused_with_what_can_be_read(door: Door) -> None:
    files = {"file": ("tool.bin", b"\x7fELF\x02\x01\x01" + bytes(200), "application/octet-stream")}
    answer = door.client.post("/rag/add_document", files=files, headers=door.headers())
    assert "Markdown" in check_problem(answer, 415, "/rag/add_document")["detail"]


def test_names_are_labels_and_never_paths(door: Door) -> None:
    headers = door.headers()
    for name in ("../../etc/passwd.md", "/etc/passwd.md", "C:\\x.md", "..\\..\\x.md", "%2e%2e%2f.md", "emoji😀.md"):
        receipt = add(door, name, headers=headers)
        shown = door.client.get(f"/rag/documents/{receipt['document_id']}", headers=headers).json()
        assert shown["source"] == name


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 422),
        (b'{"filename": "a.md"}', "application/json", 422),
        (b'{"filename": "a.md", "content": "x", "owner": "me"}', "application/json", 400),
        (b'{"filename": "a.md", "content": "\\ud800"}', "application/json", 400),
        (b'{"filename": "a.md", "content": "x", "collection": "../x"}', "application/json", 422),
        (b"text", "text/plain", 415),
        (b"--x", "multipart/form-data", 400),
    ],
)
def test_bodies_that_are_not_documents(door: Door, content: bytes, kind: str, status: int) -> None:
    headers = {**door.headers(), "content-type": kind}
    check_problem(door.client.post("/rag/add_document", content=content, headers=headers), status, "/rag/add_document")


def test_form_fields_are_checked(door: Door) -> None:
    headers = door.headers()
    file = {"file": ("a.md", MANUAL.encode())}
    for data in (
        {"metadata": "{"},
        {"owner": "me"},
        {"metadata": "[1]"},
        {"metadata": json.dumps({"k": "x" * 20_000})},
    ):
        answer = door.client.post("/rag/add_document", files=file, data=data, headers=headers)
        assert answer.status_code == 422, (data, answer.text)
    assert door.client.post("/rag/add_document", data={"filename": "a"}, headers=headers).status_code in (415, 422)


# ── searches and answers ────────────────────────────────────────────────────────────────────────


def test_a_search_has_hits_and_a_sequence(door: Door) -> None:
    headers = door.headers()
    receipt = add(door, headers=headers, metadata={"robot": "HX-3"})
    body = door.client.post("/rag/search", json={"query": "gripper torque", "k": 3}, headers=headers).json()
    (hit,) = body["hits"]
    assert (
        set(hit) >= {"document_id", "chunk_id", "score", "text", "title", "source", "metadata"} and "routes" not in hit
    )
    assert (hit["document_id"], hit["title"], hit["metadata"]) == (receipt["document_id"], "Gripper", {"robot": "HX-3"})
    assert body["sequence"] == 1


def test_explain_shows_routes_and_candidates(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    body = door.client.post("/rag/search", json={"query": "gripper", "explain": True}, headers=headers).json()
    assert set(body["hits"][0]["routes"]) == {"dense", "text"}
    assert body["hits"][0]["routes"]["text"]["rank"] == 1
    assert body["explain"]["candidates"][0]["removed_by"] is None


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"query": ""}, 422), ({"k": 0}, 422), ({"k": 10**9}, 422), ({"k": "ten"}, 422), ({"unknown": 1}, 400),
        ({"hybrid": {"embedding_weight": 2}}, 422), ({"hybrid": {"embedding_weight": 0, "text_weight": 0}}, 422),
        ({"filters": {"type": "like", "key": "a", "value": "%"}}, 422), ({"filters": []}, 422), ({"as_of": -1}, 422),
        ({"as_of": 99}, 422), ({"collection": "nowhere"}, 404), ({"collection": "../x"}, 422),
        ({"query": "x" * 9000}, 422),
        ({"hybrid": {"embedding_weight": float("nan")}}, 422), ({"query": None}, 422),
    ],
)  # fmt: skip
def test_searches_that_cannot_be_meant(door: Door, fields: dict, status: int) -> None:
    headers = {**door.headers(), "content-type": "application/json"}
    add(door)
    body = json.dumps({"query": "gripper", **fields})
    answer = door.client.post("/rag/search", content=body, headers=headers)
    problem = check_problem(answer, status, "/rag/search")
    assert status == 404 or problem["errors"][0]["pointer"].startswith("/")


def test_an_answer_has_sources_that_say_whether_they_were_cited(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    body = door.client.post(
        "/rag/query", json={"query": "What torque does the gripper close with?"}, headers=headers
    ).json()
    assert set(body) >= {"query", "response", "sources", "confidence", "abstained", "sequence", "trace_id"}
    assert "4 N·m" in body["response"] and not body["abstained"]
    assert any(source["cited"] for source in body["sources"])
    assert 0 <= body["confidence"] <= 1


def test_a_question_the_documents_do_not_answer_is_declined_with_a_reason(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    body = door.client.post(
        "/rag/query", json={"query": "Who won the chess championship of 1972?"}, headers=headers
    ).json()
    assert body["abstained"] and body["reason"] and not any(source["cited"] for source in body["sources"])


def test_an_abstention_has_a_reason_however_strict_the_setting(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    fields = {name: getattr(door.lent, name) for name in door.lent.__dataclass_fields__}
    strict = TestClient(build(Lent(**{**fields, "rag": replace(door.lent.rag, abstain_below=1.0)})))
    question = {"query": "What torque does the gripper close with?"}
    body = strict.post("/rag/query", json=question, headers=headers).json()
    assert body["abstained"] and body["reason"]


def test_a_streamed_answer_ends_with_the_whole(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    question = {"query": "What torque does the gripper close with?"}
    whole = door.client.post("/rag/query", json=question, headers=headers).json()
    answer = door.client.post("/rag/query", json={**question, "stream": True}, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    *deltas, last, done = events
    assert done == "[DONE]"
    assert "".join(json.loads(d)["delta"] for d in deltas) == whole["response"] == json.loads(last)["response"]
    assert json.loads(last)["sources"] == whole["sources"]


def test_errors_before_a_stream_have_a_status(door: Door) -> None:
    body = {"query": "x", "stream": True, "collection": "nowhere"}
    check_problem(door.client.post("/rag/query", json=body, headers=door.headers()), 404, "/rag/query")


# ── sessions ────────────────────────────────────────────────────────────────────────────────────


def test_a_session_keeps_its_context_until_it_is_cleared(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    for text in ("The robot is HX-3.", "It stands in bay 4."):
        answer = door.client.post("/mcp/s1/add_context", json={"content": text}, headers=headers)
        assert answer.status_code == 200 and answer.json()["message"]
    context = door.client.get("/mcp/s1/get_context", headers=headers).json()
    assert context == {"session_id": "s1", "context": "The robot is HX-3.\nIt stands in bay 4."}
    body = door.client.post(
        "/mcp/s1/query", json={"input": "What torque does the gripper close with?"}, headers=headers
    ).json()
    assert set(body) >= {"session_context", "retrieved_documents", "response", "sources", "confidence"}
    assert body["session_context"] == context["context"] and "4 N·m" in body["response"]
    assert door.client.delete("/mcp/s1/clear_context", headers=headers).json()["message"]
    assert door.client.get("/mcp/s1/get_context", headers=headers).json()["context"] == ""


def test_sessions_belong_to_their_tenant(door: Door) -> None:
    door.client.post("/mcp/s1/add_context", json={"content": "secret"}, headers=door.headers("acme"))
    assert door.client.get("/mcp/s1/get_context", headers=door.headers("other")).json()["context"] == ""


@pytest.mark.parametrize("session_id", ["a/b", "..%2fx", "a%2Fb", "x" * 200, "a b", "%00", "-x", "é"])
def test_session_ids_that_are_none(door: Door, session_id: str) -> None:
    answer = door.client.get(f"/mcp/{session_id}/get_context", headers=door.headers())
    assert answer.status_code == 422 and "session id" in answer.json()["detail"]


# ── OpenAI ──────────────────────────────────────────────────────────────────────────────────────


def check_openai_error(answer: object, status: int, kind: str) -> dict:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["type"] == kind
    assert answer.headers["x-request-id"]
    return answer.json()["error"]


def chat(door: Door, headers: dict, **fields: object) -> object:
    body = {"model": "nexus-rag", "messages": [{"role": "user", "content": "What torque does the gripper close with?"}]}
    return door.client.post("/v1/chat/completions", json={**body, **fields}, headers=headers)


def test_chat_answers_from_the_documents_with_sources(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    body = chat(door, headers).json()
    assert body["object"] == "chat.completion" and body["choices"][0]["finish_reason"] == "stop"
    assert "4 N·m" in body["choices"][0]["message"]["content"]
    assert body["sources"][0]["cited"] and body["usage"]["total_tokens"] > 0


def test_a_streamed_chat_has_role_first_sources_last_and_usage_if_asked(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    whole = chat(door, headers).json()
    answer = chat(door, headers, stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line and line != "data: [DONE]"]
    assert answer.text.endswith("data: [DONE]\n\n")
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    content = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert content == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-2]["sources"] == whole["sources"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert len({(c["id"], c["created"]) for c in chunks}) == 1


def test_collections_are_models(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers, collection="arms")
    names = [model["id"] for model in door.client.get("/v1/models", headers=headers).json()["data"]]
    assert {"nexus-rag", "nexus-rag/arms", "word-embedder"} <= set(names)
    assert door.client.get("/v1/models/nexus-rag/arms", headers=headers).json()["id"] == "nexus-rag/arms"
    assert "4 N·m" in chat(door, headers, model="nexus-rag/arms").text
    for model in ("nexus-rag/nowhere", "gpt-4", "nexus-rag/", "nexus-rag/../x"):
        error = check_openai_error(chat(door, headers, model=model), 404, "not_found_error")
        assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": 1}, {"messages": []}, {"temperature": 9}, {"n": 2}, {"tools": []}, {"messages": "hello"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "  "}]}, {"max_tokens": 0},
    ],
)  # fmt: skip
def test_chats_that_cannot_be_meant(door: Door, fields: dict) -> None:
    check_openai_error(chat(door, door.headers(), **fields), 400, "invalid_request_error")


def test_embeddings_as_numbers_and_as_base64_are_the_same(door: Door) -> None:
    headers = door.headers()
    body = {"model": "word-embedder", "input": ["gripper torque", "wheel"]}
    numbers = door.client.post("/v1/embeddings", json=body, headers=headers).json()
    encoded = door.client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}, headers=headers).json()
    for one, other in zip(numbers["data"], encoded["data"], strict=True):
        decoded = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_allclose(one["embedding"], decoded, rtol=1e-6)
    assert numbers["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"model": "x"}, 404), ({"input": []}, 400), ({"input": ""}, 400), ({"input": [" "]}, 400),
     ({"input": [[1, 2]]}, 400), ({"dimensions": 3}, 400), ({"encoding_format": "hex"}, 400),
     ({"input": ["x"] * 3000}, 400)],
)  # fmt: skip
def test_embeddings_that_cannot_be_made(door: Door, fields: dict, status: int) -> None:
    body = {"model": "word-embedder", "input": "gripper", **fields}
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    check_openai_error(door.client.post("/v1/embeddings", json=body, headers=door.headers()), status, kind)


# ── identity, health, metrics, and whatever goes wrong ──────────────────────────────────────────


def test_every_route_but_health_needs_a_key(door: Door) -> None:
    paths = door.client.get("/openapi.json", headers=door.headers()).json()["paths"]
    tried = 0
    for path, verbs in paths.items():
        for verb in verbs:
            answer = door.client.request(verb, path.replace("{", "").replace("}", ""))
            expected = 200 if path in ("/livez", "/readyz") else 401
            assert answer.status_code == expected, (verb, path)
            if expected == 401:
                assert answer.headers["www-authenticate"].startswith("Bearer")
                tried += 1
    assert tried >= 14


@pytest.mark.parametrize("bad", ["", "nx_", "nx_abc_def_00000000", "Bearer", "é" * 50, "x" * 10_000, "nx_a_b_c_d_e"])
def test_a_wrong_key_is_refused(door: Door, bad: str) -> None:
    for headers in ({"authorization": f"Bearer {bad}".encode()}, {"x-api-key": bad.encode()}):
        check_problem(door.client.get("/rag/documents", headers=headers), 401, "/rag/documents")
    check_openai_error(
        door.client.get("/v1/models", headers={"authorization": f"Bearer {bad}".encode()}), 401, "authentication_error"
    )


def test_both_ways_to_send_a_key_work_and_permissions_hold(door: Door) -> None:
    key, _ = door.keys.create("reader", permissions=frozenset({"documents:read"}))
    assert door.client.get("/rag/documents", headers={"x-api-key": key}).status_code == 200
    answer = door.client.post("/rag/add_document", json={"filename": "a", "content": "b"}, headers={"x-api-key": key})
    assert "documents:write" in check_problem(answer, 403, "/rag/add_document")["detail"]
    check_openai_error(door.client.get("/v1/models", headers={"x-api-key": key}), 403, "permission_error")


def test_another_tenants_document_is_not_found(door: Door) -> None:
    receipt = add(door, headers=door.headers("acme"))
    theirs = door.headers("other")
    path = f"/rag/documents/{receipt['document_id']}"
    for verb in ("GET", "DELETE"):
        foreign = door.client.request(verb, path, headers=theirs).json()
        missing = door.client.request(verb, "/rag/documents/" + "0" * 32, headers=theirs).json()
        assert (
            (foreign["status"], foreign["detail"])
            == (missing["status"], missing["detail"])
            == (404, "no such document")
        )
    assert door.client.post("/rag/search", json={"query": "gripper"}, headers=theirs).status_code == 404
    add(door, "theirs.md", "# Lamp\n\nThe lamp is green.\n", headers=theirs)
    (hit,) = door.client.post("/rag/search", json={"query": "gripper"}, headers=theirs).json()["hits"]
    assert hit["source"] == "theirs.md"


def test_health_is_open_and_tells_the_parts(door: Door) -> None:
    assert door.client.get("/livez").status_code == 200
    assert door.client.get("/readyz").json() == {"status": "ready"}
    assert door.client.get("/readyz?verbose").json()["parts"] == {"documents": "ready"}


def test_a_part_that_is_away_makes_it_not_ready(door: Door) -> None:
    async def away() -> None:
        raise Unavailable("the vector store does not answer")

    door.lent.checks["vectors"] = away
    answer = door.client.get("/readyz?verbose")
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert answer.json()["parts"]["vectors"] == "the vector store does not answer"


def read_metrics(door: Door, headers: dict[str, str]) -> dict[str, float]:
    lines = door.client.get("/metrics", headers=headers).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_metrics_count_exactly(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    before = read_metrics(door, headers)
    for _ in range(3):
        door.client.post("/rag/search", json={"query": "gripper"}, headers=headers)
    door.client.post("/rag/query", json={"query": "gripper torque"}, headers=headers)
    after = read_metrics(door, headers)
    assert (
        after['rag_queries_total{query_type="search"}'] - before.get('rag_queries_total{query_type="search"}', 0) == 3
    )
    count = 'rag_response_duration_seconds_count{query_type="query"}'
    assert after[count] - before.get(count, 0) == 1
    assert after['ingest_documents_total{outcome="done"}'] >= 1 and after["ingest_chunks_total"] >= 1
    assert 'rag_stage_duration_seconds_count{stage="authority"}' in after


def test_each_request_is_counted_once_by_what_its_path_begins_with_and_by_its_status(door: Door) -> None:
    headers = door.headers()
    bare, wrong = {"x-request-id": "a"}, {"authorization": "Bearer wrong"}
    document = {"filename": "a.md", "content": "# Torque\n\nThe gripper needs 4 newton metres."}
    tool = {"name": "search", "arguments": {"query": "a"}}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": tool}
    asked: list[tuple[str, str, dict[str, Any] | None, dict[str, str], tuple[str, str]]] = [
        ("POST", "/rag/add_document", document, headers, ("rag", "201")),
        ("POST", "/rag/search", {"query": "torque"}, headers, ("rag", "200")),
        ("POST", "/rag/query", {"query": "torque", "stream": True}, headers, ("rag", "200")),
        ("POST", "/rag/search", {"query": "torque", "k": -1}, headers, ("rag", "422")),
        ("POST", "/rag/search", {"query": "torque"}, bare, ("rag", "401")),
        ("GET", "/rag/documents/nowhere", None, wrong, ("rag", "401")),
        ("GET", "/rag/nowhere", None, headers, ("rag", "404")),
        ("DELETE", "/rag/search", None, headers, ("rag", "405")),
        ("POST", "/mcp", call, {**headers, "accept": "application/json, text/event-stream"}, ("mcp", "200")),
        ("GET", "/livez", None, {}, ("livez", "200")),
        ("GET", "/livez", None, {"host": "elsewhere"}, ("livez", "400")),
        *((("GET", f"/no{number}where", None, headers, ("other", "404"))) for number in range(20)),
        *((("PATCH", f"//{number}%0a", None, headers, ("other", "404"))) for number in range(20)),
    ]
    before = read_metrics(door, headers)
    for method, path, body, own, (_, status) in asked:
        assert str(door.client.request(method, path, json=body, headers=own).status_code) == status, (method, path)
    after = read_metrics(door, headers)
    grown = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
    wanted = Counter(counted for *_, counted in asked) + Counter({("metrics", "200"): 1})
    requests = {key: value for key, value in grown.items() if key.startswith("http_requests_total")}
    assert requests == {f'http_requests_total{{route="{a}",status="{b}"}}': n for (a, b), n in wanted.items()}
    timed = {key: value for key, value in grown.items() if key.startswith("http_response_duration_seconds_count")}
    assert sum(timed.values()) == len(asked) + 1
    assert grown['rag_queries_total{query_type="search"}'] == 2 and grown['rag_queries_total{query_type="query"}'] == 1


def test_a_request_that_is_given_up_is_counted_as_left(door: Door) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    def left() -> float:
        return middleware.telemetry.http_requests.labels("other", "left")._value.get()  # type: ignore[no-any-return]

    before = left()
    scope = {"type": "http", "path": "/gone", "method": "GET", "headers": []}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(middleware.Counted(app, frozenset())(scope, None, None))  # type: ignore[arg-type]
    assert left() == before + 1


def test_the_request_id_is_the_callers_if_it_is_sane(door: Door) -> None:
    assert door.client.get("/livez", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    for bad in ("a b", "x" * 200, "é".encode(), "<script>"):
        assert door.client.get("/livez", headers={"x-request-id": bad}).headers["x-request-id"] not in ("", bad)


def test_unknown_addresses_and_verbs_have_the_same_shape(door: Door) -> None:
    headers = door.headers()
    check_problem(door.client.get("/nowhere", headers=headers), 404, "/nowhere")
    check_problem(door.client.put("/rag/search", headers=headers), 405, "/rag/search")
    check_openai_error(door.client.get("/v1/nowhere", headers=headers), 404, "not_found_error")
    check_openai_error(door.client.put("/v1/models", headers=headers), 405, "invalid_request_error")


@pytest.mark.parametrize(
    ("fault", "status"), [(Overloaded("every place is taken"), 503), (RuntimeError("secret /etc/x.py"), 500)]
)
def test_faults_inside_become_answers_without_the_inside(door: Door, fault: Exception, status: int) -> None:
    async def fail(*_: object) -> None:
        raise fault

    door.lent.retriever.search = fail  # type: ignore[method-assign]
    answer = door.client.post("/rag/search", json={"query": "x"}, headers=door.headers())
    assert "secret" not in answer.text
    check_problem(answer, status, "/rag/search")
    assert (answer.headers.get("retry-after") is not None) == (status == 503)


def test_a_body_without_a_length_is_cut_off_at_the_limit(door: Door) -> None:
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield b"x" * 2**17

    answer = door.client.post(
        "/rag/add_document", content=endless(), headers={**door.headers(), "content-type": "application/json"}
    )
    check_problem(answer, 413, "/rag/add_document")


def test_browsers_of_other_origins_get_no_permission(door: Door) -> None:
    answer = door.client.get("/livez", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_configured_origins_get_it(door: Door) -> None:
    http = door.lent.config.http.model_copy(update={"allowed_origins": ("https://athena.example",)})
    fields = {name: getattr(door.lent, name) for name in door.lent.__dataclass_fields__}
    lent = Lent(**{**fields, "config": door.lent.config.model_copy(update={"http": http})})
    client = TestClient(build(lent))
    preflight = {"origin": "https://athena.example", "access-control-request-method": "POST"}
    assert (
        client.options("/rag/search", headers=preflight).headers["access-control-allow-origin"]
        == "https://athena.example"
    )
    assert (
        "access-control-allow-origin"
        not in client.options("/rag/search", headers={**preflight, "origin": "null"}).headers
    )
