"""One node of a Raft cluster: what happens is fed in, what is to be done is drained, and nothing else is touched.

The driver feeds `tick`, `step` and the requests; then, while `has_ready`, it takes a `Ready`, saves, sends, applies,
and calls `advance`. Whatever a message or a count depends on is in the same `Ready` as the message, or was in an
earlier one, and the driver saves before it sends: so a vote and an acknowledgement never leave before they are on
the disk, and a leader counts its own log only as far as `advance` has confirmed it.

What goes beyond the paper's figure 2, each with its reason:

    pre-vote        who could not win does not disturb who leads           Ongaro's thesis 9.6
    check-quorum    a leader that hears no majority steps down, so that    thesis 6.2
                    its clients look elsewhere
    leader's word   who heard a leader lately helps nobody against it      thesis 4.2.3
    read index      a read is answered from a state that was current       thesis 6.4
                    after it was asked, and writes nothing
    transfer        a leader hands over to one that is level with it       thesis 3.10
    one at a time   members change by one voter, once the leader has       thesis 4.1, and the correction of 2015
                    committed in its own term
"""

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from cluster.raft.log import Log
from cluster.raft.messages import (
    APPEND,
    APPEND_REPLY,
    CANDIDATE,
    CHANGE,
    COMMAND,
    FOLLOWER,
    HEARTBEAT,
    HEARTBEAT_REPLY,
    LEADER,
    NOBODY,
    PRE_CANDIDATE,
    PRE_VOTE,
    PRE_VOTE_REPLY,
    READ_INDEX,
    READ_INDEX_REPLY,
    SNAPSHOT,
    TIMEOUT_NOW,
    VOTE,
    VOTE_REPLY,
    ConfChangeRefused,
    Config,
    Entry,
    EntryKind,
    HardState,
    Members,
    Message,
    MessageType,
    NodeId,
    NotLeader,
    ProposalDropped,
    ReadState,
    Ready,
    Role,
    Saved,
    Snapshot,
    Status,
)
from cluster.raft.tracker import Tracker

TRANSFER = b"transfer"
_FROM_LEADERS = (APPEND, HEARTBEAT, SNAPSHOT)
_BALLOTS = (PRE_VOTE, VOTE)
_READS = (READ_INDEX, READ_INDEX_REPLY)  # right whenever they arrive, in whichever term
_REPLY = {
    PRE_VOTE: PRE_VOTE_REPLY,
    VOTE: VOTE_REPLY,
    APPEND: APPEND_REPLY,
    HEARTBEAT: HEARTBEAT_REPLY,
    SNAPSHOT: APPEND_REPLY,
}


class RaftNode:
    """Not safe for threads: one driver owns it."""

    def __init__(self, config: Config, saved: Saved, rng: random.Random) -> None:
        """As it was when `saved` was written, a follower. `rng` draws election timeouts, and nothing else."""
        self._config, self._rng = config, rng
        self._id = config.id
        self._timeouts = range(config.election_ticks, 2 * config.election_ticks)
        self._log = Log(saved)
        self._tracker = Tracker(saved.snapshot.members)
        self._term, self._vote = saved.hard_state.term, saved.hard_state.vote
        self._role, self._leader = FOLLOWER, NOBODY
        self._votes: dict[NodeId, bool] = {}
        self._is_asked_to_stand = False
        self._elapsed = 0  # ticks since the leader was heard, or a vote given; a leader hears itself
        self._heartbeat_elapsed = 0
        self._draw_timeout()

        self._uncommitted_bytes = 0
        self._transfer_to, self._transfer_elapsed = NOBODY, 0
        self._round, self._is_round_open = 0, False  # of heartbeats; open while the last one has not left
        self._reads: deque[tuple[int, NodeId, ReadState]] = deque()  # (round that confirms it, who asked, the answer)
        self._early_reads: list[tuple[NodeId, bytes]] = []  # asked before this leader committed in its term

        self._is_snapshot_known = False  # one was acknowledged that adds nothing to the log
        self._messages: list[Message] = []
        self._answers: list[ReadState] = []
        self._handed_out: Ready | None = None
        self._told = HardState(self._term, self._vote, self._log.commit)
        self._told_leader = NOBODY

    # Feed

    def tick(self) -> None:
        """One unit of time has passed."""
        if self._role is LEADER:
            self._tick_leader()
            return
        self._elapsed += 1
        if self._elapsed >= self._timeout:
            self._become_follower(self._term, NOBODY)  # who may not campaign has lost its leader all the same
            self.campaign()

    def step(self, message: Message) -> None:
        """A message has arrived. Late, repeated or from an earlier life of its sender, it does no harm."""
        if message.to != self._id or not self._settle_term(message):
            return
        if message.type in _FROM_LEADERS:
            self._follow(message)
        else:
            self._handlers[message.type](self, message)

    def propose(self, data: bytes) -> int:
        """Append a command: its index. It is committed once it comes back in `Ready.committed`, under the same term.

        Raises NotLeader, and ProposalDropped while this leader hands over or too much waits to be committed.
        """
        self._must_take_proposals()
        waiting = self._uncommitted_bytes
        if waiting and waiting + len(data) > self._config.max_uncommitted_bytes:
            raise ProposalDropped(f"{waiting} bytes wait to be committed already")
        return self._append(data)

    def propose_conf_change(self, members: Members) -> int:
        """Append a change to these members: its index. Raises NotLeader, ProposalDropped and ConfChangeRefused."""
        self._must_take_proposals()
        if reason := self._reason_against(members):
            raise ConfChangeRefused(reason)
        return self._append(members.to_bytes(), CHANGE)

    def apply_conf_change(self, members: Members) -> None:
        """The driver has reached a CHANGE in what is committed: from now on it counts (thesis 4.1)."""
        last = max(1, self._log.last_index)
        self._tracker.change(members, next_index=last)  # so that a new one is asked about it
        if self._role is not LEADER:
            return
        if self._id not in members.voters:
            self._leave()
            return
        if self._transfer_to not in members.voters:
            self._transfer_to = NOBODY
        self._commit_what_a_quorum_holds()
        self._confirm_reads()

    def read_index(self, context: bytes) -> None:
        """Ask how far one must have applied to answer a read; `Ready.reads` tells, or nothing ever does (thesis 6.4).

        Raises NotLeader when no leader is known. A context must be unique on this node.
        """
        if self._role is LEADER:
            self._read(self._id, context)
        elif self._leader == NOBODY:
            raise NotLeader(NOBODY)
        else:
            self._send(READ_INDEX, self._leader, context=context)

    def campaign(self) -> None:
        """Stand for election, asking first whether there is a chance. Nothing happens where this node may not."""
        if self._role is not LEADER and self._may_campaign():
            self._become_pre_candidate()

    def transfer_leader(self, to: NodeId) -> None:
        """Hand over to this voter once it is level. To oneself: stay, whatever was asked before (thesis 3.10)."""
        if self._role is not LEADER or to not in self._tracker.members.voters or to == self._transfer_to:
            return
        self._transfer_to, self._transfer_elapsed = NOBODY if to == self._id else to, 0
        self._hand_over_if_level()

    def report_unreachable(self, peer: NodeId) -> None:
        """What was sent to this one lately may be lost."""
        follower = self._tracker.followers.get(peer)
        if follower and follower.state == "replicate":
            follower.probe()

    def compact(self, snapshot: Snapshot) -> None:
        """Forget the log up to `snapshot.index`. Raises ValueError where that is not applied."""
        self._log.compact(snapshot)

    # Drain

    def has_ready(self) -> bool:
        """Whether `ready` would hand out anything; False until the last one has come back."""
        if self._handed_out:
            return False
        if self._messages or self._answers or self._told_leader != self._leader:
            return True
        if self._log.has_work() or not self._is_state_told():
            return True
        return self._role is LEADER and bool(self._behind())

    def ready(self) -> Ready:
        """All there is to do now. `advance` must be called with it before the next."""
        assert self._handed_out is None, "the last Ready was not advanced"
        if self._role is LEADER:
            for id in self._behind():
                self._send_appends(id)
        told = self._told
        state = told if self._is_state_told() else HardState(self._term, self._vote, self._log.commit)
        entries, snapshot = self._log.unsaved(), self._log.unsaved_snapshot
        if snapshot:
            self._tracker.change(snapshot.members, next_index=0)
        committed = self._log.unapplied()
        has_change = CHANGE in [entry.kind for entry in committed]
        is_vote_new = state.term != told.term or state.vote != told.vote
        done = Ready(
            hard_state=None if state is told else state,
            snapshot=snapshot,
            entries=entries,
            messages=tuple(self._messages),
            committed=committed,
            reads=tuple(self._answers),
            leader=None if self._leader == self._told_leader else self._leader,
            must_sync=bool(is_vote_new or entries or snapshot or has_change or self._is_snapshot_known),
        )
        self._told, self._told_leader = state, self._leader
        self._is_round_open = self._is_snapshot_known = False
        self._messages, self._answers = [], []
        self._handed_out = done
        return done

    def advance(self, done: Ready) -> None:
        """All of this Ready is saved, sent and applied."""
        assert done is self._handed_out, "advance takes the very Ready that was handed out last"
        self._handed_out = None
        if done.snapshot is not None:
            if done.snapshot is self._log.unsaved_snapshot:
                self._log.unsaved_snapshot = None
            self._log.mark_applied(done.snapshot.index)
        if done.committed:
            self._log.mark_applied(done.committed[-1].index)
        if done.entries:
            self._log.mark_saved(done.entries)
            if self._role is LEADER:
                self._acknowledge_own_log()
                self._commit_what_a_quorum_holds()
        self._stand_if_asked()

    def status(self) -> Status:
        views = {id: follower.view() for id, follower in self._tracker.followers.items()}
        return Status(
            self._id, self._role, self._term, self._vote, self._leader, self._log.commit, self._log.applied,
            self._log.last_index, self._tracker.members, views,
        )  # fmt: skip

    # Roles (5.1, 5.2)

    def _become_follower(self, term: int, leader: NodeId) -> None:
        if term != self._term:
            self._term, self._vote = term, NOBODY
        self._take_role(FOLLOWER, leader)

    def _become_pre_candidate(self) -> None:
        """Its term stays: only who can win moves it (thesis 9.6)."""
        self._take_role(PRE_CANDIDATE, NOBODY)
        self._ask_for_votes(PRE_VOTE, self._term + 1)

    def _become_candidate(self, context: bytes = b"") -> None:
        """To begin an election, increment the term, vote for oneself, ask all others (5.2)."""
        self._term, self._vote = self._term + 1, self._id
        self._take_role(CANDIDATE, NOBODY)
        self._ask_for_votes(VOTE, self._term, context)

    def _become_leader(self) -> None:
        """An empty entry at once: what earlier terms left is committed with it (5.4.2, 8)."""
        self._take_role(LEADER, self._id)
        self._tracker.begin(self._log.last_index + 1)
        self._acknowledge_own_log()
        left = self._log.between(self._log.commit + 1, self._log.last_index)
        self._uncommitted_bytes = sum(len(entry.data) for entry in left)
        self._heartbeat_elapsed = self._round = 0
        self._is_round_open = False
        self._append(b"")

    def _take_role(self, role: Role, leader: NodeId) -> None:
        self._role, self._leader = role, leader
        self._restart_timer()
        self._votes = {}
        self._is_asked_to_stand = False
        self._tracker.followers = {}
        self._transfer_to = NOBODY
        self._reads, self._early_reads = deque(), []

    def _restart_timer(self) -> None:
        self._elapsed = 0
        self._draw_timeout()

    def _draw_timeout(self) -> None:
        """Each node waits a time of its own, so that split votes are rare (5.2)."""
        self._timeout = self._rng.choice(self._timeouts)

    def _tick_leader(self) -> None:
        patience = self._config.election_ticks
        for id, follower in self._tracker.followers.items():
            follower.tick(is_here=id == self._id)
        if self._tracker.reached(lambda follower: -follower.silence) <= -patience:  # check-quorum (thesis 6.2)
            self._become_follower(self._term, NOBODY)
            return
        if self._transfer_to:
            self._transfer_elapsed += 1
            if self._transfer_elapsed >= patience:
                self._transfer_to = NOBODY
        self._heartbeat_elapsed += 1
        if self._heartbeat_elapsed >= self._config.heartbeat_ticks:
            self._send_heartbeats()

    # Terms (5.1)

    def _settle_term(self, message: Message) -> bool:
        """Whether to go on with a message; where its term is later, this one is the term from here on."""
        if message.type in _BALLOTS:
            return self._hears_candidate(message)
        if message.term > self._term:
            if message.type is not PRE_VOTE_REPLY or message.reject:
                leads = message.type in _FROM_LEADERS
                self._become_follower(message.term, message.sender if leads else NOBODY)
            return True
        if message.term < self._term and message.type not in _READS:
            if message.type in _FROM_LEADERS:  # tell it that its time is over
                self._refuse(message, self._log.last_index)
            return False
        return True

    def _hears_candidate(self, message: Message) -> bool:
        if message.term < self._term:
            self._send(_REPLY[message.type], message.sender, reject=True)
            return False
        heard_leader = self._leader != NOBODY and self._elapsed < self._config.election_ticks
        if heard_leader and message.context != TRANSFER:
            return False
        if message.term > self._term and message.type is VOTE:
            self._become_follower(message.term, NOBODY)
        return True

    # Elections (5.2, 5.4.1)

    def _may_campaign(self) -> bool:
        """A voter, by all that is committed as far as it knows."""
        return self._id in self._tracker.members.voters and self._is_settled() and not self._is_leaving_one()

    def _is_leaving_one(self) -> bool:
        """Of two voters, the one that is to go must not lead: were its log the longer one then, neither could win.

        The other one proposed that, so its log holds all that is in this one.
        """
        log = self._log
        changes = (entry for entry in log.between(log.commit + 1, log.last_index) if entry.kind is CHANGE)
        return len(self._tracker.members.voters) == 2 and any(
            self._id not in Members.from_bytes(change.data).voters for change in changes
        )

    def _is_settled(self) -> bool:
        log = self._log
        return not log.unsaved_snapshot and not log.has_change(log.commit)

    def _ask_for_votes(self, kind: MessageType, term: int, context: bytes = b"") -> None:
        for id in sorted(self._tracker.members.voters - {self._id}):
            self._messages.append(
                Message(
                    kind, id, self._id, term, self._log.last_index, self._log.last_term, context=context
                )
            )  # fmt: skip
        self._count_vote(self._id, granted=True)

    def _count_vote(self, voter: NodeId, granted: bool) -> None:
        self._votes.setdefault(voter, granted)
        if self._tracker.is_won(self._votes):
            if self._role is PRE_CANDIDATE:
                self._become_candidate()
            else:
                self._become_leader()
        elif self._tracker.is_lost(self._votes):
            self._become_follower(self._term, NOBODY)

    def _handle_ballot(self, message: Message) -> None:
        """One vote a term, first come, first served, and only for a log at least as up-to-date (5.2, 5.4.1)."""
        is_ahead = message.type is PRE_VOTE and message.term > self._term
        is_free = self._vote == NOBODY and self._leader == NOBODY
        if (is_ahead or is_free or self._vote == message.sender) and self._log.is_current(
            message.index, message.log_term
        ):
            if message.type is VOTE:
                self._vote = message.sender
                self._restart_timer()
            self._send(_REPLY[message.type], message.sender, term=message.term)
        else:
            self._send(_REPLY[message.type], message.sender, reject=True)

    def _handle_vote_reply(self, message: Message) -> None:
        wanted = PRE_VOTE_REPLY if self._role is PRE_CANDIDATE else VOTE_REPLY
        is_asking = self._role in (PRE_CANDIDATE, CANDIDATE) and message.type is wanted
        is_late = wanted is PRE_VOTE_REPLY and not message.reject and message.term != self._term + 1
        if is_asking and not is_late:
            self._count_vote(message.sender, not message.reject)

    def _handle_timeout_now(self, message: Message) -> None:
        """The leader asks this one to stand, and would vote for it (thesis 3.10)."""
        self._is_asked_to_stand = self._role is FOLLOWER
        self._stand_if_asked()

    def _stand_if_asked(self) -> None:
        """At once, or when what is committed was applied: a leader that left wrote its own removal just before."""
        if self._is_asked_to_stand and self._is_settled():
            self._is_asked_to_stand = False
            if self._may_campaign():
                self._become_candidate(TRANSFER)

    # Followers: replication (5.3), snapshots (7)

    def _follow(self, message: Message) -> None:
        """A leader speaks. Who is one itself, in this term, hears nothing: there is one leader a term (5.2)."""
        if self._role is LEADER:
            return
        if self._role is FOLLOWER:
            self._leader = message.sender
            self._restart_timer()
        else:
            self._become_follower(message.term, message.sender)
        self._handlers[message.type](self, message)

    def _handle_append(self, message: Message) -> None:
        log = self._log
        if message.index < log.commit:  # late: all of that is here already
            self._acknowledge(message, log.commit)
            return
        last = log.accept(message.index, message.log_term, message.entries)
        if last is None:
            self._refuse(message, log.last_of_term(message.index, message.log_term))
        else:
            if message.entries:
                self._is_asked_to_stand = False  # its leader goes on
            log.commit_to(min(message.commit, last))  # figure 2: the last new entry is the limit
            self._acknowledge(message, last)

    def _handle_heartbeat(self, message: Message) -> None:
        if message.commit <= self._log.last_index:
            self._log.commit_to(message.commit)
        self._send(HEARTBEAT_REPLY, message.sender, context=message.context)

    def _handle_snapshot(self, message: Message) -> None:
        """What is here already stays, with all that follows it; else begin anew from the snapshot (figure 13)."""
        snapshot, log = message.snapshot, self._log
        assert snapshot is not None
        if snapshot.index > log.commit:
            if log.term_at(snapshot.index) == snapshot.term:
                self._is_snapshot_known = log.commit_to(snapshot.index)
            else:
                log.restore(snapshot)
        self._acknowledge(message, log.commit)

    def _refuse(self, message: Message, agreed: int) -> None:
        """The logs may agree up to there, not further."""
        self._send(
            APPEND_REPLY, message.sender, index=message.index, reject=True,
            hint=agreed, log_term=self._log.term_at(agreed) or 0,
        )  # fmt: skip

    def _acknowledge(self, message: Message, index: int) -> None:
        self._send(APPEND_REPLY, message.sender, index=index)

    # Leaders: replication (5.3), commitment (5.4.2)

    def _must_take_proposals(self) -> None:
        if self._role is not LEADER:
            raise NotLeader(self._leader)
        if self._transfer_to:
            raise ProposalDropped(f"leadership goes to {self._transfer_to}")

    def _append(self, data: bytes, kind: EntryKind = COMMAND) -> int:
        entry = Entry(self._term, self._log.last_index + 1, data, kind)
        self._log.append(entry)
        self._uncommitted_bytes += len(data)
        return entry.index

    def _acknowledge_own_log(self) -> None:
        """A leader counts as a follower of itself, by what is on its disk."""
        self._tracker.followers[self._id].acknowledge(self._log.saved, self._log.first_index)

    def _behind(self) -> list[NodeId]:
        """The followers that have not been told everything, and may be told more before they answer."""
        last, commit, window = self._log.last_index, self._log.commit, self._config.max_inflight_messages
        return [
            id
            for id, follower in self._tracker.followers.items()
            if (follower.next <= last or follower.told_commit < commit)
            and not follower.is_paused(window)
            and id != self._id
        ]

    def _send_appends(self, id: NodeId) -> None:
        follower = self._tracker.followers[id]
        self._send_append(id)
        while follower.next <= self._log.last_index and not follower.is_paused(self._config.max_inflight_messages):
            self._send_append(id)

    def _send_append(self, id: NodeId) -> None:
        """The next entries for this follower, or the snapshot where they are compacted (7)."""
        follower, log = self._tracker.followers[id], self._log
        previous = follower.next - 1
        term = log.term_at(previous)
        if term is None:
            self._send(SNAPSHOT, id, snapshot=log.snapshot)
            follower.send_snapshot(log.snapshot.index)
            return
        last = min(log.last_index, previous + self._config.max_entries_per_message)
        entries = log.between(follower.next, last)
        self._send(APPEND, id, index=previous, log_term=term, entries=entries, commit=log.commit)
        follower.sent(last, log.commit, self._round)

    def _send_heartbeats(self) -> None:
        self._heartbeat_elapsed = 0
        self._round += 1
        self._is_round_open = True
        for id, follower in self._tracker.followers.items():
            if id != self._id:
                commit = min(follower.match, self._log.commit)
                self._send(HEARTBEAT, id, commit=commit, context=self._round.to_bytes(8))

    def _handle_append_reply(self, message: Message) -> None:
        follower = self._tracker.followers.get(message.sender)
        if follower is None:
            return
        follower.silence = 0
        if message.reject:
            agreed = self._log.last_of_term(message.hint, message.log_term) if message.log_term else message.hint
            follower.refuse(message.index, agreed)
        elif message.index <= self._log.last_index:
            if follower.acknowledge(message.index, self._log.first_index):
                self._commit_what_a_quorum_holds()
            if message.sender == self._transfer_to:
                self._hand_over_if_level()

    def _handle_heartbeat_reply(self, message: Message) -> None:
        follower = self._tracker.followers.get(message.sender)
        if follower is None:
            return
        answered = int.from_bytes(message.context) if len(message.context) == 8 else 0
        follower.answer_heartbeat(min(answered, self._round), patience=self._config.election_ticks)
        self._confirm_reads()

    def _commit_what_a_quorum_holds(self) -> None:
        """Only an entry of the leader's own term is committed by counting; those before it come with it (5.4.2)."""
        log = self._log
        before, index = log.commit, self._tracker.reached(lambda follower: follower.match)
        if log.term_at(index) == self._term and log.commit_to(index):
            self._uncommitted_bytes -= sum(len(entry.data) for entry in log.between(before + 1, index))
            early, self._early_reads = self._early_reads, []
            for id, context in early:
                self._read(id, context)

    # Reads (thesis 6.4)

    def _read(self, id: NodeId, context: bytes) -> None:
        if self._log.term_at(self._log.commit) != self._term:
            self._early_reads.append((id, context))
            return
        if not self._is_round_open:
            self._send_heartbeats()
        self._reads.append((self._round, id, ReadState(self._log.commit, context)))
        self._confirm_reads()

    def _confirm_reads(self) -> None:
        """Answer those asked before a round of heartbeats that a majority has answered: no other leader was there."""
        if not self._reads:
            return
        self._tracker.followers[self._id].round = self._round
        confirmed = self._tracker.reached(lambda follower: follower.round)
        while self._reads and self._reads[0][0] <= confirmed:
            _, id, answer = self._reads.popleft()
            if id == self._id:
                self._answers.append(answer)
            else:
                self._send(READ_INDEX_REPLY, id, index=answer.index, context=answer.context)

    def _handle_read_index(self, message: Message) -> None:
        if self._role is LEADER:
            self._read(message.sender, message.context)

    def _handle_read_index_reply(self, message: Message) -> None:
        self._answers.append(ReadState(message.index, message.context))

    # Transfer (thesis 3.10) and membership (thesis 4)

    def _hand_over_if_level(self) -> None:
        if self._transfer_to and self._tracker.followers[self._transfer_to].match == self._log.last_index:
            self._send(TIMEOUT_NOW, self._transfer_to)

    def _reason_against(self, members: Members) -> str:
        now = self._tracker.members.voters
        if not members.voters:
            return "somebody must vote"
        if members.voters & members.learners:
            return "nobody votes and learns at once"
        if len(now ^ members.voters) > 1:
            return "one voter at a time may come or go"
        if len(now) == 2 and members.voters == now - {self._id}:
            return "of two voters the leader may not remove itself, for its log may be the longer one: transfer first"
        if self._log.term_at(self._log.commit) != self._term:
            return "this leader has not committed in its own term yet"
        if self._log.has_change(self._log.last_index):
            return "an earlier change was not applied yet"
        return ""

    def _leave(self) -> None:
        """A leader that is none of the voters any more asks the foremost of them to stand, and counts no more."""
        voters = {id: self._tracker.followers[id].match for id in sorted(self._tracker.members.voters)}
        foremost = max(voters, key=lambda id: voters[id])
        if voters[foremost] == self._log.last_index:
            self._send(TIMEOUT_NOW, foremost)
        self._become_follower(self._term, NOBODY)

    # Small things

    def _is_state_told(self) -> bool:
        told = self._told
        return self._log.commit == told.commit and self._term == told.term and self._vote == told.vote

    def _send(self, kind: MessageType, to: NodeId, *, term: int | None = None, **fields: Any) -> None:
        self._messages.append(Message(kind, to, self._id, self._term if term is None else term, **fields))

    _handlers: Mapping[MessageType, Callable[["RaftNode", Message], None]] = {
        PRE_VOTE: _handle_ballot,
        VOTE: _handle_ballot,
        PRE_VOTE_REPLY: _handle_vote_reply,
        VOTE_REPLY: _handle_vote_reply,
        APPEND: _handle_append,
        HEARTBEAT: _handle_heartbeat,
        SNAPSHOT: _handle_snapshot,
        APPEND_REPLY: _handle_append_reply,
        HEARTBEAT_REPLY: _handle_heartbeat_reply,
        READ_INDEX: _handle_read_index,
        READ_INDEX_REPLY: _handle_read_index_reply,
        TIMEOUT_NOW: _handle_timeout_now,
    }
