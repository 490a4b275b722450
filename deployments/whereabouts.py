"""On which machines each model is planned now: a copy of the plan in force, a second old."""

from actors.coordination import Coordination
from cluster.plan import KEY, Plan, decode


class Whereabouts:
    """Whoever asks a model asks it where it is planned; while no plan is known, anywhere."""

    def __init__(self, coordination: Coordination) -> None:
        self._coordination = coordination
        self._content: bytes | None = None
        self._places: frozenset[tuple[str, str]] = frozenset()

    def is_planned(self, want: str, node: str) -> bool:
        """Whether the plan in force has this there. Never waits."""
        content = self._coordination.peek(KEY)
        if content is None:
            return True
        if content != self._content:
            self._content, self._places = content, _places(decode(content))
        return (want, node) in self._places


def _places(plan: Plan) -> frozenset[tuple[str, str]]:
    return frozenset((place.want, place.node) for place in plan.places)
