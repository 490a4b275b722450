"""A strict double of a Milvus server: Milvus Lite's engine behind what only a server does and demands.

It speaks gRPC with pymilvus' own stubs, and keeps every request as it came over the wire. Of a server it has: users,
filter templates, a partition key, indexes that must be there before a load, aliases that keep a collection from being
dropped, positive BM25 scores, a window for the results of a query, 64 MiB for a message, a limit on flushes, and
searchers that lag behind: what was written is seen by a search that does not wait for it only after `tick`.
It is as strict as what Milvus' documentation and pymilvus' source say, and no Milvus: of speed, of clusters, and of
what a real server makes of a request it says nothing.
"""

import base64
import json
import re
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from milvus_lite.db import MilvusLite
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc, schema_pb2

VERSION = "v2.6.10"
MAX_MESSAGE_BYTES = 64 * 2**20
RESULT_WINDOW = 16_384
STRONG, SESSION, BOUNDED = 0, 1, 2
RATE_LIMIT, NOT_FOUND, INVALID, INDEX_NOT_FOUND, ALIAS_NOT_FOUND, UNEXPECTED = 8, 100, 1100, 700, 1600, 65535
# The literals that a request may hold: what is fixed in the code of Nexus, and the cursor that pymilvus writes.
FIXED = re.compile(r'chunk_id != ""|chunk_id > ("[0-9A-Za-z_]*"|\'[0-9A-Za-z_]*\')')


class MilvusServer:
    """A server on a loopback port, with `token` (`user:password`) or none; `version` is what it says it is."""

    def __init__(
        self, folder: Path, *, token: str = "", version: str = VERSION, tls: tuple[bytes, bytes] | None = None
    ):
        """`tls` is a private key and its certificate, both PEM."""
        self.token, self.version, self._tls, self.port = token, version, tls, 0
        self.requests: list[tuple[str, Any]] = []
        self.faults: deque[tuple[str, grpc.StatusCode]] = deque()
        self._database = MilvusLite(str(folder))
        self.servicer = _Servicer(self._database, self)
        self.start()

    def start(self) -> None:
        """Begin to answer; again after `stop`, at the same port and with the same rows."""
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(futures.ThreadPoolExecutor(8), interceptors=[_Gate(self)], options=options)
        milvus_pb2_grpc.add_MilvusServiceServicer_to_server(self.servicer, self._server)
        if self._tls is None:
            self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        else:
            credentials = grpc.ssl_server_credentials([self._tls])
            self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=0).wait()

    def close(self) -> None:
        self.stop()
        self._database.close()

    def tick(self) -> None:
        """The searchers catch up with all that was written."""
        self.servicer.seen = self.servicer.clock

    def fail(self, method: str, code: grpc.StatusCode, times: int = 1) -> None:
        """Refuse the next calls of a method, before anything is done."""
        self.faults.extend([(method, code)] * times)

    def asked(self, method: str) -> list[Any]:
        """The requests of one method so far, oldest first."""
        return [request for name, request in self.requests if name == method]

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.requests)


class _Gate(grpc.ServerInterceptor):
    """Notes each request, lets in who has the token, and fails what is to fail."""

    def __init__(self, server: MilvusServer) -> None:
        self._server = server

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        inner, server = continuation(details), self._server
        method = details.method.rpartition("/")[2]
        given = dict(details.invocation_metadata).get("authorization", "")

        def behaviour(request: Any, context: grpc.ServicerContext) -> Any:
            kept = type(request)()
            kept.CopyFrom(request)
            server.requests.append((method, kept))
            if server.token and given != base64.b64encode(server.token.encode()).decode():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "auth check failure, please check username and password")
            if server.faults and server.faults[0][0] == method:
                context.abort(server.faults.popleft()[1], "as the test wants it")
            return inner.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(behaviour, inner.request_deserializer, inner.response_serializer)


class _Servicer(MilvusServicer):  # type: ignore[misc]
    """Lite's answers, where a server's differ."""

    def __init__(self, database: MilvusLite, server: MilvusServer) -> None:
        super().__init__(database)
        self._server = server
        self._lock = threading.Lock()
        self.clock = self.seen = 100  # hybrid timestamps, far above the marks that pymilvus sends for "bounded"
        self._written: dict[tuple[str, str], int] = {}
        self._levels: dict[str, int] = {}  # of consistency, by collection, for requests that name none

    def GetVersion(self, request: Any, context: Any) -> Any:
        return milvus_pb2.GetVersionResponse(status=_ok(), version=self._server.version)

    # ── collections, indexes and aliases ────────────────────────────────────────────────────────

    def CreateCollection(self, request: Any, context: Any) -> Any:
        schema = schema_pb2.CollectionSchema.FromString(request.schema)
        if sum(one.is_partition_key for one in schema.fields) != 1 or not 1 <= request.num_partitions <= 1024:
            return _fault(INVALID, "here a collection has one partition key and a number of partitions")
        self._levels[request.collection_name] = request.consistency_level
        return super().CreateCollection(request, context)

    def HasCollection(self, request: Any, context: Any) -> Any:
        answer = super().HasCollection(request, context)
        answer.value |= request.collection_name in self._database_aliases()
        return answer

    def DropCollection(self, request: Any, context: Any) -> Any:
        if request.collection_name in self._database_aliases().values():
            return _fault(UNEXPECTED, "please drop its aliases first")
        return super().DropCollection(request, context)

    def LoadCollection(self, request: Any, context: Any) -> Any:
        described = self.DescribeIndex(
            milvus_pb2.DescribeIndexRequest(collection_name=request.collection_name), context
        )
        if {one.field_name for one in described.index_descriptions} != {"dense", "sparse"}:
            return _fault(INDEX_NOT_FOUND, "there is no vector index on a field, please create one first")
        return super().LoadCollection(request, context)

    def CreateIndex(self, request: Any, context: Any) -> Any:
        params = {pair.key: pair.value for pair in request.extra_params}
        if request.field_name == "dense" and params["index_type"] == "HNSW":  # of which Lite makes one per segment
            for pair in request.extra_params:
                pair.value = {"HNSW": "FLAT"}.get(pair.value, pair.value)
        return super().CreateIndex(request, context)

    def DescribeAlias(self, request: Any, context: Any) -> Any:
        if request.alias not in self._database_aliases():
            return milvus_pb2.DescribeAliasResponse(status=_fault(ALIAS_NOT_FOUND, "alias not found"))
        return super().DescribeAlias(request, context)

    def Flush(self, request: Any, context: Any) -> Any:
        return milvus_pb2.FlushResponse(status=_fault(RATE_LIMIT, "request is rejected: flush, rate limit"))

    def _database_aliases(self) -> dict[str, str]:
        names = self._db.list_aliases()
        return {name: self._db.describe_alias(name)["collection"] for name in names}

    # ── rows ────────────────────────────────────────────────────────────────────────────────────

    def Upsert(self, request: Any, context: Any) -> Any:
        answer = super().Upsert(request, context)
        with self._lock:
            self.clock += 1
            answer.timestamp = self.clock
            for chunk_id in answer.IDs.str_id.data:
                self._written[request.collection_name, chunk_id] = self.clock
        return answer

    def Delete(self, request: Any, context: Any) -> Any:
        if fault := self._render(request, request.expr_template_values, "expr"):
            return milvus_pb2.MutationResult(status=fault)
        answer = super().Delete(request, context)
        with self._lock:
            self.clock += 1
            answer.timestamp = self.clock
        return answer

    def Query(self, request: Any, context: Any) -> Any:
        params = {pair.key: pair.value for pair in request.query_params}
        counting = list(request.output_fields) == ["count(*)"]
        if not counting and not 1 <= int(params.get("limit", 0)) <= RESULT_WINDOW:
            return milvus_pb2.QueryResults(status=_fault(INVALID, "a query has a limit of at most 16384 rows"))
        if fault := self._render(request, request.expr_template_values, "expr"):
            return milvus_pb2.QueryResults(status=fault)
        if unseen := self._unseen(request):
            request.expr = f"chunk_id not in {json.dumps(unseen)}" + (request.expr and f" and {request.expr}")
        return super().Query(request, context)

    def Search(self, request: Any, context: Any) -> Any:
        if fault := self._render(request, request.expr_template_values, "dsl"):
            return milvus_pb2.SearchResults(status=fault)
        if unseen := self._unseen(request):
            request.dsl = f"({request.dsl}) and chunk_id not in {json.dumps(unseen)}"
        answer = super().Search(request, context)
        params = {pair.key: pair.value for pair in request.search_params}
        if params.get("metric_type") == "BM25":
            answer.results.scores[:] = [-score for score in answer.results.scores]
        return answer

    def _unseen(self, request: Any) -> list[str]:
        """Ids of rows that were written after what this request waits for."""
        collection = self._db.resolve_collection_name(request.collection_name)
        level = request.consistency_level
        if request.use_default_consistency:
            level = self._levels.get(collection, BOUNDED)
        if level == STRONG:
            return []
        until = max(self.seen, request.guarantee_timestamp) if level == SESSION else self.seen
        with self._lock:
            return [pk for (name, pk), written in self._written.items() if name == collection and written > until]

    def _render(self, request: Any, values: Any, field: str) -> Any:
        """Put the values of a template where they belong; a fault for what no careful client would send."""
        expression = getattr(request, field)
        if re.search("[\"']", FIXED.sub("", expression)):
            return _fault(INVALID, "a value stands within the expression")
        names = set(re.findall(r"\{(\w+)\}", expression))
        if names != set(values):
            return _fault(INVALID, f"the expression wants {sorted(names)} and is given {sorted(values)}")
        if any(_value(value) is None for value in values.values()):
            return _fault(INVALID, "a value is neither a text nor a list of texts")
        rendered = re.sub(r"\{(\w+)\}", lambda match: json.dumps(_value(values[match[1]])), expression)
        setattr(request, field, rendered)
        values.clear()
        return None


def _value(value: Any) -> str | list[str] | None:
    """A text, or a list of at least one: of an empty list the wire does not say what it is a list of."""
    if value.WhichOneof("val") == "string_val":
        return str(value.string_val)
    return list(value.array_val.string_data.data) or None


def _ok() -> Any:
    return common_pb2.Status(code=0)


def _fault(code: int, reason: str) -> Any:
    return common_pb2.Status(code=code, reason=reason, error_code=common_pb2.UnexpectedError)
