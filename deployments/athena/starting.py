"""Athena beside a Nexus: started in the background or in the foreground, found again, and the links to it."""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import typer

from cluster import bootstrap
from deployments.client import whereabouts
from deployments.running import longer
from nexus.config import Config, load_config
from nexus.errors import AlreadyRunning, NexusError, Unavailable

START_SECONDS = 60.0
LOOK_SECONDS = 0.1
RECORD = "athena.json"
Tell = Callable[[str], None]

_running: list["subprocess.Popen[bytes]"] = []  # what this process started: Python warns of one that it forgets
State = Literal["running", "ended", "not started"]


@dataclass(frozen=True, slots=True)
class Background:
    """An Athena that `nexus up --athena` started: its process, when that began, and what signs its links."""

    pid: int
    created_at: float
    url: str
    secret: str

    def is_alive(self) -> bool:
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return process.create_time() == self.created_at and process.status() != psutil.STATUS_ZOMBIE
        return False


def find(home: Path) -> Background | None:
    """The one that this home's `nexus up` started last, alive or not."""
    try:
        return Background(**json.loads((home / "run" / RECORD).read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def state(home: Path) -> tuple[State, str | None]:
    """Whether Athena runs beside the Nexus of this home, and where."""
    found = find(home)
    if found is None:
        return "not started", None
    return "running" if found.is_alive() else "ended", found.url


def forget(home: Path) -> None:
    """It is not wanted any more. Its process carries the mark of the instance, and ends with that."""
    (home / "run" / RECORD).unlink(missing_ok=True)


def ensure(config: Config, tell: Tell) -> None:
    """Have Athena run beside the Nexus of this home, and tell where. Raises ConfigError, Unavailable.

    It carries the instance's mark, so that whatever ends that ends it, too.
    """
    home = Path(config.home)
    found = find(home)
    if found is None or not found.is_alive():
        for former in _running:
            former.poll()  # it leaves no zombie
        found = _start(config, home)
    tell(f"  Athena         {_told(found.url, found.secret, whereabouts(config)[1], config)}")


class Kept:
    """Starts Athena again when it ended though its Nexus goes on; less and less often while that fails."""

    def __init__(self, config: Config, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._tell, self._clock = config, tell, clock
        self._pause, self._again_at = 0.0, 0.0

    def look(self) -> None:
        home = Path(self._config.home)
        if state(home)[0] != "ended":
            self._pause = self._again_at = 0.0
        elif self._clock() >= self._again_at:
            with suppress(AlreadyRunning):  # somebody stops it just now
                self._start_again(home)

    def _start_again(self, home: Path) -> None:
        with bootstrap.lock_home(home):
            try:
                if state(home)[0] == "ended":
                    ensure(self._config, self._tell)
            except NexusError as error:
                self._pause = longer(self._pause)
                self._again_at = self._clock() + self._pause
                self._tell(f"{error.message}; again in {self._pause:.0f} s")


def _start(config: Config, home: Path) -> Background:
    bootstrap.require_port(config.athena.port, "athena.port (NEXUS_ATHENA__PORT)", config.athena.host)
    instance = bootstrap.find_instance(home)
    if instance is None:
        raise Unavailable("no Nexus runs here; `nexus up` starts one")
    secret = secrets.token_urlsafe(32)
    log_file = home / "logs" / "athena.log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "STREAMLIT_"))},
        bootstrap.INSTANCE: instance.id, "ATHENA_SETTINGS": json.dumps(_settings(config, secret)),
    }  # fmt: skip
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.athena.server"], env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    _running.append(process)
    _await(process, config.athena.url, log_file)
    found = Background(process.pid, psutil.Process(process.pid).create_time(), config.athena.url, secret)
    _keep(home, found)
    return found


def _await(process: "subprocess.Popen[bytes]", url: str, log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"{url}/_stcore/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(LOOK_SECONDS)
    process.kill()
    raise Unavailable(f"Athena does not answer at {url}; {log_file} says why")


def _keep(home: Path, found: Background) -> None:
    part = home / "run" / f"{RECORD}.part"
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # it holds what signs links
    with os.fdopen(descriptor, "w") as writer:
        json.dump({name: getattr(found, name) for name in found.__slots__}, writer)
    part.replace(home / "run" / RECORD)


def _settings(config: Config, secret: str) -> dict[str, Any]:
    """What its server is told; the key only where nobody but this machine can get at the door."""
    url, key = whereabouts(config)
    lent = key if key and config.athena.is_loopback else ""
    return {
        "nexus_url": url, "host": config.athena.host, "port": config.athena.port,
        "hosts": list(config.athena.allowed_hosts), "secret": secret if lent else "", "lent_key": lent,
        "is_encrypted": config.athena.behind_tls, "most_upload_bytes": config.http.max_body_bytes,
    }  # fmt: skip


def _told(url: str, secret: str, key: str | None, config: Config) -> str:
    """Where to go: with a link that lends the key, where there is one to lend."""
    if not (key and config.athena.is_loopback):
        return f"{url}  (sign in there with a key)"
    from deployments.athena.door import make_link

    return f"{make_link(url, secret)}  (works once, for ten minutes; `nexus athena` makes another)"


def athena() -> None:
    """Serve Athena, the pages in a browser, until Ctrl-C; where `nexus up --athena` does so already, print a link.

    It asks the Nexus of this home, or of NEXUS_URL. The link signs one browser in with the key that the command line
    finds; whoever has no link signs in with a key of theirs.
    """
    config = load_config()
    home = Path(config.home)
    found = find(home)
    if found is not None and found.is_alive():
        typer.echo(f"Athena runs at {_told(found.url, found.secret, whereabouts(config)[1], config)}")
        return
    bootstrap.require_port(config.athena.port, "athena.port (NEXUS_ATHENA__PORT)", config.athena.host)
    from deployments.athena import server

    secret = secrets.token_urlsafe(32)
    serving = server.build(server.settings_from(_settings(config, secret)))
    typer.echo(f"Athena is at {_told(config.athena.url, secret, whereabouts(config)[1], config)}")
    typer.echo("Ctrl-C ends it.")
    with suppress(KeyboardInterrupt):
        serving.run()
    typer.echo("Athena is stopped.")
