"""What is kept of a coordinator, and how another begins from it: the file, the new voter's disk, who has a seat."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors import coordinator
from actors.coordinator import Operator, Placement, restore, start
from cluster import backup
from cluster.catalog import (
    AlreadyAnswered,
    Catalog,
    Clock,
    Command,
    CompareAndSet,
    Delete,
    Grant,
    OpenSession,
    Put,
    decode_response,
    encode,
)
from cluster.client import Client
from cluster.raft import NOBODY, Members, Role, Snapshot, Status
from cluster.raft.storage import Storage, StorageFailed
from cluster.voter import Pace, Voter, found
from nexus.errors import ConfigError, Conflict, InvalidRequest, NotFound, Unavailable
from tests.voting import run, until

PACE = Pace(tick_seconds=0.01, election_ticks=10, snapshot_entries=1_000_000)
SESSION, LEASE = 1, 2


def applied(catalog: Catalog, command: Command, sequence: int = 0, unanswered: int = 0) -> int | None:
    """What the catalog answers to one more entry, in the session where it has a sequence."""
    client = SESSION if sequence else 0
    return decode_response(
        catalog.apply(catalog.applied + 1, encode(command, client, sequence, unanswered or sequence))
    )


def a_snapshot() -> Snapshot:
    """Of three voters: keys, one of them gone, a lease that runs, and a session with answers."""
    catalog = Catalog()
    assert applied(catalog, OpenSession()) == SESSION
    assert applied(catalog, Grant(5_000), 1) == LEASE
    applied(catalog, Put("kept", b"1"), 2)
    applied(catalog, Put("gone", b"2"), 3)
    applied(catalog, Put("leased", b"\0\xff", LEASE), 4, unanswered=3)
    applied(catalog, Delete("gone"), 5, unanswered=3)
    applied(catalog, Clock(1_000))
    return Snapshot(catalog.applied, 7, Members(frozenset({1, 2, 3})), catalog.snapshot())


SNAPSHOT = a_snapshot()
FILE = backup.write(SNAPSHOT)
MAGIC_BYTES = FILE.index(b"\n") + 1


# The file


def test_a_file_holds_all_but_who_the_voters_were() -> None:
    assert backup.read(FILE) == replace(SNAPSHOT, members=Members(frozenset()))


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_file_that_is_damaged_anywhere_is_refused(flip: int) -> None:
    for place in range(len(FILE)):
        damaged = bytearray(FILE)
        damaged[place] ^= flip
        with pytest.raises(InvalidRequest, match="is no snapshot" if place < MAGIC_BYTES else "is damaged"):
            backup.read(bytes(damaged))


def test_a_file_that_is_not_whole_is_refused() -> None:
    for length in range(len(FILE)):
        with pytest.raises(InvalidRequest, match="is no snapshot" if length < MAGIC_BYTES else "not whole"):
            backup.read(FILE[:length])


@pytest.mark.parametrize("content", [b"", b"nexus", b"\x1f\x8b" + FILE, FILE.replace(b"r-1", b"r-2", 1)])
def test_what_is_no_such_file_is_told_so(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="is no snapshot of a coordinator"):
        backup.read(content)


@pytest.mark.parametrize("more", [b"\0", b"\n", FILE])
def test_a_file_with_more_behind_its_end_is_refused(more: bytes) -> None:
    with pytest.raises(InvalidRequest, match="damaged or not whole"):
        backup.read(FILE + more)


@pytest.mark.parametrize("data", [b"\xc1", b"\x90", b"\x98\x02" + SNAPSHOT.data[2:], SNAPSHOT.data[:-1]])
def test_a_catalog_that_another_version_wrote_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="another version"):
        backup.read(backup.write(replace(SNAPSHOT, data=data)))


# A coordinator restored


def seats(folder: Path) -> dict[str, dict[str, Any]]:
    held: dict[str, dict[str, Any]] = json.loads((folder / "voters.json").read_text())
    return held


def alone(folder: Path) -> int:
    """The number of the only voter that has a seat still; every lower one is retired."""
    held = seats(folder)
    (left,) = [int(id) for id, seat in held.items() if not seat["is_retired"]]
    assert sorted(map(int, held)) == list(range(1, left + 1))
    assert held[str(left)]["is_founded"]
    return left


@asynccontextmanager
async def restored(folder: Path) -> AsyncIterator[tuple[Voter, Catalog]]:
    """The restored voter, alive, and its catalog."""
    id = alone(folder)
    disk, catalog = Storage(folder / f"voter-{id}", seats(folder)[str(id)]["identity"]), Catalog()
    voter = Voter(id, disk, catalog, lambda messages: None, random.Random(1), PACE)
    running = asyncio.create_task(voter.run())
    try:
        yield voter, catalog
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        disk.close()


def a_register(folder: Path, *numbers: int) -> None:
    """As that of voters that were founded, each with something on its disk."""
    folder.mkdir()
    for id in numbers:
        disk = Storage(folder / f"voter-{id}", f"disk-{id}")
        found(disk, Members(frozenset(numbers)))
        disk.close()
    seat = {"labels": {"nexus.io/node": "sark"}, "is_founded": True, "is_retired": False}
    (folder / "voters.json").write_text(json.dumps({id: {"identity": f"disk-{id}", **seat} for id in numbers}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_restored_voter_holds_what_the_snapshot_held_and_goes_on_from_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with restored(folder) as (voter, catalog):
            assert catalog.snapshot() == SNAPSHOT.data
            await until(lambda: voter.status().role is Role.LEADER)
            status = voter.status()
            assert status.members == Members(frozenset({status.id})) and status.term > SNAPSHOT.term

            async def answer(command: Command, sequence: int, unanswered: int) -> int | None:
                return decode_response(await voter.propose(encode(command, SESSION, sequence, unanswered)))

            assert catalog.get("kept") == (b"1", 1) and catalog.get("gone") is None
            assert await answer(Put("leased", b"again"), 4, 3) == 3  # sent once more: told what was told then
            with pytest.raises(AlreadyAnswered):
                await answer(Put("kept", b"again"), 2, 2)
            assert await answer(CompareAndSet("kept", 1, b"new"), 6, 6) == 5
            assert catalog.get("leased") == (b"\0\xff", 3)
            await voter.propose(encode(Clock(5_000)))
            assert catalog.get("leased") is None
            assert (await voter.snapshot()).index == voter.status().applied > SNAPSHOT.index

    folder = tmp_path / "coordinator"
    assert restore(backup.read(FILE), folder) is None
    run(main)


@pytest.mark.parametrize(("numbers", "named", "new"), [
    ((), (), 1), ((1,), (), 2), ((1, 2, 3), (1, 2, 3), 4), ((2, 7), (), 8), ((1, 2), (1, 2, 5), 6), ((), (1, 2, 3), 4),
])  # fmt: skip
def test_the_new_voter_has_a_number_never_used(
    tmp_path: Path, numbers: tuple[int, ...], named: tuple[int, ...], new: int
) -> None:
    folder = tmp_path / "coordinator"
    if numbers:
        a_register(folder, *numbers)
    restore(SNAPSHOT, folder, named)
    assert alone(folder) == new
    assert restore(SNAPSHOT, folder, named) is not None
    assert alone(folder) == new + 1


def test_what_was_there_is_kept_aside_whole_however_fast_one_restores_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator.time, "strftime", lambda layout: "20300101-000000")
    folder = tmp_path / "home" / "coordinator"
    folder.parent.mkdir()
    a_register(folder, 1, 2)
    kept = []
    for _ in range(3):
        before = contents(folder)
        aside = restore(SNAPSHOT, folder)
        assert aside is not None and aside.parent == folder.parent
        kept.append((aside, before))
    assert len({aside for aside, _ in kept}) == 3
    assert all(contents(aside) == before for aside, before in kept)
    assert {one.name for one in folder.parent.iterdir()} == {"coordinator", *(aside.name for aside, _ in kept)}
    assert alone(folder) == 5


def test_a_restore_that_fails_leaves_all_as_it_was_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1, 2, 3)
    before = contents(folder)

    def fail(*_: object) -> None:
        raise StorageFailed("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(StorageFailed):
        patch.setattr(coordinator, "found", fail)
        restore(SNAPSHOT, folder)
    assert contents(folder) == before
    assert restore(SNAPSHOT, folder) is not None
    assert alone(folder) == 4
    assert {one.name for one in folder.iterdir()} == {"voter-4", "voters.json"}


def test_the_next_start_takes_the_settings_of_the_voters_that_were_lost(tmp_path: Path, actors: dict[str, Any]) -> None:
    folder = tmp_path / "coordinator"
    named = {id: Placement({"rack": str(id)}) for id in (1, 2, 3)}
    restore(SNAPSHOT, folder, named)
    actors["next"] = Handle(status=there())
    asyncio.run(start(named, folder))
    assert actors["made"] == {4: {}} and actors["next"].asked == ["status"]


# Who has a seat

DAMAGED = [
    b"", b"{", b"\xff\xfe", b"\0" * 40, b"[]", b"null", b'{"1": null}', b'{"1": {}}', b'{"1": {"identity": 1}}',
    b'{"one": {"identity": "x"}}', b'{"-1": {"identity": "x"}}', b'{"1": {"identity": "x", "labels": ["a"]}}',
    b'{"1": {"identity": "x", "is_retired": "perhaps"}}', b'{"1": {"identity": "x"}} ]',
]  # fmt: skip


class Handle:
    """A voter's actor, as far as an operator sees it: each method answers one thing, or raises it, or does it."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __getattr__(self, method: str) -> Any:
        async def remote(*_: object) -> Any:
            self.asked.append(method)
            answer = self.answers.get(method)
            if isinstance(answer, BaseException):
                raise answer
            return answer() if callable(answer) else answer

        return type("Method", (), {"remote": staticmethod(remote)})


class Leading:
    """The client of a coordinator that does what it is told."""

    def __init__(self, *voters: int) -> None:
        self.members = Members(frozenset(voters))
        self.meanwhile: Callable[[], object] = lambda: None

    async def leader(self) -> Status:
        return Status(1, Role.LEADER, 1, NOBODY, 1, 0, 0, 0, self.members, {})

    async def change(self, members: Members) -> None:
        self.meanwhile()
        self.members = members

    async def level(self, learner: int) -> None:
        assert learner in self.members.learners

    async def transfer(self, to: int) -> None: ...


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is found, made and killed in place of Ray's actors; voters 1 to 3 agree."""
    played: dict[str, Any] = {"client": Leading(1, 2, 3), "made": {}, "killed": [], "next": Handle(status=None)}

    def make(register: object, id: int, seat: Any, pace: Pace) -> Handle:
        played["made"][id] = dict(seat.labels)
        handle: Handle = played["next"]
        return handle

    async def connect() -> Client:
        client: Client = played["client"]
        return client

    monkeypatch.setattr(coordinator, "connect", connect)
    monkeypatch.setattr(coordinator._Register, "make", make)
    monkeypatch.setattr(coordinator, "find_voter", lambda id: played["next"] if id in played["made"] else None)
    monkeypatch.setattr(coordinator.ray, "kill", played["killed"].append)
    monkeypatch.setattr(coordinator, "START_SECONDS", 5.0)
    return played


def there(id: int = 4) -> Status:
    return Status(id, Role.FOLLOWER, 0, NOBODY, NOBODY, 0, 0, 0, Members(frozenset()), {})


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize(
    "act",
    [
        lambda folder: restore(SNAPSHOT, folder),
        lambda folder: asyncio.run(start({1: Placement()}, folder)),
        lambda folder: asyncio.run(Operator(folder).add(4, {})),
        lambda folder: asyncio.run(Operator(folder).remove(3)),
    ],
    ids=["restore", "start", "add", "remove"],
)
def test_a_damaged_register_is_named_and_nothing_is_done(
    tmp_path: Path, actors: dict[str, Any], content: bytes, act: Callable[[Path], object]
) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1)
    (folder / "voters.json").write_bytes(content)
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"voters\.json.*damaged") as refused:
        act(folder)
    assert str(tmp_path) not in refused.value.message
    assert contents(folder) == before
    assert not actors["made"] and not actors["killed"] and not list(tmp_path.glob("coordinator.*"))


def test_a_voter_that_was_added_has_a_seat(tmp_path: Path, actors: dict[str, Any]) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1, 2, 3)
    actors["next"] = Handle(status=there())
    asyncio.run(Operator(folder).add(4, {"rack": "b"}))
    assert actors["client"].members == Members(frozenset({1, 2, 3, 4}))
    assert actors["next"].asked == ["status", "found", "status"]
    new = seats(folder)["4"]
    assert (new["labels"], new["is_founded"], new["is_retired"]) == ({"rack": "b"}, True, False)
    assert len({seat["identity"] for seat in seats(folder).values()}) == 4


def test_a_removed_voter_keeps_its_number_to_itself(tmp_path: Path, actors: dict[str, Any]) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1, 2, 3)
    asyncio.run(Operator(folder).remove(3))
    assert actors["client"].members == Members(frozenset({1, 2})) and seats(folder)["3"]["is_retired"]
    with pytest.raises(Conflict, match=r"3 has been used.*take 4"):
        asyncio.run(Operator(folder).add(3, {}))
    for number in (3, 9):
        with pytest.raises(NotFound, match=f"no voter {number}"):
            asyncio.run(Operator(folder).remove(number))


@pytest.mark.parametrize("labels", [{"": "x"}, {"two words": "x"}, {"rack": "two words"}, {"rack": "-"}])
def test_labels_that_no_machine_can_have_are_refused_before_anything_is_written(
    tmp_path: Path, actors: dict[str, Any], labels: dict[str, str]
) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1, 2, 3)
    before = contents(folder)
    with pytest.raises(InvalidRequest, match=r"[Ii]nvalid label"):
        asyncio.run(Operator(folder).add(4, labels))
    with pytest.raises(ConfigError, match=r"coordinator\.voters.*[Ii]nvalid label"):
        asyncio.run(start({1: Placement(labels)}, folder))
    assert contents(folder) == before and not actors["made"]


@pytest.mark.parametrize(
    ("handle", "error"),
    [
        (Handle(status=TimeoutError()), Unavailable),
        (Handle(status="this is the data of another disk"), Conflict),
        (Handle(status=asyncio.CancelledError()), asyncio.CancelledError),
    ],
    ids=["no machine", "no disk of its own", "given up"],
)
def test_a_voter_that_cannot_be_added_leaves_nothing_that_the_next_start_would_wait_for(
    tmp_path: Path, actors: dict[str, Any], handle: Handle, error: type[BaseException]
) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1, 2, 3)
    before = contents(folder)
    actors["next"] = handle
    with pytest.raises(error):
        asyncio.run(Operator(folder).add(4, {"rack": "mistyped"}))
    assert actors["client"].members == Members(frozenset({1, 2, 3}))
    assert actors["killed"] == [handle]
    assert contents(folder) == before
    actors["next"] = Handle(status=there())
    asyncio.run(Operator(folder).add(4, {"rack": "b"}))
    assert actors["made"][4] == seats(folder)["4"]["labels"] == {"rack": "b"}


def test_a_seat_that_an_interrupted_change_left_can_be_removed(tmp_path: Path, actors: dict[str, Any]) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1, 2, 3, 4)
    actors["made"][4] = {}
    asyncio.run(Operator(folder).remove(4))
    assert seats(folder)["4"]["is_retired"] and actors["killed"] == [actors["next"]]
    assert actors["client"].members == Members(frozenset({1, 2, 3}))


@pytest.mark.parametrize("is_added", [True, False])
def test_what_another_changes_meanwhile_stays(tmp_path: Path, actors: dict[str, Any], is_added: bool) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1, 2, 3)

    def meanwhile() -> object:
        held = seats(folder)
        (folder / "voters.json").write_text(json.dumps({**held, "5": held["1"]}))
        return "this is the data of another disk"

    if is_added:
        actors["next"] = Handle(status=meanwhile)
        with pytest.raises(Conflict):
            asyncio.run(Operator(folder).add(4, {}))
    else:
        actors["client"].meanwhile = meanwhile
        asyncio.run(Operator(folder).remove(3))
    assert seats(folder).keys() == {"1", "2", "3", "5"}


def test_a_register_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "coordinator"
    a_register(folder, 1)
    register = coordinator._Register(folder)
    held, before = register.read(), contents(folder)

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(coordinator.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        register.write({**held, 2: held[1]})
    assert (folder / "voters.json").read_bytes() == before["voters.json"]
    assert register.read() == held
