"""The store of blocks: damage, swaps, replays and clones are refused and repaired, and keys rotate under all of it.

Rows K1 to K3, K5 and K9 of the cryptography for blocks, on real files. What a kill does is in test_block_faults.py.
"""

import errno
import os
import random
import resource
import shutil
import stat
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import pytest

from nexus import blocks as module
from nexus.blocks import BlockStore
from nexus.envelope import MAGIC, BlockId, BlockKey, read_envelope
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
    NotFound,
    Unavailable,
    WriterUnknown,
)
from nexus.keyring import Keyring
from tests.sealing import (
    TENANT,
    TEXT,
    acquaint,
    file_of,
    machine,
    noted_on_disk,
    read,
    retire,
    rotate,
    seal,
    sealed,
    share,
    take,
)

ARM = BlockId(TENANT, "arm", 1)


NOW = 1_800_000_000


@contextmanager
def opened(home: Path, keyring: Keyring | None = None, after_epoch: int = 0, now: float = NOW) -> Iterator[BlockStore]:
    store = BlockStore(home / "share" / "blocks", keyring or machine(home), after_epoch, lambda: now)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    with opened(tmp_path / "a") as store:
        yield store


@pytest.fixture
def peer(tmp_path: Path, store: BlockStore) -> Iterator[BlockStore]:
    keyring = machine(tmp_path / "b", "clu", tenant="")
    acquaint(store.keyring, keyring)
    with opened(tmp_path / "b", keyring) as peer:
        yield peer


def refused(call: Callable[..., object], *args: object) -> type[BlockRefused] | None:
    try:
        call(*args)
    except BlockRefused as error:
        return type(error)
    return None


def drafts_of(store: BlockStore) -> list[Path]:
    return list(store._drafts.iterdir())


# ── in and out ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**20 + 1, 3 * 2**20 + 5])
def test_what_was_written_is_read_in_pieces(store: BlockStore, length: int) -> None:
    data = (bytes(range(256)) * (length // 256 + 1))[:length]
    stored = share(store, data, data_type="telemetry", metadata={"robot_id": "r1", "n": [1, None, "é"]})
    assert (stored.length, stored.header.block, stored.header.data_type) == (length, ARM, "telemetry")
    assert stored.header.metadata == {"robot_id": "r1", "n": [1, None, "é"]}
    assert (stored.header.writer, stored.header.epoch, stored.header.sequence) == ("sark", NOW, 1)
    with store.open(ARM, stored.digest) as reading:
        pieces = list(reading)
        assert reading.stored == stored == store.find(ARM)
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 2**20
    assert stored.size == len(sealed(store)) == file_of(store).stat().st_size
    assert drafts_of(store) == []


def test_blocks_are_there_after_a_restart_and_gone_after_a_delete(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as store:
        for version in (1, 2, 10):
            share(store, b"%d" % version, version=version)
        share(store, data_id="leg")
    with opened(tmp_path / "a") as store:
        assert store.versions(TENANT, "arm") == [1, 2, 10]
        assert sorted((one.header.data_id, one.header.version) for one in store.blocks()) == [
            ("arm", 1), ("arm", 2), ("arm", 10), ("leg", 1)
        ]  # fmt: skip
        assert read(store, version=10) == b"10"
        assert store.delete(BlockId(TENANT, "arm", 2)) and not store.delete(BlockId(TENANT, "arm", 2))
        assert store.versions(TENANT, "arm") == [1, 10]
        for call in (store.open, store.send):
            with pytest.raises(NotFound):
                call(BlockId(TENANT, "arm", 2))
        assert store.find(BlockId(TENANT, "arm", 2)) is None
        assert store.versions("other", "arm") == []


def test_what_is_not_committed_was_never_there(store: BlockStore) -> None:
    with store.write(ARM) as draft:
        draft.feed(bytes(3 * 2**20))
    with pytest.raises(ZeroDivisionError), store.write(ARM) as draft:
        draft.feed(b"x")
        raise ZeroDivisionError
    with store.receive(ARM) as draft:
        draft.feed(b"x")
    assert store.versions(TENANT, "arm") == [] == drafts_of(store)
    assert store.under_key(TENANT, store.keyring.active_key(TENANT)[0]) == 0


def test_a_version_is_written_once(store: BlockStore) -> None:
    share(store, b"first")
    with pytest.raises(Conflict, match="newer version"):
        share(store, b"second")
    assert read(store) == b"first"
    assert drafts_of(store) == []


def test_names_of_data_are_no_names_of_files(tmp_path: Path, store: BlockStore) -> None:
    before = {path for path in tmp_path.rglob("*") if store._files not in path.parents and store._files != path}
    for data_id in ("../../etc/passwd", "/etc/passwd", "a/../b", ".", "x" * 256, "日本語", "con"):
        share(store, data_id=data_id)
        assert read(store, data_id) == TEXT
    after = {path for path in tmp_path.rglob("*") if store._files not in path.parents and store._files != path}
    assert {path for path in after - before if "register" not in path.name} == set()
    assert len(list(store.blocks())) == 7
    for name in ("../epoch", "epoch", "", "x.block", "/etc/passwd"):
        with pytest.raises(InvalidRequest):
            store.discard(name)


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with opened(tmp_path / "a") as store:
            share(store)
            folder = tmp_path / "a" / "share" / "blocks"
            modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*")) if path.is_dir()}
            assert modes == {0o700}
            assert stat.S_IMODE(file_of(store).stat().st_mode) == 0o600
    finally:
        os.umask(old)


def test_one_process_has_a_store(tmp_path: Path, store: BlockStore) -> None:
    with pytest.raises(AlreadyRunning):
        BlockStore(tmp_path / "a" / "share" / "blocks", store.keyring)
    store.close()
    with opened(tmp_path / "a"):
        pass


def test_a_tenant_without_a_key_writes_nothing(store: BlockStore) -> None:
    with pytest.raises(KeyUnknown, match="other"):
        store.write(BlockId("other", "arm", 1))
    assert drafts_of(store) == []


def test_a_bad_header_leaves_no_draft_and_holds_no_key(store: BlockStore) -> None:
    with pytest.raises(InvalidRequest):
        store.write(ARM, metadata={"x": float("nan")})
    assert drafts_of(store) == []
    assert store.under_key(TENANT, store.keyring.active_key(TENANT)[0]) == 0


def test_memory_is_bounded_by_a_segment(store: BlockStore) -> None:
    piece = bytes(2**20)
    tracemalloc.start()
    try:
        with store.write(ARM) as draft:
            for _ in range(24):
                draft.feed(piece)
            draft.commit()
        with store.open(ARM) as reading:
            assert sum(map(len, reading)) == 24 * 2**20
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_a_full_disk_says_so_and_leaves_nothing(store: BlockStore) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, limits[1]))
    try:
        with pytest.raises(Unavailable) as full, store.write(ARM) as draft:
            for _ in range(8):
                draft.feed(bytes(2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.value.code == "storage_full"
    assert store.versions(TENANT, "arm") == [] == drafts_of(store)
    share(store)


def test_a_block_is_on_disk_before_it_is_there(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real_note = store._register.note
    share(store, version=5)  # its folder is there from now on
    seen = noted_on_disk(monkeypatch)
    monkeypatch.setattr(store._register, "note", lambda parts: (seen.append("number"), real_note(parts)))
    whole = ["file", "number", "rename", "folder"]
    share(store)
    assert seen == whole
    seen.clear()
    take(store, sealed(store), version=1)
    assert seen == whole
    seen.clear()
    rotate(store.keyring)
    store.rewrap(TENANT)
    assert seen[-3:] == ["file", "rename", "folder"]
    seen.clear()
    store.delete(ARM)
    assert seen == ["folder"]


# ── K1: damage, refused and repaired ────────────────────────────────────────────────────────────────


def places(path: Path) -> dict[str, int]:
    """Where in a block's file each of its parts is."""
    with path.open("rb") as file:
        parts = read_envelope(file)
    wrap = len(parts.prelude)
    return {
        "magic": 0, "format version": 7, "header length": 11, "header": wrap // 2, "key id": wrap,
        "wrap nonce": wrap + 9,
        "wrapped key": wrap + 30, "wrap tag": wrap + 60, "check": wrap + 70, "ciphertext": parts.start,
        "tag": parts.end - 1, "length": parts.end + 7, "digest": parts.end + 10, "signature": parts.size - 1,
    }  # fmt: skip


PARTS = (
    "magic", "format version", "header length", "header", "key id", "wrap nonce", "wrapped key", "wrap tag", "check",
    "ciphertext", "tag", "length", "digest", "signature",
)  # fmt: skip


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", PARTS)
def test_k1_a_flipped_bit_is_refused_found_and_repaired_from_a_peer(
    store: BlockStore, peer: BlockStore, part: str
) -> None:
    stored = share(store)
    take(peer, sealed(store), digest=stored.digest)
    flip(file_of(store), places(file_of(store))[part])
    with pytest.raises(BlockCorrupt):
        store.open(ARM)
    (found,) = store.scrub()
    assert (found.name, type(found.refused)) == (store.name_of(ARM), BlockCorrupt)
    assert refused(take, peer, file_of(store).read_bytes()) is BlockCorrupt  # nor does it spread
    assert read(peer) == TEXT
    assert take(store, sealed(peer), digest=stored.digest) == stored
    assert read(store) == TEXT
    assert [one.refused for one in store.scrub()] == [None]


def test_k1_truncated_emptied_or_longer(store: BlockStore, peer: BlockStore) -> None:
    share(store, bytes(range(256)) * 5000)  # two segments
    good, path = sealed(store), file_of(store)
    for content in (b"", good[:1], good[: len(good) // 2], good[:-1], good[:-104], good + b"\0", good + good):
        path.write_bytes(content)
        assert refused(store.open, ARM) is BlockCorrupt
        assert refused(take, peer, content) is BlockCorrupt
    assert peer.versions(TENANT, "arm") == [] == drafts_of(peer)


def test_k1_a_block_whose_header_is_gone_is_known_by_its_name(store: BlockStore) -> None:
    share(store)
    file_of(store).write_bytes(b"rubble")
    (found,) = store.scrub()
    assert (found.name, found.block, found.size) == (store.name_of(ARM), None, 6)
    assert store.find(ARM) is None and list(store.blocks()) == []
    assert store.versions(TENANT, "arm") == [1]
    assert store.discard(found.name) and not store.discard(found.name)
    assert store.versions(TENANT, "arm") == []


def test_k1_what_the_disk_cannot_read_is_damage(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    share(store)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "verify", fail)
    assert refused(store.open, ARM) is BlockCorrupt
    assert [type(one.refused) for one in store.scrub()] == [BlockCorrupt]


def test_a_bad_repair_leaves_what_was_there(store: BlockStore, peer: BlockStore) -> None:
    share(store)
    bad = bytearray(sealed(store))
    bad[len(bad) // 2] ^= 1
    assert refused(take, store, bytes(bad)) is BlockCorrupt
    assert read(store) == TEXT
    assert drafts_of(store) == []


def test_a_scrub_goes_on_past_what_is_bad_and_what_is_deleted_meanwhile(store: BlockStore) -> None:
    for number in range(6):
        share(store, data_id=f"d{number}")
    first, second, *_ = [file.name for file in sorted(store._files.rglob("*.block"))]
    flip(store._path_of(first), 200)
    walk = store.scrub()
    assert next(walk).refused is not None
    store.discard(second)
    assert [one.refused for one in walk] == [None] * 4


# ── K2: another block in its place ──────────────────────────────────────────────────────────────────


def test_k2_another_id_tenant_or_later_version_in_its_place(store: BlockStore, peer: BlockStore) -> None:
    keyring = store.keyring
    keyring.install(keyring.draft_key("other"))
    peer.keyring.install(keyring.export("other"))
    share(store)
    for block in (BlockId(TENANT, "leg", 1), BlockId("other", "arm", 1), BlockId(TENANT, "arm", 2)):
        with store.write(block) as draft:
            draft.feed(b"other")
            draft.commit()
        with store.send(block) as sending:
            swapped = b"".join(sending)
        file_of(store).write_bytes(swapped)
        with pytest.raises(BlockCorrupt, match="another block"):
            store.open(ARM)
        (found,) = [one for one in store.scrub() if one.name == store.name_of(ARM)]
        assert type(found.refused) is BlockCorrupt and found.block is None
        assert refused(take, peer, swapped) is BlockCorrupt
    assert peer.versions(TENANT, "arm") == []


# ── K3: replays, removed writers, equivocation ──────────────────────────────────────────────────────


def test_k3_an_older_version_put_in_the_newests_place(store: BlockStore, peer: BlockStore) -> None:
    share(store, b"old")
    old = sealed(store)
    share(store, b"new", version=2)
    file_of(store, version=2).write_bytes(old)
    with pytest.raises(BlockStale, match="version 1"):
        store.open(BlockId(TENANT, "arm", 2))
    assert refused(take, peer, old, "arm", 2) is BlockStale
    assert peer.versions(TENANT, "arm") == []


def test_k3_another_content_than_the_coordinator_knows(store: BlockStore, peer: BlockStore) -> None:
    """Two machines wrote the same version, one of them in vain."""
    kept, vain = share(store, b"kept"), share(peer, b"vain")
    assert refused(store.open, ARM, vain.digest) is BlockStale
    assert refused(take, store, sealed(peer), "arm", 1, kept.digest) is BlockStale
    assert read(store, digest=kept.digest) == b"kept"
    take(peer, sealed(store), digest=kept.digest)
    assert read(peer, digest=kept.digest) == b"kept"


def test_k3_a_block_of_a_removed_machine(store: BlockStore, peer: BlockStore) -> None:
    share(peer)
    take(store, sealed(peer))
    assert read(store) == TEXT
    store.keyring.meet(store.keyring.removal("clu"))
    with pytest.raises(WriterUnknown, match="clu"):
        store.open(ARM)
    assert [type(one.refused) for one in store.scrub()] == [WriterUnknown]
    assert refused(take, store, sealed(peer)) is WriterUnknown


def test_k3_a_block_of_a_stranger(tmp_path: Path, store: BlockStore) -> None:
    stranger = machine(tmp_path / "c", "tron", tenant="")
    stranger.install(store.keyring.export(TENANT))
    with opened(tmp_path / "c", stranger) as other:
        share(other)
        assert refused(take, store, sealed(other)) is WriterUnknown
    assert store.versions(TENANT, "arm") == []


def test_k3_k9_a_cloned_machine_gives_its_numbers_twice_and_is_caught(
    tmp_path: Path, store: BlockStore, peer: BlockStore
) -> None:
    """A snapshot of the machine is started beside it, at the same time: both begin the same epoch."""
    peer.close()
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    with opened(tmp_path / "b", machine(tmp_path / "b", "clu")) as one, opened(
        tmp_path / "c", machine(tmp_path / "c", "clu")
    ) as clone:  # fmt: skip
        assert one.epoch == clone.epoch
        share(one, b"one"), share(clone, b"two", data_id="leg")
        take(store, sealed(one))
        take(store, sealed(one))  # the same again is no news
        with pytest.raises(Equivocation, match="clu"):
            take(store, sealed(clone, "leg"), "leg")
        assert store.versions(TENANT, "leg") == [] == drafts_of(store)
        store.delete(ARM)
        assert refused(take, store, sealed(clone, "leg"), "leg") is Equivocation  # it is remembered


def test_k3_an_equivocation_that_got_onto_the_disk_is_refused_there(store: BlockStore) -> None:
    share(store)
    file_of(store).write_bytes(seal(store.keyring, b"other", BlockKey(b"\1" * 32), epoch=NOW))
    assert refused(store.open, ARM) is Equivocation
    assert [type(one.refused) for one in store.scrub()] == [Equivocation]


# ── K9: epochs and numbers ──────────────────────────────────────────────────────────────────────────


def test_k9_each_start_has_an_epoch_of_its_own_on_disk_before_the_first_block(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        with opened(tmp_path / "a") as store:
            seen.append(store.epoch)
            assert (tmp_path / "a" / "share" / "blocks" / "epoch").read_text() == str(store.epoch)
            assert store.versions(TENANT, "arm") == []
    assert seen == [NOW, NOW + 1, NOW + 2]


def test_k9_an_epoch_does_not_come_back_with_a_lost_or_older_file(tmp_path: Path) -> None:
    file = tmp_path / "a" / "share" / "blocks" / "epoch"
    with opened(tmp_path / "a", after_epoch=NOW + 40) as store:
        assert store.epoch == NOW + 41
        share(store)
    file.write_text("7")
    with opened(tmp_path / "a") as store:
        assert store.epoch == NOW + 42
    file.unlink()
    with opened(tmp_path / "a") as store:
        assert store.epoch == NOW + 42  # nothing was written in the one before
    file.write_text("x")
    with pytest.raises(ConfigError, match="epoch"), opened(tmp_path / "a"):
        pass


def test_k9_a_machine_put_back_to_an_older_state_counts_anew(tmp_path: Path, peer: BlockStore) -> None:
    """From a backup or a snapshot: what it wrote since, its peers still know, and it does not."""
    keyring = machine(tmp_path / "c", "tron", tenant="")
    acquaint(peer.keyring, keyring)
    shutil.copytree(tmp_path / "c", tmp_path / "kept")
    with opened(tmp_path / "c", keyring) as store:
        share(store, b"before")
        take(peer, sealed(store))
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "kept").rename(tmp_path / "c")
    with opened(tmp_path / "c", machine(tmp_path / "c", "tron"), now=NOW + 1) as store:
        share(store, b"after", version=2)
        take(peer, sealed(store, version=2), version=2)
    assert read(peer, version=2) == b"after"


def test_k9_numbers_within_an_epoch_only_go_up_also_for_what_was_given_up(store: BlockStore) -> None:
    with store.write(ARM) as draft:
        draft.feed(b"x")
    numbers = [share(store, data_id=f"d{n}").header.sequence for n in range(3)]
    assert numbers == [2, 3, 4]


def test_k9_a_number_that_comes_twice_is_noticed_where_it_is_given(store: BlockStore) -> None:
    share(store)
    store._numbers = count(1)
    with pytest.raises(Equivocation):
        share(store, data_id="leg")
    assert store.versions(TENANT, "leg") == []


def test_k9_every_block_has_a_key_of_its_own(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bytes] = []

    class Watched(BlockKey):
        def __init__(self, secret: bytes) -> None:
            used.append(secret)
            super().__init__(secret)

    monkeypatch.setattr(module, "BlockKey", Watched)
    for number in range(20):
        share(store, data_id=f"d{number}")
    assert len(set(used)) == 20 and {len(key) for key in used} == {32}


def test_k9_a_lost_register_is_filled_again_by_a_scrub(tmp_path: Path, store: BlockStore) -> None:
    share(store)
    store.close()
    for file in (tmp_path / "a" / "share" / "blocks").glob("register.db*"):
        file.unlink()
    with opened(tmp_path / "a") as again:
        assert read(again) == TEXT
        assert [one.refused for one in again.scrub()] == [None]
        file_of(again).write_bytes(seal(again.keyring, b"other", BlockKey(b"\1" * 32), epoch=NOW))
        assert refused(again.open, ARM) is Equivocation


# ── K5: rotation ────────────────────────────────────────────────────────────────────────────────────


def test_k5_rotation_leaves_nothing_under_the_old_key(store: BlockStore, peer: BlockStore) -> None:
    for number in range(5):
        share(store, b"%d" % number, data_id=f"d{number}")
    digests = {one.header.data_id: one.digest for one in store.blocks()}
    old, new = rotate(store.keyring, peer.keyring)
    assert store.under_key(TENANT, old) == 5
    assert read(store, "d0") == b"0"
    assert store.rewrap(TENANT).count == 5 and store.rewrap(TENANT).count == 0
    assert (store.under_key(TENANT, old), store.under_key(TENANT, new)) == (0, 5)
    retire(old, store.keyring)
    assert store.retire_key(TENANT, old).count == 0
    assert not store.keyring.ring(TENANT).find(old).is_held
    for number in range(5):
        assert read(store, f"d{number}", digest=digests[f"d{number}"]) == b"%d" % number
    assert [one.refused for one in store.scrub()] == [None] * 5
    assert drafts_of(store) == []


def test_k5_other_tenants_blocks_stay_as_they_are(store: BlockStore) -> None:
    store.keyring.install(store.keyring.draft_key("other"))
    with store.write(BlockId("other", "arm", 1)) as draft:
        before = draft.commit()
    rotate(store.keyring)
    assert store.rewrap(TENANT).count == 0
    assert store.find(before.header.block) == before


def test_k5_what_is_being_written_while_keys_change_gets_the_new_one(store: BlockStore) -> None:
    with store.write(ARM) as draft:
        draft.feed(TEXT[:5])
        old, new = rotate(store.keyring)
        retire(old, store.keyring)
        with pytest.raises(Conflict, match="1 blocks"):
            store.retire_key(TENANT, old)
        draft.feed(TEXT[5:])
        assert draft.commit().key_id == new
    assert store.retire_key(TENANT, old).failed == ()
    assert read(store) == TEXT


def test_k5_what_comes_from_a_peer_that_is_behind_gets_the_new_key(store: BlockStore, peer: BlockStore) -> None:
    share(peer)
    old, new = rotate(store.keyring)
    assert take(store, sealed(peer)).key_id == new
    assert store.under_key(TENANT, old) == 0
    assert read(store) == TEXT


def test_k5_a_key_that_is_not_here_yet_is_named(store: BlockStore, peer: BlockStore) -> None:
    _, new = rotate(peer.keyring)
    share(peer)
    with pytest.raises(KeyUnknown, match=new):
        take(store, sealed(peer))
    store.keyring.install(peer.keyring.export(TENANT))
    take(store, sealed(peer))


def test_k5_a_machine_that_was_away_for_all_of_it_wraps_anew_when_it_returns(
    store: BlockStore, peer: BlockStore
) -> None:
    share(store)
    take(peer, sealed(store))
    share(peer, data_id="leg")
    old, new = rotate(store.keyring)
    store.rewrap(TENANT)
    retire(old, store.keyring)
    store.retire_key(TENANT, old)
    with pytest.raises(KeyUnknown, match=rf"{old}.*retired"):
        take(store, sealed(peer, "leg"), "leg")  # refused, and told why
    peer.keyring.install(store.keyring.export(TENANT))
    assert read(peer, "leg") == TEXT  # none of its reads fails
    assert peer.find(BlockId(TENANT, "leg", 1)).key_id == new
    assert peer.retire_key(TENANT, old).count == 1
    assert peer.under_key(TENANT, old) == 0 and not peer.keyring.ring(TENANT).find(old).is_held
    take(store, sealed(peer, "leg"), "leg")
    assert read(store, "leg") == TEXT


def test_k5_a_machine_that_lost_the_old_key_refuses_and_is_repaired(store: BlockStore, peer: BlockStore) -> None:
    share(store)
    take(peer, sealed(store))
    behind = file_of(peer).read_bytes()
    old, _ = rotate(store.keyring, peer.keyring)
    for one in (store, peer):
        one.rewrap(TENANT)
    retire(old, store.keyring, peer.keyring)
    peer.retire_key(TENANT, old)
    file_of(peer).write_bytes(behind)  # from a backup
    with pytest.raises(KeyUnknown, match=old):
        peer.open(ARM)
    assert [type(one.refused) for one in peer.scrub()] == [KeyUnknown]
    with pytest.raises(Conflict, match=old):
        peer.retire_key(TENANT, old)
    take(peer, sealed(store))
    assert read(peer) == TEXT
    peer.retire_key(TENANT, old)


def test_k5_a_key_in_use_is_not_retired(store: BlockStore) -> None:
    share(store)
    active = store.keyring.active_key(TENANT)[0]
    with pytest.raises(Conflict, match="active"):
        store.retire_key(TENANT, active)
    rotate(store.keyring)
    with pytest.raises(Conflict, match="readable"):
        store.retire_key(TENANT, active)
    with pytest.raises(NotFound):
        store.retire_key(TENANT, "00" * 8)


def test_k5_a_block_whose_wrap_is_forged_holds_the_old_key_until_it_is_repaired(store: BlockStore) -> None:
    share(store), share(store, data_id="leg")
    good, path = sealed(store), file_of(store)
    with path.open("rb") as file:
        wrap = read_envelope(file).wrap
    forged = good.replace(wrap.encode(), module.Wrap(wrap.key_id, wrap.nonce, bytes(48)).encode())
    path.write_bytes(forged)
    old, _ = rotate(store.keyring)
    rewrapped = store.rewrap(TENANT)
    assert rewrapped.count == 1
    assert [(name, type(error)) for name, error in rewrapped.failed] == [(store.name_of(ARM), BlockCorrupt)]
    retire(old, store.keyring)
    with pytest.raises(Conflict, match=old):
        store.retire_key(TENANT, old)
    assert store.keyring.ring(TENANT).find(old).is_held, "the key is gone, and with it what could be repaired"
    store.delete(ARM)
    store.retire_key(TENANT, old)


def test_k5_a_read_that_a_whole_rotation_overtakes_does_not_fail(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(store)
    real = module.verify

    def overtaken(*args: object) -> None:
        real(*args)
        monkeypatch.setattr(module, "verify", real)
        old, _ = rotate(store.keyring)
        store.rewrap(TENANT)
        retire(old, store.keyring)
        store.retire_key(TENANT, old)

    monkeypatch.setattr(module, "verify", overtaken)
    assert read(store) == TEXT


def test_k5_a_block_that_is_deleted_while_it_is_wrapped_anew_stays_deleted(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(store)
    rotate(store.keyring)
    real, began = shutil.copyfileobj, threading.Event()
    reached = threading.Event()

    def copy(*args: object) -> None:
        began.set()
        reached.wait(60)
        real(*args)

    monkeypatch.setattr(module.shutil, "copyfileobj", copy)
    with ThreadPoolExecutor(2) as threads:
        wrapping = threads.submit(store.rewrap, TENANT)
        assert began.wait(60)
        deleting = threads.submit(lambda: (reached.set(), store.delete(ARM))[1])
        assert wrapping.result().failed == () and deleting.result()
    assert store.versions(TENANT, "arm") == []


def test_k5_keys_rotate_while_others_read_write_and_replicate(store: BlockStore, peer: BlockStore) -> None:
    """No read fails, nothing is lost, and in the end nothing is under any key but the last."""
    share(store, b"0")
    over = threading.Event()
    done = {"read": 0, "write": 0, "replicate": 0}

    def repeatedly(what: str, act: Callable[[int], None]) -> None:
        for number in count(1):
            act(number)
            done[what] += 1
            if over.is_set() and done[what] > 3:
                return

    def write(number: int) -> None:
        share(store, b"%d" % number, data_id=f"w{number}")

    def replicate(number: int) -> None:
        with peer.receive(ARM) as draft, store.send(ARM) as sending:
            for piece in sending:
                draft.feed(piece)
            try:
                draft.commit()
            except KeyUnknown:  # it was sent before it was wrapped anew: the sender sends again
                done["replicate"] -= 1
        assert read(peer) == b"0"

    def check(_: int) -> None:
        assert read(store) == b"0"

    take(peer, sealed(store))
    with ThreadPoolExecutor(3) as threads:
        running = [
            threads.submit(repeatedly, what, act)
            for what, act in (("read", check), ("write", write), ("replicate", replicate))
        ]
        try:
            for _ in range(4):
                old, _ = rotate(store.keyring, peer.keyring)
                store.rewrap(TENANT), peer.rewrap(TENANT)
                retire(old, store.keyring, peer.keyring)
                for one in (store, peer):
                    retire_patiently(one, old)
        finally:
            over.set()
        for each in running:
            each.result()
    last = store.keyring.active_key(TENANT)[0]
    for one in (store, peer):
        assert {stored.key_id for stored in one.blocks()} == {last}
        assert [each.refused for each in one.scrub() if each.refused] == []
    for number in range(1, done["write"] + 1):
        assert read(store, f"w{number}") == b"%d" % number


def retire_patiently(store: BlockStore, key_id: str) -> None:
    """Until what was being written under it is finished."""
    while True:
        try:
            store.retire_key(TENANT, key_id)
            return
        except Conflict:
            continue


class Pair:
    """Two machines that keep the same blocks, and what a dictionary remembers of those."""

    def __init__(self, home: Path) -> None:
        self.homes = [home / "one", home / "two"]
        keyrings = [machine(self.homes[0], "one"), machine(self.homes[1], "two", tenant="")]
        acquaint(*keyrings)
        self.stores = [self._open(number, keyring) for number, keyring in enumerate(keyrings)]
        self.known: dict[str, tuple[int, str, bytes]] = {}  # version, digest and content
        self.damaged: set[tuple[int, str]] = set()
        self.versions = count(1)

    def _open(self, which: int, keyring: Keyring) -> BlockStore:
        return BlockStore(self.homes[which] / "share" / "blocks", keyring)

    def share(self, which: int, data_id: str, dice: random.Random) -> None:
        version, content = next(self.versions), dice.randbytes(dice.randrange(2000))
        here, there = self.stores[which], self.stores[1 - which]
        stored = share(here, content, data_id, version)
        take(there, sealed(here, data_id, version), data_id, version, stored.digest)
        self.delete(which, data_id, dice)
        self.known[data_id] = (version, stored.digest, content)

    def delete(self, which: int, data_id: str, dice: random.Random) -> None:
        if data_id in self.known:
            block = BlockId(TENANT, data_id, self.known.pop(data_id)[0])
            assert [one.delete(block) for one in self.stores] == [True, True]
        self.damaged -= {(0, data_id), (1, data_id)}

    def damage(self, which: int, data_id: str, dice: random.Random) -> None:
        """One of the two copies."""
        if data_id in self.known and not {(0, data_id), (1, data_id)} & self.damaged:
            path = file_of(self.stores[which], data_id, self.known[data_id][0])
            flip(path, dice.randrange(path.stat().st_size))
            self.damaged.add((which, data_id))

    def repair(self, which: int, data_id: str, dice: random.Random) -> None:
        if (which, data_id) in self.damaged:
            version, digest, _ = self.known[data_id]
            take(self.stores[which], sealed(self.stores[1 - which], data_id, version), data_id, version, digest)
            self.damaged.remove((which, data_id))

    def rotate(self, which: int, data_id: str, dice: random.Random) -> None:
        keyrings = [one.keyring for one in self.stores]
        old, _ = rotate(*keyrings)
        for one in self.stores:
            assert {type(error) for _, error in one.rewrap(TENANT).failed} <= {BlockCorrupt}
        if not self.damaged:
            retire(old, *keyrings)
            assert [one.retire_key(TENANT, old).failed for one in self.stores] == [(), ()]

    def restart(self, which: int, data_id: str, dice: random.Random) -> None:
        self.stores[which].close()
        self.stores[which] = self._open(which, machine(self.homes[which], self.stores[which].keyring.node, tenant=""))

    def check(self) -> None:
        for which, store in enumerate(self.stores):
            for data_id, (version, digest, content) in self.known.items():
                assert store.versions(TENANT, data_id) == [version]
                if (which, data_id) in self.damaged:
                    assert refused(store.open, BlockId(TENANT, data_id, version), digest) is BlockCorrupt
                else:
                    assert read(store, data_id, version, digest) == content
        faults = [{one.name for one in store.scrub() if one.refused} for store in self.stores]
        names = [
            {store.name_of(BlockId(TENANT, i, self.known[i][0])) for w, i in self.damaged if w == which}
            for which, store in enumerate(self.stores)
        ]
        assert faults == names

    def close(self) -> None:
        for store in self.stores:
            store.close()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_in_whatever_order_a_read_is_right_or_refused(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    acts = (Pair.share, Pair.share, Pair.delete, Pair.damage, Pair.damage, Pair.repair, Pair.rotate, Pair.restart)
    with closing(Pair(tmp_path)) as pair:
        for _ in range(40):
            dice.choice(acts)(pair, dice.randrange(2), f"d{dice.randrange(4)}", dice)
            pair.check()


def test_the_form_of_a_file_is_that_of_the_envelope(store: BlockStore) -> None:
    share(store)
    assert file_of(store).read_bytes() == sealed(store)
    assert sealed(store).startswith(MAGIC)
