"""What nodes say to each other, hand their drivers and write down: frozen values, in the words of the paper.

A `Message` means by its type (terms and indexes count from 1; 0 is "none"):

    PRE_VOTE          would you vote for me in `term`? my log ends at (`log_term`, `index`)       Ongaro's thesis 9.6
    VOTE              vote for me in `term`; context "transfer": my leader asked me to stand       5.2, 5.4.1
    APPEND            `entries` follow (`log_term`, `index`); all up to `commit` is committed      5.3
    HEARTBEAT         I lead; what you hold up to `commit` is committed; `context` comes back      5.2
    SNAPSHOT          what the entries up to `snapshot.index` amount to                            7
    READ_INDEX        how far must I have applied before I may answer `context`?                   thesis 6.4
    TIMEOUT_NOW       stand for election at once, I hand over to you                               thesis 3.10

and each of them has its reply, but for the last. `reject` refuses. A refused APPEND names the `index` it
refused and hints how far back to go: (`hint`, `log_term`). Every message carries its sender's term.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

NodeId = int
NOBODY: NodeId = 0


class Role(Enum):
    FOLLOWER = auto()
    PRE_CANDIDATE = auto()
    CANDIDATE = auto()
    LEADER = auto()


FOLLOWER, PRE_CANDIDATE, CANDIDATE, LEADER = Role  # Python 3.11 takes 20 times as long to find `Role.LEADER`


class EntryKind(Enum):
    COMMAND = auto()
    CHANGE = auto()


COMMAND, CHANGE = EntryKind


class MessageType(Enum):
    __hash__ = object.__hash__  # there is one of each, so no need to hash its name

    PRE_VOTE = auto()
    PRE_VOTE_REPLY = auto()
    VOTE = auto()
    VOTE_REPLY = auto()
    APPEND = auto()
    APPEND_REPLY = auto()
    HEARTBEAT = auto()
    HEARTBEAT_REPLY = auto()
    SNAPSHOT = auto()
    READ_INDEX = auto()
    READ_INDEX_REPLY = auto()
    TIMEOUT_NOW = auto()


(
    PRE_VOTE, PRE_VOTE_REPLY, VOTE, VOTE_REPLY, APPEND, APPEND_REPLY,
    HEARTBEAT, HEARTBEAT_REPLY, SNAPSHOT, READ_INDEX, READ_INDEX_REPLY, TIMEOUT_NOW,
) = MessageType  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One place of the log. `data` is a command of the state machine, or of a CHANGE the Members it leads to."""

    term: int
    index: int
    data: bytes = b""
    kind: EntryKind = EntryKind.COMMAND


@dataclass(frozen=True, slots=True)
class Members:
    """Who votes, and who only follows along."""

    voters: frozenset[NodeId]
    learners: frozenset[NodeId] = frozenset()

    @property
    def everyone(self) -> frozenset[NodeId]:
        return self.voters | self.learners

    def to_bytes(self) -> bytes:
        """The same bytes for the same members, whichever process writes them."""
        return json.dumps({"voters": sorted(self.voters), "learners": sorted(self.learners)}).encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Members":
        """Raises ValueError, or KeyError, for what `to_bytes` never wrote."""
        written = json.loads(data)
        return Members(frozenset(written["voters"]), frozenset(written["learners"]))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the log amounts to up to and including `index`: the state machine's `data`, and the members (7)."""

    index: int
    term: int
    members: Members
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class HardState:
    """What a node must find again after a crash besides its log (figure 2: persistent state). `commit` may be late."""

    term: int = 0
    vote: NodeId = NOBODY
    commit: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    type: MessageType
    to: NodeId
    sender: NodeId
    term: int = 0
    index: int = 0
    log_term: int = 0
    entries: tuple[Entry, ...] = ()
    commit: int = 0
    reject: bool = False
    hint: int = 0
    context: bytes = b""
    snapshot: Snapshot | None = None


@dataclass(frozen=True, slots=True)
class ReadState:
    """Once `index` is applied, the read asked for under `context` may be answered from here."""

    index: int
    context: bytes


@dataclass(frozen=True, slots=True)
class Saved:
    """All that a node finds on its disk. The first members get there as a snapshot at index 0."""

    snapshot: Snapshot
    hard_state: HardState = HardState()
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Config:
    """Of one node. Ticks are the driver's unit of time; a payload counts in bytes."""

    id: NodeId
    election_ticks: int = 10
    heartbeat_ticks: int = 1
    max_entries_per_message: int = 64
    max_inflight_messages: int = 256
    max_uncommitted_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        if self.id <= NOBODY:
            raise ValueError(f"a node's id is 1 or more, not {self.id}")
        if not 0 < self.heartbeat_ticks < self.election_ticks:
            raise ValueError("heartbeat_ticks must be at least 1 and below election_ticks")
        if min(self.max_entries_per_message, self.max_inflight_messages, self.max_uncommitted_bytes) < 1:
            raise ValueError("max_entries_per_message, max_inflight_messages and max_uncommitted_bytes are 1 or more")


@dataclass(frozen=True, slots=True)
class Ready:
    """One round of work for the driver: save, send, apply, answer; then `advance` with this very value.

    Save `hard_state`, then `snapshot`, then `entries`, truncating whatever was at or after the first of them,
    with an fsync where `must_sync`. None and empty stand for unchanged. `leader` is NOBODY when it was lost.
    """

    hard_state: HardState | None
    snapshot: Snapshot | None
    entries: tuple[Entry, ...]
    messages: tuple[Message, ...]
    committed: tuple[Entry, ...]
    reads: tuple[ReadState, ...]
    leader: NodeId | None
    must_sync: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a follower is: known to hold `match`, sent up to `next` - 1; "probe", "replicate" or "snapshot"."""

    match: int
    next: int
    state: str


@dataclass(frozen=True, slots=True)
class Status:
    """A node at this moment. `progress` is empty unless it leads."""

    id: NodeId
    role: Role
    term: int
    vote: NodeId
    leader: NodeId
    commit: int
    applied: int
    last_index: int
    members: Members
    progress: Mapping[NodeId, Progress]


class NotLeader(Exception):
    """Only a leader can do this; `leader` is who to ask, or NOBODY."""

    def __init__(self, leader: NodeId = NOBODY) -> None:
        super().__init__(leader)
        self.leader = leader

    def __str__(self) -> str:
        return f"not the leader; ask {self.leader}" if self.leader else "not the leader, and none is known"


class ProposalDropped(Exception):
    """A leader that cannot take this now: it hands over, or too much is uncommitted. Nothing was written."""


class ConfChangeRefused(Exception):
    """A change of members that would not be safe. Nothing was written."""
