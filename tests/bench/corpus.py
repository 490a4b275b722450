"""The scifact collection, as the benches read it from the folder of shared data."""

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.bench.harness import find_data


@dataclass(frozen=True)
class Judged:
    """Documents by id, queries by id, and for each query the gain of each relevant document."""

    documents: dict[str, str]
    queries: dict[str, str]
    gains: dict[str, dict[str, int]]


def scifact(judgements: str = "qrels_test.tsv") -> Judged:
    """5183 abstracts, title and text in one string, and the claims judged in the given file."""
    folder = find_data("scifact")
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    gains: dict[str, dict[str, int]] = {}
    for line in (folder / judgements).read_text().splitlines()[1:]:
        query, document, gain = line.split("\t")
        gains.setdefault(query, {})[document] = int(gain)
    asked = (json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines())
    queries = {query["_id"]: query["text"] for query in asked if query["_id"] in gains}
    return Judged({row["_id"]: f"{row['title']} {row['text']}".strip() for row in rows}, queries, gains)


def ndcg(ranking: Sequence[str], gains: Mapping[str, int], depth: int = 10) -> float:
    """Normalised discounted cumulative gain with linear gain (Järvelin and Kekäläinen, 2002)."""
    found = sum(gains.get(document, 0) / math.log2(place + 2) for place, document in enumerate(ranking[:depth]))
    best = sorted(gains.values(), reverse=True)[:depth]
    return found / sum(gain / math.log2(place + 2) for place, gain in enumerate(best))
