"""Who asks, and may they: API keys, kept hashed, shown once.

A key reads `nx_<id>_<secret>_<crc>`: the id finds its row, the secret is 256 random bits, the CRC
lets a mistyped key be refused without a look-up. Only SHA-256 of the secret is stored; a slow hash
guards guessable passwords and would cost each request tens of milliseconds here for nothing.
"""

import hashlib
import hmac
import re
import secrets
import sqlite3
import string
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus.errors import InvalidRequest, NotFound, Unauthenticated
from nexus.types import Principal

PERMISSIONS = frozenset(
    {
        "documents:read", "documents:write", "sessions:read", "sessions:write", "infer", "policies:read",
        "policies:write", "share:read", "share:write", "admin",
    }
)  # fmt: skip
ALPHABET = string.ascii_letters + string.digits
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
SECRET_CHARACTERS = 43  # 256 bits in base 62
CACHE_SECONDS = 5.0  # a revoked key is refused everywhere after this long at most

SCHEMA = """CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, hash BLOB NOT NULL, name TEXT NOT NULL, tenant TEXT NOT NULL,
    permissions TEXT NOT NULL, created_at REAL NOT NULL, expires_at REAL, revoked_at REAL
) STRICT"""


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key; never its secret. Times are Unix seconds."""

    id: str
    name: str
    tenant: str
    permissions: frozenset[str]
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class KeyRing:
    """The keys of one installation, in `access.db` under its home. Safe to call from several threads."""

    def __init__(self, home: Path, development_keys: Sequence[str] = ()) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(home / "access.db", timeout=10, isolation_level=None, check_same_thread=False)
        (home / "access.db").chmod(0o600)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(SCHEMA)
        self._seen: dict[bytes, tuple[float, Principal]] = {}
        self._development = frozenset(_hash(key) for key in development_keys)

    def create(
        self, name: str, tenant: str = "default", permissions: frozenset[str] = PERMISSIONS,
        lifetime_seconds: float | None = None,
    ) -> tuple[str, Key]:  # fmt: skip
        """Make a key; its text is returned here and never again."""
        for label, value in (("a key's name", name), ("a tenant", tenant)):
            if not NAME.fullmatch(value):
                raise InvalidRequest(
                    f"{label} is 1 to 64 letters, digits, '_', '.' or '-', and begins with neither of the last three"
                )
        if unknown := permissions - PERMISSIONS:
            raise InvalidRequest(
                f"unknown permission {sorted(unknown)[0]!r}; there are {', '.join(sorted(PERMISSIONS))}"
            )
        now = time.time()
        expires = None if lifetime_seconds is None else now + lifetime_seconds
        key = Key(_random(12), name, tenant, permissions, now, expires, None)
        secret = _random(SECRET_CHARACTERS)
        with self._lock:
            self._db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (key.id, _hash(secret), name, tenant, " ".join(sorted(permissions)), now, expires),
            )
        body = f"nx_{key.id}_{secret}"
        return f"{body}_{_checksum(body)}", key

    def verify(self, text: str) -> Principal:
        """The principal behind a key. Raises Unauthenticated, always with the same words."""
        fingerprint = _hash(text)
        now = time.time()
        seen = self._seen.get(fingerprint)
        if seen is not None and now - seen[0] < CACHE_SECONDS:
            return seen[1]
        self._seen.pop(fingerprint, None)
        if fingerprint in self._development:
            return Principal("default", "development", PERMISSIONS)
        principal = self._look_up(text, now)
        if len(self._seen) > 10_000:
            self._seen.clear()
        self._seen[fingerprint] = (now, principal)
        return principal

    def _look_up(self, text: str, now: float) -> Principal:
        refusal = Unauthenticated("the API key is not valid; `nexus key create` makes one")
        body, _, checksum = text.rpartition("_")
        parts = body.split("_")
        if len(parts) != 3 or parts[0] != "nx" or not hmac.compare_digest(checksum.encode(), _checksum(body).encode()):
            raise refusal
        with self._lock:
            row = self._db.execute(
                "SELECT hash, name, tenant, permissions FROM keys"
                " WHERE id = ? AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > ?)",
                (parts[1], now),
            ).fetchone()
        if not hmac.compare_digest(row[0] if row else bytes(32), _hash(parts[2])):
            raise refusal
        return Principal(row[2], row[1], frozenset(row[3].split()))

    def list(self) -> list[Key]:
        with self._lock:
            rows = self._db.execute(
                "SELECT id, name, tenant, permissions, created_at, expires_at, revoked_at FROM keys ORDER BY created_at"
            ).fetchall()
        return [Key(r[0], r[1], r[2], frozenset(r[3].split()), *r[4:]) for r in rows]

    def revoke(self, key_id: str) -> None:
        """End a key. Raises NotFound if there is none with this id that still lives."""
        with self._lock:
            done = self._db.execute(
                "UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (time.time(), key_id)
            ).rowcount
        if not done:
            raise NotFound(f"no living key has the id {key_id!r}; `nexus key list` shows them")

    def close(self) -> None:
        self._db.close()


def _random(characters: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(characters))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode(errors='surrogatepass')):08x}"
