"""The rows of one tenant in one index, in this process: exact cosine over one matrix, BM25 over postings.

It finds what stores/memory.py finds, and as that does, counts words among the rows that a search may find, and no
others: what is rare says nothing of what others may read.

A search works on one frozen state. Rows are appended beyond what any state shows, and then a state that shows them
takes the place of the one before; what is removed is only marked, until `tidy` makes everything anew without it. What
replaces something is in the state that has that no more.
Postings are in segments, each sorted by term; a segment is merged with the one before it once it is a quarter as large.

A search for words goes through the postings of rare ones first, and asks those of common ones only about rows that may
still be among the best.

Above COARSE_ROWS a dense search first scores 8-bit codes of all rows, and then exactly those that may be among the
best. Both roundings are of random sign, so that a score is wrong by more than eight standard deviations about never;
where rows that were not scored exactly might belong to the best by as much, all are scored exactly.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import log, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from nexus.ports import IndexRow, Scope, require_dimension
from nexus.snapshot import Snapshot
from nexus.types import Vector, Vectors

K1, B = 1.2, 0.75
COARSE_ROWS = 16_384
COARSE_GROWTH = 1.25  # the codes are made anew once there are this much more rows
CODES, ZERO = 127, 128  # the largest, and what faiss has for none
CODED_AT_ONCE = 256  # rows that stay in a processor's cache meanwhile
DEVIATIONS = 8
MERGED_FROM = 0.25
GATHERED = 8  # a scope of less than an eighth of the rows is scored row by row
LOOKED_UP = 32  # a term that more than one of so many rows has is common
FEWER = 8  # times fewer rows are looked up one by one
ROUNDED = 1e-5  # by more than this part of them, sums of scores are not wrong
SEGMENT = ("terms", "starts", "rows", "counts")  # the arrays of one
FIRST_CAPACITY, GROWTH = 64, 1.5
GONE = -1
BYTES_PER_ROW = 1200  # beside the vector and its code: ids, postings and Python's objects, of a chunk of usual length
BYTES_OF_NAMES = 350

Found = list[tuple[str, float]]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Segment:
    """How often terms stand in some rows: of term `terms[i]`, in the rows of `rows[starts[i]:starts[i + 1]]`."""

    terms: Ints
    starts: Ints
    rows: Ints
    counts: Counts

    @classmethod
    def sort(cls, terms: Ints, rows: Ints, counts: Counts) -> "Segment":
        """From postings in order of rows."""
        order = np.argsort(terms, kind="stable")
        found, starts = np.unique(terms[order], return_index=True)
        return cls(found, np.append(starts, len(order)), rows[order], counts[order])

    def spread(self) -> Ints:
        """The term of each posting."""
        return np.repeat(self.terms, np.diff(self.starts))

    def postings(self, term: int) -> tuple[Ints, Counts]:
        place = int(self.terms.searchsorted(self.terms.dtype.type(term)))  # a plain int has all terms converted
        if place == len(self.terms) or self.terms[place] != term:
            return self.rows[:0], self.counts[:0]
        part = slice(int(self.starts[place]), int(self.starts[place + 1]))
        return self.rows[part], self.counts[part]

    @property
    def nbytes(self) -> int:
        return self.terms.nbytes + self.starts.nbytes + self.rows.nbytes + self.counts.nbytes


class Coarse:
    """8-bit codes of the first `count` rows, and how far a score of them may be from the exact one."""

    def __init__(self, vectors: Vectors) -> None:
        faiss = _faiss()
        self.count, dimension = vectors.shape
        self._scale = CODES / max(float(vectors.max()), -float(vectors.min()), 1e-9)
        codes, worst = np.empty(vectors.shape, np.uint8), 0.0
        for start in range(0, self.count, CODED_AT_ONCE):
            exact = vectors[start : start + CODED_AT_ONCE] * self._scale
            rounded = np.rint(exact)
            codes[start : start + CODED_AT_ONCE] = rounded + ZERO
            exact -= rounded
            worst = max(worst, float(np.einsum("ij,ij->i", exact, exact).max()))
        self._error = sqrt(worst) / self._scale
        self._codes: Any = faiss.IndexScalarQuantizer(
            dimension, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
        )
        self._codes.add_sa_codes(codes)
        self.nbytes = self.count * dimension

    def search(self, vector: Vector, limit: int, mask: Mask | None) -> tuple[Ints, float]:
        """So many rows with the best coarse scores, and what the exact score of any other is at most."""
        faiss = _faiss()
        scale = CODES / max(float(np.abs(vector).max()), 1e-9)
        query = np.rint(vector * scale)
        error = np.hypot(self._error, float(np.linalg.norm(vector - query / scale)))
        params = None
        if mask is not None:
            bits = np.packbits(mask[: self.count], bitorder="little")
            params = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        scores, rows = self._codes.search(query[np.newaxis], limit, params=params)
        found = rows[0] >= 0
        if not found.all():
            return rows[0][found], -np.inf
        worst = float(scores[0][-1]) / (scale * self._scale)
        return rows[0], worst + DEVIATIONS * float(error) / np.sqrt(len(vector))


@dataclass(frozen=True, slots=True)
class Postings:
    """How often a term stands in those rows that a search may find; no row's score of it is as high as `weight`."""

    term: int
    parts: list[tuple[Ints, Counts]]  # rows, in order, and counts
    holders: int
    weight: np.float32


@dataclass(frozen=True, slots=True)
class State:
    """What a search sees. Arrays and lists may go on beyond `count`; `documents` may name rows beyond it."""

    count: int
    gone: int
    vectors: Vectors
    audiences: Ints
    lengths: npt.NDArray[np.float32]
    total: float  # of the lengths of all rows but those that are gone
    ids: list[str]
    places: dict[str, int]  # chunk id -> row
    documents: dict[str, list[int]]
    terms: dict[str, int]
    segments: tuple[Segment, ...]
    coarse: Coarse | None


def empty(dimension: int) -> State:
    """A state without rows."""
    return State(
        0, 0, np.zeros((0, dimension), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32), 0.0,
        [], {}, {}, {}, (), None,
    )  # fmt: skip


class Rows:
    """The rows of one tenant. Searches run beside each other and beside one writer."""

    def __init__(self, index: str, dimension: int) -> None:
        self.index, self.dimension = index, dimension
        self._audiences: dict[str, int] = {}
        self._state = empty(dimension)
        self._writing = threading.RLock()

    # ── changing them ───────────────────────────────────────────────────────────────────────────

    def upsert(self, rows: Sequence[IndexRow]) -> None:
        require_dimension(self.index, self.dimension, [row.vector for row in rows])
        last = {row.chunk_id: row for row in rows}
        if last:
            with self._writing:
                before = _without(self._state, last)
                self._state = self._append(before, list(last.values()))

    def delete(self, chunk_ids: Iterable[str]) -> None:
        """Find them no more. Ids that are not there are passed over."""
        with self._writing:
            self._state = _without(self._state, chunk_ids)

    def admit(self, chunk_ids: Iterable[str], audience: str) -> None:
        """Let these rows, as far as they are there, be for others than before."""
        with self._writing:
            state = self._state
            audiences = state.audiences.copy()
            audiences[[state.places[i] for i in chunk_ids if i in state.places]] = self._code(audience)
            self._state = replace(state, audiences=audiences)

    def tidy(self, whole: bool = False) -> None:
        """Do what makes searches fast; leave nothing in memory of what was deleted if that is much, or if `whole`."""
        with self._writing:
            state = self._state
            if state.gone and (whole or 4 * state.gone > state.count):
                self._state = state = _without_gone(state)
            too_few = state.count < COARSE_ROWS or (
                state.coarse is not None and state.count < COARSE_GROWTH * state.coarse.count
            )
        if not too_few:
            coarse = Coarse(state.vectors[: state.count])
            with self._writing:
                if self._state.ids is state.ids:
                    self._state = replace(self._state, coarse=coarse)

    def _append(self, state: State, rows: list[IndexRow]) -> State:
        first, count = state.count, state.count + len(rows)
        state = _with_room(state, count)
        state.vectors[first:count] = [row.vector for row in rows]
        audiences = state.audiences.copy()
        audiences[first:count] = [self._code(row.audience) for row in rows]
        segment, lengths = _segment(first, rows, state.terms)
        state.lengths[first:count] = lengths
        for place, row in enumerate(rows, first):
            state.ids.append(row.chunk_id)
            state.places[row.chunk_id] = place
            state.documents.setdefault(row.document_id, []).append(place)
        segments = _merged((*state.segments, segment))
        total = state.total + float(lengths.sum())
        return replace(state, count=count, audiences=audiences, total=total, segments=segments)

    def _code(self, audience: str) -> int:
        return self._audiences.setdefault(audience, len(self._audiences))

    # ── searching them ──────────────────────────────────────────────────────────────────────────

    def search_dense(self, vector: Vector, limit: int, scope: Scope) -> Found:
        """(chunk id, cosine), best first, then by id."""
        require_dimension(self.index, self.dimension, [vector])
        state, vector = self._state, np.ascontiguousarray(vector, np.float32)
        mask, count = self._allowed(state, scope)
        if not count:
            return []
        rows: Ints | None = None
        if mask is not None and GATHERED * count < state.count:
            rows = np.flatnonzero(mask)
        elif state.coarse is not None:
            rows = _promising(state, state.coarse, vector, limit, mask)
        elif mask is not None:
            rows = np.flatnonzero(mask)
            return _best(state, (state.vectors[: state.count] @ vector)[rows], rows, limit)
        if rows is None:
            return _best(state, state.vectors[: state.count] @ vector, None, limit)
        return _best(state, state.vectors[rows] @ vector, rows, limit)

    def search_text(self, terms: str, limit: int, scope: Scope) -> Found:
        """(chunk id, BM25 score), best first, then by id; scores are positive."""
        state = self._state
        mask, count = self._allowed(state, scope)
        known = {state.terms[term] for term in terms.split() if term in state.terms}
        if not count or not known:
            return []
        total = state.total if mask is None else float(state.lengths[: state.count][mask].sum())
        rows, scores = _best_by_terms(
            state, [_postings(state, term, mask, count) for term in known], limit, total / count
        )
        return _best(state, scores, rows, limit)

    def cosines(self, chunk_ids: Sequence[str], vector: Vector) -> dict[str, float]:
        """Of those that are there."""
        state = self._state
        places = [(i, place) for i in chunk_ids if (place := state.places.get(i, state.count)) < state.count]
        if not places:
            return {}
        scores = state.vectors[[place for _, place in places]] @ np.asarray(vector, np.float32)
        return dict(zip((i for i, _ in places), scores.tolist(), strict=True))

    def _allowed(self, state: State, scope: Scope) -> tuple[Mask | None, int]:
        """Which rows a scope names, None where it is all of them; and how many these are."""
        codes = [code for one in (scope.tenant, *scope.audiences) if (code := self._audiences.get(one)) is not None]
        if not codes or scope.document_ids == ():
            return None, 0
        if len(codes) == len(self._audiences) and not state.gone and scope.document_ids is None:
            return None, state.count
        wanted = np.zeros(len(self._audiences) + 1, np.bool_)  # the last is what GONE leads to
        wanted[codes] = True
        audiences = state.audiences[: state.count]
        if scope.document_ids is None:
            mask: Mask = wanted[audiences]
        else:
            mask = np.zeros(state.count, np.bool_)
            found = [row for i in scope.document_ids for row in state.documents.get(i, ()) if row < state.count]
            mask[found] = wanted[audiences[found]]
        return mask, int(np.count_nonzero(mask))

    # ── in a file ───────────────────────────────────────────────────────────────────────────────

    def freeze(self) -> Snapshot:
        """All of them as they are now, and nothing of what was deleted."""
        with self._writing:
            state = self._state
            if state.gone:
                state = _without_gone(state)
            number_of = {place: n for n, places in enumerate(state.documents.values()) for place in places}
            about = {
                "index": self.index, "dimension": self.dimension, "audiences": list(self._audiences),
                "ids": list(state.ids), "documents": list(state.documents), "terms": list(state.terms),
            }  # fmt: skip
        arrays = {name: getattr(state, name)[: state.count] for name in ("vectors", "audiences", "lengths")}
        arrays["numbers"] = np.array([number_of[place] for place in range(state.count)], np.int32)
        for number, segment in enumerate(state.segments):
            arrays |= {f"{number} {name}": getattr(segment, name) for name in SEGMENT}
        return Snapshot(about, arrays)

    @classmethod
    def thaw(cls, snapshot: Snapshot) -> "Rows":
        """The rows that were frozen."""
        about, arrays = snapshot.about, snapshot.arrays
        rows, ids = cls(about["index"], about["dimension"]), about["ids"]
        documents: dict[str, list[int]] = {document_id: [] for document_id in about["documents"]}
        places = list(documents.values())
        for place, number in enumerate(arrays["numbers"].tolist()):
            places[number].append(place)
        rows._audiences = {audience: code for code, audience in enumerate(about["audiences"])}
        segments = tuple(
            Segment(*(arrays[f"{number} {name}"] for name in SEGMENT)) for number in range(len(arrays) // len(SEGMENT))
            if f"{number} terms" in arrays
        )  # fmt: skip
        rows._state = State(
            len(ids), 0, arrays["vectors"], arrays["audiences"], arrays["lengths"], float(arrays["lengths"].sum()),
            ids, {i: place for place, i in enumerate(ids)}, documents,
            {term: number for number, term in enumerate(about["terms"])}, segments, None,
        )  # fmt: skip
        return rows

    # ── how large they are ──────────────────────────────────────────────────────────────────────

    def __len__(self) -> int:
        return self._state.count - self._state.gone

    @property
    def chunk_ids(self) -> set[str]:
        return set(self._state.places)

    @property
    def nbytes(self) -> int:
        """About what it takes of memory."""
        state = self._state
        arrays = state.vectors.nbytes + state.audiences.nbytes + state.lengths.nbytes
        postings = sum(segment.nbytes for segment in state.segments) + 150 * len(state.terms)
        return arrays + postings + BYTES_OF_NAMES * state.count + (state.coarse.nbytes if state.coarse else 0)


def _faiss() -> Any:
    """Loaded by who has enough rows to need it."""
    return import_module("faiss")


def estimated_bytes(rows: int, dimension: int) -> int:
    """About what so many rows will take."""
    return rows * (5 * dimension + BYTES_PER_ROW)


def _promising(state: State, coarse: Coarse, vector: Vector, limit: int, mask: Mask | None) -> Ints | None:
    """The rows among which the best are; None where it takes all to know."""
    wanted = 4 * limit + 64
    if 4 * wanted > coarse.count:
        return None if mask is None else np.flatnonzero(mask)
    rows, others = coarse.search(vector, wanted, mask)
    if len(rows) == wanted:
        sure = np.partition(state.vectors[rows] @ vector, -limit)[-limit]
        if sure < others:
            return None if mask is None else np.flatnonzero(mask)
    later = np.arange(coarse.count, state.count)
    return np.concatenate([rows, later if mask is None else later[mask[coarse.count :]]])


def _postings(state: State, term: int, mask: Mask | None, count: int) -> Postings:
    """Of one term, in the `count` rows that are allowed."""
    parts = [found for segment in state.segments if len((found := segment.postings(term))[0])]
    if mask is not None:
        parts = [(rows[allowed], counts[allowed]) for rows, counts in parts if (allowed := mask[rows]).any()]
    holders = sum(len(rows) for rows, _ in parts)
    weight = (K1 + 1) * log(1 + (count - holders + 0.5) / (holders + 0.5))
    return Postings(term, parts, holders, np.float32(weight))


def _best_by_terms(
    state: State, postings: Iterable[Postings], limit: int, usual: float
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Rows among which the best `limit` are, and their BM25 scores; `usual` is the mean length of those allowed.

    Rare terms come first. As soon as what is left of the terms cannot lift a row into the best, only rows that may yet
    be among them are looked up in the long lists of common terms (MaxScore: Turtle and Flood, 1995).
    """
    ordered = sorted(postings, key=lambda one: (one.holders, one.term))
    norms = K1 * (1 - B) + (K1 * B / (usual or 1.0)) * state.lengths[: state.count]
    scores = np.zeros(state.count, np.float32)
    done, left = 0.0, float(sum(one.weight for one in ordered))
    rows: Ints | None = None
    for one in ordered:
        if rows is not None or (done > left and LOOKED_UP * one.holders > state.count):
            rows = _hopeful(scores, rows, limit, left)
        for some, counts in one.parts:
            if rows is not None and FEWER * len(rows) < len(some):
                some, counts = _those(rows, some, counts)
            scores[some] += one.weight * counts / (counts + norms[some])
        done, left = done + float(one.weight), left - float(one.weight)
    rows = _above_none(scores) if rows is None else rows
    return rows, scores[rows]


def _above_none(scores: npt.NDArray[np.float32]) -> Ints:
    """Of the type that postings have them in, so that none has to be converted."""
    return np.flatnonzero(scores > 0).astype(np.int32)


def _those(wanted: Ints, rows: Ints, counts: Counts) -> tuple[Ints, Counts]:
    """Of these rows, in order, the wanted ones, which are in order too; and their counts."""
    places = rows.searchsorted(wanted)
    places = places[rows.take(places, mode="clip") == wanted]
    return rows[places], counts[places]


def _hopeful(scores: npt.NDArray[np.float32], rows: Ints | None, limit: int, left: float) -> Ints | None:
    """Of the rows so far, those that may be among the best; None where any other may, as what is left is so much."""
    found = _above_none(scores) if rows is None else rows
    if len(found) <= limit:
        return rows
    held = scores[found]
    sure = float(np.partition(held, -limit)[-limit])
    rounded = ROUNDED * (sure + left)
    if rows is None and left + rounded >= sure:
        return None
    return found[held >= sure - left - rounded]


def _best(state: State, scores: npt.NDArray[np.float32], rows: Ints | None, limit: int) -> Found:
    """The best of these rows, or of all."""
    if len(scores) > limit:
        chosen = np.flatnonzero(scores >= np.partition(scores, -limit)[-limit])
    else:
        chosen = np.arange(len(scores))
    places = chosen if rows is None else rows[chosen]
    found = zip((-scores[chosen]).tolist(), (state.ids[place] for place in places.tolist()), strict=True)
    return [(chunk_id, -worse) for worse, chunk_id in sorted(found)[:limit]]


def _without(state: State, chunk_ids: Iterable[str]) -> State:
    """The same rows but for these."""
    gone = [place for i in chunk_ids if (place := state.places.pop(i, None)) is not None]
    if not gone:
        return state
    audiences, total = state.audiences.copy(), state.total - float(state.lengths[gone].sum())
    audiences[gone] = GONE
    return replace(state, audiences=audiences, gone=state.gone + len(gone), total=total)


def _segment(first: int, rows: Sequence[IndexRow], terms: dict[str, int]) -> tuple[Segment, npt.NDArray[np.float32]]:
    """Postings of new rows, and how long each is; new terms get the next numbers."""
    lengths = np.zeros(len(rows), np.float32)
    numbers: list[int] = []
    counts: list[int] = []
    sizes = []
    for place, row in enumerate(rows):
        counted = Counter(row.terms.split())
        lengths[place] = counted.total()
        numbers += [terms.setdefault(term, len(terms)) for term in counted]
        counts += counted.values()
        sizes.append(len(counted))
    places = np.repeat(np.arange(first, first + len(rows), dtype=np.int32), sizes)
    capped = np.minimum(np.array(counts, np.int64), np.iinfo(np.uint16).max).astype(np.uint16)
    return Segment.sort(np.array(numbers, np.int32), places, capped), lengths


def _merged(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The same postings, of later rows in ever smaller segments."""
    *before, last = segments
    while before and len(last.rows) >= MERGED_FROM * len(before[-1].rows):
        one = before.pop()
        terms = np.concatenate([one.spread(), last.spread()])
        rows, counts = np.concatenate([one.rows, last.rows]), np.concatenate([one.counts, last.counts])
        last = Segment.sort(terms, rows, counts)
    return (*before, last)


def _with_room(state: State, count: int) -> State:
    """The same rows in arrays that have room for so many."""
    if count <= len(state.vectors):
        return state
    room = max(count, FIRST_CAPACITY, int(GROWTH * len(state.vectors)))
    vectors, audiences, lengths = (
        _grown(array, state.count, room) for array in (state.vectors, state.audiences, state.lengths)
    )
    return replace(state, vectors=vectors, audiences=audiences, lengths=lengths)


def _grown(array: npt.NDArray[Any], count: int, room: int) -> npt.NDArray[Any]:
    wider = np.zeros((room, *array.shape[1:]), array.dtype)
    wider[:count] = array[:count]
    return wider


def _without_gone(state: State) -> State:
    """Made anew of the rows that are still there, and of the terms in them."""
    alive = state.audiences[: state.count] != GONE
    kept, moved = np.flatnonzero(alive), np.cumsum(alive, dtype=np.int32) - 1
    document_of = {place: i for i, places in state.documents.items() for place in places if place < state.count}
    ids = [state.ids[place] for place in kept.tolist()]
    documents: dict[str, list[int]] = {}
    for place, old in enumerate(kept.tolist()):
        documents.setdefault(document_of[old], []).append(place)
    terms = np.concatenate([segment.spread() for segment in state.segments])
    rows = np.concatenate([segment.rows for segment in state.segments])
    counts = np.concatenate([segment.counts for segment in state.segments])
    stays = alive[rows]
    used = np.unique(terms[stays])
    names = list(state.terms)
    order = np.argsort(rows[stays], kind="stable")
    fresh = np.searchsorted(used, terms[stays]).astype(np.int32)
    segment = Segment.sort(fresh[order], moved[rows[stays]][order], counts[stays][order])
    return State(
        len(kept), 0, state.vectors[kept], state.audiences[kept], state.lengths[kept], state.total,
        ids, {i: place for place, i in enumerate(ids)}, documents,
        {names[term]: number for number, term in enumerate(used.tolist())}, (segment,), None,
    )  # fmt: skip
