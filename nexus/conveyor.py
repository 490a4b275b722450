"""Accepted files become published documents: reading, embedding and committing all busy at once.

Every step runs in a thread, has a bounded queue before it, and may be done again. So a store that
is away makes the whole line wait, with what waits on disk and not in memory; a file that fails,
fails alone; and one that hangs is left to its thread, tried once more, then failed. Two uploads of
one document go through one after the other, in the order they were accepted.
"""

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TypeVar

from nexus import telemetry
from nexus.coordination import LEASE_SECONDS
from nexus.errors import Fenced, NexusError, TryAgain, Unprocessable
from nexus.ingest import Ingestor, Prepared
from nexus.jobs import FileState, Jobs, Outcome, Ticket
from nexus.parsing import ENDED
from nexus.ports import Staged
from nexus.pressure import UNYIELDING, Yielding
from nexus.tracing import done_for
from nexus.types import Receipt
from nexus.vocabulary import CHUNKS, DOCUMENTS, KIND

log = logging.getLogger("nexus.conveyor")
Result = TypeVar("Result")

LONGEST_PAUSE_SECONDS = 15.0
POLL_SECONDS = 1.0  # how long a lost wake-up may go unnoticed
BEAT_SECONDS = 2.0
STAY_SECONDS = LEASE_SECONDS / 3  # at most, before it says or tries to say again that it works
IDLE_SECONDS = 0.5  # without new files before what was written is flushed
COMMIT_AHEAD = 16  # embedded documents waiting to be committed: what a crash makes to be embedded again
THREADS = 64


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is done at once. `stuck_seconds` is what one step may take per thousand chunks."""

    readers: int = 2
    embedders: int = 3  # one more than the pool has places, so that it never waits for us
    batch_texts: int = 64  # about a second of one core: for so long the last may leave the others idle
    batch_documents: int = 100
    stuck_seconds: float = 180.0


@dataclass(frozen=True, slots=True)
class Item:
    """A file on the line, as far as it has come."""

    ticket: Ticket
    prepared: Prepared | None = None
    staged: Staged | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.ticket.job_id, self.ticket.number

    @property
    def place(self) -> tuple[str, str, str]:
        return self.ticket.principal.tenant, self.ticket.collection, self.ticket.source


class Stuck(Exception):
    """A step that did not end in its time."""


@dataclass
class Conveyor:
    """Works through the files of `jobs` with the steps of `ingestor`. Everything runs on one event loop."""

    jobs: Jobs
    ingestor: Ingestor
    pace: Pace = field(default_factory=Pace)
    worker: str = field(default_factory=lambda: uuid.uuid4().hex)  # its name among all who work
    yielding: Yielding = UNYIELDING
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS, "ingest"))
    _stages: dict[tuple[str, int], str] = field(default_factory=dict)  # of every file on the line
    _places: set[tuple[str, str, str]] = field(default_factory=set)  # documents on the line
    _known: list[Ticket] = field(default_factory=list)
    _is_asked: bool = False  # somebody began to wait for a file since what is known was read
    _waiters: dict[tuple[str, int], set[asyncio.Future[Outcome]]] = field(default_factory=lambda: defaultdict(set))
    _alone: bool = False  # a file that may be poison is on the line, and nothing else
    _texts_ahead: int = 0  # read and cut, not yet at the embedder
    _taken: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _feeding: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._to_embed: asyncio.Queue[Item] = asyncio.Queue()  # bounded by its texts
        self._to_commit: asyncio.Queue[Item] = asyncio.Queue(COMMIT_AHEAD)

    async def run(self) -> None:
        """Work until cancelled. What others hold who work no more, is taken up too."""
        # First: who holds a file and is not known to work, is taken for dead.
        await self._patiently(self._stay, STAY_SECONDS)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.pace.readers):
                group.create_task(self._read_files())
            for _ in range(self.pace.embedders):
                group.create_task(self._embed_batches())
            group.create_task(self._commit_batches())
            group.create_task(self._keep_lease())
            group.create_task(self._keep_beating())
            group.create_task(self._take_over())
            group.create_task(self._flush_when_idle())

    def wake(self) -> None:
        """Say that there is something new to do."""
        self._changed.set()

    async def wait(self, job_id: str, number: int) -> Outcome:
        """How a file ends, once it does: here, or elsewhere, or before it was asked for. Raises NotFound."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiters[job_id, number].add(future)
        self._is_asked = True
        self.wake()
        try:
            while not future.done():
                ended = await self._patiently(partial(self.jobs.ended, job_id, number))
                if ended is not None:
                    return ended
                await asyncio.wait({future}, timeout=POLL_SECONDS)
            return future.result()
        finally:
            self._waiters[job_id, number].discard(future)
            if not self._waiters[job_id, number]:
                del self._waiters[job_id, number]

    # ── the stations ────────────────────────────────────────────────────────────────────────────

    async def _read_files(self) -> None:
        while True:
            item = Item(await self._next())
            made = await self._work([item], "parse", partial(self._read, item.ticket))
            if isinstance(made, Prepared):
                self._mark([item], "waiting for the embedder")
                while self._texts_ahead >= 2 * self.pace.batch_texts:
                    self._taken.clear()
                    await self._taken.wait()
                self._texts_ahead += len(made.texts)
                self._to_embed.put_nowait(Item(item.ticket, made))
            elif made is None:
                self._release([item])  # cancelled before it began
            else:
                await self._settle([(item, made, "parse")])

    def _read(self, ticket: Ticket) -> Prepared | Receipt | None:
        upload = self.jobs.start(ticket, self.worker)
        return None if upload is None else self.ingestor.prepare(upload, ticket.principal, ticket.accepted_at)

    async def _embed_batches(self) -> None:
        while True:
            batch = await self._gather(self._to_embed)
            self._texts_ahead -= sum(len(_prepared(item).texts) for item in batch)
            self._taken.set()
            for pause in self.yielding.pauses():
                self._mark(batch, "embed: giving way to answers")
                await asyncio.sleep(pause)
            await self._embed(batch)

    async def _embed(self, batch: Sequence[Item]) -> None:
        made = await self._work(batch, "embed", partial(self.ingestor.embed, [_prepared(item) for item in batch]))
        if isinstance(made, list):
            for item, staged in zip(batch, made, strict=True):
                await self._to_commit.put(Item(item.ticket, item.prepared, staged))
        elif len(batch) > 1 and not isinstance(made, Stuck):
            for item in batch:  # one of them spoils the rest
                await self._embed([item])
        else:
            await self._settle([(item, made, "embed") for item in batch])

    async def _commit_batches(self) -> None:
        while True:
            batch = await self._gather(self._to_commit)
            for _, some in groupby(sorted(batch, key=_collection), key=_collection):
                await self._commit(list(some))

    async def _commit(self, batch: Sequence[Item]) -> None:
        made = await self._work(batch, "publish", partial(self._publish, batch))
        if isinstance(made, dict):
            self._release([item for item in batch if item.key not in made])  # cancelled meanwhile
            await self._settle([(item, made[item.key], "publish") for item in batch if item.key in made])
        elif len(batch) > 1 and not isinstance(made, Stuck):
            for item in batch:  # one of them spoils the rest
                await self._commit([item])
        else:
            await self._settle([(item, made, "publish") for item in batch])

    def _publish(self, batch: Sequence[Item]) -> dict[tuple[str, int], Receipt | NexusError]:
        """Commit those that nobody has cancelled, which is asked again each time this is done again."""
        still_open = self.jobs.open_among([item.key for item in batch])
        batch = [item for item in batch if item.key in still_open]
        if not batch:
            return {}
        staged = [item.staged for item in batch if item.staged is not None]
        outcomes = self.ingestor.commit([_prepared(item) for item in batch], staged)
        return dict(zip([item.key for item in batch], outcomes, strict=True))

    async def _gather(self, queue: asyncio.Queue[Item]) -> list[Item]:
        """What has come to a station, up to a batch; at least one."""
        batch = [await queue.get()]
        while (
            not queue.empty()
            and len(batch) < self.pace.batch_documents
            and sum(len(_prepared(item).texts) for item in batch) < self.pace.batch_texts
        ):
            batch.append(queue.get_nowait())
        return batch

    # ── the feed ────────────────────────────────────────────────────────────────────────────────

    async def _next(self) -> Ticket:
        """The next file whose document is not on the line; one that failed its worker before goes alone.

        Whom somebody waits for does not wait for all that is known of a large job: the list has small jobs first.
        """
        async with self._feeding:
            while True:
                self._changed.clear()
                if self._is_asked:
                    self._is_asked, self._known = False, []
                ticket = self._pick()
                if ticket is None and not self._alone:
                    busy = list(self._stages)
                    self._known = await self._patiently(partial(self.jobs.waiting, 32, busy))
                    ticket = self._pick()
                if ticket is not None:
                    self._stages[ticket.key] = "parse"
                    self._places.add(Item(ticket).place)
                    return ticket
                await self._pause(POLL_SECONDS)

    def _pick(self) -> Ticket | None:
        for place, ticket in enumerate(self._known):
            suspect = ticket.attempt > 1
            if self._alone or (suspect and self._stages):
                return None
            if Item(ticket).place not in self._places:
                self._alone = suspect
                return self._known.pop(place)
        return None

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    # ── one step ────────────────────────────────────────────────────────────────────────────────

    async def _work(self, batch: Sequence[Item], stage: str, step: Callable[[], Result]) -> Result | Exception:
        """What the step returns, or what it raised; while a store is away, wait and do it again."""
        chunks = sum(len(item.prepared.texts) for item in batch if item.prepared)
        seconds = self.pace.stuck_seconds * max(1.0, chunks / 1000)
        told = [item.ticket.told for item in batch]
        traced = partial(
            done_for, told, f"ingest {stage}", {KIND: "CHAIN", DOCUMENTS: len(batch), CHUNKS: chunks}, step
        )
        pause = 0.25
        while True:
            self._mark(batch, stage)
            result = await self._attempt(traced, seconds)
            if not isinstance(result, TryAgain) or result.code == ENDED:
                return result
            self._mark(batch, f"{stage}: waiting: {result.message}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _attempt(self, step: Callable[[], Result], seconds: float | None = None) -> Result | Exception:
        future = asyncio.get_running_loop().run_in_executor(self._threads, step)
        await asyncio.wait({future}, timeout=seconds)
        if not future.done():
            future.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody waits any more
            return Stuck(f"no sign of life for {seconds:.0f} s")
        error = future.exception()
        if error is None:
            return future.result()
        if not isinstance(error, Exception):
            raise error
        return error

    async def _patiently(self, step: Callable[[], Result], longest_pause: float = LONGEST_PAUSE_SECONDS) -> Result:
        """For the list of jobs itself, and the coordinator: without them there is nothing to do but wait."""
        pause = 0.25
        while True:
            result = await self._attempt(step)
            if not isinstance(result, TryAgain):
                if isinstance(result, Exception):
                    raise result
                return result
            log.warning("waiting: %s", result.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest_pause)

    def _mark(self, batch: Iterable[Item], stage: str) -> None:
        for item in batch:
            self._stages[item.key] = stage

    # ── how files end ───────────────────────────────────────────────────────────────────────────

    async def _settle(self, ended: Sequence[tuple[Item, object, str]]) -> None:
        outcomes = []
        for item, made, stage in ended:
            if isinstance(made, Stuck) and item.ticket.attempt < 2:
                log.warning("%s is stuck in %r: %s; once more", item.ticket.source, stage, made)
                await self._patiently(partial(self.jobs.requeue, item.ticket, f"it was stuck in {stage!r}: {made}"))
            else:
                outcomes.append(_outcome(item.ticket, made, stage))
        if outcomes:
            await self._patiently(partial(self.jobs.settle, outcomes))
        self._release([item for item, _, _ in ended])
        for outcome in outcomes:
            telemetry.count_document(outcome.state, outcome.chunks)
            for future in self._waiters.get((outcome.job_id, outcome.number), ()):
                if not future.done():
                    future.set_result(outcome)

    def _release(self, items: Iterable[Item]) -> None:
        for item in items:
            self._stages.pop(item.key, None)
            self._places.discard(item.place)
            if item.ticket.attempt > 1:
                self._alone = False
        self._changed.set()

    # ── beside the line ─────────────────────────────────────────────────────────────────────────

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(STAY_SECONDS)
            await self._patiently(self._stay, STAY_SECONDS)

    def _stay(self) -> None:
        self.ingestor.hades.coordinator.stay(self.worker)

    async def _keep_beating(self) -> None:
        while True:
            await self._patiently(partial(self.jobs.beat, dict(self._stages)))
            await asyncio.sleep(BEAT_SECONDS)

    async def _take_over(self) -> None:
        while True:
            for outcome in await self._patiently(self._revive):
                log.warning("file %d of job %s: %s", outcome.number, outcome.job_id, outcome.reason)
            await asyncio.sleep(BEAT_SECONDS)

    def _revive(self) -> list[Outcome]:
        others = self.jobs.holders() - {self.worker}  # its own lease may have ended while it was stopped
        # Asked after that: they said that they work before they held anything.
        dead = others - self.ingestor.hades.coordinator.working() if others else set()
        return self.jobs.revive(dead) if dead else []

    async def _flush_when_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_SECONDS)
            if not self._stages:
                await self._attempt(self.ingestor.flush)


def _outcome(ticket: Ticket, made: object, stage: str) -> Outcome:
    if isinstance(made, Receipt):
        return Outcome(*ticket.key, made.outcome, receipt=made, attempt=ticket.attempt)
    state: FileState = "failed"
    if isinstance(made, Stuck):
        last = time.strftime("%H:%M:%S UTC", time.gmtime())
        why = f"it was stuck in {stage!r} twice: {made}, the last time until {last}"
        error: NexusError = Unprocessable(why, code="stuck")
    elif isinstance(made, NexusError):
        error = made
        state = "cancelled" if isinstance(made, Fenced) else "failed"
    else:
        log.error("%s failed in %r", ticket.source, stage, exc_info=made if isinstance(made, Exception) else None)
        error = NexusError(f"a fault in Nexus ({type(made).__name__}); the log of the ingestor has more")
    return Outcome(*ticket.key, state, stage, error, attempt=ticket.attempt)


def _prepared(item: Item) -> Prepared:
    assert item.prepared is not None
    return item.prepared


def _collection(item: Item) -> tuple[str, str]:
    return item.ticket.principal.tenant, item.ticket.collection
