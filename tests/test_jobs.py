"""The list of jobs: what is accepted is kept, each file ends exactly once, and nobody else's is seen."""

import os
import random
import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nexus import jobs as module
from nexus.errors import Conflict, NexusError, NotFound, RateLimited, Unavailable, Unprocessable, named
from nexus.jobs import (
    CROWDED_SECONDS,
    DATABASE,
    KEEP_BYTES_SECONDS,
    KEEP_JOB_SECONDS,
    MAX_ATTEMPTS,
    OPEN,
    SILENT_SECONDS,
    UPLOAD_SECONDS,
    Announced,
    File,
    Job,
    Jobs,
    Outcome,
    Ticket,
)
from nexus.types import Receipt, content_digest
from tests.conftest import ALICE, BOB, MALLORY

RECEIPT = Receipt("d1", "v1", 3, 7, "done", "A title", True)
WORKER = "worker 1"
FAULT = Unprocessable("it cannot be read", code="broken")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path)
    yield jobs
    jobs.close()


def sent(source: str = "a.md", content: bytes = b"content", **fields: object) -> Announced:
    return Announced(source, content_digest(content), len(content), content=content, **fields)


def announced(source: str = "a.md", content: bytes = b"content", **fields: object) -> Announced:
    return replace(sent(source, content, **fields), content=None)


def accept(jobs: Jobs, *files: Announced, who: object = ALICE, **fields: object) -> Job:
    fields.setdefault("accepted_at", 0)
    job, _ = jobs.accept(who, str(fields.pop("collection", "default")), files or [sent()], **fields)
    return job


def file_of(jobs: Jobs, job: Job, number: int = 0) -> File:
    return jobs.files(job.job_id, ALICE, None, number - 1, 1)[0]


def states(jobs: Jobs, job: Job) -> list[str]:
    return [file.state for file in jobs.files(job.job_id, ALICE, None, -1, 1000)]


def ticket_of(jobs: Jobs, job: Job, number: int = 0) -> Ticket:
    return next(ticket for ticket in jobs.waiting(1000) if ticket.key == (job.job_id, number))


def take(jobs: Jobs, job: Job, number: int = 0, worker: str = WORKER) -> Ticket:
    """Take a file up as a worker does."""
    ticket = ticket_of(jobs, job, number)
    assert jobs.start(ticket, worker) is not None
    return ticket


def end(jobs: Jobs, ticket: Ticket, state: str = "done") -> None:
    error, receipt = (FAULT, None) if state == "failed" else (None, RECEIPT)
    jobs.settle([Outcome(*ticket.key, state, "publish" if error else None, error, receipt, ticket.attempt)])


def query(home: Path, statement: str, *values: object) -> list[tuple]:
    """Ask the file itself, beside the class."""
    db = sqlite3.connect(home / DATABASE)
    with db:
        rows = db.execute(statement, values).fetchall()
    db.close()
    return rows


def kept(home: Path) -> dict[tuple[str, int], bytes]:
    return {(job_id, number): content for job_id, number, content in query(home, "SELECT * FROM contents")}


def let_pass(home: Path, seconds: float) -> None:
    """Put all that was written so far so many seconds into the past."""
    query(home, "UPDATE files SET beat_at = beat_at - ?1, since = since - ?1, ended_at = ended_at - ?1", seconds)
    query(
        home, "UPDATE jobs SET beat_at = beat_at - ?1, created_at = created_at - ?1, ended_at = ended_at - ?1", seconds
    )


# ── accepting ───────────────────────────────────────────────────────────────────────────────────


def test_what_is_accepted_is_on_disk_with_all_that_is_known_of_it(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, sent("a.md", b"one", media_type="text/markdown", metadata={"robot": "HX-3"}), announced("b.md"))
    assert (job.state, job.total, job.ended, job.counts) == ("running", 2, 0, {"queued": 1, "expected": 1})
    other = Jobs(tmp_path)
    assert other.find(job.job_id, ALICE) == job
    ticket = ticket_of(other, job)
    assert (ticket.principal, ticket.collection, ticket.source, ticket.attempt) == (ALICE, "default", "a.md", 1)
    upload = other.start(ticket, WORKER)
    assert upload is not None
    assert (upload.source, upload.content, upload.collection) == ("a.md", b"one", "default")
    assert (upload.media_type, upload.metadata) == ("text/markdown", {"robot": "HX-3"})
    other.close()


def test_unchanged_files_have_ended_and_a_job_of_nothing_else_has_too(jobs: Jobs) -> None:
    unchanged = replace(RECEIPT, outcome="unchanged")
    job = accept(jobs, announced("a.md", unchanged=unchanged), announced("b.md", unchanged=unchanged))
    assert (job.state, job.counts, job.ended_at is not None) == ("done", {"unchanged": 2}, True)
    assert file_of(jobs, job).receipt == unchanged
    half = accept(jobs, announced("c.md", unchanged=unchanged), announced("d.md"))
    assert (half.state, half.ended_at, states(jobs, half)) == ("running", None, ["unchanged", "expected"])


def test_a_job_of_no_files_is_over_at_once(jobs: Jobs) -> None:
    job, _ = jobs.accept(ALICE, "default", [], accepted_at=0)
    assert (job.state, job.total) == ("done", 0)
    assert jobs.faults() == []


def test_what_is_unchanged_waits_for_an_earlier_upload_of_the_same_document(jobs: Jobs) -> None:
    """Content A is current, B was accepted, then comes A again: A must be brought back after B."""
    unchanged = replace(RECEIPT, outcome="unchanged")
    first = accept(jobs, sent("a.md", b"B"))
    again = accept(jobs, announced("a.md", b"A", unchanged=unchanged))
    assert states(jobs, again) == ["expected"]
    elsewhere = accept(jobs, announced("a.md", b"A", unchanged=unchanged), collection="other")
    assert states(jobs, elsewhere) == ["unchanged"]
    stranger, _ = jobs.accept(MALLORY, "default", [announced("a.md", b"A", unchanged=unchanged)], accepted_at=0)
    assert stranger.counts == {"unchanged": 1}
    twice = accept(jobs, announced("b.md", b"B"), announced("b.md", b"A", unchanged=unchanged))
    assert states(jobs, twice) == ["expected", "expected"]
    end(jobs, take(jobs, first))
    jobs.cancel(again.job_id, ALICE)
    assert states(jobs, accept(jobs, announced("a.md", b"A", unchanged=unchanged))) == ["unchanged"]


def test_the_same_key_is_the_same_job(jobs: Jobs) -> None:
    first, is_new = jobs.accept(ALICE, "default", [sent()], accepted_at=0, idempotency_key="k")
    second, is_new_again = jobs.accept(ALICE, "default", [sent()], accepted_at=5, idempotency_key="k")
    assert (is_new, is_new_again, second) == (True, False, first)
    end(jobs, take(jobs, first))
    third, _ = jobs.accept(ALICE, "default", [sent()], accepted_at=5, idempotency_key="k")
    assert (third.job_id, third.state) == (first.job_id, "done")
    assert len(jobs.recent(ALICE, None, None, 10)) == 1


@pytest.mark.parametrize(
    ("files", "collection"),
    [
        ([sent("a.md", b"else")], "default"), ([sent("b.md")], "default"), ([sent(), sent("b.md")], "default"),
        ([sent(metadata={"k": 1})], "default"), ([sent()], "other"),
    ],
)  # fmt: skip
def test_the_same_key_with_another_request_is_a_conflict(
    jobs: Jobs, files: Sequence[Announced], collection: str
) -> None:
    accept(jobs, sent(), idempotency_key="k")
    with pytest.raises(Conflict) as refused:
        accept(jobs, *files, collection=collection, idempotency_key="k")
    assert refused.value.code == "idempotency_key_reused"
    assert len(jobs.recent(ALICE, None, None, 10)) == 1


def test_the_same_key_of_another_tenant_is_another_key(jobs: Jobs) -> None:
    ours = accept(jobs, idempotency_key="k")
    theirs, is_new = jobs.accept(MALLORY, "default", [sent("b.md", b"else")], accepted_at=0, idempotency_key="k")
    assert is_new and theirs.job_id != ours.job_id
    assert [job.job_id for job in jobs.recent(MALLORY, None, None, 10)] == [theirs.job_id]


def test_without_a_key_the_same_request_is_another_job(jobs: Jobs) -> None:
    assert accept(jobs).job_id != accept(jobs).job_id


def at_once(count: int, work: Callable[[int], object]) -> list[object]:
    """What `count` threads return or raise, all let loose together."""
    found: list[object] = [None] * count
    barrier = threading.Barrier(count)

    def run(place: int) -> None:
        barrier.wait()
        try:
            found[place] = work(place)
        except NexusError as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ten_at_once_with_one_key_are_one_job(jobs: Jobs) -> None:
    found = at_once(10, lambda _: jobs.accept(ALICE, "default", [sent()], accepted_at=0, idempotency_key="k"))
    assert len({job.job_id for job, _ in found}) == 1
    assert sorted(is_new for _, is_new in found) == [False] * 9 + [True]
    assert len(jobs.recent(ALICE, None, None, 100)) == 1


def test_nobody_accepts_between_the_look_for_a_key_and_the_writing(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, look = Jobs(tmp_path), module._by_key
    other._connect().execute("PRAGMA busy_timeout = 0")

    def look_long(*arguments: object) -> object:
        found = look(*arguments)
        monkeypatch.setattr(module, "_by_key", look)
        with pytest.raises(Unavailable):
            accept(other, idempotency_key="k")
        return found

    monkeypatch.setattr(module, "_by_key", look_long)
    assert accept(jobs, idempotency_key="k") == accept(other, idempotency_key="k")
    other.close()


@pytest.fixture
def few(tmp_path: Path) -> Iterator[Jobs]:
    """Two uploads of a tenant may be open."""
    with closing(Jobs(tmp_path, most_open=2)) as few:
        yield few


def test_API6_a_tenant_has_so_many_open_jobs_and_no_more(few: Jobs) -> None:
    jobs = [accept(few), accept(few, announced("b.md"), who=BOB)]
    with pytest.raises(RateLimited, match="2 jobs of this tenant are open") as refused:
        accept(few, sent("c.md", b"another"))
    assert (refused.value.code, refused.value.retry_after) == ("too_many_jobs", CROWDED_SECONDS)
    assert {job.job_id for job in few.recent(ALICE, None, None, 9)} == {job.job_id for job in jobs}
    assert accept(few, who=MALLORY).state == "running"


@pytest.mark.parametrize("ending", ["done", "failed", "cancelled"])
def test_API6_a_job_that_has_ended_makes_room_for_one(few: Jobs, ending: str) -> None:
    first, _ = accept(few), accept(few)
    if ending == "cancelled":
        few.cancel(first.job_id, ALICE)
    else:
        end(few, take(few, first), ending)
    accept(few)
    with pytest.raises(RateLimited):
        accept(few)


def test_API6_the_same_request_again_is_no_further_job(few: Jobs) -> None:
    first = accept(few, idempotency_key="k")
    accept(few)
    assert accept(few, idempotency_key="k") == first


def test_API6_bulk_runs_are_not_counted(few: Jobs) -> None:
    for _ in range(3):
        accept(few, kind="bulk", holder=WORKER)
    assert [accept(few).state for _ in range(2)] == ["running"] * 2
    assert accept(few, kind="bulk", holder=WORKER).state == "running"


def test_API6_a_job_that_opens_again_is_one_more(few: Jobs) -> None:
    first = accept(few, sent("a.md"), sent("b.md"))
    end(few, take(few, first, 0), "failed")
    accept(few)
    assert few.retry(first.job_id, 0, ALICE).state == "running"  # it was open, and is not counted twice
    for number in range(2):
        end(few, take(few, first, number), "failed")
    accept(few)
    with pytest.raises(RateLimited):
        few.retry(first.job_id, 0, ALICE)
    assert few.find(first.job_id, ALICE).state == "failed"


def test_API6_ten_at_once_do_not_pass_by_one_another(few: Jobs) -> None:
    found = at_once(10, lambda _: accept(few))
    assert Counter(type(one) for one in found) == {Job: 2, RateLimited: 8}


def test_API6_nobody_accepts_between_the_count_and_the_writing(
    few: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, count = Jobs(tmp_path, most_open=2), module._refuse_more
    other._connect().execute("PRAGMA busy_timeout = 0")

    def count_long(*arguments: object) -> None:
        count(*arguments)
        monkeypatch.setattr(module, "_refuse_more", count)
        with pytest.raises(Unavailable):
            accept(other)

    accept(few)
    monkeypatch.setattr(module, "_refuse_more", count_long)
    accept(few)
    with pytest.raises(RateLimited):
        accept(other)
    other.close()


def test_a_file_is_taken_up_by_one_of_ten(jobs: Jobs) -> None:
    """Some come with the ticket of another attempt, as conveyors of several processes would."""
    job = accept(jobs)
    ticket = ticket_of(jobs, job)
    found = at_once(10, lambda place: jobs.start(replace(ticket, attempt=1 + place // 2), f"worker {place}"))
    assert sum(upload is not None for upload in found) == 1


def test_jobs_open_at_once_on_a_new_home(tmp_path: Path) -> None:
    found = at_once(6, lambda _: Jobs(tmp_path))
    assert all(isinstance(one, Jobs) for one in found), found
    for one in found:
        one.close()


def test_who_turns_on_write_ahead_logging_beside_a_writer_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite says `locked` at once then, however long it was told to wait."""
    with closing(sqlite3.connect(tmp_path / DATABASE, isolation_level=None)) as writer:
        writer.execute("CREATE TABLE another (value)")
        writer.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr("nexus.database.time.sleep", lambda _: writer.execute("ROLLBACK"))
        Jobs(tmp_path).close()


def test_opening_waits_for_nobody_who_writes(jobs: Jobs, tmp_path: Path) -> None:
    """A job of a million files takes a while to be written, and a process that starts meanwhile must start."""
    with closing(sqlite3.connect(tmp_path / DATABASE, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with closing(Jobs(tmp_path)) as another:
            assert another.holders() == set()


def test_threads_that_have_ended_leave_no_files_open(jobs: Jobs, tmp_path: Path) -> None:
    def open_files() -> int:
        return sum(os.path.realpath(one).startswith(str(tmp_path)) for one in Path("/proc/self/fd").iterdir())

    def ask_in_a_thread() -> int:
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(jobs.holders).result() == set()
        return open_files()

    ask_in_a_thread()
    assert len({ask_in_a_thread() for _ in range(20)}) == 1
    assert jobs.holders() == set()


def test_closing_waits_for_whoever_is_in_a_transaction(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job, count = accept(jobs), module._counts
    reached, go_on = threading.Event(), threading.Event()

    def count_long(db: sqlite3.Connection, job_id: str) -> dict[str, int]:
        reached.set()
        assert go_on.wait(60)
        return count(db, job_id)

    monkeypatch.setattr(module, "_counts", count_long)
    with ThreadPoolExecutor(2) as threads:
        asking = threads.submit(jobs.find, job.job_id, ALICE)
        assert reached.wait(60)
        closing_ = threads.submit(jobs.close)
        while not jobs._is_closed:
            pass
        go_on.set()
        assert asking.result() == job
        closing_.result()
    with pytest.raises(Unavailable, match="closed"):
        jobs.find(job.job_id, ALICE)


# ── bytes that come later ───────────────────────────────────────────────────────────────────────


def test_bytes_that_were_announced_are_queued_when_they_come(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, announced("a.md", b"one"), announced("b.md", b"two"))
    assert jobs.waiting(10) == []
    jobs.supply(job.job_id, ALICE, {1: b"two"})
    assert states(jobs, job) == ["expected", "queued"]
    assert kept(tmp_path) == {(job.job_id, 1): b"two"}
    jobs.supply(job.job_id, BOB, {0: b"one"})
    assert states(jobs, job) == ["queued", "queued"]


def test_a_file_that_changed_before_it_was_sent_fails_alone(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, announced("a.md", b"one"), announced("b.md", b"two"))
    jobs.supply(job.job_id, ALICE, {0: b"one, changed", 1: b"two"})
    file = file_of(jobs, job)
    assert (file.state, file.stage, file.code, file.error) == ("failed", "upload", "changed", "InvalidRequest")
    assert "changed" in (file.reason or "")
    assert states(jobs, job) == ["failed", "queued"]
    assert kept(tmp_path) == {(job.job_id, 1): b"two"}
    with pytest.raises(Conflict):
        jobs.retry(job.job_id, 0, ALICE)


def test_a_job_whose_only_file_changed_is_over(jobs: Jobs) -> None:
    job = accept(jobs, announced())
    jobs.supply(job.job_id, ALICE, {0: b"else"})
    assert jobs.find(job.job_id, ALICE).state == "failed"


@pytest.mark.parametrize("state", ["queued", "running", "done"])
def test_a_second_sending_changes_nothing(jobs: Jobs, tmp_path: Path, state: str) -> None:
    """The file was sent, the answer was lost, the file changed, and is sent again: the bytes announced are here."""
    job = accept(jobs, announced("a.md", b"one"))
    jobs.supply(job.job_id, ALICE, {0: b"one"})
    ticket = ticket_of(jobs, job)
    if state != "queued":
        jobs.start(ticket, WORKER)
    if state == "done":
        end(jobs, ticket)
    before = kept(tmp_path)
    for content in (b"one", b"one, changed"):
        jobs.supply(job.job_id, ALICE, {0: content})
        assert (states(jobs, job), kept(tmp_path)) == ([state], before)


def test_bytes_of_a_file_that_is_not_in_the_job_leave_the_others_out_too(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, announced("a.md", b"one"))
    with pytest.raises(NotFound):
        jobs.supply(job.job_id, ALICE, {0: b"one", 1: b"two"})
    assert (states(jobs, job), kept(tmp_path)) == (["expected"], {})


# ── working ─────────────────────────────────────────────────────────────────────────────────────


def test_bytes_go_when_a_file_is_done_and_stay_when_it_failed(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, sent("a.md", b"1"), sent("b.md", b"2"), sent("c.md", b"3"), sent("d.md", b"4"))
    for number, state in enumerate(("done", "unchanged", "failed", "cancelled")):
        end(jobs, take(jobs, job, number), state)
    assert kept(tmp_path) == {(job.job_id, 2): b"3"}
    done, failed = file_of(jobs, job, 0), file_of(jobs, job, 2)
    assert (done.receipt, done.reason, done.attempts) == (RECEIPT, None, 1)
    assert (failed.stage, failed.reason, failed.error, failed.code) == (
        "publish", FAULT.message, "Unprocessable", "broken"
    )  # fmt: skip
    assert named(failed.error or "", failed.reason or "", failed.code or "").code == "broken"


@pytest.mark.parametrize(
    ("ends", "state"),
    [
        (["done", "done"], "done"), (["done", "failed"], "done"), (["failed", "unchanged"], "done"),
        (["failed", "failed"], "failed"), (["cancelled", "done"], "cancelled"), (["cancelled", "failed"], "failed"),
        (["cancelled", "failed", "done"], "done"), (["cancelled", "cancelled"], "cancelled"),
    ],
)  # fmt: skip
def test_a_job_ends_with_its_last_file(jobs: Jobs, ends: Sequence[str], state: str) -> None:
    job = accept(jobs, *[sent(f"{n}.md", b"%d" % n) for n in range(len(ends))])
    for number, one in enumerate(ends):
        assert jobs.find(job.job_id, ALICE).state == "running"
        assert jobs.find(job.job_id, ALICE).ended == number
        end(jobs, take(jobs, job, number), one)
    ended = jobs.find(job.job_id, ALICE)
    assert (ended.state, ended.ended, ended.ended_at is not None) == (state, len(ends), True)
    assert (ended.reason is None) == (state == "done")


def test_the_first_word_stands(jobs: Jobs) -> None:
    job = accept(jobs)
    ticket = take(jobs, job)
    end(jobs, ticket, "done")
    first = jobs.find(job.job_id, ALICE)
    end(jobs, ticket, "failed")
    assert (file_of(jobs, job).state, file_of(jobs, job).receipt) == ("done", RECEIPT)
    assert jobs.find(job.job_id, ALICE) == first


def test_a_worker_that_was_given_up_has_no_word(jobs: Jobs) -> None:
    job = accept(jobs)
    zombie = take(jobs, job)
    assert jobs.revive({WORKER}) == []
    second = take(jobs, job)
    assert second.attempt == 2
    end(jobs, zombie, "failed")
    jobs.requeue(zombie, "too late")
    assert (states(jobs, job), file_of(jobs, job).reason) == (["running"], "its worker ended; taken up again")
    assert jobs.start(zombie, WORKER) is None
    end(jobs, second)
    assert states(jobs, job) == ["done"]


def test_a_file_that_could_not_even_be_taken_up_can_end(jobs: Jobs, tmp_path: Path) -> None:
    """Else the line would come back to it for ever."""
    job = accept(jobs)
    query(tmp_path, "DELETE FROM contents")
    ticket = ticket_of(jobs, job)
    end(jobs, ticket, "failed")
    assert states(jobs, job) == ["failed"]


def test_a_file_may_be_taken_up_again_in_the_same_attempt(jobs: Jobs) -> None:
    """The step that takes it up is done again while a store is away."""
    job = accept(jobs)
    ticket = take(jobs, job)
    assert jobs.start(ticket, WORKER) is not None
    assert file_of(jobs, job).attempts == 1


def test_a_file_given_back_is_queued_with_the_reason(jobs: Jobs) -> None:
    job = accept(jobs)
    jobs.requeue(take(jobs, job), "it was stuck")
    file = file_of(jobs, job)
    assert (file.state, file.stage, file.reason) == ("queued", None, "it was stuck")
    assert ticket_of(jobs, job).attempt == 2


def test_beating_says_the_stage_and_when_it_began(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs)
    ticket = take(jobs, job)
    let_pass(tmp_path, 100)
    jobs.beat({ticket.key: "parse"})
    first = file_of(jobs, job)
    assert (first.beat_at or 0) > (first.since or 0) + 99
    jobs.beat({ticket.key: "embed"})
    second = file_of(jobs, job)
    assert (second.stage, second.since) == ("embed", second.beat_at)
    end(jobs, ticket)
    jobs.beat({ticket.key: "embed"})
    assert file_of(jobs, job).beat_at == second.beat_at


def test_only_what_the_dead_hold_is_taken_from_them(jobs: Jobs) -> None:
    """However long ago the others beat."""
    job = accept(jobs, sent("a.md"), sent("b.md"), sent("c.md"))
    assert jobs.holders() == set()
    for number, worker in enumerate(("worker 1", "worker 2")):
        jobs.start(ticket_of(jobs, job, number), worker)
    assert jobs.holders() == {"worker 1", "worker 2"}
    assert (jobs.revive({"worker 2", "somebody", ""}), states(jobs, job)) == ([], ["running", "queued", "queued"])
    jobs.start(ticket_of(jobs, job, 1), "worker 1")
    assert jobs.holders() == {"worker 1"}
    for number, attempt in ((0, 1), (1, 2)):
        jobs.settle([Outcome(job.job_id, number, "done", receipt=RECEIPT, attempt=attempt)])
    assert jobs.holders() == set()


def test_a_list_of_jobs_of_an_older_nexus_goes_on(tmp_path: Path) -> None:
    """Whoever worked then does not work now."""
    with closing(sqlite3.connect(tmp_path / DATABASE)) as db:
        db.executescript(module.MIGRATIONS[0])
        for job_id, kind in (("upload", "upload"), ("bulk", "bulk")):
            values = (job_id, "acme", "alice", "[]", "default", kind, "running", None, None, "", 0, 1.0, None, 1.0, 2)
            db.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(values))})", values)
            for number, state in enumerate(("running", "running" if kind == "bulk" else "queued")):
                db.execute(
                    "INSERT INTO files (job_id, number, source, digest, size, metadata, state, attempts) VALUES"
                    " (?, ?, 'a.md', '', 1, '{}', ?, 1)",
                    (job_id, number, state),
                )
        db.execute("INSERT INTO contents VALUES ('upload', 0, x'00'), ('upload', 1, x'00')")
        db.commit()
    with closing(Jobs(tmp_path)) as jobs:
        outcomes = jobs.revive(jobs.holders())
        assert {(one.job_id, one.number, one.state) for one in outcomes} == {
            ("bulk", 0, "failed"),
            ("bulk", 1, "failed"),
        }
        assert [file.state for file in jobs.files("upload", ALICE, None, -1, 10)] == ["queued", "queued"]


def test_after_three_dead_workers_a_file_is_failed_with_its_stage_and_last_heartbeat(
    jobs: Jobs, tmp_path: Path
) -> None:
    job = accept(jobs, sent("poison.md"), sent("good.md", b"good"))
    for attempt in (1, 2, 3):
        ticket = take(jobs, job)
        assert ticket.attempt == attempt
        jobs.beat({ticket.key: "embed"})
        query(tmp_path, "UPDATE files SET beat_at = 86400.0 WHERE number = 0")
        outcomes = jobs.revive({WORKER})
        assert len(outcomes) == (attempt == 3)
    file = file_of(jobs, job)
    assert (file.state, file.stage, file.code, file.attempts) == ("failed", "embed", "stuck", 3)
    assert "'embed'" in (file.reason or "") and "1970-01-02 00:00:00 UTC" in (file.reason or "")
    assert (outcomes[0].reason, outcomes[0].state) == (file.reason, "failed")
    assert states(jobs, job) == ["failed", "queued"]
    assert jobs.revive({WORKER}) == []


def test_a_bulk_run_that_ended_early_fails_what_it_left(jobs: Jobs) -> None:
    job = accept(jobs, announced("a.md"), announced("b.md", b"two"), kind="bulk", holder=WORKER)
    assert (states(jobs, job), jobs.waiting(10)) == (["running", "running"], [])
    jobs.settle([Outcome(job.job_id, 0, "done", receipt=RECEIPT)])
    assert jobs.holders() == {WORKER}
    assert jobs.revive({"worker 2", ""}) == []
    assert [outcome.number for outcome in jobs.revive({WORKER})] == [1]
    assert jobs.holders() == set()
    assert (states(jobs, job), jobs.find(job.job_id, ALICE).state) == (["done", "failed"], "done")


def test_a_single_file_goes_before_a_big_job(jobs: Jobs) -> None:
    big = accept(jobs, *[sent(f"{n}.md") for n in range(3)])
    single = accept(jobs, sent("x.md"))
    later = accept(jobs, sent("y.md"))
    expected = [(single.job_id, 0), (later.job_id, 0), (big.job_id, 0), (big.job_id, 1), (big.job_id, 2)]
    assert [ticket.key for ticket in jobs.waiting(10)] == expected
    assert [ticket.key for ticket in jobs.waiting(2)] == expected[:2]
    assert [ticket.key for ticket in jobs.waiting(2, expected[:1])] == expected[1:3]


def test_the_order_is_that_of_acceptance_also_when_the_clock_was_set_back(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = accept(jobs, sent("x.md"))
    monkeypatch.setattr(module.time, "time", lambda: 1.0)
    second = accept(jobs, sent("y.md"))
    assert [ticket.job_id for ticket in jobs.waiting(10)] == [first.job_id, second.job_id]


def test_uploads_of_one_document_wait_for_the_earlier_one(jobs: Jobs) -> None:
    """Or the old content of a big job would be published after the new content of a single file."""
    big = accept(jobs, sent("other.md"), sent("a.md", b"old"))
    single = accept(jobs, sent("a.md", b"new"))
    elsewhere = accept(jobs, sent("a.md", b"new"), collection="other")
    stranger, _ = jobs.accept(MALLORY, "default", [sent("a.md", b"theirs")], accepted_at=0)
    free = [(elsewhere.job_id, 0), (stranger.job_id, 0), (big.job_id, 0)]
    assert [ticket.key for ticket in jobs.waiting(10)] == [*free, (big.job_id, 1)]
    ticket = take(jobs, big, 1)
    assert [one.key for one in jobs.waiting(10)] == free
    jobs.requeue(ticket, "it was stuck")
    assert [one.key for one in jobs.waiting(10)] == [*free, (big.job_id, 1)]
    end(jobs, take(jobs, big, 1))
    assert [one.key for one in jobs.waiting(10)] == [(single.job_id, 0), *free]


def test_what_only_was_announced_keeps_nobody_waiting(jobs: Jobs) -> None:
    accept(jobs, announced("a.md", b"old"))
    single = accept(jobs, sent("a.md", b"new"))
    assert [ticket.key for ticket in jobs.waiting(10)] == [(single.job_id, 0)]


# ── looking ─────────────────────────────────────────────────────────────────────────────────────


def test_another_tenants_job_is_not_there(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, sent(), announced("b.md", b"two"))
    end(jobs, take(jobs, job), "failed")
    before = query(tmp_path, "SELECT * FROM files")
    for attempt in (
        lambda: jobs.find(job.job_id, MALLORY),
        lambda: jobs.files(job.job_id, MALLORY, None, -1, 10),
        lambda: jobs.supply(job.job_id, MALLORY, {1: b"two"}),
        lambda: jobs.cancel(job.job_id, MALLORY),
        lambda: jobs.retry(job.job_id, 0, MALLORY),
        lambda: jobs.find("nothing", ALICE),
    ):
        with pytest.raises(NotFound):
            attempt()
    assert jobs.recent(MALLORY, None, None, 10) == []
    assert jobs.forget("other", "default", ["a.md", "b.md"]) == 0
    assert query(tmp_path, "SELECT * FROM files") == before


def test_jobs_and_files_are_listed_in_pages(jobs: Jobs) -> None:
    made = [accept(jobs, sent(f"{n}.md")).job_id for n in range(3)]
    end(jobs, take(jobs, jobs.find(made[1], ALICE)))
    assert [job.job_id for job in jobs.recent(ALICE, None, None, 2)] == [made[2], made[1]]
    assert [job.job_id for job in jobs.recent(ALICE, None, made[1], 2)] == [made[0]]
    assert [job.job_id for job in jobs.recent(ALICE, "done", None, 10)] == [made[1]]
    assert jobs.recent(ALICE, None, "nothing", 10) == []
    big = accept(jobs, *[sent(f"x{n}.md") for n in range(4)])
    end(jobs, take(jobs, big, 2))
    assert [file.number for file in jobs.files(big.job_id, ALICE, None, 0, 2)] == [1, 2]
    assert [file.number for file in jobs.files(big.job_id, ALICE, "queued", 1, 10)] == [3]


def test_a_job_is_shown_as_of_one_moment(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last file ends between the two questions: never a running job of which nothing is left to do."""
    job = accept(jobs)
    ticket, other, count = take(jobs, job), Jobs(tmp_path), module._counts

    def count_late(db: sqlite3.Connection, job_id: str) -> dict[str, int]:
        monkeypatch.setattr(module, "_counts", count)
        end(other, ticket)
        return count(db, job_id)

    monkeypatch.setattr(module, "_counts", count_late)
    shown = jobs.find(job.job_id, ALICE)
    assert (shown.state, shown.counts) == ("running", {"running": 1})
    assert jobs.find(job.job_id, ALICE).state == "done"
    other.close()


def test_which_are_still_open(jobs: Jobs) -> None:
    job = accept(jobs, sent("a.md"), sent("b.md"), sent("c.md"))
    tickets = [take(jobs, job, number) for number in range(2)]
    end(jobs, tickets[0])
    keys = [(job.job_id, number) for number in range(4)] + [("nothing", 0)]
    assert jobs.open_among(keys) == {(job.job_id, 1)}


# ── cancelling and trying again ─────────────────────────────────────────────────────────────────


def test_cancelling_ends_what_has_not_ended(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, sent("a.md"), sent("b.md"), sent("c.md"), announced("d.md"), sent("e.md"))
    end(jobs, take(jobs, job, 0))
    end(jobs, take(jobs, job, 1), "failed")
    running, queued = take(jobs, job, 2), ticket_of(jobs, job, 4)
    cancelled = jobs.cancel(job.job_id, ALICE)
    assert states(jobs, job) == ["done", "failed", "cancelled", "cancelled", "cancelled"]
    assert (cancelled.state, cancelled.ended) == ("done", 5)
    assert set(kept(tmp_path)) == {(job.job_id, 1)}
    assert (jobs.start(running, WORKER), jobs.start(queued, WORKER), jobs.waiting(10)) == (None, None, [])
    end(jobs, running)
    assert file_of(jobs, job, 2).state == "cancelled"
    assert jobs.cancel(job.job_id, ALICE) == cancelled


def test_a_job_cancelled_before_it_began_is_cancelled(jobs: Jobs) -> None:
    job = accept(jobs, sent("a.md"), sent("b.md"))
    cancelled = jobs.cancel(job.job_id, ALICE)
    assert (cancelled.state, cancelled.reason) == ("cancelled", "2 of 2 files were cancelled")
    with pytest.raises(Conflict, match="cancelled"):
        jobs.retry(job.job_id, 0, ALICE)


def test_a_failed_file_is_tried_again_from_the_beginning(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, sent("a.md", b"one"), sent("b.md"))
    for number in range(2):
        end(jobs, take(jobs, job, number), "failed")
    assert jobs.find(job.job_id, ALICE).state == "failed"
    again = jobs.retry(job.job_id, 0, ALICE)
    assert (again.state, again.reason, again.ended_at) == ("running", None, None)
    file = file_of(jobs, job)
    assert (file.state, file.stage, file.reason, file.code, file.ended_at) == ("queued", None, None, None, None)
    let_pass(tmp_path, KEEP_BYTES_SECONDS + 1)
    jobs.tidy()
    ticket = take(jobs, job)
    assert ticket.attempt == 1
    end(jobs, ticket)
    assert jobs.find(job.job_id, ALICE).state == "done"


def test_what_cannot_be_tried_again(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, sent("a.md"), sent("b.md"), sent("c.md"))
    end(jobs, take(jobs, job, 0))
    end(jobs, take(jobs, job, 1), "failed")
    with pytest.raises(Conflict, match="is done"):
        jobs.retry(job.job_id, 0, ALICE)
    with pytest.raises(Conflict, match="is queued"):
        jobs.retry(job.job_id, 2, ALICE)
    with pytest.raises(NotFound):
        jobs.retry(job.job_id, 3, ALICE)
    let_pass(tmp_path, KEEP_BYTES_SECONDS + 1)
    jobs.tidy()
    with pytest.raises(Conflict, match="no longer kept"):
        jobs.retry(job.job_id, 1, ALICE)


# ── cleaning up and checking ────────────────────────────────────────────────────────────────────


def test_a_deleted_document_leaves_no_bytes_behind(jobs: Jobs, tmp_path: Path) -> None:
    failed, queued, running = (accept(jobs, sent("a.md", content)) for content in (b"1", b"2", b"3"))
    other, elsewhere = accept(jobs, sent("b.md")), accept(jobs, sent("a.md"), collection="other")
    end(jobs, take(jobs, failed), "failed")
    ticket = replace(ticket_of(jobs, queued), job_id=running.job_id)
    assert jobs.start(ticket, WORKER) is not None
    assert jobs.forget("acme", "default", ["a.md"]) == 2
    assert set(kept(tmp_path)) == {(job.job_id, 0) for job in (running, other, elsewhere)}
    assert (file_of(jobs, failed).state, file_of(jobs, running).state) == ("failed", "running")
    assert (file_of(jobs, queued).state, file_of(jobs, queued).reason) == ("cancelled", "the document was deleted")
    assert jobs.find(queued.job_id, ALICE).state == "cancelled"
    assert jobs.faults() == []


def test_uploads_whose_bytes_never_come_are_failed(jobs: Jobs, tmp_path: Path) -> None:
    job = accept(jobs, announced("a.md", b"one"), announced("b.md", b"two"))
    let_pass(tmp_path, UPLOAD_SECONDS + 1)
    jobs.supply(job.job_id, ALICE, {0: b"one"})
    assert jobs.tidy()["uploads that never came"] == 0
    let_pass(tmp_path, UPLOAD_SECONDS + 1)
    assert jobs.tidy()["uploads that never came"] == 1
    assert (states(jobs, job), file_of(jobs, job, 1).code) == (["queued", "failed"], "never_sent")


def test_bytes_and_jobs_are_kept_for_a_while_and_no_longer(jobs: Jobs, tmp_path: Path) -> None:
    old, running = accept(jobs, sent("a.md", bytes(300_000))), accept(jobs, sent("b.md"))
    end(jobs, take(jobs, old), "failed")
    let_pass(tmp_path, KEEP_BYTES_SECONDS - 60)
    assert jobs.tidy() == {"uploads that never came": 0, "kept contents": 0, "jobs": 0}
    let_pass(tmp_path, 120)
    (before,) = query(tmp_path, "PRAGMA page_count")[0]
    assert jobs.tidy() == {"uploads that never came": 0, "kept contents": 1, "jobs": 0}
    (after,) = query(tmp_path, "PRAGMA page_count")[0]
    assert before - after > 60  # the space is given back
    assert (states(jobs, old), list(kept(tmp_path))) == (["failed"], [(running.job_id, 0)])
    let_pass(tmp_path, KEEP_JOB_SECONDS)
    assert jobs.tidy()["jobs"] == 1
    assert [job.job_id for job in jobs.recent(ALICE, None, None, 10)] == [running.job_id]
    assert query(tmp_path, "SELECT DISTINCT job_id FROM files") == [(running.job_id,)]


def test_cleaning_while_another_process_writes_is_put_off(jobs: Jobs, tmp_path: Path) -> None:
    """The lock is taken at every moment of it that there is; what comes out is always Unavailable."""
    db = jobs._connect()
    db.execute("PRAGMA busy_timeout = 0")
    statements: list[str] = []
    db.set_trace_callback(statements.append)
    jobs.tidy()
    for moment in range(len(statements)):
        writer, seen = sqlite3.connect(tmp_path / DATABASE, isolation_level=None, timeout=0), iter(range(10_000))

        def lock(_: str, writer: sqlite3.Connection = writer, seen: Iterator[int] = seen, at: int = moment) -> None:
            if next(seen) == at and not db.in_transaction:
                writer.execute("BEGIN IMMEDIATE")

        db.set_trace_callback(lock)
        try:
            jobs.tidy()
        except Unavailable:
            pass
        finally:
            db.set_trace_callback(None)
            writer.close()
    assert jobs.tidy() == {"uploads that never came": 0, "kept contents": 0, "jobs": 0}


def test_faults_name_jobs_that_cannot_be_as_they_are(jobs: Jobs, tmp_path: Path) -> None:
    sound, lost, open_ended, byteless = (accept(jobs, sent(f"{n}.md")) for n in range(4))
    end(jobs, take(jobs, sound))
    take(jobs, lost)
    assert jobs.faults() == []
    query(tmp_path, "UPDATE files SET state = 'done' WHERE job_id = ?", open_ended.job_id)
    query(tmp_path, "DELETE FROM contents WHERE job_id = ?", byteless.job_id)
    assert set(jobs.faults()) == {open_ended.job_id, byteless.job_id}
    let_pass(tmp_path, SILENT_SECONDS + 1)
    assert set(jobs.faults()) == {lost.job_id, open_ended.job_id, byteless.job_id}


def test_no_question_looks_at_files_that_have_ended(jobs: Jobs) -> None:
    """There may be a month of them, and these are asked every second."""
    db, asked = jobs._connect(), []
    db.set_trace_callback(asked.append)
    jobs.waiting(10)
    jobs.revive(jobs.holders())
    accept(jobs, announced(unchanged=RECEIPT))
    db.set_trace_callback(None)
    plans = [row[3] for one in asked if "files" in one for row in db.execute(f"EXPLAIN QUERY PLAN {one}")]
    assert len(plans) > 5
    assert set(plans).isdisjoint({"SCAN f", "SCAN files", "SCAN j", "SCAN jobs"})


# ── a full disk ─────────────────────────────────────────────────────────────────────────────────


def fill_disk(jobs: Jobs, pages: int | None) -> None:
    """Let the file grow by so many pages and no more; None lifts the limit."""
    db = jobs._connect()
    (now,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {2**30 if pages is None else now + pages}")


@pytest.mark.parametrize("pages", [0, 1, 5, 20, 60])
def test_a_full_disk_accepts_nothing_and_leaves_nothing_half_written(jobs: Jobs, tmp_path: Path, pages: int) -> None:
    before = accept(jobs, announced("late.md", bytes(400_000)))
    files = [sent(f"{n}.md", bytes(4096) * (n + 1)) for n in range(20)]
    fill_disk(jobs, pages)
    with pytest.raises(Unavailable, match="full") as refused:
        accept(jobs, *files, idempotency_key="k")
    assert refused.value.code == "storage_full"
    with pytest.raises(Unavailable) as refused:
        jobs.supply(before.job_id, ALICE, {0: bytes(400_000)})
    assert refused.value.code == "storage_full"
    assert (jobs.recent(ALICE, None, None, 10), kept(tmp_path)) == ([before], {})
    assert query(tmp_path, "PRAGMA integrity_check") == [("ok",)]
    fill_disk(jobs, None)
    job, is_new = jobs.accept(ALICE, "default", files, accepted_at=0, idempotency_key="k")
    jobs.supply(before.job_id, ALICE, {0: bytes(400_000)})
    assert is_new and len(kept(tmp_path)) == 21
    assert job.counts == {"queued": 20}


def test_a_locked_file_is_unavailable(jobs: Jobs, tmp_path: Path) -> None:
    jobs._connect().execute("PRAGMA busy_timeout = 0")
    writer = sqlite3.connect(tmp_path / DATABASE, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as refused:
        accept(jobs)
    assert refused.value.code == "unavailable"
    writer.execute("ROLLBACK")
    writer.close()
    assert accept(jobs).state == "running"


# ── any order of all of it ──────────────────────────────────────────────────────────────────────


@dataclass
class Known:
    """What the model knows of a file."""

    state: str
    content: bytes
    attempts: int = 0
    kept: bool = False


class JobsMachine(RuleBasedStateMachine):
    """All operations, in any order, against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.home = tempfile.TemporaryDirectory()
        self.jobs = Jobs(Path(self.home.name))
        self.model: dict[tuple[str, int], Known] = {}
        self.names = 0

    def teardown(self) -> None:
        self.jobs.close()
        self.home.cleanup()

    def pick(self, seed: int, *wanted: str) -> tuple[tuple[str, int], Known] | None:
        found = [(key, known) for key, known in self.model.items() if not wanted or known.state in wanted]
        return random.Random(seed).choice(found) if found else None

    @rule(kinds=st.lists(st.sampled_from(["queued", "expected", "unchanged"]), max_size=4))
    def accept(self, kinds: list[str]) -> None:
        files = []
        for kind in kinds:
            self.names += 1
            name = f"{self.names}.md"
            unchanged = replace(RECEIPT, outcome="unchanged") if kind == "unchanged" else None
            made = sent if kind == "queued" else announced
            files.append(made(name, name.encode(), unchanged=unchanged))
        job, is_new = self.jobs.accept(ALICE, "default", files, accepted_at=0)
        assert is_new
        for number, (kind, file) in enumerate(zip(kinds, files, strict=True)):
            self.model[job.job_id, number] = Known(kind, file.source.encode(), kept=kind == "queued")

    @precondition(lambda self: self.model)
    @rule(seed=st.integers(), good=st.booleans())
    def supply(self, seed: int, good: bool) -> None:
        (job_id, number), known = self.pick(seed)
        self.jobs.supply(job_id, ALICE, {number: known.content if good else b"else"})
        if known.state == "expected":
            known.state, known.kept = ("queued", True) if good else ("failed", False)

    @rule(limit=st.integers(1, 3))
    def start(self, limit: int) -> None:
        for ticket in self.jobs.waiting(limit):
            known = self.model[ticket.key]
            assert (known.state, ticket.attempt) == ("queued", known.attempts + 1)
            upload = self.jobs.start(ticket, WORKER)
            assert upload is not None and upload.content == known.content
            known.state, known.attempts = "running", ticket.attempt

    @precondition(lambda self: self.model)
    @rule(seed=st.integers(), state=st.sampled_from(["done", "unchanged", "failed", "cancelled"]), late=st.booleans())
    def settle(self, seed: int, state: str, late: bool) -> None:
        key, known = self.pick(seed)
        attempt = known.attempts - 1 if late else known.attempts
        error = FAULT if state == "failed" else None
        self.jobs.settle([Outcome(*key, state, None, error, None, attempt)])
        if known.state in OPEN and not late:
            known.state, known.kept = state, known.kept and state == "failed"

    @rule(seed=st.integers())
    def requeue(self, seed: int) -> None:
        if found := self.pick(seed, "running"):
            key, known = found
            self.jobs.requeue(Ticket(*key, known.attempts, "default", "", ALICE, 0), "stuck")
            known.state = "queued"

    @rule(seed=st.integers())
    def die(self, seed: int) -> None:
        if found := self.pick(seed, "running"):
            (job_id, number), known = found
            where = "WHERE job_id = ? AND number = ?"
            query(Path(self.home.name), f"UPDATE files SET holder = 'the dead' {where}", job_id, number)
            outcomes = self.jobs.revive({"the dead"})
            known.state = "failed" if known.attempts >= MAX_ATTEMPTS else "queued"
            assert [(one.job_id, one.number) for one in outcomes] == [(job_id, number)] * (known.state == "failed")

    @precondition(lambda self: self.model)
    @rule(seed=st.integers())
    def cancel(self, seed: int) -> None:
        (job_id, _), _ = self.pick(seed)
        self.jobs.cancel(job_id, ALICE)
        for key, known in self.model.items():
            if key[0] == job_id and known.state in OPEN:
                known.state, known.kept = "cancelled", False

    @precondition(lambda self: self.model)
    @rule(seed=st.integers())
    def retry(self, seed: int) -> None:
        (job_id, number), known = self.pick(seed)
        if known.state == "failed" and known.kept:
            assert self.jobs.retry(job_id, number, ALICE).state == "running"
            known.state, known.attempts = "queued", 0
        else:
            with pytest.raises(Conflict):
                self.jobs.retry(job_id, number, ALICE)

    @precondition(lambda self: self.model)
    @rule(seed=st.integers())
    def forget(self, seed: int) -> None:
        _, known = self.pick(seed)
        dropped = self.jobs.forget("acme", "default", [known.content.decode()])
        assert dropped == (known.kept and known.state != "running")
        if known.state != "running":
            known.kept = False
        if known.state in ("expected", "queued"):
            known.state = "cancelled"

    @rule()
    def tidy(self) -> None:
        assert not any(self.jobs.tidy().values())

    @invariant()
    def agrees(self) -> None:
        """States, counts, attempts and bytes are those of the model, and nothing is at fault."""
        assert self.jobs.faults() == []
        assert kept(Path(self.home.name)) == {key: known.content for key, known in self.model.items() if known.kept}
        for job in self.jobs.recent(ALICE, None, None, 1000):
            files = self.jobs.files(job.job_id, ALICE, None, -1, 1000)
            expected = [known for key, known in self.model.items() if key[0] == job.job_id]
            assert [(file.state, file.attempts) for file in files] == [(one.state, one.attempts) for one in expected]
            assert job.counts == Counter(one.state for one in expected)
            assert job.state == state_of([one.state for one in expected])
            assert (job.ended_at is None) == (job.state == "running")
            assert all((file.ended_at is None) == (file.state in OPEN) for file in files)


def state_of(files: Sequence[str]) -> str:
    if set(files) & set(OPEN):
        return "running"
    if "cancelled" in files and "failed" not in files:
        return "cancelled"
    return "failed" if "failed" in files and not {"done", "unchanged"} & set(files) else "done"


JobsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, database=None)
TestJobsInAnyOrder = JobsMachine.TestCase
