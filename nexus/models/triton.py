"""Triton and NIM servers: tensors in, tensors out, over one server or the healthy ones of several.

A pool sends each request to the server with the fewest under way. A server that cannot be reached, does
not answer in time or answers nonsense is ejected: nothing is sent to it until a probe finds it well, and
probes go out at most every `probe_seconds`, when there are requests. What a caller did wrong ejects nobody.
"""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import tritonclient.grpc.aio as over_grpc
import tritonclient.http.aio as over_http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from nexus.background import begin_in_background
from nexus.errors import ConfigError, InvalidRequest, NexusError, NotFound, TooLarge, Unavailable, UpstreamInvalid

Tensor = NDArray[Any]
Found = TypeVar("Found")

MODEL_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9_.\-]{1,128}")  # of dots alone it would climb out of its path
VERSION = re.compile(r"[0-9]{0,18}")
FILE_NAME = re.compile(r"(?!.*[/:]\.\.?(?:/|$))file:[A-Za-z0-9_.\-]+(?:/[A-Za-z0-9_.\-]+)*")
MAX_CONFIG_BYTES = 256 * 2**10
MAX_FILES_BYTES = 256 * 2**20
MAX_INSTANCES = 64
MAX_MESSAGE_CHARACTERS = 400
MAX_GRPC_BYTES = 2**31 - 1  # what the protocol can carry
PROBE_SECONDS_AT_MOST = 5.0
LATENCY_WEIGHT = 0.2  # of the newest request in a server's mean latency

NOT_THERE = re.compile(r"unknown model|failed to poll from model repository|model .* is not available", re.IGNORECASE)
PATH = re.compile(r"(?<![\w.:/])/[\w.\-]+(?:/[\w.\-]*)+")  # of the machine that Triton runs on
AWAY = {"502", "503", "504", "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"}
CALLERS_FAULT = {
    "400", "413", "StatusCode.INVALID_ARGUMENT", "StatusCode.OUT_OF_RANGE", "StatusCode.FAILED_PRECONDITION",
}  # fmt: skip
UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)
NONSENSE = (ValueError, TypeError, KeyError, IndexError, AttributeError)  # what the client raises on such answers
STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


@dataclass(frozen=True, slots=True)
class Counters:
    """What one server has counted for one version of a model since it was loaded there.

    `stages` maps each of STAGES to (how often, nanoseconds in all). `inferences` are items of batches.
    """

    inferences: int
    executions: int
    last_inference_ms: int
    stages: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What happened between two polls; the means are seconds per request and 0 where there was none."""

    requests: int
    failures: int
    executions: int
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One version of a model in a server's repository. `state` is READY, LOADING, UNLOADING, UNAVAILABLE or ""."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order on one server; `error` is None where it was carried out."""

    server: str
    error: NexusError | None


def between(before: Counters | None, after: Counters) -> Statistics:
    """The difference of two polls. A counter that went backwards means a restart: then `after` is all there is."""
    if before is not None and _went_backwards(before, after):
        before = None

    def count(stage: str) -> tuple[int, int]:
        was = before.stages[stage] if before else (0, 0)
        return after.stages[stage][0] - was[0], after.stages[stage][1] - was[1]

    queued, queued_ns = count("queue")
    computed = count("compute_infer")[0]
    compute_ns = sum(count(stage)[1] for stage in ("compute_input", "compute_infer", "compute_output"))
    return Statistics(
        requests=count("success")[0],
        failures=count("fail")[0],
        executions=after.executions - (before.executions if before else 0),
        queue_seconds=queued_ns / queued / 1e9 if queued else 0.0,
        compute_seconds=compute_ns / computed / 1e9 if computed else 0.0,
    )


def _went_backwards(before: Counters, after: Counters) -> bool:
    pairs = [(before.inferences, after.inferences), (before.executions, after.executions)]
    pairs += [(before.stages[s][i], after.stages[s][i]) for s in STAGES for i in (0, 1)]
    return any(new < old for old, new in pairs)


def require_name(model: str, version: str = "") -> None:
    """Raise InvalidRequest unless these can name a model and a version of it."""
    if not MODEL_NAME.fullmatch(model):
        raise InvalidRequest("a model's name has 1 to 128 letters, digits, '_', '-' and '.'")
    if not VERSION.fullmatch(version):
        raise InvalidRequest("a model's version is a whole number")


class TritonServer:
    """One server, at http://host:port or grpc://host:port. To be used on one event loop.

    Every call raises Unavailable when the server is away or too slow, UpstreamInvalid when it answers
    nonsense (or, with the code `model_failed`, when the server is well and the model is not), NotFound for
    an unknown model and InvalidRequest for what Triton refuses.
    """

    def __init__(self, url: str, timeout_seconds: float = 60.0) -> None:
        parts = urlsplit(url)
        bare = parts.path in ("", "/") and not (parts.query or parts.fragment or "@" in parts.netloc)
        if parts.scheme not in ("http", "grpc") or not parts.hostname or not bare:
            raise ConfigError("triton.servers: each is written http://host:8000 or grpc://host:8001, and nothing more")
        self.name = parts.netloc
        self._grpc = parts.scheme == "grpc"
        self._timeout_seconds = timeout_seconds
        self._protocol = over_grpc if self._grpc else over_http
        self._opened: Any = None

    @property
    def _client(self) -> Any:
        """The client, made at the first call: it belongs to the loop that runs then."""
        if self._opened is None:
            options: dict[str, Any] = {"conn_timeout": self._timeout_seconds}
            if self._grpc:
                options = {"channel_args": [
                    ("grpc.max_send_message_length", MAX_GRPC_BYTES),
                    ("grpc.max_receive_message_length", MAX_GRPC_BYTES),
                    ("grpc.enable_http_proxy", 0), ("grpc.initial_reconnect_backoff_ms", 200),
                    ("grpc.max_reconnect_backoff_ms", 1000),
                ]}  # fmt: skip
            self._opened = self._protocol.InferenceServerClient(self.name, **options)
        return self._opened

    async def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.close()

    async def check(self, seconds: float | None = None) -> None:
        """Return if the server is alive and speaks KServe, else raise.

        Triton says it is not ready while any one model loads or has failed to; its others serve all the same.
        """
        within = min(seconds or self._timeout_seconds, self._timeout_seconds)
        if not await self._ask(lambda client: client.is_server_live(), within):
            raise Unavailable("a Triton server is not there yet")
        if not isinstance((await self.server_metadata(within)).get("version"), str):
            raise UpstreamInvalid("a Triton server answered nonsense")

    async def server_metadata(self, seconds: float | None = None) -> Mapping[str, Any]:
        """The server's name, version and extensions."""
        return _require_object(await self._ask(lambda client: client.get_server_metadata(**self._as_json), seconds))

    async def ready(self, model: str | None = None, version: str = "") -> bool:
        """Whether the server, or this model on it, takes requests."""
        if model is None:
            return bool(await self._ask(lambda client: client.is_server_ready()))
        require_name(model, version)
        return bool(await self._ask(lambda client: client.is_model_ready(model, version)))

    async def index(self) -> list[IndexEntry]:
        """Everything in the server's repository, loaded or not."""
        answer = await self._ask(lambda client: client.get_model_repository_index(**self._as_json))
        entries = _require_object(answer).get("models", []) if self._grpc else answer
        return _read(lambda: [_read_entry(entry) for entry in entries])

    async def metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """Names, datatypes and shapes of the model's inputs and outputs, as KServe writes them."""
        require_name(model, version)
        answer = await self._ask(lambda client: client.get_model_metadata(model, version, **self._as_json))
        return cast(dict[str, Any], _with_whole_numbers(_require_object(answer)))

    async def config(self, model: str, version: str = "") -> dict[str, Any]:
        """The model's configuration as the server uses it, the parts that it filled in included."""
        require_name(model, version)
        answer = _require_object(
            await self._ask(lambda client: client.get_model_config(model, version, **self._as_json))
        )
        return cast(
            dict[str, Any], _with_whole_numbers(_require_object(answer.get("config")) if self._grpc else answer)
        )

    async def load(
        self, model: str, config: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Load or reload a model, with this configuration and these files ("file:1/model.onnx") in place of its own.

        Files are code that the server runs: only whoever runs Nexus may send any. They need a configuration.
        """
        require_name(model)
        text = None if config is None else json.dumps(dict(config))
        if files and text is None:
            raise InvalidRequest("files are loaded with a configuration: give `config` too", pointer="/parameters")
        for name in files or ():
            if not FILE_NAME.fullmatch(name):
                raise InvalidRequest(
                    "a file's name reads file:1/model.onnx, relative and without '..'", pointer="/parameters"
                )
        if len(text or "") > MAX_CONFIG_BYTES:
            raise TooLarge(f"a model's configuration has at most {MAX_CONFIG_BYTES} bytes")
        if sum(map(len, (files or {}).values())) > MAX_FILES_BYTES:
            raise TooLarge(f"a model's files have at most {MAX_FILES_BYTES} bytes together")
        try:
            await self._ask(lambda client: client.load_model(model, config=text, files=dict(files) if files else None))
        except NotFound:
            if text is None:
                raise
            raise InvalidRequest("Triton cannot load this; its log says why", pointer="/parameters/config") from None
        if (await self.metadata(model)).get("name") != model:  # a mere 200 may come from anything
            raise UpstreamInvalid("a Triton server answered nonsense")

    async def unload(self, model: str) -> None:
        """Unload a model; one that was not loaded is no error."""
        require_name(model)
        await self._ask(lambda client: client.unload_model(model))

    async def scale(self, model: str, count: int) -> None:
        """Give each instance group of a model this many instances, by loading it anew.

        Triton has no call that scales: this fetches the configuration, changes `instance_group[].count` and
        loads the model with it. The former instances serve until the new ones are there.
        """
        if not 1 <= count <= MAX_INSTANCES:
            raise InvalidRequest(f"a model has 1 to {MAX_INSTANCES} instances per group")
        config = await self.config(model)
        groups = _read(lambda: [{**group, "count": count} for group in config.get("instance_group") or [{}]])
        await self.load(model, {**config, "instance_group": groups})

    async def infer(
        self, model: str, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None, version: str = ""
    ) -> dict[str, Tensor]:
        """The outputs of a model, all or those named, with the shapes and dtypes that it gives them.

        BYTES are object arrays: of bytes or str going in, of bytes coming out. BF16 is ml_dtypes.bfloat16.
        """
        require_name(model, version)
        given = [self._to_input(name, tensor) for name, tensor in inputs.items()]
        wanted = None if outputs is None else [self._protocol.InferRequestedOutput(name) for name in outputs]
        result = await self._ask(lambda client: client.infer(model, given, model_version=version, outputs=wanted))
        if self._grpc:
            names = [output.name for output in result.get_response().outputs]
        else:
            names = _read(lambda: [str(output["name"]) for output in result.get_response()["outputs"]])
        found = _read(lambda: {name: _require_tensor(result.as_numpy(name)) for name in names})
        if missing := set(outputs or ()) - set(found):
            raise UpstreamInvalid(f"the model {model!r} left out {len(missing)} of the outputs asked for")
        return found

    async def statistics(self, model: str = "", version: str = "") -> dict[tuple[str, str], Counters]:
        """(model, version) -> what this server has counted since it was loaded; `between` two polls is what counts."""
        if model:
            require_name(model, version)
        answer = await self._ask(lambda client: client.get_inference_statistics(model, version, **self._as_json))
        return _read(lambda: {(one["name"], one["version"]): _read_counters(one) for one in answer["model_stats"]})

    @property
    def _as_json(self) -> dict[str, Any]:
        return {"as_json": True} if self._grpc else {}

    def _to_input(self, name: str, tensor: Tensor) -> Any:
        tensor = np.asarray(tensor)
        if tensor.dtype.kind == "U":
            tensor = tensor.astype(object)
        elif tensor.dtype.kind not in "OVS" and not tensor.dtype.isnative:
            tensor = tensor.astype(tensor.dtype.newbyteorder("="))
        datatype = np_to_triton_dtype(tensor.dtype)
        mixed = tensor.dtype.kind == "O" and not all(isinstance(one, bytes | str) for one in tensor.flat)
        if datatype is None or mixed or tensor.dtype.kind == "S":
            raise InvalidRequest(f"the input {name!r} is of a type that Triton does not know: {tensor.dtype}")
        made = self._protocol.InferInput(name, list(tensor.shape), datatype)
        made.set_data_from_numpy(tensor)
        return made

    async def _ask(self, call: Callable[[Any], Awaitable[Any]], seconds: float | None = None) -> Any:
        """One call, whatever goes wrong with it as an error of ours."""
        try:
            async with asyncio.timeout(seconds or self._timeout_seconds):
                return await call(self._client)
        except InferenceServerException as error:
            raise _translate(error) from None
        except TimeoutError:
            raise Unavailable("a Triton server did not answer in time") from None
        except UNREACHABLE:
            raise Unavailable("a Triton server cannot be reached") from None
        except NONSENSE as error:
            raise UpstreamInvalid("a Triton server answered nonsense") from error


def _translate(error: InferenceServerException) -> NexusError:
    """Triton's refusals as ours. Of its words the first line is for the caller; below may be a traceback."""
    status, message = str(error.status()), str(error.message()).partition("\n")[0].strip()
    message = PATH.sub("…", message)[:MAX_MESSAGE_CHARACTERS]
    if NOT_THERE.search(message):
        return NotFound("no Triton server has this model, or this version of it, loaded or to load", code="no_model")
    if error.debug_details() is not None and status.isdecimal():  # an HTTP answer without Triton's JSON
        return UpstreamInvalid("a Triton server answered nonsense")
    if status in CALLERS_FAULT:
        return InvalidRequest(f"Triton refused this: {message}")
    if status in AWAY:
        return Unavailable("a Triton server is away or starting")
    if status in ("500", "StatusCode.INTERNAL", "StatusCode.UNKNOWN", "StatusCode.UNIMPLEMENTED"):
        return UpstreamInvalid(f"Triton could not do this: {message}", code="model_failed")
    if status in ("404", "StatusCode.NOT_FOUND"):
        return UpstreamInvalid("a Triton server answered nonsense")
    return UpstreamInvalid("a Triton server answered with an error that means nothing here")


def _read(reading: Callable[[], Found]) -> Found:
    """What `reading` makes of an answer. Raises UpstreamInvalid when the answer is not of the shape it expects."""
    try:
        return reading()
    except NONSENSE as error:
        raise UpstreamInvalid("a Triton server answered nonsense") from error


def _require_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UpstreamInvalid("a Triton server answered nonsense")
    return value


def _require_tensor(value: Any) -> Tensor:
    if not isinstance(value, np.ndarray):
        raise TypeError("no tensor")
    return value


def _read_entry(entry: Mapping[str, Any]) -> IndexEntry:
    return IndexEntry(
        str(entry["name"]), str(entry.get("version", "")), str(entry.get("state", "")),
        PATH.sub("…", str(entry.get("reason", "")).partition("\n")[0])[:MAX_MESSAGE_CHARACTERS],
    )  # fmt: skip


def _read_counters(one: Mapping[str, Any]) -> Counters:
    spent = one["inference_stats"]
    return Counters(
        int(one.get("inference_count", 0)), int(one.get("execution_count", 0)), int(one.get("last_inference", 0)),
        {s: (int(spent.get(s, {}).get("count", 0)), int(spent.get(s, {}).get("ns", 0))) for s in STAGES},
    )  # fmt: skip


def _with_whole_numbers(value: Any, key: str = "") -> Any:
    """protobuf's JSON writes 64-bit numbers as text: shapes become numbers again."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [
            int(one) if key in ("dims", "shape") and isinstance(one, str) else _with_whole_numbers(one, key)
            for one in value
        ]
    return value


@dataclass(eq=False)
class _Member:
    """A server of a pool, and what the pool knows of it. Times are the pool's clock's."""

    server: TritonServer
    under_way: int = 0
    latency: float = 0.0
    away: bool = False
    probed_at: float = 0.0
    lacks: set[str] = field(default_factory=set)  # models that another server had and this one had not
    polled: dict[tuple[str, str], Counters] = field(default_factory=dict)


class TritonPool:
    """Several servers as one. To be used on one event loop; `close` ends its connections and probes."""

    def __init__(
        self, urls: Sequence[str], probe_seconds: float = 5.0, timeout_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not urls:
            raise ConfigError("triton.servers: a pool has at least one server")
        self._members = [_Member(TritonServer(url, timeout_seconds)) for url in urls]
        self._probe_seconds = probe_seconds
        self._probe_timeout = min(timeout_seconds, PROBE_SECONDS_AT_MOST)
        self._clock = clock
        self._probes: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        probes = list(self._probes)
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        for member in self._members:
            await member.server.close()

    async def infer(
        self, model: str, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None, version: str = ""
    ) -> dict[str, Tensor]:
        """As TritonServer.infer, by the server with the least to do; by another one if the first fails it."""
        return await self._by_one(model, lambda server: server.infer(model, inputs, outputs, version))

    async def metadata(self, model: str, version: str = "") -> dict[str, Any]:
        return await self._by_one(model, lambda server: server.metadata(model, version))

    async def config(self, model: str, version: str = "") -> dict[str, Any]:
        return await self._by_one(model, lambda server: server.config(model, version))

    async def server_metadata(self) -> Mapping[str, Any]:
        return await self._by_one("", lambda server: server.server_metadata())

    async def ready(self, model: str | None = None, version: str = "") -> bool:
        """Whether any server, or this model on any, takes requests."""
        if model is not None:
            require_name(model, version)
        return any(answer is True for _, answer in await self._by_all(lambda server: server.ready(model, version)))

    async def index(self) -> list[tuple[IndexEntry, int]]:
        """Every version of every model, with on how many servers it is ready.

        An entry is the ready one where there is one. Servers that are away have none. Raises Unavailable when all are.
        """
        found: dict[tuple[str, str], tuple[IndexEntry, int]] = {}
        for entries in await self._answers(lambda server: server.index()):
            for entry in entries:
                key = entry.name, entry.version
                known, ready_on = found.get(key, (entry, 0))
                is_ready = entry.state == "READY"
                found[key] = (entry if is_ready else known, ready_on + is_ready)
        unversioned = {name for name, version in found if version}
        return [found[key] for key in sorted(found) if key[1] or key[0] not in unversioned]

    async def statistics(self, model: str = "", version: str = "") -> dict[tuple[str, str], Counters]:
        """(model, version) -> the counters of all servers added up, since it was loaded. Raises as `index`."""
        totals: dict[tuple[str, str], Counters] = {}
        for counted in await self._answers(lambda server: server.statistics(model, version)):
            for key, counters in counted.items():
                totals[key] = _add(totals[key], counters) if key in totals else counters
        return totals

    async def poll(self) -> dict[tuple[str, str], Statistics]:
        """(model, version) -> what happened on all servers since the last poll, or since it was loaded."""
        found: dict[tuple[str, str], list[Statistics]] = {}
        for member, counted in await self._by_all(lambda server: server.statistics()):
            if isinstance(counted, NexusError):
                continue
            for key, counters in counted.items():
                found.setdefault(key, []).append(between(member.polled.get(key), counters))
            member.polled = counted
        return {key: _merge(parts) for key, parts in found.items()}

    async def load(
        self, model: str, config: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None
    ) -> list[Outcome]:
        """Load a model on every server; what became of it on each."""
        for member in self._members:
            member.lacks.discard(model)
        return await self._order(model, lambda server: server.load(model, config, files))

    async def unload(self, model: str) -> list[Outcome]:
        return await self._order(model, lambda server: server.unload(model))

    async def scale(self, model: str, count: int) -> list[Outcome]:
        """Reload a model on every server with this many instances per group (TritonServer.scale)."""
        return await self._order(model, lambda server: server.scale(model, count))

    async def _order(self, model: str, order: Callable[[TritonServer], Awaitable[None]]) -> list[Outcome]:
        """One order to every server, the ejected ones too: they may be back."""
        require_name(model)
        answers = await asyncio.gather(*(self._try(member, order) for member in self._members))
        return [
            Outcome(member.server.name, answer if isinstance(answer, NexusError) else None)
            for member, answer in zip(self._members, answers, strict=True)
        ]

    async def _answers(self, call: Callable[[TritonServer], Awaitable[Found]]) -> list[Found]:
        """What the servers that are not away answered. Raises what the first one said if none did any better."""
        answers = [answer for _, answer in await self._by_all(call)]
        good = [answer for answer in answers if not isinstance(answer, NexusError)]
        if not good:
            raise next((error for error in answers if isinstance(error, NexusError)), _none_left())
        return good

    async def _by_all(
        self, call: Callable[[TritonServer], Awaitable[Found]]
    ) -> list[tuple[_Member, Found | NexusError]]:
        members = await self._well()
        return list(zip(members, await asyncio.gather(*(self._try(m, call) for m in members)), strict=True))

    async def _try(self, member: _Member, call: Callable[[TritonServer], Awaitable[Found]]) -> Found | NexusError:
        try:
            return await call(member.server)
        except NexusError as error:
            self._judge(member, error)
            return error

    async def _by_one(self, model: str, call: Callable[[TritonServer], Awaitable[Found]]) -> Found:
        """The answer of the best server.

        One that fails the request is ejected, and the request is tried once more elsewhere. One that has not
        the model may be the only one: the others are asked before that is believed.
        """
        failed: NexusError | None = None
        without: list[_Member] = []
        members = await self._well()
        while members:
            member = min(members, key=lambda one: (model in one.lacks, one.under_way, one.latency))
            members = [one for one in members if one is not member and not one.away]
            try:
                answer = await self._timed(member, call)
            except NotFound as error:
                without.append(member)
                failed = failed or error
            except NexusError as error:
                if not self._judge(member, error):
                    raise
                if failed is not None and not isinstance(failed, NotFound):
                    raise
                failed = error
            else:
                for one in without:
                    one.lacks.add(model)
                member.lacks.discard(model)
                return answer
        raise failed or _none_left()

    async def _timed(self, member: _Member, call: Callable[[TritonServer], Awaitable[Found]]) -> Found:
        started = self._clock()
        member.under_way += 1
        try:
            answer = await call(member.server)
        finally:
            member.under_way -= 1
        seconds = self._clock() - started
        member.latency += (seconds - member.latency) * (LATENCY_WEIGHT if member.latency else 1.0)
        return answer

    def _judge(self, member: _Member, error: NexusError) -> bool:
        """Eject the server if the error is its own; whether it was."""
        own = isinstance(error, Unavailable | UpstreamInvalid) and error.code != "model_failed"
        if own:
            member.away, member.probed_at = True, self._clock()
        return own

    async def _well(self) -> list[_Member]:
        """The servers to choose from. Due probes are sent out; they are waited for only when nothing else is left."""
        for member in self._members:
            if member.away and self._clock() - member.probed_at >= self._probe_seconds:
                member.probed_at = self._clock()
                probe = begin_in_background(self._probe(member))
                self._probes.add(probe)
                probe.add_done_callback(self._probes.discard)
        if all(member.away for member in self._members) and self._probes:
            await asyncio.wait(set(self._probes))
        return [member for member in self._members if not member.away]

    async def probe(self) -> list[str]:
        """Send out the probes that are due, wait for all that are under way, and name the servers that are well."""
        await self._well()
        if self._probes:
            await asyncio.wait(set(self._probes))
        return [member.server.name for member in self._members if not member.away]

    async def _probe(self, member: _Member) -> None:
        with suppress(NexusError):
            await member.server.check(self._probe_timeout)
            member.away = False


def _none_left() -> Unavailable:
    return Unavailable("no Triton server answers; they are asked again in a few seconds")


def _add(one: Counters, other: Counters) -> Counters:
    return Counters(
        one.inferences + other.inferences, one.executions + other.executions,
        max(one.last_inference_ms, other.last_inference_ms),
        {s: (one.stages[s][0] + other.stages[s][0], one.stages[s][1] + other.stages[s][1]) for s in STAGES},
    )  # fmt: skip


def _merge(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of several servers as one; their means weigh as much as they had requests."""
    requests = sum(part.requests for part in parts)
    weight = max(requests, 1)
    return Statistics(
        requests, sum(part.failures for part in parts), sum(part.executions for part in parts),
        sum(part.queue_seconds * part.requests for part in parts) / weight,
        sum(part.compute_seconds * part.requests for part in parts) / weight,
    )  # fmt: skip
