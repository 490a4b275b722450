"""The layer that records each request that was denied, was privileged, or was answered, at its very end.

A privileged one is recorded before, too: by `announce`, on the disk before anything is done. All else is written in
batches, and no answer waits for it; where `audit.required` says so, none leaves before its record is on the disk.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nexus.audit import MOST_TEXT, Event, Recorder
from nexus.balancer import MODELS_ASKED
from nexus.config import Audit
from nexus.errors import NexusError, Unavailable
from nexus.pipelines.rag import Tools
from nexus.types import Evidence, Principal, SearchRequest

PRIVILEGED = frozenset({"admin", "policies:write", "share:write"})
CREDENTIALS = ("/auth/", "/keys")  # begin the paths of what makes and ends keys and tokens
READING = frozenset({"GET", "HEAD", "OPTIONS"})
DENIALS = frozenset({401, 403, 429})
MOST_PATH = 200

Refuse = Callable[[Scope, Send, NexusError], Awaitable[None]]


class Audited:
    """Whatever becomes of a request, and however its stream ends, it is recorded if it is one of those."""

    def __init__(self, app: ASGIApp, recorder: Recorder, settings: Audit, refuse: Refuse) -> None:
        """`refuse` answers a request whose record is required and cannot be written."""
        self.app, self.recorder, self.settings, self.refuse = app, recorder, settings, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, self._settling(send))
            return
        scope["state"]["audited"] = {}
        asked: list[str] = []
        MODELS_ASKED.set(asked)  # in the context of this request, with which it goes
        exchange = _Exchange(self, scope, receive, send, asked)
        failed = False
        try:
            await self.app(scope, exchange.receive if self.settings.texts else receive, exchange.send)
        except Exception:
            failed = True
            raise
        finally:
            if not exchange.is_recorded and (event := exchange.event(failed)) is not None:
                self.recorder.record(event)

    def _settling(self, send: Send) -> Send:
        """Of a whole service's life: when it ends, what waits is written."""

        async def settle(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown"):
                await asyncio.to_thread(self.recorder.settle)
            await send(message)

        return settle


class _Exchange:
    """What one request and its answer were seen to be."""

    def __init__(self, layer: Audited, scope: Scope, receive: Receive, send: Send, asked: Sequence[str]) -> None:
        self._layer, self._scope, self._receive, self._send, self._asked = layer, scope, receive, send, asked
        self._texts = layer.settings.texts
        self._start: Message | None = None  # held until it may be sent
        self._is_refused = False
        self._status, self._ended = 0, False
        self._question, self._answer = bytearray(), bytearray()
        self.is_recorded = False

    async def receive(self) -> Message:
        message = await self._receive()
        _keep(self._question, message)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self._layer.settings.required:
                self._start = message
                return
        else:
            self._ended = not message.get("more_body", False)
            if self._texts:
                _keep(self._answer, message)
            if self._start is not None:
                await self._release()
        if not self._is_refused:
            await self._send(message)

    async def _release(self) -> None:
        """Send the held head of an answer once its record is on the disk; where that cannot be, refuse it."""
        start, self._start = self._start, None
        event = self.event(failed=False)
        if event is not None and event.kind == "answer" and self._status < 400:
            try:
                await asyncio.to_thread(
                    self._layer.recorder.write, event if self._ended else replace(event, verdict="begun")
                )
            except Unavailable as error:
                self._is_refused = True
                await self._layer.refuse(self._scope, self._refusing, error)
                return
            self.is_recorded = self._ended
        assert start is not None
        await self._send(start)

    async def _refusing(self, message: Message) -> None:
        self._status = message.get("status", self._status)
        await self._send(message)

    def event(self, failed: bool) -> Event | None:
        """What is to be recorded, if anything is."""
        scope, facts = self._scope, self._scope["state"]["audited"]
        kind = _kind(scope, facts, self._status)
        if kind is None:
            return None
        verdict = facts.get("verdict") or _verdict(kind, self._status, failed or not self._ended)
        is_left = not self._ended and not failed and not facts.get("verdict")
        has_texts = self._texts and kind == "answer"
        return _event(
            scope, kind,
            status=self._status, verdict="left" if is_left else verdict,
            reason="the caller left" if is_left else facts.get("reason", ""),
            documents=tuple(dict.fromkeys(facts.get("documents", ()))),
            model=", ".join(dict.fromkeys(self._asked)) or facts.get("model", ""),
            question=self._question.decode(errors="replace") if has_texts else "",
            answer=self._answer.decode(errors="replace") if has_texts else "",
        )  # fmt: skip


def _keep(kept: bytearray, message: Message) -> None:
    kept += message.get("body", b"")[: MOST_TEXT - len(kept)]


def _kind(scope: Scope, facts: dict[str, Any], status: int) -> str | None:
    """Denied: also what is not found by those who ask for it by its name; another tenant's is among that."""
    route = scope.get("route")
    if facts.get("is_denied") or status in DENIALS or (status == 404 and route is not None):
        return "denied"
    is_credential = scope["method"] not in READING and scope["path"].startswith(CREDENTIALS)
    if facts.get("is_privileged") or (is_credential and route is not None):
        return "privileged"
    return "answer" if facts.keys() & {"model", "documents", "verdict"} else None


def _verdict(kind: str, status: int, is_cut: bool) -> str:
    if kind == "denied":
        return "denied"
    if is_cut or not 0 < status < 400:
        return "failed"
    return "answered" if kind == "answer" else "done"


def _event(scope: Scope, kind: str, **more: Any) -> Event:
    """An event with who asked for what."""
    facts, principal = scope["state"]["audited"], scope["state"].get("principal")
    named = [str(value) for value in scope.get("path_params", {}).values()]
    who = principal if isinstance(principal, Principal) else Principal("", "")
    action = ": ".join(filter(None, (facts.get("action"), action_of(scope))))
    return Event(
        kind, action, scope["state"]["request_id"], who.tenant, who.subject, who.credential,
        objects=(*named, *facts.get("objects", ())), **more,
    )  # fmt: skip


def action_of(scope: Scope) -> str:
    """The method and the route's template; the path where no route was reached."""
    path = getattr(scope.get("route"), "path", None) or scope["path"][:MOST_PATH]
    return f"{scope['method']} {path}"


def is_announced(request: Request, permissions: Sequence[str]) -> bool:
    """Whether a request that needs these permissions is recorded before it is done, too."""
    is_privileged = not PRIVILEGED.isdisjoint(permissions) or request.method == "DELETE"
    return request.method not in READING and (is_privileged or request.url.path.startswith(CREDENTIALS))


def announce(request: Request, recorder: Recorder) -> None:
    """Before a privileged request is done, have on the disk that it is. Blocks. Raises Unavailable."""
    note(request, is_privileged=True)
    recorder.write(_event(request.scope, "privileged", verdict="begun"))


def note(request: Request, **facts: object) -> None:
    """What the record should say of this request: `documents`, `model`, `objects`, `action`, `reason`, `verdict`."""
    request.scope["state"]["audited"].update(facts)


def noting(request: Request, tools: Tools) -> Tools:
    """Tools whose answers are recorded: the model, and the documents as soon as they are found."""
    note(request, model=tools.generator.name, documents=[])

    async def retrieve(search: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        evidence = await tools.retrieve(search, principal, passages, tokens)
        note(request, documents=[hit.document_id for hit in evidence.passages])
        return evidence

    return replace(tools, retrieve=retrieve)
