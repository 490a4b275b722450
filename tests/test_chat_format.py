"""Prompts as OpenAI writes them, and its chunks as Deltas."""

import pytest

from nexus.chat_format import read_chunk, to_body
from nexus.errors import InvalidRequest, Unavailable, UpstreamInvalid
from nexus.types import Delta, Image, Message, Prompt, Usage

PICTURE = "data:image/png;base64,AAAA"
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def test_a_chat_with_everything() -> None:
    prompt = Prompt(
        messages=(
            Message("system", "Be brief."),
            Message("user", ("What is this?", Image(PICTURE))),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "a valve", tool_call_id="call_1"),
        ),
        max_tokens=7, temperature=0.0, seed=0, stop=("\n", "END"),
        options={"top_p": 0.5, "tools": [{"type": "function"}], "n": 2, "temperature": 1, "model": "x", "stream": 0},
        question="?", session="s", tenant="t",
    )  # fmt: skip
    assert to_body(prompt, "m") == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": PICTURE}},
                ],
            },
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "a valve", "tool_call_id": "call_1"},
        ],
        "max_tokens": 7,
        "temperature": 0.0,
        "seed": 0,
        "stop": ["\n", "END"],
        "top_p": 0.5,
        "tools": [{"type": "function"}],
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_what_is_not_said_is_not_sent() -> None:
    body = to_body(Prompt((Message("user", ""),)), "m")
    assert body.keys() == {"model", "messages", "stream", "stream_options"}
    assert body["messages"] == [{"role": "user", "content": ""}]


def test_a_bare_text_is_continued() -> None:
    body = to_body(Prompt((), text="Once", max_tokens=3), "m")
    assert body["prompt"] == "Once" and "messages" not in body


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": True}, 0),
        ({"logprobs": False}, None),
        ({"logprobs": 2}, 2),
    ],
)
def test_logprobs_of_a_completion_are_a_number(options: dict[str, object], sent: object) -> None:
    body = to_body(Prompt((), text="Once", options=options), "m")
    assert body["logprobs"] == sent and "top_logprobs" not in body


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "https://example.com/a.png", "file:///etc/passwd", ""])
def test_no_engine_is_made_to_fetch_a_picture(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_body(Prompt((Message("user", (Image(url),)),)), "m")
    assert caught.value.code == "url_not_allowed"


def chat(delta: object, finish: object = None, **choice: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]}


def test_chunks_of_a_chat() -> None:
    assert read_chunk(chat({"role": "assistant", "content": None})) == []
    assert read_chunk(chat({"role": "assistant", "content": ""})) == []
    assert read_chunk(chat({"content": "Hi"})) == [Delta("Hi")]
    assert read_chunk(chat({"content": "Hi"}, "length")) == [Delta("Hi", finish_reason="length")]
    assert read_chunk(chat({}, "function_call")) == [Delta(finish_reason="tool_calls")]
    assert read_chunk(chat({}, "eos")) == [Delta(finish_reason="stop")]
    calls = [{"index": 0, "function": {"arguments": "{"}}]
    assert read_chunk(chat({"tool_calls": calls})) == [Delta(beside={"tool_calls": calls})]
    assert read_chunk(chat({"reasoning_content": "hm"})) == [Delta(beside={"reasoning_content": "hm"})]
    assert read_chunk(chat({"reasoning": "hm"})) == [Delta(beside={"reasoning_content": "hm"})]
    assert read_chunk(chat({"refusal": "no"})) == [Delta(beside={"refusal": "no"})]
    assert read_chunk(chat({"content": "a"}, logprobs={"content": []})) == [
        Delta("a", beside={"logprobs": {"content": []}})
    ]


def test_several_choices_in_one_chunk() -> None:
    chunk = {"choices": [{"index": 1, "delta": {"content": "b"}}, {"index": 0, "delta": {"content": "a"}}]}
    assert read_chunk(chunk) == [Delta("b", choice=1), Delta("a")]


def test_chunks_of_a_completion() -> None:
    assert read_chunk({"choices": [{"text": "x", "index": 0, "finish_reason": None}]}) == [Delta("x")]
    assert read_chunk({"choices": [{"text": "", "index": 0, "finish_reason": "stop"}]}) == [Delta(finish_reason="stop")]


def test_usage_comes_last() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    assert read_chunk({"choices": [], "usage": usage}) == [Delta(usage=Usage(9, 2, 4))]
    assert read_chunk({**chat({}, "stop"), "usage": {"prompt_tokens": 1, "prompt_tokens_details": None}}) == [
        Delta(finish_reason="stop"), Delta(usage=Usage(1, 0)),
    ]  # fmt: skip
    assert read_chunk({"choices": None, "usage": None}) == []


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_engine_that_gave_up_is_not_an_end(reason: str) -> None:
    with pytest.raises(Unavailable):
        read_chunk(chat({}, reason))


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": "x"},
        {"choices": ["x"]},
        chat("x"),
        chat({"content": 1}),
        chat({"content": ["x"]}),
        chat({"tool_calls": "x"}),
        chat({"tool_calls": ["x"]}),
        chat({}, 1),
        {"choices": [{"index": -1, "delta": {}}]},
        {"choices": [{"index": True, "delta": {}}]},
        {"choices": [], "usage": 3},
        {"choices": [], "usage": {"prompt_tokens": "3"}},
        {"choices": [], "usage": {"prompt_tokens": -3}},
    ],
)
def test_another_shape_is_nonsense(chunk: dict[str, object]) -> None:
    with pytest.raises(UpstreamInvalid):
        read_chunk(chunk)
