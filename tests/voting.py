"""A whole coordinator in one event loop: voters, disks and catalogs are real, time, network and power are played.

The loop's clock stands still while anything can be done, and then jumps to the next moment at which something can: no
test waits, and all that happens follows from one seed. A voter lives in a `Process`: every task it begins is known to
it, and may be stopped for a while or for ever. Its disk is a real folder; `Power` knows what of it was made durable.
"""

import asyncio
import errno
import os
import random
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from selectors import DefaultSelector
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from actors import coordinator
from actors.coordinator import Coordinator
from cluster.catalog import Catalog
from cluster.client import Client
from cluster.raft import Members, Message, NodeId, Role
from cluster.raft.storage import StorageFailed
from cluster.voter import Pace
from nexus.errors import OperatorError

PACE = Pace(tick_seconds=0.05, election_ticks=10, snapshot_entries=40)
EVENTS_KEPT = 300
CLIENTS: NodeId = 0  # where all clients are, as far as links are concerned

# Time


class _Jump(DefaultSelector):
    """Waits for nothing: the clock jumps instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits, and nothing will ever happen")
        self.now += timeout
        return super().select(0)


class World(asyncio.SelectorEventLoop):
    """A loop with a clock and a chance of its own. Threads are played: their work takes time, and is done in order."""

    def __init__(self, seed: int) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        self.random = random.Random(seed)
        self.longest_work = 0.004  # seconds
        self.complaints: list[str] = []
        self._busy_until: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self.set_task_factory(_make_task)
        self.set_exception_handler(self._complain)

    def _complain(self, _: asyncio.AbstractEventLoop, about: dict[str, Any]) -> None:
        error = about.get("exception")
        if isinstance(error, Exited):
            return
        self.complaints.append(about["message"] + "".join(traceback.format_exception(error) if error else ()))

    def time(self) -> float:
        return self._jump.now

    def run_in_executor(self, executor: Any, work: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
        """It happens at some moment from now on, and is told at a later one."""
        told = self.create_future()
        begin = max(self.time(), self._busy_until.get(executor, 0.0))
        happens = begin + self.random.uniform(0, self.longest_work)
        returns = self._busy_until[executor] = happens + self.random.uniform(0, self.longest_work)

        def happen() -> None:
            if told.cancelled():
                return
            try:
                result, error = work(*arguments), None
            except (OSError, OperatorError) as caught:
                result, error = None, caught
            self.call_at(returns, tell, result, error)

        def tell(result: Any, error: Exception | None) -> None:
            if not told.done():
                told.set_exception(error) if error else told.set_result(result)

        self.call_at(happens, happen)
        return told


def run(main: Callable[[], Coroutine[Any, Any, None]], seed: int = 0) -> None:
    """Run a test in a world of its own, and fail when anything was raised that nobody looked at."""
    print(f"seed {seed}")
    world = World(seed)
    with asyncio.Runner(loop_factory=lambda: world) as runner:
        runner.run(main())
    assert not world.complaints, "\n".join(world.complaints)


def world() -> World:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, World)
    return loop


async def until(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    """Let time pass until it holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


# Processes


class Process:
    """One life of a voter."""

    def __init__(self, id: NodeId) -> None:
        self.id = id
        self.is_alive = True
        self.coordinator: Coordinator | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.death: asyncio.Future[None] = world().create_future()
        self.pause: asyncio.Future[None] | None = None
        self._context = copy_context()
        self._context.run(_LIFE.set, self)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return world().create_task(work, context=self._context.copy())

    async def answer(self, method: str, *arguments: object) -> Any:
        """Raises ConnectionError where it dies before it answers. Who asks no longer does not hinder it."""
        if not self.is_alive:
            raise ConnectionError(f"voter {self.id} is dead")
        task = self.spawn(getattr(self.coordinator, method)(*arguments))
        await asyncio.wait((task, self.death), return_when=asyncio.FIRST_COMPLETED)
        if not self.is_alive:
            raise ConnectionError(f"voter {self.id} has died")
        return task.result()

    def suspend(self) -> None:
        self.pause = self.pause or world().create_future()

    def resume(self) -> None:
        pause, self.pause = self.pause, None
        if pause:
            pause.set_result(None)

    def die(self) -> None:
        """From now on nothing that it does has any effect."""
        if self.is_alive:
            self.is_alive = False
            self.death.set_result(None)

    async def bury(self) -> None:
        self.die()
        self.resume()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def exit(self, _: int) -> None:
        """In place of os._exit."""
        self.die()
        raise Exited


class Exited(Exception):
    pass


_LIFE: ContextVar[Process | None] = ContextVar("life", default=None)


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, context: Any = None) -> "asyncio.Task[Any]":
    life = context[_LIFE] if context and _LIFE in context else _LIFE.get()
    if life is None:
        return asyncio.Task(work, loop=loop, context=context)
    task = asyncio.Task(_live(work, life), loop=loop, context=context)
    life.tasks.add(task)
    task.add_done_callback(life.tasks.discard)
    return task


async def _live(work: Coroutine[Any, Any, Any], life: Process) -> Any:
    return await _Steps(work, life)


@dataclass
class _Steps:
    """A coroutine, step by step; none is taken while its process is suspended."""

    work: Coroutine[Any, Any, Any]
    life: Process

    def __await__(self) -> Generator[Any, Any, Any]:
        error: BaseException | None = None
        while True:
            while self.life.pause:
                try:
                    yield from asyncio.shield(self.life.pause).__await__()
                except asyncio.CancelledError as cancelled:
                    error = cancelled
            try:
                waits_for = self.work.throw(error) if error else self.work.send(None)
            except StopIteration as end:
                return end.value
            try:
                error = None
                yield waits_for
            except BaseException as thrown:
                if isinstance(thrown, GeneratorExit):
                    self.work.close()
                    raise
                error = thrown


# Power


@dataclass
class _File:
    """What is on the disk for certain, and what was written since, in order."""

    durable: bytearray
    written: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for offset, content in self.written:
            _lay(self.durable, offset, content)
        self.written.clear()

    def after_cut(self, chance: random.Random) -> bytes:
        """Each write since the last fsync is there or not, in no order; one of them may be there in part."""
        content = bytearray(self.durable)
        torn = chance.randrange(len(self.written)) if self.written else -1
        for place, (offset, written) in enumerate(self.written):
            if place == torn:
                _lay(content, offset, written[: chance.randint(0, len(written))])
            elif chance.random() < 0.5:
                _lay(content, offset, written)
        return bytes(content)


def _lay(content: bytearray, offset: int, piece: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(piece)] = piece


class Power:
    """All disks lose it at once. It can be made to fail in the middle of a write, an fsync or a renaming."""

    def __init__(self, patch: pytest.MonkeyPatch, chance: random.Random) -> None:
        self._chance = chance
        self._files: dict[int, _File] = {}  # by inode
        self._displaced: dict[Path, _File] = {}  # by folder: what a renaming replaced that is not durable yet
        self._fuse: int | None = None
        self.is_out = False
        self.fails: Callable[[], None] = lambda: None
        self.syncs = 0
        self._real = SimpleNamespace(pwrite=os.pwrite, replace=os.replace)
        for name in ("pwrite", "replace"):
            patch.setattr(os, name, getattr(self, f"_{name}"))
        patch.setattr(os, "fdatasync", self._sync)
        patch.setattr(os, "fsync", self._sync)

    def burn(self, operations: int) -> None:
        """After so many more, of any disk, it fails."""
        self._fuse = operations

    def cut(self, folders: Iterable[Path]) -> None:
        """What these hold afterwards, when it is back."""
        for folder in folders:
            log = folder / "log"
            file = self._files.get(log.stat().st_ino)
            if folder in self._displaced and self._chance.random() < 0.5:
                file = self._displaced[folder]
            if file is None:
                continue
            content = file.after_cut(self._chance)
            (folder / "log.new").unlink(missing_ok=True)
            log.unlink()
            log.write_bytes(content)
        self._files.clear()
        self._displaced.clear()
        self._fuse, self.is_out = None, False

    def _touch(self) -> None:
        if self._fuse is not None:
            self._fuse -= 1
            if self._fuse < 0 and not self.is_out:
                self.is_out = True
                self.fails()
        if self.is_out:
            raise OSError(errno.EIO, "the power is out")

    def _file(self, descriptor: int) -> _File:
        inode = os.fstat(descriptor).st_ino
        if inode not in self._files:
            self._files[inode] = _File(bytearray(os.pread(descriptor, os.fstat(descriptor).st_size, 0)))
        return self._files[inode]

    def _pwrite(self, descriptor: int, content: bytes, offset: int) -> int:
        file = self._file(descriptor)
        if not self.is_out:
            file.written.append((offset, bytes(content)))
        self._touch()
        return self._real.pwrite(descriptor, content, offset)

    def _sync(self, descriptor: int) -> None:
        self._touch()
        self.syncs += 1
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            self._displaced.pop(Path(os.readlink(f"/proc/self/fd/{descriptor}")), None)
        else:
            self._file(descriptor).sync()

    def _replace(self, source: Path, target: Path) -> None:
        self._touch()
        if target.exists():
            known = self._files.pop(target.stat().st_ino, None)
            self._displaced[target.parent] = known or _File(bytearray(target.read_bytes()))
        self._real.replace(source, target)


# The network


@dataclass
class Weather:
    """Of every link. A call of a client is never repeated by it, a message of a voter may be."""

    loss: float = 0.0
    duplication: float = 0.0
    longest_delay: float = 0.002


class Network:
    """Messages between voters, and calls of clients."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.weather = Weather()
        self.cuts: set[tuple[NodeId, NodeId]] = set()  # from, to
        self.processes: dict[NodeId, Process] = {}
        self.calls: list[tuple[NodeId, str, tuple[Any, ...]]] = []
        self.loses_answer: Callable[[NodeId, str], bool] = lambda id, method: False

    def isolate(self, id: NodeId, others: Iterable[NodeId]) -> None:
        self.cuts |= {pair for other in others if other != id for pair in ((id, other), (other, id))}

    def heal(self) -> None:
        self.cuts.clear()

    def send(self, sender: Process, messages: Sequence[Message]) -> None:
        letters: dict[NodeId, list[Message]] = {}
        for message in messages:
            letters.setdefault(message.to, []).append(message)
        for to, letter in letters.items():
            if not sender.is_alive or (sender.id, to) in self.cuts or self._chance.random() < self.weather.loss:
                continue
            for _ in range(1 + (self._chance.random() < self.weather.duplication)):
                world().call_later(self._delay(), self._deliver, to, letter)

    def _deliver(self, to: NodeId, letter: list[Message]) -> None:
        process = self.processes.get(to)
        if process and process.is_alive and process.coordinator:
            process.spawn(process.coordinator.deliver(letter))

    def _delay(self) -> float:
        return self._chance.uniform(0, self.weather.longest_delay)

    async def travel(self, start: NodeId, end: NodeId) -> None:
        """A client's question or its answer. Some are known to be lost, of others nobody ever hears."""
        await asyncio.sleep(self._delay())
        if (start, end) in self.cuts or self._chance.random() < self.weather.loss / 2:
            await world().create_future()
        if self._chance.random() < self.weather.loss / 2:
            raise ConnectionError("lost")


@dataclass
class Wire:
    """What a client has of the voters."""

    network: Network
    known: tuple[NodeId, ...]

    def ids(self) -> Sequence[NodeId]:
        return self.known

    async def call(self, id: NodeId, method: str, *arguments: object) -> Any:
        network = self.network
        network.calls.append((id, method, arguments))
        await network.travel(CLIENTS, id)
        if id not in network.processes:
            raise ConnectionError(f"voter {id} is not there")
        answer = await network.processes[id].answer(method, *arguments)
        if network.loses_answer(id, method):
            raise ConnectionError("the answer was lost")
        await network.travel(id, CLIENTS)
        return answer


class _Post:
    """In place of `actors.coordinator.Peers`."""

    def __init__(self, network: Network) -> None:
        life = _LIFE.get()
        assert life
        self._network, self._life = network, life

    def hear(self, senders: Iterable[NodeId]) -> None:
        list(senders)

    def send(self, messages: Sequence[Message]) -> None:
        self._network.send(self._life, messages)


# All together


class Ledger:
    """What any voter ever applied or wrote down at an index: the same everywhere, or the test fails."""

    def __init__(self) -> None:
        self.applied: dict[int, tuple[bytes, bytes]] = {}
        self.snapshots: dict[int, bytes] = {}
        self.disagreements: list[str] = []

    def catalog(self) -> Catalog:
        ledger = self

        class Audited(Catalog):
            def apply(self, index: int, command: bytes) -> bytes:
                answer = super().apply(index, command)
                if ledger.applied.setdefault(index, (command, answer)) != (command, answer):
                    ledger.disagreements.append(f"entry {index} was applied in two ways")
                return answer

            def snapshot(self) -> bytes:
                written = super().snapshot()
                if ledger.snapshots.setdefault(self.applied, written) != written:
                    ledger.disagreements.append(f"there are two catalogs at entry {self.applied}")
                return written

        return Audited(EVENTS_KEPT)


class Cluster:
    """Voters that can be killed, suspended, cut off and left without power."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, size: int, pace: Pace) -> None:
        self.folder, self.pace = folder, pace
        self.ids = tuple(range(1, size + 1))
        chance = world().random
        self.network = Network(chance)
        self.ledger = Ledger()
        self.power = Power(patch, chance)
        self.power.fails = self._go_out
        self.out = asyncio.Event()
        patch.setattr(coordinator, "Peers", lambda: _Post(self.network))
        patch.setattr(coordinator, "Catalog", self.ledger.catalog)
        patch.setattr(coordinator, "random", SimpleNamespace(Random=lambda: random.Random(chance.random())))
        patch.setattr(coordinator, "time", SimpleNamespace(monotonic=world().time))
        patch.setattr(coordinator, "os", SimpleNamespace(_exit=lambda code: _LIFE.get().exit(code)))

    @property
    def processes(self) -> dict[NodeId, Process]:
        return self.network.processes

    def client(self, patience_seconds: float = 15.0, **options: Any) -> Client:
        return Client(Wire(self.network, self.ids), patience_seconds, **options)

    async def start(self, id: NodeId) -> None:
        """From its folder; with all of them where that is empty."""
        process = self.processes[id] = Process(id)
        await process.spawn(self._begin(process))

    async def _begin(self, process: Process) -> None:
        folder = str(self.folder / f"voter-{process.id}")
        process.coordinator = Coordinator(process.id, folder, f"disk-{process.id}", self.pace)
        await process.coordinator.found(Members(frozenset(self.ids)))

    async def kill(self, id: NodeId) -> None:
        """The process alone: what it wrote, it wrote."""
        process = self.processes.pop(id)
        await process.bury()
        process.coordinator._disk.result().close()

    async def lose_power(self) -> None:
        """All at once, wherever they are; they are back when this returns."""
        self._go_out()
        for process in self.processes.values():
            await process.bury()
            with suppress(StorageFailed):  # there is no power
                process.coordinator._disk.result().close()
        self.power.cut(self.folder / f"voter-{id}" for id in self.ids)
        for id in self.ids:
            await self.start(id)
        self.out.clear()

    def _go_out(self) -> None:
        self.power.is_out = True
        for process in self.processes.values():
            process.die()
        self.out.set()

    def voter(self, id: NodeId) -> Any:
        return self.processes[id].coordinator._voter

    def catalog(self, id: NodeId) -> Catalog:
        return self.processes[id].coordinator._catalog

    def leader(self) -> NodeId:
        """Of those that live, the one of the latest term; 0 for none."""
        found = [self.voter(id).status() for id, process in self.processes.items() if process.is_alive]
        return max(((one.term, one.id) for one in found if one.role is Role.LEADER), default=(0, 0))[1]

    async def level(self) -> None:
        """Return when all live, one leads, and all have applied all there is."""

        def is_level() -> bool:
            found = [self.voter(id).status() for id in self.ids]
            return bool(self.leader()) and len({(one.applied, one.last_index, one.term) for one in found}) == 1

        await until(is_level)
        written = {self.catalog(id).snapshot() for id in self.ids}
        assert len(written) == 1
        assert not self.ledger.disagreements


@asynccontextmanager
async def cluster(folder: Path, size: int = 3, pace: Pace = PACE) -> AsyncIterator[Cluster]:
    """One that has a leader; ended with all that it began."""
    with pytest.MonkeyPatch.context() as patch:
        whole = Cluster(folder, patch, size, pace)
        for id in whole.ids:
            await whole.start(id)
        await until(whole.leader)
        try:
            yield whole
        finally:
            for process in list(whole.processes.values()):
                await process.bury()
        assert not whole.ledger.disagreements
