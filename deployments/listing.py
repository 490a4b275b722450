"""Which files a source holds, where to open them, and what to call them and their passages."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus.errors import InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True, slots=True)
class Listed:
    """A file that a source holds: what to open, what to call it, and its size in bytes where that is known."""

    url: str
    source: str
    size: int


def list_all(sources: Sequence[str], home: Path) -> tuple[list[str], list[Listed]]:
    """The sources as they begin the names of their files, and every file once, in order of name.

    None of the home's own files is among them.
    """
    roots, found = [], {}
    for source in sources:
        root, files = _list(source)
        roots.append(root)
        found.update({one.source: one for one in files if not _is_of(one.url, home)})
    if not found:
        raise NotFound(f"there are no files in {', '.join(sources)}")
    return roots, [found[name] for name in sorted(found)]


def _list(source: str) -> tuple[str, list[Listed]]:
    from fsspec.core import url_to_fs  # not for those who only ask what to call a file

    try:
        filesystem, path = url_to_fs(source)
        if not filesystem.exists(path):
            raise NotFound(f"there is no file or folder {source}")
        if filesystem.isfile(path):
            return _name(filesystem, path), [_listed(filesystem, path, filesystem.info(path))]
        entries: dict[str, dict[str, Any]] = filesystem.find(path, detail=True)
    except (ImportError, ValueError) as error:
        raise InvalidRequest(f"{source} cannot be listed: {error}") from error
    except OSError as error:
        raise Unavailable(f"{source} cannot be listed: {error}") from error
    visible = {
        name: about for name, about in entries.items() if about["type"] == "file" and not _is_hidden(name, path)
    }  # a pipe or a socket would be read for ever
    return _name(filesystem, path).rstrip("/") + "/", [_listed(filesystem, *entry) for entry in visible.items()]


def _listed(filesystem: "AbstractFileSystem", path: str, about: dict[str, Any]) -> Listed:
    return Listed(filesystem.unstrip_protocol(path), _name(filesystem, path), int(about.get("size") or 0))


def _name(filesystem: "AbstractFileSystem", path: str) -> str:
    """A local file is called by its path, as `nexus add` calls it; any other by its address."""
    url = label(str(filesystem.unstrip_protocol(path)))
    return url.removeprefix("file://") if url.startswith("file://") else url


def _is_of(url: str, home: Path) -> bool:
    return url.startswith("file://") and is_below(url.removeprefix("file://"), home)


def is_below(path: str | Path, home: Path) -> bool:
    """Whether a file is below this folder, by whatever links: in its home, Nexus keeps its secrets."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(home))


def _is_hidden(name: str, root: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix(root).split("/"))


def label(path: str) -> str:
    """A path as text that can be shown: what is no text or would break a line is written out, as \\udcff or \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def place_of(passage: Mapping[str, Any]) -> str:
    """Where in its document a passage of an answer is: the page, else the lines, else nothing."""
    if passage["page"]:
        return f"page {passage['page']}"
    if passage["lines"]:
        first, last = passage["lines"]
        return f"line {first}" if first == last else f"lines {first}–{last}"
    return ""
