"""What happens around every request: an id, an answer whatever happens, an identity, a size limit.

`wrap` lists the layers, the outermost first. Each is plain ASGI, so streams pass through untouched.
"""

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from math import ceil
from typing import Any

from fastapi.routing import iter_route_contexts
from opentelemetry.trace import Span, SpanKind
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.audited import Audited
from deployments.limiting import Admitted, Rated, Timely, admission, level_headers
from nexus import telemetry, tracing
from nexus.audit import Recorder
from nexus.config import Config, Http
from nexus.content import SEVERITY, Finding
from nexus.errors import (
    BlockRefused,
    CallerError,
    Conflict,
    ContentRefused,
    Forbidden,
    InvalidRequest,
    NexusError,
    NotFound,
    Overloaded,
    RateLimited,
    TimedOut,
    TooLarge,
    TryAgain,
    Unauthenticated,
    Unprocessable,
    UnsupportedMedia,
    UpstreamInvalid,
)  # fmt: skip
from nexus.limits import Limiter
from nexus.screening import noted
from nexus.types import media_type_of
from nexus.verifier import Verifier, credential_in
from nexus.vocabulary import KIND, METHOD, REQUEST, ROUTE, STATUS_CODE

log = logging.getLogger("nexus.gateway")
requests = logging.getLogger("nexus.requests")

PUBLIC = frozenset({"/livez", "/readyz", "/healthz"})
TRACED = ("traceparent", "tracestate")  # headers of W3C trace context
REQUEST_ID = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
RETRY_AFTER_SECONDS = 2
BLOCKS = "/share/"  # begin the paths of blocks
DONE = {"allow": "allowed", "flag": "flagged", "redact": "redacted", "refuse": "refused"}
FAULT = "something went wrong here; the request id finds it in the log"

STATUS: dict[type[NexusError], int] = {
    InvalidRequest: 422, Unauthenticated: 401, Forbidden: 403, ContentRefused: 403, NotFound: 404, Conflict: 409,
    TooLarge: 413, RateLimited: 429, UnsupportedMedia: 415, Unprocessable: 422, CallerError: 400, Overloaded: 503,
    TimedOut: 504, TryAgain: 503, UpstreamInvalid: 502, BlockRefused: 502,
}  # fmt: skip
TITLES = {
    400: "Bad request", 401: "Not authenticated", 403: "Not allowed", 404: "Not found", 405: "Method not allowed",
    409: "Conflict", 413: "Too large", 415: "Unsupported media type", 422: "Cannot be processed",
    429: "Too many requests", 500: "Internal error", 502: "A part answered nonsense", 503: "Not available now",
    504: "Took too long", 507: "Storage full",
}  # fmt: skip
OPENAI_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 502: "server_error", 503: "service_unavailable_error", 504: "server_error",
    507: "server_error",
}  # fmt: skip


def wrap(
    app: ASGIApp, verifier: Verifier, recorder: Recorder, config: Config, clock: Callable[[], float],
    says_request_id: bool,
) -> ASGIApp:  # fmt: skip
    """The application inside its layers; a request passes them from the last line to the first."""
    http, classes = config.http, route_classes(app)
    app = Verdicts(app)
    app = BodyLimit(app, http.max_body_bytes, config.sharing.max_block_bytes)
    app = Admitted(app, admission(config))
    app = Rated(app, Limiter(config, clock))
    app = Identity(app, verifier)
    app = Timely(app, http.request_seconds)
    app = Answering(app)
    if http.allowed_origins:  # outside Identity: a browser's preflight carries no key
        app = CORSMiddleware(
            app, allow_origins=list(http.allowed_origins), allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type", "x-api-key"],
        )  # fmt: skip
    app = Hosts(app, http)
    app = Audited(app, recorder, config.audit, send_nexus_error)
    app = Safe(app)
    app = Counted(app, classes)
    return RequestId(app, says_request_id)


def status_of(error: NexusError, path: str) -> int:
    """The HTTP status of an error; OpenAI's routes know no 422."""
    if error.code == "storage_full":
        return 507
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    return 400 if status == 422 and path.startswith("/v1/") else status


def faults_of(error: NexusError) -> list[tuple[str, str]]:
    """(JSON pointer, what is wrong there), where the error points at a field."""
    return [(error.pointer, error.message)] if error.pointer else []


def render(
    path: str, request_id: str, status: int, code: str, detail: str, faults: Iterable[tuple[str, str]] = (),
    retry_after: float | None = None,
) -> tuple[dict[str, str], bytes]:  # fmt: skip
    """Headers and body of an error, in the shape that this path's clients read.

    `faults` are (JSON pointer, what is wrong there); `retry_after` is in seconds.
    """
    faults = list(faults)
    headers = {"cache-control": "no-store", "content-type": "application/problem+json"}
    if status == 401:
        headers["www-authenticate"] = 'Bearer error="invalid_token"'
    if status in (429, 503) or retry_after is not None:
        headers["retry-after"] = str(max(1, ceil(RETRY_AFTER_SECONDS if retry_after is None else retry_after)))
    body: dict[str, Any]
    if path.startswith("/v1/"):
        headers["content-type"] = "application/json"
        param = faults[0][0].strip("/").replace("/", ".") if faults else None
        kind = OPENAI_TYPES.get(status, "invalid_request_error")
        body = {"error": {"message": detail, "type": kind, "param": param or None, "code": code}}
    else:
        body = {
            "type": f"urn:nexus:problem:{code.replace('_', '-')}",
            "title": TITLES.get(status, "Error"),
            "status": status,
            "detail": detail,
            "instance": path,
            "code": code,
            "request_id": request_id,
        }
        if faults:
            body["errors"] = [{"pointer": pointer, "detail": text} for pointer, text in faults]
    return headers, json.dumps(body).encode()


async def send_error(
    scope: Scope, send: Send, status: int, code: str, detail: str, faults: Iterable[tuple[str, str]] = (),
    retry_after: float | None = None,
) -> None:  # fmt: skip
    """Answer a request with an error."""
    scope["state"].get("audited", {}).setdefault("reason", code)
    headers, body = render(scope["path"], scope["state"]["request_id"], status, code, detail, faults, retry_after)
    headers |= level_headers(scope)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def send_nexus_error(scope: Scope, send: Send, error: NexusError) -> None:
    status, faults = status_of(error, scope["path"]), faults_of(error)
    await send_error(scope, send, status, error.code, error.message, faults, error.retry_after)


class RequestId:
    """Gives each request an id, the caller's if it is a sane one, and says it in the answer and in all that is logged.

    Ray Serve names requests itself, and says the name: there this only takes note of it. The request is a span, of the
    caller's trace where there is one; `trace_id` in the state is its id, or where nobody traces the request's.
    """

    def __init__(self, app: ASGIApp, says_it: bool) -> None:
        self.app, self.says_it = app, says_it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, trace_id=request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if self.says_it:
                    headers["x-request-id"] = request_id
            await send(message)

        if scope["path"] in PUBLIC:
            await self.app(scope, receive, send_with_id)
            return
        tracing.take_up({tracing.REQUEST_ID: request_id} | {name: headers[name] for name in TRACED if name in headers})
        with tracing.span(scope["method"], {KIND: "CHAIN", REQUEST: request_id}, SpanKind.SERVER) as span:
            scope["state"]["trace_id"] = tracing.trace_id() or request_id
            started = time.perf_counter()
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                _tell(scope, status, time.perf_counter() - started, span)


def _tell(scope: Scope, status: int, seconds: float, span: Span) -> None:
    """Log a request and name its span by its route, for a path may hold anything. Status 0: it was given up."""
    method, route = scope["method"], getattr(scope.get("route"), "path", None)
    told = {"method": method, "route": route, "status": status, "milliseconds": round(1000 * seconds, 1)}
    requests.info("request", extra=told)
    if span.is_recording():
        span.set_attributes({METHOD: method, STATUS_CODE: status})
        if route is not None:
            span.update_name(f"{method} {route}")
            span.set_attribute(ROUTE, route)


def route_classes(app: ASGIApp) -> frozenset[str]:
    """What the paths of an application begin with."""
    paths = (str(getattr(route, "path", "")) for route in iter_route_contexts(getattr(app, "routes", ())))
    return frozenset(path.split("/")[1] for path in paths if "/" in path)


class Counted:
    """Counts each request by what its path begins with and by its status, before its sender has all of the answer.

    `other` is a path that leads nowhere, `left` a request that was given up before its answer began.
    """

    def __init__(self, app: ASGIApp, classes: frozenset[str]) -> None:
        self.app, self.classes = app, classes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begins = scope["path"].split("/")[1] if "/" in scope["path"] else ""
        route = begins if begins in self.classes else "other"
        started, status, is_counted = time.perf_counter(), "left", False

        def count() -> None:
            nonlocal is_counted
            if not is_counted:
                telemetry.http_requests.labels(route, status).inc()
                telemetry.http_response.labels(route).observe(time.perf_counter() - started)
            is_counted = True

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                count()
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        finally:
            count()


class Answering:
    """Turns whatever escapes a handler into an answer; nothing of a fault's inside leaves with it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = finished = False

        async def note_start(message: Message) -> None:
            nonlocal started, finished
            started = True
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, note_start)
        except NexusError as error:
            if started:
                raise
            await send_nexus_error(scope, send, error)
        except ClientDisconnect:
            log.info("request %s was given up by its sender", scope["state"]["request_id"])
        except Exception:  # the last line of defence: a bug must become an answer and a log line
            log.exception("request %s failed", scope["state"]["request_id"])
            if started and not finished:
                raise  # a stream cut short must look cut short
            if not started:
                await send_error(scope, send, 500, "internal_error", FAULT)


class Identity:
    """Names the principal behind a credential; without one only the public paths are open.

    It leaves `principal` and `token` (None for a key) in the state, and for the record why it refused.
    """

    def __init__(self, app: ASGIApp, verifier: Verifier) -> None:
        self.app, self.verifier = app, verifier

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            try:
                text = _credential(Headers(scope=scope), QueryParams(scope["query_string"]))
                shown = self.verifier.verify(text, scope["client"][0] if scope.get("client") else "")
            except (Unauthenticated, RateLimited) as error:
                reason = f"{error.code}: {error.__cause__}" if error.__cause__ else error.code
                scope["state"].setdefault("audited", {}).update(action="auth.failed", reason=reason)
                raise
            scope["state"] |= {"principal": shown.principal, "token": shown.token}
        await self.app(scope, receive, send)


def _credential(headers: Headers, query: QueryParams) -> str:
    """What a request shows. Raises Unauthenticated for none, for two that differ, and for one in the URL."""
    if credential_in(query.multi_items()):
        raise Unauthenticated(
            "a credential in a URL is never taken, for URLs are written into logs: end it and send another in a header",
            code="credential_in_url",
        )
    shown = {token.strip() for token in map(_bearer, headers.getlist("authorization")) if token.strip()}
    shown |= {key.strip() for key in headers.getlist("x-api-key") if key.strip()}
    if len(shown) > 1:
        raise Unauthenticated("a request has one credential; this one has several", code="several_credentials")
    if shown:
        return shown.pop()
    raise Unauthenticated("a key is needed: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


def _bearer(value: str) -> str:
    scheme, _, token = value.partition(" ")
    return token if scheme.lower() == "bearer" else ""


class BodyLimit:
    """Refuses a body as soon as it is over the limit, announced or not. What is shared is larger, and never held."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_block_bytes: int) -> None:
        self.app, self.max_bytes, self.max_block_bytes = app, max_bytes, max_block_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        max_bytes = self.max_bytes
        refusal = TooLarge(
            f"a request body has at most {max_bytes} bytes; split the document, or raise http.max_body_bytes"
        )
        if scope["method"] == "PUT" and scope["path"].startswith(BLOCKS):
            max_bytes = self.max_block_bytes
            refusal = TooLarge(
                f"a block has at most {max_bytes} bytes; share it in parts, or raise sharing.max_block_bytes"
            )
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
            raise refusal
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise refusal
            return message

        await self.app(scope, counted, send)


LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
SAFE_HEADERS = {
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "cross-origin-resource-policy": "same-origin",
}  # fmt: skip


class Safe:
    """Has a browser do nothing with what is answered, and nobody keep it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self.app(scope, receive, send_safely)


class Hosts:
    """Refuses what a browser is tricked into asking, and has the record say so.

    A request names a host that is ours: else a stranger's name was made to resolve to this address (DNS rebinding).
    A page of another origin may not ask unless the settings name it, and no form can: `text/plain` is refused.
    """

    def __init__(self, app: ASGIApp, http: Http) -> None:
        own = f"[{http.host}]" if ":" in http.host else http.host.lower()
        self.app = app
        self.hosts = (LOOPBACK_NAMES | {own} | set(http.allowed_hosts)) - {"0.0.0.0", "[::]"}
        self.origins = frozenset(http.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        try:
            self._check(Headers(scope=scope))
        except NexusError as error:
            scope["state"]["audited"]["is_denied"] = True
            await send_nexus_error(scope, send, error)
        else:
            await self.app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _without_port(hosts[0]) not in self.hosts:
            raise CallerError(
                "no such host is served here; whoever runs this Nexus names it in http.allowed_hosts",
                code="host_not_allowed",
            )
        for origin in headers.getlist("origin"):
            if origin not in self.origins and origin.lower() not in {f"http://{hosts[0]}", f"https://{hosts[0]}"}:
                raise Forbidden(
                    "pages of this origin may not ask here; whoever runs this Nexus names it in http.allowed_origins",
                    code="origin_not_allowed",
                )
        if media_type_of(headers.get("content-type")) == "text/plain":
            raise UnsupportedMedia("no text/plain is read here; JSON is sent as application/json")


def _without_port(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isascii() and port.isdecimal() else host.lower()


class Verdicts:
    """Notes for the record what the content rules and the guard found, and the gravest thing done; and counts it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        found: list[Finding] = []
        token = noted.set(found)
        try:
            await self.app(scope, receive, send)
        finally:
            noted.reset(token)
            for one in found:
                telemetry.content_verdicts.labels(one.where, one.rule, one.action).inc()
            if found:
                facts = scope["state"].setdefault("audited", {})
                facts["verdict"] = DONE[max((one.action for one in found), key=SEVERITY.index)]
                told = "; ".join(f"{one.where}, {one.named}: {DONE[one.action]}, {one.found}" for one in found)
                if facts.get("reason") in (None, ContentRefused.code):  # which rule it was says more
                    facts["reason"] = told
