"""What the tests share: a small honest embedder, and a whole Nexus in one process."""

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from cluster.alone import AloneSharing
from cluster.bootstrap import STARTING
from deployments.authz import LocalPolicies
from deployments.gateway import Lent, build
from nexus.access import PERMISSIONS, KeyRing
from nexus.audit import Chain, Recorder
from nexus.balancer import Balancer, Member, Weights
from nexus.cache import ResponseCache, cached
from nexus.chunking import ChunkSettings
from nexus.config import Config
from nexus.conveyor import Conveyor
from nexus.enforcement import Enforcer, open_tiers
from nexus.hades import Fault, Hades, Removed, chunks_of, document_id_of, version_of
from nexus.homes import HadesIndexer, Homes
from nexus.ingest import Ingestor, Source
from nexus.jobs import Jobs, examine
from nexus.kept import pack
from nexus.memory import Memory
from nexus.models import extractive
from nexus.parsing import Limits, Parsers
from nexus.pipelines.rag import Tools
from nexus.ports import DocumentStore, InputType, Staged, VectorStore
from nexus.registry import open_interactions
from nexus.resident import Standing
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.sessions import Sessions
from nexus.stores import memory, sqlite
from nexus.tokens import Tokens
from nexus.types import (
    Block,
    Document,
    Evidence,
    Parsed,
    Piece,
    Principal,
    Receipt,
    SearchRequest,
    SearchResult,
    Vectors,
    content_digest,
)
from tests.words import WordEmbedder

ALICE = Principal("acme", "alice", frozenset({"documents:read", "documents:write"}))
BOB = Principal("acme", "bob", frozenset({"documents:read"}))
MALLORY = Principal("other", "mallory", frozenset({"documents:read", "documents:write"}))
DATA = Path(__file__).parent.parent.parent / "shared" / "data"
os.environ |= STARTING  # of a Ray that a test starts by itself, too: else they wait for whatever else runs here
PARSERS = Parsers(Limits(cpu_seconds=10, wall_seconds=20))  # for all tests: a zygote keeps nothing of a document


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write what Raft's transcripts say now; review the diff")


def pytest_unconfigure() -> None:
    PARSERS.close()


class OneMachine(LoadFileScheduling):
    """A file at a time to each worker, and all of tests/system to one: two whole clusters starve each other."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/system" if nodeid.startswith("tests/system/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneMachine:
    return OneMachine(config, log)


@pytest.fixture(autouse=True, scope="module")
def nothing_reads_on() -> Iterator[None]:
    """Whatever holds indexes in memory is closed before its store is: its thread would speak in others' tests."""
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "resident"] == []


@dataclass
class House:
    """HADES over two stores, and the shortest way to put a document into it."""

    hades: Hades
    retriever: Retriever
    embedder: WordEmbedder

    def describe(self, source: str, texts: Sequence[str], who: Principal = ALICE, **fields: object) -> Document:
        collection = str(fields.pop("collection", "default"))
        content = "\n".join(texts).encode()
        return Document(
            document_id_of(who.tenant, collection, source), version_of(content_digest(content), "p", "c", "e"),
            who.tenant, collection, source, source, "text/plain", fields.pop("metadata", {}),
            fields.pop("readers", frozenset()), len(content), len(texts),
        )  # fmt: skip

    def stage(self, document: Document, texts: Sequence[str]) -> int:
        epoch = self.hades.begin(document)
        chunks = chunks_of(document, [Piece(text, tokens=len(text.split())) for text in texts])
        kept = pack(Parsed(document.title, "text/plain", tuple(Block("text", text) for text in texts)))
        self.hades.stage([Staged(document, epoch, chunks, texts, self.embedder.embed(texts), kept=kept)])
        return epoch

    def put(self, source: str, *texts: str, who: Principal = ALICE, **fields: object) -> Document:
        document = self.describe(source, texts, who, **fields)
        (published,) = self.hades.publish([(document, self.stage(document, texts))])
        return published


def build_house(documents: DocumentStore, vectors: VectorStore, embedder: WordEmbedder | None = None) -> House:
    embedder = embedder or WordEmbedder()
    hades = Hades(documents, vectors, embedder.fingerprint, embedder.dimension)
    return House(hades, Retriever(hades, embedder, RetrievalSettings()), embedder)


@pytest.fixture
def house() -> Iterator[House]:
    with open_house() as opened:
        yield opened


@contextmanager
def open_house() -> Iterator[House]:
    documents = sqlite.open("sqlite::memory:")
    house = build_house(documents, memory.open("memory:"))
    yield house
    house.retriever.close()
    documents.close()


class LocalRetriever:
    """The retriever actor's methods over a House, in this process."""

    def __init__(self, house: House) -> None:
        self.house = house

    async def search(self, request: SearchRequest, principal: Principal) -> SearchResult:
        return self.house.retriever.search(request, principal)

    async def retrieve(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        result = self.house.retriever.search(request, principal)
        return Evidence(result, tuple(self.house.retriever.expand(result.hits[:passages], tokens)))

    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        return self.house.embedder.embed(texts, input_type)

    async def standings(self, tenant: str) -> list[Standing]:
        held = self.house.retriever.resident
        return [one for one in held.standings() if one.tenant == tenant] if held else []

    async def describe(self) -> dict[str, object]:
        return {"fingerprint": self.house.embedder.fingerprint}


class LocalIngestor:
    """The ingestor actor's methods over a House, in this process, with real parsing children."""

    def __init__(self, house: House, jobs: Jobs) -> None:
        self.house, self.jobs = house, jobs
        self.steps = build_steps(house)
        self.parsers = self.steps.parsers
        self._line = Conveyor(jobs, self.steps)
        self._running: asyncio.Task[None] | None = None

    def _conveyor(self) -> Conveyor:
        if self._running is None:
            self._running = asyncio.create_task(self._line.run())
        return self._line

    async def finish(self, job_id: str, number: int) -> None:
        await self._conveyor().wait(job_id, number)

    async def wake(self) -> None:
        self._conveyor().wake()

    async def find_unchanged(self, sources: Sequence[Source], principal: Principal) -> list[Receipt | None]:
        return [self.steps.find_unchanged(source, principal) for source in sources]

    async def vacuum(self, keep_closed_seconds: float, document_ids: Sequence[str] | None = None) -> list[Removed]:
        return self.house.hades.vacuum(keep_closed_seconds, 60, document_ids)

    async def fsck(self, repair: bool) -> list[Fault]:
        return examine(self.house.hades, self.jobs, repair)


def build_steps(house: House) -> Ingestor:
    """The steps of ingestion over a House, with real parsing children."""
    count = lambda texts: [len(text.split()) for text in texts]  # noqa: E731
    return Ingestor(house.hades, PARSERS, house.embedder.embed, count, ChunkSettings())


@dataclass
class Door:
    """A front door over one House, the keys to it, and what stands behind it."""

    client: TestClient
    lent: Lent
    keys: KeyRing
    house: House

    def headers(self, tenant: str = "default", name: str = "tester", *permissions: str) -> dict[str, str]:
        key, _ = self.keys.create(name, tenant, frozenset(permissions) or PERMISSIONS)
        return {"authorization": f"Bearer {key}"}


@pytest.fixture
def door(house: House, tmp_path: Path) -> Iterator[Door]:
    with open_door(house, tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """One for all tests of a module, where none of them minds what the others did."""
    with open_house() as house, open_door(house, tmp_path_factory.mktemp("home")) as opened:
        yield opened


@contextmanager
def open_front(house: House, home: Path, cache: ResponseCache | None = None, *others: Member) -> Iterator[Lent]:
    """What the front door of one process is lent over a House; its answers are kept in `cache`."""
    keys = KeyRing(home)
    jobs = Jobs(home)
    recorder = Recorder(Chain(home))
    retriever, ingestor = LocalRetriever(house), LocalIngestor(house, jobs)
    members = [Member(extractive.open("extractive:", embed=retriever.embed), 0.5), *others]
    balancer = Balancer(members, Weights(1, 1, 1), probe_seconds=5)
    interactions = open_interactions("sqlite:", home=home)
    sharing = AloneSharing(home)
    config = Config(
        home=home, http={"max_body_bytes": 2**20, "allowed_hosts": ["testserver"]},
        policies={"tiers": {name: f"file:{home}/{name}" for name in ("hot", "cold")}},
        sharing={"max_block_bytes": 64 * 2**20},
    )  # fmt: skip
    policies = LocalPolicies(lambda: open_enforcer(config, ingestor.steps, recorder))
    yield Lent(
        config=config,
        keys=keys,
        tokens=Tokens(keys, home, config.access),
        audit=recorder,
        documents=house.hades.documents,
        jobs=jobs,
        sessions=Sessions(house.hades.documents),
        memory=Memory(interactions, retriever, config.memory),
        retriever=retriever,
        ingestor=ingestor,
        policies=policies,
        balancer=balancer,
        embedders={"word-embedder": retriever},
        count_tokens=lambda texts: [len(text.split()) for text in texts],
        rag=Tools(
            retriever.retrieve, cached(balancer.generator("extractive"), cache), passages=5, passage_tokens=500,
            abstain_below=0.3,
        ),
        checks={"documents": lambda: asyncio.to_thread(house.hades.documents.check)},
        cache=cache,
        standings=retriever.standings,
        sharing=sharing,
    )  # fmt: skip
    sharing.close()
    policies.close()
    interactions.close()
    jobs.close()
    keys.close()
    recorder.close()


def open_enforcer(config: Config, steps: Ingestor, recorder: Recorder) -> Enforcer:
    """Policies over the tiers of these settings, which are folders."""
    for address in config.policies.tiers.values():
        Path(address.removeprefix("file:")).mkdir(exist_ok=True)
    return Enforcer(Homes(Path(config.home), open_tiers(config), HadesIndexer(steps)), recorder.chain.append)


@contextmanager
def open_door(house: House, home: Path) -> Iterator[Door]:
    with open_front(house, home) as lent, TestClient(build(lent), raise_server_exceptions=False) as client:
        yield Door(client, lent, lent.keys, house)
