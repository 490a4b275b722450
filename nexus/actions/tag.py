"""Give a file tags, or take some away."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nexus.actions import Action, check_keys, names_in
from nexus.errors import InvalidRequest
from nexus.ports import Hands
from nexus.types import FileOutcome, StoredFile


@dataclass(frozen=True, kw_only=True)
class Tag(Action):
    """Tags to add and tags to remove; each is decided on its own."""

    name: ClassVar[str] = "tag"
    order: ClassVar[int] = 10

    add: frozenset[str] = frozenset()
    remove: frozenset[str] = frozenset()

    def claims(self) -> Mapping[str, object]:
        return {f"tag {tag}": tag in self.add for tag in self.add | self.remove}

    def effect(self, file: StoredFile, tiers: Sequence[str]) -> StoredFile:
        tags = (file.tags | self.add) - self.remove
        return file if tags == file.tags else replace(file, tags=tags)

    def settled(self, before: StoredFile, after: StoredFile) -> Action | None:
        add, remove = self.add & (after.tags - before.tags), self.remove & (before.tags - after.tags)
        return replace(self, add=add, remove=remove) if add or remove else None

    @property
    def target(self) -> str:
        return " ".join([f"+{tag}" for tag in sorted(self.add)] + [f"-{tag}" for tag in sorted(self.remove)])

    def show(self) -> dict[str, Any]:
        return {"type": self.name, "add": sorted(self.add), "remove": sorted(self.remove)}

    def run(self, hands: Hands) -> list[FileOutcome]:
        return hands.tag(self.files, self.add, self.remove)


def parse(tree: Mapping[str, object], pointer: str) -> Tag:
    check_keys(tree, {"add", "remove"}, pointer)
    add, remove = names_in(tree, "add", pointer), names_in(tree, "remove", pointer)
    if not add | remove:
        raise InvalidRequest("an action 'tag' has tags to add or to remove", pointer=pointer)
    if add & remove:
        raise InvalidRequest(f"{min(add & remove)!r} cannot be both added and removed", pointer=pointer)
    return Tag(add=add, remove=remove)
