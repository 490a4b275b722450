"""NVIDIA NIM microservices: OpenAI's API, with the kind of a text for embedders and a ranking of its own.

An address is `nim:URL#model`, for example `nim:http://host:8000/v1#nvidia/nv-embedqa-e5-v5`.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import SecretStr

from nexus.models import openai
from nexus.models.openai import RemoteEmbedder, RemoteGenerator, read_scores, squash
from nexus.ports import Embedder, Generator, Reranker
from nexus.registry import Task
from nexus.types import Vector
from nexus.upstream import Server, parse_address

TASKS: tuple[Task, ...] = ("generate", "embed", "rerank")
HEALTH = "/health/ready"  # its status counts, not its body, which differs by product; `live` is true too early

open_tokenizer = openai.open_tokenizer
check = openai.check


class NimReranker:
    """A ranking microservice. Its logits are squashed to scores from 0 to 1."""

    def __init__(self, server: Server, model: str) -> None:
        self.name = server.name
        self._server, self._model = server, model

    def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        """See `Reranker`. Texts too long for the model are cut there. Raises UpstreamInvalid if one has no logit."""
        if not texts:
            return np.empty(0, np.float32)
        body = {
            "model": self._model, "query": {"text": query}, "passages": [{"text": text} for text in texts],
            "truncate": "END",
        }  # fmt: skip
        return squash(read_scores(self._server.post("/ranking", body), "rankings", "logit", len(texts), self.name))

    def close(self) -> None:
        """Close the connections."""
        self._server.close()


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
    """The microservice at `nim:URL#model`, for one task; the settings are those of `openai.open`."""
    place = parse_address(address)
    server = Server(place, name or place.model, api_key, timeout_seconds)
    if task == "embed":
        return RemoteEmbedder(server, place.model, dimension, max_tokens, asymmetric=True)
    if task == "rerank":
        return NimReranker(server, place.model)
    return RemoteGenerator(server, place.model, bool(images), HEALTH)
