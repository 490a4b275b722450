"""Deployments as plain objects: what is called has their methods, and raises the errors they raised."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
import orjson
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from nexus.background import begin_in_background
from nexus.chat_format import read_chunk, to_body
from nexus.errors import NexusError, Overloaded, Unavailable, UpstreamInvalid
from nexus.ports import InputType
from nexus.tracing import carried
from nexus.types import Delta, Prompt, Vectors, digest

DONE = "data: [DONE]"
HEDGE_SECONDS = 5.0  # without an answer, before another machine is asked too
PROBE_SECONDS = 3.0  # that a probe has, and between two of one machine
ASKED_ELSEWHERE = (Unavailable, Overloaded)


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
    except (RayActorError, ObjectLostError, DeploymentUnavailableError, TaskCancelledError) as error:
        raise Unavailable("a part of Nexus is restarting; try again in a moment") from error


def _for_whom() -> dict[str, Mapping[str, str]]:
    """What a deployment's method is told besides its arguments, where there is a request."""
    return {"of": told} if (told := carried()) else {}


class Remote:
    """A deployment whose methods are awaited, and told for which request (actors/hops.py).

    An error that one of them gives back is raised too.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            with translated():
                answer = getattr(self._handle, method).remote(*arguments, **_for_whom())
                try:
                    given = await answer
                except asyncio.CancelledError:
                    answer.cancel()  # nobody waits for it any more
                    raise
            if isinstance(given, NexusError):
                raise given
            return given

        return call


class Spread:
    """Deployments of one model on several machines as one whose methods are awaited: each call may be repeated.

    Who has the fewest of our calls in flight is asked, and where it is away or full, each of the others in turn. A
    machine that was cut off neither answers nor fails: whoever waits for HEDGE_SECONDS asks another too, and the first
    answer counts. One that failed, or from which nothing came for so long, is not asked while another can be; it is
    only probed, and it is back when it is ready. All calls belong to one event loop.
    """

    def __init__(self, parts: Mapping[str, Any], is_planned: Callable[[str], bool] = lambda machine: True) -> None:
        """By machine, at least one: each as Remote is, with `ready` among its methods.

        One that is not planned, as told at each call, is asked only after those that are, and while it answers.
        """
        self._all = [_Machine(name, part) for name, part in parts.items()]
        self._is_planned = is_planned
        self._turns = itertools.count(1)
        self._probes: set[asyncio.Task[bool]] = set()

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            return await self._ask(method, arguments)

        return call

    async def ready(self) -> bool:
        """True once one of them is. Raises Unavailable."""
        checks = [asyncio.create_task(machine.passes_check()) for machine in self._usable()]
        try:
            for check in asyncio.as_completed(checks):
                if await check:
                    return True
        finally:
            for one in checks:
                one.cancel()
        raise Unavailable("a part of Nexus answers on none of its machines; try again in a moment")

    async def _ask(self, method: str, arguments: Sequence[Any]) -> Any:
        """The first answer. Raises what the last one raised, or at once what no other would say differently."""
        left, waiting, failure = self._usable(), set[asyncio.Task[Any]](), None
        try:
            while left or waiting:
                if left:
                    machine = self._choose(left)
                    left.remove(machine)
                    waiting.add(machine.begin(method, arguments, next(self._turns)))
                patience = HEDGE_SECONDS if left else None
                done, waiting = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    failure = one.exception()
                    if not isinstance(failure, ASKED_ELSEWHERE):
                        return one.result()
            assert failure is not None
            raise failure
        finally:
            for one in waiting:
                one.cancel()

    def _usable(self) -> "list[_Machine]":
        now, planned = asyncio.get_running_loop().time(), [one for one in self._all if self._is_planned(one.name)]
        others = [one for one in self._all if one not in planned]
        return [*planned, *(one for one in others if not planned or (one.is_met and not one.is_aside(now)))]

    def _choose(self, left: "Sequence[_Machine]") -> "_Machine":
        now = asyncio.get_running_loop().time()
        for machine in self._all:
            if machine.is_to_be_probed(now) and self._is_planned(machine.name):
                probe = machine.begin_probe(now)
                self._probes.add(probe)
                probe.add_done_callback(self._probes.discard)
        planned = [machine for machine in left if self._is_planned(machine.name)]
        pools = ([one for one in some if not one.is_aside(now)] for some in (planned, left))
        return min(next(filter(None, pools), left), key=lambda machine: (machine.in_flight, machine.turn))


class _Machine:
    """One part of a Spread, and what is known of it."""

    def __init__(self, name: str, part: Any) -> None:
        self.name = name
        self.in_flight = 0
        self.turn = 0  # of all calls, the last one that it was asked
        self.is_met = False  # it has answered, or failed
        self._part = part
        self._is_away = False
        self._silent_since: float | None = None  # it was first asked after its last answer
        self._probed: float | None = None

    def begin(self, method: str, arguments: Sequence[Any], turn: int) -> "asyncio.Task[Any]":
        """Ask it, and note whether and how it answers."""
        self.turn = turn
        self.in_flight += 1
        if self._silent_since is None:
            self._silent_since = asyncio.get_running_loop().time()
        task = asyncio.ensure_future(getattr(self._part, method)(*arguments))
        task.add_done_callback(self._end)
        return task

    def _end(self, task: "asyncio.Task[Any]") -> None:
        self.in_flight -= 1
        if not task.cancelled():
            self._silent_since = None
            self._is_away = isinstance(task.exception(), Unavailable)
            self.is_met = True

    def is_aside(self, now: float) -> bool:
        """Whether others are asked first."""
        return self._is_away or (self._silent_since is not None and now - self._silent_since >= HEDGE_SECONDS)

    def is_to_be_probed(self, now: float) -> bool:
        return self.is_aside(now) and (self._probed is None or now - self._probed >= PROBE_SECONDS)

    def begin_probe(self, now: float) -> "asyncio.Task[bool]":
        self._probed = now
        return begin_in_background(self.passes_check())

    async def passes_check(self) -> bool:
        """Whether it says in time that it is ready, and is so asked again."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._part.ready()
        except (NexusError, RayError, OSError):  # TimeoutError is one
            return False
        self._is_away, self._silent_since = False, None
        return True


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
            items = handle.remote(*arguments, **_for_whom())
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
    """An embedder in vLLM replicas (actors/vllm.py), which are asked as `part`: a Remote, or a Spread."""

    def __init__(self, part: Any) -> None:
        self._part = part

    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        """Unit rows; the engine embeds both types of input alike. Raises UpstreamInvalid for rows that are none."""
        rows = np.asarray(await self._part.embed(texts), np.float32)
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
