"""`nexus audit …`: the record of who did what, checked, shown and exported; and how commands are recorded in it."""

import json
import os
import pwd
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nexus.audit import Chain, Event
from nexus.audit_reading import Fault, read, select, to_csv, verify
from nexus.config import Config, load_config
from nexus.errors import ConfigError, InvalidRequest, NexusError, Unavailable

app = typer.Typer(help="The record of who did what.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"]
Since = Annotated[datetime | None, typer.Option(formats=FORMATS, help="From this time on, UTC.")]
Until = Annotated[datetime | None, typer.Option(formats=FORMATS, help="Before this time, UTC.")]


@contextmanager
def recorded(config: Config, action: str, *objects: str) -> Iterator[list[str]]:
    """Around a command that changes something: that it begins is on the disk before, how it ended after.

    It writes beside the Nexus that runs in this home: whoever writes holds the chain's lock (nexus/audit.py). To the
    list that this yields, objects may be added that are known only then. Raises Unavailable.
    """
    chain = Chain(Path(config.home), config.audit.file_bytes)
    named = list(objects)
    begun = Event("command", action, subject=_user(), objects=objects, verdict="begun")
    chain.append([begun], durable=True)
    outcome, reason = "failed", ""
    try:
        yield named
        outcome = "done"
    except NexusError as error:
        reason = error.code
        raise
    finally:
        with suppress(Unavailable):  # that it began is there
            chain.append([replace(begun, objects=named, verdict=outcome, reason=reason)], durable=True)


@contextmanager
def recorded_if_possible(config: Config, action: str) -> Iterator[None]:
    """The same around what must not fail for want of a record: where that cannot be written, stderr says so."""
    with ExitStack() as stack:
        try:
            stack.enter_context(recorded(config, action))
        except (ConfigError, Unavailable) as error:
            typer.echo(f"note: {action} is not recorded: {error.message}", err=True)
        yield


def _user() -> str:
    """Whose process this is."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


@app.command("verify")
def verify_record(
    head: Annotated[str | None, typer.Option(help="NUMBER:HASH, a head that was noted elsewhere.")] = None,
    as_json: Json = False,
) -> None:
    """Check every line, their order and the end. Names what was changed, and then exits with 1."""
    report = verify(_home(), None if head is None else _read_head(head))
    end = f"{report.head.sequence}:{report.head.hash}"
    if as_json:
        shown = {"whole": not report.faults, "lines": report.lines, "files": report.files, "head": end}
        typer.echo(json.dumps({**shown, "faults": _show(report.faults), "notes": _show(report.notes)}))
    else:
        for fault in report.faults:
            typer.echo(f"{fault.file}:{fault.line}: {fault.what}: {fault.detail}", err=True)
        for note in report.notes:
            typer.echo(f"note: {note.file}:{note.line}: {note.detail}", err=True)
        state = f"not whole: {len(report.faults)} faults" if report.faults else "whole"
        typer.echo(f"{report.lines} lines in {report.files} files, {state}; head {end}")
    raise typer.Exit(1 if report.faults else 0)


def _show(faults: Iterable[Fault]) -> list[dict[str, object]]:
    return [{"what": one.what, "file": one.file, "line": one.line, "detail": one.detail} for one in faults]


def _read_head(text: str) -> tuple[int, str]:
    number, _, digest = text.partition(":")
    if not (number.isdecimal() and len(number) <= 15 and len(digest) == 64):
        raise InvalidRequest("a head is NUMBER:HASH, as `nexus audit verify` prints it")
    return int(number), digest


@app.command("show")
def show_lines(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only by this subject.")] = None,
    kind: Annotated[str | None, typer.Option(help="denied, privileged, answer, command, or what is noted.")] = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the latest.")] = 50,
    as_json: Json = False,
) -> None:
    """The latest of what was recorded, oldest first."""
    from collections import deque

    found = select(read(_home()), tenant=tenant, subject=subject, kind=kind, since=_unix(since), until=_unix(until))
    latest = deque(found, maxlen=limit)
    if as_json:
        typer.echo(json.dumps(list(latest)))
        return
    for line in latest:
        typer.echo(_line(line))


def _line(line: dict[str, Any]) -> str:
    """One line for a terminal, with nothing in it that could steer that."""
    at = datetime.fromtimestamp(line["at"], UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z"
    who = "/".join(filter(None, (line.get("tenant"), line.get("subject")))) or "nobody"
    documents = line.get("documents", ())
    parts = (
        str(line["seq"]), at, line["kind"], line.get("verdict", ""), who, line.get("action", ""),
        str(line.get("status", "")), " ".join(line.get("objects", ())), line.get("model", ""),
        f"{len(documents)} documents" if documents else "", line.get("reason", ""),
    )  # fmt: skip
    return printable("  ".join(part for part in parts if part))


def printable(text: str) -> str:
    """The text with everything that is no visible character escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@app.command("export")
def export_lines(
    since: Since = None,
    until: Until = None,
    form: Annotated[Literal["jsonl", "csv"], typer.Option("--format", help="How it is written.")] = "jsonl",
    file: Annotated[Path | None, typer.Option("--out", help="Where to; default: standard output.")] = None,
) -> None:
    """Write what was recorded in some time, as JSON lines or CSV. Cells that look like formulas get a quote before."""
    found = select(read(_home()), since=_unix(since), until=_unix(until))
    rows = to_csv(found) if form == "csv" else (json.dumps(line) + "\n" for line in found)
    if file is None:
        sys.stdout.writelines(rows)
        return
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", newline="") as writer:
            writer.writelines(rows)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be written: {error.strerror}") from None


def _unix(time: datetime | None) -> float | None:
    return None if time is None else time.replace(tzinfo=UTC).timestamp()


def _home() -> Path:
    return Path(load_config().home)
