"""Rules over files: `plan(rules, files, now)` says what is to be done, and touches nothing.

A rule has conditions on what is known of a file (conditions.py) and actions (actions/). What is decided, and how:

- The rule with the larger priority comes first, of equal ones the one whose name does. What a rule decides of a file
  no later rule decides otherwise, and it stays decided when there is nothing left to do: two rules never take turns.
- Actions change what conditions ask about, so the rules are asked again about the file as it would be, until nothing
  changes: that state is where the plan leads, by the shortest way. So a plan that was carried out leaves nothing to
  plan. Where the rules would go in circles over a file, nothing is done to it but what nobody disputes, and the rules
  that undo each other are named.
- A hold beats whatever destroys, of any priority, one put on by the same plan too. Deletion is decided last, of the
  file as it would be without it.

What is left undone for one of these reasons is in the plan as well, withheld, with the reason.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from itertools import chain
from pkgutil import iter_modules
from typing import cast

from nexus import actions
from nexus.access import NAME
from nexus.actions import Action
from nexus.conditions import (
    SIZE_UNITS,
    All,
    Condition,
    check_scalar,
    is_met,
    parse_amount,
    parse_condition,
    show_condition,
)
from nexus.errors import InvalidRequest
from nexus.failpoints import pass_through
from nexus.filters import KEY, Scalar
from nexus.ports import Hands
from nexus.tiers import check_path
from nexus.types import FileOutcome, StoredFile

MAX_RULES = 256
MAX_ACTIONS = 16
MAX_PRIORITY = 1000
MAX_DESCRIPTION_CHARACTERS = 1024
MAX_METADATA = 64
BATCH = 256  # files of one action
RULE_KEYS = ("name", "description", "priority", "enabled", "conditions", "actions")

EVERY_FILE = All(())


@dataclass(frozen=True, slots=True)
class Rule:
    """What is to be done with which files. Of two rules that disagree the one with the larger priority is followed."""

    name: str
    actions: tuple[Action, ...]
    conditions: Condition = EVERY_FILE
    priority: int = 0
    enabled: bool = True
    description: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in the order in which they are done, each with its files, and what rules wanted in vain."""

    actions: tuple[Action, ...] = ()
    withheld: tuple[FileOutcome, ...] = ()

    def outcomes(self) -> list[FileOutcome]:
        """What would become of each file, action by action."""
        return [
            FileOutcome(action.name, file.tenant, file.path, "planned", file.tier, action.target, rule=action.rule)
            for action in self.actions
            for file in action.files
        ]


@dataclass(slots=True)
class _Decided:
    """What is decided of one file: actions without files, and what is withheld from it and why."""

    actions: list[Action] = field(default_factory=list)
    withheld: list[tuple[Action, str]] = field(default_factory=list)


def plan(rules: Iterable[Rule], files: Iterable[StoredFile], now: float, tiers: Sequence[str] = ()) -> Plan:
    """What these rules have done to these files at a moment (Unix seconds); `tiers` are all, in configured order.

    Depends on nothing else, and not on the order of rules or files. What was carried out is not planned again.
    """
    ordered = sorted((rule for rule in rules if rule.enabled), key=lambda rule: (-rule.priority, rule.name))
    grouped: dict[Action, list[StoredFile]] = {}
    withheld = []
    for file in sorted(files, key=lambda file: (file.tenant, file.path)):
        decided = _decide(ordered, file, now, tiers)
        for action in decided.actions:
            grouped.setdefault(action, []).append(file)
        withheld += [
            FileOutcome(
                action.name, file.tenant, file.path, "withheld", file.tier, action.target, why, rule=action.rule
            )
            for action, why in decided.withheld
        ]
    return Plan(tuple(chain.from_iterable(_batches(action, of) for action, of in _in_order(grouped))), tuple(withheld))


def _in_order(grouped: Mapping[Action, list[StoredFile]]) -> list[tuple[Action, list[StoredFile]]]:
    return sorted(grouped.items(), key=lambda item: (item[0].order, item[0].name, item[0].rule, item[0].target))


def _batches(action: Action, files: Sequence[StoredFile]) -> Iterable[Action]:
    return (replace(action, files=tuple(files[start : start + BATCH])) for start in range(0, len(files), BATCH))


def _decide(rules: Sequence[Rule], file: StoredFile, now: float, tiers: Sequence[str]) -> _Decided:
    """Follow the rules from the file as it is to where nothing changes any more, and go there by the shortest way.

    That may lead elsewhere: a move to where a copy is makes a home of the copy, and one that is left out does not. Then
    the rules are followed from there, until what is done leads to where the rules rest.
    """
    applied, circle = list[Action](), [file]
    while True:
        step, state, path = _follow(rules, circle[-1], now, tiers, applied)
        if state is None:
            return _undisputed(file, applied, path, rules, now, tiers)
        actions = _shortest(applied, file, state)
        reached = _after(actions, file, tiers)
        if reached == state:
            break
        if reached in circle:
            return _undisputed(file, applied, [*circle, *path], rules, now, tiers)
        circle.append(reached)
    destroying = [action for action in step.actions if action.destroys]
    step.withheld = [(action, why) for action, why in step.withheld if _would_do(action, state, tiers)]
    step.actions = destroying[:1] or actions
    return step


def _follow(
    rules: Sequence[Rule], file: StoredFile, now: float, tiers: Sequence[str], applied: list[Action]
) -> tuple[_Decided, StoredFile | None, list[StoredFile]]:
    """Where the rules lead from a file, what they want there, and the way; None, and the circle, if they never rest.

    `applied` gets the actions that change something, in order.
    """
    state, path = file, [file]
    while True:
        step = _choose(rules, state, now)
        before = state
        for action in sorted(step.actions, key=lambda action: action.order):
            after = state if action.destroys else action.effect(state, tiers)
            if after != state:
                applied.append(action)
            state = after
        if state == before:
            return step, state, path
        if state in path:
            return step, None, path[path.index(state) :]
        path.append(state)


def _after(actions: Iterable[Action], file: StoredFile, tiers: Sequence[str]) -> StoredFile:
    for action in sorted(actions, key=lambda action: action.order):
        file = action.effect(file, tiers)
    return file


def _would_do(action: Action, state: StoredFile, tiers: Sequence[str]) -> bool:
    """Whether it was withheld in earnest: whatever it wants is not so anyway."""
    return action.destroys or action.effect(state, tiers) != state


def _shortest(applied: Iterable[Action], before: StoredFile, after: StoredFile) -> list[Action]:
    """What is left to do of the steps that led from one state to the other; of the same by two rules, the last."""
    found: dict[Action, Action] = {}
    for action in applied:
        settled = action.settled(before, after)
        if settled is not None:
            found[replace(settled, rule="")] = settled
    return list(found.values())


def _undisputed(
    file: StoredFile, applied: Sequence[Action], circle: Sequence[StoredFile], rules: Sequence[Rule], now: float,
    tiers: Sequence[str],
) -> _Decided:  # fmt: skip
    """For a file over which the rules go in circles: only what can be in nobody's way, and what follows from that."""
    free = [action for action in applied if not action.claims()]
    kept = _shortest(free, file, _after(free, file, tiers))
    if kept:
        decided = _decide(rules, _after(kept, file, tiers), now, tiers)
        decided.actions = kept + decided.actions
        return decided
    disputed: dict[Action, None] = {}
    for turn in circle:
        for action in _choose(rules, turn, now).actions:
            if action.claims() and not action.destroys and action.effect(turn, tiers) != turn:
                disputed[action] = None
    names = sorted({action.rule for action in disputed})
    why = f"{' and '.join(repr(name) for name in names)} would undo what {'it does' if len(names) == 1 else 'they do'}"
    return _Decided(withheld=[(action, why) for action in disputed])


def _choose(rules: Sequence[Rule], state: StoredFile, now: float) -> _Decided:
    """What the rules want of a file in this state, those that come first deciding."""
    decided = _Decided()
    claimed: dict[str, tuple[object, str]] = {}
    for rule in rules:
        if not is_met(rule.conditions, state, now):
            continue
        for action in rule.actions:
            if action.destroys and state.holds:
                decided.withheld.append((action, f"held: {', '.join(sorted(state.holds))}"))
                continue
            claims = action.claims()
            lost = next((claimed[of][1] for of, how in claims.items() if claimed.get(of, (how, ""))[0] != how), None)
            if lost is not None:
                decided.withheld.append((action, f"rule {lost!r} comes first"))
                continue
            for of, how in claims.items():
                claimed.setdefault(of, (how, rule.name))
            decided.actions.append(action)
    return decided


def matches(rule: Rule, file: StoredFile, now: float) -> bool:
    """Whether the rule is about this file at a moment."""
    return rule.enabled and is_met(rule.conditions, file, now) is True


# ── doing it ────────────────────────────────────────────────────────────────────────────────────


def converge(
    plan: Plan, hands: Hands, told: Callable[[Sequence[FileOutcome]], None] = lambda outcomes: None
) -> list[FileOutcome]:
    """Carry out a plan, action by action, and say what became of each file; `told` hears it batch by batch.

    A file that fails is left by the rest of the plan as it is; it is planned again the next time.
    Raises Unavailable when nothing can be done at all.
    """
    done: list[FileOutcome] = []
    failed: set[tuple[str, str]] = set()
    for action in plan.actions:
        left = tuple(file for file in action.files if (file.tenant, file.path) not in failed)
        if not left:
            continue
        pass_through("policy.before_action")
        outcomes = [replace(outcome, rule=action.rule) for outcome in replace(action, files=left).run(hands)]
        pass_through("policy.after_action")
        failed |= {(outcome.tenant, outcome.path) for outcome in outcomes if outcome.status == "failed"}
        told(outcomes)
        done += outcomes
    return done


# ── for people ──────────────────────────────────────────────────────────────────────────────────


def diff(plan: Plan) -> str:
    """What a plan does, a line per file and action, and the sums."""
    lines = [_line(outcome) for outcome in [*plan.outcomes(), *plan.withheld]]
    sums: dict[str, int] = {}
    for outcome in plan.outcomes():
        sums[outcome.action] = sums.get(outcome.action, 0) + 1
    total = ", ".join(f"{count} to {action}" for action, count in sums.items()) or "nothing to do"
    return "\n".join([*lines, total + (f"; {len(plan.withheld)} withheld" if plan.withheld else "")])


def compare(before: Plan, after: Plan) -> str:
    """What becomes otherwise when one plan takes the place of another: a line per difference, - gone, + new."""
    old, new = ([_line(one) for one in plan.outcomes()] for plan in (before, after))
    gone, come = set(old) - set(new), set(new) - set(old)
    lines = [f"- {line}" for line in old if line in gone] + [f"+ {line}" for line in new if line in come]
    return "\n".join(lines) or "no difference"


def _line(outcome: FileOutcome) -> str:
    path = outcome.path if outcome.path.isprintable() else ascii(outcome.path)
    what = f"{outcome.source} → {outcome.target}" if outcome.action == "move" else outcome.target
    why = f"[{outcome.rule}]" if outcome.status == "planned" else f"[{outcome.rule}] withheld: {outcome.reason}"
    return "  ".join(part for part in (f"{outcome.action:9}", path, what, why) if part)


# ── from JSON and back ──────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=1)
def action_names() -> tuple[str, ...]:
    """What can be done: the modules of nexus.actions."""
    return tuple(sorted(module.name for module in iter_modules(actions.__path__)))


def parse_rule(tree: object, name: str | None = None, pointer: str = "") -> Rule:
    """Check the JSON of a rule; `name` is what it is called where it may leave that out. Raises InvalidRequest."""
    if not isinstance(tree, Mapping):
        raise InvalidRequest("a rule is an object", pointer=pointer)
    for key in tree:
        if key not in RULE_KEYS:
            raise InvalidRequest(
                f"a rule has no {str(key)[:64]!r}; it has {', '.join(RULE_KEYS)}",
                pointer=f"{pointer}/{actions.escape(str(key)[:64])}",
            )
    said = tree.get("name", name)
    if not isinstance(said, str) or not NAME.fullmatch(said):
        raise InvalidRequest(
            "a rule's name is 1 to 64 of letters, digits, '_', '.', '-', and begins with a letter or a digit",
            pointer=f"{pointer}/name",
        )
    if name is not None and said != name:
        raise InvalidRequest(f"this rule is called {said!r}, and {name!r} where it is put", pointer=f"{pointer}/name")
    priority, enabled, description = tree.get("priority", 0), tree.get("enabled", True), tree.get("description", "")
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
        raise InvalidRequest(
            f"'priority' is a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}", pointer=f"{pointer}/priority"
        )
    if not isinstance(enabled, bool):
        raise InvalidRequest("'enabled' is true or false", pointer=f"{pointer}/enabled")
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION_CHARACTERS:
        raise InvalidRequest(
            f"'description' is a text of at most {MAX_DESCRIPTION_CHARACTERS} characters",
            pointer=f"{pointer}/description",
        )
    check_scalar(description, f"{pointer}/description")
    return Rule(
        said, _parse_actions(tree.get("actions"), said, f"{pointer}/actions"),
        parse_condition(tree.get("conditions", []), f"{pointer}/conditions"), priority, enabled, description,
    )  # fmt: skip


def _parse_actions(trees: object, rule: str, pointer: str) -> tuple[Action, ...]:
    if not isinstance(trees, list | tuple) or not 0 < len(trees) <= MAX_ACTIONS:
        raise InvalidRequest(f"a rule has a list of 1 to {MAX_ACTIONS} actions", pointer=pointer)
    parsed = tuple(_parse_action(tree, rule, f"{pointer}/{number}") for number, tree in enumerate(trees))
    claimed: set[str] = set()
    for number, action in enumerate(parsed):
        if twice := claimed & set(action.claims()):
            raise InvalidRequest(
                f"two actions of this rule decide the same thing, the file's {min(twice)}; leave one out",
                pointer=f"{pointer}/{number}",
            )
        claimed |= set(action.claims())
    return parsed


def _parse_action(tree: object, rule: str, pointer: str) -> Action:
    if not isinstance(tree, Mapping) or tree.get("type") not in action_names():
        raise InvalidRequest(
            f"an action is an object whose type is one of {', '.join(action_names())}", pointer=f"{pointer}/type"
        )
    module = import_module(f"nexus.actions.{tree['type']}")
    return replace(cast(Action, module.parse(tree, pointer)), rule=rule)


def show_rule(rule: Rule) -> dict[str, object]:
    """The JSON that `parse_rule` reads."""
    top = rule.conditions
    return {
        "name": rule.name,
        "description": rule.description,
        "priority": rule.priority,
        "enabled": rule.enabled,
        "conditions": [show_condition(part) for part in top.parts] if isinstance(top, All) else show_condition(top),
        "actions": [action.show() for action in rule.actions],
    }


def check_rules(rules: Iterable[Rule], tiers: Sequence[str]) -> None:
    """Raises InvalidRequest where a rule names a tier that there is not, or wants more copies than there are tiers."""
    rules = list(rules)
    if len(rules) > MAX_RULES:
        raise InvalidRequest(f"there are at most {MAX_RULES} rules; remove one first")
    known = f"there are {', '.join(tiers)}" if tiers else "none is configured"
    for rule in rules:
        for number, action in enumerate(rule.actions):
            pointer = f"/actions/{number}"
            if unknown := sorted(action.tiers() - set(tiers)):
                raise InvalidRequest(f"rule {rule.name!r}: no tier {unknown[0]!r}; {known}", pointer=pointer)
            if getattr(action, "count", 0) > len(tiers):
                raise InvalidRequest(
                    f"rule {rule.name!r}: {action.target} need as many tiers, and {known}", pointer=f"{pointer}/count"
                )


FILE_KEYS = {"file_path": "path", "file_size": "size", "type": "media_type"}


def parse_file(tree: object, tenant: str, pointer: str = "/file") -> StoredFile:
    """A file as a caller describes it, for a dry run; keys that Nexus does not know are its metadata.

    Raises InvalidRequest.
    """
    if not isinstance(tree, Mapping) or len(tree) > MAX_METADATA:
        raise InvalidRequest(f"a file is an object of at most {MAX_METADATA} fields", pointer=pointer)
    given = {FILE_KEYS.get(str(key), str(key)): value for key, value in tree.items()}
    path = check_path(_text(given, "path", pointer).lstrip("/"), f"{pointer}/path")
    checksum = _text(given, "checksum", pointer)
    indexed = _names(given, "indexed", pointer)
    file = StoredFile(
        tenant=tenant,
        path=path,
        tier=_text(given, "tier", pointer),
        size=int(parse_amount(given.pop("size", -1), SIZE_UNITS, f"{pointer}/size")),
        checksum=checksum,
        modified_at=float(parse_amount(given.pop("modified_at", 0), {}, f"{pointer}/modified_at")),
        used_at=float(parse_amount(given.pop("used_at", 0), {}, f"{pointer}/used_at")),
        media_type=_text(given, "media_type", pointer),
        tags=_names(given, "tags", pointer),
        replicas=_names(given, "replicas", pointer),
        holds=_names(given, "holds", pointer),
        indexed=dict.fromkeys(sorted(indexed), checksum),
    )
    beside = given.pop("metadata", {})
    if not isinstance(beside, Mapping):
        raise InvalidRequest("'metadata' is an object", pointer=f"{pointer}/metadata")
    return replace(file, metadata=check_metadata({**beside, **given}, pointer))


def _text(given: dict[str, object], key: str, pointer: str) -> str:
    value = given.pop(key, "")
    if not isinstance(value, str):
        raise InvalidRequest(f"{key!r} is a text", pointer=f"{pointer}/{key}")
    return str(check_scalar(value, f"{pointer}/{key}"))


def _names(given: dict[str, object], key: str, pointer: str) -> frozenset[str]:
    found = actions.names_in(given, key, pointer)
    given.pop(key, None)
    return found


def check_metadata(metadata: Mapping[str, object], pointer: str) -> dict[str, Scalar]:
    """What is known of a file besides, if it is bounded and flat. Raises InvalidRequest."""
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest(f"a file has at most {MAX_METADATA} fields of metadata", pointer=pointer)
    checked: dict[str, Scalar] = {}
    for key, value in metadata.items():
        at = f"{pointer}/{actions.escape(key[:64])}"
        if not KEY.fullmatch(key):
            raise InvalidRequest("a metadata key is 1 to 64 of letters, digits, '_', '.', '-'", pointer=at)
        if not isinstance(value, str | int | float | bool):
            raise InvalidRequest("a metadata value is a text, a number or a boolean", pointer=at)
        checked[key] = check_scalar(value, at)
    return checked


def show_file(file: StoredFile) -> dict[str, object]:
    """What is known of a file, in the words of the founding documents; what is not known is left out."""
    shown: dict[str, object] = {
        "file_path": file.path,
        "file_size": file.size if file.size >= 0 else None,
        "tier": file.tier,
        "bound_for": file.bound_for,
        "checksum": file.checksum,
        "modified_at": file.modified_at,
        "used_at": file.used_at,
        "media_type": file.media_type,
        "tags": sorted(file.tags),
        "replicas": sorted(file.replicas),
        "holds": sorted(file.holds),
        "indexed": sorted(file.indexed),
        "metadata": dict(file.metadata),
    }
    return {key: value for key, value in shown.items() if value or (key == "file_size" and value == 0)}


def show_outcome(outcome: FileOutcome) -> dict[str, object]:
    """One action on one file, in the words of the founding documents."""
    shown: dict[str, object] = {
        "action": outcome.action, "file_path": outcome.path, "source": outcome.source, "target": outcome.target,
        "status": outcome.status, "reason": outcome.reason, "code": outcome.code, "policy_name": outcome.rule,
    }  # fmt: skip
    return {key: value for key, value in shown.items() if value}
