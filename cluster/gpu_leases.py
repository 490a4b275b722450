"""Who holds how much of which GPU: a replica claims it from the voters before it takes it, and for as long as it lives.

A claim is a key under its holder's lease, so it ends with its holder. Whoever has put one reads all claims to that GPU,
no older than its own. Where those that were put up to its own (a key's revision says when) are more than there is, it
takes its own back. Of any that stand, the latest has seen all others, so together they never exceed the GPU; and the
earliest of those that come at once is refused for nobody who comes after it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import ByteSize

from cluster.catalog import LeaseGone
from nexus.errors import OperatorError

GPUS = "gpus/"  # and machine, index and holder
TTL_SECONDS = 10.0


class Catalog(Protocol):
    """What is used of cluster.client.Client."""

    async def put(self, key: str, value: bytes, lease: int = 0) -> int: ...
    async def delete(self, key: str) -> bool: ...
    async def range(self, prefix: str, fresh: bool = True) -> list[tuple[str, bytes, int]]: ...


@dataclass(frozen=True, slots=True)
class Claim:
    """So many bytes of one GPU, for a replica, whose process is `pid` on that machine; its workers are others."""

    node: str
    gpu: int
    holder: str
    bytes: int
    pid: int


async def claim(catalog: Catalog, wanted: Claim, capacity: int, lease: int) -> None:
    """Return once it is held. `capacity` is what Nexus may use of the GPU, in bytes.

    Raises OperatorError where it does not fit beside the claims before it, LeaseGone and Unavailable.
    """
    revision = await declare(catalog, wanted, lease)
    found = await catalog.range(_prefix(wanted.node, wanted.gpu))
    if revision not in [at for _, _, at in found]:
        raise LeaseGone
    before = [_read(key, value) for key, value, at in found if at < revision]
    if sum(one.bytes for one in before) + wanted.bytes > capacity:
        await catalog.delete(_key(wanted))
        raise OperatorError(_refusal(wanted, capacity, before))


async def declare(catalog: Catalog, claim: Claim, lease: int) -> int:
    """Put a claim whatever else there is, as for memory that is held already: its revision. Raises LeaseGone."""
    return await catalog.put(_key(claim), json.dumps({"bytes": claim.bytes, "pid": claim.pid}).encode(), lease)


async def held(catalog: Catalog) -> list[Claim]:
    """All claims, in the order of machines and GPUs, as any voter knows them, quorum or not."""
    found = [_read(key, value) for key, value, _ in await catalog.range(GPUS, fresh=False)]
    return sorted(found, key=lambda one: (one.node, one.gpu, one.holder))


def _prefix(node: str, gpu: int) -> str:
    return f"{GPUS}{node}/{gpu}/"


def _key(claim: Claim) -> str:
    return f"{_prefix(claim.node, claim.gpu)}{claim.holder}"


def _read(key: str, value: bytes) -> Claim:
    node, gpu, holder = key.removeprefix(GPUS).split("/", 2)
    return Claim(node, int(gpu), holder, **json.loads(value))


def _refusal(wanted: Claim, capacity: int, before: Sequence[Claim]) -> str:
    others = ", ".join(f"{one.holder} holds {size(one.bytes)} (process {one.pid})" for one in before)
    return (
        f"{wanted.holder} takes {size(wanted.bytes)} of GPU {wanted.gpu} of {wanted.node}, which has {size(capacity)}"
        f" for Nexus{': ' if others else ''}{others}; run `nexus up`, which plans anew"
    )


def size(count: int) -> str:
    """Bytes, for people."""
    return ByteSize(count).human_readable()
