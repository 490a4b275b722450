"""Clients who leave: over real sockets, at any moment, whatever they asked. Nothing of theirs may stay behind."""

import asyncio
import gc
import json
import random
import re
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import psutil
import pytest
import uvicorn

from deployments.gateway import build
from nexus.balancer import Balancer, Member, Weights
from nexus.types import Delta, Prompt
from tests.conftest import Door
from tests.test_gateway import add

DEADLINE_SECONDS = 60
QUESTION = "What torque does the gripper close with?"
MARK = re.compile(r"mark-(\d+)(-mute)?")

# (path, body of a request that is marked so)
Ask = tuple[str, Callable[[str], dict[str, object]]]


def _chat(model: str) -> Callable[[str], dict[str, object]]:
    return lambda mark: {"model": model, "messages": [{"role": "user", "content": f"{QUESTION} {mark}"}]}


ASKS: list[Ask] = [
    ("/v1/chat/completions", _chat("endless")),
    ("/v1/chat/completions", _chat("auto")),
    ("/v1/chat/completions", _chat("nexus-rag")),
    ("/v1/completions", lambda mark: {"model": "endless", "prompt": mark}),
    ("/rag/query", lambda mark: {"query": f"{QUESTION} {mark}"}),
    ("/execute", lambda mark: {"template_name": "analyze_only", "initial_data": {"text": mark}, "model": "endless"}),
]


class Endless:
    """A generator that never ends, or where it is asked to be mute never says a word; it knows who is asking."""

    name, sees_images = "endless", False

    def __init__(self, text: str = "word ") -> None:
        self.text = text
        self.opened: dict[str, asyncio.Event] = {}
        self.running: set[str] = set()
        self.produced = 0

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        found = MARK.search(repr(prompt))
        assert found is not None
        mark = found[1]
        self.running.add(mark)
        self.when_opened(mark).set()
        try:
            while True:
                await (asyncio.get_running_loop().create_future() if found[2] else asyncio.sleep(0))
                self.produced += 1
                yield Delta(self.text)
        finally:
            self.running.remove(mark)

    def when_opened(self, mark: str) -> asyncio.Event:
        return self.opened.setdefault(mark, asyncio.Event())

    async def check(self) -> None: ...


@dataclass
class Served:
    """The door behind a real server in this event loop."""

    server: uvicorn.Server
    address: tuple[str, int]
    endless: Endless
    balancer: Balancer
    headers: dict[str, str]
    before: set[asyncio.Task[object]] = field(default_factory=set)

    def in_flight(self) -> int:
        return sum(member.in_flight for member in self.balancer.report().members)

    def request(self, path: str, body: dict[str, object]) -> bytes:
        content = json.dumps(body).encode()
        headers = {
            **self.headers,
            "host": "testserver",
            "content-type": "application/json",
            "content-length": len(content),
        }
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content

    async def is_idle(self) -> None:
        """Return once the server has no connection and no task of any request."""
        reader, writer = await asyncio.open_connection(*self.address)  # after it, none is waiting to be accepted
        writer.write(b"GET /livez HTTP/1.1\r\nhost: testserver\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        await leave(writer)
        while rest := asyncio.all_tasks() - self.before - {asyncio.current_task()}:
            await asyncio.wait(rest)
        await turn_until(lambda: not self.server.server_state.connections)


async def turn_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


@asynccontextmanager
async def serving(door: Door, http: str = "httptools", **scripted: object) -> AsyncIterator[Served]:
    endless = Endless(**scripted)
    balancer = Balancer([Member(endless, 1.0)], Weights(1, 1, 1), probe_seconds=5)
    tools = replace(door.lent.rag, generator=balancer.generator("endless"), abstain_below=0.0)
    app = build(replace(door.lent, rag=tools, balancer=balancer))
    config = uvicorn.Config(app, http=http, ws="none", lifespan="off", log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        listening.bind(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        await turn_until(lambda: server.started)
        served = Served(server, listening.getsockname(), endless, balancer, door.headers())
        served.before = asyncio.all_tasks()
        try:
            yield served
        finally:
            server.should_exit = server.force_exit = True
            for left_over in asyncio.all_tasks() - served.before - {asyncio.current_task()}:
                left_over.cancel()  # there are none, but where a test fails
            await task
            await balancer.close()


def run(test: Awaitable[None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await test

    asyncio.run(within())


async def leave(writer: asyncio.StreamWriter, reset: bool = False) -> None:
    """Say goodbye with a FIN, or slam the door with a RST."""
    if reset:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def abandon(served: Served, number: int, random: random.Random) -> tuple[str, ...]:
    """Ask something, and leave at some moment; says what was done."""
    path, body_of = random.choice(ASKS)
    is_mute, reset = random.random() < 0.3, random.random() < 0.5
    mark = f"mark-{number}{'-mute' * is_mute}"
    body = body_of(mark)
    streams = path != "/execute" and random.random() < 0.6
    if streams:
        body["stream"] = True
    moments = ["half", "sent", "opened", "later"] + ["head", "events"] * (streams and not is_mute)
    moment = random.choice(moments)
    request = served.request(path, body)
    reader, writer = await asyncio.open_connection(*served.address)
    if moment == "half":
        writer.write(request[: random.randrange(len(request))])
    else:
        writer.write(request)
    if moment in ("opened", "later"):
        await served.endless.when_opened(str(number)).wait()
    if moment == "later":
        for _ in range(random.randrange(200)):
            await asyncio.sleep(0)
    if moment in ("head", "events"):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    if moment == "events":
        for _ in range(random.randrange(1, 20)):
            assert b"data: " in await reader.readuntil(b"\n\n")
    await leave(writer, reset)
    return path, "stream" if streams else "whole", moment


async def abandon_many(served: Served, numbers: range, random: random.Random, at_once: int = 8) -> set[tuple[str, ...]]:
    left, done = iter(numbers), set()

    async def one_after_another() -> None:
        for number in left:
            done.add(await abandon(served, number, random))

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(one_after_another())
    await served.is_idle()
    return done


def count_objects() -> dict[str, int]:
    """What a request leaves behind where it leaves anything."""
    gc.collect()
    kinds = [type(one).__name__ for one in gc.get_objects()]
    watched = ("Delta", "Prompt", "Message", "async_generator", "Task", "StrictRequest", "EventStream")
    return {kind: kinds.count(kind) for kind in watched}


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_thousand_clients_leave_and_nothing_of_theirs_stays(door: Door, http: str) -> None:
    add(door, headers=door.headers())

    async def test() -> None:
        chance = random.Random(http)
        async with serving(door, http) as served:
            await abandon_many(served, range(50), chance)  # what is made once is made now
            descriptors = psutil.Process().num_fds()
            counts, done = [], set()
            for first in (50, 550):
                done |= await abandon_many(served, range(first, first + 500), chance)
                assert served.endless.running == set()
                assert served.in_flight() == 0
                assert psutil.Process().num_fds() < descriptors + 50, (
                    "threads may open databases, but 500 requests none"
                )
                served.endless.opened.clear()
                counts.append(count_objects())
            assert counts[0] == counts[1]
            assert served.endless.produced > 1000
            paths = {path for path, _ in ASKS}
            assert {(path, how) for path, how, _ in done} == {
                (path, how) for path in paths for how in ("stream", "whole") if (path, how) != ("/execute", "stream")
            }
            assert {moment for *_, moment in done} == {"half", "sent", "opened", "later", "head", "events"}
            outcomes = {choice.outcome for choice in served.balancer.report().choices}
            assert outcomes == {"left"}

    run(test())


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: f"{ask[0]} {ask[1]('').get('model', '')}")
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_who_leaves_while_the_model_is_silent_stops_it(door: Door, ask: Ask, stream: bool, reset: bool) -> None:
    add(door, headers=door.headers())
    path, body_of = ask
    body = {**body_of("mark-1-mute"), **({"stream": True} if stream and path != "/execute" else {})}

    async def test() -> None:
        async with serving(door) as served:
            _, writer = await asyncio.open_connection(*served.address)
            writer.write(served.request(path, body))
            await served.endless.when_opened("1").wait()
            assert served.in_flight() == 1
            await leave(writer, reset)
            await served.is_idle()
            assert (served.endless.running, served.in_flight()) == (set(), 0)

    run(test())


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("path, model", [("/v1/chat/completions", "endless"), ("/v1/chat/completions", "nexus-rag"),
                                         ("/v1/completions", "endless"), ("/rag/query", "")])  # fmt: skip
def test_a_model_waits_for_a_reader_who_does_not_read(door: Door, http: str, path: str, model: str) -> None:
    add(door, headers=door.headers())
    body_of = next(of for at, of in ASKS if at == path and of("").get("model", "") == model)
    text = "x" * 4096
    bound = 2**21 // len(text)  # what the buffers of two sockets and uvicorn's own hold, and some more

    async def test() -> None:
        async with serving(door, http, text=text) as served:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, served.address)
                await loop.sock_sendall(client, served.request(path, {**body_of("mark-1"), "stream": True}))
                await served.endless.when_opened("1").wait()
                (connection,) = served.server.server_state.connections
                await turn_until(lambda: connection.flow.write_paused or served.endless.produced > bound)
                for _ in range(2000):
                    await asyncio.sleep(0)
                produced = served.endless.produced
                assert produced <= bound
                while served.endless.produced <= produced + 5:  # it goes on as soon as somebody reads
                    assert await loop.sock_recv(client, 2**20)
            await served.is_idle()
            assert (served.endless.running, served.in_flight()) == (set(), 0)

    run(test())
