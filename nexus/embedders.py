"""Embedders beside the configured one, opened once, when an index was made with one of them."""

import threading
from collections.abc import Callable

from nexus.config import Config
from nexus.errors import ConfigError, Conflict
from nexus.hades import refusal
from nexus.ports import Embedder, LiveIndex
from nexus.registry import open_model


class Embedders:
    """By address. Any thread may ask; a model is loaded by whoever asks first, while the others wait."""

    def __init__(self, open: Callable[[str], Embedder]) -> None:
        self._open = open
        self._opened: dict[str, Embedder] = {}
        self._lock = threading.Lock()

    def open(self, address: str) -> Embedder:
        """Raises ConfigError for an address of no embedder."""
        with self._lock:
            if address not in self._opened:
                self._opened[address] = self._open(address)
            return self._opened[address]

    def of(self, live: LiveIndex) -> Embedder:
        """The one that made this index. Raises Conflict where its address is not known, or leads to another now."""
        if not live.embedder:
            raise refusal("this index")
        try:
            embedder = self.open(live.embedder)
        except ConfigError as error:
            raise Conflict(
                f"the embedder of this index cannot be opened: {error.message}", code="embedder_changed"
            ) from error
        if embedder.fingerprint != live.fingerprint:
            raise refusal("this index")
        return embedder

    def keep(self, addresses: set[str]) -> None:
        """Let go of all others."""
        with self._lock:
            for address in set(self._opened) - addresses:
                del self._opened[address]


def of_config(config: Config, threads: int) -> Embedders:
    """Those of a configuration: one among the models served is opened with its settings, any other by its address."""

    def open(address: str) -> Embedder:
        offered = next((m.offered() for m in config.models.of_task("embed") if m.address == address), {})
        opened: Embedder = open_model("embed", address, **offered, threads=threads)
        return opened

    return Embedders(open)
