"""The embedder pool: texts of documents, and of whoever asks, to vectors."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from nexus.ports import Embedder as EmbedderPort
from nexus.registry import open_part
from nexus.types import Vectors


class Embedder:
    """One model in one process. Calls are made one after another: the model uses all its threads."""

    def __init__(self, address: str, threads: int) -> None:
        self._model: EmbedderPort = open_part("models", address, threads=threads)
        self._thread = ThreadPoolExecutor(1, "embed")

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Shape (len(texts), dimension), float32, rows of unit length."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._model.embed, texts)

    async def describe(self) -> dict[str, object]:
        return {"fingerprint": self._model.fingerprint, "dimension": self._model.dimension}

    async def ready(self) -> bool:
        return True
