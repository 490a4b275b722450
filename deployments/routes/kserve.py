"""KServe v2, for the Triton servers behind Nexus: what `tritonclient.http` speaks, with a key in a header."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from deployments import kserve
from deployments.routes.caller import lent, permit
from deployments.shapes import LongText, Shape, reply
from nexus import __version__, telemetry
from nexus.errors import InvalidRequest, NotFound, Unavailable, UnsupportedMedia
from nexus.models.triton import Counters, IndexEntry, Outcome, TritonPool
from nexus.types import Principal

router = APIRouter(prefix="/v2", tags=["models on Triton"])

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
MAX_PARAMETERS = 64
Asked = TypeVar("Asked", bound=Shape)


class WhichModels(Shape):
    ready: bool = False


class Load(Shape):
    """`config` is JSON text; every other parameter is "file:<path>" with the file in base64."""

    parameters: Annotated[
        dict[Annotated[str, Field(max_length=1024)], LongText], Field(default_factory=dict, max_length=MAX_PARAMETERS)
    ]


class UnloadParameters(Shape):
    unload_dependents: bool = False


class Unload(Shape):
    parameters: UnloadParameters = UnloadParameters()


def servers(request: Request) -> TritonPool:
    pool = lent(request).triton
    if pool is None:
        raise NotFound("no Triton server is configured; name them in the setting triton.servers")
    return pool


def _version(request: Request) -> str:
    return str(request.path_params.get("version", ""))


@router.get("")
async def describe(request: Request, principal: Principal = permit("infer")) -> Response:
    """Who answers here, and which of KServe's extensions it knows."""
    servers(request)
    return reply({"name": "nexus", "version": __version__, "extensions": EXTENSIONS})


@router.get("/health/live")
async def live(request: Request, principal: Principal = permit("infer")) -> Response:
    servers(request)
    return Response()


@router.get("/health/ready")
async def ready(request: Request, principal: Principal = permit("infer")) -> Response:
    """200 if any server takes requests."""
    if not await servers(request).ready():
        raise Unavailable("no Triton server is ready")
    return Response()


@router.get("/models/stats")
async def all_statistics(request: Request, principal: Principal = permit("infer")) -> Response:
    return reply(_show_statistics(await servers(request).statistics()))


@router.get("/models/{model}/versions/{version}/stats")
@router.get("/models/{model}/stats")
async def statistics(request: Request, model: str, principal: Principal = permit("infer")) -> Response:
    """What the servers have counted, added up, since the model was loaded on each."""
    return reply(_show_statistics(await servers(request).statistics(model, _version(request))))


@router.get("/models/{model}/versions/{version}/ready")
@router.get("/models/{model}/ready")
async def model_ready(request: Request, model: str, principal: Principal = permit("infer")) -> Response:
    if not await servers(request).ready(model, _version(request)):
        raise Unavailable(f"the model {model!r} is ready on no Triton server; load it first")
    return Response()


@router.get("/models/{model}/versions/{version}/config")
@router.get("/models/{model}/config")
async def config(request: Request, model: str, principal: Principal = permit("infer")) -> Response:
    return reply(await servers(request).config(model, _version(request)))


@router.get("/models/{model}/versions/{version}")
@router.get("/models/{model}")
async def metadata(request: Request, model: str, principal: Principal = permit("infer")) -> Response:
    """The model's inputs and outputs."""
    return reply(await servers(request).metadata(model, _version(request)))


@router.post("/models/{model}/versions/{version}/infer")
@router.post("/models/{model}/infer")
async def infer(request: Request, model: str, principal: Principal = permit("infer")) -> Response:
    """Tensors in, tensors out, in JSON or as bytes behind it. Texts among them pass the content rules."""
    pool, version, screen = servers(request), _version(request), lent(request).screen
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("compressed requests are not read; send the tensors as they are")
    asked = await asyncio.to_thread(kserve.decode, await request.body(), request.headers.get(kserve.HEADER))
    started = time.perf_counter()
    wanted = None if asked.outputs is None else list(asked.outputs)
    inputs = await screen.tensors("input", asked.inputs)
    outputs = await screen.tensors("output", await pool.infer(model, inputs, wanted, version))
    telemetry.nims_inferences.labels(model).inc()
    telemetry.nims_inference.labels(model).observe(time.perf_counter() - started)
    body, headers = await asyncio.to_thread(kserve.encode, model, version, asked, outputs)
    return Response(body, headers=headers)


@router.get("/repository/index")
async def index(request: Request, principal: Principal = permit("infer")) -> Response:
    """Every model that any server has, loaded or not."""
    return reply(_show_index(await servers(request).index(), only_ready=False))


@router.post("/repository/index")
async def index_of(request: Request, principal: Principal = permit("infer")) -> Response:
    """The same; with `ready`, only those that are loaded. KServe's clients send no body for all."""
    asked = await _read(request, WhichModels)
    return reply(_show_index(await servers(request).index(), asked.ready))


@router.post("/repository/models/{model}/load")
async def load(request: Request, model: str, principal: Principal = permit("admin")) -> Response:
    """Load a model on every server. `file:` parameters are code that Triton runs, so this is for admins."""
    pool = servers(request)
    asked = await _read(request, Load)
    files = {name: _read_file(name, text) for name, text in asked.parameters.items() if name != "config"}
    return _report(await pool.load(model, _read_config(asked.parameters.get("config")), files or None), "loaded")


@router.post("/repository/models/{model}/unload")
async def unload(request: Request, model: str, principal: Principal = permit("admin")) -> Response:
    """Unload a model on every server; one that depends on it stays."""
    pool = servers(request)
    asked = await _read(request, Unload)
    if asked.parameters.unload_dependents:
        raise InvalidRequest("models are unloaded one by one here", pointer="/parameters/unload_dependents")
    return _report(await pool.unload(model), "unloaded")


async def _read(request: Request, shape: type[Asked]) -> Asked:
    """The body as this shape; no body is the shape's defaults. KServe's clients do not say that it is JSON."""
    body = await request.body()
    try:
        return shape.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise RequestValidationError(
            [
                {**fault, "loc": ("body", *fault["loc"])}
                for fault in error.errors(include_url=False, include_context=False)
            ]
        ) from None


def _read_config(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest("a configuration is a JSON object, as text", pointer="/parameters/config")
    return value


def _read_file(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise InvalidRequest("a file is sent in base64", pointer=f"/parameters/{name.replace('/', '~1')}") from None


def _report(outcomes: Sequence[Outcome], done: str) -> Response:
    """200 only if every server did it; else the first one's error, and what became of it on each."""
    failed = [one for one in outcomes if one.error is not None]
    if not failed:
        return reply({"servers": [{"server": one.server, "state": done} for one in outcomes]})
    error = failed[0].error
    assert error is not None
    told = "; ".join(f"{one.server}: {one.error.message if one.error else done}" for one in outcomes)
    raise type(error)(f"{done} on {len(outcomes) - len(failed)} of {len(outcomes)} servers: {told}", code=error.code)


def _show_index(entries: Sequence[tuple[IndexEntry, int]], only_ready: bool) -> list[dict[str, Any]]:
    """KServe's list, with on how many servers each is ready."""
    shown = []
    for entry, ready_on in entries:
        if only_ready and not ready_on:
            continue
        parts = {"version": entry.version, "state": entry.state, "reason": entry.reason}
        shown.append({"name": entry.name, **{k: v for k, v in parts.items() if v}, "ready_on": ready_on})
    return shown


def _show_statistics(counted: Mapping[tuple[str, str], Counters]) -> dict[str, Any]:
    return {
        "model_stats": [
            {
                "name": name,
                "version": version,
                "last_inference": one.last_inference_ms,
                "inference_count": one.inferences,
                "execution_count": one.executions,
                "inference_stats": {stage: {"count": count, "ns": ns} for stage, (count, ns) in one.stages.items()},
            }
            for (name, version), one in sorted(counted.items())
        ]
    }
