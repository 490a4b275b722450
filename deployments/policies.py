"""`nexus policy …`: rules over files, and what they do: shown first, and carried out when asked to."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
import yaml

from deployments.client import Client
from nexus.config import Config
from nexus.errors import InvalidRequest

EVALUATION_SECONDS = 900.0

app = typer.Typer(help="Rules that move, copy, index, tag, hold and delete files.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Name = Annotated[str, typer.Argument(help="The policy's name.")]


@app.command("list")
def list_policies(as_json: Json = False) -> None:
    """All policies, the first to be followed at the top."""
    with Client() as nexus:
        shown = nexus.call("GET", "/policies")[1]
    if as_json:
        typer.echo(json.dumps(shown))
        return
    found = sorted(shown["policies"], key=lambda policy: (-policy["priority"], policy["name"]))
    for policy in found:
        what = ", ".join(_action(action) for action in policy["actions"])
        state = "" if policy["enabled"] else "  (disabled)"
        typer.echo(f"{policy['priority']:>5}  {policy['name']}: {what}{state}")
    if not found:
        typer.echo("There are no policies. `nexus policy put NAME FILE` makes one.")


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """One policy, as it can be put again."""
    with Client() as nexus:
        shown = nexus.call("GET", _path(name))[1]
    typer.echo(json.dumps(shown) if as_json else yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip())


@app.command()
def put(
    name: Name, file: Annotated[Path, typer.Argument(help="Its YAML or JSON; - for standard input.")],
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make a policy, or replace it. It changes no file before it is evaluated."""
    with Client() as nexus:
        status, shown = nexus.call("PUT", _path(name), json=_read(file))
    if as_json:
        typer.echo(json.dumps(shown))
    else:
        done = "made" if status == 201 else f"replaced (version {shown['version']})"
        typer.echo(f"policy {name} is {done}; `nexus policy evaluate {name}` shows what it does")


@app.command()
def delete(name: Name) -> None:
    """Remove a policy. What it did stays done, and files that it holds stay held."""
    with Client() as nexus:
        nexus.call("DELETE", _path(name))
    typer.echo(f"policy {name} is removed")


@app.command()
def release(
    name: Name,
    file: Annotated[str, typer.Argument(help="The path of the file that it holds.")],
    hold: Annotated[str | None, typer.Option(help="What the hold is called, if not like the policy.")] = None,
) -> None:
    """Lift the hold of a file. A policy that still applies holds it again."""
    with Client() as nexus:
        body = {"file": file, **({} if hold is None else {"hold": hold})}
        released = nexus.call("POST", f"{_path(name)}/release", json=body)[1]["released"]
    typer.echo(f"{_printable(file)} is not held by {released} any more")


@app.command()
def evaluate(
    name: Name,
    file: Annotated[str | None, typer.Option(help="Only this file, by its path.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without, it is only shown.")] = False,
    delegate: Annotated[
        bool, typer.Option("--delegate", help="Have the Hammerspace share of its tiers keep the policy.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a policy does, a line for each file, or with --apply what it did. Exit code 1 if something failed."""
    body = {"dry_run": not apply, "delegate": delegate, **({} if file is None else {"file": file})}
    with Client() as nexus:
        shown = nexus.call("POST", f"{_path(name)}/evaluate", json=body, timeout=EVALUATION_SECONDS)[1]
    typer.echo(json.dumps(shown) if as_json else "\n".join(lines(shown)))
    raise typer.Exit(1 if shown["result"] == "failed" else 0)


def check_tiers(config: Config) -> None:
    """Return if every tier of the settings could be opened, as far as can be told here. Raises ConfigError."""
    if config.policies.tiers:
        from nexus import enforcement  # with all that files and stores need: not at every start of the command line

        enforcement.check_tiers(config)


def lines(shown: Mapping[str, Any]) -> list[str]:
    """An evaluation for people: each action on each file, what is wrong on the tiers, and the sums."""
    told = [_line(action) for action in shown["actions"]]
    more = sum(shown["summary"].values()) - len(told)
    told += [f"… and {more} more"] if more else []
    told += [f"problem: {_printable(problem)}" for problem in shown["metadata"].get("problems", ())]
    if "expression" in shown["metadata"]:
        told.append(f"the share would keep: {shown['metadata']['expression']}")
    told += [f"tier {one['tier']}: {one['state']}  {one['reason'] or ''}".rstrip() for one in shown["delegated"]]
    if "files" in shown["metadata"]:
        told.append(f"{shown['metadata']['matched']} of {shown['metadata']['files']} files match")
    sums = ", ".join(f"{count} {what}" for what, count in shown["summary"].items())
    told.append(sums or ("nothing to do" if not shown["delegated"] else ""))
    if shown["dry_run"] and shown["result"] == "planned":
        told.append("nothing was changed; --apply does it")
    return list(filter(None, told))


def _line(action: Mapping[str, str]) -> str:
    target = action.get("target", "")
    what = f"{action.get('source') or '?'} → {target}" if action["action"] in ("move", "replicate") else target
    parts = (f"{action['action']:9}", _printable(action["file_path"]), what, action["status"])
    reason = action.get("reason")
    return "  ".join(filter(None, parts)) + (f": {_printable(reason)}" if reason else "")


def _action(action: Mapping[str, Any]) -> str:
    details = [_shown(value) for key, value in action.items() if key != "type" and value]
    return " ".join([action["type"], *details])


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _printable(text: str) -> str:
    """What was named by others may not colour or move a terminal."""
    return text if text.isprintable() else ascii(text)


def _path(name: str) -> str:
    return f"/policies/{quote(name, safe='')}"


def _read(file: Path) -> Any:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        return yaml.safe_load(text)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is neither YAML nor JSON: {type(error).__name__}") from None
