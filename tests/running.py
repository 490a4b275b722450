"""A whole Nexus in a home of its own, for system tests and benches: started, lent, stopped."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster import bootstrap

ROOT = Path(__file__).parent.parent


@dataclass
class Running:
    """Where a Nexus is, and how to speak to it by command and over HTTP."""

    home: Path
    port: int
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.home / "admin-key").read_text().strip()

    @property
    def instance(self) -> bootstrap.Instance:
        """What `nexus up` recorded."""
        instance = bootstrap.find_instance(self.home)
        assert instance is not None
        return instance

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of this Nexus whose command line holds these words."""
        found = []
        for process in bootstrap.processes_of(self.instance):
            with suppress(psutil.NoSuchProcess):  # it ended just now
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def cpu_seconds(self, title: str = "") -> float:
        """What such processes have computed so far, and those that they started and outlived."""
        used = 0.0
        for process in self.processes(title):
            with suppress(psutil.NoSuchProcess):  # as above
                used += sum(process.cpu_times()[:4])
        return used

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "RAY_"))}
        ports = {"NEXUS_HTTP__PORT": str(self.port), "NEXUS_RAY__DASHBOARD_PORT": "0"}  # others start beside this one
        return {**kept, "NEXUS_HOME": str(self.home), **ports, **self.extra}

    def nexus(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run the command line as a user would."""
        return subprocess.run(
            [sys.executable, "-m", "deployments.cli", *arguments], cwd=ROOT, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip

    def must(self, *arguments: str, timeout: float = 240) -> str:
        """Run it, and fail with what it printed unless it exits with 0."""
        done = self.nexus(*arguments, timeout=timeout)
        assert done.returncode == 0, (
            f"nexus {' '.join(arguments)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """Run a read command with --json and parse what it prints, whatever its exit code."""
        done = self.nexus(*arguments, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def http(self, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        # There is no TLS here, and to load the authorities takes longer than a request.
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=300, trust_env=False, verify=False, **options
        )  # fmt: skip


def until(seconds: float, condition: Callable[[], object], longest_pause: float = 0.5) -> None:
    """Wait for a condition that may raise while parts are away; what was last seen is in the error.

    The pauses grow: who looks takes the CPU of those that are waited for.
    """
    deadline, pause = time.monotonic() + seconds, 0.05
    while True:
        try:
            seen = condition()
            if seen:
                return
        except (httpx.HTTPError, AssertionError, psutil.Error) as error:
            seen = error
        assert time.monotonic() < deadline, f"not within {seconds:g} s; last seen: {seen!r}"
        time.sleep(pause)
        pause = min(1.5 * pause, longest_pause)


def free_port() -> int:
    return bootstrap.free_ports(1)[0]


@contextmanager
def running_nexus(seconds: int = 240, **extra: str) -> Iterator[Running]:
    """`nexus up` in a temporary home within some seconds, `nexus down` at the end, whatever happens between."""
    with tempfile.TemporaryDirectory(prefix="nx", ignore_cleanup_errors=True) as folder:
        running = Running(Path(folder) / "home", free_port(), extra)
        try:
            running.must("up", "--wait", str(seconds), timeout=seconds + 30)
            yield running
        finally:
            running.must("down")
