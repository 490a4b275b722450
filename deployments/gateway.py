"""The front door: a FastAPI application over whatever it is lent."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from cluster.client import Absent
from cluster.raft import NodeId, Snapshot, Status
from cluster.sharing import Sharing
from deployments import middleware
from deployments.cluster_state import Observing
from deployments.history import History
from deployments.limiting import PacedRetriever, searches
from deployments.reindexing import Reindexing
from deployments.routes import (
    answers,
    auth,
    coordinator,
    documents,
    health,
    jobs,
    kserve,
    mcp,
    memory,
    openai,
    pipelines,
    policies,
    reindex,
    report,
    reranking,
    sessions,
    sharing,
    status,
    upkeep,
)
from deployments.shapes import describe_errors
from nexus import __version__
from nexus.access import KeyRing
from nexus.audit import Recorder
from nexus.background import begin_in_background
from nexus.balancer import Balancer, Weights
from nexus.cache import CompletingGenerator, ResponseCache, cached
from nexus.config import Config
from nexus.enforcement import Evaluation, Order
from nexus.errors import NexusError
from nexus.hades import Fault, Removed
from nexus.image_hosts import ImageHosts
from nexus.images import Fetch
from nexus.ingest import Source
from nexus.jobs import Jobs
from nexus.memory import Memory
from nexus.models.by_embedder import nearness
from nexus.models.triton import TritonPool
from nexus.pipelines.rag import Tools
from nexus.policy import Rule
from nexus.ports import DocumentStore
from nexus.resident import Standing
from nexus.screening import (
    Embedding,
    Reranking,
    Screen,
    ScreenedEmbedder,
    ScreenedGenerator,
    ScreenedReranker,
    ScreenedRetriever,
    open_screen,
)
from nexus.sessions import Sessions
from nexus.tokens import Tokens
from nexus.types import Principal, Receipt, SearchRequest, SearchResult, StoredFile, Vector, media_type_of
from nexus.verifier import Verifier


class Searching(Protocol):
    async def search(self, request: SearchRequest, principal: Principal) -> SearchResult: ...


class Ingesting(Protocol):
    async def finish(self, job_id: str, number: int) -> None: ...
    async def wake(self) -> None: ...
    async def find_unchanged(self, sources: Sequence[Source], principal: Principal) -> list[Receipt | None]: ...
    async def vacuum(self, keep_closed_seconds: float, document_ids: Sequence[str] | None = None) -> list[Removed]: ...
    async def fsck(self, repair: bool) -> list[Fault]: ...


class Enforcing(Protocol):
    async def policies(self, tenant: str) -> list[Rule]: ...
    async def policy(self, tenant: str, name: str) -> Rule: ...
    async def put_policy(self, principal: Principal, name: str, tree: Mapping[str, object]) -> tuple[Rule, int]: ...
    async def drop_policy(self, principal: Principal, name: str) -> None: ...
    async def release(self, principal: Principal, hold: str, path: str) -> StoredFile: ...
    async def evaluate_policy(self, principal: Principal, order: Order) -> Evaluation: ...


class Operating(Protocol):
    async def describe(self) -> list[Status | Absent]: ...
    async def add(self, id: NodeId, labels: Mapping[str, str]) -> None: ...
    async def remove(self, id: NodeId) -> None: ...
    async def transfer(self, to: NodeId) -> None: ...
    async def snapshot(self) -> Snapshot: ...


@dataclass(frozen=True)
class ByEmbedding:
    """A reranker made of an embedder, one hop for the query and one for the texts."""

    embedder: Embedding

    async def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        return nearness(await self.embedder.embed([query], "query"), await self.embedder.embed(texts, "passage"))


@dataclass(frozen=True)
class Lent:
    """Everything a handler may use: handles in a cluster, plain objects in a test.

    Embedders and rerankers stand under the names that clients ask for; the documents' own embedder is the first.
    """

    config: Config
    keys: KeyRing
    tokens: Tokens
    audit: Recorder
    documents: DocumentStore
    jobs: Jobs
    sessions: Sessions
    memory: Memory
    retriever: Searching
    ingestor: Ingesting
    policies: Enforcing
    balancer: Balancer
    embedders: Mapping[str, Embedding]
    count_tokens: Callable[[Sequence[str]], list[int]]
    rag: Tools
    checks: dict[str, Callable[[], Awaitable[object]]]
    rerankers: Mapping[str, Reranking] = field(default_factory=dict)
    engines: Mapping[str, Callable[[], Awaitable[object]]] = field(default_factory=dict)  # what each works on
    cache: ResponseCache | None = None
    triton: TritonPool | None = None
    operator: Operating | None = None  # of the coordinator
    reindexing: Reindexing | None = None
    observer: Observing | None = None  # of the machines, and of what runs on them
    standings: Callable[[str], Awaitable[Sequence[Standing]]] | None = None  # of a tenant's indexes, in the retriever
    sharing: Callable[[], Awaitable[Sharing]] | None = None  # of blocks; its stewards may have to be found first
    fetch_picture: Fetch = ImageHosts().fetch  # of a URL in a chat; by default of none
    screen: Screen = field(default_factory=Screen)  # put around what retrieves and generates by `screened`
    clock: Callable[[], float] = time.monotonic  # of the limits, in seconds

    def generator(self, model: str, weights: Weights | None = None) -> CompletingGenerator:
        """The generator of this name, or for `auto` the one that is chosen by these weights. Raises NotFound."""
        generator = cached(self.balancer.generator(model, weights), self.cache, repr(weights))
        return ScreenedGenerator(generator, self.screen)

    def reranker_called(self, name: str) -> Reranking | None:
        """The one configured under this name, else the embedder of this name as a reranker."""
        if name in self.rerankers or name not in self.embedders:
            return self.rerankers.get(name)
        return ByEmbedding(self.embedders[name])


def paced(lent: Lent) -> Lent:
    """The same with no more searches at once than its configuration allows."""
    retriever = PacedRetriever(lent.retriever, lent.rag.retrieve, searches(lent.config))
    return replace(lent, retriever=retriever, rag=replace(lent.rag, retrieve=retriever.retrieve))


def screened(lent: Lent) -> Lent:
    """The same with the content rules and the guard of its configuration around all that retrieves or answers."""
    screen = open_screen(lent.config.content)
    retriever = ScreenedRetriever(lent.retriever, lent.rag.retrieve, screen)
    rag = replace(
        lent.rag,
        retrieve=retriever.retrieve,
        generator=ScreenedGenerator(lent.rag.generator, screen),
        admit=partial(screen.text, "input"),
    )
    embedders = {name: ScreenedEmbedder(embedder, screen) for name, embedder in lent.embedders.items()}
    ranking = {name: lent.reranker_called(name) for name in (*lent.embedders, *lent.rerankers)}
    rerankers = {name: ScreenedReranker(one, screen) for name, one in ranking.items() if one is not None}
    memory = lent.memory.screened(screen)
    return replace(
        lent, screen=screen, retriever=retriever, rag=rag, embedders=embedders, rerankers=rerankers, memory=memory
    )


def build(lent: Lent, says_request_id: bool = True) -> ASGIApp:
    """The whole HTTP application, its middleware included."""
    verifier = Verifier(lent.keys, lent.tokens, lent.config.access.failures_per_minute)
    app = application(screened(paced(lent)))
    return middleware.wrap(app, verifier, lent.audit, lent.config, lent.clock, says_request_id)


def application(lent: Lent) -> FastAPI:
    """The routes, and what becomes of errors within them."""
    app = FastAPI(
        title="Nexus", version=__version__,
        redirect_slashes=False,
        openapi_url=None,  # nor its pages, which load scripts from elsewhere
        telemetry={"tracing": False, "metrics": False, "logs": False},  # its spans would tell paths and queries
        lifespan=_watching,
    )  # fmt: skip
    app.state.lent, app.state.history = lent, History()
    app.add_exception_handler(NexusError, _answer_nexus_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)
    app.router.routes.extend(_routes())
    return app


@cache
def _routes() -> Sequence[BaseRoute]:
    """All routes. What FastAPI works out of each, it works out once, and not anew for every application."""
    everything = APIRouter()
    for routes in (  # those that are asked most come first: they are looked through in turn
        health,
        answers,
        openai,
        documents,
        jobs,
        upkeep,
        reindex,
        sessions,
        sharing,
        mcp,
        memory,
        pipelines,
        policies,
        kserve,
        reranking,
        report,
        coordinator,
        status,
        auth,
    ):
        everything.include_router(routes.router, responses=describe_errors(routes.router.prefix))
    everything.include_router(sharing.operating, responses=describe_errors(sharing.operating.prefix))
    return everything.routes


@asynccontextmanager
async def _watching(app: FastAPI) -> AsyncIterator[None]:
    """For as long as the application serves, what is counted is looked at now and then, for reports."""
    watching = begin_in_background(app.state.history.keep())
    try:
        yield
    finally:
        watching.cancel()


def _respond(
    request: Request, status: int, code: str, detail: str, faults: Sequence[tuple[str, str]] = (),
    retry_after: float | None = None,
) -> Response:  # fmt: skip
    request.scope["state"]["audited"].setdefault("reason", code)
    path, request_id = request.url.path, request.state.request_id
    headers, body = middleware.render(path, request_id, status, code, detail, faults, retry_after)
    return Response(body, status, headers)


async def _answer_nexus_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NexusError)
    status = middleware.status_of(error, request.url.path)
    return _respond(request, status, error.code, error.message, middleware.faults_of(error), error.retry_after)


async def _answer_validation(request: Request, error: Exception) -> Response:
    """400 for what is not JSON or has unknown fields, else 422 (400 on OpenAI's routes), with pointers."""
    assert isinstance(error, RequestValidationError)
    faults = [
        (_pointer(fault, error.body), str(fault["msg"]).removeprefix("Value error, ")) for fault in error.errors()
    ]
    kinds = {fault["type"] for fault in error.errors()}
    if "model_attributes_type" in kinds and faults[0][0] == "" and not _is_json(request):
        return _respond(request, 415, "unsupported_media_type", "send the body as application/json")
    malformed = bool(kinds & {"json_invalid", "extra_forbidden"}) or request.url.path.startswith("/v1/")
    code = "malformed_json" if "json_invalid" in kinds else "invalid_request"
    detail = "; ".join(f"{pointer or 'the body'}: {text}" for pointer, text in faults[:5])
    return _respond(request, 400 if malformed else 422, code, detail, faults)


def _is_json(request: Request) -> bool:
    kind = media_type_of(request.headers.get("content-type"))
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _pointer(fault: Mapping[str, Any], body: object) -> str:
    """FastAPI's location as a JSON pointer; an offset into malformed JSON points at nothing.

    Where a value may be one of several types, the location names the type that was tried, too, in words of the
    program: only what leads to something in the body is said, and what is missing there.
    """
    place, *parts = fault["loc"]
    if place == "body" and body is not None:
        parts = list(_steps(parts, body, fault["type"] == "missing"))
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _steps(parts: Sequence[str | int], value: Any, is_missing: bool) -> Iterator[str | int]:
    for number, part in enumerate(parts, 1):
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value))):
            value = value[part]
            yield part
        elif is_missing and number == len(parts):
            yield part


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    detail = {
        404: "there is nothing at this address", 405: f"{request.method} is not possible here"
    }.get(error.status_code, str(error.detail))  # fmt: skip
    response = _respond(request, error.status_code, code, detail)
    response.headers.update({k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"})
    return response


async def _answer_fault(request: Request, error: Exception) -> Response:
    """A bug: the middleware logs it; the caller learns its request id and no more."""
    return _respond(request, 500, "internal_error", middleware.FAULT)
