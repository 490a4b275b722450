"""The Triton client against real servers, and a pool of them when one is bad."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nexus.errors import ConfigError, InvalidRequest, NotFound, TooLarge, Unavailable, UpstreamInvalid
from nexus.models import triton
from nexus.models.triton import STAGES, Counters, Statistics, TritonPool, TritonServer, between
from tests.triton_server import RealTriton, write_models

X = np.array([[1.5, 2.5], [3, -4]], np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[RealTriton]:
    server = RealTriton(folder).start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def other(folder: Path) -> Iterator[RealTriton]:
    server = RealTriton(folder).start("floats")
    yield server
    server.kill()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def with_server(url: str, work: Callable[[TritonServer], Awaitable[None]], seconds: float = 60) -> None:
    async def run() -> None:
        server = TritonServer(url, seconds)
        try:
            await work(server)
        finally:
            await server.close()

    asyncio.run(run())


def with_pool(urls: list[str], work: Callable[[TritonPool, Clock], Awaitable[None]], seconds: float = 60) -> None:
    async def run() -> None:
        clock = Clock()
        pool = TritonPool(urls, 5, seconds, clock)
        try:
            await work(pool, clock)
        finally:
            await pool.close()

    asyncio.run(run())


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, real: RealTriton) -> str:
    return real.http if request.param == "http" else real.grpc


# ── one server ──────────────────────────────────────────────────────────────────────────────────


def test_models_are_listed_loaded_asked_and_unloaded(url: str) -> None:
    async def work(server: TritonServer) -> None:
        await server.unload("floats")
        await server.check()
        assert not await server.ready("floats")
        assert {entry.name for entry in await server.index()} == {"floats", "halves", "sum", "texts"}
        await server.load("floats")
        assert await server.ready("floats") and await server.ready("floats", "1") and await server.ready()
        assert ("floats", "1", "READY") in [(e.name, e.version, e.state) for e in await server.index()]
        shape = {"name": "X", "datatype": "FP32", "shape": [-1, 2]}
        metadata = await server.metadata("floats")
        assert (metadata["inputs"], metadata["outputs"], metadata["versions"]) == ([shape], [shape], ["1"])
        assert (await server.config("floats"))["input"][0]["dims"] == [-1, 2]
        await server.unload("floats")
        with pytest.raises(NotFound):
            await server.infer("floats", {"X": X})

    with_server(url, work)


def test_every_kind_of_tensor_comes_back_as_it_went(url: str) -> None:
    async def work(server: TritonServer) -> None:
        for model in ("floats", "sum", "texts", "halves"):
            await server.load(model)
        same = await server.infer("floats", {"X": X}, outputs=["X"], version="1")
        assert same["X"].dtype == np.float32 and np.array_equal(same["X"], X)
        big_endian = await server.infer("floats", {"X": X.astype(">f4")[::-1]})
        assert np.array_equal(big_endian["X"], X[::-1])
        halves = await server.infer("halves", {"X": X.astype(ml_dtypes.bfloat16)})
        assert halves["X"].dtype == ml_dtypes.bfloat16 and np.array_equal(halves["X"].astype(np.float32), X)
        total = await server.infer("sum", {"A": np.array([1, 2**62]), "B": np.array([2, -1])})
        assert total["SUM"].dtype == np.int64 and total["SUM"].tolist() == [3, 2**62 - 1]
        texts = np.array([b"a\0\xff\0", "é", b""], object)
        assert (await server.infer("texts", {"X": texts}))["X"].tolist() == [b"a\0\xff\0", "é".encode(), b""]
        assert (await server.infer("texts", {"X": np.array(["wide", "ü"])}))["X"].tolist() == [b"wide", "ü".encode()]

    with_server(url, work)


async def counted(server: TritonServer, since: Counters, requests: int) -> Counters:
    """The model's counters once so many are in: Triton counts after it has answered."""
    deadline = time.monotonic() + 20
    while True:
        told = between(since, now := (await server.statistics("sum"))["sum", "1"])
        if min(told.executions, told.requests + told.failures) >= requests:
            return now
        assert time.monotonic() < deadline, now


def test_statistics_are_differences(url: str) -> None:
    async def work(server: TritonServer) -> None:
        await server.load("sum")
        started = (await server.statistics("sum"))["sum", "1"]
        await server.infer("sum", {"A": np.array([1]), "B": np.array([1])})
        before = await counted(server, started, 1)
        for _ in range(3):
            await server.infer("sum", {"A": np.array([1]), "B": np.array([1])})
        with pytest.raises(UpstreamInvalid, match="thirteen") as caught:
            await server.infer("sum", {"A": np.array([13]), "B": np.array([1])})
        assert caught.value.code == "model_failed" and ".py" not in caught.value.message
        after = await counted(server, before, 4)
        told = between(before, after)
        assert (told.requests, told.failures, told.executions) == (3, 1, 4)
        assert 0 < told.queue_seconds < 10 and 0 < told.compute_seconds < 10
        assert after.last_inference_ms >= before.last_inference_ms > 0

    with_server(url, work)


def test_scaling_changes_how_many_instances_there_are(url: str, folder: Path) -> None:
    async def work(server: TritonServer) -> None:
        await server.load("sum")
        await server.scale("sum", 2)
        assert [group["count"] for group in (await server.config("sum"))["instance_group"]] == [2]
        assert (await server.infer("sum", {"A": np.array([1]), "B": np.array([2])}))["SUM"].tolist() == [3]
        await server.scale("sum", 1)
        assert [group["count"] for group in (await server.config("sum"))["instance_group"]] == [1]
        for count in (0, -1, 65):
            with pytest.raises(InvalidRequest, match="instances"):
                await server.scale("sum", count)

    with_server(url, work)


def test_a_model_comes_with_its_configuration_and_files(url: str, folder: Path) -> None:
    code = (folder / "models" / "floats" / "1" / "model.py").read_bytes()
    side = [{"name": "X", "data_type": "TYPE_INT32", "dims": [-1]}]

    async def work(server: TritonServer) -> None:
        await server.load("sent", {"backend": "python", "input": side, "output": side}, {"file:1/model.py": code})
        assert (await server.infer("sent", {"X": np.array([7], np.int32)}))["X"].tolist() == [7]
        await server.unload("sent")
        with pytest.raises(InvalidRequest, match="config"):
            await server.load("sent", None, {"file:1/model.py": code})
        for name in ("file:../x", "file:1/../../x", "file:/etc/x", "1/model.py", "file:", "file:1//x", "file:./x"):
            with pytest.raises(InvalidRequest, match="name reads"):
                await server.load("sent", {"backend": "python"}, {name: code})
        with pytest.raises(TooLarge):
            await server.load("sent", {"backend": "x" * 300_000})

    with_server(url, work)


def test_what_the_caller_does_wrong_is_said(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(server: TritonServer) -> None:
        await server.load("floats")
        refused = [
            ({"X": np.zeros((1, 3), np.float32)}, "shape"),
            ({"X": np.zeros((1, 2), np.int64)}, "data-type"),
            ({"Q": X}, "Q"),
            ({}, "."),
            ({"X": np.zeros((1, 2), complex)}, "type that Triton does not know"),
            ({"X": np.array([[1, None]], object)}, "type that Triton does not know"),
            ({"X": np.array([[b"a", b"b"]])}, "type that Triton does not know"),
        ]
        for inputs, words in refused:
            with pytest.raises(InvalidRequest, match=words):
                await server.infer("floats", inputs)
        with pytest.raises(InvalidRequest, match="Z"):
            await server.infer("floats", {"X": X}, outputs=["Z"])
        for unknown in (
            server.infer("none", {"X": X}), server.infer("floats", {"X": X}, version="7"), server.load("none"),
            server.metadata("none"), server.config("none"), server.statistics("none"), server.scale("none", 2),
        ):  # fmt: skip
            with pytest.raises(NotFound):
                await unknown
        for name in ("", "..", ".", "a/b", "a b", "x" * 129, "é", "a\n"):
            with pytest.raises(InvalidRequest, match="name"):
                await server.load(name)
        with pytest.raises(InvalidRequest, match="version"):
            await server.infer("floats", {"X": X}, version="1/../x")
        monkeypatch.setattr(triton, "MAX_MESSAGE_CHARACTERS", 20)
        with pytest.raises(InvalidRequest) as caught:
            await server.infer("floats", {"X": np.zeros((1, 3), np.float32)})
        assert len(caught.value.message) < 60

    with_server(url, work)


@pytest.mark.parametrize(
    "url", ["ftp://h:1", "http://", "http://h:1/path", "http://user:word@h:1", "h:1", "http://h:1?x", ""]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match=r"triton\.servers") as caught:
        TritonServer(url)
    assert "word" not in caught.value.message


def counters(**changed: int) -> Counters:
    stages = {stage: (10, 1000) for stage in STAGES} | {s: (n, 1000 + n) for s, n in changed.items() if s in STAGES}
    return Counters(changed.get("inferences", 10), changed.get("executions", 10), 0, stages)


def test_counters_that_went_backwards_start_anew() -> None:
    assert between(counters(), counters()) == Statistics(0, 0, 0, 0.0, 0.0)
    assert between(None, counters()) == Statistics(10, 10, 10, 1e-7, 3e-7)
    assert between(counters(), counters(success=14)).requests == 4
    assert between(counters(), counters(success=3)) == between(None, counters(success=3))
    assert between(counters(), counters(executions=9)) == between(None, counters(executions=9))
    assert between(counters(success=10**6), counters()).requests == 10


# ── bad servers ─────────────────────────────────────────────────────────────────────────────────

HTML = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 13\r\nconnection: close\r\n\r\n<html></html>"


UNKNOWN = b'{"error":"Request for unknown model: \'x\' is not found"}'


def answer_with(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Bad:
    """A listener that gives every request the same answer, or none, and counts them."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.connections = 0
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError):
            await reader.read(100)
            if self.answer is None:
                await reader.read()
            else:
                writer.write(self.answer)
                await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["Bad"]:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with listener:
            yield self


def tensor(shape: str, size: int, datatype: str = "FP32") -> bytes:
    output = f'"name":"X","datatype":"{datatype}","shape":{shape},"parameters":{{"binary_data_size":{size}}}'
    head = f'{{"outputs":[{{{output}}}]}}'
    return answer_with("200 OK", head.encode() + bytes(16), f"inference-header-content-length: {len(head)}")


@pytest.mark.parametrize(
    ("answer", "error", "code"),
    [
        (HTML, UpstreamInvalid, "upstream_invalid"),
        (answer_with("500 Oops", b"<html>"), UpstreamInvalid, "upstream_invalid"),
        (answer_with("404 Not Found", b'{"error":"no such page"}'), UpstreamInvalid, "upstream_invalid"),
        (answer_with("404 Not Found", UNKNOWN), NotFound, "no_model"),
        (answer_with("500 Oops", b'{"error":"the model died"}'), UpstreamInvalid, "model_failed"),
        (answer_with("503 Busy", b'{"error":"exiting"}'), Unavailable, "unavailable"),
        (answer_with("400 Bad", b'{"error":"wrong shape"}'), InvalidRequest, "invalid_request"),
        (answer_with("200 OK", b"[]"), UpstreamInvalid, "upstream_invalid"),
        (answer_with("200 OK", b'{"outputs": 7}'), UpstreamInvalid, "upstream_invalid"),
        (answer_with("200 OK", b'{"outputs": []}'), UpstreamInvalid, "upstream_invalid"),
        (b"nothing of HTTP\r\n\r\n", Unavailable, "unavailable"),
        (b"", Unavailable, "unavailable"),
        (None, Unavailable, "unavailable"),
        (tensor("[2, 3]", 16), UpstreamInvalid, "upstream_invalid"),
        (tensor("[8]", 32), UpstreamInvalid, "upstream_invalid"),
        (tensor("[1]", 16, "BYTES"), UpstreamInvalid, "upstream_invalid"),
        (tensor("[4]", 16, "FP31"), UpstreamInvalid, "upstream_invalid"),
    ],
)  # fmt: skip
def test_what_a_bad_server_says_becomes_an_error(answer: bytes | None, error: type[Exception], code: str) -> None:
    async def run() -> None:
        async with Bad(answer).listening() as bad:
            server = TritonServer(bad.url, 0.5)
            with pytest.raises(error) as caught:
                await server.infer("floats", {"X": X}, outputs=["X"])
            assert caught.value.code == code and "127.0.0.1" not in caught.value.message
            await server.close()

    asyncio.run(run())


# ── several servers ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("answer", [HTML, None], ids=["html", "silent"])
def test_a_bad_server_is_left_alone_until_a_probe_finds_it_well(
    real: RealTriton, other: RealTriton, answer: bytes | None
) -> None:
    async def run() -> None:
        async with Bad(answer).listening() as bad:
            clock = Clock()
            pool = TritonPool([bad.url, real.http, other.grpc], 5, 3, clock)
            await pool.load("floats")
            after_load = bad.connections
            for _ in range(20):
                assert np.array_equal((await pool.infer("floats", {"X": X}))["X"], X)
            assert bad.connections == after_load
            clock.now += 4.9
            await asyncio.gather(*(pool.infer("floats", {"X": X}) for _ in range(10)))
            assert bad.connections == after_load
            clock.now += 0.2
            await asyncio.gather(*(pool.infer("floats", {"X": X}) for _ in range(10)))
            assert len(await pool.probe()) == 2
            probes = bad.connections
            assert probes - after_load in (1, 2)  # it is asked whether it is ready, and who it is
            await asyncio.gather(*(pool.infer("floats", {"X": X}) for _ in range(10)))
            assert bad.connections == probes
            await pool.close()

    asyncio.run(run())


def test_a_request_that_a_bad_server_failed_is_answered_by_another(other: RealTriton) -> None:
    async def run() -> None:
        async with Bad(HTML).listening() as bad:
            pool = TritonPool([bad.url, other.http], 5, 30, Clock())
            assert np.array_equal((await pool.infer("floats", {"X": X}))["X"], X)
            assert bad.connections == 1
            await pool.close()

    asyncio.run(run())


def test_a_request_is_tried_on_two_servers_and_no_more() -> None:
    async def run() -> None:
        async with Bad(HTML).listening() as a, Bad(HTML).listening() as b, Bad(HTML).listening() as c:
            pool = TritonPool([a.url, b.url, c.url], 5, 30, Clock())
            with pytest.raises(UpstreamInvalid):
                await pool.infer("floats", {"X": X})
            assert [a.connections, b.connections, c.connections] == [1, 1, 0]
            with pytest.raises(UpstreamInvalid):
                await pool.infer("floats", {"X": X})
            with pytest.raises(Unavailable, match="no Triton server"):
                await pool.infer("floats", {"X": X})
            assert [a.connections, b.connections, c.connections] == [1, 1, 1]
            await pool.close()

    asyncio.run(run())


def test_a_callers_mistake_and_a_failing_model_eject_nobody(other: RealTriton) -> None:
    async def work(pool: TritonPool, clock: Clock) -> None:
        for _ in range(3):
            with pytest.raises(InvalidRequest):
                await pool.infer("floats", {"X": np.zeros((1, 3), np.float32)})
            with pytest.raises(NotFound):
                await pool.infer("none", {"X": X})
        await pool.load("sum")
        with pytest.raises(UpstreamInvalid, match="thirteen"):
            await pool.infer("sum", {"A": np.array([13]), "B": np.array([1])})
        assert len(await pool.probe()) == 2

    with_pool([other.http, other.grpc], work)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_was_killed_is_taken_back_by_a_probe(folder: Path, other: RealTriton, protocol: str) -> None:
    victim = RealTriton(folder).start("floats")
    mine = victim.http if protocol == "http" else victim.grpc

    async def work(pool: TritonPool, clock: Clock) -> None:
        name = mine.partition("://")[2]
        for _ in range(4):
            await pool.infer("floats", {"X": X})
        victim.kill()
        for _ in range(4):
            assert np.array_equal((await pool.infer("floats", {"X": X}))["X"], X)
        clock.now += 6
        assert name not in await pool.probe()
        await asyncio.to_thread(victim.start)
        assert name not in await pool.probe()  # nobody asks before its time
        for _ in range(20):  # a gRPC channel needs a moment to connect anew
            clock.now += 6
            if name in await pool.probe():
                break
            await asyncio.sleep(0.2)
        else:
            raise AssertionError("it was not taken back")
        for _ in range(4):  # it came back without the model: the other one is asked
            assert np.array_equal((await pool.infer("floats", {"X": X}))["X"], X)
        assert [outcome.error for outcome in await pool.load("floats")] == [None, None]
        index = {entry.name: ready_on for entry, ready_on in await pool.index()}
        assert index["floats"] == 2

    try:
        with_pool([mine, other.http], work)
    finally:
        victim.kill()


def test_orders_go_to_all_and_each_says_what_became_of_it(real: RealTriton, other: RealTriton) -> None:
    async def work(pool: TritonPool, clock: Clock) -> None:
        done = await pool.load("texts")
        assert [one.error for one in done[:2]] == [None, None] and isinstance(done[2].error, Unavailable)
        assert [one.server for one in done] == [
            u.partition("://")[2] for u in (real.http, other.grpc, "http://127.0.0.1:1")
        ]
        assert {(e.name, e.state): n for e, n in await pool.index()}["texts", "READY"] == 2
        assert await pool.ready("texts")
        assert [one.error for one in await pool.scale("texts", 2)][:2] == [None, None]
        for server in (TritonServer(real.http), TritonServer(other.http)):
            assert (await server.config("texts"))["instance_group"][0]["count"] == 2
            await server.close()
        assert [one.error for one in await pool.unload("texts")][:2] == [None, None]
        assert not await pool.ready("texts")
        assert [type(one.error) for one in await pool.load("none")] == [NotFound, NotFound, Unavailable]

    with_pool([real.http, other.grpc, "http://127.0.0.1:1"], work)  # fmt: skip


def test_polls_of_a_pool_are_differences_over_all_servers(real: RealTriton, other: RealTriton) -> None:
    async def work(pool: TritonPool, clock: Clock) -> None:
        await pool.load("floats")
        await pool.poll()
        for _ in range(6):
            await pool.infer("floats", {"X": X})
        requests = executions = failures = 0
        seconds = 0.0
        async with asyncio.timeout(20):
            while requests < 6:  # a server counts a request a moment after it has answered it
                told = (await pool.poll())["floats", "1"]
                requests, executions = requests + told.requests, executions + told.executions
                failures, seconds = failures + told.failures, seconds + told.compute_seconds
        assert (requests, failures, executions) == (6, 0, 6) and seconds > 0
        assert (await pool.poll())["floats", "1"].requests == 0
        assert (await pool.statistics("floats"))["floats", "1"].inferences >= 6

    with_pool([real.http, other.grpc], work)


class Double:
    """A server whose requests end when they are told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = 0
        self.gate = asyncio.Event()

    async def infer(self, *_: object) -> dict[str, np.ndarray]:
        self.asked += 1
        await self.gate.wait()
        return {}

    async def close(self) -> None: ...


def test_the_server_with_the_least_to_do_is_asked_then_the_quickest() -> None:
    async def run() -> None:
        clock = Clock()
        pool = TritonPool(["http://a:1", "http://b:1", "http://c:1"], 5, 60, clock)
        doubles = [Double(name) for name in "abc"]
        for member, double in zip(pool._members, doubles, strict=True):
            member.server = double
        first = [asyncio.create_task(pool.infer("m", {})) for _ in range(6)]
        await asyncio.sleep(0)
        assert [double.asked for double in doubles] == [2, 2, 2]
        for seconds, double in zip((3, 1, 2), (doubles[1], doubles[0], doubles[2]), strict=True):
            clock.now += seconds  # b ends after 3 s, a after 4, c after 6
            double.gate.set()
            for _ in itertools.repeat(None, 5):
                await asyncio.sleep(0)
        await asyncio.gather(*first)
        for _ in range(4):
            await pool.infer("m", {})
        assert [double.asked for double in doubles] == [2, 6, 2]
        await pool.close()

    asyncio.run(run())


def test_adding_up_counters_loses_nothing() -> None:
    one, two = counters(success=14), replace(counters(), inferences=5, last_inference_ms=9)
    assert triton._add(one, two).stages["success"] == (24, 2014)
    assert (triton._add(one, two).inferences, triton._add(one, two).last_inference_ms) == (15, 9)
