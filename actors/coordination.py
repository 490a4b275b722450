"""The voters for code that blocks: who works is a lease, and where a collection is searched is a key."""

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

from actors import coordinator
from cluster.catalog import LeaseGone
from cluster.client import Client
from nexus.background import begin_in_background
from nexus.coordination import LEASE_SECONDS
from nexus.errors import TryAgain
from nexus.ports import LiveIndex

log = logging.getLogger("nexus.coordination")
Result = TypeVar("Result")

WORKERS = "workers/"  # and a name, for as long as its lease
COLLECTIONS = "collections/"  # and a name: its live index
LOOK_SECONDS = 1.0


class Coordination:
    """The port `Coordinator` of nexus/ports.py. Any thread may call; the asking is done on a loop of its own."""

    def __init__(self, connect: Callable[[], Awaitable[Client]] = coordinator.connect) -> None:
        self._connect = connect
        self._client: Client | None = None
        self._leases: dict[str, int] = {}
        self._live: dict[str, LiveIndex] = {}
        self._peeked: dict[str, bytes | None] = {}
        self._looking: asyncio.Task[None] | None = None  # goes on, once it has looked for the first time
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="coordinator", daemon=True)
        self._thread.start()

    def stay(self, worker: str) -> None:
        self._run(self._stay(worker))

    def leave(self, worker: str) -> None:
        self._run(self._leave(worker))

    def working(self) -> set[str]:
        return self._run(self._working())

    def live_index(self, collection: str) -> LiveIndex | None:
        if self._looking is None or self._looking.done():
            self._run(self._begin_to_look())
        return self._live.get(collection)

    def point(self, collection: str, to: LiveIndex) -> LiveIndex:
        return self._run(self._point(collection, to))

    def move(self, collection: str, expected: LiveIndex, to: LiveIndex) -> bool:
        return self._run(self._move(collection, expected, to))

    def peek(self, key: str) -> bytes | None:
        """What any voter had under a key a second ago; None for nothing, and until that is known. Never waits."""
        if key not in self._peeked or self._looking is None or self._looking.done():
            self._peeked.setdefault(key, None)
            asyncio.run_coroutine_threadsafe(self._look_from_now_on(), self._loop)
        return self._peeked[key]

    def ask(self, question: Callable[[Client], Coroutine[Any, Any, Result]]) -> Result:
        """What the voters answer to whatever else. Raises what that raises, Unavailable where there are no voters."""
        return self._run(self._ask(question))

    def close(self) -> None:
        """Nobody may be asking it."""
        self._run(self._stop_looking())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, asking: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(asking, self._loop).result()

    async def _voters(self) -> Client:
        if self._client is None:
            self._client = await self._connect()
        return self._client

    async def _ask(self, question: Callable[[Client], Coroutine[Any, Any, Result]]) -> Result:
        return await question(await self._voters())

    async def _stay(self, worker: str) -> None:
        voters = await self._voters()
        try:
            if worker in self._leases:
                return await voters.keep_alive(self._leases[worker])
            lease = await voters.grant(LEASE_SECONDS)
            await voters.put(f"{WORKERS}{worker}", b"", lease)
            self._leases[worker] = lease
        except LeaseGone:
            log.warning("this worker fell silent for so long that others may have taken up what it held")
            self._leases.pop(worker, None)
            await self._stay(worker)

    async def _leave(self, worker: str) -> None:
        if lease := self._leases.pop(worker, 0):
            await (await self._voters()).revoke(lease)

    async def _working(self) -> set[str]:
        found = await (await self._voters()).range(WORKERS)
        return {key.removeprefix(WORKERS) for key, _, _ in found}

    async def _point(self, collection: str, to: LiveIndex) -> LiveIndex:
        voters, key = await self._voters(), f"{COLLECTIONS}{collection}"
        await voters.compare_and_set(key, 0, json.dumps(asdict(to)).encode())
        found = await voters.get(key)
        assert found is not None  # nothing removes such a key
        self._live[collection] = read_live(found[0])
        return self._live[collection]

    async def _move(self, collection: str, expected: LiveIndex, to: LiveIndex) -> bool:
        voters, key = await self._voters(), f"{COLLECTIONS}{collection}"
        found = await voters.get(key)
        if found is not None and read_live(found[0]) == expected:
            await voters.compare_and_set(key, found[1], json.dumps(asdict(to)).encode())
            found = await voters.get(key)
        if found is None:
            return False
        self._live[collection] = read_live(found[0])
        return self._live[collection] == to

    async def _begin_to_look(self) -> None:
        await self._look()
        await self._look_from_now_on()

    async def _look_from_now_on(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = begin_in_background(self._keep_looking())

    async def _keep_looking(self) -> None:
        """Keep a copy of what any voter has: a search asks nobody, and goes on while there is no quorum."""
        while True:
            try:
                await self._look()
            except TryAgain as error:
                log.warning("what the voters agree on is not known anew: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    async def _look(self) -> None:
        found = await (await self._voters()).range(COLLECTIONS, fresh=False)
        self._live = {key.removeprefix(COLLECTIONS): read_live(value) for key, value, _ in found}
        for key in list(self._peeked):
            value = await (await self._voters()).get(key, fresh=False)
            self._peeked[key] = None if value is None else value[0]


def read_live(value: bytes) -> LiveIndex:
    """What is kept under a collection's key."""
    return LiveIndex(**json.loads(value))
