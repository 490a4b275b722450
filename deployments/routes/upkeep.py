"""What keeps the stores right: the check of both, the cleaning up, and the receipts of what was deleted."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from deployments.routes.caller import lent, permit
from deployments.shapes import MAX_NUMBER, reply, show_deletion, show_faults, show_removed
from nexus.types import Principal

router = APIRouter(prefix="/rag", tags=["upkeep"])


@router.post("/fsck")
async def fsck(request: Request, repair: bool = False, principal: Principal = permit("admin")) -> Response:
    """Compare the stores while they work; `repair` first mends what can be mended without a model."""
    return reply(show_faults(await lent(request).ingestor.fsck(repair)))


@router.post("/vacuum")
async def vacuum(
    request: Request,
    keep_seconds: Annotated[float, Query(ge=0, le=MAX_NUMBER)] = 0,
    principal: Principal = permit("admin"),
) -> Response:
    """Remove closed versions, older than `keep_seconds`, and attempts given up; says what was removed."""
    removed = await lent(request).ingestor.vacuum(keep_seconds)
    ours = [
        {"document_id": one.document.document_id, "version": one.document.version, "why": one.why}
        for one in removed
        if one.document.tenant == principal.tenant
    ]
    return reply({**show_removed(removed), "removed": ours})


@router.get("/deletions")
async def list_deletions(
    request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100, principal: Principal = permit("documents:read")
) -> Response:
    """Receipts of deleted documents, the latest first."""
    found = await asyncio.to_thread(lent(request).documents.deletions, principal, None, limit)
    return reply({"deletions": [show_deletion(deletion) for deletion in found]})


@router.get("/deletions/{document_id}")
async def get_deletions(
    request: Request, document_id: str, principal: Principal = permit("documents:read")
) -> Response:
    """The receipts of one document: when it was deleted, and what of it has been purged since."""
    found = await asyncio.to_thread(lent(request).documents.deletions, principal, document_id, 1000)
    return reply({"deletions": [show_deletion(deletion) for deletion in found]})
