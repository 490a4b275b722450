"""How it is seen that chats wait too long, how everybody hears of it, and how long bulk work gives way."""

import asyncio
import pickle
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from actors import pressure, stations
from actors.pressure import PRESSURE, Pressure, Watch
from actors.stations import Embed, Run, Task, outcomes
from cluster.catalog import LeaseGone
from nexus import pressure as module
from nexus.config import Config, Scaling
from nexus.embedders import Embedders
from nexus.errors import Unavailable
from nexus.ingest import Prepared
from nexus.jobs import Outcome
from nexus.ports import LiveIndex
from nexus.pressure import UNYIELDING, WINDOW_SECONDS, FirstTokens, Yielding
from nexus.types import Vectors
from tests.conftest import ALICE

LIMIT = 2.0
NEAR = 0.8  # 1.6 s


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(clock: Clock) -> FirstTokens:
    return FirstTokens(LIMIT, NEAR, clock)


# ── what is measured ────────────────────────────────────────────────────────────────────────────


def test_before_anybody_chats_there_is_no_pressure(tokens: FirstTokens) -> None:
    assert (tokens.slow_seconds(), tokens.are_near_limit()) == (0.0, False)


@pytest.mark.parametrize(("seconds", "is_near"), [(1.59, False), (1.6, True), (5.0, True)])
def test_it_begins_near_the_limit_and_not_only_beyond_it(tokens: FirstTokens, seconds: float, is_near: bool) -> None:
    tokens.note(seconds)
    assert (tokens.slow_seconds(), tokens.are_near_limit()) == (seconds, is_near)


def test_one_slow_answer_of_twenty_is_none_and_two_are(tokens: FirstTokens) -> None:
    for seconds in (*[0.1] * 19, 9.0):
        tokens.note(seconds)
    assert not tokens.are_near_limit()
    tokens.note(9.0)
    assert (tokens.slow_seconds(), tokens.are_near_limit()) == (9.0, True)


def test_what_was_slow_a_while_ago_does_not_count(tokens: FirstTokens, clock: Clock) -> None:
    tokens.note(9.0)
    clock.now = WINDOW_SECONDS - 0.1
    tokens.note(0.1)
    assert tokens.are_near_limit()
    clock.now = WINDOW_SECONDS
    assert (tokens.slow_seconds(), tokens.are_near_limit()) == (0.1, False)


# ── how long a batch waits ──────────────────────────────────────────────────────────────────────


def waited(yielding: Yielding, clock: Clock) -> float:
    """For how long a batch waits that sleeps as it is told."""
    began = clock.now
    for pause in yielding.pauses():
        clock.now += pause
    return clock.now - began


def test_without_pressure_nothing_waits(clock: Clock) -> None:
    assert list(Yielding(lambda: False, 5.0, clock).pauses()) == list(UNYIELDING.pauses()) == []


def test_under_pressure_each_batch_waits_for_as_long_as_it_may(clock: Clock) -> None:
    yielding = Yielding(lambda: True, 5.2, clock)
    before = seconds_yielded()
    assert [waited(yielding, clock) for _ in range(3)] == pytest.approx([5.2] * 3)
    assert seconds_yielded() - before == pytest.approx(3 * 5.2)


def test_a_batch_goes_on_once_pressure_ends(clock: Clock) -> None:
    assert waited(Yielding(lambda: clock.now < 1.2, 60.0, clock), clock) == pytest.approx(1.5)


def seconds_yielded() -> float:
    value = module.telemetry.ingest_yielded._value.get()
    assert isinstance(value, float)
    return value


# ── saying so, and hearing it ───────────────────────────────────────────────────────────────────


class Voters:
    """In place of a client of theirs: keys, each for as long as its lease is not gone."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[bytes, int]] = {}
        self.leases: set[int] = set()
        self.granted = self.connected = 0
        self.are_away = False

    async def connect(self) -> "Voters":
        self._answer()
        self.connected += 1
        return self

    def _answer(self, lease: int | None = None) -> None:
        if self.are_away:
            raise Unavailable("the voters are away")
        if lease is not None and lease not in self.leases:
            raise LeaseGone

    async def grant(self, _: float) -> int:
        self._answer()
        self.granted += 1
        self.leases.add(self.granted)
        return self.granted

    async def keep_alive(self, lease: int) -> None:
        self._answer(lease)

    async def put(self, key: str, value: bytes, lease: int) -> None:
        self._answer(lease)
        self.keys[key] = (value, lease)

    async def revoke(self, lease: int) -> None:
        self._answer()
        self.end(lease)

    def end(self, lease: int) -> None:
        self.leases.discard(lease)
        self.keys = {key: held for key, held in self.keys.items() if held[1] != lease}

    async def range(self, prefix: str, fresh: bool = True) -> list[tuple[str, bytes, int]]:
        assert not fresh  # which any voter can answer, quorum or not
        self._answer()
        return [(key, *held) for key, held in self.keys.items() if key.startswith(prefix)]


@pytest.fixture
def voters(monkeypatch: pytest.MonkeyPatch) -> Voters:
    monkeypatch.setattr(pressure, "SAY_SECONDS", 0.001)
    monkeypatch.setattr(pressure, "LOOK_SECONDS", 0.001)
    return Voters()


async def until(is_so: Callable[[], bool]) -> None:
    """Look again and again; the test's own timeout ends it."""
    while not is_so():
        await asyncio.sleep(0)


def saying(voters: Voters, tokens: FirstTokens, story: Callable[[Pressure], Awaitable[None]]) -> None:
    async def run() -> None:
        gateway = Pressure(tokens, voters.connect)  # type: ignore[arg-type]
        try:
            await story(gateway)
        finally:
            await gateway.close()

    asyncio.run(run())


def test_while_all_is_well_nothing_is_asked_of_the_voters(voters: Voters, tokens: FirstTokens) -> None:
    async def story(gateway: Pressure) -> None:
        for _ in range(100):
            gateway.note(0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    saying(voters, tokens, story)
    assert voters.connected == 0


def test_it_is_said_under_a_lease_for_as_long_as_it_is_so(voters: Voters, tokens: FirstTokens, clock: Clock) -> None:
    async def story(gateway: Pressure) -> None:
        gateway.note(1.7)
        await until(lambda: bool(voters.keys))
        ((key, (said, lease)),) = voters.keys.items()
        assert key.startswith(PRESSURE) and lease in voters.leases
        assert (said, voters.granted) == (b'{"seconds": 1.7, "limit": 2.0}', 1)
        gateway.note(1.9)
        await until(lambda: voters.keys[key][0] == b'{"seconds": 1.9, "limit": 2.0}')
        clock.now = WINDOW_SECONDS
        await until(lambda: not voters.leases)
        assert not voters.keys
        gateway.note(1.8)
        await until(lambda: bool(voters.keys))
        assert voters.granted == 2

    saying(voters, tokens, story)


def test_who_lost_its_lease_takes_another(voters: Voters, tokens: FirstTokens) -> None:
    async def story(gateway: Pressure) -> None:
        gateway.note(1.7)
        await until(lambda: bool(voters.keys))
        voters.end(1)
        await until(lambda: bool(voters.keys))
        assert voters.leases == {2}

    saying(voters, tokens, story)


def test_voters_that_are_away_are_told_once_they_are_back(voters: Voters, tokens: FirstTokens, clock: Clock) -> None:
    """And that they are away when it ends, is no matter: the lease does."""
    voters.are_away = True

    async def story(gateway: Pressure) -> None:
        gateway.note(1.7)
        for _ in range(20):
            await asyncio.sleep(0)
        voters.are_away = False
        await until(lambda: bool(voters.keys))
        voters.are_away = True
        clock.now = WINDOW_SECONDS
        assert gateway._saying is not None
        await gateway._saying

    saying(voters, tokens, story)


def test_two_gateways_do_not_silence_each_other(voters: Voters, clock: Clock) -> None:
    both = [FirstTokens(LIMIT, NEAR, clock) for _ in range(2)]

    async def story() -> None:
        gateways = [Pressure(tokens, voters.connect) for tokens in both]  # type: ignore[arg-type]
        gateways[0].note(1.7)
        clock.now = WINDOW_SECONDS - 1
        gateways[1].note(1.7)
        await until(lambda: len(voters.keys) == 2)
        clock.now = WINDOW_SECONDS
        await until(lambda: len(voters.keys) == 1)
        assert both[1].are_near_limit()
        await gateways[1].close()

    asyncio.run(story())


@pytest.fixture
def watch(voters: Voters) -> Iterator[Watch]:
    with closing(Watch(voters.connect)) as watch:  # type: ignore[arg-type]
        yield watch


def test_everybody_hears_it_and_hears_when_it_ends(voters: Voters, watch: Watch) -> None:
    assert not watch()
    voters.keys = {f"{PRESSURE}a gateway": (b"{}", 1)}
    asyncio.run(until(watch))
    voters.keys = {"another key": (b"{}", 1)}
    asyncio.run(until(lambda: not watch()))
    assert voters.connected == 1


def test_who_asks_does_not_wait_for_voters_that_do_not_answer(watch: Watch, voters: Voters) -> None:
    answers = threading.Event()

    async def connect() -> Voters:
        await asyncio.to_thread(answers.wait)
        return voters

    watch._connect = connect  # type: ignore[assignment]
    voters.keys = {f"{PRESSURE}a gateway": (b"{}", 1)}
    assert [watch(), watch()] == [False, False]
    answers.set()
    asyncio.run(until(watch))


def test_while_the_voters_are_away_there_is_no_pressure(watch: Watch, voters: Voters) -> None:
    """Bulk work does not give way to nobody knows what; and it is known again once they are back."""
    voters.keys = {f"{PRESSURE}a gateway": (b"{}", 1)}
    asyncio.run(until(watch))
    voters.are_away = True
    asyncio.run(until(lambda: not watch()))
    voters.are_away = False
    asyncio.run(until(watch))


def test_who_stopped_looking_looks_again(watch: Watch, voters: Voters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ended it, it does not say for ever what it saw last."""
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    voters.keys = {f"{PRESSURE}a gateway": (b"{}", 1)}
    asyncio.run(until(watch))
    first, hear = watch._looking, voters.range
    assert first is not None

    async def fail(*_: object, **__: object) -> None:
        raise OSError("a fault that nobody foresaw")

    voters.range = fail  # type: ignore[method-assign, assignment]
    first.join()
    assert not watch._is_pressed
    voters.range = hear  # type: ignore[method-assign]
    asyncio.run(until(watch))
    assert watch._looking is not first


# ── who gives way ───────────────────────────────────────────────────────────────────────────────


def test_without_a_limit_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Watch:
        raise AssertionError

    monkeypatch.setattr(pressure, "watch", never)
    assert pressure.yielding(Scaling()) is UNYIELDING


def test_with_a_limit_it_is_known_before_the_first_batch(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    monkeypatch.setattr(pressure, "watch", lambda: watch)
    yielding = pressure.yielding(Scaling(first_token_seconds=2.0, yield_seconds=7.0))
    assert (yielding.is_pressed, yielding.longest_seconds) == (watch, 7.0)
    assert watch._looking is not None


def test_a_station_gives_way_before_each_batch(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps for as long as it may before it embeds anything, and hands on what it cannot work on."""
    slept: list[float] = []
    embedded_after: list[float] = []

    class Model:
        fingerprint = "eight"

        def embed(self, texts: Sequence[str]) -> Vectors:
            embedded_after.append(sum(slept))
            return np.eye(len(texts), 8, dtype=np.float32)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(stations, "give_way", lambda: None)
    monkeypatch.setattr(stations, "of_config", lambda *_, **__: Embedders(lambda address, fingerprint: Model()))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(stations, "yielding", lambda scaling: Yielding(lambda: True, scaling.yield_seconds, clock))
    monkeypatch.setattr(stations.time, "sleep", sleep)
    config = Config(home=tmp_path, scaling=Scaling(first_token_seconds=1.0, yield_seconds=3.0))
    own = LiveIndex("index", "eight", "eight:", 8)
    station = Embed(Run(config, "", "eight", 8, own, ALICE, "default", 0))
    document = Prepared(None, ALICE, 0, (), ("one", "two"), False)  # type: ignore[arg-type]
    failed = Outcome("job", 1, "failed", "parse")
    batch = pyarrow.table(
        {"payload": [pickle.dumps(one) for one in ((Task("job", 0, "", "a.md", 3), document), failed)]}
    )
    for _ in range(2):
        (_, _, staged), passed_on = outcomes(station(batch))  # type: ignore[misc]
        assert (staged.texts, passed_on) == (("one", "two"), failed)
    assert embedded_after == [3.0, 6.0]
