"""The voters as operators meet them: the routes of the coordinator, and `nexus coordinator …` over a real server."""

import json
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from actors.coordinator import START_SECONDS
from cluster import backup, bootstrap
from cluster.client import Absent
from cluster.raft import NOBODY, Members, Role, Snapshot, Status
from deployments import cli
from deployments.gateway import build
from nexus.errors import ConfigError, Conflict, InvalidRequest, NexusError, NotFound, Unavailable
from tests import browsing
from tests.conftest import Door
from tests.test_backup import FILE, SNAPSHOT, contents, seats
from tests.test_bootstrap import end, instance, start
from tests.test_gateway import check_problem


def voter(id: int, role: Role = Role.FOLLOWER, leader: int = 1, term: int = 4, **fields: Any) -> Status:
    some = Status(id, role, term, NOBODY, leader, 90, 90, 95, Members(frozenset({1, 2, 3}), frozenset({4})), {})
    return replace(some, **fields)


ALL_WELL = [voter(1, Role.LEADER), voter(2, commit=80, applied=70), voter(3, applied=89), voter(4)]
LEFT_ALONE = [voter(1, Role.PRE_CANDIDATE, NOBODY), Absent(2, "it does not answer"), Absent(3, "its disk is empty")]


class Operator:
    """Does nothing, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.orders: list[tuple[object, ...]] = []
        self.voters: list[Status | Absent] = list(ALL_WELL)
        self.kept = SNAPSHOT
        self.error: NexusError | None = None

    def _take(self, *order: object) -> None:
        self.orders.append(order)
        if self.error:
            raise self.error

    async def describe(self) -> list[Status | Absent]:
        self._take("describe")
        return self.voters

    async def add(self, id: int, labels: Mapping[str, str]) -> None:
        self._take("add", id, dict(labels))

    async def remove(self, id: int) -> None:
        self._take("remove", id)

    async def transfer(self, to: int) -> None:
        self._take("transfer", to)

    async def snapshot(self) -> Snapshot:
        self._take("snapshot")
        return self.kept


@pytest.fixture
def operator() -> Operator:
    return Operator()


@pytest.fixture
def app(door: Door, operator: Operator) -> ASGIApp:
    return build(replace(door.lent, operator=operator))


@pytest.fixture
def client(door: Door, app: ASGIApp) -> Iterator[TestClient]:
    with TestClient(app, headers=door.headers(), raise_server_exceptions=False) as client:
        yield client


# ── the routes ──────────────────────────────────────────────────────────────────────────────────

ROUTES: list[tuple[str, str, dict[str, Any] | None, tuple[object, ...]]] = [
    ("GET", "/coordinator", None, ("describe",)),
    ("POST", "/coordinator/voters", {"id": 5, "labels": {"rack": "b"}}, ("add", 5, {"rack": "b"})),
    ("DELETE", "/coordinator/voters/3", None, ("remove", 3)),
    ("POST", "/coordinator/transfer", {"to": 2}, ("transfer", 2)),
    ("POST", "/coordinator/snapshot", None, ("snapshot",)),
]
EACH_ROUTE = pytest.mark.parametrize(
    ("method", "path", "body", "order"), ROUTES, ids=["describe", "add", "remove", "transfer", "snapshot"]
)


def test_each_voter_is_described(client: TestClient, operator: Operator) -> None:
    operator.voters.append(Absent(5, "its disk is empty"))
    shown = client.get("/coordinator").json()
    common = {"term": 4, "leader": 1, "voters": [1, 2, 3]}
    assert shown == {
        "summary": "voter 1 leads 4 of 5 voters",
        "voters": [
            {"id": 1, "role": "leader", "commit": 90, "applied": 90, "lag": 0, **common},
            {"id": 2, "role": "follower", "commit": 80, "applied": 70, "lag": 20, **common},
            {"id": 3, "role": "follower", "commit": 90, "applied": 89, "lag": 1, **common},
            {"id": 4, "role": "learner", "commit": 90, "applied": 90, "lag": 0, **common},
            {"id": 5, "role": "absent", "why": "its disk is empty"},
        ],
    }


SUMMARIES: list[tuple[list[Status | Absent], str]] = [
    (LEFT_ALONE, "read-only: 1 of 3 voters"),
    ([voter(1, leader=3), voter(2, leader=3), Absent(3, "")], "read-only: 2 of 3 voters"),
    ([Absent(1, "it does not answer"), Absent(2, "it does not answer")], "away: 0 of 2 voters"),
    ([voter(1, Role.LEADER, term=4), voter(2, Role.LEADER, 2, term=5), voter(3)], "voter 2 leads 3 of 3 voters"),
    ([voter(1, Role.CANDIDATE, NOBODY)], "read-only: 1 of 1 voters"),
]


def test_a_few_words_say_what_they_can_do(client: TestClient, operator: Operator) -> None:
    for voters, summary in SUMMARIES:
        operator.voters = voters
        shown = client.get("/coordinator").json()
        assert shown["summary"] == summary and [one["id"] for one in shown["voters"]] == [one.id for one in voters]


@EACH_ROUTE
def test_what_is_asked_for_is_done_and_then_shown(
    client: TestClient, operator: Operator, method: str, path: str, body: object, order: tuple[object, ...]
) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == 200
    if order == ("snapshot",):
        assert answer.headers["content-type"] == "application/octet-stream"
        assert backup.read(answer.content) == replace(SNAPSHOT, members=Members(frozenset()))
        assert operator.orders == [order]
    else:
        assert operator.orders == ([order] if method == "GET" else [order, ("describe",)])
        assert answer.json() == client.get("/coordinator").json()


def test_labels_may_be_left_out(client: TestClient, operator: Operator) -> None:
    assert client.post("/coordinator/voters", json={"id": 5}).status_code == 200
    assert operator.orders[0] == ("add", 5, {})


@EACH_ROUTE
def test_who_may_not_is_refused_before_anything_is_asked(
    app: ASGIApp, door: Door, operator: Operator, method: str, path: str, body: object, order: tuple[object, ...]
) -> None:
    needed = "infer" if method == "GET" else "admin"
    others = {"infer", "admin", "documents:read", "documents:write"} - {needed}
    with TestClient(app, raise_server_exceptions=False) as client:
        for headers in ({}, {"authorization": "Bearer nx-nobody"}):
            check_problem(client.request(method, path, json=body, headers=headers), 401, path)
        refused = client.request(method, path, json=body, headers=door.headers("t", "n", *others))
        assert needed in check_problem(refused, 403, path)["detail"]
        assert operator.orders == []
        assert client.request(method, path, json=body, headers=door.headers("t", "n", needed)).status_code == 200
        assert operator.orders[0] == order


BAD_BODIES = [
    ("voters", {}, 422, "/id", "required"),
    ("voters", {"id": 0}, 422, "/id", "greater than or equal to 1"),
    ("voters", {"id": -1}, 422, "/id", "greater than or equal to 1"),
    ("voters", {"id": 2**53 + 1}, 422, "/id", "less than or equal to"),
    ("voters", {"id": 1.5}, 422, "/id", "integer"),
    ("voters", {"id": "four"}, 422, "/id", "integer"),
    ("voters", {"id": None}, 422, "/id", "integer"),
    ("voters", {"id": 5, "labels": ["rack=b"]}, 422, "/labels", "dictionary"),
    ("voters", {"id": 5, "labels": None}, 422, "/labels", "dictionary"),
    ("voters", {"id": 5, "labels": {"rack": 1}}, 422, "/labels/rack", "string"),
    ("voters", {"id": 5, "labels": {"rack": "x" * 256}}, 422, "/labels/rack", "255"),
    ("voters", {"id": 5, "lables": {}}, 400, "/lables", "not permitted"),
    ("voters", [5], 422, "", "dictionary"),
    ("voters", None, 422, "", "required"),
    ("transfer", {}, 422, "/to", "required"),
    ("transfer", {"to": 0}, 422, "/to", "greater than or equal to 1"),
    ("transfer", {"to": [2]}, 422, "/to", "integer"),
    ("transfer", {"id": 2}, 400, "/id", "not permitted"),
]


def test_a_body_that_cannot_be_meant_is_told_where_and_why(client: TestClient, operator: Operator) -> None:
    for route, body, status, pointer, words in BAD_BODIES:
        path = f"/coordinator/{route}"
        problem = check_problem(client.post(path, json=body), status, path)
        assert words in {one["pointer"]: one["detail"] for one in problem["errors"]}[pointer]
        assert words in problem["detail"]
    assert operator.orders == []


def test_a_number_that_no_voter_has_is_refused(client: TestClient, operator: Operator) -> None:
    for number in ("0", "-1", "three", "1.5", 2**53 + 1):
        path = f"/coordinator/voters/{number}"
        assert check_problem(client.delete(path), 422, path)["errors"][0]["pointer"] == "/number"
    assert operator.orders == []


def test_what_is_not_json_is_told_so(client: TestClient, operator: Operator) -> None:
    path = "/coordinator/transfer"
    for content, code in ((b"{", "malformed_json"), (b"to=2", "malformed_json"), (b"\xff", "invalid_request")):
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        assert check_problem(answer, 400, path)["code"] == code
    assert operator.orders == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Conflict("the number 5 has been used"), 409),
        (NotFound("there is no voter 3"), 404),
        (InvalidRequest("Invalid label key name", pointer="/labels"), 422),
        (Unavailable("the coordinator does not answer: read-only: 1 of 3 voters"), 503),
        (ConfigError("voters.json is damaged"), 500),
    ],
    ids=lambda one: one.code if isinstance(one, NexusError) else str(one),
)
def test_why_it_cannot_be_done_reaches_the_caller(
    client: TestClient, operator: Operator, error: NexusError, status: int
) -> None:
    operator.error = error
    for method, path, body, order in ROUTES:
        operator.orders.clear()
        answer = client.request(method, path, json=body)
        problem = check_problem(answer, status, path)
        assert (problem["detail"], problem["code"]) == (error.message, error.code)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert operator.orders == [order]


def test_without_a_coordinator_it_is_told_so(door: Door) -> None:
    for method, path, body, _ in ROUTES:
        answer = door.client.request(method, path, json=body, headers=door.headers())
        assert "has no coordinator" in check_problem(answer, 503, path)["detail"]


# ── the command line ────────────────────────────────────────────────────────────────────────────

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the command line alone; nothing answers at its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("NEXUS_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def nexus(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `nexus coordinator …`: exit code, what it printed, what it complained of."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nexus", "coordinator", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def served(app: ASGIApp, door: Door, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The front door on a port, and the command line's way to it."""
    with browsing.gateway(app) as url:
        monkeypatch.setenv("NEXUS_URL", url)
        monkeypatch.setenv("NEXUS_API_KEY", door.headers()["authorization"].removeprefix("Bearer "))
        yield


@contextmanager
def answering(patch: pytest.MonkeyPatch, content: bytes, length: int) -> Iterator[None]:
    """A server that answers everything with this content, and calls it so long."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(length))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        patch.setenv("NEXUS_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            yield
        finally:
            server.shutdown()
            serving.join()


def is_complaint(code: int, out: str, err: str, words: str) -> bool:
    """One line on stderr, and exit code 1."""
    return code == 1 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("voters", "code"), [(ALL_WELL, 0), (LEFT_ALONE, 1), ([Absent(1, "away")], 1)])
def test_the_exit_code_says_whether_one_leads(
    nexus: Command, operator: Operator, voters: list[Status | Absent], code: int
) -> None:
    operator.voters = voters
    told, out, err = nexus("status", "--json")
    assert (told, err) == (code, "")
    shown = json.loads(out)
    assert [one["id"] for one in shown["voters"]] == [one.id for one in voters]
    told, out, err = nexus("status")
    assert (told, err) == (code, "")
    first, *rest = out.splitlines()
    assert first.split() == ["coordinator", *shown["summary"].split()]
    assert [line.split()[:2] for line in rest] == [["voter", str(one.id)] for one in voters]


@pytest.mark.usefixtures("served")
def test_a_voter_is_one_line(nexus: Command, operator: Operator) -> None:
    operator.voters = [voter(2, applied=70), LEFT_ALONE[2]]
    lines = [" ".join(line.split()) for line in nexus("status")[1].splitlines()]
    assert lines == [
        "coordinator read-only: 1 of 2 voters",
        "voter 2 follower term 4, commit 90, lag 20",
        "voter 3 absent: its disk is empty",
    ]


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (("add", 5), ("add", 5, {})),
        (("add", 5, "--label", "rack=b", "--label", "in=x=y"), ("add", 5, {"rack": "b", "in": "x=y"})),
        (("remove", 3), ("remove", 3)),
        (("transfer", 2), ("transfer", 2)),
    ],
)
def test_an_order_is_given_and_the_voters_shown(
    nexus: Command, operator: Operator, arguments: tuple[object, ...], order: tuple[object, ...]
) -> None:
    code, out, err = nexus(*arguments)
    assert (code, err) == (0, "") and "voter 1 leads 4 of 4 voters" in out
    assert operator.orders == [order, ("describe",)]


@pytest.mark.usefixtures("served")
def test_what_the_voters_refuse_is_told_in_a_line(nexus: Command, operator: Operator, tmp_path: Path) -> None:
    for error in (Conflict("it was used"), NotFound("no such voter"), Unavailable("none answers")):
        operator.error = error
        for arguments in (("status",), ("add", 5), ("remove", 3), ("transfer", 2), ("snapshot", tmp_path / "file")):
            assert is_complaint(*nexus(*arguments), words=error.message)
    assert not (tmp_path / "file").exists()


@pytest.mark.usefixtures("served")
def test_a_voter_has_time_to_start(nexus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hangs up before the answer never learns why a voter did not start."""
    patience: list[float | None] = []

    def send(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        patience.append(request.extensions["timeout"]["read"])
        return real(self, request, **options)

    real = httpx.Client.send
    monkeypatch.setattr(httpx.Client, "send", send)
    assert nexus("add", 5)[0] == 0
    assert len(patience) == 1 and (patience[0] is None or patience[0] >= 2 * START_SECONDS)


@pytest.mark.parametrize("labels", [["rack"], ["=b"], ["rack="], [""], ["="], ["rack=b", "x"], ["rack=b", "rack=c"]])
def test_a_label_given_wrongly_is_refused_before_anything_is_asked(nexus: Command, labels: list[str]) -> None:
    options = [part for label in labels for part in ("--label", label)]
    assert is_complaint(*nexus("add", 5, *options), words="KEY=VALUE")


@pytest.mark.parametrize("arguments", [("add", "0"), ("add", "x"), ("add",), ("remove", "1.5"), ("transfer",), ("go",)])
def test_what_cannot_be_meant_is_usage(nexus: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = nexus(*arguments)
    assert (code, out) == (2, "") and "Usage" in err


@pytest.mark.parametrize("arguments", [("status",), ("status", "--json"), ("add", 5), ("snapshot", "file")])
def test_where_no_nexus_is_it_says_so(nexus: Command, arguments: tuple[object, ...]) -> None:
    assert is_complaint(*nexus(*arguments), words="no Nexus answers")
    assert not Path("file").exists()


def test_another_server_at_that_address_is_no_nexus(nexus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    page = b"<html>sign in</html>"
    with answering(monkeypatch, page, len(page)):
        assert is_complaint(*nexus("status"), words="not one of Nexus")


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("before", [None, b"an older one, and longer than the new one" * 100])
def test_a_snapshot_is_a_file_that_can_be_restored(nexus: Command, tmp_path: Path, before: bytes | None) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    file = folder / "coordinator.snapshot"
    if before is not None:
        file.write_bytes(before)
    code, out, err = nexus("snapshot", file)
    assert (code, err) == (0, "") and out == f"{file}: {len(FILE)} bytes\n"
    assert contents(folder) == {file.name: FILE}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600  # as the voters' own disks


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere/file", "No such file"), ("folder", "Is a directory"), ("file/file", "Not a directory"), (".", "")],
)
def test_a_place_where_no_file_can_be_is_told_so(
    nexus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "work" / "folder").mkdir(parents=True)
    (tmp_path / "work" / "file").touch()
    monkeypatch.chdir(tmp_path / "work")
    assert is_complaint(*nexus("snapshot", name), words=f"cannot be written: {words}")
    assert {one.name for one in tmp_path.joinpath("work").rglob("*")} == {"folder", "file"}


@pytest.mark.parametrize(
    ("content", "length"),
    [
        (FILE[:-1], len(FILE)), (b"", len(FILE)), (FILE[:-1], len(FILE) - 1), (FILE[:-1] + b"\0", len(FILE)), (b"", 0),
        (b"<html>sign in</html>", 20),
    ],
)  # fmt: skip
def test_what_came_by_half_replaces_nothing(
    nexus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, length: int
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "old").write_bytes(FILE)
    with answering(monkeypatch, content, length):
        for name in ("old", "new"):
            assert is_complaint(*nexus("snapshot", folder / name), words="")
    assert contents(folder) == {"old": FILE}


# Restoring


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    file = tmp_path / "kept.snapshot"
    file.write_bytes(FILE)
    return file


def test_a_coordinator_begins_from_a_file(nexus: Command, home: Path, kept: Path) -> None:
    code, out, err = nexus("restore", kept)
    assert (code, err) == (0, "") and "next `nexus up`" in out and "kept in" not in out
    before = contents(home / "coordinator")
    code, out, err = nexus("restore", kept)
    (aside,) = home.glob("coordinator.*")
    assert (code, err) == (0, "") and f"is kept in {aside}" in out
    assert contents(aside) == before
    assert kept.read_bytes() == FILE


def test_the_voters_of_the_settings_were_used_wherever_their_disks_are(
    nexus: Command, home: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next `nexus up` refuses: it names voters that the register does not know."""
    monkeypatch.setenv("NEXUS_COORDINATOR__VOTERS", '{"1": {}, "2": {}, "3": {}}')
    assert nexus("restore", kept)[0] == 0
    held = seats(home / "coordinator")
    assert {id: seat["is_retired"] for id, seat in held.items()} == {"1": True, "2": True, "3": True, "4": False}


def a_home_in_use(home: Path) -> None:
    (home / "coordinator").mkdir(parents=True)
    (home / "coordinator" / "voters.json").write_text('{"1": {"identity": "x", "is_founded": true}}')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"), (b"", "no snapshot of a coordinator"), (b"PK", "no snapshot of a"),
        (FILE[:-1], "damaged or not whole"), (FILE + b"\0", "damaged or not whole"),
        (FILE[:100] + b"\0" + FILE[101:], "damaged or not whole"),
        (backup.write(replace(SNAPSHOT, data=b"\x91\x02")), "another version"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_restored_changes_nothing(
    nexus: Command, home: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    a_home_in_use(home)
    before = contents(home / "coordinator")
    if content is not None:
        (tmp_path / "given").write_bytes(content)
    assert is_complaint(*nexus("restore", tmp_path / "given"), words=words)
    assert is_complaint(*nexus("restore", tmp_path), words="cannot be read: Is a directory")
    assert contents(home / "coordinator") == before and not list(home.glob("coordinator.*"))


def test_a_damaged_register_is_told_in_a_line(nexus: Command, home: Path, kept: Path) -> None:
    a_home_in_use(home)
    (home / "coordinator" / "voters.json").write_text("{")
    assert is_complaint(*nexus("restore", kept), words="voters.json")
    assert not list(home.glob("coordinator.*"))


def test_nothing_is_restored_while_nexus_runs(nexus: Command, home: Path, kept: Path) -> None:
    a_home_in_use(home)
    bootstrap.prepare_home(home)
    before = contents(home / "coordinator")
    child = start(start_new_session=True)
    bootstrap._record(home, instance(session=child.pid))
    assert is_complaint(*nexus("restore", kept), words="`nexus down` first")
    end(child)
    with bootstrap.lock_home(home):
        assert is_complaint(*nexus("restore", kept), words="under way")
    assert contents(home / "coordinator") == before and not list(home.glob("coordinator.*"))
    assert nexus("restore", kept)[0] == 0
