"""How long a plan takes: 200 models on machines with eight GPUs each, by the number of machines.

    python -m tests.bench.placement [--rounds N]

Timed are a first plan, the same again with that plan in force, one with a machine lost, and one that is refused
with its reason and remedy. Each figure is the least of its rounds, in seconds.
"""

from tests.bench import harness  # isort: skip  # first: it pins the threads

import argparse
from collections.abc import Callable, Sequence

from cluster.inventory import Gpu, Inventory, Node
from cluster.placement import Footprint, Plan, Want, place

GIB = 2**30
MODELS = 200
SIZES = (10, 100, 1000)
GPUS = (1, 1, 2, 4, 8, 1)
SHARES = (0.0, 0.5, 0.9, 0.9, 0.9, 0.0)  # of the model before it in turn; 0: a small one, as much as it needs
WEIGHTS = (1, 16, 60, 140, 400, 3)  # GiB
PACKAGES = ("nexus",)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=3)
    rounds = arguments.parse_args().rounds
    measured = {size: measure(size, rounds) for size in SIZES}
    rows = [(size, *plans, *seconds.values()) for size, (plans, seconds) in measured.items()]
    harness.print_table(("machines", "models", "replicas", *(f"{name} s" for name in measured[SIZES[0]][1])), rows)
    figures = {f"{name}_s_{size}": value for size, (_, seconds) in measured.items() for name, value in seconds.items()}
    harness.print_result("placement", figures, PACKAGES)


def measure(size: int, rounds: int) -> tuple[tuple[int, int], dict[str, float]]:
    """How many models and replicas there were, and the seconds of each plan."""
    inventory, wants = machines(size), models(size)
    plan = place(inventory, wants)
    assert not plan.refusals, plan.refusals[0]
    fewer = Inventory(tuple(node for node in inventory.nodes if node.name != plan.places[0].node))
    too_much = [*wants, Want("too-much", size, size, gpus=8, gpu_share=0.9, footprint=Footprint(400 * GIB, GIB))]
    seconds = {
        "first": least(rounds, lambda: place(inventory, wants)),
        "again": least(rounds, lambda: place(inventory, wants, plan)),
        "one_lost": least(rounds, lambda: place(fewer, wants, plan)),
        "refused": least(rounds, lambda: place(inventory, too_much)),
    }
    return (len(wants), len(plan.places)), seconds


def machines(count: int) -> Inventory:
    gpus = tuple(Gpu(index, "H100", 80 * GIB) for index in range(8))
    return Inventory(tuple(Node(f"n{number:04}", "", 112, 1900 * GIB, gpus) for number in range(count)))


def models(machines: int) -> list[Want]:
    """Two hundred where there is room for as many, else as many as fit."""
    found = []
    for number in range(MODELS if machines >= 100 else 2 * machines):
        turn = number % 6
        footprint = Footprint(WEIGHTS[turn] * GIB, GIB, 160 * 2**10 if SHARES[turn] else 0, 8192, GIB // 2, 8, 64)
        least = 1 + number % (4 if machines >= 1000 else 1)
        found.append(
            Want(f"model-{number}", least, least + number % 5, GPUS[turn], 4 * GIB, GPUS[turn], SHARES[turn], footprint)
        )
    return found


def least(rounds: int, work: Callable[[], Plan]) -> float:
    clocks: Sequence[harness.Clock] = [harness.Clock() for _ in range(rounds)]
    for clock in clocks:
        with clock:
            work()
    return min(clock.wall for clock in clocks)


if __name__ == "__main__":
    main()
