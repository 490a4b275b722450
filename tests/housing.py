"""What a process does that keeps house, for tests to kill; and what must be true of its files afterwards.

A house has tiers `hot`, `warm` and `cold` below one folder, and files whose bytes follow from their paths. In turn t
every file is wanted on the tier that its number and t say, and every tenth has a replica on the tier after that one.
"""

import hashlib
import multiprocessing
import os
import random
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from nexus.failpoints import POINTS
from nexus.homes import Homes
from nexus.policy import BATCH, Rule, converge, parse_rule, plan
from nexus.registry import open_tier
from nexus.types import StoredFile, content_digest

TIERS = ("hot", "warm", "cold")
TENANT = "acme"
NOW = 1_800_000_000.0
FOLDERS = 50


def path_of(number: int) -> str:
    return f"{number % FOLDERS:02}/run {number}.bag"


def bytes_of(path: str) -> bytes:
    """Of a length of its own, so that half a file is known by its size."""
    seed = hashlib.blake2b(path.encode()).digest()
    return seed * (1 + seed[0] % 8) + path.encode()


def build(root: Path, files: int) -> None:
    """The tiers, all files on the first, and the journal that knows them."""
    for tier in TIERS:
        (root / tier).mkdir(parents=True)
    for folder in range(FOLDERS):
        (root / TIERS[0] / TENANT / f"{folder:02}").mkdir(parents=True)
    for number in range(files):
        (root / TIERS[0] / TENANT / path_of(number)).write_bytes(bytes_of(path_of(number)))
    homes = open_homes(root)
    assert homes.scan(TENANT, TIERS[0]).added == files
    homes.close()


def open_homes(root: Path) -> Homes:
    return Homes(root / "home", {name: open_tier(f"file:{root}/{name}") for name in TIERS})


def rules(turn: int) -> list[Rule]:
    """Even and odd ones go to different tiers; those ending in 0 have a replica as well."""
    home = {"even": TIERS[turn % 3], "odd": TIERS[(turn + 1) % 3]}
    trees: list[dict[str, object]] = [
        {
            "name": name, "actions": [{"type": "move", "target": tier}],
            "conditions": [{"field": "path", "operator": "matches", "value": f"*[{digits}].bag"}],
        }
        for (name, tier), digits in zip(home.items(), ("02468", "13579"), strict=True)
    ]  # fmt: skip
    trees.append(
        {
            "name": "replica", "actions": [{"type": "replicate", "targets": [TIERS[(turn + 2) % 3]]}],
            "conditions": [{"field": "path", "operator": "ends_with", "value": "0.bag"}],
        }
    )  # fmt: skip
    return [parse_rule(tree) for tree in trees]


EXPIRY = -1  # the turn in which those ending in 7 are deleted, but for those that are held


def expiry() -> list[Rule]:
    def about(digits: str) -> list[dict[str, object]]:
        return [{"field": "path", "operator": "ends_with", "value": f"{digits}.bag"}]

    return [
        parse_rule({"name": "expiry", "priority": 9, "actions": [{"type": "delete"}], "conditions": about("7")}),
        parse_rule({"name": "case", "actions": [{"type": "hold"}], "conditions": about("17")}),
    ]


def check_expired(root: Path, files: int) -> None:
    """What was to go is nowhere, what is held is there, and everything else as it was."""
    numbers = [number for number in range(files) if number % 10 != 7 or number % 100 == 17]
    assert lying(root) == {path_of(number): {TIERS[0]: len(bytes_of(path_of(number)))} for number in numbers}
    homes = open_homes(root)
    assert homes.recover() == 0 and homes.faults(TENANT) == []
    assert {file.path for file in homes.files(TENANT)} == {path_of(number) for number in numbers}
    assert [file.path for file in homes.files(TENANT) if file.holds] == [path_of(17)]
    assert plan(expiry(), homes.files(TENANT), NOW, TIERS).actions == ()
    homes.close()


def keep(root: Path, turn: int, testing: dict[str, str], progress: Connection | None = None) -> None:
    """Evaluate the rules of this turn and converge, telling after every action how many outcomes there are."""
    os.environ.update(testing)
    homes = open_homes(root)
    homes.recover()  # as whoever looks at the tiers first does
    done = converge(
        plan(expiry() if turn == EXPIRY else rules(turn), homes.files(TENANT), NOW, TIERS), homes,
        lambda outcomes: progress.send(len(outcomes)) if progress is not None else None,
    )  # fmt: skip
    homes.close()
    failed = [outcome for outcome in done if outcome.status != "success"]
    assert not failed, failed[:3]


def lying(root: Path) -> dict[str, dict[str, int]]:
    """{path: {tier: size}} of all that lies in the tiers' folders, whatever Nexus left beside, too."""
    found: dict[str, dict[str, int]] = {}
    for tier in TIERS:
        top = root / tier / TENANT
        for folder, _, names in os.walk(top):
            for name in names:
                file = os.path.join(folder, name)
                found.setdefault(os.path.relpath(file, top), {})[tier] = os.stat(file).st_size
    return found


def check_after_kill(root: Path, files: int) -> None:
    """Right after a kill every file is whole where the journal says that it lives."""
    there = lying(root)
    homes = open_homes(root)
    known = homes.files(TENANT)
    homes.close()
    assert len(known) == files
    lost = [file for file in known if there.get(file.path, {}).get(file.tier) != file.size]
    assert not lost, f"lost: {lost[:3]}"


def check_at_rest(root: Path, turn: int, files: int) -> None:
    """Every file has exactly one home, the one that is wanted, and its bytes; nothing else lies anywhere."""
    homes = open_homes(root)
    known = homes.files(TENANT)
    assert homes.faults(TENANT) == [] and homes.recover() == 0
    assert plan(rules(turn), known, NOW, TIERS).actions == ()
    homes.close()
    assert len(known) == files
    there = lying(root)
    assert {path: set(tiers) for path, tiers in there.items()} == {
        file.path: {file.tier, *file.replicas} for file in known
    }
    for file in known:
        assert file.checksum == content_digest(bytes_of(file.path))
        for tier in there[file.path]:
            assert (root / tier / TENANT / file.path).read_bytes() == bytes_of(file.path)
    assert {file.path for file in known} == {path_of(number) for number in range(files)}
    assert [wanted_home(file, turn) for file in known] == [file.tier for file in known]


def wanted_home(file: StoredFile, turn: int) -> str:
    number = int(file.path.removesuffix(".bag").rpartition(" ")[2])
    return TIERS[(turn + number % 2) % 3]


# ── processes ───────────────────────────────────────────────────────────────────────────────────

POINTS_HERE = sorted(point for point in POINTS if point.startswith(("homes.", "policy.")))
PER_FILE = ("homes.before_copy", "homes.inside_copy", "homes.after_copy")
_forks = multiprocessing.get_context("forkserver")  # a process that has imported everything, and forks for each run
_forks.set_forkserver_preload(["tests.housing", "nexus.tiers.filesystem"])


def run(root: Path, turn: int, failpoint: str = "") -> int:
    """Exit code of a process that converges in this turn; -9 where the failpoint killed it."""
    testing = {"NEXUS_TESTING": "1", "NEXUS_FAILPOINT": failpoint} if failpoint else {}
    process = _forks.Process(target=keep, args=(root, turn, testing))
    process.start()
    return _ended(process)


def run_until_told(root: Path, turn: int, times: int) -> int:
    """The same, killed from outside once it has told so often what it did, wherever it is by then."""
    told, progress = multiprocessing.Pipe(duplex=False)
    process = _forks.Process(target=keep, args=(root, turn, {}, progress))
    process.start()
    progress.close()
    with suppress(EOFError):  # it is at its end
        for _ in range(times):
            told.recv()
    process.kill()
    return _ended(process)


def kill_somewhere(root: Path, turn: int, files: int, dice: random.Random, from_outside: bool) -> int:
    """Exit code of a process that dies in about the first fifth of its work."""
    batches = max(1, files // BATCH // 5)
    if from_outside:
        return run_until_told(root, turn, dice.randint(1, batches))
    point = dice.choice(POINTS_HERE)
    return run(root, turn, f"{point}:kill@{dice.randint(1, files // 5 if point in PER_FILE else batches)}")


def _ended(process: BaseProcess) -> int:
    process.join(300)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode
