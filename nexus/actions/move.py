"""Give a file another home."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nexus.actions import Action, check_keys, name_in
from nexus.ports import Hands
from nexus.types import FileOutcome, StoredFile


@dataclass(frozen=True, kw_only=True)
class Move(Action):
    """To the tier `to`, by copying, verifying, switching and then deleting; a copy that is there becomes the home."""

    name: ClassVar[str] = "move"
    order: ClassVar[int] = 30

    to: str

    def claims(self) -> Mapping[str, object]:
        return {"home": self.to}

    def effect(self, file: StoredFile, tiers: Sequence[str]) -> StoredFile:
        if file.home == self.to:
            return file
        return replace(file, tier=self.to, bound_for="", replicas=file.replicas - {self.to})

    def settled(self, before: StoredFile, after: StoredFile) -> Action | None:
        return self if before.home != after.home == self.to else None

    @property
    def target(self) -> str:
        return self.to

    def show(self) -> dict[str, Any]:
        return {"type": self.name, "target": self.to}

    def run(self, hands: Hands) -> list[FileOutcome]:
        return hands.move(self.files, self.to)

    def tiers(self) -> frozenset[str]:
        return frozenset({self.to})


def parse(tree: Mapping[str, object], pointer: str) -> Move:
    check_keys(tree, {"target"}, pointer)
    return Move(to=name_in(tree, "target", pointer))
