"""The audit record: one sealed chain, whoever writes; any change of it is found and named (security.md, Q12 and Q4)."""

import csv
import errno
import json
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus import audit
from nexus.audit import Chain, Event, Recorder, files_of
from nexus.audit_reading import Fault, read, to_csv, verify
from nexus.errors import ConfigError, NotFound, Unavailable


def event(number: int = 0, **fields: object) -> Event:
    return Event("answer", action="POST /rag/query", request_id=f"r{number}", **fields)  # type: ignore[arg-type]


def chain_of(home: Path, lines: int, file_bytes: int = audit.DEFAULT_FILE_BYTES) -> Chain:
    """A record of so many lines, ended properly."""
    chain = Chain(home, file_bytes)
    for number in range(lines):
        chain.append([event(number)])
    chain.sync()
    return chain


def edit(home: Path, change: Callable[[list[bytes]], object], file: int = 0) -> None:
    """Change the lines of one file, each with its end."""
    path = files_of(home)[file]
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


def named(faults: Sequence[Fault]) -> list[tuple[str, str, int]]:
    return [(fault.what, fault.file, fault.line) for fault in faults]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Twelve good lines."""
    home = tmp_path_factory.mktemp("whole")
    chain_of(home, 12)
    return files_of(home)[0].read_bytes().splitlines(keepends=True)


# ── the chain ───────────────────────────────────────────────────────────────────────────────────


def test_what_was_recorded_is_read_again_in_order(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.append([event(1, tenant="acme", subject="alice", documents=("d1", "d2"), model="m", status=200)])
    chain.append([event(2)], durable=True)
    first, second = read(tmp_path)
    assert (first["seq"], second["seq"]) == (1, 2)
    assert (first["tenant"], first["documents"], first["status"]) == ("acme", ["d1", "d2"], 200)
    assert "reason" not in first
    report = verify(tmp_path)
    assert (report.lines, report.faults, report.notes, report.head.sequence) == (2, (), (), 2)


def test_the_chain_goes_on_across_files_and_starts(tmp_path: Path) -> None:
    for _ in range(3):
        chain_of(tmp_path, 4, file_bytes=400)
    assert len(files_of(tmp_path)) == 6
    report = verify(tmp_path)
    assert (report.lines, report.files, report.faults) == (12, 6, ())
    assert [line["seq"] for line in read(tmp_path)] == list(range(1, 13))


def test_a_day_has_a_file_of_its_own(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 1)
    (file,) = files_of(tmp_path)
    os.utime(file, (file.stat().st_mtime - audit.DAY,) * 2)
    chain.append([event()])
    assert len(files_of(tmp_path)) == 2
    assert verify(tmp_path).faults == ()


def test_fields_are_bounded(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.append([event(reason="x" * 10_000, documents=["y" * 10_000] * 2000, question="z" * 100_000)], durable=True)
    (line,) = read(tmp_path)
    assert (len(line["reason"]), len(line["documents"]), len(line["question"])) == (512, 1000, 65_536)
    chain.append([event()], durable=True)
    assert verify(tmp_path).faults == ()
    Chain(tmp_path).append([event()], durable=True)  # finds a last line behind one that is longer than it looks back
    assert [line["seq"] for line in read(tmp_path)] == [1, 2, 3]


# ── Q12: whatever is done to it is found, and named ─────────────────────────────────────────────


@pytest.mark.parametrize("place", [0, 5, 11])
def test_Q12_an_altered_line_is_named(tmp_path: Path, place: int) -> None:
    chain_of(tmp_path, 12)
    edit(tmp_path, lambda lines: lines.__setitem__(place, lines[place].replace(b"/rag/query", b"/rag/QUERY")))
    assert named(verify(tmp_path).faults) == [("edited", "000000000001.jsonl", place + 1)]


@pytest.mark.parametrize("place", [0, 5])
def test_Q12_a_deleted_line_is_named_where_it_was(tmp_path: Path, place: int) -> None:
    chain_of(tmp_path, 12)
    edit(tmp_path, lambda lines: lines.pop(place))
    assert named(verify(tmp_path).faults) == [("missing", "000000000001.jsonl", place + 1)]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_Q12_a_cut_end_is_found_by_the_head(tmp_path: Path, cut: int) -> None:
    chain_of(tmp_path, 12)
    edit(tmp_path, lambda lines: lines.__delitem__(slice(-cut, None)))
    report = verify(tmp_path)
    assert named(report.faults) == [("missing", "000000000001.jsonl", 13 - cut)]
    assert f"{cut} of the lines {13 - cut} to 12" in report.faults[0].detail


def test_Q12_a_deleted_file_is_named_by_what_follows_it(tmp_path: Path) -> None:
    chain_of(tmp_path, 6, file_bytes=400)
    files = files_of(tmp_path)
    files[1].unlink()
    (fault,) = verify(tmp_path).faults
    assert (fault.what, fault.file, fault.line) == ("missing", files[2].name, 1)
    for file in files_of(tmp_path):
        file.unlink()
    assert [fault.what for fault in verify(tmp_path).faults] == ["missing"]


def test_Q12_reordered_lines_are_named(tmp_path: Path) -> None:
    chain_of(tmp_path, 12)
    edit(tmp_path, lambda lines: lines.insert(8, lines.pop(3)))
    assert named(verify(tmp_path).faults) == [("moved", "000000000001.jsonl", 9)]


def test_Q12_a_repeated_line_is_named(tmp_path: Path) -> None:
    chain_of(tmp_path, 12)
    edit(tmp_path, lambda lines: lines.insert(8, lines[3]))
    assert named(verify(tmp_path).faults) == [("repeated", "000000000001.jsonl", 9)]


def test_Q12_a_line_forged_without_the_key_is_named_however_well_it_is_chained(tmp_path: Path) -> None:
    chain_of(tmp_path, 3)
    before = files_of(tmp_path)[0].read_bytes().splitlines()[-1]
    values = {"kind": "answer", "seq": 4, "at": 0, "before": audit.hash_of(before)}
    edit(tmp_path, lambda lines: lines.append(audit.seal(values, bytes(32)) + b"\n"))
    assert named(verify(tmp_path).faults) == [("forged", "000000000001.jsonl", 4)]


def test_Q12_a_whole_record_written_anew_without_the_key_is_named_line_by_line(tmp_path: Path) -> None:
    chain_of(tmp_path / "", 3)
    other = tmp_path / "other"
    other.mkdir()
    chain_of(other, 3)
    files_of(tmp_path)[0].write_bytes(files_of(other)[0].read_bytes())
    assert named(verify(tmp_path).faults) == [("edited", "000000000001.jsonl", line) for line in (1, 2, 3)]


def test_Q12_two_records_of_one_key_spliced_together_are_found(tmp_path: Path) -> None:
    """Who puts an older copy back and lets it go on has two lines of one number, both sealed."""
    chain_of(tmp_path, 3)
    kept = {file: file.read_bytes() for file in (tmp_path / "audit").iterdir()}
    chain_of(tmp_path, 2)
    others = files_of(tmp_path)[0].read_bytes().splitlines(keepends=True)
    for file, content in kept.items():
        file.write_bytes(content)
    chain_of(tmp_path, 3)
    edit(tmp_path, lambda lines: lines.__setitem__(3, others[3]))
    assert named(verify(tmp_path).faults) == [("forged", "000000000001.jsonl", 5)]


def test_Q12_a_head_that_is_gone_or_forged_is_found(tmp_path: Path) -> None:
    chain_of(tmp_path, 3)
    head = tmp_path / "audit" / "head.json"
    head.write_bytes(head.read_bytes().replace(b'"seq":3', b'"seq":2'))
    assert named(verify(tmp_path).faults) == [("head", "000000000001.jsonl", 4)]
    head.unlink()
    assert named(verify(tmp_path).faults) == [("head", "000000000001.jsonl", 4)]


def test_Q12_a_head_of_another_last_line_is_found(tmp_path: Path) -> None:
    chain_of(tmp_path, 3)
    kept = {file: file.read_bytes() for file in (tmp_path / "audit").iterdir()}
    chain_of(tmp_path, 1)
    head = tmp_path / "audit" / "head.json"
    other = head.read_bytes()
    for file, content in kept.items():
        file.write_bytes(content)
    chain = Chain(tmp_path)
    chain.append([event(9)], durable=True)
    assert verify(tmp_path).faults == ()
    head.write_bytes(other)
    assert named(verify(tmp_path).faults) == [("head", "000000000001.jsonl", 4)]


def test_Q12_a_head_is_no_line_and_a_line_no_head(tmp_path: Path) -> None:
    chain_of(tmp_path, 3)
    head = tmp_path / "audit" / "head.json"
    sealed = head.read_bytes()
    head.write_bytes(files_of(tmp_path)[0].read_bytes().splitlines()[1])
    assert [fault.what for fault in verify(tmp_path).faults] == ["head"]
    head.write_bytes(sealed)
    edit(tmp_path, lambda lines: lines.append(sealed + b"\n"))
    assert [fault.what for fault in verify(tmp_path).faults] == ["forged"]


def test_Q12_writing_on_after_a_cut_does_not_hide_it(tmp_path: Path) -> None:
    chain_of(tmp_path, 5)
    edit(tmp_path, lambda lines: lines.__delitem__(slice(3, None)))
    chain_of(tmp_path, 2)
    report = verify(tmp_path)
    assert {fault.what for fault in report.faults} == {"missing"}
    assert [line["seq"] for line in read(tmp_path)] == [1, 2, 3, 6, 7, 8]
    assert "lines 4 to 5 were gone" in [line.get("reason") for line in read(tmp_path)]


def test_Q12_a_cut_while_it_runs_is_found(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 5)
    (tmp_path / "audit" / "head.json").unlink()
    edit(tmp_path, lambda lines: lines.__delitem__(slice(3, None)))
    chain.append([event()], durable=True)
    assert {fault.what for fault in verify(tmp_path).faults} == {"missing", "head"}


def test_Q12_a_lost_head_is_not_forgotten_when_a_new_one_is_written(tmp_path: Path) -> None:
    chain_of(tmp_path, 5)
    (tmp_path / "audit" / "head.json").unlink()
    edit(tmp_path, lambda lines: lines.__delitem__(slice(3, None)))
    chain_of(tmp_path, 1)
    assert named(verify(tmp_path).faults) == [("head", "000000000001.jsonl", 4)]


def test_Q12_a_head_noted_elsewhere_unmasks_an_older_copy(tmp_path: Path) -> None:
    chain_of(tmp_path, 3)
    kept = {file: file.read_bytes() for file in (tmp_path / "audit").iterdir()}
    chain_of(tmp_path, 2)
    head = verify(tmp_path).head
    assert verify(tmp_path, (head.sequence, head.hash)).faults == ()
    for file, content in kept.items():
        file.write_bytes(content)
    assert verify(tmp_path).faults == ()
    assert [fault.what for fault in verify(tmp_path, (head.sequence, head.hash)).faults] == ["missing"]
    chain_of(tmp_path, 2)
    assert [fault.what for fault in verify(tmp_path, (head.sequence, "0" * 64)).faults] == ["forged"]


# ── any change at all ───────────────────────────────────────────────────────────────────────────


def check(home: Path, lines: Sequence[bytes]) -> list[Fault]:
    files_of(home)[0].write_bytes(b"".join(lines))
    return list(verify(home).faults)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """A home with so many lines, made once."""
    homes: dict[int, Path] = {}

    def home_of(lines: int) -> Path:
        if lines not in homes:
            homes[lines] = tmp_path_factory.mktemp(f"chain{lines}")
            chain_of(homes[lines], lines)
            (homes[lines] / "good").write_bytes(files_of(homes[lines])[0].read_bytes())
        return homes[lines]

    yield home_of


def good(home: Path) -> list[bytes]:
    return (home / "good").read_bytes().splitlines(keepends=True)


@given(st.data())
def test_Q12_any_changed_byte_of_any_line_is_named_there(written: Callable[[int], Path], data: st.DataObject) -> None:
    home = written(data.draw(st.integers(1, 12)))
    lines = good(home)
    place = data.draw(st.integers(0, len(lines) - 1))
    byte = data.draw(st.integers(0, len(lines[place]) - 2))
    other = data.draw(st.integers(0, 255).filter(lambda value: value not in (10, lines[place][byte])))
    lines[place] = lines[place][:byte] + bytes([other]) + lines[place][byte + 1 :]
    assert named(check(home, lines)) == [("edited", "000000000001.jsonl", place + 1)]


@given(st.data())
def test_Q12_any_lines_cut_out_are_named_where_they_were(written: Callable[[int], Path], data: st.DataObject) -> None:
    home = written(data.draw(st.integers(1, 12)))
    lines = good(home)
    first = data.draw(st.integers(0, len(lines) - 1))
    last = data.draw(st.integers(first, len(lines) - 1))
    del lines[first : last + 1]
    (fault,) = check(home, lines)
    assert (fault.what, fault.line) == ("missing", first + 1)
    assert f"{last - first + 1} of the lines {first + 1} to {last + 1}" in fault.detail


@given(st.data())
def test_Q12_any_two_lines_that_changed_places_are_named(written: Callable[[int], Path], data: st.DataObject) -> None:
    home = written(data.draw(st.integers(2, 12)))
    lines = good(home)
    one, two = data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True))
    lines[one], lines[two] = lines[two], lines[one]
    faults = check(home, lines)
    assert {fault.what for fault in faults} == {"moved"}
    found = {fault.line for fault in faults}
    if abs(one - two) > 2:
        assert found == {one + 1, two + 1}
    else:  # of two neighbours either is the one that is not in its place; three in reverse have no better reading
        assert found & {one + 1, two + 1} and found <= set(range(min(one, two) + 1, max(one, two) + 2))


@given(st.data())
def test_Q12_any_repeated_line_is_named(written: Callable[[int], Path], data: st.DataObject) -> None:
    home = written(data.draw(st.integers(1, 12)))
    lines = good(home)
    which, place = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines)))
    lines.insert(place, lines[which])
    (fault,) = check(home, lines)
    assert fault.what == "repeated"
    assert fault.line in ({place + 1} if place not in (which, which + 1) else {which + 1, which + 2})


@given(st.data())
def test_Q12_any_foreign_line_is_named(written: Callable[[int], Path], data: st.DataObject) -> None:
    home = written(data.draw(st.integers(1, 12)))
    lines = good(home)
    place = data.draw(st.integers(0, len(lines)))
    lines.insert(place, data.draw(st.binary(max_size=40).filter(lambda line: b"\n" not in line)) + b"\n")
    (fault,) = check(home, lines)
    assert (fault.what, fault.line) == ("forged", place + 1)


@given(st.data())
def test_Q12_several_changes_at_once_are_all_found(written: Callable[[int], Path], data: st.DataObject) -> None:
    home = written(12)
    lines = good(home)
    cut, edited = data.draw(st.lists(st.integers(0, 11), min_size=2, max_size=2, unique=True))
    lines[edited] = lines[edited].replace(b"answer", b"denied")
    del lines[cut]
    faults = check(home, lines)
    assert faults
    if abs(cut - edited) > 1:
        assert sorted(named(faults)) == sorted(
            [("edited", "000000000001.jsonl", edited + 1 - (cut < edited)), ("missing", "000000000001.jsonl", cut + 1)]
        )


# ── crashes, clocks, disks, company ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_Q12_a_line_that_a_crash_left_unfinished_is_repaired_and_noted(tmp_path: Path, kept: int) -> None:
    chain = chain_of(tmp_path, 2)
    sealed = (tmp_path / "audit" / "head.json").read_bytes()
    chain.append([event()], durable=True)
    (tmp_path / "audit" / "head.json").write_bytes(sealed)  # the crash came before it
    edit(tmp_path, lambda lines: lines.__setitem__(2, lines[2][:kept]))
    assert named(verify(tmp_path).faults) == [("unfinished", "000000000001.jsonl", 3)]
    chain_of(tmp_path, 1)
    report = verify(tmp_path)
    assert report.faults == ()
    assert [(note.line, "not finished" in note.detail) for note in report.notes] == [(3, True)]
    assert [line["kind"] for line in read(tmp_path)] == ["answer", "answer", "repaired", "answer"]


def test_Q12_the_time_never_goes_back_and_a_clock_that_does_is_noted(tmp_path: Path) -> None:
    times = iter([1000.0, 400.0, 1200.0])
    chain = Chain(tmp_path, clock=lambda: next(times))
    for number in range(3):
        chain.append([event(number)], durable=True)
    assert [(line["at"], line.get("clock")) for line in read(tmp_path)] == [(1000, None), (1000, 400), (1200, None)]
    report = verify(tmp_path)
    assert report.faults == ()
    assert [(note.line, note.detail) for note in report.notes] == [(2, "the clock had gone back by 600.000 s")]


def write_some(home: Path, who: int, lines: int) -> None:
    chain = Chain(home, file_bytes=4000)
    for number in range(lines):
        chain.append([event(number, subject=f"p{who}")], durable=number % 7 == 0)
    chain.sync()


def test_Q12_several_processes_and_threads_write_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_some, args=(tmp_path, who, 40)) for who in range(3)]
    for process in processes:
        process.start()
    recorder = Recorder(Chain(tmp_path, file_bytes=4000))
    for number in range(100):
        recorder.record(event(number, subject="thread"))
        if number % 10 == 0:
            recorder.write(event(number, subject="direct"))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    recorder.close()
    report = verify(tmp_path)
    assert (report.lines, report.faults, report.head.sequence) == (3 * 40 + 110, (), 230)
    by = [line["subject"] for line in read(tmp_path)]
    assert {who: by.count(who) for who in set(by)} == {"p0": 40, "p1": 40, "p2": 40, "thread": 100, "direct": 10}
    for who in ("p0", "p1", "p2", "thread"):
        numbers = [int(line["request_id"][1:]) for line in read(tmp_path) if line["subject"] == who]
        assert numbers == sorted(numbers)


def fill(home: Path, answers: "multiprocessing.Queue[object]") -> None:
    """Write until the file may grow no more, as on a full disk; then again when it may."""
    chain = Chain(home)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        for number in range(100):
            chain.append([event(number)], durable=True)
    except Unavailable as error:
        answers.put((number, error.code))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    chain.append([event(number)], durable=True)
    answers.put(number)


def test_Q12_a_full_disk_is_said_and_leaves_the_record_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[object] = context.Queue()
    process = context.Process(target=fill, args=(tmp_path, answers))
    process.start()
    first, second = answers.get(timeout=60), answers.get(timeout=60)
    process.join()
    answers.close()
    assert isinstance(first, tuple) and first == (second, "storage_full")
    report = verify(tmp_path)
    assert (report.faults, report.lines) == ((), first[0] + 1)


def test_Q12_what_waits_while_the_disk_is_full_is_written_when_it_is_not_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(Chain(tmp_path))
    write_all = audit.write_all
    monkeypatch.setattr(audit, "MOST_WAITING", 5)
    monkeypatch.setattr(audit, "write_all", no_space)
    for number in range(8):
        recorder.record(event(number))
    with pytest.raises(Unavailable) as caught:
        recorder.write(event())
    assert caught.value.code == "storage_full"
    assert recorder.fault is caught.value
    with pytest.raises(Unavailable):
        recorder.flush()
    monkeypatch.setattr(audit, "write_all", write_all)
    recorder.flush()
    assert recorder.fault is None
    recorder.close()
    assert [line.get("request_id", line.get("reason")) for line in read(tmp_path)] == [
        "r0", "r1", "r2", "r3", "r4", "3 events could not be kept",
    ]  # fmt: skip
    assert verify(tmp_path).faults == ()


def test_Q12_what_is_durable_is_on_the_disk_and_the_head_never_ahead_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a line has it: its bytes, then the name of a new file, then the head. Others come later."""
    chain, synced, fsync = Chain(tmp_path, file_bytes=700), list[str](), os.fsync

    def see(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def asked() -> tuple[list[str], int]:
        """What went to the disk since the last look, and what the head knows."""
        seen = synced.copy()
        synced.clear()
        return seen, audit.read_head(tmp_path, audit.read_key(tmp_path) or b"").sequence  # type: ignore[union-attr]

    monkeypatch.setattr(audit, "SYNC_SECONDS", float("inf"))
    monkeypatch.setattr(audit.os, "fsync", see)
    first, second = "000000000001.jsonl", "000000000004.jsonl"
    chain.append([event()], durable=True)
    assert asked() == ([first, "audit", "head.json.new"], 1)
    chain.append([event()])
    assert asked() == ([], 1)
    chain.sync()
    assert asked() == ([first, "head.json.new"], 2)
    chain.append([event(reason="x" * 400)])
    assert asked() == ([], 2)
    chain.append([event()])
    assert asked() == ([first, "audit"], 2)  # the file that ended, and the name of the next
    chain.append([event()], durable=True)
    assert asked() == ([second, "head.json.new"], 5)
    assert verify(tmp_path).faults == ()


def test_Q12_who_ends_writes_what_waits_and_seals_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "SYNC_SECONDS", 1e9)
    recorder = Recorder(Chain(tmp_path))
    recorder.record(event())
    recorder.close()
    head = audit.read_head(tmp_path, audit.read_key(tmp_path) or b"")
    assert head is not None and head.sequence == 1
    edit(tmp_path, lambda lines: lines.clear())
    assert [fault.what for fault in verify(tmp_path).faults] == ["missing"]


def no_space(descriptor: int, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_K6_a_key_that_others_may_read_or_that_is_gone_stops_the_start(tmp_path: Path) -> None:
    chain_of(tmp_path, 1)
    key = tmp_path / "audit-key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "audit").iterdir())
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Chain(tmp_path)
    key.unlink()
    with pytest.raises(ConfigError, match="gone"):
        Chain(tmp_path)
    with pytest.raises(NotFound):
        verify(tmp_path)
    with pytest.raises(NotFound):
        verify(tmp_path / "elsewhere")


# ── Q4: what callers send ends no line ──────────────────────────────────────────────────────────

NASTY = {
    "CR LF": 'x\r\n{"kind":"answer"}',
    "ANSI": "\x1b[2K\x1b[31mroot",
    "line separators": "a\u2028b\u2029c\x85d",
    "NUL": "a\0b",
    "lone surrogate": "a\udcffb",
    "right to left": "\u202egnp.exe",
    "quotes": '","seal":"' + "0" * 64 + '"}',
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_Q4_no_text_forges_a_line(tmp_path: Path, text: str) -> None:
    chain = Chain(tmp_path)
    chain.append([Event("answer", text, text, text, text, text, (text,), (text,), text, 200, text, text, text, text)])
    chain.append([event()], durable=True)
    raw = files_of(tmp_path)[0].read_bytes()
    assert raw.isascii() and raw.count(b"\n") == 2 and all(byte >= 32 or byte == 10 for byte in raw)
    first, _ = read(tmp_path)
    assert (first["subject"], first["documents"], first["question"]) == (text, [text], text)
    assert verify(tmp_path).faults == ()


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_LLM05_no_cell_of_the_export_is_a_formula(cell: str) -> None:
    _, row = csv.reader(to_csv([{"seq": 1, "at": 2.5, "subject": cell, "documents": [cell, "b"]}]), strict=True)
    assert not any(value.startswith(("=", "+", "-", "@", "\t", "\r")) for value in row)
    assert f"'{cell}" in row


def test_lines_are_canonical_json(whole: list[bytes]) -> None:
    for line in whole:
        values = json.loads(line)
        seal = values.pop("seal")
        body = json.dumps(values, sort_keys=True, separators=(",", ":"))
        assert line.decode() == f'{body[:-1]},"seal":"{seal}"}}\n'
