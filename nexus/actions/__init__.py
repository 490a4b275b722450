"""What a rule may have done to files: one module each, whose name is the `type` that rules write.

A module has `parse(tree, pointer)`, which checks the JSON of an action and returns it. To add an action, write
one file: a frozen class that says what it decides, what it changes, and how it is done.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nexus.errors import InvalidRequest
from nexus.ports import Hands
from nexus.types import FileOutcome, StoredFile

MAX_NAMES = 64
MAX_NAME_CHARACTERS = 128


@dataclass(frozen=True, kw_only=True)
class Action(ABC):
    """One thing that one rule wants of some files. As it stands in a rule, it has no files."""

    name: ClassVar[str]
    order: ClassVar[int]  # among the actions of a plan; the smaller is done first
    destroys: ClassVar[bool] = False  # a hold forbids it

    rule: str = ""
    files: tuple[StoredFile, ...] = ()

    @abstractmethod
    def claims(self) -> Mapping[str, object]:
        """What of a file it decides, and how: of two that decide the same thing otherwise, one only is done.

        Nothing, if it only ever adds what no other action takes away.
        """

    @abstractmethod
    def effect(self, file: StoredFile, tiers: Sequence[str]) -> StoredFile:
        """The file afterwards; the very same where there is nothing to do. `tiers` are all, in their order."""

    @abstractmethod
    def settled(self, before: StoredFile, after: StoredFile) -> "Action | None":
        """What is left of it to do where all rules together take a file from one state to another."""

    @property
    @abstractmethod
    def target(self) -> str:
        """What it aims at, for people."""

    @abstractmethod
    def show(self) -> dict[str, Any]:
        """Its JSON, as a rule has it."""

    @abstractmethod
    def run(self, hands: Hands) -> list[FileOutcome]:
        """Have it done: one outcome per file, in order."""

    def tiers(self) -> frozenset[str]:
        """The tiers that it names."""
        return frozenset()


def check_keys(tree: Mapping[str, object], known: Iterable[str], pointer: str) -> None:
    """Raises InvalidRequest for a key that is none of these."""
    known = {"type", *known}
    for key in tree:
        if key not in known:
            raise InvalidRequest(
                f"an action {tree['type']!r} has no {str(key)[:64]!r}; it has {', '.join(sorted(known))}",
                pointer=f"{pointer}/{escape(str(key)[:64])}",
            )


def name_in(tree: Mapping[str, object], key: str, pointer: str, default: str | None = None) -> str:
    """The name under this key. Raises InvalidRequest where there is none."""
    value = tree.get(key, default)
    return check_name(value, f"{pointer}/{key}")


def names_in(tree: Mapping[str, object], key: str, pointer: str) -> frozenset[str]:
    """The names under this key; none where it is absent. Raises InvalidRequest."""
    value = tree.get(key, ())
    if not isinstance(value, list | tuple) or len(value) > MAX_NAMES:
        raise InvalidRequest(f"{key!r} is a list of at most {MAX_NAMES} names", pointer=f"{pointer}/{key}")
    return frozenset(check_name(one, f"{pointer}/{key}/{number}") for number, one in enumerate(value))


def check_name(value: object, pointer: str) -> str:
    """A name that can be shown. Raises InvalidRequest."""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME_CHARACTERS:
        raise InvalidRequest(f"a name is a text of 1 to {MAX_NAME_CHARACTERS} characters", pointer=pointer)
    if not value.isprintable():
        raise InvalidRequest("a name has no control characters", pointer=pointer)
    return value


def escape(key: str) -> str:
    """A key as RFC 6901 writes it in a pointer."""
    return key.replace("~", "~0").replace("/", "~1")
