"""A plan by machines: one deployment of a model on each, as large as the plan says."""

from cluster.plan import Place, Plan
from cluster.spots import Spot, spots
from nexus.config import Replicas


def test_without_a_plan_a_model_is_wherever_there_is_room() -> None:
    (spot,) = spots("embedder", Replicas(least=2, most=3), None)
    assert (spot.least, spot.most, spot.gpus) == (2, 3, 0)
    assert spot.name("embedder") == "embedder" and spot.labels() == {}


def test_each_machine_of_a_plan_has_a_deployment_as_large_as_its_places() -> None:
    plan = Plan(
        (
            Place("embedder", 0, "sark", (0,), 100, gpu_share=0.1),
            Place("embedder", 1, "clu", (0,), 200, gpu_share=0.2),
            Place("embedder", 2, "sark", (1,), 150, gpu_share=0.3),
            Place("generator-0", 0, "sark", (2, 3), 900, gpu_share=1.0),
        )
    )
    at = {spot.node: spot for spot in spots("embedder", Replicas(least=2, most=4), plan)}
    assert at == {
        "sark": Spot("sark", least=1, most=2, gpus=1, share=0.3, bytes=150),
        "clu": Spot("clu", least=1, most=1, gpus=1, share=0.2, bytes=200),
    }
    assert at["sark"].name("embedder") == "embedder@sark" and at["sark"].labels() == {"nexus.io/node": "sark"}
    (engine,) = spots("generator-0", Replicas(), plan)
    assert (engine.gpus, engine.share) == (2, 1.0)


def test_a_machine_that_only_has_replicas_to_spare_has_one_all_the_same() -> None:
    plan = Plan((Place("reranker-0", 0, "sark"), Place("reranker-0", 1, "clu")))
    assert [(spot.node, spot.least, spot.most) for spot in spots("reranker-0", Replicas(least=1, most=2), plan)] == [
        ("sark", 1, 1), ("clu", 1, 1),
    ]  # fmt: skip
