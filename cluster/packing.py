"""Machines that are filled up replica by replica, and where there is room for the next.

Machines with the same left are looked at once, so that a thousand cost little more than ten.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import ceil

from cluster.inventory import Gpu, Inventory, Node
from cluster.plan import GRAIN, Place, Want

Rank = tuple[int, ...]


@dataclass(slots=True)
class GpuRoom:
    """What is left of one GPU: bytes, and ten-thousandths of it as Ray counts."""

    gpu: Gpu
    free: int
    grains: int = GRAIN

    @property
    def is_whole(self) -> bool:
        """Whether nobody holds any of it."""
        return self.grains == GRAIN and self.gpu.taken == 0


@dataclass(frozen=True, slots=True)
class Option:
    """One way to put a replica on a machine; the lower its rank the better."""

    rank: Rank
    gpus: tuple[int, ...] = ()  # places in the machine's list, not indices
    gpu_bytes: int = 0
    is_beside_strangers: bool = False  # who may want more any time


class Room:
    """What is left of one machine."""

    __slots__ = ("changes", "cpus", "gpus", "memory", "node", "number", "state")

    def __init__(self, node: Node, number: int) -> None:
        self.node = node
        self.number = number
        self.cpus = int(round(node.cpus * GRAIN, 3))
        self.memory = node.memory
        self.gpus = [GpuRoom(gpu, gpu.free) for gpu in node.gpus]
        self.changes = 0
        self.state = 0  # equal in rooms with the same left

    def describe(self) -> tuple[object, ...]:
        """What decides which options it has."""
        gpus = tuple((one.gpu.model, one.gpu.memory, one.gpu.taken, one.free, one.grains) for one in self.gpus)
        return (self.cpus, self.memory, gpus)

    def has_host(self, want: Want) -> bool:
        return self.memory >= want.memory and self.cpus >= ceil(round(want.cpus * GRAIN, 3))

    def holds(self, want: Want, gpus: Sequence[int]) -> bool:
        """Whether a replica fits on exactly these of its GPUs."""
        if len(gpus) != want.gpus or not self.has_host(want):
            return False
        if not gpus:
            return want.works_on_host
        rooms = [self.gpus[place] for place in gpus]
        if len({(one.gpu.model, one.gpu.memory) for one in rooms}) > 1 or not want.works_in(rooms[0].gpu.memory):
            return False
        memory = rooms[0].gpu.memory
        taken, grains = want.taken_of(memory), want.grains_of(memory)
        return all(
            one.free >= taken and one.grains >= grains and (len(gpus) == 1 or one.is_whole) for one in rooms
        )  # fmt: skip

    def options(self, want: Want) -> Iterator[Option]:
        """Every way to put a replica here, of GPUs that are alike only one."""
        if not self.has_host(want):
            return
        if want.gpus == 0:
            if want.works_on_host:
                yield Option((-self.memory,))
        elif want.gpus == 1:
            yield from self._options_of_one(want)
        else:
            yield from self._options_of_several(want)

    def _options_of_one(self, want: Want) -> Iterator[Option]:
        """Best a GPU that is in use already and then full; one that strangers hold comes last."""
        seen = set()
        for place, room in enumerate(self.gpus):
            memory = room.gpu.memory
            alike = (memory, room.gpu.taken > 0, room.free, room.grains)
            if alike in seen or room.grains <= 0:
                continue
            seen.add(alike)
            taken = want.taken_of(memory)
            if taken <= room.free and want.grains_of(memory) <= room.grains and want.works_in(memory):
                rank = (room.grains == GRAIN, room.free - taken, room.grains)
                yield Option(rank, (place,), taken, room.gpu.taken > 0)

    def _options_of_several(self, want: Want) -> Iterator[Option]:
        """GPUs of one kind, which nobody holds; best where few more of them are left."""
        kinds: dict[tuple[str, int], list[int]] = {}
        for place, room in enumerate(self.gpus):
            if room.is_whole:
                kinds.setdefault((room.gpu.model, room.gpu.memory), []).append(place)
        for (_, memory), whole in kinds.items():
            if len(whole) >= want.gpus and want.works_in(memory):
                yield Option((len(whole) - want.gpus, memory), tuple(whole[: want.gpus]), want.taken_of(memory))


class Packing:
    """Machines, filled up replica by replica."""

    def __init__(self, inventory: Inventory) -> None:
        self.rooms = [Room(node, number) for number, node in enumerate(inventory.nodes)]
        self.room_of = {room.node.name: room for room in self.rooms}
        self.places: dict[str, dict[int, Place]] = {}
        self._on: Counter[tuple[str, str]] = Counter()
        self._states: dict[tuple[object, ...], int] = {}
        self._options: dict[tuple[str, int], list[Option]] = {}
        for room in self.rooms:
            self._note(room)

    def _note(self, room: Room) -> None:
        room.changes += 1
        room.state = self._states.setdefault(room.describe(), len(self._states))

    def options(self, want: Want, room: Room) -> list[Option]:
        """The ways to put a replica on a machine by what is left of it alone, the best first."""
        key = (want.name, room.state)
        found = self._options.get(key)
        if found is None:
            found = self._options[key] = sorted(room.options(want), key=lambda one: (one.is_beside_strangers, one.rank))
        return found

    def count(self, want: Want) -> int:
        """How many replicas have a place."""
        return len(self.places.get(want.name, ()))

    def count_on(self, want: Want, node: str) -> int:
        """How many replicas have a place on one machine."""
        return self._on[want.name, node]

    def has(self, want: Want, replica: int) -> bool:
        return replica in self.places.get(want.name, ())

    def next_replica(self, want: Want) -> int:
        """The lowest number that no replica has."""
        taken = self.places.get(want.name, {})
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def rooms_for(self, want: Want, replica: int) -> list[Room]:
        """The machines that a replica may be on, full or not."""
        names = want.nodes_of(replica)
        allowed = [self.room_of[name] for name in names if name in self.room_of] if names else self.rooms
        if not want.is_apart:
            return allowed
        return [room for room in allowed if not self.count_on(want, room.node.name)]

    def place(self, want: Want, replica: int) -> bool:
        """Give one replica its best place; False where there is none."""
        found = Search(self, want, self.rooms_for(want, replica)).find()
        if found is not None:
            self.take(want, replica, *found)
        return found is not None

    def choices(self, want: Want) -> tuple[Want, int, list[tuple["Room", Option]]]:
        """Every place of the replica that has the fewest, the best first; all are alike but for `nodes_of_each`."""
        missing = [replica for replica in range(want.least) if not self.has(want, replica)]
        found = []
        for replica in missing if want.nodes_of_each else [self.next_replica(want)]:
            rooms = self.rooms_for(want, replica)
            found.append((want, replica, [(room, option) for room in rooms for option in self.options(want, room)]))
        want, replica, choices = min(found, key=lambda one: len(one[2]))
        choices.sort(key=lambda one: (one[1].is_beside_strangers, self.count_on(want, one[0].node.name), one[1].rank))
        return want, replica, choices

    def state(self, wants: Sequence[Want]) -> tuple[object, ...]:
        """What decides where replicas of these wants can still go."""
        apart = tuple(
            tuple(place.node for place in self.places.get(want.name, {}).values())
            for want in wants if want.is_apart
        )  # fmt: skip
        numbered = tuple(tuple(self.places.get(want.name, ())) for want in wants if want.nodes_of_each)
        counts = tuple((want.name, self.count(want)) for want in wants)
        return tuple(room.state for room in self.rooms), counts, apart, numbered

    def take(self, want: Want, replica: int, room: Room, option: Option) -> None:
        """Give a replica its place."""
        memory = room.gpus[option.gpus[0]].gpu.memory if option.gpus else 0
        grains = want.grains_of(memory) if option.gpus else 0
        indices = tuple(room.gpus[place].gpu.index for place in option.gpus)
        place = Place(
            want.name, replica, room.node.name, indices, option.gpu_bytes, want.cache_tokens_of(memory),
            grains / GRAIN, want.cpus, want.memory,
        )  # fmt: skip
        self.places.setdefault(want.name, {})[replica] = place
        self._on[want.name, room.node.name] += 1
        self._change(want, room, option.gpus, option.gpu_bytes, grains)

    def release(self, want: Want, replica: int) -> None:
        """Undo `take`."""
        place = self.places[want.name].pop(replica)
        self._on[want.name, place.node] -= 1
        room = self.room_of[place.node]
        gpus = [number for number, one in enumerate(room.gpus) if one.gpu.index in place.gpus]
        self._change(want, room, gpus, -place.gpu_bytes, -round(place.gpu_share * GRAIN), -1)

    def release_all(self, want: Want) -> None:
        """Undo `take` for every replica."""
        for replica in tuple(self.places.get(want.name, ())):
            self.release(want, replica)

    def _change(self, want: Want, room: Room, gpus: Sequence[int], taken: int, grains: int, sign: int = 1) -> None:
        room.cpus -= sign * ceil(round(want.cpus * GRAIN, 3))
        room.memory -= sign * want.memory
        for number in gpus:
            room.gpus[number].free -= taken
            room.gpus[number].grains -= grains
        self._note(room)

    def keep(self, want: Want, place: Place) -> bool:
        """Leave a replica where it is, if it still fits there; one whose number is too high now gets another."""
        room = self.room_of.get(place.node)
        is_over = place.replica >= want.most and not want.nodes_of_each
        replica = self.next_replica(want) if is_over else place.replica
        if room is None or replica >= want.most or self.has(want, replica):
            return False
        by_index = {one.gpu.index: position for position, one in enumerate(room.gpus)}
        if any(index not in by_index for index in place.gpus):
            return False
        gpus = tuple(by_index[index] for index in place.gpus)
        names = want.nodes_of(replica)
        if (names and place.node not in names) or (want.is_apart and self.count_on(want, place.node)):
            return False
        if not room.holds(want, gpus):
            return False
        taken = want.taken_of(room.gpus[gpus[0]].gpu.memory) if gpus else 0
        self.take(want, replica, room, Option((), gpus, taken))
        return True


class Search:
    """The machines for the replicas of one want, the best first; ranked again once something has changed there."""

    def __init__(self, packing: Packing, want: Want, rooms: Sequence[Room]) -> None:
        self._packing, self._want = packing, want
        self._heap: list[tuple[Rank, int, int]] = []
        with_replica = {place.node for place in packing.places.get(want.name, {}).values()}
        alike: dict[int, Rank | None] = {}  # by state: most machines are
        for room in rooms:
            if room.node.name in with_replica:
                rank = self._rank(room)
            else:
                if room.state not in alike:
                    alike[room.state] = self._rank(room)
                rank = alike[room.state]
            if rank is not None:
                self._heap.append((rank, room.number, room.changes))
        heapify(self._heap)

    def _rank(self, room: Room) -> Rank | None:
        options = self._packing.options(self._want, room)
        count = self._packing.count_on(self._want, room.node.name)
        if not options or (count and self._want.is_apart):
            return None
        return (options[0].is_beside_strangers, count, *options[0].rank)

    def find(self) -> tuple[Room, Option] | None:
        """The best place now, None where no machine has one."""
        while self._heap:
            _, number, changes = self._heap[0]
            room = self._packing.rooms[number]
            if room.changes == changes:
                return room, self._packing.options(self._want, room)[0]
            rank = self._rank(room)
            if rank is None:
                heappop(self._heap)
            else:
                heapreplace(self._heap, (rank, number, room.changes))
        return None
