"""Conditions on a document's metadata, as a tree that no store can be tricked with.

The JSON shape is that of OpenAI's vector stores, with two short forms:

    {"type": "eq", "key": "robot_id", "value": "HX-3"}     eq ne gt gte lt lte in nin
    {"type": "and", "filters": [...]}                      and or
    {"robot_id": "HX-3", "year": [2025, 2026]}             all of: equal, or one of

Keys are metadata keys, or `source`, `title`, `media_type`. A key that a document lacks meets only
`ne` and `nin`. Values reach a store as bound parameters, never as text of a query.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from nexus.errors import InvalidRequest

Scalar = str | int | float | bool
Operator = Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]

OPERATORS = ("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin")
MAX_CONDITIONS = 64
MAX_DEPTH = 16
MAX_VALUES = 256
MAX_VALUE_CHARACTERS = 1024
KEY = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


@dataclass(frozen=True, slots=True)
class Compare:
    """One key against one value, or against several for `in` and `nin`."""

    key: str
    operator: Operator
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Combine:
    """Every one of the parts, or any."""

    every: bool
    parts: tuple["Filter", ...]


Filter = Compare | Combine


def parse_filter(tree: Mapping[str, object], pointer: str = "/filters") -> Filter:
    """Check the JSON of a filter and return it as a tree. Raises InvalidRequest with a pointer."""
    conditions = [0]
    return _parse(tree, pointer, conditions, MAX_DEPTH)


def _parse(tree: object, pointer: str, conditions: list[int], depth: int) -> Filter:
    if not depth:
        raise InvalidRequest(f"a filter nests at most {MAX_DEPTH} deep", pointer=pointer)
    if not isinstance(tree, Mapping) or not tree:
        raise InvalidRequest("a filter is a non-empty object", pointer=pointer)
    kind = tree.get("type")
    if kind in ("and", "or") and set(tree) == {"type", "filters"}:
        parts = tree["filters"]
        if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
            raise InvalidRequest(f"{kind!r} takes a non-empty list of filters", pointer=f"{pointer}/filters")
        return Combine(
            kind == "and",
            tuple(_parse(part, f"{pointer}/filters/{i}", conditions, depth - 1) for i, part in enumerate(parts)),
        )
    if "key" in tree and "type" in tree:
        if set(tree) != {"type", "key", "value"}:
            raise InvalidRequest("a comparison has exactly type, key and value", pointer=pointer)
        if kind not in OPERATORS:
            raise InvalidRequest(
                f"unknown filter type; use one of {', '.join(OPERATORS)}, and, or", pointer=f"{pointer}/type"
            )
        return _compare(tree["key"], cast(Operator, kind), tree["value"], pointer, conditions)
    short = [
        _compare(key, "in" if isinstance(value, list) else "eq", value, f"{pointer}/{key}", conditions)
        for key, value in tree.items()
    ]
    return short[0] if len(short) == 1 else Combine(True, tuple(short))


def _compare(key: object, operator: Operator, value: object, pointer: str, conditions: list[int]) -> Compare:
    conditions[0] += 1
    if conditions[0] > MAX_CONDITIONS:
        raise InvalidRequest(f"a filter has at most {MAX_CONDITIONS} conditions", pointer=pointer)
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise InvalidRequest("a filter key is 1 to 64 of letters, digits, '_', '.', '-'", pointer=pointer)
    wants_list = operator in ("in", "nin")
    values = value if wants_list else [value]
    if not isinstance(values, list) or not values or len(values) > MAX_VALUES:
        raise InvalidRequest(f"{operator!r} takes a list of 1 to {MAX_VALUES} values", pointer=pointer)
    for one in values:
        if not isinstance(one, str | int | float | bool):
            raise InvalidRequest("a filter value is a string, a number or a boolean", pointer=pointer)
        if isinstance(one, str) and any(0xD800 <= ord(character) < 0xE000 for character in one):
            raise InvalidRequest("a filter value is text; half a surrogate pair is none", pointer=pointer)
        if isinstance(one, str) and len(one) > MAX_VALUE_CHARACTERS:
            raise InvalidRequest(f"a filter value has at most {MAX_VALUE_CHARACTERS} characters", pointer=pointer)
        if isinstance(one, int) and not isinstance(one, bool) and not -(2**63) <= one < 2**63:
            raise InvalidRequest("a filter number fits 64 bits", pointer=pointer)
    if operator in ("gt", "gte", "lt", "lte") and isinstance(values[0], bool):
        raise InvalidRequest("a boolean has no order", pointer=pointer)
    return Compare(key, operator, tuple(cast(list[Scalar], values)))
