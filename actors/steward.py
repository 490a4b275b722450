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
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, PendingCallsLimitExceeded, RayActorError

from actors import coordinator
from cluster.directory import Directory
from cluster.inventory import LOCAL, NODE_LABEL
from cluster.sharing import Sharing
from cluster.steward import Settings, Steward, open_steward
from nexus.background import begin_in_background, has_failed
from nexus.config import Config
from nexus.errors import AlreadyRunning, NexusError, OperatorError, TryAgain, Unavailable
from nexus.keyring import FOLDER

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
}  # fmt: skip


class StewardProcess:
    """One steward. Made, as an actor is, inside a running event loop.

    While its disk or its keys are not as they have to be it takes no part, and its log says why.
    """

    def __init__(self, node: str, home: str, is_first: bool, key: str | None, settings: Settings) -> None:
        """`home` "" is that of the Nexus on this machine."""
        self._node, self._steward = node, None
        path = Path(home or os.environ["NEXUS_HOME"])
        self._life = asyncio.get_running_loop().create_task(self._live(path, is_first, key, settings))
        self._life.add_done_callback(self._end)

    _steward: Steward | None

    async def _live(self, home: Path, is_first: bool, key: str | None, settings: Settings) -> None:
        """Ray may start the next process while the last one still ends, and before there are voters."""
        reach = RayStewards()
        while self._steward is None:
            try:
                directory = Directory(await coordinator.connect())
                self._steward = await open_steward(home, self._node, key, is_first, directory, reach, settings)
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

    async def ask(self, method: str, *arguments: object) -> Any:
        """What the steward's method of this name answers, or the NexusError that it raises."""
        if method not in ASKED:
            return Unavailable(f"a steward is not asked to {method!r}: another version of Nexus runs there")
        if self._steward is None:
            return Unavailable(f"the steward of {self._node} takes no part yet; its log says why")
        try:
            return await getattr(self._steward, method)(*arguments)
        except NexusError as error:
            return error


class RayStewards:
    """The named actors, for whoever asks one; `config` is for those who may start them."""

    def __init__(self, config: Config | None = None) -> None:
        self._config = config
        self._handles: dict[str, ActorHandle[Any]] = {}

    async def call(self, node: str, method: str, *arguments: object) -> Any:
        handle = self._handles.get(node) or await asyncio.to_thread(find_steward, node)
        if handle is None:
            raise ConnectionError(f"there is no steward of {node}")
        self._handles[node] = handle
        try:
            async with asyncio.timeout(_patience(method)):
                answer = await handle.ask.remote(method, *arguments)
        except (RayActorError, ObjectLostError, PendingCallsLimitExceeded, TimeoutError) as error:
            self._handles.pop(node, None)
            raise ConnectionError(f"the steward of {node} does not answer") from error
        if isinstance(answer, NexusError):
            raise answer
        return answer

    async def wake(self) -> None:
        assert self._config is not None
        handles = await asyncio.to_thread(start, self._config)
        asking = [begin_in_background(_works(handle)) for handle in handles.values()]
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise Unavailable("no steward starts; `nexus share status` says how they are") from None
        finally:
            for one in asking:
                one.cancel()


def _patience(method: str) -> float | None:
    if method == "scrub":
        return None
    return WHOLE_BLOCK_SECONDS if method in OF_WHOLE_BLOCKS else LONGEST_SECONDS


async def _works(handle: "ActorHandle[Any]") -> None:
    """Return once this steward takes part."""
    while True:
        with suppress(RayActorError):
            if not isinstance(await handle.ask.remote("stay"), NexusError):
                return
        await asyncio.sleep(AGAIN_SECONDS)


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
        return Sharing(directory, RayStewards(self._config), settings_of(self._config), here)


def has_blocks(config: Config) -> bool:
    """Whether something was shared on this machine."""
    return (Path(config.home) / FOLDER).exists()


def start(config: Config, homes: Mapping[str, str] | None = None) -> dict[str, "ActorHandle[Any]"]:
    """The stewards of all machines, which may be there already; those of machines that are away start when they come.

    `homes` names other homes than those of the Nexus on each machine.
    """
    nodes: Sequence[str] = config.sharing.nodes or tuple(config.nodes) or (LOCAL,)
    head = config.ray.head or LOCAL
    key = None if config.sharing.key is None else config.sharing.key.get_secret_value()
    return {
        node: _maker(node, bool(config.nodes)).remote(
            node, (homes or {}).get(node, ""), node == head, key, settings_of(config)
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
