"""Rules as expressions of Hammerspace: that they mean the same there, and what has no expression."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexus.conditions import All, Any, Condition, Not, Test, is_met, parse_condition
from nexus.errors import InvalidRequest
from nexus.objectives import MOST_CHARACTERS, compile_condition, compile_rule
from nexus.types import StoredFile
from tests.anvil import Scene, parse

NOW = 2_000_000_000.0
HOUR = 3600
LETTERS = "ab./*?[]!-{} é"

# ── what it means ───────────────────────────────────────────────────────────────────────────────

TEXT = st.text(LETTERS, max_size=4)
NAME = st.text("abA.-[]*?!é", min_size=1, max_size=5).filter(lambda name: name.strip(".") and ".." not in name)
PATH = st.lists(NAME, min_size=1, max_size=3).map("/".join)
PATTERN = st.text("ab./*?-", max_size=5)


def comparing(field: str, operators: list[str], values: st.SearchStrategy[object]) -> st.SearchStrategy[Test]:
    return st.builds(lambda operator, value: Test(field, operator, (value,)), st.sampled_from(operators), values)


def several(field: str, values: st.SearchStrategy[object]) -> st.SearchStrategy[Test]:
    many = st.lists(values, min_size=1, max_size=3).map(tuple)
    return st.builds(Test, st.just(field), st.sampled_from(["in", "not_in"]), many)


WHOLE_HOURS = st.integers(0, 50).map(lambda hours: hours * HOUR)
POSITIVE = st.one_of(  # what cannot be asked under `not`
    comparing("suffix", ["=="], st.sampled_from([".a", ".b", ".é"]))
)
ANYWHERE = st.one_of(
    comparing("path", ["==", "!=", "starts_with", "ends_with", "contains", "not_contains"], st.one_of(PATH, TEXT)),
    comparing("path", ["matches"], PATTERN),
    several("path", PATH),
    comparing("name", ["==", "!=", "ends_with"], NAME),
    comparing("name", ["matches"], st.text("abA.-]!é", min_size=1, max_size=5).map(lambda name: "*" + name)),
    comparing("folder", ["==", "!="], st.one_of(PATH, st.just(""))),
    comparing("folder", ["starts_with"], NAME),
    comparing("size", ["==", "!=", "<", "<=", ">", ">="], st.integers(0, 5)),
    several("size", st.integers(0, 5)),
    comparing("unused", ["<", "<=", ">", ">="], WHOLE_HOURS),
    comparing("tags", ["contains", "not_contains"], st.sampled_from(["hot", "cold"])),
    comparing("metadata.robot_id", ["==", "!="], st.sampled_from(["HX-3", "HX-4"])),
    several("metadata.robot_id", st.sampled_from(["HX-3", "HX-4", "HX-5"])),
    comparing("metadata.robot_id", ["exists"], st.booleans()),
)


def trees(leaves: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
    def deeper(inner: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
        parts = st.lists(inner, max_size=3).map(tuple)
        return st.one_of(parts.map(All), parts.filter(bool).map(Any), inner.map(Not))

    return st.recursive(leaves, deeper, max_leaves=6)


FILES = st.builds(
    StoredFile,
    tenant=st.just("acme"), path=PATH, tier=st.just("hot"), size=st.integers(0, 6),
    used_at=st.integers(0, 51 * HOUR).map(lambda seconds: NOW - seconds),
    tags=st.frozensets(st.sampled_from(["hot", "cold", "other"])),
    metadata=st.one_of(st.just({}), st.sampled_from(["HX-3", "HX-4", "HX-9"]).map(lambda robot: {"robot_id": robot})),
)  # fmt: skip


def scene(file: StoredFile) -> Scene:
    return {
        "path": f"/{file.tenant}/{file.path}", "size": file.size, "last_use_age": NOW - file.used_at,
        "keywords": file.tags, "tags": dict(file.metadata),
    }  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(condition=trees(ANYWHERE), files=st.lists(FILES, min_size=1, max_size=5))
@example(Not(Test("metadata.robot_id", "==", ("HX-3",))), [StoredFile("acme", "a", "hot", 1, used_at=NOW)])
@example(Not(Any((Test("size", ">", (1,)), Not(All(()))))), [StoredFile("acme", "a", "hot", 1, used_at=NOW)])
def test_an_expression_is_true_of_the_files_that_meet_the_condition(
    condition: Condition, files: list[StoredFile]
) -> None:
    rule = parse(compile_rule("acme", condition, ["keep-online"]))
    for file in files:
        assert rule.holds(scene(file)) is (is_met(condition, file, NOW) is True), (condition, file)


@settings(max_examples=50, deadline=None)
@given(condition=POSITIVE, file=FILES)
@example(Test("suffix", "==", (".a",)), StoredFile("acme", "x/.a", "hot", 1, used_at=NOW))
@example(Test("suffix", "==", (".a",)), StoredFile("acme", "x/y.A", "hot", 1, used_at=NOW))
@example(Test("suffix", "in", (".b", ".a")), StoredFile("acme", "x.b/y", "hot", 1, used_at=NOW))
def test_a_suffix_can_be_asked_for(condition: Condition, file: StoredFile) -> None:
    rule = parse(compile_rule("acme", condition, ["keep-online"]))
    assert rule.holds(scene(file)) is (is_met(condition, file, NOW) is True)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), field=st.sampled_from(["path", "name", "folder", "tags", "metadata.robot_id"]))
@example('") THEN {SLO("place-on-object-volumes")} ELSE IF FNMATCH("', "path")
@example("\\", "tags")
@example('x"', "metadata.robot_id")
def test_no_text_of_a_rule_gets_out_of_its_quotes(text: str, field: str) -> None:
    operator = "contains" if field == "tags" else "=="
    try:
        rule = parse(compile_rule("acme", Test(field, operator, (text,)), ["keep-online"]))
    except InvalidRequest as error:
        assert error.code == "not_compilable"
    else:
        assert rule.slos == ("keep-online",)


def test_rules_of_one_tenant_say_nothing_of_anothers_files() -> None:
    everything = parse_condition([{"field": "path", "operator": "matches", "value": "*"}])
    rule = parse(compile_rule("acme", everything, ["keep-online"]))
    assert rule.holds({"path": "/acme/x"})
    assert not rule.holds({"path": "/other/x"}) and not rule.holds({"path": "/acme2/x"})


# ── as it is written ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("condition", "expression"),
    [
        ([], "IS_FILE"),
        ([{"field": "file_size", "operator": ">", "value": 1000}], "SIZE>1000"),
        ({"field": "size", "operator": ">=", "value": "1KiB"}, "!(SIZE<1024)"),
        ({"field": "last_used", "operator": ">", "value": "30d"}, "LAST_USE_AGE>720*HOUR"),
        ({"field": "path", "operator": "matches", "value": "archive/*"}, 'FNMATCH("/acme/archive/*",PATH)'),
        ({"field": "name", "operator": "==", "value": "a*.bin"}, 'FNMATCH("*/a[*].bin",PATH)'),
        ({"field": "suffix", "operator": "==", "value": ".bag"}, 'FNMATCH("*[!/.].[bB][aA][gG]",PATH)'),
        ({"field": "tags", "operator": "contains", "value": "archive"}, 'HAS_KEYWORD("archive")'),
        (
            {"field": "robot_id", "operator": "==", "value": "HX-3"},
            '(GET_TAG("robot_id") AND GET_TAG("robot_id")=="HX-3")',
        ),
        (
            {"any": [{"not": {"field": "tags", "operator": "contains", "value": "keep"}},
                     {"field": "size", "operator": "in", "value": [1, 2]}]},
            '(!(HAS_KEYWORD("keep")) OR (SIZE==1 OR SIZE==2))',
        ),
    ],
)  # fmt: skip
def test_conditions_in_hammerspaces_words(condition: object, expression: str) -> None:
    assert compile_condition("acme", parse_condition(condition)) == expression


def test_a_rule_names_every_objective_that_it_is_for() -> None:
    slos = ["place-on-object-volumes", "place-on-second-site"]
    expression = compile_rule("acme", All(()), slos)
    assert expression == 'IF IS_FILE THEN {SLO("place-on-object-volumes"),SLO("place-on-second-site")}'
    assert parse(expression).slos == tuple(slos)


@pytest.mark.parametrize(
    ("field", "operator", "value", "told"),
    [
        ("age", ">", "30d", "unused"),
        ("media_type", "==", "text/plain", "suffix"),
        ("checksum", "==", "0" * 32, "checksums"),
        ("tier", "==", "hot", "where files are"),
        ("replicas", "contains", "hot", "where files are"),
        ("indexed", "contains", "default", "collections"),
        ("size", ">", 1.5, "whole bytes"),
        ("size", ">", -1, "whole bytes"),
        ("unused", ">", "90s", "whole hours"),
        ("unused", "==", "1h", "more or less"),
        ("path", ">", "a", "no expression"),
        ("path", "matches", "[^a]*", "set plainly"),
        ("name", "contains", "a", "`path`"),
        ("name", "matches", "a*", "`path`"),
        ("name", "==", "a/b", "no '/'"),
        ("suffix", "!=", ".a", "not excluded"),
        ("suffix", "==", "a", "a dot"),
        ("folder", "matches", "a*", "`path`"),
        ("tags", "exists", True, "contains"),
        ("robot_id", "==", 3, "a text"),
        ("robot_id", "matches", "HX*", "no expression"),
        ("path", "==", 'a"b', "quote"),
        ("path", "==", "a\nb", "control"),
    ],
)
def test_what_hammerspace_cannot_say_is_refused_with_a_reason(
    field: str, operator: str, value: object, told: str
) -> None:
    condition = parse_condition({"field": field, "operator": operator, "value": value})
    with pytest.raises(InvalidRequest, match=told) as raised:
        compile_condition("acme", condition)
    assert raised.value.code == "not_compilable"


def test_a_suffix_is_not_asked_for_under_not() -> None:
    with pytest.raises(InvalidRequest, match="not excluded"):
        compile_condition("acme", Not(Test("suffix", "==", (".a",))))


def test_an_expression_has_a_length_that_fits_a_url() -> None:
    long = Test("path", "in", tuple(f"{number:0100d}" for number in range(MOST_CHARACTERS // 100)))
    with pytest.raises(InvalidRequest, match="split it"):
        compile_rule("acme", long, ["keep-online"])
