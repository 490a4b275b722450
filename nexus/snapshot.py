"""The rows of a tenant in a file, so that a process which starts need not read all texts again.

A file is FORM, the CRC-32 of all that follows it, the length of a description, the description, and the arrays one
after the other, each as it lies in memory, and aligned. What is not whole, of another form, or not of what is asked for
is none.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import orjson
import psutil

from nexus.terms import shadow

FORM = b"nexus rows 3\n"
SUM_BYTES, LENGTH_BYTES = 4, 8
START = len(FORM) + SUM_BYTES + LENGTH_BYTES  # of the description
ALIGNED = 64  # each array begins so many bytes after the first, or a multiple of them
SAMPLE = "The grippers' torque was limited to 12 Nm; Müller’s arm isn't running."  # whose terms say how terms are made


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Arrays, and what stands beside them in a form that JSON knows."""

    about: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]


def write(path: Path, snapshot: Snapshot) -> None:
    """In place of the file there, all at once, for its owner alone. Raises OSError."""
    arrays = [np.ascontiguousarray(array) for array in snapshot.arrays.values()]
    shapes = [[name, array.dtype.str, array.shape] for name, array in snapshot.arrays.items()]
    about = orjson.dumps({"about": snapshot.about, "arrays": shapes, "terms": shadow(SAMPLE)})
    parts: list[Any] = [about]
    for array in arrays:
        parts += [array.reshape(-1).view(np.uint8), bytes(_gap(array.nbytes))]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.writelines([_head(len(about), parts), *parts])
    os.replace(beside, path)


def is_being_written(path: Path) -> bool:
    """Whether this is a file to be, of a process that runs: what a killed one left is not."""
    writer = path.suffix.removeprefix(".")
    return writer.isdecimal() and psutil.pid_exists(int(writer))


def read(path: Path) -> Snapshot | None:
    """What was written there; None where that is nothing, or damaged. Raises OSError."""
    try:
        with path.open("rb") as file:
            head = file.read(START)
            length = int.from_bytes(head[-LENGTH_BYTES:], "big")
            about = file.read(min(length, os.fstat(file.fileno()).st_size))
            content = file.read()  # in memory of its own: arrays go on using it
    except FileNotFoundError:
        return None
    if head != _head(len(about), [about, content]):
        return None
    told = orjson.loads(about)
    if told["terms"] != shadow(SAMPLE):
        return None
    arrays, place = {}, 0
    for name, kind, shape in told["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(content, np.dtype(kind), count, place).reshape(shape)
        place += arrays[name].nbytes + _gap(arrays[name].nbytes)
    return Snapshot(told["about"], arrays)


def _head(length: int, parts: Iterable[Any]) -> bytes:
    """What stands before a description of so many bytes, and the rest."""
    told = length.to_bytes(LENGTH_BYTES, "big")
    found = crc32(told)
    for part in parts:
        found = crc32(part, found)
    return FORM + found.to_bytes(SUM_BYTES, "big") + told


def _gap(size: int) -> int:
    """How many bytes are to follow so many, until an array may begin."""
    return -size % ALIGNED
