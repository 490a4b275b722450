"""What our Raft promises beyond the paper, sentence by sentence: how it is driven, and what it adds and leaves out."""

import dataclasses
import random

import pytest

from cluster.raft import (
    NOBODY,
    ConfChangeRefused,
    Config,
    Entry,
    EntryKind,
    HardState,
    Members,
    Message,
    MessageType,
    NotLeader,
    ProposalDropped,
    RaftNode,
    ReadState,
    Role,
    Saved,
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
READ_INDEX, READ_INDEX_REPLY = MessageType.READ_INDEX, MessageType.READ_INDEX_REPLY
SNAPSHOT, TIMEOUT_NOW = MessageType.SNAPSHOT, MessageType.TIMEOUT_NOW
E = Config(1).election_ticks
FIVE = (1, 2, 3, 4, 5)


def led(*learners: int, voters: tuple[int, ...] = (1, 2, 3), **settings: int) -> Cluster:
    """1 leads, and has committed its first entry everywhere."""
    cluster = Cluster(voters, learners, **settings)
    cluster.elect(1)
    cluster.run(1, 1)
    assert {one.commit for one in cluster} == {1}
    return cluster


# Ready


def test_a_second_ready_before_advance_asserts() -> None:
    one = machine()
    one.node.campaign()
    one.node.ready()
    assert not one.node.has_ready()
    with pytest.raises(AssertionError):
        one.node.ready()


def test_advance_takes_the_very_ready_last_handed_out() -> None:
    one = machine()
    one.node.campaign()
    ready = one.node.ready()
    for other in (dataclasses.replace(ready), None):
        with pytest.raises(AssertionError):
            one.node.advance(other)  # type: ignore[arg-type]
    one.node.advance(ready)
    with pytest.raises(AssertionError):
        one.node.advance(ready)


def test_a_node_with_nothing_to_do_has_no_ready() -> None:
    for written in ({}, {"terms": (1, 2), "term": 5, "vote": 2}):
        assert not machine(**written).node.has_ready()
    cluster = led()
    assert not any(one.node.has_ready() for one in cluster)


def test_hard_state_is_none_when_unchanged_and_whole_when_not() -> None:
    one = machine(term=4, vote=2)
    assert one.receive(message(HEARTBEAT, 2, 4))
    assert one.history[-1].hard_state is None
    one.receive(message(APPEND, 2, 4, entries=log_of((4,))))
    assert one.history[-1].hard_state is None
    one.receive(message(HEARTBEAT, 2, 4, commit=1))
    assert one.history[-1].hard_state == HardState(4, 2, 1)
    one.receive(message(HEARTBEAT, 3, 6))
    assert one.history[-1].hard_state == HardState(6, NOBODY, 1)


def test_leader_is_none_when_unchanged_and_nobody_when_lost() -> None:
    one = machine(term=1)
    told = []
    for happens in (
        lambda: one.receive(message(HEARTBEAT, 2, 1)),
        lambda: one.receive(message(HEARTBEAT, 2, 1)),
        lambda: one.receive(message(HEARTBEAT, 3, 2)),
        lambda: one.tick(2 * E - 1),
        lambda: one.tick(2 * E),
        lambda: lead(one),
        lambda: one.tick(E),
    ):
        one.history.clear()
        happens()
        told.append([ready.leader for ready in one.history if ready.leader is not None])
    assert told == [[2], [], [3], [NOBODY], [], [1], [NOBODY]]


@pytest.mark.parametrize(
    ("happens", "must_sync"),
    [
        (message(VOTE, 2, 1, index=9, log_term=1), True),  # the vote
        (message(HEARTBEAT, 2, 7), True),  # the term
        (message(APPEND, 2, 1, index=2, log_term=1, entries=(Entry(1, 3),)), True),
        (message(SNAPSHOT, 2, 1, snapshot=Snapshot(9, 1, members((1, 2, 3)))), True),
        (message(SNAPSHOT, 2, 1, snapshot=Snapshot(2, 1, members((1, 2, 3)))), True),  # of a log that is here
        (message(APPEND, 2, 1, index=2, log_term=1, commit=2), False),  # the commit may be late
        (message(HEARTBEAT, 2, 1, commit=1), False),
        (message(PRE_VOTE, 2, 2, index=2, log_term=1), False),
    ],
)
def test_must_sync_tells_what_the_next_message_stands_on(happens: Message, must_sync: bool) -> None:
    one = machine(terms=(1, 1), term=1)
    one.receive(happens)
    assert [ready.must_sync for ready in one.history] == [must_sync]


def test_a_change_that_counts_is_remembered_over_a_loss_of_power() -> None:
    """Its commit goes to the disk with a sync: else the node would come back among members that are no more."""
    one = machine(term=1)
    change = Entry(1, 1, members((1, 2)).to_bytes(), EntryKind.CHANGE)
    one.receive(message(APPEND, 2, 1, entries=(change, Entry(1, 2))))
    one.receive(message(HEARTBEAT, 2, 1, commit=1), message(HEARTBEAT, 2, 1, commit=2))
    changed = [ready for ready in one.history if change in ready.committed]
    assert [(ready.must_sync, ready.hard_state) for ready in changed] == [(True, HardState(1, NOBODY, 2))]


@pytest.mark.parametrize("voters", [(1,), (1, 2, 3)])
def test_a_leaders_own_entry_counts_only_once_it_was_saved(voters: tuple[int, ...]) -> None:
    one = machine(voters)
    lead(one)
    term = one.term
    one.receive(message(APPEND_REPLY, 2, term, index=1))
    assert one.commit == 1
    one.node.propose(b"x")
    if len(voters) > 1:
        ready = one.node.ready()
        one.node.step(message(APPEND_REPLY, 2, term, index=2))
    else:
        ready = one.node.ready()
    assert [entry.index for entry in ready.entries] == [2] and ready.must_sync
    assert one.commit == 1 and ready.committed == ()
    one.disk.save(ready)
    one.node.advance(ready)
    assert one.commit == 2
    assert [entry.data for entry in one.node.ready().committed] == [b"x"]


@pytest.mark.parametrize("voters", [(1,), (1, 2, 3)])
def test_what_was_proposed_after_a_ready_is_not_saved_by_it(voters: tuple[int, ...]) -> None:
    one = machine(voters)
    lead(one)
    one.receive(message(APPEND_REPLY, 2, one.term, index=1))
    one.node.propose(b"x")
    ready = one.node.ready()
    one.node.propose(b"y")
    one.disk.save(ready)
    one.node.advance(ready)
    one.node.step(message(APPEND_REPLY, 2, one.term, index=3))
    assert one.commit == 2
    one.work()
    assert one.commit == 3


def test_messages_may_arrive_between_ready_and_advance() -> None:
    """What another leader wrote over an entry meanwhile is not taken for saved."""
    one = machine()
    one.node.step(message(APPEND, 2, 1, entries=log_of((1, 1))))
    ready = one.node.ready()
    one.node.step(message(APPEND, 3, 2, index=1, log_term=1, entries=(Entry(2, 2),)))
    assert not one.node.has_ready()
    one.disk.save(ready)
    one.node.advance(ready)
    one.work()
    assert one.history[-1].entries[-1] == Entry(2, 2)
    assert one.log == [1, 2]


def test_a_snapshot_that_arrives_between_ready_and_advance_is_handed_out_next() -> None:
    one = machine(terms=(1, 1, 1), term=1)
    one.node.step(message(HEARTBEAT, 2, 1, commit=2))
    ready = one.node.ready()
    snapshot = Snapshot(9, 1, members((1, 2)), b'["s"]')
    one.node.step(message(SNAPSHOT, 2, 1, snapshot=snapshot))
    one.disk.save(ready)
    one.node.advance(ready)
    one.work()
    assert one.history[-1].snapshot == snapshot and one.state == ["s"]
    assert one.node.status().applied == 9


def test_a_change_that_is_applied_late_does_not_undo_the_members_of_a_later_snapshot() -> None:
    one = machine(term=1)
    change = Entry(1, 1, members((1, 2, 3, 4)).to_bytes(), EntryKind.CHANGE)
    one.node.step(message(APPEND, 2, 1, entries=(change,), commit=1))
    ready = one.node.ready()
    one.node.step(message(SNAPSHOT, 2, 1, snapshot=Snapshot(9, 1, members((1, 2)))))
    one.disk.save(ready)
    one.node.apply_conf_change(Members.from_bytes(ready.committed[0].data))
    one.node.advance(ready)
    one.work()
    assert one.node.status().members == members((1, 2))
    assert {each.to for each in one.tick(2 * E - 1)} == {2}


def test_nothing_is_random_but_what_the_given_source_draws() -> None:
    def trace(seed: int) -> list[object]:
        cluster = Cluster((1, 2, 3))
        for id in (1, 2, 3):
            cluster.machines[id] = Machine(Config(id), saved(), seed)
        cluster.run(60)
        return [one.history for one in cluster]

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


def test_the_source_is_asked_for_election_timeouts_and_for_nothing_else() -> None:
    """Each time the timer resets, and in no other moment: the draws of a leader's followers follow its messages."""
    rng = random.Random(3)
    node = RaftNode(Config(1), saved(term=1), rng)
    states = [rng.getstate()]
    node.step(message(HEARTBEAT, 2, 1))
    states.append(rng.getstate())
    node.step(message(PRE_VOTE, 3, 2))
    node.status()
    node.advance(node.ready())
    states.append(rng.getstate())
    assert states[0] != states[1] == states[2]


# Pre-vote and check-quorum


def test_a_pre_candidate_does_not_move_its_term() -> None:
    one = machine(terms=(1, 2), term=4, vote=3)
    one.tick(20 * E)
    assert (one.role, one.term) == (Role.PRE_CANDIDATE, 4)
    assert one.disk.saved.hard_state == HardState(4, 3)


def test_a_pre_vote_carries_the_term_it_would_stand_in() -> None:
    one = machine(terms=(1, 2), term=4)
    one.node.campaign()
    assert one.work() == [Message(PRE_VOTE, to, 1, 5, index=2, log_term=2) for to in (2, 3)]


def test_a_granting_pre_vote_reply_repeats_the_term_and_binds_nobody() -> None:
    one = machine(terms=(1, 2), term=4)
    for sender in (2, 3):
        (reply,) = one.receive(message(PRE_VOTE, sender, 5, index=2, log_term=2))
        assert reply == Message(PRE_VOTE_REPLY, sender, 1, 5)
    assert one.disk.saved.hard_state == HardState(4)
    assert one.tick(2 * E - 1), "its own timer went on"


def test_a_refusing_pre_vote_reply_carries_the_refusers_term() -> None:
    one = machine(terms=(1, 2), term=4)
    for term in (2, 5, 9):
        (reply,) = one.receive(message(PRE_VOTE, 2, term, index=1, log_term=1))
        assert reply == Message(PRE_VOTE_REPLY, 2, 1, 4, reject=True)
    assert one.term == 4


def test_a_pre_candidate_needs_a_majority_to_stand() -> None:
    one = machine(FIVE)
    one.node.campaign()
    one.work()
    one.receive(
        message(PRE_VOTE_REPLY, 2, 1), message(PRE_VOTE_REPLY, 2, 1), message(PRE_VOTE_REPLY, 3, 0, reject=True)
    )
    assert (one.role, one.term) == (Role.PRE_CANDIDATE, 0)
    one.receive(message(PRE_VOTE_REPLY, 4, 1))
    assert (one.role, one.term) == (Role.CANDIDATE, 1)


def test_a_pre_candidate_that_is_refused_by_a_later_term_takes_it_over() -> None:
    one = machine(term=1)
    one.node.campaign()
    one.work()
    one.receive(message(PRE_VOTE_REPLY, 2, 6, reject=True))
    assert (one.role, one.term) == (Role.FOLLOWER, 6)


def test_a_node_that_was_cut_off_unseats_nobody_and_raises_no_term() -> None:
    cluster = led()
    cluster.cut(3)
    cluster.run(10 * E)
    cluster.propose(1, "x")
    cluster.heal()
    cluster.run(10 * E)
    assert cluster.leaders == [1]
    assert {one.term for one in cluster} == {1}
    assert cluster[3].state == ["x"]


@pytest.mark.parametrize(("waited", "is_answered"), [(0, False), (E - 1, False), (E, True)])
def test_who_heard_its_leader_within_election_ticks_ignores_votes(waited: int, is_answered: bool) -> None:
    one = Machine(Config(1), saved(term=1), seed=4)
    one.receive(message(HEARTBEAT, 2, 1))
    assert not one.tick(waited), "a seed whose first timeout is longer"
    for kind in (PRE_VOTE, VOTE):
        assert bool(one.receive(message(kind, 3, 2))) is is_answered


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.LEADER])
def test_a_vote_asked_for_in_a_transfer_is_answered_by_the_rules_at_once(role: Role) -> None:
    one = in_role(role)
    term = one.term
    if role is Role.FOLLOWER:
        one.receive(message(HEARTBEAT, 2, term))
    reply = only(VOTE_REPLY, one.receive(message(VOTE, 3, term + 1, index=9, log_term=9, context=b"transfer")))
    assert (reply.reject, reply.term, one.role) == (False, term + 1, Role.FOLLOWER)
    refusal = only(VOTE_REPLY, one.receive(message(VOTE, 2, term + 1, index=9, log_term=9, context=b"transfer")))
    assert refusal.reject


def test_a_leader_that_hears_nobody_steps_down_after_exactly_election_ticks() -> None:
    one = in_role(Role.LEADER)
    one.tick(E - 1)
    assert one.role is Role.LEADER
    one.tick()
    assert (one.role, one.term, one.node.status().leader) == (Role.FOLLOWER, 2, NOBODY)


@pytest.mark.parametrize("kind", [HEARTBEAT_REPLY, APPEND_REPLY])
@pytest.mark.parametrize(
    ("heard", "is_leader"), [((2,), False), ((2, 3), True), ((2, 2), False), ((2, 6), False), ((2, 7), False)]
)
def test_a_leader_stays_while_it_hears_a_quorum_of_the_voters(
    kind: MessageType, heard: tuple[int, ...], is_leader: bool
) -> None:
    """Each of them at the last moment; a learner or a stranger is no voter."""
    one = Machine(Config(1), saved(FIVE, learners=(6,)))
    lead(one)
    for _ in range(3):
        one.tick(E - 1)
        one.receive(*[message(kind, sender, 1) for sender in heard])
    one.tick()
    assert (one.role is Role.LEADER) is is_leader


def test_the_only_voter_needs_to_hear_nobody() -> None:
    one = machine((1,), learners=(2,))
    lead(one)
    one.tick(5 * E)
    assert one.role is Role.LEADER


# Replication


def test_a_follower_that_is_probed_is_sent_one_message_at_a_time() -> None:
    one = machine()
    lead(one)
    for _ in range(5):
        one.node.propose(b"x")
        assert of(APPEND, one.work()) == []
    assert one.node.status().progress[2].state == "probe"
    (sent,) = one.receive(message(APPEND_REPLY, 2, 1, index=1))[:1]
    assert [entry.index for entry in sent.entries] == [2, 3, 4, 5, 6]
    assert one.node.status().progress[2].state == "replicate"


def test_a_probe_that_is_lost_is_sent_again_by_ticks() -> None:
    cluster = Cluster((1, 2, 3))
    cluster[1].node.campaign()
    cluster.work()
    for kind in (PRE_VOTE, PRE_VOTE_REPLY, VOTE, VOTE_REPLY):
        cluster.deliver(kind=kind)
    assert len(cluster.drop(kind=APPEND)) == 2
    cluster.run(2, 1)
    assert {one.commit for one in cluster} == {1}


@pytest.mark.parametrize("limit", [1, 4])
def test_at_most_max_inflight_appends_are_unacknowledged(limit: int) -> None:
    cluster = led(max_inflight_messages=limit, max_entries_per_message=1)
    one = cluster[1]
    for _ in range(10):
        one.node.propose(b"x")
    sent = [each for each in one.work() if each.to == 2]
    assert [each.entries[0].index for each in sent] == list(range(2, 2 + limit))
    sent = [each for each in one.receive(message(APPEND_REPLY, 2, 1, index=2)) if each.to == 2 and each.entries]
    assert [each.entries[0].index for each in sent] == [2 + limit]
    one.receive(message(APPEND_REPLY, 2, 1, index=1))
    assert one.node.status().progress[2].next == 3 + limit, "an old acknowledgement frees no place"


@pytest.mark.parametrize("limit", [1, 3, 64])
def test_a_message_holds_at_most_max_entries(limit: int) -> None:
    cluster = led(max_entries_per_message=limit)
    for _ in range(10):
        cluster[1].node.propose(b"x")
    cluster.work()
    sizes = [len(each.entries) for each in cluster.take(to=2)]
    assert max(sizes) == min(limit, 10) and sum(sizes) == 10


def test_a_follower_that_is_sent_a_snapshot_is_sent_nothing_else() -> None:
    cluster = led()
    one = cluster[1]
    cluster.cut(3)
    cluster.propose(1, "x", "y")
    one.compact()
    one.node.report_unreachable(3)
    cluster.work()
    assert [each.type for each in cluster.take(to=3)] == [SNAPSHOT]
    assert one.node.status().progress[3].state == "snapshot"
    one.node.propose(b"z")
    cluster.work()
    assert cluster.take(to=3) == []


def test_a_reject_names_what_was_refused_and_hints_how_far_to_go_back() -> None:
    one = machine(terms=(1, 1, 1, 4, 4), term=6)
    for index, term, hint in [(9, 6, 5), (9, 3, 3), (4, 3, 3), (5, 1, 3)]:
        (reply,) = one.receive(message(APPEND, 2, 6, index=index, log_term=term))
        assert (reply.type, reply.reject, reply.index, reply.hint) == (APPEND_REPLY, True, index, hint)


@pytest.mark.parametrize(
    ("own", "astray"),
    [
        ((1,) + (3,) * 1000, (1,) + (2,) * 1000),
        ((1,) + (2,) * 1000, (1,)),
        ((1,) + (2,) * 1000, ()),
        ((1,) + (2,) * 10 + (4,), (1,) + (2,) * 5 + (3,) * 1000),
        ((1,) * 1000 + (3,), (1,) * 10 + (2,) * 2000),
        ((1,) * 400 + (4,) * 400 + (6,) * 400, (1,) * 200 + (2,) * 300 + (3,) * 300 + (5,) * 300),
    ],
)
def test_a_follower_a_thousand_entries_astray_is_found_in_a_handful_of_rejections(
    own: tuple[int, ...], astray: tuple[int, ...]
) -> None:
    cluster = Cluster((1, 2, 3), max_entries_per_message=1000)
    cluster.add(1, saved(terms=own, term=7))
    cluster.add(2, saved(terms=astray, term=7))
    cluster[1].node.campaign()
    rejections = 0
    for _ in range(60):
        cluster.work()
        rejections += sum(each.reject for each in cluster.in_flight if each.type is APPEND_REPLY and each.sender == 2)
        cluster.deliver()
    agree = cluster[2].log == cluster[1].log == [*own, 8]
    assert agree  # by name, for to draw the difference of such long lists takes pytest minutes
    assert rejections <= 5


def test_an_old_refusal_changes_nothing() -> None:
    cluster = led()
    one = cluster[1]
    cluster.propose(1, "x")
    before = one.node.status().progress
    assert one.receive(message(APPEND_REPLY, 2, 1, index=1, hint=0, reject=True)) == []
    assert one.node.status().progress == before


@pytest.mark.parametrize("lost", [APPEND, APPEND_REPLY])
def test_a_lost_append_or_acknowledgement_heals_by_ticks_alone(lost: MessageType) -> None:
    cluster = led()
    cluster[1].node.propose(b"x")
    cluster.work()
    if lost is APPEND_REPLY:
        cluster.deliver(kind=APPEND)
    assert len(cluster.drop(kind=lost)) == 2
    assert cluster[1].commit == 1
    cluster.run(3, 1)
    assert [one.state for one in cluster] == [["x"]] * 3


@pytest.mark.parametrize("lost", [SNAPSHOT, APPEND_REPLY])
def test_a_lost_snapshot_or_its_acknowledgement_heals_by_ticks_alone(lost: MessageType) -> None:
    cluster = led()
    cluster.cut(3)
    cluster.propose(1, "x", "y")
    cluster[1].compact()
    cluster.heal()
    while not cluster.take(to=3, kind=SNAPSHOT):
        cluster.tick(1)
        cluster.work()
        cluster.deliver(kind=HEARTBEAT)
        cluster.deliver(kind=HEARTBEAT_REPLY)
    if lost is APPEND_REPLY:
        cluster.in_flight.append(Message(SNAPSHOT, 3, 1, 1, snapshot=cluster[1].disk.saved.snapshot))
        cluster.deliver(to=3, kind=SNAPSHOT)
        assert cluster.drop(sender=3, kind=APPEND_REPLY)
    cluster.run(3 * E)
    cluster.propose(1, "z")
    cluster.run(1)
    assert cluster[1].node.status().progress[3].state == "replicate"
    assert [one.state for one in cluster] == [["x", "y", "z"]] * 3
    assert cluster.leaders == [1]


def test_report_unreachable_is_a_hint_and_never_required() -> None:
    cluster = led()
    one = cluster[1]
    one.node.report_unreachable(3)
    one.node.report_unreachable(9)
    cluster[2].node.report_unreachable(1)
    assert one.node.status().progress[3].state == "probe"
    cluster.propose(1, "x")
    assert cluster[3].log == [1, 1] and one.node.status().progress[3].state == "replicate"


def test_a_heartbeats_commit_never_exceeds_what_the_follower_is_known_to_hold() -> None:
    cluster = led()
    cluster.cut(3)
    cluster.propose(1, "x", "y")
    cluster.tick(1)
    assert {each.to: each.commit for each in cluster.take(kind=HEARTBEAT)} == {2: 3, 3: 1}


def test_progress_is_empty_unless_leader() -> None:
    cluster = led()
    assert {id for id in cluster[1].node.status().progress} >= {2, 3}
    assert not cluster[2].node.status().progress
    cluster[1].tick(E)
    assert not cluster[1].node.status().progress


# Flow


def test_one_proposal_is_always_taken_and_the_next_is_dropped_while_too_much_is_uncommitted() -> None:
    cluster = led(max_uncommitted_bytes=10)
    one = cluster[1]
    one.node.propose(b"x" * 50)
    with pytest.raises(ProposalDropped):
        one.node.propose(b"y")
    assert one.node.status().last_index == 2
    cluster.stabilize()
    assert one.node.propose(b"y" * 5) == 3
    assert one.node.propose(b"z" * 5) == 4
    with pytest.raises(ProposalDropped):
        one.node.propose(b"a")
    cluster.stabilize()
    assert len(one.state) == 3
    assert one.node.propose(b"a") == 5


def test_a_new_leader_counts_what_earlier_ones_left_uncommitted() -> None:
    one = Machine(Config(1, max_uncommitted_bytes=10), saved(terms=(1,) * 5))
    lead(one)
    with pytest.raises(ProposalDropped):
        one.node.propose(b"x")
    one.receive(message(APPEND_REPLY, 2, 2, index=6))
    assert one.node.propose(b"x") == 7


# Membership


def test_a_change_is_refused_before_the_leader_committed_in_its_own_term() -> None:
    """Ongaro's correction of 2015."""
    one = machine(terms=(1, 1), commit=2)
    lead(one)
    with pytest.raises(ConfChangeRefused):
        one.node.propose_conf_change(members((1, 2, 3, 4)))
    assert one.node.status().last_index == 3
    one.receive(message(APPEND_REPLY, 2, 2, index=3))
    assert one.node.propose_conf_change(members((1, 2, 3, 4))) == 4
    assert one.disk.saved.entries[-1].kind is EntryKind.COMMAND
    one.work()
    assert one.disk.saved.entries[-1] == Entry(2, 4, members((1, 2, 3, 4)).to_bytes(), EntryKind.CHANGE)


def test_a_change_is_refused_while_an_earlier_one_is_unapplied() -> None:
    cluster = led()
    one = cluster[1]
    one.node.propose_conf_change(members((1, 2, 3), (4,)))
    for _ in range(3):
        with pytest.raises(ConfChangeRefused):
            one.node.propose_conf_change(members((1, 2, 3), (5,)))
        one.work()
    assert one.node.status().last_index == 2
    one.node.step(message(APPEND_REPLY, 2, 1, index=2))
    assert one.commit == 2
    with pytest.raises(ConfChangeRefused):  # committed, and not applied
        one.node.propose_conf_change(members((1, 2, 3), (5,)))
    one.work()
    assert one.node.propose_conf_change(members((1, 2, 3), (5,))) == 3


@pytest.mark.parametrize(
    ("voters", "learners", "is_taken"),
    [
        ((1, 2, 3, 4), (), True), ((1, 2), (), True), ((1, 2), (3,), True), ((1, 2, 3), (4, 5, 6), True),
        ((1, 2, 3, 4), (5, 6), True), ((1, 2, 3), (), True), ((2, 3), (), True),
        ((1, 2, 3, 4, 5), (), False), ((1,), (), False), ((1, 2, 4), (), False), ((1, 4), (), False),
        ((), (), False), ((), (1, 2, 3), False),
    ],
)  # fmt: skip
def test_one_voter_at_a_time_learners_freely_and_never_zero_voters(
    voters: tuple[int, ...], learners: tuple[int, ...], is_taken: bool
) -> None:
    one = led()[1]
    if is_taken:
        assert one.node.propose_conf_change(members(voters, learners)) == 2
    else:
        with pytest.raises(ConfChangeRefused):
            one.node.propose_conf_change(members(voters, learners))
        assert one.node.status().last_index == 1


def test_the_last_voter_cannot_go() -> None:
    one = machine((1,), learners=(2,))
    lead(one)
    for nobody in (members(()), members((), (1, 2)), members((2,))):
        with pytest.raises(ConfChangeRefused):
            one.node.propose_conf_change(nobody)


def test_a_change_counts_from_when_it_is_applied() -> None:
    """Also on the leader: two of three are the majority until then, three of four after."""
    cluster = led()
    one = cluster[1]
    one.node.propose_conf_change(members((1, 2, 3, 4)))
    one.work()
    assert one.node.status().members == members((1, 2, 3))
    one.receive(message(APPEND_REPLY, 2, 1, index=2))
    assert (one.commit, one.node.status().members) == (2, members((1, 2, 3, 4)))
    one.node.propose(b"x")
    one.work()
    one.receive(message(APPEND_REPLY, 2, 1, index=3))
    assert one.commit == 2
    one.receive(message(APPEND_REPLY, 4, 1, index=3))
    assert one.commit == 3


def test_a_learner_is_sent_everything_counts_for_nothing_and_becomes_a_voter() -> None:
    cluster = led()
    cluster.add(4)
    cluster.cut(2)
    cluster[1].node.propose_conf_change(members((1, 2, 3), (4,)))
    cluster.run(3, 1)
    cluster.propose(1, "x")
    cluster.run(1, 1)
    assert cluster[4].state == ["x"]
    cluster.cut(2, 3)
    cluster.propose(1, "y")
    assert cluster[4].log == [1] * 4 and cluster[1].state == ["x"]
    cluster.heal()
    cluster[1].node.propose_conf_change(members((1, 2, 3, 4)))
    cluster.run(3, 1)
    assert {one.node.status().members for one in cluster} == {members((1, 2, 3, 4))}
    cluster.cut(1, 4)
    cluster.propose(1, "z")
    assert "z" not in cluster[1].state
    cluster.cut_links -= {(1, 2), (2, 1)}
    cluster.run(3, 1)
    assert "z" in cluster[1].state


@pytest.mark.parametrize("left", [members((2, 3)), members((2, 3), (1,))])
def test_a_leader_that_removes_itself_hands_over_or_steps_down_and_counts_itself_no_more(left: Members) -> None:
    cluster = led()
    one = cluster[1]
    one.node.propose_conf_change(left)
    cluster.stabilize()
    assert one.node.status().members == left
    assert one.role is Role.FOLLOWER
    cluster.run(4 * E)
    (leader,) = cluster.leaders
    assert leader in (2, 3)
    cluster.cut(5 - leader)
    cluster.propose(leader, "alone")
    assert cluster[leader].state == [], "the removed one and the new leader are no majority"


def test_a_leader_that_was_removed_does_nothing_as_leader() -> None:
    cluster = led()
    one = cluster[1]
    one.node.propose(b"last")
    one.node.propose_conf_change(members((2, 3)))
    one.work()
    one.receive(message(APPEND_REPLY, 2, 1, index=3))
    assert (one.role, one.state) == (Role.FOLLOWER, ["last"])
    with pytest.raises(NotLeader):
        one.node.propose(b"more")
    assert one.tick(10 * E) == []


def test_a_removed_node_never_campaigns() -> None:
    cluster = led()
    cluster[1].node.propose_conf_change(members((1, 2)))
    cluster.run(2, 1)
    gone = cluster[3]
    assert gone.node.status().members == members((1, 2))
    assert gone.tick(10 * E) == []
    gone.node.campaign()
    assert gone.receive(Message(TIMEOUT_NOW, 3, 1, 1)) == []
    assert (gone.role, gone.term) == (Role.FOLLOWER, 1)
    cluster.run(5 * E)
    assert cluster.leaders == [1]


def test_a_learner_never_campaigns() -> None:
    for written in (saved((2, 3), (1,)), Saved(Snapshot(0, 0, members(())))):
        one = Machine(Config(1), written)
        assert one.tick(10 * E) == []
        one.node.campaign()
        assert one.receive(message(TIMEOUT_NOW, 2, 1)) == []
        assert one.role is Role.FOLLOWER


@pytest.mark.parametrize("at_first", [members((2, 3), (1,)), members((2, 3)), members(())])
def test_a_vote_is_granted_by_the_rules_also_by_who_believes_itself_a_learner(at_first: Members) -> None:
    """It may not have heard yet that it became a voter."""
    one = Machine(Config(1), Saved(Snapshot(0, 0, at_first)))
    for kind in (PRE_VOTE, VOTE):
        (reply,) = one.receive(message(kind, 2, 1, index=3, log_term=1))
        assert (reply.reject, reply.term) == (False, 1)
    assert one.disk.saved.hard_state == HardState(1, vote=2)


def test_nobody_campaigns_while_a_committed_change_is_unapplied() -> None:
    one = machine(term=1)
    change = Entry(1, 1, members((1, 2, 3, 4)).to_bytes(), EntryKind.CHANGE)
    one.node.step(message(APPEND, 2, 1, entries=(change,), commit=1))
    ready = one.node.ready()
    one.disk.save(ready)
    one.node.campaign()
    for _ in range(4 * E):
        one.node.tick()
    one.node.step(message(TIMEOUT_NOW, 2, 1))
    assert (one.role, one.term) == (Role.FOLLOWER, 1)
    one.node.apply_conf_change(members((1, 2, 3, 4)))
    one.node.advance(ready)
    one.node.campaign()
    assert {each.to for each in one.work()} == {2, 3, 4}


def test_a_restarted_node_applies_the_changes_it_finds_before_it_campaigns() -> None:
    change = Entry(1, 1, members((1, 2, 3, 4)).to_bytes(), EntryKind.CHANGE)
    one = Machine(Config(1), Saved(Snapshot(0, 0, members((1, 2, 3))), HardState(1, commit=1), (change,)))
    one.node.campaign()
    assert one.role is Role.FOLLOWER
    one.work()
    one.node.campaign()
    assert {each.to for each in one.work()} == {2, 3, 4}


def test_from_two_voters_to_one_the_leader_removes_the_other() -> None:
    cluster = led(voters=(1, 2))
    one = cluster[1]
    for without_itself in (members((2,)), members((2,), (1,))):
        with pytest.raises(ConfChangeRefused):
            one.node.propose_conf_change(without_itself)
    one.node.transfer_leader(2)
    cluster.stabilize()
    cluster.run(1, 2)
    cluster[2].node.propose_conf_change(members((2,)))
    cluster.run(2, 2)
    assert cluster[2].role is Role.LEADER
    cluster.cut(1)
    cluster.propose(2, "alone")
    assert cluster[2].state == ["alone"]


def test_of_two_voters_the_one_that_is_to_go_never_leads() -> None:
    """It might add to its log, and then neither could win."""
    cluster = led(voters=(1, 2))
    cluster[1].node.propose_conf_change(members((1,)))
    cluster.work()
    cluster.deliver(to=2)
    cluster.drop()
    cluster[1].restart()
    cluster[2].tick(10 * E)
    cluster[2].node.campaign()
    cluster.stabilize()
    assert cluster.leaders == []
    cluster.elect(1)
    cluster.run(1)
    assert cluster[1].node.status().members == members((1,))
    cluster.cut(2)
    cluster.propose(1, "alone")
    assert cluster[1].state == ["alone"]


# Reads


def acknowledged(beats: list[Message], *followers: int) -> list[Message]:
    """The answers of these followers to these heartbeats."""
    return [
        Message(HEARTBEAT_REPLY, each.sender, each.to, each.term, context=each.context)
        for each in beats
        if each.type is HEARTBEAT and each.to in followers
    ]


def test_a_read_is_confirmed_by_a_round_of_heartbeats_that_began_after_it() -> None:
    one = led()[1]
    one.node.read_index(b"a")
    beats = one.work()
    assert {each.to for each in of(HEARTBEAT, beats)} == {2, 3}
    assert one.answers == []
    one.receive(*acknowledged(beats, 2))
    assert one.answers == [("a", [])]
    assert [ready.reads for ready in one.history if ready.reads] == [(ReadState(1, b"a"),)]


def test_an_acknowledgement_of_an_earlier_round_never_confirms_a_later_read() -> None:
    one = led()[1]
    early = one.tick()
    one.node.read_index(b"a")
    first = one.work()
    one.node.read_index(b"b")
    second = one.work()
    one.receive(*acknowledged(early, 2, 3))
    assert one.answers == []
    one.receive(*acknowledged(first, 2, 3))
    assert [context for context, _ in one.answers] == ["a"]
    one.receive(*acknowledged(second, 3))
    assert [context for context, _ in one.answers] == ["a", "b"]


def test_an_acknowledgement_of_a_later_round_confirms_an_earlier_read() -> None:
    one = led()[1]
    one.node.read_index(b"a")
    one.work()
    one.receive(*acknowledged(one.tick(), 2))
    assert [context for context, _ in one.answers] == ["a"]


@pytest.mark.parametrize(
    ("answering", "is_answered"), [((), False), ((2,), False), ((2, 2), False), ((2, 6), False), ((2, 3), True)]
)
def test_a_read_needs_a_quorum_of_the_voters(answering: tuple[int, ...], is_answered: bool) -> None:
    one = Machine(Config(1), saved(FIVE, learners=(6,)))
    lead(one)
    one.receive(*[message(APPEND_REPLY, peer, 1, index=1) for peer in FIVE[1:]])
    one.node.read_index(b"a")
    beats = one.work()
    for peer in answering:
        one.receive(*acknowledged(beats, peer))
    assert bool(one.answers) is is_answered


def test_the_only_voter_answers_by_itself() -> None:
    one = machine((1,), learners=(2,))
    lead(one)
    one.node.read_index(b"a")
    one.work()
    assert one.answers == [("a", [])]


def test_reads_wait_until_the_leader_committed_in_its_own_term() -> None:
    """Until then it does not know how far the others have committed. They are kept, not dropped."""
    one = machine(terms=(1, 1), commit=1)
    lead(one)
    one.node.read_index(b"a")
    one.receive(message(READ_INDEX, 3, 2, context=b"b"))
    beats = one.work() + one.tick()
    one.receive(*acknowledged(beats, 2, 3))
    assert one.answers == []
    beats = one.receive(message(APPEND_REPLY, 2, 2, index=3))
    sent = one.receive(*acknowledged(beats, 2))
    assert one.answers == [("a", ["1.1", "2.1"])]
    assert of(READ_INDEX_REPLY, sent) == [Message(READ_INDEX_REPLY, 3, 1, 2, index=3, context=b"b")]


@pytest.mark.parametrize("asking", [2, 4])
def test_a_read_on_a_follower_or_learner_is_forwarded(asking: int) -> None:
    cluster = led(4)
    cluster.propose(1, "x")
    cluster[asking].node.read_index(b"a")
    cluster.work()
    assert [(each.type, each.to) for each in cluster.in_flight] == [(READ_INDEX, 1)]
    cluster.stabilize()
    cluster.run(1, 1)
    assert cluster[asking].answers == [("a", ["x"])]
    assert cluster[1].answers == []


def test_a_leader_that_is_cut_off_never_answers() -> None:
    cluster = led()
    cluster.propose(1, "x")
    cluster.cut(1)
    for number in range(3 * E):
        if cluster[1].role is Role.LEADER:
            cluster[1].node.read_index(str(number).encode())
        cluster.run(1)
    cluster.heal()
    cluster.run(3 * E)
    assert cluster[1].answers == []


def test_reads_die_with_their_leader() -> None:
    """Nothing answers them, not even the same node when it leads again."""
    one = led()[1]
    one.node.read_index(b"a")
    late = one.work()
    one.receive(message(HEARTBEAT, 2, 3))
    one.tick(2 * E)
    lead(one)
    one.receive(message(APPEND_REPLY, 2, 4, index=2))
    one.receive(*[dataclasses.replace(each, term=4) for each in acknowledged(late, 2, 3)])
    one.receive(*acknowledged(one.tick(), 2, 3))
    assert one.answers == []


def test_a_read_is_answered_from_no_earlier_state_than_it_was_asked_in() -> None:
    cluster = led()
    cluster[3].node.read_index(b"a")
    cluster.work()
    cluster.propose(1, "x")
    cluster.stabilize()
    assert [context for context, _ in cluster[3].answers] == ["a"]


# Transfer


def test_a_target_that_is_level_is_told_to_stand_and_skips_the_pre_vote() -> None:
    cluster = led()
    cluster[1].node.transfer_leader(2)
    cluster.work()
    assert cluster.in_flight == [Message(TIMEOUT_NOW, 2, 1, 1)]
    cluster.deliver()
    assert cluster.in_flight == [
        Message(VOTE, to, 2, 2, index=1, log_term=1, context=b"transfer") for to in (1, 3)
    ]  # fmt: skip
    cluster.stabilize()
    assert cluster.leaders == [2] and {one.term for one in cluster} == {2}


@pytest.mark.parametrize("is_compacted", [False, True])
def test_a_target_that_lags_is_first_brought_level(is_compacted: bool) -> None:
    cluster = led()
    cluster.cut(3)
    cluster.propose(1, "x", "y")
    if is_compacted:
        cluster[1].compact()
    cluster[1].node.transfer_leader(3)
    cluster.work()
    assert cluster.take(kind=TIMEOUT_NOW) == []
    cluster.heal()
    for _ in range(3):
        cluster.tick(1)
        cluster.stabilize()
    assert cluster.leaders == [3]
    assert cluster[3].state == ["x", "y"]
    assert bool(cluster[3].disk.saved.snapshot.index) is is_compacted


def test_proposals_and_changes_are_dropped_while_a_transfer_is_pending() -> None:
    one = led()[1]
    one.node.transfer_leader(3)
    for ask in (lambda: one.node.propose(b"x"), lambda: one.node.propose_conf_change(members((1, 2)))):
        with pytest.raises(ProposalDropped):
            ask()
    assert one.node.status().last_index == 1


def is_transferring(one: Machine) -> bool:
    try:
        one.node.propose(b"")
    except ProposalDropped:
        return True
    return False


def pass_ticks(one: Machine, ticks: int) -> None:
    """The leader's, with its followers alive."""
    for _ in range(ticks):
        beats = one.tick()
        one.receive(*acknowledged(beats, 2, 3))


def test_a_transfer_is_dropped_after_election_ticks() -> None:
    one = led()[1]
    one.node.transfer_leader(3)
    pass_ticks(one, E - 1)
    assert is_transferring(one)
    pass_ticks(one, 1)
    assert not is_transferring(one) and one.role is Role.LEADER


def test_a_second_request_for_the_same_target_does_not_extend_it() -> None:
    one = led()[1]
    one.node.transfer_leader(3)
    pass_ticks(one, E - 1)
    one.node.transfer_leader(3)
    pass_ticks(one, 1)
    assert not is_transferring(one)


def test_a_request_for_another_target_replaces_it() -> None:
    one = led()[1]
    one.node.transfer_leader(3)
    pass_ticks(one, E - 1)
    one.node.transfer_leader(2)
    assert [each.to for each in of(TIMEOUT_NOW, one.work())][-1] == 2
    pass_ticks(one, E - 1)
    assert is_transferring(one), "the time is that of the new one"
    assert of(TIMEOUT_NOW, one.receive(message(APPEND_REPLY, 3, 1, index=1))) == []
    pass_ticks(one, 1)
    assert not is_transferring(one)


def test_a_request_for_itself_aborts_it() -> None:
    one = led()[1]
    one.node.transfer_leader(3)
    one.node.transfer_leader(1)
    assert not is_transferring(one)


def test_a_transfer_to_a_learner_a_stranger_or_from_a_follower_does_nothing() -> None:
    cluster = led(4)
    for to in (4, 9):
        cluster[1].node.transfer_leader(to)
        assert not is_transferring(cluster[1])
    cluster.stabilize()
    cluster[2].node.transfer_leader(2)
    cluster[2].node.transfer_leader(3)
    assert not cluster[2].node.has_ready()


# Snapshots and misuse


def test_compact_beyond_what_is_applied_is_an_error_and_backwards_does_nothing() -> None:
    one = machine(terms=(1, 1, 1, 1), commit=3)
    for index in (1, 3, 4, 9):
        with pytest.raises(ValueError):
            one.node.compact(Snapshot(index, 1, members((1, 2, 3))))
    one.work()
    with pytest.raises(ValueError):
        one.node.compact(Snapshot(4, 1, members((1, 2, 3))))
    one.compact(2)
    before = one.node.status()
    for index in (0, 1, 2):
        one.node.compact(Snapshot(index, 1, members((1, 9)), b"other"))
    assert one.node.status() == before
    lead(one)
    (sent, *_) = one.receive(message(APPEND_REPLY, 2, 2, index=4, hint=0, reject=True))
    assert sent.snapshot == one.disk.saved.snapshot


def test_campaign_on_a_leader_does_nothing() -> None:
    one = in_role(Role.LEADER)
    before = one.node.status()
    one.node.campaign()
    assert one.node.status() == before and not one.node.has_ready()


def test_a_read_with_no_leader_known_raises() -> None:
    for role in (Role.FOLLOWER, Role.PRE_CANDIDATE, Role.CANDIDATE):
        with pytest.raises(NotLeader) as refused:
            in_role(role).node.read_index(b"a")
        assert refused.value.leader == NOBODY


def test_a_message_to_another_node_is_none_of_its_business() -> None:
    one = machine()
    one.node.step(Message(HEARTBEAT, 2, 3, 9))
    assert not one.node.has_ready() and one.term == 0


@pytest.mark.parametrize("kind", [kind for kind in MessageType if kind.name.endswith("REPLY")])
@pytest.mark.parametrize("reject", [False, True])
@pytest.mark.parametrize("role", Role)
def test_a_reply_nobody_waits_for_does_no_harm(kind: MessageType, reject: bool, role: Role) -> None:
    """From a stranger, or to one who does not ask any more."""
    if kind is READ_INDEX_REPLY:
        return
    one = in_role(role)
    before = one.node.status()
    one.receive(message(kind, 9, one.term, index=77, hint=5, context=b"odd", reject=reject))
    assert one.node.status() == before


def test_an_acknowledgement_from_beyond_the_log_does_no_harm() -> None:
    """It belongs to a log that this leader never had."""
    one = in_role(Role.LEADER)
    one.receive(message(APPEND_REPLY, 2, 2, index=99), message(HEARTBEAT_REPLY, 2, 2, context=b"\xff" * 8))
    assert one.commit == 0
    one.node.read_index(b"a")
    one.work()
    assert one.answers == []


def test_a_vote_that_comes_after_the_election_is_lost_on_it() -> None:
    one = machine(FIVE)
    stand(one)
    one.receive(*[message(VOTE_REPLY, peer, 1, reject=True) for peer in (2, 3, 4)])
    assert one.role is Role.FOLLOWER
    one.receive(*[message(VOTE_REPLY, peer, 1) for peer in (2, 3, 4, 5)])
    assert one.role is Role.FOLLOWER
