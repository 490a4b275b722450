"""Cohere's and Jina's route: documents in the order of their relevance to a query."""

import asyncio

from fastapi import APIRouter, Request, Response

from deployments.routes.caller import lent, permit
from deployments.routes.openai import unknown_model
from deployments.shapes import Rerank, reply
from nexus.errors import InvalidRequest
from nexus.reranking import best_first, check_scores
from nexus.types import Principal

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/rerank")
async def rerank(request: Request, body: Rerank, principal: Principal = permit("infer")) -> Response:
    """Best first, documents of equal relevance as they were sent. An embedder's name ranks by its cosine.

    `usage` counts query and documents once, with the tokenizer of the documents' embedder.
    """
    here = lent(request)
    reranker = here.reranker_called(body.model)
    if reranker is None:
        raise unknown_model(body.model)
    if not body.query.strip():
        raise InvalidRequest("the query is empty", pointer="/query")
    texts = body.texts()
    scores = check_scores(await reranker.rerank(body.query, texts), len(texts))
    results = [
        {"index": i, "relevance_score": float(scores[i])}
        | ({"document": {"text": texts[i]}} if body.return_documents else {})
        for i in best_first(scores)[: body.top_n]
    ]
    tokens = sum(await asyncio.to_thread(here.count_tokens, [body.query, *texts]))
    return reply(
        {
            "id": f"rerank-{request.state.request_id}", "model": body.model, "results": results,
            "usage": {"total_tokens": tokens},
        }
    )  # fmt: skip
