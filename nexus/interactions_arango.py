"""What memory keeps, in an ArangoDB database: interactions with their vectors, and what summaries were made of.

The same as interactions.py, and it answers the same. A vector stands in its interaction's record, with the fingerprint
of the embedder that made it, and the server compares vectors of one fingerprint. `parts` says which interactions went
into a summary, by their ids alone. What is deleted stays in the server's files until it compacts them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from nexus.arangodb import ArangoStore, Table, Transaction, condition_of, facts_of, persistent
from nexus.failpoints import pass_through
from nexus.filters import Filter
from nexus.types import Forgotten, Interaction, InteractionKind, MemoryEntry, Vector, digest

T = TypeVar("T")

KINDS = ("interaction", "summary")
UNIT = 1e-2  # by which a vector's length may differ from 1

MIGRATIONS = (
    (
        Table(
            "interactions",
            (
                persistent("by_owner", "owner", "created_at"),
                persistent("by_user", "user_key"),
                persistent("by_age", "tenant_key", "kind", "created_at"),
                persistent("by_fingerprint", "kind", "fingerprint"),
            ),
        ),
        Table("parts", (persistent("by_summary", "summary"),)),
    ),
)

KNOWN = "UNSET(v, '_id', '_rev', 'vector')"
MINE = "FOR v IN interactions FILTER v.owner == @owner"
STALE = "(v.vector == null || v.fingerprint != @fingerprint)"
ADD = "INSERT @row INTO interactions OPTIONS {waitForSync: true}"
RECENT = f" SORT v.created_at DESC, v._key LIMIT @limit RETURN {KNOWN}"
COMPARED = f"{MINE} && v.fingerprint == @fingerprint && v.vector != null"
NEAREST = f"""
    LET cosine = COSINE_SIMILARITY(v.vector, @vector)
    SORT cosine DESC, v._key LIMIT @limit RETURN [{KNOWN}, cosine]"""
COUNT_STALE = f"{MINE} && {STALE} COLLECT WITH COUNT INTO number RETURN number"
OLDEST_STALE = f"""
    FOR v IN interactions FILTER v.kind IN @kinds && {STALE}
    SORT v.created_at, v._key LIMIT @limit RETURN {KNOWN}"""
EMBED = """
    FOR one IN @vectors
    FOR v IN interactions FILTER v._key == one.key
    UPDATE v WITH {vector: one.vector, fingerprint: @fingerprint} IN interactions OPTIONS {waitForSync: true}"""
USAGE = """
    FOR v IN interactions FILTER v.kind IN @kinds
    COLLECT tenant_key = v.tenant_key AGGREGATE tenant = MIN(v.tenant), size = SUM(v.size)
    RETURN [tenant, size]"""
OLDEST = """
    FOR v IN interactions FILTER v.tenant_key == @tenant && v.kind == @kind
    SORT v.created_at, v._key LIMIT @limit
    RETURN [v._key, v.subject, v.user, v.kind, v.created_at, v.size]"""
LOAD = f"FOR v IN interactions FILTER v._key IN @ids && v.tenant_key == @tenant RETURN {KNOWN}"
OF_ID = """
    LET summaries = (FOR p IN parts FILTER p._key == @id RETURN p.summary)
    FOR v IN interactions FILTER v._key IN PUSH(summaries, @id) && v.tenant_key == @tenant
        && (@owner == null || v.owner == @owner)
    RETURN [v._key, v.kind]"""
OF_USER = """
    FOR v IN interactions FILTER v.user_key == @user && (@owner == null || v.owner == @owner) RETURN [v._key, v.kind]"""
REMOVE = """
    LET parts_of = (FOR p IN parts FILTER p.summary IN @ids REMOVE p IN parts RETURN 1)
    LET removed = (FOR key IN @ids REMOVE key IN interactions RETURN 1)
    RETURN LENGTH(parts_of) + LENGTH(removed)"""
ADD_SUMMARY = "INSERT @row INTO interactions"
ADD_PARTS = "FOR row IN @rows INSERT row INTO parts OPTIONS {overwriteMode: 'replace'}"
VECTORS = "FOR v IN interactions FILTER v.kind IN @kinds && v.vector != null RETURN [v._key, v.vector]"
LOST = """
    FOR p IN parts
    LET made = (FOR v IN interactions FILTER v._key == p.summary && v.kind == 'summary' RETURN 1)
    FILTER LENGTH(made) == 0 RETURN p._key"""


class ArangoInteractions(ArangoStore):
    """An InteractionStore in one database."""

    # ── keeping and recalling ───────────────────────────────────────────────────────────────────

    def add(self, interaction: Interaction, vector: Vector | None, fingerprint: str) -> None:
        self._database.aql(ADD, row=_row(interaction, vector, fingerprint))

    def recent(self, tenant: str, subject: str, condition: Filter | None, limit: int) -> list[Interaction]:
        values: dict[str, object] = {"owner": _owner(tenant, subject), "limit": limit}
        where = "" if condition is None else f" && ({condition_of(condition, values)})"
        return [_interaction(row) for row in self._database.aql(f"{MINE}{where}{RECENT}", **values)]

    def nearest(
        self, tenant: str, subject: str, condition: Filter | None, vector: Vector, fingerprint: str, limit: int
    ) -> list[tuple[Interaction, float]]:
        values: dict[str, object] = {"owner": _owner(tenant, subject), "limit": limit}
        values |= {"vector": vector.tolist(), "fingerprint": _fingerprint(fingerprint)}
        where = "" if condition is None else f" && ({condition_of(condition, values)})"
        rows = self._database.aql(f"{COMPARED}{where}{NEAREST}", **values)
        return [(_interaction(row), float(cosine)) for row, cosine in rows]

    # ── vectors of another embedder ─────────────────────────────────────────────────────────────

    def count_stale(self, tenant: str, subject: str, fingerprint: str) -> int:
        values = {"owner": _owner(tenant, subject), "fingerprint": _fingerprint(fingerprint)}
        return int(sum(self._database.aql(COUNT_STALE, **values)))

    def stale(self, fingerprint: str, limit: int) -> list[Interaction]:
        rows = self._database.aql(OLDEST_STALE, fingerprint=_fingerprint(fingerprint), limit=limit, kinds=KINDS)
        return [_interaction(row) for row in rows]

    def embed(self, vectors: Mapping[str, Vector], fingerprint: str) -> None:
        rows = [{"key": key, "vector": vector.tolist()} for key, vector in vectors.items()]
        self._database.aql(EMBED, vectors=rows, fingerprint=_fingerprint(fingerprint))

    # ── compaction ──────────────────────────────────────────────────────────────────────────────

    def usage(self) -> dict[str, int]:
        return dict(self._database.aql(USAGE, kinds=KINDS))

    def oldest(self, tenant: str, kind: InteractionKind, limit: int) -> list[MemoryEntry]:
        rows = self._database.aql(OLDEST, tenant=_tenant(tenant), kind=kind, limit=limit)
        return [MemoryEntry(*row) for row in rows]

    def load(self, tenant: str, interaction_ids: Sequence[str]) -> list[Interaction]:
        rows = self._database.aql(LOAD, ids=list(interaction_ids), tenant=_tenant(tenant))
        found = {row["_key"]: _interaction(row) for row in rows}
        return [found[key] for key in interaction_ids if key in found]

    def drop(self, tenant: str, interaction_ids: Sequence[str]) -> int:
        def move(transaction: Transaction) -> int:
            found = transaction.aql(LOAD, ids=list(interaction_ids), tenant=_tenant(tenant))
            transaction.aql(REMOVE, ids=[row["_key"] for row in found])
            pass_through("memory.inside_drop")
            return len(found)

        return self._write(move)

    def replace(
        self, tenant: str, interaction_ids: Sequence[str], summary: Interaction, vector: Vector | None, fingerprint: str
    ) -> bool:
        def move(transaction: Transaction) -> bool:
            found = transaction.aql(LOAD, ids=list(interaction_ids), tenant=_tenant(tenant))
            if len(found) != len(interaction_ids):
                return False
            ids = [row["_key"] for row in found]
            transaction.aql(REMOVE, ids=ids)
            transaction.aql(ADD_SUMMARY, row=_row(summary, vector, fingerprint))
            transaction.aql(ADD_PARTS, rows=[{"_key": key, "summary": summary.interaction_id} for key in ids])
            pass_through("memory.inside_replace")
            return True

        return self._write(move)

    # ── deletion ────────────────────────────────────────────────────────────────────────────────

    def delete(self, tenant: str, subject: str | None, interaction_id: str) -> Forgotten:
        def move(transaction: Transaction) -> Forgotten:
            values = {"id": interaction_id, "tenant": _tenant(tenant), "owner": _whose(tenant, subject)}
            return _remove(transaction, transaction.aql(OF_ID, **values))

        return self._write(move)

    def forget(self, tenant: str, subject: str | None, user: str) -> Forgotten:
        def move(transaction: Transaction) -> Forgotten:
            values = {"user": digest("user", tenant, user), "owner": _whose(tenant, subject)}
            return _remove(transaction, transaction.aql(OF_USER, **values))

        return self._write(move)

    def _write(self, move: Callable[[Transaction], T]) -> T:
        """In one transaction that nobody else who removes is in."""
        return self._database.write(move, exclusive=["interactions"], writes=["parts"])

    # ── checking ────────────────────────────────────────────────────────────────────────────────

    def damaged(self) -> list[str]:
        return sorted(self._wrong().union(self._database.aql(LOST)))

    def repair(self) -> None:
        rows = [{"key": key, "vector": None} for key in sorted(self._wrong())]
        self._database.aql(EMBED, vectors=rows, fingerprint=_fingerprint(""))

    def _wrong(self) -> set[str]:
        """Ids of those whose vector cannot be one."""
        vectors = self._database.aql(VECTORS, kinds=KINDS)
        return {key for key, vector in vectors if abs(sum(x * x for x in vector) ** 0.5 - 1) >= UNIT}


def _remove(transaction: Transaction, found: Sequence[tuple[str, str]]) -> Forgotten:
    transaction.aql(REMOVE, ids=[key for key, _ in found])
    summaries = sum(kind == "summary" for _, kind in found)
    return Forgotten(len(found) - summaries, summaries)


# ── records and values ──────────────────────────────────────────────────────────────────────────


def _tenant(tenant: str) -> str:
    return digest("tenant", tenant)


def _owner(tenant: str, subject: str) -> str:
    return digest("owner", tenant, subject)


def _whose(tenant: str, subject: str | None) -> str | None:
    return None if subject is None else _owner(tenant, subject)


def _fingerprint(fingerprint: str) -> str:
    return digest("fingerprint", fingerprint)


def _row(interaction: Interaction, vector: Vector | None, fingerprint: str) -> dict[str, Any]:
    own = {
        "user": interaction.user, "kind": interaction.kind, "model_used": interaction.model,
        "confidence": interaction.confidence, "gpu_utilization": interaction.gpu_utilization,
        "latency_ms": interaction.latency_ms, "timestamp": interaction.created_at,
    }  # fmt: skip
    return {
        "_key": interaction.interaction_id, "tenant": interaction.tenant, "subject": interaction.subject,
        "user": interaction.user, "query": interaction.query, "response": interaction.response,
        "created_at": interaction.created_at, "context": list(interaction.context),
        "confidence": interaction.confidence, "model": interaction.model,
        "gpu_utilization": interaction.gpu_utilization, "latency_ms": interaction.latency_ms,
        "metadata": json.dumps(dict(interaction.metadata)), "kind": interaction.kind, "size": interaction.size,
        "facts": facts_of({**interaction.metadata, **own}), "tenant_key": _tenant(interaction.tenant),
        "owner": _owner(interaction.tenant, interaction.subject),
        "user_key": digest("user", interaction.tenant, interaction.user),
        "vector": None if vector is None else vector.tolist(), "fingerprint": _fingerprint(fingerprint),
    }  # fmt: skip


def _interaction(row: Mapping[str, Any]) -> Interaction:
    return Interaction(
        interaction_id=row["_key"], tenant=row["tenant"], subject=row["subject"], user=row["user"],
        query=row["query"], response=row["response"], created_at=row["created_at"], context=tuple(row["context"]),
        confidence=row["confidence"], model=row["model"], gpu_utilization=row["gpu_utilization"],
        latency_ms=row["latency_ms"], metadata=json.loads(row["metadata"]), kind=row["kind"],
    )  # fmt: skip
