"""Another embedder or chunker for a collection: a second index, built beside the live one, compared, switched to.

A collection has an index of its own, and for a while a second one, its generation (ports.py). Each has chunks of its
own, with ids, texts and vectors: the same pieces of the same versions where only the embedder is another, and else a
new cut of what every version was cut from, which is kept with it (kept.py). What happens, in order:

1. `begin` notes the generation in the document store. From that transaction on no version is published that lacks its
   chunks in it: whoever publishes writes to both indexes, and who did not know yet is told to stage again. So what
   is left to bring in is what was published before, and that only shrinks: no fence, and nobody waits.
2. `build` brings it in, batch by batch: rows of the vector store first, then chunks in the document store, which
   say what is done. A crash repeats a batch at most; work goes on where it was. A version of which it was not kept
   what it was cut from stays as it is cut: it is found as before, and `Progress.unkept` names it. Added again, it
   is cut like the others.
3. `compare` measures recall@k of both on the same questions, by the vectors alone and fused as configured: vectors
   that say nothing would hide behind the words. k counts passages, however long they are. Of a question that was kept
   a hit counts if its document is expected; of one made up, a sentence, if it holds at least half of that, word for
   word. Not worse is "ready", else it is "refused", and the figures say why.
4. `switch` is one compare-and-set of the coordinator. A search looks up once which index is live, and embeds its
   question with that one's embedder; those under way end with the index they began with, which is whole. `rollback`
   is the same compare-and-set the other way round: both indexes are written to, so nothing is lost by either.
5. `drop` gives up whichever of the two is not live. After a pause, in which the last search in it ends, `tidy` makes
   the live one the collection's own, which is one small transaction, and removes the other, part by part.
"""

import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from nexus.chunking import ChunkSettings, embedded_text
from nexus.coordination import Alone
from nexus.embedders import Embedders
from nexus.errors import ConfigError, Conflict, InvalidRequest, NexusError, NotFound, TryAgain
from nexus.failpoints import pass_through
from nexus.hades import Hades, alias_of, chunks_of, cut_of, document_id_of, in_batches, index_of, rows_of
from nexus.ingest import check_vectors
from nexus.kept import unpack
from nexus.ports import Embedder, Generation, KeepsGenerations, LiveIndex
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.types import LAST_ORDINAL, Document, Parsed, Piece, Principal, SearchRequest, Vectors

BATCH_TEXTS = 128
MOST_K = 10
SAMPLED = 100  # questions, where none are kept
SAMPLED_ALLOWANCE = 0.02  # they are made up from the documents: two of a hundred decide nothing
MOST_QUESTIONS = 1000
MOST_UNKEPT = 1000  # documents that are looked for, to be named
QUESTION_WORDS = 4  # a shorter sentence is hardly about its passage
GRACE_SECONDS = 60.0  # until a search that began before a switch has ended, whatever it was


@dataclass(frozen=True, slots=True)
class Question:
    """What somebody asks, and the documents that should be among the first hits.

    `is_sentence`: it was taken from the one document, and the hit should be the passage that it stands in.
    """

    query: str
    expected: frozenset[str]
    principal: Principal
    is_sentence: bool = False


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
            f"recall@{self.k} on {self.questions} questions {which}: by vectors {self.live.dense:.3f} in the live"
            f" index, {self.beside.dense:.3f} in the other; fused {self.live.fused:.3f} and"
            f" {self.beside.fused:.3f}"
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a collection stands. `done` of `total` chunks of the own index are of versions that are in the second one.

    `beside` is the second index; once it is live, `own` is the one to roll back to. `unkept` are documents, of all
    tenants, that the second index should have cut otherwise and has as they were, MOST_UNKEPT at most.
    """

    collection: str
    live: LiveIndex
    own: LiveIndex
    beside: Generation | None
    done: int = 0
    total: int = 0
    unkept: tuple[Document, ...] = ()


@dataclass
class Reindexer:
    """The moves above, over one Hades. `embed_for` makes vectors of passages for an index, `embedder_of` is whole.

    `cut_for` cuts a document as an index has it; `pauses` are how long to wait before each batch, for whoever is asking
    meanwhile.
    """

    hades: Hades
    others: Embedders
    cut_for: Callable[[LiveIndex, Parsed], list[Piece]]
    embed_for: Callable[[LiveIndex, Sequence[str]], Vectors]
    embedder_of: Callable[[LiveIndex], Embedder]
    settings: RetrievalSettings = field(default_factory=RetrievalSettings)
    pauses: Callable[[], Iterable[float]] = tuple
    grace_seconds: float = GRACE_SECONDS

    # ── beginning ───────────────────────────────────────────────────────────────────────────────

    def begin(
        self, name: str, address: str | None, by: Principal, questions: Sequence[tuple[str, Sequence[str]]] = (),
        chunking: ChunkSettings | None = None,
    ) -> Generation:  # fmt: skip
        """Note that the collection gets an index with this embedder, cut so; twice is once. `work` does the rest.

        None is as in the live index. `questions` are queries with the ids or sources of the documents that `by`
        expects; without any, some are made up. Raises NotFound, InvalidRequest, and Conflict where it is the live one
        or another is under way.
        """
        keeper = self._keeper()
        progress = self.progress(name)
        asked = self._asked(name, by, questions)
        embedder = self._open(address) if address else self.embedder_of(progress.live)
        address = address or progress.live.embedder or self.hades.embedder
        if chunking is not None and chunking.max_tokens > embedder.max_tokens:
            raise InvalidRequest(
                f"{address!r} reads {embedder.max_tokens} tokens of a text: chunks cannot have {chunking.max_tokens}",
                pointer="/chunking/max_tokens",
            )  # fmt: skip
        cut_so = progress.live.chunking if chunking is None else chunking.write()
        index = index_of(name, embedder.fingerprint, cut_so)
        live = LiveIndex(index, embedder.fingerprint, address, embedder.dimension, index, cut_so)
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
        if (wanted.fingerprint, wanted.chunking) == (now.live.fingerprint, now.live.chunking):
            raise Conflict(
                f"collection {now.collection!r} is cut so and embedded with that model already", code="same_embedder"
            )
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
                "the index that is cut and embedded so is still there; `nexus reindex --rollback` goes back to it",
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
            if address == self.hades.embedder:
                return self.embedder_of(LiveIndex("", self.hades.fingerprint, address, self.hades.dimension))
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
            for batch in in_batches(documents, BATCH_TEXTS):
                for pause in self.pauses():
                    time.sleep(pause)
                if not self._is_building(name, live):
                    return False
                self._fill(name, live, batch)
        published, indexed = self.hades.documents.chunk_ids(live.index, True), self.hades.vectors.chunk_ids(live.index)
        self.hades.write_again(sorted(published - indexed))
        if strangers := indexed - self.hades.documents.chunk_ids(live.index, published=False):
            self.hades.vectors.delete(live.index, sorted(strangers))  # of who was killed, and a version vacuumed since
        self.hades.vectors.flush(live.index)
        return True

    def _fill(self, name: str, live: LiveIndex, documents: Sequence[Document]) -> None:
        own, _ = self.hades.written(name)
        cuts = [(one, chunks_of(one, self._cut(one, own, live), live.cut)) for one in documents]
        versions = [(one, chunks) for one, chunks in cuts if chunks or not one.chunks]  # else it was vacuumed just now
        texts = [embedded_text(one.title, chunk.piece) for one, chunks in versions for chunk in chunks]
        vectors = self.embed_for(live, texts)
        check_vectors(vectors, len(texts), live.dimension)
        start = 0
        for document, chunks in versions:
            pass_through("reindex.before_fill")
            made = cut_of(document, chunks, vectors[start : start + len(chunks)])
            start += len(chunks)
            ids = [chunk.chunk_id for chunk in chunks]
            self.hades.vectors.upsert(live.index, rows_of(document, made))
            pass_through("reindex.between_stores")
            if not self._keeper().fill(live.index, document, made):
                self._take_back(live, ids)
            elif ids and (readers := self._readers_of(ids, document)) != document.readers:
                self.hades.write_again(ids, readers)
            pass_through("reindex.after_fill")

    def _cut(self, document: Document, own: LiveIndex, live: LiveIndex) -> list[Piece]:
        """A version's pieces for an index: of its own cut, if it is the same or cannot be another."""
        key = (document.document_id, document.version)
        kept = self.hades.documents.kept(*key) if live.chunking != own.chunking else None
        parsed = unpack(kept) if kept is not None else None
        if parsed is not None:
            return self.cut_for(live, parsed)
        return [chunk.piece for chunk in self.hades.documents.neighbours(*key, 0, LAST_ORDINAL, own.cut)]

    def _take_back(self, live: LiveIndex, chunk_ids: Sequence[str]) -> None:
        """Rows of a version that was vacuumed meanwhile, or is there already, as who published it anew cut it."""
        known = self.hades.documents.load(chunk_ids)
        if gone := [one for one in chunk_ids if one not in known]:
            self.hades.vectors.delete(live.index, gone)
        self.hades.write_again(list(known))

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
                about = frozenset({document.document_id})
                found.setdefault(document.document_id, Question(query, about, reader, is_sentence=True))
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
        held = self.hades.coordinator.point(name, own)
        beside = self._beside(name)
        live = beside.live if beside is not None and held.index == beside.live.index else own
        if beside is None or self.hades.keeper is None:
            return Progress(name, live, own, beside)
        is_cut_anew = beside.live.chunking != own.chunking
        unkept = self.hades.keeper.unkept(name, MOST_UNKEPT) if is_cut_anew else []
        return Progress(name, live, own, beside, *self.hades.keeper.filled(name, beside.live.index), tuple(unkept))

    def switch(self, name: str, anyway: bool = False) -> Progress:
        """Make the second index the live one. Raises Conflict where it is not complete, or worse and not `anyway`."""
        now = self.progress(name)
        if now.beside is None:
            raise Conflict("there is no second index; `nexus reindex` builds one", code="no_generation")
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
                own = self.progress(name).own
                held = self.hades.coordinator.point(name, own)
                if held.index == generation.live.index:  # of before: it is searched no more (Hades.live_of)
                    self.hades.coordinator.move(name, held, own)
                live = self.progress(name).live
                self.hades.vectors.open_index(live.index, live.dimension)
                self.hades.vectors.point_alias(alias_of(name), live.index)  # a crash may have left it behind
                self.hades.vectors.drop_index(generation.live.index)
                pass_through("reindex.before_forget")
                while self._keeper().forget_generation(generation.live.index):
                    pass_through("reindex.inside_forget")
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


def _kept(generation: Generation) -> list[Question]:
    """The questions that were given with it."""
    asked = generation.asked
    principal = Principal(str(asked.get("tenant")), str(asked.get("subject")))
    given: list[dict[str, list[str]]] = list(asked.get("questions") or ())  # type: ignore[call-overload]
    return [Question(str(one["query"]), frozenset(one["expected"]), principal) for one in given]


def _share(retriever: Retriever, request: SearchRequest, question: Question) -> float:
    hits = retriever.search(request, question.principal).hits
    found = {hit.document_id for hit in hits if not question.is_sentence or _holds(hit.text, question.query)}
    return len(found & question.expected) / min(len(question.expected), request.k)


def _holds(text: str, sentence: str) -> bool:
    """Whether the first or the last half of a sentence's words stands in a text, wherever lines are broken."""
    words, whole = sentence.split(), " ".join(text.split())
    half = -(-len(words) // 2)
    return " ".join(words[:half]) in whole or " ".join(words[-half:]) in whole
