"""`nexus coordinator …`: the voters who keep what the machines agree on."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import bootstrap
from deployments.auditing import recorded
from deployments.client import Client
from nexus.config import load_config
from nexus.errors import AlreadyRunning, InvalidRequest

CHANGE_SECONDS = 180.0  # a new voter has to start, and to learn all there is

app = typer.Typer(help="The voters who keep what the machines agree on.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Number = Annotated[int, typer.Argument(min=1, help="The voter's number.")]


@app.command()
def status(as_json: Json = False) -> None:
    """Each voter's role, term, commit and lag. Exit code 1 where none leads."""
    with Client() as nexus:
        shown = nexus.call("GET", "/coordinator")[1]
    typer.echo(json.dumps(shown) if as_json else lines(shown))
    raise typer.Exit(0 if any(voter["role"] == "leader" for voter in shown["voters"]) else 1)


@app.command()
def add(
    number: Number,
    label: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, a label that its machine must have; repeatable.")
    ] = None,
) -> None:
    """Add a voter under a number that was never used; returns once it votes."""
    labels = dict(one.partition("=")[::2] for one in label or ())
    if len(labels) < len(label or ()) or not all(key and value for key, value in labels.items()):
        raise InvalidRequest("a label is given as KEY=VALUE, each KEY once")
    _ask("POST", "/coordinator/voters", {"id": number, "labels": labels})


@app.command()
def remove(number: Number) -> None:
    """Remove a voter; if it leads, another does first."""
    _ask("DELETE", f"/coordinator/voters/{number}")


@app.command()
def transfer(number: Number) -> None:
    """Make this voter lead, as before its leader's machine is taken down."""
    _ask("POST", "/coordinator/transfer", {"to": number})


@app.command()
def snapshot(file: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Keep all that the voters agree on in a file."""
    from cluster import backup

    with Client() as nexus:
        content = nexus.download("POST", "/coordinator/snapshot")
    backup.read(content)  # what is not whole takes no older one's place
    draft = Path(f"{file}.new")
    try:
        draft.touch(0o600)
        draft.write_bytes(content)
        draft.replace(file)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise InvalidRequest(f"{file} cannot be written: {error.strerror}") from None
    typer.echo(f"{file}: {len(content)} bytes")


@app.command()
def restore(file: Annotated[Path, typer.Argument(help="What `nexus coordinator snapshot` wrote.")]) -> None:
    """Begin anew from a snapshot, with one voter: for when most of the disks are lost. Nexus must be down."""
    from actors import coordinator  # with all of Ray: not at every start of the command line
    from cluster import backup

    try:
        held = backup.read(file.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    config = load_config()
    home = Path(config.home)
    bootstrap.prepare_home(home)
    with bootstrap.lock_home(home):
        if bootstrap.is_running(home):
            raise AlreadyRunning("Nexus runs: `nexus down` first, on every machine")
        with recorded(config, "nexus coordinator restore", str(file)):
            aside = coordinator.restore(held, home / coordinator.FOLDER, config.voters)
    typer.echo("The coordinator begins from that snapshot at the next `nexus up`; add its other voters then.")
    if aside is not None:
        typer.echo(f"What was there before is kept in {aside}")


def _ask(method: str, path: str, body: dict[str, Any] | None = None) -> None:
    with Client() as nexus:
        typer.echo(lines(nexus.call(method, path, json=body, timeout=CHANGE_SECONDS)[1]))


def lines(shown: dict[str, Any]) -> str:
    """What `GET /coordinator` answers, for people."""
    return "\n".join([f"  {'coordinator':<12} {shown['summary']}", *map(_line, shown["voters"])])


def _line(voter: dict[str, Any]) -> str:
    if voter["role"] == "absent":
        return f"    voter {voter['id']:<6} absent: {voter['why']}"
    return (
        f"    voter {voter['id']:<6} {voter['role']:<9} term {voter['term']}, commit {voter['commit']}, "
        f"lag {voter['lag']}"
    )
