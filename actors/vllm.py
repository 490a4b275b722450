"""vLLM replicas: Ray's LLM server with our way in."""

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

import orjson
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, ErrorResponse
from vllm.v1.engine.exceptions import EngineDeadError

from actors.gpu_lease import GpuLease, hold
from actors.hops import LOGGING, begin, hop
from actors.session_router import SessionRouter
from cluster.spots import Spot
from nexus.config import Served, Telemetry
from nexus.errors import CallerError, InvalidRequest, NexusError, NotFound, Overloaded, Unavailable
from nexus.models.vllm import engine_arguments, environment, read_checkpoint
from nexus.tracing import streamed
from nexus.vocabulary import KIND, MODEL

Way = Literal["chat", "completions"]

FAILED = 'data: {"error"'
MERGED_SECONDS = 0.02  # between two sends of one stream, its first piece apart: nobody reads faster
STARTUP_REPEATS = 3
EMBEDDING_REQUEST: TypeAdapter[Any] = TypeAdapter(EmbeddingRequest)
REQUESTS: Mapping[Way, type] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}


@hop
class Replica(LLMServer):
    """One engine. Requests come as plain dictionaries, so that whoever sends them needs no vLLM."""

    _gpus: GpuLease | None = None

    async def __init__(
        self, llm_config: LLMConfig, gpu_bytes: int = 0, telemetry: Telemetry | None = None
    ) -> None:  # fmt: skip
        """It takes `gpu_bytes` of each GPU of its placement group, where that has some."""
        begin("engine", telemetry)
        self._gpus = await asyncio.to_thread(hold, gpu_bytes)
        await super().__init__(llm_config)

    async def __del__(self) -> None:
        """Serve says that this replica ends."""
        await super().__del__()
        if self._gpus is not None:
            await asyncio.to_thread(self._gpus.release)

    async def generate(self, way: Way, body: Mapping[str, Any]) -> AsyncGenerator[list[str | NexusError]]:
        """Server-sent events as vLLM writes them, some at a time; an error is the last item.

        The first piece is sent at once, later ones as they are but at most every 20 ms, together.
        """
        try:
            request = REQUESTS[way].model_validate({**body, "model": self._llm_config.model_id, "stream": True})
        except ValidationError as error:
            yield [_refusal(error)]
            return
        try:
            events = await getattr(super(), way)(request)
            told = {KIND: "CHAIN", MODEL: self._llm_config.model_id}
            async with aclosing(streamed("generate", _merged(events, MERGED_SECONDS), told)) as batches:
                async for batch in batches:
                    if any(_is_fault(event) for event in batch):
                        await self.check_health()
                    yield [_read(event) for event in batch]
        except EngineDeadError:
            os._exit(1)  # a replica without its engine would fail fastest, and so be chosen first

    async def embed(self, texts: Sequence[str]) -> list[list[float]] | NexusError:
        """One row of numbers for each text, or what was wrong with them."""
        body = {"model": self._llm_config.model_id, "input": list(texts)}
        await self.check_health()
        async for answer in await super().embeddings(EMBEDDING_REQUEST.validate_python(body)):
            if hasattr(answer, "error"):  # of another class than the one that ray.serve.llm exports
                return _to_error(str(answer.error.message), int(answer.error.code))
            return [row.embedding for row in sorted(answer.data, key=lambda row: row.index)]
        return Unavailable("the engine gave no vectors; try again in a moment")

    async def count_requests(self) -> int:
        """Those that the engine has not finished."""
        assert self.engine is not None
        return int(self.engine._engine_client.output_processor.get_num_unfinished_requests())

    async def ready(self) -> bool:
        """True while the engine works."""
        await self.check_health()
        return True

    async def _start_engine(self) -> None:
        assert self.engine is not None
        await self.engine.start()  # and no actor that would report about it

    def _batch_output_stream(self, generator: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        return generator  # `generate` merges


async def _merged(events: AsyncGenerator[Any], seconds: float) -> AsyncGenerator[list[Any]]:
    """The first event at once, later ones too unless something was sent less than `seconds` ago: then together."""
    waiting: list[Any] = []
    clock = asyncio.get_running_loop().time
    free_at = 0.0
    arrived = asyncio.Event()

    async def read() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    waiting.append(event)
                    arrived.set()
        finally:
            arrived.set()

    reading = asyncio.create_task(read())
    try:
        while not reading.done() or waiting:
            await arrived.wait()
            arrived.clear()
            if (pause := free_at - clock()) > 0 and not reading.done():
                await asyncio.wait([reading], timeout=pause)
            if waiting:
                batch = waiting[:]
                waiting.clear()
                free_at = clock() + seconds
                yield batch
        reading.result()
    finally:
        reading.cancel()
        await asyncio.wait([reading])


def _is_fault(event: str | ErrorResponse) -> bool:
    read = _read(event)
    return isinstance(read, NexusError) and not isinstance(read, CallerError | Overloaded)


def _read(event: str | ErrorResponse) -> str | NexusError:
    """An event to pass on, or what is wrong: an object before the first event, an event of its own after it."""
    if not isinstance(event, str):
        return _to_error(str(event.error.message), int(event.error.code))
    if not event.startswith(FAILED):
        return event
    error = orjson.loads(event.removeprefix("data: "))["error"]
    return _to_error(str(error.get("message")), int(error.get("code") or 500))


def _to_error(message: str, status: int) -> NexusError:
    """The engine's refusal as one of ours, without what it says of its inside."""
    message = message[:500]
    if status == 404:
        return NotFound(message, pointer="/model", code="model_not_found")
    if status in (429, 503):
        return Overloaded("the engine is full; try again in a moment")
    if 400 <= status < 500:
        return InvalidRequest(message)
    return Unavailable("the engine failed; try again in a moment")


def _refusal(error: ValidationError) -> NexusError:
    fault = error.errors(include_url=False, include_input=False)[0]
    pointer = "".join(f"/{part}" for part in fault["loc"])
    return InvalidRequest(f"{pointer or 'the request'}: {fault['msg']}"[:500], pointer=pointer or None)


def deploy(
    name: str, model: Served, spot: Spot, autoscaling: Mapping[str, Any], telemetry: Telemetry
) -> serve.Application:
    """The replicas of one model on one machine, each with its engine's processors, or a refusal to start.

    `autoscaling` is Serve's `autoscaling_config`.
    """
    checkpoint, engine, replicas = read_checkpoint(model.address), model.engine, model.replicas
    gpu = spot.share if spot.gpus == 1 else 1  # of several it has the whole
    bundle = {"CPU": 1, "GPU": gpu} if engine.device == "gpu" else {"CPU": 0.01}
    there = {"placement_group_bundle_label_selector": [dict(spot.labels())]} if spot.node else {}
    config = LLMConfig(
        model_loading_config={"model_id": model.called, "model_source": str(checkpoint.folder)},
        engine_kwargs=engine_arguments(model),
        accelerator_config={"kind": engine.device},
        placement_group_config={"bundle_per_worker": bundle, "strategy": "STRICT_PACK"},
        runtime_env={"env_vars": dict(environment(engine))},
        experimental_configs={"stream_batching_interval_ms": 0},
        deployment_config={
            "max_ongoing_requests": replicas.at_once,
            "max_queued_requests": replicas.waiting,
            "autoscaling_config": dict(autoscaling),
            "health_check_period_s": 2,
            "health_check_timeout_s": 60,
            "graceful_shutdown_timeout_s": 30,
            "graceful_shutdown_wait_loop_s": 0.2,
            "max_constructor_retry_count": STARTUP_REPEATS,
            "request_router_config": RequestRouterConfig(request_router_class=SessionRouter),
            "ray_actor_options": {"num_cpus": 0},
            "logging_config": LOGGING,
            **there,
        },
    )
    return build_llm_deployment(
        config, deployment_cls=Replica, override_serve_options={"name": name},
        bind_kwargs={"gpu_bytes": spot.bytes, "telemetry": telemetry},
    )  # fmt: skip
