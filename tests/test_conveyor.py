"""The line from accepted to published: every file ends as it should, whatever the parts of the line do."""

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from nexus import conveyor as module
from nexus import pressure
from nexus.conveyor import Conveyor, Pace
from nexus.errors import NotFound, Unavailable
from nexus.hades import document_id_of
from nexus.ingest import Ingestor
from nexus.jobs import OPEN, Announced, File, Job, Jobs, Outcome, Ticket
from nexus.parsing import Limits, Parsers
from nexus.pressure import Yielding
from nexus.types import SearchRequest, Upload, Vectors
from tests.conftest import ALICE, MALLORY, House, build_steps
from tests.test_jobs import WORKER, accept, at_once, file_of, kept, query, sent, take

MARKER = "poison"
PATIENCE = 60.0  # longer than anything here takes; only a fault makes a test wait for it
STUCK_SECONDS = 1.5


@pytest.fixture(scope="module")
def parsers() -> Iterator[Parsers]:
    """Real parsing children, one zygote for all tests here."""
    with Parsers(Limits(cpu_seconds=10, wall_seconds=20)) as parsers:
        yield parsers


@dataclass
class Line:
    """A conveyor with all that it works on."""

    house: House
    jobs: Jobs
    steps: Ingestor
    conveyor: Conveyor
    home: Path

    def accept(self, *names: str, text: str = "{} closes the gripper", **fields: object) -> Job:
        """A job of Markdown files, each with its own text."""
        return accept(self.jobs, *[note(name, text.format(name)) for name in names], **fields)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """It works for as long as the block runs; it must not end before, and must end soon after."""
        task = asyncio.create_task(self.conveyor.run())
        try:
            async with asyncio.timeout(PATIENCE):
                yield
        finally:
            assert not task.done(), task
            task.cancel()
            ended, _ = await asyncio.wait({task}, timeout=PATIENCE)
            assert ended and task.cancelled()

    async def wait(self, *jobs: Job) -> list[Outcome]:
        """How all files of these jobs end, once they have left the line too."""
        keys = [(job.job_id, number) for job in jobs for number in range(job.total)]
        outcomes = await asyncio.gather(*(self.conveyor.wait(*key) for key in keys))
        while not self.conveyor._stages.keys().isdisjoint(keys):
            await asyncio.sleep(0)
        return list(outcomes)

    def work(self, *jobs: Job) -> list[Outcome]:
        """Run until all files of these jobs have ended."""

        async def run() -> list[Outcome]:
            async with self.running():
                return await self.wait(*jobs)

        return asyncio.run(run())

    def states(self, job: Job) -> list[str]:
        return [file.state for file in self.jobs.files(job.job_id, ALICE, None, -1, 1000)]

    def published(self) -> list[str]:
        return sorted(document.source for document in self.house.hades.documents.documents(ALICE, None, None, 1000))

    def found(self, source: str, as_of: int | None = None) -> list[str]:
        """The texts of a document as a search sees them."""
        result = self.house.retriever.search(SearchRequest("gripper", k=1000, as_of=as_of), ALICE)
        return sorted(hit.text for hit in result.hits if hit.source == source)

    def rows(self) -> set[str]:
        """All chunks that either store holds, seen or not."""
        index = self.house.hades.find_collection("default").index
        return self.house.hades.vectors.chunk_ids(index) | self.house.hades.documents.chunk_ids(index, False)

    def check_at_rest(self) -> None:
        """Nothing is left on the line or in the list, and the stores agree."""
        assert (self.conveyor._stages, self.conveyor._places, self.conveyor._texts_ahead) == ({}, set(), 0)
        assert (dict(self.conveyor._waiters), self.conveyor._alone) == ({}, False)
        assert (self.jobs.faults(), self.jobs.waiting(10), self.house.hades.fsck()) == ([], [], [])


@pytest.fixture
def line(house: House, parsers: Parsers, tmp_path: Path) -> Iterator[Line]:
    jobs, steps = Jobs(tmp_path), replace(build_steps(house), parsers=parsers)
    line = Line(house, jobs, steps, Conveyor(jobs, steps), tmp_path)
    yield line
    line.conveyor._threads.shutdown()
    jobs.close()


def note(name: str, text: str) -> Announced:
    return sent(name, text.encode())


def all_are(state: str, outcomes: Sequence[Outcome]) -> bool:
    return {outcome.state for outcome in outcomes} == {state}


class Gate:
    """A step that stops where a test wants it, until it is let through."""

    def __init__(self, step: Callable[..., object], stops: Callable[..., bool] = lambda *_: True) -> None:
        self.step, self.stops = step, stops
        self.reached, self.opened = threading.Event(), threading.Event()
        self.passes = 0

    def __call__(self, *arguments: object) -> object:
        if self.stops(*arguments):
            self.passes += 1
            self.reached.set()
            assert self.opened.wait(PATIENCE)
        return self.step(*arguments)

    async def is_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, PATIENCE)


def holds_marker(texts: Sequence[str]) -> bool:
    return any(MARKER in text for text in texts)


# ── many files ──────────────────────────────────────────────────────────────────────────────────


def test_sixty_files_some_of_them_corrupt(line: Line, tmp_path: Path) -> None:
    corrupt = {
        7: (sent("7.docx", b"PK\x03\x04 and no more"), "document_unprocessable"),
        20: (sent("20.pdf", b"%PDF-1.4 and no more"), "document_unprocessable"),
        33: (sent("33.md", b""), "invalid_request"),
        34: (sent("34.bin", b"\x7fELF\x02\x01\x01" + bytes(200)), "unsupported_media_type"),
        59: (sent("59.md", b" \n \n"), "document_unprocessable"),
    }
    files = [corrupt[n][0] if n in corrupt else note(f"{n}.md", f"The gripper number {n}.") for n in range(60)]
    job = accept(line.jobs, *files)
    outcomes = line.work(job)
    assert Counter(one.state for one in outcomes) == {"done": 55, "failed": 5}
    for number, (_, code) in corrupt.items():
        file = file_of(line.jobs, job, number)
        assert (file.state, file.code, file.stage) == ("failed", code, "parse"), file
        assert file.reason and outcomes[number].reason == file.reason
    assert line.published() == sorted(f"{n}.md" for n in range(60) if n not in corrupt)
    assert line.house.hades.documents.collection("default", ALICE.tenant).sequence == 55
    ended = line.jobs.find(job.job_id, ALICE)
    assert (ended.state, ended.counts) == ("done", {"done": 55, "failed": 5})
    assert set(kept(tmp_path)) == {(job.job_id, number) for number in corrupt}
    line.check_at_rest()


def test_collections_and_tenants_go_their_own_way(line: Line) -> None:
    """One batch of the line holds documents of all of them."""
    mine, other = line.accept("a.md"), line.accept("a.md", collection="other")
    theirs = line.accept("a.md", who=MALLORY)
    assert all_are("done", line.work(mine, other, theirs))
    documents = line.house.hades.documents
    places = (("default", ALICE), ("other", ALICE), ("default", MALLORY))
    assert [documents.collection(name, who.tenant).sequence for name, who in places] == [1, 1, 1]
    assert documents.collection("other", MALLORY.tenant) is None
    assert len(line.house.hades.documents.documents(MALLORY, None, None, 10)) == 1


def test_ten_uploads_of_the_same_bytes_at_once_are_one_version(line: Line) -> None:
    async def run() -> list[Outcome]:
        async with line.running():
            jobs = await asyncio.to_thread(at_once, 10, lambda _: line.accept("a.md"))
            return await line.wait(*jobs)

    outcomes = asyncio.run(run())
    assert Counter(one.state for one in outcomes) == {"done": 1, "unchanged": 9}
    assert len({(one.receipt.version, one.receipt.sequence) for one in outcomes if one.receipt}) == 1
    assert (line.published(), len(line.rows())) == (["a.md"], 1)
    line.check_at_rest()


# ── the order of one document ───────────────────────────────────────────────────────────────────


def test_a_then_b_then_a_again_ends_as_a_with_a_true_history(line: Line) -> None:
    jobs = [line.accept("a.md", text=text) for text in ("gripper A", "gripper B", "gripper A")]
    assert all_are("done", line.work(*jobs))
    assert [line.found("a.md", as_of=s) for s in (1, 2, 3)] == [["gripper A"], ["gripper B"], ["gripper A"]]
    assert line.found("a.md") == ["gripper A"]
    line.check_at_rest()


def test_the_last_accepted_wins_also_over_a_big_job(line: Line) -> None:
    """Small jobs go first, but not before an older upload of the same document."""
    big = line.accept("x.md", "y.md", "a.md", text="gripper of {}, old")
    single = line.accept("a.md", text="gripper of {}, new")
    assert all_are("done", line.work(big, single))
    assert line.found("a.md") == ["gripper of a.md, new"]


def test_a_file_that_is_waited_for_goes_before_what_is_left_of_a_big_job(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, prepare = list[str](), line.steps.prepare
    gate = Gate(prepare, lambda upload, *_: upload.source == "0.md")
    monkeypatch.setattr(
        line.steps, "prepare", lambda upload, *more: [order.append(upload.source), gate(upload, *more)][1]
    )
    line.conveyor.pace = Pace(readers=1)
    big = line.accept(*(f"{n}.md" for n in range(20)))

    async def run() -> list[Outcome]:
        async with line.running():
            await gate.is_reached()
            single = line.accept("single.md")
            waiting = asyncio.create_task(line.wait(big, single))
            while (single.job_id, 0) not in line.conveyor._waiters:
                await asyncio.sleep(0)
            gate.opened.set()
            return await waiting

    assert all_are("done", asyncio.run(run()))
    assert order[:2] == ["0.md", "single.md"]
    line.check_at_rest()


def test_each_documents_uploads_are_published_in_the_order_of_acceptance(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, publish = defaultdict(list), line.house.hades.documents.publish

    def note_order(versions: Sequence[tuple]) -> list:
        published = publish(versions)
        for document, _ in versions:
            order[document.source].append(document.metadata["round"])
        return published

    monkeypatch.setattr(line.house.hades.documents, "publish", note_order)
    line.conveyor.pace = Pace(readers=4, batch_documents=3)
    names, jobs = [f"{n}.md" for n in range(5)], []
    for turn in range(6):  # alone or together, in turn
        files = [replace(note(name, f"gripper {name} {turn}"), metadata={"round": turn}) for name in names]
        jobs += [accept(line.jobs, *files)] if turn % 2 else [accept(line.jobs, file) for file in files]
    assert all_are("done", line.work(*jobs))
    assert order == {name: list(range(6)) for name in names}
    assert [line.found(name) for name in names] == [[f"gripper {name} 5"] for name in names]


def test_a_later_upload_waits_for_one_that_was_stuck(line: Line) -> None:
    gate = Gate(line.steps.embedder, lambda texts: holds_marker(texts) and gate.passes == 0)
    line.steps.embedder = gate
    line.conveyor.pace = Pace(stuck_seconds=STUCK_SECONDS)
    old, new = line.accept("a.md", text=f"gripper {MARKER}"), line.accept("a.md", text="gripper new")

    async def run() -> list[Outcome]:
        async with line.running():
            outcomes = await line.wait(old, new)
            gate.opened.set()
            return outcomes

    outcomes = asyncio.run(run())
    line.conveyor._threads.shutdown()
    assert all_are("done", outcomes)
    assert file_of(line.jobs, old).attempts == 2
    assert line.found("a.md") == ["gripper new"]
    assert line.found("a.md", as_of=1) == [f"gripper {MARKER}"]


# ── answers come first ──────────────────────────────────────────────────────────────────────────


class Waits:
    """What says whether chats wait too long, and a clock that stands still but for the test; asked, it tells."""

    def __init__(self) -> None:
        self.is_on, self.now, self.asked = True, 0.0, asyncio.Queue[None]()

    def __call__(self) -> bool:
        self.asked.put_nowait(None)
        return self.is_on

    async def are_heeded(self, conveyor: Conveyor, times: int = 20) -> None:
        """Return once the line has asked again and again from now on, and says why it waits."""
        self.asked = asyncio.Queue()
        for _ in range(times):
            await self.asked.get()
        assert "embed: giving way to answers" in conveyor._stages.values()


@pytest.fixture
def waits(line: Line, monkeypatch: pytest.MonkeyPatch) -> Waits:
    monkeypatch.setattr(pressure, "PAUSE_SECONDS", 0.001)
    waits = Waits()
    line.conveyor.yielding = Yielding(waits, 100.0, lambda: waits.now)
    line.conveyor.pace = Pace(embedders=1)
    return waits


def test_a_batch_waits_while_chats_do_and_goes_on_after(line: Line, waits: Waits) -> None:
    gate = line.steps.embedder = Gate(line.steps.embedder)
    gate.opened.set()
    job = line.accept("a.md")

    async def run() -> None:
        async with line.running():
            await waits.are_heeded(line.conveyor)
            assert not gate.reached.is_set() and line.states(job) == ["running"]
            waits.is_on = False
            assert all_are("done", await line.wait(job))

    asyncio.run(run())
    assert (gate.passes, line.published()) == (1, ["a.md"])
    line.check_at_rest()


def test_no_batch_waits_for_longer_than_it_may(line: Line, waits: Waits) -> None:
    """Though chats wait on and on: each batch has its own time."""
    first, second = line.accept("a.md"), line.accept("b.md")
    line.conveyor.pace = Pace(embedders=1, batch_documents=1)

    async def run() -> None:
        async with line.running():
            for now in (99.9, 100.0, 199.9, 200.0):
                await waits.are_heeded(line.conveyor)
                waits.now = now
            assert all_are("done", await line.wait(first, second))

    asyncio.run(run())
    assert line.published() == ["a.md", "b.md"]
    line.check_at_rest()


# ── a store that is away ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("store", "move"), [("vectors", "upsert"), ("documents", "publish"), ("documents", "begin")])
def test_what_is_away_is_waited_for(line: Line, monkeypatch: pytest.MonkeyPatch, store: str, move: str) -> None:
    """The store comes back once it has failed four times and the list of jobs says that it is waited for."""
    part, beat = getattr(line.house.hades, store), line.jobs.beat
    work, said, failures = getattr(part, move), threading.Event(), []
    seen: set[str] = set()

    def fail(*arguments: object) -> object:
        if len(failures) < 4 or not said.is_set():
            failures.append(move)
            raise Unavailable(f"the {store} are away")
        return work(*arguments)

    def beat_and_look(stages: dict[tuple[str, int], str]) -> None:
        beat(stages)
        seen.update(file.stage for file in line.jobs.files(job.job_id, ALICE, "running", -1, 10) if file.stage)
        if any("waiting" in stage for stage in seen):
            said.set()

    monkeypatch.setattr(part, move, fail)
    monkeypatch.setattr(line.jobs, "beat", beat_and_look)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.05)
    job = line.accept("a.md", "b.md", "c.md")
    assert all_are("done", line.work(job))
    stage = "parse" if move == "begin" else "publish"
    assert f"{stage}: waiting: the {store} are away" in seen
    assert [file_of(line.jobs, job, number).attempts for number in range(3)] == [1, 1, 1]
    assert line.published() == ["a.md", "b.md", "c.md"]
    line.check_at_rest()


@pytest.mark.parametrize(
    "question", ["waiting", "start", "open_among", "settle", "ended", "beat", "holders", "revive", "stay", "working"]
)
def test_a_list_of_jobs_that_is_away_is_waited_for(line: Line, monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    """The coordinator, which knows who works, is too."""
    asked = line.house.hades.coordinator if question in ("stay", "working") else line.jobs
    ask, failures = getattr(asked, question), []

    def fail(*arguments: object) -> object:
        if len(failures) < 2:
            failures.append(question)
            raise Unavailable(f"nobody answers {question}")
        return ask(*arguments)

    job = line.accept("a.md", "b.md", "c.md")
    take(line.jobs, job, 2, "the dead")
    monkeypatch.setattr(asked, question, fail)
    assert all_are("done", line.work(job))
    assert failures
    line.check_at_rest()


def test_a_worker_that_still_says_that_it_works_keeps_its_files(line: Line) -> None:
    """However long it takes, and though its heart beats on no row."""
    job = line.accept("a.md", "b.md")
    take(line.jobs, job, 0, "another")
    line.house.hades.coordinator.stay("another")
    query(line.home, "UPDATE files SET beat_at = 1.0 WHERE number = 0")

    async def run() -> None:
        async with line.running():
            await line.conveyor.wait(job.job_id, 1)
            await asyncio.to_thread(line.conveyor._revive)
            assert line.states(job) == ["running", "done"]
            line.house.hades.coordinator.leave("another")
            assert all_are("done", await line.wait(job))

    asyncio.run(run())
    assert file_of(line.jobs, job).attempts == 2
    line.check_at_rest()


def test_a_worker_takes_nothing_from_itself(line: Line) -> None:
    """Its lease may have ended while it was stopped, or while nobody could be told that it works."""
    gate = line.steps.embedder = Gate(line.steps.embedder)
    job = line.accept("a.md")

    async def run() -> None:
        async with line.running():
            await gate.is_reached()
            line.house.hades.coordinator.leave(line.conveyor.worker)
            assert await asyncio.to_thread(line.conveyor._revive) == []
            assert line.states(job) == ["running"]
            gate.opened.set()
            assert all_are("done", await line.wait(job))

    asyncio.run(run())
    assert (file_of(line.jobs, job).attempts, gate.passes) == (1, 1)
    line.check_at_rest()


def test_however_long_nobody_could_be_told_a_worker_says_that_it_works_within_a_lease(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    sleep, is_told = asyncio.sleep, asyncio.Event()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    def stay(_: str) -> None:
        if len(pauses) < 30:
            raise Unavailable("the voters are away")
        loop.call_soon_threadsafe(is_told.set)

    async def keep_lease() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        keeping = asyncio.create_task(line.conveyor._keep_lease())
        await is_told.wait()
        keeping.cancel()

    loop: asyncio.AbstractEventLoop
    monkeypatch.setattr(line.house.hades.coordinator, "stay", stay)
    monkeypatch.setattr(asyncio, "sleep", pause)
    asyncio.run(keep_lease())
    assert max(pauses) <= module.LEASE_SECONDS / 3


def test_a_conveyor_is_known_to_work_before_it_holds_a_file(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    start, known = line.jobs.start, []

    def look(ticket: Ticket, worker: str) -> object:
        known.append(worker in line.house.hades.coordinator.working())
        return start(ticket, worker)

    monkeypatch.setattr(line.jobs, "start", look)
    line.work(line.accept("a.md"))
    assert known == [True]


# ── an embedder that answers nonsense, or not at all ────────────────────────────────────────────


@pytest.mark.parametrize(
    "spoil",
    [
        lambda vectors: np.full_like(vectors, np.nan),
        lambda vectors: np.full_like(vectors, np.inf),
        lambda vectors: np.zeros_like(vectors),
        lambda vectors: vectors * 3,
        lambda vectors: vectors[:, :-1],
        lambda vectors: vectors[:-1],
        lambda vectors: np.concatenate([vectors, vectors]),
        lambda vectors: vectors.reshape(-1),
    ],
    ids=["NaN", "infinite", "zero", "not of unit length", "narrow", "too few", "another batch's", "flat"],
)
def test_vectors_that_are_none_fail_only_their_file(line: Line, spoil: Callable[[Vectors], Vectors]) -> None:
    """A batch spoilt by one text is embedded again, file by file."""
    embed, sizes = line.steps.embedder, []

    def nonsense(texts: Sequence[str]) -> Vectors:
        if holds_marker(texts):
            sizes.append(len(texts))
        return spoil(embed(texts)) if holds_marker(texts) else embed(texts)

    line.steps.embedder = gate = Gate(nonsense, lambda _: not gate.opened.is_set())
    line.conveyor.pace = Pace(embedders=1)
    names, all_read, prepare = [f"{n}.md" for n in range(8)], threading.Event(), line.steps.prepare

    def note_last(upload: Upload, *arguments: object) -> object:
        if upload.source == names[-1]:
            all_read.set()
        return prepare(upload, *arguments)

    line.steps.prepare = note_last  # type: ignore[method-assign]
    job = accept(line.jobs, *[note(n, f"gripper {MARKER if n == '4.md' else n}") for n in names])

    async def run() -> list[Outcome]:
        async with line.running():
            await gate.is_reached()
            assert await asyncio.to_thread(all_read.wait, PATIENCE)
            gate.opened.set()
            return await line.wait(job)

    outcomes = asyncio.run(run())
    assert [one.state for one in outcomes] == ["done"] * 4 + ["failed"] + ["done"] * 3
    file = file_of(line.jobs, job, 4)
    assert (file.code, file.stage, file.attempts, sizes[-1]) == ("upstream_invalid", "embed", 1, 1)
    assert len(line.rows()) == 7
    assert line.house.hades.documents.current(document_id_of("acme", "default", "4.md"), ALICE) is None
    line.check_at_rest()


def test_a_file_whose_step_hangs_is_tried_once_more_and_failed(line: Line) -> None:
    gate = Gate(line.steps.embedder, holds_marker)
    line.steps.embedder = gate
    line.conveyor.pace = Pace(stuck_seconds=STUCK_SECONDS)
    job = accept(line.jobs, *[note(f"{n}.md", f"gripper {MARKER if n == 2 else n}") for n in range(6)])

    async def run() -> tuple[list[Outcome], File]:
        async with line.running():
            outcomes = await line.wait(job)
            file, rows = file_of(line.jobs, job, 2), line.rows()
            gate.opened.set()
            assert all_are("done", await line.wait(line.accept("later.md")))
            assert len(line.rows() - rows) == 1
            return outcomes, file

    outcomes, file = asyncio.run(run())
    line.conveyor._threads.shutdown()  # the hung threads have said what they had to say
    assert [one.state for one in outcomes] == ["done", "done", "failed", "done", "done", "done"]
    assert (file.code, file.error, file.stage, file.attempts) == ("stuck", "Unprocessable", "embed", 2)
    assert "'embed'" in (file.reason or "") and "twice" in (file.reason or "")
    assert gate.passes == 2
    assert file_of(line.jobs, job, 2) == file
    assert line.published() == ["0.md", "1.md", "3.md", "4.md", "5.md", "later.md"]
    line.check_at_rest()


@pytest.mark.parametrize("where", ["embedder", "parse", "upsert"])
def test_a_file_whose_step_hangs_once_is_done_the_second_time(
    line: Line, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """And what the hung thread does when it wakes up changes nothing."""
    step = {
        "embedder": line.steps.embedder, "parse": line.steps.parsers.parse, "upsert": line.house.hades.vectors.upsert
    }[where]  # fmt: skip
    gate = Gate(step, lambda *_: gate.passes == 0)
    owner = {"embedder": line.steps, "parse": line.steps.parsers, "upsert": line.house.hades.vectors}[where]
    monkeypatch.setattr(owner, where, gate)
    line.conveyor.pace = Pace(stuck_seconds=STUCK_SECONDS)
    job = line.accept("a.md")

    async def run() -> None:
        async with line.running():
            assert all_are("done", await line.wait(job))
            gate.opened.set()

    asyncio.run(run())
    line.conveyor._threads.shutdown()
    assert file_of(line.jobs, job).attempts == 2
    assert line.house.hades.documents.collection("default", ALICE.tenant).sequence == 1
    line.check_at_rest()


def test_a_file_that_is_tried_again_is_alone_on_the_line(line: Line) -> None:
    """If it is poison, it takes nobody with it."""
    job = line.accept(*[f"{n}.md" for n in range(10)])
    suspects = [take(line.jobs, job, number).key for number in (3, 6)]
    line.jobs.revive({WORKER})
    beside: dict[tuple[str, int], list[set]] = defaultdict(list)

    def watch(step: Callable[..., object]) -> Callable[..., object]:
        def look(*arguments: object) -> object:
            on_the_line = set(line.conveyor._stages)
            for key in on_the_line & set(suspects):
                beside[key].append(on_the_line - {key})
            return step(*arguments)

        return look

    line.steps.prepare, line.steps.embed = watch(line.steps.prepare), watch(line.steps.embed)  # type: ignore[method-assign]
    line.steps.commit = watch(line.steps.commit)  # type: ignore[method-assign]
    assert all_are("done", line.work(job))
    assert beside == {key: [set()] * 3 for key in suspects}
    assert [file_of(line.jobs, job, number).attempts for number in range(10)] == [1, 1, 1, 2, 1, 1, 2, 1, 1, 1]
    line.check_at_rest()


# ── deleted or cancelled meanwhile ──────────────────────────────────────────────────────────────


def delete(line: Line, source: str) -> None:
    line.house.hades.delete([document_id_of("acme", "default", source)], ALICE)


def test_what_was_deleted_after_acceptance_stays_deleted(line: Line) -> None:
    assert all_are("done", line.work(line.accept("a.md", text="gripper one")))
    second = line.accept("a.md", text="gripper two", accepted_at=1)
    delete(line, "a.md")
    line.conveyor = Conveyor(line.jobs, line.steps)
    (outcome,) = line.work(second)
    assert (outcome.state, outcome.error and outcome.error.code) == ("cancelled", "fenced")
    assert "deleted" in (outcome.reason or "")
    assert (line.published(), line.found("a.md"), kept(line.home)) == ([], [], {})
    assert line.jobs.find(second.job_id, ALICE).state == "cancelled"
    line.conveyor = Conveyor(line.jobs, line.steps)
    assert all_are("done", line.work(line.accept("a.md", text="gripper two", accepted_at=2)))
    assert line.found("a.md") == ["gripper two"]


@pytest.mark.parametrize("where", ["embedder", "upsert"])
def test_what_is_deleted_under_way_stays_deleted(line: Line, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    line.house.put("a.md", "gripper one")
    owner = line.steps if where == "embedder" else line.house.hades.vectors
    gate = Gate(getattr(owner, where), lambda *_: not gate.opened.is_set())
    monkeypatch.setattr(owner, where, gate)
    job = line.accept("a.md", "b.md", accepted_at=1)

    async def run() -> list[Outcome]:
        async with line.running():
            await gate.is_reached()
            delete(line, "a.md")
            gate.opened.set()
            return await line.wait(job)

    assert [one.state for one in asyncio.run(run())] == ["cancelled", "done"]
    assert line.published() == ["b.md"]
    assert line.house.hades.fsck() == []


def test_a_job_cancelled_under_way_is_not_published_any_more(line: Line) -> None:
    gate = Gate(line.steps.embedder, lambda _: not gate.opened.is_set())
    line.steps.embedder = gate
    job, other = line.accept(*[f"{n}.md" for n in range(6)]), line.accept("other.md")

    async def run() -> list[Outcome]:
        async with line.running():
            waiting = asyncio.create_task(line.wait(job, other))
            await gate.is_reached()
            assert line.jobs.cancel(job.job_id, ALICE).state == "cancelled"
            gate.opened.set()
            return await waiting

    outcomes = asyncio.run(run())
    assert [one.state for one in outcomes] == ["cancelled"] * 6 + ["done"]
    assert line.published() == ["other.md"]
    line.check_at_rest()


def test_a_job_cancelled_while_a_store_is_away_is_not_published_when_it_is_back(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, is_back, failed = line.house.hades.vectors.upsert, threading.Event(), threading.Event()

    def upsert(*arguments: object) -> object:
        if not is_back.is_set():
            failed.set()
            raise Unavailable("the vectors are away")
        return work(*arguments)

    monkeypatch.setattr(line.house.hades.vectors, "upsert", upsert)
    job, other = line.accept("a.md", "b.md"), line.accept("other.md")

    async def run() -> list[Outcome]:
        async with line.running():
            assert await asyncio.to_thread(failed.wait, PATIENCE)
            line.jobs.cancel(job.job_id, ALICE)
            is_back.set()
            return await line.wait(job, other)

    assert [one.state for one in asyncio.run(run())] == ["cancelled", "cancelled", "done"]
    assert line.published() == ["other.md"]
    line.check_at_rest()


# ── faults of our own ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["parse", "embed", "stage", "publish"])
def test_a_bug_fails_its_file_and_the_line_goes_on(line: Line, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def faulty(step: Callable[..., object], is_marked: Callable[..., bool]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            if is_marked(*arguments):
                raise RuntimeError("a bug")
            return step(*arguments)

        return run

    documents, embed = line.house.hades.documents, line.steps.embedder
    gate = Gate(documents.stage, lambda _: not gate.opened.is_set())  # so that most of them are published in one batch
    embedded: set[str] = set()
    all_embedded = threading.Event()

    def count(texts: Sequence[str]) -> Vectors:
        vectors = embed(texts)
        embedded.update(texts)
        if len(embedded) == (4 if where in ("parse", "embed") else 5):
            all_embedded.set()
        return vectors

    marked = lambda batch: any(MARKER in one.document.source for one in batch)  # noqa: E731
    monkeypatch.setattr(documents, "stage", faulty(gate, marked) if where == "stage" else gate)
    line.steps.embedder = faulty(count, holds_marker) if where == "embed" else count
    if where == "parse":
        monkeypatch.setattr(line.steps, "prepare", faulty(line.steps.prepare, lambda one, *_: MARKER in one.source))
    if where == "publish":
        marked = lambda versions: any(MARKER in one.source for one, _ in versions)  # noqa: E731
        monkeypatch.setattr(documents, "publish", faulty(documents.publish, marked))
    names = ["0.md", "1.md", f"{MARKER}.md", "3.md", "4.md"]
    job = line.accept(*names)

    async def run() -> list[Outcome]:
        async with line.running():
            await gate.is_reached()
            assert await asyncio.to_thread(all_embedded.wait, PATIENCE)
            gate.opened.set()
            return await line.wait(job)

    assert [one.state for one in asyncio.run(run())] == ["done", "done", "failed", "done", "done"]
    file = file_of(line.jobs, job, 2)
    assert (file.code, file.error, file.stage) == (
        "internal_error", "NexusError", "publish" if where == "stage" else where
    )  # fmt: skip
    assert "RuntimeError" in (file.reason or "") and "a bug" not in (file.reason or "")
    assert line.published() == ["0.md", "1.md", "3.md", "4.md"]


def test_a_file_whose_bytes_are_lost_fails_and_does_not_go_round_for_ever(line: Line) -> None:
    job = line.accept("a.md", "b.md")
    query(line.home, "DELETE FROM contents WHERE number = 0")
    assert [one.state for one in line.work(job)] == ["failed", "done"]
    assert file_of(line.jobs, job).code == "internal_error"


# ── waiting, and ending ─────────────────────────────────────────────────────────────────────────


def test_all_who_wait_for_a_file_are_told(line: Line) -> None:
    job = line.accept("a.md")

    async def run() -> list[Outcome]:
        async with line.running():
            outcomes = await asyncio.gather(*(line.conveyor.wait(job.job_id, 0) for _ in range(5)))
            return [*outcomes, *await line.wait(job)]

    outcomes = asyncio.run(run())
    assert all_are("done", outcomes) and len({one.receipt.version for one in outcomes if one.receipt}) == 1
    line.check_at_rest()


def test_waiting_for_what_ended_before_or_elsewhere_ends_too(line: Line) -> None:
    done = line.accept("done.md")
    line.work(done)
    cancelled, dead, bulk = line.accept("c.md"), line.accept("d.md"), line.accept("b.md", kind="bulk")
    line.jobs.cancel(cancelled.job_id, ALICE)
    query(line.home, "UPDATE files SET state = 'running', attempts = 3, stage = 'parse', beat_at = 1.0, holder = 'dead'"
          " WHERE job_id = ?", dead.job_id)  # fmt: skip
    line.conveyor = Conveyor(line.jobs, line.steps)

    async def run() -> list[Outcome]:
        async with line.running():
            waiting = asyncio.create_task(line.wait(done, cancelled, dead, bulk))
            await line.wait(done)
            await asyncio.to_thread(line.jobs.settle, [Outcome(bulk.job_id, 0, "failed", "embed")])
            with pytest.raises(NotFound):
                await line.conveyor.wait("nothing", 0)
            return await waiting

    outcomes = asyncio.run(run())
    assert [one.state for one in outcomes] == ["done", "cancelled", "failed", "failed"]
    assert outcomes[0].receipt == file_of(line.jobs, done).receipt
    assert (outcomes[2].error and outcomes[2].error.code, outcomes[2].stage) == ("stuck", "parse")
    line.check_at_rest()


def test_who_no_longer_waits_leaves_nothing_behind(line: Line) -> None:
    gate = Gate(line.steps.embedder)
    line.steps.embedder = gate
    job = line.accept("a.md")

    async def run() -> None:
        async with line.running():
            waiting = asyncio.create_task(line.conveyor.wait(job.job_id, 0))
            await gate.is_reached()
            waiting.cancel()
            await asyncio.wait({waiting})
            assert dict(line.conveyor._waiters) == {}
            gate.opened.set()
            assert all_are("done", await line.wait(job))

    asyncio.run(run())
    line.check_at_rest()


@pytest.mark.parametrize("where", ["embedder", "away"])
def test_a_conveyor_that_is_ended_leaves_its_files_to_the_next(line: Line, where: str) -> None:
    """It ends while a step hangs, or while a store is waited for; what was under way is taken up again."""

    def away(_: Sequence[str]) -> Vectors:
        gate.reached.set()
        raise Unavailable("the embedder is away")

    embed = line.steps.embedder
    gate = Gate(embed)
    line.steps.embedder = gate if where == "embedder" else away
    job = line.accept(*[f"{n}.md" for n in range(5)])

    async def run() -> None:
        async with line.running():
            await gate.is_reached()

    asyncio.run(run())
    gate.opened.set()
    line.conveyor._threads.shutdown()
    assert set(line.states(job)) <= set(OPEN) and line.published() == []
    line.house.hades.coordinator.leave(line.conveyor.worker)  # as its lease would end
    line.steps.embedder = embed
    line.conveyor = Conveyor(line.jobs, line.steps)
    assert all_are("done", line.work(job))
    assert len(line.published()) == 5
    line.check_at_rest()


def test_a_conveyor_ends_with_its_own_faults(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs it starts another process: going on without the list of jobs would be worse."""

    def broken(*_: object) -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr(line.jobs, "waiting", broken)

    async def run() -> Awaitable[None] | None:
        async with asyncio.timeout(PATIENCE):
            return await line.conveyor.run()

    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        asyncio.run(run())
