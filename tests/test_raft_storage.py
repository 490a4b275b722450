"""What a voter's disk gives back: after any order of saves, a crash at any byte, a power cut, any flipped bit."""

import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.raft import Entry, EntryKind, HardState, Members, Ready, Saved, Snapshot
from cluster.raft.storage import IdentityMismatch, Storage, StorageCorrupt, StorageFailed
from nexus.errors import AlreadyRunning

MEMBERS = Members(frozenset({1, 2, 3}), frozenset({4}))
FIRST = Snapshot(0, 0, MEMBERS)
NOTHING, NO_STATE = Snapshot(0, 0, Members(frozenset())), HardState()
HEADER_BYTES = 1024
ROOT = Path(__file__).parent.parent


def ready(
    *entries: Entry, hard_state: HardState | None = None, snapshot: Snapshot | None = None, must_sync: bool = True
) -> Ready:
    return Ready(hard_state, snapshot, entries, (), (), (), None, must_sync)


def entry(index: int, term: int = 1, data: bytes = b"", kind: EntryKind = EntryKind.COMMAND) -> Entry:
    return Entry(term, index, data or b"%d of term %d" % (index, term), kind)


def loaded(path: Path) -> Saved | None:
    """What a fresh process would find."""
    return Storage(path, "disk-1").load()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "voter"


@pytest.fixture
def storage(path: Path) -> Iterator[Storage]:
    """One that holds five entries of term 1 after the first members."""
    storage = Storage(path, "disk-1")
    storage.save(ready(snapshot=FIRST))
    storage.save(ready(*(entry(index) for index in range(1, 6)), hard_state=HardState(1, 2, 3)))
    yield storage
    storage.close()


@dataclass
class Model:
    """What a storage is meant to remember, the plain way."""

    snapshot: Snapshot = NOTHING
    hard_state: HardState = NO_STATE
    log: dict[int, Entry] = field(default_factory=dict)
    used: bool = False

    def save(self, done: Ready) -> None:
        self.used = self.used or bool(done.must_sync or done.entries or done.snapshot or done.hard_state)
        self.hard_state = done.hard_state or self.hard_state
        if done.snapshot is not None and done.snapshot.index >= self.snapshot.index:
            at = self.log.get(done.snapshot.index)
            term = at.term if at else self.snapshot.term if done.snapshot.index == self.snapshot.index else None
            self._put(done.snapshot, keep=term == done.snapshot.term)
        for new in done.entries:
            self.log = {index: old for index, old in self.log.items() if index < new.index} | {new.index: new}

    def compact(self, snapshot: Snapshot) -> None:
        if snapshot.index >= self.snapshot.index:
            self.used = True
            self._put(snapshot, keep=True)

    def _put(self, snapshot: Snapshot, keep: bool) -> None:
        self.snapshot = snapshot
        self.log = {index: old for index, old in self.log.items() if keep and index > snapshot.index}

    @property
    def last(self) -> int:
        return max(self.log, default=self.snapshot.index)

    def saved(self) -> Saved | None:
        if not self.used:
            return None
        return Saved(self.snapshot, self.hard_state, tuple(self.log[index] for index in sorted(self.log)))


@dataclass
class Disk:
    """What of a folder would survive a power cut: contents up to each file's last fsync, names up to the folder's."""

    folder: Path
    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def sync(self, descriptor: int) -> None:
        about = os.fstat(descriptor)
        if stat.S_ISREG(about.st_mode):
            self.contents[about.st_ino] = os.pread(descriptor, about.st_size, 0)
        elif self.folder.exists() and about.st_ino == self.folder.stat().st_ino:
            self.names = {file.name: file.stat().st_ino for file in self.folder.iterdir()}

    def after_power_cut(self, into: Path, header_landed: bool) -> None:
        """`header_landed`: what was written to the header since the last fsync happened to reach the disk."""
        into.mkdir()
        for name, inode in self.names.items():
            content = self.contents.get(inode, b"")
            there = self.folder / name
            if header_landed and content and there.stat().st_ino == inode:
                content = there.read_bytes()[:HEADER_BYTES] + content[HEADER_BYTES:]
            (into / name).write_bytes(content)


@contextmanager
def swapped(**functions: Callable[..., object]) -> Iterator[None]:
    """These functions of `os` instead of the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(os, name, function)
        yield


terms = st.integers(1, 3)
hard_states = st.builds(HardState, st.integers(0, 3), st.integers(0, 3), st.integers(0, 9))
payloads = st.one_of(st.binary(max_size=20), st.just(70_000).map(bytes))


class Saving(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.path = self.home / "voter"
        self.disk = Disk(self.path)
        self.model = Model()
        self.durable = self.model.saved()
        self.swap = swapped(fsync=self.disk.sync, fdatasync=self.disk.sync)
        self.swap.__enter__()
        self.storage = Storage(self.path, "disk-1")

    @rule(
        hard_state=st.none() | hard_states,
        back=st.integers(0, 3),
        new=st.lists(st.tuples(terms, payloads, st.sampled_from(EntryKind)), max_size=4),
        must_sync=st.booleans(),
    )
    def save(
        self, hard_state: HardState | None, back: int, new: list[tuple[int, bytes, EntryKind]], must_sync: bool
    ) -> None:
        first = max(self.model.snapshot.index, self.model.last - back) + 1
        entries = tuple(Entry(term, first + place, data, kind) for place, (term, data, kind) in enumerate(new))
        self._save(ready(*entries, hard_state=hard_state, must_sync=must_sync))

    @rule(hard_state=st.none() | hard_states, ahead=st.integers(-4, 2), term=terms, new=st.lists(payloads, max_size=2))
    def install(self, hard_state: HardState | None, ahead: int, term: int, new: list[bytes]) -> None:
        """A leader's snapshot, sometimes an old one; half of them agree with the log."""
        index = max(0, self.model.last + ahead)
        at = self.model.log.get(index)
        snapshot = Snapshot(index, at.term if at and len(new) == 1 else term, MEMBERS, b"state at %d" % index)
        after = Model(self.model.snapshot, log=dict(self.model.log))
        after.save(ready(snapshot=snapshot))
        entries = tuple(Entry(term, after.last + 1 + place, data) for place, data in enumerate(new))
        self._save(ready(*entries, hard_state=hard_state, snapshot=snapshot))

    @precondition(lambda self: self.model.used)
    @rule(back=st.integers(0, 5), data=payloads)
    def compact(self, back: int, data: bytes) -> None:
        index = max(0, self.model.last - back)
        at = self.model.log.get(index)
        snapshot = Snapshot(index, at.term if at else self.model.snapshot.term, MEMBERS, data)
        self.storage.compact(snapshot)
        self.model.compact(snapshot)
        self.durable = self.model.saved()

    @rule(closed=st.booleans())
    def reopen(self, closed: bool) -> None:
        if closed:
            self.storage.close()
        del self.storage
        self.storage = Storage(self.path, "disk-1")
        assert self.storage.load() == self.model.saved()

    def _save(self, done: Ready) -> None:
        self.storage.save(done)
        self.model.save(done)
        if done.must_sync:
            self.durable = self.model.saved()

    @invariant()
    def a_process_that_died_left_everything(self) -> None:
        copy = self.home / "copy"
        shutil.copytree(self.path, copy)
        assert loaded(copy) == self.model.saved()
        shutil.rmtree(copy)

    @invariant()
    def a_power_cut_leaves_what_had_to_be_durable(self) -> None:
        """All of it, but for hard states alone that came since: of these any may be the one found."""
        now = self.model.saved()
        for header_landed in (False, True):
            copy = self.home / "copy"
            self.disk.after_power_cut(copy, header_landed)
            found = loaded(copy)
            shutil.rmtree(copy)
            if found != self.durable:
                assert found and now and (found.snapshot, found.entries) == (now.snapshot, now.entries)

    def teardown(self) -> None:
        self.storage.close()
        self.swap.__exit__(None, None, None)
        shutil.rmtree(self.home)


TestSaving = Saving.TestCase
TestSaving.settings = settings(
    max_examples=25, stateful_step_count=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_a_new_folder_holds_nothing_but_its_identity(path: Path) -> None:
    assert loaded(path / "made" / "on the way") is None
    with pytest.raises(IdentityMismatch, match=r"'disk-1', not of 'disk-2'"):
        Storage(path / "made" / "on the way", "disk-2").load()


def test_another_disk_neither_reads_nor_writes(storage: Storage, path: Path) -> None:
    storage.close()
    before = (path / "log").read_bytes()
    for act in (Storage.load, lambda other: other.save(ready(entry(6))), lambda other: other.compact(FIRST)):
        with pytest.raises(IdentityMismatch):
            act(Storage(path, "disk-2"))
    assert (path / "log").read_bytes() == before


def test_a_snapshot_drops_what_its_leader_does_not_share(storage: Storage, path: Path) -> None:
    storage.save(ready(snapshot=Snapshot(3, 2, MEMBERS)))
    assert loaded(path) == Saved(Snapshot(3, 2, MEMBERS), HardState(1, 2, 3), ())


def test_a_snapshot_keeps_what_its_leader_shares(storage: Storage, path: Path) -> None:
    storage.save(ready(snapshot=Snapshot(3, 1, MEMBERS)))
    assert loaded(path) == Saved(Snapshot(3, 1, MEMBERS), HardState(1, 2, 3), (entry(4), entry(5)))


def test_an_old_snapshot_moves_nothing_back(storage: Storage, path: Path) -> None:
    storage.compact(Snapshot(3, 1, MEMBERS))
    storage.save(ready(snapshot=Snapshot(2, 1, MEMBERS)))
    storage.compact(Snapshot(2, 1, MEMBERS))
    assert loaded(path) == Saved(Snapshot(3, 1, MEMBERS), HardState(1, 2, 3), (entry(4), entry(5)))


def test_entries_replace_all_that_stood_from_the_first_of_them_on(storage: Storage, path: Path) -> None:
    storage.save(ready(entry(3, term=2)))
    found = loaded(path)
    assert found and found.entries == (entry(1), entry(2), entry(3, term=2))
    with pytest.raises(ValueError, match="entry 5"):
        storage.save(ready(entry(5, term=2)))
    storage.compact(Snapshot(2, 1, MEMBERS))
    found = loaded(path)
    assert found and found.entries == (entry(3, term=2),)


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param((entry(7),), id="a gap"),
        pytest.param((entry(6), entry(8)), id="a gap inside"),
        pytest.param((entry(0),), id="below the snapshot"),
    ],
)
def test_entries_that_cannot_follow_are_refused_and_do_no_harm(
    storage: Storage, path: Path, entries: tuple[Entry, ...]
) -> None:
    before = loaded(path)
    with pytest.raises(ValueError, match="entr"):
        storage.save(ready(*entries, hard_state=HardState(9, 1, 1)))
    with pytest.raises(ValueError, match="entr"):
        storage.save(ready(*entries, Entry(1, 99), snapshot=Snapshot(5, 1, MEMBERS)))
    assert loaded(path) == before
    storage.save(ready(entry(6)))


def test_a_save_costs_one_fsync_and_a_lone_hard_state_none(storage: Storage) -> None:
    synced: list[int] = []
    with swapped(fsync=synced.append, fdatasync=synced.append):
        storage.save(ready(entry(6), hard_state=HardState(1, 2, 5)))
        assert len(synced) == 1
        storage.save(ready(hard_state=HardState(1, 2, 6), must_sync=False))
        assert len(synced) == 1
        storage.save(ready(hard_state=HardState(2, 3, 6)))
        assert len(synced) == 2


def test_a_large_snapshot_does_not_weigh_on_the_saves_after_it(storage: Storage, path: Path) -> None:
    storage.compact(Snapshot(4, 1, MEMBERS, random.Random(1).randbytes(8 * 2**20)))
    written: list[int] = []
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        written.append(len(data))
        return real(descriptor, data, offset)

    with swapped(pwrite=pwrite):
        for index in range(6, 36):
            storage.save(ready(entry(index)))
    assert sum(written) < 30 * 2**11 + 2**17
    found = loaded(path)
    assert found and len(found.snapshot.data) == 8 * 2**20 and found.entries[-1] == entry(35)


# Flipped bits, and bytes that are gone


def small_store(path: Path) -> Saved:
    """Every kind of record, and a hard state that only the header holds."""
    storage = Storage(path, "disk-1")
    storage.save(ready(snapshot=FIRST))
    storage.save(ready(entry(1), entry(2), hard_state=HardState(1, 1, 0)))
    storage.compact(Snapshot(1, 1, MEMBERS, b"one"))
    storage.save(ready(entry(3, 2, kind=EntryKind.CHANGE), hard_state=HardState(2, 3, 1)))
    storage.save(ready(entry(3, 3), hard_state=HardState(3, 1, 1)))
    storage.save(ready(entry(4, 3), hard_state=HardState(3, 1, 2)))
    storage.save(ready(hard_state=HardState(3, 1, 3), must_sync=False))
    expected = loaded(path)
    assert expected == Saved(Snapshot(1, 1, MEMBERS, b"one"), HardState(3, 1, 3), (entry(2), entry(3, 3), entry(4, 3)))
    return expected


def put(file: Path, content: bytes) -> None:
    """A new file each time: to empty an old one and write it again makes some file systems wait for their disk."""
    file.unlink()
    file.write_bytes(content)


def flip(file: Path, bit: int) -> None:
    with file.open("r+b", buffering=0) as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def check_flips(path: Path, bits: Iterator[tuple[Path, int]], expected: Saved) -> int:
    """How many of the flips were refused; the others changed nothing."""
    refused = 0
    content = (path / "log").read_bytes()
    for file, bit in bits:
        flip(file, bit)
        flipped = file.read_bytes()
        try:
            assert loaded(path) == expected, f"bit {bit} of {file.name}"
        except StorageCorrupt as error:
            refused += 1
            assert ("record" in error.message or "header" in error.message) and str(path) not in error.message
            assert file.read_bytes() == flipped, "what is damaged stays as it was found"
        if file.read_bytes() == flipped:
            flip(file, bit)
        else:
            put(file, content)
    return refused


def all_bits(path: Path) -> list[tuple[Path, int]]:
    return [(file, bit) for file in sorted(path.iterdir()) for bit in range(8 * file.stat().st_size)]


def test_any_flipped_bit_of_a_closed_store_is_refused_or_harmless(path: Path) -> None:
    expected = small_store(path)
    closing = Storage(path, "disk-1")
    closing.load()
    closing.close()
    records = (path / "log").stat().st_size - HEADER_BYTES
    assert 0 < records < 1000
    with swapped(fsync=lambda _: None):
        assert check_flips(path, iter(all_bits(path)), expected) == 8 * records


def test_any_flipped_bit_under_a_process_that_was_killed_is_refused_or_harmless(path: Path) -> None:
    expected = small_store(path)
    bits = all_bits(path)
    sample = [*random.Random(2).sample(bits, 400), *random.Random(3).sample(bits[: 8 * 1500], 800)]
    with swapped(fsync=lambda _: None):
        assert check_flips(path, iter(sample), expected) > 100


def test_an_acknowledged_tail_that_is_gone_is_corruption(path: Path) -> None:
    expected = small_store(path)
    content = (path / "log").read_bytes()
    end = len(content.rstrip(b"\0"))
    for kept in range(end):
        for rest in (b"", bytes(len(content) - kept)):
            put(path / "log", content[:kept] + rest)
            if (content[:kept] + rest) == content:
                continue
            with pytest.raises(StorageCorrupt):
                loaded(path)
    (path / "log").write_bytes(content[:end])
    assert loaded(path) == expected


def test_a_sound_record_in_the_place_of_another_is_corruption(storage: Storage, path: Path) -> None:
    ends = [len((path / "log").read_bytes().rstrip(b"\0"))]
    for data in (b"a", b"b"):
        storage.save(ready(entry(6, data=data)))
        ends.append(len((path / "log").read_bytes().rstrip(b"\0")))
    storage.close()
    content = (path / "log").read_bytes()
    start, middle, end = ends
    assert middle - start == end - middle
    (path / "log").write_bytes(content[:start] + content[middle:end] + content[start:middle])
    with pytest.raises(StorageCorrupt, match="record 3 of the 4"):
        loaded(path)


def test_what_is_damaged_stays_closed(storage: Storage, path: Path) -> None:
    storage.close()
    content = bytearray((path / "log").read_bytes())
    content[-1] ^= 1
    (path / "log").write_bytes(content)
    damaged = Storage(path, "disk-1")
    for act in (damaged.load, lambda: damaged.save(ready(entry(6))), lambda: damaged.compact(FIRST), damaged.load):
        with pytest.raises(StorageCorrupt, match="record 2 of the 2"):
            act()
    with pytest.raises(StorageCorrupt):
        Storage(path, "disk-1").save(ready(entry(6)))
    assert (path / "log").read_bytes() == content


# Crashes


class Crash(BaseException):
    """The process is gone."""


@contextmanager
def crashing(after: int) -> Iterator[Callable[[], int]]:
    """The process dies after so many moments: every byte written (of the header every 37th), every other call.

    Yields how many are left.
    """
    left = after
    real_write, real_replace = os.pwrite, os.replace

    def spend(wanted: int) -> int:
        nonlocal left
        granted = min(wanted, left)
        left -= granted
        return granted

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        grain = 37 if offset == 0 else 1
        granted = min(spend(-(-len(data) // grain)) * grain, len(data))
        real_write(descriptor, data[:granted], offset)
        if granted < len(data):
            raise Crash
        return granted

    def sync(_: int) -> None:
        if not spend(1):
            raise Crash

    def replace(source: Path, target: Path) -> None:
        if not spend(1):
            raise Crash
        real_replace(source, target)

    with swapped(pwrite=pwrite, fsync=sync, fdatasync=sync, replace=replace):
        yield lambda: left


@pytest.mark.parametrize(
    ("act", "room"),
    [
        pytest.param(
            lambda s: s.save(ready(entry(5, 2), entry(6, 2), hard_state=HardState(2, 1, 4))), True, id="append"
        ),
        pytest.param(lambda s: s.save(ready(hard_state=HardState(1, 2, 5), must_sync=False)), True, id="hard state"),
        pytest.param(lambda s: s.save(ready(snapshot=Snapshot(9, 2, MEMBERS, b"nine"))), True, id="install"),
        pytest.param(lambda s: s.compact(Snapshot(3, 1, MEMBERS, b"three")), True, id="compact"),
        pytest.param(lambda s: s.save(ready(entry(6))), False, id="append that makes room"),
    ],
)
def test_a_crash_at_any_byte_leaves_all_or_nothing_of_the_last_write(
    storage: Storage, path: Path, tmp_path: Path, act: Callable[[Storage], None], room: bool
) -> None:
    if not room:
        storage.close()
    before = loaded(path)
    whole = tmp_path / "whole"
    shutil.copytree(path, whole)
    total = 2**20
    with crashing(total) as left:
        act(Storage(whole, "disk-1"))
        total -= left()
    after = loaded(whole)
    assert before != after
    seen = set()
    moments = range(total) if room else [*range(200), *range(200, total, 997)]
    for moment in moments:
        torn = tmp_path / "torn"
        shutil.copytree(path, torn)
        with pytest.raises(Crash), crashing(moment):
            act(Storage(torn, "disk-1"))
        with swapped(fsync=lambda _: None, fdatasync=lambda _: None):
            found = loaded(torn)
            assert found in (before, after), f"after {moment} of {total}"
            seen.add(found == after)
            again = Storage(torn, "disk-1")
            last = found.entries[-1].index if found.entries else found.snapshot.index
            again.save(ready(entry(last + 1, 7)))
            more = loaded(torn)
            assert more and more.entries == (*found.entries, entry(last + 1, 7))
        shutil.rmtree(torn)
    assert seen == {False, True}


def test_the_mark_is_not_ahead_of_the_records(storage: Storage, path: Path) -> None:
    """A power cut may lose the last mark, not the record before it; and what was read of it is acknowledged then."""
    old_header = (path / "log").read_bytes()[:HEADER_BYTES]
    storage.save(ready(entry(6), hard_state=HardState(1, 2, 4)))
    content = old_header + (path / "log").read_bytes()[HEADER_BYTES:]
    (path / "log").write_bytes(content)
    found = loaded(path)
    assert found and (found.entries[-1], found.hard_state) == (entry(6), HardState(1, 2, 4))
    content = (path / "log").read_bytes()
    (path / "log").write_bytes(content[:-1])
    with pytest.raises(StorageCorrupt):
        loaded(path)


CHILD = """
import sys
from cluster.raft import Entry, HardState, Members, Ready, Snapshot
from cluster.raft.storage import Storage
path, limit = sys.argv[1:]
if int(limit):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
storage = Storage(path, "disk-1")
saved = storage.load()
if saved is None:
    storage.save(Ready(None, Snapshot(0, 0, Members(frozenset({1}))), (), (), (), (), None, True))
    saved = storage.load()
last = saved.snapshot.index + len(saved.entries)
print("ready", flush=True)
sys.stdin.readline()
try:
    while True:
        last += 1
        places = range(max(last - last % 2, 1), last + 1)
        entries = tuple(Entry(1, place, b"%d" % place * (place % 97)) for place in places)
        if last % 37 == 0 and not int(limit):
            storage.compact(Snapshot(last - 9, 1, Members(frozenset({1})), b"%d" % (last - 9) * 500))
        storage.save(Ready(HardState(1, 1, last - 1), None, entries, (), (), (), None, True))
        print(last, flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
    try:
        storage.save(Ready(HardState(1, 1, last), None, (), (), (), (), None, False))
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


@contextmanager
def child(path: Path, limit: int = 0) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(limit)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def check_child(path: Path, acknowledged: int) -> int:
    found = loaded(path)
    assert found is not None
    last = found.snapshot.index + len(found.entries)
    assert last >= acknowledged and found.hard_state.commit >= acknowledged - 1
    if found.snapshot.index:
        assert found.snapshot.data == b"%d" % found.snapshot.index * 500
    for place, one in enumerate(found.entries, found.snapshot.index + 1):
        assert one == Entry(1, place, b"%d" % place * (place % 97))
    return last


def test_whoever_is_killed_finds_all_that_it_acknowledged(path: Path) -> None:
    rng = random.Random(4)
    for _ in range(20):
        with child(path) as process:
            go(process)
            assert process.stdout
            for _ in range(rng.randrange(1, 60)):
                acknowledged = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().split("\n")
            acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])
        assert check_child(path, acknowledged) >= acknowledged


def test_a_file_that_may_not_grow_ends_the_storage_and_loses_nothing(path: Path) -> None:
    with child(path, limit=100_000) as process:
        go(process)
        output = process.communicate(timeout=60)[0].split()
    assert output[-2:] == ["StorageFailed", "StorageFailed"]
    check_child(path, int(output[-3]))
    Storage(path, "disk-1").save(ready(hard_state=HardState(2, 1, 1)))


def test_a_second_process_is_refused_until_the_first_is_gone(path: Path) -> None:
    with child(path), pytest.raises(AlreadyRunning, match="another process"):
        Storage(path, "disk-1")
    assert loaded(path) == Saved(Snapshot(0, 0, Members(frozenset({1}))))


def failing(error: int, times: int = 1) -> Callable[..., object]:
    """Fails once, and would succeed afterwards: the disk that says all is well the second time."""

    def call(*_: object) -> None:
        nonlocal times
        times -= 1
        if times >= 0:
            raise OSError(error, os.strerror(error))

    return call


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(
    ("function", "act"),
    [
        pytest.param(
            "fdatasync", lambda s: s.save(ready(entry(6), hard_state=HardState(1, 2, 4))), id="fsync of a save"
        ),
        pytest.param("pwrite", lambda s: s.save(ready(entry(6), hard_state=HardState(1, 2, 4))), id="write of a save"),
        pytest.param(
            "pwrite", lambda s: s.save(ready(hard_state=HardState(1, 2, 4), must_sync=False)), id="hard state"
        ),
        pytest.param("fsync", lambda s: s.compact(Snapshot(2, 1, MEMBERS)), id="fsync of a snapshot"),
        pytest.param("replace", lambda s: s.compact(Snapshot(2, 1, MEMBERS)), id="rename of a snapshot"),
        pytest.param("fsync", lambda s: s.close(), id="close"),
    ],
)
def test_a_failed_write_ends_the_storage(
    storage: Storage, path: Path, function: str, error: int, act: Callable[[Storage], None]
) -> None:
    before = loaded(path)
    assert before
    with swapped(**{function: failing(error)}):
        with pytest.raises(StorageFailed) as told:
            act(storage)
        assert str(path) not in told.value.message
        for later in (
            storage.load,
            lambda: storage.save(ready(entry(6))),
            lambda: storage.save(ready(hard_state=HardState(), must_sync=False)),
            lambda: storage.compact(Snapshot(3, 1, MEMBERS)),
        ):
            with pytest.raises(StorageFailed):
                later()
    storage.close()
    found = loaded(path)
    assert found and found.entries[-1].index in (5, 6) and {*found.entries} >= {*before.entries[2:]}


def test_a_write_that_came_before_a_failed_fsync_is_written_anew(storage: Storage, path: Path) -> None:
    """After a failed fsync the system may show what the disk does not hold; acting on it would be a promise."""
    with swapped(fdatasync=failing(errno.EIO)), pytest.raises(StorageFailed):
        storage.save(ready(entry(6)))
    disk = Disk(path)
    with swapped(fsync=disk.sync, fdatasync=disk.sync):
        found = loaded(path)
    disk.after_power_cut(path.parent / "cut", header_landed=False)
    assert found and found.entries[-1] == entry(6) and loaded(path.parent / "cut") == found


def test_a_disk_that_is_full_when_the_folder_is_made_can_be_tried_again(path: Path) -> None:
    for function in ("pwrite", "fsync", "replace"):
        with swapped(**{function: failing(errno.ENOSPC)}), pytest.raises(StorageFailed, match="No space"):
            Storage(path, "disk-1")
    assert loaded(path) is None


def test_after_close_nothing_is_done(storage: Storage, path: Path) -> None:
    storage.close()
    storage.close()
    with pytest.raises(StorageFailed, match="closed"):
        storage.save(ready(entry(6)))
    with pytest.raises(StorageFailed, match="closed"):
        storage.load()
    assert (path / "log").stat().st_size < 2000


def test_an_identity_fits_its_sector(path: Path) -> None:
    Storage(path, "x" * 256).close()
    with pytest.raises(ValueError, match="256"):
        Storage(path, "x" * 257)


def test_a_large_snapshot_is_copied_nowhere_on_its_way_to_the_disk(storage: Storage, path: Path) -> None:
    """A voter writes one every so often, and what it takes meanwhile its process keeps."""
    snapshot = Snapshot(3, 1, MEMBERS, os.urandom(2**24))
    tracemalloc.start()
    try:
        storage.compact(snapshot)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(snapshot.data) / 4
    storage.close()
    saved = loaded(path)
    assert saved is not None and saved.snapshot == snapshot
    assert [entry.index for entry in saved.entries] == [4, 5]
