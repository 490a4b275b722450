"""What a user would pick instead, beside Nexus: the same files, questions, model and processor, in rotated order.

    python -m tests.bench.peers                                     about an hour, and the first time some minutes more
    python -m tests.bench.peers --documents 300 --rounds 1          a quick look
    python -m tests.bench.peers --systems txtai,Nexus,"nexus up"    only these

LlamaIndex, Haystack, LangChain and txtai run each in an environment of its own, made once in --folder from the pins
beside this file, at their defaults and tuned (half precision, small batches). Nexus runs as it is by default: with all
its parts in one process, and whole, as `nexus up` starts it. Whichever is measured has the machine for itself.

Ingestion is a folder of scifact's abstracts as text files, through each system's own loader and splitter, until they
are on the disk by the system's own means and a question was answered. Searches ask for ten passages: one at a time, and
eight at once; in the process, and over HTTP, for which a peer gets a plain server of the standard library that answers
with names alone. nDCG@10 is of the different files among a hundred passages, so that nobody's splitter decides it.
A ratio compares with the best peer of the same round, whichever and however set that is; figures are medians of rounds.
"""

import os

os.environ.setdefault("BENCH_THREADS", str(os.cpu_count()))  # as every one of them would have by itself

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import argparse
import http.client
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

from platformdirs import user_cache_path

from nexus import __version__
from nexus.models.sentence_transformer import find_model
from tests.bench.corpus import Judged, ndcg, scifact
from tests.bench.peer import WAYS, rate, time_each
from tests.bench.quality import PACKAGES
from tests.running import ROOT, Running, running_nexus

HERE = Path(__file__).parent
PEERS = ("LlamaIndex", "Haystack", "LangChain", "txtai")
IN_PROCESS, WHOLE = "Nexus", "nexus up"
K, DEPTH, CALLERS = 10, 100, 8

Choose = Callable[[Iterable[float]], float]


@dataclass(frozen=True)
class Subject:
    """A system, and whether it is tuned."""

    name: str
    tuned: bool = False

    def __str__(self) -> str:
        return f"{self.name} tuned" if self.tuned else self.name


@dataclass(frozen=True)
class Measured:
    """One system's one way to search, in one round, in its process and over HTTP; NaN is what was not measured.

    Times are in milliseconds, rates in queries a second.
    """

    subject: Subject
    way: str
    version: str
    files_per_second: float
    ndcg: float
    p50: float = math.nan
    p95: float = math.nan
    rate: float = math.nan
    http_p50: float = math.nan
    http_rate: float = math.nan


@dataclass(frozen=True)
class Work:
    """What every system is given."""

    folder: Path  # of text files, each named by the id of its document
    judged: Judged

    @property
    def queries(self) -> list[str]:
        return list(self.judged.queries.values())

    def quality(self, found: Sequence[Sequence[str]]) -> float:
        """Mean nDCG@10 of what each query found, a name once."""
        rankings = zip(self.judged.queries, found, strict=True)
        return mean(ndcg(list(dict.fromkeys(names)), self.judged.gains[query]) for query, names in rankings)


def prepare(folder: Path, documents: int, queries: int | None) -> Work:
    """The judged documents first, then others, so that every query has an answer; as files."""
    whole = scifact()
    asked = dict(itertools.islice(whole.queries.items(), queries))
    judged = {document for query in asked for document in whole.gains[query]}
    order = sorted(whole.documents, key=lambda document: document not in judged)
    kept = {document: whole.documents[document] for document in order[: max(documents, len(judged))]}
    folder.mkdir()
    for document, text in kept.items():
        (folder / f"{document}.txt").write_text(text, encoding="utf-8")
    return Work(folder, Judged(kept, asked, whole.gains))


# ── environments ────────────────────────────────────────────────────────────────────────────────────


def interpreter(peer: str, folder: Path) -> Path | None:
    """The Python of a peer's environment, made where it is not there or of other pins; None where that fails."""
    pins, home = HERE / f"requirements-{peer.lower()}.txt", folder / peer.lower()
    python, installed = home / "bin" / "python", home / "installed.txt"
    if installed.exists() and installed.read_bytes() == pins.read_bytes():
        return python
    print(f"{peer}: installing into {home}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", pins], check=True)
        subprocess.run([python, "-m", "pip", "check"], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"{peer}: left out, for it could not be installed: {error}", file=sys.stderr, flush=True)
        return None
    shutil.copy(pins, installed)
    return python


# ── a system in a process of its own ────────────────────────────────────────────────────────────────


class Told:
    """A process of tests/bench/peer.py, as its methods."""

    def __init__(self, subject: Subject, python: Path, home: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NEXUS_")}
        environment |= {
            "TRANSFORMERS_OFFLINE": "1", "HAYSTACK_TELEMETRY_ENABLED": "False", "LANGCHAIN_TRACING_V2": "false",
            "LANGSMITH_TRACING": "false", "PYTHONPATH": str(ROOT) if subject.name == IN_PROCESS else "",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [python, "-P", HERE / "peer.py", subject.name], text=True, env=environment, cwd=home,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        model = str(find_model(harness.EMBEDDER)[1])
        self.version: str = self._say(model=model, home=str(home), threads=harness.THREADS, tuned=subject.tuned)

    def __call__(self, order: str, **arguments: object) -> Any:
        return self._say(do=order, **arguments)

    def _say(self, **line: object) -> Any:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(line), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}; what it said is above")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()  # it has nothing to lose
        self._process.communicate()


def measure_process(subject: Subject, python: Path, work: Work, home: Path) -> list[Measured]:
    """The hundred passages are asked for first, which warms whatever there is to warm."""
    system = Told(subject, python, home)
    try:
        seconds = system("ingest", folder=str(work.folder), query=work.queries[0])
        speed, found = len(work.judged.documents) / seconds, []
        for way in WAYS:
            quality = work.quality(system("find", way=way, queries=work.queries, k=DEPTH))
            spent, per_second = system("time", way=way, queries=work.queries, k=K, callers=CALLERS)
            row = Measured(
                subject, way, system.version, speed, quality, median(spent), harness.percentile(spent, 0.95), per_second
            )
            if subject.name != IN_PROCESS:  # whose door is that of the whole
                p50, per_second = time_http(Asked(system("serve", way=way, k=K), "/", {}, {}), work.queries)
                row = replace(row, http_p50=p50, http_rate=per_second)
            found.append(row)
        return found
    finally:
        system.close()


# ── over HTTP ───────────────────────────────────────────────────────────────────────────────────────


class Asked:
    """A search over HTTP, a kept connection a thread; as plain as can be, for a client's time is the server's loss."""

    def __init__(self, port: int, path: str, headers: dict[str, str], body: dict[str, object]) -> None:
        self._port, self._path, self._body = port, path, body
        self._headers = {"content-type": "application/json", **headers}
        self._kept = threading.local()

    def __call__(self, query: str) -> bytes:
        if not hasattr(self._kept, "connection"):
            self._kept.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection: http.client.HTTPConnection = self._kept.connection
        connection.request("POST", self._path, json.dumps({"query": query, **self._body}), self._headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return content


def time_http(search: Callable[[str], object], queries: Sequence[str]) -> tuple[float, float]:
    """p50 in milliseconds, and queries a second with several callers."""
    search(queries[0])
    return median(time_each(search, queries)), rate(search, queries, CALLERS)


def measure_whole(work: Work) -> list[Measured]:
    """All of Nexus, as its user starts it and adds a folder."""
    with without_pins(), running_nexus() as nexus:
        started = perf_counter()
        nexus.must("add", str(work.folder), timeout=3600)
        assert json.loads(search_of(nexus, "hybrid", 1)(work.queries[0]))["hits"]
        speed, found = len(work.judged.documents) / (perf_counter() - started), []
        for way in WAYS:
            deep = search_of(nexus, way, DEPTH)
            answers = [json.loads(deep(query))["hits"] for query in work.queries]
            quality = work.quality([[Path(hit["source"]).stem for hit in hits] for hits in answers])
            p50, per_second = time_http(search_of(nexus, way, K), work.queries)
            row = Measured(Subject(WHOLE), way, __version__, speed, quality, http_p50=p50, http_rate=per_second)
            found.append(row)
        return found


def search_of(nexus: Running, way: str, k: int) -> Asked:
    weights = {} if way == "hybrid" else {"hybrid": {"embedding_weight": 1.0, "text_weight": 0.0}}
    return Asked(nexus.port, "/rag/search", {"authorization": f"Bearer {nexus.key}"}, {"k": k, **weights})


@contextmanager
def without_pins() -> Iterator[None]:
    """Whatever is started inside chooses its threads itself."""
    kept = {name: os.environ.pop(name) for name in harness.POOLS}
    try:
        yield
    finally:
        os.environ |= kept


# ── rounds, and what they say ───────────────────────────────────────────────────────────────────────


def measure(subject: Subject, python: Path, work: Work) -> list[Measured]:
    """Both ways to search of a system that nothing was measured of yet in this round."""
    if subject.name == WHOLE:
        return measure_whole(work)
    with tempfile.TemporaryDirectory() as home:
        return measure_process(subject, python, work, Path(home))


def compare(rounds: Sequence[Sequence[Measured]]) -> dict[str, float]:
    """Nexus, hybrid as it is by default, over the best peer of each round; the medians. Of what was measured."""
    rows = rounds[0]
    there = {row.subject.name for row in rows}
    if there.isdisjoint(PEERS):
        return {}
    figures = {}
    for name, mark in ((WHOLE, ""), (IN_PROCESS, "_in_process")):
        if name not in there:
            continue
        for tuned in sorted({row.subject.tuned for row in rows if row.subject.name in PEERS}):
            which = f"ingest{mark}_over_best_{'tuned' if tuned else 'default'}"
            figures[which] = over_best(rounds, name, "files_per_second", "files_per_second", max, tuned)
        figures[f"ndcg10{mark}_minus_best"] = median(own(one, name).ndcg - best(one, "ndcg", max) for one in rounds)
    if WHOLE in there:
        figures |= {
            "search_p50_http_over_best_in_process": over_best(rounds, WHOLE, "http_p50", "p50", min),
            "search_p50_http_over_best_http": over_best(rounds, WHOLE, "http_p50", "http_p50", min),
            "qps8_over_best": over_best(rounds, WHOLE, "http_rate", "http_rate", max),
            "qps8_over_best_in_process": over_best(rounds, WHOLE, "http_rate", "rate", max),
        }
    if IN_PROCESS in there:
        figures |= {
            "search_p50_in_process_over_best": over_best(rounds, IN_PROCESS, "p50", "p50", min),
            "qps8_in_process_over_best": over_best(rounds, IN_PROCESS, "rate", "rate", max),
        }
    return figures


def over_best(
    rounds: Sequence[Sequence[Measured]], name: str, figure: str, theirs: str, choose: Choose, tuned: bool | None = None
) -> float:
    return median(getattr(own(one, name), figure) / best(one, theirs, choose, tuned) for one in rounds)


def own(rows: Sequence[Measured], name: str) -> Measured:
    (found,) = (row for row in rows if (row.subject.name, row.way) == (name, "hybrid"))
    return found


def best(rows: Sequence[Measured], figure: str, choose: Choose, tuned: bool | None = None) -> float:
    """Of the peers, whichever way they search; those that are tuned, those that are not, or (None) all."""
    peers = (row for row in rows if row.subject.name in PEERS and tuned in (None, row.subject.tuned))
    return choose(getattr(row, figure) for row in peers)


def print_medians(rounds: Sequence[Sequence[Measured]]) -> None:
    figures = ("files_per_second", "p50", "p95", "rate", "http_p50", "http_rate", "ndcg")
    table = []
    for row in sorted(rounds[0], key=lambda row: (row.subject.name not in PEERS, str(row.subject), row.way)):
        same = [other for one in rounds for other in one if (other.subject, other.way) == (row.subject, row.way)]
        medians = [median(getattr(other, figure) for other in same) for figure in figures]
        shown = ["–" if math.isnan(value) else value for value in medians]
        table.append((str(row.subject), row.version, row.way, *shown))
    names = ("system", "version", "search", "files/s", "p50 ms", "p95 ms", "QPS", "HTTP p50 ms", "HTTP QPS", "nDCG@10")
    harness.print_table(names, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1000, help="abstracts, of 5183; default: %(default)s")
    parser.add_argument("--queries", type=int, default=300, help="of 300; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--systems", default=",".join((*PEERS, IN_PROCESS, WHOLE)), help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=user_cache_path("nexus-bench-peers"), help="default: %(default)s"
    )
    given = parser.parse_args()
    pythons = {IN_PROCESS: Path(sys.executable), WHOLE: Path(sys.executable)}
    for name in given.systems.split(","):
        if name in PEERS and (python := interpreter(name, given.folder)):
            pythons[name] = python
    subjects = [
        Subject(name, tuned)
        for name in given.systems.split(",")
        if name in pythons
        for tuned in ((False, True) if name in PEERS else (False,))
    ]
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        work = prepare(Path(place) / "files", given.documents, given.queries)
        for turn in range(given.rounds):
            first = turn * len(subjects) // given.rounds
            rows = []
            for subject in subjects[first:] + subjects[:first]:
                print(f"round {turn + 1} of {given.rounds}: {subject}", file=sys.stderr, flush=True)
                rows += measure(subject, pythons[subject.name], work)
            rounds.append(rows)
    print_medians(rounds)
    sizes = {"documents": len(work.judged.documents), "queries": len(work.queries), "rounds": given.rounds}
    harness.print_result("peers", compare(rounds) | sizes, PACKAGES)


if __name__ == "__main__":
    main()
