"""Which files a rule is about: a tree of comparisons on what is known of a file, true, false or unknown.

    {"field": "size", "operator": ">", "value": "10MiB"}
    {"all": [...]}  {"any": [...]}  {"not": {...}}       a list by itself is all of its conditions

What a file does not have compares neither way: the comparison is unknown, `not` leaves it so, and a rule is about a
file only where its tree is true (Kleene's three values). So nothing happens to a file for want of an attribute;
`exists` asks for one.
"""

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Literal, cast

from nexus.errors import InvalidRequest
from nexus.filters import KEY, Scalar
from nexus.types import StoredFile

MAX_CONDITIONS = 64
MAX_DEPTH = 16
MAX_VALUES = 256
MAX_VALUE_CHARACTERS = 1024

Operator = Literal[
    "==", "!=", ">", ">=", "<", "<=", "in", "not_in", "contains", "not_contains", "starts_with", "ends_with",
    "matches", "exists",
]  # fmt: skip
Kind = Literal["text", "bytes", "seconds", "set", "any"]
Value = Scalar | frozenset[str]

ORDERED: tuple[Operator, ...] = ("==", "!=", ">", ">=", "<", "<=", "in", "not_in", "exists")
TEXTUAL: tuple[Operator, ...] = (
    "contains", "not_contains", "starts_with", "ends_with", "matches",
)  # fmt: skip
OPERATORS: Mapping[Kind, tuple[Operator, ...]] = {
    "text": (*ORDERED, *TEXTUAL), "bytes": ORDERED, "seconds": ORDERED,
    "set": ("contains", "not_contains", "exists"), "any": (*ORDERED, *TEXTUAL),
}  # fmt: skip
OPERATOR_ALIASES: Mapping[str, Operator] = {
    "=": "==", "eq": "==", "ne": "!=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "nin": "not_in",
}  # fmt: skip
SIZE_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    "tib": 2**40,
}  # fmt: skip
TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
WITH_UNIT = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s?([A-Za-z]{0,3})")
METADATA = "metadata."


@dataclass(frozen=True, slots=True)
class Field:
    """What may be asked of a file: of which kind it is, and how it is read at a moment; None: the file has none."""

    kind: Kind
    read: Callable[[StoredFile, float], Value | None]


FIELDS: Mapping[str, Field] = {
    "path": Field("text", lambda file, now: file.path),
    "name": Field("text", lambda file, now: posixpath.basename(file.path)),
    "suffix": Field("text", lambda file, now: posixpath.splitext(file.path)[1].lower() or None),
    "folder": Field("text", lambda file, now: posixpath.dirname(file.path)),
    "size": Field("bytes", lambda file, now: file.size if file.size >= 0 else None),
    "age": Field("seconds", lambda file, now: now - file.modified_at if file.modified_at else None),
    "unused": Field("seconds", lambda file, now: now - file.used_at if file.used_at else None),
    "media_type": Field("text", lambda file, now: file.media_type or None),
    "checksum": Field("text", lambda file, now: file.checksum or None),
    "tier": Field("text", lambda file, now: file.home or None),
    "tags": Field("set", lambda file, now: file.tags),
    "replicas": Field("set", lambda file, now: file.replicas),
    "indexed": Field("set", lambda file, now: frozenset(file.indexed)),
}
FIELD_ALIASES = {
    "file_path": "path", "file_name": "name", "file_size": "size", "type": "media_type", "last_use_age": "unused",
    "last_used": "unused", "robot_id": f"{METADATA}robot_id",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Test:
    """One field against one value, or against several for `in` and `not_in`."""

    __test__ = False  # pytest would take it for one of its own

    field: str
    operator: Operator
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class All:
    parts: tuple["Condition", ...]


@dataclass(frozen=True, slots=True)
class Any:
    parts: tuple["Condition", ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: "Condition"


Condition = Test | All | Any | Not


def is_met(condition: Condition, file: StoredFile, now: float) -> bool | None:
    """Whether a file meets the condition at a moment (Unix seconds); None: it cannot be told."""
    if isinstance(condition, Test):
        return _compare(condition, _read(condition.field, file, now))
    if isinstance(condition, Not):
        found = is_met(condition.part, file, now)
        return None if found is None else not found
    decisive = isinstance(condition, Any)  # one part that says this decides
    unknown = False
    for part in condition.parts:
        found = is_met(part, file, now)
        if found is decisive:
            return decisive
        unknown = unknown or found is None
    return None if unknown else not decisive


def _read(field: str, file: StoredFile, now: float) -> Value | None:
    if field.startswith(METADATA):
        return file.metadata.get(field.removeprefix(METADATA))
    return FIELDS[field].read(file, now)


def _compare(test: Test, actual: Value | None) -> bool | None:
    if test.operator == "exists":
        return (actual is not None and actual != frozenset()) is test.values[0]
    if actual is None:
        return None
    if isinstance(actual, frozenset):
        return (test.values[0] in actual) is (test.operator == "contains")
    comparable = [value for value in test.values if _family(value) is _family(actual)]
    if test.operator in ("in", "not_in"):
        return (actual in comparable) is (test.operator == "in") if comparable else None
    return _compare_one(test.operator, actual, comparable[0]) if comparable else None


def _family(value: Scalar) -> type:
    """True is no number here, and 1 is no text."""
    return bool if isinstance(value, bool) else str if isinstance(value, str) else float


def _compare_one(operator: Operator, actual: Scalar, value: Scalar) -> bool | None:
    if operator in ("==", "!="):
        return (actual == value) is (operator == "==")
    if isinstance(actual, str) and isinstance(value, str):
        return _compare_texts(operator, actual, value)
    if isinstance(actual, bool | str) or isinstance(value, bool | str) or operator in TEXTUAL:
        return None
    return {">": actual > value, ">=": actual >= value, "<": actual < value, "<=": actual <= value}[operator]


def _compare_texts(operator: Operator, actual: str, value: str) -> bool:
    match operator:
        case "contains" | "not_contains":
            return (value in actual) is (operator == "contains")
        case "starts_with":
            return actual.startswith(value)
        case "ends_with":
            return actual.endswith(value)
        case "matches":
            return _glob(value).fullmatch(actual) is not None
    return {">": actual > value, ">=": actual >= value, "<": actual < value, "<=": actual <= value}[operator]


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    """`*` stands for any characters, '/' too, as in Hammerspace's FNMATCH; no `*` is tried twice."""
    return re.compile(translate(pattern))


# ── from JSON and back ──────────────────────────────────────────────────────────────────────────


def parse_condition(tree: object, pointer: str = "/conditions") -> Condition:
    """Check the JSON of a condition and return it as a tree. Raises InvalidRequest with a pointer."""
    return _parse(tree, pointer, [0], MAX_DEPTH)


def _parse(tree: object, pointer: str, count: list[int], depth: int) -> Condition:
    if not depth:
        raise InvalidRequest(f"conditions nest at most {MAX_DEPTH} deep", pointer=pointer)
    if isinstance(tree, list | tuple):
        return All(_parts(tree, pointer, count, depth))
    if not isinstance(tree, Mapping):
        raise InvalidRequest("a condition is an object, or a list of them", pointer=pointer)
    keys = set(tree)
    if keys in ({"all"}, {"any"}):
        (key,) = keys
        parts = tree[key]
        if not isinstance(parts, list | tuple) or not parts:
            raise InvalidRequest(f"{key!r} takes a non-empty list of conditions", pointer=f"{pointer}/{key}")
        return (All if key == "all" else Any)(_parts(parts, f"{pointer}/{key}", count, depth))
    if keys == {"not"}:
        return Not(_parse(tree["not"], f"{pointer}/not", count, depth - 1))
    if keys != {"field", "operator", "value"}:
        raise InvalidRequest(
            "a condition has exactly field, operator and value, or exactly one of all, any and not", pointer=pointer
        )
    count[0] += 1
    if count[0] > MAX_CONDITIONS:
        raise InvalidRequest(f"a rule has at most {MAX_CONDITIONS} comparisons", pointer=pointer)
    return _parse_test(tree, pointer)


def _parts(
    trees: list[object] | tuple[object, ...], pointer: str, count: list[int], depth: int
) -> tuple[Condition, ...]:
    if len(trees) > MAX_CONDITIONS:
        raise InvalidRequest(f"a rule has at most {MAX_CONDITIONS} conditions", pointer=pointer)
    return tuple(_parse(tree, f"{pointer}/{number}", count, depth - 1) for number, tree in enumerate(trees))


def _parse_test(tree: Mapping[str, object], pointer: str) -> Test:
    field, kind = _parse_field(tree["field"], f"{pointer}/field")
    said = tree["operator"]
    operator = OPERATOR_ALIASES.get(said, cast(Operator, said)) if isinstance(said, str) else None
    if operator not in OPERATORS[kind]:
        raise InvalidRequest(
            f"{field!r} can be compared with {', '.join(OPERATORS[kind])}", pointer=f"{pointer}/operator"
        )
    value, at = tree["value"], f"{pointer}/value"
    if operator == "exists":
        if not isinstance(value, bool):
            raise InvalidRequest("'exists' takes true or false", pointer=at)
        return Test(field, operator, (value,))
    if operator in ("in", "not_in"):
        if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_VALUES:
            raise InvalidRequest(f"{operator!r} takes a list of 1 to {MAX_VALUES} values", pointer=at)
        return Test(field, operator, tuple(_parse_value(one, kind, f"{at}/{i}") for i, one in enumerate(value)))
    only = _parse_value(value, kind, at)
    if operator in TEXTUAL and not isinstance(only, str):
        raise InvalidRequest(f"{operator!r} takes a text", pointer=at)
    if operator in (">", ">=", "<", "<=") and isinstance(only, bool):
        raise InvalidRequest("a boolean has no order", pointer=at)
    return Test(field, operator, (only,))


def _parse_field(said: object, pointer: str) -> tuple[str, Kind]:
    name = FIELD_ALIASES.get(said, said) if isinstance(said, str) else ""
    if name in FIELDS:
        return name, FIELDS[name].kind
    if name.startswith(METADATA) and KEY.fullmatch(name.removeprefix(METADATA)):
        return name, "any"
    raise InvalidRequest(
        f"no such field; there are {', '.join(FIELDS)} and {METADATA}KEY, where KEY is 1 to 64 of letters, digits,"
        " '_', '.', '-'",
        pointer=pointer,
    )


def _parse_value(value: object, kind: Kind, pointer: str) -> Scalar:
    if kind in ("bytes", "seconds"):
        return parse_amount(value, SIZE_UNITS if kind == "bytes" else TIME_UNITS, pointer)
    if not isinstance(value, str | int | float | bool) or (kind != "any" and not isinstance(value, str)):
        wanted = "a text, a number or a boolean" if kind == "any" else "a text"
        raise InvalidRequest(f"the value is to be {wanted}", pointer=pointer)
    return check_scalar(value, pointer)


def check_scalar(value: Scalar, pointer: str) -> Scalar:
    """The value, if it is bounded text, a finite number or a boolean. Raises InvalidRequest."""
    if isinstance(value, str):
        if len(value) > MAX_VALUE_CHARACTERS:
            raise InvalidRequest(f"a value has at most {MAX_VALUE_CHARACTERS} characters", pointer=pointer)
        if any(0xD800 <= ord(character) < 0xE000 for character in value):
            raise InvalidRequest("a value is text; half a surrogate pair is none", pointer=pointer)
    elif not -(2**63) <= value < 2**63:  # which NaN and the infinities are not either
        raise InvalidRequest("a number is finite and fits 64 bits", pointer=pointer)
    return value


def parse_amount(value: object, units: Mapping[str, int], pointer: str) -> int | float:
    """A number as it is, or a text of a number and a unit. Raises InvalidRequest."""
    if isinstance(value, str) and (found := WITH_UNIT.fullmatch(value)) and found[2].lower() in units:
        amount = float(found[1]) * units[found[2].lower()]
        value = int(amount) if amount.is_integer() else amount
    if isinstance(value, bool) or not isinstance(value, int | float):
        known = ", ".join(unit for unit in units if unit)
        raise InvalidRequest(f"the value is to be a number, or a text of a number and one of {known}", pointer=pointer)
    check_scalar(value, pointer)
    return value


def show_condition(condition: Condition) -> dict[str, object]:
    """The JSON that `parse_condition` reads."""
    if isinstance(condition, Test):
        many = condition.operator in ("in", "not_in")
        value = list(condition.values) if many else condition.values[0]
        return {"field": condition.field, "operator": condition.operator, "value": value}
    if isinstance(condition, Not):
        return {"not": show_condition(condition.part)}
    return {"any" if isinstance(condition, Any) else "all": [show_condition(part) for part in condition.parts]}
