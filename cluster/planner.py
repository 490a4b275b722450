"""Who goes where: the largest wants first, and what has a place keeps it.

When something finds none, more and more is given up, in this order: one place, the replicas past the least, the order
in which places are chosen (those without one go first, `ROUNDS` times), every place there is.

What this may miss: where replicas fit only in one particular arrangement, these orders may not find it. Up to
`SEARCHED` replicas times machines every arrangement is looked at, `STEPS` of them at most.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from cluster.inventory import Inventory
from cluster.packing import Packing, Search
from cluster.plan import Place, Plan, Want

ROUNDS = 4
SEARCHED = 400
STEPS = 2_000
LARGE = 5_000  # replicas times machines from which on two rounds have to do

Preferred = Mapping[str, Sequence[Place]]  # by want


@dataclass(frozen=True, slots=True)
class Solved:
    """Machines with what found a place, and the names of the wants that did not get their least."""

    packing: Packing
    missing: tuple[str, ...] = ()
    alone: frozenset[str] = frozenset()  # those that find none even when nothing else is there

    def places(self, wants: Sequence[Want]) -> tuple[Place, ...]:
        """In the order of the wants and of their replicas."""
        of = self.packing.places
        return tuple(of[want.name][number] for want in wants for number in sorted(of.get(want.name, ())))


def solve(inventory: Inventory, wants: Sequence[Want], current: Plan | None = None) -> Solved:
    """The first attempt that leaves no want without its least, or the one that leaves the fewest."""
    order = _by_size(inventory, wants)
    before = {} if current is None or current.refusals else _by_want(order, current)
    first = fill(inventory, order, before)
    if not first.missing:
        return _fill_up(first, wants, before)
    alone = _hopeless(inventory, wants)
    best: Solved | None = None
    for attempt in _attempts(inventory, [want for want in order if want.name not in alone], before):
        if best is None or len(attempt.missing) < len(best.missing):
            best = attempt
        if not best.missing:
            break
    assert best is not None
    if not best.missing and not alone:
        return _fill_up(best, wants, before)
    missing = tuple(want.name for want in wants if want.name in alone or want.name in best.missing)
    return Solved(best.packing, missing, alone)


def fits_beside(inventory: Inventory, wants: Sequence[Want], want: Want, places: Sequence[Place]) -> bool:
    """Whether there is room for the least of one want where the others have these places."""
    kept = _by_want([other for other in wants if other.name != want.name], Plan(tuple(places)))
    return not fill(
        inventory, [*(replace(other, least=0) for other in wants if other.name in kept), want], kept
    ).missing


def _by_size(inventory: Inventory, wants: Sequence[Want]) -> list[Want]:
    """The largest first: by GPUs, by their bytes, by host memory; of equal ones those with fewer machines."""
    memory = max((gpu.memory for node in inventory.nodes for gpu in node.gpus), default=0)

    def size(want: Want) -> tuple[float | str, ...]:
        taken = want.taken_of(memory) if want.gpus else 0
        return (-want.gpus, -taken, -want.memory, -want.cpus, len(want.nodes) or len(inventory.nodes), want.name)

    return sorted(wants, key=size)


def _by_want(order: Sequence[Want], plan: Plan) -> dict[str, list[Place]]:
    """The places of wants that are still there, in this order."""
    found: dict[str, list[Place]] = {want.name: [] for want in order}
    for place in sorted(plan.places, key=lambda one: one.replica):
        if place.want in found:
            found[place.want].append(place)
    return found


def fits_alone(inventory: Inventory, want: Want) -> bool:
    """Whether there is room for its least while nothing else is there."""
    return not _hopeless(inventory, [want])


def _hopeless(inventory: Inventory, wants: Sequence[Want]) -> frozenset[str]:
    """The names of those whose least finds no room even while nothing else is there."""
    packing = Packing(inventory)
    found = []
    for want in wants:  # of one want every order is as good, unless its replicas have machines of their own
        if not place_least(packing, want) and not (want.nodes_of_each and _search_all(inventory, [want])):
            found.append(want.name)
        packing.release_all(want)
    return frozenset(found)


def _attempts(inventory: Inventory, order: Sequence[Want], before: Preferred) -> Iterator[Solved]:
    """From the one that moves the least to the one that moves everything."""
    is_small = sum(want.least for want in order) * len(inventory.nodes) <= SEARCHED
    yield fill(inventory, order, before)
    if any(before.values()):
        if is_small:
            for kept in _without_one(order, before):
                yield fill(inventory, order, kept)
        yield fill(inventory, order, before, is_least_kept=True)
        yield from _in_many_orders(inventory, order, before)
    yield from _in_many_orders(inventory, order, {})
    if is_small and (packing := _search_all(inventory, order)):
        yield Solved(packing)


def _without_one(order: Sequence[Want], before: Preferred) -> Iterator[Preferred]:
    """All places but one: first each of those past the least, then each of the others, the smallest first."""
    for is_past in (True, False):
        for want in reversed(order):
            places = before[want.name]
            for given_up in places[want.least :] if is_past else places[: want.least]:
                yield {**before, want.name: [place for place in places if place is not given_up]}


def _in_many_orders(inventory: Inventory, order: Sequence[Want], preferred: Preferred) -> Iterator[Solved]:
    """By size, and those first that have the fewest machines; what finds no place goes first the next time."""
    is_large = sum(want.least for want in order) * len(inventory.nodes) > LARGE
    for start in (order, sorted(order, key=lambda want: len(want.nodes) or len(inventory.nodes))):
        turn = list(start)
        for _ in range(2 if is_large else ROUNDS):
            solved = fill(inventory, turn, {}, preferred)
            yield solved
            turn.sort(key=lambda want: want.name not in solved.missing)


def fill(
    inventory: Inventory, order: Sequence[Want], kept: Preferred, preferred: Preferred = MappingProxyType({}),
    is_least_kept: bool = False,
) -> Solved:  # fmt: skip
    """What is kept first, then the least of every want in this order, where it is preferred if that is free.

    With `is_least_kept` no more than its least is kept of any. A want that does not get its least gets nothing: the
    others may have use for it.
    """
    packing = Packing(inventory)
    for want in order:
        for one in kept.get(want.name, ()):
            if not is_least_kept or packing.count(want) < want.least:
                packing.keep(want, one)
    missing = []
    for want in order:
        for one in preferred.get(want.name, ()):
            if packing.count(want) < want.least:
                packing.keep(want, one)
        if not place_least(packing, want):
            missing.append(want.name)
            packing.release_all(want)
    return Solved(packing, tuple(missing))


def place_least(packing: Packing, want: Want) -> bool:
    """Whether all replicas that there must be found a place."""
    if want.nodes_of_each:
        missing = [replica for replica in range(want.least) if not packing.has(want, replica)]
        narrow_first = sorted(missing, key=lambda replica: len(want.nodes_of(replica)) or len(packing.rooms))
        return all([packing.place(want, replica) for replica in narrow_first])
    search = Search(packing, want, packing.rooms_for(want, 0))
    while packing.count(want) < want.least:
        found = search.find()
        if found is None:
            return False
        packing.take(want, packing.next_replica(want), *found)
    return True


def _fill_up(solved: Solved, wants: Sequence[Want], before: Preferred) -> Solved:
    """More replicas than the least: those that there were, then one of each want in turn while there is room."""
    packing = solved.packing
    for want in wants:
        for one in before.get(want.name, ()):
            packing.keep(want, one)
    more = [want for want in wants if packing.count(want) < want.most]
    growing = [(want, Search(packing, want, packing.rooms_for(want, 0))) for want in more]
    while growing:
        growing = [(want, search) for want, search in growing if _grow(packing, want, search)]
    return solved


def _grow(packing: Packing, want: Want, search: Search) -> bool:
    """One replica more; False when there can be no other after it."""
    if packing.count(want) == want.most:
        return False
    replica = packing.next_replica(want)
    if want.nodes_of_each:
        return packing.place(want, replica)
    found = search.find()
    if found is not None:
        packing.take(want, replica, *found)
    return found is not None


def _search_all(inventory: Inventory, wants: Sequence[Want]) -> Packing | None:
    """The first arrangement that gives all their least, found by going back as often as `STEPS` allow."""
    packing = Packing(inventory)
    seen: set[object] = set()
    steps = 0

    def go_on() -> bool:
        nonlocal steps
        open_wants = [want for want in wants if packing.count(want) < want.least]
        if not open_wants:
            return True
        reached = packing.state(open_wants)
        if reached in seen:
            return False
        seen.add(reached)
        want, replica, choices = min((packing.choices(want) for want in open_wants), key=lambda one: len(one[2]))
        for room, option in choices:
            if steps >= STEPS:
                return False
            steps += 1
            packing.take(want, replica, room, option)
            if go_on():
                return True
            packing.release(want, replica)
        return False

    return packing if go_on() else None
