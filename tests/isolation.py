"""Random tenants whose documents bear canaries, requests of each of them, and a check that no canary strays.

A world is made of one seed: three tenants of three subjects each, documents with readers, versions, links and values
that documents of other tenants have too, sessions, jobs and memory under names that all of them use. A mark is a canary
(a word that stands nowhere else), or the id of a document, a chunk or an interaction. Requests go through the whole
gateway, as bytes. What comes back, its headers included, may hold a mark only if whoever asked may see what it marks,
or sent it themselves; the log and the metrics may hold none.
"""

import asyncio
import json
import logging
import random
import re
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message

from deployments.gateway import build
from nexus import telemetry
from nexus.access import PERMISSIONS
from nexus.balancer import Member
from nexus.cache import ResponseCache
from nexus.stores import memory, sqlite
from nexus.types import Delta, Document, Principal, Prompt, chunk_id_of
from tests.conftest import House, build_house, open_front
from tests.words import WordEmbedder

CASES_PER_WORLD = 400
TENANTS = ("acme", "globex", "initech")
SUBJECTS = ("ann", "ben", "cas")
COLLECTIONS = ("default", "shared")
SESSIONS = ("s0", "s1", "s2")
KEYS = ("k0", "k1", "k2", "k3")
ROBOTS = ("HX-1", "HX-2", "HX-3")
TOPICS = ("gripper torque", "hauler load", "battery voltage", "arm reach", "wheel diameter", "lamp colour")
MARK = re.compile(r"zq[0-9a-z]{12}|[0-9a-f]{32}")
HOSTILE = (
    'x" or tenant != "', "'] or 1==1 or id in ['", '"\\" or "" == "', "{tenant}", "%", "\\", "' OR 1=1 --", "*",
    "NEAR(a b)", "tenant", '$meta["tenant"]', "\u201cx\u201d or 1==1", "/* */", "../s0", "s0%00", "zq*",
)  # fmt: skip

Who = tuple[str, str]  # tenant, subject


class Rows(WordEmbedder):
    """The embedder of words, which remembers each word's direction."""

    _direction = cache(WordEmbedder._direction)


class Teller:
    """A model that answers what only the tenant who asks may know, whatever is asked."""

    name, sees_images = "teller", False

    def __init__(self, known: Mapping[str, str]) -> None:
        self._known = known

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        yield Delta(f"It is {self._known[prompt.tenant]}.")
        yield Delta(finish_reason="stop")

    async def check(self) -> None: ...


@dataclass(eq=False)
class Kept:
    """Something with marks: whose it is, and each set of readers it was limited to. An empty set limits nothing."""

    tenant: str
    limits: list[frozenset[str]] = field(default_factory=list)

    def may_see(self, who: Who) -> bool:
        return who[0] == self.tenant and all(not limit or who[1] in limit for limit in self.limits)


@dataclass(eq=False)
class Shelved:
    """A document: its versions, the latest last. Who sees one of them sees its name."""

    document: Document
    versions: list[Kept]
    bait: str

    def may_see(self, who: Who) -> bool:
        return any(version.may_see(who) for version in self.versions)


@dataclass(frozen=True)
class Request:
    """What is sent; of a `twin`, which differs from it in one id, the answer must be the same but for that id."""

    method: str
    path: str
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    twin: tuple[str, str] | None = None

    def text(self) -> str:
        return f"{self.path}\n{json.dumps(self.body)}\n{json.dumps(dict(self.headers))}"

    def other(self) -> "Request":
        assert self.twin is not None
        body = json.loads(json.dumps(self.body).replace(*self.twin))
        return replace(self, path=self.path.replace(*self.twin), body=body, twin=None)


@dataclass(frozen=True)
class Answer:
    """What came back, with the words of a stream once more, joined."""

    status: int
    text: str


@dataclass(frozen=True)
class Leak:
    """A mark where it must not be, or an answer that tells foreign from missing; `seed` and `case` bring it back."""

    seed: int
    case: int
    what: str

    def __str__(self) -> str:
        return f"seed {self.seed}, case {self.case}: {self.what}"


@dataclass
class Report:
    """What was asked how often, how it was answered, how many answers held marks that they may, and the leaks."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    telling: Counter[str] = field(default_factory=Counter)
    leaks: list[Leak] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.kinds.total()

    def add(self, other: "Report") -> None:
        self.kinds += other.kinds
        self.statuses += other.statuses
        self.telling += other.telling
        self.leaks += other.leaks


class World:
    """The tenants of one seed, with all that they have, behind one gateway."""

    def __init__(self, seed: int, house: House) -> None:
        self.rng = random.Random(seed)
        self.house = house
        self.marks: dict[str, Kept | Shelved] = {}
        self.shelf: dict[tuple[str, str, str], Shelved] = {}
        self.jobs: list[tuple[str, str]] = []  # tenant, job id
        self.kept: list[tuple[Who, str]] = []  # whose, and the id of an interaction
        self.told: dict[str, set[str]] = {tenant: set() for tenant in TENANTS}  # marks that it wrote into a job
        self.known = {tenant: self.canary(Kept(tenant)) for tenant in TENANTS}
        self.collections = {tenant: self.canary(Kept(tenant)) for tenant in TENANTS}

    # ── what there is ───────────────────────────────────────────────────────────────────────────

    def word(self) -> str:
        return "zq" + "".join(self.rng.choices("0123456789abcdefghijklmnopqrstuvwxyz", k=12))

    def canary(self, of: Kept | Shelved) -> str:
        word = self.word()
        self.marks[word] = of
        return word

    def furnish(self) -> None:
        for tenant in TENANTS:
            for number in range(self.rng.randint(3, 7)):
                self.publish(tenant, f"note-{number}.md")
            self.publish(tenant, "note-0.md", self.collections[tenant], frozenset())

    def publish(
        self, tenant: str, name: str, collection: str | None = None, readers: frozenset[str] | None = None
    ) -> None:
        """A new version of the document of this name, by somebody who may read the one before."""
        collection = collection or self.rng.choice(COLLECTIONS)
        readers = self.some_readers() if readers is None else readers
        kept, place = Kept(tenant, [readers]), (tenant, collection, name)
        shelved = self.shelf.get(place)
        bait = shelved.bait if shelved else self.word()
        topic = self.rng.choice(TOPICS)
        texts = [
            f"The {topic} of unit {n} is {self.rng.randint(2, 90)}, by {self.canary(kept)}; see {bait}."
            for n in range(self.rng.randint(1, 3))
        ]
        metadata = {
            "robot_id": self.rng.choice(ROBOTS), "lot": self.rng.randint(1, 9), "note": self.canary(kept),
            "open": self.rng.random() < 0.5,
        }  # fmt: skip
        draft = self.house.describe(
            f"{bait}/{name}", texts, Principal(tenant, "keeper"), collection=collection, readers=readers,
            metadata=metadata,
        )  # fmt: skip
        others = [one.document.document_id for one in self.shelf.values()]
        links = tuple(self.rng.sample(others, min(2, len(others))))
        draft = replace(draft, title=f"{topic} {self.canary(kept)}", links=links)
        (document,) = self.house.hades.publish([(draft, self.house.stage(draft, texts))])
        if shelved is None:
            shelved = self.shelf[place] = self.marks[bait] = Shelved(document, [], bait)
        for older in shelved.versions:
            older.limits.append(readers)
        shelved.document = document
        shelved.versions.append(kept)
        self.marks[document.document_id] = shelved
        self.marks |= {chunk_id_of(document.document_id, document.version, n): kept for n in range(len(texts))}

    def change_readers(self) -> None:
        """Of a current version, whose text stays as it is."""
        shelved = self.rng.choice(list(self.shelf.values()))
        readers = self.some_readers()
        subject = next(one for one in SUBJECTS if shelved.versions[-1].may_see((shelved.document.tenant, one)))
        changed = replace(shelved.document, readers=readers)
        found = self.house.hades.is_unchanged(changed, Principal(changed.tenant, subject))
        if found is not None:  # else it was deleted
            shelved.document = found
            shelved.versions[-1].limits[:] = [readers]
            for older in shelved.versions[:-1]:
                older.limits.append(readers)

    def some_readers(self) -> frozenset[str]:
        return frozenset(self.rng.sample(SUBJECTS, self.rng.choice((0, 0, 1, 1, 2))))

    # ── what is asked with ──────────────────────────────────────────────────────────────────────

    def any_document(self) -> Shelved:
        return self.rng.choice(list(self.shelf.values()))

    def question(self) -> str:
        aimed = self.any_document()
        return self.rng.choice(
            (
                f"What is the {aimed.document.title.rpartition(' ')[0]} of unit 1?", f"see {aimed.bait}",
                f"code of the {self.rng.choice(TOPICS)}", self.rng.choice(TOPICS), self.rng.choice(HOSTILE),
            )
        )  # fmt: skip

    def collection(self) -> str:
        return self.rng.choice((*COLLECTIONS, *COLLECTIONS, *COLLECTIONS, *self.collections.values()))

    def value(self) -> object:
        aimed = self.any_document()
        return self.rng.choice(
            (
                aimed.document.source, aimed.document.title, self.rng.choice(ROBOTS), self.rng.randint(0, 10), True,
                self.rng.choice(HOSTILE), self.rng.choice(TENANTS), aimed.document.document_id, 0.5,
            )
        )  # fmt: skip

    def condition(self, depth: int = 2) -> object:
        """A filter, mostly a valid one."""
        if depth and self.rng.random() < 0.4:
            parts = [self.condition(depth - 1) for _ in range(self.rng.randint(1, 3))]
            return {"type": self.rng.choice(("and", "or")), "filters": parts}
        key = self.rng.choice(("robot_id", "lot", "source", "title", "note", "tenant", "readers", "absent", "open"))
        if self.rng.random() < 0.1:
            return self.rng.choice(({}, {HOSTILE[0]: 1}, {"type": "like", "key": key, "value": "%"}, {key: None}))
        kind = self.rng.choice(("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"))
        many = kind in ("in", "nin")
        return {"type": kind, "key": key, "value": [self.value(), self.value()] if many else self.value()}

    def searching(self) -> dict[str, Any]:
        """The fields of a search, each mostly left out."""
        chance = self.rng.random
        fields: dict[str, Any] = {"query": self.question(), "collection": self.collection()}
        if chance() < 0.5:
            fields["filters"] = self.condition()
        if chance() < 0.3:
            fields["as_of"] = self.rng.randint(0, 12)
        if chance() < 0.5:
            fields |= {"graph": self.rng.choice(("on", "auto", "off")), "hops": self.rng.randint(1, 3)}
        if chance() < 0.3:
            fields["hybrid"] = self.rng.choice(
                ({"embedding_weight": 0.0, "text_weight": 1.0}, {"embedding_weight": 1.0, "text_weight": 0.0})
            )
        if chance() < 0.5:
            fields["explain"] = True
        if chance() < 0.3:
            fields["k"] = self.rng.randint(1, 50)
        return fields

    def job(self, who: Who) -> str:
        """The id of some job, of anybody's."""
        return self.rng.choice([job_id for _, job_id in self.jobs] or ["0" * 32])


# ── the ways in: each makes a request ───────────────────────────────────────────────────────────


def _search(world: World, who: Who) -> Request:
    return Request("POST", "/rag/search", world.searching())


def _query(world: World, who: Who) -> Request:
    body = world.searching() | {"stream": world.rng.random() < 0.5}
    if world.rng.random() < 0.3:
        body["session_id"] = world.rng.choice((*SESSIONS, HOSTILE[0]))
    return Request("POST", "/rag/query", body)


def _chat(world: World, who: Who) -> Request:
    model = world.rng.choice(("nexus-rag", "nexus-rag", f"nexus-rag/{world.collection()}"))
    return Request("POST", "/v1/chat/completions", _conversation(world, model))


def _ask_model(world: World, who: Who) -> Request:
    return Request("POST", "/v1/chat/completions", _conversation(world, "teller"))


def _conversation(world: World, model: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": world.question()}]
    if world.rng.random() < 0.2:
        messages = [{"role": "user", "content": "see above"}, {"role": "assistant", "content": "yes"}, *messages]
    return {"model": model, "messages": messages, "stream": world.rng.random() < 0.5}


def _ask_session(world: World, who: Who) -> Request:
    body = {"input": world.question(), "collection": world.collection()}
    return Request("POST", f"/mcp/{world.rng.choice(SESSIONS)}/query", body)


def _read_session(world: World, who: Who) -> Request:
    return Request("GET", f"/mcp/{world.rng.choice(SESSIONS)}/get_context")


def _add_to_session(world: World, who: Who) -> Request:
    told = f"The {world.rng.choice(TOPICS)} is {world.canary(Kept(who[0]))}."
    return Request("POST", f"/mcp/{world.rng.choice(SESSIONS)}/add_context", {"content": told})


def _clear_session(world: World, who: Who) -> Request:
    return Request("DELETE", f"/mcp/{world.rng.choice(SESSIONS)}/clear_context")


def _list_documents(world: World, who: Who) -> Request:
    cursor = world.rng.choice(("", world.any_document().document.document_id, "f" * 32))
    where = world.rng.choice(("", f"&collection={world.collection()}"))
    return Request("GET", f"/rag/documents?limit={world.rng.randint(1, 40)}&after={cursor}{where}")


def _one_document(world: World, who: Who) -> Request:
    shelved = world.any_document()
    path = world.rng.choice(("/rag/documents/", "/rag/documents/", "/rag/deletions/"))
    return _by_id(world, who, "GET", path, shelved.document.document_id, shelved.may_see(who))


def _delete_document(world: World, who: Who) -> Request:
    shelved = world.any_document()
    return _by_id(world, who, "DELETE", "/rag/documents/", shelved.document.document_id, shelved.may_see(who))


def _by_id(world: World, who: Who, method: str, path: str, id: str, may_see: bool, rest: str = "") -> Request:
    """One that may not be seen must be answered as one that was never there."""
    twin = None if may_see else (id, f"{world.rng.getrandbits(128):032x}")
    return Request(method, f"{path}{id}{rest}", twin=twin)


def _announce(world: World, who: Who) -> Request:
    """Names that others' documents have too, under a key that others use too."""
    kept = Kept(who[0])
    names = [f"{world.canary(kept)}.md"]
    if world.rng.random() < 0.1:
        names.append(world.any_document().document.source)
    files = [{"filename": name, "digest": "0" * 32, "size": 1, "metadata": {"a": world.canary(kept)}} for name in names]
    headers = {"idempotency-key": world.rng.choice(KEYS)} if world.rng.random() < 0.5 else {}
    return Request("POST", "/rag/jobs", {"files": files, "collection": world.rng.choice(COLLECTIONS)}, headers)


def _list_jobs(world: World, who: Who) -> Request:
    cursor = world.rng.choice(("", f"&after={world.job(who)}"))
    return Request("GET", f"/rag/jobs?limit={world.rng.randint(1, 20)}{cursor}")


def _one_job(world: World, who: Who) -> Request:
    job_id = world.job(who)
    is_ours = (who[0], job_id) in world.jobs
    method, rest = world.rng.choice(
        (("GET", ""), ("GET", "?limit=1"), ("POST", "/cancel"), ("DELETE", ""), ("POST", "/files/0/retry"))
    )
    return _by_id(world, who, method, "/rag/jobs/", job_id, is_ours, rest)


def _store(world: World, who: Who) -> Request:
    """Of users that others name too."""
    kept = Kept(who[0], [frozenset({who[1]})])
    topic = world.rng.choice(TOPICS)
    body = {
        "query": f"the {topic}?", "response": f"It is {world.canary(kept)}.", "context": [world.canary(kept)],
        "user": world.rng.choice(SUBJECTS), "metadata": {"lot": world.rng.randint(1, 9), "note": world.canary(kept)},
    }  # fmt: skip
    return Request("POST", world.rng.choice(("/memory/store", "/store")), body)


def _recall(world: World, who: Who) -> Request:
    body: dict[str, Any] = {"limit": world.rng.randint(1, 100)}
    if world.rng.random() < 0.7:
        body["query"] = world.question()
    if world.rng.random() < 0.5:
        body["filters"] = world.rng.choice((world.condition(), {"user": world.rng.choice(SUBJECTS)}))
    return Request("POST", world.rng.choice(("/memory/retrieve", "/retrieve")), body)


def _forget(world: World, who: Who) -> Request:
    if not world.kept or world.rng.random() < 0.1:
        return Request("DELETE", f"/memory/interactions?user={world.rng.choice(SUBJECTS)}")
    whose, id = world.rng.choice(world.kept)
    return _by_id(world, who, "DELETE", "/memory/interactions/", id, whose == who)


def _overview(world: World, who: Who) -> Request:
    paths = ("/v1/models", "/status", "/report", "/metrics", "/pipelines", "/rag/deletions?limit=50", "/openapi.json")
    return Request("GET", world.rng.choice(paths))


def _message(method: str, params: Mapping[str, Any], twin: tuple[str, str] | None = None) -> Request:
    headers = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return Request("POST", "/mcp", body, headers, twin)


def _tool(tool: str, twin: tuple[str, str] | None = None, **arguments: Any) -> Request:
    return _message("tools/call", {"name": tool, "arguments": arguments}, twin)


def _tool_search(world: World, who: Who) -> Request:
    fields = {name: value for name, value in world.searching().items() if name in ("query", "collection", "k")}
    if world.rng.random() < 0.3 and isinstance(condition := world.condition(), dict):
        fields["filters"] = condition
    return _tool("search", **fields)


def _tool_ask(world: World, who: Who) -> Request:
    return _tool("ask", question=world.question(), collection=world.collection())


def _tool_document(world: World, who: Who) -> Request:
    shelved = world.any_document()
    id = shelved.document.document_id
    twin = None if shelved.may_see(who) else (id, f"{world.rng.getrandbits(128):032x}")
    chance = world.rng.random()
    if chance < 0.1:
        return _tool("delete_document", twin, document_id=id)
    if chance < 0.6:
        return _tool("fetch", twin, id=id)
    return _message("resources/read", {"uri": f"nexus://documents/{id}"}, twin)


def _tool_session(world: World, who: Who) -> Request:
    session, chance = world.rng.choice(SESSIONS), world.rng.random()
    if chance < 0.2:
        return _tool("clear_context", session_id=session)
    if chance < 0.5:
        told = f"The {world.rng.choice(TOPICS)} is {world.canary(Kept(who[0]))}."
        return _tool("add_context", session_id=session, content=told)
    return _tool("get_context", session_id=session)


def _tool_overview(world: World, who: Who) -> Request:
    collection = {"uri": f"nexus://collections/{world.collection()}"}
    listings = ("tools/list", "resources/list", "resources/templates/list", "prompts/list")
    ways = (_tool("list_collections"), _message("resources/read", collection), _message(world.rng.choice(listings), {}))
    return world.rng.choice(ways)


WAYS: Mapping[str, tuple[int, Callable[[World, Who], Request]]] = {
    "search": (26, _search), "query": (16, _query), "chat": (10, _chat), "model": (6, _ask_model),
    "session query": (6, _ask_session), "session": (4, _read_session), "session told": (2, _add_to_session),
    "session cleared": (1, _clear_session), "documents": (5, _list_documents), "document": (6, _one_document),
    "delete": (1, _delete_document), "announce": (3, _announce), "jobs": (5, _list_jobs), "job": (5, _one_job),
    "overview": (4, _overview), "store": (5, _store), "recall": (8, _recall), "forget": (2, _forget),
    "tool search": (4, _tool_search), "tool ask": (2, _tool_ask), "tool document": (5, _tool_document),
    "tool session": (3, _tool_session), "tool overview": (2, _tool_overview),
}  # fmt: skip


# ── one case ────────────────────────────────────────────────────────────────────────────────────


async def ask(app: ASGIApp, request: Request) -> Answer:
    """A request as a server hands it on, and all that the application sends back."""
    body = b"" if request.body is None else json.dumps(request.body).encode()
    path, _, query = request.path.partition("?")
    headers = {"host": "127.0.0.1:8000", **request.headers}
    if body:
        headers |= {"content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request.method, "path": path,
        "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    unsent = [{"type": "http.request", "body": body, "more_body": False}]
    never = asyncio.get_running_loop().create_future()
    sent: list[Message] = []

    async def receive() -> Message:
        return unsent.pop() if unsent else await asyncio.shield(never)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    never.cancel()
    status = next(message["status"] for message in sent if message["type"] == "http.response.start")
    raw = b"".join(name + b": " + value + b"\n" for m in sent for name, value in m.get("headers", ()))
    content = b"".join(message.get("body", b"") for message in sent)
    words = re.findall(rb'"(?:delta|content|text)": ?"((?:[^"\\]|\\.)*)"', content)
    return Answer(status, (raw + content + b"\n" + b"".join(words)).decode(errors="replace"))


def find_strays(world: World, who: Who, request: Request, answer: Answer, report: Report, kind: str) -> list[str]:
    """Marks in the answer that this caller may not see and did not send, and faults."""
    found = set(MARK.findall(answer.text)) - set(MARK.findall(request.text())) - world.told[who[0]]
    known = {mark: world.marks[mark] for mark in found if mark in world.marks}
    strays = [mark for mark, of in known.items() if not of.may_see(who)]
    strays += [mark for mark in found if mark.startswith("zq") and mark not in world.marks]
    report.telling[kind] += len(known) > len(strays)
    wrong = [f"{mark} of {_whose(world, mark)}" for mark in strays]
    return wrong + ([f"a fault: {answer.text[-300:]}"] if answer.status in (500, 502) else [])


def _whose(world: World, mark: str) -> str:
    of = world.marks.get(mark)
    if of is None:
        return "another world"
    kept = of if isinstance(of, Kept) else of.versions[-1]
    return f"{kept.tenant}, for {[sorted(one) for one in kept.limits]}"


async def _one_case(world: World, app: ASGIApp, keys: Mapping[Who, str], report: Report) -> list[str]:
    rng = world.rng
    chance = rng.random()
    if chance < 0.02:
        tenant, collection, name = rng.choice(list(world.shelf))
        world.publish(tenant, name, collection)
    elif chance < 0.03:
        world.change_readers()
    who = rng.choice(list(keys))
    (kind,) = rng.choices(list(WAYS), [weight for weight, _ in WAYS.values()])
    request = WAYS[kind][1](world, who)
    authorised = replace(request, headers={**request.headers, "authorization": f"Bearer {keys[who]}"})
    answer = await ask(app, authorised)
    report.kinds[kind] += 1
    report.statuses[answer.status] += 1
    if kind == "announce":
        world.told[who[0]] |= {
            mark for mark in MARK.findall(request.text()) if isinstance(world.marks.get(mark), Shelved)
        }
    wrong = find_strays(world, who, request, answer, report, kind)
    if kind == "announce" and (found := re.search(r'"job_id":"([0-9a-f]{32})"', answer.text)):
        world.jobs.append((who[0], found[1]))
        world.marks.setdefault(found[1], Kept(who[0]))
    if kind == "store" and (found := re.search(r'"interaction_id":"([0-9a-f]{32})"', answer.text)):
        world.kept.append((who, found[1]))
        world.marks[found[1]] = Kept(who[0], [frozenset({who[1]})])
    if request.twin is not None:
        other = await ask(app, authorised.other())
        if _alike(answer, request.twin[0]) != _alike(other, request.twin[1]):
            wrong.append(f"it differs from what is not there: {answer.text} and {other.text}")
    return [f"{kind} by {who}: {request.method} {request.text()}: {one}" for one in wrong]


def _alike(answer: Answer, id: str) -> tuple[int, str]:
    """An answer without its request's id and the id asked for."""
    return answer.status, re.sub(r"[0-9a-f]{32}", "#", answer.text.replace(id, "#"))


# ── a world and its cases ───────────────────────────────────────────────────────────────────────


@contextmanager
def heard() -> Iterator[list[str]]:
    """Every line that is logged meanwhile, with its traceback."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(handler)


def run(seed: int, cases: int = CASES_PER_WORLD, stop_at: int = 1) -> Report:
    """So many cases in the world of this seed; ends early after `stop_at` leaks."""
    report = Report()
    documents = sqlite.open("sqlite::memory:")
    house = build_house(documents, memory.open("memory:"), Rows())
    world = World(seed, house)
    with tempfile.TemporaryDirectory(prefix="nexus-isolation-") as home, heard() as lines:
        world.furnish()
        cache = ResponseCache(1000, 600, 2**24)
        with open_front(house, Path(home), cache, Member(Teller(world.known), 0.4, False)) as lent:
            keys = {
                (tenant, subject): lent.keys.create(subject, tenant, PERMISSIONS - {"admin"})[0]
                for tenant in TENANTS for subject in SUBJECTS
            }  # fmt: skip
            asyncio.run(_all_cases(world, build(lent), keys, seed, cases, stop_at, report))
        said = "\n".join(lines) + telemetry.exposition().decode()
        report.leaks += [
            Leak(seed, cases, f"{mark} in the log or the metrics") for mark in set(re.findall(r"zq[0-9a-z]{12}", said))
        ]
    house.retriever.close()
    documents.close()
    return report


async def _all_cases(
    world: World, app: ASGIApp, keys: Mapping[Who, str], seed: int, cases: int, stop_at: int, report: Report
) -> None:
    for case in range(cases):
        report.leaks += [Leak(seed, case, wrong) for wrong in await _one_case(world, app, keys, report)]
        if len(report.leaks) >= stop_at:
            return


def run_many(seeds: Sequence[int], cases: int = CASES_PER_WORLD) -> Report:
    """The worlds of these seeds one after another, until one leaks."""
    report = Report()
    for seed in seeds:
        report.add(run(seed, cases))
        if report.leaks:
            break
    return report
