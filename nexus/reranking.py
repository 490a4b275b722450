"""Hits in a better order, when a reranker gives one in time; in the order they were fused in, when not.

Only what may be shown comes here, and only the best of it: a reranker reads each text together with
the query, which costs a thousand times what a cosine does. A reranker can make an order worse as well
as better, so whoever configures one should have measured it, and each search may do without.

A reranker that failed several times in a row is left alone for a while: no search waits for it then.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np

from nexus import telemetry
from nexus.chunking import embedded_text
from nexus.errors import CallerError, NexusError, Overloaded, UpstreamInvalid
from nexus.ports import Reranker
from nexus.types import Hit, Piece, RouteScore, Vector

# Query, texts and the seconds there are -> one score for each text. Raises TimeoutError after them.
Score = Callable[[str, Sequence[str], float], Vector]

MOST_FAILURES = 3  # in a row, after which the reranker is left alone
REST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Reranked:
    """The hits in their order; `why` says in words why they are in it, `fallback` in one if the reranker failed."""

    hits: list[Hit]
    applied: bool
    why: str
    fallback: str | None = None


@dataclass
class Reranking:
    """One reranker for searches: how many hits it is shown and how long it may take. Safe for several threads."""

    name: str
    score: Score
    candidates: int = 30
    seconds: float = 0.5
    clock: Callable[[], float] = time.monotonic
    _failures: int = field(default=0, init=False)
    _rests_until: float | None = field(default=None, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    def order(self, query: str, hits: Sequence[Hit]) -> Reranked:
        """The best `candidates` of the hits by what the reranker says of them, the others after them as they were.

        A hit keeps its fused score; `routes["rerank"]` has its new rank and the reranker's score. Ties stay in
        the order given. Whatever the reranker fails with, the order given is the answer.
        """
        best, rest = list(hits[: self.candidates]), list(hits[self.candidates :])
        if not best:
            return Reranked([], False, "nothing was found")
        if self._rests():
            return self._fall_back(
                hits, "resting", f"{self.name} failed {MOST_FAILURES} times in a row and is left alone"
            )
        texts = [embedded_text(hit.title, Piece(hit.text, hit.heading)) for hit in best]
        try:
            scores = check_scores(self.score(query, texts, self.seconds), len(texts))
        except TimeoutError:
            self._note_failure()
            return self._fall_back(hits, "timeout", f"{self.name} took more than {self.seconds:g} seconds")
        except NexusError as error:
            self._note_failure()
            return self._fall_back(hits, _reason(error), f"{self.name}: {error.message}")
        self._note_success()
        ranked = [(best[i], float(scores[i])) for i in best_first(scores)]
        reranked = [
            replace(hit, routes={**hit.routes, "rerank": RouteScore(rank, score)})
            for rank, (hit, score) in enumerate(ranked, 1)
        ]
        return Reranked([*reranked, *rest], True, f"{self.name} ordered the best {len(best)}")

    def _fall_back(self, hits: Sequence[Hit], reason: str, why: str) -> Reranked:
        telemetry.rerank_fallbacks.labels(reason).inc()
        return Reranked(list(hits), False, why, reason)

    def _rests(self) -> bool:
        with self._lock:
            return self._rests_until is not None and self.clock() < self._rests_until

    def _note_failure(self) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= MOST_FAILURES:  # after a rest, one more failure is enough
                self._rests_until = self.clock() + REST_SECONDS

    def _note_success(self) -> None:
        with self._lock:
            self._failures, self._rests_until = 0, None


def in_threads(reranker: Reranker, threads: Executor) -> Score:
    """A reranker of this process as searches use it: in a thread, which none of them waits for too long."""

    def score(query: str, texts: Sequence[str], seconds: float) -> Vector:
        asked = threads.submit(reranker.rerank, query, texts)
        try:
            return asked.result(seconds)
        finally:
            asked.cancel()  # what has not begun by now is for nobody

    return score


def check_scores(scores: object, count: int) -> Vector:
    """Scores as a reranker owes them: shape (count,), each in [0, 1]. Raises UpstreamInvalid."""
    try:
        found = np.asarray(scores, dtype=np.float32)
    except (TypeError, ValueError):
        raise UpstreamInvalid("the reranker answered something else than numbers") from None
    if found.shape != (count,):
        raise UpstreamInvalid(f"the reranker gave scores of shape {found.shape} for {count} texts")
    if not ((found >= 0) & (found <= 1)).all():  # false for NaN
        raise UpstreamInvalid("the reranker gave a score that is not between 0 and 1")
    return found


def best_first(scores: Vector) -> list[int]:
    """The places of the scores, the highest score first; of equal ones, the first."""
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


def _reason(error: NexusError) -> str:
    match error:
        case Overloaded():
            return "overloaded"
        case UpstreamInvalid():
            return "invalid"
        case CallerError():
            return "refused"
    return "unavailable"
