"""How many replicas a deployment has: as many as its requests ask for, within what the plan allows.

Those that share a machine's GPUs are seen together: the plan gives the machine's models so many GPUs, and who gets how
many of these is divided anew as requests come and go (cluster/shares.py).

Serve takes a policy for a whole application from a file only, which it then builds in a process of its own, without
our settings. So each deployment has a policy here. Serve asks them all in its controller, one after another, ten times
a second; there they find one and the same `Shares`, and the divisions it makes for them agree.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from pydantic import TypeAdapter

from actors.pressure import watch
from cluster.plan import Plan
from cluster.shares import Claim, Kind, Pool, shares_of
from cluster.spots import spots
from nexus.config import Replicas, Scaling
from nexus.pressure import never

HAIR = 1e-6  # by which a sum of shares may be short of a whole
POLICY = "deployments.autoscaling:Share"
KINDS: Mapping[str, Kind] = {"generator": "chat", "reranker": "chat", "embedder": "embed"}  # by the first word


def kind_of(want: str) -> Kind:
    """Whom a model's replicas serve: an answer waits for generators and rerankers; the documents' embedder is bulk."""
    return "bulk" if want == "embedder" else KINDS[want.partition("-")[0]]


def autoscaling(least: int, most: int, target: float, down_seconds: float = Scaling().down_seconds) -> dict[str, Any]:
    """Serve's `autoscaling_config` for `target` requests per replica, those that wait for one among them."""
    return {
        "min_replicas": least,
        "max_replicas": max(least, most),
        "target_ongoing_requests": target,
        "upscale_delay_s": 0,
        "downscale_delay_s": down_seconds,
    }


def sharing(pool: Pool, name: str, is_watching: bool) -> dict[str, Any]:
    """Serve's `autoscaling_config` for a deployment of a pool; `is_watching`, whether chats wait too long counts."""
    claim = pool.claim(name)
    assert claim is not None
    kwargs = {"name": name, "pool": asdict(pool), "is_watching": is_watching}
    return {
        **autoscaling(claim.least, claim.most, claim.target, 0),  # the policy has its own delay
        "policy": {"policy_function": POLICY, "policy_kwargs": kwargs},
    }


def pools(wants: Mapping[str, Replicas], plan: Plan | None, down_seconds: float) -> dict[str, Pool]:
    """By machine, the GPUs that the plan gives to models whose replicas may change in number, and who may have them.

    No replica more than the settings allow of a model, over all machines; and on none more than find room there while
    everybody else has its least.
    """
    shared: dict[str, list[Claim]] = {}
    gpus: dict[str, float] = {}
    for want, replicas in wants.items():
        there = [spot for spot in spots(want, replicas, plan) if spot.gpus and replicas.most > spot.least]
        more, rest = divmod(max(0, replicas.most - sum(spot.most for spot in there)), max(1, len(there)))
        for number, spot in enumerate(there):
            most, size = spot.most + more + (number < rest), spot.gpus * spot.share
            claim = Claim(spot.name(want), kind_of(want), spot.least, most, size, replicas.target)
            shared.setdefault(spot.node, []).append(claim)
            gpus[spot.node] = gpus.get(spot.node, 0.0) + spot.most * size
    return {node: _fitted(gpus[node], claims, down_seconds) for node, claims in shared.items()}


def _fitted(gpus: float, claims: list[Claim], down_seconds: float) -> Pool:
    """A pool in which nobody may have more than there is room for."""
    room = gpus - sum(claim.least * claim.gpus for claim in claims)
    fitted = [replace(one, most=min(one.most, one.least + int(room / one.gpus + HAIR))) for one in claims]
    return Pool(round(gpus, 4), tuple(fitted), down_seconds)


class Share:
    """Serve's policy of one deployment: the part of a pool that falls to it."""

    def __init__(self, name: str, pool: dict[str, Any], is_watching: bool) -> None:
        self._name = name
        self._shares = shares_of(TypeAdapter(Pool).validate_python(pool))
        self._is_pressed: Callable[[], bool] = watch() if is_watching else never

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context` is Serve's AutoscalingContext of the deployment."""
        current, requests = context.target_num_replicas, context.total_num_requests
        return self._shares.ask(self._name, current, requests, time.monotonic(), self._is_pressed()), {}
