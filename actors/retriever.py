"""Searches in a process of their own, with the query embedder beside them."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.coordination import Coordination
from actors.hops import begin, hop
from nexus.config import Config
from nexus.embedders import of_config
from nexus.errors import Conflict
from nexus.hades import Hades, live_in
from nexus.ports import Coordinator, Embedder, InputType, LiveIndex
from nexus.registry import open_model, open_part
from nexus.reranking import Reranking, in_threads
from nexus.resident import Standing, open_resident
from nexus.retrieval import RetrievalSettings
from nexus.retrieval import Retriever as Searching
from nexus.tracing import span, within
from nexus.types import Evidence, Principal, SearchRequest, SearchResult, Vector, Vectors
from nexus.vocabulary import of_embedding

log = logging.getLogger("nexus.retriever")
Result = TypeVar("Result")
THREADS = 8


class RerankerElsewhere(Protocol):
    async def rerank(self, query: str, texts: Sequence[str]) -> Vector: ...


@hop
class Retriever:
    """One hop from the gateway: embed the query here, ask the stores, fuse, ask HADES, rerank.

    The reranker is opened here, unless one in another process is lent; the voters are asked, unless another
    coordinator is given.
    """

    def __init__(
        self, config: Config, vectors_address: str, reranker: RerankerElsewhere | None = None,
        coordinator: Coordinator | None = None,
    ) -> None:  # fmt: skip
        begin("retriever", config.telemetry)
        offered = config.models.of_task("embed")[0].offered()
        self._embedder: Embedder = open_model("embed", config.models.embedder, **offered, threads=1)
        self._address = config.models.embedder
        home = Path(config.home)
        hades = Hades(
            open_part("stores", config.stores.documents, home=home),
            open_part("stores", vectors_address, home=home),
            self._embedder.fingerprint,
            self._embedder.dimension,
            coordinator or Coordination(),
            config.models.embedder,
        )
        retrieval = config.retrieval
        settings = RetrievalSettings.of(retrieval)
        self._reranker = reranker
        self._others = of_config(config, threads=1)
        self._resident = open_resident(hades, retrieval.resident_bytes, home)
        self._retriever = Searching(
            hades, self._embedder, settings, self._reranking(config), self._others, self._resident
        )
        self._threads = ThreadPoolExecutor(THREADS, "search")
        self._is_prepared = False

    def _reranking(self, config: Config) -> Reranking | None:
        models = config.models
        if models.reranker is None:
            return None
        served = models.of_task("rerank")[0]
        score = self._rerank_elsewhere
        if self._reranker is None:
            opened = open_model("rerank", served.address, embedder=self._embedder, **served.offered())
            score = in_threads(opened, ThreadPoolExecutor(THREADS, "rerank"))
        return Reranking(served.called, score, models.rerank_candidates, models.rerank_seconds)

    def _rerank_elsewhere(self, query: str, texts: Sequence[str], seconds: float) -> Vector:
        """Called in a thread of ours: the reranker is asked on the loop, and waited for here."""
        assert self._reranker is not None
        asked = asyncio.run_coroutine_threadsafe(self._reranker.rerank(query, texts), self._loop)
        try:
            return asked.result(seconds)
        finally:
            asked.cancel()

    async def search(self, request: SearchRequest, principal: Principal) -> SearchResult:
        return await self._run(self._retriever.search, request, principal)

    async def retrieve(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        """Search, and widen the best hits into at most so many passages of so many tokens in all."""
        return await self._run(self._retrieve, request, principal, passages, tokens)

    def _retrieve(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        result = self._retriever.search(request, principal)
        return Evidence(result, tuple(self._retriever.expand(result.hits[:passages], tokens)))

    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        """A few short texts, at once: the pool may be busy with documents."""
        with span("embed", of_embedding(self._address, self._embedder.fingerprint, len(texts))):
            return await self._run(self._embedder.embed, texts, input_type)

    async def standings(self, tenant: str) -> list[Standing]:
        """How what this tenant has in each collection is searched, as far as it was searched or foreseen."""
        return [one for one in self._resident.standings() if one.tenant == tenant] if self._resident else []

    async def describe(self) -> dict[str, object]:
        """What embeds here."""
        return {"fingerprint": self._embedder.fingerprint, "dimension": self._embedder.dimension}

    async def prepare(self, live: LiveIndex) -> None:
        """Load what embeds the questions for an index that is about to be the live one. Raises Conflict."""
        if live.fingerprint != self._embedder.fingerprint:
            await self._run(self._others.of, live)

    async def ready(self) -> bool:
        """True once both stores answer, and the embedders of what is there are loaded. Raises Unavailable."""
        hades = self._retriever.hades
        await self._run(hades.documents.check)
        await self._run(hades.vectors.check)
        if not self._is_prepared:
            await self._run(self._prepare_all)
            self._is_prepared = True
        return True

    def _prepare_all(self) -> None:
        """Load what every collection is searched with, so that nobody's first question waits for it."""
        hades = self._retriever.hades
        if self._resident is not None:
            self._resident.foresee()
        for one in hades.documents.collections():
            try:
                live = live_in(hades.find_collection(one.name))
                if live.fingerprint != self._embedder.fingerprint:
                    self._others.of(live)
            except Conflict as error:  # whoever asks that collection is told the same
                log.warning("collection %r cannot be searched: %s", one.name, error)

    async def _run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        self._loop = asyncio.get_running_loop()
        return await self._loop.run_in_executor(self._threads, within(partial(work, *arguments)))
