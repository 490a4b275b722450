"""Documents in: parsing children, cutting, the embedder pool, and the moves of HADES."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from nexus.chunking import ChunkSettings
from nexus.config import Config
from nexus.errors import TryAgain
from nexus.hades import Hades
from nexus.ingest import Ingestor as Ingestion
from nexus.parsing import Limits, Parsers
from nexus.registry import find_module, open_part
from nexus.types import Principal, Receipt, Upload, Vectors

log = logging.getLogger("nexus.ingestor")
Result = TypeVar("Result")

TEXTS_PER_CALL = 64  # to the embedder pool, so that a long document does not keep others waiting
IDLE_SECONDS = 0.5
JANITOR_SECONDS = 300.0


class EmbedderPool(Protocol):
    async def embed(self, texts: Sequence[str]) -> Vectors: ...
    async def describe(self) -> dict[str, object]: ...


class Ingestor:
    """One process that turns uploads into published documents, a few at a time."""

    def __init__(self, config: Config, vectors_address: str, pool: EmbedderPool) -> None:
        self._config, self._vectors_address, self._pool = config, vectors_address, pool
        self._threads = ThreadPoolExecutor(config.parsing.workers + 2, "ingest")
        self._starting: asyncio.Task[Ingestion] | None = None
        self._flushing: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self, upload: Upload, principal: Principal) -> Receipt:
        """Bytes in, published document out. Raises what `nexus.ingest` raises."""
        ingestion = await self._ingestion()
        receipt = await self._run(ingestion.ingest, upload, principal)
        if receipt.outcome == "done":
            self._flush_when_idle(ingestion)
        return receipt

    async def ready(self) -> bool:
        """True once the embedder pool and both stores answer. Raises Unavailable."""
        hades = (await self._ingestion()).hades
        await self._run(hades.documents.check)
        await self._run(hades.vectors.check)
        return True

    async def _ingestion(self) -> Ingestion:
        """Made on the first call, once: the embedder pool must be there to say what it is."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._open())
        return await asyncio.shield(self._starting)

    async def _open(self) -> Ingestion:
        config = self._config
        about = await self._pool.describe()
        fingerprint, dimension = str(about["fingerprint"]), int(str(about["dimension"]))
        home = Path(config.home)
        hades = Hades(
            open_part("stores", config.stores.documents, home=home, shared_metadata=config.graph.shared_metadata),
            open_part("stores", self._vectors_address, home=home),
            fingerprint,
            dimension,
        )
        limits = config.parsing
        self._tasks.add(asyncio.create_task(self._keep_clean(hades)))
        return Ingestion(
            hades=hades,
            parsers=Parsers(Limits(limits.memory_bytes, limits.cpu_seconds, limits.wall_seconds)),
            embed=partial(self._embed, asyncio.get_running_loop(), dimension),
            count_tokens=find_module("models", config.models.embedder).open_tokenizer(config.models.embedder),
            chunking=ChunkSettings(config.chunking.target_tokens, config.chunking.max_tokens),
            fingerprint=fingerprint,
        )

    def _embed(self, loop: asyncio.AbstractEventLoop, dimension: int, texts: Sequence[str]) -> Vectors:
        """Called in a thread of ours: the pool is asked on the loop, and waited for here."""
        parts = [
            asyncio.run_coroutine_threadsafe(_await(self._pool.embed(texts[i : i + TEXTS_PER_CALL])), loop).result()
            for i in range(0, len(texts), TEXTS_PER_CALL)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, dimension), np.float32)

    def _flush_when_idle(self, ingestion: Ingestion) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
        loop = asyncio.get_running_loop()
        self._flushing = loop.call_later(IDLE_SECONDS, lambda: self._threads.submit(ingestion.flush))

    async def _keep_clean(self, hades: Hades) -> None:
        """Now and then, remove what no `as_of` needs and what was begun and left."""
        settings = self._config.hades
        while True:
            try:
                removed = await self._run(hades.vacuum, settings.keep_closed_seconds, settings.keep_begun_seconds)
                log.info("vacuum removed %d versions", removed)
            except TryAgain as error:  # a store is away; the next round finds the same versions
                log.warning("vacuum was put off: %s", error)
            await asyncio.sleep(JANITOR_SECONDS)

    async def _run(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *arguments))


async def _await(coroutine: Awaitable[Vectors]) -> Vectors:
    return await coroutine
