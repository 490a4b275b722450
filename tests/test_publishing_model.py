"""HADES against a simple model of it: any order of moves, crashes among them, and every moment that can be asked for.

The model is a list of what was visible after each sequence number. A crash is an exception thrown at
a failpoint; then everything is opened anew, and what the model says depends only on which side of the
one transaction the crash fell.

Cutting anew changes nothing of that: whichever index is searched, and whatever became of another one that was begun,
every moment has the same words.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from nexus import failpoints
from nexus.chunking import ChunkSettings
from nexus.coordination import Alone
from nexus.errors import Conflict, Fenced, InvalidRequest, NotFound, Unavailable
from nexus.failpoints import POINTS, FailpointReached
from nexus.hades import chunks_of
from nexus.ingest import Prepared
from nexus.kept import pack
from nexus.ports import VectorStore
from nexus.stores import arango, memory, sqlite
from nexus.types import Block, Document, Parsed, Piece, SearchRequest
from tests.conftest import ALICE, House, build_house
from tests.document_stores import SERVER, place
from tests.reindexing import Words, open_site, steps_over

NAMES = ("a", "b", "c")
TEXTS = ("one", "two", "three")
BEFORE_COMMIT = ("ingest.before_stage", "ingest.between_stores", "ingest.after_stage", "ingest.before_publish",
                 "ingest.inside_publish", "ingest.before_begin", "ingest.after_begin")  # fmt: skip
RETIRE_SECONDS = sqlite.RETIRE_SECONDS
REINDEX = sorted(point for point in POINTS if point.startswith("reindex."))
MOVES = (("begin",), ("work",), ("begin", "switch"), ("begin", "work", "switch"), ("work", "switch"))
CUTS = (ChunkSettings(2, 2, 0), ChunkSettings(4, 4, 0))
VACUUM = ("ingest.before_retire", "ingest.after_retire", "ingest.before_purge", "ingest.after_purge")


@contextmanager
def crashing(point: str | None) -> Iterator[None]:
    """Raise at this point, whichever move passes it."""
    failpoints._active = {} if point is None else {point: failpoints._Failpoint("raise", 0, 1)}
    try:
        yield
    finally:
        failpoints._active = {}


def parts_of(name: str, text: str) -> list[str]:
    """Of which every two words hold the one that is looked for."""
    return [f"gripper {name} gripper {text} gripper {part}" for part in range(2)]


Attempt = tuple[str, str, Document, int]  # name, text, the version as it was staged, its epoch


def words_of(texts: Iterable[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """How often each document says each word, however it is cut."""
    return Counter((name, word) for name, text in texts for word in text.split())


class Publishing(RuleBasedStateMachine):
    store, module = "disk", sqlite
    attempts = Bundle("attempts")

    @initialize()
    def open(self) -> None:
        self.module.RETIRE_SECONDS = 0.0  # whoever stages a version that is being removed takes it over at once
        self.home = Path(tempfile.mkdtemp())
        self.place = place(self.store, self.home)
        self.open_store = self.place.__enter__()
        self.vectors = self.open_vectors()
        self._reopen()
        self.house.hades.begin(self.house.describe("nothing yet", ["x"]))
        self.history: list[dict[str, str]] = [{}]  # after each sequence number: name -> text
        self.epochs = dict.fromkeys(NAMES, 0)
        self.horizon = 0

    def open_vectors(self) -> VectorStore:
        return memory.open("memory:")

    def _reopen(self) -> None:
        self.house: House = build_house(self.open_store(), self.vectors)

    def _stage(self, name: str, text: str) -> tuple[Document, int]:
        parts = parts_of(name, text)
        document = self.house.describe(name, parts)
        return document, self.house.stage(document, parts)

    def _put(self, name: str, text: str) -> None:
        self.house.hades.publish([self._stage(name, text)])

    def teardown(self) -> None:
        if hasattr(self, "house"):
            self.module.RETIRE_SECONDS = RETIRE_SECONDS
            self.house.retriever.close()
            self.house.hades.documents.close()
            self.place.__exit__(None, None, None)
            shutil.rmtree(self.home)

    def _step(self, **changes: str | None) -> None:
        after = {**self.history[-1], **changes}
        self.history.append({name: text for name, text in after.items() if text is not None})

    @rule(target=attempts, name=st.sampled_from(NAMES), text=st.sampled_from(TEXTS))
    def stage(self, name: str, text: str) -> Attempt:
        """A maker begins and stages, and may publish later, or never."""
        document, epoch = self._stage(name, text)
        self.epochs[name] = epoch
        return name, text, document, epoch

    @rule(attempt=attempts)
    def publish(self, attempt: Attempt) -> None:
        """What was staged becomes visible, unless somebody began the same document since, or a vacuum took it."""
        name, text, document, epoch = attempt
        try:
            (published,) = self.house.hades.publish([(document, epoch)])
        except Fenced:
            assert epoch != self.epochs[name]
            return
        except (Conflict, Unavailable):  # its rows were vacuumed, or are not in every index
            return
        assert epoch == self.epochs[name]
        if published.opened == len(self.history):
            self._step(**{name: text})
        assert self.history[-1][name] == text, "a publish that comes again changes nothing"

    @rule(name=st.sampled_from(NAMES), text=st.sampled_from(TEXTS), point=st.sampled_from(BEFORE_COMMIT))
    def crash_before_commit(self, name: str, text: str, point: str) -> None:
        with crashing(point), pytest.raises(FailpointReached):
            self._put(name, text)
        if point != "ingest.before_begin":
            self.epochs[name] += 1
        self._after_crash()

    @rule(name=st.sampled_from(NAMES), text=st.sampled_from(TEXTS))
    def crash_after_commit(self, name: str, text: str) -> None:
        with crashing("ingest.after_publish"), pytest.raises(FailpointReached):
            self._put(name, text)
        self.epochs[name] += 1
        self._step(**{name: text})
        self._after_crash()

    def _after_crash(self) -> None:
        self.house.retriever.close()
        self.house.hades.documents.close()
        self._reopen()

    @rule(names=st.lists(st.sampled_from(NAMES), unique=True, min_size=1), crash=st.booleans())
    def delete(self, names: list[str], crash: bool) -> None:
        ids = [self.house.describe(name, ["x"]).document_id for name in names]
        there = [name for name in names if name in self.history[-1]]
        with crashing("ingest.after_delete" if crash else None):
            try:
                self.house.hades.delete(ids, ALICE)
            except NotFound:
                assert not there
            except FailpointReached:
                self._after_crash()
        for name in there:
            self.epochs[name] += 1
            self._step(**{name: None})

    @rule(point=st.sampled_from((None, *VACUUM)))
    def vacuum(self, point: str | None) -> None:
        with crashing(point):
            try:
                self.house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
            except FailpointReached:
                self._after_crash()
        self.horizon = max(self.horizon, self.house.hades.find_collection("default", ALICE.tenant).horizon)

    @invariant()
    def every_moment_is_as_it_was(self) -> None:
        if not hasattr(self, "house"):
            return
        assert self.house.hades.find_collection("default", ALICE.tenant).sequence == len(self.history) - 1
        for sequence, visible in enumerate(self.history):
            request = SearchRequest("gripper", k=50, as_of=sequence)
            if sequence < self.horizon:
                with pytest.raises(InvalidRequest):
                    self.house.retriever.search(request, ALICE)
                continue
            hits = self.house.retriever.search(request, ALICE).hits
            found = words_of((hit.source, hit.text) for hit in hits)
            assert found == words_of((n, part) for n, t in visible.items() for part in parts_of(n, t))

    @invariant()
    def what_is_visible_is_in_both_stores(self) -> None:
        if hasattr(self, "house"):
            assert [f for f in self.house.hades.fsck() if f.kind != "vectors without a chunk"] == []


TestPublishing = Publishing.TestCase
TestPublishing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class Recutting(Publishing):
    """The same while the collection is cut anew, the one and the other way, and taken back."""

    def _reopen(self) -> None:
        if not hasattr(self, "coordinator"):
            self.coordinator = Alone()
        self.site = open_site(self.open_store(), self.vectors, self.coordinator)
        self.house = House(self.site.hades, self.site.retriever, Words())

    def _stage(self, name: str, text: str) -> tuple[Document, int]:
        parts = parts_of(name, text)
        document, hades = self.house.describe(name, parts), self.site.hades
        chunks = chunks_of(document, [Piece(part, tokens=len(part.split())) for part in parts])
        kept = pack(Parsed(document.title, "text/plain", tuple(Block("text", part) for part in parts)))
        made = Prepared(document, ALICE, hades.begin(document), tuple(chunks), tuple(parts), False, kept)
        (staged,) = steps_over(hades, self.site.others).embed([made])
        hades.stage([staged])
        return staged.document, staged.epoch

    @contextmanager
    def _crashing(self, point: str | None) -> Iterator[None]:
        """It may end there, or be refused, as where another index is under way, or on its way out."""
        with crashing(point):
            try:
                yield
            except (Conflict, Unavailable):
                pass
            except FailpointReached:
                self._after_crash()

    @rule(cut=st.sampled_from(CUTS), moves=st.sampled_from(MOVES), point=st.sampled_from((None, *REINDEX)))
    def cut_anew(self, cut: ChunkSettings, moves: tuple[str, ...], point: str | None) -> None:
        """As far as these moves go, unless it ends at the point."""
        with self._crashing(point):
            if "begin" in moves:
                self.site.reindexer.begin("default", None, ALICE, (), cut)
            if "work" in moves:
                self.site.reindexer.work()
            if "switch" in moves:
                self.site.reindexer.switch("default", anyway=True)

    @rule(point=st.sampled_from((None, *REINDEX)))
    def roll_back(self, point: str | None) -> None:
        with self._crashing(point):
            self.site.reindexer.rollback("default")

    @rule(point=st.sampled_from((None, *REINDEX)))
    def drop(self, point: str | None) -> None:
        with self._crashing(point):
            self.site.reindexer.drop("default")


TestRecutting = Recutting.TestCase
TestRecutting.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


class PublishingOverArango(Publishing):
    store, module = ("arango server" if SERVER else "arango"), arango


TestPublishingOverArango = PublishingOverArango.TestCase
TestPublishingOverArango.settings = settings(max_examples=5, stateful_step_count=12, deadline=None)
