"""Seal and open a data block: nobody reads it without its tenant's key, and nothing of it changes unseen.

A sealed block is one run of bytes, the same on disk and on the way to another machine:

    prelude    MAGIC (8 bytes, the last one the format's version) | bytes of the header (4) | header, canonical JSON
    wrap       key id (8) | nonce (12) | the block's own key, sealed under its tenant's (48) | check (8)
    segments   AES-256-GCM of 1 MiB of plaintext each, the last of 0 to 1 MiB, each followed by its tag (16)
    trailer    bytes of plaintext (8) | digest (32) | Ed25519 signature of the machine that wrote it (64)

**Encrypt, then sign.** The digest is SHA-256 over the prelude, the length and the ciphertext, and the signature is over
the digest, with a prefix that no other signature of Nexus has. Whoever opens a block checks all of that first, over the
whole of it, and only then uses a key: of a block that was changed, no byte of plaintext comes out. A machine signs for
itself alone: with a shared MAC key each that verifies could also forge. The algorithms are those of the format's
version and nothing in a block can choose others.

**Segments** are STREAM (Hoang, Reyhanitabar, Rogaway, Vizár 2015): a nonce is a prefix of the block, the segment's
number, and whether it is the last, so none can be moved, left out or added; memory is bounded by one. The prelude is
associated data of each. They are checked again as they are read: a disk may go bad between two looks.

**Keys.** Each block has a key of its own, of fresh random bytes, so no two ever share a nonce, not even on a machine
that was cloned. It is sealed by AES-256-GCM under the tenant's key (at most 2^32 blocks under one: NIST SP 800-38D,
8.3), bound to the prelude and to the key's id. The wrap is not under the signature: another tenant's key can come in
its place (rotation) without the writer and without touching the data. It cannot bring another data key, for the signed
header holds a commitment to that. AES-GCM alone would not commit.

**Nothing is compressed**: the length of a block must not tell what is in it, where somebody else chose a part.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from nexus.access import NAME
from nexus.errors import BlockCorrupt, InvalidRequest

MAGIC = b"NXBLOCK\x01"
DOMAIN = b"nexus-block-v1\0"
WRAP_DOMAIN = b"nexus-wrap-v1\0"
SEGMENT_BYTES = 2**20
TAG_BYTES, KEY_BYTES, KEY_ID_BYTES, NONCE_BYTES, PREFIX_BYTES, CHECK_BYTES = 16, 32, 8, 12, 7, 8
WRAP_BYTES = KEY_ID_BYTES + NONCE_BYTES + KEY_BYTES + TAG_BYTES + CHECK_BYTES
TRAILER = struct.Struct(">Q32s64s")
HEADER_LENGTH = struct.Struct(">I")
MOST_HEADER_BYTES, MOST_METADATA_BYTES, MOST_NAME_CHARACTERS = 2**17, 2**16, 256
MOST_SEGMENTS = 2**32
LARGEST = 2**63 - 1

Sign = Callable[[bytes], bytes]
RandomBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class BlockId:
    """One version of a tenant's data. Versions count from 1, and the coordinator says which is the newest."""

    tenant: str
    data_id: str
    version: int

    def __post_init__(self) -> None:
        """Raises InvalidRequest."""
        if not NAME.fullmatch(self.tenant):
            raise InvalidRequest(
                "a tenant is 1 to 64 letters, digits, '_', '.' or '-', and begins with a letter or digit"
            )
        if not 0 < len(self.data_id) <= MOST_NAME_CHARACTERS or not self.data_id.isprintable():
            raise InvalidRequest(f"data_id has 1 to {MOST_NAME_CHARACTERS} printable characters", pointer="/data_id")
        if type(self.version) is not int or not 0 < self.version <= LARGEST:
            raise InvalidRequest(f"a version is a whole number from 1, not {self.version!r}")


@dataclass(frozen=True, slots=True)
class Header:
    """What a block says of itself, to everybody, under its writer's signature. `created_at` is in Unix seconds.

    `signer` is the fingerprint of the key that `writer` signed with; (`writer`, `epoch`, `sequence`) is no other
    block's. `nonce` (14 hexadecimal digits) begins each segment's, `commitment` (64) is to the block's own key.
    """

    tenant: str
    data_id: str
    version: int
    writer: str
    signer: str
    epoch: int
    sequence: int
    data_type: str
    created_at: float
    metadata: Mapping[str, Any]
    nonce: str
    commitment: str

    @property
    def block(self) -> BlockId:
        return BlockId(self.tenant, self.data_id, self.version)


FIELDS = {field.name: field.type for field in fields(Header)}


@dataclass(frozen=True, slots=True)
class Wrap:
    """A block's own key, sealed under the tenant's key with this id."""

    key_id: str
    nonce: bytes
    sealed: bytes

    def encode(self) -> bytes:
        body = bytes.fromhex(self.key_id) + self.nonce + self.sealed
        return body + _check_of(body)


@dataclass(frozen=True, slots=True)
class Envelope:
    """The parts of a sealed block but its segments, which are from `start` to `end` of its `size` bytes.

    It is what the block says: only `verify` tells whether that is true. `digest` is 64 hexadecimal digits.
    """

    header: Header
    prelude: bytes
    wrap: Wrap
    length: int
    digest: str
    signature: bytes
    start: int
    end: int
    size: int


# ── sealing ─────────────────────────────────────────────────────────────────────────────────────────


class BlockKey:
    """A block's own key, and what is derived from it."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.commitment = _derive(secret, b"nexus-block-v1 commitment").hex()
        self.cipher = AESGCM(_derive(secret, b"nexus-block-v1 segments"))

    def wrap(self, tenant_key: bytes, key_id: str, prelude: bytes, random: RandomBytes) -> Wrap:
        nonce = random(NONCE_BYTES)
        return Wrap(key_id, nonce, AESGCM(tenant_key).encrypt(nonce, self.secret, _bound_to(prelude, key_id)))


class Sealer:
    """Plaintext in, as it comes, and sealed bytes out; it holds one segment at a time."""

    def __init__(self, header: Header, key: BlockKey, wrap: Callable[[bytes], Wrap], sign: Sign) -> None:
        """`wrap` seals the block's key for its prelude, `sign` signs. Raises InvalidRequest for too large a header."""
        self.prelude = encode_prelude(header)
        self._key, self._sign = key, sign
        self._begin: bytes | None = self.prelude + wrap(self.prelude).encode()
        self._prefix = bytes.fromhex(header.nonce)
        self._buffer = memoryview(bytearray(SEGMENT_BYTES))
        self._held = self._number = self._length = 0  # bytes in the buffer, segments, and bytes sealed
        self._hash = sha256()
        self.digest = ""  # once it is finished

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Sealed bytes for what is certainly not the end of the block. Use all that it yields."""
        if self._begin is not None:
            yield self._begin
            self._begin = None
        view = memoryview(data)
        while self._held + len(view) > SEGMENT_BYTES:
            room = SEGMENT_BYTES - self._held
            if room == SEGMENT_BYTES:
                yield self._seal(view[:room], is_last=False)  # without a copy
            else:
                self._hold(view[:room])
                yield self._seal(self._take_held(), is_last=False)
            view = view[room:]
        self._hold(view)

    def finish(self) -> Iterator[bytes]:
        """The rest. The block is whole with it."""
        yield from self.feed(b"")
        yield self._seal(self._take_held(), is_last=True)
        digest = digest_of(self.prelude, self._length, self._hash.digest())
        self.digest = digest.hex()
        yield TRAILER.pack(self._length, digest, self._sign(signed_message(digest)))

    def _hold(self, data: memoryview) -> None:
        self._buffer[self._held : self._held + len(data)] = data
        self._held += len(data)

    def _take_held(self) -> memoryview:
        segment, self._held = self._buffer[: self._held], 0
        return segment

    def _seal(self, segment: memoryview, is_last: bool) -> bytes:
        nonce = _nonce(self._prefix, self._number, is_last)
        sealed = self._key.cipher.encrypt(nonce, segment, self.prelude)
        self._number += 1
        self._length += len(segment)
        self._hash.update(sealed)
        return sealed


def encode_prelude(header: Header) -> bytes:
    """Raises InvalidRequest for what is no JSON, or too much."""
    if not header.data_type or len(header.data_type) > MOST_NAME_CHARACTERS or not header.data_type.isprintable():
        raise InvalidRequest(f"data_type has 1 to {MOST_NAME_CHARACTERS} printable characters", pointer="/data_type")
    try:
        metadata = encode_json(dict(header.metadata))
        plain = json.loads(metadata)
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest(
            "metadata is a JSON object; this one cannot be written as one", pointer="/metadata"
        ) from None
    if plain != dict(header.metadata):
        raise InvalidRequest("metadata is a JSON object: its keys are strings", pointer="/metadata")
    if len(metadata) > MOST_METADATA_BYTES:
        raise InvalidRequest(
            f"metadata has {len(metadata)} bytes as JSON, and may have {MOST_METADATA_BYTES}", pointer="/metadata"
        )
    encoded = encode_json({**asdict(header), "metadata": plain})
    return MAGIC + HEADER_LENGTH.pack(len(encoded)) + encoded


def encode_json(value: Mapping[str, Any]) -> bytes:
    """The canonical form: keys sorted, no spaces, ASCII. Raises ValueError, TypeError or RecursionError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


# ── opening ─────────────────────────────────────────────────────────────────────────────────────────


def read_envelope(file: BinaryIO) -> Envelope:
    """Take a sealed block apart, from the start of a file to its end; nothing of it is believed yet.

    Raises BlockCorrupt for what has not the form of one.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(len(MAGIC) + HEADER_LENGTH.size)
    if len(start) < len(MAGIC) + HEADER_LENGTH.size or not start.startswith(MAGIC):
        raise BlockCorrupt("a block is damaged: it does not begin as one of this format does")
    (header_bytes,) = HEADER_LENGTH.unpack(start[len(MAGIC) :])
    if header_bytes > MOST_HEADER_BYTES:
        raise BlockCorrupt(f"a block is damaged: its header would have {header_bytes} bytes")
    encoded, wrap = file.read(header_bytes), file.read(WRAP_BYTES)
    first = file.tell()
    end = size - TRAILER.size
    if len(encoded) < header_bytes or len(wrap) < WRAP_BYTES or end < first + TAG_BYTES:
        raise BlockCorrupt("a block is damaged: a part of it is missing")
    file.seek(end)
    length, digest, signature = TRAILER.unpack(file.read(TRAILER.size))
    segments = segments_of(length)
    if segments > MOST_SEGMENTS or end - first != length + segments * TAG_BYTES:
        raise BlockCorrupt("a block is damaged: it has not as many bytes as its end says")
    return Envelope(
        _decode_header(encoded), start + encoded, _decode_wrap(wrap), length, digest.hex(), signature, first, end, size
    )


def verify(file: BinaryIO, envelope: Envelope, key_of: Callable[[Header], Ed25519PublicKey]) -> None:
    """Return if all of the block is as it was when its writer signed it. Reads it once, from end to end.

    `key_of` gives the writer's key or raises WriterUnknown; it is asked only about a block that is not damaged by
    accident. Raises BlockCorrupt.
    """
    found = sha256()
    for piece in read_pieces(file, envelope.start, envelope.end):
        found.update(piece)
    digest = digest_of(envelope.prelude, envelope.length, found.digest())
    if digest.hex() != envelope.digest:
        raise BlockCorrupt(f"{_called(envelope)} is damaged")
    try:
        key_of(envelope.header).verify(envelope.signature, signed_message(digest))
    except InvalidSignature:
        raise BlockCorrupt(
            f"{_called(envelope)} is not signed by {envelope.header.writer}, who it says wrote it"
        ) from None


def unwrap(envelope: Envelope, tenant_key: bytes) -> BlockKey:
    """The block's own key. Raises BlockCorrupt where it is not the one that the writer used."""
    bound = _bound_to(envelope.prelude, envelope.wrap.key_id)
    try:
        key = BlockKey(AESGCM(tenant_key).decrypt(envelope.wrap.nonce, envelope.wrap.sealed, bound))
    except InvalidTag:
        raise BlockCorrupt(f"{_called(envelope)} is damaged: key {envelope.wrap.key_id} does not open it") from None
    if key.commitment != envelope.header.commitment:
        raise BlockCorrupt(f"{_called(envelope)} comes with another key than it was sealed with")
    return key


def read_segments(file: BinaryIO, envelope: Envelope, key: BlockKey) -> Iterator[bytes]:
    """The plaintext of a verified block, in pieces of at most SEGMENT_BYTES. Raises BlockCorrupt before a bad one."""
    last = segments_of(envelope.length) - 1
    prefix = bytes.fromhex(envelope.header.nonce)
    pieces = read_pieces(file, envelope.start, envelope.end, SEGMENT_BYTES + TAG_BYTES)
    for number, sealed in enumerate(pieces):
        try:
            yield key.cipher.decrypt(_nonce(prefix, number, number == last), sealed, envelope.prelude)
        except InvalidTag:
            raise BlockCorrupt(f"{_called(envelope)} is damaged in its segment {number}") from None


def read_pieces(file: BinaryIO, start: int, end: int, piece_bytes: int = SEGMENT_BYTES) -> Iterator[bytes]:
    """The bytes from `start` to `end`. Raises BlockCorrupt where the file ends before."""
    file.seek(start)
    while start < end:
        piece = file.read(min(piece_bytes, end - start))
        if not piece:
            raise BlockCorrupt("a block became shorter while it was read")
        start += len(piece)
        yield piece


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────


def segments_of(length: int) -> int:
    """How many segments so many bytes of plaintext have; an empty block has one."""
    return max(-(-length // SEGMENT_BYTES), 1)


def digest_of(prelude: bytes, length: int, ciphertext_hash: bytes) -> bytes:
    return sha256(DOMAIN + sha256(prelude).digest() + length.to_bytes(8, "big") + ciphertext_hash).digest()


def signed_message(digest: bytes) -> bytes:
    return DOMAIN + digest


def _decode_header(encoded: bytes) -> Header:
    try:
        values = json.loads(encoded)
        is_canonical = isinstance(values, dict) and encode_json(values) == encoded
    except (ValueError, RecursionError):
        is_canonical = False
    if not is_canonical or values.keys() != FIELDS.keys() or not _is_well_typed(values):
        raise BlockCorrupt("a block is damaged: its header cannot be read")
    return Header(**values)


def _is_well_typed(values: Mapping[str, Any]) -> bool:
    kinds = {"tenant": str, "data_id": str, "writer": str, "signer": str, "data_type": str, "metadata": dict}
    try:
        BlockId(values["tenant"], values["data_id"], values["version"])
        return (
            all(isinstance(values[name], kind) for name, kind in kinds.items())
            and all(type(values[name]) is int and 0 <= values[name] <= LARGEST for name in ("epoch", "sequence"))
            and type(values["created_at"]) in (int, float)
            and len(bytes.fromhex(values["nonce"])) == PREFIX_BYTES
            and len(bytes.fromhex(values["commitment"])) == KEY_BYTES
        )
    except (InvalidRequest, TypeError, ValueError, AttributeError):
        return False


def _decode_wrap(encoded: bytes) -> Wrap:
    body, check = encoded[:-CHECK_BYTES], encoded[-CHECK_BYTES:]
    if check != _check_of(body):
        raise BlockCorrupt("a block is damaged: its key cannot be read")
    key_id, nonce = body[:KEY_ID_BYTES], body[KEY_ID_BYTES : KEY_ID_BYTES + NONCE_BYTES]
    return Wrap(key_id.hex(), nonce, body[KEY_ID_BYTES + NONCE_BYTES :])


def _check_of(body: bytes) -> bytes:
    """Tells damage by accident from a key that is not here; against anybody's will the wrap's own tag holds."""
    return sha256(WRAP_DOMAIN + body).digest()[:CHECK_BYTES]


def _bound_to(prelude: bytes, key_id: str) -> bytes:
    return WRAP_DOMAIN + bytes.fromhex(key_id) + sha256(prelude).digest()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDFExpand(hashes.SHA256(), KEY_BYTES, purpose).derive(secret)


def _nonce(prefix: bytes, number: int, is_last: bool) -> bytes:
    return prefix + number.to_bytes(4, "big") + bytes([is_last])


def _called(envelope: Envelope) -> str:
    return f"version {envelope.header.version} of block {envelope.header.data_id!r}"
