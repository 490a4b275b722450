"""Whether chats wait too long, told to all machines: the gateway says so while it is so, and bulk work gives way."""

import asyncio
import json
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import cache
from typing import Any

from actors import coordinator
from cluster.catalog import LeaseGone
from cluster.client import Client
from nexus.background import begin_in_background
from nexus.config import Scaling
from nexus.errors import TryAgain
from nexus.pressure import UNYIELDING, FirstTokens, Yielding

log = logging.getLogger("nexus.pressure")
Connect = Callable[[], Coroutine[Any, Any, Client]]

PRESSURE = "pressure/"  # and who says so, for as long as it does
LEASE_SECONDS = 5.0
SAY_SECONDS = 1.0
LOOK_SECONDS = 1.0


class Pressure:
    """The gateway's side. All of it belongs to one event loop, and while all is well it does nothing."""

    def __init__(self, tokens: FirstTokens, connect: Connect = coordinator.connect) -> None:
        self._tokens = tokens
        self._connect = connect
        self._key = f"{PRESSURE}{uuid.uuid4().hex}"
        self._saying: asyncio.Task[None] | None = None

    def note(self, seconds: float) -> None:
        """The first token of a chat came after so many seconds, just now."""
        self._tokens.note(seconds)
        if self._tokens.are_near_limit() and (self._saying is None or self._saying.done()):
            self._saying = begin_in_background(self._say())

    async def close(self) -> None:
        """Say no more; what was said ends with its lease."""
        if self._saying is not None:
            self._saying.cancel()
            await asyncio.wait({self._saying})

    async def _say(self) -> None:
        """Until it is no longer so. Nobody waits for this, and without the coordinator it is simply not said."""
        log.warning("first tokens take %.1f s, near the limit: bulk work gives way", self._tokens.slow_seconds())
        client: Client | None = None
        lease = 0
        while self._tokens.are_near_limit():
            try:
                client = client or await self._connect()
                lease = lease or await client.grant(LEASE_SECONDS)
                await client.keep_alive(lease)
                await client.put(self._key, self._said(), lease)
            except LeaseGone:
                lease = 0
                continue
            except TryAgain as error:
                log.warning("nobody hears that chats wait: %s", error)
            await asyncio.sleep(SAY_SECONDS)
        log.warning("first tokens come in time again")
        if client and lease:
            with suppress(TryAgain):  # then it ends by itself
                await client.revoke(lease)

    def _said(self) -> bytes:
        return json.dumps({"seconds": self._tokens.slow_seconds(), "limit": self._tokens.limit}).encode()


class Watch:
    """Everybody else's side: whether anybody says so, as of a second ago. Any thread may ask, and none ever waits."""

    def __init__(self, connect: Connect = coordinator.connect) -> None:
        self._connect = connect
        self._is_pressed = False
        self._lock = threading.Lock()
        self._looking: threading.Thread | None = None
        self._over = threading.Event()

    def __call__(self) -> bool:
        """What is not known counts as no."""
        with self._lock:
            if self._looking is None or not self._looking.is_alive():
                self._looking = threading.Thread(target=self._look, name="pressure", daemon=True)
                self._looking.start()
        return self._is_pressed

    def close(self) -> None:
        """Nobody may be asking it."""
        self._over.set()
        if self._looking is not None:
            self._looking.join()

    def _look(self) -> None:
        client: Client | None = None
        try:
            with asyncio.Runner() as runner:
                while not self._over.is_set():
                    try:
                        client = client or runner.run(self._connect())
                        self._is_pressed = bool(runner.run(client.range(PRESSURE, fresh=False)))
                    except TryAgain as error:
                        self._is_pressed = False
                        log.warning("whether chats wait is not known: %s", error)
                    self._over.wait(LOOK_SECONDS)
        finally:
            self._is_pressed = False


@cache
def watch() -> Watch:
    """The one of this process."""
    return Watch()


def yielding(scaling: Scaling) -> Yielding:
    """How this process' bulk work gives way; not at all where no limit is set."""
    if scaling.first_token_seconds is None:
        return UNYIELDING
    is_pressed = watch()
    is_pressed()  # begins to look, so that the first batch finds an answer
    return Yielding(is_pressed, scaling.yield_seconds)
