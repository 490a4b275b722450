"""Answers come first: while the first tokens of chats take nearly as long as they may, bulk work gives way to them."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

from nexus import telemetry

WINDOW_SECONDS = 30.0  # so long a first token counts
KEPT = 200  # of them at most
PERCENTILE = 0.95
PAUSE_SECONDS = 0.5  # between two looks whether it still has to wait


class FirstTokens:
    """The seconds to the first token of the latest chats, and whether they near the limit that is set for them."""

    def __init__(self, limit: float, near: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`near` is the fraction of the limit, in seconds, from which on it is near."""
        self.limit = limit
        self._alarm = limit * near
        self._clock = clock
        self._latest: deque[tuple[float, float]] = deque(maxlen=KEPT)

    def note(self, seconds: float) -> None:
        """A first token came after so many seconds, just now."""
        self._latest.append((self._clock(), seconds))

    def slow_seconds(self) -> float:
        """What all but a twentieth of the latest first tokens came within; 0 where there are none."""
        oldest = self._clock() - WINDOW_SECONDS
        latest = sorted(seconds for at, seconds in self._latest if at > oldest)
        return latest[ceil(PERCENTILE * len(latest)) - 1] if latest else 0.0

    def are_near_limit(self) -> bool:
        return self.slow_seconds() >= self._alarm


@dataclass(frozen=True, slots=True)
class Yielding:
    """How bulk work gives way: each of its batches waits while there is pressure, but no longer than it may.

    So there is always some progress. `is_pressed` says at once what was known last, in any thread.
    """

    is_pressed: Callable[[], bool]
    longest_seconds: float
    clock: Callable[[], float] = time.monotonic

    def pauses(self) -> Iterator[float]:
        """Seconds to sleep, again and again; with the last one the batch may begin."""
        ends = self.clock() + self.longest_seconds
        while self.is_pressed() and (left := ends - self.clock()) > 0:
            pause = min(left, PAUSE_SECONDS)
            yield pause
            telemetry.ingest_yielded.inc(pause)


def never() -> bool:
    """What says of pressure that there is none."""
    return False


UNYIELDING = Yielding(never, 0.0)
