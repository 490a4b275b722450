"""A SQLite file that threads and processes of one machine share: a connection a thread, a transaction a block."""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from nexus.errors import ConfigError, Unavailable
from nexus.filters import Combine, Compare, Filter

log = logging.getLogger("nexus.database")

BUSY_SECONDS = 10.0
AGAIN_SECONDS = 0.01
COMPARISONS = {"eq": "=", "ne": "!=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class Database:
    """What the keepers of such a file have in common. `:memory:` is one connection, shared under a lock.

    What fails is told as Unavailable: the file is locked for too long, its disk is full (code
    `storage_full`), or it is gone.
    """

    def __init__(self, path: str | Path, called: str, pragmas: Sequence[str]) -> None:
        """`called` is what messages say of it; `pragmas` are set on every connection, in order."""
        self._path, self._called, self._pragmas = str(path), called, pragmas
        self._memory = self._path == ":memory:"
        self._local = threading.local()
        self._only: sqlite3.Connection | None = None
        self._in_use: dict[sqlite3.Connection, threading.Lock] = {}
        self._owners: dict[sqlite3.Connection, threading.Thread] = {}  # where each thread has its own
        self._is_closed = False
        self._lock = threading.RLock()

    def _connect(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = self._only or getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                for pragma in self._pragmas:
                    _set(connection, pragma)
            except BaseException:
                connection.close()
                raise
            self._local.connection = connection
            with self._lock:
                self._only = connection if self._memory else None
                self._in_use[connection] = threading.Lock()
                if not self._memory:
                    self._close_what_was_left()
                    self._owners[connection] = threading.current_thread()
                if self._is_closed:
                    connection.close()
        return connection

    def _close_what_was_left(self) -> None:
        """By threads that have ended: each would keep its files open for as long as the process lives."""
        for connection in [one for one, owner in self._owners.items() if not owner.is_alive()]:
            connection.close()
            del self._owners[connection], self._in_use[connection]

    def _migrate(self, scripts: Sequence[str]) -> None:
        """Bring the file to the form that this Nexus knows; each script takes it one step on. Raises ConfigError."""
        with self._reading() as db:
            (done,) = db.execute("PRAGMA user_version").fetchone()
        if done == len(scripts):
            return  # without waiting for whoever writes
        with self._transaction("EXCLUSIVE") as db:
            (done,) = db.execute("PRAGMA user_version").fetchone()
            if done > len(scripts):
                raise ConfigError(f"{self._called} was written by a newer Nexus; upgrade Nexus to open it")
            for number, script in enumerate(scripts[done:], done + 1):
                for statement in script.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def _transaction(self, mode: str = "IMMEDIATE", durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Everything in the block or nothing.

        One that is not durable may be lost with the power, but only together with all that came after it.
        """
        if self._memory:
            self._lock.acquire()
        try:
            connection = self._connect()
            with self._in_use[connection]:
                if self._is_closed:
                    raise Unavailable(f"{self._called} is closed")
                if mode != "DEFERRED":  # which only reads
                    connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                connection.execute(f"BEGIN {mode}")
                try:
                    yield connection
                except BaseException:
                    if connection.in_transaction:  # a full disk has ended it already
                        connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
            log.warning("%s cannot be used: %s", self._called, error)  # what callers are told is no business of SQL
            raise Unavailable(
                f"the disk of {self._called} is full" if full else f"{self._called} is away",
                code="storage_full" if full else "unavailable",
            ) from error
        finally:
            if self._memory:
                self._lock.release()

    def _reading(self) -> AbstractContextManager[sqlite3.Connection]:
        """A block that sees one moment of the file, whatever others write meanwhile."""
        return self._transaction("DEFERRED")

    def close(self) -> None:
        """End every connection, of whichever thread, once its transaction is over; there will be no other."""
        with self._lock:
            self._is_closed = True
            for connection, in_use in self._in_use.items():
                with in_use:  # SQLite crashes under who is closed in the middle of a statement
                    connection.close()
            self._only = None


def _set(connection: sqlite3.Connection, pragma: str) -> None:
    """SQLite's own patience does not hold for a file's change to WAL: of two at once, one is told `locked` at once."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute(f"PRAGMA {pragma}")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_SECONDS)


def condition_of(condition: Filter, parameters: dict[str, object], columns: Mapping[str, str]) -> str:
    """SQL for a filter tree over rows `v`: keys are of these columns, or else of `v.metadata`.

    Every key and value becomes a bound parameter.
    """
    if isinstance(condition, Combine):
        joint = " AND " if condition.every else " OR "
        return joint.join(f"({condition_of(part, parameters, columns)})" for part in condition.parts)
    return _comparison(condition, parameters, columns)


def _comparison(compare: Compare, parameters: dict[str, object], columns: Mapping[str, str]) -> str:
    def bind(value: object) -> str:
        name = f"p{len(parameters)}"
        parameters[name] = value
        return f":{name}"

    if compare.key in columns:
        left, kind = columns[compare.key], f"typeof({columns[compare.key]})"
    else:
        path = bind(f'$."{compare.key}"')
        left, kind = f"json_extract(v.metadata, {path})", f"json_type(v.metadata, {path})"
    alike = [f"({left} {{}} {bind(value)} AND {kind} {_kinds(value)})" for value in compare.values]
    if compare.operator in ("in", "nin", "eq", "ne"):
        equal = " OR ".join(one.format("=") for one in alike)
        return f"NOT COALESCE({equal}, 0)" if compare.operator in ("nin", "ne") else f"COALESCE({equal}, 0)"
    return f"COALESCE({alike[0].format(COMPARISONS[compare.operator])}, 0)"


def _kinds(value: object) -> str:
    """SQLite says 1 for both true and 1, and orders numbers before text: compare like with like."""
    if isinstance(value, bool):
        return "IN ('true', 'false')"
    return "= 'text'" if isinstance(value, str) else "IN ('integer', 'real')"
