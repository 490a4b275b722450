"""Raft in bad weather: hundreds of simulated clusters, each with its own faults, and every invariant at every event.

A seed that fails is printed with its story and the command that replays it.
"""

import marshal
import os
import random
import subprocess
import sys

import pytest

from cluster.raft import Config, Entry, HardState, Members, Progress, Ready, Saved, Snapshot
from tests.raft_host import Disk, Machine, Watched
from tests.raft_invariants import Violation
from tests.raft_simulation import Outcome, run_seed, run_seeds

pytestmark = pytest.mark.timeout(1200)  # all fixed seeds are one fixture, and other files run beside this one

FIXED = range(300)
FRESH = 200
JOBS = 2


def assert_all_hold(outcomes: list[Outcome | Violation]) -> None:
    broken = [outcome for outcome in outcomes if isinstance(outcome, Violation)]
    told = "\n\n".join(str(violation) for violation in broken[:3])
    assert not broken, f"{len(broken)} of {len(outcomes)} seeds: {[v.seed for v in broken]}\n{told}"


@pytest.fixture(scope="module")
def fixed() -> list[Outcome | Violation]:
    return list(run_seeds(FIXED, JOBS))


def test_the_fixed_seeds_hold(fixed: list[Outcome | Violation]) -> None:
    assert_all_hold(fixed)


def test_fresh_seeds_hold() -> None:
    first = int.from_bytes(os.urandom(6))
    print(f"seeds {first} to {first + FRESH - 1}")
    assert_all_hold(list(run_seeds(range(first, first + FRESH), JOBS)))


def test_the_weather_is_bad_and_work_is_done_in_it(fixed: list[Outcome | Violation]) -> None:
    """A swarm in which nothing happens would find nothing."""
    worlds = [outcome for outcome in fixed if isinstance(outcome, Outcome)]
    assert sum(world.terms > 3 for world in worlds) > len(worlds) // 2
    assert sum(world.changes > 0 for world in worlds) > len(worlds) // 4
    assert sum(world.answered > 50 for world in worlds) > len(worlds) // 2


@pytest.mark.parametrize("seed", [5, 17])
def test_one_seed_is_one_world(seed: int) -> None:
    """I16: twice here, and once in a process that hashes words otherwise."""
    here = run_seed(seed)
    assert run_seed(seed) == here
    command = [sys.executable, "-m", "tests.raft_simulation", str(seed)]
    child = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "4321"}, capture_output=True, text=True)
    assert child.stdout.strip() == str(here)


def first_violation(seeds: range, **planted: type) -> Violation:
    for seed in seeds:
        try:
            run_seed(seed, **planted)
        except Violation as violation:
            return violation
    raise AssertionError(f"none of {seeds} sees what is planted in {planted}")


class ForgetsWhoItVotedFor(Watched):
    """Its term is saved, its vote is not."""

    def ready(self) -> Ready:
        done = super().ready()
        if done.hard_state is None:
            return done
        object.__setattr__(done, "hard_state", HardState(done.hard_state.term, 0, done.hard_state.commit))
        return done


class CountsAMemberTooFew(Watched):
    """It takes a change of members for done without the newcomers."""

    def apply_conf_change(self, members: Members) -> None:
        known = self.status().members.everyone
        super().apply_conf_change(Members(members.voters & known or members.voters, members.learners))


class ForgetsWhatItAnswered(Machine):
    """Its snapshots leave out which client got which answer."""

    def snapshot(self) -> bytes:
        return marshal.dumps((self.applied, self.digest, self.executed, {}, self.registers), 2)


@pytest.mark.parametrize("planted", [ForgetsWhoItVotedFor, CountsAMemberTooFew])
def test_a_planted_fault_of_the_node_is_seen(planted: type[Watched]) -> None:
    violation = first_violation(range(20), node_class=planted)
    assert f"python -m tests.raft_simulation {violation.seed}" in str(violation)


def test_a_state_machine_that_forgets_its_clients_is_seen() -> None:
    assert first_violation(range(60), machine_class=ForgetsWhatItAnswered).invariant in {"I5", "I7", "I12"}


def test_a_watched_node_shows_what_its_status_says() -> None:
    """The referee of the swarm looks there instead."""
    members = Members(frozenset({1}), frozenset({2}))
    node = Watched(Config(1), Saved(Snapshot(4, 2, members), HardState(3, 1, 4)), random.Random(1))
    node.campaign()
    while node.has_ready():
        ready = node.ready()
        node.advance(ready)
    node.propose(b"not saved yet")
    status = node.status()
    for name in ("role", "term", "vote", "commit", "applied", "last_index", "members"):
        assert getattr(node, name) == getattr(status, name), name
    assert status.last_index > status.commit == status.applied > 4 and len(status.progress) == 2
    assert {id: Progress(each.match, each.next, each.state) for id, each in node.followers.items()} == status.progress


def test_the_disk_keeps_what_was_synced_and_may_lose_a_commit() -> None:
    """No world would mean anything on a disk that forgets more, or never forgets."""
    after: set[tuple[int, int]] = set()
    for seed in range(20):
        disk = Disk(Snapshot(0, 0, Members(frozenset({1}))))
        disk.save(Ready(HardState(1, 1, 0), None, (Entry(1, 1),), (), (), (), None, True), b"")
        disk.save(Ready(HardState(1, 1, 1), None, (), (), (), (), None, False), b"")
        disk.lose_power(random.Random(seed))
        saved = disk.load()
        assert (saved.hard_state.term, saved.hard_state.vote) == (1, 1)
        after.add((len(saved.entries), saved.hard_state.commit))
    assert after == {(1, 0), (1, 1)}


def test_a_save_that_power_cuts_short_leaves_a_beginning_of_it() -> None:
    entries = tuple(Entry(2, index) for index in (2, 3, 4))
    lengths = set()
    for seed in range(40):
        disk = Disk(Snapshot(0, 0, Members(frozenset({1}))))
        disk.save(Ready(HardState(1, 1, 0), None, (Entry(1, 1), Entry(1, 2)), (), (), (), None, True), b"")
        disk.save_torn(Ready(HardState(2, 1, 4), None, entries, (), (), (), None, True), b"", random.Random(seed))
        saved = disk.load()
        old_or_begun = (Entry(1, 1), Entry(1, 2)), *((Entry(1, 1), *entries[:count]) for count in (1, 2, 3))
        assert saved.entries in old_or_begun and saved.hard_state.commit <= len(saved.entries)
        lengths.add(len(saved.entries))
    assert lengths == {2, 3, 4}
