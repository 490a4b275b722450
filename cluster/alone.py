"""Sharing within one process: the voters' catalog without voters, and stewards that are called as they are."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.catalog import (
    Catalog,
    Command,
    CompareAndSet,
    Delete,
    Grant,
    KeepAlive,
    OpenSession,
    Put,
    decode_response,
    encode,
)
from cluster.directory import Directory
from cluster.sharing import Sharing
from cluster.steward import Settings, Steward, open_steward
from nexus.keyring import Keyring


class AloneVoters:
    """What is used of cluster.client.Client, over a catalog of this process. Its leases never end by themselves."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self._sequence = 0
        self._session = decode_response(self.catalog.apply(1, encode(OpenSession())))

    def carry_out(self, command: Command) -> Any:
        self._sequence += 1
        entry = encode(command, self._session or 0, self._sequence, self._sequence)
        return decode_response(self.catalog.apply(self._sequence + 1, entry))

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return int(self.carry_out(Put(key, value, lease)))

    async def compare_and_set(self, key: str, expected_revision: int, value: bytes, lease: int = 0) -> int | None:
        found: int | None = self.carry_out(CompareAndSet(key, expected_revision, value, lease))
        return found

    async def delete(self, key: str) -> bool:
        return bool(self.carry_out(Delete(key)))

    async def get(self, key: str, fresh: bool = True) -> tuple[bytes, int] | None:
        return self.catalog.get(key)

    async def range(self, prefix: str, fresh: bool = True) -> list[tuple[str, bytes, int]]:
        return self.catalog.range(prefix)

    async def grant(self, ttl_seconds: float) -> int:
        return int(self.carry_out(Grant(round(ttl_seconds * 1000))))

    async def keep_alive(self, lease: int) -> None:
        self.carry_out(KeepAlive(lease))


class AloneStewards:
    """Stewards of this process, by the names of their machines."""

    def __init__(self) -> None:
        self.there: dict[str, Steward] = {}

    async def call(self, node: str, method: str, *arguments: object) -> Any:
        if node not in self.there:
            raise ConnectionError(f"there is no steward of {node}")
        return await getattr(self.there[node], method)(*arguments)

    async def send(self, node: str, message: bytes, patience: str) -> bytes:
        """Nothing is asked on a channel here."""
        raise ConnectionError(f"there is no steward of {node} beside this one")

    async def wake(self) -> None:
        """They are there, or they are not."""


class AloneSharing:
    """Called for a Sharing over one steward with its blocks below `home`, opened when it is first asked for."""

    def __init__(self, home: Path, settings: Settings | None = None) -> None:
        self._home, self._settings = home, settings or Settings()
        self._opening = asyncio.Lock()
        self._sharing: Sharing | None = None
        self._close: Callable[[], None] = _nothing

    async def __call__(self) -> Sharing:
        async with self._opening:
            if self._sharing is None:
                directory, stewards = Directory(AloneVoters()), AloneStewards()
                keyring = await asyncio.to_thread(Keyring, self._home, "local")
                steward = await open_steward(keyring, directory, stewards, stewards, self._settings)
                await steward.stay()
                stewards.there["local"], self._close = steward, steward.stop
                self._sharing = Sharing(directory, stewards, self._settings)
            return self._sharing

    def close(self) -> None:
        self._close()


def _nothing() -> None:
    """It was never asked for."""
