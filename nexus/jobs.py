"""Jobs: what was accepted, and what became of it, file by file; on disk before anyone is told.

A job is a list of files. Each file ends exactly once, as done, unchanged, failed with a stage and a
reason, or cancelled; a job ends when its last file does. Bytes that are accepted stand beside the
file's row, in one transaction with it, and go when the file has ended; those of a failed file stay
a while, for a retry.

Whoever works on a file holds it, and the coordinator knows who works. A file held by somebody who does
not is taken up again by the next conveyor; after `MAX_ATTEMPTS` it is failed, for then it is the file
that ends its workers. Holders also beat on its row, for people to see.
"""

import json
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nexus.database import Database
from nexus.errors import (
    Conflict,
    InvalidRequest,
    NexusError,
    NotFound,
    RateLimited,
    Unavailable,
    Unprocessable,
    named,
)  # fmt: skip
from nexus.failpoints import pass_through
from nexus.hades import Fault, Hades
from nexus.ports import InteractionStore
from nexus.tracing import carried
from nexus.types import NOBODY, Principal, Receipt, Upload, content_digest, digest

DATABASE = "jobs.db"
MAX_ATTEMPTS = 3
SILENT_SECONDS = 60.0  # without a beat, before `fsck` doubts that anybody works
UPLOAD_SECONDS = 3600.0  # announced bytes that have not come by then never will
KEEP_BYTES_SECONDS = 86_400.0  # of a failed file, for a retry
KEEP_JOB_SECONDS = 30 * 86_400.0
MOST_OPEN_JOBS = 1000  # uploads of one tenant, unless the settings say another number
CROWDED_SECONDS = 5.0  # until one may have ended, where as many as may be are open
PAGES_GIVEN_BACK = 10_000  # at most, each time that is tidied; nobody else can write meanwhile
OPEN = ("expected", "queued", "running")
IS_OPEN = f"f.state IN {OPEN}"  # said word for word, or SQLite scans all files instead of the index of open ones

FileState = Literal["expected", "queued", "running", "done", "unchanged", "failed", "cancelled"]

MIGRATIONS = (
    """
    CREATE TABLE IF NOT EXISTS jobs (
        job_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, subject TEXT NOT NULL, permissions TEXT NOT NULL,
        collection TEXT NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL, reason TEXT,
        idempotency_key TEXT, request TEXT NOT NULL, accepted_at INTEGER NOT NULL,
        created_at REAL NOT NULL, ended_at REAL, beat_at REAL NOT NULL, files INTEGER NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_key ON jobs (tenant, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
    CREATE INDEX IF NOT EXISTS jobs_by_tenant ON jobs (tenant);
    CREATE INDEX IF NOT EXISTS jobs_running ON jobs (kind) WHERE state = 'running';
    CREATE TABLE IF NOT EXISTS files (
        job_id TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, number INTEGER NOT NULL, source TEXT NOT NULL,
        digest TEXT NOT NULL, size INTEGER NOT NULL, media_type TEXT, metadata TEXT NOT NULL,
        state TEXT NOT NULL, stage TEXT, reason TEXT, error TEXT, code TEXT, attempts INTEGER NOT NULL DEFAULT 0,
        beat_at REAL, since REAL, ended_at REAL, receipt TEXT, PRIMARY KEY (job_id, number)
    ) STRICT;
    CREATE INDEX IF NOT EXISTS files_by_state ON files (state, job_id, number) WHERE state IN
        ('expected', 'queued', 'running');
    CREATE INDEX IF NOT EXISTS files_by_source ON files (source);
    CREATE TABLE IF NOT EXISTS contents (
        job_id TEXT NOT NULL, number INTEGER NOT NULL, content BLOB NOT NULL, PRIMARY KEY (job_id, number),
        FOREIGN KEY (job_id, number) REFERENCES files ON DELETE CASCADE
    ) STRICT;
    """,
    """
    ALTER TABLE jobs ADD COLUMN holder TEXT;
    ALTER TABLE files ADD COLUMN holder TEXT;
    UPDATE jobs SET holder = 'a Nexus of before' WHERE kind = 'bulk';
    UPDATE files SET holder = 'a Nexus of before' WHERE state = 'running'
        AND job_id IN (SELECT job_id FROM jobs WHERE kind = 'upload');
    """,
    """
    ALTER TABLE jobs ADD COLUMN readers TEXT;
    ALTER TABLE jobs ADD COLUMN seen_by TEXT NOT NULL DEFAULT '[]';
    """,
    "ALTER TABLE jobs ADD COLUMN told TEXT NOT NULL DEFAULT '{}'",
)
MAY_SEE = (
    "j.tenant = :tenant AND (j.subject = :subject OR j.seen_by = '[]'"
    " OR EXISTS (SELECT 1 FROM json_each(j.seen_by) WHERE value = :subject))"
)
JOB = ("job_id", "tenant", "subject", "collection", "kind", "state", "reason", "created_at", "ended_at")
FILE = (
    "number", "source", "digest", "size", "state", "stage", "reason", "error", "code", "attempts", "beat_at", "since",
    "ended_at", "receipt",
)  # fmt: skip


def seen_by(readers: frozenset[str] | None, restricted: Iterable[frozenset[str]]) -> frozenset[str]:
    """Who may see a job whose documents get these readers, or keep theirs: some have these `restricted` sets."""
    if readers is not None:
        return readers
    sets = list(restricted)
    return frozenset.intersection(*sets) or frozenset({NOBODY}) if sets else frozenset()


@dataclass(frozen=True, slots=True)
class Announced:
    """A file as its sender names it: with its bytes, or to be sent later, or found unchanged already."""

    source: str
    digest: str
    size: int
    media_type: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    content: bytes | None = None
    unchanged: Receipt | None = None


@dataclass(frozen=True, slots=True)
class File:
    """What became of one file so far.

    `error` is the class of nexus.errors that a failed one would raise, `beat_at` when its worker last
    said that it lives, `since` when it entered its stage. Times are in Unix seconds.
    """

    number: int
    source: str
    digest: str
    size: int
    state: FileState
    stage: str | None
    reason: str | None
    error: str | None
    code: str | None
    attempts: int
    beat_at: float | None
    since: float | None
    ended_at: float | None
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class Job:
    """A job and how many of its files are in which state."""

    job_id: str
    tenant: str
    subject: str
    collection: str
    kind: str
    state: Literal["running", "done", "failed", "cancelled"]
    reason: str | None
    created_at: float
    ended_at: float | None
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def ended(self) -> int:
        return sum(count for state, count in self.counts.items() if state not in OPEN)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A file to work on: which one, which attempt this is, and for whom."""

    job_id: str
    number: int
    attempt: int
    collection: str
    source: str
    principal: Principal
    accepted_at: int
    told: Mapping[str, str] = field(default_factory=dict)  # of the request that it came with (tracing.carried)

    @property
    def key(self) -> tuple[str, int]:
        return self.job_id, self.number


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a file ended. Of a given `attempt` it counts only if there has been no later one."""

    job_id: str
    number: int
    state: FileState
    stage: str | None = None
    error: NexusError | None = None
    receipt: Receipt | None = None
    attempt: int | None = None

    @property
    def reason(self) -> str | None:
        return self.error.message if self.error else None

    @property
    def chunks(self) -> int:
        """How many were published."""
        return self.receipt.chunks if self.receipt and self.state == "done" else 0


class Jobs(Database):
    """All jobs of a home, in one SQLite file that the processes of the machine share."""

    def __init__(self, home: Path, most_open: int = MOST_OPEN_JOBS) -> None:
        """No tenant has more than `most_open` uploads that have not ended."""
        path = home / DATABASE
        pragmas: tuple[str, ...] = ("journal_mode = WAL", "foreign_keys = ON")
        if not path.exists() or not path.stat().st_size:
            # Pages that the contents leave are given back. On any other file it is not heeded, and waits to write.
            pragmas = ("auto_vacuum = INCREMENTAL", *pragmas)
        super().__init__(path, "the list of jobs", pragmas)
        self._most_open = most_open
        self._migrate(MIGRATIONS)

    # ── accepting ───────────────────────────────────────────────────────────────────────────────

    def accept(
        self, principal: Principal, collection: str, files: Sequence[Announced], *, accepted_at: int,
        idempotency_key: str | None = None, kind: Literal["upload", "bulk"] = "upload", holder: str | None = None,
        readers: frozenset[str] | None = None, seen_by: frozenset[str] = frozenset(),
    ) -> tuple[Job, bool]:  # fmt: skip
        """Write the job with all that is known of it; returns it and whether it is new.

        `readers` are those that its documents get; None leaves them those they have. `seen_by` are the subjects
        of the tenant that may see the job, beside whoever it is of; empty means all of them.
        A bulk job is held, with all its files, by whoever runs it; the files of an upload by those who start them.
        The same key with the same files is the same job. Raises Conflict for the same key with others, RateLimited
        where as many uploads of the tenant are open as may be.
        """
        given = [] if readers is None else [_json(sorted(readers))]
        described = (f"{file.source}\0{file.digest}\0{_json(file.metadata)}" for file in files)
        request = digest(collection, *given, *described)
        pass_through("ingest.before_accept")
        with self._transaction() as db:
            if known := _by_key(db, principal, idempotency_key):
                if known[1] != request or not _may_see(db, known[0], principal):
                    raise Conflict(
                        "this Idempotency-Key came before with another request; choose a new key",
                        code="idempotency_key_reused",
                    )
                return _job(db, known[0]), False
            if kind == "upload":
                _refuse_more(db, principal.tenant, self._most_open)
            job_id, now = uuid.uuid4().hex, time.time()
            db.execute(
                "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, 'running', NULL, ?, ?, ?, ?, NULL, ?, ?, ?, ?, ?, ?)",
                (
                    job_id, principal.tenant, principal.subject, _json(sorted(principal.permissions)), collection,
                    kind, idempotency_key, request, accepted_at, now, now, len(files), holder,
                    None if readers is None else _json(sorted(readers)), _json(sorted(seen_by)),
                    _json(carried()),
                ),
            )  # fmt: skip
            for number, file in enumerate(files):
                if file.unchanged and kind == "upload" and _is_under_way(db, principal, collection, file.source):
                    file = replace(file, unchanged=None)  # when its turn comes, it may have to be brought back
                _insert_file(db, job_id, number, file, now, kind)
            _end_if_over(db, job_id, now)
            job = _job(db, job_id)
        pass_through("ingest.after_accept")
        return job, True

    def supply(self, job_id: str, principal: Principal, contents: Mapping[int, bytes]) -> None:
        """Bytes of announced files; a file whose bytes are not those announced fails. Raises NotFound."""
        changed = InvalidRequest("it changed between being announced and being sent; add it again", code="changed")
        pass_through("ingest.before_accept")
        with self._transaction() as db:
            now = time.time()
            _require(db, job_id, principal)
            for number, content in contents.items():
                row = db.execute(
                    "SELECT digest, state FROM files WHERE job_id = ? AND number = ?", (job_id, number)
                ).fetchone()
                if row is None:
                    raise NotFound(f"the job has no file {number}")
                if row[1] != "expected":
                    continue  # the bytes announced are here, or were: what comes now is a second sending
                if content_digest(content) != row[0]:
                    _end_file(db, Outcome(job_id, number, "failed", "upload", changed), now)
                else:
                    db.execute("INSERT OR REPLACE INTO contents VALUES (?, ?, ?)", (job_id, number, content))
                    db.execute("UPDATE files SET state = 'queued' WHERE job_id = ? AND number = ?", (job_id, number))
            db.execute("UPDATE jobs SET beat_at = ? WHERE job_id = ?", (now, job_id))
            _end_if_over(db, job_id, now)
        pass_through("ingest.after_accept")

    # ── working ─────────────────────────────────────────────────────────────────────────────────

    def waiting(self, limit: int, apart_from: Sequence[tuple[str, int]] = ()) -> list[Ticket]:
        """Files with their bytes here, in order; those of small jobs first, for someone is waiting for them.

        Of several uploads of one document only the earliest, so that the last one accepted is the last one published.
        """
        found: list[Ticket] = []
        with self._reading() as db:
            jobs = db.execute(
                "SELECT rowid, job_id, collection, tenant, subject, permissions, accepted_at, told FROM jobs"
                " WHERE state = 'running' AND kind = 'upload' ORDER BY files > 1, rowid"
            ).fetchall()
            for place, job_id, collection, tenant, subject, permissions, accepted_at, told in jobs:
                rows = db.execute(  # CROSS JOIN: by source, or SQLite reads all files of all jobs for each of these
                    f"SELECT number, attempts, source FROM files f WHERE {IS_OPEN} AND f.state = 'queued'"
                    " AND job_id = :job AND number NOT IN (SELECT value FROM json_each(:apart))"
                    " AND NOT EXISTS (SELECT 1 FROM files e CROSS JOIN jobs k USING (job_id)"
                    f"   WHERE e.state IN {OPEN} AND e.state != 'expected'"
                    "   AND e.source = f.source AND k.tenant = :tenant AND k.collection = :collection"
                    "   AND k.kind = 'upload'"
                    "   AND (k.rowid, e.number) < (:place, f.number)) ORDER BY number LIMIT :limit",
                    {
                        "job": job_id, "apart": _json([number for job, number in apart_from if job == job_id]),
                        "tenant": tenant, "collection": collection, "place": place, "limit": limit - len(found),
                    },
                )  # fmt: skip
                principal = _principal(tenant, subject, permissions)
                about = (principal, accepted_at, json.loads(told))
                found += [Ticket(job_id, n, tries + 1, collection, source, *about) for n, tries, source in rows]
                if len(found) == limit:
                    break
        return found

    def start(self, ticket: Ticket, holder: str) -> Upload | None:
        """Take a file up, again for the same attempt too: its bytes; None if another did, or it was cancelled."""
        key = (ticket.job_id, ticket.number)
        with self._transaction(durable=False) as db:
            taken = db.execute(
                "UPDATE files SET state = 'running', stage = 'parse', attempts = :attempt, beat_at = :now,"
                " since = :now, holder = :holder"
                " WHERE job_id = :job AND number = :number AND (state = 'queued' AND attempts < :attempt"
                " OR state = 'running' AND attempts = :attempt AND holder = :holder)",
                {"attempt": ticket.attempt, "now": time.time(), "holder": holder, "job": key[0], "number": key[1]},
            ).rowcount
            if not taken:
                return None
            source, media_type, metadata, content, readers = db.execute(
                "SELECT f.source, f.media_type, f.metadata, c.content, j.readers FROM files f JOIN contents c"
                " USING (job_id, number) JOIN jobs j USING (job_id) WHERE job_id = ? AND number = ?",
                key,
            ).fetchone()
        limited = None if readers is None else frozenset(json.loads(readers))
        return Upload(source, content, ticket.collection, media_type, json.loads(metadata), limited)

    def beat(self, stages: Mapping[tuple[str, int], str]) -> None:
        """Say of files under way that they still are, and in which stage: for people to see."""
        now = time.time()
        with self._transaction(durable=False) as db:
            db.executemany(
                "UPDATE files SET beat_at = :now, since = IIF(stage = :stage, COALESCE(since, :now), :now),"
                " stage = :stage WHERE job_id = :job AND number = :number AND state = 'running'",
                [{"now": now, "stage": stage, "job": key[0], "number": key[1]} for key, stage in stages.items()],
            )
            db.executemany(
                "UPDATE jobs SET beat_at = ? WHERE job_id = ?", [(now, job_id) for job_id in {k[0] for k in stages}]
            )

    def beat_job(self, job_id: str) -> None:
        """Say that whoever runs a whole job still does."""
        with self._transaction(durable=False) as db:
            db.execute("UPDATE jobs SET beat_at = ? WHERE job_id = ?", (time.time(), job_id))

    def attempt(self, job_id: str, number: int) -> int:
        """Count one more attempt at a file of a bulk job, before it is begun; returns which one it is."""
        with self._transaction(durable=False) as db:
            (attempts,) = db.execute(
                "UPDATE files SET attempts = attempts + 1, stage = 'parse' WHERE job_id = ? AND number = ?"
                " RETURNING attempts",
                (job_id, number),
            ).fetchone()
        return int(attempts)

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Write how files ended. The first word stands: a file that has ended stays as it ended."""
        pass_through("ingest.before_finish")
        now = time.time()
        with self._transaction(durable=False) as db:
            for one in outcomes:
                _end_file(db, one, now)
            for job_id in {one.job_id for one in outcomes}:
                _end_if_over(db, job_id, now)
        pass_through("ingest.after_finish")

    def requeue(self, ticket: Ticket, reason: str) -> None:
        """Give a file that is under way back to the queue."""
        with self._transaction(durable=False) as db:
            db.execute(
                "UPDATE files SET state = 'queued', stage = NULL, reason = ? WHERE job_id = ? AND number = ?"
                " AND state = 'running' AND attempts = ?",
                (reason, ticket.job_id, ticket.number, ticket.attempt),
            )

    def holders(self) -> set[str]:
        """Who holds a file that is under way, or a whole job."""
        with self._reading() as db:
            rows = db.execute(
                f"SELECT f.holder FROM files f WHERE {IS_OPEN} AND f.state = 'running'"
                " UNION SELECT holder FROM jobs WHERE state = 'running' AND kind = 'bulk'"
            )
            return {holder for (holder,) in rows if holder is not None}

    def revive(self, dead: Collection[str]) -> list[Outcome]:
        """Queue again what these left; fail what has ended its workers too often, and what was left of bulk jobs."""
        held = {"dead": _json(list(dead)), "most": MAX_ATTEMPTS}
        with self._transaction(durable=False) as db:
            rows = db.execute(
                "SELECT f.job_id, f.number, f.stage, f.beat_at FROM files f"
                f" WHERE {IS_OPEN} AND f.state = 'running' AND f.attempts >= :most"
                " AND f.holder IN (SELECT value FROM json_each(:dead))",
                held,
            ).fetchall()
            db.execute(
                "UPDATE files AS f SET state = 'queued', stage = NULL, reason = 'its worker ended; taken up again'"
                f" WHERE {IS_OPEN} AND f.state = 'running' AND f.attempts < :most"
                " AND f.holder IN (SELECT value FROM json_each(:dead))",
                held,
            )
            left = db.execute(
                "SELECT f.job_id, f.number, f.stage FROM jobs j JOIN files f USING (job_id)"
                f" WHERE {IS_OPEN} AND f.state = 'running' AND j.kind = 'bulk' AND j.state = 'running'"
                " AND j.holder IN (SELECT value FROM json_each(:dead))",
                held,
            ).fetchall()
        outcomes = [
            Outcome(job_id, number, "failed", stage, worn_out(stage, beat_at))
            for job_id, number, stage, beat_at in rows
        ] + [
            Outcome(job_id, number, "failed", stage, Unavailable("its bulk run ended early; submit it again"))
            for job_id, number, stage in left
        ]
        if outcomes:
            self.settle(outcomes)
        return outcomes

    # ── looking, cancelling, retrying ───────────────────────────────────────────────────────────

    def find(self, job_id: str, principal: Principal) -> Job:
        """The job. Raises NotFound, for one that the principal may not see too."""
        with self._reading() as db:
            _require(db, job_id, principal)
            return _job(db, job_id)

    def recent(self, principal: Principal, state: str | None, after: str | None, limit: int) -> list[Job]:
        """Jobs that the principal may see, the latest first, those made before the job `after`."""
        with self._reading() as db:
            rows = db.execute(
                f"SELECT j.job_id FROM jobs j WHERE {MAY_SEE} AND (:state IS NULL OR j.state = :state)"
                f" AND (:after IS NULL OR j.rowid < (SELECT j.rowid FROM jobs j WHERE {MAY_SEE} AND j.job_id = :after))"
                " ORDER BY j.rowid DESC LIMIT :limit",
                {**_who(principal), "state": state, "after": after, "limit": limit},
            ).fetchall()
            return [_job(db, job_id) for (job_id,) in rows]

    def files(self, job_id: str, principal: Principal, state: str | None, after: int, limit: int) -> list[File]:
        """Files of a job in order, those numbered above `after`, in one state where given."""
        with self._reading() as db:
            _require(db, job_id, principal)
            rows = db.execute(
                f"SELECT {', '.join(FILE)} FROM files WHERE job_id = ? AND number > ? AND (? IS NULL OR state = ?)"
                " ORDER BY number LIMIT ?",
                (job_id, after, state, state, limit),
            )
            return [_file(row) for row in rows]

    def cancel(self, job_id: str, principal: Principal) -> Job:
        """End every file that has not ended. What is under way is not published any more."""
        now = time.time()
        with self._transaction() as db:
            _require(db, job_id, principal)
            db.execute(
                f"UPDATE files SET state = 'cancelled', reason = 'the job was cancelled', ended_at = ?"
                f" WHERE job_id = ? AND state IN {OPEN}",
                (now, job_id),
            )
            db.execute(
                "DELETE FROM contents WHERE job_id = ?1 AND number IN"
                " (SELECT number FROM files WHERE job_id = ?1 AND state = 'cancelled')",
                (job_id,),
            )
            _end_if_over(db, job_id, now)
            return _job(db, job_id)

    def open_among(self, keys: Sequence[tuple[str, int]]) -> set[tuple[str, int]]:
        """Those of these files that are still under way: nobody cancelled them meanwhile."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT f.job_id, f.number FROM json_each(?) AS a JOIN files f"
                " ON f.job_id = json_extract(a.value, '$[0]') AND f.number = json_extract(a.value, '$[1]')"
                " WHERE f.state = 'running'",
                (_json([list(key) for key in keys]),),
            )
            return {(job_id, number) for job_id, number in rows}

    def ended(self, job_id: str, number: int) -> Outcome | None:
        """How a file ended, if it has. Raises NotFound."""
        with self._reading() as db:
            row = db.execute(
                "SELECT state, stage, error, reason, code, receipt FROM files WHERE job_id = ? AND number = ?",
                (job_id, number),
            ).fetchone()
        if row is None:
            raise NotFound(f"there is no file {number} of such a job")
        state, stage, error, reason, code, receipt = row
        if state in OPEN:
            return None
        return Outcome(
            job_id, number, state, stage, named(error, reason, code) if error else None, _read_receipt(receipt)
        )

    def retry(self, job_id: str, number: int, principal: Principal) -> Job:
        """Queue a failed file again.

        Raises NotFound, Conflict when it did not fail or its bytes are gone, and RateLimited as `accept` does.
        """
        with self._transaction() as db:
            _require(db, job_id, principal)
            row = db.execute(
                "SELECT f.state, c.number FROM files f LEFT JOIN contents c USING (job_id, number)"
                " WHERE f.job_id = ? AND f.number = ?",
                (job_id, number),
            ).fetchone()
            if row is None:
                raise NotFound(f"the job has no file {number}")
            if row[0] != "failed":
                raise Conflict(f"file {number} is {row[0]}; only a failed one can be tried again")
            if row[1] is None:
                raise Conflict(f"the bytes of file {number} are no longer kept; add the file again")
            if _job(db, job_id).state != "running":
                _refuse_more(db, principal.tenant, self._most_open)
            db.execute(
                "UPDATE files SET state = 'queued', stage = NULL, reason = NULL, error = NULL, code = NULL,"
                " attempts = 0, ended_at = NULL WHERE job_id = ? AND number = ?",
                (job_id, number),
            )
            db.execute("UPDATE jobs SET state = 'running', reason = NULL, ended_at = NULL WHERE job_id = ?", (job_id,))
            return _job(db, job_id)

    # ── cleaning up and checking ────────────────────────────────────────────────────────────────

    def forget(self, tenant: str, collection: str, sources: Sequence[str], before: int | None = None) -> int:
        """Drop kept bytes of deleted documents, and cancel what is queued of them; returns how many contents went.

        `before` is the sequence of the delete: what was accepted at it or later has nothing to do with it.
        """
        with self._transaction() as db:
            rows = db.execute(
                "SELECT f.job_id, f.number FROM files f JOIN jobs j USING (job_id) LEFT JOIN contents c"
                f" USING (job_id, number) WHERE j.tenant = :tenant AND j.collection = :collection"
                f" AND f.source IN (SELECT value FROM json_each(:sources)) AND ({IS_OPEN} OR c.number IS NOT NULL)"
                " AND f.state != 'running' AND (:before IS NULL OR j.accepted_at < :before)",
                {"tenant": tenant, "collection": collection, "sources": _json(list(sources)), "before": before},
            ).fetchall()
            dropped = 0
            for job_id, number in rows:
                key = (job_id, number)
                dropped += db.execute("DELETE FROM contents WHERE job_id = ? AND number = ?", key).rowcount
                db.execute(
                    "UPDATE files SET state = 'cancelled', reason = 'the document was deleted', ended_at = ?"
                    " WHERE job_id = ? AND number = ? AND state IN ('expected', 'queued')",
                    (time.time(), *key),
                )
                _end_if_over(db, job_id, time.time())
            return dropped

    def tidy(self) -> dict[str, int]:
        """Fail uploads whose bytes never came, drop bytes kept too long and jobs of long ago; says how many of each."""
        now = time.time()
        with self._reading() as db:
            late = db.execute(
                "SELECT f.job_id, f.number FROM files f JOIN jobs j USING (job_id)"
                f" WHERE {IS_OPEN} AND f.state = 'expected' AND j.beat_at < ?",
                (now - UPLOAD_SECONDS,),
            ).fetchall()
        never = InvalidRequest("its bytes were announced and never came; add it again", code="never_sent")
        self.settle([Outcome(job_id, number, "failed", "upload", never) for job_id, number in late])
        with self._transaction(durable=False) as db:
            contents = db.execute(
                "DELETE FROM contents WHERE EXISTS (SELECT 1 FROM files f WHERE f.job_id = contents.job_id"
                " AND f.number = contents.number AND f.ended_at < ?)",
                (now - KEEP_BYTES_SECONDS,),
            ).rowcount
            jobs = db.execute("DELETE FROM jobs WHERE ended_at < ?", (now - KEEP_JOB_SECONDS,)).rowcount
        self._give_space_back()
        return {"uploads that never came": len(late), "kept contents": contents, "jobs": jobs}

    def _give_space_back(self) -> None:
        with self._transaction(durable=False) as db:
            (free,) = db.execute("PRAGMA freelist_count").fetchone()
            for _ in range(min(free, PAGES_GIVEN_BACK)):
                db.execute("PRAGMA incremental_vacuum")  # one page: sqlite3 takes only its first step

    def faults(self) -> list[str]:
        """Ids of jobs that cannot be as they are: open without open files, or under way with nobody working."""
        stale = time.time() - SILENT_SECONDS
        with self._reading() as db:
            rows = db.execute(
                f"SELECT DISTINCT job_id FROM jobs j WHERE (state = 'running') != EXISTS (SELECT 1 FROM files f"
                f" WHERE f.job_id = j.job_id AND f.state IN {OPEN}) UNION"
                " SELECT job_id FROM files f JOIN jobs j USING (job_id)"
                " WHERE f.state = 'running' AND MAX(COALESCE(f.beat_at, 0), j.beat_at) < ? UNION"
                " SELECT job_id FROM files f LEFT JOIN contents c USING (job_id, number)"
                " WHERE f.state = 'queued' AND c.number IS NULL",
                (stale,),
            )
            return [job_id for (job_id,) in rows]


# ── inside a transaction ────────────────────────────────────────────────────────────────────────


def _by_key(db: sqlite3.Connection, principal: Principal, key: str | None) -> tuple[str, str] | None:
    if key is None:
        return None
    row: tuple[str, str] | None = db.execute(
        "SELECT job_id, request FROM jobs WHERE tenant = ? AND idempotency_key = ?", (principal.tenant, key)
    ).fetchone()
    return row


def _is_under_way(db: sqlite3.Connection, principal: Principal, collection: str, source: str) -> bool:
    """Whether another upload of the document was accepted before and has not ended."""
    row = db.execute(
        f"SELECT 1 FROM files f JOIN jobs j USING (job_id) WHERE {IS_OPEN} AND f.source = ? AND j.tenant = ?"
        " AND j.collection = ?",
        (source, principal.tenant, collection),
    ).fetchone()
    return row is not None


def _refuse_more(db: sqlite3.Connection, tenant: str, most: int) -> None:
    """Raises RateLimited where so many uploads of a tenant are open: within the transaction that would add one."""
    (number,) = db.execute(
        "SELECT COUNT(*) FROM jobs INDEXED BY jobs_running WHERE state = 'running' AND kind = 'upload' AND tenant = ?",
        (tenant,),
    ).fetchone()
    if number >= most:
        raise RateLimited(
            f"{number} jobs of this tenant are open, and no more may be: wait until one has ended, or cancel one",
            retry_after=CROWDED_SECONDS, code="too_many_jobs",
        )  # fmt: skip


def _insert_file(db: sqlite3.Connection, job_id: str, number: int, file: Announced, now: float, kind: str) -> None:
    waiting = "running" if kind == "bulk" else "expected" if file.content is None else "queued"
    state = "unchanged" if file.unchanged else waiting
    db.execute(
        "INSERT INTO files (job_id, number, source, digest, size, media_type, metadata, state, ended_at, receipt)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            job_id, number, file.source, file.digest, file.size, file.media_type, _json(file.metadata), state,
            now if file.unchanged else None, _write_receipt(file.unchanged),
        ),
    )  # fmt: skip
    if state == "queued":
        db.execute("INSERT INTO contents VALUES (?, ?, ?)", (job_id, number, file.content))


def _end_file(db: sqlite3.Connection, one: Outcome, now: float) -> None:
    ended = db.execute(
        "UPDATE files SET state = ?, stage = ?, reason = ?, error = ?, code = ?, receipt = ?, ended_at = ?"
        f" WHERE job_id = ? AND number = ? AND state IN {OPEN} AND attempts <= COALESCE(?, attempts)",
        (
            one.state, one.stage, one.reason, type(one.error).__name__ if one.error else None,
            one.error.code if one.error else None, _write_receipt(one.receipt), now, one.job_id, one.number,
            one.attempt,
        ),
    ).rowcount  # fmt: skip
    if ended and one.state != "failed":
        db.execute("DELETE FROM contents WHERE job_id = ? AND number = ?", (one.job_id, one.number))


def _end_if_over(db: sqlite3.Connection, job_id: str, now: float) -> None:
    """A job ends with its last file: cancelled if all that ended badly was cancelled, failed if nothing came of it."""
    if db.execute(f"SELECT 1 FROM files f WHERE {IS_OPEN} AND job_id = ? LIMIT 1", (job_id,)).fetchone():
        return
    counts = _counts(db, job_id)
    good, failed, cancelled = (
        counts.get("done", 0) + counts.get("unchanged", 0), counts.get("failed", 0), counts.get("cancelled", 0)
    )  # fmt: skip
    state, reason = "done", None
    if cancelled and not failed:
        state, reason = "cancelled", f"{cancelled} of {sum(counts.values())} files were cancelled"
    elif failed and not good:
        state, reason = "failed", "no file of it could be added; each says why"
    db.execute(
        "UPDATE jobs SET state = ?, reason = ?, ended_at = ? WHERE job_id = ? AND state = 'running'",
        (state, reason, now, job_id),
    )


def _require(db: sqlite3.Connection, job_id: str, principal: Principal) -> None:
    if not _may_see(db, job_id, principal):
        raise NotFound("no such job")


def _may_see(db: sqlite3.Connection, job_id: str, principal: Principal) -> bool:
    where = {**_who(principal), "job": job_id}
    return db.execute(f"SELECT 1 FROM jobs j WHERE j.job_id = :job AND {MAY_SEE}", where).fetchone() is not None


def _who(principal: Principal) -> dict[str, object]:
    return {"tenant": principal.tenant, "subject": principal.subject}


def _job(db: sqlite3.Connection, job_id: str) -> Job:
    row = db.execute(f"SELECT {', '.join(JOB)} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    fields: dict[str, Any] = dict(zip(JOB, row, strict=True))
    return Job(**fields, counts=_counts(db, job_id))


def _file(row: Sequence[Any]) -> File:
    fields: dict[str, Any] = dict(zip(FILE, row, strict=True))
    return File(**{**fields, "receipt": _read_receipt(fields["receipt"])})


def _counts(db: sqlite3.Connection, job_id: str) -> dict[str, int]:
    return dict(db.execute("SELECT state, COUNT(*) FROM files WHERE job_id = ? GROUP BY state", (job_id,)))


def worn_out(stage: str | None, beat_at: float) -> Unprocessable:
    """Why a file is given up that ended its workers."""
    last = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(beat_at))
    return Unprocessable(
        f"its worker ended {MAX_ATTEMPTS} times over it, the last time in the stage {stage!r} at {last}", code="stuck"
    )


def _principal(tenant: str, subject: str, permissions: str) -> Principal:
    return Principal(tenant, subject, frozenset(json.loads(permissions)))


def _json(value: Any) -> str:
    return json.dumps(dict(value) if isinstance(value, Mapping) else value)


def _write_receipt(receipt: Receipt | None) -> str | None:
    return None if receipt is None else _json({name: getattr(receipt, name) for name in receipt.__slots__})


def _read_receipt(text: str | None) -> Receipt | None:
    return None if text is None else Receipt(**json.loads(text))


def examine(hades: Hades, jobs: Jobs, repair: bool, memory: InteractionStore | None = None) -> list[Fault]:
    """Both stores and the list of jobs, compared, and memory where it is given; mended first where asked for."""
    faults = hades.fsck()
    if repair and faults:
        hades.repair(faults)
        faults = hades.fsck()
    others = {"jobs that nobody works on": jobs.faults()}
    if memory is not None:
        if repair:
            memory.repair()
        others["vectors of memory that are none"] = memory.damaged()
    return [*faults, *(Fault(kind, "", tuple(ids)) for kind, ids in others.items() if ids)]
