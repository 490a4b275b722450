"""`nexus share …`: blocks shared between the machines, and who keeps them."""

import json
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from deployments.client import Client
from nexus.errors import InvalidRequest, NexusError

SHARE_SECONDS = 3_600.0
PIECE_BYTES = 2**20

app = typer.Typer(help="Blocks shared between the machines, and who keeps them.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DataId = Annotated[str, typer.Argument(help="The block's id.")]


@app.command()
def put(
    file: Annotated[Path, typer.Argument(help="What to share.")],
    data_id: Annotated[str | None, typer.Option("--id", help="By default the file's name.")] = None,
    metadata: Annotated[str, typer.Option(help="A JSON object that comes back with it.")] = "{}",
    media_type: Annotated[str, typer.Option(help="What it is.")] = "application/octet-stream",
    as_json: Json = False,
) -> None:
    """Share a file; returns when all its copies are on disks and verified."""
    try:
        size = file.stat().st_size
        with file.open("rb") as content, Client() as nexus:
            headers = {
                "content-type": media_type, "x-nexus-metadata": _in_ascii(metadata), "content-length": str(size),
            }  # fmt: skip
            path = _path(data_id or file.name)
            _, shown = nexus.call("PUT", path, content=_pieces(content), headers=headers, timeout=SHARE_SECONDS)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    typer.echo(json.dumps(shown) if as_json else _line(shown))


def _in_ascii(metadata: str) -> str:
    """The same JSON, as a header carries it; what is none goes there as it is, to be refused."""
    try:
        return json.dumps(json.loads(metadata))
    except (ValueError, RecursionError):
        return ascii(metadata)


def _pieces(content: Any) -> Iterator[bytes]:
    while piece := content.read(PIECE_BYTES):
        yield piece


@app.command()
def get(data_id: DataId, file: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Write a block's newest version into a file, whole or not at all."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        with Client() as nexus, draft.open("wb") as target:
            for piece in nexus.stream(_path(data_id), SHARE_SECONDS):
                target.write(piece)
        draft.replace(file)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            draft.unlink()
    typer.echo(f"{file}: {file.stat().st_size} bytes")


@app.command("list")
def list_blocks(as_json: Json = False) -> None:
    """All blocks of this key's tenant."""
    blocks: list[dict[str, Any]] = []
    after: str | None = ""
    with Client() as nexus:
        while after is not None:
            _, page = nexus.call("GET", "/share", params={"after": after, "limit": 1000})
            blocks += page["blocks"]
            after = page["next"]
    if as_json:
        typer.echo(json.dumps(blocks))
    for block in () if as_json else blocks:
        typer.echo(_line(block))


@app.command()
def delete(data_id: DataId) -> None:
    """Nobody finds the block from now on."""
    with Client() as nexus:
        _, shown = nexus.call("DELETE", _path(data_id))
    typer.echo(f"deleted {data_id}: {shown['erased']} of {shown['copies']} copies are erased")


@app.command()
def status(as_json: Json = False) -> None:
    """Who keeps blocks, how many, and what was damaged. Exit code 1 where some have too few copies."""
    with Client() as nexus:
        _, shown = nexus.call("GET", "/sharing")
    typer.echo(json.dumps(shown) if as_json else lines(shown))
    raise typer.Exit(1 if shown["short"] else 0)


@app.command()
def rotate(
    tenant: Annotated[str | None, typer.Option(help="Whose; by default this key's own.")] = None,
    cluster_key: Annotated[bool, typer.Option("--cluster-key", help="The machines' `share-key` instead.")] = False,
) -> None:
    """A new key for a tenant's blocks, or for all machines; the old one is destroyed when nothing needs it."""
    if cluster_key and tenant is not None:
        raise InvalidRequest("either a tenant's key is rotated or the cluster key: give --tenant or --cluster-key")
    with Client() as nexus:
        if cluster_key:
            _, shown = nexus.call("POST", "/sharing/cluster-key")
            typer.echo(f"the cluster key is {shown['key_id']} as soon as every machine that is there has it")
            return
        _, shown = nexus.call("POST", "/sharing/keys", json={"tenant": tenant})
    typer.echo(f"the blocks of {shown['tenant']} are sealed under key {shown['key_id']} from now on")


@app.command()
def scrub() -> None:
    """Verify every copy now, and repair those that are damaged."""
    with Client() as nexus:
        _, shown = nexus.call("POST", "/sharing/scrub", timeout=SHARE_SECONDS)
    typer.echo(f"{shown['damaged']} copies were damaged")


@app.command()
def forget(machine: Annotated[str, typer.Argument(help="One that will not come back.")]) -> None:
    """Have the blocks of a lost machine copied elsewhere, and wait for it no more."""
    with Client() as nexus:
        nexus.call("DELETE", f"/sharing/stewards/{quote(machine, safe='')}")
    typer.echo(f"{machine} keeps no blocks any more")


@app.command()
def expel(machine: Annotated[str, typer.Argument(help="One that was stolen, or that others have been in.")]) -> None:
    """Take a machine's signing key out of use, for good: what it signs and asks from now on is refused."""
    with Client() as nexus:
        _, shown = nexus.call("DELETE", f"/sharing/machines/{quote(machine, safe='')}")
    typer.echo(f"{machine} is expelled; {shown['left']} blocks that it wrote are sealed anew by the others")


def _path(data_id: str) -> str:
    """Of the block with this very id: a '#' or a '?' in it ends no path."""
    return f"/share/{quote(data_id, safe='')}"


def overview(nexus: Client) -> dict[str, Any] | None:
    """What `GET /sharing` answers; None where it does not, or nobody ever shared anything."""
    try:
        shown: dict[str, Any] = nexus.call("GET", "/sharing", timeout=20)[1]
    except NexusError:
        return None
    return shown if shown["stewards"] else None


def lines(shown: dict[str, Any]) -> str:
    """What `GET /sharing` answers, for people."""
    short = f", {shown['short']} with too few copies" if shown["short"] else ""
    first = (
        f"  {'shared':<12} {shown['blocks']} blocks, {shown['bytes'] / 2**20:.1f} MiB, {shown['copies_wanted']} copies"
        f" wanted{short}"
    )
    return "\n".join([first, *map(_steward, shown["stewards"])])


def _steward(one: dict[str, Any]) -> str:
    if "blocks" not in one:
        return f"    {one['node']:<12} {one['state']}"
    refused = sum(one["refused"].values())
    harm = f"; {refused} refused, {one['repaired']} repaired" if refused else ""
    return f"    {one['node']:<12} {one['state']}, {one['blocks']} copies, {one['bytes'] / 2**20:.1f} MiB{harm}"


def _line(block: dict[str, Any]) -> str:
    return (
        f"{block['data_id']}: version {block['version']}, {block['size']} bytes of {block['media_type']}, "
        f"{block['copies']} of {block['wanted']} copies ({', '.join(block['nodes'])})"
    )
