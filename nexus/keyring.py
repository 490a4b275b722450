"""The keys that data blocks need: each tenant's, this machine's to sign with, and the others' to verify by.

**The cluster key** is the one secret that an installation's machines share: a text in `share-key` of the home, carried
to each machine by whoever runs them, or given in the configuration. What machines tell each other of keys goes through
the coordinator, sealed under it (AES-256-GCM, a key of its own for each purpose): who reads or writes the coordinator
and has not the cluster key learns no key and can slip none in. A machine may hold several, beside the one that it seals
under: while it is changed, the one before and the next (cluster/membership.py).

**A tenant's ring** is all keys that its blocks may be under: one `active`, which new blocks get, `readable` ones before
it, and `retired` ones, of which only the id is passed on. It has a generation, which only grows. A ring is drafted
first and then, when the coordinator has taken the draft (compare and set: of two, one), installed by every machine.

**Rotation.** Draft and install a ring with one key more; wrap every block anew (blocks.py); then draft and install one
with the old key retired. A machine that was away meanwhile still holds the retired key when it installs that ring:
it is good for wrapping what it has anew and for nothing else, and is forgotten after that.

**Machines** introduce themselves with the Ed25519 key that they sign with. One that is lost stays known, or its blocks
would be worth nothing. Of one that is expelled blocks count up to a version, until others have sealed those anew; then
none does, it is removed, and never comes back under the same key. What is known of a key only ever gets worse, so
records of a machine may be met in any order, and twice.

Every file here is its owner's alone and written whole, or not at all.
"""

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nexus.access import NAME
from nexus.errors import (
    ConfigError,
    Conflict,
    InvalidRequest,
    KeyUnknown,
    NotFound,
    Unavailable,
    UpstreamInvalid,
    WriterUnknown,
)
from nexus.failpoints import pass_through
from nexus.private_files import require_private, sync_folder
from nexus.signing import fault_of_secret

SECRET_FILE, FOLDER, SIGNING_FILE, PART = "share-key", "share", "signing-key", ".part"
RINGS, MACHINES, HELD, BLOCKS = "keys", "nodes", "cluster-keys", "blocks"  # folders
MAGIC = b"NXKEYS\0\x01"
ID_BYTES, NONCE_BYTES, SECRET_BYTES = 8, 12, 32
FINGERPRINT_DIGITS = 32
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # says the system of a disk
LEFT_SECONDS = 3600.0  # after which a file that was not finished is one that a crash left

State = Literal["active", "readable", "retired"]
Purpose = Literal["ring", "machine", "cluster"]
Keys = Mapping[str, int | None]  # a machine's, and the last version that counts: 0 for none, None for all

_P = 2**255 - 19
# y of the points whose order divides 8: under such a key one signature verifies for many messages. Chalkias, Garillot,
# Nikolaenko (2020), "Taming the many EdDSAs", table 1.
_SMALL_ORDER = frozenset(
    {
        0, 1, _P - 1,
        int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
        int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little")
        & (2**255 - 1),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Writer:
    """A machine's key, by its fingerprint (32 hexadecimal digits), and which blocks under it still count.

    Of a machine that is expelled those up to version `last`; of one that is removed none, and of others all.
    """

    node: str
    fingerprint: str
    is_removed: bool
    last: int | None = None

    @property
    def is_good(self) -> bool:
        return not self.is_removed and self.last is None


@dataclass(frozen=True, slots=True)
class TenantKey:
    """What wraps the keys of a tenant's blocks. `secret` is None where this machine has it no more, or never had."""

    key_id: str
    number: int
    state: State
    secret: bytes | None = field(repr=False)

    @property
    def is_held(self) -> bool:
        return self.secret is not None


@dataclass(frozen=True, slots=True)
class Ring:
    """All keys of one tenant, oldest first."""

    tenant: str
    generation: int
    keys: tuple[TenantKey, ...]

    @property
    def active(self) -> TenantKey:
        return next(key for key in self.keys if key.state == "active")

    def find(self, key_id: str) -> TenantKey | None:
        return next((key for key in self.keys if key.key_id == key_id), None)


class ClusterKey:
    """Seals what is kept of keys, and what machines tell each other of them."""

    def __init__(self, secret: str) -> None:
        self.secret = secret
        self.key_id = self._derive("id")[:ID_BYTES].hex()

    def seal(self, purpose: Purpose, value: Mapping[str, Any]) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        start = MAGIC + bytes.fromhex(self.key_id)
        plain = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        return start + nonce + AESGCM(self._derive(purpose)).encrypt(nonce, plain, start + purpose.encode())

    def unseal(self, purpose: Purpose, sealed: bytes) -> dict[str, Any]:
        """Raises UpstreamInvalid where it is sealed otherwise, or changed."""
        start, rest = sealed[: len(MAGIC) + ID_BYTES], sealed[len(MAGIC) + ID_BYTES :]
        if not start.startswith(MAGIC) or len(rest) < NONCE_BYTES:
            raise UpstreamInvalid("a record of keys is damaged: it does not begin as one does")
        if (key_id := start[len(MAGIC) :].hex()) != self.key_id:
            raise UpstreamInvalid(
                f"a record of keys is sealed under cluster key {key_id}; this machine has {self.key_id}"
            )
        try:
            plain = AESGCM(self._derive(purpose)).decrypt(
                rest[:NONCE_BYTES], rest[NONCE_BYTES:], start + purpose.encode()
            )
        except InvalidTag:
            raise UpstreamInvalid(f"a record of keys under cluster key {self.key_id} is damaged, or forged") from None
        value: dict[str, Any] = json.loads(plain)
        return value

    def _derive(self, purpose: str) -> bytes:
        info = f"nexus-cluster-v1 {purpose}".encode()
        return HKDF(hashes.SHA256(), SECRET_BYTES, salt=None, info=info).derive(self.secret.encode())


class Keyring:
    """This machine's keys, under `share/` of its home, and the cluster key. Safe to call from several threads."""

    def __init__(
        self, home: Path, node: str, given: str | None = None, create: bool = True, keeps: bool = True
    ) -> None:  # fmt: skip
        """`given` is the cluster key where the configuration has it; without one and with `create` it is made.

        What `keeps` nothing knows the machines while it lives, and no tenant's keys: for processes beside the one that
        does.

        Raises ConfigError for keys that are lost, wrong, damaged, or that other users of the machine may read.
        """
        _check_name("a machine", node)
        self.node, self.keeps = node, keeps
        self.folder = home / FOLDER
        for folder in (self.folder, *(self.folder / name for name in (RINGS, MACHINES, HELD))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_private(folder)
            _remove_parts(folder)
        self.is_given, self._secret_file = given is not None, home / SECRET_FILE
        self._lock = threading.RLock()
        self._cluster = ClusterKey(_cluster_secret(home, given, create))
        self._clusters = {self._cluster.key_id: self._cluster}
        self._read_held()
        self._rings = {ring.tenant: ring for ring in map(_decode_ring, self._load(RINGS, "ring"))}
        self._known = dict(map(_decode_machine, self._load(MACHINES, "machine")))  # {machine: its Keys}
        self._signing = Ed25519PrivateKey.from_private_bytes(_signing_secret(self.folder / SIGNING_FILE))
        self._public = self._signing.public_key().public_bytes_raw().hex()
        self.fingerprint = fingerprint_of(self._public)
        self._check_own_key()
        self.meet(self.introduction())

    @property
    def cluster_key_id(self) -> str:
        """A public name of the cluster key that this machine seals under: equal for equal keys."""
        return self._cluster.key_id

    # ── cluster keys ────────────────────────────────────────────────────────────────────────────

    def cluster_keys(self) -> tuple[str, ...]:
        """The ids of all that are held here."""
        with self._lock:
            return tuple(sorted(self._clusters))

    def draft_cluster_key(self) -> tuple[str, str]:
        """(id, secret) of another, held here beside the one in use. Raises Conflict where the settings give it."""
        if self.is_given:
            raise Conflict(
                "the cluster key stands in the settings (sharing.key), where no command can change it: put it into"
                f" {SECRET_FILE} in the home of each machine instead, and take sharing.key out"
            )
        secret = secrets.token_urlsafe(48)
        return self.hold_cluster_key(secret), secret

    def hold_cluster_key(self, secret: str) -> str:
        """Keep another one; its id."""
        key = ClusterKey(secret)
        with self._lock:
            if key.key_id not in self._clusters:
                write_private(self.folder / HELD / key.key_id, secret.encode())
                self._clusters[key.key_id] = key
        return key.key_id

    def cluster_secret(self, key_id: str) -> str:
        """For another member. Raises NotFound."""
        with self._lock:
            if key_id not in self._clusters:
                raise NotFound(f"cluster key {key_id} is not on this machine")
            return self._clusters[key_id].secret

    def seal_cluster_key(self, key_id: str) -> bytes:
        """What tells members of a cluster key, by its id; only who has it could have said it."""
        with self._lock:
            return self._clusters[key_id].seal("cluster", {})

    def use_cluster_key(self, key_id: str) -> None:
        """Seal under this one, which is held, from now on; also all that is kept here. Idempotent, whatever crashes."""
        with self._lock:
            new, old = self._clusters[key_id], self._cluster
            if new is old or self.is_given:
                return
            if not self.keeps and self.is_beside_steward():
                self._cluster = new
                return
            write_private(self.folder / HELD / old.key_id, old.secret.encode())
            self._cluster = new
            try:
                for ring in self._rings.values():
                    self._use(ring)
                for node, keys in self._known.items():
                    self._keep_machine(node, keys)
                write_private(self._secret_file, f"{new.secret}\n".encode())
            except Unavailable:
                self._cluster = old
                raise
            (self.folder / HELD / key_id).unlink(missing_ok=True)

    def forget_cluster_keys(self) -> None:
        """Destroy all but the one in use."""
        with self._lock:
            self._clusters = {self._cluster.key_id: self._cluster}
            for file in (self.folder / HELD).iterdir():
                pass_through("keys.before_forget")
                file.unlink(missing_ok=True)

    def read_cluster_keys(self) -> None:
        """Again, what the process beside this one may have changed. Raises ConfigError as at the start."""
        with self._lock:
            if not self.is_given:
                self._cluster = ClusterKey(_cluster_secret(self._secret_file.parent, None, False))
                self._clusters = {self._cluster.key_id: self._cluster}
                self._read_held()

    def is_beside_steward(self) -> bool:
        """Whether this machine keeps blocks, so that the cluster key is another process's to change."""
        return (self.folder / BLOCKS).exists()

    def _read_held(self) -> None:
        for file in _kept_in(self.folder / HELD):
            with suppress(FileNotFoundError):  # the process beside this one destroyed it just now
                if file.name == self._cluster.key_id:  # a crash left it when this one came into use
                    file.unlink()
                    continue
                require_private(file)
                self._clusters.setdefault(file.name, ClusterKey(file.read_text().strip()))

    def _unseal(self, purpose: Purpose, sealed: bytes) -> dict[str, Any]:
        with self._lock:
            return self._clusters.get(key_id_of(sealed), self._cluster).unseal(purpose, sealed)

    # ── machines ────────────────────────────────────────────────────────────────────────────────

    def introduction(self, known: bytes | None = None) -> bytes:
        """What makes other machines take this one's signature, and what `known`, the record of it before, says.

        Raises ConfigError where the key was removed, and UpstreamInvalid for a record that is none of it.
        """
        keys: Keys = {}
        if known is not None:
            name, keys = _decode_machine(self._unseal("machine", known))
            if name != self.node:
                raise UpstreamInvalid(f"the record of machine {self.node} is that of {name}")
        self._require_good(keys.get(self._public))
        self.require_member()
        return self._cluster.seal("machine", _encode_machine(self.node, {**keys, self._public: None}))

    def require_member(self) -> None:
        """Raises ConfigError where this machine's key was taken out of use."""
        self._require_good(self._known.get(self.node, {}).get(self._public))

    def _require_good(self, last: int | None) -> None:
        if last is not None:
            raise ConfigError(
                f"this machine, {self.node}, was removed: its signing key {self.fingerprint} counts no more. To let it"
                f" come back, remove {FOLDER}/{SIGNING_FILE} from its home: it makes another"
            )

    def removal(self, node: str, last: int = 0) -> bytes:
        """What makes machines refuse all that was signed with a machine's keys so far, but blocks up to this version.

        Raises NotFound, Conflict.
        """
        with self._lock:
            if node == self.node:
                raise Conflict(f"machine {node} cannot remove itself: do it on another one")
            if node not in self._known:
                raise NotFound(f"no machine {node} is known here")
            keys = {key: _worse(known, last) for key, known in self._known[node].items()}
            return self._cluster.seal("machine", _encode_machine(node, keys))

    def end_of_expulsion(self, node: str) -> bytes:
        """What makes machines refuse all that was signed with a machine's keys that were taken out of use."""
        with self._lock:
            keys = {key: last if last is None else 0 for key, last in self._known[node].items()}
            return self._cluster.seal("machine", _encode_machine(node, keys))

    def meet(self, record: bytes) -> tuple[Writer, ...]:
        """Learn of a machine's keys, or that they are removed, for good. Returns all that is known of the machine.

        Raises UpstreamInvalid for a record that was not made under the cluster key, or with a key that is none.
        """
        node, keys = _decode_machine(self._unseal("machine", record))
        with self._lock:
            for other, theirs in self._known.items():
                if other != node and (shared := theirs.keys() & keys.keys()):
                    raise UpstreamInvalid(
                        f"machines {other} and {node} have one signing key, {fingerprint_of(min(shared))}: one is a"
                        f" copy of the other. Remove {FOLDER}/ from the home of the copy"
                    )
            before = self._known.get(node, {})
            after = {key: _worse(keys.get(key), before.get(key)) for key in (*before, *keys)}
            if after != before:
                self._keep_machine(node, after)
                self._known[node] = after
            return _writers_of(node, after)

    def record_of(self, node: str) -> bytes | None:
        """All that is known of a machine, as the others meet it."""
        with self._lock:
            keys = self._known.get(node)
            return None if keys is None else self._cluster.seal("machine", _encode_machine(node, keys))

    def _keep_machine(self, node: str, keys: Keys) -> None:
        if self.keeps:
            sealed = self._cluster.seal("machine", _encode_machine(node, keys))
            write_private(self.folder / MACHINES / f"{node}.{MACHINES}", sealed)

    def writers(self) -> tuple[Writer, ...]:
        with self._lock:
            return tuple(writer for node in sorted(self._known) for writer in _writers_of(node, self._known[node]))

    def verify_key(self, node: str, fingerprint: str, version: int | None = None) -> Ed25519PublicKey:
        """The key that this machine signs with, or signed a block of this version with. Raises WriterUnknown.

        An expelled machine's is good for its blocks that are not sealed anew yet, and for nothing else.
        """
        with self._lock:
            for public, last in self._known.get(node, {}).items():
                if fingerprint_of(public) == fingerprint:
                    if last is not None and (version is None or version > last):
                        raise WriterUnknown(f"machine {node} was removed: what it signed with {fingerprint} is refused")
                    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        raise WriterUnknown(f"no machine {node} is known here to sign with key {fingerprint}")

    def sign(self, message: bytes) -> bytes:
        """Ed25519, 64 bytes. Each kind of message begins with words of its own, so that none passes for another."""
        return self._signing.sign(message)

    # ── tenants ─────────────────────────────────────────────────────────────────────────────────

    def ring(self, tenant: str) -> Ring | None:
        """The tenant's keys as this machine uses them."""
        with self._lock:
            return self._rings.get(tenant)

    def tenants(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(sorted(self._rings))

    def draft_key(self, tenant: str) -> bytes:
        """The tenant's ring with another, active key; not in use before it is installed."""
        _check_name("a tenant", tenant)
        ring = self.ring(tenant) or Ring(tenant, 0, ())
        before = tuple(replace(key, state="readable") if key.state == "active" else key for key in ring.keys)
        number = max((key.number for key in before), default=0) + 1
        new = TenantKey(secrets.token_hex(ID_BYTES), number, "active", secrets.token_bytes(SECRET_BYTES))
        return self._sealed(Ring(tenant, ring.generation + 1, (*before, new)))

    def draft_retirement(self, tenant: str, key_id: str) -> bytes:
        """The tenant's ring with this key retired. Raises NotFound, and Conflict for the active key."""
        ring = self._ring_with(tenant, key_id)
        if ring.active.key_id == key_id:
            raise Conflict(f"key {key_id} of tenant {tenant} is the one that new blocks get: make another first")
        keys = tuple(replace(key, state="retired") if key.key_id == key_id else key for key in ring.keys)
        return self._sealed(Ring(tenant, ring.generation + 1, keys))

    def install(self, sealed: bytes) -> Ring:
        """Use this ring from now on, if it is newer than the one in use; returns the one in use then.

        A retired key that this machine has stays with it until `forget`. Raises UpstreamInvalid for a ring that was not
        made under the cluster key, and Conflict for another one of the same generation.
        """
        ring = _decode_ring(self._unseal("ring", sealed))
        with self._lock:
            used = self._rings.get(ring.tenant)
            if used is not None and ring.generation == used.generation and _passed_on(ring) != _passed_on(used):
                raise Conflict(
                    f"two different rings of keys of tenant {ring.tenant} have generation {ring.generation}: take the"
                    " one that the coordinator has, and draft anew"
                )
            if used is not None and ring.generation <= used.generation:
                return used
            held = {key.key_id: key.secret for key in used.keys} if used is not None else {}
            keys = tuple(replace(key, secret=key.secret or held.get(key.key_id)) for key in ring.keys)
            return self._use(replace(ring, keys=keys))

    def export(self, tenant: str) -> bytes | None:
        """The ring as another machine installs it."""
        ring = self.ring(tenant)
        return None if ring is None else self._sealed(ring)

    def forget(self, tenant: str, key_id: str) -> None:
        """Destroy a retired key on this machine. Raises NotFound, and Conflict for one that is not retired."""
        with self._lock:
            ring = self._ring_with(tenant, key_id)
            key = ring.find(key_id)
            if key is None or key.state != "retired":
                raise Conflict(f"key {key_id} of tenant {tenant} is in use: only a retired one may be forgotten")
            pass_through("keys.before_forget")
            keys = tuple(replace(each, secret=None) if each.key_id == key_id else each for each in ring.keys)
            self._use(replace(ring, keys=keys))
            pass_through("keys.after_forget")

    def active_key(self, tenant: str) -> tuple[str, bytes]:
        """(id, key) for new blocks. Raises KeyUnknown where the tenant has none."""
        ring = self.ring(tenant)
        if ring is None or ring.active.secret is None:
            raise KeyUnknown(f"tenant {tenant} has no key on this machine yet")
        return ring.active.key_id, ring.active.secret

    def opening_key(self, tenant: str, key_id: str, to_rewrap: bool = False) -> bytes:
        """The key with this id; a retired one only to wrap anew what is still under it. Raises KeyUnknown."""
        ring = self.ring(tenant)
        key = ring.find(key_id) if ring is not None else None
        if key is None:
            raise KeyUnknown(
                f"key {key_id} of tenant {tenant} is not on this machine, and nothing under it can be read"
            )
        if key.secret is None or (key.state == "retired" and not to_rewrap):
            raise KeyUnknown(f"key {key_id} of tenant {tenant} is retired: what is still under it is refused")
        return key.secret

    # ── files ───────────────────────────────────────────────────────────────────────────────────

    def _ring_with(self, tenant: str, key_id: str) -> Ring:
        ring = self.ring(tenant)
        if ring is None or ring.find(key_id) is None:
            raise NotFound(f"tenant {tenant} has no key {key_id}")
        return ring

    def _use(self, ring: Ring) -> Ring:
        sealed = self._cluster.seal("ring", _encode_ring(ring))
        write_private(self.folder / RINGS / f"{ring.tenant}.{RINGS}", sealed)
        self._rings[ring.tenant] = ring
        return ring

    def _sealed(self, ring: Ring) -> bytes:
        return self._cluster.seal("ring", _encode_ring(_passed_on(ring)))

    def _load(self, folder: str, purpose: Purpose) -> list[dict[str, Any]]:
        """What was kept in a folder. Raises ConfigError for what is not this installation's, or damaged."""
        found = []
        for file in _kept_in(self.folder / folder) if self.keeps else ():
            require_private(file)
            try:
                value = self._unseal(purpose, file.read_bytes())
                if file.stem not in (value.get("tenant"), value.get("node")):
                    raise UpstreamInvalid("it is of another tenant, or another machine")
                found.append(value)
            except UpstreamInvalid as error:
                raise ConfigError(
                    f"{FOLDER}/{folder}/{file.name} in the home: {error.message}. Give this machine the installation's"
                    f" {SECRET_FILE}; or put the file back, or remove it: the coordinator has it too"
                ) from None
        return found

    def _check_own_key(self) -> None:
        for node, keys in self._known.items():
            if node != self.node and self._public in keys:
                raise ConfigError(
                    f"this machine is {self.node}, but signs with the key of machine {node}: give it back that name, or"
                    f" remove {FOLDER}/{SIGNING_FILE} from its home for a key of its own"
                )


def key_id_of(sealed: bytes) -> str:
    """Which cluster key it says to be sealed under; "" for what is no record of keys."""
    return sealed[len(MAGIC) : len(MAGIC) + ID_BYTES].hex() if sealed.startswith(MAGIC) else ""


def fingerprint_of(public: str) -> str:
    """The name of a verify key, of its 64 hexadecimal digits."""
    return sha256(b"nexus-signer-v1\0" + bytes.fromhex(public)).hexdigest()[:FINGERPRINT_DIGITS]


def is_weak(public: bytes) -> bool:
    """Whether an Ed25519 key is of small order, or no canonical encoding of a point (RFC 8032, 5.1.3)."""
    y = int.from_bytes(public, "little") & (2**255 - 1)
    return len(public) != 32 or y >= _P or y in _SMALL_ORDER


def write_private(file: Path, content: bytes) -> None:
    """All of it or nothing, on disk when this returns, for its owner alone. Raises Unavailable, as for a full disk."""
    part = _write_part(file, content)
    pass_through("keys.before_write")
    with _discarding(part):
        part.replace(file)
        sync_folder(file.parent)
    pass_through("keys.after_write")


@contextmanager
def _discarding(part: Path) -> Iterator[None]:
    """Where the disk does not do it nothing is left, and it is said in words of errors.py."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        if error.errno in FULL:
            raise Unavailable("the disk of the keys of shared data is full", code="storage_full") from error
        raise Unavailable(f"keys of shared data cannot be written: {os.strerror(error.errno or 0)}") from error


def _write_part(file: Path, content: bytes) -> Path:
    """A synced file beside it, of another name for each that is written: two processes may start at once."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}{PART}")
    with _discarding(part):
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as writer:
            writer.write(content)
            writer.flush()
            os.fsync(descriptor)
    return part


def _kept_in(folder: Path) -> list[Path]:
    """The files of a folder, but those that a crash left: what they were to replace is whole."""
    return sorted(file for file in folder.iterdir() if file.suffix != PART)


def _remove_parts(folder: Path) -> None:
    """What crashes left, but not what another process writes now."""
    for part in folder.glob(f".*{PART}"):
        if part.stat().st_mtime < time.time() - LEFT_SECONDS:
            part.unlink(missing_ok=True)


def _cluster_secret(home: Path, given: str | None, create: bool) -> str:
    """The installation's secret. Raises ConfigError where it is lost, weak, not private, or two differ."""
    file = home / SECRET_FILE
    if not file.exists() and given is None:
        if kept := [*_kept_in(home / FOLDER / MACHINES), *_kept_in(home / FOLDER / RINGS)]:
            key_id = kept[0].read_bytes()[len(MAGIC) : len(MAGIC) + ID_BYTES].hex()
            raise ConfigError(
                f"{SECRET_FILE} is not in the home, and the keys of shared data are sealed under it (cluster key"
                f" {key_id}): copy it from another machine or a backup. Without it no shared block can be read"
            )
        if not create:
            raise ConfigError(
                f"{SECRET_FILE} is not in the home: copy it from the home of the machine that leads the cluster"
            )
        _make_once(file, (secrets.token_urlsafe(48) + "\n").encode())
    found = given
    if file.exists():
        require_private(file)
        found = file.read_text(errors="replace").strip()
        if given is not None and found != given:
            raise ConfigError(
                f"the cluster key is given twice and differs: {SECRET_FILE} in the home is"
                f" {ClusterKey(found).key_id}, the configured one {ClusterKey(given).key_id}: remove the wrong one"
            )
    if fault := fault_of_secret(found or ""):
        raise ConfigError(f"the cluster key ({SECRET_FILE} in the home, or the configured one): {fault}")
    return found or ""


def _signing_secret(file: Path) -> bytes:
    if not file.exists():
        _make_once(file, secrets.token_bytes(SECRET_BYTES))
    require_private(file)
    secret = file.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise ConfigError(
            f"{FOLDER}/{SIGNING_FILE} in the home is damaged: put it back, or remove it and this machine makes another"
        )
    return secret


def _make_once(file: Path, content: bytes) -> None:
    """Of two processes that begin together, one makes the file and both read the same."""
    part = _write_part(file, content)
    try:
        os.link(part, file)
    except FileExistsError:
        pass  # the other one was first
    finally:
        part.unlink()
    sync_folder(file.parent)


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"the name of {what} is 1 to 64 letters, digits, '_', '.' or '-', and begins with none of those three"
        )


def _passed_on(ring: Ring) -> Ring:
    """The ring as others may have it: a retired key is only a name."""
    keys = tuple(replace(key, secret=None) if key.state == "retired" else key for key in ring.keys)
    return replace(ring, keys=keys)


def _encode_ring(ring: Ring) -> dict[str, Any]:
    keys = [[key.key_id, key.number, key.state, key.secret.hex() if key.secret else None] for key in ring.keys]
    return {"tenant": ring.tenant, "generation": ring.generation, "keys": keys}


def _decode_ring(value: Mapping[str, Any]) -> Ring:
    """Sealed under the cluster key, it is one that this code wrote."""
    keys = (
        TenantKey(key_id, number, state, bytes.fromhex(secret) if secret else None)
        for key_id, number, state, secret in value["keys"]
    )
    return Ring(value["tenant"], value["generation"], tuple(keys))


def _worse(one: int | None, other: int | None) -> int | None:
    """Of two last versions that count."""
    return min((last for last in (one, other) if last is not None), default=None)


def _encode_machine(node: str, keys: Keys) -> dict[str, Any]:
    return {"node": node, "keys": dict(keys)}


def _decode_machine(value: Mapping[str, Any]) -> tuple[str, dict[str, int | None]]:
    """Raises UpstreamInvalid for a key under which others than its owner could sign."""
    for public in value["keys"]:
        if is_weak(bytes.fromhex(public)):
            raise UpstreamInvalid(f"machine {value['node']} has a signing key that is none: {fingerprint_of(public)}")
    older = {True: 0, False: None}  # as records said it before there was expelling
    keys = {key: older[last] if isinstance(last, bool) else last for key, last in value["keys"].items()}
    return value["node"], keys


def _writers_of(node: str, keys: Keys) -> tuple[Writer, ...]:
    return tuple(Writer(node, fingerprint_of(public), last == 0, last or None) for public, last in keys.items())
