"""Plans: never more than there is, nothing moved without need, and refusals that can be acted on."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.inventory import Gpu, Inventory, Node
from cluster.placement import Footprint, Moves, Place, Plan, Refusal, Want, decode, encode, left, moves, place
from tests.machines import GIB, can_be_placed, draw_inventory, draw_wants, engine, heed, machine, recount, small

BATCHES, CASES = 8, 250  # 2,000 random inventories and wants

PAIR = Inventory((machine("sark", 8), machine("clu", 8), machine("witness", memory=16, cpus=4)))


def planned(inventory: Inventory, *wants: Want, current: Plan | None = None) -> Plan:
    plan = place(inventory, wants, current)
    recount(inventory, wants, plan)
    assert not plan.refusals, plan.refusals
    return plan


def refused(inventory: Inventory, *wants: Want) -> Refusal:
    """The only refusal, whose remedy has been tried."""
    plan = place(inventory, wants)
    recount(inventory, wants, plan)
    (refusal,) = plan.refusals
    want = next(want for want in wants if want.name == refusal.want)
    changed, wanted = heed(refusal.remedy, inventory, want)
    planned(changed, *(other for other in wants if other is not want), *wanted)
    return refusal


def spots(plan: Plan, want: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(one.node, one.gpus) for one in plan.places if one.want == want]


# ── whatever there is and whatever is wanted ────────────────────────────────────────────────────


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_plan_gives_away_more_than_there_is(batch: int) -> None:
    for case in range(CASES):
        dice = random.Random(batch * CASES + case)
        inventory = draw_inventory(dice)
        wants = draw_wants(dice, inventory)
        plan = place(inventory, wants)
        recount(inventory, wants, plan)
        assert place(Inventory(tuple(inventory.nodes)), tuple(wants)) == plan, "equal arguments, another plan"
        assert place(inventory, wants, plan) == plan, "nothing changed, but the plan did"
        if plan.refusals:
            heeded(inventory, wants, plan)
        else:
            changed(inventory, wants, plan, dice)


def heeded(inventory: Inventory, wants: Sequence[Want], plan: Plan) -> None:
    """Every remedy gives its want a place beside what has one."""
    without = [want for want in wants if want.name not in {refusal.want for refusal in plan.refusals}]
    for refusal in plan.refusals:
        (want,) = (want for want in wants if want.name == refusal.want)
        then, wanted = heed(refusal.remedy, inventory, want)
        assert place(then, [*without, *wanted]).refusals == (), refusal


def changed(inventory: Inventory, wants: Sequence[Want], plan: Plan, dice: random.Random) -> None:
    """With a machine more nothing moves, without one only what was there, or what has to make room for it."""
    more = Inventory((*inventory.nodes, machine("new", 4)))
    with_more = place(more, wants, plan)
    recount(more, wants, with_more)
    assert set(plan.places) <= set(with_more.places)
    gone = dice.choice(inventory.nodes)
    fewer = Inventory(tuple(node for node in inventory.nodes if node is not gone))
    with_fewer = place(fewer, wants, plan)
    recount(fewer, wants, with_fewer)
    staying = [one for one in plan.places if one.node != gone.name]
    if len(staying) == len(plan.places):
        assert with_fewer == plan
    elif not with_fewer.refusals:
        moved = moves(Plan(tuple(staying)), with_fewer).moved
        assert len(moved) <= len(plan.places) - len(staying), moved


def test_what_trying_everything_places_is_placed() -> None:
    """For up to seven replicas on three machines with three GPUs: no arrangement is missed."""
    found = [0, 0]
    for seed in range(500):
        dice = random.Random(10**6 + seed)
        inventory = draw_inventory(dice, most_nodes=3, most_gpus=3)
        wants = draw_wants(dice, inventory, most=5)
        if sum(want.least for want in wants) <= 7:
            can_be = can_be_placed(inventory, wants)
            assert can_be == (not place(inventory, wants).refusals), seed
            found[can_be] += 1
    assert min(found) > 50, "too few of one kind to tell"


def test_the_only_arrangement_is_found_by_trying_all() -> None:
    tight = Inventory((machine("a", 1, of_each=24), machine("b", 1, of_each=48), machine("c", 1, of_each=80)))
    either = ("b", "c")
    wants = [small("x", 40, nodes=either), small("y", 22), small("z", 44, nodes=either), small("v", 30), small("u", 4)]
    assert can_be_placed(tight, wants)
    planned(tight, *wants)


def test_it_is_found_by_another_order_where_all_are_too_many() -> None:
    """Beside a hundred machines that do not help, 36 and 40 have to be on one GPU, which is not where 40 goes first."""
    useless = (machine(f"n{number}") for number in range(100))
    many = Inventory((machine("a", 1, of_each=48), machine("b", 1, of_each=80), *useless))
    planned(many, small("x", 30), small("y", 15), small("z", 36), small("v", 40))


# ── where things go ─────────────────────────────────────────────────────────────────────────────


def test_a_group_of_gpus_is_on_one_machine_and_whole() -> None:
    plan = planned(PAIR, engine("large", 140, gpus=4, least=2), small("embedder", 2, least=2))
    assert [node for node, _ in spots(plan, "large")] == ["sark", "clu"]
    assert [one.gpu_share for one in plan.places] == [1, 1, 0.025, 0.025]
    for node, gpus in spots(plan, "embedder"):
        assert not {*gpus} & {*dict(spots(plan, "large"))[node]}


def test_small_ones_share_a_gpu_so_that_whole_ones_stay_free() -> None:
    plan = planned(PAIR, engine("half", 16, share=0.5), *(small(f"s{number}", 5) for number in range(7)))
    assert len({(one.node, one.gpus) for one in plan.places}) == 1
    (node, *_) = left(PAIR, plan)
    assert [gpu.share for gpu in node.gpus[1:]] == [1] * 7


def test_a_share_is_rounded_up_to_what_ray_counts() -> None:
    third = Inventory((Node("a", "a", 4, 4 * GIB, (Gpu(0, "A10", 3 * GIB),)),))
    plan = planned(third, Want("s", 2, 3, gpus=1, footprint=Footprint(GIB)))
    assert [one.gpu_share for one in plan.places] == [0.3334, 0.3334]  # thrice that is more than a GPU


def test_replicas_are_spread_and_voters_are_apart() -> None:
    plan = planned(PAIR, small("s", 1, least=4), Want("voter", 3, 3, memory=GIB, is_apart=True))
    assert [node for node, _ in spots(plan, "s")] == ["sark", "clu", "sark", "clu"]
    assert {node for node, _ in spots(plan, "voter")} == {"sark", "clu", "witness"}


def test_each_replica_may_have_machines_of_its_own() -> None:
    voter = Want("voter", 3, 3, is_apart=True, nodes_of_each=((), ("sark",), ("clu", "sark")))
    assert spots(planned(PAIR, voter), "voter") == [("witness", ()), ("sark", ()), ("clu", ())]


def test_what_is_more_than_the_least_waits_for_the_least_of_all() -> None:
    one = Inventory((machine("sark", 3),))
    plan = planned(one, engine("a", 16, most=3), engine("b", 16, most=3), engine("c", 16))
    assert [one.want for one in plan.places] == ["a", "b", "c"]
    both = planned(Inventory((machine("sark", 5),)), engine("a", 16, most=9), engine("b", 16, most=9))
    assert [one.want for one in both.places] == ["a", "a", "a", "b", "b"]  # in turn


def test_the_cache_has_what_the_rest_leaves() -> None:
    want = engine("e", 16)
    (found,) = planned(PAIR, want).places
    assert found.gpu_bytes == int(0.9 * 80 * GIB) + GIB // 2 and found.gpu_share == 0.9063
    assert found.cache_tokens == (72 - 16 - 1) * GIB // (128 * 2**10)
    (over_two,) = planned(PAIR, replace(want, gpus=2)).places
    assert over_two.cache_tokens == ((72 - 1) * 2 - 16) * GIB // (128 * 2**10)


def test_the_memory_of_the_host_and_its_cpus_count() -> None:
    two = Inventory((machine("a", 1, memory=8, cpus=2), machine("b", 1, memory=8, cpus=2)))
    plan = planned(two, Want("x", 2, 9, memory=5 * GIB), Want("y", 2, 9, cpus=1.5), Want("z", 1, 1, memory=3 * GIB))
    assert [len(spots(plan, name)) for name in "xyz"] == [2, 2, 1]
    assert [(node.cpus, node.memory) for node in left(two, plan)] == [(0.5, 0), (0.5, 3 * GIB)]


def test_a_gpu_that_others_hold_is_avoided() -> None:
    held = Inventory((machine("sark", 3, held={0: 30, 1: 0.5}),))
    plan = planned(held, engine("pair", 20), small("s", 2))
    assert spots(plan, "pair") == [("sark", (2,))]
    assert spots(plan, "s") == [("sark", (2,))]
    assert "one needs 2 whole GPUs" in refused(held, engine("pair", 20, gpus=2)).reason


def test_a_gpu_that_others_hold_is_used_where_nothing_else_is_left_as_far_as_it_is_free() -> None:
    held = Inventory((machine("sark", 2, held={0: 70}),))
    plan = planned(held, small("a", 60), small("b", 10))
    assert (spots(plan, "a"), spots(plan, "b")) == ([("sark", (1,))], [("sark", (1,))])
    full = planned(held, small("a", 75), small("b", 10))
    assert spots(full, "b") == [("sark", (0,))]
    assert refused(held, small("a", 75), small("b", 10.1)).want == "b"


def test_a_gpu_that_somebody_took_since_is_left() -> None:
    wants = [engine("pair", 20, gpus=2), small("s", 2)]
    before = planned(PAIR, *wants)
    (node, gpus), *_ = spots(before, "pair")
    held = Inventory(
        tuple(machine(one.name, len(one.gpus), held={gpus[0]: 1} if one.name == node else {}) for one in PAIR.nodes)
    )
    after = planned(held, *wants, current=before)
    assert spots(after, "pair") != spots(before, "pair") and spots(after, "s") == spots(before, "s")


# ── what is there already ───────────────────────────────────────────────────────────────────────


def test_what_still_fits_stays_where_it_is() -> None:
    wants = [engine("e", 16, least=2, most=4), small("s", 3, least=2), Want("voter", 3, 3, is_apart=True)]
    before = planned(PAIR, *wants)
    assert place(PAIR, wants, before) == before
    after = planned(PAIR, *wants, engine("new", 16, gpus=4), current=before)
    assert moves(before, after) == Moves(added=tuple(one for one in after.places if one.want == "new"))


def test_one_gives_way_where_one_is_enough() -> None:
    """Two GPUs have to be whole: one of the small ones moves to the other."""
    one = Inventory((machine("sark", 2), machine("clu", 1)))
    scattered = Plan((Place("a", 0, "sark", (0,)), Place("b", 0, "clu", (0,)), Place("c", 0, "clu", (0,))))
    after = planned(one, small("a", 5), small("b", 5), small("c", 5), engine("pair", 30, gpus=2), current=scattered)
    assert [(old.want, new.node) for old, new in moves(scattered, after).moved] == [("a", "clu")]


def test_no_more_than_one_gives_way_where_one_is_enough() -> None:
    """Neither of the first two GPUs is free, though the pair would go there if nothing were on them."""
    one = Inventory((machine("sark", 3),))
    scattered = Plan((Place("a", 0, "sark", (0,)), Place("b", 0, "sark", (1,))))
    after = planned(one, small("a", 5), small("b", 5), engine("pair", 30, gpus=2), current=scattered)
    assert len(moves(scattered, after).moved) == 1


def test_what_is_not_allowed_any_more_moves() -> None:
    before = planned(
        PAIR, small("s", 2, nodes=("sark",)), Want("voter", 1, 1, is_apart=True, nodes_of_each=(("sark",),))
    )
    voter = Want("voter", 1, 1, is_apart=True, nodes_of_each=(("witness",),))
    after = planned(PAIR, small("s", 2, nodes=("clu",)), voter, current=before)
    assert [(old.node, new.node) for old, new in moves(before, after).moved] == [("sark", "clu"), ("sark", "witness")]
    two = Plan((Place("voter", 0, "sark"), Place("voter", 1, "sark")))
    assert len({*spots(planned(PAIR, Want("voter", 2, 2, is_apart=True), current=two), "voter")}) == 2


def test_a_group_on_gpus_that_are_not_alike_moves() -> None:
    cards = (Gpu(0, "A40", 48 * GIB), Gpu(1, "H100", 80 * GIB), Gpu(2, "H100", 80 * GIB))
    one = Inventory((Node("sark", "sark", 64, 1024 * GIB, cards),))
    mixed = Plan((Place("pair", 0, "sark", (0, 1)),))
    assert spots(planned(one, engine("pair", 30, gpus=2), current=mixed), "pair") == [("sark", (1, 2))]


def test_replicas_past_the_least_give_way_and_move_nothing() -> None:
    one = Inventory((machine("sark", 4),))
    before = planned(one, engine("e", 16, most=4))
    after = planned(one, engine("e", 16, most=4), engine("pair", 30, gpus=2), current=before)
    staying = {one for one in after.places if one.want == "e"}
    assert len(staying) == 2 and staying < {*before.places}


def test_what_is_needed_does_not_move_where_what_is_not_can_go() -> None:
    one = Inventory((machine("sark", 4),))
    before = Plan((Place("a", 0, "sark", (0,)), *(Place("e", number, "sark", (number + 1,)) for number in range(3))))
    after = planned(one, small("a", 10), engine("e", 16, most=3), engine("pair", 30, gpus=2), current=before)
    assert spots(after, "a") == [("sark", (0,))] and spots(after, "e") == [("sark", (1,))]


def test_nothing_moves_to_make_room_for_more_than_the_least() -> None:
    one = Inventory((machine("sark", 2),))
    apart = Plan((Place("a", 0, "sark", (0,)), Place("b", 0, "sark", (1,))))
    after = planned(one, small("a", 5), small("b", 5), engine("e", 30, share=0.95), current=None)
    assert len(after.places) == 3
    wants = [small("a", 5), small("b", 5, most=2), replace(engine("e", 30, share=0.95), least=0)]
    assert spots(place(one, wants, apart), "e") == []


def test_a_machine_that_is_gone_moves_only_what_was_on_it() -> None:
    wants = [engine("e", 16, least=2), small("s", 3, least=3), Want("gateway", memory=GIB, nodes=("clu",))]
    before = planned(PAIR, *wants)
    without = Inventory(tuple(node for node in PAIR.nodes if node.name != "sark"))
    after = planned(without, *wants, current=before)
    assert {*before.places} - {*after.places} == {one for one in before.places if one.node == "sark"}


def test_fewer_replicas_than_there_were_stay_where_they_are() -> None:
    before = Plan((Place("e", 0, "gone", (0,)), Place("e", 1, "clu", (3,)), Place("e", 3, "clu", (6,))))
    after = planned(PAIR, engine("e", 16, least=2), current=before)
    assert [(one.replica, one.node, one.gpus) for one in after.places] == [(0, "clu", (6,)), (1, "clu", (3,))]


def test_other_sizes_change_a_place_without_moving_it() -> None:
    before = planned(PAIR, engine("e", 16), small("s", 2))
    after = planned(PAIR, engine("e", 16, share=0.5), small("s", 2), current=before)
    ((old, new),) = moves(before, after).resized
    assert (old.gpus, new.gpus, new.gpu_share) == (new.gpus, old.gpus, 0.5063)
    assert not moves(before, after).moved and not moves(before, before)


def test_a_plan_that_was_refused_is_no_reason_to_stay_anywhere() -> None:
    elsewhere = (Place("a", 0, "clu", (5,)),)
    assert spots(planned(PAIR, small("a", 5), current=Plan(elsewhere)), "a") == [("clu", (5,))]
    refusing = Plan(elsewhere, (Refusal("b", "too large", "leave b out"),))
    assert planned(PAIR, small("a", 5), current=refusing) == planned(PAIR, small("a", 5))


def test_moves_are_told_by_what_replicas_do_not_by_their_numbers() -> None:
    old = Plan((Place("a", 0, "x"), Place("a", 1, "y"), Place("b", 0, "x"), Place("d", 0, "x")))
    new = Plan((Place("a", 0, "y"), Place("a", 1, "z"), Place("b", 0, "x", memory=5), Place("c", 0, "x")))
    assert moves(old, new) == Moves(
        added=(Place("c", 0, "x"),), removed=(Place("d", 0, "x"),), moved=((Place("a", 0, "x"), Place("a", 1, "z")),),
        resized=((Place("b", 0, "x"), Place("b", 0, "x", memory=5)),),
    )  # fmt: skip


def test_a_plan_survives_being_written_down() -> None:
    plan = place(PAIR, [engine("e", 16, gpus=2), engine("never", 9000), Want("voter", 3, 3, is_apart=True)])
    assert decode(encode(plan)) == plan


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


MADE = "1 machine more with 0.0 GiB of memory and 0 CPUs, and 1 GPU of"
ON_WITNESS = Want("gateway", memory=20 * GIB, nodes=("witness",))


@pytest.mark.parametrize(
    ("want", "reason", "remedy"),
    [
        (engine("e", 60, share=0.5), "63.0 GiB of its GPU (60.0 GiB weights", "memory_utilization 0.5 → 0.79"),
        (engine("e", 70), "2.0 GiB KV cache for one request of 16384 tokens", "memory_utilization 0.9 → 0.92"),
        (engine("e", 74), "of the largest there 0.9 of 80.0 GiB is 72.0 GiB", "tensor_parallel 1 → 2"),
        (engine("e", 190, gpus=2), "97.0 GiB of each of 2 GPUs", "tensor_parallel 2 → 4"),
        (engine("e", 16, gpus=8, least=3), "2 of 3 replicas have a place", "tensor_parallel 8 → 4"),
        (Want("voter", 4, 4, is_apart=True), "each needs a machine of its own", "1 replica fewer"),
        (ON_WITNESS, "20.0 GiB of host memory, and the most that is free is 16.0", "4.0 GiB more memory in witness"),
        (Want("x", cpus=70), "70 CPUs and 0.0 GiB of host memory; sark has 64 CPUs", "6 CPUs more in sark"),
        (Want("x", nodes=("tron",)), "there is none: tron", "tron with 0.0 GiB of memory and 0 CPUs"),
        (engine("e", 16, nodes=("witness",)), "none of its machines has a GPU: witness", "let it be on sark, too"),
        (small("s", 90), "90.0 GiB of its GPU", f"{MADE} 90 GiB"),
    ],
)
def test_a_refusal_says_numbers_and_what_would_help(want: Want, reason: str, remedy: str) -> None:
    refusal = refused(PAIR, want)
    assert refusal.remedy == remedy
    assert reason in refusal.reason


def test_a_shorter_request_is_a_remedy() -> None:
    long = Footprint(60 * GIB, GIB, 2**20, 16384)
    assert refused(PAIR, Want("e", gpus=1, gpu_share=0.9, footprint=long)).remedy == "max_model_len 16384 → 11264"
    on_host = Footprint(GIB, GIB, 2**20, 4096)
    assert refused(PAIR, Want("e", memory=4 * GIB, footprint=on_host)).remedy == "max_model_len 4096 → 2048"
    short = Footprint(GIB, GIB, 2**24, 4096)
    assert refused(PAIR, Want("e", memory=3 * GIB, footprint=short)).remedy == f"cpu_cache_bytes {GIB} → {64 * GIB}"


def test_what_others_hold_can_be_the_reason() -> None:
    held = Inventory((machine("sark", 1, held={0: 60}), machine("clu", 1, held={0: 70})))
    refusal = refused(held, engine("e", 60))
    assert "the most that is free of one is 20.0 GiB (GPU 0 of sark; others hold 60.0 GiB of it)" in refusal.reason
    assert refusal.remedy == "free GPU 0 of sark (60.0 GiB held by others)"
    several = Inventory((machine("sark", 4, held={1: 60, 3: 10}),))
    refusal = refused(several, engine("e", 200, gpus=4))
    assert refusal.remedy == "free GPUs 1, 3 of sark (70.0 GiB held by others)"


def test_two_that_fit_alone_but_not_together() -> None:
    two = Inventory((machine("sark", 1),))
    refusal = refused(two, engine("a", 40), engine("b", 30))
    assert refusal.reason.startswith(
        "0 of 1 replicas have a place beside what else is wanted; one needs 72.5 GiB of a GPU"
    )
    assert refusal.remedy == "1 machine more like sark"


@pytest.mark.parametrize(
    ("first", "greedy", "modest", "says"),
    [
        (Want("z", memory=8 * GIB), Want("x", 3, 3, memory=7 * GIB), Want("y", memory=6 * GIB), "1 of 3"),
        (Want("z", cpus=2), Want("x", 3, 3, cpus=1), Want("y", cpus=0.5), "1 of 3"),
        (engine("z", 30, gpus=2), engine("x", 30, least=3), engine("y", 30), "1 of 3"),
        (engine("z", 300, gpus=8), engine("x", 30, gpus=2, least=2), engine("y", 30), "0 of 2"),
    ],
)
def test_what_does_not_get_its_least_leaves_its_room_to_others(
    first: Want, greedy: Want, modest: Want, says: str
) -> None:
    """It would, if nothing else were there."""
    gpus = 10 if first.gpus == 8 else 4
    one = Inventory((machine("sark", gpus, memory=24, cpus=4),))
    plan = place(one, [first, greedy, modest])
    recount(one, [first, greedy, modest], plan)
    assert [refusal.want for refusal in plan.refusals] == ["x"]
    assert plan.refusals[0].reason.startswith(f"{says} replicas have a place beside what else is wanted")


def test_each_of_several_refusals_is_about_one() -> None:
    plan = place(PAIR, [engine("a", 9000), engine("b", 16), Want("voter", 9, 9, is_apart=True)])
    assert [(refusal.want, refusal.remedy) for refusal in plan.refusals] == [
        ("a", f"{MADE} 10004 GiB"),
        ("voter", "6 replicas fewer"),
    ]
    heeded(PAIR, [engine("a", 9000), engine("b", 16), Want("voter", 9, 9, is_apart=True)], plan)


def test_a_remedy_keeps_to_what_can_be_divided() -> None:
    """28 heads do not go over eight GPUs."""
    footprint = Footprint(500 * GIB, GIB, 128 * 2**10, 8192, 0, 4, 28)
    assert "tensor_parallel" not in refused(PAIR, Want("e", gpus=4, gpu_share=0.9, footprint=footprint)).remedy
    even = replace(footprint, heads=32)
    assert refused(PAIR, Want("e", gpus=4, gpu_share=0.9, footprint=even)).remedy == "tensor_parallel 4 → 8"


def test_no_machines_at_all() -> None:
    plan = place(Inventory(()), [small("s", 1), Want("x")])
    assert [refusal.want for refusal in plan.refusals] == ["s", "x"]
    assert place(Inventory(()), []) == Plan(())
