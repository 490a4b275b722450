"""A policy run over 10,000 files in real processes, killed 20 times: what it costs, and that every file has one home.

    python -m tests.bench.policy [FILES] [LIVES]

The run goes on over five turns of the rules, each of which moves most files; the last goes to its end. Killed is by
failpoint, or from outside once so much was told. Then every file is read wherever it lies. Beside it, on the same
files, a run that nobody kills, and what of its time is spent on what.
"""

from tests.bench.harness import Clock, print_result, print_table  # isort: skip  # first: it pins the threads

import random
import shutil
import sys
import tempfile
from pathlib import Path
from signal import SIGKILL

from nexus.policy import converge, plan
from tests.housing import (
    NOW,
    TENANT,
    TIERS,
    build,
    check_after_kill,
    check_at_rest,
    kill_somewhere,
    open_homes,
    rules,
    run,
)


def measure_killed(root: Path, files: int, lives: int) -> tuple[int, float]:
    """How many were killed, and the seconds of all lives, checks between them left out."""
    dice, killed, spent = random.Random(11), 0, 0.0
    for life in range(lives):
        with Clock() as clock:
            died = kill_somewhere(root, 1 + life * 4 // lives, files, dice, from_outside=life % 4 == 0)
        spent += clock.wall
        killed += died == -SIGKILL
        check_after_kill(root, files)
    with Clock() as clock:
        assert run(root, 5) == 0
    check_at_rest(root, 5, files)
    return killed, spent + clock.wall


def measure_whole(root: Path) -> tuple[dict[str, float], int]:
    """Seconds of each step of one run, and how many outcomes it had."""
    homes, seconds = open_homes(root), dict[str, float]()
    with Clock() as clock:
        files = homes.files(TENANT)
    seconds["read the journal"] = clock.wall
    with Clock() as clock:
        planned = plan(rules(6), files, NOW, TIERS)
    seconds["plan"] = clock.wall
    with Clock() as clock:
        outcomes = converge(planned, homes)
    seconds["converge"] = clock.wall
    with Clock() as clock:
        assert homes.faults(TENANT) == []
    seconds["read every file"] = clock.wall
    with Clock() as clock:
        assert homes.scan(TENANT, TIERS[0]).added == 0
    seconds["look at a tier"] = clock.wall
    with Clock() as clock:
        assert plan(rules(6), homes.files(TENANT), NOW, TIERS).actions == ()
    seconds["plan again: nothing"] = clock.wall
    homes.close()
    assert all(outcome.status == "success" for outcome in outcomes)
    return seconds, len(outcomes)


def main() -> None:
    files, lives = (
        int(sys.argv[number]) if len(sys.argv) > number else most for number, most in ((1, 10_000), (2, 20))
    )
    root = Path(tempfile.mkdtemp(prefix="nexus-policy-"))
    try:
        with Clock() as building:
            build(root, files)
        killed, spent = measure_killed(root, files, lives)
        seconds, outcomes = measure_whole(root)
    finally:
        shutil.rmtree(root)
    print_table(
        ["step", "seconds"],
        [
            ["write and enter the files", building.wall], [f"{lives} lives, {killed} killed, and the last", spent],
            *([name, value] for name, value in seconds.items()),
        ],
    )  # fmt: skip
    figures = {
        "files": files, "killed": killed, "seconds_killed": spent, "seconds_converge": seconds["converge"],
        "moves_per_second": outcomes / seconds["converge"], "plan_ms_per_1000": seconds["plan"] / files * 1e6,
    }  # fmt: skip
    print_result("policy", figures, ["fsspec"])


if __name__ == "__main__":
    main()
