"""What ingestion costs over its embedding, whether its memory grows, and what it does to those who ask meanwhile.

    python -m tests.bench.ingest               about twenty minutes
    python -m tests.bench.ingest --files 200   a quick look: every number of files divided by five

A file is a Markdown page of four scifact abstracts. `nexus add` is timed from its start to its end,
everything durable and visible. `embed_share` is the time that embedding the same texts takes on all
cores with nothing else to do, over that. Memory (PSS, shared pages once) is that of the processes
which ingest, at its peak; the vector server holds what it was given and is told apart. Queries come at
half of the highest rate, before and during a bulk run, on a clock that does not wait for answers.
"""

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from cluster import bootstrap
from nexus.chunking import embedded_text
from nexus.registry import open_part
from nexus.types import Principal
from tests.bench.corpus import scifact
from tests.bench.quality import PACKAGES
from tests.running import ROOT, Running, running_nexus

EMBEDDER = "sentence-transformer:all-MiniLM-L6-v2"
ABSTRACTS = 4
TEXTS_PER_CALL = 128
CONCURRENT = 8
SECONDS_IDLE = 20.0
SAMPLE_SECONDS = 5.0


def write_corpus(folder: Path, files: int) -> Path:
    """So many different pages; the same number gives the same pages."""
    abstracts = list(scifact().documents.values())
    folder.mkdir()
    for number in range(files):
        step = 1 + number // len(abstracts)
        chosen = [abstracts[(number + step * part * 997) % len(abstracts)] for part in range(ABSTRACTS)]
        page = "\n\n".join(f"## {text[:60]}\n\n{text}" for text in chosen)
        (folder / f"{number:05}.md").write_text(f"# Page {number}\n\n{page}\n")
    return folder


def seconds_to_embed(nexus: Running, collection: str) -> tuple[float, int]:
    """How long the model takes for the very texts of a collection on all cores, and how many they are."""
    documents = open_part("stores", "sqlite:", home=nexus.home)
    principal, after, texts = Principal("default", "bench"), None, []
    while page := documents.documents(principal, collection, after, 1000):
        after = page[-1].document_id
        for one in page:
            chunks = documents.neighbours(one.document_id, one.version, 0, one.chunks)
            texts += [embedded_text(one.title, chunk.piece) for chunk in chunks]
    documents.close()
    model = open_part("models", EMBEDDER, threads=1)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(model.embed, [texts[:TEXTS_PER_CALL]] * 4))  # warm
        started = time.perf_counter()
        list(threads.map(model.embed, (texts[i : i + TEXTS_PER_CALL] for i in range(0, len(texts), TEXTS_PER_CALL))))
        return time.perf_counter() - started, len(texts)


def timed_add(nexus: Running, folder: Path, collection: str) -> float:
    started = time.perf_counter()
    nexus.must("add", str(folder), "-c", collection, timeout=3600)
    return time.perf_counter() - started


class Memory:
    """Samples the memory of the processes, and keeps the peaks, in MiB. Seldom, for looking costs time too."""

    def __init__(self, nexus: Running) -> None:
        instance = bootstrap.find_instance(nexus.home)
        assert instance is not None
        self._instance, self._over = instance, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.ingesting = self.store = 0.0

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            sums = {True: 0, False: 0}
            for process in bootstrap.processes_of(self._instance):
                with contextlib.suppress(psutil.Error):
                    is_store = "nexus:vectors" in " ".join(process.cmdline())
                    sums[is_store] += process.memory_full_info().pss
            self.ingesting = max(self.ingesting, sums[False] / 2**20)
            self.store = max(self.store, sums[True] / 2**20)


def ask(http: httpx.Client, query: str) -> float:
    started = time.perf_counter()
    http.post("/rag/search", json={"query": query, "collection": "asked"}).raise_for_status()
    return time.perf_counter() - started


def highest_rate(http: httpx.Client, queries: Sequence[str]) -> float:
    with ThreadPoolExecutor(CONCURRENT) as askers:
        started = time.perf_counter()
        list(askers.map(lambda query: ask(http, query), queries))
        return len(queries) / (time.perf_counter() - started)


def ask_steadily(http: httpx.Client, queries: Sequence[str], rate: float, over: threading.Event) -> list[float]:
    """Seconds per answer, each counted from when it was due; until `over`."""
    answered: list[float] = []

    def one(query: str, due: float) -> None:
        ask(http, query)
        answered.append(time.perf_counter() - due)

    with ThreadPoolExecutor(64) as askers:
        due = time.perf_counter()
        for query in itertools.cycle(queries):
            due += 1 / rate
            if over.wait(max(0.0, due - time.perf_counter())):
                break
            askers.submit(one, query, due)
    return answered


def bulk_rate(nexus: Running, folder: Path, collection: str) -> float:
    """Files a second of a bulk run, from the acceptance of its job to its end."""
    command = [sys.executable, "-m", "deployments.bulk", str(folder), "-c", collection, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=nexus.environment, capture_output=True, text=True, check=True)
    with nexus.http() as http:
        job = http.get(f"/rag/jobs/{json.loads(done.stdout)['job_id']}").raise_for_status().json()
    return job["total"] / (job["ended_at"] - job["created_at"])


@contextlib.contextmanager
def asking(http: httpx.Client, queries: Sequence[str], rate: float) -> Iterator[list[float]]:
    """Queries at a steady rate for as long as the block runs; the list holds their seconds after it."""
    over, answered = threading.Event(), []
    thread = threading.Thread(target=lambda: answered.extend(ask_steadily(http, queries, rate, over)))
    thread.start()
    yield answered
    over.set()
    thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    files = parser.parse_args().files
    queries = list(scifact().queries.values())
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        pages, many = write_corpus(Path(place) / "pages", files), write_corpus(Path(place) / "many", 5 * files)
        with running_nexus() as nexus, nexus.http(limits=httpx.Limits(max_connections=64)) as http:
            with Memory(nexus) as memory:
                first = timed_add(nexus, pages, "asked")
            figures |= {"rss_mb_1000": memory.ingesting, "store_mb_1000": memory.store}
            figures["reingest_over_first"] = timed_add(nexus, pages, "asked") / first
            embedding, chunks = seconds_to_embed(nexus, "asked")
            figures |= {
                "embed_share": embedding / first, "documents_per_second": files / first, "chunks": chunks,
                "chunks_per_second": chunks / first,
            }  # fmt: skip
            figures["bulk_rate_solo"] = bulk_rate(nexus, pages, "solo")
            rate = max(highest_rate(http, queries[:200]) for _ in range(2)) / 2
            figures["query_rate"] = rate
            with asking(http, queries, rate) as idle:
                time.sleep(SECONDS_IDLE)  # a measuring time, not a synchronisation
            with asking(http, queries, rate) as busy:
                figures["bulk_rate_busy"] = bulk_rate(nexus, pages, "busy")
            figures["query_p95_idle_ms"] = 1000 * harness.percentile(idle, 0.95)
            figures["query_p95_busy_ms"] = 1000 * harness.percentile(busy, 0.95)
            figures["query_p95_busy_over_idle"] = figures["query_p95_busy_ms"] / figures["query_p95_idle_ms"]
            figures["bulk_rate_busy_over_solo"] = figures["bulk_rate_busy"] / figures["bulk_rate_solo"]
        with running_nexus() as nexus, Memory(nexus) as memory:
            timed_add(nexus, many, "many")
        figures |= {"rss_mb_5000": memory.ingesting, "store_mb_5000": memory.store}
    harness.print_table(["figure", "value"], list(figures.items()))
    harness.print_result("ingest", figures, PACKAGES)


if __name__ == "__main__":
    main()
