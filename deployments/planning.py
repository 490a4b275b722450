"""Where everything will go, and why, in words and in JSON: `nexus plan`, and the plan that `nexus up` applies."""

from collections.abc import Collection

from pydantic import TypeAdapter, ValidationError

from cluster.inventory import Inventory, configured
from cluster.placement import Plan, place
from cluster.wants import wants_of
from nexus.config import Config
from nexus.errors import ConfigError, UpstreamInvalid

KEY = "placement"  # of the plan in force, in the coordinator
DRAINED = "drained/"  # and a machine's name: nothing is to go there

_PLAN = TypeAdapter(Plan)


def make_plan(config: Config, seen: Inventory | None, current: Plan | None, drained: Collection[str] = ()) -> Plan:
    """A place for every want of the settings on the machines seen, else on those described, but on none drained."""
    inventory = seen or configured(config)
    usable = Inventory(tuple(node for node in inventory.nodes if node.name not in drained))
    return place(usable, wants_of(config), current)


def plan_for(config: Config, seen: Inventory | None, current: Plan | None, drained: Collection[str] = ()) -> Plan:
    """A plan that can be applied. Raises ConfigError with what has no place, why, and what would give it one."""
    plan = make_plan(config, seen, current, drained)
    if plan.refusals:
        refused = [f"{one.want}: {one.reason}; {one.remedy}" for one in plan.refusals]
        raise ConfigError("not everything wanted has a place: " + " | ".join(refused))
    return plan


def to_json(plan: Plan) -> bytes:
    """A plan as the coordinator keeps it."""
    return _PLAN.dump_json(plan)


def from_json(content: bytes) -> Plan:
    """A plan that the coordinator kept. Raises UpstreamInvalid for what is none."""
    try:
        return _PLAN.validate_json(content)
    except ValidationError:
        raise UpstreamInvalid(f"the coordinator keeps something under {KEY!r} that is no plan") from None
