"""What the processes of one machine have counted, in files that outlive them, summed exactly and kept few.

Each process adds to files of its own, named after a life that no other process ever has; it holds a lock on the file
`LIFE.life` until it ends, however it ends. Whoever reads (`read`) first adds up the files of lives that have ended:
`folded.json` is written anew, whole, with the sums and the names of those lives, and then their files are removed. A
life that it names is counted nowhere else, so whoever is killed in between leaves nothing lost and nothing twice.
What is read is on the disk before it is told: not even a machine without power goes back behind that.

Counts are sums by kind ("counter", "histogram") and by key, which is prometheus_client's own. They are kept as
fractions: in whatever order they are added, the sum is the same, and never a rounding smaller than before, which
Prometheus would take for a new beginning. So of two readings of one folder the larger is the later. A folder that was
lost begins anew under another origin; `keep` adds what each origin of each other machine told last, for as long as
that machine is away.
"""

import fcntl
import json
import logging
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from io import TextIOWrapper
from pathlib import Path

import prometheus_client.values
from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.utils import floatToGoString

log = logging.getLogger("nexus.counts")

KINDS = ("counter", "histogram")
LIFE, FOLDED, LOCK = ".life", "folded.json", "lock"
KEPT_NAMES = 1_000  # of lives and of origins that have ended: a name is of use for moments
UNREADABLE = (ValueError, OverflowError, RuntimeError, struct.error)  # what a file from before a power cut may raise

Counts = Mapping[str, Mapping[str, Fraction]]


@dataclass(frozen=True, slots=True)
class Reading:
    """What all processes of a folder have counted since it began; `origin` is that folder's own."""

    origin: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class _Folded:
    """What is in a file: `counts` of those that are named in `ended`, and of nobody else."""

    origin: str = ""
    ended: tuple[str, ...] = ()
    counts: Counts = field(default_factory=dict)
    last: Mapping[str, Counts] = field(default_factory=dict)  # of another machine's origins


# ── a process and its files ─────────────────────────────────────────────────────────────────────


class Life:
    """The name under which this process counts; a child that was forked has one of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process, self._name = 0, ""
        self._mark: TextIOWrapper | None = None

    def __call__(self) -> str:
        if self._process != os.getpid():
            self._name, self._mark = self._begin()
            self._process = os.getpid()
        return self._name

    def _begin(self) -> tuple[str, TextIOWrapper]:
        while True:
            name = f"{os.getpid()}-{secrets.token_hex(8)}"
            mark = (self._folder / f"{name}{LIFE}").open("x")
            if _is_locked(mark) and (self._folder / f"{name}{LIFE}").exists():
                return name, mark
            mark.close()  # somebody took it for that of a process that has ended


def count_in(folder: Path) -> None:
    """Metrics that are made in this process from now on count in this folder.

    Ray's processes have metrics of their own by the same library, which are not to be here: so they are not told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    made = prometheus_client.values.MultiProcessValue(Life(folder))  # type: ignore[no-untyped-call]
    prometheus_client.values.ValueClass = made


# ── all processes of a machine ──────────────────────────────────────────────────────────────────


def read(folder: Path) -> Reading:
    """The sums over all processes there ever were."""
    fold(folder)
    while True:
        before = _content(folder / FOLDED)
        folded = _parse(before)
        with suppress(FileNotFoundError):  # folded meanwhile
            counted = [_read_file(file) for file in _files(folder) if _life_of(file) not in folded.ended]
            if _content(folder / FOLDED) == before:
                return Reading(folded.origin, add(folded.counts, *counted))


def fold(folder: Path) -> None:
    """Add up the files of processes that have ended; nothing where another process does that just now."""
    with ExitStack() as held:
        if not _lock(folder, held):
            return
        folded, lives = _parse(_content(folder / FOLDED)), _ended(folder, held)
        files = [file for file in _files(folder) if _life_of(file) in lives]
        new = [file for file in files if _life_of(file) not in folded.ended]
        if new or not folded.origin:
            ended = tuple(dict.fromkeys((*folded.ended, *map(_life_of, new))))[-KEPT_NAMES:]
            counts = add(folded.counts, *map(_read_file, new))
            _write(folder / FOLDED, _Folded(folded.origin or secrets.token_hex(8), ended, counts))
        for file in files:
            file.unlink()
        for life in lives:
            (folder / f"{life}{LIFE}").unlink(missing_ok=True)


def _ended(folder: Path, held: ExitStack) -> set[str]:
    """The lives whose processes have ended; their marks are held, so that nobody takes one of them for his own."""
    lives = {_life_of(file) for file in _files(folder)} | {mark.stem for mark in folder.glob(f"*{LIFE}")}
    return {life for life in lives if _has_ended(folder / f"{life}{LIFE}", held)}


def _has_ended(mark: Path, held: ExitStack) -> bool:
    try:
        return _is_locked(held.enter_context(mark.open()))
    except FileNotFoundError:  # removed last, by whoever folded it
        return True


def _lock(folder: Path, held: ExitStack) -> bool:
    return _is_locked(held.enter_context((folder / LOCK).open("w")))


def _is_locked(file: TextIOWrapper) -> bool:
    """Whether it is now, by us and for as long as it is open."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _files(folder: Path) -> Iterator[Path]:
    return (file for kind in KINDS for file in folder.glob(f"{kind}_*.db"))


def _life_of(file: Path) -> str:
    return file.stem.partition("_")[2]


def _read_file(file: Path) -> Counts:
    """One process' counts of one kind, as far as they can be read; then they are on the disk."""
    found: dict[str, Fraction] = {}
    with file.open("rb") as opened:
        is_new = not os.fstat(opened.fileno()).st_size
        try:
            entries = () if is_new else MmapedDict.read_all_values_from_file(opened.name)  # type: ignore[no-untyped-call]
            for key, value, *_ in entries:
                json.loads(key)
                found[key] = Fraction(value)
        except UNREADABLE as error:
            log.warning("a part of %s cannot be read (%s): the machine ended while it was written", file.name, error)
        os.fsync(opened.fileno())
    return {file.stem.partition("_")[0]: found}


# ── all machines ────────────────────────────────────────────────────────────────────────────────


def keep(folder: Path, machine: str, told: Reading | None) -> Counts:
    """What a machine has counted in all, with what it tells now; None where it tells nothing: then what it told last.

    This is kept in the folder. A machine whose own folder was lost counts on from what it had told.
    """
    folder.mkdir(exist_ok=True)
    file = folder / f"{machine}.json"
    with ExitStack() as held:
        is_ours = _lock(folder, held)
        kept = _parse(_content(file))
        if told is None or told.origin in kept.ended:
            return add(kept.counts, *kept.last.values())
        former = {origin: counts for origin, counts in kept.last.items() if origin != told.origin}
        now = _larger(kept.last.get(told.origin, {}), told.counts)
        counts = add(kept.counts, *former.values())
        if is_ours and now != kept.last.get(told.origin):
            _write(file, _Folded("", (*kept.ended, *former)[-KEPT_NAMES:], counts, {told.origin: now}))
    return add(counts, now)


def add(*all: Counts) -> Counts:
    """Key by key."""
    return _merge(all, lambda one, other: one + other)


def _larger(*all: Counts) -> Counts:
    return _merge(all, max)


def _merge(all: Iterable[Counts], how: Callable[[Fraction, Fraction], Fraction]) -> Counts:
    merged: dict[str, dict[str, Fraction]] = {}
    for counts in all:
        for kind, values in counts.items():
            into = merged.setdefault(kind, {})
            for key, value in values.items():
                into[key] = how(into[key], value) if key in into else value
    return merged


# ── as Prometheus reads them ────────────────────────────────────────────────────────────────────


def families(counts: Counts) -> list[Metric]:
    """The same as metrics with samples; the buckets of histograms add up, as Prometheus wants it."""
    found: dict[str, Metric] = {}
    buckets: dict[tuple[str, str], dict[float, Fraction]] = {}
    for kind, values in counts.items():
        for key, value in values.items():
            name, sample, labels, help = json.loads(key)
            metric = found.setdefault(name, Metric(name, help, kind))
            if "le" in labels:
                series = json.dumps({label: labels[label] for label in labels if label != "le"})
                buckets.setdefault((name, series), {})[float(labels["le"])] = value
            else:
                metric.add_sample(sample, labels, float(value))
    for (name, series), bucket in buckets.items():
        total, labels = Fraction(), json.loads(series)
        for bound, value in sorted(bucket.items()):
            total += value
            edge = floatToGoString(bound)  # type: ignore[no-untyped-call]
            found[name].add_sample(f"{name}_bucket", {**labels, "le": edge}, float(total))
        found[name].add_sample(f"{name}_count", labels, float(total))
    return [found[name] for name in sorted(found)]


# ── files that are whole or not there ───────────────────────────────────────────────────────────


def _content(file: Path) -> bytes:
    with suppress(FileNotFoundError):
        return file.read_bytes()
    return b""


def _parse(content: bytes) -> _Folded:
    if not content:
        return _Folded()
    kept = json.loads(content)
    last = {origin: _exact(counts) for origin, counts in kept["last"].items()}
    return _Folded(kept["origin"], tuple(kept["ended"]), _exact(kept["counts"]), last)


def _exact(counts: Mapping[str, Mapping[str, str]]) -> Counts:
    return {kind: {key: Fraction(value) for key, value in values.items()} for kind, values in counts.items()}


def _write(file: Path, folded: _Folded) -> None:
    draft = file.with_suffix(".part")
    with draft.open("w") as opened:
        json.dump(asdict(folded), opened, default=str)
        opened.flush()
        os.fsync(opened.fileno())
    draft.replace(file)
