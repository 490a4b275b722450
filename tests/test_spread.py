"""Deployments of one model on several machines as one: who is asked, who else, and when. Time is played."""

import asyncio
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from ray.exceptions import ActorDiedError, ObjectLostError

from nexus.errors import InvalidRequest, NexusError, Overloaded, Unavailable, UpstreamInvalid
from tests import voting

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `ray.serve` uses what pydantic will remove
    from deployments.remote import HEDGE_SECONDS, PROBE_SECONDS, Remote, RemoteEmbedder, Spread, translated

AWAY, FULL, WRONG = Unavailable("away"), Overloaded("full"), InvalidRequest("nonsense")
NEVER = None


@dataclass(eq=False)
class Machine:
    """It answers with its name after so many seconds, or never, or with an error, and in turn so to each call."""

    name: str
    answers: list[float | Exception | None] = field(default_factory=list)
    usual: float | Exception | None = 0.01
    health: float | Exception | None = 0.0
    asked: list[float] = field(default_factory=list)
    checked: list[float] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    cancelled: int = 0

    async def embed(self, *texts: str) -> str:
        self.asked.append(now())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await take(self.answers.pop(0) if self.answers else self.usual)
            return " ".join((self.name, *texts))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def ready(self) -> bool:
        self.checked.append(now())
        await take(self.health)
        return True


async def take(answer: float | Exception | None) -> None:
    if isinstance(answer, Exception):
        raise answer
    if answer is NEVER:
        await asyncio.get_running_loop().create_future()
    else:
        await asyncio.sleep(answer)


async def settle() -> None:
    """Let what was cancelled end."""
    for _ in range(5):
        await asyncio.sleep(0)


def now() -> float:
    return asyncio.get_running_loop().time()


def spread(*machines: Machine) -> Spread:
    return Spread({machine.name: machine for machine in machines})


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In a loop whose clock jumps to whatever is next; see that no call is left anywhere."""

    async def guarded() -> None:
        await main()
        await asyncio.sleep(PROBE_SECONDS)  # what probes there are end
        assert asyncio.all_tasks() == {asyncio.current_task()}

    voting.run(guarded)


# Whom


def test_one_after_another_where_nothing_else_counts() -> None:
    async def main() -> None:
        sark, clu, third = Machine("sark"), Machine("clu"), Machine("third")
        pool = spread(sark, clu, third)
        answers = [await pool.embed("a", "b") for _ in range(6)]
        assert answers == ["sark a b", "clu a b", "third a b"] * 2

    run(main)


def test_whoever_has_the_fewest_in_flight() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", usual=3.0), Machine("clu", usual=1.0)
        pool = spread(sark, clu)
        busy = [asyncio.create_task(pool.embed()) for _ in range(4)]
        await asyncio.sleep(1.5)  # clu has answered twice
        assert [await pool.embed(), await pool.embed()] == ["clu", "clu"]
        await asyncio.gather(*busy)
        assert (sark.most_running, clu.most_running) == (2, 2)

    run(main)


def test_a_call_that_is_given_up_is_given_up_there_and_counts_no_more() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", [4.0]), Machine("clu", usual=2.0)
        pool = spread(sark, clu)
        asking = asyncio.create_task(pool.embed())
        await asyncio.sleep(1)
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled() and (sark.cancelled, sark.running) == (1, 0)
        others = [asyncio.create_task(pool.embed()) for _ in range(2)]
        await asyncio.gather(*others)
        assert (len(sark.asked), len(clu.asked)) == (2, 1)

    run(main)


def test_who_is_not_planned_any_more_is_asked_only_until_another_can_be_and_never_probed() -> None:
    """A plan moves the model from clu to sark, where it starts; on the third machine it never was."""

    async def main() -> None:
        sark, clu, third = Machine("sark", usual=AWAY, health=AWAY), Machine("clu"), Machine("third", usual=NEVER)
        planned = {"clu"}
        pool = Spread({one.name: one for one in (sark, clu, third)}, planned.__contains__)
        assert {await pool.embed() for _ in range(5)} == {"clu"}
        planned.clear()
        planned.add("sark")
        assert {await pool.embed() for _ in range(5)} == {"clu"} and await pool.ready()
        assert (len(sark.asked), len(sark.checked)) == (1, 2)
        sark.usual, sark.health = 0.01, 0.01
        await asyncio.sleep(PROBE_SECONDS)
        assert await pool.embed() == "clu"  # and sark is probed
        await asyncio.sleep(1)
        assert {await pool.embed() for _ in range(5)} == {"sark"}
        clu.usual = AWAY
        sark.answers = [AWAY]
        with pytest.raises(Unavailable):
            await pool.embed()
        await asyncio.sleep(PROBE_SECONDS)
        await asyncio.gather(*(pool.embed() for _ in range(5)))
        assert (len(clu.asked), len(clu.checked)) == (12, 1) and third.asked == third.checked == []

    run(main)


def test_where_nobody_is_planned_all_are() -> None:
    async def main() -> None:
        machines = [Machine("sark"), Machine("clu")]
        pool = Spread({one.name: one for one in machines}, lambda name: False)
        assert [await pool.embed() for _ in range(2)] == ["sark", "clu"]

    run(main)


# Failures


@pytest.mark.parametrize("error", [AWAY, FULL], ids=lambda e: e.code)
def test_who_is_away_or_full_is_stood_in_for_by_each_of_the_others_once(error: NexusError) -> None:
    async def main() -> None:
        machines = [Machine(name, [error]) for name in ("sark", "clu", "third")]
        machines[2].answers = []
        assert await spread(*machines).embed("x") == "third x"
        assert [len(one.asked) for one in machines] == [1, 1, 1]

    run(main)


def test_where_all_fail_the_last_one_says_why() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", [AWAY]), Machine("clu", [FULL])
        with pytest.raises(Overloaded):
            await spread(sark, clu).embed()
        assert (len(sark.asked), len(clu.asked)) == (1, 1)

    run(main)


@pytest.mark.parametrize("error", [WRONG, UpstreamInvalid("nonsense"), ValueError()], ids=lambda e: type(e).__name__)
def test_what_no_other_would_say_differently_is_raised_at_once(error: Exception) -> None:
    async def main() -> None:
        sark, clu = Machine("sark", [error]), Machine("clu")
        pool = spread(sark, clu)
        with pytest.raises(type(error)):
            await pool.embed()
        assert (clu.asked, sark.checked) == ([], [])
        await pool.embed()
        assert await pool.embed() == "sark"  # it is not aside

    run(main)


def test_who_is_full_is_not_aside() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", [FULL]), Machine("clu")
        pool = spread(sark, clu)
        answers = [await pool.embed() for _ in range(3)]
        assert answers == ["clu", "sark", "clu"]
        assert sark.checked == []

    run(main)


def test_who_failed_is_probed_now_and_then_and_only_asked_again_when_it_is_ready() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", usual=AWAY, health=AWAY), Machine("clu", usual=0.5)
        pool = spread(sark, clu)
        began = now()
        while now() < began + 10 * PROBE_SECONDS:
            assert await pool.embed() == "clu"
        assert len(sark.asked) == 1
        pauses = [later - earlier for earlier, later in zip(sark.checked, sark.checked[1:], strict=False)]
        assert len(sark.checked) == 10 and all(PROBE_SECONDS <= pause <= PROBE_SECONDS + 0.5 for pause in pauses)
        sark.usual, sark.health = 0.5, 0.2
        answers = [await pool.embed() for _ in range(2 * int(PROBE_SECONDS) + 3)]
        assert answers[0] == "clu" and answers[-2:] in (["sark", "clu"], ["clu", "sark"])
        checked = len(sark.checked)
        await asyncio.sleep(60)
        await pool.embed()
        assert len(sark.checked) == checked  # nobody probes who works

    run(main)


def test_a_probe_that_is_not_answered_ends_and_readmits_nobody() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", usual=AWAY, health=NEVER), Machine("clu", usual=0.5)
        pool = spread(sark, clu)
        for _ in range(4 * int(PROBE_SECONDS)):
            await pool.embed()
        assert (len(sark.asked), len(sark.checked)) == (1, 2)

    run(main)


def test_who_is_aside_is_asked_where_there_is_no_other_and_an_answer_is_as_good_as_a_probe() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", [AWAY], health=AWAY), Machine("clu", [0.01, AWAY], health=AWAY)
        pool = spread(sark, clu)
        assert [await pool.embed() for _ in range(2)] == ["clu", "sark"]
        assert await pool.embed() == "sark"
        assert len(clu.asked) == 2
        sark.usual = clu.usual = AWAY
        for _ in range(2):
            with pytest.raises(Unavailable):
                await pool.embed()
        assert (len(sark.asked), len(clu.asked)) == (5, 4)

    run(main)


# Silence


def test_who_is_silent_does_not_stop_who_asks() -> None:
    """Its machine was cut off: neither an answer nor an error ever comes."""

    async def main() -> None:
        sark, clu = Machine("sark", usual=NEVER, health=NEVER), Machine("clu", usual=0.5)
        pool = spread(sark, clu)
        began = now()
        assert await pool.embed() == "clu"
        assert now() - began == pytest.approx(HEDGE_SECONDS + 0.5)
        await settle()
        assert (sark.cancelled, sark.running) == (1, 0)
        for _ in range(20):
            assert await pool.embed() == "clu"
        assert now() - began == pytest.approx(HEDGE_SECONDS + 0.5 * 21)
        sark.usual, sark.health = 0.5, 0.0
        await asyncio.sleep(PROBE_SECONDS)
        assert "sark" in [await pool.embed() for _ in range(3)]

    run(main)


def test_who_waits_for_less_learns_from_others_who_did() -> None:
    """Nobody waits for it as long as it takes to be sure: all of them together do."""

    async def main() -> None:
        sark, clu = Machine("sark", usual=NEVER, health=NEVER), Machine("clu")
        pool, failed = spread(sark, clu), 0
        for _ in range(100):
            try:
                async with asyncio.timeout(0.5):
                    await pool.embed()
            except TimeoutError:
                failed += 1
        assert 1 <= failed <= HEDGE_SECONDS / 0.5 + 1

    run(main)


def test_who_is_slow_but_answers_others_is_only_helped() -> None:
    async def main() -> None:
        clu, sark = Machine("clu", [4 * HEDGE_SECONDS], usual=0.5), Machine("sark", usual=1.0)
        pool = spread(clu, sark)
        slow = asyncio.create_task(pool.embed())
        await asyncio.sleep(0.1)
        while not slow.done():
            await asyncio.gather(pool.embed(), pool.embed())
        assert (await slow, clu.cancelled) == ("sark", 1)
        assert (await pool.embed(), clu.checked) == ("clu", [])

    run(main)


def test_the_first_answer_counts_whoever_gives_it() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", [HEDGE_SECONDS + 1.0]), Machine("clu", [3.0])
        pool = spread(sark, clu)
        began = now()
        assert await pool.embed() == "sark"
        assert now() - began == pytest.approx(HEDGE_SECONDS + 1.0)
        await settle()
        assert (clu.cancelled, clu.running) == (1, 0)

    run(main)


def test_all_are_asked_in_the_end_and_each_is_waited_for() -> None:
    async def main() -> None:
        machines = [Machine("sark", [NEVER]), Machine("clu", [20.0]), Machine("third", [AWAY])]
        pool, began = spread(*machines), now()
        assert await pool.embed() == "clu"
        assert [one.asked for one in machines] == [[began], [began + HEDGE_SECONDS], [began + 2 * HEDGE_SECONDS]]
        assert now() == began + HEDGE_SECONDS + 20.0

    run(main)


def test_an_error_of_the_second_is_not_the_end_of_the_first() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", [HEDGE_SECONDS + 2.0]), Machine("clu", [AWAY])
        assert await spread(sark, clu).embed() == "sark"

    run(main)


# Whether it is ready


def test_it_is_ready_once_one_is() -> None:
    async def main() -> None:
        began = now()
        assert await spread(Machine("sark", health=NEVER), Machine("clu", health=AWAY), Machine("third")).ready()
        assert now() == began
        await settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}  # nobody waits for the others

    run(main)


@pytest.mark.parametrize("health", [AWAY, ActorDiedError()], ids=["ours", "ray's"])
def test_it_is_not_ready_where_none_is_in_time(health: Exception) -> None:
    async def main() -> None:
        began = now()
        with pytest.raises(Unavailable, match="on none of its machines"):
            await spread(Machine("sark", health=NEVER), Machine("clu", health=health)).ready()
        assert now() - began == PROBE_SECONDS

    run(main)


def test_who_is_ready_is_asked_again() -> None:
    async def main() -> None:
        sark, clu = Machine("sark", [AWAY], health=0.1), Machine("clu", health=0.1)
        pool = spread(sark, clu)
        await pool.embed()
        await pool.ready()
        assert await pool.embed() == "sark"

    run(main)


# Anything in any order


@settings(max_examples=150, deadline=None)
@given(
    some.lists(
        some.lists(some.sampled_from([0.01, 1.0, 4.0, 8.0, NEVER, AWAY, FULL, WRONG]), max_size=8),
        min_size=1, max_size=4,
    ),
    some.lists(some.tuples(some.sampled_from([0.0, 0.3, 6.0]), some.sampled_from([0.1, 3.0, 60.0])), max_size=12),
)  # fmt: skip
def test_whatever_happens_places_return_and_who_waits_is_answered_by_someone_who_can(
    scripts: list[list[float | Exception | None]], calls: list[tuple[float, float]]
) -> None:
    async def main() -> None:
        machines = [Machine(f"m{n}", list(script), health=1.0) for n, script in enumerate(scripts)]
        steady = Machine("steady")
        pool, outcomes = spread(*machines, steady), Counter[str]()

        async def call(patience: float) -> None:
            try:
                async with asyncio.timeout(patience):
                    outcomes[(await pool.embed()).partition(" ")[0]] += 1
            except TimeoutError:
                outcomes["left"] += 1
                assert patience < HEDGE_SECONDS * (len(machines) + 1)
            except InvalidRequest:
                outcomes["refused"] += 1

        asking = []
        for pause, patience in calls:
            await asyncio.sleep(pause)
            asking.append(asyncio.create_task(call(patience)))
        await asyncio.gather(*asking)  # none of which is refused for want of a machine
        assert outcomes.total() == len(calls)
        assert [one.running for one in machines] == [0] * len(machines)
        assert [one.in_flight for one in pool._all] == [0] * (len(machines) + 1)
        for one in machines:
            pauses = [later - earlier for earlier, later in zip(one.checked, one.checked[1:], strict=False)]
            assert all(pause >= PROBE_SECONDS for pause in pauses)

    run(main)


# What stands below it


@pytest.mark.parametrize("error", [ObjectLostError("00" * 28, None, ""), ActorDiedError()])
def test_what_died_with_its_machine_is_asked_elsewhere(error: Exception) -> None:
    with pytest.raises(Unavailable), translated():
        raise error


class Handle:
    """A deployment's handle whose methods give one answer."""

    def __init__(self, answer: object) -> None:
        self.embed = self.ready = self
        self._answer = answer

    def remote(self, *_: object) -> "asyncio.Future[object]":
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(self._answer)
        return answer


def test_an_engine_that_gives_back_an_error_is_stood_in_for() -> None:
    async def main() -> None:
        engines: list[Any] = [Handle(Unavailable("no vectors")), Handle([[3.0, 4.0]])]
        embedder = RemoteEmbedder(Spread({str(n): Remote(handle) for n, handle in enumerate(engines)}))
        assert np.allclose(await embedder.embed(["x"]), [[0.6, 0.8]])

    run(main)
