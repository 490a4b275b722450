"""The worked example's plan, applied on real Ray nodes with fake GPUs: everything is where the plan has it."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from cluster.bootstrap import STARTING
from tests.running import ROOT, Running
from tests.test_planning import file, settings  # noqa: F401

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture
def applied(file: Path, tmp_path: Path) -> Any:  # noqa: F811
    """The plan, and what Ray says of it."""
    environment = Running(tmp_path / "home", 0).environment
    del environment["NEXUS_HTTP__PORT"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan_applied", str(file), str(tmp_path / "said.json")],
        cwd=ROOT, text=True, capture_output=True,
        stdin=subprocess.DEVNULL, check=False, timeout=580,
        env={**environment, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1", **STARTING},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "said.json").read_text())


def test_every_replica_is_on_its_machine_with_its_share_and_no_gpu_is_promised_twice(applied: Any) -> None:
    planned = [one for one in applied["plan"] if one["want"].startswith(("generator", "embedder", "reranker"))]
    expected = Counter(f"{one['want']}@{one['node']}" for one in planned)
    found = Counter(one["deployment"] for one in applied["replicas"] if one["deployment"] != "roster")
    assert found == expected and len(expected) == 8, "two machines, and on each all four models"
    for one in applied["replicas"]:
        assert one["node"] == (one["deployment"].partition("@")[2] or "witness"), one

    share = {f"{one['want']}@{one['node']}": one["gpu_share"] for one in planned}
    used: dict[tuple[str, int], float] = defaultdict(float)
    for one in applied["replicas"]:
        if one["deployment"].startswith(("embedder", "reranker")):
            assert one["share"] == pytest.approx(share[one["deployment"]]) and len(one["gpus"]) == 1, one
            used[one["node"], one["gpus"][0]] += one["share"]
    assert used and max(used.values()) <= 1

    engines = sorted(sorted([node, gpu] for node, gpu in bundles) for bundles in applied["groups"])
    assert engines == sorted(
        [[one["node"], one["gpu_share"]]] * len(one["gpus"]) for one in planned if one["want"].startswith("generator")
    )
