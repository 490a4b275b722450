"""Any moves, and every store gives the same answers: vector stores by themselves, and whole houses of different stores.

The document stores by themselves are held to one another in tests/test_arango.py. Of a search by text only who is
found is compared: each vector store has statistics of its own for the scores.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nexus.errors import NexusError
from nexus.hades import alias_of
from nexus.ports import IndexRow, Scope, VectorStore
from nexus.types import SearchRequest, Vector
from tests import document_stores
from tests.conftest import ALICE, BOB, MALLORY, House, build_house
from tests.test_arango import MOVES as MOVES_OF_DOCUMENTS
from tests.test_arango import do as do_to_documents
from tests.test_arango import everything, normalised
from tests.test_stores import STORES, clear, open_store

DIMENSION = 8
RUNS = f"nx_{uuid4().hex}"
GENERATIONS = ("one", "two")
NUMBERS = st.integers(0, 11)
WORDS = ("gripper", "torque")
AUDIENCES = ("acme", "acme:ab", "other")
SCOPES = [
    Scope("acme"), Scope("acme"), Scope("acme", ("d1", "d2")), Scope("acme", None, ("acme:ab",)),
    Scope("other", ("d0", "d1")), Scope("acme", ()), Scope("nobody"),
]  # fmt: skip

MOVES = st.lists(
    st.tuples(st.just("upsert"), st.sampled_from(GENERATIONS), st.lists(
        st.tuples(NUMBERS, st.sampled_from(AUDIENCES), st.sets(st.sampled_from(WORDS)), st.integers(0, 30)),
        min_size=1, max_size=5, unique_by=lambda row: row[0],
    ))
    | st.tuples(st.just("delete"), st.sampled_from(GENERATIONS), st.lists(NUMBERS, max_size=4))
    | st.tuples(st.just("flush"), st.sampled_from(GENERATIONS))
    | st.tuples(st.just("drop"), st.sampled_from(GENERATIONS))
    | st.tuples(st.just("open"), st.sampled_from(GENERATIONS), st.sampled_from([DIMENSION, DIMENSION, 4]))
    | st.tuples(st.just("point"), st.sampled_from(GENERATIONS)),
    min_size=3, max_size=9,
)  # fmt: skip


class Shelf:
    """One vector store, in which each run has indexes of its own."""

    def __init__(self, store: VectorStore) -> None:
        self.store, self.run = store, 0

    def name(self, generation: str) -> str:
        return f"{RUNS}_{self.run}_{generation}"

    def begin(self) -> None:
        self.run += 1
        for generation in GENERATIONS:
            self.store.open_index(self.name(generation), DIMENSION)
        self.store.point_alias(self.name("live"), self.name("one"))

    def end(self) -> None:
        clear(self.store, [self.name("live")], map(self.name, GENERATIONS))


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Shelf]]:
    with ExitStack() as stack:
        yield {
            kind: Shelf(stack.enter_context(open_store(kind, Path(tmp_path_factory.mktemp("store")))))
            for kind in STORES
        }


def unit(seed: int) -> Vector:
    vector = np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector)


def do(shelf: Shelf, move: tuple[Any, ...]) -> str | None:
    """One move; the name of its error, if it has one."""
    store, (kind, generation, *rest) = shelf.store, move
    index = shelf.name(generation)
    try:
        if kind == "upsert":
            rows = [
                IndexRow(f"c{number}", f"d{number % 3}", audience, " ".join(sorted(words)), unit(seed))
                for number, audience, words, seed in rest[0]
            ]
            store.upsert(index, rows)
        elif kind == "delete":
            store.delete(index, [f"c{number}" for number in rest[0]])
        elif kind == "flush":
            store.flush(index)
        elif kind == "drop":
            store.drop_index(index)
        elif kind == "open":
            store.open_index(index, rest[0])
        else:
            store.point_alias(shelf.name("live"), index)
    except NexusError as error:
        return type(error).__name__
    return None


def answers(shelf: Shelf) -> dict[str, Any]:
    """What a store says to every question, by question."""
    store = shelf.store
    told: dict[str, Any] = {"aliased": (store.aliased(shelf.name("live")) or "").replace(shelf.name(""), "")}
    there = {name.removeprefix(shelf.name("")) for name in store.indexes() if name.startswith(shelf.name(""))}
    told["indexes"] = there
    for generation in GENERATIONS:
        index = shelf.name(generation)
        told[generation] = (store.count(index), store.chunk_ids(index))
    for number, scope in enumerate(SCOPES):
        generation = (*GENERATIONS, "live")[number % 3]
        told[f"dense, {number}"] = dense(shelf, generation, scope)
        told[f"text, {number}"] = text(shelf, generation, WORDS[number % 2], scope)
    told["dense, live"] = dense(shelf, "live", SCOPES[1])
    return told


def dense(shelf: Shelf, generation: str, scope: Scope) -> object:
    """Cosines, best first, and whose they are where no two are as good as each other."""
    try:
        found = shelf.store.search_dense(shelf.name(generation), unit(100), 20, scope)
    except NexusError as error:
        return type(error).__name__
    return sorted((round(score, 4), chunk_id) for chunk_id, score in found)


def text(shelf: Shelf, generation: str, word: str, scope: Scope) -> object:
    try:
        found = shelf.store.search_text(shelf.name(generation), word, 20, scope)
    except NexusError as error:
        return type(error).__name__
    assert all(score > 0 for _, score in found)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    return {chunk_id for chunk_id, _ in found}


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
@given(moves=MOVES)
def test_any_moves_leave_all_vector_stores_with_the_same_answers(
    shelves: dict[str, Shelf], moves: list[tuple[Any, ...]]
) -> None:
    everyone = shelves.values()
    try:
        for shelf in everyone:
            shelf.begin()
        for move in [("upsert", "one", [(1, "acme", {"gripper"}, 1), (2, "acme:ab", {"gripper"}, 2)]), *moves]:
            came = {kind: do(shelf, move) for kind, shelf in shelves.items()}
            assert len(set(came.values())) == 1, (move, came)
        told = {kind: answers(shelf) for kind, shelf in shelves.items()}
        for question in told["memory"]:
            said = {kind: told[kind][question] for kind in told}
            assert all(one == said["memory"] for one in said.values()), (question, said)
    finally:
        for shelf in everyone:
            shelf.end()


def test_the_words_of_all_readers_are_ranked_alike(shelves: dict[str, Shelf]) -> None:
    """Where the statistics are the same, so is the order: one flushed segment, and rows that differ only in length."""
    for kind, shelf in shelves.items():
        shelf.begin()
        index = shelf.name("one")
        rows = [IndexRow(f"c{n}", "d1", "acme", " ".join(["gripper", *["wheel"] * n]), unit(n)) for n in range(6)]
        shelf.store.upsert(index, rows)
        shelf.store.flush(index)
        found = [chunk_id for chunk_id, _ in shelf.store.search_text(index, "gripper", 10, Scope("acme"))]
        assert found == [f"c{n}" for n in range(6)], kind
        shelf.end()


# ── whole houses ────────────────────────────────────────────────────────────────────────────────


HOUSES = [
    ("memory", "memory"), ("disk", "milvus-lite"), ("arango", "a double of a server"),
    *([("arango server", "memory")] if document_stores.SERVER else []),
    *([("memory", "a server")] if "a server" in STORES else []),
]  # fmt: skip


@contextmanager
def open_houses(home: Path) -> Iterator[dict[str, House]]:
    """HADES and a retriever over each pair of a document store and a vector store, all of them empty."""
    with ExitStack() as stack:
        houses = {}
        for number, (documents, vectors) in enumerate(HOUSES):
            folder = home / str(number)
            folder.mkdir()
            opened = stack.enter_context(document_stores.place(documents, folder))()
            stack.callback(opened.close)
            house = build_house(opened, stack.enter_context(open_store(vectors, folder)))
            stack.callback(house.retriever.close)
            stack.callback(remove_collections, house)
            houses[f"{documents} and {vectors}"] = house
        yield houses


def remove_collections(house: House) -> None:
    for collection in house.hades.documents.collections():
        clear(house.hades.vectors, [alias_of(collection.name)], [collection.index])


def searches(house: House) -> dict[str, Any]:
    """Who finds what, now and in the past, by both routes, and what `fsck` says."""
    told: dict[str, Any] = {}
    for who in (ALICE, BOB, MALLORY):
        for as_of in (None, 0, 1, 2):
            for query in ("gripper one", "two"):
                asked = f"{query!r} by {who.subject} as of {as_of}"
                try:
                    hits = house.retriever.search(SearchRequest(query, k=50, as_of=as_of, graph="off"), who).hits
                except NexusError as error:
                    told[asked] = type(error).__name__
                else:
                    told[asked] = sorted((hit.source, hit.text, round(hit.cosine, 4)) for hit in hits)
    told["fsck"] = [(fault.kind, fault.ids) for fault in house.hades.fsck()]
    index = house.hades.find_collection("default").index
    told["rows"] = (house.hades.vectors.count(index), house.hades.vectors.chunk_ids(index))
    return told


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
@given(moves=MOVES_OF_DOCUMENTS)
def test_any_moves_leave_all_houses_with_the_same_answers(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[Any, ...]]
) -> None:
    begun = [("put", "a", "one", ["b"], frozenset(), "HX-3"), ("put", "b", "two", [], frozenset({"alice"}), None)]
    with open_houses(Path(tmp_path_factory.mktemp("houses"))) as houses:
        for move in [*begun, *moves]:
            came = {kind: normalised(do_to_documents(house, move)) for kind, house in houses.items()}
            assert all(one == came["memory and memory"] for one in came.values()), (move, came)
        ids = [houses["memory and memory"].describe(name, ["x"]).document_id for name in "abcd"]
        found = {kind: searches(house) for kind, house in houses.items()}
        chunks = sorted(found["memory and memory"]["rows"][1])
        told = {kind: everything(house, ids, chunks) for kind, house in houses.items()}
        for question, said in found["memory and memory"].items():
            assert {kind: one[question] for kind, one in found.items()} == dict.fromkeys(found, said), question
        assert all(one == told["memory and memory"] for one in told.values())
