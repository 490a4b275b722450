"""Blocks shared between the machines: sealed, copied, verified, and who keeps them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import TypeAdapter, ValidationError
from starlette.types import Receive, Scope, Send

from deployments.routes.caller import lent, permit, stand_aside
from deployments.shapes import Metadata, NewBlockKey, reply, show_overview, show_shared
from nexus.access import NAME
from nexus.errors import InvalidRequest, Unavailable
from nexus.types import Principal, media_type_of

if TYPE_CHECKING:
    from cluster.sharing import Download, Sharing

DATA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,127}")
MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+\-]{0,63}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+\-]{0,63}")
OCTETS = "application/octet-stream"
METADATA_HEADER = "x-nexus-metadata"
NOT_CHANGED = 304

router = APIRouter(prefix="/share", tags=["sharing"])
operating = APIRouter(prefix="/sharing", tags=["sharing"])

_METADATA: TypeAdapter[dict[str, Any]] = TypeAdapter(Metadata)


@router.put("/{data_id}")
async def put(
    request: Request,
    data_id: str,
    data_type: Annotated[str | None, Query(max_length=64)] = None,
    metadata: Annotated[str | None, Query(max_length=2**16)] = None,
    principal: Principal = permit("share:write"),
) -> Response:
    """Share the body, of whatever media type, as a block or a new version of it: 201, or 200 where it replaces one.

    Answered when `copies` of it are on disks and verified; `wanted` is how many there should be. `metadata` is a JSON
    object of at most 16 KiB, here or in the header X-Nexus-Metadata; its `data_type`, or the parameter, is counted by.
    """
    sharing = await _sharing(request)
    _check_id(data_id)
    kept = _metadata(metadata, request)
    kind = _data_type(data_type, kept)
    media_type = media_type_of(request.headers.get("content-type")) or OCTETS
    if not MEDIA_TYPE.fullmatch(media_type):
        raise InvalidRequest("the content-type is no media type, such as application/octet-stream")
    stand_aside(request)
    async with aclosing(_body(request)) as body:
        shared = await sharing.put(principal.tenant, data_id, body, kind, media_type, kept)
    return reply({"message": "Block shared", **show_shared(shared, kept)}, 200 if shared.replaced else 201)


@router.get("/{data_id}")
async def get(
    request: Request, data_id: str, describe: bool = False, principal: Principal = permit("share:read")
) -> Response:
    """The bytes as they were shared, once all of them are verified; with `describe` what is known of them, as JSON."""
    sharing = await _sharing(request)
    _check_id(data_id)
    if describe:
        found = await sharing.describe(principal.tenant, data_id)
        return reply(show_shared(found.shared, found.metadata))
    found = await sharing.get(principal.tenant, data_id)
    headers = _headers(found)
    if headers["etag"] in request.headers.get("if-none-match", ""):
        await found.pieces.aclose()
        return Response(status_code=NOT_CHANGED, headers={"etag": headers["etag"]})
    stand_aside(request)
    return BlockResponse(found, headers)


@router.head("/{data_id}")
async def head(request: Request, data_id: str, principal: Principal = permit("share:read")) -> Response:
    """What GET would say in its headers; the block is verified for that, too."""
    sharing = await _sharing(request)
    _check_id(data_id)
    found = await sharing.describe(principal.tenant, data_id)
    return Response(headers=_headers(found), media_type=None)


@router.delete("/{data_id}")
async def delete(request: Request, data_id: str, principal: Principal = permit("share:write")) -> Response:
    """Nobody finds it from now on; copies on machines that are away go when they return."""
    sharing = await _sharing(request)
    _check_id(data_id)
    removed = await sharing.delete(principal.tenant, data_id)
    return reply(
        {
            "deleted": True,
            "data_id": data_id,
            "version": removed.version,
            "copies": removed.copies,
            "erased": removed.erased,
        }
    )


@router.get("")
async def page(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=128)] = "",
    principal: Principal = permit("share:read"),
) -> Response:
    """The tenant's blocks, without their metadata; `next` is the cursor to give as `after`, null on the last page."""
    sharing = await _sharing(request)
    found = await sharing.page(principal.tenant, after, limit + 1)
    following = found[limit - 1].data_id if len(found) > limit else None
    return reply({"blocks": [show_shared(one) for one in found[:limit]], "next": following})


# For operators


@operating.get("")
async def overview(request: Request, principal: Principal = permit("infer")) -> Response:
    """Who keeps blocks, how many there are of all tenants, and how many have fewer copies than they could."""
    return reply(show_overview(await (await _sharing(request)).overview()))


@operating.post("/keys")
async def rotate(request: Request, body: NewBlockKey, principal: Principal = permit("admin")) -> Response:
    """A new key for a tenant's blocks; those there are get it meanwhile, and then the old one is destroyed."""
    tenant = body.tenant or principal.tenant
    return reply({"tenant": tenant, "key_id": await (await _sharing(request)).rotate(tenant)}, 201)


@operating.post("/cluster-key")
async def rotate_cluster_key(request: Request, principal: Principal = permit("admin")) -> Response:
    """Another cluster key: all machines get it, and then the old one is destroyed; who is away gets it on return."""
    return reply({"key_id": await (await _sharing(request)).rotate_cluster_key()}, 201)


@operating.post("/scrub")
async def scrub(request: Request, principal: Principal = permit("admin")) -> Response:
    """Verify every copy of every block now, and repair those that are damaged."""
    return reply({"damaged": await (await _sharing(request)).scrub()})


@operating.delete("/stewards/{node}")
async def forget(
    request: Request, node: Annotated[str, Path(max_length=64)], principal: Principal = permit("admin")
) -> Response:
    """A machine that will not come back keeps no blocks any more: they are copied elsewhere."""
    await (await _sharing(request)).forget(node)
    return reply({"forgotten": node})


@operating.delete("/machines/{node}")
async def expel(
    request: Request, node: Annotated[str, Path(max_length=64)], principal: Principal = permit("admin")
) -> Response:
    """A stolen machine's signing key counts no more; the `left` blocks that it wrote are sealed anew by others."""
    return reply({"expelled": node, "left": await (await _sharing(request)).expel(node)})


class BlockResponse(StreamingResponse):
    """A block's bytes; what is read of it is closed when its reader leaves."""

    def __init__(self, found: Download, headers: Mapping[str, str]) -> None:
        self._pieces = found.pieces
        super().__init__(found.pieces, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            await super().__call__(scope, receive, send)


async def _sharing(request: Request) -> Sharing:
    connect = lent(request).sharing
    if connect is None:
        raise Unavailable("this Nexus shares no blocks")
    return await connect()


def _check_id(data_id: str) -> None:
    if not DATA_ID.fullmatch(data_id):
        raise InvalidRequest(
            "a data_id is 1 to 128 letters, digits, '_', '.', ':' or '-', and begins with a letter or a digit",
            pointer="/data_id",
        )


def _metadata(given: str | None, request: Request) -> Mapping[str, object]:
    in_header = request.headers.get(METADATA_HEADER)
    if given is not None and in_header is not None:
        raise InvalidRequest(
            "metadata is given twice, as a parameter and as a header: give it once", pointer="/metadata"
        )
    text = given if given is not None or in_header is None else _utf8(in_header)
    if text is None:
        return {}
    try:
        return _METADATA.validate_json(text)
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"metadata has to be a JSON object: {what}", pointer="/metadata") from None


def _utf8(header: str) -> str:
    """A header's bytes come as if they were Latin-1; JSON is UTF-8."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        raise InvalidRequest(f"the header {METADATA_HEADER} is no UTF-8", pointer="/metadata") from None


def _data_type(given: str | None, metadata: Mapping[str, object]) -> str:
    in_metadata = metadata.get("data_type")
    if given is None and isinstance(in_metadata, str) and NAME.fullmatch(in_metadata):
        return in_metadata
    if given is not None and not NAME.fullmatch(given):
        raise InvalidRequest("a data_type is 1 to 64 letters, digits, '_', '.' or '-'", pointer="/data_type")
    return given or "data"


async def _body(request: Request) -> AsyncGenerator[bytes, None]:
    is_empty = True
    async for some in request.stream():
        is_empty = is_empty and not some
        yield some
    if is_empty:
        raise InvalidRequest("the body is what is shared, and there is none; it may have any media type but text/plain")


def _headers(found: Download) -> dict[str, str]:
    record = found.shared.record
    return {
        "content-type": record.media_type, "content-length": str(record.length), "etag": f'"{record.version}"',
        METADATA_HEADER: json.dumps(dict(found.metadata), separators=(",", ":")), "x-nexus-data-type": record.data_type,
        "x-nexus-copies": str(len(record.copies)),
    }  # fmt: skip
