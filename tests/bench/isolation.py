"""Tenant isolation over as many random cases as are asked for, in several processes: how many, how fast, what leaked.

    python -m tests.bench.isolation --cases 1000000 --jobs 2 [--seed N]

Each world of 400 cases has its own seed, counted up from the first. A leak is printed with its seed, and comes back by

    python -m tests.bench.isolation --cases 400 --seed SEED
"""

from tests.bench import harness  # isort: skip  # first: it pins the threads

import argparse
import multiprocessing
import secrets
import sys
from time import perf_counter

from tests import isolation
from tests.isolation import Report


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--cases", type=int, default=20_000)
    arguments.add_argument("--jobs", type=int, default=1)
    arguments.add_argument("--seed", type=int, help="of the first world; by default a new one")
    given = arguments.parse_args()
    first = secrets.randbelow(2**40) if given.seed is None else given.seed
    worlds = -(-given.cases // isolation.CASES_PER_WORLD)
    print(f"{worlds} worlds, from seed {first}", flush=True)
    report, seconds = _run(first, worlds, given.jobs)
    rows = [
        [kind, often, report.telling[kind]] for kind, often in sorted(report.kinds.items(), key=lambda one: -one[1])
    ]
    harness.print_table(["asked by", "cases", "told what they may see"], rows)
    figures = {
        "cases": report.cases, "leaks": len(report.leaks), "telling": report.telling.total(),
        "cases_per_second": report.cases / seconds, "worlds": worlds,
        **{f"status_{status}": often for status, often in sorted(report.statuses.items())},
    }  # fmt: skip
    harness.print_result("isolation", figures, ("fastapi", "starlette", "numpy"))
    sys.exit(1 if report.leaks else 0)


def _run(first: int, worlds: int, jobs: int) -> tuple[Report, float]:
    report, started = Report(), perf_counter()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for done, one in enumerate(pool.imap_unordered(isolation.run, range(first, first + worlds)), 1):
            report.add(one)
            for leak in one.leaks:
                print(f"LEAK {leak}", flush=True)
            if done % 100 == 0:
                print(f"{report.cases} cases, {len(report.leaks)} leaks, {perf_counter() - started:.0f} s", flush=True)
    return report, perf_counter() - started


if __name__ == "__main__":
    main()
