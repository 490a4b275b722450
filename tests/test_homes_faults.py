"""Kill -9 at every failpoint and anywhere else: every file still has exactly one home, and all of its bytes."""

import multiprocessing
import random
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL

import pytest

from nexus.failpoints import POINTS
from nexus.policy import BATCH
from tests import housing
from tests.housing import build, check_after_kill, check_at_rest, draw_death

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

MINE = sorted(point for point in POINTS if point.startswith(("homes.", "policy.")))
FEW = 30
_forks = multiprocessing.get_context("forkserver")  # a process that has imported everything, and forks for each run
_forks.set_forkserver_preload(["tests.housing", "nexus.tiers.filesystem"])


def run(root: Path, turn: int, failpoint: str = "") -> int:
    """Exit code of a process that converges in this turn; -9 where the failpoint killed it."""
    testing = {"NEXUS_TESTING": "1", "NEXUS_FAILPOINT": failpoint} if failpoint else {}
    process = _forks.Process(target=housing.keep, args=(root, turn, testing))
    process.start()
    return ended(process)


def run_until_told(root: Path, turn: int, times: int) -> int:
    """The same, killed from outside once it has told so often what it did, wherever it is by then."""
    told, progress = multiprocessing.Pipe(duplex=False)
    process = _forks.Process(target=housing.keep, args=(root, turn, {}, progress))
    process.start()
    progress.close()
    try:
        for _ in range(times):
            told.recv()
    except EOFError:
        pass  # it is at its end
    process.kill()
    return ended(process)


def ended(process: BaseProcess) -> int:
    process.join(300)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", MINE)
def test_a_kill_at_any_point_loses_doubles_and_mixes_nothing(tmp_path: Path, point: str, nth: int) -> None:
    build(tmp_path, FEW)
    assert run(tmp_path, 1, f"{point}:kill@{nth}") == -SIGKILL
    check_after_kill(tmp_path, FEW)
    assert run(tmp_path, 1) == 0
    check_at_rest(tmp_path, 1, FEW)


@pytest.mark.parametrize("point", MINE)
def test_who_makes_good_after_a_kill_may_be_killed_too(tmp_path: Path, point: str) -> None:
    build(tmp_path, FEW)
    assert run(tmp_path, 1, "homes.after_switch:kill,homes.after_copy:kill@9") == -SIGKILL
    run(tmp_path, 1, f"{point}:kill")
    check_after_kill(tmp_path, FEW)
    assert run(tmp_path, 2) == 0  # with other rules by now
    check_at_rest(tmp_path, 2, FEW)


def test_a_policy_run_killed_20_times_leaves_every_file_one_home(tmp_path: Path) -> None:
    files, lives = 2000, 20  # 10,000 in tests/bench/policy.py
    build(tmp_path, files)
    dice = random.Random(11)
    killed = 0
    for life in range(lives):
        turn = 1 + life // 5
        if life % 4:
            died = run(tmp_path, turn, draw_death(dice, MINE, files, BATCH))
        else:
            died = run_until_told(tmp_path, turn, dice.randint(1, 3))
        assert died in (-SIGKILL, 0)
        killed += died == -SIGKILL
        check_after_kill(tmp_path, files)
    assert killed >= lives - 3
    assert run(tmp_path, 5) == 0
    check_at_rest(tmp_path, 5, files)
