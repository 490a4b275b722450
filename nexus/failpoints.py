"""Named places where a test may kill the process, raise, or wait: the only proof that a crash does no harm.

`NEXUS_FAILPOINT=ingest.after_stage:kill@3` kills this process with SIGKILL on its third pass through that point.
Actions are `kill`, `raise` and `sleep:SECONDS`; `@n` is the n-th pass, and without it every pass; several are
separated by commas. Nothing of this works unless `NEXUS_TESTING=1`; `load_config` refuses to start otherwise.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nexus.errors import ConfigError

MOVES = ("accept", "begin", "parse", "embed", "stage", "publish", "finish", "delete", "retire", "purge")
KEY_MOVES = ("write", "forget")
BLOCK_MOVES = ("seal", "register", "rename", "rewrap", "delete")
FILE_MOVES = ("intend", "copy", "settle", "switch", "remove", "forget")
INDEX_MOVES = ("begin", "fill", "judge", "switch", "adopt", "forget")


def _around(part: str, moves: Iterable[str]) -> set[str]:
    return {f"{part}.{when}_{move}" for move in moves for when in ("before", "after")}


POINTS = frozenset(
    _around("ingest", MOVES)
    | {"ingest.between_stores", "ingest.inside_publish"}  # rows staged, vectors not; written, not yet committed
    | _around("keys", KEY_MOVES)
    | _around("blocks", BLOCK_MOVES)
    | _around("policy", ("action",))
    | _around("homes", FILE_MOVES)
    | {"homes.inside_copy"}  # written, under a name that does not count yet
    | {"memory.before_replace", "memory.inside_replace", "memory.inside_drop"}
    | _around("reindex", INDEX_MOVES)
    | {"reindex.between_stores"}  # the vectors of a version brought in, not yet its chunks
    | {"reindex.inside_forget"}  # some of the chunks of an index that leaves, not all
)
_SPEC = re.compile(r"(?P<point>[\w.]+):(?P<action>kill|raise|sleep:(?P<seconds>\d+(?:\.\d+)?))(?:@(?P<nth>[1-9]\d*))?")


class FailpointReached(RuntimeError):
    """What the action `raise` raises: deliberately no NexusError, for it stands for a bug."""


@dataclass(slots=True)
class _Failpoint:
    action: str
    seconds: float
    nth: int | None
    passes: int = 0


_lock = threading.Lock()
_active: dict[str, _Failpoint] | None = None


def pass_through(point: str) -> None:
    """Do what the environment asks for at this point; nothing, in all of ordinary life."""
    global _active
    if _active is None:
        _active = parse_failpoints(os.environ)
    failpoint = _active.get(point)
    if failpoint is None:
        return
    with _lock:
        failpoint.passes += 1
        if failpoint.nth not in (None, failpoint.passes):
            return
    if failpoint.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if failpoint.action == "raise":
        raise FailpointReached(point)
    time.sleep(failpoint.seconds)


def parse_failpoints(environment: Mapping[str, str]) -> dict[str, _Failpoint]:
    """What the environment asks for, by point. Raises ConfigError for nonsense, and without NEXUS_TESTING=1."""
    specs = [spec.strip() for spec in environment.get("NEXUS_FAILPOINT", "").split(",") if spec.strip()]
    if specs and environment.get("NEXUS_TESTING") != "1":
        raise ConfigError("NEXUS_FAILPOINT breaks Nexus on purpose and works only with NEXUS_TESTING=1; unset it")
    found = {}
    for spec in specs:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise ConfigError(f"NEXUS_FAILPOINT: {spec!r} is not POINT:ACTION or POINT:ACTION@N")
        if match["point"] not in POINTS:
            raise ConfigError(f"NEXUS_FAILPOINT: no point {match['point']!r}; there are {', '.join(sorted(POINTS))}")
        nth = int(match["nth"]) if match["nth"] else None
        found[match["point"]] = _Failpoint(match["action"].partition(":")[0], float(match["seconds"] or 0), nth)
    return found
