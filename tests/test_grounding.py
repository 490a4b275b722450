"""Confidence and its reasons, and which passages an answer cites."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.grounding import (
    USUAL_COSINE_LEAD,
    USUAL_TEXT_LEAD,
    assess,
    cite,
    cited_numbers,
    find_mentions,
    measure,
    wanted_terms,
)
from nexus.types import Hit, RouteScore

QUESTION = "what torque do the flange screws of the KM-6 need?"
ANSWER = "Tool flange: four M6 screws, torque 10.5 N·m on the KM-6."
NEIGHBOUR = "The gripper closes with 20 N to 140 N."
BOTH, DENSE, TEXT = {"dense": 0.55, "text": 12.0}, {"dense": 0.55}, {"text": 12.0}


def hit(text: str, routes: Mapping[str, float] = BOTH, rank: int = 1, **fields: object) -> Hit:
    """A hit with the score that each of its routes gave it."""
    places = {name: RouteScore(rank, score) for name, score in routes.items()}
    values = {"title": "", "source": "manual.md", "heading": (), "cosine": routes.get("dense", 0.0)} | fields
    return Hit(
        chunk_id=f"{rank}", document_id="d", version="v", ordinal=rank, score=1.0, text=text, page=None,
        first_line=None, last_line=None, metadata={}, routes=places, **values,
    )  # fmt: skip


def ranked(best: str, routes: Mapping[str, float] = BOTH, others: int = 6, share: float = 0.6) -> list[Hit]:
    """A best hit, and others whose scores are a share of its own."""
    weaker = {name: score * share for name, score in routes.items()}
    return [hit(best, routes), *(hit(NEIGHBOUR, weaker, rank) for rank in range(2, others + 2))]


def test_nothing_found_is_no_answer() -> None:
    judgement = assess(QUESTION, [])
    assert judgement.confidence == 0.0
    assert judgement.reason == "nothing was found"


@pytest.mark.parametrize("routes", [BOTH, DENSE, TEXT], ids=["both", "dense", "text"])
def test_an_answer_is_told_from_its_neighbourhood(routes: Mapping[str, float]) -> None:
    weak = {name: score / 3 for name, score in routes.items()}
    assert assess(QUESTION, ranked(ANSWER, routes)).confidence > 0.7
    assert assess(QUESTION, ranked(NEIGHBOUR, weak, share=1.0)).confidence < 0.1


@pytest.mark.parametrize("routes", [BOTH, DENSE], ids=["both", "dense"])
def test_a_better_cosine_is_more_confident(routes: Mapping[str, float]) -> None:
    cosines = (0.2, 0.4, 0.6, 0.8)
    confidences = [assess(QUESTION, ranked(ANSWER, routes | {"dense": cosine})).confidence for cosine in cosines]
    assert confidences == sorted(set(confidences))


@pytest.mark.parametrize("routes", [BOTH, DENSE, TEXT], ids=["both", "dense", "text"])
def test_covering_more_of_the_question_is_more_confident(routes: Mapping[str, float]) -> None:
    texts = ["Nothing.", "The screws.", "The flange screws.", "Torque of the flange screws.", ANSWER]
    confidences = [assess(QUESTION, ranked(text, routes)).confidence for text in texts]
    assert confidences == sorted(set(confidences))


@pytest.mark.parametrize("routes", [BOTH, TEXT], ids=["both", "text"])
def test_standing_out_in_bm25_is_more_confident(routes: Mapping[str, float]) -> None:
    level = [hit(ANSWER, routes), *(hit(NEIGHBOUR, routes, rank) for rank in range(2, 8))]
    leading = [hit(ANSWER, {**routes, "text": routes["text"] * 3}), *level[1:]]
    assert assess(QUESTION, leading).confidence > assess(QUESTION, level).confidence


def test_standing_out_in_cosine_is_more_confident_where_there_is_no_bm25() -> None:
    crowd, alone = ranked(ANSWER, DENSE, share=0.95), ranked(ANSWER, DENSE, share=0.5)
    assert assess(QUESTION, alone).confidence > assess(QUESTION, crowd).confidence


def test_routes_that_agree_are_more_confident() -> None:
    agreed = ranked(ANSWER)
    first = replace(agreed[0], routes={"dense": RouteScore(40, 0.55), "text": RouteScore(1, 12.0)})
    later = [replace(one, routes={"text": RouteScore(one.ordinal + 9, 7.2)}) for one in agreed[1:]]
    assert assess(QUESTION, agreed).confidence > assess(QUESTION, [first, *later]).confidence
    assert measure(QUESTION, ranked(ANSWER, TEXT)).agreement == 0.0


def test_words_that_stand_together_count_more_than_scattered_ones() -> None:
    together = "Torque of the flange screws of the KM-6. Keep it dry."
    scattered = "The torque is high. The flange is red. Screws are grey. See the KM-6."
    assert measure(QUESTION, ranked(together)).coverage > measure(QUESTION, ranked(scattered)).coverage


def test_title_and_heading_speak_for_every_sentence() -> None:
    row = "tool flange screws | 10.5 N·m"
    bare, headed = hit(row), hit(row, title="KM-6 Tern", heading=("Torques",))
    assert measure(QUESTION, [headed]).coverage == pytest.approx(1.0)
    assert measure(QUESTION, [bare]).coverage < 0.7


def test_a_term_that_few_hits_have_covers_more() -> None:
    others = [hit("alpha", rank=rank) for rank in range(2, 8)]
    common, rare = (measure("alpha bravo", [hit(text), *others]).coverage for text in ("alpha", "bravo"))
    assert common < 0.5 < rare


def test_the_fused_score_and_later_hits_do_not_matter() -> None:
    hits = ranked(ANSWER, others=9)
    rescored = [replace(one, score=1000.0 * one.ordinal) for one in hits]
    assert assess(QUESTION, hits) == assess(QUESTION, rescored)
    assert assess(QUESTION, hits[:8]) == assess(QUESTION, [*hits[:8], hit(ANSWER, rank=9)])


def test_a_single_hit_that_answers_is_believed() -> None:
    assert assess(QUESTION, [hit(ANSWER)]).confidence > 0.7


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_few_hits_say_nothing_about_standing_out(others: int) -> None:
    features = measure(QUESTION, ranked(ANSWER, others=others))
    assert (features.cosine_lead, features.text_lead) == (USUAL_COSINE_LEAD, USUAL_TEXT_LEAD)
    assert measure(QUESTION, ranked(ANSWER, others=others + 3)).text_lead == pytest.approx(0.4)


def test_hits_without_scores_of_routes_are_judged_by_their_words() -> None:
    bare = [replace(one, routes={}, cosine=0.0) for one in ranked(ANSWER)]
    other = [replace(one, text=NEIGHBOUR) for one in bare]
    assert 1 > assess(QUESTION, bare).confidence > assess(QUESTION, other).confidence > 0


@given(
    st.text(max_size=60),
    st.lists(st.tuples(st.text(max_size=80), st.floats(-1, 1), st.floats(0, 60), st.integers(1, 200)), max_size=12),
)
def test_confidence_is_a_probability_and_low_confidence_has_a_reason(
    query: str, found: list[tuple[str, float, float, int]]
) -> None:
    hits = [hit(text, {"dense": cosine, "text": bm25}, rank) for text, cosine, bm25, rank in found]
    judgement = assess(query, hits)
    assert 0 <= judgement.confidence <= 1 and math.isfinite(judgement.confidence)
    assert judgement.reason or judgement.confidence >= 0.9


def test_the_reason_names_what_no_passage_mentions() -> None:
    hits = ranked("The pack is charged to 45 %.", {"dense": 0.45, "text": 3.0})
    reason = assess("torque of the flange, for a pack", hits).reason
    assert reason == "no passage mentions 'flange' or 'torque'"


def test_what_tells_most_is_named_first() -> None:
    features = measure("pump of the capacitor of E-512", [hit("The pack is charged.")])
    assert features.missing == ("E-512", "capacitor", "pump")


def test_the_reason_names_a_code_as_it_was_written() -> None:
    hits = ranked("E-414: the panel shows that the clock differs.")
    assert assess("the panel shows E-512", hits).reason == "no passage mentions 'E-512'"


def test_words_are_missed_by_stem_and_not_by_form() -> None:
    assert measure("calibrating screws", [hit("A screw is calibrated.")]).missing == ()
    assert measure("calibrating nuts", [hit("A screw is calibrated.")]).missing == ("nuts",)


def test_other_reasons_say_what_is_weak() -> None:
    loose = ranked(ANSWER, {"dense": 0.2, "text": 4.0}, share=1.0)
    scattered = ranked("High torque. A flange. Screws. On the KM-6.", {"dense": 0.5, "text": 4.0}, share=1.0)
    crowd = ranked(ANSWER, {"dense": 0.45, "text": 4.0}, share=1.0)
    question = "torque of the flange screws"
    reasons = [assess(question, hits).reason for hits in (loose, scattered, crowd)]
    assert reasons == [
        "the best passage is only loosely related to the question",
        "the words of the question stand in different places, not together",
        "no passage stands out from the others",
    ]


@pytest.mark.parametrize("written", ["E-414", "E414", "e-414", "E.414", "E_414"])
def test_a_name_is_found_however_it_is_joined(written: str) -> None:
    wanted = {term for term in wanted_terms("what is E-414?") if len(term) > 1 and not term.isdigit()}
    assert wanted == {"e414"}
    assert wanted <= find_mentions(f"the code {written} means")


def test_part_of_a_name_is_found() -> None:
    assert "wd8" in find_mentions("WD-8-03 came close to losing a wheel")
    assert "wd9" not in find_mentions("WD-8-03 came close to losing a wheel")


def test_words_with_a_hyphen_are_words() -> None:
    assert wanted_terms("keep-alive capacitor") == {"aliv": "alive", "capacitor": "capacitor"}


def test_a_query_of_asking_words_alone_still_wants_them() -> None:
    assert set(wanted_terms("so tell me about it")) == {"so", "tell", "me", "about"}


def test_a_very_long_name_stays_small() -> None:
    assert len(find_mentions("1-" * 20_000)) < 20


def test_sources_are_numbered_and_cited_when_named() -> None:
    passages = [hit(f"passage {number}", rank=number) for number in (1, 2, 3)]
    sources = cite(passages, "Ninety-six [1]. Not eighty-four [3].")
    assert [(source.number, source.cited) for source in sources] == [(1, True), (2, False), (3, True)]
    assert [source.hit for source in sources] == passages


@pytest.mark.parametrize(
    ("response", "numbers"),
    [
        ("one [1] two [2]", {1, 2}),
        ("one [1][3].", {1, 3}),
        ("one [1, 3] and [2; 4]", {1, 2, 3, 4}),
        ("[12].", {12}),
        ("none (1), [a], [], [1a], [1.5], 1]", set()),
        ("`argv[1]` and [2]", {2}),
        ("```\nprint(argv[1])\n```\n\n[3]", {3}),
        ("```\nnever closed [1]", set()),
    ],
)
def test_citations_are_read(response: str, numbers: set[int]) -> None:
    assert cited_numbers(response) == numbers


def test_numbers_without_a_passage_are_ignored() -> None:
    assert [source.cited for source in cite([hit("a"), hit("b")], "x [0] y [3] z [99999]")] == [False, False]
