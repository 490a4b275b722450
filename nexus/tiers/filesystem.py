"""Tiers of fsspec's addresses: `file:/data/cold`, `s3://bucket/prefix`, `memory://cold`, and whatever it knows besides.

On a local disk (`file:`) every step of a path is opened from the folder before it and no link is followed, so that no
path leads out of the root, whatever else changes there meanwhile; new files are synced, and come under their names
whole and never over another. Elsewhere fsspec's calls that take one name each do the same as far as the storage can:
names are never taken for patterns, and a file is copied to its name in the storage after it was read back.
"""

import errno
import os
import posixpath
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from hashlib import blake2b
from itertools import zip_longest
from typing import Any

import fsspec

from nexus.access import NAME
from nexus.errors import ConfigError, Conflict, InvalidRequest, NotFound, Unavailable, UpstreamInvalid
from nexus.failpoints import pass_through
from nexus.ports import Found, Tier, Unusable
from nexus.tiers import PARTIAL, check_path
from nexus.types import digest

CHUNK_BYTES = 2**20
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
WITHOUT_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})  # hard ones
KEY_FIELDS = (
    "size", "ETag", "etag", "md5", "md5Hash", "content_hash", "LastModified", "last_modified", "mtime", "updated",
    "created", "version_id", "VersionId",
)  # fmt: skip
TIME_FIELDS = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


def open(address: str, **options: Any) -> Tier:
    """The tier of this address. `options` are for fsspec. Raises ConfigError."""
    if "::" in address:
        raise ConfigError(f"{address!r}: a tier is one filesystem, not a chain of them")
    protocol, _, rest = address.partition(":")
    if protocol in ("file", "local"):
        root = "/" + rest.lstrip("/") if rest.startswith("/") else rest
        if not os.path.isabs(root):
            raise ConfigError(f"{address!r}: the folder of a tier is an absolute path, such as file:/data/cold")
        return LocalTier(address, root)
    if protocol not in fsspec.available_protocols():  # or fsspec would take it for a local path
        raise ConfigError(f"{address!r} names no tier: it must begin with file:, s3:, or what else fsspec knows")
    try:
        filesystem, root = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        raise ConfigError(f"{address!r}: {protocol}: needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{address!r} names no tier: {error}") from error
    return FsspecTier(address, filesystem, root)


def _name_of_partial(path: str) -> str:
    return digest("partial", path)


def _check_tenant(tenant: str) -> str:
    if not NAME.fullmatch(tenant):
        raise InvalidRequest("a tenant's name is 1 to 64 of letters, digits, '_', '.', '-'")
    return tenant


def _hash(chunks: Iterable[bytes]) -> str:
    state = blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def _checked(path: str, found: Mapping[str, Any]) -> Found | Unusable:
    """A file that was listed, if its path can be worked with."""
    try:
        return Found(check_path(path), **found)
    except InvalidRequest as error:
        return Unusable(ascii(path), error.message)


def _same(some: Iterable[bytes], others: Iterable[bytes]) -> bool:
    """Whether two files are equal, which are cut into chunks of one size."""
    return all(one == other for one, other in zip_longest(some, others))


_ANOTHER = "another file of this name is there; move one of them away"


# ── a local disk ────────────────────────────────────────────────────────────────────────────────


class LocalTier:
    """A folder of this machine, or mounted on it."""

    def __init__(self, address: str, root: str) -> None:
        self.address, self._root = address, root
        self._touched: set[tuple[str, ...]] = set()  # folders whose entries changed since they were synced
        self._lock = threading.Lock()

    def walk(self, tenant: str) -> Iterator[Found | Unusable]:
        self.check()
        folders = [""]
        while folders:
            folder = folders.pop()
            below = []
            for name, status in self._entries(tenant, folder):
                path = f"{folder}/{name}" if folder else name
                if path == PARTIAL:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    below.append(path)
                elif stat.S_ISREG(status.st_mode):
                    yield _checked(path, _found(status))
                else:
                    kind = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
                    yield Unusable(ascii(path), f"it is {kind}")
            folders += reversed(below)

    def _entries(self, tenant: str, folder: str) -> list[tuple[str, os.stat_result]]:
        with _telling(), suppress(FileNotFoundError), self._folder(tenant, folder) as descriptor:
            with os.scandir(descriptor) as entries:
                names = sorted(entry.name for entry in entries)
            found = []
            for name in names:
                with suppress(FileNotFoundError):
                    found.append((name, os.stat(name, dir_fd=descriptor, follow_symlinks=False)))
            return found
        return []

    def find(self, tenant: str, path: str) -> Found | None:
        folder, name = posixpath.split(check_path(path))
        with _telling(), suppress(FileNotFoundError), self._folder(tenant, folder) as descriptor:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidRequest(f"{path!a} is a link, a folder or no regular file")
            return Found(path, **_found(status))
        return None

    def read(self, tenant: str, path: str) -> Iterator[bytes]:
        folder, name = posixpath.split(check_path(path))
        with _telling():
            try:
                with self._folder(tenant, folder) as descriptor:
                    file = _open_to_read(name, descriptor)
            except FileNotFoundError:
                raise NotFound(f"no file {path!a} on this tier") from None
            yield from _chunks(file)

    def write(self, tenant: str, path: str, chunks: Iterable[bytes], modified_at: float | None = None) -> Found:
        folder, name = posixpath.split(check_path(path))
        partial = _name_of_partial(path)
        with _telling(), self._folder(tenant, PARTIAL, make=True) as beside:
            try:
                written = self._write_partial(partial, beside, chunks, modified_at)
                if _hash(_chunks(_open_to_read(partial, beside))) != written:
                    raise UpstreamInvalid("what was written is read back otherwise; look after this tier's disk")
                pass_through("homes.inside_copy")
                with self._folder(tenant, folder, make=True) as descriptor:
                    self._give_name(partial, beside, name, descriptor)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(partial, dir_fd=beside)
            self._touch(tenant, folder)
            with self._folder(tenant, folder) as descriptor:
                return Found(path, **_found(os.stat(name, dir_fd=descriptor, follow_symlinks=False)))

    def _write_partial(self, name: str, folder: int, chunks: Iterable[bytes], modified_at: float | None) -> str:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)  # left by a crash; it may be the very file that has its name already
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(name, flags, 0o666, dir_fd=folder)
        state = blake2b(digest_size=16)
        try:
            for chunk in chunks:
                state.update(chunk)
                left = memoryview(chunk)
                while left:
                    left = left[os.write(file, left) :]
            if modified_at:
                os.utime(file, (modified_at, modified_at))
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is asked, not memory
        finally:
            os.close(file)
        return state.hexdigest()

    def _give_name(self, partial: str, beside: int, name: str, folder: int) -> None:
        """A whole file gets its name, or another of that name stays; that is well if it is the very same."""
        try:
            os.link(partial, name, src_dir_fd=beside, dst_dir_fd=folder, follow_symlinks=False)
            return
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
            if not _is_there(name, folder):
                os.rename(partial, name, src_dir_fd=beside, dst_dir_fd=folder)
                return
        if not _same(_chunks(_open_to_read(name, folder)), _chunks(_open_to_read(partial, beside))):
            raise Conflict(_ANOTHER)

    def remove(self, tenant: str, path: str, key: str) -> bool:
        folder, name = posixpath.split(check_path(path))
        with _telling(), suppress(FileNotFoundError), self._folder(tenant, folder) as descriptor:
            if _found(os.stat(name, dir_fd=descriptor, follow_symlinks=False))["key"] != key:
                return False
            os.unlink(name, dir_fd=descriptor)
            self._touch(tenant, folder)
        return True

    def settle(self, tenant: str) -> None:
        with self._lock:
            touched, self._touched = self._touched, set()
        with _telling():
            for parts in sorted(touched):
                with suppress(FileNotFoundError), self._open(parts) as descriptor:
                    os.fsync(descriptor)

    def discard(self, tenant: str, path: str) -> None:
        with _telling(), suppress(FileNotFoundError), self._folder(tenant, PARTIAL) as beside:
            os.unlink(_name_of_partial(path), dir_fd=beside)

    def check(self) -> None:
        if not os.path.isdir(self._root):
            raise Unavailable("the folder of this tier is not there; make it, or mount its disk")

    def close(self) -> None:
        self._touched.clear()

    def _folder(self, tenant: str, folder: str, make: bool = False) -> Any:
        return self._open((_check_tenant(tenant), *(folder.split("/") if folder else ())), make)

    @contextmanager
    def _open(self, parts: tuple[str, ...], make: bool = False) -> Iterator[int]:
        """A descriptor of a folder, reached step by step from the root without following a link."""
        self.check()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for depth, part in enumerate(parts):
                try:
                    below = os.open(part, flags, dir_fd=descriptor)
                except FileNotFoundError:
                    if not make:
                        raise
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                    self._touch(*parts[:depth])
                    below = os.open(part, flags, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def _touch(self, *parts: str) -> None:
        with self._lock:
            self._touched.add(tuple(part for folder in parts for part in folder.split("/") if part))


def _found(status: os.stat_result) -> dict[str, Any]:
    return {
        "size": status.st_size,
        "modified_at": status.st_mtime,
        "used_at": max(status.st_atime, status.st_mtime),
        "key": f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}",
    }


def _is_there(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_to_read(name: str, folder: int) -> int:
    """A descriptor of a regular file in a folder; reading it does not count as use where that can be asked for."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(name, flags | os.O_NOATIME, dir_fd=folder)
    except PermissionError:  # only a file's owner may leave its time of use as it is
        file = os.open(name, flags, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise InvalidRequest(f"{name!a} is no regular file")
    return file


def _chunks(file: int) -> Iterator[bytes]:
    """All of an open file; it is closed at the end."""
    try:
        while chunk := os.read(file, CHUNK_BYTES):
            yield chunk
    finally:
        os.close(file)


@contextmanager
def _telling() -> Iterator[None]:
    """What the operating system says of a file, in Nexus's errors, without the server's paths."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            raise InvalidRequest("this path leads over a link, or through a file, or to a folder") from error
        if error.errno == errno.ENAMETOOLONG:
            raise InvalidRequest("this path is too long for the tier") from error
        full = error.errno in FULL
        raise Unavailable(
            "the disk of this tier is full" if full else f"this tier cannot be used: {os.strerror(error.errno or 0)}",
            code="storage_full" if full else "unavailable",
        ) from error


# ── everything else that fsspec opens ───────────────────────────────────────────────────────────


class FsspecTier:
    """A filesystem of fsspec's. What it wrote is as durable as the storage says when a file is closed."""

    def __init__(self, address: str, filesystem: Any, root: str) -> None:
        self.address, self._fs, self._root = address, filesystem, root.rstrip("/")

    def walk(self, tenant: str) -> Iterator[Found | Unusable]:
        top = self._at(tenant)
        with _calling():
            self._fs.invalidate_cache()
            entries = self._fs.find(top, detail=True)
        for name, entry in sorted(entries.items()):
            path = name.removeprefix(top).lstrip("/")
            if not path.startswith(f"{PARTIAL}/"):
                yield _checked(path, _described(entry))

    def find(self, tenant: str, path: str) -> Found | None:
        entry = self._info(self._at(tenant, check_path(path)))
        if entry is None:
            return None
        if entry["type"] != "file":
            raise InvalidRequest(f"{path!a} is a folder or no regular file")
        return Found(path, **_described(entry))

    def read(self, tenant: str, path: str) -> Iterator[bytes]:
        try:
            yield from self._chunks(self._at(tenant, check_path(path)))
        except FileNotFoundError:
            raise NotFound(f"no file {path!a} on this tier") from None

    def write(self, tenant: str, path: str, chunks: Iterable[bytes], modified_at: float | None = None) -> Found:
        name, partial = self._at(tenant, check_path(path)), self._partial(tenant, path)
        try:
            with _calling():
                self._fs.makedirs(posixpath.dirname(partial), exist_ok=True)
                state = blake2b(digest_size=16)
                with self._fs.open(partial, "wb") as file:
                    for chunk in chunks:
                        state.update(chunk)
                        file.write(chunk)
                if _hash(self._chunks(partial)) != state.hexdigest():
                    raise UpstreamInvalid("what was written is read back otherwise; look after this tier")
                pass_through("homes.inside_copy")
                self._give_name(partial, name)
        finally:
            self.discard(tenant, path)
        found = self.find(tenant, path)
        if found is None:
            raise UpstreamInvalid("what was written is not there; look after this tier")
        return found

    def _give_name(self, partial: str, name: str) -> None:
        if self._info(name) is not None:
            if not _same(self._chunks(name), self._chunks(partial)):
                raise Conflict(_ANOTHER)
            return
        self._fs.makedirs(posixpath.dirname(name), exist_ok=True)
        try:
            self._fs.cp_file(partial, name)
        except NotImplementedError:  # it can rename only, as SFTP
            self._fs.mv(partial, name)

    def remove(self, tenant: str, path: str, key: str) -> bool:
        found = self.find(tenant, path)
        if found is not None and found.key != key:
            return False
        if found is not None:
            with _calling(), suppress(FileNotFoundError):
                self._fs.rm_file(self._at(tenant, path))
        return True

    def settle(self, tenant: str) -> None:
        """A closed file is the storage's own care."""

    def discard(self, tenant: str, path: str) -> None:
        partial = self._partial(tenant, path)
        if self._info(partial) is not None:
            with _calling(), suppress(FileNotFoundError):
                self._fs.rm_file(partial)

    def check(self) -> None:
        with _calling():
            self._fs.invalidate_cache()
            self._fs.exists(self._root or "/")

    def close(self) -> None:
        """The filesystem is fsspec's own, shared by all that named it."""

    def _at(self, tenant: str, *parts: str) -> str:
        return "/".join((self._root, _check_tenant(tenant), *parts))

    def _partial(self, tenant: str, path: str) -> str:
        return self._at(tenant, PARTIAL, _name_of_partial(path))

    def _info(self, name: str) -> Mapping[str, Any] | None:
        with _calling():
            self._fs.invalidate_cache()
            try:
                found: Mapping[str, Any] = self._fs.info(name)
            except FileNotFoundError:
                return None
            return found

    def _chunks(self, name: str) -> Iterator[bytes]:
        with _calling(missing=True), closing(self._fs.open(name, "rb")) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield bytes(chunk)


def _described(entry: Mapping[str, Any]) -> dict[str, Any]:
    said = {name: value.timestamp() if isinstance(value, datetime) else value for name, value in entry.items()}
    at = next((float(said[name]) for name in TIME_FIELDS if isinstance(said.get(name), int | float)), 0.0)
    key = digest(*(f"{name}={said[name]}" for name in KEY_FIELDS if name in said))
    return {"size": int(entry["size"] or 0), "modified_at": at, "used_at": at, "key": key}


@contextmanager
def _calling(missing: bool = False) -> Iterator[None]:
    """What a filesystem of fsspec's raises, in Nexus's errors; `missing`: that a file is not there stays as it is."""
    try:
        yield
    except FileNotFoundError as error:
        if missing:
            raise
        raise Unavailable("this tier cannot be used: what was there a moment ago is gone") from error
    except OSError as error:
        full = error.errno in FULL
        raise Unavailable(
            "this tier is full" if full else f"this tier cannot be used: {type(error).__name__}",
            code="storage_full" if full else "unavailable",
        ) from error
