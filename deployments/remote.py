"""Deployments as plain objects: what is called has their methods, and raises the errors they raised."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
import orjson
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from nexus.chat_format import read_chunk, to_body
from nexus.errors import NexusError, Overloaded, Unavailable, UpstreamInvalid
from nexus.ports import InputType
from nexus.types import Delta, Prompt, Vectors, digest

DONE = "data: [DONE]"


@contextmanager
def translated() -> Iterator[None]:
    """Ray's errors as ours."""
    try:
        yield
    except RayTaskError as error:
        cause = getattr(error, "cause", error)
        raise (cause if isinstance(cause, NexusError) else error) from None
    except BackPressureError as error:
        raise Overloaded("every place is taken; try again in a moment") from error
    except (RayActorError, DeploymentUnavailableError) as error:
        raise Unavailable("a part of Nexus is restarting; try again in a moment") from error


class Remote:
    """A deployment whose methods are awaited."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            with translated():
                answer = getattr(self._handle, method).remote(*arguments)
                try:
                    return await answer
                except asyncio.CancelledError:
                    answer.cancel()  # nobody waits for it any more
                    raise

        return call


class Threaded:
    """A model of this process as deployments are: its methods are awaited, each call in a thread."""

    def __init__(self, model: object, threads: int) -> None:
        self._model = model
        self._threads = ThreadPoolExecutor(threads, "model")

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            work = getattr(self._model, method)
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

        return call


class RemoteStream:
    """A method of a deployment that gives one item after another; requests of a session go to one replica."""

    def __init__(self, handle: DeploymentHandle, method: str) -> None:
        self._handle = handle.options(stream=True, method_name=method)

    async def __call__(self, *arguments: Any, session: str = "") -> AsyncGenerator[Any]:
        handle = self._handle.options(session_id=session) if session else self._handle
        with translated():
            items = handle.remote(*arguments)
            try:
                async for item in items:
                    yield item
            finally:
                items.cancel()  # nothing, where it has ended


class RemoteGenerator:
    """A generator in replicas of its own (actors/generator.py): it sends lists of deltas, and errors."""

    def __init__(self, name: str, sees_images: bool, handle: DeploymentHandle) -> None:
        self.name, self.sees_images = name, sees_images
        self._generate = RemoteStream(handle, "generate")
        self._part = Remote(handle)

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        async with aclosing(self._generate(prompt, session=prompt.session)) as batches:
            async for batch in batches:
                for item in batch:
                    if isinstance(item, NexusError):
                        raise item
                    yield item

    async def check(self) -> None:
        await self._part.ready()


class RemoteEngine:
    """A model in vLLM replicas (actors/vllm.py): it is sent OpenAI's words, and answers with vLLM's events."""

    def __init__(self, name: str, sees_images: bool, handle: DeploymentHandle) -> None:
        self.name, self.sees_images = name, sees_images
        self._generate = RemoteStream(handle, "generate")
        self._handle = handle
        self._part = Remote(handle)

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        """Raises Unavailable where a stream ends without having said so."""
        body = to_body(prompt, self.name)
        if prompt.tenant:
            body["cache_salt"] = digest("prefix cache", prompt.tenant)
        way = "chat" if prompt.text is None else "completions"
        is_whole = False
        async with aclosing(self._generate(way, body, session=prompt.session)) as batches:
            async for batch in batches:
                for item in batch:
                    if isinstance(item, NexusError):
                        raise item
                    if item.startswith(DONE):
                        is_whole = True
                        continue
                    for delta in _read(item):
                        yield delta
        if not is_whole:
            raise Unavailable("the engine stopped in the middle of an answer; try again in a moment")

    async def check(self) -> None:
        await self._part.ready()

    async def load(self) -> list[int]:
        """How many requests each replica works on."""
        with translated():
            return list(await self._handle.broadcast("count_requests").results_async())


class RemoteEmbedder:
    """An embedder in vLLM replicas (actors/vllm.py)."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._part = Remote(handle)

    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        """Unit rows; the engine embeds both types of input alike. Raises UpstreamInvalid for rows that are none."""
        answer = await self._part.embed(texts)
        if isinstance(answer, NexusError):
            raise answer
        rows = np.asarray(answer, np.float32)
        lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
        if rows.ndim != 2 or len(rows) != len(texts) or not (np.isfinite(lengths) & (lengths > 0)).all():
            raise UpstreamInvalid("the embedding engine answered with something else than a vector for each text")
        return rows / lengths


def _read(event: str) -> list[Delta]:
    try:
        chunk = orjson.loads(event.removeprefix("data: "))
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("the engine sent something that is no event") from None
    if "error" in chunk:
        raise Unavailable("the engine failed in the middle of an answer; try again in a moment")
    return read_chunk(chunk)
