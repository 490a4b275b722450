"""The command `nexus`. Exit codes: 0 ok, 1 failed, 2 usage.

What few commands need, and takes time to import, they import themselves.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster import bootstrap
from deployments import auditing, nodes, policies, running, sharing, voters
from deployments import client as http
from deployments.athena import starting as athena
from deployments.auditing import recorded, recorded_if_possible
from deployments.driver import become_driver
from deployments.listing import is_below, label, place_of
from deployments.running import JOIN_SECONDS
from nexus import __version__, logs
from nexus.access import MOST_PER_MINUTE, PERMISSIONS, KeyRing
from nexus.config import Config, default_home, load_config
from nexus.errors import InvalidRequest, NexusError, NotFound, Unavailable
from nexus.registry import check_part

if TYPE_CHECKING:
    from deployments import planning

START_SECONDS, ENGINE_START_SECONDS = 120.0, 1800.0
HEXADECIMAL = frozenset("0123456789abcdef")

app = typer.Typer(
    help="Your documents, answered on your machines. Start with `nexus up`, then `nexus add FOLDER`, then `nexus ask`.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
key_app = typer.Typer(help="API keys: make, list, end; and those of outside issuers.", no_args_is_help=True)
config_app = typer.Typer(help="The settings in force.", no_args_is_help=True)
memory_app = typer.Typer(help="Interactions that are kept: what this key stored.", no_args_is_help=True)
app.add_typer(key_app, name="key")
app.add_typer(config_app, name="config")
app.add_typer(memory_app, name="memory")
app.add_typer(voters.app, name="coordinator")
app.add_typer(nodes.app, name="node")
app.add_typer(auditing.app, name="audit")
app.add_typer(sharing.app, name="share")
app.add_typer(policies.app, name="policy")

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
InCollection = Annotated[str, typer.Option("--collection", "-c", help="The collection.")]


def main() -> NoReturn:
    guarded(app)


def guarded(command: Callable[[], object]) -> NoReturn:
    """Run a command; what went wrong is one line on stderr, never a traceback."""
    try:
        command()
    except NexusError as error:
        typer.echo(f"error: {error.message}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


# ── running ─────────────────────────────────────────────────────────────────────────────────────


@app.command()
def up(
    config: Annotated[Path | None, typer.Option(help="A nexus.yaml; default: the one in the home, if any.")] = None,
    wait: Annotated[
        float | None, typer.Option(help="Seconds to wait until it is ready; by default 120, with vLLM engines 1800.")
    ] = None,
    join: Annotated[
        float, typer.Option(min=0, help="Seconds that the other machines have to join a new cluster.")
    ] = JOIN_SECONDS,
    stay: Annotated[bool, typer.Option("--stay", help="Stay, and start again what ends; for systemd.")] = False,
    with_athena: Annotated[bool, typer.Option("--athena", help="Also serve Athena, the pages in a browser.")] = False,
) -> None:
    """Start Nexus on this machine, with what is missing of it, and wait until it is ready."""
    settings = load_config(config)
    home = Path(settings.home)
    for kind, address, task in settings.parts():
        check_part(kind, address, task)
    policies.check_tiers(settings)
    bootstrap.prepare_home(home)
    patience = _patience(settings) if wait is None else wait
    with running.stopped_by_signals(lambda: bootstrap.stop(home)) if stay else nullcontext():
        _start(settings, config, patience, join, with_athena, stay)
        if stay:
            running.tell_systemd("READY=1")
            running.keep_up(settings, config, patience, join, _tell, athena.Kept(settings, _tell).look)
    if stay:
        typer.echo("Nexus is stopped.")


def _start(
    settings: Config, config: Path | None, patience: float, join: float, with_athena: bool, is_logged: bool
) -> None:
    started, home = time.monotonic(), Path(settings.home)
    if settings.access.development_keys:
        _tell(
            f"WARNING: {len(settings.access.development_keys)} development key(s) (VALID_API_KEYS) may do everything"
            " here; they are for development alone, and access.mode production refuses them"
        )
    with bootstrap.lock_home(home), recorded(settings, "nexus up"):
        instance, outcome = running.ensure_up(settings, config, patience, join, _tell)
        new_key = _ensure_admin_key(settings)
        if outcome == "ran already" and settings.nodes:
            running.apply(settings, instance, config, patience, _tell)
    if outcome == "ran already":
        applied = ", and is as the settings say" if settings.nodes else ""
        typer.echo(f"Nexus already runs at {instance.url}{applied}")
        if with_athena:
            athena.ensure(settings, typer.echo)
        return
    typer.echo(f"Nexus is ready at {instance.url}  ({time.monotonic() - started:.0f} s)")
    typer.echo(f"  Ray dashboard  {instance.dashboard}  (token: {home / 'ray-token'})")
    typer.echo(f"  state and logs {home}")
    if new_key:
        _show_key(new_key, home / "admin-key", is_logged)
    if with_athena or athena.find(home) is not None:
        athena.ensure(settings, typer.echo)
    typer.echo("  stop it with   nexus down")


def _show_key(key: str, file: Path, is_logged: bool) -> None:
    """The first key, for whoever reads this; in a log, which others may read, only where it is."""
    if is_logged:
        typer.echo(f"  admin key      in {file}")
        return
    typer.echo(f"  admin key      {key}")
    typer.echo(f"                 shown this once; the command line finds it in {file}")


def _tell(sentence: str) -> None:
    typer.echo(sentence, err=True)


def _patience(settings: Config) -> float:
    has_engines = any(address.startswith("vllm:") for _, address, _ in settings.parts())
    return ENGINE_START_SECONDS if has_engines else START_SECONDS


def _ensure_admin_key(settings: Config) -> str | None:
    """Make the first key of a new installation; returns it only when it is new."""
    home = Path(settings.home)
    file = home / "admin-key"
    if file.exists():
        return None
    with recorded(settings, "nexus up: the admin key") as named:
        ring = KeyRing(home, environment=settings.access.environment)
        key, made = ring.create("admin")
        ring.close()
        named.append(made.id)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as writer:
        writer.write(key + "\n")
    return key


@app.command()
def down() -> None:
    """Stop what `nexus up` started, and nothing else. Documents, sessions and keys stay."""
    settings = load_config()
    home = Path(settings.home)
    if not home.is_dir():
        typer.echo("Nexus was not running.")
        return
    bootstrap.prepare_home(home)
    with bootstrap.lock_home(home), recorded_if_possible(settings, "nexus down"):
        typer.echo("Nexus is stopped." if bootstrap.stop(home) else "Nexus was not running.")
        athena.forget(home)


@app.command()
def status(as_json: Json = False) -> None:
    """What runs, where, and whether each part answers."""
    home = Path(load_config().home)
    instance = bootstrap.find_instance(home)
    processes = bootstrap.processes_of(instance) if instance else []
    athena_state, athena_url = athena.state(home)
    shown: dict[str, Any] = {"home": str(home), "logs": str(home / logs.FILE), "running": bool(processes)}
    shown["athena"] = {"state": athena_state, "url": athena_url}
    if instance and processes:
        with http.Client() as nexus:
            parts, state, shared = nexus.parts(), _state(nexus), sharing.overview(nexus)
            shown |= {
                **state, "sharing": shared, "url": instance.url, "dashboard": instance.dashboard, "parts": parts,
                "processes": len(processes), "memory_bytes": bootstrap.memory_of(instance),
                "up_seconds": round(time.time() - instance.started_at),
            }  # fmt: skip
    is_ready = bool(shown.get("parts")) and all(state == "ready" for state in shown["parts"].values())
    shown["ready"] = is_ready
    if as_json:
        typer.echo(json.dumps(shown))
    elif not processes:
        typer.echo(f"Nexus is not running ({home}). `nexus up` starts it.")
    else:
        typer.echo(f"Nexus {'is ready' if is_ready else 'is not ready'} at {shown['url']}")
        for part, state in shown["parts"].items():
            typer.echo(f"  {part:<12} {state}")
        if shown["coordinator"]:
            typer.echo(voters.lines(shown["coordinator"]))
        if shown["sharing"]:
            typer.echo(sharing.lines(shown["sharing"]))
        from deployments import overview

        for line in overview.lines(shown):
            typer.echo(line)
        if athena_url is not None:
            typer.echo(f"  {'athena':<12} {athena_state} at {athena_url}; `nexus athena` makes a link to it")
        typer.echo(
            f"  {shown['processes']} processes, {shown['memory_bytes'] / 2**30:.2f} GiB, up {shown['up_seconds']} s;"
            f" what they say is in {shown['logs']}"
        )
    raise typer.Exit(0 if is_ready else 1)


def _state(nexus: http.Client) -> dict[str, Any]:
    """What `GET /status` says, or why it does not."""
    try:
        return nexus.status()
    except NexusError as error:
        nothing = dict.fromkeys(("nodes", "placement", "deployments", "coordinator", "collections", "drained"))
        return {**nothing, "differences": [], "unknown": {"everything": error.message}}


@app.command()
def plan(
    config: Annotated[Path | None, typer.Option(help="A nexus.yaml; default: the one in the home, if any.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Only what it would change where Nexus runs.")] = False,
    as_json: Json = False,
) -> None:
    """What goes on which machine and GPU, what it would hold there, and what is left. Nothing is started.

    Exit code 1 if something has no place.
    """
    from deployments import planning

    settings = load_config(config)
    told = _told(settings, must_say=diff)
    draft = planning.draw(settings, told)
    refusals = draft.plan.refusals
    if diff and told.plan is not None and not refusals:
        shown, print_it = planning.describe_moves(told.plan, draft.plan), planning.print_moves
    else:
        shown, print_it = planning.describe(settings, draft), planning.print_plan
    if as_json:
        typer.echo(json.dumps(shown))
    else:
        print_it(shown, planning.open_console())
    for note in told.notes:
        typer.echo(f"note: {note}", err=True)
    for refusal in refusals:
        typer.echo(f"no place for {planning.refused(refusal)}", err=True)
    raise typer.Exit(1 if refusals else 0)


def _told(settings: Config, must_say: bool) -> "planning.Told":
    """What the Nexus that runs here says of its machines and plan. Raises Unavailable where it must, and does not."""
    from deployments import planning

    if not (os.environ.get("NEXUS_URL") or bootstrap.is_running(Path(settings.home))):
        if must_say:
            raise Unavailable("no Nexus runs here, so no plan is in force; `nexus plan` shows what `nexus up` would do")
        return planning.Told()
    try:
        with http.Client(settings) as nexus:
            told = planning.read_status(settings, nexus.status())
    except Unavailable as error:
        if must_say:
            raise
        return planning.Told(notes=[f"the machines are as described: {error.message}"])
    if must_say and told.plan is None:
        raise Unavailable(told.why_no_plan)
    return told


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine and these settings, and say what to do about what is wrong."""
    from deployments.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.__dict__ for finding in findings]))
    else:
        for finding in findings:
            typer.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.what}: {finding.detail}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@app.command("authz-check")
def authz_check(
    live: Annotated[
        bool, typer.Option("--live", help="Try the Nexus that runs here: what reads, and what must be refused.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Try every route as every kind of caller, on things of its own tenant and of another's (own/foreign).

    It asks an application of its own in this process, with two tenants in it; with --live the one that runs here, with
    two tenants made for it. Exit code 1 if something leaks.
    """
    from deployments import authz, authz_live  # with the whole front door

    world = None
    if live:
        config = load_config()
        with http.Client(config) as nexus:
            world = authz_live.running(nexus.url, Path(config.home))
    with recorded(load_config(), "nexus authz-check --live") if live else nullcontext():
        cells = authz.check(world)
    leaks = [cell for cell in cells if cell.leak]
    if as_json:
        typer.echo(json.dumps([authz.show(cell) for cell in cells]))
    else:
        print_table(["route", "asks for", *authz.ROLES], authz.table(cells))
        typer.echo(f"{len(cells)} tried, {len(leaks)} leaks")
    for cell in leaks:
        typer.echo(f"leak: {cell.route} as {cell.role}, {cell.whose}: {cell.status}, {cell.leak}", err=True)
    raise typer.Exit(1 if leaks else 0)


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as what is in them, whatever the terminal's width."""
    widths = [max(len(line[column]) for line in (titles, *rows)) for column in range(len(titles))]
    for line in (titles, *rows):
        typer.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def drill(
    test_cluster: Annotated[
        bool, typer.Option("--test-cluster", help="Say that this cluster is there to be broken; needed.")
    ] = False,
    fault: Annotated[
        list[str] | None, typer.Option(help="link:NODE, raylet:NODE or state:HEAD; repeatable. Without it, each.")
    ] = None,
    cut: Annotated[float, typer.Option(min=1, help="Seconds for which a link is down.")] = 25.0,
    patience: Annotated[float, typer.Option(min=1, help="Seconds for all to run again after a fault.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Cut links and kill processes of a test cluster under load: time to recover, and what was lost, for each."""
    config = load_config()
    if not config.nodes:
        raise InvalidRequest("a drill needs a cluster: there are no `nodes` in the settings")
    if not test_cluster:
        raise InvalidRequest("a drill cuts links and kills processes: --test-cluster says that this may be done here")
    become_driver(config, "deployments.cli", sys.argv[1:])
    from deployments import drill as drills  # with all of Ray

    outcomes = drills.run_all(config, drills.faults(config, fault or ()), cut, patience)
    if as_json:
        typer.echo(json.dumps([drills.show(outcome) for outcome in outcomes]))
    else:
        typer.echo(drills.table(outcomes))
    raise typer.Exit(1 if any(outcome.lost for outcome in outcomes) else 0)


# ── documents ───────────────────────────────────────────────────────────────────────────────────


@app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders.")],
    collection: InCollection = "default",
    prune: Annotated[bool, typer.Option(help="Also remove documents whose file is gone from these folders.")] = False,
    readers: Annotated[
        str | None,
        typer.Option(help="Names of keys, with commas in between: for nobody else of the tenant are they there."),
    ] = None,
    everybody: Annotated[bool, typer.Option("--everybody", help="They are for all of the tenant again.")] = False,
    as_json: Json = False,
) -> None:
    """Add files, and all files in folders. Unchanged ones cost nothing; what was sent goes on without this command.

    Hidden files stay out, and those of Nexus' own home.

    Without --readers and --everybody, who may know of a document stays as it is; a new one is for all of the tenant.
    """
    from deployments import adding

    named = _readers(readers, everybody)
    for path in paths:
        if not path.exists():
            raise NotFound(f"there is no file or folder {path}")
    home = Path(load_config().home)
    files = sorted({file for path in paths for file in _files(path) if not is_below(file, home)})
    if not files:
        raise NotFound(f"there are no files in {', '.join(map(str, paths))}")
    with http.Client(tell=_tell) as nexus, progress_bar(len(files)) as show:
        job_id, outcomes = adding.add(nexus, files, collection, named, show)
        if prune:
            outcomes += adding.prune(nexus, paths, {label(str(file)) for file in files}, collection)
    _report(job_id, sorted(outcomes, key=lambda outcome: str(outcome["file"])), collection, as_json)


def _readers(named: str | None, everybody: bool) -> list[str] | None:
    """As `adding.add` wants them. Raises InvalidRequest for an empty name: a variable without a value opens nothing."""
    if named is None:
        return [] if everybody else None
    names = [name.strip() for name in named.split(",")]
    if everybody or not all(names):
        raise InvalidRequest("--readers are names of keys with commas in between; --everybody opens documents to all")
    return names


def _report(job_id: str | None, outcomes: list[dict[str, Any]], collection: str, as_json: bool) -> NoReturn:
    """What became of each file; exit code 1 if one failed."""
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    if as_json:
        typer.echo(json.dumps({"job_id": job_id, "counts": counts, "files": outcomes}))
    else:
        for outcome in outcomes:
            if outcome["outcome"] in ("failed", "skipped", "cancelled"):
                typer.echo(f"{outcome['outcome']}: {outcome['file']}: {outcome['reason']}", err=True)
        typer.echo(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + f" in {collection!r}")
    raise typer.Exit(1 if counts["failed"] else 0)


def _files(path: Path) -> Iterator[Path]:
    """A file itself, or all files below a folder but hidden ones, as absolute paths."""
    path = path.absolute()
    if path.is_file():
        yield path
        return
    for file in path.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


@contextmanager
def progress_bar(total: int, doing: str = "adding") -> Iterator[Callable[..., None]]:
    """A bar on stderr when that is a terminal; calling what it yields says how many have ended, and of how many."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(doing, total=total)
        yield lambda done, total=total: progress.update(task, completed=done, total=total)


@app.command()
def jobs(
    job: Annotated[str | None, typer.Argument(help="One job; without it, the latest.")] = None,
    cancel: Annotated[bool, typer.Option(help="End what has not ended of this job.")] = False,
    retry: Annotated[int | None, typer.Option(help="Try this failed file again, by its number.")] = None,
    as_json: Json = False,
) -> None:
    """What was accepted and what became of it."""
    with http.Client() as nexus:
        if job is None:
            _, listed = nexus.call("GET", "/rag/jobs", params={"limit": 20})
            shown, files = listed["jobs"], []
        else:
            if cancel:
                nexus.call("POST", f"/rag/jobs/{job}/cancel")
            if retry is not None:
                nexus.call("POST", f"/rag/jobs/{job}/files/{retry}/retry")
            shown, files = [nexus.job(job)], list(nexus.files(job))
    if as_json:
        typer.echo(json.dumps({**shown[0], "outcomes": files} if job else {"jobs": shown}))
        return
    for one in shown:
        counts = ", ".join(f"{count} {state}" for state, count in sorted(one["counts"].items()))
        left = f", {one['seconds_left']:.0f} s left" if one["seconds_left"] else ""
        typer.echo(
            f"{one['job_id']}  {one['state']:<9} {one['progress']:4.0%}  {counts} in {one['collection']!r}{left}"
        )
        for file in one["under_way"]:
            mark = "stuck in" if file in one["stuck"] else "in"
            typer.echo(f"  {file['number']}  {file['filename']}: {mark} {file['stage']}, attempt {file['attempts']}")
    for file in files:
        if file["state"] in ("failed", "cancelled"):
            where = f" ({file['stage']})" if file["stage"] else ""
            typer.echo(f"  {file['number']}  {file['filename']}: {file['state']}{where}: {file['reason']}")


@app.command()
def fsck(
    repair: Annotated[bool, typer.Option(help="Mend what can be mended without a model.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the two stores and the list of jobs, running or not. Exit code 1 if something is wrong."""
    from deployments import upkeep

    found = upkeep.fsck(repair)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        for fault in found["faults"]:
            some = ", ".join(fault["ids"][:3]) + (" …" if len(fault["ids"]) > 3 else "")
            typer.echo(f"{fault['collection'] or 'jobs'}: {len(fault['ids'])} {fault['fault']}: {some}")
        typer.echo("clean" if found["clean"] else "not clean; `nexus fsck --repair` mends what it can")
    raise typer.Exit(0 if found["clean"] else 1)


@app.command()
def vacuum(
    keep: Annotated[float, typer.Option(min=0, help="Keep what was closed in the last so many seconds.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Remove replaced and deleted versions, and attempts given up. `as_of` does not see them any more."""
    from deployments import upkeep

    removed = upkeep.vacuum(keep)
    if as_json:
        typer.echo(json.dumps(removed))
    else:
        why = ", ".join(f"{count} {kind}" for kind, count in sorted(removed["why"].items())) or "nothing to remove"
        typer.echo(f"removed {removed['versions']} versions with {removed['chunks']} chunks ({why})")


app.command("athena")(athena.athena)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The archive to write, outside of the home.")], as_json: Json = False
) -> None:
    """Write all stores, as they are at one moment, into one file, running or not. It holds keys: guard it as them."""
    from deployments import archiving

    contents = archiving.back_up(load_config(), file)
    shown = {"file": str(file), "files": len(contents.members), "bytes": contents.size, "made_at": contents.made_at}
    told = f"{file}: {len(contents.members)} files, {contents.size / 2**20:.1f} MiB"
    typer.echo(json.dumps(shown) if as_json else told)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `nexus backup` wrote.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Where there is a Nexus already, move it aside; nothing of it is lost.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a home of an archive, check it as `nexus fsck` does, and only then put it in place. Nexus must be down."""
    from deployments import archiving

    home = Path(load_config().home)
    made = archiving.bring_back(file, home, replace, _tell)
    aside = None if made.aside is None else str(made.aside)
    if as_json:
        shown = {"home": str(home), "files": len(made.contents.members), "made_at": made.contents.made_at}
        typer.echo(json.dumps({**shown, "chunks": made.chunks, "aside": aside}))
        return
    typer.echo(f"Restored to {home}: {made.chunks} chunks to be found; checked as `nexus fsck` does, and clean.")
    if aside:
        typer.echo(f"What was there before is kept in {aside}")
    typer.echo("`nexus up` starts it. Of a cluster it has one voter: `nexus coordinator add` adds the others.")


@app.command()
def reindex(
    embedder: Annotated[
        str | None, typer.Option(help="Name or address of a configured embedder; by default models.embedder.")
    ] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Cut documents anew, to so many tokens.", min=16)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="With --chunk-tokens: never more.", min=16)] = None,
    overlap: Annotated[
        int | None, typer.Option(help="With --chunk-tokens: sentences that a chunk shares with the one before.", min=0)
    ] = None,
    collection: InCollection = "default",
    questions: Annotated[
        Path | None, typer.Option(help='Kept questions, one a line: {"query": …, "documents": [sources or ids]}.')
    ] = None,
    build_only: Annotated[bool, typer.Option("--build-only", help="Build and compare, and do not switch.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only say how it stands.")] = False,
    switch: Annotated[bool, typer.Option("--switch", help="Search the index that is ready.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="With --switch: also one that finds less.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Search the former index again.")] = False,
    drop: Annotated[bool, typer.Option("--drop", help="Remove the index that is not searched.")] = False,
    as_json: Json = False,
) -> None:
    """Embed a collection anew with another model, or cut it anew, while it works; switch to that if it finds no less.

    Nothing waits meanwhile, and one command goes back. Exit code 1 if it was refused.
    """
    from deployments import reindexing

    if status + switch + rollback + drop > 1:
        raise InvalidRequest("--status, --switch, --rollback and --drop are one at a time")
    chunking = reindexing.chunking_of(chunk_tokens, max_tokens, overlap)
    with http.Client() as nexus:
        if status:
            now = reindexing.look(nexus, collection)
        elif drop:
            now = reindexing.drop(nexus, collection)
        elif switch or rollback:
            now = reindexing.make_live(nexus, collection, "former" if rollback else "new", anyway)
        else:
            named = {"embedder": embedder} if embedder else {}
            body: dict[str, Any] = {"collection": collection, **named, **chunking}
            if questions is not None:
                body["questions"] = reindexing.read_questions(questions)
            with progress_bar(1, "embedding") as show:
                now = reindexing.build(nexus, body, lambda now: show(now["done"], now["total"]))
            if now["state"] == "ready" and not build_only:
                now = reindexing.make_live(nexus, collection, "new")
    typer.echo(json.dumps(now) if as_json else "\n".join(reindexing.lines(now)))
    raise typer.Exit(1 if now["state"] == "refused" and not now["is_switched"] and not status else 0)


@app.command()
def remove(
    document: Annotated[str, typer.Argument(help="A document id, or the file it came from.")],
    collection: Annotated[str | None, typer.Option("--collection", "-c", help="Only there.")] = None,
    purge: Annotated[bool, typer.Option(help="Also erase it now, past versions and all.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a document: nobody sees it from this moment. Prints the receipt."""
    with http.Client() as nexus:
        document_id = document
        if not (len(document) == 32 and set(document) <= HEXADECIMAL):
            names = {document, str(Path(document).absolute())}
            found = [d for d in nexus.documents(collection) if d["source"] in names]
            if len(found) != 1:
                hint = "; name the collection" if found else ""
                raise NotFound(f"{len(found) or 'no'} document{'s' * (len(found) != 1)} came from {document}{hint}")
            document_id = found[0]["document_id"]
        _, answer = nexus.call("DELETE", f"/rag/documents/{document_id}", params={"purge": purge})
    if as_json:
        typer.echo(json.dumps(answer))
        return
    receipt = answer["receipt"]
    rows, vectors = receipt["purged"]["document store"], receipt["purged"]["vector store"]["vectors"]
    erased = f"; erased {rows['versions']} versions, {rows['chunks']} chunks, {vectors} vectors" if purge else ""
    typer.echo(f"removed {document} at sequence {answer['sequence']}{erased}")


# ── questions ───────────────────────────────────────────────────────────────────────────────────


@app.command()
def ask(question: str, collection: InCollection = "default", as_json: Json = False) -> None:
    """Ask the documents; the answer comes with its sources. Exit code 1 if they do not answer it."""
    with http.Client() as nexus:
        _, answer = nexus.call("POST", "/rag/query", json={"query": question, "collection": collection})
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        typer.echo(answer["response"])
        if answer["abstained"]:
            typer.echo(f"  ({answer['reason']})")
        typer.echo(f"\nConfidence {answer['confidence']:.2f}. Sources, those cited first:")
        for source in sorted(answer["sources"], key=lambda s: (not s["cited"], s["number"])):
            mark = f"[{source['number']}]" if source["cited"] else f" {source['number']} "
            typer.echo(f"  {mark} {_called(source)}")
    raise typer.Exit(0 if answer["sources"] and not answer["abstained"] else 1)


def _called(passage: dict[str, Any]) -> str:
    """Title, source and place."""
    place = place_of(passage)
    return f"{passage['title']} — {passage['source']}{', ' if place else ''}{place}"


@app.command()
def search(
    query: str,
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 5,
    collection: InCollection = "default",
    graph: Annotated[
        Literal["on", "off", "auto"], typer.Option(help="Ask connected documents too: always, never, or if in need.")
    ] = "auto",
    hops: Annotated[int, typer.Option(min=1, max=3, help="How far connected documents may be.")] = 1,
    explain: Annotated[bool, typer.Option(help="Ranks and scores per route, and what was removed.")] = False,
    as_json: Json = False,
) -> None:
    """Find the passages nearest to a query."""
    body = {"query": query, "k": k, "collection": collection, "graph": graph, "hops": hops, "explain": explain}
    with http.Client() as nexus:
        _, result = nexus.call("POST", "/rag/search", json=body)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for number, hit in enumerate(result["hits"], 1):
        typer.echo(f"{number}. {hit['score']:.3f}  {_called(hit)}")
        if explain:
            routes = ", ".join(f"{name} #{r['rank']} ({r['score']:.3f})" for name, r in hit["routes"].items())
            typer.echo(f"   {routes}; cosine {hit['cosine']:.3f}")
        typer.echo(f"   {' '.join(hit['text'].split())[:200]}")
    if explain:
        removed = Counter(c["removed_by"] for c in result["explain"]["candidates"] if c["removed_by"])
        typer.echo(_graph_line(result["explain"]["graph"]))
        typer.echo(f"removed: {dict(removed) or 'nothing'}; seconds: {result['explain']['seconds']}")


def _graph_line(graph: dict[str, Any]) -> str:
    if not graph["expanded"]:
        return f"graph: not walked; {graph['why']}"
    kinds = Counter(document["edge"] for document in graph["reached"])
    seeds, hops = len(graph["seeds"]), graph["hops"]
    return f"graph: walked; {graph['why']}; {hops} hop(s) from {seeds} document(s) reached {dict(kinds) or 'nothing'}"


@app.command("mcp")
def serve_mcp() -> None:
    """Serve an assistant on this machine over standard input and output, by the Model Context Protocol.

    It asks the Nexus of this home, or of NEXUS_URL, with the key of NEXUS_API_KEY or the admin key of the home. Over
    HTTP an assistant asks /mcp itself.
    """
    from deployments import mcp_server  # with all of the protocol

    with http.Client() as nexus:
        mcp_server.build(lambda _: nexus.asynchronous()).run("stdio")


# ── keys and settings ───────────────────────────────────────────────────────────────────────────


@contextmanager
def _keys() -> Iterator[KeyRing]:
    """The keys of this home, whether or not Nexus runs."""
    settings = load_config()
    home = Path(settings.home)
    bootstrap.prepare_home(home)
    ring = KeyRing(home, environment=settings.access.environment)
    try:
        yield ring
    finally:
        ring.close()


@key_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    tenant: Annotated[str, typer.Option(help="Whose documents it sees.")] = "default",
    permission: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(sorted(PERMISSIONS))}; repeatable.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="It ends after so many days.")] = None,
    expires: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="It ends then, in UTC; instead of --days."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, max=MOST_PER_MINUTE, help="Its own limit; by default the installation's.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, max=MOST_PER_MINUTE, help="As above, of generated tokens.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown once. Without --permission it may do all but administer."""
    permissions = frozenset(permission) if permission else PERMISSIONS - {"admin"}
    lifetime = _lifetime(days, expires)
    with _keys() as ring, recorded(load_config(), "nexus key create") as named:
        text, key = ring.create(name, tenant, permissions, lifetime, requests_per_minute, tokens_per_minute)
        named += [key.id, f"tenant {tenant}", *sorted(permissions)]
    typer.echo(json.dumps({"key": text, "id": key.id, "tenant": key.tenant}) if as_json else text)


def _lifetime(days: float | None, expires: datetime | None) -> float | None:
    """Seconds from now."""
    if expires is None:
        return None if days is None else days * 86_400
    if days is not None:
        raise InvalidRequest("a key ends after some --days or at the time that it --expires, not both")
    seconds = expires.replace(tzinfo=UTC).timestamp() - time.time()
    if seconds <= 0:
        raise InvalidRequest("this key would have expired already")
    return seconds


@key_app.command("list")
def list_keys(as_json: Json = False) -> None:
    """All keys, without their secrets."""
    with _keys() as ring:
        keys = ring.list()
    if as_json:
        typer.echo(json.dumps([{f: _plain(getattr(key, f)) for f in key.__slots__} for key in keys]))
        return
    for key in keys:
        state = "revoked" if key.revoked_at else "valid" if key.is_valid(time.time()) else "expired"
        typer.echo(f"{key.id}  {state:<8} {key.tenant:<16} {key.name:<24} {' '.join(sorted(key.permissions))}")


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else value


@key_app.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The id, as `nexus key list` shows it.")]) -> None:
    """End a key, everywhere within five seconds."""
    with _keys() as ring, recorded(load_config(), "nexus key revoke", key_id):
        ring.revoke(key_id)
    typer.echo(f"revoked {key_id}")


@key_app.command("refresh")
def refresh_keys(as_json: Json = False) -> None:
    """Have the keys of outside issuers read now: one that is gone there ends. Exit code 1 if some did not come."""
    with http.Client() as nexus:
        _, answer = nexus.call("POST", "/auth/issuers/refresh")
    if as_json:
        typer.echo(json.dumps(answer["issuers"]))
    for one in () if as_json else answer["issuers"]:
        told = ", ".join(one["keys"]) or "none" if one["refreshed"] else "did not come; those known before count on"
        typer.echo(f"{one['issuer']}: {told}")
    raise typer.Exit(0 if all(one["refreshed"] for one in answer["issuers"]) else 1)


@memory_app.command("recall")
def recall(
    query: Annotated[str, typer.Argument(help="Words to be near to; without any, the newest.")] = "",
    limit: Annotated[int, typer.Option("-n", min=1, max=100)] = 5,
    user: Annotated[str | None, typer.Option(help="Only what is of this user.")] = None,
    as_json: Json = False,
) -> None:
    """Show interactions that this key stored."""
    body = {"query": query, "limit": limit} | ({"filters": {"user": user}} if user else {})
    with http.Client() as nexus:
        _, found = nexus.call("POST", "/memory/retrieve", json=body)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for one in found["interactions"]:
        score = "" if one["score"] is None else f"  {one['score']:.3f}"
        typer.echo(f"{one['interaction_id']}  {one['timestamp']}  {one['user']}{score}")
        typer.echo(f"  {one['query'] or one['kind']}\n  {one['response']}")
    if found["not_compared"]:
        typer.echo(f"{found['not_compared']} have no vector of this embedder yet, and were not compared", err=True)
    if found["left_out"]:
        typer.echo(f"{found['left_out']} more were found, too much for one answer", err=True)


@memory_app.command("forget")
def forget(
    user: Annotated[str, typer.Argument(help="Whose interactions are deleted for good.")], as_json: Json = False
) -> None:
    """Delete all that is kept of a user: what this key stored, or with the permission `admin` all of its tenant."""
    with http.Client() as nexus:
        _, done = nexus.call("DELETE", "/memory/interactions", params={"user": user})
    typer.echo(json.dumps(done) if as_json else f"deleted {done['deleted']}, of which {done['summaries']} summaries")


@config_app.command("show")
def show_config(
    config: Annotated[Path | None, typer.Option(help="A nexus.yaml instead of the one in the home.")] = None,
    as_json: Json = False,
) -> None:
    """The settings in force, secrets hidden. A key `a.b` is set in the environment as NEXUS_A__B."""
    values = load_config(config).model_dump(mode="json")
    typer.echo(json.dumps(values) if as_json else yaml.safe_dump(values, sort_keys=False).rstrip())


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Say the version.")] = False
) -> None:
    if show:
        typer.echo(f"nexus {__version__} (home {default_home()})")
        raise typer.Exit


if __name__ == "__main__":
    main()
