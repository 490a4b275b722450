"""Searches, and answers with their sources."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from deployments import audited
from deployments.remembering import remembering_answer
from deployments.routes.caller import demand, lent, permit, through
from deployments.shapes import Query, Search, reply, show_answer, show_result
from deployments.streaming import DONE, event, events, while_listening
from nexus import telemetry
from nexus.pipelines import rag
from nexus.types import Answer, Principal

router = APIRouter(prefix="/rag", tags=["answers"])


@router.post("/search")
async def search(request: Request, body: Search, principal: Principal = permit("documents:read")) -> Response:
    """The k best chunks, with ranks and scores per route where `explain` is true."""
    started = time.perf_counter()
    result = await lent(request).retriever.search(body.to_request(), principal)
    audited.note(request, documents=[hit.document_id for hit in result.hits])
    note("search", result.seconds, started)
    return reply(show_result(result))


@router.post("/query", response_model=None, dependencies=[through("rag")])
async def query(request: Request, body: Query, principal: Principal = permit("documents:read")) -> Response:
    """An answer with its sources; with `stream`, server-sent events whose last is the whole answer."""
    here = lent(request)
    context = ""
    if body.session_id is not None:
        demand(principal, "sessions:read")
        context = await asyncio.to_thread(here.sessions.context, principal, body.session_id)
    ask = rag.Ask(body.to_request(), principal, context, session=body.session_id or "", whole=not body.stream)
    trace_id = request.state.trace_id
    stream = remembering_answer(request, principal, rag.run(ask, audited.noting(request, here.rag)))
    if body.stream:
        return await events(request, _deltas(stream, trace_id))
    return reply(show_answer(await while_listening(request, timed(stream)), trace_id))


async def timed(stream: AsyncGenerator[str | Answer]) -> Answer:
    started = time.perf_counter()
    answer = await rag.collect(stream)
    note("query", answer.seconds, started)
    return answer


def note(kind: str, seconds: Mapping[str, float], started: float) -> None:
    """Count one search or answer and how long its stages took."""
    telemetry.rag_queries.labels(kind).inc()
    telemetry.rag_response.labels(kind).observe(time.perf_counter() - started)
    for stage, spent in seconds.items():
        if stage == "first_token":
            telemetry.rag_first_token.observe(spent)
        else:
            telemetry.rag_stage.labels(stage).observe(spent)


async def _deltas(stream: AsyncGenerator[str | Answer], trace_id: str) -> AsyncGenerator[bytes]:
    started = time.perf_counter()
    async with aclosing(stream) as items:
        async for item in items:
            if isinstance(item, Answer):
                note("query", item.seconds, started)
                yield event(show_answer(item, trace_id))
            else:
                yield event({"delta": item})
    yield DONE
