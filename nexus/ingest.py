"""From bytes to published: the same steps for one file or a million, online, in bulk, or in a test.

Three steps, so that whoever drives them can keep each busy: `prepare` reads and cuts one document,
`embed` turns the texts of several into vectors, `commit` stages and publishes several in one
transaction. Any of them may run twice. `ingest` is all three, for one document.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from nexus.chunking import ChunkSettings, CountTokens, cut, embedded_text
from nexus.config import Config
from nexus.embedders import Embedders, of_config
from nexus.errors import ConfigError, Conflict, NexusError, UpstreamInvalid
from nexus.failpoints import pass_through
from nexus.hades import Hades, chunks_of, document_id_of, linked, version_of
from nexus.kept import pack, unpack
from nexus.parsing import PARSER, Limits, Parsers
from nexus.ports import Cut, Embedder, LiveIndex, Staged
from nexus.registry import find_module
from nexus.tracing import span
from nexus.types import (
    Chunk,
    Document,
    Parsed,
    Piece,
    Principal,
    Receipt,
    Upload,
    Vectors,
    check_source,
    content_digest,
)
from nexus.vocabulary import BYTES, CHUNKS, KIND

FLUSH_AFTER_CHUNKS = 500


@dataclass(frozen=True, slots=True)
class Source:
    """Where some bytes came from, and what they are by name: all that decides whether anything changed."""

    source: str
    digest: str  # types.content_digest of the bytes
    size: int
    collection: str = "default"
    metadata: Mapping[str, object] = field(default_factory=dict)
    readers: frozenset[str] | None = None  # None: as they are


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document read and cut, with its epoch; what is left is to embed `texts` and to commit.

    It is cut for one index, which was its collection's own then; `chunking` and `cut` are that one's (LiveIndex).
    `kept` is what it was cut from.
    """

    document: Document
    principal: Principal
    epoch: int
    chunks: tuple[Chunk, ...]
    texts: tuple[str, ...]
    replaced: bool
    kept: bytes = b""
    chunking: str = ""
    cut: str = ""


@dataclass
class Ingestor:
    """Everything that ingestion needs, and its steps. Safe to call from several threads."""

    hades: Hades
    parsers: Parsers
    embedder: Callable[[Sequence[str]], Vectors]
    count_tokens: CountTokens
    chunking: ChunkSettings
    others: Embedders = field(
        default_factory=lambda: Embedders(no_embedder)
    )  # of indexes that are not the configured's
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _unflushed: dict[str, int] = field(default_factory=dict)

    def ingest(self, upload: Upload, principal: Principal) -> Receipt:
        """Bytes in, published document out; unchanged content ends after the hash.

        Raises InvalidRequest, UnsupportedMedia, Unprocessable, Conflict and TryAgain; after any of
        them what was visible before is still visible.
        """
        prepared = self.prepare(upload, principal)
        if isinstance(prepared, Receipt):
            return prepared
        (outcome,) = self.commit([prepared], self.embed([prepared]))
        if isinstance(outcome, NexusError):
            raise outcome
        return outcome

    # ── the steps ───────────────────────────────────────────────────────────────────────────────

    def find_unchanged(self, source: Source, principal: Principal) -> Receipt | None:
        """The receipt of the current version if it was made of these very bytes; metadata is brought up to date."""
        check_source(source.source)
        current = self.hades.is_unchanged(self._describe(source, principal), principal, source.readers is None)
        return _receipt(current, "unchanged", False) if current is not None else None

    def prepare(self, upload: Upload, principal: Principal, accepted_at: int | None = None) -> Prepared | Receipt:
        """Read and cut one document, or say that it is unchanged.

        `accepted_at` is the sequence that the collection was at when the bytes were accepted: a
        document that was deleted since then is Fenced, and stays deleted.
        """
        source = Source(
            upload.source, content_digest(upload.content), len(upload.content), upload.collection, upload.metadata,
            upload.readers,
        )  # fmt: skip
        if unchanged := self.find_unchanged(source, principal):
            return unchanged
        document = self._describe(source, principal)
        epoch = self.hades.begin(document, accepted_at, principal)
        current = self.hades.documents.current(document.document_id, principal)
        if current is not None and upload.readers is None:
            document = replace(document, readers=current.readers)
        pass_through("ingest.before_parse")
        with span("read", {KIND: "CHAIN", BYTES: len(upload.content)}):
            parsed = self.parsers.parse(upload.source, upload.content, upload.media_type)
        pass_through("ingest.after_parse")
        own, _ = self.hades.written(document.collection)
        with span("chunk", {KIND: "CHAIN"}) as told:
            pieces = self.cut_for(own, parsed)
            told.set_attribute(CHUNKS, len(pieces))
        document = replace(document, title=parsed.title, media_type=parsed.media_type, chunks=len(pieces))
        document = replace(document, links=linked(document, parsed.links))
        texts = tuple(embedded_text(parsed.title, piece) for piece in pieces)
        chunks = tuple(chunks_of(document, pieces, own.cut))
        replaced = current is not None
        return Prepared(document, principal, epoch, chunks, texts, replaced, pack(parsed), own.chunking, own.cut)

    def cut_for(self, live: LiveIndex, parsed: Parsed) -> list[Piece]:
        """A document's pieces as an index has them."""
        if not live.chunking:
            return cut(parsed, self.count_tokens, self.chunking)
        is_configured = live.fingerprint == self.hades.fingerprint
        count_tokens = self.count_tokens if is_configured else self.others.tokenizer_of(live)
        return cut(parsed, count_tokens, ChunkSettings.read(live.chunking))

    def embed(self, batch: Sequence[Prepared]) -> list[Staged]:
        """The vectors of several documents, asked for at once. Raises UpstreamInvalid when they are not vectors."""
        pass_through("ingest.before_embed")
        found = [self._completed(list(some), {}) for _, some in groupby(batch, lambda one: one.document.collection)]
        pass_through("ingest.after_embed")
        return [staged for some in found for staged in some]

    def _completed(self, batch: Sequence[Prepared], made: Mapping[str, Sequence[Cut]]) -> list[Staged]:
        """Documents of one collection as each of its indexes has them.

        `made` is what is there already, by the names of indexes: for each document its own.
        """
        own, beside = self.hades.written(batch[0].document.collection)
        found = dict(made)
        for live in (own, *beside):
            if live.index not in found:
                cut_so = [self._cut_so(one, live) for one in batch]
                vectors = self.embed_for(live, [text for one in cut_so for text in one.texts])
                found[live.index] = [one.own for one in attach(cut_so, vectors, live.dimension)]
        return [
            Staged(
                replace(one.document, chunks=len(mine.chunks)), one.epoch, mine.chunks, mine.texts, mine.vectors,
                own.index, {live.index: found[live.index][place] for live in beside}, one.kept,
            )
            for place, (one, mine) in enumerate(zip(batch, found[own.index], strict=True))
        ]  # fmt: skip

    def _cut_so(self, one: Prepared, live: LiveIndex) -> Prepared:
        """The same, as this index has it."""
        if one.cut == live.cut:
            return one
        parsed = unpack(one.kept) if one.chunking != live.chunking else None
        pieces = [chunk.piece for chunk in one.chunks] if parsed is None else self.cut_for(live, parsed)
        texts = tuple(embedded_text(one.document.title, piece) for piece in pieces)
        return replace(one, chunks=tuple(chunks_of(one.document, pieces, live.cut)), texts=texts)

    def embed_for(self, live: LiveIndex, texts: Sequence[str]) -> Vectors:
        """Passages, by the embedder of an index. Raises Conflict where nobody knows which that is, UpstreamInvalid."""
        if live.fingerprint == self.hades.fingerprint:
            return self.embedder(texts)
        embedder = self.others.of(live)
        try:
            return embedder.embed(texts)
        except (RuntimeError, OSError, ValueError) as error:  # it runs in this process, which must not end of it
            raise UpstreamInvalid(f"the embedder of an index failed ({type(error).__name__})") from error

    def _with_all(self, batch: Sequence[Prepared], staged: Sequence[Staged]) -> Sequence[Staged]:
        """The same with what an index wants which came, or was exchanged, since they were embedded."""
        own, beside = self.hades.written(batch[0].document.collection)
        wanted = {own.index, *(live.index for live in beside)}
        known = [{one.index or own.index: one.own, **one.beside} for one in staged]
        if all(each.keys() >= wanted and one.index in ("", own.index) for each, one in zip(known, staged, strict=True)):
            return staged
        shared = set.intersection(*(set(each) for each in known))
        return self._completed(batch, {name: [each[name] for each in known] for name in shared})

    def commit(self, batch: Sequence[Prepared], staged: Sequence[Staged]) -> list[Receipt | NexusError]:
        """Stage and publish documents of one collection in one transaction; one that cannot be fails alone.

        Raises TryAgain when a store is away; then none is published, and all of it may be done again.
        """
        try:
            staged = self._with_all(batch, staged)
            self.hades.stage(staged)
            published = self.hades.publish([(one.document, one.epoch) for one in staged])
        except Conflict as error:
            if len(batch) > 1:
                alone = zip(batch, staged, strict=True)
                return [outcome for one, made in alone for outcome in self.commit([one], [made])]
            # Whoever took over may have published the very same version; then all is well.
            current = self.hades.is_unchanged(batch[0].document, batch[0].principal)
            return [error if current is None else _receipt(current, "unchanged", False)]
        self._note_unflushed(staged)
        return [_receipt(document, "done", one.replaced) for document, one in zip(published, batch, strict=True)]

    def flush(self) -> None:
        """Make all that was written so far cheap to search. Called when idle and at the end of a batch."""
        with self._lock:
            collections = [name for name, count in self._unflushed.items() if count]
            self._unflushed.clear()
        for name in collections:
            self.hades.open_collection(name)
            own, beside = self.hades.written(name)
            for live in (own, *beside):
                self.hades.vectors.flush(live.index)

    def _note_unflushed(self, batch: Sequence[Staged]) -> None:
        collection = batch[0].document.collection
        with self._lock:
            count = self._unflushed.get(collection, 0) + sum(len(staged.chunks) for staged in batch)
            self._unflushed[collection] = count
        if count >= FLUSH_AFTER_CHUNKS:
            self.flush()

    def _describe(self, source: Source, principal: Principal) -> Document:
        return Document(
            document_id=document_id_of(principal.tenant, source.collection, source.source),
            version=version_of(
                source.digest, PARSER, self.chunking.fingerprint, self.hades.identity_of(source.collection)
            ),
            tenant=principal.tenant,
            collection=source.collection,
            source=source.source,
            title="",
            media_type="",
            metadata=dict(source.metadata),
            readers=source.readers or frozenset(),
            size=source.size,
            chunks=0,
            created_at=time.time(),
        )


def open_steps(config: Config, hades: Hades, embedder: Callable[[Sequence[str]], Vectors]) -> Ingestor:
    """The steps as a configuration wants them, over a Hades and whatever makes vectors."""
    limits = config.parsing
    return Ingestor(
        hades=hades,
        parsers=Parsers(Limits(limits.memory_bytes, limits.cpu_seconds, limits.wall_seconds)),
        embedder=embedder,
        count_tokens=find_module("models", config.models.embedder).open_tokenizer(config.models.embedder),
        chunking=ChunkSettings(config.chunking.target_tokens, config.chunking.max_tokens),
        others=of_config(config, config.models.embedder_threads or os.cpu_count() or 1),
    )


def no_embedder(address: str, fingerprint: str | None = None) -> Embedder:
    """Where no others are lent."""
    raise ConfigError(f"no embedder but the configured one can be opened here, so not {address!r}")


def attach(batch: Sequence[Prepared], vectors: Vectors, dimension: int, index: str = "") -> list[Staged]:
    """Documents with their vectors for an index, checked: nothing but finite unit vectors, one per text, is stored."""
    count = sum(len(prepared.texts) for prepared in batch)
    check_vectors(vectors, count, dimension)
    staged, start = [], 0
    for prepared in batch:
        end = start + len(prepared.texts)
        rows = vectors[start:end]
        document, kept = prepared.document, prepared.kept
        staged.append(Staged(document, prepared.epoch, prepared.chunks, prepared.texts, rows, index, kept=kept))
        start = end
    return staged


def check_vectors(vectors: Vectors, count: int, dimension: int) -> None:
    """Raises UpstreamInvalid for anything but so many finite unit vectors."""
    if vectors.shape != (count, dimension):
        raise UpstreamInvalid(f"the embedder answered {vectors.shape} where ({count}, {dimension}) was asked for")
    if count and not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2):
        raise UpstreamInvalid("the embedder answered rows that are not unit vectors")


def _receipt(document: Document, outcome: str, replaced: bool) -> Receipt:
    return Receipt(
        document.document_id, document.version, document.chunks, document.opened or 0,
        "unchanged" if outcome == "unchanged" else "done", document.title, replaced,
    )  # fmt: skip
