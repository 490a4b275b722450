"""A strict double of an Anvil: its REST API over TLS on loopback, its objective language, and its gateway in a share.

It knows what the vendor's open clients send and nothing else: an unknown route, field, parameter or word, a request
without a session, an objective that was not validated first, all are refused and kept in `violations`.
"""

import json
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

BASE = "/mgmt/v1.2/rest"
USER, PASSWORD = "nexus", "correct horse battery staple"
SLOS = frozenset({"keep-online", "place-on-object-volumes", "place-on-shared-object-volumes", "place-on-second-site"})

# The language of objectives

Scene = Mapping[str, Any]  # a file as an expression sees it: path, size, last_use_age (seconds), keywords, tags
Test = Callable[[Scene], bool]

TOKEN = re.compile(r'\s*(?:(?P<text>"[^"\\]*")|(?P<number>\d+)|(?P<name>[A-Z_]+)|(?P<sign>==|!=|[<>{}(),*!]))')
SIZES = {"KB": 10**3, "MBYTES": 10**6}
AGES = {"HOUR": 3600, "HOURS": 3600, "DAYS": 86400}
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: bool(a < b), ">": lambda a, b: bool(a > b),
    "==": lambda a, b: bool(a == b), "!=": lambda a, b: bool(a != b),
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What an expression says: these SLOs where the test holds."""

    holds: Test
    slos: tuple[str, ...]


def parse(expression: str) -> Rule:
    """Raises ValueError for what is not of the language, as far as the vendor has shown it."""
    return _Reader(expression).rule()


class _Reader:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            found = TOKEN.match(text, at)
            if found is None:
                raise ValueError(f"nothing begins with {text[at : at + 10]!r}")
            self.tokens.append((found.lastgroup or "", found[found.lastgroup or 0]))
            at = found.end()

    def take(self, *wanted: str, kind: str = "") -> str:
        """The next token, which is one of these or of this kind."""
        if not self.tokens:
            raise ValueError("it ends too early")
        of_kind, text = self.tokens.pop(0)
        if (kind and of_kind != kind) or (wanted and text not in wanted):
            raise ValueError(f"{text!r} is not expected")
        return text

    def next(self) -> str:
        return self.tokens[0][1] if self.tokens else ""

    def rule(self) -> Rule:
        self.take("IF")
        holds = self.either()
        self.take("THEN")
        self.take("{")
        slos = [self.slo()]
        while self.next() == ",":
            self.take(",")
            slos.append(self.slo())
        self.take("}")
        if self.tokens:
            raise ValueError(f"nothing follows a rule, not {self.next()!r}")
        return Rule(holds, tuple(slos))

    def slo(self) -> str:
        self.take("SLO")
        name = self.argument()
        if name not in SLOS:
            raise ValueError(f"there is no SLO {name!r}")
        return name

    def argument(self) -> str:
        self.take("(")
        text = self.take(kind="text")[1:-1]
        self.take(")")
        return text

    def either(self) -> Test:
        parts = [self.both()]
        while self.next() == "OR":
            self.take("OR")
            parts.append(self.both())
        return lambda scene: any(part(scene) for part in parts)

    def both(self) -> Test:
        parts = [self.one()]
        while self.next() == "AND":
            self.take("AND")
            parts.append(self.one())
        return lambda scene: all(part(scene) for part in parts)

    def one(self) -> Test:
        if self.next() == "!":
            self.take("!")
            part = self.one()
            return lambda scene: not part(scene)
        if self.next() == "(":
            self.take("(")
            part = self.either()
            self.take(")")
            return part
        return self.test(self.take(kind="name"))

    def test(self, name: str) -> Test:
        if name == "IS_FILE":
            return lambda scene: True
        if name == "HAS_KEYWORD":
            keyword = self.argument()
            return lambda scene: keyword in scene["keywords"]
        if name == "FNMATCH":
            self.take("(")
            pattern = self.take(kind="text")[1:-1]
            self.take(",")
            self.take("PATH")
            self.take(")")
            return lambda scene: fnmatchcase(scene["path"], pattern)
        if name == "GET_TAG":
            key = self.argument()
            if self.next() not in ("==", "!="):
                return lambda scene: key in scene["tags"]
            compare = SIGNS[self.take("==", "!=")]
            text = self.take(kind="text")[1:-1]
            return lambda scene: compare(scene["tags"].get(key), text)
        if name in ("SIZE", "LAST_USE_AGE"):
            compare = SIGNS[self.take(kind="sign")]
            number = self.quantity(SIZES if name == "SIZE" else AGES, name == "LAST_USE_AGE")
            return lambda scene: compare(scene[name.lower()], number)
        raise ValueError(f"{name!r} is no word of this language")

    def quantity(self, units: Mapping[str, int], needs_unit: bool) -> int:
        number = int(self.take(kind="number"))
        if self.next() == "*":
            self.take("*")
            return number * units[self.take(*units)]
        if self.next() in units:
            return number * units[self.take(*units)]
        if needs_unit:
            raise ValueError("an age has a unit")
        return number


# The REST API


@dataclass
class Refused(Exception):
    status: int
    why: str


@dataclass
class Double:
    """What the Anvil has, how it was used, and how it is to misbehave."""

    port: int = 0
    shares: dict[str, dict[str, Any]] = field(default_factory=dict)
    objectives: dict[str, str] = field(default_factory=dict)
    validated: set[str] = field(default_factory=set)
    tasks: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # (status, message), the last one stays
    applied: list[tuple[str, str, str]] = field(default_factory=list)  # (share, path, objective)
    asked: list[str] = field(default_factory=list)  # "METHOD /path", in order
    violations: list[str] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)
    logins: int = 0
    as_tasks: list[list[tuple[str, str]]] = field(default_factory=list)  # what the next changes become, in place of 200
    broken: list[tuple[int, bytes]] = field(default_factory=list)  # what the next requests are answered

    def add_share(self, name: str, path: str | None = None) -> None:
        self.shares[name] = {
            "uoid": {"uuid": f"uuid-of-{name}", "objectType": "SHARE"}, "name": name, "path": path or f"/{name}",
            "comment": "", "extendedInfo": {}, "shareState": "PUBLISHED", "exportOptions": [], "shareSizeLimit": None,
            "space": {"total": "64393052160", "used": "0", "available": "63909851136", "percent": 0},
        }  # fmt: skip

    def show_share(self, name: str) -> dict[str, Any]:
        of_root = [objective for share, path, objective in self.applied if (share, path) == (name, "/")]
        return {**self.shares[name], "objectives": {"appliedObjectives": [{"name": one} for one in of_root]}}

    def forget_sessions(self) -> None:
        self.sessions.clear()

    def placed(self, share: str, path: str, scene: Scene) -> set[str]:
        """The SLOs that a file is under: those of what is applied at its own path and at the root."""
        rules = [parse(self.objectives[o]) for s, at, o in self.applied if s == share and at in ("/", path)]
        return {slo for rule in rules if rule.holds(scene) for slo in rule.slos}

    # What it answers: (status, body, location)

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any, str]:
        parts = [unquote(part) for part in path.removeprefix("/").split("/")]
        match (method, *parts):
            case ("GET", "cntl", "state"):
                return self._only(query, {}) or (200, {"name": "cluster", "portalFloatingIps": []}, "")
            case ("GET", "shares"):
                return self._only(query, {}) or (200, [self.show_share(name) for name in self.shares], "")
            case ("GET", "shares", name):
                self._only(query, {})
                self._require(name in self.shares, 404, "no such share", at_fault=False)
                return 200, self.show_share(name), ""
            case ("POST", "shares"):
                return self._create_share(query, body)
            case ("POST", "shares", name, "objective-set" | "objective-unset" as how):
                return self._apply(how, name, query, body)
            case ("GET", "objectives"):
                listed = [{"name": name, "expression": text} for name, text in self.objectives.items()]
                return self._only(query, {}) or (200, listed, "")
            case ("GET", "objectives", "validate", expression):
                return self._validate(query, expression)
            case ("POST", "objectives"):
                return self._create_objective(query, body)
            case ("GET", "tasks", uuid):
                self._only(query, {})
                self._require(uuid in self.tasks, 404, "no such task")
                steps = self.tasks[uuid]
                status, message = steps.pop(0) if len(steps) > 1 else steps[0]
                return 200, {"uuid": uuid, "name": "work", "status": status, "statusMessage": message}, ""
        raise self._violation(404, f"there is no {method} {path}")

    def _create_share(self, query: dict[str, str], body: Any) -> tuple[int, Any, str]:
        self._only(query, {"create-path": "true"})
        wanted = {"name", "path", "comment", "extendedInfo", "exportOptions"}
        self._require(isinstance(body, dict) and set(body) == wanted, 400, "unknown or missing fields of a share")
        self._require(body["name"] not in self.shares, 400, "the share exists", at_fault=False)
        self._require(body["path"].startswith("/"), 400, "a path begins with a slash")
        steps = self.as_tasks.pop(0) if self.as_tasks else [("EXECUTING", ""), ("COMPLETED", "")]
        if steps[-1][0] == "COMPLETED":
            self.add_share(body["name"], body["path"])
        return self._task(steps)

    def _apply(self, how: str, share: str, query: dict[str, str], body: Any) -> tuple[int, Any, str]:
        self._require(set(query) == {"path", "objective-identifier"} and body is None, 400, "unknown parameters")
        self._require(share in self.shares, 404, "no such share", at_fault=False)
        self._require(query["path"].startswith("/"), 400, "a path begins with a slash")
        name = query["objective-identifier"]
        self._require(name in self.objectives, 404, "no such objective", at_fault=how == "objective-set")
        order = (share, query["path"], name)
        steps = self.as_tasks.pop(0) if self.as_tasks else None
        if steps is None or steps[-1][0] == "COMPLETED":
            self.applied = [one for one in self.applied if one != order] + ([order] if how == "objective-set" else [])
        return (200, None, "") if steps is None else self._task(steps)

    def _validate(self, query: dict[str, str], expression: str) -> tuple[int, Any, str]:
        self._only(query, {})
        try:
            parse(expression)
        except (ValueError, KeyError) as error:
            raise Refused(400, json.dumps({"message": f"Invalid expression: {error}"})) from None
        self.validated.add(expression)
        return 200, None, ""

    def _create_objective(self, query: dict[str, str], body: Any) -> tuple[int, Any, str]:
        self._only(query, {})
        wanted = {"name", "comment", "expression", "basic", "extendedInfo"}
        self._require(isinstance(body, dict) and set(body) == wanted, 400, "unknown or missing fields of an objective")
        self._require(body["basic"] is False and body["extendedInfo"] == {"isAdvanced": "true"}, 400, "not advanced")
        self._require(body["expression"] in self.validated, 400, "an expression is validated first")
        self._require(body["name"] not in self.objectives, 400, "the objective exists")
        self.objectives[body["name"]] = body["expression"]
        return 200, {"name": body["name"], "expression": body["expression"]}, ""

    def _task(self, steps: list[tuple[str, str]]) -> tuple[int, Any, str]:
        uuid = f"a59ad344-6f1a-4ef2-b1e2-{len(self.tasks):012d}"
        self.tasks[uuid] = list(steps)
        return 202, None, f"https://somewhere.else.invalid:8443{BASE}/tasks/{uuid}"

    def _only(self, query: dict[str, str], wanted: dict[str, str]) -> None:
        self._require(query == wanted, 400, f"parameters {query} where {wanted} were expected")

    def _require(self, holds: bool, status: int, why: str, at_fault: bool = True) -> None:
        if not holds:
            raise self._violation(status, why) if at_fault else Refused(status, why)

    def _violation(self, status: int, why: str) -> Refused:
        self.violations.append(why)
        return Refused(status, why)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Server"

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what was asked is in `asked`."""

    def _serve(self, method: str) -> None:
        double = self.server.double
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = urlsplit(self.path)
        with self.server.lock:
            try:
                status, body, headers = self._answer(double, method, parts.path, parts.query, raw)
            except Refused as refused:
                status, body, headers = refused.status, refused.why.encode(), {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _answer(
        self, double: Double, method: str, path: str, query: str, raw: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        if not path.startswith(f"{BASE}/"):
            raise double._violation(404, f"there is nothing at {path}")
        path = path.removeprefix(BASE)
        double.asked.append(f"{method} {path}")
        if self.headers.get("accept") != "application/json":
            raise double._violation(406, "it has to accept application/json")
        if (method, path) == ("POST", "/login"):
            return self._log_in(double, query, raw)
        cookie = self.headers.get("cookie", "")
        if not cookie:
            raise double._violation(401, f"{method} {path} without a session")
        if cookie.removeprefix("JSESSIONID=") not in double.sessions:
            raise Refused(401, "the session is over")
        if double.broken:
            status, body = double.broken.pop(0)
            return status, body, {}
        kind = self.headers.get("content-type")
        if bool(raw) != (kind == "application/json"):
            raise double._violation(415, f"a body of kind {kind}")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        if len(dict(pairs)) != len(pairs):
            raise double._violation(400, "a parameter twice")
        status, found, location = double.answer(method, path, dict(pairs), json.loads(raw) if raw else None)
        body = b"" if found is None else json.dumps(found).encode()
        return status, body, {"Location": location} if location else {}

    def _log_in(self, double: Double, query: str, raw: bytes) -> tuple[int, bytes, dict[str, str]]:
        if query or self.headers.get("content-type") != "application/x-www-form-urlencoded":
            raise double._violation(400, "a login is a form")
        form = dict(parse_qsl(raw.decode()))
        if set(form) != {"username", "password"}:
            raise double._violation(400, f"a login with {sorted(form)}")
        double.logins += 1
        if form != {"username": USER, "password": PASSWORD}:
            raise Refused(401, f"no {form['username']} with the password {form['password']}")
        session = f"session-{double.logins:08d}-of-this-double"
        double.sessions.add(session)
        return 200, b"{}", {"Set-Cookie": f"JSESSIONID={session}; Path={BASE}; Secure; HttpOnly"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, double: Double) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.double = double
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not trust this server, or has gone, is no event."""


@contextmanager
def running(certificates: ssl.SSLContext) -> Iterator[Double]:
    """A double on a port of its own, which shows these certificates."""
    double = Double()
    server = _Server(double)
    server.socket = certificates.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    double.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# The gateway in a mounted share


@contextmanager
def gateway(folder: Path, work_id: int, answers: Mapping[str, str]) -> Iterator[list[str]]:
    """The file that a share has for commands, as a named pipe: what is written is a question, then it is read.

    `answers` has what each question's file is told. Yields the commands that were written.
    """
    pipe = folder / f".fs_command_gateway {hex(work_id)}"
    os.mkfifo(pipe)
    asked: list[str] = []

    def serve() -> None:
        command = pipe.read_text()
        if command:
            asked.append(command)
            with suppress(BrokenPipeError):  # who asked reads no more than it wants
                pipe.write_text(answers[command.removeprefix("./").partition("?.")[0]])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        if thread.is_alive() and not asked:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # nobody asked: the reader is let go
        thread.join()
        pipe.unlink()
