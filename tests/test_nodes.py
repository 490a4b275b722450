"""Machines joining and leaving, as far as it goes without Ray: which one this is, what is started, and when again."""

import configparser
import json
import os
import shlex
import signal
import socket
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from cluster import bootstrap
from cluster.bootstrap import RAYLET, STATE_SERVER, Instance
from cluster.inventory import Gpu, Inventory
from cluster.inventory import Node as Seen
from deployments import cli, machines, nodes, running
from deployments.machines import Joined
from nexus.config import Config
from nexus.errors import AlreadyRunning, ConfigError, InvalidRequest, NotFound, Unavailable
from tests.running import ROOT
from tests.test_inventory import load_module

UNITS = ROOT / "deployments" / "systemd"
NVML = ROOT / "tests" / "nvml"
GIB = 2**30
Address = namedtuple("Address", "address")


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    described = {
        "witness": {"address": "10.0.0.3", "cpus": 2, "memory": "1GiB"},
        "sark": {
            "address": "10.0.0.1", "cpus": 1.5, "memory": "1GiB", "labels": {"rack": "a"},
            "gpus": [{"model": "H100", "memory": "80GiB", "count": 3}],
        },
        "clu": {"address": "10.0.0.2", "cpus": 2, "memory": "1GiB"},
    }  # fmt: skip
    config = Config(home=tmp_path, nodes=described, ray={"head": "witness"})
    bootstrap.prepare_home(tmp_path)
    return config


def has_addresses(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [Address("127.0.0.1")], "eth0": map(Address, addresses)})


# ── which machine this is ───────────────────────────────────────────────────────────────────────


def test_a_machine_is_the_one_that_has_its_address(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    has_addresses(monkeypatch, "192.168.7.7", "10.0.0.2")
    assert nodes.which(settings, None) == "clu"
    assert nodes.which(settings, "sark") == "sark"  # who says so is believed


@pytest.mark.parametrize("own", [("10.0.0.9",), ("10.0.0.1", "10.0.0.2")])
def test_where_that_is_none_or_several_the_name_has_to_be_said(
    own: tuple[str, ...], settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_addresses(monkeypatch, *own)
    with pytest.raises(ConfigError, match="nexus node start NAME"):
        nodes.which(settings, None)


def test_only_described_machines_join_and_the_heads_has_joined(settings: Config, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"tron.*sark"):
        nodes.which(settings, "tron")
    with pytest.raises(InvalidRequest, match="nexus up"):
        nodes.which(settings, "witness")
    with pytest.raises(ConfigError, match=r"nodes and ray\.head"):
        nodes.which(Config(home=tmp_path), "sark")


def test_a_name_that_means_this_machine_alone_is_no_address(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = settings.nodes["clu"]
    monkeypatch.setattr(socket, "gethostbyname", {"clu": "127.0.1.1", "10.0.0.2": "10.0.0.2"}.__getitem__)
    assert bootstrap.address_of(machine) == "10.0.0.2"
    with pytest.raises(ConfigError, match=r"127\.0\.1\.1"):
        bootstrap.address_of(machine.model_copy(update={"address": "clu"}))


def test_a_name_that_nobody_knows_is_said(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(name)

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    with pytest.raises(ConfigError, match="clu"):
        bootstrap.address_of(settings.nodes["clu"].model_copy(update={"address": "clu"}))


# ── what is started ─────────────────────────────────────────────────────────────────────────────


def test_ray_is_told_what_the_machine_is_called_and_what_it_may_give_away(settings: Config) -> None:
    told = bootstrap.describe_node("sark", settings.nodes["sark"], (0, 2))
    assert told == [
        "--node-name=sark", "--labels=rack=a,nexus.io/node=sark,nexus.io/gpus=0-2", "--num-cpus=1", "--num-gpus=2",
    ]  # fmt: skip
    assert bootstrap.describe_node("clu", settings.nodes["clu"], ())[1:] == [
        "--labels=nexus.io/node=clu", "--num-cpus=2", "--num-gpus=0",
    ]  # fmt: skip


def test_gpus_that_somebody_computes_on_or_that_are_not_described_are_left_out(
    settings: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stranger = {"pid": os.getpid(), "memory": 30 * GIB}
    gpu = {"name": "NVIDIA H100 80GB HBM3", "total": 80 * GIB}
    file = tmp_path / "nvml.json"
    file.write_text(json.dumps({"gpus": [gpu, gpu | {"used": 30 * GIB, "compute": [stranger]}, gpu, gpu]}))
    monkeypatch.setitem(sys.modules, "pynvml", load_module(NVML / "pynvml.py"))
    monkeypatch.setenv("FAKE_NVML", str(file))
    assert bootstrap.free_gpus(settings, "sark") == (0, 2)


def test_the_state_of_a_cluster_is_kept_and_a_single_machine_stays_on_loopback(
    settings: Config, tmp_path: Path
) -> None:
    alone, many = (bootstrap.access_of(config) for config in (Config(home=tmp_path), settings))
    assert alone["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and not any("health" in name for name in alone)
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in many and int(many["RAY_health_check_failure_threshold"]) > 1
    assert alone["RAY_AUTH_TOKEN"] == many["RAY_AUTH_TOKEN"] == bootstrap.ray_token(tmp_path)


def test_nobody_answers_where_no_head_is(settings: Config) -> None:
    here = settings.nodes["witness"].model_copy(update={"address": "127.0.0.1"})
    port = bootstrap.free_ports(1)[0]
    alone = settings.model_copy(
        update={"nodes": {**settings.nodes, "witness": here}, "ray": settings.ray.model_copy(update={"port": port})}
    )
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port}.*is Nexus up there"):
        bootstrap.join_head(alone, "clu")
    assert bootstrap.find_instance(Path(alone.home), "node") is None


# ── the token ───────────────────────────────────────────────────────────────────────────────────


def test_a_token_that_is_given_is_kept_for_the_owner_alone(tmp_path: Path) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    bootstrap.prepare_home(home)
    copy.write_text("from a file\n")
    nodes.keep_token(home, None, {"RAY_AUTH_TOKEN": "from the environment"})
    assert (home / "ray-token").read_text() == "from the environment"
    nodes.keep_token(home, copy, {"RAY_AUTH_TOKEN": "from the environment"})
    assert (home / "ray-token").read_text() == "from a file"
    assert (home / "ray-token").stat().st_mode & 0o077 == 0
    nodes.keep_token(home, None, {})
    assert (home / "ray-token").read_text() == "from a file"


def test_without_a_token_it_is_said_where_to_get_it_and_none_is_made(tmp_path: Path) -> None:
    bootstrap.prepare_home(tmp_path)
    with pytest.raises(ConfigError, match="ray-token from the home of the head"):
        nodes.keep_token(tmp_path, None, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        nodes.keep_token(tmp_path, tmp_path / "nothing", {})
    assert not (tmp_path / "ray-token").exists()


# ── what has to be started again ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alive", [{RAYLET}, {STATE_SERVER}, set(), {RAYLET, STATE_SERVER}])
def test_a_head_is_whole_with_its_raylet_and_its_state_server(alive: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "living", lambda instance: alive)
    assert running.is_whole(SOME) == (len(alive) == 2)


def test_pauses_grow_to_a_minute() -> None:
    pauses, pause = [], 0.0
    for _ in range(8):
        pause = running.longer(pause)
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


class Ended(BaseException):
    """The story is over, and nobody asked for it to be."""


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept, without sleeping; a story that does not end fails."""
    slept: list[float] = []

    def nap(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > 50:
            raise Ended

    monkeypatch.setattr(running.time, "sleep", nap)
    return slept


SOME = Instance("i" * 32, 0, "boot", "http://x", "10.0.0.3:6379", "http://y", 1, "/nonexistent", 0.0, node="clu")


def tell_story(monkeypatch: pytest.MonkeyPatch, *lives: set[str] | None) -> None:
    """`find_instance` and `living` say one after another what is told; None: no record."""
    story = iter(lives)
    now: list[Any] = [None]

    def find(home: Path, record: str = "instance") -> Instance | None:
        now[0] = next(story)
        return None if now[0] is None else SOME

    monkeypatch.setattr(bootstrap, "find_instance", find)
    monkeypatch.setattr(bootstrap, "living", lambda instance: now[0])


ALL: set[str] = {RAYLET, STATE_SERVER}


def test_who_stays_starts_again_what_ended_and_leaves_when_it_was_stopped(
    settings: Config, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def ensure(*arguments: object) -> tuple[Instance, str]:
        calls.append("start")
        return SOME, "was healed"

    monkeypatch.setattr(running, "ensure_up", ensure)
    tell_story(monkeypatch, ALL, ALL, {RAYLET}, {RAYLET}, ALL, None)
    running.keep_up(settings, None, 1, 1, calls.append, lambda: calls.append("tend"))
    assert calls == ["tend", "tend", "start", "Nexus was healed at http://127.0.0.1:8000", "tend"]


def test_what_cannot_be_started_is_tried_again_after_longer_and_longer(
    settings: Config, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed start leaves no record, which `nexus down` does not either: that ends it only where nothing failed."""
    outcomes = iter([Unavailable("no"), Unavailable("no"), AlreadyRunning("busy"), None])

    def ensure(*arguments: object) -> tuple[Instance, str]:
        if error := next(outcomes):
            raise error
        return SOME, "started"

    monkeypatch.setattr(running, "ensure_up", ensure)
    said: list[str] = []
    tell_story(monkeypatch, set(), set(), None, None, None, None, None, None, ALL, None)
    running.keep_up(settings, None, 1, 1, said.append)
    assert said == ["no; again in 1 s", "no; again in 2 s", "Nexus started at http://127.0.0.1:8000"]
    assert [nap for nap in naps if nap] == [1, 2, running.LOOK_SECONDS, 2, running.LOOK_SECONDS]


def test_a_machine_joins_again_whenever_its_raylet_ended(
    settings: Config, naps: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = iter([Unavailable("no head"), None, AlreadyRunning("busy"), None])
    joined: list[bool] = []

    def join(config: Config, name: str, again: bool) -> None:
        joined.append(again)
        if error := next(outcomes):
            raise error

    monkeypatch.setattr(nodes, "_join", join)
    tell_story(monkeypatch, None, None, {RAYLET}, {RAYLET}, set(), set(), {RAYLET}, None)
    nodes._keep_joined(settings, "clu")
    assert joined == [False, False, True, True]
    assert capsys.readouterr().err == "no head; again in 1 s\n"


def test_who_was_stopped_meanwhile_does_not_join_again(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "join_head", lambda *arguments: pytest.fail("it joined"))
    nodes._join(settings, "clu", again=True)


def test_joining_twice_is_joining_once(
    settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_story(monkeypatch, {RAYLET})
    monkeypatch.setattr(bootstrap, "join_head", lambda *arguments: pytest.fail("it was started again"))
    nodes._join(settings, "clu")
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_work_and_then_all_is_stopped(number: signal.Signals) -> None:
    done: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with running.stopped_by_signals(lambda: done.append("stopped")):
        signal.raise_signal(number)
        done.append("not reached")
    assert done == ["stopped"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_stays_and_is_logged_does_not_say_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli._show_key("nx_live_secret", tmp_path / "admin-key", is_logged=True)
    assert "nx_live_secret" not in (said := capsys.readouterr().out) and str(tmp_path / "admin-key") in said
    cli._show_key("nx_live_secret", tmp_path / "admin-key", is_logged=False)
    assert "nx_live_secret" in capsys.readouterr().out


def test_systemd_is_told_where_it_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    running.tell_systemd("READY=1")  # nobody asks
    for address in (str(tmp_path / "notify"), f"@nexus-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            running.tell_systemd("READY=1")
            assert systemd.recv(100) == b"READY=1"


# ── nexus node list, and what a plan is made of ─────────────────────────────────────────────────


def test_the_list_has_those_described_and_those_that_came_all_the_same(settings: Config) -> None:
    there = {
        "witness": Joined("1", "witness", "10.0.0.3", ()), "sark": Joined("2", "sark", "10.0.0.1", (0, 2)),
        "tron": Joined("3", "tron", "10.0.0.9", ()),
    }  # fmt: skip
    rows = nodes.rows_of(settings, there, {"sark", "clu"})
    assert [(row["node"], row["state"], row["is_drained"]) for row in rows] == [
        ("witness", "there", False), ("sark", "drained", True), ("clu", "away", True), ("tron", "there", False),
    ]  # fmt: skip
    sark, tron = rows[1], rows[3]
    assert (sark["gpus"], sark["described_gpus"], sark["is_head"]) == ([0, 2], 3, False)
    assert (tron["is_described"], tron["address"]) == (False, "10.0.0.9")
    assert rows[0]["is_head"] and rows[2]["address"] == "10.0.0.2"


def test_a_plan_is_made_of_the_gpus_that_ray_was_given(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(Gpu(index, "NVIDIA H100", 80 * GIB) for index in range(3))
    seen = Inventory((Seen("sark", "10.0.0.1", 2, GIB, gpus), Seen("clu", "10.0.0.2", 2, GIB, gpus[:1])))
    monkeypatch.setattr(machines, "joined", lambda: [Joined("2", "sark", "10.0.0.1", (0, 2))])
    found = machines.plannable(settings, seen)
    assert {node.name: [gpu.index for gpu in node.gpus] for node in found.nodes} == {"sark": [0, 2], "clu": []}


def test_labels_say_which_gpus_ray_was_given() -> None:
    assert machines._joined("1", "x", {"nexus.io/node": "sark", "nexus.io/gpus": "0-11"}).gpus == (0, 11)
    assert machines._joined("1", "x", {"nexus.io/node": "sark"}).gpus == ()


# ── systemd ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("unit", sorted(UNITS.iterdir()), ids=lambda unit: unit.name)
def test_units_run_commands_that_there_are_and_kill_nothing_but_the_watcher(unit: Path) -> None:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment]
    read.read_string(unit.read_text())
    service = read["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert Path(program).name == "nexus" and "--stay" in arguments
    assert CliRunner().invoke(cli.app, [*arguments, "--help"]).exit_code == 0
    told = CliRunner().invoke(cli.app, [*(word for word in arguments if word != "--stay"), "--help"])
    assert "--stay" in told.output
    assert (service["Type"], service["KillMode"], service["Restart"]) == ("notify", "process", "on-failure")
    assert read["Install"]["WantedBy"] == "multi-user.target"


def test_a_node_and_a_head_in_one_home_are_stopped_apart(tmp_path: Path) -> None:
    bootstrap.prepare_home(tmp_path)
    for record in ("instance", "node"):
        bootstrap._record(tmp_path, replace(SOME, id=record), record)  # type: ignore[arg-type]
    assert not bootstrap.stop(tmp_path, "node")  # nothing runs
    assert bootstrap.find_instance(tmp_path, "node") is None
    left = bootstrap.find_instance(tmp_path)
    assert left is not None and left.id == "instance"
