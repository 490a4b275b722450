"""What must hold at every event of the Raft swarm, whatever the weather: the invariants I1 to I14, seen from outside.

The referee reads what a driver can see: what `status()` shows, every Ready, every message that leaves, and the disks.
Only the host that an event touched is examined. Where a check is stricter than the paper's sentence the reason stands
there.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.raft import NOBODY, Entry, HardState, Members, Message, NodeId, Ready, Snapshot, Status
from cluster.raft.messages import (
    APPEND,
    APPEND_REPLY,
    CANDIDATE,
    CHANGE,
    FOLLOWER,
    HEARTBEAT,
    HEARTBEAT_REPLY,
    LEADER,
    PRE_CANDIDATE,
    PRE_VOTE,
    PRE_VOTE_REPLY,
    READ_INDEX,
    READ_INDEX_REPLY,
    SNAPSHOT,
    TIMEOUT_NOW,
    VOTE,
    VOTE_REPLY,
)
from tests.raft_host import Host, Seen, Watched, link

LEADERS_ALONE = (APPEND, HEARTBEAT, SNAPSHOT, TIMEOUT_NOW)
STANDING = (PRE_CANDIDATE, CANDIDATE)
READS = (READ_INDEX, READ_INDEX_REPLY)


class Violation(Exception):
    """An invariant did not hold in the world of this seed."""

    def __init__(self, seed: int, invariant: str, text: str) -> None:
        super().__init__(seed, invariant, text)
        self.seed, self.invariant, self.text = seed, invariant, text

    def __str__(self) -> str:
        return f"seed {self.seed} breaks {self.invariant}: {self.text}"


@dataclass(frozen=True, slots=True)
class Committed:
    """What one index holds for ever."""

    entry: Entry
    chain: bytes
    digest: bytes  # of the state machine, once it applied this


def quorum(members: Members) -> int:
    return len(members.voters) // 2 + 1


class Referee:
    def __init__(self, seed: int, hosts: Mapping[NodeId, Host], first: Snapshot, inflight: int, limit: int) -> None:
        self.seed, self.hosts = seed, hosts
        self.max_inflight, self.max_uncommitted_bytes = inflight, limit
        self.leader_of: dict[int, NodeId] = {}
        self.chain_of: dict[tuple[int, int], bytes] = {(0, 0): b""}  # (index, term) -> chain, on any disk ever
        self.truth: list[Committed] = [Committed(Entry(0, 0), b"", b"")]
        self.members_at: list[tuple[int, Members]] = [(0, first.members)]
        self.committed_by_term: dict[int, int] = {}  # a leader of a later term must hold this index
        self.proven = 0  # the highest index known to be on a quorum of disks
        self.votes: dict[tuple[NodeId, int], NodeId] = {}
        self.stood: dict[tuple[NodeId, int], tuple[int, int]] = {}  # (candidate, term) -> where its log ended
        self.answers: dict[bytes, bytes] = {}
        self.moment = 0  # counts what left and what was asked, to tell before from after

    def require(self, holds: object, invariant: str, text: str) -> None:
        if not holds:
            raise Violation(self.seed, invariant, text)

    def broken(self, invariant: str, text: str) -> Violation:
        """To be raised; where a check is made often, its text is made only for this."""
        return Violation(self.seed, invariant, text)

    @property
    def members(self) -> Members:
        """As of the last change that any host applied."""
        return self.members_at[-1][1]

    def members_as_of(self, index: int) -> Members:
        return next(members for at, members in reversed(self.members_at) if at <= index)

    # What a node shows after each event that touched it.

    def started(self, host: Host) -> None:
        node = host.node
        assert node is not None
        status, saved = node.status(), host.disk.hard_state
        host.seen = Seen(status.role, status.term, status.commit, heard_term=saved.term, handed=host.machine.applied)
        self.require(status.role is FOLLOWER, "5.2", f"{host.id} starts as {status.role}")
        self.require((status.term, status.vote) == (saved.term, saved.vote), "I8", f"{host.id} forgot {saved}")
        self.require(status.last_index == host.disk.last_index, "I7", f"{host.id} forgot a part of its log")

    def hears(self, host: Host, message: Message) -> Status | None:
        """Before the message is given to the node: what must still be so after a message of an earlier term (5.1)."""
        seen, kind = host.seen, message.type
        if kind is PRE_VOTE_REPLY and not message.reject:
            seen.grants.setdefault(message.term, set()).add(message.sender)
        elif kind is not PRE_VOTE and message.term > seen.heard_term:
            seen.heard_term = message.term
        if kind is TIMEOUT_NOW:
            seen.asked_to_stand = message.term
        elif kind is HEARTBEAT_REPLY:
            if message.term == seen.term and (left := seen.beats.get(message.context)):
                seen.answered[message.sender] = max(left, seen.answered.get(message.sender, 0))
        elif kind is APPEND_REPLY and message.reject:
            seen.windows.pop(message.sender, None)
        if message.term >= seen.term or kind in READS:  # reads are right in any term
            return None
        assert host.node is not None
        return host.node.status()

    def examine(self, host: Host) -> Watched:
        node, seen = host.node, host.seen
        assert node is not None
        role, term, commit = node.role, node.term, node.commit
        if term != seen.term:
            self._term_moved(host, node)
        if role is not seen.role or term != seen.term:
            self._role_changed(host, node)
        if commit != seen.commit:
            self._commit_moved(host, node)
        seen.role, seen.term, seen.commit = role, term, commit
        return node

    def _term_moved(self, host: Host, status: Watched) -> None:
        seen = host.seen
        if status.term <= seen.term:
            raise self.broken("I8", f"{host.id}: the term fell from {seen.term} to {status.term}")
        if status.term <= seen.heard_term:
            return
        # Nobody brought it this term, so it stands itself: a quorum said it could win, or its leader asked it to.
        if status.vote != host.id:
            raise self.broken("I13", f"{host.id} moved to term {status.term}, which it heard from nobody")
        granted = (seen.grants.get(status.term, set()) | {host.id}) & status.members.voters
        if len(granted) < quorum(status.members) and seen.asked_to_stand != status.term - 1:
            raise self.broken(
                "I13", f"{host.id} raised the term to {status.term} with pre-votes of {sorted(granted)} only"
            )

    def _role_changed(self, host: Host, status: Watched) -> None:
        if status.role is LEADER:
            self._is_leader(host.id, status.term)
            self.require(status.vote == host.id, "I1", f"{host.id} leads term {status.term} and voted {status.vote}")
            seen = host.seen
            for earlier in (seen.proposed, seen.windows, seen.beats, seen.answered, seen.asked):
                earlier.clear()
        elif status.role in STANDING and host.seen.role not in STANDING:
            self.require(host.id in status.members.voters, "learner", f"{host.id} stands for election without a vote")
            open_changes = self.changes(host, status.applied, status.commit)
            self.require(not open_changes, "I10", f"{host.id} stands with a committed change unapplied: {open_changes}")

    def _is_leader(self, node: NodeId, term: int) -> None:
        known = self.leader_of.setdefault(term, node)
        if known != node:
            raise self.broken("I1", f"two leaders of term {term}: {known} and {node}")

    def _commit_moved(self, host: Host, status: Watched) -> None:
        commit, last = status.commit, status.last_index
        if commit < host.seen.commit:
            raise self.broken("I6", f"{host.id}: commit fell from {host.seen.commit} to {commit}")
        if commit > last:
            raise self.broken("I6", f"{host.id} commits {commit} and holds only {last}")
        if commit <= self.proven:
            return
        # A leader learns first; it must be able to show a quorum of disks, its own included only if it votes.
        if status.role is not LEADER:
            raise self.broken("I6", f"{host.id} commits {commit}, which no leader committed")
        term = host.disk.term_at(commit)
        if term is None:
            raise self.broken("I9", f"leader {host.id} commits {commit} before its own disk holds it")
        if term != status.term:
            raise self.broken("5.4.2", f"leader {host.id} of term {status.term} counts {commit} of {term}")
        holders = [n for n in status.members.voters if n in self.hosts and self.hosts[n].disk.holds(commit, term or 0)]
        if len(holders) < quorum(status.members):
            raise self.broken("I7", f"leader {host.id} commits {commit} on {sorted(holders)} of {status.members}")
        self.proven = commit

    def changes(self, host: Host, after: int, upto: int) -> list[int]:
        """Where the log has a change of members, `after` left out. What is not saved is seen once it was handed out."""
        unsaved = host.outstanding.entries if host.outstanding else ()
        first_unsaved = unsaved[0].index if unsaved else upto + 1
        saved = (host.disk.entry_at(index) for index in range(after + 1, min(upto + 1, first_unsaved)))
        entries = [*saved, *(entry for entry in unsaved if after < entry.index <= upto)]
        return [entry.index for entry in entries if entry and entry.kind is CHANGE]

    # What a node hands out.

    def handed_out(self, host: Host, ready: Ready) -> None:
        node, seen, disk = self.examine(host), host.seen, host.disk
        term, is_leader = node.term, node.role is LEADER
        now, synced = disk.hard_state, disk.synced
        if ready.hard_state:
            now = ready.hard_state
            self._state_moves(host, now)
        if now.term != term or now.vote != node.vote:
            raise self.broken("I8", f"{host.id} is at {(term, node.vote)} and saves {now}")
        if not ready.must_sync:
            moved = now.term != synced.term or now.vote != synced.vote
            if moved or ready.entries or ready.snapshot:
                raise self.broken("I9", f"{host.id} hands out what must be synced and does not say so")
        members, right = node.members, ready.snapshot.members if ready.snapshot else host.members
        if members is not right and members != right:
            raise self.broken("I10", f"{host.id} counts {members} where its log says {right}")
        if ready.entries or ready.snapshot:
            self._log_grows(host, ready, node)
        self._to_apply(host, ready, node)
        if ready.leader:
            known = self.leader_of.get(term, ready.leader)
            if known != ready.leader:
                raise self.broken("I1", f"{host.id} follows {ready.leader} in term {term} of {known}")
        if is_leader and seen.led_term != term:
            self._leader_is_complete(host, ready, term)
        seen.led_term = term if is_leader else 0
        if is_leader and self.max_inflight <= 8:
            appends = [each for each in ready.messages if each.type is APPEND and each.entries]
            if appends:
                self._window(host, appends, node)

    def _state_moves(self, host: Host, now: HardState) -> None:
        before = host.disk.hard_state
        if now.term < before.term:
            raise self.broken("I8", f"{host.id} saves term {now.term} after {before}")
        if now.term == before.term and before.vote not in (NOBODY, now.vote):
            raise self.broken("I8", f"{host.id} changes its vote: {before} to {now}")
        if now.commit < before.commit:
            raise self.broken("I6", f"{host.id} saves {now} after {before}")

    def _log_grows(self, host: Host, ready: Ready, status: Watched) -> None:
        disk = host.disk
        last = disk.last_index
        if ready.snapshot:
            snapshot = ready.snapshot
            if snapshot.index <= host.machine.applied:
                raise self.broken("I6", f"{host.id} goes back to snapshot {snapshot.index}")
            if snapshot.index <= disk.snapshot.index:
                raise self.broken("I6", f"{host.id} goes back to snapshot {snapshot.index}")
            self.true_snapshot(host, snapshot)
            last = snapshot.index if disk.term_at(snapshot.index) != snapshot.term else last
        if not ready.entries:
            return
        first = ready.entries[0].index
        if first > last + 1:
            raise self.broken("I3", f"{host.id} leaves a gap between {last} and {first}")
        if first <= max(disk.hard_state.commit, host.seen.handed):
            raise self.broken("I6", f"{host.id} overwrites {first}, which it had committed ({disk.hard_state})")
        if status.role is LEADER and host.seen.led_term == status.term and first <= disk.last_index:
            raise self.broken("I2", f"leader {host.id} overwrites its own log at {first}")
        expected = range(first, first + len(ready.entries))
        if [e.index for e in ready.entries] != list(expected):
            raise self.broken("I3", f"{host.id} saves entries out of order")

    def true_snapshot(self, host: Host, snapshot: Snapshot) -> None:
        index, members = snapshot.index, snapshot.members
        if index >= len(self.truth):
            raise self.broken("I6", f"{host.id} has a snapshot of {index}, which nobody committed")
        if snapshot.term != self.truth[index].entry.term:
            raise self.broken("I3", f"{host.id}: snapshot {index} of a wrong term")
        right = self.members_as_of(index)
        if members != right:
            raise self.broken("I10", f"{host.id}: snapshot {index} names {members}, not {right}")

    def _to_apply(self, host: Host, ready: Ready, status: Watched) -> None:
        seen = host.seen
        if ready.snapshot:
            seen.handed = ready.snapshot.index
        for entry in ready.committed:
            if entry.index != seen.handed + 1:
                raise self.broken("I5", f"{host.id} applies {entry.index} after {seen.handed}")
            seen.handed = entry.index
        if ready.committed and seen.handed > status.commit:
            raise self.broken("I6", f"{host.id} applies what is not committed")
        if seen.handed > self.proven:
            raise self.broken("I6", f"{host.id} applies {seen.handed}, proven is {self.proven}")

    def _leader_is_complete(self, host: Host, ready: Ready, term: int) -> None:
        """I4. Only what earlier terms committed: a late leader of an old term need not know what a newer one did."""
        must = max((index for earlier, index in self.committed_by_term.items() if earlier < term), default=0)
        if must <= host.disk.snapshot.index:
            return
        chain = host.disk.chain_at(must)
        if ready.entries and ready.entries[0].index <= must:
            chain = host.disk.chain_at(ready.entries[0].index - 1)
            for entry in ready.entries[: must - ready.entries[0].index + 1]:
                chain = link(chain or b"", entry)
        self.require(
            chain == self.truth[must].chain, "I4", f"leader {host.id} of term {term} lacks the committed {must}"
        )

    def _window(self, host: Host, appends: list[Message], status: Watched) -> None:
        for message in appends:
            progress = status.followers.get(message.to)
            window = host.seen.windows.setdefault(message.to, deque())
            if progress is None or progress.state != "replicate" or message.term != status.term:
                window.clear()
                continue
            if window and message.index < window[-1]:  # sent again: what was under way is given up
                window.clear()
            window.append(message.entries[-1].index)
            while window and window[0] <= progress.match:
                window.popleft()
            if len(window) > self.max_inflight:
                raise self.broken("I14", f"{host.id} has {len(window)} appends to {message.to} under way")

    # What reaches a disk, a wire, a state machine.

    def saved(self, host: Host, entries: tuple[Entry, ...]) -> None:
        for entry in entries:
            chain = host.disk.chain_at(entry.index)
            if chain is None or not host.disk.holds(entry.index, entry.term):  # a torn save left it out
                return
            known = self.chain_of.setdefault((entry.index, entry.term), chain)
            if known != chain:
                raise self.broken("I3", f"{host.id}: another log ends at ({entry.index}, {entry.term})")
            if entry.kind is CHANGE and not Members.from_bytes(entry.data).voters:
                raise self.broken("I10", f"{host.id} saves a change to no voters")

    def sending(self, host: Host, message: Message, with_entries: bool) -> None:
        """I9, and who may say what. All that leaves rests on what is synced by now."""
        kind, term, durable = message.type, message.term, host.disk.synced
        if kind is HEARTBEAT:
            self._heartbeat(host, message)
        if kind in LEADERS_ALONE:
            self._is_leader(host.id, term)
            if message.sender != host.id:
                raise self.broken("I1", f"{host.id} speaks as leader {message.sender}")
        elif kind is VOTE:
            self.stood[host.id, term] = (message.log_term, message.index)
            if durable.term < term:
                raise self.broken("I9", f"{host.id} stands in term {term} before it saved it")
            self._votes(host, term, host.id, durable)
        elif kind is VOTE_REPLY and not message.reject:
            self._votes(host, term, message.to, durable)
            if not with_entries:
                self._vote_goes_to_the_up_to_date(host, message)
        elif kind is APPEND_REPLY and not message.reject:
            self._acknowledges(host, message, durable)
        if term > durable.term:
            if kind is PRE_VOTE or (
                kind is PRE_VOTE_REPLY and not message.reject
            ):  # of a term that is only asked about
                return
            raise self.broken("I9", f"{host.id} speaks in term {term} before it saved it: {durable}")

    def _heartbeat(self, host: Host, message: Message) -> None:
        if message.term == host.seen.term:
            self.moment += 1
            host.seen.beats.setdefault(message.context, self.moment)
        to = self.hosts.get(message.to)
        if to is None or to.lost:
            return
        held = to.disk.last_index
        if message.commit > held:
            raise self.broken("heartbeat", f"{host.id} tells {to.id}, at {held}, commit {message.commit}")

    def _votes(self, host: Host, term: int, candidate: NodeId, durable: HardState) -> None:
        known = self.votes.setdefault((host.id, term), candidate)
        if known != candidate:
            raise self.broken("I8", f"{host.id} votes in term {term} for {known} and for {candidate}")
        if durable.term <= term and (durable.term, durable.vote) != (term, candidate):
            raise self.broken("I9", f"{host.id} votes for {candidate} in term {term} before it saved that: {durable}")

    def _vote_goes_to_the_up_to_date(self, host: Host, message: Message) -> None:
        """5.4.1, on the spot. A voter that got entries since it voted is left out: they may come from the winner."""
        disk = host.disk
        mine = (disk.term_at(disk.last_index) or 0, disk.last_index)
        theirs = self.stood.get((message.to, message.term))
        if theirs is not None and disk.synced.term == message.term and mine[0] < message.term:
            self.require(mine <= theirs, "5.4.1", f"{host.id}, at {mine}, votes for {message.to}, at {theirs}")

    def _acknowledges(self, host: Host, message: Message, durable: HardState) -> None:
        if message.term != durable.term:  # of an older term: it may have been overwritten since, and counts for nothing
            return
        index = message.index
        if index > host.disk.last_index:
            raise self.broken("I9", f"{host.id} acknowledges {index} before it saved it")
        leader = self.hosts.get(message.to)
        mine = host.disk.chain_at(index)
        if leader is not None and leader.node is not None and self.leader_of.get(message.term) == leader.id:
            theirs = leader.disk.chain_at(index)
            is_current = leader.disk.hard_state.term == message.term
            if is_current and None not in (mine, theirs) and mine != theirs:
                raise self.broken("I3", f"{host.id} acknowledges {index} to {leader.id}, whose log is another")

    def applied(self, host: Host, entry: Entry, answer: tuple[bytes, bytes] | None) -> bool:
        """True for the first host to apply this index."""
        digest, chain = host.machine.digest, host.disk.chain_at(entry.index)
        first = entry.index == len(self.truth)
        if first:
            self.truth.append(Committed(entry, link(self.truth[-1].chain, entry), digest))
            if entry.kind is CHANGE:
                self._members_follow(entry)
        true = self.truth[entry.index]
        if entry is not true.entry and entry != true.entry:
            raise self.broken("I5", f"{host.id} applies {entry}, others {true.entry}")
        if chain not in (None, true.chain):
            raise self.broken("I3", f"{host.id} has another log up to {entry.index}")
        if digest != true.digest:
            raise self.broken("I5", f"{host.id} has another state after {entry.index}")
        term = host.seen.term
        self.committed_by_term[term] = max(self.committed_by_term.get(term, 0), entry.index)
        if answer:
            who, said = answer
            if self.answers.setdefault(who, said) != said:
                raise self.broken("I12", f"{host.id} answers {who!r} with {said!r}, before {self.answers[who]!r}")
        return first

    def _members_follow(self, entry: Entry) -> None:
        before, after = self.members, Members.from_bytes(entry.data)
        self.require(after.voters, "I10", f"no voters after {entry.index}")
        one = len(before.voters ^ after.voters) <= 1
        self.require(one, "I10", f"{entry.index} changes more than one voter: {before} to {after}")
        self.members_at.append((entry.index, after))

    def restored(self, host: Host, snapshot: Snapshot) -> None:
        known = self.truth[snapshot.index].digest
        self.require(host.machine.digest == known, "I5", f"{host.id} has another state after snapshot {snapshot.index}")

    # What a driver was allowed to ask for.

    def accepted(self, host: Host, index: int, size: int) -> None:
        """I14: open payload stays within the limit and one proposal."""
        seen = host.seen
        if seen.role is not LEADER:
            raise self.broken("I1", f"{host.id} takes a proposal and does not lead")
        while seen.proposed and seen.proposed[0][0] <= seen.commit:
            seen.proposed.popleft()
        waiting = sum(payload for _, payload in seen.proposed)
        fits = waiting <= self.max_uncommitted_bytes
        if not fits:
            raise self.broken("I14", f"{host.id} takes {size} bytes more with {waiting} uncommitted")
        seen.proposed.append((index, size))

    def accepted_change(self, host: Host, before: Status, members: Members, index: int) -> None:
        """I10: `before` is what the leader showed when it took the change."""
        voters = before.members.voters
        self.require(members.voters, "I10", f"{host.id} takes a change to no voters")
        self.require(len(voters ^ members.voters) <= 1, "I10", f"{host.id} takes {members} after {before.members}")
        leaves = len(voters) == 2 and members.voters == voters - {host.id}
        self.require(not leaves, "I10", f"{host.id}, one of two, takes its own removal")
        earlier = self.changes(host, before.applied, index - 1)
        self.require(not earlier, "I10", f"{host.id} takes a change while those at {earlier} are unapplied")
        term = host.disk.term_at(before.commit)
        own = term == before.term
        self.require(own, "I10", f"{host.id} takes a change before it committed in its own term {before.term}")

    def asked_to_read(self, host: Host, context: bytes) -> None:
        assert host.node is not None
        self.moment += 1
        if host.node.role is LEADER and len(host.members.voters) > 1:
            host.seen.asked[context] = self.moment

    def read_answered(self, host: Host, context: bytes, index: int, floor: int) -> None:
        """I11. All that was committed anywhere when the read was asked for, not only what a client knew of by then:
        no leader that a quorum still follows after the question can know less. A leader that is not alone must have
        heard from somebody since, also where nobody knew better."""
        if index < floor:
            raise self.broken("I11", f"{host.id} answers read {context!r} from {index}; {floor} was committed")
        asked = host.seen.asked.pop(context, 0)
        if len(host.members.voters) > 1 and max(host.seen.answered.values(), default=0) < asked:
            raise self.broken("I11", f"{host.id} answers read {context!r} on what it heard before it was asked")
