"""Routes, fusion, filters, explanation and packing; the traps of hybrid search, one test each."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import InvalidRequest, NotFound
from nexus.filters import parse_filter
from nexus.retrieval import MAX_K, fuse
from nexus.types import SearchRequest
from tests.conftest import ALICE, BOB, MALLORY, House

scores = st.lists(
    st.tuples(st.sampled_from(string.ascii_lowercase), st.floats(0.01, 50)), max_size=20, unique_by=lambda x: x[0]
)


def ranked(route: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(route, key=lambda item: -item[1])


@given(scores, scores, st.floats(0.1, 100))
def test_the_scale_of_bm25_does_not_matter(dense: list, text: list, factor: float) -> None:
    dense = [(i, score / 50) for i, score in ranked(dense)]
    cosines = {**{i: 0.1 for i, _ in text}, **dict(dense)}
    one = fuse(dense, ranked(text), cosines, 0.7, 0.3, "max")
    other = fuse(dense, [(i, score * factor) for i, score in ranked(text)], cosines, 0.7, 0.3, "max")
    for a, b in zip(one, other, strict=True):
        assert a.score == pytest.approx(b.score)


@given(scores, scores)
def test_every_candidate_appears_once_best_first(dense: list, text: list) -> None:
    fused = fuse(ranked(dense), ranked(text), dict(dense), 0.7, 0.3, "max")
    assert {c.chunk_id for c in fused} == {i for i, _ in dense} | {i for i, _ in text}
    assert len({c.chunk_id for c in fused}) == len(fused)
    assert [c.score for c in fused] == sorted((c.score for c in fused), reverse=True)


def test_a_weighted_sum_is_what_it_says() -> None:
    fused = fuse([("a", 0.8), ("b", 0.5)], [("b", 12.0), ("c", 6.0)], {"a": 0.8, "b": 0.5, "c": 0.2}, 0.7, 0.3, "max")
    assert {c.chunk_id: c.score for c in fused} == pytest.approx(
        {"b": 0.7 * 0.5 + 0.3, "a": 0.7 * 0.8, "c": 0.7 * 0.2 + 0.3 * 0.5}
    )


def test_reciprocal_ranks_are_what_they_say() -> None:
    fused = fuse([("a", 0.8), ("b", 0.5)], [("b", 12.0)], {}, 0.7, 0.3, "rrf")
    assert {c.chunk_id: c.score for c in fused} == pytest.approx({"a": 0.7 / 61, "b": 0.7 / 62 + 0.3 / 61})


def test_ties_are_broken_the_same_way_every_time() -> None:
    fused = fuse([("b", 0.5), ("a", 0.5)], [], {"a": 0.5, "b": 0.5}, 1, 0, "max")
    assert [c.chunk_id for c in fused] == ["a", "b"]


def test_a_chunk_only_the_text_route_found_gets_its_exact_cosine(house: House) -> None:
    texts = ["E4417 drive fault", *(f"drive number {n}" for n in range(8))]
    for n, text in enumerate(texts):
        house.put(f"{n}.txt", text)
    house.retriever.settings = type(house.retriever.settings)(candidates=1)
    result = house.retriever.search(SearchRequest("E4417"), ALICE)
    (hit,) = [hit for hit in result.hits if "E4417" in hit.text]
    query, passage = house.embedder.embed(["E4417", hit.text])
    assert hit.cosine == pytest.approx(float(query @ passage), abs=1e-5)


def test_a_unique_word_reaches_the_top(house: House) -> None:
    for n in range(20):
        house.put(f"{n}.txt", f"the hauler carries load number {n} to the dock")
    house.put("rare.txt", "the hauler reports fault XK9931 at the dock")
    assert "XK9931" in house.retriever.search(SearchRequest("XK9931"), ALICE).hits[0].text


def test_a_chunk_is_found_by_its_neighbours_words_too_but_after_them(house: House) -> None:
    house.put("a", "the gripper closes", "its torque is four", "the wheel turns", "the lamp burns")
    request = SearchRequest("torque", embedding_weight=0, text_weight=1)
    texts = [hit.text for hit in house.retriever.search(request, ALICE).hits]
    assert texts[0] == "its torque is four"
    assert set(texts[1:]) == {"the gripper closes", "the wheel turns"}


def test_weights_of_zero_switch_a_route_off(house: House) -> None:
    house.put("a.txt", "gripper torque")
    dense = house.retriever.search(SearchRequest("gripper", embedding_weight=1, text_weight=0), ALICE).hits[0]
    text = house.retriever.search(SearchRequest("gripper", embedding_weight=0, text_weight=1), ALICE).hits[0]
    assert (set(dense.routes), set(text.routes)) == ({"dense"}, {"text"})
    assert text.score == pytest.approx(1.0)


def test_closed_versions_do_not_crowd_out_visible_ones(house: House) -> None:
    house.put("keep.txt", "gripper of the arm that stays")
    for n in range(30):
        house.put("a.txt", f"gripper gripper revision {n}")
    house.retriever.settings = type(house.retriever.settings)(candidates=5)
    texts = [hit.text for hit in house.retriever.search(SearchRequest("gripper", k=5), ALICE).hits]
    assert sorted(texts) == ["gripper gripper revision 29", "gripper of the arm that stays"]


def test_a_query_is_embedded_once_however_often_the_routes_are_widened(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(30):
        house.put("a.txt", f"gripper gripper revision {n}")
    house.retriever.settings = type(house.retriever.settings)(candidates=5)
    calls = []
    embed = house.embedder.embed
    monkeypatch.setattr(house.embedder, "embed", lambda texts, kind: calls.append(texts) or embed(texts, kind))
    house.retriever.search(SearchRequest("gripper", k=5), ALICE)
    assert calls == [["gripper"]]


@pytest.mark.parametrize(
    ("tree", "sources"),
    [
        ({"robot": "HX-3"}, {"a", "b"}),
        ({"robot": "HX-3", "year": 2025}, {"a"}),
        ({"year": [2024, 2025]}, {"a", "b", "c"}),
        ({"type": "ne", "key": "robot", "value": "HX-3"}, {"c", "d"}),
        ({"type": "gt", "key": "year", "value": 2024}, {"a", "c"}),
        ({"type": "or", "filters": [{"year": 2024}, {"robot": "KM-6"}]}, {"b", "c"}),
        ({"type": "nin", "key": "year", "value": [2025]}, {"b", "d"}),
        ({"live": True}, {"a"}),
        ({"live": 1}, set()),
        ({"robot": 'HX-3" or 1==1 or tenant != "'}, set()),
        ({"robot": "HX-3' OR '1'='1"}, set()),
        ({"source": "a"}, {"a"}),
        ({"tenant": "other"}, set()),
    ],
)
def test_filters_choose_documents(house: House, tree: dict, sources: set[str]) -> None:
    house.put("a", "gripper a", metadata={"robot": "HX-3", "year": 2025, "live": True})
    house.put("b", "gripper b", metadata={"robot": "HX-3", "year": 2024})
    house.put("c", "gripper c", metadata={"robot": "KM-6", "year": 2025})
    house.put("d", "gripper d")
    house.put("e", "gripper e", who=MALLORY, metadata={"robot": "HX-3", "year": 2025})
    request = SearchRequest("gripper", filters=parse_filter(tree))
    assert {hit.source for hit in house.retriever.search(request, ALICE).hits} == sources


@pytest.mark.parametrize(
    ("tree", "pointer"),
    [
        ({}, "/filters"),
        ({"type": "eq", "key": "a"}, "/filters"),
        ({"type": "like", "key": "a", "value": "%"}, "/filters/type"),
        ({'a" or 1==1': "x"}, '/filters/a" or 1==1'),
        ({"a": {"b": 1}}, "/filters/a"),
        ({"a": []}, "/filters/a"),
        ({"a": 2**70}, "/filters/a"),
        ({"type": "and", "filters": []}, "/filters/filters"),
        ({"type": "and", "filters": [{"a": None}]}, "/filters/filters/0/a"),
        ({f"k{n}": 1 for n in range(65)}, "/filters/k64"),
    ],
)
def test_filters_that_mean_nothing_are_refused_with_their_place(tree: dict, pointer: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_filter(tree)
    assert caught.value.pointer == pointer


@given(
    st.recursive(
        st.text() | st.integers() | st.booleans() | st.none(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
        max_leaves=20,
    )
)
def test_any_json_is_a_filter_or_refused(tree: object) -> None:
    try:
        parse_filter(tree)  # type: ignore[arg-type]
    except InvalidRequest as error:
        assert error.pointer is not None and error.pointer.startswith("/filters")


def test_a_wide_filter_is_applied_to_the_candidates(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.retrieval.FILTERED_DOCUMENTS", 1)
    for name in "abc":
        house.put(name, f"gripper {name}", metadata={"keep": name != "c"})
    request = SearchRequest("gripper", filters=parse_filter({"keep": True}), explain=True)
    result = house.retriever.search(request, ALICE)
    assert {hit.source for hit in result.hits} == {"a", "b"}
    assert [c["removed_by"] for c in result.explain["candidates"]].count("filter") == 1


def test_explain_says_what_removed_a_candidate_but_of_none_that_one_may_not_know_of(house: House) -> None:
    house.put("a", "gripper old")
    house.put("a", "gripper new")
    house.put("b", "gripper private", readers=frozenset({"alice"}))
    house.put("x", "gripper foreign", who=MALLORY)
    staged = house.describe("s", ["gripper staged"])
    house.stage(staged, ["gripper staged"])
    result = house.retriever.search(SearchRequest("gripper", explain=True), BOB)
    assert [hit.text for hit in result.hits] == ["gripper new"]
    removed = sorted(str(c["removed_by"]) for c in result.explain["candidates"])
    assert removed == ["None", "superseded", "unpublished"]


@pytest.mark.parametrize(
    "fields",
    [
        {"query": "  "}, {"query": "x" * 9000}, {"k": 0}, {"k": MAX_K + 1}, {"as_of": -1}, {"as_of": 99},
        {"embedding_weight": 1.5}, {"embedding_weight": float("nan")}, {"embedding_weight": 0, "text_weight": 0},
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(house: House, fields: dict) -> None:
    house.put("a", "gripper")
    with pytest.raises(InvalidRequest):
        house.retriever.search(SearchRequest(**{"query": "gripper", **fields}), ALICE)


def test_a_collection_that_is_not_there_is_said_to_be_missing(house: House) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        house.retriever.search(SearchRequest("x", collection="nowhere"), ALICE)


def test_a_query_of_stop_words_alone_still_answers(house: House) -> None:
    house.put("a", "gripper")
    assert len(house.retriever.search(SearchRequest("what is the"), ALICE).hits) == 1


def test_passages_are_hits_with_their_neighbours_and_fit_the_budget(house: House) -> None:
    house.put("a", "intro words here", "gripper torque value", "after words here", "far away text")
    house.put("b", "another gripper note")
    hits = house.retriever.search(SearchRequest("gripper torque value"), ALICE).hits
    passages = house.retriever.expand(hits, budget=100)
    assert passages[0].text == "intro words here\n\ngripper torque value\n\nafter words here"
    everything = "\n\n".join(p.text for p in passages)
    assert everything.count("gripper torque value") == 1
    tight = house.retriever.expand(hits, budget=4)
    assert [p.text for p in tight] == ["gripper torque value"]
