"""Kill -9 at every failpoint of the blocks and their keys, in real processes: nothing that was acknowledged is lost.

Each death is followed by a start that does the rest, as the next start of a machine does. Afterwards every block reads
as its last acknowledged version, none is under an old key, no draft is left, and no number was given twice.
"""

import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL

import pytest

from nexus.blocks import BlockStore
from nexus.failpoints import POINTS
from tests import keeping
from tests.sealing import TENANT, TEXT, machine, sealed
from tests.sealing import share as share_one

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

HERE = sorted(point for point in POINTS if point.startswith(("keys.", "blocks.")))
TWICE = {"keys.before_forget", "keys.after_forget"}  # each rotation passes them once, and there are two

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.keeping"])


def run(home: Path, failpoint: str = "") -> int | None:
    """Exit code of a process that does all there is to do; -9 where the failpoint killed it."""
    environment = {"NEXUS_TESTING": "1", "NEXUS_FAILPOINT": failpoint} if failpoint else {}
    process: BaseProcess = _forks.Process(target=keeping.work, args=(home, environment))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """What a peer has: its home, whose ring the installation begins with, and its introduction."""
    home = tmp_path_factory.mktemp("peer")
    keyring = machine(home, "clu")
    store = BlockStore(home / "share" / "blocks", keyring)
    (home / "sent").mkdir()
    for number in range(2):
        share_one(store, data_id=f"p{number}")
        (home / "sent" / f"p{number}").write_bytes(sealed(store, f"p{number}"))
    store.close()
    return home, keyring.introduction()


@pytest.fixture
def home(tmp_path: Path, sent: tuple[Path, bytes]) -> Path:
    peer, introduction = sent
    for folder in ("sent", "others"):
        (tmp_path / folder).mkdir()
    for file in (peer / "sent").iterdir():
        (tmp_path / "sent" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "others" / "clu").write_bytes(introduction)
    (tmp_path / "coordinator").write_bytes(machine(peer, "clu").export(TENANT) or b"")
    return tmp_path


def check(home: Path) -> None:
    """All that was acknowledged, and nothing that should be gone."""
    with keeping.opened(home) as store:
        newest: dict[str, tuple[int, str]] = {}
        for one in keeping.noted(home):
            if "shared" in one:
                newest[one["shared"]] = (one["version"], one["digest"])
            else:
                newest[one["taken"]] = (1, one["digest"])
        assert len(newest) == keeping.SHARED + 2
        for data_id, (version, digest) in newest.items():
            with store.open(keeping.BlockId(TENANT, data_id, version), digest) as reading:
                plain = b"".join(reading)
            assert plain == (TEXT if data_id.startswith("p") else keeping.content(data_id, version))
        assert sorted(one.header.data_id for one in store.blocks()) == sorted(newest), "an older version is left"
        assert [one.refused for one in store.scrub() if one.refused] == []
        ring = store.keyring.ring(TENANT)
        assert [key.state for key in ring.keys] == ["retired"] * (keeping.KEYS - 1) + ["active"]
        assert [key.is_held for key in ring.keys] == [False] * (keeping.KEYS - 1) + [True]
        assert {one.key_id for one in store.blocks()} == {ring.active.key_id}
        assert list(store._drafts.iterdir()) == []
    # All that is left half-written is parts that nobody reads: a start makes no difference between them and nothing.
    assert machine(home, "sark").ring(TENANT) == ring


def test_without_a_kill_all_is_done(home: Path) -> None:
    """What the other tests mean by done; and every failpoint is on the way."""
    assert run(home) == 0
    check(home)


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("point", HERE)
def test_a_kill_loses_nothing_that_was_acknowledged(home: Path, point: str, nth: int) -> None:
    nth = min(nth, 2) if point in TWICE else nth
    assert run(home, f"{point}:kill@{nth}") == -SIGKILL, "the failpoint was never passed"
    assert run(home) == 0
    check(home)


def test_a_kill_at_every_point_one_after_the_other(home: Path) -> None:
    """One home dies at each of them, in the order of their names, and again in the opposite one."""
    ends = [run(home, f"{point}:kill") for point in [*HERE, *reversed(HERE)]]
    assert set(ends) <= {-SIGKILL, 0} and ends.count(-SIGKILL) > len(HERE) // 2
    assert run(home) == 0
    check(home)
