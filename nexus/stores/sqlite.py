"""The authority in one SQLite file: documents, versions, chunks, visibility, sessions.

A version's content is written once (`versions`, `chunks`); when it was visible is a list of spans
of sequence numbers (`spans`), so that A, then B, then A again leaves a true history. The partial
unique index on open spans makes two current versions of one document impossible, not just unlikely.
Vectors stand beside their chunks, so an index can be rebuilt and checked without a model. Each index of a
collection, its own and those beside it (`generations`), has a cut of every version: chunks with the name of that
cut, and a row of `cuts` that says they are all there. Which of them is the own one is said by `collections`, where
`vectors_of` is whose its vectors are, when it is no more the embedder that names the versions. A version's
edges (`edges`) lead to other documents: a "link" to the document it refers to, which need not be there,
and a "shared" to `field=value`, where all documents of the same tenant and collection that say so meet. What its
chunks were cut from is in `kept` (kept.py), for all but versions of before there was such a table.

Several processes of one machine may share the file: WAL, one writer at a time. What was answered for
is synced to the disk at commit; staging is not, for the publish after it syncs the whole log.
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from nexus.database import Database, condition_of
from nexus.errors import ConfigError, Conflict, Fenced, Unavailable
from nexus.failpoints import pass_through
from nexus.filters import Filter
from nexus.interactions import SqliteInteractions
from nexus.kept import unpack
from nexus.ports import Change, Collection, Cut, Deletion, Generation, GenerationState, LiveIndex, Staged, Verdict
from nexus.types import NOBODY, Chunk, Document, Piece, Principal, Vector, chunk_id_of

FAN_OUT = 25  # documents that one step goes on to from one document, or from one value that documents share
LOOKED_AT = 500  # edges that one step looks at to find them
MAX_SHARED_CHARACTERS = 1024  # a longer value is a text, not the name of something two documents are about

MIGRATIONS = (
    """
    CREATE TABLE collections (
        name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, index_name TEXT NOT NULL,
        sequence INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE epochs (document_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) STRICT;
    CREATE TABLE versions (
        document_id TEXT NOT NULL, version TEXT NOT NULL, tenant TEXT NOT NULL, collection TEXT NOT NULL,
        source TEXT NOT NULL, title TEXT NOT NULL, media_type TEXT NOT NULL, metadata TEXT NOT NULL,
        readers TEXT NOT NULL, size INTEGER NOT NULL, chunks INTEGER NOT NULL, epoch INTEGER NOT NULL,
        created_at REAL NOT NULL, begun_at REAL NOT NULL,
        PRIMARY KEY (document_id, version)
    ) STRICT;
    CREATE TABLE spans (
        document_id TEXT NOT NULL, version TEXT NOT NULL, opened INTEGER NOT NULL, closed INTEGER,
        closed_at REAL, PRIMARY KEY (document_id, opened)
    ) STRICT;
    CREATE UNIQUE INDEX one_current_version ON spans (document_id) WHERE closed IS NULL;
    CREATE INDEX spans_by_version ON spans (document_id, version);
    CREATE INDEX spans_by_closing ON spans (closed_at) WHERE closed_at IS NOT NULL;
    CREATE TABLE chunks (
        chunk_id TEXT PRIMARY KEY, document_id TEXT NOT NULL, version TEXT NOT NULL, ordinal INTEGER NOT NULL,
        text TEXT NOT NULL, heading TEXT NOT NULL, page INTEGER, first_line INTEGER, last_line INTEGER,
        tokens INTEGER NOT NULL, vector BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX chunks_by_place ON chunks (document_id, version, ordinal);
    CREATE INDEX versions_by_tenant ON versions (tenant, collection, document_id);
    CREATE TABLE turns (
        tenant TEXT NOT NULL, session_id TEXT NOT NULL, ordinal INTEGER PRIMARY KEY,
        role TEXT NOT NULL, content TEXT NOT NULL, created_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX turns_by_session ON turns (tenant, session_id, ordinal);
    """,
    """
    ALTER TABLE versions RENAME COLUMN begun_at TO staged_at;
    ALTER TABLE versions ADD COLUMN retiring_at REAL;
    ALTER TABLE collections ADD COLUMN horizon INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE spans ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE deletions (
        document_id TEXT NOT NULL, sequence INTEGER NOT NULL, tenant TEXT NOT NULL, collection TEXT NOT NULL,
        source TEXT NOT NULL, subject TEXT NOT NULL, deleted_at REAL NOT NULL, purged_at REAL,
        versions INTEGER NOT NULL DEFAULT 0, chunks INTEGER NOT NULL DEFAULT 0, vectors INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (document_id, sequence)
    ) STRICT;
    CREATE INDEX deletions_by_tenant ON deletions (tenant, deleted_at);
    """,
    """
    CREATE TABLE edges (
        document_id TEXT NOT NULL, version TEXT NOT NULL, kind TEXT NOT NULL, target TEXT NOT NULL,
        tenant TEXT NOT NULL, collection TEXT NOT NULL, PRIMARY KEY (document_id, version, kind, target)
    ) STRICT;
    CREATE INDEX edges_by_target ON edges (tenant, collection, kind, target, document_id, version);
    """,
    """
    CREATE TABLE sequences (
        tenant TEXT NOT NULL, collection TEXT NOT NULL, sequence INTEGER NOT NULL DEFAULT 0,
        horizon INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (tenant, collection)
    ) STRICT;
    INSERT INTO sequences SELECT DISTINCT o.tenant, k.name, k.sequence, k.horizon FROM collections k
        JOIN (SELECT tenant, collection FROM versions UNION SELECT tenant, collection FROM deletions) o
        ON o.collection = k.name;
    ALTER TABLE collections DROP COLUMN sequence;
    ALTER TABLE collections DROP COLUMN horizon;
    CREATE TABLE audiences (
        tenant TEXT NOT NULL, collection TEXT NOT NULL, readers TEXT NOT NULL,
        PRIMARY KEY (tenant, collection, readers)
    ) STRICT;
    INSERT INTO audiences SELECT DISTINCT tenant, collection, readers FROM versions WHERE readers != '[]';
    ALTER TABLE deletions ADD COLUMN readers TEXT NOT NULL DEFAULT '[]';
    """,
    """
    ALTER TABLE collections ADD COLUMN vectors_of TEXT;
    ALTER TABLE collections ADD COLUMN embedder TEXT NOT NULL DEFAULT '';
    ALTER TABLE collections ADD COLUMN dimension INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE generations (
        index_name TEXT PRIMARY KEY, collection TEXT NOT NULL, fingerprint TEXT NOT NULL, embedder TEXT NOT NULL,
        dimension INTEGER NOT NULL, state TEXT NOT NULL, since REAL NOT NULL, asked TEXT NOT NULL,
        figures TEXT NOT NULL
    ) STRICT;
    CREATE TABLE vectors_beside (
        chunk_id TEXT NOT NULL, index_name TEXT NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (chunk_id, index_name)
    ) STRICT;
    """,
    """
    CREATE TABLE kept (
        document_id TEXT NOT NULL, version TEXT NOT NULL, content BLOB NOT NULL, PRIMARY KEY (document_id, version)
    ) STRICT;
    """,
    """
    ALTER TABLE sequences ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sequences ADD COLUMN erased INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE versions ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
    UPDATE sequences SET revision = 1;
    UPDATE versions SET revision = 1;
    CREATE INDEX versions_by_revision ON versions (tenant, collection, revision);
    """,
    """
    CREATE TABLE cuts (
        document_id TEXT NOT NULL, version TEXT NOT NULL, cut TEXT NOT NULL, chunks INTEGER NOT NULL,
        PRIMARY KEY (document_id, version, cut)
    ) STRICT;
    INSERT INTO cuts SELECT document_id, version, '', chunks FROM versions;
    DELETE FROM cuts WHERE NOT EXISTS (
        SELECT 1 FROM spans s WHERE s.document_id = cuts.document_id AND s.version = cuts.version
    ) AND EXISTS (
        SELECT 1 FROM chunks c WHERE c.document_id = cuts.document_id AND c.version = cuts.version
        AND LENGTH(c.vector) = 0
    );
    ALTER TABLE chunks ADD COLUMN cut TEXT NOT NULL DEFAULT '';
    DROP INDEX chunks_by_place;
    CREATE UNIQUE INDEX chunks_by_place ON chunks (document_id, version, cut, ordinal);
    ALTER TABLE collections ADD COLUMN cut TEXT NOT NULL DEFAULT '';
    ALTER TABLE collections ADD COLUMN chunking TEXT NOT NULL DEFAULT '';
    ALTER TABLE generations ADD COLUMN cut TEXT NOT NULL DEFAULT '';
    ALTER TABLE generations ADD COLUMN chunking TEXT NOT NULL DEFAULT '';
    UPDATE generations SET state = 'leaving', cut = index_name;
    DROP TABLE vectors_beside;
    """,
)

LACKS = "generation_lacks"  # the code of an error: the version has to be staged again, with what it lacks
RETIRE_SECONDS = 15.0  # for so long after `retire` its vectors may still be on their way out
FORGOTTEN_AT_ONCE = 100  # versions, of which one transaction removes a cut

DOCUMENT = (
    "v.document_id, v.version, v.tenant, v.collection, v.source, v.title, v.media_type, v.metadata, v.readers,"
    " v.size, v.chunks, s.opened, s.closed, v.created_at"
)
PUBLISHED = f"SELECT {DOCUMENT} FROM versions v JOIN spans s USING (document_id, version)"
CURRENT = f"{PUBLISHED} WHERE s.closed IS NULL"
MAY_READ = "(v.readers = '[]' OR EXISTS (SELECT 1 FROM json_each(v.readers) WHERE value = :subject))"
MADE_BY = "COALESCE(k.vectors_of, k.fingerprint)"
OF_OWN = "k.embedder, k.dimension, CASE WHEN k.vectors_of IS NULL THEN '' ELSE k.fingerprint END, k.cut, k.chunking"
COLLECTION = f"SELECT k.name, {MADE_BY}, k.index_name, 0, 0, {OF_OWN} FROM collections k"
COLLECTION_OF = (
    f"SELECT k.name, {MADE_BY}, k.index_name, s.sequence, s.horizon, {OF_OWN}, s.revision"
    " FROM collections k JOIN sequences s ON s.collection = k.name WHERE k.name = ? AND s.tenant = ?"
)
GENERATION = "index_name, fingerprint, embedder, dimension, cut, chunking, state, since, asked, figures"
WRITTEN = "SELECT index_name, cut FROM generations WHERE collection = ? AND state != 'leaving'"
INDEXES = (  # each with its collection and its cut
    "(SELECT index_name, name AS collection, cut FROM collections"
    " UNION ALL SELECT index_name, collection, cut FROM generations"
    " WHERE index_name NOT IN (SELECT index_name FROM collections))"
)
HAS = "EXISTS (SELECT 1 FROM cuts n WHERE n.document_id = v.document_id AND n.version = v.version AND n.cut = ?)"
DELETION = (
    "document_id, sequence, tenant, collection, source, subject, deleted_at, purged_at, versions, chunks, vectors"
)
CHUNK = (
    "c.chunk_id, c.document_id, c.version, c.ordinal, c.text, c.heading, c.page, c.first_line, c.last_line, c.tokens,"
    " c.cut"
)

VISIBLE = (
    "v.tenant = :tenant AND v.collection = :collection"
    f" AND s.opened <= :as_of AND (s.closed IS NULL OR s.closed > :as_of) AND {MAY_READ}"
)
HERE = "tenant = :tenant AND collection = :collection"
STEP = f"""
    SELECT n.document_id, n.version, w.hops + 1, '{{kind}}' FROM {{start}} JOIN versions n ON n.rowid IN (
        SELECT v.rowid FROM (SELECT {{edges}} LIMIT :looked_at) AS e
        JOIN versions v ON v.document_id = e.document_id AND v.version = IFNULL(e.version, v.version)
        JOIN spans s ON s.document_id = v.document_id AND s.version = v.version
        WHERE v.document_id != w.document_id AND {VISIBLE} LIMIT :fan_out
    ) WHERE w.hops < :hops"""
REFERS = STEP.format(
    kind="link", start="walked w",
    edges="target AS document_id, NULL AS version FROM edges"
    " WHERE document_id = w.document_id AND version = w.version AND kind = 'link' ORDER BY target",
)  # fmt: skip
IS_REFERRED_TO = STEP.format(
    kind="link", start="walked w",
    edges=f"document_id, version FROM edges WHERE {HERE} AND kind = 'link' AND target = w.document_id"
    " ORDER BY document_id",
)  # fmt: skip
SHARES = STEP.format(
    kind="shared",
    start="walked w JOIN edges own ON own.document_id = w.document_id AND own.version = w.version"
    " AND own.kind = 'shared'",
    edges=f"document_id, version FROM edges WHERE {HERE} AND kind = 'shared' AND target = own.target"
    " ORDER BY document_id",
)  # fmt: skip
CONNECTED = f"""
    WITH RECURSIVE walked (document_id, version, hops, kind) AS (
        SELECT v.document_id, v.version, 0, '' FROM json_each(:ids) AS seed
        CROSS JOIN versions v ON v.document_id = seed.value JOIN spans s USING (document_id, version) WHERE {VISIBLE}
        UNION {REFERS} UNION {IS_REFERRED_TO} UNION {SHARES} ORDER BY 3 LIMIT :rows
    )
    SELECT document_id, MIN(2 * hops + (kind = 'shared')) AS nearest FROM walked
    GROUP BY document_id HAVING nearest > 1 ORDER BY 2, 1 LIMIT :limit"""  # a link comes before a shared value

COLUMNS = {"source": "v.source", "title": "v.title", "media_type": "v.media_type"}  # that filters know, beside metadata


def open(
    address: str, *, home: Path | None = None, shared_metadata: Sequence[str] = ("robot_id",)
) -> "SqliteDocuments":
    """`sqlite:` is `documents.db` in the home; `sqlite:PATH` another file; `sqlite::memory:` none.

    `shared_metadata` are the fields whose equal values connect documents; who only reads need not say them.
    """
    place = address.partition(":")[2]
    if not place and home is None:
        raise ConfigError("'sqlite:' needs a home to keep its file in; give 'sqlite:PATH'")
    return SqliteDocuments(place or str((home or Path()) / "documents.db"), shared_metadata)


def open_interactions(address: str, *, home: Path | None = None) -> SqliteInteractions:
    """What memory keeps, in a file beside that of the documents: `memory.db`, or PATH with `.memory` before its end."""
    place = address.partition(":")[2]
    if not place and home is None:
        raise ConfigError("'sqlite:' needs a home to keep its file in; give 'sqlite:PATH'")
    if place == ":memory:":
        return SqliteInteractions(place)
    return SqliteInteractions(Path(place).with_suffix(".memory.db") if place else (home or Path()) / "memory.db")


class SqliteDocuments(Database):
    """A DocumentStore in one file, or in memory."""

    def __init__(self, path: str, shared_metadata: Sequence[str]) -> None:
        super().__init__(path, "the document store", ("journal_mode = WAL", "cache_size = -16384"))
        self._shared_metadata = shared_metadata
        self._migrate(MIGRATIONS)

    def check(self) -> None:
        with self._reading() as db:
            db.execute("SELECT 1 FROM collections LIMIT 1").fetchone()

    # ── collections ─────────────────────────────────────────────────────────────────────────────

    def open_collection(self, name: str, fingerprint: str, index: str) -> Collection:
        known = self.collection(name)
        if known is not None:
            return known
        with self._transaction() as db:
            db.execute(
                "INSERT INTO collections (name, fingerprint, index_name) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (name, fingerprint, index),
            )
            return _collection(db, name) or Collection(name, fingerprint, index, 0, 0)

    def collection(self, name: str, tenant: str | None = None) -> Collection | None:
        with self._reading() as db:
            return _collection(db, name, tenant)

    def collections(self) -> list[Collection]:
        with self._reading() as db:
            return [Collection(*row) for row in db.execute(f"{COLLECTION} ORDER BY k.name")]

    # ── the moves of HADES ──────────────────────────────────────────────────────────────────────

    def begin(self, document: Document, accepted_at: int | None = None, by: Principal | None = None) -> int:
        document_id = document.document_id
        with self._transaction(durable=False) as db:
            if by is not None:
                _require_reader(db, document_id, by)
            db.execute(
                "INSERT INTO sequences (tenant, collection) VALUES (?, ?) ON CONFLICT DO NOTHING",
                (document.tenant, document.collection),
            )
            deleted = (
                accepted_at is not None
                and db.execute(
                    "SELECT 1 FROM deletions WHERE document_id = ? AND sequence > ?", (document_id, accepted_at)
                ).fetchone()
            )
            if deleted:
                raise Fenced("the document was deleted after this upload was accepted; add it again if it should stay")
            (epoch,) = db.execute(
                "INSERT INTO epochs VALUES (?, 1) ON CONFLICT DO UPDATE SET epoch = epoch + 1 RETURNING epoch",
                (document_id,),
            ).fetchone()
        return int(epoch)

    def stage(self, batch: Sequence[Staged]) -> None:
        with self._transaction(durable=False) as db:
            for staged in batch:
                _stage_one(db, staged, time.time())
                _write_edges(db, staged.document, "link", staged.document.links)
                _write_edges(db, staged.document, "shared", self._shared(staged.document))

    def publish(self, versions: Sequence[tuple[Document, int]]) -> list[Document]:
        with self._transaction() as db:
            for document, _ in versions:
                _write_edges(db, document, "shared", self._shared(document))
            published = [_publish_one(db, document, epoch) for document, epoch in versions]
            pass_through("ingest.inside_publish")
        return published

    def annotate(self, document: Document) -> None:
        with self._transaction() as db:
            _annotate(db, document)
            _note_change(db, document)
            _write_edges(db, document, "shared", self._shared(document))

    def _shared(self, document: Document) -> list[str]:
        """`field=value` for each field that connects documents and has a value that can be a name."""
        values = ((name, document.metadata.get(name)) for name in self._shared_metadata)
        names = [(n, str(value)) for n, value in values if isinstance(value, str | int) and not isinstance(value, bool)]
        short = [(name, value) for name, value in names if 0 < len(value) <= MAX_SHARED_CHARACTERS]
        return [f"{name}={value}" for name, value in short if value.isprintable()]

    def delete(self, document_ids: Sequence[str], principal: Principal) -> list[Document]:
        with self._transaction() as db:
            found = [_current(db, document_id, principal) for document_id in document_ids]
            return [_delete_one(db, document, principal) for document in found if document is not None]

    # ── reading documents ───────────────────────────────────────────────────────────────────────

    def current(self, document_id: str, principal: Principal) -> Document | None:
        with self._reading() as db:
            return _current(db, document_id, principal)

    def history(self, document_id: str, principal: Principal) -> list[Document]:
        with self._reading() as db:
            rows = db.execute(
                f"{PUBLISHED} WHERE v.document_id = :document_id AND v.tenant = :tenant AND {MAY_READ}"
                " ORDER BY s.opened DESC",
                {**_who(principal), "document_id": document_id},
            )
            found = [_document(row) for row in rows]
        return found if found and found[0].closed is None else []

    def readers_of(self, document_ids: Sequence[str]) -> set[frozenset[str]]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT DISTINCT v.readers FROM json_each(?) AS wanted JOIN versions v ON v.document_id = wanted.value"
                " JOIN spans s USING (document_id, version) WHERE s.closed IS NULL AND v.readers != '[]'",
                (json.dumps(list(document_ids)),),
            )
            return {_readers_in(readers) for (readers,) in rows}

    def audiences(self, collection: str, principal: Principal) -> set[frozenset[str]]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT v.readers FROM audiences v WHERE v.tenant = :tenant AND v.collection = :collection"
                f" AND {MAY_READ}",
                {**_who(principal), "collection": collection},
            )
            return {_readers_in(readers) for (readers,) in rows}

    def documents(self, principal: Principal, collection: str | None, after: str | None, limit: int) -> list[Document]:
        # Each is read in the order that it is wanted in, and so no farther than the page ("+": not by tenant).
        within, place = "v.tenant = :tenant AND v.collection = :collection", "v.document_id"
        if collection is None:
            within, place = "+v.tenant = :tenant", "s.document_id"
        with self._reading() as db:
            rows = db.execute(
                f"{CURRENT} AND {within} AND {MAY_READ} AND {place} > :after ORDER BY {place} LIMIT :limit",
                {**_who(principal), "after": after or "", "collection": collection, "limit": limit},
            )
            return [_document(row) for row in rows]

    def tally(self, principal: Principal) -> dict[str, tuple[int, int]]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT v.collection, COUNT(*), SUM(v.chunks) FROM versions v JOIN spans s USING (document_id, version)"
                f" WHERE s.closed IS NULL AND v.tenant = :tenant AND {MAY_READ}"
                " GROUP BY v.collection ORDER BY v.collection",
                _who(principal),
            )
            return {collection: (documents, chunks) for collection, documents, chunks in rows}

    def matching(self, collection: str, principal: Principal, condition: Filter, as_of: int, limit: int) -> list[str]:
        parameters: dict[str, object] = {**_who(principal), "collection": collection, "as_of": as_of, "limit": limit}
        where = condition_of(condition, parameters, COLUMNS)
        with self._reading() as db:
            rows = db.execute(
                "SELECT v.document_id FROM versions v JOIN spans s USING (document_id, version)"
                " WHERE v.tenant = :tenant AND v.collection = :collection"
                f" AND s.opened <= :as_of AND (s.closed IS NULL OR s.closed > :as_of) AND {MAY_READ} AND ({where})"
                " ORDER BY v.document_id LIMIT :limit",
                parameters,
            )
            return [document_id for (document_id,) in rows]

    def verdicts(
        self, collection: str, principal: Principal, chunk_ids: Sequence[str], as_of: int
    ) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = dict.fromkeys(chunk_ids, "unknown")
        with self._reading() as db:
            rows = db.execute(
                f"SELECT c.chunk_id, v.tenant = :tenant AND v.collection = :collection, {MAY_READ},"
                " MAX(s.opened <= :as_of AND (s.closed IS NULL OR s.closed > :as_of)), MIN(s.opened)"
                " FROM json_each(:ids) AS wanted JOIN chunks c ON c.chunk_id = wanted.value"
                " JOIN versions v USING (document_id, version) LEFT JOIN spans s USING (document_id, version)"
                " GROUP BY c.chunk_id",
                {**_who(principal), "collection": collection, "as_of": as_of, "ids": json.dumps(list(chunk_ids))},
            )
            for chunk_id, ours, may_read, is_open, first_opened in rows:
                verdicts[chunk_id] = _verdict(ours, may_read, is_open, first_opened, as_of)
        return verdicts

    def load(self, chunk_ids: Sequence[str]) -> dict[str, tuple[Chunk, Document]]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {CHUNK}, {DOCUMENT} FROM json_each(?) AS wanted"
                " JOIN chunks c ON c.chunk_id = wanted.value JOIN versions v USING (document_id, version)"
                " LEFT JOIN spans s USING (document_id, version) ORDER BY s.opened",
                (json.dumps(list(chunk_ids)),),
            )
            return {row[0]: (_chunk(row[:11]), _document(row[11:])) for row in rows}

    def vectors(self, chunk_ids: Sequence[str]) -> dict[str, Vector]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT chunk_id, vector FROM json_each(?) AS wanted JOIN chunks ON chunk_id = wanted.value",
                (json.dumps(list(chunk_ids)),),
            )
            return {chunk_id: np.frombuffer(vector, dtype=np.float32) for chunk_id, vector in rows}

    def connected(
        self, collection: str, principal: Principal, document_ids: Sequence[str], hops: int, as_of: int, limit: int
    ) -> dict[str, tuple[int, str]]:
        """See the port. The walk goes nearest first, so what the bounds cut off is always the farthest.

        One step goes on to at most FAN_OUT visible documents by each of: what a document refers to, what
        refers to it, and each value it shares; the first by document id, among the first LOOKED_AT edges.
        A document may be walked twice per hop, by each kind, so `rows` lets `limit` of them through.
        """
        parameters: dict[str, object] = {**_who(principal), "collection": collection, "as_of": as_of, "hops": hops}
        parameters |= {"ids": json.dumps(list(document_ids)), "limit": limit, "fan_out": FAN_OUT}
        parameters |= {"looked_at": LOOKED_AT, "rows": (len(document_ids) + limit) * (2 * hops + 1)}
        with self._reading() as db:
            rows = db.execute(CONNECTED, parameters)
            return {document_id: (nearest // 2, "shared" if nearest % 2 else "link") for document_id, nearest in rows}

    def vectors_of(
        self, collection: str, principal: Principal, document_ids: Sequence[str], as_of: int, limit: int, cut: str = ""
    ) -> dict[str, tuple[str, Vector]]:
        parameters = {**_who(principal), "collection": collection, "as_of": as_of, "cut": cut}
        parameters |= {"ids": json.dumps(list(document_ids)), "share": max(1, limit // max(1, len(document_ids)))}
        with self._reading() as db:
            rows = db.execute(
                "SELECT c.chunk_id, c.document_id, c.vector FROM json_each(:ids) AS wanted"
                " CROSS JOIN versions v ON v.document_id = wanted.value JOIN spans s USING (document_id, version)"
                " JOIN chunks c USING (document_id, version)"
                f" WHERE {VISIBLE} AND c.cut = :cut AND c.ordinal < :share ORDER BY wanted.key, c.ordinal"
                " LIMIT :limit",
                {**parameters, "limit": limit},
            )
            return {
                chunk_id: (document_id, np.frombuffer(vector, np.float32)) for chunk_id, document_id, vector in rows
            }

    def neighbours(self, document_id: str, version: str, first: int, last: int, cut: str = "") -> list[Chunk]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {CHUNK} FROM chunks c WHERE document_id = ? AND version = ? AND cut = ?"
                " AND ordinal BETWEEN ? AND ? ORDER BY ordinal",
                (document_id, version, cut, first, last),
            )
            return [_chunk(row) for row in rows]

    def kept(self, document_id: str, version: str) -> bytes | None:
        with self._reading() as db:
            row = db.execute(
                "SELECT content FROM kept WHERE document_id = ? AND version = ?", (document_id, version)
            ).fetchone()
            return row[0] if row else None

    # ── telling others what became of it ────────────────────────────────────────────────────────

    def standings(self) -> dict[tuple[str, str], tuple[int, int]]:
        with self._reading() as db:
            rows = db.execute("SELECT collection, tenant, revision, erased FROM sequences")
            return {(collection, tenant): (revision, erased) for collection, tenant, revision, erased in rows}

    def changed(self, collection: str, tenant: str, after: int) -> list[Change]:
        # For the sake of the order SQLite would read all there are, to find the few that came.
        by = "INDEXED BY versions_by_revision" if after else ""
        with self._reading() as db:
            rows = db.execute(
                "SELECT v.document_id, v.version, v.title, v.readers, v.chunks, s.opened, s.closed"
                f" FROM versions v {by} JOIN spans s USING (document_id, version)"
                " WHERE v.tenant = ? AND v.collection = ? AND v.revision > ?"
                " ORDER BY v.document_id, v.version, s.opened",
                (tenant, collection, after),
            )
            return [
                Change(document_id, version, tenant, title, _readers_in(readers), chunks, opened, closed)
                for document_id, version, title, readers, chunks, opened, closed in rows
            ]

    def held(self, collection: str, tenant: str) -> int:
        with self._reading() as db:
            (chunks,) = db.execute(
                "SELECT TOTAL(v.chunks) FROM versions v WHERE v.tenant = ? AND v.collection = ? AND EXISTS"
                " (SELECT 1 FROM spans s WHERE s.document_id = v.document_id AND s.version = v.version)",
                (tenant, collection),
            ).fetchone()
            return int(chunks)

    def chunks_of(self, versions: Iterable[tuple[str, str]], cut: str = "") -> list[Chunk]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {CHUNK} FROM json_each(?) AS wanted CROSS JOIN chunks c"
                " ON c.document_id = wanted.value ->> 0 AND c.version = wanted.value ->> 1 AND c.cut = ?"
                " ORDER BY wanted.key, c.ordinal",
                (json.dumps(list(versions)), cut),
            )
            return [_chunk(row) for row in rows]

    # ── cleaning up and checking ────────────────────────────────────────────────────────────────

    def needless(self, closed_before: float, staged_before: float) -> list[Document]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {DOCUMENT} FROM versions v LEFT JOIN spans s USING (document_id, version)"
                " GROUP BY v.document_id, v.version HAVING COUNT(s.opened) = COUNT(s.closed)"
                " AND COALESCE(MAX(s.closed_at) < :closed, 1)"
                " AND (v.staged_at < MAX(:staged, COALESCE(MAX(s.closed_at), 0)) OR v.retiring_at IS NOT NULL)",
                {"closed": closed_before, "staged": staged_before},
            )
            return [_document(row) for row in rows]

    def retire(self, document: Document, closed_before: float, staged_before: float) -> list[str] | None:
        with self._transaction() as db:
            key = (document.document_id, document.version)
            needed = db.execute(
                "SELECT 1 FROM versions v LEFT JOIN spans s USING (document_id, version)"
                " WHERE v.document_id = ? AND v.version = ? GROUP BY v.document_id, v.version"
                " HAVING COUNT(s.opened) != COUNT(s.closed) OR MAX(s.closed_at) >= ?"
                " OR (v.staged_at >= MAX(?, COALESCE(MAX(s.closed_at), 0)) AND v.retiring_at IS NULL)",
                (*key, closed_before, staged_before),
            ).fetchone()
            claimed = needed is None and db.execute(
                "UPDATE versions SET retiring_at = ? WHERE document_id = ? AND version = ?", (time.time(), *key)
            ).rowcount  # fmt: skip
            if not claimed:
                return None
            db.execute(
                "UPDATE sequences SET horizon = MAX(horizon, COALESCE((SELECT MAX(closed) FROM spans"
                " WHERE document_id = ? AND version = ?), 0)) WHERE tenant = ? AND collection = ?",
                (*key, document.tenant, document.collection),
            )
            if db.execute("DELETE FROM spans WHERE document_id = ? AND version = ?", key).rowcount:
                db.execute(
                    "UPDATE sequences SET erased = erased + 1 WHERE tenant = ? AND collection = ?",
                    (document.tenant, document.collection),
                )
            return _chunk_ids(db, *key)

    def purge(self, document: Document) -> bool:
        key = (document.document_id, document.version)
        with self._transaction() as db:
            chunks = len(_chunk_ids(db, *key))
            gone = db.execute(
                "DELETE FROM versions WHERE document_id = ? AND version = ? AND retiring_at IS NOT NULL", key
            ).rowcount  # fmt: skip
            if gone:
                for table in ("chunks", "cuts", "edges", "kept"):
                    db.execute(f"DELETE FROM {table} WHERE document_id = ? AND version = ?", key)
                _note_purged(db, document.document_id, chunks)
        return bool(gone)

    def deletions(self, principal: Principal, document_id: str | None, limit: int) -> list[Deletion]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {DELETION} FROM deletions v WHERE v.tenant = :tenant AND {MAY_READ}"
                " AND (:id IS NULL OR v.document_id = :id) ORDER BY v.deleted_at DESC, v.sequence DESC LIMIT :limit",
                {**_who(principal), "id": document_id, "limit": limit},
            )
            return [Deletion(*row) for row in rows]

    def damaged(self, index: str, dimension: int) -> list[str]:
        found = []
        with self._reading() as db:
            rows = db.execute(
                "SELECT v.document_id, v.version, k.cut, n.chunks, c.ordinal, c.chunk_id, c.vector FROM versions v"
                f" JOIN {INDEXES} k USING (collection) JOIN spans s USING (document_id, version)"
                " LEFT JOIN cuts n ON n.document_id = v.document_id AND n.version = v.version AND n.cut = k.cut"
                " LEFT JOIN chunks c ON c.document_id = v.document_id AND c.version = v.version AND c.cut = k.cut"
                " WHERE k.index_name = ? AND s.closed IS NULL ORDER BY v.document_id, v.version, c.ordinal",
                (index,),
            )
            for (document_id, version, cut, count), group in groupby(rows, key=lambda row: row[:4]):
                chunks = [row[4:] for row in group if row[4] is not None]
                if count is None or [chunk[0] for chunk in chunks] != list(range(count)):
                    found.append(document_id)
                found += [
                    chunk_id for ordinal, chunk_id, vector in chunks
                    if chunk_id != chunk_id_of(document_id, version, ordinal, cut) or not _is_unit(vector, dimension)
                ]  # fmt: skip
            kept = db.execute(
                f"SELECT v.document_id, p.content FROM versions v JOIN {INDEXES} k USING (collection)"
                " JOIN spans s USING (document_id, version) JOIN kept p USING (document_id, version)"
                " WHERE k.index_name = ? AND s.closed IS NULL",
                (index,),
            )
            found += [document_id for document_id, content in kept if unpack(content) is None]
        return found

    def chunk_ids(self, index: str, published: bool) -> set[str]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT DISTINCT c.chunk_id FROM chunks c JOIN versions v USING (document_id, version)"
                f" JOIN {INDEXES} k ON k.collection = v.collection AND k.cut = c.cut"
                " LEFT JOIN spans s USING (document_id, version) WHERE k.index_name = ?"
                " AND (NOT ? OR (s.closed IS NULL AND s.opened IS NOT NULL))",
                (index, published),
            )
            return {chunk_id for (chunk_id,) in rows}

    def chunk_ids_of(self, document_id: str, version: str) -> list[str]:
        with self._reading() as db:
            return _chunk_ids(db, document_id, version)

    # ── a second index ──────────────────────────────────────────────────────────────────────────

    def generations(self, collection: str) -> list[Generation]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {GENERATION} FROM generations WHERE collection = ? ORDER BY since", (collection,)
            )
            return [_generation(row) for row in rows]

    def add_generation(self, collection: str, own: LiveIndex, generation: Generation) -> None:
        live = generation.live
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM collections WHERE index_name = ?", (live.index,)).fetchone():
                raise Conflict(f"that is the index of {collection!r} itself")
            known = dict(db.execute("SELECT index_name, state FROM generations WHERE collection = ?", (collection,)))
            if known.get(live.index, "leaving") != "leaving":
                return
            if others := [index for index, state in known.items() if state != "leaving"]:
                raise Conflict(f"there is another index beside that of {collection!r} already ({others[0]})")
            if live.index in known:
                raise Unavailable("an index of this very embedder is being removed; try again in a minute")
            db.execute(
                "UPDATE collections SET embedder = ?, dimension = ? WHERE name = ?",
                (own.embedder, own.dimension, collection),
            )
            db.execute(
                f"INSERT INTO generations ({GENERATION}, collection) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    live.index, live.fingerprint, live.embedder, live.dimension, live.index, live.chunking,
                    generation.state, generation.since, json.dumps(dict(generation.asked)),
                    json.dumps(dict(generation.figures)), collection,
                ),
            )  # fmt: skip

    def note_generation(
        self, index: str, state: GenerationState, since: float, figures: Mapping[str, object] | None = None
    ) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE generations SET state = ?, since = ?, figures = COALESCE(?, figures) WHERE index_name = ?",
                (state, since, None if figures is None else json.dumps(dict(figures)), index),
            )

    def lacking(self, collection: str, index: str, limit: int) -> list[Document]:
        with self._reading() as db:
            rows = db.execute(
                f"{PUBLISHED} WHERE v.collection = ? AND v.retiring_at IS NULL AND NOT {HAS}"
                " GROUP BY v.document_id, v.version LIMIT ?",
                (collection, index, limit),
            )
            return [_document(row) for row in rows]

    def unkept(self, collection: str, limit: int) -> list[Document]:
        with self._reading() as db:
            rows = db.execute(
                f"{CURRENT} AND v.collection = ? AND NOT EXISTS (SELECT 1 FROM kept p"
                " WHERE p.document_id = v.document_id AND p.version = v.version) ORDER BY v.document_id LIMIT ?",
                (collection, limit),
            )
            return [_document(row) for row in rows]

    def filled(self, collection: str, index: str) -> tuple[int, int]:
        with self._reading() as db:
            (done, total) = db.execute(
                f"SELECT COALESCE(SUM(CASE WHEN {HAS} THEN o.chunks ELSE 0 END), 0), COALESCE(SUM(o.chunks), 0)"
                " FROM versions v JOIN collections k ON k.name = v.collection JOIN cuts o"
                " ON o.document_id = v.document_id AND o.version = v.version AND o.cut = k.cut WHERE v.collection = ?"
                " AND EXISTS (SELECT 1 FROM spans s WHERE s.document_id = v.document_id AND s.version = v.version)",
                (index, collection),
            ).fetchone()
            return done, total

    def fill(self, index: str, document: Document, cut: Cut) -> bool:
        key = (document.document_id, document.version)
        with self._transaction(durable=False) as db:
            wanted = db.execute(
                "SELECT g.cut FROM generations g, versions v WHERE g.index_name = ? AND g.state != 'leaving'"
                f" AND v.document_id = ? AND v.version = ? AND v.retiring_at IS NULL AND NOT {HAS}",
                (index, *key, index),
            ).fetchone()
            if wanted:
                _write_cut(db, document, wanted[0], cut)
            return wanted is not None

    def adopt(self, collection: str, index: str) -> None:
        with self._transaction() as db:
            live = db.execute(
                "SELECT fingerprint, embedder, dimension, cut, chunking FROM generations"
                " WHERE index_name = ? AND collection = ?",
                (index, collection),
            ).fetchone()
            if live is None:
                return
            db.execute("DELETE FROM generations WHERE index_name = ?", (index,))
            db.execute(
                f"INSERT INTO generations ({GENERATION}, collection) SELECT k.index_name, {MADE_BY}, k.embedder,"
                " k.dimension, k.cut, k.chunking, 'leaving', ?, '{}', '{}', k.name FROM collections k WHERE k.name = ?",
                (time.time(), collection),
            )
            db.execute(
                "UPDATE collections SET index_name = ?, vectors_of = ?, embedder = ?, dimension = ?, cut = ?,"
                " chunking = ? WHERE name = ?",
                (index, *live, collection),
            )

    def forget_generation(self, index: str) -> bool:
        with self._transaction() as db:
            some = db.execute(
                "SELECT n.document_id, n.version, n.cut FROM generations g JOIN cuts n ON n.cut = g.cut"
                " JOIN versions v ON v.document_id = n.document_id AND v.version = n.version"
                " AND v.collection = g.collection WHERE g.index_name = ? LIMIT ?",
                (index, FORGOTTEN_AT_ONCE),
            ).fetchall()
            for table in ("chunks", "cuts"):
                db.executemany(f"DELETE FROM {table} WHERE document_id = ? AND version = ? AND cut = ?", some)
            db.executemany(
                "UPDATE versions SET chunks = COALESCE((SELECT n.chunks FROM cuts n JOIN collections k USING (cut)"
                " WHERE k.name = versions.collection AND n.document_id = versions.document_id"
                " AND n.version = versions.version), chunks) WHERE document_id = ? AND version = ?",
                [key[:2] for key in some],
            )
            if not some:
                db.execute("DELETE FROM generations WHERE index_name = ?", (index,))
            return bool(some)

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    def add_turn(self, tenant: str, session_id: str, role: str, content: str) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO turns (tenant, session_id, role, content, created_at) VALUES (?, ?, ?, ?, ?)",
                (tenant, session_id, role, content, time.time()),
            )

    def turns(self, tenant: str, session_id: str) -> list[tuple[str, str]]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT role, content FROM turns WHERE tenant = ? AND session_id = ? ORDER BY ordinal",
                (tenant, session_id),
            )
            return [(role, content) for role, content in rows]

    def replace_turns(
        self, tenant: str, session_id: str, first: Sequence[tuple[str, str]], replacement: tuple[str, str] | None
    ) -> bool:
        with self._transaction() as db:
            found = db.execute(
                "SELECT ordinal, role, content FROM turns WHERE tenant = ? AND session_id = ? ORDER BY ordinal LIMIT ?",
                (tenant, session_id, len(first)),
            ).fetchall()
            if not first or [(role, content) for _, role, content in found] != list(first):
                return False
            ordinals = [ordinal for ordinal, _, _ in found]
            if replacement is not None:  # in the place of the last of them
                kept = ordinals.pop()
                db.execute("UPDATE turns SET role = ?, content = ? WHERE ordinal = ?", (*replacement, kept))
            db.execute("DELETE FROM turns WHERE ordinal IN (SELECT value FROM json_each(?))", (json.dumps(ordinals),))
            return True

    def clear_session(self, tenant: str, session_id: str) -> int:
        with self._transaction() as db:
            return db.execute("DELETE FROM turns WHERE tenant = ? AND session_id = ?", (tenant, session_id)).rowcount


# ── inside a transaction ────────────────────────────────────────────────────────────────────────


def _collection(db: sqlite3.Connection, name: str, tenant: str | None = None) -> Collection | None:
    if tenant is None:
        row = db.execute(f"{COLLECTION} WHERE k.name = ?", (name,)).fetchone()
    else:
        row = db.execute(COLLECTION_OF, (name, tenant)).fetchone()
    if row is None:
        return None
    found = Collection(*row[:10])
    return found if tenant is None else replace(found, revision=row[10])


def _require_epoch(db: sqlite3.Connection, document: Document, epoch: int) -> None:
    row = db.execute("SELECT epoch FROM epochs WHERE document_id = ?", (document.document_id,)).fetchone()
    if row is None or row[0] != epoch:
        raise Fenced("a later upload or a delete of this document took over; add it again if it should stay")


def _require_reader(db: sqlite3.Connection, document_id: str, principal: Principal) -> None:
    """Who may not read the current version does not replace it either."""
    hidden = db.execute(
        f"SELECT 1 FROM versions v JOIN spans s USING (document_id, version) WHERE s.closed IS NULL"
        f" AND v.document_id = :id AND NOT {MAY_READ}",
        {**_who(principal), "id": document_id},
    ).fetchone()
    if hidden:
        raise Conflict(
            "a document of this name is there already, and others read it; choose a new name", code="name_taken"
        )


def _stage_one(db: sqlite3.Connection, staged: Staged, now: float) -> None:
    document = staged.document
    _require_epoch(db, document, staged.epoch)
    key = (document.document_id, document.version)
    row = db.execute("SELECT retiring_at FROM versions WHERE document_id = ? AND version = ?", key).fetchone()
    if row and row[0] is not None and now - RETIRE_SECONDS < row[0]:
        raise Unavailable("an earlier copy of this very version is being removed; try again in a moment")
    db.execute(
        "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, 0) ON CONFLICT DO UPDATE"
        " SET epoch = excluded.epoch, staged_at = excluded.staged_at, retiring_at = NULL",
        (*_version_row(document), staged.epoch, now, now),
    )
    if staged.kept:
        db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", (*key, staged.kept))
    _note_audience(db, document, document.readers)
    for cut, made in _wanted_cuts(db, staged):
        _write_cut(db, document, cut, made)


def _wanted_cuts(db: sqlite3.Connection, staged: Staged) -> list[tuple[str, Cut]]:
    """Those of the indexes that are written to. Raises Unavailable where the own one is not that of `index` now."""
    collection = _collection(db, staged.document.collection)
    if staged.index and collection is not None and collection.index != staged.index:
        raise Unavailable("the index of this collection has just been exchanged; try again", code=LACKS)
    beside = db.execute(WRITTEN, (staged.document.collection,)).fetchall()
    own = (collection.cut if collection else "", staged.own)
    return [own, *((cut, staged.beside[index]) for index, cut in beside if index in staged.beside)]


def _write_cut(db: sqlite3.Connection, document: Document, cut: str, made: Cut) -> None:
    """Make these the chunks of a cut of a version, and no others."""
    key, count = (document.document_id, document.version), len(made.chunks)
    db.execute("INSERT OR REPLACE INTO cuts VALUES (?, ?, ?, ?)", (*key, cut, count))
    db.execute(
        "DELETE FROM chunks WHERE document_id = ? AND version = ? AND cut = ? AND ordinal >= ?", (*key, cut, count)
    )
    db.executemany(
        "INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (_chunk_row(chunk, vector) for chunk, vector in zip(made.chunks, made.vectors, strict=True)),
    )


def _require_cuts(db: sqlite3.Connection, document: Document) -> None:
    """A version is published with all of its chunks in every index that is written to, or not at all."""
    key = (document.document_id, document.version)
    is_going = db.execute(
        "SELECT retiring_at IS NOT NULL FROM versions WHERE document_id = ? AND version = ?", key
    ).fetchone()
    if is_going != (0,):
        raise Conflict("a version is published only when all of its chunks are staged")
    there = dict(db.execute("SELECT cut, chunks FROM cuts WHERE document_id = ? AND version = ?", key))
    collection = _collection(db, document.collection)
    own = there.get(collection.cut if collection else "")
    if own is None:
        raise Unavailable("the index of this collection has just been exchanged; try again", code=LACKS)
    if own != document.chunks:
        raise Conflict("a version is published only when all of its chunks are staged")
    if any(cut not in there for _, cut in db.execute(WRITTEN, (document.collection,)).fetchall()):
        raise Unavailable("a second index of this collection has just been begun; try again", code=LACKS)


def _delete_one(db: sqlite3.Connection, document: Document, principal: Principal) -> Document:
    db.execute("UPDATE epochs SET epoch = epoch + 1 WHERE document_id = ?", (document.document_id,))
    sequence = _next_sequence(db, document)
    _close_current(db, document.document_id, sequence)
    db.execute(
        "INSERT INTO deletions (document_id, sequence, tenant, collection, source, subject, deleted_at, readers)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            document.document_id, sequence, document.tenant, document.collection, document.source,
            principal.subject, time.time(), _readers(document.readers),
        ),
    )  # fmt: skip
    _note_change(db, document)
    return _with_span(document, document.opened, sequence)


def _note_purged(db: sqlite3.Connection, document_id: str, chunks: int) -> None:
    """Add a purged version to the receipts still open; one is complete when nothing older than it is left."""
    db.execute(
        "UPDATE deletions SET versions = versions + 1, chunks = chunks + ?, vectors = vectors + ?"
        " WHERE document_id = ? AND purged_at IS NULL",
        (chunks, chunks, document_id),
    )
    db.execute(
        "UPDATE deletions SET purged_at = ? WHERE document_id = ? AND purged_at IS NULL AND NOT EXISTS ("
        "SELECT 1 FROM spans s WHERE s.document_id = deletions.document_id AND s.opened < deletions.sequence)"
        " AND NOT EXISTS (SELECT 1 FROM versions v WHERE v.document_id = deletions.document_id"
        " AND v.retiring_at IS NOT NULL)",
        (time.time(), document_id),
    )


def _chunk_ids(db: sqlite3.Connection, document_id: str, version: str) -> list[str]:
    rows = db.execute(
        "SELECT chunk_id FROM chunks WHERE document_id = ? AND version = ? ORDER BY cut, ordinal",
        (document_id, version),
    )
    return [chunk_id for (chunk_id,) in rows]


def _publish_one(db: sqlite3.Connection, document: Document, epoch: int) -> Document:
    _require_epoch(db, document, epoch)
    if already := _published_by(db, document, epoch):
        return _with_span(document, already, None)
    _require_cuts(db, document)
    _annotate(db, document)
    sequence = _next_sequence(db, document)
    _close_current(db, document.document_id, sequence)
    db.execute(
        "INSERT INTO spans (document_id, version, opened, epoch) VALUES (?, ?, ?, ?)",
        (document.document_id, document.version, sequence, epoch),
    )
    _note_change(db, document)
    return _with_span(document, sequence, None)


def _published_by(db: sqlite3.Connection, document: Document, epoch: int) -> int | None:
    """The sequence at which this very epoch made the version current: then this is the same publish come again."""
    row = db.execute(
        "SELECT opened FROM spans WHERE document_id = ? AND version = ? AND closed IS NULL AND epoch = ?",
        (document.document_id, document.version, epoch),
    ).fetchone()
    return int(row[0]) if row else None


def _annotate(db: sqlite3.Connection, document: Document) -> None:
    db.execute(
        "UPDATE versions SET title = ?, metadata = ?, readers = ?, chunks = ? WHERE document_id = ? AND version = ?",
        (
            document.title,
            json.dumps(dict(document.metadata)),
            _readers(document.readers),
            document.chunks,
            document.document_id,
            document.version,
        ),
    )
    _note_audience(db, document, document.readers)
    if document.readers:
        _narrow(db, document)


def _narrow(db: sqlite3.Connection, document: Document) -> None:
    """Who may not read a document now may not read what it was before either, by any `as_of`, nor its receipts."""
    known = db.execute(
        "SELECT readers FROM versions WHERE document_id = :id AND version != :version"
        " UNION SELECT readers FROM deletions WHERE document_id = :id",
        {"id": document.document_id, "version": document.version},
    ).fetchall()
    for (readers,) in known:
        before = _readers_in(readers)
        left = (before & document.readers or frozenset({NOBODY})) if before else document.readers
        if left != before:
            change = {"id": document.document_id, "version": document.version, "old": readers, "new": _readers(left)}
            db.execute(
                "UPDATE versions SET readers = :new WHERE document_id = :id AND version != :version AND readers = :old",
                change,
            )
            db.execute("UPDATE deletions SET readers = :new WHERE document_id = :id AND readers = :old", change)
            _note_audience(db, document, left)


def _note_audience(db: sqlite3.Connection, document: Document, readers: frozenset[str]) -> None:
    """Remember each set of readers that rows of the vector store may name."""
    if readers:
        db.execute(
            "INSERT INTO audiences VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (document.tenant, document.collection, _readers(readers)),
        )


def _write_edges(db: sqlite3.Connection, document: Document, kind: str, targets: Sequence[str]) -> None:
    """Make these the version's edges of one kind, and no others."""
    db.execute(
        "DELETE FROM edges WHERE document_id = ? AND version = ? AND kind = ?",
        (document.document_id, document.version, kind),
    )
    own = (document.document_id, document.version, document.tenant, document.collection, kind)
    db.executemany(
        "INSERT INTO edges (document_id, version, tenant, collection, kind, target) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT DO NOTHING",
        ((*own, target) for target in targets),
    )


def _next_sequence(db: sqlite3.Connection, document: Document) -> int:
    """Of its tenant in its collection: how much others do there shows to nobody."""
    (sequence,) = db.execute(
        "INSERT INTO sequences (tenant, collection, sequence) VALUES (?, ?, 1)"
        " ON CONFLICT DO UPDATE SET sequence = sequence + 1 RETURNING sequence",
        (document.tenant, document.collection),
    ).fetchone()
    return int(sequence)


def _note_change(db: sqlite3.Connection, document: Document) -> None:
    """Its versions are to be found or judged otherwise from now on: whoever follows this tenant reads them anew."""
    db.execute(
        "UPDATE sequences SET revision = revision + 1 WHERE tenant = ? AND collection = ?",
        (document.tenant, document.collection),
    )
    db.execute(
        "UPDATE versions SET revision = (SELECT s.revision FROM sequences s WHERE s.tenant = versions.tenant"
        " AND s.collection = versions.collection) WHERE document_id = ?",
        (document.document_id,),
    )


def _close_current(db: sqlite3.Connection, document_id: str, sequence: int) -> None:
    db.execute(
        "UPDATE spans SET closed = ?, closed_at = ? WHERE document_id = ? AND closed IS NULL",
        (sequence, time.time(), document_id),
    )


def _current(db: sqlite3.Connection, document_id: str, principal: Principal) -> Document | None:
    row = db.execute(
        f"{CURRENT} AND v.document_id = :document_id AND v.tenant = :tenant AND {MAY_READ}",
        {**_who(principal), "document_id": document_id},
    ).fetchone()
    return _document(row) if row else None


def _who(principal: Principal) -> dict[str, object]:
    return {"tenant": principal.tenant, "subject": principal.subject}


def _verdict(ours: int, may_read: int, is_open: int | None, first_opened: int | None, as_of: int) -> Verdict:
    if not ours:
        return "other tenant"
    if not may_read:
        return "not a reader"
    if first_opened is None:
        return "unpublished"
    if not is_open:
        return "not yet" if first_opened > as_of else "superseded"
    return "visible"


# ── rows and values ─────────────────────────────────────────────────────────────────────────────


def _version_row(document: Document) -> tuple[object, ...]:
    return (
        document.document_id, document.version, document.tenant, document.collection, document.source,
        document.title, document.media_type, json.dumps(dict(document.metadata)),
        _readers(document.readers), document.size, document.chunks,
    )  # fmt: skip


def _readers(readers: frozenset[str]) -> str:
    return json.dumps(sorted(readers))


@lru_cache(1024)
def _readers_in(told: str) -> frozenset[str]:
    """Many documents are for the same few."""
    return frozenset(json.loads(told))


def _document(row: Sequence[Any]) -> Document:
    return Document(
        document_id=row[0], version=row[1], tenant=row[2], collection=row[3], source=row[4], title=row[5],
        media_type=row[6], metadata={} if row[7] == "{}" else json.loads(row[7]), readers=_readers_in(row[8]),
        size=row[9], chunks=row[10], opened=row[11], closed=row[12], created_at=row[13],
    )  # fmt: skip


def _generation(row: Sequence[Any]) -> Generation:
    *live, state, since, asked, figures = row
    return Generation(LiveIndex(*live), state, since, json.loads(asked), json.loads(figures))


def _is_unit(vector: bytes, dimension: int) -> bool:
    values = np.frombuffer(vector, dtype=np.float32) if len(vector) == 4 * dimension else np.zeros(1)
    return bool(abs(float(np.linalg.norm(values)) - 1) < 1e-2)


def _with_span(document: Document, opened: int | None, closed: int | None) -> Document:
    return replace(document, opened=opened, closed=closed)


def _chunk_row(chunk: Chunk, vector: Vector) -> tuple[object, ...]:
    piece = chunk.piece
    return (
        chunk.chunk_id, chunk.document_id, chunk.version, chunk.ordinal, piece.text, json.dumps(piece.heading),
        piece.page, piece.first_line, piece.last_line, piece.tokens, np.ascontiguousarray(vector, np.float32).tobytes(),
        chunk.cut,
    )  # fmt: skip


def _chunk(row: Sequence[Any]) -> Chunk:
    chunk_id, document_id, version, ordinal, text, heading, page, first_line, last_line, tokens, cut = row
    piece = Piece(text, tuple(json.loads(heading)), page, first_line, last_line, tokens)
    return Chunk(chunk_id, document_id, version, ordinal, piece, cut)
