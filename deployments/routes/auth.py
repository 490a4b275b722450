"""Credentials: a short-lived token for a key, and, for those who administer, keys made, listed and ended."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Body, Query, Request, Response

from deployments.audited import note
from deployments.routes.caller import demand, lent, permit
from deployments.shapes import NewKey, NewToken, reply, show_key
from nexus.errors import InvalidRequest
from nexus.tokens import Token
from nexus.types import Principal

router = APIRouter(prefix="/auth", tags=["access"])

EVERYTHING = NewToken()  # that a key has, for the usual time


@router.post("/token")
async def make_token(
    request: Request, body: Annotated[NewToken, Body()] = EVERYTHING, principal: Principal = permit()
) -> Response:
    """A token for the key of this request, with no more permissions than it has. It ends with its key, or before."""
    permissions = None if body.permissions is None else frozenset(body.permissions)
    if request.state.token is not None:
        raise InvalidRequest("a token is made with a key, not with another token", code="key_needed")
    text, token = await asyncio.to_thread(lent(request).tokens.issue, principal, permissions, body.lifetime_seconds)
    lifetime = round(token.expires_at - token.issued_at)
    note(request, objects=[token.id])
    made = {
        "access_token": text, "token_type": "Bearer", "expires_in": lifetime, "jti": token.id,
        "tenant": token.principal.tenant, "permissions": sorted(token.principal.permissions),
    }  # fmt: skip
    return reply(made)


@router.delete("/token")
async def revoke_token(
    request: Request, jti: Annotated[str | None, Query(min_length=1, max_length=255)] = None,
    principal: Principal = permit(),
) -> Response:  # fmt: skip
    """End the token of this request; or, for who administers, the one with this `jti`, whoever made it."""
    shown: Token | None = request.state.token
    note(request, objects=[jti or (shown.id if shown else "")])
    tokens = lent(request).tokens
    if jti is not None and (shown is None or jti != shown.id):
        demand(principal, "admin")
        await asyncio.to_thread(tokens.revoke_by_id, jti)
        return reply({"revoked": jti})
    if shown is None:
        raise InvalidRequest(
            "this request came with a key: send the token to end, or name its jti", code="token_needed"
        )
    await asyncio.to_thread(tokens.revoke, shown)
    return reply({"revoked": shown.id})


@router.post("/issuers/refresh")
async def refresh_issuers(request: Request, principal: Principal = permit("admin")) -> Response:
    """Read the keys of every issuer in the settings now: what is signed with one that is gone ends at once.

    Where `refreshed` is false they did not come, and those that were known count as before.
    """
    found = await asyncio.to_thread(lent(request).tokens.refresh_keys)
    note(request, objects=sorted(found))
    shown = [{"issuer": name, "refreshed": kids is not None, "keys": kids or []} for name, kids in found.items()]
    return reply({"issuers": shown})


@router.post("/keys")
async def create_key(request: Request, body: NewKey, principal: Principal = permit("admin")) -> Response:
    """Make a key for any tenant; `admin` administers the whole installation. Its text is in this answer and nowhere."""
    permissions = frozenset(body.permissions)
    text, key = await asyncio.to_thread(
        lent(request).keys.create, body.name, body.tenant, permissions, body.lifetime_seconds,
        body.requests_per_minute, body.tokens_per_minute,
    )  # fmt: skip
    note(request, objects=[key.id, f"tenant {key.tenant}", *sorted(key.permissions)])
    return reply({"key": text, **show_key(key)}, 201)


@router.get("/keys")
async def list_keys(request: Request, principal: Principal = permit("admin")) -> Response:
    """All keys, without their secrets."""
    keys = await asyncio.to_thread(lent(request).keys.list)
    return reply({"keys": [show_key(key) for key in keys]})


@router.delete("/keys")
async def revoke_named_key(
    request: Request, id: Annotated[str, Query(min_length=1, max_length=64)], principal: Principal = permit("admin")
) -> Response:
    """End a key, and with it all tokens made of it."""
    note(request, objects=[id])
    return await revoke_key(request, id, principal)


@router.delete("/keys/{key_id}")
async def revoke_key(request: Request, key_id: str, principal: Principal = permit("admin")) -> Response:
    """The same, by its place."""
    await asyncio.to_thread(lent(request).keys.revoke, key_id)
    return reply({"revoked": key_id})
