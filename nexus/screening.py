"""Everything that is asked, retrieved or generated passes here, once: the content rules, and the guard if there is one.

`Screen` holds what is done; `ScreenedGenerator`, `ScreenedRetriever`, `ScreenedEmbedder` and `ScreenedReranker` are put
around what generates, retrieves, embeds and ranks (deployments/gateway.py), so that no handler can forget it. What a
caller gives a model is input, also what it calls a document; `document` is what Nexus retrieved. A generator's prompt
is input, but for one with passages: there the question was screened before it was searched for (pipelines/rag.py), and
the passages as they came. A guard judges conversations, and is not asked about what is embedded or ranked.

What was found goes to `noted`, where whoever answers the request has put a list.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal, Protocol, get_args

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from nexus.cache import CompletingGenerator
from nexus.config import Content
from nexus.content import FAILED, Filter, Finding, Look, Where, look_for_targets, looks_of, screen
from nexus.errors import ContentRefused, NexusError
from nexus.guard import ModelGuard
from nexus.ports import Generator, Guard, InputType
from nexus.reading import read
from nexus.registry import open_model
from nexus.targets import Targets, hosts_of
from nexus.types import (
    Delta,
    Evidence,
    Hit,
    Image,
    Message,
    Principal,
    Prompt,
    SearchRequest,
    SearchResult,
    Vector,
    Vectors,
)

log = logging.getLogger("nexus.content")

AT_ONCE = 20_000  # characters that are screened on the event loop; more go to a thread
EACH = 200  # characters that one more text costs as much as
PASSED = 20_000  # texts of documents that passed as they are, which are known again
READ_BY_MODELS = frozenset({"tools", "response_format"})  # of a prompt's options
noted: ContextVar[list[Finding] | None] = ContextVar("noted", default=None)

OnFailure = Literal["refuse", "flag"]


def note(findings: Iterable[Finding]) -> None:
    """Tell whoever answers the request, if anybody listens."""
    listening = noted.get()
    if listening is not None:
        listening += findings


@dataclass(frozen=True, slots=True)
class Guarding:
    """A guard, what it is asked about, and what is done if it says no, or nothing within `seconds`."""

    guard: Guard
    where: frozenset[Where]
    seconds: float = 5.0
    on_unsafe: OnFailure = "refuse"
    on_failure: OnFailure = "refuse"

    async def judge(self, where: Where, text: str, asked: str = "") -> None:
        """Raises ContentRefused, unless the guard lets the text pass or is only to flag it."""
        if where not in self.where or not text.strip():
            return
        try:
            async with asyncio.timeout(self.seconds):
                judged = await self.guard.judge(text, where, asked)
        except (NexusError, OSError) as error:  # TimeoutError is one
            log.warning("the guard %s failed: %s", self.guard.name, getattr(error, "code", "timeout"))
            note([Finding(where, "guard", self.on_failure, 1)])
            if self.on_failure == "refuse":
                raise ContentRefused(f"the guard of this installation could not be asked about this {where}") from None
            return
        if judged.allowed:
            return
        note([Finding(where, "guard", self.on_unsafe, 1, judged.categories)])
        if self.on_unsafe == "refuse":
            raise ContentRefused(f"the guard of this installation refuses this {where}")


class Passed:
    """Texts that passed as they are, by their digests, and what flags them: the same passages are found often."""

    def __init__(self) -> None:
        self._findings: LRUCache[bytes, tuple[Finding, ...]] = LRUCache(PASSED)
        self._lock = threading.Lock()

    def screen(
        self, looks: Sequence[Look], where: Where, text: str, fails_open: bool
    ) -> tuple[str | ContentRefused, tuple[Finding, ...]]:
        """As content.screen; always with the same looks."""
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            known = self._findings.get(key)
        if known is not None:
            return text, known
        shown, findings = screen(looks, where, text, fails_open)
        if shown == text and all(finding.rule != FAILED for finding in findings):
            with self._lock:
                self._findings[key] = findings
        return shown, findings


@dataclass(frozen=True, slots=True)
class Screen:
    """What is done with texts here. One without looks and guard lets everything pass as it is."""

    looks: Mapping[Where, Sequence[Look]] = field(default_factory=dict)
    fails_open: bool = False
    guarding: Guarding | None = None
    _passed: Passed = field(default_factory=Passed, init=False, repr=False, compare=False)

    async def text(self, where: Where, text: str) -> str:
        """A text as it may go on. Raises ContentRefused."""
        (shown,) = await self.texts(where, [text])
        if self.guarding is not None:
            await self.guarding.judge(where, shown)
        return shown

    async def texts(self, where: Where, texts: Sequence[str]) -> list[str]:
        """Texts as they may go on by the rules alone. Raises ContentRefused."""
        looks = self.looks.get(where, ())
        if not looks:
            return list(texts)
        if sum(len(text) + EACH for text in texts) <= AT_ONCE + EACH:
            outcomes = _screen_texts(looks, where, texts, self.fails_open)
        else:
            outcomes = await asyncio.to_thread(_screen_texts, looks, where, texts, self.fails_open)
        return [_settle(shown, findings) for shown, findings in outcomes]

    async def data(self, where: Where, value: object) -> object:
        """What JSON can say, with each of its texts, names of fields too, as it may go on. Raises ContentRefused."""
        texts = list(dict.fromkeys(_texts_in(value)))
        return _with_texts(value, dict(zip(texts, await self.texts(where, texts), strict=True)))

    async def tensors(self, where: Where, tensors: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Tensors with each of their texts as it may go on. BYTES that are no UTF-8 are none. Raises ContentRefused."""
        if not self.looks.get(where):
            return tensors
        return {name: await self._tensor(where, tensor) for name, tensor in tensors.items()}

    async def _tensor(self, where: Where, tensor: NDArray[Any]) -> NDArray[Any]:
        if tensor.dtype != np.object_:
            return tensor
        elements = list(tensor.ravel())
        texts = [_read_bytes(element) for element in elements]
        shown = iter(await self.texts(where, [text for text in texts if text is not None]))
        changed = np.empty(len(elements), object)
        changed[:] = [e if text is None else next(shown).encode() for e, text in zip(elements, texts, strict=True)]
        return changed.reshape(tensor.shape)

    async def messages(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """A conversation as it may be put to a model."""
        shown = tuple([await self._message(message) for message in messages])
        if self.guarding is not None:
            last = next((message.text for message in reversed(shown) if message.role == "user"), "")
            await self.guarding.judge("input", last)
        return shown

    async def _message(self, message: Message) -> Message:
        content: str | tuple[str | Image, ...] = message.content
        if isinstance(content, str):
            (content,) = await self.texts("input", [content])
        else:
            shown = iter(await self.texts("input", [part for part in content if isinstance(part, str)]))
            content = tuple(next(shown) if isinstance(part, str) else part for part in content)
        calls = tuple([await self._call(call) for call in message.tool_calls])
        return replace(message, content=content, tool_calls=calls)

    async def _call(self, call: Mapping[str, object]) -> Mapping[str, object]:
        function = call.get("function")
        if not isinstance(function, Mapping):
            return call
        (arguments,) = await self.texts("input", [str(function.get("arguments", ""))])
        return {**call, "function": {**function, "arguments": arguments}}

    async def prompt(self, prompt: Prompt) -> Prompt:
        """A prompt whose every text is a caller's."""
        if prompt.passages or not (self.looks.get("input") or self.guarding):
            return prompt
        text = None if prompt.text is None else await self.text("input", prompt.text)
        options = {
            name: await self.data("input", value) if name in READ_BY_MODELS else value
            for name, value in prompt.options.items()
        }
        return replace(prompt, messages=await self.messages(prompt.messages), text=text, options=options)

    async def hits(self, hits: Sequence[Hit]) -> tuple[Hit, ...]:
        """Passages as they may be shown and read; those that a rule refuses are left out."""
        looks = self.looks.get("document", ())
        if not looks or not hits:
            return tuple(hits)
        if sum(len(hit.text) for hit in hits) <= AT_ONCE:
            screened = self._screen_hits(looks, hits)
        else:
            screened = await asyncio.to_thread(self._screen_hits, looks, hits)
        note(finding for _, findings in screened for finding in findings)
        return tuple(hit for hit, _ in screened if hit is not None)

    def _screen_hits(self, looks: Sequence[Look], hits: Sequence[Hit]) -> list[tuple[Hit | None, tuple[Finding, ...]]]:
        return [self._screen_hit(looks, hit) for hit in hits]

    def _screen_hit(self, looks: Sequence[Look], hit: Hit) -> tuple[Hit | None, tuple[Finding, ...]]:
        """A hit with its text and title as they may be shown, and the rules that flag it; None for one refused."""
        text, findings = self._passed.screen(looks, "document", hit.text, self.fails_open)
        title, of_title = self._passed.screen(looks, "document", hit.title, self.fails_open)
        findings += of_title
        if isinstance(text, ContentRefused) or isinstance(title, ContentRefused):
            return None, findings
        flags = tuple(dict.fromkeys(finding.rule for finding in findings if finding.action == "flag"))
        if (text, title, flags) == (hit.text, hit.title, hit.flags):
            return hit, findings
        return replace(hit, text=text, title=title, flags=flags), findings

    async def deltas(self, prompt: Prompt, stream: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
        """A generation as it may be shown. With a guard on output, all of it at once: half an answer has no verdict."""
        output = _Output(self.looks.get("output", ()), self.fails_open)
        waits = self.guarding is not None and "output" in self.guarding.where
        held: list[Delta] = []
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    for shown in output.add(delta):
                        if waits:
                            held.append(shown)
                        else:
                            yield shown
            held += output.finish()
        finally:
            note(output.findings())
        if waits and self.guarding is not None:
            for said in _said(held):
                await self.guarding.judge("output", said, prompt.question or _question_of(prompt))
        for shown in held:
            yield shown


def _screen_texts(
    looks: Sequence[Look], where: Where, texts: Sequence[str], fails_open: bool
) -> list[tuple[str | ContentRefused, tuple[Finding, ...]]]:
    """Each text as it may go on, or the refusal of it, and what was found: up to the first that is refused."""
    outcomes: list[tuple[str | ContentRefused, tuple[Finding, ...]]] = []
    for text in texts:
        outcomes.append(screen(looks, where, text, fails_open))
        if isinstance(outcomes[-1][0], ContentRefused):
            break
    return outcomes


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield name
            yield from _texts_in(below)
    elif isinstance(value, list):
        for below in value:
            yield from _texts_in(below)


def _with_texts(value: object, shown: Mapping[str, str]) -> object:
    if isinstance(value, str):
        return shown[value]
    if isinstance(value, Mapping):
        return {shown[name]: _with_texts(below, shown) for name, below in value.items()}
    return [_with_texts(below, shown) for below in value] if isinstance(value, list) else value


def _read_bytes(element: bytes) -> str | None:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return None


def _settle(shown: str | ContentRefused, findings: Sequence[Finding]) -> str:
    note(findings)
    if isinstance(shown, ContentRefused):
        raise shown
    return shown


def open_screen(content: Content) -> Screen:
    """What the configuration asks for; a guard is opened, and not asked yet. Raises ConfigError."""
    read("ä\u0301", "skeleton")  # has the tables in memory before the first request
    looks: dict[Where, tuple[Look, ...]] = {}
    rules = [rule.to_rule() for rule in content.rules]
    for where in get_args(Where):
        looks[where] = looks_of([rule for rule in rules if where in rule.where])
    targets = Targets(hosts_of(content.hosts), content.pictures == "remove", content.links == "remove")
    if targets.pictures or targets.links:
        looks["output"] += (look_for_targets(targets, "output"),)
    asked = content.guard
    guarding = None
    if asked is not None:
        guard = ModelGuard(open_model("generate", asked.address, api_key=asked.api_key, timeout_seconds=asked.seconds))
        guarding = Guarding(guard, frozenset(asked.where), asked.seconds, asked.on_unsafe, asked.on_failure)
    return Screen(looks, content.on_failure == "flag", guarding)


class _Output:
    """The filters of one generation: one for each text of each of its choices."""

    def __init__(self, looks: Sequence[Look], fails_open: bool) -> None:
        self._looks, self._fails_open = looks, fails_open
        self._hides = any(look.rule.action in ("redact", "refuse") and look.shown for look in looks)
        self._filters: dict[tuple[int, str], Filter] = {}

    def add(self, delta: Delta) -> list[Delta]:
        if not self._looks or delta.usage is not None:
            return [delta]
        text = self._take(delta.choice, "text", delta.text)
        beside = {name: self._beside(delta.choice, name, value) for name, value in delta.beside.items()}
        beside = {name: value for name, value in beside.items() if value}
        shown = replace(delta, text=text, beside=beside, finish_reason=None)
        found = [shown] if shown.text or shown.beside else []
        if delta.finish_reason is None:
            return found
        return [*found, *self._close(delta.choice), Delta(choice=delta.choice, finish_reason=delta.finish_reason)]

    def finish(self) -> list[Delta]:
        """What is left of choices that ended without a word."""
        return [delta for choice in sorted({choice for choice, _ in self._filters}) for delta in self._close(choice)]

    def findings(self) -> list[Finding]:
        counted: dict[tuple[Where, str, str], Finding] = {}
        for filter in self._filters.values():
            for finding in filter.findings:
                before = counted.get(finding[:3])
                counted[finding[:3]] = finding._replace(found=finding.found + (before.found if before else 0))
        return list(counted.values())

    def _take(self, choice: int, name: str, piece: str) -> str:
        if not piece:
            return ""
        key = (choice, name)
        if key not in self._filters:
            self._filters[key] = Filter(self._looks, "output", self._fails_open)
        return self._filters[key].add(piece)

    def _beside(self, choice: int, name: str, value: object) -> object:
        """What stands beside the text, screened like it; of tokens' probabilities nothing where rules hide words."""
        if name == "logprobs":
            return None if self._hides else value
        if isinstance(value, str):
            return self._take(choice, name, value)
        if name == "tool_calls" and isinstance(value, list):
            return [self._call(choice, call) for call in value]
        return value

    def _call(self, choice: int, call: Mapping[str, object]) -> Mapping[str, object]:
        function = call.get("function")
        if not isinstance(function, Mapping) or not function.get("arguments"):
            return call
        shown = self._take(choice, f"tool_calls/{call.get('index', 0)}", str(function["arguments"]))
        return {**call, "function": {**function, "arguments": shown}}

    def _close(self, choice: int) -> list[Delta]:
        rest: list[Delta] = []
        for (of, name), filter in self._filters.items():
            if of != choice or not (text := filter.finish()):
                continue
            if name == "text":
                rest.append(Delta(text, choice))
            elif name.startswith("tool_calls/"):
                index = int(name.partition("/")[2])
                rest.append(Delta(choice=choice, beside={"tool_calls": [_rest_of_call(index, text)]}))
            else:
                rest.append(Delta(choice=choice, beside={name: text}))
        return rest


def _rest_of_call(index: int, arguments: str) -> dict[str, object]:
    return {"index": index, "function": {"arguments": arguments}}


def _said(deltas: Sequence[Delta]) -> list[str]:
    """The whole text of each choice."""
    choices = sorted({delta.choice for delta in deltas if delta.usage is None})
    return ["".join(delta.text for delta in deltas if delta.choice == choice) for choice in choices]


def _question_of(prompt: Prompt) -> str:
    return prompt.text or next((one.text for one in reversed(prompt.messages) if one.role == "user"), "")


class ScreenedGenerator:
    """A Generator that is asked, and answers, only what may be."""

    def __init__(self, generator: CompletingGenerator | Generator, screen: Screen) -> None:
        self.name, self.sees_images = generator.name, generator.sees_images
        self._generator, self._screen = generator, screen

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        """See `Generator`. Raises ContentRefused besides."""
        asked = await self._screen.prompt(prompt)
        async with aclosing(self._screen.deltas(asked, self._generator.stream(asked))) as deltas:
            async for delta in deltas:
                yield delta

    async def complete(self, prompt: Prompt) -> list[Delta]:
        """All deltas of one generation; the same as `stream` gives."""
        asked = await self._screen.prompt(prompt)
        async with aclosing(self._screen.deltas(asked, _whole(self._generator, asked))) as deltas:
            return [delta async for delta in deltas]

    async def check(self) -> None:
        await self._generator.check()


async def _whole(generator: CompletingGenerator | Generator, prompt: Prompt) -> AsyncGenerator[Delta]:
    complete = getattr(generator, "complete", None)
    if complete is None:
        async with aclosing(generator.stream(prompt)) as deltas:
            async for delta in deltas:
                yield delta
        return
    for delta in await complete(prompt):
        yield delta


class Retrieving(Protocol):
    async def __call__(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence: ...


class Searching(Protocol):
    async def search(self, request: SearchRequest, principal: Principal) -> SearchResult: ...


@dataclass(frozen=True, slots=True)
class ScreenedRetriever:
    """Searches that give only what the rules on documents let pass."""

    searching: Searching
    retrieving: Retrieving
    screen: Screen

    async def search(self, request: SearchRequest, principal: Principal) -> SearchResult:
        return await self._screened(await self.searching.search(request, principal))

    async def retrieve(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        evidence = await self.retrieving(request, principal, passages, tokens)
        shown = await self.screen.hits(evidence.passages)
        if all(look.rule.action in ("allow", "flag") for look in self.screen.looks.get("document", ())):
            return replace(evidence, passages=shown)  # its hits are judged, but shown to nobody
        return Evidence(await self._screened(evidence.result, quietly=True), shown)

    async def _screened(self, result: SearchResult, quietly: bool = False) -> SearchResult:
        token = noted.set(None) if quietly else None
        try:
            return replace(result, hits=await self.screen.hits(result.hits), fused=await self.screen.hits(result.fused))
        finally:
            if token is not None:
                noted.reset(token)


class Embedding(Protocol):
    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors: ...


class Reranking(Protocol):
    async def rerank(self, query: str, texts: Sequence[str]) -> Vector: ...


@dataclass(frozen=True, slots=True)
class ScreenedEmbedder:
    """An embedder that is given only what may be asked."""

    embedder: Embedding
    screen: Screen

    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        return await self.embedder.embed(await self.screen.texts("input", texts), input_type)


@dataclass(frozen=True, slots=True)
class ScreenedReranker:
    """A reranker that is given only what may be asked."""

    reranker: Reranking
    screen: Screen

    async def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        query, *texts = await self.screen.texts("input", [query, *texts])
        return await self.reranker.rerank(query, texts)
