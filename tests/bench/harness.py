"""What the benches share. Import it before NumPy and torch: it pins their threads (BENCH_THREADS, default 1)."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus.ports import Embedder

__all__ = [
    "EMBEDDER", "POOLS", "THREADS", "Clock", "find_data", "median", "open_embedder", "percentile", "print_result",
    "print_table",
]  # fmt: skip

EMBEDDER = "sentence-transformer:all-MiniLM-L6-v2"

LOAD_BEFORE = os.getloadavg()[0]
THREADS = int(os.environ.get("BENCH_THREADS", "1"))

POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_PINS = dict.fromkeys(POOLS, str(THREADS)) | {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_worker_niceness": "0",  # a bench's own Ray starts them as Nexus' does: else whoever asks them has all cores
}
# Pools read these once, when they load. A process that a bench started inherits them and may be here late.
if {"numpy", "torch"} & sys.modules.keys() and not os.environ.items() >= _PINS.items():
    raise ImportError("import tests.bench.harness before numpy and torch: it pins their threads")
os.environ |= _PINS


class Clock:
    """Wall seconds of a `with` block, and the CPU seconds that this process spent in it."""

    wall = cpu = 0.0

    def __enter__(self) -> "Clock":
        self._wall, self._cpu = perf_counter(), process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = perf_counter() - self._wall, process_time() - self._cpu


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed."""
    return sorted(values)[max(ceil(len(values) * share) - 1, 0)]


def find_data(name: str) -> Path:
    """A file or folder of the corpora beside the repository; ends the bench when it is not there."""
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / name
    if not path.exists():
        sys.exit(f"no {name} in the folder shared/data beside the repository, which this bench measures on")
    return path


def open_embedder() -> "Embedder":
    """The default one in the precision that a Nexus on this machine chose, or in bf16 where none was started."""
    from nexus.precision import chosen
    from nexus.registry import open_part

    embedder: Embedder = open_part("models", EMBEDDER, threads=THREADS, precision=chosen(EMBEDDER) or "bf16")
    return embedder


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Numbers to the right, the rest to the left."""
    cells = [[_show(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    numeric = [isinstance(cell, int | float) for cell in rows[0]]
    for line in (headers, ["-" * width for width in widths], *cells):
        columns = zip(line, widths, numeric, strict=True)
        print("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns).rstrip())


def _show(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3f}"


def print_result(bench: str, figures: Mapping[str, float], packages: Sequence[str]) -> None:
    """The closing line of a bench: its figures with what they were measured on, as one JSON object."""
    result = {
        "bench": bench,
        "figures": {name: float(f"{value:.6g}") for name, value in figures.items()},
        "versions": {name: metadata.version(name) for name in packages},
        "threads": THREADS,
        "load": [LOAD_BEFORE, os.getloadavg()[0]],
    }
    print(json.dumps(result), flush=True)
