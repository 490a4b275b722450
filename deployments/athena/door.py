"""Who may see Athena's pages: each browser signs in with a key of its own, or with a link that lends it one.

Nothing of Athena answers before that, its web socket included. The key stays in this process, by the value of a cookie
that no script can read. On one machine others can open the port, too: so the key that the command line finds is lent
only through a link, which works once and for ten minutes. Requests have to name a host that Athena is, and what changes
something or opens a socket has to come from Athena's own pages: a page of somebody else's reaches nothing here.
"""

import html
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.athena.client import Away, Nexus, Refused

LINK_SECONDS = 600
IDLE_SECONDS = 12 * 3600.0
MOST_SIGNED_IN = 1000
MOST_FORM_BYTES = 8 * 1024
SIGN_IN, SIGN_OUT, HEALTH = "/sign-in", "/sign-out", "/_stcore/health"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
POLICY = "; ".join(
    (
        "default-src 'self'", "script-src 'self' 'wasm-unsafe-eval'", "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:", "font-src 'self' data:", "connect-src 'self'", "worker-src 'self' blob:",
        "frame-src 'none'", "object-src 'none'", "base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'",
    )
)  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin", "x-frame-options": "DENY",
}  # fmt: skip
PAGE = (Path(__file__).parent / "sign_in.html").read_text(encoding="utf-8")


def make_link(url: str, secret: str) -> str:
    """An address that signs one browser in, once."""
    token = _signer(secret).dumps(secrets.token_urlsafe(16))
    return f"{url}/?token={token}"


def _signer(secret: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(secret, salt="athena-link")


@dataclass(frozen=True)
class Settings:
    """What Athena is told when it starts. `lent_key` goes to whoever opens a link signed with `secret`."""

    nexus_url: str
    host: str = "127.0.0.1"
    port: int = 8501
    hosts: tuple[str, ...] = ()  # names it is reached by besides those of this machine
    secret: str = ""
    lent_key: str = ""
    is_encrypted: bool = False
    most_upload_bytes: int = 64 * 2**20


@dataclass
class _SignedIn:
    nexus: Nexus
    seen_at: float


@dataclass
class Door:
    """The browsers that are signed in, by the value of their cookie. Used by the server's loop and pages' threads."""

    settings: Settings
    now: Callable[[], float] = time.time
    _browsers: dict[str, _SignedIn] = field(default_factory=dict)
    _used: dict[str, float] = field(default_factory=dict)  # links, and when they were

    @property
    def cookie(self) -> str:
        return f"athena-{self.settings.port}"  # cookies are shared by the ports of a host

    def nexus_of(self, cookies: Mapping[str, str]) -> Nexus | None:
        """The way to Nexus of the browser with these cookies; None for one that is not signed in."""
        found = self._browsers.get(cookies.get(self.cookie, ""))
        if found is None or self.now() - found.seen_at > IDLE_SECONDS:
            return None
        found.seen_at = self.now()
        return found.nexus

    def sign_in(self, key: str) -> str:
        """The value of the cookie that stands for this key from now on."""
        while len(self._browsers) >= MOST_SIGNED_IN:
            self._forget(min(self._browsers, key=lambda one: self._browsers[one].seen_at))
        value = secrets.token_urlsafe(32)
        self._browsers[value] = _SignedIn(Nexus(self.settings.nexus_url, key), self.now())
        return value

    def sign_out(self, cookies: Mapping[str, str]) -> None:
        self._forget(cookies.get(self.cookie, ""))

    def _forget(self, value: str) -> None:
        if (found := self._browsers.pop(value, None)) is not None:
            found.nexus.close()

    def redeem(self, token: str) -> str | None:
        """The value of a cookie with the key that is lent, if the link is good and was not used before."""
        if not (self.settings.secret and self.settings.lent_key):
            return None
        try:
            name = _signer(self.settings.secret).loads(token, max_age=LINK_SECONDS)
        except BadSignature:
            return None
        now = self.now()
        self._used = {used: at for used, at in self._used.items() if now - at <= 2 * LINK_SECONDS}
        if name in self._used:
            return None
        self._used[name] = now
        return self.sign_in(self.settings.lent_key)


# ── in front of every request ───────────────────────────────────────────────────────────────────


class Guard:
    """Lets through to Streamlit who is signed in; the rest is asked to sign in, or refused."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door
        self._hosts = {name.casefold() for name in (*LOOPBACK, *door.settings.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refuse(scope, headers)
        if refused is None and scope["type"] == "http":
            refused = await self._answer(Request(scope, receive))
        elif refused is None and self._door.nexus_of(_cookies(headers)) is None:
            refused = PlainTextResponse("sign in first", 401)
        if refused is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 4401})
        else:
            await refused(scope, receive, _with_headers(send))

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        """Whoever asks for another host, or from a page that is not ours."""
        host = headers.get("host", "")
        if _name_of(host) not in self._hosts:
            return PlainTextResponse("Athena is not called that; see athena.allowed_hosts", 421)
        origin = headers.get("origin")
        is_safe = scope["type"] == "http" and scope["method"] in SAFE_METHODS
        if not is_safe and origin is not None and urlsplit(origin).netloc.casefold() != host.casefold():
            return PlainTextResponse("this did not come from a page of Athena's", 403)
        return None

    async def _answer(self, request: Request) -> Response | None:
        """What is answered here; None for what goes on to Streamlit."""
        path = request.url.path
        if path == SIGN_IN:
            return await self._sign_in(request)
        if path == SIGN_OUT and request.method == "POST":
            self._door.sign_out(request.cookies)
            return RedirectResponse(SIGN_IN, 303)
        if path == "/" and "token" in request.query_params:
            value = self._door.redeem(request.query_params["token"])
            if value is None:
                return self._page("This link was used already, or is too old. `nexus athena` gives another.", 403)
            return self._enter(value)
        if path == HEALTH or self._door.nexus_of(request.cookies) is not None:
            return None
        wants_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
        return RedirectResponse(SIGN_IN, 303) if wants_page else PlainTextResponse("sign in first", 401)

    async def _sign_in(self, request: Request) -> Response:
        if request.method != "POST":
            return self._page()
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_FORM_BYTES:
                return self._page("That is longer than any key.", 413)
        key = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0].strip()
        if not (key and key.isascii() and key.isprintable()):
            return self._page("Give a key. `nexus key create NAME` makes one.", 422)
        nexus = Nexus(self._door.settings.nexus_url, key)
        try:
            await run_in_threadpool(nexus.check_key)
        except Away:
            url = self._door.settings.nexus_url
            return self._page(f"Nexus does not answer at {url}; start it with `nexus up`, then sign in.", 503)
        except Refused as error:
            if error.status == 401:
                return self._page("Nexus does not know this key, or it has ended.", 401)
            return self._page(f"Nexus did not let you in: {error.detail}", error.status)
        finally:
            nexus.close()
        return self._enter(self._door.sign_in(key))

    def _enter(self, value: str) -> Response:
        response = RedirectResponse("/", 303)
        response.set_cookie(
            self._door.cookie, value, httponly=True, samesite="lax", secure=self._door.settings.is_encrypted
        )
        return response

    def _page(self, what_is_wrong: str = "", status: int = 200) -> Response:
        shown = PAGE.replace("{url}", html.escape(self._door.settings.nexus_url))
        shown = shown.replace("{message}", _as_html(what_is_wrong))
        return HTMLResponse(shown, status, {"cache-control": "no-store"})


def _as_html(text: str) -> str:
    """Text in a page; what is between backticks is code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _name_of(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).casefold()


def _cookies(headers: Headers) -> Mapping[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def _with_headers(send: Send) -> Send:
    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return send_with


def names(hosts: Collection[str]) -> tuple[str, ...]:
    """Host names as a Host header has them."""
    return tuple(f"[{host}]" if ":" in host and not host.startswith("[") else host for host in hosts)
