"""A second index with another embedder: nothing fails or is missing while it comes, goes live and goes back."""

import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from cluster.bootstrap import free_ports
from deployments.gateway import build
from deployments.reindexing import Reindexing, chunking_of, lines, read_questions
from deployments.shapes import show_progress
from nexus import ingest
from nexus.chunking import ChunkSettings
from nexus.embedders import Embedders
from nexus.errors import Conflict, InvalidRequest, NotFound, Unavailable
from nexus.failpoints import POINTS
from nexus.hades import alias_of, audience_of, chunks_of, document_id_of
from nexus.ingest import Ingestor, Prepared, Source
from nexus.kept import pack
from nexus.ports import LiveIndex, VectorStore
from nexus.reindex import Progress, Recall, _holds
from nexus.resident import AGAIN_SECONDS, FOLDER, Resident
from nexus.retrieval import Retriever
from nexus.stores import memory, milvus_lite
from nexus.types import (
    LAST_ORDINAL,
    Block,
    Document,
    Parsed,
    Piece,
    Principal,
    Receipt,
    SearchRequest,
    Upload,
    Vectors,
    content_digest,
)
from tests import document_stores, reindexing
from tests.conftest import Door
from tests.reindexing import (
    ADDRESS,
    ALICE,
    NOISE,
    ROBOTS,
    TINY,
    WIDE,
    Noise,
    Site,
    Wide,
    Words,
    open_home,
    open_site,
    question_of,
    steps_over,
    text_of,
)
from tests.running import ROOT
from tests.words import WordEmbedder

BOB = replace(ALICE, subject="bob")
DOCUMENTS = 24
_forks = multiprocessing.get_context("forkserver")  # a process that has imported everything, and forks for each run
_forks.set_forkserver_preload(["tests.reindexing"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One vector server for all tests here; each uses a collection of its own."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.ingesting", str(tmp_path_factory.mktemp("vectors")), str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield port
        process.kill()


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with opened(tmp_path, memory.open("memory:"), getattr(request, "param", "disk")) as made:
        yield made


EVERY = [store for store in document_stores.STORES if store != "memory"]
over_every_document_store = pytest.mark.parametrize("site", EVERY, indirect=True)


@contextmanager
def opened(home: Path, vectors: VectorStore, documents: str = "disk") -> Iterator[Site]:
    with document_stores.place(documents, home) as open_documents:
        site = open_site(open_documents(), vectors)
        yield site
        site.retriever.close()
        site.hades.vectors.close()
        site.hades.documents.close()


# ── documents in and questions out ──────────────────────────────────────────────────────────────


def steps_of(site: Site) -> Ingestor:
    return steps_over(site.hades, site.others)


def prepared(site: Site, source: str, *texts: str, collection: str = "default", **fields: object) -> Prepared:
    """A document begun and cut."""
    content = "\n".join(texts).encode()
    document = Document(
        document_id_of(ALICE.tenant, collection, source), content_digest(content), ALICE.tenant, collection, source,
        source, "text/plain", fields.pop("metadata", {}), fields.pop("readers", frozenset()), len(content),  # type: ignore[arg-type]
        len(texts),
    )  # fmt: skip
    epoch = site.hades.begin(document)
    own, _ = site.hades.written(collection)
    chunks = chunks_of(document, [Piece(text, tokens=len(text.split())) for text in texts], own.cut)
    kept = pack(Parsed(source, "text/plain", tuple(Block("text", text) for text in texts)))
    return Prepared(document, ALICE, epoch, tuple(chunks), texts, False, kept, own.chunking, own.cut)


def put(site: Site, source: str, *texts: str, **fields: object) -> Document:
    one, steps = prepared(site, source, *texts, **fields), steps_of(site)
    (outcome,) = steps.commit([one], steps.embed([one]))
    assert isinstance(outcome, Receipt), outcome
    return one.document


def fill(site: Site, count: int = DOCUMENTS, collection: str = "default") -> None:
    made = [prepared(site, f"{number}.txt", text_of(number), collection=collection) for number in range(count)]
    steps = steps_of(site)
    assert all(isinstance(one, Receipt) for one in steps.commit(made, steps.embed(made)))


def first(site: Site, number: int, collection: str = "default", by: Principal = ALICE, **fields: object) -> str:
    """The source of the best hit by the vectors alone."""
    request = SearchRequest(question_of(number), 3, collection, embedding_weight=1.0, text_weight=0.0, **fields)  # type: ignore[arg-type]
    hits = site.retriever.search(request, by).hits
    return hits[0].source if hits else ""


def reindex(site: Site, address: str = WIDE, collection: str = "default") -> None:
    site.reindexer.begin(collection, address, ALICE)
    site.reindexer.work()
    site.reindexer.switch(collection)


def live(site: Site, collection: str = "default") -> str:
    return site.hades.find_collection(collection).fingerprint


def state(site: Site) -> str | None:
    beside = site.reindexer.progress("default").beside
    return beside.state if beside else None


# ── under load ──────────────────────────────────────────────────────────────────────────────────


class Load:
    """Threads that ask, and one that publishes and deletes, from beginning to end; what fails is kept."""

    def __init__(self, site: Site, collection: str) -> None:
        self.site, self.collection = site, collection
        self.asked, self.published, self.failed = 0, 0, list[str]()
        self._over, self._changed = threading.Event(), threading.Condition()
        asking = [threading.Thread(target=self._repeat, args=(self._ask, place)) for place in range(3)]
        self._threads = [*asking, threading.Thread(target=self._repeat, args=(self._publish, 0))]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, step: Callable[[int], None], turn: int) -> None:
        while not self._over.is_set():
            try:
                step(turn)
            except Exception as error:  # whatever it is: here it is counted
                self.failed.append(repr(error))
                with self._changed:
                    self._changed.notify()
            turn += 1

    def _ask(self, turn: int) -> None:
        number = turn % DOCUMENTS
        found = first(self.site, number, self.collection)
        if found != f"{number}.txt":
            self.failed.append(f"{question_of(number)!r} found {found!r}")
        with self._changed:
            self.asked += 1
            self._changed.notify()

    def _publish(self, turn: int) -> None:
        """A document that comes, is replaced, goes again every other time; what is over is vacuumed now and then."""
        source = f"late {turn % 10}.txt"
        for version in range(2):
            text = f"Calibration log {turn}, revision {version}: nothing of note."
            self._patiently(partial(put, self.site, source, text, collection=self.collection))
        if turn % 2:
            self.site.hades.delete([document_id_of(ALICE.tenant, self.collection, source)], ALICE)
        if turn % 10 == 0:
            self._patiently(lambda: self.site.hades.vacuum(keep_closed_seconds=1, keep_staged_seconds=60))
        with self._changed:
            self.published += 1
            self._changed.notify()

    def _patiently(self, step: Callable[[], object]) -> None:
        while not self._over.is_set():
            try:
                step()
                return
            except Unavailable:  # as the conveyor takes it: try again
                continue

    def wait_for(self, more: int) -> None:
        """Until so many more questions were answered, and a document was published."""
        with self._changed:
            asked, published = self.asked + more, self.published + 1
            self._changed.wait_for(lambda: self.failed or (self.asked >= asked and self.published >= published))


@pytest.mark.parametrize(
    ("store", "to", "chunking"), [("memory", WIDE, None), ("milvus-lite", WIDE, None), ("memory", ADDRESS, TINY)]
)
def test_a_reindex_under_load_to_another_dimension_or_cut_fails_nobody(
    store: str, to: str, chunking: ChunkSettings | None, server: int, tmp_path: Path
) -> None:
    address = "memory:" if store == "memory" else f"milvus-lite://127.0.0.1:{server}"
    with opened(tmp_path, (memory if store == "memory" else milvus_lite).open(address)) as site:
        name, reindexer = f"load-{store}", site.reindexer
        fill(site, collection=name)
        with Load(site, name) as load:
            load.wait_for(10)
            kept = [(question_of(number), [f"{number}.txt"]) for number in range(5)]
            reindexer.begin(name, to, ALICE, kept, chunking)
            load.wait_for(10)
            reindexer.work()
            beside = reindexer.progress(name).beside
            assert beside is not None and beside.state == "ready", beside
            load.wait_for(10)
            reindexer.switch(name)
            assert site.hades.find_collection(name).index == beside.live.index
            assert site.hades.find_collection(name).dimension == (Wide if to == WIDE else Words).dimension
            load.wait_for(30)
            reindexer.rollback(name)
            assert site.hades.find_collection(name).dimension == WordEmbedder.dimension
            load.wait_for(30)
            reindexer.switch(name)
            load.wait_for(10)
            former = site.hades.written(name)[0].index
        assert load.failed == []
        assert site.hades.fsck() == []
        reindexer.drop(name)
        reindexer.tidy(name)
        assert former not in site.hades.vectors.indexes()
        assert site.hades.fsck() == []
        assert [first(site, number, name) for number in range(DOCUMENTS)] == [f"{n}.txt" for n in range(DOCUMENTS)]


@over_every_document_store
def test_what_is_published_after_the_switch_is_there_after_the_rollback_and_the_reverse(site: Site) -> None:
    fill(site)
    reindex(site)
    put(site, "after.txt", text_of(500))
    assert first(site, 500) == "after.txt"
    site.reindexer.rollback("default")
    assert (live(site), first(site, 500)) == (WordEmbedder.fingerprint, "after.txt")
    put(site, "later.txt", text_of(501))
    site.reindexer.switch("default")
    assert (live(site), first(site, 501)) == (Wide.fingerprint, "later.txt")
    assert site.hades.fsck() == []


@over_every_document_store
def test_a_moment_before_the_switch_can_still_be_asked_for(site: Site) -> None:
    fill(site, 5)
    before = put(site, "0.txt", text_of(900))
    sequence = site.hades.find_collection("default", ALICE.tenant).sequence
    put(site, "0.txt", text_of(901))
    reindex(site)
    assert first(site, 900, as_of=sequence) == before.source
    request = SearchRequest(question_of(900), 10, as_of=sequence, embedding_weight=1.0, text_weight=0.0)
    texts = [hit.text for hit in site.retriever.search(request, ALICE).hits]
    assert text_of(900) in texts and text_of(901) not in texts


@over_every_document_store
def test_from_the_first_index_to_the_second_back_and_to_the_second_alone(site: Site) -> None:
    """Built, compared, switched to, rolled back, switched to again; then the first one is dropped."""
    fill(site, 30)
    reindexer, first_index = site.reindexer, site.hades.find_collection("default").index
    reindexer.begin("default", WIDE, ALICE)
    building = reindexer.progress("default")
    assert (state(site), building.done, building.total) == ("building", 0, 30)
    reindexer.work()
    ready = reindexer.progress("default")
    assert ready.beside is not None and (ready.beside.state, ready.done, ready.total) == ("ready", 30, 30)
    assert ready.beside.figures["live"] == ready.beside.figures["beside"]
    for step, embedder in ((reindexer.switch, Wide), (reindexer.rollback, Words), (reindexer.switch, Wide)):
        step("default")
        collection = site.hades.find_collection("default")
        assert (collection.fingerprint, collection.dimension) == (embedder.fingerprint, embedder.dimension)
        assert [first(site, number) for number in range(5)] == [f"{number}.txt" for number in range(5)]
        put(site, "more.txt", text_of(300 + site.hades.find_collection("default", ALICE.tenant).sequence))
        assert site.hades.fsck() == []
    reindexer.drop("default")
    recorded = site.hades.documents.collection("default")
    assert recorded is not None and recorded.index == site.hades.find_collection("default").index != first_index
    assert (recorded.fingerprint, recorded.identity) == (Wide.fingerprint, Words.fingerprint)
    assert (recorded.embedder, recorded.dimension) == (WIDE, Wide.dimension)
    assert site.hades.generations("default") == [] and first_index not in site.hades.vectors.indexes()
    assert site.hades.fsck() == [] and first(site, 7) == "7.txt"


def test_a_search_ends_with_the_index_it_began_with(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is embedded for one index; it is never held against the vectors of the other."""
    fill(site)
    site.reindexer.begin("default", WIDE, ALICE)
    site.reindexer.work()
    embed = Words.embed

    def switch_first(self: WordEmbedder, texts: Sequence[str], input_type: str = "passage") -> Vectors:
        if input_type == "query" and live(site) == WordEmbedder.fingerprint:
            site.reindexer.switch("default")
        return embed(self, texts)

    monkeypatch.setattr(Words, "embed", switch_first)
    request = SearchRequest(question_of(7), 3, embedding_weight=0.5, text_weight=0.5, graph="on")
    result = site.retriever.search(request, ALICE)
    assert live(site) == Wide.fingerprint
    assert result.hits[0].source == "7.txt" and result.hits[0].cosine > 0.5


def test_what_is_held_in_memory_follows_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next search is of the new index; once that is in memory, it is searched there, and the former one leaves."""
    now = [0.0]
    with opened(tmp_path, memory.open("memory:")) as site:
        fill(site)
        former = site.hades.find_collection("default").index
        held = site.retriever.resident = Resident(site.hades, 2**26, tmp_path, clock=lambda: now[0])
        held.foresee()
        held.settle()
        assert [first(site, number) for number in range(5)] == [f"{number}.txt" for number in range(5)]
        reindex(site)
        new = site.hades.find_collection("default").index
        assert [first(site, number) for number in range(5)] == [f"{number}.txt" for number in range(5)]
        held.settle()
        put(site, "after.txt", text_of(500))
        with monkeypatch.context() as patch:
            patch.delattr(memory.MemoryVectors, "search_dense")
            assert [first(site, number) for number in (3, 500)] == ["3.txt", "after.txt"]
        assert [(one.index, one.served_by) for one in held.standings()] == sorted(
            [(former, "resident"), (new, "resident")]
        )
        now[0] += AGAIN_SECONDS + 1  # no search can be in the former one any more
        held.settle()
        ((rows,), files) = [part.rows for part in held._parts.values()], list((tmp_path / FOLDER).iterdir())
        assert rows is not None and (rows.index, rows.dimension, len(files)) == (new, Wide.dimension, 1)
        held.close()


@over_every_document_store
def test_what_words_or_the_graph_found_is_weighed_by_the_live_vectors(site: Site) -> None:
    """Few are candidates by the vectors: the others get their cosines from what is kept for the index that is live."""
    fill(site, 30)
    for number in (50, 51):
        put(site, f"{number}.txt", text_of(number), metadata={"robot_id": "HX-3"})
    site.retriever.settings = replace(site.retriever.settings, candidates=2)
    for embedder in (Words(), Wide()):
        assert live(site) == embedder.fingerprint
        seen = set[str]()
        for query in (*ROBOTS, text_of(50)):
            asked = embedder.embed([query], "query")[0]
            for hit in site.retriever.search(SearchRequest(query, 10, graph="on"), ALICE).hits:
                (vector,) = site.hades.documents.vectors([hit.chunk_id]).values()
                assert hit.cosine == pytest.approx(float(vector @ asked), abs=1e-5)
                seen |= set(hit.routes)
        assert seen == {"dense", "text", "graph"}
        if live(site) == Words.fingerprint:
            reindex(site)


# ── who publishes while an index begins or goes ─────────────────────────────────────────────────


@over_every_document_store
def test_nobody_publishes_what_a_new_index_lacks(site: Site) -> None:
    """Embedded and staged before the index was begun: it is refused, and done again it is whole."""
    fill(site, 3)
    steps, one = steps_of(site), prepared(site, "between.txt", text_of(600))
    staged = steps.embed([one])
    site.hades.stage(staged)
    site.reindexer.begin("default", WIDE, ALICE)
    with pytest.raises(Unavailable) as refused:
        site.hades.publish([(one.document, one.epoch)])
    assert refused.value.code == "generation_lacks"
    (outcome,) = steps.commit([one], staged)
    assert isinstance(outcome, Receipt)
    site.reindexer.work()
    site.reindexer.switch("default")
    assert first(site, 600) == "between.txt"


@over_every_document_store
def test_what_was_staged_for_an_index_that_went_is_staged_again(site: Site) -> None:
    fill(site, 3)
    steps, one = steps_of(site), prepared(site, "between.txt", text_of(601))
    staged = steps.embed([one])
    site.hades.stage(staged)
    reindex(site)
    site.reindexer.drop("default")
    with pytest.raises(Unavailable, match="exchanged"):
        site.hades.publish([(one.document, one.epoch)])
    with pytest.raises(Unavailable, match="exchanged"):
        site.hades.stage(staged)
    assert first(site, 0) == "0.txt"  # with rows of it in the index that have no vector
    (outcome,) = steps.commit([one], staged)
    assert isinstance(outcome, Receipt)
    assert first(site, 601) == "between.txt" and site.hades.fsck() == []


def test_what_is_unchanged_stays_so_whichever_index_is_live(site: Site) -> None:
    steps = steps_of(site)
    try:
        upload = Upload("a.md", b"# Torque\n\nThe gripper closes with a torque of 4 Nm.")
        receipt = steps.ingest(upload, ALICE)
        for number in range(30):
            put(site, f"{number}.txt", text_of(number))
        reindex(site)
        source = Source("a.md", content_digest(upload.content), len(upload.content))
        for _ in range(2):
            again = steps.find_unchanged(source, ALICE)
            assert again is not None and again.version == receipt.version
            if state(site):
                site.reindexer.drop("default")
    finally:
        steps.parsers.close()


@over_every_document_store
def test_vacuum_removes_from_both_indexes(site: Site) -> None:
    fill(site, 3)
    site.reindexer.begin("default", WIDE, ALICE)
    site.reindexer.work()
    gone = put(site, "0.txt", text_of(700))
    site.hades.delete([gone.document_id], ALICE)
    site.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
    own, (beside,) = site.hades.written("default")
    left = {c for number in (1, 2) for c in chunk_ids(site, f"{number}.txt")}
    found = [site.hades.vectors.chunk_ids(live.index) for live in (own, beside)]
    assert found[0] | found[1] == left and len(found[0]) == len(found[1]) == 2
    assert site.hades.fsck() == []


@over_every_document_store
def test_a_version_that_is_vacuumed_while_it_is_brought_in_leaves_nothing(site: Site) -> None:
    fill(site, 3)
    embed = site.reindexer.embed_for

    def vacuum_first(index: object, texts: Sequence[str]) -> Vectors:
        if site.hades.documents.current(document_id_of(ALICE.tenant, "default", "0.txt"), ALICE):
            site.hades.delete([document_id_of(ALICE.tenant, "default", "0.txt")], ALICE)
            site.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
        return embed(index, texts)  # type: ignore[arg-type]

    site.reindexer.embed_for = vacuum_first
    site.reindexer.begin("default", WIDE, ALICE)
    site.reindexer.work()
    _, (beside,) = site.hades.written("default")
    assert len(site.hades.vectors.chunk_ids(beside.index)) == 2
    assert site.hades.fsck() == []


@over_every_document_store
def test_readers_that_change_while_a_document_is_brought_in_are_those_of_the_new_index(site: Site) -> None:
    document = put(site, "0.txt", text_of(0))
    put(site, "1.txt", text_of(1))
    upsert, changed = site.hades.vectors.upsert, replace(document, readers=frozenset({"alice"}))

    def narrow_first(index: str, rows: Sequence[object]) -> None:
        if index != site.hades.written("default")[0].index and not changing:
            changing.append(index)
            site.hades.is_unchanged(changed, ALICE)  # between reading the version and writing its rows
        upsert(index, rows)  # type: ignore[arg-type]

    changing: list[str] = []
    site.hades.vectors.upsert = narrow_first  # type: ignore[method-assign]
    site.reindexer.begin("default", WIDE, ALICE)
    site.reindexer.work()
    site.reindexer.switch("default", anyway=True)
    scope = site.hades.scope("default", ALICE)
    assert audience_of("acme", changed.readers) in scope.audiences
    index = site.hades.find_collection("default").index
    for_all = replace(scope, audiences=())
    found = site.hades.vectors.search_dense(index, Wide().embed([question_of(0)])[0], 10, for_all)
    assert [chunk_id in chunk_ids(site, "1.txt") for chunk_id, _ in found] == [True]
    assert first(site, 0) == "0.txt" and first(site, 0, by=BOB) == "1.txt"


def chunk_ids(site: Site, source: str, collection: str = "default") -> list[str]:
    document = site.hades.documents.current(document_id_of(ALICE.tenant, collection, source), ALICE)
    assert document is not None
    return site.hades.documents.chunk_ids_of(document.document_id, document.version)


# ── cut anew ────────────────────────────────────────────────────────────────────────────────────

SHORT = ChunkSettings(16, 18, 0)


def long_text(number: int) -> str:
    """Four sentences that no other has, a paragraph each: one piece as configured, four if they are short."""
    return "\n\n".join(text_of(number + 1000 * part) for part in range(4))


def put_long(site: Site, count: int, collection: str = "default") -> None:
    for number in range(count):
        put(site, f"{number}.txt", long_text(number), collection=collection)


def pieces_of(site: Site, source: str) -> list[str]:
    """As they are cut in the live index."""
    document = site.hades.documents.current(document_id_of(ALICE.tenant, "default", source), ALICE)
    assert document is not None
    cut = site.hades.find_collection("default").cut
    load = site.hades.documents.neighbours
    return [chunk.piece.text for chunk in load(document.document_id, document.version, 0, LAST_ORDINAL, cut)]


def cut_anew(site: Site, settings: ChunkSettings = SHORT, address: str | None = None) -> None:
    site.reindexer.begin("default", address, ALICE, [(question_of(1), ["1.txt"])], settings)
    site.reindexer.work()
    site.reindexer.switch("default")


@over_every_document_store
@pytest.mark.parametrize("address", [None, WIDE])
def test_documents_are_cut_anew_by_the_same_embedder_or_another(site: Site, address: str | None) -> None:
    put_long(site, 5)
    before = pieces_of(site, "3.txt")
    cut_anew(site, address=address)
    after = pieces_of(site, "3.txt")
    assert before == [long_text(3)] and len(after) == 4 and "\n\n".join(after) == long_text(3)
    assert live(site) == (Words if address is None else Wide).fingerprint
    assert site.hades.find_collection("default").chunking == SHORT.write()
    assert site.hades.fsck() == [] and site.reindexer.progress("default").unkept == ()
    hits = site.retriever.search(SearchRequest(question_of(3), 3), ALICE).hits
    assert hits[0].text == text_of(3)
    (passage,) = site.retriever.expand(hits[:1], 1000)
    assert passage.text == f"{text_of(3)}\n\n{text_of(1003)}"  # its neighbours are of the same cut
    put(site, "late.txt", long_text(77))
    assert len(pieces_of(site, "late.txt")) == 4
    site.reindexer.rollback("default")
    assert pieces_of(site, "late.txt") == [long_text(77)] and pieces_of(site, "3.txt") == before
    assert site.retriever.search(SearchRequest(question_of(3), 3), ALICE).hits[0].text == long_text(3)
    site.reindexer.switch("default")
    site.reindexer.drop("default")
    assert site.hades.generations("default") == [] and site.hades.fsck() == []
    put(site, "later.txt", text_of(88))
    assert len(pieces_of(site, "late.txt")) == 4 and first(site, 88) == "later.txt"
    current = site.hades.documents.current(document_id_of(ALICE.tenant, "default", "3.txt"), ALICE)
    assert current is not None and current.chunks == 4 and len(chunk_ids(site, "3.txt")) == 4
    with pytest.raises(Conflict, match="cut so") as same:
        site.reindexer.begin("default", None, ALICE, (), SHORT)
    assert same.value.code == "same_embedder"


def test_what_is_ingested_follows_the_cut_of_its_collection(site: Site) -> None:
    """While both are there it is cut both ways; afterwards as the collection is, whatever the settings say."""
    steps = steps_of(site)
    put_long(site, 3)
    site.reindexer.begin("default", None, ALICE, [(question_of(1), ["1.txt"])], SHORT)
    try:
        for number, is_dropped in ((50, False), (51, True)):
            upload = Upload(f"{number}.txt", long_text(number).encode())
            assert steps.ingest(upload, ALICE).outcome == "done"
            assert steps.ingest(upload, ALICE).outcome == "unchanged"
            if not is_dropped:
                site.reindexer.work()
                site.reindexer.switch("default")
                site.reindexer.drop("default")
            assert len(pieces_of(site, f"{number}.txt")) == 4
        assert site.hades.fsck() == []
    finally:
        steps.parsers.close()


@over_every_document_store
def test_a_moment_before_a_new_cut_can_still_be_asked_for_and_the_graph_is_walked_in_it(site: Site) -> None:
    put_long(site, 3)
    sequence = site.hades.find_collection("default", ALICE.tenant).sequence
    put(site, "0.txt", long_text(900))
    for number in (50, 51):
        put(site, f"{number}.txt", long_text(number), metadata={"robot_id": "HX-3"})
    cut_anew(site)
    texts = [hit.text for hit in site.retriever.search(SearchRequest(question_of(0), 9, as_of=sequence), ALICE).hits]
    assert texts[0] == text_of(0) and text_of(900) not in texts
    site.retriever.settings = replace(site.retriever.settings, candidates=1)
    hits = site.retriever.search(SearchRequest(text_of(50), 50, graph="on"), ALICE).hits
    assert {text_of(51 + 1000 * part) for part in range(4)} <= {hit.text for hit in hits}
    assert {hit.cut for hit in hits} == {site.hades.find_collection("default").cut}


@over_every_document_store
def test_what_was_not_kept_stays_as_it_is_cut_until_it_is_added_again(site: Site) -> None:
    steps = steps_of(site)
    try:
        for number in range(3):
            steps.ingest(Upload(f"{number}.txt", long_text(number).encode()), ALICE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ingest, "pack", lambda parsed: b"")
            uploads = [Upload(f"{number}.txt", long_text(number).encode()) for number in (10, 11)]
            for upload in uploads:
                steps.ingest(upload, ALICE)
        cut_anew(site)
        assert {one.source for one in site.reindexer.progress("default").unkept} == {"10.txt", "11.txt"}
        assert len(pieces_of(site, "0.txt")) == 4 and pieces_of(site, "10.txt") == [long_text(10)]
        assert site.retriever.search(SearchRequest("torque10 number10"), ALICE).hits[0].source == "10.txt"
        assert site.hades.fsck() == []
        assert steps.ingest(uploads[0], ALICE).outcome == "done"
        assert steps.ingest(uploads[0], ALICE).outcome == "unchanged"
        assert len(pieces_of(site, "10.txt")) == 4
        assert [one.source for one in site.reindexer.progress("default").unkept] == ["11.txt"]
        assert site.hades.fsck() == []
    finally:
        steps.parsers.close()


def test_a_document_published_anew_while_it_is_brought_in_stays_as_it_was_published(site: Site) -> None:
    """Of one that was not kept, who fills knows the old pieces only; who adds it again cuts it."""
    steps = steps_of(site)
    upload = Upload("0.txt", long_text(0).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "pack", lambda parsed: b"")
        steps.ingest(upload, ALICE)
    embed, added = site.reindexer.embed_for, list[str]()

    def add_first(index: LiveIndex, texts: Sequence[str]) -> Vectors:
        if not added:
            added.append(steps.ingest(upload, ALICE).outcome)
        return embed(index, texts)

    site.reindexer.embed_for = add_first
    try:
        site.reindexer.begin("default", None, ALICE, [(question_of(0), ["0.txt"])], SHORT)
        site.reindexer.work()
        site.reindexer.switch("default")
        assert added == ["done"] and len(pieces_of(site, "0.txt")) == 4 and site.hades.fsck() == []
    finally:
        steps.parsers.close()


def test_a_cut_that_finds_less_is_refused_with_the_figures(site: Site) -> None:
    """Each document in pieces of which none says what it is about; what is asked was said together."""
    for number in range(40):
        put(site, f"{number}.txt", text_of(number))
    embed = Words.embed

    def blind(self: WordEmbedder, texts: Sequence[str], input_type: str = "passage") -> Vectors:
        return embed(self, ["wheels" if "torque" not in text else text for text in texts])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Words, "embed", blind)
        patch.setattr(site.reindexer, "cut_for", lambda live, parsed: [Piece("It moves."), Piece("The joint.")])
        site.reindexer.begin("default", None, ALICE, [(question_of(n), [f"{n}.txt"]) for n in range(9)], SHORT)
        site.reindexer.work()
    with pytest.raises(Conflict, match="recall@2 on 9 questions kept: by vectors 1") as refused:
        site.reindexer.switch("default")
    assert refused.value.code == "recall_worse" and first(site, 3) == "3.txt"


def test_made_up_questions_find_their_passage_in_any_cut(site: Site) -> None:
    put_long(site, 30)
    site.reindexer.begin("default", None, ALICE, (), SHORT)
    site.reindexer.work()
    beside = site.reindexer.progress("default").beside
    assert beside is not None and beside.state == "ready", beside
    assert (beside.figures["sampled"], beside.figures["beside"]) == (True, {"dense": 1.0, "fused": 1.0})


@pytest.mark.parametrize(
    ("sentence", "text", "holds"),
    [
        ("the arm is set to four", "before\nthe arm\nis set", True),
        ("the arm is set to four", "set to four. After", True),
        ("the arm is set to four", "the arm was set to four", True),
        ("the arm is set to four", "the arm. is set. to four", False),
        ("arm", "no", False),
    ],
)
def test_a_passage_holds_a_sentence_of_which_it_has_half(sentence: str, text: str, holds: bool) -> None:
    assert _holds(text, sentence) == holds


def test_chunks_longer_than_the_embedder_reads_are_refused(site: Site) -> None:
    fill(site, 3)
    with pytest.raises(InvalidRequest, match="reads 254 tokens") as refused:
        site.reindexer.begin("default", None, ALICE, (), ChunkSettings(200, 255))
    assert refused.value.pointer == "/chunking/max_tokens" and state(site) is None


# ── comparing ───────────────────────────────────────────────────────────────────────────────────


def test_an_embedder_that_says_nothing_is_refused_with_the_figures(site: Site) -> None:
    fill(site, 60)
    site.reindexer.begin("default", NOISE, ALICE)
    site.reindexer.work()
    beside = site.reindexer.progress("default").beside
    assert beside is not None and beside.state == "refused"
    assert (beside.figures["questions"], beside.figures["sampled"], beside.figures["k"]) == (60, True, 3)
    before, after = beside.figures["live"], beside.figures["beside"]
    assert before["dense"] > 0.95 and after["dense"] < 0.2  # type: ignore[index]
    with pytest.raises(Conflict, match=r"recall@3 on 60 questions .* by vectors [01]\.\d+ .* 0\.\d+") as refused:
        site.reindexer.switch("default")
    assert refused.value.code == "recall_worse" and live(site) == WordEmbedder.fingerprint
    site.reindexer.switch("default", anyway=True)
    assert live(site) == Noise.fingerprint
    site.reindexer.rollback("default")
    assert first(site, 3) == "3.txt"


def test_kept_questions_decide_and_one_that_is_lost_is_too_many(site: Site) -> None:
    fill(site, 60)
    questions = [(question_of(number), [f"{number}.txt"]) for number in range(10)]
    with pytest.raises(InvalidRequest) as unknown:
        site.reindexer.begin("default", WIDE, ALICE, [*questions, ("?", ["nowhere.txt"])])
    assert unknown.value.pointer == "/questions/10/documents" and state(site) is None
    site.reindexer.begin("default", WIDE, ALICE, questions)
    site.reindexer.work()
    beside = site.reindexer.progress("default").beside
    assert beside is not None and (beside.state, beside.figures["sampled"]) == ("ready", False)
    assert beside.figures["live"] == beside.figures["beside"] == {"dense": 1.0, "fused": 1.0}

    site.reindexer.drop("default")
    embed, blind = Wide.embed, question_of(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wide, "embed", lambda self, texts, kind="passage": embed(self, _spoiled(texts, kind, blind)))
        site.reindexer.begin("default", WIDE, ALICE, questions)
        site.reindexer.work()
    beside = site.reindexer.progress("default").beside
    assert beside is not None and beside.state == "refused"
    assert beside.figures["beside"]["dense"] == 0.9  # type: ignore[index]


def _spoiled(texts: Sequence[str], kind: str, blind: str) -> Sequence[str]:
    """One question that the embedder takes for another."""
    return ["wheels" if kind == "query" and text == blind else text for text in texts]


def test_the_comparison_is_of_both_with_their_own_embedders(site: Site) -> None:
    fill(site, 60)
    site.reindexer.begin("default", WIDE, ALICE)
    site.reindexer.work()
    generation = site.reindexer.progress("default").beside
    assert generation is not None
    compared = site.reindexer.compare("default", generation)
    assert compared is not None and compared.live == compared.beside == Recall(1.0, 1.0)


def test_readers_and_tenants_do_not_hide_what_is_asked_for(site: Site) -> None:
    """Made-up questions are asked for whoever may read the document, whoever began the reindex."""
    for number in range(30):
        put(site, f"{number}.txt", text_of(number), readers=frozenset({"carol"}))
    stranger = Principal("other", "mallory")
    site.reindexer.begin("default", NOISE, stranger)
    site.reindexer.work()
    assert state(site) == "refused"


# ── what is in the way ──────────────────────────────────────────────────────────────────────────


def test_each_step_says_what_is_in_its_way(site: Site) -> None:
    reindexer = site.reindexer
    with pytest.raises(NotFound):
        reindexer.begin("default", WIDE, ALICE)
    fill(site, 30)
    for step in (reindexer.switch, reindexer.rollback, reindexer.drop):
        with pytest.raises(Conflict):
            step("default")
    with pytest.raises(Conflict, match="already"):
        reindexer.begin("default", ADDRESS, ALICE)
    with pytest.raises(InvalidRequest, match="names no embedder") as wrong:
        reindexer.begin("default", "nonsense:", ALICE)
    assert wrong.value.pointer == "/embedder"
    reindexer.begin("default", WIDE, ALICE)
    assert reindexer.begin("default", WIDE, ALICE).state == "building"
    with pytest.raises(Conflict, match="0 of 30"):
        reindexer.switch("default")
    with pytest.raises(Conflict, match="being built"):
        reindexer.begin("default", NOISE, ALICE)
    reindexer.work()
    reindexer.begin("default", NOISE, ALICE)  # takes the place of one that was not switched to
    beside = reindexer.progress("default").beside
    assert beside is not None and beside.live.fingerprint == Noise.fingerprint
    reindexer.drop("default")
    reindex(site)
    with pytest.raises(Conflict, match="--rollback"):
        reindexer.begin("default", ADDRESS, ALICE)


def test_the_next_reindex_ends_the_way_back(site: Site) -> None:
    fill(site, 30)
    reindex(site)
    site.reindexer.begin("default", NOISE, ALICE)
    own, (beside,) = site.hades.written("default")
    assert (own.fingerprint, beside.fingerprint) == (Wide.fingerprint, Noise.fingerprint)
    site.reindexer.drop("default")
    reindex(site, ADDRESS)  # and the first one may come again
    assert live(site) == WordEmbedder.fingerprint and first(site, 3) == "3.txt"


def test_what_was_dropped_stays_until_no_search_can_be_in_it(site: Site) -> None:
    fill(site, 30)
    reindex(site)
    site.reindexer.grace_seconds = 1e9
    former = site.hades.written("default")[0].index
    site.reindexer.drop("default")
    assert state(site) == "staying" and former in site.hades.vectors.indexes()
    with pytest.raises(Conflict, match="being removed"):
        site.reindexer.rollback("default")
    site.reindexer.grace_seconds = 0.0
    site.reindexer.work()
    assert state(site) is None and former not in site.hades.vectors.indexes()


def test_an_embedder_that_fails_is_told_and_costs_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(site, 5)
    site.reindexer.begin("default", WIDE, ALICE)
    monkeypatch.setattr(site.reindexer, "embed_for", lambda live, texts: np.zeros((len(texts), 3), np.float32))
    site.reindexer.work()
    beside = site.reindexer.progress("default").beside
    assert beside is not None and beside.state == "refused"
    assert "(5, 96) was asked for" in str(beside.figures["sentence"])
    assert first(site, 3) == "3.txt"


def test_an_embedder_that_breaks_in_this_process_is_told_and_ends_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(embedder: Wide, texts: Sequence[str], input_type: str = "passage") -> Vectors:
        raise RuntimeError("CUDA out of memory")

    fill(site, 5)
    site.reindexer.begin("default", WIDE, ALICE)
    monkeypatch.setattr(Wide, "embed", broken)
    monkeypatch.setattr(site.reindexer, "embed_for", steps_of(site).embed_for)
    site.reindexer.work()
    beside = site.reindexer.progress("default").beside
    assert beside is not None and beside.state == "refused" and "RuntimeError" in str(beside.figures["sentence"])


def test_a_store_that_keeps_one_vector_says_so(site: Site) -> None:
    fill(site, 1)
    site.hades.keeper = None
    with pytest.raises(Conflict, match="sqlite") as refused:
        site.reindexer.begin("default", WIDE, ALICE)
    assert refused.value.code == "no_generations"


def test_an_embedder_that_became_another_is_not_used(site: Site) -> None:
    """The address leads to other weights now: its vectors mean nothing in this index."""
    fill(site, 30)
    reindex(site)
    others = Embedders(lambda address, fingerprint: Noise())
    retriever = Retriever(site.hades, Words(), site.retriever.settings, None, others)
    with pytest.raises(Conflict) as refused:
        retriever.search(SearchRequest("gripper"), ALICE)
    assert refused.value.code == "embedder_changed"
    retriever.close()


@over_every_document_store
def test_fsck_looks_at_the_second_index_too(site: Site) -> None:
    fill(site, 30)
    site.reindexer.begin("default", WIDE, ALICE)
    assert site.hades.fsck() == []  # one that is being built may lack anything
    site.reindexer.work()
    _, (beside,) = site.hades.written("default")
    lost = sorted(site.hades.vectors.chunk_ids(beside.index))[:2]
    site.hades.vectors.delete(beside.index, lost)
    (fault,) = site.hades.fsck()
    assert fault.ids == tuple(lost)
    assert site.hades.repair([fault]) == [] and site.hades.fsck() == []


def test_rows_that_a_crash_left_of_a_version_that_is_gone_do_not_outlive_the_build(site: Site) -> None:
    fill(site, 3)
    site.reindexer.begin("default", WIDE, ALICE)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(site.hades.keeper, "fill", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        site.reindexer.work()
    _, (beside,) = site.hades.written("default")
    left = site.hades.vectors.chunk_ids(beside.index)
    assert len(left) == 1 and site.hades.fsck() == []
    site.hades.delete([document_id_of(ALICE.tenant, "default", f"{n}.txt") for n in range(3)], ALICE)
    site.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
    for number in (50, 51):
        put(site, f"{number}.txt", text_of(number))
    site.reindexer.work()
    assert state(site) == "ready" and site.hades.fsck() == []
    assert len(site.hades.vectors.chunk_ids(beside.index)) == 2


@over_every_document_store
def test_both_indexes_are_made_again_without_a_model(site: Site) -> None:
    """As after a restore: the documents are there with all of their vectors, and the vector store is empty."""
    fill(site, 30)
    reindex(site)
    again = open_site(site.hades.documents, memory.open("memory:"), site.hades.coordinator)  # type: ignore[arg-type]
    faults = again.hades.fsck()
    assert again.hades.repair(faults) == [] and again.hades.fsck() == []
    assert (live(again), first(again, 7)) == (Wide.fingerprint, "7.txt")
    again.reindexer.rollback("default")
    assert (live(again), first(again, 7)) == (WordEmbedder.fingerprint, "7.txt")
    again.retriever.close()


def test_the_alias_follows(site: Site) -> None:
    fill(site, 30)
    reindex(site)
    alias = alias_of("default")
    assert site.hades.vectors.aliased(alias) == site.hades.find_collection("default").index
    site.reindexer.rollback("default")
    assert site.hades.vectors.aliased(alias) == site.hades.find_collection("default").index


# ── over HTTP ───────────────────────────────────────────────────────────────────────────────────


class Local:
    """The ingestor's and the retriever's methods for this, over a site in this process."""

    def __init__(self, site: Site) -> None:
        self.reindexer, self.prepared = site.reindexer, list[str]()

    async def begin_reindex(
        self, collection: str, embedder: str | None, by: Principal, questions: Sequence[tuple[str, Sequence[str]]],
        chunking: ChunkSettings | None = None,
    ) -> Progress:  # fmt: skip
        self.reindexer.begin(collection, embedder or (WIDE if chunking is None else None), by, questions, chunking)
        return self.reindexer.progress(collection)

    async def reindex_progress(self, collection: str) -> Progress:
        return self.reindexer.progress(collection)

    async def switch_index(self, collection: str, anyway: bool) -> Progress:
        return self.reindexer.switch(collection, anyway)

    async def roll_index_back(self, collection: str) -> Progress:
        return self.reindexer.rollback(collection)

    async def drop_index(self, collection: str) -> Progress:
        return self.reindexer.drop(collection)

    async def prepare(self, live: LiveIndex) -> None:
        self.prepared.append(live.fingerprint)


def test_the_front_door_begins_shows_switches_goes_back_and_drops(site: Site, door: Door) -> None:
    fill(site, 60)
    local = Local(site)
    lent = replace(door.lent, reindexing=Reindexing(local, local), documents=site.hades.documents)
    admin = door.headers("acme", "alice")
    with TestClient(build(lent), headers=admin) as client:
        assert client.get("/rag/reindex?collection=none").status_code == 404
        assert client.put("/rag/reindex", json={"live": "new"}).status_code == 409
        wrong = client.post("/rag/reindex", json={"embedder": "nonsense:"})
        assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/embedder")
        for fault, pointer in NONSENSE:
            told = client.post("/rag/reindex", json=fault)
            assert told.status_code in (400, 422) and told.json()["errors"][0]["pointer"] == pointer
        kept = [{"query": question_of(number), "documents": [f"{number}.txt"]} for number in range(5)]

        begun = client.post("/rag/reindex", json={"embedder": NOISE, "questions": kept})
        assert begun.status_code == 202
        assert (begun.json()["state"], begun.json()["done"], begun.json()["total"]) == ("building", 0, 60)
        site.reindexer.work()
        refused = client.put("/rag/reindex", json={"live": "new"})
        assert (refused.status_code, refused.json()["code"]) == (409, "recall_worse")
        assert "recall@3 on 5 questions kept" in refused.json()["detail"]
        assert client.get("/rag/reindex").json()["figures"]["live"]["dense"] == 1.0

        assert client.post("/rag/reindex", json={"questions": kept}).status_code == 202
        site.reindexer.work()
        switched = client.put("/rag/reindex", json={"live": "new"}).json()
        assert (switched["is_switched"], switched["live"]["dimension"], switched["former"]["dimension"]) == (
            True,
            96,
            64,
        )
        assert local.prepared[-1] == Wide.fingerprint  # loaded before anybody asks with it
        back = client.put("/rag/reindex", json={"live": "former"}).json()
        assert (back["is_switched"], back["live"]["embedder"], back["state"]) == (False, ADDRESS, "ready")
        assert client.delete("/rag/reindex").json()["state"] is None

        asked = {"chunking": {"target_tokens": 16, "overlap_sentences": 0}, "questions": kept}
        begun = client.post("/rag/reindex", json=asked)
        cut = {"target_tokens": 16, "max_tokens": 18, "overlap_sentences": 0}
        assert (begun.status_code, begun.json()["beside"]["chunking"]) == (202, cut)
        assert begun.json()["live"]["chunking"] is None
        assert begun.json()["uncut"] == {"documents": 0, "sources": []}
        site.reindexer.work()
        assert client.put("/rag/reindex", json={"live": "new"}).json()["live"]["chunking"] == cut


NONSENSE = [
    ({"questions": [{"query": "?", "documents": []}]}, "/questions/0/documents"),
    ({"chunk_tokens": 100}, "/chunk_tokens"),
    ({"chunking": {}}, "/chunking/target_tokens"),
    ({"chunking": {"target_tokens": 15}}, "/chunking/target_tokens"),
    ({"chunking": {"target_tokens": "many"}}, "/chunking/target_tokens"),
    ({"chunking": {"target_tokens": 128, "max_tokens": 127}}, "/chunking/max_tokens"),
    ({"chunking": {"target_tokens": 250}}, "/chunking/max_tokens"),
    ({"chunking": {"target_tokens": 128, "overlap_sentences": -1}}, "/chunking/overlap_sentences"),
    ({"chunking": {"target_tokens": 128, "overlap_sentences": 21}}, "/chunking/overlap_sentences"),
]


def test_the_status_names_only_what_the_caller_may_read() -> None:
    def one(source: str, tenant: str = "acme", *readers: str) -> Document:
        return Document("d", "v", tenant, "c", source, "", "", {}, frozenset(readers), 1, 1)

    index = LiveIndex("i", "f")
    unkept = (one("b"), one("a"), one("theirs", "other"), one("bob's", "acme", "bob"), one("mine", "acme", "alice"))
    shown = show_progress(Progress("c", index, index, None, unkept=unkept), ALICE)
    assert shown["uncut"] == {"documents": 5, "sources": ["a", "b", "mine"]}
    told = "\n".join(lines({**shown, "uncut": {"documents": 5, "sources": ["a", "b"]}}))
    assert "5 documents stay as they were cut" in told and told.endswith("    a\n    b")


@pytest.mark.parametrize(("most", "overlap"), [(100, None), (None, 1)])
def test_options_of_a_cut_mean_nothing_without_its_size(most: int | None, overlap: int | None) -> None:
    with pytest.raises(InvalidRequest, match="--chunk-tokens"):
        chunking_of(None, most, overlap)
    assert chunking_of(64, most, overlap)["chunking"]["target_tokens"] == 64


def test_only_who_administers_sees_or_moves_an_index(door: Door) -> None:
    headers = door.headers("acme", "bob", "documents:read", "documents:write", "infer")
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert door.client.request(method, "/rag/reindex", headers=headers).status_code == 403
    assert door.client.get("/rag/reindex", headers=door.headers()).status_code == 404  # where none are built


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", '{"query": "?"}', '{"query": "?", "documents": []}', '{"query": 1, "documents": []}']
)  # fmt: skip
def test_a_file_of_questions_that_cannot_be_meant_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f'{{"query": "?", "documents": ["a"]}}\n{text}' if text else "\n")
    with pytest.raises(InvalidRequest, match="line 2" if text else "no question"):
        read_questions(file)
    file.write_text('{"query": "?", "documents": ["a", "b"]}\n\n')
    assert read_questions(file) == [{"query": "?", "documents": ["a", "b"]}]


# ── killed ──────────────────────────────────────────────────────────────────────────────────────

REINDEX = sorted(point for point in POINTS if point.startswith("reindex."))


def run(home: Path, port: int, documents: str, collection: str, failpoint: str = "") -> int | None:
    testing = {"NEXUS_TESTING": "1", "NEXUS_FAILPOINT": failpoint} if failpoint else {}
    process = _forks.Process(target=reindexing.run, args=(home, port, documents, collection, testing))
    process.start()
    process.join(60)
    process.kill()
    process.join()
    return process.exitcode


IN_ARANGO = [(point, "arango") for point in ("reindex.after_fill", "reindex.inside_forget")]


@pytest.mark.faults
@pytest.mark.parametrize(("point", "store"), [*((point, "disk") for point in REINDEX), *IN_ARANGO])
def test_a_kill_anywhere_leaves_a_whole_index_live_and_the_work_goes_on(
    point: str, store: str, server: int, tmp_path: Path
) -> None:
    with document_stores.place(store, tmp_path) as documents:
        kill_and_go_on(point, server, tmp_path, documents.address)


def kill_and_go_on(point: str, server: int, home: Path, documents: str) -> None:
    collection = f"killed-{point.partition('.')[2]}-{documents.partition(':')[0]}"
    site = open_home(home, server, documents)
    fill(site, 10, collection)
    assert run(home, server, documents, collection, f"{point}:kill") == -9
    assert [first(site, number, collection) for number in range(10)] == [f"{n}.txt" for n in range(10)]
    put(site, "after.txt", text_of(800), collection=collection)
    assert site.hades.fsck() == []
    assert run(home, server, documents, collection) == 0
    assert live(site, collection) == Wide.fingerprint and site.hades.generations(collection) == []
    document = site.hades.documents.current(document_id_of(ALICE.tenant, collection, "5.txt"), ALICE)
    assert document is not None and document.chunks == 2 == len(chunk_ids(site, "5.txt", collection))
    assert [first(site, number, collection) for number in range(10)] == [f"{n}.txt" for n in range(10)]
    assert first(site, 800, collection) == "after.txt"
    assert site.hades.fsck() == []
    assert json.loads((home / "live.json").read_text())[collection]["dimension"] == Wide.dimension
    for store in (site.hades.documents, site.hades.vectors):
        store.close()
    site.retriever.close()
