"""What the tests of shared blocks have in common: machines with keys that know each other, and blocks made by hand."""

import io
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nexus import envelope
from nexus.blocks import BlockStore, Stored
from nexus.envelope import BlockId, BlockKey, Envelope, Header, Sealer, read_envelope, read_segments, unwrap, verify
from nexus.keyring import Keyring

TENANT = "acme"
SECRET = "k3Qz8vXw1LtR7yBn5MpD2sGf9HjC4aEu6WiOxKqZrTvY"
TEXT = b"the gripper holds 40 newtons"


def machine(home: Path, node: str = "sark", tenant: str = TENANT) -> Keyring:
    """A machine's keys, and a key for a tenant."""
    home.mkdir(exist_ok=True)
    keyring = Keyring(home, node, SECRET)
    if tenant and keyring.ring(tenant) is None:
        keyring.install(keyring.draft_key(tenant))
    return keyring


def acquaint(*keyrings: Keyring) -> None:
    """Each learns all that the first knows of keys, and every one's own."""
    for keyring in keyrings:
        for other in keyrings:
            other.meet(keyring.introduction())
        for tenant in keyrings[0].tenants():
            keyring.install(keyrings[0].export(tenant))


def rotate(*keyrings: Keyring, tenant: str = TENANT) -> tuple[str, str]:
    """Another active key for all; (the id of the one before, its own)."""
    before = keyrings[0].ring(tenant).active.key_id
    draft = keyrings[0].draft_key(tenant)
    for keyring in keyrings:
        keyring.install(draft)
    return before, keyrings[0].ring(tenant).active.key_id


def retire(key_id: str, *keyrings: Keyring, tenant: str = TENANT) -> None:
    draft = keyrings[0].draft_retirement(tenant, key_id)
    for keyring in keyrings:
        keyring.install(draft)


def share(store: BlockStore, data: bytes = TEXT, data_id: str = "arm", version: int = 1, **fields: Any) -> Stored:
    with store.write(BlockId(TENANT, data_id, version), **fields) as draft:
        draft.feed(data)
        return draft.commit()


def read(store: BlockStore, data_id: str = "arm", version: int = 1, digest: str | None = None) -> bytes:
    with store.open(BlockId(TENANT, data_id, version), digest) as reading:
        return b"".join(reading)


def sealed(store: BlockStore, data_id: str = "arm", version: int = 1) -> bytes:
    with store.send(BlockId(TENANT, data_id, version)) as sending:
        return b"".join(sending)


def take(store: BlockStore, data: bytes, data_id: str = "arm", version: int = 1, digest: str | None = None) -> Stored:
    with store.receive(BlockId(TENANT, data_id, version), digest) as draft:
        draft.feed(data)
        return draft.commit()


def file_of(store: BlockStore, data_id: str = "arm", version: int = 1) -> Path:
    (found,) = store._files.rglob(store.name_of(BlockId(TENANT, data_id, version)))
    return found


# ── by hand, in memory ──────────────────────────────────────────────────────────────────────────────


def header_of(keyring: Keyring, key: BlockKey, **fields: Any) -> Header:
    plain = Header(
        TENANT, "arm", 1, keyring.node, keyring.fingerprint, 1, 1, "data", 1_800_000_000.5, {"robot_id": "r1"},
        "00112233445566", key.commitment,
    )  # fmt: skip
    return replace(plain, **fields)


def seal(
    keyring: Keyring, data: bytes = TEXT, key: BlockKey | None = None, sign: Callable[[bytes], bytes] | None = None,
    **fields: Any,
) -> bytes:  # fmt: skip
    """A block as this machine seals it, but for what is said otherwise."""
    key = key or BlockKey(bytes(range(32)))
    key_id, secret = keyring.active_key(TENANT)
    sealer = Sealer(
        header_of(keyring, key, **fields), key, lambda prelude: key.wrap(secret, key_id, prelude, lambda n: b"\7" * n),
        sign or keyring.sign,
    )  # fmt: skip
    return b"".join([*sealer.feed(data), *sealer.finish()])


def resign(
    block: bytes, keyring: Keyring, segments: bytes | None = None, values: Mapping[str, Any] | None = None,
    length: int | None = None, encoded: bytes | None = None,
) -> bytes:  # fmt: skip
    """What a machine that means ill makes of a block of its own: changed, and with a digest and signature that fit."""
    parts = read_envelope(io.BytesIO(block))
    prelude = parts.prelude
    if values is not None:
        encoded = envelope.encode_json(values)
    if encoded is not None:
        prelude = envelope.MAGIC + envelope.HEADER_LENGTH.pack(len(encoded)) + encoded
    ciphertext = block[parts.start : parts.end] if segments is None else segments
    length = parts.length if length is None else length
    digest = envelope.digest_of(prelude, length, sha256(ciphertext).digest())
    signature = keyring.sign(envelope.signed_message(digest))
    return prelude + parts.wrap.encode() + ciphertext + envelope.TRAILER.pack(length, digest, signature)


def open_in_memory(block: bytes, keyring: Keyring) -> tuple[Envelope, Iterable[bytes]]:
    """All that opening does but for what is compared with the coordinator's word and the register."""
    file = io.BytesIO(block)
    parts = read_envelope(file)
    verify(file, parts, lambda header: keyring.verify_key(header.writer, header.signer))
    key = unwrap(parts, keyring.opening_key(parts.header.tenant, parts.wrap.key_id))
    return parts, read_segments(file, parts, key)


def noted_on_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In which order files and folders are synced, and files renamed, from now on."""
    seen: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def put(path: Path, to: Path) -> Path:
        seen.append("rename")
        return real_replace(path, to)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", put)
    return seen
