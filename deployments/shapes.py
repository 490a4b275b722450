"""JSON as it crosses the front door: every request and answer, and how they become plain values.

Unknown fields are refused. Sizes are bounded here, before any work is done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import orjson
from fastapi import Response
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from cluster.client import Absent, summary
from cluster.raft import Status
from cluster.sharing import Overview
from cluster.steward import Shared
from deployments.cluster_state import Counted, Deployed, Machine, SeenGpu, State
from nexus.access import MOST_PER_MINUTE, PERMISSIONS, Key
from nexus.chunking import ChunkSettings
from nexus.enforcement import Evaluation, Order
from nexus.errors import InvalidRequest
from nexus.filters import parse_filter
from nexus.hades import Fault, Removed
from nexus.jobs import File, Job
from nexus.memory import MAX_USER_CHARACTERS, Draft, Recall
from nexus.pipelines.execute import StepResult
from nexus.policy import Rule, show_outcome, show_rule
from nexus.ports import Deletion, LiveIndex
from nexus.reindex import MOST_QUESTIONS, Progress
from nexus.types import Answer, Document, Forgotten, Hit, Interaction, Principal, Receipt, SearchRequest, SearchResult

MAX_METADATA_BYTES = 16 * 1024
MAX_INITIAL_BYTES = 64 * 1024
MAX_FILTER_BYTES = 2**20
MAX_READERS = 100
MAX_ACTIONS_SHOWN = 10_000
MOST_NAMED = 20  # documents, of which the others are counted
MAX_NUMBER = 2**53  # what JSON carries exactly, and a database holds
STUCK_SECONDS = 60.0  # in one stage, after which a file is named as stuck
MAX_LIFETIME_SECONDS = 100 * 365 * 86_400
PermissionName = Annotated[str, Field(max_length=64)]
CollectionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
Weight = Annotated[float, Field(ge=0, le=1)]
LongText = Annotated[str, Field(max_length=2**26)]  # of a whole document; http.max_body_bytes is the tighter bound
EmbeddedText = Annotated[str, Field(max_length=2**20)]


@dataclass(frozen=True)
class MaxBytes:
    """A bound in bytes: of a text in UTF-8, or of an object as JSON. A schema says it as `x-max-bytes`."""

    most: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "x-max-bytes": self.most}

    def _check(self, value: Any) -> Any:
        if self._size_of(value) > self.most:
            raise ValueError(f"at most {self.most} bytes are taken here")
        return value

    def _size_of(self, value: Any) -> int:
        if isinstance(value, str):
            try:
                return len(value.encode())
            except UnicodeEncodeError:
                raise ValueError("half a surrogate pair is no text") from None
        try:
            orjson.dumps(value)  # as every answer about it will
            return len(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError("here is a number that JSON cannot carry, or it is nested too deeply") from None


Metadata = Annotated[dict[str, Any], MaxBytes(MAX_METADATA_BYTES)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Readers = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f]+$")]], Field(max_length=MAX_READERS)
]


class AddDocument(Shape):
    """`metadata` is any JSON object of at most 16 KiB; filters see its scalar values.

    `readers` are the subjects of the tenant that may know of the document, besides whoever adds it; an empty list
    is all of them, and none given leaves it as it is.
    """

    filename: Annotated[str, Field(min_length=1, max_length=1024)]
    content: LongText
    metadata: Metadata = {}
    collection: CollectionName = "default"
    readers: Readers | None = None


class AnnouncedFile(Shape):
    """A file to be sent: `digest` is the BLAKE2b of its bytes, 16 bytes long, in hexadecimal."""

    filename: Annotated[str, Field(min_length=1, max_length=1024)]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    size: Annotated[int, Field(ge=0, le=MAX_NUMBER)]
    media_type: Annotated[str, Field(max_length=128)] | None = None
    metadata: Metadata = {}


class AnnounceFiles(Shape):
    files: Annotated[list[AnnouncedFile], Field(min_length=1, max_length=100_000)]
    collection: CollectionName = "default"
    readers: Readers | None = None  # of each of them, as in AddDocument


class NewToken(Shape):
    """`permissions` of the key's own; left out: all of them."""

    permissions: Annotated[list[PermissionName], Field(max_length=32)] | None = None
    lifetime_seconds: Annotated[int, Field(ge=1, le=86_400)] | None = None


class NewKey(Shape):
    """Without `permissions` it may do all but administer. Without a limit of its own it has the installation's."""

    name: Annotated[str, Field(max_length=64)]
    tenant: Annotated[str, Field(max_length=64)] = "default"
    permissions: Annotated[list[PermissionName], Field(max_length=32)] = sorted(PERMISSIONS - {"admin"})
    lifetime_seconds: Annotated[float, Field(gt=0, le=MAX_LIFETIME_SECONDS)] | None = None
    requests_per_minute: Annotated[int, Field(ge=1, le=MOST_PER_MINUTE)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=MOST_PER_MINUTE)] | None = None


class Hybrid(Shape):
    embedding_weight: Weight = 0.7
    text_weight: Weight = 0.3
    fusion: Literal["max", "rrf"] | None = None


class Search(Shape):
    query: Annotated[str, Field(max_length=8192)]
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    collection: CollectionName = "default"
    filters: Annotated[dict[str, Any], MaxBytes(MAX_FILTER_BYTES)] | None = None
    hybrid: Hybrid | None = None
    as_of: Annotated[int, Field(ge=0, le=MAX_NUMBER)] | None = None
    explain: bool = False
    graph: Literal["off", "on", "auto"] = "auto"
    hops: Annotated[int, Field(ge=1, le=3)] = 1
    rerank: bool | None = None

    def to_request(self) -> SearchRequest:
        return SearchRequest(
            query=self.query,
            k=self.k,
            collection=self.collection,
            filters=None if self.filters is None else parse_filter(self.filters),
            embedding_weight=None if self.hybrid is None else self.hybrid.embedding_weight,
            text_weight=None if self.hybrid is None else self.hybrid.text_weight,
            fusion=None if self.hybrid is None else self.hybrid.fusion,
            as_of=self.as_of,
            explain=self.explain,
            graph=self.graph,
            hops=self.hops,
            rerank=self.rerank,
        )


class Query(Search):
    stream: bool = False
    session_id: Annotated[str, Field(max_length=256)] | None = None


class Context(Shape):
    content: Annotated[str, Field(max_length=2**20)]


class SessionQuery(Shape):
    input: Annotated[str, Field(max_length=8192)]
    collection: CollectionName = "default"


class StoreInteraction(Shape):
    """What was asked and answered, and what is known of it beside. Without a `user` it is the caller's own.

    `timestamp` is when it happened, in UTC where it names no zone. `metadata` is as a document's.
    """

    query: Annotated[str, Field(min_length=1, max_length=2**15)]
    response: Annotated[str, Field(max_length=2**18)]
    context: Annotated[list[Annotated[str, Field(max_length=2**16)]], Field(max_length=100)] = []
    confidence: Weight | None = None
    model_used: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    gpu_utilization: Annotated[float, Field(ge=0, le=MAX_NUMBER)] | None = None
    latency_ms: Annotated[float, Field(ge=0, le=MAX_NUMBER)] | None = None
    timestamp: Annotated[str, Field(max_length=64)] | None = None
    metadata: Metadata = {}
    user: Annotated[str, Field(min_length=1, max_length=MAX_USER_CHARACTERS)] | None = None

    @field_validator("timestamp")
    @classmethod
    def _is_a_moment(cls, timestamp: str | None) -> str | None:
        if timestamp is not None:
            _seconds_of(timestamp)
        return timestamp

    def to_draft(self) -> Draft:
        return Draft(
            self.query, self.response, tuple(self.context), self.confidence, self.model_used, self.gpu_utilization,
            self.latency_ms, self.metadata, self.user, None if self.timestamp is None else _seconds_of(self.timestamp),
        )  # fmt: skip


def _seconds_of(timestamp: str) -> float:
    """Unix seconds of a moment as ISO 8601 writes it. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(timestamp)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError("a timestamp is written as 2026-01-31T12:00:00Z (ISO 8601)") from None


class RetrieveInteractions(Shape):
    """The nearest to a query, or without one the newest; filters see metadata and the fields of an interaction."""

    query: Annotated[str, Field(max_length=8192)] = ""
    limit: Annotated[int, Field(ge=1, le=100)] = 5
    filters: Annotated[dict[str, Any], MaxBytes(MAX_FILTER_BYTES)] | None = None

    def to_recall(self) -> Recall:
        return Recall(self.query, self.limit, parse_filter(self.filters) if self.filters else None)


class Execute(Shape):
    """The steps of a template, or these protocols, over any JSON object of at most 64 KiB."""

    template_name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    protocol_names: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=128)], ...], Field(max_length=64)
    ] | None = None  # fmt: skip
    initial_data: Annotated[dict[str, Any], Field(min_length=1), MaxBytes(MAX_INITIAL_BYTES)]
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None  # the one that answers from documents
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NUMBER)] | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Execute:
        if (self.template_name is None) == (self.protocol_names is None):
            raise ValueError("either template_name or protocol_names is needed, and not both")
        return self


class Policy(Shape):
    """A rule: what is done with the files that meet its conditions. A list of conditions means all of them.

    A condition is `{field, operator, value}`, or one of `{all: [...]}`, `{any: [...]}` and `{not: ...}`; an action has
    a `type`, and what that takes: `{type: move, target}`, `{type: replicate, targets | count}`, `{type: index,
    collection, readers}`, `{type: tag, add, remove}`, `{type: hold, name}`, `{type: delete}`.
    """

    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=1024)] = ""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    enabled: bool = True
    conditions: Annotated[list[Any] | dict[str, Any], MaxBytes(MAX_FILTER_BYTES)] = []
    actions: Annotated[list[Any], Field(min_length=1, max_length=16), MaxBytes(MAX_FILTER_BYTES)]


class EvaluatePolicy(Shape):
    """On all files, or on one: its path, or what is known of it (`file_path`, `file_size` and so on).

    Nothing is done while `dry_run` is true. `delegate` has the Hammerspace share of its tiers keep the policy.
    """

    file: Annotated[str, Field(min_length=1, max_length=1024)] | Metadata | None = None
    dry_run: bool = True
    delegate: bool = False

    def to_order(self, name: str) -> Order:
        return Order(name, self.file, self.dry_run, self.delegate)


class KeptQuestion(Shape):
    """A query, and the ids or sources of the documents that it should find."""

    query: Annotated[str, Field(min_length=1, max_length=8192)]
    documents: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=100)]


class Chunked(Shape):
    """How documents are cut anew, in tokens of the embedder; `max_tokens` is an eleventh more where it is not given.

    A piece begins with the last `overlap_sentences` of the one before it, where they take no more than a quarter.
    """

    target_tokens: Annotated[int, Field(ge=16, le=100_000)]
    max_tokens: Annotated[int, Field(ge=16, le=100_000)] | None = None
    overlap_sentences: Annotated[int, Field(ge=0, le=20)] = 1

    def settings(self) -> ChunkSettings:
        """Raises InvalidRequest where the most is less than the target."""
        most = self.target_tokens + -(-self.target_tokens // 11) if self.max_tokens is None else self.max_tokens
        if most < self.target_tokens:
            raise InvalidRequest(
                f"chunks cannot have at most {most} tokens where {self.target_tokens} are wanted",
                pointer="/chunking/max_tokens",
            )
        return ChunkSettings(self.target_tokens, most, self.overlap_sentences)


class Reindex(Shape):
    """`embedder` is the name or address of a configured one; without it, models.embedder, or with a `chunking` the one
    that is searched with. Without a `chunking`, documents stay as they are cut."""

    collection: CollectionName = "default"
    embedder: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    chunking: Chunked | None = None
    questions: Annotated[list[KeptQuestion], Field(max_length=MOST_QUESTIONS)] = []


class MakeLive(Shape):
    """`anyway` takes a new index that finds less."""

    collection: CollectionName = "default"
    live: Literal["new", "former"]
    anyway: bool = False


class Release(Shape):
    """The path of a file that is held, and what the hold is called where it is not called like the policy."""

    file: Annotated[str, Field(min_length=1, max_length=1024)]
    hold: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class NewVoter(Shape):
    """A voter's number, never used before, and the labels that its machine must have."""

    id: Annotated[int, Field(ge=1, le=MAX_NUMBER)]
    labels: Annotated[
        dict[Annotated[str, Field(max_length=255)], Annotated[str, Field(max_length=255)]], Field(max_length=64)
    ] = {}


class Transfer(Shape):
    """The voter that is to lead."""

    to: Annotated[int, Field(ge=1, le=MAX_NUMBER)]


class NewBlockKey(Shape):
    """The tenant whose blocks get a new key; none named: the caller's."""

    tenant: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class Embeddings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[EmbeddedText, Field(min_length=1)] | Annotated[
        list[EmbeddedText], Field(min_length=1, max_length=2048)
    ]  # fmt: skip
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=MAX_NUMBER)] | None = None
    input_type: Literal["query", "passage"] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


RerankedText = Annotated[str, MaxBytes(64 * 1024)]


class RerankedDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: RerankedText


class Rerank(BaseModel):
    """Cohere's and Jina's request, the fields that mean something here."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(min_length=1, max_length=256)]
    query: Annotated[str, MaxBytes(8 * 1024)]
    documents: Annotated[list[RerankedText | RerankedDocument], Field(min_length=1, max_length=1000)]
    top_n: Annotated[int, Field(ge=1, le=MAX_NUMBER)] | None = None
    return_documents: bool = False

    def texts(self) -> list[str]:
        return [one if isinstance(one, str) else one.text for one in self.documents]


def reply(value: object, status: int = 200) -> Response:
    """A JSON response, written by orjson: the handler's value is already what the client reads."""
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type="application/json")


# ── errors, as /openapi.json describes them ─────────────────────────────────────────────────────

_TEXT, _TEXT_OR_NOTHING = {"type": "string"}, {"type": ["string", "null"]}
_FAULT = {"type": "object", "required": ["pointer", "detail"], "properties": {"pointer": _TEXT, "detail": _TEXT}}
_PROBLEM = {  # RFC 9457
    "type": "object", "required": ["type", "title", "status", "detail", "instance", "code", "request_id"],
    "additionalProperties": False,
    "properties": {
        **dict.fromkeys(("type", "title", "detail", "instance", "code", "request_id"), _TEXT),
        "status": {"type": "integer"}, "errors": {"type": "array", "items": _FAULT},
    },
}  # fmt: skip
_OPENAI_ERROR = {
    "type": "object", "required": ["error"], "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object", "required": ["message", "type", "param", "code"], "additionalProperties": False,
            "properties": {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NOTHING, "code": _TEXT_OR_NOTHING},
        }
    },
}  # fmt: skip


def describe_errors(prefix: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of routes below this prefix: the shape of what is no success."""
    if prefix == "/v1":
        content: dict[str, Any] = {"application/json": {"schema": _OPENAI_ERROR}}
    else:
        content = {"application/problem+json": {"schema": _PROBLEM}}
    whose = {"4XX": "The request has to change", "5XX": "Not the request's fault"}
    return {status: {"description": said, "content": content} for status, said in whose.items()}


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def show_receipt(receipt: Receipt) -> dict[str, Any]:
    done = "replaced its former version" if receipt.replaced else "added"
    return {
        "message": "Document unchanged" if receipt.outcome == "unchanged" else f"Document {done}",
        "document_id": receipt.document_id,
        "version": receipt.version,
        "title": receipt.title,
        "chunks": receipt.chunks,
        "sequence": receipt.sequence,
    }


def show_interaction(interaction: Interaction, cosine: float | None) -> dict[str, Any]:
    """An interaction as its owner sees it; `score` is its cosine to the query."""
    return {
        "interaction_id": interaction.interaction_id,
        "kind": interaction.kind,
        "user": interaction.user,
        "query": interaction.query,
        "response": interaction.response,
        "context": list(interaction.context),
        "confidence": interaction.confidence,
        "timestamp": datetime.fromtimestamp(interaction.created_at, UTC).isoformat(),
        "model_used": interaction.model,
        "gpu_utilization": interaction.gpu_utilization,
        "latency_ms": interaction.latency_ms,
        "metadata": dict(interaction.metadata),
        "score": cosine,
    }


def show_forgotten(done: Forgotten) -> dict[str, Any]:
    return {"deleted": done.interactions + done.summaries, "summaries": done.summaries}


def show_job(job: Job, under_way: Sequence[File], now: float) -> dict[str, Any]:
    """A job with its progress; `rate` is in files a second over all of its life, unchanged ones left out."""
    seconds = max((job.ended_at or now) - job.created_at, 1e-3)
    rate = (job.ended - job.counts.get("unchanged", 0)) / seconds
    left = job.total - job.ended
    return {
        "job_id": job.job_id,
        "state": job.state,
        "reason": job.reason,
        "kind": job.kind,
        "collection": job.collection,
        "created_at": job.created_at,
        "ended_at": job.ended_at,
        "total": job.total,
        "counts": dict(job.counts),
        "progress": job.ended / job.total if job.total else 1.0,
        "rate": rate,
        "seconds_left": left / rate if left and rate else 0.0 if not left else None,
        "under_way": [show_file(file) for file in under_way],
        "stuck": [show_file(file) for file in under_way if now - (file.since or now) > STUCK_SECONDS],
    }


def show_file(file: File) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "number": file.number,
        "filename": file.source,
        "size": file.size,
        "state": file.state,
        "stage": file.stage,
        "reason": file.reason,
        "code": file.code,
        "attempts": file.attempts,
        "heartbeat_at": file.beat_at,
        "stage_since": file.since,
        "ended_at": file.ended_at,
    }
    if file.receipt is not None:
        shown |= {
            "document_id": file.receipt.document_id,
            "version": file.receipt.version,
            "chunks": file.receipt.chunks,
            "sequence": file.receipt.sequence,
        }
    return shown


def show_faults(faults: Sequence[Fault]) -> dict[str, Any]:
    shown = [{"fault": fault.kind, "collection": fault.collection, "ids": list(fault.ids)} for fault in faults]
    return {"clean": not faults, "faults": shown}


def show_removed(removed: Sequence[Removed]) -> dict[str, Any]:
    """What a vacuum removed, as sums: of all tenants, so without names."""
    return {
        "versions": len(removed),
        "chunks": sum(one.chunks for one in removed),
        "vectors": sum(one.vectors for one in removed),
        "why": dict(Counter(one.why for one in removed)),
    }


def show_deletion(deletion: Deletion) -> dict[str, Any]:
    """A receipt: what was deleted, by whom and when; and what of it is gone, from where, since when."""
    return {
        "document_id": deletion.document_id,
        "collection": deletion.collection,
        "source": deletion.source,
        "deleted_by": deletion.subject,
        "deleted_at": deletion.deleted_at,
        "sequence": deletion.sequence,
        "purged_at": deletion.purged_at,
        "purged": {
            "document store": {"versions": deletion.versions, "chunks": deletion.chunks},
            "vector store": {"vectors": deletion.vectors},
        },
    }


def show_progress(progress: Progress, principal: Principal) -> dict[str, Any]:
    """Where a collection's indexes stand; `former` is there while one can go back to it.

    `uncut` are documents that are in the new index as they were cut before, for what they were cut from was not kept:
    how many, of all tenants, and the sources of those that the principal may read.
    """
    beside = progress.beside
    is_switched = beside is not None and beside.live == progress.live
    named = [
        one.source for one in progress.unkept if one.tenant == principal.tenant and principal.may_read(one.readers)
    ]
    return {
        "collection": progress.collection,
        "live": _show_index(progress.live),
        "state": None if beside is None else beside.state,
        "beside": None if beside is None else _show_index(beside.live),
        "is_switched": is_switched,
        "former": _show_index(progress.own) if is_switched else None,
        "uncut": {"documents": len(progress.unkept), "sources": sorted(named)[:MOST_NAMED]},
        "done": progress.done,
        "total": progress.total,
        "figures": {} if beside is None else dict(beside.figures),
    }


def _show_index(live: LiveIndex) -> dict[str, Any]:
    """`chunking` is how its documents are cut, null: as configured, each when it came."""
    chunking = asdict(ChunkSettings.read(live.chunking)) if live.chunking else None
    return {
        "index": live.index, "fingerprint": live.fingerprint, "embedder": live.embedder, "dimension": live.dimension,
        "chunking": chunking,
    }  # fmt: skip


def show_document(document: Document) -> dict[str, Any]:
    return {
        "document_id": document.document_id,
        "version": document.version,
        "collection": document.collection,
        "source": document.source,
        "title": document.title,
        "media_type": document.media_type,
        "metadata": dict(document.metadata),
        "readers": sorted(document.readers),
        "bytes": document.size,
        "chunks": document.chunks,
        "sequence": document.opened,
        "created_at": document.created_at,
    }


def show_hit(hit: Hit, explain: bool = False) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "document_id": hit.document_id,
        "chunk_id": hit.chunk_id,
        "score": hit.score,
        "text": hit.text,
        "title": hit.title,
        "source": hit.source,
        "heading": list(hit.heading),
        "page": hit.page,
        "lines": [hit.first_line, hit.last_line] if hit.first_line is not None else None,
        "metadata": dict(hit.metadata),
    }
    if hit.flags:
        shown["flags"] = list(hit.flags)
    if explain:
        shown["cosine"] = hit.cosine
        shown["routes"] = {name: {"rank": r.rank, "score": r.score} for name, r in hit.routes.items()}
    return shown


def show_result(result: SearchResult) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "hits": [show_hit(hit, result.explain is not None) for hit in result.hits],
        "sequence": result.sequence,
    }
    if result.explain is not None:
        shown["explain"] = {**result.explain, "seconds": dict(result.seconds)}
    return shown


def show_sources(answer: Answer) -> list[dict[str, Any]]:
    return [{"number": source.number, **show_hit(source.hit), "cited": source.cited} for source in answer.sources]


def show_answer(answer: Answer, trace_id: str) -> dict[str, Any]:
    return {
        "query": answer.query,
        "rewritten_query": show_rewritten(answer),
        "response": answer.response,
        "sources": show_sources(answer),
        "confidence": answer.confidence,
        "abstained": answer.abstained,
        "reason": answer.reason,
        "invalid_citations": list(answer.unsupported_citations),
        "finish_reason": answer.finish_reason,
        "sequence": answer.sequence,
        "trace_id": trace_id,
    }


def show_rewritten(answer: Answer) -> str | None:
    """What was searched for, where that was not the question as it was asked."""
    return None if answer.searched_for == answer.query else answer.searched_for


def show_policy(rule: Rule, **more: Any) -> dict[str, Any]:
    return {**show_rule(rule), **more}


def show_evaluation(evaluation: Evaluation, dry_run: bool) -> dict[str, Any]:
    """As the founding documents have it, with the sums of what was or would be done; at most 10,000 actions."""
    outcomes = evaluation.outcomes
    counts = Counter(f"{one.action} {one.status}" for one in outcomes)
    return {
        "policy_name": evaluation.policy_name,
        "dry_run": dry_run,
        "result": evaluation.result,
        "actions": [show_outcome(one) for one in outcomes[:MAX_ACTIONS_SHOWN]],
        "summary": dict(sorted(counts.items())),
        "metadata": dict(evaluation.metadata),
        "delegated": [
            {"tier": one.tier, "state": one.state, "expression": one.reference, "reason": one.reason or None}
            for one in evaluation.delegated
        ],
    }


def show_step(step: StepResult) -> dict[str, Any]:
    return {"step": step.step, "result": step.result, "finish_reason": step.finish_reason, "seconds": step.seconds}


def show_key(key: Key) -> dict[str, Any]:
    """A key without its secret. Times are Unix seconds; `last_used_at` is right to the minute."""
    return {**asdict(key), "permissions": sorted(key.permissions)}


def show_voters(voters: Sequence[Status | Absent]) -> dict[str, Any]:
    """What they can do together, and each one: `lag` is how many entries it has yet to apply."""
    commit = max((one.commit for one in voters if isinstance(one, Status)), default=0)
    return {"summary": summary(voters), "voters": [_show_voter(one, commit) for one in voters]}


def _show_voter(voter: Status | Absent, commit: int) -> dict[str, Any]:
    if isinstance(voter, Absent):
        return {"id": voter.id, "role": "absent", "why": voter.why}
    is_learner = voter.id in voter.members.learners
    return {
        "id": voter.id, "role": "learner" if is_learner else voter.role.name.lower(), "term": voter.term,
        "commit": voter.commit, "applied": voter.applied, "lag": commit - voter.applied, "leader": voter.leader,
        "voters": sorted(voter.members.voters),
    }  # fmt: skip


def show_state(state: State, models: Mapping[str, str]) -> dict[str, Any]:
    """What could not be had is null, and `unknown` says why. `models` are the names of models by deployment."""
    agreed = state.agreed
    plan = None if agreed is None or agreed.plan is None else agreed.plan.places
    return {
        "nodes": None if state.machines is None else [_show_machine(one) for one in state.machines],
        "placement": None if plan is None else [asdict(place) for place in plan],
        "deployments": None
        if state.deployed is None
        else [_show_deployed(one, state, models) for one in state.deployed],
        "coordinator": None if state.voters is None else show_voters(state.voters),
        "collections": None if state.collections is None else [_show_counted(one) for one in state.collections],
        "differences": list(state.differences),
        "drained": None if agreed is None else list(agreed.drained),
        "unknown": dict(state.unknown),
    }


def _show_counted(one: Counted) -> dict[str, Any]:
    index, shown = one.index, {**asdict(one), "index": None}
    if index is not None:
        told = {"served_by": index.served_by, "why": index.why or None, "rows": index.rows, "bytes": index.bytes}
        shown["index"] = {name: value for name, value in told.items() if value is not None}
    return shown


def _show_machine(machine: Machine) -> dict[str, Any]:
    node = machine.node
    return {
        "name": node.name, "address": node.address, "alive": machine.is_alive, "labels": dict(node.labels),
        "cpus": node.cpus, "memory_bytes": node.memory,
        "gpus": None if machine.gpus is None else [_show_gpu(one) for one in machine.gpus],
    }  # fmt: skip


def _show_gpu(seen: SeenGpu) -> dict[str, Any]:
    """`taken_bytes` are held by others than Nexus; `claims` by its replicas."""
    gpu = seen.gpu
    return {
        "index": gpu.index, "model": gpu.model, "memory_bytes": gpu.memory, "taken_bytes": gpu.taken,
        "claims": [{"holder": one.holder, "bytes": one.bytes} for one in seen.claims],
        "planned": [{"deployment": one.want, "replica": one.replica, "bytes": one.gpu_bytes} for one in seen.planned],
    }  # fmt: skip


def _show_deployed(one: Deployed, state: State, models: Mapping[str, str]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": one.name, "model": models.get(one.want), "node": one.node or None, "status": one.status,
        "replicas": {"running": one.running, "starting": one.starting},
    }  # fmt: skip
    return shown | (asdict(state.queues[one.name]) if one.name in state.queues else {})


def show_shared(shared: Shared, metadata: Mapping[str, object] | None = None) -> dict[str, Any]:
    """A block without its bytes; `nodes` have a verified copy each, and `node_id` sealed it."""
    record = shared.record
    shown = {
        "data_id": shared.data_id, "version": record.version, "digest": record.digest, "size": record.length,
        "data_type": record.data_type, "media_type": record.media_type, "node_id": record.writer,
        "created_at": record.created_at, "copies": len(record.copies), "wanted": shared.wanted,
        "nodes": list(record.copies),
    }  # fmt: skip
    return shown if metadata is None else {**shown, "metadata": dict(metadata)}


def show_overview(overview: Overview) -> dict[str, Any]:
    """Sums over all tenants, and each steward; `state` is here, away or drained."""
    standings = {one.node: one for one in overview.standings}
    return {
        "copies_wanted": overview.wanted, "blocks": overview.blocks, "bytes": overview.bytes, "short": overview.short,
        "stewards": [
            {
                "node": node, "state": _state_of(node, overview),
                **(asdict(standings[node]) if node in standings else {}),
            }
            for node in overview.members
        ],
    }  # fmt: skip


def _state_of(node: str, overview: Overview) -> str:
    if node not in overview.living:
        return "away"
    return "drained" if node in overview.drained else "here"
