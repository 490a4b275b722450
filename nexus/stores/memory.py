"""Vectors and terms in this process: exact cosine and BM25 over everything, for tests and small sets.

BM25 is Robertson and Zaragoza's with Lucene's idf, k1 = 1.2 and b = 0.75, over the rows that a search may find.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nexus.errors import ConfigError, Conflict, NotFound, Unavailable
from nexus.ports import INDEX_PREFIX, IndexRow, Scope, require_dimension
from nexus.types import Vector

K1, B = 1.2, 0.75


def open(address: str, *, home: Path | None = None) -> "MemoryVectors":
    """`memory:` needs nothing and keeps nothing."""
    return MemoryVectors()


class MemoryVectors:
    """A VectorStore that ends with its process."""

    def __init__(self) -> None:
        self._indexes: dict[str, dict[str, tuple[IndexRow, Counter[str]]]] = {}
        self._dimensions: dict[str, int] = {}
        self._aliases: dict[str, str] = {}
        self._lock = threading.RLock()

    def open_index(self, index: str, dimension: int) -> None:
        with self._lock:
            if self._dimensions.setdefault(index, dimension) != dimension:
                raise ConfigError(f"the index {index!r} has {self._dimensions[index]} dimensions, not {dimension}")
            self._indexes.setdefault(index, {})

    def indexes(self) -> set[str]:
        with self._lock:
            return {index for index in self._indexes if index.startswith(INDEX_PREFIX)}

    def drop_index(self, index: str) -> None:
        with self._lock:
            if index in self._aliases.values():
                raise Conflict(f"the index {index!r} is in use: an alias points to it")
            self._indexes.pop(index, None)
            self._dimensions.pop(index, None)

    def point_alias(self, alias: str, index: str) -> None:
        with self._lock:
            if index not in self._indexes:
                raise NotFound(f"there is no index {index!r} to point an alias to")
            self._aliases[alias] = index

    def aliased(self, alias: str) -> str | None:
        with self._lock:
            return self._aliases.get(alias)

    def upsert(self, index: str, rows: Sequence[IndexRow]) -> None:
        with self._lock:
            require_dimension(index, self._dimension(index), [row.vector for row in rows])
            for row in rows:
                self._index(index)[row.chunk_id] = (row, Counter(row.terms.split()))

    def delete(self, index: str, chunk_ids: Sequence[str]) -> None:
        with self._lock:
            for chunk_id in chunk_ids:
                self._index(index).pop(chunk_id, None)

    def flush(self, index: str) -> None:
        """There is nothing to do: every row is as cheap as it will ever be."""

    def search_dense(self, index: str, vector: Vector, limit: int, scope: Scope) -> list[tuple[str, float]]:
        with self._lock:
            require_dimension(index, self._dimension(index), [vector])
            found = [(row.chunk_id, float(np.dot(row.vector, vector))) for row, _ in self._rows(index, scope)]
        return _best(found, limit)

    def search_text(self, index: str, terms: str, limit: int, scope: Scope) -> list[tuple[str, float]]:
        with self._lock:
            rows = list(self._rows(index, scope))
        if not rows:
            return []
        average = sum(sum(counts.values()) for _, counts in rows) / len(rows) or 1.0
        scores: dict[str, float] = {}
        for term in set(terms.split()):
            holders = [(row, counts) for row, counts in rows if term in counts]
            idf = math.log(1 + (len(rows) - len(holders) + 0.5) / (len(holders) + 0.5))
            for row, counts in holders:
                frequency, length = counts[term], sum(counts.values())
                gain = frequency * (K1 + 1) / (frequency + K1 * (1 - B + B * length / average))
                scores[row.chunk_id] = scores.get(row.chunk_id, 0.0) + idf * gain
        return _best(list(scores.items()), limit)

    def count(self, index: str) -> int:
        return len(self.chunk_ids(index))

    def chunk_ids(self, index: str) -> set[str]:
        with self._lock:
            return set(self._indexes.get(self._aliases.get(index, index), {}))

    def check(self) -> None:
        """Memory always answers."""

    def close(self) -> None:
        with self._lock:
            self._indexes.clear()

    def _dimension(self, index: str) -> int | None:
        return self._dimensions.get(self._aliases.get(index, index))

    def _index(self, index: str) -> dict[str, tuple[IndexRow, Counter[str]]]:
        found = self._indexes.get(self._aliases.get(index, index))
        if found is None:
            raise Unavailable(f"there is no index {index!r} any more")
        return found

    def _rows(self, index: str, scope: Scope) -> Iterator[tuple[IndexRow, Counter[str]]]:
        wanted = None if scope.document_ids is None else set(scope.document_ids)
        audiences = {scope.tenant, *scope.audiences}
        rows = self._index(index).values() if wanted != set() else ()
        for row, counts in rows:
            if row.audience in audiences and (wanted is None or row.document_id in wanted):
                yield row, counts


def _best(found: list[tuple[str, float]], limit: int) -> list[tuple[str, float]]:
    return sorted(found, key=lambda item: (-item[1], item[0]))[:limit]
