"""The authority in an ArangoDB database: documents, versions, chunks, visibility, the graph, sessions.

The same authority as stores/sqlite.py, and it answers the same. A version's record holds the spans in which it was
visible; `current_of` is there while one is open, and its unique index makes two current versions of one document
impossible. The moves of HADES are read-modify-write: under the exclusive lock on `fences` the records of the
documents concerned are read in one query, changed here, and written back in a few.

Edges are edges of ArangoDB, from a version to the fence of the document it refers to (there or not), or to the place
of a `field=value` in its tenant and collection, which has no record.

What a version's chunks were cut from is in `kept` (kept.py), for all but versions of before there was such a table.
Vectors stand in the records of their chunks. Each index of a collection, its own and those beside it (`generations`),
has a cut of every version: a version's record says of which cuts all chunks are there (`cuts`), and a chunk's
`version_key` names its version and, but for a collection's first cut, its cut. Which index is the own one is said by
the collection's record, where `vectors_of` is whose its vectors are.

Tenants, readers, and whatever else decides are compared as digests: the server's own comparison of texts holds some
for equal that differ.
"""

import base64
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nexus import interactions_arango
from nexus.arangodb import ArangoDatabase, ArangoStore, Table, Transaction, condition_of, facts_of, persistent
from nexus.errors import Conflict, Fenced, Unavailable
from nexus.failpoints import pass_through
from nexus.filters import Filter
from nexus.interactions_arango import ArangoInteractions
from nexus.kept import unpack
from nexus.ports import Collection, Cut, Deletion, Generation, GenerationState, LiveIndex, Staged, Verdict
from nexus.types import NOBODY, Chunk, Document, Piece, Principal, Vector, chunk_id_of, digest

T = TypeVar("T")
Row = dict[str, Any]  # a record as it is kept

FAN_OUT = 25  # documents that one step goes on to from one document, or from one value that documents share
LOOKED_AT = 500  # edges that one step looks at to find them
MAX_SHARED_CHARACTERS = 1024  # a longer value is a text, not the name of something two documents are about
RETIRE_SECONDS = 15.0  # for so long after `retire` its vectors may still be on their way out
FOREVER = 1e15  # seconds: JSON knows no infinity
LACKS = "generation_lacks"  # the code of an error: the version has to be staged again, with what it lacks
FORGOTTEN_AT_ONCE = 100  # versions, of which one transaction removes a cut
FIRST = "first"  # what a collection's first cut is called in records, where it has no name


MIGRATIONS = (
    (
        Table("collections", (persistent("by_index", "index"),)),
        Table("sequences"),
        Table("audiences", (persistent("by_place", "place"),)),
        Table("fences"),
        Table(
            "versions",
            (
                persistent("one_current_version", "current_of", unique=True, sparse=True),
                persistent("by_document", "document_id"),
                persistent("by_place", "place", "is_current", "document_id"),
                persistent("by_tenant", "tenant_key", "is_current", "document_id"),
                persistent("by_collection", "collection_key", "is_current"),
                persistent("by_state", "is_current", "staged_at"),
            ),
        ),
        Table("chunks", (persistent("by_ordinal", "version_key", "ordinal", unique=True),)),
        Table(
            "deletions", (persistent("by_document", "document_id"), persistent("by_tenant", "tenant_key", "deleted_at"))
        ),
        Table("shared_values"),
        Table(
            "edges",
            (persistent("outward", "_from", "kind", "target"), persistent("inward", "_to", "place", "document_id")),
            edges=True,
        ),
        Table("turns", (persistent("by_session", "session", "ordinal", unique=True),)),
    ),
    (Table("generations", (persistent("by_collection", "collection_key"),)),),
    (Table("kept"),),
    (Table("vectors_beside", is_dropped=True),),  # of before each index had chunks of its own
)

MAY_READ = "(LENGTH(v.audience) == 0 || @subject IN v.audience)"
VISIBLE = (
    f"v.place == @place && {MAY_READ}"
    " && LENGTH(v.spans[* FILTER CURRENT.opened <= @as_of && (CURRENT.closed == null || CURRENT.closed > @as_of)]) > 0"
)

COLLECTION = "FOR k IN collections FILTER k._key == @key RETURN k"
COLLECTION_OF = """
    FOR k IN collections FILTER k._key == @key
    FOR s IN sequences FILTER s._key == @place
    RETURN MERGE(k, {sequence: s.sequence, horizon: s.horizon})"""
COLLECTIONS = "FOR k IN collections RETURN k"
OPEN_COLLECTION = """
    INSERT {_key: @key, name: @name, fingerprint: @fingerprint, index: @index} INTO collections
    OPTIONS {overwriteMode: 'ignore', waitForSync: true}"""

LOOK = """
    RETURN {
        fences: (FOR f IN fences FILTER f._key IN @ids RETURN UNSET(f, '_id', '_rev')),
        versions: (FOR v IN versions FILTER v.document_id IN @ids RETURN UNSET(v, '_id', '_rev')),
        deletions: (FOR d IN deletions FILTER d.document_id IN @ids RETURN UNSET(d, '_id', '_rev')),
        sequences: (
            LET places = (FOR v IN versions FILTER v.document_id IN @ids RETURN v.place)
            FOR s IN sequences FILTER s._key IN APPEND(@places, places) RETURN UNSET(s, '_id', '_rev')
        ),
        shared: (
            FOR vertex IN @vertices
            FOR e IN edges FILTER e._from == vertex && e.kind == 'shared' RETURN [vertex, e._key]
        ),
        collections: (FOR k IN collections FILTER k._key IN @collections RETURN k),
        generations: (
            FOR g IN generations FILTER g.collection_key IN @collections && g.state != 'leaving' && g.cut != null
            RETURN g
        )
    }"""
REMOVE = """
    LET chunks_of = (
        FOR one IN @chunks
        FOR c IN chunks FILTER c.version_key == one.version_key && c._key NOT IN one.kept
        REMOVE c IN chunks RETURN 1
    )
    LET edges_of = (
        FOR one IN @edges
        FOR e IN edges FILTER e._from == one.vertex && e.kind == one.kind && e._key NOT IN one.kept
        REMOVE e IN edges RETURN 1
    )
    LET kept_of = (
        FOR one IN @versions
        FOR k IN kept FILTER k._key == one
        REMOVE k IN kept RETURN 1
    )
    LET versions_of = (FOR key IN @versions REMOVE key IN versions RETURN 1)
    RETURN LENGTH(chunks_of) + LENGTH(edges_of) + LENGTH(kept_of) + LENGTH(versions_of)"""
MOVED = ("chunks", "edges", "versions", "deletions", "sequences", "audiences", "kept")  # under the lock on the fences
ASKED = ("collections", "generations")  # by the moves of documents, which change neither
WRITTEN = (*MOVED, "fences")
PUT = "\n".join(
    f"LET put_{name} = (FOR row IN @{name} INSERT row INTO {name} OPTIONS {{overwriteMode: 'replace'}} RETURN 1)"
    for name in WRITTEN
)
PUT = f"{PUT}\nRETURN LENGTH(put_{') + LENGTH(put_'.join(WRITTEN)})"

CURRENT = f"FOR v IN versions FILTER v.current_of == @id && v.tenant_key == @tenant && {MAY_READ} RETURN v"
HISTORY = f"FOR v IN versions FILTER v.document_id == @id && v.tenant_key == @tenant && {MAY_READ} RETURN v"
READERS = """
    FOR v IN versions FILTER v.current_of IN @ids && LENGTH(v.audience) > 0
    RETURN v.readers"""
AUDIENCES = "FOR a IN audiences FILTER a.place == @place && @subject IN a.audience RETURN a.readers"
DOCUMENTS = f"""
    FOR v IN versions FILTER v.tenant_key == @tenant && v.is_current == true && v.document_id > @after && {MAY_READ}
    SORT v.document_id LIMIT @limit RETURN v"""
DOCUMENTS_OF = f"""
    FOR v IN versions FILTER v.place == @place && v.is_current == true && v.document_id > @after && {MAY_READ}
    SORT v.document_id LIMIT @limit RETURN v"""
TALLY = f"""
    FOR v IN versions FILTER v.tenant_key == @tenant && v.is_current == true && {MAY_READ}
    COLLECT place = v.place AGGREGATE name = MIN(v.collection), documents = SUM(1), chunks_of = SUM(v.chunks)
    RETURN [name, documents, chunks_of]"""
MATCHING = f"FOR v IN versions FILTER {VISIBLE} && "
FIRST_MATCHING = " SORT v.document_id LIMIT @limit RETURN v.document_id"
VERDICTS = f"""
    FOR c IN chunks FILTER c._key IN @ids
    FOR v IN versions FILTER v._key == CONCAT(c.document_id, '-', c.version)
    RETURN {{
        chunk_id: c._key, ours: v.place == @place, may_read: {MAY_READ}, first_opened: MIN(v.spans[*].opened),
        is_open: {VISIBLE}
    }}"""
LOAD = """
    FOR c IN chunks FILTER c._key IN @ids
    FOR v IN versions FILTER v._key == CONCAT(c.document_id, '-', c.version)
    RETURN [UNSET(c, 'vector'), v]"""
VECTORS = "FOR c IN chunks FILTER c._key IN @ids && c.vector != '' RETURN [c._key, c.vector]"
VECTORS_OF = f"""
    FOR id IN @ids
        FOR v IN versions FILTER v.document_id == id && {VISIBLE}
            FOR one IN (
                FOR c IN chunks FILTER c.version_key == CONCAT(v._key, @suffix) && c.ordinal < @share SORT c.ordinal
                RETURN [c._key, id, c.vector]
            )
            LIMIT @limit RETURN one"""
NEIGHBOURS = """
    FOR c IN chunks FILTER c.version_key == @key && c.ordinal >= @first && c.ordinal <= @last SORT c.ordinal
    RETURN UNSET(c, 'vector')"""
CHUNK_IDS_OF = "FOR c IN chunks FILTER c.version_key IN @keys SORT c.version_key, c.ordinal RETURN c._key"
VERSION = "FOR v IN versions FILTER v._key == @key RETURN v"

KEPT = "FOR k IN kept FILTER k._key == @key RETURN k.content"

NEEDLESS = """
    FOR v IN versions FILTER v.is_current == false
    LET closed_at = MAX(v.spans[*].closed_at)
    FILTER (closed_at == null || closed_at < @closed_before)
        && (v.retiring_at != null || v.staged_at < MAX([@staged_before, closed_at]))
    RETURN v"""
DAMAGED = """
    FOR v IN versions FILTER v.collection_key == @key && v.is_current == true
    RETURN [v, (
        FOR c IN chunks FILTER c.version_key == CONCAT(v._key, @suffix) SORT c.ordinal
        RETURN [c.ordinal, c._key, c.vector]
    )]"""
KEPT_IN = """
    FOR v IN versions FILTER v.collection_key == @key && v.is_current == true
    FOR p IN kept FILTER p._key == v._key
    RETURN [v.document_id, p.content]"""
CHUNK_IDS = """
    FOR v IN versions FILTER v.collection_key == @key && v.is_current IN @states
    FOR c IN chunks FILTER c.version_key == CONCAT(v._key, @suffix)
    RETURN c._key"""
DELETIONS = f"""
    FOR v IN deletions FILTER v.tenant_key == @tenant && {MAY_READ} && (@id == null || v.document_id == @id)
    SORT v.deleted_at DESC, v.sequence DESC LIMIT @limit RETURN v"""

GENERATIONS = "FOR g IN generations FILTER g.collection_key == @key RETURN g"
GENERATION = "FOR g IN generations FILTER g._key == @index RETURN g"
OWNER = "FOR k IN collections FILTER k.index == @index RETURN k"
ADD_GENERATION = "INSERT @row INTO generations"
NOTE_GENERATION = "FOR g IN generations FILTER g._key == @index UPDATE g WITH @change IN generations"
NOTE_OWN = "FOR k IN collections FILTER k._key == @key UPDATE k WITH @change IN collections"
FORGET_GENERATION = "FOR g IN generations FILTER g._key == @index REMOVE g IN generations"
LACKING = """
    FOR v IN versions FILTER v.collection_key == @key && LENGTH(v.spans) > 0 && v.retiring_at == null
    FILTER v.cuts[@index] == null
    LIMIT @limit RETURN v"""
UNKEPT = """
    FOR v IN versions FILTER v.collection_key == @key && v.is_current == true
    LET has = (FOR p IN kept FILTER p._key == v._key RETURN 1)
    FILTER LENGTH(has) == 0
    SORT v.document_id LIMIT @limit RETURN v"""
FILLED = """
    FOR v IN versions FILTER v.collection_key == @key && LENGTH(v.spans) > 0
    LET own = v.cuts == null ? v.chunks : v.cuts[@own]
    FILTER own != null
    COLLECT AGGREGATE done = SUM(v.cuts[@index] == null ? 0 : own), total = SUM(own)
    RETURN [done, total]"""
HAVING = """
    FOR v IN versions FILTER v.collection_key == @key
    FILTER v.cuts == null ? @is_first : v.cuts[@cut] != null
    LIMIT @limit RETURN v"""

TURNS = "FOR t IN turns FILTER t.session == @session SORT t.ordinal RETURN {key: t._key, role: t.role, text: t.text}"
ADD_TURN = """
    LET last = (FOR t IN turns FILTER t.session == @session SORT t.ordinal DESC LIMIT 1 RETURN t.ordinal)
    INSERT {session: @session, ordinal: LENGTH(last) == 0 ? 1 : last[0] + 1, role: @role, text: @text, at: @now}
    INTO turns OPTIONS {exclusive: true, waitForSync: true}"""
CLEAR_SESSION = """
    FOR t IN turns FILTER t.session == @session
    REMOVE t IN turns OPTIONS {exclusive: true, waitForSync: true}
    RETURN OLD._key"""
FIRST_TURNS = """
    FOR t IN turns FILTER t.session == @session SORT t.ordinal LIMIT @number
    RETURN {key: t._key, role: t.role, text: t.text}"""
REPLACE_TURN = "UPDATE @key WITH {role: @role, text: @text} IN turns"
REMOVE_TURNS = "FOR key IN @keys REMOVE key IN turns"

# A walk of the graph: three steps at most, each from the documents that the one before reached first.
SEEDS = f"""
    LET level0 = (
        FOR v IN versions FILTER v.document_id IN @ids && {VISIBLE} RETURN {{id: v.document_id, vertex: v._id}}
    )
    LET seen0 = @ids"""
STEP = """
    LET levelNEXT = (
        FOR w IN (@hops >= NEXT ? levelLAST : [])
        LET refers = (
            FOR e IN edges FILTER e._from == w.vertex && e.kind == 'link' SORT e.target LIMIT @looked_at
            FOR v IN versions FILTER v.document_id == e.target && GOES_ON
            RETURN {id: v.document_id, vertex: v._id, shared: 0}
        )
        LET is_referred_to = (
            FOR e IN edges FILTER e._to == CONCAT('fences/', w.id) && e.place == @place
            SORT e.document_id LIMIT @looked_at
            FOR v IN versions FILTER v._id == e._from && GOES_ON
            RETURN {id: v.document_id, vertex: v._id, shared: 0}
        )
        LET shares = (
            FOR own IN edges FILTER own._from == w.vertex && own.kind == 'shared'
            FOR one IN (
                FOR e IN edges FILTER e._to == own._to && e.place == @place SORT e.document_id LIMIT @looked_at
                FOR v IN versions FILTER v._id == e._from && GOES_ON
                RETURN {id: v.document_id, vertex: v._id, shared: 1}
            )
            RETURN one
        )
        FOR found IN UNION(refers, is_referred_to, shares) FILTER found.id NOT IN seenLAST
        COLLECT id = found.id AGGREGATE vertex = MIN(found.vertex), shared = MIN(found.shared)
        SORT shared, id LIMIT @limit
        RETURN {id, vertex, shared, hops: NEXT}
    )
    LET seenNEXT = APPEND(seenLAST, levelNEXT[*].id)""".replace(
    "GOES_ON", f"v.document_id != w.id && {VISIBLE} LIMIT @fan_out"
)
CONNECTED = (
    SEEDS
    + "".join(STEP.replace("NEXT", str(last + 1)).replace("LAST", str(last)) for last in range(3))
    + """
    FOR found IN UNION(level1, level2, level3) SORT 2 * found.hops + found.shared, found.id LIMIT @limit
    RETURN [found.id, found.hops, found.shared]"""
)


def open(
    address: str, *, home: Path | None = None, shared_metadata: Sequence[str] = ("robot_id",)
) -> "ArangoDocuments":
    """`arango://USER:PASSWORD@HOST:8529/DATABASE`; the server is spoken to when the store is first used.

    `shared_metadata` are the fields whose equal values connect documents; who only reads need not say them.
    """
    return ArangoDocuments(ArangoDatabase(address, "the document store", "documents", MIGRATIONS), shared_metadata)


def open_interactions(address: str, *, home: Path | None = None) -> ArangoInteractions:
    """What memory keeps, in the same database as the documents."""
    return ArangoInteractions(ArangoDatabase(address, "memory", "memory", interactions_arango.MIGRATIONS))


def check(address: str) -> None:
    """Raises ConfigError for an address that cannot be one."""
    open(address).close()


def place_of(tenant: str, collection: str) -> str:
    """The name of a tenant's part of a collection."""
    return digest("place", tenant, collection)


def _tenant_key(tenant: str) -> str:
    return digest("tenant", tenant)


def _collection_key(name: str) -> str:
    return digest("collection", name)


def _subject(subject: str) -> str:
    return digest("subject", subject)


def _version_key(document_id: str, version: str) -> str:
    return f"{document_id}-{version}"


def _who(principal: Principal) -> dict[str, str]:
    return {"tenant": _tenant_key(principal.tenant), "subject": _subject(principal.subject)}


def _who_in(principal: Principal, collection: str) -> dict[str, str]:
    return {"place": place_of(principal.tenant, collection), "subject": _subject(principal.subject)}


class ArangoDocuments(ArangoStore):
    """A DocumentStore in one database."""

    def __init__(self, database: ArangoDatabase, shared_metadata: Sequence[str]) -> None:
        super().__init__(database)
        self._shared_metadata = shared_metadata

    def _move(
        self, documents: Iterable[Document | str], change: Callable[["_Records"], T], durable: bool = True,
        last: Callable[[], None] = lambda: None,
    ) -> T:  # fmt: skip
        """Read all there is about these documents, change it, and write what changed; one mover at a time."""
        wanted = list(documents)

        def move(transaction: Transaction) -> T:
            records = _Records(transaction, wanted)
            result = change(records)
            records.write()
            last()
            return result

        return self._database.write(move, exclusive=["fences"], writes=MOVED, reads=ASKED, durable=durable)

    def _alone(
        self, move: Callable[[Transaction], T], *writes: str, reads: Sequence[str] = (), durable: bool = True
    ) -> T:
        """In a transaction of its own, between the moves of documents."""
        return self._database.write(move, exclusive=["fences"], writes=writes, reads=reads, durable=durable)

    # ── collections ─────────────────────────────────────────────────────────────────────────────

    def open_collection(self, name: str, fingerprint: str, index: str) -> Collection:
        known = self.collection(name)
        if known is not None:
            return known
        self._database.aql(OPEN_COLLECTION, key=_collection_key(name), name=name, fingerprint=fingerprint, index=index)
        return self.collection(name) or Collection(name, fingerprint, index, 0, 0)

    def collection(self, name: str, tenant: str | None = None) -> Collection | None:
        if tenant is None:
            rows = self._database.aql(COLLECTION, key=_collection_key(name))
        else:
            rows = self._database.aql(COLLECTION_OF, key=_collection_key(name), place=place_of(tenant, name))
        return _collection(rows[0]) if rows else None

    def collections(self) -> list[Collection]:
        return sorted(map(_collection, self._database.aql(COLLECTIONS)), key=lambda one: one.name)

    # ── the moves of HADES ──────────────────────────────────────────────────────────────────────

    def begin(self, document: Document, accepted_at: int | None = None, by: Principal | None = None) -> int:
        def change(records: _Records) -> int:
            if by is not None:
                records.require_reader(document.document_id, by)
            records.sequence_of(document)
            if accepted_at is not None and any(d["sequence"] > accepted_at for d in records.deletions.values()):
                raise Fenced("the document was deleted after this upload was accepted; add it again if it should stay")
            return records.fence(document.document_id)

        return self._move([document], change, durable=False)

    def stage(self, batch: Sequence[Staged]) -> None:
        def change(records: _Records) -> None:
            for staged in batch:
                records.stage(staged, time.time())
                records.connect(staged.document, "link", staged.document.links)
                records.connect(staged.document, "shared", self._shared(staged.document))

        self._move([staged.document for staged in batch], change, durable=False)

    def publish(self, versions: Sequence[tuple[Document, int]]) -> list[Document]:
        def change(records: _Records) -> list[Document]:
            for document, _ in versions:
                records.connect(document, "shared", self._shared(document))
            return [records.publish(document, epoch) for document, epoch in versions]

        documents = [document for document, _ in versions]
        return self._move(documents, change, last=lambda: pass_through("ingest.inside_publish"))

    def annotate(self, document: Document) -> None:
        def change(records: _Records) -> None:
            records.annotate(document)
            records.connect(document, "shared", self._shared(document))

        self._move([document], change)

    def _shared(self, document: Document) -> list[str]:
        """`field=value` for each field that connects documents and has a value that can be a name."""
        values = ((name, document.metadata.get(name)) for name in self._shared_metadata)
        names = [(n, str(value)) for n, value in values if isinstance(value, str | int) and not isinstance(value, bool)]
        short = [(name, value) for name, value in names if 0 < len(value) <= MAX_SHARED_CHARACTERS]
        return [f"{name}={value}" for name, value in short if value.isprintable()]

    def delete(self, document_ids: Sequence[str], principal: Principal) -> list[Document]:
        wanted = list(dict.fromkeys(document_ids))

        def change(records: _Records) -> list[Document]:
            found = [records.current(document_id, principal) for document_id in wanted]
            return [records.delete(row, principal) for row in found if row is not None]

        return self._move(wanted, change)

    # ── reading documents ───────────────────────────────────────────────────────────────────────

    def current(self, document_id: str, principal: Principal) -> Document | None:
        rows = self._database.aql(CURRENT, id=document_id, **_who(principal))
        return _document(rows[0]) if rows else None

    def history(self, document_id: str, principal: Principal) -> list[Document]:
        rows = self._database.aql(HISTORY, id=document_id, **_who(principal))
        spans = [(span["opened"], span["closed"], row) for row in rows for span in row["spans"]]
        spans.sort(key=lambda one: one[0], reverse=True)
        found = [replace(_document(row), opened=opened, closed=closed) for opened, closed, row in spans]
        return found if found and found[0].closed is None else []

    def readers_of(self, document_ids: Sequence[str]) -> set[frozenset[str]]:
        return {frozenset(readers) for readers in self._database.aql(READERS, ids=list(document_ids))}

    def audiences(self, collection: str, principal: Principal) -> set[frozenset[str]]:
        return {frozenset(readers) for readers in self._database.aql(AUDIENCES, **_who_in(principal, collection))}

    def documents(self, principal: Principal, collection: str | None, after: str | None, limit: int) -> list[Document]:
        page = {"after": after or "", "limit": limit}
        if collection is None:
            rows = self._database.aql(DOCUMENTS, **page, **_who(principal))
        else:
            rows = self._database.aql(DOCUMENTS_OF, **page, **_who_in(principal, collection))
        return [_document(row) for row in rows]

    def tally(self, principal: Principal) -> dict[str, tuple[int, int]]:
        rows = self._database.aql(TALLY, **_who(principal))
        return {name: (documents, chunks) for name, documents, chunks in sorted(rows)}

    def matching(self, collection: str, principal: Principal, condition: Filter, as_of: int, limit: int) -> list[str]:
        values: dict[str, object] = {**_who_in(principal, collection), "as_of": as_of, "limit": limit}
        where = condition_of(condition, values)
        return self._database.aql(f"{MATCHING}({where}){FIRST_MATCHING}", **values)

    def verdicts(
        self, collection: str, principal: Principal, chunk_ids: Sequence[str], as_of: int
    ) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = dict.fromkeys(chunk_ids, "unknown")
        values = {"ids": list(chunk_ids), "as_of": as_of, **_who_in(principal, collection)}
        for row in self._database.aql(VERDICTS, **values):
            verdicts[row["chunk_id"]] = _verdict(row, as_of)
        return verdicts

    def load(self, chunk_ids: Sequence[str]) -> dict[str, tuple[Chunk, Document]]:
        rows = self._database.aql(LOAD, ids=list(chunk_ids))
        return {chunk["_key"]: (_chunk(chunk), _document(version)) for chunk, version in rows}

    def vectors(self, chunk_ids: Sequence[str]) -> dict[str, Vector]:
        return {key: _read_vector(vector) for key, vector in self._database.aql(VECTORS, ids=list(chunk_ids))}

    def connected(
        self, collection: str, principal: Principal, document_ids: Sequence[str], hops: int, as_of: int, limit: int
    ) -> dict[str, tuple[int, str]]:
        """See the port. The walk goes nearest first, so what the bounds cut off is always the farthest.

        One step goes on to at most FAN_OUT visible documents by each of: what a document refers to, what
        refers to it, and each value it shares; the first by document id, among the first LOOKED_AT edges.
        """
        rows = self._database.aql(
            CONNECTED, ids=list(document_ids), hops=hops, as_of=as_of, limit=limit, fan_out=FAN_OUT,
            looked_at=LOOKED_AT, **_who_in(principal, collection),
        )  # fmt: skip
        return {document_id: (reached, "shared" if shared else "link") for document_id, reached, shared in rows}

    def vectors_of(
        self, collection: str, principal: Principal, document_ids: Sequence[str], as_of: int, limit: int, cut: str = ""
    ) -> dict[str, tuple[str, Vector]]:
        rows = self._database.aql(
            VECTORS_OF, ids=list(document_ids), share=max(1, limit // max(1, len(document_ids))), limit=limit,
            as_of=as_of, suffix=_cut_key("", cut), **_who_in(principal, collection),
        )  # fmt: skip
        return {chunk_id: (document_id, _read_vector(vector)) for chunk_id, document_id, vector in rows}

    def neighbours(self, document_id: str, version: str, first: int, last: int, cut: str = "") -> list[Chunk]:
        key = _cut_key(_version_key(document_id, version), cut)
        return [_chunk(row) for row in self._database.aql(NEIGHBOURS, key=key, first=first, last=last)]

    def kept(self, document_id: str, version: str) -> bytes | None:
        rows = self._database.aql(KEPT, key=_version_key(document_id, version))
        return base64.b64decode(rows[0]) if rows else None

    # ── cleaning up and checking ────────────────────────────────────────────────────────────────

    def needless(self, closed_before: float, staged_before: float) -> list[Document]:
        rows = self._database.aql(NEEDLESS, closed_before=_finite(closed_before), staged_before=_finite(staged_before))
        return [_document(row) for row in sorted(rows, key=lambda row: row["_key"])]

    def retire(self, document: Document, closed_before: float, staged_before: float) -> list[str] | None:
        def change(records: _Records) -> list[str] | None:
            return records.retire(document, closed_before, staged_before)

        return self._move([document], change)

    def purge(self, document: Document) -> bool:
        return self._move([document], lambda records: records.purge(document))

    def deletions(self, principal: Principal, document_id: str | None, limit: int) -> list[Deletion]:
        rows = self._database.aql(DELETIONS, id=document_id, limit=limit, **_who(principal))
        return [Deletion(**{name: row[name] for name in Deletion.__slots__}) for row in rows]

    def damaged(self, index: str, dimension: int) -> list[str]:
        found = []
        key, cut = self._place_of(index)
        for row, chunks in self._database.aql(DAMAGED, key=key, suffix=_cut_key("", cut)):
            document_id, count = row["document_id"], _cuts(row).get(cut or FIRST)
            if count is None or [ordinal for ordinal, _, _ in chunks] != list(range(count)):
                found.append(document_id)
            found += [
                chunk_id for ordinal, chunk_id, vector in chunks
                if chunk_id != chunk_id_of(document_id, row["version"], ordinal, cut) or not _is_unit(vector, dimension)
            ]  # fmt: skip
        kept = self._database.aql(KEPT_IN, key=key)
        found += [document_id for document_id, content in kept if unpack(base64.b64decode(content)) is None]
        return found

    def chunk_ids(self, index: str, published: bool) -> set[str]:
        key, cut = self._place_of(index)
        states = [True] if published else [True, False]
        return set(self._database.aql(CHUNK_IDS, key=key, suffix=_cut_key("", cut), states=states))

    def chunk_ids_of(self, document_id: str, version: str) -> list[str]:
        found = self._database.aql(VERSION, key=_version_key(document_id, version))
        return self._database.aql(CHUNK_IDS_OF, keys=_cut_keys(found[0])) if found else []

    # ── a second index ──────────────────────────────────────────────────────────────────────────

    def generations(self, collection: str) -> list[Generation]:
        rows = self._database.aql(GENERATIONS, key=_collection_key(collection))
        return [_generation(row) for row in sorted(rows, key=lambda row: row["since"])]

    def add_generation(self, collection: str, own: LiveIndex, generation: Generation) -> None:
        key, wanted = _collection_key(collection), generation.live.index

        def move(transaction: Transaction) -> None:
            if transaction.aql(OWNER, index=wanted):
                raise Conflict(f"that is the index of {collection!r} itself")
            known = {row["_key"]: _generation(row).state for row in transaction.aql(GENERATIONS, key=key)}
            if known.get(wanted, "leaving") != "leaving":
                return
            if others := [index for index, state in known.items() if state != "leaving"]:
                raise Conflict(f"there is another index beside that of {collection!r} already ({others[0]})")
            if wanted in known:
                raise Unavailable("an index of this very embedder is being removed; try again in a minute")
            transaction.aql(NOTE_OWN, key=key, change={"embedder": own.embedder, "dimension": own.dimension})
            named = replace(generation, live=replace(generation.live, cut=wanted))
            transaction.aql(ADD_GENERATION, row=_generation_row(key, named))

        self._alone(move, "collections", "generations")

    def note_generation(
        self, index: str, state: GenerationState, since: float, figures: Mapping[str, object] | None = None
    ) -> None:
        change: Row = {"state": state, "since": since}
        if figures is not None:
            change["figures"] = json.dumps(dict(figures))
        self._alone(lambda transaction: transaction.aql(NOTE_GENERATION, index=index, change=change), "generations")

    def lacking(self, collection: str, index: str, limit: int) -> list[Document]:
        rows = self._database.aql(LACKING, key=_collection_key(collection), index=index, limit=limit)
        return [_document(row) for row in rows]

    def unkept(self, collection: str, limit: int) -> list[Document]:
        rows = self._database.aql(UNKEPT, key=_collection_key(collection), limit=limit)
        return [_document(row) for row in rows]

    def filled(self, collection: str, index: str) -> tuple[int, int]:
        known = self.collection(collection)
        own = (known.cut if known else "") or FIRST
        ((done, total),) = self._database.aql(FILLED, key=_collection_key(collection), index=index, own=own)
        return int(done or 0), int(total or 0)

    def fill(self, index: str, document: Document, cut: Cut) -> bool:
        return self._move([document], lambda records: records.fill(index, document, cut), durable=False)

    def adopt(self, collection: str, index: str) -> None:
        key = _collection_key(collection)

        def move(transaction: Transaction) -> None:
            found = [row for row in transaction.aql(GENERATION, index=index) if row["collection_key"] == key]
            if not found:
                return
            (row,), (own,) = found, transaction.aql(COLLECTION, key=key)
            transaction.aql(FORGET_GENERATION, index=index)
            transaction.aql(ADD_GENERATION, row=_generation_row(key, _leaving(_collection(own))))
            live = _generation(row).live
            change: Row = {"index": index, "vectors_of": live.fingerprint, "embedder": live.embedder}
            change |= {"dimension": live.dimension, "cut": live.cut, "chunking": live.chunking}
            transaction.aql(NOTE_OWN, key=key, change=change)

        self._alone(move, "collections", "generations")

    def forget_generation(self, index: str) -> bool:
        found = self._database.aql(GENERATION, index=index)
        cut = found[0].get("cut") if found else None
        if cut is not None:
            where = {"key": found[0]["collection_key"], "cut": cut or FIRST, "is_first": not cut}
            some = [_document(row) for row in self._database.aql(HAVING, limit=FORGOTTEN_AT_ONCE, **where)]
            if some:
                self._move(some, lambda records: records.lose(some, cut))
                return True
        self._alone(lambda transaction: transaction.aql(FORGET_GENERATION, index=index), "generations")
        return False

    def _place_of(self, index: str) -> tuple[str, str]:
        """Of which collection an index is, by its key, and its cut."""
        for row in self._database.aql(OWNER, index=index):
            return row["_key"], row.get("cut", "")
        for row in self._database.aql(GENERATION, index=index):
            return row["collection_key"], row.get("cut", index)
        return "", ""

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    def add_turn(self, tenant: str, session_id: str, role: str, content: str) -> None:
        self._database.aql(
            ADD_TURN, session=_session(tenant, session_id), role=role, text=content, now=time.time()
        )  # fmt: skip

    def turns(self, tenant: str, session_id: str) -> list[tuple[str, str]]:
        rows = self._database.aql(TURNS, session=_session(tenant, session_id))
        return [(row["role"], row["text"]) for row in rows]

    def replace_turns(
        self, tenant: str, session_id: str, first: Sequence[tuple[str, str]], replacement: tuple[str, str] | None
    ) -> bool:
        def move(transaction: Transaction) -> bool:
            session = _session(tenant, session_id)
            found = transaction.aql(FIRST_TURNS, session=session, number=len(first))
            if not first or [(row["role"], row["text"]) for row in found] != list(first):
                return False
            keys = [row["key"] for row in found]
            if replacement is not None:  # in the place of the last of them
                transaction.aql(REPLACE_TURN, key=keys.pop(), role=replacement[0], text=replacement[1])
            transaction.aql(REMOVE_TURNS, keys=keys)
            return True

        return self._database.write(move, exclusive=["turns"])

    def clear_session(self, tenant: str, session_id: str) -> int:
        return len(self._database.aql(CLEAR_SESSION, session=_session(tenant, session_id)))


class _Records:
    """All that is kept of some documents, read in one query, changed here, and written back.

    A record is never changed in place: what is written back are those that are no longer the ones read.
    """

    def __init__(self, transaction: Transaction, documents: Sequence[Document | str]) -> None:
        whole = [document for document in documents if isinstance(document, Document)]
        ids = [document if isinstance(document, str) else document.document_id for document in documents]
        (found,) = transaction.aql(
            LOOK, ids=list(dict.fromkeys(ids)),
            vertices=[f"versions/{_key(document)}" for document in whole],
            places=list({_place(document) for document in whole}),
            collections=list({_collection_key(document.collection) for document in whole}),
        )  # fmt: skip
        self._transaction = transaction
        self._read: dict[str, dict[str, Row]] = {
            name: {row["_key"]: row for row in found[name]} for name in ("fences", "versions", "deletions", "sequences")
        }
        self.fences, self.versions, self.deletions, self.sequences = (dict(rows) for rows in self._read.values())
        self._shared_there: set[tuple[str, str]] = {(vertex, key) for vertex, key in found["shared"]}
        self._collections: dict[str, Row] = {row["_key"]: row for row in found["collections"]}
        self._written: list[Row] = found["generations"]  # a second index of each of these, where there is one
        self._kept: dict[str, Row] = {}
        self._audiences: dict[str, Row] = {}
        self._edges: dict[tuple[str, str], dict[str, Row]] = {}  # by vertex and kind: all that it is to have
        self._chunks: dict[str, dict[str, Row]] = {}  # by cut of a version: all that it is to have
        self._removed: list[str] = []  # versions

    def write(self) -> None:
        """Write what changed. What stops being current goes first: no document has two current versions."""
        versions = self._changed("versions", self.versions)
        edges = {key: rows for key, rows in self._edges.items() if not self._are_there(*key, rows)}
        removed = {
            "chunks": [{"version_key": key, "kept": list(rows)} for key, rows in self._chunks.items()],
            "edges": [{"vertex": key[0], "kind": key[1], "kept": list(rows)} for key, rows in edges.items()],
            "versions": self._removed,
        }
        if self._read["versions"] and any(removed.values()):
            self._transaction.aql(REMOVE, **removed)
        self._transaction.aql(
            PUT, versions=sorted(versions, key=lambda row: row["is_current"]),
            chunks=[row for rows in self._chunks.values() for row in rows.values()],
            edges=[row for rows in edges.values() for row in rows.values()],
            deletions=self._changed("deletions", self.deletions), audiences=list(self._audiences.values()),
            sequences=self._changed("sequences", self.sequences), fences=self._changed("fences", self.fences),
            kept=list(self._kept.values()),
        )  # fmt: skip

    def _are_there(self, vertex: str, kind: str, rows: Mapping[str, Row]) -> bool:
        """Whether a version has these very edges already. Those to what documents share are read for it."""
        known = {key for one, key in self._shared_there if one == vertex}
        return kind == "shared" and known == set(rows)

    def _changed(self, name: str, rows: Mapping[str, Row]) -> list[Row]:
        return [row for key, row in rows.items() if row is not self._read[name].get(key)]

    # ── questions ───────────────────────────────────────────────────────────────────────────────

    def versions_of(self, document_id: str) -> list[Row]:
        return [row for row in self.versions.values() if row["document_id"] == document_id]

    def current(self, document_id: str, principal: Principal) -> Row | None:
        tenant = _tenant_key(principal.tenant)
        for row in self.versions_of(document_id):
            if row["is_current"] and row["tenant_key"] == tenant and principal.may_read(row["readers"]):
                return row
        return None

    def require_reader(self, document_id: str, principal: Principal) -> None:
        """Who may not read the current version does not replace it either."""
        if any(row["is_current"] and not principal.may_read(row["readers"]) for row in self.versions_of(document_id)):
            raise Conflict(
                "a document of this name is there already, and others read it; choose a new name", code="name_taken"
            )

    def require_epoch(self, document: Document, epoch: int) -> None:
        if self.fences.get(document.document_id, {}).get("epoch") != epoch:
            raise Fenced("a later upload or a delete of this document took over; add it again if it should stay")

    def written_beside(self, collection: str) -> list[Row]:
        """The indexes beside the own one of a collection that versions are written to."""
        key = _collection_key(collection)
        return [row for row in self._written if row["collection_key"] == key]

    def own_cut(self, collection: str) -> str:
        """That of a collection's own index."""
        return str(self._collections.get(_collection_key(collection), {}).get("cut", ""))

    def require_cuts(self, document: Document) -> None:
        """A version is published with all of its chunks in every index that is written to, or not at all."""
        row = self.versions.get(_key(document))
        if row is None or row["retiring_at"] is not None:
            raise Conflict("a version is published only when all of its chunks are staged")
        there = _cuts(row)
        own = there.get(self.own_cut(document.collection) or FIRST)
        if own is None:
            raise Unavailable("the index of this collection has just been exchanged; try again", code=LACKS)
        if own != document.chunks:
            raise Conflict("a version is published only when all of its chunks are staged")
        if any(beside["cut"] not in there for beside in self.written_beside(document.collection)):
            raise Unavailable("a second index of this collection has just been begun; try again", code=LACKS)

    # ── changes ─────────────────────────────────────────────────────────────────────────────────

    def fence(self, document_id: str) -> int:
        """A new epoch of the document."""
        epoch = int(self.fences.get(document_id, {"epoch": 0})["epoch"]) + 1
        self.fences[document_id] = {"_key": document_id, "epoch": epoch}
        return epoch

    def sequence_of(self, document: Document, steps: int = 0) -> int:
        """Of its tenant in its collection, so many steps on: how much others do there shows to nobody."""
        place = _place(document)
        row = self.sequences.get(place)
        if row is None or steps:
            row = row or {"_key": place, "sequence": 0, "horizon": 0}
            self.sequences[place] = {**row, "sequence": row["sequence"] + steps}
        return int(self.sequences[place]["sequence"])

    def stage(self, staged: Staged, now: float) -> None:
        document, key = staged.document, _key(staged.document)
        self.require_epoch(document, staged.epoch)
        row = self.versions.get(key) or _version(document, now)
        if row["retiring_at"] is not None and now - RETIRE_SECONDS < row["retiring_at"]:
            raise Unavailable("an earlier copy of this very version is being removed; try again in a moment")
        self.versions[key] = {**row, "epoch": staged.epoch, "staged_at": now, "retiring_at": None}
        if staged.kept:
            content = base64.b64encode(staged.kept).decode()
            self._kept[key] = {"_key": key, "content": content}
        self.note_audience(document, document.readers)
        collection = self._collections.get(_collection_key(document.collection))
        if staged.index and collection and collection["index"] != staged.index:
            raise Unavailable("the index of this collection has just been exchanged; try again", code=LACKS)
        self.write_cut(document, self.own_cut(document.collection), staged.own)
        for beside in self.written_beside(document.collection):
            if beside["_key"] in staged.beside:
                self.write_cut(document, beside["cut"], staged.beside[beside["_key"]])

    def write_cut(self, document: Document, cut: str, made: Cut) -> None:
        """Make these the chunks of a cut of a version, and no others."""
        key = _key(document)
        row = self.versions[key]
        self.versions[key] = {**row, "cuts": {**_cuts(row), cut or FIRST: len(made.chunks)}}
        chunks = zip(made.chunks, made.vectors, strict=True)
        self._chunks[_cut_key(key, cut)] = {chunk.chunk_id: _chunk_row(chunk, vector) for chunk, vector in chunks}

    def fill(self, index: str, document: Document, made: Cut) -> bool:
        row = self.versions.get(_key(document))
        beside = next((one for one in self.written_beside(document.collection) if one["_key"] == index), None)
        if row is None or row["retiring_at"] is not None or beside is None or beside["cut"] in _cuts(row):
            return False
        self.write_cut(document, beside["cut"], made)
        return True

    def lose(self, documents: Iterable[Document], cut: str) -> None:
        """Remove a cut of some versions."""
        for document in documents:
            key = _key(document)
            if row := self.versions.get(key):
                cuts = {name: count for name, count in _cuts(row).items() if name != (cut or FIRST)}
                chunks = cuts.get(self.own_cut(document.collection) or FIRST, row["chunks"])
                self.versions[key] = {**row, "cuts": cuts, "chunks": chunks}
                self._chunks[_cut_key(key, cut)] = {}

    def publish(self, document: Document, epoch: int) -> Document:
        key = _key(document)
        self.require_epoch(document, epoch)
        row = self.versions.get(key)
        if row is not None and row["is_current"] and row["spans"][-1]["epoch"] == epoch:
            return replace(document, opened=row["spans"][-1]["opened"], closed=None)  # the same publish come again
        self.require_cuts(document)
        self.annotate(document)
        sequence = self.sequence_of(document, steps=1)
        self.close_current(document.document_id, sequence)
        row, span = self.versions[key], {"opened": sequence, "closed": None, "closed_at": None, "epoch": epoch}
        opened = {"spans": [*row["spans"], span], "is_current": True, "current_of": document.document_id}
        self.versions[key] = {**row, **opened}
        return replace(document, opened=sequence, closed=None)

    def close_current(self, document_id: str, sequence: int) -> None:
        for row in self.versions_of(document_id):
            if row["is_current"]:
                closed = {**row["spans"][-1], "closed": sequence, "closed_at": time.time()}
                row = {**row, "spans": [*row["spans"][:-1], closed], "is_current": False, "current_of": None}
                self.versions[row["_key"]] = row

    def annotate(self, document: Document) -> None:
        row = self.versions.get(_key(document))
        if row is not None:
            self.versions[row["_key"]] = {**row, **_annotations(document), **_readers(document.readers)}
        self.note_audience(document, document.readers)
        if document.readers:
            self.narrow(document)

    def narrow(self, document: Document) -> None:
        """Who may not read a document now may not read what it was before either, by any `as_of`, nor its receipts."""
        before = [row for row in self.versions_of(document.document_id) if row["version"] != document.version]
        for rows, others in ((self.versions, before), (self.deletions, list(self.deletions.values()))):
            for row in others:
                known = frozenset(row["readers"])
                left = (known & document.readers or frozenset({NOBODY})) if known else document.readers
                if row["document_id"] == document.document_id and left != known:
                    rows[row["_key"]] = {**row, **_readers(left)}
                    self.note_audience(document, left)

    def note_audience(self, document: Document, readers: frozenset[str]) -> None:
        """Remember each set of readers that rows of the vector store may name."""
        if readers:
            place = _place(document)
            key = digest("audience", place, *sorted(readers))
            self._audiences[key] = {"_key": key, "place": place, **_readers(readers)}

    def connect(self, document: Document, kind: str, targets: Sequence[str]) -> None:
        """Make these the version's edges of one kind, and no others."""
        vertex, place = f"versions/{_key(document)}", _place(document)
        rows = (_edge(vertex, document.document_id, place, kind, target) for target in targets)
        self._edges[vertex, kind] = {row["_key"]: row for row in rows}

    def delete(self, row: Row, principal: Principal) -> Document:
        document = _document(row)
        self.fence(document.document_id)
        sequence = self.sequence_of(document, steps=1)
        self.close_current(document.document_id, sequence)
        key = f"{document.document_id}-{sequence}"
        self.deletions[key] = {
            "_key": key, "document_id": document.document_id, "sequence": sequence, "tenant": document.tenant,
            "tenant_key": row["tenant_key"], "collection": document.collection, "source": document.source,
            "subject": principal.subject, "deleted_at": time.time(), "purged_at": None, "versions": 0, "chunks": 0,
            "vectors": 0, **_readers(document.readers),
        }  # fmt: skip
        return replace(document, closed=sequence)

    def retire(self, document: Document, closed_before: float, staged_before: float) -> list[str] | None:
        row = self.versions.get(_key(document))
        if row is None or row["is_current"]:
            return None
        closed_at = max((span["closed_at"] for span in row["spans"]), default=None)
        if closed_at is not None and closed_at >= closed_before:
            return None
        if row["retiring_at"] is None and row["staged_at"] >= max(staged_before, closed_at or 0):
            return None
        past = max((span["closed"] for span in row["spans"]), default=0)
        if sequence := self.sequences.get(row["place"]):
            self.sequences[row["place"]] = {**sequence, "horizon": max(sequence["horizon"], past)}
        self.versions[row["_key"]] = {**row, "retiring_at": time.time(), "spans": []}
        return self._transaction.aql(CHUNK_IDS_OF, keys=_cut_keys(row))

    def purge(self, document: Document) -> bool:
        key = _key(document)
        row = self.versions.get(key)
        if row is None or row["retiring_at"] is None:
            return False
        del self.versions[key]
        self._removed.append(key)
        self._chunks |= {cut_key: {} for cut_key in _cut_keys(row)}
        for kind in ("link", "shared"):
            self._edges[f"versions/{key}", kind] = {}
        self._note_purged(document.document_id, sum(_cuts(row).values()))
        return True

    def _note_purged(self, document_id: str, chunks: int) -> None:
        """Add a purged version to the receipts still open; one is complete when nothing older than it is left."""
        left = self.versions_of(document_id)
        retiring = any(row["retiring_at"] is not None for row in left)
        oldest = min((span["opened"] for row in left for span in row["spans"]), default=math.inf)
        for key, row in list(self.deletions.items()):
            if row["document_id"] == document_id and row["purged_at"] is None:
                done = not retiring and oldest >= row["sequence"]
                more = {"versions": row["versions"] + 1, "chunks": row["chunks"] + chunks}
                more |= {"vectors": row["vectors"] + chunks, "purged_at": time.time() if done else None}
                self.deletions[key] = {**row, **more}


# ── records and values ──────────────────────────────────────────────────────────────────────────


def _place(document: Document) -> str:
    return place_of(document.tenant, document.collection)


def _key(document: Document) -> str:
    return _version_key(document.document_id, document.version)


def _session(tenant: str, session_id: str) -> str:
    return digest("session", tenant, session_id)


def _finite(seconds: float) -> float:
    return min(max(seconds, -FOREVER), FOREVER)


def _verdict(row: Row, as_of: int) -> Verdict:
    if not row["ours"]:
        return "other tenant"
    if not row["may_read"]:
        return "not a reader"
    if row["first_opened"] is None:
        return "unpublished"
    if not row["is_open"]:
        return "not yet" if row["first_opened"] > as_of else "superseded"
    return "visible"


def _collection(row: Row) -> Collection:
    made_by = row.get("vectors_of")
    return Collection(
        row["name"], made_by or row["fingerprint"], row["index"], row.get("sequence", 0), row.get("horizon", 0),
        row.get("embedder", ""), row.get("dimension", 0), row["fingerprint"] if made_by else "", row.get("cut", ""),
        row.get("chunking", ""),
    )  # fmt: skip


def _generation(row: Row) -> Generation:
    """One of before, which has no chunks of its own, is on its way out."""
    live = LiveIndex(
        row["_key"], row["fingerprint"], row["embedder"], row["dimension"], str(row.get("cut", row["_key"])),
        str(row.get("chunking", "")),
    )  # fmt: skip
    state: GenerationState = row["state"] if "cut" in row else "leaving"
    return Generation(live, state, row["since"], json.loads(row["asked"]), json.loads(row["figures"]))


def _generation_row(collection_key: str, generation: Generation) -> Row:
    live = generation.live
    return {
        "_key": live.index, "collection_key": collection_key, "fingerprint": live.fingerprint,
        "embedder": live.embedder, "dimension": live.dimension, "cut": live.cut, "chunking": live.chunking,
        "state": generation.state, "since": generation.since,
        "asked": json.dumps(dict(generation.asked)), "figures": json.dumps(dict(generation.figures)),
    }  # fmt: skip


def _leaving(own: Collection) -> Generation:
    """What a collection's own index is once another one took its place."""
    live = LiveIndex(own.index, own.fingerprint, own.embedder, own.dimension, own.cut, own.chunking)
    return Generation(live, "leaving", time.time(), {}, {})


def _cuts(row: Row) -> dict[str, int]:
    """How many chunks a version has in each cut of which they are all there; one of before has one cut."""
    if row.get("cuts") is not None:
        return dict(row["cuts"])
    return {} if row.get("is_exchanged") else {FIRST: row["chunks"]}


def _cut_key(version_key: str, cut: str) -> str:
    return f"{version_key}-{cut}" if cut else version_key


def _cut_keys(row: Row) -> list[str]:
    """Of all that a version may have."""
    return [row["_key"], *(_cut_key(row["_key"], cut) for cut in _cuts(row) if cut != FIRST)]


def _version(document: Document, now: float) -> Row:
    return {
        "_key": _key(document), "document_id": document.document_id, "version": document.version,
        "tenant": document.tenant, "collection": document.collection, "source": document.source,
        "media_type": document.media_type, "size": document.size, "created_at": now, "staged_at": now,
        "retiring_at": None, "spans": [], "cuts": {}, "is_current": False, "current_of": None,
        "place": _place(document),
        "tenant_key": _tenant_key(document.tenant), "collection_key": _collection_key(document.collection),
        **_annotations(document), **_readers(document.readers),
    }  # fmt: skip


def _annotations(document: Document) -> Row:
    metadata = json.dumps(dict(document.metadata))
    return {"title": document.title, "metadata": metadata, "chunks": document.chunks, "facts": _facts(document)}


def _readers(readers: frozenset[str]) -> Row:
    return {"readers": sorted(readers), "audience": [_subject(reader) for reader in sorted(readers)]}


def _document(row: Row) -> Document:
    span = row["spans"][-1] if row["spans"] else {"opened": None, "closed": None}
    return Document(
        document_id=row["document_id"], version=row["version"], tenant=row["tenant"], collection=row["collection"],
        source=row["source"], title=row["title"], media_type=row["media_type"], metadata=json.loads(row["metadata"]),
        readers=frozenset(row["readers"]), size=row["size"], chunks=row["chunks"], opened=span["opened"],
        closed=span["closed"], created_at=row["created_at"],
    )  # fmt: skip


def _facts(document: Document) -> dict[str, object]:
    """What a filter may ask of a document: its metadata that have one value, and its own names, which win."""
    own = {"source": document.source, "title": document.title, "media_type": document.media_type}
    return facts_of({**document.metadata, **own})


def _edge(vertex: str, document_id: str, place: str, kind: str, target: str) -> Row:
    to = f"fences/{target}" if kind == "link" else f"shared_values/{digest('value', place, target)}"
    return {
        "_key": digest("edge", vertex, kind, target), "_from": vertex, "_to": to, "kind": kind,
        "target": target, "document_id": document_id, "place": place,
    }  # fmt: skip


def _chunk_row(chunk: Chunk, vector: Vector) -> Row:
    piece = chunk.piece
    return {
        "_key": chunk.chunk_id, "cut": chunk.cut,
        "version_key": _cut_key(_version_key(chunk.document_id, chunk.version), chunk.cut),
        "document_id": chunk.document_id, "version": chunk.version, "ordinal": chunk.ordinal, "text": piece.text,
        "heading": list(piece.heading), "page": piece.page, "first_line": piece.first_line,
        "last_line": piece.last_line, "tokens": piece.tokens, "vector": _write_vector(vector),
    }  # fmt: skip


def _chunk(row: Row) -> Chunk:
    piece = Piece(
        row["text"], tuple(row["heading"]), row["page"], row["first_line"], row["last_line"], row["tokens"]
    )  # fmt: skip
    return Chunk(row["_key"], row["document_id"], row["version"], row["ordinal"], piece, row.get("cut", ""))


def _write_vector(vector: Vector) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, np.float32).tobytes()).decode()


def _read_vector(text: str) -> Vector:
    return np.frombuffer(base64.b64decode(text), dtype=np.float32)


def _is_unit(vector: str, dimension: int) -> bool:
    data = base64.b64decode(vector)
    values = np.frombuffer(data, dtype=np.float32) if len(data) == 4 * dimension else np.zeros(1)
    return bool(abs(float(np.linalg.norm(values)) - 1) < 1e-2)
