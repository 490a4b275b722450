"""Which indexes are searched in this process, and how they are kept as the document store says.

The vector store is a hint (hades.py), and so is this: a tenant's part of an index, read from the document store, which
has both vectors and texts. It is read in the background from its first document on, and until it is there the vector
store is asked, whose scores of texts may know less of the whole (stores/milvus.py); so it is where it would take more
memory than is given for all of them, and while it is too far behind.

What is held is also in a file of the home's cache, so that it is there again soon after a start. A file that is damaged
or of another form is as none; one that is whole is compared with the document store, version by version.

It is as new as the store's revision that a search has read (ports.Followed): whoever searches compares the two, and
first brings in what is missing. So what was published is found by every search that begins later, by whomever. What a
vacuum erased is no longer believed at once, and is gone from memory within about a second.

With the rows is what the document store says of each version: when it was visible, and to whom. A revision counts all
that changes this, so candidates are judged here as they would be there (Held.verdicts), without asking it about each.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from nexus.errors import Conflict, NexusError, NotFound
from nexus.hades import Hades, audience_of, in_batches
from nexus.ports import Change, Collection, Followed, Verdict
from nexus.rows import Rows, estimated_bytes
from nexus.snapshot import Snapshot, is_being_written, read, write
from nexus.types import NOBODY, Principal, digest

log = logging.getLogger("nexus.resident")

TICK_SECONDS = 1.0
INLINE_CHUNKS = 256  # more than that to bring in, and the vector store is asked meanwhile
CHUNKS_AT_ONCE = 512
IDLE_SECONDS = 300.0  # what was not searched for so long makes room for others
WRITTEN_SECONDS = 60.0  # between two files of one part, unless something of it was erased
FOLDER = Path("cache", "resident")  # of the home
AGAIN_SECONDS = 60.0  # after which is looked again at what was too large

READING = "it is being read"
COLUMNS = ("document_ids", "versions", "titles", "audiences", "cuts", "opened")  # of versions, in a file
TOO_LARGE = "it is larger than the memory that is left for it"

Key = tuple[str, str]  # index and tenant, or document and version
Span = tuple[int, int | None]  # from which sequence number on a version was visible, and from which it was not any more


@dataclass(frozen=True, slots=True)
class Standing:
    """How one tenant's part of a collection is searched: "resident", or "store" and why.

    `rows` and `bytes` of memory are None where they are not to be told.
    """

    collection: str
    tenant: str
    index: str
    served_by: Literal["resident", "store"]
    rows: int | None
    bytes: int | None
    why: str = ""


@dataclass(slots=True)
class Version:
    """What a version's rows were made of, beside what never changes; and who may see it when."""

    document_id: str
    title: str
    audience: str
    cut: str
    chunk_ids: tuple[str, ...]
    spans: tuple[Span, ...]  # as it was opened last comes last: it may have been cut otherwise then
    readers: frozenset[str]

    def judge(self, principal: Principal, as_of: int) -> Verdict:
        """What the document store says to someone of its tenant."""
        if not principal.may_read(self.readers):
            return "not a reader"
        for opened, closed in self.spans:
            if opened <= as_of and (closed is None or as_of < closed):
                return "visible"
        return "not yet" if self.spans[0][0] > as_of else "superseded"


@dataclass(frozen=True, slots=True)
class Held:
    """What one tenant's searches of an index find, and what became of it, as new as the revision that was asked for."""

    rows: Rows
    made_of: Mapping[str, Version]  # by chunk id; another thread may add to it

    def verdicts(self, principal: Principal, chunk_ids: Sequence[str], as_of: int) -> dict[str, Verdict]:
        """As DocumentStore.verdicts, for someone of this tenant."""
        find = self.made_of.get
        return {i: version.judge(principal, as_of) if (version := find(i)) else "unknown" for i in chunk_ids}

    def documents_of(self, chunk_ids: Sequence[str]) -> dict[str, str]:
        """Which document each of those is of that are there."""
        found = ((i, self.made_of.get(i)) for i in chunk_ids)
        return {i: version.document_id for i, version in found if version is not None}


@dataclass(slots=True)
class Part:
    """One tenant's part of an index, changed under `changing`. Without `held` the vector store is asked, and why."""

    collection: str
    tenant: str
    index: str
    used_at: float
    held: Held | None = None
    why: str = READING
    revision: int = 0
    erased: int = 0
    looked_at: float = 0.0
    size: int = 0  # rows, as last counted
    versions: dict[Key, Version] = field(default_factory=dict)
    made_of: dict[str, Version] = field(default_factory=dict)  # by chunk id
    changes: int = 0  # of what its file has: the rows, and what they were made of
    written: tuple[int, int] = (-1, -1)  # changes and erased, of its file
    written_at: float = 0.0
    changing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def rows(self) -> Rows | None:
        return None if self.held is None else self.held.rows

    def keep(self, key: Key, version: Version) -> set[str]:
        """Know this of a version from now on; the chunks that it had before and has no more."""
        former = self.versions.get(key)
        self.versions[key] = version
        self.changes += 1
        self.made_of |= dict.fromkeys(version.chunk_ids, version)
        gone = set() if former is None else set(former.chunk_ids).difference(version.chunk_ids)
        for chunk_id in gone:
            self.made_of.pop(chunk_id, None)
        return gone

    def lose(self, key: Key) -> tuple[str, ...]:
        """Know nothing of a version any more; its chunks."""
        version = self.versions.pop(key)
        self.changes += 1
        for chunk_id in version.chunk_ids:
            self.made_of.pop(chunk_id, None)
        return version.chunk_ids

    def clear(self) -> None:
        """Know nothing any more. Who searches meanwhile keeps what he was given."""
        self.held, self.versions, self.made_of, self.revision = None, {}, {}, 0
        self.written = (-1, -1)


class Resident:
    """The parts that are held by one process. Safe to use from several threads."""

    def __init__(
        self, hades: Hades, most_bytes: int, home: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """The document store has to be `Followed`. Without a home there are no files."""
        self._hades, self._most_bytes, self._clock = hades, most_bytes, clock
        self._folder = None if home is None else home / FOLDER
        self._parts: dict[Key, Part] = {}
        self._noticed: set[tuple[str, str]] = set()  # collections and tenants
        self._lock = threading.Lock()
        self._work, self._at_rest = threading.Event(), threading.Condition()
        self._rounds, self._is_closed = 0, False
        self._thread = threading.Thread(target=self._run, name="resident", daemon=True)
        self._thread.start()

    # ── asked by searches ───────────────────────────────────────────────────────────────────────

    def serving(self, collection: Collection, tenant: str) -> Held | None:
        """What this tenant's searches find now; None where the vector store is to be asked.

        `collection` is as HADES gave it for this tenant. Raises Unavailable.
        """
        key = (collection.index, tenant)
        part = self._parts.get(key)
        if part is None:
            with self._lock:
                self._parts.setdefault(key, Part(collection.name, tenant, collection.index, self._clock()))
            self._work.set()
            return None
        part.used_at = self._clock()
        if part.held is None or not self._thread.is_alive():
            return None
        if part.revision < collection.revision:
            with part.changing:
                if part.revision < collection.revision and not self._catch_up(part, collection, INLINE_CHUNKS):
                    self._work.set()
                    return None
        return part.held

    def foresee(self) -> None:
        """Read all that there is, as far as there is room, before anybody searches it. Raises Unavailable.

        Files of what is not there any more are removed.
        """
        self._notice(self._store.standings())
        if self._folder is not None and self._folder.is_dir():
            with self._lock:
                known = {self._file(key) for key in self._parts}
            for path in set(self._folder.iterdir()) - known:
                if not is_being_written(path):
                    path.unlink(missing_ok=True)

    def standings(self) -> list[Standing]:
        """What is held, and what is not though it was searched for."""
        with self._lock:
            parts = list(self._parts.values())
        found = []
        for part in parts:
            rows, names = part.rows, (part.collection, part.tenant, part.index)
            if rows is None:
                found.append(Standing(*names, "store", part.size, 0, part.why))
            else:
                found.append(Standing(*names, "resident", len(rows), rows.nbytes))
        return sorted(found, key=lambda one: (one.collection, one.tenant, one.index))

    def settle(self) -> None:
        """Return once everything known now has been looked at."""
        with self._at_rest:
            wanted = self._rounds + 2  # one may be under way that began before
            while self._rounds < wanted and self._thread.is_alive():
                self._work.set()
                self._at_rest.wait(0.05)

    def close(self) -> None:
        self._is_closed = True
        self._work.set()
        self._thread.join()

    # ── in the background ───────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while not self._is_closed:
            self._work.wait(TICK_SECONDS)
            self._work.clear()
            try:
                self._look()
            except NexusError as error:  # the store is away; searches say so, and the next round looks again
                log.warning("keeping indexes in memory was put off: %s", error)
            with self._at_rest:
                self._rounds += 1
                self._at_rest.notify_all()

    def _look(self) -> None:
        """Bring every part to where the store is."""
        standings = self._store.standings()
        self._notice(standings)
        with self._lock:
            parts = list(self._parts.items())
        for key, part in parts:
            revision, erased = standings.get((part.collection, part.tenant), (0, 0))
            if self._is_closed:
                return
            try:
                self._tend(part, revision, erased)
            except NotFound:
                self._drop(key)
            except NexusError as error:  # whoever searches is told; the next round looks again
                log.warning("keeping collection %r in memory was put off: %s", part.collection, error)

    def _notice(self, standings: Iterable[tuple[str, str]]) -> None:
        """Have each part read that is new here; one that made room for others is read when it is searched again."""
        for name, tenant in sorted(set(standings) - self._noticed):
            try:
                self.serving(self._hades.find_collection(name, tenant), tenant)
            except Conflict as error:  # whoever searches it is told the same
                log.warning("collection %r is not read: %s", name, error)
            self._noticed.add((name, tenant))

    def _tend(self, part: Part, revision: int, erased: int) -> None:
        collection = self._hades.find_collection(part.collection, part.tenant)
        if collection.index != part.index:
            if self._clock() - part.used_at > AGAIN_SECONDS:
                self._drop((part.index, part.tenant))
            self.serving(collection, part.tenant)  # which has that of the index that took its place read
            return
        if part.rows is None:
            self._begin(part, collection, erased)
            return
        with part.changing:
            if part.revision < revision:
                self._catch_up(part, collection, None)
            if part.rows is not None and part.erased != erased:
                self._forget_erased(part)
                part.erased = erased
        if part.rows is not None:
            part.rows.tidy()
            self._write(part)

    def _begin(self, part: Part, collection: Collection, erased: int) -> None:
        """Read all of it, if there is room."""
        if part.looked_at and self._clock() - part.looked_at < AGAIN_SECONDS and part.erased == erased:
            return
        part.looked_at, part.erased = self._clock(), erased
        part.size = self._store.held(part.collection, part.tenant)
        if not self._make_room(estimated_bytes(part.size, collection.dimension)):
            part.why = TOO_LARGE
            self._remove_file((part.index, part.tenant))
            return
        with part.changing:
            part.why = READING
            rows = self._read(part) or Rows(part.index, collection.dimension)
            changed = self._store.changed(part.collection, part.tenant, 0)
            for key in part.versions.keys() - set(map(_key, changed)):
                rows.delete(part.lose(key))
            if self._bring_in(part, rows, collection, changed):
                rows.tidy(whole=True)
                part.held = Held(rows, part.made_of)
        self._write(part)

    def _catch_up(self, part: Part, collection: Collection, most: int | None) -> bool:
        """Bring in what was published and changed since, if it is at most so many chunks; whether that was done."""
        rows = part.rows
        if rows is None:
            return False
        changed = self._store.changed(part.collection, part.tenant, part.revision)
        fresh = {_key(one): one.chunks for one in changed if _key(one) not in part.versions}
        if most is not None and sum(fresh.values()) > most:
            return False
        return self._bring_in(part, rows, collection, changed)

    def _bring_in(self, part: Part, rows: Rows, collection: Collection, changed: Sequence[Change]) -> bool:
        """Bring in versions read after the collection was; False where they take too much memory."""
        fresh, spans = [], dict[Key, tuple[Span, ...]]()
        for key, group in groupby(changed, _key):
            *_, latest = former = list(group)
            spans[key] = tuple((one.opened, one.closed) for one in former)
            known = part.versions.get(key)
            if known is None or not _is_made_of(known, latest, collection.cut):
                fresh.append(latest)
                continue
            known.spans, known.readers = spans[key], latest.readers
            audience = audience_of(part.tenant, latest.readers)
            if known.audience != audience:
                rows.admit(known.chunk_ids, audience)
                known.audience = audience
                part.changes += 1
        for batch in in_batches(fresh, CHUNKS_AT_ONCE):
            read = list(self._hades.rows(collection, batch))
            rows.upsert([row for found in read for row in found])
            for one, found in zip(batch, read, strict=True):
                key, ids = _key(one), tuple(row.chunk_id for row in found)
                audience = audience_of(part.tenant, one.readers)
                made = Version(one.document_id, one.title, audience, collection.cut, ids, spans[key], one.readers)
                if gone := part.keep(key, made):
                    rows.delete(gone)
            if self._is_closed or self._total(but=part) + rows.nbytes > self._most_bytes:
                part.clear()
                part.why, part.looked_at = TOO_LARGE, self._clock()
                self._remove_file((part.index, part.tenant))
                return False
        part.revision = max(part.revision, collection.revision)
        return True

    def _forget_erased(self, part: Part) -> None:
        assert part.rows is not None
        kept = set(map(_key, self._store.changed(part.collection, part.tenant, 0)))
        for key in part.versions.keys() - kept:
            part.rows.delete(part.lose(key))
        part.rows.tidy(whole=True)

    # ── files ───────────────────────────────────────────────────────────────────────────────────

    def _file(self, key: Key) -> Path:
        assert self._folder is not None
        return self._folder / f"{digest('resident', *key)}.rows"

    def _read(self, part: Part) -> Rows | None:
        """What was held when its file was written, which `part` knows then; None without such a file.

        Whom it is for is not told by a file: nobody, until the document store says so.
        """
        part.clear()
        path = None if self._folder is None else self._file((part.index, part.tenant))
        try:
            snapshot = None if path is None else read(path)
            if snapshot is None:
                if path is not None and path.exists():
                    log.warning(
                        "the file of collection %r in memory is damaged or old; it is made anew", part.collection
                    )
                return None
        except OSError as error:
            log.warning("the file of collection %r in memory cannot be read: %s", part.collection, error)
            return None
        for key, version in _versions_in(snapshot):
            part.keep(key, version)
        part.written = (part.changes, -1)  # what else was erased meanwhile is written at once, and nothing anew
        return Rows.thaw(snapshot)

    def _write(self, part: Part) -> None:
        """Write the file if it is not up to date, at once if it has what was erased, and else not too often."""
        is_due = part.written[1] != part.erased or self._clock() - part.written_at >= WRITTEN_SECONDS
        if self._folder is None or part.rows is None or part.written[0] == part.changes or not is_due:
            return
        with part.changing:
            written, snapshot = (part.changes, part.erased), _with_versions(part.rows.freeze(), part.versions)
        try:
            write(self._file((part.index, part.tenant)), snapshot)
        except OSError as error:
            log.warning("the file of collection %r in memory cannot be written: %s", part.collection, error)
        part.written, part.written_at = written, self._clock()

    def _remove_file(self, key: Key) -> None:
        if self._folder is not None:
            self._file(key).unlink(missing_ok=True)

    # ── room ────────────────────────────────────────────────────────────────────────────────────

    def _make_room(self, wanted: int) -> bool:
        """Whether so much more fits, if need be in place of what was not searched for long."""
        if wanted > self._most_bytes:
            return False
        while self._total() + wanted > self._most_bytes:
            with self._lock:
                held = [(part.used_at, key) for key, part in self._parts.items() if part.rows is not None]
            idle = [one for one in held if self._clock() - one[0] > IDLE_SECONDS]
            if not idle:
                return False
            self._drop(min(idle)[1])
        return True

    def _total(self, but: Part | None = None) -> int:
        with self._lock:
            held = [part.rows for part in self._parts.values() if part is not but]
        return sum(rows.nbytes for rows in held if rows is not None)

    def _drop(self, key: Key) -> None:
        with self._lock:
            self._parts.pop(key, None)
        self._remove_file(key)

    @property
    def _store(self) -> Followed:
        assert isinstance(self._hades.documents, Followed)
        return self._hades.documents


def open_resident(hades: Hades, most_bytes: int, home: Path) -> Resident | None:
    """None where nothing is to be held, or the document store is not one that can be followed."""
    if most_bytes and isinstance(hades.documents, Followed):
        return Resident(hades, most_bytes, home)
    shutil.rmtree(home / FOLDER, ignore_errors=True)
    return None


def _is_made_of(known: Version, latest: Change, cut: str) -> bool:
    """Whether rows are still those of a version: not if it was published anew, or an index of the same name was."""
    return (known.cut, known.title, known.spans[-1][0]) == (cut, latest.title, latest.opened)


def _with_versions(snapshot: Snapshot, versions: Mapping[Key, Version]) -> Snapshot:
    """Rows with what they were made of, all but whom it is for: a column for each, and the places of their rows."""
    place_of = {i: place for place, i in enumerate(snapshot.about["ids"])}
    places = [[place_of[i] for i in one.chunk_ids if i in place_of] for one in versions.values()]
    names = {
        name: number for number, name in enumerate({n for one in versions.values() for n in (one.audience, one.cut)})
    }
    columns = {
        "document_ids": [document_id for document_id, _ in versions], "versions": [version for _, version in versions],
        "titles": [one.title for one in versions.values()], "opened": [one.spans[-1][0] for one in versions.values()],
        "audiences": [names[one.audience] for one in versions.values()],
        "cuts": [names[one.cut] for one in versions.values()],
    }  # fmt: skip
    arrays = {
        "places": np.array([place for some in places for place in some], np.int32),
        "sizes": np.array([len(some) for some in places], np.int32),
    }
    return Snapshot({**snapshot.about, "made of": columns, "names": list(names)}, {**snapshot.arrays, **arrays})


def _versions_in(snapshot: Snapshot) -> Iterator[tuple[Key, Version]]:
    """What rows were made of; it is for nobody, and was never to be seen."""
    about, columns = snapshot.about, snapshot.about["made of"]
    ids, names = about["ids"], about["names"]
    own = [ids[place] for place in snapshot.arrays["places"].tolist()]
    first, nobody = 0, frozenset({NOBODY})
    described = zip(*(columns[name] for name in COLUMNS), np.cumsum(snapshot.arrays["sizes"]).tolist(), strict=True)
    for document_id, version, title, audience, cut, opened, end in described:
        made_of, never = tuple(own[first:end]), ((opened, opened),)
        yield (document_id, version), Version(document_id, title, names[audience], names[cut], made_of, never, nobody)
        first = end


def _key(change: Change) -> Key:
    return change.document_id, change.version
