"""Who may do what at the front door, tried out: every route, as every kind of caller, on things of ours and of others.

The application runs in this process over stores of its own with two tenants in them, so nothing that is there is
touched. Its embedder finds all texts alike: a search that forgot to look at the tenant would show everything.
"""

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import httpx
import numpy as np
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts

from cluster.alone import AloneSharing
from cluster.sharing import Sharing
from deployments import gateway
from deployments.gateway import Lent
from deployments.middleware import PUBLIC
from nexus.access import PERMISSIONS, KeyRing
from nexus.audit import Chain, Recorder
from nexus.balancer import Balancer, Member, Weights
from nexus.config import Config
from nexus.enforcement import Enforcer, Evaluation, Order
from nexus.errors import NotFound, TryAgain
from nexus.hades import Hades, chunks_of, document_id_of, version_of
from nexus.homes import Homes
from nexus.ingest import Source
from nexus.jobs import Announced, Jobs
from nexus.memory import Memory
from nexus.models import extractive
from nexus.pipelines.rag import Tools
from nexus.policy import Rule
from nexus.ports import InputType, Staged
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.sessions import Sessions
from nexus.stores import memory, sqlite
from nexus.tokens import Tokens
from nexus.types import (
    Document,
    Evidence,
    Interaction,
    Piece,
    Principal,
    Receipt,
    SearchRequest,
    SearchResult,
    StoredFile,
    Vectors,
)

Whose = Literal["own", "foreign"]
OWNERS: tuple[Whose, ...] = ("own", "foreign")

TENANTS = OURS, THEIRS = "authz-check-ours", "authz-check-theirs"
CANARIES = {OURS: "canary-of-ours-4711", THEIRS: "canary-of-theirs-4712"}
SESSION = "a-session"
READS = frozenset({"documents:read", "sessions:read", "policies:read", "share:read"})
WRITES = READS | {"documents:write", "sessions:write", "policies:write", "share:write"}
# Every kind of caller: the tenant, and what they may do; None has no credential.
ROLES: Mapping[str, tuple[str, frozenset[str]] | None] = {
    "none": None, "reader": (OURS, READS), "writer": (OURS, WRITES), "infer-only": (OURS, frozenset({"infer"})),
    "admin": (OURS, PERMISSIONS), "other tenant": (THEIRS, PERMISSIONS),
}  # fmt: skip
# Parameters of paths that name such a thing, and those that name none, or a part of one.
OF_A_TENANT = ("document_id", "job_id", "session_id", "data_id", "interaction_id", "policy")
OF_ALL = ("key_id", "model", "name", "node", "number", "version")
TOLD = "The gripper closes with a torque of 4 N·m."
QUESTION = "What is the torque of the gripper?"
BODIES: Mapping[str, Any] = {
    "/rag/search": {"query": QUESTION, "k": 100, "explain": True}, "/rag/query": {"query": QUESTION},
    "/rag/add_document": {"filename": "new.md", "content": "New."},
    "/memory/store": {"query": QUESTION, "response": TOLD}, "/store": {"query": QUESTION, "response": TOLD},
    "/memory/retrieve": {"query": QUESTION, "limit": 100}, "/retrieve": {"limit": 100},
    "/rag/jobs": {"files": [{"filename": "new.md", "digest": "0" * 32, "size": 1}]},
    "/mcp/{session_id:path}/add_context": {"content": "more"}, "/mcp/{session_id:path}/query": {"input": QUESTION},
    "/v1/chat/completions": {"model": "nexus-rag", "messages": [{"role": "user", "content": QUESTION}]},
    "/v1/completions": {"model": "extractive", "prompt": QUESTION},
    "/v1/embeddings": {"model": "alike", "input": QUESTION},
    "/v1/rerank": {"model": "alike", "query": QUESTION, "documents": ["a", "b"]},
    "/auth/keys": {"name": "new"},
    "/policies/{policy}": {"description": TOLD, "actions": [{"type": "hold"}]}, "/policies/{policy}/evaluate": {},
    "/policies/{policy}/release": {"file": "held"},
    "/execute": {"template_name": "analyze_only", "initial_data": {"text": QUESTION}},
}  # fmt: skip


# ── the routes ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Route:
    """One method of one path; `permissions` is None where none is declared, and anybody may use it."""

    method: str
    path: str
    permissions: frozenset[str] | None
    has_body: bool = False
    dependant: Dependant | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def names_something(self) -> bool:
        """Whether its path leads to a thing of some tenant. A policy that is put is the caller's, whatever its name."""
        return any(f"{{{name}" in self.path for name in OF_A_TENANT) and str(self) != "PUT /policies/{policy}"

    def address(self, values: Mapping[str, str]) -> str:
        """The path with these values, and "missing" for those that are not given."""
        return re.sub(r"{(\w+)(:path)?}", lambda part: values.get(part[1], "missing"), self.path)


def routes_of(app: FastAPI) -> Iterator[Route]:
    """Every route of an application. What is mounted has no permission that could be read."""
    for context in iter_route_contexts(app.routes):
        dependant = getattr(context, "dependant", None)
        if dependant is None:
            yield Route("GET", str(getattr(context, "path", context)), None)
            continue
        for method in sorted(context.methods or ()):
            has_body = context.body_field is not None
            yield Route(method, str(context.path), permissions_of(dependant), has_body, dependant)


def permissions_of(dependant: Dependant) -> frozenset[str] | None:
    """What `permit` declares somewhere below; an empty set where any credential will do."""
    declared = getattr(dependant.call, "permissions", None)
    found = [one for one in map(permissions_of, dependant.dependencies) if one is not None]
    if declared is not None:
        found.append(frozenset(declared))
    return frozenset[str]().union(*found) if found else None


# ── the matrix ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Cell:
    """What one kind of caller is answered by a route, for a thing of their tenant or of the other."""

    route: Route
    role: str
    whose: Whose
    status: int
    leak: str = ""  # why this must not be; "" where all is well


class Things(Protocol):
    """A document, job, session, block and interaction of each tenant, and whether they are as they were made."""

    async def make(self, tenant: str) -> Mapping[str, str]:
        """Those of this tenant, as good as new; the values for paths that lead to them."""
        ...

    async def harm(self, tenant: str, values: Mapping[str, str]) -> str:
        """What a stranger has done to them; "" if nothing."""
        ...


@dataclass(frozen=True)
class World:
    """A gateway with two tenants behind it, and a way to ask it as anybody."""

    client: httpx.AsyncClient
    things: Things
    keys: Mapping[str, str]  # by role
    only_harmless: bool = False  # what reads, and what has to be refused

    async def matrix(self, prefix: str = "") -> list[Cell]:
        """A cell for every route, role and, where the path names a thing, owner; `prefix` is of the paths wanted."""
        routes = sorted(routes_of(gateway.application(cast(Lent, None))), key=lambda route: (route.path, route.method))
        return [
            await self._try_out(route, role, whose)
            for route in routes
            if route.path.startswith(prefix)
            for role in ROLES
            for whose in (OWNERS if route.names_something else OWNERS[:1])
            if not self.only_harmless or route.method == "GET" or _is_refused(route, role, whose)
        ]

    async def _try_out(self, route: Route, role: str, whose: Whose) -> Cell:
        known = ROLES[role]
        tenant = OURS if known is None else known[0]
        owner = tenant if whose == "own" else _other(tenant)
        values = await self.things.make(owner)
        headers = {"prefer": "respond-async"} | ({} if known is None else {"x-api-key": self.keys[role]})
        answer = await self.client.request(
            route.method, route.address(values), headers=headers,
            json=BODIES.get(route.path, {}) if route.method in ("POST", "PUT") else None,
        )  # fmt: skip
        leak = _judge(route, role, whose, answer)
        if not leak and owner != tenant:
            leak = await self.things.harm(owner, values)
        return Cell(route, role, whose, answer.status_code, leak)


def _other(tenant: str) -> str:
    return TENANTS[1 - TENANTS.index(tenant)]


def _is_refused(route: Route, role: str, whose: Whose) -> bool:
    """Whether this has to end in a refusal, so that trying it does no harm where all is well."""
    if route.path in PUBLIC:
        return False
    known = ROLES[role]
    return known is None or whose == "foreign" or bool((route.permissions or frozenset()) - known[1])


def _judge(route: Route, role: str, whose: Whose, answer: httpx.Response) -> str:
    """Why this answer must not be; "" if it may. 429 is a refusal, too."""
    status, known = answer.status_code, ROLES[role]
    if status >= 500 and status not in (502, 503, 504, 507):
        return "a fault"
    if route.path in PUBLIC or status == 429:
        return ""
    if known is None:
        return "" if status == 401 else "open to who has no credential"
    tenant, permissions = known
    if route.permissions is None:
        return "asks for no permission"
    if missing := route.permissions - permissions:
        return "" if status == 403 else f"open to who lacks {sorted(missing)[0]}"
    if CANARIES[_other(tenant)] in answer.text:
        return "shows what is another tenant's"
    if whose == "foreign" and status == 403:
        return "says that another tenant's thing is there"
    # Everybody's session of this name is another one, and so is a block that is shared under it.
    is_own = "{session_id" in route.path or (route.method == "PUT" and "{data_id" in route.path)
    if whose == "foreign" and status < 300 and not is_own and answer.text.replace(" ", "") != '{"deletions":[]}':
        return "another tenant's thing is there"
    return ""


# ── a world in this process ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stored:
    """Things put into the stores of this process directly."""

    lent: Lent
    hades: Hades

    async def make(self, tenant: str) -> Mapping[str, str]:
        owner, text, source = Principal(tenant, "owner", PERMISSIONS), told(tenant), f"{CANARIES[tenant]}.md"
        document = Document(
            document_id_of(tenant, "default", source), version_of(text, "p", "c", "e"), tenant, "default", source,
            source, "text/plain", {}, frozenset(), len(text), 1,
        )  # fmt: skip
        if self.hades.documents.current(document.document_id, owner) is None:
            epoch = self.hades.begin(document)
            chunks = chunks_of(document, [Piece(text, tokens=len(text.split()))])
            self.hades.stage([Staged(document, epoch, chunks, [text], Alike().vectors([text]))])
            self.hades.publish([(document, epoch)])
        job, _ = self.lent.jobs.accept(owner, "default", [Announced(source, "0" * 32, 1)], accepted_at=0)
        await self.lent.policies.put_policy(owner, policy_of(tenant), told_policy(tenant))
        self.lent.sessions.clear(owner, SESSION)
        self.lent.sessions.add_context(owner, SESSION, text)
        if await self._shared(tenant) != text:
            await (await self._sharing()).put(tenant, block_of(tenant), _once(text.encode()))
        kept = Interaction(job.job_id, tenant, owner.subject, CANARIES[tenant], text, text, 0.0)
        self.lent.memory.store.drop(tenant, [kept.interaction_id])
        self.lent.memory.store.add(kept, None, "")
        return values_of(tenant, document.document_id, job.job_id, kept.interaction_id)

    async def harm(self, tenant: str, values: Mapping[str, str]) -> str:
        owner = Principal(tenant, "owner", PERMISSIONS)
        if self.hades.documents.current(values["document_id"], owner) is None:
            return "a stranger deleted a document"
        if self.lent.jobs.find(values["job_id"], owner).state != "running":
            return "a stranger ended a job"
        if not self.lent.memory.store.load(tenant, [values["interaction_id"]]):
            return "a stranger deleted an interaction"
        if self.lent.sessions.context(owner, SESSION) != told(tenant):
            return "a stranger changed a session"
        if policy_of(tenant) not in {rule.name for rule in await self.lent.policies.policies(tenant)}:
            return "a stranger deleted a policy"
        return "" if await self._shared(tenant) == told(tenant) else "a stranger changed a block"

    async def _shared(self, tenant: str) -> str | None:
        try:
            found = await (await self._sharing()).get(tenant, block_of(tenant))
        except NotFound:
            return None
        return b"".join([piece async for piece in found.pieces]).decode()

    async def _sharing(self) -> Sharing:
        assert self.lent.sharing is not None
        return await self.lent.sharing()


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def told(tenant: str) -> str:
    """What a tenant's document and session say."""
    return f"{TOLD} {CANARIES[tenant]}"


def block_of(tenant: str) -> str:
    """The id of a tenant's block."""
    return f"block-of-{tenant}"


def policy_of(tenant: str) -> str:
    """The name of a tenant's policy."""
    return f"policy-of-{tenant}"


def told_policy(tenant: str) -> dict[str, Any]:
    """What a tenant's policy is."""
    return {"description": CANARIES[tenant], "actions": [{"type": "hold"}]}


def values_of(tenant: str, document_id: str, job_id: str, interaction_id: str) -> dict[str, str]:
    """The values for paths that lead to a tenant's things."""
    return {
        "document_id": document_id, "job_id": job_id, "session_id": SESSION, "number": "0", "version": "1",
        "data_id": block_of(tenant), "interaction_id": interaction_id, "policy": policy_of(tenant),
    }  # fmt: skip


class Alike:
    """An embedder to which every text is as near as every other, and the parts of Nexus that ask it."""

    fingerprint, dimension, max_tokens = "alike", 4, 254

    def vectors(self, texts: Sequence[str]) -> Vectors:
        return np.full((len(texts), self.dimension), 0.5, np.float32)

    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        return self.vectors(texts)

    async def describe(self) -> Mapping[str, object]:
        return {"fingerprint": self.fingerprint}


class Embedder(Alike):
    """The same, as a retriever wants it."""

    def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:  # type: ignore[override]
        return self.vectors(texts)


class LocalPolicies:
    """The ingestor's methods for policies, in this process; what they need is opened by the first."""

    def __init__(self, open: Callable[[], Enforcer]) -> None:
        self._open = open

    @cached_property
    def enforcer(self) -> Enforcer:
        return self._open()

    def close(self) -> None:
        if "enforcer" in self.__dict__:
            self.enforcer.close()

    async def policies(self, tenant: str) -> list[Rule]:
        return self.enforcer.rules(tenant)

    async def policy(self, tenant: str, name: str) -> Rule:
        return self.enforcer.rule(tenant, name)

    async def put_policy(self, principal: Principal, name: str, tree: Mapping[str, object]) -> tuple[Rule, int]:
        return self.enforcer.put(principal, name, tree)

    async def drop_policy(self, principal: Principal, name: str) -> None:
        self.enforcer.drop(principal, name)

    async def release(self, principal: Principal, hold: str, path: str) -> StoredFile:
        return self.enforcer.release(principal, hold, path)

    async def evaluate_policy(self, principal: Principal, order: Order) -> Evaluation:
        return self.enforcer.evaluate(principal, order)


@dataclass(frozen=True)
class Here:
    """The retriever's methods in this process, and an ingestor's that never comes to its work."""

    retriever: Retriever

    async def search(self, request: SearchRequest, principal: Principal) -> SearchResult:
        return self.retriever.search(request, principal)

    async def retrieve(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        result = self.retriever.search(request, principal)
        return Evidence(result, tuple(self.retriever.expand(result.hits[:passages], tokens)))

    async def finish(self, job_id: str, number: int) -> None:
        raise TryAgain("nothing is worked on here")

    async def wake(self) -> None:
        return None

    async def find_unchanged(self, sources: Sequence[Source], principal: Principal) -> list[Receipt | None]:
        return [None] * len(sources)

    async def vacuum(self, keep_closed_seconds: float, document_ids: Sequence[str] | None = None) -> list[Any]:
        return []

    async def fsck(self, repair: bool) -> list[Any]:
        return []


@asynccontextmanager
async def in_process() -> AsyncIterator[World]:
    """A gateway of its own in this process; what it writes goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        documents, keys, jobs = sqlite.open("sqlite::memory:"), KeyRing(home), Jobs(home)
        hades = Hades(documents, memory.open("memory:"), Alike.fingerprint, Alike.dimension)
        here = Here(Retriever(hades, Embedder(), RetrievalSettings()))
        sharing, policies = AloneSharing(home), LocalPolicies(lambda: Enforcer(Homes(home, {}), Chain(home).append))
        lent = replace(_lend(home, keys, jobs, hades, here, policies), sharing=sharing)
        made = {
            role: keys.create(f"role-{number}", *known)[0]
            for number, (role, known) in enumerate(ROLES.items())
            if known
        }
        transport = httpx.ASGITransport(gateway.build(lent), raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                yield World(client, Stored(lent, hades), made)
        finally:
            here.retriever.close()
            for part in (lent.audit, policies, jobs, keys, documents, lent.memory.store, sharing):
                part.close()


def _lend(home: Path, keys: KeyRing, jobs: Jobs, hades: Hades, here: Here, policies: LocalPolicies) -> Lent:
    embedder = Alike()
    balancer = Balancer([Member(extractive.open("extractive:", embed=embedder.embed), 0.5)], Weights(1, 1, 1), 5.0)
    config = Config(home=home)
    return Lent(
        config=config,
        keys=keys,
        tokens=Tokens(keys, home, config.access),
        audit=Recorder(Chain(home)),
        documents=hades.documents,
        jobs=jobs,
        sessions=Sessions(hades.documents),
        memory=Memory(sqlite.open_interactions("sqlite::memory:"), embedder, config.memory),
        retriever=here,
        ingestor=here,
        policies=policies,
        balancer=balancer,
        embedders={"alike": embedder},
        count_tokens=lambda texts: [len(text.split()) for text in texts],
        rag=Tools(here.retrieve, balancer.generator("extractive"), passages=8, passage_tokens=1000, abstain_below=0.0),
        checks={},
    )


# ── shown ───────────────────────────────────────────────────────────────────────────────────────


def check(world: AbstractAsyncContextManager[World] | None = None, prefix: str = "") -> list[Cell]:
    """The matrix of all paths that begin so, tried out now; in a world of this process, if no other is given."""

    async def all_of_it() -> list[Cell]:
        async with world or in_process() as made:
            return await made.matrix(prefix)

    return asyncio.run(all_of_it())


def table(cells: Sequence[Cell]) -> list[list[str]]:
    """A line for each route: its name, what it asks for, and each role's status, own/foreign; "-" was not tried."""
    routes = {str(cell.route): cell.route for cell in cells}
    shown = {(str(cell.route), cell.role, cell.whose): f"{cell.status}{'!' if cell.leak else ''}" for cell in cells}
    lines = []
    for name, route in routes.items():
        wants = "-" if route.permissions is None else " ".join(sorted(route.permissions)) or "any credential"
        owners = OWNERS if route.names_something else OWNERS[:1]
        lines.append(
            [name, wants, *("/".join(shown.get((name, role, whose), "-") for whose in owners) for role in ROLES)]
        )
    return lines


def show(cell: Cell) -> dict[str, Any]:
    """A cell as `nexus authz-check --json` prints it."""
    wants = None if cell.route.permissions is None else sorted(cell.route.permissions)
    return {
        "method": cell.route.method, "path": cell.route.path, "permissions": wants, "role": cell.role,
        "whose": cell.whose, "status": cell.status, "leak": cell.leak or None,
    }  # fmt: skip
