"""Whether an embedder is faster in int8 on this machine: tried once in a process of its own, and kept.

    python -m nexus.precision ADDRESS       tries it, and prints what came out as one JSON object

A setting of `auto` becomes bf16 or int8 here, once for a whole Nexus, before any of its processes is told: all
machines make the same vectors, also those where the other would be faster. A trial that fails or is killed changes
nothing: without one it is bf16, and the next start tries again.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Literal

from nexus import quantized
from nexus.config import Config, Served
from nexus.errors import ConfigError
from nexus.models import sentence_transformer
from nexus.ports import Embedder
from nexus.types import digest

Chosen = Literal["bf16", "int8"]

WORTH = 1.25  # times as fast int8 has to be, for it is a little less exact
ROUNDS = 3
TRIAL_SECONDS = 90.0
LIBRARIES = (*quantized.LIBRARIES, "torch")
# The model may be on other machines alone, or damaged: whoever loads it says so. A library may be missing.
UNKNOWN = (ConfigError, OSError, ValueError, metadata.PackageNotFoundError)

log = logging.getLogger("nexus.precision")


def settle(config: Config, tell: Callable[[str], None]) -> None:
    """Try what was not tried here yet, for each embedder of ours on a CPU whose precision is `auto`.

    `tell` is told before a trial, which takes some seconds.
    """
    for model in config.models.of_task("embed"):
        if _is_open(model):
            choose(model.address, tell)


def resolved(config: Config) -> Config:
    """The same, with each `auto` of such an embedder replaced by what was chosen for it here, or by bf16."""
    models = config.models
    own = _resolve(models.of_task("embed")[0]).precision
    served = tuple(_resolve(model) for model in models.served)
    return config.model_copy(update={"models": models.model_copy(update={"precision": own, "served": served})})


def _resolve(model: Served) -> Served:
    return model.model_copy(update={"precision": chosen(model.address) or "bf16"}) if _is_open(model) else model


def _is_open(model: Served) -> bool:
    is_ours = model.task == "embed" and model.address.startswith(sentence_transformer.SCHEME)
    return is_ours and model.precision == "auto" and model.device == "cpu"


def chosen(address: str) -> Chosen | None:
    """What a trial on this machine chose; None without one."""
    try:
        return _choice(_path(address).read_bytes())
    except UNKNOWN:
        return None


def choose(address: str, tell: Callable[[str], None]) -> None:
    """Try it, unless that was done."""
    try:
        path = _path(address)
    except UNKNOWN:
        return
    if chosen(address) is not None:
        return
    tell(f"Trying once whether {address.removeprefix(sentence_transformer.SCHEME)} is faster in int8 here …")
    tried = _try(address)
    if tried is None:
        return
    try:
        quantized.write_whole(path, tried)
    except OSError as error:
        log.warning("the embedder stays at bf16, for what was tried cannot be kept: %s", error.strerror)


def _path(address: str) -> Path:
    """Where a choice is kept: for these weights, this processor and these libraries. Raises ConfigError."""
    versions = [metadata.version(name) for name in LIBRARIES]
    name = digest(quantized.FORM, sentence_transformer.fingerprint_of(address), _processor(), *versions)
    return quantized.cache_folder() / f"precision-{name}.json"


def _processor() -> str:
    """What this machine computes with, in words that change with its abilities."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor() or platform.machine()


def _choice(tried: bytes) -> Chosen | None:
    """What a trial chose; None for what is no trial's words."""
    try:
        chosen = json.loads(tried)["chosen"]
    except (ValueError, KeyError, TypeError):
        return None
    return chosen if chosen in ("bf16", "int8") else None


def _try(address: str) -> bytes | None:
    """What the trial prints; None, with a line in the log, where it does not get so far."""
    command = [sys.executable, "-m", "nexus.precision", address]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    try:
        done = subprocess.run(
            command, env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
            stdin=subprocess.DEVNULL, timeout=TRIAL_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the embedder stays at bf16, for int8 could not be tried: %s", error)
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and _choice(lines[-1]):
        return lines[-1]
    said = done.stderr.decode(errors="replace").strip().splitlines()
    log.warning(
        "the embedder stays at bf16, for the trial of int8 ended with %d: %s",
        done.returncode,
        said[-1] if said else "it said nothing",
    )
    return None


# In the process of the trial


def main(address: str) -> None:
    try:
        reduced = sentence_transformer.open(address, threads=1, precision="int8")
    except ConfigError as error:  # no fault: this model is none, or not exact enough
        print(json.dumps({"chosen": "bf16", "why": error.message}))
        return
    exact = sentence_transformer.open(address, threads=1, precision="bf16")
    times = speed_over(reduced, exact)
    print(json.dumps({"chosen": "int8" if times >= WORTH else "bf16", "int8_over_bf16": round(times, 3)}))


def speed_over(one: Embedder, other: Embedder) -> float:
    """How many times as fast one is, in CPU seconds of this thread, over passages as documents have them and questions.

    Questions come one at a time, where other things take time than in passages. Both count alike: it is the geometric
    mean of the two.
    """
    sentence = "Part {} of the pump stands on shelf {} and is checked every {} hours by whoever is on duty."
    passages = [" ".join(sentence.format(row, row % 7, line) for line in range(1, 3 + row)) for row in range(8)]
    questions = [f"Which part of the pump stands on shelf {row} while nobody is on duty?" for row in range(8)]
    return sqrt(_times(one, other, [passages]) * _times(one, other, [[question] for question in questions]))


def _times(one: Embedder, other: Embedder, calls: Sequence[Sequence[str]]) -> float:
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        for embedder, taken in zip((one, other), seconds, strict=True):
            started = time.thread_time()
            for texts in calls:
                embedder.embed(texts)
            if turn:  # the first is to warm up
                taken.append(time.thread_time() - started)
    return median(theirs / own for own, theirs in zip(*seconds, strict=True))


if __name__ == "__main__":
    main(sys.argv[1])
