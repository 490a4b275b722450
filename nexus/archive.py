"""A home in one file: all stores as they were at one moment, packed while others write, unpacked whole or not at all.

The moment. Every SQLite file of the home is locked against writers, a reader of each is begun, and the writers go on:
what the readers see from then on is one moment of all the files together, however long the copying takes. Writers
wait for milliseconds. What the machines agree on (the coordinator's snapshot) is taken just before, for it points at
what the stores hold: a pointer that is a little old still finds what it means, a newer one might not.

Other files are few and of three kinds: small ones that are replaced whole (keys, registers) are read at that moment;
those that only grow (the audit record) are taken as long as they were; those that never change (blocks) are linked
to, before and at the moment, so that one that is removed meanwhile is not missed: small ones too, of which there may be
more than memory holds.

The index of vectors is left out. The document store keeps each vector beside its chunk, so the index is made again
from it on restoring (`hades.repair`), in whichever vector store the settings name then, without a model.

Stores that keep their rows outside of the home (ArangoDB) give them as lines, as of a transaction that is begun at
that moment.

The file is a tar. Its last member is a list of the others with their SHA-256: a file that was cut short has none.
It holds keys and secrets of the home; its mode is 0600, and whoever has it has the documents.
"""

import hashlib
import io
import itertools
import json
import os
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from nexus import __version__, audit
from nexus.database import BUSY_SECONDS
from nexus.errors import InvalidRequest, Unavailable
from nexus.ports import KeptElsewhere
from nexus.private_files import sync_folder

MADE_AGAIN = frozenset({"vectors", "run", "logs", "cache"})  # folders of a home that hold nothing of its own
COORDINATOR = "coordinator"  # the folder that is not copied: a snapshot stands for it
SNAPSHOT = "coordinator.snapshot"
ELSEWHERE = "elsewhere"  # the folder of what stores outside of the home hold, as lines
CONTENTS = "contents.json"
FORMAT = 1
SMALL_BYTES = 64 * 2**10  # a file up to this size is replaced whole when it changes, and read at the moment
BLOCK = ".block"  # ends names of files that never change, of whatever size
PASSING = ("-wal", "-shm", "-journal", ".part", ".new")  # ends names of files that hold nothing by themselves
SQLITE = b"SQLite format 3\0"
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Member:
    """A file of an archive: its path in the home, its size in bytes, and its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What an archive holds: written when (Unix seconds), by which Nexus, and its files."""

    made_at: float
    version: str
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return sum(member.size for member in self.members)


def pack(
    home: Path, target: Path, take_snapshot: Callable[[], bytes | None], elsewhere: Mapping[str, KeptElsewhere] = {},
) -> Contents:  # fmt: skip
    """Write the archive of a home, running or not; `take_snapshot` gives the coordinator's, None where it has none.

    `elsewhere` are stores that keep what they hold outside of the home, by the names that files get in the archive.
    An older archive at `target` is replaced only by a whole one. Nobody else packs this home meanwhile. Raises
    InvalidRequest for a target inside of the home or one that cannot be written, and Unavailable for a disk that is
    too full or a store that stays locked.
    """
    target = target.absolute()
    if target.is_relative_to(home.resolve()) or target.resolve().is_relative_to(home.resolve()):
        raise InvalidRequest(f"{target} lies in the home, which may be lost with it: name a file elsewhere")
    draft, work = target.with_name(f".{target.name}.{os.getpid()}.part"), home / "run" / "backup"
    try:
        if not target.parent.is_dir():
            raise InvalidRequest(f"there is no folder {target.parent}")
        _require_room(home, target.parent)
        draft.touch(0o600)
        draft.chmod(0o600)
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        work.mkdir(mode=0o700, parents=True)
        with draft.open("wb") as file, ExitStack() as stack:
            contents = _write(_take(home, work, stack, take_snapshot, elsewhere), work, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
        sync_folder(target.parent)
        return contents
    except OSError as error:
        raise InvalidRequest(f"{target} cannot be written: {error.strerror}") from None
    except sqlite3.Error as error:
        raise Unavailable(f"a store of the home cannot be copied ({error}): try again, or `nexus doctor`") from None
    finally:
        draft.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)


def unpack(file: Path, folder: Path) -> Contents:
    """Lay an archive's files out in a new folder, synced to the disk, once all of them are found to be whole.

    The coordinator's snapshot lies there as `SNAPSHOT`, where there is one. Raises InvalidRequest for what is no
    archive, was changed or cut short, or is of another format; nothing is left of the folder then.
    """
    folder.mkdir(mode=0o700)
    try:
        with tarfile.open(file, "r:") as archive:
            found = {member.name: member for member in _laid_out(archive, folder)}
        contents = _read_contents(folder / CONTENTS)
        del found[CONTENTS]
        named = {member.name: member for member in contents.members}
        for name in sorted(named.keys() | found.keys()):
            if named.get(name) != found.get(name):
                raise InvalidRequest(f"{file} is damaged: {name} is not what was packed; take another copy of it")
        (folder / CONTENTS).unlink()
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                sync_folder(path)
        return contents
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, tarfile.TarError | EOFError):
            raise InvalidRequest(f"{file} is no archive that `nexus backup` made, or not whole: {error}") from None
        if isinstance(error, OSError):
            raise InvalidRequest(f"{file} cannot be unpacked: {error.strerror}") from None
        raise


def has_state(home: Path, besides: Collection[str]) -> bool:
    """Whether a home holds something that an archive of it would, other than these files."""
    folder = home / COORDINATOR
    return folder.exists() or any(_name(path, home) not in besides for path in _files(home))


def beside(path: Path) -> Path:
    """A name beside it, with the time, that nothing has."""
    dated = f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([dated], (f"{dated}-{count}" for count in itertools.count(2)))
    return next(one for one in map(path.with_name, names) if not one.exists())


# ── packing ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Moment:
    """A home at one moment, by paths in it: what its databases hold, its small files, and how long the others were."""

    databases: dict[str, sqlite3.Connection]
    small: dict[str, bytes]
    lengths: dict[str, int]
    elsewhere: dict[str, Iterator[bytes]]  # read once, and first: a server waits for nobody for long


def _take(
    home: Path, work: Path, stack: ExitStack, take_snapshot: Callable[[], bytes | None],
    elsewhere: Mapping[str, KeptElsewhere],
) -> _Moment:  # fmt: skip
    """The readers of the databases are closed with the stack; the large files are linked to from the folder `work`."""
    _link(home, work)
    snapshot = take_snapshot()
    paths = list(_kept(home, _is_database))
    readers: dict[str, sqlite3.Connection] = {}
    with ExitStack() as writers:
        for path in paths:
            writers.enter_context(_connected(path)).execute("BEGIN IMMEDIATE")
        for path in paths:
            reader = stack.enter_context(_connected(path))
            reader.execute("BEGIN")
            reader.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()  # from here on it sees what is there now
            readers[_name(path, home)] = reader
        dumps = {name: stack.enter_context(store.dump()) for name, store in elsewhere.items()}
        if (home / audit.FOLDER).is_dir():
            writers.enter_context(audit.locked(home))
        _link(home, work)
        small: dict[str, bytes] = {}
        for path in _kept(home, _is_small):
            with suppress(FileNotFoundError):
                small[_name(path, home)] = path.read_bytes()
        lengths = {_name(path, work): path.stat().st_size for path in _files(work) if _name(path, work) not in small}
    if snapshot is not None:
        small[SNAPSHOT] = snapshot
    return _Moment(readers, small, lengths, dumps)


def _write(moment: _Moment, work: Path, file: IO[bytes]) -> Contents:
    members = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, lines in moment.elsewhere.items():
            with (work / "copy").open("w+b") as copied:
                copied.writelines(lines)
                size = copied.tell()
                copied.seek(0)
                members.append(_add(archive, f"{ELSEWHERE}/{name}", copied, size))
            (work / "copy").unlink()
        for name, content in sorted(moment.small.items()):
            members.append(_add(archive, name, io.BytesIO(content), len(content)))
        for name, reader in sorted(moment.databases.items()):
            copy = work / "copy"
            _copy_database(reader, copy)
            with copy.open("rb") as source:
                members.append(_add(archive, name, source, copy.stat().st_size))
            copy.unlink()
        for name, length in sorted(moment.lengths.items()):
            with (work / name).open("rb") as source:
                members.append(_add(archive, name, source, length))
        contents = Contents(time.time(), __version__, tuple(members))
        listed = _show(contents)
        _add(archive, CONTENTS, io.BytesIO(listed), len(listed))
    return contents


def _files(folder: Path) -> Iterator[Path]:
    """What belongs in an archive, in order. A link is none: it leads to what is not the home's."""
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in MADE_AGAIN and not name.startswith(COORDINATOR)]
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if not name.endswith(PASSING) and not path.is_symlink():
                yield path


def _kept(folder: Path, is_wanted: Callable[[Path], bool]) -> Iterator[Path]:
    """Those of its files that are so, without what is removed just now."""
    for path in _files(folder):
        with suppress(FileNotFoundError):
            if is_wanted(path):
                yield path


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(SQLITE)) == SQLITE


def _is_small(path: Path) -> bool:
    return path.suffix != BLOCK and path.stat().st_size <= SMALL_BYTES and not _is_database(path)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _link(home: Path, work: Path) -> None:
    """Keep hold of the files that are not small, whatever becomes of their names."""
    for path in _files(home):
        link = work / path.relative_to(home)
        with suppress(FileNotFoundError):  # it was removed just now
            if not _is_small(path) and not _is_database(path):
                link.parent.mkdir(parents=True, exist_ok=True)
                if link.exists() and not link.samefile(path):
                    link.unlink()
                if not link.exists():
                    os.link(path, link)


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def _copy_database(reader: sqlite3.Connection, to: Path) -> None:
    """What the reader sees, as a file that needs none beside it."""
    with _connected(to) as copy:
        reader.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")


def _add(archive: tarfile.TarFile, name: str, source: IO[bytes], size: int) -> Member:
    """The first `size` bytes of the source, as a member."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, int(time.time())
    reader = _Hashing(source)
    archive.addfile(info, reader)
    return Member(name, size, reader.sha256)


class _Hashing:
    """Reads through, and knows the SHA-256 of what was read."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self._hash = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        return data

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _require_room(home: Path, folder: Path) -> None:
    needed = 0
    for path in _files(home):
        with suppress(FileNotFoundError):  # it was removed just now
            needed += path.stat().st_size
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Unavailable(
            f"the archive needs up to {needed / 2**20:.0f} MiB, and {folder} has {free / 2**20:.0f} MiB free: make room"
            " or name another folder",
            code="storage_full",
        )


# ── unpacking ───────────────────────────────────────────────────────────────────────────────────


def _laid_out(archive: tarfile.TarFile, folder: Path) -> Iterator[Member]:
    """Write each member's file, synced."""
    for info in archive:
        path = PurePosixPath(info.name)
        if not info.isfile() or path.is_absolute() or ".." in path.parts:
            raise InvalidRequest(f"this is no archive that `nexus backup` made: {info.name!r} is no file of a home")
        source = archive.extractfile(info)
        assert source is not None  # it is a file
        target = folder / path
        for above in reversed(path.parents):  # `parents=True` would make those for other users, too
            (folder / above).mkdir(mode=0o700, exist_ok=True)
        reader = _Hashing(source)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            shutil.copyfileobj(reader, file, _CHUNK_BYTES)
            file.flush()
            os.fsync(file.fileno())
        yield Member(info.name, info.size, reader.sha256)


def _show(contents: Contents) -> bytes:
    return json.dumps({"format": FORMAT, **asdict(contents)}).encode()


def _read_contents(file: Path) -> Contents:
    try:
        listed = json.loads(file.read_bytes())
        if listed.pop("format") != FORMAT:
            raise InvalidRequest("another version of Nexus made this archive: restore it with that one")
        return Contents(**{**listed, "members": tuple(Member(**member) for member in listed["members"])})
    except FileNotFoundError:
        raise InvalidRequest(
            "this archive was cut short, or `nexus backup` did not make it: take another copy"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InvalidRequest("this archive's list of contents is damaged: take another copy of it") from None
