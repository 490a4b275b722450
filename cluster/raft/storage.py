"""What a voter must find again after a crash: one file of chained records, and a mark of how many were acknowledged.

The folder holds `log` and an empty `lock`. The log begins with its header, written twice so that one copy is
always whole; then records follow, one a save:

    header    magic, turn, records acknowledged, hard state, identity, digest             (two copies, 512 bytes each)
    record    length, digest, then the body: hard state, a snapshot or none, entries
    zeros     room for the records to come, so that most saves leave the file's size alone

A digest covers its record and the digest before it. So a damaged record, a stale one and one in a foreign place all
break the chain, and the only question left is whether the record that breaks it was ever acknowledged. The header
answers: it is written after the record's fsync and before `save` returns. Up to its mark a break is corruption. Past
it lies a write that was cut short, which nobody was promised; the next record is written over it, and what still
shows behind that one does not follow its digest. The mark needs no fsync of its own: the operating system keeps it
when the process dies, and the next save's fsync takes it along. Only when the power fails right after a save may the
mark be one record late. That record is then still read; were it damaged as well before the next save, it would pass
for one cut short.

A hard state that need not be durable (a later `commit`) goes to the header alone. A snapshot begins a new file,
renamed over the old one once it is whole, so that no save carries its weight and a crash leaves all of the old or
all of the new. As in SQLite, writing a sector is taken to leave the bytes of it that do not change as they were.

Why not SQLite: with a rollback journal it needs several fsyncs for each save, with a WAL its pages cost several times
this one append, and it would need the same mark beside it to tell a lost frame from one that never was.
"""

import fcntl
import hashlib
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.raft.messages import Entry, EntryKind, HardState, Members, Ready, Saved, Snapshot
from nexus.errors import AlreadyRunning, NexusError, OperatorError
from nexus.private_files import sync_folder

NOTHING = Snapshot(0, 0, Members(frozenset()))  # what a log begins after, before any snapshot was saved

_MAGIC = b"nxraft01"
_HEADER = struct.Struct("<8sQQQQQH")  # magic, turn, acknowledged, term, vote, commit, length of the identity
_COPY_BYTES = 512
_LONGEST_IDENTITY = 256
_HEADER_BYTES = 2 * _COPY_BYTES
_RECORD = struct.Struct("<Q16s")  # length of the body, digest
_BODY = struct.Struct("<QQQ?")  # term, vote, commit, whether a snapshot follows
_SNAPSHOT = struct.Struct("<QQQQ")  # index, term, length of the members, length of the data
_ENTRY = struct.Struct("<QQBQ")  # term, index, kind, length of the data
_DIGEST_BYTES = 16
_ORIGIN = bytes(_DIGEST_BYTES)  # stands before the first record
_ROOM_BYTES = 64 * 2**10


class StorageCorrupt(OperatorError):
    """What is on the disk is not what was saved. The message names the record."""

    code = "storage_corrupt"


class IdentityMismatch(OperatorError):
    """The folder holds the data of another disk."""

    code = "identity_mismatch"


class StorageFailed(OperatorError):
    """A write or an fsync failed: nobody knows what is on the disk now, so this storage does nothing any more."""

    code = "storage_failed"


@dataclass(frozen=True, slots=True)
class _Header:
    """`hard_state` counts as long as the log ends at `acknowledged`: a later record brings its own."""

    turn: int
    acknowledged: int
    hard_state: HardState
    identity: str


@dataclass(frozen=True, slots=True)
class _Records:
    """What the sound records at the front of a log amount to, and where the next one goes."""

    count: int
    digest: bytes
    end: int
    snapshot: Snapshot
    hard_state: HardState
    entries: list[Entry]


class Storage:
    """The disk of one voter, for one process at a time. `load` comes first; a save that comes before it loads."""

    def __init__(self, path: str | Path, identity: str) -> None:
        """Claim the folder, or make it. Raises AlreadyRunning, StorageFailed, and ValueError for a long identity."""
        if len(identity.encode()) > _LONGEST_IDENTITY:
            raise ValueError(f"an identity has at most {_LONGEST_IDENTITY} bytes")
        self._folder = Path(path)
        self._identity = identity
        self._ended: BaseException | None = None
        self._loaded = False
        self._base = NOTHING
        self._entries: list[Entry] = []
        self._hard_state = HardState()
        self._turn = 0
        with self._or_end():
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._unlock = weakref.finalize(self, os.close, descriptor)
            self._lock(descriptor)
            if (self._folder / "log").exists():
                self._open(os.open(self._folder / "log", os.O_RDWR))
            else:
                self._begin_file(None)
                sync_folder(self._folder.parent)

    def load(self) -> Saved | None:
        """All that was saved; None before the first save. Raises StorageCorrupt, IdentityMismatch, StorageFailed."""
        with self._or_end():
            content = (self._folder / "log").read_bytes()
            header = _read_header(content)
            if header.identity != self._identity:
                raise IdentityMismatch(f"this is the data of {header.identity!r}, not of {self._identity!r}")
            found = _read_records(content)
            if found.count < header.acknowledged:
                raise StorageCorrupt(
                    f"record {found.count + 1} of the {header.acknowledged} acknowledged is damaged; "
                    "let this voter rejoin on an empty disk under a new id"
                )
            self._base = Snapshot(found.snapshot.index, found.snapshot.term, found.snapshot.members)
            self._entries = found.entries
            self._hard_state = header.hard_state if found.count == header.acknowledged else found.hard_state
            self._turn, self._count, self._digest = header.turn, found.count, found.digest
            self._end, self._room = found.end, len(content)
            self._loaded = True
            is_torn = content[:_COPY_BYTES] != content[_COPY_BYTES:_HEADER_BYTES]
            if is_torn or found.count > header.acknowledged:
                # Of the header one copy is left, which the next cut could tear as well. Or a record's fsync failed
                # or never came, so that it is in the system's memory alone, and whoever loads it will act on it: all
                # is written once more, where no page passes for clean.
                self._begin_file(found.snapshot if found.count else None)
            if not found.count and self._hard_state == HardState():
                return None
            return Saved(found.snapshot, self._hard_state, tuple(self._entries))

    def save(self, ready: Ready) -> None:
        """Durable on return, but for a lone hard state without `must_sync`, which the next durable save takes along.

        Raises ValueError, having done nothing, for entries that leave a gap or that a snapshot covers; StorageFailed.
        """
        self._load_once()
        hard_state = ready.hard_state or self._hard_state
        snapshot = ready.snapshot
        if snapshot is not None and snapshot.index < self._base.index:
            snapshot = None  # an old one never moves anything back
        if snapshot is not None:
            self._replace(hard_state, snapshot, self._beyond(snapshot), ready.entries)
        elif ready.must_sync or ready.entries:
            self._append(hard_state, ready.entries)
        elif ready.hard_state is not None:
            with self._or_end():
                self._hard_state = hard_state
                self._write_header()

    def compact(self, snapshot: Snapshot) -> None:
        """Store the snapshot, drop the entries up to its index and keep the later ones. Backwards does nothing."""
        self._load_once()
        if snapshot.index >= self._base.index:
            self._replace(self._hard_state, snapshot, self._entries[snapshot.index - self._base.index :], ())

    def close(self) -> None:
        """Make the rest durable and let go of the folder; whatever is called after that raises. Twice is once."""
        if self._ended is not None:
            return
        with self._or_end():
            if self._loaded:
                os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        self._end_with(StorageFailed("the storage is closed"))

    def _beyond(self, snapshot: Snapshot) -> Sequence[Entry]:
        """The entries that stay when a leader's snapshot comes: all later ones, if the log holds its last entry (7)."""
        place = snapshot.index - self._base.index
        if place > len(self._entries):
            return ()
        term = self._entries[place - 1].term if place else self._base.term
        return self._entries[place:] if term == snapshot.term else ()

    def _append(self, hard_state: HardState, entries: Sequence[Entry]) -> None:
        """One more record, durable and acknowledged."""
        place = _place(self._base.index, len(self._entries), entries)
        parts, digest = _record(self._digest, _body(hard_state, None, entries))
        record = b"".join(parts)
        end = self._end + len(record)
        with self._or_end():
            if end > self._room:
                self._room = -(-end // _ROOM_BYTES) * _ROOM_BYTES
                record = record.ljust(self._room - self._end, b"\0")
            _write(self._file, record, self._end)
            os.fdatasync(self._file)
            self._count, self._digest, self._end = self._count + 1, digest, end
            self._hard_state = hard_state
            self._entries[place:] = entries
            self._write_header()

    def _replace(self, hard_state: HardState, snapshot: Snapshot, kept: Sequence[Entry], new: Sequence[Entry]) -> None:
        """Begin anew with a snapshot, the entries kept beyond it, and new ones over these."""
        entries = [*kept[: _place(snapshot.index, len(kept), new)], *new] if new else list(kept)
        with self._or_end():
            self._base = Snapshot(snapshot.index, snapshot.term, snapshot.members)
            self._hard_state, self._entries = hard_state, entries
            self._begin_file(snapshot)

    def _begin_file(self, snapshot: Snapshot | None) -> None:
        """A new log of one record, everything there is, in the place of the old one; empty without a snapshot."""
        parts: list[bytes] = []
        self._digest, self._count = _ORIGIN, 0
        if snapshot is not None:
            parts, self._digest = _record(_ORIGIN, _body(self._hard_state, snapshot, self._entries))
            self._count = 1
        self._end = self._room = _HEADER_BYTES + sum(map(len, parts))
        self._open(os.open(self._folder / "log.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
        self._write_header()
        at = _HEADER_BYTES
        for part in parts:
            _write(self._file, part, at)
            at += len(part)
        os.fsync(self._file)
        os.replace(self._folder / "log.new", self._folder / "log")
        sync_folder(self._folder)

    def _write_header(self) -> None:
        self._turn += 1
        copy = _header(_Header(self._turn, self._count, self._hard_state, self._identity))
        _write(self._file, copy + copy, 0)

    def _load_once(self) -> None:
        if self._ended is not None:
            raise self._ended
        if not self._loaded:
            self.load()

    def _open(self, descriptor: int) -> None:
        """Write to this file from now on, and let go of the one before."""
        before = getattr(self, "_close_file", None)
        self._file = descriptor
        self._close_file = weakref.finalize(self, os.close, descriptor)
        if before is not None:
            before()

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise AlreadyRunning("this voter's storage is in use by another process") from None

    @contextmanager
    def _or_end(self) -> Iterator[None]:
        """A block that either comes to its end or is the last: after half a write nothing is known for certain."""
        if self._ended is not None:
            raise self._ended
        try:
            yield
        except OSError as error:
            failed = StorageFailed(f"this voter's disk failed ({error.strerror}); it is not tried again")
            self._end_with(failed)
            raise failed from error
        except BaseException as error:
            self._end_with(error if isinstance(error, NexusError) else StorageFailed("a save was interrupted"))
            raise

    def _end_with(self, reason: BaseException) -> None:
        self._ended = reason
        for let_go in (getattr(self, "_close_file", None), getattr(self, "_unlock", None)):
            if let_go is not None:
                let_go()


def _place(base: int, length: int, entries: Sequence[Entry]) -> int:
    """Where in a log of this length the first entry goes. Raises ValueError for a gap, and below the snapshot."""
    if not entries:
        return length
    first = entries[0].index
    if not base < first <= base + length + 1:
        raise ValueError(f"entry {first} does not follow a log that holds {base + 1} to {base + length}")
    if any(entry.index != first + offset for offset, entry in enumerate(entries)):
        raise ValueError(f"the entries from {first} on are not in order")
    return first - base - 1


def _header(header: _Header) -> bytes:
    """One copy, as long as a sector."""
    identity = header.identity.encode()
    state = header.hard_state
    fields = (header.turn, header.acknowledged, state.term, state.vote, state.commit, len(identity))
    content = _HEADER.pack(_MAGIC, *fields) + identity
    return (content + _digest(content)).ljust(_COPY_BYTES, b"\0")


def _read_header(content: bytes) -> _Header:
    """The later of the sound copies. Raises StorageCorrupt."""
    copies = []
    for start in (0, _COPY_BYTES):
        copy = content[start : start + _COPY_BYTES]
        if len(copy) < _COPY_BYTES:
            break
        magic, turn, acknowledged, term, vote, commit, length = _HEADER.unpack_from(copy)
        end = _HEADER.size + length
        if magic == _MAGIC and copy[end : end + _DIGEST_BYTES] == _digest(copy[:end]):
            identity = copy[_HEADER.size : end].decode()
            copies.append(_Header(turn, acknowledged, HardState(term, vote, commit), identity))
    if not copies:
        raise StorageCorrupt("the header of the log is damaged; let this voter rejoin on an empty disk under a new id")
    return max(copies, key=lambda header: header.turn)


def _record(before: bytes, body: Sequence[bytes]) -> tuple[list[bytes], bytes]:
    """The parts of a record, and the digest that the next one builds on."""
    length = sum(map(len, body))
    digest = _digest(_RECORD.pack(length, before), *body)
    return [_RECORD.pack(length, digest), *body], digest


def _read_records(content: bytes) -> _Records:
    """Follow the chain from the first record up to where it breaks."""
    count, digest, end = 0, _ORIGIN, _HEADER_BYTES
    snapshot, hard_state = NOTHING, HardState()
    entries: list[Entry] = []
    view = memoryview(content)
    while end + _RECORD.size <= len(content):
        length, claimed = _RECORD.unpack_from(content, end)
        body = view[end + _RECORD.size : end + _RECORD.size + length]
        if len(body) < length or _digest(_RECORD.pack(length, digest), body) != claimed:
            break
        hard_state, replaced, new = _read_body(body)
        if replaced is not None:
            snapshot, entries = replaced, []
        entries[_place(snapshot.index, len(entries), new) :] = new
        count, digest, end = count + 1, claimed, end + _RECORD.size + length
    return _Records(count, digest, end, snapshot, hard_state, entries)


def _body(hard_state: HardState, snapshot: Snapshot | None, entries: Sequence[Entry]) -> list[bytes]:
    """In parts: a snapshot's data is large, and is copied nowhere on its way to the file."""
    first = _BODY.pack(hard_state.term, hard_state.vote, hard_state.commit, snapshot is not None)
    data = b""
    if snapshot is not None:
        members, data = snapshot.members.to_bytes(), snapshot.data
        first += _SNAPSHOT.pack(snapshot.index, snapshot.term, len(members), len(data)) + members
    rest = []
    for entry in entries:
        rest += [_ENTRY.pack(entry.term, entry.index, entry.kind.value, len(entry.data)), entry.data]
    return [first, data, b"".join(rest)]


def _read_body(body: memoryview) -> tuple[HardState, Snapshot | None, list[Entry]]:
    term, vote, commit, has_snapshot = _BODY.unpack_from(body)
    at = _BODY.size
    snapshot = None
    if has_snapshot:
        index, its_term, length, size = _SNAPSHOT.unpack_from(body, at)
        at += _SNAPSHOT.size
        members = Members.from_bytes(bytes(body[at : at + length]))
        snapshot = Snapshot(index, its_term, members, bytes(body[at + length : at + length + size]))
        at += length + size
    entries = []
    while at < len(body):
        its_term, index, kind, size = _ENTRY.unpack_from(body, at)
        at += _ENTRY.size
        entries.append(Entry(its_term, index, bytes(body[at : at + size]), EntryKind(kind)))
        at += size
    return HardState(term, vote, commit), snapshot, entries


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _write(descriptor: int, content: bytes, offset: int) -> None:
    """All of it: one call may write less when the disk fills up."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
