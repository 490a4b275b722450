"""This machine's sealed blocks, as files: written and received whole or not at all, and never believed when read.

A block is one file, named by a digest of tenant and data id, and its version. It is made in `drafts/`, synced, noted in
the register, and renamed to its place: what was acknowledged survives a crash at any point, and what was not leaves
nothing but a draft, which the next start removes. One process at a time has the store (a lock on its folder).

**The register** holds (writer, epoch, sequence) and digest of every block that was ever written or accepted here, also
of those deleted since: some hundred bytes each. A machine counts its blocks within an epoch, and begins a new one, on
disk before its first block, at each start. So two blocks with one number are no accident: a machine was cloned, or its
key is in other hands, and Equivocation says so. An epoch is the second of Unix time at which it began, or one more
than the one before: a machine that was put back to an older state does not count again what it counted since.

**Rotation.** A block's wrap is replaced by writing a new file with the same segments. What is being written while the
tenant's active key changes gets the new one as it is finished. `retire_key` destroys a key only when nothing here,
finished or not, is under it.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Self

from nexus.database import Database
from nexus.envelope import (
    KEY_BYTES,
    PREFIX_BYTES,
    BlockId,
    BlockKey,
    Envelope,
    Header,
    RandomBytes,
    Sealer,
    Wrap,
    read_envelope,
    read_pieces,
    read_segments,
    unwrap,
    verify,
)
from nexus.errors import (
    AlreadyRunning,
    BlockCorrupt,
    BlockRefused,
    BlockStale,
    ConfigError,
    Conflict,
    Equivocation,
    InvalidRequest,
    KeyUnknown,
    NexusError,
    NotFound,
    Unavailable,
)
from nexus.failpoints import pass_through
from nexus.keyring import FULL, Keyring, write_private
from nexus.private_files import sync_folder
from nexus.types import digest

log = logging.getLogger("nexus.blocks")

SUFFIX = ".block"
LOCKS = 64
COPY_BYTES = 2**20

_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.block")
_SCRIPTS = (
    """CREATE TABLE numbers (
        writer TEXT NOT NULL, epoch INTEGER NOT NULL, sequence INTEGER NOT NULL, digest TEXT NOT NULL,
        PRIMARY KEY (writer, epoch, sequence)
    ) STRICT, WITHOUT ROWID""",
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A block as it lies here: `length` bytes of plaintext, in a sealed form of `size` bytes, in the file `name`.

    `digest` is over all but the wrapped key: equal on every machine that has the block, whatever key it is under.
    """

    header: Header
    length: int
    digest: str
    key_id: str
    size: int
    name: str


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What a look at one file found. `block` is None where the file does not even say which one it is."""

    name: str
    block: BlockId | None
    size: int
    refused: BlockRefused | None


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """How many blocks got the active key, and which could not, by the name of the file."""

    count: int
    failed: tuple[tuple[str, NexusError], ...]


class BlockStore:
    """The blocks in one folder. Safe to call from several threads; a draft or a reading belongs to one."""

    def __init__(
        self, folder: Path, keyring: Keyring, after_epoch: int = 0, now: Callable[[], float] = time.time,
        random: RandomBytes = secrets.token_bytes,
    ) -> None:  # fmt: skip
        """`after_epoch` is the highest epoch of this machine that others know of. `now` gives Unix seconds.

        Raises AlreadyRunning where another process has the folder.
        """
        self.keyring, self._now, self._random = keyring, now, random
        self._files, self._drafts = folder / "files", folder / "drafts"
        for each in (folder, self._files, self._drafts):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as opening:
            opening.enter_context(_take_lock(folder / "lock"))
            self._register = opening.enter_context(closing(Register(folder / "register.db")))
            for draft in self._drafts.iterdir():
                draft.unlink()
            after = max(after_epoch, self._register.highest_epoch(keyring.node))
            self.epoch = _begin_epoch(folder / "epoch", after, int(now()))
            self._opened = opening.pop_all()
        self._numbers = count(1)
        self._locks = [threading.Lock() for _ in range(LOCKS)]  # of files, while what is in their place changes
        self._holding = threading.Lock()
        self._in_use: Counter[tuple[str, str]] = Counter()  # (tenant, key id) of what is being written

    def close(self) -> None:
        self._opened.close()

    # ── in ──────────────────────────────────────────────────────────────────────────────────────

    def write(self, block: BlockId, data_type: str = "data", metadata: Mapping[str, Any] | None = None) -> "Writing":
        """Seal what it is fed, as a new version, in this machine's name. Raises KeyUnknown, InvalidRequest."""
        pass_through("blocks.before_seal")
        key = BlockKey(self._random(KEY_BYTES))
        header = Header(
            block.tenant, block.data_id, block.version, self.keyring.node, self.keyring.fingerprint, self.epoch,
            next(self._numbers), data_type, round(self._now(), 3), metadata or {}, self._random(PREFIX_BYTES).hex(),
            key.commitment,
        )  # fmt: skip
        return Writing(self, header, key)

    def receive(self, block: BlockId, digest: str | None = None) -> "Receiving":
        """Take a sealed block from another machine; also in the place of one that is damaged here.

        `digest` is that of the block, where the coordinator knows it.
        """
        return Receiving(self, block, digest)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────

    def open(self, block: BlockId, digest: str | None = None) -> "Reading":
        """Verify all of a block; then it can be read. Raises NotFound and BlockRefused, and releases nothing then."""
        while True:
            file = self._open_file(self.name_of(block))
            try:
                envelope = self._verified(file, block, digest)
                key = unwrap(envelope, self.keyring.opening_key(block.tenant, envelope.wrap.key_id))
                return Reading(file, self._stored(envelope), read_segments(file, envelope, key))
            except KeyUnknown:  # its key was retired before it was wrapped anew, or while this looked at it
                file.close()
                if not self._rewrap_file(self.name_of(block)) and not self._has_changed(block, envelope):
                    raise
            except BaseException:
                file.close()
                raise

    def send(self, block: BlockId) -> "Reading":
        """A block's sealed bytes, as they are here: whoever gets them verifies them. Raises NotFound, BlockCorrupt."""
        file = self._open_file(self.name_of(block))
        try:
            envelope = read_envelope(file)
            return Reading(file, self._stored(envelope), read_pieces(file, 0, envelope.size))
        except BaseException:
            file.close()
            raise

    def find(self, block: BlockId) -> Stored | None:
        """What a block says of itself, not verified; None if it is not here, or cannot be read."""
        return self._look(self.name_of(block))

    def versions(self, tenant: str, data_id: str) -> list[int]:
        """Which are here, the oldest first."""
        stem = _stem_of(tenant, data_id)
        found = (self._files / stem[:2]).glob(f"{stem}-*{SUFFIX}")
        return sorted(int(file.name.removesuffix(SUFFIX).rpartition("-")[2], 16) for file in found)

    def blocks(self) -> Iterator[Stored]:
        """All that can be read as blocks, not verified; those deleted meanwhile may be among them."""
        return (stored for name in self._names() if (stored := self._look(name)) is not None)

    @staticmethod
    def name_of(block: BlockId) -> str:
        """The name of a block's file."""
        return f"{_stem_of(block.tenant, block.data_id)}-{block.version:016x}{SUFFIX}"

    # ── care ────────────────────────────────────────────────────────────────────────────────────

    def delete(self, block: BlockId) -> bool:
        """For good, and on disk when this returns. False if it was not there."""
        return self.discard(self.name_of(block))

    def discard(self, name: str) -> bool:
        """Delete by the name of a file: of one that cannot say which block it is."""
        path = self._path_of(name)
        with self._locked(name), _disk():
            pass_through("blocks.before_delete")
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            sync_folder(path.parent)
            pass_through("blocks.after_delete")
            return True

    def scrub(self) -> Iterator[Scrubbed]:
        """Verify every block here, one with each step."""
        for name in self._names():
            with suppress(NotFound):  # deleted meanwhile
                yield self._scrub_file(name)

    def rewrap(self, tenant: str) -> Rewrapped:
        """Wrap the keys of all blocks of a tenant under its active key. Idempotent."""
        done, failed = 0, []
        for stored in self.blocks():
            if stored.header.tenant == tenant:
                try:
                    done += self._rewrap_file(stored.name)
                except NotFound:
                    continue
                except (BlockRefused, Unavailable) as error:
                    failed.append((stored.name, error))
        return Rewrapped(done, tuple(failed))

    def under_key(self, tenant: str, key_id: str) -> int:
        """How many blocks here are under this key, those being written included."""
        with self._holding:
            in_use = self._in_use[tenant, key_id]
        return in_use + sum(one.key_id == key_id and one.header.tenant == tenant for one in self.blocks())

    def retire_key(self, tenant: str, key_id: str) -> Rewrapped:
        """Wrap what is under a retired key anew; then destroy the key on this machine.

        Raises NotFound, and Conflict while something is under it, or it is not retired.
        """
        ring = self.keyring.ring(tenant)
        key = ring.find(key_id) if ring is not None else None
        if key is not None and key.state != "retired":
            raise Conflict(f"key {key_id} of tenant {tenant} is {key.state}: retire it in the tenant's ring first")
        rewrapped = self.rewrap(tenant)
        if left := self.under_key(tenant, key_id):
            why = f" ({rewrapped.failed[0][1]})" if rewrapped.failed else ""
            raise Conflict(
                f"{left} blocks of tenant {tenant} are still under key {key_id}, being written or not to be opened{why}"
                ": repair or discard those, and do this again"
            )
        self.keyring.forget(tenant, key_id)
        return rewrapped

    # ── within ──────────────────────────────────────────────────────────────────────────────────

    def take_key(self, tenant: str) -> tuple[str, bytes]:
        """The active key, for what is being written: not destroyed here before it is given back. Raises KeyUnknown."""
        with self._holding:
            key_id, secret = self.keyring.active_key(tenant)
            self._in_use[tenant, key_id] += 1
            return key_id, secret

    def give_back(self, tenant: str, key_id: str) -> None:
        with self._holding:
            self._in_use[tenant, key_id] -= 1

    def wrap(self, key: BlockKey, prelude: bytes, under: tuple[str, bytes]) -> Wrap:
        return key.wrap(under[1], under[0], prelude, self._random)

    def draft_path(self) -> Path:
        return self._drafts / secrets.token_hex(16)

    def accept(self, draft: "Draft", block: BlockId, digest: str | None) -> Stored:
        """Verify a draft that came from elsewhere, wrap it under the active key, and put it in its place."""
        envelope = self._verified(draft.file, block, digest)
        key = unwrap(envelope, self.keyring.opening_key(block.tenant, envelope.wrap.key_id))
        active = self.take_key(block.tenant)
        try:
            if envelope.wrap.key_id != active[0]:
                envelope = replace_wrap(draft.file, envelope, self.wrap(key, envelope.prelude, active))
            return self.keep(draft, envelope, is_new=False)
        finally:
            self.give_back(block.tenant, active[0])

    def keep(self, draft: "Draft", envelope: Envelope, is_new: bool) -> Stored:
        """Put a whole draft in its place. Raises Equivocation, and Conflict for a new one whose version is there."""
        name = self.name_of(envelope.header.block)
        with _disk():
            draft.file.flush()
            os.fsync(draft.file.fileno())
            pass_through("blocks.after_seal")
            pass_through("blocks.before_register")
            self._register.note(envelope)
            pass_through("blocks.after_register")
            with self._locked(name):
                path = self._path_of(name)
                if is_new and path.exists():
                    raise Conflict(f"{_called(envelope.header.block)} is here already: take a newer version")
                self._put(draft.path, path, "blocks.before_rename", "blocks.after_rename")
        return self._stored(envelope)

    def _put(self, draft: Path, path: Path, before: str, after: str) -> None:
        """Rename, so that it holds when this returns; failpoints `before` and `after`. The file's lock is held."""
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._files)
        pass_through(before)
        draft.replace(path)
        sync_folder(path.parent)
        pass_through(after)

    def _verified(self, file: BinaryIO, block: BlockId, digest: str | None) -> Envelope:
        """The parts of a block, once nothing speaks against it but, perhaps, its wrap. Raises BlockRefused."""
        with _disk():
            envelope = read_envelope(file)
            verify(file, envelope, lambda one: self.keyring.verify_key(one.writer, one.signer, one.version))
        found = envelope.header.block
        if (found.tenant, found.data_id) != (block.tenant, block.data_id) or found.version > block.version:
            raise BlockCorrupt(f"another block is in the place of {_called(block)}")
        if found.version < block.version:
            raise BlockStale(f"instead of {_called(block)} there is version {found.version}: it was put back")
        self._register.check(envelope)
        if digest is not None and digest != envelope.digest:
            raise BlockStale(f"{_called(block)} is here with another content than the coordinator knows of")
        return envelope

    def _rewrap_file(self, name: str) -> bool:
        """Whether this block was under another key than the active one and now is under that. Raises as `open` does."""
        with self._locked(name), self._open_file(name) as file, _disk():
            envelope = read_envelope(file)
            tenant = envelope.header.tenant
            active = self.take_key(tenant)
            try:
                if envelope.wrap.key_id == active[0]:
                    return False
                secret = self.keyring.opening_key(tenant, envelope.wrap.key_id, to_rewrap=True)
                wrap = self.wrap(unwrap(envelope, secret), envelope.prelude, active)
                with Draft(self) as draft:
                    file.seek(0)
                    shutil.copyfileobj(file, draft.file, COPY_BYTES)
                    replace_wrap(draft.file, envelope, wrap)
                    draft.file.flush()
                    os.fsync(draft.file.fileno())
                    self._put(draft.path, self._path_of(name), "blocks.before_rewrap", "blocks.after_rewrap")
                return True
            finally:
                self.give_back(tenant, active[0])

    def _has_changed(self, block: BlockId, seen: Envelope) -> bool:
        """Whether the block is under another key than when it was looked at."""
        stored = self.find(block)
        return stored is not None and stored.key_id != seen.wrap.key_id

    def _scrub_file(self, name: str) -> Scrubbed:
        block, size = None, 0
        with self._open_file(name) as file:
            try:
                with _disk():
                    size = os.fstat(file.fileno()).st_size
                    named = read_envelope(file).header.block
                    if self.name_of(named) != name:
                        raise BlockCorrupt(f"{_called(named)} is in the place of another block")
                    block = named
                envelope = self._verified(file, block, None)
                unwrap(envelope, self.keyring.opening_key(block.tenant, envelope.wrap.key_id, to_rewrap=True))
                self._register.note(envelope)  # where the register was lost
            except BlockRefused as refused:
                return Scrubbed(name, block, size, refused)
        return Scrubbed(name, block, size, None)

    def _look(self, name: str) -> Stored | None:
        try:
            with self._open_file(name) as file:
                return self._stored(read_envelope(file))
        except (NotFound, BlockCorrupt, OSError):
            return None

    def _stored(self, envelope: Envelope) -> Stored:
        return Stored(
            envelope.header, envelope.length, envelope.digest, envelope.wrap.key_id, envelope.size,
            self.name_of(envelope.header.block),
        )  # fmt: skip

    def _names(self) -> Iterator[str]:
        with _disk():
            for folder in sorted(self._files.iterdir()):
                yield from sorted(file.name for file in folder.iterdir() if _NAME.fullmatch(file.name))

    def _path_of(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"{name[:100]!r} is not the name of a block's file")
        return self._files / name[:2] / name

    def _open_file(self, name: str) -> BinaryIO:
        with _disk():
            try:
                return self._path_of(name).open("rb")
            except FileNotFoundError:
                raise NotFound("there is no such block on this machine") from None

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with self._locks[int(name[:8], 16) % LOCKS]:
            yield


class Draft:
    """A file that is not there yet: what leaves the `with` block without it was kept leaves nothing behind."""

    def __init__(self, store: BlockStore) -> None:
        self.store, self.path = store, store.draft_path()
        with _disk():
            self.file = open(self.path, "x+b", opener=lambda path, flags: os.open(path, flags, 0o600))  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):  # a full disk: what is not written yet, nobody wants any more
            self.file.close()
        self.path.unlink(missing_ok=True)


class Writing(Draft):
    """A block that is being sealed."""

    def __init__(self, store: BlockStore, header: Header, key: BlockKey) -> None:
        self._header, self._key = header, key
        self._under = store.take_key(header.tenant)
        self._is_given_back = False
        try:
            self._sealer = Sealer(
                header, key, lambda prelude: store.wrap(key, prelude, self._under), store.keyring.sign
            )
            super().__init__(store)
        except BaseException:
            store.give_back(header.tenant, self._under[0])
            raise

    def feed(self, data: bytes) -> None:
        """More of the plaintext, of any size. Raises Unavailable (code storage_full) for a full disk."""
        with _disk():
            self.file.writelines(self._sealer.feed(data))

    def commit(self) -> Stored:
        """The block, once it is on disk for good. Raises Conflict where this version is here already."""
        active = self.store.take_key(self._header.tenant)
        try:
            with _disk():
                self.file.writelines(self._sealer.finish())
                envelope = read_envelope(self.file)
                if active[0] != self._under[0]:  # the tenant got another while this was written
                    wrap = self.store.wrap(self._key, envelope.prelude, active)
                    envelope = replace_wrap(self.file, envelope, wrap)
            return self.store.keep(self, envelope, is_new=True)
        finally:
            self.store.give_back(self._header.tenant, active[0])

    def close(self) -> None:
        super().close()
        if not self._is_given_back:
            self._is_given_back = True
            self.store.give_back(self._header.tenant, self._under[0])


class Receiving(Draft):
    """A sealed block that is coming from another machine."""

    def __init__(self, store: BlockStore, block: BlockId, digest: str | None) -> None:
        self._block, self._digest = block, digest
        super().__init__(store)

    def feed(self, data: bytes) -> None:
        """More of the sealed bytes, of any size. Raises Unavailable (code storage_full) for a full disk."""
        with _disk():
            self.file.write(data)

    def commit(self) -> Stored:
        """The block, once all of it is verified and on disk for good. Raises BlockRefused, and keeps nothing then."""
        return self.store.accept(self, self._block, self._digest)


class Reading:
    """Bytes of a block, in pieces of at most 1 MiB. Raises BlockCorrupt where the disk goes bad meanwhile."""

    def __init__(self, file: BinaryIO, stored: Stored, pieces: Iterator[bytes]) -> None:
        self.stored, self._file, self._pieces = stored, file, pieces

    def __iter__(self) -> Iterator[bytes]:
        with _disk():
            yield from self._pieces

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()


class Register(Database):
    """Which number each block has that was ever here."""

    def __init__(self, file: Path) -> None:
        file.touch(mode=0o600)
        super().__init__(file, "the register of blocks", ["journal_mode = WAL"])
        self._migrate(_SCRIPTS)

    def note(self, envelope: Envelope) -> None:
        """For good. Raises Equivocation where another block has the number."""
        header = envelope.header
        row = (header.writer, header.epoch, header.sequence, envelope.digest)
        if not self.check(envelope):
            with self._transaction() as db:
                db.execute("INSERT INTO numbers VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", row)
            self.check(envelope)

    def check(self, envelope: Envelope) -> bool:
        """Whether the block's number is here. Raises Equivocation where another block has it."""
        header = envelope.header
        with self._reading() as db:
            found = db.execute(
                "SELECT digest FROM numbers WHERE writer = ? AND epoch = ? AND sequence = ?",
                (header.writer, header.epoch, header.sequence),
            ).fetchone()
        if found is not None and found[0] != envelope.digest:
            raise Equivocation(
                f"machine {header.writer} gave number {header.sequence} of its epoch {header.epoch} to two blocks,"
                f" {_called(header.block)} one of them: it is a clone, or its signing key is in other hands. Remove it,"
                " and give it a new key"
            )
        return found is not None

    def highest_epoch(self, writer: str) -> int:
        """Of this writer; 0 where nothing of it was ever here."""
        with self._reading() as db:
            (epoch,) = db.execute("SELECT max(epoch) FROM numbers WHERE writer = ?", (writer,)).fetchone()
        return epoch or 0


def replace_wrap(file: BinaryIO, envelope: Envelope, wrap: Wrap) -> Envelope:
    """Write another wrap into a draft."""
    file.seek(len(envelope.prelude))
    file.write(wrap.encode())
    return replace(envelope, wrap=wrap)


def _take_lock(path: Path) -> BinaryIO:
    """Held while the file is open, and by one process. Raises AlreadyRunning."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise AlreadyRunning("another process of Nexus has this machine's blocks: stop it first") from None
    return file


def _begin_epoch(file: Path, after: int, now: int) -> int:
    """The next epoch; on disk when this returns. Raises ConfigError for a file that nobody wrote so."""
    text = file.read_text(errors="replace") if file.exists() else "0"
    if not text.strip().isdecimal():
        raise ConfigError("the file `epoch` of this machine's blocks is damaged: put it back, or remove it")
    epoch = max(int(text) + 1, after + 1, now)
    write_private(file, str(epoch).encode())
    return epoch


def _stem_of(tenant: str, data_id: str) -> str:
    return digest("block", tenant, data_id)


def _called(block: BlockId) -> str:
    return f"version {block.version} of block {block.data_id!r}"


@contextmanager
def _disk() -> Iterator[None]:
    """What the operating system says of the disk, in words of errors.py."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise Unavailable("the disk of the blocks is full", code="storage_full") from error
        if error.errno == errno.EIO:
            raise BlockCorrupt("a block cannot be read from the disk") from error
        log.warning("the blocks cannot be used: %s", error)  # what callers are told has no path
        raise Unavailable("this machine's blocks are away") from error
