"""Who the machines are that share blocks, and which cluster key they have in common, as the voters know it.

**Changing the cluster key.** A steward makes another and offers it: a record under `share/cluster/offered`, sealed
under that key itself, so that its id can be read and nobody without it can have written it. Who does not hold it asks
the other machines, on a channel (cluster/channel.py): a member gets it, an expelled one does not, and no earlier
cluster key helps. When every steward that is there holds it, one says so (`share/cluster/active`). From then on each
seals under it, puts what the voters have under an earlier key under this one, and destroys the earlier ones when
nothing is left under them. A machine that was away asks when it comes back. What is put under an earlier key after
that moment is not believed.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cluster.channel import Callers, Wire
from cluster.directory import ACTIVE, KEYS, NODES, Directory
from nexus.errors import Conflict, NexusError, Unavailable, UpstreamInvalid
from nexus.keyring import SECRET_FILE, Keyring, key_id_of

log = logging.getLogger("nexus.steward")


@dataclass(frozen=True, slots=True)
class Known:
    """A machine that talks to others with these keys: a channel's Member, and who it learns from."""

    keyring: Keyring
    learned: Callable[[], Awaitable[None]]

    async def identity(self) -> Keyring:
        return self.keyring

    async def learn(self) -> None:
        await self.learned()


class FrontDoor:
    """A machine as it asks stewards, whether or not it keeps blocks itself: a channel's Member (cluster/channel.py)."""

    def __init__(self, open_keyring: Callable[[], Keyring], directory: Directory, wire: Wire) -> None:
        """`open_keyring` gives one that keeps nothing; it is called when a steward is asked for the first time."""
        self._open_keyring, self._directory, self._wire = open_keyring, directory, wire
        self._keyring: Keyring | None = None
        self._opening = asyncio.Lock()
        self._learned: dict[str, int] = {}

    async def identity(self) -> Keyring:
        """Raises ConfigError where this machine's keys are not as they have to be, or it was removed."""
        async with self._opening:
            if self._keyring is None:
                keyring = await asyncio.to_thread(self._open_keyring)
                await self._follow(keyring)
                await introduce(keyring, self._directory)
                self._keyring = keyring
            return self._keyring

    async def learn(self) -> None:
        keyring = await self.identity()
        await self._follow(keyring)
        await learn(keyring, self._directory, self._learned)

    async def _follow(self, keyring: Keyring) -> None:
        """Have the cluster key that is in use: the steward of this machine has it, or another one hands it over."""
        found = await self._directory.voters.get(ACTIVE)
        if found is None or keyring.cluster_keys() == (key_id_of(found[0]),):
            return
        key_id, is_beside = key_id_of(found[0]), keyring.is_beside_steward()
        await asyncio.to_thread(keyring.read_cluster_keys)
        await fetch_cluster_key(keyring, self._directory, self._wire, key_id)
        await asyncio.to_thread(keyring.use_cluster_key, key_id)
        if not is_beside and all(key_id_of(one[1]) == key_id for one in await self._directory.voters.range(NODES)):
            await asyncio.to_thread(keyring.forget_cluster_keys)
        self._learned.clear()


async def fetch_cluster_key(keyring: Keyring, directory: Directory, wire: Wire, key_id: str) -> None:
    """Have this one, from whichever machine hands it over. Raises Unavailable where none does."""
    if key_id in keyring.cluster_keys():
        return
    callers = Callers(Known(keyring, lambda: learn(keyring, directory, {})), wire)
    faults = []
    for node in sorted((await directory.view()).living - {keyring.node}):
        try:
            secret = await callers.call(node, "hand_over", key_id)
            if await asyncio.to_thread(keyring.hold_cluster_key, secret) == key_id:
                return
        except (ConnectionError, NexusError) as error:
            faults.append(f"{node}: {error}")
    raise Unavailable(
        f"the cluster key is {key_id} by now, and no machine hands it over to this one"
        f" ({'; '.join(faults) or 'none is there'}): they are asked again; or copy {SECRET_FILE} from another's home"
    )


async def introduce(keyring: Keyring, directory: Directory) -> None:
    """Put its key with the voters, beside those that this machine had before. Raises ConfigError if it was removed."""
    key = f"{NODES}{keyring.node}"
    while True:
        since = await active_since(directory, keyring)
        found = await directory.voters.get(key)
        value, revision = (None, 0) if found is None else found
        known = value if value is not None and is_believed(value, revision, since) else None
        record = await asyncio.to_thread(keyring.introduction, known)
        if await directory.voters.compare_and_set(key, revision, record) is not None:
            return


async def amend(directory: Directory, node: str, record: Callable[[], bytes], keyring: Keyring) -> None:
    """Put what `record` makes of all that `keyring` knows of a machine with the voters. Raises what it raises."""
    key = f"{NODES}{node}"
    while True:
        since = await active_since(directory, keyring)
        found = await directory.voters.get(key)
        if found is not None and is_believed(*found, since):
            await asyncio.to_thread(keyring.meet, found[0])
        made = await asyncio.to_thread(record)
        if await directory.voters.compare_and_set(key, found[1] if found else 0, made) is not None:
            await asyncio.to_thread(keyring.meet, made)
            return


async def learn(keyring: Keyring, directory: Directory, learned: dict[str, int]) -> None:
    """Meet the machines, and install the keys of tenants if it keeps any, that are newer than in `learned`."""
    since = await active_since(directory, keyring)
    known = ((NODES, keyring.meet), (KEYS, keyring.install))
    for prefix, take in known if keyring.keeps else known[:1]:
        for key, value, revision in await directory.voters.range(prefix):
            if learned.get(key) == revision:
                continue
            try:
                if not is_believed(value, revision, since):
                    raise UpstreamInvalid("it was put there under a cluster key that was changed before")
                await asyncio.to_thread(take, value)
            except (UpstreamInvalid, Conflict) as error:
                log.error("what the voters have under %s is not taken: %s", key, error.message)
            learned[key] = revision


async def active_since(directory: Directory, keyring: Keyring) -> tuple[str, int]:
    """(id, revision) of the cluster key in use; ("", 0) where it was never changed, or this machine has it not yet."""
    found = await directory.voters.get(ACTIVE)
    if found is None or key_id_of(found[0]) not in keyring.cluster_keys():
        return "", 0
    return key_id_of(found[0]), found[1]


def is_believed(value: bytes, revision: int, since: tuple[str, int]) -> bool:
    """Whether it is under the cluster key in use, or was put before there was that one."""
    return not since[0] or revision < since[1] or key_id_of(value) == since[0]


async def put_under(keyring: Keyring, directory: Directory, draft_ring: Callable[[str], bytes | None]) -> bool:
    """Put what the voters have under other cluster keys, and this machine knows, under that in use; whether all is.

    A tenant's ring is what `draft_ring` makes of it.
    """
    is_done = True
    for prefix, made_of in ((NODES, keyring.record_of), (KEYS, draft_ring)):
        for key, value, revision in await directory.voters.range(prefix):
            if key_id_of(value) == keyring.cluster_key_id:
                continue
            made = await asyncio.to_thread(made_of, key.removeprefix(prefix))
            if made is not None:  # else it is nobody's that this machine knows, and is believed by none
                is_done &= await directory.voters.compare_and_set(key, revision, made) is not None
    return is_done
