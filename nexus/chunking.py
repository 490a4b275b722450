"""Cuts a parsed document on its structure into pieces that fit the embedder.

A document is a row of sections: a heading, and the blocks up to the next heading. A section is a
row of units: its blocks, where one that alone is too long is taken apart by the ladder of its
kind (text: paragraphs, sentences, lines, words; then characters). A row of units is divided into
pieces where the sum of two costs is least: how far a piece is from the wanted size, and how bad
it is to break there (between blocks costs nothing, within a word most). This is how TeX breaks
paragraphs into lines (Knuth and Plass 1981): it looks ahead, so a section of one and a bit
pieces becomes two halves and not a full piece and a crumb.

What holds for every cut:

- A piece stays within one section. Tiny neighbours under one parent may share a piece, which
  then keeps their heading lines in its text. Otherwise a heading is in `Piece.heading` alone;
  one with nothing under it, or too long for a path, is in the text.
- Every non-white character of the blocks is in some piece, in order, once. Only the header row of
  a divided table and the overlap, where asked for, come again.
- `embedded_text` of a piece has at most `max_tokens` tokens by the embedder's own count. Sums of
  units only plan; each finished piece is counted, and divided further where the sum was wrong.
  Where the prefix alone takes that many tokens the promise cannot be kept, and is not made.
- A piece has no more than some 16 characters per token of its budget, whatever the tokenizer
  says: some count a word of 200 kB as one unknown token.
"""

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise

from nexus.errors import ConfigError
from nexus.types import Block, BlockKind, Parsed, Piece

CHUNKER = "structure-1"

CountTokens = Callable[[Sequence[str]], list[int]]
Splitter = Callable[[str], list[str]]

SHORTEST_OVERLAP, LONGEST_OVERLAP = 15, 2000  # characters that two pieces have in common
PREFIX_TOKENS = 60  # a quarter of 240
TOKEN_CHARACTERS = 16
HEADING_CHARACTERS = 200
DEEPEST_LEVEL = 9
BATCH_CHARACTERS = 250_000
TINY_SHARE = 4  # a section is tiny up to a quarter of the wanted size
FRAGMENT_SHARE = 8  # a long word is cut into so many parts for each piece
GRAIN_SHARE = 16  # smaller neighbours are one unit: it bounds the work of dividing a row
BREAK_COSTS = (0.0, 0.02, 0.04, 0.1, 0.3, 1.0)  # by depth: 0 between blocks, then by rung of a ladder
PROSE = ("text", "list")
SENTENCE_DEPTH = 2  # what is deeper begins within a sentence
BOND_COST = 0.2  # between a line that ends in a colon and what it introduces


@dataclass(frozen=True, slots=True)
class ChunkSettings:
    """How large pieces are, in tokens of `embedded_text`, special tokens not counted.

    Pieces are planned for `target_tokens` and never exceed `max_tokens`. A piece that goes on in
    its section with a new sentence begins with the last `overlap_sentences` sentences of the piece
    before it, where they take no more than a quarter. Raises ConfigError for values that cannot work.
    """

    target_tokens: int = 220
    max_tokens: int = 240
    overlap_sentences: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.target_tokens <= self.max_tokens:
            raise ConfigError(
                f"chunk target_tokens is {self.target_tokens} and max_tokens {self.max_tokens}: "
                "the target must be at least 1 and at most the maximum"
            )
        if self.overlap_sentences < 0:
            raise ConfigError(f"chunk overlap_sentences is {self.overlap_sentences}: it must be 0 or more")

    @property
    def fingerprint(self) -> str:
        """Text that changes when a setting or the chunker does."""
        return " ".join([CHUNKER, *(f"{field.name}={getattr(self, field.name)}" for field in fields(self))])

    def write(self) -> str:
        """As it is kept with an index that is cut so; `read` takes it."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "ChunkSettings":
        return cls(**json.loads(text))


def cut(parsed: Parsed, count_tokens: CountTokens, settings: ChunkSettings) -> list[Piece]:
    """The pieces of a document, in order; none for a document without text.

    `count_tokens` gives the number of the embedder's own tokens for each of some texts, special
    tokens not counted. `Piece.tokens` is that number for `embedded_text(parsed.title, piece)`.
    The page of a piece is that of its first block. Its lines are those of all it contains but a
    repeated header row: where a block has one line of text for each of its lines, a part of it has
    its own lines, else those of the block.
    """
    scale = _Scale(count_tokens, settings.max_tokens)
    sections = _weighed(_sections(parsed.blocks), scale)
    budget = _Budget(settings, parsed.title, scale, sections)
    drafts: list[_Draft] = []
    for group in _grouped(sections, budget):
        path, units = _row(group)
        drafts.extend(_divided(path, units, budget, scale))
    return _settled(drafts, parsed.title, scale)


def embedded_text(title: str, piece: Piece) -> str:
    """What the embedder is given for a piece: a line "title > heading > path", then the text.

    The line is shortened to about a quarter of the usual budget of 240 tokens: from the middle of
    the path first, then names at their ends. "About", because it is estimated, on the high side
    for prose: no tokenizer is at hand here. A title equal to the first heading is not repeated.
    """
    prefix = _prefix(title, piece.heading)
    return f"{prefix}\n{piece.text}" if prefix else piece.text


# Sections


def whole_text(pieces: Sequence[Piece]) -> str:
    """A document as its pieces tell it: headings where they change, and what two pieces share (overlap) only once."""
    parts: list[str] = []
    path: tuple[str, ...] = ()
    before = ""
    for piece in pieces:
        for depth, name in enumerate(piece.heading, 1):
            if piece.heading[:depth] != path[:depth]:
                parts.append(f"{'#' * depth} {name}")
                before = ""
        parts.append(piece.text[_shared(before, piece.text) :].lstrip())
        path, before = piece.heading, piece.text
    return "\n\n".join(filter(None, parts))


def _shared(before: str, text: str) -> int:
    """How many characters at the beginning of a text end the one before it, where that is no chance."""
    longest = min(len(before), len(text), LONGEST_OVERLAP)
    if longest <= SHORTEST_OVERLAP:
        return 0
    end, begin = before[-longest:], text[: SHORTEST_OVERLAP + 1]
    at = end.find(begin)
    while at >= 0 and not text.startswith(end[at:]):
        at = end.find(begin, at + 1)
    return len(end) - at if at >= 0 else 0


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is not broken again: a block or a part of one.

    `gap` stands between it and the unit before where one piece holds both. `rung` is the next one
    to try on the ladder of its kind. `depth` says how bad it is to break before it (BREAK_COSTS).
    `header` is what a piece that starts here repeats, unless the unit begins with it (depth 0).
    """

    text: str
    kind: BlockKind
    page: int | None
    first_line: int | None
    last_line: int | None
    gap: str = "\n\n"
    rung: int = 0
    depth: int = 0
    tokens: int = 0
    header: str = ""
    header_tokens: int = 0

    @property
    def lines(self) -> tuple[int | None, int | None]:
        return self.first_line, self.last_line


@dataclass(frozen=True, slots=True)
class _Section:
    """A heading and what stands under it, up to the next heading.

    `nodes` are the numbers of the heading blocks it stands under, outermost first, the last being
    its own; `path` are their texts. The part of a document before its first heading has neither.
    """

    nodes: tuple[int, ...]
    path: tuple[str, ...]
    heading: _Unit | None
    units: list[_Unit]

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units) + (self.heading.tokens if self.heading else 0)


def _sections(blocks: Iterable[Block]) -> list[_Section]:
    sections = [_Section((), (), None, [])]
    above: list[tuple[int, int, str]] = []
    for number, block in enumerate(blocks):
        unit = _whole(block)
        if unit is None:
            continue
        if block.kind != "heading":
            units = sections[-1].units
            if unit.kind == "list" and units and units[-1].kind == "list":
                unit = replace(unit, gap="\n")
            units.append(unit)
            continue
        level = min(max(block.level, 1), DEEPEST_LEVEL)
        while above and above[-1][0] >= level:
            above.pop()
        name = " ".join(unit.text.split())
        long = len(name) > HEADING_CHARACTERS
        above.append((level, number, name[: HEADING_CHARACTERS - 1] + "…" if long else name))
        nodes, path = tuple(node for _, node, _ in above), tuple(name for _, _, name in above)
        own = [replace(unit, kind="text")] if long else []
        sections.append(_Section(nodes, path, None if long else unit, own))
    nexts = [*sections[1:], None]
    return [section for section, after in zip(sections, nexts, strict=True) if _has_something(section, after)]


def _has_something(section: _Section, after: _Section | None) -> bool:
    """Whether a section has text, or a heading that no later section names in its path."""
    if section.units:
        return True
    is_parent = after is not None and after.nodes[: len(section.nodes)] == section.nodes
    return section.heading is not None and not is_parent


def _whole(block: Block) -> _Unit | None:
    _, text = _core(block.text, block.kind)
    if not text:
        return None
    header = _rows(text)[0].rstrip() if block.kind == "table" and block.header else ""
    return _Unit(text, block.kind, block.page, block.first_line, block.last_line, header=header)


def _weighed(sections: list[_Section], scale: "_Scale") -> list[_Section]:
    """The same sections, each unit with its weight: one count for the whole document."""
    rows = [[section.heading, *section.units] for section in sections]
    texts = [text for row in rows for unit in row if unit for text in (unit.text, unit.header)]
    weights = iter(scale.weigh(texts))

    def weighed(unit: _Unit) -> _Unit:
        return replace(unit, tokens=next(weights), header_tokens=next(weights))

    return [
        replace(
            section,
            heading=weighed(section.heading) if section.heading else None,
            units=[weighed(unit) for unit in section.units],
        )
        for section in sections
    ]


def _grouped(sections: list[_Section], budget: "_Budget") -> Iterator[list[_Section]]:
    """Sections one by one, tiny neighbours under the same parent together while they fit one piece."""
    group: list[_Section] = []
    for section in sections:
        if group and not _may_join(group, section, budget):
            yield group
            group = []
        group.append(section)
    if group:
        yield group


def _may_join(group: list[_Section], section: _Section, budget: "_Budget") -> bool:
    parent = section.nodes[:-1]
    parents = [group[1].nodes[:-1]] if len(group) > 1 else [group[0].nodes, group[0].nodes[:-1]]
    tokens = [member.tokens for member in (*group, section)]
    return (
        parent in parents
        and max(tokens) <= budget.settings.target_tokens // TINY_SHARE
        and sum(tokens) <= budget.goal(section.path[:-1])
    )


def _row(group: list[_Section]) -> tuple[tuple[str, ...], list[_Unit]]:
    """The heading path and the units of sections that belong together."""
    if len(group) == 1:
        section = group[0]
        if section.heading and not section.units:
            return section.path[:-1], [section.heading]
        return section.path, section.units
    path = group[1].path[:-1]
    units: list[_Unit] = []
    for section in group:
        if section.heading and len(section.path) > len(path):
            units.append(section.heading)
        units.extend(section.units)
    return path, units


# Budgets


class _Scale:
    """Weighs texts: the embedder's tokens, but at least one, and one for every 16 characters."""

    def __init__(self, count_tokens: CountTokens, max_tokens: int) -> None:
        self._count_tokens = count_tokens
        self._max_tokens = max_tokens

    def weigh(self, texts: Sequence[str]) -> list[int]:
        """The weights of some texts; those too long for any piece are not even counted."""
        weights = [-(-len(text) // TOKEN_CHARACTERS) for text in texts]
        short = [number for number, weight in enumerate(weights) if 0 < weight <= self._max_tokens]
        for number, tokens in zip(short, self.count([texts[number] for number in short]), strict=True):
            weights[number] = max(weights[number], tokens)
        return weights

    def count(self, texts: Sequence[str]) -> list[int]:
        """The tokens of some texts, counted in batches: a tokenizer holds much more than the text."""
        counts: list[int] = []
        start = characters = 0
        for number, text in enumerate(texts):
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                counts.extend(self._count_tokens(texts[start : number + 1]))
                start, characters = number + 1, 0
        if start < len(texts):
            counts.extend(self._count_tokens(texts[start:]))
        return counts


class _Budget:
    """How many tokens of text fit beside the prefix of each heading path."""

    def __init__(self, settings: ChunkSettings, title: str, scale: _Scale, sections: list[_Section]) -> None:
        self.settings = settings
        paths = list({path: None for section in sections for path in (section.path, section.path[:-1])})
        prefixes = [_prefix(title, path) for path in paths]
        counts = iter(scale.count([prefix for prefix in prefixes if prefix]))
        self._prefix_tokens = {
            path: next(counts) if prefix else 0 for path, prefix in zip(paths, prefixes, strict=True)
        }

    def is_possible(self, path: tuple[str, ...]) -> bool:
        """Whether the prefix leaves room for at least one token of text."""
        return self._prefix_tokens[path] < self.settings.max_tokens

    def room(self, path: tuple[str, ...]) -> int:
        """The most tokens of text under a path; as beside a prefix of a quarter where it leaves none."""
        if self.is_possible(path):
            return self.settings.max_tokens - self._prefix_tokens[path]
        return max(1, self.settings.max_tokens * 3 // 4)

    def goal(self, path: tuple[str, ...]) -> int:
        """The wanted tokens of text under a path."""
        return max(1, self.room(path) - (self.settings.max_tokens - self.settings.target_tokens))


# Dividing a row of units


@dataclass(frozen=True, slots=True)
class _Lead:
    """What a piece repeats at its start: a header row, or sentences that begin at `first_line`."""

    text: str = ""
    tokens: int = 0
    first_line: int | None = None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A piece that is not counted yet; where `limit` is 0, it may have as many tokens as it has."""

    path: tuple[str, ...]
    lead: _Lead
    units: tuple[_Unit, ...]
    limit: int

    def piece(self, tokens: int = 0) -> Piece:
        text = self.units[0].text + "".join(unit.gap + unit.text for unit in self.units[1:])
        first_line, last_line = _span([self.lead.first_line, *(line for unit in self.units for line in unit.lines)])
        return Piece(self.lead.text + text, self.path, self.units[0].page, first_line, last_line, tokens)


def _divided(path: tuple[str, ...], units: list[_Unit], budget: _Budget, scale: _Scale) -> Iterator[_Draft]:
    room, goal = budget.room(path), budget.goal(path)
    limit = budget.settings.max_tokens if budget.is_possible(path) else 0
    parts = [part for unit in units for part in _taken_apart(_with_light_header(unit, room), room, scale)]
    units = _coarse(parts, goal // GRAIN_SHARE)
    leads = _leads(units, budget.settings.overlap_sentences, room, scale)
    starts = _starts(units, leads, goal, room)
    for start, end in zip(starts, [*starts[1:], len(units)], strict=True):
        yield _Draft(path, leads[start], tuple(units[start:end]), limit)


def _with_light_header(unit: _Unit, room: int) -> _Unit:
    """The unit, without a header row to repeat where that would leave less than half of the room."""
    return unit if unit.header_tokens <= room // 2 else replace(unit, header="", header_tokens=0)


def _starts(units: list[_Unit], leads: list[_Lead], goal: int, room: int) -> list[int]:
    """Where pieces start, so that the sum of their costs is least; the first start is 0."""
    count = len(units)
    costs = [0.0] + [float("inf")] * count
    origins = [0] * (count + 1)
    breaks = [0.0, *(_break_cost(before, unit) for before, unit in pairwise(units)), 0.0]
    for start in range(count):
        size = leads[start].tokens
        for end in range(start + 1, count + 1):
            size += units[end - 1].tokens
            if size > room and end > start + 1:
                break
            cost = costs[start] + _size_cost(size, goal) + breaks[end]
            if cost < costs[end]:
                costs[end], origins[end] = cost, start
    starts = [origins[count]]
    while starts[-1] > 0:
        starts.append(origins[starts[-1]])
    return starts[::-1]


def _size_cost(size: int, goal: int) -> float:
    share = size / goal
    return (1 - share) ** 2 if share < 1 else 4 * (share - 1) ** 2


def _break_cost(before: _Unit, unit: _Unit) -> float:
    cost = BREAK_COSTS[min(unit.depth, len(BREAK_COSTS) - 1)]
    return max(cost, BOND_COST) if unit.depth == 0 and before.text.endswith(":") else cost


def _leads(units: list[_Unit], overlap: int, room: int, scale: _Scale) -> list[_Lead]:
    """What a piece repeats at its start, for each unit that it may start with."""
    leads = [_header_lead(unit) for unit in units]
    tails = {number: _tail(units, number, overlap) for number in range(1, len(units) if overlap else 0)}
    weights = scale.weigh([tail.text for tail in tails.values()])
    for (number, tail), tokens in zip(tails.items(), weights, strict=True):
        if 0 < tokens <= room // 4:
            leads[number] = replace(tail, tokens=tokens)
    return leads


def _tail(units: list[_Unit], number: int, overlap: int) -> _Lead:
    """The last sentences before a unit; nothing where it begins within one, or where either is not prose."""
    unit = units[number]
    tail = _Lead()
    if unit.kind not in PROSE or unit.depth > SENTENCE_DEPTH:
        return tail
    gap = unit.gap
    for before in reversed(units[max(0, number - overlap) : number]):
        if before.kind not in PROSE or overlap <= 0:
            break
        strings = sentences(before.text)
        *_, part = _parts(before, ["".join(strings[:-overlap]), "".join(strings[-overlap:])], before.rung)
        tail = _Lead(part.text + gap + tail.text, first_line=part.first_line)
        gap, overlap = before.gap, overlap - len(strings)
    return tail


def _header_lead(unit: _Unit) -> _Lead:
    return _Lead(unit.header + "\n", unit.header_tokens) if unit.header and unit.depth > 0 else _Lead()


def _coarse(units: list[_Unit], grain: int) -> list[_Unit]:
    """The same text in fewer units: neighbours of one kind that together are within the grain."""
    coarse: list[_Unit] = []
    for unit in units:
        last = coarse[-1] if coarse else None
        is_apart = unit.kind == "heading" or (unit.depth == 0 and unit.kind in ("table", "code"))
        if last is None or last.kind != unit.kind or is_apart or last.tokens + unit.tokens > grain:
            coarse.append(unit)
            continue
        first_line, last_line = _span([*last.lines, *unit.lines])
        text, tokens = last.text + unit.gap + unit.text, last.tokens + unit.tokens
        coarse[-1] = replace(last, text=text, tokens=tokens, first_line=first_line, last_line=last_line)
    return coarse


def _span(lines: Iterable[int | None]) -> tuple[int | None, int | None]:
    """The first and the last of the lines that are known."""
    known = [line for line in lines if line is not None]
    return min(known, default=None), max(known, default=None)


# Finishing


def _settled(drafts: list[_Draft], title: str, scale: _Scale) -> list[Piece]:
    """Drafts as pieces with their true counts; those over their limit are divided until they fit."""
    row: list[_Draft | Piece] = list(drafts)
    while waiting := [draft for draft in row if isinstance(draft, _Draft)]:
        pieces = [draft.piece() for draft in waiting]
        counts = iter(scale.count([embedded_text(title, piece) for piece in pieces]))
        settled: list[_Draft | Piece] = []
        for item in row:
            if isinstance(item, Piece):
                settled.append(item)
                continue
            tokens = next(counts)
            halves = _halved(item) if tokens > item.limit > 0 else []
            settled.extend(halves or [item.piece(tokens)])
        row = settled
    return [item for item in row if isinstance(item, Piece)]


def _halved(draft: _Draft) -> list[_Draft]:
    """Less of a draft: without its overlap, or in two, or without its header row; [] when nothing helps."""
    units = draft.units
    if draft.lead.text and not units[0].header:
        return [replace(draft, lead=_Lead())]
    if len(units) == 1 and len(units[0].text) > 1:
        units = tuple(_broken(units[0], FRAGMENT_SHARE * len(units[0].text)))
    if len(units) > 1:
        start, rest = units[: len(units) // 2], units[len(units) // 2 :]
        return [replace(draft, units=start), replace(draft, lead=_header_lead(rest[0]), units=rest)]
    if units != draft.units:
        return [replace(draft, units=units)]
    return [replace(draft, lead=_Lead())] if draft.lead.text else []


# Ladders


def _taken_apart(unit: _Unit, room: int, scale: _Scale) -> list[_Unit]:
    """The unit itself, or where it is too long its parts, each of which fits or is one character."""
    if unit.tokens + unit.header_tokens <= room or len(unit.text) < 2:
        return [unit]
    parts = _broken(unit, room)
    weights = scale.weigh([part.text for part in parts])
    weighed = [replace(part, tokens=weight) for part, weight in zip(parts, weights, strict=True)]
    return [smaller for part in weighed for smaller in _taken_apart(part, room, scale)]


def _broken(unit: _Unit, room: int) -> list[_Unit]:
    """The parts of a unit at the next rung of its ladder that divides it, or at the end by characters."""
    ladder = _LADDERS[unit.kind]
    strings, rung = [unit.text], unit.rung
    while len(strings) == 1 and rung < len(ladder):
        strings, rung = ladder[rung](unit.text), rung + 1
    if len(strings) == 1:
        strings, rung = _fragments(unit.text, room), len(BREAK_COSTS) - 1
    return _parts(unit, strings, rung)


def _parts(unit: _Unit, strings: list[str], rung: int) -> list[_Unit]:
    """Units for the strings that a unit's text was divided into; white space between them is their gap.

    Where the unit has one line of text for each of its lines, each part gets its own lines.
    """
    first, last, gap = unit.first_line, unit.last_line, unit.gap
    exact = first is not None and last is not None and last - first == unit.text.count("\n")
    line = first or 0
    parts: list[_Unit] = []
    for string in strings:
        before, text = _core(string, unit.kind)
        after = string[len(before) + len(text) :]
        line += before.count("\n")
        if text:
            end = line + text.count("\n")
            lines = (line, end) if exact else (first, last)
            depth = max(rung, unit.depth) if parts else unit.depth
            gap = _narrow(gap + before) if parts else unit.gap
            part = replace(unit, text=text, gap=gap, rung=rung, depth=depth, first_line=lines[0], last_line=lines[1])
            parts.append(part)
            line, gap = end, ""
        line += after.count("\n")
        gap += after if text else before + after
    return parts


def _core(text: str, kind: BlockKind) -> tuple[str, str]:
    """The white space before a text, and the text without any around it; code keeps its first indent."""
    core = text.strip()
    start = len(text) - len(text.lstrip()) if core else len(text)
    if core and kind == "code":
        start = text.rfind("\n", 0, start) + 1
    return text[:start], text[start:].rstrip()


def _narrow(gap: str) -> str:
    """White space between two parts, without the megabytes that some files have there."""
    if len(gap) <= 8:
        return gap
    return "\n\n" if gap.count("\n") > 1 else "\n" if "\n" in gap else " "


def _after(pattern: str) -> Splitter:
    """A splitter that divides a text after every match of a pattern."""
    compiled = re.compile(pattern)
    return lambda text: _divide(text, [match.end() for match in compiled.finditer(text)])


def _divide(text: str, positions: Iterable[int]) -> list[str]:
    """The parts of a text between rising positions; together they are the text."""
    bounds = [0, *(position for position in positions if 0 < position < len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)] if text else []


def _rows(text: str) -> list[str]:
    """The rows of a table; a rule under the first row, as in Markdown, belongs to it."""
    rows = _lines(text)
    if len(rows) > 1 and _RULE.fullmatch(rows[1]):
        rows[:2] = [rows[0] + rows[1]]
    return rows


def _fragments(text: str, room: int) -> list[str]:
    """A word cut by characters: into parts small enough to fill a piece well, or one such part into halves."""
    size = max(1, room // FRAGMENT_SHARE)
    if len(text) <= size:
        size = (len(text) + 1) // 2
    return _divide(text, range(size, len(text), size))


_RULE = re.compile(r"[\s|:+=-]*-[\s|:+=-]*")
_MARKER = r"(?=[^\S\n]*(?:[-*+•‣◦–]|\d{1,3}[.)]|[A-Za-z][.)])[^\S\n])"
_paragraphs = _after(r"\n(?:[^\S\n]*\n)+")
_items = _after(r"\n" + _MARKER)
_lines = _after(r"\n")
_cells = _after(r"\|")
_words = _after(r"\s++")


# Sentences

_BOUNDARY = re.compile(
    r"""
    (?<![.!?…])(?P<stop>[.!?…]++)["'”’»)\]*_]*+(?=\s)   # a stop, what it closes, white space
    | [。！？｡]++["'”’」』）]*+                            # full-width stops need none
    | \n(?:[^\S\n]*\n)+                                 # a blank line
    | \n(?=[^\S\n]*(?:[-*+•‣◦]|\d{1,3}[.)])[^\S\n])     # a list item
    | \n(?=[^\n|]*\|)                                   # a row of a table
    """,
    re.VERBOSE,
)
_WHITE = re.compile(r"\s*+")
_LAST_WORD = re.compile(r"(?:^|(?<=\s))[\"'“‘«(\[{*_]*(\S*)$")
_NEXT_WORD = re.compile(r"[\"'“‘«(\[{*_]*(\w*)(\W?)")
_ENUMERATOR = re.compile(r"(?:^|\n)[^\S\n]*(?:\d{1,3}|[A-Za-z])$")

# Before these a stop never ends a sentence …
_NEVER_LAST = re.compile(
    r"""mr|mrs|ms|mx|dr|prof|st|gen|col|lt|sgt|capt|cmdr|rev|hon|gov|sen|rep|pres|messrs|mt|e\.?g|i\.?e|cf|viz
    |vs|approx|ca|figs?|eqs?|ch|chap|refs?|vols?|pp|ver|resp|incl""",
    re.VERBOSE,
)
# … before these it does not where a number follows …
_BEFORE_NUMBERS = re.compile(r"nos?|nr|art|op|tab")
# … and before these, and before initials, only where a word follows that often opens a sentence.
_MAYBE_LAST = re.compile(
    r"""al|etc|inc|ltd|co|corp|llc|plc|bros|dept|est|jr|sr|esq|ave|blvd|rd|eds?|ph\.d|[mb]\.sc|ft|sec
    |jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|(?:[^\W\d_]\.)*[^\W\d_]""",
    re.VERBOSE,
)
_OPENERS = re.compile(
    r"""an?|the|this|that|these|those|its?|he|she|they|we|you|i|in|on|at|as|if|when|while|after|before|since|for
    |from|by|with|to|there|here|his|her|their|our|your|my|but|and|or|so|yet|however|moreover|furthermore|although
    |though|because|what|who|why|how|where|which|no|not|all|some|many|most|each|both|one|then|thus|therefore|also
    |another|other|such|once|until|under|over|during""",
    re.VERBOSE,
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it; joined they are the text.

    A sentence ends at a stop before white space, unless the word before is an abbreviation, an
    initial or the number of a list item, or what follows cannot begin a sentence (a small letter,
    except in text without capitals). Blank lines, list items and table rows divide too; a single
    line break does not. Linear in the length of the text.
    """
    has_capitals = text != text.lower()
    return _divide(text, _sentence_ends(text, has_capitals))


def _sentence_ends(text: str, has_capitals: bool) -> Iterator[int]:
    last = 0
    for match in _BOUNDARY.finditer(text):
        white = _WHITE.match(text, match.end())
        position = white.end() if white else match.end()
        if position > last and (match["stop"] is None or _ends_sentence(text, match, position, has_capitals)):
            yield position
            last = position


def _ends_sentence(text: str, match: re.Match[str], position: int, has_capitals: bool) -> bool:
    following = _NEXT_WORD.match(text, position, position + 40)
    word, sign = (following[1], following[2]) if following else ("", "")
    if (has_capitals and word[:1].islower()) or (not word and sign in (*",;:.!?)]}%", "")):
        return False
    if match["stop"] != ".":
        return True
    start = match.start()
    last = _LAST_WORD.search(text, max(0, start - 40), start)
    before = last[1].lower() if last else ""
    if _NEVER_LAST.fullmatch(before) or _ENUMERATOR.search(text, max(0, start - 40), start):
        return False
    if _BEFORE_NUMBERS.fullmatch(before):
        return not word[:1].isdigit()
    return not _MAYBE_LAST.fullmatch(before) or _OPENERS.fullmatch(word.lower()) is not None


# Prefix

_WEIGHTY = re.compile(r"[A-Z]?[a-z]+|\S")


def _prefix(title: str, heading: tuple[str, ...]) -> str:
    """The line "title > heading > path", shortened; "" where there is neither."""
    names = [name for name in map(_on_one_line, (title, *heading)) if name]
    if title and len(names) > 1 and names[0].casefold() == names[1].casefold():
        names = names[1:]
    for inner in range(len(names) - 1, 0, -1):
        dropped = ["…"] if inner < len(names) - 1 else []
        line = " > ".join([names[0], *dropped, *names[-inner:]])
        if _estimate(line) <= PREFIX_TOKENS:
            return line
    if len(names) < 2:
        return _shortened(names[0], PREFIX_TOKENS) if names else ""
    innermost = _shortened(names[-1], PREFIX_TOKENS // 2)
    between = " > … > " if len(names) > 2 else " > "
    return _shortened(names[0], PREFIX_TOKENS - _estimate(between + innermost)) + between + innermost


def _on_one_line(name: str) -> str:
    # A quarter of the budget in the longest words has fewer characters than this.
    return " ".join(name[:1000].split())


def _estimate(text: str) -> int:
    """About how many tokens a text has, rather too many: one for three letters of a word or for another sign."""
    signs = _WEIGHTY.findall(unicodedata.normalize("NFD", text))  # some tokenizers count the parts of 한
    return sum(-(-len(sign) // 3) for sign in signs)


def _shortened(name: str, tokens: int) -> str:
    """A name cut to an estimate of tokens: between words, or within its first word where that is too long."""
    if _estimate(name) <= tokens:
        return name
    length = bisect_right(range(len(name)), tokens - 1, key=lambda end: _estimate(name[:end])) - 1
    start = name[:length]
    return (start[: start.rfind(" ")] if " " in start else start) + "…"


_LADDERS: dict[BlockKind, tuple[Splitter, ...]] = {
    "heading": (_words,),
    "text": (_paragraphs, sentences, _lines, _words),
    "list": (_items, sentences, _lines, _words),
    "table": (_rows, _cells, _words),
    "code": (_paragraphs, _lines, _words),
}
