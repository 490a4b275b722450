"""What is kept of a coordinator, and how another begins from it: the file, the new voter's disk, who has a seat."""

from dataclasses import replace

import pytest

from cluster import backup
from cluster.catalog import Catalog, Clock, Command, Delete, Grant, OpenSession, Put, decode_response, encode
from cluster.raft import Members, Snapshot
from cluster.voter import Pace
from nexus.errors import InvalidRequest

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


# Who has a seat
