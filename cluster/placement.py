"""What is wanted, and what there is: who goes where, or why it cannot.

The largest wants go first, each where it leaves the most for others: small ones onto GPUs that are in use already, so
that whole ones stay free; replicas of one want on different machines; last onto GPUs that strangers hold some of.
`cluster/planner.py` says what is tried, and what may be missed.
"""

from collections.abc import Sequence

from cluster.inventory import Inventory
from cluster.plan import Footprint, GpuLeft, Moves, NodeLeft, Place, Plan, Refusal, Want, decode, encode, left, moves
from cluster.planner import solve
from cluster.remedies import refuse

__all__ = [
    "Footprint", "GpuLeft", "Moves", "NodeLeft", "Place", "Plan", "Refusal", "Want", "decode", "encode", "left",
    "moves", "place",
]  # fmt: skip


def place(inventory: Inventory, wants: Sequence[Want], current: Plan | None = None) -> Plan:
    """A place for every want. Pure: equal arguments, equal plan; what `current` has stays where it still fits.

    Nothing moves so that there are more replicas than the least. A `current` with refusals counts for nothing.
    """
    solved = solve(inventory, wants, current)
    return Plan(solved.places(wants), refuse(inventory, wants, current, solved))
