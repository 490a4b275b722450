"""Chunks as rows of a Milvus collection: exact or HNSW cosine over vectors, BM25 over stemmed terms.

A server and Milvus Lite differ where it hurts, and the differences end here:
- Lite gives BM25 scores as negative distances; `search_text` always gives positive scores.
- Lite has no filter templates; values become literals through `literal`, and nowhere else.
- Lite searches rows that were not flushed by brute force; `flush` is the caller's to call in batches.
- Lite keeps BM25 statistics per segment, so a score is comparable only within one query.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pymilvus import DataType, Function, FunctionType, MilvusClient
from pymilvus.exceptions import MilvusException

from nexus.errors import ConfigError, Unavailable
from nexus.ports import IndexRow, Scope
from nexus.types import Vector
from nexus.versions import MILVUS_FLOORS, is_safe_milvus

log = logging.getLogger("nexus.milvus")

TIMEOUT_SECONDS = 10.0
MAX_TERMS_CHARACTERS = 65_535  # of a VARCHAR in Milvus
ROWS_PER_CALL = 500
LITE_ROWS_PER_CALL = 25  # a row keeps a Lite server from its searches for half a millisecond


def open(address: str, *, home: Path | None = None) -> "MilvusVectors":
    """`milvus://host:19530`, with `user:password@` before the host where the server asks for it."""
    parts = urlsplit(address)
    if not parts.hostname:
        raise ConfigError(f"{address!r}: give the server as milvus://HOST:PORT")
    token = f"{parts.username}:{parts.password}" if parts.username else ""
    return MilvusVectors(f"http://{parts.hostname}:{parts.port or 19530}", token=token, lite=False)


def literal(value: str | Sequence[str]) -> str:
    """A string, or a list of strings, as a literal of Milvus' filter language.

    The language reads double-quoted strings with backslash escapes, as JSON writes them.
    """
    return json.dumps(value if isinstance(value, str) else list(value), ensure_ascii=False)


def _check_version(version: str) -> None:
    """Raises ConfigError for a server with a known hole."""
    if not is_safe_milvus(version):
        raise ConfigError(
            f"the Milvus server is {version}, which has known holes: it needs {' or '.join(MILVUS_FLOORS)}"
        )


class MilvusVectors:
    """A VectorStore over a Milvus server or a Milvus Lite server."""

    def __init__(self, uri: str, *, token: str = "", lite: bool, on_close: Callable[[], None] | None = None) -> None:
        self._uri, self._token, self._lite, self._on_close = uri, token, lite, on_close
        self._known: set[str] = set()
        self._client: MilvusClient | None = None
        self._lock = threading.Lock()
        self._creating = threading.Lock()

    @contextmanager
    def _calling(self) -> Iterator[MilvusClient]:
        """The client, connected on first use; whatever it raises says that the store is away."""
        try:
            with self._lock:
                if self._client is None:
                    client = MilvusClient(uri=self._uri, token=self._token, timeout=TIMEOUT_SECONDS)
                    if not self._lite:
                        _check_version(str(client.get_server_version(timeout=TIMEOUT_SECONDS)))
                    self._client = client
            yield self._client
        except MilvusException as error:
            log.warning("the vector store failed: %s", error)
            raise Unavailable("the vector store does not answer; try again in a moment") from error

    def open_index(self, index: str, dimension: int) -> None:
        if index in self._known:
            return
        with self._creating, self._calling() as client:
            if not client.has_collection(index, timeout=TIMEOUT_SECONDS):
                try:
                    self._create(client, index, dimension)
                except MilvusException:
                    if not client.has_collection(index, timeout=TIMEOUT_SECONDS):  # else another process was first
                        raise
        self._known.add(index)

    def _create(self, client: MilvusClient, index: str, dimension: int) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("chunk_id", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("document_id", DataType.VARCHAR, max_length=64)
        schema.add_field("tenant", DataType.VARCHAR, max_length=128)
        schema.add_field("terms", DataType.VARCHAR, max_length=MAX_TERMS_CHARACTERS, enable_analyzer=True)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dimension)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(
            Function(
                name="bm25", function_type=FunctionType.BM25, input_field_names=["terms"],
                output_field_names=["sparse"],
            )
        )  # fmt: skip
        indexes = client.prepare_index_params()
        # Lite walks every row for each query whatever the index, so there an exact one costs nothing.
        kind, params = ("FLAT", {}) if self._lite else ("HNSW", {"M": 16, "efConstruction": 200})
        indexes.add_index("dense", index_type=kind, metric_type="COSINE", params=params)
        indexes.add_index(
            "sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params={"bm25_k1": 1.2, "bm25_b": 0.75}
        )
        client.create_collection(index, schema=schema, index_params=indexes, consistency_level="Strong")

    def upsert(self, index: str, rows: Sequence[IndexRow]) -> None:
        with self._calling() as client:
            most = LITE_ROWS_PER_CALL if self._lite else ROWS_PER_CALL
            for start in range(0, len(rows), most):
                batch = [_row(row) for row in rows[start : start + most]]
                client.upsert(index, batch, timeout=TIMEOUT_SECONDS)

    def delete(self, index: str, chunk_ids: Sequence[str]) -> None:
        with self._calling() as client:
            for start in range(0, len(chunk_ids), ROWS_PER_CALL):
                ids = list(chunk_ids[start : start + ROWS_PER_CALL])
                client.delete(index, ids=ids, timeout=TIMEOUT_SECONDS)

    def flush(self, index: str) -> None:
        with self._calling() as client:
            client.flush(index, timeout=60.0)

    def search_dense(self, index: str, vector: Vector, limit: int, scope: Scope) -> list[tuple[str, float]]:
        return self._search(index, "dense", np.asarray(vector, np.float32), limit, scope)

    def search_text(self, index: str, terms: str, limit: int, scope: Scope) -> list[tuple[str, float]]:
        if not terms.strip():
            return []
        found = self._search(index, "sparse", terms[:MAX_TERMS_CHARACTERS], limit, scope)
        return [(chunk_id, abs(score)) for chunk_id, score in found]

    def _search(self, index: str, field: str, query: object, limit: int, scope: Scope) -> list[tuple[str, float]]:
        metric, params = ("BM25", {}) if field == "sparse" else ("COSINE", {"ef": max(128, 2 * limit)})
        with self._calling() as client:
            (hits,) = client.search(
                index, data=[query], anns_field=field, limit=limit, output_fields=["chunk_id"],
                search_params={"metric_type": metric, "params": params}, timeout=TIMEOUT_SECONDS,
                **self._restrict(scope),
            )  # fmt: skip
        return [(hit["chunk_id"], float(hit["distance"])) for hit in hits]

    def _restrict(self, scope: Scope) -> dict[str, Any]:
        """The audience's clause always; a server takes the values apart from the words, Lite as literals."""
        values = {"audiences": [scope.tenant, *scope.audiences]}
        expression = "tenant in {audiences}"
        if scope.document_ids is not None:
            values["ids"] = list(scope.document_ids)
            expression += " and document_id in {ids}"
        if self._lite:
            return {"filter": expression.format(**{name: literal(value) for name, value in values.items()})}
        return {"filter": expression, "filter_params": values}

    def chunk_ids(self, index: str) -> set[str]:
        found: set[str] = set()
        with self._calling() as client:
            if not client.has_collection(index, timeout=TIMEOUT_SECONDS):
                return found
            everything: dict[str, Any] = {"filter": 'chunk_id != ""', "output_fields": ["chunk_id"]}
            if self._lite:  # it has no iterators, and no limit that would make one needed
                return {row["chunk_id"] for row in client.query(index, **everything)}
            pages = client.query_iterator(index, batch_size=5000, **everything)
            while page := pages.next():
                found.update(row["chunk_id"] for row in page)
            pages.close()
        return found

    def check(self) -> None:
        with self._calling() as client:
            client.list_collections(timeout=2.0)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._on_close is not None:
            self._on_close()


def _row(row: IndexRow) -> dict[str, object]:
    terms = row.terms
    if len(terms.encode()) > MAX_TERMS_CHARACTERS:
        terms = terms.encode()[:MAX_TERMS_CHARACTERS].decode(errors="ignore")
    return {
        "chunk_id": row.chunk_id, "document_id": row.document_id, "tenant": row.audience,
        "terms": terms, "dense": np.asarray(row.vector, np.float32),
    }  # fmt: skip
