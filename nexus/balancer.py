"""Which model answers: latency, throughput and accuracy, weighted.

A member is one backend of a model. Each has live figures: seconds to the first token, tokens per second, share of
requests that went well (moving averages), and how many it works on. What a request expects of a member is its
first token's seconds times one more than what it works on; each part of a score is a member's ratio to the best
candidate's, so a score is in [0, 1]. Who was never asked is asked first. What is known of a member that is not
asked fades towards the best, so that one bad hour is not for ever.

A member that yields no token is ejected: while another can answer it is not asked, only probed, and it is back
when a probe passes. A request is tried at most twice, the second time elsewhere where there is an elsewhere, and
never after something of it was sent.

Members of one name may be on several machines. A request of a session for that name goes to the member that the
session's key ranks highest (rendezvous hashing), whose cache knows the session's beginning: who comes or goes moves
only its own sessions. Where that member works on far more than the least busy one, the scores decide as for all
others. All of this belongs to one event loop.
"""

import asyncio
import time
from asyncio import CancelledError
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import exp2
from typing import Literal

from nexus.background import begin_in_background
from nexus.errors import CallerError, InvalidRequest, NexusError, NotFound, Overloaded, Unavailable, UpstreamInvalid
from nexus.limits import spender
from nexus.ports import Generator
from nexus.tracing import generated
from nexus.types import Delta, Prompt, digest

AUTO = "auto"
MODELS_ASKED: ContextVar[list[str] | None] = ContextVar("models_asked", default=None)  # if a request keeps a list
SMOOTHING = 0.2  # of a moving average: what the latest sample weighs
HALF_LIFE_SECONDS = 300.0  # of what is known of a member that is not asked
MOST_HALVINGS = 20.0
LEAST_SECONDS = 1e-6  # to a first token, so that ratios exist
PROBE_LIMIT_SECONDS = 30.0
KEPT_CHOICES = 50
NAMES_LISTED = 20
MOST_WEIGHT = 1_000_000
MOST_LOAD = 2  # times what the least busy member works on, and
SPARE_LOAD = 4  # so many more: then a session is served elsewhere

RETRIED = (Unavailable, Overloaded, UpstreamInvalid)


def always() -> bool:
    return True


Outcome = Literal["running", "finished", "failed", "overloaded", "refused", "left"]


@dataclass(frozen=True, slots=True)
class Member:
    """One backend of the model `generator.name`; `accuracy`, in [0, 1], is what an evaluation said of it.

    One that is not `in_auto` answers by its name, and for "auto" only where there is no other. `place` is its machine,
    in a cluster; there it is asked once it has passed its check and, if it is not planned, only while no other can be.
    """

    generator: Generator
    accuracy: float
    in_auto: bool = True
    place: str = ""
    is_planned: Callable[[], bool] = always


@dataclass(frozen=True, slots=True)
class Weights:
    """What counts in a choice, each from 0 to MOST_WEIGHT; only proportions matter. Raises InvalidRequest."""

    latency: float
    throughput: float
    accuracy: float

    def __post_init__(self) -> None:
        for name, value in (("latency", self.latency), ("throughput", self.throughput), ("accuracy", self.accuracy)):
            if not 0 <= value <= MOST_WEIGHT:
                raise InvalidRequest(f"the weight of {name} must be a number from 0 to {MOST_WEIGHT}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a member scored in one choice, every part in [0, 1]. `member` is its place in the report's members."""

    member: int
    name: str
    place: str
    latency: float
    throughput: float
    accuracy: float
    success_rate: float
    score: float


@dataclass(frozen=True, slots=True)
class Choice:
    """One attempt: who was asked for, who could, who was taken, and what became of it. `at` is in clock seconds.

    `retried` says that it is the second attempt of its request, `by_session` that its session decided.
    """

    at: float
    asked: str
    weights: Weights
    candidates: tuple[Candidate, ...]
    chosen: str
    member: int
    retried: bool
    by_session: bool
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class MemberReport:
    """A member's live figures; None where nothing was measured yet. `ejected_since` is in clock seconds.

    `failures` are those of its `requests` that it should have answered and did not, overloads among them.
    """

    name: str
    place: str
    accuracy: float
    in_flight: int
    first_token_seconds: float | None
    tokens_per_second: float | None
    success_rate: float
    ejected_since: float | None
    requests: int
    failures: int


@dataclass(frozen=True, slots=True)
class Report:
    """All members, and the last choices, oldest first. `now` is the clock's, so now - at is how long ago."""

    now: float
    members: tuple[MemberReport, ...]
    choices: tuple[Choice, ...]


class Balancer:
    """Members by name, their live figures, and the generators that choose among them."""

    def __init__(
        self, members: Sequence[Member], default_weights: Weights, probe_seconds: float,
        clock: Callable[[], float] = time.monotonic, note: Callable[[float], None] = lambda seconds: None,
    ) -> None:  # fmt: skip
        """`probe_seconds` is the least time between attempts to readmit one member; the clock is in seconds.

        `note` is told how long each request waited for its first token, those that waited in vain too.
        """
        each = enumerate(zip(members, _identities(members), strict=True))
        self._backends = tuple(_Backend(place, member, identity, clock()) for place, (member, identity) in each)
        self.default_weights = default_weights
        self._probe_seconds = probe_seconds
        self._clock = clock
        self._note = note
        self._attempts: deque[_Attempt] = deque(maxlen=KEPT_CHOICES)
        self._probes: set[asyncio.Task[bool]] = set()
        self._closed = False

    def names(self) -> tuple[str, ...]:
        """The models, each once, in the order of the members."""
        return tuple(dict.fromkeys(backend.name for backend in self._backends))

    def generator(self, model: str, weights: Weights | None = None) -> "Balanced":
        """A generator that chooses for each request: of this name's members, or for "auto" of all that are in it.

        Raises NotFound for any other name.
        """
        backends = tuple(one for one in self._backends if one.name == model)
        if model == AUTO:
            backends = tuple(one for one in self._backends if one.in_auto) or self._backends
        if not backends:
            names = self.names()
            more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
            raise NotFound(
                f"there is no model {model[:128]!r}; ask for one of {', '.join((AUTO, *names[:NAMES_LISTED]))}{more}",
                pointer="/model",
                code="model_not_found",
            )
        return Balanced(self, model, backends, weights or self.default_weights)

    def report(self) -> Report:
        """What is known now. It holds nothing of any prompt."""
        return Report(
            self._clock(),
            tuple(backend.report() for backend in self._backends),
            tuple(attempt.report() for attempt in self._attempts),
        )

    async def close(self) -> None:
        """End what probes are running. Requests go on; no probe starts any more."""
        self._closed = True
        running = tuple(self._probes)
        for probe in running:
            probe.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _choose(self, asked: "Balanced", prompt: Prompt, failed: "_Backend | None" = None) -> "_Attempt":
        """Whom to ask, after `failed` has failed where that is given. Raises InvalidRequest where nobody can."""
        pictured = any(message.images for message in prompt.messages)
        able = [backend for backend in asked._backends if backend.generator.sees_images or not pictured]
        if not able:
            raise InvalidRequest(
                f"the request holds pictures, and no vision model is configured behind {asked.name!r}: ask for a"
                " model that takes them, or have `images: true` set for one in `models.served`",
                pointer="/messages",
                code="images_not_supported",
            )
        planned = [backend for backend in able if backend.is_planned()] or able
        healthy = _healthy(planned) or _healthy(able)
        pools = (
            [one for one in healthy if one is not failed],
            healthy,
            [one for one in planned if one is not failed],
            planned,
        )
        pool = next(pool for pool in pools if pool)
        now = self._clock()
        candidates = _rank(pool, asked._weights, now)
        home = None if asked.name == AUTO else _home(pool, prompt)
        chosen = home or self._backends[candidates[0].member]
        if chosen.ejected_since is not None:
            chosen.attempted = now  # the request is its probe
        for backend in planned:
            if backend is not chosen and self._take_probe(backend):
                self._start_probe(backend)
        attempt = _Attempt(now, asked.name, asked._weights, candidates, chosen, failed is not None, home is not None)
        self._attempts.append(attempt)
        if (models := MODELS_ASKED.get()) is not None:
            models.append(chosen.name)
        return attempt

    async def _meet(self, asked: "Balanced") -> None:
        """Where nobody is known to answer, return once one of those that were never heard of does, or none will."""
        strangers = [backend for backend in asked._backends if not backend.is_met and backend.is_planned()]
        while not _healthy(asked._backends):
            for backend in strangers:
                if not backend.is_met and self._take_probe(backend):
                    self._start_probe(backend)
            meetings = [one.probing for one in strangers if one.probing and not one.probing.done()]
            if not meetings:
                return
            await asyncio.wait(meetings, return_when=asyncio.FIRST_COMPLETED)

    async def _ask(self, attempt: "_Attempt", prompt: Prompt) -> AsyncGenerator[Delta]:
        """The chosen member's deltas, measured. Its failures are counted and passed on, a timeout as Unavailable."""
        backend = attempt.backend
        meter = _Meter(self._clock())
        spend = spender()
        stream = generated(backend.name, backend.machine, prompt, backend.generator.stream(prompt))
        async with aclosing(stream) as deltas:
            backend.begin()
            try:
                async for delta in deltas:
                    if meter.note(delta, self._clock()):
                        backend.answer(meter.last - meter.started, meter.last)
                        self._note(meter.last - meter.started)
                    yield delta
                if not meter.finished:
                    raise UpstreamInvalid(f"the model {backend.name!r} stopped without saying why; see its own log")
                backend.succeed(meter.tokens_per_second(), self._clock())
                attempt.outcome = "finished"
            except CallerError:
                attempt.outcome = "refused"
                raise
            except Overloaded:
                attempt.outcome = "overloaded"
                backend.fail(self._clock())
                raise
            except (Unavailable, UpstreamInvalid):
                self._eject(attempt)
                raise
            except TimeoutError:
                self._eject(attempt)
                raise Unavailable(f"the model {backend.name!r} did not answer in time; try again") from None
            except (GeneratorExit, CancelledError):
                attempt.outcome = "left"
                raise
            except Exception:
                attempt.outcome = "failed"
                backend.fail(self._clock())
                raise
            finally:
                backend.in_flight -= 1
                spend(meter.tokens)
                if meter.first is None and attempt.outcome in ("left", "failed"):
                    self._note(self._clock() - meter.started)

    def _eject(self, attempt: "_Attempt") -> None:
        attempt.outcome = "failed"
        now = self._clock()
        attempt.backend.fail(now)
        attempt.backend.eject(now)

    def _take_probe(self, backend: "_Backend") -> bool:
        """Whether this ejected member is to be probed now; whoever is told so has to do it."""
        now = self._clock()
        is_due = backend.ejected_since is not None and now - backend.attempted >= self._probe_seconds
        if self._closed or backend.is_probed or not is_due:
            return False
        backend.attempted = now
        backend.is_probed = True
        return True

    def _start_probe(self, backend: "_Backend") -> None:
        backend.probing = probe = begin_in_background(self._probe(backend))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, backend: "_Backend") -> bool:
        """Whether the member passes its own check, which readmits it."""
        try:
            if not await backend.passes_check():
                return False
        finally:
            backend.is_probed, backend.is_met = False, True
        backend.ejected_since = None
        return True


class Balanced:
    """A Generator that chooses one of several for each request. Made by Balancer.generator."""

    def __init__(self, balancer: Balancer, name: str, backends: Sequence["_Backend"], weights: Weights) -> None:
        self.name = name
        self.sees_images = any(backend.generator.sees_images for backend in backends)
        self._backends = backends
        self._weights = weights if name == AUTO else Weights(weights.latency, weights.throughput, 0.0)
        self._balancer = balancer

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        """The deltas of one member; of a second one where the first failed before it yielded any.

        Raises what the last one raised, and InvalidRequest for pictures where none takes them.
        """
        await self._balancer._meet(self)
        attempt = self._balancer._choose(self, prompt)
        is_sent = False
        try:
            async with aclosing(self._balancer._ask(attempt, prompt)) as deltas:
                async for delta in deltas:
                    is_sent = True
                    yield delta
            return
        except RETRIED:
            if is_sent:
                raise
        again = self._balancer._choose(self, prompt, attempt.backend)
        async with aclosing(self._balancer._ask(again, prompt)) as deltas:
            async for delta in deltas:
                yield delta

    async def complete(self, prompt: Prompt) -> list[Delta]:
        """All deltas of one generation, for who needs them whole: a second member is asked even after some came."""
        await self._balancer._meet(self)
        attempt = self._balancer._choose(self, prompt)
        try:
            return await self._collect(attempt, prompt)
        except RETRIED:
            pass
        return await self._collect(self._balancer._choose(self, prompt, attempt.backend), prompt)

    async def _collect(self, attempt: "_Attempt", prompt: Prompt) -> list[Delta]:
        async with aclosing(self._balancer._ask(attempt, prompt)) as deltas:
            return [delta async for delta in deltas]

    async def check(self) -> None:
        """Return if one member passes its check, else raise Unavailable. An ejected one is asked when it is due."""
        for backend in sorted(self._backends, key=lambda backend: backend.ejected_since is not None):
            if backend.ejected_since is None:
                passes = await backend.passes_check()
            else:
                passes = self._balancer._take_probe(backend) and await self._balancer._probe(backend)
            if passes:
                return
        raise Unavailable(f"no backend of the model {self.name!r} answers; see /report, and try again")


class _Backend:
    """A member and what is known of it."""

    def __init__(self, place: int, member: Member, identity: str, now: float) -> None:
        self.place = place
        self.identity = identity
        self.generator = member.generator
        self.name = member.generator.name
        self.accuracy = member.accuracy
        self.in_auto = member.in_auto
        self.machine = member.place
        self.is_planned = member.is_planned
        self.is_met = not member.place  # on a machine elsewhere it may not be there yet
        self.in_flight = 0
        self.requests = 0
        self.failures = 0
        self.first_token_seconds: float | None = None
        self.tokens_per_second: float | None = None
        self.success_rate = 1.0
        self.sampled = 0.0  # when it last answered or failed
        self.ejected_since: float | None = None if self.is_met else now
        self.attempted = float("-inf")  # when it was last tried since it is ejected
        self.is_probed = False
        self.probing: asyncio.Task[bool] | None = None  # the last one

    def begin(self) -> None:
        self.requests += 1
        self.in_flight += 1

    def answer(self, seconds: float, now: float) -> None:
        """A first token came after so many seconds, which is as good as a probe."""
        self.first_token_seconds = _smooth(self.first_token_seconds, seconds)
        self.ejected_since = None
        self.sampled = now

    def succeed(self, tokens_per_second: float | None, now: float) -> None:
        if tokens_per_second is not None:
            self.tokens_per_second = _smooth(self.tokens_per_second, tokens_per_second)
        self.success_rate = _smooth(self.success_rate, 1.0)
        self.sampled = now

    def fail(self, now: float) -> None:
        self.failures += 1
        self.success_rate = _smooth(self.success_rate, 0.0)
        self.sampled = now

    def eject(self, now: float) -> None:
        if self.ejected_since is None:
            self.ejected_since = now
        self.attempted = now

    async def passes_check(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_LIMIT_SECONDS):
                await self.generator.check()
        except (NexusError, OSError):  # TimeoutError is one
            return False
        return True

    def fading(self, now: float) -> float:
        """What is left, in (0, 1], of the difference between this member and a perfect one."""
        return exp2(-min((now - self.sampled) / HALF_LIFE_SECONDS, MOST_HALVINGS))

    def report(self) -> MemberReport:
        return MemberReport(
            self.name, self.machine, self.accuracy, self.in_flight, self.first_token_seconds,
            self.tokens_per_second, self.success_rate, self.ejected_since, self.requests, self.failures,
        )  # fmt: skip


@dataclass(slots=True)
class _Attempt:
    """A choice whose outcome is still to come."""

    at: float
    asked: str
    weights: Weights
    candidates: tuple[Candidate, ...]
    backend: _Backend
    retried: bool
    by_session: bool
    outcome: Outcome = field(default="running")

    def report(self) -> Choice:
        return Choice(
            self.at, self.asked, self.weights, self.candidates, self.backend.name, self.backend.place,
            self.retried, self.by_session, self.outcome,
        )  # fmt: skip


@dataclass(slots=True)
class _Meter:
    """What is measured of one generation: when its deltas came, and how many tokens they were."""

    started: float
    first: float | None = None
    last: float = 0.0
    pieces: int = 0
    counted: int | None = None
    finished: bool = False

    def note(self, delta: Delta, now: float) -> bool:
        """Take in one delta; True for the first."""
        is_first = self.first is None
        if is_first:
            self.first = now
        self.last = now
        self.pieces += bool(delta.text or delta.beside)
        self.counted = delta.usage.completion if delta.usage else self.counted
        self.finished = self.finished or delta.finish_reason is not None
        return is_first

    @property
    def tokens(self) -> int:
        """A backend that does not count them gives one with each delta."""
        return self.pieces if self.counted is None else self.counted

    def tokens_per_second(self) -> float | None:
        """After the first one."""
        if self.first is None or self.tokens < 2 or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)


def _smooth(average: float | None, sample: float) -> float:
    return sample if average is None else average + SMOOTHING * (sample - average)


def _healthy(backends: Sequence[_Backend]) -> list[_Backend]:
    return [backend for backend in backends if backend.ejected_since is None]


def _identities(members: Sequence[Member]) -> Iterator[str]:
    """What tells each from the others of its name: its machine, so that those may come and go, and there its order."""
    counts = Counter[tuple[str, str]]()
    for member in members:
        alike = (member.generator.name, member.place)
        yield digest(*alike, str(counts[alike]))
        counts[alike] += 1


def _home(backends: Sequence[_Backend], prompt: Prompt) -> _Backend | None:
    """Whose cache knows the session of a request; None where it has none, or where that member has far more to do."""
    if not prompt.session or len(backends) == 1:
        return None
    home = max(backends, key=lambda one: digest(one.identity, prompt.tenant, prompt.session))
    least = min(one.in_flight for one in backends)
    return home if home.in_flight <= MOST_LOAD * least + SPARE_LOAD else None


def _rank(backends: Sequence[_Backend], weights: Weights, now: float) -> tuple[Candidate, ...]:
    """The members as candidates, the one to ask first. Equal ones go by load, then by their order."""
    pairs = [(one, one.fading(now)) for one in backends]
    waits = [one.first_token_seconds * fading for one, fading in pairs if one.first_token_seconds is not None]
    rates = [one.tokens_per_second / fading for one, fading in pairs if one.tokens_per_second is not None]
    best_wait, best_rate = min(waits, default=1.0), max(rates, default=1.0)

    def expected(one: _Backend, fading: float) -> float:
        wait = best_wait if one.first_token_seconds is None else one.first_token_seconds * fading
        return max(wait, LEAST_SECONDS) * (1 + one.in_flight)

    soonest = min(expected(one, fading) for one, fading in pairs)
    most_accurate = max(one.accuracy for one in backends)
    total = weights.latency + weights.throughput + weights.accuracy
    scored: list[tuple[tuple[bool, float, int, int], Candidate]] = []
    for one, fading in pairs:
        latency = soonest / expected(one, fading)
        throughput = 1.0 if one.tokens_per_second is None else one.tokens_per_second / fading / best_rate
        accuracy = one.accuracy / most_accurate if most_accurate else 0.0
        success = 1 - (1 - one.success_rate) * fading
        parts = weights.latency * latency + weights.throughput * throughput + weights.accuracy * accuracy
        score = parts / total * success if total else 0.0
        is_news = one.requests == 0 and weights.latency + weights.throughput > 0
        candidate = Candidate(one.place, one.name, one.machine, latency, throughput, accuracy, success, score)
        scored.append(((not is_news, -score, one.in_flight, one.place), candidate))
    return tuple(candidate for _, candidate in sorted(scored, key=lambda pair: pair[0]))
