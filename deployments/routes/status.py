"""Machines, GPUs, replicas, queues and collections, side by side."""

from fastapi import APIRouter, Request, Response

from deployments.cluster_state import observe
from deployments.planning import models_of
from deployments.routes.caller import lent, permit
from deployments.shapes import reply, show_state
from nexus.types import Principal

router = APIRouter(tags=["status"])


@router.get("/status")
async def status(request: Request, principal: Principal = permit("infer")) -> Response:
    """What there is, what runs there, and what is not as it was planned; answered in a few seconds, whoever is away."""
    here = lent(request)
    return reply(show_state(await observe(here, principal), models_of(here.config)))
