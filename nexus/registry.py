"""From an address in the configuration to the part it names.

`milvus://host:19530` is opened by `nexus.stores.milvus.open("milvus://host:19530")`: the scheme,
with dashes as underscores, is the name of a module, so a new part is one new file. A part from
another package is named in full: `my_package.my_store:anything`.
"""

from importlib import import_module, util
from inspect import signature
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Literal

from nexus.errors import ConfigError

Kind = Literal["stores", "models", "tiers"]
Task = Literal["generate", "embed", "rerank"]


def open_part(kind: Kind, address: str, **options: Any) -> Any:
    """Open the part that `address` names. Raises ConfigError when there is no such module."""
    return find_module(kind, address).open(address, **options)


def open_tier(address: str, **options: Any) -> Any:
    """Open the tier that `address` names: a module of nexus.tiers, or else one of the filesystems that fsspec knows."""
    scheme = address.partition(":")[0].replace("-", "_")
    has_module = "." in scheme or (scheme.isidentifier() and _exists(f"nexus.tiers.{scheme}"))
    module = find_module("tiers", address) if has_module else import_module("nexus.tiers.filesystem")
    return module.open(address, **options)


def open_interactions(address: str, **options: Any) -> Any:
    """What memory keeps, in the store of the documents at `address`: by its own `open_interactions`, or SQLite's."""
    module = find_module("stores", address)
    if hasattr(module, "open_interactions"):
        return module.open_interactions(address, **options)
    return find_module("stores", "sqlite:").open_interactions("sqlite:", **options)


def open_model(task: Task, address: str, **offered: Any) -> Any:
    """Open the model of this address for one task, with those of the offered settings that its module takes.

    A module says what it can do in `TASKS`. Raises ConfigError when that is not this task.
    """
    module = find_module("models", address)
    if task not in module.TASKS:
        raise ConfigError(f"{address!r} can {' and '.join(module.TASKS)}, but not {task}")
    taken = signature(module.open).parameters
    return module.open(address, **{name: value for name, value in {"task": task, **offered}.items() if name in taken})


def check_part(kind: Kind, address: str, task: Task | None = None) -> None:
    """Return if the part could be opened as far as can be told without loading it, else raise ConfigError."""
    module = find_module(kind, address)
    if task is not None and task not in module.TASKS:
        raise ConfigError(f"{address!r} can {' and '.join(module.TASKS)}, but not {task}")
    check = getattr(module, "check", None)
    if check is not None:
        check(address)


def find_module(kind: Kind, address: str) -> ModuleType:
    """The module that opens this address, imported; its heavy libraries may load with it."""
    name = require_part(kind, address)
    found = import_module(name)
    if not hasattr(found, "open"):
        raise ConfigError(f"{address!r}: the module {name} has no open(address)")
    return found


def require_part(kind: Kind, address: str) -> str:
    """The name of the module for this address, not imported. Raises ConfigError when there is none."""
    name, colon, _ = address.partition(":")
    module = name.replace("-", "_")
    full = module if "." in module else f"nexus.{kind}.{module}"
    if not colon or not all(part.isidentifier() for part in full.split(".")) or not _exists(full):
        package = import_module(f"nexus.{kind}")
        known = ", ".join(sorted(f"{m.name.replace('_', '-')}:" for m in iter_modules(package.__path__)))
        raise ConfigError(f"{address!r} names no part of nexus.{kind}: it must begin with one of {known}")
    return full


def _exists(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False
