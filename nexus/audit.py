"""Who did what: an append-only record whose lines are sealed and chained, so that no change of it goes unseen.

A line is one event as JSON in one canonical form: keys sorted, no spaces, ASCII, so that nothing a caller sends can
end a line or colour a terminal. It carries its sequence number, the SHA-256 of the line before (`before`), and last,
over all of that, an HMAC-SHA256 under the key that the home keeps for this alone (`seal`). Whoever has not the key
can neither change a line nor add one; cutting, moving or repeating lines breaks the sequence. That the end is cut is
seen by the head: the number and hash of the last line on disk, sealed, in a file of its own. It is written at least
every second while there is something new, and at the end. Who can write both files can put back an older head with
the record of its time: where that matters, note heads elsewhere (`nexus audit verify` prints them).

Threads and processes share one chain: who writes holds a lock, and looks first what others wrote. Writing goes on
from the latest of what this process wrote, what the head says and what is found, so a cut end remains a gap. A line
that a crash left unfinished is removed by the next to write, which notes it. The time never goes back in the record;
where the clock did, the line has its reading too (`clock`).
"""

import atexit
import errno
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from nexus.errors import ConfigError, Unavailable
from nexus.private_files import require_private

FOLDER, KEY_FILE, HEAD_FILE, LOCK_FILE = "audit", "audit-key", "head.json", "lock"
NOTHING = "0" * 64  # the hash before the first line
SEALED = re.compile(rb"""(\{.*),"seal":"([0-9a-f]{64})"\}""", re.DOTALL)
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
MOST_CHARACTERS, MOST_ITEMS, MOST_TEXT = 512, 1000, 65_536  # of a field, of a list, of a question or an answer
DEFAULT_FILE_BYTES = 64 * 2**20
TAIL_BYTES = 2**16
LOCK_SECONDS, LOCK_PAUSE_SECONDS = 10.0, 0.001
SYNC_SECONDS = 1.0  # between a line and the disk, where nobody waits for it
BATCH_SECONDS = 0.05
RETRY_SECONDS = 1.0
MOST_WAITING = 10_000  # events in memory while the record cannot be written
MOST_AT_ONCE = 500
DAY = 86_400

log = logging.getLogger("nexus.audit")

Use = Literal["line", "head"]


@dataclass(frozen=True, slots=True)
class Event:
    """What is recorded of one request or command; what is empty is left out of its line.

    `action` is the method and the route's template, or a command. `objects` are the ids it names, `documents` those
    that an answer was made of. `verdict` says how it went. `question` and `answer` are there only if configured.
    """

    kind: str
    action: str = ""
    request_id: str = ""
    tenant: str = ""
    subject: str = ""
    credential: str = ""
    objects: Sequence[str] = ()
    documents: Sequence[str] = ()
    model: str = ""
    status: int = 0
    verdict: str = ""
    reason: str = ""
    question: str = ""
    answer: str = ""


FIELDS = tuple(field.name for field in fields(Event))


@dataclass(frozen=True, slots=True)
class Head:
    """Where the chain is: number, hash and time (Unix seconds) of its last line."""

    sequence: int = 0
    hash: str = NOTHING
    at: float = 0.0


def show(event: Event) -> dict[str, Any]:
    """An event as its line has it: bounded, and nothing empty."""
    shown: dict[str, Any] = {}
    for name in FIELDS:
        value = getattr(event, name)
        if not value:
            continue
        if isinstance(value, str):
            shown[name] = value[: MOST_TEXT if name in ("question", "answer") else MOST_CHARACTERS]
        elif isinstance(value, int):
            shown[name] = value
        else:
            shown[name] = [str(item)[:MOST_CHARACTERS] for item in value[:MOST_ITEMS]]
    return shown


def seal(values: Mapping[str, Any], key: bytes, use: Use = "line") -> bytes:
    """A line, without its end: the canonical form of these values and the seal over it, good for this use alone."""
    body = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    return body[:-1] + b',"seal":"' + _mac(body, key, use) + b'"}'


def unseal(line: bytes, key: bytes, use: Use = "line") -> dict[str, Any] | None:
    """What a line says, if it is as it was written under this key."""
    found = SEALED.fullmatch(line)
    if found is None or not hmac.compare_digest(_mac(found[1] + b"}", key, use), found[2]):
        return None
    values: dict[str, Any] = json.loads(found[1] + b"}")
    return values


def _mac(body: bytes, key: bytes, use: Use) -> bytes:
    return hmac.digest(key, f"nexus audit {use}\n".encode() + body, "sha256").hex().encode()


def hash_of(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def files_of(home: Path) -> list[Path]:
    """The record's files in order: each is named by the number of its first line."""
    return sorted((home / FOLDER).glob("*.jsonl"))


def read_key(home: Path) -> bytes | None:
    """The key of this home's record; None where there is none yet. Raises ConfigError if others may read it."""
    file = home / KEY_FILE
    try:
        require_private(file)
        key = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"the key of the audit record cannot be read: {error.strerror}") from None
    if len(key) != 32:
        raise ConfigError(f"{KEY_FILE} in the home is damaged; put the right one back")
    return key


def read_head(home: Path, key: bytes) -> Head | None:
    """The head as it was last sealed; None where there is none, or one that is not ours."""
    try:
        line = (home / FOLDER / HEAD_FILE).read_bytes()
    except FileNotFoundError:
        return None
    values = unseal(line, key, "head")
    return None if values is None else Head(values["seq"], values["hash"], values["at"])


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Nobody else writes. Raises Unavailable."""
    (home / FOLDER).mkdir(mode=0o700, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with _opened(home / FOLDER / LOCK_FILE, os.O_RDWR | os.O_CREAT) as file:  # the lock goes with its descriptor
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable("the audit record is locked by another process for too long") from None
                time.sleep(LOCK_PAUSE_SECONDS)
        yield


class Chain:
    """The record of one home. Every method may be called by any thread, and blocks."""

    def __init__(
        self, home: Path, file_bytes: int = DEFAULT_FILE_BYTES, clock: Callable[[], float] = time.time
    ) -> None:
        """Raises ConfigError if its key is readable to others, or gone while the record is there."""
        self._home, self._file_bytes, self._clock = home, file_bytes, clock
        self._lock = threading.Lock()
        self._head = Head()
        self._left_at: tuple[str, int] | None = None  # the last file and its size when this process last wrote
        self._synced_at, self._is_synced = 0.0, True
        with self._writing():
            self._key = self._open()

    def append(self, events: Sequence[Event], durable: bool = False) -> None:
        """Write events; all or none. `durable` ones are on the disk when this returns.

        Raises Unavailable, with the code `storage_full` where that is why.
        """
        with self._writing():
            noted = self._catch_up()
            head, lines = self._head, []
            now = round(self._clock(), 3)
            for event in [*noted, *events]:
                values = show(event) | {"seq": head.sequence + 1, "at": max(now, head.at), "before": head.hash}
                if now < head.at:
                    values["clock"] = now
                line = seal(values, self._key)
                lines.append(line + b"\n")
                head = Head(values["seq"], hash_of(line), values["at"])
            if lines:
                self._write(b"".join(lines), head, durable or bool(noted))

    def sync(self) -> None:
        """See to it that all that was written is on the disk, and the head says so."""
        if self._is_synced:
            return
        with self._writing():
            if not self._is_as_left(files_of(self._home)):
                self._is_synced = True  # who wrote after this process sees to it
            elif not self._is_synced and self._left_at is not None:
                with _opened(self._home / FOLDER / self._left_at[0], os.O_WRONLY) as file:
                    os.fsync(file)
                self._keep_head()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._lock, locked(self._home):
                yield
        except OSError as error:
            full = error.errno in FULL
            raise Unavailable(
                f"the audit record cannot be written: {os.strerror(error.errno or 0)}",
                code="storage_full" if full else "unavailable",
            ) from error

    def _open(self) -> bytes:
        key = read_key(self._home)
        folder = self._home / FOLDER
        if key is None:
            if files_of(self._home) or (folder / HEAD_FILE).exists():
                raise ConfigError(f"{KEY_FILE} is gone from the home: put it back, or move the folder {FOLDER} away")
            key = secrets.token_bytes(32)
            _replace(self._home / KEY_FILE, key)
        self._key = key
        if not files_of(self._home) and not (folder / HEAD_FILE).exists():
            self._keep_head()
        return key

    def _is_as_left(self, files: Sequence[Path]) -> bool:
        return bool(files) and (files[-1].name, files[-1].stat().st_size) == self._left_at

    def _catch_up(self) -> list[Event]:
        """Learn where the chain is if others wrote or something happened to it; returns what is to be noted."""
        files = files_of(self._home)
        if self._is_as_left(files):
            return []
        noted = []
        if files and (removed := _remove_unfinished(files[-1])):
            noted.append(Event("repaired", reason=f"{removed} bytes of a line that was not finished were removed"))
        sealed = read_head(self._home, self._key)
        found = next((head for file in reversed(files) if (head := _last_of(file, self._key))), Head())
        known = max((self._head, sealed or Head(), found), key=lambda head: head.sequence)
        if known.sequence > found.sequence:
            noted.append(Event("cut", reason=f"lines {found.sequence + 1} to {known.sequence} were gone"))
        if sealed is None:
            noted.append(Event("head lost", reason="the head was gone or not ours; lines before may be, too"))
        self._head = known
        return noted

    def _write(self, data: bytes, head: Head, durable: bool) -> None:
        files = files_of(self._home)
        file = files[-1] if files else None
        if file is not None and self._is_over(file, head.at):
            with _opened(file, os.O_WRONLY) as ended:
                os.fsync(ended)
            file = None
        if file is None:
            file = self._home / FOLDER / f"{self._head.sequence + 1:012}.jsonl"
        now = time.monotonic()
        sync = durable or now - self._synced_at >= SYNC_SECONDS
        with _opened(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
            size = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, data)
                if sync:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        if size == 0:
            with _opened(self._home / FOLDER, os.O_RDONLY) as folder:
                os.fsync(folder)
        self._head, self._left_at, self._is_synced = head, (file.name, size + len(data)), False
        if sync:
            self._keep_head()

    def _is_over(self, file: Path, at: float) -> bool:
        state = file.stat()
        return state.st_size >= self._file_bytes or int(state.st_mtime) // DAY < int(at) // DAY

    def _keep_head(self) -> None:
        """Seal where the chain is; only of what is on the disk."""
        head, folder = self._head, self._home / FOLDER
        values = {"seq": head.sequence, "hash": head.hash, "at": head.at}
        _replace(folder / HEAD_FILE, seal(values, self._key, "head"))
        self._synced_at, self._is_synced = time.monotonic(), True


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes) -> None:
    """The new content, whole, or the old."""
    draft = path.with_name(f"{path.name}.new")
    with _opened(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
        write_all(file, content)
        os.fsync(file)
    draft.replace(path)


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _remove_unfinished(file: Path) -> int:
    """Cut what follows the last end of a line; how many bytes that was."""
    with file.open("r+b") as opened:
        size = opened.seek(0, os.SEEK_END)
        if size == 0:
            return 0
        opened.seek(size - 1)
        if opened.read() == b"\n":
            return 0
        opened.seek(0)
        whole = opened.read().rfind(b"\n") + 1
        opened.truncate(whole)
    return size - whole


def _last_of(file: Path, key: bytes) -> Head | None:
    """The last line of a file that is ours."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        for start in (max(0, size - TAIL_BYTES), 0):  # the whole only where its end has none
            opened.seek(start)
            for line in reversed(opened.read().split(b"\n")):
                if values := unseal(line, key):
                    return Head(values["seq"], hash_of(line), values["at"])
    return None


class Recorder:
    """Takes events of one process without ever waiting for the disk, and writes them in batches."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.fault: Unavailable | None = None  # why the last attempt to write failed, if it did
        self._waiting: deque[Event] = deque()
        self._lost = self._told = 0  # of those that could not be kept: all, and those the record knows of
        self._something, self._closing = threading.Event(), threading.Event()
        self._flushing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def record(self, event: Event) -> None:
        """Have an event written soon. While the disk is full some are kept, and how many more there were is counted."""
        if len(self._waiting) >= MOST_WAITING:
            self._lost += 1
            return
        self._waiting.append(event)
        if not self._something.is_set():
            self._something.set()

    def write(self, event: Event) -> None:
        """Have an event on the disk before this returns. Raises Unavailable."""
        self._append([event], durable=True)

    def _append(self, events: Sequence[Event], durable: bool) -> None:
        try:
            self.chain.append(events, durable)
        except Unavailable as error:
            if self.fault is None:
                log.error("%s", error.message)
            self.fault = error
            raise
        self.fault = None

    def flush(self) -> None:
        """Write what waits. Raises Unavailable; then it waits on."""
        with self._flushing:
            while self._waiting or self._lost > self._told:
                batch = [self._waiting[n] for n in range(min(len(self._waiting), MOST_AT_ONCE))]
                lost = self._lost
                if lost > self._told:
                    batch.append(Event("lost", reason=f"{lost - self._told} events could not be kept"))
                self._append(batch, durable=False)
                for event in batch:
                    if event.kind != "lost":
                        self._waiting.popleft()
                self._told = lost

    def close(self) -> None:
        """Write what waits, seal the head, and end."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._something.set()
        self._thread.join()
        atexit.unregister(self.close)
        self.settle()

    def settle(self) -> None:
        """Write what waits, and seal the head. Where that cannot be, it is logged."""
        try:
            self.flush()
            self.chain.sync()
        except Unavailable as error:
            log.error("%d events are not recorded: %s", len(self._waiting), error.message)

    def _run(self) -> None:
        while not self._closing.is_set():
            is_busy = self._something.wait(SYNC_SECONDS)
            self._something.clear()
            try:
                if is_busy:
                    self._closing.wait(BATCH_SECONDS)  # others come
                    self.flush()
                else:
                    self.chain.sync()
            except Unavailable:  # it is logged; what waits is tried again
                self._closing.wait(RETRY_SECONDS)
                self._something.set()
