"""Real vLLM engines on a tiny Llama, behind Serve and HAProxy, asked through the front door by the stock client.

All processes send their spans to a collector here, and what a question was in them is looked at, too.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

from tests.collector import Collector, Got, collecting, root_of
from tests.poison import poisons
from tests.running import ROOT, Running, running_nexus, until
from tests.tiny_encoders import write_cross_encoder
from tests.tiny_llama import WORDS, write_llama

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

HELLO = [{"role": "user", "content": "Say something about the wheel nuts."}]
ENGINE = {"device": "cpu", "dtype": "float32", "max_model_len": 2048, "compiled": False}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def nexus(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Running]:
    """Two replicas of a generator, which answers from the documents too, and an engine that embeds."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "llama")
    served = [
        {"address": f"vllm:{folder}#tiny", "engine": ENGINE, "replicas": {"least": 2}},
        {"address": f"vllm:{folder}#tiny-embedder", "task": "embed", "engine": ENGINE},
    ]
    reranker = write_cross_encoder(tmp_path_factory.mktemp("models") / "reranker")
    few = {"NEXUS_ANSWERS__PASSAGES": "2", "NEXUS_ANSWERS__PASSAGE_TOKENS": "100"}  # a token is a letter here
    settings = {"NEXUS_MODELS__SERVED": json.dumps(served), "NEXUS_MODELS__GENERATOR": "tiny", **few}
    settings |= {"NEXUS_MODELS__RERANKER": f"cross-encoder:{reranker}", "NEXUS_MODELS__RERANK_SECONDS": "20"}
    settings |= {"NEXUS_TELEMETRY__OTLP_ENDPOINT": collector.url}
    with running_nexus(seconds=600, **settings) as running:
        running.must("add", str(ROOT / "deployments" / "manuals" / "wd8-specification.md"))
        yield running


def say(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 12, **fields})


def loads(http: httpx.Client) -> list[int]:
    """How many requests each replica's engine works on."""
    found = http.get("/report").raise_for_status().json()["engines"]["tiny"]
    assert isinstance(found, list), found
    return sorted(found)


# ── what a client sees ──────────────────────────────────────────────────────────────────────────


def test_a_chat_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = say(client, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    text = whole.choices[0].message.content
    assert len(text.split()) == 12 and {f" {word}" for word in text.split()} <= set(WORDS)
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (12, whole.usage.prompt_tokens + 12)
    chunks = list(say(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in say(client, stream=True))


def test_a_seed_a_stop_choices_and_log_probabilities(client: openai.OpenAI) -> None:
    one, same, other = (say(client, temperature=1, seed=seed).choices[0].message.content for seed in (7, 7, 8))
    assert one == same != other
    first, second = say(client, temperature=0).choices[0].message.content.split()[:2]
    stopped = say(client, temperature=0, stop=[second]) if first != second else say(client, temperature=0, stop=first)
    assert stopped.choices[0].finish_reason == "stop" and second not in stopped.choices[0].message.content
    several = say(client, n=3, temperature=1, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) == 3
    (choice,) = say(client, logprobs=True, top_logprobs=2, max_tokens=3).choices
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2, 2, 2]


def test_a_bare_text_is_continued(client: openai.OpenAI) -> None:
    ask: Callable[..., Any] = client.completions.create
    whole = ask(model="tiny", prompt="The wheel", max_tokens=5, temperature=0)
    assert whole.choices[0].finish_reason == "length" and len(whole.choices[0].text.split()) == 5
    chunks = list(ask(model="tiny", prompt="The wheel", max_tokens=5, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_an_answer_takes_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"part": {"enum": ["nut", "bolt"]}}, "required": ["part"]}
    form = {"type": "json_schema", "json_schema": {"name": "part", "schema": {**schema, "additionalProperties": False}}}
    said = say(client, response_format=form, max_tokens=100, temperature=0).choices[0].message.content
    assert json.loads(said)["part"] in ("nut", "bolt")


def test_what_the_engine_refuses_is_the_callers_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        say(client, messages=[{"role": "user", "content": "word " * 3000}])
    assert "2048" in str(too_long.value)
    with pytest.raises(openai.BadRequestError, match="999999999"):
        say(client, logit_bias={"999999999": 1})  # which vLLM says only within its stream
    with pytest.raises(openai.NotFoundError) as unknown:
        say(client, model="tiny-embedder")
    assert unknown.value.code == "model_not_found" and "tiny" in str(unknown.value)
    assert say(client).choices[0].finish_reason == "length"


def test_whoever_asks_an_engine_loads_none(nexus: Running, client: openai.OpenAI) -> None:
    say(client, max_tokens=1)
    (gateway,) = nexus.processes("ServeReplica:nexus:gateway")
    assert not [mapped.path for mapped in gateway.memory_maps() if "libtorch" in mapped.path]


def test_models_are_listed_by_their_names(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert {"nexus-rag", "auto", "tiny", "tiny-embedder", "all-MiniLM-L6-v2"} <= set(names)
    assert len(names) == len(set(names))


def test_an_engine_embeds(client: openai.OpenAI) -> None:
    texts = ["the wheel nuts", "a lift table", "the wheel nuts"]
    rows = np.array([row.embedding for row in client.embeddings.create(model="tiny-embedder", input=texts).data])
    assert rows.shape[0] == 3 and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    assert rows[0] @ rows[2] == pytest.approx(1, abs=1e-3) and rows[0] @ rows[1] < 0.999


def test_an_answer_from_the_documents_is_generated_and_has_its_sources(http: httpx.Client) -> None:
    query = {"query": "What is the payload of the WD8?"}
    answer = http.post("/rag/query", json=query).raise_for_status().json()
    assert answer["sources"] and not answer["abstained"]
    assert {f" {word}" for word in answer["response"].split()} <= set(WORDS)
    with http.stream("POST", "/rag/query", json={**query, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 3


def test_a_reranker_has_a_process_of_its_own_and_the_last_word(nexus: Running, http: httpx.Client) -> None:
    assert len(nexus.processes("ServeReplica:nexus:reranker")) == 1
    texts = ["the wheel nuts", "a charging station", "the emergency stop"]
    asked = {"model": "reranker", "query": "Which nuts?", "documents": texts}
    ranked = http.post("/v1/rerank", json=asked).raise_for_status().json()["results"]
    assert sorted(result["index"] for result in ranked) == [0, 1, 2]
    scores = [result["relevance_score"] for result in ranked]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    found = http.post("/rag/search", json={"query": "payload", "explain": True}).raise_for_status().json()
    assert found["explain"]["rerank"]["applied"] and not found["explain"]["rerank"]["fallback"]
    assert [hit["routes"]["rerank"]["rank"] for hit in found["hits"]] == list(range(1, len(found["hits"]) + 1))


# ── one trace over all processes ────────────────────────────────────────────────────────────────

ASKED = "What is the payload of the WD8, xylophone?"
CALLER = "cd" * 8  # the caller's span
PARTS = {
    ("retriever", "retrieval"), ("retriever", "embed"), ("retriever", "search dense"), ("retriever", "authority"),
    ("retriever", "rerank"), ("reranker", "rerank"), ("gateway", "chat tiny"), ("engine", "generate"),
}  # fmt: skip
TOOL = {"name": "ask", "arguments": {"question": ASKED}}
STREAM = {"model": "nexus-rag", "messages": [{"role": "user", "content": ASKED}], "stream": True}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "/rag/query": {"query": ASKED},
    "/v1/chat/completions": {**STREAM, "max_tokens": 12},
    "/mcp": {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": TOOL},
}


@pytest.mark.parametrize("path", WAYS)
def test_a_question_is_one_trace_over_every_process_that_worked_on_it(
    collector: Collector, http: httpx.Client, path: str
) -> None:
    spans = spans_of_asking(collector, http, path)
    request = root_of(spans)
    assert (request.role, request.name, request.parent_id) == ("gateway", f"POST {path}", CALLER)
    processes = {(one.role, one.process) for one in spans}
    assert len(processes) == len({process for _, process in processes}) == 4, processes
    for part, above in ((("reranker", "rerank"), ["rerank", "retrieval"]), (("engine", "generate"), ["chat tiny"])):
        found = above_of(spans, *part)
        assert found[: len(above)] == above and found[-1] == f"POST {path}", found
    assert "xylophone" not in str(spans) and "payload" not in str(spans)


def spans_of_asking(collector: Collector, http: httpx.Client, path: str, tries: int = 4) -> list[Got]:
    """Those of one request. A process that a busy machine let wait for the collector records nothing for a while."""
    trace = f"{10 * list(WAYS).index(path) + tries:032x}"
    headers = {"traceparent": f"00-{trace}-{CALLER}-01", "accept": "application/json, text/event-stream"}
    answer = http.post(path, json=WAYS[path], headers=headers).raise_for_status()
    assert "sources" in answer.text
    try:
        return collector.wait_for(trace, {*PARTS, ("gateway", f"POST {path}")})
    except AssertionError:
        if tries == 1:
            raise
    return spans_of_asking(collector, http, path, tries - 1)


def above_of(spans: Sequence[Got], role: str, name: str) -> list[str]:
    """What the one span of this role and name is within, from the inside out."""
    by_id = {one.span_id: one for one in spans}
    (at,) = [one for one in spans if (one.role, one.name) == (role, name)]
    names = []
    while at.parent_id in by_id:
        at = by_id[at.parent_id]
        names.append(at.name)
    return names


# ── what engines share, and with whom ───────────────────────────────────────────────────────────


def test_a_conversation_finds_its_beginning_in_the_cache_and_another_tenant_does_not(nexus: Running) -> None:
    guest = nexus.must("key", "create", "guest", "--tenant", "guests").strip()
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "A long beginning. " * 30}], "max_tokens": 1,
        "session_id": "one",
    }  # fmt: skip

    def cached(of: str) -> int:
        answer = httpx.post(
            f"{nexus.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {of}"}, timeout=120
        )
        return answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(nexus.key) == 0
    assert cached(nexus.key) > 300
    assert cached(guest) == 0


def test_requests_of_a_session_go_to_one_replica(client: openai.OpenAI, http: httpx.Client) -> None:
    streams = [say(client, stream=True, max_tokens=900, extra_body={"session_id": "same"}) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
    assert loads(http)[0] == 0, "all four are on one replica"
    for stream in streams:
        stream.close()
    until(60, lambda: loads(http) == [0, 0])


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────


def test_a_stream_that_is_left_frees_its_place(client: openai.OpenAI, http: httpx.Client) -> None:
    for number in range(35):
        stream = say(client, stream=True, max_tokens=900)
        for _, _chunk in zip(range(number % 7), stream, strict=False):
            continue
        stream.close()
    until(60, lambda: loads(http) == [0, 0])
    member = next(one for one in http.get("/report").json()["models"] if one["name"] == "tiny")
    assert member["in_flight"] == 0


def test_poison_is_refused_and_nobody_else_notices(nexus: Running, client: openai.OpenAI, http: httpx.Client) -> None:
    before = {process.pid for process in engines(nexus)}
    ended, over = Counter[str](), threading.Event()

    def go_on() -> None:
        while not over.is_set():
            chunks = [chunk for chunk in say(client, stream=True, max_tokens=40) if chunk.choices]
            ended[chunks[-1].choices[0].finish_reason] += 1

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(go_on) for _ in range(2)]
        for poison in poisons("tiny"):
            answer = http.post(poison.path, content=poison.content, headers=poison.headers)
            assert 400 <= answer.status_code < 500, (poison.name, answer.status_code, answer.text[:200])
        over.set()
        for other in others:
            other.result()
    assert set(ended) <= {"length", "stop"} and ended.total() > 2
    assert {process.pid for process in engines(nexus)} == before
    assert loads(http) == [0, 0]


@pytest.mark.parametrize("victim", ["ServeReplica:nexus:generator", "VLLM::EngineCore"])
def test_a_killed_replica_fails_no_whole_answer_and_ends_every_stream(
    nexus: Running, client: openai.OpenAI, http: httpx.Client, victim: str
) -> None:
    until(300, lambda: len(loads(http)) == 2)
    before = {process.pid for process in engines(nexus)}
    begun = threading.Semaphore(0)

    def stream(number: int) -> str:
        try:
            reason = None
            for chunk in say(client, stream=True, max_tokens=300, user=f"{number}"):
                begun.release()
                reason = chunk.choices[0].finish_reason if chunk.choices else reason
            return "done" if reason else "cut"
        except openai.APIError as error:
            return "said so" if "try again" in str(error) else repr(error)

    def whole(number: int) -> str:
        return "done" if say(client, max_tokens=300, user=f"{number}").choices[0].finish_reason else "cut"

    with ThreadPoolExecutor(24) as pool:
        streams = [pool.submit(stream, number) for number in range(12)]
        wholes = [pool.submit(whole, number) for number in range(12)]
        for _ in range(30):
            begun.acquire(timeout=60)
        killed = next(process for process in engines(nexus) if victim in " ".join(process.cmdline()))
        killed.kill()
        assert Counter(one.result() for one in wholes) == {"done": 12}
        assert set(one.result() for one in streams) <= {"done", "said so"}
    until(300, lambda: len(loads(http)) == 2 and killed.pid not in {process.pid for process in engines(nexus)})
    assert {process.pid for process in engines(nexus)} != before
    until(30, lambda: loads(http) == [0, 0])
    assert say(client).choices[0].finish_reason


def engines(nexus: Running) -> list[psutil.Process]:
    """The replicas that generate, with the processes of their engines."""
    replicas = nexus.processes("ServeReplica:nexus:generator")
    return [*replicas, *(child for replica in replicas for child in replica.children(recursive=True))]
