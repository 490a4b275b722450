"""Fifty planted secrets go through good and failing requests, and stand nowhere but where they were put (row Q7).

That a key of ours is kept as a hash alone is in test_access.py; what a model's server is sent, test_models_remote.py.
"""

import io
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from deployments import cli
from deployments.gateway import build
from nexus import telemetry
from nexus.balancer import Member
from nexus.config import load_config
from nexus.errors import ConfigError, NexusError
from nexus.registry import open_model, open_part
from nexus.types import Delta, Prompt, content_digest
from tests.canaries import CREDENTIALS, STORES, TEXTS, find, planted
from tests.conftest import Door, open_front

SECRETS = planted()


class Failing:
    """A model with a bug: it ends in an error that says nothing of what it was asked."""

    name, sees_images = "failing", False

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        raise KeyError(len(prompt.messages))
        yield

    async def check(self) -> None: ...


@dataclass
class Told:
    """What was answered and logged while the requests below went through, and the home they left."""

    answers: list[str]
    log: str
    home: Path
    statuses: set[int]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """All requests once: the gateway in one process, with everything logged that it can say."""
    from nexus.stores import memory, sqlite
    from tests.conftest import build_house

    home, written = tmp_path_factory.mktemp("home"), io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("nexus", "uvicorn", "starlette", "fastapi")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    house = build_house(sqlite.open("sqlite:", home=home), memory.open("memory:"))
    with (
        open_front(house, home, None, Member(Failing(), 0.1, False)) as lent,
        TestClient(build(lent), raise_server_exceptions=False) as client,
    ):
        answers = send_all(Door(client, lent, lent.keys, house))
        yield Told([_whole(answer) for answer in answers], written.getvalue(), home, {a.status_code for a in answers})
    house.retriever.close()
    house.hades.documents.close()
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def _whole(answer: Any) -> str:
    return f"{answer.status_code}\n{answer.headers}\n{answer.text}"


def send_all(door: Door) -> list[Any]:
    """Every secret where such secrets come from, in requests that are answered and in requests that fail."""
    return [*_send_documents(door), *_send_questions(door), *_send_credentials(door)]


def _send_credentials(door: Door) -> Iterator[Any]:
    paths = ("/rag/documents", "/v1/models", "/nothing", "/mcp/s/get_context")
    basic = f"Basic {SECRETS['basic authentication']}"
    by_header = [{"authorization": f"Bearer {SECRETS[what]}"} for what in CREDENTIALS if "key" in what or "JWT" in what]
    by_header += [{"x-api-key": SECRETS["an X-API-Key"]}, {"authorization": basic}]
    for headers in by_header:
        for path in paths:
            yield door.client.get(path, headers=headers)
    good = door.headers()
    beside = {"cookie": f"session={SECRETS['a cookie']}", "proxy-authorization": SECRETS["a proxy's credential"]}
    for path in (*paths, "/metrics"):
        yield door.client.get(path, headers=good | beside)
        yield door.client.get(path, params={"api_key": SECRETS["a key in the query string"]})
        yield door.client.get(path, params={"access_token": SECRETS["a token in the query string"]}, headers=good)


def _send_documents(door: Door) -> Iterator[Any]:
    headers, client, path = door.headers(), door.client, "/rag/add_document"
    for name, content in (
        ("a.md", f"# Words\n\n{SECRETS['an upload by form']}"),
        ("a.txt", f"\x7fELF\x02{SECRETS['an upload that cannot be read']}" + "\0" * 200),
        ("a.docx", f"PK\x03\x04{SECRETS['an upload of an office file that is none']}"),
        ("a.json", f'{{"a": "{SECRETS["an upload of broken JSON"]}'),
        ("a.pdf", f"%PDF-1.7 {SECRETS['a PDF that is none']}"),
    ):  # fmt: skip
        yield client.post(path, files={"file": (name, content.encode())}, headers=headers)
    body = {"filename": "b.md", "content": SECRETS["an upload by JSON"]}
    yield client.post(path, json=body | {"metadata": {"note": SECRETS["metadata of an upload"]}}, headers=headers)
    form = {"metadata": f"{{{SECRETS['metadata that is no JSON']}"}
    yield client.post(path, files={"file": ("c.md", b"x")}, data=form, headers=headers)
    content = SECRETS["an upload by job"].encode()
    wrong = SECRETS["a job's bytes that are not those announced"].encode()
    files = [{"filename": f"{n}.md", "digest": content_digest(content), "size": len(content)} for n in range(2)]
    job = client.post("/rag/jobs", json={"files": files}, headers=headers)
    yield job
    sent = {"0": ("0.md", content), "1": ("1.md", wrong)}
    yield client.put(f"/rag/jobs/{job.json()['job_id']}/files", files=sent, headers=headers)


def _send_questions(door: Door) -> Iterator[Any]:
    headers, post = door.headers(), door.client.post
    said = lambda what: [{"role": "user", "content": f"What is {SECRETS[what]}?"}]  # noqa: E731
    chat = "/v1/chat/completions"
    for path, body in (
        ("/rag/query", {"query": SECRETS["a question"]}), ("/rag/search", {"query": SECRETS["a search"]}),
        ("/rag/search", {"query": SECRETS["a search that fails"], "collection": "nowhere"}),
        ("/rag/search", {"query": "x", "filters": {"note": SECRETS["a filter"]}}),
        ("/rag/search", {"query": "x", "filters": {"a": {SECRETS["a filter that is refused"]: 1}}}),
        (chat, {"model": "nexus-rag", "messages": said("a chat")}),
        (chat, {"model": "nexus-rag", "messages": said("a chat that is streamed"), "stream": True}),
        (chat, {"model": "failing", "messages": said("a chat of a model that fails")}),
        ("/v1/completions", {"model": "failing", "prompt": SECRETS["a completion"]}),
        ("/v1/rerank", {"model": "word-embedder", "query": "x", "documents": [SECRETS["a rerank"]]}),
        ("/v1/embeddings", {"model": "word-embedder", "input": SECRETS["an embedding"]}),
        ("/mcp/s/add_context", {"content": SECRETS["a session's context"]}),
        ("/mcp/s/query", {"input": SECRETS["a session's question"]}),
    ):  # fmt: skip
        yield post(path, json=body, headers=headers)

    async def fail(*_: object) -> None:
        raise RuntimeError("a fault of the store")

    door.lent.retriever.search = fail  # type: ignore[method-assign]
    yield post("/rag/search", json={"query": SECRETS["a search that fails"]}, headers=headers)


def test_Q7_there_are_fifty_secrets_and_each_is_found_where_it_stands() -> None:
    assert len(set(SECRETS.values())) == len(SECRETS) >= 50
    for what, secret in SECRETS.items():
        assert find(f"before {secret} after") == [what] == find(f"before {secret} after".encode())
    assert find("nothing of it, nx_ and eyJ") == []


def test_Q7_the_requests_reach_what_they_are_meant_to(told: Told) -> None:
    """Answered, refused for each reason, and failed with a traceback."""
    assert {200, 201, 202, 401, 404, 415, 422, 500} <= told.statuses
    assert "Traceback" in told.log and "KeyError" in told.log
    stored = b"".join(file.read_bytes() for file in told.home.iterdir() if file.name.startswith(STORES))
    assert {"an upload by form", "a session's context"} <= set(find(stored))


def test_Q7_no_secret_is_in_a_log(told: Told) -> None:
    assert find(told.log) == []


def test_Q7_no_secret_is_in_a_metric(told: Told) -> None:
    exposed = telemetry.exposition()
    assert b"rag_queries_total" in exposed and find(exposed) == []


def test_Q7_no_credential_is_in_an_answer(told: Told) -> None:
    for answer in told.answers:
        assert find(answer, CREDENTIALS) == [], answer[:300]


def test_Q7_what_failed_tells_nothing_of_what_was_sent(told: Told) -> None:
    for answer in told.answers:
        if answer.startswith("5"):
            assert find(answer) == []


def test_Q7_no_secret_is_in_a_file_but_a_store_s(told: Told) -> None:
    for file in told.home.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert find(content, CREDENTIALS) == [], file.name
            assert file.name.startswith(STORES) or find(content, TEXTS) == [], file.name


# ── settings ────────────────────────────────────────────────────────────────────────────────────


SET = {
    "OPENAI_API_KEY": SECRETS["OPENAI_API_KEY"],
    "VALID_API_KEYS": ",".join(SECRETS[f"VALID_API_KEYS {n}"] for n in ("one", "two", "three")),
    "NEXUS_STORES__VECTORS": f"milvus://root:{SECRETS['a password of Milvus']}@milvus.invalid:19530",
}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
    for name, value in SET.items():
        monkeypatch.setenv(name, value)
    served = {"address": "openai:http://127.0.0.1:9/v1#m", "api_key": SECRETS["the key of a served model"]}
    (tmp_path / "nexus.yaml").write_text(json.dumps({"models": {"served": [served]}}))
    return tmp_path


def test_Q7_settings_show_no_secret_and_are_used_whole(settings: Path) -> None:
    config = load_config()
    shown = [
        repr(config),
        str(config),
        f"{config!r}",
        config.model_dump_json(),
        repr(config.stores),
        repr(config.model_dump()),
    ]
    assert [find(one) for one in shown] == [[]] * len(shown)
    assert SECRETS["a password of Milvus"] in f"{config.stores.vectors}"
    store = open_part("stores", config.stores.vectors)
    assert store.target.token == f"root:{SECRETS['a password of Milvus']}" and find(repr(store)) == []


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["for people", "for machines"])
def test_Q7_config_show_shows_none(settings: Path, more: list[str]) -> None:
    done = CliRunner().invoke(cli.app, ["config", "show", *more])
    assert done.exit_code == 0 and "milvus.invalid" in done.output
    assert find(done.output) == []


SECRET_LINE = f"access:\n  development_keys: [{SECRETS['VALID_API_KEYS one']}"
WRONG = {
    "broken YAML": SECRET_LINE,
    "broken in the line": f"models:\n  api_key: '{SECRETS['OPENAI_API_KEY']}' x",
    "a tab": f"models:\n\tapi_key: {SECRETS['OPENAI_API_KEY']}",
    "an object for a key": json.dumps({"models": {"api_key": {"is": SECRETS["OPENAI_API_KEY"]}}}),
    "a list for a key": json.dumps({"models": {"api_key": [SECRETS["OPENAI_API_KEY"]]}}),
    "a text for a section": json.dumps({"models": SECRETS["OPENAI_API_KEY"]}),
    "an unknown setting": json.dumps({"models": {"apikey": SECRETS["OPENAI_API_KEY"]}}),
    "a bad number beside it": json.dumps({"models": {"api_key": SECRETS["OPENAI_API_KEY"], "rerank_seconds": "x"}}),
    "a store that is a list": json.dumps({"stores": {"vectors": [SECRETS["a password of another store"]]}}),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_Q7_a_refusal_to_start_tells_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for name in SET:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "nexus.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    assert find(caught.value.message) == [] and find(repr(caught.value)) == []


@pytest.mark.parametrize(
    "address",
    [
        f"milvus://root:{SECRETS['a password of Milvus']}@", f"magic://root:{SECRETS['a password of ArangoDB']}@host",
        f"arango://root:{SECRETS['a password of ArangoDB']}@host:port/nexus",
    ],
    ids=["no host", "no such store", "no such port"],
)  # fmt: skip
def test_Q7_an_address_that_cannot_be_opened_tells_no_password(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
    monkeypatch.setenv("NEXUS_STORES__VECTORS", address)
    with pytest.raises(NexusError) as caught:
        open_part("stores", load_config().stores.vectors)
    assert find(caught.value.message) == []


@pytest.mark.parametrize("task", ["generate", "embed", "rerank"])
def test_Q7_a_part_that_holds_a_key_does_not_show_it(task: Any) -> None:
    key = SECRETS["the key of a served model"]
    part = open_model(task, "openai:http://127.0.0.1:9/v1#m", name="m", api_key=key, dimension=8, max_tokens=8)
    assert find(repr(part)) == [] and find(str(part)) == []
