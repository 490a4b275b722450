"""Have copies of a file on further tiers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nexus.actions import Action, check_keys, names_in
from nexus.errors import InvalidRequest
from nexus.ports import Hands
from nexus.types import FileOutcome, StoredFile

MAX_COPIES = 16


@dataclass(frozen=True, kw_only=True)
class Replicate(Action):
    """On exactly the tiers `on`, its home aside, or as many that there are `count` in all, its home among them.

    Of a count, copies that are there stay, and the first tiers in their order get the others.
    """

    name: ClassVar[str] = "replicate"
    order: ClassVar[int] = 40

    on: frozenset[str] = frozenset()
    count: int = 0

    def claims(self) -> Mapping[str, object]:
        return {"replicas": (self.on, self.count)}

    def effect(self, file: StoredFile, tiers: Sequence[str]) -> StoredFile:
        wanted = self._wanted(file, tiers)
        return file if wanted == file.replicas else replace(file, replicas=wanted)

    def _wanted(self, file: StoredFile, tiers: Sequence[str]) -> frozenset[str]:
        if not self.count:
            return self.on - {file.home}
        there = [tier for tier in tiers if tier in file.replicas]
        others = [tier for tier in tiers if tier not in file.replicas and tier != file.home]
        return frozenset((there + others)[: self.count - 1])

    def settled(self, before: StoredFile, after: StoredFile) -> Action | None:
        if before.replicas - {after.home} == after.replicas:
            return None
        return replace(self, on=after.replicas, count=0)

    @property
    def target(self) -> str:
        return f"{self.count} copies" if self.count else ", ".join(sorted(self.on)) or "no other tier"

    def show(self) -> dict[str, Any]:
        return {"type": self.name, **({"count": self.count} if self.count else {"targets": sorted(self.on)})}

    def run(self, hands: Hands) -> list[FileOutcome]:
        return hands.replicate(self.files, self.on)

    def tiers(self) -> frozenset[str]:
        return self.on


def parse(tree: Mapping[str, object], pointer: str) -> Replicate:
    check_keys(tree, {"targets", "count"}, pointer)
    if ("targets" in tree) == ("count" in tree):
        raise InvalidRequest("an action 'replicate' has either targets or a count", pointer=pointer)
    if "targets" in tree:
        return Replicate(on=names_in(tree, "targets", pointer))
    count = tree["count"]
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_COPIES:
        raise InvalidRequest(
            f"'count' is how many copies there are in all, 1 to {MAX_COPIES}", pointer=f"{pointer}/count"
        )
    return Replicate(count=count)
