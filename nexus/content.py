"""What may be said here: rules over a text, with one verdict for all of it however it comes.

A rule looks for something (a pattern, or a class such as `pii:email`) in what is asked (`input`), answered
(`output`) or retrieved (`document`), and says what is done about it: `flag` notes it, `redact` puts the rule's name
in its place, `refuse` ends the matter; `allow` exempts what it finds from the others. Rules see a text as it reads
(reading.py), so disguises gain nothing, and cut it where it stands.

An answer comes in pieces. A `Filter` gives out a piece only when no later one can change what is done with it: every
match is of a bounded width (scanners.py), so it holds back no more than that. What it gives out in all, and its
findings, are the same wherever the text was cut.
"""

import logging
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import re2

from nexus import injection
from nexus.errors import ConfigError, ContentRefused
from nexus.reading import Reading, ViewName
from nexus.scanners import Scanner, of_class, of_pattern
from nexus.targets import Targets

log = logging.getLogger("nexus.content")

Where = Literal["input", "output", "document"]
Action = Literal["allow", "redact", "flag", "refuse"]
SEVERITY: tuple[Action, ...] = ("allow", "flag", "redact", "refuse")
BLOCK = 4096  # characters of a whole text that are taken at once
FAULTS = (re2.error, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, MemoryError)
FAILED = "filter"  # the name under which a failure of the filter itself is noted


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing to look for: a `pattern`, or a class that is known by `kind`. `shown` stands for what is redacted."""

    name: str
    where: frozenset[Where]
    action: Action
    pattern: str | None = None
    kind: str | None = None

    @property
    def shown(self) -> str:
        return f"[{self.name}]"


class Finding(NamedTuple):
    """What a rule found, how often, and what was done about it. `categories` are a guard's own words for it."""

    where: Where
    rule: str
    action: Action
    found: int
    categories: tuple[str, ...] = ()

    @property
    def named(self) -> str:
        return ":".join((self.rule, *self.categories))


@dataclass(frozen=True, slots=True)
class Look:
    """One scanner on one view of a text, for a rule."""

    scanner: Scanner
    view: ViewName
    rule: Rule
    shown: str


class _Match(NamedTuple):
    """A span of the text, and which look found it. Sorted by where it begins; the longer first, then by the rules."""

    start: int
    minus_end: int
    order: int

    @property
    def end(self) -> int:
        return -self.minus_end


def looks_of(rules: Iterable[Rule]) -> tuple[Look, ...]:
    """How these rules look at a text. Raises ConfigError, with the rule's name, for one that cannot."""
    looks: list[Look] = []
    for rule in rules:
        try:
            scanners = _scanners_of(rule)
        except ConfigError as error:
            raise ConfigError(f"the rule {rule.name!r}: {error.message}") from None
        looks += (Look(scanner, view, rule, rule.shown) for scanner, view in scanners)
    return tuple(looks)


def _scanners_of(rule: Rule) -> Sequence[tuple[Scanner, ViewName]]:
    """A pattern is looked for as it is written and among look-alikes; a key is told by its capitals."""
    if rule.pattern is not None:
        scanner = of_pattern(rule.pattern)
        return ((scanner, "plain"), (scanner, "skeleton"))
    if rule.kind == injection.KIND:
        return injection.SCANNERS
    return ((of_class(rule.kind or ""), "plain" if rule.kind == "pii:key" else "skeleton"),)


def look_for_targets(targets: Targets, where: Where) -> Look:
    """What leads elsewhere is cut out of the text, and nothing put in its place."""
    return Look(targets, "raw", Rule("foreign-target", frozenset({where}), "redact"), "")


@dataclass(slots=True)
class _Place:
    """How far one look has come in its view, in signs of all there were."""

    at: int = 0


class Filter:
    """One text, in pieces: what of it may be given out, and what was found.

    Where the filter itself fails, the text is refused; or, with `fails_open`, given out from there on as it comes,
    and the failure is a finding.
    """

    def __init__(self, looks: Sequence[Look], where: Where, fails_open: bool = False) -> None:
        self._looks, self._where, self._fails_open = looks, where, fails_open
        self._reading = Reading(frozenset(look.view for look in looks))
        self._places = [_Place() for _ in looks]
        self._matches: list[_Match] = []
        self._exempt: list[_Match] = []
        self._given = 0  # up to here the text is given out, or cut out
        self._counts: Counter[tuple[str, Action]] = Counter()
        self._ends: dict[str, int] = {}  # of what was found last, by rule
        self._is_over = not looks

    def add(self, piece: str) -> str:
        """What may be given out now. Raises ContentRefused; what was given out before it was in order."""
        return piece if self._is_over else self._take(piece, final=False)

    def finish(self) -> str:
        """The rest. Raises ContentRefused."""
        return "" if self._is_over else self._take("", final=True)

    def _take(self, piece: str, final: bool) -> str:
        held = self._text(self._given, self._reading.begin + len(self._reading.raw))
        try:
            if final:
                self._reading.finish()
            else:
                self._reading.add(piece)
            return self._advance(final)
        except FAULTS:
            log.exception("the filter of an %s failed", self._where)
            self._is_over = True
            self._counts[FAILED, "flag" if self._fails_open else "refuse"] += 1
            if not self._fails_open:
                raise ContentRefused(f"the filter of this {self._where} failed, so it is refused") from None
            return held + piece

    @property
    def findings(self) -> tuple[Finding, ...]:
        """By rule, in the order of their names."""
        counts = sorted(self._counts.items())
        return tuple(Finding(self._where, rule, action, count) for (rule, action), count in counts)

    def _advance(self, final: bool) -> str:
        known = self._reading.end
        for order, (look, place) in enumerate(zip(self._looks, self._places, strict=True)):
            view = self._reading.views[look.view]
            spans, at = look.scanner.scan(view.text, place.at - view.begin, final)
            for start, end in spans:
                insort(self._matches, _Match(view.place(start), -view.place_after(end), order))
            place.at = at + view.begin
            known = min(known, view.place(at))
        out = self._give(known)
        self._forget()
        return out

    def _give(self, known: int) -> str:
        """The text up to this place, with what was found dealt with: no later match begins before it."""
        out: list[str] = []
        found = [match for match in self._matches if match.start < known]
        del self._matches[: len(found)]
        self._exempt += (match for match in found if self._looks[match.order].rule.action == "allow")
        for match in found:
            rule = self._looks[match.order].rule
            is_exempt = any(one.start <= match.start and match.end <= one.end for one in self._exempt)
            if rule.action != "allow" and not is_exempt:
                self._deal_with(match, out)
        self._exempt = [one for one in self._exempt if one.end > known]
        if known > self._given:
            out.append(self._text(self._given, known))
            self._given = known
        return "".join(out)

    def _deal_with(self, match: _Match, out: list[str]) -> None:
        look = self._looks[match.order]
        rule = look.rule
        if match.start >= self._ends.get(rule.name, 0):  # else another look of this rule has found it, too
            self._counts[rule.name, rule.action] += 1
        self._ends[rule.name] = max(match.end, self._ends.get(rule.name, 0))
        if rule.action == "refuse":
            raise ContentRefused(f"the rule {rule.name!r} of this installation refuses this {self._where}")
        if rule.action == "redact":
            if match.start >= self._given:
                out += (self._text(self._given, match.start), look.shown)
            self._given = max(self._given, match.end)

    def _text(self, start: int, end: int) -> str:
        begin = self._reading.begin
        return self._reading.raw[start - begin : end - begin]

    def _forget(self) -> None:
        """Keep of the text what is not given out, and of each view one sign before what is still looked at."""
        for name, view in self._reading.views.items():
            least = min(p.at for p, look in zip(self._places, self._looks, strict=True) if look.view == name)
            view.forget(max(0, least - 1 - view.begin))
        self._reading.forget(min(self._given, self._reading.end))


def screen(
    looks: Sequence[Look], where: Where, text: str, fails_open: bool = False
) -> tuple[str | ContentRefused, tuple[Finding, ...]]:
    """A whole text as it may go on, or the refusal of it, and what was found."""
    filter = Filter(_without_doubles(looks) if text.isascii() else looks, where, fails_open)
    try:
        pieces = [filter.add(text[start : start + BLOCK]) for start in range(0, len(text), BLOCK)]
        return "".join([*pieces, filter.finish()]), filter.findings
    except ContentRefused as refusal:
        return refusal, filter.findings


def _without_doubles(looks: Sequence[Look]) -> Sequence[Look]:
    """The looks at a text of ASCII, which has one view: no scanner need look at it twice."""
    seen = {(id(look.scanner), look.rule.name) for look in looks if look.view == "plain"}
    return [look for look in looks if look.view != "skeleton" or (id(look.scanner), look.rule.name) not in seen]
