"""The log of one node: a snapshot, and the entries that follow it.

    ──────────┬─────────────┬──────────────┬───────────────┐
       snapshot.index    applied        commit        last_index

`applied` and `commit` never fall. `saved` says how far this node's own disk is, and lies anywhere from `applied` on:
what is committed beyond it is on the disks of a quorum of the others.
"""

from cluster.raft.messages import CHANGE, Entry, Saved, Snapshot


class Log:
    """Nobody but the node that owns it changes it; indexes count from 1."""

    def __init__(self, saved: Saved) -> None:
        self.snapshot = saved.snapshot
        self.unsaved_snapshot: Snapshot | None = None
        self._entries = [entry for entry in saved.entries if entry.index > saved.snapshot.index]
        for index, entry in enumerate(self._entries, self.first_index):
            assert entry.index == index, f"the saved log has {entry.index} where {index} belongs"
        self.last_index = saved.snapshot.index + len(self._entries)
        self.applied = saved.snapshot.index
        # A crash may leave a commit whose entries did not make it to the disk: nobody was told of them.
        self.commit = max(self.applied, min(saved.hard_state.commit, self.last_index))
        self.saved = self.last_index

    @property
    def first_index(self) -> int:
        """Of the first entry that is still here, or would be."""
        return self.snapshot.index + 1

    @property
    def last_term(self) -> int:
        return self._entries[-1].term if self._entries else self.snapshot.term

    def term_at(self, index: int) -> int | None:
        """None for what was compacted, and for what is not there yet."""
        place = index - self.snapshot.index
        if place == 0:
            return self.snapshot.term
        return self._entries[place - 1].term if 0 < place <= len(self._entries) else None

    def between(self, first: int, last: int) -> tuple[Entry, ...]:
        """The entries from `first` to `last`, both included; none of them compacted."""
        start = first - self.first_index
        assert start >= 0, f"entry {first} was compacted"
        return tuple(self._entries[start : max(0, last - self.snapshot.index)])

    def has_work(self) -> bool:
        """Whether anything waits to be saved or applied."""
        return self.saved < self.last_index or self.applied < self.commit or self.unsaved_snapshot is not None

    def unsaved(self) -> tuple[Entry, ...]:
        return self.between(self.saved + 1, self.last_index) if self.saved < self.last_index else ()

    def unapplied(self) -> tuple[Entry, ...]:
        """What is committed and was not applied. A snapshot that waits to be saved is applied first."""
        return self.between(max(self.applied + 1, self.first_index), self.commit) if self.applied < self.commit else ()

    def has_change(self, last: int) -> bool:
        """Whether a change of members, up to `last`, was not applied."""
        first = max(self.applied + 1, self.first_index)
        return any(entry.kind is CHANGE for entry in self.between(first, last))

    def is_current(self, index: int, term: int) -> bool:
        """Whether a log that ends there is at least as up-to-date as this one (5.4.1)."""
        return (term, index) >= (self.last_term, self.last_index)

    def append(self, entry: Entry) -> None:
        """A leader only ever appends to its own log (5.3, Leader Append-Only)."""
        assert entry.index == self.last_index + 1
        self._entries.append(entry)
        self.last_index = entry.index

    def accept(self, previous: int, term: int, entries: tuple[Entry, ...]) -> int | None:
        """Take what a leader sent after (`previous`, `term`): the last index now held in common, or None (5.3).

        Entries that are here already stay. Where one conflicts, it goes, with all that follow it.
        """
        if self.term_at(previous) != term:
            return None
        for entry in entries:
            if self.term_at(entry.index) != entry.term:
                self._truncate(entry.index)
                self._entries += entries[entry.index - entries[0].index :]
                self.last_index = entries[-1].index
                break
        return previous + len(entries)

    def _truncate(self, index: int) -> None:
        assert index > self.commit, f"a leader would overwrite entry {index}, and {self.commit} is committed"
        del self._entries[index - self.first_index :]
        self.last_index = index - 1
        self.saved = min(self.saved, self.last_index)

    def last_of_term(self, index: int, term: int) -> int:
        """The last index, no later than `index`, of this term or an earlier one: what two logs may agree on (5.3).

        Both sides skip a term at a time by it, instead of an entry.
        """
        index = min(index, self.last_index)
        while (known := self.term_at(index)) is not None and known > term:
            index -= 1
        return index

    def commit_to(self, index: int) -> bool:
        """Whether that is news."""
        assert index <= self.last_index, f"{index} is committed, and the log ends at {self.last_index}"
        if index <= self.commit:
            return False
        self.commit = index
        return True

    def mark_saved(self, entries: tuple[Entry, ...]) -> None:
        """These are on the disk; those of them count that nothing took the place of meanwhile."""
        for entry in reversed(entries):
            if self.term_at(entry.index) == entry.term:
                self.saved = max(self.saved, entry.index)
                return

    def mark_applied(self, index: int) -> None:
        assert index <= self.commit
        self.applied = max(self.applied, index)

    def restore(self, snapshot: Snapshot) -> None:
        """Begin anew after a leader's snapshot; it covers all that is here (7)."""
        assert snapshot.index > self.commit
        self.snapshot = self.unsaved_snapshot = snapshot
        self._entries = []
        self.commit = self.saved = self.last_index = snapshot.index

    def compact(self, snapshot: Snapshot) -> None:
        """Forget the entries that the snapshot covers; does nothing for one that is no news. Raises ValueError."""
        if snapshot.index > self.applied:
            raise ValueError(f"a snapshot at {snapshot.index} of a log applied up to {self.applied}")
        if snapshot.index <= self.snapshot.index:
            return
        if snapshot.term != self.term_at(snapshot.index):
            raise ValueError(f"entry {snapshot.index} is not of term {snapshot.term}")
        del self._entries[: snapshot.index - self.snapshot.index]
        self.snapshot = snapshot
