"""How a process asks the voters from its threads, with voters that are played."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict

import pytest

from actors import coordination
from actors.coordination import COLLECTIONS, WORKERS, Coordination
from cluster.catalog import LeaseGone
from nexus.ports import LiveIndex

LIVE, NEXT = LiveIndex("index 1", "model"), LiveIndex("index 2", "model")
ASKING = 8


def shown(live: LiveIndex) -> bytes:
    return json.dumps(asdict(live)).encode()


class Voters:
    """In place of a client of theirs: they keep what they are given, for as long as its lease is not gone."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[bytes, int]] = {f"{COLLECTIONS}manuals": (shown(LIVE), 0)}
        self.leases: set[int] = set()
        self.granted = self.looks = 0
        self.before_put: Callable[[int], None] = lambda lease: None
        self.all_look = asyncio.Event()

    async def grant(self, _: float) -> int:
        self.granted += 1
        self.leases.add(self.granted)
        return self.granted

    async def put(self, key: str, value: bytes, lease: int) -> int:
        self.before_put(lease)
        if lease not in self.leases:
            raise LeaseGone
        self.keys[key] = (value, lease)
        return 1

    async def keep_alive(self, lease: int) -> None:
        if lease not in self.leases:
            raise LeaseGone

    async def get(self, key: str, fresh: bool = True) -> tuple[bytes, int] | None:
        assert not fresh
        return self.keys.get(key)

    async def range(self, prefix: str, fresh: bool = True) -> list[tuple[str, bytes, int]]:
        if not fresh:
            self.looks += 1
            if self.looks >= ASKING:
                self.all_look.set()
            await self.all_look.wait()
        return [(key, *held) for key, held in self.keys.items() if key.startswith(prefix)]


@pytest.fixture
def voters() -> Voters:
    return Voters()


@pytest.fixture
def asking(voters: Voters) -> Iterator[Coordination]:
    async def connect() -> Voters:
        return voters

    with closing(Coordination(connect)) as asking:
        yield asking


def test_a_worker_whose_lease_ends_while_it_takes_it_takes_another(asking: Coordination, voters: Voters) -> None:
    """Stopped between the two words that it takes, it does not fail: nobody who asks it to stay expects that."""
    voters.before_put = lambda lease: voters.leases.discard(1)
    asking.stay("one")
    assert voters.keys[f"{WORKERS}one"] == (b"", 2)
    asking.stay("one")
    voters.leases.clear()
    asking.stay("one")
    assert (voters.keys[f"{WORKERS}one"], voters.granted) == ((b"", 3), 3)


def test_many_who_ask_first_begin_to_look_once(asking: Coordination) -> None:
    with ThreadPoolExecutor(ASKING) as threads:
        assert list(threads.map(asking.live_index, ["manuals"] * ASKING)) == [LIVE] * ASKING
    assert asyncio.all_tasks(asking._loop) == {asking._looking}


def test_who_stopped_looking_looks_again(asking: Coordination, voters: Voters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ended it: what was live once is not shown for ever."""
    monkeypatch.setattr(coordination, "LOOK_SECONDS", 0.01)
    voters.all_look.set()
    assert asking.live_index("manuals") == LIVE
    looking = asking._looking
    assert looking is not None
    voters.keys[f"{COLLECTIONS}manuals"] = (b'{"of": "another version"}', 0)
    while not looking.done():
        pass  # the test's own timeout ends it
    with pytest.raises(TypeError):
        asking.live_index("manuals")
    voters.keys[f"{COLLECTIONS}manuals"] = (shown(NEXT), 0)
    assert asking.live_index("manuals") == NEXT
    assert asking._looking is not looking and not asking._looking.done()


def test_who_peeks_never_waits_and_sees_what_any_voter_had(
    asking: Coordination, voters: Voters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordination, "LOOK_SECONDS", 0.01)
    voters.keys["placement"] = (b"one", 0)
    assert asking.peek("placement") is None, "nobody has been asked, for all voters are waiting"
    asking._loop.call_soon_threadsafe(voters.all_look.set)
    for value in (b"one", b"two", None):
        while asking.peek("placement") != value:
            pass  # the test's own timeout ends it
        voters.keys["placement"] = (b"two", 0)
        if value == b"two":
            del voters.keys["placement"]


def test_who_peeked_looks_again_after_looking_ended(
    asking: Coordination, voters: Voters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordination, "LOOK_SECONDS", 0.01)
    asking._loop.call_soon_threadsafe(voters.all_look.set)
    voters.keys["placement"], fine = (b"one", 0), voters.keys[f"{COLLECTIONS}manuals"]
    while asking.peek("placement") is None:
        pass  # the test's own timeout ends it
    looking = asking._looking
    assert looking is not None
    voters.keys[f"{COLLECTIONS}manuals"] = (b'{"of": "another version"}', 0)
    while not looking.done():
        pass
    voters.keys |= {f"{COLLECTIONS}manuals": fine, "placement": (b"two", 0)}
    while asking.peek("placement") != b"two":
        pass
