"""What a process that is alone agrees on with itself: the coordinator where there are no machines to ask."""

import threading
import time

from nexus.ports import LiveIndex

LEASE_SECONDS = 10.0  # how long somebody counts as working who no longer says so


class Alone:
    """The port `Coordinator`, for as long as this process lives."""

    def __init__(self) -> None:
        self._working: dict[str, float] = {}
        self._live: dict[str, LiveIndex] = {}
        self._moving = threading.Lock()

    def stay(self, worker: str) -> None:
        self._working[worker] = time.monotonic()

    def leave(self, worker: str) -> None:
        self._working.pop(worker, None)

    def working(self) -> set[str]:
        silent_since = time.monotonic() - LEASE_SECONDS
        return {worker for worker, said in list(self._working.items()) if said >= silent_since}

    def live_index(self, collection: str) -> LiveIndex | None:
        return self._live.get(collection)

    def point(self, collection: str, to: LiveIndex) -> LiveIndex:
        return self._live.setdefault(collection, to)

    def move(self, collection: str, expected: LiveIndex, to: LiveIndex) -> bool:
        with self._moving:
            if self._live.get(collection) == expected:
                self._live[collection] = to
            return self._live.get(collection) == to
