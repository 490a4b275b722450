"""A swarm of simulated Raft clusters: each seed draws its own weather, and one seed is one world, to the byte.

    python -m tests.raft_simulation SEED                      replay one seed
    python -m tests.raft_simulation --seeds 0-9999 --jobs 2   look for a seed that breaks an invariant

A world is one heap of events. Its time counts in ticks of a right-going clock, as floats, so that clocks may drift.
The nodes are real ones, driven in the contract's order: save, send, apply, answer, advance. First comes the
weather, then a calm in which all must heal (I15), then one node goes away and comes back and nobody notices (I13).
"""

import argparse
import hashlib
import marshal
import math
import os
import random
import sys
import textwrap
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heappop, heappush
from multiprocessing import get_context
from typing import Any

from cluster.raft import (
    NOBODY,
    ConfChangeRefused,
    Config,
    Entry,
    Members,
    Message,
    NodeId,
    NotLeader,
    ProposalDropped,
    ReadState,
    Ready,
    Snapshot,
    Status,
)
from cluster.raft.messages import CHANGE, HEARTBEAT, HEARTBEAT_REPLY, LEADER
from cluster.voter import PACE
from tests.raft_host import Disk, Host, Machine, Watched
from tests.raft_invariants import Referee, Violation, quorum

ELECTION = 10  # ticks
LEADER_WITHIN = 10 * 2 * ELECTION
HEALED_WITHIN = LEADER_WITHIN + 20 * 2 * ELECTION
TICKS = 800.0  # of bad weather, for up to five voters
OPERATION_EVERY = 8.0  # ticks: about 500 a simulated minute
CRASH_POINTS = ("save", "saving", "send", "apply", "advance")
FAULTS = {  # mean ticks between two of a kind
    "partition": 250.0,
    "clog": 150.0,
    "crash": 200.0,
    "blackout": 1200.0,
    "storm": 1500.0,
    "pause": 250.0,
    "clock": 300.0,
    "member": 120.0,
    "loss": 900.0,
    "transfer": 200.0,
    "campaign": 400.0,
    "rivals": 400.0,
    "burst": 200.0,
}


@dataclass(frozen=True)
class Weather:
    """What one seed draws: the cluster, and how it is troubled. Each kind of trouble is away from 3 worlds in 10."""

    voters: int
    learners: int
    ticks: float
    heartbeat_ticks: int
    max_entries: int
    max_inflight: int
    max_uncommitted_bytes: int
    compact_after: int  # entries; 0 is never
    latency: float
    drop: float
    duplicate: float
    late: float  # how many messages take up to two election times; one in a hundred of all takes up to twenty
    save_ticks: float  # the longest save
    answer_loss: float
    vanish: float  # how many clients give up instead of asking again
    faults: frozenset[str]

    @staticmethod
    def draw(rng: random.Random, ticks: float) -> "Weather":
        def maybe(value: float) -> float:
            return value if rng.random() < 0.7 else 0.0

        voters = rng.choice((1, 3, 3, 4, 5, 5, 7))
        return Weather(
            voters=voters,
            learners=rng.choice((0, 0, 1, 2)),
            ticks=ticks * 5 / max(5, voters),
            heartbeat_ticks=rng.choice((1, 2, 3)),
            max_entries=rng.choice((1, 64)),
            max_inflight=rng.choice((1, 8, 256)),
            max_uncommitted_bytes=rng.choice((100, 16 * 2**20)),
            compact_after=rng.choice((10, 100, 0)),
            latency=rng.choice((0.1, 0.5, 1.0)),
            drop=maybe(rng.uniform(0.0, 0.3)),
            duplicate=maybe(rng.uniform(0.0, 0.5)),
            late=maybe(rng.uniform(0.0, 0.2)),
            save_ticks=maybe(rng.choice((0.2, 1.0, 6.0))),
            answer_loss=maybe(rng.uniform(0.0, 0.3)),
            vanish=maybe(rng.uniform(0.0, 0.2)),
            faults=frozenset(name for name in FAULTS if rng.random() < 0.7),
        )


@dataclass(slots=True, eq=False)
class Operation:
    """What a client wants: a write, which keeps its sequence through every retry, or a read."""

    who: bytes  # "client sequence"
    key: bytes
    command: bytes  # empty for a read
    attempt: int = 0
    target: NodeId = NOBODY
    index: int = 0  # of the state that answered
    answer: bytes = b""
    is_open: bool = True


@dataclass(frozen=True)
class Outcome:
    """Of a world in which every invariant held."""

    seed: int
    trace_hash: str  # SHA-256 of all that happened
    ticks: float
    events: int
    answered: int  # operations
    terms: int  # that had a leader
    committed: int
    changes: int  # of members


class World:
    """The heap of events, the hosts and their driver, and the wires between them."""

    def __init__(self, seed: int, node_class: type[Watched], machine_class: type[Machine], ticks: float) -> None:
        self.seed, self.node_class, self.machine_class = seed, node_class, machine_class
        self.rng = random.Random(seed)
        self.weather = weather = Weather.draw(self.rng, ticks)
        self.now, self.order, self.handled, self.is_calm = 0.0, 0, 0, False
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.trace: list[tuple[object, ...]] = []
        self.recent: deque[tuple[object, ...]] = deque(maxlen=45)
        self.sum = hashlib.sha256()
        self.blocked: set[tuple[NodeId, NodeId]] = set()
        self.clogged: dict[tuple[NodeId, NodeId], float] = {}  # until when
        voters = range(1, weather.voters + 1)
        learners = range(weather.voters + 1, weather.voters + weather.learners + 1)
        self.first = Snapshot(0, 0, Members(frozenset(voters), frozenset(learners)))
        self.hosts: dict[NodeId, Host] = {}
        self.referee = Referee(seed, self.hosts, self.first, weather.max_inflight, weather.max_uncommitted_bytes)
        self.is_window_small = weather.max_inflight <= 8  # small enough to be watched (I14)
        self.clients = Clients(self)
        self.trouble = Trouble(self)

    # Events

    def after(self, delay: float, act: Callable[..., None], *about: Any) -> None:
        self.order += 1
        heappush(self.events, (self.now + delay, self.order, act, about))

    def note(self, *event: object) -> None:
        """Part of the trace: numbers, bytes and words only, so that it is the same to the byte in every process."""
        self.trace.append((self.now, *event))

    def seal(self) -> None:
        self.sum.update(marshal.dumps(self.trace, 2))  # of this version: without references from one to another
        self.recent.extend(self.trace)
        self.trace.clear()

    def run_until(self, end: float, is_done: Callable[[], bool] = lambda: False) -> None:
        """`is_done` is asked now and then, and ends it early."""
        events, ask_at = self.events, self.now
        while events and events[0][0] <= end:
            self.now, _, act, about = heappop(events)
            self.handled += 1
            act(*about)
            if self.now >= ask_at:
                self.seal()
                if is_done():
                    return
                ask_at = self.now + 2.0
        self.now = end

    # A host's life

    def new_host(self, id: NodeId, first: Snapshot) -> Host:
        host = self.hosts[id] = Host(id, Disk(first))
        return host

    def start(self, host: Host) -> None:
        weather = self.weather
        config = Config(
            host.id, ELECTION, weather.heartbeat_ticks, weather.max_entries, weather.max_inflight,
            weather.max_uncommitted_bytes,
        )  # fmt: skip
        host.machine = self.machine_class()
        host.machine.restore(host.disk.snapshot.data)
        host.members = host.disk.snapshot.members
        rng = random.Random(f"{self.seed}/{host.id}/{host.incarnation}")
        host.node = self.node_class(config, host.disk.load(), rng)
        self.note("start", host.id, host.disk.last_index)
        self.referee.started(host)
        self.after(self.rng.random(), self.tick, host, host.incarnation)
        self.pump(host)

    def crash(self, host: Host, down_for: float) -> None:
        self.note("crash", host.id)
        host.disk.lose_power(self.rng)
        host.node, host.outstanding, host.paused, host.crash_at = None, None, False, ""
        host.incarnation += 1
        for held in (host.inbox, host.waiting, host.reads, host.confirmed):
            held.clear()
        self.after(down_for, self.restart, host, host.incarnation)

    def restart(self, host: Host, incarnation: int) -> None:
        if host.node is None and host.incarnation == incarnation and not host.lost:
            self.start(host)

    def resume(self, host: Host, incarnation: int) -> None:
        """Time goes on for a host that stood still; what came meanwhile is read at once."""
        if not host.paused or host.incarnation != incarnation:
            return
        self.note("resume", host.id)
        host.paused = False
        inbox, host.inbox = host.inbox, []
        for act, about in inbox:
            act(*about)

    def tick(self, host: Host, incarnation: int) -> None:
        if host.node is None or host.incarnation != incarnation:
            return
        self.after(1.0 / host.rate, self.tick, host, incarnation)
        if host.paused:
            return
        self.trace.append((self.now, "tick", host.id))
        host.node.tick()
        self.pump(host)

    def deliver(self, message: Message) -> None:
        host = self.hosts[message.to]
        if host.node is None:
            return
        if host.paused:
            host.inbox.append((self.deliver, (message,)))
            return
        kind = message.type
        about = (
            self.now, "deliver", message.to, kind._name_, message.sender, message.term, message.index, message.log_term,
            len(message.entries), message.commit, message.reject, message.hint,
        )  # fmt: skip
        self.trace.append(about)
        before = self.referee.hears(host, message)
        host.node.step(message)
        if before:
            self.referee.require(host.node.status() == before, "5.1", f"{host.id} heeds {message}")
        if kind is not HEARTBEAT and kind is not HEARTBEAT_REPLY:
            self.referee.examine(host)
        self.pump(host)

    # The driver of a host: save, send, apply, answer, advance

    def pump(self, host: Host) -> None:
        for _ in range(100):
            node = host.node
            if node is None or host.outstanding is not None or not node.has_ready():
                return
            ready = host.outstanding = node.ready()
            must_save = ready.hard_state or ready.entries or ready.snapshot
            if must_save or ready.committed or ready.leader is not None or self.is_window_small:
                self.referee.handed_out(host, ready)
            if must_save and not self.is_calm and self.weather.save_ticks and self.rng.random() < 0.5:
                self.after(self.rng.random() * self.weather.save_ticks, self.saved, host, host.incarnation, ready)
                return
            self.save_and_send(host, ready)
        raise Violation(self.seed, "Ready", f"{host.id} has always something more to do")

    def saved(self, host: Host, incarnation: int, ready: Ready) -> None:
        """The disk was slow; ticks and messages went on meanwhile."""
        self.later(host, incarnation, self.save_and_send, ready)

    def later(self, host: Host, incarnation: int, act: Callable[[Host, Ready], None], ready: Ready) -> None:
        if host.incarnation != incarnation:
            return
        if host.paused:
            host.inbox.append((self.later, (host, incarnation, act, ready)))
            return
        act(host, ready)
        self.pump(host)

    def crash_here(self, host: Host) -> None:
        self.note("crashes before", host.id, host.crash_at)
        self.crash(host, self.rng.uniform(0.5, 10) * ELECTION)

    def save_and_send(self, host: Host, ready: Ready) -> None:
        if host.crash_at == "save":
            return self.crash_here(host)
        chain = self.referee.truth[ready.snapshot.index].chain if ready.snapshot else b""
        if host.crash_at == "saving":
            host.disk.save_torn(ready, chain, self.rng)
        else:
            host.disk.save(ready, chain)
        if ready.entries:
            self.note("save", host.id, ready.entries[0].index, len(ready.entries), ready.entries[-1].term)
            self.referee.saved(host, ready.entries)
        if host.crash_at in ("saving", "send"):
            return self.crash_here(host)
        with_entries = bool(ready.entries)
        for message in ready.messages:
            self.referee.sending(host, message, with_entries)
            self.send(host, message)
        if host.crash_at == "apply":
            return self.crash_here(host)
        if ready.committed and not self.is_calm and self.weather.save_ticks and self.rng.random() < 0.1:
            delay = self.rng.random() * self.weather.save_ticks
            self.after(delay, self.later, host, host.incarnation, self.apply_and_advance, ready)
            return
        self.apply_and_advance(host, ready)

    def apply_and_advance(self, host: Host, ready: Ready) -> None:
        node, referee = host.node, self.referee
        assert node is not None
        if ready.snapshot:
            self.note("restore", host.id, ready.snapshot.index)
            host.machine.restore(ready.snapshot.data)
            host.members = ready.snapshot.members
            referee.restored(host, ready.snapshot)
        for entry in ready.committed:
            self.apply(host, entry)
        for read in ready.reads:
            self.clients.confirmed(host, read)
        if host.confirmed:
            self.clients.answer_reads(host)
        if host.crash_at == "advance":
            return self.crash_here(host)
        host.outstanding = None
        node.advance(ready)
        if ready.entries or ready.committed or ready.snapshot:
            referee.examine(host)
            if self.weather.compact_after:
                self.compact(host)

    def apply(self, host: Host, entry: Entry) -> None:
        assert host.node is not None
        answer = host.machine.apply(entry)
        if self.referee.applied(host, entry, answer):
            self.note("commit", host.id, entry.index, entry.term, entry.data)
        if entry.kind is CHANGE:
            host.members = Members.from_bytes(entry.data)
            host.node.apply_conf_change(host.members)
            self.referee.examine(host)
            self.trouble.proposed.clear()
        elif answer and answer[0] in host.waiting:
            host.waiting.discard(answer[0])
            self.clients.respond(self.clients.operations[answer[0]], entry.index, answer[1])

    def compact(self, host: Host) -> None:
        machine, disk = host.machine, host.disk
        if machine.applied - disk.snapshot.index < self.weather.compact_after or self.rng.random() < 0.3:
            return
        term = disk.term_at(machine.applied)
        assert term is not None and host.node is not None
        snapshot = Snapshot(machine.applied, term, host.members, machine.snapshot())
        self.referee.true_snapshot(host, snapshot)
        self.note("compact", host.id, snapshot.index)
        disk.compact(snapshot)
        host.node.compact(snapshot)

    # Wires

    def send(self, host: Host, message: Message) -> None:
        target, weather, rng = self.hosts.get(message.to), self.weather, self.rng
        if target is None or target.lost:
            return
        pair = (host.id, message.to)
        if pair in self.blocked:
            return
        if self.is_calm:  # and the wires are fast, so that what a small window let pile up is gone in time
            self.after(0.1 + 0.1 * rng.random(), self.deliver, message)
            return
        if weather.drop and rng.random() < weather.drop:
            return
        copies = 2 if weather.duplicate and rng.random() < weather.duplicate else 1
        for _ in range(copies):
            delay = weather.latency * (0.2 + rng.random())
            if weather.late:
                if message.snapshot:  # long as it is, it takes its time, and others overtake it
                    delay += rng.random() * 3 * ELECTION
                draw = rng.random()
                if draw < weather.late:
                    delay = rng.random() * ELECTION * (20 if draw < 0.01 else 2)
            if (until := self.clogged.get(pair, 0.0)) > self.now:
                delay += until - self.now
            self.after(delay, self.deliver, message)

    # The three acts

    def run(self) -> Outcome:
        for id in sorted(self.first.members.everyone):
            self.start(self.new_host(id, self.first))
        self.clients.begin()
        self.trouble.begin()
        self.run_until(self.weather.ticks)
        self.calm_down()
        self.run_until(self.now + LEADER_WITHIN, lambda: self.leader() is not None)
        self.referee.require(self.leader(), "I15", f"no leader within {LEADER_WITHIN} ticks of calm")
        self.run_until(self.now + HEALED_WITHIN, lambda: not self.ailing())
        self.referee.require(not self.ailing(), "I15", f"not healed within {HEALED_WITHIN} ticks: {self.ailing()}")
        self.clients.nothing_is_lost()
        self.one_goes_and_comes_back()
        self.seal()
        answered = sum(bool(operation.index) for operation in self.clients.operations.values())
        return Outcome(
            self.seed, self.sum.hexdigest(), self.now, self.handled, answered, len(self.referee.leader_of),
            len(self.referee.truth) - 1, len(self.referee.members_at) - 1,
        )  # fmt: skip

    def calm_down(self) -> None:
        """All faults stop; in half of the worlds after the power went everywhere at once."""
        self.note("calm")
        self.is_calm = True
        self.blocked.clear()
        self.clogged.clear()
        everywhere = self.rng.random() < 0.5
        for host in self.hosts.values():
            host.rate, host.crash_at = 1.0, ""
            if everywhere and host.node is not None:
                self.crash(host, 0.0)
        # What is still under way arrives, but not in the middle of what follows.
        horizon = self.now + ELECTION
        self.events = [(min(at, horizon), order, act, about) for at, order, act, about in self.events]
        heapify(self.events)
        for host in list(self.hosts.values()):
            self.restart(host, host.incarnation)
            self.resume(host, host.incarnation)

    def leader(self) -> Host | None:
        """The leader that the living members have now."""
        alive = [host for id in sorted(self.referee.members.everyone) if (host := self.hosts[id]).node is not None]
        term = max((host.seen.term for host in alive), default=0)
        return next((h for h in self.hosts.values() if h.node and h.seen.role is LEADER and h.seen.term == term), None)

    def ailing(self) -> str:
        """What is not yet as it must be, or nothing."""
        leader, last = self.leader(), len(self.referee.truth) - 1
        if leader is None or leader.node is None:
            return "no leader"
        if leader.node.status().last_index != last:
            return f"leader {leader.id} has uncommitted entries after {last}"
        if waiting := [operation.who for operation in self.clients.operations.values() if operation.is_open]:
            return f"unanswered: {waiting[:5]}"
        for id in sorted(self.referee.members.everyone):
            host = self.hosts[id]
            if not host.lost and host.machine.applied != last:
                return f"{id} applied {host.machine.applied} of {last}"
        return ""

    def one_goes_and_comes_back(self) -> None:
        """I13: whoever was away, with pre-vote and check-quorum, raises no term and unseats no leader."""
        self.run_until(self.now + 2 * ELECTION)
        leader, members = self.leader(), self.referee.members
        others = [id for id in sorted(members.everyone) if not self.hosts[id].lost and leader and id != leader.id]
        if leader is None or not others:
            self.referee.require(leader, "I13", "the leader was lost in the calm")
            return
        away = self.rng.choice(others)
        if sum(not self.hosts[id].lost for id in members.voters - {away}) < quorum(members):
            return
        term = leader.seen.term
        self.note("away", away)
        self.blocked = {pair for id in self.hosts for pair in ((id, away), (away, id))}
        self.run_until(self.now + 4 * ELECTION)
        self.blocked = set()
        self.note("back", away)
        self.run_until(self.now + 4 * ELECTION)
        same = self.leader() is leader and leader.seen.term == term
        self.referee.require(same, "I13", f"{away} was away, and leader {leader.id} of term {term} is one no more")


class Clients:
    """They ask, wait, ask again elsewhere under the same sequence, sometimes give up; several requests at a time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.operations: dict[bytes, Operation] = {}
        self.sequences = [0] * world.rng.randrange(1, 6)

    def begin(self) -> None:
        self.world.after(self.world.rng.uniform(0, 3 * ELECTION), self.ask)

    def ask(self) -> None:
        world = self.world
        if not world.is_calm:
            world.after(world.rng.expovariate(1 / OPERATION_EVERY), self.ask)
            self.begin_operation(NOBODY)

    def begin_operation(self, target: NodeId) -> None:
        world = self.world
        client = world.rng.randrange(len(self.sequences))
        self.sequences[client] += 1
        who = b"%d %d" % (client, self.sequences[client])
        key = b"%d" % world.rng.randrange(5)
        command = b"" if world.rng.random() < 0.3 else b"%b|%b|%b" % (who, key, who * world.rng.randrange(1, 4))
        operation = self.operations[who] = Operation(who, key, command, target=target)
        self.attempt(operation)

    def attempt(self, operation: Operation) -> None:
        world = self.world
        operation.attempt += 1
        operation.target = operation.target or self.somebody()
        patience = world.rng.uniform(2, 4) * ELECTION
        world.after(patience, self.lose_patience, operation, operation.attempt)
        if world.is_calm or world.rng.random() >= world.weather.drop:
            arrives = world.weather.latency * world.rng.random()
            world.after(arrives, self.arrive, operation, operation.attempt, operation.target)

    def somebody(self) -> NodeId:
        """Half of the clients know who says that it leads, whether that is still so or not."""
        world = self.world
        hosts = [host for host in world.hosts.values() if not host.lost]
        leaders = [host for host in hosts if host.node and host.seen.role is LEADER]
        return world.rng.choice(leaders if leaders and world.rng.random() < 0.5 else hosts).id

    def lose_patience(self, operation: Operation, attempt: int) -> None:
        world = self.world
        if not operation.is_open or operation.attempt != attempt:
            return
        if not world.is_calm and world.rng.random() < world.weather.vanish:
            operation.is_open = False
            return
        operation.target = NOBODY
        self.attempt(operation)

    def arrive(self, operation: Operation, attempt: int, target: NodeId) -> None:
        world = self.world
        host = world.hosts[target]
        if host.node is None:
            return
        if host.paused:
            host.inbox.append((self.arrive, (operation, attempt, target)))
            return
        world.note("ask", target, operation.who, attempt, bool(operation.command))
        try:
            if operation.command:
                index = host.node.propose(operation.command)
                host.waiting.add(operation.who)
                world.referee.accepted(host, index, len(operation.command))
            else:
                context = b"%b %d" % (operation.who, attempt)
                host.reads[context] = (operation.who, world.referee.proven)
                self.world.referee.asked_to_read(host, context)
                host.node.read_index(context)
        except NotLeader as refused:
            self.again(operation, attempt, refused.leader if refused.leader in world.hosts else NOBODY, 1.0)
        except ProposalDropped:
            self.again(operation, attempt, target, 3.0)
        world.pump(host)

    def again(self, operation: Operation, attempt: int, target: NodeId, delay: float) -> None:
        if operation.is_open and operation.attempt == attempt:
            operation.target = target
            operation.attempt += 1
            self.world.after(delay, self.try_again, operation, operation.attempt)

    def try_again(self, operation: Operation, attempt: int) -> None:
        if operation.is_open and operation.attempt == attempt:
            self.attempt(operation)

    def confirmed(self, host: Host, read: ReadState) -> None:
        """A read asked before the host's last crash, or answered twice, is nobody's any more."""
        if asked := host.reads.get(read.context):
            self.world.referee.read_answered(host, read.context, read.index, asked[1])
            host.confirmed.append((read.index, read.context))

    def answer_reads(self, host: Host) -> None:
        machine = host.machine
        due = [context for index, context in host.confirmed if index <= machine.applied]
        host.confirmed = [waiting for waiting in host.confirmed if waiting[0] > machine.applied]
        for context in due:
            if asked := host.reads.pop(context, None):
                operation = self.operations[asked[0]]
                self.respond(operation, machine.applied, machine.registers.get(operation.key, b""))

    def respond(self, operation: Operation, index: int, answer: bytes) -> None:
        world = self.world
        if world.is_calm or world.rng.random() >= world.weather.answer_loss:
            world.after(world.weather.latency * world.rng.random(), self.receive, operation, index, answer)

    def receive(self, operation: Operation, index: int, answer: bytes) -> None:
        self.world.note("answer", operation.who, index, answer)
        if not operation.index:
            operation.index, operation.answer, operation.is_open = index, answer, False

    def nothing_is_lost(self) -> None:
        """I7 and I12 at the end: every answer that a client ever got is in the state, as it was given."""
        leader = self.world.leader()
        assert leader is not None
        for operation in self.operations.values():
            if operation.command and operation.index:
                kept = leader.machine.answers.get(operation.who)
                right = kept == operation.answer
                text = f"{operation.who!r} was answered {operation.answer!r}, and is {kept!r}"
                self.world.referee.require(right, "I7", text)


class Trouble:
    """What goes wrong, and what administrators do meanwhile. Half of it is aimed at the leader."""

    def __init__(self, world: World) -> None:
        self.world, self.rng = world, world.rng
        self.proposed: list[Members] = []  # changes that a leader took and nobody applied yet
        self.lost: set[NodeId] = set()

    def begin(self) -> None:
        for name in FAULTS:
            if name in self.world.weather.faults:
                self.world.after(self.rng.expovariate(1 / FAULTS[name]), self.strike, name)

    def strike(self, name: str) -> None:
        world = self.world
        if world.is_calm:
            return
        world.after(self.rng.expovariate(1 / FAULTS[name]), self.strike, name)
        act: Callable[[], None] = getattr(self, name)
        act()

    def victim(self) -> Host:
        """The leader as often as not."""
        leaders = [host for host in self.world.hosts.values() if host.node and host.seen.role is LEADER]
        if leaders and self.rng.random() < 0.5:
            return max(leaders, key=lambda host: host.seen.term)
        return self.anybody()

    def anybody(self) -> Host:
        return self.rng.choice([host for host in self.world.hosts.values() if not host.lost])

    def partition(self) -> None:
        world, rng = self.world, self.rng
        ids = sorted(world.hosts)
        aimed = self.victim().id
        others = [id for id in ids if id != aimed]
        rng.shuffle(others)
        kind = rng.choice(("full", "minority", "majority", "bridge", "one way", "deaf", "mute", "held"))
        few = {aimed, *others[: max(0, (len(ids) - 1) // 2 - 1)]}
        side = {"minority": few, "majority": set(ids) - few | {aimed}, "one way": few}.get(kind, {aimed})
        pairs = {(a, b) for a in ids for b in ids if a != b}
        if kind == "bridge":  # two halves, and one who hears both
            half = set(others[: len(others) // 2])
            cut = {(a, b) for a, b in pairs if aimed not in (a, b) and (a in half) != (b in half)}
        elif kind == "full":
            cut = pairs
        elif kind in ("one way", "deaf"):  # the side is heard and hears nothing
            cut = {(a, b) for a, b in pairs if a not in side and b in side}
        elif kind == "mute":
            cut = {(a, b) for a, b in pairs if a in side and b not in side}
        else:
            cut = {(a, b) for a, b in pairs if (a in side) != (b in side)}
        world.note("partition", kind, aimed, sorted(side))
        if kind == "held":  # nothing is lost, but what others say to one arrives late, all at once, at its slow clock
            self.world.hosts[aimed].rate = 0.5
            until = world.now + rng.uniform(0.5, 3) * ELECTION
            world.clogged.update({(other, aimed): until for other in others})
            return
        world.blocked = cut
        world.after(rng.uniform(1, 15) * ELECTION, self.heal, cut)

    def heal(self, cut: set[tuple[NodeId, NodeId]]) -> None:
        if self.world.blocked is cut:
            self.world.note("heal")
            self.world.blocked = set()

    def clog(self) -> None:
        a, b = self.victim().id, self.anybody().id
        self.world.note("clog", a, b)
        self.world.clogged[a, b] = self.world.now + self.rng.uniform(0, 5) * ELECTION

    def crash(self) -> None:
        host = self.victim()
        if host.node is None:
            return
        host.crash_at = self.rng.choice(("", *CRASH_POINTS))
        if not host.crash_at:
            self.world.crash(host, self.rng.uniform(0.5, 10) * ELECTION)

    def blackout(self) -> None:
        for host in list(self.world.hosts.values()):
            if host.node is not None:
                self.world.crash(host, self.rng.uniform(0.1, 3) * ELECTION)

    def storm(self) -> None:
        host = self.victim()
        for moment in range(1, self.rng.randrange(3, 7)):
            self.world.after(moment * 6.0, self.strike_down, host)

    def strike_down(self, host: Host) -> None:
        if host.node is not None and not self.world.is_calm:
            self.world.crash(host, 2.0)

    def pause(self) -> None:
        host = self.victim()
        if host.node is not None and not host.paused:
            self.world.note("pause", host.id)
            host.paused = True
            self.world.after(self.rng.uniform(0.5, 10) * ELECTION, self.world.resume, host, host.incarnation)

    def clock(self) -> None:
        host = self.victim()
        host.rate = self.rng.choice((0.5, self.rng.uniform(0.5, 2.0), 1.0))
        self.world.note("clock", host.id, host.rate)

    def campaign(self) -> None:
        host = self.anybody()
        if host.node is not None and not host.paused:
            self.world.note("campaign", host.id)
            host.node.campaign()
            host.node.report_unreachable(self.rng.choice(sorted(self.world.hosts)))
            self.world.referee.examine(host)
            self.world.pump(host)

    def rivals(self) -> None:
        """The leader goes, and all others stand at one moment."""
        host = self.victim()
        if host.node is not None:
            self.world.crash(host, 5 * ELECTION)
            self.world.after(1.1 * ELECTION, self.all_stand)

    def all_stand(self) -> None:
        for host in list(self.world.hosts.values()):
            if host.node is not None and not host.paused and not self.world.is_calm:
                self.world.note("campaign", host.id)
                host.node.campaign()
                self.world.referee.examine(host)
                self.world.pump(host)

    def burst(self) -> None:
        """Many requests at once, where the leader is or was: what it alone holds is what others overwrite."""
        target = self.victim().id
        for _ in range(self.rng.randrange(3, 12)):
            self.world.clients.begin_operation(target)

    def transfer(self) -> None:
        host, to = self.victim(), self.rng.choice(sorted(self.world.hosts))
        if host.node is not None and not host.paused:
            self.world.note("transfer", host.id, to)
            host.node.transfer_leader(to)
            self.world.referee.examine(host)
            self.world.pump(host)

    # Membership

    def member(self) -> None:
        """One change, or two on the spot, of which the second must wait for the first."""
        host = self.victim()
        for _ in range(self.rng.randrange(1, 3)):
            self.change_members(host)

    def change_members(self, host: Host) -> None:
        world = self.world
        if host.node is None or host.paused:
            return
        before = host.node.status()
        wish = self.wish(before)
        if wish is None:
            return
        world.note("member", host.id, sorted(wish.voters), sorted(wish.learners))
        try:
            index = host.node.propose_conf_change(wish)
        except (NotLeader, ConfChangeRefused, ProposalDropped):
            return
        world.referee.accepted_change(host, before, wish, index)
        self.proposed.append(wish)
        world.pump(host)

    def wish(self, status: Status) -> Members | None:
        """A change of one; now and then one that must be refused. While a disk is lost no other voter leaves."""
        rng, voters, learners = self.rng, status.members.voters, status.members.learners
        gone = sorted(self.lost & voters)
        kinds = ["add voter", "add learner", "promote", "replace all", "nobody"]
        kind = rng.choice(kinds + ([] if gone else ["demote", "remove voter", "remove learner"] * 2))
        if gone and rng.random() < 0.6:
            return Members(voters - {gone[0]}, learners)
        if kind == "add voter" and len(voters) < 7:
            return Members(voters | {self.newcomer(status.members)}, learners)
        if kind == "add learner" and len(learners) < 3:
            return Members(voters, learners | {self.newcomer(status.members)})
        alive = sorted(id for id in learners if not self.world.hosts[id].lost)
        if kind == "promote" and alive:
            one = frozenset({rng.choice(alive)})
            return Members(voters | one, learners - one)
        if kind in ("demote", "remove voter") and voters:
            one = frozenset({rng.choice(sorted(voters))})
            return Members(voters - one, learners | one if kind == "demote" else learners)
        if kind == "remove learner" and learners:
            return Members(voters, learners - {rng.choice(sorted(learners))})
        if kind == "replace all" and len(voters) > 1 and rng.random() < 0.2:
            return Members(frozenset(sorted(voters)[1:]) | {self.newcomer(status.members)}, learners)
        return Members(frozenset(), learners) if kind == "nobody" and rng.random() < 0.1 else None

    def newcomer(self, members: Members) -> NodeId:
        """One that was never a member, or that left with its disk whole."""
        world = self.world
        spare = [id for id, host in sorted(world.hosts.items()) if not host.lost and id not in members.everyone]
        if spare:
            return self.rng.choice(spare)
        id = max(world.hosts) + 1
        nobody = Snapshot(0, 0, Members(frozenset()))
        world.start(world.new_host(id, self.rng.choice((world.first, nobody))))
        return id

    def loss(self) -> None:
        """A whole disk, for good, but never so many that no majority is left, by whatever members may come to count."""
        host = self.anybody()
        possible = [*self.proposed, *(other.members for other in self.world.hosts.values())]
        for members in possible:
            left = members.voters - self.lost - {host.id}
            if members.voters and len(left) < quorum(members):
                return
        if any(self.lost & members.voters for members in possible):
            return
        self.world.note("loss", host.id)
        host.lost = True
        self.lost.add(host.id)
        if host.node is not None:
            self.world.crash(host, math.inf)


def story(world: World) -> str:
    world.seal()
    return "\n".join("  " + " ".join(map(_word, event)) for event in world.recent)


def _word(part: object) -> str:
    return f"{part:9.2f}" if isinstance(part, float) else str(part)


def run_seed(
    seed: int, node_class: type[Watched] = Watched, machine_class: type[Machine] = Machine, ticks: float = TICKS
) -> Outcome:
    """Raises Violation, also where the node raised what it must not."""
    world = World(seed, node_class, machine_class, ticks)
    try:
        return world.run()
    except Violation as violation:
        invariant, text = violation.invariant, violation.text
    except Exception as error:
        invariant, text = "no error", traceback.format_exc(limit=-6) + repr(error)
    replay = f"python -m tests.raft_simulation {seed}"
    weather = textwrap.fill(str(world.weather), 110, subsequent_indent="    ")
    raise Violation(seed, invariant, f"{text}\n{weather}\n{story(world)}\nreplay: {replay}")


def try_seed(seed: int, ticks: float = TICKS) -> Outcome | Violation:
    """`run_seed` for a pool of processes."""
    try:
        return run_seed(seed, ticks=ticks)
    except Violation as violation:
        return violation


def run_seeds(seeds: Iterable[int], jobs: int, ticks: float = TICKS) -> Iterator[Outcome | Violation]:
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(try_seed, ticks=ticks), seeds, chunksize=4)


def cpu_seconds() -> float:
    """Burnt so far by this process and by those of its children that have ended, their start included."""
    return sum(os.times()[:4])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("seed", nargs="?", type=int)
    arguments.add_argument("--seeds", help="A-B, both included")
    arguments.add_argument("--jobs", type=int, default=2)
    arguments.add_argument("--ticks", type=float, default=TICKS, help="of bad weather, in each world")
    given = arguments.parse_args()
    if given.seed is not None:
        outcome = try_seed(given.seed, given.ticks)
        print(outcome)
        return int(isinstance(outcome, Violation))
    first, _, last = (given.seeds or "0-99").partition("-")
    began, burnt, ticks, broken, worlds = time.perf_counter(), cpu_seconds(), 0.0, 0, 0
    for outcome in run_seeds(range(int(first), int(last or first) + 1), given.jobs, given.ticks):
        worlds += 1
        if isinstance(outcome, Violation):
            broken += 1
            print(f"{outcome}\n", flush=True)
        else:
            ticks += outcome.ticks
    wall, cpu, simulated = time.perf_counter() - began, cpu_seconds() - burnt, ticks * PACE.tick_seconds
    print(f"{worlds} seeds, {broken} violations in {wall:.0f} s with {given.jobs} processes")
    print(
        f"{simulated:.0f} simulated s, at ticks of {PACE.tick_seconds} s, in {cpu:.1f} CPU s: "
        f"{simulated / cpu:.0f} x real time per core"
    )
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
