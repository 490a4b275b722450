"""`nexus.yaml` and `NEXUS_*` variables -> one frozen Config, or a clear refusal to start.

Order, the first wins: environment, file, default. A nested key is `NEXUS_SECTION__KEY`. Unknown keys
and unknown `NEXUS_*` variables are refused by name. The variables of the founding documents keep
working as aliases (`ALIASES`). All state lives under `home`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from platformdirs import user_data_path
from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from nexus import pipelines
from nexus.access import NAME, PERMISSIONS
from nexus.content import Action, Rule, Where, looks_of
from nexus.errors import CallerError, ConfigError
from nexus.failpoints import parse_failpoints
from nexus.filters import KEY
from nexus.pipelines import execute
from nexus.registry import Task
from nexus.signing import fault_of_secret

PREFIX = "NEXUS_"
PRODUCTION_REQUESTS = 20  # a minute
PLACES = 64
MOST_SESSION = 1_000_000  # characters of a session's context
SUMMARISED_SESSION = 32_000  # the same, where a model reads half of it to summarise it
TRACES_PATH = "/v1/traces"
NODE_LABEL = "nexus.io/node"  # of a machine in Ray, with its name
COUNTS = "NEXUS_COUNTS"  # the folder in which each process of a machine counts (counts.py)
NOT_SETTINGS = frozenset({"NEXUS_HOME", "NEXUS_CONFIG", "NEXUS_API_KEY", "NEXUS_URL", "NEXUS_INSTANCE", COUNTS})
ALIASES = {
    "OPENAI_API_KEY": "models.api_key",
    "VALID_API_KEYS": "access.development_keys",
    "ALLOWED_ORIGINS": "http.allowed_origins",
    "PHOENIX_COLLECTOR_ENDPOINT": "telemetry.otlp_endpoint",
    "PHOENIX_API_KEY": "telemetry.api_key",
    "PHOENIX_PROJECT_NAME": "telemetry.project",
}
NEURAL_ENGINES = {"extractive": "extractive:", "openai": "openai:https://api.openai.com/v1#gpt-4o-mini"}

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
PerMinute = Annotated[int, Field(gt=0, le=10_000_000)]
HostName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.\-]{0,252}(:[1-9][0-9]{0,4})?$")]  # for port 443, or its own
NodeName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9\-]{0,62}$")]
PublicKeyAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
TierName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
TenantName = Annotated[str, Field(pattern=rf"^(?:{NAME.pattern})$")]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9\-]{0,99}$")]
Precision = Literal["auto", "bf16", "int8", "fp32"]
FieldName = Annotated[str, Field(pattern=rf"^(?:{KEY.pattern})$")]


class PartAddress(str):
    """Where a part is. A user and a password in it are shown to nobody, and still sent."""

    def __repr__(self) -> str:
        return repr(re.sub(r"//[^/]*@", "//…@", self))


Address = Annotated[
    str, AfterValidator(PartAddress), PlainSerializer(lambda address: repr(address)[1:-1], str, when_used="json")
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Host = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9.:\-]{1,253}$"),
    AfterValidator(lambda host: "127.0.0.1" if host == "localhost" else host),
]
HostNames = tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.\-]{0,252}$|^\[[0-9a-f:.]{2,45}\]$")], ...]
LOOPBACK = ("127.0.0.1", "::1")


def _url(host: str, port: int) -> str:
    """How this machine itself reaches what listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


class Http(Section):
    """The front door. `allowed_origins` are those of browsers; empty allows none.

    Requests name `host`, this machine itself, or one of `allowed_hosts`. `behind_tls` says that whoever is not on this
    machine gets here only through a proxy that encrypts: without it `host` is loopback. An answer has to begin within
    `request_seconds`, or it is 504.
    """

    host: Host = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    behind_tls: bool = False
    allowed_hosts: HostNames = ()
    allowed_origins: tuple[Annotated[str, Field(pattern=r"^https?://[a-z0-9.\-\[\]:]{1,260}$")], ...] = ()
    max_body_bytes: Positive = 64 * 2**20
    request_seconds: Annotated[float, Field(gt=0)] = 900.0

    @model_validator(mode="after")
    def _is_private_or_encrypted(self) -> "Http":
        if not self.is_loopback and not self.behind_tls:
            raise ValueError(_unencrypted(self.host, "http"))
        return self

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


class Athena(Section):
    """The pages that `nexus athena` serves to browsers, by the same rules as the front door's.

    Only on loopback does it lend the key that the command line finds, and to nobody without the link that is printed.
    """

    host: Host = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8501
    behind_tls: bool = False
    allowed_hosts: HostNames = ()

    @model_validator(mode="after")
    def _is_private_or_encrypted(self) -> "Athena":
        if not self.is_loopback and not self.behind_tls:
            raise ValueError(_unencrypted(self.host, "athena"))
        return self

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def url(self) -> str:
        return _url(self.host, self.port)


def _unencrypted(host: str, section: str) -> str:
    return (
        f"host {host!r} is not loopback, and keys would travel unencrypted: leave it at 127.0.0.1 behind a TLS proxy on"
        f" this machine, or set {section}.behind_tls where other machines get here only through one"
    )


class Ray(Section):
    """The Ray head that `nexus up` starts, on the machine that `head` names; none in `nodes`: this one, on loopback.

    A port of 0 means any free one; with `nodes`, 6379, for the others have to know it. With `tls` the machines show
    each other certificates, which `nexus node certificate` makes, and what they say is encrypted.
    """

    head: str | None = None
    tls: bool = False
    dashboard_port: Port = 8265
    port: Port = 0
    object_store_bytes: Annotated[int, Field(ge=80 * 2**20)] = 128 * 2**20


class Gpus(Section):
    """Some equal GPUs of a machine, in the order of their indices; `memory` of each, as 80GiB or in bytes."""

    model: str = "GPU"
    memory: ByteSize
    count: Positive = 1


class Node(Section):
    """A machine of the cluster, as its owner describes it. `labels` are given to Ray besides `nexus.io/node`."""

    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.\-]{0,252}$")]  # how the others reach it
    cpus: Annotated[float, Field(gt=0)]
    memory: ByteSize
    labels: dict[str, str] = {}
    disks: dict[str, ByteSize] = {}  # free bytes wanted, by the folder they are wanted in
    gpus: tuple[Gpus, ...] = ()


class Stores(Section):
    vectors: Address = "milvus-lite:"
    documents: Address = "sqlite:"


class Engine(Section):
    """A vLLM engine: what one replica spans and holds. Sizes left out are the engine's own choice."""

    device: Literal["gpu", "cpu"] = "gpu"
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9  # of each GPU
    cpu_cache_bytes: Annotated[int, Field(ge=2**26)] = 2**30  # of the KV cache, where `device` is cpu
    max_model_len: Positive | None = None
    max_batched_tokens: Positive | None = None
    max_sequences: Positive = 64
    prefix_caching: bool = True
    compiled: bool = True  # slower to start, faster to answer
    seed: int = 0
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    quantization: str | None = None
    tool_parser: str | None = None
    trust_remote_code: bool = False


class Replicas(Section):
    """How many processes answer for a model. Each works on `at_once` requests; past `waiting` more, 503."""

    least: Positive = 1
    most: Positive = 1
    at_once: Positive = 64
    waiting: Positive = 256
    target: Positive = 32  # of requests per replica, where their number may change


class Served(Section):
    """A model beside the three that Nexus itself uses. Those of one name share its requests.

    `accuracy` is what an evaluation of yours says, from 0 to 1. `images` says whether it takes pictures, where
    its address cannot tell. `dimension` and `max_tokens` are of an embedder that is somewhere else.
    """

    address: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/\-]{0,127}$")] | None = None
    task: Task = "generate"
    accuracy: Annotated[float, Field(ge=0, le=1)] = 0.5
    images: bool | None = None
    api_key: SecretStr | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    dimension: Positive | None = None
    max_tokens: Positive = 512
    context_length: Positive = 8192  # of a GGUF model
    engine: Engine = Engine()
    replicas: Replicas = Replicas()
    device: Literal["cpu", "gpu"] = "cpu"  # of an embedder or reranker of ours; an engine has its own setting
    precision: Precision = "auto"  # of an embedder of ours
    nodes: tuple[str, ...] = ()  # the machines it may be on; none named: any

    @property
    def called(self) -> str:
        """The name clients ask for: as configured, or what follows # in the address, or what it ends in."""
        scheme, _, rest = self.address.partition(":")
        last = rest.partition("#")[2] or (Path(rest).name.removesuffix(".gguf") if "/" in rest else rest)
        return self.name or last or scheme

    def offered(self) -> dict[str, Any]:
        """What the module of its address may want to know; each takes what it has a use for."""
        key = None if self.api_key is None else self.api_key.get_secret_value()
        return {
            "name": self.called, "api_key": key, "timeout_seconds": self.timeout_seconds,
            "dimension": self.dimension, "max_tokens": self.max_tokens, "precision": self.precision,
        }  # fmt: skip


class Models(Section):
    """`generator` and `reranker` may also be the name of a model in `served`; `generator` also `auto`."""

    embedder: str = "sentence-transformer:all-MiniLM-L6-v2"
    generator: str = "extractive:"
    reranker: str | None = None
    rerank_seconds: Annotated[float, Field(gt=0)] = 0.5  # then the order stays as it was fused
    rerank_candidates: Annotated[int, Field(ge=1, le=200)] = 30
    served: tuple[Served, ...] = ()
    image_hosts: tuple[HostName, ...] = ()  # whose pictures may be fetched; of no others, and by default of none
    embedder_threads: Annotated[int, Field(ge=0)] = 0  # 0: as many as there are cores
    embedder_device: Literal["cpu", "gpu"] = "cpu"
    precision: Precision = "auto"  # of `embedder`; auto: the faster of bf16 and int8, tried once on this machine
    embedder_replicas: Replicas = Replicas(at_once=16)  # of the pool that embeds documents
    embedder_nodes: tuple[str, ...] = ()
    api_key: SecretStr | None = None

    def of_task(self, task: Task) -> tuple[Served, ...]:
        """Every model of a task, the one that Nexus itself uses first."""
        of_its_own = {"generate": self.generator, "embed": self.embedder, "rerank": self.reranker}[task]
        listed = [model for model in self.served if model.task == task]
        is_named = of_its_own in [model.called for model in listed]
        if of_its_own is None or is_named or ":" not in of_its_own:
            return tuple(sorted(listed, key=lambda model: model.called != of_its_own))
        hosting: dict[str, Any] = {}
        if task == "embed":
            hosting = {
                "device": self.embedder_device, "replicas": self.embedder_replicas, "nodes": self.embedder_nodes,
                "precision": self.precision,
            }  # fmt: skip
        return (Served(address=of_its_own, task=task, api_key=self.api_key, **hosting), *listed)

    @property
    def answering(self) -> str:
        """The name of the generator that answers from the documents, or `auto`."""
        names = [model.called for model in self.served if model.task == "generate"]
        is_address = ":" in self.generator and self.generator not in names
        return Served(address=self.generator).called if is_address else self.generator

    @field_validator("embedder")
    @classmethod
    def _is_no_engine(cls, embedder: str) -> str:
        if embedder.startswith("vllm:"):
            raise ValueError("a vLLM model cannot embed the documents; put it into `served`, with `task: embed`")
        return embedder

    @model_validator(mode="after")
    def _names_are_known(self) -> "Models":
        for task, name in (("generate", self.generator), ("rerank", self.reranker)):
            known = [model.called for model in self.served if model.task == task]
            if reserved := [one for one in known if one == "auto" or one.startswith("nexus-rag")]:
                raise ValueError(f"no model can be called {reserved[0]!r}, which means something else already")
            if name is not None and ":" not in name and name not in known and not (name == "auto" and known):
                raise ValueError(f"{name!r} is neither an address nor one of the {task} models served: {known}")
        return self


class Balancer(Section):
    """What counts when a client leaves the choice of a model open (`model: auto`), where it does not say."""

    latency_weight: Annotated[float, Field(ge=0)] = 1.0
    throughput_weight: Annotated[float, Field(ge=0)] = 1.0
    accuracy_weight: Annotated[float, Field(ge=0)] = 1.0
    probe_seconds: Annotated[float, Field(gt=0)] = 5.0  # between attempts to readmit a model that failed


class Cache(Section):
    """Whole generations for exactly equal prompts. Off while `entries` is 0."""

    entries: Annotated[int, Field(ge=0)] = 0
    seconds: Annotated[float, Field(gt=0)] = 300.0
    max_bytes: Positive = 64 * 2**20


class Triton(Section):
    """Triton or NIM servers, as http://host:8000 or grpc://host:8001."""

    servers: tuple[str, ...] = ()
    probe_seconds: Annotated[float, Field(gt=0)] = 5.0
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0


class Pipelines(Section):
    """Which pipelines answer, and the templates of `execute`: the names of their steps, in order."""

    enabled: tuple[str, ...] = ("rag", "chat", "execute")
    templates: dict[str, tuple[str, ...]] = {}
    rewrite_queries: bool = True  # of a conversation, where the generator can

    @field_validator("enabled")
    @classmethod
    def _are_there(cls, enabled: tuple[str, ...]) -> tuple[str, ...]:
        known = sorted(module.name for module in iter_modules(pipelines.__path__) if not module.ispkg)
        if unknown := [name for name in enabled if name not in known]:
            raise ValueError(f"there is no pipeline {unknown[0]!r}; there are {', '.join(known)}")
        return enabled

    @field_validator("templates")
    @classmethod
    def _have_steps(cls, templates: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        try:
            return {name: execute.steps_of_protocols(names) for name, names in templates.items()}
        except CallerError as error:
            raise ValueError(error.message) from None


class Chunking(Section):
    """Sizes in tokens of the embedder; a chunk never exceeds what the embedder reads."""

    target_tokens: Positive = 220
    max_tokens: Positive = 240


class Retrieval(Section):
    """Each route names `candidates`. Indexes are held in memory as far as they fit into `resident_bytes` together (0:
    none is); the others are searched in the vector store.
    """

    candidates: Annotated[int, Field(ge=1, le=1000)] = 100
    embedding_weight: Annotated[float, Field(ge=0, le=1)] = 0.7
    text_weight: Annotated[float, Field(ge=0, le=1)] = 0.3
    fusion: Literal["max", "rrf"] = "max"
    resident_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(2**30)


class Graph(Section):
    """Documents with an equal value of one of these metadata fields are connected, from when they are added."""

    shared_metadata: tuple[FieldName, ...] = ("robot_id",)


class Answers(Section):
    """`passages` and `passage_tokens` bound the evidence; below `abstain_below` there is no answer."""

    passages: Annotated[int, Field(ge=1, le=50)] = 8
    passage_tokens: Positive = 2000
    abstain_below: Annotated[float, Field(ge=0, le=1)] = 0.25  # chosen by tests/bench/confidence.py


class Parsing(Section):
    """Limits of the child process that reads one document."""

    memory_bytes: Annotated[int, Field(ge=256 * 2**20)] = 2**30
    cpu_seconds: Annotated[float, Field(gt=0)] = 30.0
    wall_seconds: Annotated[float, Field(gt=0)] = 60.0
    workers: Positive = 2


class Issuer(Section):
    """Somebody else whose tokens are taken: exactly this `iss` and `aud`, for these tenants, signed with these keys.

    `permissions` are the most that such a token gives, whatever it says. A URL is read in the background: a key that
    is no more in the set counts for `refresh_seconds` yet, unless `nexus key refresh` comes first.
    """

    issuer: Annotated[str, Field(min_length=1, max_length=512)]
    audience: Annotated[str, Field(min_length=1, max_length=512)]
    tenants: Annotated[tuple[TenantName, ...], Field(min_length=1)]
    jwks_file: Path | None = None
    jwks_url: (
        Annotated[str, Field(pattern=r"^(https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/])[^@#\s]+$")] | None
    ) = None
    algorithms: Annotated[tuple[PublicKeyAlgorithm, ...], Field(min_length=1)] = ("RS256", "ES256", "EdDSA")
    permissions: tuple[str, ...] = tuple(sorted(PERMISSIONS - {"admin"}))
    lifetime_seconds: Annotated[float, Field(gt=0, le=86_400)] = 3600.0  # of a token, at most
    refresh_seconds: Annotated[float, Field(ge=5, le=3600)] = 60.0

    @model_validator(mode="after")
    def _has_keys(self) -> "Issuer":
        if (self.jwks_file is None) == (self.jwks_url is None):
            raise ValueError("an issuer's keys come from jwks_file or from jwks_url: set one of them")
        if unknown := set(self.permissions) - PERMISSIONS:
            raise ValueError(
                f"there is no permission {sorted(unknown)[0]!r}; there are {', '.join(sorted(PERMISSIONS))}"
            )
        return self


class Access(Section):
    """Who may come in. `production` refuses `development_keys`, which `development` accepts as they are.

    Real keys come from `nexus key create`. Tokens made of them say `issuer`, and the audience `<issuer>/dev` or
    `<issuer>/live`; they are signed with `token_secret`, or with one that Nexus makes and keeps, and live for
    `token_seconds` at most.
    """

    mode: Literal["development", "production"] = "development"
    development_keys: tuple[SecretStr, ...] = ()
    issuer: Annotated[str, Field(min_length=1, max_length=512)] = "nexus"
    token_secret: SecretStr | None = None
    token_seconds: Annotated[float, Field(ge=1, le=86_400)] = 3600.0
    issuers: tuple[Issuer, ...] = ()
    failures_per_minute: Positive = 20  # of one address, with one key; of all that it tries, five times as many

    @field_validator("token_secret")
    @classmethod
    def _is_strong(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and (fault := fault_of_secret(secret.get_secret_value())):
            raise ValueError(f"{fault}; `openssl rand -base64 48` makes a good one, and without it Nexus makes its own")
        return secret

    @model_validator(mode="after")
    def _fits_its_mode(self) -> "Access":
        if self.mode == "production" and self.development_keys:
            raise ValueError(
                "development_keys (VALID_API_KEYS) are no keys for production: unset them, and use `nexus key create`"
            )
        names = [self.issuer, *(each.issuer for each in self.issuers)]
        if len(set(names)) < len(names):
            raise ValueError("two issuers have one name; each needs its own `issuer`")
        return self

    @property
    def environment(self) -> Literal["dev", "live"]:
        """What a key made here says in its text, and a token in its audience."""
        return "live" if self.mode == "production" else "dev"

    @property
    def audience(self) -> str:
        return f"{self.issuer}/{self.environment}"


class Audit(Section):
    """The record of denials, privileged actions and answers. `texts` keeps requests and answers, too.

    With `required` no answer leaves before its record is on the disk, and there is none while that is full.
    """

    texts: bool = False
    required: bool = False
    file_bytes: Positive = 64 * 2**20


class ContentRule(Section):
    """One thing to look for, and what is done about it: a `pattern` in RE2's syntax, or a class known by `kind`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_:.\-]{0,63}$")]
    where: Annotated[tuple[Where, ...], Field(min_length=1)]
    action: Action
    pattern: Annotated[str, Field(min_length=1)] | None = None
    kind: str | None = None

    def to_rule(self) -> Rule:
        return Rule(self.name, frozenset(self.where), self.action, self.pattern, self.kind)

    @model_validator(mode="after")
    def _can_look(self) -> "ContentRule":
        if (self.pattern is None) == (self.kind is None):
            raise ValueError("a rule has either a pattern or a kind")
        try:
            looks_of([self.to_rule()])
        except ConfigError as error:
            raise ValueError(error.message) from None
        return self


class ContentGuard(Section):
    """A model that judges texts: it answers `safe`, or `unsafe` and its categories, as Llama Guard does.

    With a guard on `output` an answer is shown when it is whole: half of one cannot be judged.
    """

    address: Annotated[str, Field(pattern=r"^(openai|nim):")]
    where: Annotated[tuple[Literal["input", "output"], ...], Field(min_length=1)] = ("input", "output")
    seconds: Annotated[float, Field(gt=0)] = 5.0  # for one verdict
    on_unsafe: Literal["refuse", "flag"] = "refuse"
    on_failure: Literal["refuse", "flag"] = "refuse"
    api_key: SecretStr | None = None


class Content(Section):
    """What may be asked, retrieved and answered. Rules that are set replace the one that is there by default.

    Pictures, and links where they are `remove`, that lead to no host of `hosts` are taken out of answers.
    """

    rules: tuple[ContentRule, ...] = (
        ContentRule(name="prompt-injection", where=("document",), action="flag", kind="prompt-injection"),
    )
    pictures: Literal["remove", "keep"] = "remove"
    links: Literal["remove", "keep"] = "keep"
    hosts: tuple[HostName, ...] = ()
    on_failure: Literal["refuse", "flag"] = "refuse"  # of the filter itself
    guard: ContentGuard | None = None

    @field_validator("rules")
    @classmethod
    def _have_names(cls, rules: tuple[ContentRule, ...]) -> tuple[ContentRule, ...]:
        names = [rule.name for rule in rules]
        if doubled := sorted(name for name in names if names.count(name) > 1):
            raise ValueError(f"two rules are called {doubled[0]!r}")
        return rules


class Ceiling(Section):
    """How much may be asked for per minute; none named: any amount."""

    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None  # generated ones


class Limits(Section):
    """What each key may ask for that says nothing else itself, all keys of a tenant together, and what fits in here.

    In production a key has 20 requests a minute unless a number or `any` is set. `places` are requests
    worked on at once (none named: 64, and as many as the models take at once), `waiting` those in the queue, for
    `wait_seconds` at most; past that, 503. No more than `searches` look for passages at once, and others wait as long.
    One key has no more than `share` of either. A tenant has no more than `open_jobs` uploads that have not ended; past
    that, 429.
    """

    requests_per_minute: PerMinute | Literal["any"] | None = None
    tokens_per_minute: PerMinute | None = None
    burst_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0  # so many seconds' worth may come at once
    tenant: Ceiling = Ceiling()
    tenants: dict[str, Ceiling] = {}  # in place of the one for every tenant
    places: Positive | None = None
    searches: Positive = 8
    waiting: Annotated[int, Field(ge=0)] = 128
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    wait_seconds: Annotated[float, Field(gt=0)] = 1.0
    bulk_share: Annotated[float, Field(gt=0, le=1)] = 0.25  # of the places, for uploads and long lists of texts
    bulk_wait_seconds: Annotated[float, Field(gt=0)] = 30.0
    open_jobs: Positive = 1000


class Telemetry(Section):
    """Where spans go: to an OpenTelemetry collector that speaks OTLP over HTTP, as Phoenix does, or nowhere.

    `otlp_endpoint` is its address, with or without /v1/traces. `api_key` is sent as a bearer token, beside
    `otlp_headers`. Without `record_text` no question, answer or passage is in a span. Of all traces, the share
    `sampling` is recorded.
    """

    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$", max_length=2000)] | None = None
    otlp_headers: dict[HeaderName, SecretStr] = {}
    api_key: SecretStr | None = None
    project: Annotated[str, Field(min_length=1, max_length=200)] = "nexus"
    record_text: bool = False
    sampling: Annotated[float, Field(ge=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _fits_into_headers(self) -> "Telemetry":
        for name, value in self.headers.items():
            if not value.isascii() or not value.isprintable():
                raise ValueError(f"what is sent as {name!r} has signs that no header can have: look for line ends")
        return self

    @property
    def traces_url(self) -> str:
        base = (self.otlp_endpoint or "").rstrip("/")
        return base if base.endswith(TRACES_PATH) else base + TRACES_PATH

    @property
    def headers(self) -> dict[str, str]:
        """What every request to the collector carries; secrets among it."""
        bearer = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key.get_secret_value()}"}
        return bearer | {name.lower(): value.get_secret_value() for name, value in self.otlp_headers.items()}


class Ingest(Section):
    """The conveyor of accepted files. A step that shows no sign of life for `stuck_seconds` is tried once more."""

    stuck_seconds: Annotated[float, Field(gt=0)] = 180.0
    embedders: Annotated[int, Field(ge=0)] = 0  # batches sent to the embedder pool at once; 0: its threads and one
    wait_seconds: Annotated[float, Field(gt=0)] = 240.0  # for one document, before the answer is 202


class Hades(Section):
    """How long a replaced or deleted version stays for `as_of`, and a staged one for whoever will publish it."""

    keep_closed_seconds: Annotated[float, Field(ge=0)] = 86_400.0
    keep_staged_seconds: Annotated[float, Field(ge=30)] = 60.0


class Memory(Section):
    """How long interactions are kept for recall, and sessions at what length; what goes is dropped, or summarised.

    Of a tenant `max_bytes` are kept, the newest. A summary is kept for `summary_days` from the last that it was made
    of. With `record`, what is asked and answered is kept by itself; without, only what a client stores.
    """

    record: bool = False  # who asks a question does not expect that it is kept
    retention_days: Annotated[float, Field(gt=0, le=36_500)] = 30.0
    max_bytes: Annotated[ByteSize, Field(ge=2**20)] = ByteSize(1000 * 2**20)
    compaction: Literal["drop", "summarise"] = "drop"
    summary_days: Annotated[float, Field(gt=0, le=36_500)] = 365.0
    session_characters: Annotated[int, Field(ge=1000, le=1_000_000)] | None = (
        None  # None: as many, or 32,000 summarised
    )

    @property
    def session_budget(self) -> int:
        """The characters that a session's context may have before its oldest entries go."""
        return self.session_characters or (SUMMARISED_SESSION if self.compaction == "summarise" else MOST_SESSION)

    @model_validator(mode="after")
    def _is_summarised_in_time(self) -> "Memory":
        if self.compaction == "summarise" and self.session_budget > 2 * SUMMARISED_SESSION:
            raise ValueError(
                f"session_characters is at most {2 * SUMMARISED_SESSION} where sessions are summarised, for whoever"
                " adds to one waits for that: lower it, or set compaction to drop"
            )
        return self


class Hammerspace(Section):
    """The user of the Anvil that Hammerspace tiers belong to: one that may read shares and set objectives.

    `ca_file` holds the authority that signed the Anvil's certificate, where this machine does not know it. A task of
    the Anvil is waited for during `task_seconds`.
    """

    username: str = ""
    password: SecretStr | None = None
    ca_file: Path | None = None
    task_seconds: Annotated[float, Field(gt=0)] = 600.0


class Policies(Section):
    """Where files may live: tiers by name, in the order in which copies prefer them, such as `cold: file:/mnt/cold`.

    Rules are evaluated when somebody asks; with `every_seconds` all of them are also carried out that often.
    """

    tiers: dict[TierName, Address] = {}
    every_seconds: Annotated[float, Field(ge=1)] | None = None

    @property
    def anvils(self) -> set[str]:
        """The hosts and ports that Hammerspace tiers name."""
        parts = [urlsplit(address) for address in self.tiers.values() if address.startswith("hammerspace:")]
        return {f"{one.hostname}:{one.port or 8443}" for one in parts}


class Scaling(Section):
    """How replicas follow what is asked, and how bulk work gives way to chats whose first tokens come late.

    It does so while these take `near` of `first_token_seconds` or more; without such a limit it never does.
    """

    first_token_seconds: Annotated[float, Field(gt=0)] | None = None
    near: Annotated[float, Field(gt=0, le=1)] = 0.8
    yield_seconds: Annotated[float, Field(ge=0)] = 5.0  # at most, before each batch of bulk work
    down_seconds: Annotated[float, Field(ge=0)] = 60.0  # of less demand, before replicas are given up


class Coordinator(Section):
    """Who keeps what the machines agree on: the first voters, by number, with the labels of each one's machine.

    None named: one voter, or in a cluster one on each of the first three machines.
    """

    voters: dict[Positive, dict[str, str]] = {}
    tick_seconds: Annotated[float, Field(ge=0.01, le=1)] = 0.05  # an election begins after 10 to 20 without a leader


class Sharing(Section):
    """Blocks shared between the machines. One is acknowledged when so many `copies` of it are on disks and verified.

    On fewer machines there are as many copies as machines. `nodes` are those that keep blocks; none named: all. One
    that is silent for `gone_seconds` has its blocks copied anew, elsewhere. Every copy is verified in `scrub_hours`.
    `key` is the cluster key; without it `share-key` in each machine's home is, which the head makes.
    """

    copies: Annotated[int, Field(ge=1, le=16)] = 2
    nodes: tuple[str, ...] = ()
    max_block_bytes: Annotated[int, Field(gt=0, le=2**40)] = 4 * 2**30
    gone_seconds: Annotated[float, Field(ge=1)] = 60.0
    scrub_hours: Annotated[float, Field(gt=0)] = 24.0
    key: SecretStr | None = None


class Config(BaseSettings):
    """Every setting of one Nexus installation."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter="__", env_ignore_empty=True,
        nested_model_default_partial_update=True,
    )  # fmt: skip

    home: Path
    http: Http = Http()
    athena: Athena = Athena()
    ray: Ray = Ray()
    nodes: dict[NodeName, Node] = {}
    stores: Stores = Stores()
    models: Models = Models()
    balancer: Balancer = Balancer()
    cache: Cache = Cache()
    triton: Triton = Triton()
    pipelines: Pipelines = Pipelines()
    chunking: Chunking = Chunking()
    retrieval: Retrieval = Retrieval()
    graph: Graph = Graph()
    answers: Answers = Answers()
    parsing: Parsing = Parsing()
    access: Access = Access()
    audit: Audit = Audit()
    content: Content = Content()
    limits: Limits = Limits()
    ingest: Ingest = Ingest()
    hades: Hades = Hades()
    memory: Memory = Memory()
    policies: Policies = Policies()
    hammerspace: Hammerspace = Hammerspace()
    scaling: Scaling = Scaling()
    coordinator: Coordinator = Coordinator()
    sharing: Sharing = Sharing()
    telemetry: Telemetry = Telemetry()

    @field_validator("home")
    @classmethod
    def _make_absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @model_validator(mode="after")
    def _machines_are_known(self) -> "Config":
        if (self.ray.head is None) != (not self.nodes):
            raise ValueError("ray.head names the machine of `nodes` that Ray's head runs on: set both, or neither")
        if self.ray.tls and self.ray.head is None:
            raise ValueError("ray.tls is for several machines; Ray is on this one's loopback: set it with `nodes`")
        named = [("ray.head", self.ray.head)] if self.ray.head is not None else []
        named += [("models.embedder_nodes", name) for name in self.models.embedder_nodes]
        named += [("sharing.nodes", name) for name in self.sharing.nodes]
        named += [(f"nodes of {model.called!r}", name) for model in self.models.served for name in model.nodes]
        for setting, name in named:
            if name not in self.nodes:
                raise ValueError(f"{setting}: {name!r} is none of `nodes`: {', '.join(self.nodes) or 'there are none'}")
        return self

    @model_validator(mode="after")
    def _uploads_are_answered_in_time(self) -> "Config":
        if self.ingest.wait_seconds >= self.http.request_seconds:
            raise ValueError(
                f"ingest.wait_seconds ({self.ingest.wait_seconds:g}) has to be less than http.request_seconds"
                f" ({self.http.request_seconds:g}), or an upload that takes long is 504 in place of 202: change one"
            )
        return self

    @model_validator(mode="after")
    def _can_summarise(self) -> "Config":
        if self.memory.compaction == "summarise" and not self._writes:
            raise ValueError(
                "memory.compaction: a summary needs a model with words of its own, and 'extractive:' only quotes: set"
                " models.generator to another one, or memory.compaction to drop"
            )
        return self

    @model_validator(mode="after")
    def _one_anvil_gets_the_password(self) -> "Config":
        anvils = self.policies.anvils
        if len(anvils) > 1:
            raise ValueError(
                f"the tiers name {len(anvils)} Anvils ({', '.join(sorted(anvils))}), and the one user of `hammerspace`"
                " is told to one of them only: use the tiers of one"
            )
        if anvils and (not self.hammerspace.username or self.hammerspace.password is None):
            raise ValueError("the tiers name an Anvil: set hammerspace.username and hammerspace.password")
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        return (env_settings, init_settings)

    def parts(self) -> list[tuple[Literal["stores", "models"], str, Task | None]]:
        """The address of every exchangeable part, with the kind of part it names and a model's task."""
        stores, models = self.stores, self.models
        tasks: tuple[Task, ...] = ("generate", "embed", "rerank")
        return [
            ("stores", stores.vectors, None), ("stores", stores.documents, None),
            *(("models", model.address, task) for task in tasks for model in models.of_task(task)),
        ]  # fmt: skip

    @property
    def rewrites(self) -> bool:
        """Whether a model makes whole questions of follow-ups: one that only quotes has no words of its own."""
        return self.pipelines.rewrite_queries and self._writes

    @property
    def _writes(self) -> bool:
        """Whether the model that answers has words of its own."""
        models = self.models.of_task("generate")
        asked = models if self.models.generator == "auto" else models[:1]
        return not any(model.address.startswith("extractive:") for model in asked)

    @property
    def uses_gpus(self) -> bool:
        """Whether a model of ours is to run on GPUs."""
        tasks: tuple[Task, ...] = ("generate", "embed", "rerank")
        models = [model for task in tasks for model in self.models.of_task(task)]
        return any((m.engine if m.address.startswith("vllm:") else m).device == "gpu" for m in models)

    @property
    def voters(self) -> dict[int, dict[str, str]]:
        """The first voters with the labels of their machines: those named, else one, and with three machines three."""
        if self.coordinator.voters or not self.nodes:
            return dict(self.coordinator.voters) or {1: {}}
        machines = list(self.nodes)[: 3 if len(self.nodes) >= 3 else 1]
        return {number: {NODE_LABEL: name} for number, name in enumerate(machines, 1)}

    @property
    def requests_per_minute(self) -> int | None:
        """Of a key that says nothing itself."""
        said = self.limits.requests_per_minute
        if said is None:  # not `model_fields_set`, which holds all of a section as soon as one of it is set
            return PRODUCTION_REQUESTS if self.access.mode == "production" else None
        return None if said == "any" else said

    @property
    def places(self) -> int:
        """How many requests are worked on at once."""
        if self.limits.places is not None:
            return self.limits.places
        models = [model for model in self.models.of_task("generate") if not model.address.startswith("extractive:")]
        return PLACES + sum(model.replicas.most * model.replicas.at_once for model in models)

    @property
    def url(self) -> str:
        return _url(self.http.host, self.http.port)


def default_home() -> Path:
    """`NEXUS_HOME`, or the data folder of this user (XDG on Linux)."""
    given = os.environ.get("NEXUS_HOME")
    return Path(given).expanduser().absolute() if given else user_data_path("nexus")


def load_config(file: Path | None = None, environment: Mapping[str, str] | None = None) -> Config:
    """Read the file (or `nexus.yaml` in the home, if there) and the environment into a Config.

    Raises ConfigError that names the key, the value's fault and the file or variable it came from.
    """
    environment = os.environ if environment is None else environment
    home = default_home()
    if file is None and environment.get("NEXUS_CONFIG"):
        file = Path(environment["NEXUS_CONFIG"])
    if file is not None and not file.is_file():
        raise ConfigError(f"there is no configuration file {file}")
    if file is None and (home / "nexus.yaml").is_file():
        file = home / "nexus.yaml"
    from_file = _read_yaml(file) if file is not None else {}
    _refuse_unknown_variables(environment)
    parse_failpoints(environment)
    values = _merge(_from_aliases(environment), from_file)
    values.setdefault("home", str(home))
    if environment.get("NEXUS_HOME"):
        values["home"] = str(home)
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error, file, environment)) from None
    except ValueError as error:  # a nested variable that is not JSON where an object is wanted
        raise ConfigError(f"the environment cannot be read as settings: {error}") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:  # which would quote the line, and that may hold a secret
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{file} is not valid YAML: {error.problem}{place}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {type(error).__name__}") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold sections such as 'http:', not a {type(values).__name__}")
    for name, value in values.items():
        if name in Config.model_fields and name != "home" and not isinstance(value, dict):
            raise ConfigError(f"{file}: {name!r} is a section; put its keys below it, indented")
    return values


def _known_variables() -> dict[str, type[BaseModel] | None]:
    """NEXUS_SECTION and NEXUS_SECTION__KEY for every setting."""
    known: dict[str, type[BaseModel] | None] = {}
    for name, info in Config.model_fields.items():
        known[f"{PREFIX}{name.upper()}"] = None
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            known |= {f"{PREFIX}{name.upper()}__{key.upper()}": section for key in section.model_fields}
    return known


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = _known_variables()
    allowed = NOT_SETTINGS | {"NEXUS_TESTING", "NEXUS_FAILPOINT"}
    unknown = sorted(n for n in environment if n.startswith(PREFIX) and n.upper() not in known and n not in allowed)
    if unknown:
        from difflib import get_close_matches

        near = get_close_matches(unknown[0], list(known), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown setting in the environment: {', '.join(unknown)}{hint}")


def _from_aliases(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, place in ALIASES.items():
        if text := environment.get(variable):
            section, _, key = place.partition(".")
            several = key in ("development_keys", "allowed_origins")
            value: Any = [part.strip() for part in text.split(",") if part.strip()] if several else text
            values.setdefault(section, {})[key] = value
    engine = environment.get("NEURAL_ENGINE_BACKEND", "")
    if engine == "local" and environment.get("LOCAL_MODEL_PATH"):
        values.setdefault("models", {})["generator"] = f"gguf:{environment['LOCAL_MODEL_PATH']}"
    elif engine in NEURAL_ENGINES:
        values.setdefault("models", {})["generator"] = NEURAL_ENGINES[engine]
    elif engine:
        raise ConfigError(f"NEURAL_ENGINE_BACKEND={engine!r}: use extractive, openai, or local with LOCAL_MODEL_PATH")
    return values


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; `over` wins. Sections that are not mappings are left for validation to refuse."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError, file: Path | None, environment: Mapping[str, str]) -> str:
    lines = []
    for fault in error.errors(include_url=False, include_input=False):
        place = [str(part) for part in fault["loc"]]
        variable = PREFIX + "__".join(place[:2]).upper()
        origin = variable if variable in environment else (str(file) if file else "the defaults")
        reason = (
            "is not a setting" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
        )
        lines.append(f"{'.'.join(place)} (from {origin}): {reason}")
    return "; ".join(lines)
