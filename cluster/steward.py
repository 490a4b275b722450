"""The steward of one machine: seals what is shared there, keeps copies, and sees to it that there are enough of them.

**Sharing.** A version is reserved with the voters, the block is sealed under it on this disk, peers pull their copies
and verify them, and only when the wanted number of copies is on disks does the record with version, digest and machines
go to the voters. Then it is acknowledged, never before: of what was acknowledged a copy is on every machine that the
record names. Whoever dies on the way leaves files that no record names; they are swept a day later. An older version
gives way after the new one is on record.

**Reading.** The voters say which version is the newest and what its digest is. The store verifies the whole block
against both before it gives out the first byte. Where the local copy is missing, damaged, older or another's, a copy is
pulled from a peer, verified and put in its place, and then read. A steward that is to keep none borrows one.

**The wire.** Between machines a block travels sealed: whoever shares or reads asks the steward of its own machine,
which seals and opens. Whoever asks a steward for anything does so as a member, on a channel that is sealed, too
(cluster/channel.py).

**Tending.** Every steward looks at the records whenever the machines that are there change. Of each block the first
machine of its copies that lives is responsible: it has others pull copies in place of those that are gone (silent for
`gone_seconds`) or drained, and then says so on record, by compare-and-set; who loses looks again. Nobody leads, and no
step is wrong if it is done twice. A copy is deleted only by its own steward, which asks the voters first whether the
record still names it.

**Scrubbing.** Every copy is verified once in `scrub_seconds`, and repaired as in reading.

**Expelling.** Once the voters have it that a machine's key is out of use, what that signs is refused, and nobody lets
the machine in. What it wrote before is still good, up to a version, and is sealed anew: who is responsible for a block
opens it, seals it as its own under a later version, and puts that in the place of the record, by compare-and-set. When
no record that a member has a copy of names it as its writer any more, nothing under its key counts.

**Keys.** Machines and tenants' keys are introduced through the voters, sealed (nexus/keyring.py). A new key of a tenant
is active at once; every steward re-wraps what it keeps; when no machine that is there has anything under the old key
any more, that is retired, and every steward destroys it. One that was away does the same when it returns. The cluster
key is changed without a pause, too (cluster/membership.py), and is when a machine is expelled, before tenants get keys.

What is asked of a steward is asked through a `Reach`: by numbered pieces, of which a few are under way at once, so that
a slow disk holds back whoever sends, and no block is ever whole in memory.
"""

import asyncio
import hashlib
import itertools
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

from cluster.channel import Wire
from cluster.directory import ACTIVE, KEYS, LEASE_SECONDS, OFFERED, Directory, Entry, Record, View
from cluster.membership import active_since, amend, fetch_cluster_key, introduce, is_believed, learn, put_under
from nexus import telemetry
from nexus.background import begin_in_background
from nexus.blocks import BlockStore, Draft, Reading, Stored
from nexus.envelope import BlockId
from nexus.errors import (
    BlockRefused,
    BlockStale,
    Conflict,
    Equivocation,
    KeyUnknown,
    NexusError,
    NotFound,
    Overloaded,
    TryAgain,
    Unavailable,
    WriterUnknown,
)
from nexus.keyring import BLOCKS, Keyring, Writer, key_id_of

log = logging.getLogger("nexus.steward")

TAKEN_AT_ONCE = 4  # copies
BORROWED = 5  # times that a copy is borrowed before its reader is told to come again
TENDED_AT_ONCE = 8  # records
STREAMS = 256  # open at once
AHEAD = 4  # pieces of a stream that are under way at once
LOST_SECONDS = 30.0  # after which a piece that was overtaken does not come any more
IDLE_SECONDS = 300.0  # after which a stream is closed that nobody asks for
SHARING_SECONDS = 3_600.0  # that sharing a block may take; what nobody has on record by then was given up
ORPHAN_SECONDS = 86_400.0
TEND_SECONDS = 2.0


class Reach(Protocol):
    """How a steward is reached, by whoever asks it."""

    async def call(self, node: str, method: str, *arguments: object) -> Any:
        """Raises ConnectionError where it cannot be asked or does not answer, and what the steward raises."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """`copies` of each block; a machine is gone after `gone_seconds` of silence."""

    copies: int = 2
    gone_seconds: float = 60.0
    scrub_seconds: float = 86_400.0

    def needed(self, machines: Collection[str]) -> int:
        """Copies that there can be on these machines."""
        return min(self.copies, max(1, len(machines)))


@dataclass(frozen=True, slots=True)
class Shared:
    """A block as it is acknowledged: its record, the copies wanted, the seconds that copying took, and whether there
    was a version before."""

    data_id: str
    record: Record
    wanted: int
    replication_seconds: float = 0.0
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A verified block whose pieces may be asked for under `handle`."""

    handle: str
    record: Record
    metadata: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Standing:
    """What one steward says of itself; counts since it began. It holds one cluster key, and more while that changes."""

    node: str
    epoch: int
    blocks: int
    bytes: int
    refused: Mapping[str, int]
    repaired: int
    scrubbed_at: float | None
    cluster_keys: Sequence[str]


@dataclass(slots=True)
class _Stream:
    """A draft or a reading that is open, and which piece is next."""

    source: Any
    touched: float
    block: BlockId
    pieces: Iterator[bytes]
    about: Mapping[str, str] = field(default_factory=dict)
    number: int = 0
    turn: asyncio.Condition = field(default_factory=asyncio.Condition)


def rank(nodes: Iterable[str], tenant: str, data_id: str) -> list[str]:
    """The order in which machines get a block: another for each block, the same for whoever asks (rendezvous)."""
    return sorted(nodes, key=lambda node: hashlib.sha256(f"{node}/{tenant}/{data_id}".encode()).digest())


async def pieces_of(reach: Reach, node: str, handle: str) -> AsyncGenerator[bytes, None]:
    """All pieces of what is open there, a few ahead of who uses them; closed at the end. Raises ConnectionError."""
    numbers = itertools.count()
    ahead = deque(begin_in_background(reach.call(node, "piece", handle, next(numbers))) for _ in range(AHEAD))
    try:
        while piece := await ahead[0]:
            ahead.popleft()
            ahead.append(begin_in_background(reach.call(node, "piece", handle, next(numbers))))
            yield piece
    finally:
        begin_in_background(end_all(ahead))
        begin_in_background(_quietly(reach.call(node, "close", handle)))


async def end_all(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """What becomes of them matters to nobody any more."""
    for one in tasks:
        one.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _quietly(call: Any) -> None:
    """What becomes of it matters to nobody: whatever it was to free is freed by time, too."""
    with suppress(ConnectionError, NexusError):
        await call


class Steward:
    """One machine's blocks. Everything public may be called through a Reach, from any machine."""

    def __init__(
        self, keyring: Keyring, store: BlockStore, directory: Directory, reach: Reach, wire: Wire, settings: Settings,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`open_steward` makes one of what is on a disk."""
        self._wire = wire
        self.node, self.keyring, self.store = keyring.node, keyring, store
        self._directory, self._reach, self._settings, self._now = directory, reach, settings, now
        self._streams: dict[str, _Stream] = {}
        self._locks: WeakValueDictionary[BlockId, asyncio.Lock] = WeakValueDictionary()
        self._taking = asyncio.Semaphore(TAKEN_AT_ONCE)
        self._taken: dict[BlockId, float] = {}  # when, lately: they may not be on record yet
        self._learned: dict[str, int] = {}
        self._absent: dict[str, float] = {}  # since when
        self._settled: object = None  # the view by which all was found in order
        self._refused: Counter[str] = Counter()
        self._repaired = 0
        self._scrubbed_at: float | None = None

    # Sharing

    async def begin(
        self, tenant: str, data_id: str, data_type: str, media_type: str, metadata: Mapping[str, object]
    ) -> str:
        """A handle for `append` and `finish`. Raises InvalidRequest, Unavailable where too few machines are there."""
        self.keyring.require_member()
        self._require_room_for_stream()
        self._require_enough(await self._directory.view())
        await self._have_key(tenant)
        block = BlockId(tenant, data_id, await self._directory.reserve())
        described = {"media_type": media_type, "metadata": dict(metadata)}
        draft = await asyncio.to_thread(self.store.write, block, data_type, described)
        return self._keep(draft, block, {"data_type": data_type, "media_type": media_type})

    async def append(self, handle: str, number: int, piece: bytes) -> None:
        """Its pieces are numbered from 0."""
        stream = self._stream(handle, Draft)
        async with self._in_turn(stream, number):
            await asyncio.to_thread(stream.source.feed, piece)

    async def finish(self, handle: str) -> Shared:
        """Once it is on as many disks as are wanted, and on record. Raises Unavailable, Conflict."""
        stream = self._stream(handle, Draft)
        async with stream.turn:
            del self._streams[handle]
            try:
                stored = await asyncio.to_thread(stream.source.commit)
            finally:
                await asyncio.to_thread(stream.source.close)
        block, started = stream.block, self._time()
        self._taken[block] = started
        view = await self._directory.view()
        wanted = self._require_enough(view)
        copies = await self._spread(block, stored.digest, view, wanted)
        seconds = self._time() - started
        record = Record(
            block.version, stored.digest, stored.length, stream.about["data_type"], stream.about["media_type"],
            self.node, stored.header.created_at, tuple(copies), self.keyring.fingerprint,
        )  # fmt: skip
        try:
            replaced = await self._directory.commit(block.tenant, block.data_id, record)
        except Conflict:
            begin_in_background(self._drop_at({self.node, *copies}, block))
            raise
        if self.node not in copies:
            begin_in_background(self.drop(block))
        if replaced is not None:
            older = BlockId(block.tenant, block.data_id, replaced.version)
            begin_in_background(self._drop_at(replaced.copies, older))
        return Shared(block.data_id, record, self._settings.copies, seconds, replaced is not None)

    def _require_enough(self, view: View) -> int:
        """The copies that a block needs. Raises Unavailable where fewer machines are there."""
        needed = self._settings.needed(view.members - view.drained)
        if len(view.usable) < needed:
            away = ", ".join(sorted(view.members - view.drained - view.living))
            raise Unavailable(
                f"{needed} copies are wanted, and too few of the machines that keep blocks answer; away: {away}. Try"
                " again when they are back; `nexus share forget MACHINE` is for one that will not come back"
            )
        return needed

    async def _spread(self, block: BlockId, digest: str, view: View, count: int) -> list[str]:
        """The machines that keep so many copies of what was sealed here. Raises Unavailable, and leaves none, for less.

        This one is among them only where it is its turn, or another could take none.
        """
        candidates = rank(view.usable, block.tenant, block.data_id)
        placed: list[str] = []
        while len(placed) < count:
            tried, candidates = candidates[: count - len(placed)], candidates[count - len(placed) :]
            if not tried:
                begin_in_background(self._drop_at([self.node, *placed], block))
                raise Unavailable(f"only {len(placed)} of {count} machines took a copy; nothing was shared, try again")
            took = await asyncio.gather(*(self._hand(node, block, digest) for node in tried))
            placed += [node for node, has_it in zip(tried, took, strict=True) if has_it]
        return placed

    async def _hand(self, node: str, block: BlockId, digest: str) -> bool:
        """Whether that machine has a verified copy now."""
        if node == self.node:
            return True
        try:
            await self._reach.call(node, "take", block, digest, (self.node,))
        except (ConnectionError, NexusError) as error:
            log.warning("%s took no copy of %s: %s", node, _shown(block), error)
            return False
        return True

    # Reading

    async def open(self, tenant: str, data_id: str) -> Opened:
        """The newest version, verified whole. Raises NotFound, Unavailable, and BlockRefused where no copy is good."""
        self._require_room_for_stream()
        entry = await self._directory.find(tenant, data_id)
        if entry is None:
            raise NotFound("no such block")
        reading = await (self._read(entry) if self.node in entry.record.copies else self._borrow(entry))
        described = reading.stored.header.metadata
        return Opened(self._keep(reading, _block(entry)), entry.record, dict(described["metadata"]))

    async def _read(self, entry: Entry) -> Reading:
        """The local copy, once it is good."""
        block, digest = _block(entry), entry.record.digest
        try:
            return await asyncio.to_thread(self.store.open, block, digest)
        except (NotFound, BlockRefused) as error:
            await self._repair(entry, error)
        return await asyncio.to_thread(self.store.open, block, digest)

    async def _borrow(self, entry: Entry) -> Reading:
        """A copy that is only read here: verified on this disk, and gone from it with its reader."""
        block, digest = _block(entry), entry.record.digest
        for _ in range(BORROWED):
            await self.take(block, digest, entry.record.copies)
            try:
                return await asyncio.to_thread(self.store.open, block, digest)
            except NotFound:  # another reader of it was done just now
                continue
            finally:
                begin_in_background(self.drop(block))
        raise Unavailable("too many read this block here at once; try again")

    async def _repair(self, entry: Entry, fault: NexusError) -> None:
        """Put a good copy in the place of the local one. Raises the fault where there is none to be had."""
        self._note(fault)
        others = [node for node in entry.record.copies if node != self.node]
        try:
            await self.take(_block(entry), entry.record.digest, others)
        except TryAgain as error:
            if isinstance(fault, BlockRefused):
                log.error("%s is damaged here and no other copy can be had: %s", _shown(_block(entry)), error)
                raise fault from None
            raise
        self._repaired += 1
        telemetry.blocks_repaired.labels(self.node).inc()
        log.warning("%s was repaired (%s)", _shown(_block(entry)), fault.message)

    def _note(self, fault: NexusError) -> None:
        self._refused[fault.code] += 1
        telemetry.blocks_refused.labels(self.node, fault.code).inc()
        if isinstance(fault, Equivocation):
            log.critical("ALARM, a machine was cloned or its key stolen: %s", fault.message)

    # For peers

    async def lend(self, block: BlockId) -> str:
        """A handle for the pieces of a copy as it lies on this disk, sealed and not verified. Raises NotFound."""
        self._require_room_for_stream()
        return self._keep(await asyncio.to_thread(self.store.send, block), block)

    async def piece(self, handle: str, number: int) -> bytes:
        """The next one, numbered from 0; empty after the last, and then it is closed."""
        stream = self._stream(handle, Reading)
        async with self._in_turn(stream, number):
            piece = await asyncio.to_thread(next, stream.pieces, b"")
        if not piece:
            await self.close(handle)
        return piece

    async def close(self, handle: str) -> None:
        """Whatever it is, it is over, also for a caller who waits no longer."""
        stream = self._streams.pop(handle, None)
        if stream is not None:
            await asyncio.shield(begin_in_background(_end(stream)))

    async def take(self, block: BlockId, digest: str, sources: Sequence[str]) -> None:
        """Return once a verified copy is on this disk, from the first of these that has one. Raises Unavailable."""
        async with self._lock(block), self._taking:
            self._taken[block] = self._time()
            if await self._is_good(block, digest):
                return
            faults = []
            for source in sources:
                if source == self.node:
                    continue
                try:
                    return await self._fetch(source, block, digest)
                except (ConnectionError, NexusError) as error:
                    faults.append(f"{source}: {error}")
        raise Unavailable(f"no copy of the block can be had; {'; '.join(faults) or 'no other machine has one'}")

    async def _is_good(self, block: BlockId, digest: str) -> bool:
        try:
            reading = await asyncio.to_thread(self.store.open, block, digest)
        except (NotFound, BlockRefused):
            return False
        await asyncio.to_thread(reading.close)
        return True

    async def _fetch(self, source: str, block: BlockId, digest: str) -> None:
        try:
            await self._pull(source, block, digest)
        except (WriterUnknown, KeyUnknown):  # introduced just now, it may be
            await self.learn()
            await self._pull(source, block, digest)

    async def _pull(self, source: str, block: BlockId, digest: str) -> None:
        draft = await asyncio.to_thread(self.store.receive, block, digest)
        try:
            handle = await self._reach.call(source, "lend", block)
            async with aclosing(pieces_of(self._reach, source, handle)) as pieces:
                async for piece in pieces:
                    await asyncio.to_thread(draft.feed, piece)
            await asyncio.to_thread(draft.commit)
        finally:
            await asyncio.to_thread(draft.close)

    async def drop(self, block: BlockId) -> bool:
        """Delete the copy, unless the record names it; whether there was one."""
        async with self._lock(block):
            entry = await self._directory.find(block.tenant, block.data_id)
            if entry is not None and _block(entry) == block and self.node in entry.record.copies:
                return False
            return await asyncio.to_thread(self.store.delete, block)

    async def _drop_at(self, nodes: Iterable[str], block: BlockId) -> None:
        await asyncio.gather(*(_quietly(self._reach.call(node, "drop", block)) for node in nodes))

    async def describe(self) -> Standing:
        stored = await asyncio.to_thread(lambda: [one.size for one in self.store.blocks()])
        return Standing(
            self.node, self.store.epoch, len(stored), sum(stored), dict(self._refused), self._repaired,
            self._scrubbed_at, self.keyring.cluster_keys(),
        )  # fmt: skip

    # Streams

    def _require_room_for_stream(self) -> None:
        if len(self._streams) >= STREAMS:
            raise Overloaded(f"{STREAMS} blocks are being shared or read here at once; try again in a moment")

    def _keep(self, source: Draft | Reading, block: BlockId, about: Mapping[str, str] | None = None) -> str:
        handle, pieces = uuid.uuid4().hex, iter(source) if isinstance(source, Reading) else iter(())
        self._streams[handle] = _Stream(source, self._time(), block, pieces, about or {})
        return handle

    def _stream(self, handle: str, kind: type) -> _Stream:
        stream = self._streams.get(handle)
        if stream is None or not isinstance(stream.source, kind):
            raise Unavailable("the transfer is over: it failed, or nobody went on with it; begin again")
        stream.touched = self._time()
        return stream

    @asynccontextmanager
    async def _in_turn(self, stream: _Stream, number: int) -> AsyncIterator[None]:
        """Of the few pieces that are under way at once, one that overtook another waits for it."""
        async with stream.turn:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOST_SECONDS if number <= stream.number + AHEAD else 0):
                    await stream.turn.wait_for(lambda: number <= stream.number)
            if number != stream.number:
                raise Unavailable("a piece of the transfer was lost; begin again")
            yield
            stream.number += 1
            stream.turn.notify_all()

    async def _close_idle(self) -> None:
        idle = [
            handle for handle, one in self._streams.items()
            if self._time() - one.touched > IDLE_SECONDS and not one.turn.locked()
        ]  # fmt: skip
        for handle in idle:
            await self.close(handle)

    def _lock(self, block: BlockId) -> asyncio.Lock:
        return self._locks.setdefault(block, asyncio.Lock())

    @staticmethod
    def _time() -> float:
        return asyncio.get_running_loop().time()

    # Keys

    async def learn(self) -> None:
        """Meet the machines and install the keys that were introduced since it was last asked."""
        in_use, _ = await active_since(self._directory, self.keyring)
        if in_use not in ("", self.keyring.cluster_key_id):
            await asyncio.to_thread(self.keyring.use_cluster_key, in_use)
            self._learned.clear()
        await learn(self.keyring, self._directory, self._learned)

    async def _have_key(self, tenant: str) -> None:
        """The first time that a tenant shares something, make its key: of several stewards that do, one wins."""
        if self.keyring.ring(tenant) is None:
            await self.learn()
        if self.keyring.ring(tenant) is None:
            found = await self._directory.voters.get(f"{KEYS}{tenant}")
            if found is not None and is_believed(*found, await active_since(self._directory, self.keyring)):
                return await self.learn()  # another one made it just now
            drafted = await asyncio.to_thread(self.keyring.draft_key, tenant)
            await self._directory.voters.compare_and_set(f"{KEYS}{tenant}", found[1] if found else 0, drafted)
            await self.learn()

    async def rotate(self, tenant: str) -> str:
        """Make a new key and have it used from now on; the old one goes by itself. The new one's id.

        Raises NotFound where the tenant has shared nothing, Conflict.
        """
        key = f"{KEYS}{tenant}"
        found = await self._directory.voters.get(key)
        if found is None:
            raise NotFound("this tenant has no key yet: it has shared nothing")
        await self.learn()  # after that look: what is drafted is made of no older ring than the one it replaces
        drafted = await asyncio.to_thread(self.keyring.draft_key, tenant)
        if await self._directory.voters.compare_and_set(key, found[1], drafted) is None:
            raise Conflict("somebody else changed this tenant's keys just now; try again")
        await self.learn()
        ring = self.keyring.ring(tenant)
        assert ring is not None
        return next(one.key_id for one in ring.keys if one.state == "active")

    async def settle(self, tenant: str, key_id: str) -> int:
        """Re-wrap what is kept here of a tenant: how many blocks are under that key still."""
        await self.learn()
        await asyncio.to_thread(self.store.rewrap, tenant)
        return await asyncio.to_thread(self.store.under_key, tenant, key_id)

    async def _tend_keys(self, view: View) -> None:
        """Destroy the keys that are retired; retire those that nobody who is there needs any more."""
        for tenant in self.keyring.tenants():
            ring = self.keyring.ring(tenant)
            assert ring is not None
            for one in ring.keys:
                if one.state == "retired" and one.is_held:
                    with suppress(Conflict):  # something under it is being written
                        await asyncio.to_thread(self.store.retire_key, tenant, one.key_id)
                if one.state == "readable":
                    left = await self.settle(tenant, one.key_id)
                    if not left and self.node == min(view.usable, default=self.node):
                        await self._retire(tenant, one.key_id, view)

    async def _retire(self, tenant: str, key_id: str, view: View) -> None:
        others = view.living & view.members - {self.node}
        left = await asyncio.gather(*(self._reach.call(node, "settle", tenant, key_id) for node in others))
        found = await self._directory.voters.get(f"{KEYS}{tenant}")
        if any(left) or found is None:
            return
        await self.learn()
        with suppress(Conflict, NotFound):  # another one did
            drafted = await asyncio.to_thread(self.keyring.draft_retirement, tenant, key_id)
            await self._directory.voters.compare_and_set(f"{KEYS}{tenant}", found[1], drafted)
        await self.learn()

    # Expelling

    async def expel(self, node: str) -> int:
        """Take the keys that a machine signs with out of use: how many of its blocks others have to seal anew.

        Raises NotFound, and Conflict for this machine itself. Does no harm a second time.
        """
        await self.learn()
        if any(one.is_good for one in self.keyring.writers() if one.node == node) or node == self.node:
            last = await self._directory.reserve()
            await amend(self._directory, node, lambda: self.keyring.removal(node, last), self.keyring)
            for tenant in self.keyring.tenants() if self.keyring.is_given else ():
                with suppress(Conflict, NotFound):  # another rotates it, or it never got as far as the voters
                    await self.rotate(tenant)
        elif not any(one.node == node for one in self.keyring.writers()):
            raise NotFound(f"no machine {node!r} was ever here")
        await self._directory.forget(node)
        with suppress(Conflict):  # another steward is at it
            await self._require_new_keys()
        self._settled = None
        return len(self._written_by_expelled(await self._directory.blocks(), await self._directory.view(), node))

    def _written_by_expelled(self, entries: Iterable[Entry], view: View, node: str = "") -> list[Entry]:
        """What is to be sealed anew and can be, of one such machine or of all."""
        keys = {(one.node, key) for one in self._expelled() if node in ("", one.node) for key in ("", one.fingerprint)}
        return [
            one for one in entries
            if (one.record.writer, one.record.signer) in keys and view.members & set(one.record.copies)
        ]  # fmt: skip

    def _expelled(self) -> list[Writer]:
        return [one for one in self.keyring.writers() if one.last is not None]

    async def _require_new_keys(self) -> bool:
        """Change the cluster key, if that was not done since a machine was expelled; whether that is over.

        With it each tenant gets a new key (`_draft_ring`). A cluster key in the settings is an operator's to change.
        """
        if self.keyring.is_given:
            return True
        last = max((one.last or 0 for one in self._expelled()), default=0)
        offered, active = [await self._directory.voters.get(key) for key in (OFFERED, ACTIVE)]
        if offered is None or offered[1] < last:
            await self._offer_cluster_key(offered)
            return False
        return active is not None and active[1] > last and len(self.keyring.cluster_keys()) == 1

    async def _tend_expelled(self, view: View) -> None:
        """Remove the machines whose blocks were all sealed anew, once what they know of keys is worth nothing."""
        expelled = self._expelled()
        if not expelled or self.node != min(view.usable, default=self.node) or not await self._require_new_keys():
            return
        left = {one.record.writer for one in self._written_by_expelled(await self._directory.blocks(), view)}
        for node in {one.node for one in expelled} - left:
            await amend(self._directory, node, partial(self.keyring.end_of_expulsion, node), self.keyring)

    async def _seal_anew(self, entry: Entry, view: View) -> bool:
        """As this machine's own, in a later version; whether that is on record."""
        block = BlockId(entry.tenant, entry.data_id, await self._directory.reserve())
        self._taken[block] = self._time()
        reading = await self._read(entry)
        try:
            stored = await asyncio.to_thread(self._copy, reading, block, entry.record.data_type)
        finally:
            await asyncio.to_thread(reading.close)
        copies = await self._spread(block, stored.digest, view, self._settings.needed(view.usable))
        record = replace(
            entry.record, version=block.version, digest=stored.digest, writer=self.node, copies=tuple(copies),
            signer=self.keyring.fingerprint,
        )  # fmt: skip
        is_recorded = await self._directory.replace(entry, record)
        needless = (_block(entry), entry.record.copies) if is_recorded else (block, (*copies, self.node))
        begin_in_background(self._drop_at(needless[1], needless[0]))
        if self.node not in copies:
            begin_in_background(self.drop(block))
        return is_recorded

    def _copy(self, reading: Reading, block: BlockId, data_type: str) -> Stored:
        with self.store.write(block, data_type, reading.stored.header.metadata) as draft:
            for piece in reading:
                draft.feed(piece)
            return draft.commit()

    # The cluster key

    async def rotate_cluster_key(self) -> str:
        """Make another and offer it to all machines, which use it once each that is there has it: its id.

        Raises Conflict where another one is on its way to them, or the settings give it.
        """
        found = await self._directory.voters.get(OFFERED)
        active = await self._directory.voters.get(ACTIVE)
        in_use = "" if active is None else key_id_of(active[0])
        if found is not None and in_use != key_id_of(found[0]) in self.keyring.cluster_keys():
            raise Conflict("the cluster key is being changed already; `nexus share status` shows when that is done")
        return await self._offer_cluster_key(found)

    async def _offer_cluster_key(self, found: tuple[bytes, int] | None) -> str:
        """In the place of what was offered before."""
        key_id, _ = await asyncio.to_thread(self.keyring.draft_cluster_key)
        offer = self.keyring.seal_cluster_key(key_id)
        if await self._directory.voters.compare_and_set(OFFERED, found[1] if found else 0, offer) is None:
            raise Conflict("somebody else changes the cluster key just now")
        return key_id

    async def hand_over(self, key_id: str) -> str:
        """A cluster key, to a member that has it not: who asks has proved to be one. Raises NotFound."""
        return self.keyring.cluster_secret(key_id)

    async def holds(self, key_id: str) -> bool:
        """Whether this machine has that cluster key, now that it is asked for it. Raises Unavailable."""
        await self._fetch_cluster_key(key_id)
        return True

    async def _fetch_cluster_key(self, key_id: str) -> None:
        if key_id not in self.keyring.cluster_keys():
            await fetch_cluster_key(self.keyring, self._directory, self._wire, key_id)
            self._learned.clear()

    async def _tend_cluster_key(self, view: View) -> None:
        """Have what is offered, say that all have it, and use it; destroy those before it when nothing needs them."""
        offered, active = [await self._directory.voters.get(key) for key in (OFFERED, ACTIVE)]
        if offered is None:
            return
        key_id = key_id_of(offered[0])
        try:
            await self._fetch_cluster_key(key_id)
        except Unavailable as error:  # whoever offered it may be gone for good: another one can be offered
            log.warning("the cluster key that is offered is not to be had: %s", error.message)
            return
        if active is None or key_id_of(active[0]) != key_id:
            if self.node == min(view.usable, default=self.node):
                await self._activate(key_id, active, view)
            return
        if (key_id,) == self.keyring.cluster_keys():
            return
        await self.learn()
        if await put_under(self.keyring, self._directory, self._draft_ring):
            await asyncio.to_thread(self.keyring.forget_cluster_keys)

    async def _activate(self, key_id: str, active: tuple[bytes, int] | None, view: View) -> None:
        """Say that it is in use from now on, if every other steward that is there has it."""
        others = view.living - {self.node}
        try:
            await asyncio.gather(*(self._reach.call(node, "holds", key_id) for node in others))
        except (ConnectionError, NexusError) as error:
            log.warning("the cluster key waits to be changed: %s", error)
            return
        record = self.keyring.seal_cluster_key(key_id)
        await self._directory.voters.compare_and_set(ACTIVE, active[1] if active else 0, record)

    def _draft_ring(self, tenant: str) -> bytes | None:
        """A tenant's keys under the new cluster key; with another, active one where an expelled machine knows them."""
        if self.keyring.ring(tenant) is None:
            return None
        return self.keyring.draft_key(tenant) if self._expelled() else self.keyring.export(tenant)

    # Tending

    async def tend(self) -> bool:
        """One look at what there is and is wanted; whether all of it that is this steward's concern is in order."""
        self.keyring.require_member()
        view = self._of_members(await self._directory.view())
        gone = self._note_absences(view)
        await self._close_idle()
        await self._tend_cluster_key(view)
        await self._tend_keys(view)
        await self._tend_expelled(view)
        if self._settled == (view, gone, self._expelled()):
            return True
        entries, is_done = await self._directory.blocks(), True
        for first in range(0, len(entries), TENDED_AT_ONCE):
            some = entries[first : first + TENDED_AT_ONCE]
            is_done &= all(await asyncio.gather(*(self._tend_block(entry, view, gone) for entry in some)))
        self._settled = (view, gone, self._expelled()) if is_done else None
        return is_done

    def _of_members(self, view: View) -> View:
        """Without those that were expelled, whatever they tell the voters."""
        writers = self.keyring.writers()
        bad = {one.node for one in writers} - {one.node for one in writers if one.is_good}
        return View(view.members - bad, view.living - bad, view.drained)

    def _note_absences(self, view: View) -> frozenset[str]:
        """The members that are gone: silent for long enough, as seen from here."""
        now = self._time()
        self._absent = {node: self._absent.get(node, now) for node in view.members - view.living - {self.node}}
        return frozenset(node for node, since in self._absent.items() if now - since >= self._settings.gone_seconds)

    async def _tend_block(self, entry: Entry, view: View, gone: frozenset[str]) -> bool:
        """See to the local copy, and if it is the first of those that live, to all others."""
        copies, block = entry.record.copies, _block(entry)
        if self.node in copies and await asyncio.to_thread(self.store.find, block) is None:
            try:
                await self._repair(entry, NotFound("the copy was lost"))
            except (TryAgain, BlockRefused) as error:
                log.warning("%s cannot be restored here yet: %s", _shown(block), error)
                return False
        if next((node for node in copies if node in view.living), None) != self.node:
            return True
        if self._written_by_expelled([entry], view):
            try:
                return await self._seal_anew(entry, view)
            except (TryAgain, BlockRefused) as error:
                log.warning("%s cannot be sealed anew yet: %s", _shown(block), error)
                return False
        leaving = gone | view.drained | (frozenset(copies) - view.members)
        staying = [node for node in copies if node not in leaving]
        needed = self._settings.needed(view.members - gone - view.drained)
        if len(staying) >= needed and len(staying) == len(copies):
            return True
        for node in rank(view.usable - set(copies), entry.tenant, entry.data_id):
            if len(staying) >= needed:
                break
            started = self._time()
            if await self._hand(node, block, entry.record.digest):
                telemetry.replication.labels(self.node).observe(self._time() - started)
                staying.append(node)
        is_whole = len(staying) >= needed
        wanted = staying if is_whole else [*staying, *(node for node in copies if node in leaving)]
        if set(wanted) != set(copies):
            is_whole &= await self._directory.move(entry, wanted)
            begin_in_background(self._drop_at([node for node in copies if node in view.drained - set(wanted)], block))
        return is_whole

    # Scrubbing

    async def scrub(self, pace: float = 0.0) -> int:
        """Verify every copy, and repair those that are damaged: how many were. Rests `pace` times as long as it works.

        What no record names is deleted: at once where there is a later version, else when it is a day old.
        """
        entries = {(one.tenant, one.data_id): one for one in await self._directory.blocks()}
        named = {self.store.name_of(_block(one)): one for one in entries.values() if self.node in one.record.copies}
        found, faults = await asyncio.to_thread(self.store.scrub), 0
        while True:
            started = self._time()
            one = await asyncio.to_thread(next, found, None)
            if one is None:
                break
            if one.name in named:
                fault = one.refused or await asyncio.to_thread(self._differs, named[one.name])
                if fault is not None:
                    faults += 1
                    with suppress(TryAgain, BlockRefused):  # it is on record, and tried again at the next reading
                        await self._repair(named[one.name], fault)
            elif one.block is None:
                await asyncio.to_thread(self.store.discard, one.name)
            elif await self._is_orphan(one.block, entries.get((one.block.tenant, one.block.data_id))):
                await self.drop(one.block)
            await asyncio.sleep(pace * (self._time() - started))
        self._scrubbed_at, self._settled = self._now(), None
        return faults

    def _differs(self, entry: Entry) -> BlockStale | None:
        """Why a copy that is sound is not the one on record, if it is not."""
        stored = self.store.find(_block(entry))
        if stored is None or stored.digest == entry.record.digest:
            return None
        return BlockStale(f"{_shown(_block(entry))} is here with another content than is on record")

    async def _is_orphan(self, block: BlockId, entry: Entry | None) -> bool:
        """Whether no record can come to name this copy any more."""
        if entry is not None and entry.record.version > block.version:
            return True
        now = self._time()
        self._taken = {one: when for one, when in self._taken.items() if now - when < SHARING_SECONDS}
        stored = await asyncio.to_thread(self.store.find, block)
        is_old = stored is not None and self._now() - stored.header.created_at > ORPHAN_SECONDS
        return is_old and block not in self._taken

    # Its life

    async def run(self) -> None:
        """For ever: say that it is there, learn, tend and scrub. Ends only with what nobody foresaw."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_repeat(self.stay, LEASE_SECONDS / 4))
            tasks.create_task(_repeat(self.tend, TEND_SECONDS))
            tasks.create_task(_repeat(self._scrub_in_time, self._settings.scrub_seconds / 10))

    async def stay(self) -> None:
        """Learn, and say that it is there. Raises ConfigError once this machine was expelled."""
        await self.learn()
        self.keyring.require_member()
        await self._directory.stay(self.node)

    async def _scrub_in_time(self) -> None:
        if self._scrubbed_at is None or self._now() - self._scrubbed_at >= self._settings.scrub_seconds:
            await self.scrub(pace=3.0)

    def stop(self) -> None:
        """Close the store: another may open it."""
        for one in self._streams.values():
            one.source.close()
        self._streams.clear()
        self.store.close()


async def open_steward(
    keyring: Keyring, directory: Directory, reach: Reach, wire: Wire, settings: Settings,
    now: Callable[[], float] = time.time,
) -> Steward:  # fmt: skip
    """The steward of the machine with these keys, over the blocks beside them. It is a member from then on.

    Raises ConfigError, AlreadyRunning, Unavailable.
    """
    active = await directory.voters.get(ACTIVE)
    if active is not None and not keyring.is_given:
        await fetch_cluster_key(keyring, directory, wire, key_id_of(active[0]))
        await asyncio.to_thread(keyring.use_cluster_key, key_id_of(active[0]))
    await introduce(keyring, directory)
    await learn(keyring, directory, {})
    node = keyring.node
    after = max(await directory.join(node), int(now()))  # a disk and voters that are both restored know no later one
    store = await asyncio.to_thread(BlockStore, keyring.folder / BLOCKS, keyring, after, now)
    await directory.note_epoch(node, store.epoch)
    return Steward(keyring, store, directory, reach, wire, settings, now)


async def _repeat(work: Callable[[], Any], seconds: float) -> None:
    """What keeps it from being done now will not last, or is an operator's to end: it is said, and tried again."""
    while True:
        try:
            await work()
        except (ConnectionError, NexusError) as error:
            log.warning("the steward goes on: %s", error)
        await asyncio.sleep(seconds)


async def _end(stream: _Stream) -> None:
    async with stream.turn:
        await asyncio.to_thread(stream.source.close)


def _block(entry: Entry) -> BlockId:
    return BlockId(entry.tenant, entry.data_id, entry.record.version)


def _shown(block: BlockId) -> str:
    return f"{block.tenant}/{block.data_id} version {block.version}"
