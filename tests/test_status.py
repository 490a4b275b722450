"""`GET /status` and `nexus status`: everything side by side, and what is left of it when a part is away."""

import asyncio
import json
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from cluster.client import Absent
from cluster.gpu_leases import Claim
from cluster.inventory import Gpu, Inventory, Node
from cluster.meter import Vitals
from cluster.placement import Place, Plan
from cluster.raft import Status
from deployments import cli, cluster_state, measuring, overview
from deployments.cluster_state import Agreed, Deployed, Joined
from deployments.gateway import Lent, build
from nexus.config import Config, Models
from nexus.errors import Unavailable
from nexus.resident import Resident
from tests import browsing
from tests.conftest import Door
from tests.test_bootstrap import instance
from tests.test_gateway import add, check_problem
from tests.test_voters_http import ALL_WELL

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `ray.serve` uses what pydantic will remove
    from deployments import observer as by_ray

GIB = 2**30
NODES = {
    "sark": {"address": "192.0.2.11", "cpus": 8, "memory": "64GiB", "gpus": [{"memory": "80GiB", "count": 2}]},
    "clu": {"address": "192.0.2.12", "cpus": 8, "memory": "64GiB", "gpus": [{"memory": "80GiB"}]},
    "witness": {"address": "192.0.2.10", "cpus": 2, "memory": "4GiB"},
}
SEEN = Inventory((
    Node("sark", "192.0.2.11", 8, 64 * GIB, (Gpu(0, "H100", 80 * GIB, 60 * GIB), Gpu(1, "H100", 80 * GIB))),
    Node("clu", "192.0.2.12", 8, 64 * GIB, (Gpu(0, "H100", 80 * GIB),)),
    Node("witness", "192.0.2.10", 2, 4 * GIB),
))  # fmt: skip
JOINED = tuple(
    Joined(node.name, node.address, True, {"nexus.io/node": node.name}, node.cpus, node.memory) for node in SEEN.nodes
)
PLAN = Plan((
    Place("generator-0", 0, "sark", (1,), 72 * GIB, 4096, 0.9),
    Place("generator-0", 1, "clu", (0,), 72 * GIB, 4096, 0.9),
    Place("voter", 0, "witness"),
))  # fmt: skip
CLAIMS = (Claim("sark", 1, "generator-0@sark#a", 71 * GIB, 7), Claim("clu", 0, "generator-0@clu#b", 72 * GIB, 8))
DEPLOYED = (
    Deployed("gateway@witness", "HEALTHY", 1, 0),
    Deployed("generator-0@sark", "HEALTHY", 1, 0),
    Deployed("generator-0@clu", "UPDATING", 1, 1),
)


class Observer:
    """Says what it is told to say; a part of which the error is set is away, one that is silent never answers."""

    def __init__(self) -> None:
        self.says: dict[str, Any] = {
            "joined": JOINED, "inventory": SEEN, "deployed": DEPLOYED, "agreed": Agreed(PLAN, ["clu"], CLAIMS),
        }  # fmt: skip
        self.away: set[str] = set()
        self.silent: set[str] = set()

    async def _say(self, what: str) -> Any:
        if what in self.silent:
            await asyncio.Event().wait()
        if what in self.away:
            raise Unavailable(f"{what} is away")
        return self.says[what]

    async def joined(self) -> Sequence[Joined]:
        return await self._say("joined")

    async def inventory(self) -> Inventory:
        return await self._say("inventory")

    async def deployed(self) -> Sequence[Deployed]:
        return await self._say("deployed")

    async def agreed(self) -> Agreed:
        return await self._say("agreed")

    async def told(self) -> Mapping[str, Vitals | None]:
        """All are of machines that count nothing."""
        seen = await self._say("inventory")
        return {
            node.name: Vitals(None, node, memory_used=GIB, disk=100 * GIB, disk_free=7 * GIB) for node in seen.nodes
        }


class Operator:
    async def describe(self) -> list[Status | Absent]:
        return list(ALL_WELL)


@pytest.fixture
def observer() -> Observer:
    return Observer()


def lent(door: Door, observer: Observer, **fields: Any) -> Lent:
    """What the front door of a cluster of three machines has, whose engines have 5 requests each."""

    async def load() -> list[int]:
        return [3, 2]

    models = {"generator": "large", "served": [{"address": "vllm:/models/large#large"}]}
    config = Config(
        home=door.lent.config.home, http=door.lent.config.http, ray={"head": "witness"}, nodes=NODES, models=models
    )
    usual = {"operator": Operator(), "engines": {"large@sark": load, "large@clu": load}}
    return replace(door.lent, **{"config": config, "observer": observer, **usual, **fields})


@contextmanager
def opened(door: Door, observer: Observer, **fields: Any) -> Iterator[TestClient]:
    app = build(lent(door, observer, **fields))
    with TestClient(app, raise_server_exceptions=False, headers=door.headers()) as client:
        yield client


@contextmanager
def on_a_port(app: ASGIApp, door: Door, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A front door, and the command line's way to it."""
    with browsing.gateway(app) as url:
        patch.setenv("NEXUS_URL", url)
        patch.setenv("NEXUS_API_KEY", door.headers()["authorization"].removeprefix("Bearer "))
        yield


@pytest.fixture
def client(door: Door, observer: Observer) -> Iterator[TestClient]:
    with opened(door, observer) as client:
        yield client


def read(client: TestClient) -> dict[str, Any]:
    answer = client.get("/status")
    assert answer.status_code == 200, answer.text
    return answer.json()


def gauges(client: TestClient, name: str = "gpu_memory_bytes") -> dict[str, float]:
    """The values of a metric that is a state, by its labels as they are written."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    found = (line.rpartition(" ") for line in lines)
    return {labels[labels.index("{") :] if "{" in labels else "": float(value) for labels, _, value in found}


def test_all_of_it_is_told_side_by_side(client: TestClient, door: Door) -> None:
    add(door, "a.md", headers=dict(client.headers))
    shown = read(client)
    assert shown["unknown"] == {}
    sark, clu, witness = shown["nodes"]
    assert {key: sark[key] for key in ("name", "address", "alive", "cpus", "memory_bytes", "labels")} == {
        "name": "sark", "address": "192.0.2.11", "alive": True, "cpus": 8, "memory_bytes": 64 * GIB,
        "labels": {"nexus.io/node": "sark"},
    }  # fmt: skip
    assert sark["gpus"] == [
        {"index": 0, "model": "H100", "memory_bytes": 80 * GIB, "taken_bytes": 60 * GIB, "claims": [], "planned": []},
        {
            "index": 1, "model": "H100", "memory_bytes": 80 * GIB, "taken_bytes": 0,
            "claims": [{"holder": "generator-0@sark#a", "bytes": 71 * GIB}],
            "planned": [{"deployment": "generator-0", "replica": 0, "bytes": 72 * GIB}],
        },
    ]  # fmt: skip
    assert [one["holder"] for one in clu["gpus"][0]["claims"]] == ["generator-0@clu#b"]
    assert witness["gpus"] == []
    assert [(one["want"], one["node"], one["gpus"]) for one in shown["placement"]] == [
        ("generator-0", "sark", [1]), ("generator-0", "clu", [0]), ("voter", "witness", []),
    ]  # fmt: skip
    assert shown["drained"] == ["clu"]
    assert shown["coordinator"]["summary"] == "voter 1 leads 4 of 4 voters"
    (collection,) = shown["collections"]
    assert (collection["name"], collection["documents"], collection["sequence"]) == ("default", 1, 1)
    assert collection["chunks"] >= 1


def test_a_collection_that_another_embedder_is_live_in_is_named_to_who_has_it(
    client: TestClient, door: Door, observer: Observer
) -> None:
    add(door, "a.md", headers=dict(client.headers))
    assert not sentences(client, "embedder")
    told = {"default": "other:", "of-somebody-else": "other:"}
    observer.says["agreed"] = Agreed(PLAN, embedders=told)
    (sentence,) = sentences(client, "embedder")
    assert "'default'" in sentence and "other:" not in sentence
    configured = door.lent.config.models.embedder
    for same in ("", configured):
        observer.says["agreed"] = Agreed(PLAN, embedders={"default": same})
        assert not sentences(client, "embedder")


def test_a_deployment_is_told_with_its_model_replicas_and_queue(client: TestClient) -> None:
    gateway, on_sark, on_clu = read(client)["deployments"]
    assert gateway == {
        "name": "gateway@witness", "model": None, "node": "witness", "status": "HEALTHY",
        "replicas": {"running": 1, "starting": 0},
    }  # fmt: skip
    assert (on_sark["model"], on_sark["node"], on_sark["ongoing"], on_sark["queued"]) == ("large", "sark", 5, 0)
    assert (on_clu["status"], on_clu["replicas"]) == ("UPDATING", {"running": 1, "starting": 1})


def test_what_was_sent_to_an_engine_and_is_not_worked_on_there_waits(door: Door, observer: Observer) -> None:
    sent = [SimpleNamespace(name="large", place=node, in_flight=count) for node, count in (("sark", 9), ("clu", 2))]
    balancer = SimpleNamespace(report=lambda: SimpleNamespace(members=sent))
    with opened(door, observer, balancer=balancer) as client:
        queues = [(one["ongoing"], one["queued"]) for one in read(client)["deployments"][1:]]
    assert queues == [(5, 4), (5, 0)]


def test_an_engine_that_is_away_has_no_queue_and_the_others_have_theirs(door: Door, observer: Observer) -> None:
    async def load() -> list[int]:
        return [7]

    async def away() -> list[int]:
        raise Unavailable("a part of Nexus is restarting")

    with opened(door, observer, engines={"large@sark": away, "large@clu": load}) as client:
        shown = read(client)
    assert shown["unknown"] == {"queue of large@sark": "a part of Nexus is restarting"}
    assert ["ongoing" in one for one in shown["deployments"]] == [False, False, True]


def test_two_models_of_one_name_on_one_machine_have_no_queue_of_their_own(door: Door, observer: Observer) -> None:
    served = [{"address": f"vllm:/models/{folder}", "name": "large"} for folder in ("a", "b")]
    config = lent(door, observer).config.model_copy(update={"models": Models(generator="large", served=served)})
    more = Deployed("generator-1@sark", "HEALTHY", 1, 0)
    observer.says["deployed"] = (*DEPLOYED, more)
    with opened(door, observer, config=config) as client:
        shown = {one["name"]: one for one in read(client)["deployments"]}
    assert shown[more.name]["model"] == "large"
    assert [name for name, one in shown.items() if "ongoing" in one] == ["generator-0@clu"]


@pytest.mark.parametrize(
    ("method", "part", "fields"),
    [
        ("joined", "nodes", ["nodes"]),
        ("inventory", "gpus", []),
        ("deployed", "deployments", ["deployments"]),
        ("agreed", "placement", ["placement", "drained"]),
    ],
)
@pytest.mark.parametrize("way", ["away", "silent"])
def test_a_part_that_is_away_is_null_and_the_reason_is_told(
    client: TestClient, observer: Observer, monkeypatch: pytest.MonkeyPatch, method: str, part: str, fields: list[str],
    way: str,
) -> None:  # fmt: skip
    whole = read(client)
    monkeypatch.setattr(cluster_state, "PATIENCE_SECONDS", 0.2)
    getattr(observer, way).add(method)
    shown = read(client)
    assert [key for key, value in shown.items() if value is None] == fields
    assert shown["unknown"] == {part: f"{method} is away" if way == "away" else "no answer in 0.2 seconds"}
    others = {"nodes", "placement", "coordinator", "collections", "drained"} - {*fields}
    others -= {"nodes"} if method in ("inventory", "agreed") else set()  # which have less to tell
    assert {key: shown[key] for key in others} == {key: whole[key] for key in others}


def test_machines_that_do_not_say_what_they_have_are_there_without_gpus(client: TestClient, observer: Observer) -> None:
    observer.away.add("inventory")
    assert [(one["alive"], one["gpus"]) for one in read(client)["nodes"]] == [(True, None)] * 3
    observer.away.clear()
    observer.says["inventory"] = Inventory((SEEN["sark"], SEEN["witness"]))
    shown = read(client)
    assert [one["gpus"] is None for one in shown["nodes"]] == [False, True, False]
    assert [one["memory_bytes"] for one in shown["nodes"]] == [64 * GIB, 64 * GIB, 4 * GIB]
    assert not any("clu" in sentence for sentence in shown["differences"])


def test_a_machine_that_died_or_never_came_is_told_as_such(client: TestClient, observer: Observer) -> None:
    sark, clu, _ = JOINED
    observer.says["joined"] = (sark, replace(clu, is_alive=False))
    nodes = {one["name"]: one for one in read(client)["nodes"]}
    assert list(nodes) == ["sark", "clu", "witness"]
    assert [one["alive"] for one in nodes.values()] == [True, False, False]
    assert nodes["clu"]["gpus"] is None and nodes["witness"]["cpus"] == 2
    for name in ("clu", "witness"):
        assert any(sentence.startswith(name) for sentence in read(client)["differences"])
    for there in (DEPLOYED[:2], (*DEPLOYED[:2], replace(DEPLOYED[2], status="UNHEALTHY"))):
        observer.says["deployed"] = there
        assert sentences(client, "generator-0@clu") == []  # that its machine is away says enough


def test_a_machine_that_nobody_described_is_shown_too(client: TestClient, observer: Observer) -> None:
    observer.says["joined"] = (*JOINED, Joined("tron", "192.0.2.13", True, {}, 4, GIB))
    shown = read(client)
    assert [one["name"] for one in shown["nodes"]] == ["sark", "clu", "witness", "tron"]
    assert any("tron" in sentence for sentence in shown["differences"])


def sentences(client: TestClient, about: str) -> list[str]:
    return [sentence for sentence in read(client)["differences"] if about in sentence]


def test_what_does_not_fit_its_gpu_any_more_is_a_difference(client: TestClient, observer: Observer) -> None:
    assert sentences(client, "planned there") == []
    taken = replace(SEEN["clu"], gpus=(Gpu(0, "H100", 80 * GIB, 20 * GIB),))
    observer.says["inventory"] = Inventory((SEEN["sark"], taken, SEEN["witness"]))
    (sentence,) = sentences(client, "planned there")
    assert all(words in sentence for words in ("GPU 0 of clu", "60.0 GiB for Nexus", "72.0 GiB are planned"))


def test_what_holds_more_than_planned_is_a_difference(client: TestClient, observer: Observer) -> None:
    assert sentences(client, "replicas hold") == []
    more = (*CLAIMS, Claim("sark", 0, "stray", GIB, 9))
    observer.says["agreed"] = Agreed(PLAN, (), more)
    (sentence,) = sentences(client, "replicas hold")
    assert "GPU 0 of sark" in sentence and "1.0 GiB" in sentence and "0.0 GiB are planned" in sentence


def test_what_is_planned_and_does_not_run_is_a_difference(client: TestClient, observer: Observer) -> None:
    assert sentences(client, "generator-0") == []
    observer.says["deployed"] = DEPLOYED[:2]
    (sentence,) = sentences(client, "does not run")
    assert sentence.startswith("generator-0@clu ")
    observer.says["deployed"] = DEPLOYED[:1]
    assert len(sentences(client, "does not run")) == 2
    observer.says["deployed"] = (*DEPLOYED[:2], replace(DEPLOYED[2], status="UNHEALTHY", running=0))
    (sentence,) = sentences(client, "generator-0")
    assert sentence.startswith("generator-0@clu is unhealthy")


def test_on_one_machine_the_plan_is_run_by_deployments_without_its_name(door: Door, observer: Observer) -> None:
    seen = replace(SEEN["clu"], name="local")
    observer.says = {
        "joined": [Joined("local", "127.0.0.1", True, {}, 4, GIB)], "inventory": Inventory((seen,)),
        "deployed": [Deployed("generator-0", "HEALTHY", 1, 0)],
        "agreed": Agreed(Plan((Place("generator-0", 0, "local", (0,), GIB, 1, 0.1),))),
    }  # fmt: skip
    with opened(door, observer, config=door.lent.config) as client:
        shown = read(client)
        (node,) = shown["nodes"]
        assert (node["name"], len(node["gpus"][0]["planned"]), shown["differences"]) == ("local", 1, [])
        observer.says["deployed"] = []
        assert sentences(client, "generator-0")


def test_without_anybody_to_ask_it_says_so_and_counts_documents(door: Door) -> None:
    headers = door.headers()
    add(door, headers=headers)
    shown = door.client.get("/status", headers=headers).json()
    missing = ["nodes", "placement", "deployments", "coordinator", "drained"]
    assert [key for key, value in shown.items() if value is None] == missing
    assert set(shown["unknown"]) == {"nodes", "gpus", "deployments", "placement", "coordinator"}
    assert all(shown["unknown"].values())
    assert [one["name"] for one in shown["collections"]] == ["default"]


def test_documents_are_counted_for_who_may_read_them(door: Door) -> None:
    acme, other = door.headers("acme"), door.headers("other")
    add(door, "a.md", headers=acme)
    add(door, "b.md", headers=acme)
    add(door, "c.md", headers=acme, collection="secret-plans")
    add(door, "d.md", headers=other)
    counted = {one["name"]: one["documents"] for one in door.client.get("/status", headers=acme).json()["collections"]}
    assert counted == {"default": 2, "secret-plans": 1}
    answer = door.client.get("/status", headers=other)
    assert [(one["name"], one["documents"]) for one in answer.json()["collections"]] == [("default", 1)]
    assert "secret-plans" not in answer.text
    blind = door.client.get("/status", headers=door.headers("acme", "blind", "infer")).json()
    assert blind["collections"] is None and "may not read documents" in blind["unknown"]["collections"]


def test_it_says_where_each_collection_is_searched_and_how_much_that_is_to_administrators(door: Door) -> None:
    """`rows` count what others of the tenant may read, too."""
    acme = door.headers("acme")
    add(door, "a.md", headers=acme)
    add(door, "b.md", headers=door.headers("other"), collection="theirs")
    shown = door.client.get("/status", headers=acme).json()
    assert [one["index"] for one in shown["collections"]] == [None]
    resident = Resident(door.house.hades, 2**24)
    door.house.retriever.resident = resident
    resident.settle()
    state = door.client.get("/status", headers=acme).json()
    index = state["collections"][0]["index"]
    assert (index["served_by"], index["rows"]) == ("resident", 1) and index["bytes"] > 0
    assert any("default is searched in memory (1 rows, " in line for line in overview.lines(state))
    others = door.client.get("/status", headers=door.headers("acme", "someone", "infer", "documents:read")).json()
    assert others["collections"][0]["index"] == {"served_by": "resident"}
    resident.close()


def test_a_deleted_document_and_a_former_version_are_not_counted(door: Door) -> None:
    headers = door.headers()
    add(door, "a.md", content="One.\n", headers=headers)
    add(door, "a.md", content="Two.\n", headers=headers)
    gone = add(door, "b.md", headers=headers)
    door.client.delete(f"/rag/documents/{gone['document_id']}", headers=headers)
    (collection,) = door.client.get("/status", headers=headers).json()["collections"]
    assert (collection["documents"], collection["chunks"], collection["sequence"]) == (1, 1, 4)


def test_it_takes_the_permission_to_infer(door: Door) -> None:
    check_problem(door.client.get("/status"), 401, "/status")
    reader = door.headers("acme", "reader", "documents:read")
    assert "infer" in check_problem(door.client.get("/status", headers=reader), 403, "/status")["detail"]


def test_the_memory_of_gpus_is_measured(client: TestClient, observer: Observer) -> None:
    assert gauges(client)['{gpu="0",kind="taken",node="sark"}'] == 60 * GIB
    assert gauges(client)['{gpu="1",kind="planned",node="sark"}'] == 72 * GIB
    assert gauges(client)['{gpu="0",kind="total",node="clu"}'] == 80 * GIB
    gpu = Gpu(0, "H100", 80 * GIB, 0, used=9 * GIB, busy=0.25)
    observer.says["inventory"] = Inventory((replace(SEEN["sark"], gpus=(gpu,)),))
    assert gauges(client)['{gpu="0",kind="taken",node="sark"}'] == 0
    assert gauges(client)['{gpu="0",kind="used",node="sark"}'] == 9 * GIB
    assert gauges(client, "gpu_utilization_ratio") == {'{gpu="0",node="sark"}': 0.25}


def test_a_machine_that_is_away_is_up_no_more_and_nothing_is_said_of_what_it_does(
    client: TestClient, observer: Observer
) -> None:
    names = ["sark", "clu", "witness"]
    assert gauges(client, "nexus_node_up") == {f'{{node="{name}"}}': 1 for name in names}
    assert gauges(client, "nexus_disk_bytes")['{kind="free",node="clu"}'] == 7 * GIB
    observer.says["inventory"] = Inventory((SEEN["sark"], SEEN["witness"]))
    assert gauges(client, "nexus_node_up")['{node="clu"}'] == 0
    assert not [labels for labels in gauges(client, "nexus_disk_bytes") if "clu" in labels]


@pytest.mark.parametrize("how", ["away", "silent"])
def test_metrics_are_told_by_the_head_when_nobody_tells_of_the_machines(
    client: TestClient, observer: Observer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(measuring, "PATIENCE_SECONDS", 0.05)
    getattr(observer, how).update({"inventory", "agreed"})
    assert gauges(client, "nexus_node_up") == {'{node="sark"}': 0, '{node="clu"}': 0, '{node="witness"}': 1}
    assert client.get("/metrics").text.count("# TYPE coordinator_has_quorum gauge") == 1


def test_a_quorum_is_a_leader_that_most_of_them_follow(door: Door, observer: Observer) -> None:
    told: list[Status | Absent] = list(ALL_WELL)

    class Voters(Operator):
        async def describe(self) -> list[Status | Absent]:
            return told

    with opened(door, observer, operator=Voters()) as client:

        def voters() -> list[float]:
            kinds = gauges(client, "coordinator_voters")
            (quorum,) = gauges(client, "coordinator_has_quorum").values()
            return [kinds['{kind="configured"}'], kinds['{kind="answering"}'], quorum]

        assert voters() == [3, 3, 1], "the fourth learns"
        assert gauges(client, "coordinator_lag_entries") == {"": 20}
        told[1] = Absent(2, "gone")
        assert voters() == [3, 2, 1]
        told[2] = Absent(3, "gone")
        assert voters() == [3, 1, 0], "one of three is no majority"
        told[:3] = [Absent(1, "gone"), *ALL_WELL[1:3]]
        assert voters()[1:] == [2, 0], "nobody leads"


# ── what Ray and Serve say ──────────────────────────────────────────────────────────────────────


def node(name: str, alive: bool = True, **labels: str) -> dict[str, Any]:
    found = {"nexus.io/node": name, "ray.io/node-id": "x", **labels} if name else {"ray.io/node-id": "x"}
    resources = {"CPU": 4.0, "memory": float(GIB), "GPU": 1.0} if alive else {}
    return {"Labels": found, "NodeManagerAddress": "192.0.2.1", "Alive": alive, "Resources": resources}


def test_a_machine_that_came_back_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [node("sark", alive=False), node("sark", rack="2"), node("sark", alive=False), node("clu", alive=False)]
    monkeypatch.setattr("ray.nodes", lambda: table)
    found = {one.name: one for one in by_ray.joined()}
    assert len(by_ray.joined()) == 2
    assert found["sark"] == Joined("sark", "192.0.2.1", True, {"nexus.io/node": "sark", "rack": "2"}, 4.0, GIB)
    assert not found["clu"].is_alive


def test_the_only_machine_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [node("")])
    assert [(one.name, one.labels) for one in by_ray.joined()] == [("local", {})]


def test_replicas_are_counted_over_all_applications(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import (
        ApplicationStatus,
        ApplicationStatusOverview,
        DeploymentStatus,
        DeploymentStatusOverview,
        DeploymentStatusTrigger,
        ServeStatus,
    )

    def one(states: dict[str, int]) -> Any:
        trigger = DeploymentStatusTrigger.CONFIG_UPDATE_STARTED
        return DeploymentStatusOverview(DeploymentStatus.UPDATING, trigger, states, "")  # type: ignore[arg-type]

    def application(**deployments: Any) -> Any:
        return ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0.0, deployments)

    status = ServeStatus(applications={
        "nexus": application(gateway=one({"RUNNING": 2})),
        "models": application(embedder=one({"STARTING": 1, "RUNNING": 1, "UPDATING": 1, "STOPPING": 4})),
    })  # fmt: skip
    monkeypatch.setattr("ray.serve.status", lambda: status)
    assert by_ray.deployed() == [Deployed("gateway", "UPDATING", 2, 0), Deployed("embedder", "UPDATING", 1, 2)]


def test_what_ray_cannot_tell_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RaySystemError

    def fail() -> None:
        raise RaySystemError("GCS is away")

    monkeypatch.setattr("ray.nodes", fail)
    monkeypatch.setattr("ray.serve.status", fail)
    with pytest.raises(Unavailable):
        by_ray.joined()
    with pytest.raises(Unavailable):
        by_ray.deployed()


class Asked:
    """Counts the calls; each waits until it may answer."""

    def __init__(self) -> None:
        self.calls = 0
        self.may_answer = threading.Event()

    def __call__(self) -> int:
        self.may_answer.wait()
        self.calls += 1
        return self.calls


def test_one_look_serves_all_who_ask_while_it_is_fresh() -> None:
    ask = Asked()

    async def run() -> None:
        look = by_ray.Look(ask, fresh=3600)
        asking = [asyncio.create_task(look()) for _ in range(5)]
        await asyncio.sleep(0)
        asking[0].cancel()  # who goes away ends it for nobody else
        ask.may_answer.set()
        assert await asyncio.gather(*asking[1:]) == [1] * 4
        assert [await look(), await look()] == [1, 1]

    asyncio.run(run())


def test_what_is_stale_is_asked_anew_and_does_meanwhile_where_it_may() -> None:
    ask = Asked()
    ask.may_answer.set()

    async def run() -> None:
        look, keeping = by_ray.Look(ask, fresh=0), by_ray.Look(ask, fresh=0, kept=3600)
        assert [await look(), await look(), await keeping()] == [1, 2, 3]
        ask.may_answer.clear()
        try:
            async with asyncio.timeout(60):
                assert [await keeping(), await keeping()] == [3, 3]  # one call is under way
        finally:
            ask.may_answer.set()
        assert keeping._asked is not None and (await keeping._asked)[0] == 4
        assert await keeping() == 4

    asyncio.run(run())


def test_a_look_may_begin_before_anybody_waits() -> None:
    ask = Asked()
    look = by_ray.Look(ask, fresh=3600)
    look.begin()
    ask.may_answer.set()
    look._thread.shutdown(wait=True)  # it has ended
    assert (asyncio.run(look()), ask.calls) == (1, 1)


def test_a_look_that_failed_is_taken_again() -> None:
    answers: list[Any] = [Unavailable("away"), "there"]

    def ask() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    async def run() -> None:
        look = by_ray.Look(ask, fresh=3600)
        with pytest.raises(Unavailable):
            await look()
        assert await look() == "there"

    asyncio.run(run())


# ── for people ──────────────────────────────────────────────────────────────────────────────────


def test_people_read_who_has_which_gpu(client: TestClient, door: Door, observer: Observer) -> None:
    add(door, headers=dict(client.headers))
    sark, clu, witness = JOINED
    observer.says["joined"] = (sark, replace(clu, is_alive=False), witness)
    lines = list(overview.lines(read(client)))
    assert [" ".join(line.split()) for line in lines[:4]] == [
        "sark 192.0.2.11, 8 CPUs, 64.0 GiB",
        "GPU 0 H100, 80.0 GiB: 60.0 GiB held by others",
        "GPU 1 H100, 80.0 GiB: 72.0 GiB planned for generator-0; 71.0 GiB held by generator-0@sark#a",
        "clu does not answer (192.0.2.12)",
    ]
    assert "  generator-0@sark (large): healthy, 1 running, 5 requests, 0 waiting" in lines
    assert "  generator-0@clu (large): updating, 1 running, 1 starting, 5 requests, 0 waiting" in lines
    assert any(line.split() == ["documents", "1", "in", "default"] for line in lines)
    assert any(line.split()[:2] == ["amiss", "clu"] for line in lines)
    assert max(map(len, lines[:8])) <= 120


def test_one_machine_without_gpus_is_not_worth_a_line(door: Door, observer: Observer) -> None:
    observer.says = {
        "joined": [Joined("local", "127.0.0.1", True, {}, 4, GIB)],
        "inventory": Inventory((Node("local", "127.0.0.1", 4, GIB),)),
        "deployed": [Deployed("gateway", "HEALTHY", 1, 0)], "agreed": Agreed(None),
    }  # fmt: skip
    with opened(door, observer, config=door.lent.config, engines={}) as client:
        shown = read(client)
        assert list(overview.lines(shown)) == []
        assert (shown["placement"], shown["drained"], shown["unknown"]) == (None, [], {})
        observer.away.add("deployed")
        assert [" ".join(line.split()) for line in overview.lines(read(client))] == [
            "not known deployments: deployed is away"
        ]


@pytest.fixture
def nexus(door: Door, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `nexus status …` as where a Nexus was started: exit code, and what it printed."""
    monkeypatch.setenv("NEXUS_HOME", str(door.lent.config.home))
    monkeypatch.setattr(cli.bootstrap, "find_instance", lambda home: instance(url="http://127.0.0.1:8000"))
    monkeypatch.setattr(cli.bootstrap, "processes_of", lambda instance: [None] * 7)
    monkeypatch.setattr(cli.bootstrap, "memory_of", lambda instance: GIB)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["nexus", "status", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert printed.err == ""
        return int(ended.value.code or 0), printed.out

    return run


def test_the_command_shows_all_of_it(
    nexus: Callable[..., Any], door: Door, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_a_port(build(lent(door, observer)), door, monkeypatch):
        code, out = nexus()
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert code == 0 and lines[0] == "Nexus is ready at http://127.0.0.1:8000"
        assert lines.index("coordinator voter 1 leads 4 of 4 voters") > lines.index("documents ready")
        assert "sark 192.0.2.11, 8 CPUs, 64.0 GiB" in lines and "clu 192.0.2.12, 8 CPUs, 64.0 GiB, drained" in lines
        assert lines[-1].startswith("7 processes, 1.00 GiB, up ") and lines[-1].endswith("/logs/nexus.jsonl")
        code, out = nexus("--json")
        shown = json.loads(out)
    assert code == 0 and set(shown) == {
        "home", "logs", "running", "ready", "url", "dashboard", "parts", "processes", "memory_bytes", "up_seconds",
        "nodes", "placement", "deployments", "coordinator", "collections", "differences", "drained", "sharing",
        "unknown", "athena",
    }  # fmt: skip
    assert (shown["url"], len(shown["nodes"]), shown["processes"]) == ("http://127.0.0.1:8000", 3, 7)


def test_the_command_says_so_where_nothing_answers(nexus: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("NEXUS_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    code, out = nexus()
    assert code == 1 and "gateway      does not answer" in out and "no Nexus answers" in out
    code, out = nexus("--json")
    assert code == 1 and "no Nexus answers" in json.loads(out)["unknown"]["everything"]
