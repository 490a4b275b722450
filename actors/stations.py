"""The steps of ingestion as stations of a Ray Data pipeline: read, embed, commit, each in a pool of its own.

Rows carry one column, `payload`: a pickled value of our own making. A station hands on what it
cannot work on, so a file that failed in one comes out at the end with its reason. Any row may pass a
station twice, for Ray repeats what a dead worker had in hand; every step allows that.
"""

import os
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import fsspec
import pyarrow

from actors.coordination import Coordination
from actors.hops import begin
from actors.pressure import yielding
from nexus import telemetry
from nexus.config import Config
from nexus.embedders import of_config
from nexus.errors import Fenced, InvalidRequest, NexusError, TooLarge, TryAgain
from nexus.hades import Hades
from nexus.ingest import Ingestor, Prepared, attach, open_steps
from nexus.jobs import MAX_ATTEMPTS, FileState, Jobs, Outcome, worn_out
from nexus.parsing import ENDED
from nexus.ports import DocumentStore, Embedder, LiveIndex, Staged
from nexus.registry import open_part
from nexus.types import Principal, Receipt, Upload, Vectors

Result = TypeVar("Result")

LONGEST_PAUSE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Task:
    """A file to ingest: where its bytes are, and which file of which job it is."""

    job_id: str
    number: int
    url: str
    source: str
    size: int


@dataclass(frozen=True, slots=True)
class Run:
    """What every station of one run is told: the settings, the stores, and whose job it is."""

    config: Config
    vectors_address: str
    fingerprint: str
    dimension: int
    own: LiveIndex  # the collection's: who commits adds the vectors for another beside it
    principal: Principal
    collection: str
    accepted_at: int

    def open_steps(self) -> Ingestor:
        steps = open_steps(self.config, self.open_hades(), _no_embedder)
        configured = self.config.models.embedder
        return replace(steps, embedder=lambda texts: steps.others.open(configured, self.fingerprint).embed(texts))

    def open_documents(self) -> DocumentStore:
        address, shared = self.config.stores.documents, self.config.graph.shared_metadata
        store: DocumentStore = open_part("stores", address, home=self.config.home, shared_metadata=shared)
        return store

    def open_hades(self) -> Hades:
        vectors = open_part("stores", self.vectors_address, home=self.config.home)
        embedder = self.config.models.embedder
        return Hades(self.open_documents(), vectors, self.fingerprint, self.dimension, Coordination(), embedder)


class Read:
    """Tasks to documents read and cut. The bytes are fetched here, and are nowhere else."""

    def __init__(self, run: Run) -> None:
        begin("reader")
        give_way()
        self._run, self._steps, self._jobs = run, run.open_steps(), Jobs(run.config.home)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        give_way()
        return _pack([self._read(task) for task in _unpack(batch)])

    def _read(self, task: Task) -> tuple[Task, Prepared] | Outcome:
        made = _try(partial(self._prepare, task))
        return (task, made) if isinstance(made, Prepared) else _outcome(task, made, "parse")

    def _prepare(self, task: Task) -> Prepared | Receipt:
        if self._jobs.attempt(task.job_id, task.number) > MAX_ATTEMPTS:
            raise worn_out("parse", time.time())
        most = self._run.config.http.max_body_bytes
        if task.size > most:
            raise TooLarge(f"the file has {task.size} bytes, over the limit of {most} (http.max_body_bytes)")
        try:
            with fsspec.open(task.url, "rb") as file:
                content = cast(bytes, file.read(most + 1))
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"it cannot be read: {error}", code="unreadable") from error
        upload = Upload(task.source, content, self._run.collection)
        return self._steps.prepare(upload, self._run.principal, self._run.accepted_at)


class Embed:
    """Documents read and cut, to documents with their vectors."""

    def __init__(self, run: Run) -> None:
        begin("embedder")
        give_way()
        self._model: Embedder = of_config(run.config, threads=1).of(run.own)
        self._own = run.own
        self._yielding = yielding(run.config.scaling)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        give_way()
        rows = _unpack(batch)
        for pause in self._yielding.pauses():
            time.sleep(pause)
        made = iter(self._embed([row for row in rows if not isinstance(row, Outcome)]))
        return _pack([row if isinstance(row, Outcome) else next(made) for row in rows])

    def _embed(self, batch: Sequence[tuple[Task, Prepared]]) -> list[tuple[Task, Prepared, Staged] | Outcome]:
        if not batch:
            return []
        prepared = [document for _, document in batch]
        texts = [text for document in prepared for text in document.texts]
        made = _try(lambda: attach(prepared, self._model.embed(texts), self._own.dimension, self._own.index))
        if isinstance(made, list):
            return [(*row, staged) for row, staged in zip(batch, made, strict=True)]
        if len(batch) == 1:
            return [_outcome(batch[0][0], made, "embed")]
        return [one for row in batch for one in self._embed([row])]  # one of them spoils the rest


class Commit:
    """Documents with their vectors, to outcomes: staged and published, a batch in one transaction."""

    def __init__(self, run: Run) -> None:
        begin("committer")
        give_way()
        self._steps = run.open_steps()

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        rows = _unpack(batch)
        made = iter(self._commit([row for row in rows if not isinstance(row, Outcome)]))
        ended = [row if isinstance(row, Outcome) else next(made) for row in rows]
        for outcome in ended:
            telemetry.count_document(outcome.state, outcome.chunks)
        return _pack(ended)

    def _commit(self, batch: Sequence[tuple[Task, Prepared, Staged]]) -> list[Outcome]:
        if not batch:
            return []
        prepared, staged = [row[1] for row in batch], [row[2] for row in batch]
        made = _try(partial(self._steps.commit, prepared, staged))
        ended = made if isinstance(made, list) else [made] * len(batch)
        return [_outcome(row[0], one, "publish") for row, one in zip(batch, ended, strict=True)]


def give_way() -> None:
    """Let this thread run only when nobody else wants the core: questions are answered as if it were not there.

    Ray calls a station from threads that it made itself, so each call says so anew; and a station says
    so as it opens, for loading a model is work, too.
    """
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.setpriority(os.PRIO_PROCESS, 0, 19)


def outcomes(batch: pyarrow.Table) -> list[Outcome]:
    """What came out at the end."""
    return cast(list[Outcome], _unpack(batch))


def pack(values: Sequence[object]) -> list[dict[str, bytes]]:
    """Values as rows, to begin with."""
    return [{"payload": pickle.dumps(value)} for value in values]


def _pack(values: Sequence[object]) -> pyarrow.Table:
    payloads = [pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL) for value in values]
    return pyarrow.table({"payload": pyarrow.array(payloads, pyarrow.large_binary())})


def _unpack(batch: pyarrow.Table) -> list[Any]:
    return [pickle.loads(payload) for payload in batch.column("payload").to_pylist()]


def _try(step: Callable[[], Result]) -> Result | Exception:
    """What the step returns or raises; while a store is away, wait and do it again."""
    pause = 0.25
    with ThreadPoolExecutor(1) as thread:  # a future keeps what was raised, so that a file fails alone
        while True:
            future = thread.submit(step)
            error = future.exception()
            if error is None:
                return future.result()
            if not isinstance(error, TryAgain) or error.code == ENDED:
                return error if isinstance(error, Exception) else RuntimeError(repr(error))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _outcome(task: Task, made: object, stage: str) -> Outcome:
    key = (task.job_id, task.number)
    if isinstance(made, Receipt):
        return Outcome(*key, made.outcome, receipt=made)
    state: FileState = "cancelled" if isinstance(made, Fenced) else "failed"
    fault = NexusError(f"a fault in Nexus ({type(made).__name__}: {made})")
    return Outcome(*key, state, stage, made if isinstance(made, NexusError) else fault)


def _no_embedder(texts: Sequence[str]) -> Vectors:
    raise AssertionError("in bulk, vectors come from the pool")
