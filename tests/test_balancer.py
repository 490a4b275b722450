"""Which model answers: who is chosen, ejected, probed and asked again, and that nothing is left behind."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from nexus.balancer import HALF_LIFE_SECONDS, MOST_LOAD, SPARE_LOAD, Balanced, Balancer, Candidate, Member, Weights
from nexus.errors import InvalidRequest, NexusError, NotFound, Overloaded, Unavailable, UpstreamInvalid
from nexus.types import Delta, Image, Message, Prompt, Usage

EVEN = Weights(1, 1, 1)
FAST = Weights(1, 0, 0)
MUCH = Weights(0, 1, 0)
WISE = Weights(0, 0, 1)
ASK = Prompt((Message("user", "a secret question"),))
SHOW = Prompt((Message("user", ("what is this?", Image("data:image/png;base64,AAAA"))),))
END = Delta(finish_reason="stop")
SAID = [Delta("one"), Delta("two"), END]
PROBE_SECONDS = 5.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Step = Delta | BaseException | float | asyncio.Event


@dataclass(eq=False)
class Player:
    """A generator that plays its scripts in turn, then `after` for ever: deltas, errors, seconds passing, waits."""

    name: str
    clock: Clock
    scripts: list[list[Step]] = field(default_factory=list)
    after: list[Step] = field(default_factory=lambda: list(SAID))
    sees_images: bool = False
    health: list[Step] = field(default_factory=list)
    asked: int = 0
    running: int = 0
    checks: list[float] = field(default_factory=list)
    on_close: Callable[[], None] = lambda: None

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        self.asked += 1
        self.running += 1
        try:
            for step in self.scripts.pop(0) if self.scripts else self.after:
                if isinstance(step, Delta):
                    yield step
                else:
                    await self.pass_through(step)
        finally:
            self.running -= 1
            self.on_close()

    async def check(self) -> None:
        self.checks.append(self.clock())
        for step in self.health:
            assert not isinstance(step, Delta)
            await self.pass_through(step)

    async def pass_through(self, step: BaseException | float | asyncio.Event) -> None:
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, asyncio.Event):
            await step.wait()
        else:
            self.clock.now += step


@dataclass
class Table:
    """Players on one clock, and the balancer over them. Accuracies are 0.5 where none are given."""

    clock: Clock
    players: list[Player]
    balancer: Balancer

    def chosen(self) -> list[int]:
        return [choice.member for choice in self.balancer.report().choices]

    def last(self) -> dict[int, Candidate]:
        return {one.member: one for one in self.balancer.report().choices[-1].candidates}


def lay(*names: str, accuracy: Sequence[float] = (), weights: Weights = EVEN) -> Table:
    clock = Clock()
    players = [Player(name, clock) for name in names]
    members = [Member(one, accuracy[at] if accuracy else 0.5) for at, one in enumerate(players)]
    return Table(clock, players, Balancer(members, weights, PROBE_SECONDS, clock))


async def take(generator: Balanced, prompt: Prompt = ASK) -> list[Delta]:
    async with aclosing(generator.stream(prompt)) as deltas:
        return [delta async for delta in deltas]


async def settle() -> None:
    """Let every task run until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run to the end, and see that no task is left."""

    async def guarded() -> None:
        await coroutine
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(guarded())


# Names


def test_several_members_of_one_name_are_one_model() -> None:
    assert lay("a", "b", "a").balancer.names() == ("a", "b")


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(NotFound, match="auto, a, b") as raised:
        lay("a", "b").balancer.generator("c")
    assert (raised.value.code, raised.value.pointer) == ("model_not_found", "/model")


def test_the_list_of_names_and_the_name_asked_for_are_bounded() -> None:
    with pytest.raises(NotFound, match="and 480 more") as raised:
        lay(*(f"model-{n}" for n in range(500))).balancer.generator("x" * 10_000)
    assert len(raised.value.message) < 600


def test_nobody_answers_where_there_is_nobody() -> None:
    with pytest.raises(NotFound):
        Balancer([], EVEN, PROBE_SECONDS).generator("auto")


def test_a_name_is_answered_by_its_members_and_auto_by_all() -> None:
    async def go() -> None:
        table = lay("a", "b", "a")
        for _ in range(6):
            await take(table.balancer.generator("a"))
        assert set(table.chosen()) == {0, 2}
        await take(table.balancer.generator("auto"))
        assert table.chosen()[-1] == 1  # never asked yet

    run(go())


def test_who_is_not_in_auto_answers_by_name_and_for_auto_only_alone() -> None:
    async def go() -> None:
        clock = Clock()
        a, b = Player("a", clock), Player("b", clock)
        balancer = Balancer([Member(a, 0.9, in_auto=False), Member(b, 0.1)], EVEN, PROBE_SECONDS, clock)
        for asked, chosen in (("auto", "b"), ("a", "a"), ("auto", "b")):
            await take(balancer.generator(asked))
            assert balancer.report().choices[-1].chosen == chosen
        alone = Balancer([Member(a, 0.9, in_auto=False)], EVEN, PROBE_SECONDS, clock)
        await take(alone.generator("auto"))
        assert alone.report().choices[-1].chosen == "a"

    run(go())


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 1e300])
def test_a_weight_that_means_nothing_is_refused(bad: float) -> None:
    with pytest.raises(InvalidRequest, match="throughput"):
        Weights(1, bad, 1)


# Pictures


def test_pictures_go_only_where_they_are_seen() -> None:
    async def go() -> None:
        table = lay("a", "b", "a", accuracy=(1.0, 0.1, 0.2))
        table.players[1].sees_images = True
        assert table.balancer.generator("auto").sees_images
        assert not table.balancer.generator("a").sees_images
        for _ in range(4):
            await take(table.balancer.generator("auto"), SHOW)
        assert set(table.chosen()) == {1}
        table.players[1].after = [Unavailable("gone")]
        with pytest.raises(Unavailable):
            await take(table.balancer.generator("auto"), SHOW)
        assert [one.asked for one in table.players] == [0, 6, 0]

    run(go())


def test_pictures_that_nobody_sees_are_refused_by_name_of_the_setting() -> None:
    async def go() -> None:
        table = lay("a")
        generator = table.balancer.generator("a")
        for ask in (lambda: take(generator, SHOW), lambda: generator.complete(SHOW)):
            with pytest.raises(InvalidRequest, match=r"images: true.*models\.served") as raised:
                await ask()
            assert (raised.value.code, raised.value.pointer) == ("images_not_supported", "/messages")
        assert table.players[0].asked == 0

    run(go())


# Scores


async def measure(table: Table, *scripts: list[Step]) -> None:
    """Let each member play one script, asked for by its own name."""
    for player, script in zip(table.players, scripts, strict=True):
        player.scripts = [script]
        await take(table.balancer.generator(player.name))
    table.clock.now += 1.0


SLOW_MUCH: list[Step] = [2.0, Delta("a"), 0.1, Delta("b"), END]  # 2 s, 10/s
FAST_LITTLE: list[Step] = [0.5, Delta("a"), 1.0, Delta("b"), END]  # 0.5 s, 1/s


@pytest.mark.parametrize(
    "weights, wanted", [(FAST, 1), (MUCH, 0), (WISE, 2), (Weights(0, 5, 1), 0), (Weights(0, 1, 5), 2)]
)
def test_what_is_weighed_decides(weights: Weights, wanted: int) -> None:
    async def go() -> None:
        table = lay("a", "b", "c", accuracy=(0.4, 0.2, 0.8))
        await measure(table, SLOW_MUCH, FAST_LITTLE, [3.0, Delta("a"), 2.0, Delta("b"), END])
        await take(table.balancer.generator("auto", weights))
        assert table.chosen()[-1] == wanted

    run(go())


def test_parts_are_ratios_to_the_best_candidate() -> None:
    async def go() -> None:
        table = lay("a", "b", accuracy=(0.4, 0.2))
        await measure(table, SLOW_MUCH, FAST_LITTLE)
        await take(table.balancer.generator("auto", Weights(2, 1, 1)))
        a, b = table.last()[0], table.last()[1]
        assert (a.latency, a.throughput, a.accuracy) == pytest.approx((0.25, 1.0, 1.0), rel=0.01)
        assert (b.latency, b.throughput, b.accuracy) == pytest.approx((1.0, 0.1, 0.5), rel=0.01)
        assert (a.score, b.score) == pytest.approx(((0.5 + 1 + 1) / 4, (2 + 0.1 + 0.5) / 4), rel=0.01)

    run(go())


def test_the_installations_weights_count_where_the_caller_gives_none() -> None:
    async def go() -> None:
        table = lay("a", "b", weights=MUCH)
        await measure(table, FAST_LITTLE, SLOW_MUCH)
        await take(table.balancer.generator("auto"))
        assert table.chosen()[-1] == 1

    run(go())


def test_a_named_model_does_not_weigh_accuracy() -> None:
    async def go() -> None:
        table = lay("a", "a", accuracy=(0.1, 0.9), weights=Weights(1, 0, 100))
        table.players[0].scripts, table.players[1].scripts = [FAST_LITTLE], [SLOW_MUCH]
        for _ in range(2):
            await take(table.balancer.generator("a"))
        table.players[0].after, table.players[1].after = FAST_LITTLE, SLOW_MUCH
        await take(table.balancer.generator("a"))
        assert table.chosen() == [0, 1, 0]

    run(go())


def test_each_is_tried_before_figures_decide_and_equals_go_in_order() -> None:
    async def go() -> None:
        table = lay("a", "b", "c", accuracy=(0.9, 0.9, 0.1))
        for _ in range(3):
            await take(table.balancer.generator("auto"))
        assert table.chosen() == [0, 1, 2]

    run(go())


def test_who_asks_for_accuracy_alone_is_no_explorer() -> None:
    async def go() -> None:
        table = lay("a", "b", accuracy=(0.1, 0.9))
        for _ in range(3):
            await take(table.balancer.generator("auto", WISE))
        assert table.chosen() == [1, 1, 1]

    run(go())


def test_load_moves_requests_to_the_slower_one() -> None:
    async def go() -> None:
        table = lay("a", "b", weights=FAST)
        await measure(table, [1.0, *SAID], [2.5, *SAID])
        hold = asyncio.Event()
        for player in table.players:
            player.after = [hold, *SAID]
        asking = [asyncio.create_task(take(table.balancer.generator("auto"))) for _ in range(4)]
        await settle()
        assert table.chosen()[2:] == [0, 0, 1, 0]  # expecting 1, 2, 2.5 (for 3), 3 (for 5) seconds
        assert [one.in_flight for one in table.balancer.report().members] == [3, 1]
        hold.set()
        await asyncio.gather(*asking)
        assert [one.in_flight for one in table.balancer.report().members] == [0, 0]

    run(go())


def test_a_burst_on_unknown_members_is_spread() -> None:
    async def go() -> None:
        table = lay("a", "a", "a", "a")
        hold = asyncio.Event()
        for player in table.players:
            player.after = [hold, *SAID]
        asking = [asyncio.create_task(take(table.balancer.generator("a"))) for _ in range(8)]
        await settle()
        assert [one.in_flight for one in table.balancer.report().members] == [2, 2, 2, 2]
        hold.set()
        await asyncio.gather(*asking)

    run(go())


def test_averages_move_towards_what_is_seen() -> None:
    async def go() -> None:
        table = lay("a")
        table.players[0].scripts = [[1.0, Delta("x"), 1.0, Delta("y"), END], [2.0, Delta("x"), 0.5, Delta("y"), END]]
        for _ in range(2):
            await take(table.balancer.generator("a"))
        (member,) = table.balancer.report().members
        assert member.first_token_seconds == pytest.approx(1.2)
        assert member.tokens_per_second == pytest.approx(1.2)

    run(go())


def test_a_backend_that_counts_its_tokens_is_believed() -> None:
    async def go() -> None:
        table = lay("a")
        table.players[0].after = [Delta("x"), 2.0, Delta("many words"), END, Delta(usage=Usage(9, 101))]
        await take(table.balancer.generator("a"))
        assert table.balancer.report().members[0].tokens_per_second == pytest.approx(50.0)

    run(go())


def test_one_bad_moment_is_not_for_ever() -> None:
    async def go() -> None:
        table = lay("a", "b", weights=FAST)
        await measure(table, [64.0, *SAID], [1.0, *SAID])
        table.players[1].after = [1.0, *SAID]
        generator = table.balancer.generator("auto")
        for _ in range(5):  # in which a's 64 fall to about 2
            table.clock.now += HALF_LIFE_SECONDS
            await take(generator)
        assert set(table.chosen()[2:]) == {1}
        table.clock.now += HALF_LIFE_SECONDS
        await take(generator)
        await take(generator)
        assert 0 in table.chosen()[-2:]

    run(go())


def test_extremes_of_time_are_borne() -> None:
    async def go() -> None:
        table = lay("a", "b")
        await measure(table, [1e9, Delta("x"), 1e9, Delta("y"), END], list(SAID))
        table.clock.now += 1e12
        await take(table.balancer.generator("auto"))
        assert all(0 <= one.score <= 1 for one in table.last().values())

    run(go())


# Failures


@pytest.mark.parametrize(
    "error", [Unavailable("x"), UpstreamInvalid("x"), TimeoutError()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("before", [[], [Delta("half")]], ids=["at once", "in the middle"])
def test_who_yields_no_token_is_ejected(error: Exception, before: list[Step]) -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].scripts = [[*before, error]]
        generator = table.balancer.generator("a")
        if before:
            with pytest.raises(UpstreamInvalid if isinstance(error, UpstreamInvalid) else Unavailable):
                await take(generator)
        else:
            assert await take(generator) == SAID
        table.clock.now += PROBE_SECONDS - 0.1
        for _ in range(5):
            await take(generator)
        assert set(table.chosen()[1:]) == {1}
        first = table.balancer.report().members[0]
        assert (first.ejected_since, first.failures, first.requests) == (1000.0, 1, 1)
        assert first.success_rate == pytest.approx(0.8)
        assert table.players[0].checks == []

    run(go())


def test_an_overload_counts_but_does_not_eject() -> None:
    async def go() -> None:
        table = lay("a", "b", weights=FAST)
        await measure(table, [1.0, *SAID], [1.05, *SAID])
        table.players[0].scripts = [[Overloaded("full")]]
        table.players[1].after = [1.05, *SAID]
        assert await take(table.balancer.generator("auto")) == SAID
        report = table.balancer.report()
        assert [(one.member, one.outcome, one.retried) for one in report.choices[2:]] == [
            (0, "overloaded", False),
            (1, "finished", True),
        ]
        assert (report.members[0].ejected_since, report.members[0].failures) == (None, 1)
        await take(table.balancer.generator("auto"))
        assert table.chosen()[-1] == 1  # which is the slower one
        assert table.last()[0].success_rate == pytest.approx(0.8, abs=0.01)

    run(go())


def test_what_the_caller_did_wrong_counts_nowhere_and_is_not_tried_again() -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].after = table.players[1].after = [InvalidRequest("too long")]
        with pytest.raises(InvalidRequest):
            await take(table.balancer.generator("a"))
        report = table.balancer.report()
        assert [(one.member, one.outcome) for one in report.choices] == [(0, "refused")]
        assert (report.members[0].ejected_since, report.members[0].failures, report.members[0].success_rate) == (
            None,
            0,
            1,
        )

    run(go())


def test_a_fault_of_our_own_is_counted_and_neither_tried_again_nor_a_reason_to_eject() -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].scripts = [[KeyError("bug")]]
        with pytest.raises(KeyError):
            await take(table.balancer.generator("a"))
        first = table.balancer.report().members[0]
        assert (table.players[1].asked, first.ejected_since, first.failures, first.in_flight) == (0, None, 1, 0)

    run(go())


@pytest.mark.parametrize("script", [[], [Delta("half a sen")]], ids=["nothing", "no end"])
def test_an_end_without_a_reason_is_no_end(script: list[Step]) -> None:
    async def go() -> None:
        table = lay("a")
        table.players[0].after = script
        with pytest.raises(UpstreamInvalid, match="'a'"):
            await take(table.balancer.generator("a"))
        assert table.balancer.report().members[0].failures == (1 if script else 2)

    run(go())


def test_the_only_one_is_asked_though_ejected_and_is_back_with_its_first_token() -> None:
    async def go() -> None:
        table = lay("a")
        table.players[0].scripts = [[Unavailable("x")], [Unavailable("x")]]
        generator = table.balancer.generator("a")
        with pytest.raises(Unavailable):
            await take(generator)
        assert table.balancer.report().members[0].ejected_since == 1000.0
        async with aclosing(generator.stream(ASK)) as deltas:
            await anext(deltas)
            assert table.balancer.report().members[0].ejected_since is None
        assert table.players[0].checks == []  # the request was the probe

    run(go())


def test_the_longest_absence_is_told() -> None:
    async def go() -> None:
        table = lay("a")
        table.players[0].after = [1.0, Unavailable("x")]
        for _ in range(3):
            with pytest.raises(Unavailable):
                await take(table.balancer.generator("a"))
        assert table.balancer.report().members[0].ejected_since == 1001.0

    run(go())


# Probes


async def eject_first(table: Table) -> Balanced:
    table.players[0].scripts = [[Unavailable("x")]]
    generator = table.balancer.generator("a")
    await take(generator)
    assert table.balancer.report().members[0].ejected_since is not None
    return generator


def test_a_probe_that_passes_readmits() -> None:
    async def go() -> None:
        table = lay("a", "a")
        generator = await eject_first(table)
        table.clock.now += PROBE_SECONDS
        await take(generator)
        await settle()
        assert table.players[0].checks == [1005.0]
        assert table.balancer.report().members[0].ejected_since is None
        table.players[1].after = [Unavailable("x")]
        assert await take(generator) == SAID

    run(go())


@pytest.mark.parametrize("error", [Unavailable("x"), TimeoutError(), ConnectionResetError()])
def test_a_probe_that_fails_is_not_repeated_before_its_time(error: Exception) -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].health = [error]
        generator = await eject_first(table)
        for _ in range(40):
            table.clock.now += 1.0
            await take(generator)
            await settle()
        assert table.players[0].checks == [1000.0 + 5 * n for n in range(1, 9)]
        assert set(table.chosen()[1:]) == {1}

    run(go())


def test_no_request_waits_for_a_probe_and_closing_ends_it() -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].health = [asyncio.Event()]
        generator = await eject_first(table)
        table.clock.now += PROBE_SECONDS
        for _ in range(3):
            assert await take(generator) == SAID
            table.clock.now += PROBE_SECONDS
        await settle()
        assert len(table.players[0].checks) == 1  # it still runs: no second one
        assert len(asyncio.all_tasks()) == 2
        await table.balancer.close()
        assert len(asyncio.all_tasks()) == 1
        assert await take(generator) == SAID
        await settle()
        assert len(table.players[0].checks) == 1

    run(go())


def test_only_whoever_is_asked_for_is_probed() -> None:
    async def go() -> None:
        table = lay("a", "a", "b")
        await eject_first(table)
        table.clock.now += PROBE_SECONDS
        await take(table.balancer.generator("b"))
        await settle()
        assert table.players[0].checks == []

    run(go())


def test_a_check_of_the_whole_asks_the_healthy_first_and_the_ejected_when_they_are_due() -> None:
    async def go() -> None:
        table = lay("a", "a")
        generator = await eject_first(table)
        await generator.check()
        assert (len(table.players[0].checks), len(table.players[1].checks)) == (0, 1)
        table.players[1].health = [Unavailable("x")]
        with pytest.raises(Unavailable, match="'a'"):
            await generator.check()
        assert table.players[0].checks == []
        table.clock.now += PROBE_SECONDS
        await generator.check()
        assert table.balancer.report().members[0].ejected_since is None

    run(go())


# Machines


async def spread_out(*places: str, names: Sequence[str] = ("a",)) -> Table:
    """Members of these names on each of the machines, which have all been met."""
    clock = Clock()
    players = [Player(name, clock) for name in names for _ in places]
    members = [Member(one, 0.5, place=place) for one, place in zip(players, places * len(names), strict=True)]
    table = Table(clock, players, Balancer(members, EVEN, PROBE_SECONDS, clock))
    for name in names:
        await take(table.balancer.generator(name))
    await settle()
    return table


def turn(session: str, tenant: str = "t") -> Prompt:
    return replace(ASK, session=session, tenant=tenant)


async def homes(table: Table, sessions: Sequence[str], model: str = "a", tenant: str = "t") -> dict[str, str]:
    """The machine that answers for each session."""
    found = {}
    for session in sessions:
        await take(table.balancer.generator(model), turn(session, tenant))
        found[session] = where(table)
    return found


def where(table: Table) -> str:
    report = table.balancer.report()
    return report.members[report.choices[-1].member].place


SESSIONS = [f"session {n}" for n in range(60)]


def test_a_session_stays_on_its_machine_and_sessions_are_spread() -> None:
    async def go() -> None:
        table = await spread_out("sark", "clu", "third")
        first = await homes(table, SESSIONS)
        table.players[0].after = [3.0, *SAID]  # slower: what the scores would say
        assert await homes(table, SESSIONS) == first
        assert all(10 <= count <= 30 for count in Counter(first.values()).values()) and len(set(first.values())) == 3
        report = table.balancer.report()
        assert all(choice.by_session for choice in report.choices[-20:])
        assert {candidate.place for candidate in report.choices[-1].candidates} == {"sark", "clu", "third"}

    run(go())


def test_who_comes_or_goes_moves_only_its_own_sessions_and_the_order_of_the_settings_moves_none() -> None:
    async def go() -> None:
        before = await homes(await spread_out("sark", "clu", "third"), SESSIONS)
        after = await homes(await spread_out("third", "clu"), SESSIONS)
        moved = {session for session in SESSIONS if before[session] != after[session]}
        assert moved == {session for session in SESSIONS if before[session] == "sark"}
        assert Counter(after[session] for session in moved).keys() == {"third", "clu"}

    run(go())


def test_tenants_share_no_session() -> None:
    async def go() -> None:
        table = await spread_out("sark", "clu")
        assert await homes(table, SESSIONS) != await homes(table, SESSIONS, tenant="another")

    run(go())


def test_members_that_are_on_no_machine_in_particular_keep_their_sessions_too() -> None:
    async def go() -> None:
        table = lay("a", "a")
        for session in SESSIONS[:12] * 2:
            await take(table.balancer.generator("a"), turn(session))
        assert table.chosen()[:12] == table.chosen()[12:] and set(table.chosen()) == {0, 1}

    run(go())


@pytest.mark.parametrize("model, prompt", [("auto", turn("session 1")), ("a", ASK)], ids=["auto", "no session"])
def test_only_a_session_that_asks_for_a_name_has_a_machine(model: str, prompt: Prompt) -> None:
    async def go() -> None:
        table = await spread_out("sark", "clu")
        seen = set()
        for slow, quick in ((0, 1), (1, 0)):
            table.players[slow].after, table.players[quick].after = [9.0, *SAID], [0.1, *SAID]
            for _ in range(8):
                await take(table.balancer.generator(model), prompt)
            seen.add(where(table))
        assert seen == {"sark", "clu"}
        assert not any(choice.by_session for choice in table.balancer.report().choices)

    run(go())


def test_a_session_whose_machine_is_away_has_another_for_as_long() -> None:
    async def go() -> None:
        table = await spread_out("sark", "clu", "third")
        before = await homes(table, SESSIONS)
        table.players[0].after, table.players[0].health = [Unavailable("x")], [Unavailable("x")]
        during = await homes(table, SESSIONS)
        assert {session for session in SESSIONS if during[session] != before[session]} == {
            session for session in SESSIONS if before[session] == "sark"
        }
        assert table.players[0].running == 0 and "sark" not in during.values()
        table.players[0].after, table.players[0].health = list(SAID), []
        table.clock.now += PROBE_SECONDS
        await take(table.balancer.generator("a"))
        await settle()
        assert await homes(table, SESSIONS) == before

    run(go())


def test_a_machine_with_far_more_to_do_than_another_gives_a_session_away() -> None:
    async def go() -> None:
        table = await spread_out("sark", "clu")
        home = (await homes(table, ["busy"]))["busy"]
        hold = asyncio.Event()
        for player in table.players:
            player.after = [hold, *SAID]
        asking = []
        for held in range(2 * SPARE_LOAD):
            asking.append(asyncio.create_task(take(table.balancer.generator("a"), turn("busy"))))
            await settle()
            assert (where(table) == home) == (held <= SPARE_LOAD)
            assert table.balancer.report().choices[-1].by_session == (held <= SPARE_LOAD)
            if held > SPARE_LOAD:  # it is elsewhere for once: what it has there is taken away
                asking.pop().cancel()
                await settle()
        elsewhere = next(member for member in table.balancer.report().members if member.place != home)
        assert elsewhere.in_flight == 0
        others = [asyncio.create_task(take(table.balancer.generator("a"))) for _ in range(2)]
        await settle()
        assert next(one for one in table.balancer.report().members if one.place != home).in_flight == 2
        for held in range(SPARE_LOAD + 1, 2 * MOST_LOAD + SPARE_LOAD + 1):
            asking.append(asyncio.create_task(take(table.balancer.generator("a"), turn("busy"))))
            await settle()
            assert where(table) == home, held
        hold.set()
        await asyncio.gather(*asking, *others)

    run(go())


def test_a_machine_is_asked_once_it_has_passed_its_check_and_who_asks_first_waits_for_one() -> None:
    async def go() -> None:
        clock, opened = Clock(), asyncio.Event()
        sark, clu = Player("a", clock, health=[asyncio.Event()]), Player("a", clock, health=[opened])
        balancer = Balancer(
            [Member(sark, 0.5, place="sark"), Member(clu, 0.5, place="clu")], EVEN, PROBE_SECONDS, clock
        )
        asking = [asyncio.create_task(take(balancer.generator("a"))) for _ in range(3)]
        await settle()
        assert (sark.asked, clu.asked, len(sark.checks), len(clu.checks)) == (0, 0, 1, 1)
        opened.set()
        await settle()
        assert all(one.done() for one in asking) and (sark.asked, clu.asked) == (0, 3)
        await take(balancer.generator("a"))
        assert (sark.asked, len(sark.checks), len(clu.checks)) == (0, 1, 1)
        await balancer.close()

    run(go())


def test_where_no_machine_passes_its_check_who_asks_is_told_so() -> None:
    async def go() -> None:
        clock, away = Clock(), Unavailable("x")
        players = [Player("a", clock, after=[away], health=[away]) for _ in range(2)]
        members = [Member(one, 0.5, place=place) for one, place in zip(players, ("sark", "clu"), strict=True)]
        balancer = Balancer(members, EVEN, PROBE_SECONDS, clock)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await take(balancer.generator("a"))
        assert [len(one.checks) for one in players] == [1, 1]
        clock.now += PROBE_SECONDS
        with pytest.raises(Unavailable):
            await take(balancer.generator("a"))
        await settle()
        assert sum(len(one.checks) for one in players) == 3  # who was met once is asked instead of waited for

    run(go())


def test_who_waits_for_a_machine_does_not_outwait_the_balancer() -> None:
    async def go() -> None:
        clock = Clock()
        sark = Player("a", clock, health=[asyncio.Event()])
        balancer = Balancer([Member(sark, 0.5, place="sark")], EVEN, PROBE_SECONDS, clock)
        asking = asyncio.create_task(take(balancer.generator("a")))
        await settle()
        await balancer.close()
        assert await asking == SAID

    run(go())


def test_who_is_not_planned_is_neither_asked_nor_probed_where_another_is() -> None:
    async def go() -> None:
        clock, opened, planned = Clock(), asyncio.Event(), {"sark", "clu"}
        players = [Player("a", clock), Player("a", clock)]
        members = [
            Member(one, 0.5, place=place, is_planned=lambda place=place: place in planned)  # type: ignore[misc]
            for one, place in zip(players, ("sark", "clu"), strict=True)
        ]
        balancer = Balancer(members, EVEN, PROBE_SECONDS, clock)
        planned -= {"sark"}
        for session in ("", *SESSIONS[:20]):
            await take(balancer.generator("a"), turn(session))
        await settle()
        assert (players[0].asked, players[0].checks, players[1].asked) == (0, [], 21)
        planned.clear()
        planned.add("sark")
        players[0].health = [opened]
        for _ in range(2):  # sark is not there yet
            await take(balancer.generator("a"))
        await settle()
        assert (players[0].asked, len(players[0].checks), players[1].asked) == (0, 1, 23)
        opened.set()
        await settle()
        for session in SESSIONS[:20]:
            await take(balancer.generator("a"), turn(session))
        assert (players[0].asked, players[1].asked) == (20, 23)
        planned.clear()
        players[0].after = [Unavailable("x")]
        assert await take(balancer.generator("a")) == SAID
        await balancer.close()

    run(go())


# Second attempts


RETRIED = [Unavailable("x"), Overloaded("x"), UpstreamInvalid("x")]


@pytest.mark.parametrize("error", RETRIED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("names", [("a",), ("a", "a"), ("a", "a", "a")], ids=len)
def test_a_second_attempt_goes_elsewhere_where_there_is_an_elsewhere_and_is_the_last(
    error: NexusError, names: tuple[str, ...]
) -> None:
    async def go() -> None:
        table = lay(*names)
        for player in table.players:
            player.after = [error]
        with pytest.raises(type(error)):
            await take(table.balancer.generator("a"))
        assert [one.asked for one in table.players] == {1: [2], 2: [1, 1], 3: [1, 1, 0]}[len(names)]
        with pytest.raises(type(error)):
            await table.balancer.generator("a").complete(ASK)
        assert sum(one.asked for one in table.players) == 4
        assert [one.retried for one in table.balancer.report().choices] == [False, True] * 2

    run(go())


@pytest.mark.parametrize("whole", [False, True])
def test_the_second_error_is_the_one_that_is_told(whole: bool) -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].after, table.players[1].after = [Unavailable("first")], [Overloaded("second")]
        generator = table.balancer.generator("a")
        with pytest.raises(Overloaded, match="second"):
            await (generator.complete(ASK) if whole else take(generator))

    run(go())


def test_a_second_attempt_may_be_refused() -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].after, table.players[1].after = [Unavailable("x")], [InvalidRequest("too long for this one")]
        with pytest.raises(InvalidRequest):
            await take(table.balancer.generator("a"))

    run(go())


def test_an_ejected_elsewhere_is_worse_than_an_overloaded_here() -> None:
    async def go() -> None:
        table = lay("a", "a")
        generator = await eject_first(table)
        table.players[1].scripts = [[Overloaded("x")]]
        assert await take(generator) == SAID
        assert [one.asked for one in table.players] == [1, 3]

    run(go())


def test_after_the_first_delta_an_error_is_an_error() -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].scripts = [[Delta("half"), Unavailable("x")]]
        seen = []
        with pytest.raises(Unavailable):
            async for delta in table.balancer.generator("a").stream(ASK):
                seen.append(delta)
        assert (seen, table.players[1].asked) == ([Delta("half")], 0)

    run(go())


def test_who_wants_the_whole_gets_it_whole_from_elsewhere() -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].scripts = [[Delta("half"), Unavailable("x")]]
        assert await table.balancer.generator("a").complete(ASK) == SAID
        assert [one.asked for one in table.players] == [1, 1]

    run(go())


# Leaving


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_closing_frees_the_place_before_the_backend_has_cleaned_up(taken: int) -> None:
    async def go() -> None:
        table = lay("a", "a")
        in_flight: list[int] = []
        table.players[0].on_close = lambda: in_flight.append(table.balancer.report().members[0].in_flight)
        deltas = table.balancer.generator("a").stream(ASK)
        for _ in range(taken):
            await anext(deltas)
        assert (table.players[0].running, table.balancer.report().members[0].in_flight) == (1, 1)
        await deltas.aclose()
        report = table.balancer.report()
        assert (in_flight, table.players[0].running, report.choices[0].outcome) == ([0], 0, "left")
        assert (report.members[0].failures, report.members[0].ejected_since) == (0, None)
        assert table.players[1].asked == 0

    run(go())


def test_what_the_backend_says_while_it_is_closed_is_not_its_failure() -> None:
    async def go() -> None:
        table = lay("a")

        def complain() -> None:
            raise Unavailable("already gone")

        table.players[0].on_close = complain
        deltas = table.balancer.generator("a").stream(ASK)
        await anext(deltas)
        with pytest.raises(Unavailable):
            await deltas.aclose()
        (member,) = table.balancer.report().members
        assert (member.failures, member.ejected_since, member.in_flight, member.requests) == (0, None, 0, 1)

    run(go())


@pytest.mark.parametrize("whole", [False, True])
def test_a_cancelled_request_counts_neither_way(whole: bool) -> None:
    async def go() -> None:
        table = lay("a", "a")
        table.players[0].after = [asyncio.Event()]
        generator = table.balancer.generator("a")
        asking = asyncio.create_task(generator.complete(ASK) if whole else take(generator))
        await settle()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        report = table.balancer.report()
        assert (table.players[0].running, report.members[0].in_flight, report.choices[0].outcome) == (0, 0, "left")
        assert (report.members[0].failures, report.members[0].success_rate, table.players[1].asked) == (0, 1.0, 0)

    run(go())


def test_a_generation_that_nobody_began_to_take_chooses_nobody() -> None:
    async def go() -> None:
        table = lay("a")
        await table.balancer.generator("a").stream(ASK).aclose()
        assert table.balancer.report().choices == ()
        assert table.players[0].asked == 0

    run(go())


# The report


def test_the_report_holds_the_last_choices_and_nothing_of_the_prompt() -> None:
    async def go() -> None:
        table = lay("a", "b", accuracy=(0.3, 0.7))
        for _ in range(60):
            table.clock.now += 1.0
            await take(table.balancer.generator("auto"))
        report = table.balancer.report()
        assert [choice.at for choice in report.choices] == [1011.0 + n for n in range(50)]
        assert report.now == 1060.0
        assert {(one.name, one.accuracy) for one in report.members} == {("a", 0.3), ("b", 0.7)}
        assert sum(one.requests for one in report.members) == 60
        latest = report.choices[-1]
        assert (latest.asked, latest.weights, latest.outcome) == ("auto", EVEN, "finished")
        assert latest.chosen == report.members[latest.member].name == latest.candidates[0].name
        assert "secret" not in repr(report)
        with pytest.raises(FrozenInstanceError):
            latest.outcome = "failed"  # type: ignore[misc]

    run(go())


def test_a_report_is_of_its_moment() -> None:
    async def go() -> None:
        table = lay("a")
        deltas = table.balancer.generator("a").stream(ASK)
        await anext(deltas)
        report = table.balancer.report()
        await deltas.aclose()
        assert (report.choices[0].outcome, report.members[0].in_flight) == ("running", 1)

    run(go())


# Anything in any order

errors = some.sampled_from(
    [Unavailable("x"), Overloaded("x"), UpstreamInvalid("x"), TimeoutError(), InvalidRequest("x")]
)
scripts = some.lists(some.sampled_from([Delta("x"), 0.1, 2.0]), max_size=4).flatmap(
    lambda steps: some.one_of(errors, some.just(END)).map(lambda last: [*steps, last])
)
acts = some.one_of(
    some.tuples(some.just("open"), some.sampled_from(["a", "b", "auto"])),
    some.tuples(some.sampled_from(["step", "step", "step", "drop", "drain"]), some.integers(0, 7)),
    some.tuples(some.just("wait"), some.sampled_from([0.5, 3.0, 6.0])),
)


class Watched(Player):
    """A player that notes when it is asked while another, able one is not ejected."""

    table: Table
    faults: list[str]

    def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        report = self.table.balancer.report()
        choice = report.choices[-1]
        me = report.members[choice.member]
        able = [one for one in report.members if choice.asked in ("auto", one.name)]
        if me.ejected_since is not None and any(one.ejected_since is None for one in able):
            self.faults.append(f"{choice} while ejected")
        return super().stream(prompt)


@settings(max_examples=80, deadline=None)
@given(some.lists(some.lists(scripts, max_size=5), min_size=4, max_size=4), some.lists(acts, max_size=40), some.data())
def test_whatever_happens_places_return_and_nobody_is_asked_twice_too_often(
    plans: list[list[list[Step]]], todo: list[tuple[str, Any]], data: some.DataObject
) -> None:
    async def go() -> None:
        clock, faults = Clock(), []
        names = ("a", "a", "b", "b")
        sick = some.sampled_from([[], [Unavailable("x")]])
        players = [Watched(name, clock, plan, health=data.draw(sick)) for name, plan in zip(names, plans, strict=True)]
        table = Table(clock, players, Balancer([Member(one, 0.5) for one in players], EVEN, PROBE_SECONDS, clock))
        for player in players:
            player.table, player.faults = table, faults
        open_streams: list[AsyncGenerator[Delta]] = []
        opened = 0
        for verb, value in todo:
            if verb == "wait":
                clock.now += value
            elif verb == "open":
                open_streams.append(table.balancer.generator(value).stream(ASK))
                opened += 1
            elif open_streams:
                stream = open_streams[value % len(open_streams)]
                asked = sum(one.asked for one in players)
                await act(verb, stream, open_streams)
                assert sum(one.asked for one in players) - asked <= 2
            await settle()
            assert sum(one.in_flight for one in table.balancer.report().members) == sum(p.running for p in players)
        for stream in open_streams:
            await stream.aclose()
        await table.balancer.close()
        report = table.balancer.report()
        assert [one.in_flight for one in report.members] == [0, 0, 0, 0] == [one.running for one in players]
        assert sum(one.asked for one in players) <= 2 * opened
        assert "running" not in {choice.outcome for choice in report.choices}
        assert faults == []
        for player in players:
            assert all(b - a >= PROBE_SECONDS for a, b in zip(player.checks, player.checks[1:], strict=False))

    run(go())


async def act(verb: str, stream: AsyncGenerator[Delta], open_streams: list[AsyncGenerator[Delta]]) -> None:
    try:
        if verb == "step":
            await anext(stream)
        elif verb == "drain":
            async for _ in stream:
                pass
            raise StopAsyncIteration
        else:
            await stream.aclose()
            raise StopAsyncIteration
    except (NexusError, StopAsyncIteration):
        open_streams.remove(stream)
