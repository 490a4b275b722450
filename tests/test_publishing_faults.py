"""Kill -9 at every failpoint, in real processes over real stores; afterwards nothing is lost, doubled or mixed.

X1 to X9 are the invariants of ingestion: X1 the same chunks in both stores, X2 and X4 a reader sees
a document whole and of one version, X3 no duplicates, X5 no orphans after the janitor, X6 every job
ends, X7 the state of a run without faults, X8 little is embedded twice, X9 deleted stays deleted.
"""

import json
import multiprocessing
import random
import sqlite3
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL

import psutil
import pytest

from cluster.bootstrap import free_ports
from nexus.errors import NotFound
from nexus.failpoints import POINTS
from nexus.hades import Hades, document_id_of
from nexus.jobs import Jobs, examine
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.types import SearchRequest
from tests import ingesting
from tests.ingesting import ALICE, BATCH_TEXTS, EMBEDDER, PARTS, open_hades
from tests.running import ROOT, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

DOCUMENTS, LIVES = 300, 50
_forks = multiprocessing.get_context("forkserver")  # a process that has imported everything, and forks for each run
_forks.set_forkserver_preload(["tests.ingesting"])
_collections = count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One vector server for all tests here; each uses an index of its own."""
    (port,) = free_ports(1)
    home = tmp_path_factory.mktemp("vectors")
    command = [sys.executable, "-m", "tests.ingesting", str(home), str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield port
        process.kill()


@dataclass
class Place:
    """A home, a collection in the shared vector server, and the processes that work on it."""

    home: Path
    port: int
    collection: str = field(default_factory=lambda: f"faults{next(_collections)}")

    def run(self, command: str, order: Mapping[str, object], failpoint: str = "") -> int:
        """Exit code of a process that does this; -9 where the failpoint killed it."""
        with self.start(command, order, failpoint) as process:
            process.join(120)
            assert process.exitcode is not None, "it does not end"
            return process.exitcode

    @contextmanager
    def start(self, command: str, order: Mapping[str, object], failpoint: str = "") -> Iterator[BaseProcess]:
        """A process that does this, and does not outlive the block."""
        testing = {"NEXUS_TESTING": "1", "NEXUS_FAILPOINT": failpoint} if failpoint else {}
        arguments = (self.home, self.port, command, {"collection": self.collection, **order}, testing)
        process = _forks.Process(target=ingesting.run, args=arguments)
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    def open(self) -> Hades:
        return open_hades(self.home, self.port)

    def texts(self, hades: Hades) -> dict[str, list[str]]:
        """What a reader finds of each document, by source, in order."""
        retriever = Retriever(hades, EMBEDDER, RetrievalSettings())
        request = SearchRequest("gripper", k=1000, collection=self.collection, graph="off")
        found = defaultdict(list)
        with suppress(NotFound):  # before the tenant's first document there is no collection for it
            for hit in retriever.search(request, ALICE).hits:
                found[hit.source].append((hit.ordinal, hit.text))
        retriever.close()
        return {source: [text for _, text in sorted(parts)] for source, parts in found.items()}

    def close(self, hades: Hades) -> None:
        hades.documents.close()
        hades.vectors.close()


@pytest.fixture
def place(server: int, tmp_path: Path) -> Place:
    return Place(tmp_path, server)


def freeze(process: psutil.Process, home: Path) -> None:
    """Stop it where it holds no database: frozen inside a transaction, it would hold up whoever takes over."""
    while True:
        process.suspend()
        until(60, lambda: process.status() == psutil.STATUS_STOPPED)
        if all(map(is_free, home.glob("*.db"))):
            return
        process.resume()


def is_free(database: Path) -> bool:
    with closing(sqlite3.connect(database, timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
    return True


def document(name: str, version: int, parts: int) -> str:
    """Markdown whose every section is a chunk that says whose it is."""
    words = " ".join(f"filler{number}" for number in range(60))
    return "\n\n".join(f"# Part {part}\n\ngripper {name} v{version} of {parts}. {words}" for part in range(parts))


BEFORE = {f"{name}.md": document(name, 1, 3) for name in ("a", "b", "c")}
AFTER = {
    "a.md": document("a", 2, 4), "b.md": BEFORE["b.md"], "c.md": document("c", 2, 2),
    **{f"{name}.md": document(name, 1, 3) for name in ("d", "e", "f", "g")},
}  # fmt: skip


@pytest.fixture(scope="module")
def faultless(server: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], int]:
    """What a reader finds after both jobs when nothing goes wrong, and how many texts were embedded for it."""
    place = Place(tmp_path_factory.mktemp("faultless"), server)
    for key, files in (("first", BEFORE), ("second", AFTER)):
        assert place.run("work", {"files": files, "key": key}) == 0
    hades = place.open()
    found = place.texts(hades)
    place.close(hades)
    assert set(found) == set(AFTER)
    return found, embedded(place)


def embedded(place: Place) -> int:
    return sum(map(int, (place.home / "embedded").read_text().split()))


class Reader:
    """Looks ten times a second, in this process, and keeps what was wrong with what it saw."""

    def __init__(self, place: Place) -> None:
        self._place, self._over = place, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.looks, self.wrong = 0, []

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        assert self.looks, "the reader never looked"
        assert self.wrong == []

    def _look(self) -> None:
        hades = self._place.open()
        while not self._over.is_set():
            self.wrong += self.judge(hades)
            self.looks += 1
            self._over.wait(0.1)
        self._place.close(hades)

    def judge(self, hades: Hades) -> list[str]:
        found = self._place.texts(hades)
        missing = [f"{source} was not there" for source in BEFORE if source not in found]
        return missing + [f"{source}: {parts}" for source, parts in found.items() if not is_whole(parts)]


def is_whole(parts: Sequence[str]) -> bool:
    """All parts of one version, as many as it has."""
    versions = {part.split(".")[0].partition("gripper ")[2] for part in parts}
    (version, *others) = versions
    return not others and len(parts) == int(version.split(" of ")[1])


HERE = {point for point in POINTS if point.startswith("ingest.")}
INGEST = sorted(point for point in HERE if not point.endswith(("delete", "retire", "purge")))


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("point", INGEST)
def test_a_kill_during_ingestion_loses_doubles_and_mixes_nothing(
    place: Place, faultless: tuple[dict[str, list[str]], int], point: str, nth: int
) -> None:
    assert place.run("work", {"files": BEFORE, "key": "first"}) == 0
    order = {"files": AFTER, "key": "second"}
    with Reader(place):  # X2, X4
        died = place.run("work", order, f"{point}:kill@{nth}")
        assert died in (-SIGKILL, 0), "it ended otherwise than by its failpoint"
        assert died == -SIGKILL or nth > 1, "the failpoint was never passed"
        assert place.run("work", order) == 0  # the submitter does the same again: it is the same job
    hades, jobs = place.open(), Jobs(place.home)
    assert place.texts(hades) == faultless[0]  # X7, X3
    ended = jobs.recent(ALICE, None, None, 10)
    assert [job.state for job in ended] == ["done", "done"]  # X6
    hades.vacuum(keep_closed_seconds=0, keep_staged_seconds=0)
    assert examine(hades, jobs, repair=False) == []  # X1
    index = hades.find_collection(place.collection).index
    assert hades.vectors.chunk_ids(index) == hades.documents.chunk_ids(index, published=True)  # X5
    assert embedded(place) <= faultless[1] + 3 * BATCH_TEXTS  # X8: three places at the embedder
    place.close(hades)
    jobs.close()


def test_a_worker_that_was_thought_dead_and_wakes_up_changes_nothing(
    place: Place, faultless: tuple[dict[str, list[str]], int]
) -> None:
    assert place.run("work", {"files": BEFORE, "key": "first"}) == 0
    order = {"files": AFTER, "key": "second"}
    reached = embedded(place)
    with place.start("work", order, "ingest.before_stage:sleep:1") as process:
        zombie = psutil.Process(process.pid)
        until(60, lambda: embedded(place) > reached)
        freeze(zombie, place.home)  # in the middle, with documents in its hands
        with Reader(place):
            assert place.run("work", order) == 0  # another takes over when the lease is out
            zombie.resume()
            process.join(60)
            assert process.exitcode == 0
    hades, jobs = place.open(), Jobs(place.home)
    assert place.texts(hades) == faultless[0]
    assert jobs.recent(ALICE, None, None, 1)[0].counts == {"done": 6, "unchanged": 1}
    hades.vacuum(keep_closed_seconds=0, keep_staged_seconds=0)
    assert examine(hades, jobs, repair=False) == []
    place.close(hades)
    jobs.close()


@pytest.mark.parametrize("point", sorted(HERE - set(INGEST)))
def test_a_kill_during_delete_or_vacuum_leaves_no_ghost(place: Place, point: str) -> None:
    assert place.run("work", {"files": BEFORE, "key": "first"}) == 0
    order = {"sources": ["a.md", "b.md"]}
    assert place.run("delete", order, f"{point}:kill") == -SIGKILL
    assert place.run("delete", order) == 0
    hades = place.open()
    assert set(place.texts(hades)) == {"c.md"}  # X9
    assert hades.fsck() == []
    index = hades.find_collection(place.collection).index
    assert hades.documents.chunk_ids(index, published=False) == hades.vectors.chunk_ids(index)
    ids = [document_id_of(ALICE.tenant, place.collection, source) for source in ("a.md", "b.md")]
    receipts = [receipt for one in ids for receipt in hades.documents.deletions(ALICE, one, 10)]
    assert [(receipt.versions, receipt.chunks) for receipt in receipts] == [(1, 3), (1, 3)]
    assert all(receipt.purged_at for receipt in receipts)
    assert place.run("work", {"files": BEFORE, "key": "first"}) == 0  # an old job played again
    assert set(place.texts(hades)) == {"c.md"}
    place.close(hades)


class ChurnReader(Reader):
    """Knows from the log of the dying writer what must be there, and what must not any more."""

    def judge(self, hades: Hades) -> list[str]:
        events = self._events()
        found = {int(source.removesuffix(".txt")): parts for source, parts in self._place.texts(hades).items()}
        wrong = []
        for number, parts in found.items():
            versions = {int(part.split(" version ")[1].split()[0]) for part in parts}
            if len(versions) != 1 or len(parts) != PARTS:
                wrong.append(f"a mix of {number}: {parts}")
            elif min(versions) < events.get(number, (0, True))[0]:
                wrong.append(f"{number} went back to {versions} after {events[number]}")
            elif events.get(number) == (min(versions), False):
                wrong.append(f"{number} was seen at {versions} after that was deleted")
        gone = [number for number in events if number % 2 == 0 and number not in found]
        return wrong + [f"a gap: {number} is only ever replaced" for number in gone]

    def _events(self) -> dict[int, tuple[int, bool]]:
        """What was acknowledged last of each document: its version, and whether it is there."""
        last = {}
        log = self._place.home / "done"
        for line in log.read_text().splitlines() if log.exists() else ():
            event = json.loads(line)
            for number in event.get("published", event.get("deleted")):
                last[number] = (event["version"], "published" in event)
        return last


def test_300_documents_churn_through_50_kills_before_a_reader(place: Place) -> None:
    dice = random.Random(7)
    moves = ("stage", "publish", "delete", "retire", "purge")
    points = sorted(point for point in HERE if point.endswith(moves) or point == "ingest.between_stores")
    with place_ready(place) as hades, ChurnReader(place) as reader:
        for life in range(1, LIVES + 1):
            point = points[life % len(points)]
            nth = (
                dice.randint(1, 30) if "begin" in point or "retire" in point or "purge" in point else dice.randint(1, 4)
            )
            order = {"documents": DOCUMENTS, "seed": life, "life": life}
            assert place.run("churn", order, f"{point}:kill@{nth},ingest.before_begin:kill@400") == -SIGKILL
        hades.vacuum(keep_closed_seconds=0, keep_staged_seconds=0)
        assert hades.fsck() == []  # while the reader goes on reading
    index = hades.find_collection(place.collection).index
    assert hades.vectors.chunk_ids(index) == hades.documents.chunk_ids(index, published=True)
    assert reader.looks > LIVES


class place_ready:
    """The collection, there before anyone reads; its stores closed at the end."""

    def __init__(self, place: Place) -> None:
        self._place, self._hades = place, place.open()

    def __enter__(self) -> Hades:
        self._hades.open_collection(self._place.collection)
        return self._hades

    def __exit__(self, *_: object) -> None:
        self._hades.documents.check()
