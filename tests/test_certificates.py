"""Certificates of a cluster's machines: made by its authority alone, for one address, kept for their owner alone."""

import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from cluster import certificates
from cluster.certificates import AUTHORITY, AUTHORITY_KEY, CERTIFICATE, FOLDER, KEY
from deployments import doctor
from nexus.config import Config
from nexus.errors import ConfigError, InvalidRequest, Unavailable


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return made(tmp_path / "head")


def made(home: Path) -> Path:
    home.mkdir()
    certificates.see_to_own(home, "head", "10.0.0.1")
    return home


def do_greet(server: Path, client: Path, address: str) -> bool:
    """Whether a server and a client with these homes' certificates take each other's, in memory, as Ray's do."""
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(server / FOLDER / CERTIFICATE, server / FOLDER / KEY)
    there.load_verify_locations(server / FOLDER / AUTHORITY)
    there.verify_mode = ssl.CERT_REQUIRED
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        certificates._context(client).wrap_bio(down, up, server_hostname=address),
        there.wrap_bio(up, down, server_side=True),
    ]
    done: set[int] = set()
    try:
        for turn in range(8):
            try:
                sides[turn % 2].do_handshake()
                done.add(turn % 2)
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLError:
        return False
    return done == {0, 1}


def test_machines_of_one_authority_take_each_other_at_their_addresses(head: Path, tmp_path: Path) -> None:
    clu = tmp_path / "clu"
    clu.mkdir()
    certificates.keep(clu, certificates.issue(head, "clu", "10.0.0.2"))
    assert do_greet(head, clu, "10.0.0.1") and do_greet(clu, head, "10.0.0.2") and do_greet(head, head, "127.0.0.1")
    assert not do_greet(clu, head, "10.0.0.3"), "it is for one address"
    stranger = made(tmp_path / "stranger")
    assert not do_greet(head, stranger, "10.0.0.1") and not do_greet(stranger, clu, "10.0.0.1")
    assert not (clu / FOLDER / AUTHORITY_KEY).exists()
    with pytest.raises(ConfigError, match="there is no authority here"):
        certificates.issue(clu, "mallory", "10.0.0.4")


def test_all_is_its_owners_alone_and_a_start_refuses_what_is_not(head: Path) -> None:
    for file in (head / FOLDER).iterdir():
        assert file.stat().st_mode & 0o077 == 0
    found = certificates.environment(head)
    assert found["RAY_USE_TLS"] == "1" and {Path(found[name]).name for name in found if name != "RAY_USE_TLS"} == {
        CERTIFICATE, KEY, AUTHORITY,
    }  # fmt: skip
    for name in (KEY, AUTHORITY_KEY):
        (head / FOLDER / name).chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            certificates.environment(head)
            certificates.issue(head, "clu", "10.0.0.2")
        (head / FOLDER / name).chmod(0o600)
    (head / FOLDER / KEY).unlink()
    with pytest.raises(ConfigError, match="nexus node certificate NAME FILE"):
        certificates.environment(head)


def test_the_heads_own_is_made_anew_for_another_address_or_authority_and_not_else(head: Path, tmp_path: Path) -> None:
    def own() -> x509.Certificate:
        return x509.load_pem_x509_certificate((head / FOLDER / CERTIFICATE).read_bytes())

    authority, first = (head / FOLDER / AUTHORITY).read_bytes(), own()
    certificates.see_to_own(head, "head", "10.0.0.1")
    assert own() == first
    certificates.see_to_own(head, "head", "10.0.0.9")
    assert own() != first and do_greet(head, head, "10.0.0.9")
    assert (head / FOLDER / AUTHORITY).read_bytes() == authority
    (head / FOLDER / AUTHORITY_KEY).unlink()
    certificates.see_to_own(head, "head", "10.0.0.9")
    assert (head / FOLDER / AUTHORITY).read_bytes() != authority and do_greet(head, head, "10.0.0.9")


@contextmanager
def listening(home: Path, is_secure: bool = True) -> Iterator[str]:
    """A server such as Ray's: gRPC, which asks for a certificate."""
    server = grpc.server(ThreadPoolExecutor(1))
    folder = home / FOLDER
    pair = ((folder / KEY).read_bytes(), (folder / CERTIFICATE).read_bytes())
    secure = grpc.ssl_server_credentials([pair], (folder / AUTHORITY).read_bytes(), require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", secure) if is_secure else server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_machine_greets_the_head_before_it_joins(head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "CONNECT_SECONDS", 1.0)
    clu, late = tmp_path / "clu", tmp_path / "late"
    for home in (clu, late):
        home.mkdir()
        certificates.keep(home, certificates.issue(head, home.name, "10.0.0.2"))
    stranger = made(tmp_path / "stranger")
    with listening(head) as address:
        certificates.require_greeting(clu, address)
        with pytest.raises(ConfigError, match="do not take each other's certificates"):
            certificates.require_greeting(stranger, address)
        for file in (KEY, CERTIFICATE):  # it would take the head's, and the head not its own
            (late / FOLDER / file).write_bytes((stranger / FOLDER / file).read_bytes())
        with pytest.raises(ConfigError, match="do not take each other's certificates"):
            certificates.require_greeting(late, address)
    with listening(head, is_secure=False) as address, pytest.raises((ConfigError, Unavailable)):
        certificates.require_greeting(clu, address)


@pytest.mark.parametrize("harm", ["", "no PEM", "cut", "two keys", "of another"])
def test_what_is_no_certificate_is_refused(head: Path, tmp_path: Path, harm: str) -> None:
    home = tmp_path / "clu"
    home.mkdir()
    good, other = (certificates.issue(head, "clu", "10.0.0.2") for _ in range(2))
    end = good.index(b"-----BEGIN CERTIFICATE")
    bad = {
        "": b"", "no PEM": b"hello", "cut": good[: end + 200], "two keys": good[:end] * 2,
        "of another": good[:end] + other[other.index(b"-----BEGIN CERTIFICATE") :],
    }[harm]  # fmt: skip
    for is_kept in (False, True):
        with pytest.raises((InvalidRequest, ConfigError)):
            certificates.keep(home, bad)
        assert is_kept == (home / FOLDER).exists()
        certificates.keep(home, good)
    assert do_greet(head, home, "10.0.0.1") and len(list(home.iterdir())) == 1


@pytest.mark.parametrize(
    ("authority", "machine", "said"),
    [(3650, 3650, "good for 3649 days"), (31, 3650, "good for 30 days"), (3650, 30, "machine.pem ends in 29 days"),
     (20, 30, "authority.pem ends in 19 days"), (3650, 0, "machine.pem has ended")],
)  # fmt: skip
def test_the_doctor_says_a_month_ahead_which_certificate_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: int, machine: int, said: str
) -> None:
    nodes = {"head": {"address": "10.0.0.1", "cpus": 1, "memory": 2**30}}
    config = Config(home=tmp_path, nodes=nodes, ray={"head": "head", "tls": True})
    assert doctor._try("certificates", doctor._certificates, config).ok, "before the first start there are none"
    monkeypatch.setattr(certificates, "VALID_DAYS", authority)
    certificates.make_authority(tmp_path)
    monkeypatch.setattr(certificates, "VALID_DAYS", machine)
    certificates.see_to_own(tmp_path, "head", "10.0.0.1")
    found = doctor._try("certificates", doctor._certificates, config)
    assert said in found.detail and found.ok == said.startswith("good")
    (tmp_path / FOLDER / KEY).unlink()
    assert not doctor._try("certificates", doctor._certificates, config).ok


def test_tls_is_for_several_machines(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ray\.tls is for several machines"):
        Config(home=tmp_path, ray={"tls": True})
    nodes = {"sark": {"address": "10.0.0.1", "cpus": 1, "memory": 2**30}}
    assert Config(home=tmp_path, nodes=nodes, ray={"head": "sark", "tls": True}).ray.tls
