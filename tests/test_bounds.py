"""Nothing that a caller sends is without a bound: every field of every request, read from its JSON schema."""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, JsonValue, TypeAdapter

from deployments.shapes import MaxBytes
from tests.routes import ROUTES, Route

REQUESTS = sorted(
    {
        thing
        for name, module in list(sys.modules.items())
        if name.startswith("deployments.") and module is not None
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, BaseModel) and thing.__module__ == name
    },
    key=lambda model: (model.__module__, model.__name__),
)


def unbounded(schema: Mapping[str, Any], place: str = "") -> list[str]:
    """Where in a JSON schema something may be as long, as large or as many as it likes."""
    return list(dict.fromkeys(_unbounded(schema, place, schema.get("$defs", {}), set())))


def _unbounded(schema: Mapping[str, Any], place: str, named: Mapping[str, Any], seen: set[str]) -> Iterator[str]:
    if "x-max-bytes" in schema:  # of all that is within
        return
    if (name := schema.get("$ref", "").rpartition("/")[2]) and name not in seen:
        seen.add(name)
        yield from _unbounded(named[name], name, named, seen)
    choices = [one for key in ("anyOf", "oneOf", "allOf") for one in schema.get(key, ())]
    for one in choices:
        yield from _unbounded(one, place, named, seen)
    if choices or name or "enum" in schema or "const" in schema:
        return
    kind = schema.get("type")
    if kind == "string":
        if "maxLength" not in schema and not _ends(schema.get("pattern", ".*")):
            yield f"{place}: a text of any length"
    elif kind in ("integer", "number"):
        if not {"minimum", "exclusiveMinimum"} & set(schema) or not {"maximum", "exclusiveMaximum"} & set(schema):
            yield f"{place}: a number of any size"
    elif kind == "array":
        if "maxItems" not in schema:
            yield f"{place}: a list of any length"
        yield from _unbounded(schema.get("items", {}), f"{place}[]", named, seen)
    elif kind == "object":
        yield from _unbounded_object(schema, place, named, seen)
    elif kind not in ("boolean", "null"):
        yield f"{place}: anything at all"


def _unbounded_object(schema: Mapping[str, Any], place: str, named: Mapping[str, Any], seen: set[str]) -> Iterator[str]:
    for name, one in schema.get("properties", {}).items():
        yield from _unbounded(one, f"{place}.{name}", named, seen)
    patterns: Mapping[str, Any] = schema.get("patternProperties", {})
    others = schema.get("additionalProperties", not patterns)
    if others is False and not patterns:
        return
    if "maxProperties" not in schema:
        yield f"{place}: any number of fields"
    for pattern, one in patterns.items():
        if not _ends(pattern):
            yield f"{place}: names of any length"
        yield from _unbounded(one, f"{place}.*", named, seen)
    if others:
        names = {"type": "string", **schema.get("propertyNames", {})}
        yield from _unbounded(names, f"the names in {place}", named, seen)
        yield from _unbounded(others if isinstance(others, dict) else {}, f"{place}.*", named, seen)


def _ends(pattern: str) -> bool:
    """Whether what the whole pattern matches has a greatest length."""
    parsed = re._parser.parse(pattern)  # type: ignore[attr-defined]
    is_whole = pattern.startswith("^") and pattern.endswith("$")
    return is_whole and parsed.getwidth()[1] < 100_000


@pytest.mark.parametrize("model", REQUESTS, ids=lambda model: model.__name__)
def test_API4_every_field_of_a_request_has_a_bound(model: type[BaseModel]) -> None:
    assert not unbounded(model.model_json_schema(), model.__name__)


@pytest.mark.parametrize("model", REQUESTS, ids=lambda model: model.__name__)
def test_API3_no_request_takes_a_field_that_it_does_not_know(model: type[BaseModel]) -> None:
    assert model.model_config.get("extra") == "forbid"


@pytest.mark.parametrize("route", [route for route in ROUTES if route.dependant], ids=str)
def test_API4_every_parameter_in_a_query_has_a_bound(route: Route) -> None:
    assert route.dependant is not None
    for parameter in route.dependant.query_params:
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[parameter.field_info.annotation, parameter.field_info])
        assert not unbounded(adapter.json_schema(), parameter.name)
    assert not route.dependant.header_params and not route.dependant.cookie_params


def test_every_request_is_looked_at() -> None:
    """A model that no module of the front door defines would be passed over."""
    bodies = {
        parameter.field_info.annotation
        for route in ROUTES
        if route.dependant
        for parameter in route.dependant.body_params
    }
    assert len(bodies) > 8 and bodies <= set(REQUESTS)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (str, "a text of any length"),
        (Annotated[str, Field(pattern="^[a-z]+$")], "a text of any length"),
        (Annotated[str, Field(pattern="[a-z]{1,4}")], "a text of any length"),
        (Annotated[str, Field(pattern="^[a-z]{1,4}$")], None),
        (str | None, "a text of any length"),
        (int, "a number of any size"),
        (Annotated[float, Field(ge=0)], "a number of any size"),
        (Annotated[float, Field(ge=0, lt=5)] | None, None),
        (list[bool], "a list of any length"),
        (Annotated[list[str], Field(max_length=3)], "a text of any length"),
        (dict[str, bool], "any number of fields"),
        (Annotated[dict[str, bool], Field(max_length=3)], "a text of any length"),
        (Annotated[dict[str, Any], Field(max_length=3)], "anything at all"),
        (Any, "anything at all"),
        (JsonValue, "anything at all"),
        (Annotated[dict[str, Any], MaxBytes(100)], None),
        (Literal["a", "b"], None),
        (tuple[Annotated[str, Field(max_length=1)], ...], "a list of any length"),
    ],
    ids=str,
)
def test_what_has_no_bound_is_seen(kind: Any, fault: str | None) -> None:
    found = unbounded(TypeAdapter(kind).json_schema())
    assert not found if fault is None else any(fault in one for one in found)
