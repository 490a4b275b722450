"""Chat and text completions of scripted models through the front door, mostly as OpenAI's own client sees them."""

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from deployments.gateway import build
from nexus.balancer import Balancer, Member, Weights
from nexus.cache import ResponseCache
from nexus.errors import InvalidRequest, NexusError, Overloaded, Unavailable, UpstreamInvalid
from nexus.types import Delta, Prompt, Usage
from tests.conftest import Door
from tests.test_gateway import add, check_openai_error

END = Delta(finish_reason="stop")
COST = Delta(usage=Usage(9, 2, 4))
SAID = [Delta("Pa"), Delta("ris"), END, COST]
SECRET = "tell me about the heron"
ASK: dict[str, Any] = {"model": "parrot", "messages": [{"role": "user", "content": SECRET}]}
TEXT: dict[str, Any] = {"model": "parrot", "prompt": SECRET}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BOTH = pytest.mark.parametrize(("path", "ask"), [(CHAT, ASK), (COMPLETIONS, TEXT)])


class Parrot:
    """A generator that plays its scripts in turn, the last one for ever."""

    sees_images = False

    def __init__(self, *scripts: Sequence[Delta | Exception], name: str = "parrot") -> None:
        self.name = name
        self.scripts = list(scripts) or [SAID]
        self.asked: list[Prompt] = []

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        self.asked.append(prompt)
        for one in self.scripts[min(len(self.asked), len(self.scripts)) - 1]:
            if isinstance(one, Exception):
                raise one
            yield one

    async def check(self) -> None: ...


def reopen(door: Door, *parrots: Parrot, cache: ResponseCache | None = None) -> TestClient:
    """The same door with these models, the first of which answers from the documents, too."""
    balancer = Balancer([Member(one, 1 / (1 + at)) for at, one in enumerate(parrots)], Weights(1, 1, 1), 5)
    tools = replace(door.lent.rag, generator=balancer.generator(parrots[0].name), abstain_below=0.0)
    lent = replace(door.lent, rag=tools, balancer=balancer, cache=cache)
    return TestClient(build(lent), raise_server_exceptions=False)


def stock(door: Door, *parrots: Parrot, **fields: Any) -> openai.OpenAI:
    """OpenAI's client in front of them."""
    key = door.headers()["authorization"].removeprefix("Bearer ")
    url = "http://testserver/v1"
    return openai.OpenAI(api_key=key, base_url=url, http_client=reopen(door, *parrots, **fields), max_retries=0)


def events_of(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    *events, rest = answer.text.split("\n\n")
    assert rest == ""
    return events


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a whole stream."""
    *events, done = events_of(answer)
    assert done == "data: [DONE]"
    assert all(one.startswith("data: ") for one in events)
    return [json.loads(one.removeprefix("data: ")) for one in events]


# What comes


def test_a_whole_chat(door: Door) -> None:
    made = stock(door, Parrot()).chat.completions.create(**ASK)
    (choice,) = made.choices
    assert (made.object, made.model) == ("chat.completion", "parrot") and made.id.startswith("chatcmpl-")
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", "Paris")
    assert (choice.finish_reason, choice.logprobs, choice.message.refusal, choice.message.tool_calls) == (
        "stop", None, None, None,
    )  # fmt: skip
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (9, 2, 11)
    assert made.usage.prompt_tokens_details.cached_tokens == 4


def test_a_whole_text(door: Door) -> None:
    parrot = Parrot()
    made = stock(door, parrot).completions.create(**TEXT)
    assert (made.object, made.choices[0].text, made.choices[0].finish_reason) == ("text_completion", "Paris", "stop")
    assert made.usage.total_tokens == 11 and made.id.startswith("cmpl-")
    assert (parrot.asked[0].text, parrot.asked[0].messages, parrot.asked[0].tenant) == (SECRET, (), "default")


def test_a_chat_as_it_comes(door: Door) -> None:
    chunks = list(stock(door, Parrot()).chat.completions.create(**ASK, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Pa", "ris", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert [chunk.usage for chunk in chunks] == [None] * 3
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"


def test_a_text_as_it_comes(door: Door) -> None:
    chunks = list(stock(door, Parrot()).completions.create(**TEXT, stream=True))
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [
        ("Pa", None), ("ris", None), ("", "stop"),
    ]  # fmt: skip
    assert {chunk.object for chunk in chunks} == {"text_completion"} and {chunk.usage for chunk in chunks} == {None}


@BOTH
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_a_stream_tells_its_cost_last_and_only_where_that_is_asked(
    door: Door, path: str, ask: dict[str, Any], options: dict[str, bool] | None
) -> None:
    asked = {**ask, "stream": True, **({} if options is None else {"stream_options": options})}
    chunks = chunks_of(reopen(door, Parrot()).post(path, json=asked, headers=door.headers()))
    told = [chunk for chunk in chunks if chunk.get("usage")]
    assert told == (chunks[-1:] if (options or {}).get("include_usage") else [])
    if told:
        assert (told[0]["choices"], told[0]["usage"]["total_tokens"]) == ([], 11)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks if not chunk.get("usage"))


def test_for_a_model_that_does_not_count_the_tokens_are_counted_here(door: Door) -> None:
    client = stock(door, Parrot([Delta("one two three"), END]))
    whole = client.chat.completions.create(**ASK).usage
    words = sum(len(str(message["content"]).split()) for message in ASK["messages"])
    assert (whole.prompt_tokens, whole.completion_tokens) == (words, 3)
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert [len(chunk.choices) for chunk in chunks] == [1, 1, 0] and chunks[-1].usage == whole


def test_what_clients_send_without_meaning_it_hinders_no_answer_from_the_documents(door: Door) -> None:
    asked = {"model": "nexus-rag", "messages": [{"role": "user", "content": "What is a heron?"}], "logprobs": False,
             "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tool_choice": "none",
             "response_format": {"type": "text"}}  # fmt: skip
    add(door, headers=door.headers())
    answer = door.client.post(CHAT, json=asked, headers=door.headers())
    assert answer.status_code == 200, answer.text


def test_an_answer_from_the_documents_that_broke_in_the_middle_is_begun_again(door: Door) -> None:
    add(door, headers=door.headers())
    question = [{"role": "user", "content": "What torque does the gripper close with?"}]
    broken, whole = Parrot([Delta("half"), Unavailable("gone")]), Parrot([Delta("all of it [1]"), END])
    client = stock(door, broken, whole)
    answer = client.chat.completions.create(model="nexus-rag", messages=question)
    assert (answer.choices[0].message.content, len(broken.asked), len(whole.asked)) == ("all of it [1]", 1, 1)


def test_without_a_language_model_a_chat_quotes_what_was_said(door: Door) -> None:
    key = door.headers()["authorization"].removeprefix("Bearer ")
    client = openai.OpenAI(api_key=key, base_url="http://testserver/v1", http_client=door.client, max_retries=0)
    said = "The pump lost pressure at noon because the valve was open."
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": "I see."},
                {"role": "user", "content": "When did the pump lose pressure?"}]  # fmt: skip
    answer = client.chat.completions.create(model="extractive", messages=messages)
    assert "noon" in answer.choices[0].message.content
    nothing = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "hi"}])
    assert "only quote" in nothing.choices[0].message.content


def test_choices_come_interleaved_and_each_says_its_role_once(door: Door) -> None:
    script = [
        Delta("b", choice=1), Delta("a"), Delta("B", choice=1), Delta("A"), Delta(choice=1, finish_reason="length"),
        END, COST,
    ]  # fmt: skip
    parrot = Parrot(script)
    client = stock(door, parrot)
    chunks = list(client.chat.completions.create(**ASK, n=2, stream=True))
    assert [(c.choices[0].index, c.choices[0].delta.role) for c in chunks] == [
        (1, "assistant"), (0, "assistant"), (1, None), (0, None), (1, None), (0, None),
    ]  # fmt: skip
    whole = client.chat.completions.create(**ASK, n=2)
    told = [(one.index, one.message.content, one.finish_reason) for one in whole.choices]
    assert told == [(0, "aA", "stop"), (1, "bB", "length")]
    texts = client.completions.create(**TEXT, n=2)
    assert [(one.index, one.text, one.finish_reason) for one in texts.choices] == told
    assert [prompt.options["n"] for prompt in parrot.asked] == [2, 2, 2]


def test_tool_calls_are_joined_from_their_pieces(door: Door) -> None:
    def piece(index: int, **fields: Any) -> Delta:
        return Delta(beside={"tool_calls": [{"index": index, **fields}]})

    parrot = Parrot(
        [
            piece(0, id="c1", type="function", function={"name": "turn", "arguments": '{"by"'}),
            piece(1, id="c2", type="function", function={"name": "stop", "arguments": ""}),
            piece(1, function={"arguments": "{}"}),
            piece(0, function={"arguments": ": 3}"}),
            Delta(finish_reason="tool_calls"),
        ]
    )
    tools: Any = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("turn", "stop")]
    client = stock(door, parrot)
    message = client.chat.completions.create(**ASK, tools=tools).choices[0].message
    assert message.content is None
    assert [(call.id, call.type, call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("c1", "function", "turn", '{"by": 3}'), ("c2", "function", "stop", "{}"),
    ]  # fmt: skip
    with client.chat.completions.stream(**ASK, tools=tools) as stream:  # the client joins them itself
        joined = stream.get_final_completion().choices[0]
    assert joined.finish_reason == "tool_calls"
    assert [(call.id, call.function.arguments) for call in joined.message.tool_calls] == [
        ("c1", '{"by": 3}'), ("c2", "{}"),
    ]  # fmt: skip
    assert [tool["function"]["name"] for tool in parrot.asked[0].options["tools"]] == ["turn", "stop"]


def test_log_probabilities_are_joined(door: Door) -> None:
    def likely(token: str) -> dict[str, Any]:
        return {"logprobs": {"content": [{"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}]}}

    client = stock(door, Parrot([Delta("Pa", beside=likely("Pa")), Delta("ris", beside=likely("ris")), END]))
    joined = client.chat.completions.create(**ASK, logprobs=True).choices[0].logprobs
    assert [(one.token, one.logprob) for one in joined.content] == [("Pa", -0.5), ("ris", -0.5)]
    chunks = list(client.chat.completions.create(**ASK, logprobs=True, stream=True))
    assert [one.choices[0].logprobs and one.choices[0].logprobs.content[0].token for one in chunks] == [
        "Pa", "ris", None,
    ]  # fmt: skip
    assert all("logprobs" not in (chunk.choices[0].delta.model_extra or {}) for chunk in chunks)


def test_log_probabilities_of_a_text_are_joined(door: Door) -> None:
    pieces = [
        Delta(token, beside={"logprobs": {"tokens": [token], "token_logprobs": [-1.0], "text_offset": [at]}})
        for at, token in ((0, "Pa"), (2, "ris"))
    ]
    joined = stock(door, Parrot([*pieces, END])).completions.create(**TEXT, logprobs=1).choices[0].logprobs
    assert (joined.tokens, joined.token_logprobs, joined.text_offset) == (["Pa", "ris"], [-1.0, -1.0], [0, 2])


@pytest.mark.parametrize("name", ["reasoning_content", "refusal"])
def test_reasoning_and_refusal_are_beside_the_text(door: Door, name: str) -> None:
    client = stock(door, Parrot([Delta(beside={name: "I "}), Delta(beside={name: "think"}), Delta("Paris"), END]))
    message = client.chat.completions.create(**ASK).choices[0].message
    assert (getattr(message, name), message.content) == ("I think", "Paris")
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**ASK, stream=True)]
    assert [getattr(delta, name, None) for delta in deltas] == ["I ", "think", None, None]
    assert "".join(delta.content or "" for delta in deltas) == "Paris"
    assert [delta.role for delta in deltas] == ["assistant", None, None, None]


# What goes wrong


@BOTH
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("too long", pointer="/messages"), 400, "invalid_request_error"),
        (Overloaded("every place is taken"), 503, "service_unavailable_error"),
        (Unavailable("away"), 503, "service_unavailable_error"),
        (UpstreamInvalid("nonsense"), 502, "server_error"),
        (RuntimeError("a secret"), 500, "server_error"),
    ],
)
def test_an_error_before_the_first_byte_has_a_status(
    door: Door, path: str, ask: dict[str, Any], stream: bool, error: Exception, status: int, kind: str
) -> None:
    parrot = Parrot([error])
    answer = reopen(door, parrot).post(path, json={**ask, "stream": stream}, headers=door.headers())
    shown = check_openai_error(answer, status, kind)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert "secret" not in answer.text
    if isinstance(error, NexusError):
        assert (shown["message"], shown["code"]) == (error.message, error.code)
        assert shown["param"] == ("messages" if error.pointer else None)
    assert len(parrot.asked) == (2 if status in (502, 503) else 1)


@BOTH
def test_an_error_after_the_first_byte_is_the_last_event(door: Door, path: str, ask: dict[str, Any]) -> None:
    parrot = Parrot([Delta("Pa"), Unavailable("the engine fell over")])
    asked = {**ask, "stream": True, "stream_options": {"include_usage": True}}
    first, last = events_of(reopen(door, parrot).post(path, json=asked, headers=door.headers()))
    assert json.loads(first.removeprefix("data: "))["choices"][0]["index"] == 0
    said, data = last.split("\n")
    assert said == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "error": {
            "message": "the engine fell over", "type": "service_unavailable_error", "param": None,
            "code": "unavailable",
        }
    }  # fmt: skip
    assert len(parrot.asked) == 1  # what was sent cannot be taken back


def test_the_stock_client_is_told_of_an_error_in_a_stream(door: Door) -> None:
    client = stock(door, Parrot([Delta("Pa"), Delta("ris"), Overloaded("no more")]))
    got = []
    with pytest.raises(openai.APIError, match="no more"):
        for chunk in client.chat.completions.create(**ASK, stream=True):
            got.append(chunk.choices[0].delta.content)
    assert got == ["Pa", "ris"]


def test_the_stock_client_knows_the_kinds_of_errors(door: Door) -> None:
    client = stock(door, Parrot([Overloaded("full")]))
    with pytest.raises(openai.InternalServerError) as full:
        client.chat.completions.create(**ASK)
    assert full.value.status_code == 503 and int(full.value.response.headers["retry-after"]) > 0
    with pytest.raises(openai.NotFoundError, match="parrot") as missing:
        client.chat.completions.create(**{**ASK, "model": "gpt-9"})
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**ASK, temperature=9)


@BOTH
@pytest.mark.parametrize("stream", [True, False])
def test_who_fails_before_the_first_byte_is_replaced(door: Door, path: str, ask: dict[str, Any], stream: bool) -> None:
    bad, good = Parrot([Unavailable("away")]), Parrot()
    client, headers = reopen(door, bad, good), door.headers()
    answer = client.post(path, json={**ask, "stream": stream}, headers=headers)
    assert answer.status_code == 200 and "error" not in answer.text
    assert (len(bad.asked), len(good.asked)) == (1, 1) and bad.asked == good.asked


@BOTH
def test_a_whole_answer_is_made_again_even_if_it_broke_in_the_middle(
    door: Door, path: str, ask: dict[str, Any]
) -> None:
    bad, good = Parrot([Delta("Lon"), Unavailable("away")]), Parrot()
    answer = reopen(door, bad, good).post(path, json=ask, headers=door.headers())
    assert answer.status_code == 200 and "Paris" in answer.text and "Lon" not in answer.text
    assert (len(bad.asked), len(good.asked)) == (1, 1)


@BOTH
def test_a_model_that_stops_without_saying_why_has_failed(door: Door, path: str, ask: dict[str, Any]) -> None:
    client, headers = reopen(door, Parrot([Delta("Pa")])), door.headers()
    assert client.post(path, json=ask, headers=headers).status_code == 502
    *_, last = events_of(client.post(path, json={**ask, "stream": True}, headers=headers))
    assert last.startswith("event: error\n") and "upstream_invalid" in last


# Who is asked


def test_auto_is_chosen_by_the_weights_given(door: Door) -> None:
    exact, other = Parrot(name="exact"), Parrot(name="other")
    client, headers = reopen(door, other, exact), door.headers()
    accurate = {"accuracy_weight": 1, "latency_weight": 0, "throughput_weight": 0}
    for _ in range(4):
        answer = client.post(CHAT, json={**ASK, "model": "auto", **accurate}, headers=headers)
        assert (answer.status_code, answer.json()["model"]) == (200, "auto")
    assert (len(other.asked), len(exact.asked)) == (4, 0)  # `other` is the more accurate one
    client.post(COMPLETIONS, json={**TEXT, "model": "auto", "latency_weight": 1}, headers=headers)
    assert len(exact.asked) == 1  # who was never asked is news
    choice = client.get("/report", headers=headers).json()["choices"][0]
    assert choice["weights"] == {"latency": 1, "throughput": 1, "accuracy": 1}


@BOTH
def test_weights_without_auto_are_refused(door: Door, path: str, ask: dict[str, Any]) -> None:
    parrot = Parrot()
    answer = reopen(door, parrot).post(path, json={**ask, "latency_weight": 1}, headers=door.headers())
    assert check_openai_error(answer, 400, "invalid_request_error")["param"] == "model"
    assert parrot.asked == []


@BOTH
@pytest.mark.parametrize("model", ["gpt-9", "word-embedder", "parrot ", "nexus", "AUTO"])
def test_a_model_that_does_not_write_is_not_found(door: Door, path: str, ask: dict[str, Any], model: str) -> None:
    answer = reopen(door, Parrot()).post(path, json={**ask, "model": model}, headers=door.headers())
    error = check_openai_error(answer, 404, "not_found_error")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "auto, parrot" in error["message"]


def test_every_model_is_listed_once(door: Door) -> None:
    add(door, headers=door.headers())
    parrots = (Parrot(), Parrot(), Parrot(name="other"), Parrot(name="word-embedder"))
    names = [model.id for model in stock(door, *parrots).models.list()]
    assert names == ["nexus-rag", "nexus-rag/default", "auto", "parrot", "other", "word-embedder"]
    assert stock(door, *parrots).models.retrieve("parrot").id == "parrot"
    with pytest.raises(openai.NotFoundError):
        stock(door, *parrots).models.retrieve("gpt-9")


# What is kept, and what is told


@BOTH
def test_an_equal_request_is_answered_from_the_cache_but_not_anothers(
    door: Door, path: str, ask: dict[str, Any]
) -> None:
    parrot = Parrot()
    client = reopen(door, parrot, cache=ResponseCache(10, 60, 2**20))
    ours, theirs = door.headers("acme"), door.headers("other")
    first, second = (client.post(path, json=ask, headers=ours).json() for _ in range(2))
    assert len(parrot.asked) == 1
    assert (first["choices"], first["usage"]) == (second["choices"], second["usage"])
    assert first["id"] != second["id"]
    assert len(chunks_of(client.post(path, json={**ask, "stream": True}, headers=ours))) == 3
    assert len(parrot.asked) == 1
    client.post(path, json=ask, headers=theirs)
    assert [prompt.tenant for prompt in parrot.asked] == ["acme", "other"]
    client.post(path, json={**ask, "seed": 1}, headers=ours)
    assert len(parrot.asked) == 3


def test_what_broke_off_is_not_answered_from_the_cache(door: Door) -> None:
    parrot = Parrot([Delta("Lon"), Unavailable("away")], SAID)
    client, headers = reopen(door, parrot, cache=ResponseCache(10, 60, 2**20)), door.headers()
    assert "Lon" in events_of(client.post(CHAT, json={**ASK, "stream": True}, headers=headers))[0]
    answer = client.post(CHAT, json=ASK, headers=headers).json()
    assert answer["choices"][0]["message"]["content"] == "Paris"


def test_the_report_tells_figures_and_choices_but_no_words(door: Door) -> None:
    bad, good = Parrot([Unavailable("away")]), Parrot(name="good")
    client, headers = reopen(door, bad, good), door.headers()
    client.post(CHAT, json=ASK, headers=headers)
    client.post(COMPLETIONS, json={**TEXT, "model": "good"}, headers=headers)
    answer = client.get("/report", headers=headers)
    assert "heron" not in answer.text and "Paris" not in answer.text
    report = answer.json()
    assert set(report) == {
        "models", "engines", "choices", "window_seconds", "response_time", "error_rate", "gpu_usage", "memory_usage",
        "unknown",
    }  # fmt: skip
    first, second = report["models"]
    assert set(first) == {
        "name", "place", "accuracy", "in_flight", "first_token_seconds", "tokens_per_second", "success_rate",
        "requests", "failures", "ejected_seconds",
    }  # fmt: skip
    assert (first["name"], first["requests"], first["failures"], first["in_flight"]) == ("parrot", 2, 2, 0)
    assert first["ejected_seconds"] >= 0 and second["ejected_seconds"] is None
    latest, *_, again, earliest = report["choices"]
    assert (latest["chosen"], latest["outcome"], latest["retried"]) == ("good", "finished", False)
    assert [(one["chosen"], one["outcome"], one["retried"]) for one in (earliest, again)] == [
        ("parrot", "failed", False), ("parrot", "failed", True),
    ]  # fmt: skip
    assert set(latest) == {
        "asked", "weights", "candidates", "chosen", "member", "retried", "by_session", "outcome", "seconds_ago",
    }  # fmt: skip
    assert client.get("/report", headers=door.headers("default", "r", "documents:read")).status_code == 403


# Answers from the documents

QUESTION = [{"role": "user", "content": "What torque does the gripper close with?"}]
TOOL = {"type": "function", "function": {"name": "turn"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, PICTURE]}]}, "messages"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"latency_weight": 1}, "latency_weight"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_documents_refuse_what_they_cannot_by_name(door: Door, fields: dict, name: str, stream: bool) -> None:
    body = {"model": "nexus-rag", "messages": QUESTION, "stream": stream, **fields}
    parrot = Parrot()
    answer = reopen(door, parrot).post(CHAT, json=body, headers=door.headers())
    assert check_openai_error(answer, 400, "invalid_request_error")["param"] == name
    assert parrot.asked == []


def test_answers_from_the_documents_cost_and_end_as_the_model_says(door: Door) -> None:
    add(door, headers=door.headers())
    parrot = Parrot([Delta("4 N·m [1]"), Delta(finish_reason="length"), COST])
    client = stock(door, parrot)
    made = client.chat.completions.create(model="nexus-rag", messages=QUESTION, max_tokens=5)
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("4 N·m [1]", "length")
    assert (made.usage.total_tokens, made.usage.prompt_tokens_details.cached_tokens) == (11, 4)
    assert made.model_extra["sources"][0]["cited"]
    asked: dict[str, Any] = {"model": "nexus-rag", "messages": QUESTION, "stream": True}
    chunks = list(client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices] == ["assistant", None]
    assert (chunks[-2].choices[0].finish_reason, chunks[-1].usage.total_tokens) == ("length", 11)
    assert [chunk.usage for chunk in client.chat.completions.create(**asked)] == [None, None]
    assert parrot.asked[0].max_tokens == 5 and parrot.asked[0].passages


def test_an_error_in_an_answer_from_the_documents(door: Door) -> None:
    add(door, headers=door.headers())
    asked = {"model": "nexus-rag", "messages": QUESTION, "stream": True}
    early = reopen(door, Parrot([Overloaded("full")])).post(CHAT, json=asked, headers=door.headers())
    check_openai_error(early, 503, "service_unavailable_error")
    assert early.headers["retry-after"]
    for path, body in ((CHAT, asked), ("/rag/query", {"query": QUESTION[0]["content"], "stream": True})):
        late = reopen(door, Parrot([Delta("4 N"), Unavailable("away")])).post(path, json=body, headers=door.headers())
        first, last = events_of(late)
        assert "4 N" in first and last.startswith("event: error\n") and '"unavailable"' in last
