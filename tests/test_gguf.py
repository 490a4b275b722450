"""A GGUF file in process: turns, stopping and errors over a stand-in for llama.cpp, and itself where it is."""

import asyncio
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nexus.errors import ConfigError, InvalidRequest, Unavailable
from nexus.models import gguf
from nexus.registry import open_model
from nexus.types import Delta, Image, Message, Prompt, Usage
from tests.tiny_models import write_gguf

HELLO = Prompt((Message("user", "Hello"),), max_tokens=4)
END = 2


@dataclass
class Stage:
    """What the stand-in did, and a gate before each token that the test opens."""

    opened: dict[str, Any] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    busy: int = 0
    most_busy: int = 0
    threads: set[str] = field(default_factory=set)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    gate: threading.Semaphore | None = None
    fault: Exception | None = None


def stand_in(stage: Stage) -> type:
    """`llama_cpp.Llama` with its call shapes: a chat is a completion of the rendered prompt, by `generate`."""

    class Llama:
        def __init__(self, model_path: str, n_ctx: int = 512, n_gpu_layers: int = 0, verbose: bool = True) -> None:
            stage.opened = {"model_path": model_path, "n_ctx": n_ctx, "verbose": verbose}
            self.context = n_ctx

        def token_eos(self) -> int:
            return END

        def generate(self, tokens: list[int], temp: float = 0.8) -> Iterator[int]:
            number = 97
            while True:
                if stage.gate is not None:
                    assert stage.gate.acquire(timeout=20)
                stage.tokens += 1
                yield number
                number = END if number == 100 else number + 1

        def create_completion(
            self, prompt: str | list[int], max_tokens: int | None = 16, temperature: float = 0.8, stop: Any = (),
            seed: int | None = None, stream: bool = False, model: str | None = None, echo: bool = False,
        ) -> Iterator[dict[str, Any]]:  # fmt: skip
            stage.calls.append({"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "seed": seed})
            assert stream
            return self._complete(prompt if isinstance(prompt, list) else [1, *prompt.encode()], max_tokens)

        def _complete(self, prompt: list[int], most: int | None) -> Iterator[dict[str, Any]]:
            stage.busy += 1
            stage.most_busy = max(stage.most_busy, stage.busy)
            stage.threads.add(threading.current_thread().name)
            try:
                if len(prompt) >= self.context:
                    raise ValueError(f"Requested tokens ({len(prompt)}) exceed context window of {self.context}")
                finish = "length"
                for written, token in enumerate(self.generate(prompt, temp=0.5), 1):
                    if stage.fault is not None:
                        raise stage.fault
                    if token == END:
                        finish = "stop"
                        break
                    yield {"choices": [{"text": chr(token), "index": 0, "logprobs": None, "finish_reason": None}]}
                    if written == most:
                        break
                yield {"choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": finish}]}
            finally:
                stage.busy -= 1
                stage.ended.release()

        def create_chat_completion(
            self, messages: list[dict[str, Any]], tools: Any = None, tool_choice: Any = None, temperature: float = 0.2,
            top_p: float = 0.95, stream: bool = False, stop: Any = (), seed: int | None = None,
            response_format: Any = None, max_tokens: int | None = None, model: str | None = None,
        ) -> Iterator[dict[str, Any]]:  # fmt: skip
            rendered = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
            chunks = self.create_completion(
                [1, *rendered.encode()], max_tokens=max_tokens, temperature=temperature, seed=seed, stream=stream
            )
            stage.calls[-1]["response_format"] = response_format
            return self._as_chat(chunks)

        def _as_chat(self, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for number, chunk in enumerate(chunks):
                (choice,) = chunk["choices"]
                if number == 0:
                    yield {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}
                finish = choice["finish_reason"]
                delta = {"content": choice["text"]} if finish is None else {}
                yield {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

        def close(self) -> None:
            stage.opened["closed"] = True

    return Llama


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    module = ModuleType("llama_cpp")
    module.Llama = stand_in(stage)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return stage


@pytest.fixture
def generator(stage: Stage, file: Path) -> Iterator[gguf.GgufGenerator]:
    generator = gguf.open(f"gguf:{file}")
    yield generator
    if stage.gate is not None:
        stage.gate.release(1000)
    generator.close()


def ask(generator: gguf.GgufGenerator, prompt: Prompt = HELLO) -> list[Delta]:
    async def run() -> list[Delta]:
        async with aclosing(generator.stream(prompt)) as deltas:
            return [delta async for delta in deltas]

    return asyncio.run(run())


def test_a_chat_is_written_to_its_end(generator: gguf.GgufGenerator) -> None:
    assert ask(generator, replace(HELLO, max_tokens=None)) == [
        Delta("a"), Delta("b"), Delta("c"), Delta("d"), Delta(finish_reason="stop"), Delta(usage=Usage(13, 4)),
    ]  # fmt: skip


def test_a_chat_stops_at_its_length(generator: gguf.GgufGenerator) -> None:
    assert ask(generator, replace(HELLO, max_tokens=2)) == [
        Delta("a"), Delta("b"), Delta(finish_reason="length"), Delta(usage=Usage(13, 2)),
    ]  # fmt: skip


def test_a_completion_has_no_length_of_llama_cpps_own(generator: gguf.GgufGenerator, stage: Stage) -> None:
    deltas = ask(generator, Prompt((), text="Once", seed=3, temperature=0.0))
    assert deltas[-1] == Delta(usage=Usage(5, 4))
    assert stage.calls == [{"prompt": "Once", "max_tokens": None, "temperature": 0.0, "seed": 3}]


def test_how_the_file_is_opened(stage: Stage, file: Path) -> None:
    small = open_model("generate", f"gguf:{file}", name="small", context_length=99, api_key=None, timeout_seconds=3)
    assert (small.name, small.sees_images) == ("small", False)
    assert stage.opened == {"model_path": str(file), "n_ctx": 99, "verbose": False}
    asyncio.run(small.check())
    small.close()
    assert stage.opened["closed"]
    assert gguf.open(f"gguf:{file}").name == "tiny"
    assert stage.opened["n_ctx"] == 8192


def test_two_generations_take_turns(generator: gguf.GgufGenerator, stage: Stage) -> None:
    async def run() -> tuple[list[Delta], list[Delta]]:
        async def one() -> list[Delta]:
            return [delta async for delta in generator.stream(HELLO)]

        return await asyncio.gather(one(), one())

    first, second = asyncio.run(run())
    assert first == second and len(first) == 6
    assert stage.most_busy == 1 and len(stage.threads) == 1
    assert threading.current_thread().name not in stage.threads


def test_closing_stops_after_the_token_being_computed(generator: gguf.GgufGenerator, stage: Stage) -> None:
    stage.gate = gate = threading.Semaphore(1)

    async def run() -> None:
        deltas = generator.stream(replace(HELLO, max_tokens=None))
        assert await anext(deltas) == Delta("a")
        await deltas.aclose()  # while the second token waits for the gate
        gate.release(1000)
        assert await asyncio.to_thread(stage.ended.acquire, timeout=20)

    asyncio.run(run())
    assert stage.tokens == 2
    assert text_of(ask(generator)) == "abcd"


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_waiting_request_that_is_left_never_begins(generator: gguf.GgufGenerator, stage: Stage) -> None:
    stage.gate = threading.Semaphore(1)
    gate = stage.gate

    async def run() -> str:
        running = generator.stream(HELLO)
        await anext(running)
        waiting = asyncio.ensure_future(anext(generator.stream(Prompt((), text="never"))))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.release(1000)
        return text_of([delta async for delta in running])

    assert asyncio.run(run()) == "bcd"
    assert ask(generator)
    assert "never" not in [call["prompt"] for call in stage.calls]


def test_a_cancelled_request_frees_the_place(generator: gguf.GgufGenerator, stage: Stage) -> None:
    stage.gate = threading.Semaphore(1)
    gate = stage.gate

    async def run() -> list[Delta]:
        running = generator.stream(HELLO)
        await anext(running)
        waiting = asyncio.ensure_future(anext(running))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.release(1000)
        return [delta async for delta in generator.stream(HELLO)]

    assert len(asyncio.run(run())) == 6
    assert stage.most_busy == 1


def test_a_prompt_too_long(generator: gguf.GgufGenerator) -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        ask(generator, Prompt((Message("user", "x" * 8192),)))
    assert len(ask(generator)) == 6


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(ValueError("the template says /srv/no"), InvalidRequest), (RuntimeError("decode"), Unavailable)],
)
def test_what_llama_cpp_raises(
    generator: gguf.GgufGenerator, stage: Stage, fault: Exception, kind: type[Exception]
) -> None:
    stage.fault = fault
    with pytest.raises(kind) as caught:
        ask(generator)
    assert str(fault) not in str(caught.value)
    stage.fault = None
    assert len(ask(generator)) == 6


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt((Message("user", (Image("data:image/png;base64,AA"),)),)),
        replace(HELLO, options={"n": 2}),
        replace(HELLO, options={"logprobs": True}),
        replace(HELLO, options={"echo": True}),
        Prompt((), text="x", options={"tools": []}),
    ],
)
def test_what_it_cannot_do_is_refused_before_its_turn(
    generator: gguf.GgufGenerator, stage: Stage, prompt: Prompt
) -> None:
    with pytest.raises(InvalidRequest):
        ask(generator, prompt)
    assert not stage.calls


def test_options_are_put_in_llama_cpps_words(generator: gguf.GgufGenerator, stage: Stage) -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    ask(generator, replace(HELLO, options={"n": 1, "user": "u", "top_p": None, "response_format": wanted}))
    assert stage.calls[0]["response_format"] == {"type": "json_object", "schema": schema}


@pytest.mark.parametrize("content", [None, b"", b"GGU", b"PK\x03\x04 a zip"])
def test_a_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # it is not even imported
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="no file" if content is None else "not GGUF"):
        gguf.open(f"gguf:{path}")


@pytest.mark.parametrize("address", ["gguf:", "gguf:/", "gguf:/nowhere/x.gguf"])
def test_an_address_that_names_no_file(address: str) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        gguf.open(address)


def test_without_the_library_it_is_said_how_to_get_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ConfigError, match=r"pip install nexus\[gguf\]"):
        gguf.open(f"gguf:{file}")


def test_a_file_that_llama_cpp_cannot_load(stage: Stage, file: Path) -> None:
    def fail(**options: object) -> None:
        raise ValueError("Failed to load model from file: /srv/secret")

    sys.modules["llama_cpp"].Llama.__init__ = lambda self, **options: fail()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="cannot load") as caught:
        gguf.open(f"gguf:{file}")
    assert "/srv" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_itself(file: Path) -> None:
    generator = gguf.open(f"gguf:{file}", context_length=512)
    first, again = (ask(generator, replace(HELLO, seed=7)) for _ in range(2))
    assert first == again
    usage = first[-1].usage  # a letter of several bytes is not cut in two, so it may be some tokens more than asked
    assert usage is not None and 4 <= usage.completion <= 7
    with pytest.raises(InvalidRequest, match="too long"):
        ask(generator, Prompt((Message("user", "x" * 600),)))
    generator.close()
