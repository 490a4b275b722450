"""What was counted a while ago, so that a report can speak of the last minutes, across all replicas.

Samples are of the requests of the head's machine, where every front door is, and a front door keeps its own: for the
time before it began it knows nothing.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf, isinf

from prometheus_client.core import Metric

from nexus import telemetry

STEP_SECONDS, KEPT_SECONDS = 10.0, 3600.0
PROBES = frozenset({"livez", "readyz", "healthz", "metrics"})  # routes that no person waits for


@dataclass(frozen=True, slots=True)
class Sums:
    """Requests so far by status, their seconds, and how many took at most so long (by seconds)."""

    at: float
    statuses: Counter[str]
    seconds: float
    within: Mapping[float, float]

    @property
    def requests(self) -> int:
        return int(sum(self.statuses.values()))

    @property
    def errors(self) -> int:
        """Those that were answered with 500 and more."""
        return int(sum(count for status, count in self.statuses.items() if status[:1] == "5"))

    def since(self, before: "Sums") -> "Sums":
        """Only what came after."""
        within = {bound: value - before.within.get(bound, 0) for bound, value in self.within.items()}
        return Sums(self.at, self.statuses - before.statuses, self.seconds - before.seconds, within)

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of the requests did not exceed, as Prometheus' histogram_quantile has it.

        None where there were none, and where it is more than the largest bound.
        """
        total, low, below = self.within.get(inf, 0.0), 0.0, 0.0
        for bound, value in sorted(self.within.items()) if total else ():
            if value >= share * total:
                return None if isinf(bound) else low + (bound - low) * (share * total - below) / (value - below or 1)
            low, below = bound, value
        return None


def sums_of(counted: Iterable[Metric], at: float) -> Sums:
    """Of all requests but probes."""
    statuses, within, seconds = Counter[str](), Counter[float](), 0.0
    for family in counted:
        for sample in family.samples:
            if sample.labels.get("route") in PROBES:
                continue
            if sample.name == "http_requests_total":
                statuses[sample.labels["status"]] += int(sample.value)
            elif sample.name == "http_response_duration_seconds_sum":
                seconds += sample.value
            elif sample.name == "http_response_duration_seconds_bucket":
                within[float(sample.labels["le"])] += sample.value
    return Sums(at, statuses, seconds, within)


class History:
    """Samples of the last hour, in the order of time. All of it belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[Sums] = deque()

    async def keep(self) -> None:
        """For ever, a sample every STEP_SECONDS."""
        while True:
            await self.look()
            await asyncio.sleep(STEP_SECONDS)

    async def look(self) -> Sums:
        """A sample as of now."""
        sums = sums_of(await asyncio.to_thread(telemetry.families), self._clock())
        self._samples.append(sums)
        while len(self._samples) > 1 and self._samples[1].at <= sums.at - KEPT_SECONDS:
            self._samples.popleft()
        return sums

    async def last(self, seconds: float) -> tuple[Sums, float]:
        """What was counted within the last so many seconds, or since the first sample; and how long that was."""
        now = await self.look()
        before = [one for one in self._samples if one.at <= now.at - seconds]
        first = before[-1] if before else self._samples[0]
        return now.since(first), now.at - first.at
