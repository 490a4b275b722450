"""What the voters agree on: a small etcd, fed one committed entry at a time, the same on every voter at the same entry.

**Revisions.** The store's revision counts the changes that happened: a put, or one key deleted, by a command or
by the end of a lease. A key's revision is that of its last put, so it never returns, not even when a key is deleted and
written again. Each change is one `Event`; the last of them are kept, in snapshots too, for those who watch.

**Time** is what CLOCK entries add up to; nothing else moves it. The leader proposes one every so often, with the time
since its last one (the first: since it was elected), measured on its own monotonic clock, so what is counted once is
never counted again by its successor; time in which it stood still, and heard nobody, is not counted. A lease's time
starts at the first clock entry after its grant or last keep-alive, and a session's after its last use: both live at
least as long as promised, and one entry longer at most.

**Exactly once** (Ongaro's thesis 6.3). A session is opened by an entry and called by its index, so no name is used
twice. Each of its commands carries a sequence number of the client's choice, counted upwards; they may arrive in any
order. The first to arrive is executed, and every other of that number gets the same bytes. A command also carries the
lowest sequence its client still awaits; what lies below that, or ANSWERS_KEPT behind the highest seen, is forgotten and
refused from then on (`AlreadyAnswered`), also what never arrived. So is every command of a session that expired
(`SessionExpired`): who was refused on the first sending may send again in a new session; who asked again cannot know.

All of this is state, and is in the snapshot, in the order in which the log brought it in: voters at the same entry hold
the same bytes, whether they applied every entry or were given a snapshot on the way.
`apply` takes every command that can be built here; what it cannot read, another version wrote: the node must stop.
"""

import bisect
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import NamedTuple

from msgpack import packb, unpackb

from nexus.errors import InvalidRequest

KEY_BYTES = 1024
VALUE_BYTES = 2**20
EVENTS_KEPT = 10_000
EVENT_BYTES_KEPT = 16 * 2**20
ANSWERS_KEPT = 1_000
SESSION_SECONDS = 3_600
LONGEST_LEASE_MS = 366 * 86_400_000
LONGEST_STEP_MS = 86_400_000
_LARGEST = 2**63 - 1
_FORMAT = 1


class Unreadable(Exception):
    """A command or snapshot that this version did not write. To skip it would be to disagree: the node must stop."""


class Compacted(Exception):
    """Events this old are no longer kept; `first` is the oldest revision that may be asked for."""

    def __init__(self, first: int) -> None:
        super().__init__(first)
        self.first = first

    def __str__(self) -> str:
        return f"events before revision {self.first} are no longer kept: read the keys, and watch from there"


class Refused(Exception):
    """The catalog changed nothing for this command, and says why by its class."""

    message = ""

    def __str__(self) -> str:
        return self.message


class SessionExpired(Refused):
    message = "the client's session has expired, or was never opened: open another"


class AlreadyAnswered(Refused):
    message = "the client has gone past this sequence number, and its answer is no longer kept"


class LeaseGone(Refused):
    message = "the lease has expired, was revoked, or was never granted"


_REFUSALS: dict[str, type[Refused]] = {kind.__name__: kind for kind in (SessionExpired, AlreadyAnswered, LeaseGone)}


def _check_whole(name: str, value: int, lowest: int, highest: int = _LARGEST) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        raise InvalidRequest(f"{name} must be a whole number from {lowest} to {highest}, not {value!r}")


def _check_key(key: str) -> None:
    if not isinstance(key, str):
        raise InvalidRequest(f"a key is a str, not {type(key).__name__}")
    try:
        length = len(key.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest("a key must be valid Unicode; this one holds half of a surrogate pair") from error
    if not 0 < length <= KEY_BYTES:
        raise InvalidRequest(f"a key has 1 to {KEY_BYTES} bytes of UTF-8, not {length}")


def _check_value(value: bytes) -> None:
    if not isinstance(value, bytes):
        raise InvalidRequest(f"a value is bytes, not {type(value).__name__}")
    if len(value) > VALUE_BYTES:
        raise InvalidRequest(f"a value has at most {VALUE_BYTES} bytes, not {len(value)}")


@dataclass(frozen=True, slots=True)
class Put:
    """Answered by the new revision. The key goes with its lease; 0 is none, and takes it from the one it had."""

    key: str
    value: bytes
    lease: int = 0

    def __post_init__(self) -> None:
        _check_key(self.key)
        _check_value(self.value)
        _check_whole("lease", self.lease, 0)


@dataclass(frozen=True, slots=True)
class CompareAndSet:
    """A put, if the key's revision is the expected one (0: there is no such key); otherwise answered by None."""

    key: str
    expected_revision: int
    value: bytes
    lease: int = 0

    def __post_init__(self) -> None:
        _check_key(self.key)
        _check_whole("expected_revision", self.expected_revision, 0)
        _check_value(self.value)
        _check_whole("lease", self.lease, 0)


@dataclass(frozen=True, slots=True)
class Delete:
    """Answered by whether there was such a key."""

    key: str

    def __post_init__(self) -> None:
        _check_key(self.key)


@dataclass(frozen=True, slots=True)
class Grant:
    """Answered by the new lease."""

    ttl_ms: int

    def __post_init__(self) -> None:
        _check_whole("ttl_ms", self.ttl_ms, 1, LONGEST_LEASE_MS)


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Lets the lease's time begin anew; answered by True, or refused: LeaseGone."""

    lease: int

    def __post_init__(self) -> None:
        _check_whole("lease", self.lease, 1)


@dataclass(frozen=True, slots=True)
class Revoke:
    """Ends a lease and deletes its keys; answered by whether there was such a lease."""

    lease: int

    def __post_init__(self) -> None:
        _check_whole("lease", self.lease, 1)


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Answered by the new client number. Belongs to no session: sent twice it opens two, and the unused one expires."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The leader's word that so much time has passed since its last one; answered by None. Belongs to no session."""

    elapsed_ms: int

    def __post_init__(self) -> None:
        _check_whole("elapsed_ms", self.elapsed_ms, 0, LONGEST_STEP_MS)


Command = Put | CompareAndSet | Delete | Grant | KeepAlive | Revoke | OpenSession | Clock
Answer = int | str | None  # a str names a refusal

_KINDS: dict[str, type[Command]] = {
    "put": Put,
    "compare_and_set": CompareAndSet,
    "delete": Delete,
    "grant": Grant,
    "keep_alive": KeepAlive,
    "revoke": Revoke,
    "open_session": OpenSession,
    "clock": Clock,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def _check_sender(command: Command, client: int, sequence: int, unanswered: int) -> None:
    if isinstance(command, OpenSession | Clock):
        if (client, sequence, unanswered) != (0, 0, 0):
            raise InvalidRequest(f"{type(command).__name__} belongs to no session")
    else:
        _check_whole("client", client, 1)
        _check_whole("sequence", sequence, 1)
        _check_whole("unanswered", unanswered, 1, sequence)


def encode(command: Command, client: int = 0, sequence: int = 0, unanswered: int = 0) -> bytes:
    """The log entry of a command.

    `unanswered` is the lowest sequence the client still awaits, this one included. OpenSession and Clock have
    no client. Raises InvalidRequest for numbers that do not fit.
    """
    _check_sender(command, client, sequence, unanswered)
    written: bytes = packb((_NAMES[type(command)], client, sequence, unanswered, *astuple(command)))
    return written


def _decode(data: bytes) -> tuple[Command, int, int, int]:
    try:
        name, client, sequence, unanswered, *arguments = unpackb(data, use_list=False)
        command = _KINDS[name](*arguments)
        _check_sender(command, client, sequence, unanswered)
    except (ValueError, TypeError, KeyError, InvalidRequest) as error:
        raise Unreadable(f"a command of {len(data)} bytes that this version cannot read: {error}") from error
    return command, client, sequence, unanswered


def decode_response(response: bytes) -> int | None:
    """What `apply` answered to a command, as its class describes it. Raises Refused."""
    answer: Answer = unpackb(response)
    if isinstance(answer, str):
        raise _REFUSALS[answer]
    return answer


def _encoded(answer: Answer) -> bytes:
    written: bytes = packb(answer)
    return written


class Event(NamedTuple):
    """One change of one key; a value of None says it was deleted."""

    revision: int
    key: str
    value: bytes | None


class _Record(NamedTuple):
    value: bytes
    revision: int
    lease: int


@dataclass(slots=True)
class _Lease:
    ttl_ms: int
    expires_ms: int | None = None  # None until a clock entry starts its time
    keys: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Session:
    """Every sequence in `answers` lies in [floor, floor + ANSWERS_KEPT)."""

    expires_ms: int | None = None
    floor: int = 1
    answers: dict[int, bytes] = field(default_factory=dict)

    def forget_below(self, floor: int) -> None:
        for sequence in range(self.floor, min(floor, self.floor + ANSWERS_KEPT)):
            self.answers.pop(sequence, None)
        self.floor = max(self.floor, floor)


class Catalog:
    """`apply` changes it; reads see what was applied so far. Not for several threads at once."""

    def __init__(self, events_kept: int = EVENTS_KEPT) -> None:
        """`events_kept` must be the same on every voter: what is kept is part of the state."""
        self._events_kept = events_kept
        self._clear()

    def _clear(self) -> None:
        self._applied = 0
        self._revision = 0
        self._time_ms = 0
        self._records: dict[str, _Record] = {}
        self._ordered: list[str] = []  # the keys of `_records`, sorted
        self._leases: dict[int, _Lease] = {}
        self._sessions: dict[int, _Session] = {}
        self._events: deque[Event] = deque()  # their revisions have no gap, and end at `_revision`
        self._event_bytes = 0

    @property
    def applied(self) -> int:
        """The index of the last entry applied."""
        return self._applied

    @property
    def revision(self) -> int:
        return self._revision

    def get(self, key: str) -> tuple[bytes, int] | None:
        """Value and revision."""
        record = self._records.get(key)
        return (record.value, record.revision) if record else None

    def range(self, prefix: str) -> list[tuple[str, bytes, int]]:
        """Key, value and revision of every key that starts so, sorted by code points; all of them for ""."""
        found = []
        for position in range(bisect.bisect_left(self._ordered, prefix), len(self._ordered)):
            key = self._ordered[position]
            if not key.startswith(prefix):
                break
            record = self._records[key]
            found.append((key, record.value, record.revision))
        return found

    def events_since(self, prefix: str, from_revision: int) -> list[Event]:
        """Every change of such keys from this revision on, in order. Raises Compacted when some are no longer kept."""
        first = self._revision - len(self._events) + 1
        if max(from_revision, 1) < first:
            raise Compacted(first)
        found = []
        for event in reversed(self._events):
            if event.revision < from_revision:
                break
            if event.key.startswith(prefix):
                found.append(event)
        found.reverse()
        return found

    def awaits_clock(self, elapsed_ms: int) -> bool:
        """Whether a clock entry with this much time is due: it would begin a lease's time, or end one, or is a quarter
        of what the shortest lease has, which is all that a change of leaders may then add to it.
        """
        if self._leases and 4 * elapsed_ms >= min(lease.ttl_ms for lease in self._leases.values()):
            return True
        ends = [lease.expires_ms for lease in self._leases.values()]
        ends += [session.expires_ms for session in self._sessions.values()]
        return any(end is None or end <= self._time_ms + elapsed_ms for end in ends)

    def apply(self, index: int, command: bytes) -> bytes:
        """Carry out the entry at `index`, and answer it for `decode_response`; an empty one is answered by b"".

        Raises Unreadable, with nothing changed, and ValueError for an index that was applied before.
        """
        if index <= self._applied:
            raise ValueError(f"entry {index} cannot be applied after entry {self._applied}")
        if not command:
            self._applied = index
            return b""
        asked, client, sequence, unanswered = _decode(command)
        self._applied = index
        if client:
            return self._answer_once(asked, client, sequence, unanswered)
        return _encoded(self._execute(asked))

    def _answer_once(self, asked: Command, client: int, sequence: int, unanswered: int) -> bytes:
        session = self._sessions.get(client)
        if session is None:
            return _encoded(SessionExpired.__name__)
        session.expires_ms = None
        if sequence < session.floor:
            return _encoded(AlreadyAnswered.__name__)
        answer = session.answers.get(sequence)
        if answer is None:
            answer = session.answers[sequence] = _encoded(self._execute(asked))
        session.forget_below(max(unanswered, sequence - ANSWERS_KEPT + 1))
        return answer

    def _execute(self, asked: Command) -> Answer:
        match asked:
            case Put(key, value, lease):
                return self._put(key, value, lease)
            case CompareAndSet(key, expected_revision, value, lease):
                record = self._records.get(key)
                revision = record.revision if record else 0
                return self._put(key, value, lease) if revision == expected_revision else None
            case Delete(key):
                return self._delete(key)
            case Grant(ttl_ms):
                self._leases[self._applied] = _Lease(ttl_ms)
                return self._applied
            case KeepAlive(lease):
                return self._keep_alive(lease)
            case Revoke(lease):
                return self._revoke(lease)
            case OpenSession():
                self._sessions[self._applied] = _Session()
                return self._applied
            case Clock(elapsed_ms):
                self._pass_time(elapsed_ms)
                return None

    def _put(self, key: str, value: bytes, lease: int) -> Answer:
        if lease and lease not in self._leases:
            return LeaseGone.__name__
        before = self._records.get(key)
        if before is None:
            bisect.insort(self._ordered, key)
        elif before.lease:
            self._leases[before.lease].keys.discard(key)
        if lease:
            self._leases[lease].keys.add(key)
        self._revision += 1
        self._records[key] = _Record(value, self._revision, lease)
        self._remember(Event(self._revision, key, value))
        return self._revision

    def _delete(self, key: str) -> bool:
        before = self._records.pop(key, None)
        if before is None:
            return False
        del self._ordered[bisect.bisect_left(self._ordered, key)]
        if before.lease:
            self._leases[before.lease].keys.discard(key)
        self._revision += 1
        self._remember(Event(self._revision, key, None))
        return True

    def _remember(self, event: Event) -> None:
        self._events.append(event)
        self._event_bytes += _size(event)
        while len(self._events) > self._events_kept or self._event_bytes > EVENT_BYTES_KEPT:
            self._event_bytes -= _size(self._events.popleft())

    def _keep_alive(self, lease: int) -> Answer:
        if lease not in self._leases:
            return LeaseGone.__name__
        self._leases[lease].expires_ms = None
        return True

    def _revoke(self, lease: int) -> bool:
        if lease not in self._leases:
            return False
        for key in sorted(self._leases[lease].keys):
            self._delete(key)
        del self._leases[lease]
        return True

    def _pass_time(self, elapsed_ms: int) -> None:
        self._time_ms += elapsed_ms
        for number, lease in list(self._leases.items()):
            if lease.expires_ms is None:
                lease.expires_ms = self._time_ms + lease.ttl_ms
            elif lease.expires_ms <= self._time_ms:
                self._revoke(number)
        for client, session in list(self._sessions.items()):
            if session.expires_ms is None:
                session.expires_ms = self._time_ms + SESSION_SECONDS * 1_000
            elif session.expires_ms <= self._time_ms:
                del self._sessions[client]

    def snapshot(self) -> bytes:
        """All of it, each thing in the order in which the log brought it in: quicker by far than sorting the keys."""
        written: bytes = packb(
            (
                _FORMAT,
                self._applied,
                self._revision,
                self._time_ms,
                self._records,
                [(number, lease.ttl_ms, lease.expires_ms) for number, lease in self._leases.items()],
                [
                    (client, session.expires_ms, session.floor, list(session.answers.items()))
                    for client, session in self._sessions.items()
                ],
                list(self._events),
            )
        )
        return written

    def restore(self, data: bytes) -> None:
        """Become what `snapshot` wrote; b"" is the catalog before the first entry. Raises Unreadable."""
        self._clear()
        if not data:
            return
        try:
            written_as, *state = unpackb(data, use_list=False)
            if written_as != _FORMAT:
                raise ValueError(f"format {written_as!r}")
            self._restore(*state)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise Unreadable(f"a snapshot of {len(data)} bytes that this version cannot read: {error}") from error

    def _restore(
        self,
        applied: int,
        revision: int,
        time_ms: int,
        records: Mapping[str, tuple[bytes, int, int]],
        leases: Iterable[tuple[int, int, int | None]],
        sessions: Iterable[tuple[int, int | None, int, Iterable[tuple[int, bytes]]]],
        events: Iterable[tuple[int, str, bytes | None]],
    ) -> None:
        self._applied, self._revision, self._time_ms = applied, revision, time_ms
        self._leases = {number: _Lease(ttl_ms, expires_ms) for number, ttl_ms, expires_ms in leases}
        self._records = {key: _Record(*record) for key, record in records.items()}
        self._ordered = sorted(self._records)
        for key, record in self._records.items():
            if record.lease:
                self._leases[record.lease].keys.add(key)
        self._sessions = {
            client: _Session(expires_ms, floor, dict(answers)) for client, expires_ms, floor, answers in sessions
        }
        for event in events:
            self._remember(Event(*event))


def _size(event: Event) -> int:
    return len(event.key) + len(event.value or b"")
