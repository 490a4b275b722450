"""The reranker: query and texts to scores, in a process of its own."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors.gpu_lease import GpuLease, hold
from actors.hops import begin, hop
from nexus.config import Telemetry
from nexus.ports import Reranker as RerankerPort
from nexus.registry import open_model
from nexus.tracing import span
from nexus.types import Vector
from nexus.vocabulary import STAGES, of_reranking

AT_ONCE = 16  # calls begun at once; one that is given up before it begins costs nothing


@hop
class Reranker:
    """One model in one process. A search waits for it: so it is not nice, and each call may use all the threads.

    It takes `gpu_bytes` of its GPU, where it has one.
    """

    _gpus: GpuLease | None = None

    def __init__(
        self, address: str, threads: int, offered: dict[str, Any] | None = None, gpu_bytes: int = 0,
        telemetry: Telemetry | None = None,
    ) -> None:  # fmt: skip
        begin("reranker", telemetry)
        self._gpus = hold(gpu_bytes)
        self._address = address
        self._model: RerankerPort = open_model("rerank", address, **{"threads": threads, **(offered or {})})
        self._threads = ThreadPoolExecutor(AT_ONCE, "rerank")

    async def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        """Shape (len(texts),), float32, each in [0, 1], in the order given."""
        with span("rerank", {**STAGES["rerank"], **of_reranking(self._address, len(texts), True)}):
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._model.rerank, query, texts)

    async def ready(self) -> bool:
        return True

    def __del__(self) -> None:
        if self._gpus is not None:  # Serve says that this replica ends
            self._gpus.release()
