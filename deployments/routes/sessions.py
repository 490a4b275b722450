"""Session contexts under the founding documents' paths (these are not Model Context Protocol)."""

import asyncio
from functools import partial

from fastapi import APIRouter, Request, Response

from deployments.audited import noting
from deployments.remembering import remembering_answer
from deployments.routes.answers import timed
from deployments.routes.caller import lent, permit, through
from deployments.shapes import Context, SessionQuery, reply, show_hit, show_rewritten, show_sources
from deployments.streaming import while_listening
from nexus.pipelines import rag
from nexus.summaries import summarise
from nexus.types import Principal, SearchRequest

# `:path` lets an id with slashes arrive here and be refused with a reason instead of a bare 404.
router = APIRouter(prefix="/mcp/{session_id:path}", tags=["sessions"])


@router.post("/add_context")
async def add_context(
    request: Request, session_id: str, body: Context, principal: Principal = permit("sessions:write")
) -> Response:
    here = lent(request)
    content = await here.screen.text("input", body.content)
    await asyncio.to_thread(here.sessions.add_context, principal, session_id, content)
    await here.sessions.compact(principal, session_id, partial(summarise, generator=here.rag.generator))
    return reply({"message": f"Context added for session {session_id}."})


@router.get("/get_context")
async def get_context(request: Request, session_id: str, principal: Principal = permit("sessions:read")) -> Response:
    context = await asyncio.to_thread(lent(request).sessions.context, principal, session_id)
    return reply({"session_id": session_id, "context": context})


@router.delete("/clear_context")
async def clear_context(request: Request, session_id: str, principal: Principal = permit("sessions:write")) -> Response:
    await asyncio.to_thread(lent(request).sessions.clear, principal, session_id)
    return reply({"message": f"Context cleared for session {session_id}."})


@router.post("/query", dependencies=[through("rag")])
async def query(
    request: Request,
    session_id: str,
    body: SessionQuery,
    principal: Principal = permit("documents:read", "sessions:read"),
) -> Response:
    """An answer that knows what the session was told."""
    here = lent(request)
    context = await asyncio.to_thread(here.sessions.context, principal, session_id)
    ask = rag.Ask(
        SearchRequest(body.input, collection=body.collection), principal, context, session=session_id, whole=True
    )
    stream = remembering_answer(request, principal, rag.run(ask, noting(request, here.rag)))
    answer = await while_listening(request, timed(stream))
    return reply(
        {
            "session_context": context,
            "retrieved_documents": [show_hit(source.hit) for source in answer.sources],
            "response": answer.response,
            "sources": show_sources(answer),
            "confidence": answer.confidence,
            "abstained": answer.abstained,
            "rewritten_query": show_rewritten(answer),
            "invalid_citations": list(answer.unsupported_citations),
        }
    )
