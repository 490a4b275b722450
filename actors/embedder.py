"""The embedder pool: texts of documents, and of whoever asks, to vectors."""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors.gpu_lease import GpuLease, hold
from actors.hops import begin, hop
from nexus.config import Telemetry
from nexus.ports import Embedder as EmbedderPort
from nexus.ports import InputType
from nexus.registry import open_model
from nexus.tracing import span
from nexus.types import Vectors
from nexus.vocabulary import of_embedding

NICENESS = 10  # documents give way to questions, which are embedded in the retriever


@hop
class Embedder:
    """One model in one process, used by several threads at once, one core each.

    Two calls on a core each embed 1.6 times what one call on two cores does, and three times as much
    when something else wants a core: they never wait for each other. It takes `gpu_bytes` of its GPU, where it has one.
    """

    _gpus: GpuLease | None = None

    def __init__(
        self, address: str, threads: int, offered: dict[str, Any] | None = None, gpu_bytes: int = 0,
        telemetry: Telemetry | None = None,
    ) -> None:  # fmt: skip
        begin("embedder", telemetry)
        self._gpus = hold(gpu_bytes)
        self._address = address
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
        self._model: EmbedderPort = open_model("embed", address, **{**(offered or {}), "threads": 1})
        self._threads = ThreadPoolExecutor(threads, "embed")

    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        """Shape (len(texts), dimension), float32, rows of unit length."""
        with span("embed", of_embedding(self._address, self._model.fingerprint, len(texts))):
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._model.embed, texts, input_type)

    async def describe(self) -> dict[str, object]:
        model = self._model
        return {"fingerprint": model.fingerprint, "dimension": model.dimension, "max_tokens": model.max_tokens}

    async def ready(self) -> bool:
        return True

    def __del__(self) -> None:
        if self._gpus is not None:  # Serve says that this replica ends
            self._gpus.release()
