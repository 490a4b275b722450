"""The voters who keep what the machines agree on: how they are, who comes and goes, and who leads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Path, Request, Response

from cluster import backup
from deployments.routes.caller import lent, permit
from deployments.shapes import MAX_NUMBER, NewVoter, Transfer, reply, show_voters
from nexus.errors import Unavailable
from nexus.types import Principal

if TYPE_CHECKING:
    from deployments.gateway import Operating

router = APIRouter(prefix="/coordinator", tags=["coordinator"])


@router.get("")
async def describe(request: Request, principal: Principal = permit("infer")) -> Response:
    """Each voter's role, term, commit and lag, and what they can do together."""
    return reply(show_voters(await _operator(request).describe()))


@router.post("/voters")
async def add(request: Request, body: NewVoter, principal: Principal = permit("admin")) -> Response:
    """Add one, on a machine with these labels; answered once it votes."""
    await _operator(request).add(body.id, body.labels)
    return await describe(request, principal)


@router.delete("/voters/{number}")
async def remove(
    request: Request, number: Annotated[int, Path(ge=1, le=MAX_NUMBER)], principal: Principal = permit("admin")
) -> Response:
    """Remove one. What it has on its disk stays there, and its number is not used again."""
    await _operator(request).remove(number)
    return await describe(request, principal)


@router.post("/transfer")
async def transfer(request: Request, body: Transfer, principal: Principal = permit("admin")) -> Response:
    """Make this one lead; answered once it does."""
    await _operator(request).transfer(body.to)
    return await describe(request, principal)


@router.post("/snapshot")
async def snapshot(request: Request, principal: Principal = permit("admin")) -> Response:
    """All that the voters agree on, as the file that `nexus coordinator restore` takes."""
    file = backup.write(await _operator(request).snapshot())
    return Response(file, media_type="application/octet-stream")


def _operator(request: Request) -> Operating:
    operator = lent(request).operator
    if operator is None:
        raise Unavailable("this Nexus has no coordinator")
    return operator
