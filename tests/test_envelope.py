"""The sealed block: what was put in comes out, and nothing else ever does. Rows K1 to K9 of the cryptography.

Every change of a block is tried where it is cheap, in memory; the store over it is test_blocks.py.
"""

import hmac
import io
import json
import zlib
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus import envelope
from nexus.envelope import BlockId, BlockKey, Sealer, Wrap, read_envelope, read_segments, segments_of, unwrap, verify
from nexus.errors import BlockCorrupt, BlockRefused, InvalidRequest, KeyUnknown, WriterUnknown
from nexus.keyring import Keyring
from tests.sealing import TENANT, TEXT, acquaint, header_of, machine, open_in_memory, resign, seal

ORDER = 2**252 + 27742317777372353535851937790883648493  # of Ed25519's group


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return machine(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def block(keyring: Keyring) -> bytes:
    return seal(keyring)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Segments so short that a few bytes have many of them."""
    monkeypatch.setattr(envelope, "SEGMENT_BYTES", 16)
    return 16


def opened(block: bytes, keyring: Keyring) -> bytes:
    return b"".join(open_in_memory(block, keyring)[1])


def refusal(block: bytes, keyring: Keyring) -> type[BlockRefused] | None:
    """How it is refused before the first byte of plaintext could be had; None where it is not."""
    try:
        open_in_memory(block, keyring)
    except BlockRefused as refused:
        return type(refused)
    return None


def is_read(block: bytes) -> bool:
    """Whether it can be taken apart: what is asked before anything is verified, and so of no wrap or signature."""
    try:
        read_envelope(io.BytesIO(block))
    except BlockCorrupt:
        return False
    return True


# ── what goes in comes out ──────────────────────────────────────────────────────────────────────────


def test_a_block_says_what_it_is_and_gives_back_what_was_sealed(keyring: Keyring, block: bytes) -> None:
    parts, plain = open_in_memory(block, keyring)
    assert b"".join(plain) == TEXT
    assert parts.header == header_of(keyring, BlockKey(bytes(range(32))))
    assert (parts.length, parts.size) == (len(TEXT), len(block))
    assert TEXT not in block


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 50), max_size=8))
def test_any_pieces_of_any_length_come_out_in_one(keyring: Keyring, lengths: list[int]) -> None:
    data = bytes(number % 251 for number in range(sum(lengths)))
    key = BlockKey(bytes(32))
    key_id, secret = keyring.active_key(TENANT)
    kept, envelope.SEGMENT_BYTES = envelope.SEGMENT_BYTES, 16
    try:
        sealer = Sealer(
            header_of(keyring, key), key, lambda prelude: key.wrap(secret, key_id, prelude, bytes), keyring.sign
        )
        out, at = [], 0
        for length in lengths:
            out += sealer.feed(data[at : at + length])
            at += length
        out += sealer.finish()
        parts, plain = open_in_memory(b"".join(out), keyring)
        pieces = list(plain)
    finally:
        envelope.SEGMENT_BYTES = kept
    assert b"".join(pieces) == data
    assert len(pieces) == segments_of_16(len(data))
    assert all(len(piece) <= 16 for piece in pieces)
    assert (parts.length, parts.digest) == (len(data), sealer.digest)


def segments_of_16(length: int) -> int:
    return max((length + 15) // 16, 1)


@pytest.mark.parametrize(("length", "segments"), [(0, 1), (1, 1), (2**20, 1), (2**20 + 1, 2), (2**21, 2)])
def test_full_segments_at_their_edges(keyring: Keyring, length: int, segments: int) -> None:
    assert segments_of(length) == segments
    assert opened(seal(keyring, b"\x5a" * length), keyring) == b"\x5a" * length


def test_a_sealer_holds_one_segment_at_most(keyring: Keyring, small: int) -> None:
    key = BlockKey(bytes(32))
    sealer = Sealer(header_of(keyring, key), key, lambda prelude: Wrap("00" * 8, b"", b""), keyring.sign)
    for _ in range(50):
        list(sealer.feed(b"x" * 7))
        assert sealer._held <= len(sealer._buffer) == small


def test_the_sealed_form_is_fixed(keyring: Keyring, block: bytes) -> None:
    """Another version reads what this one wrote: the form changes only together with MAGIC."""
    encoded = json.dumps(
        asdict(read_envelope(io.BytesIO(block)).header), sort_keys=True, separators=(",", ":")
    ).encode()
    start = b"NXBLOCK\x01" + len(encoded).to_bytes(4, "big") + encoded
    assert block.startswith(start)
    body = block[len(start) + 76 : -104]
    assert len(body) == len(TEXT) + 16
    digest = sha256(
        b"nexus-block-v1\0" + sha256(start).digest() + len(TEXT).to_bytes(8, "big") + sha256(body).digest()
    ).digest()
    assert block[-104:-64] == len(TEXT).to_bytes(8, "big") + digest
    public = keyring.verify_key(keyring.node, keyring.fingerprint)
    public.verify(block[-64:], b"nexus-block-v1\0" + digest)
    wrap = block[len(start) : len(start) + 76]
    key_id, secret = keyring.active_key(TENANT)
    bound = b"nexus-wrap-v1\0" + bytes.fromhex(key_id) + sha256(start).digest()
    assert wrap[:8].hex() == key_id
    assert AESGCM(secret).decrypt(wrap[8:20], wrap[20:68], bound) == bytes(range(32))
    nonce = bytes.fromhex("00112233445566") + bytes(4) + b"\1"
    assert BlockKey(bytes(range(32))).cipher.decrypt(nonce, body, start) == TEXT


# ── K1: changed ─────────────────────────────────────────────────────────────────────────────────────


def test_k1_every_flipped_bit_is_refused_as_damage(keyring: Keyring, block: bytes) -> None:
    for at in range(len(block)):
        for bit in range(8):
            changed = bytearray(block)
            changed[at] ^= 1 << bit
            assert refusal(bytes(changed), keyring) is BlockCorrupt, f"bit {bit} of byte {at}"


def test_k1_truncated_at_every_byte(keyring: Keyring, block: bytes) -> None:
    assert {refusal(block[:length], keyring) for length in range(len(block))} == {BlockCorrupt}


def test_k1_appended_or_inserted_bytes(keyring: Keyring, block: bytes) -> None:
    for extra in (b"\0", b"x" * 104, block[-104:], block):
        assert refusal(block + extra, keyring) is BlockCorrupt
        assert refusal(extra + block, keyring) is BlockCorrupt
    for at in range(0, len(block), 7):
        assert refusal(block[:at] + b"\0" + block[at:], keyring) is BlockCorrupt


def test_k1_a_bit_that_flips_after_the_block_was_verified_is_seen_before_its_segment_is_out(
    keyring: Keyring, small: int
) -> None:
    data = bytes(range(100))
    file = io.BytesIO(seal(keyring, data))
    parts = read_envelope(file)
    verify(file, parts, lambda header: keyring.verify_key(header.writer, header.signer))
    pieces = read_segments(file, parts, unwrap(parts, keyring.active_key(TENANT)[1]))
    assert next(pieces) == data[:16]
    file.getbuffer()[parts.start + 2 * 32 + 3] ^= 1
    out = []
    with pytest.raises(BlockCorrupt, match="segment 2"):
        for piece in pieces:
            out.append(piece)
    assert out == [data[16:32]]


def test_k1_a_file_that_shrinks_while_it_is_read(keyring: Keyring, small: int) -> None:
    file = io.BytesIO(seal(keyring, bytes(100)))
    parts = read_envelope(file)
    pieces = read_segments(file, parts, unwrap(parts, keyring.active_key(TENANT)[1]))
    next(pieces)
    file.truncate(parts.start + 64)
    with pytest.raises(BlockCorrupt):
        list(pieces)


@pytest.mark.parametrize(
    "order", [[1, 0, 2, 3], [0, 0, 2, 3], [0, 2, 3], [0, 1, 2], [0, 1, 2, 3, 3], [3, 1, 2, 0], [3]], ids=str
)
def test_segments_moved_repeated_or_left_out_are_refused_even_if_their_writer_signs_that(
    keyring: Keyring, small: int, order: list[int]
) -> None:
    """STREAM: the nonce says which segment it is, and whether it is the last."""
    data = bytes(range(4 * 16))
    whole = seal(keyring, data)
    parts = read_envelope(io.BytesIO(whole))
    body = whole[parts.start : parts.end]
    segments = [body[at : at + 32] for at in range(0, len(body), 32)]
    signed = resign(whole, keyring, b"".join(segments[one] for one in order), length=16 * len(order))
    pieces = open_in_memory(signed, keyring)[1]
    out = []
    with pytest.raises(BlockCorrupt):
        for piece in pieces:
            out.append(piece)
    assert b"".join(out) == data[: 16 * len(out)], "something out of order came out"


def test_a_header_that_its_writer_signs_anew_does_not_fit_its_segments(keyring: Keyring, block: bytes) -> None:
    """It is associated data of each, and what the wrapped key is bound to."""
    values = asdict(read_envelope(io.BytesIO(block)).header) | {"data_type": "other"}
    changed = resign(block, keyring, values=values)
    with pytest.raises(BlockCorrupt, match="key"):
        open_in_memory(changed, keyring)
    parts = read_envelope(io.BytesIO(changed))
    with pytest.raises(BlockCorrupt, match="segment 0"):
        list(read_segments(io.BytesIO(changed), parts, BlockKey(bytes(range(32)))))


# ── K4: signature and algorithm ─────────────────────────────────────────────────────────────────────


def with_signature(block: bytes, signature: bytes) -> bytes:
    return block[:-64] + signature


def test_k4_a_stripped_signature(keyring: Keyring, block: bytes) -> None:
    assert refusal(with_signature(block, bytes(64)), keyring) is BlockCorrupt
    assert refusal(with_signature(block, b""), keyring) is BlockCorrupt


def test_k4_a_signature_whose_s_is_not_canonical(keyring: Keyring, block: bytes) -> None:
    point, scalar = block[-64:-32], int.from_bytes(block[-32:], "little")
    more = [scalar + times * ORDER for times in range(1, 16) if scalar + times * ORDER < 2**256]
    assert len(more) > 10
    for one in more:
        assert refusal(with_signature(block, point + one.to_bytes(32, "little")), keyring) is BlockCorrupt


def test_k4_a_signature_by_the_same_machine_over_something_else(keyring: Keyring, block: bytes) -> None:
    digest = block[-96:-64]
    for message in (digest, b"nexus-block-v2\0" + digest, b"nexus-block-v1" + digest, digest.hex().encode()):
        assert refusal(with_signature(block, keyring.sign(message)), keyring) is BlockCorrupt


def test_k4_another_machines_signature(keyring: Keyring, block: bytes, tmp_path: Path) -> None:
    clu = machine(tmp_path, "clu", tenant="")
    acquaint(keyring, clu)
    assert refusal(seal(keyring, sign=clu.sign), keyring) is BlockCorrupt
    assert refusal(seal(keyring, sign=clu.sign, writer="clu"), keyring) is WriterUnknown  # that is not clu's key
    assert refusal(seal(keyring, sign=clu.sign, writer="clu", signer=clu.fingerprint), keyring) is None


def test_k4_a_stranger_names_itself(keyring: Keyring, tmp_path: Path) -> None:
    stranger = Ed25519PrivateKey.generate()
    for fields in ({"writer": "stranger"}, {"signer": "0" * 32}, {"writer": "stranger", "signer": "ab" * 16}):
        assert refusal(seal(keyring, sign=stranger.sign, **fields), keyring) is WriterUnknown


@pytest.mark.parametrize("alg", ["HMAC", "none", "Ed25519", ""])
def test_k4_a_block_chooses_no_algorithm(keyring: Keyring, block: bytes, alg: str) -> None:
    values = asdict(read_envelope(io.BytesIO(block)).header)
    assert not is_read(resign(block, keyring, values=values | {"alg": alg}))


def test_k4_a_mac_in_the_signatures_place(keyring: Keyring, block: bytes) -> None:
    public = keyring.verify_key(keyring.node, keyring.fingerprint).public_bytes_raw()
    for key in (public, keyring.active_key(TENANT)[1]):
        mac = hmac.digest(key, envelope.signed_message(block[-96:-64]), "sha512")
        assert refusal(with_signature(block, mac), keyring) is BlockCorrupt


@pytest.mark.parametrize("start", [b"NXBLOCK\x00", b"NXBLOCK\x02", b"nxblock\x01", b"\0" * 8])
def test_k4_another_version_of_the_format(keyring: Keyring, block: bytes, start: bytes) -> None:
    assert refusal(start + block[8:], keyring) is BlockCorrupt


def test_k4_a_key_that_nobody_has(keyring: Keyring, block: bytes) -> None:
    parts = read_envelope(io.BytesIO(block))
    unknown = Wrap("ff" * 8, parts.wrap.nonce, parts.wrap.sealed)
    assert refusal(with_wrap(block, unknown), keyring) is KeyUnknown


# ── the wrapped key ─────────────────────────────────────────────────────────────────────────────────


def with_wrap(block: bytes, wrap: Wrap) -> bytes:
    parts = read_envelope(io.BytesIO(block))
    return parts.prelude + wrap.encode() + block[parts.start :]


def test_a_wrap_that_was_changed_on_purpose_is_refused(keyring: Keyring, block: bytes) -> None:
    """Its check holds against accidents only; against people its tag does."""
    wrap = read_envelope(io.BytesIO(block)).wrap
    for at in range(8, 68):
        changed = bytearray(wrap.encode())
        changed[at] ^= 1
        forged = Wrap(wrap.key_id, bytes(changed[8:20]), bytes(changed[20:68]))
        assert refusal(with_wrap(block, forged), keyring) is BlockCorrupt


def test_a_wrap_is_bound_to_its_block_and_to_its_key(keyring: Keyring, block: bytes, tmp_path: Path) -> None:
    other = seal(keyring, data_id="leg")
    assert refusal(with_wrap(block, read_envelope(io.BytesIO(other)).wrap), keyring) is BlockCorrupt
    first, (_, secret) = read_envelope(io.BytesIO(block)), keyring.active_key(TENANT)
    bound = BlockKey(bytes(range(32))).wrap(secret, "11" * 8, first.prelude, bytes)
    renamed = Wrap(first.wrap.key_id, bound.nonce, bound.sealed)
    assert refusal(with_wrap(block, renamed), keyring) is BlockCorrupt


def test_a_wrap_cannot_bring_another_data_key(keyring: Keyring, block: bytes) -> None:
    """AES-GCM does not commit to its key; the signed header does. Whoever has the tenant's key gains nothing."""
    parts = read_envelope(io.BytesIO(block))
    key_id, secret = keyring.active_key(TENANT)
    other = BlockKey(b"\1" * 32).wrap(secret, key_id, parts.prelude, bytes)
    with pytest.raises(BlockCorrupt, match="another key"):
        open_in_memory(with_wrap(block, other), keyring)


def test_wrapped_anew_it_is_the_same_block(keyring: Keyring, block: bytes) -> None:
    parts = read_envelope(io.BytesIO(block))
    key_id, secret = keyring.active_key(TENANT)
    anew = with_wrap(block, BlockKey(bytes(range(32))).wrap(secret, key_id, parts.prelude, bytes))
    assert anew != block
    assert opened(anew, keyring) == TEXT
    assert read_envelope(io.BytesIO(anew)).digest == parts.digest


# ── K7, K9 ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data", [b"", b"a" * 10_000, bytes(range(256)) * 40, b'{"secret": "x"}' * 500])
def test_k7_the_length_of_a_block_tells_nothing_but_that_of_its_content(keyring: Keyring, data: bytes) -> None:
    assert len(zlib.compress(data)) < len(data) or not data
    assert len(seal(keyring, data)) == len(seal(keyring, b"")) + len(data)
    assert len(seal(keyring, data)) == len(seal(keyring, bytes(len(data))))


def test_k9_no_two_segments_of_a_block_have_a_nonce_in_common(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    used = []
    real = envelope._nonce

    def watched(*of: object) -> bytes:
        used.append(real(*of))
        return used[-1]

    monkeypatch.setattr(envelope, "_nonce", watched)
    seal(keyring, bytes(100))
    assert len(set(used)) == len(used) == 7


# ── what may be in a header ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tenant", "data_id", "version"),
    [
        ("", "x", 1), ("../x", "x", 1), ("a/b", "x", 1), ("a", "", 1), ("a", "x" * 257, 1), ("a", "x\n", 1),
        ("a", "\0", 1), ("a", "\ud800", 1), ("a", "x\u202e", 1), ("a", "x", 0), ("a", "x", -1), ("a", "x", True),
        ("a", "x", 1.0), ("a", "x", 2**63),
    ],
)  # fmt: skip
def test_a_block_that_cannot_be_is_refused_by_name(tenant: str, data_id: str, version: int) -> None:
    with pytest.raises(InvalidRequest):
        BlockId(tenant, data_id, version)


@pytest.mark.parametrize("data_id", ["../../etc/passwd", "con", "a/b\\c", "日本語", "x" * 256, "%2e%2e", " "])
def test_any_printable_name_is_a_data_id(keyring: Keyring, data_id: str) -> None:
    parts, plain = open_in_memory(seal(keyring, data_id=data_id), keyring)
    assert parts.header.data_id == data_id
    assert b"".join(plain) == TEXT


def deep() -> list:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    "metadata", [{1: "x"}, {"x": float("nan")}, {"x": b"bytes"}, {"x": {1, 2}}, {"x": "y" * 70_000}, {"x": deep()}],
    ids=["number as key", "nan", "bytes", "set", "too long", "too deep"],
)  # fmt: skip
def test_metadata_that_is_no_json_is_refused(keyring: Keyring, metadata: dict) -> None:
    with pytest.raises(InvalidRequest, match="metadata") as refused:
        seal(keyring, metadata=metadata)
    assert refused.value.pointer == "/metadata"


@pytest.mark.parametrize("data_type", ["", "x" * 257, "a\nb"])
def test_a_data_type_that_is_none(keyring: Keyring, data_type: str) -> None:
    with pytest.raises(InvalidRequest, match="data_type"):
        seal(keyring, data_type=data_type)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0}, {"version": True}, {"version": 1.0}, {"version": "1"}, {"tenant": "../x"}, {"tenant": 1},
        {"data_id": ["x"]}, {"data_id": ""}, {"writer": None}, {"signer": 5}, {"epoch": -1}, {"epoch": 2**63},
        {"sequence": 1.5}, {"created_at": "now"}, {"metadata": []}, {"nonce": "00"}, {"nonce": "zz" * 7},
        {"commitment": ""}, {"data_type": 1}, {"extra": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_of_another_form_is_refused_even_if_it_is_signed(
    keyring: Keyring, block: bytes, change: dict[str, object]
) -> None:
    values = asdict(read_envelope(io.BytesIO(block)).header) | change
    assert not is_read(resign(block, keyring, values=values))


def test_a_header_with_one_field_less(keyring: Keyring, block: bytes) -> None:
    for name in asdict(read_envelope(io.BytesIO(block)).header):
        values = asdict(read_envelope(io.BytesIO(block)).header)
        del values[name]
        assert not is_read(resign(block, keyring, values=values))


@pytest.mark.parametrize(
    "encoded",
    [b"", b"null", b"[]", b"[" * 20_000, b"{", b"\xff\xfe", b'{"a":1,"a":1}', b'{"a": 1}', b"1e999", b"9" * 5000],
    ids=lambda encoded: repr(encoded[:12]),
)
def test_a_header_that_is_no_canonical_json(keyring: Keyring, block: bytes, encoded: bytes) -> None:
    start = envelope.MAGIC + len(encoded).to_bytes(4, "big") + encoded
    parts = read_envelope(io.BytesIO(block))
    assert not is_read(start + block[len(parts.prelude) :])


def test_a_header_written_in_another_way_is_refused_even_if_it_is_signed(keyring: Keyring, block: bytes) -> None:
    """One block has one form: else two readers might see two."""
    values = asdict(read_envelope(io.BytesIO(block)).header)
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    assert refusal(resign(block, keyring, encoded=canonical), keyring) is None
    for encoded in (
        json.dumps(values).encode(), json.dumps(dict(reversed(values.items())), separators=(",", ":")).encode(),
        canonical + b" ", canonical.replace(b'"version":1', b'"version":1,"version":1'),
        canonical.replace(b"arm", b"\\u0061rm"),
    ):  # fmt: skip
        assert json.loads(encoded) == values
        assert not is_read(resign(block, keyring, encoded=encoded))


def test_more_ciphertext_than_the_length_says_is_refused_even_if_it_is_signed(keyring: Keyring, small: int) -> None:
    whole = seal(keyring, bytes(40))
    parts = read_envelope(io.BytesIO(whole))
    body = whole[parts.start : parts.end]
    for segments in (body + b"\0", body + body[:32], body[:-1], body[:32] + body):
        assert not is_read(resign(whole, keyring, segments))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400))
def test_whatever_a_peer_sends_is_refused_and_nothing_else_happens(keyring: Keyring, data: bytes) -> None:
    for sent in (data, envelope.MAGIC + data, envelope.MAGIC + len(data).to_bytes(4, "big") + data + bytes(200)):
        assert refusal(sent, keyring) is BlockCorrupt


def test_an_end_that_says_more_than_can_be(keyring: Keyring, block: bytes) -> None:
    for length in (2**64 - 1, 2**63, 2**52, len(TEXT) + 16, 0):
        assert refusal(block[:-104] + length.to_bytes(8, "big") + block[-96:], keyring) is BlockCorrupt


def test_the_library_takes_no_weak_key_for_granted(block: bytes) -> None:
    """Why keyring.is_weak is there: under the neutral element as key, one signature is good for any message."""
    neutral = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(neutral).verify(neutral + bytes(32), b"anything")
