"""What ingestion costs over its embedding, whether its memory grows, and what it does to those who ask meanwhile.

    python -m tests.bench.ingest                     everything, about half an hour
    python -m tests.bench.ingest share [--files N]   one part alone: share, busy or growth
    python -m tests.bench.ingest growth --upto 46000                   100,000 chunks, about an hour
    python -m tests.bench.ingest growth --upto 2000 --filled 96000     the last of as many, in minutes

A file of `share` and `busy` is a Markdown page of four scifact abstracts, one of `growth` has one. `nexus add` is timed
from its start to its end, everything durable and visible. `embed_share` is the time that embedding the same texts takes
on all cores with nothing else to do, over that; `cpu_ms_per_chunk` is what all of Nexus computed meanwhile, and of it
`cpu_embedder_ms_per_chunk` the embedder. `cpu_model_ms_per_chunk` is what the same texts took alone, and
`cpu_beside_ms_per_chunk` what Nexus took over that: what may be saved, on whatever processor.

`growth` adds small files, up to each of a row of sizes, and says of each what the last of them cost: chunks a second,
memory (PSS, shared pages once) of the processes which ingest and of the vector server at its peak, what is on the disk,
and how long a search takes then. `--filled` chunks are in both stores before, with vectors that nobody had to embed.
`memory_10000_over_2000` is whether it is flat. `busy` asks at half of the highest rate, before and during a bulk run,
on a clock that does not wait for answers.
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
from functools import partial
from pathlib import Path

import httpx
import psutil

from cluster import bootstrap
from nexus.chunking import embedded_text
from nexus.registry import open_part
from nexus.types import Principal
from tests.bench.corpus import scifact
from tests.bench.quality import PACKAGES
from tests.bench.scaling import fill
from tests.running import ROOT, Running, running_nexus, until

ABSTRACTS = 4
TEXTS_PER_CALL = 128
SIZES = (500, 2_000, 4_600, 10_000, 46_000)  # files, of `growth`: about 1, 4, 10, 22 and 100 thousand chunks
SEARCHES = 200
CONCURRENT = 8
SECONDS_IDLE = 20.0
SAMPLE_SECONDS = 5.0


def write_corpus(folder: Path, files: int, each: int = ABSTRACTS, first: int = 0) -> Path:
    """So many different pages of `each` abstracts, from number `first` on; the same number gives the same page."""
    abstracts = list(scifact().documents.values())
    folder.mkdir()
    for number in range(first, first + files):
        step = 1 + number // len(abstracts)
        chosen = [abstracts[(number + step * part * 997) % len(abstracts)] for part in range(each)]
        page = "\n\n".join(f"## {text[:60]}\n\n{text}" for text in chosen)
        (folder / f"{number:05}.md").write_text(f"# Page {number}\n\n{page}\n")
    return folder


def seconds_to_embed(nexus: Running, collection: str) -> tuple[float, float, int]:
    """How long the model takes for the very texts of a collection on all cores, by the clock and by the processor,
    and how many they are.
    """
    documents = open_part("stores", "sqlite:", home=nexus.home)
    principal, after, texts = Principal("default", "bench"), None, []
    while page := documents.documents(principal, collection, after, 1000):
        after = page[-1].document_id
        for one in page:
            chunks = documents.neighbours(one.document_id, one.version, 0, one.chunks)
            texts += [embedded_text(one.title, chunk.piece) for chunk in chunks]
    documents.close()
    model = harness.open_embedder()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(model.embed, [texts[:TEXTS_PER_CALL]] * 4))  # warm
        started, used = time.perf_counter(), time.process_time()
        list(threads.map(model.embed, (texts[i : i + TEXTS_PER_CALL] for i in range(0, len(texts), TEXTS_PER_CALL))))
        return time.perf_counter() - started, time.process_time() - used, len(texts)


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


def share(files: int) -> dict[str, float]:
    """What the embedding of so many pages takes of the time in which they are added."""
    with tempfile.TemporaryDirectory() as place, running_nexus() as nexus:
        pages = write_corpus(Path(place) / "pages", files)
        titles = {"cpu_ms_per_chunk": "", "cpu_embedder_ms_per_chunk": "nexus:embedder"}
        before = {name: nexus.cpu_seconds(title) for name, title in titles.items()}
        first = timed_add(nexus, pages, "asked")
        taken = {name: nexus.cpu_seconds(title) - before[name] for name, title in titles.items()}
        again = timed_add(nexus, pages, "asked")
        embedding, taken["cpu_model_ms_per_chunk"], chunks = seconds_to_embed(nexus, "asked")
    taken["cpu_beside_ms_per_chunk"] = taken["cpu_ms_per_chunk"] - taken["cpu_model_ms_per_chunk"]
    return {
        "embed_share": embedding / first, "documents_per_second": files / first, "chunks": chunks,
        "chunks_per_second": chunks / first, "reingest_over_first": again / first,
        **{name: 1000 * seconds / chunks for name, seconds in taken.items()},
    }  # fmt: skip


def busy(files: int) -> dict[str, float]:
    """What a bulk run does to those who ask, and they to it."""
    queries = list(scifact().queries.values())
    figures: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as place,
        running_nexus() as nexus,
        nexus.http(limits=httpx.Limits(max_connections=64)) as http,
    ):
        pages = write_corpus(Path(place) / "pages", files)
        timed_add(nexus, pages, "asked")
        figures["bulk_rate_solo"] = bulk_rate(nexus, pages, "solo")
        rate = max(highest_rate(http, queries[:200]) for _ in range(2)) / 2
        figures["query_rate"] = rate
        with asking(http, queries, rate) as idle:
            time.sleep(SECONDS_IDLE)  # a measuring time, not a synchronisation
        with asking(http, queries, rate) as meanwhile:
            figures["bulk_rate_busy"] = bulk_rate(nexus, pages, "busy")
    figures["query_p95_idle_ms"] = 1000 * harness.percentile(idle, 0.95)
    figures["query_p95_busy_ms"] = 1000 * harness.percentile(meanwhile, 0.95)
    figures["query_p95_busy_over_idle"] = figures["query_p95_busy_ms"] / figures["query_p95_idle_ms"]
    figures["bulk_rate_busy_over_solo"] = figures["bulk_rate_busy"] / figures["bulk_rate_solo"]
    return figures


def growth(upto: int, filled: int) -> dict[str, float]:
    """A row for each size, printed; its figures, by the number of files, beside the chunks that were `filled` in."""
    queries = list(scifact().queries.values())[:SEARCHES]
    figures: dict[str, float] = {}
    rows, files, chunks = [], 0, 0
    with tempfile.TemporaryDirectory() as place, running_nexus() as nexus, nexus.http() as http:
        if filled:
            timed_add(nexus, write_corpus(Path(place) / "first", 1, 1, upto), "asked")
            fill(nexus, list(scifact().documents.values()), filled, "asked")
            ask(http, queries[0])
            until(600, lambda: '"resident"' in http.get("/status").text)
            chunks = count_chunks(http)
        for size in (size for size in SIZES if size <= upto):
            pages = write_corpus(Path(place) / f"pages{size}", size - files, 1, files)
            with Memory(nexus) as memory:
                seconds = timed_add(nexus, pages, "asked")
            known = count_chunks(http)
            rate, files, chunks = (known - chunks) / seconds, size, known
            for _ in range(2):  # the first time, it is read
                answered = [1000 * ask(http, query) for query in queries]
            rows.append(
                (
                    files, chunks, rate, memory.ingesting, memory.store, disk_mb(nexus.home),
                    harness.median(answered), harness.percentile(answered, 0.95),
                )
            )  # fmt: skip
            print(rows[-1], flush=True)  # the largest take long
            names = ("chunks", "chunks_per_second", "memory_mb", "store_mb", "disk_mb", "p50_ms", "p95_ms")
            figures |= {f"{name}_{size}": value for name, value in zip(names, rows[-1][1:], strict=True)}
    harness.print_table(("files", "chunks", "chunks/s", "MiB", "store MiB", "disk MiB", "p50 ms", "p95 ms"), rows)
    if upto >= 10_000:
        figures["memory_10000_over_2000"] = figures["memory_mb_10000"] / figures["memory_mb_2000"]
    return figures


def count_chunks(http: httpx.Client) -> int:
    return sum(one["chunks"] for one in http.get("/rag/collections").raise_for_status().json()["collections"])


def disk_mb(home: Path) -> float:
    """What is kept there, in MiB, apart from logs."""
    kept = (path for path in home.rglob("*") if path.is_file() and "logs" not in path.parts)
    return sum(path.stat().st_size for path in kept) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="share, busy or growth; by default all of them")
    parser.add_argument("--files", type=int, default=1000, help="of share and busy")
    parser.add_argument("--upto", type=int, default=10_000, help="files of growth")
    parser.add_argument("--filled", type=int, default=0, help="chunks that growth begins with")
    given = parser.parse_args()
    figures: dict[str, float] = {}
    parts = {
        "share": partial(share, given.files), "busy": partial(busy, given.files),
        "growth": partial(growth, given.upto, given.filled),
    }  # fmt: skip
    for name in given.parts or parts:
        figures |= parts[name]()
    harness.print_table(["figure", "value"], list(figures.items()))
    harness.print_result("ingest", figures, PACKAGES)


if __name__ == "__main__":
    main()
