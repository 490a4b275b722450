"""Embedders of another kind, a house to reindex, and what a process that reindexes does, for tests to kill."""

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nexus.chunking import ChunkSettings
from nexus.coordination import Alone
from nexus.embedders import Embedders
from nexus.errors import ConfigError
from nexus.hades import Hades
from nexus.ingest import Ingestor
from nexus.parsing import Limits, Parsers
from nexus.ports import DocumentStore, Embedder, InputType, LiveIndex, VectorStore
from nexus.registry import open_part
from nexus.reindex import Reindexer
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.stores import milvus_lite
from nexus.types import Principal, Vectors
from tests.words import WordEmbedder

ALICE = Principal("acme", "alice", frozenset({"documents:read", "documents:write"}))
ADDRESS, WIDE, NOISE = "words:", "wide:", "noise:"
TINY = ChunkSettings(5, 6, 0)  # of a text_of, two pieces
ROBOTS = (
    "gripper", "camera", "battery", "wheel", "laser", "arm", "hinge", "motor", "sensor", "antenna", "joint", "valve",
)  # fmt: skip


class Words(WordEmbedder):
    """The same, which remembers the directions of words."""

    _direction = cache(WordEmbedder._direction)


class Wide(Words):
    """As good as the other, in more dimensions, and not comparable with it."""

    fingerprint = "wide-embedder"
    dimension = 96


class Noise(Words):
    """Unit vectors of the right shape that say nothing, each time others."""

    fingerprint = "noise"
    dimension = 32

    def __init__(self) -> None:
        self._dice = np.random.default_rng(1)

    def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        vectors = self._dice.standard_normal((len(texts), self.dimension)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


MADE: dict[str, Callable[[], Embedder]] = {ADDRESS: Words, WIDE: Wide, NOISE: Noise}


def open_embedder(address: str, fingerprint: str | None = None) -> Embedder:
    if address not in MADE:
        raise ConfigError(f"{address!r} names no embedder")
    return MADE[address]()


@dataclass
class Site:
    """HADES, a retriever and a reindexer over the same stores, with the word embedder as the configured one."""

    hades: Hades
    retriever: Retriever
    reindexer: Reindexer
    others: Embedders


def open_site(documents: DocumentStore, vectors: VectorStore, coordinator: Alone | None = None) -> Site:
    words = Words()
    hades = Hades(documents, vectors, words.fingerprint, words.dimension, coordinator, ADDRESS)
    others = Embedders(open_embedder, lambda address: count_words)

    def embedder_of(live: LiveIndex) -> Embedder:
        return words if live.fingerprint == words.fingerprint else others.of(live)

    def embed_for(live: LiveIndex, texts: Sequence[str]) -> Vectors:
        return embedder_of(live).embed(texts)

    retriever = Retriever(hades, words, RetrievalSettings(), None, others)
    reindexer = Reindexer(hades, others, steps_over(hades, others).cut_for, embed_for, embedder_of, grace_seconds=0.0)
    return Site(hades, retriever, reindexer, others)


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def steps_over(hades: Hades, others: Embedders) -> Ingestor:
    """The steps of ingestion with the word embedder; the children that parse begin with the first document."""
    return Ingestor(hades, Parsers(Limits()), Words().embed, count_words, ChunkSettings(), others)


def text_of(number: int) -> str:
    """A document with words that no other has, and some that many have."""
    robot = ROBOTS[number % len(ROBOTS)]
    return f"The {robot} of number{number} needs torque{number} before it moves."


def question_of(number: int) -> str:
    return f"which torque{number} has the {ROBOTS[number % len(ROBOTS)]} of number{number}"


class Written(Alone):
    """What is live, in a file: what a coordinator is to processes that are killed."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self._file = home / "live.json"

    def live_index(self, collection: str) -> LiveIndex | None:
        found = self._read().get(collection)
        return None if found is None else LiveIndex(**found)

    def point(self, collection: str, to: LiveIndex) -> LiveIndex:
        self._change(collection, None, to)
        live = self.live_index(collection)
        assert live is not None
        return live

    def move(self, collection: str, expected: LiveIndex, to: LiveIndex) -> bool:
        self._change(collection, expected, to)
        return self.live_index(collection) == to

    def _change(self, collection: str, expected: LiveIndex | None, to: LiveIndex) -> None:
        with self._file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.live_index(collection) == expected:
                new = self._file.with_suffix(".new")
                new.write_text(json.dumps({**self._read(), collection: asdict(to)}))
                new.replace(self._file)

    def _read(self) -> dict[str, Any]:
        return json.loads(self._file.read_text()) if self._file.exists() else {}


def open_home(home: Path, port: int, documents: str = "sqlite:") -> Site:
    """What processes share: a document store, a vector server, and a file that says what is live."""
    vectors = milvus_lite.open(f"milvus-lite://127.0.0.1:{port}")
    return open_site(open_part("stores", documents, home=home), vectors, Written(home))


def run(home: Path, port: int, documents: str, collection: str, environment: dict[str, str]) -> None:
    """Reindex from wherever it is to the end: embedded and cut anew, switched to, and the former index removed."""
    os.environ.update(environment)
    reindexer = open_home(home, port, documents).reindexer
    progress = reindexer.progress(collection)
    if progress.live.fingerprint == WordEmbedder.fingerprint:
        reindexer.begin(collection, WIDE, ALICE, [(question_of(n), [f"{n}.txt"]) for n in range(3)], TINY)
        reindexer.work()
        reindexer.switch(collection)
    if reindexer.progress(collection).beside is not None:
        reindexer.drop(collection)
    reindexer.tidy(collection)
