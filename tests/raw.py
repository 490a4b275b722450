"""A request to the front door exactly as it is written: no client between that tidies up its address or headers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import Message

from tests.conftest import Door


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Headers
    body: bytes


def ask(door: Door, method: str, address: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
    """The front door's answer. `headers` add to a Host; one of "" leaves that out."""
    path, _, query = address.partition("?")
    given = {"host": "testserver", **(headers or {})}
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": unquote(path), "raw_path": path.encode(), "root_path": "", "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items() if value],
        "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    sent: list[Message] = []
    asked = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return asked.pop() if asked else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    portal = door.client.portal
    assert portal is not None
    portal.call(door.client.app, scope, receive, send)
    start, *rest = sent
    return Answer(start["status"], Headers(raw=start["headers"]), b"".join(one.get("body", b"") for one in rest))
