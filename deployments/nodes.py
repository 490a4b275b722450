"""`nexus node …`: the machines of the cluster: join one, drain it, take it out."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import bootstrap, certificates
from cluster.bootstrap import RAYLET
from cluster.inventory import configured, differences
from cluster.plan import DRAINED, KEY, decode, encode, make_way
from deployments import running
from deployments.auditing import recorded, recorded_if_possible
from deployments.driver import become_driver
from nexus.config import Config, load_config
from nexus.errors import AlreadyRunning, ConfigError, InvalidRequest, NexusError, NotFound, Unavailable
from nexus.keyring import write_private

if TYPE_CHECKING:
    from deployments.machines import Joined

DRAIN_SECONDS = 600.0
LOOK_SECONDS = 1.0
REPLICA = "SERVE_REPLICA::"  # begins the names of Serve's replicas

app = typer.Typer(help="The machines of the cluster.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Settings = Annotated[Path | None, typer.Option("--config", help="A nexus.yaml; default: the one in the home, if any.")]
Name = Annotated[str, typer.Argument(help="The machine, as `nodes` calls it.")]


# ── on the machine itself ───────────────────────────────────────────────────────────────────────


@app.command()
def start(
    name: Annotated[str | None, typer.Argument(help="Default: the one that has this machine's address.")] = None,
    config: Settings = None,
    token_file: Annotated[
        Path | None, typer.Option(help="The cluster's token: a copy of `ray-token` in the home of the head.")
    ] = None,
    certificate_file: Annotated[
        Path | None, typer.Option(help="With ray.tls: what `nexus node certificate` made for this machine.")
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Stay, and join again whenever Ray ended; for systemd.")] = False,
) -> None:
    """Join this machine to the cluster whose head `nexus up` started."""
    settings = load_config(config)
    home = Path(settings.home)
    name = which(settings, name)
    bootstrap.prepare_home(home)
    keep_token(home, token_file)
    if certificate_file is not None:
        certificates.keep(home, _read(certificate_file).encode())
    with recorded(settings, "nexus node start", name):
        if not stay:
            _join(settings, name)
            return
        with running.stopped_by_signals(lambda: bootstrap.stop(home, "node")):
            running.tell_systemd(f"READY=1\nSTATUS=joining {bootstrap.head_address(settings)}")
            _keep_joined(settings, name)
    typer.echo(f"{name} has left the cluster.")


def which(settings: Config, name: str | None) -> str:
    """The machine that this one is. Raises ConfigError, NotFound, InvalidRequest."""
    bootstrap.head_address(settings)
    name = bootstrap.own_name(settings) if name is None else name
    if name not in settings.nodes:
        raise NotFound(f"there is no machine {name!r}: `nodes` has {', '.join(settings.nodes)}")
    if name == settings.ray.head:
        raise InvalidRequest(f"{name} is the head's machine: `nexus up` starts its node")
    return name


def keep_token(home: Path, token_file: Path | None, environment: Mapping[str, str] = os.environ) -> None:
    """See to it that the cluster's token is in the home, where it was given here. Raises ConfigError without one."""
    given = environment.get("RAY_AUTH_TOKEN", "")
    if token_file is not None:
        given = _read(token_file)
    bootstrap.keep_token(home, given.strip())


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from None


def _join(settings: Config, name: str, again: bool = False) -> None:
    """Join the cluster, unless that is done; `again`: unless `nexus node stop` came before."""
    home = Path(settings.home)
    with bootstrap.lock_home(home):
        instance = bootstrap.find_instance(home, "node")
        if again and instance is None:
            return
        if _is_joined(instance, name):
            typer.echo(f"{name} is in the cluster already")
            return
        for difference in differences(configured(settings), bootstrap.seen_here(settings, name)):
            if difference.node == name:
                _tell(difference.sentence)
        instance = bootstrap.join_head(settings, name)
    typer.echo(f"{name} has joined {instance.ray_address}; it leaves with nexus node stop")


def _is_joined(instance: bootstrap.Instance | None, name: str) -> bool:
    return instance is not None and instance.node == name and RAYLET in bootstrap.living(instance)


def _keep_joined(settings: Config, name: str) -> None:
    """Join, and again whenever this machine's raylet has ended, for ever; return when `nexus node stop` ended it."""
    home, pause, was_joined = Path(settings.home), 0.0, False
    while True:
        instance = bootstrap.find_instance(home, "node")
        if was_joined and instance is None:
            return
        if _is_joined(instance, name):
            was_joined, pause = True, 0.0
            time.sleep(LOOK_SECONDS)
            continue
        time.sleep(pause)
        try:
            _join(settings, name, again=was_joined)
        except AlreadyRunning:  # somebody starts or stops it just now
            time.sleep(LOOK_SECONDS)
        except NexusError as error:  # and no record is left
            was_joined, pause = False, running.longer(pause)
            _tell(f"{error.message}; again in {pause:.0f} s")


@app.command()
def stop() -> None:
    """Take this machine out of the cluster: end what `nexus node start` started, and nothing else."""
    settings = load_config()
    home = Path(settings.home)
    if not home.is_dir():
        typer.echo("This machine was in no cluster.")
        return
    bootstrap.prepare_home(home)
    with bootstrap.lock_home(home), recorded_if_possible(settings, "nexus node stop"):
        was_there = bootstrap.stop(home, "node")
    typer.echo("This machine has left the cluster." if was_there else "This machine was in no cluster.")


# ── on the head's machine ───────────────────────────────────────────────────────────────────────


@app.command("list")
def list_machines(as_json: Json = False) -> None:
    """The machines: whether they are there, drained, and which of their GPUs Ray was given."""
    settings, _ = _connect()
    rows = asyncio.run(_rows(settings))
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        gpus = f"{len(row['gpus'])} of {row['described_gpus']} GPUs"
        role = ", the head" if row["is_head"] else ""
        typer.echo(f"{row['node']:<16} {row['address']:<22} {row['state']:<8} {gpus}{role}")


async def _rows(settings: Config) -> list[dict[str, Any]]:
    from actors.coordinator import connect
    from deployments.machines import joined

    there = {machine.name: machine for machine in joined()}
    try:
        found = await (await connect()).range(DRAINED, fresh=False)
    except Unavailable as error:
        _tell(f"which machines are drained is not known: {error.message}")
        found = []
    return rows_of(settings, there, {key.removeprefix(DRAINED) for key, _, _ in found})


def rows_of(settings: Config, there: "Mapping[str, Joined]", drained: set[str]) -> list[dict[str, Any]]:
    """What `nexus node list --json` prints: those described, then those that are only there."""
    names = [*settings.nodes, *(name for name in there if name not in settings.nodes)]
    rows = []
    for name in names:
        machine, described = there.get(name), settings.nodes.get(name)
        state = "away" if machine is None else "drained" if name in drained else "there"
        rows.append(
            {
                "node": name,
                "address": machine.address if machine else described.address if described else "",
                "state": state,
                "is_alive": machine is not None,
                "is_drained": name in drained,
                "is_described": described is not None,
                "is_head": name == settings.ray.head,
                "gpus": list(machine.gpus) if machine else [],
                "described_gpus": sum(entry.count for entry in described.gpus) if described else 0,
            }
        )
    return rows


@app.command()
def certificate(
    name: Name,
    file: Annotated[Path, typer.Argument(help="Where to write it; it is as secret as `ray-token`.")],
    config: Settings = None,
) -> None:
    """Make a machine the certificate that it needs where ray.tls is set; on the head's machine."""
    settings = load_config(config)
    _require_described(settings, name)
    home = Path(settings.home)
    with recorded(settings, "nexus node certificate", name):
        if not file.parent.is_dir() or file.is_dir():
            raise InvalidRequest(f"{file} cannot be written: name a file in a folder that is there")
        write_private(file, certificates.issue(home, name, settings.nodes[name].address))
    typer.echo(f"{file} is for {name} alone: carry it there, and nexus node start --certificate-file {file.name}")


@app.command()
def drain(
    name: Name,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait until nothing runs there.")] = DRAIN_SECONDS,
) -> None:
    """Move all work away from a machine; then it can be stopped. Returns once no replica runs there."""
    settings, instance = _connect()
    _require_described(settings, name)
    if name == settings.ray.head:
        raise InvalidRequest(f"{name} is the head's machine, with the stores on its disk: it cannot be drained")
    deadline = time.monotonic() + wait
    with bootstrap.lock_home(Path(settings.home)), recorded(settings, "nexus node drain", name):
        was_drained = asyncio.run(_mark(name, is_drained=True))
        try:
            _deploy(settings, instance, deadline)
        except NexusError:
            if not was_drained:
                asyncio.run(_mark(name, is_drained=False))
            raise
    asyncio.run(_hand_over(name))
    asyncio.run(_await_idle(name, deadline))
    typer.echo(f"{name} is drained, and stays so until `nexus node resume {name}`; `nexus node stop` there stops it")


@app.command()
def resume(
    name: Name,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait until all is in its place.")] = DRAIN_SECONDS,
) -> None:
    """Let work go to a drained machine again."""
    settings, instance = _connect()
    _require_described(settings, name)
    with bootstrap.lock_home(Path(settings.home)), recorded(settings, "nexus node resume", name):
        was_drained = asyncio.run(_mark(name, is_drained=False))
        asyncio.run(_make_way(name))
        _deploy(settings, instance, time.monotonic() + wait)
    typer.echo(f"{name} takes work again" if was_drained else f"{name} was not drained")


def _connect() -> tuple[Config, bootstrap.Instance]:
    """The settings of the Nexus that runs here, and itself, once this process is a driver of its Ray."""
    home = Path(load_config().home)
    recorded = bootstrap.find_instance(home)
    if recorded is not None and bootstrap.processes_of(recorded) and not running.is_whole(recorded):
        raise Unavailable("a part of Ray has ended here, which would not answer; `nexus up` starts it again")
    settings = load_config(Path(recorded.config_file) if recorded and recorded.config_file else None)
    instance = become_driver(settings, "deployments.cli", sys.argv[1:])
    bootstrap.head_address(settings)
    import ray

    ray.init(address=instance.ray_address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    return settings, instance


def _require_described(settings: Config, name: str) -> None:
    if name not in settings.nodes:
        raise NotFound(f"there is no machine {name!r}: `nodes` has {', '.join(settings.nodes)}")


async def _mark(name: str, is_drained: bool) -> bool:
    """Whether it was drained before."""
    from actors.coordinator import connect

    client = await connect()
    if not is_drained:
        return await client.delete(f"{DRAINED}{name}")
    if await client.get(f"{DRAINED}{name}"):
        return True
    await client.put(f"{DRAINED}{name}", b"")
    return False


async def _make_way(name: str) -> None:
    """Let the next plan have replicas for a machine that takes work again."""
    from actors.coordinator import connect

    client = await connect()
    if kept := await client.get(KEY):
        await client.compare_and_set(KEY, kept[1], encode(make_way(decode(kept[0]), name)))


def _deploy(settings: Config, instance: bootstrap.Instance, deadline: float) -> None:
    file = Path(instance.config_file) if instance.config_file else None
    environment = bootstrap.environment_of_head(Path(settings.home))
    running.deploy(settings, instance, environment, file, deadline, _tell)


async def _hand_over(name: str) -> None:
    """Where the voter that leads the coordinator is on this machine, let another lead, elsewhere."""
    from actors.coordinator import NAME, connect
    from deployments.machines import actors_on

    here = {int(actor.removeprefix(NAME)) for actor in actors_on(name) if actor.startswith(NAME)}
    client = await connect()
    leader = await client.leader()
    if leader.id in here and (others := sorted(leader.members.voters - here)):
        await client.transfer(others[0])


async def _await_idle(name: str, deadline: float) -> None:
    """Return once no replica runs on the machine. Raises Unavailable at the deadline."""
    from deployments.machines import actors_on

    while left := [actor.removeprefix(REPLICA) for actor in actors_on(name) if actor.startswith(REPLICA)]:
        if time.monotonic() > deadline:
            raise Unavailable(f"{name} is drained, but has {', '.join(left)} still; each ends once its work is done")
        await asyncio.sleep(LOOK_SECONDS)


def _tell(sentence: str) -> None:
    typer.echo(sentence, err=True)
