"""Answers made of quoted sentences, rows, steps and code, and when there is none."""

import asyncio
import re
from collections.abc import Sequence

import numpy as np
import pytest

from nexus.grounding import cited_numbers
from nexus.models import extractive
from nexus.models.extractive import Embed, read_statements
from nexus.registry import open_part
from nexus.types import Hit, Prompt, Vectors

TORQUES = """fastener | thread | torque
brake caliper bolt | M8 | 27 N·m
tow eye | M16 | 150 N·m
hub motor cover | M5 | 5.5 N·m"""

GRIPPER = """The gripper closes with 20 N to 140 N. Its jaws are replaced when the rubber is below 1.8 mm.

The gripper weighs 1.4 kg, which counts as payload. A pendant cable is 8 m long."""

STEPS = """Wear gloves in the hut.

To change the pack of the hauler, proceed as follows:

1. Park on level floor. Close the brake.
2. Pull both pins, front first.
3. Roll the pack out fully:
   - lower the table last
   - keep your hands off the rail

The swap takes about seven minutes."""

BUILD = """To build the documentation of a package, run:

rosdoc2 build --package-path <package-path>

cd docs_output && ls

The result can be viewed in a browser."""


# The second sentence fits the question a little better than the first.
TWO = "Pack\n\nCharging the hauler takes an hour and a key. For charging, hauler and pack go to the hut."


def passage(text: str, title: str = "", heading: tuple[str, ...] = ()) -> Hit:
    return Hit("c", "d", "v", 0, 1.0, 0.5, text, title, "s", heading, None, None, None, {})


def answer(question: str, *passages: Hit | str, embed: Embed | None = None, **settings: object) -> str:
    return "".join(pieces(question, *passages, embed=embed, **settings))


def pieces(question: str, *passages: Hit | str, embed: Embed | None = None, **settings: object) -> list[str]:
    hits = tuple(one if isinstance(one, Hit) else passage(one) for one in passages)
    prompt = Prompt((), question, hits, **settings)  # type: ignore[arg-type]

    async def collect() -> list[str]:
        return [delta.text async for delta in extractive.open("extractive:", embed=embed).stream(prompt) if delta.text]

    return asyncio.run(collect())


def test_it_opens_by_its_address() -> None:
    assert open_part("models", "extractive:", embed=None).name == "extractive"


def test_a_sentence_is_quoted_with_its_citation_before_the_stop() -> None:
    said = answer("how heavy is the gripper?", "Nobody works alone in the yard.", GRIPPER)
    assert said == "The gripper weighs 1.4 kg, which counts as payload [2]."


def test_a_table_row_is_given_with_the_names_of_its_columns() -> None:
    assert answer("torque of the tow eye", TORQUES) == "tow eye — thread: M16; torque: 150 N·m [1]."


def test_a_markdown_table_is_read_as_one() -> None:
    table = "| fastener | torque |\n|---|---|\n| tow eye | 150 N·m |\n| wheel nut | 96 N·m |"
    assert answer("torque of the tow eye", table) == "tow eye — torque: 150 N·m [1]."


def test_the_rule_under_a_header_is_no_row() -> None:
    table = "| | fastener |\n|:--|--:|\n| x | tow eye |"
    assert [statement.text for statement in read_statements(1, table)] == ["fastener", "x — tow eye"]


def test_a_table_without_names_of_columns_invents_none() -> None:
    table = "tow eye | 150 N·m\nwheel nut | 96 N·m"
    assert answer("torque of the tow eye", table) == "tow eye — 150 N·m [1]."


def test_empty_cells_are_left_out_and_bare_numbers_named() -> None:
    table = "pillar | place | remark\n5 | Gantry Bay | -\n6 | Battery Hut, outside wall |"
    assert answer("where is stop pillar 6?", table) == "pillar 6 — place: Battery Hut, outside wall [1]."


def test_a_title_speaks_for_its_passage() -> None:
    brakes, tyres = (passage("Replaced at 4 mm, in the shed.", title) for title in ("Brakes", "Tyres"))
    assert answer("when are tyres replaced?", brakes, tyres) == "Replaced at 4 mm, in the shed [2]."


def test_a_row_about_something_else_is_no_answer() -> None:
    specification = passage(TORQUES, "HX-3", ("Torques",))
    assert answer("torque of the hip actuator screws of the HX-3", specification) == ""


def test_a_name_in_the_first_cell_finds_its_row() -> None:
    """Even where a sentence mentions more of the question."""
    table = "code | meaning\nE-403 | no radio\nE-414 | clock differs by more than 20 ms"
    said = answer("panel says E-414, what is it", f"Codes such as E-414 are on the panel of every robot.\n\n{table}")
    assert said.endswith("E-414 — meaning: clock differs by more than 20 ms [1].")


def test_steps_come_with_what_introduces_them() -> None:
    assert answer("how do I change the pack of the hauler?", STEPS) == (
        "To change the pack of the hauler, proceed as follows [1]:\n\n"
        "1. Park on level floor. Close the brake.\n"
        "2. Pull both pins, front first.\n"
        "3. Roll the pack out fully:\n"
        "   - lower the table last\n"
        "   - keep your hands off the rail"
    )


def test_steps_end_where_the_list_above_goes_on() -> None:
    text = "- Before the start:\n  - open the latch\n  - lift the lid\n- Never run it wet."
    assert answer("what to do before the start?", text) == (
        "Before the start [1]:\n\n  - open the latch\n  - lift the lid"
    )


def test_a_step_that_has_steps_of_its_own_brings_only_those() -> None:
    assert answer("roll the pack out fully", STEPS) == (
        "Roll the pack out fully [1]:\n\n   - lower the table last\n   - keep your hands off the rail"
    )


@pytest.mark.parametrize("question", ["how do I build documentation of a package?", "rosdoc2 package-path"])
def test_code_comes_with_what_introduces_it(question: str) -> None:
    """Whether the words of the question are in the introduction or in the code."""
    assert answer(question, BUILD) == (
        "To build the documentation of a package, run [1]:\n\n"
        "```\nrosdoc2 build --package-path <package-path>\n\ncd docs_output && ls\n```"
    )


def test_brackets_in_code_are_kept_and_cite_nothing() -> None:
    text = "The path is printed so:\n\nprint(sys.argv[2]);"
    said = answer("how is the path printed?", text, "Other things.")
    assert said == "The path is printed so [1]:\n\n```\nprint(sys.argv[2]);\n```"
    assert cited_numbers(said) == {1}


def test_references_of_the_passage_are_not_taken_for_citations() -> None:
    said = answer("what cures the fault?", "Other.", "A reset cures the fault [1, 12]. Others disagree [3].")
    assert said == "A reset cures the fault [2]."


@pytest.mark.parametrize("text", ["Wheel nut torque", "Wheel nut torque\n\nOf the hauler", "", "  \n\n "])
def test_a_heading_alone_is_no_answer(text: str) -> None:
    assert answer("wheel nut torque", text) == ""


def test_a_remark_with_a_figure_is_no_heading() -> None:
    assert answer("ramp closed on days", "Ramp 2 closed on 5 days") == "Ramp 2 closed on 5 days [1]."


def test_prose_is_preferred_to_fragments_stubs_and_questions() -> None:
    sentence = "The yard stop of June lasted long."
    for other in ("Yard stop.", "Why the yard stop?", "yard stop list of pages and further reading so"):
        assert answer("yard stop", f"{other}\n\n{sentence}\n\nEnd of it all.") == f"{sentence[:-1]} [1]."


def test_a_heading_speaks_for_what_stands_under_it() -> None:
    text = "Brakes\n\nReplaced at 3 mm.\n\nTyres\n\nReplaced at 4 mm."
    assert answer("when are tyres replaced?", text) == "Replaced at 4 mm [1]."


@pytest.mark.parametrize("text", ["To calibrate the arm, do this:", "1. Calibrate the arm so:\n2. Go."])
def test_an_announcement_of_nothing_is_no_answer(text: str) -> None:
    assert "alibrate" not in answer("how do I calibrate the arm?", text)


@pytest.mark.parametrize("question", ["who won the football world cup in 1998?", "", "?"])
def test_a_question_about_something_else_gets_nothing(question: str) -> None:
    assert pieces(question, GRIPPER, TORQUES) == []


def test_nothing_is_said_about_a_name_that_no_passage_mentions() -> None:
    async def embed(texts: Sequence[str]) -> Vectors:
        """Everything is somewhat like the question."""
        return np.array([(1.0, 0.0), *[(0.5, 0.75**0.5)] * (len(texts) - 1)], np.float32)

    text = "The panel shows the charge and the panel blinks. E-414 is a fault."
    assert answer("the panel shows E-414 and blinks", text, embed=embed) == "E-414 is a fault [1]."
    assert answer("the panel shows E-512 and blinks", text, embed=embed) == ""


def test_without_passages_there_is_no_answer() -> None:
    assert pieces("anything") == []


def test_quotes_stand_in_reading_order_and_not_in_order_of_fit() -> None:
    better = "For charging, hauler and pack go to the hut [1]."
    assert answer("charging the hauler pack", TWO, max_tokens=20) == better
    assert answer("charging the hauler pack", TWO) == f"Charging the hauler takes an hour and a key [1]. {better}"


def test_the_same_thing_is_said_once() -> None:
    text = "The wheel nuts of the hauler take 96 N·m."
    assert answer("torque of wheel nuts of the hauler", text, f"Note. {text}") == f"{text[:-1]} [1]."


def test_at_most_three_statements_are_quoted() -> None:
    text = (
        "Ann took that pack home last evening. Bob threw his pack over some fence. Cid never opened"
        " any pack again. Dot filled every pack with sand. Eve painted one pack bright green."
    )
    assert answer("who had a pack?", text).count("[1]") == extractive.MOST_STATEMENTS


def test_a_sentence_that_leans_on_the_one_before_brings_it() -> None:
    said = answer("when is the rubber of the jaws replaced?", GRIPPER)
    assert said == ("The gripper closes with 20 N to 140 N. Its jaws are replaced when the rubber is below 1.8 mm [1].")


def test_what_was_brought_along_is_not_quoted_again() -> None:
    first = "Charging the hauler takes an hour on cold winter days."
    second = "Its charging needs a key from the office for the hauler"
    assert answer("charging the hauler", f"{first} {second}.") == f"{first} {second} [1]."


def test_a_sentence_that_goes_on_with_the_subject_is_brought() -> None:
    text = "The beacon blinks amber at low charge. It stops when the charge is back. Lunch is at noon."
    assert answer("beacon blinks amber at low charge", text) == (
        "The beacon blinks amber at low charge. It stops when the charge is back [1]."
    )


def test_a_table_that_lost_its_cells_is_quoted_in_part() -> None:
    filler = "alpha beta gamma delta " * 30
    said = answer("when was job 7716 started?", f"Log {filler} job 7716 started at 14:28 {filler} end.")
    assert "job 7716 started at 14:28" in said
    assert said.startswith("… ") and said.endswith(" … [1]")
    assert len(said.split()) <= extractive.QUOTED_WORDS + 3


def test_a_figure_is_preferred_where_a_figure_is_asked_for() -> None:
    text = "The load on the ramp came loose. The load on the ramp was 310 kg."
    assert answer("how heavy was the load on the ramp?", text) == "The load on the ramp was 310 kg [1]."


def test_max_tokens_bounds_the_words_and_keeps_the_best() -> None:
    text = "Charging is slow. The hauler pack is charged with 15 A in the Battery Hut by the steward."
    said = answer("with how much is the hauler pack charged in the Battery Hut?", text, max_tokens=20)
    assert said == "The hauler pack is charged with 15 A in the Battery Hut by the steward [1]."
    short = answer("with how much is the hauler pack charged in the Battery Hut?", text, max_tokens=8)
    assert short == "The hauler pack is charged with … [1]"
    assert len(answer("how do I change the pack of the hauler?", STEPS, max_tokens=30).split()) <= 23


def test_a_stop_string_ends_the_answer() -> None:
    said = pieces("how heavy is the gripper?", GRIPPER, stop=("never", " kg"))
    assert said == ["The gripper weighs 1.4"]


def test_every_word_is_of_the_passages() -> None:
    passages = [GRIPPER, TORQUES, STEPS, BUILD]
    known = set(re.findall(r"\w+", " ".join(passages)))
    for question in ("how heavy is the gripper?", "torque of the tow eye", "change the pack", "build package"):
        said = answer(question, *passages)
        assert said
        assert set(re.findall(r"\w+", re.sub(r"\[\d\]", "", said))) <= known


class Meaning:
    """An embedder for which only the texts that contain a word are like the question."""

    def __init__(self, word: str) -> None:
        self.word, self.calls = word, list[Sequence[str]]()

    async def __call__(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(texts)
        rows = [(1.0, 0.0) if n == 0 or self.word in text else (0.0, 1.0) for n, text in enumerate(texts)]
        return np.array(rows, np.float32)


def test_meaning_finds_what_words_do_not() -> None:
    text = "The robot goes back to its dock at 22 % charge. The battery swap has a page of its own."
    question = "at what battery level does it head home?"
    assert "22 %" not in answer(question, text)
    said = answer(question, text, embed=Meaning("dock"))
    assert said == "The robot goes back to its dock at 22 % charge [1]."


def test_meaning_alone_can_refuse() -> None:
    assert answer("who won the cup?", GRIPPER, embed=Meaning("nothing is like it")) == ""


def test_one_short_batch_is_embedded() -> None:
    meaning = Meaning("gripper")
    answer("how heavy is the gripper?", "gripper " * 200 + "end.", *[GRIPPER] * 10, embed=meaning)
    (texts,) = meaning.calls
    assert texts[0] == "how heavy is the gripper?"
    assert len(texts) == 1 + extractive.COMPARED_STATEMENTS
    assert max(map(len, texts)) == extractive.COMPARED_CHARACTERS


def test_nothing_is_embedded_for_no_passages() -> None:
    meaning = Meaning("x")
    assert answer("anything", embed=meaning) == "" and meaning.calls == []


def test_the_same_prompt_has_the_same_answer_in_the_same_pieces() -> None:
    first, second = pieces("charging the hauler pack", TWO), pieces("charging the hauler pack", TWO)
    assert first == second
    assert len(first) == 2


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Rules\n\n1. One. Two.\n2. Three\n   goes on.", ["heading", "item", "item", "item"]),
        ("Run it:\n\nsudo apt update && sudo apt install -y cmake", ["sentence", "code"]),
        ("#include <chrono>\nusing namespace std;\nint main() {", ["code"]),
        ("Set it so:\n\n```\na b c\n```", ["sentence", "code"]),
        ("```\nSome words\n```", ["code"]),
        ("Then type:\n\nros2 node list", ["sentence", "code"]),
        ("Then type:\n\nNothing at all", ["sentence", "sentence"]),
        ("Level 2 of it\n\nIt is wet.", ["heading", "sentence"]),
        ("It was -15 °C (see KM-6). Use 2 of them = 4 kg.", ["sentence", "sentence"]),
        ("a | b\n1 | 2\nAnd so on.", ["row", "sentence"]),
    ],
)
def test_passages_are_read_as_statements(text: str, kinds: list[str]) -> None:
    assert [statement.kind for statement in read_statements(1, text)] == kinds


def test_hostile_text_is_read_in_bounded_time() -> None:
    """Quadratic patterns would take minutes here; the suite's timeout is the limit."""
    for pattern in ("| ", "a(", "- ", "11", "x\n", "  ", "[1", "-a", "--", "|-"):
        answer("what is it worth?", pattern * 30_000 + "x | y")
