"""The one authority on what is indexed: a document becomes visible whole, or not at all.

Two stores hold a document. The document store is believed; the vector store is a fast hint. A row
found in the vector store counts only if the document store says that its version is visible to this
principal at this sequence number. From that one rule follows the rest:

- Identity comes from content: `document_id` from where it came from, `version` from its bytes and
  from how they were read, cut and embedded, `chunk_id` from both and the ordinal. Doing anything
  twice writes the same ids, so every write is an upsert and any step may be repeated.
- The five moves. `begin` takes an epoch; a later `begin` fences the earlier, which then gets
  `Fenced`. `stage` writes chunks and vectors that nobody can see. `publish` is one transaction of
  the document store: the version becomes current at the collection's next sequence number, and the
  one before it is closed at that number. `delete` closes a document and opens nothing: it is a
  publish of nothing, with a receipt. `vacuum` retires what was closed, or staged and left, long
  enough ago: it closes the past to `as_of`, removes the vectors, then the rows.
- A version is visible at s when opened <= s < closed. A reader takes the sequence number first and
  asks the hint after, so it sees the whole old version or the whole new one; `as_of` is the same
  question with an older s, refused below the collection's horizon, where versions are missing.
- Readers belong to a document. Rows of the vector store name whom they are for, so that a search finds what it
  may show; the document store, asked about each row found, is believed about that too. Where readers are
  narrowed, they are so for what the document was before: no `as_of` opens it again.
- A crash leaves only invisible rows. They are named by `fsck` and removed by `vacuum`.
- A collection has an index of its own, and may have a second one beside it, with another embedder or chunker
  (reindex.py). Each has chunks of its own, in both stores: a cut of every version. All is written to both, and a
  version that lacks its chunks in one of them is not published. Which of them is searched is one value of the
  coordinator: a search looks that up once, and stays with it to its end, for a chunk's id says which cut it is of.
  Versions keep their names whichever it is: they are named by the embedder with which the collection began.

The order of writes matters twice. Rows are staged before vectors, and both before `publish`: what
is visible can be found, and a vector without a row is nobody's work under way. Vectors are purged
before rows: what is left after a crash is still known, and the next `vacuum` finds it.
"""

import posixpath
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar
from urllib.parse import unquote, urljoin

from nexus.chunking import embedded_text
from nexus.coordination import Alone
from nexus.errors import Conflict, NotFound
from nexus.failpoints import pass_through
from nexus.ports import (
    INDEX_PREFIX,
    Change,
    Collection,
    Coordinator,
    Cut,
    DocumentStore,
    Followed,
    Generation,
    IndexRow,
    KeepsGenerations,
    LiveIndex,
    Scope,
    Staged,
    VectorStore,
)
from nexus.terms import shadow
from nexus.types import LAST_ORDINAL, Chunk, Document, Piece, Principal, Vector, Vectors, chunk_id_of, digest, model_of

Cuttable = TypeVar("Cuttable", Document, Change)


def document_id_of(tenant: str, collection: str, source: str) -> str:
    """The identity of a document: where it came from."""
    return digest("document", tenant, collection, source)


def version_of(content_digest: str, parser: str, chunker: str, embedder: str) -> str:
    """The identity of what was made of some bytes, which are named by their digest."""
    return digest("version", content_digest, parser, chunker, embedder)


def linked(document: Document, links: Sequence[str]) -> tuple[str, ...]:
    """The ids of the documents that these references, as they stand in `document`, lead to; itself is none of them.

    An id follows from a source, so whoever is referred to need not be there yet: the edge waits for it.
    """
    sources = (_source_of(document.source, link) for link in links)
    found = dict.fromkeys(document_id_of(document.tenant, document.collection, source) for source in sources)
    found.pop(document.document_id, None)
    return tuple(found)


def _source_of(source: str, link: str) -> str:
    """The source that `link` means in a document of this source; '/' is the top of where that one came from."""
    if _is_url(link) or _is_url(source):
        try:
            return urljoin(source, link)
        except ValueError:  # a source may look like an address and be none
            return link
    joined = posixpath.join(posixpath.dirname(source), unquote(link))
    return posixpath.normpath(joined if source.startswith("/") else joined.lstrip("/"))


def _is_url(reference: str) -> bool:
    return reference.lower().startswith(("http://", "https://"))


def alias_of(collection: str) -> str:
    """The name in the vector store that follows a collection's live index, for whoever else looks into it."""
    return f"{INDEX_PREFIX}live_{digest('alias', collection)}"


def audience_of(tenant: str, readers: frozenset[str]) -> str:
    """Whom rows of the vector store are for: a tenant, or these readers of it. No tenant's name has a colon."""
    return f"{tenant}:{digest('readers', *sorted(readers))}" if readers else tenant


def chunks_of(document: Document, pieces: Sequence[Piece], cut: str = "") -> list[Chunk]:
    """The pieces of a cut of a version with their identities."""
    return [
        Chunk(
            chunk_id_of(document.document_id, document.version, ordinal, cut),
            document.document_id, document.version, ordinal, piece, cut,
        )
        for ordinal, piece in enumerate(pieces)
    ]  # fmt: skip


def lexical(chunks: Sequence[Chunk], texts: Sequence[str]) -> list[str]:
    """The terms each chunk is found by: its own twice, and once those beside it under the same heading.

    BM25 wants to see most of a question in one place, and a chunk is often less than that: on scifact's
    training claims chunks alone reach an nDCG@10 of 0.687, whole abstracts 0.696, and this 0.699, with
    the chunk that says it still ranking first.
    """
    own = [shadow(text) for text in texts]
    found = []
    for i, chunk in enumerate(chunks):
        beside = [
            own[j] for j in (i - 1, i + 1) if 0 <= j < len(own) and chunks[j].piece.heading == chunk.piece.heading
        ]
        found.append(" ".join([own[i], own[i], *beside]))
    return found


@dataclass(frozen=True, slots=True)
class Fault:
    """Something `fsck` found: what is wrong, in which collection, and the ids concerned."""

    kind: str
    collection: str
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """A version that `vacuum` removed, why, and how much of it there was in each store."""

    document: Document
    why: Literal["closed", "never published"]
    chunks: int
    vectors: int


MISSING = "visible chunks that no search can find"
ORPHANS = "vectors without a chunk"
DAMAGED = "documents or chunks that are not whole"


class Hades:
    """The moves over one document store and one vector store; the coordinator says which index is live."""

    def __init__(
        self, documents: DocumentStore, vectors: VectorStore, fingerprint: str, dimension: int,
        coordinator: Coordinator | None = None, embedder: str = "",
    ) -> None:  # fmt: skip
        """`fingerprint` and `dimension` are those of the configured embedder, `embedder` is its address.

        It makes the vectors of new collections, and of those whose embedder nobody noted. Without a coordinator this
        process agrees with nobody but itself.
        """
        self.documents = documents
        self.vectors = vectors
        self.fingerprint = fingerprint
        self.dimension = dimension
        self.coordinator = coordinator or Alone()
        self.embedder = embedder
        self.keeper = documents if isinstance(documents, KeepsGenerations) else None
        self._pointed: dict[str, str] = {}  # by collection, the index that its alias was last pointed to from here

    def open_collection(self, name: str) -> Collection:
        """The collection, made on first use. Raises Conflict when nobody knows which embedder its vectors are of."""
        index = index_of(name, self.fingerprint)
        recorded = self.documents.open_collection(name, self.fingerprint, index)
        own = self._own(recorded)
        if self.coordinator.live_index(name) is None:
            self.coordinator.point(name, own)
        collection = self._live(recorded)
        for live in (own, live_in(collection)):
            self.vectors.open_index(live.index, live.dimension)
        if self._pointed.get(name) != collection.index:  # the alias follows the coordinator, which alone is believed
            self.vectors.point_alias(alias_of(name), collection.index)
            self._pointed[name] = collection.index
        return collection

    def find_collection(self, name: str, tenant: str | None = None) -> Collection:
        """The collection, which must exist, for this tenant where given. Raises NotFound, or Conflict as above."""
        collection = self.documents.collection(name, tenant)
        if collection is None:
            raise NotFound(f"there is no collection {name!r}; add a document to it and it will be there")
        return self._live(collection)

    def identity_of(self, name: str) -> str:
        """The fingerprint that names the versions of a collection, as it is or will be made."""
        recorded = self.documents.collection(name)
        return self.fingerprint if recorded is None else recorded.identity or recorded.fingerprint

    def written(self, name: str) -> tuple[LiveIndex, tuple[LiveIndex, ...]]:
        """The indexes that versions of a collection, which exists, are written to: its own, and those beside it."""
        recorded = self.documents.collection(name)
        if recorded is None:
            raise NotFound(f"there is no collection {name!r}")
        return self._own(recorded), tuple(one.live for one in self.generations(name) if one.is_written)

    def generations(self, name: str) -> list[Generation]:
        """Those beside the collection's own index."""
        return self.keeper.generations(name) if self.keeper else []

    def lacking(self, name: str, live: LiveIndex, limit: int = 1000) -> list[Document]:
        """Versions that were published and are not whole in an index beside the collection's own."""
        return self.keeper.lacking(name, live.index, limit) if self.keeper else []

    def _own(self, recorded: Collection) -> LiveIndex:
        """A collection's own index. What nobody noted is told by the coordinator, or by being the configured one's."""
        live = self.coordinator.live_index(recorded.name)
        if live is not None and live.index == recorded.index and live.embedder:
            return replace(live, cut=recorded.cut, chunking=recorded.chunking)
        is_configured = recorded.fingerprint == self.fingerprint
        embedder = recorded.embedder or self._address_of(recorded.fingerprint)
        dimension = self.dimension if is_configured else recorded.dimension or self.dimension
        return LiveIndex(
            recorded.index, recorded.fingerprint, embedder, dimension, recorded.cut, recorded.chunking
        )  # fmt: skip

    def live_of(self, recorded: Collection) -> LiveIndex:
        """The index that is searched: the one that the coordinator says while that is written to, else the own one.

        One that is not written to was begun by a Nexus of before, which kept no chunks of it.
        """
        live, own = self.coordinator.live_index(recorded.name), self._own(recorded)
        if live is None or live.index == own.index:
            return own
        beside = (one.live for one in self.generations(recorded.name) if one.is_written)
        return next((one for one in beside if one.index == live.index), own)

    def _live(self, recorded: Collection) -> Collection:
        """The collection with the index that is live in it."""
        live = self.live_of(recorded)
        embedder = live.embedder or self._address_of(live.fingerprint)
        if not embedder and live.fingerprint != self.fingerprint:
            raise refusal(f"collection {recorded.name!r}")
        return replace(
            recorded, index=live.index, fingerprint=live.fingerprint, embedder=embedder,
            dimension=live.dimension or self.dimension, cut=live.cut, chunking=live.chunking,
        )  # fmt: skip

    def _address_of(self, fingerprint: str) -> str:
        """That of the configured embedder, where its model makes these vectors; else nothing."""
        return self.embedder if model_of(fingerprint) == model_of(self.fingerprint) else ""

    # ── the five moves ──────────────────────────────────────────────────────────────────────────

    def begin(self, document: Document, accepted_at: int | None = None, by: Principal | None = None) -> int:
        """Announce a version; the epoch returned fences every earlier begin of this document.

        Raises Fenced when the document was deleted after `accepted_at`, a sequence of its collection, and
        Conflict when it is one that `by` may not read.
        """
        pass_through("ingest.before_begin")
        self.open_collection(document.collection)
        epoch = self.documents.begin(document, accepted_at, by)
        pass_through("ingest.after_begin")
        return epoch

    def stage(self, batch: Sequence[Staged]) -> None:
        """Write chunks and vectors of versions of one collection, visible to nobody. Raises Fenced, Unavailable."""
        pass_through("ingest.before_stage")
        name = batch[0].document.collection
        self.open_collection(name)
        own, beside = self.written(name)
        self.documents.stage(batch)
        pass_through("ingest.between_stores")
        self.vectors.upsert(own.index, [row for staged in batch for row in rows_of(staged.document, staged.own)])
        for live in beside:
            have = [staged for staged in batch if live.index in staged.beside]
            rows = [row for staged in have for row in rows_of(staged.document, staged.beside[live.index])]
            self.vectors.open_index(live.index, live.dimension)
            self.vectors.upsert(live.index, rows)
        pass_through("ingest.after_stage")

    def publish(self, versions: Sequence[tuple[Document, int]]) -> list[Document]:
        """Make (document, epoch) pairs visible, all in one transaction. Raises Fenced, and then none is."""
        pass_through("ingest.before_publish")
        published = self.documents.publish(versions)
        pass_through("ingest.after_publish")
        return published

    def delete(self, document_ids: Sequence[str], principal: Principal) -> list[Document]:
        """Make documents invisible at once, everywhere. Raises NotFound when none of them is there."""
        pass_through("ingest.before_delete")
        deleted = self.documents.delete(document_ids, principal)
        pass_through("ingest.after_delete")
        if not deleted:
            raise NotFound("no such document")
        return deleted

    def vacuum(
        self, keep_closed_seconds: float, keep_staged_seconds: float, document_ids: Iterable[str] | None = None
    ) -> list[Removed]:
        """Remove versions that no retained `as_of` needs, and attempts given up; of some documents where given."""
        now = time.time()
        closed_before, staged_before = now - keep_closed_seconds, now - keep_staged_seconds
        wanted = None if document_ids is None else set(document_ids)
        removed = []
        for document in self.documents.needless(closed_before, staged_before):
            if wanted is None or document.document_id in wanted:
                removed += self._retire(document, closed_before, staged_before)
        return removed

    def _retire(self, document: Document, closed_before: float, staged_before: float) -> list[Removed]:
        pass_through("ingest.before_retire")
        chunk_ids = self.documents.retire(document, closed_before, staged_before)
        if chunk_ids is None:
            return []
        pass_through("ingest.after_retire")
        if chunk_ids and self.documents.collection(document.collection) is not None:
            own, beside = self.written(document.collection)
            for live in (own, *beside):
                self.vectors.delete(live.index, chunk_ids)
        pass_through("ingest.before_purge")
        if not self.documents.purge(document):
            # It was staged again while its vectors were on their way out; these are the same ones.
            self.write_again(chunk_ids)
            return []
        pass_through("ingest.after_purge")
        why: Literal["closed", "never published"] = "never published" if document.opened is None else "closed"
        return [Removed(document, why, len(chunk_ids), len(chunk_ids))]

    # ── questions ───────────────────────────────────────────────────────────────────────────────

    def scope(self, collection: str, principal: Principal, document_ids: tuple[str, ...] | None = None) -> Scope:
        """What of the vector store a principal's search may return. What it returns is judged all the same."""
        audiences = (audience_of(principal.tenant, some) for some in self.documents.audiences(collection, principal))
        return Scope(principal.tenant, document_ids, tuple(sorted(audiences)))

    def rows(self, collection: Collection, changes: Sequence[Change]) -> Iterator[list[IndexRow]]:
        """For each of these versions, its rows in the live index, as far as they are there: none of one that is gone.

        The document store has to be `Followed`.
        """
        assert isinstance(self.documents, Followed)
        chunks: dict[tuple[str, str], list[Chunk]] = {}
        versions = ((change.document_id, change.version) for change in changes)
        for chunk in self.documents.chunks_of(versions, collection.cut):
            chunks.setdefault((chunk.document_id, chunk.version), []).append(chunk)
        vectors = self.documents.vectors([chunk.chunk_id for some in chunks.values() for chunk in some])
        for change in changes:
            found = chunks.get((change.document_id, change.version), [])
            whole = [chunk for chunk in found if chunk.chunk_id in vectors]
            yield rows_of(change, cut_of(change, whole, [vectors[chunk.chunk_id] for chunk in whole]))

    def is_unchanged(self, document: Document, principal: Principal, keeps_readers: bool = False) -> Document | None:
        """The current version of this document if it is the very version given, else None.

        Title, metadata and, unless they are to be kept, readers are not part of a version: they are brought up to
        date in place; in the vector store first, so that doing it again mends what a crash left half done.
        """
        current = self.documents.current(document.document_id, principal)
        if current is None or current.version != document.version or self._is_to_be_cut(current):
            return None
        readers = current.readers if keeps_readers else document.readers
        if (current.metadata, current.readers) != (document.metadata, readers):
            changed = replace(current, metadata=document.metadata, readers=readers)
            if readers == current.readers:
                self.documents.annotate(changed)
            else:
                chunk_ids = self.documents.chunk_ids_of(current.document_id, current.version)
                self.write_again(chunk_ids, readers)
                self.documents.annotate(changed)
                if self.generations(current.collection):
                    self.write_again(chunk_ids)  # who fills an index meanwhile, may have read the readers of before
            current = changed
        return current

    def _is_to_be_cut(self, current: Document) -> bool:
        """Whether it has to be read once more: it was not kept what it was cut from, and an index is cut otherwise."""
        own, beside = self.written(current.collection)
        if not any(live.chunking for live in (own, *beside)):
            return False
        return self.documents.kept(current.document_id, current.version) is None

    def fsck(self) -> list[Fault]:
        """Compare the two stores, collection by collection, while others write; an empty list is a clean bill.

        Work under way looks like a fault for a moment. So what looks wrong is looked at twice, and each
        look reads first what is written last.
        """
        first = self._look()
        second = {(fault.kind, fault.collection): fault.ids for fault in self._look()} if first else {}
        lasting = (
            replace(fault, ids=tuple(sorted(set(fault.ids) & set(second.get((fault.kind, fault.collection), ())))))
            for fault in first
        )
        return [fault for fault in lasting if fault.ids]

    def _look(self) -> list[Fault]:
        faults = []
        for collection in self.documents.collections():
            missing, orphans, damaged = set[str](), set[str](), set[str]()
            beside = [one for one in self.generations(collection.name) if one.is_written]
            complete = [one.live for one in beside if one.state != "building"]  # which may lack or leave anything
            for live in (self._own(collection), *complete):
                published = self.documents.chunk_ids(live.index, published=True)
                indexed = self.vectors.chunk_ids(live.index)
                missing |= published - indexed
                orphans |= indexed - self.documents.chunk_ids(live.index, published=False)
                damaged |= set(self.documents.damaged(live.index, live.dimension))
            for kind, ids in ((MISSING, missing), (ORPHANS, orphans), (DAMAGED, damaged)):
                if ids:
                    faults.append(Fault(kind, collection.name, tuple(sorted(ids))))
        return faults

    def repair(self, faults: Sequence[Fault]) -> list[Fault]:
        """Write missing vectors again from the document store, and remove orphans; returns what it cannot mend."""
        for fault in faults:
            if fault.kind == MISSING:
                self.open_collection(fault.collection)  # its index may be gone altogether
                self.write_again(fault.ids)
            elif fault.kind == ORPHANS:
                own, beside = self.written(fault.collection)
                for live in (own, *beside):
                    self.vectors.delete(live.index, fault.ids)
        return [fault for fault in faults if fault.kind not in (MISSING, ORPHANS)]

    def write_again(self, chunk_ids: Sequence[str], readers: frozenset[str] | None = None) -> None:
        """Bring rows of the vector store back from the document store; whole documents, for the terms of neighbours.

        They are for these readers, where given, and else for the documents' own.
        """
        cuts = {(d.document_id, d.version, c.cut): d for c, d in self.documents.load(chunk_ids).values()}
        for (document_id, version, cut), document in cuts.items():
            own, beside = self.written(document.collection)
            live = next((one for one in (own, *beside) if one.cut == cut), None)
            chunks = self.documents.neighbours(document_id, version, 0, LAST_ORDINAL, cut)
            vectors = self.documents.vectors([chunk.chunk_id for chunk in chunks])
            if live is not None and chunks and len(vectors) == len(chunks):
                document = document if readers is None else replace(document, readers=readers)
                made = cut_of(document, chunks, [vectors[chunk.chunk_id] for chunk in chunks])
                self.vectors.open_index(live.index, live.dimension)
                self.vectors.upsert(live.index, rows_of(document, made))


def refusal(what: str) -> Conflict:
    """What is said where nothing here makes the vectors that `what` holds."""
    return Conflict(
        f"{what} was embedded with another model than the one configured now;"
        " configure that model again, or add the documents to a new collection",
        code="embedder_changed",
    )


def live_in(collection: Collection) -> LiveIndex:
    """The index that is live in a collection, as HADES gave it."""
    return LiveIndex(
        collection.index, collection.fingerprint, collection.embedder, collection.dimension, collection.cut,
        collection.chunking,
    )  # fmt: skip


def index_of(collection: str, fingerprint: str, chunking: str = "") -> str:
    """The name of an index in the vector store."""
    return f"{INDEX_PREFIX}{digest('index', collection, fingerprint, *([chunking] if chunking else []))}"


def cut_of(document: Document | Change, chunks: Sequence[Chunk], vectors: Vectors | Sequence[Vector]) -> Cut:
    """A version as an index has it, of all of its chunks, in order, and a vector for each."""
    return Cut(chunks, [embedded_text(document.title, chunk.piece) for chunk in chunks], vectors)


def rows_of(document: Document | Change, cut: Cut) -> list[IndexRow]:
    """What an index keeps of a version."""
    audience = audience_of(document.tenant, document.readers)
    return [
        IndexRow(chunk.chunk_id, chunk.document_id, audience, terms, vector)
        for chunk, terms, vector in zip(cut.chunks, lexical(cut.chunks, cut.texts), cut.vectors, strict=True)
    ]


def in_batches(documents: Iterable[Cuttable], chunks: int) -> Iterator[list[Cuttable]]:
    """In order, each of about so many chunks, or of one document that has more."""
    batch: list[Cuttable] = []
    for document in documents:
        batch.append(document)
        if sum(one.chunks for one in batch) >= chunks:
            yield batch
            batch = []
    if batch:
        yield batch
