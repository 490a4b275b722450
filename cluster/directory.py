"""Which blocks are shared, in which version, and which machines keep them: what the voters agree on about sharing.

A block is what `share/blocks/<tenant>/<data_id>` says: its newest version, the digest that every copy must have, and
the machines with a verified one. All else about it is in the copies. A version is the revision of a put of its own, so
none is used twice, not even when a block is deleted and shared again; a record gives way only to a later version, or to
the same one with other copies, by compare-and-set.

A steward is a member from when it first came (`share/stewards/<node>`), and is there while its lease lives
(`share/alive/<node>`). The introductions of machines (`share/nodes/`) and the tenants' keys (`share/keys/`) are sealed
under the cluster key by whoever put them (nexus/keyring.py): the voters can neither read nor forge them.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from cluster.catalog import LeaseGone
from cluster.plan import DRAINED
from nexus.errors import Conflict

BLOCKS, STEWARDS, ALIVE = "share/blocks/", "share/stewards/", "share/alive/"
NODES, KEYS, VERSIONS = "share/nodes/", "share/keys/", "share/versions"
OFFERED, ACTIVE = "share/cluster/offered", "share/cluster/active"
LEASE_SECONDS = 10.0
ATTEMPTS = 20  # of a compare-and-set that is lost to others


class Voters(Protocol):
    """What is used of cluster.client.Client."""

    async def put(self, key: str, value: bytes, lease: int = 0) -> int: ...
    async def compare_and_set(self, key: str, expected_revision: int, value: bytes, lease: int = 0) -> int | None: ...
    async def delete(self, key: str) -> bool: ...
    async def get(self, key: str, fresh: bool = True) -> tuple[bytes, int] | None: ...
    async def range(self, prefix: str, fresh: bool = True) -> list[tuple[str, bytes, int]]: ...
    async def grant(self, ttl_seconds: float) -> int: ...
    async def keep_alive(self, lease: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Record:
    """A block as it is agreed on. `length` is in bytes of what was shared; `copies` are machines."""

    version: int
    digest: str
    length: int
    data_type: str
    media_type: str
    writer: str
    created_at: float
    copies: tuple[str, ...]
    signer: str = ""  # the fingerprint of the writer's key, where it was noted


@dataclass(frozen=True, slots=True)
class Entry:
    """A record with the name it is under; `revision` is for whoever would change it."""

    tenant: str
    data_id: str
    record: Record
    revision: int


@dataclass(frozen=True, slots=True)
class View:
    """Who keeps blocks: the stewards that there are, those that answer, and those that are to have nothing more."""

    members: frozenset[str]
    living: frozenset[str]
    drained: frozenset[str]

    @property
    def usable(self) -> frozenset[str]:
        """Where a copy may be put now."""
        return self.living & self.members - self.drained


class Directory:
    """Reads are no older than the call. Raises Unavailable where the voters do not answer."""

    def __init__(self, voters: Voters) -> None:
        self.voters = voters
        self._lease = 0

    # Blocks

    async def reserve(self) -> int:
        """A version greater than any that was reserved before."""
        return await self.voters.put(VERSIONS, b"")

    async def find(self, tenant: str, data_id: str) -> Entry | None:
        found = await self.voters.get(_key(tenant, data_id))
        return None if found is None else Entry(tenant, data_id, _read(found[0]), found[1])

    async def blocks(self, tenant: str = "") -> list[Entry]:
        """All of a tenant in order of their names, or of all tenants."""
        found = await self.voters.range(f"{BLOCKS}{tenant}/" if tenant else BLOCKS)
        named = [(key.removeprefix(BLOCKS).split("/", 1), value, revision) for key, value, revision in found]
        return [Entry(name[0], name[1], _read(value), revision) for name, value, revision in named]

    async def commit(self, tenant: str, data_id: str, record: Record) -> Record | None:
        """Make this the newest version: the one that it replaces. Raises Conflict where there is a later one."""
        for _ in range(ATTEMPTS):
            current = await self.find(tenant, data_id)
            if current is not None and current.record.version > record.version:
                raise Conflict("a later version of this block was shared meanwhile")
            expected = 0 if current is None else current.revision
            if await self.voters.compare_and_set(_key(tenant, data_id), expected, _written(record)) is not None:
                return None if current is None else current.record
        raise Conflict("this block is being shared by many at once")

    async def move(self, entry: Entry, copies: Sequence[str]) -> bool:
        """Say who has this version now; False where the record has changed since it was read."""
        return await self.replace(entry, replace(entry.record, copies=tuple(copies)))

    async def replace(self, entry: Entry, record: Record) -> bool:
        """Put this record in the place of that one; False where it has changed since it was read."""
        key = _key(entry.tenant, entry.data_id)
        return await self.voters.compare_and_set(key, entry.revision, _written(record)) is not None

    async def remove(self, tenant: str, data_id: str) -> Entry | None:
        """Nobody finds it from now on: what it was."""
        found = await self.find(tenant, data_id)
        return found if found is not None and await self.voters.delete(_key(tenant, data_id)) else None

    # Stewards

    async def join(self, node: str) -> int:
        """Become a member: the highest epoch that it is known to have written with, 0 for none."""
        found = await self.voters.get(f"{STEWARDS}{node}")
        if found is None:
            await self.voters.compare_and_set(f"{STEWARDS}{node}", 0, b"0")
        return 0 if found is None else int(found[0])

    async def note_epoch(self, node: str, epoch: int) -> None:
        """It writes with this one from now on."""
        await self.voters.put(f"{STEWARDS}{node}", str(epoch).encode())

    async def stay(self, node: str) -> None:
        """Say that it is there; once in a third of LEASE_SECONDS."""
        try:
            if self._lease:
                return await self.voters.keep_alive(self._lease)
            lease = await self.voters.grant(LEASE_SECONDS)
            await self.voters.put(f"{ALIVE}{node}", b"", lease)
            self._lease = lease
        except LeaseGone:
            self._lease = 0
            await self.stay(node)

    async def forget(self, node: str) -> bool:
        """It is a member no more, as when its machine will not come back; whether it was one."""
        return await self.voters.delete(f"{STEWARDS}{node}")

    async def view(self) -> View:
        members, alive, drained = await asyncio.gather(*map(self._names, (STEWARDS, ALIVE, DRAINED)))
        return View(members, alive & members, drained)

    async def _names(self, prefix: str) -> frozenset[str]:
        return frozenset(key.removeprefix(prefix) for key, _, _ in await self.voters.range(prefix))


def _key(tenant: str, data_id: str) -> str:
    return f"{BLOCKS}{tenant}/{data_id}"


def _written(record: Record) -> bytes:
    return json.dumps(asdict(record), separators=(",", ":")).encode()


def _read(value: bytes) -> Record:
    fields = json.loads(value)
    return Record(**{**fields, "copies": tuple(fields["copies"])})
