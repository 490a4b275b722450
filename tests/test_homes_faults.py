"""Kill -9 at every failpoint and anywhere else: every file still has exactly one home, and all of its bytes."""

import random
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.housing import (
    EXPIRY,
    POINTS_HERE,
    build,
    check_after_kill,
    check_at_rest,
    check_expired,
    kill_somewhere,
    run,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

FEW = 30


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", POINTS_HERE)
def test_a_kill_at_any_point_loses_doubles_and_mixes_nothing(tmp_path: Path, point: str, nth: int) -> None:
    build(tmp_path, FEW)
    assert run(tmp_path, 1, f"{point}:kill@{nth}") == -SIGKILL
    check_after_kill(tmp_path, FEW)
    assert run(tmp_path, 1) == 0
    check_at_rest(tmp_path, 1, FEW)


@pytest.mark.parametrize("point", POINTS_HERE)
def test_who_makes_good_after_a_kill_may_be_killed_too(tmp_path: Path, point: str) -> None:
    build(tmp_path, FEW)
    assert run(tmp_path, 1, "homes.after_switch:kill,homes.after_copy:kill@9") == -SIGKILL
    run(tmp_path, 1, f"{point}:kill")
    check_after_kill(tmp_path, FEW)
    assert run(tmp_path, 2) == 0  # with other rules by now
    check_at_rest(tmp_path, 2, FEW)


@pytest.mark.parametrize("point", [point for point in POINTS_HERE if point.endswith(("switch", "remove", "forget"))])
def test_a_kill_during_deletion_leaves_no_half_and_takes_nothing_held(tmp_path: Path, point: str) -> None:
    build(tmp_path, FEW)
    assert run(tmp_path, EXPIRY, f"{point}:kill") == -SIGKILL
    assert run(tmp_path, EXPIRY) == 0
    check_expired(tmp_path, FEW)


def test_a_policy_run_killed_20_times_leaves_every_file_one_home(tmp_path: Path) -> None:
    files, lives = 2000, 20  # 10,000 in tests/bench/policy.py
    build(tmp_path, files)
    dice = random.Random(11)
    killed = 0
    for life in range(lives):
        died = kill_somewhere(tmp_path, 1 + life // 5, files, dice, from_outside=life % 4 == 0)
        assert died in (-SIGKILL, 0)
        killed += died == -SIGKILL
        check_after_kill(tmp_path, files)
    assert killed >= lives - 3
    assert run(tmp_path, 5) == 0
    check_at_rest(tmp_path, 5, files)
