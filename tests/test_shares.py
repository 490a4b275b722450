"""How a machine's GPUs are shared: who comes first, who gives way, and that nobody flaps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.shares import KINDS, SILENT_SECONDS, Claim, Demand, Pool, Shares, Waning, divide, shares_of

DOWN_SECONDS = 60.0
CHAT = Claim("generator-0", "chat", 1, 4, 1.0, 10)
EMBED = Claim("embedder-1", "embed", 1, 4, 1.0, 10)
BULK = Claim("embedder", "bulk", 1, 4, 1.0, 10)


def targets(
    gpus: float, *demands: Demand, waning: Mapping[str, Waning] | None = None, is_pressed: bool = False
) -> list[int]:
    """What each is to have, in the order given."""
    divided, _ = divide(gpus, demands, waning or {}, 0.0, DOWN_SECONDS, is_pressed)
    return [divided[one.claim.name] for one in demands]


# ── who comes first ─────────────────────────────────────────────────────────────────────────────


def test_everybody_gets_what_he_wants_where_there_is_room() -> None:
    assert targets(8, Demand(CHAT, 1, 25), Demand(EMBED, 1, 11), Demand(BULK, 1, 0)) == [3, 2, 1]


def test_chat_comes_before_embedding_and_that_before_bulk() -> None:
    busy = [Demand(BULK, 1, 100), Demand(EMBED, 1, 100), Demand(CHAT, 1, 100)]
    assert [targets(gpus, *busy) for gpus in (3, 5, 8, 9, 12)] == [
        [1, 1, 1], [1, 1, 3], [1, 3, 4], [1, 4, 4], [4, 4, 4],
    ]  # fmt: skip


def test_chat_takes_at_once_what_bulk_has() -> None:
    assert targets(5, Demand(CHAT, 1, 100), Demand(BULK, 4, 100)) == [4, 1]


def test_bulk_takes_nothing_of_what_chat_has_and_wants() -> None:
    assert targets(5, Demand(CHAT, 4, 40), Demand(BULK, 1, 100)) == [4, 1]


def test_where_not_all_leasts_fit_chat_has_its_own() -> None:
    assert targets(1, Demand(BULK, 0, 0), Demand(EMBED, 0, 0), Demand(CHAT, 0, 0)) == [0, 0, 1]


def test_two_of_one_kind_share_what_is_free_by_what_they_want() -> None:
    other = replace(CHAT, name="generator-1", most=8)
    assert targets(5, Demand(CHAT, 1, 40), Demand(other, 1, 80)) == [2, 3]


def test_neither_of_one_kind_takes_what_the_other_still_wants() -> None:
    other = replace(CHAT, name="generator-1")
    assert targets(5, Demand(other, 1, 100), Demand(CHAT, 4, 40)) == [1, 4]


def test_of_one_kind_who_wants_comes_before_who_wanted() -> None:
    other = replace(CHAT, name="generator-1")
    assert targets(5, Demand(CHAT, 4, 0), Demand(other, 1, 30)) == [2, 3]


def test_shares_of_a_gpu_add_up_to_the_last_grain() -> None:
    """Which floating-point numbers do not."""
    tenth = replace(BULK, gpus=0.1, most=20)
    assert targets(1, Demand(tenth, 1, 1000)) == [10]
    assert targets(0.7, Demand(replace(tenth, gpus=0.07), 1, 1000)) == [10]
    assert targets(2.0001, Demand(replace(CHAT, gpus=0.9), 1, 100), Demand(tenth, 1, 1000)) == [2, 2]


def test_a_replica_of_several_gpus_waits_for_all_of_them() -> None:
    double = replace(CHAT, gpus=2.0)
    assert targets(4, Demand(double, 1, 100), Demand(BULK, 1, 100)) == [1, 2]


# ── under pressure ──────────────────────────────────────────────────────────────────────────────


def test_under_pressure_all_but_chat_have_their_least() -> None:
    """Although chat does not ask for what they give up."""
    assert targets(9, Demand(CHAT, 2, 15), Demand(EMBED, 4, 100), Demand(BULK, 3, 100), is_pressed=True) == [2, 1, 1]


def test_after_pressure_they_are_back_at_once() -> None:
    demands = [Demand(CHAT, 2, 15), Demand(EMBED, 1, 100), Demand(BULK, 1, 100)]
    _, waning = divide(9, demands, {}, 0.0, DOWN_SECONDS, is_pressed=True)
    assert targets(9, *demands, waning=waning) == [2, 4, 3]


# ── over time ───────────────────────────────────────────────────────────────────────────────────


@dataclass
class Machine:
    """A pool whose deployments always have what they were granted."""

    gpus: float
    claims: Sequence[Claim]
    current: dict[str, int] = field(default_factory=dict)
    waning: dict[str, Waning] = field(default_factory=dict)

    def at(self, now: float, *requests: float, is_pressed: bool = False) -> list[int]:
        demands = [
            Demand(claim, self.current.get(claim.name, claim.least), many)
            for claim, many in zip(self.claims, requests, strict=True)
        ]
        self.current, self.waning = divide(self.gpus, demands, self.waning, now, DOWN_SECONDS, is_pressed)
        return [self.current[claim.name] for claim in self.claims]


def test_up_at_once_and_down_after_a_delay() -> None:
    machine = Machine(5, [CHAT, BULK])
    assert machine.at(0, 40, 0) == [4, 1]
    assert machine.at(10, 0, 40) == [4, 1]
    assert machine.at(69.9, 0, 40) == [4, 1]
    assert machine.at(70, 0, 40) == [1, 4]


def test_a_pause_that_ends_in_time_costs_no_replica_and_the_delay_begins_anew() -> None:
    machine = Machine(5, [CHAT, BULK])
    machine.at(0, 40, 0)
    machine.at(10, 0, 40)
    assert machine.at(60, 40, 40) == [4, 1]
    assert machine.at(80, 0, 40) == [4, 1]
    assert machine.at(139, 0, 40) == [4, 1]
    assert machine.at(140, 0, 40) == [1, 4]


def test_it_goes_down_to_the_most_that_was_wanted_meanwhile() -> None:
    machine = Machine(5, [CHAT, BULK])
    machine.at(0, 40, 0)
    machine.at(10, 5, 40)
    machine.at(30, 25, 40)
    assert machine.at(70, 5, 40) == [3, 2]
    assert machine.at(129, 5, 40) == [3, 2]
    assert machine.at(130, 5, 40) == [1, 4]


def test_bulk_that_gave_way_does_not_wait_to_be_back() -> None:
    machine = Machine(5, [CHAT, BULK])
    assert machine.at(0, 0, 40) == [1, 4]
    assert machine.at(1, 0, 40, is_pressed=True) == [1, 1]
    assert machine.at(2, 0, 40) == [1, 4]


# ── whatever comes ──────────────────────────────────────────────────────────────────────────────

SIZES = (0.0, 0.05, 0.1, 0.3, 1 / 3, 0.5, 0.9, 1.0, 2.0, 4.0)


@st.composite
def claims(draw: st.DrawFn) -> list[Claim]:
    made = []
    for number in range(draw(st.integers(1, 6))):
        least = draw(st.integers(0, 3))
        kind, most = draw(st.sampled_from(KINDS)), least + draw(st.integers(0, 8))
        size, target = draw(st.sampled_from(SIZES)), draw(st.sampled_from((1.0, 3.0, 32.0)))
        made.append(Claim(f"d{number}", kind, least, most, size, target))
    return made


@st.composite
def situations(draw: st.DrawFn) -> tuple[float, list[Demand], dict[str, Waning], bool]:
    """A pool with its deployments, as a moment of a long life: they may have more than there is room for."""
    demands = [
        Demand(claim, draw(st.integers(0, claim.most + 2)), draw(st.integers(0, 300))) for claim in draw(claims())
    ]
    waning = {
        one.claim.name: Waning(draw(st.floats(-2 * DOWN_SECONDS, 0)), draw(st.integers(0, one.claim.most)))
        for one in demands
        if draw(st.booleans())
    }
    return draw(st.sampled_from((0.5, 1.0, 2.0, 4.0, 8.0, 16.0))), demands, waning, draw(st.booleans())


def taken(demands: Sequence[Demand], divided: Mapping[str, int]) -> float:
    return sum(divided[one.claim.name] * one.claim.gpus for one in demands)


def wanted(demand: Demand) -> float:
    return demand.requests / demand.claim.target


@settings(max_examples=300, deadline=None)
@given(situations())
def test_never_more_than_there_is_nor_less_than_the_least(
    situation: tuple[float, list[Demand], dict[str, Waning], bool],
) -> None:
    gpus, demands, waning, is_pressed = situation
    divided, still = divide(gpus, demands, waning, 0.0, DOWN_SECONDS, is_pressed)
    assert divide(gpus, demands, waning, 0.0, DOWN_SECONDS, is_pressed) == (divided, still)
    assert divided.keys() == {one.claim.name for one in demands}
    assert taken(demands, divided) <= gpus + 1e-3
    leasts_fit = sum(one.claim.least * one.claim.gpus for one in demands) <= gpus - 1e-3
    for one in demands:
        assert 0 <= divided[one.claim.name] <= one.claim.most
        if leasts_fit:
            assert divided[one.claim.name] >= one.claim.least
            if is_pressed and one.claim.kind != "chat":
                assert divided[one.claim.name] == one.claim.least


@settings(max_examples=300, deadline=None)
@given(situations())
def test_room_is_used_and_nobody_is_passed_by_who_comes_later(
    situation: tuple[float, list[Demand], dict[str, Waning], bool],
) -> None:
    """Who has less than it wants and still would find room: nobody; and what is held back serves no later kind."""
    gpus, demands, waning, is_pressed = situation
    divided, _ = divide(gpus, demands, waning, 0.0, DOWN_SECONDS, is_pressed)
    left = gpus - taken(demands, divided)
    for one in demands:
        lacks = divided[one.claim.name] < min(one.claim.most, wanted(one))
        if not lacks or (is_pressed and one.claim.kind != "chat"):
            continue
        assert one.claim.gpus > left - 1e-3
        later = [two for two in demands if KINDS.index(two.claim.kind) > KINDS.index(one.claim.kind)]
        freed = sum(max(0, divided[two.claim.name] - two.claim.least) * two.claim.gpus for two in later)
        assert one.claim.gpus > left + freed - 1e-3


@settings(max_examples=300, deadline=None)
@given(situations(), st.data())
def test_more_demand_never_gives_a_deployment_fewer(
    situation: tuple[float, list[Demand], dict[str, Waning], bool], data: st.DataObject
) -> None:
    gpus, demands, waning, is_pressed = situation
    place = data.draw(st.integers(0, len(demands) - 1))
    more = [*demands]
    more[place] = replace(more[place], requests=more[place].requests + data.draw(st.integers(0, 300)))
    before, _ = divide(gpus, demands, waning, 0.0, DOWN_SECONDS, is_pressed)
    after, _ = divide(gpus, more, waning, 0.0, DOWN_SECONDS, is_pressed)
    name = demands[place].claim.name
    assert after[name] >= before[name]


@settings(max_examples=200, deadline=None)
@given(situations())
def test_under_constant_demand_nobody_flaps(situation: tuple[float, list[Demand], dict[str, Waning], bool]) -> None:
    """They change at once, and once more when the delay is over: that is all."""
    gpus, demands, _, is_pressed = situation
    machine = Machine(gpus, [one.claim for one in demands], {one.claim.name: one.current for one in demands})
    requests = [one.requests for one in demands]
    lives = [machine.at(now, *requests, is_pressed=is_pressed) for now in range(0, 200, 10)]
    assert lives == [lives[0]] * 6 + [lives[6]] * 14


# ── asked one after another ─────────────────────────────────────────────────────────────────────


def test_nobody_changes_before_all_have_come() -> None:
    shares = Shares(Pool(5, (CHAT, BULK), DOWN_SECONDS))
    assert shares.ask("embedder", 1, 40, 0.0) == 1
    assert shares.ask("generator-0", 1, 30, 0.0) == 3
    assert shares.ask("embedder", 1, 40, 0.1) == 2


def test_who_never_comes_keeps_its_least_and_nobody_waiting() -> None:
    shares = Shares(Pool(5, (CHAT, BULK), DOWN_SECONDS))
    assert shares.ask("embedder", 1, 100, 0.0) == 1
    assert shares.ask("embedder", 1, 100, SILENT_SECONDS) == 4


def test_who_falls_silent_wants_nothing_any_more() -> None:
    shares = Shares(Pool(5, (CHAT, BULK), DOWN_SECONDS))
    shares.ask("generator-0", 3, 30, 0.0)
    assert shares.ask("embedder", 1, 100, 1.0) == 2
    assert shares.ask("embedder", 2, 100, SILENT_SECONDS) == 4


def test_what_they_have_wanted_is_remembered_between_two_questions() -> None:
    shares = Shares(Pool(5, (CHAT, BULK), DOWN_SECONDS))
    shares.ask("embedder", 1, 0, 0.0)
    assert [shares.ask("generator-0", 4, 0, now) for now in (0.0, DOWN_SECONDS - 1, DOWN_SECONDS)] == [4, 4, 1]


def test_pressure_reaches_the_division() -> None:
    shares = Shares(Pool(5, (CHAT, BULK), DOWN_SECONDS))
    shares.ask("generator-0", 1, 0, 0.0)
    assert shares.ask("embedder", 3, 100, 0.0) == 4
    assert shares.ask("embedder", 4, 100, 0.1, is_pressed=True) == 1


def test_equal_pools_are_divided_together() -> None:
    first, second = (Pool(5, (CHAT, BULK)) for _ in range(2))
    assert shares_of(first) is shares_of(second) is not shares_of(Pool(6, (CHAT, BULK)))
