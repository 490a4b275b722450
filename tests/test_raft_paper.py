"""Raft's paper, sentence by sentence: "In Search of an Understandable Consensus Algorithm", extended version.

Each test stands for the sentence in its docstring, from the section in its name: init, act, check.
"""

import random
from collections import Counter

import pytest

from cluster.raft import (
    NOBODY,
    Config,
    Entry,
    HardState,
    Members,
    Message,
    MessageType,
    NodeId,
    NotLeader,
    Role,
    Snapshot,
)
from tests.raft_cluster import (
    Cluster,
    Machine,
    in_role,
    lead,
    log_of,
    machine,
    members,
    message,
    of,
    only,
    saved,
    stand,
)

PRE_VOTE, PRE_VOTE_REPLY = MessageType.PRE_VOTE, MessageType.PRE_VOTE_REPLY
VOTE, VOTE_REPLY = MessageType.VOTE, MessageType.VOTE_REPLY
APPEND, APPEND_REPLY = MessageType.APPEND, MessageType.APPEND_REPLY
HEARTBEAT, HEARTBEAT_REPLY = MessageType.HEARTBEAT, MessageType.HEARTBEAT_REPLY
SNAPSHOT = MessageType.SNAPSHOT
E = Config(1).election_ticks
FIVE = (1, 2, 3, 4, 5)


# 5.1 Raft basics


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", [APPEND, APPEND_REPLY, HEARTBEAT, HEARTBEAT_REPLY, VOTE_REPLY])
def test_5_1_a_larger_term_is_taken_over(role: Role, kind: MessageType) -> None:
    """If one server's current term is smaller than the other's, it updates its current term to the larger value.

    If a candidate or leader discovers that its term is out of date, it immediately reverts to follower state.
    """
    one = in_role(role)
    one.receive(message(kind, 2, 9))
    assert (one.role, one.term) == (Role.FOLLOWER, 9)
    assert one.disk.saved.hard_state.term == 9


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", [APPEND, HEARTBEAT, SNAPSHOT, VOTE, PRE_VOTE])
def test_5_1_a_request_with_a_stale_term_is_rejected(role: Role, kind: MessageType) -> None:
    """If a server receives a request with a stale term number, it rejects the request."""
    one = in_role(role)
    term, log, commit = one.term, one.log, one.commit
    snapshot = Snapshot(5, 0, members((1, 2, 3))) if kind is SNAPSHOT else None
    entries = (Entry(0, len(log) + 1),) if kind is APPEND else ()
    last = len(log) if kind is APPEND else 99
    (reply,) = one.receive(
        message(kind, 3, term - 1, index=last, log_term=log[-1] if log else 0, entries=entries, snapshot=snapshot)
    )
    assert (reply.to, reply.term, reply.reject) == (3, term, True)
    assert (one.role, one.term, one.log, one.commit) == (role, term, log, commit)


def test_5_1_a_leader_of_an_old_term_learns_that_it_is_over() -> None:
    """Current terms are exchanged whenever servers communicate."""
    cluster = Cluster((1, 2, 3))
    cluster.elect(1)
    cluster.cut(1)
    cluster[2].tick(2 * E - 1)
    cluster[3].tick(2 * E - 1)
    cluster.elect(2)
    cluster.heal()
    cluster.tick(1)
    cluster.deliver(to=3, kind=HEARTBEAT)
    cluster.deliver(to=1)
    assert (cluster[1].role, cluster[1].term) == (Role.FOLLOWER, 2)


def test_5_1_the_current_term_increases_monotonically_over_time() -> None:
    """Each server stores a current term number, which increases monotonically over time. Also over a crash."""
    one = machine()
    seen = []
    for term in (3, 2, 7, 5, 7, 1):
        one.receive(message(HEARTBEAT, 2, term))
        seen.append(one.term)
        one.restart()
        seen.append(one.term)
    assert seen == [3, 3, 3, 3, 7, 7, 7, 7, 7, 7, 7, 7]


def test_5_1_a_reply_of_an_older_term_counts_for_nothing() -> None:
    """Raft ensures that there is at most one leader in a given term: what was said in another is no part of it."""
    one = machine(terms=(1, 1, 2), term=2)
    lead(one)
    assert one.term == 3
    one.receive(*[message(APPEND_REPLY, peer, 2, index=4) for peer in (2, 3)])
    assert one.commit == 0
    one.receive(message(APPEND_REPLY, 2, 3, index=4))
    assert one.commit == 4


# 5.2 Leader election


def test_5_2_servers_start_as_followers() -> None:
    """When servers start up, they begin as followers."""
    for written in ({}, {"term": 5, "vote": 1}, {"terms": (1, 2), "commit": 2}):
        status = machine(**written).node.status()
        assert (status.role, status.leader) == (Role.FOLLOWER, NOBODY)


@pytest.mark.parametrize("kind", [APPEND, HEARTBEAT, SNAPSHOT])
def test_5_2_a_follower_remains_one_while_it_hears_a_leader(kind: MessageType) -> None:
    """A server remains in follower state as long as it receives valid RPCs from a leader or candidate."""
    one = machine(term=1)
    snapshot = Snapshot(0, 0, members((1, 2, 3)))
    for _ in range(20):
        sent = one.tick(E - 1)
        one.receive(message(kind, 2, 1, snapshot=snapshot))
        assert not sent and (one.role, one.term) == (Role.FOLLOWER, 1)


def test_5_2_granting_a_vote_restarts_the_timer() -> None:
    """Rules for followers: convert to candidate if the timeout elapses without granting vote to candidate."""
    one = machine()
    for term in range(1, 20):
        one.receive(message(VOTE_REPLY, 3, term))  # it learns the term before it is asked
        assert not one.tick(E - 1)
        assert not only(VOTE_REPLY, one.receive(message(VOTE, 2, term))).reject
        assert not one.tick(E - 1)
    assert one.role is Role.FOLLOWER


def test_5_2_leaders_send_periodic_heartbeats_to_all_followers() -> None:
    """Leaders send periodic heartbeats to all followers in order to maintain their authority."""
    one = Machine(Config(1, heartbeat_ticks=3), saved())
    lead(one)
    beats = []
    for _ in range(9):
        beats.append([each.to for each in of(HEARTBEAT, one.tick())])
        one.receive(message(HEARTBEAT_REPLY, 2, one.term))
    assert beats == [[], [], [2, 3]] * 3


def test_5_2_a_follower_that_hears_nobody_begins_an_election() -> None:
    """If a follower receives no communication over the election timeout, it assumes there is no viable leader."""
    one = machine()
    assert not one.tick(E - 1)
    sent = one.tick(E)
    assert [(each.type, each.to) for each in sent] == [(PRE_VOTE, 2), (PRE_VOTE, 3)]


def test_5_2_to_begin_an_election_it_increments_its_term_votes_for_itself_and_asks_all_others() -> None:
    """To begin an election, a follower increments its current term and transitions to candidate state.

    It then votes for itself and issues RequestVote RPCs in parallel to each of the other servers. The RPC includes
    information about the candidate's log (5.4.1).
    """
    one = machine(FIVE, terms=(1, 1, 2), term=2)
    asked = stand(one)
    assert (one.role, one.term) == (Role.CANDIDATE, 3)
    assert asked == [Message(VOTE, to, 1, 3, index=3, log_term=2) for to in (2, 3, 4, 5)]
    assert one.disk.saved.hard_state == HardState(3, vote=1)


@pytest.mark.parametrize(
    ("size", "granted", "refused", "role"),
    [
        (1, 0, 0, Role.LEADER),
        (2, 0, 0, Role.CANDIDATE), (2, 1, 0, Role.LEADER), (2, 0, 1, Role.FOLLOWER),
        (3, 0, 0, Role.CANDIDATE), (3, 1, 0, Role.LEADER), (3, 1, 1, Role.LEADER), (3, 0, 1, Role.CANDIDATE),
        (3, 0, 2, Role.FOLLOWER),
        (4, 1, 1, Role.CANDIDATE), (4, 2, 1, Role.LEADER), (4, 1, 2, Role.FOLLOWER),
        (5, 1, 2, Role.CANDIDATE), (5, 2, 2, Role.LEADER), (5, 1, 3, Role.FOLLOWER), (5, 4, 0, Role.LEADER),
    ],
)  # fmt: skip
def test_5_2_a_candidate_wins_with_a_majority_of_the_full_cluster(
    size: int, granted: int, refused: int, role: Role
) -> None:
    """A candidate wins an election if it receives votes from a majority of the servers for the same term."""
    one = machine(tuple(range(1, size + 1)))
    stand(one)
    voters = iter(range(2, size + 1))
    one.receive(*[message(VOTE_REPLY, next(voters), 1) for _ in range(granted)])
    one.receive(*[message(VOTE_REPLY, next(voters), 1, reject=True) for _ in range(refused)])
    assert (one.role, one.term) == (role, 1)


def test_5_2_votes_of_the_same_server_or_of_no_voter_count_once_or_not_at_all() -> None:
    """A majority of the servers in the full cluster: of different ones, that are in it."""
    one = Machine(Config(1), saved(FIVE, learners=(6,)))
    stand(one)
    one.receive(*[message(VOTE_REPLY, 2, 1)] * 4, message(VOTE_REPLY, 6, 1), message(VOTE_REPLY, 7, 1))
    one.receive(message(PRE_VOTE_REPLY, 3, 1), message(PRE_VOTE_REPLY, 4, 2), message(APPEND_REPLY, 5, 1))
    assert one.role is Role.CANDIDATE


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize(("first", "second", "is_granted"), [(2, 2, True), (3, 3, True), (2, 3, False), (3, 2, False)])
def test_5_2_one_vote_a_term_first_come_first_served(
    first: NodeId, second: NodeId, is_granted: bool, is_restarted: bool
) -> None:
    """Each server will vote for at most one candidate in a given term. Also when it crashed in between."""
    one = machine()
    assert not only(VOTE_REPLY, one.receive(message(VOTE, first, 1))).reject
    if is_restarted:
        one.restart()
    reply = only(VOTE_REPLY, one.receive(message(VOTE, second, 1)))
    assert (reply.to, reply.term, reply.reject) == (second, 1, not is_granted)
    assert one.disk.saved.hard_state == HardState(1, vote=first)


def test_5_2_a_vote_is_on_the_disk_before_it_is_sent() -> None:
    """Figure 2: updated on stable storage before responding to RPCs."""
    one = machine()
    one.node.step(message(VOTE, 2, 4))
    ready = one.node.ready()
    assert only(VOTE_REPLY, list(ready.messages)).to == 2
    assert ready.hard_state == HardState(4, vote=2) and ready.must_sync


def test_5_2_a_candidate_that_crashed_does_not_vote_for_another_in_its_term() -> None:
    """It voted for itself, and a server will vote for at most one candidate in a given term."""
    one = machine()
    stand(one)
    one.restart()
    assert only(VOTE_REPLY, one.receive(message(VOTE, 2, 1, index=9, log_term=1))).reject


def test_5_2_once_elected_a_leader_establishes_its_authority() -> None:
    """It then sends heartbeat messages to all of the other servers to establish its authority."""
    one = machine(FIVE, terms=(1, 1), term=1)
    sent = lead(one)
    blank = Entry(2, 3)
    assert sent == [Message(APPEND, to, 1, 2, index=2, log_term=1, entries=(blank,)) for to in (2, 3, 4, 5)]
    assert one.node.status().leader == 1


@pytest.mark.parametrize("role", [Role.PRE_CANDIDATE, Role.CANDIDATE])
@pytest.mark.parametrize("kind", [APPEND, HEARTBEAT])
@pytest.mark.parametrize("ahead", [0, 1])
def test_5_2_a_candidate_recognises_a_leader_of_its_term(role: Role, kind: MessageType, ahead: int) -> None:
    """If the leader's term is at least as large as its own, the candidate returns to follower state."""
    one = in_role(role)
    term = one.term + ahead
    one.receive(message(kind, 3, term))
    status = one.node.status()
    assert (status.role, status.term, status.leader) == (Role.FOLLOWER, term, 3)


def test_5_2_a_candidate_goes_on_when_the_leader_is_of_an_older_term() -> None:
    """If the term in the RPC is smaller, the candidate rejects the RPC and continues in candidate state."""
    one = in_role(Role.CANDIDATE)
    reply = only(APPEND_REPLY, one.receive(message(APPEND, 3, one.term - 1, entries=log_of((1,)))))
    assert reply.reject and reply.term == 2
    assert one.role is Role.CANDIDATE and not one.log


def test_5_2_a_split_vote_ends_in_a_new_election_of_a_later_term() -> None:
    """Each candidate will time out and start a new election by incrementing its term."""
    one = machine((1, 2, 3, 4))
    stand(one)
    one.receive(message(VOTE_REPLY, 2, 1), message(VOTE_REPLY, 3, 1, reject=True))
    asked = of(PRE_VOTE, one.tick(2 * E - 1))
    assert [(each.to, each.term) for each in asked] == [(2, 2), (3, 2), (4, 2)]
    sent = one.receive(message(PRE_VOTE_REPLY, 3, 2), message(PRE_VOTE_REPLY, 4, 2))
    assert [(each.to, each.term) for each in of(VOTE, sent)] == [(2, 2), (3, 2), (4, 2)]


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE])
def test_5_2_election_timeouts_are_chosen_randomly_from_a_fixed_interval(role: Role) -> None:
    """Election timeouts are chosen randomly from a fixed interval: uniformly from [E, 2E), anew each time."""
    one = machine()
    waits: Counter[int] = Counter()
    for term in range(1, 1001):
        if role is Role.FOLLOWER:
            one.receive(message(HEARTBEAT, 2, term))
        else:
            stand(one)
            assert one.role is Role.CANDIDATE
        waits[next(wait for wait in range(1, 9 * E) if one.tick())] += 1
    assert set(waits) == set(range(E, 2 * E))
    assert all(60 <= times <= 140 for times in waits.values()), waits


def test_5_2_candidates_restart_their_timeout_at_the_start_of_an_election() -> None:
    """Each candidate restarts its randomized election timeout at the start of an election."""
    one = machine()
    for _ in range(50):
        stand(one)
        assert not one.tick(E - 1)
        assert one.tick(E)


def test_5_2_in_most_cases_only_a_single_server_times_out() -> None:
    """This spreads out the servers so that in most cases only a single server will time out."""
    alone = 0
    for seed in range(200):
        nodes = [Machine(Config(id), saved(FIVE), seed) for id in FIVE]
        awake = next(awake for _ in range(2 * E) if (awake := [one.id for one in nodes if one.tick()]))
        alone += len(awake) == 1
    assert alone > 100


def test_5_2_there_is_at_most_one_leader_in_a_term() -> None:
    """Election Safety: at most one leader can be elected in a given term."""
    for seed in range(10):
        cluster, rng = Cluster(FIVE), random.Random(seed)
        leaders: dict[int, set[NodeId]] = {}
        for _ in range(200):
            cluster.tick(rng.choice(FIVE), rng.randrange(E))
            rng.shuffle(cluster.in_flight)
            cluster.deliver(to=rng.choice(FIVE))
            if rng.random() < 0.05:
                cluster[rng.choice(FIVE)].restart()
            for one in cluster:
                if one.role is Role.LEADER:
                    leaders.setdefault(one.term, set()).add(one.id)
        assert leaders and all(len(ids) == 1 for ids in leaders.values()), (seed, leaders)


# 5.3 Log replication


def test_5_3_the_leader_appends_and_issues_append_entries_to_each_other_server() -> None:
    """The leader appends the command to its log as a new entry, then issues AppendEntries to each of the others."""
    cluster = Cluster((1, 2, 3))
    one = cluster.elect(1)
    index = one.node.propose(b"x")
    sent = one.work()
    new = Entry(1, 2, b"x")
    assert index == 2 and one.disk.saved.entries[-1] == new
    assert sent == [Message(APPEND, to, 1, 1, index=1, log_term=1, entries=(new,), commit=1) for to in (2, 3)]


@pytest.mark.parametrize(
    ("size", "acceptors", "is_committed"),
    [
        (1, 0, True), (2, 0, False), (2, 1, True), (3, 0, False), (3, 1, True), (3, 2, True),
        (4, 1, False), (4, 2, True), (5, 1, False), (5, 2, True), (5, 4, True),
    ],
)  # fmt: skip
def test_5_3_an_entry_is_committed_once_a_majority_holds_it(size: int, acceptors: int, is_committed: bool) -> None:
    """A log entry is committed once the leader that created it has replicated it on a majority of the servers.

    When the entry has been safely replicated, the leader applies the entry to its state machine.
    """
    cluster = Cluster(range(1, size + 1))
    one = cluster.elect(1)
    one.node.propose(b"x")
    cluster.work()
    for id in range(2, 2 + acceptors):
        cluster.deliver(to=id)
    cluster.deliver(to=1)
    assert (one.commit == 2, one.state == ["x"]) == (is_committed, is_committed)


@pytest.mark.parametrize("terms", [(1,), (1, 2), (1, 1, 2), (1, 2, 2, 3)])
def test_5_3_committing_commits_all_preceding_entries(terms: tuple[int, ...]) -> None:
    """This also commits all preceding entries in the leader's log, including those created by previous leaders."""
    one = machine(terms=terms)
    lead(one)
    one.node.propose(b"x")
    one.work()
    one.receive(message(APPEND_REPLY, 2, one.term, index=len(terms) + 2))
    assert [entry.index for entry in one.applied] == list(range(1, len(terms) + 3))
    assert [entry.term for entry in one.applied] == [*terms, one.term, one.term]


def test_5_3_the_leader_includes_the_highest_committed_index_in_future_append_entries() -> None:
    """It includes that index in future AppendEntries RPCs (including heartbeats), so that others find out."""
    cluster = Cluster((1, 2, 3))
    one = cluster.elect(1)
    one.node.propose(b"x")
    cluster.work()
    cluster.deliver(to=2)
    cluster.deliver(to=1)
    assert {(each.to, each.commit) for each in cluster.in_flight if each.type is APPEND} == {(2, 2), (3, 1), (3, 2)}
    cluster.take()
    cluster.tick(1)
    assert [each.commit for each in cluster.take(to=2, kind=HEARTBEAT)] == [2]


def test_5_3_a_follower_applies_in_log_order_what_it_learns_is_committed() -> None:
    """Once a follower learns that an entry is committed, it applies it to its local state machine (in log order)."""
    one = machine()
    entries = log_of((1, 1, 1, 1))
    one.receive(message(APPEND, 2, 1, entries=entries))
    assert one.applied == []
    one.receive(message(HEARTBEAT, 2, 1, commit=3))
    assert one.applied == list(entries[:3])
    one.receive(message(APPEND, 2, 1, index=4, log_term=1, commit=4))
    assert one.applied == list(entries)


@pytest.mark.parametrize(
    ("previous", "count", "leader_commit", "commit"),
    [(0, 1, 1, 1), (0, 1, 9, 1), (0, 2, 9, 2), (2, 0, 9, 2), (2, 1, 3, 3), (2, 2, 3, 3), (4, 0, 9, 4), (1, 1, 1, 1)],
)
def test_5_3_the_commit_index_never_passes_the_last_new_entry(
    previous: int, count: int, leader_commit: int, commit: int
) -> None:
    """Figure 2: if leaderCommit > commitIndex, set commitIndex = min(leaderCommit, index of last new entry).

    What lies beyond the last new entry may be of another leader, and conflict.
    """
    one = machine(terms=(1, 1, 1, 1), term=2)
    entries = log_of((1,) * count, first=previous + 1)
    term = 1 if previous else 0
    one.receive(message(APPEND, 2, 2, index=previous, log_term=term, entries=entries, commit=leader_commit))
    assert one.commit == commit


def test_5_3_the_commit_index_increases_monotonically() -> None:
    """Figure 2: the highest log entry known to be committed increases monotonically."""
    one = machine(terms=(1, 1, 1, 1), term=1)
    one.receive(message(APPEND, 2, 1, index=4, log_term=1, commit=4))
    one.receive(
        message(APPEND, 2, 1, index=4, log_term=1, commit=1),
        message(APPEND, 2, 1, index=0, log_term=0, entries=log_of((1, 1)), commit=2),
        message(HEARTBEAT, 2, 1, commit=0),
        message(HEARTBEAT, 2, 1, commit=3),
    )
    assert one.commit == 4
    assert [entry.index for entry in one.applied] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("index", "term", "is_accepted"),
    [(0, 0, True), (1, 1, True), (2, 2, True), (1, 2, False), (2, 1, False), (3, 2, False), (3, 3, False)],
)
def test_5_3_a_follower_refuses_what_does_not_follow_its_log(index: int, term: int, is_accepted: bool) -> None:
    """If the follower does not find an entry with the same index and term, then it refuses the new entries."""
    one = machine(terms=(1, 2), term=2)
    entries = (Entry(4, index + 1, b"new"),)
    reply = only(APPEND_REPLY, one.receive(message(APPEND, 2, 4, index=index, log_term=term, entries=entries)))
    assert reply.reject is not is_accepted
    assert reply.index == (index + 1 if is_accepted else index)
    assert (entries[0] in one.disk.saved.entries) is is_accepted
    assert is_accepted or one.log == [1, 2]


@pytest.mark.parametrize(
    ("index", "term", "sent", "log"),
    [
        (2, 2, (3,), [1, 2, 3]),
        (1, 1, (3, 4), [1, 3, 4]),
        (0, 0, (1,), [1, 2]),
        (0, 0, (3,), [3]),
        (2, 2, (), [1, 2]),
        (0, 0, (1, 2, 2), [1, 2, 2]),
    ],
)
def test_5_3_a_conflicting_entry_goes_with_all_that_follow_it(
    index: int, term: int, sent: tuple[int, ...], log: list[int]
) -> None:
    """Figure 2: if an existing entry conflicts with a new one, delete it and all that follow; append what is new."""
    one = machine(terms=(1, 2), term=2)
    one.receive(message(APPEND, 2, 5, index=index, log_term=term, entries=log_of(sent, first=index + 1)))
    assert one.log == log
    one.restart()
    assert one.node.status().last_index == len(log)


def test_5_3_an_append_that_comes_late_takes_nothing_away() -> None:
    """Raft RPCs are idempotent (5.5): only if an existing entry conflicts is anything deleted."""
    one = machine()
    entries = log_of((1, 1, 1, 1))
    late = message(APPEND, 2, 1, entries=entries[:1])
    one.receive(message(APPEND, 2, 1, entries=entries), late, message(APPEND, 2, 1, index=1, log_term=1))
    assert one.log == [1, 1, 1, 1]
    replies = one.receive(late)
    assert [(each.reject, each.index) for each in replies] == [(False, 1)]


FIGURE_7 = {
    "a": (1, 1, 1, 4, 4, 5, 5, 6, 6),
    "b": (1, 1, 1, 4),
    "c": (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6),
    "d": (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7),
    "e": (1, 1, 1, 4, 4, 4, 4),
    "f": (1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3),
}


@pytest.mark.parametrize("follower", FIGURE_7)
def test_5_3_figure_7_the_leader_forces_followers_logs_to_duplicate_its_own(follower: str) -> None:
    """Conflicting entries in follower logs will be overwritten with entries from the leader's log."""
    cluster = Cluster((1, 2, 3))
    cluster.add(1, saved(terms=(1, 1, 1, 4, 4, 5, 5, 6, 6, 6), term=7))
    cluster.add(2, saved(terms=FIGURE_7[follower], term=7))
    cluster.add(3, saved(term=7))
    cluster.elect(1)
    assert cluster[1].term == 8
    assert cluster[2].log == cluster[1].log == [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 8]
    assert cluster[2].disk.saved.entries[:-1] == log_of(cluster[1].log[:-1])
    cluster.run(1)
    assert cluster[2].state == cluster[1].state


def test_5_3_next_index_starts_just_after_the_last_one_and_falls_by_terms() -> None:
    """When a leader first comes to power, it initializes all nextIndex values to the index just after its last.

    One AppendEntries RPC will be required for each term with conflicting entries, rather than one per entry.
    """
    one = machine(terms=(1,) * 5 + (4,) * 5 + (6,) * 5)
    (first, _) = lead(one)
    assert (first.index, first.log_term) == (15, 6)
    follower = Machine(Config(2), saved(terms=(1,) * 5 + (2,) * 2 + (3,) * 3 + (5,) * 3, term=6))
    asked, (answer,) = [first], follower.receive(first)
    while answer.reject:
        assert answer.index == asked[-1].index
        asked += one.receive(answer)
        (answer,) = follower.receive(asked[-1])
    assert [each.index for each in asked] == [15, 10, 5]
    assert (answer.index, follower.log) == (16, one.log)


def test_5_3_the_leader_retries_until_all_followers_store_all_entries() -> None:
    """If followers crash or run slowly, or if packets are lost, the leader retries AppendEntries indefinitely.

    Even after it has responded to the client.
    """
    cluster = Cluster((1, 2, 3))
    one = cluster.elect(1)
    one.node.propose(b"x")
    cluster.work()
    cluster.drop(to=3)
    cluster.stabilize()
    assert one.state == ["x"]
    for _ in range(30):
        cluster.tick(1)
        cluster.drop(to=3, kind=APPEND)
        cluster.stabilize()
        cluster.drop(to=3, kind=APPEND)
    assert one.role is Role.LEADER
    cluster[3].restart()
    cluster.run(3, 1)
    assert cluster[3].log == one.log and cluster[3].state == ["x"]


def test_5_3_a_leader_never_overwrites_or_deletes_entries_in_its_own_log() -> None:
    """Leader Append-Only: it only appends new entries."""
    one = machine(terms=(1, 2, 2), term=2)
    lead(one)
    before = one.disk.saved.entries
    one.receive(
        message(APPEND, 2, one.term, index=1, log_term=1, entries=(Entry(3, 2),)),
        message(APPEND_REPLY, 2, one.term, index=3, hint=1, log_term=1, reject=True),
        message(SNAPSHOT, 2, one.term, snapshot=Snapshot(9, 3, members((1, 2, 3)))),
    )
    assert one.role is Role.LEADER and one.disk.saved.entries == before
    one.node.propose(b"x")
    one.work()
    assert one.disk.saved.entries[:-1] == before


def test_5_3_if_two_entries_have_the_same_index_and_term_the_logs_are_identical_up_to_them() -> None:
    """Log Matching: whatever was lost, held back, doubled or reordered, and whoever crashed."""
    for seed in range(5):
        cluster, rng = Cluster((1, 2, 3), max_entries_per_message=2), random.Random(seed)
        for step in range(300):
            id = rng.choice((1, 2, 3))
            cluster.tick(id, rng.randrange(6))
            if cluster[id].role is Role.LEADER:
                cluster[id].node.propose(str(step).encode())
                cluster.work(id)
            rng.shuffle(cluster.in_flight)
            cluster.in_flight += rng.sample(cluster.in_flight, len(cluster.in_flight) // 8)
            cluster.deliver(to=rng.choice((1, 2, 3)))
            if rng.random() < 0.1:
                cluster.drop(to=rng.choice((1, 2, 3)))
            if rng.random() < 0.03:
                cluster[id].restart()
            logs = [one.disk.saved.entries for one in cluster]
            for left, right in [(0, 1), (0, 2), (1, 2)]:
                same = [n for n, both in enumerate(zip(logs[left], logs[right], strict=False)) if both[0] == both[1]]
                agreed = same[-1] + 1 if same else 0
                assert logs[left][:agreed] == logs[right][:agreed], seed
        assert max(one.commit for one in cluster) > 5, seed


# 5.4 Safety


@pytest.mark.parametrize("kind", [PRE_VOTE, VOTE])
@pytest.mark.parametrize(
    ("own", "index", "term", "is_granted"),
    [
        ((1,), 1, 1, True), ((1,), 2, 1, True), ((1, 1), 1, 1, False),
        ((1,), 1, 2, True), ((1,), 2, 2, True), ((1, 1), 1, 2, True),
        ((2,), 1, 1, False), ((2,), 2, 1, False), ((1, 2), 1, 1, False), ((1, 1), 0, 0, False), ((), 0, 0, True),
    ],
)  # fmt: skip
def test_5_4_1_a_voter_denies_its_vote_if_its_own_log_is_more_up_to_date(
    kind: MessageType, own: tuple[int, ...], index: int, term: int, is_granted: bool
) -> None:
    """If the logs end with different terms, the later is more up-to-date; if with the same, the longer is."""
    one = machine(terms=own, term=3)
    (reply,) = one.receive(message(kind, 2, 4, index=index, log_term=term))
    assert reply.reject is not is_granted
    assert one.disk.saved.hard_state.vote == (2 if is_granted and kind is VOTE else NOBODY)


def test_5_4_1_a_candidate_must_contact_a_majority_that_holds_every_committed_entry() -> None:
    """Leader Completeness: a candidate whose log lacks a committed entry cannot win, whoever can hear it."""
    cluster = Cluster((1, 2, 3))
    cluster.elect(1)
    cluster.cut(3)
    cluster.propose(1, "x")
    cluster.cut_links = {(1, 2), (2, 1), (1, 3), (3, 1)}
    for _ in range(5):
        cluster[2].tick(2 * E - 1)
        cluster.in_flight.clear()
        cluster[3].node.campaign()
        cluster.stabilize()
        assert cluster[3].role is not Role.LEADER
    cluster.elect(2)
    cluster.run(2, 2, 3)
    assert cluster[3].state == ["x"]


@pytest.mark.parametrize(("index", "commit"), [(1, 0), (2, 0), (3, 3)])
def test_5_4_2_only_entries_of_the_leaders_current_term_are_committed_by_counting_replicas(
    index: int, commit: int
) -> None:
    """Raft never commits log entries from previous terms by counting replicas."""
    one = machine(terms=(1, 2), term=2)
    lead(one)
    one.receive(*[message(APPEND_REPLY, peer, 3, index=index) for peer in (2, 3)])
    assert one.commit == commit


def figure_8() -> Cluster:
    """(c): S1, leader of term 4, has brought its entry of term 2 to S2 and S3; S5 wrote one in term 3."""
    cluster = Cluster(FIVE, max_entries_per_message=1)
    for id, terms in {1: (1, 2), 2: (1,), 3: (1,), 4: (1,), 5: (1, 3)}.items():
        cluster.add(id, saved(FIVE, terms=terms, term=3, commit=1))
    cluster.cut(5)
    cluster[1].node.campaign()
    cluster.work()
    for kind in (PRE_VOTE, PRE_VOTE_REPLY, VOTE, VOTE_REPLY, APPEND, APPEND_REPLY):
        cluster.deliver(kind=kind)
    for id in (2, 3):
        cluster.deliver(to=id, kind=APPEND)
    cluster.deliver(kind=APPEND_REPLY)
    assert [one.log for one in cluster] == [[1, 2, 4], [1, 2], [1, 2], [1], [1, 3]]
    progress = cluster[1].node.status().progress
    assert [progress[id].match for id in (1, 2, 3)] == [3, 2, 2]
    return cluster


def test_5_4_2_figure_8_an_old_entry_on_a_majority_can_still_be_overwritten() -> None:
    """A leader cannot immediately conclude that an entry from a previous term is committed once on a majority."""
    cluster = figure_8()
    assert cluster[1].commit == 1
    cluster.drop()
    cluster.heal()
    cluster.cut(1)
    cluster.let_down(2, 3, 4)
    cluster.elect(5)
    assert [one.log for one in cluster] == [[1, 2, 4]] + [[1, 3, 5]] * 4
    cluster.heal()
    cluster.run(2, 5)
    assert [one.log for one in cluster] == [[1, 3, 5]] * 5
    assert len({tuple(one.applied) for one in cluster}) == 1


def test_5_4_2_figure_8_an_entry_of_its_own_term_on_a_majority_commits_all_before_it() -> None:
    """(e): if S1 replicates an entry from its current term on a majority, then S5 cannot win an election."""
    cluster = figure_8()
    for id in (2, 3):
        cluster.deliver(to=id, kind=APPEND)
    cluster.deliver(to=1)
    assert cluster[1].commit == 3
    cluster.drop()
    cluster.heal()
    cluster.cut(1)
    for _ in range(5):
        cluster.let_down(2, 3, 4)
        cluster[5].node.campaign()
        cluster.stabilize()
    assert cluster[5].role is not Role.LEADER
    cluster.let_down(3, 4, 5)
    cluster.elect(2)
    assert [entry.term for entry in cluster[5].disk.saved.entries[:3]] == [1, 2, 4]


# 5.5 Follower and candidate crashes


def test_5_5_a_follower_that_crashed_is_sent_what_it_missed() -> None:
    """If the crashed server restarts, then the RPC will complete successfully."""
    cluster = Cluster((1, 2, 3))
    cluster.elect(1)
    cluster.cut(3)
    cluster.propose(1, "x", "y")
    cluster[3].restart()
    cluster.heal()
    cluster.run(3, 1)
    assert cluster[3].state == ["x", "y"]


@pytest.mark.parametrize("kind", [APPEND, HEARTBEAT, SNAPSHOT, VOTE, PRE_VOTE])
def test_5_5_requests_are_idempotent(kind: MessageType) -> None:
    """If a follower receives a request that it has answered already, it does no harm, and is answered as before."""
    one = machine(term=1)
    snapshot = Snapshot(3, 1, members((1, 2, 3)), b'["a"]') if kind is SNAPSHOT else None
    entries = log_of((1, 1)) if kind is APPEND else ()
    same = message(kind, 2, 2, entries=entries, snapshot=snapshot, commit=len(entries))
    first = one.receive(same)
    before = one.node.status(), one.disk.saved, one.state
    assert one.receive(same) == first
    assert (one.node.status(), one.disk.saved, one.state) == before


# 6 Cluster membership changes: what prevents disruption


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.LEADER])
@pytest.mark.parametrize("kind", [PRE_VOTE, VOTE])
def test_6_servers_disregard_requests_for_votes_when_they_believe_a_current_leader_exists(
    role: Role, kind: MessageType
) -> None:
    """If asked within the minimum election timeout of hearing from a leader, it does not update its term or vote."""
    one = in_role(role)
    term = one.term
    one.receive(message(HEARTBEAT, 2, term))
    one.tick(E - 1)
    before = one.disk.saved.hard_state
    assert one.receive(message(kind, 3, term + 5, index=99, log_term=term + 4)) == []
    assert (one.term, one.disk.saved.hard_state) == (term, before)


def test_6_a_server_votes_again_once_the_minimum_election_timeout_has_passed() -> None:
    """This does not affect normal elections, where each server waits at least a minimum election timeout."""
    for seed in range(20):
        one = Machine(Config(1), saved(term=1), seed)
        one.receive(message(HEARTBEAT, 2, 1))
        one.tick(E)
        assert not only(VOTE_REPLY, one.receive(message(VOTE, 3, 2))).reject


# 7 Log compaction


def follower_behind_the_log() -> tuple[Cluster, Snapshot]:
    """A leader, 1, that compacted what follower 3 lacks, which was cut off and now is not."""
    cluster = Cluster((1, 2, 3))
    cluster.elect(1)
    cluster.cut(3)
    cluster.propose(1, "x", "y", "z")
    cluster.run(1, 1, 2)
    snapshot = cluster[1].compact()
    cluster.heal()
    return cluster, snapshot


def test_7_each_server_takes_snapshots_of_committed_entries_only() -> None:
    """Each server takes snapshots independently, covering just the committed entries in its log: the applied ones."""
    one = machine(terms=(1, 1, 1), commit=2)
    one.work()
    with pytest.raises(ValueError):
        one.node.compact(Snapshot(3, 1, members((1, 2, 3))))
    one.compact(2)
    assert (one.node.status().last_index, one.log) == (3, [1, 1])


def test_7_the_last_included_index_and_term_support_the_consistency_check() -> None:
    """These are preserved to support the AppendEntries consistency check for the first entry after the snapshot."""
    one = machine(terms=(1, 1, 2), commit=3)
    one.work()
    one.compact()
    one.restart()
    assert only(VOTE_REPLY, one.receive(message(VOTE, 3, 3, index=3, log_term=1))).reject
    wrong = only(APPEND_REPLY, one.receive(message(APPEND, 2, 4, index=3, log_term=3, entries=(Entry(4, 4),))))
    right = only(APPEND_REPLY, one.receive(message(APPEND, 2, 4, index=3, log_term=2, entries=(Entry(4, 4),))))
    assert (wrong.reject, right.reject, right.index) == (True, False, 4)


def test_7_the_leader_sends_its_snapshot_to_followers_that_lag_too_far_behind() -> None:
    """When the leader has already discarded the next log entry that it needs to send to a follower."""
    cluster, snapshot = follower_behind_the_log()
    cluster.run(1, 1)
    assert cluster[3].disk.saved.snapshot == snapshot
    assert cluster[3].state == ["x", "y", "z"]
    assert cluster[1].node.status().progress[3].match == 4
    cluster.propose(1, "after")
    assert cluster[3].log == [1, 1] and cluster[1].node.status().progress[3].state == "replicate"


def test_7_a_snapshot_is_on_the_disk_before_it_is_acknowledged() -> None:
    """Nothing leaves a node before what it depends on is saved."""
    one = machine()
    snapshot = Snapshot(7, 3, members((1, 2)), b'["a"]')
    one.node.step(message(SNAPSHOT, 2, 3, snapshot=snapshot))
    ready = one.node.ready()
    assert (ready.snapshot, ready.must_sync) == (snapshot, True)
    assert [(each.type, each.index, each.reject) for each in ready.messages] == [(APPEND_REPLY, 7, False)]


@pytest.mark.parametrize("terms", [(), (1,), (1, 1, 1, 1), (1, 1, 2, 2, 2)])
def test_7_a_follower_discards_its_log_for_a_snapshot_with_what_it_lacks(terms: tuple[int, ...]) -> None:
    """The follower discards its entire log; it is all superseded by the snapshot and may have conflicting entries."""
    one = machine(terms=terms, term=3)
    snapshot = Snapshot(5, 3, members((1, 2, 4)), b'["from", "the", "leader"]')
    (reply,) = one.receive(message(SNAPSHOT, 2, 3, snapshot=snapshot))
    assert (reply.type, reply.index, reply.reject) == (APPEND_REPLY, 5, False)
    assert (one.disk.saved.snapshot, one.disk.saved.entries) == (snapshot, ())
    status = one.node.status()
    assert (status.commit, status.applied, status.last_index) == (5, 5, 5)
    assert one.state == ["from", "the", "leader"]


def test_7_what_follows_a_snapshot_of_a_prefix_of_the_log_is_retained() -> None:
    """Entries covered by the snapshot are deleted, but entries following it are still valid and must be retained."""
    one = machine(terms=(1, 1, 2, 2, 2), term=2)
    snapshot = Snapshot(3, 2, members((1, 2, 3)), b'["1.1", "2.1", "3.2"]')
    (reply,) = one.receive(message(SNAPSHOT, 2, 2, snapshot=snapshot))
    assert (reply.index, reply.reject) == (3, False)
    status = one.node.status()
    assert (status.commit, status.last_index, one.state) == (3, 5, ["1.1", "2.1", "3.2"])
    assert [entry.index for entry in one.disk.saved.entries][-2:] == [4, 5]


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize(("index", "term"), [(0, 0), (1, 1), (3, 2)])
def test_7_an_old_or_repeated_snapshot_moves_nothing_back(index: int, term: int, is_compacted: bool) -> None:
    """Retransmission or a mistake: a snapshot that holds nothing new."""
    one = machine(terms=(1, 1, 2, 2), commit=3)
    one.work()
    if is_compacted:
        one.compact()
    one.receive(message(HEARTBEAT, 2, 2))
    before = one.node.status(), one.disk.saved, list(one.state)
    old = message(SNAPSHOT, 2, 2, snapshot=Snapshot(index, term, members((1, 9)), b'["old"]'))
    (reply,) = one.receive(old)
    assert (reply.reject, reply.index) == (False, 3)
    assert (one.node.status(), one.disk.saved, one.state) == before


def test_7_a_snapshot_includes_the_latest_configuration() -> None:
    """The snapshot also includes the latest configuration in the log as of last included index."""
    one = machine()
    one.receive(message(SNAPSHOT, 2, 1, snapshot=Snapshot(5, 1, members((1, 4, 5), (6,)))))
    assert one.node.status().members == members((1, 4, 5), (6,))
    one.restart()
    assert one.node.status().members == members((1, 4, 5), (6,))
    assert {each.to for each in one.tick(2 * E - 1)} == {4, 5}


def test_7_a_restarted_server_goes_on_from_its_snapshot() -> None:
    """Snapshots capture all committed state: only what follows is applied again."""
    one = machine(terms=(1, 1, 1), commit=3)
    one.work()
    one.compact(2)
    one.restart()
    assert one.node.status().applied == 2
    one.work()
    assert [entry.index for entry in one.applied] == [3]


# 8 Client interaction


def test_8_a_request_to_another_than_the_leader_names_the_leader() -> None:
    """That server will reject the client's request and supply information about the most recent leader."""
    one = machine(term=1)
    for ask in (one.node.propose, lambda _: one.node.propose_conf_change(Members(frozenset({1})))):
        with pytest.raises(NotLeader) as refused:
            ask(b"x")
        assert refused.value.leader == NOBODY
    one.receive(message(HEARTBEAT, 3, 1))
    with pytest.raises(NotLeader) as refused:
        one.node.propose(b"x")
    assert refused.value.leader == 3
    assert one.log == []


def test_8_each_leader_commits_a_blank_entry_at_the_start_of_its_term() -> None:
    """Raft handles this by having each leader commit a blank no-op entry into the log at the start of its term."""
    cluster = Cluster((1, 2, 3))
    for term, leader in enumerate((1, 2, 3), 1):
        cluster.let_down(1, 2, 3)
        cluster.elect(leader)
        assert cluster[leader].applied[-1] == Entry(term, term)


def test_8_a_leader_checks_that_it_was_not_deposed_before_it_answers_a_read() -> None:
    """The leader exchanges heartbeat messages with a majority of the cluster before responding to reads."""
    cluster = Cluster((1, 2, 3))
    one = cluster.elect(1)
    cluster.cut(1)
    cluster.let_down(2, 3)
    cluster.elect(2)
    cluster.propose(2, "new")
    one.node.read_index(b"stale")
    cluster.run(2 * E)
    assert one.answers == []
    cluster.heal()
    cluster.run(2 * E)
    assert one.answers == [] and one.state == ["new"]


def test_8_a_read_sees_every_write_that_was_committed_before_it_was_asked() -> None:
    """Linearizable reads must not return stale data."""
    cluster = Cluster((1, 2, 3))
    one = cluster.elect(1)
    cluster.propose(1, "x")
    one.node.read_index(b"r")
    assert one.answers == []
    cluster.stabilize()
    assert one.answers == [("r", ["x"])]
