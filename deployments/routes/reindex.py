"""Another embedder or chunker for a collection: begin a second index, look at it, make it live, go back, drop it."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from deployments.reindexing import Reindexing
from deployments.routes.caller import lent, permit
from deployments.shapes import CollectionName, MakeLive, Reindex, reply, show_progress
from nexus.errors import NotFound
from nexus.types import Principal

router = APIRouter(prefix="/rag", tags=["upkeep"])
Named = Annotated[CollectionName, Query()]


def reindexing(request: Request) -> Reindexing:
    found = lent(request).reindexing
    if found is None:
        raise NotFound("this Nexus builds no indexes")
    return found


@router.post("/reindex")
async def begin(request: Request, body: Reindex, principal: Principal = permit("admin")) -> Response:
    """Begin a second index with another of the configured embedders, or cut anew; it is built in the background."""
    questions = [(one.query, tuple(one.documents)) for one in body.questions]
    chunking = None if body.chunking is None else body.chunking.settings()
    here = reindexing(request).ingestor
    begun = await here.begin_reindex(body.collection, body.embedder, principal, questions, chunking)
    return reply(show_progress(begun, principal), 202)


@router.get("/reindex")
async def look(request: Request, collection: Named = "default", principal: Principal = permit("admin")) -> Response:
    """Which index is live, and how far the one beside it is; of all tenants, so in sums."""
    return reply(show_progress(await reindexing(request).ingestor.reindex_progress(collection), principal))


@router.put("/reindex")
async def make_live(request: Request, body: MakeLive, principal: Principal = permit("admin")) -> Response:
    """Search the new index from now on, or the former one again. 409 with the figures where the new one finds less."""
    here = reindexing(request)
    moved = here.switch(body.collection, body.anyway) if body.live == "new" else here.rollback(body.collection)
    return reply(show_progress(await moved, principal))


@router.delete("/reindex")
async def drop(request: Request, collection: Named = "default", principal: Principal = permit("admin")) -> Response:
    """Give up whichever index is not live: there is no going back to it."""
    return reply(show_progress(await reindexing(request).ingestor.drop_index(collection), principal))
