"""What processes count: exact sums whoever dies when, few files, and machines that come and go."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nexus import counts
from nexus.config import COUNTS
from nexus.counts import Counts, Reading
from tests.running import ROOT

CHUNKS = '["ingest_chunks", "ingest_chunks_total", {}, "Chunks published."]'

PROCESS = """
import os, signal, sys, threading
from nexus import telemetry
def work():
    for number in range(1000):
        telemetry.count_document("done", 2)
        telemetry.rag_response.labels("query").observe(0.1)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
if os.fork() == 0:
    telemetry.count_document("failed")
    os._exit(0)
os.wait()
print("counted", flush=True)
sys.stdin.read(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics").mkdir()
    return tmp_path / "metrics"


def start(folder: Path, code: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, COUNTS: str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)


def fold_until(folder: Path, step: int) -> None:
    """Killed before or after that one of its calls that change files."""
    left = iter(range(step - 1, -1, -1))

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def one(*arguments: Any, **options: Any) -> Any:
            die_at_the_last()
            done = call(*arguments, **options)
            die_at_the_last()
            return done

        return one

    def die_at_the_last() -> None:
        if next(left, None) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("open", "replace", "unlink"):
        setattr(Path, name, dying(getattr(Path, name)))
    counts.fold(folder)


@pytest.fixture
def counting(folder: Path) -> Iterator[Callable[[], "subprocess.Popen[bytes]"]]:
    """Starts processes that count, and returns each once it has counted."""
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> "subprocess.Popen[bytes]":
        process = start(folder, PROCESS)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"counted\n"
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.communicate(b"x")


def samples(read: Counts) -> Mapping[str, float]:
    return {
        sample.name + "".join(f",{label}={value}" for label, value in sorted(sample.labels.items())): sample.value
        for family in counts.families(read)
        for sample in family.samples
    }


def expect(folder: Path, processes: int) -> None:
    told = samples(counts.read(folder).counts)
    assert told["ingest_documents_total,outcome=done"] == 2000 * processes
    assert told["ingest_documents_total,outcome=failed"] == processes, "those of forked children"
    assert told["ingest_chunks_total"] == 4000 * processes
    assert told["rag_response_duration_seconds_count,query_type=query"] == 2000 * processes
    assert told["rag_response_duration_seconds_bucket,le=0.05,query_type=query"] == 0
    assert told["rag_response_duration_seconds_bucket,le=60.0,query_type=query"] == 2000 * processes
    assert told["rag_response_duration_seconds_sum,query_type=query"] == pytest.approx(200 * processes)


def test_the_living_and_the_dead_are_summed_exactly_and_the_dead_leave_no_files(
    folder: Path, counting: Callable[[], "subprocess.Popen[bytes]"]
) -> None:
    one, other = counting(), counting()
    expect(folder, 2)
    one.communicate(b"x")
    assert one.returncode == -signal.SIGKILL
    expect(folder, 2)
    third = counting()
    expect(folder, 3)
    assert len(list(folder.glob("*.db"))) == 4, "two files of each that lives"
    for process in (other, third):
        process.communicate(b"x")
    expect(folder, 3)
    assert {file.name for file in folder.iterdir()} == {counts.FOLDED, counts.LOCK}
    expect(folder, 3)


def test_whoever_is_killed_while_it_folds_loses_nothing_and_counts_nothing_twice(
    folder: Path, counting: Callable[[], "subprocess.Popen[bytes]"]
) -> None:
    counting().communicate(b"x")
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    step, died = 0, -1
    while died:
        step += 1
        for file in folder.iterdir():
            file.unlink()
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        folding = get_context("fork").Process(target=fold_until, args=(folder, step))
        folding.start()
        folding.join()
        died = folding.exitcode
        assert died in (0, -signal.SIGKILL)
        with (folder / counts.LOCK).open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            expect(folder, 1)  # for whoever may not fold
        expect(folder, 1)
        assert {file.name for file in folder.iterdir()} <= {counts.FOLDED, counts.LOCK, "folded.part"}
    assert step > 10, "it died at each of its steps"


def test_a_reader_sees_every_count_while_others_fold(folder: Path) -> None:
    """Readings never go back, and the last is exact, with four that read and fold as lives end all the time."""
    stop = threading.Event()
    wrong: list[str] = []

    def watch() -> None:
        last: float = 0
        while not stop.is_set():
            now = samples(counts.read(folder).counts).get("ingest_chunks_total", 0)
            if now < last:
                wrong.append(f"{now} after {last}")
            last = now

    code = "from nexus import telemetry\ntelemetry.count_document('done', 7)"
    watching = [threading.Thread(target=watch) for _ in range(4)]
    for thread in watching:
        thread.start()
    for _ in range(3):
        for process in [start(folder, code) for _ in range(2)]:
            process.communicate()
    stop.set()
    for thread in watching:
        thread.join()
    assert not wrong
    assert samples(counts.read(folder).counts)["ingest_chunks_total"] == 6 * 7


def test_what_a_power_cut_left_unreadable_is_said_and_the_rest_counts(
    folder: Path, counting: Callable[[], "subprocess.Popen[bytes]"], caplog: pytest.LogCaptureFixture
) -> None:
    process = counting()
    before = counts.read(folder).counts["histogram"]
    process.communicate(b"x")
    (histogram,) = [file for file in folder.glob("histogram_*.db")]
    content = bytearray(histogram.read_bytes())
    content[-len(content) // 2 :] = b"\xff" * (len(content) // 2)
    content[:4] = len(content).to_bytes(4, sys.byteorder)
    histogram.write_bytes(content)
    (folder / "counter_0-old.db").write_bytes(b"")
    assert counts.read(folder).counts["histogram"] == before
    assert samples(counts.read(folder).counts)["ingest_chunks_total"] == 4000
    assert "cannot be read" in caplog.text


def test_sums_do_not_depend_on_the_order_and_never_round_back() -> None:
    rng = Random(7)
    values = [Fraction(rng.random()) for _ in range(1000)]
    whole = counts.add(*({"histogram": {"k": value}} for value in values))
    rng.shuffle(values)
    assert counts.add(*({"histogram": {"k": value}} for value in values)) == whole
    assert sum(map(float, values[:-1])) != float(sum(values[:-1], Fraction())), "floats would"


def reading(origin: str, value: int) -> Reading:
    return Reading(origin, {"counter": {CHUNKS: Fraction(value)}})


def test_a_machine_that_is_away_keeps_its_counts_and_one_that_lost_its_folder_counts_on(tmp_path: Path) -> None:
    folder = tmp_path / "machines"
    told = [
        (reading("a", 5), 5), (None, 5), (reading("a", 9), 9), (reading("a", 8), 9), (reading("b", 1), 10), (None, 10),
        (reading("a", 9), 10), (reading("b", 4), 13), (reading("c", 0), 13), (reading("c", 2), 15), (None, 15),
    ]  # fmt: skip
    for one, total in told:
        kept = counts.keep(folder, "sark", one)
        assert kept.get("counter", {}).get(CHUNKS) == total, (one, total)
    assert counts.keep(folder, "clu", None) == {}


def test_a_machine_s_counts_are_kept_whole_by_many_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "machines"

    def tell(first: int) -> None:
        for value in range(first, 200, 4):
            counts.keep(folder, "sark", reading("a", value))

    telling = [threading.Thread(target=tell, args=(first,)) for first in range(4)]
    for thread in telling:
        thread.start()
    for thread in telling:
        thread.join()
    counts.keep(folder, "sark", reading("a", 199))
    assert counts.keep(folder, "sark", None)["counter"][CHUNKS] == 199
