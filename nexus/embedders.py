"""Embedders beside the configured one, opened once, when an index was made with one of them."""

import threading
from collections.abc import Callable

from nexus.chunking import CountTokens
from nexus.config import Config
from nexus.errors import ConfigError, Conflict
from nexus.hades import refusal
from nexus.ports import Embedder, LiveIndex
from nexus.registry import find_module, open_model


class Embedders:
    """By address. Any thread may ask; a model is loaded by whoever asks first, while the others wait."""

    def __init__(
        self, open: Callable[[str, str | None], Embedder], open_tokenizer: Callable[[str], CountTokens] | None = None
    ) -> None:  # fmt: skip
        """`open` is given an address and, where there are vectors already, their fingerprint.

        `open_tokenizer` has to be there where an index of another embedder is cut anew.
        """
        self._open, self._open_tokenizer = open, open_tokenizer
        self._tokenizers: dict[str, CountTokens] = {}
        self._opened: dict[tuple[str, str | None], Embedder] = {}
        self._lock = threading.Lock()

    def open(self, address: str, fingerprint: str | None = None) -> Embedder:
        """With a fingerprint, what makes these vectors, where the model does. Raises ConfigError for no embedder."""
        with self._lock:
            for (known, _), embedder in self._opened.items():
                if known == address and embedder.fingerprint == fingerprint:
                    return embedder
            if (address, fingerprint) not in self._opened:
                self._opened[address, fingerprint] = self._open(address, fingerprint)
            return self._opened[address, fingerprint]

    def of(self, live: LiveIndex) -> Embedder:
        """The one that made this index. Raises Conflict where its address is not known, or leads to another now."""
        if not live.embedder:
            raise refusal("this index")
        try:
            embedder = self.open(live.embedder, live.fingerprint)
        except ConfigError as error:
            raise Conflict(
                f"the embedder of this index cannot be opened: {error.message}", code="embedder_changed"
            ) from error
        if embedder.fingerprint != live.fingerprint:
            raise refusal("this index")
        return embedder

    def tokenizer_of(self, live: LiveIndex) -> CountTokens:
        """What counts the tokens of the one that made this index. Raises Conflict where it cannot be had."""
        if self._open_tokenizer is None or not live.embedder:
            raise refusal("this index")
        with self._lock:
            if live.embedder not in self._tokenizers:
                self._tokenizers[live.embedder] = self._open_tokenizer(live.embedder)
            return self._tokenizers[live.embedder]

    def keep(self, addresses: set[str]) -> None:
        """Let go of all others."""
        with self._lock:
            self._opened = {key: one for key, one in self._opened.items() if key[0] in addresses}


def of_config(config: Config, threads: int) -> Embedders:
    """Those of a configuration: one among the models served is opened with its settings, any other by its address."""

    def open(address: str, fingerprint: str | None) -> Embedder:
        offered = next((m.offered() for m in config.models.of_task("embed") if m.address == address), {})
        opened: Embedder = open_model("embed", address, **offered, threads=threads, fingerprint=fingerprint)
        return opened

    return Embedders(open, lambda address: find_module("models", address).open_tokenizer(address))
