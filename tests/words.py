"""A small honest embedder that needs no model, for tests and for the processes that they kill."""

import hashlib
from collections.abc import Sequence

import numpy as np

from nexus.ports import InputType
from nexus.terms import extract_terms
from nexus.types import Vectors


class WordEmbedder:
    """Texts that share stems are near: each stem adds its own fixed random direction."""

    fingerprint = "word-embedder"
    dimension = 64
    max_tokens = 254

    def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        rows = [sum((self._direction(t) for t in extract_terms(text)), self._direction("")) for text in texts]
        vectors = np.array(rows, np.float32).reshape(len(texts), self.dimension)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _direction(self, term: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "big")
        return np.random.default_rng(seed).standard_normal(self.dimension)
