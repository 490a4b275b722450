"""Policies at work: rules kept, shown, evaluated and carried out; every action is recorded, and counted.

A rule is evaluated together with all of its tenant's: what another rule overrules or a hold forbids is shown as
withheld, and only what the rule itself wants is done. What tiers have is looked at before, so that files are known.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nexus import telemetry
from nexus.actions.move import Move
from nexus.actions.replicate import Replicate
from nexus.audit import Event
from nexus.config import Config
from nexus.errors import ConfigError, InvalidRequest, NexusError, NotFound, Unavailable
from nexus.homes import SUBJECT, Homes, Scanned, check_apart
from nexus.policy import Plan, Rule, check_rules, converge, matches, parse_file, parse_rule, plan, show_file
from nexus.ports import Placement, Tier
from nexus.registry import open_tier
from nexus.tiers.hammerspace import Address, HammerspaceTier, parse_address
from nexus.types import FileOutcome, Principal, StoredFile

log = logging.getLogger("nexus.enforcement")

HAMMERSPACE = "hammerspace:"
MOST_PROBLEMS = 100  # shown of a look at all tiers

Record = Callable[[Sequence[Event]], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a rule does, or did: `outcomes` in the order of the plan, what is withheld last.

    `metadata` is what is known of the file where there is one, else the sums. `delegated` is what a share was asked
    to keep by itself.
    """

    policy_name: str
    outcomes: tuple[FileOutcome, ...]
    metadata: Mapping[str, object]
    delegated: tuple[Placement, ...] = ()

    @property
    def result(self) -> str:
        """In one word, for the count of evaluations: failed, applied, planned or nothing."""
        states = {outcome.status for outcome in self.outcomes} | {placement.state for placement in self.delegated}
        if "failed" in states:
            return "failed"
        return "applied" if states & {"success", "requested"} else "planned" if "planned" in states else "nothing"


@dataclass(frozen=True, slots=True)
class Order:
    """How a rule is to be evaluated: on one file, by its path or described, or on all; for show, or carried out.

    With `delegate`, Hammerspace is asked to keep the rule itself, in place of its files being placed one by one.
    """

    policy_name: str
    file: str | Mapping[str, object] | None = None
    dry_run: bool = True
    delegate: bool = False


def check_tiers(config: Config, at_work: bool = False) -> None:
    """Return if the configured tiers can be opened, each in a place of its own. Raises ConfigError.

    With `at_work` they answer, too, else Unavailable says which does not.
    """
    tiers = open_tiers(config)
    try:
        check_apart(tiers)
        for name, tier in tiers.items() if at_work else ():
            try:
                tier.check()
            except NexusError as error:
                raise Unavailable(f"tier {name!r}: {error.message}") from None
    finally:
        for tier in tiers.values():
            tier.close()


def open_tiers(config: Config) -> dict[str, Tier]:
    """The configured tiers by name, in their order. Raises ConfigError."""
    found = {
        name: parse_address(address)
        for name, address in config.policies.tiers.items()
        if address.startswith(HAMMERSPACE)
    }
    _check_mounts(config.policies.tiers, found)
    shares = {name: address.place for name, address in found.items()}
    account = config.hammerspace
    tiers: dict[str, Tier] = {}
    for name, address in config.policies.tiers.items():
        options: dict[str, Any] = {}
        if name in shares:
            siblings = [other for other, place in shares.items() if place == shares[name] and other != name]
            options = {
                "name": name, "siblings": siblings, "username": account.username, "password": account.password,
                "ca_file": account.ca_file, "task_seconds": account.task_seconds,
            }  # fmt: skip
        tiers[name] = open_tier(str(address), **options)
    return tiers


def _check_mounts(addresses: Mapping[str, str], shares: Mapping[str, Address]) -> None:
    """A folder of a share's mount is no tier beside it: what moved between the two would be one and the same file."""
    for name, address in addresses.items():
        folder = Path("/" + address.removeprefix("file:").lstrip("/"))
        for other, share in shares.items():
            mount = Path(share.mount)
            if address.startswith("file:") and (folder.is_relative_to(mount) or mount.is_relative_to(folder)):
                raise ConfigError(
                    f"tier {name!r} is where the share of tier {other!r} is mounted: make it a Hammerspace tier, too,"
                    " with service level objectives of its own"
                )


class Enforcer:
    """The policies of all tenants, over the journal of their files. Every method blocks; any thread may call it."""

    def __init__(self, homes: Homes, record: Record, clock: Callable[[], float] = time.time) -> None:
        """`record` keeps events of the audit record; what cannot be recorded is not done any further."""
        self._homes, self._record, self._clock = homes, record, clock

    def close(self) -> None:
        self._homes.close()
        for tier in self._homes.tiers.values():
            tier.close()

    # Rules

    def rules(self, tenant: str) -> list[Rule]:
        return self._homes.rules(tenant)

    def rule(self, tenant: str, name: str) -> Rule:
        """Raises NotFound."""
        return self._homes.rule(tenant, name)

    def put(self, principal: Principal, name: str, tree: Mapping[str, object]) -> tuple[Rule, int]:
        """Make or replace a rule; its version, from 1. A share that kept the former one does not any more."""
        rule = parse_rule(tree, name)
        check_rules([rule], list(self._homes.tiers))
        if name in {former.name for former in self._homes.rules(principal.tenant)}:
            self._revoke(principal.tenant, name)
        return rule, self._homes.put_rule(principal.tenant, rule, principal.subject)

    def drop(self, principal: Principal, name: str) -> None:
        """Raises NotFound. What the rule did stays done."""
        self._homes.rule(principal.tenant, name)
        self._revoke(principal.tenant, name)
        self._homes.drop_rule(principal.tenant, name)

    def release(self, principal: Principal, hold: str, path: str) -> StoredFile:
        """Lift a hold of a file; the file as it is then. Raises NotFound. A rule that still wants it puts it back."""
        tenant, path = principal.tenant, path.lstrip("/")
        if hold in self._homes.file(tenant, path).holds:
            self._record([_event(tenant, principal.subject, hold, "release", "begun", (path,))])
        self._homes.release(tenant, path, hold)
        return self._homes.file(tenant, path)

    def _revoke(self, tenant: str, name: str) -> None:
        for tier in self._homes.tiers.values():
            if isinstance(tier, HammerspaceTier):
                tier.revoke(tenant, name)

    # Evaluation

    def evaluate(self, principal: Principal, order: Order) -> Evaluation:
        """Raises NotFound for no such rule, and for an unknown file that is to be changed; Unavailable."""
        rule = self._homes.rule(principal.tenant, order.policy_name)
        try:
            if order.delegate:
                evaluation = self._delegate(principal, rule, order)
            elif order.file is not None:
                evaluation = self._evaluate_file(principal, rule, order)
            else:
                evaluation = self._evaluate_all(principal.tenant, rule, order.dry_run, principal.subject)
        except NexusError:
            telemetry.policy_evaluations.labels(rule.name, "failed").inc()
            raise
        telemetry.policy_evaluations.labels(rule.name, evaluation.result).inc()
        return evaluation

    def _evaluate_file(self, principal: Principal, rule: Rule, order: Order) -> Evaluation:
        """What is known of the file counts before what is said of it; a description alone is for show."""
        tenant, said = principal.tenant, None
        if isinstance(order.file, str):
            file = self._homes.file(tenant, order.file.lstrip("/"))
        else:
            said = parse_file(order.file, tenant)
            try:
                known = self._homes.file(tenant, said.path)
            except NotFound:
                if not order.dry_run:
                    raise
                file = said
            else:
                file = replace(known, metadata={**known.metadata, **said.metadata})
                if not order.dry_run and said.metadata:
                    file = self._homes.describe(tenant, said.path, file.metadata)
        planned = self._plan(tenant, [file])
        outcomes = self._carry_out(tenant, rule, planned, order.dry_run, principal.subject)
        if not order.dry_run:
            file = self._after(tenant, file)
        return Evaluation(rule.name, tuple(outcomes), show_file(file))

    def _after(self, tenant: str, file: StoredFile) -> StoredFile:
        try:
            return self._homes.file(tenant, file.path)
        except NotFound:  # it was deleted
            return file

    def _evaluate_all(self, tenant: str, rule: Rule, dry_run: bool, subject: str) -> Evaluation:
        scanned, problems = self._look(tenant)
        files = self._homes.files(tenant)
        outcomes = self._carry_out(tenant, rule, self._plan(tenant, files), dry_run, subject)
        now = self._clock()
        metadata: dict[str, object] = {
            "files": len(files),
            "matched": sum(matches(rule, file, now) for file in files),
            "tiers": {
                name: {
                    "added": seen.added, "changed": seen.changed, "unchanged": seen.unchanged,
                    "missing": len(seen.missing),
                }
                for name, seen in scanned.items()
            },
            "problems": problems[:MOST_PROBLEMS],
        }  # fmt: skip
        return Evaluation(rule.name, tuple(outcomes), metadata)

    def _look(self, tenant: str) -> tuple[dict[str, Scanned], list[str]]:
        """Enter what every tier has; one that is away is a problem, and its files stay as they were known."""
        scanned: dict[str, Scanned] = {}
        problems: list[str] = []
        for name in self._homes.tiers:
            try:
                scanned[name] = seen = self._homes.scan(tenant, name)
            except NexusError as error:
                problems.append(f"tier {name!r}: {error.message}")
                continue
            problems += [f"{path!a} is not on tier {name!r}, where it lives" for path in seen.missing]
            problems += [f"{one.path} on tier {name!r}: {one.reason}" for one in seen.problems]
        return scanned, problems

    def _plan(self, tenant: str, files: Sequence[StoredFile]) -> Plan:
        return plan(self._homes.rules(tenant), files, self._clock(), list(self._homes.tiers))

    def _carry_out(self, tenant: str, rule: Rule, planned: Plan, dry_run: bool, subject: str) -> list[FileOutcome]:
        """What this rule wants of a plan, or what became of it, and what is withheld from it."""
        own = Plan(
            tuple(action for action in planned.actions if action.rule == rule.name),
            tuple(outcome for outcome in planned.withheld if outcome.rule == rule.name),
        )
        if dry_run:
            return [*own.outcomes(), *own.withheld]
        if own.actions:
            self._record([_event(tenant, subject, rule.name, "evaluate", "begun")])
        return [*converge(own, self._homes, lambda done: self._note(done, subject)), *own.withheld]

    def _note(self, outcomes: Sequence[FileOutcome], subject: str) -> None:
        """Record and count what was done to files."""
        for outcome in outcomes:
            if outcome.action in ("move", "replicate") and outcome.status in ("success", "failed"):
                for target in outcome.target.split(", "):
                    telemetry.data_movements.labels(outcome.source, target, outcome.status).inc()
        self._record([
            _event(
                one.tenant, subject, one.rule, one.action, one.status,
                (one.path, one.source, one.target), one.code or one.reason,
            )
            for one in outcomes
        ])  # fmt: skip

    # Handing a rule over

    def _delegate(self, principal: Principal, rule: Rule, order: Order) -> Evaluation:
        """Have the share of the rule's tiers keep it. Raises InvalidRequest for what only Nexus can do."""
        if order.file is not None:
            raise InvalidRequest("a rule is delegated for all files; leave `file` out", pointer="/file")
        tiers = self._tiers_to_delegate_to(rule)
        if not order.dry_run:
            what = tuple(tier.name for tier in tiers)
            self._record([_event(principal.tenant, principal.subject, rule.name, "delegate", "begun", what)])
        placement = tiers[0].delegate(principal.tenant, rule.name, rule.conditions, tiers[1:], order.dry_run)
        if not order.dry_run:
            what, how = (placement.tier, placement.reference), placement.state
            event = _event(principal.tenant, principal.subject, rule.name, "delegate", how, what, placement.reason)
            self._record([event])
        return Evaluation(rule.name, (), {"expression": placement.reference}, () if order.dry_run else (placement,))

    def _tiers_to_delegate_to(self, rule: Rule) -> list[HammerspaceTier]:
        """The tier of its move, and those of its copies, all of one share."""
        wanted: list[str] = []
        for number, action in enumerate(rule.actions):
            if isinstance(action, Move):
                wanted.insert(0, action.to)
            elif isinstance(action, Replicate) and action.on:
                wanted += sorted(action.on)
            else:
                raise InvalidRequest(
                    f"a share cannot {action.name} files{' by a count' if isinstance(action, Replicate) else ''}: only"
                    " moves and copies to tiers named can be delegated",
                    pointer=f"/actions/{number}",
                )
        tiers = [self._homes.tiers[name] for name in wanted if name in self._homes.tiers]
        found = [tier for tier in tiers if isinstance(tier, HammerspaceTier)]
        if len(found) < len(wanted) or len({tier.share for tier in found}) != 1:
            raise InvalidRequest(
                f"only tiers of one Hammerspace share can keep a rule: {', '.join(wanted)} are not", pointer="/actions"
            )
        return found

    # By itself

    def run(self) -> list[FileOutcome]:
        """Evaluate all enabled rules of every tenant together, and carry them out. One tenant's fault is no other's."""
        done = []
        for tenant in self._homes.tenants():
            rules = [rule for rule in self._homes.rules(tenant) if rule.enabled]
            try:
                outcomes = self._run_for(tenant) if rules else []
            except NexusError as error:
                log.warning("the policies of %s were not carried out: %s", tenant, error.message)
                outcomes = [FileOutcome("evaluate", tenant, "", "failed", rule=rule.name) for rule in rules]
            for rule in rules:
                own = tuple(outcome for outcome in outcomes if outcome.rule == rule.name)
                telemetry.policy_evaluations.labels(rule.name, Evaluation(rule.name, own, {}).result).inc()
            done += outcomes
        return done

    def _run_for(self, tenant: str) -> list[FileOutcome]:
        _, problems = self._look(tenant)
        for problem in problems[:MOST_PROBLEMS]:
            log.warning("of %s: %s", tenant, problem)
        planned = self._plan(tenant, self._homes.files(tenant))
        if planned.actions:
            self._record([_event(tenant, SUBJECT, "", "evaluate", "begun")])
        return converge(planned, self._homes, lambda done: self._note(done, SUBJECT))

    def poll(self) -> list[FileOutcome]:
        """What tiers that place files by themselves have done or failed to do since, recorded and counted."""
        ended = self._homes.poll()
        if ended:
            self._note(ended, SUBJECT)
        return ended


def _event(
    tenant: str, subject: str, rule: str, action: str, verdict: str, objects: Sequence[str] = (), reason: str = ""
) -> Event:
    return Event(
        "policy", f"{action} by policy {rule}" if rule else f"{action} all policies", tenant=tenant, subject=subject,
        objects=tuple(filter(None, objects)), verdict=verdict, reason=reason,
    )  # fmt: skip
