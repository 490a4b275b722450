"""What a handler knows of its caller: the principal, what they may do, and what they are lent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from fastapi import Depends, Request

from deployments.audited import announce, is_announced
from nexus.access import PERMISSIONS
from nexus.errors import Forbidden, InvalidRequest, NotFound
from nexus.hades import document_id_of
from nexus.jobs import seen_by
from nexus.types import Principal

if TYPE_CHECKING:
    from deployments.gateway import Lent
    from nexus.admission import Place


def lent(request: Request) -> Lent:
    return cast("Lent", request.app.state.lent)


MAX_KEY_CHARACTERS = 255


def idempotency_key(request: Request) -> str | None:
    """The caller's own name for this request, so that sending it twice is doing it once."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARACTERS and key.isprintable()):
        raise InvalidRequest(f"an Idempotency-Key has 1 to {MAX_KEY_CHARACTERS} printable characters")
    return key


async def sequence_of(here: Lent, collection: str, principal: Principal) -> int:
    """The sequence that the caller's collection is at; 0 for one that is not there yet."""
    found = await asyncio.to_thread(here.documents.collection, collection, principal.tenant)
    return found.sequence if found else 0


def readers_of(given: Sequence[str] | None, principal: Principal) -> frozenset[str] | None:
    """The readers that a document gets: whoever adds one for some is one of them. None: those it has."""
    return None if given is None else frozenset([*given, principal.subject] if given else [])


async def seers_of(
    here: Lent, readers: frozenset[str] | None, collection: str, sources: Sequence[str], principal: Principal
) -> frozenset[str]:
    """Who may see a job of these sources, beside whoever it is of; empty: all of the tenant."""

    def restricted() -> set[frozenset[str]]:
        return here.documents.readers_of([document_id_of(principal.tenant, collection, one) for one in sources])

    return readers if readers is not None else seen_by(None, await asyncio.to_thread(restricted))


def stand_aside(request: Request) -> None:
    """What is left of this request is waiting: its place at work goes to another one."""
    cast("Place", request.state.place).leave()


def permit(*permissions: str) -> Principal:
    """A dependency: the principal, who must have these permissions; with none named, whoever has a credential.

    What it asks for can be read of it (`permissions`): a route without such a declaration fails the tests.
    """
    if unknown := set(permissions) - PERMISSIONS:
        raise ValueError(f"there is no permission {sorted(unknown)[0]!r}")

    async def principal(request: Request) -> Principal:
        found = cast(Principal, request.state.principal)
        demand(found, *permissions)
        if is_announced(request, permissions):
            await asyncio.to_thread(announce, request, lent(request).audit)
        return found

    principal.permissions = permissions  # type: ignore[attr-defined]
    return cast(Principal, Depends(principal))


def demand(principal: Principal, *permissions: str) -> None:
    """Raises Forbidden unless the principal has each of them: for what only the request's body makes necessary."""
    for permission in permissions:
        if permission not in principal.permissions:
            raise Forbidden(f"this key may not do that; it needs the permission {permission!r}")


def through(pipeline: str) -> Any:
    """A dependency of a route: this pipeline is among those that answer here."""

    async def check(request: Request) -> None:
        require(request, pipeline)

    return Depends(check)


def require(request: Request, pipeline: str) -> None:
    """Raises NotFound, which lists the others, when this pipeline does not answer here."""
    enabled = lent(request).config.pipelines.enabled
    if pipeline not in enabled:
        there = f"there are {', '.join(enabled)}" if enabled else "there is none"
        raise NotFound(f"the pipeline {pipeline!r} is not enabled here; {there}", code="pipeline_not_found")
