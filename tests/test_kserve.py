"""KServe v2 at the front door: tensors as JSON and as bytes, and every way in which they can be wrong."""

import asyncio
import base64
import json
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http.aio as stock
import uvicorn
from starlette.testclient import TestClient
from tritonclient.utils import InferenceServerException

from deployments import kserve
from deployments.gateway import build
from nexus import telemetry
from nexus.errors import CallerError, InvalidRequest, NexusError, NotFound, Unavailable, UpstreamInvalid
from nexus.models.triton import STAGES, Counters, IndexEntry, Outcome
from tests.conftest import Door
from tests.test_gateway import check_problem

INFER = "/v2/models/echo/infer"


class Pool:
    """A pool whose one model gives every tensor back, and that remembers what it was told to do."""

    def __init__(self) -> None:
        self.orders: list[tuple] = []
        self.error: NexusError | None = None
        self.outcomes = [Outcome("a:1", None), Outcome("b:1", None)]

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None, version: str = ""
    ) -> dict[str, np.ndarray]:
        if self.error:
            raise self.error
        if model != "echo":
            raise NotFound("no such model", code="no_model")
        self.orders.append(("infer", outputs, version))
        return {name: tensor for name, tensor in inputs.items() if outputs is None or name in outputs}

    async def ready(self, model: str | None = None, version: str = "") -> bool:
        return model in (None, "echo")

    async def index(self) -> list[tuple[IndexEntry, int]]:
        return [(IndexEntry("echo", "1", "READY", ""), 2), (IndexEntry("other", "", "", ""), 0)]

    async def metadata(self, model: str, version: str = "") -> dict:
        return {"name": model, "versions": [version or "1"], "platform": "python", "inputs": [], "outputs": []}

    async def config(self, model: str, version: str = "") -> dict:
        return {"name": model, "max_batch_size": 0}

    async def statistics(self, model: str = "", version: str = "") -> dict:
        return {("echo", "1"): Counters(3, 2, 9, dict.fromkeys(STAGES, (3, 30)))}

    async def load(self, model: str, config: Mapping | None = None, files: Mapping | None = None) -> list[Outcome]:
        self.orders.append(("load", model, config, files))
        return self.outcomes

    async def unload(self, model: str) -> list[Outcome]:
        self.orders.append(("unload", model))
        return self.outcomes


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def client(door: Door, pool: Pool) -> Iterator[TestClient]:
    app = build(replace(door.lent, triton=pool))
    with TestClient(app, headers=door.headers(), raise_server_exceptions=False) as client:
        yield client


def tensor(data: object, shape: list, datatype: str = "FP32", **fields: object) -> dict:
    return {"name": "X", "shape": shape, "datatype": datatype, "data": data, **fields}


# ── the wire, alone ─────────────────────────────────────────────────────────────────────────────

ARRAYS = [
    np.array([[True, False]]), np.array([0, 255], np.uint8), np.array([[2**16 - 1]], np.uint16),
    np.array([2**32 - 1], np.uint32), np.array([0, 2**64 - 1], np.uint64), np.array([-128, 127], np.int8),
    np.array([-(2**15)], np.int16), np.array([[[-(2**31)]]], np.int32), np.array([-(2**63), 2**63 - 1], np.int64),
    np.array([0.1, 65504], np.float16), np.array([0.1, 3e38], ml_dtypes.bfloat16),
    np.array([[0.1], [3e38]], np.float32),
    np.array([0.1, 1e308]), np.array([[b"a", "\u00e9".encode()], [b"", b"b\0"]], object), np.zeros((0, 3), np.float32),
    np.array(7, np.int32),
]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{list(array.shape)}")
@pytest.mark.parametrize("binary", [False, True])
def test_every_datatype_goes_through_both_ways(array: np.ndarray, binary: bool) -> None:
    asked = kserve.Inference({}, None, binary, "7")
    body, headers = kserve.encode("m", "3", asked, {"Y": array, "X": array})
    head = json.loads(body[: int(headers.get(kserve.HEADER, len(body)))])
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "3", "7")
    assert (kserve.HEADER in headers) == binary
    again = json.dumps({"inputs": head["outputs"]}).encode()
    back = kserve.decode(again + body[len(body) if not binary else int(headers[kserve.HEADER]) :],
                         str(len(again)) if binary else None)  # fmt: skip
    assert list(back.inputs) == ["Y", "X"]
    for found in back.inputs.values():
        assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)


def test_lists_may_be_nested_as_the_shape_or_flat() -> None:
    for data in ([[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6]):
        read = kserve.decode(json.dumps({"inputs": [tensor(data, [2, 3])]}).encode(), None)
        assert read.inputs["X"].tolist() == [[1, 2, 3], [4, 5, 6]]


BAD_TENSORS = [
    (tensor([1], [2]), "/inputs/0/data"),
    (tensor([1, 2, 3], [2]), "/inputs/0/data"),
    (tensor([[1, 2], [3]], [2, 2]), "/inputs/0/data"),
    (tensor([[1, 2, 3, 4]], [2, 2]), "/inputs/0/data"),
    (tensor([[[1]]], [1, 1]), "/inputs/0/data"),
    (tensor([1, [2]], [2]), "/inputs/0/data"),
    (tensor({}, [1]), "/inputs/0/data"),
    (tensor(None, [1]), "/inputs/0/data"),
    (tensor([1], [-1]), "/inputs/0/shape/0"),
    (tensor([1], [1, True]), "/inputs/0/shape/1"),
    (tensor([1], [1.0]), "/inputs/0/shape/0"),
    (tensor([1], [2**31]), "/inputs/0/shape/0"),
    (tensor([1], [2**30] * 30), "/inputs/0/data"),
    (tensor([], [0, *[2**31 - 1] * 8]), "/inputs/0"),
    (tensor([1], [1] * 33), "/inputs/0/shape"),
    (tensor([1], "1"), "/inputs/0/shape"),
    (tensor([1], [1], "FP31"), "/inputs/0/datatype"),
    (tensor([1], [1], ["FP32"]), "/inputs/0/datatype"),
    (tensor(["1"], [1]), "/inputs/0/data"),
    (tensor([None], [1]), "/inputs/0/data"),
    (tensor([True], [1]), "/inputs/0/data"),
    (tensor([1], [1], "BOOL"), "/inputs/0/data"),
    (tensor([1.0], [1], "INT32"), "/inputs/0/data"),
    (tensor([2**31], [1], "INT32"), "/inputs/0/data"),
    (tensor([-1], [1], "UINT8"), "/inputs/0/data"),
    (tensor([2**64], [1], "UINT64"), "/inputs/0/data"),
    (tensor([1e39], [1]), "/inputs/0/data"),
    (tensor([70000], [1], "FP16"), "/inputs/0/data"),
    (tensor([1], [1], "BYTES"), "/inputs/0/data"),
    (tensor([1], [1], name=""), "/inputs/0/name"),
    (tensor([1], [1], name=5), "/inputs/0/name"),
    (tensor([1], [1], name="x" * 257), "/inputs/0/name"),
    (tensor([1], [1], name="a\nb"), "/inputs/0/name"),
    (tensor([1], [1], parameters={"binary_data_size": 4}), "/inputs/0"),
    ({"name": "X", "shape": [1], "datatype": "FP32"}, "/inputs/0"),
    ({"name": "X", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}},
     "/inputs/0/parameters/binary_data_size"),
    (tensor([1], [1], parameters={"shared_memory_region": "r"}), "/inputs/0/parameters/shared_memory_region"),
    (tensor([1], [1], extra=1), "/inputs/0/extra"),
    (7, "/inputs/0/name"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "pointer"), BAD_TENSORS)
def test_tensors_that_are_none(one: object, pointer: str) -> None:
    with pytest.raises(CallerError) as caught:
        kserve.decode(json.dumps({"inputs": [one]}).encode(), None)
    assert (caught.value.pointer or "").startswith(pointer)


GOOD = tensor([1], [1])


@pytest.mark.parametrize(
    ("request_", "pointer"),
    [
        ([], ""),
        ({}, "/inputs"),
        ({"inputs": []}, "/inputs"),
        ({"inputs": {}}, "/inputs"),
        ({"inputs": [GOOD] * 300}, "/inputs"),
        ({"inputs": [GOOD, GOOD]}, "/inputs/1/name"),
        ({"inputs": [GOOD], "extra": 1}, "/extra"),
        ({"inputs": [GOOD], "id": 7}, "/id"),
        ({"inputs": [GOOD], "outputs": []}, "/outputs"),
        ({"inputs": [GOOD], "outputs": [{"name": "Y"}, {"name": "Y"}]}, "/outputs/1/name"),
        ({"inputs": [GOOD], "outputs": [{"name": "Y", "parameters": {"classification": 3}}]},
         "/outputs/0/parameters/classification"),
        ({"inputs": [GOOD], "outputs": [{"name": "Y", "parameters": {"binary_data": 1}}]},
         "/outputs/0/parameters/binary_data"),
        ({"inputs": [GOOD], "outputs": ["Y"]}, "/outputs/0"),
        ({"inputs": [GOOD], "parameters": {"sequence_id": 1}}, "/parameters/sequence_id"),
        ({"inputs": [GOOD], "parameters": [1]}, "/parameters"),
    ],
)  # fmt: skip
def test_requests_that_are_none(request_: object, pointer: str) -> None:
    with pytest.raises(CallerError) as caught:
        kserve.decode(json.dumps(request_).encode(), None)
    assert (caught.value.pointer or "") == pointer


def packed(size: object, shape: list, datatype: str, tail: bytes, announced: str | None = "") -> None:
    one = {"name": "X", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [one]}).encode()
    kserve.decode(head + tail, str(len(head)) if announced == "" else announced)


def test_bytes_that_fit_are_read() -> None:
    packed(8, [2], "FP32", bytes(8))
    packed(9, [2], "BYTES", struct.pack("<I", 1) + b"a" + bytes(4))


@pytest.mark.parametrize(
    ("size", "shape", "datatype", "tail", "announced"),
    [
        (8, [2], "FP32", bytes(7), ""),
        (8, [2], "FP32", bytes(9), ""),
        (4, [2], "FP32", bytes(4), ""),
        (7, [2], "FP32", bytes(7), ""),
        (-1, [1], "FP32", bytes(4), ""),
        (True, [1], "UINT8", bytes(1), ""),
        (4.0, [1], "FP32", bytes(4), ""),
        (1, [1], "BOOL", b"\2", ""),
        (2**62, [2**31 - 1, 2**31 - 1], "UINT8", b"", ""),
        (4, [2], "BYTES", bytes(4), ""),
        (5, [1], "BYTES", struct.pack("<I", 2) + b"a", ""),
        (6, [1], "BYTES", struct.pack("<I", 1) + b"ab", ""),
        (9, [2], "BYTES", struct.pack("<I", 2) + b"ab" + bytes(3), ""),
        (8, [1], "BYTES", struct.pack("<I", 2**32 - 1) + bytes(4), ""),
        (4, [1], "FP32", bytes(4), "99999"),
        (4, [1], "FP32", bytes(4), "-1"),
        (4, [1], "FP32", bytes(4), "x"),
        (4, [1], "FP32", bytes(4), "٣"),
        (4, [1], "FP32", bytes(4), "9" * 5000),
        (4, [1], "FP32", bytes(4), "5"),
        (4, [1], "FP32", bytes(4), None),
    ],
)
def test_bytes_that_do_not_fit(size: object, shape: list, datatype: str, tail: bytes, announced: str | None) -> None:
    with pytest.raises(CallerError):
        packed(size, shape, datatype, tail, announced)


@pytest.mark.parametrize("array", [np.array([np.nan], np.float32), np.array([np.inf]), np.array([b"\xff"], object)])
def test_what_json_cannot_carry_is_not_changed_in_silence(array: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match="binary_data"):
        kserve.encode("m", "", kserve.Inference({}, None, False, None), {"Y": array})
    assert kserve.encode("m", "", kserve.Inference({}, {"Y": True}, False, None), {"Y": array})


# ── the routes ──────────────────────────────────────────────────────────────────────────────────


def count(model: str) -> float:
    return telemetry.nims_inferences.labels(model)._value.get()


def test_an_inference_in_json(client: TestClient, pool: Pool) -> None:
    before = count("echo")
    body = {"id": "q", "inputs": [tensor([[1.5, 2]], [1, 2]), {**tensor(["é"], [1], "BYTES"), "name": "T"}]}
    answer = client.post(INFER, json=body)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json() == {"id": "q", "model_name": "echo", "outputs": [
        {"name": "X", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]},
        {"name": "T", "datatype": "BYTES", "shape": [1], "data": ["é"]},
    ]}  # fmt: skip
    answer = client.post("/v2/models/echo/versions/4/infer", json={"inputs": [GOOD], "outputs": [{"name": "X"}]})
    assert answer.json()["model_version"] == "4" and pool.orders[-1] == ("infer", ["X"], "4")
    assert count("echo") == before + 2


def test_errors_of_an_inference(client: TestClient, pool: Pool) -> None:
    good = json.dumps({"inputs": [GOOD]}).encode()
    check_problem(client.post(INFER, content=b"{"), 400, INFER)
    check_problem(client.post(INFER, content=b"\xff"), 400, INFER)
    problem = check_problem(client.post(INFER, json={"inputs": [tensor([1], [-1])]}), 422, INFER)
    assert problem["errors"][0]["pointer"] == "/inputs/0/shape/0"
    problem = check_problem(client.post(INFER, json={"inputs": [GOOD], "more": 1}), 400, INFER)
    assert problem["errors"][0]["pointer"] == "/more"
    check_problem(client.post(INFER, content=good, headers={kserve.HEADER: "9999"}), 400, INFER)
    check_problem(client.post(INFER, content=good, headers={"content-encoding": "gzip"}), 415, INFER)
    check_problem(client.post(INFER, content=bytes(2**21)), 413, INFER)
    check_problem(client.post("/v2/models/none/infer", content=good), 404, "/v2/models/none/infer")
    before = count("echo")
    for error, status in ((Unavailable("away"), 503), (UpstreamInvalid("nonsense"), 502), (InvalidRequest("no"), 422)):
        pool.error = error
        check_problem(client.post(INFER, content=good), status, INFER)
    assert count("echo") == before


def test_the_repository(client: TestClient, pool: Pool) -> None:
    echo, other = {"name": "echo", "version": "1", "state": "READY", "ready_on": 2}, {"name": "other", "ready_on": 0}
    assert client.get("/v2/repository/index").json() == [echo, other]
    assert client.post("/v2/repository/index").json() == [echo, other]
    assert client.post("/v2/repository/index", json={"ready": True}).json() == [echo]
    files = {"config": '{"backend": "python"}', "file:1/model.py": base64.b64encode(b"code").decode()}
    assert client.post("/v2/repository/models/echo/load", json={"parameters": files}).status_code == 200
    assert pool.orders.pop() == ("load", "echo", {"backend": "python"}, {"file:1/model.py": b"code"})
    assert client.post("/v2/repository/models/echo/load").json()["servers"][0] == {"server": "a:1", "state": "loaded"}
    assert pool.orders.pop() == ("load", "echo", None, None)
    assert client.post("/v2/repository/models/echo/unload").status_code == 200
    assert pool.orders.pop() == ("unload", "echo")
    path = "/v2/repository/models/echo/load"
    for body, status in (
        ({"parameters": {"config": "[]"}}, 422), ({"parameters": {"config": "{"}}, 422), ({"x": 1}, 400), ([], 422),
        ({"parameters": {"config": "{}", "file:1/m": "?"}}, 422), ({"parameters": {"config": {}}}, 422),
    ):  # fmt: skip
        check_problem(client.post(path, json=body), status, path)
    pool.outcomes = [Outcome("a:1", None), Outcome("b:1", Unavailable("it is away"))]
    assert (
        "loaded on 1 of 2 servers: a:1: loaded; b:1: it is away"
        in check_problem(client.post(path), 503, path)["detail"]
    )


def test_what_is_told_of_servers_and_models(client: TestClient) -> None:
    assert client.get("/v2").json()["name"] == "nexus"
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/echo/ready", "/v2/models/echo/versions/1/ready"):
        assert client.get(path).status_code == 200
    check_problem(client.get("/v2/models/other/ready"), 503, "/v2/models/other/ready")
    assert client.get("/v2/models/echo").json()["versions"] == ["1"]
    assert client.get("/v2/models/echo/versions/3").json()["versions"] == ["3"]
    assert client.get("/v2/models/echo/config").json() == {"name": "echo", "max_batch_size": 0}
    for path in ("/v2/models/echo/stats", "/v2/models/stats"):
        (told,) = client.get(path).json()["model_stats"]
        assert (told["name"], told["inference_count"], told["execution_count"]) == ("echo", 3, 2)
        assert told["inference_stats"]["queue"] == {"count": 3, "ns": 30}


ROUTES = [
    ("GET", "/v2", "infer"), ("GET", "/v2/health/live", "infer"), ("GET", "/v2/health/ready", "infer"),
    ("GET", "/v2/models/echo", "infer"), ("GET", "/v2/models/echo/ready", "infer"),
    ("GET", "/v2/models/echo/config", "infer"), ("GET", "/v2/models/echo/stats", "infer"),
    ("GET", "/v2/models/stats", "infer"), ("GET", "/v2/repository/index", "infer"),
    ("POST", "/v2/repository/index", "infer"), ("POST", INFER, "infer"),
    ("POST", "/v2/models/echo/versions/1/infer", "infer"), ("POST", "/v2/repository/models/echo/load", "admin"),
    ("POST", "/v2/repository/models/echo/unload", "admin"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "permission"), ROUTES)
def test_who_may_do_what(door: Door, client: TestClient, pool: Pool, method: str, path: str, permission: str) -> None:
    wrong = "infer" if permission == "admin" else "admin"
    content = json.dumps({"inputs": [GOOD]}) if path.endswith("infer") else ""
    check_problem(client.request(method, path, content=content, headers=door.headers("t", "n", wrong)), 403, path)
    assert pool.orders == []
    allowed = client.request(method, path, content=content, headers=door.headers("t", "n", permission))
    assert allowed.status_code == 200
    check_problem(door.client.request(method, path, content=content), 401, path)
    unset = door.client.request(method, path, content=content, headers=door.headers())
    assert "triton.servers" in check_problem(unset, 404, path)["detail"]


def test_the_stock_client_works(door: Door, pool: Pool) -> None:
    headers = door.headers()

    async def run(port: int, listener: socket.socket) -> None:
        config = uvicorn.Config(build(replace(door.lent, triton=pool)), lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        client = stock.InferenceServerClient(f"127.0.0.1:{port}")
        try:
            await ask(client)
        finally:
            await client.close()
            server.should_exit = True
            await serving

    async def ask(client: stock.InferenceServerClient) -> None:
        assert await client.is_server_live(headers=dict(headers))
        assert await client.is_model_ready("echo", headers=dict(headers))
        assert not await client.is_server_live()
        assert (await client.get_model_repository_index(headers=dict(headers)))[0]["name"] == "echo"
        await client.load_model("echo", headers=dict(headers), config="{}", files={"file:1/m": b"x"})
        await client.unload_model("echo", headers=dict(headers))
        assert pool.orders == [("load", "echo", {}, {"file:1/m": b"x"}), ("unload", "echo")]
        floats = np.array([[1, np.nan]], np.float32)
        texts = np.array([b"\xff\0", b""], object)
        for binary in (True, False):
            inputs = [stock.InferInput("X", [1, 2], "FP32"), stock.InferInput("T", [2], "BYTES")]
            inputs[0].set_data_from_numpy(floats if binary else np.nan_to_num(floats), binary)
            inputs[1].set_data_from_numpy(texts)
            told = await client.infer("echo", inputs, headers=dict(headers))
            assert told.as_numpy("T").tolist() == texts.tolist()
            assert np.array_equal(told.as_numpy("X"), floats if binary else [[1, 0]], equal_nan=True)
        wanted = [stock.InferRequestedOutput("X", binary_data=False)]
        assert (await client.infer("echo", inputs, outputs=wanted, headers=dict(headers))).as_numpy("T") is None
        with pytest.raises(InferenceServerException, match="404"):
            await client.infer("none", inputs, headers=dict(headers))

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        asyncio.run(run(listener.getsockname()[1], listener))
