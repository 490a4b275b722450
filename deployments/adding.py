"""`nexus add`: files to a job, their bytes to the server, and what became of each."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deployments.client import Client
from deployments.listing import label
from nexus.errors import InvalidRequest
from nexus.types import check_source, content_digest

REQUEST_BYTES = 8 * 2**20
REQUEST_FILES = (16, 200)  # in the first request, so that work begins, and at most; each has twice those of the last
FILES_PER_JOB = 20_000
POLL_SECONDS = (0.05, 1.0)  # the shortest pause between looks at a job, and the longest
SKIPPED = ("unsupported_media_type",)
OUTCOMES = {"done": "added", "unchanged": "unchanged", "failed": "failed", "cancelled": "cancelled"}

Outcomes = list[dict[str, Any]]


def add(
    nexus: Client, files: Sequence[Path], collection: str, readers: Sequence[str] | None, show: Callable[[int], None]
) -> tuple[str | None, Outcomes]:
    """Send what changed and wait until each file has ended; the (last) job, and an outcome per file.

    `readers` may know of them, besides whoever adds them; an empty list is everybody, None leaves them as they are.
    """
    announced: list[tuple[Path, dict[str, Any]]] = []
    outcomes: Outcomes = []
    for file in files:
        name = label(str(file))
        try:
            check_source(name)
            content = file.read_bytes()
        except (OSError, InvalidRequest) as error:
            reason = f"it cannot be read: {error.strerror}" if isinstance(error, OSError) else error.message
            outcomes.append({"file": name, "outcome": "failed", "reason": reason})
        else:
            announced.append((file, {"filename": name, "digest": content_digest(content), "size": len(content)}))
    job_id = None
    for start in range(0, len(announced), FILES_PER_JOB):
        some = announced[start : start + FILES_PER_JOB]
        job_id, ended = _run(nexus, some, collection, readers, show, len(outcomes))
        outcomes += ended
    return job_id, outcomes


def _run(
    nexus: Client,
    files: Sequence[tuple[Path, dict[str, Any]]],
    collection: str,
    readers: Sequence[str] | None,
    show: Callable[[int], None],
    before: int,
) -> tuple[str, Outcomes]:
    job = nexus.announce([about for _, about in files], collection, readers)
    for batch in _batches([about["size"] for _, about in files], job["expected"]):
        contents = {number: _read(files[number][0]) for number in batch}
        nexus.send(job["job_id"], contents)
        show(before + nexus.job(job["job_id"])["total"] - len(job["expected"]))
    pause, seen = POLL_SECONDS[0], -1.0
    while (state := nexus.job(job["job_id"]))["state"] == "running":
        show(before + round(state["progress"] * len(files)))
        pause = _pause(state["seconds_left"] if state["progress"] > seen else None, pause)
        seen = state["progress"]
        time.sleep(pause)
    return job["job_id"], [_outcome(file) for file in nexus.files(job["job_id"])]


def _pause(left: float | None, last: float) -> float:
    """Seconds until the next look at a job which will take `left` more at its pace: near its end it is looked at often.

    Where that is not known, or nothing has ended since the last look, it is longer than the pause before.
    """
    shortest, longest = POLL_SECONDS
    return min(max(left / 2 if left is not None else 1.5 * last, shortest), longest)


def _read(file: Path) -> bytes:
    """The bytes as they are now; of a file that went away meanwhile none, which the server takes for a change."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _batches(sizes: Sequence[int], expected: Iterable[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    size, (most, at_last) = 0, REQUEST_FILES
    for number in expected:
        if batch and (size + sizes[number] > REQUEST_BYTES or len(batch) == most):
            yield batch
            batch, size, most = [], 0, min(2 * most, at_last)
        batch.append(number)
        size += sizes[number]
    if batch:
        yield batch


def _outcome(file: dict[str, Any]) -> dict[str, Any]:
    skipped = file["state"] == "failed" and file["code"] in SKIPPED
    outcome = {"file": file["filename"], "outcome": "skipped" if skipped else OUTCOMES[file["state"]]}
    kept = ("reason", "code", "stage", "document_id", "version", "chunks", "sequence")
    return outcome | {name: file[name] for name in kept if file.get(name) is not None}


def prune(nexus: Client, paths: Sequence[Path], present: set[str], collection: str) -> Outcomes:
    """Remove documents that came from these folders and whose file is gone."""
    folders = tuple(str(path.absolute()) + os.sep for path in paths if path.is_dir())
    gone = [
        document for document in (nexus.documents(collection) if folders else ())
        if document["source"].startswith(folders) and document["source"] not in present
    ]  # fmt: skip
    for document in gone:
        nexus.remove(document["document_id"])
    return [{"file": document["source"], "outcome": "removed"} for document in gone]
