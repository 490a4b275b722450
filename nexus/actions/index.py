"""Put a file into a collection, so that it is found and answered from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nexus.access import NAME
from nexus.actions import Action, check_keys, name_in, names_in
from nexus.errors import InvalidRequest
from nexus.ports import Hands
from nexus.types import FileOutcome, StoredFile


@dataclass(frozen=True, kw_only=True)
class Index(Action):
    """In `collection`, for `readers` only where given. A file whose bytes changed since is indexed again."""

    name: ClassVar[str] = "index"
    order: ClassVar[int] = 20

    collection: str
    readers: frozenset[str] | None = None

    def claims(self) -> Mapping[str, object]:
        return {f"index {self.collection}": self.readers}

    def effect(self, file: StoredFile, tiers: Sequence[str]) -> StoredFile:
        if file.indexed.get(self.collection) == file.checksum:
            return file
        return replace(file, indexed={**file.indexed, self.collection: file.checksum})

    def settled(self, before: StoredFile, after: StoredFile) -> Action | None:
        return None if before.indexed.get(self.collection) == after.checksum else self

    @property
    def target(self) -> str:
        return self.collection

    def show(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"type": self.name, "collection": self.collection}
        return shown if self.readers is None else {**shown, "readers": sorted(self.readers)}

    def run(self, hands: Hands) -> list[FileOutcome]:
        return hands.index(self.files, self.collection, self.readers)


def parse(tree: Mapping[str, object], pointer: str) -> Index:
    check_keys(tree, {"collection", "readers"}, pointer)
    collection = name_in(tree, "collection", pointer, "default")
    if not NAME.fullmatch(collection):
        raise InvalidRequest(
            "a collection's name is 1 to 64 of letters, digits, '_', '.', '-'", pointer=f"{pointer}/collection"
        )
    readers = names_in(tree, "readers", pointer) if "readers" in tree else None
    if readers is not None and not readers:
        raise InvalidRequest(
            "no readers would mean everyone; leave 'readers' out, or name some", pointer=f"{pointer}/readers"
        )
    return Index(collection=collection, readers=readers)
