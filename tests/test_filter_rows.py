"""What a filter, a query or a name can do to the stores' own languages: nothing (rows Q1 and Q3, API4 for filters).

Further of these rows: every value and tenant against a real Milvus Lite in test_stores.py; good filters, and refusals
with their pointers, in test_retrieval.py; edges of the graph in test_graph.py.
"""

import ast
import json
import random
from collections.abc import Mapping
from typing import Any

import pytest

from nexus.errors import InvalidRequest
from nexus.filters import MAX_DEPTH, Combine, Compare, Filter, parse_filter
from nexus.ports import Scope
from nexus.stores.milvus import MilvusVectors, Target
from nexus.types import Document, SearchRequest
from tests.conftest import ALICE, MALLORY, Door, House

CASES = 4_000
VALUES: Mapping[str, str] = {
    "ends the string": 'x" or tenant != "', "ends the list": "'] or 1==1 or id in ['", "escapes": '"\\" or "" == "',
    "backslash": "\\", "like": "%", "underscore": "_", "template": "{tenant}", "both braces": "{{audiences}}",
    "field of meta": '$meta["tenant"]', "exists": "exists tenant", "typographic quotes": "\u201cx\u201d or 1==1",
    "comment": "x' -- ", "block comment": "/* x */", "union": "' UNION SELECT * FROM versions --",
    "statement": "'; DROP TABLE versions; --", "parameter": ":tenant", "question mark": "?", "nul": "x\x00y",
    "path": '$."tenant"', "glob": "*", "line break": "x\nor 1==1", "emoji": "\U0001f600", "empty": "",
    "bidirectional": "\u202ex", "a thousand quotes": '"' * 1000,
}  # fmt: skip
KEYS: Mapping[str, str] = {
    "quote": 'a" or 1==1', "statement": "a'; DROP TABLE versions; --", "bracket": "$meta['tenant']", "empty": "",
    "blank": "a b", "template": "{tenant}", "parameter": ":tenant", "percent": "%", "too long": "k" * 65,
    "nul": "a\x00", "line break": "a\n", "typographic": "\u201ca\u201d", "function": "json_extract(x)",
    "column": "v.tenant OR 1",
}  # fmt: skip


@pytest.fixture
def stocked(house: House) -> House:
    """Documents of two tenants, the same ones, with values that every filter below may meet."""
    rng = random.Random(4)
    for who in (ALICE, MALLORY):
        for number in range(12):
            metadata = {key: rng.choice(_some_values(rng)) for key in rng.sample(FIELDS, rng.randint(0, len(FIELDS)))}
            house.put(f"{number}.md", f"gripper {number}", who=who, metadata=metadata)
    return house


FIELDS = ("robot", "year", "live", "a.b", "weird-key", "nested", "tenant", "readers")


def _some_values(rng: random.Random) -> list[Any]:
    written = [value for value in VALUES.values() if "\x00" not in value]
    return ["HX-3", rng.randint(-3, 3), rng.random(), 2**53 + 1, True, False, None, ["HX-3"], {"x": 1}, *written]


# ── the same answer as plain Python ─────────────────────────────────────────────────────────────


def _holds(condition: Filter, document: Document) -> bool:
    """What a filter means, said as simply as can be."""
    if isinstance(condition, Combine):
        return (all if condition.every else any)(_holds(part, document) for part in condition.parts)
    fields = {"source": document.source, "title": document.title, "media_type": document.media_type}
    has = {**document.metadata, **fields}.get(condition.key)
    alike = [value for value in condition.values if _kind(value) == _kind(has)]
    match condition.operator:
        case "eq" | "in":
            return any(has == value for value in alike)
        case "ne" | "nin":
            return not any(has == value for value in alike)
        case "gt":
            return any(has > value for value in alike)
        case "gte":
            return any(has >= value for value in alike)
        case "lt":
            return any(has < value for value in alike)
        case "lte":
            return any(has <= value for value in alike)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else "text" if isinstance(value, str) else "none"


def _random_filter(rng: random.Random, depth: int = 3) -> Filter:
    if depth and rng.random() < 0.5:
        return Combine(rng.random() < 0.5, tuple(_random_filter(rng, depth - 1) for _ in range(rng.randint(1, 3))))
    operator = rng.choice(("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"))
    scalars = [v for v in _some_values(rng) if isinstance(v, str | int | float)]
    if operator in ("gt", "gte", "lt", "lte"):
        scalars = [v for v in scalars if not isinstance(v, bool)]
    many = rng.randint(1, 4) if operator in ("in", "nin") else 1
    key = rng.choice((*FIELDS, "source", "title", "media_type", "absent"))
    return Compare(key, operator, tuple(rng.choice((*scalars, "3.md", "text/plain")) for _ in range(many)))


def test_Q1_random_filters_choose_what_plain_python_chooses_and_of_ones_own_tenant_only(stocked: House) -> None:
    documents, rng = stocked.hades.documents, random.Random(20)
    theirs = {who.tenant: documents.documents(who, None, None, 100) for who in (ALICE, MALLORY)}
    chosen = 0
    for case in range(CASES):
        condition, who = _random_filter(rng), rng.choice((ALICE, MALLORY))
        found = set(documents.matching("default", who, condition, 12, limit=10**9))
        wanted = {document.document_id for document in theirs[who.tenant] if _holds(condition, document)}
        assert found == wanted, (case, condition)
        chosen += 0 < len(found) < 12
    assert chosen > CASES / 10, "the filters divide the documents"


# ── one row after another ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operator", ["eq", "ne", "gt", "lte", "in", "nin"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_Q1_a_hostile_value_meets_documents_of_ones_own_tenant_only(stocked: House, value: str, operator: str) -> None:
    tree = {"type": operator, "key": "robot", "value": [value] if operator in ("in", "nin") else value}
    result = stocked.retriever.search(SearchRequest("gripper", filters=parse_filter(tree), k=100), ALICE)
    ours = {d.document_id for d in stocked.hades.documents.documents(ALICE, None, None, 100)}
    assert {hit.document_id for hit in result.hits} <= ours
    if operator in ("ne", "nin"):
        assert len(result.hits) >= 10


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("short", [True, False], ids=["short form", "long form"])
def test_Q1_a_hostile_key_is_refused_with_a_pointer(door: Door, key: str, short: bool) -> None:
    filters = {key: "x"} if short else {"type": "eq", "key": key, "value": "x"}
    answer = door.client.post("/rag/search", json={"query": "q", "filters": filters}, headers=door.headers())
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith("/filters")


@pytest.mark.parametrize("key", ["tenant", "readers", "collection", "document_id", "version", "opened", "rowid"])
def test_Q1_what_the_authority_knows_is_no_field_of_a_filter(stocked: House, key: str) -> None:
    """Such a key is one of the metadata, where nobody but the document's sender has put anything."""
    for value in ("other", "acme"):
        condition = parse_filter({"type": "nin", "key": key, "value": [value]})
        found = stocked.hades.documents.matching("default", MALLORY, condition, 12, 100)
        theirs = stocked.hades.documents.documents(MALLORY, None, None, 100)
        assert set(found) == {d.document_id for d in theirs if _holds(condition, d)}


RAW: Mapping[str, object] = {
    "a text": 'tenant != ""', "a list": [{"a": 1}], "an operator of Milvus": {"type": "like", "key": "a", "value": "%"},
    "exists": {"type": "exists", "key": "a"},
    "an expression": {"type": "expr", "key": "a", "value": 'tenant != "acme"'},
    "one more field": {"type": "eq", "key": "a", "value": 1, "or": 1}, "an object": {"a": {"$ne": None}},
    "null": {"a": None}, "not": {"type": "not", "filters": []}, "nothing to join": {"type": "or", "filters": []},
    "a text to join": {"type": "and", "filters": "a == 1"}, "half a surrogate pair": {"a": "\ud800"},
    "an order of booleans": {"type": "gt", "key": "a", "value": True}, "a number too large": {"a": 2**63},
    "a list in a list": {"a": [["x"]]}, "no value": {"type": "in", "key": "a", "value": []},
}  # fmt: skip


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_Q1_what_is_no_filter_is_refused_with_a_pointer(door: Door, raw: object) -> None:
    headers = door.headers() | {"content-type": "application/json"}
    answer = door.client.post("/rag/search", content=json.dumps({"query": "q", "filters": raw}), headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"].startswith("/filters")


def _nested(depth: int) -> dict[str, object]:
    tree: dict[str, object] = {"a": 1}
    for _ in range(depth - 1):
        tree = {"type": "and", "filters": [tree]}
    return tree


LARGE: Mapping[str, object] = {
    "a megabyte of values": {"a": ["x" * 1024] * 1000}, "a long value": {"a": "x" * 1025},
    "a million terms": {"type": "or", "filters": [{"a": 1}] * 60_000}, "many values": {"a": list(range(257))},
    "a deep tree": _nested(MAX_DEPTH + 1), "a very deep tree": _nested(180),
    "many keys": {f"k{n}": 1 for n in range(65)},
}  # fmt: skip


@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE)
def test_API4_a_filter_that_is_too_large_is_refused_before_any_work(door: Door, large: object) -> None:
    answer = door.client.post("/rag/search", json={"query": "q", "filters": large}, headers=door.headers())
    assert answer.status_code in (413, 422), answer.text


def test_API4_a_filter_at_its_bounds_is_answered(house: House) -> None:
    house.put("a.md", "gripper", metadata={"a": 1})
    for tree in (_nested(MAX_DEPTH), {"a": list(range(256))}, {"type": "or", "filters": [{"a": 1}] * 64}):
        assert house.retriever.search(SearchRequest("gripper", filters=parse_filter(tree)), ALICE).hits
    with pytest.raises(InvalidRequest, match="deep"):
        parse_filter(_nested(MAX_DEPTH + 1))


# ── what Milvus is sent ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_Q1_a_milvus_server_is_sent_no_value_within_its_expression(value: str) -> None:
    store = MilvusVectors(Target("http://nowhere", lite=False))
    usual = store._restrict(Scope("acme", ("d1",), ("acme:x",)))
    sent = store._restrict(Scope(value, (value,), (value, "acme:x")))
    words = "tenant == {tenant} and audience in {audiences}"
    assert sent["filter"] == usual["filter"] == f"{words} and document_id in {{ids}}"
    assert sent["filter_params"] == {"tenant": value, "audiences": [value, value, "acme:x"], "ids": [value]}
    assert store._restrict(Scope(value))["filter"] == words


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_Q1_milvus_lite_is_sent_literals_that_mean_the_value_and_nothing_else(value: str) -> None:
    """Its expression is one of Python too: read as such, it is two memberships, in lists of strings as in JSON."""
    expression = MilvusVectors(Target("http://nowhere", lite=True))._restrict(Scope(value, (value, "d2")))["filter"]
    tree = ast.parse(expression, mode="eval").body
    assert isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And)
    read = {}
    for part in tree.values:
        assert isinstance(part, ast.Compare) and isinstance(part.left, ast.Name)
        assert [type(op) for op in part.ops] == [ast.In]
        read[part.left.id] = json.loads(ast.get_source_segment(expression, part.comparators[0]) or "")
    assert read == {"tenant": [value], "document_id": [value, "d2"]}


# ── Q3: the words of a query ────────────────────────────────────────────────────────────────────


QUERIES: Mapping[str, str] = {
    "near": "gripper NEAR torque", "near with numbers": "NEAR(gripper torque, 2)", "star": "grip*", "quote": '"gripper',
    "quotes": '"gripper" OR "x"', "column": "text:gripper", "minus": "-gripper", "caret": "^gripper",
    "not": "NOT gripper", "parenthesis": "(gripper", "nul": "gripper\x00torque", "like": "%grip_er%",
    "statement": "'; DROP TABLE chunks; --",
}  # fmt: skip


@pytest.mark.parametrize("query", {**QUERIES, **{k: v for k, v in VALUES.items() if v}}.values())
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["dense", "text"])
def test_Q3_the_words_of_a_query_are_words(stocked: House, query: str, weights: tuple[float, float]) -> None:
    request = SearchRequest(query, k=100, embedding_weight=weights[0], text_weight=weights[1])
    if not query.strip():
        return
    ours = {d.document_id for d in stocked.hades.documents.documents(ALICE, None, None, 100)}
    assert {hit.document_id for hit in stocked.retriever.search(request, ALICE).hits} <= ours
