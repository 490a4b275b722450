"""How much a caller may ask for: token buckets of requests and of generated tokens, per credential and per tenant.

A bucket is known by one number, the moment at which it is full again: the generic cell rate algorithm (ITU-T I.371,
annex A), here that of pyrate-limiter. One that is full is as one that was never used, so it is forgotten. Requests are
paid for before, generated tokens after the fact, when they are counted: who is in debt waits until it is paid off.

All of this belongs to one event loop: one process is one truth.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import ceil

from cachetools import TLRUCache
from pyrate_limiter import Rate, TokenBucket

from nexus.config import Ceiling, Config
from nexus.errors import RateLimited
from nexus.types import Principal

MINUTE_MS = 60_000
MOST_BUCKETS = 100_000  # not full ones; of more, the longest unused are forgotten
MOST_TOKENS = 1_000_000  # of one generation: a backend that counts more is wrong, and its caller does not pay for it
ANY_DEBT = 2**60  # a burst that no spending comes to

BUCKET = TokenBucket()
Name = tuple[str, ...]

_spend: ContextVar[Callable[[int], None] | None] = ContextVar("spend", default=None)


@dataclass(frozen=True, slots=True)
class Level:
    """Of a bucket: what comes in per minute, what is left now, and in how many seconds it is full again."""

    limit: int
    remaining: int
    reset_seconds: float


class Limiter:
    """The buckets of everyone who asks this installation."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        """The clock is in seconds and never goes back."""
        limits = config.limits
        self._key = Ceiling(requests_per_minute=config.requests_per_minute, tokens_per_minute=limits.tokens_per_minute)
        self._tenant, self._tenants = limits.tenant, limits.tenants
        self._burst = limits.burst_seconds / 60
        self._clock = clock
        self._full_at: TLRUCache[Name, int, float] = TLRUCache(MOST_BUCKETS, _expiry, clock)

    def admit(self, principal: Principal) -> None:
        """Pay for one request. Raises RateLimited, and then nothing is paid."""
        now = self._now()
        for name, rate in self._tokens(principal):
            _, wait = self._pour(name, rate, now)
            if wait is not None:
                raise _refusal("generated tokens", rate, name, wait)
        paid: dict[Name, int] = {}
        for name, rate in self._requests(principal):
            paid[name], wait = self._pour(name, rate, now)
            if wait is not None:
                raise _refusal("requests", rate, name, wait)
        self._full_at.update(paid)

    def spend(self, principal: Principal, tokens: int) -> None:
        """Pay for what was generated, into debt if need be."""
        weight = min(tokens, MOST_TOKENS)
        if weight <= 0:
            return
        now = self._now()
        for name, rate in self._tokens(principal):
            self._full_at[name], _ = self._pour(name, Rate(rate.limit, MINUTE_MS, ANY_DEBT), now, weight)

    def levels(self, principal: Principal) -> dict[str, Level]:
        """How `requests` and `tokens` stand, where there is a limit: of two buckets the one with less left."""
        kinds = {"requests": self._requests(principal), "tokens": self._tokens(principal)}
        found = {kind: [self._level(name, rate) for name, rate in buckets] for kind, buckets in kinds.items()}
        return {kind: min(levels, key=lambda one: one.remaining) for kind, levels in found.items() if levels}

    def __len__(self) -> int:
        """How many buckets are not full."""
        self._full_at.expire()
        return len(self._full_at)

    def _requests(self, principal: Principal) -> list[tuple[Name, Rate]]:
        own, ceiling = principal.requests_per_minute, self._ceiling(principal).requests_per_minute
        return self._buckets("requests", principal, self._key.requests_per_minute if own is None else own, ceiling)

    def _tokens(self, principal: Principal) -> list[tuple[Name, Rate]]:
        own, ceiling = principal.tokens_per_minute, self._ceiling(principal).tokens_per_minute
        return self._buckets("tokens", principal, self._key.tokens_per_minute if own is None else own, ceiling)

    def _ceiling(self, principal: Principal) -> Ceiling:
        return self._tenants.get(principal.tenant, self._tenant)

    def _buckets(self, kind: str, principal: Principal, own: int | None, tenant: int | None) -> list[tuple[Name, Rate]]:
        """The buckets that this principal draws from: its credential's, and its tenant's."""
        names: list[tuple[Name, int | None]] = [
            ((kind, *caller_of(principal)), own), ((kind, principal.tenant), tenant),
        ]  # fmt: skip
        return [(name, self._rate(limit)) for name, limit in names if limit is not None]

    def _rate(self, per_minute: int) -> Rate:
        return Rate(per_minute, MINUTE_MS, max(1, int(per_minute * self._burst)))

    def _pour(self, name: Name, rate: Rate, now: int, weight: int = 1) -> tuple[int, float | None]:
        """When the bucket would be full again with so much taken from it, and the seconds to wait if it has less."""
        (full_at,), decision = BUCKET.step([rate], (self._full_at.get(name, 0),), now, weight)
        wait = None if decision.retry_after_ms is None else decision.retry_after_ms / 1000
        return int(full_at), wait

    def _level(self, name: Name, rate: Rate) -> Level:
        full_at, now = self._full_at.get(name, 0), self._now()
        used = BUCKET.consumed([rate], (full_at,), now)
        return Level(rate.limit, max(0, rate.burst - used), max(0.0, full_at / 1e6 - now / 1e3))

    def _now(self) -> int:
        return int(self._clock() * 1000)


def caller_of(principal: Principal) -> tuple[str, str]:
    """Whose requests and places are counted together."""
    return principal.tenant, principal.credential or principal.subject


def _expiry(name: Name, full_at: int, now: float) -> float:
    return full_at / 1e6


def _refusal(what: str, rate: Rate, name: Name, wait: float) -> RateLimited:
    whose = "this key" if len(name) == 3 else "all keys of this tenant together"
    seconds = f"{ceil(wait)} s"
    return RateLimited(f"{whose}: {rate.limit} {what} a minute are allowed; try again in {seconds}", retry_after=wait)


@contextmanager
def spending(spend: Callable[[int], None]) -> Iterator[None]:
    """What is generated within is told to `spend`, in tokens."""
    token = _spend.set(spend)
    try:
        yield
    finally:
        _spend.reset(token)


def spender() -> Callable[[int], None]:
    """Whom to tell how many tokens were generated for the request at hand."""
    return _spend.get() or _nobody


def _nobody(tokens: int) -> None:
    """What nobody asked for is nobody's debt."""
