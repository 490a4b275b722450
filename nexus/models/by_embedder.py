"""Reranking with no model of its own: how near the embedder puts each text to the query."""

from collections.abc import Sequence

import numpy as np

from nexus.errors import ConfigError
from nexus.ports import Embedder
from nexus.registry import Task
from nexus.types import Vector, Vectors

TASKS: tuple[Task, ...] = ("rerank",)
ADDRESS = "by-embedder:"


class ByEmbedder:
    """The cosine of query and text, moved from [-1, 1] to [0, 1]."""

    def __init__(self, embedder: Embedder, name: str) -> None:
        self.name = name
        self._embedder = embedder

    def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        """Shape (len(texts),), float32, each in [0, 1], in the order given."""
        if not texts:
            return np.empty(0, dtype=np.float32)
        return nearness(self._embedder.embed([query], "query"), self._embedder.embed(texts, "passage"))


def open(address: str, *, embedder: Embedder, name: str | None = None) -> ByEmbedder:
    """The reranker at `by-embedder:`, over an embedder that is open already."""
    if address != ADDRESS:
        raise ConfigError(f"{address!r}: nothing follows {ADDRESS}, which is the embedder that is there already")
    return ByEmbedder(embedder, name or "by-embedder")


def nearness(query: Vectors, texts: Vectors) -> Vector:
    """Of a query of shape (1, dimension) to n texts: shape (n,), in [0, 1], rounding errors cut off."""
    cosines: Vector = texts @ query[0]
    return np.clip((cosines + 1) / 2, 0, 1).astype(np.float32)
