"""A GGUF file in this process, by llama.cpp: one generation at a time, in a thread of its own.

An address is `gguf:/path/model.gguf`. llama-cpp-python is compiled while it is installed and therefore an extra:
`pip install nexus[gguf]`. Where many ask at once, run llama.cpp's own server and give `openai:` its URL.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import util
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from nexus.chat_format import read_chunk, to_body
from nexus.errors import ConfigError, InvalidRequest, Unavailable
from nexus.registry import Task
from nexus.types import Delta, Prompt, Usage

TASKS: tuple[Task, ...] = ("generate",)

_MAGIC = b"GGUF"
_UNHEEDED = {"stream_options", "user", "metadata", "store", "n", "parallel_tool_calls"}
_TAKEN = {
    "model", "max_tokens", "temperature", "seed", "stop", "stream", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repeat_penalty", "logit_bias",
}  # fmt: skip
_TAKEN_BY_CHAT = _TAKEN | {"messages", "tools", "tool_choice", "response_format"}
_TAKEN_BY_COMPLETION = _TAKEN | {"prompt", "suffix", "echo"}

Put = Callable[[Delta], None]

MISSING = (
    "GGUF models need llama-cpp-python, which is not installed or cannot be loaded: "
    "pip install nexus[gguf], or run llama.cpp's own server and give openai:http://host:8080/v1#model"
)


class GgufGenerator:
    """One model in memory. Whoever comes while it writes waits for its turn, in order."""

    sees_images = False

    def __init__(self, model: Any, name: str) -> None:
        """`model` is a `llama_cpp.Llama` that counts (`_counting`)."""
        self.name = name
        self._model = model
        self._turns = ThreadPoolExecutor(1, "gguf")

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        """See `Generator`. Closing it ends the generation after the token that is being computed."""
        arguments = self._arguments(prompt)
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        stopped = threading.Event()

        def put(delta: Delta | None) -> None:
            loop.call_soon_threadsafe(deltas.put_nowait, delta)

        turn = self._turns.submit(self._generate, arguments, put, stopped)
        turn.add_done_callback(lambda _: put(None))
        try:
            while (delta := await deltas.get()) is not None:
                yield delta
            turn.result()  # it is over: this only raises what ended it
        finally:
            stopped.set()
            turn.cancel()

    async def check(self) -> None:
        """Return: the model is in memory."""

    def close(self) -> None:
        """Wait for the generation that runs, then free the model's memory."""
        self._turns.shutdown(cancel_futures=True)
        self._model.close()

    def _arguments(self, prompt: Prompt) -> dict[str, Any]:
        """What llama.cpp is called with. Raises InvalidRequest for what it cannot do."""
        if any(message.images for message in prompt.messages):
            raise InvalidRequest(f"the model {self.name!r} does not see pictures; ask one that does")
        if prompt.options.get("n") not in (None, 1):
            raise InvalidRequest(f"the model {self.name!r} gives one choice only", pointer="/n")
        body = {key: value for key, value in to_body(prompt, self.name).items() if value is not None}
        taken = _TAKEN_BY_CHAT if prompt.text is None else _TAKEN_BY_COMPLETION
        if unknown := sorted(body.keys() - taken - _UNHEEDED):
            raise InvalidRequest(f"the model {self.name!r} does not take {unknown[0]!r}", pointer=f"/{unknown[0]}")
        if "messages" in body:  # chat templates expect text, also where an assistant only called tools
            body["messages"] = [{**message, "content": message["content"] or ""} for message in body["messages"]]
        wanted = body.get("response_format")
        if wanted and wanted.get("type") == "json_schema":  # llama.cpp's binding has an older way to say it
            body["response_format"] = {"type": "json_object", "schema": wanted["json_schema"]["schema"]}
        return {"max_tokens": None} | {key: value for key, value in body.items() if key in taken}

    def _generate(self, arguments: Mapping[str, Any], put: Put, stopped: threading.Event) -> None:
        """One turn, in the thread."""
        if stopped.is_set():
            return
        create = self._model.create_completion if "prompt" in arguments else self._model.create_chat_completion
        try:
            chunks: Iterator[Mapping[str, Any]] = create(**arguments)
            with closing(chunks):  # type: ignore[type-var]
                for chunk in chunks:
                    if stopped.is_set():
                        return
                    for delta in read_chunk(chunk):
                        put(delta)
        except ValueError as error:
            raise self._refusal(error) from None
        except (TypeError, KeyError, AttributeError, TemplateError):
            raise InvalidRequest(
                f"the chat template of {self.name!r} cannot render this conversation", pointer="/messages"
            ) from None
        except RuntimeError:  # llama.cpp could not decode: no memory, or a slot that is gone
            raise Unavailable(f"the model {self.name!r} failed in the middle of its work; try again") from None
        put(Delta(usage=Usage(self._model.prompt_tokens, self._model.completion_tokens)))

    def _refusal(self, error: ValueError) -> InvalidRequest:
        if "exceed context window" in str(error):
            return InvalidRequest(f"the prompt is too long for the model {self.name!r}: {error}")
        return InvalidRequest(f"the model {self.name!r} cannot write what this request asks for")


def open(address: str, *, name: str | None = None, context_length: int = 8192) -> GgufGenerator:
    """Load the model at `gguf:/path/model.gguf` for prompts and answers of `context_length` tokens together.

    Raises ConfigError when there is no such file, when it is not GGUF, when llama.cpp cannot load it, and when
    llama-cpp-python is not installed.
    """
    path = find_file(address)
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError):  # the last two where its compiled part cannot be loaded
        raise ConfigError(MISSING) from None
    try:
        model = _counting(llama_cpp.Llama)(model_path=str(path), n_ctx=context_length, n_gpu_layers=-1, verbose=False)
    except (ValueError, AssertionError):
        raise ConfigError(f"llama.cpp cannot load {path.name!r}: the file is damaged, or newer than it") from None
    return GgufGenerator(model, name or path.stem)


def check(address: str) -> None:
    """Return if the file is there and llama-cpp-python installed, else raise ConfigError. Loads neither."""
    find_file(address)
    if util.find_spec("llama_cpp") is None:
        raise ConfigError(MISSING)


def find_file(address: str) -> Path:
    """The GGUF file that an address names. Raises ConfigError when there is none."""
    value = address.removeprefix("gguf:")
    path = Path(value).expanduser()
    if not value or not path.is_file():
        raise ConfigError(f"{address!r} names no file: write gguf:/path/model.gguf")
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise ConfigError(f"the file of {address!r} cannot be read: {error.strerror}") from None
    if magic != _MAGIC:
        raise ConfigError(f"the file of {address!r} is not GGUF; convert the model first")
    return path


def _counting(llama: Any) -> Any:
    """The class `llama_cpp.Llama`, which does not tell the usage of what it streams, made to count it."""

    class Counting(llama):  # type: ignore[misc]
        prompt_tokens = completion_tokens = 0

        def generate(self, tokens: Any, *arguments: Any, **options: Any) -> Iterator[int]:
            self.prompt_tokens, self.completion_tokens = len(tokens), 0
            end = self.token_eos()
            for token in super().generate(tokens, *arguments, **options):
                self.completion_tokens += token != end
                yield token

    return Counting
