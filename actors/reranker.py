"""The reranker: query and texts to scores, in a process of its own."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nexus.ports import Reranker as RerankerPort
from nexus.registry import open_model
from nexus.types import Vector

AT_ONCE = 16  # calls begun at once; one that is given up before it begins costs nothing


class Reranker:
    """One model in one process. A search waits for it: so it is not nice, and each call may use all the threads."""

    def __init__(self, address: str, threads: int, offered: dict[str, Any] | None = None) -> None:
        self._model: RerankerPort = open_model("rerank", address, **{"threads": threads, **(offered or {})})
        self._threads = ThreadPoolExecutor(AT_ONCE, "rerank")

    async def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        """Shape (len(texts),), float32, each in [0, 1], in the order given."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._model.rerank, query, texts)

    async def ready(self) -> bool:
        return True
