"""One voter at a time: whoever waits is told, what is told is saved, and little is saved many times."""

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.raft import Entry, Members, Message, MessageType, NotLeader, ProposalDropped, Ready, Role, Saved, Snapshot
from cluster.raft.storage import Storage, StorageFailed
from cluster.voter import Pace, Unanswered, Voter, found
from tests.voting import run, until

ALONE, BOTH = Members(frozenset({1})), Members(frozenset({1, 2}))
PACE = Pace(tick_seconds=0.01, election_ticks=10, snapshot_entries=1_000_000)
REPLIES = {
    MessageType.PRE_VOTE: MessageType.PRE_VOTE_REPLY,
    MessageType.VOTE: MessageType.VOTE_REPLY,
    MessageType.HEARTBEAT: MessageType.HEARTBEAT_REPLY,
    MessageType.APPEND: MessageType.APPEND_REPLY,
}


class Diary:
    """A machine that remembers all it was given; an entry that it knows already is an error."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.last = 0

    def apply(self, index: int, command: bytes) -> bytes:
        assert index > self.last, f"{index} was applied twice"
        self.last = index
        if command:
            self.lines.append(command)
        return b"did " + command

    def snapshot(self) -> bytes:
        return b"\n".join([b"%d" % self.last, *self.lines])

    def restore(self, data: bytes) -> None:
        last, *self.lines = data.split(b"\n")
        self.last = int(last)


class Disk(Storage):
    """Counts its saves, and can be held up, or break."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "disk")
        self.saves = 0
        self.compactions: list[Snapshot] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_broken = False

    def save(self, ready: Ready) -> None:
        self._wait()
        self.saves += 1
        super().save(ready)

    def compact(self, snapshot: Snapshot) -> None:
        self._wait()
        self.compactions.append(snapshot)
        super().compact(snapshot)

    def _wait(self) -> None:
        assert self.may_go_on.wait(30)
        if self.is_broken:
            raise StorageFailed("broken")


class Peer:
    """The other voter, 2: it grants every vote and acknowledges every entry, as long as it is there."""

    def __init__(self) -> None:
        self.is_there = True
        self.silent: set[MessageType] = set()
        self.heard: list[Message] = []
        self.voter: Voter | None = None

    def send(self, messages: Sequence[Message]) -> None:
        self.heard += messages
        if self.is_there:
            replies = [self._reply(one) for one in messages if one.type in REPLIES and one.type not in self.silent]
            asyncio.get_running_loop().call_soon(self.voter.deliver, replies)

    def _reply(self, message: Message) -> Message:
        index = message.index + len(message.entries) if message.type is MessageType.APPEND else 0
        return Message(REPLIES[message.type], 1, 2, message.term, index, context=message.context)


def make(path: Path, members: Members, send: Callable[[Sequence[Message]], None], pace: Pace) -> tuple[Voter, Disk]:
    disk = Disk(path)
    if disk.load() is None:
        found(disk, members)
    disk.saves = 0
    return Voter(1, disk, Diary(), send, random.Random(1), pace), disk


@asynccontextmanager
async def alive(path: Path, members: Members = ALONE, pace: Pace = PACE, peer: Peer | None = None) -> Any:
    """A voter that runs, with its disk, until the block ends."""
    peer = peer or Peer()
    voter, disk = make(path, members, peer.send, pace)
    peer.voter = voter
    running = asyncio.create_task(voter.run())
    try:
        yield voter, disk, running
    finally:
        running.cancel()
        disk.may_go_on.set()
        with suppress(asyncio.CancelledError, ExceptionGroup):
            await running
        with suppress(StorageFailed):
            disk.close()


def leads_and_is_level(voter: Voter) -> bool:
    status = voter.status()
    return status.role is Role.LEADER and status.applied == status.last_index


async def leads(voter: Voter) -> None:
    await until(lambda: leads_and_is_level(voter))


def append(term: int, *entries: Entry, after: tuple[int, int] = (0, 0), commit: int = 0) -> Message:
    return Message(MessageType.APPEND, 1, 2, term, after[0], after[1], entries, commit)


# Proposals


def test_a_proposal_is_answered_by_the_machine(tmp_path: Path) -> None:
    async def main() -> None:
        async with alive(tmp_path) as (voter, _, _):
            await leads(voter)
            assert await voter.propose(b"it") == b"did it"

    run(main)


def test_a_follower_refuses_a_proposal_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with alive(tmp_path, BOTH) as (voter, _, _):
            voter.deliver([Message(MessageType.HEARTBEAT, 1, 2, term=1)])
            with pytest.raises(NotLeader) as refused:
                voter.propose(b"it")
            assert refused.value.leader == 2

    run(main)


def test_a_proposal_that_another_entry_replaced_was_not_done(tmp_path: Path) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, _, _):
            await leads(voter)
            peer.is_there = False
            before, asked = voter.status(), voter.propose(b"mine")
            await asyncio.sleep(0.02)  # it is saved, and was sent
            term = before.term + 1
            other = Entry(term, before.last_index + 1, b"theirs")
            voter.deliver([append(term, other, after=(before.last_index, before.term), commit=other.index)])
            with pytest.raises(NotLeader) as refused:
                await asked
            assert refused.value.leader == 2
            assert voter._machine.lines == [b"theirs"]

    run(main)


@pytest.mark.parametrize("is_told_of_another", [True, False])
def test_who_leads_no_more_cannot_tell_what_becomes_of_a_proposal(tmp_path: Path, is_told_of_another: bool) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, _, _):
            await leads(voter)
            peer.is_there = False
            asked = voter.propose(b"it")
            await asyncio.sleep(0)
            if is_told_of_another:
                voter.deliver([Message(MessageType.HEARTBEAT, 1, 2, voter.status().term + 1)])
            with pytest.raises(Unanswered):
                await asked

    run(main)


def test_nothing_is_proposed_while_leadership_is_handed_over(tmp_path: Path) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, _, _):
            await leads(voter)
            voter.transfer(2)
            with pytest.raises(ProposalDropped):
                voter.propose(b"it")
            await until(lambda: MessageType.TIMEOUT_NOW in {message.type for message in peer.heard})

    run(main)


def test_a_change_counts_when_it_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with alive(tmp_path) as (voter, _, _):
            await leads(voter)
            more = Members(frozenset({1}), frozenset({2}))
            await voter.change(more)
            assert voter.status().members == more

    run(main)


# Reads


def test_reads_of_one_turn_share_a_round(tmp_path: Path) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, _, _):
            await leads(voter)
            asked = voter._asked
            await asyncio.gather(*(voter.read() for _ in range(50)))
            assert voter._asked == asked + 1

    run(main)


def test_a_read_without_a_leader_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with alive(tmp_path, BOTH) as (voter, _, _):
            with pytest.raises(NotLeader):
                await voter.read()

    run(main)


def test_a_read_that_no_majority_confirms_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, _, _):
            await leads(voter)
            peer.silent = {MessageType.HEARTBEAT}
            begun = voter._ticks
            keeps_leading = asyncio.create_task(acknowledge_for_ever(voter))
            with pytest.raises(Unanswered):
                await voter.read()
            keeps_leading.cancel()
            assert voter.status().role is Role.LEADER
            assert voter._ticks - begun == 2 * PACE.election_ticks

    run(main)


async def acknowledge_for_ever(voter: Voter) -> None:
    """What its peer hears of it, but no heartbeat."""
    while True:
        status = voter.status()
        voter.deliver([Message(MessageType.APPEND_REPLY, 1, 2, status.term, status.commit)])
        await asyncio.sleep(PACE.tick_seconds)


def test_a_follower_answers_a_read_once_it_has_applied_enough(tmp_path: Path) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, _, _):
            voter.deliver([append(1, Entry(1, 1))])
            read = asyncio.create_task(voter.read())
            await until(lambda: peer.heard and peer.heard[-1].type is MessageType.READ_INDEX)
            context = peer.heard[-1].context
            voter.deliver([Message(MessageType.READ_INDEX_REPLY, 1, 2, 1, index=1, context=context)])
            await asyncio.sleep(PACE.tick_seconds / 2)
            assert not read.done()
            voter.deliver([append(1, after=(1, 1), commit=1)])
            await read
            assert voter.status().applied == 1

    run(main)


def test_a_read_that_is_confirmed_and_never_applied_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, _, _):
            peer.is_there = False
            voter.deliver([append(1, Entry(1, 1))])
            read = asyncio.create_task(voter.read())
            await until(lambda: peer.heard and peer.heard[-1].type is MessageType.READ_INDEX)
            context = peer.heard[-1].context
            voter.deliver([Message(MessageType.READ_INDEX_REPLY, 1, 2, 1, index=1, context=context)])
            with pytest.raises(Unanswered):
                await read

    run(main)


# Saving, in a real thread


def test_nothing_counts_before_it_is_saved(tmp_path: Path) -> None:
    async def main() -> None:
        async with alive(tmp_path) as (voter, disk, _):
            await real_leads(voter)
            disk.may_go_on.clear()
            asked, ticks = voter.propose(b"it"), voter._ticks
            await turns(lambda: voter._ticks > ticks + 3)
            assert not asked.done()
            assert voter._machine.lines == []
            disk.may_go_on.set()
            assert await asked == b"did it"

    asyncio.run(main())


def test_nothing_leaves_before_it_is_saved(tmp_path: Path) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, disk, _):
            disk.may_go_on.clear()
            voter.deliver([append(1, Entry(1, 1, b"it"))])
            ticks = voter._ticks
            await turns(lambda: voter._ticks > ticks + 3)
            assert peer.heard == []
            disk.may_go_on.set()
            await turns(lambda: peer.heard)
            assert (peer.heard[0].type, peer.heard[0].index) == (MessageType.APPEND_REPLY, 1)

    asyncio.run(main())


def test_many_proposals_are_saved_together(tmp_path: Path) -> None:
    async def main() -> None:
        async with alive(tmp_path) as (voter, disk, _):
            await real_leads(voter)
            disk.may_go_on.clear()
            before, ticks = disk.saves, voter._ticks
            asked = [voter.propose(b"first")]
            await turns(lambda: voter._ticks > ticks + 3)  # the first one is being saved
            asked += [voter.propose(b"%d" % number) for number in range(500)]
            disk.may_go_on.set()
            assert len(await asyncio.gather(*asked)) == 501
            assert disk.saves == before + 2

    asyncio.run(main())


def test_messages_arrive_while_a_save_is_under_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with alive(tmp_path, BOTH) as (voter, disk, _):
            disk.may_go_on.clear()
            voter.deliver([append(1, Entry(1, 1, b"1"), commit=1)])
            await turns(lambda: voter._ticks > 1)
            for index in range(2, 50):
                voter.deliver([append(1, Entry(1, index, b"%d" % index), after=(index - 1, 1), commit=index)])
            assert voter.status().last_index == 49
            disk.may_go_on.set()
            await turns(lambda: voter.status().applied == 49)
            assert disk.saves == 2
            assert voter._machine.lines == [b"%d" % index for index in range(1, 50)]

    asyncio.run(main())


async def real_leads(voter: Voter) -> None:
    await turns(lambda: leads_and_is_level(voter))


async def turns(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.001)


# Snapshots


def test_a_snapshot_under_load_is_the_machine_at_its_index(tmp_path: Path) -> None:
    pace = Pace(0.01, 10, snapshot_entries=7)

    async def main() -> None:
        async with alive(tmp_path, pace=pace) as (voter, disk, _):
            await leads(voter)
            for number in range(100):
                asked = [voter.propose(b"%d.%d" % (number, other)) for other in range(number % 5)]
                await asyncio.gather(*asked)
            lines, last = voter._machine.lines, voter.status().applied
            entries = {entry.index: entry for entry in disk._entries}
            assert len(disk.compactions) > 10
            for snapshot in disk.compactions:
                index, *written = snapshot.data.split(b"\n")
                assert int(index) == snapshot.index
                assert written == lines[: len(written)]
                if snapshot.index + 1 in entries:  # what follows it is what it does not hold
                    assert entries[snapshot.index + 1].data == lines[len(written)]
        async with alive(tmp_path, pace=pace) as (voter, _, _):
            await leads(voter)
            assert voter._machine.lines == lines  # none of them twice
            assert voter.status().applied == last + 1

    run(main)


def test_a_snapshot_holds_what_was_applied_when_it_was_asked_for(tmp_path: Path) -> None:
    """Also while an older one is being written."""

    async def main() -> None:
        async with alive(tmp_path) as (voter, disk, _):
            await real_leads(voter)
            await voter.propose(b"before")
            disk.may_go_on.clear()
            first = asyncio.create_task(voter.snapshot())
            ticks = voter._ticks
            await turns(lambda: voter._is_compacting and voter._ticks > ticks + 1)
            voter._machine.lines.append(b"meanwhile")
            second = asyncio.create_task(voter.snapshot())
            await turns(lambda: voter._next_snapshot)
            disk.may_go_on.set()
            assert (await first).data.endswith(b"before")
            assert (await second).data.endswith(b"meanwhile")

    asyncio.run(main())


def test_a_snapshot_has_the_members_of_its_index(tmp_path: Path) -> None:
    """The node knows those of a leader's snapshot before that is applied."""

    async def main() -> None:
        async with alive(tmp_path, BOTH) as (voter, disk, _):
            voter.deliver([append(1, Entry(1, 1, b"1"), commit=1)])
            await turns(lambda: voter.status().applied == 1)
            disk.may_go_on.clear()
            voter.deliver([append(1, Entry(1, 2, b"2"), after=(1, 1), commit=1)])
            ticks = voter._ticks
            await turns(lambda: voter._ticks > ticks + 1)
            later = Members(frozenset({1, 2, 3}))
            snapshot = Snapshot(9, 1, later, b"9\nfrom the leader")
            voter.deliver([Message(MessageType.SNAPSHOT, 1, 2, 1, snapshot=snapshot)])
            asked = asyncio.create_task(voter.snapshot())
            await turns(lambda: voter._next_snapshot)
            disk.may_go_on.set()
            written = await asked
            assert (written.index, written.members) in ((1, BOTH), (9, later))
            await turns(lambda: voter.status().applied == 9)
            assert voter._machine.lines == [b"from the leader"]
        assert Disk(tmp_path).load() == Saved(snapshot, voter._disk._hard_state)

    asyncio.run(main())


# Endings


def test_a_failing_disk_ends_the_voter_and_everyone_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with alive(tmp_path) as (voter, disk, running):
            await leads(voter)
            disk.is_broken = True
            waiting = [
                voter.propose(b"it"),
                asyncio.create_task(voter.read()),
                asyncio.create_task(voter.snapshot()),
                asyncio.create_task(voter.wait_applied(lambda: False)),
            ]
            with pytest.raises(ExceptionGroup) as ended:
                await running
            assert ended.value.subgroup(StorageFailed)
            for told in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5):
                assert isinstance(told, Unanswered)
            for later in (voter.read(), voter.snapshot(), voter.wait_applied(lambda: False), voter.propose(b"it")):
                with pytest.raises(Unanswered):
                    await asyncio.wait_for(later, 5)

    run(main)


def test_a_read_that_waits_to_be_applied_is_told_of_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        peer = Peer()
        async with alive(tmp_path, BOTH, peer=peer) as (voter, _, running):
            voter.deliver([append(1, Entry(1, 1))])
            read = asyncio.create_task(voter.read())
            await until(lambda: peer.heard and peer.heard[-1].type is MessageType.READ_INDEX)
            context = peer.heard[-1].context
            voter.deliver([Message(MessageType.READ_INDEX_REPLY, 1, 2, 1, index=1, context=context)])
            await asyncio.sleep(0.02)
            running.cancel()
            with pytest.raises(Unanswered):
                await asyncio.wait_for(read, 5)

    run(main)


def test_a_cancelled_voter_leaves_no_thread_and_nobody_waiting(tmp_path: Path) -> None:
    before = threading.active_count()

    async def main() -> None:
        async with alive(tmp_path) as (voter, disk, running):
            await real_leads(voter)
            disk.may_go_on.clear()
            asked, read = voter.propose(b"it"), asyncio.create_task(voter.read())
            ticks = voter._ticks
            await turns(lambda: voter._ticks > ticks + 1)
            disk.may_go_on.set()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await asyncio.gather(asked, read, return_exceptions=True)
            assert threading.active_count() == before
            assert not voter._promises

    asyncio.run(main())


def test_an_empty_disk_has_to_be_founded(tmp_path: Path) -> None:
    with pytest.raises(LookupError):
        Voter(1, Storage(tmp_path, "disk"), Diary(), list, random.Random(1))
