"""OpenAI's routes: models, chat completions from the documents, embeddings."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Container, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter, ValidationError

from deployments.routes.answers import event, events, note, timed
from deployments.routes.caller import lent, permit
from deployments.shapes import ChatCompletion, CollectionName, Embeddings, reply, show_sources
from nexus.errors import InvalidRequest, NotFound
from nexus.pipelines import rag
from nexus.ports import InputType
from nexus.types import Answer, Principal, SearchRequest

RAG_MODEL = "nexus-rag"
COLLECTION = TypeAdapter[str](CollectionName)

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models")
async def list_models(request: Request, principal: Principal = permit("infer")) -> Response:
    return reply({"object": "list", "data": [_model(name) for name in await _model_names(request)]})


@router.get("/models/{name:path}")
async def get_model(request: Request, name: str, principal: Principal = permit("infer")) -> Response:
    if name not in await _model_names(request):
        raise unknown_model(name)
    return reply(_model(name))


async def _model_names(request: Request) -> list[str]:
    here = lent(request)
    collections = await asyncio.to_thread(here.documents.collections)
    return [
        RAG_MODEL,
        *(f"{RAG_MODEL}/{c.name}" for c in collections),
        *dict.fromkeys([*here.embedders, *here.rerankers]),
    ]


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "nexus"}


def unknown_model(name: str) -> NotFound:
    return NotFound(
        f"the model {name[:100]!r} does not exist; GET /v1/models lists them", pointer="/model", code="model_not_found"
    )


@router.post("/chat/completions", response_model=None)
async def chat(request: Request, body: ChatCompletion, principal: Principal = permit("infer")) -> Response:
    """`nexus-rag` and `nexus-rag/COLLECTION` answer from the documents, with `sources` beside the rest."""
    here = lent(request)
    collection = await _collection_of(request, body.model)
    if not body.question().strip():
        raise InvalidRequest("there is no question: the last user message is empty", pointer="/messages")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    ask = rag.Ask(
        SearchRequest(body.question(), collection=collection), principal, body.context(),
        body.max_completion_tokens or body.max_tokens, body.temperature, body.seed, stop,
    )  # fmt: skip
    head = {"id": f"chatcmpl-{request.state.request_id}", "created": int(time.time()), "model": body.model}
    stream = rag.run(ask, here.rag)
    if body.stream:
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        return await events(_chunks(stream, head, UsageCounter(request, body) if wants_usage else None))
    answer = await timed(stream)
    message = {"role": "assistant", "content": answer.response, "refusal": None}
    return reply(
        {
            **head,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": UsageCounter(request, body)(answer),
            **_beside(answer),
        }
    )


async def _collection_of(request: Request, model: str) -> str:
    name, slash, collection = model.partition("/")
    if name != RAG_MODEL or (slash and not collection):
        raise unknown_model(model)
    if not slash:
        return "default"
    try:
        COLLECTION.validate_python(collection)
    except ValidationError:
        raise unknown_model(model) from None
    if await asyncio.to_thread(lent(request).documents.collection, collection) is None:
        raise unknown_model(model)
    return collection


def _beside(answer: Answer) -> dict[str, Any]:
    """What Nexus says beyond OpenAI's fields; the same in the stream's last chunk and in the whole."""
    return {
        "sources": show_sources(answer), "confidence": answer.confidence, "abstained": answer.abstained,
        "reason": answer.reason, "sequence": answer.sequence,
    }  # fmt: skip


class UsageCounter:
    """Tokens of the prompt and of the answer, counted with the embedder's tokenizer."""

    def __init__(self, request: Request, body: ChatCompletion) -> None:
        self._count = lent(request).count_tokens
        self._prompt = [message.text() for message in body.messages]

    def __call__(self, answer: Answer) -> dict[str, int]:
        counts = self._count([*self._prompt, answer.response])
        prompt, completion = sum(counts[:-1]), counts[-1]
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _chunks(
    stream: AsyncGenerator[str | Answer], head: dict[str, Any], usage: UsageCounter | None
) -> AsyncGenerator[bytes]:
    started = time.perf_counter()

    def chunk(delta: dict[str, str], finish: str | None = None, **beside: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **beside})

    role: dict[str, str] = {"role": "assistant"}
    async with aclosing(stream) as items:
        async for item in items:
            if isinstance(item, str):
                yield chunk({**role, "content": item})
                role = {}
                continue
            note("query", item.seconds, started)
            yield chunk({}, "stop", **_beside(item))
            if usage is not None:
                yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage(item)})
    yield b"data: [DONE]\n\n"


@router.post("/embeddings")
async def embeddings(request: Request, body: Embeddings, principal: Principal = permit("infer")) -> Response:
    """Of texts that ask or may answer, as `input_type` or the end of the model's name says; by default the latter.

    `usage` counts with the tokenizer of the documents' embedder.
    """
    here = lent(request)
    name, input_type = _kind_asked(body, here.embedders)
    embedder = here.embedders.get(name)
    if embedder is None:
        raise unknown_model(body.model)
    texts = body.texts()
    if any(not text.strip() for text in texts):
        raise InvalidRequest("an input text is empty", pointer="/input")
    vectors = await embedder.embed(texts, input_type)
    if body.dimensions not in (None, vectors.shape[1]):
        raise InvalidRequest(f"this model has {vectors.shape[1]} dimensions, no other number", pointer="/dimensions")
    data = [
        {"object": "embedding", "index": i, "embedding": _encode(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    tokens = sum(await asyncio.to_thread(here.count_tokens, texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return reply({"object": "list", "data": data, "model": body.model, "usage": usage})


def _kind_asked(body: Embeddings, known: Container[str]) -> tuple[str, InputType]:
    """The model, and what its texts are: where only OpenAI's fields can be sent, the name ends in it."""
    kinds: tuple[InputType, ...] = ("query", "passage")
    for kind in kinds:
        name = body.model.removesuffix(f"-{kind}")
        if name != body.model and body.model not in known:
            if body.input_type not in (None, kind):
                raise InvalidRequest(f"the model's name says {kind}, but not input_type", pointer="/input_type")
            return name, kind
    return body.model, body.input_type or "passage"


def _encode(vector: Sequence[float], encoding: str) -> object:
    """Numbers, or base64 of little-endian float32."""
    array = np.ascontiguousarray(vector, dtype="<f4")
    return array if encoding == "float" else base64.b64encode(array.tobytes()).decode()
