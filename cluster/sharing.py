"""Whoever shares a block or reads one: which steward is asked, and who is asked next where that one is away.

The steward of the same machine is asked first, so that nothing leaves it unsealed; else the first of the block's own
machines (cluster/steward.py, `rank`), or of those with a copy. A reader whose steward dies goes on with the same
version at another one, after as many bytes as were read.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.directory import Directory, Entry, View
from cluster.steward import AHEAD, Opened, Reach, Settings, Shared, Standing, end_all, pieces_of, rank
from nexus import telemetry
from nexus.background import begin_in_background
from nexus.envelope import BlockId
from nexus.errors import BlockRefused, Conflict, NexusError, NotFound, TryAgain, Unavailable

PIECE_BYTES = 2**20
LOOKS = 3  # at the record, which may change while it is read
DESCRIBE_SECONDS = 5.0
TYPES_COUNTED = 32
MEDIA_TYPE = "application/octet-stream"


class Stewards(Reach, Protocol):
    """A Reach that can see to it that there are stewards."""

    async def wake(self) -> None:
        """Return once there is one at least. Raises Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Download:
    """A verified block: its record, the caller's metadata, and its bytes, to be read once and closed."""

    shared: Shared
    metadata: Mapping[str, object]
    pieces: AsyncGenerator[bytes, None]


@dataclass(frozen=True, slots=True)
class Removal:
    """A block that is found no more; `erased` of its copies were deleted, the others go when their machines return."""

    version: int
    copies: int
    erased: int


@dataclass(frozen=True, slots=True)
class Overview:
    """All blocks and who keeps them. `short` have fewer copies than can be had now; bytes are of what was shared."""

    wanted: int
    blocks: int
    bytes: int
    short: int
    members: Sequence[str]
    living: Sequence[str]
    drained: Sequence[str]
    standings: Sequence[Standing]


class Sharing:
    """Blocks of all tenants. Everything raises Unavailable where the voters, or too many stewards, do not answer."""

    def __init__(
        self, directory: Directory, stewards: Stewards, settings: Settings, here: str | None = None
    ) -> None:  # fmt: skip
        """`here` is the machine of this process, where that is one of them."""
        self._here = here
        self._directory, self._stewards, self._settings = directory, stewards, settings
        self._counted: set[str] = set()

    async def put(
        self, tenant: str, data_id: str, content: AsyncIterable[bytes], data_type: str = "data",
        media_type: str = MEDIA_TYPE, metadata: Mapping[str, object] | None = None,
    ) -> Shared:  # fmt: skip
        """Share a block, or a new version of it: once it is acknowledged, so many copies are on disks and verified.

        Raises InvalidRequest, Conflict where a later version was shared meanwhile, and Unavailable: then it is not
        known whether it was shared, and sharing it again does no harm.
        """
        node, handle = await self._begin(tenant, data_id, data_type, media_type, metadata or {})
        try:
            await self._send(node, handle, content)
            shared: Shared = await self._answered(node, "finish", handle)
        except BaseException:
            begin_in_background(self._forget(node, handle))
            raise
        telemetry.data_shared.labels(node, self._counted_as(data_type)).inc()
        telemetry.replication.labels(node).observe(shared.replication_seconds)
        return shared

    async def _send(self, node: str, handle: str, content: AsyncIterable[bytes]) -> None:
        """All pieces, a few of them at once."""
        under_way: deque[asyncio.Task[Any]] = deque()
        numbers = itertools.count()
        try:
            async with aclosing(_evenly(content)) as pieces:
                async for piece in pieces:
                    if len(under_way) == AHEAD:
                        await under_way[0]
                        under_way.popleft()
                    sending = self._answered(node, "append", handle, next(numbers), piece)
                    under_way.append(begin_in_background(sending))
            while under_way:
                await under_way[0]
                under_way.popleft()
        finally:
            begin_in_background(end_all(under_way))

    async def _answered(self, node: str, method: str, *arguments: object) -> Any:
        try:
            return await self._stewards.call(node, method, *arguments)
        except ConnectionError:
            raise Unavailable(f"the steward of {node} went away; share the block again") from None

    def _counted_as(self, data_type: str) -> str:
        """The first few types by their names: whoever shares names them, and each is a time series of its own."""
        if len(self._counted) < TYPES_COUNTED:
            self._counted.add(data_type)
        return data_type if data_type in self._counted else "other"

    async def _begin(self, tenant: str, data_id: str, *about: object) -> tuple[str, str]:
        view = await self._awake()
        for node in sorted(rank(view.usable, tenant, data_id), key=lambda node: node != self._here):
            try:
                return node, await self._stewards.call(node, "begin", tenant, data_id, *about)
            except ConnectionError:  # the next one takes it
                continue
        raise Unavailable("no steward answers; `nexus share status` says how they are")

    async def _awake(self) -> View:
        view = await self._directory.view()
        if view.usable:
            return view
        await self._stewards.wake()
        return await self._directory.view()

    async def _forget(self, node: str, handle: str) -> None:
        try:
            await self._stewards.call(node, "close", handle)
        except (ConnectionError, NexusError):  # then it is closed when it was idle for long
            return

    async def get(self, tenant: str, data_id: str) -> Download:
        """The newest version. Raises NotFound, and BlockRefused where every copy is damaged: nothing of it is shown."""
        node, opened = await self._open(tenant, data_id)
        pieces = self._pieces(tenant, data_id, node, opened)
        await anext(pieces)  # so that closing it frees the block, also where nothing of it is read
        return Download(Shared(data_id, opened.record, self._settings.copies), opened.metadata, pieces)

    async def _pieces(self, tenant: str, data_id: str, node: str, opened: Opened) -> AsyncGenerator[bytes, None]:
        """Nothing at first, then the bytes."""
        version, sent, away = opened.record.version, 0, set[str]()
        try:
            yield b""
        except GeneratorExit:
            begin_in_background(self._forget(node, opened.handle))
            raise
        while True:
            to_skip = sent
            try:
                async with aclosing(pieces_of(self._stewards, node, opened.handle)) as pieces:
                    async for piece in pieces:
                        rest, to_skip = piece[to_skip:], max(0, to_skip - len(piece))
                        sent += len(rest)
                        if rest:
                            yield rest
                return
            except ConnectionError:
                away.add(node)
            node, opened = await self._open(tenant, data_id, away)
            if opened.record.version != version:
                raise Unavailable("the block was replaced by a later version while it was read; read it again")

    async def _open(self, tenant: str, data_id: str, away: Iterable[str] = ()) -> tuple[str, Opened]:
        """The first steward that has a good copy. Raises what is worst of what they raise."""
        refused: BlockRefused | None = None
        for look in range(LOOKS):
            entry = await self._find(tenant, data_id)
            view = await self._awake() if look else await self._directory.view()
            for node in self._order(entry, view, away):
                try:
                    return node, await self._stewards.call(node, "open", tenant, data_id)
                except BlockRefused as error:
                    refused = error
                except (ConnectionError, TryAgain, NotFound):  # the record may be another by now
                    continue
        if refused is not None:
            raise refused
        raise Unavailable(f"none of the machines that have it answers: {', '.join(entry.record.copies)}")

    def _order(self, entry: Entry, view: View, away: Iterable[str]) -> list[str]:
        """This machine's, then those with a copy, who are said to live first; who lost its lease may answer yet."""
        with_copy = sorted(entry.record.copies, key=lambda node: node not in view.living)
        order = [self._here, *with_copy] if self._here in view.usable else with_copy
        return [node for node in dict.fromkeys(order) if node is not None and node not in set(away)]

    async def _find(self, tenant: str, data_id: str) -> Entry:
        entry = await self._directory.find(tenant, data_id)
        if entry is None:
            raise NotFound("no such block")
        return entry

    async def describe(self, tenant: str, data_id: str) -> Download:
        """As `get`, with no bytes to read. Raises as that does."""
        node, opened = await self._open(tenant, data_id)
        await self._forget(node, opened.handle)
        return Download(Shared(data_id, opened.record, self._settings.copies), opened.metadata, _nothing())

    async def page(self, tenant: str, after: str, limit: int) -> Sequence[Shared]:
        """A tenant's blocks in order of their ids, from after this one."""
        entries = [one for one in await self._directory.blocks(tenant) if one.data_id > after]
        return [Shared(one.data_id, one.record, self._settings.copies) for one in entries[:limit]]

    async def delete(self, tenant: str, data_id: str) -> Removal:
        """Nobody finds it from now on. Raises NotFound."""
        entry = await self._directory.remove(tenant, data_id)
        if entry is None:
            raise NotFound("no such block")
        block = BlockId(tenant, data_id, entry.record.version)
        view = await self._directory.view()
        there = [node for node in entry.record.copies if node in view.living]
        dropped = await asyncio.gather(
            *(self._stewards.call(one, "drop", block) for one in there), return_exceptions=True
        )
        return Removal(entry.record.version, len(entry.record.copies), sum(one is True for one in dropped))

    # For operators

    async def overview(self) -> Overview:
        """Those stewards that do not answer at once are left out of `standings`."""
        view, entries = await self._directory.view(), await self._directory.blocks()
        possible = self._settings.needed(view.members - view.drained)
        short = [one for one in entries if len(view.usable & set(one.record.copies)) < possible]
        standings = await asyncio.gather(*(self._standing(node) for node in sorted(view.living & view.members)))
        return Overview(
            self._settings.copies, len(entries), sum(one.record.length for one in entries), len(short),
            sorted(view.members), sorted(view.living), sorted(view.drained & view.members),
            [one for one in standings if one is not None],
        )  # fmt: skip

    async def _standing(self, node: str) -> Standing | None:
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                standing: Standing = await self._stewards.call(node, "describe")
        except (TimeoutError, ConnectionError, NexusError):
            return None
        return standing

    async def rotate(self, tenant: str) -> str:
        """A new key for all that this tenant shares from now on; the old one goes when nothing needs it: the new id."""
        return str(await self._ask_one("rotate", tenant))

    async def rotate_cluster_key(self) -> str:
        """Another secret for what machines tell each other of keys; the old one goes when all have it: the new id."""
        return str(await self._ask_one("rotate_cluster_key"))

    async def scrub(self) -> int:
        """Have every steward verify all that it keeps, now: how many copies were damaged."""
        view = await self._awake()
        found = await asyncio.gather(*(self._stewards.call(node, "scrub") for node in sorted(view.usable)))
        return sum(found)

    async def forget(self, node: str) -> None:
        """A machine that will not come back counts no more; its blocks are copied anew. Raises NotFound, Conflict."""
        view = await self._directory.view()
        if node in view.living:
            raise Conflict(f"{node} is there: `nexus node drain {node}` moves its blocks, and stop it then")
        if not await self._directory.forget(node):
            raise NotFound(f"no steward is called {node!r}; there are {', '.join(sorted(view.members)) or 'none'}")

    async def expel(self, node: str) -> int:
        """Take a machine's signing key out of use, for good: how many blocks others seal anew after that.

        Every steward that answers refuses it when this returns. Raises NotFound, Conflict for the machine
        of this process, Unavailable where no other answers.
        """
        if node == self._here or (await self._awake()).usable == {node}:
            raise Conflict(f"{node} cannot expel itself: others have to, and Nexus has to be led from another one")
        left = int(str(await self._ask_one("expel", node, but=node)))
        there = (await self._directory.view()).living
        await asyncio.gather(*(self._stewards.call(one, "stay") for one in there), return_exceptions=True)
        return left

    async def _ask_one(self, method: str, *arguments: object, but: str = "") -> object:
        for node in sorted((await self._awake()).usable - {but}):
            try:
                return await self._stewards.call(node, method, *arguments)
            except ConnectionError:
                continue
        raise Unavailable("no steward answers; `nexus share status` says how they are")


async def _evenly(content: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes in pieces of PIECE_BYTES, but for the last."""
    kept = bytearray()
    async for some in content:
        kept += some
        while len(kept) >= PIECE_BYTES:
            yield bytes(kept[:PIECE_BYTES])
            del kept[:PIECE_BYTES]
    if kept:
        yield bytes(kept)


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield b""
