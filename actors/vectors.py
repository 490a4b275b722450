"""The vector store of one machine, alive as long as this process: Milvus Lite on a loopback port."""

import asyncio
from pathlib import Path

from actors.hops import begin, hop
from nexus.stores import milvus_lite


@hop
class Vectors:
    """Holds the folder's lock and serves it. When the process dies, Serve makes another."""

    def __init__(self, home: str, port: int) -> None:
        begin("vectors")
        self.port, self._stop = milvus_lite.serve(Path(home), port)
        self._client = milvus_lite.open(f"milvus-lite://127.0.0.1:{self.port}")

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await asyncio.to_thread(self._client.check)

    async def ready(self) -> bool:
        await self.check_health()
        return True

    def __del__(self) -> None:
        stop = getattr(self, "_stop", None)
        if stop is not None:
            stop()
