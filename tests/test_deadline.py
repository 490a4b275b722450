"""A request whose answer does not begin in time is ended, with all that is done for it; a stream that flows is not."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway import Lent, build
from deployments.limiting import Timely
from nexus.balancer import Balancer, Member, Weights
from nexus.config import Config, Http, Limits
from nexus.errors import TimedOut
from nexus.types import Delta, Prompt
from tests.conftest import Door
from tests.test_chat_http import ASK, CHAT, END, Parrot
from tests.test_gateway import check_openai_error, check_problem
from tests.test_limits import Clock, Held, jump, of_limits, played, stock, turn, until

SECONDS = Http().request_seconds
SEARCH = {"query": "x"}


class Halting(Parrot):
    """A generator that says one word, or none, and goes on when it is told to."""

    def __init__(self, *words: Delta) -> None:
        super().__init__()
        self.words = words
        self.halted = 0
        self.closed = 0
        self.go_on = asyncio.Event()

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        for word in self.words:
            yield word
        self.halted += 1
        try:
            await self.go_on.wait()
        finally:
            self.closed += 1
        yield Delta("ris")
        yield END


@asynccontextmanager
async def asking(door: Door, **changed: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of this door, for one loop; one place, and a limit of requests."""
    limits = Limits(places=1, waiting=9, wait_seconds=10 * SECONDS, bulk_wait_seconds=10 * SECONDS, **{
        "requests_per_minute": 9,
    })  # fmt: skip
    lent: Lent = replace(door.lent, config=door.lent.config.model_copy(update={"limits": limits}), clock=Clock())
    transport = httpx.ASGITransport(build(replace(lent, **changed)))
    headers = door.headers()
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver", headers=headers) as client:
        yield client


def halting(parrot: Halting) -> dict[str, Any]:
    return {"balancer": Balancer([Member(parrot, 1.0)], Weights(1, 1, 1), 5)}


def test_a_search_without_end_is_504_and_leaves_its_place(door: Door) -> None:
    stock(door)

    async def play() -> None:
        held = Held(door)
        async with asking(door, retriever=held) as client:
            asked = asyncio.create_task(client.post("/rag/search", json=SEARCH))
            await until(lambda: held.begun)
            waiting = asyncio.create_task(client.post("/rag/add_document", json={"filename": "a.md", "content": "x"}))
            await turn()
            jump(SECONDS - 1)
            await turn()
            assert not asked.done() and not waiting.done()
            jump(2)
            for path, task in (("/rag/search", asked), ("/rag/add_document", waiting)):  # at work, and in the queue
                answer = await task
                assert check_problem(answer, 504, path)["code"] == "timed_out"
                assert "900 s" in answer.json()["detail"] and of_limits(answer)["remaining-requests"] == "7"
            assert (await client.get("/pipelines")).status_code == 200

    asyncio.run(play())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_generation_that_does_not_begin_is_504_and_stopped(door: Door, stream: bool) -> None:
    async def play() -> None:
        parrot = Halting()
        async with asking(door, **halting(parrot)) as client:
            asked = asyncio.create_task(client.post(CHAT, json={**ASK, "stream": stream}))
            await until(lambda: parrot.halted)
            jump(SECONDS + 1)
            answer = await asked
            assert check_openai_error(answer, 504, "server_error")["code"] == "timed_out"
            await until(lambda: parrot.closed == parrot.halted)
            assert (await client.get("/pipelines")).status_code == 200

    asyncio.run(play())


def test_a_stream_that_has_begun_may_take_as_long_as_it_likes(door: Door) -> None:
    async def play() -> None:
        parrot = Halting(Delta("Pa"))
        async with asking(door, **halting(parrot)) as client:
            asked = asyncio.create_task(client.post(CHAT, json={**ASK, "stream": True}))
            await until(lambda: parrot.halted)
            await turn()
            jump(10 * SECONDS)
            await turn()
            parrot.go_on.set()
            answer = await asked
            assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")

    asyncio.run(play())


def test_a_body_that_never_ends_is_504(door: Door) -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b'{"query":'
        await asyncio.Event().wait()

    async def play() -> None:
        async with asking(door) as client:
            kind = {"content-type": "application/json"}
            asked = asyncio.create_task(client.post("/rag/search", content=never(), headers=kind))
            await turn()
            jump(SECONDS + 1)
            check_problem(await asked, 504, "/rag/search")
            assert (await client.get("/pipelines")).status_code == 200

    asyncio.run(play())


# The layer alone


async def end(
    app: Callable[[Scope, Receive, Send], Awaitable[None]], sent: list[Message], path: str = "/x"
) -> None:  # fmt: skip
    """Ask an application, and as soon as it waits let too much time pass; what it sends is put into `sent`."""

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is read here")

    layer: ASGIApp = Timely(app, SECONDS)
    asked = asyncio.create_task(layer({"type": "http", "path": path}, receive, send))
    await turn()
    jump(SECONDS + 1)
    await turn()
    await asked


@played
async def test_who_does_not_mind_being_ended_says_nothing_more() -> None:
    sent: list[Message] = []
    tried: list[bool] = []

    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            tried.append(True)

    with pytest.raises(TimedOut):
        await end(stubborn, sent)
    assert tried and not sent


@played
async def test_a_timeout_of_something_else_is_what_it_is() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise TimeoutError("planted")

    with pytest.raises(TimeoutError, match="planted"):
        await end(failing, [])


@pytest.mark.parametrize("path", ["/rag/fsck", "/rag/vacuum"])
def test_what_looks_at_everything_has_no_deadline(path: str) -> None:
    async def play() -> None:
        go_on = asyncio.Event()

        async def long(scope: Scope, receive: Receive, send: Send) -> None:
            asyncio.get_running_loop().call_later(2 * SECONDS, go_on.set)
            await go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        sent: list[Message] = []
        asked = asyncio.create_task(end(long, sent, path))
        await turn()
        jump(2 * SECONDS)
        await asked
        assert [message["status"] for message in sent] == [200]

    asyncio.run(play())


def test_an_upload_is_answered_before_its_time_is_over() -> None:
    settings = Config(home="/nowhere")
    assert settings.ingest.wait_seconds < settings.http.request_seconds
    with pytest.raises(ValueError, match=r"ingest\.wait_seconds \(240\) has to be less than http\.request_seconds"):
        Config(home="/nowhere", http={"request_seconds": 240})
