"""One behaviour of every vector store, and the traps of Milvus Lite, one test each.

A Milvus server is a strict double (tests/milvus_server.py), and a real one where NEXUS_TEST_MILVUS_URL gives its
address as `stores.vectors` would; indexes there have names of their own and are dropped afterwards.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import ConfigError, Conflict, NotFound, Unavailable
from nexus.ports import IndexRow, Scope, VectorStore
from nexus.registry import open_part
from nexus.rows import Rows
from nexus.stores import memory, milvus, milvus_lite, sqlite
from nexus.terms import shadow
from nexus.types import SearchRequest, Vector
from tests.conftest import ALICE, build_house
from tests.milvus_server import MilvusServer

ACME = Scope("acme")
INDEX, NEXT, LIVE = (f"nx_{uuid4().hex}" for _ in range(3))


SERVER = os.environ.get("NEXUS_TEST_MILVUS_URL", "")
STORES = ["memory", "rows", "milvus-lite", "a double of a server", *(["a server"] if SERVER else [])]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorStore]:
    with open_store(request.param, tmp_path) as store:
        store.open_index(INDEX, 8)
        yield store


@contextmanager
def open_store(kind: str, home: Path) -> Iterator[VectorStore]:
    """One of the vector stores, with no index of this module in it before and after."""
    double = None
    if kind == "rows":
        yield RowsStore()
        return
    if kind == "a double of a server":
        double = MilvusServer(home, token="nexus:secret")
        address = f"milvus://nexus:secret@127.0.0.1:{double.port}"
    elif kind == "a server":
        address = SERVER
    else:
        address = f"{kind}:"
    store = open_part("stores", address, **({} if address.startswith("milvus:") else {"home": home}))
    try:
        yield store
    finally:
        clear(store, (LIVE,), (INDEX, NEXT))
        store.close()
        if double is not None:
            double.close()


class RowsStore(memory.MemoryVectors):
    """What searches find in a resident index, behind the names of a store in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[str, str], Rows] = {}

    def upsert(self, index: str, rows: Sequence[IndexRow]) -> None:
        super().upsert(index, rows)
        for (name, _), part in self._rows.items():
            if name == index:
                part.delete([row.chunk_id for row in rows])
        for tenant in {row.audience.partition(":")[0] for row in rows}:
            own = [row for row in rows if row.audience.partition(":")[0] == tenant]
            self._rows.setdefault((index, tenant), Rows(index, len(own[0].vector))).upsert(own)

    def delete(self, index: str, chunk_ids: Sequence[str]) -> None:
        super().delete(index, chunk_ids)
        for (name, _), rows in self._rows.items():
            if name == index:
                rows.delete(chunk_ids)

    def drop_index(self, index: str) -> None:
        super().drop_index(index)
        self._rows = {key: rows for key, rows in self._rows.items() if key[0] != index}

    def search_dense(self, index: str, vector: Vector, limit: int, scope: Scope) -> list[tuple[str, float]]:
        return self._part(index, scope).search_dense(vector, limit, scope)

    def search_text(self, index: str, terms: str, limit: int, scope: Scope) -> list[tuple[str, float]]:
        return self._part(index, scope).search_text(terms, limit, scope)

    def _part(self, index: str, scope: Scope) -> Rows:
        self._index(index)
        name = self._aliases.get(index, index)
        return self._rows.get((name, scope.tenant)) or Rows(name, self._dimensions[name])


def clear(store: VectorStore, aliases: Iterable[str], indexes: Iterable[str]) -> None:
    """Leave nothing of a test on a server."""
    if isinstance(store, milvus.MilvusVectors) and not store.target.lite:
        for alias in aliases:
            if store.aliased(alias) is not None:
                store._call(lambda client, seconds, alias=alias: client.drop_alias(alias, timeout=seconds))
        for index in indexes:
            store.drop_index(index)


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[milvus.MilvusVectors]:
    store = milvus_lite.open("milvus-lite:", home=tmp_path)
    store.open_index(INDEX, 8)
    yield store
    store.close()


def unit(seed: int, dimension: int = 8) -> Vector:
    vector = np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)
    return vector / np.linalg.norm(vector)


def row(number: int, text: str, tenant: str = "acme", document: str = "d1") -> IndexRow:
    return IndexRow(f"c{number}", document, tenant, shadow(text), unit(number))


def test_dense_finds_the_nearest_with_its_cosine(store: VectorStore) -> None:
    store.upsert(INDEX, [row(n, f"text {n}") for n in range(20)])
    (best, score), *others = store.search_dense(INDEX, unit(7), 5, ACME)
    assert best == "c7" and score == pytest.approx(1.0, abs=1e-4)
    exact = sorted((float(unit(n) @ unit(7)) for n in range(20)), reverse=True)[1:5]
    assert [score for _, score in others] == pytest.approx(exact, abs=1e-4)


def test_text_ranks_the_matching_row_first_with_a_positive_score(store: VectorStore) -> None:
    store.upsert(INDEX, [row(n, f"the hauler carries load {n}") for n in range(10)])
    store.upsert(INDEX, [row(50, "the arm torque limit is set")])
    found = store.search_text(INDEX, shadow("torque of the arm"), 10, ACME)
    assert found[0][0] == "c50"
    assert all(score > 0 for _, score in found)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)


def test_stems_meet_across_word_forms(store: VectorStore) -> None:
    """Neither store stems by itself (Lite ignores the setting silently): the shadow field does."""
    store.upsert(INDEX, [row(1, "running dogs"), row(2, "sleeping cats")])
    assert [i for i, _ in store.search_text(INDEX, shadow("run dog"), 10, ACME)] == ["c1"]


def test_stop_words_alone_match_nothing(store: VectorStore) -> None:
    store.upsert(INDEX, [row(1, "the gripper of the arm")])
    assert store.search_text(INDEX, shadow("of the"), 10, ACME) == []


def test_a_search_stays_within_its_scope(store: VectorStore) -> None:
    store.upsert(INDEX, [row(1, "gripper"), row(2, "gripper", document="d2"), row(3, "gripper", tenant="other")])
    for scope, expected in (
        (ACME, {"c1", "c2"}), (Scope("acme", ("d2",)), {"c2"}), (Scope("acme", ()), set()), (Scope("other"), {"c3"}),
    ):  # fmt: skip
        assert {i for i, _ in store.search_text(INDEX, "gripper", 10, scope)} == expected
        assert {i for i, _ in store.search_dense(INDEX, unit(0), 10, scope)} == expected


def test_rows_for_some_readers_are_found_by_a_scope_that_names_them(store: VectorStore) -> None:
    """Here what HADES calls an audience is any text; a tenant's rows are those for all of it."""
    rows = [row(1, "gripper"), row(2, "gripper", tenant="acme:ab"), row(3, "gripper", tenant="acme:cd")]
    store.upsert(INDEX, [*rows, row(4, "gripper", tenant="acm"), row(5, "gripper", tenant="acme:ab", document="d2")])
    for scope, expected in (
        (ACME, {"c1"}), (Scope("acme", None, ("acme:ab",)), {"c1", "c2", "c5"}),
        (Scope("acme", None, ("acme:ab", "acme:cd")), {"c1", "c2", "c3", "c5"}),
        (Scope("acme", ("d2",), ("acme:ab",)), {"c5"}), (Scope("acme", ("d2",)), set()),
    ):  # fmt: skip
        assert {i for i, _ in store.search_text(INDEX, "gripper", 10, scope)} == expected
        assert {i for i, _ in store.search_dense(INDEX, unit(0), 10, scope)} == expected


@pytest.mark.parametrize(
    "tenant", ['x" or tenant != "', "'] or 1==1 or id in ['", '"\\" or "" == "', "{tenant}", "%", "\\"]
)
def test_no_tenant_name_escapes_its_quotes(store: VectorStore, tenant: str) -> None:
    store.upsert(INDEX, [row(1, "gripper"), row(2, "gripper", tenant=tenant)])
    assert {i for i, _ in store.search_dense(INDEX, unit(0), 10, Scope(tenant))} == {"c2"}
    assert {i for i, _ in store.search_text(INDEX, "gripper", 10, Scope(tenant))} == {"c2"}


@given(st.text())
def test_a_literal_reads_back_as_the_same_string(value: str) -> None:
    written = milvus.literal(value)
    assert json.loads(written) == value
    assert written.startswith('"') and written.endswith('"')


def test_rows_are_upserted_and_deleted_by_id(store: VectorStore) -> None:
    store.upsert(INDEX, [row(1, "gripper"), row(2, "gripper")])
    store.upsert(INDEX, [IndexRow("c1", "d1", "acme", "wheel", unit(9))])
    assert [i for i, _ in store.search_text(INDEX, "wheel", 10, ACME)] == ["c1"]
    assert store.chunk_ids(INDEX) == {"c1", "c2"}
    store.delete(INDEX, ["c1", "unknown"])
    assert store.chunk_ids(INDEX) == {"c2"}
    assert store.search_text(INDEX, "wheel", 10, ACME) == []


def test_rows_are_found_before_and_after_a_flush(store: VectorStore) -> None:
    store.upsert(INDEX, [row(n, f"gripper {n}") for n in range(30)])
    before = {i for i, _ in store.search_text(INDEX, "gripper", 100, ACME)}
    store.flush(INDEX)
    store.upsert(INDEX, [row(99, "gripper late")])
    after = {i for i, _ in store.search_text(INDEX, "gripper", 100, ACME)}
    assert len(before) == 30 and after == before | {"c99"}
    assert store.search_dense(INDEX, unit(99), 1, ACME)[0][0] == "c99"


def test_opening_an_index_twice_keeps_its_rows(store: VectorStore) -> None:
    store.upsert(INDEX, [row(1, "gripper")])
    store.open_index(INDEX, 8)
    assert store.chunk_ids(INDEX) == {"c1"}


# ── generations of an index ─────────────────────────────────────────────────────────────────────


def test_two_generations_of_an_index_know_nothing_of_each_other(store: VectorStore) -> None:
    store.open_index(NEXT, 4)
    store.upsert(INDEX, [row(1, "gripper"), row(2, "gripper")])
    store.upsert(NEXT, [IndexRow("c1", "d1", "acme", "wheel", unit(1, 4))])
    assert (store.count(INDEX), store.count(NEXT), store.count("nx_none")) == (2, 1, 0)
    assert store.search_text(NEXT, "gripper", 5, ACME) == []
    assert store.search_dense(NEXT, unit(1, 4), 5, ACME)[0][0] == "c1"
    assert {INDEX, NEXT} <= store.indexes()
    store.drop_index(NEXT)
    store.drop_index(NEXT)
    assert NEXT not in store.indexes() and store.count(NEXT) == 0
    assert store.chunk_ids(INDEX) == {"c1", "c2"}


def test_count_follows_upserts_and_deletes(store: VectorStore) -> None:
    store.upsert(INDEX, [row(n, "gripper") for n in range(5)])
    store.upsert(INDEX, [row(n, "wheel") for n in range(3)])
    assert store.count(INDEX) == 5
    store.delete(INDEX, ["c0", "c4"])
    assert store.count(INDEX) == len(store.chunk_ids(INDEX)) == 3


def test_an_alias_is_moved_from_one_index_to_the_next_and_back(store: VectorStore) -> None:
    store.open_index(NEXT, 8)
    store.upsert(INDEX, [row(1, "gripper")])
    store.upsert(NEXT, [row(2, "gripper")])
    assert store.aliased(LIVE) is None
    for index, expected in ((INDEX, "c1"), (NEXT, "c2"), (NEXT, "c2"), (INDEX, "c1")):
        store.point_alias(LIVE, index)
        assert store.aliased(LIVE) == index
        assert [i for i, _ in store.search_text(LIVE, "gripper", 5, ACME)] == [expected]
        assert [i for i, _ in store.search_dense(LIVE, unit(0), 5, ACME)] == [expected]
    assert LIVE not in store.indexes()


def test_an_index_in_use_is_not_dropped_and_an_alias_points_to_one_that_is_there(store: VectorStore) -> None:
    store.point_alias(LIVE, INDEX)
    with pytest.raises(Conflict, match="alias"):
        store.drop_index(INDEX)
    with pytest.raises(NotFound):
        store.point_alias(LIVE, "nx_none")
    assert store.aliased(LIVE) == INDEX and INDEX in store.indexes()
    store.open_index(NEXT, 8)
    store.point_alias(LIVE, NEXT)
    store.drop_index(INDEX)
    assert INDEX not in store.indexes()


def test_an_index_that_was_dropped_says_so_and_is_made_again_when_opened(store: VectorStore) -> None:
    store.drop_index(INDEX)
    for use in (
        lambda: store.upsert(INDEX, [row(1, "gripper")]), lambda: store.delete(INDEX, ["c1"]),
        lambda: store.search_dense(INDEX, unit(0), 5, ACME), lambda: store.search_text(INDEX, "gripper", 5, ACME),
    ):  # fmt: skip
        with pytest.raises(Unavailable, match="index"):
            use()
    store.open_index(INDEX, 4)
    store.upsert(INDEX, [IndexRow("c1", "d1", "acme", "wheel", unit(1, 4))])
    assert store.count(INDEX) == 1


def test_an_index_of_another_dimension_is_refused_with_both(store: VectorStore) -> None:
    store.upsert(INDEX, [row(1, "gripper")])
    with pytest.raises(ConfigError, match=r"8 dim.* 16\b"):
        reopened(store).open_index(INDEX, 16)
    assert store.count(INDEX) == 1


def test_a_vector_that_does_not_fit_is_refused(store: VectorStore) -> None:
    for use in (
        lambda: store.upsert(INDEX, [row(1, "gripper"), IndexRow("c2", "d1", "acme", "wheel", unit(2, 4))]),
        lambda: store.search_dense(INDEX, unit(1, 16), 5, ACME),
    ):
        with pytest.raises(ConfigError, match=r"dimensions does not fit .* which has 8"):
            use()
    assert store.count(INDEX) == 0


def reopened(store: VectorStore) -> VectorStore:
    """The same store as another process opens it; memory has no other process."""
    return milvus.MilvusVectors(store.target) if isinstance(store, milvus.MilvusVectors) else store


# ── Milvus Lite ─────────────────────────────────────────────────────────────────────────────────


def test_lite_itself_gives_negative_bm25(lite: milvus.MilvusVectors) -> None:
    """If this fails Lite has changed its sign and `search_text` no longer needs abs()."""
    lite.upsert(INDEX, [row(1, "gripper"), row(2, "wheel")])
    (hits,) = lite._call(
        lambda client, _: client.search(
            INDEX, data=["gripper"], anns_field="sparse", limit=5, output_fields=["chunk_id"]
        )
    )
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
    first.open_index(INDEX, 8)
    first.upsert(INDEX, [row(1, "gripper")])
    first.close()
    second = milvus_lite.open("milvus-lite:", home=tmp_path)
    second.open_index(INDEX, 8)
    assert [i for i, _ in second.search_text(INDEX, "gripper", 5, ACME)] == ["c1"]
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
