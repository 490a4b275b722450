"""Limits: what a key and a tenant may ask for per minute, what it owes afterwards, and who gets a place."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from starlette.testclient import TestClient

from deployments.gateway import Lent, build
from deployments.limiting import admission as admission_of
from deployments.limiting import kind_of, show_seconds
from nexus import telemetry
from nexus.access import KeyRing
from nexus.admission import Admission, Kind, Place
from nexus.balancer import Balancer, Member, Weights
from nexus.cache import ResponseCache
from nexus.config import Config, Limits
from nexus.errors import Overloaded, RateLimited, Unavailable
from nexus.limits import MOST_TOKENS, Limiter, spender, spending
from nexus.tokens import Tokens
from nexus.types import Delta, Evidence, Principal, SearchRequest, SearchResult, Usage
from tests.conftest import Door, LocalRetriever
from tests.test_chat_http import ASK, SAID, Parrot
from tests.test_gateway import check_openai_error, check_problem

ALICE = Principal("acme", "alice", credential="a1")
BOB = Principal("acme", "bob", credential="b1")
MALLORY = Principal("other", "mallory", credential="a1")  # another tenant's key of the same name


class Clock:
    """Seconds that pass when told."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def jump(seconds: float) -> None:
    """For the loop at hand, so many seconds have passed: deadlines within them are over."""
    loop = asyncio.get_running_loop()
    told = loop.time
    loop.time = lambda: told() + seconds  # type: ignore[method-assign]


def limiter(clock: Clock, home: str = "/nowhere", **limits: Any) -> Limiter:
    return Limiter(Config(home=home, limits=limits), clock)


def admitted(limits: Limiter, principal: Principal, times: int) -> int:
    """How many of so many requests were let in."""
    done = 0
    for _ in range(times):
        try:
            limits.admit(principal)
        except RateLimited:
            continue
        done += 1
    return done


def wait_of(limits: Limiter, principal: Principal) -> float:
    with pytest.raises(RateLimited) as refused:
        limits.admit(principal)
    return refused.value.retry_after


# Buckets


@pytest.mark.parametrize("start", [0.0, 0.5, 1e9], ids=["a clock at zero", "half a second", "long after the boot"])
def test_a_minutes_worth_comes_at_once_and_then_one_by_one(start: float) -> None:
    clock = Clock(start)
    limits = limiter(clock, requests_per_minute=20)
    assert admitted(limits, ALICE, 25) == 20
    assert wait_of(limits, ALICE) == 3.0
    clock.now += 2.999
    assert admitted(limits, ALICE, 1) == 0
    clock.now += 0.001
    assert admitted(limits, ALICE, 2) == 1
    clock.now += 60
    assert admitted(limits, ALICE, 25) == 20


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=1)
    limits.admit(ALICE)
    assert [wait_of(limits, ALICE) for _ in range(5)] == [60.0] * 5


def test_keys_do_not_share_their_own_limit() -> None:
    limits = limiter(Clock(), requests_per_minute=3)
    assert [admitted(limits, who, 5) for who in (ALICE, BOB, MALLORY)] == [3, 3, 3]


def test_a_burst_is_what_may_come_at_once() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=60, burst_seconds=5)
    assert admitted(limits, ALICE, 60) == 5
    clock.now += 2
    assert admitted(limits, ALICE, 60) == 2


def test_a_burst_of_less_than_one_is_one() -> None:
    assert admitted(limiter(Clock(), requests_per_minute=1, burst_seconds=1), ALICE, 3) == 1


@pytest.mark.parametrize(("own", "allowed"), [(None, 3), (1, 1), (10, 10)])
def test_what_a_key_says_itself_counts(own: int | None, allowed: int) -> None:
    assert admitted(limiter(Clock(), requests_per_minute=3), replace(ALICE, requests_per_minute=own), 20) == allowed


@pytest.mark.parametrize(("own", "left"), [(None, 60), (6, 6), (600, 600)])
def test_what_a_key_says_itself_of_tokens_counts(own: int | None, left: int) -> None:
    limits, key = limiter(Clock(), tokens_per_minute=60), replace(ALICE, tokens_per_minute=own)
    assert limits.levels(key)["tokens"].remaining == left
    limits.spend(key, left)
    assert wait_of(limits, key) == pytest.approx(60 / left)


def test_a_key_whose_limit_changes_is_counted_by_the_new_one() -> None:
    clock = Clock()
    limits, slow, fast = limiter(clock), replace(ALICE, requests_per_minute=2), replace(ALICE, requests_per_minute=20)
    assert (admitted(limits, slow, 5), wait_of(limits, slow), wait_of(limits, fast)) == (2, 30.0, 3.0)
    clock.now += 60
    assert (admitted(limits, fast, 25), wait_of(limits, slow)) == (20, 30.0)


def test_who_has_no_key_is_counted_by_their_name() -> None:
    limits = limiter(Clock(), requests_per_minute=3)
    assert [admitted(limits, Principal("acme", name), 5) for name in ("carol", "dave", "carol")] == [3, 3, 0]


def test_requests_and_tokens_are_counted_apart() -> None:
    limits = limiter(Clock(), requests_per_minute=9, tokens_per_minute=60, tenant={
        "requests_per_minute": 8, "tokens_per_minute": 50,
    })  # fmt: skip
    limits.admit(ALICE)
    assert [limits.levels(BOB)[kind].remaining for kind in ("requests", "tokens")] == [7, 50]
    limits.spend(ALICE, 20)
    assert [limits.levels(BOB)[kind].remaining for kind in ("requests", "tokens")] == [7, 30]
    assert [limits.levels(ALICE)[kind].remaining for kind in ("requests", "tokens")] == [7, 30]
    other = limiter(Clock(), requests_per_minute=9, tokens_per_minute=60)
    other.admit(ALICE)
    other.spend(ALICE, 20)
    assert [other.levels(ALICE)[kind].remaining for kind in ("requests", "tokens")] == [8, 40]


def test_a_tenant_and_a_key_of_one_name_are_two() -> None:
    namesake = Principal("acme", "acme", credential="acme")
    limits = limiter(Clock(), requests_per_minute=2, tenant={"requests_per_minute": 4})
    assert [admitted(limits, who, 3) for who in (namesake, ALICE, BOB)] == [2, 2, 0]


def test_a_key_may_be_limited_where_the_others_are_not() -> None:
    limits = limiter(Clock())
    assert admitted(limits, replace(ALICE, requests_per_minute=2), 9) == 2
    assert admitted(limits, BOB, 1000) == 1000 and len(limits) == 1


def test_a_tenants_ceiling_is_of_all_its_keys_together() -> None:
    limits = limiter(Clock(), requests_per_minute=8, tenant={"requests_per_minute": 10})
    assert [admitted(limits, who, 9) for who in (ALICE, BOB, MALLORY)] == [8, 2, 8]
    with pytest.raises(RateLimited, match="all keys of this tenant together: 10 requests a minute"):
        limits.admit(BOB)


def test_who_is_refused_by_the_tenants_ceiling_has_not_paid_with_the_key() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=2, tenant={"requests_per_minute": 2})
    assert (admitted(limits, ALICE, 2), admitted(limits, BOB, 5)) == (2, 0)
    clock.now += 60
    assert admitted(limits, BOB, 5) == 2


def test_a_named_tenant_has_a_ceiling_of_its_own() -> None:
    limits = limiter(Clock(), tenant={"requests_per_minute": 1}, tenants={"acme": {"requests_per_minute": 4}})
    assert [admitted(limits, who, 9) for who in (ALICE, MALLORY)] == [4, 1]


def test_generated_tokens_are_a_debt_that_is_paid_off() -> None:
    clock = Clock()
    limits = limiter(clock, tokens_per_minute=600)
    limits.admit(ALICE)
    limits.spend(ALICE, 900)
    assert wait_of(limits, ALICE) == pytest.approx(30.1)  # 300 owed at ten a second, and one to spend
    limits.admit(BOB)
    clock.now += 30.1
    limits.admit(ALICE)


def test_a_tenants_tokens_are_of_all_its_keys_together() -> None:
    limits = limiter(Clock(), tenant={"tokens_per_minute": 600})
    limits.spend(ALICE, 600)
    assert wait_of(limits, BOB) == pytest.approx(0.1)
    limits.admit(MALLORY)


def test_tokens_are_owed_by_the_key_and_by_its_tenant() -> None:
    limits = limiter(Clock(), tokens_per_minute=60, tenant={"tokens_per_minute": 600})
    limits.spend(ALICE, 600)
    assert wait_of(limits, ALICE) == pytest.approx(541)  # 540 owed at one a second, and one to spend
    assert wait_of(limits, BOB) == pytest.approx(0.1)
    limits.admit(MALLORY)


@pytest.mark.parametrize("tokens", [-5, 0, 10**30], ids=["less than none", "none", "more than there are"])
def test_a_backend_that_counts_nonsense_ruins_nobody(tokens: int) -> None:
    limits = limiter(Clock(), tokens_per_minute=MOST_TOKENS)
    limits.spend(ALICE, tokens)
    assert tokens <= 0 or wait_of(limits, ALICE) <= 0.001


def test_a_full_bucket_is_forgotten() -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=60, tokens_per_minute=60)
    for n in range(1000):
        limits.admit(replace(ALICE, credential=f"key-{n}"))
    limits.spend(ALICE, 90)
    assert len(limits) == 1001
    clock.now += 1.001
    assert len(limits) == 1
    clock.now += 89
    assert len(limits) == 0


def test_of_too_many_buckets_the_longest_unused_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.limits.MOST_BUCKETS", 3)
    limits = limiter(Clock(), requests_per_minute=1)
    keys = [replace(ALICE, credential=f"key-{n}") for n in range(5)]
    assert [admitted(limits, key, 1) for key in keys] == [1] * 5 and len(limits) == 3
    assert [admitted(limits, key, 1) for key in (*keys[2:], keys[0])] == [0, 0, 0, 1]


def test_what_is_left_is_what_may_come_at_once() -> None:
    limits = limiter(Clock(1e6), requests_per_minute=60, burst_seconds=5)
    assert [limits.levels(ALICE)["requests"].remaining, admitted(limits, ALICE, 1)] == [5, 1]
    level = limits.levels(ALICE)["requests"]
    assert (level.limit, level.remaining, level.reset_seconds) == (60, 4, 1.0)


@pytest.mark.parametrize("limit", [1, 7, 20, 1000, 9_999_999], ids=str)
def test_levels_say_what_is_left_and_when_it_is_full_again(limit: int) -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=limit)
    fresh = limits.levels(ALICE)["requests"]
    assert (fresh.limit, fresh.remaining, fresh.reset_seconds) == (limit, limit, 0.0)
    limits.admit(ALICE)
    after = limits.levels(ALICE)["requests"]
    assert (after.limit, after.remaining) == (limit, limit - 1)
    assert after.reset_seconds == pytest.approx(60 / limit, abs=1e-6)
    assert set(limits.levels(ALICE)) == {"requests"}


def test_the_level_shown_is_that_of_the_bucket_with_less_left() -> None:
    limits = limiter(Clock(), requests_per_minute=10, tenant={"requests_per_minute": 12})
    assert admitted(limits, BOB, 5) == 5
    assert (limits.levels(ALICE)["requests"].limit, limits.levels(ALICE)["requests"].remaining) == (12, 7)
    assert (limits.levels(BOB)["requests"].limit, limits.levels(BOB)["requests"].remaining) == (10, 5)


def test_debts_leave_nothing() -> None:
    limits = limiter(Clock(), tokens_per_minute=60)
    limits.spend(ALICE, 90)
    level = limits.levels(ALICE)["tokens"]
    assert (level.remaining, level.reset_seconds) == (0, 90.0)


@settings(max_examples=60, deadline=None)
@given(some.integers(1, 500), some.lists(some.tuples(some.sampled_from("ab"), some.integers(0, 20_000)), max_size=80))
def test_in_no_stretch_of_time_is_there_more_than_a_burst_and_what_came_in(
    limit: int, asked: list[tuple[str, int]]
) -> None:
    clock = Clock()
    limits = limiter(clock, requests_per_minute=limit)
    let_in: dict[str, list[float]] = {"a": [], "b": []}
    for who, pause_ms in asked:
        clock.now += pause_ms / 1000
        if admitted(limits, replace(ALICE, credential=who), 1):
            let_in[who].append(clock.now)
    for times in let_in.values():
        for i, begin in enumerate(times):
            for j in range(i, len(times)):
                assert j - i + 1 <= limit + (times[j] - begin) * limit / 60 + 1e-6


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
@pytest.mark.parametrize("value", [0, -1, 10**8, "many"])
def test_a_limit_that_is_none_is_refused_at_start(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        Config(home="/nowhere", limits={name: value})


def test_spending_is_told_to_whoever_began_it() -> None:
    told: list[int] = []
    spender()(5)
    with spending(told.append):
        spender()(7)
    spender()(9)
    assert told == [7]


# Through the front door


def reopen(door: Door, clock: Clock | None = None, parrot: Parrot | None = None, **limits: Any) -> TestClient:
    """The same door with these limits, and perhaps a model."""
    lent = replace(door.lent, config=limited(door, **limits), clock=clock or Clock())
    if parrot is not None:
        balancer = Balancer([Member(parrot, 1.0)], Weights(1, 1, 1), 5)
        tools = replace(lent.rag, generator=balancer.generator(parrot.name), abstain_below=0.0)
        lent = replace(lent, balancer=balancer, rag=tools)
    return TestClient(build(lent), raise_server_exceptions=False)


def stock(door: Door) -> None:
    """One document, and so a collection, of the tenant of the keys."""
    door.house.put("heron.md", "The heron lives in Paris.", who=Principal("default", "librarian"))


def limited(door: Door, **limits: Any) -> Config:
    """The settings of this door with these limits."""
    return door.lent.config.model_copy(update={"limits": Limits(**limits)})


def refusals(reason: str) -> float:
    """How many requests were refused for this reason so far."""
    lines = telemetry.exposition().decode().splitlines()
    told = f'requests_refused_total{{reason="{reason}"}} '
    return sum(float(line.removeprefix(told)) for line in lines if line.startswith(told))


def of_limits(answer: httpx.Response) -> dict[str, str]:
    return {
        name.removeprefix("x-ratelimit-"): value
        for name, value in answer.headers.items()
        if name.startswith("x-ratelimit-")
    }


def test_answers_say_how_the_limits_stand(door: Door) -> None:
    client, key = reopen(door, requests_per_minute=20, tokens_per_minute=1000), door.headers()
    answer = client.get("/rag/documents", headers=key)
    assert of_limits(answer) == {
        "limit-requests": "20", "remaining-requests": "19", "reset-requests": "3s",
        "limit-tokens": "1000", "remaining-tokens": "1000", "reset-tokens": "0ms",
    }  # fmt: skip
    for path, status in (("/nowhere", 404), ("/rag/documents/x", 404)):
        answer = client.get(path, headers=key)
        assert answer.status_code == status and of_limits(answer)["limit-requests"] == "20"
    assert of_limits(answer)["remaining-requests"] == "17"


def test_who_has_no_limits_is_told_of_none(door: Door) -> None:
    assert of_limits(reopen(door).get("/rag/documents", headers=door.headers())) == {}


ROUTES = (
    ("GET", "/rag/documents", None), ("POST", "/rag/search", {"query": "x"}), ("POST", "/rag/query", {"query": "x"}),
    ("POST", "/rag/add_document", {"filename": "a.md", "content": "x"}), ("POST", "/mcp/s/query", {"input": "x"}),
    ("GET", "/v1/models", None), ("POST", "/v1/chat/completions", ASK), ("POST", "/rag/jobs", {}),
    ("POST", "/v1/embeddings", {}), ("POST", "/execute", {}), ("GET", "/metrics", None), ("GET", "/nowhere", None),
)  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), ROUTES, ids=[f"{method} {path}" for method, path, _ in ROUTES])
def test_past_the_limit_there_is_429_in_the_shape_of_the_path(door: Door, method: str, path: str, body: object) -> None:
    client, key = reopen(door, clock := Clock(), requests_per_minute=2), door.headers()
    for _ in range(2):
        assert client.get("/pipelines", headers=key).status_code == 200
    answer = client.request(method, path, json=body, headers=key)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "30"
    assert of_limits(answer) == {"limit-requests": "2", "remaining-requests": "0", "reset-requests": "1m0s"}
    if path.startswith("/v1/"):
        assert check_openai_error(answer, 429, "rate_limit_error")["code"] == "rate_limit_exceeded"
    else:
        assert check_problem(answer, 429, path)["code"] == "rate_limit_exceeded"
    clock.now += 30
    assert client.get("/pipelines", headers=key).status_code == 200


def test_one_keys_429_is_not_the_others(door: Door) -> None:
    client, abusive, other = (
        reopen(door, requests_per_minute=3),
        door.headers(name="abusive"),
        door.headers(name="other"),
    )
    statuses = [client.get("/pipelines", headers=abusive).status_code for _ in range(50)]
    assert statuses == [200] * 3 + [429] * 47
    assert client.get("/pipelines", headers=other).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz"])
def test_health_is_never_limited(door: Door, path: str) -> None:
    client = reopen(door, requests_per_minute=1)
    answers = [client.get(path, headers=door.headers()) for _ in range(5)]
    assert {answer.status_code for answer in answers} == {200} and of_limits(answers[-1]) == {}


def test_who_has_no_credential_is_told_that_and_nothing_of_limits(door: Door) -> None:
    client = reopen(door, requests_per_minute=1)
    for _ in range(3):
        answer = client.get("/pipelines")
        assert answer.status_code == 401 and of_limits(answer) == {}


def test_in_production_the_21st_request_of_a_minute_is_refused(door: Door, tmp_path: Path) -> None:
    """Of a key that says nothing itself, by the settings of an installation that says nothing of limits."""
    config = Config(home=tmp_path / "live", access={"mode": "production"}, http={"allowed_hosts": ["testserver"]})
    Path(config.home).mkdir()
    with closing(KeyRing(Path(config.home), environment=config.access.environment)) as keys:
        lent = replace(
            door.lent, config=config, keys=keys, tokens=Tokens(keys, Path(config.home), config.access), clock=Clock()
        )
        client = TestClient(build(lent), raise_server_exceptions=False)
        mine, other = ({"x-api-key": keys.create(name)[0]} for name in ("mine", "other"))
        answers = [client.get("/rag/documents", headers=mine) for _ in range(22)]
        assert [answer.status_code for answer in answers] == [200] * 20 + [429] * 2
        left = [of_limits(answer)["remaining-requests"] for answer in answers]
        assert left == [str(n) for n in range(19, -1, -1)] + ["0"] * 2
        assert check_problem(answers[20], 429, "/rag/documents")["code"] == "rate_limit_exceeded"
        assert answers[20].headers["retry-after"] == "3"
        assert of_limits(answers[20]) == {"limit-requests": "20", "remaining-requests": "0", "reset-requests": "1m0s"}
        assert client.get("/rag/documents", headers=other).status_code == 200
        token = client.post("/auth/token", headers=other).json()["access_token"]
        statuses = [
            client.get("/rag/documents", headers={"authorization": f"Bearer {token}"}).status_code for _ in range(20)
        ]
        assert statuses == [200] * 18 + [429] * 2  # a token is its key's


@pytest.mark.parametrize(
    ("said", "production", "development"),
    [
        ({}, 20, None), ({"waiting": 3}, 20, None), ({"requests_per_minute": None}, 20, None),
        ({"requests_per_minute": None, "places": 9}, 20, None), ({"requests_per_minute": "any"}, None, None),
        ({"requests_per_minute": 500, "share": 0.4}, 500, 500),
    ],
    ids=str,
)  # fmt: skip
def test_in_production_only_who_says_so_has_another_limit(
    said: dict[str, Any], production: int | None, development: int | None
) -> None:
    modes: dict[str, int | None] = {"production": production, "development": development}
    for mode, expected in modes.items():
        assert Config(home="/nowhere", access={"mode": mode}, limits=said).requests_per_minute == expected


def test_who_comes_back_when_told_is_let_in(door: Door) -> None:
    """Retry-After is in whole seconds, and never too early."""
    client, key = reopen(door, clock := Clock(), requests_per_minute=7, burst_seconds=1), door.headers()
    answers = [client.get("/pipelines", headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429] and answers[1].headers["retry-after"] == "9"
    clock.now += 9
    assert client.get("/pipelines", headers=key).status_code == 200


def test_whoever_is_refused_is_counted(door: Door) -> None:
    client, key = reopen(door, requests_per_minute=1), door.headers()
    before = refusals("quota")
    assert [client.get("/pipelines", headers=key).status_code for _ in range(3)] == [200, 429, 429]
    assert refusals("quota") == before + 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", ASK),
        ("/v1/completions", {"model": "parrot", "prompt": "x"}),
        ("/v1/chat/completions", {**ASK, "model": "nexus-rag"}),
        ("/rag/query", {"query": "x"}),
    ],
    ids=["chat", "completion", "nexus-rag", "query"],
)
def test_generated_tokens_are_paid_for_afterwards(door: Door, path: str, body: dict[str, Any], stream: bool) -> None:
    stock(door)
    parrot = Parrot([Delta("Paris"), Delta(finish_reason="stop"), Delta(usage=Usage(9, 90))])
    client, key = reopen(door, clock := Clock(), parrot, tokens_per_minute=60), door.headers()
    first = client.post(path, json={**body, "stream": stream}, headers=key)
    assert first.status_code == 200, first.text
    assert of_limits(first)["remaining-tokens"] == ("60" if stream else "0")  # of a stream its head says so first
    answer = client.post(path, json=body, headers=key)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "31")
    assert "generated tokens" in answer.text and of_limits(answer)["reset-tokens"] == "1m30s"
    assert client.get("/pipelines", headers=door.headers(name="other")).status_code == 200
    clock.now += 31
    assert client.post(path, json=body, headers=key).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [("/execute", {"template_name": "full_analysis", "initial_data": {"a": 1}}), ("/mcp/s/query", {"input": "x"})],
)
def test_every_step_is_paid_for(door: Door, path: str, body: dict[str, Any]) -> None:
    stock(door)
    parrot = Parrot([Delta("Paris"), Delta(finish_reason="stop"), Delta(usage=Usage(9, 10))])
    client, key = reopen(door, parrot=parrot, tokens_per_minute=600), door.headers()
    answer = client.post(path, json=body, headers=key)
    assert answer.status_code == 200, answer.text
    assert of_limits(answer)["remaining-tokens"] == str(600 - 10 * len(parrot.asked))


def test_a_backend_that_does_not_count_pays_by_its_pieces(door: Door) -> None:
    parrot = Parrot([Delta("Pa"), Delta("ris"), Delta(finish_reason="stop")])
    answer = reopen(door, parrot=parrot, tokens_per_minute=60).post(
        "/v1/chat/completions", json=ASK, headers=door.headers()
    )
    assert of_limits(answer)["remaining-tokens"] == "58"


def test_what_is_kept_costs_nothing(door: Door) -> None:
    config = limited(door, tokens_per_minute=60)
    balancer = Balancer([Member(Parrot(SAID), 1.0)], Weights(1, 1, 1), 5)
    lent = replace(door.lent, config=config, clock=Clock(), balancer=balancer, cache=ResponseCache(9, 60, 2**20))
    client, key = TestClient(build(lent)), door.headers()
    left = [of_limits(client.post("/v1/chat/completions", json=ASK, headers=key)) for _ in range(2)]
    assert [one["remaining-tokens"] for one in left] == ["58", "58"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0ms"), (0.0001, "1ms"), (0.9, "900ms"), (1, "1s"), (59.2, "1m0s"), (61, "1m1s"), (3600, "60m0s")],
)
def test_seconds_are_shown_as_openai_does(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


# Places


def admission(places: int = 2, waiting: int = 4, share: float = 1.0, bulk: float = 1.0, **wait: float) -> Admission:
    seconds: dict[Kind, float] = {"interactive": 60.0, "bulk": 60.0, **wait}  # type: ignore[dict-item]
    return Admission(places, waiting, share, bulk, seconds)


async def turn() -> None:
    """Let everyone who can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


class Line:
    """Requests in the order in which they came, and the places they got."""

    def __init__(self, places: Admission) -> None:
        self.places = places
        self.asked: dict[str, asyncio.Task[Place]] = {}

    async def come(self, *names: str) -> None:
        """`a1` is an interactive request of a, `a1!` a bulk one."""
        for name in names:
            kind: Kind = "bulk" if name.endswith("!") else "interactive"
            self.asked[name] = asyncio.create_task(self.places.enter(name[0], kind))
            await turn()

    def of(self, state: str) -> list[str]:
        found = []
        for name, task in self.asked.items():
            is_refused = task.done() and not task.cancelled() and task.exception() is not None
            now = "left" if task.cancelled() else "refused" if is_refused else "in" if task.done() else "waiting"
            found += [name] if now == state else []
        return found

    async def leave(self, name: str) -> None:
        self.asked.pop(name).result().leave()
        await turn()

    async def give_up(self, name: str) -> None:
        self.asked[name].cancel()
        await turn()

    async def end(self) -> None:
        for task in self.asked.values():
            task.cancel()
        await asyncio.gather(*self.asked.values(), return_exceptions=True)


def played(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@played
async def test_so_many_work_and_so_many_wait_and_no_more() -> None:
    line = Line(admission(places=2, waiting=2))
    await line.come("a1", "b1", "c1", "d1", "e1")
    assert (line.of("in"), line.of("waiting"), line.of("refused")) == (["a1", "b1"], ["c1", "d1"], ["e1"])
    assert (line.places.working, line.places.waiting) == (2, 2)
    await line.leave("a1")
    assert (line.of("in"), line.of("waiting")) == (["b1", "c1"], ["d1"])
    await line.end()


@played
async def test_interactive_before_bulk() -> None:
    line = Line(admission(places=1))
    await line.come("a1", "b1!", "c1", "c2")
    for expected in ("c1", "c2", "b1!"):
        await line.leave(line.of("in")[0])
        assert line.of("in") == [expected]
    await line.end()


@played
async def test_bulk_work_has_no_more_than_its_share() -> None:
    line = Line(admission(places=4, bulk=0.5))
    await line.come("a1!", "a2!", "b1!", "c1", "c2")
    assert (line.of("in"), line.of("waiting")) == (["a1!", "a2!", "c1", "c2"], ["b1!"])
    await line.leave("c1")
    assert line.of("waiting") == ["b1!"]
    await line.leave("a1!")
    assert line.of("waiting") == []
    await line.end()


@played
async def test_no_caller_has_more_than_its_share() -> None:
    line = Line(admission(places=4, share=0.5))
    await line.come("a1", "a2", "a3", "b1", "b2")
    assert (line.of("in"), line.of("waiting")) == (["a1", "a2", "b1", "b2"], ["a3"])
    await line.leave("b1")
    assert line.of("waiting") == ["a3"]
    await line.leave("a1")
    assert line.of("waiting") == []
    await line.end()


@played
async def test_a_share_of_less_than_one_place_is_one() -> None:
    line = Line(admission(places=1, share=0.1, bulk=0.1))
    await line.come("a1!")
    assert line.of("in") == ["a1!"]
    await line.end()


@played
async def test_who_holds_least_is_next_and_then_by_turns() -> None:
    line = Line(admission(places=2, waiting=9))
    await line.come("a1", "a2", "a3", "a4", "b1", "b2", "c1")
    for leaves, enters in (("a1", "b1"), ("a2", "a3"), ("b1", "c1"), ("c1", "b2"), ("a3", "a4")):
        before = set(line.of("in"))
        await line.leave(leaves)
        assert set(line.of("in")) - before == {enters}
    await line.end()


@played
async def test_a_flood_crowds_out_itself() -> None:
    line = Line(admission(places=1, waiting=3))
    await line.come("a1", "a2", "a3", "a4", "a5")
    assert line.of("refused") == ["a5"]
    await line.come("b1")
    assert (line.of("waiting"), line.of("refused")) == (["a2", "a3", "b1"], ["a4", "a5"])
    await line.come("b2")
    assert line.of("refused") == ["a4", "a5", "b2"]
    await line.end()


@played
async def test_who_has_nobody_waiting_takes_the_place_of_a_second_one() -> None:
    line = Line(admission(places=1, waiting=2))
    await line.come("a1", "a2", "a3", "b1", "c1")
    assert (line.of("waiting"), line.of("refused")) == (["a2", "b1"], ["a3", "c1"])
    await line.end()


@played
async def test_bulk_work_gives_its_place_in_the_queue_to_an_interactive_request() -> None:
    line = Line(admission(places=1, waiting=2))
    await line.come("a1", "a2!", "b1!", "a3", "a4", "c1!")
    assert (line.of("waiting"), line.of("refused")) == (["a3", "a4"], ["a2!", "b1!", "c1!"])
    await line.end()


@played
async def test_nobody_waits_for_long() -> None:
    line = Line(admission(places=1, interactive=0.0))
    await line.come("a1", "b1!")
    with pytest.raises(Overloaded):
        await line.places.enter("c", "interactive")
    assert (line.of("waiting"), line.places.waiting) == (["b1!"], 1)
    await line.end()


@played
async def test_bulk_work_waits_longer_and_not_for_ever() -> None:
    line = Line(admission(places=1, interactive=5.0))
    await line.come("a1", "b1", "b2!")
    jump(6)
    await turn()
    assert (line.of("refused"), line.of("waiting"), line.places.waiting) == (["b1"], ["b2!"], 1)
    jump(60)
    await turn()
    assert (line.of("refused"), line.places.waiting, line.places.working) == (["b1", "b2!"], 0, 1)
    await line.end()


@played
async def test_a_turn_that_comes_as_the_wait_ends_is_taken() -> None:
    line = Line(admission(places=1, interactive=50.0))
    await line.come("a1", "b1")
    asyncio.get_running_loop().call_later(40, line.asked["a1"].result().leave)
    jump(60)  # both moments have passed when the loop looks next
    await turn()
    assert (line.of("refused"), line.of("in"), line.places.working) == ([], ["a1", "b1"], 1)
    await line.leave("b1")
    assert line.places.working == 0
    await line.end()


@played
async def test_the_places_are_those_of_the_settings() -> None:
    limits = {"places": 8, "share": 0.5, "bulk_share": 0.25, "waiting": 9, "wait_seconds": 5, "bulk_wait_seconds": 50}
    line = Line(admission_of(Config(home="/nowhere", limits=limits)))
    await line.come(*[f"a{n}" for n in range(5)], *[f"b{n}!" for n in range(3)])
    assert line.of("waiting") == ["a4", "b2!"]
    jump(6)
    await turn()
    assert (line.of("refused"), line.of("waiting")) == (["a4"], ["b2!"])
    jump(60)
    await turn()
    assert line.of("refused") == ["a4", "b2!"]
    await line.end()


@played
async def test_who_leaves_while_waiting_leaves_nothing() -> None:
    line = Line(admission(places=1, waiting=2))
    await line.come("a1", "b1", "c1")
    await line.give_up("b1")
    assert (line.places.working, line.places.waiting) == (1, 1)
    await line.leave("a1")
    assert line.of("in") == ["c1"]
    await line.end()


@played
async def test_who_leaves_in_the_moment_of_their_turn_gives_it_to_the_next() -> None:
    line = Line(admission(places=1, waiting=9))
    await line.come("a1", "b1", "c1", "d1")
    line.asked["b1"].cancel()  # and has not noticed yet
    line.asked["a1"].result().leave()
    line.asked["c1"].cancel()  # after its turn has come
    await turn()
    assert (line.of("in"), line.of("left")) == (["a1", "d1"], ["b1", "c1"])
    assert (line.places.working, line.places.waiting) == (1, 0)
    await line.end()


@played
async def test_to_leave_twice_is_to_leave_once() -> None:
    places = admission(places=1)
    first = await places.enter("a", "interactive")
    first.leave()
    second = await places.enter("b", "interactive")
    first.leave()
    assert places.working == 1
    second.leave()
    assert (places.working, places.waiting) == (0, 0)


@settings(max_examples=80, deadline=None)
@given(
    some.integers(1, 4), some.integers(0, 5), some.sampled_from([0.3, 0.5, 1.0]), some.sampled_from([0.3, 1.0]),
    some.lists(some.tuples(some.sampled_from(["come", "leave", "give up"]), some.integers(0, 99)), max_size=60),
)  # fmt: skip
def test_places_are_never_lost_nor_made(
    places: int, waiting: int, share: float, bulk: float, steps: list[tuple[str, int]]
) -> None:
    async def play() -> None:
        line = Line(admission(places, waiting, share, bulk))
        for number, (step, which) in enumerate(steps):
            if step == "come":
                await line.come(f"{'abc'[which % 3]}{number}{'!' if which % 2 else ''}")
            elif step == "leave" and (working := line.of("in")):
                await line.leave(working[which % len(working)])
            elif step == "give up" and (queued := line.of("waiting")):
                await line.give_up(queued[which % len(queued)])
            working, queued = line.of("in"), line.of("waiting")
            assert (line.places.working, line.places.waiting) == (len(working), len(queued))
            assert len(working) <= places and len(queued) <= waiting
            assert sum(name.endswith("!") for name in working) <= max(1, places * bulk)
            for caller in "abc":
                assert sum(name[0] == caller for name in working) <= max(1, places * share)
            if not waiting or not queued:
                continue
            assert not any(line.places._may_work(n[0], "bulk" if n[-1] == "!" else "interactive") for n in queued)
        for name in line.of("waiting"):
            await line.give_up(name)
        for name in line.of("in"):
            await line.leave(name)
        assert (line.places.working, line.places.waiting) == (0, 0) and not line.places._held

    asyncio.run(play())


# Places, through the front door


class Held(LocalRetriever):
    """A retriever whose searches end when they are told to."""

    def __init__(self, door: Door) -> None:
        super().__init__(door.house)
        self.begun = 0
        self.go_on = asyncio.Event()

    async def search(self, request: SearchRequest, principal: Principal) -> SearchResult:
        self.begun += 1
        await self.go_on.wait()
        return await super().search(request, principal)

    async def retrieve(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        self.begun += 1
        await self.go_on.wait()
        return await super().retrieve(request, principal, passages, tokens)


def at_the_door(lent: Lent, headers: dict[str, str]) -> httpx.AsyncClient:
    """Who asks the whole front door over this, within the event loop."""
    transport = httpx.ASGITransport(build(lent))
    return httpx.AsyncClient(transport=transport, base_url="http://testserver", headers=headers)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("path", ["/rag/search", "/v1/models"], ids=["problem", "openai"])
def test_where_every_place_is_taken_there_is_503(door: Door, path: str) -> None:
    stock(door)
    before = refusals("overload")

    async def play() -> None:
        held = Held(door)
        config = limited(door, places=1, waiting=0, requests_per_minute=9)
        lent = replace(door.lent, config=config, retriever=held, clock=Clock())
        async with at_the_door(lent, door.headers()) as client:
            first = asyncio.create_task(client.post("/rag/search", json={"query": "x"}))
            await until(lambda: held.begun)
            method = "POST" if path == "/rag/search" else "GET"
            answer = await client.request(method, path, json={"query": "x"})
            assert answer.headers["retry-after"] == "2" and of_limits(answer)["remaining-requests"] == "7"
            if path == "/v1/models":
                check_openai_error(answer, 503, "service_unavailable_error")
            else:
                assert check_problem(answer, 503, path)["code"] == "overloaded"
            for public in ("/livez", "/readyz", "/metrics"):
                assert (await client.get(public)).status_code == 200
            assert refusals("overload") == before + 1
            held.go_on.set()
            assert (await first).status_code == 200
            assert (await client.get("/pipelines")).status_code == 200

    asyncio.run(play())


@pytest.mark.parametrize("path", ["/rag/search", "/rag/query"])
def test_no_more_searches_are_under_way_than_may_be(door: Door, path: str) -> None:
    """One waits, the next is refused, and whatever else there is to do goes on."""
    stock(door)
    before = refusals("overload")

    async def play() -> None:
        held = Held(door)
        config = limited(door, searches=1, waiting=1, wait_seconds=60)
        lent = replace(door.lent, config=config, retriever=held, clock=Clock())
        lent = replace(lent, rag=replace(lent.rag, retrieve=held.retrieve))
        async with at_the_door(lent, door.headers()) as client:

            def ask() -> "asyncio.Task[httpx.Response]":
                return asyncio.create_task(client.post(path, json={"query": "x"}))

            first = ask()
            await until(lambda: held.begun)
            others = [ask(), ask()]  # whichever comes second finds the queue full
            (ended,), (waiting,) = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
            refused = await ended
            assert check_problem(refused, 503, path)["code"] == "overloaded" and refused.headers["retry-after"] == "2"
            assert (await client.get("/pipelines")).status_code == 200
            assert held.begun == 1 and refusals("overload") == before + 1
            held.go_on.set()
            assert [(await one).status_code for one in (first, waiting)] == [200, 200] and held.begun == 2

    asyncio.run(play())


def test_who_is_over_their_limit_takes_nobodys_place(door: Door) -> None:
    """They are told so at once, be there a place or not."""
    stock(door)

    async def play() -> None:
        held = Held(door)
        config = limited(door, places=1, waiting=9, requests_per_minute=1)
        lent = replace(door.lent, config=config, retriever=held, clock=Clock())
        async with at_the_door(lent, door.headers()) as client:
            first = asyncio.create_task(client.post("/rag/search", json={"query": "x"}))
            await until(lambda: held.begun)
            assert (await client.get("/pipelines")).status_code == 429
            held.go_on.set()
            assert (await first).status_code == 200

    asyncio.run(play())


@pytest.mark.parametrize("fault", [RuntimeError("planted"), Unavailable("planted")], ids=["a bug", "a part away"])
def test_what_fails_leaves_its_place(door: Door, fault: Exception) -> None:
    stock(door)

    class Failing(LocalRetriever):
        async def search(self, request: SearchRequest, principal: Principal) -> SearchResult:
            raise fault

    config = limited(door, places=1, waiting=0)
    lent = replace(door.lent, config=config, retriever=Failing(door.house))
    client, key = TestClient(build(lent), raise_server_exceptions=False), door.headers()
    for _ in range(2):
        assert client.post("/rag/search", json={"query": "x"}, headers=key).status_code in (500, 503)
        assert client.get("/pipelines", headers=key).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "length", "kind"),
    [
        ("POST", "/rag/search", "100000", "interactive"), ("POST", "/rag/query", None, "interactive"),
        ("POST", "/v1/chat/completions", "900000", "interactive"), ("GET", "/rag/jobs", None, "interactive"),
        ("GET", "/rag/jobs/x", None, "interactive"), ("DELETE", "/rag/documents/x", None, "interactive"),
        ("POST", "/mcp/s/add_context", "100", "interactive"), ("POST", "/v1/embeddings", "100", "interactive"),
        ("POST", "/rag/add_document", "100", "bulk"), ("POST", "/rag/jobs", "100", "bulk"),
        ("PUT", "/rag/jobs/x/files", None, "bulk"), ("POST", "/rag/vacuum", None, "bulk"),
        ("POST", "/policies/cold/evaluate", "2", "bulk"), ("GET", "/policies/cold", None, "interactive"),
        ("POST", "/v1/embeddings", "100000", "bulk"), ("POST", "/v1/embeddings", None, "bulk"),
        ("POST", "/v1/rerank", "9" * 5000, "bulk"), ("POST", "/v1/rerank", "-1", "bulk"),
        ("POST", "/mcp", "9000", "interactive"), ("POST", "/mcp", "100000", "bulk"),
    ],
)  # fmt: skip
def test_what_is_bulk_work(method: str, path: str, length: str | None, kind: Kind) -> None:
    headers = [] if length is None else [(b"content-length", length.encode())]
    assert kind_of({"type": "http", "method": method, "path": path, "headers": headers}) == kind


def test_there_are_places_for_as_many_as_the_models_take_at_once() -> None:
    served = [{"address": "openai:http://localhost:1/v1#m", "replicas": {"most": 3, "at_once": 10}}]
    assert Config(home="/nowhere").places == 64
    assert Config(home="/nowhere", models={"served": served}).places == 64 + 30
    assert Config(home="/nowhere", models={"served": served}, limits={"places": 7}).places == 7


def test_an_upload_that_waits_for_its_end_holds_no_place(door: Door) -> None:
    async def play() -> None:
        config = limited(door, places=1, waiting=0)
        slow = Slow(door.lent.ingestor)
        lent = replace(door.lent, config=config, ingestor=slow, clock=Clock())
        async with at_the_door(lent, door.headers()) as client:
            body = {"filename": "a.md", "content": "The heron lives in Paris."}
            first = asyncio.create_task(client.post("/rag/add_document", json=body))
            await until(lambda: slow.begun)
            assert (await client.get("/pipelines")).status_code == 200
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert (await client.get("/pipelines")).status_code == 200

    asyncio.run(play())


class Slow:
    """An ingestor that never ends a file."""

    def __init__(self, ingestor: Any) -> None:
        self.ingestor = ingestor
        self.begun = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ingestor, name)

    async def finish(self, job_id: str, number: int) -> None:
        self.begun += 1
        await asyncio.Event().wait()
