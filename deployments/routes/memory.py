"""Interactions that are kept: stored, recalled and deleted, by whoever stored them."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from deployments import audited
from deployments.routes.caller import lent, permit
from deployments.shapes import RetrieveInteractions, StoreInteraction, reply, show_forgotten, show_interaction
from nexus.memory import MAX_USER_CHARACTERS
from nexus.types import Principal

router = APIRouter(tags=["memory"])


@router.post("/store")
@router.post("/memory/store")
async def store(request: Request, body: StoreInteraction, principal: Principal = permit("sessions:write")) -> Response:
    """Keep an interaction; it is on the disk when this is answered, and can be recalled."""
    kept = await lent(request).memory.keep(principal, body.to_draft())
    shown = show_interaction(kept, None)
    said = {name: shown[name] for name in ("interaction_id", "user", "timestamp")}
    return reply({"message": "Interaction stored", **said}, 201)


@router.post("/retrieve")
@router.post("/memory/retrieve")
async def retrieve(
    request: Request, body: RetrieveInteractions, principal: Principal = permit("sessions:read")
) -> Response:
    """What the caller stored: the nearest to the query, or without one the newest.

    `not_compared` counts those that a changed embedder, or one that was away, has yet to give a vector; `left_out`
    those that were found and are too much for one answer: ask with filters, or a smaller limit.
    """
    recalled = await lent(request).memory.recall(principal, body.to_recall())
    found = [show_interaction(interaction, cosine) for interaction, cosine in recalled.found]
    counted = {"not_compared": recalled.not_compared, "left_out": recalled.left_out}
    return reply({"query": body.query, "interactions": found, **counted})


@router.delete("/memory/interactions/{interaction_id}")
async def delete(request: Request, interaction_id: str, principal: Principal = permit("sessions:write")) -> Response:
    """Delete one for good, with the summary that was made of it."""
    return reply(show_forgotten(await lent(request).memory.delete(principal, interaction_id)))


@router.delete("/memory/interactions")
async def forget(
    request: Request,
    user: Annotated[str, Query(min_length=1, max_length=MAX_USER_CHARACTERS)],
    principal: Principal = permit("sessions:write"),
) -> Response:
    """Delete for good all that the caller stored of a user; with the permission `admin`, all that the tenant did."""
    audited.note(request, objects=[user])
    return reply(show_forgotten(await lent(request).memory.forget(principal, user)))
