"""AQL as far as Nexus speaks it, read and carried out; anything else is refused as a server would, or more strictly.

Values are ordered by type, then by value (null < bool < number < text < list < object). Texts are compared as by a
language's rules: what is ignorable in them does not count, and what looks the same is the same. Names that
are keywords, variables declared twice, bind parameters that are missing or not asked for, and reading a collection
that the same query has written to are errors, with ArangoDB's numbers.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

PARSE, REDECLARED, NO_COLLECTION, NO_FUNCTION, BIND_MISSING, BIND_UNKNOWN, AFTER_WRITE, FULL_SCAN, WARNED = (
    1501, 1511, 1203, 1540, 1551, 1552, 1579, 1577, 1563
)  # fmt: skip
KEYWORDS = frozenset(
    re.findall(
        r"\w+",
        """AGGREGATE ALL ALL_SHORTEST_PATHS AND ANY ASC COLLECT DESC DISTINCT FALSE FILTER FOR GRAPH IN INBOUND INSERT
        INTO K_PATHS K_SHORTEST_PATHS LET LIKE LIMIT NONE NOT NULL OR OUTBOUND REMOVE REPLACE RETURN SHORTEST_PATH
        SORT TRUE UPDATE UPSERT WINDOW WITH""",
    )
)
STARTS = ("FOR", "LET", "RETURN", "INSERT", "REMOVE", "UPDATE")
TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<text>'[^'\\]*'|\"[^\"\\]*\")|(?P<bind>@@?[A-Za-z_]\w*)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<op>==|!=|<=|>=|&&|\|\||\.\.|[-+*/%<>!?:(){}\[\],.=]))"
)

Scope = dict[str, Any]
Eval = Callable[[Scope, "Run"], Any]


class AqlError(Exception):
    """What a server would answer: ArangoDB's number of the error, and why."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Data(Protocol):
    """The collections that a query reads and writes."""

    def has(self, name: str) -> bool: ...
    def scan(self, name: str) -> Iterable[dict[str, Any]]: ...
    def find(self, name: str, attribute: str, values: Sequence[Any]) -> Iterable[dict[str, Any]] | None:
        """Documents whose attribute is one of the values; None where no index begins with it."""

    def insert(self, name: str, document: dict[str, Any], mode: str | None) -> tuple[Any, Any]: ...
    def update(self, name: str, key: str, change: dict[str, Any]) -> tuple[Any, Any]: ...
    def remove(self, name: str, key: str, ignore: bool) -> Any: ...


@dataclass(slots=True)
class Run:
    """One execution: what it works on, and the values bound in it."""

    data: Data
    values: Mapping[str, Any]


# ── values ──────────────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(100_000)
def collated(text: str) -> tuple[str, str]:
    """What a text compares by under the rules of a language."""
    if text.isascii() and text.isalnum() and text == text.lower():
        return text, text
    plain = unicodedata.normalize("NFC", "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf")))
    return plain.casefold(), plain.swapcase()


def order(value: Any) -> tuple[int, Any]:
    """A key that sorts any values as AQL does, and is equal for equal ones."""
    if value is None:
        return 0, 0
    if isinstance(value, bool):
        return 1, value
    if isinstance(value, int | float):
        return 2, value
    if isinstance(value, str):
        return 3, collated(value)
    if isinstance(value, list):
        return 4, tuple(order(one) for one in value)
    return 5, tuple((key, order(value[key])) for key in sorted(value))


def same(left: Any, right: Any) -> bool:
    return order(left) == order(right)


def holds(value: Any) -> bool:
    return not (value is None or value is False or value == 0 or value == "") or isinstance(value, list | dict)


def _among(value: Any, values: Any) -> bool:
    return isinstance(values, list) and order(value) in {order(one) for one in values}


def _attribute(value: Any, name: Any) -> Any:
    if isinstance(value, dict) and isinstance(name, str):
        return value.get(name)
    if isinstance(value, list) and isinstance(name, int | float) and -len(value) <= name < len(value):
        return value[int(name)]
    return None


def _numbers(values: Any) -> list[Any]:
    return [one for one in _list(values) if one is not None]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise AqlError(WARNED, f"an array is expected, and not {value!r}")
    return value


def _length(value: Any) -> int:
    if not isinstance(value, list | dict):
        raise AqlError(WARNED, f"only arrays and objects are measured here, and not {value!r}")
    return len(value)


def _cosine(left: Any, right: Any) -> float | None:
    size = (sum(x * x for x in left) * sum(x * x for x in right)) ** 0.5
    return sum(x * y for x, y in zip(left, right, strict=True)) / size if size else None


FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {  # with the fewest arguments
    "LENGTH": (1, _length),
    "MIN": (1, lambda values: min(_numbers(values), key=order, default=None)),
    "MAX": (1, lambda values: max(_numbers(values), key=order, default=None)),
    "SUM": (1, lambda values: sum(_numbers(values))),
    "PUSH": (2, lambda values, value: [*_list(values), value]),
    "APPEND": (2, lambda left, right: [*_list(left), *_list(right)]),
    "UNION": (2, lambda *lists: [one for values in lists for one in _list(values)]),
    "UNSET": (2, lambda value, *names: {key: one for key, one in value.items() if key not in names}),
    "MERGE": (2, lambda *objects: {key: one for value in objects for key, one in value.items()}),
    "CONCAT": (1, lambda *parts: "".join(part for part in parts if part is not None)),
    "IS_STRING": (1, lambda value: isinstance(value, str)),
    "IS_NUMBER": (1, lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "COSINE_SIMILARITY": (2, _cosine),
}
AGGREGATES = ("MIN", "MAX", "SUM", "LENGTH")


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Token:
    kind: str
    text: str
    at: int

    @property
    def word(self) -> str:
        return self.text.upper() if self.kind == "name" else ""


def tokens(query: str) -> list[Token]:
    found, at = [], 0
    while query[at:].strip():
        match = TOKEN.match(query, at)
        if match is None:
            raise AqlError(PARSE, f"cannot be read from here on: {query[at : at + 40]!r}")
        found.append(Token(match.lastgroup or "", match[match.lastgroup or 0], match.start()))
        at = match.end()
    return [*found, Token("end", "", at)]


Node = tuple[Any, ...]
LEVELS = (("||", "OR"), ("&&", "AND"), ("==", "!="), ("IN", "NOT"), ("<", "<=", ">", ">="), ("+", "-"), ("*", "/", "%"))
BEYOND_IN = 4


@dataclass(slots=True)
class Parser:
    """From a query to a list of its operations, each with expressions as trees."""

    found: list[Token]
    at: int = 0
    binds: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)

    def peek(self, *words: str) -> bool:
        token = self.found[self.at]
        return token.word in words or (token.kind == "op" and token.text in words)

    def take(self, *words: str) -> bool:
        if self.peek(*words):
            self.at += 1
            return True
        return False

    def need(self, word: str) -> None:
        if not self.take(word):
            raise AqlError(PARSE, f"{word} is expected, and not {self.found[self.at].text!r}")

    def name(self) -> str:
        token = self.found[self.at]
        if token.kind != "name" or token.word in KEYWORDS:
            raise AqlError(PARSE, f"a name is expected, and not {token.text!r}")
        self.at += 1
        return token.text

    def declare(self, names: set[str]) -> str:
        name = self.name()
        if name in names:
            raise AqlError(REDECLARED, f"variable {name!r} is assigned a second time")
        names.add(name)
        return name

    # ── operations ──────────────────────────────────────────────────────────────────────────────

    def query(self, outer: set[str], end: str) -> list[Node]:
        names, operations = set(outer), []
        while not self.peek(")") and self.found[self.at].kind != "end":
            operations.append(self.operation(names))
            if operations[-1][0] == "return":
                break
        if not (self.peek(")") if end else self.found[self.at].kind == "end"):
            raise AqlError(PARSE, f"the query should end before {self.found[self.at].text!r}")
        if not operations or operations[-1][0] not in ("return", "insert", "remove", "update"):
            raise AqlError(PARSE, "a query ends with RETURN, or with writing")
        return operations

    def operation(self, names: set[str]) -> Node:
        word = self.found[self.at].word
        self.at += 1
        if word == "FOR":
            return self.loop(names)
        if word == "FILTER":
            return "filter", self.expression(names)
        if word == "LET":
            name = self.name()
            if name in names:
                raise AqlError(REDECLARED, f"variable {name!r} is assigned a second time")
            self.need("=")
            value = self.expression(names)
            names.add(name)
            return "let", name, value
        if word == "SORT":
            return "sort", self.listed(lambda: (self.expression(names), self.descends()))
        if word == "LIMIT":
            return "limit", self.expression(names)
        if word == "RETURN":
            return "return", self.take("DISTINCT"), self.expression(names)
        if word == "COLLECT":
            return self.collect(names)
        if word in ("INSERT", "REMOVE", "UPDATE"):
            return self.writing(word, names)
        raise AqlError(PARSE, f"an operation is expected, and not {self.found[self.at - 1].text!r}")

    def descends(self) -> bool:
        return self.take("DESC") or (self.take("ASC") and False)

    def listed(self, one: Callable[[], Any]) -> list[Any]:
        found = [one()]
        while self.take(","):
            found.append(one())
        return found

    def loop(self, names: set[str]) -> Node:
        before = set(names)
        name = self.declare(names)
        self.need("IN")
        token = self.found[self.at]
        if token.kind == "name" and token.text not in before and self.found[self.at + 1].text not in ("(", ".", "["):
            self.at += 1
            if token.text in self.written:
                raise AqlError(AFTER_WRITE, f"{token.text} is read after it was written to")
            return "each", name, token.text
        return "for", name, self.expression(before)

    def collect(self, names: set[str]) -> Node:
        kept: set[str] = set()
        groups = [] if self.peek("WITH", "AGGREGATE") else self.listed(lambda: self.assignment(names, kept))
        totals = self.listed(lambda: self.assignment(names, kept)) if self.take("AGGREGATE") else []
        if any(value[0] != "call" or value[1] not in AGGREGATES for _, value in totals):
            raise AqlError(PARSE, "only some functions aggregate")
        counted = None
        if self.take("WITH"):
            if self.found[self.at].word != "COUNT":
                raise AqlError(PARSE, "WITH COUNT INTO is expected")
            self.at += 1
            self.need("INTO")
            counted = self.declare(kept)
        names.clear()
        names |= kept
        return "collect", groups, totals, counted

    def assignment(self, names: set[str], kept: set[str]) -> tuple[str, Node]:
        name = self.declare(kept)
        self.need("=")
        return name, self.expression(names)

    def writing(self, word: str, names: set[str]) -> Node:
        value = self.level(names, BEYOND_IN)  # what comes next is the IN of this operation
        change = None
        if word == "UPDATE":
            self.need("WITH")
            change = self.level(names, BEYOND_IN)
        if not self.take("INTO"):
            self.need("IN")
        name = self.name()
        options: Node = ("object", [])
        if self.found[self.at].word == "OPTIONS":
            self.at += 1
            options = self.expression(set())
        if name in self.written:
            raise AqlError(AFTER_WRITE, f"{name} is written to a second time")
        self.written.add(name)
        names |= {"OLD"} if word == "REMOVE" else {"OLD", "NEW"}
        return word.lower(), name, value, change, options

    # ── expressions ─────────────────────────────────────────────────────────────────────────────

    def expression(self, names: set[str]) -> Node:
        condition = self.level(names, 0)
        if not self.take("?"):
            return condition
        yes = self.expression(names)
        self.need(":")
        return "if", condition, yes, self.expression(names)

    def level(self, names: set[str], depth: int) -> Node:
        if depth == len(LEVELS):
            return self.unary(names)
        left = self.level(names, depth + 1)
        while self.peek(*LEVELS[depth]):
            token = self.found[self.at]
            self.at += 1
            operator = token.word or token.text
            if operator == "NOT":
                self.need("IN")
            operator = {"OR": "||", "AND": "&&"}.get(operator, operator)
            left = ("op", operator, left, self.level(names, depth + 1))
        return left

    def unary(self, names: set[str]) -> Node:
        if self.take("!", "NOT"):
            return "not", self.unary(names)
        if self.take("-"):
            return "minus", self.unary(names)
        return self.postfix(self.primary(names), names)

    def postfix(self, value: Node, names: set[str]) -> Node:
        while True:
            if self.take("."):
                value = ("attribute", value, ("value", self.name()))
            elif self.peek("[") and self.found[self.at + 1].text == "*":
                self.at += 2
                inside = names | {"CURRENT"}
                condition = self.expression(inside) if self.take("FILTER") else None
                self.need("]")
                path: Node = ("variable", "CURRENT")
                while self.take("."):
                    path = ("attribute", path, ("value", self.name()))
                value = ("expand", value, condition, path)
            elif self.take("["):
                value = ("attribute", value, self.expression(names))
                self.need("]")
            else:
                return value

    def primary(self, names: set[str]) -> Node:
        token = self.found[self.at]
        self.at += 1
        if token.kind == "number":
            return "value", float(token.text) if "." in token.text else int(token.text)
        if token.kind == "text":
            return "value", token.text[1:-1]
        if token.kind == "bind" and not token.text.startswith("@@"):
            self.binds.add(token.text[1:])
            return "bind", token.text[1:]
        if token.text == "(":
            return self.bracket(names)
        if token.text == "[":
            return "list", self.items("]", lambda: self.expression(names))
        if token.text == "{":
            return "object", self.items("}", lambda: self.pair(names))
        if token.word in ("NULL", "TRUE", "FALSE"):
            return "value", {"NULL": None, "TRUE": True, "FALSE": False}[token.word]
        if token.kind == "name" and self.take("("):
            return self.call(token.word, names)
        if token.kind == "name" and token.word not in KEYWORDS:
            if token.text not in names:
                raise AqlError(NO_COLLECTION, f"collection or view not found: {token.text}")
            return "variable", token.text
        raise AqlError(PARSE, f"a value is expected, and not {token.text!r}")

    def bracket(self, names: set[str]) -> Node:
        if self.found[self.at].word in STARTS:
            inner = Parser(self.found, self.at, self.binds, self.written)
            operations = inner.query(names, ")")
            self.at = inner.at + 1
            return "query", operations
        value = self.expression(names)
        self.need(")")
        return value

    def items(self, end: str, one: Callable[[], Any]) -> list[Any]:
        found: list[Any] = []
        while not self.take(end):
            if found:
                self.need(",")
            found.append(one())
        return found

    def pair(self, names: set[str]) -> tuple[str, Node]:
        token = self.found[self.at]
        if token.kind == "text":
            self.at += 1
            key = token.text[1:-1]
        else:
            key = self.name()
            if not self.peek(":"):
                self.at -= 1
                return key, self.primary(names)
        self.need(":")
        return key, self.expression(names)

    def call(self, name: str, names: set[str]) -> Node:
        if name not in FUNCTIONS:
            raise AqlError(NO_FUNCTION, f"usage of unknown function {name!r}")
        arguments = self.items(")", lambda: self.expression(names))
        if len(arguments) < FUNCTIONS[name][0]:
            raise AqlError(PARSE, f"{name} has too few arguments")
        return "call", name, arguments


# ── carrying out ────────────────────────────────────────────────────────────────────────────────


def compiled(node: Node) -> Eval:
    """An expression as a function."""
    kind, *parts = node
    return COMPILERS[kind](*parts)


def _operator(sign: str, left: Node, right: Node) -> Eval:
    one, other = compiled(left), compiled(right)
    if sign == "&&":
        return lambda s, r: other(s, r) if holds(value := one(s, r)) else value
    if sign == "||":
        return lambda s, r: value if holds(value := one(s, r)) else other(s, r)
    do = OPERATORS[sign]
    return lambda s, r: do(one(s, r), other(s, r))


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": same,
    "!=": lambda left, right: not same(left, right),
    "IN": _among,
    "NOT": lambda left, right: not _among(left, right),
    "<": lambda left, right: order(left) < order(right),
    "<=": lambda left, right: order(left) <= order(right),
    ">": lambda left, right: order(left) > order(right),
    ">=": lambda left, right: order(left) >= order(right),
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right,
    "%": lambda left, right: left % right,
}


def _get(value: Node, name: Node) -> Eval:
    whole, part = compiled(value), compiled(name)
    return lambda s, r: _attribute(whole(s, r), part(s, r))


def _if(condition: Node, yes: Node, no: Node) -> Eval:
    asked, one, other = compiled(condition), compiled(yes), compiled(no)
    return lambda s, r: (one if holds(asked(s, r)) else other)(s, r)


def _expand(value: Node, condition: Node | None, path: Node) -> Eval:
    whole, wanted, part = compiled(value), compiled(condition) if condition else None, compiled(path)

    def run(scope: Scope, run: Run) -> list[Any]:
        inner = ({**scope, "CURRENT": one} for one in whole(scope, run) or [])
        return [part(one, run) for one in inner if wanted is None or holds(wanted(one, run))]

    return run


def _call(name: str, arguments: list[Node]) -> Eval:
    function, given = FUNCTIONS[name][1], [compiled(one) for one in arguments]
    return lambda s, r: function(*(one(s, r) for one in given))


def _object(pairs: list[tuple[str, Node]]) -> Eval:
    given = [(key, compiled(value)) for key, value in pairs]
    return lambda s, r: {key: value(s, r) for key, value in given}


def _array(items: list[Node]) -> Eval:
    given = [compiled(one) for one in items]
    return lambda s, r: [one(s, r) for one in given]


def _subquery(operations: list[Node]) -> Eval:
    plan = planned(operations)
    return lambda s, r: carry_out(plan, s, r)


def _not(value: Node) -> Eval:
    inner = compiled(value)
    return lambda s, r: not holds(inner(s, r))


def _minus(value: Node) -> Eval:
    inner = compiled(value)
    return lambda s, r: -inner(s, r)


COMPILERS: dict[str, Callable[..., Eval]] = {
    "value": lambda value: lambda s, r: value,
    "bind": lambda name: lambda s, r: r.values[name],
    "variable": lambda name: lambda s, r: s[name],
    "attribute": _get, "op": _operator, "if": _if, "expand": _expand, "call": _call, "object": _object,
    "list": _array, "query": _subquery, "not": _not, "minus": _minus,
}  # fmt: skip

Stage = Callable[[Iterable[Scope], Run], Iterator[Scope]]


def planned(operations: list[Node]) -> list[Stage]:
    """The stages that rows go through; a loop over a collection knows the filters behind it, to use an index."""
    stages = []
    for position, (kind, *parts) in enumerate(operations):
        if kind == "each":
            filters = []
            for other in operations[position + 1 :]:
                if other[0] != "filter":
                    break
                filters += _conjuncts(other[1])
            stages.append(_each(*parts, filters))
        else:
            stages.append(STAGES[kind](*parts))
    return stages


def carry_out(stages: list[Stage], scope: Scope, run: Run) -> list[Any]:
    rows: Iterable[Scope] = [scope]
    for stage in stages:
        rows = stage(rows, run)
    return [row["RETURNED"] for row in rows if "RETURNED" in row]


def _conjuncts(node: Node) -> list[Node]:
    return [*_conjuncts(node[2]), *_conjuncts(node[3])] if node[:2] == ("op", "&&") else [node]


def _mentions(node: Any, name: str) -> bool:
    if isinstance(node, tuple | list):
        return node == ("variable", name) or any(_mentions(part, name) for part in node)
    return False


def _each(name: str, collection: str, filters: list[Node]) -> Stage:
    ways = []  # (attribute, its values)
    for one in filters:
        if one[0] == "op" and one[1] in ("==", "IN"):
            for own, other in ((one[2], one[3]), (one[3], one[2]))[: 2 if one[1] == "==" else 1]:
                if own[:2] == ("attribute", ("variable", name)) and not _mentions(other, name):
                    value = compiled(other)
                    ways.append((own[2][1], value if one[1] == "IN" else lambda s, r, v=value: [v(s, r)]))

    def stage(rows: Iterable[Scope], run: Run) -> Iterator[Scope]:
        if not run.data.has(collection):
            raise AqlError(NO_COLLECTION, f"collection or view not found: {collection}")
        for row in rows:
            for attribute, values in ways:
                wanted = values(row, run)
                found = run.data.find(collection, attribute, wanted if isinstance(wanted, list) else [])
                if found is not None:
                    break
            else:
                found = run.data.scan(collection)
            for document in found:
                yield {**row, name: document}

    return stage


def _for(name: str, values: Node) -> Stage:
    listed = compiled(values)
    return lambda rows, run: ({**row, name: one} for row in rows for one in _list(listed(row, run)))


def _filter(condition: Node) -> Stage:
    asked = compiled(condition)
    return lambda rows, run: (row for row in rows if holds(asked(row, run)))


def _let(name: str, value: Node) -> Stage:
    given = compiled(value)
    return lambda rows, run: ({**row, name: given(row, run)} for row in rows)


def _sort(keys: list[tuple[Node, bool]]) -> Stage:
    given = [(compiled(key), descends) for key, descends in keys]

    def stage(rows: Iterable[Scope], run: Run) -> Iterator[Scope]:
        found = list(rows)
        for key, descends in reversed(given):
            found.sort(key=lambda row, key=key: order(key(row, run)), reverse=descends)
        yield from found

    return stage


def _limit(number: Node) -> Stage:
    given = compiled(number)

    def stage(rows: Iterable[Scope], run: Run) -> Iterator[Scope]:
        left = given({}, run)
        if not isinstance(left, int) or isinstance(left, bool) or left < 0:
            raise AqlError(PARSE, f"a LIMIT is a number, and not {left!r}")
        for row in rows if left else ():
            yield row
            left -= 1
            if not left:
                return

    return stage


def _return(distinct: bool, value: Node) -> Stage:
    given = compiled(value)

    def stage(rows: Iterable[Scope], run: Run) -> Iterator[Scope]:
        seen = set()
        for row in rows:
            returned = given(row, run)
            if not distinct or (key := order(returned)) not in seen:
                if distinct:
                    seen.add(key)
                yield {"RETURNED": returned}

    return stage


def _collect(groups: list[tuple[str, Node]], totals: list[tuple[str, Node]], counted: str | None) -> Stage:
    keys = [(name, compiled(value)) for name, value in groups]
    sums = [(name, FUNCTIONS[call[1]][1], compiled(call[2][0])) for name, call in totals]

    def stage(rows: Iterable[Scope], run: Run) -> Iterator[Scope]:
        found: dict[Any, tuple[Scope, list[Scope]]] = {}
        for row in rows:
            own = {name: value(row, run) for name, value in keys}
            found.setdefault(order(list(own.values())), (own, []))[1].append(row)
        if not keys and not found:
            found[None] = ({}, [])
        for key in sorted(found):
            own, members = found[key]
            own |= {name: function([value(row, run) for row in members]) for name, function, value in sums}
            yield own | ({counted: len(members)} if counted else {})

    return stage


def _writing(kind: str) -> Callable[..., Stage]:
    allowed = {"insert": {"overwriteMode", "exclusive", "waitForSync"}, "update": {"exclusive", "waitForSync"}}

    def make(name: str, value: Node, change: Node | None, options: Node) -> Stage:
        given, changed, said = compiled(value), compiled(change) if change else None, compiled(options)
        known = allowed.get(kind, {"ignoreErrors", "exclusive", "waitForSync"})

        def stage(rows: Iterable[Scope], run: Run) -> Iterator[Scope]:
            wanted = said({}, run)
            if not set(wanted) <= known or wanted.get("overwriteMode") not in (None, "replace", "ignore"):
                raise AqlError(PARSE, f"options that are not known: {wanted}")
            for row in list(rows):  # all is read before anything is written
                one = given(row, run)
                if kind == "insert":
                    old, new = run.data.insert(name, one, wanted.get("overwriteMode"))
                elif kind == "update":
                    old, new = run.data.update(name, key_of(one), changed(row, run) if changed else {})
                else:
                    old, new = run.data.remove(name, key_of(one), bool(wanted.get("ignoreErrors"))), None
                yield {**row, "OLD": old, "NEW": new}

        return stage

    return make


def key_of(value: Any) -> str:
    key = value.get("_key") if isinstance(value, dict) else value
    if not isinstance(key, str):
        raise AqlError(1221, f"no document key: {value!r}")
    return key


STAGES: dict[str, Callable[..., Stage]] = {
    "for": _for, "filter": _filter, "let": _let, "sort": _sort, "limit": _limit, "return": _return,
    "collect": _collect, "insert": _writing("insert"), "remove": _writing("remove"), "update": _writing("update"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Query:
    """A query that was read: what to do, what is to be bound, and what it writes to, exclusively where it says so."""

    stages: list[Stage]
    binds: frozenset[str]
    writes: frozenset[str]
    reads: frozenset[str]
    exclusive: bool
    waits_for_sync: bool

    def run(self, data: Data, values: Mapping[str, Any]) -> list[Any]:
        if missing := self.binds - set(values):
            raise AqlError(BIND_MISSING, f"no value specified for declared bind parameters: {sorted(missing)}")
        if unknown := set(values) - self.binds:
            raise AqlError(BIND_UNKNOWN, f"bind parameters that were not declared: {sorted(unknown)}")
        return carry_out(self.stages, {}, Run(data, values))


@functools.lru_cache(1000)
def read(query: str) -> Query:
    parser = Parser(tokens(query))
    operations = parser.query(set(), "")
    flat = json.dumps(operations, default=list)
    reads = frozenset(re.findall(r'\["each", "\w+", "(\w+)"\]', flat))
    said = [f'["{option}", ["value", true]]' in flat for option in ("exclusive", "waitForSync")]
    return Query(planned(operations), frozenset(parser.binds), frozenset(parser.written), reads, *said)
