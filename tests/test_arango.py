"""ArangoDB as a document store: who is let in, what goes wrong, who is first; and that it answers as SQLite does."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nexus import arangodb, failpoints
from nexus.arangodb import ArangoDatabase, Place, Table, create_database
from nexus.errors import ConfigError, Conflict, Fenced, NexusError, Unavailable, UpstreamInvalid
from nexus.failpoints import FailpointReached
from nexus.filters import Combine, Compare, Filter
from nexus.ports import DocumentStore, Staged
from nexus.registry import check_part, open_part
from nexus.stores import arango, memory, sqlite
from nexus.types import Document, Principal
from tests import aql
from tests.arango_double import ArangoDouble
from tests.conftest import ALICE, BOB, MALLORY, House, build_house
from tests.document_stores import the_double
from tests.words import WordEmbedder


@pytest.fixture
def double() -> Iterator[ArangoDouble]:
    double = ArangoDouble()
    double.start()
    yield double
    double.stop()


@pytest.fixture
def store(double: ArangoDouble) -> Iterator[arango.ArangoDocuments]:
    documents = arango.open(double.create("nexus"))
    yield documents
    documents.close()


@pytest.fixture
def house(store: arango.ArangoDocuments) -> Iterator[House]:
    house = build_house(store, memory.open("memory:"))
    yield house
    house.retriever.close()


# ── addresses, and who is let in ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("arango://u:p@h:8530/db", Place("http://h:8530", "u", "p", "db")),
        ("arango://u:p%40%2F@h/db", Place("http://h:8529", "u", "p@/", "db")),
        ("arango://u@[::1]/db?tls=true", Place("https://[::1]:8529", "u", "", "db")),
        ("arango://u@h/db?tls=false", Place("http://h:8529", "u", "", "db")),
    ],
)
def test_an_address_says_where_and_as_whom(address: str, place: Place) -> None:
    assert Place.parse(address) == place


@pytest.mark.parametrize(
    "address",
    [
        "arango:", "arango://", "arango://host/db", "arango://u:secret@host", "arango://u:secret@host/", "arango://u:secret@host:x/db",
        "arango://u:secret@host/a/b", "arango://u:secret@host/_system", "arango://u:secret@host/1", "arango://u:secret@host/a%2Fb",
        "arango://u:secret@host/db?tls=yes", "arango://u:secret@host/db?other=1", "arango://u:secret@host/" + "d" * 65,
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_part("stores", address)
    assert "arango://USER:PASSWORD@HOST:8529/DATABASE" in refused.value.message and "secret" not in str(refused.value)


def test_an_address_opens_the_store_and_speaks_to_nobody_until_it_is_used(double: ArangoDouble) -> None:
    address = double.create("nexus")
    check_part("stores", address)
    documents = open_part("stores", address, home=Path("/nowhere"), shared_metadata=["site"])
    assert double.requests == []
    documents.check()
    documents.close()
    with pytest.raises(Unavailable, match="closed"):
        documents.check()


Spoil = Callable[[ArangoDouble], str]


def an_old_server(double: ArangoDouble) -> str:
    double.version = "3.11.14"
    return double.create("nexus")


def a_server_of_another_kind(double: ArangoDouble) -> str:
    double.version = "1.8"
    return double.create("nexus")


def a_reader(double: ArangoDouble) -> str:
    double.create("nexus")
    double.users["nexus"].grants["nexus"] = "ro"
    return double.address("nexus", "nexus", "nexus-secret")


def a_stranger_to_the_database(double: ArangoDouble) -> str:
    double.create("nexus")
    double.create("other", "other", "other-secret")
    return double.address("nexus", "other", "other-secret")


def a_wrong_password(double: ArangoDouble) -> str:
    double.create("nexus")
    return double.address("nexus", "nexus", "guessed-secret")


def nobody_there(double: ArangoDouble) -> str:
    address = double.create("nexus")
    double.stop()
    return address


@pytest.mark.parametrize(
    ("spoil", "kind", "told"),
    [
        (a_wrong_password, ConfigError, "refuses user 'nexus', or its password, for 'nexus'"),
        (a_stranger_to_the_database, ConfigError, "refuses user 'other', or its password, for 'nexus'"),
        (lambda double: double.address("nowhere"), ConfigError, "has no database 'nowhere': create it"),
        (a_reader, ConfigError, "lets user 'nexus' not do this: it needs rw on 'nexus'"),
        (an_old_server, ConfigError, "is '3.11.14': Nexus needs 3.12, or 4"),
        (a_server_of_another_kind, ConfigError, "is '1.8': Nexus needs 3.12, or 4"),
        (nobody_there, Unavailable, "does not answer; try again"),
    ],
)  # fmt: skip
def test_who_cannot_be_spoken_to_is_told_apart(
    double: ArangoDouble, spoil: Spoil, kind: type[NexusError], told: str
) -> None:
    documents = arango.open(spoil(double))
    for ask in (documents.check, documents.collections):
        with pytest.raises(kind, match=told) as refused:
            ask()
        assert "secret" not in refused.value.message
    documents.close()


@pytest.mark.parametrize("version", ["3.12.0", "3.12.9-1", "4.0.1"])
def test_versions_that_are_spoken_to(double: ArangoDouble, version: str) -> None:
    double.version = version
    documents = arango.open(double.create("nexus"))
    documents.check()
    documents.close()


@pytest.mark.parametrize("answer", [[], "welcome", {"error": False}, {"version": "3.12.4", "result": 7}])
def test_what_is_no_arangodb_is_named_so(double: ArangoDouble, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    documents = arango.open(double.create("nexus"))
    monkeypatch.setattr(double, "answer", lambda *_: (200, answer))
    with pytest.raises(UpstreamInvalid, match="is no ArangoDB server"):
        documents.check()
    documents.close()


def test_an_administrator_makes_the_database_and_a_user_who_may_do_nothing_elsewhere(double: ArangoDouble) -> None:
    address = double.address("nexus", "nexus", "made-up")
    for _ in range(2):
        create_database(double.address("whatever"), address)
    documents = arango.open(address)
    documents.check()
    documents.close()
    assert double.users["nexus"].grants == {"nexus": "rw"}
    for by in (address, double.address("_x", "root", "guessed").replace("_x", "x")):
        with pytest.raises(ConfigError):
            create_database(by, address.replace("/nexus", "/other").replace("nexus:", "second:"))
    assert set(double.databases) == {"_system", "nexus"} and set(double.users) == {"root", "nexus"}
    with pytest.raises(ConfigError, match="another ArangoDB server"):
        create_database("arango://root@elsewhere/db", address)


def test_the_command_makes_them_and_says_what_it_lacks(double: ArangoDouble) -> None:
    given = {
        "ARANGO_ADMINISTRATOR": double.address("any"),
        "NEXUS_STORES__DOCUMENTS": double.address("nexus", "n", "p"),
    }
    command = [sys.executable, "-m", "nexus.arangodb"]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and double.users["n"].grants == {"nexus": "rw"}
    lacking = subprocess.run(command, capture_output=True, text=True)
    assert lacking.returncode == 1 and "set ARANGO_ADMINISTRATOR" in lacking.stderr


# ── its form ────────────────────────────────────────────────────────────────────────────────────


def form(double: ArangoDouble) -> dict[str, Any]:
    return {name: (table.edges, table.indexes) for name, table in double.databases["nexus"].tables.items()}


def test_a_database_gets_its_form_once_whoever_comes_first(double: ArangoDouble) -> None:
    stores = [arango.open(double.create("nexus")) if not n else arango.open(double.address("nexus")) for n in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda store: store.check(), stores))
    made = form(double)
    assert made["edges"][0] and {index["name"] for index in made["edges"][1]} == {"outward", "inward"}
    tables = [table.name for step in arango.MIGRATIONS for table in step if not table.is_dropped]
    assert made.keys() == {"schema", *tables}
    before = len(double.requests)
    again = arango.open(double.address("nexus"))
    again.check()
    assert not any(path in ("/_api/collection", "/_api/index") and m == "POST" for m, path in double.requests[before:])
    assert form(double) == made
    for store in (*stores, again):
        store.close()


def test_a_database_of_before_goes_on_from_where_it_is(double: ArangoDouble) -> None:
    first = ArangoDatabase(double.create("nexus"), "it", "things", ((Table("things"),),))
    first.check()
    first.aql("INSERT {_key: 'kept'} INTO things")
    later = (Table("things", ({"type": "persistent", "name": "by_x", "fields": ["x"]},)), Table("more"))
    second = ArangoDatabase(double.address("nexus"), "it", "things", ((Table("things"),), later))
    assert second.aql("FOR t IN things FILTER t._key == 'kept' RETURN t._key") == ["kept"]
    assert form(double).keys() == {"schema", "things", "more"} and len(form(double)["things"][1]) == 1
    other = ArangoDatabase(double.address("nexus"), "that", "others", ((Table("others"),),))
    other.check()
    assert second.aql("FOR s IN schema SORT s._key RETURN [s._key, s.version]") == [["others", 1], ["things", 2]]
    older = ArangoDatabase(double.address("nexus"), "it", "things", ((Table("things"),),))
    with pytest.raises(ConfigError, match="it was written by a newer Nexus"):
        older.check()
    for database in (first, second, other, older):
        database.close()


def test_two_current_versions_of_one_document_are_impossible(house: House, double: ArangoDouble) -> None:
    document = house.put("a.txt", "gripper")
    with pytest.raises(Conflict):
        house.hades.documents._database.aql(
            "INSERT {current_of: @id, is_current: true} INTO versions", id=document.document_id
        )


def test_of_what_is_purged_only_its_fence_and_receipt_are_left(house: House, double: ArangoDouble) -> None:
    document = house.put("a.txt", "gripper", "wheel", metadata={"robot_id": "HX-3"})
    house.hades.delete([document.document_id], ALICE)
    house.hades.vacuum(-1, -1)
    left = {name for name, table in double.databases["nexus"].tables.items() if table.rows}
    assert left == {"schema", "collections", "sequences", "fences", "deletions"}


# ── transactions ────────────────────────────────────────────────────────────────────────────────


def test_what_is_answered_for_is_on_the_disk_and_staging_is_not_waited_for(house: House, double: ArangoDouble) -> None:
    document = house.describe("a.txt", ["gripper"])
    epoch = house.stage(document, ["gripper"])
    form = [True] * len(arango.MIGRATIONS)
    assert double.synced == [*form, True, False, False]  # its form, the collection, and what may be lost
    double.synced.clear()
    house.hades.publish([(document, epoch)])
    house.hades.delete([document.document_id], ALICE)
    house.hades.documents.add_turn("acme", "s", "context", "x")
    house.hades.documents.replace_turns("acme", "s", [("context", "x")], ("context", "y"))
    house.hades.documents.clear_session("acme", "s")
    assert double.synced == [True] * 5


def test_what_fails_within_a_publish_leaves_nothing_and_holds_nobody_up(house: House, double: ArangoDouble) -> None:
    document = house.describe("a.txt", ["gripper"])
    epoch = house.stage(document, ["gripper"])
    failpoints._active = {"ingest.inside_publish": failpoints._Failpoint("raise", 0, 1)}
    try:
        with pytest.raises(FailpointReached):
            house.hades.publish([(document, epoch)])
    finally:
        failpoints._active = {}
    assert not double.databases["nexus"].open
    assert house.hades.documents.current(document.document_id, ALICE) is None
    (published,) = house.hades.publish([(document, epoch)])
    assert published.opened == 1


@pytest.mark.parametrize("path", ["/_api/transaction/begin", "/_api/cursor"])
@pytest.mark.parametrize("number", [1200, 29, 1655])
def test_a_transaction_that_lost_is_done_again(house: House, double: ArangoDouble, path: str, number: int) -> None:
    document = house.describe("a.txt", ["gripper"])
    epoch = house.stage(document, ["gripper"])
    double.fails += [(path, 409, number)] * 3
    (published,) = house.hades.publish([(document, epoch)])
    assert published.opened == 1 and not double.fails
    assert house.hades.documents.current(document.document_id, ALICE) is not None


def test_a_commit_that_lost_is_done_again(house: House, double: ArangoDouble) -> None:
    commit, lost = double._put_transaction, []

    def lose_one(database: Any, rest: str, *others: Any) -> Any:
        if not lost:
            lost.append(rest)
            double.end_transactions()
        return commit(database, rest, *others)

    double._put_transaction = lose_one
    assert house.put("a.txt", "gripper").opened == 1 and lost


def test_who_always_loses_is_told_to_come_again(
    house: House, double: ArangoDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arangodb, "PAUSE_SECONDS", 0)
    house.put("a.txt", "gripper")
    double.fails += [("/_api/cursor", 409, 1200)] * 100
    with pytest.raises(Unavailable, match="too many write to the document store at once"):
        house.put("b.txt", "gripper")
    assert len(double.fails) == 100 - arangodb.ATTEMPTS


@pytest.mark.parametrize(
    ("status", "number", "kind", "code", "told"),
    [
        (500, 18, Unavailable, "unavailable", "too many write"),
        (500, 1104, Unavailable, "storage_full", "the disk of the document store is full"),
        (403, 1004, Unavailable, "unavailable", "takes no writes"),
        (503, 21003, Unavailable, "unavailable", "overloaded"),
        (503, 503, Unavailable, "unavailable", "does not answer"),
        (400, 1501, UpstreamInvalid, "upstream_invalid", "error 1501 of ArangoDB"),
    ],
)
def test_what_a_server_refuses_is_told_without_its_words(
    house: House, double: ArangoDouble, status: int, number: int, kind: type[NexusError], code: str, told: str
) -> None:
    house.put("a.txt", "gripper")
    double.fails.append(("/_api/transaction/begin", status, number))
    with pytest.raises(kind, match=told) as refused:
        house.hades.documents.begin(house.describe("b.txt", ["x"]))
    assert refused.value.code == code and "it fails" not in refused.value.message
    house.put("b.txt", "wheel")


def test_a_server_that_takes_no_writes_is_still_read(house: House, double: ArangoDouble) -> None:
    document = house.put("a.txt", "gripper")
    double.read_only = True
    with pytest.raises(Unavailable, match="takes no writes"):
        house.hades.delete([document.document_id], ALICE)
    assert house.hades.documents.current(document.document_id, ALICE) is not None


def test_after_a_restart_of_the_server_everything_goes_on(house: House, double: ArangoDouble) -> None:
    document = house.put("a.txt", "gripper one")
    double.stop()
    with pytest.raises(Unavailable):
        house.hades.documents.check()
    double.start()
    assert house.hades.documents.current(document.document_id, ALICE) is not None
    double.stop()
    double.start()  # the connections that were open are not
    assert house.put("a.txt", "gripper two").opened == 2


# ── several at once ─────────────────────────────────────────────────────────────────────────────


def test_writers_at_once_each_get_a_number_of_their_own(double: ArangoDouble) -> None:
    stores = [arango.open(double.create("nexus") if not n else double.address("nexus")) for n in range(3)]
    houses = [build_house(store, memory.open("memory:")) for store in stores]
    barrier = threading.Barrier(len(houses))

    def work(number: int) -> list[int]:
        barrier.wait()
        return [houses[number].put(f"{number}-{n}.txt", "gripper").opened or 0 for n in range(4)]

    with ThreadPoolExecutor(len(houses)) as threads:
        opened = [one for numbers in threads.map(work, range(len(houses))) for one in numbers]
    assert sorted(opened) == list(range(1, 13))
    for house, store in zip(houses, stores, strict=True):
        house.retriever.close()
        store.close()


def test_of_two_makers_of_one_document_one_is_fenced_wherever_they_meet(house: House, double: ArangoDouble) -> None:
    """The second begins while the first is within its publish, and has to wait for it."""
    document = house.describe("a.txt", ["gripper one"])
    epoch = house.stage(document, ["gripper one"])
    other = arango.open(double.address("nexus"))
    begun: list[int] = []
    thread = threading.Thread(target=lambda: begun.append(other.begin(document)))

    def meanwhile(_: str) -> None:
        thread.start()
        thread.join(0.3)  # whoever need not wait has ended by then

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arango, "pass_through", meanwhile)
        (published,) = house.hades.publish([(document, epoch)])
    thread.join()
    assert published.opened == 1 and begun == [epoch + 1]
    assert double.synced[-2:] == [True, False], "the publish was there first"
    with pytest.raises(Fenced):
        house.hades.documents.stage([Staged(document, epoch, [], [], np.zeros((0, 64), np.float32))])
    other.close()


def test_turns_of_a_session_keep_their_order_whoever_adds_them(store: arango.ArangoDocuments) -> None:
    def add(number: int) -> None:
        for n in range(5):
            store.add_turn("acme", "s", "context", f"{number}:{n}")

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(add, range(3)))
    turns = [content for _, content in store.turns("acme", "s")]
    assert len(turns) == 15 and aql.read(arango.ADD_TURN).exclusive
    for number in range(3):
        assert [one for one in turns if one.startswith(f"{number}:")] == [f"{number}:{n}" for n in range(5)]
    assert store.turns("other", "s") == [] and store.clear_session("other", "s") == 0
    assert store.clear_session("acme", "s") == 15 and store.turns("acme", "s") == []


def test_turns_that_were_replaced_keep_their_place(store: arango.ArangoDocuments) -> None:
    turns = [("context", f"{n}") for n in range(4)]
    for role, content in turns:
        store.add_turn("acme", "s", role, content)
    for wrong in ([], turns[1:], [*turns, ("context", "5")], [("other", "0")]):
        assert not store.replace_turns("acme", "s", wrong, ("summary", "x"))
    assert not store.replace_turns("other", "s", turns[:1], None)
    assert store.replace_turns("acme", "s", turns[:2], ("summary", "0 and 1"))
    assert store.turns("acme", "s") == [("summary", "0 and 1"), *turns[2:]]
    assert store.replace_turns("acme", "s", [("summary", "0 and 1")], None)
    store.add_turn("acme", "s", "context", "last")
    assert store.turns("acme", "s") == [*turns[2:], ("context", "last")]


# ── the same answers as SQLite's ────────────────────────────────────────────────────────────────

VALUES = st.one_of(
    st.sampled_from(["a", "A", "b", "ä", "a\u0308", "\u00e4", "a\u200b", "", "10", "9", "Z", "z", "\U0001f600", "~"]),
    st.integers(-3, 12), st.sampled_from([1.5, -0.0, 1e300, 2**62, 2**63 - 1]), st.booleans(),
)  # fmt: skip
KEYS = st.sampled_from(["k", "a.b", "x-y", "_key", "source", "title", "missing"])
SETS = st.lists(VALUES, min_size=1, max_size=3).map(tuple)


def comparisons() -> st.SearchStrategy[Filter]:
    some = st.builds(Compare, KEYS, st.sampled_from(["in", "nin"]), SETS)
    one = st.builds(Compare, KEYS, st.sampled_from(["eq", "ne"]), VALUES.map(lambda value: (value,)))
    ordered = VALUES.filter(lambda value: not isinstance(value, bool)).map(lambda value: (value,))
    return some | one | st.builds(Compare, KEYS, st.sampled_from(["gt", "gte", "lt", "lte"]), ordered)


FILTERS = st.recursive(
    comparisons(), lambda part: st.builds(Combine, st.booleans(), st.lists(part, min_size=1, max_size=3).map(tuple)),
    max_leaves=5,
)  # fmt: skip
METADATA: list[dict[str, object]] = [
    {"k": value, "a.b": other, "x-y": [value], "_key": {"z": value}}
    for value, other in zip(
        ["a", "A", "ä", "a\u0308", "a\u200b", "", "10", 9, 10, True, 1, 1.5, None, 2**63 - 1, "Z", "\U0001f600", 2**70],
        [1, True, None, "b", 3, 0, False, -1, "9", 1e300, "~", 12, 0, "z", 7, "B", 2],
        strict=True,
    )
]


@pytest.fixture(scope="module")
def two() -> Iterator[list[DocumentStore]]:
    """The same documents in SQLite and in ArangoDB."""
    double = ArangoDouble()
    double.start()
    stores: list[DocumentStore] = [sqlite.open("sqlite::memory:"), arango.open(double.create("nexus"))]
    for store in stores:
        house = build_house(store, memory.open("memory:"))
        staged = []
        for number, metadata in enumerate(METADATA):
            document = house.describe(f"{number}.txt", [f"gripper {number}"], metadata=metadata)
            staged.append((document, house.stage(document, [f"gripper {number}"])))
        house.hades.publish(staged)
        house.retriever.close()
    yield stores
    for store in stores:
        store.close()
    double.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(condition=FILTERS)
def test_a_filter_finds_the_same_in_both(two: list[DocumentStore], condition: Filter) -> None:
    one, other = (store.matching("default", ALICE, condition, 99, 100) for store in two)
    assert one == other


@pytest.mark.parametrize("pair", [("acme", "ACME"), ("acme", "acme\u200b"), ("\u00e4", "a\u0308"), ("x", "x\u0000")])
def test_tenants_and_readers_that_a_server_takes_for_equal_are_not(house: House, pair: tuple[str, str]) -> None:
    documents = house.hades.documents
    ours, theirs = (Principal(tenant, "s") for tenant in pair)
    document = house.put("a.txt", "gripper", who=ours)
    assert documents.current(document.document_id, ours) is not None
    assert documents.current(document.document_id, theirs) is None
    assert documents.documents(theirs, None, None, 10) == [] and documents.tally(theirs) == {}
    (chunk,) = documents.chunk_ids_of(document.document_id, document.version)
    assert documents.verdicts("default", theirs, [chunk], 1) == {chunk: "other tenant"}
    readers = {name: replace(ALICE, subject=name) for name in pair}
    secret = house.put("b.txt", "gripper", readers=frozenset({pair[0]}))
    assert documents.current(secret.document_id, readers[pair[0]]) is not None
    assert documents.current(secret.document_id, readers[pair[1]]) is None
    assert documents.audiences("default", readers[pair[1]]) == set()
    documents.add_turn(pair[0], "s", "context", "ours")
    assert documents.turns(pair[1], "s") == []


def normalised(value: Any) -> Any:
    """Without times, which differ between two stores."""
    if isinstance(value, Document):
        return replace(value, created_at=0.0)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: normalised(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [normalised(one) for one in value]
    if hasattr(value, "deleted_at"):
        return replace(value, deleted_at=0.0, purged_at=value.purged_at and 0.0)
    return value


def everything(house: House, ids: list[str], chunks: list[str]) -> Any:
    """What a store says to every question."""
    store, told = house.hades.documents, []
    for who in (ALICE, BOB, MALLORY):
        told += [store.current(one, who) for one in ids] + [store.documents(who, None, None, 50), store.tally(who)]
        told += [store.documents(who, "default", ids[0], 2), store.audiences("default", who)]
        told += [
            store.deletions(who, None, 50),
            store.deletions(who, ids[0], 1),
            store.collection("default", who.tenant),
        ]
        for as_of in (0, 1, 3, 99):
            told.append(store.verdicts("default", who, [*chunks, "unknown"], as_of))
            told.append(store.vectors_of("default", who, ids, as_of, 4))
            told += [list(store.connected("default", who, ids[:2], hops, as_of, 3).items()) for hops in (1, 2, 3)]
    told += [store.load(chunks), store.vectors(chunks), store.readers_of(ids), store.collections()]
    told += [sorted(normalised(store.needless(1e12, 1e12)), key=lambda one: (one.document_id, one.version))]
    (index,) = {one.index for one in store.collections() if one.name == "default"}
    told += [store.chunk_ids(index, published) for published in (True, False)]
    told += [sorted(store.damaged(index, house.embedder.dimension))]
    return normalised(told)


NAMES = st.sampled_from(["a", "b", "c", "d"])
READERS = st.sampled_from([frozenset(), frozenset({"alice"}), frozenset({"alice", "bob"}), frozenset({"bob"})])
MOVES = st.lists(
    st.tuples(st.just("put"), NAMES, st.sampled_from(["one", "two"]), st.lists(NAMES, max_size=2), READERS,
              st.sampled_from(["HX-3", "KM-6", None]))
    | st.tuples(st.just("stage"), NAMES, st.sampled_from(["one", "two", "three"]))
    | st.tuples(st.just("delete"), st.lists(NAMES, min_size=1, max_size=2, unique=True))
    | st.tuples(st.just("annotate"), NAMES, READERS, st.sampled_from(["HX-3", "KM-6"]))
    | st.tuples(st.just("vacuum")) | st.tuples(st.just("retire")),
    min_size=4, max_size=10,
)  # fmt: skip


def do(house: House, move: tuple[Any, ...]) -> Any:
    """One move; what came of it, or the name of its error."""
    kind, *rest = move
    try:
        if kind in ("put", "stage"):
            name, text, links, readers, robot = (*rest, [], frozenset(), None)[:5]
            texts = [f"gripper {name} {text} {n}" for n in range(2)]
            document = house.describe(name, texts, readers=readers, metadata={"robot_id": robot})
            targets = tuple(dict.fromkeys(house.describe(link, ["x"]).document_id for link in links if link != name))
            document = replace(document, links=targets)
            epoch = house.stage(document, texts)
            return house.hades.publish([(document, epoch)]) if kind == "put" else epoch
        if kind == "delete":
            return house.hades.delete([house.describe(name, ["x"]).document_id for name in rest[0]], ALICE)
        if kind == "annotate":
            current = house.hades.documents.current(house.describe(rest[0], ["x"]).document_id, ALICE)
            changed = current and replace(current, readers=rest[1], metadata={"robot_id": rest[2]}, title="new")
            return changed and house.hades.documents.annotate(changed)
        if kind == "retire":
            needless = sorted(house.hades.documents.needless(1e12, 1e12), key=lambda d: (d.document_id, d.version))
            return [house.hades.documents.retire(document, 1e12, 1e12) for document in needless[:1]]
        return sorted((r.document.document_id, r.document.version, r.why, r.chunks) for r in house.hades.vacuum(-1, -1))
    except NexusError as error:
        return type(error).__name__, error.message


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a shorter list of moves would take minutes to find
)  # fmt: skip
@given(moves=MOVES)
def test_any_moves_leave_both_with_the_same_answers(moves: list[tuple[Any, ...]]) -> None:
    double = the_double()
    name = f"moves_{len(double.databases)}"
    houses = [
        build_house(store, memory.open("memory:"), WordEmbedder())
        for store in (sqlite.open("sqlite::memory:"), arango.open(double.create(name)))
    ]
    try:
        for move in [("put", "a", "one", ["b"], frozenset(), "HX-3"), *moves]:
            one, other = (normalised(do(house, move)) for house in houses)
            assert one == other, move
        ids = [houses[0].describe(name, ["x"]).document_id for name in "abcd"]
        chunks = sorted(house_chunks(houses[0]))
        assert chunks == sorted(house_chunks(houses[1]))
        assert everything(houses[0], ids, chunks) == everything(houses[1], ids, chunks)
    finally:
        for house in houses:
            house.retriever.close()
            house.hades.documents.close()


def house_chunks(house: House) -> set[str]:
    index = house.hades.find_collection("default").index
    return house.hades.documents.chunk_ids(index, published=False)


# ── the double itself ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("query", "values", "number"),
    [
        ("FOR v IN versions RETURN v", {}, 1577),
        ("FOR v IN versions FILTER v.title == @x RETURN v", {"x": "a"}, 1577),
        ("FOR v IN nowhere FILTER v._key == 'a' RETURN v", {}, 1203),
        ("FOR v IN versions FILTER v._key == @x RETURN v", {}, 1551),
        ("FOR v IN versions FILTER v._key == 'x' RETURN v", {"y": 1}, 1552),
        ("FOR v IN versions FILTER v._key == 'x' LET v = 1 RETURN v", {}, 1511),
        ("FOR v IN versions FILTER v._key == 'x' RETURN v.sort", {}, 1501),
        ("FOR v IN versions FILTER v._key == 'x' RETURN NOSUCH(v)", {}, 1540),
        ("FOR v IN versions FILTER v._key == 'x'", {}, 1501),
        ("INSERT {_key: 'a/b'} INTO turns", {}, 1221),
        ("INSERT {_key: 'a'} INTO edges", {}, 1233),
        ("INSERT {a: 1} INTO turns FOR t IN turns FILTER t._key == 'a' RETURN t", {}, 1579),
        ("REMOVE 'nobody' IN turns", {}, 1202),
        ("RETURN LENGTH(@x)", {"x": None}, 1563),
    ],
)
def test_the_double_refuses_what_a_server_would(
    store: arango.ArangoDocuments, query: str, values: dict[str, Any], number: int
) -> None:
    store.check()
    with pytest.raises(UpstreamInvalid, match=f"error {number} of ArangoDB"):
        store._database.aql(query, **values)


def test_the_double_keeps_transactions_apart(store: arango.ArangoDocuments) -> None:
    store.check()
    database, seen = store._database, "FOR t IN turns FILTER t._key == 'a' RETURN t.n"
    inner = database._ready()
    first = inner.begin_transaction(write=["turns"], allow_implicit=False, lock_timeout=1)
    second = inner.begin_transaction(write=["turns"], read=["fences"], allow_implicit=False, lock_timeout=1)
    with database._translating():
        list(first.aql.execute("INSERT {_key: 'a', n: 1} INTO turns"))
    assert list(first.aql.execute(seen)) == [1] and list(second.aql.execute(seen)) == database.aql(seen) == []
    with pytest.raises(arangodb.Contended), database._translating():
        second.aql.execute("INSERT {_key: 'a', n: 2} INTO turns OPTIONS {overwriteMode: 'replace'}")
    first.commit_transaction()
    assert database.aql(seen) == [1] and list(second.aql.execute(seen)) == []
    for query in ("INSERT {_key: 'f'} INTO fences", "FOR c IN chunks FILTER c._key == 'x' RETURN c"):
        with pytest.raises(UpstreamInvalid, match="1652"), database._translating():
            second.aql.execute(query)
    second.abort_transaction()
    with pytest.raises(arangodb.Contended), database._translating():
        second.aql.execute(seen)


@pytest.mark.parametrize("data", [{"query": "RETURN 1", "unknown": 1}, {"query": "RETURN '\ud800'"}])
def test_the_double_refuses_fields_and_bytes_that_are_none(double: ArangoDouble, data: dict[str, Any]) -> None:
    double.create("nexus")
    known = {"authorization": f"Basic {base64.b64encode(b'nexus:nexus-secret').decode()}"}
    body = json.dumps(data).encode()
    assert double.answer("POST", "/_db/nexus/_api/cursor", known, body)[0] == 400
    assert double.answer("POST", "/_db/nexus/_api/cursor", {}, body)[0] == 401
    assert double.answer("POST", "/_db/nexus/_api/traversal", known, b"{}")[0] == 404
    assert double.answer("POST", "/_db/nexus/_api/transaction", known, b'{"action": "x"}')[0] == 404
