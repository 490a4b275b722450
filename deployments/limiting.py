"""Layers around every request: how long it may take, how much its caller may ask for, and whether it has a place."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nexus import telemetry
from nexus.admission import Admission, Kind, Place
from nexus.config import Config
from nexus.errors import Overloaded, RateLimited, TimedOut
from nexus.limits import Level, Limiter, caller_of, spending
from nexus.screening import Retrieving, Searching
from nexus.types import Evidence, Principal, SearchRequest, SearchResult

UNHURRIED = frozenset({"/rag/fsck", "/rag/vacuum", "/rag/reindex"})  # for who administers all there is: they look at it
UNGATED = frozenset({"/metrics"})  # whoever watches must see how bad it is
BULK = ("/rag/add_document", "/rag/jobs", "/rag/fsck", "/rag/vacuum", "/rag/reindex", "/policies/")
LISTS = ("/v1/embeddings", "/v1/rerank", "/mcp")  # a long message of the last adds a document
LONG_LIST_BYTES = 32 * 1024  # of a body: more is bulk work


class Timely:
    """Ends a request whose answer has not begun in time, and with it all that is done for it; a stream may flow on."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNHURRIED:
            await self.app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            if deadline.expired():  # what is being ended has nothing to say any more
                return
            deadline.reschedule(None)
            await send(message)

        deadline = asyncio.timeout(self.seconds)
        try:
            async with deadline:
                await self.app(scope, receive, send_in_time)
        except TimeoutError:
            if not deadline.expired():
                raise
        if deadline.expired():
            raise TimedOut(
                f"this took longer than the {self.seconds:g} s that a request may; ask for less at once, or try again"
            )


class Rated:
    """Lets each caller do as much as their limits allow, and tells them how these stand."""

    def __init__(self, app: ASGIApp, limiter: Limiter) -> None:
        self.app, self.limiter = app, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal = scope.get("state", {}).get("principal") if scope["type"] == "http" else None
        if principal is None:  # a public path
            await self.app(scope, receive, send)
            return
        scope["state"]["levels"] = partial(self.limiter.levels, principal)
        try:
            self.limiter.admit(principal)
        except RateLimited:
            telemetry.requests_refused.labels("quota").inc()
            raise

        async def send_with_levels(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(level_headers(scope))
            await send(message)

        with spending(partial(self.limiter.spend, principal)):
            await self.app(scope, receive, send_with_levels)


def level_headers(scope: Scope) -> dict[str, str]:
    """How the caller's limits stand now, in the headers of OpenAI; none where they have none."""
    levels: Callable[[], dict[str, Level]] = scope["state"].get("levels", dict)
    headers = {}
    for kind, level in levels().items():
        headers[f"x-ratelimit-limit-{kind}"] = str(level.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(level.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = show_seconds(level.reset_seconds)
    return headers


def show_seconds(seconds: float) -> str:
    """As OpenAI writes them: 120ms, 7s, 6m0s."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    minutes, rest = divmod(ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


class Admitted:
    """Lets a request in when there is a place for it, and says no where there will be none soon."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self.app, self.admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal = scope.get("state", {}).get("principal") if scope["type"] == "http" else None
        if principal is None or scope["path"] in UNGATED:
            await self.app(scope, receive, send)
            return
        async with _placed(self.admission, principal, kind_of(scope)) as place:
            scope["state"]["place"] = place
            await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class PacedRetriever:
    """Searches of which so many are under way at once.

    A retriever that is asked for more than it can do is late with everything, and what it does for those who have gone
    by then is lost. Here they wait where a quick no is still possible, and each caller has its turn.
    """

    searching: Searching
    retrieving: Retrieving
    admission: Admission

    async def search(self, request: SearchRequest, principal: Principal) -> SearchResult:
        async with _placed(self.admission, principal, "interactive"):
            return await self.searching.search(request, principal)

    async def retrieve(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        async with _placed(self.admission, principal, "interactive"):
            return await self.retrieving(request, principal, passages, tokens)


@asynccontextmanager
async def _placed(admission: Admission, principal: Principal, kind: Kind) -> AsyncIterator[Place]:
    try:
        place = await admission.enter(caller_of(principal), kind)
    except Overloaded:
        telemetry.requests_refused.labels("overload").inc()
        raise
    try:
        yield place
    finally:
        place.leave()


def searches(config: Config) -> Admission:
    """The searches that these settings let be under way at once."""
    limits = config.limits
    seconds: Mapping[Kind, float] = {"interactive": limits.wait_seconds, "bulk": limits.wait_seconds}
    return Admission(limits.searches, limits.waiting, limits.share, 1.0, seconds)


def admission(config: Config) -> Admission:
    """The places of these settings."""
    limits = config.limits
    seconds: Mapping[Kind, float] = {"interactive": limits.wait_seconds, "bulk": limits.bulk_wait_seconds}
    return Admission(config.places, limits.waiting, limits.share, limits.bulk_share, seconds)


def kind_of(scope: Scope) -> Kind:
    """Whether somebody waits for the answer, or it is one of many steps of a larger work."""
    path: str = scope["path"]
    if scope["method"] in ("POST", "PUT") and path.startswith(BULK):
        return "bulk"
    announced = Headers(scope=scope).get("content-length", "")
    is_long = not announced.isdecimal() or len(announced) > 9 or int(announced) > LONG_LIST_BYTES
    return "bulk" if path in LISTS and is_long else "interactive"
