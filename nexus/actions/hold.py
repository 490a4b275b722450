"""Forbid that a file is deleted, until people lift the hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nexus.actions import Action, check_keys, name_in
from nexus.ports import Hands
from nexus.types import FileOutcome, StoredFile


@dataclass(frozen=True, kw_only=True)
class Hold(Action):
    """A hold called so, or like the rule. It stays when the rule goes or does not apply any more.

    It claims nothing: it stands in the way of no other action but those that destroy.
    """

    name: ClassVar[str] = "hold"
    order: ClassVar[int] = 0

    called: str = ""

    def claims(self) -> Mapping[str, object]:
        return {}

    def effect(self, file: StoredFile, tiers: Sequence[str]) -> StoredFile:
        return file if self.target in file.holds else replace(file, holds=file.holds | {self.target})

    def settled(self, before: StoredFile, after: StoredFile) -> Action | None:
        return None if self.target in before.holds else self

    @property
    def target(self) -> str:
        return self.called or self.rule

    def show(self) -> dict[str, Any]:
        return {"type": self.name, **({"name": self.called} if self.called else {})}

    def run(self, hands: Hands) -> list[FileOutcome]:
        return hands.hold(self.files, self.target)


def parse(tree: Mapping[str, object], pointer: str) -> Hold:
    check_keys(tree, {"name"}, pointer)
    return Hold(called=name_in(tree, "name", pointer) if "name" in tree else "")
