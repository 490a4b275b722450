"""`nexus backup` and `nexus restore`: one moment of all stores, in one file, and back."""

import io
import json
import os
import sqlite3
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors import coordinator
from cluster import backup as snapshots
from cluster import bootstrap
from cluster.catalog import Catalog, OpenSession, Put, encode
from cluster.raft import Members, Snapshot
from cluster.raft.messages import Entry, HardState, Ready
from cluster.raft.storage import Storage
from deployments import archiving, cli, upkeep
from nexus import arangodb, archive, audit, interactions_arango
from nexus.access import KeyRing
from nexus.audit import Chain, Event
from nexus.audit_reading import verify
from nexus.config import load_config
from nexus.errors import AlreadyRunning, Conflict, InvalidRequest, NexusError, Unavailable, Unprocessable
from nexus.jobs import Announced, Jobs
from nexus.ports import LiveIndex
from nexus.stores import arango, memory, milvus_lite, sqlite
from nexus.types import Interaction, SearchRequest, content_digest
from tests import arango_double, document_stores
from tests.conftest import ALICE, build_house
from tests.words import WordEmbedder

TEXTS = {f"{name}.txt": (f"{name} gripper", f"{name} torque", f"{name} charger") for name in ("sark", "clu", "tron")}


def no_snapshot() -> None:
    return None


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a Nexus that does not run, whose embedder needs no model."""
    home = tmp_path / "home"
    monkeypatch.setenv("NEXUS_HOME", str(home))
    open_part = upkeep.open_part
    monkeypatch.setattr(
        upkeep, "open_part",
        lambda kind, address, **given: WordEmbedder() if kind == "models" else open_part(kind, address, **given),
    )  # fmt: skip
    bootstrap.prepare_home(home)
    return home


def fill(home: Path) -> list[tuple[str, float]]:
    """Documents, a key, a job under way and a line of the audit record; what a search answers then."""
    documents, vectors = sqlite.open("sqlite:", home=home), milvus_lite.open("milvus-lite:", home=home)
    house = build_house(documents, vectors)
    for source, texts in TEXTS.items():
        house.put(source, *texts)
    answer = ask(house)
    house.retriever.close()
    vectors.close()
    documents.close()
    with closing(KeyRing(home)) as ring:
        ring.create("of-before")
    with closing(Jobs(home)) as jobs:
        content = b"tron again"
        announced = Announced("tron.txt", content_digest(content), len(content), content=content)
        jobs.accept(ALICE, "default", [announced], accepted_at=9)
        (ticket,) = jobs.waiting(1)
        jobs.start(ticket, "who is gone")
    Chain(home).append([Event("command", "nexus up")], durable=True)
    return answer


def ask(house: Any) -> list[tuple[str, float]]:
    result = house.retriever.search(SearchRequest("gripper torque", k=20), ALICE)
    return [(hit.chunk_id, round(hit.score, 6)) for hit in result.hits]


def answer_of(home: Path) -> list[tuple[str, float]]:
    with (
        closing(sqlite.open("sqlite:", home=home)) as documents,
        closing(milvus_lite.open("milvus-lite:", home=home)) as vectors,
        closing(build_house(documents, vectors).retriever) as retriever,
    ):
        return ask(type("House", (), {"retriever": retriever}))


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ── one moment ──────────────────────────────────────────────────────────────────────────────────


def count_in(file: Path) -> int:
    with closing(sqlite3.connect(file)) as db:
        (count,) = db.execute("SELECT COUNT(*) FROM t").fetchone()
        return int(count)


@pytest.fixture
def two_stores(tmp_path: Path) -> Iterator[Path]:
    """A home in which somebody writes a row to b.db, then one to a.db, without end."""
    home, stop = tmp_path / "home", threading.Event()
    (home / "run").mkdir(parents=True)

    def connect(name: str) -> sqlite3.Connection:
        db = sqlite3.connect(home / name, isolation_level=None, timeout=10, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("CREATE TABLE IF NOT EXISTS t (filling BLOB)")
        return db

    first, second = connect("b.db"), connect("a.db")

    def write() -> None:
        while not stop.is_set():
            first.execute("INSERT INTO t VALUES (randomblob(500))")
            second.execute("INSERT INTO t VALUES (randomblob(500))")

    writer = threading.Thread(target=write)
    writer.start()
    yield home
    stop.set()
    writer.join()
    first.close()
    second.close()


def test_all_stores_are_of_one_moment_while_others_write(two_stores: Path, tmp_path: Path) -> None:
    counts = []
    for number in range(6):
        archive.pack(two_stores, tmp_path / "one.tar", no_snapshot)
        archive.unpack(tmp_path / "one.tar", tmp_path / f"out-{number}")
        counts.append((count_in(tmp_path / f"out-{number}" / "b.db"), count_in(tmp_path / f"out-{number}" / "a.db")))
    assert all(b - a in (0, 1) for b, a in counts), counts
    assert counts[-1] > counts[0]  # they did write


def test_the_audit_record_is_whole_though_it_grows_meanwhile(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    chain, stop = Chain(home), threading.Event()
    chain.append([Event("command", "x" * 1000)] * 100)  # longer than what is read at once

    def write() -> None:
        while not stop.is_set():
            chain.append([Event("command", "grows")])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(10):
            archive.pack(home, tmp_path / "one.tar", no_snapshot)
            archive.unpack(tmp_path / "one.tar", tmp_path / f"out-{number}")
            assert verify(tmp_path / f"out-{number}").faults == ()
    finally:
        stop.set()
        writer.join()


def test_a_large_file_that_is_removed_meanwhile_is_there_all_the_same(tmp_path: Path) -> None:
    home, block = tmp_path / "home", os.urandom(archive.SMALL_BYTES + 1)
    (home / "share" / "blocks").mkdir(parents=True)
    (home / "share" / "blocks" / "one").write_bytes(block)

    def snapshot_then_remove() -> bytes:
        (home / "share" / "blocks" / "one").unlink()
        return b"it points at one"

    archive.pack(home, tmp_path / "one.tar", snapshot_then_remove)
    archive.unpack(tmp_path / "one.tar", tmp_path / "out")
    assert state_of(tmp_path / "out") == {"share/blocks/one": block, archive.SNAPSHOT: b"it points at one"}


def test_a_small_file_that_is_removed_meanwhile_ends_no_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, listing = tmp_path / "home", archive._files
    home.mkdir()
    (home / "stays").write_bytes(b"x")

    def going(folder: Path) -> Iterator[Path]:
        """A file is always gone just when its name was read."""
        (home / "goes").write_bytes(b"x")
        for path in list(listing(folder)):
            (home / "goes").unlink(missing_ok=True)
            yield path

    monkeypatch.setattr(archive, "_files", going)
    contents = archive.pack(home, tmp_path / "one.tar", no_snapshot)
    assert [member.name for member in contents.members] == ["stays"]


def test_a_small_block_that_is_replaced_meanwhile_is_there_in_both_versions(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "share").mkdir(parents=True)
    (home / "share" / "1.block").write_bytes(b"one")

    def snapshot_then_replace() -> bytes:
        (home / "share" / "2.block").write_bytes(b"two")
        (home / "share" / "1.block").unlink()
        return b"it points at 1"

    archive.pack(home, tmp_path / "one.tar", snapshot_then_replace)
    archive.unpack(tmp_path / "one.tar", tmp_path / "out")
    there = {"share/1.block": b"one", "share/2.block": b"two"}
    assert state_of(tmp_path / "out") == {**there, archive.SNAPSHOT: b"it points at 1"}


def test_what_is_made_again_and_what_only_passes_stays_out(tmp_path: Path) -> None:
    home = tmp_path / "home"
    kept = {"nexus.yaml": b"{}", "empty": b"", "deep/er/file": b"x", "large": b"y" * 10**6}
    others = ("vectors/data", "run/lock", "logs/deploy.log", "coordinator/voter-1/log", "coordinator.20300101/x",
              "documents.db-wal", "documents.db-shm", "ray-token.part")  # fmt: skip
    for name, content in {**kept, **dict.fromkeys(others, b"out")}.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    (home / "link").symlink_to("/etc/passwd")
    (home / "linked").symlink_to("/etc")
    contents = archive.pack(home, tmp_path / "one.tar", no_snapshot)
    assert {member.name for member in contents.members} == kept.keys()
    archive.unpack(tmp_path / "one.tar", tmp_path / "out")
    assert state_of(tmp_path / "out") == kept
    assert not list((home / "run").glob("backup*"))


def test_an_archive_is_its_owners_alone_and_so_is_what_comes_of_it(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "one.tar"
    (home / "sub" / "below" / "it").mkdir(parents=True)
    (home / "sub" / "below" / "it" / "secret").write_text("s")
    file.touch(0o644)
    (tmp_path / "one.tar.new").write_text("somebody's")
    archive.pack(home, file, no_snapshot)
    assert (tmp_path / "one.tar.new").read_text() == "somebody's"
    archive.unpack(file, tmp_path / "out")
    for path in (file, tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


def test_an_older_archive_stays_when_a_new_one_cannot_be_made(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "one.tar"
    home.mkdir()
    (home / "kept").write_text("1")
    archive.pack(home, file, no_snapshot)
    before = file.read_bytes()

    def fail() -> bytes:
        raise Unavailable("no voter leads")

    with pytest.raises(Unavailable, match="no voter leads"):
        archive.pack(home, file, fail)
    assert file.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"home", "one.tar"}
    assert not (home / "run" / "backup").exists()


def test_a_place_that_cannot_be_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (home / "kept").write_text("1" * 100)
    (tmp_path / "door").symlink_to(home)
    for inside in (home / "b.tar", home / "sub" / "b.tar", tmp_path / "door" / "b.tar"):
        with pytest.raises(InvalidRequest, match="lies in the home"):
            archive.pack(home, inside, no_snapshot)
    with pytest.raises(InvalidRequest, match="there is no folder"):
        archive.pack(home, tmp_path / "none" / "b.tar", no_snapshot)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 99}))
    with pytest.raises(Unavailable, match="make room") as full:
        archive.pack(home, tmp_path / "b.tar", no_snapshot)
    assert full.value.code == "storage_full" and not (tmp_path / "b.tar").exists()


def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "one.tar"
    home.mkdir()
    (home / "first").write_bytes(os.urandom(1500))
    (home / "second").write_bytes(os.urandom(700))
    archive.pack(home, file, no_snapshot)
    whole = file.read_bytes()
    with tarfile.open(file) as packed:
        held = [(info.offset_data, info.size) for info in packed]
    for place in [at + step for at, size in held for step in range(0, size, 97)]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InvalidRequest):
            archive.unpack(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    for length in range(0, held[-1][0] + held[-1][1], 256):
        file.write_bytes(whole[:length])
        with pytest.raises(InvalidRequest):
            archive.unpack(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../out-of-it", tarfile.REGTYPE), ("/etc/out-of-it", tarfile.REGTYPE), ("a/../../b", tarfile.REGTYPE),
     ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE), ("folder", tarfile.DIRTYPE)],
)  # fmt: skip
def test_an_archive_reaches_nothing_but_its_folder(tmp_path: Path, name: str, kind: bytes) -> None:
    with tarfile.open(tmp_path / "one.tar", "w") as made:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        made.addfile(info, io.BytesIO(b""))
    with pytest.raises(InvalidRequest, match="no file of a home"):
        archive.unpack(tmp_path / "one.tar", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"one.tar"}


def test_a_file_too_many_and_another_format_are_refused(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "one.tar"
    home.mkdir()
    (home / "kept").write_text("1")
    archive.pack(home, file, no_snapshot)
    with tarfile.open(file) as packed:
        contents = json.loads(packed.extractfile(archive.CONTENTS).read())  # type: ignore[union-attr]

    def write(listed: object, *others: str) -> None:
        with tarfile.open(file, "w") as made:
            for name, content in (("kept", b"1"), *((other, b"") for other in others),
                                  (archive.CONTENTS, json.dumps(listed).encode())):  # fmt: skip
                info = tarfile.TarInfo(name)
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))

    write(contents)
    archive.unpack(file, tmp_path / "fine")
    for listed, others, why in (
        (contents, ("planted.db",), "planted.db is not what was packed"),
        ({**contents, "format": 99}, (), "another version"), ({**contents, "more": 1}, (), "damaged"),
        ([], (), "damaged"),
    ):  # fmt: skip
        write(listed, *others)
        with pytest.raises(InvalidRequest, match=why):
            archive.unpack(file, tmp_path / "out")


# ── the commands ────────────────────────────────────────────────────────────────────────────────


def run(*words: str) -> tuple[int, str]:
    try:
        result = CliRunner().invoke(cli.app, list(words), catch_exceptions=False)
    except NexusError as error:
        return 1, error.message
    return result.exit_code, result.output


def test_backup_wipe_restore_the_same_answers(home: Path, tmp_path: Path) -> None:
    before, file = fill(home), str(tmp_path / "one.tar")
    assert len(before) == 9
    assert run("backup", file)[0] == 0
    home.rename(tmp_path / "gone")
    code, told = run("restore", file)
    assert code == 0 and "9 chunks" in told and "clean" in told
    assert run("fsck") == (0, "clean\n")  # the job that somebody held is nobody's now
    assert answer_of(home) == before
    with closing(KeyRing(home)) as ring, closing(Jobs(home)) as jobs:
        assert [key.name for key in ring.list()] == ["of-before"]
        assert [(ticket.source, ticket.attempt) for ticket in jobs.waiting(5)] == [("tron.txt", 2)]
    assert verify(home).faults == ()
    commands = [line["action"] for line in archive_lines(home)]
    assert commands[0] == "nexus up" and commands[-1] == "nexus restore"


def archive_lines(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in audit.files_of(home) for line in file.read_text().splitlines()]


def test_what_is_there_is_not_lost_by_a_restore(home: Path, tmp_path: Path) -> None:
    fill(home)
    assert run("backup", str(tmp_path / "one.tar"))[0] == 0
    (home / "documents.db").write_bytes(b"somebody's")
    before = state_of(home)
    with pytest.raises(Conflict, match="--replace"):
        archiving.bring_back(tmp_path / "one.tar", home, False, print)
    assert state_of(home) == before
    made = archiving.bring_back(tmp_path / "one.tar", home, True, print)
    assert made.aside is not None and state_of(made.aside) == before
    assert run("fsck")[0] == 0


def test_settings_that_were_put_there_for_this_machine_stay(home: Path, tmp_path: Path) -> None:
    fill(home)
    (home / "nexus.yaml").write_text("http:\n  port: 8101\n")
    assert run("backup", str(tmp_path / "one.tar"))[0] == 0
    home.rename(tmp_path / "gone")
    home.mkdir()
    (home / "nexus.yaml").write_text("http:\n  port: 8102\n")
    assert run("restore", str(tmp_path / "one.tar"))[0] == 0
    assert load_config().http.port == 8102
    home.rename(tmp_path / "gone too")
    assert run("restore", str(tmp_path / "one.tar"))[0] == 0
    assert load_config().http.port == 8101


def test_a_home_that_is_not_whole_is_laid_out_and_not_put_in_place(home: Path, tmp_path: Path) -> None:
    fill(home)
    with closing(sqlite3.connect(home / "documents.db")) as db, db:
        db.execute("DELETE FROM chunks WHERE rowid = 1")
    assert run("backup", str(tmp_path / "one.tar"))[0] == 0
    before = state_of(home)
    with pytest.raises(Unprocessable, match="not whole"):
        archiving.bring_back(tmp_path / "one.tar", home, True, print)
    assert state_of(home) == before and (tmp_path / "home.restoring" / "documents.db").exists()
    with closing(sqlite3.connect(home / "documents.db")) as db, db:
        db.execute("DELETE FROM spans")
    assert run("backup", str(tmp_path / "two.tar"))[0] == 0
    archiving.bring_back(tmp_path / "two.tar", home, True, print)  # what was laid out before is in nobody's way
    assert not (tmp_path / "home.restoring").exists()


def test_a_restore_beside_a_running_nexus_takes_nothing_of_its_rows_on_a_vector_server(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, open_part = memory.open("memory:"), upkeep.open_part
    monkeypatch.setattr(server, "close", lambda: None)  # who goes away leaves it there
    monkeypatch.setenv("NEXUS_STORES__VECTORS", "milvus://127.0.0.1:19530")
    monkeypatch.setattr(
        upkeep, "open_part",
        lambda kind, address, **given: server if address.startswith("milvus://") else open_part(kind, address, **given),
    )  # fmt: skip
    fill(home)
    assert run("fsck", "--repair")[0] == 0
    assert run("backup", str(tmp_path / "one.tar"))[0] == 0
    with closing(sqlite.open("sqlite:", home=home)) as documents:
        (index,) = [collection.index for collection in documents.collections()]
        house = build_house(documents, server)
        house.put("later.txt", "later gripper")
        house.retriever.close()
    before = server.chunk_ids(index)
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "trial"))
    code, told = run("restore", str(tmp_path / "one.tar"))
    assert code == 1 and "1 rows that this archive does not know" in told and server.chunk_ids(index) == before
    assert run("restore", "--replace", str(tmp_path / "one.tar"))[0] == 0 and len(server.chunk_ids(index)) == 9


def test_neither_command_works_beside_another(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(home)
    with bootstrap.lock_home(home), pytest.raises(AlreadyRunning):
        cli.app(["backup", str(tmp_path / "one.tar")], standalone_mode=False)
    assert run("backup", str(tmp_path / "one.tar"))[0] == 0
    with archiving._alone_in(tmp_path), pytest.raises(AlreadyRunning, match="another `nexus restore`"):
        archiving.bring_back(tmp_path / "one.tar", home, True, print)
    monkeypatch.setattr(bootstrap, "is_running", lambda home: True)
    with pytest.raises(AlreadyRunning, match="nexus down"):
        archiving.bring_back(tmp_path / "one.tar", home, True, print)


def test_documents_in_a_file_elsewhere_are_not_left_out_in_silence(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_STORES__DOCUMENTS", f"sqlite:{tmp_path}/documents.db")
    code, told = run("backup", str(tmp_path / "one.tar"))
    assert code == 1 and "outside of the home" in told and not (tmp_path / "one.tar").exists()


# ── documents in ArangoDB ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def addresses(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Makes a database of the double and names it in the settings; all of its collections may be read whole."""
    names, double = [], document_stores.the_double()
    tables = [t.name for part in (arango.MIGRATIONS, interactions_arango.MIGRATIONS) for step in part for t in step]

    def create() -> str:
        names.append(f"archive_{len(names)}")
        address = double.create(names[-1])
        monkeypatch.setenv("NEXUS_STORES__DOCUMENTS", address)
        return address

    with ExitStack() as stack:
        for name in tables:
            stack.enter_context(arango_double.scanning(name))
        yield create
    for name in names:
        del double.databases[name]


def put(address: str, home: Path, source: str, *texts: str) -> list[tuple[str, float]]:
    with (
        closing(arango.open(address)) as documents,
        closing(milvus_lite.open("milvus-lite:", home=home)) as vectors,
        closing(build_house(documents, vectors).retriever) as retriever,
    ):
        if texts:
            build_house(documents, vectors).put(source, *texts)
        return ask(type("House", (), {"retriever": retriever}))


def test_documents_in_arangodb_come_along_as_of_the_same_moment(
    home: Path, tmp_path: Path, addresses: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, file = addresses(), str(tmp_path / "one.tar")
    put(address, home, "clu.txt", *TEXTS["clu.txt"])
    before = put(address, home, "sark.txt", *TEXTS["sark.txt"])
    told = Interaction("1" * 32, "acme", "alice", "alice", "What torque?", "4 Nm", 1.0)
    vector = WordEmbedder().embed(["What torque?"])[0]
    with closing(arango.open_interactions(address)) as memory:
        memory.add(told, vector, "word-embedder")
    with closing(KeyRing(home)) as ring:
        ring.create("of-before")
    write = archive._write

    def write_while_others_do(*arguments: Any) -> Any:
        put(address, home, "late.txt", "late gripper torque")
        return write(*arguments)

    monkeypatch.setattr(archive, "_write", write_while_others_do)
    monkeypatch.setattr(arangodb, "ROWS_PER_PAGE", 2)  # more than a page of each
    assert run("backup", file)[0] == 0
    home.rename(tmp_path / "gone")
    second = addresses()
    code, said = run("restore", file)
    assert code == 0 and "6 chunks" in said, said
    assert not (home / archive.ELSEWHERE).exists() and run("fsck") == (0, "clean\n")
    with closing(KeyRing(home)) as ring:
        assert [key.name for key in ring.list()] == ["of-before"]
    assert {chunk_id for chunk_id, _ in put(second, home, "")} == {chunk_id for chunk_id, _ in before}
    with closing(arango.open_interactions(second)) as memory:
        assert memory.nearest("acme", "alice", None, vector, "word-embedder", 5)[0][0] == told
    kept = state_of(home)
    code, said = run("restore", "--replace", file)
    assert code == 1 and "create an empty one" in said and state_of(home) == kept


def test_an_archive_says_which_store_it_needs(home: Path, tmp_path: Path, addresses: Callable[[], str]) -> None:
    fill(home)
    assert run("backup", str(tmp_path / "one.tar"))[0] == 0
    home.rename(tmp_path / "gone")
    addresses()
    code, said = run("restore", str(tmp_path / "one.tar"))
    assert code == 1 and "were kept in the home" in said and not home.exists()


# ── the coordinator ─────────────────────────────────────────────────────────────────────────────


def test_what_the_only_voter_holds_is_packed_and_brought_back(home: Path, tmp_path: Path) -> None:
    fill(home)
    assert coordinator.read_alone(home / "coordinator") is None
    held = snapshot_with({"live": b"index-7"})
    coordinator.restore(held, home / "coordinator")
    assert run("backup", str(tmp_path / "one.tar"))[0] == 0
    home.rename(tmp_path / "gone")
    assert run("restore", str(tmp_path / "one.tar"))[0] == 0
    brought = coordinator.read_alone(home / "coordinator")
    assert brought is not None and value_in(brought, "live") == b"index-7"
    assert not (home / archive.SNAPSHOT).exists()


def test_a_collection_of_another_embedder_than_the_configured_one_is_brought_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fill(home)
    with closing(sqlite.open("sqlite:", home=home)) as documents:
        (own,) = documents.collections()
    live = LiveIndex(own.index, own.fingerprint, "words:", WordEmbedder.dimension)
    held = snapshot_with({"collections/default": json.dumps(asdict(live)).encode()})
    coordinator.restore(held, home / "coordinator")
    with monkeypatch.context() as changed:
        changed.setattr(WordEmbedder, "fingerprint", "another")
        changed.setattr(WordEmbedder, "dimension", 2 * WordEmbedder.dimension)
        assert run("fsck") == (0, "clean\n")
        assert run("backup", str(tmp_path / "one.tar"))[0] == 0
        home.rename(tmp_path / "gone")
        code, told = run("restore", str(tmp_path / "one.tar"))
        assert code == 0 and "9 chunks" in told, told
    assert answer_of(home) == before


def test_of_several_voters_one_disk_does_not_tell(home: Path, tmp_path: Path) -> None:
    coordinator.restore(snapshot_with({"live": b"1"}), home / "coordinator")
    register = home / "coordinator" / coordinator.REGISTER
    seats = json.loads(register.read_text())
    (seat,) = seats.values()
    register.write_text(json.dumps({**seats, "2": {**seat, "identity": "another disk"}}))
    code, told = run("backup", str(tmp_path / "one.tar"))
    assert code == 1 and "`nexus up` first" in told


def test_a_voters_log_counts_as_much_as_its_snapshot(tmp_path: Path) -> None:
    coordinator.restore(snapshot_with({"old": b"1"}), tmp_path / "coordinator")
    (seat,) = json.loads((tmp_path / "coordinator" / coordinator.REGISTER).read_text()).values()
    disk = Storage(tmp_path / "coordinator" / "voter-1", seat["identity"])
    saved = disk.load()
    assert saved is not None
    entry = Entry(2, saved.snapshot.index + 1, encode(Put("new", b"2"), 1, 2, 2))
    disk.save(Ready(HardState(2, 1, entry.index), None, (entry,), (), (), (), None, must_sync=True))
    disk.close()
    held = coordinator.read_alone(tmp_path / "coordinator")
    assert held is not None and (value_in(held, "old"), value_in(held, "new")) == (b"1", b"2")
    assert held.index == entry.index and snapshots.read(snapshots.write(held)).data == held.data


def snapshot_with(values: dict[str, bytes]) -> Snapshot:
    catalog = Catalog()
    catalog.apply(1, encode(OpenSession()))
    for number, (key, value) in enumerate(values.items(), 1):
        catalog.apply(number + 1, encode(Put(key, value), 1, number, number))
    return Snapshot(catalog.applied, 1, Members(frozenset()), catalog.snapshot())


def value_in(snapshot: Snapshot, key: str) -> bytes | None:
    catalog = Catalog()
    catalog.restore(snapshot.data)
    held = catalog.get(key)
    return None if held is None else held[0]
