"""From an address in the configuration to the part it names.

`milvus://host:19530` is opened by `nexus.stores.milvus.open("milvus://host:19530")`: the scheme,
with dashes as underscores, is the name of a module, so a new part is one new file. A part from
another package is named in full: `my_package.my_store:anything`.
"""

from importlib import import_module, util
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Literal

from nexus.errors import ConfigError

Kind = Literal["stores", "models"]


def scheme(address: str) -> str:
    """The part of an address before its first colon."""
    return address.partition(":")[0]


def open_part(kind: Kind, address: str, **options: Any) -> Any:
    """Open the part that `address` names. Raises ConfigError when there is no such module."""
    return find_module(kind, address).open(address, **options)


def find_module(kind: Kind, address: str) -> ModuleType:
    """The module that opens this address, imported; its heavy libraries may load with it."""
    name, colon, _ = address.partition(":")
    module = name.replace("-", "_")
    full = module if "." in module else f"nexus.{kind}.{module}"
    if not colon or not all(part.isidentifier() for part in full.split(".")) or util.find_spec(full) is None:
        known = ", ".join(sorted(f"{m.name.replace('_', '-')}:" for m in iter_modules(_package(kind).__path__)))
        raise ConfigError(f"{address!r} names no part of nexus.{kind}: it must begin with one of {known}")
    return import_module(full)


def _package(kind: Kind) -> ModuleType:
    return import_module(f"nexus.{kind}")
