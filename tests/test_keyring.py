"""Keys of tenants and machines: who may have them, how they change, and that a start without the right ones is none.

Rows K4 (weak and unknown keys), K5 (rotation, as the keys see it) and K6 (lost, wrong, readable, differing keys).
"""

import errno
import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from nexus import keyring as module
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
from nexus.keyring import ClusterKey, Keyring, Writer, fingerprint_of, is_weak, key_id_of
from tests.sealing import SECRET, TENANT, acquaint, machine, noted_on_disk, retire, rotate

OTHER_SECRET = "p9Xk2LqT7vBn4WzR8sJd5HyGc3MfA6uEo1IxYbKpQwZt"
P = 2**255 - 19


def files_of(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


# ── one machine ─────────────────────────────────────────────────────────────────────────────────────


def test_what_is_made_at_first_is_read_afterwards(tmp_path: Path) -> None:
    first = Keyring(tmp_path, "sark")
    first.install(first.draft_key(TENANT))
    again = Keyring(tmp_path, "sark", create=False)
    assert (again.fingerprint, again.cluster_key_id) == (first.fingerprint, first.cluster_key_id)
    assert again.ring(TENANT) == first.ring(TENANT)
    assert again.active_key(TENANT) == first.active_key(TENANT)
    assert again.writers() == first.writers() == (Writer("sark", first.fingerprint, False),)
    assert again.tenants() == (TENANT,)


def test_every_file_is_its_owners_alone_and_holds_no_key_in_clear(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        keyring = machine(tmp_path)
        rotate(keyring)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files_of(tmp_path)} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()} == {0o700}
    for key in keyring.ring(TENANT).keys:
        for path in files_of(tmp_path):
            content = path.read_bytes()
            assert key.secret not in content and key.secret.hex().encode() not in content
        assert key.secret.hex() not in repr(keyring.ring(TENANT)) and repr(key.secret) not in repr(keyring.ring(TENANT))


def test_tenants_have_keys_of_their_own(tmp_path: Path) -> None:
    keyring = machine(tmp_path)
    keyring.install(keyring.draft_key("other"))
    mine, theirs = keyring.active_key(TENANT), keyring.active_key("other")
    assert mine[0] != theirs[0] and mine[1] != theirs[1]
    with pytest.raises(KeyUnknown, match=mine[0]):
        keyring.opening_key("other", mine[0])


def test_a_tenant_without_a_key_and_names_that_are_none(tmp_path: Path) -> None:
    keyring = machine(tmp_path, tenant="")
    assert keyring.ring(TENANT) is keyring.export(TENANT) is None
    with pytest.raises(KeyUnknown, match=TENANT):
        keyring.active_key(TENANT)
    for name in ("", "../x", "a/b", ".hidden", "x" * 65, "a\n"):
        with pytest.raises(InvalidRequest):
            keyring.draft_key(name)
        with pytest.raises(InvalidRequest):
            Keyring(tmp_path, name, SECRET)


def test_a_draft_changes_nothing_until_it_is_installed(tmp_path: Path) -> None:
    keyring = machine(tmp_path)
    before = keyring.ring(TENANT)
    keyring.draft_key(TENANT)
    assert keyring.ring(TENANT) == before == machine(tmp_path).ring(TENANT)


# ── K6: lost, wrong, readable, differing ────────────────────────────────────────────────────────────


def test_k6_a_lost_cluster_key_stops_the_start_and_is_named(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path, "sark")
    (tmp_path / "share-key").unlink()
    for create in (True, False):
        with pytest.raises(ConfigError, match=keyring.cluster_key_id) as refused:
            Keyring(tmp_path, "sark", create=create)
        assert "share-key" in refused.value.message
    assert not (tmp_path / "share-key").exists(), "another one was made in its place"


def test_k6_a_wrong_cluster_key_stops_the_start_and_both_are_named_by_id(tmp_path: Path) -> None:
    Keyring(tmp_path, "sark", SECRET)
    with pytest.raises(ConfigError) as refused:
        Keyring(tmp_path, "sark", OTHER_SECRET)
    assert ClusterKey(SECRET).key_id in refused.value.message
    assert ClusterKey(OTHER_SECRET).key_id in refused.value.message
    assert OTHER_SECRET not in refused.value.message


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o611])
@pytest.mark.parametrize("name", ["share-key", "share/signing-key", "share/keys/acme.keys", "share/nodes/sark.nodes"])
def test_k6_a_key_that_others_may_read_stops_the_start(tmp_path: Path, name: str, mode: int) -> None:
    keyring = Keyring(tmp_path, "sark")
    keyring.install(keyring.draft_key(TENANT))
    (tmp_path / name).chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keyring(tmp_path, "sark")


def test_k6_a_folder_that_others_may_read_stops_the_start(tmp_path: Path) -> None:
    Keyring(tmp_path, "sark")
    (tmp_path / "share" / "keys").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        Keyring(tmp_path, "sark")


def test_k6_key_in_file_and_configuration_differing(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path, "sark")
    in_file = (tmp_path / "share-key").read_text().strip()
    with pytest.raises(ConfigError) as refused:
        Keyring(tmp_path, "sark", SECRET)
    message = refused.value.message
    assert ClusterKey(SECRET).key_id in message and keyring.cluster_key_id in message
    assert SECRET not in message and in_file not in message
    assert Keyring(tmp_path, "sark", in_file).fingerprint == keyring.fingerprint


@pytest.mark.parametrize("secret", ["", "short", "changeme" * 5, "0" * 64])
def test_k6_a_cluster_key_that_can_be_guessed(tmp_path: Path, secret: str) -> None:
    with pytest.raises(ConfigError, match="cluster key"):
        Keyring(tmp_path, "sark", secret)


def test_a_machine_that_joins_makes_no_cluster_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="copy it"):
        Keyring(tmp_path, "clu", create=False)
    assert files_of(tmp_path) == []


def test_k6_a_tenants_key_that_is_lost_is_named(tmp_path: Path) -> None:
    key_id = machine(tmp_path).active_key(TENANT)[0]
    (tmp_path / "share" / "keys" / f"{TENANT}.keys").unlink()
    with pytest.raises(KeyUnknown, match=key_id):
        machine(tmp_path).opening_key(TENANT, key_id)


@pytest.mark.parametrize("name", ["share/signing-key", "share/keys/acme.keys", "share/nodes/sark.nodes"])
def test_a_damaged_file_stops_the_start_and_says_what_to_do(tmp_path: Path, name: str) -> None:
    machine(tmp_path)
    file = tmp_path / name
    for content in (b"", file.read_bytes()[:-1], bytes(len(file.read_bytes()) + 1)):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"put .* back") as refused:
            machine(tmp_path)
        assert name in refused.value.message


def test_files_of_two_tenants_cannot_be_put_in_each_others_place(tmp_path: Path) -> None:
    """What a ring is of, is in what is sealed, and not in the name of its file."""
    keyring = machine(tmp_path)
    keyring.install(keyring.draft_key("other"))
    folder = tmp_path / "share" / "keys"
    kept = (folder / "other.keys").read_bytes()
    shutil.copy(folder / f"{TENANT}.keys", folder / "other.keys")
    with pytest.raises(ConfigError, match="other"):
        machine(tmp_path)
    (folder / "other.keys").write_bytes(kept)
    assert machine(tmp_path).tenants() == (TENANT, "other")


# ── what machines tell each other ───────────────────────────────────────────────────────────────────


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Keyring, Keyring]:
    sark, clu = machine(tmp_path / "a", "sark"), machine(tmp_path / "b", "clu", tenant="")
    acquaint(sark, clu)
    return sark, clu


def test_a_machine_that_joins_gets_the_tenants_keys_and_every_machines(pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    assert clu.ring(TENANT) == sark.ring(TENANT)
    assert clu.active_key(TENANT) == sark.active_key(TENANT)
    assert clu.writers() == sark.writers()
    clu.verify_key("sark", sark.fingerprint).verify(sark.sign(b"x"), b"x")


def test_records_are_worth_nothing_without_the_cluster_key(tmp_path: Path, pair: tuple[Keyring, Keyring]) -> None:
    sark, _ = pair
    (tmp_path / "c").mkdir()
    stranger = Keyring(tmp_path / "c", "sark", OTHER_SECRET)
    stranger.install(stranger.draft_key(TENANT))
    before = sark.ring(TENANT), sark.writers()
    for record in (stranger.introduction(), stranger.export(TENANT)):
        with pytest.raises(UpstreamInvalid, match=stranger.cluster_key_id):
            sark.meet(record)
        with pytest.raises(UpstreamInvalid, match=stranger.cluster_key_id):
            sark.install(record)
    assert (sark.ring(TENANT), sark.writers()) == before


def test_a_record_that_was_changed_is_refused(pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    for record, use in ((sark.draft_key(TENANT), clu.install), (sark.introduction(), clu.meet)):
        for at in range(len(record)):
            changed = bytearray(record)
            changed[at] ^= 1
            with pytest.raises(UpstreamInvalid):
                use(bytes(changed))
            with pytest.raises(UpstreamInvalid):
                use(record[:at])


def test_a_record_of_one_kind_is_none_of_the_other(pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    with pytest.raises(UpstreamInvalid):
        clu.install(sark.introduction())
    with pytest.raises(UpstreamInvalid):
        clu.meet(sark.export(TENANT))


def test_of_two_drafts_at_once_one_counts(pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    first, second = sark.draft_key(TENANT), clu.draft_key(TENANT)
    clu.install(first)
    sark.install(first)
    sark.install(first)
    with pytest.raises(Conflict, match="coordinator"):
        clu.install(second)
    assert clu.ring(TENANT) == sark.ring(TENANT)


def test_an_older_ring_is_not_taken_back(pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    older = sark.export(TENANT)
    rotate(sark, clu)
    assert clu.install(older) == clu.ring(TENANT) == sark.ring(TENANT)


# ── K4: which signing keys count ────────────────────────────────────────────────────────────────────


@cache
def small_order_points() -> list[bytes]:
    """All encodings of the points P with 8P = 0, found by arithmetic and not from a list."""
    d = -121665 * pow(121666, -1, P) % P

    def x_of(y: int) -> int | None:
        square = (y * y - 1) * pow(d * y * y + 1, -1, P) % P
        root = pow(square, (P + 3) // 8, P)
        for one in (root, root * pow(2, (P - 1) // 4, P) % P):
            if one * one % P == square:
                return one
        return None

    def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        both = d * a[0] * b[0] * a[1] * b[1] % P
        x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + both, -1, P) % P
        return x, (a[1] * b[1] + a[0] * b[0]) * pow(1 - both, -1, P) % P

    order = 2**252 + 27742317777372353535851937790883648493
    points: set[tuple[int, int]] = set()
    y = 2
    while len(points) < 8:
        y += 1
        if (x := x_of(y)) is None:
            continue
        result, power, times = (0, 1), (x, y), order  # what is left of any point is of small order
        while times:
            if times & 1:
                result = add(result, power)
            power, times = add(power, power), times >> 1
        points |= {result, (-result[0] % P, result[1])}
    return [(y | ((x & 1) << 255)).to_bytes(32, "little") for x, y in points]


def test_k4_keys_of_small_order_and_of_no_canonical_form_are_weak() -> None:
    points = small_order_points()
    assert len(set(points)) == 8
    for point in points:
        y, sign = int.from_bytes(point, "little") & (2**255 - 1), point[31] & 0x80
        assert is_weak(point)
        assert is_weak((y | (1 << 255)).to_bytes(32, "little")), "either sign"
        if y + P < 2**255:
            assert is_weak((y + P | sign << 248).to_bytes(32, "little")), "the same point, written otherwise"
    for length in (0, 31, 33):
        assert is_weak(bytes([9] * length))


def test_k4_the_keys_that_machines_make_are_not_weak(tmp_path: Path) -> None:
    keyring = machine(tmp_path)
    assert not is_weak(keyring.verify_key("sark", keyring.fingerprint).public_bytes_raw())


def test_k4_a_machine_with_a_weak_key_is_not_met(pair: tuple[Keyring, Keyring]) -> None:
    """Not even if it has the cluster key."""
    sark, _ = pair
    for point in [*small_order_points(), (2**255 - 1).to_bytes(32, "little")]:
        record = sark._cluster.seal("machine", {"node": "evil", "keys": {point.hex(): False}})
        with pytest.raises(UpstreamInvalid, match="evil"):
            sark.meet(record)
        with pytest.raises(WriterUnknown):
            sark.verify_key("evil", fingerprint_of(point.hex()))


def test_k3_a_removed_machine_is_known_no_more_and_stays_removed(tmp_path: Path, pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    introduced = clu.introduction()
    sark.meet(sark.removal("clu"))
    sark.meet(introduced)
    for keyring in (sark, machine(tmp_path / "a")):
        with pytest.raises(WriterUnknown, match="removed"):
            keyring.verify_key("clu", clu.fingerprint)
        assert Writer("clu", clu.fingerprint, True) in keyring.writers()


def test_a_removed_machine_hears_so_and_may_come_back_with_another_key(
    tmp_path: Path, pair: tuple[Keyring, Keyring]
) -> None:
    sark, clu = pair
    removal = sark.removal("clu")
    with pytest.raises(ConfigError, match="signing-key"):
        clu.introduction(removal)
    clu.meet(removal)
    with pytest.raises(ConfigError, match="signing-key"):
        machine(tmp_path / "b", "clu", tenant="")
    (tmp_path / "b" / "share" / "signing-key").unlink()
    anew = machine(tmp_path / "b", "clu", tenant="")
    written = sark.meet(removal) and sark.meet(anew.introduction(removal))
    assert set(written) == {Writer("clu", clu.fingerprint, True), Writer("clu", anew.fingerprint, False)}
    assert isinstance(sark.verify_key("clu", anew.fingerprint), Ed25519PublicKey)


def test_a_machine_that_was_set_up_anew_keeps_the_key_it_had_for_its_old_blocks(
    tmp_path: Path, pair: tuple[Keyring, Keyring]
) -> None:
    sark, clu = pair
    anew = machine(tmp_path / "c", "clu", tenant="")
    record = anew.introduction(clu.introduction())
    late = machine(tmp_path / "a")
    late.meet(record)
    assert late.verify_key("clu", clu.fingerprint) and late.verify_key("clu", anew.fingerprint)
    with pytest.raises(UpstreamInvalid):
        anew.introduction(sark.introduction())


def test_two_machines_with_one_signing_key_are_told_apart_from_neither(
    tmp_path: Path, pair: tuple[Keyring, Keyring]
) -> None:
    sark, _ = pair
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    with pytest.raises(ConfigError, match="clu"):
        machine(tmp_path / "c", "tron", tenant="")
    shutil.rmtree(tmp_path / "c" / "share" / "nodes")
    copy = machine(tmp_path / "c", "tron", tenant="")
    with pytest.raises(UpstreamInvalid, match="copy"):
        sark.meet(copy.introduction())


def test_what_cannot_be_removed(pair: tuple[Keyring, Keyring]) -> None:
    with pytest.raises(Conflict, match="itself"):
        pair[0].removal("sark")
    with pytest.raises(NotFound):
        pair[0].removal("nobody")


def test_a_key_counts_for_the_machine_it_is_of(pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    with pytest.raises(WriterUnknown):
        sark.verify_key("clu", sark.fingerprint)
    with pytest.raises(WriterUnknown):
        sark.verify_key("sark", clu.fingerprint)


# ── K5: rotation ────────────────────────────────────────────────────────────────────────────────────


def test_k5_after_a_rotation_old_and_new_open_and_the_new_one_seals(pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    old, new = rotate(sark, clu)
    assert old != new
    for keyring in pair:
        assert keyring.active_key(TENANT)[0] == new
        assert keyring.opening_key(TENANT, old) != keyring.opening_key(TENANT, new)
        assert [(key.number, key.state) for key in keyring.ring(TENANT).keys] == [(1, "readable"), (2, "active")]


def test_k5_a_retired_key_opens_nothing_and_is_held_to_wrap_anew_until_it_is_forgotten(
    tmp_path: Path, pair: tuple[Keyring, Keyring]
) -> None:
    sark, clu = pair
    old, _ = rotate(sark, clu)
    secret = sark.opening_key(TENANT, old)
    retire(old, sark)
    for keyring in (sark, machine(tmp_path / "a")):
        with pytest.raises(KeyUnknown, match=f"{old}.*retired"):
            keyring.opening_key(TENANT, old)
        assert keyring.opening_key(TENANT, old, to_rewrap=True) == secret
    sark.forget(TENANT, old)
    sark.forget(TENANT, old)
    for keyring in (sark, machine(tmp_path / "a")):
        with pytest.raises(KeyUnknown, match=old):
            keyring.opening_key(TENANT, old, to_rewrap=True)
        assert not keyring.ring(TENANT).find(old).is_held
    clu.install(sark.export(TENANT))
    assert clu.opening_key(TENANT, old, to_rewrap=True) == secret, "the late one still wraps anew what it has"


def test_k5_a_retired_key_is_not_passed_on(tmp_path: Path, pair: tuple[Keyring, Keyring]) -> None:
    sark, _ = pair
    old, new = rotate(sark)
    retire(old, sark)
    assert sark.ring(TENANT).find(old).is_held
    late = machine(tmp_path / "c", "tron", tenant="")
    late.install(sark.export(TENANT))
    assert [(key.key_id, key.state, key.is_held) for key in late.ring(TENANT).keys] == [
        (old, "retired", False), (new, "active", True)
    ]  # fmt: skip
    assert late.export(TENANT) and late.ring(TENANT).generation == sark.ring(TENANT).generation
    sark.install(late.export(TENANT))  # the same ring, though one of them holds more
    assert sark.ring(TENANT).find(old).is_held


def test_k5_the_active_key_is_neither_retired_nor_forgotten(pair: tuple[Keyring, Keyring]) -> None:
    sark, clu = pair
    key_id = sark.active_key(TENANT)[0]
    with pytest.raises(Conflict, match=key_id):
        sark.draft_retirement(TENANT, key_id)
    with pytest.raises(Conflict, match=key_id):
        sark.forget(TENANT, key_id)
    old, _ = rotate(sark, clu)
    with pytest.raises(Conflict, match=old):
        sark.forget(TENANT, old)
    for tenant, unknown in ((TENANT, "00" * 8), ("nobody", key_id)):
        with pytest.raises(NotFound):
            sark.draft_retirement(tenant, unknown)
        with pytest.raises(NotFound):
            sark.forget(tenant, unknown)


def test_what_a_crash_left_half_written_is_not_read_and_goes_when_it_is_old(tmp_path: Path) -> None:
    keyring = machine(tmp_path)
    left = [
        tmp_path / "share" / name for name in ("keys/.acme.keys.1.part", "nodes/.sark.nodes.1.part", ".epoch.1.part")
    ]
    for file in left:
        file.write_bytes(b"half")
        file.chmod(0o600)
    assert machine(tmp_path).ring(TENANT) == keyring.ring(TENANT)
    assert all(file.exists() for file in left), "another process might be writing them"
    for file in left:
        os.utime(file, (0, 0))
    rotate(machine(tmp_path))
    assert not any(file.exists() for file in left)


def test_processes_that_start_at_once_for_the_first_time_have_the_same_keys(tmp_path: Path) -> None:
    begin = threading.Barrier(8)

    def start(_: int) -> tuple[str, str]:
        begin.wait()
        keyring = Keyring(tmp_path, "sark")
        return keyring.fingerprint, keyring.cluster_key_id

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(start, range(8)))) == 1
    assert Keyring(tmp_path, "sark").writers()
    assert [file.name for file in files_of(tmp_path) if file.suffix == ".part"] == []


@pytest.mark.parametrize("tenant", ["a.part", "a.keys", "a.new", "b.part.keys"])
def test_a_tenant_may_be_called_like_a_file(tmp_path: Path, tenant: str) -> None:
    """No name of one is that of a file which holds nothing by itself, which is not read, nor in a backup."""
    machine(tmp_path, tenant=tenant)
    assert machine(tmp_path, tenant="").tenants() == (tenant,)
    assert [file.suffix for file in (tmp_path / "share" / "keys").iterdir()] == [".keys"]


def test_files_are_synced_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kept"
    seen = noted_on_disk(monkeypatch)
    module.write_private(file, b"content")
    assert seen == ["file", "rename", "folder"]
    assert file.read_bytes() == b"content"


def test_a_full_disk_is_told_as_such_and_nothing_is_left_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = machine(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", full)
        with pytest.raises(Unavailable) as told:
            keyring.install(keyring.draft_key("another"))
    assert told.value.code == "storage_full" and keyring.ring("another") is None
    assert not [file for file in (tmp_path / "share" / "keys").iterdir() if file.suffix == ".part"]
    keyring.install(keyring.draft_key("another"))


# ── cluster keys ────────────────────────────────────────────────────────────────────────────────────


class PowerLost(BaseException):
    """In the middle of it."""


def kept_under(home: Path) -> set[str]:
    files = [*(home / "share" / "keys").iterdir(), *(home / "share" / "nodes").iterdir()]
    return {key_id_of(file.read_bytes()) for file in files if file.suffix != ".part"}


@pytest.mark.parametrize("point", ["keys.before_write", "keys.after_write", "keys.before_forget"])
def test_a_machine_that_dies_while_its_cluster_key_changes_has_all_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Whichever of its writes it dies at; what the next start does brings it to the end."""
    for dies_at in range(12):
        home = tmp_path / f"{dies_at}"
        home.mkdir()
        keyring = Keyring(home, "sark")
        keyring.install(keyring.draft_key("acme"))
        active = keyring.active_key("acme")
        old, passed = keyring.cluster_key_id, []
        new, secret = keyring.draft_cluster_key()

        def die(name: str, passed: list[str] = passed, dies_at: int = dies_at) -> None:
            passed.append(name)
            if name == point and passed.count(point) > dies_at:
                raise PowerLost

        monkeypatch.setattr("nexus.keyring.pass_through", die)
        is_dead = False
        try:
            keyring.use_cluster_key(new)
            keyring.forget_cluster_keys()
        except PowerLost:
            is_dead = True
        monkeypatch.undo()
        again = Keyring(home, "sark")
        assert {old, new} & set(again.cluster_keys()) and again.active_key("acme") == active
        again.hold_cluster_key(secret)
        again.use_cluster_key(new)
        again.forget_cluster_keys()
        assert again.cluster_keys() == (new,) == tuple(kept_under(home))
        last = Keyring(home, "sark")
        assert (last.cluster_key_id, last.active_key("acme")) == (new, active)
        assert (home / "share-key").read_text().strip() == secret
        assert list((home / "share" / "cluster-keys").iterdir()) == []
        if not is_dead:
            assert dies_at > 0
            return
    raise AssertionError("it has more writes than were tried")


def test_a_full_disk_leaves_the_cluster_key_that_was_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring(tmp_path, "sark")
    keyring.install(keyring.draft_key("acme"))
    old = keyring.cluster_key_id
    new, _ = keyring.draft_cluster_key()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(Unavailable, match="full"):
        keyring.use_cluster_key(new)
    monkeypatch.undo()
    assert keyring.cluster_key_id == old == Keyring(tmp_path, "sark").cluster_key_id
    keyring.use_cluster_key(new)
    assert Keyring(tmp_path, "sark").cluster_key_id == new


def test_what_keeps_nothing_beside_a_steward_changes_no_file(tmp_path: Path) -> None:
    steward = Keyring(tmp_path, "sark")
    (tmp_path / "share" / "blocks").mkdir()
    beside = Keyring(tmp_path, "sark", keeps=False)
    new, secret = steward.draft_cluster_key()
    beside.read_cluster_keys()
    beside.use_cluster_key(new)
    assert beside.cluster_key_id == new and (tmp_path / "share-key").read_text().strip() != secret
    steward.use_cluster_key(new)
    steward.forget_cluster_keys()
    beside.read_cluster_keys()
    assert beside.cluster_keys() == (new,)


def test_an_expelled_machines_blocks_count_up_to_a_version_and_then_no_more(tmp_path: Path) -> None:
    sark, clu = (machine(tmp_path / node, node, tenant="") for node in ("sark", "clu"))
    acquaint(sark, clu)
    sark.meet(sark.removal("clu", 7))
    assert sark.verify_key("clu", clu.fingerprint, 7)
    for version in (8, None):
        with pytest.raises(WriterUnknown):
            sark.verify_key("clu", clu.fingerprint, version)
    sark.meet(sark.removal("clu", 9))  # which takes nothing back
    sark.meet(clu.introduction())
    with pytest.raises(WriterUnknown):
        sark.verify_key("clu", clu.fingerprint, 8)
    assert Writer("clu", clu.fingerprint, False, 7) in sark.writers()
    again = Keyring(tmp_path / "sark", "sark", SECRET)
    assert again.writers() == sark.writers()
    again.meet(again.end_of_expulsion("clu"))
    with pytest.raises(WriterUnknown):
        again.verify_key("clu", clu.fingerprint, 1)
    clu.meet(sark.removal("clu", 7))
    with pytest.raises(ConfigError, match="was removed"):
        clu.require_member()
