"""What a process that ingests does, for tests to kill; `python -m tests.ingesting HOME PORT` serves it the vectors.

    work     accept the job {"collection", "files": {source: text}} and work until it has ended
    churn    replace and delete {"documents", "collection", "seed", "life"} batch by batch, for ever
    delete   delete {"collection", "sources"}, then vacuum

What it has done for good it appends to HOME/done, one JSON object a line; how many texts it embedded, to HOME/embedded.
"""

import asyncio
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexus import conveyor, jobs
from nexus.chunking import ChunkSettings
from nexus.hades import Hades, chunks_of, document_id_of, version_of
from nexus.ingest import Ingestor
from nexus.parsing import Limits, Parsers
from nexus.ports import Staged
from nexus.stores import milvus_lite, sqlite
from nexus.types import Document, Piece, Principal, Vectors, content_digest
from tests.words import WordEmbedder

ALICE = Principal("acme", "alice", frozenset({"documents:read", "documents:write"}))
EMBEDDER = WordEmbedder()
BATCH_TEXTS = 16
PARTS = 3


def open_hades(home: Path, port: int) -> Hades:
    vectors = milvus_lite.open(f"milvus-lite://127.0.0.1:{port}")
    return Hades(sqlite.open("sqlite:", home=home), vectors, EMBEDDER.fingerprint, EMBEDDER.dimension)


def serve(home: Path, port: int) -> None:
    _, stop = milvus_lite.serve(home, port)
    print("ready", flush=True)
    sys.stdin.read()  # until whoever started this goes away
    stop()


def work(home: Path, port: int, order: dict[str, Any]) -> None:
    """Accept under a key of its own, so that a second run is the same job; then work until it has ended."""
    hades, store = open_hades(home, port), jobs.Jobs(home)
    hades.open_collection(order["collection"])

    def embed(texts: Sequence[str]) -> Vectors:
        with (home / "embedded").open("a") as log:
            log.write(f"{len(texts)}\n")
        return EMBEDDER.embed(texts)

    steps = Ingestor(hades, Parsers(Limits()), embed, lambda texts: [len(t.split()) for t in texts], ChunkSettings())
    contents = {source: text.encode() for source, text in order["files"].items()}
    files = [jobs.Announced(source, content_digest(c), len(c), content=c) for source, c in contents.items()]
    job, _ = store.accept(ALICE, order["collection"], files, accepted_at=10**9, idempotency_key=order["key"])
    asyncio.run(_until_ended(conveyor.Conveyor(store, steps, conveyor.Pace(batch_texts=BATCH_TEXTS)), job.job_id))
    steps.parsers.close()


async def _until_ended(line: conveyor.Conveyor, job_id: str) -> None:
    running = asyncio.create_task(line.run())
    while not running.done() and line.jobs.find(job_id, ALICE).state == "running":
        await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.wait({running})


def churn(home: Path, port: int, order: dict[str, Any]) -> None:
    """Every version of a document says who it is in each of its parts; odd documents are deleted now and then."""
    hades = open_hades(home, port)
    hades.vacuum(keep_closed_seconds=3.0, keep_staged_seconds=0.0)
    dice = random.Random(order["seed"])
    version = order["life"] * 1000
    while True:
        version += 1
        batch = dice.sample(range(order["documents"]), 10)
        staged = [_made(hades, order["collection"], number, version) for number in batch]
        hades.stage(staged)
        hades.publish([(one.document, one.epoch) for one in staged])
        _note(home, {"published": batch, "version": version})
        gone = [number for number in batch if number % 2 and dice.random() < 0.3]
        ids = [document_id_of(ALICE.tenant, order["collection"], f"{number}.txt") for number in gone]
        if ids:
            hades.delete(ids, ALICE)
            _note(home, {"deleted": gone, "version": version})


def _made(hades: Hades, collection: str, number: int, version: int) -> Staged:
    texts = [f"gripper document {number} version {version} part {part}" for part in range(PARTS)]
    content, source = "\n".join(texts).encode(), f"{number}.txt"
    document = Document(
        document_id_of(ALICE.tenant, collection, source), version_of(content_digest(content), "p", "c", "e"),
        ALICE.tenant, collection, source, source, "text/plain", {}, frozenset(), len(content), PARTS,
    )  # fmt: skip
    epoch = hades.begin(document)
    chunks = chunks_of(document, [Piece(text, tokens=6) for text in texts])
    return Staged(document, epoch, chunks, texts, EMBEDDER.embed(texts))


def delete(home: Path, port: int, order: dict[str, Any]) -> None:
    hades = open_hades(home, port)
    ids = [document_id_of(ALICE.tenant, order["collection"], source) for source in order["sources"]]
    if any(hades.documents.current(document_id, ALICE) for document_id in ids):
        hades.delete(ids, ALICE)
    hades.vacuum(keep_closed_seconds=0.0, keep_staged_seconds=0.0)


def _note(home: Path, event: dict[str, Any]) -> None:
    with (home / "done").open("a") as log:
        log.write(json.dumps(event) + "\n")


def run(home: Path, port: int, command: str, order: dict[str, Any], environment: dict[str, str]) -> None:
    """Do what is ordered, in this process."""
    os.environ.update(environment)
    {"work": work, "churn": churn, "delete": delete}[command](home, port, order)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
