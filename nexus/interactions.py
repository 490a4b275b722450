"""What memory keeps, in one SQLite file: interactions, their vectors, and what summaries were made of.

A vector stands beside its interaction, with the fingerprint of the embedder that made it: only vectors of one
fingerprint are compared, and those of another wait for `embed`. `parts` says which interactions went into a summary,
by their ids alone, so that whoever deletes one of them deletes the summary, too. What is deleted is overwritten
(`secure_delete`), and the log of changes, which would still hold it, is emptied after each deletion.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from heapq import nsmallest
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nexus.database import Database, condition_of
from nexus.failpoints import pass_through
from nexus.filters import Filter
from nexus.types import Forgotten, Interaction, InteractionKind, MemoryEntry, Vector

log = logging.getLogger("nexus.interactions")

COMPARED_AT_ONCE = 4096  # vectors
COSINE_DIGITS = 6  # behind the point
CLEARING_MILLISECONDS = 1000  # that emptying the log waits for who reads; the next deletion, or upkeep, does it then
MIGRATIONS = (
    """
    CREATE TABLE interactions (
        ordinal INTEGER PRIMARY KEY, interaction_id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, subject TEXT NOT NULL,
        user TEXT NOT NULL, query TEXT NOT NULL, response TEXT NOT NULL, created_at REAL NOT NULL,
        context TEXT NOT NULL, confidence REAL, model TEXT, gpu_utilization REAL, latency_ms REAL,
        metadata TEXT NOT NULL, kind TEXT NOT NULL, size INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX interactions_by_subject ON interactions (tenant, subject, created_at, interaction_id);
    CREATE INDEX interactions_by_user ON interactions (tenant, user);
    CREATE INDEX interactions_by_age ON interactions (tenant, kind, created_at, interaction_id, size);
    CREATE TABLE vectors (
        ordinal INTEGER PRIMARY KEY REFERENCES interactions ON DELETE CASCADE,
        fingerprint TEXT NOT NULL, vector BLOB NOT NULL
    ) STRICT;
    CREATE INDEX vectors_by_fingerprint ON vectors (fingerprint);
    CREATE TABLE parts (
        part TEXT PRIMARY KEY, summary INTEGER NOT NULL REFERENCES interactions ON DELETE CASCADE
    ) STRICT;
    CREATE INDEX parts_by_summary ON parts (summary)
    """,
)
ROW = (
    "v.interaction_id, v.tenant, v.subject, v.user, v.query, v.response, v.created_at, v.context, v.confidence,"
    " v.model, v.gpu_utilization, v.latency_ms, v.metadata, v.kind"
)
FIELDS = ROW.replace("v.", "")
COLUMNS = {
    "user": "v.user", "kind": "v.kind", "model_used": "v.model", "confidence": "v.confidence",
    "gpu_utilization": "v.gpu_utilization", "latency_ms": "v.latency_ms", "timestamp": "v.created_at",
}  # fmt: skip
MINE = "v.tenant = :tenant AND v.subject = :subject"
OF_TENANT = "+v.tenant = :tenant"  # those found by their ids ("+": not all that the tenant has, read one by one)
STALE = "NOT EXISTS (SELECT 1 FROM vectors w WHERE w.ordinal = v.ordinal AND w.fingerprint = :fingerprint)"


class SqliteInteractions(Database):
    """An InteractionStore in one file, or in memory."""

    def __init__(self, path: str | Path) -> None:
        if str(path) != ":memory:":  # what people asked is nobody else's on this machine
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        super().__init__(path, "memory", ("journal_mode = WAL", "secure_delete = ON", "foreign_keys = ON"))
        self._migrate(MIGRATIONS)

    def check(self) -> None:
        with self._reading() as db:
            db.execute("SELECT 1 FROM interactions LIMIT 1").fetchone()

    # ── keeping and recalling ───────────────────────────────────────────────────────────────────

    def add(self, interaction: Interaction, vector: Vector | None, fingerprint: str) -> None:
        with self._transaction() as db:
            _insert(db, interaction, vector, fingerprint)

    def recent(self, tenant: str, subject: str, condition: Filter | None, limit: int) -> list[Interaction]:
        parameters: dict[str, object] = {"tenant": tenant, "subject": subject, "limit": limit}
        where = _also(condition, parameters)
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {ROW} FROM interactions v WHERE {MINE}{where}"
                " ORDER BY v.created_at DESC, v.interaction_id LIMIT :limit",
                parameters,
            )
            return [_interaction(row) for row in rows]

    def nearest(
        self, tenant: str, subject: str, condition: Filter | None, vector: Vector, fingerprint: str, limit: int
    ) -> list[tuple[Interaction, float]]:
        parameters: dict[str, object] = {"tenant": tenant, "subject": subject, "fingerprint": fingerprint}
        where = _also(condition, parameters)
        best: list[tuple[float, str]] = []
        with self._reading() as db:
            found = db.execute(
                "SELECT v.interaction_id, w.vector FROM interactions v JOIN vectors w USING (ordinal)"
                f" WHERE {MINE} AND w.fingerprint = :fingerprint{where}",
                parameters,
            )
            while rows := found.fetchmany(COMPARED_AT_ONCE):
                vectors = np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(len(rows), -1)
                # Equal vectors are equally near, though a processor's sums of them may differ in the eighth digit.
                distances = np.round(-(vectors @ vector), COSINE_DIGITS).tolist()
                compared = zip(distances, (row[0] for row in rows), strict=True)
                best = nsmallest(limit, chain(best, compared))
            kept = {one.interaction_id: one for one in _load(db, tenant, [id for _, id in best])}
        return [(kept[id], -distance) for distance, id in best]

    # ── vectors of another embedder ─────────────────────────────────────────────────────────────

    def count_stale(self, tenant: str, subject: str, fingerprint: str) -> int:
        with self._reading() as db:
            (count,) = db.execute(
                f"SELECT COUNT(*) FROM interactions v WHERE {MINE} AND {STALE}",
                {"tenant": tenant, "subject": subject, "fingerprint": fingerprint},
            ).fetchone()
            return int(count)

    def stale(self, fingerprint: str, limit: int) -> list[Interaction]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {ROW} FROM interactions v WHERE {STALE} ORDER BY v.ordinal LIMIT :limit",
                {"fingerprint": fingerprint, "limit": limit},
            )
            return [_interaction(row) for row in rows]

    def embed(self, vectors: Mapping[str, Vector], fingerprint: str) -> None:
        with self._transaction() as db:
            for interaction_id, vector in vectors.items():
                db.execute(
                    "INSERT OR REPLACE INTO vectors SELECT ordinal, ?, ? FROM interactions WHERE interaction_id = ?",
                    (fingerprint, _bytes(vector), interaction_id),
                )

    # ── compaction ──────────────────────────────────────────────────────────────────────────────

    def usage(self) -> dict[str, int]:
        with self._reading() as db:
            return dict(db.execute("SELECT tenant, SUM(size) FROM interactions GROUP BY tenant").fetchall())

    def oldest(self, tenant: str, kind: InteractionKind, limit: int) -> list[MemoryEntry]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT interaction_id, subject, user, kind, created_at, size FROM interactions"
                " WHERE tenant = ? AND kind = ? ORDER BY created_at, interaction_id LIMIT ?",
                (tenant, kind, limit),
            )
            return [MemoryEntry(*row) for row in rows]

    def load(self, tenant: str, interaction_ids: Sequence[str]) -> list[Interaction]:
        with self._reading() as db:
            return _load(db, tenant, interaction_ids)

    def drop(self, tenant: str, interaction_ids: Sequence[str]) -> int:
        with self._transaction() as db:
            dropped = _delete(db, tenant, interaction_ids)
            pass_through("memory.inside_drop")
        self.clear_log()
        return dropped

    def replace(
        self, tenant: str, interaction_ids: Sequence[str], summary: Interaction, vector: Vector | None, fingerprint: str
    ) -> bool:
        with self._transaction() as db:
            there = _load(db, tenant, interaction_ids)
            if len(there) != len(interaction_ids):
                return False
            ordinal = _insert(db, summary, vector, fingerprint)
            db.executemany("INSERT INTO parts VALUES (?, ?)", [(one.interaction_id, ordinal) for one in there])
            pass_through("memory.inside_replace")
            _delete(db, tenant, interaction_ids)
        self.clear_log()
        return True

    # ── deletion ────────────────────────────────────────────────────────────────────────────────

    def delete(self, tenant: str, subject: str | None, interaction_id: str) -> Forgotten:
        return self._forget(
            f"{OF_TENANT} AND v.ordinal IN (SELECT ordinal FROM interactions WHERE interaction_id = :what"
            " UNION ALL SELECT summary FROM parts WHERE part = :what)",
            tenant, subject, interaction_id,
        )  # fmt: skip

    def forget(self, tenant: str, subject: str | None, user: str) -> Forgotten:
        return self._forget("v.tenant = :tenant AND v.user = :what", tenant, subject, user)

    def _forget(self, which: str, tenant: str, subject: str | None, what: str) -> Forgotten:
        parameters = {"tenant": tenant, "subject": subject, "what": what}
        with self._transaction() as db:
            rows = db.execute(
                f"DELETE FROM interactions AS v WHERE {which}"
                " AND (:subject IS NULL OR v.subject = :subject) RETURNING kind",
                parameters,
            ).fetchall()
        self.clear_log()
        summaries = sum(kind == "summary" for (kind,) in rows)
        return Forgotten(len(rows) - summaries, summaries)

    def clear_log(self) -> None:
        """Empty the log of changes: until then what was deleted can be read in it."""
        if self._memory:
            return
        connection = self._connect()
        with self._in_use[connection]:
            if self._is_closed:
                return
            (usual,) = connection.execute("PRAGMA busy_timeout").fetchone()
            connection.execute(f"PRAGMA busy_timeout = {CLEARING_MILLISECONDS}")
            try:
                (is_busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if is_busy:
                    log.info("memory's log of changes is in use; it will be emptied later")
            except sqlite3.OperationalError as error:
                log.warning("memory's log of changes could not be emptied: %s", error)
            finally:
                connection.execute(f"PRAGMA busy_timeout = {usual}")

    # ── checking ────────────────────────────────────────────────────────────────────────────────

    def damaged(self) -> list[str]:
        with self._reading() as db:
            return sorted(_damaged(db).values())

    def repair(self) -> None:
        with self._transaction() as db:
            db.executemany("DELETE FROM vectors WHERE ordinal = ?", [(ordinal,) for ordinal in _damaged(db)])


def _damaged(db: sqlite3.Connection) -> dict[int, str]:
    """By the ordinal of a vector that is none, or of nothing, the id of its interaction."""
    rows = db.execute(
        "SELECT w.ordinal, v.interaction_id, w.vector FROM vectors w LEFT JOIN interactions v USING (ordinal)"
    )
    return {ordinal: id or f"no interaction {ordinal}" for ordinal, id, vector in rows if not (id and _is_unit(vector))}


def _insert(db: sqlite3.Connection, interaction: Interaction, vector: Vector | None, fingerprint: str) -> int:
    values = (
        interaction.interaction_id, interaction.tenant, interaction.subject, interaction.user, interaction.query,
        interaction.response, interaction.created_at, json.dumps(interaction.context), interaction.confidence,
        interaction.model, interaction.gpu_utilization, interaction.latency_ms,
        json.dumps(dict(interaction.metadata)), interaction.kind, interaction.size,
    )  # fmt: skip
    ordinal = db.execute(
        f"INSERT INTO interactions ({FIELDS}, size) VALUES ({', '.join('?' * len(values))})", values
    ).lastrowid
    if vector is not None:
        db.execute("INSERT INTO vectors VALUES (?, ?, ?)", (ordinal, fingerprint, _bytes(vector)))
    assert ordinal is not None
    return ordinal


def _load(db: sqlite3.Connection, tenant: str, interaction_ids: Sequence[str]) -> list[Interaction]:
    rows = db.execute(
        f"SELECT {ROW} FROM json_each(?) AS wanted JOIN interactions v ON v.interaction_id = wanted.value"
        " WHERE v.tenant = ? ORDER BY wanted.key",
        (json.dumps(list(interaction_ids)), tenant),
    )
    return [_interaction(row) for row in rows]


def _delete(db: sqlite3.Connection, tenant: str, interaction_ids: Sequence[str]) -> int:
    return db.execute(
        f"DELETE FROM interactions AS v WHERE {OF_TENANT} AND v.interaction_id IN (SELECT value FROM json_each(:ids))",
        {"tenant": tenant, "ids": json.dumps(list(interaction_ids))},
    ).rowcount


def _also(condition: Filter | None, parameters: dict[str, object]) -> str:
    return "" if condition is None else f" AND ({condition_of(condition, parameters, COLUMNS)})"


def _bytes(vector: Vector) -> bytes:
    return np.ascontiguousarray(vector, np.float32).tobytes()


def _is_unit(vector: bytes) -> bool:
    values = np.frombuffer(vector, np.float32) if len(vector) % 4 == 0 else np.zeros(1)
    return bool(abs(float(np.linalg.norm(values)) - 1) < 1e-2)


def _interaction(row: Sequence[Any]) -> Interaction:
    return Interaction(
        interaction_id=row[0], tenant=row[1], subject=row[2], user=row[3], query=row[4], response=row[5],
        created_at=row[6], context=tuple(json.loads(row[7])), confidence=row[8], model=row[9],
        gpu_utilization=row[10], latency_ms=row[11], metadata=json.loads(row[12]), kind=row[13],
    )  # fmt: skip
