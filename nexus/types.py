"""Frozen values that every floor speaks."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from nexus.errors import InvalidRequest
from nexus.filters import Filter, Scalar

if TYPE_CHECKING:  # the command line and the parsers speak these values too, and have no use for numpy
    from numpy import float32
    from numpy.typing import NDArray

Vector = Annotated["NDArray[float32]", "shape (dimension,), unit length"]
Vectors = Annotated["NDArray[float32]", "shape (n, dimension), each row of unit length"]

INT8 = "+int8"  # at the end of a fingerprint: other vectors of the same model
NOBODY = ""  # among readers: no subject is called so
MAX_SOURCE_CHARACTERS = 1024
LAST_ORDINAL = 2**31  # of a chunk: there are fewer in any document

BlockKind = Literal["heading", "text", "list", "table", "code"]


def digest(*parts: str | bytes) -> str:
    """The identity of an ordered list of parts: 32 hexadecimal digits of BLAKE2b.

    Each part is preceded by its length, so ("ab", "c") and ("a", "bc") differ.
    """
    state = blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()


def content_digest(content: bytes) -> str:
    """The name of some bytes: 32 hexadecimal digits of plain BLAKE2b, which any client can compute."""
    return blake2b(content, digest_size=16).hexdigest()


def check_source(source: str, pointer: str = "/filename") -> None:
    """A source is a label, never opened as a path; still it must be one that can be shown."""
    if not source.strip():
        raise InvalidRequest("the file has no name; give one that says where it came from", pointer=pointer)
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise InvalidRequest(f"a file name has at most {MAX_SOURCE_CHARACTERS} characters", pointer=pointer)
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in source):
        raise InvalidRequest("a file name has no control characters", pointer=pointer)


def model_of(fingerprint: str) -> str:
    """The fingerprint of a model's exact vectors, for that of any vectors it makes."""
    return fingerprint.removesuffix(INT8)


def media_type_of(said: str | None) -> str:
    """What a Content-Type says a body is, in lower case and without parameters; empty where nothing is said."""
    return (said or "").partition(";")[0].strip().lower()


def chunk_id_of(document_id: str, version: str, ordinal: int, cut: str = "") -> str:
    """The identity of a chunk: its place in a cut of a version of a document."""
    return digest("chunk", document_id, version, str(ordinal), *([cut] if cut else []))


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: the tenant whose data they see, and a name for the record.

    `credential` names what they showed, a key's id or a token's. The limits are those of its own, per minute; None:
    the installation's.
    """

    tenant: str
    subject: str
    permissions: frozenset[str] = frozenset()
    credential: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def may_read(self, readers: Collection[str]) -> bool:
        """Whether they are among the readers of something of their tenant; none are all of it."""
        return not readers or self.subject in readers


@dataclass(frozen=True, slots=True)
class Block:
    """One structural unit of a parsed document.

    `level` is the depth of a heading (1 is the top), else 0. `page` counts from 1 where the format
    has pages, slides or sheets. `first_line` and `last_line` count from 1 in the decoded source
    where lines mean something to a reader, inclusive on both ends.
    A table's first line is its header row where `header` is true.
    """

    kind: BlockKind
    text: str
    level: int = 0
    page: int | None = None
    first_line: int | None = None
    last_line: int | None = None
    header: bool = False


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a parser made of some bytes. `links` are the references of its hyperlinks, as they are written there."""

    title: str
    media_type: str
    blocks: tuple[Block, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    links: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A cut of a document that fits the embedder: the text and where it stands."""

    text: str
    heading: tuple[str, ...] = ()
    page: int | None = None
    first_line: int | None = None
    last_line: int | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece with its identity: chunk_id = H(document_id, version, ordinal, cut).

    Each index of a collection has a cut of its own, named like the index; the collection's first has no name.
    """

    chunk_id: str
    document_id: str
    version: str
    ordinal: int
    piece: Piece
    cut: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """One version of one document, as the authority knows it.

    `opened` and `closed` are sequence numbers of the collection: the version is visible at s when
    opened <= s < closed. `closed` is None while the version is current. `readers` are the subjects
    that may see it; empty means everyone in the tenant. `created_at` is in Unix seconds. `links` are
    the ids of the documents it refers to, there or not; a store keeps them as edges and not in this value.
    """

    document_id: str
    version: str
    tenant: str
    collection: str
    source: str
    title: str
    media_type: str
    metadata: Mapping[str, object]
    readers: frozenset[str]
    size: int
    chunks: int
    opened: int | None = None
    closed: int | None = None
    created_at: float = 0.0
    links: tuple[str, ...] = ()


class RouteScore(NamedTuple):
    """A candidate's place in one route: rank from 1, and the route's own score, larger is better."""

    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A visible chunk that matched, with its fused score and what each route said.

    `readers` are those of its document, none if all of the tenant are: by them an answer made of it is kept apart.
    `flags` are the content rules that found something in it. `cut` is that of its chunk.
    """

    chunk_id: str
    document_id: str
    version: str
    ordinal: int
    score: float
    cosine: float
    text: str
    title: str
    source: str
    heading: tuple[str, ...]
    page: int | None
    first_line: int | None
    last_line: int | None
    metadata: Mapping[str, object]
    routes: Mapping[str, RouteScore] = field(default_factory=dict)
    readers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    cut: str = ""


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """What to look for. Weights are of the fused score; `filters` limits it to some documents.

    `graph` says whether documents connected to the best ones, within `hops`, are asked too: always, never,
    or where the evidence is weak. `rerank` says whether a reranker orders the best hits; None: as configured.
    """

    query: str
    k: int = 10
    collection: str = "default"
    filters: Filter | None = None
    embedding_weight: float | None = None
    text_weight: float | None = None
    fusion: Literal["max", "rrf"] | None = None
    as_of: int | None = None
    explain: bool = False
    graph: Literal["off", "on", "auto"] = "auto"
    hops: int = 1
    rerank: bool | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The hits, best first, the sequence they were read at, and seconds spent per stage.

    `fused` are the k best by their score alone, where a reranker made another order of them.
    """

    hits: tuple[Hit, ...]
    sequence: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    explain: Mapping[str, object] | None = None
    fused: tuple[Hit, ...] = ()

    @property
    def by_score(self) -> tuple[Hit, ...]:
        return self.fused or self.hits


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a search found for an answer: the hits as ranked, and the passages made of them."""

    result: SearchResult
    passages: tuple[Hit, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """A picture within a message: a `data:` URL of a PNG, JPEG, WebP or GIF."""

    url: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: text, or parts of text and pictures in order.

    `tool_calls` are those the assistant made, as OpenAI writes them; `tool_call_id` says which of them
    a tool's message answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | tuple[str | Image, ...]
    tool_calls: tuple[Mapping[str, object], ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part for part in self.content if isinstance(part, str))

    @property
    def images(self) -> tuple[Image, ...]:
        return () if isinstance(self.content, str) else tuple(p for p in self.content if isinstance(p, Image))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a generator is asked: the rendered messages, and what they were rendered from.

    Passage n of `passages` (from 1) is cited as [n]; `sequence` is the one they were read at. `text` is there
    in place of messages where a bare text is to be continued. `options` are further fields of a chat
    completion in OpenAI's words, checked already. Requests of one `session` prefer one replica; only those of
    one `tenant` may share what an engine has computed for a prefix.
    """

    messages: tuple[Message, ...]
    question: str = ""
    passages: tuple[Hit, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    text: str | None = None
    session: str = ""
    tenant: str = ""
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the model's own tokenizer counts them; `cached` of the prompt's were not computed again."""

    prompt: int
    completion: int
    cached: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt + other.prompt, self.completion + other.completion, self.cached + other.cached)


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of a generation: some text of one choice, or why it ended, or what all of it cost.

    `finish_reason` is OpenAI's: stop, length, tool_calls or content_filter. `beside` is what OpenAI's chunk
    has further: `tool_calls`, `refusal` and `reasoning_content` of its delta, `logprobs` of its choice.
    """

    text: str = ""
    choice: int = 0
    finish_reason: str | None = None
    beside: Mapping[str, object] = field(default_factory=dict)
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A passage that stood behind an answer; `cited` when the answer refers to it."""

    number: int
    hit: Hit
    cited: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its evidence. `confidence` is a calibrated probability (grounding.py).

    `searched_for` is the query as it was searched: the question itself, or what a model made of it and the
    conversation. `unsupported_citations` are numbers that the response cites and no source has.
    `finish_reason` is why the generation ended, in OpenAI's words; `usage` sums what it and the rewriting told.
    """

    query: str
    response: str
    sources: tuple[Source, ...]
    confidence: float
    abstained: bool
    reason: str | None
    sequence: int
    searched_for: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    unsupported_citations: tuple[int, ...] = ()
    finish_reason: str = "stop"
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """Bytes to ingest and where they came from. `readers`: None leaves them as they are, all of the tenant at first."""

    source: str
    content: bytes
    collection: str = "default"
    media_type: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    readers: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of an upload."""

    document_id: str
    version: str
    chunks: int
    sequence: int
    outcome: Literal["done", "unchanged"]
    title: str = ""
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as rules see it: it lives on one tier, its home; replicas are copies on further tiers.

    `path` is relative and the same on every tier. `size` is in bytes, -1 where it is not known; times are in Unix
    seconds, 0 where they are not known; `checksum` is the content digest. Any of `holds` forbids deletion.
    `indexed` has the checksum that each collection was given. `bound_for` is a tier that places files by itself and
    was asked to take this one, but has not done so yet.
    """

    tenant: str
    path: str
    tier: str
    size: int
    checksum: str = ""
    modified_at: float = 0.0
    used_at: float = 0.0
    media_type: str = ""
    tags: frozenset[str] = frozenset()
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    replicas: frozenset[str] = frozenset()
    holds: frozenset[str] = frozenset()
    indexed: Mapping[str, str] = field(default_factory=dict)
    bound_for: str = ""

    @property
    def home(self) -> str:
        return self.bound_for or self.tier


FileStatus = Literal["planned", "success", "requested", "failed", "withheld"]


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """What became of one file in one action, or would. `source` is the tier it was on, `target` what was aimed at.

    `requested` is asked of a tier that places files by itself, later. `withheld` is what a rule wanted and another
    rule or a hold forbids. `reason` is for people; `code` is that of the error where it failed.
    """

    action: str
    tenant: str
    path: str
    status: FileStatus
    source: str = ""
    target: str = ""
    reason: str = ""
    code: str = ""
    rule: str = ""


InteractionKind = Literal["interaction", "summary"]
ROW_BYTES = 2048  # that every interaction counts as beside its texts, for its row and its vector


@dataclass(frozen=True, slots=True)
class Interaction:
    """What was asked and answered, as memory keeps it; of kind `summary`, what is left of several of one user.

    `subject` is who stored it, and who alone may see it; `user` is whom it is of, the subject where none was named.
    `created_at` is when it happened, in Unix seconds; of a summary, when the last that it was made of did.
    `confidence` is from 0 to 1, `gpu_utilization` as whoever stored it measures that.
    """

    interaction_id: str
    tenant: str
    subject: str
    user: str
    query: str
    response: str
    created_at: float
    context: tuple[str, ...] = ()
    confidence: float | None = None
    model: str | None = None
    gpu_utilization: float | None = None
    latency_ms: float | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    kind: InteractionKind = "interaction"

    @property
    def size(self) -> int:
        """The bytes that it counts as: those of its texts in UTF-8, metadata as JSON, and ROW_BYTES."""
        texts = (self.query, self.response, *self.context, json.dumps(dict(self.metadata), ensure_ascii=False))
        return ROW_BYTES + sum(len(text.encode()) for text in texts)


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """What compaction decides by: an interaction without its texts."""

    interaction_id: str
    subject: str
    user: str
    kind: InteractionKind
    created_at: float
    size: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """How much a deletion from memory removed; summaries are those that were made of what was deleted, too."""

    interactions: int
    summaries: int
