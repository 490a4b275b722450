"""What /openapi.json says is so: requests made from it get no 500, and every refusal has the shape it describes."""

from collections.abc import Mapping
from typing import Any

import pytest
import schemathesis
from httpx import Response
from hypothesis import HealthCheck, Phase, given, seed, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode

from tests.conftest import Door
from tests.routes import ROUTES, Route

EXAMPLES = 12  # for each route and mode
UNDESCRIBED = {"GET /healthz", "GET /openapi.json"}  # the former name of /readyz, and the description itself
DESCRIBED = [route for route in ROUTES if str(route) not in UNDESCRIBED]
WAITS = {"prefer": "respond-async"}  # so that nothing waits until a document is read
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.fixture(scope="module")
def door(shared_door: Door) -> Door:
    return shared_door


@pytest.fixture(scope="module")
def described(door: Door) -> dict[str, Any]:
    document: dict[str, Any] = door.client.get("/openapi.json", headers=door.headers()).json()
    return document


@pytest.fixture(scope="module")
def answered() -> set[tuple[str, int]]:
    """Routes with the hundreds of the statuses they answered, filled by the tests."""
    return set()


def path_of(route: Route) -> str:
    return route.path.replace(":path}", "}")


def test_every_route_is_described(described: dict[str, Any]) -> None:
    told = {f"{method.upper()} {path}" for path, item in described["paths"].items() for method in item}
    assert told == {f"{route.method} {path_of(route)}" for route in DESCRIBED}


def test_every_refusal_is_described(described: dict[str, Any]) -> None:
    for path, item in described["paths"].items():
        for operation in item.values():
            for status in ("4XX", "5XX"):
                (media,) = operation["responses"][status]["content"]
                assert media == ("application/json" if path.startswith("/v1/") else "application/problem+json")


def test_no_schema_described_takes_more_than_it_names(described: dict[str, Any]) -> None:
    open_ones = {
        name for name, schema in described["components"]["schemas"].items() if schema.get("type") == "object"
        and schema.get("additionalProperties") is not False
    }  # fmt: skip
    assert not open_ones


@pytest.mark.parametrize(
    ("route", "mode"),
    [(route, mode) for route in DESCRIBED for mode in (POSITIVE, NEGATIVE) if mode == POSITIVE or route.has_body],
    ids=lambda value: value.value if isinstance(value, GenerationMode) else str(value),
)
def test_no_request_made_from_the_description_is_a_fault(
    door: Door, described: dict[str, Any], answered: set[tuple[str, int]], route: Route, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_dict(described)[path_of(route)][route.method]
    headers = {**door.headers("schemathesis"), **WAITS}
    responses = described["paths"][path_of(route)][route.method.lower()]["responses"]

    @seed(4711)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        answer = send(door, case.as_transport_kwargs(base_url="http://testserver"), headers)
        assert answer.status_code != 500
        answered.add((str(route), answer.status_code // 100))
        if answer.status_code >= 400 and "ready" not in route.path and route.method != "HEAD":
            check(answer, responses)

    ask()


def test_and_the_requests_were_taken_for_what_they_are(answered: set[tuple[str, int]]) -> None:
    """Else none but the door keepers were tried."""
    taken = {route for route, hundreds in answered if hundreds == 2}
    assert {"GET /rag/documents", "GET /rag/jobs", "GET /status", "GET /v1/models", "GET /metrics"} <= taken
    assert {route for route, hundreds in answered if hundreds == 4} >= {str(r) for r in DESCRIBED if r.has_body}


def send(door: Door, asked: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """What schemathesis would give to requests, sent through the client of the tests."""
    content = asked.get("data")
    return door.client.request(
        asked["method"], asked["url"], params=asked.get("params"), headers={**(asked.get("headers") or {}), **headers},
        content=content.encode() if isinstance(content, str) else content, json=asked.get("json"),
    )  # fmt: skip


def check(answer: Response, responses: Mapping[str, Any]) -> None:
    """The answer is what the description says of its status."""
    (content,) = responses[f"{answer.status_code // 100}XX"]["content"].items()
    assert answer.headers["content-type"] == content[0], answer.text
    Draft202012Validator(content[1]["schema"]).validate(answer.json())
    assert answer.headers["cache-control"] == "no-store"
