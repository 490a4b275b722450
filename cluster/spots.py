"""A plan by machines: what of each model is to run where, as one deployment each."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.placement import Place, Plan
from nexus.config import NODE_LABEL, Replicas


@dataclass(frozen=True, slots=True)
class Spot:
    """What of a model is to run on one machine: so many replicas, each with a share of so many GPUs.

    Without a plan there is one spot, on no machine in particular.
    """

    node: str = ""
    least: int = 1
    most: int = 1
    gpus: int = 0
    share: float = 0.0  # of each of its GPUs
    bytes: int = 0  # of each

    def name(self, want: str) -> str:
        """Of the deployment there."""
        return f"{want}@{self.node}" if self.node else want

    def labels(self) -> Mapping[str, str]:
        """Those that its machine must have."""
        return {NODE_LABEL: self.node} if self.node else {}


def spots(want: str, replicas: Replicas, plan: Plan | None) -> list[Spot]:
    """Where a model's replicas go. Those that it may have beyond its least come and go with what is asked of them."""
    if plan is None:
        return [Spot(least=replicas.least, most=max(replicas.least, replicas.most))]
    found: dict[str, list[Place]] = {}
    for place in plan.places:
        if place.want == want:
            found.setdefault(place.node, []).append(place)
    return [
        Spot(
            node,
            max(1, sum(place.replica < replicas.least for place in places)),
            len(places),
            len(places[0].gpus),
            max(place.gpu_share for place in places),  # where its GPUs differ, enough for each
            max(place.gpu_bytes for place in places),
        )
        for node, places in found.items()
    ]
