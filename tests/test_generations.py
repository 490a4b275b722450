"""What a document store keeps of a second index: its own rules, and any moves leave SQLite and ArangoDB the same."""

import sqlite3
import threading
from collections.abc import Iterator
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
from nexus.kept import pack
from nexus.ports import Cut, DocumentStore, Generation, GenerationState, KeepsGenerations, LiveIndex, Staged
from nexus.stores import arango, sqlite
from nexus.types import LAST_ORDINAL, Document, Parsed, Piece, Principal, Vectors, chunk_id_of, content_digest, digest
from tests import arango_double, document_stores
from tests.document_stores import STORES

ALICE = Principal("acme", "alice")
DIMENSIONS = {"words": 4, "wide": 6, "noise": 3}  # of each embedder, by its fingerprint
NAME = "default"
KEPT = pack(Parsed("", "", ()))
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
    beside = replace(live(fingerprint), cut=index(fingerprint), chunking="so")
    return Generation(beside, state, since, {"questions": [{"query": "?", "expected": ["ä"]}]}, {})


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


def cut_name(store: Kept, fingerprint: str) -> str:
    """Of the index of an embedder, which is the own one, or would be one beside it."""
    known = store.collection(NAME)
    return known.cut if known is not None and known.index == index(fingerprint) else index(fingerprint)


def cut(store: Kept, fingerprint: str, document: Document, chunks: int | None = None) -> Cut:
    """A version as the index of an embedder has it: one chunk more in those beside the first."""
    name = cut_name(store, fingerprint)
    count = (document.chunks + (name != "")) if chunks is None else chunks
    pieces = [Piece(f"part {number} for {fingerprint}", tokens=2) for number in range(count)]
    made = vectors(fingerprint, replace(document, chunks=count))
    return Cut(chunks_of(document, pieces, name), ["part"] * count, made)


def ids_of(store: Kept, fingerprint: str, document: Document) -> list[str]:
    return [chunk.chunk_id for chunk in cut(store, fingerprint, document).chunks]


def stage(store: Kept, document: Document, *beside: str, own: str = "words", said: str = "", kept: bytes = KEPT) -> int:
    epoch = store.begin(document)
    mine = cut(store, own, document, document.chunks)
    made = {index(one): cut(store, one, document) for one in beside}
    store.stage([Staged(document, epoch, mine.chunks, mine.texts, mine.vectors, said and index(said), made, kept)])
    return epoch


def put(store: Kept, document: Document, *beside: str, own: str = "words", said: str = "") -> Document:
    (published,) = store.publish([(document, stage(store, document, *beside, own=own, said=said))])
    return published


def fill(store: Kept, fingerprint: str, document: Document) -> bool:
    return store.fill(index(fingerprint), document, cut(store, fingerprint, document))


def forget(store: Kept, fingerprint: str) -> int:
    """All of it; in how many parts."""
    parts = 0
    while store.forget_generation(index(fingerprint)):
        parts += 1
    return parts


def begin(store: Kept, fingerprint: str = "wide") -> None:
    store.add_generation(NAME, live("words"), generation(fingerprint))


def there(store: Kept, fingerprint: str, document: Document, chunks: int | None = None) -> bool:
    """Whether a version is, whole and as made for it, in the index of an embedder."""
    made, key = cut(store, fingerprint, document, chunks), (document.document_id, document.version)
    found = store.neighbours(*key, 0, LAST_ORDINAL, cut_name(store, fingerprint))
    ids = [chunk.chunk_id for chunk in made.chunks]
    vectors_of_it = store.vectors(ids)
    return found == list(made.chunks) and all(
        np.array_equal(vectors_of_it[one], vector) for one, vector in zip(ids, made.vectors, strict=True)
    )


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
    with pytest.raises(Conflict, match="itself"):
        begin(store, "words")
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


def test_what_was_published_lacks_until_it_is_filled(store: Kept) -> None:
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
    assert fill(store, "wide", documents[0])
    left = {one.document_id for one in store.lacking(NAME, index("wide"), 10)}
    assert left == everything - {documents[0].document_id}
    assert store.filled(NAME, index("wide")) == (2, 8)  # in chunks of the own index
    assert there(store, "wide", documents[0]) and there(store, "words", documents[0])
    assert not there(store, "wide", documents[1]) and not there(store, "noise", documents[0])
    assert len(store.chunk_ids_of(documents[0].document_id, documents[0].version)) == 5
    loaded = store.load(ids_of(store, "wide", documents[0]))
    assert {chunk.cut for chunk, _ in loaded.values()} == {index("wide")} and len(loaded) == 3
    assert set(store.damaged(index("wide"), 6)) == left
    assert store.chunk_ids(index("wide"), published=True) == set(ids_of(store, "wide", documents[0]))


def test_what_is_there_is_not_filled_over(store: Kept) -> None:
    """Whoever published it anew may have cut it otherwise."""
    begin(store)
    document = put(store, describe("a"), "wide")
    assert not store.fill(index("wide"), document, cut(store, "wide", document, 9))
    assert there(store, "wide", document)


def test_one_cut_is_not_the_neighbour_of_another(store: Kept) -> None:
    begin(store)
    document = put(store, describe("a"), "wide")
    for fingerprint, count in (("words", 2), ("wide", 3)):
        name = cut_name(store, fingerprint)
        texts = [chunk.piece.text for chunk in store.neighbours(document.document_id, document.version, 0, 1, name)]
        assert texts == [f"part 0 for {fingerprint}", f"part 1 for {fingerprint}"]
        found = store.vectors_of(NAME, ALICE, [document.document_id], 1, 9, name)
        assert found.keys() == set(ids_of(store, fingerprint, document)) and len(found) == count
        verdicts = store.verdicts(NAME, ALICE, list(found), 1)
        assert set(verdicts.values()) == {"visible"}


def test_nothing_is_published_that_a_written_generation_lacks(store: Kept) -> None:
    before = stage(store, describe("a"))
    begin(store)
    for document, beside in ((describe("a"), ()), (describe("b"), ("noise",))):
        epoch = before if document.source == "a" else stage(store, document, *beside)
        with pytest.raises(Unavailable) as refused:
            store.publish([(document, epoch)])
        assert refused.value.code == "generation_lacks"
    late = describe("c")
    epoch = stage(store, late)
    assert fill(store, "wide", late)
    assert store.publish([(late, epoch)])[0].opened == 1
    whole = [(one, stage(store, one, "wide", "noise")) for one in (describe("d"), describe("e"))]
    with pytest.raises(Unavailable):
        store.publish([*whole, (describe("a"), before)])  # all of them, or none
    assert store.current(describe("d").document_id, ALICE) is None
    assert [one.opened for one in store.publish(whole)] == [2, 3]
    assert not there(store, "noise", describe("d"))  # no generation is that one's
    elsewhere = describe("a", collection="other")
    store.open_collection("other", "words", index_of("other", "words"))
    assert put(store, elsewhere).opened == 1
    store.note_generation(index("wide"), "leaving", SINCE)
    assert store.publish([(describe("a"), before)])[0].opened == 4


def test_of_an_index_that_leaves_or_a_version_that_goes_nothing_is_kept(store: Kept) -> None:
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
    assert put(store, describe("d"), "wide").opened and not there(store, "wide", describe("d"))


def test_what_is_purged_leaves_no_cut_behind(store: Kept) -> None:
    begin(store)
    document, other = put(store, describe("a"), "wide"), put(store, describe("b"), "wide")
    store.delete([document.document_id], ALICE)
    ids = [*ids_of(store, "words", document), *ids_of(store, "wide", document)]
    assert set(store.retire(document, 1e12, 1e12) or ()) == set(ids)
    assert there(store, "wide", document)
    assert store.purge(document)
    assert store.load(ids) == {} and store.chunk_ids_of(document.document_id, document.version) == []
    assert there(store, "wide", other) and there(store, "words", other)
    (receipt,) = store.deletions(ALICE, document.document_id, 1)
    assert (receipt.versions, receipt.chunks, receipt.vectors) == (1, 5, 5) and receipt.purged_at


def test_what_is_not_kept_is_named(store: Kept) -> None:
    before, after = describe("a"), describe("b")
    for document, kept in ((before, b""), (after, KEPT)):
        store.publish([(document, stage(store, document, kept=kept))])
    stage(store, describe("c"), kept=b"")  # which nobody sees
    assert [one.source for one in store.unkept(NAME, 10)] == ["a"] and store.unkept("other", 10) == []
    store.publish([(before, stage(store, before))])  # added again
    assert store.unkept(NAME, 10) == []


def test_the_adopted_generation_is_the_own_index_and_the_former_one_leaves(store: Kept) -> None:
    begin(store)
    document, unpublished = put(store, describe("a"), "wide"), describe("b")
    epoch = stage(store, unpublished)
    store.open_collection("other", "words", index_of("other", "words"))
    elsewhere = put(store, describe("a", collection="other"))
    store.adopt("other", index("wide"))  # which is no generation of that one
    assert [one.state for one in store.generations(NAME)] == ["building"] and store.generations("other") == []
    for _ in range(2):  # twice is once
        store.adopt(NAME, index("wide"))
        own = store.collection(NAME)
        assert own is not None and (own.index, own.fingerprint, own.identity) == (index("wide"), "wide", "words")
        assert (own.embedder, own.dimension, own.cut, own.chunking) == ("wide:", 6, index("wide"), "so")
        assert own in store.collections()
        (former,) = store.generations(NAME)
        assert (former.live, former.state) == (live("words"), "leaving") and former.since > SINCE
        assert (former.asked, former.figures) == ({}, {})
        assert there(store, "wide", document)
    assert store.chunk_ids(index("wide"), published=True) == set(ids_of(store, "wide", document))
    assert len(store.chunk_ids(index("words"), published=True)) == 2  # for who is still in it
    assert store.damaged(index("wide"), 6) == [] and len(store.damaged(index("wide"), 4)) == 3
    with pytest.raises(Unavailable, match="exchanged") as refused:
        store.publish([(unpublished, epoch)])
    assert refused.value.code == "generation_lacks"
    with pytest.raises(Unavailable, match="exchanged") as refused:
        stage(store, unpublished, said="words")
    assert refused.value.code == "generation_lacks"
    unpublished = replace(unpublished, chunks=3)
    assert put(store, unpublished, own="wide", said="wide").opened == 2
    assert there(store, "wide", unpublished, 3)
    assert forget(store, "words") == 1 and store.generations(NAME) == []
    assert store.chunk_ids(index("words"), published=False) == set()
    current = store.current(document.document_id, ALICE)
    assert current is not None and current.chunks == 3 and store.tally(ALICE)[NAME] == (2, 6)
    assert len(store.chunk_ids_of(document.document_id, document.version)) == 3
    assert len(store.chunk_ids_of(elsewhere.document_id, elsewhere.version)) == 2  # first cuts have one name


def test_the_first_embedder_may_come_again(store: Kept) -> None:
    document = put(store, describe("a"))
    for fingerprint, former in (("wide", "words"), ("words", "wide")):
        store.add_generation(NAME, live(former), generation(fingerprint))
        assert fill(store, fingerprint, document)
        store.adopt(NAME, index(fingerprint))
        assert there(store, fingerprint, document)
        with pytest.raises(Unavailable, match="being removed"):
            store.add_generation(NAME, live(fingerprint), generation(former))
        forget(store, former)
        assert store.generations(NAME) == []
    own = store.collection(NAME)
    assert own is not None and (own.index, own.fingerprint, own.identity) == (index("words"), "words", "words")
    assert own.cut == index("words") and there(store, "words", document)


def test_an_index_is_forgotten_part_by_part(store: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "FORGOTTEN_AT_ONCE", 2)
    monkeypatch.setattr(arango, "FORGOTTEN_AT_ONCE", 2)
    documents = [put(store, describe(name)) for name in "abcde"]
    begin(store)
    assert all(fill(store, "wide", one) for one in documents)
    store.note_generation(index("wide"), "leaving", SINCE)
    assert store.forget_generation(index("wide")) and store.filled(NAME, index("wide")) == (6, 10)
    assert forget(store, "wide") == 2 and store.generations(NAME) == []
    assert not store.forget_generation(index("wide"))
    assert all(there(store, "words", one) for one in documents)
    assert {one.chunks for one in store.documents(ALICE, NAME, None, 9)} == {2}


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
    documents.adopt(NAME, index("wide"))
    assert there(documents, "wide", document) and not database.open
    changed = {name for name, table in database.tables.items() if dict(table.rows) != before[name]}
    assert changed == {"collections", "generations"}  # however many chunks there are


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
    forget(documents, "words")
    assert synced == [True, False, True, True, True, True]


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


def test_a_database_of_before_each_index_had_chunks_of_its_own_goes_on(tmp_path: Path) -> None:
    """Its records say nothing of cuts; a second index, which had vectors alone, is on its way out."""
    document, unpublished, double = describe("a"), describe("b"), document_stores.the_double()
    with document_stores.place("arango", tmp_path) as open_documents:
        before = open_documents()
        before.open_collection(NAME, "words", index("words"))
        put(before, document)
        epoch = stage(before, unpublished)
        begin(before)
        before.close()
        tables = double.databases[open_documents.address.rpartition("/")[2]].tables
        tables["vectors_beside"] = arango_double.Table(False)
        del tables["kept"]
        tables["schema"].rows["documents"]["version"] = 2
        for name, fields in {"versions": ["cuts"], "chunks": ["cut"], "generations": ["cut", "chunking"]}.items():
            for row in tables[name].rows.values():
                for field in fields:
                    del row[field]
        for row in tables["versions"].rows.values():
            row["is_exchanged"] = row["document_id"] == unpublished.document_id
        again = open_documents()
        (given_up,) = again.generations(NAME)
        assert given_up.state == "leaving" and "vectors_beside" not in tables
        assert there(again, "words", document) and again.damaged(index("words"), 4) == []
        with pytest.raises(Unavailable, match="exchanged"):
            again.publish([(unpublished, epoch)])
        forget(again, "wide")
        begin(again)
        assert again.filled(NAME, index("wide")) == (0, 2) and fill(again, "wide", document)
        assert put(again, unpublished, "wide").opened == 2
        again.adopt(NAME, index("wide"))
        assert forget(again, "words") == 1
        assert there(again, "wide", document) and len(again.chunk_ids_of(document.document_id, document.version)) == 3
        again.close()


def test_a_file_of_before_each_index_had_chunks_of_its_own_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "MIGRATIONS", sqlite.MIGRATIONS[:6])
    sqlite.open("sqlite:", home=tmp_path).close()
    document, unpublished = describe("a"), describe("b")
    with closing(sqlite3.connect(tmp_path / "documents.db")) as db:
        db.execute(
            "INSERT INTO collections (name, fingerprint, index_name) VALUES (?, 'words', ?)", (NAME, index("words"))
        )
        for one in (document, unpublished):
            key = (one.document_id, one.version)
            row = (*key, "acme", NAME, one.source, one.source, "text/plain", "{}", "[]", 3, 2, 1, 0.0, 0.0, None)
            db.execute(f"INSERT INTO versions VALUES ({','.join('?' * 15)})", row)
            db.execute("INSERT INTO epochs VALUES (?, 1)", (one.document_id,))
            for number, vector in enumerate(vectors("words", one)):
                text, data = f"part {number} for words", b"" if one is unpublished else vector.tobytes()
                chunk = (chunk_id_of(*key, number), *key, number, text, "[]", None, None, None, 2, data)
                db.execute(f"INSERT INTO chunks VALUES ({','.join('?' * 11)})", chunk)
        db.execute("INSERT INTO spans VALUES (?, ?, 1, NULL, NULL, 1)", (document.document_id, document.version))
        db.execute("INSERT INTO sequences VALUES ('acme', ?, 1, 0)", (NAME,))
        generation_row = (index("wide"), NAME, "wide", "wide:", 6, "ready", SINCE, "{}", "{}")
        db.execute("INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", generation_row)
        db.execute("INSERT INTO vectors_beside VALUES ('c', ?, x'00')", (index("wide"),))
        db.commit()
    monkeypatch.undo()
    with closing(sqlite.open("sqlite:", home=tmp_path)) as store:
        assert [one.state for one in store.generations(NAME)] == ["leaving"]
        assert there(store, "words", document) and store.damaged(index("words"), 4) == []
        with pytest.raises(Unavailable, match="exchanged"):
            store.publish([(unpublished, 1)])
        forget(store, "wide")
        begin(store)
        assert [one.source for one in store.unkept(NAME, 9)] == ["a"]
        assert store.filled(NAME, index("wide")) == (0, 2) and fill(store, "wide", document)
        assert put(store, unpublished, "wide").opened == 2
        store.adopt(NAME, index("wide"))
        assert forget(store, "words") == 1
        assert there(store, "wide", document) and len(store.chunk_ids_of(document.document_id, document.version)) == 3


# ── the same as SQLite's ────────────────────────────────────────────────────────────────────────

NAMES, TEXTS = st.sampled_from(["a", "b", "c"]), st.sampled_from(["one", "two"])
FINGERPRINTS = st.sampled_from(["wide", "wide", "noise", "words"])
BESIDE = st.sampled_from([(), ("wide",), ("wide",), ("wide", "noise", "words"), ("noise",)])
STATES = st.sampled_from(["building", "ready", "refused", "staying", "leaving", "leaving"])
MOVES = st.lists(
    st.tuples(st.sampled_from(["put", "put", "stage"]), NAMES, TEXTS, BESIDE, st.sampled_from(["", "own", "words"]))
    | st.tuples(st.just("begin"), FINGERPRINTS)
    | st.tuples(st.just("note"), FINGERPRINTS, STATES)
    | st.tuples(st.just("fill"), FINGERPRINTS, NAMES, TEXTS)
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
            document = replace(document, chunks=2 + (cut_name(store, own) != ""))
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
            return fill(store, rest[0], describe(*rest))
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
    ids = [one for name in DIMENSIONS for document in documents for one in ids_of(store, name, document)]
    ids += [chunk_id_of(document.document_id, document.version, 0) for document in documents]
    answers = [store.collections(), store.collection(NAME, "acme"), store.generations(NAME), store.vectors(ids)]
    answers += [store.load(ids), store.documents(ALICE, NAME, None, 10), store.tally(ALICE), store.unkept(NAME, 9)]
    for fingerprint, dimension in DIMENSIONS.items():
        one = index(fingerprint)
        lacking = {(found.document_id, found.version) for found in store.lacking(NAME, one, 10)}
        answers += [sorted(lacking), store.filled(NAME, one)]
        for name in (one, ""):
            answers.append(store.vectors_of(NAME, ALICE, [documents[0].document_id], 99, 9, name))
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
