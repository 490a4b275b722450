"""A database on an ArangoDB server: reached, migrated, read at one moment, written in one transaction.

Each read is one AQL query, which sees one moment of a single server or of a OneShard database. Each write is one
stream transaction with an exclusive lock where it says so; what loses against another is tried again.
The server compares strings by a language's rules, under which different ones may count as equal: so whatever
decides something is compared as hexadecimal digits (`digest`, or `binary`), never as it was given.
"""

import json
import logging
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from arango.client import ArangoClient
from arango.database import Database, StandardDatabase, TransactionDatabase
from arango.exceptions import ArangoError, ArangoServerError
from arango.http import DefaultHTTPClient

from nexus.errors import ConfigError, Conflict, InvalidRequest, NexusError, Unavailable, UpstreamInvalid
from nexus.filters import KEY, MAX_VALUE_CHARACTERS, Combine, Compare, Filter

log = logging.getLogger("nexus.arangodb")

T = TypeVar("T")

OLDEST, NEWEST = (3, 12), (4, 99)  # versions of the server that are spoken to
TIMEOUT_SECONDS = 30.0
LOCK_SECONDS = 10  # for which a writer waits until others have written
ATTEMPTS = 6
PAUSE_SECONDS = 0.02
ROWS_PER_PAGE = 1000
CONNECTIONS = 32
EVERYTHING = 10_000_000  # rows in one page: within a transaction the driver can fetch no second one

FORBIDDEN, READ_ONLY, DISK_FULL, TAKEN, NO_DATABASE = 11, 1004, 1104, 1207, 1228
LOCKED, SECOND_OF_ITS_KIND = 18, 1210
LOST = {29, 1200, 1654, 1655}  # a deadlock, a write-write conflict, a transaction that the server gave up
AWAY = {503, 1500, 21003}  # shutting down, the query was killed, its queue is full

COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
MIGRATED = "FOR s IN schema FILTER s._key == @key RETURN s.version"
MIGRATE = """
    LET known = (FOR s IN schema FILTER s._key == @key RETURN s.version)
    INSERT {_key: @key, version: MAX(PUSH(known, @version))} INTO schema
    OPTIONS {overwriteMode: 'replace', waitForSync: true}"""


@dataclass(frozen=True, slots=True)
class Table:
    """A collection of ArangoDB as it should be; indexes in the words of its HTTP interface, each with a name.

    One that `is_dropped` is no longer there.
    """

    name: str
    indexes: tuple[Mapping[str, Any], ...] = ()
    edges: bool = False
    is_dropped: bool = False


def persistent(name: str, *fields: str, **options: object) -> Mapping[str, Any]:
    """An index of a Table."""
    return {"type": "persistent", "name": name, "fields": list(fields), **options}


class Contended(Exception):
    """Another transaction was first: nothing was written, and the same may be tried again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a database is, and as whom: `arango://USER:PASSWORD@HOST:8529/DATABASE`, `?tls=true` where encrypted."""

    url: str
    user: str
    password: str
    database: str

    @classmethod
    def parse(cls, address: str) -> "Place":
        """Raises ConfigError, which shows nothing of the address: there is a password in it."""
        wanted = "give the server as arango://USER:PASSWORD@HOST:8529/DATABASE"
        parts = urlsplit(address)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        try:
            port = parts.port or 8529
        except ValueError as error:
            raise ConfigError(f"the port of the ArangoDB server is no number; {wanted}") from error
        if not parts.hostname or not parts.username:
            raise ConfigError(f"the address of the ArangoDB server lacks its host or a user; {wanted}")
        if options.pop("tls", "false") not in ("true", "false") or options:
            raise ConfigError(f"an ArangoDB address knows one option, tls=true or tls=false; {wanted}")
        database = parts.path.strip("/")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", database):
            raise ConfigError(f"an ArangoDB database is named by 1 to 64 letters, digits, '_' and '-'; {wanted}")
        scheme = "https" if "tls=true" in parts.query else "http"
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(f"{scheme}://{host}:{port}", unquote(parts.username), unquote(parts.password or ""), database)


class Transaction:
    """A stream transaction that is under way."""

    def __init__(self, inner: TransactionDatabase) -> None:
        self._inner = inner

    def aql(self, query: str, **values: object) -> list[Any]:
        """Run a query on what the transaction sees, which is what it has written itself, too."""
        return _run(self._inner, query, values, EVERYTHING)


class ArangoDatabase:
    """One database, shared by threads; it is connected to, and migrated, when it is first used."""

    def __init__(self, address: str, called: str, key: str, migrations: Sequence[Sequence[Table]]) -> None:
        """`called` is what messages say of it; each of the migrations of `key` takes its tables one step on."""
        self._place, self._called, self._key, self._migrations = Place.parse(address), called, key, migrations
        self._lock = threading.Lock()
        self._client = _client(self._place.url)
        self._database: StandardDatabase | None = None
        self._is_closed = False

    def aql(self, query: str, **values: object) -> list[Any]:
        """Run a query by itself: it sees one moment, and what it writes is written whole or not at all."""
        for attempt in range(ATTEMPTS):
            try:
                database = self._ready()
                with self._translating():
                    return _run(database, query, values, ROWS_PER_PAGE)
            except Contended:
                _pause(attempt)
        raise self._busy()

    def write(
        self, move: Callable[[Transaction], T], *, exclusive: Sequence[str], writes: Sequence[str] = (),
        reads: Sequence[str] = (), durable: bool = True,
    ) -> T:  # fmt: skip
        """Everything that `move` does or nothing; it may be called again, so it changes nothing else.

        Nobody else who names a collection as `exclusive` writes meanwhile. One that is not durable may be lost with
        the power, but only together with all that came after it. Raises Unavailable.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._write_once(move, exclusive, writes, reads, durable)
            except Contended as error:
                log.info("a transaction of %s is tried again: %s", self._called, error)
                _pause(attempt)
        raise self._busy()

    def _write_once(
        self, move: Callable[[Transaction], T], exclusive: Sequence[str], writes: Sequence[str],
        reads: Sequence[str], durable: bool,
    ) -> T:  # fmt: skip
        database = self._ready()
        with self._translating():
            transaction = database.begin_transaction(
                read=list(reads), write=list(writes), exclusive=list(exclusive), sync=durable,
                allow_implicit=False, lock_timeout=LOCK_SECONDS,
            )  # fmt: skip
        try:
            with self._translating():
                result = move(Transaction(transaction))
                transaction.commit_transaction()
        except BaseException:
            with suppress(ArangoError, OSError):  # it ends by itself when its server has waited long enough
                transaction.abort_transaction()
            raise
        return result

    # ── all of it ───────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def dump(self) -> Iterator[Iterator[bytes]]:
        """As KeptElsewhere says. A stream transaction sees the moment at which it read first."""
        names = self._names()
        database = self._ready()
        with self._translating():
            transaction = database.begin_transaction(
                read=[*names, "schema"], allow_implicit=False, lock_timeout=LOCK_SECONDS
            )
        try:
            with self._translating():
                _run(transaction, MIGRATED, {"key": self._key}, 1)
            yield self._lines(transaction, names)
        finally:
            with suppress(ArangoError, OSError):
                transaction.abort_transaction()

    def _lines(self, transaction: TransactionDatabase, names: Sequence[str]) -> Iterator[bytes]:
        yield _line({"of": self._key, "version": len(self._migrations)})
        for name in names:
            after = ""
            while True:
                with self._translating():
                    rows = _run(transaction, _page_of(name), {"after": after, "limit": ROWS_PER_PAGE}, EVERYTHING)
                yield from (_line([name, row]) for row in rows)
                if len(rows) < ROWS_PER_PAGE:
                    break
                after = rows[-1]["_key"]

    def restore(self, lines: Iterable[bytes]) -> None:
        """As KeptElsewhere says. A load that was cut short leaves a part: take another database for the next."""
        lines = iter(lines)
        if next(lines, b"") != _line({"of": self._key, "version": len(self._migrations)}):
            raise InvalidRequest(f"another version of Nexus wrote what the archive holds of {self._called}")
        for name in self._names():
            if self.aql(_page_of(name), after="", limit=1):
                raise Conflict(
                    f"the ArangoDB database {self._place.database!r} holds something of {self._called} already: create"
                    " an empty one, and name it in stores.documents"
                )
        rows: dict[str, list[Any]] = {name: [] for name in self._names()}
        for line in lines:
            name, row = json.loads(line)
            rows[name].append(row)
            if len(rows[name]) == ROWS_PER_PAGE:
                self.aql(_put_into(name), rows=rows[name])
                rows[name] = []
        for name, left in rows.items():
            if left:
                self.aql(_put_into(name), rows=left)

    def _names(self) -> list[str]:
        return [table.name for tables in self._migrations for table in tables if not table.is_dropped]

    def check(self) -> None:
        """Return if the server answers, as it should, else raise Unavailable or ConfigError."""
        self.aql(MIGRATED, key=self._key)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._client.close()

    # ── connecting ──────────────────────────────────────────────────────────────────────────────

    def _ready(self) -> StandardDatabase:
        with self._lock:
            if self._is_closed:
                raise Unavailable(f"{self._called} is closed")
            if self._database is None:
                with self._translating():
                    database = self._client.db(self._place.database, self._place.user, self._place.password)
                    try:
                        self._check_version(str(database.version()))
                        self._migrate(database)
                    except (KeyError, TypeError) as error:  # the driver takes for granted what only ArangoDB answers
                        raise _nonsense(self._called, error) from error
                self._database = database
            return self._database

    def _check_version(self, version: str) -> None:
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
            raise ConfigError(f"the ArangoDB server is {version[:20]!r}: Nexus needs 3.12, or 4")

    def _migrate(self, database: StandardDatabase) -> None:
        """Bring the database to the form that this Nexus knows. A step may be repeated, by several at once, too."""
        listed: Any = database.collections()
        there = {one["name"] for one in listed}
        (done,) = _run(database, MIGRATED, {"key": self._key}, 1) or (0,) if "schema" in there else (0,)
        if done > len(self._migrations):
            raise ConfigError(f"{self._called} was written by a newer Nexus; upgrade Nexus to open it")
        for number, tables in enumerate(self._migrations[done:], done + 1):
            for table in (Table("schema"), *tables):
                _create(database, table)
            _run(database, MIGRATE, {"key": self._key, "version": number}, 1)

    # ── what goes wrong ─────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """What the driver raises, as an error of nexus.errors, or Contended."""
        try:
            yield
        except (ArangoError, OSError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        if isinstance(error, ArangoServerError):
            return self._answered(error.error_code, error.http_code, error)
        if isinstance(error, OSError):  # as all that the driver's HTTP library raises is
            log.warning("%s does not answer: %s", self._called, error)
            return Unavailable(f"{self._called} does not answer; try again in a moment")
        return _nonsense(self._called, error)

    def _answered(self, code: int | None, status: int | None, error: ArangoServerError) -> Exception:
        database, user = self._place.database, self._place.user
        if code in LOST:
            return Contended(str(error))
        log.warning("%s refused: %s", self._called, error)  # what callers are told is no business of AQL
        if code == LOCKED:
            return self._busy()
        if code == NO_DATABASE:
            return ConfigError(f"the ArangoDB server has no database {database!r}: create it, as docs/operate.md says")
        if status == 401:
            return ConfigError(f"the ArangoDB server refuses user {user!r}, or its password, for {database!r}")
        if code == READ_ONLY:
            return Unavailable("the ArangoDB server takes no writes, as one does that is over its licence's limits")
        if code == FORBIDDEN or status == 403:
            return ConfigError(f"the ArangoDB server lets user {user!r} not do this: it needs rw on {database!r}")
        if code == DISK_FULL:
            return Unavailable(f"the disk of {self._called} is full", code="storage_full")
        if code == SECOND_OF_ITS_KIND:
            return Conflict("another writer was first; try again")
        if code in AWAY or status == 503:
            return Unavailable(f"{self._called} is overloaded or shutting down; try again in a moment")
        return UpstreamInvalid(f"{self._called} refused what Nexus asked of it: error {code} of ArangoDB")

    def _busy(self) -> NexusError:
        return Unavailable(f"too many write to {self._called} at once; try again in a moment")


class ArangoStore:
    """What the stores over one database have in common."""

    def __init__(self, database: ArangoDatabase) -> None:
        self._database = database

    def check(self) -> None:
        self._database.check()

    def close(self) -> None:
        self._database.close()

    def dump(self) -> AbstractContextManager[Iterator[bytes]]:
        return self._database.dump()

    def restore(self, lines: Iterable[bytes]) -> None:
        self._database.restore(lines)


def _nonsense(called: str, error: Exception) -> NexusError:
    log.warning("%s answered nonsense: %r", called, error)
    return UpstreamInvalid(f"what answers at the address of {called} is no ArangoDB server")


class _Http(DefaultHTTPClient):
    """Requests that are sent once, to the server itself: what may be repeated is decided above."""

    def create_session(self, host: str) -> Any:
        session = super().create_session(host)
        session.trust_env = False  # neither a proxy nor a .netrc stands in between
        return session


def _client(url: str) -> ArangoClient:
    http = _Http(request_timeout=TIMEOUT_SECONDS, retry_attempts=0, pool_maxsize=CONNECTIONS)
    return ArangoClient(url, http_client=http, resolver_max_tries=1)


def _run(database: Database, query: str, values: Mapping[str, object], page: int) -> list[Any]:
    try:
        bound: dict[str, Any] = {**values}
        cursor: Any = database.aql.execute(query, bind_vars=bound, batch_size=page, fail_on_warning=True)
        return list(cursor)
    except (KeyError, TypeError) as error:  # the driver takes for granted what only ArangoDB answers
        raise _nonsense("the document store", error) from error


def _create(database: StandardDatabase, table: Table) -> None:
    if table.is_dropped:
        database.delete_collection(table.name, ignore_missing=True)
        return
    try:
        database.create_collection(table.name, edge=table.edges)
    except ArangoServerError as error:
        if error.error_code != TAKEN:
            raise
    for index in table.indexes:
        database.collection(table.name).add_index(dict(index))


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _page_of(name: str) -> str:
    """Rows of a Table in the order of their keys, which are hexadecimal digits."""
    return f"FOR r IN {name} FILTER r._key > @after SORT r._key LIMIT @limit RETURN UNSET(r, '_id', '_rev')"


def _put_into(name: str) -> str:
    return f"FOR row IN @rows INSERT row INTO {name} OPTIONS {{waitForSync: true}}"


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0, PAUSE_SECONDS * 2**attempt))


def create_database(administrator: str, address: str) -> None:
    """Make the database of this address and its user, who may do everything there and nothing elsewhere.

    `administrator` is an address as well, of a user who may do that; its database is not used. What is there
    already stays as it is. Raises ConfigError, Unavailable, Conflict.
    """
    admin, wanted = Place.parse(administrator), Place.parse(address)
    if admin.url != wanted.url:
        raise ConfigError("the administrator's address names another ArangoDB server")
    by = ArangoDatabase(administrator, "the ArangoDB server", "", ())
    try:
        with by._translating():
            system = by._client.db("_system", admin.user, admin.password)
            if not system.has_user(wanted.user):
                system.create_user(wanted.user, wanted.password, active=True)
            if not system.has_database(wanted.database):
                system.create_database(wanted.database, sharding="single")  # so that a cluster's are one shard, too
            system.update_permission(wanted.user, "rw", wanted.database)
    finally:
        by.close()


# ── conditions ──────────────────────────────────────────────────────────────────────────────────


def condition_of(condition: Filter, values: dict[str, object]) -> str:
    """AQL for a filter tree over `v.facts`, made by `facts_of`; every key and value becomes a bound parameter."""
    if isinstance(condition, Combine):
        joint = " && " if condition.every else " || "
        return joint.join(f"({condition_of(part, values)})" for part in condition.parts)
    return _comparison(condition, values)


def _comparison(compare: Compare, values: dict[str, object]) -> str:
    def bind(value: object) -> str:
        name = f"p{len(values)}"
        values[name] = value
        return f"@{name}"

    left = f"v.facts[{bind(compare.key)}]"
    right = [_fact(value) for value in compare.values]
    if compare.operator in ("in", "nin", "eq", "ne"):
        return f"{left} {'NOT IN' if compare.operator in ('nin', 'ne') else 'IN'} {bind(right)}"
    kind = "IS_STRING" if isinstance(right[0], str) else "IS_NUMBER"
    return f"{kind}({left}) && {left} {COMPARISONS[compare.operator]} {bind(right[0])}"


def facts_of(values: Mapping[str, object]) -> dict[str, object]:
    """What a filter may ask: those of the values that are a text, a number or a boolean, under a key it can name."""
    found = {key: _fact(value) for key, value in values.items() if KEY.fullmatch(key)}
    return {key: fact for key, fact in found.items() if fact is not None}


def _fact(value: object) -> str | float | None:
    """Numbers and booleans as they are; a text so that it compares byte by byte, as far as a filter can tell."""
    if isinstance(value, str):
        return binary(value[: MAX_VALUE_CHARACTERS + 1])
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value) if value.bit_length() < 1024 else None
    return value if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else None


def binary(text: str) -> str:
    """Hexadecimal digits that compare as the bytes of the text do, by the rules of any language."""
    return text.encode(errors="surrogatepass").hex()


def _main() -> None:
    named = ("ARANGO_ADMINISTRATOR", "NEXUS_STORES__DOCUMENTS")
    given = [os.environ.get(name, "") for name in named]
    if not all(given):
        sys.exit(f"set {' and '.join(named)} to addresses: arango://USER:PASSWORD@HOST:8529/DATABASE")
    try:
        create_database(*given)
    except NexusError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    _main()
