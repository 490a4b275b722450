"""Tiers: files come whole or not at all, never over others, and no path leads out of a tenant's folder."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nexus.errors import ConfigError, Conflict, InvalidRequest, NexusError, NotFound, Unavailable, UpstreamInvalid
from nexus.ports import Found, Tier, Unusable
from nexus.registry import open_tier
from nexus.tiers import PARTIAL, check_path
from nexus.tiers.filesystem import FsspecTier, LocalTier, _name_of_partial

ODD_NAMES = [
    "plain.txt", "with space", " leading", "trailing ", "-rf", "~", "quote'\"`$(x)", "star*[a-z]?{b}", "new\nline",
    "back\\slash", "percent%20", "hash#frag?query", "colon:colon", "ünïcödé", "日本語", "\u202egnp.exe", "x" * 200,
    "tab\there", "a/b/c/d/e", "semi;colon&and|pipe", "emoji 🤖", "..hidden", "...", "a/..b/c..",
]  # fmt: skip
BAD_PATHS = [
    "", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./a", "a/./b", "a//b", "a/", "nul\0byte", "half\ud800",
    "x" * 256, "a/" * 600 + "b", f"{PARTIAL}/x",
]  # fmt: skip


@pytest.fixture(params=["file", "memory"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    if request.param == "file":
        (tmp_path / "tier").mkdir()
        opened = open_tier(f"file:{tmp_path}/tier")
    else:
        opened = open_tier(f"memory://{uuid.uuid4().hex}/below")
    yield opened
    opened.close()


@pytest.fixture
def local(tmp_path: Path) -> LocalTier:
    (tmp_path / "tier").mkdir()
    return LocalTier("file:", str(tmp_path / "tier"))


def content(tier: Tier, path: str, tenant: str = "acme") -> bytes:
    return b"".join(tier.read(tenant, path))


def listed(tier: Tier, tenant: str = "acme") -> list[str]:
    return sorted(found.path for found in tier.walk(tenant))


def test_what_was_written_is_there(tier: Tier) -> None:
    big = [bytes([number]) * 2**20 for number in range(3)]
    made = tier.write("acme", "robots/run.bag", big)
    assert content(tier, "robots/run.bag") == b"".join(big)
    found = tier.find("acme", "robots/run.bag")
    assert found == made == next(iter(tier.walk("acme")))
    assert (found.path, found.size) == ("robots/run.bag", 3 * 2**20)
    assert found.modified_at > 1e9
    tier.settle("acme")
    tier.check()
    assert tier.write("acme", "empty", []).size == 0
    assert content(tier, "empty") == b""


def test_what_is_not_there_is_not_found(tier: Tier) -> None:
    assert tier.find("acme", "nothing") is None
    assert list(tier.walk("acme")) == []
    with pytest.raises(NotFound):
        content(tier, "nothing")
    assert tier.remove("acme", "nothing", "any")
    tier.discard("acme", "nothing")


def test_any_name_is_only_a_name(tier: Tier) -> None:
    for number, name in enumerate(ODD_NAMES):
        tier.write("acme", name, [str(number).encode()])
    assert listed(tier) == sorted(ODD_NAMES)
    for number, name in enumerate(ODD_NAMES):
        assert content(tier, name) == str(number).encode()
    starred = tier.find("acme", "star*[a-z]?{b}")
    assert starred is not None
    assert tier.remove("acme", starred.path, starred.key)
    assert listed(tier) == sorted(set(ODD_NAMES) - {starred.path})


@pytest.mark.parametrize("path", BAD_PATHS)
def test_no_path_leads_out(tier: Tier, path: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: tier.find("acme", path), lambda: content(tier, path), lambda: tier.write("acme", path, [b"x"]),
        lambda: tier.remove("acme", path, "key"), lambda: check_path(path),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InvalidRequest):
            call()


@pytest.mark.parametrize("tenant", ["", "..", ".", "a/b", "../acme", "-x", "a\0"])
def test_no_tenant_leads_out(tier: Tier, tenant: str) -> None:
    with pytest.raises(InvalidRequest, match="tenant"):
        tier.write(tenant, "x", [b"x"])
    with pytest.raises(InvalidRequest, match="tenant"):
        list(tier.walk(tenant))


def test_tenants_do_not_see_each_other(tier: Tier) -> None:
    tier.write("acme", "same", [b"ours"])
    tier.write("acme2", "same", [b"theirs"])
    assert content(tier, "same") == b"ours"
    assert content(tier, "same", "acme2") == b"theirs"
    assert listed(tier) == listed(tier, "acme2") == ["same"]


def test_nothing_is_written_over_another_file(tier: Tier) -> None:
    first = tier.write("acme", "run.bag", [b"first"])
    for other in (b"other", b"firs", b"first and more", b""):
        with pytest.raises(Conflict, match="another file"):
            tier.write("acme", "run.bag", [other])
    assert tier.write("acme", "run.bag", [b"fi", b"rst"]).size == 5  # the very same bytes are well
    assert content(tier, "run.bag") == b"first"
    assert listed(tier) == ["run.bag"]
    found = tier.find("acme", "run.bag")
    assert found is not None and (found.path, found.size) == (first.path, first.size)


class Broken(RuntimeError):
    pass


def test_a_write_that_is_broken_off_leaves_nothing_under_the_name(tier: Tier) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise Broken

    with pytest.raises(Broken):
        tier.write("acme", "run.bag", chunks())
    tier.discard("acme", "run.bag")
    assert tier.find("acme", "run.bag") is None
    assert listed(tier) == []
    tier.write("acme", "run.bag", [b"whole"])
    assert content(tier, "run.bag") == b"whole"


def test_what_was_changed_is_not_removed(tier: Tier) -> None:
    first = tier.write("acme", "run.bag", [b"first"])
    assert tier.remove("acme", "run.bag", first.key)
    second = tier.write("acme", "run.bag", [b"other"])
    assert second.key != first.key
    assert not tier.remove("acme", "run.bag", first.key)
    assert content(tier, "run.bag") == b"other"


def test_leftovers_of_a_crash_are_discarded_and_never_listed(tier: Tier) -> None:
    tier.write("acme", "there", [b"x"])
    leave(tier, "run.bag")
    assert listed(tier) == ["there"]
    tier.discard("acme", "other.bag")
    assert leftovers(tier) == 1
    tier.discard("acme", "run.bag")
    assert leftovers(tier) == 0
    leave(tier, "run.bag")
    tier.write("acme", "run.bag", [b"whole"])  # again, and this time to its end
    assert content(tier, "run.bag") == b"whole" and leftovers(tier) == 0


def leave(tier: Tier, path: str) -> None:
    """What a process leaves that is killed while it writes."""
    partial = f"{tier._root}/acme/{PARTIAL}/{_name_of_partial(path)}"  # type: ignore[attr-defined]
    if isinstance(tier, LocalTier):
        Path(partial).write_bytes(b"hal")
    else:
        tier._fs.pipe_file(partial, b"hal")  # type: ignore[attr-defined]


def leftovers(tier: Tier) -> int:
    if isinstance(tier, LocalTier):
        return len(os.listdir(Path(tier._root) / "acme" / PARTIAL))
    assert isinstance(tier, FsspecTier)
    return len(tier._fs.find(f"{tier._root}/acme/{PARTIAL}"))


# ── a local disk ────────────────────────────────────────────────────────────────────────────────


def test_no_link_is_followed(local: LocalTier, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    home = tmp_path / "tier" / "acme"
    home.mkdir()
    (home / "file-link").symlink_to(outside / "secret")
    (home / "folder-link").symlink_to(outside)
    (home / "dangling").symlink_to(outside / "new")
    for path in ("file-link", "folder-link/secret"):
        for call in (local.find, content_of(local)):
            with pytest.raises(InvalidRequest):
                call("acme", path)
    for path in ("folder-link/new", "dangling", "file-link"):
        with pytest.raises(NexusError):
            local.write("acme", path, [b"x"])
    with pytest.raises(InvalidRequest):
        local.remove("acme", "folder-link/secret", "key")
    assert [type(found) for found in local.walk("acme")] == [Unusable] * 3
    assert sorted(os.listdir(outside)) == ["secret"] and (outside / "secret").read_text() == "secret"
    (tmp_path / "tier" / "linked").symlink_to(outside)
    with pytest.raises(InvalidRequest):
        list(local.walk("linked"))
    (home / PARTIAL).rmdir()
    (home / PARTIAL).symlink_to(outside)
    with pytest.raises(InvalidRequest):
        local.write("acme", "new", [b"x"])
    assert sorted(os.listdir(outside)) == ["secret"]


def content_of(tier: Tier) -> Callable[[str, str], bytes]:
    return lambda tenant, path: content(tier, path, tenant)


def test_what_is_no_file_is_named_and_left(local: LocalTier, tmp_path: Path) -> None:
    home = tmp_path / "tier" / "acme"
    (home / "folder").mkdir(parents=True)
    os.mkfifo(home / "pipe")
    (home / os.fsdecode(b"caf\xe9")).write_text("not UTF-8")
    (home / "good").write_text("x")
    found = {one.path: one for one in local.walk("acme")}
    assert isinstance(found["good"], Found)
    assert {path for path, one in found.items() if isinstance(one, Unusable)} == {r"'caf\udce9'", "'pipe'"}
    for path in ("pipe", "folder"):
        with pytest.raises(InvalidRequest):
            content(local, path)
        with pytest.raises(InvalidRequest):
            local.find("acme", path)


def test_what_is_read_back_otherwise_is_refused(local: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def rot(file: int) -> None:
        os.pwrite(file, b"X", 2)
        sync(file)

    monkeypatch.setattr(os, "fsync", rot)
    with pytest.raises(UpstreamInvalid, match="read back"):
        local.write("acme", "run.bag", [b"whole"])
    assert listed(local) == [] and leftovers(local) == 0


def test_a_full_disk_is_told_as_such(local: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(Unavailable, match="full") as refused:
        local.write("acme", "run.bag", [b"whole"])
    assert refused.value.code == "storage_full" and "/secret" not in refused.value.message
    assert listed(local) == [] and leftovers(local) == 0


def test_a_disk_that_is_not_mounted_is_away_and_not_empty(local: LocalTier, tmp_path: Path) -> None:
    (tmp_path / "tier").rmdir()
    with pytest.raises(Unavailable):
        list(local.walk("acme"))
    with pytest.raises(Unavailable):
        local.find("acme", "x")
    with pytest.raises(Unavailable):
        local.write("acme", "x", [b"x"])
    assert not (tmp_path / "tier").exists()


def test_a_filesystem_without_hard_links_will_do(local: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    local.write("acme", "run.bag", [b"whole"])
    assert content(local, "run.bag") == b"whole" and leftovers(local) == 0
    with pytest.raises(Conflict):
        local.write("acme", "run.bag", [b"other"])
    local.write("acme", "run.bag", [b"whole"])
    assert leftovers(local) == 0


def test_a_copy_has_the_time_of_its_original(local: LocalTier) -> None:
    assert local.write("acme", "run.bag", [b"x"], modified_at=1_700_000_000.5).modified_at == 1_700_000_000.5


def test_settling_syncs_the_folders_that_changed(local: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    local.write("acme", "a/b/run.bag", [b"x"])
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    local.settle("acme")
    root = local._root
    assert {f"{root}/acme/a/b", f"{root}/acme/a", f"{root}/acme", root} <= set(synced)
    synced.clear()
    local.settle("acme")
    assert synced == []


# ── addresses ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("file:data", "absolute"), ("nowhere:x", "names no tier"), ("simplecache::memory://x", "chain"),
        ("hot", "names no tier|absolute"), ("dropbox://x", "package"),
    ],
)  # fmt: skip
def test_an_address_that_names_no_tier_is_refused(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        open_tier(address)


@pytest.mark.parametrize("address", ["file:{}", "file://{}", "local:{}"])
def test_a_local_folder_is_written_in_three_ways(address: str, tmp_path: Path) -> None:
    tier = open_tier(address.format(tmp_path))
    tier.write("acme", "x", [b"x"])
    assert (tmp_path / "acme" / "x").read_bytes() == b"x"
