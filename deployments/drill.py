"""`nexus drill`: faults on a test cluster, one after another, while questions and writes go on: what each one cost.

It cuts links and kills processes, so it runs only where it is told that this is a test cluster. A fault is done by the
machine that it is for, through Ray, and a cut link is healed there by a process that waits for nobody. What was
acknowledged is looked for afterwards: a document, a line of a session, a key of the coordinator.
"""

import asyncio
import io
import itertools
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors import coordinator
from cluster.client import Client as Voters
from deployments.client import Client
from nexus.config import NODE_LABEL, Config
from nexus.errors import InvalidRequest, NexusError, Unavailable

Kind = Literal["answer", "document", "session", "metadata"]

PAUSE_SECONDS = 0.05  # between two requests of one kind
REQUEST_SECONDS = 60.0
CALM_SECONDS = 5.0  # of load before a fault, and after all is whole again
LOOK_SECONDS = 0.5
FELT_SECONDS = 20.0  # in which Ray notices that a raylet is gone
DELAY_SECONDS = 1.0  # before what a machine was told to do, so that it can answer
COLLECTION = "drill"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that breaks: a machine's `link` for a while, its `raylet`, or the head's `state` server."""

    what: Literal["link", "raylet", "state"]
    node: str

    def __str__(self) -> str:
        return f"{self.what}:{self.node}"


@dataclass(frozen=True, slots=True)
class Beat:
    """One request of the load: when it was sent and answered (monotonic seconds), and whether it was done."""

    kind: Kind
    sent: float
    ended: float
    is_done: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault cost. `silent` is the longest time without an answer, `whole` that until all ran again (seconds)."""

    fault: str
    silent: float
    whole: float
    done: Counter[Kind]
    refused: Counter[Kind]
    lost: int


def faults(config: Config, named: Sequence[str]) -> list[Fault]:
    """Those named, else each kind on each machine that it can befall. Raises InvalidRequest."""
    others = [name for name in config.nodes if name != config.ray.head]
    every = [Fault("link", name) for name in others] + [Fault("raylet", name) for name in others]
    every.append(Fault("state", config.ray.head or ""))
    known = {str(fault): fault for fault in every}
    if unknown := [name for name in named if name not in known]:
        raise InvalidRequest(f"there is no fault {unknown[0]!r}: choose of {', '.join(known)}")
    return [known[name] for name in named] or every


def longest_gap(beats: Sequence[Beat], kind: Kind, begun: float, ended: float) -> float:
    """The longest time between two moments in which no request of a kind was answered well."""
    answered = sorted(beat.ended for beat in beats if beat.kind == kind and beat.is_done)
    moments = [begun, *(at for at in answered if begun < at < ended), ended]
    return max(later - earlier for earlier, later in itertools.pairwise(moments))


# ── the load, and what it was promised ──────────────────────────────────────────────────────────


@dataclass
class Load:
    """Questions, documents, lines of a session and keys of the coordinator, each by a thread of its own."""

    voters: "Metadata"
    beats: list[Beat] = field(default_factory=list)
    documents: set[str] = field(default_factory=set)
    lines: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @contextmanager
    def going_on(self) -> Iterator[None]:
        over = threading.Event()
        work: dict[Kind, Callable[[Client, str], None]] = {
            "answer": self._ask, "document": self._add, "session": self._tell, "metadata": self._put,
        }  # fmt: skip
        threads = [threading.Thread(target=self._repeat, args=(over, *one), daemon=True) for one in work.items()]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _repeat(self, over: threading.Event, kind: Kind, work: Callable[[Client, str], None]) -> None:
        with Client() as nexus:
            for number in itertools.count():
                if over.wait(PAUSE_SECONDS):
                    return
                sent, is_done = time.monotonic(), True
                try:
                    work(nexus, f"{self.name}-{number}")
                except NexusError:
                    is_done = False
                self.beats.append(Beat(kind, sent, time.monotonic(), is_done))

    def _ask(self, nexus: Client, name: str) -> None:
        body = {"query": "How is the drill's beacon called?", "collection": COLLECTION}
        nexus.call("POST", "/rag/query", json=body, timeout=REQUEST_SECONDS)

    def _add(self, nexus: Client, name: str) -> None:
        body = {"filename": f"{name}.md", "content": f"The drill's beacon is called {name}.", "collection": COLLECTION}
        status, answer = nexus.call("POST", "/rag/add_document", json=body, timeout=REQUEST_SECONDS)
        if status == 202:
            raise Unavailable("it was accepted, and is not there yet")
        self.documents.add(answer["document_id"])

    def _tell(self, nexus: Client, name: str) -> None:
        nexus.call("POST", f"/mcp/drill-{self.name}/add_context", json={"content": name}, timeout=REQUEST_SECONDS)
        self.lines.add(name)

    def _put(self, nexus: Client, name: str) -> None:
        self.voters.put(f"drill/{name}")
        self.keys.add(f"drill/{name}")

    def lost(self) -> list[str]:
        """What was acknowledged and is not there."""
        with Client() as nexus:
            documents = {document["document_id"] for document in nexus.documents(COLLECTION)}
            _, told = nexus.call("GET", f"/mcp/drill-{self.name}/get_context")
        lines = self.lines - set("\n".join(map(str, _listed(told["context"]))).split("\n"))
        return sorted([*(self.documents - documents), *lines, *(self.keys - self.voters.keys("drill/"))])

    def remove(self) -> None:
        """What it wrote."""
        with Client() as nexus:
            for document in self.documents:
                nexus.call("DELETE", f"/rag/documents/{document}", params={"purge": True})
            nexus.call("DELETE", f"/mcp/drill-{self.name}/clear_context")
        self.voters.delete(self.keys)


def _listed(context: Any) -> list[Any]:
    return context if isinstance(context, list) else [context]


class Metadata:
    """The coordinator for threads: a loop of its own that asks the voters."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._voters: Voters = self._run(coordinator.connect())

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def put(self, key: str) -> None:
        self._run(self._voters.put(key, b""))

    def keys(self, prefix: str) -> set[str]:
        return {key for key, _, _ in self._run(self._voters.range(prefix))}

    def delete(self, keys: set[str]) -> None:
        for key in keys:
            self._run(self._voters.delete(key))


# ── the faults ──────────────────────────────────────────────────────────────────────────────────


@ray.remote(num_cpus=0, max_retries=0)
def _cut_link(address: str, seconds: float) -> str:
    """Take down the device that has this address; whoever heals it is nobody's child."""
    device = next(
        name for name, own in psutil.net_if_addrs().items() if any(one.address == address for one in own)
    )  # fmt: skip
    set_off(f"ip link set {device} down; sleep {seconds}; ip link set {device} up")
    return device


@ray.remote(num_cpus=0, max_retries=0)
def _kill_raylet() -> int:
    """The one that this worker belongs to; a moment later, so that this can be answered."""
    raylet = os.getppid()
    set_off(f"kill -9 {raylet}")
    return raylet


def set_off(story: str) -> None:
    """By a shell that is nobody's child: with a worker that it lets go, Ray ends the worker's children too."""
    command = ["sh", "-c", f"(sleep {DELAY_SECONDS}; {story}) &"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, start_new_session=True, check=True, **quiet)


def strike(config: Config, fault: Fault, cut_seconds: float) -> None:
    """Let it happen, about a second from now. Raises Unavailable where the machine cannot be told."""
    there = {"label_selector": {NODE_LABEL: fault.node}}
    try:
        if fault.what == "link":
            ray.get(_cut_link.options(**there).remote(config.nodes[fault.node].address, cut_seconds), timeout=60)
        elif fault.what == "raylet":
            ray.get(_kill_raylet.options(**there).remote(), timeout=60)
        else:
            _kill_state_server(Path(config.home))
    except (GetTimeoutError, RayTaskError) as error:
        raise Unavailable(f"{fault.node} cannot be told to fail: {error}") from None
    except RayError:
        return  # it failed before it could say that it would


def _kill_state_server(home: Path) -> None:
    from cluster import bootstrap

    instance = bootstrap.find_instance(home)
    for process in bootstrap.processes_of(instance) if instance else []:
        with suppress(psutil.Error):
            if process.name() == "gcs_server":
                process.kill()


# ── a drill ─────────────────────────────────────────────────────────────────────────────────────


def missing(status: dict[str, Any]) -> list[str]:
    """Each machine that is not there and each deployment that is not as it should be; none where all is whole."""
    nodes, deployments = status.get("nodes") or [], status.get("deployments") or []
    if not nodes or not deployments:
        why = "; ".join((status.get("unknown") or {}).values()) or "nobody says why"
        return [f"what runs is not known ({why})"]
    away = [f"{node['name']} does not answer" for node in nodes if not node["alive"]]
    return away + [f"{one['name']} is {one['status'].lower()}" for one in deployments if one["status"] != "HEALTHY"]


def run(config: Config, fault: Fault, cut_seconds: float, patience: float, heal: Callable[[], None]) -> Outcome:
    """One fault under load, until all is whole again. Raises Unavailable where that takes longer than `patience`."""
    load = Load(Metadata())
    with Client() as nexus, load.going_on():
        time.sleep(CALM_SECONDS)
        begun = time.monotonic()
        strike(config, fault, cut_seconds)
        time.sleep(DELAY_SECONDS + (cut_seconds if fault.what == "link" else 0.0))
        if fault.what == "state":  # machines join again by themselves
            heal()
        elif fault.what == "raylet":
            _await(nexus, False, begun + FELT_SECONDS)
        if amiss := _await(nexus, True, begun + patience):
            raise Unavailable(f"after {fault}, not all runs again within {patience:g} s: {', '.join(amiss)}")
        whole = time.monotonic() - begun
        time.sleep(CALM_SECONDS)
        ended = time.monotonic()
    lost = load.lost()
    during = [beat for beat in load.beats if beat.ended >= begun]
    done = Counter(beat.kind for beat in during if beat.is_done)
    refused = Counter(beat.kind for beat in during if not beat.is_done)
    load.remove()
    return Outcome(str(fault), longest_gap(load.beats, "answer", begun, ended), whole, done, refused, len(lost))


def _await(nexus: Client, is_whole: bool, deadline: float) -> list[str]:
    """What is missing when all is whole, or something is not, or else at that moment (monotonic seconds)."""
    amiss = ["nothing was seen"]
    while time.monotonic() <= deadline:
        try:
            amiss = missing(nexus.call("GET", "/status", timeout=20)[1])
        except NexusError as error:
            amiss = [f"the front door does not say: {error}"]
        else:
            if (not amiss) is is_whole:
                break
        time.sleep(LOOK_SECONDS)
    return amiss


def run_all(config: Config, chosen: Sequence[Fault], cut_seconds: float, patience: float) -> list[Outcome]:
    """One fault after another. What has died of the head is started again as `nexus up` does. Raises Unavailable."""
    outcomes = []
    with redirect_stdout(io.StringIO()):  # where Ray prints a page about each machine that dies
        ray.init(namespace="nexus", log_to_driver=False, logging_level="ERROR")
        for fault in chosen:
            print(f"{fault} …", file=sys.stderr, flush=True)
            outcomes.append(run(config, fault, cut_seconds, patience, _bring_up))
        ray.shutdown()
    return outcomes


def _bring_up() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "up"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise Unavailable(f"`nexus up` after the fault: {done.stderr.strip()}")


def show(outcome: Outcome) -> dict[str, Any]:
    """For machines; times in seconds."""
    return {
        "fault": outcome.fault, "silent": outcome.silent, "whole": outcome.whole, "done": dict(outcome.done),
        "refused": dict(outcome.refused), "lost": outcome.lost,
    }  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> str:
    """For people."""
    head = ("fault", "longest silence", "whole again after", "done meanwhile", "refused meanwhile", "lost")
    rows = [
        (
            one.fault, f"{one.silent:.1f} s", f"{one.whole:.0f} s", _counted(one.done), _counted(one.refused),
            str(one.lost),
        )
        for one in outcomes
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows))


def _counted(counts: Counter[Kind]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
