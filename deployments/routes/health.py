"""Is it alive, is it ready, how is it doing."""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response

from deployments.measuring import measure, states
from deployments.routes.caller import lent, permit
from deployments.shapes import reply
from nexus import telemetry
from nexus.errors import NexusError
from nexus.types import Principal

CHECK_SECONDS = 5.0

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> Response:
    """This process answers."""
    return reply({"status": "alive"})


@router.get("/healthz", include_in_schema=False)
@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """Every part answers; with `?verbose`, each one's state."""
    checks = lent(request).checks
    states = dict(zip(checks, await asyncio.gather(*map(_state, checks.values())), strict=True))
    is_ready = all(state == "ready" for state in states.values())
    body: dict[str, object] = {"status": "ready" if is_ready else "not ready"}
    if "verbose" in request.query_params:
        body["parts"] = states
    response = reply(body, 200 if is_ready else 503)
    if not is_ready:
        response.headers["retry-after"] = "2"
    return response


async def _state(check: Callable[[], Awaitable[object]]) -> str:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await check()
    except TimeoutError:
        return "does not answer"
    except NexusError as error:
        return error.message
    return "ready"


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, principal: Principal = permit()) -> Response:
    """What can be asked here, and how."""
    return reply(request.app.openapi())


@router.get("/metrics")
async def metrics(request: Request, principal: Principal = permit("infer")) -> Response:
    """Prometheus text, exact over all processes of all machines."""
    here = lent(request)
    measured = await measure(here)
    text = telemetry.exposition(measured.counted, await states(here, measured.told))
    return Response(text, media_type=telemetry.CONTENT_TYPE)
