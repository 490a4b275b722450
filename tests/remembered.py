"""An InteractionStore as plain as can be, to compare others with, and a compaction for a crash to interrupt."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from nexus.config import Memory as Rules
from nexus.filters import Combine, Compare, Filter
from nexus.memory import Compactor
from nexus.stores import sqlite
from nexus.types import Forgotten, Interaction, InteractionKind, MemoryEntry, Vector, Vectors
from tests.words import WordEmbedder

EMBEDDER = WordEmbedder()
SUMMARY = "In short: the gripper."
NOW = 1_800_000_000.0


class PlainInteractions:
    """A list of all there is, searched from one end to the other."""

    def __init__(self) -> None:
        self.kept: dict[str, Interaction] = {}
        self.vectors: dict[str, tuple[str, Vector]] = {}
        self.parts: dict[str, str] = {}  # the summary that each went into

    def add(self, interaction: Interaction, vector: Vector | None, fingerprint: str) -> None:
        self.kept[interaction.interaction_id] = interaction
        if vector is not None:
            self.vectors[interaction.interaction_id] = fingerprint, vector

    def recent(self, tenant: str, subject: str, condition: Filter | None, limit: int) -> list[Interaction]:
        found = self._of(tenant, subject, condition)
        return sorted(found, key=lambda one: (-one.created_at, one.interaction_id))[:limit]

    def nearest(
        self, tenant: str, subject: str, condition: Filter | None, vector: Vector, fingerprint: str, limit: int
    ) -> list[tuple[Interaction, float]]:
        compared = [
            (one, round(float(vector @ self.vectors[one.interaction_id][1]), 6))
            for one in self._of(tenant, subject, condition)
            if self._has(one, fingerprint)
        ]
        return sorted(compared, key=lambda one: (-one[1], one[0].interaction_id))[:limit]

    def count_stale(self, tenant: str, subject: str, fingerprint: str) -> int:
        return sum(not self._has(one, fingerprint) for one in self._of(tenant, subject, None))

    def stale(self, fingerprint: str, limit: int) -> list[Interaction]:
        return [one for one in self.kept.values() if not self._has(one, fingerprint)][:limit]

    def embed(self, vectors: Mapping[str, Vector], fingerprint: str) -> None:
        self.vectors |= {id: (fingerprint, vector) for id, vector in vectors.items() if id in self.kept}

    def usage(self) -> dict[str, int]:
        tenants = {one.tenant for one in self.kept.values()}
        return {name: sum(one.size for one in self.kept.values() if one.tenant == name) for name in tenants}

    def oldest(self, tenant: str, kind: InteractionKind, limit: int) -> list[MemoryEntry]:
        found = [one for one in self.kept.values() if (one.tenant, one.kind) == (tenant, kind)]
        found.sort(key=lambda one: (one.created_at, one.interaction_id))
        return [
            MemoryEntry(one.interaction_id, one.subject, one.user, one.kind, one.created_at, one.size)
            for one in found[:limit]
        ]

    def load(self, tenant: str, interaction_ids: Sequence[str]) -> list[Interaction]:
        found = [self.kept[id] for id in interaction_ids if id in self.kept]
        return [one for one in found if one.tenant == tenant]

    def drop(self, tenant: str, interaction_ids: Sequence[str]) -> int:
        going = self.load(tenant, interaction_ids)
        for one in going:
            del self.kept[one.interaction_id]
            self.vectors.pop(one.interaction_id, None)
            self.parts = {part: of for part, of in self.parts.items() if of != one.interaction_id}
        return len(going)

    def replace(
        self, tenant: str, interaction_ids: Sequence[str], summary: Interaction, vector: Vector | None, fingerprint: str
    ) -> bool:
        if len(self.load(tenant, interaction_ids)) != len(interaction_ids):
            return False
        self.drop(tenant, interaction_ids)
        self.add(summary, vector, fingerprint)
        self.parts |= dict.fromkeys(interaction_ids, summary.interaction_id)
        return True

    def delete(self, tenant: str, subject: str | None, interaction_id: str) -> Forgotten:
        ids = {interaction_id, self.parts.get(interaction_id)}
        return self._forget([one for one in self._of(tenant, subject, None) if one.interaction_id in ids])

    def forget(self, tenant: str, subject: str | None, user: str) -> Forgotten:
        return self._forget([one for one in self._of(tenant, subject, None) if one.user == user])

    def _forget(self, going: Sequence[Interaction]) -> Forgotten:
        for one in going:
            self.drop(one.tenant, [one.interaction_id])
        summaries = sum(one.kind == "summary" for one in going)
        return Forgotten(len(going) - summaries, summaries)

    def _of(self, tenant: str, subject: str | None, condition: Filter | None) -> list[Interaction]:
        return [
            one
            for one in self.kept.values()
            if one.tenant == tenant and subject in (None, one.subject) and (condition is None or meets(one, condition))
        ]

    def _has(self, one: Interaction, fingerprint: str) -> bool:
        return self.vectors.get(one.interaction_id, ("",))[0] == fingerprint


def meets(one: Interaction, condition: Filter) -> bool:
    if isinstance(condition, Combine):
        return (all if condition.every else any)(meets(one, part) for part in condition.parts)
    fields = {
        "user": one.user, "kind": one.kind, "model_used": one.model, "confidence": one.confidence,
        "gpu_utilization": one.gpu_utilization, "latency_ms": one.latency_ms, "timestamp": one.created_at,
    }  # fmt: skip
    value = fields[condition.key] if condition.key in fields else one.metadata.get(condition.key)
    return _compares(condition, value)


def _compares(condition: Compare, value: object) -> bool:
    alike = [wanted for wanted in condition.values if _kind(wanted) == _kind(value)]
    if condition.operator in ("eq", "in"):
        return value in alike
    if condition.operator in ("ne", "nin"):
        return value not in alike
    order = {"gt": "__gt__", "gte": "__ge__", "lt": "__lt__", "lte": "__le__"}[condition.operator]
    if _kind(value) == "number":
        return bool(alike) and getattr(float(value), order)(float(alike[0]))  # type: ignore[arg-type]
    return bool(alike) and getattr(value, order)(alike[0])


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else type(value).__name__


# ── to be killed ────────────────────────────────────────────────────────────────────────────────


async def embed(texts: Sequence[str]) -> Vectors:
    return EMBEDDER.embed(texts)


async def summarise(texts: Sequence[str], tenant: str) -> str:
    return SUMMARY


def compact(home: Path, how: str) -> None:
    """Compact the memory of this home, in which all is too old, by `summarise` or `drop`."""
    with closing(sqlite.open_interactions("sqlite:", home=home)) as store:
        rules = Rules(retention_days=1, compaction=how)  # type: ignore[arg-type]
        compactor = Compactor(store, rules, EMBEDDER.fingerprint, embed, summarise)
        asyncio.run(compactor.run(NOW))


def random_unit(seed: int) -> Vector:
    vector = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
    return vector / np.linalg.norm(vector)
