"""Answers that end when their reader leaves, and never without saying how."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from deployments import middleware
from nexus.errors import NexusError

log = logging.getLogger("nexus.gateway")

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n\n"


def error_event(error: NexusError) -> bytes:
    """The event that ends a stream whose status was sent already."""
    status = middleware.status_of(error, "/v1/")
    _, body = middleware.render("/v1/", "", status, error.code, error.message, middleware.faults_of(error))
    return b"event: error\ndata: " + body + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; the generator behind them is closed the moment the reader leaves."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        self._rest = rest
        self._facts: dict[str, object] = {}  # for the record
        self._events = self._all(first)
        super().__init__(self._events, media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def _all(self, first: bytes) -> AsyncGenerator[bytes]:
        yield first
        try:
            async for item in self._rest:
                yield item
        except NexusError as error:
            log.warning("a stream was ended by an error: %s", error.code)
            self._facts |= {"reason": error.code, "verdict": "failed"}
            yield error_event(error)
        except Exception:  # a bug: the middleware logs it, and the reader is told that this is no end
            yield error_event(NexusError(middleware.FAULT))
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._facts = scope["state"].setdefault("audited", {})
        async with aclosing(self._rest), aclosing(self._events):
            await _unless_left(self.stream_response(send), receive)


async def events(request: Request, stream: AsyncGenerator[bytes]) -> EventStream:
    """A stream whose first event is made before the answer's head is sent, so that errors have a status.

    An error that comes later is the last event. Who leaves before the first event is noticed, too.
    """
    try:
        return EventStream(await while_listening(request, anext(stream)), stream)
    except BaseException:
        await stream.aclose()
        raise


async def while_listening(request: Request, work: Awaitable[Result]) -> Result:
    """Do the work unless its asker leaves meanwhile, which cancels it and raises ClientDisconnect."""
    return await _unless_left(work, request.receive)


async def _unless_left(work: Awaitable[Result], receive: Receive) -> Result:
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
