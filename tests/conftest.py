"""What the tests share: a small honest embedder, and a whole Nexus in one process."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nexus.hades import Hades, chunks_of, document_id_of, version_of
from nexus.ports import DocumentStore, VectorStore
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.stores import memory, sqlite
from nexus.terms import extract_terms
from nexus.types import Document, Piece, Principal, Vectors

ALICE = Principal("acme", "alice", frozenset({"documents:read", "documents:write"}))
BOB = Principal("acme", "bob", frozenset({"documents:read"}))
MALLORY = Principal("other", "mallory", frozenset({"documents:read", "documents:write"}))
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


class WordEmbedder:
    """Texts that share stems are near: each stem adds its own fixed random direction."""

    fingerprint = "word-embedder"
    dimension = 64
    max_tokens = 254

    def embed(self, texts: Sequence[str]) -> Vectors:
        rows = [sum((self._direction(t) for t in extract_terms(text)), self._direction("")) for text in texts]
        vectors = np.array(rows, np.float32).reshape(len(texts), self.dimension)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _direction(self, term: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "big")
        return np.random.default_rng(seed).standard_normal(self.dimension)


@dataclass
class House:
    """HADES over two stores, and the shortest way to put a document into it."""

    hades: Hades
    retriever: Retriever
    embedder: WordEmbedder

    def describe(self, source: str, texts: Sequence[str], who: Principal = ALICE, **fields: object) -> Document:
        collection = str(fields.pop("collection", "default"))
        content = "\n".join(texts).encode()
        return Document(
            document_id_of(who.tenant, collection, source), version_of(content, "p", "c", "e"), who.tenant, collection,
            source, source, "text/plain", fields.pop("metadata", {}), fields.pop("readers", frozenset()),
            len(content), len(texts),
        )  # fmt: skip

    def stage(self, document: Document, texts: Sequence[str]) -> int:
        epoch = self.hades.begin(document)
        chunks = chunks_of(document, [Piece(text, tokens=len(text.split())) for text in texts])
        self.hades.stage(document, epoch, chunks, texts, self.embedder.embed(texts))
        return epoch

    def put(self, source: str, *texts: str, who: Principal = ALICE, **fields: object) -> Document:
        document = self.describe(source, texts, who, **fields)
        (published,) = self.hades.publish([(document, self.stage(document, texts))])
        return published


def build_house(documents: DocumentStore, vectors: VectorStore) -> House:
    embedder = WordEmbedder()
    hades = Hades(documents, vectors, embedder.fingerprint, embedder.dimension)
    return House(hades, Retriever(hades, embedder, RetrievalSettings()), embedder)


@pytest.fixture
def house() -> Iterator[House]:
    documents = sqlite.open("sqlite::memory:")
    house = build_house(documents, memory.open("memory:"))
    yield house
    house.retriever.close()
    documents.close()
