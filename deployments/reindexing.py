"""Another embedder or chunker for a collection, as the front door and the command line ask for it."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deployments.client import Client
from nexus.chunking import ChunkSettings
from nexus.errors import InvalidRequest, Unavailable
from nexus.ports import LiveIndex
from nexus.reindex import Progress
from nexus.types import Principal

LOOK_SECONDS = 0.5
Questions = Sequence[tuple[str, Sequence[str]]]


class Building(Protocol):
    async def begin_reindex(
        self, collection: str, embedder: str | None, by: Principal, questions: Questions,
        chunking: ChunkSettings | None = None,
    ) -> Progress: ...  # fmt: skip
    async def reindex_progress(self, collection: str) -> Progress: ...
    async def switch_index(self, collection: str, anyway: bool) -> Progress: ...
    async def roll_index_back(self, collection: str) -> Progress: ...
    async def drop_index(self, collection: str) -> Progress: ...


class Answering(Protocol):
    async def prepare(self, live: LiveIndex) -> None: ...


@dataclass(frozen=True)
class Reindexing:
    """The ingestor, which builds and moves indexes, and the retriever, which loads an embedder before it is needed."""

    ingestor: Building
    retriever: Answering

    async def switch(self, collection: str, anyway: bool) -> Progress:
        now = await self.ingestor.reindex_progress(collection)
        if now.beside is not None:
            await self.retriever.prepare(now.beside.live)
        return await self.ingestor.switch_index(collection, anyway)

    async def rollback(self, collection: str) -> Progress:
        now = await self.ingestor.reindex_progress(collection)
        await self.retriever.prepare(now.own)
        return await self.ingestor.roll_index_back(collection)


def read_questions(file: Path) -> list[dict[str, Any]]:
    """Kept questions, one JSON object a line: {"query": …, "documents": [ids or sources]}. Raises InvalidRequest."""
    questions = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the questions cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            is_right = set(one) == {"query", "documents"} and isinstance(one["query"], str)
            is_right = is_right and all(isinstance(name, str) for name in one["documents"]) and bool(one["documents"])
        except (ValueError, TypeError):
            is_right = False
        if not is_right:
            raise InvalidRequest(f'{file}, line {number}: write {{"query": "…", "documents": ["a source or an id"]}}')
        questions.append(one)
    if not questions:
        raise InvalidRequest(f"{file} holds no question")
    return questions


def chunking_of(target: int | None, most: int | None, overlap: int | None) -> dict[str, Any]:
    """What these options add to a request. Raises InvalidRequest for some that mean nothing without the first."""
    if target is None and (most, overlap) != (None, None):
        raise InvalidRequest("--max-tokens and --overlap go with --chunk-tokens: that one has documents cut anew")
    named = {"target_tokens": target, "max_tokens": most, "overlap_sentences": overlap}
    given = {name: value for name, value in named.items() if value is not None}
    return {"chunking": given} if given else {}


def build(nexus: Client, body: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Begin, or join, a reindex, and return once it is ready or refused. What ends this does not end the work."""
    _, now = nexus.call("POST", "/rag/reindex", json=body)
    while now["state"] == "building":
        show(now)
        time.sleep(LOOK_SECONDS)
        try:
            now = look(nexus, body["collection"])
        except Unavailable:  # what builds is restarting, and goes on then
            continue
    show(now)
    return now


def look(nexus: Client, collection: str) -> dict[str, Any]:
    _, now = nexus.call("GET", "/rag/reindex", params={"collection": collection})
    return dict(now)


def make_live(nexus: Client, collection: str, live: str, anyway: bool = False) -> dict[str, Any]:
    """`live` is "new" or "former"."""
    _, now = nexus.call("PUT", "/rag/reindex", json={"collection": collection, "live": live, "anyway": anyway})
    return dict(now)


def drop(nexus: Client, collection: str) -> dict[str, Any]:
    _, now = nexus.call("DELETE", "/rag/reindex", params={"collection": collection})
    return dict(now)


def lines(now: dict[str, Any]) -> list[str]:
    """Where a collection stands, for people."""
    told = [f"{now['collection']}: searched with {_called(now['live'])}"]
    other, state = now["beside"], now["state"]
    if state == "building":
        told.append(f"  {_called(other)} is being built: {now['done']} of {now['total']} chunks are brought in")
    elif state == "staying":
        told.append("  the index before it is being removed")
    elif state is not None and now["is_switched"]:
        told.append(f"  {_called(now['former'])} is kept: `nexus reindex --rollback` or `--drop`")
    elif state is not None:
        told.append(f"  {_called(other)} is {state}: `nexus reindex --switch` or `--drop`")
    if now["figures"].get("sentence"):
        told.append(f"  {now['figures']['sentence']}")
    if uncut := now["uncut"]["documents"]:
        told.append(
            f"  {uncut} documents stay as they were cut: they were added before what is cut from was kept; add them"
            " again, and they are cut like the others"
        )
        told += [f"    {source}" for source in now["uncut"]["sources"]]
    return told


def _called(index: dict[str, Any]) -> str:
    """An index, for people: its embedder, and how it is cut where that is said."""
    chunking = index["chunking"]
    cut = f", cut to {chunking['target_tokens']} tokens" if chunking else ""
    return f"{index['embedder'] or 'the configured embedder'} ({index['dimension']} dimensions{cut})"
