"""What a document store keeps of a second index: its own rules, and any moves leave SQLite and ArangoDB the same."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nexus.errors import Conflict, NexusError, Unavailable
from nexus.hades import chunks_of, document_id_of, index_of
from nexus.ports import DocumentStore, Generation, GenerationState, KeepsGenerations, LiveIndex, Staged
from nexus.stores import arango, sqlite
from nexus.types import Document, Piece, Principal, Vectors, content_digest, digest
from tests import document_stores
from tests.document_stores import STORES

ALICE = Principal("acme", "alice")
DIMENSIONS = {"words": 4, "wide": 6, "noise": 3}  # of each embedder, by its fingerprint
NAME = "default"
SINCE = 1e9


class Kept(DocumentStore, KeepsGenerations):
    """What the stores here are."""


@pytest.fixture(params=[store for store in STORES if store != "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    with document_stores.place(request.param, tmp_path) as open_documents:
        documents = open_documents()
        documents.open_collection(NAME, "words", index("words"))
        yield documents
        documents.close()


def index(fingerprint: str) -> str:
    return index_of(NAME, fingerprint)


def live(fingerprint: str) -> LiveIndex:
    return LiveIndex(index(fingerprint), fingerprint, f"{fingerprint}:", DIMENSIONS[fingerprint])


def generation(fingerprint: str, state: GenerationState = "building", since: float = SINCE) -> Generation:
    return Generation(live(fingerprint), state, since, {"questions": [{"query": "?", "expected": ["ä"]}]}, {})


def vectors(fingerprint: str, document: Document) -> Vectors:
    """Of its chunks, in order: unit vectors that are this embedder's and this version's alone."""
    seed = int(digest(fingerprint, document.document_id, document.version)[:8], 16)
    made = np.random.default_rng(seed).standard_normal((document.chunks, DIMENSIONS[fingerprint])).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def describe(name: str, text: str = "one", tenant: str = "acme", collection: str = NAME) -> Document:
    return Document(
        document_id_of(tenant, collection, name), content_digest(text.encode()), tenant, collection, name, name,
        "text/plain", {}, frozenset(), len(text), 2,
    )  # fmt: skip


def ids_of(document: Document) -> list[str]:
    return [chunk.chunk_id for chunk in _chunks(document)]


def _chunks(document: Document) -> list[Any]:
    return chunks_of(document, [Piece(f"part {number}", tokens=2) for number in range(document.chunks)])


def stage(store: Kept, document: Document, *beside: str, own: str = "words", said: str = "") -> int:
    epoch = store.begin(document)
    made = {fingerprint: vectors(fingerprint, document) for fingerprint in beside}
    texts = ["part"] * document.chunks
    store.stage([Staged(document, epoch, _chunks(document), texts, vectors(own, document), said, made)])
    return epoch


def put(store: Kept, document: Document, *beside: str, own: str = "words", said: str = "") -> Document:
    (published,) = store.publish([(document, stage(store, document, *beside, own=own, said=said))])
    return published


def fill(store: Kept, fingerprint: str, document: Document, first: int | None = None) -> bool:
    """Give the first chunks of a version, or all, their vectors."""
    made = dict(zip(ids_of(document)[:first], vectors(fingerprint, document), strict=False))
    return store.fill(index(fingerprint), document, made)


def begin(store: Kept, fingerprint: str = "wide") -> None:
    store.add_generation(NAME, live("words"), generation(fingerprint))


def same(found: Mapping[str, Any], fingerprint: str, document: Document) -> bool:
    expected = dict(zip(ids_of(document), vectors(fingerprint, document), strict=True))
    return found.keys() == expected.keys() and all(np.array_equal(found[one], expected[one]) for one in expected)


# ── the rules ───────────────────────────────────────────────────────────────────────────────────


def test_a_store_that_keeps_generations_is_known_by_its_methods(store: Kept) -> None:
    assert isinstance(store, KeepsGenerations)


def test_a_generation_is_noted_once_and_alone(store: Kept) -> None:
    begin(store)
    store.note_generation(index("wide"), "ready", SINCE + 1, {"sentence": "as good", "k": 3})
    begin(store)  # it is there: nothing of it changes
    noted = replace(generation("wide", "ready", SINCE + 1), figures={"sentence": "as good", "k": 3})
    assert store.generations(NAME) == [noted] and store.generations("other") == []
    store.note_generation(index("wide"), "ready", SINCE + 2)
    assert store.generations(NAME) == [replace(noted, since=SINCE + 2)]  # the figures stay
    with pytest.raises(Conflict, match="another index beside"):
        begin(store, "noise")
    recorded = store.collection(NAME)
    assert recorded is not None and (recorded.embedder, recorded.dimension, recorded.identity) == ("words:", 4, "")
    store.note_generation(index("wide"), "leaving", SINCE + 3)
    with pytest.raises(Unavailable, match="being removed"):
        begin(store)
    begin(store, "noise")
    assert [one.live.fingerprint for one in store.generations(NAME)] == ["noise", "wide"]  # by since
    store.forget_generation(index("wide"))
    store.note_generation(index("wide"), "ready", SINCE)  # which is no more
    assert [one.live.fingerprint for one in store.generations(NAME)] == ["noise"]


def test_what_was_published_lacks_until_each_chunk_is_filled(store: Kept) -> None:
    documents = [put(store, describe(name)) for name in "abc"]
    stage(store, describe("d"))
    other = describe("e", tenant="other")
    put(store, other)
    begin(store)
    everything = {one.document_id for one in (*documents, other)}
    assert {one.document_id for one in store.lacking(NAME, index("wide"), 10)} == everything
    assert len(store.lacking(NAME, index("wide"), 2)) == 2
    assert store.lacking("elsewhere", index("wide"), 10) == [] and store.filled("elsewhere", index("wide")) == (0, 0)
    assert store.filled(NAME, index("wide")) == (0, 8)
    assert fill(store, "wide", documents[0]) and fill(store, "wide", documents[1], 1)
    left = {one.document_id for one in store.lacking(NAME, index("wide"), 10)}
    assert left == everything - {documents[0].document_id}
    assert store.filled(NAME, index("wide")) == (3, 8)
    assert same(store.vectors_beside(index("wide"), [*ids_of(documents[0]), "unknown"]), "wide", documents[0])
    assert store.vectors_beside(index("noise"), ids_of(documents[0])) == {}
    assert same(store.vectors(ids_of(documents[0])), "words", documents[0])


def test_nothing_is_published_without_all_vectors_of_a_written_generation(store: Kept) -> None:
    before = stage(store, describe("a"))
    begin(store)
    for document, beside, is_whole in ((describe("a"), (), False), (describe("b"), ("noise",), False)):
        epoch = before if document.source == "a" else stage(store, document, *beside)
        with pytest.raises(Unavailable) as refused:
            store.publish([(document, epoch)])
        assert refused.value.code == "generation_lacks" and not is_whole
    half = describe("c")
    epoch = stage(store, half)
    assert fill(store, "wide", half, 1)
    with pytest.raises(Unavailable):
        store.publish([(half, epoch)])
    assert fill(store, "wide", half)
    assert store.publish([(half, epoch)])[0].opened == 1
    whole = [(one, stage(store, one, "wide", "noise")) for one in (describe("d"), describe("e"))]
    with pytest.raises(Unavailable):
        store.publish([*whole, (describe("a"), before)])  # all of them, or none
    assert store.current(describe("d").document_id, ALICE) is None
    assert [one.opened for one in store.publish(whole)] == [2, 3]
    assert store.vectors_beside(index("noise"), ids_of(describe("d"))) == {}  # no generation is that one's
    elsewhere = describe("a", collection="other")
    store.open_collection("other", "words", index_of("other", "words"))
    assert put(store, elsewhere).opened == 1
    store.note_generation(index("wide"), "leaving", SINCE)
    assert store.publish([(describe("a"), before)])[0].opened == 4


def test_vectors_for_an_index_that_leaves_or_a_version_that_goes_are_not_kept(store: Kept) -> None:
    document = put(store, describe("a"))
    assert not fill(store, "wide", document)  # which has not begun
    begin(store)
    assert not fill(store, "wide", describe("b"))  # which is not there
    store.delete([document.document_id], ALICE)
    store.retire(document, 1e12, 1e12)
    assert store.lacking(NAME, index("wide"), 10) == [] and not fill(store, "wide", document)
    again = put(store, describe("c"), "wide")
    store.note_generation(index("wide"), "leaving", SINCE)
    assert not fill(store, "wide", again)
    assert put(store, describe("d"), "wide").opened and store.vectors_beside(index("wide"), ids_of(describe("d"))) == {}


def test_what_is_purged_leaves_no_vectors_beside(store: Kept) -> None:
    begin(store)
    document, other = put(store, describe("a"), "wide"), put(store, describe("b"), "wide")
    store.delete([document.document_id], ALICE)
    store.retire(document, 1e12, 1e12)
    assert same(store.vectors_beside(index("wide"), ids_of(document)), "wide", document)
    assert store.purge(document)
    assert store.vectors_beside(index("wide"), ids_of(document)) == {}
    assert same(store.vectors_beside(index("wide"), ids_of(other)), "wide", other)


def test_the_adopted_generation_is_the_own_index_and_the_former_one_leaves(store: Kept) -> None:
    begin(store)
    document, unpublished = put(store, describe("a"), "wide"), describe("b")
    epoch = stage(store, unpublished)
    store.open_collection("other", "words", index_of("other", "words"))
    elsewhere = put(store, describe("a", collection="other"))
    store.adopt("other", index("wide"))  # which is no generation of that one
    assert store.generations(NAME) == [generation("wide")] and store.generations("other") == []
    for _ in range(2):  # twice is once
        store.adopt(NAME, index("wide"))
        own = store.collection(NAME)
        assert own is not None and (own.index, own.fingerprint, own.identity) == (index("wide"), "wide", "words")
        assert (own.embedder, own.dimension) == ("wide:", 6) and own in store.collections()
        (former,) = store.generations(NAME)
        assert (former.live, former.state) == (live("words"), "leaving") and former.since > SINCE
        assert (former.asked, former.figures) == ({}, {})
        assert same(store.vectors(ids_of(document)), "wide", document)
        assert store.vectors_beside(index("wide"), ids_of(document)) == {}
    assert same(store.vectors(ids_of(elsewhere)), "words", elsewhere)
    assert store.chunk_ids(index("wide"), published=True) == set(ids_of(document))
    assert store.chunk_ids(index("words"), published=False) == set()
    assert store.damaged(index("wide"), 6) == [] and len(store.damaged(index("wide"), 4)) == 2
    assert store.vectors(ids_of(unpublished)) == {}
    with pytest.raises(Unavailable, match="exchanged") as refused:
        store.publish([(unpublished, epoch)])
    assert refused.value.code == "generation_lacks"
    with pytest.raises(Unavailable, match="exchanged") as refused:
        stage(store, unpublished, said="words")
    assert refused.value.code == "generation_lacks"
    assert put(store, unpublished, own="wide", said="wide").opened == 2
    assert same(store.vectors(ids_of(unpublished)), "wide", unpublished)


def test_the_first_embedder_may_come_again(store: Kept) -> None:
    document = put(store, describe("a"))
    for fingerprint, former in (("wide", "words"), ("words", "wide")):
        store.add_generation(NAME, live(former), generation(fingerprint))
        assert fill(store, fingerprint, document)
        store.adopt(NAME, index(fingerprint))
        assert same(store.vectors(ids_of(document)), fingerprint, document)
        store.forget_generation(index(former))
        assert store.generations(NAME) == []
    own = store.collection(NAME)
    assert own is not None and (own.index, own.fingerprint, own.identity) == (index("words"), "words", "words")


# ── in ArangoDB ─────────────────────────────────────────────────────────────────────────────────


@contextmanager
def open_arango() -> Iterator[tuple[arango.ArangoDocuments, document_stores.arango_double.Database]]:
    double, name = document_stores.the_double(), f"generations_{uuid4().hex}"
    documents = arango.open(double.create(name))
    documents.open_collection(NAME, "words", index("words"))
    yield documents, double.databases[name]
    documents.close()
    del double.databases[name]


@pytest.fixture
def opened() -> Iterator[tuple[arango.ArangoDocuments, document_stores.arango_double.Database]]:
    with open_arango() as both:
        yield both


def test_an_adoption_that_fails_on_its_last_step_leaves_all_as_it_was(
    opened: tuple[arango.ArangoDocuments, document_stores.arango_double.Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, database = opened
    begin(documents)
    document = put(documents, describe("a"), "wide")
    before = {name: dict(table.rows) for name, table in database.tables.items()}
    monkeypatch.setattr(arango, "NOTE_OWN", "RETURN @key + @change + UNKNOWN()")
    with pytest.raises(NexusError):
        documents.adopt(NAME, index("wide"))
    assert {name: dict(table.rows) for name, table in database.tables.items()} == before
    monkeypatch.undo()
    monkeypatch.setattr(arango, "ADOPTED_AT_ONCE", 1)  # in several queries it is one transaction as well
    put(documents, describe("b"), "wide")
    documents.adopt(NAME, index("wide"))
    assert same(documents.vectors(ids_of(document)), "wide", document)
    assert same(documents.vectors(ids_of(describe("b"))), "wide", describe("b"))
    assert not database.tables["vectors_beside"].rows and not database.open


def test_moves_of_a_generation_are_on_the_disk_and_filling_is_not_waited_for(
    opened: tuple[arango.ArangoDocuments, document_stores.arango_double.Database],
) -> None:
    (documents, _), synced = opened, document_stores.the_double().synced
    document = put(documents, describe("a"))
    synced.clear()
    begin(documents)
    assert fill(documents, "wide", document)
    documents.note_generation(index("wide"), "staying", SINCE)
    documents.adopt(NAME, index("wide"))
    documents.forget_generation(index("words"))
    assert synced == [True, False, True, True, True]


def test_a_publish_waits_for_the_generation_that_is_being_noted_and_then_lacks_it(
    opened: tuple[arango.ArangoDocuments, document_stores.arango_double.Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is under the lock on the fences: no publish looks before the generation is there and writes after it."""
    documents, database = opened
    epoch, outcome = stage(documents, describe("a")), list[object]()
    row_of = arango._generation_row

    def publish() -> None:
        try:
            documents.publish([(describe("a"), epoch)])
        except Unavailable as error:
            outcome.append(error.code)

    threads = []

    def publish_meanwhile(*given: Any) -> Any:
        (transaction,) = database.open.values()  # the one that notes it
        assert transaction.modes["exclusive"] == {"fences"}
        threads.append(threading.Thread(target=publish))
        threads[0].start()
        return row_of(*given)

    monkeypatch.setattr(arango, "_generation_row", publish_meanwhile)
    begin(documents)
    threads[0].join()
    assert outcome == ["generation_lacks"]


def test_a_database_without_generations_gets_them_and_answers_as_before(tmp_path: Path) -> None:
    """The migration is one step on; records of before say nothing of whose vectors they have."""
    document, double = describe("a"), document_stores.the_double()
    with document_stores.place("arango", tmp_path) as open_documents:
        before = open_documents()
        before.open_collection(NAME, "words", index("words"))
        put(before, document)
        before.close()
        tables = double.databases[open_documents.address.rpartition("/")[2]].tables
        for added in arango.MIGRATIONS[1]:
            del tables[added.name]
        tables["schema"].rows["documents"]["version"] = 1
        for row in tables["versions"].rows.values():
            del row["is_exchanged"]
        again = open_documents()
        assert again.generations(NAME) == [] and {"generations", "vectors_beside"} <= tables.keys()
        begin(again)
        assert fill(again, "wide", document)
        again.adopt(NAME, index("wide"))
        assert same(again.vectors(ids_of(document)), "wide", document)
        again.close()


# ── the same as SQLite's ────────────────────────────────────────────────────────────────────────

NAMES, TEXTS = st.sampled_from(["a", "b", "c"]), st.sampled_from(["one", "two"])
FINGERPRINTS = st.sampled_from(["wide", "wide", "noise", "words"])
BESIDE = st.sampled_from([(), ("wide",), ("wide",), ("wide", "noise", "words"), ("noise",)])
STATES = st.sampled_from(["building", "ready", "refused", "staying", "leaving", "leaving"])
MOVES = st.lists(
    st.tuples(st.sampled_from(["put", "put", "stage"]), NAMES, TEXTS, BESIDE, st.sampled_from(["", "own", "words"]))
    | st.tuples(st.just("begin"), FINGERPRINTS)
    | st.tuples(st.just("note"), FINGERPRINTS, STATES)
    | st.tuples(st.just("fill"), FINGERPRINTS, NAMES, TEXTS, st.sampled_from([None, None, 1]))
    | st.tuples(st.just("adopt"), FINGERPRINTS)
    | st.tuples(st.just("forget"), FINGERPRINTS)
    | st.tuples(st.just("delete"), NAMES)
    | st.tuples(st.sampled_from(["retire", "purge"]), NAMES, TEXTS),
    min_size=6, max_size=14,
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One of the two stores, and the epoch that each document was last staged with."""

    store: Any
    epochs: dict[tuple[str, str], int]


def do(side: Side, number: int, move: tuple[Any, ...]) -> Any:
    """One move; what came of it, or its error."""
    store, (kind, *rest) = side.store, move
    try:
        if kind in ("put", "stage"):
            name, text, beside, said = rest
            own, document = store.collection(NAME).fingerprint, describe(name, text)
            epoch = stage(store, document, *beside, own=own, said=own if said == "own" else said)
            side.epochs[name, text] = epoch
            return store.publish([(document, epoch)]) if kind == "put" else epoch
        if kind == "begin":
            own = store.collection(NAME)
            beside = replace(generation(rest[0], since=number), asked={"number": number})
            return store.add_generation(NAME, live(own.fingerprint), beside)
        if kind == "note":
            return store.note_generation(index(rest[0]), rest[1], number, {"n": number} if number % 2 else None)
        if kind == "fill":
            return fill(store, rest[0], describe(*rest[1:3]), rest[3])
        if kind == "adopt":
            return store.adopt(NAME, index(rest[0]))
        if kind == "forget":
            return store.forget_generation(index(rest[0]))
        if kind == "delete":
            return store.delete([describe(rest[0]).document_id], ALICE)
        return store.retire(describe(*rest), 1e12, 1e12) if kind == "retire" else store.purge(describe(*rest))
    except NexusError as error:
        return type(error).__name__, error.code, error.message


def told(value: Any) -> Any:
    """Without the times of this moment, which differ between two stores."""
    if isinstance(value, Document):
        return replace(value, created_at=0.0)
    if isinstance(value, Generation):
        return replace(value, since=min(value.since, SINCE))
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: told(one) for key, one in value.items()}
    return [told(one) for one in value] if isinstance(value, list | tuple) else value


def everything(side: Side) -> Any:
    """What a store says to every question that a generation has a part in."""
    store = side.store
    documents = [describe(name, text) for name in "abc" for text in ("one", "two")]
    ids = [chunk_id for document in documents for chunk_id in ids_of(document)]
    answers = [store.collections(), store.collection(NAME, "acme"), store.generations(NAME), store.vectors(ids)]
    answers += [
        store.documents(ALICE, NAME, None, 10),
        store.vectors_of(NAME, ALICE, [documents[0].document_id], 99, 9),
    ]
    for fingerprint, dimension in DIMENSIONS.items():
        one = index(fingerprint)
        lacking = {(found.document_id, found.version) for found in store.lacking(NAME, one, 10)}
        answers += [sorted(lacking), store.filled(NAME, one), store.vectors_beside(one, ids)]
        answers += [sorted(store.damaged(one, dimension)), *(store.chunk_ids(one, whole) for whole in (True, False))]
    for document in documents:  # whether each can be published as it is, which it is then
        answers.append(_publish(side, document))
    return told(answers)


def _publish(side: Side, document: Document) -> Any:
    text = "one" if document.version == describe("", "one").version else "two"
    epoch = side.epochs.get((document.source, text), 1)
    try:
        return side.store.publish([(document, epoch)])
    except NexusError as error:
        return type(error).__name__, error.code, error.message


FIRST: list[tuple[Any, ...]] = [("put", "a", "one", (), ""), ("stage", "b", "one", (), ""), ("begin", "wide")]


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a shorter list of moves would take minutes to find
)  # fmt: skip
@given(moves=MOVES)
def test_any_moves_with_a_second_index_leave_both_with_the_same_answers(moves: list[tuple[Any, ...]]) -> None:
    with open_arango() as (documents, _), closing(sqlite.open("sqlite::memory:")) as reference:
        reference.open_collection(NAME, "words", index("words"))
        one, other = Side(reference, {}), Side(documents, {})
        for number, move in enumerate([*FIRST, *moves]):
            assert told(do(one, number, move)) == told(do(other, number, move)), move
        assert everything(one) == everything(other)
