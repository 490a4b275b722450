"""Jobs: many files announced, sent and worked on; looked at, cancelled, and one file tried again."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.datastructures import UploadFile

from deployments.routes.caller import idempotency_key, lent, permit, readers_of, seers_of, sequence_of
from deployments.shapes import MAX_NUMBER, AnnounceFiles, reply, show_file, show_job
from nexus.errors import InvalidRequest, TryAgain, UnsupportedMedia
from nexus.ingest import Source
from nexus.jobs import Announced, Job, Jobs
from nexus.types import Principal, Receipt, check_source, media_type_of

if TYPE_CHECKING:
    from deployments.gateway import Lent

FILES_PER_REQUEST = 1000
DIGITS = 15  # of a file's number: what is longer is none, and no integer of a database either
SHOWN_UNDER_WAY = 20

router = APIRouter(prefix="/rag/jobs", tags=["jobs"])


@router.post("")
async def announce(request: Request, body: AnnounceFiles, principal: Principal = permit("documents:write")) -> Response:
    """Accept a list of files by name and digest; `expected` numbers those whose bytes are still to be sent.

    What is unchanged has ended already. The same Idempotency-Key with the same list is the same job.
    """
    here = lent(request)
    readers = readers_of(body.readers, principal)
    sources = [Source(f.filename, f.digest, f.size, body.collection, f.metadata, readers) for f in body.files]
    for number, source in enumerate(sources):
        check_source(source.source, f"/files/{number}/filename")
    accepted_at = await sequence_of(here, body.collection, principal)
    seers = await seers_of(here, readers, body.collection, [f.filename for f in body.files], principal)
    try:
        unchanged: list[Receipt | None] = await here.ingestor.find_unchanged(sources, principal)
    except TryAgain:
        unchanged = [None] * len(sources)  # it is found out later, when the bytes are here
    files = [
        Announced(s.source, s.digest, s.size, f.media_type, s.metadata, unchanged=receipt)
        for s, f, receipt in zip(sources, body.files, unchanged, strict=True)
    ]
    job, _ = await asyncio.to_thread(
        here.jobs.accept, principal, body.collection, files, accepted_at=accepted_at,
        idempotency_key=idempotency_key(request), readers=readers, seen_by=seers,
    )  # fmt: skip
    expected = await asyncio.to_thread(here.jobs.files, job.job_id, principal, "expected", -1, len(files))
    return reply({**show_job(job, [], time.time()), "expected": [file.number for file in expected]}, 202)


@router.put("/{job_id}/files")
async def supply(request: Request, job_id: str, principal: Principal = permit("documents:write")) -> Response:
    """Bytes of announced files: a form whose fields are the files' numbers. Once answered, they are on disk."""
    here = lent(request)
    if media_type_of(request.headers.get("content-type")) != "multipart/form-data":
        raise UnsupportedMedia("send the files as multipart/form-data, each field named by the number of its file")
    contents: dict[int, bytes] = {}
    async with request.form(max_files=FILES_PER_REQUEST, max_fields=1) as form:
        for name, file in form.multi_items():
            if not (name.isascii() and name.isdecimal() and len(name) <= DIGITS) or not isinstance(file, UploadFile):
                raise InvalidRequest(f"the field {name!r} is not the number of a file with its bytes")
            contents[int(name)] = await file.read()
    await asyncio.to_thread(here.jobs.supply, job_id, principal, contents)
    await wake(here)
    return reply({"received": len(contents)}, 202)


@router.get("")
async def list_jobs(
    request: Request,
    state: Annotated[str | None, Query(pattern="^(running|done|failed|cancelled)$")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=64)] = None,
    principal: Principal = permit("documents:read"),
) -> Response:
    """Jobs, the latest first; `next` is the cursor to give as `after`, null on the last page."""
    jobs = await asyncio.to_thread(lent(request).jobs.recent, principal, state, after, limit + 1)
    page = jobs[:limit]
    following = page[-1].job_id if len(jobs) > limit else None
    return reply({"jobs": [show_job(job, [], time.time()) for job in page], "next": following})


@router.get("/{job_id}")
async def get_job(
    request: Request,
    job_id: str,
    state: Annotated[str | None, Query(max_length=16)] = None,
    limit: Annotated[int, Query(ge=0, le=10_000)] = 1000,
    after: Annotated[int, Query(ge=-1, le=MAX_NUMBER)] = -1,
    principal: Principal = permit("documents:read"),
) -> Response:
    """How far a job is, its rate and the time left, what is under way in which stage, and what became of each file.

    `files` are those in the given state, if any, numbered above `after`; `next` is the number to give
    as `after` for more, null on the last page.
    """
    jobs = lent(request).jobs
    job = await asyncio.to_thread(jobs.find, job_id, principal)
    files = await asyncio.to_thread(jobs.files, job_id, principal, state, after, limit + 1)
    page = files[:limit]
    following = page[-1].number if page and len(files) > limit else None
    return await _show(jobs, job, principal, files=[show_file(file) for file in page], next=following)


@router.post("/{job_id}/cancel")
@router.delete("/{job_id}")
async def cancel(request: Request, job_id: str, principal: Principal = permit("documents:write")) -> Response:
    """End what has not ended; what is published stays."""
    jobs = lent(request).jobs
    return await _show(jobs, await asyncio.to_thread(jobs.cancel, job_id, principal), principal)


@router.post("/{job_id}/files/{number}/retry")
async def retry(
    request: Request,
    job_id: str,
    number: Annotated[int, Path(ge=0, le=MAX_NUMBER)],
    principal: Principal = permit("documents:write"),
) -> Response:
    """Try one failed file again, with the bytes that were kept."""
    here = lent(request)
    job = await asyncio.to_thread(here.jobs.retry, job_id, number, principal)
    await wake(here)
    return await _show(here.jobs, job, principal, 202)


async def _show(jobs: Jobs, job: Job, principal: Principal, status: int = 200, **more: object) -> Response:
    under_way = await asyncio.to_thread(jobs.files, job.job_id, principal, "running", -1, SHOWN_UNDER_WAY)
    return reply({**show_job(job, under_way, time.time()), **more}, status)


async def wake(here: Lent) -> None:
    """Tell the ingestor; if it is away it will look by itself when it is back."""
    with suppress(TryAgain):
        await here.ingestor.wake()
