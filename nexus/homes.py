"""Which file lives where: every file has exactly one home, whatever crashes, and nothing is lost on the way.

A journal (SQLite) is believed about homes. What is done to the bytes is written down before it is begun, a batch of
files in one transaction:

    intend    on which tier a copy is being made
    copy      the bytes go under their name on that tier, whole, read back and equal to the checksum of the journal
    settle    they outlive a power cut
    switch    one transaction: the copy is the home (or a replica) now, and the former bytes are needless
    remove    needless bytes go, unless somebody wrote other bytes there meanwhile: those stay
    forget    nothing is left to do

Until the switch the former home counts, from then on the new one, and bytes are removed only after it. After a crash
`recover` goes on from what is written down: a copy that is whole is switched to, one that is not is discarded, needless
bytes are removed. It is done before any other work, by whoever gets the lock that a dead process lets go.

Deletion is a switch to no home at all; what was indexed goes after it, and is known until it is gone.
"""

import fcntl
import json
import logging
import mimetypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Literal, TypeVar, cast

from nexus.database import Database
from nexus.errors import ConfigError, Conflict, InvalidRequest, NexusError, NotFound, TooLarge, Unavailable
from nexus.failpoints import pass_through
from nexus.hades import document_id_of
from nexus.ingest import Ingestor
from nexus.policy import BATCH, MAX_RULES, Rule, check_metadata, check_rules, parse_rule, show_rule
from nexus.ports import Found, Indexer, Placement, PlacingTier, Role, Tier, Unusable
from nexus.types import FileOutcome, FileStatus, Principal, Receipt, StoredFile, Upload

DATABASE, LOCK_FILE = "homes.db", "homes.lock"
LOCK_SECONDS, LOCK_PAUSE_SECONDS = 10.0, 0.01
THREADS = 8
MAX_INDEXED_BYTES = 64 * 2**20
SOURCE = "files/"  # before a file's path, where it is indexed
SUBJECT = "nexus:policies"  # who indexes; no key can be called so

MIGRATIONS = (
    """
    CREATE TABLE files (
        tenant TEXT NOT NULL, path TEXT NOT NULL, tier TEXT NOT NULL, key TEXT NOT NULL, size INTEGER NOT NULL,
        checksum TEXT NOT NULL, modified_at REAL NOT NULL, used_at REAL NOT NULL, media_type TEXT NOT NULL,
        metadata TEXT NOT NULL DEFAULT '{}', PRIMARY KEY (tenant, path)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE tags (
        tenant TEXT NOT NULL, path TEXT NOT NULL, tag TEXT NOT NULL, PRIMARY KEY (tenant, path, tag)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE holds (
        tenant TEXT NOT NULL, path TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (tenant, path, name)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE replicas (
        tenant TEXT NOT NULL, path TEXT NOT NULL, tier TEXT NOT NULL, key TEXT NOT NULL,
        PRIMARY KEY (tenant, path, tier)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE indexed (
        tenant TEXT NOT NULL, path TEXT NOT NULL, collection TEXT NOT NULL, checksum TEXT NOT NULL,
        PRIMARY KEY (tenant, path, collection)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE placements (
        tenant TEXT NOT NULL, path TEXT NOT NULL, tier TEXT NOT NULL, role TEXT NOT NULL, reference TEXT NOT NULL,
        PRIMARY KEY (tenant, path, tier)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE intents (
        tenant TEXT NOT NULL, path TEXT NOT NULL, tier TEXT NOT NULL, step TEXT NOT NULL, role TEXT NOT NULL,
        key TEXT NOT NULL, PRIMARY KEY (tenant, path, tier)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE rules (
        tenant TEXT NOT NULL, name TEXT NOT NULL, rule TEXT NOT NULL, version INTEGER NOT NULL,
        changed_at REAL NOT NULL, changed_by TEXT NOT NULL, PRIMARY KEY (tenant, name)
    ) STRICT, WITHOUT ROWID
    """,
    # What is being put into the index or taken out of it has no checksum: so it is found among all that is indexed.
    """
    CREATE INDEX indexed_unsure ON indexed (tenant, path) WHERE checksum = '';
    UPDATE indexed SET checksum = '' WHERE NOT EXISTS
        (SELECT 1 FROM files AS f WHERE f.tenant = indexed.tenant AND f.path = indexed.path)
    """,
)

log = logging.getLogger("nexus.homes")

Given = TypeVar("Given")
Made = TypeVar("Made")
Key = tuple[str, str]  # tenant and path


@dataclass(frozen=True, slots=True)
class Scanned:
    """What a look at a tier found: how many files are new, changed or as they were; and what is not as it should be."""

    added: int
    changed: int
    unchanged: int
    missing: tuple[str, ...]  # paths whose home this tier is, and that are not there
    problems: tuple[Unusable, ...]


@dataclass(frozen=True, slots=True)
class HadesIndexer:
    """The index of this process."""

    ingestor: Ingestor

    def index(self, upload: Upload, principal: Principal) -> Receipt:
        return self.ingestor.ingest(upload, principal)

    def remove(self, document_id: str, principal: Principal) -> None:
        self.ingestor.hades.delete([document_id], principal)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A file's row: where its home is, and the key of the bytes there."""

    tenant: str
    path: str
    tier: str
    key: str
    size: int
    checksum: str
    modified_at: float


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy to be made of a file; `key` is that of the bytes once they are there."""

    of: _Kept
    tier: str
    role: Role
    key: str = ""


@dataclass(frozen=True, slots=True)
class _Needless:
    """Bytes to be removed, while their key is this one."""

    tenant: str
    path: str
    tier: str
    key: str


class Homes(Database):
    """The journal, and the hands that do what it says. One process works at a time; any may read."""

    def __init__(self, home: Path, tiers: Mapping[str, Tier], indexer: Indexer | None = None) -> None:
        """`tiers` by their names, in the order in which copies prefer them. Raises ConfigError where two are one."""
        home.mkdir(parents=True, exist_ok=True)
        super().__init__(home / DATABASE, "the list of files", ["journal_mode = WAL"])
        self._migrate(MIGRATIONS)
        self.tiers = dict(tiers)
        check_apart(self.tiers)
        self._indexer = indexer
        self._lock_file = home / LOCK_FILE
        self._at_work = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, "homes")

    def close(self) -> None:
        self._pool.shutdown()
        super().close()

    def check(self) -> None:
        with self._reading() as db:
            db.execute("SELECT 1 FROM files LIMIT 1").fetchone()

    # ── what is known ───────────────────────────────────────────────────────────────────────────

    def tenants(self) -> list[str]:
        """Those who have files or rules."""
        with self._reading() as db:
            rows = db.execute("SELECT tenant FROM files UNION SELECT tenant FROM rules ORDER BY tenant")
            return [tenant for (tenant,) in rows]

    def files(self, tenant: str) -> list[StoredFile]:
        """All files of a tenant, by path."""
        with self._reading() as db:
            return _load(db, tenant)

    def file(self, tenant: str, path: str) -> StoredFile:
        """Raises NotFound."""
        with self._reading() as db:
            found = _load(db, tenant, path)
        if not found:
            raise NotFound(f"no file {path!a} is known; have its tier looked at first")
        return found[0]

    def describe(
        self, tenant: str, path: str, metadata: Mapping[str, object], used_at: float | None = None
    ) -> StoredFile:
        """Say what is known of a file besides, such as its robot, in place of what was said. Raises NotFound."""
        said = json.dumps(check_metadata(metadata, "/metadata"))
        with self._transaction() as db:
            db.execute(
                "UPDATE files SET metadata = ?, used_at = max(used_at, ?) WHERE tenant = ? AND path = ?",
                (said, used_at or 0.0, tenant, path),
            )
        return self.file(tenant, path)

    def release(self, tenant: str, path: str, name: str) -> None:
        """Lift a hold. Raises NotFound. A rule that still wants it puts it back."""
        with self._transaction() as db:
            lifted = db.execute(
                "DELETE FROM holds WHERE tenant = ? AND path = ? AND name = ?", (tenant, path, name)
            ).rowcount
        if not lifted:
            raise NotFound(f"file {path!a} has no hold {name!r}")

    # ── rules ───────────────────────────────────────────────────────────────────────────────────

    def rules(self, tenant: str) -> list[Rule]:
        with self._reading() as db:
            rows = db.execute("SELECT rule FROM rules WHERE tenant = ? ORDER BY name", (tenant,)).fetchall()
        return [parse_rule(json.loads(rule)) for (rule,) in rows]

    def rule(self, tenant: str, name: str) -> Rule:
        """Raises NotFound."""
        with self._reading() as db:
            row = db.execute("SELECT rule FROM rules WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
        if row is None:
            raise NotFound(f"there is no policy {name!r}")
        return parse_rule(json.loads(row[0]))

    def put_rule(self, tenant: str, rule: Rule, by: str) -> int:
        """Make or replace a rule; returns its version, from 1. Raises InvalidRequest for a tier that there is not."""
        check_rules([rule], list(self.tiers))
        with self._transaction() as db:
            (others,) = db.execute(
                "SELECT count(*) FROM rules WHERE tenant = ? AND name <> ?", (tenant, rule.name)
            ).fetchone()
            if others >= MAX_RULES:
                raise InvalidRequest(f"there are {MAX_RULES} policies already; remove one first")
            (version,) = db.execute(
                "INSERT INTO rules VALUES (?, ?, ?, 1, ?, ?) ON CONFLICT DO UPDATE SET rule = excluded.rule,"
                " version = version + 1, changed_at = excluded.changed_at, changed_by = excluded.changed_by"
                " RETURNING version",
                (tenant, rule.name, json.dumps(show_rule(rule)), time.time(), by),
            ).fetchone()
        return int(version)

    def drop_rule(self, tenant: str, name: str) -> None:
        """Raises NotFound. What the rule did stays done, and its holds stay."""
        with self._transaction() as db:
            dropped = db.execute("DELETE FROM rules WHERE tenant = ? AND name = ?", (tenant, name)).rowcount
        if not dropped:
            raise NotFound(f"there is no policy {name!r}")

    # ── hands ───────────────────────────────────────────────────────────────────────────────────

    def move(self, files: Sequence[StoredFile], target: str) -> list[FileOutcome]:
        tier = self.tiers.get(target)
        if tier is not None and _places(tier):
            return self._work("move", files, target, lambda batch: self._place(batch, target, "home"))
        return self._work("move", files, target, lambda batch: self._move(batch, target))

    def replicate(self, files: Sequence[StoredFile], targets: frozenset[str]) -> list[FileOutcome]:
        return self._work("replicate", files, ", ".join(sorted(targets)), lambda batch: self._replicate(batch, targets))

    def index(self, files: Sequence[StoredFile], collection: str, readers: frozenset[str] | None) -> list[FileOutcome]:
        described = {(file.tenant, file.path): file for file in files}
        return self._work("index", files, collection, lambda batch: self._index(batch, described, collection, readers))

    def delete(self, files: Sequence[StoredFile]) -> list[FileOutcome]:
        return self._work("delete", files, "", self._delete)

    def tag(self, files: Sequence[StoredFile], add: frozenset[str], remove: frozenset[str]) -> list[FileOutcome]:
        def write(db: Connection, batch: Iterable[Key]) -> None:
            db.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?, ?)", [(*key, tag) for key in batch for tag in add])
            db.executemany(
                "DELETE FROM tags WHERE tenant = ? AND path = ? AND tag = ?",
                [(*key, tag) for key in batch for tag in remove],
            )

        shown = " ".join([f"+{tag}" for tag in sorted(add)] + [f"-{tag}" for tag in sorted(remove)])
        return self._work("tag", files, shown, lambda batch: self._note(batch, write))

    def hold(self, files: Sequence[StoredFile], name: str) -> list[FileOutcome]:
        def write(db: Connection, batch: Iterable[Key]) -> None:
            db.executemany("INSERT OR IGNORE INTO holds VALUES (?, ?, ?)", [(*key, name) for key in batch])

        return self._work("hold", files, name, lambda batch: self._note(batch, write))

    def _note(
        self, batch: Mapping[Key, _Kept], write: Callable[[Connection, Iterable[Key]], None]
    ) -> dict[Key, "_Fate"]:
        with self._transaction() as db:
            write(db, batch)
        return dict.fromkeys(batch, None)

    def _work(
        self, action: str, files: Sequence[StoredFile], target: str,
        do: Callable[[dict[Key, _Kept]], Mapping[Key, "_Fate"]],
    ) -> list[FileOutcome]:  # fmt: skip
        """Do something to files batch by batch; `do` gets the rows of those that are as they were when planned."""
        outcomes = []
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            with self._working():
                rows, fates = self._rows(batch)
                fates.update(do(rows))
            for file in batch:
                outcomes.append(_outcome(action, file, target, fates[file.tenant, file.path]))
        return outcomes

    def _rows(self, files: Sequence[StoredFile]) -> tuple[dict[Key, _Kept], dict[Key, "_Fate"]]:
        """The files' rows, and why some files cannot be worked on."""
        rows: dict[Key, _Kept] = {}
        fates: dict[Key, _Fate] = {}
        with self._reading() as db:
            for file in files:
                key = file.tenant, file.path
                kept = _kept(db, *key)
                if kept is None:
                    fates[key] = NotFound("the file is not known, or not any more")
                elif file.checksum and kept.checksum != file.checksum:
                    fates[key] = Conflict("the file has changed since this was planned; plan again")
                elif waits := db.execute("SELECT tier FROM intents WHERE tenant = ? AND path = ?", key).fetchone():
                    fates[key] = Conflict(f"what was begun with this file waits for tier {waits[0]!r}")
                else:
                    rows[key] = kept
        return rows, fates

    # ── copying ─────────────────────────────────────────────────────────────────────────────────

    def _move(self, batch: Mapping[Key, _Kept], target: str) -> dict[Key, "_Fate"]:
        fates = self._call_back(batch)
        return fates | self._copy(
            {
                key: [_Copy(kept, target, "home")] if kept.tier != target else []
                for key, kept in batch.items()
                if key not in fates
            }
        )

    def _copy(self, wanted: Mapping[Key, Sequence[_Copy]]) -> dict[Key, "_Fate"]:
        """Make copies, and what they are for of them; a file that fails keeps what it has."""
        fates: dict[Key, _Fate] = dict.fromkeys(wanted, None)
        copies = [copy for some in wanted.values() for copy in some]
        if not copies:
            return fates
        pass_through("homes.before_intend")
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO intents VALUES (?, ?, ?, 'copy', ?, '')",
                [(copy.of.tenant, copy.of.path, copy.tier, copy.role) for copy in copies],
            )
        pass_through("homes.after_intend")
        made, failed = list[_Copy](), list[_Copy]()
        for copy, result in zip(copies, self._each(self._copy_one, copies), strict=True):
            if isinstance(result, NexusError):
                fates[copy.of.tenant, copy.of.path] = result
                failed.append(copy)
            else:
                made.append(result)
        self._forget((copy.of.tenant, copy.of.path, copy.tier) for copy in failed)
        try:
            self._finish(made)
        except NexusError as error:  # a tier went away just now; what is written down is gone on with later
            fates.update({(copy.of.tenant, copy.of.path): error for copy in made})
        return fates

    def _copy_one(self, copy: _Copy) -> _Copy:
        """Copy, verify, and see that the original has not changed meanwhile. Leaves nothing behind where it fails."""
        pass_through("homes.before_copy")
        of, source, target = copy.of, self._tier(copy.of.tier), self._tier(copy.tier)
        found = source.find(of.tenant, of.path)
        if found is None:
            raise NotFound(f"the file is gone from tier {of.tier!r}")
        if found.key != of.key:
            raise Conflict(f"the file was changed on tier {of.tier!r}; have that looked at, and plan again")
        try:
            there = target.write(
                of.tenant, of.path, _verified(source.read(of.tenant, of.path), of.checksum), of.modified_at
            )
        except NexusError:
            target.discard(of.tenant, of.path)
            raise
        if there.key == found.key:
            raise Conflict(f"tiers {of.tier!r} and {copy.tier!r} are the same place")
        again = source.find(of.tenant, of.path)
        if again is None or again.key != of.key:
            target.remove(of.tenant, of.path, there.key)
            raise Conflict(f"the file was changed on tier {of.tier!r} while it was copied; plan again")
        pass_through("homes.after_copy")
        return replace(copy, key=there.key)

    def _finish(self, made: Sequence[_Copy]) -> None:
        """Copies that are whole become homes and replicas, and what they make needless goes."""
        if not made:
            return
        pass_through("homes.before_settle")
        for tier, tenant in sorted({(copy.tier, copy.of.tenant) for copy in made}):
            self._tier(tier).settle(tenant)
        pass_through("homes.after_settle")
        needless = [
            _Needless(copy.of.tenant, copy.of.path, copy.of.tier, copy.of.key) for copy in made if copy.role == "home"
        ]
        pass_through("homes.before_switch")
        with self._transaction() as db:
            for copy in made:
                _switch(db, copy)
            _intend_removal(db, needless)
        pass_through("homes.after_switch")
        self._remove(needless)

    def _remove(self, needless: Sequence[_Needless]) -> None:
        """Remove bytes that are written down as needless. What cannot be reached stays written down."""
        if not needless:
            return
        pass_through("homes.before_remove")
        results = self._each(self._remove_one, needless)
        gone = [one for one, result in zip(needless, results, strict=True) if not isinstance(result, NexusError)]
        for tier, tenant in sorted({(one.tier, one.tenant) for one in gone}):
            self._tier(tier).settle(tenant)
        pass_through("homes.after_remove")
        self._forget((one.tenant, one.path, one.tier) for one in gone)

    def _remove_one(self, one: _Needless) -> bool:
        return self._tier(one.tier).remove(one.tenant, one.path, one.key)

    def _forget(self, intents: Iterable[tuple[str, str, str]]) -> None:
        rows = list(intents)
        if not rows:
            return
        pass_through("homes.before_forget")
        with self._transaction(durable=False) as db:  # what is still written down is found to be done already
            db.executemany("DELETE FROM intents WHERE tenant = ? AND path = ? AND tier = ?", rows)
        pass_through("homes.after_forget")

    def _replicate(self, batch: Mapping[Key, _Kept], targets: frozenset[str]) -> dict[Key, "_Fate"]:
        with self._reading() as db:
            there = {
                key: dict(db.execute("SELECT tier, key FROM replicas WHERE tenant = ? AND path = ?", key).fetchall())
                for key in batch
            }
        missing = {key: sorted(targets - {kept.tier} - set(there[key])) for key, kept in batch.items()}
        fates = self._copy(
            {
                key: [_Copy(kept, tier, "replica") for tier in missing[key] if not self._is_placing(tier)]
                for key, kept in batch.items()
            }
        )
        for tier in sorted({tier for some in missing.values() for tier in some if self._is_placing(tier)}):
            asked = {key: batch[key] for key, some in missing.items() if tier in some and fates[key] is None}
            fates.update(self._place(asked, tier, "replica"))
        needless = [
            _Needless(*key, tier, found)
            for key, fate in fates.items()
            if not isinstance(fate, NexusError)
            for tier, found in there[key].items()
            if tier not in targets
        ]
        fates.update(self._drop_replicas(needless))
        return fates

    def _drop_replicas(self, needless: Sequence[_Needless]) -> dict[Key, "_Fate"]:
        """Replicas go; those that a placing tier keeps, which have no key, are not asked for any more."""
        fates: dict[Key, _Fate] = {}
        for one in needless:
            if not one.key:
                fates[one.tenant, one.path] = self._withdraw(one.tier, one.tenant, one.path, "replica")
        going = [one for one in needless if fates.get((one.tenant, one.path)) is None]
        if not going:
            return fates
        ours = [one for one in going if one.key]
        with self._transaction() as db:
            for table in ("replicas", "placements"):
                db.executemany(
                    f"DELETE FROM {table} WHERE tenant = ? AND path = ? AND tier = ?",
                    [(one.tenant, one.path, one.tier) for one in going],
                )
            _intend_removal(db, ours)
        self._remove(ours)
        return fates

    def _withdraw(self, tier: str, tenant: str, path: str, role: Role) -> "_Fate":
        with self._reading() as db:
            files = _load(db, tenant, path)
        try:
            cast(PlacingTier, self._tier(tier)).withdraw(files, role)
        except NexusError as error:
            return error
        return None

    # ── tiers that place files by themselves ────────────────────────────────────────────────────

    def _place(self, batch: Mapping[Key, _Kept], target: str, role: Role) -> dict[Key, "_Fate"]:
        fates: dict[Key, _Fate] = dict.fromkeys(batch, None)
        with self._reading() as db:
            asked = [file for key in batch for file in _load(db, *key) if role == "replica" or file.home != target]
        if not asked:
            return fates
        try:
            placements = cast(PlacingTier, self._tier(target)).place(asked, role)
        except NexusError as error:
            return {**fates, **{(file.tenant, file.path): error for file in asked}}
        for file, placement in zip(asked, placements, strict=True):
            if placement.state == "failed":
                fates[file.tenant, file.path] = Unavailable(placement.reason or "the tier would not take it")
                continue
            if placement.state == "requested":
                fates[file.tenant, file.path] = "requested"
            if role == "home" and self._is_placing(file.home):  # or the two would pull at it for ever
                fates[file.tenant, file.path] = self._withdraw(file.home, file.tenant, file.path, "home") or fates.get(
                    (file.tenant, file.path)
                )
        self._note_placements([replace(placement, tier=target) for placement in placements])
        return fates

    def _call_back(self, keys: Iterable[Key]) -> dict[Key, "_Fate"]:
        """Ask no placing tier any more for the homes of these files; returns those where that failed."""
        with self._reading() as db:
            asked = [
                (*key, tier)
                for key in keys
                for (tier,) in db.execute(
                    "SELECT tier FROM placements WHERE tenant = ? AND path = ? AND role = 'home'", key
                ).fetchall()
            ]
        results = {(tenant, path): self._withdraw(tier, tenant, path, "home") for tenant, path, tier in asked}
        with self._transaction() as db:
            db.executemany(
                "DELETE FROM placements WHERE tenant = ? AND path = ? AND role = 'home'",
                [key for key, fate in results.items() if fate is None],
            )
        return {key: fate for key, fate in results.items() if fate is not None}

    def poll(self) -> list[FileOutcome]:
        """What tiers that place files by themselves have done since, or failed to do."""
        with self._working():
            with self._reading() as db:
                rows = db.execute("SELECT tenant, path, tier, role, reference FROM placements").fetchall()
                sources = {row[:2]: kept.tier for row in rows if (kept := _kept(db, *row[:2])) is not None}
            ended = []
            for tier in sorted({row[2] for row in rows} & set(self.tiers)):
                waiting = [
                    Placement(of, path, on, role, "requested", reference)
                    for of, path, on, role, reference in rows
                    if on == tier
                ]
                try:
                    looked = cast(PlacingTier, self.tiers[tier]).look(waiting)
                except NexusError as error:  # the others may be there
                    log.warning("tier %s cannot be asked how far it is: %s", tier, error)
                    continue
                ended += [replace(placement, tier=tier) for placement in looked if placement.state != "requested"]
            self._note_placements(ended)
        return [
            FileOutcome(
                "move" if one.role == "home" else "replicate", one.tenant, one.path,
                "success" if one.state == "aligned" else "failed", sources.get((one.tenant, one.path), ""), one.tier,
                one.reason,
            )
            for one in ended
        ]  # fmt: skip

    def _note_placements(self, placements: Sequence[Placement]) -> None:
        keys = {one: found.key for one in placements if one.state == "aligned" and (found := self._find(one))}
        with self._transaction() as db:
            for one in placements:
                of = (one.tenant, one.path, one.tier)
                if one.role == "home":  # another home that was asked for is not wanted any more
                    db.execute("DELETE FROM placements WHERE tenant = ? AND path = ? AND role = 'home'", of[:2])
                else:
                    db.execute("DELETE FROM placements WHERE tenant = ? AND path = ? AND tier = ?", of)
                if one.state == "requested":
                    db.execute("INSERT INTO placements VALUES (?, ?, ?, ?, ?)", (*of, one.role, one.reference))
                if one.role == "replica" and one.state == "failed":
                    db.execute("DELETE FROM replicas WHERE tenant = ? AND path = ? AND tier = ?", of)
                elif one.role == "replica":
                    db.execute("INSERT OR REPLACE INTO replicas VALUES (?, ?, ?, '')", of)
                elif one.state == "aligned":
                    db.execute(
                        "UPDATE files SET tier = ?, key = coalesce(?, key) WHERE tenant = ? AND path = ?",
                        (one.tier, keys.get(one), one.tenant, one.path),
                    )
                    db.execute("DELETE FROM replicas WHERE tenant = ? AND path = ? AND tier = ?", of)

    def _find(self, placement: Placement) -> Found | None:
        return self._tier(placement.tier).find(placement.tenant, placement.path)

    # ── deleting and indexing ───────────────────────────────────────────────────────────────────

    def _delete(self, batch: Mapping[Key, _Kept]) -> dict[Key, "_Fate"]:
        fates: dict[Key, _Fate] = {}
        unchanged = self._each(self._check_unchanged, list(batch.values()))
        pass_through("homes.before_switch")
        needless = list[_Needless]()
        with self._transaction() as db:
            for (key, kept), result in zip(batch.items(), unchanged, strict=True):
                holds = [name for (name,) in db.execute("SELECT name FROM holds WHERE tenant = ? AND path = ?", key)]
                if isinstance(result, NexusError) or holds:
                    fates[key] = result if isinstance(result, NexusError) else _held(holds)
                    continue
                fates[key] = None
                copies = db.execute("SELECT tier, key FROM replicas WHERE tenant = ? AND path = ?", key).fetchall()
                needless += [_Needless(*key, *copy) for copy in [(kept.tier, kept.key), *copies] if copy[1]]
                for table in ("files", "tags", "replicas", "placements"):
                    db.execute(f"DELETE FROM {table} WHERE tenant = ? AND path = ?", key)
                db.execute("UPDATE indexed SET checksum = '' WHERE tenant = ? AND path = ?", key)
            _intend_removal(db, needless)
        pass_through("homes.after_switch")
        self._remove(needless)
        self._unindex()
        return fates

    def _check_unchanged(self, kept: _Kept) -> None:
        found = self._tier(kept.tier).find(kept.tenant, kept.path)
        if found is not None and found.key != kept.key:
            raise Conflict(f"the file was changed on tier {kept.tier!r}; have that looked at, and plan again")

    def _unindex(self) -> None:
        """Take out of the index what was indexed of files that there are no more."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT tenant, path, collection FROM indexed AS i INDEXED BY indexed_unsure WHERE checksum = ''"
                " AND NOT EXISTS (SELECT 1 FROM files AS f WHERE f.tenant = i.tenant AND f.path = i.path)"
            ).fetchall()
        if not rows or self._indexer is None:
            return
        gone = []
        for tenant, path, collection in rows:
            try:
                self._indexer.remove(document_id_of(tenant, collection, SOURCE + path), _principal(tenant))
            except NotFound:
                pass  # it was never published, or is gone already
            except NexusError as error:  # it stays written down
                log.warning("what was indexed of a deleted file cannot be removed yet: %s", error)
                continue
            gone.append((tenant, path, collection))
        with self._transaction() as db:
            db.executemany("DELETE FROM indexed WHERE tenant = ? AND path = ? AND collection = ?", gone)

    def _index(
        self, batch: Mapping[Key, _Kept], described: Mapping[Key, StoredFile], collection: str,
        readers: frozenset[str] | None,
    ) -> dict[Key, "_Fate"]:  # fmt: skip
        indexer = self._indexer
        if indexer is None:
            return dict.fromkeys(batch, Unavailable("there is no index here"))
        with self._transaction() as db:  # before it is indexed, so that whatever is, is known
            db.executemany(
                "INSERT INTO indexed VALUES (?, ?, ?, '') ON CONFLICT DO UPDATE SET checksum = ''",
                [(*key, collection) for key in batch],
            )

        def index_one(kept: _Kept) -> None:
            if kept.size > MAX_INDEXED_BYTES:
                raise TooLarge(f"a file to be indexed has at most {MAX_INDEXED_BYTES} bytes")
            content = b"".join(_verified(self._tier(kept.tier).read(kept.tenant, kept.path), kept.checksum))
            upload = Upload(
                SOURCE + kept.path, content, collection, metadata=described[kept.tenant, kept.path].metadata,
                readers=None if readers is None else readers | {SUBJECT},
            )  # fmt: skip
            indexer.index(upload, _principal(kept.tenant))

        results = self._each(index_one, list(batch.values()))
        fates: dict[Key, _Fate] = {
            key: result if isinstance(result, NexusError) else None for key, result in zip(batch, results, strict=True)
        }
        with self._transaction() as db:
            db.executemany(
                "UPDATE indexed SET checksum = ? WHERE tenant = ? AND path = ? AND collection = ?",
                [(batch[key].checksum, *key, collection) for key, fate in fates.items() if fate is None],
            )
        return fates

    # ── looking at tiers ────────────────────────────────────────────────────────────────────────

    def scan(self, tenant: str, tier: str) -> Scanned:
        """Enter what a tenant has on a tier. Raises Unavailable, and InvalidRequest for no such tier.

        A file that is gone from its home is told, and stays known: its disk may be away. So is one that is somewhere
        else than where it lives.
        """
        place = self._tier(tier)
        with self._working():
            known, copies, busy = self._known(tenant, tier)
            problems, new, used, seen = list[Unusable](), list[Found](), list[tuple[float, str]](), set[str]()
            for found in place.walk(tenant):
                if isinstance(found, Unusable):
                    problems.append(found)
                    continue
                seen.add(found.path)
                at, key, used_at = known.get(found.path, (tier, "", 0.0))
                if found.path in busy or copies.get(found.path) == found.key or (at != tier and key == found.key):
                    continue
                if at != tier:
                    copy = found.path in copies
                    why = f"the copy here of what lives on {at!r} was changed" if copy else f"it lives on {at!r}"
                    problems.append(Unusable(found.path, why))
                elif key != found.key:
                    new.append(found)
                elif found.used_at > used_at:
                    used.append((found.used_at, found.path))
            added = sum(found.path not in known for found in new)
            failed = self._enter(tenant, tier, new, used)
            mine = {path for path, (at, _, _) in known.items() if at == tier}
        return Scanned(
            added, len(new) - added, len(mine & seen) - (len(new) - added), tuple(sorted(mine - seen - busy)),
            (*problems, *failed),
        )  # fmt: skip

    def _known(self, tenant: str, tier: str) -> tuple[dict[str, tuple[str, str, float]], dict[str, str], set[str]]:
        """By path: home, key and last use; the keys of the copies on a tier; and what is being worked on."""
        with self._reading() as db:
            files = db.execute("SELECT path, tier, key, used_at FROM files WHERE tenant = ?", (tenant,)).fetchall()
            copies = db.execute("SELECT path, key FROM replicas WHERE tenant = ? AND tier = ?", (tenant, tier))
            busy = db.execute("SELECT path FROM intents WHERE tenant = ?", (tenant,)).fetchall()
            return {row[0]: row[1:] for row in files}, dict(copies.fetchall()), {path for (path,) in busy}

    def _enter(self, tenant: str, tier: str, new: Sequence[Found], used: Sequence[tuple[float, str]]) -> list[Unusable]:
        """Write down files with their checksums; copies of what they were before go. Returns what cannot be read."""
        failed = []
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            sums = self._each(lambda found: _digest(self._tier(tier).read(tenant, found.path)), batch)
            needless = list[_Needless]()
            with self._transaction() as db:
                for found, checksum in zip(batch, sums, strict=True):
                    if isinstance(checksum, NexusError):
                        failed.append(Unusable(found.path, checksum.message))
                        continue
                    before = _kept(db, tenant, found.path)
                    db.execute(
                        "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, '{}') ON CONFLICT DO UPDATE SET"
                        " key = excluded.key, size = excluded.size, checksum = excluded.checksum,"
                        " modified_at = excluded.modified_at, used_at = max(used_at, excluded.used_at)",
                        (
                            tenant, found.path, tier, found.key, found.size, checksum, found.modified_at, found.used_at,
                            mimetypes.guess_type(found.path)[0] or "",
                        ),
                    )  # fmt: skip
                    if before is not None and before.checksum != checksum:
                        needless += _outdated(db, tenant, found.path)
            self._remove(needless)
        with self._transaction(durable=False) as db:
            db.executemany(
                "UPDATE files SET used_at = ? WHERE path = ? AND tenant = ?", [(*one, tenant) for one in used]
            )
        return failed

    def forget(self, tenant: str, path: str) -> StoredFile | None:
        """Give up the home of a file that is gone from there: a copy elsewhere is its home then, and is returned.

        Where there is none, nothing is known of the file any more. Raises NotFound, and Conflict where the file is
        there, held, or its copy is not whole.
        """
        with self._working():
            file = self.file(tenant, path)
            kept, fates = self._rows([file])
            if fate := fates.get((tenant, path)):
                raise cast(NexusError, fate)
            if self._tier(file.tier).find(tenant, path) is not None:
                raise Conflict(f"file {path!a} is on tier {file.tier!r}; delete it by a policy, or there")
            copies = sorted(tier for tier in file.replicas if not self._is_placing(tier))
            if copies:
                return self._promote(file, copies[0])
            if file.holds:
                raise _held(sorted(file.holds))
            self._delete({(tenant, path): replace(kept[tenant, path], key="")})
            return None

    def _promote(self, file: StoredFile, tier: str) -> StoredFile:
        of = (file.tenant, file.path)
        found = self._tier(tier).find(*of)
        if found is None or _digest(self._tier(tier).read(*of)) != file.checksum:
            raise Conflict(f"the copy of {file.path!a} on tier {tier!r} is not whole")
        with self._transaction() as db:
            db.execute("UPDATE files SET tier = ?, key = ? WHERE tenant = ? AND path = ?", (tier, found.key, *of))
            db.execute("DELETE FROM replicas WHERE tenant = ? AND path = ? AND tier = ?", (*of, tier))
        return self.file(*of)

    def faults(self, tenant: str) -> list[str]:
        """Read every file wherever it is: what is not as it is written down, a line each."""
        with self._working():
            files = self.files(tenant)
            return [line for lines in self._each(self._faults_of, files) for line in _lines(lines)]

    def _faults_of(self, file: StoredFile) -> list[str]:
        wrong = []
        for name, tier in self.tiers.items():
            path, is_copy = f"{file.path!a} on {name!r}", name in file.replicas and not self._is_placing(name)
            found = tier.find(file.tenant, file.path)
            if found is None and (name == file.tier or is_copy):
                wrong.append(f"{path}: it is not there")
            elif found is not None and (name == file.tier or is_copy):
                if _digest(tier.read(file.tenant, file.path)) != file.checksum:
                    wrong.append(f"{path}: its bytes are others")
            elif found is not None and not self._is_placing(name) and not self._is_placing(file.tier):
                wrong.append(f"{path}: it lives on {file.tier!r}")
        return wrong

    # ── one at a time, and after a crash ────────────────────────────────────────────────────────

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Alone at work, and nothing is left of whoever died at it. Raises Unavailable."""
        if not self._at_work.acquire(timeout=LOCK_SECONDS):
            raise Unavailable("files are being worked on; come again")
        try:
            lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _lock(lock)
                self._recover()
                yield
            finally:
                os.close(lock)
        finally:
            self._at_work.release()

    def recover(self) -> int:
        """Go on from where a process died. Returns how many intents are still left, as a tier is away."""
        with self._working(), self._reading() as db:
            (left,) = db.execute("SELECT count(*) FROM intents").fetchone()
            return int(left)

    def _recover(self) -> None:
        with self._reading() as db:
            intents = db.execute("SELECT tenant, path, tier, step, role, key FROM intents").fetchall()
            reachable = [row for row in intents if row[2] in self.tiers]
            copying = [(row, _kept(db, *row[:2])) for row in reachable if row[3] == "copy"]
        copies = [_Copy(kept, row[2], row[4]) for row, kept in copying if kept is not None]
        for start in range(0, len(copies), BATCH):
            batch = copies[start : start + BATCH]
            results = list(zip(batch, self._each(self._take_up, batch), strict=True))
            self._forget((copy.of.tenant, copy.of.path, copy.tier) for copy, result in results if result is None)
            try:
                self._finish([result for _, result in results if isinstance(result, _Copy)])
            except NexusError as error:  # a tier went away just now; other files need not wait for it
                log.warning("what was begun with files cannot be gone on with yet: %s", error)
        self._remove(
            [_Needless(tenant, path, tier, key) for tenant, path, tier, step, _, key in reachable if step == "remove"]
        )
        self._unindex()

    def _take_up(self, copy: _Copy) -> _Copy | None:
        """A copy that was being made, if it is whole and what it was made of is as it was; else None."""
        of, source, target = copy.of, self._tier(copy.of.tier), self._tier(copy.tier)
        target.discard(of.tenant, of.path)
        there, original = target.find(of.tenant, of.path), source.find(of.tenant, of.path)
        if there is None or (original is not None and there.key == original.key):
            return None
        if _digest(target.read(of.tenant, of.path)) != of.checksum:
            return None  # somebody else's: ours has this name only once it is whole
        if original is None or original.key != of.key:
            return None
        return replace(copy, key=there.key)

    def _tier(self, name: str) -> Tier:
        """Raises InvalidRequest where there is none of this name."""
        found = self.tiers.get(name)
        if found is None:
            raise InvalidRequest(f"there is no tier {name!r}; there are {', '.join(self.tiers) or 'none'}")
        return found

    def _is_placing(self, name: str) -> bool:
        return _places(self.tiers.get(name))

    def _each(self, do: Callable[[Given], Made], things: Sequence[Given]) -> list[Made | NexusError]:
        """Do something with each of several things, several at a time; what Nexus raises is the result of that one."""

        def attempt(thing: Given) -> Made | NexusError:
            try:
                return do(thing)
            except NexusError as error:
                return error

        return list(self._pool.map(attempt, things))


_Fate = NexusError | Literal["requested"] | None  # None: done


def _outcome(action: str, file: StoredFile, target: str, fate: _Fate) -> FileOutcome:
    status: FileStatus = "failed" if isinstance(fate, NexusError) else fate or "success"
    reason, code = (fate.message, fate.code) if isinstance(fate, NexusError) else ("", "")
    return FileOutcome(action, file.tenant, file.path, status, file.tier, target, reason, code)


def _lines(found: list[str] | NexusError) -> list[str]:
    return [found.message] if isinstance(found, NexusError) else found


def _held(holds: Sequence[str]) -> Conflict:
    return Conflict(f"held: {', '.join(sorted(holds))}", code="held")


def _principal(tenant: str) -> Principal:
    return Principal(tenant, SUBJECT, frozenset({"documents:read", "documents:write"}))


def _places(tier: Tier | None) -> bool:
    return hasattr(tier, "place")


def check_apart(tiers: Mapping[str, Tier]) -> None:
    """Raises ConfigError where one tier lies within another: a move between them would delete what it moved."""
    plain = {name: _place_of(tier.address) for name, tier in tiers.items() if not _places(tier)}
    for name, address in plain.items():
        for other, within in plain.items():
            if name != other and within.startswith(address):
                raise ConfigError(f"tier {other!r} lies within tier {name!r}; each needs a place of its own")


def _place_of(address: str) -> str:
    """The same for all ways of writing one folder of this machine."""
    protocol, _, rest = address.partition(":")
    if protocol not in ("file", "local"):
        return address.rstrip("/") + "/"
    return "file:" + os.path.normpath("/" + rest.lstrip("/")).rstrip("/") + "/"


def _lock(file: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Unavailable("another process works on the files; come again") from None
            time.sleep(LOCK_PAUSE_SECONDS)


def _digest(chunks: Iterable[bytes]) -> str:
    state = blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def _verified(chunks: Iterable[bytes], checksum: str) -> Iterator[bytes]:
    """The same chunks. Raises Conflict at their end when they are not what the checksum says."""
    state = blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
        yield chunk
    if state.hexdigest() != checksum:
        raise Conflict("the file's bytes are not those that were written down; look after its tier, and scan again")


def _kept(db: Connection, tenant: str, path: str) -> _Kept | None:
    row = db.execute(
        "SELECT tenant, path, tier, key, size, checksum, modified_at FROM files WHERE tenant = ? AND path = ?",
        (tenant, path),
    ).fetchone()
    return None if row is None else _Kept(*row)


def _switch(db: Connection, copy: _Copy) -> None:
    """From here on the copy is what it was made for. A home that was asked for elsewhere is not wanted any more."""
    of = (copy.of.tenant, copy.of.path)
    db.execute("DELETE FROM intents WHERE tenant = ? AND path = ? AND tier = ?", (*of, copy.tier))
    if copy.role == "replica":
        db.execute("INSERT OR REPLACE INTO replicas VALUES (?, ?, ?, ?)", (*of, copy.tier, copy.key))
        return
    db.execute("UPDATE files SET tier = ?, key = ? WHERE tenant = ? AND path = ?", (copy.tier, copy.key, *of))
    db.execute("DELETE FROM replicas WHERE tenant = ? AND path = ? AND tier = ?", (*of, copy.tier))
    db.execute("DELETE FROM placements WHERE tenant = ? AND path = ? AND role = 'home'", of)


def _intend_removal(db: Connection, needless: Iterable[_Needless]) -> None:
    db.executemany(
        "INSERT INTO intents VALUES (?, ?, ?, 'remove', '', ?)",
        [(one.tenant, one.path, one.tier, one.key) for one in needless],
    )


def _outdated(db: Connection, tenant: str, path: str) -> list[_Needless]:
    """The copies of what a file was before: they are no copies any more, and go; of one that is held they stay."""
    rows = db.execute(
        "SELECT tier, key FROM replicas r WHERE tenant = ? AND path = ? AND key <> ''"
        " AND NOT EXISTS (SELECT 1 FROM holds h WHERE h.tenant = r.tenant AND h.path = r.path)",
        (tenant, path),
    )
    needless = [_Needless(tenant, path, *row) for row in rows.fetchall()]
    db.execute("DELETE FROM replicas WHERE tenant = ? AND path = ? AND key <> ''", (tenant, path))
    _intend_removal(db, needless)
    return needless


def _load(db: Connection, tenant: str, path: str | None = None) -> list[StoredFile]:
    """The files of a tenant, or one of them, as rules see them."""
    which, of = ("tenant = ?", (tenant,)) if path is None else ("tenant = ? AND path = ?", (tenant, path))

    def grouped(columns: str, table: str, condition: str = "") -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for at, *values in db.execute(f"SELECT path, {columns} FROM {table} WHERE {which} {condition}", of):
            found.setdefault(at, []).append(values[0] if len(values) == 1 else values)
        return found

    tags, holds = grouped("tag", "tags"), grouped("name", "holds")
    replicas = grouped("tier", "replicas")
    indexed = grouped("collection, checksum", "indexed", "AND checksum <> ''")
    bound = grouped("tier", "placements", "AND role = 'home'")
    rows = db.execute(
        "SELECT path, tier, size, checksum, modified_at, used_at, media_type, metadata FROM files"
        f" WHERE {which} ORDER BY path",
        of,
    )
    return [
        StoredFile(
            tenant, at, tier, size, checksum, modified_at, used_at, media_type,
            tags=frozenset(tags.get(at, ())),
            metadata={} if metadata == "{}" else json.loads(metadata),
            replicas=frozenset(replicas.get(at, ())),
            holds=frozenset(holds.get(at, ())),
            indexed=dict(indexed.get(at, ())),
            bound_for=bound.get(at, [""])[0],
        )
        for at, tier, size, checksum, modified_at, used_at, media_type, metadata in rows
    ]  # fmt: skip
