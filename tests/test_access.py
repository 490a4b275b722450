"""API keys: shown once, kept hashed, ended for good."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.access import KeyRing
from nexus.errors import InvalidRequest, NotFound, Unauthenticated


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


@given(st.text())
def test_any_text_is_a_key_or_refused_with_the_same_words(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    keys = KeyRing(tmp_path_factory.mktemp("keys"))
    with pytest.raises(Unauthenticated) as caught:
        keys.verify(text)
    keys.close()
    assert text.strip() == "" or len(text) < 4 or text not in caught.value.message


def test_a_revoked_key_is_refused_when_the_memory_of_it_ends(keys: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    text, key = keys.create("ci")
    keys.verify(text)
    keys.revoke(key.id)
    monkeypatch.setattr("nexus.access.CACHE_SECONDS", 0)
    with pytest.raises(Unauthenticated):
        keys.verify(text)
    with pytest.raises(NotFound):
        keys.revoke(key.id)


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
