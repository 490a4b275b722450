"""API keys: shown once, kept hashed, ended for good."""

import hashlib
import logging
import random
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.access import PERMISSIONS, KeyRing
from nexus.errors import ConfigError, InvalidRequest, NotFound, Unauthenticated


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyRing]:
    keys = KeyRing(tmp_path)
    yield keys
    keys.close()


def test_a_key_names_its_principal(keys: KeyRing) -> None:
    text, key = keys.create("ci", "acme", frozenset({"documents:read"}))
    principal = keys.verify(text)
    assert (principal.tenant, principal.subject, principal.permissions) == ("acme", "ci", {"documents:read"})
    assert [k.id for k in keys.list()] == [key.id]


def test_nothing_that_could_be_used_is_stored(keys: KeyRing, tmp_path: Path) -> None:
    text, _ = keys.create("ci")
    secret = text.split("_")[3]
    assert all(secret.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    assert (tmp_path / "access.db").stat().st_mode & 0o077 == 0
    assert secret not in repr(keys.list())


def test_every_changed_character_makes_a_key_wrong(keys: KeyRing) -> None:
    text, _ = keys.create("ci")
    for place in range(len(text)):
        changed = text[:place] + ("x" if text[place] != "x" else "y") + text[place + 1 :]
        with pytest.raises(Unauthenticated):
            keys.verify(changed)


def test_a_right_checksum_does_not_make_a_wrong_secret_right(keys: KeyRing) -> None:
    from nexus import access

    text, _ = keys.create("ci")
    _, _, key_id, secret, _ = text.split("_")
    for body in (f"nx_dev_{key_id}_{'A' * len(secret)}", f"nx_dev_{'B' * len(key_id)}_{secret}"):
        with pytest.raises(Unauthenticated):
            keys.verify(f"{body}_{access._checksum(body)}")


def test_section6_every_place_of_a_secret_is_random_and_by_no_generator_that_can_be_guessed(keys: KeyRing) -> None:
    made = []
    for _ in range(30):
        random.seed(7)
        made.append(keys.create("ci")[0].split("_")[3])
    assert len(set(made)) == 30
    assert min(len(set(place)) for place in zip(*made, strict=True)) > 3


def test_section6_a_key_that_is_made_is_in_no_log(keys: KeyRing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    text, key = keys.create("ci")
    keys.verify(text)
    keys.revoke(key.id)
    with pytest.raises(Unauthenticated):
        keys.verify(text)
    assert text.split("_")[3] not in caplog.text


def test_section6_a_file_of_keys_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    KeyRing(tmp_path).close()
    (tmp_path / "access.db").chmod(0o644)
    KeyRing(tmp_path).close()
    assert (tmp_path / "access.db").stat().st_mode & 0o777 == 0o600


@given(st.text())
def test_any_text_is_a_key_or_refused_with_the_same_words(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    keys = KeyRing(tmp_path_factory.mktemp("keys"))
    with pytest.raises(Unauthenticated) as caught:
        keys.verify(text)
    keys.close()
    assert text.strip() == "" or len(text) < 4 or text not in caught.value.message


def test_a_key_revoked_by_another_process_is_refused_when_the_memory_of_it_ends(tmp_path: Path) -> None:
    passed = [1000.0]
    with closing(KeyRing(tmp_path, elapsed=lambda: passed[0])) as keys, closing(KeyRing(tmp_path)) as another:
        text, key = another.create("ci")
        keys.verify(text)
        another.revoke(key.id)
        passed[0] += 5
        with pytest.raises(Unauthenticated):
            keys.verify(text)
        with pytest.raises(NotFound):
            another.revoke(key.id)


def test_a_key_revoked_here_is_refused_at_once(keys: KeyRing) -> None:
    text, key = keys.create("ci")
    keys.verify(text)
    keys.revoke(key.id)
    with pytest.raises(Unauthenticated):
        keys.verify(text)


def test_of_two_keys_of_one_name_either_may_be_ended_so_that_a_key_can_be_rotated(keys: KeyRing) -> None:
    (old, first), (new, second) = keys.create("ci", "acme"), keys.create("ci", "acme")
    assert [keys.verify(text).subject for text in (old, new)] == ["ci", "ci"]
    assert [keys.verify(text).credential for text in (old, new)] == [first.id, second.id]
    keys.revoke(first.id)
    assert keys.verify(new).subject == "ci"
    with pytest.raises(Unauthenticated):
        keys.verify(old)


def test_the_last_use_is_noted_at_most_once_a_minute(tmp_path: Path) -> None:
    passed, now = [1000.0], [1_700_000_000.0]
    with closing(KeyRing(tmp_path, now=lambda: now[0], elapsed=lambda: passed[0])) as keys:
        text, _ = keys.create("ci")
        for seconds in (0, 59, 1, 59):  # 0, 59, 60 and 119 seconds after the first
            now[0], passed[0] = now[0] + seconds, passed[0] + seconds
            keys.verify(text)
    with closing(KeyRing(tmp_path)) as keys:
        assert keys.list()[0].last_used_at == 1_700_000_060.0


def test_a_key_may_have_limits_of_its_own(keys: KeyRing) -> None:
    limited, _ = keys.create("ci", requests_per_minute=3, tokens_per_minute=40)
    free, _ = keys.create("ci")
    assert [(who.requests_per_minute, who.tokens_per_minute) for who in (keys.verify(limited), keys.verify(free))] == [
        (3, 40),
        (None, None),
    ]
    for wrong in (0, -1, 10**12):
        with pytest.raises(InvalidRequest):
            keys.create("ci", requests_per_minute=wrong)


BEFORE = """CREATE TABLE keys (
    id TEXT PRIMARY KEY, hash BLOB NOT NULL, name TEXT NOT NULL, tenant TEXT NOT NULL,
    permissions TEXT NOT NULL, created_at REAL NOT NULL, expires_at REAL, revoked_at REAL
) STRICT"""


def test_keys_of_the_old_form_in_an_old_home_stay_valid(tmp_path: Path) -> None:
    body = f"nx_{'i' * 12}_{'s' * 43}"
    text = f"{body}_{zlib.crc32(body.encode()):08x}"
    with closing(sqlite3.connect(tmp_path / "access.db")) as db:
        db.execute(BEFORE)
        hashed = hashlib.sha256(b"s" * 43).digest()
        db.execute("INSERT INTO keys VALUES (?, ?, 'ci', 'acme', 'infer', 1.0, NULL, NULL)", ("i" * 12, hashed))
        everything = "admin documents:read documents:write infer sessions:read sessions:write"  # as it was then
        db.execute("INSERT INTO keys VALUES ('a', ?, 'admin', 'default', ?, 0.0, NULL, NULL)", (hashed, everything))
        db.commit()
    for _ in range(2):  # as it is found, and as it was brought up to date
        with closing(KeyRing(tmp_path)) as keys:
            principal = keys.verify(text)
            assert (principal.tenant, principal.subject, principal.permissions) == ("acme", "ci", {"infer"})
            assert [key.permissions for key in keys.list()] == [PERMISSIONS, {"infer"}]
            assert keys.list()[1].requests_per_minute is None
    with closing(KeyRing(tmp_path)) as keys:
        keys.revoke("i" * 12)
        with pytest.raises(Unauthenticated):
            keys.verify(text)


def test_a_home_of_a_newer_nexus_is_not_opened(tmp_path: Path) -> None:
    KeyRing(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "access.db")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer"):
        KeyRing(tmp_path)


def test_an_expired_key_is_refused(keys: KeyRing) -> None:
    text, _ = keys.create("ci", lifetime_seconds=-1)
    with pytest.raises(Unauthenticated):
        keys.verify(text)


def test_keys_survive_reopening(tmp_path: Path) -> None:
    first = KeyRing(tmp_path)
    text, _ = first.create("ci")
    first.close()
    with closing(KeyRing(tmp_path)) as second:
        assert second.verify(text).subject == "ci"


def test_development_keys_work_as_they_are(tmp_path: Path) -> None:
    with closing(KeyRing(tmp_path, ["letmein"])) as keys:
        assert keys.verify("letmein").subject == "development"
        with pytest.raises(Unauthenticated):
            keys.verify("letmeout")


@pytest.mark.parametrize(
    ("name", "tenant", "permissions"), [("", "a", []), ("a b", "a", []), ("a", "-x", []), ("a", "a", ["fly"])]
)
def test_keys_that_cannot_be_made(keys: KeyRing, name: str, tenant: str, permissions: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        keys.create(name, tenant, frozenset(permissions))
