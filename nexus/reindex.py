"""Another embedder for a collection: a second index, built beside the live one under load, compared, switched to.

A collection has an index of its own, and for a while a second one, its generation of the other embedder (ports.py).
Chunks, their ids and their texts are the same for both; only the vectors differ. What happens, in order:

1. `begin` notes the generation in the document store. From that transaction on no version is published that lacks a
   vector in it: whoever publishes writes to both indexes, and who did not know yet is told to stage again. So what
   is left to bring in is what was published before, and that only shrinks: no fence, and nobody waits.
2. `build` brings it in, batch by batch: rows of the vector store first, then the vectors in the document store, which
   say what is done. A crash repeats a batch at most; work goes on where it was.
3. `compare` measures recall@k of both on the same questions, by the vectors alone and fused as configured: vectors
   that say nothing would hide behind the words. Not worse is "ready", else it is "refused", and the figures say why.
4. `switch` is one compare-and-set of the coordinator. A search looks up once which index is live, and embeds its
   question with that one's embedder; those under way end with the index they began with, which is whole. `rollback`
   is the same compare-and-set the other way round: both indexes are written to, so nothing is lost by either.
5. `drop` gives up whichever of the two is not live. After a pause, in which the last search in it ends, `tidy` makes
   the live one the collection's own and removes the other.

Another chunker would cut other chunks, for which the text as it was parsed is needed, and that is not kept: it takes
the documents themselves, added again.
"""

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from nexus.chunking import embedded_text
from nexus.coordination import Alone
from nexus.embedders import Embedders
from nexus.errors import ConfigError, Conflict, InvalidRequest, NexusError, NotFound, TryAgain
from nexus.failpoints import pass_through
from nexus.hades import Hades, alias_of, document_id_of, index_of, rows_of
from nexus.ingest import check_vectors
from nexus.ports import Embedder, Generation, KeepsGenerations, LiveIndex
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.types import Document, Principal, SearchRequest, Vectors

BATCH_TEXTS = 128
MOST_K = 10
SAMPLED = 100  # questions, where none are kept
SAMPLED_ALLOWANCE = 0.02  # they are made up from the documents: two of a hundred decide nothing
MOST_QUESTIONS = 1000
QUESTION_WORDS = 4  # a shorter sentence is hardly about its passage
GRACE_SECONDS = 60.0  # until a search that began before a switch has ended, whatever it was


@dataclass(frozen=True, slots=True)
class Question:
    """What somebody asks, and the documents, or the chunks, that should be among the first hits."""

    query: str
    expected: frozenset[str]
    principal: Principal


@dataclass(frozen=True, slots=True)
class Recall:
    """The mean share of what is expected among the first k hits: by the vectors alone, and fused as configured."""

    dense: float
    fused: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Recall@k of two indexes on the same questions; `allowed` is how much less the second one's may be."""

    questions: int
    sampled: bool
    k: int
    allowed: float
    live: Recall
    beside: Recall

    @property
    def is_worse(self) -> bool:
        pairs = ((self.live.dense, self.beside.dense), (self.live.fused, self.beside.fused))
        return any(after < before - self.allowed - 1e-9 for before, after in pairs)

    def sentence(self) -> str:
        which = "made up from the documents" if self.sampled else "kept"
        return (
            f"recall@{self.k} on {self.questions} questions {which}: by vectors {self.live.dense:.3f} with the live"
            f" embedder, {self.beside.dense:.3f} with the other; fused {self.live.fused:.3f} and"
            f" {self.beside.fused:.3f}"
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a collection stands. `done` and `total` count the chunks of published versions in the second index.

    `beside` is the second index; once it is live, `own` is the one to roll back to.
    """

    collection: str
    live: LiveIndex
    own: LiveIndex
    beside: Generation | None
    done: int = 0
    total: int = 0


@dataclass
class Reindexer:
    """The moves above, over one Hades. `embed_for` makes vectors of passages for an index, `embedder_of` is whole.

    `pauses` are how long to wait before each batch, for whoever is asking meanwhile.
    """

    hades: Hades
    others: Embedders
    embed_for: Callable[[LiveIndex, Sequence[str]], Vectors]
    embedder_of: Callable[[LiveIndex], Embedder]
    settings: RetrievalSettings = field(default_factory=RetrievalSettings)
    pauses: Callable[[], Iterable[float]] = tuple
    grace_seconds: float = GRACE_SECONDS

    # ── beginning ───────────────────────────────────────────────────────────────────────────────

    def begin(
        self, name: str, address: str, by: Principal, questions: Sequence[tuple[str, Sequence[str]]] = ()
    ) -> Generation:
        """Note that the collection gets an index with this embedder; twice is once. `work` does the rest.

        `questions` are queries with the ids or sources of the documents that `by` expects; without any, some are made
        up. Raises NotFound, InvalidRequest, and Conflict where it is the live one or another is under way.
        """
        keeper = self._keeper()
        progress = self.progress(name)
        asked = self._asked(name, by, questions)
        embedder = self._open(address)
        live = LiveIndex(index_of(name, embedder.fingerprint), embedder.fingerprint, address, embedder.dimension)
        self._make_room(keeper, progress, live)
        self.hades.vectors.open_index(live.index, live.dimension)
        pass_through("reindex.before_begin")
        keeper.add_generation(name, progress.own, Generation(live, "building", time.time(), asked, {}))
        pass_through("reindex.after_begin")
        found = self._beside(name)
        if found is None:
            raise Conflict(f"the second index of {name!r} was dropped as it was begun; begin again", code="dropped")
        return found

    def _make_room(self, keeper: KeepsGenerations, now: Progress, wanted: LiveIndex) -> None:
        """Nothing but the wanted index is beside the live one, or Conflict says what is in the way."""
        if wanted.fingerprint == now.live.fingerprint:
            raise Conflict(f"collection {now.collection!r} is embedded with that model already", code="same_embedder")
        if now.beside is None:
            return
        if now.live != now.beside.live:
            if now.beside.live.index == wanted.index:
                if now.beside.state == "refused":
                    keeper.note_generation(wanted.index, "building", time.time(), {})  # compared anew
            elif now.beside.state == "building":
                raise Conflict("another index is being built; `nexus reindex --drop` gives it up", code="under_way")
            else:
                self._leave(keeper, now.beside)
        elif wanted.index == now.own.index:
            raise Conflict(
                "the index with that embedder is still there; `nexus reindex --rollback` goes back to it",
                code="same_embedder",
            )
        else:
            keeper.note_generation(now.beside.live.index, "staying", now.beside.since)
            self.tidy(now.collection)
            if self._beside(now.collection) is not None:
                raise Conflict("the index before this one is being removed; try again in a minute", code="under_way")

    def _asked(self, name: str, by: Principal, questions: Sequence[tuple[str, Sequence[str]]]) -> dict[str, object]:
        if len(questions) > MOST_QUESTIONS:
            raise InvalidRequest(f"at most {MOST_QUESTIONS} questions are compared", pointer="/questions")
        if empty := [place for place, (query, expected) in enumerate(questions) if not (query.strip() and expected)]:
            raise InvalidRequest(
                f"question {empty[0] + 1} has no query, or no document that it should find",
                pointer=f"/questions/{empty[0]}",
            )
        known = [
            {"query": query, "expected": [self._known(name, by, one, place) for one in expected]}
            for place, (query, expected) in enumerate(questions)
        ]
        return {"tenant": by.tenant, "subject": by.subject, "questions": known}

    def _known(self, name: str, by: Principal, document: str, place: int) -> str:
        """The id of a document said by its id or its source."""
        for document_id in (document, document_id_of(by.tenant, name, document)):
            found = self.hades.documents.current(document_id, by)
            if found is not None and found.collection == name:
                return document_id
        raise InvalidRequest(
            f"question {place + 1} expects {document!r}, which is no document of {name!r}",
            pointer=f"/questions/{place}/documents",
        )

    def _open(self, address: str) -> Embedder:
        """The embedder of this address, tried out."""
        try:
            embedder = self.others.open(address)
        except ConfigError as error:
            raise InvalidRequest(error.message, pointer="/embedder") from error
        check_vectors(embedder.embed(["a word"]), 1, embedder.dimension)
        return embedder

    # ── building and comparing ──────────────────────────────────────────────────────────────────

    def work(self) -> None:
        """Bring every index that is being built to its comparison, and remove what was dropped. Raises TryAgain."""
        for collection in self.hades.documents.collections():
            for generation in self.hades.generations(collection.name):
                if generation.state == "building":
                    self._finish(collection.name, generation)
            self.tidy(collection.name)

    def _finish(self, name: str, generation: Generation) -> None:
        index, keeper = generation.live.index, self._keeper()
        try:
            if not self.build(name, generation.live):
                return
            compared = self.compare(name, generation)
        except TryAgain:
            raise
        except NexusError as error:  # whoever began it asks how it is, and is told
            keeper.note_generation(index, "refused", time.time(), {"sentence": error.message})
            return
        figures = {} if compared is None else {**asdict(compared), "sentence": compared.sentence()}
        pass_through("reindex.before_judge")
        if self._is_building(name, generation.live):
            worse = compared is not None and compared.is_worse
            keeper.note_generation(index, "refused" if worse else "ready", time.time(), figures)
            pass_through("reindex.after_judge")

    def build(self, name: str, live: LiveIndex) -> bool:
        """Bring in all that was published before; False when it was given up meanwhile. May run again at any time."""
        while documents := self.hades.lacking(name, live):
            for batch in _batches(documents):
                for pause in self.pauses():
                    time.sleep(pause)
                if not self._is_building(name, live):
                    return False
                self._fill(live, batch)
        own, _ = self.hades.written(name)
        published = self.hades.documents.chunk_ids(own.index, published=True)
        self.hades.write_again(sorted(published - self.hades.vectors.chunk_ids(live.index)))
        self.hades.vectors.flush(live.index)
        return True

    def _fill(self, live: LiveIndex, documents: Sequence[Document]) -> None:
        load = self.hades.documents.neighbours
        versions = [(one, load(one.document_id, one.version, 0, one.chunks)) for one in documents]
        texts = [embedded_text(one.title, chunk.piece) for one, chunks in versions for chunk in chunks]
        vectors = self.embed_for(live, texts)
        check_vectors(vectors, len(texts), live.dimension)
        start = 0
        for document, chunks in versions:
            pass_through("reindex.before_fill")
            made = vectors[start : start + len(chunks)]
            start += len(chunks)
            ids = [chunk.chunk_id for chunk in chunks]
            self.hades.vectors.upsert(live.index, rows_of(document, chunks, made))
            pass_through("reindex.between_stores")
            if not self._keeper().fill(live.index, document, dict(zip(ids, made, strict=True))):
                self.hades.vectors.delete(live.index, ids)  # it was vacuumed meanwhile
            elif (readers := self._readers_of(ids, document)) != document.readers:
                self.hades.write_again(ids, readers)
            pass_through("reindex.after_fill")

    def _readers_of(self, chunk_ids: Sequence[str], document: Document) -> frozenset[str]:
        """As they are now: they may have changed while its rows were written for those of before."""
        found = self.hades.documents.load(chunk_ids[:1])
        return found[chunk_ids[0]][1].readers if found else document.readers

    def compare(self, name: str, generation: Generation) -> Comparison | None:
        """Both indexes on the same questions; None where there is nothing that could be asked for."""
        progress = self.progress(name)
        chunk_ids = sorted(self.hades.documents.chunk_ids(progress.own.index, published=True))
        kept = _kept(generation)
        questions = kept or self._made_up(chunk_ids)
        if not questions:
            return None
        k = max(1, min(MOST_K, len(chunk_ids) // 20))  # among few, more would find everything with anything
        live, beside = (self._recall(name, one, questions, k) for one in (progress.live, generation.live))
        return Comparison(len(questions), not kept, k, 0.0 if kept else SAMPLED_ALLOWANCE, live, beside)

    def _made_up(self, chunk_ids: Sequence[str]) -> list[Question]:
        """Sentences out of some chunks, at most one of a document: each should find its chunk, for who may read it."""
        dice = random.Random(len(chunk_ids))
        some = dice.sample(list(chunk_ids), min(4 * SAMPLED, len(chunk_ids)))
        found: dict[str, Question] = {}
        for chunk, document in self.hades.documents.load(some).values():
            sentences = [one for one in re.split(r"(?<=[.!?])\s+|\n+", chunk.piece.text) if one.strip()]
            long = [one for one in sentences if len(one.split()) >= QUESTION_WORDS] or sentences
            if long and len(found) < SAMPLED:
                reader = Principal(document.tenant, min(document.readers, default="reindex"))
                query = dice.choice(long).strip()[:500]
                found.setdefault(document.document_id, Question(query, frozenset({chunk.chunk_id}), reader))
        return list(found.values())

    def _recall(self, name: str, live: LiveIndex, questions: Sequence[Question], k: int) -> Recall:
        """As searches would be if this index were the live one."""
        pinned = Alone()
        pinned.point(name, live)
        hades = Hades(self.hades.documents, self.hades.vectors, live.fingerprint, live.dimension, pinned)
        retriever = Retriever(hades, self.embedder_of(live), self.settings)
        try:
            dense, fused = 0.0, 0.0
            for question in questions:
                request = SearchRequest(question.query, k, name, graph="off")
                dense += _share(retriever, replace(request, embedding_weight=1.0, text_weight=0.0), question)
                fused += _share(retriever, request, question)
        finally:
            retriever.close()
        return Recall(round(dense / len(questions), 4), round(fused / len(questions), 4))

    # ── switching ───────────────────────────────────────────────────────────────────────────────

    def progress(self, name: str) -> Progress:
        """Where it stands, as the coordinator says now. Raises NotFound, Unavailable."""
        if self.hades.documents.collection(name) is None:
            raise NotFound(f"there is no collection {name!r}; add a document to it and it will be there")
        own, _ = self.hades.written(name)
        live = self.hades.coordinator.point(name, own)
        beside = self._beside(name)
        if live.index == own.index:
            live = own  # with what was not noted at the time
        if beside is None or self.hades.keeper is None:
            return Progress(name, live, own, beside)
        return Progress(name, live, own, beside, *self.hades.keeper.filled(name, beside.live.index))

    def switch(self, name: str, anyway: bool = False) -> Progress:
        """Make the second index the live one. Raises Conflict where it is not complete, or worse and not `anyway`."""
        now = self.progress(name)
        if now.beside is None:
            raise Conflict("there is no second index; `nexus reindex --embedder …` builds one", code="no_generation")
        if now.live == now.beside.live:
            return now
        if now.beside.state == "building":
            raise Conflict(f"the second index has {now.done} of {now.total} chunks yet", code="under_way")
        if now.beside.state == "refused" and not anyway:
            raise Conflict(
                f"the second index finds less: {now.beside.figures.get('sentence')}; --anyway takes it all the same",
                code="recall_worse",
            )
        self._keeper().note_generation(now.beside.live.index, now.beside.state, time.time())
        return self._move(now, now.beside.live)

    def rollback(self, name: str) -> Progress:
        """Make the collection's own index the live one again. Raises Conflict where it is no longer there."""
        now = self.progress(name)
        if now.beside is None or now.live == now.own:
            raise Conflict("no other index was live before this one, or it was dropped", code="no_generation")
        if now.beside.state == "staying":
            raise Conflict("the index before this one is being removed", code="no_generation")
        return self._move(now, now.own)

    def _move(self, now: Progress, to: LiveIndex) -> Progress:
        pass_through("reindex.before_switch")
        held = self.hades.coordinator.point(now.collection, to)  # which is one already: as it stands there
        if held.index != now.live.index or not self.hades.coordinator.move(now.collection, held, to):
            raise Conflict("another index was made the live one meanwhile; look again", code="switched")
        pass_through("reindex.after_switch")
        self.hades.vectors.point_alias(alias_of(now.collection), to.index)
        return self.progress(now.collection)

    def drop(self, name: str) -> Progress:
        """Give up whichever of the two indexes is not live; `tidy` removes it in a while."""
        now, keeper = self.progress(name), self._keeper()
        if now.beside is None:
            raise Conflict("there is no second index to drop", code="no_generation")
        if now.live == now.beside.live:
            keeper.note_generation(now.beside.live.index, "staying", now.beside.since)
        else:
            self._leave(keeper, now.beside)
        self.tidy(name)
        return self.progress(name)

    def tidy(self, name: str) -> None:
        """Remove what was dropped, once no search can be in it any more. May run again at any time."""
        for generation in self.hades.generations(name):
            if time.time() - generation.since < self.grace_seconds:
                continue
            if generation.state == "staying":
                pass_through("reindex.before_adopt")
                self._keeper().adopt(name, generation.live.index)
                pass_through("reindex.after_adopt")
        for generation in self.hades.generations(name):
            if generation.state == "leaving" and time.time() - generation.since >= self.grace_seconds:
                live = self.progress(name).live
                self.hades.vectors.point_alias(alias_of(name), live.index)  # a crash may have left it behind
                self.hades.vectors.drop_index(generation.live.index)
                pass_through("reindex.before_forget")
                self._keeper().forget_generation(generation.live.index)
                pass_through("reindex.after_forget")

    def _leave(self, keeper: KeepsGenerations, generation: Generation) -> None:
        keeper.note_generation(generation.live.index, "leaving", time.time())

    def _beside(self, name: str) -> Generation | None:
        return next((one for one in self.hades.generations(name) if one.is_written), None)

    def _is_building(self, name: str, live: LiveIndex) -> bool:
        beside = self._beside(name)
        return beside is not None and beside.live == live and beside.state == "building"

    def _keeper(self) -> KeepsGenerations:
        if self.hades.keeper is None:
            raise Conflict(
                "this document store keeps one vector of each chunk: a second index needs `sqlite:` or `arango:`",
                code="no_generations",
            )
        return self.hades.keeper


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """In order, each of about as many chunks as are embedded at once."""
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if sum(one.chunks for one in batch) >= BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _kept(generation: Generation) -> list[Question]:
    """The questions that were given with it."""
    asked = generation.asked
    principal = Principal(str(asked.get("tenant")), str(asked.get("subject")))
    given: list[dict[str, list[str]]] = list(asked.get("questions") or ())  # type: ignore[call-overload]
    return [Question(str(one["query"]), frozenset(one["expected"]), principal) for one in given]


def _share(retriever: Retriever, request: SearchRequest, question: Question) -> float:
    hits = retriever.search(request, question.principal).hits
    found = {hit.document_id for hit in hits} | {hit.chunk_id for hit in hits}
    return len(found & question.expected) / min(len(question.expected), request.k)
