"""Ray nodes of one's own, a head or one that joins it: started, found again after a crash, stopped to the last process.

What starts a node leads a session of its own, and carries an instance id in its environment; its children
inherit both. What is started is written to `run/instance.json` under the home (`run/node.json` for one that
joins). `stop` ends the processes of that session, or with that id, and no others: two installations share a
machine without knowing of each other, and what a crash left behind is found by the next start. (Either mark
alone would miss some: Ray's workers overwrite their environment with their title.)

With machines in the settings the head keeps Ray's state on disk, and how its processes were started: those that
have ended are started again, with that state. What runs on other machines does not notice.
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import psutil

from cluster import certificates
from cluster.inventory import NODE_LABEL, Inventory, configured, look, real, usable_gpus
from nexus.config import COUNTS, Config, Node
from nexus.errors import AlreadyRunning, ConfigError, Unavailable
from nexus.private_files import require_private
from nexus.types import digest
from nexus.versions import check_versions

INSTANCE = "NEXUS_INSTANCE"
START_SECONDS = 120.0
CONNECT_SECONDS = 3.0
TOKEN_REFUSED = ("InvalidAuthToken", "AuthenticationError")
LOOK_SECONDS = 0.1
STOP_SECONDS = 3.0
MAX_SOCKET_PATH = 107  # of a Unix socket, which Ray makes deep under its folder
FREE_PORTS = range(20_000, 30_000)  # for what picks its own
PORT = 6379  # of the head of a cluster, unless the settings say another
STATE_SERVER, RAYLET = "gcs_server", "raylet"  # the processes without which there is no head, or no node
DASHBOARD = "dashboard/dashboard.py"  # as its command line has it
AGENT_PORT = "--dashboard-agent-listen-port="  # as `ray start` has it
RAYLET_SOCKET, STORE_SOCKET, RAYLET_ID = "--raylet_socket_name", "--store_socket_name", "--node_id"
OUTLIVE_A_RAYLET = (STATE_SERVER, DASHBOARD, "ray-dashboard", "ray.util.client.server")
GPUS_LABEL = "nexus.io/gpus"  # which Ray carries, with the indices of the GPUs that it was given: 0-1-5
# How Ray is to start processes: when they are needed, and with no less of a processor than who asks them (what works on
# documents makes itself nice). On a busy machine 30 s for the agent that a raylet starts them by are too few.
STARTING = {
    "RAY_agent_register_timeout_ms": f"{START_SECONDS * 1000:.0f}",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}
Record = Literal["instance", "node"]


@dataclass(frozen=True, slots=True)
class Instance:
    """What one `nexus up` or `nexus node start` started: where to reach it, and the mark that its processes carry."""

    id: str
    session: int  # the process id of what started it, which leads the session; 0 before that
    boot_id: str
    url: str  # "" for a node that joined a head elsewhere, as are dashboard and vectors_port
    ray_address: str
    dashboard: str
    vectors_port: int
    ray_folder: str
    started_at: float
    node: str = ""  # its name, in a cluster
    config_file: str = ""  # the one given to `up`, if any
    revived: tuple[tuple[int, float], ...] = ()  # the sessions of what was started again, and when


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


def record_settings(home: Path, instance: Instance, config_file: Path | None) -> None:
    """From now on these are the settings of what runs."""
    _record(home, replace(instance, config_file="" if config_file is None else str(config_file.absolute())))


def find_instance(home: Path, record: Record = "instance") -> Instance | None:
    """What the last `nexus up`, or `nexus node start` for "node", recorded, whether or not it still runs."""
    try:
        found = Instance(**json.loads((home / "run" / f"{record}.json").read_text()))
        return replace(found, revived=tuple((session, at) for session, at in found.revived))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None  # nothing recorded, or by a version that recorded other things


def _record(home: Path, instance: Instance, record: Record = "instance") -> None:
    part = home / "run" / f"{record}.json.part"
    part.write_text(json.dumps(asdict(instance), indent=1))
    part.replace(home / "run" / f"{record}.json")


def ray_token(home: Path) -> str:
    """The shared secret of this installation's Ray, made once, readable by its owner only."""
    file = home / "ray-token"
    if not file.exists():
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as writer:
            writer.write(secrets.token_hex(32))
    require_private(file)
    return file.read_text().strip()


def keep_token(home: Path, token: str) -> None:
    """Keep the token of a cluster that another machine leads; "" for the one that is there. Raises ConfigError."""
    file = home / "ray-token"
    if token:
        part = home / "run" / "ray-token.part"
        part.touch(0o600)
        part.write_text(token)
        part.replace(file)
    elif not file.exists():
        raise ConfigError(
            f"the cluster's token is not here: copy ray-token from the home of the head to {home}, name a copy with "
            "--token-file, or set RAY_AUTH_TOKEN"
        )


# ── processes ───────────────────────────────────────────────────────────────────────────────────


def is_running(home: Path) -> bool:
    """Whether anything lives of what `nexus up` started in this home."""
    instance = find_instance(home)
    return instance is not None and bool(processes_of(instance))


def processes_of(instance: Instance) -> list[psutil.Process]:
    """Every process of the instance, but not the one that asks."""
    if instance.boot_id != _boot_id():
        return []
    sessions = {session for session, at in _sessions(instance) if _leads_still(session, at)}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getsid(process.pid) in sessions or _has_mark(process, instance.id):
                found.append(process)
    return found


def _processes_but(instance: Instance, words: Collection[str]) -> list[psutil.Process]:
    running, kept = processes_of(instance), set()
    for process in running:
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if any(word in command for word in words):
                kept |= {process, *process.children(recursive=True)}
    return [process for process in running if process not in kept]


def _sessions(instance: Instance) -> list[tuple[int, float]]:
    first = [(instance.session, instance.started_at)] if instance.session else []
    return [*first, *instance.revived]


def _has_mark(process: psutil.Process, id: str) -> bool:
    with contextlib.suppress(psutil.AccessDenied):
        return process.environ().get(INSTANCE) == id
    return False


def is_of_this_node(process_id: int) -> bool:
    """Whether a process is of the node that this one runs on, or belongs to."""
    with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
        if os.getsid(process_id) == os.getsid(0):
            return True
        own = os.environ.get(INSTANCE)
        return own is not None and psutil.Process(process_id).environ().get(INSTANCE) == own
    return False


def _leads_still(session: int, started_at: float) -> bool:
    """False when the leader's process id now belongs to somebody else's process.

    The leader itself may have ended; its id stays taken for as long as its session lives.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(session).create_time() < started_at + START_SECONDS
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


def stop(home: Path, record: Record = "instance") -> bool:
    """End what the recorded `up` or `node start` started, and only that; says whether anything ran.

    Each process is asked first and killed after a moment. Nothing is lost by that: what was
    acknowledged is on disk, and the vector store replays its log.
    """
    instance = find_instance(home, record)
    if instance is None:
        return False
    was_running = _end(instance)
    (home / "run" / f"{record}.json").unlink(missing_ok=True)
    return was_running


def _end(instance: Instance, but: Collection[str] = (), patience: float = STOP_SECONDS) -> bool:
    """All but those whose command lines have one of these words, and their children; whether there was any."""
    running = _processes_but(instance, but)
    for process in running:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(running, timeout=patience)
    while left := _processes_but(instance, but):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_SECONDS)
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
    """Ports that nobody holds at this moment, all different, by chance.

    They are listened on only after a while, so they are none of those that the system gives to whoever connects.
    """
    ports = random.sample(FREE_PORTS, len(FREE_PORTS))
    return list(islice(filter(is_free, ports), count))


def free_range(length: int, first: int = 30000, last: int = 60000) -> int:
    """The first port of a run of free ones, for replicas that pick their own.

    Below those that the system gives to whoever connects, while there are; by chance, for two that start at once.
    """
    starts = range(first, last, length)
    for start in sorted(starts, key=lambda start: (start >= 32768 - length, random.random())):
        if all(is_free(port) for port in range(start, start + length)):
            return start
    raise Unavailable(f"no run of {length} free ports between {first} and {last}")


def require_port(port: int, setting: str, host: str = "127.0.0.1") -> None:
    """Raises ConfigError when somebody else has the port."""
    if not is_free(port, host):
        raise ConfigError(
            f"port {port} is in use by another program; choose another with {setting} (or stop that program)"
        )


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────


def environment_of(config: Config, instance_id: str) -> dict[str, str]:
    """The environment of a node and of all that it starts: the throughput flags, and nothing public."""
    home = Path(config.home)
    statistics, metrics, fallback, fallback_grpc = free_ports(4)
    replicas = free_range(64)
    return {
        INSTANCE: instance_id,
        "NEXUS_HOME": str(home),
        # What a job calls `python` is the Python that Nexus runs on.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        COUNTS: str(home / "run" / "metrics"),
        **access_of(config),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "",  # its spans would come between ours (nexus/tracing.py)
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(4 * config.http.max_body_bytes),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",  # by default 0.1: a tenth of a core with nothing to do
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "12",  # of 5 s: where a busy gateway counts as dead, all is 500
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas + 31),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(replicas + 32),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replicas + 63),
        **STARTING,
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "2",  # glibc would keep an arena per thread, tens of megabytes in each process
        "TOKENIZERS_PARALLELISM": "false",
    }


def access_of(config: Config) -> dict[str, str]:
    """What every process that speaks to this Ray must have in its environment, from before it imports `ray`."""
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray_token(Path(config.home)), "RAY_USAGE_STATS_ENABLED": "0"}
    if config.ray.tls:
        access |= certificates.environment(Path(config.home))
    if config.nodes:
        # A machine that is cut off is given up after some ten seconds; who is without Ray's state server waits for it.
        return access | {
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1500",
            "RAY_health_check_failure_threshold": "4",
            "RAY_raylet_liveness_self_check_interval_ms": "1000",
            "RAY_grpc_client_keepalive_timeout_ms": "5000",
            "RAY_grpc_keepalive_timeout_ms": "5000",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        }
    # Off Windows and macOS too, this is what keeps every port of Ray's on loopback: without it Ray
    # turns 127.0.0.1 into the machine's own address (ray/_private/services.py).
    return access | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def driver_environment(config: Config, instance: Instance) -> dict[str, str]:
    """What a process must have in its environment, before it imports `ray`, to speak to this head."""
    return {
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS", instance.ray_address),
        # A driver has no event loop; the flag below, which the head hands on, would have it ask Serve on one.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
        **access_of(config),
    }


def start_head(config: Config, config_file: Path | None = None) -> tuple[Instance, dict[str, str]]:
    """Start a Ray head and record it: on loopback, or with machines in the settings on the address of this one.

    The caller holds the home's lock. What an earlier run left is stopped first. Returned with the instance: the
    environment that whoever talks to this head must have, from before `ray` is imported. Raises ConfigError for a port
    in use, Unavailable.
    """
    check_versions()
    home = Path(config.home)
    stop(home)
    require_port(config.http.port, "http.port (NEXUS_HTTP__PORT)")
    port, dashboard, vectors, client = free_ports(4)
    machine = None if config.ray.head is None else config.nodes[config.ray.head]
    host = "127.0.0.1" if machine is None else address_of(machine)
    port = config.ray.port or (port if machine is None else PORT)
    if machine is not None:
        require_port(port, "ray.port (NEXUS_RAY__PORT)", host)
        if config.ray.tls:
            certificates.see_to_own(home, config.ray.head or "", machine.address)
    if is_free(config.ray.dashboard_port):
        dashboard = config.ray.dashboard_port or dashboard
    instance = _new_instance(
        home,
        url=config.url,
        ray_address=f"{host}:{port}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        vectors_port=vectors,
        node=config.ray.head or "",
        config_file="" if config_file is None else str(config_file.absolute()),
    )
    environment = environment_of(config, instance.id)
    command = [
        "--head", f"--node-ip-address={host}", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--no-monitor",
    ]  # fmt: skip
    if machine is not None:
        environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(home / "run" / "gcs")}
        shutil.rmtree(home / "run" / "gcs", ignore_errors=True)
        gpus = free_gpus(config, instance.node)
        environment |= _of_gpus(gpus)
        command += describe_node(instance.node, machine, gpus)
    instance = _start_node(config, instance, command, environment, "instance")
    _remember(home, environment, _commands_of(instance))
    return instance, {**os.environ, **environment}


def join_head(config: Config, name: str) -> Instance:
    """Start this machine's Ray node under its name, and record it. Raises ConfigError, Unavailable.

    The caller holds the home's lock, and has seen to it that the cluster's token is there.
    """
    check_versions()
    home = Path(config.home)
    stop(home, "node")
    instance = _new_instance(home, ray_address=head_address(config), node=name)
    if not _answers(instance.ray_address):
        raise Unavailable(f"the head at {instance.ray_address} does not answer: is Nexus up there, and its port open?")
    if config.ray.tls:
        certificates.require_certificate(home)
        certificates.require_greeting(home, instance.ray_address)
    machine, gpus = config.nodes[name], free_gpus(config, name)
    command = [f"--address={instance.ray_address}", f"--node-ip-address={address_of(machine)}"]
    environment = environment_of(config, instance.id) | _of_gpus(gpus)
    return _start_node(config, instance, [*command, *describe_node(name, machine, gpus)], environment, "node")


def _answers(address: str) -> bool:
    """Whether something listens at HOST:PORT, or at the path of a socket."""
    is_path = address.startswith("/")
    host, _, port = address.rpartition(":")
    try:
        with socket.socket(socket.AF_UNIX if is_path else socket.AF_INET) as probe:
            probe.settimeout(CONNECT_SECONDS)
            probe.connect(address if is_path else (host, int(port)))
            return True
    except OSError:
        return False


def head_address(config: Config) -> str:
    """Where the head of the cluster listens for the other machines. Raises ConfigError where there is no cluster."""
    if config.ray.head is None:
        raise ConfigError("there are no machines in the settings: nodes and ray.head name them")
    return f"{config.nodes[config.ray.head].address}:{config.ray.port or PORT}"


def address_of(machine: Node) -> str:
    """A machine's address in numbers. Raises ConfigError."""
    try:
        address = socket.gethostbyname(machine.address)
    except OSError:
        raise ConfigError(f"the address {machine.address!r} of `nodes` is not known here; give it in numbers") from None
    if address.startswith("127.") and address != machine.address:
        raise ConfigError(f"{machine.address!r} means {address} here, where no other machine is: give it in numbers")
    return address


def own_name(config: Config) -> str:
    """Which of the machines of the settings this one is. Raises ConfigError where it is none of them, or several."""
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    names = [name for name, machine in config.nodes.items() if address_of(machine) in own]
    if len(names) != 1:
        found = f"{' and '.join(names)} both have an address" if names else "no machine of `nodes` has an address"
        raise ConfigError(f"{found} of this one ({', '.join(sorted(own))}): say which it is: nexus node start NAME")
    return names[0]


def seen_here(config: Config, name: str) -> Inventory:
    """What this machine has, while nothing of ours runs on it."""
    machine = config.nodes[name]
    return Inventory((look(name, machine.address, disks=machine.disks),))


def free_gpus(config: Config, name: str) -> tuple[int, ...]:
    """Of this machine's GPUs those described that nobody computes on, while nothing of ours does."""
    return usable_gpus(real(configured(config), seen_here(config, name))[name])


def _of_gpus(gpus: Sequence[int]) -> dict[str, str]:
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}


def describe_node(name: str, machine: Node, gpus: Sequence[int]) -> list[str]:
    """What `ray start` is told of a machine: its names, and what Ray may give away of it."""
    labels = {**machine.labels, NODE_LABEL: name}
    if gpus:
        labels[GPUS_LABEL] = "-".join(map(str, gpus))
    return [
        f"--node-name={name}", f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
        f"--num-cpus={int(machine.cpus)}", f"--num-gpus={len(gpus)}",
    ]  # fmt: skip


def _new_instance(home: Path, ray_address: str, **fields: Any) -> Instance:
    usual: dict[str, Any] = {"url": "", "dashboard": "", "vectors_port": 0}
    return Instance(
        id=uuid.uuid4().hex, session=0, boot_id=_boot_id(), ray_address=ray_address, ray_folder=_ray_folder(home),
        started_at=time.time(), **{**usual, **fields},
    )  # fmt: skip


def _start_node(
    config: Config, instance: Instance, command: Sequence[str], environment: Mapping[str, str], record: Record
) -> Instance:
    """Run `ray start`, and record it from before it begins. Raises Unavailable, with nothing left running."""
    home = Path(config.home)
    shutil.rmtree(instance.ray_folder, ignore_errors=True)  # its logs were kept until now
    (home / "logs").mkdir(exist_ok=True)
    _record(home, instance, record)
    listen, grpc, runtime, metrics = free_ports(4)
    full = [
        sys.executable, "-m", "cluster.bootstrap", "start", "--disable-usage-stats", *command,
        f"{AGENT_PORT}{listen}", f"--dashboard-agent-grpc-port={grpc}",
        f"--runtime-env-agent-port={runtime}", f"--metrics-export-port={metrics}",
        f"--object-store-memory={config.ray.object_store_bytes}", f"--temp-dir={instance.ray_folder}",
        "--include-log-monitor=False",
    ]  # fmt: skip
    log_file = home / "logs" / ("ray-head.log" if record == "instance" else "ray-node.log")
    with log_file.open("wb") as log:
        starter = subprocess.Popen(
            full, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        instance = replace(instance, session=starter.pid)
        _record(home, instance, record)
        try:
            failed = starter.wait(START_SECONDS) != 0
        except subprocess.TimeoutExpired:
            failed = True
    if failed:
        stop(home, record)
        if any(word in log_file.read_text(errors="replace") for word in TOKEN_REFUSED):
            raise ConfigError(
                f"the head at {instance.ray_address} refuses the token in {home / 'ray-token'}: copy that of the head"
            )
        what = "head" if record == "instance" else "node"
        raise Unavailable(f"the Ray {what} did not start; {log_file} says why")
    return instance


# ── what has ended of a head ────────────────────────────────────────────────────────────────────


def living(instance: Instance) -> set[str]:
    """Which of the processes live that matter: Ray's state server (at the head) and its raylet."""
    return set(_commands_of(instance)) & {STATE_SERVER, RAYLET}


def _commands_of(instance: Instance) -> dict[str, list[str]]:
    """The command lines of those of its processes that can be started again, as far as they live."""
    found = {}
    for process in processes_of(instance):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if any(DASHBOARD in word for word in command):
                found[DASHBOARD] = command
            elif process.name() in (STATE_SERVER, RAYLET):
                found[process.name()] = command
    return found


def environment_of_head(home: Path) -> dict[str, str]:
    """The environment that the running head was started with. Raises Unavailable where none was."""
    return {**os.environ, **_recall(home)["environment"]}


def revive(home: Path, instance: Instance) -> None:
    """Start again what has ended of a cluster's head, as it was started before. Raises Unavailable.

    It has the state that it had: the other machines, and what runs on them, take it for the same; what ran under the
    raylet that ended is started again by Ray. The caller holds the home's lock.
    """
    remembered = _recall(home)
    commands, alive = remembered["commands"], _commands_of(instance)
    if not {STATE_SERVER, RAYLET} <= set(commands):
        raise Unavailable("it is not recorded how the head was started")
    if instance.boot_id != _boot_id():
        instance = replace(instance, boot_id=_boot_id(), session=0, revived=())
    for name in (STATE_SERVER, RAYLET, DASHBOARD):
        if name in alive or name not in commands:
            continue
        command = commands[name]
        if name == RAYLET:
            _end(instance, OUTLIVE_A_RAYLET, patience=0.1)  # what the raylet had started is lost
            command = _renamed(command)
        process = _start_again(home, command, remembered["environment"])
        instance = replace(instance, revived=(*instance.revived, (process.pid, time.time())))
        _record(home, instance)
        if name != DASHBOARD:
            _await_answer(process, instance.ray_address if name == STATE_SERVER else _option(command, RAYLET_SOCKET))


def _renamed(raylet: Sequence[str]) -> list[str]:
    """The command of a raylet for a node that Ray has not known yet, for it takes back none; with room to listen."""
    for name in (RAYLET_SOCKET, STORE_SOCKET):
        Path(_option(raylet, name)).unlink(missing_ok=True)
    before = _option(raylet, RAYLET_ID)
    after = secrets.token_hex(len(before) // 2)
    return [word.replace(before, after) for word in raylet]


def _option(command: Sequence[str], name: str) -> str:
    return next(word.partition("=")[2] for word in command if word.startswith(f"{name}="))


def _start_again(home: Path, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    with (home / "logs" / "ray-head.log").open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip


def _await_answer(process: "subprocess.Popen[bytes]", address: str) -> None:
    """Return once something listens at this port, or socket's path. Raises Unavailable when the process has ended."""
    ends = time.monotonic() + START_SECONDS
    while not _answers(address):
        if process.poll() is not None or time.monotonic() > ends:
            raise Unavailable(f"nothing listens at {address} again")
        time.sleep(LOOK_SECONDS)


def _remember(home: Path, environment: Mapping[str, str], commands: Mapping[str, Sequence[str]]) -> None:
    """How the head was started, for whoever has to start a part of it again; with the token."""
    part = home / "run" / "head.json.part"
    part.touch(0o600)
    part.write_text(json.dumps({"environment": dict(environment), "commands": commands}))
    part.replace(home / "run" / "head.json")


def _recall(home: Path) -> dict[str, Any]:
    try:
        remembered: dict[str, Any] = json.loads((home / "run" / "head.json").read_text())
        return remembered
    except (FileNotFoundError, json.JSONDecodeError):
        raise Unavailable("it is not recorded how the head was started: `nexus down`, then `nexus up`") from None


def _ray_folder(home: Path) -> str:
    """Under the home where Ray's socket paths fit there, else a short folder of its own."""
    folder = home / "run" / "ray"
    longest = folder / "session_2026-01-01_00-00-00_000000_0000000" / "sockets" / "plasma_store"
    if len(str(longest)) < MAX_SOCKET_PATH:
        return str(folder)
    return f"{tempfile.gettempdir()}/nexus-{os.getuid()}-{digest(str(home))[:8]}"


# ── a process that starts a node ────────────────────────────────────────────────────────────────


def ray_start() -> None:
    """`ray start`, for a raylet that does not wait for its dashboard agent.

    Ray's own raylet waits 15 s for the agent to write down where it listens, and then ends itself. On a busy machine
    no agent starts in that time, nor does it at the next attempt: https://github.com/ray-project/ray/issues/65983.
    Whoever starts a node here chose that port. Ray tells the agent alone; here its raylet is told, too.
    """
    from ray._private import ray_constants, services
    from ray.scripts.scripts import cli

    (port,) = (word.removeprefix(AGENT_PORT) for word in sys.argv if word.startswith(AGENT_PORT))
    start = services.start_ray_process

    def start_process(command: list[str], process_type: str, *arguments: Any, **named: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_RAYLET:
            command = [*command, f"--dashboard_agent_listen_port={port}"]
        return start(command, process_type, *arguments, **named)

    services.start_ray_process = start_process
    cli()


if __name__ == "__main__":
    ray_start()
