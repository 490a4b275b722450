"""The coordinator: voters as named, detached actors, each pinned to its machine and to its disk.

A voter speaks to the others over handles that it holds; `connect` gives the client that speaks to them all.
"""

import asyncio
import json
import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from pydantic import PositiveInt, TypeAdapter, ValidationError
from ray.actor import ActorHandle
from ray.exceptions import PendingCallsLimitExceeded, RayActorError

from actors.hops import begin
from cluster.catalog import LONGEST_STEP_MS, Catalog, Clock, Compacted, Event, encode
from cluster.client import Absent, Client, Doubtful, Elsewhere, Query
from cluster.raft import (
    ConfChangeRefused,
    EntryKind,
    Members,
    Message,
    NodeId,
    NotLeader,
    ProposalDropped,
    Role,
    Snapshot,
    Status,
)
from cluster.raft.storage import Storage
from cluster.voter import PACE, Pace, Unanswered, Voter, found
from nexus.archive import beside
from nexus.background import begin_in_background
from nexus.errors import AlreadyRunning, ConfigError, Conflict, InvalidRequest, NotFound, OperatorError, Unavailable

__all__ = ["Client", "Compacted", "Coordinator", "Operator", "Placement", "connect", "restore", "start"]

log = logging.getLogger("nexus.coordinator")

NAMESPACE = "nexus"
NAME = "nexus-coordinator-"  # and the number of the voter
CLOCK_SECONDS = 0.5
LONGEST_TICK_SECONDS = 2.0  # of the clock; what is longer, the voter was stopped or stuck, and heard of no lease
PENDING_CALLS = 1_000  # to one voter that takes none; what comes on top is lost, as on any network
SILENCE_SECONDS = 2.0
LOOK_SECONDS = 0.2  # between two look-ups of a voter that has no actor yet, or of a disk that is in use
START_SECONDS = 60.0
FOLDER = "coordinator"  # in the home
REGISTER = "voters.json"


@dataclass(frozen=True, slots=True)
class Placement:
    """The machine of a voter, by the labels that its Ray node must have; without any, wherever there is room."""

    labels: Mapping[str, str] = field(default_factory=dict)


class Coordinator:
    """One voter and the catalog it keeps. Made, as an actor is, inside a running event loop.

    A voter whose disk is empty waits to be founded; one whose disk is another's, or damaged, goes on refusing,
    and its status says why: to vote from an empty memory under an old number would be to vote twice.
    """

    def __init__(self, id: NodeId, folder: str, identity: str, pace: Pace = PACE) -> None:
        begin("voter")
        self._id, self._pace = id, pace
        self._catalog = Catalog()
        self._peers = Peers()
        self._voter: Voter | None = None
        self._problem = "it is about to read its disk"
        self._disk = asyncio.get_running_loop().create_task(self._claim(folder, identity))
        self._disk.add_done_callback(self._check)

    async def _claim(self, folder: str, identity: str) -> Storage | None:
        """Its disk, once the process that had it before has ended; it begins with what is there. None where it cannot.

        After a kill Ray may start the next process while the last one still ends.
        """
        while True:
            try:
                disk = Storage(folder, identity)
                if disk.load() is None:
                    self._problem = f"its disk is empty; if that was lost, remove voter {self._id} and add a new one"
                else:
                    self._begin(disk)
                return disk
            except AlreadyRunning as error:
                self._problem = error.message
                await asyncio.sleep(LOOK_SECONDS)
            except OperatorError as error:  # its disk is another's, damaged or failing
                self._problem = error.message
                log.error("voter %d takes no part: %s", self._id, error.message)
                return None

    def _check(self, claimed: "asyncio.Task[Storage | None]") -> None:
        if not claimed.cancelled() and claimed.exception():  # none that was foreseen
            self._end(claimed)

    async def found(self, members: Members) -> None:
        """Begin on an empty disk: the first voters with all of them, a later one with nobody. Once is enough."""
        disk = await self._disk
        if disk is None:
            raise Unavailable(f"voter {self._id} cannot begin: {self._problem}")
        if self._voter is None:
            found(disk, members)
            self._begin(disk)

    def _begin(self, disk: Storage) -> None:
        self._voter = Voter(self._id, disk, self._catalog, self._peers.send, random.Random(), self._pace)
        self._running = asyncio.get_running_loop().create_task(self._run(self._voter))
        self._running.add_done_callback(self._end)

    async def _run(self, voter: Voter) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(voter.run())
            tasks.create_task(self._keep_time(voter))

    def _end(self, running: "asyncio.Task[Any]") -> None:
        """Whatever ends a voter, a disk that fails or an entry it cannot read, ends its process; Ray starts another."""
        if not running.cancelled():
            log.critical("voter %d ends", self._id, exc_info=running.exception())
            os._exit(1)

    # From the other voters

    async def deliver(self, messages: Sequence[Message]) -> None:
        if self._voter:
            self._peers.hear(message.sender for message in messages)
            self._voter.deliver(messages)

    # From clients

    async def execute(self, commands: Sequence[bytes]) -> list[bytes] | Elsewhere | Doubtful:
        """The catalog's answers to commands that are appended together."""
        voter = self._voter
        if voter is None:
            return Elsewhere()
        try:
            answers = [voter.propose(command) for command in commands]
        except NotLeader as error:
            return Elsewhere(error.leader)
        except ProposalDropped:
            return Doubtful()
        try:
            return list(await asyncio.gather(*answers))
        except (NotLeader, Unanswered):  # of some of them, at least
            return Doubtful()

    async def read(self, queries: Sequence[Query]) -> list[Any] | Elsewhere | Doubtful:
        """As of a moment after this was called (linearizable)."""
        if self._voter is None:
            return Elsewhere()
        try:
            await self._voter.read()
        except NotLeader as error:
            return Elsewhere(error.leader)
        except Unanswered:
            return Doubtful()
        return await self.look(queries)

    async def look(self, queries: Sequence[Query]) -> list[Any] | Elsewhere:
        """As of what this voter has applied, however old that is."""
        if self._voter is None:
            return Elsewhere()
        catalog = self._catalog
        return [catalog.range(one.key) if one.is_prefix else catalog.get(one.key) for one in queries]

    async def events(
        self, prefix: str, from_revision: int, wait_seconds: float
    ) -> tuple[list[Event], int] | Compacted | Elsewhere:
        """Changes from this revision on, and how far that goes; for 0, none and where the catalog is.

        Waits for the first, so long at most.
        """
        if self._voter is None:
            return Elsewhere()
        found: list[Event] = []
        seen = self._catalog.revision if from_revision <= 0 else from_revision - 1
        try:
            async with asyncio.timeout(wait_seconds if from_revision > 0 else 0):
                while not found:
                    await self._voter.wait_applied(partial(self._is_past, seen))
                    found, seen = self._catalog.events_since(prefix, seen + 1), self._catalog.revision
        except Compacted as error:
            return error
        except TimeoutError:
            pass  # nothing came
        return found, seen

    def _is_past(self, revision: int) -> bool:
        return self._catalog.revision > revision

    async def status(self) -> Status | str:
        """Or why it takes no part."""
        return self._voter.status() if self._voter else self._problem

    # For operators

    async def change(self, members: Members) -> str | Elsewhere | Doubtful:
        """Return once these are the members, with ""; or why they may not be."""
        if self._voter is None:
            return Elsewhere()
        try:
            await self._voter.read()  # a leader that was just elected takes no change before it has committed something
            await self._voter.change(members)
        except NotLeader as error:
            return Elsewhere(error.leader)
        except (ProposalDropped, Unanswered):
            return Doubtful()
        except ConfChangeRefused as refused:
            return str(refused)
        return ""

    async def transfer(self, to: NodeId) -> Status | Elsewhere:
        """Begin to hand over; does nothing to who may not lead."""
        leader = self._leading()
        if isinstance(leader, Elsewhere):
            return leader
        leader.transfer(to)
        return leader.status()

    async def snapshot(self) -> Snapshot | Elsewhere:
        """All that is applied, if this one leads; the log up to there is forgotten."""
        leader = self._leading()
        return leader if isinstance(leader, Elsewhere) else await leader.snapshot()

    def _leading(self) -> Voter | Elsewhere:
        """The voter, where it leads."""
        if self._voter is None:
            return Elsewhere()
        status = self._voter.status()
        return self._voter if status.role is Role.LEADER else Elsewhere(status.leader)

    # Time

    async def _keep_time(self, voter: Voter) -> None:
        """A leader tells the catalog how much time has passed, on its own clock, when something waits for that.

        Time between two leaders is not counted, nor that in which this one stood still, nor is any counted twice:
        leases may live longer, never shorter.
        """
        term, elapsed, before = 0, 0.0, time.monotonic()
        while True:
            await asyncio.sleep(CLOCK_SECONDS)
            status, now = voter.status(), time.monotonic()
            elapsed, before = elapsed + min(now - before, LONGEST_TICK_SECONDS), now
            if status.role is not Role.LEADER:
                continue
            if status.term != term:
                term, elapsed = status.term, 0.0
            elapsed_ms = min(int(elapsed * 1000), LONGEST_STEP_MS)
            if self._catalog.awaits_clock(elapsed_ms):
                elapsed -= elapsed_ms / 1000
                with suppress(NotLeader, ProposalDropped, Unanswered):
                    await voter.propose(encode(Clock(elapsed_ms)))


class Peers:
    """The other voters, as one voter knows them: handles held, and looked up by name again where one stays silent."""

    def __init__(self) -> None:
        self._handles: dict[NodeId, ActorHandle[Any]] = {}
        self._heard: dict[NodeId, float] = {}
        self._looking: dict[NodeId, asyncio.Task[None]] = {}

    def hear(self, senders: Iterable[NodeId]) -> None:
        self._heard.update(dict.fromkeys(senders, time.monotonic()))

    def send(self, messages: Sequence[Message]) -> None:
        """To each its own, in order. What cannot be sent is lost."""
        letters: dict[NodeId, list[Message]] = {}
        for message in messages:
            letters.setdefault(message.to, []).append(message)
        for to, letter in letters.items():
            if to in self._handles:
                with suppress(PendingCallsLimitExceeded, RayActorError):
                    self._handles[to].deliver.options(num_returns=0).remote(letter)
            is_silent = time.monotonic() - self._heard.get(to, 0) >= SILENCE_SECONDS
            if (is_silent or to not in self._handles) and to not in self._looking:
                self._looking[to] = begin_in_background(self._look_up(to))

    async def _look_up(self, to: NodeId) -> None:
        """Once in a while."""
        handle = await asyncio.to_thread(find_voter, to)
        if handle is not None:
            self._handles[to] = handle
        await asyncio.sleep(SILENCE_SECONDS if to in self._handles else LOOK_SECONDS)
        del self._looking[to]


# Starting, and finding them


async def start(voters: Mapping[NodeId, Placement], data_dir: str | Path, pace: Pace = PACE) -> None:
    """See to it that the voters live, on their machines, each with a folder of its own under `data_dir`.

    The first time these are founded together. From then on a file beside the folders says who the voters are, where,
    and which disk is whose; `voters` may name other machines for them, but a new one has to be added.
    Raises ConfigError, and Unavailable where a new one, or most of those founded before, do not start: the others do
    when their machines come.
    """
    register = _Register(Path(data_dir))
    seats = register.read() or {id: _Seat(uuid.uuid4().hex) for id in voters}
    if strangers := sorted(set(voters) - set(seats)):
        raise ConfigError(f"{strangers[0]} is no voter: nexus coordinator add {strangers[0]} makes it one")
    labels = {id: dict(placement.labels) for id, placement in voters.items()}
    for id in voters:
        try:
            _maker(id, labels[id])
        except ValueError as error:
            raise ConfigError(f"coordinator.voters: {error}") from None
    seats = {id: replace(seat, labels=labels.get(id, seat.labels)) for id, seat in seats.items()}
    register.write(seats)
    handles = {id: register.make(id, seat, pace) for id, seat in seats.items() if not seat.is_retired}
    are_founded = all(seat.is_founded for seat in seats.values())
    await _are_there(handles, len(handles) // 2 + 1 if are_founded else len(handles))
    if not are_founded:
        members = Members(frozenset(seats))
        await asyncio.gather(*(_in_time(id, handle.found.remote(members)) for id, handle in handles.items()))
        register.write({id: replace(seat, is_founded=True) for id, seat in seats.items()})


async def connect() -> Client:
    """A client of whichever voters there are. Raises Unavailable where there are none."""
    voters = RayVoters()
    await voters.look_up()
    if not voters.ids():
        raise Unavailable("there is no coordinator: is Nexus up?")
    return Client(voters)


class Operator:
    """What whoever runs the cluster may do with its voters."""

    def __init__(self, data_dir: str | Path, pace: Pace = PACE) -> None:
        self._register, self._pace = _Register(Path(data_dir)), pace

    async def describe(self) -> list[Status | Absent]:
        """Of every voter, in order."""
        return await (await connect()).describe()

    async def add(self, id: NodeId, labels: Mapping[str, str]) -> None:
        """A new voter, on a machine with these labels: it learns until it is level, then votes.

        Raises Conflict for a number used before, InvalidRequest, and Unavailable where no machine has the labels; its
        seat is then free again, or the next start would wait for it.
        """
        client, seats = await connect(), self._register.read()
        members = (await client.leader()).members
        if id in members.voters or seats.get(id, _Seat("")).is_retired:
            raise Conflict(f"the number {id} has been used, and none is used twice: take {max(seats) + 1}")
        try:
            _maker(id, labels)
        except ValueError as error:
            raise InvalidRequest(str(error), pointer="/labels") from None
        seat = replace(seats.get(id) or _Seat(uuid.uuid4().hex, is_founded=True), labels=dict(labels))
        self._register.change(id, seat)
        handle = self._register.make(id, seat, self._pace)
        try:
            await _begin(id, handle, is_new=id not in members.learners)
        except (Conflict, Unavailable, asyncio.CancelledError):
            if id not in members.learners:
                ray.kill(handle)
                self._register.change(id, None)
            raise
        await client.change(Members(members.voters, members.learners | {id}))
        await client.level(id)
        await client.change(Members(members.voters | {id}, members.learners - {id}))

    async def remove(self, id: NodeId) -> None:
        """It votes no more and its process ends; its number is not used again. Raises NotFound and Conflict."""
        client, seats = await connect(), self._register.read()
        leader = await client.leader()
        if id in leader.members.everyone:
            if leader.id == id and len(leader.members.voters) > 1:
                await client.transfer(min(leader.members.voters - {id}))
            await client.change(Members(leader.members.voters - {id}, leader.members.learners - {id}))
        elif id not in seats or seats[id].is_retired:  # else it was on its way in, or out, when somebody was cut short
            raise NotFound(f"there is no voter {id}: there are {sorted(leader.members.everyone)}")
        self._register.change(id, replace(seats[id], is_retired=True))
        if handle := await asyncio.to_thread(find_voter, id):
            ray.kill(handle)

    async def transfer(self, to: NodeId) -> None:
        """Return once this voter leads. Raises NotFound, Unavailable."""
        await (await connect()).transfer(to)

    async def snapshot(self) -> Snapshot:
        """All that is applied; `restore` begins anew from it."""
        return await (await connect()).snapshot()


def restore(snapshot: Snapshot, data_dir: str | Path, named: Iterable[NodeId] = ()) -> Path | None:
    """Make a coordinator of one voter that holds this, in the place of what is there: where that was moved to.

    Nobody may use `data_dir` meanwhile. The number of the new voter is one that was never used, and none of those that
    the settings name: they may have been used on disks that are lost. Until all is made, nothing is moved.
    """
    folder = Path(data_dir)
    id, seat = max([*_Register(folder).read(), *named], default=0) + 1, _Seat(uuid.uuid4().hex, is_founded=True)
    draft = _Register(folder.with_name(f"{folder.name}.new"))
    shutil.rmtree(draft.folder, ignore_errors=True)  # of a restore that was cut short
    disk = Storage(draft.folder / f"voter-{id}", seat.identity)
    found(disk, Members(frozenset({id})), snapshot)
    disk.close()
    retired = {one: _Seat("", is_founded=True, is_retired=True) for one in range(1, id)}
    draft.write({**retired, id: seat})
    aside = beside(folder) if folder.exists() else None
    if aside is not None:
        folder.rename(aside)
    draft.folder.rename(folder)
    return aside


def read_alone(data_dir: str | Path) -> Snapshot | None:
    """All that a coordinator of one voter holds, off its disk, while it does not run; None where there is none.

    Raises Conflict for one of several voters: what one of them has on its disk, the others may not have agreed to.
    """
    folder = Path(data_dir)
    seats = {id: seat for id, seat in _Register(folder).read().items() if not seat.is_retired}
    if not seats:
        return None
    id, seat = next(iter(seats.items()))
    disk = Storage(folder / f"voter-{id}", seat.identity) if (folder / f"voter-{id}").is_dir() else None
    try:
        saved = None if disk is None else disk.load()
    finally:
        if disk is not None:
            disk.close()
    if len(seats) > 1 or saved is None:
        raise Conflict("what several voters agreed on is known only while they run: `nexus up` first")
    catalog, last = Catalog(), saved.snapshot
    catalog.restore(last.data)
    for entry in saved.entries:  # the only voter has agreed to all of its log
        if entry.kind is EntryKind.COMMAND:
            catalog.apply(entry.index, entry.data)
        last = replace(last, index=entry.index, term=entry.term)
    return replace(last, members=Members(frozenset()), data=catalog.snapshot())


class RayVoters:
    """The named actors, for a client."""

    def __init__(self) -> None:
        self._handles: dict[NodeId, ActorHandle[Any]] = {}

    def ids(self) -> Sequence[NodeId]:
        return sorted(self._handles)

    async def call(self, id: NodeId, method: str, *arguments: object) -> Any:
        """Raises ConnectionError."""
        if id not in self._handles:
            await self.look_up()
        if id not in self._handles:
            raise ConnectionError(f"voter {id} is not there")
        try:
            return await getattr(self._handles[id], method).remote(*arguments)
        except (RayActorError, PendingCallsLimitExceeded) as error:
            await self.look_up()
            raise ConnectionError(f"voter {id} does not answer") from error

    async def look_up(self) -> None:
        self._handles = await asyncio.to_thread(find_voters) or self._handles  # while Ray's head is away it knows none


def find_voters() -> dict[NodeId, "ActorHandle[Any]"]:
    """By number. Takes a round trip to Ray's head."""
    named = ray.util.list_named_actors(all_namespaces=True)  # whoever asks may be of another
    names = [actor["name"] for actor in named if actor["namespace"] == NAMESPACE and actor["name"].startswith(NAME)]
    found = {int(name.removeprefix(NAME)): find_voter(int(name.removeprefix(NAME))) for name in names}
    return {id: handle for id, handle in found.items() if handle is not None}


def find_voter(id: NodeId) -> "ActorHandle[Any] | None":
    """Its actor, if there is one."""
    with suppress(ValueError):
        return ray.get_actor(f"{NAME}{id}", NAMESPACE)
    return None


async def _are_there(handles: Mapping[NodeId, "ActorHandle[Any]"], needed: int) -> None:
    """Return once so many answer. Raises Unavailable once too few can."""
    asking = {asyncio.create_task(_is_there(id, handle)) for id, handle in handles.items()}
    waiting, answered = asking, 0
    try:
        while answered < needed:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            refusals = [error for one in done if (error := one.exception())]
            answered += len(done) - len(refusals)
            if answered + len(waiting) < needed:
                raise refusals[0]
    finally:
        for one in waiting:
            one.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def _is_there(id: NodeId, handle: "ActorHandle[Any]") -> None:
    await _in_time(id, handle.status.remote())


async def _in_time(id: NodeId, call: Awaitable[object]) -> None:
    try:
        async with asyncio.timeout(START_SECONDS):
            await call
    except (TimeoutError, RayActorError) as error:
        raise Unavailable(f"voter {id} does not start: is there a machine with its labels, and its disk?") from error


async def _begin(id: NodeId, handle: "ActorHandle[Any]", is_new: bool) -> None:
    """Let a voter wait for a leader. One that learns already must not begin anew: the leader knows what it had."""
    await _is_there(id, handle)
    if is_new:
        await _in_time(id, handle.found.remote(Members(frozenset())))
    if not isinstance(status := await handle.status.remote(), Status):
        raise Conflict(f"voter {id} cannot be added: {status}")


@dataclass(frozen=True, slots=True)
class _Seat:
    """A voter's place: its disk, its machine, and whether it was founded, or removed for good."""

    identity: str
    labels: Mapping[str, str] = field(default_factory=dict)
    is_founded: bool = False
    is_retired: bool = False


_SEATS = TypeAdapter(dict[PositiveInt, _Seat])


class _Register:
    """Who has a seat: the one thing that tells a disk that was lost from one that is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[NodeId, _Seat]:
        """Empty before the first were founded. Raises ConfigError."""
        file = self.folder / REGISTER
        try:
            return _SEATS.validate_json(file.read_bytes()) if file.exists() else {}
        except ValidationError:
            raise ConfigError(
                f"{REGISTER} in the coordinator's folder is damaged: put a copy of it back; where there is none, move "
                "the folder away and `nexus coordinator restore` a snapshot"
            ) from None

    def write(self, seats: Mapping[NodeId, _Seat]) -> None:
        """Whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{REGISTER}.new"
        with draft.open("w") as file:
            json.dump({id: asdict(seat) for id, seat in seats.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.folder / REGISTER)

    def change(self, id: NodeId, seat: _Seat | None) -> None:
        """One seat, or free it; the others stay as they are by now."""
        others = {one: held for one, held in self.read().items() if one != id}
        self.write(others if seat is None else {**others, id: seat})

    def make(self, id: NodeId, seat: _Seat, pace: Pace) -> "ActorHandle[Any]":
        """The actor of a voter, which may be there already."""
        return _maker(id, seat.labels).remote(id, str(self.folder / f"voter-{id}"), seat.identity, pace)


def _maker(id: NodeId, labels: Mapping[str, str]) -> Any:
    """Raises ValueError for labels that no machine can have."""
    options = {"label_selector": dict(labels)} if labels else {}
    return ray.remote(Coordinator).options(
        name=f"{NAME}{id}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0,
        max_restarts=-1, max_task_retries=0, max_concurrency=10_000, max_pending_calls=PENDING_CALLS, **options,
    )  # fmt: skip
