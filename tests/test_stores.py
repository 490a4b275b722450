"""One behaviour of every vector store, and the traps of Milvus Lite, one test each."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import ConfigError, Unavailable
from nexus.ports import IndexRow, Scope, VectorStore
from nexus.registry import open_part
from nexus.stores import milvus, milvus_lite, sqlite
from nexus.terms import shadow
from nexus.types import SearchRequest, Vector
from tests.conftest import ALICE, build_house

ACME = Scope("acme")


@pytest.fixture(params=["memory:", "milvus-lite:"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorStore]:
    store = open_part("stores", request.param, home=tmp_path)
    store.open_index("test", 8)
    yield store
    store.close()


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[milvus.MilvusVectors]:
    store = milvus_lite.open("milvus-lite:", home=tmp_path)
    store.open_index("test", 8)
    yield store
    store.close()


def unit(seed: int) -> Vector:
    vector = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
    return vector / np.linalg.norm(vector)


def row(number: int, text: str, tenant: str = "acme", document: str = "d1") -> IndexRow:
    return IndexRow(f"c{number}", document, tenant, shadow(text), unit(number))


def test_dense_finds_the_nearest_with_its_cosine(store: VectorStore) -> None:
    store.upsert("test", [row(n, f"text {n}") for n in range(20)])
    (best, score), *others = store.search_dense("test", unit(7), 5, ACME)
    assert best == "c7" and score == pytest.approx(1.0, abs=1e-4)
    exact = sorted((float(unit(n) @ unit(7)) for n in range(20)), reverse=True)[1:5]
    assert [score for _, score in others] == pytest.approx(exact, abs=1e-4)


def test_text_ranks_the_matching_row_first_with_a_positive_score(store: VectorStore) -> None:
    store.upsert("test", [row(n, f"the hauler carries load {n}") for n in range(10)])
    store.upsert("test", [row(50, "the arm torque limit is set")])
    found = store.search_text("test", shadow("torque of the arm"), 10, ACME)
    assert found[0][0] == "c50"
    assert all(score > 0 for _, score in found)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)


def test_stems_meet_across_word_forms(store: VectorStore) -> None:
    """Neither store stems by itself (Lite ignores the setting silently): the shadow field does."""
    store.upsert("test", [row(1, "running dogs"), row(2, "sleeping cats")])
    assert [i for i, _ in store.search_text("test", shadow("run dog"), 10, ACME)] == ["c1"]


def test_stop_words_alone_match_nothing(store: VectorStore) -> None:
    store.upsert("test", [row(1, "the gripper of the arm")])
    assert store.search_text("test", shadow("of the"), 10, ACME) == []


def test_a_search_stays_within_its_scope(store: VectorStore) -> None:
    store.upsert("test", [row(1, "gripper"), row(2, "gripper", document="d2"), row(3, "gripper", tenant="other")])
    for scope, expected in ((ACME, {"c1", "c2"}), (Scope("acme", ("d2",)), {"c2"}), (Scope("other"), {"c3"})):
        assert {i for i, _ in store.search_text("test", "gripper", 10, scope)} == expected
        assert {i for i, _ in store.search_dense("test", unit(0), 10, scope)} == expected


def test_rows_for_some_readers_are_found_by_a_scope_that_names_them(store: VectorStore) -> None:
    """Here what HADES calls an audience is any text; a tenant's rows are those for all of it."""
    rows = [row(1, "gripper"), row(2, "gripper", tenant="acme:ab"), row(3, "gripper", tenant="acme:cd")]
    store.upsert("test", [*rows, row(4, "gripper", tenant="acm"), row(5, "gripper", tenant="acme:ab", document="d2")])
    for scope, expected in (
        (ACME, {"c1"}), (Scope("acme", None, ("acme:ab",)), {"c1", "c2", "c5"}),
        (Scope("acme", None, ("acme:ab", "acme:cd")), {"c1", "c2", "c3", "c5"}),
        (Scope("acme", ("d2",), ("acme:ab",)), {"c5"}), (Scope("acme", ("d2",)), set()),
    ):  # fmt: skip
        assert {i for i, _ in store.search_text("test", "gripper", 10, scope)} == expected
        assert {i for i, _ in store.search_dense("test", unit(0), 10, scope)} == expected


@pytest.mark.parametrize(
    "tenant", ['x" or tenant != "', "'] or 1==1 or id in ['", '"\\" or "" == "', "{tenant}", "%", "\\"]
)
def test_no_tenant_name_escapes_its_quotes(store: VectorStore, tenant: str) -> None:
    store.upsert("test", [row(1, "gripper"), row(2, "gripper", tenant=tenant)])
    assert {i for i, _ in store.search_dense("test", unit(0), 10, Scope(tenant))} == {"c2"}
    assert {i for i, _ in store.search_text("test", "gripper", 10, Scope(tenant))} == {"c2"}


@given(st.text())
def test_a_literal_reads_back_as_the_same_string(value: str) -> None:
    written = milvus.literal(value)
    assert json.loads(written) == value
    assert written.startswith('"') and written.endswith('"')


def test_rows_are_upserted_and_deleted_by_id(store: VectorStore) -> None:
    store.upsert("test", [row(1, "gripper"), row(2, "gripper")])
    store.upsert("test", [IndexRow("c1", "d1", "acme", "wheel", unit(9))])
    assert [i for i, _ in store.search_text("test", "wheel", 10, ACME)] == ["c1"]
    assert store.chunk_ids("test") == {"c1", "c2"}
    store.delete("test", ["c1", "unknown"])
    assert store.chunk_ids("test") == {"c2"}
    assert store.search_text("test", "wheel", 10, ACME) == []


def test_rows_are_found_before_and_after_a_flush(store: VectorStore) -> None:
    store.upsert("test", [row(n, f"gripper {n}") for n in range(30)])
    before = {i for i, _ in store.search_text("test", "gripper", 100, ACME)}
    store.flush("test")
    store.upsert("test", [row(99, "gripper late")])
    after = {i for i, _ in store.search_text("test", "gripper", 100, ACME)}
    assert len(before) == 30 and after == before | {"c99"}
    assert store.search_dense("test", unit(99), 1, ACME)[0][0] == "c99"


def test_opening_an_index_twice_keeps_its_rows(store: VectorStore) -> None:
    store.upsert("test", [row(1, "gripper")])
    store.open_index("test", 8)
    assert store.chunk_ids("test") == {"c1"}


def test_lite_itself_gives_negative_bm25(lite: milvus.MilvusVectors) -> None:
    """If this fails Lite has changed its sign and `search_text` no longer needs abs()."""
    lite.upsert("test", [row(1, "gripper"), row(2, "wheel")])
    with lite._calling() as client:
        (hits,) = client.search("test", data=["gripper"], anns_field="sparse", limit=5, output_fields=["chunk_id"])
    assert hits[0]["chunk_id"] == "c1" and hits[0]["distance"] < 0


def test_lite_scores_depend_on_segments_but_the_fused_order_does_not(tmp_path: Path) -> None:
    """IDF is per segment in Lite; dividing by the query's best keeps the one true match on top."""
    documents = sqlite.open("sqlite::memory:")
    vectors = milvus_lite.open("milvus-lite:", home=tmp_path)
    house = build_house(documents, vectors)
    house.put("rare", "fault XK9931 stops the hauler")
    index = house.hades.find_collection("default").index
    vectors.flush(index)
    for n in range(30):
        house.put(f"n{n}", f"the hauler moves load {n}")
    one = house.retriever.search(SearchRequest("hauler XK9931"), ALICE).hits[0]
    vectors.flush(index)
    other = house.retriever.search(SearchRequest("hauler XK9931"), ALICE).hits[0]
    house.retriever.close()
    vectors.close()
    documents.close()
    assert one.text == other.text == "fault XK9931 stops the hauler"


def test_lite_keeps_rows_over_a_restart(tmp_path: Path) -> None:
    first = milvus_lite.open("milvus-lite:", home=tmp_path)
    first.open_index("test", 8)
    first.upsert("test", [row(1, "gripper")])
    first.close()
    second = milvus_lite.open("milvus-lite:", home=tmp_path)
    second.open_index("test", 8)
    assert [i for i, _ in second.search_text("test", "gripper", 5, ACME)] == ["c1"]
    second.close()


def test_a_server_that_is_away_is_unavailable() -> None:
    store = milvus.open("milvus://127.0.0.1:1")
    with pytest.raises(Unavailable):
        store.check()
    store.close()


@pytest.mark.parametrize("address", ["milvus:", "milvus-lite:", "nonsense:", "../etc:", "memory", "os.path:join"])
def test_an_address_that_names_nothing_is_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        open_part("stores", address)
