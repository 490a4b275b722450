"""Documents in, listed, looked at, and out."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from deployments.audited import note
from deployments.routes.caller import idempotency_key, lent, permit, readers_of, seers_of, sequence_of, stand_aside
from deployments.routes.jobs import wake
from deployments.shapes import AddDocument, CollectionName, reply, show_deletion, show_document, show_job, show_receipt
from nexus.chunking import whole_text
from nexus.errors import InvalidRequest, NotFound, TryAgain, UnsupportedMedia, named
from nexus.jobs import OPEN, Announced, File, Job
from nexus.types import LAST_ORDINAL, Principal, Upload, check_source, content_digest, media_type_of

if TYPE_CHECKING:
    from deployments.gateway import Lent

RETRY_SECONDS = 0.5  # between questions to an ingestor that is restarting
FORM_FIELDS = {"file", "filename", "metadata", "collection", "readers"}

router = APIRouter(prefix="/rag", tags=["documents"])


@router.post("/add_document")
async def add_document(request: Request, principal: Principal = permit("documents:write")) -> Response:
    """JSON, or a form with `file` and optionally `filename`, `metadata`, `readers` (both JSON) and `collection`.

    The bytes are on disk before anything is answered: 201 once the document is visible, 200 if it was
    unchanged, 202 with the job to ask after if that takes long, or at once with `Prefer: respond-async`.
    """
    here = lent(request)
    upload = await _read_upload(request, principal)
    check_source(upload.source)
    file = Announced(
        upload.source, content_digest(upload.content), len(upload.content), upload.media_type, upload.metadata,
        upload.content,
    )  # fmt: skip
    accepted_at = await sequence_of(here, upload.collection, principal)
    seers = await seers_of(here, upload.readers, upload.collection, [upload.source], principal)
    job, _ = await asyncio.to_thread(
        here.jobs.accept, principal, upload.collection, [file], accepted_at=accepted_at,
        idempotency_key=idempotency_key(request), readers=upload.readers, seen_by=seers,
    )  # fmt: skip
    seconds = 0.0 if "respond-async" in request.headers.get("prefer", "") else here.config.ingest.wait_seconds
    stand_aside(request)
    ended = await _await_end(here, job, principal, seconds)
    if ended is None:
        return reply({"message": "Document accepted; it will be added", **show_job(job, [], time.time())}, 202)
    if ended.receipt is None:
        raise named(ended.error or "Conflict", ended.reason or "it was cancelled", ended.code or "cancelled")
    return reply({**show_receipt(ended.receipt), "job_id": job.job_id}, 200 if ended.state == "unchanged" else 201)


async def _await_end(here: Lent, job: Job, principal: Principal, seconds: float) -> File | None:
    """The only file of a job once it has ended; None if that takes longer. A dead ingestor is waited for."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                (file,) = await asyncio.to_thread(here.jobs.files, job.job_id, principal, None, -1, 1)
                if file.state not in OPEN:
                    return file
                try:
                    await here.ingestor.finish(job.job_id, 0)
                except TryAgain:
                    await asyncio.sleep(RETRY_SECONDS)
    await wake(here)
    return None


async def _read_upload(request: Request, principal: Principal) -> Upload:
    kind = media_type_of(request.headers.get("content-type"))
    if kind == "application/json":
        shape = _validate(await request.body())
        return _upload(shape, shape.content.encode(), None, principal)
    if kind != "multipart/form-data":
        raise UnsupportedMedia("send the document as application/json or as multipart/form-data")
    async with request.form(max_files=1, max_fields=8) as form:
        if unknown := sorted(set(form) - FORM_FIELDS):
            raise InvalidRequest(f"unknown form field {unknown[0]!r}", pointer=f"/{unknown[0]}")
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("the form has no file; send it as the field 'file'", pointer="/file")
        content = await file.read()
        described = {
            "filename": str(form.get("filename") or file.filename or ""), "content": "",
            "metadata": _read_field(form, "metadata", {}), "readers": _read_field(form, "readers", None),
            "collection": str(form.get("collection") or "default"),
        }  # fmt: skip
        shape = _validate(json.dumps(described).encode())
        return _upload(shape, content, file.content_type, principal)


def _upload(shape: AddDocument, content: bytes, media_type: str | None, principal: Principal) -> Upload:
    readers = readers_of(shape.readers, principal)
    return Upload(shape.filename, content, shape.collection, media_type, shape.metadata, readers)


def _validate(body: bytes) -> AddDocument:
    try:
        return AddDocument.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None


def _read_field(form: FormData, name: str, otherwise: object) -> object:
    field = form.get(name)
    if field is None:
        return otherwise
    try:
        return json.loads(str(field))
    except (ValueError, RecursionError):  # no JSON, or a number or a nesting that Python refuses
        raise InvalidRequest(f"{name} is not JSON", pointer=f"/{name}") from None


@router.get("/documents")
async def list_documents(
    request: Request,
    collection: CollectionName | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=64)] = "",
    principal: Principal = permit("documents:read"),
) -> Response:
    """Current documents; `next` is the cursor to give as `after`, null on the last page."""
    documents = lent(request).documents
    found = await asyncio.to_thread(documents.documents, principal, collection, after, limit + 1)
    page = found[:limit]
    following = page[-1].document_id if len(found) > limit else None
    return reply({"documents": [show_document(document) for document in page], "next": following})


@router.get("/documents/{document_id}")
async def get_document(request: Request, document_id: str, principal: Principal = permit("documents:read")) -> Response:
    document = await asyncio.to_thread(lent(request).documents.current, document_id, principal)
    if document is None:
        raise NotFound("no such document")
    return reply(show_document(document))


@router.get("/documents/{document_id}/text")
async def read_document(
    request: Request, document_id: str, principal: Principal = permit("documents:read")
) -> Response:
    """What was read of a document, whole: its chunks one after another, what two of them share only once."""
    here = lent(request)
    document = await asyncio.to_thread(here.documents.current, document_id, principal)
    if document is None:
        raise NotFound("no such document")
    collection = await asyncio.to_thread(here.documents.collection, document.collection)
    cut = collection.cut if collection is not None else ""
    chunks = await asyncio.to_thread(here.documents.neighbours, document_id, document.version, 0, LAST_ORDINAL, cut)
    whole = await asyncio.to_thread(whole_text, [chunk.piece for chunk in chunks])  # of a long one it takes long
    text = await here.screen.text("document", whole)
    note(request, documents=[document_id])
    return reply({**show_document(document), "text": text})


@router.get("/documents/{document_id}/versions")
async def list_versions(
    request: Request, document_id: str, principal: Principal = permit("documents:read")
) -> Response:
    """The latest first; those before it until they are vacuumed.

    Each was found by searches from its `sequence` on, and from `until` on no more: null for the current one. A search
    with an `as_of` between the two finds it still.
    """
    found = await asyncio.to_thread(lent(request).documents.history, document_id, principal)
    if not found:
        raise NotFound("no such document")
    return reply({"versions": [{**show_document(version), "until": version.closed} for version in found]})


@router.get("/collections")
async def list_collections(request: Request, principal: Principal = permit("documents:read")) -> Response:
    """The collections in which the caller may read something, and how much."""
    sizes = await asyncio.to_thread(lent(request).documents.tally, principal)
    shown = [
        {"name": name, "documents": documents, "chunks": chunks} for name, (documents, chunks) in sorted(sizes.items())
    ]
    return reply({"collections": shown})


@router.delete("/documents/{document_id}")
async def delete_document(
    request: Request, document_id: str, purge: bool = False, principal: Principal = permit("documents:write")
) -> Response:
    """Invisible at once, everywhere; its rows are purged later, or with `purge` before this is answered."""
    here = lent(request)
    deleted = await asyncio.to_thread(here.documents.delete, [document_id], principal)
    if not deleted:
        raise NotFound("no such document")
    (document,) = deleted
    uploads = await asyncio.to_thread(
        here.jobs.forget, document.tenant, document.collection, [document.source], document.closed
    )
    if purge:
        await here.ingestor.vacuum(0.0, [document_id])
    receipt, *_ = await asyncio.to_thread(here.documents.deletions, principal, document_id, 1)
    shown = {**show_deletion(receipt), "uploads": uploads}
    return reply({"deleted": True, "document_id": document_id, "sequence": document.closed, "receipt": shown})
