"""What `/metrics` and `/report` are made of: what every machine counted, and how each of them does.

A machine that is away keeps the counts that it told last; what it does at this moment nobody knows, so nothing is said
of that but that it is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.core import Metric

from cluster.client import Absent
from cluster.inventory import LOCAL
from cluster.meter import Vitals, tell
from cluster.raft import Status
from deployments.cluster_state import Agreed
from nexus import counts, telemetry
from nexus.counts import Counts
from nexus.errors import NexusError

if TYPE_CHECKING:
    from deployments.gateway import Lent

PATIENCE_SECONDS = 4.0  # for each part, all at once; Prometheus waits for ten
MACHINES = "machines"  # in the folder of counts: what the others told last


@dataclass(frozen=True, slots=True)
class Measured:
    """The counts of all machines, and what each tells of itself; None of one that is away."""

    counted: Sequence[Metric]
    told: Mapping[str, Vitals | None]


async def measure(here: Lent) -> Measured:
    """Ask every machine."""
    told = await ask(here)
    counted = await asyncio.to_thread(_add_up, told, here.config.ray.head or LOCAL)
    return Measured(counted, told)


async def ask(here: Lent) -> Mapping[str, Vitals | None]:
    """What each machine tells. Where nobody tells of the others in time, this one still tells of itself."""
    told: Mapping[str, Vitals | None] | None = None
    if here.observer is not None:
        with suppress(NexusError, TimeoutError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                told = await here.observer.told()
    if told is None:
        head = here.config.ray.head or LOCAL
        told = {head: await asyncio.to_thread(tell, head, here.config.home)}
    return {**dict.fromkeys(here.config.nodes), **told}


def _add_up(told: Mapping[str, Vitals | None], head: str) -> Sequence[Metric]:
    own = told.get(head)
    if telemetry.FOLDER is None or own is None or own.reading is None:
        return telemetry.families()
    folder = telemetry.FOLDER / MACHINES
    others: list[Counts] = [
        counts.keep(folder, node, None if one is None else one.reading) for node, one in told.items() if node != head
    ]
    return counts.families(counts.add(own.reading.counts, *others))


async def states(here: Lent, told: Mapping[str, Vitals | None]) -> telemetry.States:
    """What is so now. What cannot be had in time is left out."""
    shown = telemetry.States()
    agreed, voters = await asyncio.gather(_agreed(here), _voters(here))
    for node, one in told.items():
        shown.set("nexus_node_up", one is not None, node)
        if one is not None:
            _show_machine(shown, node, one, agreed)
    if voters is not None:
        _show_voters(shown, voters)
    return shown


async def _agreed(here: Lent) -> Agreed | None:
    with suppress(NexusError, TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            return None if here.observer is None else await here.observer.agreed()
    return None


async def _voters(here: Lent) -> Sequence[Status | Absent] | None:
    with suppress(NexusError, TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            return None if here.operator is None else await here.operator.describe()
    return None


def _show_machine(shown: telemetry.States, node: str, told: Vitals, agreed: Agreed | None) -> None:
    sizes = {"total": told.disk, "free": told.disk_free}, {"total": told.node.memory, "used": told.memory_used}
    for name, size in zip(("nexus_disk_bytes", "nexus_memory_bytes"), sizes, strict=True):
        for kind, value in size.items():
            shown.set(name, value, node, kind)
    places = agreed.plan.places if agreed is not None and agreed.plan is not None else ()
    for gpu in told.node.gpus:
        planned = sum(place.gpu_bytes for place in places if place.node == node and gpu.index in place.gpus)
        kinds = {"total": gpu.memory, "used": gpu.used, "taken": gpu.taken}
        for kind, value in {**kinds, "planned": planned}.items() if agreed is not None else kinds.items():
            shown.set("gpu_memory_bytes", value, node, str(gpu.index), kind)
        if gpu.busy is not None:
            shown.set("gpu_utilization_ratio", gpu.busy, node, str(gpu.index))


def _show_voters(shown: telemetry.States, voters: Sequence[Status | Absent]) -> None:
    """Of those with a vote; a leader that most of them follow is a quorum."""
    there = [one for one in voters if isinstance(one, Status)]
    leaders = [one for one in there if one.leader == one.id]
    leader = max(leaders, key=lambda one: one.term, default=None)
    newest = max(there, key=lambda one: one.term, default=None)
    members = newest.members.voters if newest is not None else {one.id for one in voters}
    voting = [one for one in there if one.id in members]
    followers = [one for one in voting if leader is not None and (one.leader, one.term) == (leader.id, leader.term)]
    shown.set("coordinator_voters", len(members), "configured")
    shown.set("coordinator_voters", len(voting), "answering")
    shown.set("coordinator_has_quorum", 2 * len(followers) > len(members))
    if there:
        commit = max(one.commit for one in there)
        shown.set("coordinator_lag_entries", max(commit - one.applied for one in there))
