"""How Nexus does, how the models do, and why the last requests went where they went."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from deployments.history import History, Sums
from deployments.measuring import ask
from deployments.routes.caller import lent, permit
from deployments.shapes import reply
from nexus.balancer import Choice
from nexus.errors import TryAgain
from nexus.types import Principal

LONGEST_WINDOW = 3600

router = APIRouter(tags=["report"])


@router.get("/report")
async def report(
    request: Request,
    window: Annotated[int, Query(ge=10, le=LONGEST_WINDOW, description="Seconds to look back.")] = 300,
    principal: Principal = permit("infer"),
) -> Response:
    """Response time, error rate, GPU use and memory; each model's live figures, its engines' work, the last choices.

    Times and errors are of all requests but probes within the last `window` seconds, across replicas; where this front
    door began later, since then (`window_seconds`). What is not known is null, and `unknown` says why.
    """
    here = lent(request)
    history: History = request.app.state.history
    (sums, seconds), told = await history.last(window), await ask(here)
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
    unknown: dict[str, str] = {}
    shown = {**_show_requests(sums, seconds, unknown), **_show_machines(told, unknown)}
    return reply({**shown, "unknown": unknown, "models": models, "engines": engines, "choices": choices})


def _show_requests(sums: Sums, seconds: float, unknown: dict[str, str]) -> dict[str, Any]:
    times = {f"p{round(100 * share)}_seconds": sums.quantile(share) for share in (0.5, 0.95)}
    if not sums.requests:
        unknown |= dict.fromkeys(("response_time", "error_rate"), f"nobody asked anything for {seconds:.0f} s")
        return {"window_seconds": seconds, "response_time": None, "error_rate": None}
    for name in (name for name, value in times.items() if value is None):
        unknown[f"response_time.{name}"] = "it is longer than the longest time that is told apart"
    return {
        "window_seconds": seconds,
        "response_time": {"mean_seconds": sums.seconds / sums.requests, **times, "requests": sums.requests},
        "error_rate": {"rate": sums.errors / sums.requests, "errors": sums.errors, "requests": sums.requests},
    }


def _show_machines(told: Mapping[str, Any], unknown: dict[str, str]) -> dict[str, Any]:
    """As of now, machine by machine."""
    gpus, memory = [], []
    for node, one in told.items():
        if one is None:
            unknown[f"machines.{node}"] = "it does not answer"
            continue
        memory.append({"node": node, "used_bytes": one.memory_used, "total_bytes": one.node.memory})
        for gpu in one.node.gpus:
            gpus.append(
                {
                    "node": node, "gpu": gpu.index, "busy": gpu.busy, "used_bytes": gpu.used,
                    "memory_bytes": gpu.memory,
                }
            )  # fmt: skip
            if gpu.busy is None:
                unknown[f"gpu_usage.{node}.{gpu.index}.busy"] = "this GPU does not say"
    if not gpus:
        unknown["gpu_usage"] = "no machine that answers has a GPU"
    return {"gpu_usage": gpus or None, "memory_usage": memory}


def _ago(now: float, since: float | None) -> float | None:
    return None if since is None else now - since


def _show_choice(choice: Choice, now: float) -> dict[str, Any]:
    shown = asdict(choice)
    shown["seconds_ago"] = now - shown.pop("at")
    return shown
