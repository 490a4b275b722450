"""What only a Milvus server has or demands, seen in the requests that reach it (tests/milvus_server.py).

The behaviour that it shares with the other vector stores is in tests/test_stores.py.
"""

import datetime
import ipaddress
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pymilvus import DataType, Function, FunctionType, MilvusClient
from pymilvus.grpc_gen import schema_pb2

from nexus.errors import ConfigError, NexusError, Overloaded, Unavailable, UpstreamInvalid
from nexus.hades import alias_of
from nexus.ports import IndexRow, Scope
from nexus.stores import memory, milvus, sqlite
from nexus.types import SearchRequest, Vector
from tests.conftest import ALICE, build_house
from tests.milvus_server import MilvusServer

ACME = Scope("acme")
INDEX = "nx_test"
TOKEN = "nexus:se cret@1"
WRITTEN = "nexus:se%20cret%401"  # the same in an address


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MilvusServer]:
    server = MilvusServer(tmp_path / "server", token=TOKEN)
    yield server
    server.close()


@pytest.fixture
def store(server: MilvusServer) -> Iterator[milvus.MilvusVectors]:
    store = opened(server)
    store.open_index(INDEX, 8)
    yield store
    store.close()


def opened(server: MilvusServer, more: str = "", host: str = "127.0.0.1") -> milvus.MilvusVectors:
    return milvus.open(f"milvus://{WRITTEN}@{host}:{server.port}{more}")


def unit(seed: int) -> Vector:
    vector = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
    return vector / np.linalg.norm(vector)


def row(number: int, audience: str = "acme", terms: str = "gripper") -> IndexRow:
    return IndexRow(f"c{number}", "d1", audience, terms, unit(number))


def column(request: object, name: str) -> list[str]:
    """What an upsert says of one field, row by row."""
    (field,) = [one for one in request.fields_data if one.field_name == name]
    return list(field.scalars.string_data.data)


# ── tenants ─────────────────────────────────────────────────────────────────────────────────────


def test_the_tenant_is_the_partition_key(server: MilvusServer, store: milvus.MilvusVectors) -> None:
    (request,) = server.asked("CreateCollection")
    fields = schema_pb2.CollectionSchema.FromString(request.schema).fields
    assert [one.name for one in fields if one.is_partition_key] == ["tenant"]
    assert request.num_partitions == milvus.PARTITIONS


def test_rows_for_some_readers_lie_with_their_tenant(server: MilvusServer, store: milvus.MilvusVectors) -> None:
    store.upsert(INDEX, [row(1), row(2, "acme:ab"), row(3, "other:cd")])
    (request,) = server.asked("Upsert")
    assert column(request, "tenant") == ["acme", "acme", "other"]
    assert column(request, "audience") == ["acme", "acme:ab", "other:cd"]


def test_every_search_names_one_tenant_and_its_values_apart(server: MilvusServer, store: milvus.MilvusVectors) -> None:
    """Only `tenant ==` lets a server look into one partition alone."""
    hostile = '" or tenant != "'
    for scope in (ACME, Scope("acme", (hostile, "d1"), ("acme:ab",)), Scope(hostile)):
        store.search_dense(INDEX, unit(1), 5, scope)
        store.search_text(INDEX, "gripper", 5, scope)
    words = "tenant == {tenant} and audience in {audiences}"
    asked = server.asked("Search")
    assert {request.dsl for request in asked} == {words, f"{words} and document_id in {{ids}}"}
    assert [request.expr_template_values["tenant"].string_val for request in asked] == (["acme"] * 4 + [hostile] * 2)
    assert list(asked[2].expr_template_values["ids"].array_val.string_data.data) == [hostile, "d1"]


def test_deletes_go_in_batches_with_their_ids_apart(server: MilvusServer, store: milvus.MilvusVectors) -> None:
    store.upsert(INDEX, [row(n) for n in range(3)])
    store.delete(INDEX, ['"] or chunk_id != "', *(f"c{n}" for n in range(1, 1200))])
    asked = server.asked("Delete")
    assert {request.expr for request in asked} == {"chunk_id in {ids}"}
    assert [len(one.expr_template_values["ids"].array_val.string_data.data) for one in asked] == [500, 500, 200]
    assert store.chunk_ids(INDEX) == {"c0"}


# ── what was just published is found ────────────────────────────────────────────────────────────


def test_what_one_process_published_another_finds_at_once(server: MilvusServer) -> None:
    """As the ingestor and the retrievers are: two processes, one of which has never written."""
    documents = sqlite.open("sqlite::memory:")
    writer, reader = opened(server), opened(server, host="localhost")
    writing, reading = build_house(documents, writer), build_house(documents, reader)
    for n in range(3):
        writing.put("fault", f"fault XK{n} stops the hauler")
        (hit, *_) = reading.retriever.search(SearchRequest(f"hauler XK{n}"), ALICE).hits
        assert f"XK{n}" in hit.text
    for house in (writing, reading):
        house.retriever.close()
        house.hades.vectors.close()
    documents.close()


@pytest.mark.parametrize(
    ("consistency", "own", "others"), [("strong", True, True), ("session", True, False), ("bounded", False, False)]
)
def test_searches_wait_as_long_as_the_address_says(
    server: MilvusServer, consistency: str, own: bool, others: bool
) -> None:
    writer = opened(server, f"?consistency={consistency}")
    reader = opened(server, f"?consistency={consistency}", host="localhost")  # what it wrote is remembered by address
    for process in (writer, reader):
        process.open_index(INDEX, 8)
    writer.upsert(INDEX, [row(1)])
    for process, is_found in ((writer, own), (reader, others)):
        assert process.search_text(INDEX, "gripper", 5, ACME) == [] if not is_found else ["c1"]
        assert bool(process.search_dense(INDEX, unit(1), 5, ACME)) is is_found
        assert (process.count(INDEX), process.chunk_ids(INDEX)) == (1, {"c1"})  # of these the truth is wanted
    server.tick()
    for process in (writer, reader):
        assert [i for i, _ in process.search_dense(INDEX, unit(1), 5, ACME)] == ["c1"]
        process.close()


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────


def test_rows_go_in_batches_by_number_and_by_size(
    server: MilvusServer, store: milvus.MilvusVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.upsert(INDEX, [row(n) for n in range(milvus.ROWS_PER_CALL + 1)])
    assert [request.num_rows for request in server.asked("Upsert")] == [milvus.ROWS_PER_CALL, 1]
    monkeypatch.setattr(milvus, "BYTES_PER_CALL", 20_000)
    server.requests.clear()
    store.upsert(INDEX, [row(n, terms="gripper " * 500) for n in range(20)] + [row(20, terms="w" * 65_535)])
    asked = server.asked("Upsert")
    assert sum(request.num_rows for request in asked) == 21 and len(asked) > 5
    assert max(request.ByteSize() for request in asked[:-1]) <= 20_000 and asked[-1].num_rows == 1
    assert store.count(INDEX) == milvus.ROWS_PER_CALL + 1


def test_ids_come_in_pages(server: MilvusServer, store: milvus.MilvusVectors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "ROWS_PER_PAGE", 10)
    store.upsert(INDEX, [row(n) for n in range(25)])
    assert store.chunk_ids(INDEX) == {f"c{n}" for n in range(25)}
    assert len(server.asked("Query")) >= 3


def test_a_server_is_not_asked_to_flush(server: MilvusServer, store: milvus.MilvusVectors) -> None:
    store.upsert(INDEX, [row(1)])
    store.flush(INDEX)
    assert not server.asked("Flush") and store.search_text(INDEX, "gripper", 5, ACME)


# ── servers that are away, and that say no ──────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["Connect", "GetVersion", "CreateCollection", "Upsert", "Search", "Delete"])
def test_a_call_that_is_not_taken_is_tried_again(server: MilvusServer, method: str) -> None:
    server.fail(method, grpc.StatusCode.UNAVAILABLE, times=3)
    store = opened(server)
    store.open_index(INDEX, 8)
    store.upsert(INDEX, [row(1), row(2)])
    store.delete(INDEX, ["c2"])
    assert [i for i, _ in store.search_text(INDEX, "gripper", 5, ACME)] == ["c1"]
    assert not server.faults and server.counts()[method] >= 4
    store.close()


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_a_call_gives_up_at_its_deadline_and_the_next_ones_at_once_until_the_server_is_back(
    server: MilvusServer, store: milvus.MilvusVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    monkeypatch.setattr(milvus, "time", time)
    store.upsert(INDEX, [row(1)])
    server.stop()
    with pytest.raises(Unavailable, match="try again"):
        store.search_text(INDEX, "gripper", 5, ACME)
    assert time.pauses[:4] == [0.05, 0.1, 0.2, 0.4] and max(time.pauses) == milvus.LONGEST_PAUSE_SECONDS
    assert sum(time.pauses) <= milvus.DEADLINE_SECONDS < sum(time.pauses) + milvus.LONGEST_PAUSE_SECONDS
    given_up = len(time.pauses)
    for _ in range(2):
        with pytest.raises(Unavailable):
            store.search_text(INDEX, "gripper", 5, ACME)
    assert len(time.pauses) == given_up
    server.start()
    assert [i for i, _ in store.search_text(INDEX, "gripper", 5, ACME)] == ["c1"]
    server.stop()
    with pytest.raises(Unavailable):
        store.check()
    assert len(time.pauses) > given_up  # patient again, for it was there in between


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, ConfigError, "refuses the user"),
        (grpc.StatusCode.PERMISSION_DENIED, ConfigError, "refuses the user"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded, "too much"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable, "does not answer"),
        (grpc.StatusCode.INTERNAL, Unavailable, "does not answer"),
    ],
)
def test_what_a_server_says_no_with_is_told_in_words(
    server: MilvusServer, monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode, error: type[NexusError], says: str
) -> None:
    monkeypatch.setattr(milvus, "time", Time())
    store = milvus.MilvusVectors(opened(server).target, deadline_seconds=0.5)
    store.open_index(INDEX, 8)
    server.fail("Search", code, times=100)
    with pytest.raises(error, match=says):
        store.search_text(INDEX, "gripper", 5, ACME)
    server.faults.clear()
    assert store.search_text(INDEX, "gripper", 5, ACME) == []
    store.close()


def test_a_wrong_password_is_said_at_once_and_nowhere_repeated(
    server: MilvusServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = milvus.open(f"milvus://nexus:canary@127.0.0.1:{server.port}")
    with pytest.raises(ConfigError, match=r"stores\.vectors") as caught:
        store.check()
    assert server.counts() == {"Connect": 1}
    assert "canary" not in f"{caught.value!r} {caplog.text} {store.target!r}"
    store.close()


# ── collections that are not as they should be ──────────────────────────────────────────────────


def test_a_collection_that_a_crash_left_without_indexes_is_finished(server: MilvusServer) -> None:
    store = opened(server)
    store._call(lambda client, _: client.create_collection(INDEX, schema=store._schema(8), num_partitions=16))
    store.open_index(INDEX, 8)
    store.upsert(INDEX, [row(1)])
    assert [i for i, _ in store.search_text(INDEX, "gripper", 5, ACME)] == ["c1"]
    assert len(server.asked("CreateCollection")) == 1
    store.close()


@pytest.mark.parametrize("change", ["another field", "no field", "another type", "another partition key"])
def test_a_collection_of_another_schema_is_refused_and_left_alone(server: MilvusServer, change: str) -> None:
    client = MilvusClient(uri=f"http://127.0.0.1:{server.port}", token=TOKEN, dedicated=True)
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("chunk_id", DataType.VARCHAR, is_primary=True, max_length=64)
    names = {"document_id": 64, "tenant": 128, "audience": 128} | ({"mine": 8} if change == "another field" else {})
    key = "document_id" if change == "another partition key" else "tenant"
    for name, length in names.items():
        if name == "audience" and change != "another field":
            if change == "another type":
                schema.add_field(name, DataType.INT64)
            if change in ("no field", "another type"):
                continue
        schema.add_field(name, DataType.VARCHAR, max_length=length, is_partition_key=name == key)
    schema.add_field("terms", DataType.VARCHAR, max_length=65_535, enable_analyzer=True)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=8)
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(Function("bm25", FunctionType.BM25, input_field_names=["terms"], output_field_names=["sparse"]))
    client.create_collection(INDEX, schema=schema, num_partitions=4)
    client.close()
    store = opened(server)
    with pytest.raises(ConfigError, match=rf"{INDEX}.*another schema.*(mine|audience|tenant|document_id)"):
        store.open_index(INDEX, 8)
    assert not server.asked("CreateIndex")
    store.close()


def test_vectors_that_the_server_refuses_are_said_to_be_malformed(server: MilvusServer) -> None:
    """From a process that has not opened the index, and so knows nothing of its dimension."""
    opened(server).open_index(INDEX, 8)
    store = opened(server)
    with pytest.raises(UpstreamInvalid, match="malformed"):
        store.upsert(INDEX, [IndexRow("c1", "d1", "acme", "gripper", np.ones(4, np.float32))])
    assert store.count(INDEX) == 0
    store.close()


def test_the_alias_of_a_collection_follows_its_live_index(server: MilvusServer) -> None:
    for vectors in (opened(server), memory.open("memory:")):
        documents = sqlite.open("sqlite::memory:")
        house = build_house(documents, vectors)
        house.put("a.md", "gripper")
        assert vectors.aliased(alias_of("default")) == house.hades.find_collection("default").index
        house.retriever.close()
        documents.close()
        vectors.close()


def test_an_index_that_somebody_dropped_is_mended_by_fsck(server: MilvusServer) -> None:
    documents, vectors = sqlite.open("sqlite::memory:"), opened(server)
    house = build_house(documents, vectors)
    house.put("a.md", "gripper torque")
    index = house.hades.find_collection("default").index
    client = MilvusClient(uri=f"http://127.0.0.1:{server.port}", token=TOKEN, dedicated=True)
    client.drop_alias(alias_of("default"))
    client.drop_collection(index)
    client.close()
    with pytest.raises(Unavailable, match="fsck"):
        house.retriever.search(SearchRequest("gripper"), ALICE)
    faults = house.hades.fsck()
    assert [fault.kind for fault in faults] == ["visible chunks that no search can find"]
    assert house.hades.repair(faults) == [] and house.hades.fsck() == []
    assert house.retriever.search(SearchRequest("gripper"), ALICE).hits
    house.retriever.close()
    documents.close()
    vectors.close()


# ── addresses ───────────────────────────────────────────────────────────────────────────────────


def test_an_address_says_where_and_how() -> None:
    assert milvus.target_of("milvus://host") == milvus.Target("http://host:19530", lite=False)
    assert milvus.target_of("milvus://[::1]:9/") == milvus.Target("http://[::1]:9", lite=False)
    target = milvus.target_of("milvus://me:a%3Ab%2F%40@host:1/robots?tls=true&server_name=n&consistency=session")
    assert target == milvus.Target("https://host:1", False, "me:a:b/@", "robots", "", "n", "session")
    assert milvus.target_of("milvus://a%2Dtoken@localhost").token == "a-token"
    assert "a:b" not in repr(target)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("milvus:", "HOST:PORT"), ("milvus://", "HOST:PORT"), ("milvus://me:canary@", "HOST:PORT"),
        ("milvus://me:canary@host:port", "HOST:PORT"), ("milvus://host?tls", "HOST:PORT"),
        ("milvus://host?ssl=true", "'ssl'"), ("milvus://host?tls=yes", "true or false"),
        ("milvus://host?consistency=eventually", "strong, session, bounded"), ("milvus://host?ca=x", "tls=true"),
        ("milvus://host?tls=true&ca=/no/such/file", "not there"),
    ],
)  # fmt: skip
def test_a_bad_address_is_refused_without_its_password(address: str, says: str) -> None:
    for use in (milvus.open, milvus.check):
        with pytest.raises(ConfigError, match=says) as caught:
            use(address)
        assert "canary" not in caught.value.message


def test_a_password_that_would_travel_in_the_clear_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for harmless in ("milvus://me:canary@127.0.0.1", "milvus://me:canary@host?tls=true", "milvus://host"):
        milvus.target_of(harmless)
    assert not caplog.records
    milvus.target_of("milvus://me:canary@host")
    assert "unencrypted" in caplog.text and "canary" not in caplog.text


def test_an_encrypted_server_is_spoken_to_only_where_it_is_who_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "time", Time())
    (key, certificate), (_, other) = make_certificate(), make_certificate()
    for name, content in (("ca.pem", certificate), ("other.pem", other)):
        (tmp_path / name).write_bytes(content)
    server = MilvusServer(tmp_path / "server", token=TOKEN, tls=(key, certificate))
    store = opened(server, f"?tls=true&ca={tmp_path / 'ca.pem'}")
    store.open_index(INDEX, 8)
    store.upsert(INDEX, [row(1)])
    assert store.count(INDEX) == 1
    heard = len(server.requests)
    for more in ("?tls=true", f"?tls=true&ca={tmp_path / 'other.pem'}", ""):
        stranger = milvus.MilvusVectors(opened(server, more).target, deadline_seconds=0.5)
        with pytest.raises(Unavailable):
            stranger.check()
        stranger.close()
    assert len(server.requests) == heard
    store.close()
    server.close()


def make_certificate() -> tuple[bytes, bytes]:
    """A private key and its own certificate for 127.0.0.1, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return secret, certificate.public_bytes(serialization.Encoding.PEM)


# ── the double is strict ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.query(INDEX, filter='tenant == "acme"', limit=5),
        lambda client: client.query(INDEX, filter="tenant == {tenant}", limit=5),
        lambda client: client.query(INDEX, filter="tenant != {t}", filter_params={"t": "a", "u": "b"}, limit=5),
        lambda client: client.query(INDEX, filter="tenant == {t}", filter_params={"t": "a"}),
        lambda client: client.delete(INDEX, filter="chunk_id in ['c1']"),
        lambda client: client.search(INDEX, data=[unit(0)], anns_field="dense", filter=f"tenant == {json.dumps('a')}"),
        lambda client: client.flush(INDEX, timeout=0.3),
    ],
)
def test_a_careless_request_is_refused_by_the_double(
    server: MilvusServer, store: milvus.MilvusVectors, ask: Callable[[MilvusClient], object]
) -> None:
    with pytest.raises(NexusError):
        store._call(lambda client, _: ask(client))
