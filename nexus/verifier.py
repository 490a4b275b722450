"""One verifier for whatever a caller shows, key or token, and a brake on those who guess.

Failures are counted per address of the client for a minute: with one key's visible part, and over all. Whoever is over
the first count is refused without a look at that key, right or wrong; over the second, all that is wrong is. Everybody
else behind the same address comes in as before. The counts are this process's: one gateway serves an installation.
"""

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachetools import TTLCache

from nexus.access import KeyRing, looks_like_key, visible_part
from nexus.errors import RateLimited, Unauthenticated
from nexus.tokens import Token, Tokens
from nexus.types import Principal

WINDOW_SECONDS = 60.0
MOST_COUNTED = 10_000  # addresses, and keys tried from them
TIMES_AS_MANY = 5  # failures of one address over all, as with one key
OVER_ALL = ""  # in place of a key's visible part
TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*", re.ASCII)
TOKEN_BEGINS = "eyJ"  # the base64 of {"
SECRET_NAMES = frozenset({
    "key", "apikey", "xapikey", "token", "accesstoken", "idtoken", "refreshtoken", "authtoken", "bearer", "bearertoken",
    "jwt", "auth", "authorization", "credential", "credentials", "secret", "password",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shown:
    """Who came, and the token that they came with; None: it was a key."""

    principal: Principal
    token: Token | None = None


@dataclass(slots=True)
class _Failures:
    first: float
    number: int = 0


class Verifier:
    """Says who shows a credential."""

    def __init__(
        self, keys: KeyRing, tokens: Tokens, failures_per_minute: int,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.keys, self.tokens = keys, tokens
        self._most = failures_per_minute
        self._elapsed = elapsed
        self._failures: TTLCache[tuple[str, str], _Failures] = TTLCache(MOST_COUNTED, WINDOW_SECONDS, elapsed)
        self._lock = threading.Lock()

    def verify(self, text: str, address: str) -> Shown:
        """Raises Unauthenticated, in the same words for what is unknown and what is wrong; RateLimited; Unavailable."""
        visible = visible_part(text)
        if visible:
            self._refuse_over(address, visible, self._most)
        try:
            if TOKEN.fullmatch(text) or text.startswith(TOKEN_BEGINS) or text.count(".") >= 2:
                token = self.tokens.verify(text)
                return Shown(token.principal, token)
            return Shown(self.keys.verify(text))
        except Unauthenticated:
            self._refuse_over(address, OVER_ALL, TIMES_AS_MANY * self._most)
            self._count(address, OVER_ALL)
            if visible:
                self._count(address, visible)
            raise

    def _refuse_over(self, address: str, what: str, most: int) -> None:
        with self._lock:
            counted = self._failures.get((address, what))
            if counted is None or counted.number < most:
                return
            wait = counted.first + WINDOW_SECONDS - self._elapsed()
        raise RateLimited(
            "too many credentials from this address were wrong; wait a while", retry_after=max(1.0, wait),
            code="too_many_failures",
        )  # fmt: skip

    def _count(self, address: str, what: str) -> None:
        """Counted from the first failure on: a minute after it, all are forgotten."""
        with self._lock:
            counted = self._failures.get((address, what))
            if counted is None:
                counted = self._failures[address, what] = _Failures(self._elapsed())
            counted.number += 1


def credential_in(query: Sequence[tuple[str, str]]) -> bool:
    """Whether the query of a URL holds a credential, by its name or by its looks: URLs are written into logs."""
    return any(
        re.sub("[^a-z]", "", name.lower()) in SECRET_NAMES
        or looks_like_key(value)
        or (value.startswith(TOKEN_BEGINS) and TOKEN.fullmatch(value))
        for name, value in query
    )
