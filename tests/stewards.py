"""Some stewards in one process: real stores, real keys and a real catalog, with a network and disks that can fail."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.alone import AloneVoters
from cluster.catalog import Delete
from cluster.channel import Callers, Gate, Member
from cluster.directory import ACTIVE, ALIVE, Directory
from cluster.membership import FrontDoor
from cluster.sharing import Sharing
from cluster.steward import Settings, Steward, open_steward
from nexus.envelope import BlockId
from nexus.errors import Unavailable
from nexus.keyring import Keyring, key_id_of

CLUSTER_KEY = "x7Kp2mQ9vT4wY8zR3nB6cD1fG5hJ0kLsA2eU4iO7pM"
NODES = ("sark", "clu", "tron")
CLIENT = ""  # whoever is no steward
DESK = "desk"  # a machine that keeps no blocks
NOW = 1_800_000_000.0


@dataclass
class Faults:
    """How often, of all calls, one is lost on its way, or its answer is; nothing is by default."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    lost: float = 0.0
    unanswered: float = 0.0
    of_voters: float = 0.0

    def happens(self, share: float) -> bool:
        return share > 0 and self.rng.random() < share


@dataclass
class Machines:
    """The stewards, by their machines' names; those that are not in `up` answer nobody and reach nobody."""

    folder: Path
    settings: Settings
    voters: AloneVoters = field(default_factory=AloneVoters)
    faults: Faults = field(default_factory=Faults)
    stewards: dict[str, Steward] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    doors: dict[str, FrontDoor] = field(default_factory=dict)
    up: set[str] = field(default_factory=set)
    overheard: deque[bytes] = field(default_factory=lambda: deque(maxlen=1_000))
    lives: dict[str, int] = field(default_factory=dict)
    now: float = NOW
    given: str | None = CLUSTER_KEY  # as the settings have it; None: each machine's home does
    refuse: Callable[[str, str, tuple[object, ...]], None] = lambda node, method, arguments: None

    @property
    def directory(self) -> Directory:
        return Directory(self.voters)

    def reach_at(self, here: str | None) -> "FaultyReach":
        """As a process on that machine reaches the stewards, or on one that keeps no blocks."""
        return FaultyReach(self, CLIENT, 0, self.door(here or DESK))

    def home(self, node: str) -> Path:
        """With the cluster key, as whoever runs the machines carried it there."""
        home = self.folder / node
        home.mkdir(mode=0o700, exist_ok=True)
        if self.given is None and not (home / "share-key").exists():
            active = self.voters.catalog.get(ACTIVE)
            others = [self.stewards[other].keyring for other in sorted(self.up - {node}) if active]
            (home / "share-key").touch(0o600)
            (home / "share-key").write_text(
                others[0].cluster_secret(key_id_of(active[0])) if others and active else CLUSTER_KEY
            )
        return home

    def door(self, node: str) -> FrontDoor:
        if node not in self.doors:
            home = self.home(node)
            wire = FaultyReach(self, CLIENT, 0, StewardMember(self, node))
            self.doors[node] = FrontDoor(lambda: Keyring(home, node, self.given, keeps=False), self.directory, wire)
        return self.doors[node]

    @property
    def sharing(self) -> Sharing:
        return self.sharing_at(None)

    def sharing_at(self, here: str | None) -> Sharing:
        """For a process on that machine, or on none of them."""
        return Sharing(Directory(FaultyVoters(self, CLIENT, 0)), self.reach_at(here), self.settings, here)

    async def start(self, node: str) -> Steward:
        home = self.home(node)
        self.lives[node] = life = self.lives.get(node, 0) + 1
        reach, voters = FaultyReach(self, node, life, StewardMember(self, node)), FaultyVoters(self, node, life)
        keyring = Keyring(home, node, self.given)
        steward = await open_steward(keyring, Directory(voters), reach, reach, self.settings, lambda: self.now)
        self.stewards[node] = steward
        self.open_gate(node)
        await steward.stay()
        return steward

    def open_gate(self, node: str) -> None:
        """It answers from now on."""
        self.gates[node] = Gate(StewardMember(self, node), partial(self._do, node))
        self.up.add(node)

    async def _do(self, node: str, caller: str, method: str, arguments: tuple[object, ...]) -> Any:
        return await getattr(self.stewards[node], method)(*arguments)

    def kill(self, node: str) -> None:
        """It reaches nobody from now on, and its lease ends; what it does on its own disk may go on for a moment."""
        self.up.discard(node)
        self.lives[node] += 1
        self.voters.carry_out(Delete(f"{ALIVE}{node}"))

    async def revive(self, node: str) -> None:
        """With the disk that it had."""
        self.stewards.pop(node).stop()
        await self.start(node)

    async def settle(self) -> None:
        """Until every steward that is up finds all in order. Raises AssertionError where it does not come to that."""
        for _ in range(40):
            done = [await self.stewards[node].tend() for node in sorted(self.up)]
            if all(done):
                return
        raise AssertionError("the stewards find no end of tending")

    def is_alive(self, node: str, life: int) -> bool:
        return node == CLIENT or self.lives[node] == life

    async def copies(self, data_id: str, tenant: str = "acme") -> tuple[str, ...]:
        entry = await self.directory.find(tenant, data_id)
        return () if entry is None else entry.record.copies

    async def block(self, data_id: str, tenant: str = "acme") -> BlockId:
        entry = await self.directory.find(tenant, data_id)
        assert entry is not None
        return BlockId(tenant, data_id, entry.record.version)

    def file(self, node: str, block: BlockId) -> Path:
        name = self.stewards[node].store.name_of(block)
        (found,) = (self.folder / node / "share" / "blocks" / "files").rglob(name)
        return found

    def files(self, node: str) -> list[Path]:
        return sorted((self.folder / node / "share" / "blocks" / "files").rglob("*.block"))

    def stop(self) -> None:
        for steward in self.stewards.values():
            steward.stop()


@dataclass
class StewardMember:
    """A steward as it talks to others."""

    machines: Machines
    node: str

    async def identity(self) -> Keyring:
        return self.machines.stewards[self.node].keyring

    async def learn(self) -> None:
        await self.machines.stewards[self.node].learn()


@dataclass
class FaultyReach:
    """What one life of a steward, or a client, reaches of the others: on channels, as the product's do."""

    machines: Machines
    owner: str
    life: int
    member: Member

    def __post_init__(self) -> None:
        self.callers = Callers(self.member, self)

    async def call(self, node: str, method: str, *arguments: object) -> Any:
        faults = self.machines.faults
        self._require(node)
        if faults.happens(faults.lost):
            raise ConnectionError("lost on its way")
        self.machines.refuse(node, method, arguments)
        await asyncio.sleep(0)
        answer = await self.callers.call(node, method, *arguments)
        self._require(node)
        if faults.happens(faults.unanswered):
            raise ConnectionError("the answer is lost")
        return answer

    def _require(self, node: str) -> None:
        if not self.machines.is_alive(self.owner, self.life) or node not in self.machines.up:
            raise ConnectionError(f"{node} does not answer")

    async def send(self, node: str, message: bytes, patience: str) -> bytes:
        self._require(node)
        self.machines.overheard.append(message)
        return await self.machines.gates[node].answer(message)

    async def wake(self) -> None:
        """They are up, or they are not."""


@dataclass
class FaultyVoters:
    """The voters, as one life of a steward or a client reaches them: a lost answer leaves in doubt what was done."""

    machines: Machines
    owner: str
    life: int

    def __getattr__(self, method: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            faults = self.machines.faults
            self._require(faults.happens(faults.of_voters))
            await asyncio.sleep(0)
            answer = await getattr(self.machines.voters, method)(*arguments)
            self._require(faults.happens(faults.of_voters))
            return answer

        return call

    def _require(self, is_lost: bool) -> None:
        if is_lost or not self.machines.is_alive(self.owner, self.life):
            raise Unavailable("the voters do not answer")


async def content(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def read(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([piece async for piece in pieces])


async def drain() -> None:
    """Until what goes on in the background is done."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
    """In place of asyncio.to_thread, where what happens is to follow from a seed."""
    return work(*arguments)
