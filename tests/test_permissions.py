"""Who may use which route, for every route there is: rows API5 and API9, generated from the router itself."""

from collections.abc import Mapping
from itertools import product
from typing import Any, cast

import pytest
from fastapi import FastAPI
from starlette.responses import Response
from starlette.routing import Mount
from starlette.routing import Route as BareRoute
from starlette.websockets import WebSocketDisconnect

from deployments import gateway
from deployments.middleware import PUBLIC
from nexus.access import PERMISSIONS
from tests.conftest import Door
from tests.raw import ask
from tests.routes import ROUTES, Route, application_in, routes_of

ANY_CREDENTIAL = {
    "GET /openapi.json",
    "POST /auth/token",
    "DELETE /auth/token",
    "POST /mcp",  # what each of its tools asks for, the route that the tool asks does
}  # open to whoever has one, whatever it allows
ASKED: Mapping[str, tuple[str, ...]] = {
    "": tuple(sorted(ANY_CREDENTIAL)),
    "admin": (
        "POST /auth/keys", "GET /auth/keys", "DELETE /auth/keys", "DELETE /auth/keys/{key_id}",
        "POST /auth/issuers/refresh", "POST /coordinator/snapshot", "POST /coordinator/transfer",
        "POST /coordinator/voters", "DELETE /coordinator/voters/{number}", "POST /rag/fsck", "POST /rag/vacuum",
        "POST /sharing/keys", "POST /sharing/scrub", "DELETE /sharing/stewards/{node}",
        "DELETE /sharing/machines/{node}", "POST /sharing/cluster-key",
        "POST /rag/reindex", "GET /rag/reindex", "PUT /rag/reindex", "DELETE /rag/reindex",
        "POST /v2/repository/models/{model}/load", "POST /v2/repository/models/{model}/unload",
    ),
    "documents:read": (
        "GET /rag/collections", "GET /rag/documents", "GET /rag/documents/{document_id}",
        "GET /rag/documents/{document_id}/text", "GET /rag/documents/{document_id}/versions", "GET /rag/deletions",
        "GET /rag/deletions/{document_id}", "GET /rag/jobs", "GET /rag/jobs/{job_id}", "POST /rag/search",
        "POST /rag/query",
    ),
    "documents:write": (
        "POST /rag/add_document", "DELETE /rag/documents/{document_id}", "POST /rag/jobs", "DELETE /rag/jobs/{job_id}",
        "POST /rag/jobs/{job_id}/cancel", "PUT /rag/jobs/{job_id}/files",
        "POST /rag/jobs/{job_id}/files/{number}/retry",
    ),
    "sessions:read": ("GET /mcp/{session_id:path}/get_context", "POST /memory/retrieve", "POST /retrieve"),
    "sessions:write": (
        "POST /mcp/{session_id:path}/add_context", "DELETE /mcp/{session_id:path}/clear_context", "POST /memory/store",
        "POST /store", "DELETE /memory/interactions/{interaction_id}", "DELETE /memory/interactions",
    ),
    "policies:read": ("GET /policies", "GET /policies/{policy}", "POST /policies/{policy}/evaluate"),
    "policies:write": ("PUT /policies/{policy}", "DELETE /policies/{policy}", "POST /policies/{policy}/release"),
    "documents:read sessions:read": ("POST /mcp/{session_id:path}/query",),
    "share:read": ("GET /share", "GET /share/{data_id}", "HEAD /share/{data_id}"),
    "share:write": ("PUT /share/{data_id}", "DELETE /share/{data_id}"),
    "infer": (
        "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings", "POST /v1/rerank",
        "GET /v1/models", "GET /v1/models/{name:path}", "POST /execute", "GET /pipelines", "GET /status",
        "GET /report", "GET /metrics", "GET /coordinator", "GET /sharing", "GET /v2",
        "GET /v2/health/live", "GET /v2/health/ready",
        "GET /v2/models/stats", "GET /v2/repository/index", "POST /v2/repository/index",
        *(
            ask.format(place)
            for place in ("{model}", "{model}/versions/{version}")
            for ask in (
                "GET /v2/models/{}", "GET /v2/models/{}/config", "GET /v2/models/{}/ready", "GET /v2/models/{}/stats",
                "POST /v2/models/{}/infer",
            )
        ),
    ),
}  # fmt: skip
GUARDED = [route for route in ROUTES if route.path not in PUBLIC]


@pytest.fixture(scope="module")
def door(shared_door: Door) -> Door:
    return shared_door


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def test_API5_what_each_route_asks_for_is_written_down() -> None:
    """Both the router and the tests below believe what a route declares; whoever changes it changes this, too."""
    written = {route: permissions for permissions, routes in ASKED.items() for route in routes}
    asked = {str(route): " ".join(sorted(route.permissions or ())) for route in GUARDED}
    assert asked == written


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_API5_every_route_declares_its_permission_or_is_public(route: Route) -> None:
    if route.path in PUBLIC:
        assert route.permissions is None, "a public route asks for nothing"
    else:
        assert route.permissions is not None, f"{route} has no permit(...): anybody with a credential may use it"
        assert route.permissions or str(route) in ANY_CREDENTIAL


def test_API5_a_route_without_a_declaration_is_seen() -> None:
    app = gateway.application(cast(Any, None))
    app.add_api_route("/bare", lambda: None)
    app.mount("/elsewhere", FastAPI())
    app.router.routes.append(BareRoute("/starlette", lambda request: Response()))
    assert {route.path for route in routes_of(app) if route.permissions is None} - PUBLIC == {
        "/bare", "/elsewhere", "/starlette",
    }  # fmt: skip
    assert isinstance(app.router.routes[-2], Mount)


def test_API5_no_permission_can_be_asked_for_that_no_key_can_have() -> None:
    from deployments.routes.caller import permit

    with pytest.raises(ValueError, match="documents:raed"):
        permit("documents:raed")


def test_API9_what_is_public_is_three_addresses_and_all_of_them_are_there() -> None:
    assert {"/livez", "/readyz", "/healthz"} == PUBLIC <= {route.path for route in ROUTES}


def test_API9_the_routes_of_the_running_application_are_those_tested(door: Door) -> None:
    app = application_in(door.client.app)
    assert {str(route) for route in routes_of(app)} == {str(route) for route in ROUTES}
    assert {str(route) for route in ROUTES if route.permissions == frozenset()} <= ANY_CREDENTIAL


@pytest.mark.parametrize("route", GUARDED, ids=str)
def test_API5_no_method_of_a_route_answers_without_a_credential(door: Door, route: Route) -> None:
    assert {method: ask(door, method, route.nowhere).status for method in METHODS} == dict.fromkeys(METHODS, 401)


@pytest.mark.parametrize(
    ("route", "missing"),
    [(route, one) for route in GUARDED for one in sorted(route.permissions or ())],
    ids=lambda value: str(value),
)
def test_API5_a_key_that_lacks_one_permission_is_refused(door: Door, route: Route, missing: str) -> None:
    answer = door.client.request(
        route.method, route.nowhere, headers=door.headers("default", "lacking", *(PERMISSIONS - {missing}))
    )
    assert answer.status_code == 403 and (missing in answer.text or route.method == "HEAD")


@pytest.mark.parametrize("route", GUARDED, ids=str)
def test_API5_the_declared_permissions_are_enough(door: Door, route: Route) -> None:
    permissions = route.permissions or frozenset({"infer"})
    answer = door.client.request(route.method, route.nowhere, headers=door.headers("default", "just-so", *permissions))
    assert answer.status_code not in (401, 403), answer.text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "path", ["/", "/nowhere", "/docs", "/redoc", "/debug", "/v0/models", "/v1", "/api/jobs/", "/rag", "/mcp/", "/admin"]
)
def test_API9_unknown_addresses_are_closed_and_then_empty(door: Door, method: str, path: str) -> None:
    assert ask(door, method, path).status == 401
    assert ask(door, method, path, door.headers()).status in (404, 405)


def test_API9_no_socket_is_opened(door: Door) -> None:
    """There is no route for one, and no layer that would ask it for a credential."""
    for path in ("/rag/documents", "/livez", "/nowhere"):
        with pytest.raises(WebSocketDisconnect), door.client.websocket_connect(path, headers=door.headers()):
            pass


ADMIN = [route for route in GUARDED if route.permissions == {"admin"}]


def bent(path: str) -> dict[str, str]:
    """The same address, written so that two readers might read it differently."""
    first, _, rest = path.strip("/").partition("/")
    return {
        "trailing slash": f"{path}/", "double slash": f"//{first}//{rest}", "upper case": path.upper(),
        "dots": f"/livez/../{first}/{rest}", "encoded dots": f"/livez/%2e%2e/{first}/{rest}",
        "twice encoded dots": f"/livez/%252e%252e/{first}/{rest}", "semicolon": f"/livez;/../{first}/{rest}",
        "encoded slash": f"/{first}%2f{rest}", "backslash": f"/{first}\\{rest}", "NUL": f"{path}%00",
        "encoded letter": f"/%{ord(first[0]):02x}{first[1:]}/{rest}".rstrip("/"),
    }  # fmt: skip


@pytest.mark.parametrize(("route", "bend"), list(product(ADMIN, bent("/a/b"))), ids=str)
def test_API5_an_address_written_otherwise_opens_no_door(door: Door, route: Route, bend: str) -> None:
    address = bent(route.nowhere)[bend]
    reader = door.headers("default", "reader", "documents:read", "infer")
    assert ask(door, route.method, address).status in (401, 404)
    assert ask(door, route.method, address, reader).status in (403, 404, 405)


@pytest.mark.parametrize("header", ["x-http-method-override", "x-http-method", "x-method-override"])
@pytest.mark.parametrize("route", ADMIN, ids=str)
def test_API5_a_header_cannot_change_the_method(door: Door, route: Route, header: str) -> None:
    reader = {**door.headers("default", "reader", "documents:read", "infer"), header: route.method}
    path = "/rag/documents"
    assert ask(door, "GET", path, reader).status == 200
    assert ask(door, "GET", route.nowhere, reader).status in (403, 404, 405)
    assert ask(door, "POST", route.nowhere, reader).status in (403, 404, 405)


@pytest.mark.parametrize("header", ["x-original-url", "x-rewrite-url", "x-forwarded-prefix", "x-forwarded-path"])
def test_API5_a_header_cannot_change_the_address(door: Door, header: str) -> None:
    assert ask(door, "GET", "/rag/documents", {header: "/livez"}).status == 401
    answer = ask(door, "GET", "/livez", {header: "/rag/documents"})
    assert answer.status == 200 and b"alive" in answer.body


def test_API5_what_only_a_body_makes_necessary_is_asked_for_too(door: Door) -> None:
    chat = {"model": "nexus-rag", "messages": [{"role": "user", "content": "What is the torque?"}]}
    infers = door.headers("default", "infers", "infer")
    assert door.client.post("/v1/chat/completions", json=chat, headers=infers).status_code == 403
    reads = door.headers("default", "reads", "documents:read")
    remembered = {"query": "What is the torque?", "session_id": "a-session"}
    assert door.client.post("/rag/query", json=remembered, headers=reads).status_code == 403
