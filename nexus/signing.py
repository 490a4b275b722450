"""The secret that Nexus signs its own tokens with: made at first use, kept for its owner alone, or given and strong."""

import os
import re
import secrets
from pathlib import Path

from nexus.errors import ConfigError, Unavailable
from nexus.private_files import require_private

FILE = "token-secret"
LEAST_BYTES = 32  # as many as HS256 has of output (RFC 7518, 3.2)
LEAST_LEFT = 24  # characters of a secret, once the words that everybody tries are taken out of it
LEAST_DISTINCT = 10

Stamp = tuple[int, int, int]

# Of the lists of default secrets that crackers of tokens begin with (CVE-2025-45768 is about such).
_WORDS = re.compile(
    "secret|passw(?:or)?d|password|changeme|change|default|example|insecure|development|production|testing|test|nexus"
    "|admin|token|private|public|shared|super|hunter2|letmein|welcome|qwerty|asdf|your|256|512|bit|jwt|key|this|please"
    "|0123456789|123456789|1234567890|abcdefghijklmnopqrstuvwxyz|abcdef|deadbeef|cafebabe",
    re.IGNORECASE,
)


def fault_of_secret(secret: str) -> str | None:
    """Why somebody could guess a secret; None where nothing says so."""
    if len(secret.encode()) < LEAST_BYTES:
        return f"a secret to sign with has at least {LEAST_BYTES} bytes"
    left = _WORDS.sub("", secret)
    is_of_words = not (re.search("[A-Za-z]", left) and re.search("[0-9]", left))
    if len(left) < LEAST_LEFT or len(set(left)) < LEAST_DISTINCT or is_of_words:
        return "a secret to sign with is random, not made of words, of one kind of character, or of what is in examples"
    return None


class SecretFile:
    """The secret in a file of the home. Another in its place counts at once: what the old one signed is void."""

    def __init__(self, home: Path) -> None:
        """Makes it where there is none. Raises ConfigError for one that others may read, or that is too short."""
        self._file = home / FILE
        self._seen: Stamp | None = None
        self._secret = b""
        if not self._file.exists():
            _write_new(self._file)
        require_private(self._file)
        if fault := fault_of_secret(self._file.read_bytes().strip().decode(errors="replace")):
            raise ConfigError(f"{FILE} in the home: {fault}; remove it for a new one")

    def read(self) -> bytes:
        """What signs now. Raises Unavailable where it is gone."""
        try:
            seen = stamp_of(self._file)
            if seen != self._seen:
                self._secret, self._seen = self._file.read_bytes().strip(), seen
        except OSError:
            raise Unavailable("tokens cannot be checked now: what they are signed with is not there") from None
        if len(self._secret) < LEAST_BYTES:
            raise Unavailable("tokens cannot be checked now: what they are signed with is too short")
        return self._secret


def stamp_of(file: Path) -> Stamp:
    """When a file was written, which one it is, and its bytes: another content has another one. Raises OSError."""
    found = file.stat()
    return found.st_mtime_ns, found.st_ino, found.st_size


def _write_new(file: Path) -> None:
    """All of it at once, so that of two who begin together both read the same."""
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as writer:
        writer.write(secrets.token_urlsafe(48) + "\n")
    try:
        os.link(draft, file)
    except FileExistsError:
        pass  # the other one was first
    finally:
        draft.unlink()
