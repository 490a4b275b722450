"""Real nodes of Raft over disks and a network in memory: nothing moves until a test says so."""

import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.raft import (
    Config,
    Entry,
    EntryKind,
    HardState,
    Members,
    Message,
    MessageType,
    NodeId,
    RaftNode,
    ReadState,
    Ready,
    Role,
    Saved,
    Snapshot,
    Status,
)


def members(voters: Iterable[NodeId], learners: Iterable[NodeId] = ()) -> Members:
    return Members(frozenset(voters), frozenset(learners))


def log_of(terms: Iterable[int], first: int = 1) -> tuple[Entry, ...]:
    """A log as the paper draws it: by the terms of its entries."""
    return tuple(Entry(term, index, f"{index}.{term}".encode()) for index, term in enumerate(terms, first))


class Disk:
    """What outlives a crash: all of a save, and nothing that was not saved."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved

    def save(self, ready: Ready) -> None:
        snapshot, state, entries = self.saved.snapshot, ready.hard_state or self.saved.hard_state, self.saved.entries
        if ready.snapshot:
            follows = any((one.index, one.term) == (ready.snapshot.index, ready.snapshot.term) for one in entries)
            snapshot = ready.snapshot
            entries = tuple(one for one in entries if follows and one.index > snapshot.index)
        if ready.entries:
            entries = tuple(one for one in entries if one.index < ready.entries[0].index) + ready.entries
        self.saved = Saved(snapshot, state, entries)

    def compact(self, snapshot: Snapshot) -> None:
        left = tuple(one for one in self.saved.entries if one.index > snapshot.index)
        self.saved = Saved(snapshot, self.saved.hard_state, left)


class Machine:
    """One node with its disk and its state machine, a list of commands, worked as a driver works it."""

    def __init__(self, config: Config, saved: Saved, seed: int = 0) -> None:
        self.config, self.id, self.disk = config, config.id, Disk(saved)
        self.journal: list[tuple[Status, Ready]] = []  # over all its lives; the machines of a cluster share theirs
        self._rng = random.Random(1000 * seed + config.id)
        self.restart()

    def restart(self) -> None:
        """From the disk alone: all else is forgotten."""
        saved = self.disk.saved
        self.node = RaftNode(self.config, saved, self._rng)
        self.state = _commands(saved.snapshot)
        self.applied: list[Entry] = []
        self.answers: list[tuple[str, list[str]]] = []  # each read that was answered, and what it saw
        self.history: list[Ready] = []
        self._waiting: list[ReadState] = []

    @property
    def role(self) -> Role:
        return self.node.status().role

    @property
    def term(self) -> int:
        return self.node.status().term

    @property
    def commit(self) -> int:
        return self.node.status().commit

    @property
    def log(self) -> list[int]:
        """The terms of the entries on the disk, the one the snapshot ends with first where there is one."""
        snapshot = self.disk.saved.snapshot
        return [snapshot.term] * bool(snapshot.index) + [entry.term for entry in self.disk.saved.entries]

    def work(self) -> list[Message]:
        """Every Ready there is, each in the driver's order: what was sent."""
        sent: list[Message] = []
        while self.node.has_ready():
            sent += self.work_once()
        return sent

    def work_once(self) -> list[Message]:
        ready = self.node.ready()
        self.history.append(ready)
        self.journal.append((self.node.status(), ready))
        self.disk.save(ready)
        self._apply(ready)
        self.node.advance(ready)
        self._answer(ready)
        return list(ready.messages)

    def receive(self, *messages: Message) -> list[Message]:
        """What is sent on these messages."""
        for message in messages:
            self.node.step(message)
        return self.work()

    def tick(self, times: int = 1) -> list[Message]:
        sent: list[Message] = []
        for _ in range(times):
            self.node.tick()
            sent += self.work()
        return sent

    def compact(self, index: int | None = None) -> Snapshot:
        """A snapshot of all that was applied; the log is forgotten up to `index`, or all of it."""
        status = self.node.status()
        snapshot = Snapshot(
            index or status.applied,
            self._term_at(index or status.applied),
            status.members,
            json.dumps(self.state).encode(),
        )
        self.node.compact(snapshot)
        self.disk.compact(snapshot)
        return snapshot

    def _term_at(self, index: int) -> int:
        saved = self.disk.saved
        known = {entry.index: entry.term for entry in saved.entries} | {saved.snapshot.index: saved.snapshot.term}
        return known[index]

    def _apply(self, ready: Ready) -> None:
        if ready.snapshot:
            self.state = _commands(ready.snapshot)
        for entry in ready.committed:
            self.applied.append(entry)
            if entry.kind is EntryKind.CHANGE:
                self.node.apply_conf_change(Members.from_bytes(entry.data))
            elif entry.data:
                self.state.append(entry.data.decode())

    def _answer(self, ready: Ready) -> None:
        self._waiting += ready.reads
        applied = self.node.status().applied
        for read in [read for read in self._waiting if read.index <= applied]:
            self._waiting.remove(read)
            self.answers.append((read.context.decode(), list(self.state)))


def _commands(snapshot: Snapshot) -> list[str]:
    return list(json.loads(snapshot.data)) if snapshot.data else []


class Cluster:
    """Machines, and a network that keeps every message until it is told to deliver or to drop it."""

    def __init__(self, voters: Iterable[NodeId], learners: Iterable[NodeId] = (), **settings: int) -> None:
        self.settings = settings
        self.machines: dict[NodeId, Machine] = {}
        self.journal: list[tuple[Status, Ready]] = []
        self.in_flight: list[Message] = []
        self.cut_links: set[tuple[NodeId, NodeId]] = set()
        at_first = members(voters, learners)
        for id in sorted(at_first.everyone):
            self.add(id, Saved(Snapshot(0, 0, at_first)))

    def __getitem__(self, id: NodeId) -> Machine:
        return self.machines[id]

    def __iter__(self) -> Iterator[Machine]:
        return iter(self.machines.values())

    def add(self, id: NodeId, saved: Saved | None = None) -> Machine:
        """A machine; without `saved` it has an empty disk and knows nobody, as one that is about to be added."""
        config = Config(id, **self.settings)
        self.machines[id] = Machine(config, saved or Saved(Snapshot(0, 0, members(()))))
        self.machines[id].journal = self.journal
        return self.machines[id]

    def work(self, *ids: NodeId) -> None:
        for machine in self:
            if not ids or machine.id in ids:
                self.in_flight += machine.work()

    def take(self, to: NodeId = 0, sender: NodeId = 0, kind: MessageType | None = None) -> list[Message]:
        """Off the network: the messages in flight of this kind and way, 0 and None being any."""
        taken = [
            message
            for message in self.in_flight
            if to in (0, message.to) and sender in (0, message.sender) and kind in (None, message.type)
        ]
        self.in_flight = [message for message in self.in_flight if not any(message is one for one in taken)]
        return taken

    drop = take

    def deliver(self, to: NodeId = 0, sender: NodeId = 0, kind: MessageType | None = None) -> int:
        """What is in flight now, over the links that hold; the answers then are in flight."""
        messages = self.take(to, sender, kind)
        for message in messages:
            if (message.sender, message.to) not in self.cut_links and message.to in self.machines:
                self[message.to].node.step(message)
                self.work(message.to)
        return len(messages)

    def stabilize(self) -> None:
        """Until nothing is left to do or to deliver."""
        self.work()
        while self.deliver():
            self.work()

    def tick(self, id: NodeId, times: int = 1) -> None:
        self.in_flight += self[id].tick(times)

    def run(self, ticks: int, *ids: NodeId) -> None:
        """Time passes on all machines, or on these, and every message arrives."""
        for _ in range(ticks):
            for id in ids or tuple(self.machines):
                self.tick(id)
            self.stabilize()

    def cut(self, *ids: NodeId) -> None:
        """These hear the others no more, nor are they heard."""
        for one in ids:
            for other in set(self.machines) - set(ids):
                self.cut_links |= {(one, other), (other, one)}

    def heal(self) -> None:
        self.cut_links.clear()

    def elect(self, id: NodeId) -> Machine:
        """By its campaign, or a second one where it learns of a later term first. The others have lost their leader."""
        for _ in range(2):
            self[id].node.campaign()
            self.stabilize()
        assert self[id].role is Role.LEADER
        return self[id]

    def let_down(self, *ids: NodeId) -> None:
        """These have waited for a leader in vain, and what they asked then is lost."""
        for id in ids:
            self[id].tick(2 * self[id].config.election_ticks - 1)

    def propose(self, id: NodeId, *commands: str) -> None:
        for command in commands:
            self[id].node.propose(command.encode())
        self.stabilize()

    @property
    def leaders(self) -> list[NodeId]:
        return [machine.id for machine in self if machine.role is Role.LEADER]


def saved(
    voters: Iterable[NodeId] = (1, 2, 3), learners: Iterable[NodeId] = (), *,
    terms: Iterable[int] = (), term: int | None = None, vote: NodeId = 0, commit: int = 0,
) -> Saved:  # fmt: skip
    """A disk with a log of these terms, in the latest of them unless told."""
    entries = log_of(terms)
    latest = entries[-1].term if entries else 0
    state = HardState(latest if term is None else term, vote, commit)
    return Saved(Snapshot(0, 0, members(voters, learners)), state, entries)


def machine(voters: tuple[NodeId, ...] = (1, 2, 3), **written: Any) -> Machine:
    """Node 1 of these, as a crash left it."""
    return Machine(Config(1), saved(voters, **written))


def message(kind: MessageType, sender: NodeId, term: int, **fields: Any) -> Message:
    """To node 1."""
    return Message(kind, 1, sender, term, **fields)


def stand(one: Machine) -> list[Message]:
    """A candidate: its campaign, and a majority that thinks it has a chance. What it then asks."""
    one.node.campaign()
    asked = one.work()
    answers = [message(MessageType.PRE_VOTE_REPLY, each.to, each.term) for each in asked]
    return one.receive(*answers[: (len(answers) + 1) // 2]) if one.role is Role.PRE_CANDIDATE else asked


def lead(one: Machine) -> list[Message]:
    """A leader, by the votes of all the others. What it then sends."""
    asked = stand(one)
    sent = one.receive(*[message(MessageType.VOTE_REPLY, each.to, each.term) for each in asked])
    assert one.role is Role.LEADER
    return sent


def of(kind: MessageType, messages: list[Message]) -> list[Message]:
    return [one for one in messages if one.type is kind]


def only(kind: MessageType, messages: list[Message]) -> Message:
    (one,) = of(kind, messages)
    return one


def in_role(role: Role) -> Machine:
    one = machine(term=1)
    if role is Role.PRE_CANDIDATE:
        one.node.campaign()
        one.work()
    elif role is Role.CANDIDATE:
        stand(one)
    elif role is Role.LEADER:
        lead(one)
    assert one.role is role
    return one
