"""A world in which three or four stewards share, read and delete while everything fails, from one seed.

Messages and answers are lost, voters too; machines die with their disks as they are, or lose them; files rot, and keys
are changed. What a
caller was told is written down, and every read is held against it: it shows the last version that was acknowledged, or
one whose sharing was left in doubt since. When the faults end, all heals by itself.
"""

import asyncio
import random
import shutil
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.sharing import Sharing
from cluster.steward import Settings
from nexus.errors import BlockRefused, Conflict, NexusError, NotFound, TryAgain, Unavailable
from tests.stewards import Faults, Machines, content, drain, read

NODES = ("sark", "clu", "tron", "ram")
IDS = ("a", "b", "c")
GONE: bytes | None = None
QUIET_TURNS = 300  # of the loop, in which all fails that a dead steward was doing: it reaches nobody


@dataclass
class Believed:
    """What a block may be, by what its callers were told: its text, or GONE."""

    possible: set[bytes | None] = field(default_factory=lambda: {GONE})


@dataclass
class World:
    """One run. `steps` of each of two callers, then calm."""

    folder: Path
    seed: int
    steps: int = 30
    copies: int = 2
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.believed = {data_id: Believed() for data_id in IDS}
        self.locks = {data_id: asyncio.Lock() for data_id in IDS}
        self.written = 0

    async def run(self) -> None:
        faults = Faults(
            random.Random(self.seed + 1), self.rng.choice([0, 0.02, 0.1]), self.rng.choice([0, 0.02, 0.1]),
            self.rng.choice([0, 0.02, 0.05]),
        )  # fmt: skip
        self.there = Machines(self.folder, Settings(copies=self.copies, gone_seconds=0.0), given=None)
        for node in NODES[: self.rng.choice([3, 4])]:
            await self.there.start(node)
        self.there.faults = faults
        try:
            await asyncio.gather(self._call(), self._call(), self._tend(), self._harm())
            await self._heal()
        finally:
            await drain()
            self.there.stop()

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # Callers

    def _sharing(self) -> Sharing:
        return self.there.sharing_at(self.rng.choice([None, *NODES]))

    async def _call(self) -> None:
        for _ in range(self.steps):
            data_id = self.rng.choice(IDS)
            work: Callable[[str], Coroutine[Any, Any, None]] = self.rng.choice(
                [self._share, self._share, self._read, self._read, self._read, self._delete]
            )
            async with self.locks[data_id]:
                await work(data_id)
            await asyncio.sleep(0)

    async def _share(self, data_id: str) -> None:
        self.written += 1
        text = f"{data_id}-{self.written}-".encode() + self.rng.randbytes(self.rng.choice([0, 10, 300]))
        believed = self.believed[data_id].possible
        try:
            await self._sharing().put("acme", data_id, content(text))
        except (TryAgain, Conflict):
            believed.add(text)
            self._count("in doubt")
        else:
            self.believed[data_id].possible = {text}
            self._count("acknowledged")

    async def _delete(self, data_id: str) -> None:
        believed = self.believed[data_id].possible
        try:
            await self._sharing().delete("acme", data_id)
        except NotFound:
            self._require(GONE in believed, f"{data_id} was acknowledged and cannot be deleted")
        except TryAgain:
            believed.add(GONE)
        else:
            self._require(believed != {GONE}, f"{data_id} was deleted twice")
            self.believed[data_id].possible = {GONE}
            self._count("deleted")

    async def _read(self, data_id: str) -> None:
        believed = self.believed[data_id].possible
        try:
            text = await read((await self._sharing().get("acme", data_id)).pieces)
        except NotFound:
            self._require(GONE in believed, f"{data_id} was acknowledged and is gone")
        except (TryAgain, BlockRefused):
            self._count("unreadable for now")
        else:
            self._require(
                text in believed, f"{data_id} is {text[:20]!r}, none of {[one and one[:20] for one in believed]}"
            )
            self._count("read")

    # What else happens

    async def _tend(self) -> None:
        for _ in range(self.steps):
            for steward in list(self.there.stewards.values()):
                try:
                    await steward.tend()
                    if self.rng.random() < 0.3:
                        await steward.scrub()
                except (ConnectionError, NexusError):
                    self._count("tended in vain")
            await asyncio.sleep(0)

    async def _harm(self) -> None:
        """One machine at a time is harmed; before the next is, the others have seen to it that nothing is lost."""
        for _ in range(self.steps // 5):
            for _ in range(self.rng.randint(5, 60)):
                await asyncio.sleep(0)
            node = self.rng.choice(sorted(self.there.stewards))
            harm = self.rng.choice(["rot", "rot", "kill", "wipe", "kill"])
            if self.rng.random() < 0.5:
                await self._change_keys()
            if harm == "rot":
                self._rot(node)
            else:
                self.there.kill(node)
            await self._calm_down()
            if harm != "rot":
                await self._return(node, is_wiped=harm == "wipe")
            self._count(harm)

    async def _change_keys(self) -> None:
        """The cluster's, the tenant's, or what comes of it while all fails."""
        with suppress(ConnectionError, NexusError):
            await self._sharing().rotate_cluster_key()
            await self._sharing().rotate("acme")
            self._count("keys")

    def _rot(self, node: str) -> None:
        files = self.there.files(node)
        if files:
            file = self.rng.choice(files)
            whole = bytearray(file.read_bytes())
            whole[self.rng.randrange(len(whole))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(whole)

    async def _calm_down(self) -> None:
        """Callers wait, and nothing is lost on its way, until all is as it should be but for who is down."""
        faults, self.there.faults = self.there.faults, Faults()
        for lock in self.locks.values():
            await lock.acquire()
        try:
            for node in sorted(self.there.up):
                await self.there.stewards[node].scrub()
            await self.there.settle()
        finally:
            for lock in self.locks.values():
                lock.release()
        self.there.faults = faults

    async def _return(self, node: str, is_wiped: bool) -> None:
        steward = self.there.stewards.pop(node)
        for _ in range(QUIET_TURNS):
            await asyncio.sleep(0)
        steward.stop()
        if is_wiped:
            shutil.rmtree(self.there.folder / node)
        faults, self.there.faults = self.there.faults, Faults()
        try:
            await self.there.start(node)
        except Unavailable as error:  # the cluster key was changed since it was carried there: so it is carried again
            self._require(is_wiped and "copy share-key" in error.message, error.message)
            (self.there.folder / node / "share-key").unlink()
            await self.there.start(node)
        self.there.faults = faults

    # The end

    async def _heal(self) -> None:
        self.there.faults = Faults()
        for node in sorted(self.there.up):
            await self.there.stewards[node].scrub()
        await self.there.settle()
        for data_id in IDS:
            await self._read(data_id)
        for entry in await self.there.directory.blocks():
            self._require(len(set(entry.record.copies)) == self.copies, f"{entry} has too few copies, or too many")
            for node in entry.record.copies:
                found = await self.there.stewards[node].open("acme", entry.data_id)
                text = await self.there.stewards[node].piece(found.handle, 0)
                self._require(text in self.believed[entry.data_id].possible, f"{node} has another {entry.data_id}")
                await self.there.stewards[node].close(found.handle)

    def _require(self, holds: bool, words: str) -> None:
        assert holds, f"seed {self.seed}: {words}"
