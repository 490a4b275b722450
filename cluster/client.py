"""Whoever asks the voters: finds the leader, asks it all that waits in one call, and again until there is an answer.

A session of the catalog makes a command that was sent again take effect once. What is asked while a call is under
way waits for the next one, so that many who share a client cost hardly more than one.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast

from cluster.catalog import (
    ANSWERS_KEPT,
    Command,
    Compacted,
    CompareAndSet,
    Delete,
    Event,
    Grant,
    KeepAlive,
    OpenSession,
    Put,
    Refused,
    Revoke,
    SessionExpired,
    decode_response,
    encode,
)
from cluster.raft import NOBODY, Members, NodeId, Role, Snapshot, Status
from nexus.background import begin_in_background, has_failed
from nexus.errors import Conflict, NexusError, NotFound, Unavailable

Asked = TypeVar("Asked")
Value = TypeVar("Value")

ASKED_AT_ONCE = 256  # in one call
CALLS_AT_ONCE = 2
PATIENCE_SECONDS = 15.0
ATTEMPT_SECONDS = 2.0
DOUBT_SECONDS = 0.1  # without an answer, before others are asked who leads
PAUSE_SECONDS = 0.02
WATCH_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """This voter cannot do it; that one leads, or NOBODY is known to."""

    leader: NodeId = NOBODY


@dataclass(frozen=True, slots=True)
class Doubtful:
    """What was asked may have happened, or may yet."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A voter that takes no part at present, and why."""

    id: NodeId
    why: str


@dataclass(frozen=True, slots=True)
class Query:
    """One key, or all that start with a prefix."""

    key: str
    is_prefix: bool = False


class Voters(Protocol):
    """Where the voters are. A call that cannot be made, or is not answered, raises ConnectionError.

    What may be called is what `actors.coordinator.Coordinator` has: execute, read, events, status.
    """

    def ids(self) -> Sequence[NodeId]: ...
    async def call(self, id: NodeId, method: str, *arguments: object) -> Any: ...


class Client:
    """Any number of tasks of one event loop may share it. Who gets no answer for `patience_seconds`: Unavailable."""

    def __init__(self, voters: Voters, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._voters, self._patience = voters, patience_seconds
        self._leader = NOBODY
        self._turns = itertools.count()
        self._session: asyncio.Task[int] | None = None
        self._last_sequence = 0
        self._unanswered: dict[int, None] = {}  # sequences, in order
        self._is_answered = asyncio.Event()
        self._writes: _Batches[Command, int | None] = _Batches(self._execute)
        self._reads: _Batches[Query, Any] = _Batches(self._read)

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """The key's new revision. Raises LeaseGone."""
        return cast(int, await self._writes.ask(Put(key, value, lease)))

    async def compare_and_set(self, key: str, expected_revision: int, value: bytes, lease: int = 0) -> int | None:
        """Put where the key has this revision, 0 for no such key: its new one. None when it was lost to another."""
        return await self._writes.ask(CompareAndSet(key, expected_revision, value, lease))

    async def delete(self, key: str) -> bool:
        """Whether it was there."""
        return bool(await self._writes.ask(Delete(key)))

    async def get(self, key: str, fresh: bool = True) -> tuple[bytes, int] | None:
        """Value and revision, no older than this call; unless `fresh`, what any voter has, quorum or not."""
        return cast(tuple[bytes, int] | None, await self._look(Query(key), fresh))

    async def range(self, prefix: str, fresh: bool = True) -> list[tuple[str, bytes, int]]:
        """Key, value and revision of all that start so, in order."""
        return cast(list[tuple[str, bytes, int]], await self._look(Query(prefix, is_prefix=True), fresh))

    async def watch(self, prefix: str, from_revision: int = 0) -> AsyncIterator[Event]:
        """Every change of such keys, in order and without a gap, from this revision on, or from now on for 0.

        Go on after a break from the revision after the last one seen. Raises Compacted when that is too old.
        """

        async def attempt(id: NodeId) -> object:
            return await self._voters.call(id, "events", prefix, from_revision, WATCH_SECONDS)

        while True:
            seen = await self._insist(attempt, 2 * WATCH_SECONDS)
            if isinstance(seen, Compacted):
                raise seen
            events, revision = seen
            for event in events:
                yield event
            if not events:
                self._leader = NOBODY  # it may be cut off, and hear of nothing: whoever is next says who leads
            from_revision = max(from_revision, revision + 1)

    async def grant(self, ttl_seconds: float) -> int:
        """A lease that ends, with its keys, unless it is kept alive; it lives that long at least."""
        return cast(int, await self._writes.ask(Grant(max(1, round(ttl_seconds * 1000)))))

    async def keep_alive(self, lease: int) -> None:
        """Its time begins anew. Raises LeaseGone."""
        await self._writes.ask(KeepAlive(lease))

    async def revoke(self, lease: int) -> bool:
        """End it now: whether it was there still."""
        return bool(await self._writes.ask(Revoke(lease)))

    async def status(self) -> list[Status]:
        """Of the voters that answer."""
        return [status for status in await self.describe() if isinstance(status, Status)]

    async def describe(self) -> list[Status | Absent]:
        """Of every voter, in order."""
        return await self._describe(self._voters.ids(), ATTEMPT_SECONDS)

    async def _describe(self, ids: Sequence[NodeId], seconds: float) -> list[Status | Absent]:
        async def ask(id: NodeId) -> Status | Absent:
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(seconds):
                    status: Status | str = await self._voters.call(id, "status")
                    return Absent(id, status) if isinstance(status, str) else status
            return Absent(id, "it does not answer")

        return list(await asyncio.gather(*map(ask, ids)))

    # For operators

    async def leader(self) -> Status:
        """Of the voter that leads now. Raises Unavailable."""
        status: Status = await self._insist(self._ask_leader)
        return status

    async def change(self, members: Members) -> None:
        """Return once these are the members. Raises Conflict, where they may not be."""
        if reason := await self._insist(lambda id: self._voters.call(id, "change", members), self._patience):
            raise Conflict(f"the coordinator refuses: {reason}")

    async def transfer(self, to: NodeId) -> None:
        """Return once this voter leads. Raises NotFound, and Unavailable where it does not come to that."""
        if to not in (await self.leader()).members.voters:
            raise NotFound(f"there is no voter {to}")

        async def attempt(id: NodeId) -> object:
            status = await self._voters.call(id, "transfer", to)
            return Doubtful() if isinstance(status, Status) and id != to else status

        await self._insist(attempt)

    async def level(self, learner: NodeId) -> None:
        """Return once this one has all that was committed when it was asked. Raises Unavailable."""
        goal = (await self.leader()).commit

        async def attempt(id: NodeId) -> object:
            status = await self._ask_leader(id)
            if isinstance(status, Status) and (learner not in status.progress or status.progress[learner].match < goal):
                return Doubtful()
            return status

        await self._insist(attempt)

    async def snapshot(self) -> Snapshot:
        """All there is, as the voter that leads has it."""
        snapshot: Snapshot = await self._insist(lambda id: self._voters.call(id, "snapshot"), self._patience)
        return snapshot

    async def _ask_leader(self, id: NodeId) -> Status | Elsewhere:
        status = await self._voters.call(id, "status")
        if isinstance(status, str):
            return Elsewhere()
        return status if status.role is Role.LEADER else Elsewhere(status.leader)

    # How it is asked

    async def _execute(self, commands: Sequence[Command]) -> list[int | NexusError | Refused | None]:
        session, tries = await self._open_session(), 0
        sequences = await self._take_sequences(len(commands))
        lowest = next(iter(self._unanswered))
        entries = [
            encode(command, session, number, lowest) for command, number in zip(commands, sequences, strict=True)
        ]

        async def attempt(id: NodeId) -> object:
            nonlocal tries
            tries += 1
            answer = await self._voters.call(id, "execute", entries)
            tries -= isinstance(answer, Elsewhere)  # which took nothing
            return answer

        try:
            answers = [_decoded(answer) for answer in await self._insist(attempt)]
        finally:
            for number in sequences:
                del self._unanswered[number]
            self._is_answered.set()
        if any(isinstance(answer, SessionExpired) for answer in answers):
            self._session = None
            if tries == 1:  # none of them was executed
                return await self._execute(commands)
            answers = [_expired() if isinstance(answer, SessionExpired) else answer for answer in answers]
        return answers

    async def _take_sequences(self, number: int) -> Sequence[int]:
        """The next ones; not so far ahead of a call that is stuck that the catalog would forget it."""
        while self._unanswered and self._last_sequence + number - next(iter(self._unanswered)) >= ANSWERS_KEPT:
            self._is_answered.clear()
            await self._is_answered.wait()
        sequences = range(self._last_sequence + 1, self._last_sequence + number + 1)
        self._last_sequence += number
        self._unanswered.update(dict.fromkeys(sequences))
        return sequences

    async def _open_session(self) -> int:
        if self._session is None or has_failed(self._session):
            self._session = begin_in_background(self._new_session())
        return await asyncio.shield(self._session)

    async def _new_session(self) -> int:
        (answer,) = await self._insist(lambda id: self._voters.call(id, "execute", [encode(OpenSession())]))
        return cast(int, decode_response(answer))

    async def _look(self, query: Query, fresh: bool) -> Any:
        if fresh:
            return await self._reads.ask(query)
        return (await self._insist(lambda id: self._voters.call(id, "look", [query])))[0]

    async def _read(self, queries: Sequence[Query]) -> list[Any]:
        found: list[Any] = await self._insist(lambda id: self._voters.call(id, "read", list(queries)))
        return found

    async def _insist(
        self, attempt: Callable[[NodeId], Awaitable[Any]], attempt_seconds: float = ATTEMPT_SECONDS
    ) -> Any:
        """Ask the leader, or else one after another, until one answers. Raises Unavailable."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + max(self._patience, attempt_seconds)
        while True:
            id = self._leader or self._any_voter()
            answer = await self._answer(id, attempt(id), attempt_seconds)
            if not isinstance(answer, Elsewhere | Doubtful):
                self._leader = self._leader or id
                return answer
            leader = answer.leader if isinstance(answer, Elsewhere) else NOBODY
            self._leader = NOBODY if leader == id else leader
            if loop.time() >= give_up_at:
                raise Unavailable(f"the coordinator does not answer: {summary(await self.describe())}")
            if not self._leader:
                await asyncio.sleep(PAUSE_SECONDS)

    async def _answer(self, id: NodeId, attempt: Awaitable[Any], seconds: float) -> Any:
        """What this voter answers in that time. While it is slow to, the others are asked whether it leads still."""
        call, loop = asyncio.ensure_future(attempt), asyncio.get_running_loop()
        ends = loop.time() + seconds
        doubt = DOUBT_SECONDS if seconds <= ATTEMPT_SECONDS else seconds
        try:
            while not (await asyncio.wait({call}, timeout=min(doubt, ends - loop.time())))[0]:
                leader = await self._leader_of_others(id)
                if leader not in (NOBODY, id) or loop.time() >= ends:
                    return Elsewhere(leader)
            return call.result()
        except ConnectionError:
            return Elsewhere()
        finally:
            call.cancel()

    async def _leader_of_others(self, id: NodeId) -> NodeId:
        """Whom they follow, those of the latest term."""
        others = [one for one in self._voters.ids() if one != id]  # it may be dead, and is not waited for
        heard = [one for one in await self._describe(others, DOUBT_SECONDS) if isinstance(one, Status)]
        return max(heard, key=lambda one: one.term).leader if heard else NOBODY

    def _any_voter(self) -> NodeId:
        ids = self._voters.ids()
        if not ids:
            raise Unavailable("there is no coordinator: is Nexus up?")
        return ids[next(self._turns) % len(ids)]


def summary(voters: Sequence[Status | Absent]) -> str:
    """What they can do together, in a few words."""
    present = [one for one in voters if isinstance(one, Status)]
    leaders = [one for one in present if one.role is Role.LEADER]
    counted = f"{len(present)} of {len(voters)} voters"
    if not present:
        return f"away: {counted}"
    return f"voter {max(leaders, key=lambda one: one.term).id} leads {counted}" if leaders else f"read-only: {counted}"


def _decoded(answer: bytes) -> int | NexusError | Refused | None:
    try:
        return decode_response(answer)
    except Refused as refusal:
        return refusal


def _expired() -> NexusError:
    return Unavailable("the coordinator was away for so long that it forgot this client: look whether it was done")


class _Batches(Generic[Asked, Value]):
    """What is asked, gathered: while as many calls are under way as may be, the rest waits for the next one."""

    def __init__(self, send: Callable[[Sequence[Asked]], Awaitable[Sequence[Value | Exception]]]) -> None:
        self._send = send
        self._waiting: deque[tuple[Asked, asyncio.Future[Value]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, asked: Asked) -> Value:
        future: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        self._call()
        return await future

    def _call(self) -> None:
        if self._waiting and len(self._calls) < CALLS_AT_ONCE:
            batch: list[tuple[Asked, asyncio.Future[Value]]] = []
            task = begin_in_background(self._run(batch))
            self._calls.add(task)
            task.add_done_callback(partial(self._ended, batch))

    async def _run(self, batch: list[tuple[Asked, asyncio.Future[Value]]]) -> None:
        some = [self._waiting.popleft() for _ in range(min(len(self._waiting), ASKED_AT_ONCE))]
        batch += [(asked, future) for asked, future in some if not future.cancelled()]
        if not batch:
            return
        for (_, future), value in zip(batch, await self._send([asked for asked, _ in batch]), strict=True):
            if future.cancelled():
                continue
            if isinstance(value, Exception):
                future.set_exception(value)
            else:
                future.set_result(value)

    def _ended(self, batch: Sequence[tuple[Asked, asyncio.Future[Value]]], task: "asyncio.Task[None]") -> None:
        """Whatever ended it, a fault too, those who wait are told: who is cancelled instead, ends without a word."""
        self._calls.discard(task)
        error = None if task.cancelled() else task.exception()
        for _, future in batch:
            if error and not future.done():
                future.set_exception(error)
            future.cancel()
        self._call()
