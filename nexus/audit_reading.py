"""What the audit record says, and whether it is whole: each changed, foreign, missing or moved line is named."""

import csv
import io
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

from nexus.audit import FOLDER, HEAD_FILE, KEY_FILE, Head, files_of, hash_of, locked, read_head, read_key, unseal
from nexus.errors import NotFound

What = Literal["edited", "forged", "missing", "moved", "repeated", "unfinished", "head", "noted"]
SAID = {"cut": "missing", "head lost": "head"}  # faults that were found when writing went on
NOTED = frozenset({"repaired", "lost"})
COLUMNS = (
    "seq", "at", "kind", "request_id", "tenant", "subject", "credential", "action", "objects", "documents", "model",
    "status", "verdict", "reason", "question", "answer", "clock",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a spreadsheet knows what it is to calculate


@dataclass(frozen=True, slots=True)
class Fault:
    """A line that is not as it was written, or the place where some are not; `line` counts from 1."""

    what: What
    file: str
    line: int
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a verification. `notes` are no faults: repairs after crashes, and a clock that went back."""

    lines: int
    files: int
    head: Head
    faults: tuple[Fault, ...]
    notes: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The record at one moment: what writers add later is not looked at."""

    key: bytes
    head: Head | None
    files: tuple[tuple[Path, int], ...]

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Each line with the number of its file and its own, from 1; one without an end keeps it off."""
        for number, (path, size) in enumerate(self.files):
            with path.open("rb") as file:
                for line_number, line in enumerate(file, 1):
                    size -= len(line)
                    if size < 0:
                        break
                    yield number, line_number, line


def _look(home: Path) -> _Snapshot:
    key = read_key(home) if home.is_dir() else None
    if key is None:
        if files_of(home):
            raise NotFound(f"{KEY_FILE} is gone from the home: without it nothing can be said of the audit record")
        raise NotFound("nothing was ever recorded in this home")
    with locked(home):
        return _Snapshot(key, read_head(home, key), tuple((path, path.stat().st_size) for path in files_of(home)))


def read(home: Path) -> Iterator[dict[str, Any]]:
    """Every line that is as it was written, in order. Raises NotFound where there is no record."""
    snapshot = _look(home)
    for _, _, line in snapshot.lines():
        if values := unseal(line.removesuffix(b"\n"), snapshot.key):
            yield values


def verify(home: Path, expected: tuple[int, str] | None = None) -> Report:
    """Check every line, their order and the end. `expected` is a head (number, hash) that was noted elsewhere.

    Raises NotFound where there is nothing to check.
    """
    return _Verification(_look(home), expected).report()


class _Verification:
    """One walk over all lines; then the order of their numbers is judged as a whole."""

    def __init__(self, snapshot: _Snapshot, expected: tuple[int, str] | None) -> None:
        self._snapshot = snapshot
        self._heads = {} if snapshot.head is None else {snapshot.head.sequence: snapshot.head.hash}
        self._expected = expected
        self._numbers = array("q")  # of each line, by its place; 0 where it is not ours
        self._unfinished: set[int] = set()
        self._counts = [0] * len(snapshot.files)
        self._faults: list[tuple[int, Fault]] = []
        self._notes: list[Fault] = []
        self._last = Head()

    def report(self) -> Report:
        self._walk()
        self._judge()
        self._check_head()
        faults = tuple(fault for _, fault in sorted(self._faults, key=lambda pair: pair[0]))
        return Report(len(self._numbers), len(self._snapshot.files), self._last, faults, tuple(self._notes))

    def _walk(self) -> None:
        before: Head | None = Head()
        for file, _, raw in self._snapshot.lines():
            place, line = len(self._numbers), raw.removesuffix(b"\n")
            self._counts[file] += 1
            values = unseal(line, self._snapshot.key)
            if values is None or raw == line:
                if raw == line:
                    self._unfinished.add(place)
                    self._fault("unfinished", place, "it has no end; the next to write removes it, and notes that")
                self._numbers.append(0)
                before = None
                continue
            number = values["seq"]
            here = Head(number, hash_of(line), values["at"])
            if before is not None and number == before.sequence + 1 and values["before"] != before.hash:
                self._fault("forged", place, "it does not follow the line before it, of another record of this home")
            if self._expected is not None and number == self._expected[0] and here.hash != self._expected[1]:
                self._fault("forged", place, f"line {number} had another hash when its head was noted")
            if self._heads.get(number, here.hash) != here.hash:
                self._fault("head", place, f"{HEAD_FILE} knows line {number} with another hash")
            self._numbers.append(number)
            self._note(place, values)
            self._last, before = max(self._last, here, key=lambda head: head.sequence), here

    def _note(self, place: int, values: dict[str, Any]) -> None:
        kind, reason = values.get("kind", ""), values.get("reason", "")
        if kind in SAID:
            self._fault("head" if kind == "head lost" else "missing", place, f"noted when writing went on: {reason}")
        elif kind in NOTED:
            self._notes.append(self._at("noted", place, reason))
        if "clock" in values:
            back = values["at"] - values["clock"]
            self._notes.append(self._at("noted", place, f"the clock had gone back by {back:.3f} s"))

    def _judge(self) -> None:
        """Name what is out of order: the longest run of rising numbers is what was not touched."""
        numbers = self._numbers
        end = max([self._last.sequence, *self._heads, self._expected[0] if self._expected else 0]) + 1
        if len(numbers) == end - 1 and all(number == place for place, number in enumerate(numbers, 1)):
            return
        ours = [place for place, number in enumerate(numbers) if number]
        kept = ours
        if any(numbers[a] >= numbers[b] for a, b in pairwise(ours)):
            kept = [ours[index] for index in longest_rise([numbers[place] for place in ours])]
        there = {numbers[place] for place in kept}
        strays = set(ours) - set(kept)
        moved = sorted(numbers[place] for place in strays if numbers[place] not in there)
        for place in strays:
            is_second = numbers[place] in there
            detail = (
                f"line {numbers[place]} is there twice" if is_second else f"line {numbers[place]} is not in its place"
            )
            self._fault("repeated" if is_second else "moved", place, detail)
        last_place, last_number = -1, 0
        for place in [*kept, len(numbers)]:
            number = numbers[place] if place < len(numbers) else end
            foreign = [p for p in range(last_place + 1, place) if not numbers[p] and p not in self._unfinished]
            elsewhere = bisect_left(moved, number) - bisect_left(moved, last_number)
            self._fill(last_number, number, place, foreign, number - last_number - 1 - elsewhere)
            last_place, last_number = place, number

    def _fill(self, low: int, high: int, place: int, foreign: Sequence[int], missing: int) -> None:
        """Between the lines `low` and `high`: the lines that are not ours stand for missing ones, or for none."""
        for index, stranger in enumerate(foreign):
            if index < missing:
                self._fault("edited", stranger, "it is not as it was written")
            else:
                self._fault("forged", stranger, "it was not written by Nexus")
        if missing > len(foreign):
            where = "at the end" if place == len(self._numbers) else "before this line"
            self._fault(
                "missing", place, f"{missing - len(foreign)} of the lines {low + 1} to {high - 1} are gone {where}"
            )

    def _check_head(self) -> None:
        if self._snapshot.head is None:
            self._fault(
                "head", len(self._numbers), f"{HEAD_FILE} is gone or not ours: whether the end is whole is not known"
            )

    def _fault(self, what: What, place: int, detail: str) -> None:
        self._faults.append((place, self._at(what, place, detail)))

    def _at(self, what: What, place: int, detail: str) -> Fault:
        """A fault at a place; what is past the end is said of the line after the last."""
        if not self._counts:
            return Fault(what, FOLDER, 1, detail)
        ends = list(accumulate(self._counts))
        file = next((n for n, end in enumerate(ends) if place < end), len(ends) - 1)
        return Fault(what, self._snapshot.files[file][0].name, place - (ends[file] - self._counts[file]) + 1, detail)


def longest_rise(numbers: Sequence[int]) -> list[int]:
    """The places of a longest strictly rising subsequence (patience sorting, O(n log n))."""
    tops: list[int] = []  # the least number that ends a run of each length
    places: list[int] = []
    previous = [-1] * len(numbers)
    for place, number in enumerate(numbers):
        length = bisect_left(tops, number)
        tops[length : length + 1] = [number]
        places[length : length + 1] = [place]
        previous[place] = places[length - 1] if length else -1
    run, place = [], places[-1] if places else -1
    while place >= 0:
        run.append(place)
        place = previous[place]
    return run[::-1]


def select(
    lines: Iterable[dict[str, Any]], *, tenant: str | None = None, subject: str | None = None,
    kind: str | None = None, since: float | None = None, until: float | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The lines of these; times are Unix seconds, `until` not included."""
    wanted = {name: value for name, value in (("tenant", tenant), ("subject", subject), ("kind", kind)) if value}
    for line in lines:
        is_in = (since is None or line["at"] >= since) and (until is None or line["at"] < until)
        if is_in and all(line.get(name) == value for name, value in wanted.items()):
            yield line


def to_csv(lines: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A header and a row for each line. No cell can be taken for a formula by a spreadsheet."""
    yield _row(COLUMNS)
    for line in lines:
        yield _row([_cell(line.get(name, "")) for name in COLUMNS])


def _cell(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def _row(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()
