"""From a rule's conditions to an expression of Hammerspace, or a refusal that says which part has none.

The language has no specification; the words used here are those that its vendor's playbooks and tools show: FNMATCH,
PATH, SIZE, LAST_USE_AGE, HAS_KEYWORD, GET_TAG, IS_FILE, AND, OR, !, <, >, ==. A rule is about a file only where its
conditions are true, and what is unknown stays so under `not` (conditions.py); expressions have two values. So `not`
is carried down to the comparisons, and each of these says either that it is true or that it is false. What a share
knows itself is meant: its own keywords and tags, its own time of last use.

    path, folder, name, suffix     FNMATCH on PATH, which is taken to begin with the tenant's folder: /TENANT/...
    size                           SIZE, in bytes
    unused                         LAST_USE_AGE, in whole hours
    tags                           HAS_KEYWORD
    robot_id, metadata.KEY         GET_TAG, for texts

Texts stand between quotes in an expression, and no way to escape a quote is known: one that has a quote, a backslash
or a control character is refused.
"""

from collections.abc import Callable, Sequence

from nexus.conditions import METADATA, All, Condition, Not, Operator, Test
from nexus.errors import InvalidRequest
from nexus.filters import Scalar

MOST_CHARACTERS = 4000  # of an expression: it is validated as a part of a URL
HOUR = 3600
HINTS = {
    "age": "it knows when a file was last used: write `unused`",
    "media_type": "write `suffix`, or `path` with `matches`",
    "checksum": "it knows no checksums",
    "tier": "the rule itself says where files are to be",
    "replicas": "the rule itself says where files are to be",
    "indexed": "it knows no collections",
}


def compile_rule(tenant: str, condition: Condition, slos: Sequence[str]) -> str:
    """The expression that puts the tenant's files that meet the condition under these service level objectives.

    Raises InvalidRequest, with the code `not_compilable`, for what Hammerspace cannot say.
    """
    directives = ",".join(f"SLO({_quoted(slo)})" for slo in slos)
    expression = f"IF {compile_condition(tenant, condition)} THEN {{{directives}}}"
    if len(expression) > MOST_CHARACTERS:
        raise _refusal(f"the rule has more than {MOST_CHARACTERS} characters as an expression: split it")
    return expression


def compile_condition(tenant: str, condition: Condition) -> str:
    """True of exactly the files that meet the condition, as far as the share knows what it asks for."""
    return _says(f"/{tenant}/", condition, True)


def _says(root: str, condition: Condition, truth: bool) -> str:
    """That the condition is true, or that it is false; either way not that it is unknown."""
    if isinstance(condition, Not):
        return _says(root, condition.part, not truth)
    if isinstance(condition, Test):
        return _COMPILERS.get(condition.field, _compile_other)(root, condition, truth)
    if not condition.parts:
        return _either(truth, "IS_FILE")
    parts = [_says(root, part, truth) for part in condition.parts]
    return _joined(" AND " if isinstance(condition, All) is truth else " OR ", parts)


def _joined(how: str, parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({how.join(parts)})"


def _either(truth: bool, expression: str) -> str:
    return expression if truth else f"!({expression})"


def _of_values(test: Test, truth: bool, one: Callable[[Scalar], str]) -> str | None:
    """`==`, `!=`, `in` and `not_in` of what is always known, by `one` for a single value; None for other operators."""
    if test.operator not in ("==", "!=", "in", "not_in"):
        return None
    found = _joined(" OR ", [one(value) for value in test.values])
    return _either(truth is (test.operator in ("==", "in")), found)


# One compiler for each field: (the tenant's folder, the comparison, which truth of it)


def _compile_path(root: str, test: Test, truth: bool) -> str:
    if (of_values := _of_values(test, truth, lambda value: _fnmatch(root + _literal(value)))) is not None:
        return of_values
    value = str(test.values[0])
    if test.operator == "exists":
        return _either(truth is test.values[0], "IS_FILE")
    patterns: dict[Operator, Callable[[], str]] = {
        "starts_with": lambda: f"{_literal(value)}*",
        "ends_with": lambda: f"*{_literal(value)}",
        "contains": lambda: f"*{_literal(value)}*",
        "not_contains": lambda: f"*{_literal(value)}*",
        "matches": lambda: _glob(value),
    }
    if test.operator not in patterns:
        raise _cannot(test)
    return _either(truth is not (test.operator == "not_contains"), _fnmatch(root + patterns[test.operator]()))


def _compile_name(root: str, test: Test, truth: bool) -> str:
    """PATH has a slash before the name, and no pattern can keep to what follows the last one but at its end."""
    if any("/" in str(value) for value in test.values):
        raise _cannot(test, "a name has no '/'")
    if (of_values := _of_values(test, truth, lambda value: _fnmatch(f"*/{_literal(value)}"))) is not None:
        return of_values
    value = str(test.values[0])
    if test.operator == "matches" and value.startswith("*") and not set(value[1:]) & set("*?["):
        return _either(truth, _fnmatch(f"*{_literal(value[1:])}"))
    if test.operator == "ends_with":
        return _either(truth, _fnmatch(f"*{_literal(value)}"))
    raise _cannot(test, "write `path` with `matches`")


def _compile_suffix(root: str, test: Test, truth: bool) -> str:
    """In either case of letters. Of a name with two dots before its suffix nothing is said."""
    if not truth or test.operator not in ("==", "in"):
        raise _cannot(test, "a suffix can be asked for, and not excluded")
    if not all(str(value).startswith(".") and set(str(value)[1:]).isdisjoint("./") for value in test.values):
        raise _cannot(test, "a suffix is a dot and what follows it")
    return _joined(" OR ", [_fnmatch(f"*[!/.]{_in_either_case(str(value))}") for value in test.values])


def _in_either_case(suffix: str) -> str:
    if suffix != suffix.lower():
        return _literal(suffix)
    return "".join(
        f"[{letter}{letter.upper()}]" if len(letter.upper()) == 1 and letter != letter.upper() else _literal(letter)
        for letter in suffix
    )


def _compile_folder(root: str, test: Test, truth: bool) -> str:
    def within(value: Scalar) -> str:
        folder = root + (f"{_literal(value)}/" if value else "")
        return f"({_fnmatch(f'{folder}*')} AND !({_fnmatch(f'{folder}*/*')}))"

    if (of_values := _of_values(test, truth, within)) is not None:
        return of_values
    if test.operator == "starts_with" and test.values[0]:
        return _either(truth, _fnmatch(f"{root}{_literal(test.values[0])}*/*"))
    raise _cannot(test, "write `path` with `starts_with` or `matches`")


def _compile_size(root: str, test: Test, truth: bool) -> str:
    return _compile_amount(test, truth, "SIZE", 1, "")


def _compile_unused(root: str, test: Test, truth: bool) -> str:
    if test.operator not in (">", ">=", "<", "<="):
        raise _cannot(test, "an age is more or less than something")
    return _compile_amount(test, truth, "LAST_USE_AGE", HOUR, "*HOUR")


def _compile_amount(test: Test, truth: bool, word: str, unit: int, written: str) -> str:
    def amount(value: Scalar) -> str:
        if isinstance(value, bool | str) or value < 0 or value % unit:
            raise _cannot(test, "it counts whole hours" if unit == HOUR else "it counts whole bytes")
        return f"{int(value) // unit}{written}"

    if (of_values := _of_values(test, truth, lambda value: f"{word}=={amount(value)}")) is not None:
        return of_values
    if test.operator == "exists":
        return _either(truth is test.values[0], "IS_FILE")
    sign, is_negated = {">": (">", False), "<": ("<", False), ">=": ("<", True), "<=": (">", True)}[test.operator]
    return _either(truth is not is_negated, f"{word}{sign}{amount(test.values[0])}")


def _compile_tags(root: str, test: Test, truth: bool) -> str:
    if test.operator == "exists":
        raise _cannot(test, "name the tag, with `contains`")
    return _either(truth is (test.operator == "contains"), f"HAS_KEYWORD({_quoted(test.values[0])})")


def _compile_other(root: str, test: Test, truth: bool) -> str:
    if not test.field.startswith(METADATA):
        raise _cannot(test, HINTS.get(test.field, ""))
    tag = f"GET_TAG({_quoted(test.field.removeprefix(METADATA))})"
    if test.operator == "exists":
        return _either(truth is test.values[0], tag)
    if not all(isinstance(value, str) for value in test.values):
        raise _cannot(test, "a tag there is a text")
    found = _of_values(test, truth, lambda value: f"{tag}=={_quoted(value)}")
    if found is None:
        raise _cannot(test)
    return f"({tag} AND {found})"  # a file without the tag compares neither way


_COMPILERS: dict[str, Callable[[str, Test, bool], str]] = {
    "path": _compile_path, "name": _compile_name, "suffix": _compile_suffix, "folder": _compile_folder,
    "size": _compile_size, "unused": _compile_unused, "tags": _compile_tags,
}  # fmt: skip


# Texts


def _fnmatch(pattern: str) -> str:
    return f"FNMATCH({_quoted(pattern)},PATH)"


def _quoted(text: Scalar) -> str:
    text = str(text)
    if any(character in '"\\' or not character.isprintable() for character in text):
        raise _refusal("Hammerspace cannot be told a text with a quote, a backslash or a control character in it")
    return f'"{text}"'


def _literal(text: Scalar) -> str:
    """A pattern that only this text matches."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in str(text))


def _glob(pattern: str) -> str:
    """A pattern that means the same here and there: sets in brackets that begin otherwise differ."""
    if "[^" in pattern or "[[" in pattern or "[]" in pattern or "[!]" in pattern:
        raise _refusal(f"the pattern {pattern[:80]!r} may mean something else to Hammerspace: write its set plainly")
    return pattern


def _cannot(test: Test, hint: str = "") -> InvalidRequest:
    return _refusal(
        f"Hammerspace has no expression for {test.field!r} with {test.operator!r}" + (f"; {hint}" if hint else "")
    )


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="not_compilable")
