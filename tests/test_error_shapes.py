"""Every error of every route has the shape of notes/security.md, section 2: generated from the router."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import pytest
from httpx import Response

from deployments import middleware
from deployments.middleware import PUBLIC, SAFE_HEADERS, STATUS
from nexus.errors import NexusError, TryAgain
from tests.conftest import Door
from tests.routes import ROUTES, Route, application_in, routes_of

PROBLEM = {"type", "title", "status", "detail", "instance", "code", "request_id"}
OPENAI_TYPES = {
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "rate_limit_error",
    "server_error", "service_unavailable_error",
}  # fmt: skip
CANARY = "zanzibar-4711"
INSIDE = f"{CANARY} at /srv/nexus/deployments/gateway.py: SELECT secret FROM keys on db.internal.example nx_abc_def"
ROUTES = [route for route in ROUTES if route.method != "HEAD"]  # whose answers have no body
GUARDED = [route for route in ROUTES if route.path not in PUBLIC]
WITH_BODY = [route for route in GUARDED if route.has_body]


@pytest.fixture(scope="module")
def door(shared_door: Door) -> Door:
    return shared_door


@pytest.fixture(scope="module")
def headers(door: Door) -> dict[str, str]:
    return door.headers()


@pytest.fixture(scope="module")
def running(door: Door) -> dict[str, Route]:
    """The routes of the application that answers, which errors can be planted in."""
    return {str(route): route for route in routes_of(application_in(door.client.app))}


@contextmanager
def planted(route: Route, error: Exception) -> Iterator[None]:
    """The route fails with this: in what it depends on, so that it needs no body that it would take."""
    assert route.dependant is not None
    part = next((one for one in route.dependant.dependencies if hasattr(one.call, "permissions")), route.dependant)
    call = part.call

    async def fail(*_: object, **__: object) -> Any:
        raise error

    part.call = fail
    try:
        yield
    finally:
        part.call = call


def check(answer: Response, status: int, path: str, sent: dict[str, str]) -> None:
    """The whole shape of one error: media type, members, headers, and nothing of the inside."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    if path.startswith("/v1/"):
        assert answer.headers["content-type"] == "application/json"
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        said = body["error"]
        assert isinstance(said["message"], str) and said["message"] and said["type"] in OPENAI_TYPES
        assert said["param"] is None or isinstance(said["param"], str)
        assert isinstance(said["code"], str)
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert set(body) - {"errors"} == PROBLEM
        assert (body["status"], body["instance"]) == (status, path)
        assert body["request_id"] == answer.headers["x-request-id"]
        assert all(set(one) == {"pointer", "detail"} for one in body.get("errors", []))
        assert all(one["pointer"] == "" or one["pointer"].startswith("/") for one in body.get("errors", []))
    assert len(answer.headers["x-request-id"]) >= 8
    assert answer.headers["cache-control"] == "no-store"
    assert {name: answer.headers.get(name) for name in SAFE_HEADERS} == SAFE_HEADERS
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert ("retry-after" in answer.headers) >= (status in (429, 503))
    says = answer.text + str(answer.headers)
    inside = [CANARY, "Traceback", ".py", "/srv/", "SELECT", socket.gethostname(), "nx_", *sent.values()]
    assert not [one for one in inside if one in says]


@pytest.mark.parametrize("route", GUARDED, ids=str)
def test_401(door: Door, route: Route) -> None:
    check(door.client.request(route.method, route.nowhere), 401, route.nowhere, {})
    wrong = {"authorization": "Bearer nx_abcdefghijkl_wrong_00000000"}
    check(door.client.request(route.method, route.nowhere, headers=wrong), 401, route.nowhere, wrong)


@pytest.mark.parametrize("route", [route for route in GUARDED if route.permissions], ids=str)
def test_403(door: Door, route: Route) -> None:
    assert route.permissions
    others = {"documents:read", "admin"} - route.permissions or {"share:read"}
    lacking = door.headers("default", "lacking", *others)
    check(door.client.request(route.method, route.nowhere, headers=lacking), 403, route.nowhere, lacking)


@pytest.mark.parametrize("route", GUARDED, ids=str)
def test_404_below_it(door: Door, headers: dict[str, str], route: Route) -> None:
    path = f"{route.nowhere}/there/is/nothing"
    check(door.client.get(path, headers=headers), 404, path, headers)


@pytest.mark.parametrize("method", ["PATCH", "TRACE"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_405(door: Door, headers: dict[str, str], route: Route, method: str) -> None:
    answer = door.client.request(method, route.nowhere, headers=headers)
    check(answer, 405, route.nowhere, headers)
    assert answer.headers["allow"]


@pytest.mark.parametrize("route", GUARDED, ids=str)
def test_413_as_soon_as_it_is_announced(door: Door, headers: dict[str, str], route: Route) -> None:
    big = {**headers, "content-type": "application/json", "content-length": str(2**40)}
    answer = door.client.request(route.method, route.nowhere, headers=big, content=b"{}")
    check(answer, 413, route.nowhere, headers)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
@pytest.mark.parametrize("route", WITH_BODY, ids=str)
def test_415_for_json_that_is_not_said_to_be(door: Door, headers: dict[str, str], route: Route, kind: str) -> None:
    said = {**headers, "content-type": kind} if kind else headers
    answer = door.client.request(route.method, route.nowhere, headers=said, content=b"{}")
    check(answer, 415, route.nowhere, headers)


@pytest.mark.parametrize("route", [route for route in GUARDED if route.method in ("POST", "PUT")], ids=str)
def test_415_for_what_a_form_of_another_page_can_send(door: Door, headers: dict[str, str], route: Route) -> None:
    said = {**headers, "content-type": "text/plain; charset=utf-8"}
    check(door.client.request(route.method, route.nowhere, headers=said, content=b"{}"), 415, route.nowhere, headers)


MALFORMED = {
    "half": b'{"a":', "nothing": b"", "latin-1": '{"ä": 1}'.encode("latin-1"), "deep": b"[" * 100_000,
    "NaN": b'{"a": NaN}', "a list": b"[1]", "null": b"null", "a number": b"1e999", "a text": b'"text"',
}  # fmt: skip


@pytest.mark.parametrize("body", MALFORMED)
@pytest.mark.parametrize("route", WITH_BODY, ids=str)
def test_400_or_422_for_a_body_that_is_no_object(door: Door, headers: dict[str, str], route: Route, body: str) -> None:
    assert route.dependant
    if body in ("nothing", "null") and not any(one.field_info.is_required() for one in route.dependant.body_params):
        pytest.skip("this route has a body where one is sent")
    said = {**headers, "content-type": "application/json"}
    answer = door.client.request(route.method, route.nowhere, headers=said, content=MALFORMED[body])
    assert answer.status_code in ((400,) if route.path.startswith("/v1/") else (400, 422))
    check(answer, answer.status_code, route.nowhere, headers)


@pytest.mark.parametrize("field", ["tenant_id", "role", "is_admin", "owner", "quota", "created_at", "__proto__"])
@pytest.mark.parametrize("route", WITH_BODY, ids=str)
def test_API3_an_unknown_field_is_pointed_at(door: Door, headers: dict[str, str], route: Route, field: str) -> None:
    said = {**headers, "content-type": "application/json"}
    answer = door.client.request(route.method, route.nowhere, headers=said, content=json.dumps({field: "x"}))
    check(answer, 400, route.nowhere, headers)
    if not route.path.startswith("/v1/"):
        assert f"/{field}" in [one["pointer"] for one in answer.json()["errors"]]
    else:
        assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_what_is_raised_on_purpose(
    door: Door, headers: dict[str, str], running: dict[str, Route], route: Route, kind: type[NexusError]
) -> None:
    error = kind("it cannot be had", pointer="/somewhere/in it")
    with planted(running[str(route)], error):
        answer = door.client.request(route.method, route.nowhere, headers=headers)
    check(answer, middleware.status_of(error, route.nowhere), route.nowhere, headers)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_507(door: Door, headers: dict[str, str], running: dict[str, Route], route: Route) -> None:
    with planted(running[str(route)], TryAgain("the disk is full", code="storage_full")):
        answer = door.client.request(route.method, route.nowhere, headers=headers)
    check(answer, 507, route.nowhere, headers)


@pytest.mark.parametrize(
    "fault", [RuntimeError(INSIDE), ValueError(INSIDE), OSError(2, INSIDE, "/srv/x.py"), AssertionError(INSIDE)],
    ids=lambda fault: type(fault).__name__,
)  # fmt: skip
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_500_says_nothing_of_the_fault(
    door: Door, headers: dict[str, str], running: dict[str, Route], route: Route, fault: Exception
) -> None:
    with planted(running[str(route)], fault):
        answer = door.client.request(route.method, route.nowhere, headers=headers)
    check(answer, 500, route.nowhere, headers)


def test_every_status_of_the_specification_was_seen() -> None:
    """Those that a route can answer: 408 and 431 are the server's before a route is known."""
    statuses = {middleware.status_of(kind("x"), "/rag/search") for kind in STATUS} | {401, 403, 405, 507, 500}
    assert {400, 401, 403, 404, 405, 409, 413, 415, 422, 500, 502, 503, 504, 507} <= statuses


@pytest.mark.parametrize("path", ["/nowhere", "/v1/nowhere", "/v1", "/v1x/y", "/a/%F0%9F%98%80", "/" + "x" * 4000])
def test_404_on_unknown_addresses(door: Door, headers: dict[str, str], path: str) -> None:
    check(door.client.get(path, headers=headers), 404, unquote(path), headers)


GOOD = {
    "type": "urn:nexus:problem:x", "title": "t", "status": 404, "detail": "d", "instance": "/x", "code": "c",
    "request_id": "12345678",
}  # fmt: skip
HEADERS = {
    **SAFE_HEADERS, "content-type": "application/problem+json", "cache-control": "no-store", "x-request-id": "12345678",
}  # fmt: skip
OUT_OF_SHAPE: dict[str, tuple[dict[str, object], dict[str, str | None]]] = {
    "another media type": (GOOD, {"content-type": "application/json"}),
    "cached": (GOOD, {"cache-control": "max-age=1"}), "no id": (GOOD, {"x-request-id": None}),
    "another id": ({**GOOD, "request_id": "87654321"}, {}),
    "sniffed": (GOOD, {"x-content-type-options": None}), "framed": (GOOD, {"x-frame-options": None}),
    "more members": ({**GOOD, "trace": "x"}, {}), "another status": ({**GOOD, "status": 400}, {}),
    "a path": ({**GOOD, "detail": "/srv/nexus failed"}, {}), "SQL": ({**GOOD, "detail": "SELECT 1"}, {}),
    "a file": ({**GOOD, "detail": "gateway.py line 3"}, {}), "the host": ({**GOOD, "detail": socket.gethostname()}, {}),
    "a header with the key": (GOOD, {"x-key": "nx_abc"}),
    "a wrong pointer": ({**GOOD, "errors": [{"pointer": "a"}]}, {}),
    "a challenge": (GOOD, {"www-authenticate": "Bearer"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_SHAPE)
def test_what_is_out_of_shape_is_seen(name: str) -> None:
    def answer(body: dict[str, object], headers: dict[str, str | None]) -> Response:
        given = {key: value for key, value in {**HEADERS, **headers}.items() if value is not None}
        return Response(404, json=body, headers=given)

    check(answer(GOOD, {}), 404, "/x", {})
    with pytest.raises((AssertionError, KeyError)):
        check(answer(*OUT_OF_SHAPE[name]), 404, "/x", {})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stop": ["x"] * 99}, "stop"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
            "messages.0.content",
        ),
        ("/v1/chat/completions", {"messages": [{}]}, "messages.0.role"),
        ("/v1/embeddings", {"input": [[1, 2]]}, "input"),
        ("/v1/embeddings", {"input": ["x", 5]}, "input"),
        ("/v1/rerank", {"query": "x", "documents": [{"txt": "x"}]}, "documents.0"),
    ],
)
def test_a_fault_is_in_the_body_s_own_words(door: Door, path: str, body: dict[str, object], param: str) -> None:
    """Where a value may be of several types, none of the program's names for them is told."""
    answer = door.client.post(path, json={"model": "m", **body}, headers=door.headers())
    said = answer.json()["error"]
    assert answer.status_code == 400 and said["param"] == param
    assert not re.search(r"[\[(<]|constrained|0x", said["message"]), said["message"]
