"""Scripts of a cluster in tests/raft/*.txt, each command with what the nodes did on it below: read them as a story.

Written anew by `pytest tests/test_raft_transcripts.py --rewrite`, and reviewed as a diff. Nodes do at once what a
command makes them do; what they send is in flight until `deliver` or `stabilize`. An entry is index/term and its
command; links and commands take `*` for any node.

    add-nodes 3 [learners=4] [max_inflight_messages=1]     disk 1 terms=1,2 [term=3] [vote=2] [commit=1]
    join 4                                                 restart 2
    campaign 1    tick 1 10    propose 1 hello             read 2 a
    change 1 voters=1,2,3 [learners=4]                     transfer 1 2          compact 1
    deliver 2 3   deliver 1->3   drop 1->3                 cut 3                 heal
    stabilize     run 10 (ticks, everything delivered)     status
    quietly …     the same, and says nothing of it
"""

from pathlib import Path

import pytest

from cluster.raft import (
    NOBODY,
    ConfChangeRefused,
    Entry,
    EntryKind,
    Members,
    Message,
    MessageType,
    NodeId,
    NotLeader,
    ProposalDropped,
    Ready,
    Status,
)
from tests.raft_cluster import Cluster, members, saved

TRANSCRIPTS = sorted((Path(__file__).parent / "raft").glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_nodes_do_what_the_transcript_says(path: Path, pytestconfig: pytest.Config) -> None:
    written = path.read_text()
    played = play(written)
    if pytestconfig.getoption("rewrite"):
        path.write_text(played)
    else:
        assert played == written


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 10


def play(text: str) -> str:
    """The commands and comments of the text as they are, the output of each command anew."""
    script, lines = Script(), []
    for line in text.splitlines():
        if not line.startswith(" "):
            lines.append(line)
            if line and not line.startswith("#"):
                lines += [f"    {said}" for said in script.do(line)]
    return "\n".join(lines) + "\n"


class Script:
    """A cluster that is told what to do by lines of text."""

    def __init__(self) -> None:
        self.cluster = Cluster(())
        self.seen: dict[NodeId, Status] = {}

    def do(self, line: str) -> list[str]:
        name, *words = line.removeprefix("quietly ").split()
        plain = [word for word in words if "=" not in word]
        named = {word.partition("=")[0]: numbers(word.partition("=")[2]) for word in words if "=" in word}
        said: list[str] = []
        try:
            said = getattr(self, name.replace("-", "_"))(*plain, **named) or []
            self.cluster.work()
        except (NotLeader, ProposalDropped, ConfChangeRefused) as error:
            said = [f"{type(error).__name__}: {error}"]
        said += [one for status, ready in self.cluster.journal for one in self.describe(status, ready)]
        self.cluster.journal.clear()
        return [] if line.startswith("quietly ") else said

    def describe(self, now: Status, ready: Ready) -> list[str]:
        """One Ready, in the driver's order."""
        said, id = [], now.id
        before, self.seen[id] = self.seen.get(id), now
        if before is None or (before.role, before.term) != (now.role, now.term):
            said.append(f"{id} is {now.role.name} in term {now.term}")
        if ready.leader is not None and ready.leader != id:
            said.append(f"{id} follows {ready.leader}" if ready.leader != NOBODY else f"{id} has no leader")
        state = ready.hard_state
        if state and (before is None or (before.term, before.vote) != (state.term, state.vote)):
            said.append(f"{id} saves term {state.term}, vote {state.vote or 'none'}")
        if ready.snapshot:
            said.append(f"{id} saves snapshot {ready.snapshot.index}/{ready.snapshot.term}")
        if ready.entries:
            said.append(f"{id} saves {entries(ready.entries)}")
        said += [show(message) for message in ready.messages]
        if ready.committed:
            said.append(f"{id} applies {entries(ready.committed)}")
        return said + [f"{id} may answer {read.context.decode()} at {read.index}" for read in ready.reads]

    def add_nodes(self, count: str, learners: list[int] | None = None, **settings: list[int]) -> None:
        voters = set(range(1, int(count) + 1)) - set(learners or [])
        self.cluster = Cluster(voters, learners or [], **{name: value for name, (value,) in settings.items()})
        self.seen = {machine.id: machine.node.status() for machine in self.cluster}

    def disk(self, id: str, terms: list[int], **numbers: list[int]) -> None:
        known = self.cluster[int(id)].node.status().members
        one = {name: value for name, (value,) in numbers.items()}
        self.cluster.add(int(id), saved(known.voters, known.learners, terms=terms, **one))
        self.restart(id)

    def join(self, id: str) -> None:
        self.seen[int(id)] = self.cluster.add(int(id)).node.status()

    def restart(self, id: str) -> None:
        self.cluster[int(id)].restart()
        self.seen[int(id)] = self.cluster[int(id)].node.status()

    def campaign(self, id: str) -> None:
        self.cluster[int(id)].node.campaign()

    def tick(self, id: str, times: str) -> None:
        self.cluster.tick(int(id), int(times))

    def propose(self, id: str, command: str) -> None:
        self.cluster[int(id)].node.propose(command.encode())

    def read(self, id: str, context: str) -> None:
        self.cluster[int(id)].node.read_index(context.encode())

    def change(self, id: str, voters: list[int], learners: list[int] | None = None) -> None:
        self.cluster[int(id)].node.propose_conf_change(members(voters, learners or []))

    def transfer(self, id: str, to: str) -> None:
        self.cluster[int(id)].node.transfer_leader(int(to))

    def compact(self, id: str) -> list[str]:
        snapshot = self.cluster[int(id)].compact()
        return [f"{id} keeps snapshot {snapshot.index}/{snapshot.term} of {people(snapshot.members)}"]

    def deliver(self, *ways: str) -> None:
        for way in ways:
            sender, to = link(way)
            self.cluster.deliver(to, sender)

    def drop(self, *ways: str) -> list[str]:
        return [f"lost: {show(lost)}" for way in ways for lost in self.cluster.drop(*reversed(link(way)))]

    def cut(self, *ids: str) -> None:
        self.cluster.cut(*map(int, ids))

    def heal(self) -> None:
        self.cluster.heal()

    def stabilize(self) -> None:
        self.cluster.stabilize()

    def run(self, ticks: str) -> None:
        self.cluster.run(int(ticks))

    def status(self) -> list[str]:
        return [line for machine in self.cluster for line in describe_status(machine.node.status(), machine.log)]


def describe_status(status: Status, log: list[int]) -> list[str]:
    words = f"{status.id} {status.role.name}, term {status.term}, commit {status.commit}, log {' '.join(map(str, log))}"
    progress = [
        f"  {id} {one.state}, match {one.match}, next {one.next}"
        for id, one in status.progress.items()
        if id != status.id
    ]
    return [f"{words}, {people(status.members)}", *progress]


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if one]


def link(way: str) -> tuple[NodeId, NodeId]:
    """Sender and receiver of "1->3"; of "3", any sender."""
    sender, arrow, to = way.partition("->")
    ends = (sender, to) if arrow else ("*", way)
    return int(ends[0].replace("*", "0")), int(ends[1].replace("*", "0"))


def people(who: Members) -> str:
    voters = f"voters {','.join(map(str, sorted(who.voters)))}"
    return voters + (f" learners {','.join(map(str, sorted(who.learners)))}" if who.learners else "")


def entries(some: tuple[Entry, ...]) -> str:
    return ", ".join(f"{one.index}/{one.term} {content(one)}".rstrip() for one in some)


def content(entry: Entry) -> str:
    return people(Members.from_bytes(entry.data)) if entry.kind is EntryKind.CHANGE else entry.data.decode()


def show(message: Message) -> str:
    """What matters of a message of its type."""
    kind, words = message.type, [f"term {message.term}"]
    if message.reject:
        words.append(f"no to {message.index}, perhaps {message.hint}" if kind is MessageType.APPEND_REPLY else "no")
    elif kind in (MessageType.PRE_VOTE, MessageType.VOTE):
        words.append(f"log ends at {message.index}/{message.log_term}")
    elif kind is MessageType.APPEND:
        words += [f"after {message.index}/{message.log_term}", entries(message.entries), f"commit {message.commit}"]
    elif kind is MessageType.HEARTBEAT:
        words.append(f"commit {message.commit}")
    elif kind in (MessageType.APPEND_REPLY, MessageType.READ_INDEX_REPLY):
        words.append(f"{message.index}")
    elif message.snapshot:
        words.append(f"{message.snapshot.index}/{message.snapshot.term}")
    if message.context and kind not in (MessageType.HEARTBEAT, MessageType.HEARTBEAT_REPLY):
        words.append(message.context.decode())
    return f"{message.sender} -> {message.to} {kind.name} {', '.join(word for word in words if word)}"
