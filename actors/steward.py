"""The stewards as named, detached actors, one on each machine that keeps blocks: a process and a disk for each.

They begin when something is shared for the first time, or with Nexus where something was: whoever shares nothing pays
for no process. A voter's process is no place for them: it has its log to write in time, and there are fewer voters than
machines.
"""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, PendingCallsLimitExceeded, RayActorError

from actors import coordinator
from actors.hops import begin
from cluster.channel import LATER, Callers, Gate
from cluster.directory import Directory
from cluster.inventory import LOCAL, NODE_LABEL
from cluster.membership import FrontDoor
from cluster.sharing import Sharing
from cluster.steward import Settings, Steward, open_steward
from nexus.background import begin_in_background, has_failed
from nexus.config import Config
from nexus.errors import AlreadyRunning, OperatorError, TryAgain, Unavailable
from nexus.keyring import FOLDER, Keyring

log = logging.getLogger("nexus.steward")

NAMESPACE = "nexus"
NAME = "nexus-steward-"  # and the machine
START_SECONDS = 60.0
AGAIN_SECONDS = 0.5  # after a disk that is in use yet, or voters that are away
REFUSED_SECONDS = 10.0  # between two looks at what an operator has to put right
PENDING_CALLS = 1_000
LONGEST_SECONDS = 60.0  # of a call
OF_WHOLE_BLOCKS = frozenset({"finish", "take", "open", "settle"})  # which take longer, the longer the block
WHOLE_BLOCK_SECONDS = 900.0
ASKED = OF_WHOLE_BLOCKS | {
    "begin", "append", "lend", "piece", "close", "drop", "describe", "rotate", "scrub", "stay",
    "expel", "rotate_cluster_key", "hand_over", "holds",
}  # fmt: skip


class StewardProcess:
    """One steward. Made, as an actor is, inside a running event loop.

    While its disk or its keys are not as they have to be it takes no part, and its log says why.
    """

    def __init__(self, node: str, home: str, is_first: bool, key: str | None, settings: Settings) -> None:
        """`home` "" is that of the Nexus on this machine."""
        begin("steward")
        self._node, self._steward, self._keyring = node, None, None
        self._gate = Gate(self, self._do)
        path = Path(home or os.environ["NEXUS_HOME"])
        self._life = asyncio.get_running_loop().create_task(self._live(path, is_first, key, settings))
        self._life.add_done_callback(self._end)

    _steward: Steward | None
    _keyring: Keyring | None

    async def _live(self, home: Path, is_first: bool, key: str | None, settings: Settings) -> None:
        """Ray may start the next process while the last one still ends, and before there are voters."""
        wire = RayWire()
        reach = Callers(self, wire)
        while self._steward is None:
            try:
                directory = Directory(await coordinator.connect())
                self._keyring = await asyncio.to_thread(Keyring, home, self._node, key, is_first)
                self._steward = await open_steward(self._keyring, directory, reach, wire, settings)
            except (AlreadyRunning, TryAgain) as error:
                log.warning("the steward of %s waits: %s", self._node, error.message)
                await asyncio.sleep(AGAIN_SECONDS)
            except OperatorError as error:
                log.critical("the steward of %s takes no part: %s", self._node, error.message)
                await asyncio.sleep(REFUSED_SECONDS)
        await self._steward.run()

    def _end(self, life: "asyncio.Task[None]") -> None:
        """What nobody foresaw ends the process; Ray starts another."""
        if has_failed(life) and not life.cancelled():
            log.critical("the steward of %s ends", self._node, exc_info=life.exception())
            os._exit(1)

    async def ask(self, message: bytes) -> bytes:
        """To a message of a channel, whoever sends it."""
        return LATER if self._steward is None else await self._gate.answer(message)

    async def _do(self, caller: str, method: str, arguments: tuple[object, ...]) -> Any:
        """What the steward's method of this name answers a member."""
        if method not in ASKED:
            raise Unavailable(f"a steward is not asked to {method!r}: another version of Nexus runs there")
        return await getattr(self._steward, method)(*arguments)

    async def identity(self) -> Keyring:
        if self._keyring is None:
            raise Unavailable(f"the steward of {self._node} takes no part yet; its log says why")
        return self._keyring

    async def learn(self) -> None:
        if self._steward is not None:
            await self._steward.learn()


class RayWire:
    """The named actors, for whoever sends one a message."""

    def __init__(self) -> None:
        self._handles: dict[str, ActorHandle[Any]] = {}

    async def send(self, node: str, message: bytes, patience: str) -> bytes:
        handle = self._handles.get(node) or await asyncio.to_thread(find_steward, node)
        if handle is None:
            raise ConnectionError(f"there is no steward of {node}")
        self._handles[node] = handle
        try:
            async with asyncio.timeout(_patience(patience)):
                answer: bytes = await handle.ask.remote(message)
        except (RayActorError, ObjectLostError, PendingCallsLimitExceeded, TimeoutError) as error:
            self._handles.pop(node, None)
            raise ConnectionError(f"the steward of {node} does not answer") from error
        return answer


class RayStewards(Callers):
    """The stewards, for a machine's front door, which may start them."""

    def __init__(self, config: Config, directory: Directory, node: str) -> None:
        """`node` is this process's machine."""
        wire = RayWire()
        super().__init__(FrontDoor(partial(_open_front_door, config, node), directory, wire), wire)
        self._config = config

    async def wake(self) -> None:
        handles = await asyncio.to_thread(start, self._config)
        asking = [begin_in_background(self._works(node)) for node in handles]
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise Unavailable("no steward starts; `nexus share status` says how they are") from None
        finally:
            for one in asking:
                one.cancel()

    async def _works(self, node: str) -> None:
        """Return once this steward takes part."""
        while True:
            with suppress(ConnectionError, TryAgain):
                return await self.call(node, "stay")
            await asyncio.sleep(AGAIN_SECONDS)


def _open_front_door(config: Config, node: str) -> Keyring:
    """This machine's keys, for a process beside its steward."""
    is_first = node == (config.ray.head or LOCAL)
    return Keyring(Path(config.home), node, _cluster_key(config), is_first, keeps=False)


def _cluster_key(config: Config) -> str | None:
    return None if config.sharing.key is None else config.sharing.key.get_secret_value()


def _patience(method: str) -> float | None:
    if method == "scrub":
        return None
    return WHOLE_BLOCK_SECONDS if method in OF_WHOLE_BLOCKS else LONGEST_SECONDS


def settings_of(config: Config) -> Settings:
    sharing = config.sharing
    return Settings(sharing.copies, sharing.gone_seconds, sharing.scrub_hours * 3600)


def open_sharing(config: Config) -> "Connected":
    """For whoever shares and reads, over whichever stewards there are; it starts them where there are none."""
    return Connected(config)


class Connected:
    """Called for a Sharing once the voters answer: one for as long as this process lives."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._sharing: asyncio.Task[Sharing] | None = None

    async def __call__(self) -> Sharing:
        """Raises Unavailable."""
        if self._sharing is None or has_failed(self._sharing):
            self._sharing = begin_in_background(self._open())
        return await asyncio.shield(self._sharing)

    async def _open(self) -> Sharing:
        directory = Directory(await coordinator.connect())
        here = ray.get_runtime_context().get_node_labels().get(NODE_LABEL, LOCAL)
        stewards = RayStewards(self._config, directory, here)
        return Sharing(directory, stewards, settings_of(self._config), here)


def has_blocks(config: Config) -> bool:
    """Whether something was shared on this machine."""
    return (Path(config.home) / FOLDER).exists()


def start(config: Config, homes: Mapping[str, str] | None = None) -> dict[str, "ActorHandle[Any]"]:
    """The stewards of all machines, which may be there already; those of machines that are away start when they come.

    `homes` names other homes than those of the Nexus on each machine.
    """
    nodes: Sequence[str] = config.sharing.nodes or tuple(config.nodes) or (LOCAL,)
    head = config.ray.head or LOCAL
    return {
        node: _maker(node, bool(config.nodes)).remote(
            node, (homes or {}).get(node, ""), node == head, _cluster_key(config), settings_of(config)
        )
        for node in nodes
    }  # fmt: skip


def find_steward(node: str) -> "ActorHandle[Any] | None":
    """Its actor, if there is one. Takes a round trip to Ray's head."""
    with suppress(ValueError):
        return ray.get_actor(f"{NAME}{node}", NAMESPACE)
    return None


def _maker(node: str, is_pinned: bool) -> Any:
    options = {"label_selector": {NODE_LABEL: node}} if is_pinned else {}
    return ray.remote(StewardProcess).options(
        name=f"{NAME}{node}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0,
        max_restarts=-1, max_task_retries=0, max_concurrency=1_000, max_pending_calls=PENDING_CALLS, **options,
    )  # fmt: skip
