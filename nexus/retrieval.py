"""From a question to the chunks that answer it: routes, fusion, authority, expansion, packing.

Two routes each name up to `candidates` chunks: exact or approximate cosine over vectors, and BM25
over stemmed terms. Their scores live on different scales (a cosine is about 0.6, a BM25 anywhere up
to 50), so BM25 is divided by the query's best before the weighted sum; measured over five sets this
beats reciprocal rank fusion, min-max and Milvus' own arctangent (Bruch et al., arXiv 2210.11934,
find the same of convex combinations). A candidate that only the text route found gets its exact
cosine from the stored vector, so that no candidate is judged by half.

Where the evidence is weak, documents connected to the best ones are asked as well: their chunks become
candidates by their cosine, and what is connected gains a little, less with every hop.

Where a reranker is lent, it orders the best of what HADES lets be seen (reranking.py), and nothing else.

The sequence number is read before the routes are asked (hades.py says why).
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from opentelemetry.trace import Span

from nexus.config import Retrieval
from nexus.embedders import Embedders
from nexus.errors import InvalidRequest
from nexus.hades import Hades, live_in
from nexus.ports import Collection, Embedder, Scope, Verdict
from nexus.reranking import Reranked, Reranking
from nexus.resident import Held, Resident
from nexus.terms import shadow
from nexus.tracing import records_text, span, text, within
from nexus.types import Chunk, Document, Hit, Principal, RouteScore, SearchRequest, SearchResult, Vector
from nexus.vocabulary import FINGERPRINT, INPUT, SEQUENCE, STAGES, of_hits, of_reranking, of_retrieval

RRF_CONSTANT = 60
MAX_QUERY_CHARACTERS = 8192
MAX_K = 1000
MAX_CANDIDATES = 6400
FILTERED_DOCUMENTS = 2000  # a filter that matches more is applied to the candidates instead
GRAPH_WEIGHT = 0.2  # one hop gains a tenth of the best score: it decides near ties, and lifts nothing that fits badly
HOP_DECAY = 0.5  # a document two hops away says half as much about the question as its neighbour
GRAPH_SEEDS = 10  # candidates whose documents the walk begins at: more of them are no longer about the question
GRAPH_DOCUMENTS = 200  # what is reached, and its chunks, are scored in this process, one by one
GRAPH_CHUNKS = 2000
WEAK_COSINE = 0.4  # below it the best passage is hardly about the question (grounding.py calls such a cosine loose)
MAX_HOPS = 3

Route = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class RetrievalSettings:
    """How many candidates each route names, and how routes are weighed where a request says nothing."""

    candidates: int = 100
    embedding_weight: float = 0.7
    text_weight: float = 0.3
    fusion: str = "max"

    @classmethod
    def of(cls, config: Retrieval) -> "RetrievalSettings":
        """As the installation has them."""
        return cls(config.candidates, config.embedding_weight, config.text_weight, config.fusion)


class Candidate(NamedTuple):
    """A chunk that a route named, before anyone asked whether it may be seen."""

    chunk_id: str
    score: float
    cosine: float
    routes: Mapping[str, RouteScore]


@dataclass(frozen=True, slots=True)
class Expansion:
    """What the graph did for one search, and why: `reached` are documents with their hops and edge."""

    mode: Literal["off", "on", "auto"]
    hops: int
    expanded: bool
    why: str
    seeds: tuple[str, ...] = ()
    reached: Mapping[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """Candidates, best first, with the authority's verdict on each, and those that may be shown."""

    candidates: list[Candidate]
    verdicts: dict[str, Verdict]
    visible: list[Candidate]


@dataclass
class Retriever:
    """Answers searches over one Hades. Safe to call from several threads."""

    hades: Hades
    embedder: Embedder
    settings: RetrievalSettings
    reranking: Reranking | None = None
    others: Embedders | None = None  # of indexes that are not the configured embedder's
    resident: Resident | None = None  # what it holds is searched there, and all else in the vector store
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "route"))

    def search(self, request: SearchRequest, principal: Principal) -> SearchResult:
        """The k best visible chunks. Raises InvalidRequest, NotFound (collection), Unavailable."""
        check_request(request)
        if request.rerank and self.reranking is None:
            raise InvalidRequest("no reranker is configured here; set models.reranker", pointer="/rerank")
        with span("retrieval", {**of_retrieval(request.collection, request.k), **text(INPUT, request.query)}) as told:
            result = self._search(request, principal)
            if told.is_recording():
                told.set_attributes({SEQUENCE: result.sequence, **of_hits(result.hits, records_text())})
            return result

    def _search(self, request: SearchRequest, principal: Principal) -> SearchResult:
        clock = Clock()
        while True:
            collection = self.hades.find_collection(request.collection, principal.tenant)
            sequence = collection.sequence if request.as_of is None else request.as_of
            _check_sequence(sequence, collection)
            result = self._search_at(request, principal, collection, sequence, clock)
            # What a vacuum takes away meanwhile may have been part of the answer: then it is asked again.
            if self.hades.find_collection(request.collection, principal.tenant).horizon <= sequence:
                return result

    def _search_at(
        self, request: SearchRequest, principal: Principal, collection: Collection, sequence: int, clock: "Clock"
    ) -> SearchResult:
        scope, allowed = self._scope(request, principal, sequence)
        if scope.document_ids == ():
            nothing = Judged([], {}, [])
            nothing_found = Reranked([], False, "nothing was found")
            explain = _explanation(nothing, _decide(request, [], False), nothing_found) if request.explain else None
            return SearchResult((), sequence, clock.seconds, explain)
        wanted = max(self.settings.candidates, request.k)
        # Asked for while the text route runs, and made once however often the routes are widened.
        embedder = self._embedder_of(collection)
        embedded = cache(lambda: self._embed(embedder, request.query, clock))
        with clock.time("search"):
            held = self.resident.serving(collection, principal.tenant) if self.resident else None
        while True:
            candidates = self._candidates(request, collection, scope, wanted, clock, embedded, held)
            with clock.time("authority"):
                ids = [c.chunk_id for c in candidates]
                if held is not None:
                    verdicts = held.verdicts(principal, ids, sequence)
                else:
                    verdicts = self.hades.documents.verdicts(collection.name, principal, ids, sequence)
                visible = [c for c in candidates if verdicts[c.chunk_id] == "visible"]
                if allowed is not None:
                    document_of = self._documents_of(visible, held)
                    visible = [c for c in visible if document_of[c.chunk_id] in allowed]
            crowded_out = len(candidates) > len(visible) and len(visible) < max(request.k, self.settings.candidates)
            if not crowded_out or len(candidates) < wanted or wanted >= MAX_CANDIDATES:
                break
            wanted = min(wanted * 4, MAX_CANDIDATES)
        judged = Judged(candidates, verdicts, visible)
        has_vector = self._weights(request)[0] > 0
        graph = _decide(request, visible, has_vector)
        if graph.expanded:
            among = set(scope.document_ids) if scope.document_ids is not None else allowed
            with clock.time("graph"):
                judged, graph = self._widen(
                    request, principal, collection, sequence, judged, graph, among, embedded, held
                )  # fmt: skip
        hits, reranked = self._rank(request, principal, sequence, judged.visible, clock)
        explain = _explanation(judged, graph, reranked) if request.explain else None
        fused = tuple(hits[: request.k]) if reranked.applied else ()
        return SearchResult(tuple(reranked.hits[: request.k]), sequence, clock.seconds, explain, fused)

    def _scope(self, request: SearchRequest, principal: Principal, sequence: int) -> tuple[Scope, set[str] | None]:
        """Where the routes look; and, for a filter too wide to hand to them, the documents allowed."""
        if request.filters is None:
            return self.hades.scope(request.collection, principal), None
        documents = self.hades.documents.matching(request.collection, principal, request.filters, sequence, limit=10**9)
        if len(documents) > FILTERED_DOCUMENTS:
            return self.hades.scope(request.collection, principal), set(documents)
        return self.hades.scope(request.collection, principal, tuple(documents)), None

    def _candidates(
        self,
        request: SearchRequest,
        collection: Collection,
        scope: Scope,
        limit: int,
        clock: "Clock",
        embedded: Callable[[], Vector],
        held: Held | None,
    ) -> list[Candidate]:
        embedding_weight, text_weight = self._weights(request)
        vector = embedded() if embedding_weight and held is not None else None
        with clock.time("search"):
            if held is not None:
                rows, terms = held.rows, shadow(request.query)
                dense = [] if vector is None else _timed("search dense", rows.search_dense, vector, limit, scope)
                text = _timed("search text", rows.search_text, terms, limit, scope) if text_weight else []
            else:
                dense, text = self._ask_store(request, collection.index, scope, limit, embedded)
        cosines: Mapping[str, float] = {}
        if embedding_weight:
            with clock.time("authority"):
                cosines = self._complete(dense, text, embedded(), held)
        fusion = request.fusion or self.settings.fusion
        return fuse(dense, text, cosines, embedding_weight, text_weight, fusion)

    def _ask_store(
        self, request: SearchRequest, index: str, scope: Scope, limit: int, embedded: Callable[[], Vector]
    ) -> tuple[Route, Route]:
        """Both routes in the vector store. That of the text needs no vector: it runs there while one is made here."""
        embedding_weight, text_weight = self._weights(request)
        vectors, terms = self.hades.vectors, shadow(request.query)
        ask = within(partial(_timed, "search text", vectors.search_text))
        searching = self._pool.submit(ask, index, terms, limit, scope) if text_weight else None
        dense: Route = []
        if embedding_weight:
            dense = _timed("search dense", vectors.search_dense, index, embedded(), limit, scope)
        return dense, searching.result() if searching is not None else []

    def _embed(self, embedder: Embedder, query: str, clock: "Clock") -> Vector:
        with clock.time("embed") as told:
            told.set_attributes({FINGERPRINT: embedder.fingerprint})
            vector: Vector = embedder.embed([query], "query")[0]
        return vector

    def _embedder_of(self, collection: Collection) -> Embedder:
        """The one that made the vectors of the index that is searched."""
        if collection.fingerprint == self.embedder.fingerprint or self.others is None:
            return self.embedder
        return self.others.of(live_in(collection))

    def _weights(self, request: SearchRequest) -> tuple[float, float]:
        settings = self.settings
        embedding = settings.embedding_weight if request.embedding_weight is None else request.embedding_weight
        text = settings.text_weight if request.text_weight is None else request.text_weight
        return embedding, text

    def _complete(self, dense: Route, text: Route, vector: Vector, held: Held | None) -> dict[str, float]:
        """The exact cosine of every candidate of the union."""
        cosines = dict(dense)
        missing = [chunk_id for chunk_id, _ in text if chunk_id not in cosines]
        if missing and held is not None:
            cosines |= held.rows.cosines(missing, vector)
            missing = [chunk_id for chunk_id in missing if chunk_id not in cosines]
        stored = self.hades.documents.vectors(missing) if missing else {}
        return cosines | _cosines(stored, vector)

    def _documents_of(self, candidates: Sequence[Candidate], held: Held | None) -> dict[str, str]:
        """Which document each of those is of that are there."""
        ids = [c.chunk_id for c in candidates]
        if held is not None:
            return held.documents_of(ids)
        return {i: document.document_id for i, (_, document) in self.hades.documents.load(ids).items()}

    def _widen(
        self,
        request: SearchRequest,
        principal: Principal,
        collection: Collection,
        sequence: int,
        judged: Judged,
        graph: Expansion,
        among: set[str] | None,
        embedded: Callable[[], Vector],
        held: Held | None,
    ) -> tuple[Judged, Expansion]:
        """Candidates with those that the graph adds and lifts, of the documents in `among` where that is given."""
        documents, visible = self.hades.documents, judged.visible
        begins = self._documents_of(visible[:GRAPH_SEEDS], held)
        seeds = tuple(dict.fromkeys(begins[c.chunk_id] for c in visible if c.chunk_id in begins))
        where = (request.collection, principal)
        reached = documents.connected(*where, seeds, request.hops, sequence, GRAPH_DOCUMENTS)
        reached = {i: how for i, how in reached.items() if among is None or i in among}
        graph = replace(graph, seeds=seeds, reached=reached)
        if not reached:
            return judged, graph
        stored = documents.vectors_of(*where, list(reached), sequence, GRAPH_CHUNKS, collection.cut)
        document_of = self._documents_of(visible, held) | {i: document_id for i, (document_id, _) in stored.items()}
        new = [i for i in stored if i not in judged.verdicts]
        verdicts = judged.verdicts | documents.verdicts(request.collection, principal, new, sequence)
        embedding_weight, _ = self._weights(request)
        fusion = request.fusion or self.settings.fusion
        cosines = _cosines({i: stored[i][1] for i in new}, embedded()) if embedding_weight else {}
        added = [
            Candidate(i, embedding_weight * cosines.get(i, 0.0) if fusion != "rrf" else 0.0, cosines.get(i, 0.0), {})
            for i in new
        ]
        may_show = {c.chunk_id for c in visible} | {i for i in new if verdicts[i] == "visible"}
        near = {i: reached[document_of[i]][0] for i in may_show if document_of.get(i) in reached}
        candidates = lift([*judged.candidates, *added], near, visible[0].score)
        return Judged(candidates, verdicts, [c for c in candidates if c.chunk_id in may_show]), graph

    def _rank(
        self, request: SearchRequest, principal: Principal, sequence: int, visible: Sequence[Candidate], clock: "Clock"
    ) -> tuple[list[Hit], Reranked]:
        """The best visible hits as they were fused; and as the reranker orders them, where there is one."""
        reranking = self.reranking if request.rerank is not False else None
        wanted = request.k if reranking is None else max(request.k, reranking.candidates)
        with clock.time("authority"):
            hits = self._load(visible[:wanted], principal, sequence)
        if reranking is None:
            configured = self.reranking is not None
            return hits, Reranked(hits, False, "the request does without" if configured else "none is configured")
        with clock.time("rerank") as told:
            reranked = reranking.order(request.query, hits)
            told.set_attributes(of_reranking(reranking.name, len(hits), reranked.applied))
            return hits, reranked

    def _load(self, candidates: Sequence[Candidate], principal: Principal, sequence: int) -> list[Hit]:
        """Those of them that the document store, which has the last word, has for this principal now."""
        found = self.hades.documents.load([c.chunk_id for c in candidates])
        loaded = [(c, *found[c.chunk_id]) for c in candidates if c.chunk_id in found]
        return [_hit(*one) for one in loaded if _may_be_shown(one[2], principal, sequence)]

    def expand(self, hits: Sequence[Hit], budget: int, neighbours: int = 1) -> list[Hit]:
        """Passages for an answer: each hit with its neighbours, overlaps merged, packed to a budget.

        `budget` is in tokens of the embedder. Hits stay in order of score; one that is already part
        of a better hit's passage is dropped. The first always fits, cut down to its own chunk.
        """
        passages: list[Hit] = []
        taken: set[tuple[str, str, int]] = set()
        for hit in hits:
            if (hit.document_id, hit.version, hit.ordinal) in taken:
                continue
            around = self.hades.documents.neighbours(
                hit.document_id, hit.version, hit.ordinal - neighbours, hit.ordinal + neighbours, hit.cut
            )
            chunks = [c for c in around if _belongs(c, hit) and (c.document_id, c.version, c.ordinal) not in taken]
            cost = sum(c.piece.tokens for c in chunks)
            if cost > budget:
                chunks = [c for c in chunks if c.ordinal == hit.ordinal]
                cost = sum(c.piece.tokens for c in chunks)
                if cost > budget and passages:
                    break
            budget -= cost
            taken.update((c.document_id, c.version, c.ordinal) for c in chunks)
            passages.append(_widened(hit, chunks))
        return passages

    def close(self) -> None:
        if self.resident is not None:
            self.resident.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class Clock:
    """Seconds spent per stage of one request, and a span for each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str) -> "_Stage":
        return _Stage(self.seconds, stage)


class _Stage:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage
        self._span = span(stage, STAGES[stage])

    def __enter__(self) -> Span:
        self._started = time.perf_counter()
        return self._span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._span.__exit__(kind, error, traceback)
        spent = time.perf_counter() - self._started
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + spent


def _timed(name: str, work: Callable[..., Route], *arguments: Any) -> Route:
    with span(name):
        return work(*arguments)


def check_request(request: SearchRequest) -> None:
    """Refuse what cannot be meant, before any work is done."""
    if not request.query.strip():
        raise InvalidRequest("the query is empty; ask something", pointer="/query")
    if len(request.query) > MAX_QUERY_CHARACTERS:
        raise InvalidRequest(f"a query has at most {MAX_QUERY_CHARACTERS} characters", pointer="/query")
    if not 1 <= request.k <= MAX_K:
        raise InvalidRequest(f"k is a whole number from 1 to {MAX_K}", pointer="/k")
    weights = (request.embedding_weight, request.text_weight)
    if any(w is not None and not 0 <= w <= 1 for w in weights):
        raise InvalidRequest("a weight is a number from 0 to 1", pointer="/hybrid")
    if weights == (0, 0):
        raise InvalidRequest("at least one weight must be above 0", pointer="/hybrid")
    if not 1 <= request.hops <= MAX_HOPS:
        raise InvalidRequest(f"hops is a whole number from 1 to {MAX_HOPS}", pointer="/hops")
    if request.as_of is not None and request.as_of < 0:
        raise InvalidRequest("as_of is a sequence number, 0 or more", pointer="/as_of")


def _check_sequence(sequence: int, collection: Collection) -> None:
    """Refuse a moment that is still to come, and one of which versions are missing."""
    if sequence > collection.sequence:
        raise InvalidRequest(
            f"as_of is {sequence}, but the collection is only at {collection.sequence}", pointer="/as_of"
        )
    if sequence < collection.horizon:
        raise InvalidRequest(
            f"as_of {sequence} is no longer kept; the oldest that can be asked for is {collection.horizon}",
            pointer="/as_of", code="as_of_gone",
        )  # fmt: skip


def fuse(
    dense: Route, text: Route, cosines: Mapping[str, float], embedding_weight: float, text_weight: float, fusion: str
) -> list[Candidate]:
    """Both routes as one list, best first; ties are broken by chunk id, so that order is a fact.

    "max": embedding_weight * cosine + text_weight * bm25 / best bm25 of the query; a chunk that the
    text route did not name has bm25 0. "rrf": weight / (60 + rank), summed over the routes.
    """
    routes = {chunk_id: {"dense": RouteScore(rank, score)} for rank, (chunk_id, score) in enumerate(dense, 1)}
    for rank, (chunk_id, score) in enumerate(text, 1):
        routes.setdefault(chunk_id, {})["text"] = RouteScore(rank, score)
    best = max((score for _, score in text), default=0.0)
    weights = {"dense": embedding_weight, "text": text_weight}
    fused = []
    for chunk_id, places in routes.items():
        cosine = cosines.get(chunk_id, 0.0)
        if fusion == "rrf":
            score = sum(weights[name] / (RRF_CONSTANT + place.rank) for name, place in places.items())
        elif best > 0 and "text" in places:
            score = embedding_weight * cosine + text_weight * (places["text"].score / best)
        else:
            score = embedding_weight * cosine
        fused.append(Candidate(chunk_id, score, cosine, places))
    return sorted(fused, key=lambda c: (-c.score, c.chunk_id))


def lift(candidates: Sequence[Candidate], hops: Mapping[str, int], best: float) -> list[Candidate]:
    """All candidates in their new order, where those named by the graph gain by their nearness to the best.

    The graph ranks by nearness (`best` halved with every hop), then by cosine. A part of the nearness is
    added to the score, whichever way that was fused: nearness is measured in scores of the same fusion.
    Where scores are equal, as those of "rrf" are for all that only the graph named, the cosine decides.
    """
    near = {chunk_id: best * HOP_DECAY**away for chunk_id, away in hops.items()}
    named = sorted(
        (c for c in candidates if c.chunk_id in near), key=lambda c: (hops[c.chunk_id], -c.cosine, c.chunk_id)
    )
    places = {c.chunk_id: RouteScore(rank, near[c.chunk_id]) for rank, c in enumerate(named, 1)}
    lifted = [
        c._replace(score=c.score + GRAPH_WEIGHT * near[c.chunk_id], routes={**c.routes, "graph": places[c.chunk_id]})
        if c.chunk_id in near
        else c
        for c in candidates
    ]
    return sorted(lifted, key=lambda c: (-c.score, -c.cosine, c.chunk_id))


def _decide(request: SearchRequest, visible: Sequence[Candidate], has_vector: bool) -> Expansion:
    """Whether the graph is walked. Where no vector was asked, how many were found is all there is to judge by."""
    strongest = max((c.cosine for c in visible), default=0.0)
    if request.graph == "off":
        expanded, why = False, "it is switched off"
    elif not visible:
        expanded, why = False, "nothing was found to begin at"
    elif request.graph == "on":
        expanded, why = True, "it was asked for"
    elif len(visible) < request.k:
        expanded, why = True, f"only {len(visible)} of {request.k} were found without it"
    elif has_vector and strongest < WEAK_COSINE:
        expanded, why = True, f"the best cosine is {strongest:.2f}, below {WEAK_COSINE}"
    else:
        expanded, why = False, "the evidence is strong enough without it"
    return Expansion(request.graph, request.hops, expanded, why)


def _cosines(stored: Mapping[str, Vector], vector: Vector) -> dict[str, float]:
    if not stored:
        return {}
    return dict(zip(stored, (np.stack(list(stored.values())) @ vector).tolist(), strict=True))


def _may_be_shown(document: Document, principal: Principal, sequence: int) -> bool:
    """Whether nothing that is known of a version, as it was opened last, speaks against showing it."""
    is_theirs = document.tenant == principal.tenant and principal.may_read(document.readers)
    return is_theirs and (document.closed is None or document.closed > sequence)


def _hit(candidate: Candidate, chunk: Chunk, document: Document) -> Hit:
    piece = chunk.piece
    return Hit(
        chunk.chunk_id, chunk.document_id, chunk.version, chunk.ordinal, candidate.score, candidate.cosine,
        piece.text, document.title, document.source, piece.heading, piece.page, piece.first_line,
        piece.last_line, document.metadata, candidate.routes, tuple(sorted(document.readers)), cut=chunk.cut,
    )  # fmt: skip


def _belongs(chunk: Chunk, hit: Hit) -> bool:
    """A neighbour helps when it stands under the same heading; another section is another subject."""
    return chunk.ordinal == hit.ordinal or chunk.piece.heading == hit.heading


def _widened(hit: Hit, chunks: Sequence[Chunk]) -> Hit:
    def first(values: Iterable[int | None], choose: Callable[[list[int]], int]) -> int | None:
        known = [v for v in values if v is not None]
        return choose(known) if known else None

    return replace(
        hit,
        text="\n\n".join(c.piece.text for c in chunks) or hit.text,
        first_line=first((c.piece.first_line for c in chunks), min),
        last_line=first((c.piece.last_line for c in chunks), max),
    )


def _explanation(judged: Judged, graph: Expansion, reranked: Reranked) -> dict[str, object]:
    """Every candidate that may be known of, its places, and what became of it; and what graph and reranker did."""
    verdicts, visible = judged.verdicts, {c.chunk_id for c in judged.visible}
    return {
        "candidates": [
            {
                "chunk_id": c.chunk_id,
                "score": c.score,
                "cosine": c.cosine,
                "routes": {name: {"rank": r.rank, "score": r.score} for name, r in c.routes.items()},
                "removed_by": None if c.chunk_id in visible else _reason(verdicts.get(c.chunk_id, "unknown")),
            }
            for c in judged.candidates
            if verdicts.get(c.chunk_id) not in ("other tenant", "not a reader")
        ],
        "graph": {
            "mode": graph.mode,
            "expanded": graph.expanded,
            "why": graph.why,
            "hops": graph.hops,
            "seeds": list(graph.seeds),
            "reached": [{"document_id": i, "hops": away, "edge": edge} for i, (away, edge) in graph.reached.items()],
        },
        "rerank": {"applied": reranked.applied, "why": reranked.why, "fallback": reranked.fallback},
    }


def _reason(verdict: Verdict) -> str:
    return "filter" if verdict == "visible" else verdict
