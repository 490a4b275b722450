"""Delete a file, its copies and what was indexed of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nexus.actions import Action, check_keys
from nexus.ports import Hands
from nexus.types import FileOutcome, StoredFile


@dataclass(frozen=True, kw_only=True)
class Delete(Action):
    """From every tier and every collection, unless a hold forbids it."""

    name: ClassVar[str] = "delete"
    order: ClassVar[int] = 50
    destroys: ClassVar[bool] = True

    def claims(self) -> Mapping[str, object]:
        return {"home": None}

    def effect(self, file: StoredFile, tiers: Sequence[str]) -> StoredFile:
        return file

    def settled(self, before: StoredFile, after: StoredFile) -> Action | None:
        return self

    @property
    def target(self) -> str:
        return ""

    def show(self) -> dict[str, Any]:
        return {"type": self.name}

    def run(self, hands: Hands) -> list[FileOutcome]:
        return hands.delete(self.files)


def parse(tree: Mapping[str, object], pointer: str) -> Delete:
    check_keys(tree, (), pointer)
    return Delete()
