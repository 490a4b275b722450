"""Chunks as rows of a Milvus collection: exact or HNSW cosine over vectors, BM25 over stemmed terms.

A server and Milvus Lite differ where it hurts, and the differences end here:
- Lite gives BM25 scores as negative distances; `search_text` always gives positive scores.
- Lite has no filter templates; values become literals through `literal`, and nowhere else.
- Lite searches rows that were not flushed by brute force; `flush` is the caller's to call in batches. A server seals
  and indexes by itself, and refuses to be asked more often than every ten seconds, so there it does nothing.
- Lite keeps BM25 statistics per segment, so a score is comparable only within one query.
- A server lays the rows of a tenant into one partition (`tenant` is the partition key, `audience` says for whom a row
  is), and a search looks into that one. Lite would write a file per partition; there `tenant` holds the audience.
- A server's searchers lag behind its writers. What is searched for waits as `consistency` says: `strong` (default) for
  all that anybody had written, `session` for what this process had written, `bounded` for nothing, up to some
  seconds back. Nexus writes in one process and searches in others, so only `strong` finds for the caller of
  `publish` what was just published. With the others it is found late, and nothing is found that should not be:
  HADES is asked about every row. Counts and `fsck` are always strong.

A call that the server does not take is tried again with growing pauses until its deadline: every one of them may be
done twice. Once a call has given up, those after it try once and fail fast, until one gets through.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

import grpc
import numpy as np
from pymilvus import DataType, Function, FunctionType, MilvusClient
from pymilvus.client.types import Status
from pymilvus.exceptions import DataNotMatchException, MilvusException, ParamError, SchemaMismatchRetryableException

from nexus.errors import ConfigError, Conflict, NexusError, NotFound, Overloaded, Unavailable, UpstreamInvalid
from nexus.ports import INDEX_PREFIX, IndexRow, Scope, require_dimension
from nexus.types import Vector
from nexus.versions import MILVUS_FLOORS, is_safe_milvus

log = logging.getLogger("nexus.milvus")
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it prints a traceback for every ordinary miss

Consistency = Literal["strong", "session", "bounded"]
Answer = TypeVar("Answer")

DEADLINE_SECONDS = 10.0  # of a call with all its tries
CHECK_SECONDS = 2.0
ROWS_PER_PAGE = 5_000  # of those that go through all rows
WHOLE_INDEX_SECONDS = 60.0  # of a call that goes through all rows
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 2.0
MAX_TERMS_CHARACTERS = 65_535  # of a VARCHAR in Milvus
ROWS_PER_CALL = 500
BYTES_PER_CALL = 8 * 2**20  # a server takes messages of 64 MiB
LITE_ROWS_PER_CALL = 25  # a row keeps a Lite server from its searches for half a millisecond
PARTITIONS = 16  # of a collection on a server, for all tenants

# gRPC by itself lets up to two minutes pass between its tries to connect, and shares them among its channels.
RECONNECTING = {"grpc.max_reconnect_backoff_ms": 1000, "grpc.use_local_subchannel_pool": 1}

# What Milvus answers with (its pkg/util/merr); Lite says COLLECTION_NOT_FOUND of an alias, too.
RATE_LIMIT, COLLECTION_NOT_FOUND, INVALID, ALIAS_NOT_FOUND, LITE_INVALID = 8, 100, 1100, 1600, 6


@dataclass(frozen=True, slots=True)
class Target:
    """Where a Milvus is and how it is spoken to. `ca_file` is a PEM file of whom to trust besides the system's."""

    uri: str
    lite: bool
    token: str = field(default="", repr=False)
    database: str = ""
    ca_file: str = ""
    server_name: str = ""
    consistency: Consistency = "strong"


def open(address: str, *, home: Path | None = None) -> "MilvusVectors":
    """`milvus://[user:password@|token@]host[:port][/database][?tls=true&ca=FILE&server_name=NAME&consistency=strong]`.

    Reserved characters of a password are written as in any URL (`%40` for `@`). Raises ConfigError for a bad address.
    """
    return MilvusVectors(target_of(address))


def check(address: str) -> None:
    """Raises ConfigError for an address that could not be opened."""
    target_of(address)


def target_of(address: str) -> Target:
    """What an address says. Raises ConfigError, without what it may hold of a password."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or 19530
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        host = None
    if not host:
        raise ConfigError("stores.vectors: give the server as milvus://HOST:PORT")
    if unknown := set(options) - {"tls", "ca", "server_name", "consistency"}:
        raise ConfigError(f"stores.vectors: milvus:// has no option {sorted(unknown)[0]!r}")
    tls, consistency = options.get("tls", "false"), options.get("consistency", "strong")
    if tls not in ("true", "false"):
        raise ConfigError("stores.vectors: tls is true or false")
    if consistency not in get_args(Consistency):
        raise ConfigError(f"stores.vectors: consistency is one of {', '.join(get_args(Consistency))}")
    if tls == "false" and ("ca" in options or "server_name" in options):
        raise ConfigError("stores.vectors: ca and server_name mean something only with tls=true")
    if "ca" in options and not Path(options["ca"]).is_file():
        raise ConfigError("stores.vectors: the file that ca names is not there")
    who = [unquote(part) for part in (parts.username, parts.password) if part]
    if who and tls == "false" and host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("the password of the vector store travels unencrypted; say tls=true in stores.vectors if it can")
    shown = f"[{host}]" if ":" in host else host
    return Target(
        f"{'https' if tls == 'true' else 'http'}://{shown}:{port}", False, ":".join(who), parts.path.strip("/"),
        options.get("ca", ""), options.get("server_name", ""), consistency,  # type: ignore[arg-type]
    )  # fmt: skip


def literal(value: str | Sequence[str]) -> str:
    """A string, or a list of strings, as a literal of Milvus' filter language.

    The language reads double-quoted strings with backslash escapes, as JSON writes them.
    """
    return json.dumps(value if isinstance(value, str) else list(value), ensure_ascii=False)


class MilvusVectors:
    """A VectorStore over a Milvus server or a Milvus Lite server."""

    def __init__(
        self, target: Target, *, deadline_seconds: float = DEADLINE_SECONDS, on_close: Callable[[], None] | None = None
    ) -> None:
        self.target, self._lite, self._on_close = target, target.lite, on_close
        self._deadline_seconds = deadline_seconds
        self._known: dict[str, int] = {}  # dimensions of the indexes that were opened
        self._client: MilvusClient | None = None
        self._is_away = False
        self._lock = threading.Lock()
        self._creating = threading.Lock()

    # ── speaking to it ──────────────────────────────────────────────────────────────────────────

    def _call(self, ask: Callable[[MilvusClient, float], Answer], within: float | None = None) -> Answer:
        """What `ask` returns, given the client and the seconds that are left; tried again as said at the top.

        Raises Unavailable, Overloaded, ConfigError or UpstreamInvalid for whatever goes wrong.
        """
        deadline, pause = time.monotonic() + (within or self._deadline_seconds), FIRST_PAUSE_SECONDS
        while True:
            seconds = max(deadline - time.monotonic(), 0.1)
            try:
                answer = ask(self._connected(seconds), seconds)
            except (MilvusException, grpc.RpcError) as error:
                is_passing, failure = _failure_of(error)
                if not is_passing or self._is_away or time.monotonic() + pause > deadline:
                    self._is_away = is_passing
                    self._known.clear()  # whatever there was may have been dropped meanwhile
                    log.warning("the vector store failed: %s", error)
                    raise failure from error
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self._is_away = False
                return answer

    def _connected(self, seconds: float) -> MilvusClient:
        if not self._lock.acquire(timeout=seconds):
            raise Unavailable("the vector store does not answer; try again in a moment")
        try:
            if self._client is None:
                target = self.target
                encrypted = {"server_pem_path": target.ca_file, "server_name": target.server_name}
                client = MilvusClient(
                    uri=target.uri, token=target.token, db_name=target.database, timeout=seconds, dedicated=True,
                    grpc_options=RECONNECTING, **{name: value for name, value in encrypted.items() if value},
                )  # fmt: skip
                if not self._lite:
                    _check_version(str(client.get_server_version(timeout=seconds)))
                self._client = client
            return self._client
        finally:
            self._lock.release()

    def check(self) -> None:
        self._call(lambda client, seconds: client.list_collections(timeout=seconds), CHECK_SECONDS)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._on_close is not None:
            self._on_close()

    # ── indexes and their aliases ───────────────────────────────────────────────────────────────

    def open_index(self, index: str, dimension: int) -> None:
        if self._known.get(index) == dimension:
            return
        with self._creating:
            self._call(lambda client, seconds: self._open(client, seconds, index, dimension))
        self._known[index] = dimension

    def _open(self, client: MilvusClient, seconds: float, index: str, dimension: int) -> None:
        """Make what is missing of an index: another process, or a crash, may have left it half made."""
        wanted = self._schema(dimension)
        if not client.has_collection(index, timeout=seconds):
            try:
                more = {} if self._lite else {"num_partitions": PARTITIONS}
                client.create_collection(index, schema=wanted, consistency_level="Strong", timeout=seconds, **more)
            except MilvusException:
                if not client.has_collection(index, timeout=seconds):  # else another process was first
                    raise
        _require_schema(index, client.describe_collection(index, timeout=seconds), wanted)
        for params in self._index_params(client):
            if not client.list_indexes(index, field_name=params[0].field_name, timeout=seconds):
                client.create_index(index, params, timeout=seconds, sync=False)  # of no rows: nothing to wait for
        client.load_collection(index, timeout=seconds)

    def _schema(self, dimension: int) -> Any:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("chunk_id", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("document_id", DataType.VARCHAR, max_length=64)
        if self._lite:
            schema.add_field("tenant", DataType.VARCHAR, max_length=128)
        else:
            schema.add_field("tenant", DataType.VARCHAR, max_length=128, is_partition_key=True)
            schema.add_field("audience", DataType.VARCHAR, max_length=128)
        schema.add_field("terms", DataType.VARCHAR, max_length=MAX_TERMS_CHARACTERS, enable_analyzer=True)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dimension)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(
            Function(
                name="bm25", function_type=FunctionType.BM25, input_field_names=["terms"],
                output_field_names=["sparse"],
            )
        )  # fmt: skip
        return schema

    def _index_params(self, client: MilvusClient) -> list[Any]:
        dense, sparse = client.prepare_index_params(), client.prepare_index_params()
        # Lite walks every row for each query whatever the index, so there an exact one costs nothing.
        kind, params = ("FLAT", {}) if self._lite else ("HNSW", {"M": 16, "efConstruction": 200})
        dense.add_index("dense", index_type=kind, metric_type="COSINE", params=params)
        sparse.add_index(
            "sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params={"bm25_k1": 1.2, "bm25_b": 0.75}
        )
        return [dense, sparse]

    def indexes(self) -> set[str]:
        names = self._call(lambda client, seconds: client.list_collections(timeout=seconds))
        return {name for name in names if name.startswith(INDEX_PREFIX)}

    def drop_index(self, index: str) -> None:
        def drop(client: MilvusClient, seconds: float) -> None:
            if client.has_collection(index, timeout=seconds):
                if client.list_aliases(index, timeout=seconds)["aliases"]:
                    raise Conflict(f"the index {index!r} is in use: an alias points to it")
                client.drop_collection(index, timeout=seconds)

        self._call(drop)
        self._known.pop(index, None)

    def point_alias(self, alias: str, index: str) -> None:
        def point(client: MilvusClient, seconds: float) -> None:
            if not client.has_collection(index, timeout=seconds):
                raise NotFound(f"there is no index {index!r} to point an alias to")
            now = _aliased(client, seconds, alias)
            if now is None:
                try:
                    client.create_alias(index, alias, timeout=seconds)
                except MilvusException:
                    if _aliased(client, seconds, alias) is None:  # else another process was first
                        raise
                    client.alter_alias(index, alias, timeout=seconds)
            elif now != index:
                client.alter_alias(index, alias, timeout=seconds)

        self._call(point)

    def aliased(self, alias: str) -> str | None:
        return self._call(lambda client, seconds: _aliased(client, seconds, alias))

    # ── rows ────────────────────────────────────────────────────────────────────────────────────

    def upsert(self, index: str, rows: Sequence[IndexRow]) -> None:
        require_dimension(index, self._known.get(index), [row.vector for row in rows])
        for batch in _batches([self._row(row) for row in rows], LITE_ROWS_PER_CALL if self._lite else ROWS_PER_CALL):
            self._call(partial(_write, index, batch))

    def _row(self, row: IndexRow) -> dict[str, Any]:
        terms = row.terms
        if len(terms.encode()) > MAX_TERMS_CHARACTERS:
            terms = terms.encode()[:MAX_TERMS_CHARACTERS].decode(errors="ignore")
        whom = {"tenant": row.audience}
        if not self._lite:
            whom = {"tenant": row.audience.partition(":")[0], "audience": row.audience}
        return {
            "chunk_id": row.chunk_id, "document_id": row.document_id, **whom,
            "terms": terms, "dense": np.asarray(row.vector, np.float32),
        }  # fmt: skip

    def delete(self, index: str, chunk_ids: Sequence[str]) -> None:
        for start in range(0, len(chunk_ids), ROWS_PER_CALL):
            ids = list(chunk_ids[start : start + ROWS_PER_CALL])
            which = {"ids": ids} if self._lite else {"filter": "chunk_id in {ids}", "filter_params": {"ids": ids}}
            self._call(partial(_remove, index, which))

    def flush(self, index: str) -> None:
        if self._lite:
            self._call(lambda client, _: client.flush(index, timeout=WHOLE_INDEX_SECONDS))

    # ── searching ───────────────────────────────────────────────────────────────────────────────

    def search_dense(self, index: str, vector: Vector, limit: int, scope: Scope) -> list[tuple[str, float]]:
        require_dimension(index, self._known.get(index), [vector])
        return self._search(index, "dense", np.asarray(vector, np.float32), limit, scope)

    def search_text(self, index: str, terms: str, limit: int, scope: Scope) -> list[tuple[str, float]]:
        if not terms.strip():
            return []
        found = self._search(index, "sparse", terms[:MAX_TERMS_CHARACTERS], limit, scope)
        return [(chunk_id, abs(score)) for chunk_id, score in found]

    def _search(self, index: str, field: str, query: object, limit: int, scope: Scope) -> list[tuple[str, float]]:
        if scope.document_ids == ():  # an empty list has no type on the wire
            return []
        metric, params = ("BM25", {}) if field == "sparse" else ("COSINE", {"ef": max(128, 2 * limit)})
        (hits,) = self._call(
            lambda client, seconds: client.search(
                index, data=[query], anns_field=field, limit=limit, output_fields=["chunk_id"],
                search_params={"metric_type": metric, "params": params}, timeout=seconds,
                consistency_level=self.target.consistency.capitalize(), **self._restrict(scope),
            )
        )  # fmt: skip
        return [(hit["chunk_id"], float(hit["distance"])) for hit in hits]

    def _restrict(self, scope: Scope) -> dict[str, Any]:
        """The audience's clause always; a server takes the values apart from the words, Lite as literals."""
        values: dict[str, Any] = {"audiences": [scope.tenant, *scope.audiences]}
        expression = "tenant in {audiences}" if self._lite else "tenant == {tenant} and audience in {audiences}"
        if scope.document_ids is not None:
            values["ids"] = list(scope.document_ids)
            expression += " and document_id in {ids}"
        if self._lite:
            return {"filter": expression.format(**{name: literal(value) for name, value in values.items()})}
        return {"filter": expression, "filter_params": {"tenant": scope.tenant, **values}}

    def count(self, index: str) -> int:
        def ask(client: MilvusClient, seconds: float) -> int:
            if not client.has_collection(index, timeout=seconds):
                return 0
            (row,) = client.query(
                index, filter="", output_fields=["count(*)"], consistency_level="Strong", timeout=seconds
            )
            return int(row["count(*)"])

        return self._call(ask)

    def chunk_ids(self, index: str) -> set[str]:
        def ask(client: MilvusClient, seconds: float) -> set[str]:
            if not client.has_collection(index, timeout=seconds):
                return set()
            everything: dict[str, Any] = {
                "filter": 'chunk_id != ""', "output_fields": ["chunk_id"], "timeout": WHOLE_INDEX_SECONDS,
            }  # fmt: skip
            if self._lite:  # it has no limit that would make an iterator needed
                return {row["chunk_id"] for row in client.query(index, **everything)}
            return set(
                _pages(client.query_iterator(index, batch_size=ROWS_PER_PAGE, **everything))
            )  # as strong as it was made

        return self._call(ask)


def _check_version(version: str) -> None:
    """Raises ConfigError for a server with a known hole."""
    if not is_safe_milvus(version):
        raise ConfigError(
            f"the Milvus server is {version}, which has known holes: it needs {' or '.join(MILVUS_FLOORS)}"
        )


def _failure_of(error: MilvusException | grpc.RpcError) -> tuple[bool, NexusError]:
    """Whether it may pass by itself within seconds, and what to tell the caller of it."""
    code = _grpc_code(error)
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return False, ConfigError("the Milvus server refuses the user or the token of stores.vectors; correct it there")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return False, Overloaded("the vector store has too much to do; try again in a moment")
    if isinstance(error, DataNotMatchException | SchemaMismatchRetryableException):
        return False, ConfigError("the vector store's index has another schema than the vectors given to it")
    away = Unavailable("the vector store does not answer; try again in a moment")
    if isinstance(error, grpc.RpcError) or code is not None:
        return code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), away
    if error.code == RATE_LIMIT:
        return False, Overloaded("the vector store has too much to do; try again in a moment")
    if error.code == COLLECTION_NOT_FOUND:
        return False, Unavailable("the vector store has no such index any more; `nexus fsck --repair` makes it again")
    if isinstance(error, ParamError) or error.is_input_error or error.code in (INVALID, LITE_INVALID):
        return False, UpstreamInvalid("the vector store refuses a request as malformed; the log says how")
    return error.retriable or error.code == Status.CONNECT_FAILED, away


def _grpc_code(error: BaseException | None) -> grpc.StatusCode | None:
    """Of the call beneath an error: pymilvus hides a refused connection behind one of its own.

    It also raises errors from themselves, so the chain is followed by context and only as far as it is new.
    """
    looked_at: set[int] = set()
    while error is not None and id(error) not in looked_at:
        if isinstance(error, grpc.RpcError) and hasattr(error, "code"):
            return error.code()
        looked_at.add(id(error))
        error = error.__context__
    return None


def _aliased(client: MilvusClient, seconds: float, alias: str) -> str | None:
    try:
        return str(client.describe_alias(alias, timeout=seconds)["collection_name"])
    except MilvusException as error:
        if error.code not in (ALIAS_NOT_FOUND, COLLECTION_NOT_FOUND):
            raise
        return None


def _require_schema(index: str, found: dict[str, Any], wanted: Any) -> None:
    """Raises ConfigError where a collection is not what this Nexus would make of that name."""
    has = {_form(one["name"], one["type"], one["params"], one) for one in found["fields"]}
    wants = {_form(one.name, one.dtype, one.params, one.to_dict()) for one in wanted.fields}
    if has != wants:
        first = sorted({form[0] for form in has ^ wants})[0]
        told = " and ".join(
            f"{verb} {form}" for verb, forms in (("has", has), ("needs", wants))
            for form in (next((" ".join(part for part in form if part) for form in forms if form[0] == first), "none"),)
        )  # fmt: skip
        raise ConfigError(
            f"the collection {index!r} of the vector store has another schema (field {first!r}: it {told}); give"
            " stores.vectors a database of its own, or drop that collection and run `nexus fsck --repair`"
        )


def _form(name: str, kind: DataType, params: dict[str, Any], more: dict[str, Any]) -> tuple[str, str, str, str]:
    dimension = f"of {params['dim']} dimensions" if "dim" in params else ""
    return name, DataType(kind).name, dimension, "as partition key" if more.get("is_partition_key") else ""


def _write(index: str, batch: list[dict[str, Any]], client: MilvusClient, seconds: float) -> None:
    client.upsert(index, batch, timeout=seconds)


def _remove(index: str, which: dict[str, Any], client: MilvusClient, seconds: float) -> None:
    client.delete(index, timeout=seconds, **which)


def _batches(rows: Sequence[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
    """In order, at most so many at once, and as many as fit into a message."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        bytes_ = row["dense"].nbytes + len(row["terms"].encode()) + 512
        if batch and (len(batch) == most or size + bytes_ > BYTES_PER_CALL):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += bytes_
    if batch:
        yield batch


def _pages(pages: Any) -> Iterator[str]:
    try:
        while page := pages.next():
            yield from (row["chunk_id"] for row in page)
    finally:
        pages.close()
