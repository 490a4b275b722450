"""What `up` and `down` lean on: the home, its lock, ports, and which processes are ours."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import bootstrap
from cluster.bootstrap import Instance
from nexus.config import Config
from nexus.errors import AlreadyRunning, ConfigError, Unavailable
from tests.running import ROOT, until

CHILD = "import sys; print('up', flush=True); sys.stdin.read()"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    bootstrap.prepare_home(tmp_path / "home")
    return tmp_path / "home"


def instance(**fields: object) -> Instance:
    some = Instance(
        "i" * 32, 0, bootstrap._boot_id(), "http://x", "127.0.0.1:1", "http://y", 1, "/nonexistent", time.time()
    )
    return replace(some, **fields)


def start(**arguments: object) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **arguments)
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    return child


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def test_a_home_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="NEXUS_HOME"):
        bootstrap.prepare_home(tmp_path / "file" / "home")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        bootstrap.prepare_home(tmp_path / "home")


HOLDER = """
import sys
from pathlib import Path
from cluster import bootstrap
with bootstrap.lock_home(Path(sys.argv[1])):
    print("up", flush=True)
    sys.stdin.read()
"""


def test_one_up_at_a_time_and_a_dead_one_blocks_nobody(home: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(home)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"up\n"
    with pytest.raises(AlreadyRunning), bootstrap.lock_home(home):
        pass
    end(holder)
    with bootstrap.lock_home(home):
        pass


def test_what_is_recorded_is_found_and_rubbish_is_not(home: Path) -> None:
    assert bootstrap.find_instance(home) is None
    bootstrap._record(home, instance())
    found = bootstrap.find_instance(home)
    assert found is not None and found.id == "i" * 32
    for rubbish in ("", "{", "[]", '{"id": 1}'):
        (home / "run" / "instance.json").write_text(rubbish)
        assert bootstrap.find_instance(home) is None


def test_stop_ends_exactly_the_processes_that_are_ours(home: Path) -> None:
    by_mark = start(env={**os.environ, bootstrap.INSTANCE: "mine"})
    by_session = start(start_new_session=True)
    stranger = start(env={**os.environ, bootstrap.INSTANCE: "another"})
    bootstrap._record(home, instance(id="mine", session=by_session.pid))
    assert bootstrap.stop(home)
    assert not psutil.pid_exists(by_mark.pid) and not psutil.pid_exists(by_session.pid)
    assert stranger.poll() is None
    assert not bootstrap.stop(home)
    for child in (by_mark, by_session, stranger):
        end(child)


def test_a_process_id_taken_over_by_a_stranger_is_left_alone(home: Path) -> None:
    stranger = start(start_new_session=True)
    bootstrap._record(home, instance(session=stranger.pid, started_at=time.time() - 3600))
    assert not bootstrap.stop(home)
    assert stranger.poll() is None
    bootstrap._record(home, instance(session=stranger.pid, boot_id="another boot"))
    assert not bootstrap.stop(home)
    end(stranger)


def test_a_port_in_use_is_named_with_the_setting_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use.*NEXUS_HTTP__PORT"):
            bootstrap.require_port(port, "http.port (NEXUS_HTTP__PORT)")
    bootstrap.require_port(port, "x")


def test_free_ports_are_all_different() -> None:
    assert len(set(bootstrap.free_ports(50))) == 50


def test_the_token_is_made_once_and_is_the_owners_alone(home: Path) -> None:
    token = bootstrap.ray_token(home)
    assert len(token) == 64 and bootstrap.ray_token(home) == token
    assert (home / "ray-token").stat().st_mode & 0o077 == 0


def test_the_environment_locks_ray_and_turns_the_throughput_flags_on(home: Path) -> None:
    environment = bootstrap.environment_of(Config(home=home), "id")
    wanted = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_ENABLE_HA_PROXY": "1",
              "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_AUTH_TOKEN": bootstrap.ray_token(home)}  # fmt: skip
    assert wanted.items() <= environment.items()
    ports = [value for name, value in environment.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports)


def test_deep_homes_get_a_short_ray_folder(tmp_path: Path) -> None:
    assert bootstrap._ray_folder(Path("/h")) == "/h/run/ray"
    assert len(bootstrap._ray_folder(tmp_path / ("x" * 90))) < 60


# ── what has ended of a head, with programs in the places of Ray's ──────────────────────────────

PROGRAM = """
import os, socket, sys
name, address, *rest = sys.argv[1:]
print(name, os.environ["NEXUS_INSTANCE"], *rest, flush=True)
path = address.partition("=")[2]
with socket.socket(socket.AF_UNIX if path else socket.AF_INET) as listening:
    listening.bind(path or ("127.0.0.1", int(address)))
    listening.listen()
    while True:
        listening.accept()
"""


OLD = "00ff" * 14  # a node's id


@pytest.fixture
def ended(home: Path, tmp_path: Path) -> Instance:
    """A head of which nothing lives, and what its processes were started with."""
    (port,) = bootstrap.free_ports(1)
    recorded = instance(id="mine", session=2**22 - 1, ray_address=f"127.0.0.1:{port}")
    bootstrap._record(home, recorded)
    (home / "logs").mkdir()
    (tmp_path / "socket").touch()  # left there
    program = [sys.executable, "-c", PROGRAM]
    commands = {
        bootstrap.STATE_SERVER: [*program, bootstrap.STATE_SERVER, str(port)],
        bootstrap.RAYLET: [
            *program, "raylet", f"--raylet_socket_name={tmp_path / 'socket'}",
            f"--store_socket_name={tmp_path / 'store'}",
            f"--node_id={OLD}", f"--worker=x --id {OLD}",
        ],
    }  # fmt: skip
    bootstrap._remember(home, {bootstrap.INSTANCE: "mine"}, commands)
    return recorded


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_what_has_ended_is_started_as_it_was_and_is_ours_to_stop(home: Path, ended: Instance) -> None:
    assert (home / "run" / "head.json").stat().st_mode & 0o077 == 0  # the token is in it
    worker = start(env={**os.environ, bootstrap.INSTANCE: "mine"})
    bootstrap.revive(home, ended)
    assert not psutil.pid_exists(worker.pid)  # what was left of those of the raylet that ended
    end(worker)
    server, raylet = (home / "logs" / "ray-head.log").read_text().splitlines()
    assert server == "gcs_server mine"
    name = raylet.rpartition(" ")[2]
    assert raylet.endswith(f"store --node_id={name} --worker=x --id {name}")
    assert name != OLD and len(name) == len(OLD)  # Ray gave that one up
    found = bootstrap.find_instance(home)
    assert found is not None and len(bootstrap.processes_of(found)) == len(found.revived) == 2
    assert bootstrap.stop(home)
    assert not any(psutil.pid_exists(session) for session, _ in found.revived)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_after_a_reboot_the_sessions_of_before_are_nobodys(home: Path, ended: Instance) -> None:
    stranger = start(start_new_session=True)
    bootstrap.revive(home, replace(ended, boot_id="another boot", session=stranger.pid))
    assert bootstrap.stop(home)
    assert stranger.poll() is None
    end(stranger)


def test_a_process_that_was_started_again_marks_what_is_ours_by_its_session(home: Path) -> None:
    ours, others = start(start_new_session=True), start(start_new_session=True)
    now, long_ago = time.time(), time.time() - 3600
    bootstrap._record(home, instance(revived=((ours.pid, now), (others.pid, long_ago))))
    assert bootstrap.stop(home)
    assert not psutil.pid_exists(ours.pid) and others.poll() is None
    for child in (ours, others):
        end(child)


@pytest.mark.parametrize("commands", [{}, {"raylet": ["x"]}, {"gcs_server": ["false"], "raylet": ["x"]}])
def test_what_does_not_start_again_is_said(home: Path, commands: dict[str, list[str]]) -> None:
    (port,) = bootstrap.free_ports(1)
    (home / "logs").mkdir()
    bootstrap._remember(home, {}, commands)
    with pytest.raises(Unavailable):
        bootstrap.revive(home, instance(ray_address=f"127.0.0.1:{port}"))


def test_how_a_head_was_started_is_known_only_where_one_was(home: Path) -> None:
    with pytest.raises(Unavailable, match="nexus down"):
        bootstrap.environment_of_head(home)
    bootstrap._remember(home, {"RAY_SOMETHING": "1"}, {})
    assert bootstrap.environment_of_head(home)["RAY_SOMETHING"] == "1"


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_those_that_outlive_a_raylet_keep_their_children(home: Path) -> None:
    environment = {**os.environ, bootstrap.INSTANCE: "mine"}
    command = [sys.executable, "-c", PARENT, "dashboard/dashboard.py"]
    dashboard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert dashboard.stdout is not None
    child = int(dashboard.stdout.readline())
    worker = start(env=environment)
    ours = instance(id="mine")
    assert bootstrap._end(ours, bootstrap.OUTLIVE_A_RAYLET)
    assert not psutil.pid_exists(worker.pid) and dashboard.poll() is None and psutil.pid_exists(child)
    assert bootstrap._end(ours)
    assert not psutil.pid_exists(child)
    for process in (dashboard, worker):
        end(process)


# ── a node whose agent takes its time ───────────────────────────────────────────────────────────


def is_agent(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.name() != "raylet" and any(word.endswith("dashboard/agent.py") for word in process.cmdline())
    return False


@pytest.mark.system
def test_a_node_starts_while_its_agent_does_not() -> None:
    """Ray's own waits 15 s for it and ends itself, which nobody gets past whose machine is busier than that."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "RAY_"))}
    ours = instance(id=uuid.uuid4().hex)
    more = {bootstrap.INSTANCE: ours.id, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on loopback
    port, listen, grpc, runtime, metrics = bootstrap.free_ports(5)
    with (
        tempfile.TemporaryDirectory(prefix="nxb", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [
                sys.executable, "-m", "cluster.bootstrap", "start", "--head", "--node-ip-address=127.0.0.1",
                f"--port={port}", f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}",
                f"--runtime-env-agent-port={runtime}", f"--metrics-export-port={metrics}", "--num-cpus=1",
                "--include-dashboard=false", "--no-monitor", f"--object-store-memory={100 * 2**20}",
                f"--temp-dir={folder}", "--disable-usage-stats",
            ],
            cwd=ROOT, env={**kept, **more, **bootstrap.STARTING}, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            start_new_session=True,
        ) as begun,
    ):  # fmt: skip
        try:
            until(60, lambda: any(map(is_agent, bootstrap.processes_of(ours))), longest_pause=0.05)
            next(filter(is_agent, bootstrap.processes_of(ours))).suspend()
            begun.wait(150)
            said.seek(0)
            assert begun.returncode == 0, said.read()
            assert not list(Path(folder).glob("session_2*/dashboard_agent_listen_port_*")), "it was suspended too late"
        finally:
            bootstrap._end(ours)
