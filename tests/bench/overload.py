"""Ten times what a Nexus can do, and one key that asks far too much: what the others notice of it.

    python -m tests.bench.overload                starts two of its own, takes about three minutes
    python -m tests.bench.overload --seconds 60   the overload as long as the acceptance asks for

First the capacity is measured: searches a second with few askers, each of whom waits for the answer. Then ten times
as many come, by several keys, on a clock that does not wait for answers. Every answer is 200, or 503 with Retry-After;
anything else is counted as `broken`. Goodput is what is answered with 200 and within the patience of an asker.
Whatever a refusal costs the server, and this program, is missing elsewhere where cores are few. So a flood of as many
requests that need no thought (`/livez`) shows what is possible beside it, and `kept` is the goodput over that. After
the overload single searches go on, until they take again what they took before: that is the recovery. Last, a steady
asker is timed alone, and beside one key that asks ten times the capacity: once where each key has a quota, once not.
"""

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import argparse
import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median

import aiohttp

from tests.bench.corpus import Judged, scifact
from tests.bench.quality import COLLECTION, PACKAGES, ingest
from tests.running import Running, running_nexus

DOCUMENTS = 300
TIMES = 10  # of the capacity
ASKERS = 8  # at once, when the capacity is measured
KEYS = 4
SECONDS_EACH = 10.0
PATIENCE_SECONDS = 5.0  # an answer that comes later is none
STEADY_SHARE = 0.2  # of the capacity: what the others ask beside the abusive key
NORMAL = 1.5  # times what a search took before, and the service is as it was
GIVEN_UP_SECONDS = 30.0


@dataclass
class Seen:
    """What became of some requests: when each was answered, with what, and after how many seconds."""

    answers: list[tuple[float, int, float]] = field(default_factory=list)

    def seconds(self, status: int = 200) -> list[float]:
        return [seconds for _, one, seconds in self.answers if one == status]

    def good(self) -> int:
        return sum(seconds <= PATIENCE_SECONDS for seconds in self.seconds())

    def share(self, *statuses: int) -> float:
        return sum(one in statuses for _, one, _ in self.answers) / max(1, len(self.answers))


def goodput_ratio(seen: Seen, seconds: float, capacity: float) -> float:
    """Good answers a second during the overload, over the capacity."""
    return seen.good() / seconds / capacity


def recovery_seconds(after: Sequence[tuple[float, float]], before: float) -> float:
    """From the end of the overload until searches take again what they took before; (begun at, seconds) of each."""
    slow = [begun + seconds for begun, seconds in after if seconds > NORMAL * before]
    return max(slow, default=0.0)


def slowdown(alone: Sequence[float], beside: Sequence[float]) -> float:
    """How much longer the others wait, as a share: 0.1 is ten per cent."""
    return median(beside) / median(alone) - 1


class Askers:
    """Searches of several keys over one pool of connections."""

    def __init__(self, nexus: Running, keys: Sequence[str], session: aiohttp.ClientSession) -> None:
        self._url, self._session = f"{nexus.url}/rag/search", session
        self._keys = itertools.cycle(keys)
        self._queries = itertools.cycle(scifact().queries.values())

    async def ask(self, seen: Seen, due: float | None = None) -> None:
        """One search, timed from when it was due."""
        started = time.perf_counter() if due is None else due
        body = {"query": next(self._queries), "collection": COLLECTION}
        headers = {"authorization": f"Bearer {next(self._keys)}"}
        try:
            async with self._session.post(self._url, json=body, headers=headers) as answer:
                await answer.read()
                status = answer.status
                if status in (429, 503) and "retry-after" not in answer.headers:
                    status = 0
        except (aiohttp.ClientError, TimeoutError):
            status = 0
        ended = time.perf_counter()
        seen.answers.append((ended, status, ended - started))

    async def ask_at(self, rate: float, seconds: float) -> Seen:
        """So many a second, whether they are answered or not."""
        seen, asked = Seen(), set()
        begin = time.perf_counter()
        for number in range(int(rate * seconds)):
            due = begin + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self.ask(seen, due))
            asked.add(task)
            task.add_done_callback(asked.discard)
        if asked:
            await asyncio.wait(asked)
        return seen

    async def knock_at(self, rate: float, seconds: float) -> None:
        """So many requests a second that are answered without a thought."""
        url = f"{self._url.rsplit('/', 2)[0]}/livez"

        async def knock() -> None:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.get(url) as answer:
                    await answer.read()

        begin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
                group.create_task(knock())

    async def ask_in_turn(self, seconds: float, askers: int = 1) -> Seen:
        """So many askers, each of whom waits for the answer."""
        seen, end = Seen(), time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < end:
                await self.ask(seen)

        await asyncio.gather(*(one() for _ in range(askers)))
        return seen

    async def ask_until_normal(self, before: float) -> list[tuple[float, float]]:
        """One search after the other, each with its begin since now, until ten in a row take what they took before."""
        begin, after, in_a_row = time.perf_counter(), [], 0
        while in_a_row < 10 and time.perf_counter() - begin < GIVEN_UP_SECONDS:
            seen, at = Seen(), time.perf_counter() - begin
            await self.ask(seen)
            (_, status, seconds) = seen.answers[0]
            took = seconds if status == 200 else PATIENCE_SECONDS
            after.append((at, took))
            in_a_row = in_a_row + 1 if took <= NORMAL * before else 0
        return after


def new_keys(nexus: Running, number: int, prefix: str) -> list[str]:
    """Keys that may search."""
    made = [json.loads(nexus.must("key", "create", f"{prefix}-{n}", "--json")) for n in range(number)]
    return [one["key"] for one in made]


@contextmanager
def filled(**limits: str) -> Iterator[Running]:
    """A Nexus with documents to search in, and these limits."""
    variables = {f"NEXUS_LIMITS__{name.upper()}": value for name, value in limits.items()}
    with running_nexus(**variables) as nexus, nexus.http() as http:
        kept = dict(itertools.islice(scifact().documents.items(), DOCUMENTS))
        ingest(http, Judged(kept, {}, {}))
        yield nexus


def session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60))


async def flood(nexus: Running, seconds: float) -> dict[str, float]:
    """Ten times the capacity, and what comes after it."""
    async with session() as http:
        askers = Askers(nexus, new_keys(nexus, KEYS, "asker"), http)
        await askers.ask_in_turn(2.0, ASKERS)  # warm
        before = median((await askers.ask_in_turn(SECONDS_EACH)).seconds())
        capacity = (await askers.ask_in_turn(SECONDS_EACH, ASKERS)).good() / SECONDS_EACH
        beside, _ = await asyncio.gather(
            askers.ask_in_turn(SECONDS_EACH, ASKERS), askers.knock_at((TIMES - 1) * capacity, SECONDS_EACH)
        )
        possible = beside.good() / SECONDS_EACH / capacity
        seen = await askers.ask_at(TIMES * capacity, seconds)
        after = await askers.ask_until_normal(before)
    taken = seen.answers[-1][0] - min(at - spent for at, _, spent in seen.answers)
    statuses = Counter(status for _, status, _ in seen.answers)
    print(f"capacity {capacity:.0f} searches a second; answers in the overload: {dict(statuses)}")
    ratio = goodput_ratio(seen, taken, capacity)
    return {
        "capacity_per_second": capacity,
        "goodput_ratio": ratio,
        "possible_ratio": possible,
        "kept": ratio / possible,
        "shed_share": seen.share(503),
        "broken_share": 1 - seen.share(200, 503),
        "shed_ms_p50": 1000 * median(seen.seconds(503) or [0.0]),
        "recovery_seconds": recovery_seconds(after, before),
    }


async def abuse(nexus: Running, capacity: float) -> tuple[float, float]:
    """The slowdown of a steady asker by one abusive key, and the share of its answers that were no 200."""
    async with session() as http:
        good = Askers(nexus, new_keys(nexus, 1, "steady"), http)
        bad = Askers(nexus, new_keys(nexus, 1, "abusive"), http)
        await good.ask_in_turn(2.0, ASKERS)
        rate = STEADY_SHARE * capacity
        alone = await good.ask_at(rate, SECONDS_EACH)
        beside, _ = await asyncio.gather(good.ask_at(rate, SECONDS_EACH), bad.ask_at(TIMES * capacity, SECONDS_EACH))
    return slowdown(alone.seconds(), beside.seconds()), 1 - beside.share(200)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS_EACH, help="of the overload")
    seconds = parser.parse_args(arguments).seconds
    with filled() as nexus:
        figures = asyncio.run(flood(nexus, seconds))
        capacity = figures["capacity_per_second"]
        figures["slowdown_without_quota"], figures["refused_without_quota"] = asyncio.run(abuse(nexus, capacity))
    quota = max(1, int(60 * 2 * STEADY_SHARE * capacity))  # twice what the others ask
    with filled(requests_per_minute=str(quota), burst_seconds="2") as nexus:
        figures["slowdown_with_quota"], figures["refused_with_quota"] = asyncio.run(abuse(nexus, capacity))
    harness.print_table(["figure", "value"], list(figures.items()))
    harness.print_result("overload", figures, PACKAGES)


if __name__ == "__main__":
    main()
