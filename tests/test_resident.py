"""Searches in memory follow the document store: what is published there is found next, and what was erased is gone."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import invariant

from nexus import resident, snapshot
from nexus.errors import Unavailable
from nexus.ports import Collection, IndexRow, Scope, VectorStore
from nexus.registry import open_part
from nexus.resident import Resident
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.rows import estimated_bytes
from nexus.stores import memory, sqlite
from nexus.stores.memory import MemoryVectors
from nexus.types import Chunk, Document, Principal, SearchRequest, SearchResult, Vector
from tests.conftest import ALICE, BOB, MALLORY, House, build_house
from tests.test_publishing_model import Publishing

ROOM = 2**26


class Deaf(MemoryVectors):
    """A vector store that takes all and answers no search: whoever finds something found it in memory."""

    def search_dense(self, index: str, vector: Vector, limit: int, scope: Scope) -> list[tuple[str, float]]:
        raise Unavailable("the vector store was asked")

    def search_text(self, index: str, terms: str, limit: int, scope: Scope) -> list[tuple[str, float]]:
        raise Unavailable("the vector store was asked")


def hold(house: House, most_bytes: int = ROOM) -> Resident:
    """Let this house search in memory, too; what it has by now is read."""
    held = Resident(house.hades, most_bytes)
    house.retriever.resident = held
    held.foresee()
    held.settle()
    return held


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    documents = open_part("stores", "sqlite:", home=tmp_path)
    house = build_house(documents, Deaf())
    house.put("first", "gripper of the first")
    hold(house)
    yield house
    house.retriever.close()
    documents.close()


def texts(house: House, query: str = "gripper", who: Principal = ALICE, **fields: object) -> list[str]:
    return sorted(hit.text for hit in house.retriever.search(SearchRequest(query, 50, **fields), who).hits)  # type: ignore[arg-type]


def test_what_is_published_is_found_by_the_next_search(house: House) -> None:
    for n in range(5):
        house.put(f"more {n}", f"gripper number {n}")
        assert f"gripper number {n}" in texts(house)
    house.put("more 0", "gripper anew")
    assert "gripper anew" in texts(house) and "gripper number 0" not in texts(house)


def test_what_is_deleted_is_found_by_no_search_and_by_as_of(house: House) -> None:
    before = house.hades.find_collection("default", "acme").sequence
    house.hades.delete([house.describe("first", ["x"]).document_id], ALICE)
    assert [one["removed_by"] for one in explained(house, ALICE)] == ["superseded"]  # nothing has to be loaded to know
    assert texts(house) == []
    assert texts(house, as_of=before) == ["gripper of the first"]


def test_what_a_vacuum_erased_is_gone_from_memory(house: House) -> None:
    held = house.retriever.resident
    assert held is not None
    gone = house.put("second", "gripper plutonium")
    house.hades.delete([gone.document_id], ALICE)
    house.hades.vacuum(-1, -1)
    held.settle()
    ((rows),) = [part.rows for part in held._parts.values()]
    assert rows is not None and rows.chunk_ids == house.hades.documents.chunk_ids(rows.index, published=False)
    assert "plutonium" not in rows._state.terms


def test_a_version_that_is_erased_and_comes_again_is_found(house: House) -> None:
    held = house.retriever.resident
    assert held is not None
    for settled in (True, False):
        document = house.put("second", "gripper again")
        house.hades.delete([document.document_id], ALICE)
        house.hades.vacuum(-1, -1)
        if settled:
            held.settle()
        house.put("second", "gripper again")
        assert "gripper again" in texts(house)
        held.settle()
        assert "gripper again" in texts(house)


def test_readers_who_change_are_followed_both_ways(house: House) -> None:
    """A document's own rows do not change with its readers; whom they are for does."""
    house.put("some", "gripper for some", readers=frozenset({"bob"}))
    assert (texts(house), texts(house, who=BOB)) == (
        ["gripper of the first"],
        ["gripper for some", "gripper of the first"],
    )
    for readers, expected in (
        (frozenset(), {"alice", "bob"}), (frozenset({"alice"}), {"alice"}), (frozenset({"bob"}), {"bob"}),
        (frozenset({"alice", "bob"}), {"alice", "bob"}),
    ):  # fmt: skip
        house.hades.documents.annotate(house.describe("some", ["gripper for some"], readers=readers))
        for who in (ALICE, BOB):
            assert ("gripper for some" in texts(house, who=who)) == (who.subject in expected), (readers, who)


def test_candidates_are_judged_in_memory(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document store is asked for what is shown, and about nothing else; yet it could not say it better."""
    before = house.hades.find_collection("default", "acme").sequence
    house.put("some", "gripper for some", readers=frozenset({"bob"}))
    house.put("first", "gripper anew")
    house.put("gone", "gripper that was")
    house.hades.delete([house.describe("gone", ["x"]).document_id], ALICE)
    monkeypatch.delattr(sqlite.SqliteDocuments, "verdicts")
    assert texts(house) == ["gripper anew"]
    assert texts(house, who=BOB) == ["gripper anew", "gripper for some"]
    assert texts(house, as_of=before, who=BOB) == ["gripper of the first"]


def test_a_version_that_came_back_was_not_there_between(house: House) -> None:
    """A, then B, then A again, and then nothing: each moment is as it was."""
    sequences = []
    for text in ("gripper B", "gripper of the first"):
        sequences.append(house.hades.find_collection("default", "acme").sequence)
        house.put("first", text)
    sequences.append(house.hades.find_collection("default", "acme").sequence)
    house.hades.delete([house.describe("first", ["x"]).document_id], ALICE)
    expected = ["gripper of the first"], ["gripper B"], ["gripper of the first"]
    assert tuple(texts(house, as_of=sequence) for sequence in sequences) == expected
    assert texts(house) == []


def test_the_document_store_has_the_last_word(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers who are narrowed while somebody searches: what that search shows was loaded after it."""
    load = sqlite.SqliteDocuments.load

    def narrow_first(store: sqlite.SqliteDocuments, chunk_ids: Sequence[str]) -> dict[str, tuple[Chunk, Document]]:
        store.annotate(house.describe("first", ["gripper of the first"], readers=frozenset({"bob"})))
        return load(store, chunk_ids)

    monkeypatch.setattr(sqlite.SqliteDocuments, "load", narrow_first)
    assert texts(house) == []
    assert texts(house, who=BOB) == ["gripper of the first"]


def test_a_new_title_is_found(house: House) -> None:
    document = house.describe("first", ["gripper of the first"])
    assert texts(house, "hydraulics", embedding_weight=0.0, text_weight=1.0) == []
    renamed = replace(document, title="Hydraulics")
    house.hades.publish([(renamed, house.stage(renamed, ["gripper of the first"]))])
    assert texts(house, "hydraulics", embedding_weight=0.0, text_weight=1.0) == ["gripper of the first"]


def test_tenants_know_nothing_of_each_other(house: House) -> None:
    before = explained(house, ALICE)
    for n in range(20):
        house.put(f"theirs {n}", "gripper gripper", who=MALLORY)
    house.retriever.resident.settle()  # type: ignore[union-attr]
    assert len(texts(house, who=MALLORY)) == 20
    assert explained(house, ALICE) == before


def test_what_is_new_is_read_before_anybody_searches_it(house: House) -> None:
    """The vector store is deaf here: a first search that it is asked fails."""
    house.put("new", "gripper of a new collection", collection="new")
    house.put("theirs", "gripper of another tenant", who=MALLORY)
    house.retriever.resident.settle()  # type: ignore[union-attr]
    assert texts(house, collection="new") == ["gripper of a new collection"]
    assert texts(house, who=MALLORY) == ["gripper of another tenant"]


def explained(house: House, who: Principal) -> Any:
    result = house.retriever.search(SearchRequest("gripper first", 50, explain=True), who)
    assert result.explain is not None
    return result.explain["candidates"]


@pytest.mark.parametrize("query", ["gripper", "arm torque", "the", "nothing of this"])
def test_a_search_in_memory_is_a_search_in_the_store(query: str) -> None:
    """Hits, scores, ranks of each route and verdicts, for every kind of request."""
    documents = sqlite.open("sqlite::memory:")
    house = build_house(documents, memory.open("memory:"))
    fill(house)
    held = Resident(house.hades, ROOM)
    beside = Retriever(house.hades, house.embedder, RetrievalSettings(), resident=held)
    held.foresee()
    held.settle()
    kinds: list[dict[str, object]] = [
        {}, {"embedding_weight": 0.0}, {"text_weight": 0.0}, {"fusion": "rrf"}, {"k": 3}, {"as_of": 3}, {"graph": "on"},
    ]  # fmt: skip
    for who in (ALICE, BOB, MALLORY):
        for fields in kinds:
            request = SearchRequest(query, **{"k": 50, "explain": True, **fields})  # type: ignore[arg-type]
            expected, found = house.retriever.search(request, who), beside.search(request, who)
            require_alike(plain(found), plain(expected))
    assert {one.served_by for one in held.standings()} == {"resident"}
    for one in (beside, house.retriever):
        one.close()
    documents.close()


def fill(house: House) -> None:
    for n in range(12):
        house.put(f"a{n}", f"gripper {n} holds the arm", f"torque of arm {n} in newton metres")
    for n in range(6):
        house.put(f"r{n}", f"gripper arm {n} for some readers", readers=frozenset({"bob", f"carol{n % 2}"}))
        house.put(f"m{n}", f"the gripper of others {n}", who=MALLORY)
    house.put("a1", "gripper arm torque, the second version")
    house.hades.delete([house.describe("a2", ["x"]).document_id], ALICE)
    index = house.hades.find_collection("default").index
    house.hades.write_again(sorted(house.hades.vectors.chunk_ids(index)))  # with their titles, as an ingestor has them


def require_alike(found: object, expected: object) -> None:
    """Equal, but for what rounding does to numbers."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5)
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and list(found) == list(expected)
        for key, value in expected.items():
            require_alike(found[key], value)
    elif isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            require_alike(one, other)
    else:
        assert found == expected


def plain(result: SearchResult) -> object:
    """All that is said of a result."""
    hits = [
        (hit.chunk_id, hit.score, hit.cosine, hit.text, {name: (r.rank, r.score) for name, r in hit.routes.items()})
        for hit in result.hits
    ]
    return hits, result.explain, result.sequence


WRITER = """
import sys
from pathlib import Path
from nexus.registry import open_part
from nexus.stores import memory
from tests.conftest import ALICE, build_house
house = build_house(open_part("stores", "sqlite:", home=Path(sys.argv[1])), memory.open("memory:"))
print("ready", flush=True)
for line in sys.stdin:
    what, name, text = line.strip().split("|")
    if what == "put":
        house.put(name, text)
    else:
        house.hades.delete([house.describe(name, ["x"]).document_id], ALICE)
    print("done", flush=True)
"""


def test_what_another_process_published_is_found_by_the_next_search(house: House, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None and writer.stdout is not None

        def order(line: str) -> None:
            print(line, file=writer.stdin, flush=True)
            assert writer.stdout is not None and writer.stdout.readline() == "done\n"

        assert writer.stdout.readline() == "ready\n"
        for n in range(20):
            order(f"put|other|gripper {n}")
            assert texts(house) == [f"gripper {n}", "gripper of the first"]
            if n % 5 == 4:
                order("delete|other|")
                assert texts(house) == ["gripper of the first"]
        writer.stdin.close()


def test_searchers_beside_a_writer_see_each_document_whole(house: House) -> None:
    """A document of two chunks is replaced again and again: whoever searches finds both of one version."""
    ended, wrong = threading.Event(), []
    house.put("twin", "gripper left 0", "gripper right 0")

    def search() -> None:
        while not ended.is_set():
            found = [text.split() for text in texts(house, "gripper left right") if text != "gripper of the first"]
            if [side for _, side, _ in found] != ["left", "right"] or len({n for _, _, n in found}) != 1:
                wrong.append(found)

    searchers = [threading.Thread(target=search) for _ in range(4)]
    for one in searchers:
        one.start()
    for n in range(1, 40):
        house.put("twin", f"gripper left {n}", f"gripper right {n}")
    ended.set()
    for one in searchers:
        one.join()
    assert wrong == []


# ── files ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[House, Path]]:
    """A house of which what is held is in a file, and that file."""
    documents = open_part("stores", "sqlite:", home=tmp_path)
    house = build_house(documents, Deaf())
    for n in range(3):
        house.put(f"d{n}", f"gripper {n}", f"arm torque {n}", readers=frozenset({"bob"} if n == 2 else ()))
    hold_again(house, tmp_path).close()
    (file,) = (tmp_path / resident.FOLDER).iterdir()
    yield house, file
    house.retriever.close()
    documents.close()


def hold_again(house: House, home: Path) -> Resident:
    """As a process that starts does."""
    held = Resident(house.hades, ROOM, home)
    house.retriever.resident = held
    held.foresee()
    held.settle()
    return held


def reads(house: House, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of documents whose texts are read from now on."""
    read: list[str] = []
    before = house.hades.rows

    def rows(collection: Collection, documents: Sequence[Document]) -> Iterator[list[IndexRow]]:
        read.extend(document.title for document in documents)
        return before(collection, documents)

    monkeypatch.setattr(house.hades, "rows", rows)
    return read


def test_a_start_reads_the_file_and_only_what_came_since(
    kept: tuple[House, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, file = kept
    assert file.stat().st_mode & 0o077 == 0
    read = reads(house, monkeypatch)
    held = hold_again(house, tmp_path)
    assert read == [] and texts(house, "gripper arm") == ["arm torque 0", "arm torque 1", "gripper 0", "gripper 1"]
    held.close()
    house.put("late", "gripper late")
    house.hades.delete([house.describe("d0", ["x"]).document_id], ALICE)
    house.hades.vacuum(-1, -1)
    narrowed = house.describe("d1", ["gripper 1", "arm torque 1"], readers=frozenset({"bob"}))
    house.hades.documents.annotate(narrowed)
    held = hold_again(house, tmp_path)
    assert read == ["late"] and texts(house, "gripper arm") == ["gripper late"]
    assert texts(house, "gripper arm", BOB) == [
        "arm torque 1",
        "arm torque 2",
        "gripper 1",
        "gripper 2",
        "gripper late",
    ]
    house.put("later", "gripper later")
    assert texts(house) == ["gripper late", "gripper later"]
    held.close()


def test_what_was_erased_is_gone_from_the_file(kept: tuple[House, Path], tmp_path: Path) -> None:
    house, file = kept
    held = hold_again(house, tmp_path)
    vector = house.embedder.embed(["arm torque 0"])[0].tobytes()
    gone = house.put("secret", "gripper plutonium")
    held._parts[next(iter(held._parts))].written_at = -1e9
    held.settle()
    assert b"plutonium" in file.read_bytes() and vector in file.read_bytes()
    house.hades.delete([gone.document_id, house.describe("d0", ["x"]).document_id], ALICE)
    house.hades.vacuum(-1, -1)
    held.settle()
    assert b"plutonium" not in file.read_bytes() and vector not in file.read_bytes()
    held.close()


def test_a_damaged_file_is_made_anew_and_never_believed(
    kept: tuple[House, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit at each of many places, and every kind of end."""
    house, file = kept
    whole, read = file.read_bytes(), reads(house, monkeypatch)
    places = {*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1}
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in sorted(places)]
    for content in (*damaged, b"", whole[:10], whole[:-1], whole + b"x", whole[: len(whole) // 2]):
        assert snapshot.read(save(file, content)) is None
    for content in (damaged[0], damaged[20], whole[:-1]):
        save(file, content)
        read.clear()
        caplog.clear()
        held = hold_again(house, tmp_path)
        assert len(read) == 3 and texts(house)[2:] == ["gripper 0", "gripper 1"]
        held.close()
        assert len([one for one in caplog.records if "made anew" in one.message]) == 1
        assert snapshot.read(file) is not None


def test_a_start_writes_no_file_that_would_be_the_same(kept: tuple[House, Path], tmp_path: Path) -> None:
    """What is closed or opened to others than before is not said there; what was erased leaves it at once."""
    house, file = kept
    for change, is_written in (
        (lambda: None, False),
        (lambda: house.hades.delete([house.describe("d0", ["x"]).document_id], ALICE), False),
        (lambda: house.hades.vacuum(-1, -1), True),
        (lambda: house.put("late", "gripper late"), True),
        (lambda: None, False),
        (
            lambda: house.hades.documents.annotate(house.describe("late", ["gripper late"], readers=frozenset("x"))),
            True,
        ),
    ):
        change()
        before, content = file.stat().st_ino, file.read_bytes()
        held = hold_again(house, tmp_path)
        held.close()
        assert (file.stat().st_ino != before, file.read_bytes() != content) == (is_written, is_written)


def test_arrays_of_a_file_are_aligned_and_equal(tmp_path: Path) -> None:
    dice = np.random.default_rng(1)
    arrays = {f"{n}": dice.integers(0, 100, n).astype(kind) for n, kind in enumerate("bhilfd" * 4)}
    arrays["two"] = dice.standard_normal((7, 3)).astype(np.float32)
    for length in range(10):
        snapshot.write(tmp_path / "one", snapshot.Snapshot({"name": "x" * length}, arrays))
        found = snapshot.read(tmp_path / "one")
        assert found is not None and found.about == {"name": "x" * length} and list(found.arrays) == list(arrays)
        for name, array in found.arrays.items():
            assert array.flags.aligned and array.dtype == arrays[name].dtype and (array == arrays[name]).all()


def save(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def test_texts_that_are_cut_another_way_are_read_again(
    kept: tuple[House, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of the same name has chunks of a cut with another name: none that was held is one of them."""
    house, _ = kept
    find = house.hades.find_collection
    monkeypatch.setattr(house.hades, "find_collection", lambda *asked: replace(find(*asked), cut="another"))
    read = reads(house, monkeypatch)
    hold_again(house, tmp_path).close()
    assert sorted(read) == ["d0", "d1", "d2"]


def test_terms_made_another_way_are_not_taken_from_a_file(
    kept: tuple[House, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = kept
    monkeypatch.setattr(snapshot, "shadow", lambda text: text.upper())
    assert snapshot.read(file) is None


def test_a_file_of_what_is_not_there_any_more_is_removed(kept: tuple[House, Path], tmp_path: Path) -> None:
    house, file = kept
    save(file.with_name("0123.rows"), b"of a tenant who left")
    with subprocess.Popen([sys.executable, "-c", ""]) as killed:
        save(file.with_suffix(f".{killed.pid}"), b"half of a file")
    written = save(file.with_name(f"4567.{os.getpid()}"), b"half of a file that is being written")
    hold_again(house, tmp_path).close()
    assert set(file.parent.iterdir()) == {file, written}
    assert resident.open_resident(house.hades, 0, tmp_path) is None
    assert not file.exists()


# ── the bound ───────────────────────────────────────────────────────────────────────────────────


def test_what_outgrows_its_room_is_searched_in_the_store_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "AGAIN_SECONDS", 0.0)
    documents, vectors = sqlite.open("sqlite::memory:"), memory.open("memory:")
    house = build_house(documents, vectors)
    house.put("first", "gripper of the first")
    held = hold(house, 30_000)
    found = ["gripper of the first"]
    assert [one.served_by for one in held.standings()] == ["resident"]
    for n in range(80):
        house.put(f"d{n}", f"gripper {n}")
        found.append(f"gripper {n}")
        assert set(texts(house)) <= set(found) and len(texts(house)) == min(50, len(found))
    held.settle()
    (one,) = held.standings()
    assert one.served_by == "store" and one.rows == 81 and "larger" in one.why and one.bytes == 0
    for n in range(80):
        house.hades.delete([house.describe(f"d{n}", ["x"]).document_id], ALICE)
    house.hades.vacuum(-1, -1)
    held.settle()
    assert texts(house) == ["gripper of the first"]
    (one,) = held.standings()
    assert one.served_by == "resident" and one.rows == 1 and 0 < one.bytes <= 30_000
    house.retriever.close()
    documents.close()


def test_what_nobody_searches_makes_room_for_others() -> None:
    documents, now = sqlite.open("sqlite::memory:"), [0.0]
    house = build_house(documents, memory.open("memory:"))
    for who in (ALICE, MALLORY):
        for n in range(40):
            house.put(f"d{n}", f"gripper {n}", who=who)
    held = Resident(house.hades, estimated_bytes(40, house.embedder.dimension) + 1000, clock=lambda: now[0])
    house.retriever.resident = held

    def serve(who: Principal) -> dict[str, str]:
        assert len(texts(house, who=who)) == 40
        held.settle()
        assert len(texts(house, who=who)) == 40
        return {one.tenant: one.served_by for one in held.standings()}

    assert serve(ALICE) == {"acme": "resident", "other": "store"}
    assert serve(MALLORY) == {"acme": "resident", "other": "store"}
    now[0] += resident.IDLE_SECONDS + resident.AGAIN_SECONDS + 1
    assert serve(MALLORY) == {"other": "resident"}
    house.retriever.close()
    documents.close()


# ── any order of moves ──────────────────────────────────────────────────────────────────────────


class PublishingInMemory(Publishing):
    """The model of test_publishing_model.py, with its crashes and restarts; every search is answered in memory."""

    def open_vectors(self) -> VectorStore:
        return Deaf()

    def _reopen(self) -> None:
        self._let_go()
        super()._reopen()
        self.held = Resident(self.house.hades, ROOM, self.home)
        self.house.retriever.resident = self.held

    def _let_go(self) -> None:
        if hasattr(self, "held"):
            self.held.close()

    def teardown(self) -> None:
        self._let_go()
        super().teardown()

    @invariant()
    def every_moment_is_as_it_was(self) -> None:
        if hasattr(self, "house"):
            self.held.foresee()
            if not all(one.served_by == "resident" for one in self.held.standings()):
                self.held.settle()
        super().every_moment_is_as_it_was()

    @invariant()
    def what_was_erased_is_gone(self) -> None:
        if hasattr(self, "house"):
            self.held.settle()
            documents = self.house.hades.documents
            (part,) = self.held._parts.values()
            kept = {(one.document_id, one.version) for one in documents.changed("default", "acme", 0)}
            assert part.rows is not None and part.versions.keys() == kept
            assert part.rows.chunk_ids == {i for key in kept for i in documents.chunk_ids_of(*key)}


TestPublishingInMemory = PublishingInMemory.TestCase
TestPublishingInMemory.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
