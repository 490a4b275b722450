"""How many replicas of each deployment there are: by the plan, by Serve's policy, and on real Ray with fake GPUs."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors import coordinator
from actors.coordinator import Placement
from actors.pressure import PRESSURE
from cluster.plan import Place, Plan
from cluster.shares import Claim, Pool
from deployments import autoscaling as module
from deployments.autoscaling import Share, autoscaling, kind_of, pools, sharing
from nexus.config import Replicas

ROOM = 4


def plan(*places: tuple[str, str, int, float]) -> Plan:
    """Of (want, machine, how many replicas, share of a GPU); a share over 1 is of so many GPUs."""
    made: list[Place] = []
    for want, node, count, share in places:
        first = sum(place.want == want for place in made)
        gpus = tuple(range(max(1, int(share)))) if share else ()
        made += [Place(want, first + n, node, gpus, gpu_share=min(share, 1.0)) for n in range(count)]
    return Plan(tuple(made))


def claims(pool: Pool) -> dict[str, tuple[int, int]]:
    return {claim.name: (claim.least, claim.most) for claim in pool.claims}


# ── by the plan ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("want", "kind"), [("generator-0", "chat"), ("reranker-1", "chat"), ("embedder-1", "embed"), ("embedder", "bulk")]
)
def test_whom_a_model_serves(want: str, kind: str) -> None:
    assert kind_of(want) == kind


def test_the_pool_of_a_machine_is_what_the_plan_gives_there() -> None:
    """And on it everybody may have what the others do not need: but no model more than the settings allow."""
    wants = {"generator-0": Replicas(least=1, most=4, target=8), "embedder": Replicas(least=1, most=2)}
    made = plan(("generator-0", "sark", 3, 1.0), ("embedder", "sark", 1, 0.25), ("generator-0", "clu", 1, 1.0))
    found = pools(wants, made, 30.0)
    assert found == {
        "sark": Pool(
            3.25,
            (Claim("generator-0@sark", "chat", 1, 3, 1.0, 8), Claim("embedder@sark", "bulk", 1, 2, 0.25, 32)),
            30.0,
        ),
        "clu": Pool(1.0, (Claim("generator-0@clu", "chat", 1, 1, 1.0, 8),), 30.0),
    }


def test_a_replica_that_spans_gpus_takes_them_all() -> None:
    found = pools({"generator-0": Replicas(least=1, most=2)}, plan(("generator-0", "sark", 2, 2.0)), 60.0)
    assert (found["sark"].gpus, found["sark"].claims[0].gpus) == (4.0, 2.0)


def test_a_model_that_got_its_least_only_may_have_what_others_leave() -> None:
    wants = {"generator-0": Replicas(least=1, most=4), "embedder": Replicas(least=1, most=4)}
    found = pools(wants, plan(("generator-0", "sark", 3, 1.0), ("embedder", "sark", 1, 1.0)), 60.0)
    assert claims(found["sark"]) == {"generator-0@sark": (1, 3), "embedder@sark": (1, 3)}


def test_over_all_machines_no_model_has_more_replicas_than_it_may() -> None:
    wants = {"generator-0": Replicas(least=2, most=5), "embedder": Replicas(least=1, most=8)}
    made = plan(
        ("generator-0", "sark", 1, 1.0), ("generator-0", "clu", 1, 1.0),
        ("embedder", "sark", 4, 1.0), ("embedder", "clu", 4, 1.0),
    )  # fmt: skip
    found = pools(wants, made, 60.0)
    assert [claims(found[node])[f"generator-0@{node}"] for node in ("sark", "clu")] == [(1, 3), (1, 2)]


def test_shares_that_make_a_whole_leave_room_for_all_of_them() -> None:
    wants = {"embedder": Replicas(least=1, most=10), "embedder-1": Replicas(least=1, most=10)}
    found = pools(wants, plan(("embedder", "sark", 1, 0.15), ("embedder-1", "sark", 2, 0.15)), 60.0)
    assert claims(found["sark"]) == {"embedder@sark": (1, 2), "embedder-1@sark": (1, 2)}


def test_what_cannot_change_or_has_no_gpu_shares_nothing() -> None:
    fixed, free = Replicas(least=2, most=2), Replicas(least=1, most=4)
    made = plan(("generator-0", "sark", 2, 1.0), ("embedder", "sark", 4, 0.0))
    assert pools({"generator-0": fixed, "embedder": free}, made, 60.0) == {}
    assert pools({"embedder": free}, None, 60.0) == {}


# ── Serve's settings and its policy ─────────────────────────────────────────────────────────────

POOL = Pool(
    ROOM, (Claim("chat", "chat", 1, 3, 1.0, 1.0), Claim("bulk", "bulk", 1, 2, 1.0, 1.0)), down_seconds=1.0
)  # fmt: skip


def test_up_at_once_and_down_after_a_delay() -> None:
    assert autoscaling(1, 3, 32, 90.0) == {
        "min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 32,
        "upscale_delay_s": 0, "downscale_delay_s": 90.0,
    }  # fmt: skip
    assert autoscaling(2, 1, 32)["max_replicas"] == 2


def test_a_policy_can_be_written_down_and_comes_back() -> None:
    """Serve keeps its arguments as JSON; the division is not delayed a second time."""
    settings = json.loads(json.dumps(sharing(POOL, "bulk", True)))
    policy = settings.pop("policy")
    assert settings == autoscaling(1, 2, 1, 0)
    assert policy["policy_function"] == f"{Share.__module__}:{Share.__name__}"
    assert policy["policy_kwargs"]["name"] == "bulk"
    assert Share(**{**policy["policy_kwargs"], "is_watching": False})._shares._pool == POOL


def ask(share: Share, current: int, requests: float) -> int:
    target, state = share(SimpleNamespace(target_num_replicas=current, total_num_requests=requests))
    assert state == {}
    return target


def shares(pool: Pool, is_watching: bool) -> list[Share]:
    return [Share(**sharing(pool, claim.name, is_watching)["policy"]["policy_kwargs"]) for claim in pool.claims]


def test_policies_of_one_pool_agree_though_each_sees_its_own_deployment_only() -> None:
    chat, bulk = shares(Pool(ROOM, POOL.claims, 3600.0), False)
    ask(chat, 1, 0)
    assert ask(bulk, 1, 8) == 2
    assert ask(chat, 1, 8) == 3
    assert ask(bulk, 2, 8) == 1


def test_a_policy_that_watches_yields_to_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    pressed: list[bool] = []
    monkeypatch.setattr(module, "watch", lambda: lambda: bool(pressed))
    chat, bulk = shares(Pool(ROOM, POOL.claims, 1800.0), True)
    ask(chat, 1, 0)
    assert ask(bulk, 1, 8) == 2
    pressed.append(True)
    assert ask(bulk, 2, 8) == 1
    _, deaf = shares(Pool(ROOM, POOL.claims, 1800.0), False)
    assert ask(deaf, 2, 8) == 2


# ── on real Ray ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One Ray node with GPUs that are none, whose processes tell Serve at once what they have to do."""
    monkeypatch.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.2")
    cluster = Cluster()
    cluster.add_node(num_cpus=4, num_gpus=ROOM, object_store_memory=100 * 2**20, include_dashboard=False)
    ray.init(address=cluster.address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    yield
    from ray import serve

    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def deploy(pool: Pool) -> None:
    """An application whose deployments work on a request until they are told to stop."""
    from ray import serve

    class Work:
        async def __call__(self) -> None:
            await asyncio.Event().wait()

    class Door:
        def __init__(self, *_: object) -> None: ...

    parts = [
        serve.deployment(
            name=claim.name, max_ongoing_requests=100, graceful_shutdown_timeout_s=0.1,
            graceful_shutdown_wait_loop_s=0.1, ray_actor_options={"num_cpus": 0, "num_gpus": claim.gpus},
            autoscaling_config={**sharing(pool, claim.name, True), "look_back_period_s": 1.0},
        )(Work).bind()
        for claim in pool.claims
    ]  # fmt: skip
    serve.start(proxy_location="Disabled")
    door = serve.deployment(name="door", ray_actor_options={"num_cpus": 0})(Door).bind(*parts)
    serve.run(door, name="nexus", route_prefix=None)


def caller() -> Any:
    """An actor that keeps so many requests of a deployment under way, in a process with the settings of the machine."""

    class Caller:
        def __init__(self) -> None:
            self.calls: dict[str, list[asyncio.Task[None]]] = {}

        async def keep(self, name: str, requests: int) -> None:
            calls = self.calls.setdefault(name, [])
            while len(calls) < requests:
                calls.append(asyncio.create_task(self._call(name)))
            while len(calls) > requests:
                calls.pop().cancel()

        async def _call(self, name: str) -> None:
            from ray import serve
            from ray.serve.exceptions import RayServeException

            handle = serve.get_deployment_handle(name, "nexus")
            while True:
                answer = handle.remote()
                try:
                    with suppress(RayServeException, ray.exceptions.RayError):  # its replica had to go: to another
                        await answer
                except asyncio.CancelledError:
                    answer.cancel()
                    raise

    return ray.remote(Caller).options(num_cpus=0).remote()


def running() -> dict[str, int]:
    """How many replicas of each deployment run."""
    from ray import serve

    deployments = serve.status().applications["nexus"].deployments
    return {name: one.replica_states.get("RUNNING", 0) for name, one in deployments.items() if name != "door"}


async def become(wanted: Mapping[str, int]) -> None:
    """Look again and again; the test's own timeout ends it. Nobody ever has more GPUs than there are."""
    while (found := await asyncio.to_thread(running)) != wanted:
        assert sum(found.values()) <= ROOM
        await asyncio.sleep(0.05)


@pytest.mark.system
@pytest.mark.filterwarnings("ignore")  # what Ray Serve says as it is imported
@pytest.mark.usefixtures("machine")
def test_chat_takes_gpus_from_bulk_and_gives_them_back(tmp_path: Path) -> None:
    """And bulk gives up its own while chats wait, though nobody asks for what it had."""

    async def story() -> None:
        await coordinator.start({1: Placement()}, tmp_path)
        voters = await coordinator.connect()
        await asyncio.to_thread(deploy, POOL)
        calls = caller()
        await calls.keep.remote("bulk", 8)
        await become({"chat": 1, "bulk": 2})
        await calls.keep.remote("chat", 8)
        await become({"chat": 3, "bulk": 1})
        await calls.keep.remote("chat", 0)
        await become({"chat": 1, "bulk": 2})
        await voters.put(f"{PRESSURE}a gateway", b"{}")
        await become({"chat": 1, "bulk": 1})

    asyncio.run(story())
