"""A cluster on three hosts by its own commands: it comes up, and what ends of it comes back.

One cluster for all tests, in their order; each leaves it whole.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.clusters import HEAD, WORKERS, Cluster, cluster
from tests.counting import read_metrics
from tests.running import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

GIB = 2**30
QUESTION = {"query": "What torque do the wheel nuts need?"}


@pytest.fixture(scope="module")
def it() -> Iterator[Cluster]:
    with cluster() as it:
        with it.http() as http:
            document = {"filename": "nuts.md", "content": "# Nuts\n\nThe wheel nuts need 120 newton metres."}
            http.post("/rag/add_document", json=document).raise_for_status()
        yield it


def answers(it: Cluster) -> bool:
    with it.http(timeout=10) as http:
        answer = http.post("/rag/query", json=QUESTION)
        return answer.status_code == 200 and "120 newton metres" in answer.json()["response"]


@dataclass
class Load:
    """Documents, lines of a session and questions without a pause: what became of them, and what was acknowledged."""

    it: Cluster
    seen: Counter[str] = field(default_factory=Counter)
    documents: set[str] = field(default_factory=set)
    lines: set[str] = field(default_factory=set)

    def ask_once(self) -> None:
        """One of each; who is not answered goes on, as a client would."""
        number = self.seen.total()
        document = {"filename": f"{number}.md", "content": f"# Note {number}\n\nNobody asks."}
        if added := self._post("/rag/add_document", document):
            self.documents.add(added["document_id"])
        if self._post("/mcp/load/add_context", {"content": f"line {number}"}):
            self.lines.add(f"line {number}")
        self._post("/rag/query", QUESTION)

    def _post(self, path: str, body: dict[str, str]) -> Any:
        try:
            with self.it.http() as http:
                answer = http.post(path, json=body)
        except httpx.HTTPError as error:
            self.seen[type(error).__name__] += 1
            return None
        self.seen[str(answer.status_code)] += 1
        return answer.json() if answer.status_code in (200, 201) else None

    def lost(self) -> set[str]:
        """What was acknowledged and is not there."""
        with self.it.http() as http:
            told = http.get("/mcp/load/get_context").json()["context"].split("\n")
            known = {path for path in self.documents if http.get(f"/rag/documents/{path}").status_code == 200}
        return (self.documents - known) | (self.lines - set(told))


@contextmanager
def asked_without_pause(it: Cluster) -> Iterator[Load]:
    """For as long as the block runs."""
    load, over, begun = Load(it), threading.Event(), threading.Event()

    def ask() -> None:
        while not over.is_set():
            load.ask_once()
            begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert begun.wait(60)
        yield load
    finally:
        over.set()
        thread.join()


def is_there(it: Cluster, host: str) -> bool:
    """In the cluster, with its part of the model."""
    with it.http(timeout=10) as http:
        shown = http.get("/status").json()
    alive = [node["name"] for node in shown["nodes"] or () if node["alive"]]
    running = [one["name"] for one in shown["deployments"] or () if one["replicas"]["running"]]
    is_told = host in alive and f"embedder@{host}" in running
    return is_told and bool(it.processes(host, "ray::ServeReplica:models:embedder"))


def pids(it: Cluster, host: str, name: str) -> list[int]:
    return [process.pid for process in it.processes(host, name)]


def test_all_machines_join_by_their_commands_and_each_has_what_is_planned_for_it(it: Cluster) -> None:
    machines = it.machines()
    assert {name: (row["state"], row["gpus"], row["is_head"]) for name, row in machines.items()} == {
        **{host: ("there", [0, 1], False) for host in WORKERS}, HEAD: ("there", [], True),
    }  # fmt: skip
    assert {name: row["address"] for name, row in machines.items()} == {
        host: it.hosts.address(host) for host in it.hosts.names
    }
    assert all(len(it.processes(host, "ray::ServeReplica:models:embedder")) == 1 for host in WORKERS)
    assert all(len(it.processes(host, "ray::Coordinator")) == 1 for host in it.hosts.names)
    assert answers(it)


def test_who_has_joined_joins_no_second_time(it: Cluster) -> None:
    before = pids(it, "sark", "raylet")
    assert "already" in it.must("sark", "node", "start")
    assert "already" in it.must(HEAD, "up")
    assert pids(it, "sark", "raylet") == before


def test_a_raylet_that_is_killed_is_replaced_and_its_machine_takes_part_again(it: Cluster) -> None:
    it.kill("sark", "raylet")
    assert answers(it)
    until(300, lambda: it.processes("sark", "raylet"))
    until(300, lambda: is_there(it, "sark"))


def test_a_state_server_that_is_killed_is_started_again_and_nothing_else(it: Cluster) -> None:
    def rest() -> list[list[int]]:
        return [pids(it, host, name) for host in it.hosts.names for name in ("raylet", "ray::ServeReplica")]

    before = rest()
    it.kill(HEAD, "gcs_server")
    assert answers(it)
    it.must(HEAD, "up")
    assert {row["state"] for row in it.machines().values()} == {"there"}
    assert answers(it) and rest() == before


def test_a_head_that_is_killed_under_load_comes_back_with_all_it_said_and_the_others_go_on(it: Cluster) -> None:
    before = [pids(it, host, name) for host in WORKERS for name in ("raylet", "ray::ServeReplica", "ray::Coordinator")]
    with asked_without_pause(it) as load:
        it.kill(HEAD, "raylet")
        it.kill(HEAD, "gcs_server")
        it.must(HEAD, "up")
        until(60, lambda: answers(it))
    assert load.documents and load.lines and not load.lost()
    after = [pids(it, host, name) for host in WORKERS for name in ("raylet", "ray::ServeReplica", "ray::Coordinator")]
    assert after == before


def test_a_drained_machine_does_nothing_more_and_no_request_failed(it: Cluster) -> None:
    with asked_without_pause(it) as load:
        it.must(HEAD, "node", "drain", "clu")
    assert set(load.seen) <= {"200", "201"} and not load.lost()
    assert it.machines()["clu"]["state"] == "drained"
    assert not it.processes("clu", "ray::ServeReplica") and answers(it)
    it.must("clu", "node", "stop")
    assert it.machines()["clu"]["state"] == "away" and answers(it)


def test_a_gpu_that_somebody_computes_on_is_left_out_and_said(it: Cluster) -> None:
    it.set_gpus("clu", (40 * GIB, 0))
    told = it.nexus("clu", "node", "start")
    assert told.returncode == 0 and "GPU 0 of clu" in told.stderr
    assert it.machines()["clu"]["gpus"] == [1]
    it.must(HEAD, "node", "resume", "clu")
    until(300, lambda: is_there(it, "clu"))


def test_a_wrong_token_is_refused_and_said(it: Cluster) -> None:
    it.must("clu", "node", "stop")
    wrong = it.folder / "wrong"
    wrong.write_text("0" * 64)
    refused = it.nexus("clu", "node", "start", "--token-file", os.fspath(wrong))
    assert refused.returncode == 1 and "refuses the token" in refused.stderr
    assert not it.hosts.processes("clu")


def test_a_drill_finds_answers_within_half_a_minute_and_nothing_lost(it: Cluster) -> None:
    """A link cut for so long that Ray gives the machine up, under load. The command alone tries the other faults."""
    it.begin("clu", "node", "start", "--stay", "--token-file", os.fspath(it.home(HEAD) / "ray-token"))
    until(300, lambda: is_there(it, "clu"))
    fault = ("--fault", "link:sark", "--cut", "20", "--patience", "420")
    told = it.nexus(HEAD, "drill", "--test-cluster", *fault, "--json", seconds=850)
    start = (it.home("sark") / "logs" / "ray-node.log").read_text(errors="replace")
    assert told.returncode == 0, f"{told.stderr}\n{it.said('sark')}\n{start}\n{it.nexus(HEAD, 'status').stdout}"
    (outcome,) = json.loads(told.stdout)
    assert outcome["fault"] == "link:sark" and outcome["lost"] == 0, outcome
    assert set(outcome["done"]) == {"answer", "document", "session", "metadata"}, outcome
    assert outcome["silent"] < 30, outcome  # what the cluster promises


def test_metrics_are_told_in_time_while_a_machine_is_cut_off_and_say_which(it: Cluster) -> None:
    """Cut for a scrape, ten seconds at most as Prometheus waits: less than Ray needs to give the machine up."""

    def up() -> dict[str, float]:
        with it.http(timeout=10) as http:
            told = read_metrics(http)
        return {host: told[f'nexus_node_up{{node="{host}"}}'] for host in it.hosts.names}

    until(120, lambda: set(up().values()) == {1})
    it.hosts.isolate("sark")
    try:
        seen = up()
    finally:
        it.hosts.heal()
    assert seen == {"sark": 0, "clu": 1, HEAD: 1}
    until(120, lambda: set(up().values()) == {1})
    until(300, lambda: is_there(it, "sark"))


def test_a_head_that_is_watched_heals_by_itself_and_a_signal_ends_what_it_watches_and_nothing_else(it: Cluster) -> None:
    watcher = it.begin(HEAD, "up", "--stay")
    until(60, lambda: "already runs" in it.said(HEAD))
    it.kill(HEAD, "gcs_server")
    until(60, lambda: it.processes(HEAD, "gcs_server"))
    it.kill(HEAD, "raylet")
    until(60, lambda: it.processes(HEAD, "raylet"))
    until(300, lambda: answers(it))
    watcher.terminate()
    assert watcher.wait(60) == 0 and it.hosts.processes(HEAD) == []
    assert it.processes("sark", "node start") and it.processes("sark", "raylet")


def test_a_signal_takes_a_machine_that_stays_out_of_the_cluster(it: Cluster) -> None:
    (member,) = it.processes("sark", "node start")
    member.terminate()
    until(60, lambda: not it.hosts.processes("sark"))
    assert "sark has left the cluster" in it.said("sark")
