"""Interactions: what is kept of them, who recalls it and how, and what becomes of those too old or too many.

Memory belongs to whoever stored it: a tenant's key recalls what was stored under its own name, and nothing else. Beside
that name each interaction is of a user, for whom the key may speak; all that is of a user can be deleted at once.

Compaction takes the oldest first: what is past its days, and what is too much for the tenant's bytes. `choose` says
what goes, by sizes and times alone. It is dropped, or where a summary is wanted, several of one user become one, in one
transaction with their removal: a crash before it loses the summary and after it nothing, and what its user deleted
meanwhile is in no summary. A summary is kept for days of its own, and never becomes part of another.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any, Protocol

from nexus.config import Memory as Rules
from nexus.errors import ContentRefused, InvalidRequest, NexusError, NotFound, RateLimited, TooLarge, TryAgain
from nexus.failpoints import pass_through
from nexus.filters import Filter
from nexus.ports import InputType, InteractionStore
from nexus.screening import Screen
from nexus.summaries import Summarise, gather
from nexus.types import ROW_BYTES, Forgotten, Interaction, MemoryEntry, Principal, Vector, Vectors, digest

log = logging.getLogger("nexus.memory")

MAX_BYTES = 2**20  # of one interaction
MAX_RECALLED_BYTES = 8 * 2**20  # of those of one answer
MAX_USER_CHARACTERS = 255
DAY = 86_400.0
AHEAD_SECONDS = 300.0  # that a caller's clock may be before ours
FULL = 2.0  # times its bytes, from which on a tenant's memory takes nothing until it was compacted
KNOWN_SECONDS = 10.0  # that a tenant's usage is believed
COMPACTED_AT_ONCE = 1000
LABEL_CHARACTERS = 32  # that a text of a summary's prompt has beside itself
EMBEDDED_AT_ONCE = 64
MOST_BATCHES = 50  # of vectors made anew in one run: other upkeep waits


class Embedding(Protocol):
    """The documents' embedder."""

    async def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors: ...

    async def describe(self) -> Mapping[str, object]:
        """Its `fingerprint`, at least."""
        ...


@dataclass(frozen=True, slots=True)
class Draft:
    """An interaction as it is given to be kept. Who does not say when it happened or whose it is: now, and its own."""

    query: str
    response: str
    context: tuple[str, ...] = ()
    confidence: float | None = None
    model: str | None = None
    gpu_utilization: float | None = None
    latency_ms: float | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    user: str | None = None
    happened_at: float | None = None


@dataclass(frozen=True, slots=True)
class Recall:
    """What to look for: by meaning where there is a query, else the newest; of those that meet the condition."""

    query: str = ""
    limit: int = 5
    condition: Filter | None = None


@dataclass(frozen=True, slots=True)
class Recalled:
    """Interactions with their cosines, None where none was asked for; how many could not be compared yet.

    `left_out` are those after them that were asked for, and are too much for one answer.
    """

    found: tuple[tuple[Interaction, float | None], ...]
    not_compared: int = 0
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Compaction:
    """What of a tenant has to go: ids to drop, and groups of one user's to be summarised."""

    dropped: tuple[str, ...] = ()
    summarised: tuple[tuple[MemoryEntry, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Compacted:
    """What was done: interactions and summaries dropped, interactions summarised, vectors made anew."""

    dropped: int = 0
    summarised: int = 0
    embedded: int = 0


# ── decisions ───────────────────────────────────────────────────────────────────────────────────


def make(draft: Draft, principal: Principal, interaction_id: str, now: float, rules: Rules) -> Interaction:
    """The interaction that a draft becomes. Raises InvalidRequest, TooLarge."""
    if not draft.query.strip():
        raise InvalidRequest("the query is empty", pointer="/query")
    user = principal.subject if draft.user is None else draft.user
    if not (0 < len(user) <= MAX_USER_CHARACTERS and user.isprintable()):
        raise InvalidRequest(f"a user is 1 to {MAX_USER_CHARACTERS} printable characters", pointer="/user")
    happened_at = now if draft.happened_at is None else draft.happened_at
    if happened_at > now + AHEAD_SECONDS:
        raise InvalidRequest("the timestamp is in the future; it is that of when this happened", pointer="/timestamp")
    if happened_at < now - rules.retention_days * DAY:
        raise InvalidRequest(
            f"this is older than the {rules.retention_days:g} days for which memory keeps anything"
            " (memory.retention_days)", pointer="/timestamp",
        )  # fmt: skip
    interaction = Interaction(
        interaction_id, principal.tenant, principal.subject, user, draft.query, draft.response, min(happened_at, now),
        draft.context, draft.confidence, draft.model, draft.gpu_utilization, draft.latency_ms, draft.metadata,
    )  # fmt: skip
    if interaction.size > MAX_BYTES:
        raise TooLarge(f"an interaction has at most {MAX_BYTES} bytes, its context and metadata included")
    return interaction


def text_of(interaction: Interaction) -> str:
    """What of an interaction its vector is made of."""
    return "\n".join(part for part in (interaction.query, interaction.response) if part)


def choose(
    interactions: Sequence[MemoryEntry], summaries: Sequence[MemoryEntry], used: int, now: float, rules: Rules
) -> Compaction:
    """What has to go of a tenant that uses so many bytes, of these, its oldest: all past its days, then for size."""
    days = {"interaction": rules.retention_days, "summary": rules.summary_days}
    entries = sorted([*interactions, *summaries], key=lambda one: (one.created_at, one.interaction_id))
    going = {one.interaction_id for one in entries if one.created_at < now - days[one.kind] * DAY}
    left = used - sum(one.size for one in entries if one.interaction_id in going)
    for entry in entries:
        if left > rules.max_bytes and entry.interaction_id not in going:
            going.add(entry.interaction_id)
            left -= entry.size
    gone = [one for one in entries if one.interaction_id in going]
    is_summarised = rules.compaction == "summarise"
    dropped = [one.interaction_id for one in gone if one.kind == "summary" or not is_summarised]
    condensed = sorted((one for one in gone if one.kind == "interaction" and is_summarised), key=_owner)
    groups = [tuple(group) for _, of_one in groupby(condensed, _owner) for group in gather(list(of_one), _length)]
    return Compaction(tuple(dropped), tuple(groups))


def _owner(entry: MemoryEntry) -> tuple[str, str]:
    return entry.subject, entry.user


def _length(entry: MemoryEntry) -> int:
    return entry.size - ROW_BYTES + LABEL_CHARACTERS


def join(parts: Sequence[Interaction], text: str) -> Interaction:
    """The summary that these become, at least one, all of one user."""
    first, last = min(part.created_at for part in parts), max(part.created_at for part in parts)
    return Interaction(
        digest("summary", *(part.interaction_id for part in parts)), parts[0].tenant, parts[0].subject, parts[0].user,
        "", text, last, metadata={"interactions": len(parts), "first": first, "last": last}, kind="summary",
    )  # fmt: skip


# ── keeping and recalling ───────────────────────────────────────────────────────────────────────


class Memory:
    """What the front door does with memory: each text that goes in or comes out is screened here."""

    def __init__(
        self, store: InteractionStore, embedder: Embedding, rules: Rules, screen: Screen | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.store, self.rules = store, rules
        self._embedder, self._screen, self._now = embedder, screen or Screen(), now
        self._usage: tuple[float, dict[str, int]] = (-KNOWN_SECONDS, {})
        self._fingerprint: str | None = None

    def screened(self, screen: Screen) -> "Memory":
        """The same behind these content rules."""
        return Memory(self.store, self._embedder, self.rules, screen, self._now)

    async def keep(self, principal: Principal, draft: Draft) -> Interaction:
        """Durable on return. While the embedder is away it is kept all the same, and gets its vector later.

        Raises InvalidRequest, TooLarge, ContentRefused, RateLimited when the tenant's memory is full, Unavailable.
        """
        interaction = make(await self._admit(draft), principal, secrets.token_hex(16), self._now(), self.rules)
        if await self._used(principal.tenant) > FULL * self.rules.max_bytes:
            raise RateLimited(
                "the memory of this tenant is full; it is compacted every minute", retry_after=60, code="memory_full"
            )
        vector, fingerprint = await self._embed_or_not(interaction)
        await asyncio.to_thread(self.store.add, interaction, vector, fingerprint)
        return interaction

    async def recall(self, principal: Principal, asked: Recall) -> Recalled:
        """What this principal stored, and nothing of anybody else. Raises ContentRefused, Unavailable."""
        tenant, subject, store = principal.tenant, principal.subject, self.store
        if not asked.query.strip():
            newest = await asyncio.to_thread(store.recent, tenant, subject, asked.condition, asked.limit)
            first = newest[: _fitting(newest)]
            return Recalled(tuple((one, None) for one in await self._show(first)), left_out=len(newest) - len(first))
        query = await self._screen.text("input", asked.query)
        fingerprint = await self._fingerprint_of()
        (vector,) = await self._embedder.embed([query], "query")
        found = await asyncio.to_thread(
            store.nearest, tenant, subject, asked.condition, vector, fingerprint, asked.limit
        )  # fmt: skip
        stale = await asyncio.to_thread(store.count_stale, tenant, subject, fingerprint)
        cosines = {one.interaction_id: cosine for one, cosine in found}
        nearest = [one for one, _ in found]
        first = nearest[: _fitting(nearest)]
        shown = await self._show(first)
        return Recalled(
            tuple((one, cosines[one.interaction_id]) for one in shown), stale, left_out=len(nearest) - len(first)
        )

    async def delete(self, principal: Principal, interaction_id: str) -> Forgotten:
        """One interaction, and what a summary says of it. Raises NotFound, also for one that is somebody else's."""
        subject = _whose(principal)
        done = await asyncio.to_thread(self.store.delete, principal.tenant, subject, interaction_id)
        return _require_any(done, "there is no such interaction")

    async def forget(self, principal: Principal, user: str) -> Forgotten:
        """All of a user that this principal stored; of whoever may administer, all of the tenant. Raises NotFound."""
        done = await asyncio.to_thread(self.store.forget, principal.tenant, _whose(principal), user)
        return _require_any(done, "nothing is kept of this user")

    async def _admit(self, draft: Draft) -> Draft:
        screen = self._screen
        query = await screen.text("input", draft.query)
        response, *context = await screen.texts("input", [draft.response, *draft.context])
        metadata: Any = await screen.data("input", dict(draft.metadata))
        return replace(draft, query=query, response=response, context=tuple(context), metadata=metadata)

    async def _show(self, found: Sequence[Interaction]) -> list[Interaction]:
        """As they may be shown: what was kept is read like a document; what a rule refuses is left out."""
        shown = []
        for one in found:
            try:
                query, response, *context = await self._screen.texts(
                    "document", [one.query, one.response, *one.context]
                )
                metadata: Any = await self._screen.data("document", dict(one.metadata))
            except ContentRefused:
                continue
            shown.append(replace(one, query=query, response=response, context=tuple(context), metadata=metadata))
        return shown

    async def _used(self, tenant: str) -> int:
        known_at, usage = self._usage
        if self._now() - known_at >= KNOWN_SECONDS:
            usage = await asyncio.to_thread(self.store.usage)
            self._usage = self._now(), usage
        return usage.get(tenant, 0)

    async def _embed_or_not(self, interaction: Interaction) -> tuple[Vector | None, str]:
        try:
            fingerprint = await self._fingerprint_of()
            (vector,) = await self._embedder.embed([text_of(interaction)], "passage")
        except TryAgain as error:
            log.warning("an interaction was kept without a vector, which it gets later: %s", error.message)
            return None, ""
        return vector, fingerprint

    async def _fingerprint_of(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = str((await self._embedder.describe())["fingerprint"])
        return self._fingerprint


def _fitting(found: Sequence[Interaction]) -> int:
    """How many of the first fit into one answer; the first one does."""
    sizes = accumulate(one.size for one in found)
    return max(sum(size <= MAX_RECALLED_BYTES for size in sizes), min(len(found), 1))


def _whose(principal: Principal) -> str | None:
    return None if "admin" in principal.permissions else principal.subject


def _require_any(done: Forgotten, otherwise: str) -> Forgotten:
    if done == Forgotten(0, 0):
        raise NotFound(otherwise)
    return done


# ── compaction ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Compactor:
    """Upkeep of memory. Several may run at once: what one has taken, another leaves."""

    store: InteractionStore
    rules: Rules
    fingerprint: str
    embed: Callable[[Sequence[str]], Awaitable[Vectors]]
    summarise: Summarise | None = None  # has to be there where the rules ask for summaries

    async def run(self, now: float) -> Compacted:
        """Make every tenant's memory as old and as large as it may be, and give vectors to what has none.

        Raises TryAgain where a store or the embedder is away; a model that is away is waited for till the next run.
        """
        done = Compacted()
        for tenant in await asyncio.to_thread(self.store.usage):
            done = _add(done, await self._compact(tenant, now))
        return _add(done, Compacted(embedded=await self._embed_stale()))

    async def _compact(self, tenant: str, now: float) -> Compacted:
        store, done = self.store, Compacted()
        while True:
            used = (await asyncio.to_thread(store.usage)).get(tenant, 0)
            interactions = await asyncio.to_thread(store.oldest, tenant, "interaction", COMPACTED_AT_ONCE)
            summaries = await asyncio.to_thread(store.oldest, tenant, "summary", COMPACTED_AT_ONCE)
            chosen = choose(interactions, summaries, used, now, self.rules)
            if not (chosen.dropped or chosen.summarised):
                return done
            if chosen.dropped:
                dropped = await asyncio.to_thread(store.drop, tenant, chosen.dropped)
                done = _add(done, Compacted(dropped=dropped))
            try:
                for group in chosen.summarised:
                    done = _add(done, await self._condense(tenant, [entry.interaction_id for entry in group]))
            except TryAgain as error:
                log.warning("memory waits for the model that summarises it: %s", error.message)
                return done

    async def _condense(self, tenant: str, interaction_ids: Sequence[str]) -> Compacted:
        """Put a summary in the place of these; without one that the model refuses to make, or makes nothing of."""
        assert self.summarise is not None, "rules that ask for summaries come with a model"
        parts = await asyncio.to_thread(self.store.load, tenant, interaction_ids)
        if not parts:
            return Compacted()  # all of it was deleted meanwhile
        try:
            text = await self.summarise([_described(part) for part in parts], tenant)
        except TryAgain:
            raise
        except NexusError as error:
            log.warning("%d interactions are dropped without a summary: %s", len(parts), error.message)
            return Compacted(dropped=await asyncio.to_thread(self.store.drop, tenant, interaction_ids))
        summary = join(parts, text)
        (vector,) = await self.embed([text_of(summary)])
        pass_through("memory.before_replace")
        is_done = await asyncio.to_thread(
            self.store.replace, tenant, [part.interaction_id for part in parts], summary, vector, self.fingerprint
        )
        return Compacted(summarised=len(parts) if is_done else 0)

    async def _embed_stale(self) -> int:
        """Give vectors of this embedder to those that have another's, or none."""
        count = 0
        for _ in range(MOST_BATCHES):
            stale = await asyncio.to_thread(self.store.stale, self.fingerprint, EMBEDDED_AT_ONCE)
            if not stale:
                break
            vectors = await self.embed([text_of(one) for one in stale])
            made = {one.interaction_id: vector for one, vector in zip(stale, vectors, strict=True)}
            await asyncio.to_thread(self.store.embed, made, self.fingerprint)
            count += len(made)
        return count


def _described(interaction: Interaction) -> str:
    return f"Asked: {interaction.query}\nAnswered: {interaction.response}"


def _add(one: Compacted, other: Compacted) -> Compacted:
    return Compacted(
        one.dropped + other.dropped, one.summarised + other.summarised, one.embedded + other.embedded
    )  # fmt: skip
