"""Athena started: in the foreground by `nexus athena`, and in the background with a Nexus, which ends it too."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from cluster import bootstrap
from deployments.athena import starting
from deployments.gateway import build
from nexus.config import Config, load_config
from nexus.errors import ConfigError, Unavailable
from tests import browsing
from tests.conftest import Door
from tests.running import ROOT, free_port, until
from tests.test_bootstrap import instance


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where an instance is recorded, as `nexus up` does."""
    home = tmp_path / "home"
    bootstrap.prepare_home(home)
    (home / "logs").mkdir()
    bootstrap._record(home, instance(id=f"athena-{free_port()}"))
    return home


@pytest.fixture
def settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("NEXUS_HOME", str(home))
    monkeypatch.setenv("NEXUS_ATHENA__PORT", str(free_port()))
    monkeypatch.setenv("NEXUS_API_KEY", "a key")
    monkeypatch.setenv("NEXUS_URL", "http://127.0.0.1:9")
    return load_config()


@pytest.fixture
def started(home: Path, settings: Config) -> Iterator[tuple[starting.Background, str]]:
    told: list[str] = []
    starting.ensure(settings, told.append)
    found = starting.find(home)
    assert found is not None
    yield found, next(word for word in told[0].split() if "/?token=" in word)
    bootstrap.stop(home)
    while starting._running:
        starting._running.pop().wait()


def test_it_runs_in_the_background_until_its_nexus_ends(
    home: Path, settings: Config, started: tuple[starting.Background, str]
) -> None:
    found, link = started
    assert starting.state(home) == ("running", settings.athena.url)
    assert (home / "run" / "athena.json").stat().st_mode & 0o077 == 0
    with httpx.Client(trust_env=False) as browser:
        assert browser.get(link).status_code == 303
        assert '<div id="root">' in browser.get(found.url, headers={"accept": "text/html"}).text  # Streamlit's page
    told: list[str] = []
    starting.ensure(settings, told.append)  # a second time: the same process, and another link
    assert starting.find(home) == found and link not in told[0]
    assert bootstrap.stop(home)
    assert not found.is_alive() and starting.state(home)[0] == "ended"
    starting.forget(home)
    assert starting.state(home) == ("not started", None)


def test_who_stays_starts_it_again_when_it_ended_and_says_what_is_in_the_way(
    home: Path, settings: Config, started: tuple[starting.Background, str]
) -> None:
    first, _ = started
    now, told = [0.0], list[str]()
    kept = starting.Kept(settings, told.append, lambda: now[0])
    kept.look()
    assert starting.find(home) == first and told == []
    os.kill(first.pid, signal.SIGKILL)
    until(60, lambda: not first.is_alive())
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        until(60, lambda: is_bound(taken, settings.athena.port))  # its other threads may end after its first
        taken.listen()
        kept.look()
        kept.look()  # too soon to be tried again
        now[0] += 1
        with bootstrap.lock_home(home):
            kept.look()  # `nexus down` is under way
        kept.look()
    assert [words.rpartition("; ")[2] for words in told] == ["again in 1 s", "again in 2 s"]
    assert "athena.port" in told[0]
    now[0] += 2
    kept.look()
    second = starting.find(home)
    assert second is not None and second.is_alive() and second.pid != first.pid
    os.kill(second.pid, signal.SIGKILL)
    until(60, lambda: not second.is_alive())
    starting.forget(home)
    kept.look()
    assert starting.state(home) == ("not started", None)


def is_bound(taken: socket.socket, port: int) -> bool:
    """Whether it could be bound now; somebody may have the port still."""
    try:
        taken.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_what_it_is_told_is_for_its_owner_alone(started: tuple[starting.Background, str]) -> None:
    """Other users of the machine read command lines, and not environments."""
    found, _ = started
    assert b"a key" not in Path(f"/proc/{found.pid}/cmdline").read_bytes()
    assert Path(f"/proc/{found.pid}/environ").stat().st_mode & 0o077 == 0


def test_a_port_that_is_taken_is_refused_by_its_setting(settings: Config) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.athena.port))
        taken.listen()
        with pytest.raises(ConfigError, match=r"athena\.port"):
            starting.ensure(settings, print)


def test_without_a_nexus_there_is_nothing_to_run_beside(home: Path, settings: Config) -> None:
    (home / "run" / "instance.json").unlink()
    with pytest.raises(Unavailable, match="no Nexus runs here"):
        starting.ensure(settings, print)


@pytest.mark.parametrize(
    ("athena", "key", "lent"), [({}, "k", "k"), ({}, "", ""), ({"host": "0.0.0.0", "behind_tls": True}, "k", "")]
)
def test_a_key_is_lent_on_loopback_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, athena: Mapping[str, object], key: str, lent: str
) -> None:
    monkeypatch.setenv("NEXUS_API_KEY", key)
    told = starting._settings(Config(home=tmp_path, athena=athena), "s")
    assert (told["lent_key"], bool(told["secret"])) == (lent, bool(lent))


def test_away_from_loopback_it_wants_encryption(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not loopback.*athena\.behind_tls"):
        Config(home=tmp_path, athena={"host": "10.0.0.1"})


def test_in_the_foreground_it_prints_its_link_and_ctrl_c_ends_it(door: Door, tmp_path: Path) -> None:
    key = door.headers()["authorization"].removeprefix("Bearer ")
    port = free_port()
    with browsing.gateway(build(door.lent)) as url:
        environment = {**os.environ, "NEXUS_HOME": str(tmp_path), "NEXUS_ATHENA__PORT": str(port)}
        environment |= {"NEXUS_URL": url, "NEXUS_API_KEY": key}
        with subprocess.Popen(
            [sys.executable, "-m", "deployments.cli", "athena"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                link = process.stdout.readline().split()[3]
                assert link.startswith(f"http://127.0.0.1:{port}/?token=")
                until(60, lambda: httpx.get(f"http://127.0.0.1:{port}/_stcore/health").status_code == 200)
                with httpx.Client(trust_env=False) as browser:
                    assert browser.get(link).status_code == 303
                    host_settings = browser.get(f"http://127.0.0.1:{port}/_stcore/host-config")
                    assert host_settings.status_code == 200 and "gatherUsageStats" not in host_settings.text
            finally:
                process.send_signal(signal.SIGINT)
            said, complained = process.communicate(timeout=30)
    assert (process.returncode, said.splitlines()[-1]) == (0, "Athena is stopped.")
    assert "Traceback" not in complained and key not in said + complained


def test_telemetry_is_off_and_protection_on() -> None:
    from deployments.athena.door import Settings
    from deployments.athena.server import options

    said = options(Settings("http://127.0.0.1:8000"))
    off = ("browser.gatherUsageStats", "server.enableStaticServing", "server.enableAgentApi", "global.developmentMode")
    assert not any(said[name] for name in off)
    assert said["server.enableCORS"] and said["server.enableXsrfProtection"] and said["server.headless"]
    assert json.dumps(said)
