"""The linearizability checker: histories with a known verdict, made by hand, by a store, and by chance."""

import math
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest

from tests import linearizability
from tests.linearizability import FAILED, UNKNOWN, Kind, Operation, Verdict, check, check_versions, linearize

PUT, GET, CAS, DELETE = Kind.PUT, Kind.GET, Kind.COMPARE_AND_SET, Kind.DELETE
LEGAL, ILLEGAL = Verdict.LEGAL, Verdict.ILLEGAL


def history(*rows: tuple[Any, ...]) -> list[Operation]:
    """Of (called, returned or None, kind, argument, result[, key]), each by a client of its own."""
    return [
        Operation(client, *(key or ("k",)), kind, argument, result, called, math.inf if returned is None else returned)
        for client, (called, returned, kind, argument, result, *key) in enumerate(rows, start=1)
    ]


X1 = (1, 2, PUT, "x", 1)  # the first write of most histories below
Y2 = (3, 4, PUT, "y", 2)

BY_HAND = {
    "nothing": (LEGAL, LEGAL, []),
    "one after the other": (
        LEGAL, LEGAL,
        [X1, (3, 4, GET, None, ("x", 1)), (5, 6, DELETE, None, True), (7, 8, GET, None, None)],
    ),
    "read of nothing at first": (
        LEGAL, LEGAL,
        [(1, 2, GET, None, None), (3, 4, DELETE, None, False), (5, 6, PUT, "x", 1)],
    ),
    "stale read": (ILLEGAL, ILLEGAL, [X1, Y2, (5, 6, GET, None, ("x", 1))]),
    "stale nothing": (ILLEGAL, ILLEGAL, [X1, (3, 4, GET, None, None)]),
    "reads go back": (
        ILLEGAL, ILLEGAL,
        [X1, (3, 10, PUT, "y", 2), (4, 5, GET, None, ("y", 2)), (6, 7, GET, None, ("x", 1))],
    ),
    "read from the future": (ILLEGAL, ILLEGAL, [(1, 2, GET, None, ("x", 1)), (3, 4, PUT, "x", 1)]),
    "value never written": (ILLEGAL, ILLEGAL, [X1, (3, 4, GET, None, ("z", 1))]),
    "revision never given": (ILLEGAL, ILLEGAL, [X1, (3, 4, GET, None, ("x", 2))]),
    "reads beside a write": (
        LEGAL, LEGAL,
        [X1, (3, 10, PUT, "y", 2), (4, 5, GET, None, ("x", 1)), (6, 7, GET, None, ("y", 2)),
         (4, 9, GET, None, ("x", 1))],
    ),
    "a moment shared is concurrent": (LEGAL, LEGAL, [X1, (2, 3, GET, None, None)]),
    "the longer call went first": (
        LEGAL, LEGAL,
        [(1, 10, PUT, "x", 1), (2, 9, PUT, "y", 2), (11, 12, GET, None, ("y", 2))],
    ),
    "writes told backwards": (ILLEGAL, ILLEGAL, [(1, 2, PUT, "x", 2), (3, 4, PUT, "y", 1)]),
    "one revision twice": (ILLEGAL, ILLEGAL, [(1, 4, PUT, "x", 1), (2, 3, PUT, "y", 1)]),
    "lost update": (
        ILLEGAL, LEGAL,
        [X1, (3, 6, PUT, "y", 2), (4, 7, CAS, (1, "z"), 3), (8, 9, GET, None, ("z", 3)), (5, 5, GET, None, ("y", 2))],
    ),
    "both won": (ILLEGAL, ILLEGAL, [X1, (3, 6, CAS, (1, "y"), 2), (4, 5, CAS, (1, "z"), 3)]),
    "both created": (ILLEGAL, LEGAL, [(1, 4, CAS, (0, "y"), 1), (2, 3, CAS, (0, "z"), 2)]),
    "created anew after a delete": (
        LEGAL, LEGAL,
        [(1, 6, CAS, (0, "y"), 1), (2, 5, CAS, (0, "z"), 3), (3, 4, DELETE, None, True)],
    ),
    "both lost": (ILLEGAL, LEGAL, [X1, (3, 6, CAS, (1, "y"), None), (4, 5, CAS, (1, "z"), None)]),
    "one won": (LEGAL, LEGAL, [X1, (3, 6, CAS, (1, "y"), None), (4, 5, CAS, (1, "z"), 2), (7, 8, GET, None, ("z", 2))]),
    "won without a higher revision": (ILLEGAL, ILLEGAL, [(1, 4, PUT, "x", 2), (2, 3, CAS, (2, "y"), 1)]),
    "won against nothing": (ILLEGAL, LEGAL, [(1, 2, CAS, (4, "y"), 5)]),
    "applied twice": (
        ILLEGAL, LEGAL,
        [(1, None, PUT, "x", UNKNOWN), (2, 3, GET, None, ("x", 1)), (4, 5, PUT, "y", 2), (6, 7, GET, None, ("x", 3))],
    ),
    "deleted twice": (ILLEGAL, LEGAL, [X1, (3, 6, DELETE, None, True), (4, 5, DELETE, None, True)]),
    "deleted, and back again": (ILLEGAL, LEGAL, [X1, (3, 4, DELETE, None, True), (5, 6, GET, None, ("x", 1))]),
    "delete missed what was there": (ILLEGAL, LEGAL, [X1, (3, 4, DELETE, None, False)]),
    "written after a delete, at an old revision": (
        ILLEGAL, ILLEGAL, [(1, 2, PUT, "x", 5), (3, 4, DELETE, None, True), (5, 6, PUT, "y", 4)],
    ),
    "a lost answer appears late": (
        LEGAL, LEGAL,
        [X1, (3, None, PUT, "y", UNKNOWN), (4, 5, GET, None, ("x", 1)), (6, 7, GET, None, ("y", 2))],
    ),
    "a lost answer never appears": (LEGAL, LEGAL, [X1, (3, None, PUT, "y", UNKNOWN), (4, 5, GET, None, ("x", 1))]),
    "a lost answer counts for as long as it likes": (
        LEGAL, LEGAL, [X1, (3, 4, PUT, "y", UNKNOWN), (5, 6, GET, None, ("x", 1)), (7, 8, GET, None, ("y", 2))],
    ),
    "a lost answer appears and is gone again": (
        ILLEGAL, ILLEGAL,
        [X1, (3, None, PUT, "y", UNKNOWN), (4, 5, GET, None, ("y", 2)), (6, 7, GET, None, ("x", 1))],
    ),
    "a lost answer appears before it was asked": (
        ILLEGAL, ILLEGAL,
        [(1, 2, GET, None, ("y", 1)), (3, None, PUT, "y", UNKNOWN)],
    ),
    "a lost answer finds no room": (
        ILLEGAL, ILLEGAL,
        [X1, (3, 8, PUT, "y", 2), (4, None, PUT, "z", UNKNOWN), (5, 6, GET, None, ("z", 2))],
    ),
    "no room between two revisions": (
        ILLEGAL, ILLEGAL,
        [X1, (3, None, PUT, "z", UNKNOWN), (4, 5, GET, None, ("z", 2)), (6, 7, PUT, "y", 2)],
    ),
    "a lost delete took effect": (LEGAL, LEGAL, [X1, (3, None, DELETE, None, UNKNOWN), (4, 5, GET, None, None)]),
    "a lost delete took effect late": (
        LEGAL, LEGAL, [X1, (3, None, DELETE, None, UNKNOWN), (4, 5, GET, None, ("x", 1)), (6, 7, GET, None, None)],
    ),
    "a lost delete took effect twice": (
        ILLEGAL, LEGAL,
        [X1, (3, None, DELETE, None, UNKNOWN), (4, 5, GET, None, None), (6, 7, PUT, "y", 2), (8, 9, GET, None, None)],
    ),
    "a lost compare-and-set won": (LEGAL, LEGAL, [X1, (3, None, CAS, (1, "y"), UNKNOWN), (4, 5, GET, None, ("y", 2))]),
    "a lost compare-and-set came too late": (
        LEGAL, LEGAL,
        [X1, (3, None, CAS, (1, "y"), UNKNOWN), (4, 5, PUT, "z", 2)],
    ),
    "a lost compare-and-set could not have won": (
        ILLEGAL, LEGAL, [X1, Y2, (5, None, CAS, (1, "z"), UNKNOWN), (6, 7, GET, None, ("z", 3))],
    ),
    "a lost compare-and-set lost to itself": (
        LEGAL, LEGAL, [X1, (3, None, CAS, (1, "y"), UNKNOWN), (4, 5, CAS, (1, "y"), None), (6, 7, GET, None, ("y", 2))],
    ),
    "a guess at a lost revision missed": (
        LEGAL, LEGAL,
        [(1, None, PUT, "x", UNKNOWN), (2, 3, CAS, (0, "y"), None), (4, 5, CAS, (1, "y"), None),
         (6, 7, GET, None, ("x", 2))],
    ),
    "a guess at a lost revision missed what was there": (
        ILLEGAL, LEGAL,
        [(1, None, PUT, "x", UNKNOWN), (2, 3, CAS, (0, "y"), None), (4, 9, CAS, (1, "y"), None),
         (5, 8, GET, None, ("x", 1))],
    ),
    "a guess at a lost revision hit": (LEGAL, LEGAL, [(1, None, PUT, "x", UNKNOWN), (2, 3, CAS, (4, "y"), 5)]),
    "a refused write": (LEGAL, LEGAL, [X1, (3, 4, PUT, "y", FAILED), (5, 6, GET, None, ("x", 1))]),
    "a refused write appears": (ILLEGAL, ILLEGAL, [X1, (3, 4, PUT, "y", FAILED), (5, 6, GET, None, ("y", 2))]),
    "deleted beside a write": (
        LEGAL, LEGAL, [X1, (3, 8, DELETE, None, True), (4, 7, PUT, "y", 2), (9, 10, GET, None, None)],
    ),
    "one write told twice": (ILLEGAL, ILLEGAL, [(1, 4, PUT, "x", 1), (2, 3, PUT, "x", 1)]),
    "two lost answers alike": (
        LEGAL, LEGAL, [(1, None, PUT, "x", UNKNOWN), (2, 3, GET, None, ("x", 1)), (4, None, PUT, "x", UNKNOWN)],
    ),
    "a revision read is given anew": (
        ILLEGAL, ILLEGAL, [(1, None, PUT, "x", UNKNOWN), (2, 3, GET, None, ("x", 1)), (4, 5, PUT, "x", 1)],
    ),
    "a refused delete took effect": (ILLEGAL, ILLEGAL, [X1, (3, 4, DELETE, None, FAILED), (5, 6, GET, None, None)]),
    "deleted before and after": (
        LEGAL, LEGAL, [X1, (3, 4, DELETE, None, True), (5, 6, GET, None, None), (7, 8, DELETE, None, UNKNOWN)],
    ),
    "reads without an answer": (LEGAL, LEGAL, [X1, (3, 4, GET, None, FAILED), (5, None, GET, None, UNKNOWN)]),
    "two keys": (LEGAL, LEGAL, [X1, (3, 4, PUT, "y", 2, "other"), (5, 6, GET, None, ("x", 1))]),
    "each key legal, their order is not": (LEGAL, ILLEGAL, [(1, 2, PUT, "x", 5), (3, 4, PUT, "y", 3, "other")]),
    "each key legal, one revision for both": (LEGAL, ILLEGAL, [(1, 2, PUT, "x", 5), (1, 2, PUT, "x", 5, "other")]),
    "the other key is not legal": (ILLEGAL, LEGAL, [X1, (3, 4, DELETE, None, True, "other")]),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    searched, by_version, rows = BY_HAND[name]
    operations = history(*rows)
    for arrangement in (operations, operations[::-1]):
        assert check(arrangement).verdict is searched
        assert check_versions(arrangement).verdict is by_version


def test_an_explanation_shows_the_smallest_impossible_prefix() -> None:
    operations = history(
        X1,
        Y2,
        (5, 8, GET, None, ("x", 1)),
        (6, 11, PUT, "z", 3),
        (9, 10, GET, None, ("z", 3)),
        (7, 12, PUT, "x", 4, "other"),
    )
    judgement = check(operations)
    assert judgement.explanation.splitlines() == [
        "key 'k': no order explains these answers. Up to 8 there was one; none is left once client 3 is told"
        " get() -> ('x', 1)",
        "  client     called   returned  operation",
        "       1          1          2  put('x') -> 1",
        "       2          3          4  put('y') -> 2",
        "       3          5          8  get() -> ('x', 1)",
        "       4          6          -  put('z') -> ?",
    ]
    assert "revision 1 was told after 2" in check_versions(operations).explanation


def test_a_long_explanation_keeps_its_end() -> None:
    writes = [(2 * number, 2 * number + 1, PUT, "x", number) for number in range(1, 100)]
    lines = check(history(*writes, (300, 301, CAS, (98, "y"), 200))).explanation.splitlines()
    assert len(lines) == linearizability.LONGEST_TABLE + 3
    assert "80 earlier" in lines[2]
    assert "compare_and_set(98, 'y') -> 200" in lines[-1]


def test_an_operation_cannot_return_before_its_call() -> None:
    with pytest.raises(ValueError, match="before it was called"):
        Operation(1, "k", GET, None, None, 2, 1)


# All orders, by brute force: revisions of lost answers are tried one by one

Concrete = tuple[Any, int]  # the value or None, and the newest revision there ever was


def outcomes(state: Concrete, operation: Operation, top: int) -> Iterator[Concrete]:
    value, newest = state
    result, expected = operation.result, None
    if operation.kind is GET:
        if result == (None if value is None else (value, newest)):
            yield state
        return
    if operation.kind is DELETE:
        if result is UNKNOWN or result == (value is not None):
            yield None, newest
        return
    wanted = operation.argument
    if operation.kind is CAS:
        expected, wanted = operation.argument
        if expected != (0 if value is None else newest):
            if not isinstance(result, int):
                yield state
            return
    given = range(newest + 1, top) if result is UNKNOWN else [result]
    yield from ((wanted, revision) for revision in given if revision is not None and revision > newest)


def brute_force(operations: Sequence[Operation]) -> bool:
    operations = [o for o in operations if o.result is not FAILED and not (o.kind is GET and o.result is UNKNOWN)]
    named = [number for o in operations for number in (o.revision, o.argument[0] if o.kind is CAS else 0) if number]
    top = max(named, default=0) + len(operations) + 1

    def is_explained(left: Sequence[Operation], states: set[Concrete]) -> bool:
        if not states or all(o.result is UNKNOWN for o in left):
            return bool(states)
        for chosen in left:
            if not any(o.result is not UNKNOWN and o.returned < chosen.called for o in left):
                after = {new for state in states for new in outcomes(state, chosen, top)}
                if is_explained([o for o in left if o is not chosen], after):
                    return True
        return False

    return is_explained(operations, {(None, 0)})


def is_a_proof(order: Sequence[Operation], operations: Sequence[Operation]) -> bool:
    """Whether this order holds every answer, keeps real time and gives each answer; whatever found it."""
    known = {id(o) for o in operations if o.is_known}
    placed = {id(o) for o in order}
    top = 4 * len(operations) + 2
    states: set[Concrete] = {(None, 0)}
    for chosen in order:
        states = {new for state in states for new in outcomes(state, chosen, top)}
    first_return = math.inf  # of all later in the order
    for chosen in reversed(order):
        if first_return < chosen.called:
            return False
        first_return = min(first_return, chosen.returned if chosen.is_known else math.inf)
    return bool(states) and known <= placed <= {id(o) for o in operations} and len(placed) == len(order)


def scribbled(rng: random.Random) -> list[Operation]:
    """At most six operations with answers out of the air, and just few enough different ones to be right at times."""
    size = rng.randint(1, 6)
    operations = []
    for client in range(size):
        called, returned = sorted(rng.sample(range(2 * size if rng.random() < 0.5 else 30), 2))
        kind = rng.choice([PUT, PUT, GET, GET, CAS, DELETE])
        value, revision = rng.choice("xy"), rng.randint(1, 4)
        argument, result = {
            PUT: (value, client + 1 if rng.random() < 0.7 else revision),
            GET: (None, rng.choice([None, (value, revision)])),
            CAS: ((rng.randint(0, 3), value), rng.choice([None, revision + 1])),
            DELETE: (None, rng.random() < 0.5),
        }[kind]
        if rng.random() < 0.2:
            result = UNKNOWN if rng.random() < 0.8 else FAILED
        operations.append(Operation(client, "k", kind, argument, result, called, returned))
    return operations


@dataclass(eq=False)
class Flight:
    """An operation under way: asked, carried out at a moment of its own, answered or not."""

    client: int
    key: str
    kind: Kind
    argument: Any
    called: int
    result: Any = UNKNOWN
    is_done: bool = False


class Store:
    """What a perfect store does with operations that take effect one at a time."""

    def __init__(self) -> None:
        self.newest = 0
        self.kept: dict[str, tuple[str, int]] = {}
        self.versions: list[tuple[str, tuple[str, int]]] = []

    def carry_out(self, flight: Flight) -> None:
        flight.is_done = True
        there = self.kept.get(flight.key)
        if flight.kind is GET:
            flight.result = there
        elif flight.kind is DELETE:
            self.newest += there is not None
            flight.result = self.kept.pop(flight.key, None) is not None
        elif flight.kind is CAS and flight.argument[0] != (there[1] if there else 0):
            flight.result = None
        else:
            self.newest += 1
            flight.result = self.newest
            self.kept[flight.key] = (flight.argument if flight.kind is PUT else flight.argument[1], self.newest)
            self.versions.append((flight.key, self.kept[flight.key]))


def ask(rng: random.Random, store: Store, client: int, keys: str, values: str, now: int) -> Flight:
    kind = rng.choices([PUT, GET, CAS, DELETE], [3, 5, 3, 1])[0]
    key = rng.choice(keys)
    value = rng.choice(values) if values else f"value {now}"
    seen = rng.choice([0, rng.randint(0, store.newest), *[store.kept.get(key, ("", 0))[1]] * 4])
    return Flight(client, key, kind, {PUT: value, CAS: (seen, value)}.get(kind), now)


def recorded(
    rng: random.Random, length: int, clients: int, keys: str = "ab", values: str = "", lost: float = 0, idle: float = 0
) -> tuple[list[Operation], Store]:
    """What clients of a perfect store saw: each operation takes effect when chance has it; some answers get lost."""
    store, clock = Store(), count(1)
    flying: dict[int, Flight] = {}
    adrift: list[Flight] = []  # nobody waits for them: they take effect later, or never
    operations: list[Operation] = []
    begun = 0
    while begun < length or flying:
        client, now = rng.randrange(clients), next(clock)
        if adrift and rng.random() < 0.1:
            store.carry_out(adrift.pop(rng.randrange(len(adrift))))
        flight = flying.get(client)
        if flight is None:
            if begun < length and rng.random() >= idle:
                begun += 1
                flying[client] = ask(rng, store, client, keys, values, now)
            continue
        if rng.random() < lost:
            if not flight.is_done:
                adrift.append(flight)
            result = UNKNOWN
        elif not flight.is_done:
            store.carry_out(flight)
            continue
        else:
            result = flight.result
        del flying[client]
        operations.append(Operation(client, flight.key, flight.kind, flight.argument, result, flight.called, now))
    return operations, store


def with_one_read_changed(rng: random.Random, operations: Sequence[Operation], store: Store) -> list[Operation]:
    """To another version of its key, or to none."""
    reads = [number for number, o in enumerate(operations) if o.kind is GET and o.is_known]
    number = rng.choice(reads)
    read = operations[number]
    others = {version for key, version in store.versions if key == read.key} | {None, ("never written", 1)}
    result = rng.choice(sorted(others - {read.result}, key=repr))
    return [*operations[:number], replace(read, result=result), *operations[number + 1 :]]


def keys_of(operations: Sequence[Operation]) -> list[list[Operation]]:
    return [[o for o in operations if o.key == key] for key in sorted({o.key for o in operations})]


def test_busy_clients_of_a_perfect_store_are_legal() -> None:
    for seed in range(200):
        operations, _ = recorded(random.Random(seed), length=60, clients=6, values="xyz", lost=0.08)
        for part in keys_of(operations):
            order = linearize(part)
            assert order is not None, f"seed {seed}: {check(part).explanation}"
            assert is_a_proof(order, part), f"seed {seed}"
        assert check_versions(operations).verdict is LEGAL, f"seed {seed}: {check_versions(operations).explanation}"


def test_a_thousand_histories_of_a_perfect_store_are_legal_and_with_one_read_changed_they_are_not() -> None:
    flagged = by_version = 0
    for seed in range(1000):
        rng = random.Random(seed)
        operations, store = recorded(rng, length=100, clients=3, lost=0.02, idle=0.95)
        for part in keys_of(operations):
            order = linearize(part)
            assert order is not None, f"seed {seed}: {check(part).explanation}"
            assert is_a_proof(order, part), f"seed {seed}"
        assert check_versions(operations).verdict is LEGAL, f"seed {seed}: {check_versions(operations).explanation}"

        changed = with_one_read_changed(rng, operations, store)
        if check_versions(changed).verdict is ILLEGAL:
            by_version += 1
        orders = [(linearize(part), part) for part in keys_of(changed)]
        if any(order is None for order, _ in orders):
            flagged += 1
        else:
            assert all(is_a_proof(order, part) for order, part in orders if order is not None), f"seed {seed}"
    assert flagged >= 990
    assert by_version >= 940


def tiny(seed: int) -> list[Operation]:
    """Of one key: scribbled, of a perfect store, or that with a read changed."""
    rng = random.Random(seed)
    if seed % 3 == 0:
        return scribbled(rng)
    operations, store = recorded(rng, length=6, clients=rng.randint(2, 6), keys="k", values="xy", lost=0.15)
    if seed % 3 == 1 or not any(o.kind is GET and o.is_known for o in operations):
        return operations
    return with_one_read_changed(rng, operations, store)


def test_brute_force_agrees_on_thousands_of_tiny_histories() -> None:
    legal = {0: 0, 1: 0, 2: 0}
    for seed in range(6000):
        operations = tiny(seed)
        order, expected = linearize(operations), brute_force(operations)
        assert (order is not None) is expected, f"seed {seed}: brute force says {expected} of {operations}"
        assert order is None or is_a_proof(order, operations), f"seed {seed}"
        if expected:
            assert check_versions(operations).verdict is LEGAL, f"seed {seed}: {check_versions(operations).explanation}"
        legal[seed % 3] += expected
    assert legal[1] == 2000
    assert 200 <= legal[0] <= 1800 and 200 <= legal[2] <= 1800  # or the histories say little


# Bounds


def fifty_at_once() -> list[Operation]:
    writes = [(number, 1000, PUT, f"value {number}", 100 + number) for number in range(50)]
    return history(*writes, (2000, 2001, GET, None, ("never written", 7)))


def test_fifty_clients_at_once_end_undecided_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, steps = 20_000, count()
    step = linearizability.step

    def counted(state: linearizability.State, operation: Operation) -> linearizability.State | None:
        next(steps)
        return step(state, operation)

    monkeypatch.setattr(linearizability, "step", counted)
    tracemalloc.start()
    judgement = check(fifty_at_once(), budget)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert judgement.verdict is Verdict.UNKNOWN
    assert "'k'" in judgement.explanation
    assert next(steps) == budget
    assert peak < 500 * budget


def test_an_illegal_key_outweighs_an_undecided_one() -> None:
    other = history((1, 2, DELETE, None, True, "other"))
    assert check([*fifty_at_once(), *other], budget=1000).verdict is ILLEGAL


def test_the_memo_keeps_a_busy_key_small() -> None:
    """Twelve at once, five times over, then a wrong answer: 12! orders each time, yet few states."""
    rows = [(100 * turn + client, 100 * turn + 50, GET, None, ("x", 1)) for turn in range(1, 6) for client in range(12)]
    assert check(history(X1, *rows, (900, 901, GET, None, None)), budget=300_000).verdict is ILLEGAL
