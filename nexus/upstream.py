"""A model server somewhere else, asked over HTTP: deadlines, bounded reads, retries, and what its refusals mean.

An attempt is repeated only while no byte of an answer has come: after 408, 409, 429, 5xx and where there was
no connection. The pauses grow exponentially with full jitter; a Retry-After is obeyed if it ends before the
deadline. Nothing of the server but its own words, bounded and cleaned, is ever told to a caller.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx
import orjson
from pydantic import SecretStr

from nexus.errors import ConfigError, InvalidRequest, NexusError, Overloaded, Unavailable, UpstreamInvalid
from nexus.types import media_type_of

CONNECT_SECONDS = 5.0
ATTEMPTS = 3
FIRST_PAUSE = 0.5  # the longest pause after the first attempt; each further one is twice as long
MOST_BYTES = 32 * 2**20  # of an answer
MOST_STREAM_BYTES = 2**30  # of all of a stream: a token with its log probabilities may be 2 kB
MOST_LINE_BYTES = 2**20  # of a stream
MOST_REFUSAL_BYTES = 2**16
MOST_TOLD = 500  # characters of what a server said
LINGER_SECONDS = 0.2  # for the end of a stream after its [DONE], so that the connection can be used again
DONE = "[DONE]"

_NOT_TOLD = re.compile(
    r"\w+://\S+"  # an address
    r"|\b(?:bearer\s+\S+|(?:sk|pk|rk|nvapi|gsk|hf|xai|ghp|nx)[-_][\w*.-]{4,}|AIza[\w-]{8,})"  # a key by its looks
    r"|\b(?=\w*\d)[\w-]{32,}"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"
    r"|(?<![\w.])/[\w.-]+(?:/[\w.-]+)+",  # a path
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, without a slash at the end, and what it calls the model."""

    url: str
    model: str


def parse_address(address: str) -> Address:
    """Read `scheme:URL#model`. A URL without a path means `/v1` of it. Raises ConfigError that says what is wrong."""
    scheme, _, rest = address.partition(":")
    url, _, model = rest.partition("#")
    wanted = f"write {scheme}:https://host/v1#model"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(f"the address of the model {model!r} holds no valid URL: {wanted}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(f"the address of the model {model!r} holds no http or https URL: {wanted}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"the URL of the model {model!r} holds a credential: give it as api_key instead")
    if parts.query or re.search(r"[\s\x00-\x1f\\]", url):
        raise ConfigError(f"the URL of the model {model!r} may have a path, but nothing after it: {wanted}")
    if not model:
        raise ConfigError(f"an address {scheme}: names no model: {wanted}")
    return Address(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}", model)


# What a refusal means


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an attempt brought nothing: the error it is, whether another may help, and in how many seconds."""

    error: NexusError
    again: bool = False
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class World:
    """Chance and time, as the retries see them."""

    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep


class Retries:
    """Decides what follows a refusal: how long to wait for the next attempt, or that there is none."""

    def __init__(self, world: World, seconds: float) -> None:
        self._world = world
        self._attempts = 0
        self.deadline = world.clock() + seconds

    def seconds_until_next(self, refusal: Refusal) -> float:
        """The pause before the next attempt. Raises the refusal's error when there will be none."""
        self._attempts += 1
        pause: float = self._world.random() * FIRST_PAUSE * 2 ** (self._attempts - 1)
        if refusal.retry_after is not None:
            pause = max(pause, refusal.retry_after)
        in_time = self._world.clock() + pause < self.deadline
        if not refusal.again or self._attempts >= ATTEMPTS or not in_time:
            raise refusal.error
        return pause


def read_retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait, from a number or an HTTP date; `now` is in Unix seconds. None for nothing that can be read."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return float(value)
    try:
        return max(0.0, float(parsedate_to_datetime(value).timestamp()) - now)
    except (ValueError, OverflowError):
        return None


def clean(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Some other server's words as they may be told: one line, bounded, without keys, addresses and paths."""
    text = text[: 8 * MOST_TOLD]
    for secret in filter(None, secrets):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", "…", text)
    text = _NOT_TOLD.sub("…", " ".join("".join(c if c.isprintable() else " " for c in text).split()))
    return text if len(text) <= MOST_TOLD else f"{text[: MOST_TOLD - 1]}…"


def _words_of(body: bytes | Mapping[str, Any]) -> str:
    """What an error says, wherever OpenAI, FastAPI and the like put it; nothing where it is not theirs."""
    try:
        said: Any = orjson.loads(body) if isinstance(body, bytes) else body
    except orjson.JSONDecodeError:
        return ""
    for _ in range(3):
        if isinstance(said, Mapping):
            said = next((said[key] for key in ("error", "message", "detail") if said.get(key)), None)
    return said if isinstance(said, str) else ""


# Streams


class Event(NamedTuple):
    """One server-sent event: its kind ("message" where nothing is said) and its data."""

    kind: str
    data: str


class EventReader:
    """Bytes in, events out: server-sent events with lines that end in LF or CRLF, as servers of models write them.

    Raises UpstreamInvalid for a line, or a stream, over its limit, and for what is not UTF-8. What follows the
    last blank line is no event.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._seen = 0
        self._kind = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete."""
        self._seen += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._seen > MOST_STREAM_BYTES or any(len(line) > MOST_LINE_BYTES for line in (*lines, self._rest)):
            raise UpstreamInvalid("a model server streamed more than an answer can be")
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> Event | None:
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            raise UpstreamInvalid("a model server streamed what is not UTF-8") from None
        if not text:
            event = Event(self._kind or "message", "\n".join(self._data)) if self._data else None
            self._kind, self._data = "", []
            return event
        field, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._kind = value
        return None  # the rest are comments, which keep a connection alive, and fields of no use here


# The server


class Server:
    """One model server. `post` blocks and may be called by several threads, `events` by several event loops.

    `seconds` bound an answer from its first attempt to its last byte, and a stream up to its first.
    """

    def __init__(
        self, address: Address, name: str, key: SecretStr | str | None, seconds: float, world: World | None = None
    ) -> None:
        self.url, self.name, self.seconds = address.url, name, seconds
        self._secret = key.get_secret_value() if isinstance(key, SecretStr) else (key or "")
        if not self._secret.isascii() or not self._secret.isprintable() or " " in self._secret:
            raise ConfigError(f"the api_key of the model {name!r} holds characters that no key has")
        self._world = world or World()
        # Reading the authorities' certificates takes long, and redirects are not followed: http never needs them.
        self._verify = httpx.create_ssl_context() if address.url.startswith("https:") else False
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers to this body.

        Raises InvalidRequest for what it refuses, Overloaded and Unavailable when no attempt went well,
        UpstreamInvalid for an answer that is none.
        """
        content = self._write(body)
        retries = Retries(self._world, self.seconds)
        while True:
            answer = self._attempt(path, content, retries.deadline)
            if isinstance(answer, bytes):
                break
            self._world.sleep(retries.seconds_until_next(answer))
        try:
            return orjson.loads(answer)
        except orjson.JSONDecodeError:
            raise self._nonsense("what is not JSON") from None

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Event]:
        """The events that the server streams for this body. Closing the generator closes the connection.

        Raises what `post` does; Unavailable also where the stream breaks off in the middle of the transfer. Time
        between events is for the caller to bound.
        """
        content = self._write(body)
        retries = Retries(self._world, self.seconds)
        while True:
            request = self._client().build_request("POST", self.url + path, content=content)
            request.headers["Accept"] = "text/event-stream"
            try:
                response = await self._client().send(request, stream=True)
            except httpx.TransportError as error:
                refusal = self._unreached(error)
            else:
                try:
                    refused = await self._examine(response)
                    if refused is None:
                        async with aclosing(self._read_events(response)) as events:
                            async for event in events:
                                yield event
                        return
                    refusal = refused
                finally:
                    await response.aclose()
            await self._world.pause(retries.seconds_until_next(refusal))

    async def check(self, path: str, also_fine: frozenset[int] = frozenset()) -> None:
        """Return if a GET is answered with 200 or one of these, else raise Unavailable."""
        try:
            async with self._client().stream("GET", self.url + path, timeout=CONNECT_SECONDS) as response:
                status = response.status_code
        except httpx.TransportError:
            raise Unavailable(f"the server of the model {self.name!r} does not answer") from None
        if status != 200 and status not in also_fine:
            raise Unavailable(f"the server of the model {self.name!r} answers its check with status {status}")

    def close(self) -> None:
        """Close the connections of `post`. The server may be used again."""
        if client := self.__dict__.pop("_blocking", None):
            client.close()

    async def aclose(self) -> None:
        """Close this event loop's connections. The server may be used again."""
        if client := self._clients.pop(asyncio.get_running_loop(), None):
            await client.aclose()

    def explain(self, status: int, body: bytes | Mapping[str, Any], retry_after: str | None = None) -> Refusal:
        """What a refusal with this status means, and who has to act."""
        told = f"the model {self.name!r}"
        place = urlsplit(self.url)
        said = clean(_words_of(body), (self._secret, self.url, place.netloc, place.hostname or ""))
        later = read_retry_after(retry_after, self._world.now())
        if status in (400, 404, 413, 422):
            return Refusal(InvalidRequest(f"{told} refuses the request: {said or f'status {status}'}"))
        if status in (429, 503):
            return Refusal(Overloaded(f"{told} takes no more requests now (status {status}); try later"), True, later)
        if status in (408, 409) or (status >= 500 and status not in (501, 505)):
            error = Unavailable(f"the server of {told} failed (status {status}); try again in a moment")
            return Refusal(error, True, later)
        if status in (401, 403):
            return Refusal(self._nonsense(f"status {status}: set the api_key that it accepts"))
        if 300 <= status < 400:
            return Refusal(self._nonsense(f"a redirect (status {status}), which is not followed: set its final URL"))
        return Refusal(self._nonsense(f"status {status}"))

    def _nonsense(self, what: str) -> UpstreamInvalid:
        return UpstreamInvalid(f"the server of the model {self.name!r} answered {what}")

    def _unreached(self, error: httpx.TransportError) -> Refusal:
        told = f"the server of the model {self.name!r}"
        if isinstance(error, httpx.PoolTimeout):
            return Refusal(Overloaded(f"every connection to {told} is in use; try again in a moment"))
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            return Refusal(Unavailable(f"{told} did not answer within {self.seconds:g} s"))
        return Refusal(Unavailable(f"{told} cannot be reached; try again in a moment"), again=True)

    def _write(self, body: Mapping[str, Any]) -> bytes:
        try:
            # Half a surrogate pair is legal in a str, but not in UTF-8: it becomes a question mark.
            return json.dumps(body, ensure_ascii=False, allow_nan=False, default=dict).encode(errors="replace")
        except ValueError:
            raise InvalidRequest("a number of the request is NaN or infinite; give finite ones") from None

    @property
    def _options(self) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "nexus"}
        if self._secret:
            headers["Authorization"] = f"Bearer {self._secret}"
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=30)
        timeout = httpx.Timeout(self.seconds, connect=min(CONNECT_SECONDS, self.seconds))
        return {"headers": headers, "limits": limits, "timeout": timeout, "verify": self._verify}

    @cached_property
    def _blocking(self) -> httpx.Client:
        return httpx.Client(**self._options)

    def _client(self) -> httpx.AsyncClient:
        """The client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = httpx.AsyncClient(**self._options)
        return self._clients[loop]

    def _attempt(self, path: str, content: bytes, deadline: float) -> bytes | Refusal:
        begun = False
        try:
            with self._blocking.stream("POST", self.url + path, content=content) as response:
                begun = response.status_code == 200
                body = bytearray()
                most = MOST_BYTES if begun else MOST_REFUSAL_BYTES
                for data in response.iter_raw():
                    body += data
                    if len(body) > most:
                        break
                    if self._world.clock() > deadline:
                        raise Unavailable(f"the server of the model {self.name!r} did not answer in time")
        except httpx.TransportError as error:
            if begun:
                raise Unavailable(f"the server of the model {self.name!r} broke off its answer; try again") from None
            return self._unreached(error)
        if not begun:
            return self.explain(response.status_code, bytes(body), response.headers.get("retry-after"))
        self._require(response, "application/json")
        if len(body) > most:
            raise self._nonsense(f"more than {MOST_BYTES // 2**20} MiB")
        return bytes(body)

    async def _examine(self, response: httpx.Response) -> Refusal | None:
        """None where the answer is a stream of events, else why it is not."""
        if response.status_code == 200:
            self._require(response, "text/event-stream")
            return None
        body = b""
        with suppress(httpx.TransportError):  # the status says enough
            async for data in response.aiter_raw():
                body += data
                if len(body) > MOST_REFUSAL_BYTES:
                    break
        return self.explain(response.status_code, body, response.headers.get("retry-after"))

    def _require(self, response: httpx.Response, wanted: str) -> None:
        kind = media_type_of(response.headers.get("content-type"))
        if kind != wanted:
            raise self._nonsense(f"{clean(kind) or 'nothing said to be'!r} where {wanted} was asked for")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise self._nonsense("in an encoding that was not asked for")

    async def _read_events(self, response: httpx.Response) -> AsyncGenerator[Event]:
        reader = EventReader()
        try:
            async with aclosing(cast(AsyncGenerator[bytes], response.aiter_raw())) as pieces:
                async for piece in pieces:
                    for event in reader.feed(piece):
                        yield event
                        if event.data == DONE:
                            with suppress(TimeoutError):
                                async with asyncio.timeout(LINGER_SECONDS):
                                    async for _ in pieces:
                                        pass
                            return
        except httpx.TransportError:
            raise Unavailable(f"the server of the model {self.name!r} broke off its answer; try again") from None
