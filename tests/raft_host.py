"""One simulated computer of the Raft swarm: what its disk holds, what its state machine knows, what runs on it.

Nothing here can fail by itself; the weather in `raft_simulation.py` makes it fail, `raft_invariants.py` looks on.
"""

import hashlib
import marshal
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from cluster.raft import Entry, HardState, Members, NodeId, RaftNode, Ready, Role, Saved, Snapshot
from cluster.raft.messages import CHANGE, FOLLOWER


def link(previous: bytes, entry: Entry, answer: bytes = b"") -> bytes:
    """The hash of a log up to and including this entry: equal for two logs only if all before is equal."""
    kind = b"c" if entry.kind is CHANGE else b"e"
    return hashlib.blake2b(b"%b%d%b%b|%b" % (previous, entry.term, kind, entry.data, answer), digest_size=8).digest()


class Disk:
    """A small honest disk: what was saved with an fsync stays; a commit index written without one may be lost."""

    def __init__(self, first: Snapshot) -> None:
        self.snapshot = first
        self.hard_state = HardState()
        self.synced = HardState()
        self.entries: list[Entry] = []
        self.chains: list[bytes] = [b""]  # of the snapshot's last entry, then of each entry

    @property
    def last_index(self) -> int:
        return self.snapshot.index + len(self.entries)

    def entry_at(self, index: int) -> Entry | None:
        place = index - self.snapshot.index - 1
        return self.entries[place] if 0 <= place < len(self.entries) else None

    def term_at(self, index: int) -> int | None:
        """None for what the snapshot covers, but for its last, and for what was never here."""
        if index == self.snapshot.index:
            return self.snapshot.term
        entry = self.entry_at(index)
        return entry.term if entry else None

    def chain_at(self, index: int) -> bytes | None:
        place = index - self.snapshot.index
        return self.chains[place] if 0 <= place < len(self.chains) else None

    def holds(self, index: int, term: int) -> bool:
        return index <= self.snapshot.index or self.term_at(index) == term

    def save(self, ready: Ready, chain_of_snapshot: bytes) -> None:
        if ready.hard_state:
            self.hard_state = ready.hard_state
        if ready.snapshot:
            self.install(ready.snapshot, chain_of_snapshot)
        if ready.entries:
            self.append(ready.entries)
        if ready.must_sync:
            self.synced = self.hard_state

    def save_torn(self, ready: Ready, chain_of_snapshot: bytes, rng: random.Random) -> None:
        """The power goes in the middle: a beginning of the save is there, and no commit beyond the log that is."""
        written = rng.randrange(3)
        if ready.snapshot and written > 0:
            self.install(ready.snapshot, chain_of_snapshot)
        if ready.entries and written > 1:
            self.append(ready.entries[: rng.randrange(len(ready.entries)) + 1])
        if ready.hard_state:
            now = ready.hard_state
            self.hard_state = HardState(now.term, now.vote, min(now.commit, self.last_index))
        self.synced = self.hard_state

    def append(self, entries: tuple[Entry, ...]) -> None:
        kept = entries[0].index - self.snapshot.index - 1
        del self.entries[kept:], self.chains[kept + 1 :]
        for entry in entries:
            self.entries.append(entry)
            self.chains.append(link(self.chains[-1], entry))

    def install(self, snapshot: Snapshot, chain: bytes) -> None:
        if self.term_at(snapshot.index) == snapshot.term:
            self.compact(snapshot)
        else:
            self.snapshot, self.entries, self.chains = snapshot, [], [chain]

    def compact(self, snapshot: Snapshot) -> None:
        covered = snapshot.index - self.snapshot.index
        del self.entries[:covered], self.chains[:covered]
        self.snapshot, self.synced = snapshot, self.hard_state

    def lose_power(self, rng: random.Random) -> None:
        if self.hard_state != self.synced and rng.random() < 0.5:
            self.hard_state = self.synced
        self.synced = self.hard_state

    def load(self) -> Saved:
        return Saved(self.snapshot, self.hard_state, tuple(self.entries))


class Machine:
    """The replicated state machine: registers, and who already got which answer. Deterministic to the byte."""

    def __init__(self) -> None:
        self.applied = 0
        self.digest = b""
        self.executed = 0
        self.answers: dict[bytes, bytes] = {}  # "client sequence" -> the first answer
        self.registers: dict[bytes, bytes] = {}

    def apply(self, entry: Entry) -> tuple[bytes, bytes] | None:
        """Who asked and what is answered, for a client's command."""
        self.applied = entry.index
        if entry.kind is CHANGE or not entry.data:
            self.digest = link(self.digest, entry)
            return None
        who, key, value = entry.data.split(b"|")
        answer = self.answers.get(who)
        if answer is None:
            self.executed += 1
            previous = self.registers.get(key, b"")
            self.registers[key] = value
            answer = self.answers[who] = b"%d %d %b" % (entry.index, self.executed, previous)
        self.digest = link(self.digest, entry, answer)
        return who, answer

    def snapshot(self) -> bytes:
        return marshal.dumps((self.applied, self.digest, self.executed, self.answers, self.registers), 2)

    def restore(self, data: bytes) -> None:
        """Of nothing is the beginning: what the first members' snapshot holds."""
        if data:
            self.applied, self.digest, self.executed, self.answers, self.registers = marshal.loads(data)


class Watched(RaftNode):
    """A node that shows one by one what `status` shows all at once: at every event, that took a tenth of all time."""

    role = property(attrgetter("_role"))
    term = property(attrgetter("_term"))
    vote = property(attrgetter("_vote"))
    commit = property(attrgetter("_log.commit"))
    applied = property(attrgetter("_log.applied"))
    last_index = property(attrgetter("_log.last_index"))
    members = property(attrgetter("_tracker.members"))
    followers = property(attrgetter("_tracker.followers"))  # as `Status.progress` has them


@dataclass(slots=True)
class Seen:
    """What the referee remembers of one run of a node, from start to crash."""

    role: Role = FOLLOWER
    term: int = 0
    commit: int = 0
    heard_term: int = 0  # the highest that a message brought, but for terms that are only asked about
    grants: dict[int, set[NodeId]] = field(default_factory=dict)  # of pre-votes, by term
    asked_to_stand: int = 0  # the term in which a leader handed over to it
    led_term: int = 0  # the term it led in when it last handed out a Ready
    handed: int = 0  # the last index handed out to be applied
    proposed: deque[tuple[int, int]] = field(default_factory=deque)  # (index, bytes) accepted as this term's leader
    windows: dict[NodeId, deque[int]] = field(default_factory=dict)  # last indexes of appends under way
    beats: dict[bytes, int] = field(default_factory=dict)  # context of a heartbeat of this leader -> when it left
    answered: dict[NodeId, int] = field(default_factory=dict)  # when the last heartbeat left that it answered
    asked: dict[bytes, int] = field(default_factory=dict)  # when this leader, not alone, was asked to read


@dataclass(slots=True)
class Host:
    id: NodeId
    disk: Disk
    node: Watched | None = None  # None while it is down
    machine: Machine = field(default_factory=Machine)
    members: Members = field(default_factory=lambda: Members(frozenset()))
    seen: Seen = field(default_factory=Seen)
    incarnation: int = 0
    outstanding: Ready | None = None
    paused: bool = False
    inbox: list[tuple[Callable[..., None], tuple[object, ...]]] = field(default_factory=list)  # came while paused
    rate: float = 1.0  # of its clock
    lost: bool = False  # its disk is gone, and its id with it
    crash_at: str = ""  # the step of a Ready before which it will crash
    waiting: set[bytes] = field(default_factory=set)  # whose commands were proposed here
    reads: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)  # context -> who asks, the least index
    confirmed: list[tuple[int, bytes]] = field(default_factory=list)  # reads that wait for an index to be applied
