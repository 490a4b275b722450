"""Does some order of a history's operations explain every answer? Linearizability of a small etcd, within bounds.

A history is linearizable when each operation can be given one moment between its call and its return so
that, taken in the order of those moments, the answers are those of a store used by one client at a time. It
holds for a store when it holds for each key (Herlihy and Wing 1990, theorem 1), so `check` searches key by
key, the way of Wing and Gong (1993) with Lowe's memo (2017), as porcupine does it: walk the calls and
returns in time; at a call, try to place its operation next; at a return whose operation is not placed yet,
take back the last one placed. A state reached twice with the same operations done is followed once.

    result known       it took effect between `called` and `returned`
    result UNKNOWN     a lost answer: it takes effect at any moment after `called`, or never; a read is dropped
    result FAILED      refused for certain: dropped

A revision is the store's count of writes, so on one key it only grows. That of a write whose answer was
lost is narrowed down by what follows (`State`).

`check_versions` is the quick companion: it judges by revisions alone, across all keys, in O(n log n), and
catches most of what goes wrong, also in histories too long to search. Call both. Every key starts absent.
Take `called` and `returned` from one counter: what shares a moment counts as concurrent.
"""

import heapq
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import chain
from typing import Any, NamedTuple

BUDGET = 2_000_000  # placements tried per key: some seconds, and some 200 MB of memo
LONGEST_TABLE = 20


class Kind(Enum):
    PUT = "put"  # value -> revision
    GET = "get"  # None -> (value, revision), or None where there is none
    COMPARE_AND_SET = "compare_and_set"  # (expected revision, value) -> revision, or None when lost; 0 expects no value
    DELETE = "delete"  # None -> whether there was one


class Outcome(Enum):
    UNKNOWN = "unknown"
    FAILED = "failed"


UNKNOWN, FAILED = Outcome.UNKNOWN, Outcome.FAILED


@dataclass(frozen=True)
class Operation:
    """What one client asked and was told. Values are small and hashable: of a long one, its digest."""

    client: Hashable
    key: str
    kind: Kind
    argument: Any
    result: Any
    called: float
    returned: float = math.inf

    def __post_init__(self) -> None:
        if self.returned < self.called:
            raise ValueError(f"returned before it was called: {self}")

    @property
    def is_known(self) -> bool:
        return not isinstance(self.result, Outcome)

    @property
    def is_write(self) -> bool:
        """Whether it may have left a value."""
        return self.kind in (Kind.PUT, Kind.COMPARE_AND_SET) and self.result not in (None, FAILED)

    @property
    def found_nothing(self) -> bool:
        return self.kind is Kind.GET and self.result is None

    @property
    def written(self) -> Any:
        return self.argument if self.kind is Kind.PUT else self.argument[1]

    @property
    def revision(self) -> int | None:
        """Of the value it wrote or read, where its answer says so."""
        if not self.is_known or self.kind is Kind.DELETE or self.result is None:
            return None
        return self.result[1] if self.kind is Kind.GET else self.result


class Verdict(Enum):
    LEGAL = auto()
    ILLEGAL = auto()
    UNKNOWN = auto()  # the budget was spent: a test that needs LEGAL has failed


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    explanation: str = ""


class Undecided(Exception):
    """The budget is spent."""


def check(history: Sequence[Operation], budget: int = BUDGET) -> Judgement:
    """Judge each key by itself; `budget` is the number of placements tried per key, never a time."""
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    undecided = ""
    for key, operations in by_key.items():
        try:
            if linearize(operations, budget) is None:
                return Judgement(Verdict.ILLEGAL, explain(key, operations, budget))
        except Undecided:
            undecided = (
                undecided or f"key {key!r}: undecided after {budget} of the ways to order {len(operations)} operations"
            )
    return Judgement(Verdict.UNKNOWN, undecided) if undecided else Judgement(Verdict.LEGAL)


# The model of one key


class Absent(Enum):
    ABSENT = "absent"


ABSENT = Absent.ABSENT


class State(NamedTuple):
    """What one key holds.

    `revision` is that of the value; unless `settled`, the lowest it may be, and `ruled_out` lists what above that
    it is not. Of an absent key it is the lowest that the last value may have had: what comes next is higher.
    """

    value: Hashable = ABSENT
    revision: int = 0
    settled: bool = True
    ruled_out: frozenset[int] = frozenset()

    def may_have(self, revision: int) -> bool:
        if self.value is ABSENT:
            return revision == 0
        if self.settled:
            return revision == self.revision
        return revision >= self.revision and revision not in self.ruled_out

    def without(self, revision: int) -> "State":
        """The same, now that its unsettled revision is known not to be this one."""
        ruled_out, lowest = self.ruled_out | {revision}, self.revision
        while lowest in ruled_out:
            lowest += 1
        return State(self.value, lowest, False, frozenset(other for other in ruled_out if other > lowest))


def step(state: State, operation: Operation) -> State | None:
    """The state after an operation with this result; None when it cannot have this result here.

    With a result UNKNOWN it is the state after it took effect, None when it has none: that it never took
    effect is the search's other way, to leave it out.
    """
    if operation.kind is Kind.PUT:
        return after_write(state, operation.argument, operation.result)
    if operation.kind is Kind.GET:
        return after_get(state, operation.result)
    if operation.kind is Kind.COMPARE_AND_SET:
        return after_compare_and_set(state, *operation.argument, operation.result)
    if state.value is ABSENT:
        return state if operation.result is False else None
    return None if operation.result is False else State(ABSENT, state.revision)


def after_write(state: State, value: Hashable, revision: int | Outcome) -> State | None:
    if isinstance(revision, Outcome):
        return State(value, state.revision + 1, settled=False)
    return State(value, revision) if revision > state.revision else None


def after_get(state: State, result: tuple[Hashable, int] | None) -> State | None:
    if result is None:
        return state if state.value is ABSENT else None
    value, revision = result
    return State(value, revision) if state.value == value and state.may_have(revision) else None


def after_compare_and_set(state: State, expected: int, value: Hashable, result: int | Outcome | None) -> State | None:
    if result is not None:
        if not state.may_have(expected):
            return None
        return after_write(state._replace(revision=max(expected, state.revision)), value, result)
    if not state.may_have(expected):
        return state
    return None if state.settled else state.without(expected)


# The search


class Event:
    """A call or a return, linked to its neighbours in time. `answer` is a call's return, where there is one."""

    __slots__ = ("ahead", "answer", "back", "is_call", "number", "operation")

    def __init__(self, operation: Operation | None, number: int, is_call: bool) -> None:
        self.operation = operation
        self.number = number
        self.is_call = is_call
        self.back: Event | None = None
        self.ahead: Event | None = None
        self.answer: Event | None = None

    def unlink(self) -> None:
        self.back.ahead = self.ahead
        if self.ahead:
            self.ahead.back = self.back

    def relink(self) -> None:
        self.back.ahead = self
        if self.ahead:
            self.ahead.back = self


def events_of(operations: Sequence[Operation]) -> Event:
    """The head of the linked calls and returns. At one moment calls come first: what touches is concurrent."""
    timed: list[tuple[float, bool, int, Event]] = []
    for number, operation in enumerate(operations):
        if operation.result is FAILED or (operation.kind is Kind.GET and not operation.is_known):
            continue
        call = Event(operation, number, is_call=True)
        timed.append((operation.called, False, number, call))
        if operation.is_known:
            call.answer = Event(operation, number, is_call=False)
            timed.append((operation.returned, True, number, call.answer))
    head = last = Event(None, -1, is_call=False)
    for *_, event in sorted(timed, key=lambda entry: entry[:3]):
        last.ahead, event.back = event, last
        last = event
    return head


def linearize(operations: Sequence[Operation], budget: int = BUDGET) -> list[Operation] | None:
    """An order that explains all answers of one key's operations, or None when there is none.

    It leaves out what is dropped, and those UNKNOWN that need not have happened. Raises Undecided when
    `budget` placements did not settle it, which bounds the memo as well.
    """
    head = events_of(operations)
    seen: dict[State, set[int]] = defaultdict(set)  # which operations were done when this state was reached
    placed: list[tuple[Event, State]] = []  # each with the state before it
    state, done = State(), 0
    event = head.ahead
    while event:
        if event.is_call:
            if budget == 0:
                raise Undecided
            budget -= 1
            after = step(state, event.operation)
            done_then = done | 1 << event.number
            if after is None or done_then in seen[after]:
                event = event.ahead
                continue
            seen[after].add(done_then)
            placed.append((event, state))
            state, done = after, done_then
            event.unlink()
            if event.answer:
                event.answer.unlink()
            event = head.ahead
        elif placed:
            event, state = placed.pop()
            done ^= 1 << event.number
            if event.answer:
                event.answer.relink()
            event.relink()
            event = event.ahead
        else:
            return None
    return [event.operation for event, _ in placed]


# What a person reads


def explain(key: str, operations: Sequence[Operation], budget: int) -> str:
    """The smallest prefix of an impossible history that is impossible already, as a table."""
    ends = sorted(operation.returned for operation in operations if operation.is_known)

    def is_impossible(moment: float) -> bool:
        try:
            return linearize(until(operations, moment), budget) is None
        except Undecided:
            return False

    moment = ends[bisect_left(ends, True, hi=len(ends) - 1, key=is_impossible)]
    last = next(operation for operation in operations if operation.is_known and operation.returned == moment)
    return (
        f"key {key!r}: no order explains these answers. Up to {moment:g} there was one; "
        f"none is left once client {last.client} is told {told(last)}\n{table(until(operations, moment))}"
    )


def until(operations: Iterable[Operation], moment: float) -> list[Operation]:
    """The history as it stood at `moment`: what had not returned was not known."""
    return [
        operation if operation.returned <= moment else replace(operation, result=UNKNOWN, returned=math.inf)
        for operation in operations
        if operation.called <= moment and operation.result is not FAILED
    ]


def told(operation: Operation) -> str:
    arguments = operation.argument if operation.kind is Kind.COMPARE_AND_SET else (operation.argument,)
    asked = ", ".join(repr(argument) for argument in arguments if argument is not None)
    answer = repr(operation.result) if operation.is_known else "?"
    return f"{operation.kind.value}({asked}) -> {answer}"


def table(operations: Iterable[Operation]) -> str:
    """In the order of their calls; of a long list the end."""
    ordered = sorted(operations, key=lambda operation: operation.called)
    shown = ordered[-LONGEST_TABLE:]
    rows = [f"{'client':>8} {'called':>10} {'returned':>10}  operation"]
    if len(ordered) > len(shown):
        rows.append(f"{'…':>8} {len(ordered) - len(shown)} earlier")
    for operation in shown:
        returned = f"{operation.returned:g}" if operation.is_known else "-"
        rows.append(f"{operation.client!s:>8} {operation.called:>10g} {returned:>10}  {told(operation)}")
    return "\n".join(rows)


# By revisions alone

Complaint = tuple[str, Operation, Operation]


def check_versions(history: Sequence[Operation]) -> Judgement:
    """Judge all keys together by their revisions. LEGAL says no more than that these show nothing wrong."""
    known = [operation for operation in history if operation.is_known]
    complaints = chain(unequal_twins(known), unwritten_reads(history), twice_won(known), backward_steps(history))
    for complaint, *pair in complaints:
        return Judgement(Verdict.ILLEGAL, f"key {pair[-1].key!r}: {complaint}\n{table(dict.fromkeys(pair))}")
    return Judgement(Verdict.LEGAL)


def unequal_twins(known: Iterable[Operation]) -> Iterator[Complaint]:
    """A revision belongs to one write of one key, and all who name it name its value."""
    writers: dict[int, Operation] = {}
    named: dict[int, tuple[tuple[str, Hashable], Operation]] = {}
    for operation in known:
        if (revision := operation.revision) is None:
            continue
        value = operation.written if operation.is_write else operation.result[0]
        content, first = named.setdefault(revision, ((operation.key, value), operation))
        if content != (operation.key, value):
            yield f"revision {revision} stands for two values", first, operation
        if operation.is_write and writers.setdefault(revision, operation) is not operation:
            yield f"two writes got revision {revision}", writers[revision], operation


def unwritten_reads(history: Sequence[Operation]) -> Iterator[Complaint]:
    """A value read is from the write of its revision, or from one whose answer was lost; called before it was read."""
    writers: dict[int, Operation] = {}
    lost: dict[tuple[str, Hashable], Operation] = {}
    for operation in sorted(history, key=lambda operation: operation.called):
        if operation.is_write and operation.is_known:
            writers[operation.result] = operation
        elif operation.is_write:
            lost.setdefault((operation.key, operation.written), operation)
    for read in history:
        if read.kind is not Kind.GET or read.revision is None:
            continue
        writer = writers.get(read.revision) or lost.get((read.key, read.result[0]))
        if writer is None:
            yield "read what nobody wrote", read, read
        elif writer.called > read.returned:
            yield "read before it was written", read, writer


def twice_won(known: Iterable[Operation]) -> Iterator[Complaint]:
    """Of all who expect one revision, one replaces it, with a higher one."""
    winners: dict[tuple[str, int], Operation] = {}
    for operation in known:
        if operation.kind is not Kind.COMPARE_AND_SET or operation.result is None:
            continue
        expected = operation.argument[0]
        if operation.result <= expected:
            yield "a write got no higher revision than it replaced", operation, operation
        if expected and winners.setdefault((operation.key, expected), operation) is not operation:
            yield f"two writes replaced revision {expected}", winners[operation.key, expected], operation


def backward_steps(history: Sequence[Operation]) -> Iterator[Complaint]:
    """What begins after a revision was told is no older: a write is newer than all told, a read no older on its key."""
    deleted: dict[str, float] = defaultdict(lambda: math.inf)  # when first asked
    for operation in history:
        if operation.kind is Kind.DELETE and operation.result not in (False, FAILED):
            deleted[operation.key] = min(deleted[operation.key], operation.called)
    pending: list[tuple[float, int, Operation]] = []
    newest: dict[str | None, Operation] = {}  # told so far, by key; of all keys under None
    for number, operation in enumerate(sorted(history, key=lambda operation: operation.called)):
        while pending and pending[0][0] < operation.called:
            _, _, earlier = heapq.heappop(pending)
            for scope in (earlier.key, None):
                if scope not in newest or newest[scope].revision < earlier.revision:
                    newest[scope] = earlier
        before = newest.get(None if operation.is_write else operation.key)
        revision = operation.revision
        if revision is not None:
            heapq.heappush(pending, (operation.returned, number, operation))
            if before and (revision <= before.revision if operation.is_write else revision < before.revision):
                yield f"revision {revision} was told after {before.revision}", before, operation
        elif before and operation.found_nothing and operation.returned < deleted[operation.key]:
            yield "nothing was read where something was, and nobody deleted it", before, operation
