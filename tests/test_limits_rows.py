"""What takes too much is refused before any work begins: rows of notes/security.md that concern limits.

API4   top_k, page size, filter terms, uploads, embeddings input, graph depth      here; every field: test_bounds.py
API6   key minting, mass export, job spam: per key and per tenant                  here
LLM10  endless generation, long contexts, recursive steps, denial of wallet        here; test_limits.py; test_poison.py
       streams that stop when their reader leaves                                  test_pipelines.py
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from deployments.gateway import build
from deployments.limiting import BULK
from nexus.balancer import Balancer, Member, Weights
from nexus.config import Config
from nexus.jobs import MOST_OPEN_JOBS, Jobs
from nexus.types import Delta, Usage
from tests.conftest import Door
from tests.routes import ROUTES, Route
from tests.test_chat_http import Parrot
from tests.test_gateway import check_openai_error, check_problem
from tests.test_limits import Clock, reopen, stock

BILLION = 10**9
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]
MODEL = {"model": "parrot", "messages": USER}


class Untouched:
    """A part of Nexus for which a request of this file was too much work."""

    sees_images = False
    name = "parrot"

    def __init__(self) -> None:
        self.touched: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def asked(*_: object) -> Any:
            self.touched.append(name)
            raise AssertionError(f"{name} was asked")

        return asked


@pytest.fixture
def idle(door: Door) -> Iterator[TestClient]:
    """A door behind which nobody may be asked to work."""
    part: Any = Untouched()
    stock(door)
    config = door.lent.config
    config = config.model_copy(update={"http": config.http.model_copy(update={"max_body_bytes": 64 * 2**20})})
    lent = replace(
        door.lent, config=config, retriever=part, ingestor=part,
        embedders={"word-embedder": part}, rerankers={"judge": part},
        balancer=Balancer([Member(part, 1.0)], Weights(1, 1, 1), 5), rag=replace(door.lent.rag, retrieve=part),
    )  # fmt: skip
    with TestClient(build(lent), raise_server_exceptions=False, headers=door.headers()) as client:
        yield client
    assert part.touched == []


def conditions(number: int) -> dict[str, Any]:
    return {"type": "or", "filters": [{"type": "eq", "key": "k", "value": n} for n in range(number)]}


def nested(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"type": "eq", "key": "k", "value": 1}
    for _ in range(depth):
        tree = {"type": "and", "filters": [tree]}
    return tree


TOO_MUCH: dict[str, tuple[str, dict[str, Any]]] = {
    "top_k of a search": ("/rag/search", {"query": "x", "k": BILLION}),
    "top_k of a question": ("/rag/query", {"query": "x", "k": BILLION}),
    "a top_k one over the bound": ("/rag/search", {"query": "x", "k": 1001}),
    "a negative top_k": ("/rag/search", {"query": "x", "k": -1}),
    "65 filter terms": ("/rag/search", {"query": "x", "filters": conditions(65)}),
    "20,000 filter terms": ("/rag/query", {"query": "x", "filters": conditions(20_000)}),
    "a filter 400 deep": ("/rag/search", {"query": "x", "filters": nested(200)}),
    "a filter of 257 values": ("/rag/search", {"query": "x", "filters": {"k": list(range(257))}}),
    "a filter value of 1,025 characters": ("/rag/search", {"query": "x", "filters": {"k": "v" * 1025}}),
    "a graph a million deep": ("/rag/search", {"query": "x", "graph": "on", "hops": 10**6}),
    "a graph four deep": ("/rag/query", {"query": "x", "graph": "on", "hops": 4}),
    "a query of 8,193 characters": ("/rag/search", {"query": "x" * 8193}),
    "a session's question of 8,193 characters": ("/mcp/s/query", {"input": "x" * 8193}),
    "weights beyond one": ("/rag/search", {"query": "x", "hybrid": {"embedding_weight": 1e9}}),
    "an as_of beyond all numbers": ("/rag/search", {"query": "x", "as_of": 2**60}),
    "2,049 texts to embed": ("/v1/embeddings", {"model": "word-embedder", "input": ["x"] * 2049}),
    "200,000 texts to embed": ("/v1/embeddings", {"model": "word-embedder", "input": ["x"] * 200_000}),
    "a billion dimensions": ("/v1/embeddings", {"model": "word-embedder", "input": "x", "dimensions": 2**60}),
    "1,001 documents to rank": ("/v1/rerank", {"model": "judge", "query": "x", "documents": ["x"] * 1001}),
    "a document of 65 KiB to rank": ("/v1/rerank", {"model": "judge", "query": "x", "documents": ["x" * 65 * 1024]}),
    "a query of 9 KiB to rank by": ("/v1/rerank", {"model": "judge", "query": "x" * 9 * 1024, "documents": ["x"]}),
    "100,001 files in a job": (
        "/rag/jobs", {"files": [{"filename": "f", "digest": "0" * 32, "size": 1}] * 100_001},
    ),
    "a file of 2^60 bytes announced": (
        "/rag/jobs", {"files": [{"filename": "f", "digest": "0" * 32, "size": 2**60}]},
    ),
    "metadata of 17 KiB": ("/rag/add_document", {"filename": "f", "content": "", "metadata": {"k": "x" * 17_000}}),
    "a file name of 1,025 characters": ("/rag/add_document", {"filename": "f" * 1025, "content": ""}),
    "nine steps": ("/execute", {"protocol_names": ["analysis"] * 9, "initial_data": {"a": 1}}),
    "a thousand steps": ("/execute", {"protocol_names": ["analysis"] * 1000, "initial_data": {"a": 1}}),
    "data of 65 KiB for steps": ("/execute", {"template_name": "analyze_only", "initial_data": {"a": "x" * 66_000}}),
    "a billion tokens": (CHAT, {**MODEL, "max_tokens": BILLION}),
    "a billion tokens, by their other name": (CHAT, {**MODEL, "max_completion_tokens": BILLION}),
    "a billion tokens of text": ("/v1/completions", {"model": "parrot", "prompt": "x", "max_tokens": BILLION}),
    "nine choices": (CHAT, {**MODEL, "n": 9}),
    "a billion choices": ("/v1/completions", {"model": "parrot", "prompt": "x", "n": BILLION}),
    "the best of two": ("/v1/completions", {"model": "parrot", "prompt": "x", "best_of": 2}),
    "2,001 messages": (CHAT, {"model": "parrot", "messages": USER * 2001}),
    "a context of a million characters and one": (
        CHAT, {"model": "parrot", "messages": [{"role": "user", "content": "x" * 2**19}] * 2 + USER},
    ),
    "129 tools": (
        CHAT, {**MODEL, "tools": [{"type": "function", "function": {"name": f"t{n}"}} for n in range(129)]},
    ),
    "17 words to stop at": (CHAT, {**MODEL, "stop": [str(n) for n in range(17)]}),
    "21 log probabilities of each token": (CHAT, {**MODEL, "logprobs": True, "top_logprobs": 21}),
    "301 biased tokens": (CHAT, {**MODEL, "logit_bias": {str(n): 1 for n in range(301)}}),
}  # fmt: skip


@pytest.mark.parametrize("row", TOO_MUCH)
def test_API4_what_takes_too_much_is_refused_before_any_work(idle: TestClient, row: str) -> None:
    path, body = TOO_MUCH[row]
    answer = idle.post(path, json=body)
    if path.startswith("/v1/"):
        check_openai_error(answer, 400, "invalid_request_error")
    else:
        check_problem(answer, 400 if answer.status_code == 400 else 422, path)


PAGES = ("/rag/documents", "/rag/jobs", "/rag/deletions")


@pytest.mark.parametrize("limit", [BILLION, 1001, 0, -1], ids=str)
@pytest.mark.parametrize("path", PAGES)
def test_API4_a_page_has_a_greatest_size(idle: TestClient, path: str, limit: int) -> None:
    check_problem(idle.get(path, params={"limit": limit}), 422, path)


def test_API4_a_page_of_a_jobs_files_has_a_greatest_size(idle: TestClient) -> None:
    path = f"/rag/jobs/{'0' * 32}"
    check_problem(idle.get(path, params={"limit": BILLION}), 422, path)


POSTED = [route for route in ROUTES if route.has_body]


@pytest.mark.parametrize("route", POSTED, ids=str)
def test_API4_a_body_that_is_announced_as_too_large_is_not_read(idle: TestClient, route: Route) -> None:
    headers = {"content-type": "application/json", "content-length": str(10 * 2**30)}
    answer = idle.request(route.method, route.nowhere, content=b"{}", headers=headers)
    assert answer.status_code == 413, answer.text


def test_API4_a_million_filter_terms_are_not_even_parsed(door: Door, idle: TestClient) -> None:
    terms = b",".join([b'{"k":1}'] * 10**6)
    body = b'{"query":"x","filters":{"type":"or","filters":[' + terms + b"]}}"
    kind = {"content-type": "application/json"}
    check_problem(idle.post("/rag/search", content=body, headers=kind), 422, "/rag/search")
    answer = door.client.post("/rag/search", content=body, headers=door.headers() | kind)
    check_problem(answer, 413, "/rag/search")


# API6: many small requests, each of which is allowed


FLOWS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "mass export": ("GET", "/rag/documents", None),
    "job spam": ("POST", "/rag/jobs", {"files": [{"filename": "f", "digest": "0" * 32, "size": 1}]}),
    "documents one by one": ("GET", "/rag/documents/0", None),
    "a conversation without end": ("POST", "/mcp/s/add_context", {"content": "x"}),
    "searches as a scan": ("POST", "/rag/search", {"query": "x"}),
    "models asked for again and again": ("GET", "/v1/models", None),
}


@pytest.mark.parametrize("row", FLOWS)
def test_API6_a_script_is_slowed_down(door: Door, row: str) -> None:
    stock(door)
    client, key = reopen(door, clock := Clock(), requests_per_minute=6), door.headers()
    method, path, body = FLOWS[row]
    statuses = [client.request(method, path, json=body, headers=key).status_code for _ in range(10)]
    assert 429 not in statuses[:6] and statuses[6:] == [429] * 4
    clock.now += 10  # seconds, and there is one more
    statuses = [client.request(method, path, json=body, headers=key).status_code for _ in range(3)]
    assert statuses[0] != 429 and statuses[1:] == [429] * 2


@pytest.mark.parametrize("row", FLOWS)
def test_API6_more_keys_do_not_make_a_tenant_faster(door: Door, row: str) -> None:
    stock(door)
    client = reopen(door, requests_per_minute=3, tenant={"requests_per_minute": 5})
    method, path, body = FLOWS[row]
    keys = [door.headers(name=f"minted-{n}") for n in range(4)]
    statuses = [client.request(method, path, json=body, headers=key).status_code for key in keys for _ in range(3)]
    assert sum(status != 429 for status in statuses) == 5
    assert client.request(method, path, json=body, headers=door.headers("other", "theirs")).status_code != 429


def test_API6_what_is_refused_leaves_nothing_behind(door: Door) -> None:
    client, key = reopen(door, requests_per_minute=1), door.headers()
    body = {"files": [{"filename": "f", "digest": "0" * 32, "size": 1}]}
    assert [client.post("/rag/jobs", json=body, headers=key).status_code for _ in range(4)] == [202, 429, 429, 429]
    assert len(door.client.get("/rag/jobs", headers=key).json()["jobs"]) == 1


def test_API6_a_tenant_has_so_many_open_jobs_and_no_more(door: Door) -> None:
    with closing(Jobs(door.lent.config.home, most_open=2)) as jobs:
        client, key = TestClient(build(replace(door.lent, jobs=jobs))), door.headers()
        body = {"files": [{"filename": "f", "digest": "0" * 32, "size": 1}]}
        answers = [client.post("/rag/jobs", json=body, headers=key) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202, 202, 429]
        assert check_problem(answers[2], 429, "/rag/jobs")["code"] == "too_many_jobs"
        assert answers[2].headers["retry-after"] == "5"
        document = {"filename": "heron.md", "content": "The heron lives in Paris."}
        answer = client.post("/rag/add_document", json=document, headers=door.headers(name="minted"))
        assert check_problem(answer, 429, "/rag/add_document")["code"] == "too_many_jobs"
        assert client.post("/rag/jobs", json=body, headers=door.headers("other", "theirs")).status_code == 202
        assert client.delete(f"/rag/jobs/{answers[0].json()['job_id']}", headers=key).status_code == 200
        assert client.post("/rag/jobs", json=body, headers=key).status_code == 202


def test_API6_how_many_is_a_setting() -> None:
    assert Config(home="/nowhere").limits.open_jobs == MOST_OPEN_JOBS
    with pytest.raises(ValueError, match="open_jobs"):
        Config(home="/nowhere", limits={"open_jobs": 0})


# LLM10


def expensive(door: Door, tokens: int, clock: Clock, **limits: Any) -> tuple[TestClient, Parrot]:
    parrot = Parrot([Delta("x"), Delta(finish_reason="length"), Delta(usage=Usage(1, tokens))])
    return reopen(door, clock, parrot, **limits), parrot


def spent_until_refused(client: TestClient, key: dict[str, str]) -> int:
    """How many generations of so many were let through."""
    answers = [client.post(CHAT, json=MODEL, headers=key) for _ in range(20)]
    return sum(answer.status_code == 200 for answer in answers)


def test_LLM10_a_wallet_is_not_emptied_by_long_answers(door: Door) -> None:
    client, parrot = expensive(door, 400, clock := Clock(), tokens_per_minute=1000)
    key = door.headers()
    assert spent_until_refused(client, key) == len(parrot.asked) == 3  # the third began with 200 left
    clock.now += 60
    assert spent_until_refused(client, key) == 2


def test_LLM10_nor_by_one_tenant_with_many_keys(door: Door) -> None:
    client, _ = expensive(door, 400, Clock(), tenant={"tokens_per_minute": 1000})
    keys = [door.headers(name=f"minted-{n}") for n in range(3)]
    assert [spent_until_refused(client, key) for key in keys] == [3, 0, 0]
    assert spent_until_refused(client, door.headers("other", "theirs")) == 3


def test_LLM10_a_reader_who_leaves_pays_for_what_was_generated(door: Door) -> None:
    parrot = Parrot([*[Delta("x")] * 30, Delta(finish_reason="stop")])
    client, key = reopen(door, Clock(), parrot, tokens_per_minute=1000), door.headers()
    with client.stream("POST", CHAT, json={**MODEL, "stream": True}, headers=key) as answer:
        next(answer.iter_lines())
    left = int(client.get("/pipelines", headers=key).headers["x-ratelimit-remaining-tokens"])
    assert left < 1000


def test_LLM10_a_failed_generation_is_paid_for_as_far_as_it_came(door: Door) -> None:
    parrot = Parrot([Delta("x"), Delta("y"), ValueError("planted")])
    client, key = reopen(door, Clock(), parrot, tokens_per_minute=1000), door.headers()
    answer = client.post(CHAT, json=MODEL, headers=key)
    assert (answer.status_code, answer.headers["x-ratelimit-remaining-tokens"]) == (500, "998")


def test_bulk_work_is_named_by_routes_that_there_are() -> None:
    paths = {route.path for route in ROUTES}
    assert all(any(path.startswith(prefix) for path in paths) for prefix in BULK)


def test_what_is_small_enough_is_worked_on(door: Door) -> None:
    """The rows above are refused for their size: just below it they are not."""
    stock(door)
    answers: list[httpx.Response] = [
        door.client.post(path, json=body, headers=door.headers())
        for path, body in [
            ("/rag/search", {"query": "x", "k": 1000}),
            ("/rag/search", {"query": "x", "filters": conditions(64)}),
            ("/rag/search", {"query": "x", "filters": nested(10)}),
            ("/rag/search", {"query": "x", "graph": "on", "hops": 3}),
            ("/rag/search", {"query": "x" * 8192}),
            ("/v1/embeddings", {"model": "word-embedder", "input": ["x"] * 2048}),
        ]
    ]
    assert [answer.status_code for answer in answers] == [200] * 6
