"""One document from bytes to published: the same steps for one file or a million."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from nexus.chunking import ChunkSettings, CountTokens, cut, embedded_text
from nexus.errors import InvalidRequest
from nexus.hades import Hades, chunks_of, document_id_of, linked, version_of
from nexus.parsing import PARSER, Parsers
from nexus.types import Document, Principal, Receipt, Upload, Vectors

MAX_SOURCE_CHARACTERS = 1024
FLUSH_AFTER_CHUNKS = 500


@dataclass
class Ingestor:
    """Everything that ingestion needs, and the steps in order. Safe to call from several threads."""

    hades: Hades
    parsers: Parsers
    embed: Callable[[Sequence[str]], Vectors]
    count_tokens: CountTokens
    chunking: ChunkSettings
    fingerprint: str
    _making: dict[str, tuple[threading.Lock, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _unflushed: dict[str, int] = field(default_factory=dict)

    def ingest(self, upload: Upload, principal: Principal) -> Receipt:
        """Bytes in, published document out; unchanged content ends after the hash.

        Raises InvalidRequest, UnsupportedMedia, Unprocessable, Conflict and TryAgain; after any of
        them what was visible before is still visible.
        """
        check_source(upload.source)
        document = self._describe(upload, principal)
        with self._alone(document.document_id):
            if current := self.hades.is_unchanged(document, principal):
                return _receipt(current, "unchanged", replaced=False)
            return self._make(upload, document, principal)

    def _describe(self, upload: Upload, principal: Principal) -> Document:
        return Document(
            document_id=document_id_of(principal.tenant, upload.collection, upload.source),
            version=version_of(upload.content, PARSER, self.chunking.fingerprint, self.fingerprint),
            tenant=principal.tenant,
            collection=upload.collection,
            source=upload.source,
            title="",
            media_type="",
            metadata=dict(upload.metadata),
            readers=upload.readers,
            size=len(upload.content),
            chunks=0,
            created_at=time.time(),
        )

    def _make(self, upload: Upload, document: Document, principal: Principal) -> Receipt:
        replaced = self.hades.documents.current(document.document_id, principal) is not None
        parsed = self.parsers.parse(upload.source, upload.content, upload.media_type)
        pieces = cut(parsed, self.count_tokens, self.chunking)
        document = replace(document, title=parsed.title, media_type=parsed.media_type, chunks=len(pieces))
        document = replace(document, links=linked(document, parsed.links))
        epoch = self.hades.begin(document)
        texts = [embedded_text(parsed.title, piece) for piece in pieces]
        vectors = self.embed(texts)
        self.hades.stage(document, epoch, chunks_of(document, pieces), texts, vectors)
        (published,) = self.hades.publish([(document, epoch)])
        self._note_unflushed(document.collection, len(pieces))
        return _receipt(published, "done", replaced)

    def flush(self) -> None:
        """Make all that was written so far cheap to search. Called after a batch and when idle."""
        with self._lock:
            collections = [name for name, count in self._unflushed.items() if count]
            self._unflushed.clear()
        for name in collections:
            self.hades.vectors.flush(self.hades.find_collection(name).index)

    def _note_unflushed(self, collection: str, chunks: int) -> None:
        with self._lock:
            self._unflushed[collection] = self._unflushed.get(collection, 0) + chunks
            full = self._unflushed[collection] >= FLUSH_AFTER_CHUNKS
        if full:
            self.flush()

    @contextmanager
    def _alone(self, document_id: str) -> Iterator[None]:
        """One maker of a document at a time here: the same file sent twice at once is made once."""
        with self._lock:
            lock, waiting = self._making.get(document_id, (threading.Lock(), 0))
            self._making[document_id] = (lock, waiting + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, waiting = self._making.pop(document_id)
                if waiting > 1:
                    self._making[document_id] = (lock, waiting - 1)


def check_source(source: str) -> None:
    """A source is a label, never opened as a path; still it must be one that can be shown."""
    if not source.strip():
        raise InvalidRequest("the file has no name; give one that says where it came from", pointer="/filename")
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise InvalidRequest(f"a file name has at most {MAX_SOURCE_CHARACTERS} characters", pointer="/filename")
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in source):
        raise InvalidRequest("a file name has no control characters", pointer="/filename")


def _receipt(document: Document, outcome: str, replaced: bool) -> Receipt:
    return Receipt(
        document.document_id, document.version, document.chunks, document.opened or 0,
        "unchanged" if outcome == "unchanged" else "done", document.title, replaced,
    )  # fmt: skip
