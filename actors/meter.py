"""One small actor on each machine but the head's, which tells what was counted there and how the machine does."""

import asyncio
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import PendingCallsLimitExceeded, RayActorError

from cluster.inventory import LOCAL, NODE_LABEL
from cluster.meter import Vitals, tell
from nexus.config import Config

NAMESPACE = "nexus"
NAME = "nexus-meter-"  # and the machine
ANSWER_SECONDS = 3.0  # Prometheus waits for ten
PENDING_CALLS = 4


class Meter:
    """Asked where what it tells is to be had."""

    def __init__(self, node: str) -> None:
        self._node, self._home = node, Path(os.environ["NEXUS_HOME"])

    def tell(self) -> Vitals:
        return tell(self._node, self._home)


class Meters:
    """Whoever measures, on the head's machine; all its calls belong to one event loop."""

    def __init__(self, config: Config) -> None:
        self._here, self._home = config.ray.head or LOCAL, Path(config.home)
        self._handles: dict[str, ActorHandle[Any]] = {}

    async def ask(self, nodes: Iterable[str]) -> Mapping[str, Vitals | None]:
        """What each machine tells; None for one that does not answer in time. The head's own is asked in any case."""
        asked = list(dict.fromkeys((self._here, *nodes)))
        told = await asyncio.gather(*map(self._ask, asked))
        return dict(zip(asked, told, strict=True))

    async def _ask(self, node: str) -> Vitals | None:
        if node == self._here:
            return await asyncio.to_thread(tell, node, self._home)
        handle = self._handles.get(node) or await asyncio.to_thread(_find, node)
        if handle is None:
            return None
        self._handles[node] = handle
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                told: Vitals = await handle.tell.remote()
                return told
        except (RayActorError, PendingCallsLimitExceeded, TimeoutError):
            self._handles.pop(node, None)
            return None


def start(config: Config) -> None:
    """Those of all machines but the head's, which may be there already; of those that are away when they come."""
    for node in config.nodes:
        if node != config.ray.head:
            ray.remote(Meter).options(
                name=f"{NAME}{node}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0,
                max_restarts=-1, max_task_retries=0, max_pending_calls=PENDING_CALLS, label_selector={NODE_LABEL: node},
            ).remote(node)  # fmt: skip


def _find(node: str) -> "ActorHandle[Any] | None":
    with suppress(ValueError):
        return ray.get_actor(f"{NAME}{node}", NAMESPACE)
    return None
