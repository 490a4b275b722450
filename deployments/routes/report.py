"""How the models do, and why the last requests went where they went."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response

from deployments.routes.caller import lent, permit
from deployments.shapes import reply
from nexus.balancer import Choice
from nexus.errors import TryAgain
from nexus.types import Principal

router = APIRouter(tags=["report"])


@router.get("/report")
async def report(request: Request, principal: Principal = permit("infer")) -> Response:
    """Each model's live figures, the requests its engines work on, and the last choices, the latest first."""
    here = lent(request)
    seen = here.balancer.report()
    models = [{**asdict(member), "ejected_seconds": _ago(seen.now, member.ejected_since)} for member in seen.members]
    for model in models:
        del model["ejected_since"]
    choices = [_show_choice(choice, seen.now) for choice in reversed(seen.choices)]
    engines: dict[str, Any] = {}
    for name, load in here.engines.items():
        try:
            engines[name] = await load()
        except TryAgain as error:
            engines[name] = {"away": error.message}
    return reply({"models": models, "engines": engines, "choices": choices})


def _ago(now: float, since: float | None) -> float | None:
    return None if since is None else now - since


def _show_choice(choice: Choice, now: float) -> dict[str, Any]:
    shown = asdict(choice)
    shown["seconds_ago"] = now - shown.pop("at")
    return shown
