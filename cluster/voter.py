"""The one loop round a Raft node: tick, step, save, send, apply, advance; disk, network and machine are handed in.

Everything but saving happens in the loop's own thread. While a save is under way messages and proposals go on
arriving, and the next save takes all of them at once: that is how writes are batched.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster.raft import (
    Config,
    Entry,
    EntryKind,
    HardState,
    Members,
    Message,
    NodeId,
    NotLeader,
    RaftNode,
    ReadState,
    Ready,
    Saved,
    Snapshot,
    Status,
)

APPLY_AT_ONCE = 500  # entries, then others have their turn


class Machine(Protocol):
    """What the log is applied to: the same entries give the same state and the same answers everywhere."""

    def apply(self, index: int, command: bytes) -> bytes: ...
    def snapshot(self) -> bytes: ...
    def restore(self, data: bytes) -> None: ...


class Disk(Protocol):
    """What outlives the process; what has returned is durable."""

    def load(self) -> Saved | None: ...
    def save(self, ready: Ready) -> None: ...
    def compact(self, snapshot: Snapshot) -> None: ...


def found(disk: Disk, members: Members, after: Snapshot | None = None) -> None:
    """Prepare the empty disk of a new voter: the first ones with all of them, a later one with nobody.

    A snapshot of another coordinator makes it begin where that was.
    """
    first = replace(after, members=members) if after else Snapshot(0, 0, members)
    state = HardState(first.term, commit=first.index)
    disk.save(Ready(state, first, (), (), (), (), None, must_sync=True))


class Unanswered(Exception):
    """What was asked may have happened, or may yet: ask again under the same name."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a tick, ticks of an election timeout (at least; at most twice as many), entries between snapshots."""

    tick_seconds: float = 0.05
    election_ticks: int = 10
    snapshot_entries: int = 10_000


PACE = Pace()


class Voter:
    """A node, alive. All methods belong to the event loop that runs `run`."""

    def __init__(
        self, id: NodeId, disk: Disk, machine: Machine, send: Callable[[Sequence[Message]], None],
        rng: random.Random, pace: Pace = PACE,
    ) -> None:  # fmt: skip
        """Goes on from what is on the disk. Raises what the disk raises, and LookupError for one never founded."""
        saved = disk.load()
        if saved is None:
            raise LookupError(f"the disk of voter {id} holds nothing")
        self.id = id
        self._disk, self._machine, self._send, self._pace = disk, machine, send, pace
        self._node = RaftNode(Config(id, pace.election_ticks), saved, rng)
        if saved.snapshot.data:
            machine.restore(saved.snapshot.data)
        base = saved.snapshot
        self._snapshot_index, self._applied_term, self._members = base.index, base.term, base.members
        self._is_compacting = False
        self._next_snapshot: asyncio.Future[Snapshot] | None = None  # who asked for one that is not begun
        self._state: HardState | None = None  # not on the disk yet
        self._thread = ThreadPoolExecutor(1, "save")
        self._work = asyncio.Event()
        self._work.set()
        self._has_ended = False
        self._promises: set[asyncio.Future[Any]] = set()  # all that anybody waits for
        self._proposals: dict[int, tuple[int, asyncio.Future[bytes]]] = {}  # index -> (term, who waits)
        self._incarnation, self._ticks, self._asked = rng.randbytes(8), 0, 0
        self._next_read: asyncio.Future[None] | None = None
        self._reads: dict[bytes, tuple[int, asyncio.Future[None]]] = {}  # context -> (the tick it was asked at, ...)
        self._confirmed: dict[bytes, int] = {}  # context -> the index that must be applied
        self._next_applied: asyncio.Future[None] | None = None

    # What others ask

    def deliver(self, messages: Sequence[Message]) -> None:
        """From the network, in whatever order and as often as it likes."""
        for message in messages:
            self._node.step(message)
        self._work.set()

    def propose(self, command: bytes) -> "asyncio.Future[bytes]":
        """The machine's answer, once the command is committed and applied here.

        Raises NotLeader and ProposalDropped at once. The future raises NotLeader when another command was committed
        in its place, and Unanswered when this voter cannot know any more.
        """
        return self._wait_for(self._node.propose(command))

    def change(self, members: Members) -> "asyncio.Future[bytes]":
        """Resolved once the new members count here. Raises as `propose` does, and ConfChangeRefused."""
        return self._wait_for(self._node.propose_conf_change(members))

    async def read(self) -> None:
        """Return once what is applied here holds all that was committed when this was called.

        Raises NotLeader while no leader is known, and Unanswered.
        """
        if self._next_read is None:  # all that ask in this turn share one round
            self._next_read = self._promise()
            asyncio.get_running_loop().call_soon(self._ask_to_read)
        await asyncio.shield(self._next_read)

    def transfer(self, to: NodeId) -> None:
        """Hand leadership to this voter, as soon as it is level."""
        self._node.transfer_leader(to)
        self._work.set()

    def status(self) -> Status:
        return self._node.status()

    async def wait_applied(self, is_enough: Callable[[], bool]) -> None:
        """Return when this holds of the machine; it is asked after each round of applying. Raises Unanswered."""
        while not is_enough():
            self._next_applied = self._next_applied or self._promise()
            await asyncio.shield(self._next_applied)

    async def snapshot(self) -> Snapshot:
        """Write down what is applied, and forget the log up to there. Raises Unanswered."""
        if self._next_snapshot is None:
            self._next_snapshot = self._promise()
            self._work.set()
        return await asyncio.shield(self._next_snapshot)

    # The loop

    async def run(self) -> None:
        """Go on until cancelled, or until the disk fails: what it raises, in a group, ends this voter."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tick())
                tasks.create_task(self._drain(tasks))
        finally:
            self._has_ended = True
            for promise in self._promises:
                self._break(promise)
            self._thread.shutdown(wait=True)

    async def _tick(self) -> None:
        """Ticks that a stopped process missed are not made up for: what it would have heard meanwhile waits still."""
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            due = max(due + self._pace.tick_seconds, clock())
            await asyncio.sleep(due - clock())
            self._ticks += 1
            self._node.tick()
            self._give_up_reads(self._ticks - 2 * self._pace.election_ticks)
            self._work.set()

    async def _drain(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            self._compact_where_due(tasks)
            while self._node.has_ready():
                await self._do(self._node.ready())
                self._compact_where_due(tasks)

    def _compact_where_due(self, tasks: asyncio.TaskGroup) -> None:
        """Between two rounds, when node and machine are at the same index; the disk takes its time meanwhile."""
        status = self._node.status()
        is_due = status.applied - self._snapshot_index >= self._pace.snapshot_entries
        if self._is_compacting or not (is_due or self._next_snapshot):
            return
        self._is_compacting = True
        snapshot = Snapshot(status.applied, self._applied_term, self._members, self._machine.snapshot())
        asked, self._next_snapshot = self._next_snapshot, None
        tasks.create_task(self._compact(snapshot, asked))

    async def _compact(self, snapshot: Snapshot, asked: "asyncio.Future[Snapshot] | None") -> None:
        if snapshot.index > self._snapshot_index:
            await self._on_disk(self._disk.compact, snapshot)
            self._node.compact(snapshot)
            self._snapshot_index = max(self._snapshot_index, snapshot.index)
        self._is_compacting = False
        self._work.set()  # another one may have been asked for meanwhile
        if asked:
            asked.set_result(snapshot)

    async def _do(self, ready: Ready) -> None:
        self._state = ready.hard_state or self._state
        if ready.must_sync:  # a commit alone is not worth a write: it goes with the next, and may be late
            state, self._state = self._state, None
            await self._on_disk(self._disk.save, replace(ready, hard_state=state))
        if ready.messages:
            self._send(ready.messages)
        if ready.snapshot:
            self._machine.restore(ready.snapshot.data)
            base = ready.snapshot
            self._snapshot_index, self._applied_term, self._members = base.index, base.term, base.members
        for first in range(0, len(ready.committed), APPLY_AT_ONCE):
            for entry in ready.committed[first : first + APPLY_AT_ONCE]:
                self._apply(entry)
            if len(ready.committed) > APPLY_AT_ONCE:
                await asyncio.sleep(0)
        self._node.advance(ready)
        if ready.leader not in (None, self.id):
            self._give_up_proposals()
        self._answer_reads(ready.reads)
        if self._next_applied and (ready.committed or ready.snapshot):
            applied, self._next_applied = self._next_applied, None
            applied.set_result(None)

    def _apply(self, entry: Entry) -> None:
        answer = b""
        if entry.kind is EntryKind.CHANGE:
            self._members = Members.from_bytes(entry.data)
            self._node.apply_conf_change(self._members)
        else:
            answer = self._machine.apply(entry.index, entry.data)
        self._applied_term = entry.term
        term, future = self._proposals.pop(entry.index, (0, None))
        if future is None or future.done():
            return
        if term == entry.term:
            future.set_result(answer)
        else:  # another leader's entry stands where this one was
            future.set_exception(NotLeader(self._node.status().leader))

    async def _on_disk(self, work: Callable[..., None], *arguments: object) -> None:
        """In a thread of its own, one after another."""
        await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    # Who waits

    def _promise(self) -> "asyncio.Future[Any]":
        """To be kept in time, or broken when this voter ends."""
        promise: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._promises.add(promise)
        promise.add_done_callback(self._forget)
        if self._has_ended:
            self._break(promise)
        return promise

    def _forget(self, promise: "asyncio.Future[Any]") -> None:
        self._promises.discard(promise)
        if not promise.cancelled():
            promise.exception()  # nobody has to look

    def _break(self, promise: "asyncio.Future[Any]", reason: str = "this voter has ended") -> None:
        if not promise.done():
            promise.set_exception(Unanswered(reason))

    def _wait_for(self, index: int) -> "asyncio.Future[bytes]":
        future = self._promise()
        self._proposals[index] = (self._node.status().term, future)
        self._work.set()
        return future

    def _give_up_proposals(self) -> None:
        waiting, self._proposals = self._proposals, {}
        for _, future in waiting.values():
            self._break(future, "this voter leads no more")

    def _ask_to_read(self) -> None:
        future, self._next_read = self._next_read, None
        assert future is not None
        if future.done():
            return
        self._asked += 1
        context = self._incarnation + self._asked.to_bytes(8, "big")
        try:
            self._node.read_index(context)
        except NotLeader as error:
            future.set_exception(error)
        else:
            self._reads[context] = (self._ticks, future)
            self._work.set()

    def _answer_reads(self, reads: Sequence[ReadState]) -> None:
        self._confirmed.update((read.context, read.index) for read in reads if read.context in self._reads)
        applied = self._node.status().applied
        for context in [context for context, index in self._confirmed.items() if index <= applied]:
            del self._confirmed[context]
            _, future = self._reads.pop(context)
            future.set_result(None)

    def _give_up_reads(self, before: int) -> None:
        """Those asked at this tick or earlier: their question or its answer was lost."""
        for context in [context for context, (tick, _) in self._reads.items() if tick <= before]:
            _, future = self._reads.pop(context)
            self._confirmed.pop(context, None)
            self._break(future, "no majority answered in time")
