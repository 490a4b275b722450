"""Whose signatures count: the public keys of an outside issuer, from a file, or from a URL read beside the requests.

Keys are looked up by exactly the `kid` that a token names, and each is bound to one algorithm. A set with a secret in
it, or a key too weak, is refused whole. Keys from a URL are as old as its last good answer; where that was too long
ago, none counts. It is asked often and answers little: what it was said to be at its last change goes with the question
(RFC 9110, 13.1). A key that an issuer takes out counts until then, or until somebody asks for it now.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import httpx
import jwt

from nexus.config import Issuer
from nexus.errors import ConfigError, Unavailable, UpstreamInvalid
from nexus.signing import Stamp, stamp_of

log = logging.getLogger("nexus.access")

MOST_BYTES = 256 * 1024  # of a set
MOST_KEYS = 100
FETCH_SECONDS = 5.0
SOONEST_SECONDS = 5.0  # between two fetches, whatever is asked for
KEPT_SECONDS = 3600.0  # for so long the keys count while their URL does not answer
HEADERS = {"accept": "application/json", "accept-encoding": "identity", "cache-control": "no-cache"}
CONDITIONS = {"etag": "if-none-match", "last-modified": "if-modified-since"}
MOST_CONDITION = 512  # characters
LEAST_RSA_BITS = 2048

Keys = Mapping[str | None, jwt.PyJWK]


class KeySet(Protocol):
    def keys(self) -> Keys:
        """By `kid`. Raises Unavailable while there are none to go by."""

    def missed(self) -> None:
        """A token names a key that is not in the set: there may be a new one."""

    def refresh(self) -> bool:
        """Read them now; whether that went well. If not, those that were there go on as before."""


def parse_key_set(content: bytes, algorithms: tuple[str, ...]) -> Keys:
    """The keys of a JWKS document (RFC 7517) that sign with one of these algorithms. Raises UpstreamInvalid."""
    try:
        listed = json.loads(content)["keys"]
        if not isinstance(listed, list) or len(listed) > MOST_KEYS:
            raise UpstreamInvalid(f"a key set has `keys`, at most {MOST_KEYS}")
        if any(each["kty"] == "oct" or "d" in each for each in listed):
            raise UpstreamInvalid("a key set holds public keys; a secret or private one in it is known to others")
        signing = [each for each in listed if each.get("use", "sig") == "sig"]
        read = [jwt.PyJWK(each) for each in signing if each["kty"] in ("RSA", "EC", "OKP")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, jwt.PyJWTError) as error:
        raise UpstreamInvalid(f"a key set cannot be read: {type(error).__name__}") from None
    keys: dict[str | None, jwt.PyJWK] = {}
    for key in read:
        if key.algorithm_name not in algorithms:
            continue
        if key.key_id in keys:
            raise UpstreamInvalid("two keys of a set have one `kid`")
        if getattr(key.key, "key_size", LEAST_RSA_BITS) < LEAST_RSA_BITS and key.key_type == "RSA":
            raise UpstreamInvalid(f"a key of a set is weak: RSA has at least {LEAST_RSA_BITS} bits")
        keys[key.key_id] = key
    return keys


class FileKeys:
    """The keys in a file. Another in its place counts from then on."""

    def __init__(self, file: Path, algorithms: tuple[str, ...]) -> None:
        """Raises ConfigError for what cannot be read."""
        self._file, self._algorithms = file, algorithms
        self._seen: Stamp | None = None
        self._keys: Keys = {}
        try:
            self.keys()
        except Unavailable as error:
            raise ConfigError(f"access.issuers: {file}: {error.message}") from None

    def keys(self) -> Keys:
        try:
            seen = stamp_of(self._file)
            if seen != self._seen:
                if seen[-1] > MOST_BYTES:
                    raise UpstreamInvalid(f"a key set has at most {MOST_BYTES} bytes")
                self._keys = parse_key_set(self._file.read_bytes(), self._algorithms)
                self._seen = seen
        except (OSError, UpstreamInvalid) as error:
            reason = error.strerror if isinstance(error, OSError) else error.message
            log.error("the keys of an issuer cannot be read: %s", reason)
            raise Unavailable(f"the issuer's keys cannot be read: {reason}") from None
        return self._keys

    def missed(self) -> None:
        """A file is looked at each time."""

    def refresh(self) -> bool:
        try:
            self.keys()
        except Unavailable:
            return False
        return True


class UrlKeys:
    """The keys at a URL. No request waits for it: a thread asks now and then, and soon after a key was missed."""

    def __init__(
        self, url: str, algorithms: tuple[str, ...], refresh_seconds: float,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._url, self._algorithms, self._refresh_seconds = url, algorithms, refresh_seconds
        self._elapsed = elapsed
        self._keys: Keys = {}
        self._read_at: float | None = None
        self._conditions: Mapping[str, str] = {}
        self._reading = threading.Lock()
        self._wanted = threading.Event()
        self._is_closed = False

    def start(self) -> None:
        threading.Thread(target=self._keep_fresh, name="issuer-keys", daemon=True).start()

    def close(self) -> None:
        self._is_closed = True
        self._wanted.set()

    def keys(self) -> Keys:
        if self._read_at is None or self._elapsed() - self._read_at > KEPT_SECONDS:
            raise Unavailable("the issuer's keys have not come yet, or too long ago; try again")
        return self._keys

    def missed(self) -> None:
        self._wanted.set()

    def refresh(self) -> bool:
        """Read the URL once; whether that went well. What it says wrong changes nothing."""
        with self._reading:
            asked_at = self._elapsed()
            try:
                content, conditions = fetch(self._url, self._conditions)
                if content is not None:
                    self._keys, self._conditions = parse_key_set(content, self._algorithms), conditions
            except (httpx.HTTPError, OSError, UpstreamInvalid) as error:
                reason = error.message if isinstance(error, UpstreamInvalid) else type(error).__name__
                log.warning("the keys of an issuer at %s did not come: %s", urlsplit(self._url).hostname, reason)
                return False
            self._read_at = asked_at
            return True

    def _keep_fresh(self) -> None:
        pause = SOONEST_SECONDS
        while not self._is_closed:
            self._wanted.clear()
            pause = self._refresh_seconds if self.refresh() else SOONEST_SECONDS
            time.sleep(min(SOONEST_SECONDS, pause))
            self._wanted.wait(pause - SOONEST_SECONDS)


def fetch(url: str, conditions: Mapping[str, str]) -> tuple[bytes | None, Mapping[str, str]]:
    """The document at a URL, or None where it is what it was, and the conditions for asking again.

    No redirects, no proxies of the environment, bounded in size and in time. Raises httpx.HTTPError, UpstreamInvalid.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    content = bytearray()
    with (
        httpx.Client(timeout=FETCH_SECONDS, follow_redirects=False, trust_env=False) as client,
        client.stream("GET", url, headers=HEADERS | dict(conditions)) as response,
    ):
        if response.status_code == 304 and conditions:
            return None, conditions
        if response.status_code != 200:
            raise UpstreamInvalid(f"its server answers with status {response.status_code}")
        for data in response.iter_raw():
            content += data
            if len(content) > MOST_BYTES or time.monotonic() > deadline:
                raise UpstreamInvalid(f"more than {MOST_BYTES} bytes, or {FETCH_SECONDS:g} s")
    said = {name: response.headers.get(name, "") for name in CONDITIONS}
    return bytes(content), {CONDITIONS[name]: value for name, value in said.items() if 0 < len(value) <= MOST_CONDITION}


def open_key_set(issuer: Issuer) -> KeySet:
    """The keys of an issuer as configured; those of a URL begin to come. Raises ConfigError."""
    if issuer.jwks_file is not None:
        return FileKeys(issuer.jwks_file, issuer.algorithms)
    assert issuer.jwks_url is not None
    keys = UrlKeys(issuer.jwks_url, issuer.algorithms, issuer.refresh_seconds)
    keys.start()
    return keys
