"""What a leader knows of each follower, and what a quorum makes of it.

A follower is in one of three states:

    probe       where its log and ours agree is not known: one append at a time, each a question
    replicate   known: appends stream, up to so many unacknowledged
    snapshot    what it lacks was compacted: a snapshot is on its way, and nothing else

                 ack                       refused, quiet or unreachable
    probe ─────────────────▶ replicate ─────────────────────────────────▶ probe
    probe ── compacted ────▶ snapshot ── ack ──▶ replicate;  no ack for long ──▶ probe
"""

from collections import deque
from collections.abc import Callable, Mapping

from cluster.raft.messages import Members, NodeId, Progress


class Follower:
    """One of them, the leader itself included, whose `match` is how far its own log was saved."""

    def __init__(self, next_index: int) -> None:
        self.match = 0  # the highest index known to be on its disk (figure 2: matchIndex)
        self.next = next_index  # the next one to send (figure 2: nextIndex)
        self.state = "probe"
        self.silence = 0  # ticks since it was heard
        self.round = 0  # the latest round of heartbeats that it answered
        self.told_commit = 0
        self.inflight: deque[tuple[int, int]] = deque()  # of each append not acknowledged: its last index, the round
        self.is_waiting = False  # in probe: for the answer
        self.snapshot_ticks = 0  # in snapshot: since it was sent

    def view(self) -> Progress:
        return Progress(self.match, self.next, self.state)

    def tick(self, is_here: bool) -> None:
        """One unit of time has passed; `is_here` for the leader itself, who hears itself."""
        self.silence = 0 if is_here else self.silence + 1
        self.snapshot_ticks += 1

    def is_paused(self, max_inflight: int) -> bool:
        """Whether nothing may be sent to it before it answers."""
        if self.state == "replicate":
            return len(self.inflight) >= max_inflight
        return self.state == "snapshot" or self.is_waiting

    def probe(self) -> None:
        self._enter("probe")
        self.next = self.match + 1

    def send_snapshot(self, index: int) -> None:
        self._enter("snapshot")
        self.next = index + 1
        self.snapshot_ticks = 0

    def sent(self, last: int, commit: int, heartbeats: int) -> None:
        """An append that ends at `last` is on its way, after the heartbeats of that round."""
        self.told_commit = commit
        if self.state == "replicate":
            self.inflight.append((last, heartbeats))
            self.next = last + 1
        else:
            self.is_waiting = True

    def acknowledge(self, index: int, first_index: int) -> bool:
        """It holds everything up to `index`; our own log begins at `first_index`. Whether that is news."""
        is_news = index > self.match
        self.match = max(self.match, index)
        self.next = max(self.next, self.match + 1)
        if self.state == "replicate":
            while self.inflight and self.inflight[0][0] <= index:
                self.inflight.popleft()
        elif self.state == "probe" or self.match + 1 >= min(first_index, self.next):
            self._enter("replicate")
            self.next = self.match + 1
        return is_news

    def refuse(self, index: int, agreed: int) -> None:
        """It refused an append after `index`, and may agree up to `agreed`. An old refusal changes nothing."""
        if self.state == "replicate":
            if index > self.match:
                self.probe()
        elif self.state == "probe" and index == self.next - 1:
            self.next = max(self.match + 1, min(index, agreed + 1))
            self.is_waiting = False

    def answer_heartbeat(self, heartbeats: int, patience: int) -> None:
        """It lives. Messages nearly keep their order: what it did not answer before this it never received, most
        likely, and is asked again. Where that is wrong, something was sent in vain.
        """
        self.silence = 0
        self.is_waiting = False
        self.round = max(self.round, heartbeats)
        is_lost = self.state == "replicate" and self.inflight and self.inflight[0][1] < heartbeats
        if is_lost or (self.state == "snapshot" and self.snapshot_ticks >= patience):
            self.probe()

    def _enter(self, state: str) -> None:
        self.state = state
        self.inflight.clear()
        self.is_waiting = False


class Tracker:
    """All members. Those who vote decide; those who only learn are sent the same."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self.followers: dict[NodeId, Follower] = {}

    @property
    def quorum(self) -> int:
        return len(self.members.voters) // 2 + 1

    def begin(self, next_index: int) -> None:
        """A new leader knows nothing of anyone, and tries its own end first (5.3)."""
        self.followers = {id: Follower(next_index) for id in sorted(self.members.everyone)}

    def change(self, members: Members, next_index: int) -> None:
        """From now on these, for the bookkeeping of a leader too."""
        self.members = members
        if self.followers:
            known = self.followers
            self.followers = {id: known.get(id) or Follower(next_index) for id in sorted(members.everyone)}

    def reached(self, how_far: Callable[[Follower], int]) -> int:
        """What a quorum of the voters has reached, at least."""
        return sorted([how_far(self.followers[id]) for id in self.members.voters])[-self.quorum]

    def is_won(self, votes: Mapping[NodeId, bool]) -> bool:
        """Whether a majority of the voters said yes (5.2)."""
        return self._count(votes, True) >= self.quorum

    def is_lost(self, votes: Mapping[NodeId, bool]) -> bool:
        """Whether so many said no that a majority cannot be had."""
        return len(self.members.voters) - self._count(votes, False) < self.quorum

    def _count(self, votes: Mapping[NodeId, bool], answer: bool) -> int:
        return sum(votes.get(id) is answer for id in self.members.voters)
