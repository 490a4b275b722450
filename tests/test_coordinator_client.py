"""What a client of the coordinator can rely on, with one voter, with three, and with too few of them."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.catalog import (
    ANSWERS_KEPT,
    SESSION_SECONDS,
    Compacted,
    CompareAndSet,
    Event,
    LeaseGone,
    Put,
    SessionExpired,
    encode,
)
from cluster.client import ATTEMPT_SECONDS, Client, Doubtful, Elsewhere
from cluster.raft import Members, Role
from nexus.errors import NotFound, Unavailable
from tests.voting import CLIENTS, EVENTS_KEPT, Cluster, cluster, run, until, world


def calls(whole: Cluster, method: str) -> list[tuple[int, tuple[Any, ...]]]:
    return [(id, arguments) for id, name, arguments in whole.network.calls if name == method]


def followers(whole: Cluster) -> list[int]:
    return [id for id in whole.ids if id != whole.leader()]


# The whole of it


@pytest.mark.parametrize("size", [1, 3])
def test_it_keeps_what_it_is_given(size: int, tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, size) as whole:
            client = whole.client()
            assert await client.get("a") is None
            assert await client.put("a", b"1") == 1
            assert await client.get("a") == (b"1", 1)
            assert await client.compare_and_set("a", 0, b"x") is None
            assert await client.compare_and_set("a", 1, b"2") == 2
            assert await client.compare_and_set("b", 0, b"3") == 3
            assert await client.range("") == [("a", b"2", 2), ("b", b"3", 3)]
            assert await client.delete("a") is True
            assert await client.delete("a") is False
            assert [(one.id, one.members.voters) for one in await client.status()] == [
                (id, frozenset(whole.ids)) for id in whole.ids
            ]
            assert (await client.snapshot()).data == whole.catalog(whole.leader()).snapshot()

    run(main)


# Finding the leader


def test_a_hint_leads_to_the_leader(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            client._leader = followers(whole)[0]
            begun = world().time()
            await client.put("a", b"1")
            assert [id for id, _ in calls(whole, "execute")][:2] == [followers(whole)[0], whole.leader()]
            assert world().time() - begun < 0.1  # no pause, and no other voter in between
            whole.network.calls.clear()
            await client.put("a", b"2")
            assert [id for id, *_ in whole.network.calls] == [whole.leader()]

    run(main)


def test_the_next_leader_is_found(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"1")
            before = whole.leader()
            await whole.kill(before)
            assert await client.put("a", b"2") == 2
            assert whole.leader() != before
            await client.put("a", b"3")
            whole.network.calls.clear()
            await client.put("a", b"4")
            assert [id for id, *_ in whole.network.calls] == [whole.leader()]

    run(main)


def test_leadership_is_handed_over_on_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client, to = whole.client(), followers(whole)[0]
            await client.transfer(to)
            assert whole.leader() == to
            assert (await client.leader()).role is Role.LEADER
            with pytest.raises(NotFound):
                await client.transfer(9)

    run(main)


# Together


@pytest.mark.parametrize("seed", range(3))
def test_a_leader_that_was_just_elected_takes_a_change_of_members(seed: int, tmp_path: Path) -> None:
    """As soon as it may: until it has committed in its own term it would have to refuse."""

    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"1")
            await whole.kill(whole.leader())
            while not whole.leader():
                await asyncio.sleep(0.0001)
            members = Members(frozenset(whole.ids), frozenset({9}))
            assert await whole.processes[whole.leader()].answer("change", members) == ""
            assert (await client.leader()).members == members

    run(main, seed)


def test_what_is_asked_together_is_one_call(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"")  # opens the session, finds the leader
            whole.network.calls.clear()
            revisions = await asyncio.gather(*(client.put(f"{number}", b"") for number in range(64)))
            assert sorted(revisions) == list(range(2, 66))
            assert len(calls(whole, "execute")) == 1
            await asyncio.gather(*(client.get(f"{number}") for number in range(64)))
            assert len(calls(whole, "read")) == 1

    run(main)


def test_what_comes_during_calls_waits_for_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"")
            whole.network.calls.clear()

            async def write(number: int) -> None:
                await asyncio.sleep(number * 0.0001)
                await client.put(f"{number}", b"")

            await asyncio.gather(*(write(number) for number in range(64)))
            assert 2 <= len(calls(whole, "execute")) < 20

    run(main)


class Faulty:
    """Voters that fail as nobody foresaw."""

    def ids(self) -> list[int]:
        return [1]

    async def call(self, *_: object) -> object:
        raise ValueError("a fault")


@pytest.mark.parametrize("ask", [lambda client: client.get("a"), lambda client: client.put("a", b"")])
def test_a_fault_is_told_to_all_who_wait(ask: Callable[[Client], Awaitable[object]]) -> None:
    """As what it is: a thread or a task that is told that it was cancelled ends without a word."""

    async def main() -> None:
        client = Client(Faulty())
        told = await asyncio.gather(*(ask(client) for _ in range(3)), return_exceptions=True)
        assert [str(one) for one in told] == ["a fault"] * 3

    run(main)


def test_who_stops_waiting_disturbs_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"")
            whole.network.calls.clear()
            writes = [asyncio.create_task(client.put(f"{number}", b"")) for number in range(10)]
            await asyncio.sleep(0)
            writes[0].cancel()  # before it is sent
            await until(lambda: calls(whole, "execute"))
            writes[1].cancel()
            writes[9].cancel()  # afterwards
            told = await asyncio.gather(*writes, return_exceptions=True)
            assert [isinstance(one, asyncio.CancelledError) for one in told] == [
                number in (0, 1, 9) for number in range(10)
            ]
            assert all(isinstance(one, int) for one in told[2:9])
            assert await client.get("0") is None
            assert await client.get("1")  # it was sent already
            assert await client.put("a", b"after") > 1

    run(main)


# Once


@pytest.mark.parametrize("dies", [False, True])
def test_what_is_asked_again_takes_effect_once(dies: bool, tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"1")
            lost: list[int] = []

            def lose_one(id: int, method: str) -> bool:
                if method != "execute" or lost:
                    return False
                lost.append(id)
                if dies:
                    whole.processes[id].die()
                return True

            whole.network.loses_answer = lose_one
            assert await client.compare_and_set("a", 1, b"2") == 2  # executed again it would lose against itself
            assert lost
            assert len(calls(whole, "execute")) >= 4  # the session, the put, and two tries
            last = [arguments for _, arguments in calls(whole, "execute")[-2:]]
            assert dies or last[0] == last[1]

    run(main)


def test_the_same_words_sent_to_two_leaders_take_effect_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            session = await client._open_session()
            entry = encode(CompareAndSet("a", 0, b"1"), session, 1, 1)
            ask = client._voters.call
            first = await ask(whole.leader(), "execute", [entry])
            await client.transfer(followers(whole)[0])
            for _ in range(2):
                assert await ask(whole.leader(), "execute", [entry]) == first
            for id in whole.ids:  # also after a snapshot, and a restart from it
                await whole.processes[id].answer("snapshot")
            await whole.lose_power()
            await until(whole.leader)
            await whole.level()
            assert await ask(whole.leader(), "execute", [entry]) == first
            assert (await client.get("a")) == (b"1", 1)

    run(main)


def test_a_session_that_expired_is_renewed_silently(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as whole:
            client = whole.client()
            await client.put("a", b"1")
            before = await client._open_session()
            forget_session(whole, before)
            assert await client.put("a", b"2") == 2
            assert await client._open_session() != before

    run(main)


def test_a_session_whose_opening_was_cancelled_is_opened_by_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as whole:
            client = whole.client()
            opening = asyncio.ensure_future(client._open_session())
            await asyncio.sleep(0)
            assert client._session is not None
            client._session.cancel()  # as with the request that began it
            with pytest.raises(asyncio.CancelledError):
                await opening
            assert await client.put("a", b"1") == 1

    run(main)


def test_in_doubt_an_expired_session_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as whole:
            client = whole.client()
            await client.put("a", b"1")
            before = await client._open_session()

            def lose_and_forget(id: int, method: str) -> bool:
                if method != "execute" or before not in whole.catalog(1)._sessions:
                    return False
                forget_session(whole, before)
                return True

            whole.network.loses_answer = lose_and_forget
            with pytest.raises(Unavailable, match="look whether it was done"):
                await client.put("a", b"2")
            assert await client.get("a") == (b"2", 2)
            assert await client.put("a", b"3") == 3  # in a new session

    run(main)


def forget_session(whole: Cluster, session: int) -> None:
    """As an hour of clock entries would."""
    del whole.catalog(1)._sessions[session]


def test_a_session_expires_after_an_hour_without_use(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as whole:
            client = whole.client()
            await client.put("a", b"1")
            session = await client._open_session()
            await asyncio.sleep(SESSION_SECONDS - 1)
            assert session in whole.catalog(1)._sessions
            await asyncio.sleep(5)
            assert session not in whole.catalog(1)._sessions
            assert await client.put("a", b"2") == 2

    run(main)


def test_a_call_that_is_stuck_is_not_left_behind(tmp_path: Path) -> None:
    """While one call waits for its lost answer, others go on; they do not push its sequence numbers out of memory."""

    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"")
            whole.network.cuts.add((CLIENTS, whole.leader()))
            stuck = asyncio.create_task(client.put("stuck", b""))
            await asyncio.sleep(0.01)
            whole.network.heal()
            others = [asyncio.create_task(write_on(client, number)) for number in range(100)]
            assert await stuck > 0
            await asyncio.gather(*others)
            assert await client.get("stuck")

    run(main)


async def write_on(client: Client, name: int) -> None:
    for number in range(2 * ANSWERS_KEPT // 100):
        await client.put(f"{name}/{number}", b"")


# Watching


def test_a_watch_sees_every_change_once_in_order(tmp_path: Path) -> None:
    """Across changes of leader, kills and lost answers."""

    async def main() -> None:
        async with cluster(tmp_path) as whole:
            writer, watcher = whole.client(), whole.client()
            told: list[Event] = []

            async def watch() -> None:
                async for event in watcher.watch("w/", 1):
                    told.append(event)

            watching = asyncio.create_task(watch())
            expected = []
            for number in range(60):
                key = f"w/{number % 7}"
                expected.append(Event(await writer.put(key, b"%d" % number), key, b"%d" % number))
                await writer.put("other", b"")
                if number % 10 == 5:
                    await writer.delete(key)
                    expected.append(Event(expected[-1].revision + 2, key, None))
                if number % 15 == 7:
                    killed = whole.leader()
                    await whole.kill(killed)
                    await until(whole.leader)
                    await whole.start(killed)
                if number % 15 == 14:
                    await writer.transfer(followers(whole)[0])
            await until(lambda: len(told) >= len(expected))
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            assert told == expected
            resumed = []
            async with aclosing(whole.client().watch("w/", expected[30].revision + 1)) as events:
                async for event in events:
                    resumed.append(event)
                    if event == expected[-1]:
                        break
            assert resumed == expected[31:]

    run(main)


def test_a_watch_begins_where_the_catalog_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"before")
            await whole.level()
            async with aclosing(client.watch("")) as events:
                first = asyncio.ensure_future(anext(events))
                await asyncio.sleep(1)
                await client.put("a", b"after")
                assert (await first).value == b"after"

    run(main)


def test_a_watch_goes_on_where_the_others_are(tmp_path: Path) -> None:
    """A voter that was cut off hears of nothing, and whoever watches there moves on."""

    async def main() -> None:
        async with cluster(tmp_path) as whole:
            writer, watcher = whole.client(), whole.client()
            await watcher.put("a", b"1")
            async with aclosing(watcher.watch("w/", 1)) as events:
                first = asyncio.ensure_future(anext(events))
                await asyncio.sleep(1)
                whole.network.isolate(whole.leader(), whole.ids)
                await asyncio.sleep(3)
                await writer.put("w/1", b"")
                assert (await asyncio.wait_for(first, 60)).key == "w/1"

    run(main)


def test_a_watch_from_too_long_ago_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            for _ in range(EVENTS_KEPT + 10):
                await client.put("a", b"")
            with pytest.raises(Compacted) as refused:
                await anext(client.watch("", 3))
            assert refused.value.first == 11
            assert (await anext(client.watch("", 11))).revision == 11

    run(main)


# Leases


@pytest.mark.parametrize("changes", [False, True])
def test_a_lease_lives_as_long_as_promised_and_hardly_longer(changes: bool, tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            lease = await client.grant(10)
            await client.put("leased", b"", lease)
            granted = world().time()
            if changes:
                await asyncio.sleep(5)
                await client.transfer(followers(whole)[0])
            while await client.get("leased"):
                await asyncio.sleep(0.1)
            assert 10 <= world().time() - granted < (17 if changes else 12)  # its first leader's time is not counted
            with pytest.raises(LeaseGone):
                await client.put("leased", b"", lease)
            assert await client.revoke(lease) is False

    run(main)


def test_a_lease_ends_by_entries_and_never_by_a_voters_own_clock(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            lease = await client.grant(1)
            await client.put("leased", b"", lease)
            for id in followers(whole):
                await whole.kill(id)
            await asyncio.sleep(100)
            assert await client.get("leased", fresh=False)

    run(main)


def test_time_in_which_the_voters_stood_still_ends_no_lease(tmp_path: Path) -> None:
    """Who kept it alive could not be heard."""

    async def main() -> None:
        async with cluster(tmp_path, 1) as whole:
            client = whole.client()
            lease = await client.grant(10)
            await client.put("leased", b"", lease)
            for _ in range(3):
                await asyncio.sleep(3)
                await client.keep_alive(lease)
                whole.processes[1].suspend()
                await asyncio.sleep(3)
                kept = asyncio.create_task(client.keep_alive(lease))
                await asyncio.sleep(11)
                whole.processes[1].resume()
                await kept
            assert await client.get("leased")

    run(main)


def test_a_lease_that_is_kept_alive_stays(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            lease = await client.grant(3)
            await client.put("leased", b"", lease)
            for _ in range(20):
                await asyncio.sleep(2)
                await client.keep_alive(lease)
            assert await client.get("leased")
            assert await client.revoke(lease) is True
            assert await client.get("leased") is None
            with pytest.raises(LeaseGone):
                await client.keep_alive(lease)

    run(main)


# Too few


def test_without_a_majority_one_can_look_and_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client(patience_seconds=5)
            await client.put("a", b"1")
            await whole.level()
            for id in followers(whole):
                await whole.kill(id)
            begun = world().time()
            for asked in (client.put("a", b"2"), client.get("a"), client.range("")):
                with pytest.raises(Unavailable, match="read-only: 1 of 3 voters"):
                    await asked
            assert 15 <= world().time() - begun < 15 + 9 * ATTEMPT_SECONDS
            assert await client.get("a", fresh=False) == (b"1", 1)
            assert await client.range("", fresh=False) == [("a", b"1", 1)]
            assert [str(one) for one in await client.describe()].count("voter 1 does not answer") <= 1
            await whole.kill(next(iter(whole.processes)))
            with pytest.raises(Unavailable, match="away: 0 of 3 voters"):
                await client.get("a", fresh=False)
            for id in whole.ids:
                await whole.start(id)
            assert await client.put("a", b"3") >= 2

    run(main)


def test_a_suspended_voter_is_passed_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"1")
            suspended = whole.leader()
            whole.processes[suspended].suspend()
            await until(lambda: whole.leader() != suspended)
            assert await client.put("a", b"2") == 2
            whole.processes[suspended].resume()
            assert await client._voters.call(suspended, "read", []) in ([], Doubtful(), Elsewhere(whole.leader()))
            await whole.level()

    run(main)


def test_a_leader_that_was_suspended_does_not_answer_from_the_past(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client()
            await client.put("a", b"1")
            suspended = whole.leader()
            whole.processes[suspended].suspend()
            await until(lambda: whole.leader() != suspended)
            await client.put("a", b"2")
            old = whole.client()
            old._leader = suspended
            read = asyncio.create_task(old.get("a"))
            await asyncio.sleep(0.1)
            whole.processes[suspended].resume()
            assert await read == (b"2", 2)

    run(main)


def test_refusals_are_the_catalogs_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as whole:
            client = whole.client()
            (answer,) = await client._voters.call(1, "execute", [encode(Put("a", b""), 99, 1, 1)])
            assert SessionExpired.__name__.encode() in answer
            with pytest.raises(LeaseGone):
                await client.put("a", b"", lease=99)

    run(main)


def test_a_voter_that_cannot_read_an_entry_stops(tmp_path: Path) -> None:
    """Another version wrote it; to go on as if nothing were, without its loop, would be to look alive."""

    async def main() -> None:
        async with cluster(tmp_path) as whole:
            client = whole.client(patience_seconds=3)
            await client.put("a", b"1")
            with suppress(Unavailable, ConnectionError):
                await client._voters.call(whole.leader(), "execute", [b"of another version"])
            await asyncio.sleep(5)
            assert not any(process.is_alive for process in whole.processes.values())

    run(main)
