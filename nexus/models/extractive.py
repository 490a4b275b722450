"""Answers made of the passages' own best sentences: no language model, and nothing invented.

A passage is read as statements: sentences, list items, table rows (each with the names of its columns)
and blocks of code. Each is weighed by its cosine to the question, by the terms of the question that it
and what stands around it mention, and by the rank of its passage. Up to three that say different things
are given in reading order, each with its citation; one that introduces steps or code brings them along.

A conversation without passages is its own passage: what was said in it is quoted, without citations.
"""

import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from nexus.chunking import sentences
from nexus.grounding import find_mentions, wanted_terms, weigh_term
from nexus.registry import Task
from nexus.types import Delta, Hit, Prompt, Vectors

TASKS: tuple[Task, ...] = ("generate",)

Embed = Callable[[Sequence[str]], Awaitable[Vectors]]
Kind = Literal["sentence", "item", "row", "code", "heading"]

MOST_STATEMENTS = 3
COMPARED_STATEMENTS = 16  # these are embedded, in one call
COMPARED_CHARACTERS = 240
DEFAULT_WORDS = 250
WORDS_PER_TOKEN = 0.75
QUOTED_WORDS = 60  # what is longer is a table that lost its cells, or the like: an excerpt is quoted
COMPANION_WORDS = 30
CARRIED_STATEMENTS = 24
CARRIED_CODE_LINES = 30
SAME_TERMS = 0.45  # two statements say the same when they share this much of the shorter one's terms
HEADING_WORDS = 8
CELLS_FOLLOW = " — "  # after the first cell of a row, which is what the row is about
READ_CHARACTERS = 32_000  # of a conversation, its end
NOTHING_TO_QUOTE = (
    "I only quote, word for word, what documents and this conversation say, and nothing said here answers this."
)


@dataclass(frozen=True, slots=True)
class Scale:
    """What a statement's score is made of, how much it must be, and how far below the best one's it may be.

    `around` is the weighted share of the question's terms that the statement, its heading and its title
    mention, `own` that of the statement alone; `rank` is for each e-fold of the passage's number.
    """

    cosine: float
    around: float
    own: float
    rank: float
    least: float
    slack: float


# Fitted on chunking_eval to put a sentence of the answer first (a softmax over the sentences retrieved
# for each question), then divided so that the first weight is 1. `least` refuses what 1 in 100 of its
# questions would need; within `slack`, further sentences are wanted as often as they are not.
BY_MEANING = Scale(cosine=1.0, around=1.2, own=0.0, rank=-0.13, least=0.6, slack=0.15)
BY_WORDS = Scale(cosine=0.0, around=1.0, own=0.35, rank=-0.14, least=0.25, slack=0.12)
# What the form of a statement adds. The first four agree with the same fit. That set has no tables and
# hardly any codes, so the others are chosen: a row keyed by the name asked for is likely the answer, one
# that is only about its table's subject answers something else, and about E-512, where no passage
# mentions E-512, there is little to say.
QUESTION, FRAGMENT, SHORT, FIGURE = -0.45, -0.15, -0.2, 0.2
NAMED_ROW, OTHER_ROW, UNKNOWN_NAME = 0.2, -0.5, -0.25
OWN_SUBJECT = 0.33  # of the terms that title and heading leave open, a row must mention this share


@dataclass(frozen=True, slots=True)
class Statement:
    """The least of a passage that can be quoted; headings are kept for what they say of others.

    `passage` counts from 1, `paragraph` within it. `text` is on one line, except that of code.
    `marker` is what a list item begins with, and "" where it only continues one.
    `context` is the nearest heading line above, where the passage has one.
    """

    passage: int
    paragraph: int
    kind: Kind
    text: str
    marker: str = ""
    context: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A statement that might be quoted: its index among all, what it mentions, and what speaks for it."""

    index: int
    mentioned: frozenset[str]
    own: float
    around: float
    form: float
    score: float = 0.0


def open(address: str, *, embed: Embed | None = None, name: str | None = None) -> "Extractive":
    """`extractive:` needs nothing. With `embed`, statements are compared with the question by meaning too."""
    return Extractive(embed, name or "extractive")


class Extractive:
    """A Generator that quotes. The same prompt always has the same answer."""

    sees_images = False

    def __init__(self, embed: Embed | None = None, name: str = "extractive") -> None:
        self.name = name
        self._embed = embed

    async def check(self) -> None:
        """It needs nothing that could be away."""

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        """The answer quote by quote; where no statement answers: nothing, or one sentence in a conversation."""
        if prompt.question or prompt.passages:
            read = [read_statements(number, hit.text) for number, hit in enumerate(prompt.passages, 1)]
            statements = [statement for statements in read for statement in statements]
            quotes = await self._find_quotes(prompt.question, prompt.passages, statements)
            pieces = compose(quotes, prompt.max_tokens, prompt.stop)
        else:
            question, statements = read_conversation(prompt)
            quotes = await self._find_quotes(question, (_CONVERSATION,), statements)
            pieces = compose(quotes, prompt.max_tokens, prompt.stop, cites=False)
            pieces = pieces if quotes else _stopped([NOTHING_TO_QUOTE], prompt.stop)
        for piece in pieces:
            yield Delta(piece)
        yield Delta(finish_reason="stop")

    async def _find_quotes(
        self, question: str, passages: Sequence[Hit], statements: Sequence[Statement]
    ) -> list["Quote"]:
        candidates = find_candidates(question, passages, statements)
        scale = BY_WORDS
        ranked = _rank(candidates, statements, scale, [0.0] * len(candidates))
        if self._embed is not None and ranked:
            scale, ranked = BY_MEANING, ranked[:COMPARED_STATEMENTS]
            texts = [statements[candidate.index].text[:COMPARED_CHARACTERS] for candidate in ranked]
            vectors = await self._embed([question, *texts])
            ranked = _rank(ranked, statements, scale, (vectors[1:] @ vectors[0]).tolist())
        chosen = choose(ranked, statements, scale)
        return gather(chosen, statements, frozenset(wanted_terms(question)))


# Reading a conversation

_CONVERSATION = Hit("", "", "", 0, 0.0, 0.0, "", "", "", (), None, None, None, {})


def read_conversation(prompt: Prompt) -> tuple[str, list[Statement]]:
    """What is asked, and the statements that were made apart from it, as of one passage.

    Asked is the last question in the last message of the user, or all of that message where it has none.
    What the system was told is not quoted, and no question answers another.
    """
    turns = [message for message in prompt.messages if message.role != "system"]
    asking = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=None)
    asked = ((prompt.text or "") if asking is None else turns[asking].text)[-READ_CHARACTERS:]
    questions = [said.text for said in read_statements(1, asked) if said.text.endswith("?")]
    texts = [turn.text for index, turn in enumerate(turns) if index != asking] + ([asked] if questions else [])
    statements = read_statements(1, "\n\n".join(texts)[-READ_CHARACTERS:])
    stated = [said for said in statements if not said.text.endswith("?")]
    return questions[-1] if questions else asked, stated


# Reading passages

_BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")
_MARKER = re.compile(r"(\s*(?:[-*+•‣◦–]|\d{1,3}[.)]))\s+(?=\S)")
_PIPE = re.compile(r"(?:^|(?<=\s))\|(?=\s|$)")
_RULE_SIGNS = frozenset("-|:+= \t")
_FIGURE = re.compile(r"(?!(?:19|20)\d\d$)[-+±]?\d[\d.,]*(?:\s?\S{1,4})?")
_STOPPED = re.compile(r"[.!?…:;,]['\"”’)\]]*$")
_CODE_SIGNS = re.compile(
    r"""
      ^\s*(?:[$>%\#]\s | // | /\* | </?\w | @\w | \#include | \.{0,2}/\w)
    | [{};\\]\s*$
    | \w\(.*\)\s*[{;:]?\s*$
    | (?:^|\s)(?:--\w | -[A-Za-z](?:\s|$))
    | \s(?: := | == | = | && | -> | => | << | >> )\s
    | ^\s*\w+=\S | \w::\w
    | ^\s*(?:import|from|def|class|return|sudo|cd|export|source|echo)\s+[\w./~$"'-]+
    """,
    re.VERBOSE,
)


def read_statements(passage: int, text: str) -> list[Statement]:
    """What a passage says, in order."""
    statements: list[Statement] = []
    context = ""
    paragraphs = [paragraph for paragraph in _BLANK.split(text) if paragraph.strip()]
    for number, paragraph in enumerate(paragraphs):
        is_introduced = bool(statements) and statements[-1].text.endswith(":")
        is_last = number == len(paragraphs) - 1
        for kind, marker, said in _read_paragraph(paragraph, is_introduced, is_last):
            context = said if kind == "heading" else context
            statements.append(Statement(passage, number, kind, said, marker, context))
    return statements


def _read_paragraph(paragraph: str, is_introduced: bool, is_last: bool) -> Iterator[tuple[Kind, str, str]]:
    """(kind, marker, text) of each statement of a paragraph."""
    lines = paragraph.strip("\n").split("\n")
    if _is_code(lines, is_introduced):
        yield "code", "", "\n".join(line for line in lines if not line.lstrip().startswith("```"))
        return
    if len(lines) == 1 and not is_introduced and _is_heading(lines[0], is_last):
        yield "heading", "", lines[0].strip().lstrip("# ")
        return
    for is_table, group in groupby(lines, _is_row):
        if is_table:
            yield from (("row", "", row) for row in _read_table(list(group)))
        else:
            yield from _read_prose(list(group))


def _is_heading(line: str, is_last: bool) -> bool:
    """Whether a line names what follows. Where nothing does, one with a figure in it is a remark."""
    if is_last and any(sign.isdigit() for sign in line):
        return False
    is_short = len(line.split()) <= HEADING_WORDS and ": " not in line
    return is_short and not _STOPPED.search(line) and not _MARKER.match(line) and not _PIPE.search(line)


def _is_code(lines: Sequence[str], is_introduced: bool) -> bool:
    """Whether most lines look like code, or a colon introduces what is neither prose nor list nor table."""
    if lines[0].lstrip().startswith("```"):
        return True
    signs = [bool(_CODE_SIGNS.search(line)) and not _is_prose(line) for line in lines]
    if 2 * sum(signs) > len(lines):
        return True
    first = lines[0].strip()
    is_plain = not any(_MARKER.match(line) or _PIPE.search(line) or _is_prose(line) for line in lines)
    return is_introduced and is_plain and not first[:1].isupper()


def _is_row(line: str) -> bool:
    return _PIPE.search(line) is not None or ("|" in line and _is_rule(line))


def _is_rule(line: str) -> bool:
    """Whether a line is what Markdown has under the names of the columns."""
    return "-" in line and _RULE_SIGNS.issuperset(line)


def _is_prose(line: str) -> bool:
    return bool(re.search(r"\w[.!?…][\"”’)]*\s*$", line)) and line.count(" ") > 3


def _read_table(lines: Sequence[str]) -> Iterator[str]:
    """Each row as "first cell — column: cell; column: cell"; the first row names the columns if it can."""
    rows = [_cells(line) for line in lines if not _is_rule(line)]
    header: list[str] = []
    if len(rows) > 1 and all(cell and not _FIGURE.fullmatch(cell) for cell in rows[0]):
        header = rows.pop(0)
    for row in rows:
        names = header if len(header) == len(row) else [""] * len(row)
        pairs = [(name, cell) for name, cell in zip(names, row, strict=True) if cell.strip("-–—")]
        if pairs:
            (name, subject), *others = pairs
            if name and not any(sign.isalpha() for sign in subject):
                subject = f"{name} {subject}"
            told = "; ".join(f"{name}: {cell}" if name else cell for name, cell in others)
            yield f"{subject}{CELLS_FOLLOW}{told}" if told else subject


def _cells(line: str) -> list[str]:
    line = line.strip()
    if len(line) > 1 and line.startswith("|") and line.endswith("|"):
        line = line[1:-1]
    return [" ".join(cell.split()) for cell in line.split("|")]


def _read_prose(lines: Sequence[str]) -> Iterator[tuple[Kind, str, str]]:
    """Sentences, and those of list items with the marker before the first of each."""
    parts: list[tuple[str, list[str]]] = []
    for line in lines:
        found = _MARKER.match(line)
        if found or not parts:
            parts.append((found[1] if found else "", [line[found.end() :] if found else line]))
        else:
            parts[-1][1].append(line)
    for marker, said in parts:
        for number, sentence in enumerate(sentences(" ".join(" ".join(said).split()))):
            yield "item" if marker else "sentence", marker if number == 0 else "", sentence.strip()


# Choosing

_FIGURES = (  # words that ask for a figure, and what such a figure is followed by
    (r"heavy|weigh\w*|mass|load", r"kg|g|t|lbs?|tons?|tonnes?"),
    (r"how (?:long|soon|often|late|quickly)|when|duration|time", r"m?s|sec\w*|min\w*|h|hours?|days?|weeks?"),
    (r"how (?:long|old|soon)|when|age", r"months?|years?"),
    (r"how (?:long|far|high|deep|wide|tall|thick|thin|close)|distance|length|height|depth", r"[kcm]?m|ft|in"),
    (r"offset|range|size|clearance|gap|tread", r"[kcm]?m|ft|in"),
    (r"tight|torque", r"N·m|Nm"),
    (r"hot|cold|warm|temperature", r"°\s?[CF]|K"),
    (r"full|level|percent\w*|rate|share|charge", r"%|percent"),
    (r"fast|speed", r"m/s|km/h|mph|rpm"),
    (r"pressure", r"bar|psi|[kM]?Pa"),
    (r"voltage", r"[mk]?V"),
    (r"current", r"m?A"),
    (r"how (?:many|much)|number|amount|count|date|year|cost|price|value|version|limit", r""),
)
_ASKED_FIGURES = tuple(
    (re.compile(rf"\b(?:{asked})\b", re.IGNORECASE), re.compile(rf"\d\s?(?:{unit})(?!\w)" if unit else r"\d"))
    for asked, unit in _FIGURES
)
_ASKS = re.compile(r"\b(?:how (?!(?:do|to|can|should|does|did)\b)|what\b|which\b|when\b)", re.IGNORECASE)


def find_candidates(question: str, passages: Sequence[Hit], statements: Sequence[Statement]) -> list[Candidate]:
    """What might be quoted, with the share of the question's terms in it and around it.

    A term weighs more the fewer statements mention it. Headings say nothing by themselves, and
    neither does the announcement of something that the passage does not show.
    """
    mentions = [find_mentions(statement.text) for statement in statements]
    names = [find_mentions(" ".join((hit.title, *hit.heading))) for hit in passages]
    wanted = frozenset(wanted_terms(question))
    count = len(mentions)
    rarity = {
        term: weigh_term(term) * math.log1p((count + 0.5) / (sum(term in said for said in mentions) + 0.5))
        for term in wanted
    }
    whole = sum(rarity.values()) or 1.0

    def share(mentioned: frozenset[str]) -> float:
        return sum(weight for term, weight in rarity.items() if term in mentioned) / whole

    known = frozenset().union(*mentions, *names)
    unknown = UNKNOWN_NAME if any(_is_name(term) and term not in known for term in wanted) else 0.0
    figures = find_figures(question)
    candidates = []
    for index, (statement, mentioned) in enumerate(zip(statements, mentions, strict=True)):
        announces = statement.text.endswith(":")
        if statement.kind == "heading" or (announces and not find_carried(index, statements)):
            continue
        heading = names[statement.passage - 1] | find_mentions(statement.context)
        own, around = share(mentioned), share(mentioned | heading)
        form = _weigh_form(statement, figures) + unknown
        if statement.kind == "row":
            form += NAMED_ROW if _is_keyed(statement, wanted) else 0.0
            left_open = 1 - share(heading)
            form += OTHER_ROW if around - share(heading) < OWN_SUBJECT * left_open else 0.0
        candidates.append(Candidate(index, mentioned, own, around, form))
    return candidates


def find_figures(question: str) -> list[re.Pattern[str]]:
    """Patterns of the figures that a question asks for: how heavy is told in kg, and how many by a number."""
    if not _ASKS.search(question):
        return []
    return [figure for asked, figure in _ASKED_FIGURES if asked.search(question)]


def _weigh_form(statement: Statement, figures: Sequence[re.Pattern[str]]) -> float:
    text, is_sentence = statement.text, statement.kind == "sentence"
    form = QUESTION if text.endswith("?") else 0.0
    form += FRAGMENT if is_sentence and not _STOPPED.search(text) else 0.0
    form += SHORT if is_sentence and len(text.split()) < 3 else 0.0
    form += FIGURE if any(figure.search(text) for figure in figures) else 0.0
    return form


def _is_keyed(row: Statement, wanted: frozenset[str]) -> bool:
    """Whether the first cell of a row has a name or number that the question asks for."""
    subject = find_mentions(row.text.partition(CELLS_FOLLOW)[0]) & wanted
    return any(len(term) > 2 and any(sign.isdigit() for sign in term) for term in subject)


def _is_name(term: str) -> bool:
    return any(sign.isdigit() for sign in term) and any(sign.isalpha() for sign in term)


def _rank(
    candidates: Sequence[Candidate], statements: Sequence[Statement], scale: Scale, cosines: Sequence[float]
) -> list[Candidate]:
    """The candidates with their scores, best first, ties in reading order."""
    scored = []
    for candidate, cosine in zip(candidates, cosines, strict=True):
        score = scale.cosine * cosine + scale.around * candidate.around + scale.own * candidate.own
        score += scale.rank * math.log(statements[candidate.index].passage) + candidate.form
        # Rounded, because the last bits of a cosine depend on what else was embedded with it.
        scored.append(replace(candidate, score=round(score, 4)))
    return sorted(scored, key=lambda candidate: (-candidate.score, candidate.index))


def choose(ranked: Sequence[Candidate], statements: Sequence[Statement], scale: Scale) -> list[int]:
    """Indices of the statements to quote, best first: good enough, and each saying something else."""
    least = max(scale.least, ranked[0].score - scale.slack) if ranked else 0.0
    chosen: list[Candidate] = []
    for candidate in ranked:
        if len(chosen) == MOST_STATEMENTS or candidate.score < least:
            break
        if not any(_overlap(candidate.mentioned, other.mentioned) >= SAME_TERMS for other in chosen):
            chosen.append(candidate)
    return [candidate.index for candidate in chosen]


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, min(len(one), len(other)))


# Composing


@dataclass(frozen=True, slots=True)
class Quote:
    """Statements given together under one citation, and in `carried` the code or the steps they announce."""

    index: int
    passage: int
    statements: tuple[Statement, ...]
    carried: tuple[Statement, ...]

    @property
    def is_block(self) -> bool:
        """Whether it stands by itself in the answer, apart from running text."""
        return bool(self.carried) or self.statements[-1].kind in ("row", "code")


_LEANING = re.compile(
    r"(?:it|its|they|their|them|this|these|those|he|she|his|her|otherwise|instead|then|after that|before that"
    r"|below that|above that|beyond that|without it|until then|if not|if so|both|neither)\b",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"\s?\[\d{1,4}(?:\s*[,;–-]\s*\d{1,4})*\]")


def gather(chosen: Sequence[int], statements: Sequence[Statement], wanted: frozenset[str]) -> list[Quote]:
    """The chosen statements, best first, with what they cannot be understood without or announce."""
    quotes: list[Quote] = []
    used: set[int] = set()
    for index in chosen:
        run, carried = _with_companions(index, statements, wanted), find_carried(index, statements)
        if statements[index].kind == "code":
            run, carried = _with_introduction(index, statements)
        if used.isdisjoint([*run, *carried]):
            used.update(run, carried)
            said = tuple(_excerpt(statements[i], wanted) for i in run)
            brought = tuple(statements[i] for i in carried)
            quotes.append(Quote(run[0], statements[index].passage, said, brought))
    return quotes


def _with_introduction(index: int, statements: Sequence[Statement]) -> tuple[list[int], list[int]]:
    """The statement before some code and all the code after it; without such a statement, only the code."""
    first = last = index
    while _is_code_beside(first - 1, index, statements):
        first -= 1
    while _is_code_beside(last + 1, index, statements):
        last += 1
    code = list(range(first, last + 1))
    before = first - 1
    if before < 0 or statements[before].passage != statements[index].passage:
        return code, []
    is_short = len(statements[before].text.split()) <= COMPANION_WORDS
    return ([before], code) if is_short and statements[before].kind in ("sentence", "item") else (code, [])


def _is_code_beside(index: int, of: int, statements: Sequence[Statement]) -> bool:
    is_there = 0 <= index < len(statements) and statements[index].passage == statements[of].passage
    return is_there and statements[index].kind == "code"


def _with_companions(index: int, statements: Sequence[Statement], wanted: frozenset[str]) -> list[int]:
    """A statement, after the one that it leans on; and before one that leans on it and is to the point."""
    run = [index]
    if _LEANING.match(statements[index].text) and _is_companion(index - 1, index, statements):
        run.insert(0, index - 1)
    elif _is_companion(index + 1, index, statements):
        following = statements[index + 1].text
        if _LEANING.match(following) and find_mentions(following) & wanted:
            run.append(index + 1)
    return run


def _is_companion(index: int, of: int, statements: Sequence[Statement]) -> bool:
    """Whether a statement stands in the same paragraph, or list item, as one beside it, and is short."""
    if not 0 <= index < len(statements) or statements[index].passage != statements[of].passage:
        return False
    one, later = statements[index], statements[max(index, of)]
    is_like = one.kind == statements[of].kind and one.kind in ("sentence", "item")
    is_joined = one.paragraph == statements[of].paragraph and not later.marker
    return is_like and is_joined and len(one.text.split()) <= COMPANION_WORDS


def find_carried(index: int, statements: Sequence[Statement]) -> list[int]:
    """Indices of what a statement ending in a colon announces: code, list items, rows, or one sentence."""
    after = index + 1
    if not statements[index].text.endswith(":") or after >= len(statements):
        return []
    kind, passage, depth = statements[after].kind, statements[after].passage, _depth(statements[after])
    if passage != statements[index].passage or kind == "heading":
        return []
    if kind == "item" and statements[index].kind == "item" and depth <= _depth(statements[index]):
        return []
    end = after + 1
    while kind != "sentence" and end < min(len(statements), after + CARRIED_STATEMENTS):
        following = statements[end]
        if (following.passage, following.kind) != (passage, kind):
            break
        if kind == "item" and following.marker and _depth(following) < depth:
            break
        end += 1
    return list(range(after, end))


def _depth(statement: Statement) -> int:
    return len(statement.marker) - len(statement.marker.lstrip())


def _excerpt(statement: Statement, wanted: frozenset[str]) -> Statement:
    """A statement of bearable length: of a longer one the stretch of words that mentions most."""
    words = statement.text.split()
    if statement.kind == "code" or len(words) <= QUOTED_WORDS:
        return statement
    starts = range(0, len(words) - QUOTED_WORDS // 2, QUOTED_WORDS // 4)
    stretches = [words[start : start + QUOTED_WORDS] for start in starts]
    found = [len(find_mentions(" ".join(stretch)) & wanted) for stretch in stretches]
    best = found.index(max(found))
    before = "… " if best else ""
    after = " …" if starts[best] + QUOTED_WORDS < len(words) else ""
    return replace(statement, text=before + " ".join(stretches[best]) + after)


def compose(quotes: Sequence[Quote], max_tokens: int | None, stop: Sequence[str], cites: bool = True) -> list[str]:
    """The pieces of the answer, in reading order. Where there is not room for all, the best stay."""
    room = DEFAULT_WORDS if max_tokens is None else max(1, int(max_tokens * WORDS_PER_TOKEN))
    kept: list[tuple[Quote, str]] = []
    for quote in quotes:
        text = _render(quote, room, f" [{quote.passage}]" if cites else "")
        room -= len(text.split())
        if room < 0 and kept:
            break
        kept.append((quote, text))
    kept.sort(key=lambda pair: (pair[0].passage, pair[0].index))
    pieces: list[str] = []
    for (before, _), (quote, text) in zip([(None, ""), *kept], kept, strict=False):
        gap = "" if before is None else "\n\n" if before.is_block or quote.is_block else " "
        pieces.append(gap + text)
    return _stopped(pieces, stop)


def _render(quote: Quote, room: int, citation: str) -> str:
    """A quote with its citation; what it carries is shortened to fit, and so is the quote itself."""
    if quote.statements[-1].kind == "code":
        return f"{_fenced(quote.statements)}\n\n{citation.lstrip()}".rstrip()
    *first, last = [_REFERENCE.sub("", statement.text) for statement in quote.statements]
    if quote.carried:
        head = " ".join([*first, f"{last.rstrip(':.')}{citation}:"])
        carried = list(quote.carried)
        while len(carried) > 1 and len(f"{head} {_listed(carried)}".split()) > room:
            carried.pop()
        return f"{head}\n\n{_listed(carried)}"
    words = " ".join([*first, last]).split(" ")
    if len(words) > room:
        return f"{' '.join(words[:room])} …{citation}"
    text = " ".join(words)
    return f"{text}{citation}" if text[-1:] in "!?…" else f"{text.rstrip('.;,')}{citation}."


def _listed(carried: Sequence[Statement]) -> str:
    if carried[0].kind == "code":
        return _fenced(carried)
    lines: list[str] = []
    for statement in carried:
        text = _REFERENCE.sub("", statement.text)
        if statement.marker or not lines:
            lines.append(f"{statement.marker or '-'} {text}" if statement.kind != "sentence" else text)
        elif statement.kind == "item":
            lines[-1] += f" {text}"
        else:
            lines.append(f"- {text}")
    return "\n".join(lines)


def _fenced(code: Sequence[Statement]) -> str:
    lines = "\n\n".join(statement.text for statement in code).split("\n")
    kept = [*lines[:CARRIED_CODE_LINES], *(["…"] if len(lines) > CARRIED_CODE_LINES else [])]
    return "\n".join(["```", *kept, "```"])


def _stopped(pieces: Sequence[str], stop: Sequence[str]) -> list[str]:
    """The pieces up to the first stop string."""
    whole = "".join(pieces)
    room = min((whole.index(sign) for sign in stop if sign and sign in whole), default=len(whole))
    kept = []
    for piece in pieces:
        kept.append(piece[:room])
        room -= len(kept[-1])
    return [piece for piece in kept if piece]
