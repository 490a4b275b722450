"""Who asks, and may they: API keys, kept hashed, shown once, and what was revoked before its time.

A key reads `nx_<env>_<id>_<secret>_<crc>`. `env` says where it was made, `dev` or `live`, to whoever finds one that
leaked; those made before there was an `env` stay valid without. The id finds the key's row, the secret is 256 random
bits, the CRC lets a mistyped key be refused without a look-up. Only SHA-256 of the secret is stored; a slow hash guards
guessable passwords and would cost each request tens of milliseconds here for nothing.

Two keys may live under one name: make the second, have it used, then revoke the first. That is how a key is rotated.
The permission `admin` administers the installation, with all its tenants.
"""

import hashlib
import hmac
import logging
import re
import secrets
import string
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cachetools import TTLCache

from nexus.database import Database
from nexus.errors import InvalidRequest, NotFound, Unauthenticated, Unavailable
from nexus.types import Principal

log = logging.getLogger("nexus.access")

PERMISSIONS = frozenset(
    {
        "documents:read", "documents:write", "sessions:read", "sessions:write", "infer", "policies:read",
        "policies:write", "share:read", "share:write", "admin",
    }
)  # fmt: skip
ALPHABET = string.ascii_letters + string.digits
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
ID_CHARACTERS = 12
SECRET_CHARACTERS = 43  # 256 bits in base 62
CACHE_SECONDS = 5.0  # what another process revokes is refused here after this long at most
USE_SECONDS = 60.0  # between two notes of a key's last use
MOST_REMEMBERED = 10_000
MOST_PER_MINUTE = 10**9

Environment = Literal["dev", "live"]

_KEY = re.compile(
    rf"(?P<body>(?P<visible>nx_(?:(?P<environment>dev|live)_)?(?P<id>[A-Za-z0-9]{{{ID_CHARACTERS}}}))"
    rf"_(?P<secret>[A-Za-z0-9]{{{SECRET_CHARACTERS}}}))_(?P<checksum>[0-9a-f]{{8}})"
)
_SCRIPTS = (
    """CREATE TABLE IF NOT EXISTS keys (
        id TEXT PRIMARY KEY, hash BLOB NOT NULL, name TEXT NOT NULL, tenant TEXT NOT NULL,
        permissions TEXT NOT NULL, created_at REAL NOT NULL, expires_at REAL, revoked_at REAL
    ) STRICT""",
    """ALTER TABLE keys ADD COLUMN environment TEXT NOT NULL DEFAULT '';
    ALTER TABLE keys ADD COLUMN requests_per_minute INTEGER;
    ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER;
    ALTER TABLE keys ADD COLUMN last_used_at REAL;
    CREATE TABLE revoked_tokens (
        issuer TEXT NOT NULL, token TEXT NOT NULL, until REAL NOT NULL, PRIMARY KEY (issuer, token)
    ) STRICT;
    UPDATE keys SET permissions = permissions || ' policies:read policies:write share:read share:write'
    WHERE permissions = 'admin documents:read documents:write infer sessions:read sessions:write'""",
)


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key; never its secret. Times are Unix seconds. A limit of None is the installation's."""

    id: str
    name: str
    tenant: str
    permissions: frozenset[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    last_used_at: float | None = None  # to the minute

    def is_valid(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)

    @property
    def principal(self) -> Principal:
        return Principal(
            self.tenant, self.name, self.permissions, self.id, self.requests_per_minute, self.tokens_per_minute
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """A row: the key, and what its text must match."""

    key: Key
    hash: bytes
    environment: str


@dataclass(frozen=True, slots=True)
class _Text:
    """A key's text, taken apart; its checksum is right. `visible` is all of it that is no secret."""

    visible: str
    environment: str
    id: str
    secret: str


class KeyRing(Database):
    """The keys of one installation, in `access.db` under its home. Safe to call from several threads.

    Whatever cannot be read is refused: with the file away, Unavailable is raised and nobody comes in.
    """

    def __init__(
        self, home: Path, development_keys: Sequence[str] = (), environment: Environment = "dev",
        now: Callable[[], float] = time.time, elapsed: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`development_keys` are accepted as they are. `now` gives Unix seconds, `elapsed` those between."""
        file = home / "access.db"
        file.touch(mode=0o600)
        file.chmod(0o600)
        super().__init__(file, "the list of keys", ["journal_mode = WAL"])
        self._migrate(_SCRIPTS)
        self._environment, self._now, self._elapsed = environment, now, elapsed
        self._rows: TTLCache[str, _Kept | None] = TTLCache(MOST_REMEMBERED, CACHE_SECONDS, elapsed)
        self._noted: TTLCache[str, None] = TTLCache(MOST_REMEMBERED, USE_SECONDS, elapsed)
        self._revoked: frozenset[tuple[str, str]] = frozenset()
        self._revoked_read: float | None = None
        self._remembering = threading.Lock()
        self._notes = ThreadPoolExecutor(1, "last-use")
        given = [_hash(key) for key in development_keys]
        self._development = {each: Principal("default", "development", PERMISSIONS, _named(each)) for each in given}

    # ── keys ────────────────────────────────────────────────────────────────────────────────────

    def create(
        self, name: str, tenant: str = "default", permissions: frozenset[str] = PERMISSIONS,
        lifetime_seconds: float | None = None, requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[str, Key]:  # fmt: skip
        """Make a key; its text is returned here and never again. Raises InvalidRequest."""
        for label, value in (("a key's name", name), ("a tenant", tenant)):
            if not NAME.fullmatch(value):
                raise InvalidRequest(
                    f"{label} is 1 to 64 letters, digits, '_', '.' or '-', and begins with neither of the last three"
                )
        check_permissions(permissions)
        for limit in (requests_per_minute, tokens_per_minute):
            if limit is not None and not 0 < limit <= MOST_PER_MINUTE:
                raise InvalidRequest(f"a limit is a number from 1 to {MOST_PER_MINUTE} per minute")
        now = self._now()
        expires = None if lifetime_seconds is None else now + lifetime_seconds
        key = Key(
            _random(ID_CHARACTERS),
            name,
            tenant,
            permissions,
            now,
            expires,
            None,
            requests_per_minute,
            tokens_per_minute,
        )
        secret = _random(SECRET_CHARACTERS)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO keys (id, hash, name, tenant, permissions, created_at, expires_at, environment,"
                " requests_per_minute, tokens_per_minute) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key.id, _hash(secret), name, tenant, " ".join(sorted(permissions)), now, expires, self._environment,
                    requests_per_minute, tokens_per_minute,
                ),
            )  # fmt: skip
        body = f"nx_{self._environment}_{key.id}_{secret}"
        return f"{body}_{_checksum(body)}", key

    def verify(self, text: str) -> Principal:
        """The principal behind a key. Raises Unauthenticated, always with the same words; its cause says more."""
        if development := self._development.get(_hash(text)):
            return development
        named = _parse(text)
        if named is None:
            raise _refusal("no key has this form, or not with this checksum")
        row = self._row(named.id)
        is_right = hmac.compare_digest(row.hash if row else bytes(32), _hash(named.secret))
        if row is None or not is_right or row.environment != named.environment:
            raise _refusal("there is no such key")
        if not row.key.is_valid(self._now()):
            raise _refusal("the key is revoked" if row.key.revoked_at else "the key has expired")
        self._note_use(named.id)
        return row.key.principal

    def standing(self, credential: str) -> Principal | None:
        """The principal of a key by its id, which `Principal.credential` is; None if it no longer lives."""
        for development in self._development.values():
            if development.credential == credential:
                return development
        row = self._row(credential)
        return row.key.principal if row and row.key.is_valid(self._now()) else None

    def list(self) -> list[Key]:
        with self._reading() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created_at").fetchall()
        return [_key_of(row) for row in rows]

    def revoke(self, key_id: str) -> None:
        """End a key, with the tokens made of it. Raises NotFound if there is none with this id that still lives."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (self._now(), key_id)
            ).rowcount
        with self._remembering:
            self._rows.pop(key_id, None)
        if not done:
            raise NotFound("no living key has this id; `nexus key list` shows them")

    def _row(self, key_id: str) -> _Kept | None:
        """One look-up in so many seconds, whether or not there is such a key."""
        with self._remembering:  # while it reads, too, or what is revoked meanwhile would be remembered as living
            remembered = self._rows.get(key_id, self)
            if not isinstance(remembered, KeyRing):
                return remembered
            with self._reading() as db:
                row = db.execute(f"SELECT {_COLUMNS}, hash, environment FROM keys WHERE id = ?", (key_id,)).fetchone()
            kept = None if row is None else _Kept(_key_of(row[:-2]), row[-2], row[-1])
            self._rows[key_id] = kept
            return kept

    # ── last use ────────────────────────────────────────────────────────────────────────────────

    def _note_use(self, key_id: str) -> None:
        """Write down, once a minute and beside the request, that a key was used."""
        with self._remembering:
            if key_id in self._noted:
                return
            self._noted[key_id] = None
        self._notes.submit(self._write_use, key_id, self._now())

    def _write_use(self, key_id: str, now: float) -> None:
        try:
            with self._transaction(durable=False) as db:
                db.execute("UPDATE keys SET last_used_at = ? WHERE id = ?", (now, key_id))
        except Unavailable as error:  # nothing hangs on it
            log.warning("that a key was used could not be noted: %s", error.message)

    # ── tokens made before their time ended ─────────────────────────────────────────────────────

    def revoke_token(self, issuer: str, token_id: str, until: float) -> None:
        """Refuse a token by its `jti` until it would have ended anyway; with an empty `issuer` one of any."""
        now = self._now()
        with self._transaction() as db:
            db.execute("DELETE FROM revoked_tokens WHERE until < ?", (now,))
            db.execute(
                "INSERT INTO revoked_tokens VALUES (?, ?, ?)"
                " ON CONFLICT (issuer, token) DO UPDATE SET until = max(until, excluded.until)",
                (issuer, token_id, until),
            )
        with self._remembering:
            self._revoked_read = None

    def is_token_revoked(self, issuer: str, token_id: str) -> bool:
        """By what was known at most five seconds ago. Raises Unavailable where that cannot be read."""
        moment = self._elapsed()
        with self._remembering:
            if self._revoked_read is None or moment - self._revoked_read >= CACHE_SECONDS:
                with self._reading() as db:
                    rows = db.execute("SELECT issuer, token FROM revoked_tokens").fetchall()
                self._revoked, self._revoked_read = frozenset(rows), moment
            return (issuer, token_id) in self._revoked or ("", token_id) in self._revoked

    def close(self) -> None:
        self._notes.shutdown()
        super().close()


_COLUMNS = (
    "id, name, tenant, permissions, created_at, expires_at, revoked_at, requests_per_minute, tokens_per_minute,"
    " last_used_at"
)


def check_permissions(permissions: frozenset[str]) -> None:
    """Raises InvalidRequest, which lists those that there are, for one that there is not."""
    if unknown := permissions - PERMISSIONS:
        raise InvalidRequest(
            f"unknown permission {sorted(unknown)[0][:50]!r}; there are {', '.join(sorted(PERMISSIONS))}"
        )


def visible_part(text: str) -> str:
    """Of a key the part that is no secret, `nx_<env>_<id>`; empty for what is no key. Needs no look-up."""
    named = _parse(text)
    return "" if named is None else named.visible


def looks_like_key(text: str) -> bool:
    """Whether a key stands somewhere in a text."""
    return _KEY.search(text) is not None


def _parse(text: str) -> _Text | None:
    found = _KEY.fullmatch(text)
    if found is None or not hmac.compare_digest(found["checksum"], _checksum(found["body"])):
        return None
    return _Text(found["visible"], found["environment"] or "", found["id"], found["secret"])


def _key_of(row: Sequence[Any]) -> Key:
    id, name, tenant, permissions, *rest = row
    return Key(id, name, tenant, frozenset(permissions.split()), *rest)


def _refusal(reason: str) -> Unauthenticated:
    """The same words for whatever is wrong; the reason is for the record alone."""
    refusal = Unauthenticated("the API key is not valid; `nexus key create` makes one")
    refusal.__cause__ = ValueError(reason)
    return refusal


def _named(fingerprint: bytes) -> str:
    return f"development-{fingerprint.hex()[:12]}"


def _random(characters: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(characters))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode(errors='surrogatepass')):08x}"
