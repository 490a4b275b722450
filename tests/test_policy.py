"""Policies: what a rule may say, which files it is about, and that plans are deterministic and come to rest."""

import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.actions import Action
from nexus.conditions import MAX_CONDITIONS, MAX_DEPTH, MAX_VALUES, is_met, parse_condition, show_condition
from nexus.errors import InvalidRequest
from nexus.policy import (
    BATCH,
    MAX_ACTIONS,
    Plan,
    Rule,
    action_names,
    check_rules,
    compare,
    converge,
    diff,
    matches,
    parse_file,
    parse_rule,
    plan,
    show_file,
    show_outcome,
    show_rule,
)
from nexus.types import FileOutcome, StoredFile

NOW = 1_800_000_000.0
DAY = 86_400.0
TIERS = ("hot", "warm", "cold")


def a_file(path: str = "robots/run.bag", **fields: object) -> StoredFile:
    given: dict[str, object] = {
        "tier": "hot", "size": 2000, "checksum": "c" * 32, "modified_at": NOW - 40 * DAY, "used_at": NOW - 5 * DAY,
        "media_type": "text/plain", "metadata": {"robot_id": "HX-3", "year": 2025, "ok": True},
    }  # fmt: skip
    return StoredFile("acme", path, **{**given, **fields})  # type: ignore[arg-type]


def a_rule(name: str, actions: object, conditions: object = (), priority: int = 0) -> Rule:
    trees = actions if isinstance(actions, list) else [actions]
    return parse_rule({"name": name, "actions": trees, "conditions": conditions, "priority": priority})


def move(to: str) -> dict[str, object]:
    return {"type": "move", "target": to}


DELETE = {"type": "delete"}
HOLD = {"type": "hold"}


def carried_out(done: Plan, files: list[StoredFile]) -> list[StoredFile]:
    """The files after a plan, by its actions' own effects, with no hands in between."""
    after: dict[str, StoredFile] = {file.path: file for file in files}
    for action in done.actions:
        for file in action.files:
            if action.destroys:
                del after[file.path]
            else:
                after[file.path] = action.effect(after[file.path], TIERS)
    return list(after.values())


def told(done: Plan) -> list[tuple[str, str, str, str]]:
    return [(one.action, one.path, one.target, one.rule) for one in done.outcomes()]


# ── conditions ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "operator", "value", "is_so"),
    [
        ("file_size", ">", 1000, True),
        ("size", ">", 2000, False),
        ("size", ">=", 2000, True),
        ("size", "<", "2KiB", True),
        ("size", "<", "2kB", False),
        ("size", "==", 2000.0, True),
        ("size", "in", [1, "2 kB"], True),
        ("size", "not_in", [1, 2], True),
        ("size", "!=", 2000, False),
        ("age", ">", "30d", True),
        ("age", ">", "6w", False),
        ("age", "<=", 40 * DAY, True),
        ("unused", "<", "6d", True),
        ("last_use_age", ">", "6d", False),
        ("path", "matches", "robots/*.bag", True),
        ("path", "matches", "*.bag", True),
        ("path", "matches", "run.bag", False),
        ("path", "starts_with", "robots/", True),
        ("name", "==", "run.bag", True),
        ("file_name", "ends_with", ".bag", True),
        ("suffix", "==", ".bag", True),
        ("folder", "eq", "robots", True),
        ("folder", "ne", "robots", False),
        ("type", "starts_with", "text/", True),
        ("media_type", "contains", "t/p", True),
        ("media_type", "not_contains", "t/p", False),
        ("tier", "in", ["hot", "warm"], True),
        ("tier", "nin", ["hot"], False),
        ("checksum", "==", "c" * 32, True),
        ("robot_id", "==", "HX-3", True),
        ("metadata.robot_id", "!=", "HX-3", False),
        ("metadata.year", ">=", 2025, True),
        ("metadata.year", "lt", 2025, False),
        ("metadata.ok", "==", True, True),
        ("metadata.robot_id", ">", "HX-2", True),
        ("metadata.robot_id", "exists", True, True),
        ("metadata.owner", "exists", False, True),
        ("metadata.owner", "exists", True, False),
        ("tags", "exists", False, True),
        ("tags", "contains", "x", False),
        ("tags", "not_contains", "x", True),
        ("replicas", "contains", "cold", False),
        ("indexed", "not_contains", "default", True),
        # what is not there, or of another kind, compares neither way
        ("metadata.owner", "==", "bob", None),
        ("metadata.owner", "!=", "bob", None),
        ("metadata.owner", "not_in", ["b"], None),
        ("metadata.year", "==", "2025", None),
        ("metadata.year", "!=", "2025", None),
        ("metadata.ok", "==", 1, None),
        ("metadata.year", "==", True, None),
        ("metadata.ok", ">", 0, None),
        ("metadata.year", "matches", "2*", None),
        ("metadata.robot_id", "<", 3, None),
        ("metadata.year", "in", ["2025", 2025], True),
        ("metadata.year", "in", ["2025"], None),
    ],
)
def test_one_comparison(field: str, operator: str, value: object, is_so: bool | None) -> None:
    condition = parse_condition({"field": field, "operator": operator, "value": value})
    assert is_met(condition, a_file(), NOW) is is_so
    assert is_met(parse_condition({"not": show_condition(condition)}), a_file(), NOW) is (
        None if is_so is None else not is_so
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 1), ("age", 1), ("unused", 1), ("media_type", "x"), ("checksum", "x"), ("tier", "x"), ("suffix", ".x")],
)
def test_what_is_not_known_of_a_file_is_unknown(field: str, value: object) -> None:
    bare = StoredFile("acme", "run", "", -1)
    for operator in ("==", "!=", ">"):
        assert is_met(parse_condition({"field": field, "operator": operator, "value": value}), bare, NOW) is None


TRUE = {"field": "size", "operator": "==", "value": 2000}
FALSE = {"field": "size", "operator": "==", "value": 1}
UNKNOWN = {"field": "metadata.none", "operator": "==", "value": 1}


@pytest.mark.parametrize(
    ("tree", "is_so"),
    [
        ([], True),
        ([TRUE, TRUE], True),
        ([TRUE, FALSE], False),
        ([TRUE, UNKNOWN], None),
        ([UNKNOWN, FALSE], False),
        ({"any": [FALSE, TRUE]}, True),
        ({"any": [UNKNOWN, TRUE]}, True),
        ({"any": [UNKNOWN, FALSE]}, None),
        ({"any": [FALSE]}, False),
        ({"all": [TRUE, {"any": [FALSE, {"not": FALSE}]}]}, True),
        ({"not": UNKNOWN}, None),
        ({"not": [TRUE, FALSE]}, True),
        ([[TRUE], {"all": [TRUE]}], True),
    ],
)
def test_trees_have_three_values(tree: object, is_so: bool | None) -> None:
    assert is_met(parse_condition(tree), a_file(), NOW) is is_so


@pytest.mark.parametrize(
    ("tree", "pointer", "told"),
    [
        ("size > 3", "", "object"),
        ({}, "", "exactly"),
        ({"all": []}, "/all", "non-empty"),
        ({"any": "x"}, "/any", "list"),
        ({"all": [TRUE], "any": [TRUE]}, "", "exactly"),
        ({"not": 3}, "/not", "object"),
        ([TRUE, 3], "/1", "object"),
        ({**TRUE, "x": 1}, "", "exactly"),
        ({**TRUE, "field": "colour"}, "/field", "no such field"),
        ({**TRUE, "field": 3}, "/field", "no such field"),
        ({**TRUE, "field": "metadata."}, "/field", "no such field"),
        ({**TRUE, "field": "metadata.a b"}, "/field", "no such field"),
        ({**TRUE, "field": "holds"}, "/field", "no such"),
        ({**TRUE, "operator": "~"}, "/operator", "can be compared with"),
        ({**TRUE, "operator": ["=="]}, "/operator", "can be compared with"),
        ({**TRUE, "operator": "matches"}, "/operator", "can be compared with"),
        ({"field": "tags", "operator": "==", "value": "x"}, "/operator", "contains"),
        ({**TRUE, "value": "big"}, "/value", "MiB|mib"),
        ({**TRUE, "value": True}, "/value", "number"),
        ({**TRUE, "value": "3d"}, "/value", "mib"),
        ({**TRUE, "value": float("nan")}, "/value", "finite"),
        ({**TRUE, "value": 2**63}, "/value", "64 bits"),
        ({**TRUE, "value": 10**400}, "/value", "64 bits"),
        ({**TRUE, "value": None}, "/value", "number"),
        ({**TRUE, "operator": "in", "value": 3}, "/value", "list"),
        ({**TRUE, "operator": "in", "value": []}, "/value", "list"),
        ({**TRUE, "operator": "in", "value": [1, "x"]}, "/value/1", "number"),
        ({**TRUE, "operator": "in", "value": [1] * (MAX_VALUES + 1)}, "/value", "list"),
        ({"field": "path", "operator": "==", "value": 3}, "/value", "text"),
        ({"field": "path", "operator": "==", "value": "x" * 1025}, "/value", "characters"),
        ({"field": "path", "operator": "==", "value": "\ud800"}, "/value", "surrogate"),
        ({"field": "metadata.a", "operator": "==", "value": [1]}, "/value", "boolean"),
        ({"field": "metadata.a", "operator": ">", "value": True}, "/value", "no order"),
        ({"field": "metadata.a", "operator": "matches", "value": 3}, "/value", "text"),
        ({"field": "metadata.a", "operator": "exists", "value": 1}, "/value", "true or false"),
        ([TRUE] * (MAX_CONDITIONS + 1), "", "at most"),
        ([[TRUE] * MAX_CONDITIONS, TRUE], "/1", "at most"),
    ],
)
def test_a_condition_that_cannot_be_is_refused_where_it_is_wrong(tree: object, pointer: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        parse_condition(tree)
    assert refused.value.pointer == f"/conditions{pointer}"


def test_conditions_nest_only_so_deep() -> None:
    tree: object = TRUE
    for _ in range(MAX_DEPTH - 1):
        tree = {"not": tree}
    parse_condition(tree)
    with pytest.raises(InvalidRequest, match="deep"):
        parse_condition({"not": tree})
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(InvalidRequest, match="deep"):
        parse_condition(tree)


# ── rules ───────────────────────────────────────────────────────────────────────────────────────


def test_the_founding_rule_is_a_rule() -> None:
    rule = parse_rule(
        {
            "conditions": [{"field": "file_size", "operator": ">", "value": 1000}],
            "actions": [{"type": "move", "target": "cold_storage"}],
        },
        name="test_policy",
    )
    file = parse_file({"file_path": "/test/file.txt", "file_size": 2000}, "acme")
    done = plan([rule], [file], NOW, ("cold_storage",))
    assert told(done) == [("move", "test/file.txt", "cold_storage", "test_policy")]
    assert show_outcome(done.outcomes()[0]) == {
        "action": "move", "file_path": "test/file.txt", "target": "cold_storage", "status": "planned",
        "policy_name": "test_policy",
    }  # fmt: skip
    assert show_file(file) == {"file_path": "test/file.txt", "file_size": 2000}
    assert plan([rule], [replace(file, size=900)], NOW) == Plan()


ONE_ACTION = [DELETE]


@pytest.mark.parametrize(
    ("tree", "pointer", "told"),
    [
        ([], "", "object"),
        ({"actions": ONE_ACTION}, "/name", "name"),
        ({"name": "", "actions": ONE_ACTION}, "/name", "1 to"),
        ({"name": "../x", "actions": ONE_ACTION}, "/name", "letters"),
        ({"name": "x" * 65, "actions": ONE_ACTION}, "/name", "1 to"),
        ({"name": "r"}, "/actions", "1 to"),
        ({"name": "r", "actions": []}, "/actions", "1 to"),
        ({"name": "r", "actions": DELETE}, "/actions", "list"),
        ({"name": "r", "actions": ONE_ACTION * (MAX_ACTIONS + 1)}, "/actions", "at most|1 to"),
        ({"name": "r", "actions": ONE_ACTION, "x/y": 1}, "/x~1y", "conditions"),
        ({"name": "r", "actions": ONE_ACTION, "priority": "high"}, "/priority", "whole"),
        ({"name": "r", "actions": ONE_ACTION, "priority": True}, "/priority", "whole"),
        ({"name": "r", "actions": ONE_ACTION, "priority": 1001}, "/priority", "1000"),
        ({"name": "r", "actions": ONE_ACTION, "enabled": "yes"}, "/enabled", "true"),
        ({"name": "r", "actions": ONE_ACTION, "description": "x" * 1025}, "/description", "1024"),
        ({"name": "r", "actions": ONE_ACTION, "conditions": None}, "/conditions", "object"),
        ({"name": "r", "actions": [3]}, "/actions/0/type", "move"),
        ({"name": "r", "actions": [{"type": "explode"}]}, "/actions/0/type", "delete, hold, index, move"),
        ({"name": "r", "actions": [{"type": "os"}]}, "/actions/0/type", "delete"),
        ({"name": "r", "actions": [{"type": ["move"]}]}, "/actions/0/type", "delete"),
        ({"name": "r", "actions": [{"type": "move"}]}, "/actions/0/target", "name"),
        ({"name": "r", "actions": [move(3)]}, "/actions/0/target", "text"),
        ({"name": "r", "actions": [move("a\nb")]}, "/actions/0/target", "control"),
        ({"name": "r", "actions": [{**move("a"), "to": 1}]}, "/actions/0/to", "has no 'to'"),
        ({"name": "r", "actions": [DELETE, move("cold")]}, "/actions/1", "same thing"),
        ({"name": "r", "actions": [{"type": "replicate"}]}, "/actions/0", "either"),
        ({"name": "r", "actions": [{"type": "replicate", "count": 0}]}, "/actions/0/count", "1 to"),
        ({"name": "r", "actions": [{"type": "replicate", "count": True}]}, "/actions/0/count", "1 to"),
        ({"name": "r", "actions": [{"type": "replicate", "targets": "cold"}]}, "/actions/0/targets", "list"),
        ({"name": "r", "actions": [{"type": "tag"}]}, "/actions/0", "to add or"),
        ({"name": "r", "actions": [{"type": "tag", "add": ["x"], "remove": ["x"]}]}, "/actions/0", "both"),
        ({"name": "r", "actions": [{"type": "tag", "add": ["x", ""]}]}, "/actions/0/add/1", "text"),
        ({"name": "r", "actions": [{"type": "index", "collection": "a b"}]}, "/actions/0/collection", "letters"),
        ({"name": "r", "actions": [{"type": "index", "readers": []}]}, "/actions/0/readers", "everyone"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_where_it_is_wrong(tree: object, pointer: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        parse_rule(tree)
    assert refused.value.pointer == pointer


def test_a_rule_is_put_under_its_own_name_only() -> None:
    tree = {"name": "other", "actions": ONE_ACTION}
    with pytest.raises(InvalidRequest, match="'other'"):
        parse_rule(tree, name="r")


def test_rules_name_tiers_that_are_there() -> None:
    check_rules([a_rule("r", [move("cold"), {"type": "replicate", "count": 3}])], TIERS)
    with pytest.raises(InvalidRequest, match=r"no tier 'tape'; there are hot, warm, cold"):
        check_rules([a_rule("r", move("tape"))], TIERS)
    with pytest.raises(InvalidRequest, match="no tier 'tape'"):
        check_rules([a_rule("r", {"type": "replicate", "targets": ["cold", "tape"]})], TIERS)
    with pytest.raises(InvalidRequest, match="4 copies"):
        check_rules([a_rule("r", {"type": "replicate", "count": 4})], TIERS)


@pytest.mark.parametrize(
    ("tree", "pointer"),
    [
        ({"file_size": 3}, "/file/path"),
        ({"path": "../x"}, "/file/path"),
        ({"path": 3}, "/file/path"),
        ({"path": "x", "size": "big"}, "/file/size"),
        ({"path": "x", "tags": "a"}, "/file/tags"),
        ({"path": "x", "metadata": []}, "/file/metadata"),
        ({"path": "x", "robot": {"id": 1}}, "/file/robot"),
        ({"path": "x", "modified_at": "yesterday"}, "/file/modified_at"),
        (["x"], "/file"),
        ({"path": "x", "a b": 1}, "/file/a b"),
        ({"path": "x", **{f"k{n}": 1 for n in range(70)}}, "/file"),
    ],
)
def test_a_described_file_that_cannot_be_is_refused(tree: object, pointer: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_file(tree, "acme")
    assert refused.value.pointer == pointer


def test_an_action_is_one_file() -> None:
    assert action_names() == ("delete", "hold", "index", "move", "replicate", "tag")


# ── plans ───────────────────────────────────────────────────────────────────────────────────────


def test_the_larger_priority_wins_and_then_the_name() -> None:
    rules = [a_rule("b", move("cold")), a_rule("a", move("warm")), a_rule("z", move("hot"), priority=-1)]
    done = plan(rules, [a_file()], NOW, TIERS)
    assert told(done) == [("move", "robots/run.bag", "warm", "a")]
    assert [(one.rule, one.target, one.reason) for one in done.withheld] == [
        ("b", "cold", "rule 'a' comes first"), ("z", "hot", "rule 'a' comes first")
    ]  # fmt: skip
    rules[0] = replace(rules[0], priority=1)
    assert told(plan(rules, [a_file()], NOW, TIERS)) == [("move", "robots/run.bag", "cold", "b")]
    assert plan([replace(rules[0], enabled=False)], [a_file()], NOW, TIERS) == Plan()


def test_a_rule_that_is_content_keeps_later_ones_away() -> None:
    """Otherwise the second would move what the first has moved, and the first move it back."""
    rules = [a_rule("first", move("hot"), priority=1), a_rule("second", move("cold"))]
    done = plan(rules, [a_file(tier="hot")], NOW, TIERS)
    assert not done.actions
    assert [one.rule for one in done.withheld] == ["second"]


def test_several_rules_do_several_things_to_one_file_in_a_safe_order() -> None:
    rules = [
        a_rule("a", [move("cold"), {"type": "index"}]), a_rule("b", {"type": "tag", "add": ["old"]}),
        a_rule("c", HOLD), a_rule("d", {"type": "replicate", "targets": ["hot", "warm"]}),
    ]  # fmt: skip
    done = plan(rules, [a_file()], NOW, TIERS)
    assert [one[0] for one in told(done)] == ["hold", "tag", "index", "move", "replicate"]
    (after,) = carried_out(done, [a_file()])
    assert (after.tier, after.replicas, after.tags, after.holds) == ("cold", {"hot", "warm"}, {"old"}, {"c"})
    assert plan(rules, [after], NOW, TIERS) == Plan()


def test_what_one_rule_changes_another_sees_in_the_same_plan() -> None:
    rules = [
        a_rule("mark", {"type": "tag", "add": ["old"]}, {"field": "age", "operator": ">", "value": "30d"}),
        a_rule(
            "sort",
            move("warm"),
            [
                {"field": "tags", "operator": "contains", "value": "old"},
                {"field": "tier", "operator": "==", "value": "hot"},
            ],
        ),
        a_rule("sink", move("cold"), {"field": "tier", "operator": "==", "value": "warm"}, priority=1),
    ]
    done = plan(rules, [a_file(), a_file("new", modified_at=NOW)], NOW, TIERS)
    assert told(done) == [("tag", "robots/run.bag", "+old", "mark"), ("move", "robots/run.bag", "cold", "sink")]


def test_rules_that_undo_each_other_do_nothing_and_are_named() -> None:
    rules = [
        a_rule("up", move("hot"), {"field": "tier", "operator": "==", "value": "cold"}),
        a_rule("down", move("cold"), {"field": "tier", "operator": "==", "value": "hot"}),
        a_rule("keep", HOLD),
    ]
    done = plan(rules, [a_file()], NOW, TIERS)
    assert told(done) == [("hold", "robots/run.bag", "keep", "keep")]
    assert {(one.rule, one.reason) for one in done.withheld} == {
        (name, "'down' and 'up' would undo what they do") for name in ("up", "down")
    }
    (after,) = carried_out(done, [a_file()])
    assert not plan(rules, [after], NOW, TIERS).actions


def test_rules_that_take_a_file_from_one_copy_to_the_next_are_seen() -> None:
    """By way of the first the second would leave no copy there; straight it does, and that one calls it back."""
    rules = [
        a_rule(tier, move(tier), {"field": "replicas", "operator": "contains", "value": tier})
        for tier in ("warm", "cold")
    ]
    done = plan(rules, [a_file(replicas=frozenset({"warm", "cold"}))], NOW, TIERS)
    assert not done.actions
    assert {one.reason for one in done.withheld} == {"'cold' and 'warm' would undo what they do"}


def test_a_detour_is_left_out_and_what_is_done_is_done_once() -> None:
    tier = lambda name: {"field": "tier", "operator": "==", "value": name}  # noqa: E731
    rules = [
        a_rule("sink", move("cold"), tier("hot")),
        a_rule("thaw", [move("warm"), {"type": "tag", "add": ["t"]}], [tier("cold"), {"not": HAS_T}]),
        a_rule("freeze", move("cold"), tier("warm")),
    ]
    assert told(plan(rules, [a_file()], NOW, TIERS)) == [
        ("tag", "robots/run.bag", "+t", "thaw"), ("move", "robots/run.bag", "cold", "freeze")
    ]  # fmt: skip


HAS_T = {"field": "tags", "operator": "contains", "value": "t"}


def test_a_hold_beats_deletion_of_any_priority_and_in_the_same_plan() -> None:
    expiry = a_rule("expiry", DELETE, {"field": "age", "operator": ">", "value": "30d"}, priority=1000)
    assert told(plan([expiry], [a_file()], NOW)) == [("delete", "robots/run.bag", "", "expiry")]
    held = plan([expiry], [a_file(holds=frozenset({"case 17"}))], NOW)
    assert not held.actions
    assert [(one.action, one.rule, one.reason) for one in held.withheld] == [("delete", "expiry", "held: case 17")]
    both = plan([expiry, a_rule("hold", HOLD, priority=-1000)], [a_file()], NOW)
    assert told(both) == [("hold", "robots/run.bag", "hold", "hold")]
    tagged = [
        expiry, a_rule("mark", {"type": "tag", "add": ["case"]}, priority=-1),
        a_rule("hold", {"type": "hold", "name": "case 17"}, {"field": "tags", "operator": "contains", "value": "case"}),
    ]  # fmt: skip
    assert {one[0] for one in told(plan(tagged, [a_file()], NOW))} == {"hold", "tag"}


def test_what_is_held_can_still_be_moved_by_the_rule_after_its_expiry() -> None:
    rules = [a_rule("expiry", DELETE, priority=5), a_rule("sink", move("cold"))]
    assert told(plan(rules, [a_file()], NOW, TIERS)) == [("delete", "robots/run.bag", "", "expiry")]
    held = plan(rules, [a_file(holds=frozenset({"x"}))], NOW, TIERS)
    assert told(held) == [("move", "robots/run.bag", "cold", "sink")]


def test_what_is_to_be_deleted_is_not_moved_before() -> None:
    rules = [
        a_rule("sink", move("cold"), {"field": "tier", "operator": "==", "value": "hot"}, priority=1),
        a_rule("expiry", DELETE, {"field": "tier", "operator": "==", "value": "cold"}),
    ]
    assert told(plan(rules, [a_file()], NOW, TIERS)) == [("delete", "robots/run.bag", "", "expiry")]


def test_copies_are_counted_with_the_home_and_in_the_tiers_order() -> None:
    three = a_rule("r", {"type": "replicate", "count": 2})
    assert told(plan([three], [a_file(tier="warm")], NOW, TIERS))[0][2] == "hot"
    assert told(plan([three], [a_file(tier="warm", replicas=frozenset({"cold"}))], NOW, TIERS)) == []
    much = a_file(tier="warm", replicas=frozenset({"cold", "hot"}))
    assert told(plan([three], [much], NOW, TIERS))[0][2] == "hot"
    moved = plan([three, a_rule("m", move("hot"))], [a_file(tier="warm", replicas=frozenset({"hot"}))], NOW, TIERS)
    assert [one[:3] for one in told(moved)] == [
        ("move", "robots/run.bag", "hot"),
        ("replicate", "robots/run.bag", "warm"),
    ]


def test_what_was_asked_of_a_placing_tier_is_not_asked_again() -> None:
    rule = a_rule("sink", move("cold"), {"field": "tier", "operator": "==", "value": "hot"})
    assert plan([rule], [a_file(bound_for="cold")], NOW, TIERS) == Plan()
    assert told(plan([a_rule("up", move("hot"))], [a_file(bound_for="cold")], NOW, TIERS))[0][2] == "hot"


def test_an_index_is_made_again_when_the_bytes_are_others() -> None:
    rule = a_rule("r", {"type": "index"})
    assert told(plan([rule], [a_file(indexed={"default": "c" * 32})], NOW)) == []
    assert told(plan([rule], [a_file(indexed={"default": "d" * 32})], NOW)) == [
        ("index", "robots/run.bag", "default", "r")
    ]


def test_actions_come_in_batches() -> None:
    done = plan([a_rule("r", move("cold"))], [a_file(f"{n:05}") for n in range(2 * BATCH + 1)], NOW, TIERS)
    assert [len(action.files) for action in done.actions] == [BATCH, BATCH, 1]


def test_a_change_of_a_rule_shows_exactly_the_files_it_moves() -> None:
    files = [a_file(f"{n:03}.bag", size=n) for n in range(100)]
    before = a_rule("sink", move("cold"), {"field": "size", "operator": ">=", "value": 90})
    files = carried_out(plan([before], files, NOW, TIERS), files)
    assert plan([before], files, NOW, TIERS) == Plan()
    after = a_rule("sink", move("cold"), {"field": "size", "operator": ">=", "value": 87})
    done = plan([after], files, NOW, TIERS)
    assert diff(done).splitlines() == [
        "move       087.bag  hot → cold  [sink]",
        "move       088.bag  hot → cold  [sink]",
        "move       089.bag  hot → cold  [sink]",
        "3 to move",
    ]
    assert compare(plan([before], files, NOW, TIERS), done).splitlines() == [
        f"+ move       08{n}.bag  hot → cold  [sink]" for n in (7, 8, 9)
    ]
    assert compare(done, done) == "no difference"
    files = carried_out(done, files)
    assert diff(plan([after], files, NOW, TIERS)) == "nothing to do"


def test_a_diff_cannot_be_forged_by_a_file_name() -> None:
    rule = a_rule("expiry", DELETE)
    text = diff(plan([rule], [a_file("a\nmove b  hot → cold\x1b[2J", holds=frozenset({"h"}))], NOW))
    assert len(text.splitlines()) == 2 and "\x1b" not in text
    assert text.endswith("nothing to do; 1 withheld")


# ── properties ──────────────────────────────────────────────────────────────────────────────────

TAGS = ("x", "y", "z")
EXAMPLES = int(os.environ.get("POLICY_EXAMPLES", "200"))  # more of them: POLICY_EXAMPLES=20000


TESTS: list[dict[str, object]] = [
    {"field": field, "operator": operator, "value": value}
    for field, operators, values in (
        ("tier", ["==", "!="], TIERS), ("tags", ["contains", "not_contains"], TAGS),
        ("replicas", ["contains", "not_contains"], TIERS), ("indexed", ["contains"], ("default", "second")),
        ("size", [">", "<="], (1, 3)), ("age", [">", "<="], (1, 3)), ("metadata.robot_id", ["==", "!="], ("a", "b")),
    )
    for operator in operators
    for value in values
]  # fmt: skip
CONDITIONS = st.one_of(
    st.sampled_from(TESTS),
    st.sampled_from([{"not": test} for test in TESTS]),
    st.tuples(st.sampled_from(["any", "all"]), st.sampled_from(TESTS), st.sampled_from(TESTS)).map(
        lambda drawn: {drawn[0]: [drawn[1], {"not": drawn[2]}]}
    ),
)
ACTIONS = st.sampled_from(
    [DELETE, *({"type": "hold", "name": name} for name in ("one", "two"))]
    + [move(tier) for tier in TIERS] * 2
    + [{"type": "replicate", "targets": on} for on in ([], ["hot"], ["cold"], ["warm", "cold"])]
    + [{"type": "replicate", "count": count} for count in (1, 2, 3)]
    + [{"type": "tag", how: names} for how in ("add", "remove") for names in (["x"], ["y"], ["x", "z"])]
    + [{"type": "index", "collection": name} for name in ("default", "second")]
)


def parsed(trees: list[tuple[int, list[object], list[object]]]) -> list[Rule]:
    """Rules of (priority, conditions, actions); one that is against itself is none."""
    found = []
    for number, (priority, conditions, actions) in enumerate(trees):
        with suppress(InvalidRequest):
            found.append(a_rule(f"r{number}", actions, conditions, priority))
    return found


RULES = st.lists(
    st.tuples(st.integers(0, 2), st.lists(CONDITIONS, max_size=2), st.lists(ACTIONS, min_size=1, max_size=2)),
    max_size=6,
).map(parsed)
FILES = st.lists(
    st.builds(
        lambda tier, **fields: a_file(
            tier=tier, replicas=fields.pop("replicas") - {tier}, modified_at=NOW - fields.pop("age"), **fields
        ),
        tier=st.sampled_from(TIERS),
        size=st.integers(0, 4),
        age=st.integers(0, 4),
        tags=st.frozensets(st.sampled_from(TAGS)),
        replicas=st.frozensets(st.sampled_from(TIERS)),
        holds=st.frozensets(st.just("before")),
        metadata=st.sampled_from([{}, {"robot_id": "a"}, {"robot_id": 3}]),
        indexed=st.sampled_from([{}, {"default": "c" * 32}, {"default": "old"}]),
    ),
    max_size=4,
).map(lambda files: [replace(file, path=f"{number}.bag") for number, file in enumerate(files)])


@settings(max_examples=EXAMPLES, deadline=None)
@given(RULES, FILES)
def test_a_plan_that_was_carried_out_leaves_nothing_to_plan(some: list[Rule], files: list[StoredFile]) -> None:
    done = plan(some, files, NOW, TIERS)
    again = plan(some, carried_out(done, files), NOW, TIERS)
    assert again.actions == ()


@settings(max_examples=60, deadline=None)
@given(RULES, FILES, st.randoms(use_true_random=False))
def test_a_plan_depends_on_no_order_and_changes_nothing(
    some: list[Rule], files: list[StoredFile], dice: random.Random
) -> None:
    before = (repr(some), repr(files))
    done = plan(some, files, NOW, TIERS)
    assert (repr(some), repr(files)) == before
    shuffled, turned = list(some), list(files)
    dice.shuffle(shuffled)
    dice.shuffle(turned)
    assert plan(shuffled, turned, NOW, TIERS) == done
    one_by_one = [told(plan(some, [file], NOW, TIERS)) for file in files]
    assert sorted(told(done)) == sorted(line for lines in one_by_one for line in lines)  # no file minds another


@settings(max_examples=80, deadline=None)
@given(RULES, FILES)
def test_no_held_file_is_deleted_and_none_that_is_held_by_then(some: list[Rule], files: list[StoredFile]) -> None:
    done = plan([*some, a_rule("expiry", DELETE, priority=1000)], files, NOW, TIERS)
    after = {file.path: file for file in carried_out(done, files)}
    assert {file.path for file in files if file.holds} <= set(after)
    held = {file.path for action in done.actions if action.name == "hold" for file in action.files}
    assert held <= set(after)
    for rule in some:
        if any(action.name == "hold" for action in rule.actions):
            assert {file.path for file in files if matches(rule, file, NOW)} <= set(after)


@settings(max_examples=60, deadline=None)
@given(RULES)
def test_a_rule_comes_back_from_its_json(some: list[Rule]) -> None:
    for rule in some:
        assert parse_rule(show_rule(rule)) == rule


# ── doing it ────────────────────────────────────────────────────────────────────────────────────


class NotedHands:
    """Hands that note what they are asked, and fail at some files."""

    def __init__(self, *broken: str) -> None:
        self.broken, self.asked = broken, list[tuple[str, str, object]]()

    def _do(self, what: str, files: tuple[StoredFile, ...], *how: object) -> list[FileOutcome]:
        self.asked += [(what, file.path, *how) for file in files]  # type: ignore[misc]
        return [
            FileOutcome(what, file.tenant, file.path, "failed" if file.path in self.broken else "success")
            for file in files
        ]

    def __getattr__(self, name: str) -> Callable[..., list[FileOutcome]]:
        return lambda files, *how: self._do(name, files, *how)


def test_converging_asks_the_hands_and_leaves_what_failed() -> None:
    rules = [a_rule("a", [{"type": "tag", "add": ["t"]}, move("cold"), {"type": "index", "readers": ["bob"]}])]
    hands, heard = NotedHands("bad"), list[FileOutcome]()
    done = converge(plan(rules, [a_file("bad"), a_file("good")], NOW, TIERS), hands, heard.extend)  # type: ignore[arg-type]
    assert hands.asked == [
        ("tag", "bad", {"t"}, frozenset()), ("tag", "good", {"t"}, frozenset()),
        ("index", "good", "default", {"bob"}), ("move", "good", "cold"),
    ]  # fmt: skip
    assert [(one.action, one.path, one.status, one.rule) for one in done] == [
        ("tag", "bad", "failed", "a"), ("tag", "good", "success", "a"), ("index", "good", "success", "a"),
        ("move", "good", "success", "a"),
    ]  # fmt: skip
    assert heard == done


def test_every_action_has_its_hand() -> None:
    everything = [
        a_rule(
            "a", [HOLD, {"type": "tag", "add": ["t"]}, {"type": "index"}, {"type": "replicate", "targets": ["warm"]}]
        ),
        a_rule("b", move("cold"), {"field": "name", "operator": "==", "value": "keep"}, priority=1),
        a_rule("c", DELETE, {"field": "name", "operator": "==", "value": "go"}),
    ]
    hands = NotedHands()
    files = [a_file("keep"), a_file("go")]
    converge(plan(everything, files, NOW, TIERS), hands)  # type: ignore[arg-type]
    assert {one[0] for one in hands.asked} == {"hold", "tag", "index", "replicate", "move"}
    converge(plan(everything[2:], files, NOW, TIERS), hands)  # type: ignore[arg-type]
    assert hands.asked[-1] == ("delete", "go")
    assert {action.name for rule in everything for action in rule.actions} == set(action_names())
    assert all(isinstance(action, Action) for rule in everything for action in rule.actions)


def test_whether_a_rule_is_about_a_file() -> None:
    rule = a_rule("r", DELETE, {"field": "metadata.owner", "operator": "!=", "value": "bob"})
    assert not matches(rule, a_file(), NOW)  # nobody knows whose it is
    assert matches(rule, a_file(metadata={"owner": "eve"}), NOW)
    assert not matches(replace(rule, enabled=False), a_file(metadata={"owner": "eve"}), NOW)
