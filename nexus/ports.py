"""The doors between Nexus and the parts that can be exchanged: one screen each.

A part is chosen by its address in the configuration (registry.py). All methods may be called from
several threads at once. Blocking is allowed: whoever calls from an event loop uses a thread.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from nexus.errors import ConfigError
from nexus.filters import Filter
from nexus.types import (
    Chunk,
    Delta,
    Document,
    FileOutcome,
    Forgotten,
    Interaction,
    InteractionKind,
    MemoryEntry,
    Principal,
    Prompt,
    Receipt,
    StoredFile,
    Upload,
    Vector,
    Vectors,
)

InputType = Literal["query", "passage"]

INDEX_PREFIX = "nx_"  # of every index of Nexus, in a vector store that others may use too


class Embedder(Protocol):
    """Texts to unit vectors."""

    @property
    def fingerprint(self) -> str:
        """Equal for two embedders only if their vectors may be compared."""
        ...

    @property
    def dimension(self) -> int: ...

    max_tokens: int  # of the text, special tokens not counted; what is longer is cut off

    def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        """Shape (len(texts), dimension), float32, rows of unit length, in the order given.

        Some models embed a question otherwise than what may answer it; `input_type` says which the texts are.
        """
        ...


class Generator(Protocol):
    """A prompt to text. An implementation that needs a thread or a process of its own has it."""

    name: str  # as clients ask for it
    sees_images: bool

    def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        """The generation as it comes. Closing the generator stops it, and its place is free at once.

        Each choice ends with a delta that has a `finish_reason`; a backend that counts tokens gives `usage` last.
        Raises InvalidRequest for what the model cannot do (a prompt too long, pictures it does not see),
        Overloaded and Unavailable when another replica or a later moment might do, UpstreamInvalid for nonsense.
        """
        ...

    async def check(self) -> None:
        """Return if a token could be had, else raise Unavailable."""
        ...


class Reranker(Protocol):
    """How relevant texts are to a query, read together with it."""

    name: str

    def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        """Shape (len(texts),), float32, each in [0, 1], in the order given. Only their order means something."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """What a guard says of a text; `categories` are its own words for what is wrong with it."""

    allowed: bool
    categories: tuple[str, ...] = ()


class Guard(Protocol):
    """A judge of texts outside of the content rules."""

    name: str

    async def judge(self, text: str, where: Literal["input", "output", "document"], asked: str = "") -> Judged:
        """Whether a text may pass; of an answer, `asked` is what it answers.

        Raises Overloaded and Unavailable when it cannot say, UpstreamInvalid when it says nonsense.
        """
        ...


@dataclass(frozen=True, slots=True)
class IndexRow:
    """What the vector store keeps of a chunk. `terms` are stemmed words (retrieval.analyse).

    `audience` is the tenant, and for a document with readers a name of its own for them (hades.audience_of).
    """

    chunk_id: str
    document_id: str
    audience: str
    terms: str
    vector: Vector


@dataclass(frozen=True, slots=True)
class Scope:
    """Which rows of an index a search may return: of the tenant's, and of these documents only if given.

    `audiences` name the sets of readers that the searcher is one of; rows of other sets are not found.
    """

    tenant: str
    document_ids: tuple[str, ...] | None = None
    audiences: tuple[str, ...] = ()


def require_dimension(index: str, dimension: int | None, vectors: Sequence[Vector]) -> None:
    """Raises ConfigError for a vector that an index of this dimension cannot hold; None: it is not known."""
    wrong = next((len(vector) for vector in vectors if len(vector) != dimension), None)
    if dimension is not None and wrong is not None:
        raise ConfigError(f"a vector of {wrong} dimensions does not fit the index {index!r}, which has {dimension}")


class VectorStore(Protocol):
    """A fast hint at which chunks may matter. It is never believed about visibility (hades.py).

    Several generations of an index live side by side, each by its own name: letters, digits and underscores.
    Where an index is read or written, an alias may be named instead.
    """

    def open_index(self, index: str, dimension: int) -> None:
        """Make the index if it is not there. Idempotent. Raises ConfigError for one of another dimension or schema."""
        ...

    def indexes(self) -> set[str]:
        """The indexes that there are, of those whose names begin with INDEX_PREFIX; no aliases."""
        ...

    def drop_index(self, index: str) -> None:
        """Remove it with its rows, if it is there. Raises Conflict while an alias points to it."""
        ...

    def point_alias(self, alias: str, index: str) -> None:
        """Let the alias mean this index from now on, all at once. Raises NotFound without such an index."""
        ...

    def aliased(self, alias: str) -> str | None:
        """The index that the alias means; None where there is no such alias."""
        ...

    def count(self, index: str) -> int:
        """How many rows it has now; 0 where there is no such index."""
        ...

    def upsert(self, index: str, rows: Sequence[IndexRow]) -> None: ...

    def delete(self, index: str, chunk_ids: Sequence[str]) -> None: ...

    def flush(self, index: str) -> None:
        """Make what was written cheap to search. Rows are found without it, only slower."""
        ...

    def search_dense(self, index: str, vector: Vector, limit: int, scope: Scope) -> list[tuple[str, float]]:
        """(chunk id, cosine), best first."""
        ...

    def search_text(self, index: str, terms: str, limit: int, scope: Scope) -> list[tuple[str, float]]:
        """(chunk id, BM25 score), best first, scores positive."""
        ...

    def chunk_ids(self, index: str) -> set[str]:
        """Every chunk id in the index, for `fsck`."""
        ...

    def check(self) -> None:
        """Return if the store answers, else raise Unavailable."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LiveIndex:
    """Which index of a collection is searched, and which embedder made the vectors in it: the questions are its, too.

    `embedder` is its address, "" where nobody noted it: then it must be the configured one. So with a dimension of 0.
    `cut` names its chunks; `chunking` is how they are cut (ChunkSettings.write), "": as configured, each when it came.
    """

    index: str
    fingerprint: str
    embedder: str = ""
    dimension: int = 0
    cut: str = ""
    chunking: str = ""


class Coordinator(Protocol):
    """What all machines agree on. Without most of its voters it says Unavailable to whoever would change something."""

    def stay(self, worker: str) -> None:
        """Be known to work for another LEASE_SECONDS of coordination.py, at least. Raises Unavailable."""
        ...

    def leave(self, worker: str) -> None:
        """Be known to work no more. Raises Unavailable."""
        ...

    def working(self) -> set[str]:
        """Who works: all who said so before this was asked, but those who left or fell silent. Raises Unavailable."""
        ...

    def live_index(self, collection: str) -> LiveIndex | None:
        """As of a second ago, or, without a quorum, as of its end. Raises Unavailable before anything was learnt."""
        ...

    def point(self, collection: str, to: LiveIndex) -> LiveIndex:
        """Make this index the live one where none is; returns which one is. Raises Unavailable."""
        ...

    def move(self, collection: str, expected: LiveIndex, to: LiveIndex) -> bool:
        """Make this index the live one if the expected one is; whether it is now, by whomever. Raises Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Collection:
    """A named set of documents. `fingerprint` says how its vectors were made; `index` where they are.

    Tenants share a name and an index, and nothing else: `sequence` and `horizon` are those of the tenant asked for.
    A store says of its own index what it was told, HADES of the one that is live.
    """

    name: str
    fingerprint: str
    index: str
    sequence: int
    horizon: int  # versions closed at or before it may have been vacuumed: no `as_of` below it is whole
    embedder: str = ""  # as in LiveIndex
    dimension: int = 0
    identity: str = ""  # the fingerprint that names its versions, whichever index is live; "": `fingerprint`
    cut: str = ""  # as in LiveIndex
    chunking: str = ""
    revision: int = field(default=0, compare=False)  # as `Followed` counts it, for the tenant asked for


GenerationState = Literal["building", "ready", "refused", "staying", "leaving"]


@dataclass(frozen=True, slots=True)
class Generation:
    """An index of a collection, with another embedder or chunker than its own one, and how far it has come.

    It has chunks of its own, and is written to like the own one from the moment it is there. "building": what was
    published before is being brought in; "ready" and "refused": it is complete, and was compared; "staying": it is
    live, and will be the own one in a while; "leaving": nothing is written to it any more, and it will be removed.
    `since` is in Unix seconds.
    """

    live: LiveIndex
    state: GenerationState
    since: float
    asked: Mapping[str, object]  # on which questions it is compared, and for whom
    figures: Mapping[str, object]

    @property
    def is_written(self) -> bool:
        return self.state != "leaving"


@dataclass(frozen=True, slots=True)
class Cut:
    """One version as one index has it: its chunks in order, the texts that were embedded, and their vectors."""

    chunks: Sequence[Chunk]
    texts: Sequence[str]
    vectors: Vectors | Sequence[Vector]


@dataclass(frozen=True, slots=True)
class Staged:
    """One version ready to be written, as the collection's own index has it, and every other one.

    `index` is the own one that it was made for ("": nobody asks), `beside` are others by their names. `kept` is what
    the chunks were cut from (kept.py).
    """

    document: Document
    epoch: int
    chunks: Sequence[Chunk]
    texts: Sequence[str]
    vectors: Vectors | Sequence[Vector]
    index: str = ""
    beside: Mapping[str, Cut] = field(default_factory=dict)
    kept: bytes = b""

    @property
    def own(self) -> Cut:
        return Cut(self.chunks, self.texts, self.vectors)


@dataclass(frozen=True, slots=True)
class Deletion:
    """The receipt of a delete: who deleted what and when, and how much of it has been purged since.

    `versions`, `chunks` and `vectors` count what was purged of the document; `purged_at` (Unix seconds)
    is there once nothing of it is left.
    """

    document_id: str
    sequence: int
    tenant: str
    collection: str
    source: str
    subject: str
    deleted_at: float
    purged_at: float | None
    versions: int
    chunks: int
    vectors: int


Verdict = Literal["visible", "unknown", "unpublished", "superseded", "not yet", "other tenant", "not a reader"]


class DocumentStore(Protocol):
    """The authority: which documents exist, which version is visible when, and to whom."""

    def open_collection(self, name: str, fingerprint: str, index: str) -> Collection:
        """The collection as recorded; recorded as given if it is new."""
        ...

    def collection(self, name: str, tenant: str | None = None) -> Collection | None:
        """As this tenant sees it: None until it has begun a document there. Without one, its sequence is 0."""
        ...

    def collections(self) -> list[Collection]: ...

    def begin(self, document: Document, accepted_at: int | None = None, by: Principal | None = None) -> int:
        """A new epoch of the document, which fences every earlier one.

        Raises Fenced when the document was deleted at a later sequence than `accepted_at`, and Conflict when
        its current version is none that `by` may read.
        """
        ...

    def stage(self, batch: Sequence[Staged]) -> None:
        """Write versions with their chunks, not yet visible. Raises Fenced on a stale epoch.

        Need not be durable before `publish` is. Raises Unavailable while that very version is retired.
        """
        ...

    def publish(self, versions: Sequence[tuple[Document, int]]) -> list[Document]:
        """Make these (document, epoch) visible in one transaction; all of them or, on Fenced, none.

        Each gets the next sequence number of its tenant's collection, and the version before it is closed at it.
        Whoever is not among its readers, may not read the versions before it any more either.
        """
        ...

    def annotate(self, document: Document) -> None:
        """Replace title, metadata and readers of the current version, whose content is unchanged."""
        ...

    def delete(self, document_ids: Sequence[str], principal: Principal) -> list[Document]:
        """Close the current versions, each at its collection's next sequence number, in one transaction.

        Fences whoever is making one of them, and opens a receipt for each. What is not there for this
        principal is left out.
        """
        ...

    def current(self, document_id: str, principal: Principal) -> Document | None: ...

    def history(self, document_id: str, principal: Principal) -> list[Document]:
        """The document's current version and those before it that are not vacuumed yet, the latest first.

        A version that was current twice is there twice. Empty unless the principal may read the current one.
        """
        ...

    def readers_of(self, document_ids: Sequence[str]) -> set[frozenset[str]]:
        """The sets of readers of these documents' current versions, of those that have any. Asks nobody."""
        ...

    def audiences(self, collection: str, principal: Principal) -> set[frozenset[str]]:
        """The sets of readers in the tenant's collection that the principal is one of."""
        ...

    def documents(self, principal: Principal, collection: str | None, after: str | None, limit: int) -> list[Document]:
        """Current documents that the principal may read, by document id, those after `after`."""
        ...

    def tally(self, principal: Principal) -> dict[str, tuple[int, int]]:
        """{collection: (documents, chunks)} of the current documents that the principal may read."""
        ...

    def matching(self, collection: str, principal: Principal, condition: Filter, as_of: int, limit: int) -> list[str]:
        """Ids of documents visible at `as_of` whose metadata meet the condition; at most `limit`."""
        ...

    def verdicts(
        self, collection: str, principal: Principal, chunk_ids: Sequence[str], as_of: int
    ) -> dict[str, Verdict]:
        """May this principal see each chunk at sequence `as_of`? Unknown ids are "unknown"."""
        ...

    def load(self, chunk_ids: Sequence[str]) -> dict[str, tuple[Chunk, Document]]:
        """Chunks with the document version they belong to. Asks nobody whether they may be seen."""
        ...

    def vectors(self, chunk_ids: Sequence[str]) -> dict[str, Vector]: ...

    def connected(
        self, collection: str, principal: Principal, document_ids: Sequence[str], hops: int, as_of: int, limit: int
    ) -> dict[str, tuple[int, str]]:
        """Documents within `hops` (1 to 3) edges of the given ones, as {id: (fewest hops, kind of the last edge)}.

        An edge is a "link", walked in either direction, or a "shared" value of metadata. The walk goes only
        through documents visible to the principal at `as_of`. The given ones are left out; nearest first; at
        most `limit`. A store bounds how many edges of one document it follows, and says how.
        """
        ...

    def vectors_of(
        self, collection: str, principal: Principal, document_ids: Sequence[str], as_of: int, limit: int, cut: str = ""
    ) -> dict[str, tuple[str, Vector]]:
        """{chunk id: (document id, vector)} of these documents as visible at `as_of`, at most `limit` chunks of a cut.

        Each document gives at most its share of the limit, its first chunks: a book leaves room for a note.
        """
        ...

    def neighbours(self, document_id: str, version: str, first: int, last: int, cut: str = "") -> list[Chunk]:
        """Chunks of one cut of a version with first <= ordinal <= last, in order."""
        ...

    def kept(self, document_id: str, version: str) -> bytes | None:
        """What a version's chunks were cut from; None for one that was staged without it, or is not there."""
        ...

    def needless(self, closed_before: float, staged_before: float) -> list[Document]:
        """Versions that nobody needs: closed before one Unix time, or staged before another and not published since.

        One that was closed counts as staged only if it was staged again after that.
        """
        ...

    def retire(self, document: Document, closed_before: float, staged_before: float) -> list[str] | None:
        """Claim a needless version for removal and return its chunk ids, of all cuts; None if it is needed after all.

        From here on no `as_of` sees it, and nobody can stage that very version for a moment.
        """
        ...

    def purge(self, document: Document) -> bool:
        """Forget a retired version with its chunks; False if it was staged again meanwhile."""
        ...

    def deletions(self, principal: Principal, document_id: str | None, limit: int) -> list[Deletion]:
        """Receipts of documents that the principal might read, the latest first; of one where given."""
        ...

    def damaged(self, index: str, dimension: int) -> list[str]:
        """Ids of current documents whose chunks in an index are not all there, or of which what is kept cannot be read;
        and of chunks with a wrong id or vector."""
        ...

    def chunk_ids(self, index: str, published: bool) -> set[str]:
        """Chunk ids of an index: those of current versions, or every one that has rows."""
        ...

    def chunk_ids_of(self, document_id: str, version: str) -> list[str]:
        """Of all cuts."""
        ...

    def add_turn(self, tenant: str, session_id: str, role: str, content: str) -> None: ...

    def turns(self, tenant: str, session_id: str) -> list[tuple[str, str]]:
        """(role, content) of a session, oldest first."""
        ...

    def replace_turns(
        self, tenant: str, session_id: str, first: Sequence[tuple[str, str]], replacement: tuple[str, str] | None
    ) -> bool:
        """In one transaction: in place of these first (role, content) of a session one other, or none.

        False, and nothing is done, unless the session still begins with them.
        """
        ...

    def clear_session(self, tenant: str, session_id: str) -> int: ...

    def check(self) -> None:
        """Return if the store answers, else raise Unavailable."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A file as a tier has it. `key` changes whenever its bytes may have; times are in Unix seconds."""

    path: str
    size: int
    modified_at: float
    used_at: float
    key: str


@dataclass(frozen=True, slots=True)
class Unusable:
    """Something on a tier that is no file to work with, such as a link: its name, for people, and why."""

    path: str
    reason: str


class Tier(Protocol):
    """A place for files, with a folder for each tenant, below which a file's path is the same on every tier.

    All methods raise InvalidRequest for a path that leads out of the tenant's folder, and Unavailable when the
    storage is away or full.
    """

    address: str

    def walk(self, tenant: str) -> Iterator[Found | Unusable]:
        """All that is there."""
        ...

    def find(self, tenant: str, path: str) -> Found | None: ...

    def read(self, tenant: str, path: str) -> Iterator[bytes]:
        """Its bytes, piece by piece. Raises NotFound."""
        ...

    def write(self, tenant: str, path: str, chunks: Iterable[bytes], modified_at: float | None = None) -> Found:
        """A new file under this name: whole and read back, or not at all; durable after `settle`.

        Never over another file: raises Conflict, unless that one has the very same bytes. Raises UpstreamInvalid
        when what is read back differs.
        """
        ...

    def remove(self, tenant: str, path: str, key: str) -> bool:
        """Remove it while its key is this one; False if it changed meanwhile. What is not there is removed."""
        ...

    def settle(self, tenant: str) -> None:
        """Return once all that was written and removed so far outlives a power cut."""
        ...

    def discard(self, tenant: str, path: str) -> None:
        """Remove what an interrupted `write` of this path left beside it."""
        ...

    def check(self) -> None:
        """Return if the storage answers, else raise Unavailable."""
        ...

    def close(self) -> None: ...


Role = Literal["home", "replica"]


@dataclass(frozen=True, slots=True)
class Placement:
    """What a placing tier was asked for a file, and how far it is; `reference` is its own, for looking again."""

    tenant: str
    path: str
    tier: str
    role: Role
    state: Literal["requested", "aligned", "failed"]
    reference: str = ""
    reason: str = ""


class PlacingTier(Tier, Protocol):
    """Storage that moves files by itself once it was told what is wanted; its other methods work on what is there.

    What it keeps is one file, wherever it keeps it: `remove` deletes that, `withdraw` only takes back what was asked.
    """

    def place(self, files: Sequence[StoredFile], role: Role) -> list[Placement]:
        """Ask for these files, one placement each, in order; does not wait. `files` say where they are now."""
        ...

    def look(self, placements: Sequence[Placement]) -> list[Placement]:
        """The same placements, in order, as they stand now."""
        ...

    def withdraw(self, files: Sequence[StoredFile], role: Role) -> None:
        """Want these files here no more. Raises Unavailable; may be done twice."""
        ...


class Indexer(Protocol):
    """Documents into the index and out of it again."""

    def index(self, upload: Upload, principal: Principal) -> Receipt:
        """As Ingestor.ingest."""
        ...

    def remove(self, document_id: str, principal: Principal) -> None:
        """Make it invisible at once. Raises NotFound."""
        ...


class Hands(Protocol):
    """What actions have done. Each answers one outcome per file, in order; a file that cannot be done fails alone.

    All may be done twice. Raises Unavailable when nothing can be done at all.
    """

    def move(self, files: Sequence[StoredFile], target: str) -> list[FileOutcome]: ...

    def replicate(self, files: Sequence[StoredFile], targets: frozenset[str]) -> list[FileOutcome]:
        """Have copies on exactly these tiers besides their homes."""
        ...

    def index(
        self, files: Sequence[StoredFile], collection: str, readers: frozenset[str] | None
    ) -> list[FileOutcome]: ...

    def delete(self, files: Sequence[StoredFile]) -> list[FileOutcome]:
        """From every tier and every index; a held file fails."""
        ...

    def tag(self, files: Sequence[StoredFile], add: frozenset[str], remove: frozenset[str]) -> list[FileOutcome]: ...

    def hold(self, files: Sequence[StoredFile], name: str) -> list[FileOutcome]: ...


class InteractionStore(Protocol):
    """What memory keeps. Nothing is found under another tenant, and nothing but `load` finds another subject's.

    A filter's key is one of `user`, `kind`, `model_used`, `confidence`, `gpu_utilization`, `latency_ms` and
    `timestamp`, or else of the metadata. What is deleted leaves nothing in the store's files.
    """

    def add(self, interaction: Interaction, vector: Vector | None, fingerprint: str) -> None:
        """Durable on return. Without a vector it is found by filter, and by meaning once `embed` gave it one."""
        ...

    def recent(self, tenant: str, subject: str, condition: Filter | None, limit: int) -> list[Interaction]:
        """Those that meet the condition, the newest first, of one moment by their ids."""
        ...

    def nearest(
        self, tenant: str, subject: str, condition: Filter | None, vector: Vector, fingerprint: str, limit: int
    ) -> list[tuple[Interaction, float]]:
        """(interaction, cosine), best first, then by id; only vectors of this fingerprint are compared."""
        ...

    def count_stale(self, tenant: str, subject: str, fingerprint: str) -> int:
        """How many have no vector of this fingerprint."""
        ...

    def stale(self, fingerprint: str, limit: int) -> list[Interaction]:
        """Of all tenants, those without a vector of this fingerprint, the oldest first."""
        ...

    def embed(self, vectors: Mapping[str, Vector], fingerprint: str) -> None:
        """Give interactions, by id, these vectors in place of those they have. Ids that are gone are passed over."""
        ...

    def usage(self) -> dict[str, int]:
        """The sum of sizes by tenant."""
        ...

    def oldest(self, tenant: str, kind: InteractionKind, limit: int) -> list[MemoryEntry]:
        """The oldest first, of one moment by their ids."""
        ...

    def load(self, tenant: str, interaction_ids: Sequence[str]) -> list[Interaction]:
        """Those that are there, in the order asked for. Asks nobody whose they are."""
        ...

    def drop(self, tenant: str, interaction_ids: Sequence[str]) -> int:
        """Remove these, and return how many there were. What a summary was made of goes with it."""
        ...

    def replace(
        self, tenant: str, interaction_ids: Sequence[str], summary: Interaction, vector: Vector | None, fingerprint: str
    ) -> bool:
        """In one transaction: these go, the summary comes, and it is kept of which it was made.

        False, and nothing is done, unless every one of them is still there.
        """
        ...

    def delete(self, tenant: str, subject: str | None, interaction_id: str) -> Forgotten:
        """This one, or the summary that was made of it. `subject` is whose it has to be; None: anybody's."""
        ...

    def forget(self, tenant: str, subject: str | None, user: str) -> Forgotten:
        """All that is of this user, as `delete`."""
        ...

    def damaged(self) -> list[str]:
        """Ids whose vector cannot be one, or is of nothing, for `fsck`."""
        ...

    def repair(self) -> None:
        """Take these vectors away; an interaction without one is among the `stale`."""
        ...

    def check(self) -> None:
        """Return if the store answers, else raise Unavailable."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class KeptElsewhere(Protocol):
    """What a store can that keeps its rows outside of the home: give all of them for an archive, and take them back."""

    def dump(self) -> AbstractContextManager[Iterator[bytes]]:
        """All of it as lines, as it is at the moment that the block begins, whatever others write meanwhile."""
        ...

    def restore(self, lines: Iterable[bytes]) -> None:
        """Take what `dump` gave. Raises Conflict where something is kept already, InvalidRequest for other lines."""
        ...


class Change(NamedTuple):
    """A version as it was opened once, for whoever follows a store: what an index and its searches need to know of it.

    The fields are those of Document. It is a tuple, for at a start there is one of every version.
    """

    document_id: str
    version: str
    tenant: str
    title: str
    readers: frozenset[str]
    chunks: int
    opened: int
    closed: int | None


@runtime_checkable
class Followed(Protocol):
    """What a document store can that tells what became of a tenant's versions, so that others keep an index of them.

    Of each tenant in a collection it counts two things: `revision` grows with all that a search may have to find or
    judge otherwise, which is a version that is published or closed, and one whose title or readers change; `erased`
    with each version that was published and is retired.
    """

    def standings(self) -> dict[tuple[str, str], tuple[int, int]]:
        """{(collection, tenant): (revision, erased)} of all that there are."""
        ...

    def changed(self, collection: str, tenant: str, after: int) -> list[Change]:
        """Versions that are or were visible, and were published, closed or changed after a revision; 0: all of them.

        Each stands there once for every time that it was opened, one after the other.
        """
        ...

    def held(self, collection: str, tenant: str) -> int:
        """How many chunks the versions have that `changed` would give in all."""
        ...

    def chunks_of(self, versions: Iterable[tuple[str, str]], cut: str = "") -> list[Chunk]:
        """Of one cut of these versions (document, version), in their order, and by their ordinals; those there are."""
        ...


@runtime_checkable
class KeepsGenerations(Protocol):
    """What a document store can that keeps other indexes of a collection beside its own, each with chunks of its own.

    From the moment a generation is there, and until it leaves, `publish` takes no version that lacks its chunks in it:
    it raises Unavailable (code "generation_lacks"), as `stage` does where `Staged.index` is not the own one.
    """

    def generations(self, collection: str) -> list[Generation]:
        """Those beside the own index, at most one of which is not leaving."""
        ...

    def add_generation(self, collection: str, own: LiveIndex, generation: Generation) -> None:
        """Note a generation, and what the own index is. Nothing where it is there. Raises Conflict beside another, and
        for the own index.

        Its cut is named like its index.
        """
        ...

    def note_generation(
        self, index: str, state: GenerationState, since: float, figures: Mapping[str, object] | None = None
    ) -> None:
        """Its state from now on, and its figures where given."""
        ...

    def lacking(self, collection: str, index: str, limit: int) -> list[Document]:
        """Versions that were published, of all tenants, and are not there in this generation."""
        ...

    def unkept(self, collection: str, limit: int) -> list[Document]:
        """Current documents, of all tenants, of which it is not kept what they were cut from; by document id."""
        ...

    def filled(self, collection: str, index: str) -> tuple[int, int]:
        """Of the own index's chunks of published versions, how many are of versions that this generation has; and how
        many there are."""
        ...

    def fill(self, index: str, document: Document, cut: Cut) -> bool:
        """Keep a version as a generation has it; False, and nothing kept, where it is there, or either is on its way
        out."""
        ...

    def adopt(self, collection: str, index: str) -> None:
        """This generation is the own index, and the one that was so leaves. Twice is once."""
        ...

    def forget_generation(self, index: str) -> bool:
        """Remove a part of what a generation that leaves holds, and at the end itself; whether there is more to do."""
        ...
