"""One system in a process and an interpreter of its own: it is told what to do, and answers, in JSON lines.

    python -P tests/bench/peer.py NAME      started by tests/bench/peers.py, which says what the lines are

Only what an interpreter has is imported: a peer's has no Nexus, and Nexus's no peer. The first line that comes is
a `Setting`, each further one a method of `Host` with its arguments.
"""

import asyncio
import copy
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

WAYS = ("dense", "hybrid")
DEFAULT_BATCH, TUNED_BATCH = 32, 8


@dataclass(frozen=True)
class Setting:
    """What every system is given alike: the model's folder, threads, and a folder to keep its data in.

    `tuned` peers compute in half precision and in small batches, which is not what they do by themselves.
    """

    model: str
    home: Path
    threads: int
    tuned: bool

    @property
    def batch(self) -> int:
        return TUNED_BATCH if self.tuned else DEFAULT_BATCH

    @property
    def weights(self) -> dict[str, Any]:
        """Keyword arguments for the transformer of a peer."""
        import torch

        return {"dtype": torch.bfloat16} if self.tuned else {}


class System(Protocol):
    version: str

    def ingest(self, folder: Path) -> None:
        """Read every text file of a folder, and return once all of it is on the disk."""
        ...

    def search(self, way: str, query: str, k: int) -> list[str]:
        """The names of the files that the k best passages are of, best first; a name may come again."""
        ...


class LlamaIndex:
    """A vector index of nodes and a BM25 retriever of the same, fused by rank."""

    def __init__(self, setting: Setting) -> None:
        from llama_index.core import Settings
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding

        self._home = setting.home
        self.version = importlib.metadata.version("llama-index-core")
        Settings.llm = None
        Settings.embed_model = HuggingFaceEmbedding(
            model_name=setting.model, device="cpu", embed_batch_size=setting.batch, model_kwargs=setting.weights
        )
        Settings.embed_model.get_text_embedding("warm up")
        self._retriever = cache(self._open)

    def ingest(self, folder: Path) -> None:
        from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
        from llama_index.core.node_parser import SentenceSplitter
        from llama_index.retrievers.bm25 import BM25Retriever

        self._nodes = SentenceSplitter().get_nodes_from_documents(SimpleDirectoryReader(str(folder)).load_data())
        self._index = VectorStoreIndex(self._nodes)
        self._index.storage_context.persist(str(self._home))
        BM25Retriever.from_defaults(nodes=self._nodes).persist(str(self._home / "bm25"))

    def _open(self, way: str, k: int) -> Any:
        from llama_index.core.retrievers import QueryFusionRetriever
        from llama_index.retrievers.bm25 import BM25Retriever

        dense = self._index.as_retriever(similarity_top_k=k)
        if way == "dense":
            return dense
        words = BM25Retriever.from_defaults(nodes=self._nodes, similarity_top_k=min(k, len(self._nodes)))
        return QueryFusionRetriever(
            [dense, words], similarity_top_k=k, num_queries=1, mode="reciprocal_rerank", use_async=False
        )

    def search(self, way: str, query: str, k: int) -> list[str]:
        return [Path(hit.node.metadata["file_path"]).stem for hit in self._retriever(way, k).retrieve(query)]


class Haystack:
    """Pipelines over the document store in memory: an embedder and a retriever, or with BM25 joined by rank."""

    def __init__(self, setting: Setting) -> None:
        from haystack.document_stores.in_memory import InMemoryDocumentStore
        from haystack.utils import ComponentDevice
        from haystack_integrations.components.embedders.sentence_transformers import (
            SentenceTransformersDocumentEmbedder,
            SentenceTransformersTextEmbedder,
        )

        self._home = setting.home
        self.version = importlib.metadata.version("haystack-ai")
        options = {
            "model": setting.model, "device": ComponentDevice.from_str("cpu"), "progress_bar": False,
            "model_kwargs": setting.weights,
        }  # fmt: skip
        self._embed_documents = SentenceTransformersDocumentEmbedder(batch_size=setting.batch, **options)
        self._embed_documents.warm_up()
        self._open_embedder = partial(SentenceTransformersTextEmbedder, **options)
        self._store = InMemoryDocumentStore(embedding_similarity_function="cosine")
        self._pipeline = cache(self._open)

    def ingest(self, folder: Path) -> None:
        from haystack.components.converters import TextFileToDocument
        from haystack.components.preprocessors import DocumentSplitter

        splitter = DocumentSplitter()
        splitter.warm_up()
        read = TextFileToDocument(store_full_path=True).run(sources=sorted(folder.iterdir()))["documents"]
        pieces = splitter.run(documents=read)["documents"]
        self._store.write_documents(self._embed_documents.run(documents=pieces)["documents"])
        self._store.save_to_disk(str(self._home / "store.json"))

    def _open(self, way: str, k: int) -> Any:
        from haystack import Pipeline
        from haystack.components.joiners import DocumentJoiner
        from haystack.components.retrievers.in_memory import InMemoryBM25Retriever, InMemoryEmbeddingRetriever

        pipeline = Pipeline()
        pipeline.add_component("embed", self._open_embedder())
        pipeline.add_component("dense", InMemoryEmbeddingRetriever(self._store, top_k=k))
        pipeline.connect("embed.embedding", "dense.query_embedding")
        if way == "hybrid":
            pipeline.add_component("words", InMemoryBM25Retriever(self._store, top_k=k))
            pipeline.add_component("join", DocumentJoiner(join_mode="reciprocal_rank_fusion", top_k=k))
            pipeline.connect("dense", "join")
            pipeline.connect("words", "join")
        pipeline.warm_up()
        return pipeline

    def search(self, way: str, query: str, k: int) -> list[str]:
        asked = {"embed": {"text": query}} | ({"words": {"query": query}} if way == "hybrid" else {})
        last = "join" if way == "hybrid" else "dense"
        return [Path(hit.meta["file_path"]).stem for hit in self._pipeline(way, k).run(asked)[last]["documents"]]


class LangChain:
    """The vector store in memory and a BM25 retriever, fused by rank in an ensemble."""

    def __init__(self, setting: Setting) -> None:
        from langchain_core.vectorstores import InMemoryVectorStore
        from langchain_huggingface import HuggingFaceEmbeddings

        self._home = setting.home
        self.version = importlib.metadata.version("langchain-core")
        embeddings = HuggingFaceEmbeddings(
            model_name=setting.model,
            model_kwargs={"device": "cpu", "model_kwargs": setting.weights},
            encode_kwargs={"batch_size": setting.batch, "normalize_embeddings": True},
        )
        embeddings.embed_query("warm up")
        self._store = InMemoryVectorStore(embeddings)
        self._retriever = cache(self._open)

    def ingest(self, folder: Path) -> None:
        from langchain_community.document_loaders import DirectoryLoader, TextLoader
        from langchain_community.retrievers import BM25Retriever
        from langchain_text_splitters import RecursiveCharacterTextSplitter

        read = DirectoryLoader(str(folder), glob="*.txt", loader_cls=TextLoader).load()
        pieces = RecursiveCharacterTextSplitter().split_documents(read)
        self._store.add_documents(pieces)
        self._words = BM25Retriever.from_documents(pieces)  # it has no means of its own to be kept
        self._store.dump(str(self._home / "store.json"))

    def _open(self, way: str, k: int) -> Any:
        from langchain_classic.retrievers import EnsembleRetriever

        dense = self._store.as_retriever(search_kwargs={"k": k})
        if way == "dense":
            return dense
        words = self._words.model_copy(update={"k": k})
        return EnsembleRetriever(retrievers=[dense, words], weights=[0.5, 0.5])

    def search(self, way: str, query: str, k: int) -> list[str]:
        hits = self._retriever(way, k).invoke(query)
        return [Path(hit.metadata["source"]).stem for hit in hits[:k]]  # the ensemble gives all that either found


class Txtai:
    """One index of vectors and words. Its core has no loader and no splitter: a file is read, and indexed whole."""

    def __init__(self, setting: Setting) -> None:
        from txtai import Embeddings

        self._home = setting.home
        self.version = importlib.metadata.version("txtai")
        self._both = Embeddings(
            path=setting.model, method="sentence-transformers", gpu=False, hybrid=True, content=False,
            encodebatch=setting.batch, vectors={"model_kwargs": setting.weights},
        )  # fmt: skip

    def ingest(self, folder: Path) -> None:
        self._both.index((path.stem, path.read_text(encoding="utf-8"), None) for path in sorted(folder.iterdir()))
        self._both.save(str(self._home / "index"))
        self._dense = copy.copy(self._both)
        self._dense.scoring = None  # else it searches for words, whatever they weigh

    def search(self, way: str, query: str, k: int) -> list[str]:
        return [name for name, _ in (self._both if way == "hybrid" else self._dense).search(query, k)]


class Nexus:
    """The parts that `nexus up` has in several processes, all in this one. They are as configured by default."""

    def __init__(self, setting: Setting) -> None:
        from nexus import __version__, precision
        from nexus.config import load_config
        from nexus.hades import Hades
        from nexus.ingest import open_steps
        from nexus.jobs import Jobs
        from nexus.registry import open_model, open_part
        from nexus.resident import open_resident
        from nexus.retrieval import RetrievalSettings, Retriever

        os.environ["NEXUS_HOME"] = str(setting.home)
        self.version = __version__
        config = load_config()
        precision.settle(config, print)
        config = precision.resolved(config)
        address, home = config.models.embedder, setting.home
        model = open_model("embed", address, **config.models.of_task("embed")[0].offered(), threads=1)
        model.embed(["warm up"])
        documents = open_part("stores", config.stores.documents, home=home)
        vectors = open_part("stores", config.stores.vectors, home=home)
        hades = Hades(documents, vectors, model.fingerprint, model.dimension, embedder=address)
        self._threads, self._jobs = setting.threads, Jobs(home)
        self._steps = open_steps(config, hades, model.embed)
        self._retriever = Retriever(
            hades, model, RetrievalSettings.of(config.retrieval),
            resident=open_resident(hades, config.retrieval.resident_bytes, home),
        )  # fmt: skip

    def ingest(self, folder: Path) -> None:
        from nexus.jobs import Announced
        from nexus.types import Principal, content_digest

        self._who = Principal("default", "bench", frozenset({"documents:read", "documents:write"}))
        self._steps.hades.open_collection("default")
        files = []
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            files.append(Announced(path.name, content_digest(content), len(content), content=content))
        job, _ = self._jobs.accept(self._who, "default", files, accepted_at=0)
        asyncio.run(self._work(job.job_id, len(files)))
        self._steps.flush()

    async def _work(self, job_id: str, files: int) -> None:
        from nexus.conveyor import Conveyor, Pace

        line = Conveyor(self._jobs, self._steps, Pace(embedders=self._threads))
        running = asyncio.create_task(line.run())
        outcomes = [await line.wait(job_id, number) for number in range(files)]
        running.cancel()
        await asyncio.wait({running})
        failed = [one for one in outcomes if one.state != "done"]
        assert not failed, failed[:3]

    def search(self, way: str, query: str, k: int) -> list[str]:
        from nexus.types import SearchRequest

        weights = {} if way == "hybrid" else {"embedding_weight": 1.0, "text_weight": 0.0}
        result = self._retriever.search(SearchRequest(query, k, **weights), self._who)
        return [Path(hit.source).stem for hit in result.hits]


SYSTEMS: dict[str, Callable[[Setting], System]] = {
    "LlamaIndex": LlamaIndex, "Haystack": Haystack, "LangChain": LangChain, "txtai": Txtai, "Nexus": Nexus,
}  # fmt: skip


def time_each(search: Callable[[str], object], queries: Sequence[str]) -> list[float]:
    """Milliseconds of each query, one after the other."""
    spent = []
    for query in queries:
        started = time.perf_counter()
        search(query)
        spent.append(1000 * (time.perf_counter() - started))
    return spent


def rate(search: Callable[[str], object], queries: Sequence[str], callers: int) -> float:
    """Queries a second while so many ask at once."""
    with ThreadPoolExecutor(callers) as threads:
        list(threads.map(search, queries[:callers]))  # warm, and every thread is there
        started = time.perf_counter()
        list(threads.map(search, queries))
        return len(queries) / (time.perf_counter() - started)


class Host:
    """What the lines can tell a system to do; what a method returns is the answer."""

    def __init__(self, system: System) -> None:
        self._system = system

    def ingest(self, folder: str, query: str) -> float:
        """Seconds from files in a folder to data on the disk and the answer to a query."""
        started = time.perf_counter()
        self._system.ingest(Path(folder))
        found = self._system.search("hybrid", query, 1)
        seconds = time.perf_counter() - started
        assert found, f"nothing was found for {query!r}"
        return seconds

    def find(self, way: str, queries: list[str], k: int) -> list[list[str]]:
        return [self._system.search(way, query, k) for query in queries]

    def time(self, way: str, queries: list[str], k: int, callers: int) -> tuple[list[float], float]:
        """As `time_each` and `rate` say."""
        search = partial(self._system.search, way, k=k)
        search(queries[0])  # which opens what there is to open
        return time_each(search, queries), rate(search, queries, callers)

    def serve(self, way: str, k: int) -> int:
        """The port of a plain HTTP server on loopback, a thread a connection: POST {"query"} gives {"hits"}."""
        system = self._system

        class Door(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["content-length"])))["query"]
                content = json.dumps({"hits": system.search(way, query, k)}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port


def main(name: str) -> None:
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # libraries print what they like
        setting = Setting(**json.loads(sys.stdin.readline()))
        setting = Setting(setting.model, Path(setting.home), setting.threads, setting.tuned)
        if name != "Nexus":
            import torch

            torch.set_num_threads(setting.threads)
        system = SYSTEMS[name](setting)
        host = Host(system)
        answers.write(json.dumps(system.version) + "\n")
        for line in sys.stdin:
            order = json.loads(line)
            answers.write(json.dumps(getattr(host, order.pop("do"))(**order)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
