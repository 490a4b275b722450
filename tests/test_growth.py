"""What is done for each file, page or change is as much work with many documents as with few.

Work is what SQLite's machine does, in its steps, so that no clock is asked.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nexus.database import Database
from nexus.homes import Homes
from nexus.interactions import SqliteInteractions
from nexus.jobs import Announced, Jobs, Outcome
from nexus.registry import open_tier
from nexus.stores import sqlite
from nexus.types import Interaction, content_digest
from tests.conftest import ALICE, House, open_house

FEW, MANY = 40, 320
PAGE = 8
AT_MOST = 1.5  # of the steps among few: an index is a little deeper among many
Work = Callable[[], object]


def steps(database: Database, work: Work) -> int:
    """How many SQLite takes for it."""
    connection, counted = database._connect(), itertools.count()

    def step() -> int:
        next(counted)
        return 0

    connection.set_progress_handler(step, 1)
    try:
        work()
    finally:
        connection.set_progress_handler(None, 0)
    return next(counted)


def files(count: int, name: str = "file") -> list[Announced]:
    contents = [f"{name} {number}".encode() for number in range(count)]
    return [
        Announced(f"{name}-{number}.md", content_digest(content), len(content), content=content)
        for number, content in enumerate(contents)
    ]


def end_all(jobs: Jobs) -> None:
    tickets = jobs.waiting(MANY)
    for ticket in tickets:
        jobs.start(ticket, "worker")
    jobs.settle([Outcome(*ticket.key, "done") for ticket in tickets])


def work_of_a_job(home: Path, count: int) -> dict[str, int]:
    """Steps of what a job of so many files has done again and again, beside another that has ended."""
    home.mkdir()
    jobs = Jobs(home)
    jobs.accept(ALICE, "default", files(count, "ended"), accepted_at=0)
    end_all(jobs)
    job, _ = jobs.accept(ALICE, "default", files(count), accepted_at=0)
    first, *_ = jobs.waiting(PAGE)
    done = Outcome(*first.key, "done")
    asked: dict[str, Work] = {
        "waiting": lambda: jobs.waiting(PAGE),
        "start": lambda: jobs.start(first, "worker"),
        "waiting, apart from one": lambda: jobs.waiting(PAGE, [first.key]),
        "beat": lambda: jobs.beat({first.key: "embed"}),
        "open_among": lambda: jobs.open_among([first.key]),
        "settle": lambda: jobs.settle([done]),
        "ended": lambda: jobs.ended(*first.key),
        "files": lambda: jobs.files(job.job_id, ALICE, None, 0, PAGE),
        "accept": lambda: jobs.accept(ALICE, "default", files(1, "new"), accepted_at=0),
        "cancel, for each": lambda: jobs.cancel(job.job_id, ALICE),
    }
    taken = {name: steps(jobs, work) for name, work in asked.items()}
    jobs.close()
    return taken | {"cancel, for each": taken["cancel, for each"] // count}


def test_a_file_of_a_large_job_costs_what_one_of_a_small_job_does(tmp_path: Path) -> None:
    few, many = work_of_a_job(tmp_path / "few", FEW), work_of_a_job(tmp_path / "many", MANY)
    assert {name: (few[name], taken) for name, taken in many.items() if taken > AT_MOST * few[name]} == {}


def work_of_documents(house: House, count: int) -> dict[str, int]:
    """Steps of what is asked of so many documents, page by page and change by change."""
    documents = house.hades.documents
    assert isinstance(documents, sqlite.SqliteDocuments)
    for number in range(count):
        house.put(f"{number}.txt", f"word {number}")
    middle = documents.documents(ALICE, None, None, count // 2)[-1].document_id
    (_, (revision, _)), *_ = documents.standings().items()
    house.put("last.txt", "the last")
    assert len(documents.changed("default", ALICE.tenant, revision)) == 1
    assert len(documents.documents(ALICE, None, middle, PAGE)) == PAGE
    asked: dict[str, Work] = {
        "a page": lambda: documents.documents(ALICE, None, None, PAGE),
        "a later page": lambda: documents.documents(ALICE, None, middle, PAGE),
        "a page of a collection": lambda: documents.documents(ALICE, "default", None, PAGE),
        "a later page of it": lambda: documents.documents(ALICE, "default", middle, PAGE),
        "what changed": lambda: documents.changed("default", ALICE.tenant, revision),
        "a collection": lambda: documents.collection("default", ALICE.tenant),
        "who may read": lambda: documents.audiences("default", ALICE),
        "one document": lambda: documents.current(middle, ALICE),
        "publish": lambda: house.put("new.txt", "it is new"),
        "publish again": lambda: house.put("new.txt", "it is newer"),
        "delete": lambda: documents.delete([middle], ALICE),
    }
    return {name: steps(documents, work) for name, work in asked.items()}


def test_a_page_or_a_change_costs_the_same_among_few_documents_and_many() -> None:
    with open_house() as small, open_house() as large:
        few, many = work_of_documents(small, FEW), work_of_documents(large, MANY)
    assert {name: (few[name], taken) for name, taken in many.items() if taken > AT_MOST * few[name]} == {}


def work_of_memory(count: int) -> dict[str, int]:
    """Steps of what is done with one of so many interactions of a tenant; who recalls by meaning compares all."""
    memory, vector = SqliteInteractions(":memory:"), np.eye(1, 8, dtype=np.float32)[0]

    def remember(number: int) -> None:
        one = Interaction(f"i{number}", "acme", "alice", f"user{number // PAGE}", "asked", "answered", float(number))
        memory.add(one, vector, "now")

    for number in range(count):
        remember(number)
    summary = Interaction("s", "acme", "alice", "user0", "", "much was asked", 0.0, kind="summary")
    asked: dict[str, Work] = {
        "add": lambda: remember(count),
        "the last": lambda: memory.recent("acme", "alice", None, PAGE),
        "the oldest": lambda: memory.oldest("acme", "interaction", PAGE),
        "load": lambda: memory.load("acme", ["i3", "i5"]),
        "embed": lambda: memory.embed({"i3": vector}, "anew"),
        "drop": lambda: memory.drop("acme", ["i3"]),
        "replace": lambda: memory.replace("acme", ["i4", "i5"], summary, vector, "now"),
        "delete": lambda: memory.delete("acme", None, "i6"),
        "delete one's own": lambda: memory.delete("acme", "alice", "i7"),
        "delete what was summarised": lambda: memory.delete("acme", "alice", "i5"),
        "forget": lambda: memory.forget("acme", None, "user3"),
    }
    taken = {name: steps(memory, work) for name, work in asked.items()}
    assert not memory.load("acme", ["i3", "i4", "i5", "i6", "i7", "s", f"i{3 * PAGE}"])
    memory.close()
    return taken


def test_an_interaction_costs_the_same_among_few_and_many() -> None:
    few, many = work_of_memory(FEW), work_of_memory(MANY)
    assert {name: (few[name], taken) for name, taken in many.items() if taken > AT_MOST * few[name]} == {}


def work_of_files(home: Path, count: int) -> dict[str, int]:
    """Steps of what is done to one of so many files that policies look after, all of them indexed."""
    for tier in ("hot", "cold"):
        (home / tier / "acme").mkdir(parents=True)
    for number in range(count):
        (home / "hot" / "acme" / f"{number:03}.bag").write_bytes(b"bytes")
    homes = Homes(home / "home", {tier: open_tier(f"file:{home}/{tier}") for tier in ("hot", "cold")})
    homes.scan("acme", "hot")
    with homes._transaction() as db:
        db.execute("INSERT INTO indexed SELECT tenant, path, 'default', checksum FROM files")
    file = homes.file("acme", "007.bag")
    asked: dict[str, Work] = {
        "file": lambda: homes.file("acme", "007.bag"),
        "describe": lambda: homes.describe("acme", "007.bag", {"robot": "r2"}),
        "tag": lambda: homes.tag([file], frozenset({"seen"}), frozenset()),
        "hold": lambda: homes.hold([file], "trial"),
        "release": lambda: homes.release("acme", "007.bag", "trial"),
        "move": lambda: homes.move([file], "cold"),
        "delete": lambda: homes.delete([file]),
    }
    taken = {name: steps(homes, work) for name, work in asked.items()}
    assert len(homes.files("acme")) == count - 1
    homes.close()
    return taken


def test_a_file_of_many_costs_what_one_of_few_does(tmp_path: Path) -> None:
    few, many = work_of_files(tmp_path / "few", FEW), work_of_files(tmp_path / "many", MANY)
    assert {name: (few[name], taken) for name, taken in many.items() if taken > AT_MOST * few[name]} == {}
