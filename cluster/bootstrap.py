"""A Ray head of one's own: started, found again after a crash, stopped to the last process.

The head leads a session of its own, and carries an instance id in its environment; its children
inherit both. What is started is written to `run/instance.json` under the home. `stop` ends the
processes of that session, or with that id, and no others: two installations share a machine without
knowing of each other, and what a crash left behind is found by the next start. (Either mark alone
would miss some: Ray's workers overwrite their environment with their title.)
"""

import contextlib
import fcntl
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from nexus.config import Config
from nexus.errors import AlreadyRunning, ConfigError, Unavailable
from nexus.types import digest

INSTANCE = "NEXUS_INSTANCE"
START_SECONDS = 60.0
STOP_SECONDS = 3.0
MAX_SOCKET_PATH = 107  # of a Unix socket, which Ray makes deep under its folder


@dataclass(frozen=True, slots=True)
class Instance:
    """What one `nexus up` started: where to reach it, and the mark that its processes carry."""

    id: str
    session: int  # the process id of the head, which leads the session; 0 before it was started
    boot_id: str
    url: str
    ray_address: str
    dashboard: str
    vectors_port: int
    ray_folder: str
    started_at: float


# ── the home ────────────────────────────────────────────────────────────────────────────────────


def prepare_home(home: Path) -> None:
    """Make the home and check that it can be written. Raises ConfigError."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / "run").mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=home / "run") as probe:
            probe.write(b"x")
    except OSError as error:
        raise ConfigError(
            f"the home {home} cannot be written ({error.strerror}); set NEXUS_HOME to a folder of your own"
        ) from None


@contextlib.contextmanager
def lock_home(home: Path) -> Iterator[None]:
    """One `up` or `down` at a time. The lock goes with its process, so a crash leaves none."""
    with (home / "run" / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"another `nexus up` or `nexus down` of {home} is under way; wait for it") from None
        yield


def find_instance(home: Path) -> Instance | None:
    """What the last `nexus up` recorded, whether or not it still runs."""
    try:
        return Instance(**json.loads((home / "run" / "instance.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None  # nothing recorded, or by a version that recorded other things


def _record(home: Path, instance: Instance) -> None:
    part = home / "run" / "instance.json.part"
    part.write_text(json.dumps(asdict(instance), indent=1))
    part.replace(home / "run" / "instance.json")


def ray_token(home: Path) -> str:
    """The shared secret of this installation's Ray, made once, readable by its owner only."""
    file = home / "ray-token"
    if not file.exists():
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as writer:
            writer.write(secrets.token_hex(32))
    return file.read_text().strip()


# ── processes ───────────────────────────────────────────────────────────────────────────────────


def is_running(home: Path) -> bool:
    """Whether anything lives of what `nexus up` started in this home."""
    instance = find_instance(home)
    return instance is not None and bool(processes_of(instance))


def processes_of(instance: Instance) -> list[psutil.Process]:
    """Every process of the instance, but not the one that asks."""
    if instance.boot_id != _boot_id() or not _leads_still(instance):
        return []
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and _is_of(process, instance):
                found.append(process)
    return found


def _is_of(process: psutil.Process, instance: Instance) -> bool:
    if instance.session and os.getsid(process.pid) == instance.session:
        return True
    with contextlib.suppress(psutil.AccessDenied):
        return process.environ().get(INSTANCE) == instance.id
    return False


def _leads_still(instance: Instance) -> bool:
    """False when the leader's process id now belongs to somebody else's process.

    The leader itself ends once the head runs; its id stays taken for as long as its session lives.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        return (
            not instance.session or psutil.Process(instance.session).create_time() < instance.started_at + START_SECONDS
        )
    return True


def _boot_id() -> str:
    """What tells this boot of the machine from the last: process ids start anew with each."""
    with contextlib.suppress(FileNotFoundError):  # where there is no Linux to ask
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return str(int(psutil.boot_time()) // 60)


def memory_of(instance: Instance) -> int:
    """Bytes of memory of all its processes; what several share is counted once (PSS)."""
    total = 0
    for process in processes_of(instance):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def stop(home: Path) -> bool:
    """End what the recorded `up` started, and only that; says whether anything ran.

    Each process is asked first and killed after a moment. Nothing is lost by that: what was
    acknowledged is on disk, and the vector store replays its log.
    """
    instance = find_instance(home)
    if instance is None:
        return False
    running = processes_of(instance)
    for process in running:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(running, timeout=STOP_SECONDS)
    while left := processes_of(instance):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_SECONDS)
    (home / "run" / "instance.json").unlink(missing_ok=True)
    return bool(running)


# ── ports ───────────────────────────────────────────────────────────────────────────────────────


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Can this port be bound now, here and on every interface?"""
    for address in (host, "0.0.0.0"):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds at this moment, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_range(length: int, first: int = 30000, last: int = 60000) -> int:
    """The first port of a run of free ones, for replicas that pick their own.

    Below those that the system gives to whoever connects, while there are; by chance, for two that start at once.
    """
    starts = range(first, last, length)
    for start in sorted(starts, key=lambda start: (start >= 32768 - length, random.random())):
        if all(is_free(port) for port in range(start, start + length)):
            return start
    raise Unavailable(f"no run of {length} free ports between {first} and {last}")


def require_port(port: int, setting: str) -> None:
    """Raises ConfigError when somebody else has the port."""
    if not is_free(port):
        raise ConfigError(
            f"port {port} is in use by another program; choose another with {setting} (or stop that program)"
        )


# ── the head ────────────────────────────────────────────────────────────────────────────────────


def environment_of(config: Config, instance_id: str) -> dict[str, str]:
    """The environment of the head and of all that it starts: the throughput flags, and nothing public."""
    home = Path(config.home)
    statistics, metrics, fallback, fallback_grpc = free_ports(4)
    replicas = free_range(64)
    return {
        INSTANCE: instance_id,
        "NEXUS_HOME": str(home),
        # What a job calls `python` is the Python that Nexus runs on.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PROMETHEUS_MULTIPROC_DIR": str(home / "run" / "metrics"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": ray_token(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Off Windows and macOS too, this is what keeps every port of Ray's on loopback: without it Ray
        # turns 127.0.0.1 into the machine's own address (ray/_private/services.py).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(4 * config.http.max_body_bytes),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas + 31),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(replicas + 32),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replicas + 63),
        "RAY_worker_niceness": "0",  # questions come first: what works on documents makes itself nice
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "2",  # glibc would keep an arena per thread, tens of megabytes in each process
        "TOKENIZERS_PARALLELISM": "false",
    }


def driver_environment(config: Config, instance: Instance) -> dict[str, str]:
    """What a process must have in its environment, before it imports `ray`, to speak to this head."""
    return {
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS", instance.ray_address),
        # A driver has no event loop; the flag below, which the head hands on, would have it ask Serve on one.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": ray_token(Path(config.home)),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def start_head(config: Config) -> tuple[Instance, dict[str, str]]:
    """Start a Ray head on loopback and record it. Raises ConfigError for a port in use, Unavailable.

    The caller holds the home's lock. What an earlier run left is stopped first. Returned with the
    instance: the environment that whoever talks to this head must have, from before `ray` is imported.
    """
    home = Path(config.home)
    stop(home)
    require_port(config.http.port, "http.port (NEXUS_HTTP__PORT)")
    (port, dashboard, vectors, *others) = free_ports(8)
    port = config.ray.port or port
    if is_free(config.ray.dashboard_port):
        dashboard = config.ray.dashboard_port or dashboard
    instance = Instance(
        id=uuid.uuid4().hex,
        session=0,
        boot_id=_boot_id(),
        url=config.url,
        ray_address=f"127.0.0.1:{port}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        vectors_port=vectors,
        ray_folder=_ray_folder(home),
        started_at=time.time(),
    )
    shutil.rmtree(instance.ray_folder, ignore_errors=True)  # its logs were kept until now
    shutil.rmtree(home / "run" / "metrics", ignore_errors=True)
    (home / "run" / "metrics").mkdir(parents=True)
    (home / "logs").mkdir(exist_ok=True)
    _record(home, instance)
    environment = {**os.environ, **environment_of(config, instance.id)}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={others[0]}",
        f"--dashboard-agent-grpc-port={others[1]}", f"--runtime-env-agent-port={others[2]}",
        f"--metrics-export-port={others[3]}", f"--ray-client-server-port={others[4]}",
        f"--object-store-memory={config.ray.object_store_bytes}", f"--temp-dir={instance.ray_folder}",
        "--include-log-monitor=False", "--no-monitor",
    ]  # fmt: skip
    with (home / "logs" / "ray-head.log").open("wb") as log:
        head = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, env=environment, start_new_session=True
        )
        instance = replace(instance, session=head.pid)
        _record(home, instance)
        try:
            failed = head.wait(START_SECONDS) != 0
        except subprocess.TimeoutExpired:
            failed = True
    if failed:
        stop(home)
        raise Unavailable(f"the Ray head did not start; {home / 'logs' / 'ray-head.log'} says why")
    return instance, environment


def _ray_folder(home: Path) -> str:
    """Under the home where Ray's socket paths fit there, else a short folder of its own."""
    folder = home / "run" / "ray"
    longest = folder / "session_2026-01-01_00-00-00_000000_0000000" / "sockets" / "plasma_store"
    if len(str(longest)) < MAX_SOCKET_PATH:
        return str(folder)
    return f"{tempfile.gettempdir()}/nexus-{os.getuid()}-{digest(str(home))[:8]}"
