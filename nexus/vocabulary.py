"""The words of spans, as Phoenix and other readers of traces know them.

`gen_ai.*` are OpenTelemetry's for generative AI, of its repository semantic-conventions-genai in August 2026, where
all of them are still in development; the others are OpenInference's. Times are in seconds.
"""

import json
from collections.abc import Mapping, Sequence

from nexus.types import Hit

Attribute = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Attribute]

KIND = "openinference.span.kind"
SESSION, USER = "session.id", "user.id"
INPUT, OUTPUT = "input.value", "output.value"
PROJECT = "openinference.project.name"
METHOD, ROUTE, STATUS_CODE = "http.request.method", "http.route", "http.response.status_code"

OPERATION, PROVIDER = "gen_ai.operation.name", "gen_ai.provider.name"
MODEL, ANSWERED_BY = "gen_ai.request.model", "gen_ai.response.model"
FIRST_PIECE = "gen_ai.response.time_to_first_chunk"
FINISHED = "gen_ai.response.finish_reasons"
TOKENS_IN, TOKENS_OUT = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
TOP_K = "gen_ai.retrieval.top_k"
COLLECTION = "gen_ai.data_source.id"
DIMENSION = "gen_ai.embeddings.dimension.count"

# Nexus' own
FINGERPRINT = "nexus.embedder.fingerprint"  # of the model's files and how they are used: what a version is
PLACE = "nexus.machine"
SEQUENCE = "nexus.collection.sequence"  # that was searched
TEXTS, HITS, DOCUMENTS, CHUNKS = "nexus.texts", "nexus.hits", "nexus.documents", "nexus.chunks"
BYTES = "nexus.bytes"
REQUEST = "nexus.request.id"
APPLIED = "nexus.reranking.applied"

MOST_DOCUMENTS = 20


STAGES: Mapping[str, Attributes] = {
    "embed": {KIND: "EMBEDDING", OPERATION: "embeddings"}, "search": {KIND: "CHAIN"}, "authority": {KIND: "GUARDRAIL"},
    "graph": {KIND: "CHAIN"}, "rerank": {KIND: "RERANKER"},
}  # fmt: skip


def of_embedding(address: str, fingerprint: str, texts: int) -> Attributes:
    """A call of an embedder."""
    return {
        KIND: "EMBEDDING", OPERATION: "embeddings", MODEL: address, "embedding.model_name": address,
        FINGERPRINT: fingerprint, TEXTS: texts,
    }  # fmt: skip


def of_retrieval(collection: str, k: int) -> Attributes:
    """A search; what it found is `of_hits`."""
    return {KIND: "RETRIEVER", OPERATION: "retrieval", COLLECTION: collection, TOP_K: k}


def of_reranking(model: str, texts: int, applied: bool) -> Attributes:
    return {MODEL: model, "reranker.model_name": model, "reranker.top_k": texts, APPLIED: applied}


def of_generation(model: str, place: str) -> Attributes:
    """A call of a generator; which model it was is known of all that Nexus may ask by this name."""
    where = {PLACE: place} if place else {}
    return {KIND: "LLM", OPERATION: "chat", MODEL: model, ANSWERED_BY: model, "llm.model_name": model, **where}


def of_hits(hits: Sequence[Hit], with_text: bool) -> Attributes:
    """The first hits, best first, by document, chunk and score; their texts only where these may be told."""
    told: dict[str, Attribute] = {HITS: len(hits)}
    for place, hit in enumerate(hits[:MOST_DOCUMENTS]):
        document = f"retrieval.documents.{place}.document"
        told |= {f"{document}.id": hit.document_id, f"{document}.score": float(hit.score)}
        told[f"{document}.metadata"] = json.dumps({"chunk_id": hit.chunk_id, "version": hit.version})
        if with_text:
            told[f"{document}.content"] = hit.text
    return told
