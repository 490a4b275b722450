"""Bulk ingestion: `ray job submit --working-dir . -- python -m deployments.bulk SOURCE… [--collection C] [--prune]`.

A source is a file, a folder, or any address that fsspec knows (`s3://bucket/folder`, `https://…`). Files stream
through three pools of actors (actors/stations.py): read and cut, embed, commit. Each batch is visible once it is
committed, so a run that is cut short has done what it has done, and the next one finds that unchanged. Ray Data holds
the stations to each other's pace; no more than a few batches are in memory.
"""

import json
import logging
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.data import ActorPoolStrategy, DataContext, Dataset

from actors.coordination import Coordination
from actors.stations import Commit, Embed, Read, Run, Task, outcomes, pack
from deployments.app import APPLICATION, vectors_address
from deployments.auditing import recorded
from deployments.cli import guarded, progress_bar
from deployments.driver import become_driver
from deployments.listing import Listed, list_all
from deployments.shapes import CollectionName
from nexus.access import PERMISSIONS
from nexus.config import NODE_LABEL, Config, load_config
from nexus.errors import InvalidRequest, Unavailable
from nexus.hades import document_id_of
from nexus.ingest import Source
from nexus.jobs import Announced, Jobs, Outcome, seen_by
from nexus.ports import Coordinator
from nexus.types import Principal, Receipt, check_source, content_digest

FILES_PER_BLOCK = 8
BEAT_SECONDS = 2.0
SAY_SECONDS = 10.0
PRUNE_BATCH = 100
NICENESS = 10  # as the conveyor's: questions come first
UNCHANGED_BATCH = 500

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, or addresses that fsspec knows.")],
    collection: Annotated[str, typer.Option("--collection", "-c")] = "default",
    prune: Annotated[bool, typer.Option(help="Also remove documents whose file is gone from these sources.")] = False,
    tenant: Annotated[str, typer.Option(help="Whose documents they will be.")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Ingest everything that the sources hold. Exit code 1 if a file failed."""
    os.nice(NICENESS)
    _check_collection(collection)
    config = load_config()
    principal = Principal(tenant, "bulk", PERMISSIONS)
    about = (f"tenant {tenant}", f"collection {collection}", *(["--prune"] if prune else []))
    with _connected(config) as address, recorded(config, "deployments.bulk", *about) as named:
        roots, listed = list_all(sources, Path(config.home))
        run = _plan(config, address, principal, collection)
        jobs, coordinator, worker = Jobs(Path(config.home)), Coordination(), uuid.uuid4().hex
        unchanged = _find_unchanged(run, listed)
        announced = [Announced(one.source, "", one.size, unchanged=unchanged.get(one.source)) for one in listed]
        with _working(coordinator, worker):
            job, _ = jobs.accept(
                principal, collection, announced, accepted_at=run.accepted_at, kind="bulk", holder=worker,
                seen_by=_seen_by(run, listed),
            )  # fmt: skip
            named.append(job.job_id)
            tasks = [Task(job.job_id, number, one.url, one.source, one.size) for number, one in enumerate(listed)]
            ended = [Outcome(job.job_id, t.number, "unchanged") for t in tasks if t.source in unchanged]
            changed = [task for task in tasks if task.source not in unchanged]
            if changed:
                with _repeating(partial(jobs.beat_job, job.job_id)), progress_bar(len(changed)) as show:
                    ended += _ingest(run, jobs, changed, show)
        removed = _prune(run, jobs, roots, {one.source for one in listed}) if prune else []
        named += removed
    _report(job.job_id, tasks, ended, removed, collection, as_json)


# ── the run ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _connected(config: Config) -> Iterator[str]:
    """In the cluster, as the job that we are or as a driver of our own; yields the vector store's address."""
    instance = become_driver(config, "deployments.bulk", sys.argv[1:])
    for noisy in ("ray.data", "ray.serve"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    gently = {"py_executable": f"nice -n 19 {sys.executable}"}  # from its first import on, before a station can say so
    ray.init(namespace="nexus", log_to_driver=False, logging_level="ERROR", runtime_env=gently)
    try:
        yield vectors_address(config, instance.vectors_port)
    finally:
        ray.shutdown()


def _check_collection(name: str) -> None:
    try:
        TypeAdapter[str](CollectionName).validate_python(name)
    except ValidationError:
        raise InvalidRequest(
            "a collection's name has 1 to 64 letters, digits, dots, hyphens and underscores, and begins with a letter"
            " or a digit"
        ) from None


def _plan(config: Config, address: str, principal: Principal, collection: str) -> Run:
    opened, own, configured = _ask("open_collection", collection, principal.tenant)
    return Run(config, address, *configured, own, principal, collection, opened.sequence)


def _ask(method: str, *arguments: object) -> Any:
    """Have the ingestor do something; it may be restarting."""
    ingestor = serve.get_deployment_handle("ingestor", APPLICATION)
    return getattr(ingestor, method).remote(*arguments).result(timeout_s=120)


def _find_unchanged(run: Run, listed: Sequence[Listed]) -> dict[str, Receipt]:
    """Receipts of local files that are as they were. Files from elsewhere are judged when they have been fetched."""
    local = [one for one in listed if one.url.startswith("file://") and one.size <= run.config.http.max_body_bytes]
    found: dict[str, Receipt] = {}
    for start in range(0, len(local), UNCHANGED_BATCH):
        some = [source for one in local[start : start + UNCHANGED_BATCH] if (source := _source(one, run.collection))]
        receipts = _ask("find_unchanged", some, run.principal)
        found.update({s.source: receipt for s, receipt in zip(some, receipts, strict=True) if receipt is not None})
    return found


def _source(one: Listed, collection: str) -> Source | None:
    """What a file is by its bytes; None for one that cannot be read or named, as its station will say."""
    try:
        content = Path(one.url.removeprefix("file://")).read_bytes()
        check_source(one.source)
    except (OSError, InvalidRequest):
        return None
    return Source(one.source, content_digest(content), len(content), collection)


def _seen_by(run: Run, listed: Sequence[Listed]) -> frozenset[str]:
    ids = [document_id_of(run.principal.tenant, run.collection, one.source) for one in listed]
    return seen_by(None, run.open_documents().readers_of(ids))


def _pipeline(run: Run, tasks: Sequence[Task]) -> Dataset:
    """Read, embed and commit, each in a pool. The shares of a CPU are small: niceness says what they really get."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.issue_detectors_config.detectors = []  # they print advice on memory that the stations bound themselves
    threads = run.config.models.embedder_threads or os.cpu_count() or 1
    readers = run.config.parsing.workers
    by_the_files = {NODE_LABEL: run.config.ray.head} if run.config.ray.head else {}  # which the stores are, too
    rows = ray.data.from_items(pack(tasks), override_num_blocks=-(-len(tasks) // FILES_PER_BLOCK))
    read = rows.map_batches(
        Read, fn_constructor_args=(run,), batch_size=None, batch_format="pyarrow", num_cpus=0.1,
        compute=_pool(readers), udf_modifying_row_count=False, label_selector=by_the_files,
    )  # fmt: skip
    embedded = read.map_batches(
        Embed, fn_constructor_args=(run,), batch_size=None, batch_format="pyarrow", num_cpus=0.2,
        compute=_pool(threads), udf_modifying_row_count=False,
    )  # fmt: skip
    return embedded.map_batches(
        Commit, fn_constructor_args=(run,), batch_size=None, batch_format="pyarrow", num_cpus=0.1,
        compute=_pool(1), udf_modifying_row_count=False, label_selector=by_the_files,
    )  # fmt: skip


def _pool(at_once: int) -> ActorPoolStrategy:
    """One actor that does so many batches at once, with one more waiting."""
    return ActorPoolStrategy(
        size=1, max_tasks_in_flight_per_actor=at_once + 1, max_concurrent_calls_per_actor=at_once,
        enable_true_multi_threading=True,
    )  # fmt: skip


def _ingest(run: Run, jobs: Jobs, tasks: Sequence[Task], show: Any) -> list[Outcome]:
    """Every task to its outcome, written down as it comes."""
    ended: list[Outcome] = []
    said = started = time.monotonic()
    batches = _pipeline(run, tasks).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in batches:
        some = outcomes(batch)
        jobs.settle(some)
        ended += some
        show(len(ended))
        if time.monotonic() - said > SAY_SECONDS and not sys.stderr.isatty():
            said = time.monotonic()
            rate = len(ended) / (said - started)
            left = (len(tasks) - len(ended)) / rate
            print(f"{len(ended)} of {len(tasks)} files, {rate:.1f}/s, {left:.0f} s left", file=sys.stderr, flush=True)
    _ask("flush", run.collection)
    return ended


@contextmanager
def _working(coordinator: Coordinator, worker: str) -> Iterator[None]:
    """Be known to work for as long as the block runs; when that stops, its job is ended as interrupted."""
    coordinator.stay(worker)
    try:
        with _repeating(partial(coordinator.stay, worker)):
            yield
    finally:
        with suppress(Unavailable):
            coordinator.leave(worker)


@contextmanager
def _repeating(say: Callable[[], None]) -> Iterator[None]:
    """Say it again and again, for as long as the block runs, in a thread that waits for nothing else."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(Unavailable):  # it is said again in a moment
                say()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _prune(run: Run, jobs: Jobs, roots: Sequence[str], present: set[str]) -> list[str]:
    """Remove documents that came from below one of the folders listed, and whose file is gone."""
    folders = tuple(root for root in roots if root.endswith("/"))
    documents = run.open_documents()
    gone, after = [], None
    while folders and (page := documents.documents(run.principal, run.collection, after, 1000)):
        after = page[-1].document_id
        gone += [d for d in page if d.source.startswith(folders) and d.source not in present]
    for start in range(0, len(gone), PRUNE_BATCH):
        some = gone[start : start + PRUNE_BATCH]
        for document in documents.delete([document.document_id for document in some], run.principal):
            jobs.forget(document.tenant, document.collection, [document.source], document.closed)
    return [document.source for document in gone]


def _report(
    job_id: str, tasks: Sequence[Task], ended: Sequence[Outcome], removed: Sequence[str], collection: str, as_json: bool
) -> None:
    counts = Counter({"done": "added"}.get(one.state, one.state) for one in ended)
    counts["removed"] = len(removed)
    shown = {name: count for name, count in sorted(counts.items()) if count}
    failed = [
        {"file": tasks[one.number].source, "stage": one.stage, "reason": one.reason}
        for one in sorted(ended, key=lambda one: one.number)
        if one.state in ("failed", "cancelled")
    ]
    if as_json:
        typer.echo(json.dumps({"job_id": job_id, "counts": shown, "failed": failed, "removed": removed}))
    else:
        for one in failed:
            typer.echo(f"failed: {one['file']} ({one['stage']}): {one['reason']}", err=True)
        typer.echo(", ".join(f"{count} {name}" for name, count in shown.items()) + f" in {collection!r} (job {job_id})")
    raise typer.Exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    guarded(app)
