"""A strict double of an ArangoDB server: the part of its HTTP interface and of AQL (aql.py) that Nexus speaks.

What it does not know it refuses: a path, a field, a header, a query, an index that is not there (no query but those
over a few rows may scan a whole collection), a transaction that is not open, a collection that a transaction did not
name. Transactions see the moment they began at, and their own writes; two that write one document conflict.
Everything is in memory and stays over `stop` and `start`, as on a disk.
"""

import base64
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.aql import FULL_SCAN, AqlError, order, read

MAY_BE_SCANNED = {"collections", "schema", "parts"}  # they stay small, or only `fsck` reads all of them
KEY = re.compile(r"[A-Za-z0-9_\-:.@()+,=;$!*'%]{1,254}")
STATUS = {
    11: 403, 18: 500, 400: 400, 404: 404, 405: 405, 600: 400, 1200: 409, 1203: 404, 1207: 409, 1210: 409, 1220: 400,
    1221: 400, 1202: 404, 1228: 404, 1233: 400, 1600: 404, 1652: 400, 1655: 404, 1702: 409,
}  # fmt: skip
QUERY_FIELDS = {"query", "count", "batchSize", "bindVars", "memoryLimit", "options", "failOnWarning", "allowRetry"}
BEGIN_FIELDS = {"collections", "waitForSync", "allowImplicit", "lockTimeout"}
COLLECTION_FIELDS = {"name", "waitForSync", "isSystem", "keyOptions", "type"}
INDEX_FIELDS = {"type", "name", "fields", "unique", "sparse", "expireAfter"}

Row = dict[str, Any]


@contextmanager
def scanning(name: str) -> Iterator[None]:
    """Let a test read all of a collection."""
    before = set(MAY_BE_SCANNED)
    MAY_BE_SCANNED.add(name)
    try:
        yield
    finally:
        MAY_BE_SCANNED.intersection_update(before)  # what may be scanned anyway, still may


class Refused(Exception):
    """An answer that is an error: ArangoDB's number of it, and the words."""

    def __init__(self, number: int, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.number, self.status = number, status or STATUS.get(number, 400)


@dataclass(slots=True)
class Table:
    """One version of a collection: its documents, and lists of them by attribute, made when first asked for."""

    edges: bool
    indexes: tuple[Mapping[str, Any], ...] = ()
    rows: dict[str, Row] = field(default_factory=dict)
    by: dict[str, dict[Any, dict[str, Row]]] = field(default_factory=dict)

    def copy(self) -> "Table":
        return Table(self.edges, self.indexes, dict(self.rows))

    def has_index(self, attribute: str) -> bool:
        own = {"_key", "_id", *(("_from", "_to") if self.edges else ())}
        return attribute in own or any(index["fields"][0] == attribute for index in self.indexes)

    def find(self, attribute: str, values: Sequence[Any]) -> Iterator[Row]:
        if attribute == "_key":
            yield from (self.rows[value] for value in dict.fromkeys(map(str, values)) if value in self.rows)
            return
        if attribute not in self.by:
            made: dict[Any, dict[str, Row]] = {}
            for key, row in self.rows.items():
                made.setdefault(order(row.get(attribute)), {})[key] = row
            self.by[attribute] = made
        for value in dict.fromkeys(order(value) for value in values):
            yield from list(self.by[attribute].get(value, {}).values())

    def put(self, row: Row) -> None:
        self.drop(row["_key"])
        for index in self.indexes:
            if index.get("unique"):
                self._check_unique(index, row)
        self.rows[row["_key"]] = row
        for attribute, made in self.by.items():
            made.setdefault(order(row.get(attribute)), {})[row["_key"]] = row

    def drop(self, key: str) -> None:
        old = self.rows.pop(key, None)
        if old is not None:
            for attribute, made in self.by.items():
                made[order(old.get(attribute))].pop(key)

    def _check_unique(self, index: Mapping[str, Any], row: Row) -> None:
        fields = index["fields"]
        if index.get("sparse") and any(row.get(name) is None for name in fields):
            return
        for other in self.find(fields[0], [row.get(fields[0])]):
            if all(order(other.get(name)) == order(row.get(name)) for name in fields):
                raise Refused(1210, f"unique constraint violated - in index {index['name']} over {fields}")


@dataclass(slots=True)
class Transaction:
    """What a stream transaction, or one query by itself, sees and has written. A Data of aql.py."""

    base: dict[str, Table]
    modes: Mapping[str, set[str]]
    own: "Database"
    ident: int
    waits_for_sync: bool = False
    seen: dict[str, Table] = field(default_factory=dict)
    changes: dict[str, dict[str, Row | None]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.base

    def scan(self, name: str) -> Iterable[Row]:
        if name not in MAY_BE_SCANNED:
            raise AqlError(FULL_SCAN, f"all of {name} would be read: no index fits the query")
        return list(self._readable(name).rows.values())

    def find(self, name: str, attribute: str, values: Sequence[Any]) -> Iterable[Row] | None:
        table = self._readable(name)
        return list(table.find(attribute, values)) if table.has_index(attribute) else None

    def insert(self, name: str, document: Row, mode: str | None) -> tuple[Row | None, Row]:
        row = {**document, "_key": document.get("_key") or str(next(self.own.numbers))}
        _check_row(row, self._writable(name).edges)
        old = self.seen[name].rows.get(row["_key"])
        if old is not None and mode is None:
            raise Refused(1210, "unique constraint violated - in index primary over '_key'")
        if old is not None and mode == "ignore":
            return None, old
        return old, self._change(name, row["_key"], row)

    def update(self, name: str, key: str, change: Row) -> tuple[Row, Row]:
        old = self._writable(name).rows.get(key)
        if old is None:
            raise Refused(1202, "document not found")
        return old, self._change(name, key, {**old, **change, "_key": key})

    def remove(self, name: str, key: str, ignore: bool) -> Row | None:
        old = self._writable(name).rows.get(key)
        if old is None and not ignore:
            raise Refused(1202, "document not found")
        if old is not None:
            self._change(name, key, None)
        return old

    def _readable(self, name: str) -> Table:
        if name not in set().union(*self.modes.values()):
            raise Refused(1652, f"{name} was not named when the transaction began")
        return self.seen.get(name) or self.base[name]

    def _writable(self, name: str) -> Table:
        if name not in self.base:
            raise Refused(1203, f"collection or view not found: {name}")
        if name not in self.modes["write"] | self.modes["exclusive"]:
            raise Refused(1652, f"{name} was not named for writing when the transaction began")
        if name not in self.seen:
            self.seen[name] = self.base[name].copy()
        return self.seen[name]

    def _change(self, name: str, key: str, row: Row | None) -> Row:
        self.own.claim(self, name, key)
        table = self.seen[name]
        if row is None:
            table.drop(key)
        else:
            row = {**row, "_id": f"{name}/{key}", "_rev": str(next(self.own.numbers))}
            table.put(row)
        self.changes.setdefault(name, {})[key] = row
        return row or {}


def _check_row(row: Row, edges: bool) -> None:
    if not isinstance(row["_key"], str) or not KEY.fullmatch(row["_key"]):
        raise Refused(1221, f"illegal document key: {row['_key']!r}")
    ends = [row.get("_from"), row.get("_to")]
    if edges and not all(isinstance(one, str) and re.fullmatch(r"[a-z_]+/[^/]+", one) for one in ends):
        raise Refused(1233, "edge attribute missing or invalid")
    if {"_id", "_rev"} & set(row):
        raise Refused(400, "_id and _rev are the server's to give")


class Database:
    """Collections, who has locks on them, and what is open."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.numbers = itertools.count(1000)
        self.open: dict[int, Transaction] = {}
        self.cursors: dict[str, list[list[Any]]] = {}
        self.claimed: dict[tuple[str, str], int] = {}
        self.changed = threading.Condition(threading.RLock())

    def begin(self, modes: Mapping[str, set[str]], timeout: float, waits_for_sync: bool = False) -> Transaction:
        def is_free() -> bool:
            for other in self.open.values():
                wanted, taken = modes["exclusive"], other.modes["exclusive"]
                if wanted & (taken | other.modes["write"]) or modes["write"] & taken:
                    return False
            return True

        with self.changed:
            for name in set().union(*modes.values()):
                if name not in self.tables:
                    raise Refused(1203, f"collection or view not found: {name}")
            if not self.changed.wait_for(is_free, timeout):
                raise Refused(18, "timeout waiting to lock key")
            transaction = Transaction(dict(self.tables), modes, self, next(self.numbers), waits_for_sync)
            self.open[transaction.ident] = transaction
            return transaction

    def claim(self, by: Transaction, name: str, key: str) -> None:
        """One document is written by one transaction at a time, and only as it was when that one began."""
        with self.changed:
            holder = self.claimed.setdefault((name, key), by.ident)
            now, then = self.tables[name].rows.get(key), by.base[name].rows.get(key)
            if holder != by.ident or now is not then:
                raise Refused(1200, "write-write conflict")

    def commit(self, transaction: Transaction) -> None:
        with self.changed:
            after = {}
            for name, changes in transaction.changes.items():
                if self.tables[name] is transaction.base[name]:
                    after[name] = transaction.seen[name]
                    continue
                after[name] = self.tables[name].copy()
                for key, row in changes.items():
                    after[name].put(row) if row else after[name].drop(key)
            self.tables |= after
            self.end(transaction)

    def end(self, transaction: Transaction) -> None:
        with self.changed:
            self.open.pop(transaction.ident, None)
            self.claimed = {what: who for what, who in self.claimed.items() if who != transaction.ident}
            self.changed.notify_all()

    @contextmanager
    def alone(self, reads: frozenset[str], writes: frozenset[str], exclusive: bool) -> Iterator[Transaction]:
        """A transaction of one query."""
        modes = {"read": set(reads & set(self.tables)), "write": set(), "exclusive": set()}
        modes["exclusive" if exclusive else "write"] = set(writes)
        transaction = self.begin(modes, 10)
        try:
            yield transaction
            self.commit(transaction)
        finally:
            self.end(transaction)


@dataclass(slots=True)
class User:
    password: str
    grants: dict[str, str]  # by database; "*" is every one


class ArangoDouble:
    """The server: start it, give its address to what is tested, stop it. `requests` counts what was asked of it."""

    def __init__(self, version: str = "3.12.4") -> None:
        self.version = version
        self.users = {"root": User("root-secret", {"*": "rw"})}
        self.databases = {"_system": Database()}
        self.fails: list[tuple[str, int, int]] = []  # (path, status, number): the next request to it fails so
        self.read_only = False
        self.requests: list[tuple[str, str]] = []
        self.synced: list[bool] = []  # of each commit, or query that writes: whether it waited for the disk
        self._server: _Server | None = None
        self._port = 0

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._server = None

    def end_transactions(self) -> None:
        """What a server does with those that were silent for too long."""
        for database in self.databases.values():
            for transaction in list(database.open.values()):
                database.end(transaction)

    def address(self, database: str, user: str = "root", password: str = "root-secret") -> str:
        return f"arango://{user}:{password}@127.0.0.1:{self._port}/{database}"

    def create(self, name: str, user: str = "nexus", password: str = "nexus-secret") -> str:
        """A database and a user who may do everything in it; its address."""
        self.databases[name] = Database()
        self.users.setdefault(user, User(password, {})).grants[name] = "rw"
        return self.address(name, user, password)

    # ── requests ────────────────────────────────────────────────────────────────────────────────

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        parts = urlsplit(target)
        prefix, _, path = parts.path.removeprefix("/_db/").partition("/")
        self.requests.append((method, f"/{path}"))
        try:
            for fail in [one for one in self.fails if one[0] == f"/{path}"][:1]:
                self.fails.remove(fail)
                raise Refused(fail[2], "it fails, as was asked for", fail[1])
            user = self._authenticate(headers)
            database = self._database(user, unquote(prefix))
            parameters = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            given = _json(body)
            return self._route(method, path, user, database, headers.get("x-arango-trx-id"), parameters, given)
        except (Refused, AqlError) as error:
            status = error.status if isinstance(error, Refused) else STATUS.get(error.number, 400)
            answer = {"error": True, "code": status, "errorNum": error.number, "errorMessage": str(error)}
            return status, answer

    def _authenticate(self, headers: Mapping[str, str]) -> User:
        scheme, _, credential = headers.get("authorization", "").partition(" ")
        name, _, password = base64.b64decode(credential).decode().partition(":") if scheme == "Basic" else ("", "", "")
        user = self.users.get(name)
        if user is None or user.password != password:
            raise Refused(11, "not authorized to execute this request", 401)
        return user

    def _database(self, user: User, name: str) -> Database:
        if name not in self.databases:
            raise Refused(1228, "database not found")
        if "*" not in user.grants and name not in user.grants:
            raise Refused(11, "not authorized to execute this request", 401)
        return self.databases[name]

    def _route(
        self, method: str, path: str, user: User, database: Database, transaction: str | None,
        parameters: Mapping[str, str], given: Any,
    ) -> tuple[int, Any]:  # fmt: skip
        kind, _, rest = path.removeprefix("_api/").partition("/")
        may_write = user.grants.get(self._name(database), user.grants.get("*")) == "rw"
        if transaction is not None and kind != "cursor":
            raise Refused(400, f"{kind} does not go into a transaction here")
        route = getattr(self, f"_{method.lower()}_{kind}", None)
        if route is None or not path.startswith("_api/"):
            raise Refused(404, f"unknown path {method} /{path}", 404)
        if kind in ("database", "user"):
            if database is not self.databases["_system"] or not may_write:
                raise Refused(11, "only administrators may do this")
        elif not may_write and kind in ("collection", "index") and method != "GET":
            raise Refused(11, "insufficient permissions")
        return route(database, rest, parameters, given, transaction, may_write)

    def _name(self, database: Database) -> str:
        return next(name for name, one in self.databases.items() if one is database)

    # ── what there is ───────────────────────────────────────────────────────────────────────────

    def _get_version(self, database: Database, rest: str, parameters: Any, *_: Any) -> tuple[int, Any]:
        return 200, {"server": "arango", "license": "community", "version": self.version}

    def _get_database(self, database: Database, rest: str, *_: Any) -> tuple[int, Any]:
        return 200, {"error": False, "code": 200, "result": list(self.databases)}

    def _post_database(self, database: Database, rest: str, parameters: Any, given: Row, *_: Any) -> tuple[int, Any]:
        _only(given, {"name", "options"})
        if given["name"] in self.databases:
            raise Refused(1207, "duplicate database name")
        self.databases[given["name"]] = Database()
        return 201, {"error": False, "code": 201, "result": True}

    def _get_user(self, *_: Any) -> tuple[int, Any]:
        users = [{"user": name, "active": True, "extra": {}} for name in self.users]
        return 200, {"error": False, "code": 200, "result": users}

    def _post_user(self, database: Database, rest: str, parameters: Any, given: Row, *_: Any) -> tuple[int, Any]:
        _only(given, {"user", "passwd", "active"})
        if given["user"] in self.users:
            raise Refused(1702, "duplicate user")
        self.users[given["user"]] = User(given["passwd"], {})
        return 201, {"error": False, "code": 201, "user": given["user"], "active": True, "extra": {}}

    def _put_user(self, database: Database, rest: str, parameters: Any, given: Row, *_: Any) -> tuple[int, Any]:
        _only(given, {"grant"})
        name, _, granted = rest.partition("/database/")
        self.users[name].grants[granted] = given["grant"]
        return 200, {"error": False, "code": 200, granted: given["grant"]}

    def _get_collection(self, database: Database, *_: Any) -> tuple[int, Any]:
        tables = [
            {"id": name, "name": name, "isSystem": False, "type": 3 if table.edges else 2}
            for name, table in database.tables.items()
        ]
        return 200, {"error": False, "code": 200, "result": tables}

    def _post_collection(self, database: Database, rest: str, parameters: Any, given: Row, *_: Any) -> tuple[int, Any]:
        _only(given, COLLECTION_FIELDS)
        with database.changed:
            if given["name"] in database.tables:
                raise Refused(1207, "duplicate name")
            database.tables[given["name"]] = Table(given["type"] == 3)
        return 200, {"error": False, "code": 200, "name": given["name"]}

    def _delete_collection(self, database: Database, rest: str, *_: Any) -> tuple[int, Any]:
        with database.changed:
            if rest not in database.tables:
                raise Refused(1203, f"collection or view not found: {rest}", 404)
            del database.tables[rest]
        return 200, {"error": False, "code": 200, "id": rest}

    def _post_index(self, database: Database, rest: str, parameters: Any, given: Row, *_: Any) -> tuple[int, Any]:
        _only(given, INDEX_FIELDS)
        name = parameters["collection"]
        if given["type"] not in ("persistent", "ttl") or (given["type"] == "ttl") != ("expireAfter" in given):
            raise Refused(400, f"no such index: {given}")
        with database.changed:
            if name not in database.tables:
                raise Refused(1203, f"collection or view not found: {name}")
            table = database.tables[name]
            known = [index for index in table.indexes if index["name"] == given["name"]]
            if known and known != [given]:
                raise Refused(1207, "duplicate name")
            if not known:
                table.indexes = (*table.indexes, given)
        return 201, {**given, "id": f"{name}/{given['name']}", "error": False, "code": 201}

    # ── transactions and queries ────────────────────────────────────────────────────────────────

    def _post_transaction(
        self, database: Database, rest: str, parameters: Any, given: Row, transaction: Any, may_write: bool
    ) -> tuple[int, Any]:
        if rest != "begin":
            raise Refused(404, "JavaScript transactions are gone")
        _only(given, BEGIN_FIELDS)
        _only(given["collections"], {"read", "write", "exclusive"})
        if given.get("allowImplicit") is not False:
            raise Refused(400, "a transaction names what it reads")
        modes = {mode: set(given["collections"].get(mode, ())) for mode in ("read", "write", "exclusive")}
        self._may_write(may_write, modes["write"] | modes["exclusive"])
        begun = database.begin(modes, given["lockTimeout"], given.get("waitForSync", False))
        return 201, {"error": False, "code": 201, "result": {"id": str(begun.ident), "status": "running"}}

    def _put_transaction(self, database: Database, rest: str, *_: Any) -> tuple[int, Any]:
        transaction = _open(database, rest)
        database.commit(transaction)
        self.synced.append(transaction.waits_for_sync)
        return 200, {"error": False, "code": 200, "result": {"id": rest, "status": "committed"}}

    def _delete_transaction(self, database: Database, rest: str, *_: Any) -> tuple[int, Any]:
        database.end(_open(database, rest))
        return 200, {"error": False, "code": 200, "result": {"id": rest, "status": "aborted"}}

    def _post_cursor(
        self, database: Database, rest: str, parameters: Any, given: Any, transaction: str | None, may_write: bool
    ) -> tuple[int, Any]:
        if rest:
            return 200, self._page(database, rest)
        _only(given, QUERY_FIELDS)
        query = read(given["query"])
        self._may_write(may_write, query.writes)
        if transaction is not None:
            found = query.run(_open(database, transaction), given.get("bindVars", {}))
        else:
            with database.alone(query.reads, query.writes, query.exclusive) as one:
                found = query.run(one, given.get("bindVars", {}))
            self.synced += [query.waits_for_sync] if query.writes else []
        size = given.get("batchSize", 1000)
        pages = [found[start : start + size] for start in range(0, len(found), size)] or [[]]
        ident = str(next(database.numbers))
        database.cursors[ident] = pages
        return 201, {**self._page(database, ident), "code": 201}

    def _page(self, database: Database, ident: str) -> Row:
        if ident not in database.cursors:
            raise Refused(1600, "cursor not found")
        pages = database.cursors[ident]
        page, more = pages.pop(0), bool(pages)
        if not more:
            del database.cursors[ident]
        answer = {"error": False, "code": 200, "result": page, "hasMore": more, "cached": False, "extra": {}}
        return {**answer, "id": ident} if more else answer

    def _may_write(self, may_write: bool, names: Iterable[str]) -> None:
        if names and not may_write:
            raise Refused(11, "insufficient permissions")
        if names and self.read_only:
            raise Refused(1004, "server is in read-only mode", 403)


def _open(database: Database, ident: str) -> Transaction:
    found = database.open.get(int(ident))
    if found is None:
        raise Refused(1655, f"transaction {ident!r} not found")
    return found


def _only(given: Any, known: set[str]) -> None:
    if not isinstance(given, dict) or not set(given) <= known:
        raise Refused(400, f"fields that are not known: {sorted(set(given) - known)}")


def _json(body: bytes) -> Any:
    def refuse(word: str) -> None:
        raise Refused(600, f"{word} is no JSON")

    try:
        given = json.loads(body, parse_constant=refuse) if body else None
        json.dumps(given, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except ValueError as error:
        raise Refused(600, f"cannot parse JSON: {error}") from error
    return given


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────


class _Server(ThreadingMixIn, TCPServer):
    """A thread a connection; without HTTPServer's look-up of its own name."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        self.connections: set[Any] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close what clients have open, as a server does that ends."""
        for request in list(self.connections):
            self.shutdown_request(request)


def _handler(double: ArangoDouble) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1
        disable_nagle_algorithm = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = double.answer(self.command, self.path, headers, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json; charset=utf-8")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: Any) -> None: ...

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):
                return  # it was hung up

    return Handler
