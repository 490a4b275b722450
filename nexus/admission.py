"""Who works now and who waits: bounded places, interactive requests before bulk, and the same chance for everyone.

A free place goes to an interactive request before a bulk one, and among equals to the credential that holds the fewest
places, by turns. No credential holds more than its share of the places, nor bulk work more than its own. Where the
queue is full, whoever has the most waiting loses its latest one (longest queue drop: McKenney, Stochastic fairness
queueing, 1990), so a flood crowds out itself. Nobody waits for long: better a quick no than an answer too late.

All of this belongs to one event loop.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nexus.errors import Overloaded

Caller = Hashable  # a tenant and its credential
Kind = Literal["interactive", "bulk"]
KINDS: tuple[Kind, Kind] = ("interactive", "bulk")  # in the order of their turn


@dataclass(slots=True)
class Place:
    """A place at work, held until it is left; to leave twice is to leave once."""

    caller: Caller
    kind: Kind
    _admission: "Admission"
    _is_held: bool = True

    def leave(self) -> None:
        if self._is_held:
            self._is_held = False
            self._admission._free(self.caller, self.kind)


@dataclass(slots=True, eq=False)
class _Waiter:
    caller: Caller
    kind: Kind
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """The places of one gateway."""

    def __init__(
        self, places: int, waiting: int, share: float, bulk_share: float, wait_seconds: Mapping[Kind, float]
    ) -> None:
        """So many at work, so many waiting, each no longer than `wait_seconds`.

        One credential has at most `share` of the places, bulk work at most `bulk_share`: both in (0, 1].
        """
        self._places, self._most_waiting, self._seconds = places, waiting, wait_seconds
        self._each, self._bulk = max(1, int(places * share)), max(1, int(places * bulk_share))
        self._held: Counter[Caller] = Counter()  # places by caller
        self._kinds: Counter[Kind] = Counter()  # places by kind
        self._queues: dict[Kind, OrderedDict[Caller, deque[_Waiter]]] = {kind: OrderedDict() for kind in KINDS}

    @property
    def working(self) -> int:
        return self._kinds.total()

    @property
    def waiting(self) -> int:
        return sum(1 for _ in self._waiters())

    async def enter(self, caller: Caller, kind: Kind) -> Place:
        """A place, as soon as it is this one's turn. Raises Overloaded where there is no hope of one."""
        if self._may_work(caller, kind):
            return self._take(caller, kind)
        if self.waiting >= self._most_waiting:
            self._make_room(caller, kind)
        waiter = _Waiter(caller, kind)
        self._queues[kind].setdefault(caller, deque()).append(waiter)
        try:
            async with asyncio.timeout(self._seconds[kind]):
                await waiter.turn
        except TimeoutError:
            if not _has_turn(waiter):
                self._remove(waiter)
                raise _full() from None
        except (asyncio.CancelledError, Overloaded):  # it leaves, or was sent away
            self._give_up(waiter)
            raise
        return Place(caller, kind, self)

    def _may_work(self, caller: Caller, kind: Kind) -> bool:
        is_free = self.working < self._places and self._held[caller] < self._each
        return is_free and (kind != "bulk" or self._kinds["bulk"] < self._bulk)

    def _take(self, caller: Caller, kind: Kind) -> Place:
        self._held[caller] += 1
        self._kinds[kind] += 1
        return Place(caller, kind, self)

    def _free(self, caller: Caller, kind: Kind) -> None:
        self._kinds[kind] -= 1
        self._held[caller] -= 1
        if not self._held[caller]:
            del self._held[caller]
        while (waiter := self._next()) is not None:
            self._queues[waiter.kind].move_to_end(waiter.caller)
            self._remove(waiter)
            if not waiter.turn.done():  # it is, where whoever waited has just left
                self._take(waiter.caller, waiter.kind)
                waiter.turn.set_result(None)

    def _next(self) -> _Waiter | None:
        """Whose turn it is, if there is a place for anyone who waits."""
        for kind in KINDS:
            able = [caller for caller in self._queues[kind] if self._may_work(caller, kind)]
            if able:
                return self._queues[kind][min(able, key=lambda caller: self._held[caller])][0]
        return None

    def _make_room(self, caller: Caller, kind: Kind) -> None:
        """Send one away who has more waiting than this one would, or bulk work for an interactive request."""
        victims = self._queues["bulk"] if kind == "interactive" and self._queues["bulk"] else self._queues[kind]
        longest = max(victims.values(), key=len, default=None)
        mine = len(self._queues[kind].get(caller, ()))
        if longest is None or (longest[-1].kind == kind and len(longest) <= mine + 1):
            raise _full()
        dropped = longest[-1]
        self._remove(dropped)
        if not dropped.turn.done():
            dropped.turn.set_exception(_full())

    def _give_up(self, waiter: _Waiter) -> None:
        """Of one who leaves, or was sent away: neither its place in the queue nor one at work stays taken."""
        if _has_turn(waiter):
            self._free(waiter.caller, waiter.kind)
        else:
            self._remove(waiter)

    def _remove(self, waiter: _Waiter) -> None:
        queue = self._queues[waiter.kind].get(waiter.caller, deque())
        if waiter in queue:
            queue.remove(waiter)
        if not queue:
            self._queues[waiter.kind].pop(waiter.caller, None)

    def _waiters(self) -> Iterator[_Waiter]:
        for queues in self._queues.values():
            for queue in queues.values():
                yield from queue


def _has_turn(waiter: _Waiter) -> bool:
    turn = waiter.turn
    return turn.done() and not turn.cancelled() and turn.exception() is None


def _full() -> Overloaded:
    return Overloaded("every place is taken, and so is the queue; try again in a moment")
