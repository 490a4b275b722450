"""A cluster on three hosts by its own commands: it comes up, and what ends of it comes back.

One cluster for all tests, in their order; each leaves it whole.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.clusters import HEAD, WORKERS, Cluster, cluster
from tests.running import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

needs_time = pytest.mark.skipif("DRILLS" not in os.environ, reason="minutes of faults more: DRILLS=1 has them done")

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
        return "120 newton metres" in http.post("/rag/query", json=QUESTION).json().get("response", "")


@contextmanager
def asked_without_pause(it: Cluster) -> Iterator[Counter[int]]:
    """Documents and questions, one after the other for as long as the block runs: how often which status came."""
    seen, over, begun = Counter[int](), threading.Event(), threading.Event()

    def ask() -> None:
        with it.http() as http:
            while not over.is_set():
                document = {"filename": f"{seen.total()}.md", "content": f"# Note {seen.total()}\n\nNobody asks."}
                seen[http.post("/rag/add_document", json=document).status_code] += 1
                seen[http.post("/rag/query", json=QUESTION).status_code] += 1
                begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert begun.wait(60)
        yield seen
    finally:
        over.set()
        thread.join()


def is_there(it: Cluster, host: str) -> bool:
    """In the cluster, with its part of the model."""
    with it.http(timeout=10) as http:
        shown = http.get("/status").json()
    alive = [node["name"] for node in shown["nodes"] or () if node["alive"]]
    running = [one["name"] for one in shown["deployments"] or () if one["replicas"]["running"]]
    return host in alive and f"embedder@{host}" in running


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


def test_a_head_that_is_killed_comes_back_with_its_state_and_the_others_go_on(it: Cluster) -> None:
    before = [pids(it, host, name) for host in WORKERS for name in ("raylet", "ray::ServeReplica", "ray::Coordinator")]
    it.kill(HEAD, "raylet")
    it.kill(HEAD, "gcs_server")
    it.must(HEAD, "up")
    assert answers(it)
    after = [pids(it, host, name) for host in WORKERS for name in ("raylet", "ray::ServeReplica", "ray::Coordinator")]
    assert after == before


def test_a_drained_machine_does_nothing_more_and_no_request_failed(it: Cluster) -> None:
    with asked_without_pause(it) as seen:
        it.must(HEAD, "node", "drain", "clu")
    assert set(seen) <= {200, 201} and seen.total() > 2
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


@needs_time
def test_a_drill_finds_answers_within_half_a_minute_and_nothing_lost(it: Cluster) -> None:
    """A link cut for so long that Ray gives the machine up, and a raylet killed, under load."""
    it.begin("clu", "node", "start", "--stay", "--token-file", os.fspath(it.home(HEAD) / "ray-token"))
    until(300, lambda: is_there(it, "clu"))
    faults = ("link:sark", "raylet:clu")
    chosen = [word for fault in faults for word in ("--fault", fault)]
    told = it.nexus(HEAD, "drill", "--test-cluster", *chosen, "--cut", "20", "--json", seconds=850)
    assert told.returncode == 0, told.stderr
    outcomes = {one["fault"]: one for one in json.loads(told.stdout)}
    assert list(outcomes) == list(faults)
    for outcome in outcomes.values():
        assert outcome["lost"] == 0 and set(outcome["done"]) == {"answer", "document", "session", "metadata"}, outcome
        assert outcome["silent"] < 30, outcome  # what the cluster promises


@needs_time
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


@needs_time
def test_a_signal_takes_a_machine_that_stays_out_of_the_cluster(it: Cluster) -> None:
    (member,) = it.processes("sark", "node start")
    member.terminate()
    until(60, lambda: not it.hosts.processes("sark"))
    assert "sark has left the cluster" in it.said("sark")
