"""Bugs to plant in the coordinator, each a small change of one file, and who must notice: the tests of the tests.

    python -m tests.raft_mutants [--seeds 300] [M4 M9 …]     how many worlds the simulator needs to see each

M1 to M25 are the classical mistakes of a Raft; those after them are mistakes that this code invites. Each names the
test that catches it, and where the simulator sees it soon, a few times as many worlds as it took. Three of the 25
cannot be made here, and a mistake of the same kind stands in for each:

    M16  a lease without a margin for drift. There are no lease reads; here a follower answers by what it knows.
    M18  joint consensus decided by one majority. Members change one at a time; here half is taken for a majority.
    M22  remembering clients on the leader only. No catalog knows who leads; here who restarted remembers none.

M11 does no harm by itself, for all that leaves a node leaves after the save, answers to clients too. The contract
forbids it, so tests and simulator do. No world shows M8: this leader never sends less than where two logs part.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
NODE, LOG, TRACKER = "cluster/raft/node.py", "cluster/raft/log.py", "cluster/raft/tracker.py"
STORAGE, CATALOG, VOTER = "cluster/raft/storage.py", "cluster/catalog.py", "cluster/voter.py"


@dataclass(frozen=True)
class Mutant:
    name: str  # M1, and so on, and what is wrong
    file: str
    old: str  # occurs exactly once
    new: str
    test: str  # that must fail, as "file::function"
    worlds: int = 0  # of which the simulator must find one broken; 0 where it needs more than a quick suite has


class NotPlanted(Exception):
    """The code is no longer what the mutant was written for."""


@contextmanager
def planted(mutant: Mutant | None) -> Iterator[Path]:
    """A folder with a copy of cluster/ that has the bug, or none."""
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "cluster", copy / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
        if mutant:
            source = (copy / mutant.file).read_text()
            if (times := source.count(mutant.old)) != 1:
                raise NotPlanted(f"{mutant.name}: {mutant.file} has this {times} times, not once:\n{mutant.old}")
            (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        yield copy


def run_python(folder: Path, *arguments: str, seconds: int) -> subprocess.CompletedProcess[str]:
    """In a process that finds the copy of cluster/ first, and everything else in its usual place."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
    )


def run_tests(mutant: Mutant | None, *tests: str) -> subprocess.CompletedProcess[str]:
    """Just these, against the planted code; the return code is pytest's. What was killed meanwhile is run once more.

    Asserts are plain: with CI set, pytest draws the whole difference of two logs of a thousand entries, for minutes.
    """
    options = ["-x", "-q", "--noconftest", "-p", "no:cacheprovider", "--import-mode=append", "-c", os.devnull]
    options.append("--assert=plain")
    with planted(mutant) as folder:
        command = ("-m", "pytest", *options, *(f"{ROOT}/tests/{test}" for test in tests))
        ran = run_python(folder, *command, seconds=300)
        return ran if ran.returncode >= 0 else run_python(folder, *command, seconds=300)


def worlds_until_seen(mutant: Mutant | None, limit: int) -> tuple[int, str]:
    """How many worlds the simulator needs, counted from seed 0, and what it sees; (0, "") when so many hold."""
    script = f"""
from tests.raft_simulation import Violation, run_seed
for seed in range({limit}):
    try:
        run_seed(seed)
    except Violation as violation:
        print("SEEN", seed + 1, violation)
        raise SystemExit
print("SEEN 0")
"""
    with planted(mutant) as folder:
        ran = run_python(folder, "-c", script, seconds=60 + 10 * limit)
    assert ran.stdout.startswith("SEEN"), ran.stderr
    _, worlds, *said = ran.stdout.split(maxsplit=2)
    return int(worlds), "".join(said).partition("Weather(")[0].strip()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", metavar="NAME", help="all of the node's, where none is given")
    arguments.add_argument("--seeds", type=int, default=300)
    arguments.add_argument("--jobs", type=int, default=2)
    given = arguments.parse_args()
    ours = [mutant for mutant in MUTANTS if mutant.file in (NODE, LOG, TRACKER)]
    picked = [mutant for mutant in ours if not given.names or mutant.name.split()[0] in given.names]
    needed = []
    with ThreadPoolExecutor(given.jobs) as pool:
        hunts = pool.map(lambda mutant: worlds_until_seen(mutant, given.seeds), picked)
        for mutant, (worlds, said) in zip(picked, hunts, strict=True):
            print(f"{worlds or '-':>5}  {mutant.name}: {' '.join(said.split())[-100:]}", flush=True)
            needed += [worlds] * bool(worlds)
    median = statistics.median(needed or [0])
    print(f"{len(needed)} of {len(picked)} are seen within {given.seeds} worlds, half of these within {median:.0f}")


PAPER, CONTRACT = "test_raft_paper.py::test_", "test_raft_contract.py::test_"

MUTANTS = (
    Mutant(
        "M1 a vote is not saved",
        NODE,
        "            hard_state=None if state is told else state,",
        "            hard_state=None if state is told else HardState(state.term, NOBODY, state.commit),",
        PAPER + "5_2_a_candidate_that_crashed_does_not_vote_for_another_in_its_term",
        5,
    ),
    Mutant(
        "M2 a vote for any log",
        LOG,
        "        return (term, index) >= (self.last_term, self.last_index)",
        "        return True",
        PAPER + "5_4_1_a_voter_denies_its_vote_if_its_own_log_is_more_up_to_date",
        10,
    ),
    Mutant(
        "M2b a longer log beats a later term",
        LOG,
        "        return (term, index) >= (self.last_term, self.last_index)",
        "        return (index, term) >= (self.last_index, self.last_term)",
        PAPER + "5_4_1_a_voter_denies_its_vote_if_its_own_log_is_more_up_to_date",
    ),
    Mutant(
        "M3 two votes in a term",
        NODE,
        "        is_free = self._vote == NOBODY and self._leader == NOBODY",
        "        is_free = self._leader == NOBODY",
        PAPER + "5_2_one_vote_a_term_first_come_first_served",
        5,
    ),
    Mutant(
        "M4 an entry of an earlier term is committed by counting",
        NODE,
        "        if log.term_at(index) == self._term and log.commit_to(index):",
        "        if log.commit_to(index):",
        PAPER + "5_4_2_figure_8_an_old_entry_on_a_majority_can_still_be_overwritten",
        15,
    ),
    Mutant(
        "M5 an append is taken whatever stands before it",
        LOG,
        "        if self.term_at(previous) != term:\n            return None\n        for",
        "        if previous > self.last_index:\n            return None\n        for",
        PAPER + "5_3_a_follower_refuses_what_does_not_follow_its_log",
    ),
    Mutant(
        "M6 every append truncates",
        LOG,
        "            if self.term_at(entry.index) != entry.term:\n                self._truncate",
        "            if entry.index > self.commit:\n                self._truncate",
        PAPER + "5_3_an_append_that_comes_late_takes_nothing_away",
        5,
    ),
    Mutant(
        "M7 what conflicts stays",
        LOG,
        "            if self.term_at(entry.index) != entry.term:\n                self._truncate(entry.index)\n",
        "            if entry.index > self.last_index:\n",
        PAPER + "5_3_a_conflicting_entry_goes_with_all_that_follow_it",
        5,
    ),
    Mutant(
        "M7b what follows a conflict stays",
        LOG,
        "                self._truncate(entry.index)\n"
        "                self._entries += entries[entry.index - entries[0].index :]\n"
        "                self.last_index = entries[-1].index\n",
        "                self.saved = min(self.saved, entry.index - 1)\n"
        "                new = entries[entry.index - entries[0].index :]\n"
        "                at = entry.index - self.first_index\n"
        "                self._entries[at : at + len(new)] = new\n"
        "                self.last_index = self.snapshot.index + len(self._entries)\n",
        PAPER + "5_3_a_conflicting_entry_goes_with_all_that_follow_it",
        25,
    ),
    Mutant(
        "M8 the leader's commit is taken beyond what it sent",
        NODE,
        "            log.commit_to(min(message.commit, last))",
        "            log.commit_to(min(message.commit, log.last_index))",
        PAPER + "5_3_the_commit_index_never_passes_the_last_new_entry",
    ),
    Mutant(
        "M9 a commit may fall",
        LOG,
        "        if index <= self.commit:\n            return False",
        "        if index == self.commit:\n            return False",
        PAPER + "5_3_the_commit_index_increases_monotonically",
        5,
    ),
    Mutant(
        "M10 entries are acknowledged without an fsync",
        NODE,
        "must_sync=bool(is_vote_new or entries or snapshot",
        "must_sync=bool(is_vote_new or snapshot",
        CONTRACT + "must_sync_tells_what_the_next_message_stands_on",
        5,
    ),
    Mutant(
        "M10b entries are acknowledged a Ready before they are saved",
        NODE,
        "        committed = self._log.unapplied()\n",
        "        committed = self._log.unapplied()\n"
        "        if self._messages and self._role is not LEADER:\n"
        "            entries = ()\n",
        CONTRACT + "must_sync_tells_what_the_next_message_stands_on",
        5,
    ),
    Mutant(
        "M11 a leader counts its own entry before it is saved",
        NODE,
        "acknowledge(self._log.saved, self._log.first_index)",
        "acknowledge(self._log.last_index, self._log.first_index)",
        CONTRACT + "what_was_proposed_after_a_ready_is_not_saved_by_it",
    ),
    Mutant(
        "M11b a single voter commits what it is about to save",
        NODE,
        "        self._uncommitted_bytes += len(data)\n        return entry.index",
        "        self._uncommitted_bytes += len(data)\n"
        "        if self._tracker.quorum == 1:\n"
        "            self._log.commit_to(entry.index)\n"
        "        return entry.index",
        CONTRACT + "a_leaders_own_entry_counts_only_once_it_was_saved",
    ),
    Mutant(
        "M12 an acknowledgement of an earlier term counts",
        NODE,
        "        if message.term < self._term and message.type not in _READS:",
        "        if message.term < self._term and message.type not in (*_READS, APPEND_REPLY):",
        PAPER + "5_1_a_reply_of_an_older_term_counts_for_nothing",
        60,
    ),
    Mutant(
        "M13 a read is answered without asking a quorum",
        NODE,
        "        confirmed = self._tracker.reached(lambda follower: follower.round)",
        "        confirmed = self._round",
        PAPER + "8_a_leader_checks_that_it_was_not_deposed_before_it_answers_a_read",
        5,
    ),
    Mutant(
        "M14 a read is answered before a commit in the leader's term",
        NODE,
        "        if self._log.term_at(self._log.commit) != self._term:\n            self._early",
        "        if False:\n            self._early",
        CONTRACT + "reads_wait_until_the_leader_committed_in_its_own_term",
        15,
    ),
    Mutant(
        "M15 the answer to an older round confirms a newer read",
        NODE,
        "        answered = int.from_bytes(message.context) if len(message.context) == 8 else 0",
        "        answered = self._round",
        CONTRACT + "an_acknowledgement_of_an_earlier_round_never_confirms_a_later_read",
        5,
    ),
    Mutant(
        "M15b a read joins a round that has already left",
        NODE,
        "        if not self._is_round_open:\n            self._send_heartbeats()",
        "        if not self._round:\n            self._send_heartbeats()",
        CONTRACT + "a_read_is_confirmed_by_a_round_of_heartbeats_that_began_after_it",
        5,
    ),
    Mutant(
        "M16 a follower answers a read by what it knows",
        NODE,
        "            self._send(READ_INDEX, self._leader, context=context)",
        "            self._answers.append(ReadState(self._log.commit, context))",
        CONTRACT + "a_read_on_a_follower_or_learner_is_forwarded",
        5,
    ),
    Mutant(
        "M17 a leader that was removed goes on and counts itself",
        NODE,
        "            self._leave()\n            return\n",
        "            self._tracker.change(Members(members.voters | {self._id}), self._log.last_index)\n",
        CONTRACT + "a_leader_that_removes_itself_hands_over_or_steps_down_and_counts_itself_no_more",
    ),
    Mutant(
        "M18 half is a majority",
        TRACKER,
        "        return len(self.members.voters) // 2 + 1",
        "        return (len(self.members.voters) + 1) // 2",
        PAPER + "5_2_a_candidate_wins_with_a_majority_of_the_full_cluster",
        10,
    ),
    Mutant(
        "M19 a second change is taken",
        NODE,
        "        if self._log.has_change(self._log.last_index):",
        "        if False:",
        CONTRACT + "a_change_is_refused_while_an_earlier_one_is_unapplied",
        20,
    ),
    Mutant(
        "M19b a change is taken while one that was committed is unapplied",
        NODE,
        "        if self._log.has_change(self._log.last_index):",
        "        log = self._log\n"
        "        if any(e.kind is CHANGE for e in log.between(log.commit + 1, log.last_index)):",
        CONTRACT + "a_change_is_refused_while_an_earlier_one_is_unapplied",
    ),
    Mutant(
        "M19c a change is taken before a commit in the leader's term",
        NODE,
        '        if self._log.term_at(self._log.commit) != self._term:\n            return "this',
        '        if False:\n            return "this',
        CONTRACT + "a_change_is_refused_before_the_leader_committed_in_its_own_term",
        20,
    ),
    Mutant(
        "M20 the members of a leader's snapshot are not taken over",
        NODE,
        "            self._tracker.change(snapshot.members, next_index=0)",
        "            pass",
        PAPER + "7_a_snapshot_includes_the_latest_configuration",
        40,
    ),
    Mutant(
        "M21 sessions are not in the snapshot",
        CATALOG,
        "for client, session in self._sessions.items()\n                ],",
        "for client, session in ()\n                ],",
        "test_catalog.py::test_the_same_sequence_again_gets_the_first_answer_and_changes_nothing",
    ),
    Mutant(
        "M22 who restarted from a snapshot no longer knows what was answered",
        CATALOG,
        "dict(answers))",
        "{})",
        "test_catalog.py::test_the_same_sequence_again_gets_the_first_answer_and_changes_nothing",
    ),
    Mutant(
        "M22b a command that comes again is carried out again",
        CATALOG,
        "        if answer is None:\n            answer = session",
        "        if True:\n            answer = session",
        "test_catalog.py::test_the_same_sequence_again_gets_the_first_answer_and_changes_nothing",
    ),
    Mutant(
        "M23 a snapshot older than the commit is installed",
        NODE,
        "        if snapshot.index > log.commit:\n            if",
        "        if snapshot.index != log.commit:\n            if",
        PAPER + "7_an_old_or_repeated_snapshot_moves_nothing_back",
        25,
    ),
    Mutant(
        "M24 an acknowledged record that is damaged is cut off like a torn one",
        STORAGE,
        "            if found.count < header.acknowledged:",
        "            if False:",
        "test_raft_storage.py::test_an_acknowledged_tail_that_is_gone_is_corruption",
    ),
    Mutant(
        "M25 a pre-candidate moves its term",
        NODE,
        "        self._take_role(PRE_CANDIDATE, NOBODY)\n",
        "        self._take_role(PRE_CANDIDATE, NOBODY)\n        self._term, self._vote = self._term + 1, NOBODY\n",
        CONTRACT + "a_pre_candidate_does_not_move_its_term",
        5,
    ),
    Mutant(
        "M25b who is asked for a pre-vote takes its term over",
        NODE,
        "        if message.term > self._term and message.type is VOTE:",
        "        if message.term > self._term:",
        CONTRACT + "a_granting_pre_vote_reply_repeats_the_term_and_binds_nobody",
        5,
    ),
    # What this code invites
    Mutant(
        "N1 a heartbeat's commit is not held to what the follower has",
        NODE,
        "                commit = min(follower.match, self._log.commit)",
        "                commit = self._log.commit",
        CONTRACT + "a_heartbeats_commit_never_exceeds_what_the_follower_is_known_to_hold",
        5,
    ),
    Mutant(
        "N2 a vote leaves without an fsync",
        NODE,
        "must_sync=bool(is_vote_new or entries",
        "must_sync=bool(entries",
        PAPER + "5_2_a_vote_is_on_the_disk_before_it_is_sent",
        5,
    ),
    Mutant(
        "N3 a Ready is handed out before the last came back",
        NODE,
        '        assert self._handed_out is None, "the last Ready was not advanced"\n',
        "",
        CONTRACT + "a_second_ready_before_advance_asserts",
    ),
    Mutant(
        "N4 a transfer is never dropped",
        NODE,
        "            if self._transfer_elapsed >= patience:",
        "            if False:",
        CONTRACT + "a_transfer_is_dropped_after_election_ticks",
    ),
    Mutant(
        "N5 a transfer is extended by asking again",
        NODE,
        " or to == self._transfer_to:\n            return",
        ":\n            return",
        CONTRACT + "a_second_request_for_the_same_target_does_not_extend_it",
    ),
    Mutant(
        "N6 a learner counts to a majority",
        TRACKER,
        "for id in self.members.voters])[-self.quorum]",
        "for id in self.members.everyone])[-self.quorum]",
        CONTRACT + "a_learner_is_sent_everything_counts_for_nothing_and_becomes_a_voter",
        5,
    ),
    Mutant(
        "N7 a learner stands for election",
        NODE,
        "return self._id in self._tracker.members.voters and self._is_settled() and",
        "return self._is_settled() and",
        CONTRACT + "a_learner_never_campaigns",
        5,
    ),
    Mutant(
        "N8 one stands with a committed change unapplied",
        NODE,
        "return self._id in self._tracker.members.voters and self._is_settled() and",
        "return self._id in self._tracker.members.voters and",
        CONTRACT + "nobody_campaigns_while_a_committed_change_is_unapplied",
    ),
    Mutant(
        "N9 a snapshot that was lost is never sent again",
        TRACKER,
        'is_lost or (self.state == "snapshot" and self.snapshot_ticks >= patience)',
        "is_lost",
        CONTRACT + "a_lost_snapshot_or_its_acknowledgement_heals_by_ticks_alone",
    ),
    Mutant(
        "N10 an append that was lost is never sent again",
        TRACKER,
        "        if is_lost or (self.state",
        "        if (self.state",
        CONTRACT + "a_lost_append_or_acknowledgement_heals_by_ticks_alone",
    ),
    Mutant(
        "N11 uncommitted bytes never become fewer",
        NODE,
        "            self._uncommitted_bytes -= sum",
        "            sum",
        CONTRACT + "one_proposal_is_always_taken_and_the_next_is_dropped_while_too_much_is_uncommitted",
        15,
    ),
    Mutant(
        "N12 who is asked to stand asks for pre-votes first",
        NODE,
        "                self._become_candidate(TRANSFER)",
        "                self._become_pre_candidate()",
        CONTRACT + "a_target_that_is_level_is_told_to_stand_and_skips_the_pre_vote",
    ),
    Mutant(
        "N13 a change counts when it is appended",
        NODE,
        "        return self._append(members.to_bytes(), CHANGE)",
        "        self._tracker.change(members, self._log.last_index)\n"
        "        return self._append(members.to_bytes(), CHANGE)",
        CONTRACT + "a_change_counts_from_when_it_is_applied",
    ),
    Mutant(
        "N14 a change that counts may be forgotten when the power fails",
        NODE,
        " or snapshot or has_change or",
        " or snapshot or",
        CONTRACT + "a_change_that_counts_is_remembered_over_a_loss_of_power",
    ),
    Mutant(
        "N15 of two voters the leader removes itself",
        NODE,
        "        if len(now) == 2 and members.voters == now - {self._id}:",
        "        if False:",
        CONTRACT + "from_two_voters_to_one_the_leader_removes_the_other",
    ),
    Mutant(
        "N16 of two voters the one that is to go stands",
        NODE,
        " and not self._is_leaving_one()",
        "",
        CONTRACT + "of_two_voters_the_one_that_is_to_go_never_leads",
    ),
    Mutant(
        "N17 more than one voter changes at a time",
        NODE,
        "        if len(now ^ members.voters) > 1:",
        "        if False:",
        CONTRACT + "one_voter_at_a_time_learners_freely_and_never_zero_voters",
    ),
    Mutant(
        "N18 an entry that took another's place passes for saved with it",
        LOG,
        "            if self.term_at(entry.index) == entry.term:\n                self.saved = max",
        "            if True:\n                self.saved = max",
        CONTRACT + "messages_may_arrive_between_ready_and_advance",
    ),
    Mutant(
        "N19 back-off by one entry at a time",
        NODE,
        "            follower.refuse(message.index, agreed)",
        "            follower.refuse(message.index, message.index - 1)",
        CONTRACT + "a_follower_a_thousand_entries_astray_is_found_in_a_handful_of_rejections",
    ),
    Mutant(
        "N20 the window of appends has no end",
        TRACKER,
        "            return len(self.inflight) >= max_inflight",
        "            return False",
        CONTRACT + "at_most_max_inflight_appends_are_unacknowledged",
    ),
    Mutant(
        "N21 early reads are dropped",
        NODE,
        "            self._early_reads.append((id, context))\n            return",
        "            return",
        CONTRACT + "reads_wait_until_the_leader_committed_in_its_own_term",
    ),
    Mutant(
        "N22 a snapshot takes along what follows it",
        NODE,
        "            if log.term_at(snapshot.index) == snapshot.term:\n",
        "            if False:\n",
        PAPER + "7_what_follows_a_snapshot_of_a_prefix_of_the_log_is_retained",
    ),
    Mutant(
        "N23 who hears its leader helps another",
        NODE,
        "        if heard_leader and message.context != TRANSFER:",
        "        if False:",
        PAPER + "6_servers_disregard_requests_for_votes_when_they_believe_a_current_leader_exists",
    ),
    Mutant(
        "N24 a leader that hears nobody stays",
        NODE,
        "        if self._tracker.reached(lambda follower: -follower.silence) <= -patience:",
        "        if False:",
        CONTRACT + "a_leader_that_hears_nobody_steps_down_after_exactly_election_ticks",
    ),
    Mutant(
        "N25 a save returns before its fsync",
        STORAGE,
        "            os.fdatasync(self._file)\n",
        "",
        "test_raft_storage.py::test_a_save_costs_one_fsync_and_a_lone_hard_state_none",
    ),
    Mutant(
        "N26 a voter writes to another's disk",
        STORAGE,
        "            if header.identity != self._identity:",
        "            if False:",
        "test_raft_storage.py::test_another_disk_neither_reads_nor_writes",
    ),
    Mutant(
        "N27 a write that failed is tried again",
        STORAGE,
        "            self._end_with(failed)\n",
        "",
        "test_raft_storage.py::test_a_failed_write_ends_the_storage",
    ),
    Mutant(
        "N28 a voter sends before it saves",
        VOTER,
        "        if ready.must_sync:  # a commit alone",
        "        self._send(ready.messages)\n        if ready.must_sync:  # a commit alone",
        "test_voter.py::test_nothing_leaves_before_it_is_saved",
    ),
    Mutant(
        "N29 a voter answers a read before it has applied enough",
        VOTER,
        "for context, index in self._confirmed.items() if index <= applied]:",
        "for context, index in self._confirmed.items() if index <= applied + 1]:",
        "test_voter.py::test_a_follower_answers_a_read_once_it_has_applied_enough",
    ),
    Mutant(
        "N30 a voter answers a proposal by the entry that took its place",
        VOTER,
        "        if term == entry.term:\n",
        "        if True:\n",
        "test_voter.py::test_a_proposal_that_another_entry_replaced_was_not_done",
    ),
)

if __name__ == "__main__":
    main()
