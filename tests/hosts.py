"""Hosts with addresses of their own on one machine: a Linux network namespace each, joined by a switch.

The switch is a bridge in a namespace of its own, so nothing is left in the machine's network, and all who make hosts
at once may use the same addresses. A host sees no network but its own loopback and the others. Folders, memory and
process ids are the machine's. A cut link is silent, as a pulled cable is: what is sent over it goes nowhere, open
connections wait, and a healed link lets them go on. It needs root and `ip` (iproute2).
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT

NOWHERE = "02:00:00:00:00:00"  # the hardware address of nobody
CALL = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    function, arguments = pickle.load(file)
result = function(*arguments)
with open(sys.argv[1], "wb") as file:
    pickle.dump(result, file)
"""


@dataclass(frozen=True, slots=True)
class Hosts:
    """Plain values, so that a process in one of the hosts may hold them, and cut links, as well."""

    mark: str  # what the names of the namespaces begin with
    names: tuple[str, ...]

    def address(self, host: str) -> str:
        return f"10.0.0.{1 + self.names.index(host)}"

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """What runs this in the host."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def run(
        self, host: str, command: Sequence[str], environment: Mapping[str, str] | None = None, seconds: float = 60
    ) -> str:
        """What it prints. Fails with that unless it exits with 0."""
        done = subprocess.run(
            self.command(host, command), cwd=ROOT, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)} on {host} exited with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def call(
        self, host: str, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None,
        seconds: float = 60,
    ) -> Any:  # fmt: skip
        """What a function of a module returns when it is called in a new process on the host."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(pickle.dumps((function, arguments)))
            file.flush()
            self.run(host, [sys.executable, "-c", CALL, file.name], environment, seconds)
            return pickle.loads(Path(file.name).read_bytes())

    def cut(self, one: str, other: str) -> None:
        """Both ways, until `heal`."""
        self.cut_one_way(one, other)
        self.cut_one_way(other, one)

    def cut_one_way(self, sender: str, receiver: str) -> None:
        self._ip(
            sender, "neigh", "replace", self.address(receiver), "lladdr", NOWHERE, "dev", "eth0", "nud", "permanent"
        )

    def isolate(self, host: str) -> None:
        """Cut it off from all others."""
        for other in self.names:
            if other != host:
                self.cut(host, other)

    def heal(self) -> None:
        """Every link."""
        for host in self.names:
            for cut in json.loads(self._ip(host, "-json", "neigh", "show", "nud", "permanent", "dev", "eth0") or "[]"):
                self._ip(host, "neigh", "del", cut["dst"], "dev", "eth0")

    def processes(self, host: str) -> list[int]:
        """The ids of all that run there."""
        return [int(id) for id in ip("netns", "pids", self.namespace(host)).split()]

    def namespace(self, host: str) -> str:
        return f"{self.mark}-{host}"

    def _ip(self, host: str, *arguments: str) -> str:
        return ip("-netns", self.namespace(host), *arguments)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)} exited with {done.returncode}: {done.stderr}"
    return done.stdout


def lacking() -> str:
    """What this machine lacks for hosts, or ""."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root may make network namespaces"
    if shutil.which("ip") is None:
        return "there is no `ip` here: it is Debian's package iproute2"
    probe = f"nx-probe-{uuid.uuid4().hex[:8]}"
    added = subprocess.run(["ip", "netns", "add", probe], text=True, capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return f"this machine makes no network namespaces: {added.stderr.strip()}" if added.returncode else ""


@contextmanager
def hosts(*names: str) -> Iterator[Hosts]:
    """All that runs in them ends with them, whatever happens. Skips the test where there can be none."""
    if missing := lacking():
        pytest.skip(missing)
    made = Hosts(f"nx-{uuid.uuid4().hex[:8]}", names)
    switch = f"{made.mark}-switch"
    try:
        ip("netns", "add", switch)
        ip("-netns", switch, "link", "add", "switch", "type", "bridge")
        ip("-netns", switch, "link", "set", "switch", "up")
        for host in names:
            _plug_in(made, host, switch)
        yield made
    finally:
        _end(made)
        for namespace in (switch, *map(made.namespace, names)):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _plug_in(made: Hosts, host: str, switch: str) -> None:
    """Make one host, and its link to the switch."""
    own, port = made.namespace(host), f"port{made.names.index(host)}"
    ip("netns", "add", own)
    ip("-netns", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", own)
    ip("-netns", switch, "link", "set", port, "master", "switch", "up")
    ip("-netns", own, "address", "add", f"{made.address(host)}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        ip("-netns", own, "link", "set", device, "up")


def _end(made: Hosts) -> None:
    """Kill what runs in the hosts, until nothing does."""
    for host in made.names:
        if not Path("/run/netns", made.namespace(host)).exists():
            continue  # it was not made
        while running := made.processes(host):
            for id in running:
                with suppress(ProcessLookupError):
                    os.kill(id, signal.SIGKILL)
            time.sleep(0.02)  # until they have gone
