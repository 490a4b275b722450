"""Fifty secrets that stand nowhere else: planted where secrets are, and looked for where none may be.

A credential may be nowhere but where it was put. A text (what is uploaded, asked, or told) may be answered to whoever
sent it, and may be in no log, metric, audit record, command line or report of a fault.
"""

import base64
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from cluster import bootstrap
from nexus import resident
from tests.running import Running

CREDENTIALS = (
    "an unknown key", "a key with a wrong secret", "a key with a wrong checksum", "an X-API-Key",
    "a bare word as a key",
    "a JWT", "a JWT of no algorithm", "a JWT within a JWT", "a JWT cut short", "a JWT with a key that is a path",
    "a key in the query string", "a token in the query string", "basic authentication", "a cookie",
    "a proxy's credential",
    "OPENAI_API_KEY", "the key of a served model", "VALID_API_KEYS one", "VALID_API_KEYS two", "VALID_API_KEYS three",
    "a password of Milvus", "a password of ArangoDB", "a password of another store", "a Fernet key",
    "an older Fernet key", "a Fernet key as a bearer token", "a JWT secret", "an admin's key that was revoked",
)  # fmt: skip
TEXTS = (
    "an upload by form", "an upload by JSON", "an upload that cannot be read",
    "an upload of an office file that is none",
    "an upload of broken JSON", "a PDF that is none", "metadata of an upload", "metadata that is no JSON",
    "an upload by job", "a job's bytes that are not those announced", "a question", "a search", "a search that fails",
    "a chat", "a chat that is streamed", "a chat of a model that fails", "a completion", "a rerank", "an embedding",
    "a session's context", "a session's question", "a filter", "a filter that is refused",
)  # fmt: skip


@cache
def planted(seed: str = "nexus") -> Mapping[str, str]:
    """Every secret by what it is planted as. The same ones for the same seed."""
    return {what: _write(what, hashlib.sha256(f"{seed} {what}".encode()).digest()) for what in (*CREDENTIALS, *TEXTS)}


def _write(what: str, random: bytes) -> str:
    """In the form that such a secret has, so that whatever knows the form meets it."""
    word = random.hex()[:40]
    if "Fernet" in what:
        return base64.urlsafe_b64encode(random).decode()
    if "JWT" in what and "secret" not in what:
        head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode().rstrip("=")
        return f"{head}.{base64.urlsafe_b64encode(word.encode()).decode().rstrip('=')}.{word}"
    if "key" in what and "query" not in what and "word" not in what and "API" not in what and "served" not in what:
        body = f"nx_{word[:12]}_{(word * 2)[:43]}"
        return f"{body}_{zlib.crc32(body.encode()):08x}"
    return f"canary{word}"


def find(text: str | bytes, among: Iterable[str] = (*CREDENTIALS, *TEXTS), seed: str = "nexus") -> list[str]:
    """What of the planted stands in this text: whole, or its longest part that no other text would hold."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    secrets = planted(seed)
    return [what for what in among if _telling(secrets[what]) in text]


def _telling(secret: str) -> str:
    """Of a token of several parts the last, which alone would tell; the middle of a key, its secret."""
    if secret.startswith("nx_"):
        return secret.split("_")[-2]
    return secret.rpartition(".")[2]


def scan(nexus: Running) -> list[str]:
    """Where a running Nexus shows what is planted: the files of its home and of Ray, and its command lines.

    The texts may stand in its stores, and a credential in the settings that it was given; nothing else is left out.
    """
    found = [f"{what} in the command line of {name}" for name, line in _command_lines(nexus) for what in find(line)]
    for folder in (nexus.home, Path(nexus.instance.ray_folder)):
        for file in folder.rglob("*"):
            if file.is_symlink() or not file.is_file() or file.name == "nexus.yaml":
                continue
            among = CREDENTIALS if _is_a_store(file.relative_to(folder)) else (*CREDENTIALS, *TEXTS)
            found += [f"{what} in {file}" for what in _find_in_file(file, among)]
    return found


STORES = ("documents.db", "jobs.db", "vectors")


def _is_a_store(file: Path) -> bool:
    return file.parts[0].startswith(STORES) or file.is_relative_to(resident.FOLDER)


def _find_in_file(file: Path, among: Iterable[str]) -> list[str]:
    """In pieces that overlap, since a log may be large; a file that went meanwhile holds nothing."""
    found: set[str] = set()
    with suppress(OSError), file.open("rb") as opened:
        before = b""
        while piece := opened.read(PIECE):
            found.update(find(before + piece, among))
            before = piece[-LONGEST:]
    return sorted(found)


PIECE, LONGEST = 1 << 22, 200


def _command_lines(nexus: Running) -> Iterator[tuple[str, str]]:
    for process in bootstrap.processes_of(nexus.instance):
        with suppress(psutil.Error):
            yield process.name(), " ".join(process.cmdline())
