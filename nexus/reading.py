"""A text as it reads: in its normal form, without what cannot be seen, and once more with look-alikes as ASCII.

A filter that looks at code points is fooled by a zero-width space, a full-width digit or a Cyrillic а. So a text is
looked at in three views: `raw` as it is written; `plain` in the form NFKC (UAX #15) without the signs that show
nothing (UAX #44, Default_Ignorable_Code_Point, and the format characters); `skeleton` without marks besides, every
digit as ASCII, and every sign that looks like one of ASCII as that one (UTS #39, by the table of
confusable-homoglyphs). Each sign of a view knows where it stands in the text, so what is found there can be cut out
here to the letter.

A text comes in pieces, and where it was cut makes no difference: it is read in segments, a sign with what belongs to
it (marks, jamo, what shows nothing), and a segment is read when the next one begins. A segment has at most
`MOST_SIGNS`; the marks and invisible signs beyond them are left out of the text itself, so that nobody can make a
reader hold back without end.
"""

import json
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal, NamedTuple

ViewName = Literal["raw", "plain", "skeleton"]

MOST_SIGNS = 32
_RUNS = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]+")
_INVISIBLE = re.compile(  # beyond the category Cf
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_JAMO = ("\u1160", "\u11ff")  # vowels and finals, which join what is before them
_LAST_COMPOSING = 0x11FFF


class Sign(NamedTuple):
    """What one code point is in a text, and how it reads by itself."""

    continues: bool
    shows: bool
    plain: str
    skeleton: str


@lru_cache(maxsize=2**14)
def _sign(char: str) -> Sign:
    if "\ud800" <= char <= "\udfff":
        return Sign(False, True, "\ufffd", "\ufffd")
    shows = not (unicodedata.category(char) == "Cf" or _INVISIBLE.match(char))
    first = unicodedata.normalize("NFKD", char)[0]
    joins = unicodedata.combining(first) != 0 or _JAMO[0] <= first <= _JAMO[1] or first in _composing()
    plain = unicodedata.normalize("NFKC", char) if shows else ""
    return Sign(joins or not shows, shows, plain, fold(plain))


@cache
def _composing() -> frozenset[str]:
    """The signs of no combining class that yet join the one before them."""
    pairs = (unicodedata.decomposition(chr(point)).split() for point in range(_LAST_COMPOSING))
    seconds = (chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<")
    return frozenset(second for second in seconds if unicodedata.combining(second) == 0)


@cache
def _lookalikes() -> dict[str, str]:
    """Signs that look like one of ASCII. A capital that looks like l is an I: so it is meant."""
    table = json.loads(files("confusable_homoglyphs").joinpath("confusables.json").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for char, alike in table.items():
        ascii_ones = [one["c"] for one in alike if len(one["c"]) == 1 and one["c"].isascii()]
        if len(char) == 1 and not char.isascii() and ascii_ones:
            is_capital_i = ascii_ones[0] == "l" and unicodedata.category(char) == "Lu"
            found[char] = "I" if is_capital_i else ascii_ones[0]
    return found


def fold(plain: str) -> str:
    """The skeleton of a text in plain form."""
    if plain.isascii():
        return plain
    return "".join(_folded(char) for char in unicodedata.normalize("NFKD", plain))


@lru_cache(maxsize=2**14)
def _folded(char: str) -> str:
    if char.isascii():
        return char
    if unicodedata.category(char) in ("Mn", "Me"):
        return ""
    digit = unicodedata.decimal(char, None)
    return _lookalikes().get(char, char) if digit is None else str(digit)


@dataclass(slots=True)
class View:
    """One way to read the end of a text: signs, and where the segment of each begins.

    `begin` is the number of the first sign that is kept, of all there were; `end` is where in the text the view ends.
    """

    is_raw: bool
    text: str = ""
    begin: int = 0
    end: int = 0
    _places: list[int] = field(default_factory=list)
    _new: list[str] = field(default_factory=list)

    def add(self, signs: str, place: int, end: int) -> None:
        """Signs of one segment, which begins at `place` and ends at `end`. They are seen after `settle`."""
        self._new.append(signs)
        if not self.is_raw:
            self._places += [place] * len(signs)
        self.end = end

    def add_run(self, signs: str, place: int) -> None:
        """Signs that are a segment each, one character long."""
        self._new.append(signs)
        if not self.is_raw:
            self._places += range(place, place + len(signs))
        self.end = place + len(signs)

    def settle(self) -> None:
        self.text += "".join(self._new)
        self._new.clear()

    def place(self, index: int) -> int:
        """Where in the text the sign at this index of `text` begins; for the index after the last, its end."""
        if index >= len(self.text):
            return self.end
        return self.begin + index if self.is_raw else self._places[index]

    def place_after(self, index: int) -> int:
        """Where in the text what ends before this index ends: no segment is cut in two."""
        last = self.place(index - 1)
        while index < len(self.text) and self.place(index) == last:
            index += 1
        return self.place(index)

    def forget(self, count: int) -> None:
        """Drop so many signs from the beginning."""
        self.text = self.text[count:]
        self.begin += count
        del self._places[:count]


class Reading:
    """A text that comes in pieces, in the views that are wanted of it."""

    def __init__(self, wanted: frozenset[ViewName]) -> None:
        self.views: dict[ViewName, View] = {name: View(name == "raw") for name in wanted}
        self.raw = ""
        self.begin = 0  # where `raw` begins, of all there was
        self._in_segments = bool(wanted - {"raw"})
        self._segment = ""
        self._length = 0
        self._new: list[str] = []

    @property
    def end(self) -> int:
        """Where the text ends that was read in every view; a segment that may go on is not yet."""
        return self._length - len(self._segment)

    def add(self, piece: str) -> None:
        if self._in_segments:
            for run in _RUNS.findall(piece):
                self._add_run(run)
        else:
            self._take(piece)
        self._settle()

    def finish(self) -> None:
        """There is no more."""
        self._close()
        self._settle()

    def forget(self, before: int) -> None:
        """Drop the text before this place."""
        self.raw = self.raw[before - self.begin :]
        self.begin = before

    def _add_run(self, run: str) -> None:
        if run.isascii():
            self._close()
            self._take(run[:-1])
            self._open(run[-1])
            return
        for char in run:
            if self._segment and _sign(char).continues:
                if len(self._segment) < MOST_SIGNS:
                    self._open(char)
            else:
                self._close()
                self._open(char)

    def _open(self, char: str) -> None:
        self._segment += char
        self._new.append(char)
        self._length += 1

    def _take(self, run: str) -> None:
        """Characters that stand for themselves in every view."""
        for view in self.views.values():
            view.add_run(run, self._length)
        self._new.append(run)
        self._length += len(run)

    def _close(self) -> None:
        segment, self._segment = self._segment, ""
        if not segment:
            return
        place = self._length - len(segment)
        for name, view in self.views.items():
            signs = segment if name == "raw" else read_segment(segment, name)
            view.add(signs, place, self._length)

    def _settle(self) -> None:
        self.raw += "".join(self._new)
        self._new.clear()
        for view in self.views.values():
            view.settle()


def read_segment(segment: str, view: ViewName) -> str:
    """How a sign with what belongs to it reads."""
    if len(segment) == 1:
        sign = _sign(segment)
        return sign.plain if view == "plain" else sign.skeleton
    shown = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in segment if _sign(char).shows)
    plain = unicodedata.normalize("NFKC", shown)
    return plain if view == "plain" else fold(plain)


def read(text: str, view: ViewName) -> str:
    """A whole text as it reads."""
    reading = Reading(frozenset({view}))
    reading.add(text)
    reading.finish()
    return reading.views[view].text
