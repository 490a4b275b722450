"""Documents in, listed, looked at, and out."""

import asyncio
import json
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from deployments.routes.caller import lent, permit
from deployments.shapes import AddDocument, CollectionName, reply, show_document, show_receipt
from nexus import telemetry
from nexus.errors import CallerError, InvalidRequest, NexusError, NotFound, UnsupportedMedia
from nexus.types import Principal, Upload

FORM_FIELDS = {"file", "filename", "metadata", "collection"}

router = APIRouter(prefix="/rag", tags=["documents"])


@router.post("/add_document")
async def add_document(request: Request, principal: Principal = permit("documents:write")) -> Response:
    """JSON, or a form with `file` and optionally `filename`, `metadata` (JSON) and `collection`."""
    upload = await _read_upload(request)
    try:
        receipt = await lent(request).ingestor.add(upload, principal)
    except NexusError as error:
        telemetry.ingest_documents.labels("refused" if isinstance(error, CallerError) else "failed").inc()
        raise
    telemetry.ingest_documents.labels(receipt.outcome).inc()
    if receipt.outcome == "done":
        telemetry.ingest_chunks.inc(receipt.chunks)
    return reply(show_receipt(receipt), 201 if receipt.outcome == "done" else 200)


async def _read_upload(request: Request) -> Upload:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        shape = _validate(await request.body())
        return Upload(shape.filename, shape.content.encode(), shape.collection, metadata=shape.metadata)
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
            "metadata": _read_metadata(form.get("metadata")), "collection": str(form.get("collection") or "default"),
        }  # fmt: skip
        shape = _validate(json.dumps(described).encode())
        return Upload(shape.filename, content, shape.collection, file.content_type, shape.metadata)


def _validate(body: bytes) -> AddDocument:
    try:
        return AddDocument.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None


def _read_metadata(field: object) -> object:
    if field is None:
        return {}
    try:
        return json.loads(str(field))
    except (ValueError, RecursionError):  # no JSON, or a number or a nesting that Python refuses
        raise InvalidRequest("metadata is not JSON", pointer="/metadata") from None


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


@router.delete("/documents/{document_id}")
async def delete_document(
    request: Request, document_id: str, principal: Principal = permit("documents:write")
) -> Response:
    """Invisible at once, everywhere; its rows are purged later."""
    document = await asyncio.to_thread(lent(request).documents.delete, document_id, principal)
    if document is None:
        raise NotFound("no such document")
    return reply({"deleted": True, "document_id": document.document_id, "sequence": document.closed})
