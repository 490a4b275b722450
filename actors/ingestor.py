"""Documents in: the conveyor of accepted files, the janitor, the check of both stores, and memory's compaction."""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from actors.coordination import Coordination
from actors.hops import begin, hop
from actors.pressure import yielding
from nexus.audit import Chain
from nexus.background import begin_in_background, has_failed
from nexus.chunking import ChunkSettings
from nexus.config import Config
from nexus.conveyor import Conveyor, Pace
from nexus.enforcement import Enforcer, Evaluation, Order, open_tiers
from nexus.errors import InvalidRequest, NexusError, TryAgain
from nexus.hades import Fault, Hades, Removed
from nexus.homes import HadesIndexer, Homes
from nexus.ingest import Ingestor as Steps
from nexus.ingest import Source, open_steps
from nexus.jobs import Jobs, examine
from nexus.memory import Compacted, Compactor
from nexus.policy import Rule
from nexus.ports import Collection, Embedder, InputType, InteractionStore, LiveIndex
from nexus.registry import open_interactions, open_part
from nexus.reindex import Progress, Reindexer
from nexus.retrieval import RetrievalSettings
from nexus.summaries import Summarise
from nexus.types import Principal, Receipt, StoredFile, Vectors

log = logging.getLogger("nexus.ingestor")
Result = TypeVar("Result")

TEXTS_PER_CALL = 128  # to the embedder pool, so that a long document does not keep others waiting
JANITOR_SECONDS = 60.0
POLL_SECONDS = 30.0  # between two looks at what tiers that place files by themselves have done
REINDEX_SECONDS = 1.0  # between two looks at whether an index is to be built, or removed
NICENESS = 10  # reading and cutting give way to questions


class EmbedderPool(Protocol):
    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors: ...
    async def describe(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Pooled:
    """The embedder pool as code that blocks asks it."""

    fingerprint: str
    dimension: int
    ask: Callable[[Sequence[str], InputType], Vectors]
    max_tokens: int

    def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        return self.ask(texts, input_type)


@hop
class Ingestor:
    """One process that works through the files of accepted jobs, and keeps the stores clean."""

    def __init__(
        self, config: Config, vectors_address: str, pool: EmbedderPool, summarise: Summarise | None = None
    ) -> None:  # fmt: skip
        """`summarise` has to be there where memory is to be summarised."""
        begin("ingestor", config.telemetry)
        self._config, self._vectors_address, self._pool = config, vectors_address, pool
        self._summarise = summarise
        self._memory: InteractionStore | None = None  # once the conveyor is there
        self._threads = ThreadPoolExecutor(4, "ask")
        self._enforcing = ThreadPoolExecutor(4, "policies")  # which may take long, and keep no question waiting
        self._enforcer: Enforcer | None = None
        self._building = ThreadPoolExecutor(1, "reindex")
        self._reindexer: Reindexer | None = None
        self._starting: asyncio.Task[Conveyor] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def finish(self, job_id: str, number: int) -> None:
        """Return once a file has ended; the list of jobs says how."""
        await (await self._conveyor()).wait(job_id, number)

    async def wake(self) -> None:
        """There are new files to work on."""
        (await self._conveyor()).wake()

    async def find_unchanged(self, sources: Sequence[Source], principal: Principal) -> list[Receipt | None]:
        """For each source, the receipt of the current version if it was made of these very bytes."""
        steps = (await self._conveyor()).ingestor
        return await self._run(lambda: [steps.find_unchanged(source, principal) for source in sources])

    async def vacuum(self, keep_closed_seconds: float, document_ids: Sequence[str] | None = None) -> list[Removed]:
        """Remove what no retained `as_of` needs, of these documents where given. Raises Unavailable."""
        conveyor = await self._conveyor()
        keep = self._config.hades.keep_staged_seconds
        return await self._run(conveyor.ingestor.hades.vacuum, keep_closed_seconds, keep, document_ids)

    async def fsck(self, repair: bool) -> list[Fault]:
        """What is wrong in the stores and in the list of jobs; with `repair`, what is still wrong after it."""
        conveyor = await self._conveyor()
        return await self._run(examine, conveyor.ingestor.hades, conveyor.jobs, repair, self._memory)

    async def open_collection(self, name: str, tenant: str) -> tuple[Collection, LiveIndex, tuple[str, int]]:
        """The collection of this tenant, made if it is new; its own index; and the configured embedder's fingerprint
        and dimension. Raises Conflict."""
        hades = (await self._conveyor()).ingestor.hades
        opened = await self._run(hades.open_collection, name)
        own, _ = await self._run(hades.written, name)
        found = await self._run(hades.documents.collection, name, tenant) or opened
        return found, own, (hades.fingerprint, hades.dimension)

    async def flush(self, collection: str) -> None:
        """Make what was written to a collection cheap to search."""
        hades = (await self._conveyor()).ingestor.hades
        own, beside = await self._run(hades.written, collection)
        for live in (own, *beside):
            await self._run(hades.vectors.flush, live.index)

    async def begin_reindex(
        self, collection: str, embedder: str | None, by: Principal, questions: Sequence[tuple[str, Sequence[str]]],
        chunking: ChunkSettings | None = None,
    ) -> Progress:  # fmt: skip
        """Begin a second index with one of the configured embedders, by its name or address, cut so where that is said.

        By default it is the first of them; where only a chunking is given, the one of the live index. It is built and
        compared here, in the background, also after a restart. Raises as `Reindexer.begin`.
        """
        served = self._config.models.of_task("embed")
        found = [one.address for one in served if embedder in (None, one.called, one.address)]
        if not found:
            known = ", ".join(repr(one.called) for one in served)
            raise InvalidRequest(
                f"no embedder {embedder!r} is configured; there are {known}: list it in models.served, with task embed",
                pointer="/embedder",
            )
        address = None if embedder is None and chunking is not None else found[0]
        reindexer = await self._reindexing()
        await self._run(reindexer.begin, collection, address, by, questions, chunking)
        return await self._run(reindexer.progress, collection)

    async def reindex_progress(self, collection: str) -> Progress:
        return await self._run((await self._reindexing()).progress, collection)

    async def switch_index(self, collection: str, anyway: bool) -> Progress:
        """The second index is the live one from now on, and within a second everywhere. Raises Conflict."""
        return await self._run((await self._reindexing()).switch, collection, anyway)

    async def roll_index_back(self, collection: str) -> Progress:
        """As above, the other way round."""
        return await self._run((await self._reindexing()).rollback, collection)

    async def drop_index(self, collection: str) -> Progress:
        """Whichever of the two indexes is not live will be removed. Raises Conflict."""
        return await self._run((await self._reindexing()).drop, collection)

    async def _reindexing(self) -> Reindexer:
        await self._conveyor()
        assert self._reindexer is not None
        return self._reindexer

    async def policies(self, tenant: str) -> list[Rule]:
        return await self._run((await self._policies()).rules, tenant)

    async def policy(self, tenant: str, name: str) -> Rule:
        """Raises NotFound."""
        return await self._run((await self._policies()).rule, tenant, name)

    async def put_policy(self, principal: Principal, name: str, tree: Mapping[str, object]) -> tuple[Rule, int]:
        """Make or replace a policy; its version, from 1. Raises InvalidRequest."""
        return await self._enforce(lambda enforcer: enforcer.put(principal, name, tree))

    async def drop_policy(self, principal: Principal, name: str) -> None:
        """Raises NotFound. What the policy did stays done."""
        await self._enforce(lambda enforcer: enforcer.drop(principal, name))

    async def release(self, principal: Principal, hold: str, path: str) -> StoredFile:
        """Lift a hold of a file. Raises NotFound."""
        return await self._enforce(lambda enforcer: enforcer.release(principal, hold, path))

    async def evaluate_policy(self, principal: Principal, order: Order) -> Evaluation:
        """What a policy does, or after it was carried out, did. Raises NotFound, Unavailable."""
        return await self._enforce(lambda enforcer: enforcer.evaluate(principal, order))

    async def ready(self) -> bool:
        """True once the embedder pool and both stores answer. Raises Unavailable."""
        hades = (await self._conveyor()).ingestor.hades
        await self._run(hades.documents.check)
        await self._run(hades.vectors.check)
        return True

    async def _conveyor(self) -> Conveyor:
        """Made on the first call, once: the embedder pool must be there to say what it is."""
        if self._starting is None or has_failed(self._starting):
            self._starting = begin_in_background(self._open())
        return await asyncio.shield(self._starting)

    async def _open(self) -> Conveyor:
        config, home = self._config, Path(self._config.home)
        about = await self._pool.describe()
        fingerprint, dimension = str(about["fingerprint"]), int(str(about["dimension"]))
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
        hades = Hades(
            open_part("stores", config.stores.documents, home=home, shared_metadata=config.graph.shared_metadata),
            open_part("stores", self._vectors_address, home=home),
            fingerprint,
            dimension,
            Coordination(),
            config.models.embedder,
        )
        embed = partial(self._embed, asyncio.get_running_loop())
        steps: Steps = open_steps(config, hades, embed)
        most = int(str(about["max_tokens"]))
        self._reindexer = self._open_reindexer(steps, Pooled(fingerprint, dimension, embed, most))
        embedders = config.ingest.embedders or 1 + (config.models.embedder_threads or os.cpu_count() or 1)
        pace = Pace(config.parsing.workers, embedders, stuck_seconds=config.ingest.stuck_seconds)
        conveyor = Conveyor(Jobs(home), steps, pace, yielding=yielding(config.scaling))
        homes = Homes(home, open_tiers(config), HadesIndexer(steps))
        self._enforcer = Enforcer(homes, Chain(home, config.audit.file_bytes).append)
        self._keep(conveyor.run())
        self._memory = open_interactions(config.stores.documents, home=home)
        compactor = Compactor(self._memory, config.memory, fingerprint, self._pool.embed, self._summarise)
        self._keep(self._keep_clean(conveyor))
        self._keep(self._keep_compact(compactor))
        if config.policies.tiers:
            self._keep(self._keep_policies(self._enforcer))
        self._keep(self._keep_reindexing(self._reindexer))
        return conveyor

    def _open_reindexer(self, steps: Steps, configured: Embedder) -> Reindexer:
        def embedder_of(live: LiveIndex) -> Embedder:
            return configured if live.fingerprint == configured.fingerprint else steps.others.of(live)

        settings = RetrievalSettings.of(self._config.retrieval)
        pauses = yielding(self._config.scaling).pauses
        return Reindexer(steps.hades, steps.others, steps.cut_for, steps.embed_for, embedder_of, settings, pauses)

    def _keep(self, work: Awaitable[None]) -> None:
        """Run something for as long as this process; if it ends, so does the process, and Serve makes another."""

        async def run() -> None:
            try:
                await work
            finally:
                log.critical("the ingestor cannot go on", exc_info=True)
                os._exit(1)

        self._tasks.add(asyncio.create_task(run()))

    def _embed(
        self, loop: asyncio.AbstractEventLoop, texts: Sequence[str], input_type: InputType = "passage"
    ) -> Vectors:
        """Called in a thread of ours: the pool is asked on the loop, and waited for here."""
        asked = (
            self._pool.embed(texts[i : i + TEXTS_PER_CALL], input_type) for i in range(0, len(texts), TEXTS_PER_CALL)
        )
        return np.concatenate([asyncio.run_coroutine_threadsafe(_await(one), loop).result() for one in asked])

    async def _keep_clean(self, conveyor: Conveyor) -> None:
        """Now and then, remove what nobody needs any more, and say what that was."""
        settings, hades = self._config.hades, conveyor.ingestor.hades
        while True:
            try:
                removed = await self._run(hades.vacuum, settings.keep_closed_seconds, settings.keep_staged_seconds)
                for one in removed:
                    log.info("removed %s of %s: %d chunks", one.why, one.document.source, one.chunks)
                tidied = await self._run(conveyor.jobs.tidy)
                if any(tidied.values()):
                    log.info("removed %s", tidied)
            except TryAgain as error:  # a store is away; the next round finds the same
                log.warning("cleaning was put off: %s", error)
            await asyncio.sleep(JANITOR_SECONDS)

    async def _keep_compact(self, compactor: Compactor) -> None:
        """Now and then, make memory as old and as large as it may be, and say what went."""
        while True:
            try:
                done = await compactor.run(time.time())
                if done != Compacted():
                    log.info("memory was compacted: %s", done)
            except NexusError as error:  # a store or the embedder is away, or wrong; documents go on all the same
                log.warning("compacting memory was put off: %s", error)
            await asyncio.sleep(JANITOR_SECONDS)

    async def _keep_policies(self, enforcer: Enforcer) -> None:
        """Learn what tiers have done, and where it is wanted carry all policies out, now and then."""
        every = self._config.policies.every_seconds
        due = time.monotonic() + (every or 0.0)
        while True:
            try:
                await self._run_enforcing(enforcer.poll)
                if every is not None and time.monotonic() >= due:
                    due = time.monotonic() + every
                    done = await self._run_enforcing(enforcer.run)
                    if done:
                        log.info("policies: %s", dict(Counter(f"{one.action} {one.status}" for one in done)))
            except NexusError as error:  # a tier or the audit record is away; the next round finds the same
                log.warning("policies were put off: %s", error.message)
            await asyncio.sleep(POLL_SECONDS if every is None else min(POLL_SECONDS, every))

    async def _policies(self) -> Enforcer:
        await self._conveyor()
        assert self._enforcer is not None  # it is made with the conveyor
        return self._enforcer

    async def _enforce(self, work: Callable[[Enforcer], Result]) -> Result:
        """What may take long, beside what does not."""
        return await self._run_enforcing(work, await self._policies())

    async def _run_enforcing(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._enforcing, partial(work, *arguments))

    async def _keep_reindexing(self, reindexer: Reindexer) -> None:
        """Go on with every index that was begun, by whomever and in whichever life, and remove what was dropped."""
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(self._building, reindexer.work)
            except NexusError as error:  # a store is away, or the coordinator is; the next round goes on
                log.warning("reindexing was put off: %s", error)
            await asyncio.sleep(REINDEX_SECONDS)

    async def _run(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *arguments))


async def _await(coroutine: Awaitable[Vectors]) -> Vectors:
    return await coroutine
