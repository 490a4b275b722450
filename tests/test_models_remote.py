"""Models behind a server: a real one over a model of random weights, and one that misbehaves as told."""

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from nexus import upstream
from nexus.errors import ConfigError, InvalidRequest, NexusError, Overloaded, Unavailable, UpstreamInvalid
from nexus.models import nim, openai, sentence_transformer
from nexus.models.openai import RemoteEmbedder, RemoteGenerator, RemoteReranker, cut_to, estimate_tokens
from nexus.registry import open_model
from nexus.types import Delta, Image, Message, Prompt, Usage
from nexus.upstream import EventReader, Refusal, Retries, Server, World, clean, parse_address, read_retry_after
from tests.misbehaving import Double, Reply, reply, running_double, stream
from tests.tiny_models import serving_gguf, write_gguf

KEY = "sk-canary-0123456789abcdef"
HELLO = Prompt((Message("user", "Hello"),))
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def ask(generator: Any, prompt: Prompt = HELLO) -> list[Delta]:
    """Every delta of one generation."""

    async def run() -> list[Delta]:
        try:
            async with aclosing(generator.stream(prompt)) as deltas:
                return [delta async for delta in deltas]
        finally:
            await generator.close()

    return asyncio.run(run())


def text_of(deltas: Sequence[Delta], choice: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.choice == choice)


def ends_of(deltas: Sequence[Delta]) -> list[str]:
    return [delta.finish_reason for delta in deltas if delta.finish_reason]


# A real server: llama.cpp's own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def writer(model: Path) -> Iterator[str]:
    with serving_gguf(model, model.with_suffix(".log")) as url:
        yield url


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_real_chat(writer: str, suffix: str) -> None:
    generator = open_model("generate", f"openai:{writer}{suffix}#tiny", name="small", api_key=None, timeout_seconds=60)
    assert (generator.name, generator.sees_images) == ("small", False)
    deltas = ask(generator, replace(HELLO, max_tokens=5, seed=1))
    assert ends_of(deltas) == ["length"]
    assert deltas[-1].usage is not None and deltas[-1].usage.completion == 5
    assert deltas[-1].usage.prompt == 24  # <s>, a space, "user: Hello" and a line's end, "assistant:"
    assert text_of(deltas)


def test_equal_seeds_write_equal_texts_and_others_do_not(writer: str) -> None:
    generator = openai.open(f"openai:{writer}/v1#tiny")
    first, again, other = (
        text_of(ask(generator, replace(HELLO, max_tokens=24, temperature=1.0, seed=seed))) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_a_stop_text_ends_a_real_generation_before_it(writer: str) -> None:
    generator = openai.open(f"openai:{writer}/v1#tiny")
    prompt = replace(HELLO, max_tokens=40, temperature=0.0)
    whole = text_of(ask(generator, prompt))
    stop = next(sign for sign in whole[5:] if sign.isascii() and sign.isprintable())
    deltas = ask(generator, replace(prompt, stop=(stop,)))
    assert text_of(deltas) == whole[: whole.index(stop)]
    assert ends_of(deltas) == ["stop"]


def test_a_real_completion_continues_a_text(writer: str) -> None:
    generator = openai.open(f"openai:{writer}/v1#tiny")
    deltas = ask(generator, Prompt((), text="Once upon", max_tokens=3, seed=1))
    assert ends_of(deltas) == ["length"]
    assert deltas[-1].usage is not None and deltas[-1].usage.completion == 3


def test_a_prompt_too_long_for_a_real_model(writer: str) -> None:
    with pytest.raises(InvalidRequest, match=r"tiny.*context"):
        ask(openai.open(f"openai:{writer}/v1#tiny"), Prompt((Message("user", "long " * 10_000),)))


def test_a_closed_stream_stops_a_real_generation(model: Path) -> None:
    """Two generations need the only slot. The first would fill its 32,768 tokens, were it not left."""
    log = model.with_suffix(".closed.log")

    async def run(url: str) -> list[Delta]:
        generator = openai.open(f"openai:{url}#tiny")
        async with aclosing(generator.stream(replace(HELLO, options={"ignore_eos": True}))) as deltas:
            await anext(deltas)
        async with aclosing(generator.stream(replace(HELLO, max_tokens=2, options={"ignore_eos": True}))) as deltas:
            answer = [delta async for delta in deltas]
        await generator.close()
        return answer

    with serving_gguf(model, log) as url:
        assert ends_of(asyncio.run(run(url))) == ["length"]
    left, whole = map(int, re.findall(r"stop processing: n_tokens = (\d+)", log.read_text()))
    assert left < 20_000 and whole < 30


def test_a_real_server_is_checked(writer: str) -> None:
    async def run(generator: Any) -> None:
        await generator.check()
        await generator.close()

    asyncio.run(run(openai.open(f"openai:{writer}#tiny")))


def test_real_vectors(model: Path) -> None:
    with serving_gguf(model, model.with_suffix(".log"), embeds=True) as url:
        embedder = open_model("embed", f"openai:{url}#tiny", timeout_seconds=60, dimension=None, max_tokens=100)
        texts = [f"text {number}" for number in range(70)]
        vectors = embedder.embed(texts)
        assert (embedder.dimension, embedder.max_tokens, embedder.fingerprint) == (64, 100, "openai:tiny@64")
        assert vectors.shape == (70, 64) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(embedder.embed(["text 66"])[0], vectors[66], atol=1e-4)
        assert float(vectors[0] @ vectors[66]) < 0.9999
        embedder.close()


# A server that misbehaves


@dataclass
class Still:
    """A world in which time passes only by pauses, and chance always says the same."""

    chance: float = 1.0
    paused: list[float] = field(default_factory=list)

    def world(self) -> World:
        async def pause(seconds: float) -> None:
            self.paused.append(seconds)

        return World(lambda: self.chance, lambda: sum(self.paused), NOON.timestamp, self.paused.append, pause)


@pytest.fixture
def double() -> Iterator[Double]:
    with running_double() as double:
        yield double


@pytest.fixture
def still() -> Still:
    return Still()


def served(double: Double, still: Still | None = None, seconds: float = 20.0) -> Server:
    return Server(parse_address(f"openai:{double.url}#m"), "mine", SecretStr(KEY), seconds, (still or Still()).world())


def generator_of(double: Double, still: Still | None = None, seconds: float = 20.0) -> RemoteGenerator:
    return RemoteGenerator(served(double, still, seconds), "m", False)


def say(text: str, finish: str | None = None, index: int = 0) -> dict[str, object]:
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}]}


STREAMED = b"data: " + json.dumps(say("a", "stop")).encode() + b"\n\ndata: [DONE]\n\n"
GOOD = stream(say("a"), say("b", "stop"), "data: [DONE]\n\n")


def post(server: Server) -> object:
    try:
        return server.post("/embeddings", {"input": "x"})
    finally:
        server.close()


BOTH: list[Callable[[Double, Still], object]] = [
    lambda double, still: ask(generator_of(double, still)),
    lambda double, still: post(served(double, still)),
]
BOTH_WAYS = pytest.mark.parametrize("attempt", BOTH, ids=["stream", "post"])


def test_what_is_asked(double: Double) -> None:
    double.answer(GOOD)
    ask(generator_of(double), replace(HELLO, max_tokens=3))
    ask(generator_of(double), Prompt((), text="x"))
    chat, completion = double.asked
    assert (chat.method, chat.path) == ("POST", "/v1/chat/completions")
    assert chat.headers["authorization"] == f"Bearer {KEY}"
    assert chat.headers["accept-encoding"] == "identity"
    assert chat.body["model"] == "m" and chat.body["max_tokens"] == 3
    assert chat.body["stream"] is True and chat.body["stream_options"] == {"include_usage": True}
    assert (completion.path, completion.body["prompt"]) == ("/v1/completions", "x")


def test_half_a_surrogate_pair_is_sent_as_a_question_mark(double: Double) -> None:
    double.answer(GOOD)
    ask(generator_of(double), Prompt((Message("user", "a\ud800b"),)))
    assert double.asked[0].body["messages"] == [{"role": "user", "content": "a?b"}]


def test_a_number_that_is_none_is_not_sent(double: Double) -> None:
    with pytest.raises(InvalidRequest):
        ask(generator_of(double), replace(HELLO, temperature=float("nan")))
    assert not double.asked


def test_openai_itself_is_told_in_its_newer_words() -> None:
    body: dict[str, object] = {}

    class Noting(Server):
        async def events(self, path: str, given: Any) -> Any:
            body.update(given)
            yield upstream.Event("message", json.dumps(say("a", "stop")))

    server = Noting(parse_address("openai:https://api.openai.com/v1#m"), "m", None, 5)
    ask(RemoteGenerator(server, "m", False), replace(HELLO, max_tokens=3))
    assert body["max_completion_tokens"] == 3 and "max_tokens" not in body


def test_usage_and_choices_in_order(double: Double) -> None:
    running = {"prompt_tokens": 5, "completion_tokens": 1}
    double.answer(
        stream(
            {**say("x", index=1), "usage": running}, ": keep-alive\n\n", say("a"), "event: ping\ndata: {}\n\n",
            say("", "length", index=1), say("b", "stop"),
            {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}, "data: [DONE]\n\n",
        )
    )  # fmt: skip
    deltas = ask(generator_of(double), replace(HELLO, options={"n": 2}))
    assert (text_of(deltas), text_of(deltas, 1)) == ("ab", "x")
    assert [delta.usage for delta in deltas if delta.usage] == [Usage(5, 4)] and deltas[-1].usage


def test_a_connection_serves_again_after_a_whole_stream(double: Double) -> None:
    async def run() -> None:
        generator = generator_of(double)
        for _ in range(3):
            async with aclosing(generator.stream(HELLO)) as deltas:
                assert [delta.text async for delta in deltas] == ["a", "b"]
        await generator.close()

    double.answer(GOOD)
    asyncio.run(run())
    assert (len(double.asked), double.connections) == (3, 1)


def test_one_generator_serves_several_event_loops(double: Double) -> None:
    double.answer(GOOD)
    generator = generator_of(double)
    assert [text_of(ask(generator)) for _ in range(2)] == ["ab", "ab"]


# When a stream is whole


@pytest.mark.parametrize(
    "pieces",
    [
        [say("a"), say("", "stop")],  # finished, without [DONE]
        [say("a"), "data: [DONE]\n\n"],  # [DONE], without finish_reason
        [say("a"), "data: [DONE]\r\n\r\n"],
        [say("a", "stop"), {"choices": [], "usage": None}],
    ],
)
def test_a_stream_that_says_its_end_is_whole(double: Double, pieces: list[Any]) -> None:
    double.answer(stream(*pieces))
    deltas = ask(generator_of(double))
    assert (text_of(deltas), ends_of(deltas)) == ("a", ["stop"])


def test_after_done_nobody_waits_for_the_connection_to_end(double: Double) -> None:
    double.answer(stream(say("a", "stop"), "data: [DONE]\n\n", then="hang"))
    assert text_of(ask(generator_of(double))) == "a"
    assert double.left.wait(60)


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        (stream(say("a")), 1),
        (stream(say("a"), then="close"), 1),
        (stream(say("a"), 'data: {"choices": [{"ind', then="close"), 1),
        (stream(say("a"), 'data: {"choices": [{"ind'), 1),
        (stream(say("a"), 'data: {"choices": [], "usage": null}\n'), 1),
        (stream(say("a", "stop"), say("b", index=1)), 2),
        (stream(say("a", "stop")), 2),
        (stream(say("a"), say("", "abort"), "data: [DONE]\n\n"), 1),
    ],
)
def test_a_stream_that_breaks_off_is_never_a_shorter_answer(double: Double, answer: Reply, choices: int) -> None:
    double.answer(answer)
    with pytest.raises(Unavailable):
        ask(generator_of(double), replace(HELLO, options={"n": choices}))
    assert len(double.asked) == 1  # it had begun: nothing is asked twice


@pytest.mark.parametrize("pieces", [[], [say("a")]], ids=["before the first token", "between tokens"])
def test_a_stream_that_hangs_is_given_up(double: Double, pieces: list[Any]) -> None:
    double.answer(stream(*pieces, then="hang"))
    with pytest.raises(Unavailable, match="4 s"):  # long enough for the request to arrive on a busy machine
        ask(generator_of(double, seconds=4))
    assert double.left.wait(60)
    assert len(double.asked) == 1


def test_signs_of_life_are_no_tokens(double: Double) -> None:
    """Comments keep a connection alive; they do not extend the time in which a token must come."""

    async def run() -> None:
        async def alive() -> Any:
            while True:
                await asyncio.sleep(0)
                yield upstream.Event("message", '{"choices": []}')

        server = served(double, seconds=1)
        server.events = lambda path, body: alive()  # type: ignore[assignment]
        with pytest.raises(Unavailable):
            await anext(RemoteGenerator(server, "m", False).stream(HELLO))

    asyncio.run(run())


def test_closing_the_generator_closes_the_connection(double: Double) -> None:
    async def run() -> None:
        generator = generator_of(double)
        deltas = generator.stream(HELLO)
        assert (await anext(deltas)).text == "a"
        await deltas.aclose()
        assert await asyncio.to_thread(double.left.wait, 10)
        await generator.close()

    double.answer(stream(say("a"), then="hang"))
    asyncio.run(run())


def test_a_cancelled_wait_closes_the_connection(double: Double) -> None:
    async def run() -> None:
        generator = generator_of(double)
        deltas = generator.stream(HELLO)
        await anext(deltas)
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.to_thread(double.left.wait, 10)
        await generator.close()

    double.answer(stream(say("a"), then="hang"))
    asyncio.run(run())


# Errors in a stream


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ({"error": {"message": "kaputt", "type": "server_error", "code": None}}, Unavailable),
        ({"error": {"message": "too long", "code": 400, "type": "BadRequestError"}}, InvalidRequest),
        ({"error": {"message": "bad", "type": "invalid_request_error", "code": "too_long"}}, InvalidRequest),
        ({"error": {"message": "busy", "code": 503}}, Overloaded),
        ({"error": "kaputt"}, Unavailable),
        ({"object": "error", "message": "kaputt", "code": 500}, Unavailable),
        ('event: error\ndata: {"message": "slow down", "code": 429}\n\n', Overloaded),
        ('event: error\ndata: {"error": {"message": "kaputt"}}\n\n', Unavailable),
        ("data: <html>\n\n", UpstreamInvalid),
        ("data: [1]\n\n", UpstreamInvalid),
        ("data: \xff\n\n", UpstreamInvalid),
        (say("b", index=1), UpstreamInvalid),
        ({"choices": "x"}, UpstreamInvalid),
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [[], [say("a")]], ids=["first", "later"])
def test_an_error_in_a_stream(double: Double, before: list[Any], piece: Any, kind: type[NexusError]) -> None:
    double.answer(stream(*before, piece, "data: [DONE]\n\n"))
    with pytest.raises(kind) as caught:
        ask(generator_of(double))
    assert type(caught.value) is kind
    assert len(double.asked) == 1


def test_a_stream_with_nothing_but_its_end_is_nonsense(double: Double) -> None:
    double.answer(stream("data: [DONE]\n\n"))
    with pytest.raises(UpstreamInvalid):
        ask(generator_of(double))


@pytest.mark.parametrize(
    "answer",
    [
        reply(200, b"<html>sign in</html>", "text/html"),
        reply(200, {"choices": []}),
        reply(200, STREAMED, "text/plain"),
        reply(200, STREAMED, "text/event-stream", content_encoding="gzip"),
        reply(302, location="http://169.254.169.254/"),
        reply(307, location="/elsewhere"),
        reply(204),
        reply(418),
        reply(501),
    ],
)
def test_an_answer_that_is_none(double: Double, answer: Reply) -> None:
    double.answer(answer)
    with pytest.raises(UpstreamInvalid):
        ask(generator_of(double))
    assert len(double.asked) == 1


def test_an_answer_that_is_none_is_left_at_once(double: Double) -> None:
    async def run() -> None:
        generator = generator_of(double)
        with pytest.raises(UpstreamInvalid):
            await anext(generator.stream(HELLO))
        assert await asyncio.to_thread(double.left.wait, 10)
        await generator.close()

    double.answer(Reply(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 99\r\n\r\n<html>", "hang"))
    asyncio.run(run())


@pytest.mark.parametrize("limit", ["MOST_STREAM_BYTES", "MOST_LINE_BYTES"])
def test_a_stream_over_its_limit(double: Double, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(upstream, limit, 10_000)
    double.answer(stream(*([say("x" * 500)] * 40 if limit == "MOST_STREAM_BYTES" else ["data: " + "x" * 20_000])))
    with pytest.raises(UpstreamInvalid, match="more than"):
        ask(generator_of(double))


# What is tried again


@BOTH_WAYS
@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_two_failures_are_forgotten(
    double: Double, still: Still, attempt: Callable[[Double, Still], object], status: int
) -> None:
    good = GOOD if attempt is BOTH[0] else reply(200, {})
    double.answer(reply(status, {"error": {"message": "x"}}), reply(status), good)
    attempt(double, still)
    assert len(double.asked) == 3
    assert still.paused == [0.5, 1.0]
    assert double.asked[0].body == double.asked[2].body


@BOTH_WAYS
@pytest.mark.parametrize(
    ("status", "kind"),
    [(408, Unavailable), (409, Unavailable), (429, Overloaded), (500, Unavailable), (503, Overloaded)],
)
def test_three_failures_are_the_answer(
    double: Double, still: Still, attempt: Callable[[Double, Still], object], status: int, kind: type[NexusError]
) -> None:
    double.answer(reply(status))
    with pytest.raises(kind, match=str(status)) as caught:
        attempt(double, still)
    assert type(caught.value) is kind
    assert len(double.asked) == 3


@BOTH_WAYS
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest), (404, InvalidRequest), (413, InvalidRequest), (422, InvalidRequest),
        (401, UpstreamInvalid), (403, UpstreamInvalid), (301, UpstreamInvalid), (405, UpstreamInvalid),
    ],
)  # fmt: skip
def test_some_failures_are_final_at_once(
    double: Double, still: Still, attempt: Callable[[Double, Still], object], status: int, kind: type[NexusError]
) -> None:
    double.answer(reply(status, {"error": {"message": "no such thing"}}))
    with pytest.raises(kind) as caught:
        attempt(double, still)
    assert type(caught.value) is kind
    assert len(double.asked) == 1
    assert ("no such thing" in caught.value.message) == (kind is InvalidRequest)


@BOTH_WAYS
def test_pauses_have_full_jitter(double: Double, still: Still, attempt: Callable[[Double, Still], object]) -> None:
    still.chance = 0.25
    double.answer(reply(500))
    with pytest.raises(Unavailable):
        attempt(double, still)
    assert still.paused == [0.125, 0.25]


@BOTH_WAYS
def test_a_server_says_when_to_come_back(
    double: Double, still: Still, attempt: Callable[[Double, Still], object]
) -> None:
    date = format_datetime(NOON.replace(second=7), usegmt=True)
    good = GOOD if attempt is BOTH[0] else reply(200, {})
    double.answer(reply(429, retry_after="3"), reply(503, retry_after=date), good)
    attempt(double, still)
    assert still.paused == [3, 7]


@BOTH_WAYS
def test_nobody_waits_past_the_deadline(
    double: Double, still: Still, attempt: Callable[[Double, Still], object]
) -> None:
    double.answer(reply(429, retry_after="21"))
    with pytest.raises(Overloaded):
        attempt(double, still)
    assert still.paused == [] and len(double.asked) == 1


@BOTH_WAYS
def test_a_connection_that_ends_before_an_answer_is_tried_again(
    double: Double, still: Still, attempt: Callable[[Double, Still], object]
) -> None:
    good = GOOD if attempt is BOTH[0] else reply(200, {})
    double.answer(Reply(b"", "close"), Reply(b"HTTP/1.1 200", "close"), good)
    attempt(double, still)
    assert len(double.asked) == 3


@BOTH_WAYS
def test_nobody_there(still: Still, attempt: Callable[[Double, Still], object]) -> None:
    with running_double() as gone:
        pass
    with pytest.raises(Unavailable, match="reached"):
        attempt(gone, still)
    assert len(still.paused) == 2


def test_the_retries_by_themselves(still: Still) -> None:
    retries = Retries(still.world(), 10)
    busy = Refusal(Overloaded("busy"), again=True, retry_after=9.5)
    assert retries.seconds_until_next(busy) == 9.5
    still.paused.append(9.5)
    with pytest.raises(Overloaded):
        retries.seconds_until_next(busy)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None), ("5", 5), (" 5 ", 5), ("0", 0), ("1.5", 1.5), ("-5", None), ("soon", None), ("nan", None),
        ("inf", None),
        ("Sat, 21 Nov 2026 12:00:30 GMT", 30), ("Sat, 21 Nov 2026 11:00:30 GMT", 0), ("9" * 30, None),
    ],
)  # fmt: skip
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert read_retry_after(value, NOON.timestamp()) == seconds


# What is told


LEAKS = [KEY, "http://inner.example:8000/v1", "inner.example", "10.1.2.3", "nvapi-abcdef123", "/srv/models/llama.gguf"]


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("status", [400, 401, 403, 422, 429, 500, 302, 418])
def test_no_error_tells_a_key_an_address_or_a_path(leak: str, status: int) -> None:
    server = Server(parse_address("openai:http://inner.example:8000/v1#m"), "mine", KEY, 5)
    for body in ({"error": {"message": f"bad: {leak} is wrong"}}, {"detail": leak}, {"message": leak}, {"error": leak}):
        error = server.explain(status, json.dumps(body).encode()).error
        assert leak not in str(error) and leak not in repr(error)
    assert KEY not in repr(server)


def test_a_long_message_is_cut() -> None:
    assert len(clean("x y " * 10_000)) == upstream.MOST_TOLD
    assert clean("a\r\n\tb\x1b[31m c") == "a b [31m c"
    assert clean("the field 'max_tokens' and/or 3.5 must be >= 1") == "the field 'max_tokens' and/or 3.5 must be >= 1"
    assert clean("key=abc on ai said: abcde", ("abc", "", "ai")) == "key=… on … said: abcde"


@pytest.mark.parametrize("key", ["with space", "naïve", "line\nend", SecretStr("tab\there")])
def test_a_key_that_is_none_is_refused_without_being_told(key: str | SecretStr) -> None:
    with pytest.raises(ConfigError) as caught:
        openai.open("openai:http://h/v1#m", api_key=key)
    assert "line" not in str(caught.value) and "naïve" not in str(caught.value)


# Reading events


def test_events_by_any_cut() -> None:
    written = (
        ": hi\n\nevent: error\r\ndata: a\r\n\r\ndata:b\ndata: c ü\nid: 3\nretry: 9\n\ndata\n\n\ndata: rest".encode()
    )
    expected = [("error", "a"), ("message", "b\nc ü"), ("message", "")]
    for size in range(1, len(written) + 1):
        reader = EventReader()
        cuts = [written[start : start + size] for start in range(0, len(written), size)]
        assert [tuple(event) for cut in cuts for event in reader.feed(cut)] == expected


# Vectors


VECTORS = {"data": [{"index": 0, "embedding": [1, 0]}, {"index": 1, "embedding": [1, 0]}]}


def vectors(*rows: Sequence[float]) -> Reply:
    return reply(200, {"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]})


def embedder_of(double: Double, dimension: int | None = 2, **options: Any) -> RemoteEmbedder:
    return RemoteEmbedder(served(double), "m", dimension, options.pop("max_tokens", 512), **options)


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    parts: list[Any] = []
    yield parts
    for part in parts:
        part.close()


def test_vectors_come_in_the_order_of_the_texts(double: Double, closing: list[Any]) -> None:
    embedder = embedder_of(double)
    closing.append(embedder)
    double.answer(reply(200, {"data": [{"index": 1, "embedding": [0, 2]}, {"index": 0, "embedding": [3.0, 4.0]}]}))
    np.testing.assert_allclose(embedder.embed(["a", "b"]), [[0.6, 0.8], [0, 1]], rtol=1e-6)
    assert double.asked[0].path == "/v1/embeddings"
    assert double.asked[0].body == {"model": "m", "input": ["a", "b"], "encoding_format": "float"}
    assert embedder.embed([]).shape == (0, 2)
    assert len(double.asked) == 1


def test_many_texts_are_sent_in_batches(double: Double, closing: list[Any]) -> None:
    embedder = embedder_of(double)
    closing.append(embedder)
    double.answer(vectors(*[[1, i] for i in range(64)]), vectors(*[[1, i] for i in range(64)]), vectors([1, 0], [1, 1]))
    assert embedder.embed(["x"] * 130).shape == (130, 2)
    assert [len(asked.body["input"]) for asked in double.asked] == [64, 64, 2]  # type: ignore[arg-type]


def test_texts_too_long_are_cut_before_they_are_sent(double: Double, closing: list[Any]) -> None:
    embedder = embedder_of(double, max_tokens=4)
    closing.append(embedder)
    double.answer(vectors([1, 0]))
    embedder.embed(["the cat sat on the mat"])
    assert double.asked[0].body["input"] == ["the cat sat on"]


@pytest.mark.parametrize(
    "answer",
    [
        vectors([1, 0]),
        vectors([1, 0], [1, 0], [1, 0]),
        vectors([1, 0], [0, 0]),
        vectors([1, 0, 0], [0, 1, 0]),
        vectors([1, 0], [1, 0, 0]),
        vectors([], []),
        vectors([1e200, 1e200], [1e308, 1e308]),
        vectors([1, 0], ["1", "0"]),  # type: ignore[list-item]
        vectors([1, 0], [None, 0]),  # type: ignore[list-item]
        vectors([True, False], [True, False]),
        reply(200, b'{"data": [{"index": 0, "embedding": [NaN, 1]}, {"index": 1, "embedding": [1, 0]}]}'),
        reply(200, {"data": [{"index": 0, "embedding": [1, 0]}, {"index": 0, "embedding": [1, 0]}]}),
        reply(200, {"data": [{"index": True, "embedding": [1, 0]}, {"index": 0, "embedding": [1, 0]}]}),
        reply(200, {"data": [{"embedding": [1, 0]}, {"embedding": [1, 0]}]}),
        reply(200, {"data": ["x", "y"]}),
        reply(200, {"data": None}),
        reply(200, []),
        reply(200, b"[" * 100_000),
        reply(200, b"<html>", "text/html"),
        reply(200, VECTORS, "text/plain"),
        reply(200, VECTORS, content_encoding="gzip"),
        reply(200, b""),
    ],
)  # fmt: skip
def test_vectors_that_are_none(double: Double, closing: list[Any], answer: Reply) -> None:
    embedder = embedder_of(double)
    closing.append(embedder)
    double.answer(answer)
    with pytest.raises(UpstreamInvalid):
        embedder.embed(["a", "b"])
    assert len(double.asked) == 1


def test_an_answer_over_its_limit_is_not_read(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "MOST_BYTES", 1000)
    double.answer(reply(200, {"data": "x" * 1000}))
    with pytest.raises(UpstreamInvalid, match="more than"):
        post(served(double))


def test_an_answer_that_breaks_off_is_not_asked_for_again(double: Double) -> None:
    double.answer(Reply(reply(200, {"data": "x" * 100}).raw[:-10], "close"))
    with pytest.raises(Unavailable, match="broke off"):
        post(served(double))
    assert len(double.asked) == 1


def test_an_answer_that_hangs_is_given_up(double: Double) -> None:
    double.answer(Reply(b"", "hang"))
    with pytest.raises(Unavailable, match="1 s"):
        post(served(double, seconds=1))
    assert len(double.asked) == 1


def test_an_answer_that_trickles_past_its_deadline_is_given_up(double: Double) -> None:
    """Each part comes quickly enough for its own; all of them together take too long."""
    world = replace(Still().world(), clock=itertools.count(0, 15).__next__)
    double.answer(reply(200, {"data": "x" * 500_000}))
    with pytest.raises(Unavailable, match="in time"):
        post(Server(parse_address(f"openai:{double.url}#m"), "mine", None, 20, world))


def test_the_dimension_is_asked_for_where_it_is_not_set(double: Double, closing: list[Any]) -> None:
    double.answer(vectors([1, 2, 3]))
    embedder = embedder_of(double, None)
    closing.append(embedder)
    assert (embedder.dimension, embedder.fingerprint) == (3, "openai:m@3")
    assert len(double.asked) == 1


# Rankings


def test_scores_come_in_the_order_of_the_texts(double: Double) -> None:
    server = served(double)
    double.answer(reply(200, {"results": [{"index": 1, "relevance_score": 0.75}, {"index": 0, "relevance_score": 0}]}))
    assert RemoteReranker(server, "m").rerank("q", ["a", "b"]).tolist() == [0, 0.75]
    assert double.asked[0].path == "/v1/rerank"
    assert double.asked[0].body == {"model": "m", "query": "q", "documents": ["a", "b"], "top_n": 2}
    double.answer(reply(200, {"results": [{"index": 0, "relevance_score": -1e4}, {"index": 1, "relevance_score": 3}]}))
    assert RemoteReranker(server, "m").rerank("q", ["a", "b"]).tolist() == pytest.approx([0, 0.95257413])
    assert RemoteReranker(server, "m").rerank("q", []).shape == (0,)
    server.close()


RANKINGS = pytest.mark.parametrize(
    "items",
    [
        [(0, 1.0)], [(0, 1.0), (0, 1.0)], [(0, 1.0), (2, 1.0)], [(0, 1.0), (1, None)], [(0, 1.0), (1, "2")],
        [(0, 1.0), (1, 1e300)], [(0, 1.0), (1, True)], [(0, 1.0), (1, 1.0), (2, 1.0)], [],
    ],
)  # fmt: skip


@RANKINGS
def test_scores_that_are_none(double: Double, items: list[tuple[int, object]]) -> None:
    double.answer(reply(200, {"results": [{"index": index, "relevance_score": score} for index, score in items]}))
    server = served(double)
    with pytest.raises(UpstreamInvalid):
        RemoteReranker(server, "m").rerank("q", ["a", "b"])
    server.close()


# NIM


def open_nim(double: Double, task: Any, **options: Any) -> Any:
    return open_model(task, f"nim:{double.url}#nv", api_key=KEY, timeout_seconds=20, **options)


def test_a_nim_embedder_is_told_what_the_texts_are(double: Double, closing: list[Any]) -> None:
    double.answer(vectors([1, 0]))
    embedder = open_nim(double, "embed", dimension=2)
    closing.append(embedder)
    embedder.embed(["a"], "query")
    embedder.embed(["a"])
    assert [asked.body["input_type"] for asked in double.asked] == ["query", "passage"]
    assert {asked.body["truncate"] for asked in double.asked} == {"END"}
    assert embedder.fingerprint == "nim:nv@2"


def test_a_nim_ranking(double: Double, closing: list[Any]) -> None:
    reranker = open_nim(double, "rerank")
    double.answer(reply(200, {"rankings": [{"index": 1, "logit": 2.0}, {"index": 0, "logit": -1000.0}]}))
    assert reranker.rerank("q", ["a", "b"]).tolist() == pytest.approx([0, 0.880797])
    closing.append(reranker)
    assert double.asked[0].path == "/v1/ranking"
    assert double.asked[0].body == {
        "model": "nv", "query": {"text": "q"}, "passages": [{"text": "a"}, {"text": "b"}], "truncate": "END",
    }  # fmt: skip


@RANKINGS
def test_a_nim_ranking_that_is_none(double: Double, closing: list[Any], items: list[tuple[int, object]]) -> None:
    reranker = open_nim(double, "rerank")
    closing.append(reranker)
    double.answer(reply(200, {"rankings": [{"index": index, "logit": logit} for index, logit in items]}))
    with pytest.raises(UpstreamInvalid):
        reranker.rerank("q", ["a", "b"])


def check(generator: Any) -> None:
    async def run() -> None:
        try:
            await generator.check()
        finally:
            await generator.close()

    asyncio.run(run())


def test_a_nim_is_ready_by_its_status_alone(double: Double) -> None:
    double.answer(reply(200, b"<whatever>", "text/html"))
    check(open_nim(double, "generate"))
    assert (double.asked[0].method, double.asked[0].path) == ("GET", "/v1/health/ready")
    for status in (503, 404, 401, 302):
        double.answer(reply(status, {"ready": True}))
        with pytest.raises(Unavailable):
            check(open_nim(double, "generate"))


def test_a_nim_writes_as_openai_does(double: Double) -> None:
    double.answer(GOOD)
    assert text_of(ask(open_nim(double, "generate"))) == "ab"


def test_checks_of_other_servers(double: Double) -> None:
    for status, fine in ((200, True), (404, True), (405, True), (401, False), (500, False), (302, False)):
        double.answer(reply(status))
        if fine:
            check(generator_of(double))
        else:
            with pytest.raises(Unavailable):
                check(generator_of(double))
    with running_double() as gone:
        pass
    with pytest.raises(Unavailable):
        check(generator_of(gone))


# Addresses, pictures, lengths


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("openai:https://h#m", "https://h/v1"),
        ("openai:https://h/#m", "https://h/v1"),
        ("openai:https://h/v1#m", "https://h/v1"),
        ("openai:http://[::1]:8000/v1/#m", "http://[::1]:8000/v1"),
        ("openai:https://h/openai/v1beta#m", "https://h/openai/v1beta"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert parse_address(address) == upstream.Address(url, "m")


def test_a_model_may_have_any_name() -> None:
    assert parse_address("openai:http://h/v1#org/model:7b").model == "org/model:7b"


@pytest.mark.parametrize(
    "address",
    [
        "openai:", "openai:#m", "openai:https://h/v1", "openai:https://h/v1#", "openai:ftp://h/v1#m", "openai:h/v1#m",
        "openai:https:///v1#m", "openai:https://me:secret-word@h/v1#m", "openai:https://h/v1?key=secret-word#m",
        "openai:https://h:notaport/v1#m", "openai:https://h:0/v1#m", "openai:file:///etc/passwd#m",
        "openai:https://h /v1#m",
        "openai:https://[::1/v1#m",
    ],
)  # fmt: skip
@pytest.mark.parametrize("opened", [openai.open, nim.open, openai.open_tokenizer, nim.open_tokenizer])
def test_addresses_that_are_none(opened: Callable[[str], object], address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(address)
    assert "secret-word" not in str(caught.value)


def test_pictures_go_to_models_that_see_them(double: Double) -> None:
    picture = Prompt((Message("user", (Image("data:image/png;base64,AA"), "What?")),))
    double.answer(GOOD)
    with pytest.raises(InvalidRequest, match="pictures"):
        ask(generator_of(double), picture)
    assert not double.asked
    sees = openai.open(f"openai:{double.url}#m", images=True)
    assert sees.sees_images  # type: ignore[union-attr]
    ask(sees, picture)
    assert double.asked[0].body["messages"][0]["content"][0]["type"] == "image_url"  # type: ignore[index]


LENGTHS = [
    "Restart the service, then read its log: error 0x80070005 means that access was denied.",
    "def open_tokenizer(address: str) -> Callable[[Sequence[str]], list[int]]:\n    return estimate_tokens\n",
    "internationalization antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Größe der Überdruckventile prüfen; naïve café; Ærøskøbing",
    "Перезапустите службу и проверьте журнал.",
    "数据库连接失败，请检查网络。",
    "|  a |  b |\n|----|----|\n| 12 | 3.5 |\n\n\n    x",
    "dGhlIHF1aWNrIGJyb3duIGZveA== 9f86d081884c7d659a2feaa0c55ad015",
    "XYZZY QWERTY PLUGH 😀👩‍🚀",
]


def test_the_estimate_is_never_below_a_real_tokenizer() -> None:
    manuals = Path(__file__).parent.parent / "deployments" / "manuals"
    texts = [text for path in manuals.glob("*.md") for text in path.read_text().split("\n\n")]
    assert len(texts) > 20
    counted = sentence_transformer.open_tokenizer("sentence-transformer:all-MiniLM-L6-v2")(LENGTHS + texts)
    estimated = openai.open_tokenizer("openai:http://h/v1#m")(LENGTHS + texts)
    assert all(ours >= theirs for ours, theirs in zip(estimated, counted, strict=True))
    assert sum(estimated) < 2 * sum(counted)


@pytest.mark.parametrize("text", [*LENGTHS, "a\ud800b", ""])
def test_a_cut_text_is_the_longest_that_fits(text: str) -> None:
    (tokens,) = estimate_tokens([text])
    assert tokens == 0 if not text else tokens > 0
    assert cut_to(text, tokens) == text
    for most in range(tokens):
        kept = cut_to(text, most)
        assert text.startswith(kept) and estimate_tokens([kept])[0] <= most
