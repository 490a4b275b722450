"""Who has how many of a machine's GPUs at present: chat first, embedding next, and bulk work what is left.

A deployment wants a replica for each `target` of its requests, those that wait among them. Each has its least; then
chat gets what it wants and, for a while, what it wanted a moment ago, then embedding, then bulk. So who comes first
takes from who comes later at once, and gives back late: a replica that loads a model for minutes should not come and
go with every pause between two questions. Of two of one kind neither takes from the other what that still wants.

While chat's first tokens take nearly as long as they may, the others have their least, whatever they want.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, inf
from typing import Literal, get_args

Kind = Literal["chat", "embed", "bulk"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # who comes first

SILENT_SECONDS = 10.0  # after which a deployment that does not say what it wants counts as idle
GRAINS = 10_000  # of a GPU: what Ray can count


@dataclass(frozen=True, slots=True)
class Claim:
    """What a deployment may have of a pool: replicas of so many GPUs, one for each `target` of its requests."""

    name: str
    kind: Kind
    least: int
    most: int
    gpus: float
    target: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What it has been granted so far, and how many requests it has, those that wait among them."""

    claim: Claim
    current: int
    requests: float


@dataclass(frozen=True, slots=True)
class Waning:
    """A deployment that has wanted fewer replicas than it has for a while; `peak` is the most that it wanted since."""

    since: float
    peak: int


@dataclass(frozen=True, slots=True)
class Pool:
    """GPUs of one machine, and who shares them."""

    gpus: float
    claims: tuple[Claim, ...]
    down_seconds: float = 60.0  # for which a deployment must want less before it gets less

    def claim(self, name: str) -> Claim | None:
        """What the deployment of this name may have."""
        return next((claim for claim in self.claims if claim.name == name), None)


def divide(
    gpus: float, demands: Sequence[Demand], waning: Mapping[str, Waning], now: float, down_seconds: float,
    is_pressed: bool = False,
) -> tuple[dict[str, int], dict[str, Waning]]:  # fmt: skip
    """How many replicas each is to have, by name, and who wants fewer than it has, to be given to the next call.

    Together they never take more than there is; where not even all leasts fit, later ones go without.
    """
    wishes = {one.claim.name: _wish(one, waning.get(one.claim.name), now, down_seconds, is_pressed) for one in demands}
    ordered = sorted(demands, key=lambda one: KINDS.index(one.claim.kind))
    granted = _Granted(gpus)
    for one in ordered:
        granted.raise_to(one.claim, one.claim.least)
    for kind in KINDS:
        peers = [one for one in ordered if one.claim.kind == kind]
        for one in peers:
            granted.raise_to(one.claim, min(one.current, wishes[one.claim.name].wants))
        granted.share({one.claim: wishes[one.claim.name].wants for one in peers})
        for one in peers:
            granted.raise_to(one.claim, wishes[one.claim.name].keeps)
    return granted.replicas, {name: wish.waning for name, wish in wishes.items() if wish.waning}


@dataclass(frozen=True, slots=True)
class _Wish:
    """`wants` is by its requests; `keeps`, never less, is what it would not give up yet."""

    wants: int
    keeps: int
    waning: Waning | None = None


def _wish(demand: Demand, waned: Waning | None, now: float, down_seconds: float, is_pressed: bool) -> _Wish:
    claim = demand.claim
    if is_pressed and claim.kind != "chat":
        return _Wish(claim.least, claim.least)
    wants = max(claim.least, min(ceil(demand.requests / claim.target), claim.most))
    keeps = min(demand.current, claim.most)
    if wants >= keeps:
        return _Wish(wants, wants)
    waning = Waning(waned.since, max(waned.peak, wants)) if waned else Waning(now, wants)
    if now - waning.since < down_seconds:
        return _Wish(wants, keeps, waning)
    return _Wish(wants, waning.peak, Waning(now, wants) if wants < waning.peak else None)


class _Granted:
    """What has been given out of a pool, counted in whole grains so that no sum is a hair over."""

    def __init__(self, gpus: float) -> None:
        self.replicas: dict[str, int] = {}
        self._left = round(gpus * GRAINS)

    def raise_to(self, claim: Claim, replicas: int) -> None:
        """As far as there is room; never less than it has."""
        has, size = self.replicas.setdefault(claim.name, 0), _size(claim)
        more = max(0, min(replicas - has, self._left // size if size else replicas))
        self.replicas[claim.name] += more
        self._left -= more * size

    def share(self, wants: Mapping[Claim, int]) -> None:
        """One by one, each time to who has the smallest part of what it wants."""
        while True:
            open_ = [
                claim for claim, want in wants.items()
                if self.replicas[claim.name] < want and _size(claim) <= self._left
            ]  # fmt: skip
            if not open_:
                return
            poorest = min(open_, key=lambda claim: self.replicas[claim.name] / wants[claim])
            self.raise_to(poorest, self.replicas[poorest.name] + 1)


def _size(claim: Claim) -> int:
    return round(claim.gpus * GRAINS)


class Shares:
    """The division of one pool, for deployments that come one after another and each say what they want.

    Nobody's number changes before all have come, or had the time to.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._heard: dict[str, tuple[float, Demand]] = {}
        self._waning: dict[str, Waning] = {}
        self._began = inf

    def ask(self, name: str, current: int, requests: float, now: float, is_pressed: bool = False) -> int:
        """How many replicas a deployment of the pool is to have. The clock of `now`, in seconds, never goes back."""
        claims = {claim.name: claim for claim in self._pool.claims}
        self._began = min(self._began, now)
        self._heard[name] = now, Demand(claims[name], current, requests)
        known = {name: demand for name, (at, demand) in self._heard.items() if now - at < SILENT_SECONDS}
        if len(known) < len(claims) and now - self._began < SILENT_SECONDS:
            return current
        demands = [known.get(name) or Demand(claim, claim.least, 0.0) for name, claim in claims.items()]
        targets, self._waning = divide(self._pool.gpus, demands, self._waning, now, self._pool.down_seconds, is_pressed)
        return targets[name]


@cache
def shares_of(pool: Pool) -> Shares:
    """The division of this pool that all of one process have in common."""
    return Shares(pool)
