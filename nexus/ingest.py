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
from nexus.errors import ConfigError, Conflict, InvalidRequest, NexusError, UpstreamInvalid
from nexus.failpoints import pass_through
from nexus.hades import Hades, chunks_of, document_id_of, linked, version_of
from nexus.parsing import PARSER, Limits, Parsers
from nexus.ports import Embedder, LiveIndex, Staged
from nexus.registry import find_module
from nexus.types import Chunk, Document, Principal, Receipt, Upload, Vectors, content_digest

MAX_SOURCE_CHARACTERS = 1024
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
    """A document read and cut, with its epoch; what is left is to embed `texts` and to commit."""

    document: Document
    principal: Principal
    epoch: int
    chunks: tuple[Chunk, ...]
    texts: tuple[str, ...]
    replaced: bool


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
        parsed = self.parsers.parse(upload.source, upload.content, upload.media_type)
        pass_through("ingest.after_parse")
        pieces = cut(parsed, self.count_tokens, self.chunking)
        document = replace(document, title=parsed.title, media_type=parsed.media_type, chunks=len(pieces))
        document = replace(document, links=linked(document, parsed.links))
        texts = tuple(embedded_text(parsed.title, piece) for piece in pieces)
        return Prepared(document, principal, epoch, tuple(chunks_of(document, pieces)), texts, current is not None)

    def embed(self, batch: Sequence[Prepared]) -> list[Staged]:
        """The vectors of several documents, asked for at once. Raises UpstreamInvalid when they are not vectors."""
        pass_through("ingest.before_embed")
        found = [self._completed(list(some), {}) for _, some in groupby(batch, lambda one: one.document.collection)]
        pass_through("ingest.after_embed")
        return [staged for some in found for staged in some]

    def _completed(self, batch: Sequence[Prepared], made: Mapping[str, Sequence[Vectors]]) -> list[Staged]:
        """Documents of one collection with their vectors for each of its indexes.

        `made` are vectors that are there already, by the fingerprint of their embedder: for each document its own.
        """
        own, beside = self.hades.written(batch[0].document.collection)
        found = dict(made)
        for live in (own, *beside):
            if live.fingerprint not in found:
                vectors = self.embed_for(live, [text for prepared in batch for text in prepared.texts])
                staged = attach(batch, vectors, live.dimension)
                found[live.fingerprint] = [one.vectors for one in staged]
        return [
            Staged(
                one.document, one.epoch, one.chunks, one.texts, found[own.fingerprint][place], own.fingerprint,
                {live.fingerprint: found[live.fingerprint][place] for live in beside},
            )
            for place, one in enumerate(batch)
        ]  # fmt: skip

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
        """The same with the vectors that an index wants which came, or was exchanged, since they were embedded."""
        own, beside = self.hades.written(batch[0].document.collection)
        wanted = {own.fingerprint, *(live.fingerprint for live in beside)}
        if all({one.fingerprint or own.fingerprint, *one.beside} >= wanted for one in staged):
            return staged
        known = [{one.fingerprint or own.fingerprint: one.vectors, **one.beside} for one in staged]
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


def no_embedder(address: str) -> Embedder:
    """Where no others are lent."""
    raise ConfigError(f"no embedder but the configured one can be opened here, so not {address!r}")


def attach(batch: Sequence[Prepared], vectors: Vectors, dimension: int, fingerprint: str = "") -> list[Staged]:
    """Documents with their vectors, checked: nothing but finite unit vectors, one per text, is ever stored."""
    count = sum(len(prepared.texts) for prepared in batch)
    check_vectors(vectors, count, dimension)
    staged, start = [], 0
    for prepared in batch:
        end = start + len(prepared.texts)
        rows = vectors[start:end]
        staged.append(Staged(prepared.document, prepared.epoch, prepared.chunks, prepared.texts, rows, fingerprint))
        start = end
    return staged


def check_vectors(vectors: Vectors, count: int, dimension: int) -> None:
    """Raises UpstreamInvalid for anything but so many finite unit vectors."""
    if vectors.shape != (count, dimension):
        raise UpstreamInvalid(f"the embedder answered {vectors.shape} where ({count}, {dimension}) was asked for")
    if count and not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2):
        raise UpstreamInvalid("the embedder answered rows that are not unit vectors")


def check_source(source: str, pointer: str = "/filename") -> None:
    """A source is a label, never opened as a path; still it must be one that can be shown."""
    if not source.strip():
        raise InvalidRequest("the file has no name; give one that says where it came from", pointer=pointer)
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise InvalidRequest(f"a file name has at most {MAX_SOURCE_CHARACTERS} characters", pointer=pointer)
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in source):
        raise InvalidRequest("a file name has no control characters", pointer=pointer)


def _receipt(document: Document, outcome: str, replaced: bool) -> Receipt:
    return Receipt(
        document.document_id, document.version, document.chunks, document.opened or 0,
        "unchanged" if outcome == "unchanged" else "done", document.title, replaced,
    )  # fmt: skip
