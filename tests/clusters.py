"""A whole cluster on three hosts with addresses of their own, brought up by the product's commands as a user would.

The witness leads (Ray's head, the front door, the stores); sark and clu join it, with GPUs that only NVML's double
knows. All run from one nexus.yaml, each from a home of its own, and end with the block whatever happens.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpcore
import httpx
import psutil
import yaml

from tests.hosts import Hosts, hosts
from tests.running import ROOT, until

HEAD, WORKERS = "witness", ("sark", "clu")
PORT = 8000
GPU_BYTES = 80 * 2**30
NEW_NETWORK = 0x40000000  # CLONE_NEWNET of setns(2)

SETTINGS: Mapping[str, Any] = {
    "http": {"port": PORT},
    "ray": {"head": HEAD, "dashboard_port": 0, "object_store_bytes": 100 * 2**20},
    "coordinator": {
        "tick_seconds": 0.1,  # three voters and all else share a few cores
        "voters": {number: {"nexus.io/node": host} for number, host in enumerate((*WORKERS, HEAD), 1)},
    },
    "models": {"embedder_threads": 1, "embedder_nodes": list(WORKERS), "embedder_replicas": {"least": 2, "most": 2}},
    "parsing": {"workers": 1},
}


@dataclass
class Cluster:
    """The three hosts, and how to give commands and ask for answers there."""

    hosts: Hosts
    folder: Path
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def settings(self) -> Path:
        return self.folder / "nexus.yaml"

    def home(self, host: str) -> Path:
        return self.folder / host

    @property
    def key(self) -> str:
        """The admin key."""
        return (self.home(HEAD) / "admin-key").read_text().strip()

    def environment(self, host: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "RAY_"))}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "nvml")])
        own = {"PYTHONPATH": paths, "FAKE_NVML": str(self._nvml(host)), "NEXUS_HOME": str(self.home(host))}
        return {**kept, **own, "NEXUS_CONFIG": str(self.settings)}

    def set_gpus(self, host: str, held: Sequence[int] = (0, 0)) -> None:
        """So many GPUs, of which a process that is not of Nexus holds so many bytes each."""
        stranger = os.getpid()
        gpus = [
            {"name": "NVIDIA H100 80GB HBM3", "total": GPU_BYTES, "used": taken,
             "compute": [{"pid": stranger, "memory": taken}] if taken else []}
            for taken in held
        ]  # fmt: skip
        part = self._nvml(host).with_suffix(".part")
        part.write_text(json.dumps({"gpus": gpus}))
        part.replace(self._nvml(host))

    def _nvml(self, host: str) -> Path:
        return self.folder / f"{host}.nvml.json"

    # Commands

    def nexus(self, host: str, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Run the command line on a host as a user would."""
        return subprocess.run(
            self._command(host, arguments), cwd=ROOT, env=self.environment(host), text=True, timeout=seconds,
            stdin=subprocess.DEVNULL, capture_output=True, check=False,
        )  # fmt: skip

    def must(self, host: str, *arguments: str, seconds: float = 240) -> str:
        """Run it, and fail with what it printed unless it exits with 0."""
        done = self.nexus(host, *arguments, seconds=seconds)
        words = f"nexus {' '.join(arguments)} on {host}"
        assert done.returncode == 0, f"{words} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def json(self, host: str, *arguments: str) -> Any:
        """Run a read command with --json and parse what it prints, whatever its exit code."""
        done = self.nexus(host, *arguments, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def begin(self, host: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Run it in the background; what it prints goes to `log(host)`."""
        with self.log(host).open("ab") as log:
            process = subprocess.Popen(
                self._command(host, arguments), cwd=ROOT, env=self.environment(host), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        self.background.append(process)
        return process

    def log(self, host: str) -> Path:
        return self.folder / f"{host}.log"

    def said(self, host: str) -> str:
        """What the commands in the background printed on a host."""
        return self.log(host).read_text(errors="replace") if self.log(host).exists() else ""

    def _command(self, host: str, arguments: Iterable[str]) -> list[str]:
        return self.hosts.command(host, [sys.executable, "-m", "deployments.cli", *arguments])

    # Processes

    def processes(self, host: str, name: str) -> list[psutil.Process]:
        """Those on a host that are called so: `raylet`, `gcs_server`; or whose command line holds these words.

        What one of them has just forked is called as it is, until it becomes what it was forked for: it is left out.
        """
        found = {}
        for id in self.hosts.processes(host):
            with suppress(psutil.Error):
                process = psutil.Process(id)
                if process.name() == name or name in " ".join(process.cmdline()):
                    found[id] = process, process.ppid()
        return [process for process, parent in found.values() if parent not in found]

    def kill(self, host: str, name: str) -> None:
        """With SIGKILL, at least one; returns once it has gone."""
        doomed = self.processes(host, name)
        assert doomed, f"there is no {name} on {host}"
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(doomed, timeout=10)

    # The front door

    def http(self, **options: Any) -> httpx.Client:
        """A client of the front door on the head's loopback, with the admin key; any thread may use it."""
        transport = httpx.HTTPTransport(verify=False)  # there is no TLS here, and to load the authorities takes long
        transport._pool = httpcore.ConnectionPool(network_backend=_Inside(self.hosts.namespace(HEAD)))
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(
            base_url=f"http://127.0.0.1:{PORT}", headers=headers, transport=transport, **{"timeout": 60, **options}
        )

    def machines(self) -> dict[str, dict[str, Any]]:
        """What `nexus node list` says, by name."""
        return {row["node"]: row for row in self.json(HEAD, "node", "list")}


class _Inside(httpcore.NetworkBackend):
    """Connects from within a network namespace; open connections stay there."""

    def __init__(self, namespace: str) -> None:
        self._namespace, self._plain = namespace, httpcore.SyncBackend()

    def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        with inside(self._namespace):
            return self._plain.connect_tcp(*arguments, **options)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread is on that host for a while: what it connects or starts is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{namespace}") as other:
        _enter(libc, other.fileno())
        try:
            yield
        finally:
            _enter(libc, own.fileno())


def _enter(libc: ctypes.CDLL, descriptor: int) -> None:
    if libc.setns(descriptor, NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def cluster(settings: Mapping[str, Any] | None = None, stays: bool = False, seconds: float = 400) -> Iterator[Cluster]:
    """Up and ready, with all three machines. `settings` are put over SETTINGS, section by section.

    `stays`: the head is watched by `nexus up --stay`, as systemd would have it; else `nexus up` has come back.
    """
    with tempfile.TemporaryDirectory(prefix="nxc", ignore_cleanup_errors=True) as folder, hosts(*WORKERS, HEAD) as made:
        it = Cluster(made, Path(folder))
        _write_settings(it, settings or {})
        up = it.begin(HEAD, "up", "--wait", str(seconds), "--join", str(seconds), *(["--stay"] if stays else []))
        try:
            _await(it, up, "Ray's head runs", seconds)
            for host in WORKERS:
                it.begin(host, "node", "start", "--stay", "--token-file", str(it.home(HEAD) / "ray-token"))
            _await(it, up, "Nexus is ready", seconds)
            yield it
        except BaseException:
            for file in (*it.folder.glob("*.log"), it.home(HEAD) / "logs" / "deploy.log"):
                if file.exists():
                    print(f"--- {file.name}\n{file.read_text(errors='replace')[-4000:]}")
            raise
        finally:
            for process in it.background:
                process.kill()
                process.wait()


def _write_settings(it: Cluster, over: Mapping[str, Any]) -> None:
    machines = {
        host: {"address": it.hosts.address(host), "cpus": 2, "memory": "6GiB", "labels": {"rack": host}}
        for host in (*WORKERS, HEAD)
    }
    for host in WORKERS:
        machines[host]["gpus"] = [{"model": "H100", "memory": GPU_BYTES, "count": 2}]
        it.set_gpus(host)
    it.set_gpus(HEAD, ())
    whole: dict[str, Any] = {"nodes": machines}
    for section in {*SETTINGS, *over}:
        whole[section] = {**SETTINGS.get(section, {}), **over.get(section, {})}
    it.settings.write_text(yaml.safe_dump(whole, sort_keys=False))


def _await(it: Cluster, up: subprocess.Popen[bytes], words: str, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while words not in it.said(HEAD):
        assert up.poll() in (None, 0), f"nexus up exited with {up.returncode}:\n{it.said(HEAD)}"
        assert time.monotonic() < ends, f"not within {seconds} s: {words}\n{it.said(HEAD)}"
        time.sleep(0.1)


__all__ = ["HEAD", "PORT", "WORKERS", "Cluster", "cluster", "inside", "until"]
