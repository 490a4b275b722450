"""`nexus add`: what goes into one request, and when its job is looked at again."""

import subprocess
import sys
from itertools import pairwise

import pytest

from deployments.adding import POLL_SECONDS, REQUEST_BYTES, REQUEST_FILES, _batches, _pause


def test_work_begins_with_a_few_files_and_the_rest_comes_in_ever_fewer_requests() -> None:
    batches = list(_batches([1] * 1000, range(1000)))
    assert [number for batch in batches for number in batch] == list(range(1000))
    first, most = REQUEST_FILES
    assert [len(batch) for batch in batches[:2]] == [first, 2 * first]
    assert all(len(after) >= len(before) for before, after in pairwise(batches[:-1]))
    assert max(map(len, batches)) == most


def test_a_request_is_no_larger_than_it_may_be() -> None:
    sizes = [REQUEST_BYTES // 2, REQUEST_BYTES, 1, REQUEST_BYTES - 1, 1]
    assert list(_batches(sizes, [0, 1, 2, 3, 4])) == [[0], [1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("left", "last", "pause"),
    [
        (1000.0, 0.1, POLL_SECONDS[1]),
        (1.0, 1.0, 0.5),
        (0.0, 1.0, POLL_SECONDS[0]),
        (None, 0.1, pytest.approx(0.15)),
        (None, 1.0, POLL_SECONDS[1]),
    ],
    ids=["long to go", "nearly there", "just now", "not known", "not known for long"],
)
def test_a_job_is_looked_at_the_more_often_the_sooner_it_ends(left: float | None, last: float, pause: float) -> None:
    assert _pause(left, last) == pause


def test_the_command_line_loads_none_of_what_reads_or_embeds() -> None:
    command = "import sys, deployments.cli, deployments.adding; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "nexus.parsing", "nexus.ingest", "nexus.chunking", "ray", "torch"} & set(loaded)
