"""Models behind a server that speaks OpenAI's API: vLLM, llama-server, Ollama, LM Studio, OpenAI itself.

An address is `openai:URL#model`, the URL with its `/v1` or, where it has no path, without. How the server is
asked, what is tried again and what its refusals mean is in upstream.py; the words are in chat_format.py.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
from pydantic import SecretStr

from nexus.chat_format import read_chunk, to_body
from nexus.errors import InvalidRequest, Unavailable, UpstreamInvalid
from nexus.ports import Embedder, Generator, InputType, Reranker
from nexus.registry import Task
from nexus.types import Delta, Prompt, Usage, Vector, Vectors
from nexus.upstream import DONE, Event, Server, parse_address

TASKS: tuple[Task, ...] = ("generate", "embed", "rerank")

BATCH = 64  # texts in one request for their vectors
_PIECES = re.compile(r" ?(?:([A-Za-z][a-z]{1,23})|(?=\S)(.))|(?s:(.))")  # a word, or any one character


class RemoteGenerator:
    """A model that writes, somewhere else. `health` is the path that says whether it could."""

    def __init__(self, server: Server, model: str, sees_images: bool, health: str = "/models") -> None:
        self.name, self.sees_images = server.name, sees_images
        self._server, self._model, self._health = server, model, health
        self._is_openai = urlsplit(server.url).hostname == "api.openai.com"

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        """See `Generator`. The first delta, and each next one, comes within the server's seconds or it is Unavailable.

        A server that ends without having finished is Unavailable, never a shorter answer.
        """
        if not self.sees_images and any(message.images for message in prompt.messages):
            raise InvalidRequest(f"the model {self.name!r} does not see pictures; ask one that does")
        body = to_body(prompt, self._model)
        if self._is_openai and "messages" in body and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")  # its newer models refuse the older name
        path = "/completions" if "prompt" in body else "/chat/completions"
        choices = body.get("n") or 1
        async with aclosing(self._server.events(path, body)) as events, aclosing(self._read(events, choices)) as deltas:
            while (delta := await self._soon(deltas)) is not None:
                yield delta

    async def check(self) -> None:
        """Return if the server lists its models, or does not know that question, else raise Unavailable."""
        await self._server.check(self._health, frozenset({404, 405}) if self._health == "/models" else frozenset())

    async def close(self) -> None:
        """Close this event loop's connections."""
        await self._server.aclose()

    async def _soon(self, deltas: AsyncGenerator[Delta]) -> Delta | None:
        try:
            async with asyncio.timeout(self._server.seconds):
                return await anext(deltas, None)
        except TimeoutError:
            seconds = self._server.seconds
            raise Unavailable(f"the model {self.name!r} wrote nothing for {seconds:g} s; try again") from None

    async def _read(self, events: AsyncGenerator[Event], choices: int) -> AsyncGenerator[Delta]:
        """The deltas of a stream that came to its end: each choice finished, the usage last."""
        unfinished = set(range(choices))
        usage: Usage | None = None
        begun = done = False
        async for event in events:
            if event.data == DONE:
                if not begun:
                    raise UpstreamInvalid(f"the model {self.name!r} ended its answer without having begun it")
                for delta in _endings(unfinished, usage):
                    yield delta
                done = True
                continue
            for delta in self._deltas(event, choices):
                begun = True
                if delta.usage is not None:
                    usage = delta.usage
                    continue
                if delta.finish_reason is not None:
                    unfinished.discard(delta.choice)
                yield delta
        if not done:
            if unfinished:
                raise Unavailable(f"the model {self.name!r} broke off its answer; try again")
            for delta in _endings(unfinished, usage):
                yield delta

    def _deltas(self, event: Event, choices: int) -> list[Delta]:
        try:
            chunk = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            raise UpstreamInvalid(f"the model {self.name!r} streamed what is not JSON") from None
        if not isinstance(chunk, Mapping):
            raise UpstreamInvalid(f"the model {self.name!r} streamed what is no chunk of an answer")
        error = chunk.get("error") or (chunk if event.kind == "error" or chunk.get("object") == "error" else None)
        if error is not None:
            raise self._server.explain(_status_of(error), {"error": error}).error
        deltas = read_chunk(chunk)
        if any(delta.choice >= choices for delta in deltas):
            raise UpstreamInvalid(f"the model {self.name!r} streamed a choice that was not asked for")
        return deltas


def _endings(unfinished: set[int], usage: Usage | None) -> list[Delta]:
    """What a server that said [DONE] left unsaid."""
    ends = [Delta(choice=choice, finish_reason="stop") for choice in sorted(unfinished)]
    return ends if usage is None else [*ends, Delta(usage=usage)]


def _status_of(error: object) -> int:
    """The HTTP status that an error in the middle of a stream would have had."""
    if not isinstance(error, Mapping):
        return 500
    code = str(error.get("code"))
    if re.fullmatch(r"[45]\d\d", code):
        return int(code)
    return 400 if error.get("type") in ("invalid_request_error", "BadRequestError") else 500


class RemoteEmbedder:
    """A model that makes vectors, somewhere else. Without a `dimension` it is asked for a vector when that is needed.

    A text that might be longer than `max_tokens` by `estimate_tokens` is cut here: servers refuse what they would
    have to cut. `asymmetric` says whether the server is told which texts are questions.
    """

    def __init__(
        self, server: Server, model: str, dimension: int | None, max_tokens: int, *, asymmetric: bool = False
    ) -> None:
        self.max_tokens = max_tokens
        self._server, self._model, self._asymmetric = server, model, asymmetric
        self._dimension = dimension

    @property
    def dimension(self) -> int:
        """As configured, else as the server answers when it is first asked for."""
        if self._dimension is None:
            self._dimension = int(self._ask(["dimension"], "passage").shape[1])
        return self._dimension

    @property
    def fingerprint(self) -> str:
        return f"{'nim' if self._asymmetric else 'openai'}:{self._model}@{self.dimension}"

    def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        """Shape (len(texts), dimension), float32, rows of unit length, in the order given.

        Raises UpstreamInvalid when the server answers with another shape, NaN, infinity or a zero row.
        """
        rows = [np.empty((0, self.dimension), np.float32)]
        for start in range(0, len(texts), BATCH):
            batch = [cut_to(text, self.max_tokens) for text in texts[start : start + BATCH]]
            vectors = self._ask(batch, input_type)
            if vectors.shape[1] != self.dimension:
                raise self._nonsense(f"vectors of {vectors.shape[1]} dimensions, not {self.dimension}")
            rows.append(vectors)
        return np.concatenate(rows)

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _ask(self, texts: Sequence[str], input_type: InputType) -> Vectors:
        body: dict[str, Any] = {"model": self._model, "input": texts, "encoding_format": "float"}
        if self._asymmetric:
            body |= {"input_type": input_type, "truncate": "END"}
        answer = self._server.post("/embeddings", body)
        ordered = in_order(answer, "data", len(texts), self._server.name)
        try:
            raw = np.array([row.get("embedding") for row in ordered])
        except ValueError:  # rows of different lengths
            raise self._nonsense("vectors of different lengths") from None
        if raw.ndim != 2 or raw.shape[1] == 0 or raw.dtype.kind not in "fi":
            raise self._nonsense("something other than one vector for each text")
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.linalg.norm(raw.astype(np.float64), axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and lengths.all()):
            raise self._nonsense("vectors that are zero or not finite")
        vectors: Vectors = (raw / lengths).astype(np.float32)
        return vectors

    def _nonsense(self, what: str) -> UpstreamInvalid:
        return UpstreamInvalid(f"the embedder {self._server.name!r} answered {what}")


class RemoteReranker:
    """A model that says how relevant texts are, somewhere else: Cohere's `/rerank`, as vLLM and Jina have it, too."""

    def __init__(self, server: Server, model: str) -> None:
        self.name = server.name
        self._server, self._model = server, model

    def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        """See `Reranker`. Where a server gives logits instead of scores from 0 to 1, they are squashed."""
        if not texts:
            return np.empty(0, np.float32)
        body = {"model": self._model, "query": query, "documents": list(texts), "top_n": len(texts)}
        answer = self._server.post("/rerank", body)
        scores = read_scores(answer, "results", "relevance_score", len(texts), self.name)
        return scores if ((scores >= 0) & (scores <= 1)).all() else squash(scores)

    def close(self) -> None:
        """Close the connections."""
        self._server.close()


def read_scores(answer: object, field: str, score: str, count: int, name: str) -> Vector:
    """One finite score for each text, in the order of the texts, else UpstreamInvalid."""
    given = [item.get(score) for item in in_order(answer, field, count, name)]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        raise UpstreamInvalid(f"the reranker {name!r} answered a score that is no number")
    scores = np.array(given, np.float64)
    if not (np.abs(scores) < np.finfo(np.float32).max).all():
        raise UpstreamInvalid(f"the reranker {name!r} answered a score that is not finite")
    return scores.astype(np.float32)


def squash(logits: Vector) -> Vector:
    """The logistic function of each, between 0 and 1."""
    squashed: Vector = (0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)
    return squashed


def in_order(answer: object, field: str, count: int, name: str) -> list[Mapping[str, Any]]:
    """The items that an answer lists, sorted by their `index`; each from 0 must be there once, else UpstreamInvalid."""
    listed = answer.get(field) if isinstance(answer, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise UpstreamInvalid(f"the model {name!r} answered no list of {field!r}")
    places = [item.get("index") for item in listed]
    if not all(type(place) is int for place in places) or sorted(places) != list(range(count)):
        raise UpstreamInvalid(f"the model {name!r} answered {len(listed)} {field} that do not match {count} texts")
    return sorted(listed, key=lambda item: int(item["index"]))


# Lengths


def open_tokenizer(address: str) -> Callable[[Sequence[str]], list[int]]:
    """What counts tokens for a model whose tokenizer is somewhere else: `estimate_tokens`."""
    parse_address(address)
    return estimate_tokens


def estimate_tokens(texts: Sequence[str]) -> list[int]:
    """At least as many tokens for each text as its model makes of it, special ones not counted.

    The model's tokenizer is not known here. The estimate is a token for each three letters of an ordinary word
    (lower case or capitalised; each two of one over 12 letters), and a token for each UTF-8 byte of everything
    else: digits, signs, capitals, other scripts. A single space belongs to what follows it. That is about 1.7
    times the real number for English and 2 to 4 times for other scripts: chunks come out short, never too long.
    """
    return [sum(tokens for _, tokens in _weigh(text)) for text in texts]


def cut_to(text: str, most: int) -> str:
    """The beginning of a text, of at most this many tokens by the estimate."""
    if 3 * len(text) <= most:
        return text
    used = kept = 0
    for end, tokens in _weigh(text):
        used += tokens
        if used > most:
            return text[:kept]
        kept = end
    return text


def _weigh(text: str) -> Iterator[tuple[int, int]]:
    """Where each piece of a text ends, and the most tokens it may be."""
    for match in _PIECES.finditer(text):
        word, sign, blank = match.groups()
        if word:
            yield match.end(), -(-len(word) // (3 if len(word) <= 12 else 2))
        else:
            yield match.end(), len((sign or blank).encode(errors="replace"))


# Opening


def check(address: str) -> None:
    """Return if the address names a server and a model, else raise ConfigError. Asks nobody."""
    parse_address(address)


def open(
    address: str,
    *,
    task: Task = "generate",
    name: str | None = None,
    api_key: SecretStr | str | None = None,
    timeout_seconds: float = 120.0,
    images: bool | None = None,
    dimension: int | None = None,
    max_tokens: int = 512,
) -> Generator | Embedder | Reranker:
    """The model at `openai:URL#model`, for one task. Nobody is asked yet.

    `max_tokens` is what an embedder reads of a text. `images` says whether a generator takes pictures; where
    nothing is said, it does not. Raises ConfigError for an address that cannot be one.
    """
    place = parse_address(address)
    server = Server(place, name or place.model, api_key, timeout_seconds)
    if task == "embed":
        return RemoteEmbedder(server, place.model, dimension, max_tokens)
    if task == "rerank":
        return RemoteReranker(server, place.model)
    return RemoteGenerator(server, place.model, bool(images))
