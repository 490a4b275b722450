"""A strict HTTP server that answers what a test wrote down, byte for byte, and notes what it was asked."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

import orjson


@dataclass(frozen=True)
class Reply:
    """What is written for one request, and then: `keep` the connection, `close` it, or `hang` until the client goes."""

    raw: bytes
    then: str = "keep"


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, object]


@dataclass
class Double:
    """`replies` are given in turn, the last one for ever; `left` is set when a client leaves one that hangs."""

    url: str = ""
    replies: list[Reply] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    faults: list[AssertionError] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    def answer(self, *replies: Reply) -> None:
        self.replies[:] = replies

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (asked := await self._read(reader)) is not None:
                self.asked.append(asked)
                reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
                writer.write(reply.raw)
                await writer.drain()
                if reply.then == "hang":
                    assert await reader.read() == b""
                    self.left.set()
                if reply.then != "keep":
                    break
        except ConnectionError:
            self.left.set()
        except AssertionError as fault:
            self.faults.append(fault)
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Asked | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            assert not error.partial
            return None
        first, *lines = head.decode("ascii").strip().split("\r\n")
        method, path, version = first.split(" ")
        assert version == "HTTP/1.1"
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if method == "POST":
            assert headers["content-type"] == "application/json"
        return Asked(method, path, headers, orjson.loads(await reader.readexactly(length)) if length else {})


def reply(status: int, body: object = b"", kind: str = "application/json", **headers: str) -> Reply:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"content-type: {kind}",
        f"content-length: {len(content)}",
    ]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return Reply("\r\n".join(lines).encode() + b"\r\n\r\n" + content)


def stream(*pieces: str | Mapping[str, object], then: str = "keep") -> Reply:
    """A chunked event stream: mappings become `data:` events, strings are written as they are.

    With `close` or `hang` its last chunk, which says that it is whole, never comes.
    """
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    texts = (p.encode() if isinstance(p, str) else b"data: " + orjson.dumps(p) + b"\n\n" for p in pieces)
    body = b"".join(b"%x\r\n%s\r\n" % (len(text), text) for text in texts)
    return Reply(head + body + (b"0\r\n\r\n" if then == "keep" else b""), then)


@contextmanager
def running_double() -> Iterator[Double]:
    """The server on a free loopback port, in a thread of its own."""
    double, loop, ready = Double(), asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def run() -> None:
        server = await asyncio.start_server(double.serve, "127.0.0.1", 0, limit=2**22)
        double.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert ready.wait(60)
        yield double
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()
    assert not double.faults
