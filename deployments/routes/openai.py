"""OpenAI's routes: models, chat and text completions, from the documents or of a model itself, and embeddings."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable, Container, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter, ValidationError

from deployments import audited
from deployments.chat_shapes import ChatCompletion, Completion, PlainFormat, Sampling
from deployments.remembering import remember_deltas, remembering_answer, remembering_deltas
from deployments.routes.answers import note, timed
from deployments.routes.caller import demand, lent, permit, require, through
from deployments.shapes import CollectionName, Embeddings, reply, show_rewritten, show_sources
from deployments.streaming import DONE, event, events, while_listening
from deployments.strict import StrictRoute
from nexus.balancer import AUTO, Weights
from nexus.cache import CompletingGenerator
from nexus.errors import InvalidRequest, NotFound
from nexus.images import check_pictures
from nexus.memory import Draft
from nexus.pipelines import rag
from nexus.ports import InputType
from nexus.types import Answer, Delta, Principal, Prompt, SearchRequest, Usage

RAG_MODEL = "nexus-rag"
COLLECTION = TypeAdapter[str](CollectionName)
# What an answer from the documents takes of a request; of the rest it can do nothing, and says so.
RAG_FIELDS = frozenset(
    {
        "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "seed",
        "stop", "user", "session_id", "metadata", "store", "n", "top_p",
    }
)  # fmt: skip

NEUTRAL = ("none", "auto", PlainFormat(type="text"))  # said by clients who mean nothing by it

Count = Callable[[Sequence[Delta]], dict[str, Any]]

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute)


@router.get("/models")
async def list_models(request: Request, principal: Principal = permit("infer")) -> Response:
    return reply({"object": "list", "data": [_model(name) for name in await _model_names(request, principal)]})


@router.get("/models/{name:path}")
async def get_model(request: Request, name: str, principal: Principal = permit("infer")) -> Response:
    if name not in await _model_names(request, principal):
        raise unknown_model(name)
    return reply(_model(name))


async def _model_names(request: Request, principal: Principal) -> list[str]:
    here = lent(request)
    collections = await asyncio.to_thread(here.documents.tally, principal)
    ours = [RAG_MODEL, *(f"{RAG_MODEL}/{name}" for name in collections), AUTO]
    return list(dict.fromkeys([*ours, *here.balancer.names(), *here.embedders, *here.rerankers]))


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "nexus"}


def unknown_model(name: str) -> NotFound:
    return NotFound(
        f"the model {name[:100]!r} does not exist; GET /v1/models lists them", pointer="/model", code="model_not_found"
    )


@router.post("/chat/completions", response_model=None)
async def chat(request: Request, body: ChatCompletion, principal: Principal = permit("infer")) -> Response:
    """`nexus-rag` and `nexus-rag/COLLECTION` answer from the documents, with `sources`; others are asked themselves."""
    if body.model.partition("/")[0] == RAG_MODEL:
        require(request, "rag")
        return await _chat_with_documents(request, body, principal)
    require(request, "chat")
    head = _head(request, body, "chatcmpl")
    generator = _generator(request, body)
    audited.note(request, model=generator.name)
    prompt = await _check_pictures(request, body.to_prompt(principal.tenant), generator)
    draft, started = Draft(body.question(), "", model=generator.name, user=body.user), time.perf_counter()
    if body.stream:
        stream = generator.stream(prompt)
        if body.store is not False:
            stream = remembering_deltas(request, principal, draft, stream)
        return await events(request, _chat_chunks(stream, head, _counter(request, body, prompt)))
    deltas = await while_listening(request, generator.complete(prompt))
    if body.store is not False:
        await remember_deltas(request, principal, draft, deltas, started)
    choices = [_chat_choice(index, of_it) for index, of_it in _by_choice(deltas)]
    usage = await asyncio.to_thread(_usage, request, prompt, deltas)
    return reply({**head, "object": "chat.completion", "choices": choices, "usage": usage})


@router.post("/completions", response_model=None, dependencies=[through("chat")])
async def complete(request: Request, body: Completion, principal: Principal = permit("infer")) -> Response:
    """The older way: a model goes on from a bare text."""
    head = _head(request, body, "cmpl")
    prompt = body.to_prompt(principal.tenant)
    generator = _generator(request, body)
    audited.note(request, model=generator.name)
    if body.stream:
        return await events(request, _text_chunks(generator.stream(prompt), head, _counter(request, body, prompt)))
    deltas = await while_listening(request, generator.complete(prompt))
    choices = [
        {"index": index, "text": _text(of_it), "logprobs": _logprobs(of_it), "finish_reason": _end(of_it)}
        for index, of_it in _by_choice(deltas)
    ]
    usage = await asyncio.to_thread(_usage, request, prompt, deltas)
    return reply({**head, "object": "text_completion", "choices": choices, "usage": usage})


def _head(request: Request, body: Sampling, kind: str) -> dict[str, Any]:
    return {"id": f"{kind}-{request.state.request_id}", "created": int(time.time()), "model": body.model}


def _wants_usage(body: Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _generator(request: Request, body: Sampling) -> CompletingGenerator:
    """The generator for a request; raises NotFound, and InvalidRequest where weights mean nothing."""
    here = lent(request)
    given = {name: getattr(body, f"{name}_weight") for name in ("latency", "throughput", "accuracy")}
    if all(value is None for value in given.values()):
        return here.generator(body.model)
    if body.model != AUTO:
        raise InvalidRequest("weights choose among models: they go with model 'auto'", pointer="/model")
    usual = here.balancer.default_weights
    weights = {name: getattr(usual, name) if value is None else value for name, value in given.items()}
    return here.generator(AUTO, Weights(**weights))


async def _check_pictures(request: Request, prompt: Prompt, generator: CompletingGenerator) -> Prompt:
    """The prompt with verified pictures. A generator that sees none refuses them itself: they are not looked at."""
    if not generator.sees_images or not any(message.images for message in prompt.messages):
        return prompt
    return await while_listening(request, check_pictures(prompt, lent(request).fetch_picture))


# One generation as a whole


def _by_choice(deltas: Sequence[Delta]) -> Iterable[tuple[int, list[Delta]]]:
    for index in sorted({delta.choice for delta in deltas if delta.usage is None} or {0}):
        yield index, [delta for delta in deltas if delta.choice == index]


def _text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def _end(deltas: Sequence[Delta]) -> str:
    return next((delta.finish_reason for delta in reversed(deltas) if delta.finish_reason), "stop")


def _chat_choice(index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
    calls, text = _join_calls(deltas), _text(deltas)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = calls
    for name in ("refusal", "reasoning_content"):
        if said := "".join(str(delta.beside[name]) for delta in deltas if delta.beside.get(name)):
            message[name] = said
    return {"index": index, "message": message, "logprobs": _logprobs(deltas), "finish_reason": _end(deltas)}


def _join_calls(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """The tool calls of a message from their pieces: each names its index, the arguments come bit by bit."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in (piece for delta in deltas for piece in delta.beside.get("tool_calls", ())):  # type: ignore[attr-defined]
        function = piece.get("function") or {}
        call = calls.setdefault(
            piece.get("index", len(calls)), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = piece.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""
    return [calls[index] for index in sorted(calls)]


def _logprobs(deltas: Sequence[Delta]) -> dict[str, Any] | None:
    """The pieces' log probabilities end to end: every field of theirs that is a list."""
    joined: dict[str, Any] = {}
    for piece in (delta.beside["logprobs"] for delta in deltas if delta.beside.get("logprobs")):
        for name, value in piece.items():  # type: ignore[attr-defined]
            joined[name] = joined.get(name, []) + value if isinstance(value, list) else value
    return joined or None


def _usage(request: Request, prompt: Prompt, deltas: Sequence[Delta]) -> dict[str, Any]:
    """As the generator counted; the tokens that the embedder's tokenizer finds where it did not count."""
    usage = next((delta.usage for delta in reversed(deltas) if delta.usage is not None), None)
    return show_usage(usage or _estimate(request, prompt, _text(deltas)))


def _counter(request: Request, body: Sampling, prompt: Prompt) -> Count | None:
    """What a stream says of its usage at the end, where the client wants to know."""
    return partial(_usage, request, prompt) if _wants_usage(body) else None


def _estimate(request: Request, prompt: Prompt, text: str) -> Usage:
    asked = [prompt.text] if prompt.text is not None else [message.text for message in prompt.messages]
    *counts, said = lent(request).count_tokens([*asked, text])
    return Usage(sum(counts), said)


def show_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


# One generation as it comes


async def _chat_chunks(
    stream: AsyncGenerator[Delta], head: dict[str, Any], count: Count | None
) -> AsyncGenerator[bytes]:
    head = {**head, "object": "chat.completion.chunk"}
    begun: set[int] = set()
    seen: list[Delta] = []
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            if count is not None:
                seen.append(delta)
            if delta.usage is not None:
                continue
            said: dict[str, Any] = {name: value for name, value in delta.beside.items() if name != "logprobs"}
            if delta.choice not in begun:
                begun.add(delta.choice)
                said |= {"role": "assistant", "content": ""}
            if delta.text:
                said["content"] = delta.text
            yield event({**head, "choices": [_choice(delta, "delta", said)]})
    if count is not None:
        yield event({**head, "choices": [], "usage": await asyncio.to_thread(count, seen)})
    yield DONE


async def _text_chunks(
    stream: AsyncGenerator[Delta], head: dict[str, Any], count: Count | None
) -> AsyncGenerator[bytes]:
    head = {**head, "object": "text_completion"}
    seen: list[Delta] = []
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            if count is not None:
                seen.append(delta)
            if delta.usage is None:
                yield event({**head, "choices": [_choice(delta, "text", delta.text)]})
    if count is not None:
        yield event({**head, "choices": [], "usage": await asyncio.to_thread(count, seen)})
    yield DONE


def _choice(delta: Delta, field: str, said: object) -> dict[str, Any]:
    logprobs = delta.beside.get("logprobs")
    return {"index": delta.choice, field: said, "logprobs": logprobs, "finish_reason": delta.finish_reason}


# Answers from the documents


async def _chat_with_documents(request: Request, body: ChatCompletion, principal: Principal) -> Response:
    demand(principal, "documents:read")
    here = lent(request)
    collection = await _collection_of(request, body.model, principal)
    _refuse_what_documents_cannot(body)
    ask = rag.Ask(
        SearchRequest(body.question(), collection=collection), principal, body.context(),
        body.max_completion_tokens or body.max_tokens, body.temperature, body.seed, body.stops(),
        body.session_id or "", not body.stream,
    )  # fmt: skip
    head = _head(request, body, "chatcmpl")
    stream = rag.run(ask, audited.noting(request, here.rag))
    if body.store is not False:
        stream = remembering_answer(request, principal, stream, body.user)
    counter = UsageCounter(request, body)
    if body.stream:
        return await events(request, _answer_chunks(stream, head, counter if _wants_usage(body) else None))
    answer = await while_listening(request, timed(stream))
    message = {"role": "assistant", "content": answer.response, "refusal": None}
    return reply(
        {
            **head,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}],
            "usage": counter(answer),
            **_beside(answer),
        }
    )


def _refuse_what_documents_cannot(body: ChatCompletion) -> None:
    if not body.question().strip():
        raise InvalidRequest("there is no question: the last user message is empty", pointer="/messages")
    asked = {name: getattr(body, name) for name in body.model_fields_set - RAG_FIELDS}
    given = {name for name, value in asked.items() if value and value not in NEUTRAL}
    if unfit := sorted(given):
        raise InvalidRequest(f"{RAG_MODEL} answers from documents and takes no {unfit[0]}", pointer=f"/{unfit[0]}")
    if body.n not in (None, 1):
        raise InvalidRequest(f"{RAG_MODEL} gives one answer", pointer="/n")
    if any(message.to_message().images for message in body.messages):
        raise InvalidRequest(
            f"{RAG_MODEL} reads no pictures; ask a model that does, GET /v1/models lists them",
            pointer="/messages", code="images_not_supported",
        )  # fmt: skip


async def _collection_of(request: Request, model: str, principal: Principal) -> str:
    name, slash, collection = model.partition("/")
    if name != RAG_MODEL or (slash and not collection):
        raise unknown_model(model)
    if not slash:
        return "default"
    try:
        COLLECTION.validate_python(collection)
    except ValidationError:
        raise unknown_model(model) from None
    if await asyncio.to_thread(lent(request).documents.collection, collection, principal.tenant) is None:
        raise unknown_model(model)
    return collection


def _beside(answer: Answer) -> dict[str, Any]:
    """What Nexus says beyond OpenAI's fields; the same in the stream's last chunk and in the whole."""
    return {
        "sources": show_sources(answer), "confidence": answer.confidence, "abstained": answer.abstained,
        "reason": answer.reason, "sequence": answer.sequence, "invalid_citations": answer.unsupported_citations,
        "rewritten_query": show_rewritten(answer),
    }  # fmt: skip


class UsageCounter:
    """What an answer cost: as the generator counted, else the tokens of question and answer as the embedder's."""

    def __init__(self, request: Request, body: ChatCompletion) -> None:
        self._count = lent(request).count_tokens
        self._prompt = [message.text() for message in body.messages]

    def __call__(self, answer: Answer) -> dict[str, Any]:
        if answer.usage is not None:
            return show_usage(answer.usage)
        counts = self._count([*self._prompt, answer.response])
        prompt, completion = sum(counts[:-1]), counts[-1]
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _answer_chunks(
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
            yield chunk({}, item.finish_reason, **_beside(item))
            if usage is not None:
                yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage(item)})
    yield DONE


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
