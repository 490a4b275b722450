"""The matrix of who may do what: whole, without a leak, and not blind: leaks that are planted are named."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket
from threading import Thread
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner

from deployments import authz, authz_live, gateway, middleware
from deployments.cli import app
from deployments.gateway import Lent
from deployments.routes import caller
from nexus.access import MOST_PER_MINUTE, KeyRing
from nexus.errors import Forbidden, Unavailable
from nexus.sessions import Sessions
from nexus.stores.sqlite import SqliteDocuments
from nexus.types import Principal
from tests.conftest import Door
from tests.routes import ROUTES


@pytest.fixture(scope="module")
def cells() -> list[authz.Cell]:
    return authz.check()


def test_API1_API5_nothing_leaks(cells: list[authz.Cell]) -> None:
    assert not [(str(cell.route), cell.role, cell.whose, cell.status, cell.leak) for cell in cells if cell.leak]


def test_every_route_was_tried_as_everybody_on_everything(cells: list[authz.Cell]) -> None:
    tried = {(str(cell.route), cell.role, cell.whose) for cell in cells}
    assert len(tried) == len(cells)
    for route in ROUTES:
        owners = ("own", "foreign") if route.names_something else ("own",)
        assert {(str(route), role, whose) for role in authz.ROLES for whose in owners} <= tried


def test_what_may_be_done_was_done(cells: list[authz.Cell]) -> None:
    """The matrix means something only where somebody is let in."""
    let_in = {str(cell.route) for cell in cells if cell.status < 300}
    assert {
        "GET /rag/documents/{document_id}", "DELETE /rag/documents/{document_id}", "GET /rag/jobs/{job_id}",
        "DELETE /rag/jobs/{job_id}", "POST /rag/search", "POST /rag/query", "POST /v1/chat/completions",
        "POST /rag/add_document", "POST /rag/jobs", "POST /mcp/{session_id:path}/add_context", "POST /rag/vacuum",
        "POST /v1/embeddings", "POST /execute", "POST /mcp/{session_id:path}/query",
    } <= let_in  # fmt: skip
    by = {(str(cell.route), cell.role, cell.whose): cell.status for cell in cells}
    document = "GET /rag/documents/{document_id}"
    assert [by[document, role, "own"] for role in authz.ROLES] == [401, 200, 200, 403, 200, 200]
    assert [by[document, role, "foreign"] for role in authz.ROLES] == [401, 404, 404, 403, 404, 404]


def leaks(prefix: str) -> dict[tuple[str, str, str], str]:
    return {(str(c.route), c.role, c.whose): c.leak for c in authz.check(prefix=prefix) if c.leak}


def test_a_permission_that_is_not_looked_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "demand", lambda *_: None)
    found = leaks("/rag/vacuum")
    assert {role for _, role, _ in found} == {"reader", "writer", "infer-only"}
    assert set(found.values()) == {"open to who lacks admin"}


def test_a_door_that_is_open_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "demand", lambda *_: None)

    async def let_in(self: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["state"]["principal"] = Principal(authz.OURS, "anybody", frozenset())
        await self.app(scope, receive, send)

    monkeypatch.setattr(middleware.Identity, "__call__", let_in)
    assert leaks("/rag/deletions")["GET /rag/deletions", "none", "own"] == "open to who has no credential"


def test_another_tenants_document_that_is_shown_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    current = SqliteDocuments.current

    def of_anybody(self: SqliteDocuments, document_id: str, principal: Principal) -> Any:
        found = [current(self, document_id, Principal(tenant, "x", frozenset())) for tenant in authz.TENANTS]
        return next((one for one in found if one), None)

    monkeypatch.setattr(SqliteDocuments, "current", of_anybody)
    found = leaks("/rag/documents/")
    assert found["GET /rag/documents/{document_id}", "reader", "foreign"] == "shows what is another tenant's"


def test_a_document_that_a_stranger_deletes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    delete = SqliteDocuments.delete

    def for_anybody(self: SqliteDocuments, document_ids: Any, principal: Principal) -> Any:
        for tenant in authz.TENANTS:
            delete(self, document_ids, Principal(tenant, "x", frozenset()))
        return []

    monkeypatch.setattr(SqliteDocuments, "delete", for_anybody)
    found = leaks("/rag/documents/")
    assert found["DELETE /rag/documents/{document_id}", "writer", "foreign"] == "a stranger deleted a document"


def test_a_session_that_tenants_share_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    context, clear = Sessions.context, Sessions.clear
    everybody = Principal("everybody", "x", frozenset())
    monkeypatch.setattr(Sessions, "context", lambda self, principal, id: context(self, everybody, id))
    monkeypatch.setattr(Sessions, "clear", lambda self, principal, id: clear(self, everybody, id))
    add = Sessions.add_context
    monkeypatch.setattr(Sessions, "add_context", lambda self, principal, id, text: add(self, everybody, id, text))
    found = leaks("/mcp/{session_id")
    assert "shows what is another tenant's" in found.values()


Handler = Callable[..., Any]


def planted(monkeypatch: pytest.MonkeyPatch, path: str, handler: Handler) -> dict[tuple[str, str, str], str]:
    """The leaks of the matrix below /leaky, once the router has this route too."""
    build = gateway.application

    def with_one_more(lent: Lent) -> FastAPI:
        made = build(lent)
        made.add_api_route(path, handler)
        return made

    monkeypatch.setattr(gateway, "application", with_one_more)
    return leaks("/leaky")


def test_API1_a_new_route_that_answers_own_and_foreign_alike_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def alike(document_id: str, principal: Principal = caller.permit("documents:read")) -> dict[str, bool]:
        return {"is_there": True}

    found = planted(monkeypatch, "/leaky/{document_id}", alike)
    let_in = {role for role, known in authz.ROLES.items() if known and "documents:read" in known[1]}
    assert found == {
        ("GET /leaky/{document_id}", role, "foreign"): "another tenant's thing is there" for role in let_in
    }


def test_API1_a_new_route_that_forbids_what_is_foreign_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is not there it says 404: so 403 tells that it is."""

    async def telling(job_id: str, principal: Principal = caller.permit("documents:read")) -> None:
        raise Forbidden("it is not yours")

    found = planted(monkeypatch, "/leaky/{job_id}", telling)
    assert found["GET /leaky/{job_id}", "reader", "foreign"] == "says that another tenant's thing is there"


def test_API5_a_new_route_without_a_permission_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def bare() -> None: ...

    found = planted(monkeypatch, "/leaky", bare)
    assert set(found.values()) == {"asks for no permission"} and len(found) == len(authz.ROLES) - 1


def test_API1_every_parameter_of_a_path_is_known_to_be_a_tenants_or_not() -> None:
    """A route by a new kind of thing is tried as its owner and as a stranger only if the matrix knows whose it is."""
    named = {name for route in ROUTES for name in re.findall(r"{(\w+)", route.path)}
    assert named <= {*authz.OF_A_TENANT, *authz.OF_ALL}
    assert set(authz.OF_A_TENANT) <= named and not set(authz.OF_A_TENANT) & set(authz.OF_ALL)


@pytest.fixture
def served(door: Door) -> Iterator[str]:
    """The URL of a door on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(door.client.app, lifespan="off", log_config=None))
    with socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_the_one_that_runs_is_tried_and_left_as_it_was(door: Door, served: str) -> None:
    home = Path(door.lent.config.home)
    cells = authz.check(authz_live.running(served, home), "/rag")
    assert not [(str(cell.route), cell.role, cell.whose, cell.status, cell.leak) for cell in cells if cell.leak]
    by = {(str(cell.route), cell.role, cell.whose): cell.status for cell in cells}
    document = "/rag/documents/{document_id}"
    assert [by[f"GET {document}", role, "foreign"] for role in authz.ROLES] == [401, 404, 404, 403, 404, 404]
    assert by[f"DELETE {document}", "writer", "foreign"] == 404
    assert (f"DELETE {document}", "writer", "own") not in by and ("POST /rag/vacuum", "admin", "own") not in by
    for tenant in authz.TENANTS:
        assert door.client.get("/rag/documents", headers=door.headers(tenant)).json()["documents"] == []
    assert not [key for key in door.keys.list() if key.revoked_at is None and key.name != "tester"]


def test_tenants_with_a_session_of_one_name_are_no_leak(door: Door, served: str) -> None:
    """Who adds to a stranger's session adds to the one of that name in their own tenant; the next try begins anew."""
    cells = authz.check(authz_live.running(served, Path(door.lent.config.home)), "/mcp")
    assert "/mcp/{session_id:path}/add_context" in {c.route.path for c in cells if c.status == 200}
    assert not [(str(cell.route), cell.role, cell.whose, cell.status, cell.leak) for cell in cells if cell.leak]


def test_what_was_not_tried_has_its_column(door: Door, served: str) -> None:
    cells = authz.check(authz_live.running(served, Path(door.lent.config.home)), "/rag/documents")
    rows = {row[0]: row[1:] for row in authz.table(cells)}
    assert rows["DELETE /rag/documents/{document_id}"] == [
        "documents:write", "401/401", "403/403", "-/404", "403/403", "-/404", "-/404",
    ]  # fmt: skip


def test_the_installation_s_limit_of_a_key_is_not_that_of_the_check(tmp_path: Path) -> None:
    """In production 20 requests a minute are too few, and a 429 would pass for a refusal."""
    limits: list[int | None] = []

    async def look() -> None:
        async with authz_live.running("http://127.0.0.1:9", tmp_path) as world:
            limits.extend(KeyRing(tmp_path).verify(key).requests_per_minute for key in world.keys.values())

    asyncio.run(look())
    assert len(limits) == len(authz.ROLES) - 1 and set(limits) == {MOST_PER_MINUTE}


def test_one_that_does_not_answer_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no Nexus answers"):
        authz.check(authz_live.running("http://127.0.0.1:9", tmp_path), "/rag")


def test_the_command_prints_the_matrix(monkeypatch: pytest.MonkeyPatch, cells: list[authz.Cell]) -> None:
    monkeypatch.setattr(authz, "check", lambda world: cells)
    printed = CliRunner().invoke(app, ["authz-check"])
    assert printed.exit_code == 0, printed.output
    lines = printed.stdout.splitlines()
    assert lines[0].split() == [
        "route",
        "asks",
        "for",
        "none",
        "reader",
        "writer",
        "infer-only",
        "admin",
        "other",
        "tenant",
    ]
    (document,) = [line for line in lines if line.startswith("GET /rag/documents/{document_id} ")]
    assert document.split()[2:] == ["documents:read", "401/401", "200/404", "200/404", "403/403", "200/404", "200/404"]
    assert lines[-1] == f"{len(cells)} tried, 0 leaks"
    shown = json.loads(CliRunner().invoke(app, ["authz-check", "--json"]).stdout)
    assert len(shown) == len(cells) and {one["leak"] for one in shown} == {None}


def test_the_command_fails_on_a_leak(monkeypatch: pytest.MonkeyPatch, cells: list[authz.Cell]) -> None:
    leaking = authz.Cell(cells[0].route, "reader", "foreign", 200, "shows what is another tenant's")
    monkeypatch.setattr(authz, "check", lambda world: [*cells, leaking])
    printed = CliRunner().invoke(app, ["authz-check"])
    assert printed.exit_code == 1
    assert f"leak: {cells[0].route} as reader, foreign: 200, shows what is another tenant's" in printed.stderr
