"""Sharing between three stewards: what is acknowledged is kept, what is damaged is repaired, what is old is refused."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.directory import NODES as INTRODUCED
from cluster.directory import Record
from cluster.steward import IDLE_SECONDS, ORPHAN_SECONDS, STREAMS, Settings, Steward, rank
from nexus.blocks import BlockStore
from nexus.envelope import BlockId
from nexus.errors import (
    BlockRefused,
    ConfigError,
    Conflict,
    NexusError,
    NotFound,
    Overloaded,
    Unavailable,
    UpstreamInvalid,
    WriterUnknown,
)
from nexus.keyring import ClusterKey, Keyring, key_id_of
from tests.share_simulation import World
from tests.stewards import (
    CLIENT,
    CLUSTER_KEY,
    DESK,
    NODES,
    FaultyReach,
    Machines,
    StewardMember,
    at_once,
    content,
    drain,
    read,
)

MIB = 2**20
Story = Callable[[Machines], Coroutine[Any, Any, None]]


def be_simple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("asyncio.to_thread", at_once)


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a story over three stewards in a loop of its own; what blocks is done at once, and no power is ever lost."""
    be_simple(monkeypatch)

    def run(story: Story, nodes: tuple[str, ...] = NODES, given: str | None = CLUSTER_KEY, **settings: Any) -> None:
        async def all_of_it() -> None:
            wanted = Settings(**{"copies": 2, "gone_seconds": 0.0, **settings})
            async with machines(tmp_path, nodes, wanted, given) as there:
                await story(there)

        asyncio.run(all_of_it())

    return run


@asynccontextmanager
async def machines(
    folder: Path, nodes: tuple[str, ...], settings: Settings, given: str | None
) -> AsyncIterator[Machines]:  # fmt: skip
    there = Machines(folder, settings, given=given)
    for node in nodes:
        await there.start(node)
    try:
        yield there
        await drain()
    finally:
        there.stop()


async def share(there: Machines, data_id: str, text: bytes, tenant: str = "acme") -> Record:
    return (await there.sharing.put(tenant, data_id, content(text))).record


async def got(there: Machines, data_id: str, tenant: str = "acme") -> bytes:
    return await read((await there.sharing.get(tenant, data_id)).pieces)


async def opened(there: Machines, node: str, data_id: str) -> bytes:
    """What this very steward gives out."""
    steward = there.stewards[node]
    found = await steward.open("acme", data_id)
    parts, number = [], 0
    while piece := await steward.piece(found.handle, number):
        parts.append(piece)
        number += 1
    await steward.close(found.handle)
    return b"".join(parts)


# Sharing


def test_it_is_acknowledged_when_so_many_copies_are_verified_and_on_record(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        record = await share(there, "a", b"x" * (2 * MIB + 5))
        assert len(record.copies) == 2 == len(set(record.copies)) and record.length == 2 * MIB + 5
        assert list(record.copies) == rank(NODES, "acme", "a")[:2] and record.writer == record.copies[0]
        for node in NODES:
            assert len(there.files(node)) == (node in record.copies)
        for node in record.copies:
            assert await opened(there, node, "a") == b"x" * (2 * MIB + 5)

    tell(story)


@pytest.mark.parametrize(("nodes", "wanted", "copies"), [(1, 2, 1), (2, 2, 2), (3, 3, 3), (3, 1, 1), (2, 5, 2)])
def test_there_are_as_many_copies_as_machines_at_most(
    tell: Callable[..., None], nodes: int, wanted: int, copies: int
) -> None:
    async def story(there: Machines) -> None:
        shared = await there.sharing.put("acme", "a", content(b"x"))
        assert (len(shared.record.copies), shared.wanted) == (copies, wanted)

    tell(story, NODES[:nodes], copies=wanted)


def test_with_too_few_machines_nothing_is_acknowledged(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        for node in NODES[1:]:
            there.kill(node)
        with pytest.raises(Unavailable, match=r"2 copies are wanted.*clu, tron"):
            await share(there, "a", b"x")
        assert await there.copies("a") == () and there.files(NODES[0]) == []

    tell(story)


def test_a_machine_that_takes_no_copy_is_passed_over_and_if_none_does_nothing_is_left(
    tell: Callable[..., None],
) -> None:
    async def story(there: Machines) -> None:
        first, second, third = rank(NODES, "acme", "a")
        full = {second}

        def refuse(node: str, method: str, arguments: tuple[object, ...]) -> None:
            if method == "take" and node in full:
                raise Unavailable("its disk is full", code="storage_full")

        there.refuse = refuse
        assert (await share(there, "a", b"x")).copies == (first, third)
        full.add(third)
        with pytest.raises(Unavailable, match="only 1 of 2"):
            await share(there, "a", b"y")
        await drain()
        assert await got(there, "a") == b"x"
        assert [len(there.files(node)) for node in (first, second, third)] == [1, 0, 1]

    tell(story)


def test_a_copy_that_was_damaged_on_its_way_does_not_count(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        steward = there.stewards[rank(NODES, "acme", "a")[0]]
        piece, spoilt = steward.piece, []

        async def spoil(handle: str, number: int) -> bytes:
            whole = await piece(handle, number)
            spoilt.append(number)
            return whole[:-1] + bytes([whole[-1] ^ 1]) if whole else whole

        steward.piece = spoil  # type: ignore[method-assign]
        with pytest.raises(Unavailable):
            await share(there, "a", b"x")
        assert spoilt and await there.copies("a") == ()

    tell(story)


def test_an_older_version_never_replaces_a_later_one(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        waiting, begun = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"older"
            begun.set()
            await waiting.wait()

        older = asyncio.create_task(there.sharing.put("acme", "a", slow()))
        while not any(steward._streams for steward in there.stewards.values()):
            await asyncio.sleep(0)
        await begun.wait()
        await share(there, "a", b"later")
        waiting.set()
        with pytest.raises(Conflict):
            await older
        await drain()
        assert await got(there, "a") == b"later"
        assert sum(len(there.files(node)) for node in NODES) == 2

    tell(story)


def test_a_new_version_replaces_the_old_one_everywhere(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share(there, "a", b"one")
        second = await share(there, "a", b"two")
        await drain()
        assert await got(there, "a") == b"two"
        assert sum(len(there.files(node)) for node in NODES) == 2
        removed = await there.sharing.delete("acme", "a")
        assert (removed.version, removed.copies, removed.erased) == (second.version, 2, 2)
        assert sum(len(there.files(node)) for node in NODES) == 0
        with pytest.raises(NotFound):
            await got(there, "a")
        with pytest.raises(NotFound):
            await there.sharing.delete("acme", "a")

    tell(story)


def test_who_goes_away_in_the_middle_leaves_nothing(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        async def broken() -> AsyncIterator[bytes]:
            yield b"x" * MIB
            raise ConnectionResetError("the caller left")

        with pytest.raises((ConnectionResetError, Unavailable)):
            await there.sharing.put("acme", "a", broken())
        await drain()
        assert await there.copies("a") == ()
        for node, steward in there.stewards.items():
            assert steward._streams == {} and not list((there.folder / node / "share/blocks/drafts").iterdir())

    tell(story)


def test_pieces_that_overtake_each_other_wait_for_their_turn(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        steward = there.stewards[rank(NODES, "acme", "a")[0]]
        handle = await steward.begin("acme", "a", "data", "a/b", {})
        parts = [bytes([65 + number]) * 10 for number in range(4)]
        await asyncio.gather(*(steward.append(handle, number, parts[number]) for number in (2, 0, 3, 1)))
        await steward.finish(handle)
        assert await got(there, "a") == b"".join(parts)
        with pytest.raises(Unavailable):
            await steward.append(handle, 4, b"after the end")

    tell(story)


def test_streams_are_bounded_and_those_that_nobody_uses_are_closed(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(there: Machines) -> None:
        steward, times = there.stewards["sark"], {"now": 0.0}
        monkeypatch.setattr("cluster.steward.Steward._time", staticmethod(lambda: times["now"]))
        handles = [await steward.begin("acme", f"b-{n}", "data", "a/b", {}) for n in range(STREAMS)]
        with pytest.raises(Overloaded):
            await steward.begin("acme", "one-more", "data", "a/b", {})
        await steward.append(handles[0], 0, b"x")
        with pytest.raises(Unavailable, match="a piece of the transfer was lost"):
            await steward.append(handles[0], 99, b"x")
        times["now"] = IDLE_SECONDS + 1
        await steward.append(handles[1], 0, b"x")
        await steward.tend()
        assert list(steward._streams) == [handles[1]]
        with pytest.raises(Unavailable, match="the transfer is over"):
            await steward.append(handles[0], 1, b"x")

    tell(story)


def test_who_reads_nothing_of_a_block_holds_no_stream(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share(there, "a", b"x")
        found = await there.sharing.get("acme", "a")
        assert sum(len(steward._streams) for steward in there.stewards.values()) == 1
        await found.pieces.aclose()
        await drain()
        assert not any(steward._streams for steward in there.stewards.values())

    tell(story)


def test_who_cannot_begin_a_copy_borrows_none(tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(there: Machines) -> None:
        await share(there, "a", b"x")
        third, block = rank(NODES, "acme", "a")[2], await there.block("a")

        def refuse(*_: object) -> None:
            raise Unavailable("its disk is full", code="storage_full")

        monkeypatch.setattr(there.stewards[third].store, "receive", refuse)
        with pytest.raises(Unavailable, match="its disk is full"):
            await there.stewards[third].take(block, "", (await there.copies("a")))
        assert not any(steward._streams for steward in there.stewards.values())

    tell(story)


def test_a_machine_that_only_shares_and_reads_keeps_nothing_and_sends_nothing_unsealed(
    tell: Callable[..., None],
) -> None:
    async def story(there: Machines) -> None:
        text = b"canary-4711" * 300_000
        third = rank(NODES, "acme", "a")[2]
        sharing, carried = there.sharing_at(third), []

        def listen(node: str, method: str, arguments: tuple[object, ...]) -> None:
            if node != third:
                carried.append(method)

        there.refuse = listen
        shared = await sharing.put("acme", "a", content(text))
        await drain()
        assert shared.record.writer == third and set(shared.record.copies) == set(NODES) - {third}
        assert there.files(third) == []
        readers = [sharing.get("acme", "a") for _ in range(3)]
        assert [await read(found.pieces) for found in await asyncio.gather(*readers)] == [text] * 3
        await drain()
        assert there.files(third) == [] and set(carried) == {"take", "lend", "piece", "close"}

    tell(story)


# Reading


def flips(size: int, most: int) -> list[tuple[int, int]]:
    """(byte, bit), spread over all bytes; each bit in its turn."""
    step = max(1, size // most)
    return [(place, count % 8) for count, place in enumerate(range(0, size, step))]


def test_every_flipped_bit_is_refused_and_repaired(tell: Callable[..., None]) -> None:
    """Bits all over a small block, through the read path; `python -m tests.bench.share --bits` flips every one."""

    async def story(there: Machines) -> None:
        text = b"the gripper closes with 4 N m"
        first, _ = (await share(there, "a", text)).copies
        block = await there.block("a")
        whole = there.file(first, block).read_bytes()
        steward = there.stewards[first]
        for count, (place, bit) in enumerate(flips(len(whole), 90), 1):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << bit
            there.file(first, block).write_bytes(spoilt)
            assert await opened(there, first, "a") == text, place
            assert steward._repaired == count, f"byte {place} was taken for good"
            assert there.file(first, block).read_bytes() == whole
        assert sum(steward._refused.values()) == count >= 90

    tell(story)


@pytest.mark.parametrize("harm", ["cut", "emptied", "longer", "removed", "swapped"])
def test_whatever_happens_to_a_file_it_is_repaired(tell: Callable[..., None], harm: str) -> None:
    async def story(there: Machines) -> None:
        text = b"x" * 1000
        first, _ = (await share(there, "a", text)).copies
        await share(there, "b", b"another")
        file = there.file(first, await there.block("a"))
        whole = file.read_bytes()
        if harm == "removed":
            file.unlink()
        elif harm == "swapped":
            node = (await there.copies("b"))[0]
            file.write_bytes(there.file(node, await there.block("b")).read_bytes())
        else:
            file.write_bytes({"cut": whole[:-1], "emptied": b"", "longer": whole + b"\0"}[harm])
        assert await opened(there, first, "a") == text
        assert file.read_bytes() == whole

    tell(story)


def test_with_every_copy_damaged_nothing_of_it_is_shown(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        secret = b"canary-4711" * 100_000
        record = await share(there, "a", secret)
        block = await there.block("a")
        for node in record.copies:
            file = there.file(node, block)
            file.write_bytes(file.read_bytes()[:-40] + bytes(40))
        handed: list[bytes] = []
        with pytest.raises(BlockRefused):
            async for piece in (await there.sharing.get("acme", "a")).pieces:
                handed.append(piece)
        assert handed == []
        for node in record.copies:
            with pytest.raises(BlockRefused):
                await there.stewards[node].open("acme", "a")

    tell(story)


def test_an_older_block_that_was_put_back_is_refused(tell: Callable[..., None]) -> None:
    """Also under the name of the new one; and one that was deleted stays so, whoever puts its files back."""

    async def story(there: Machines) -> None:
        old = await share(there, "a", b"old and signed")
        first = old.copies[0]
        older = there.file(first, await there.block("a")).read_bytes()
        await share(there, "a", b"new")
        await drain()
        file = there.file(first, await there.block("a"))
        file.write_bytes(older)
        assert await opened(there, first, "a") == b"new"
        assert there.stewards[first]._refused == {"block_stale": 1} and file.read_bytes() != older
        await there.sharing.delete("acme", "a")
        file.write_bytes(older)
        with pytest.raises(NotFound):
            await got(there, "a")

    tell(story)


def test_another_content_under_the_same_version_is_not_the_one_on_record(tell: Callable[..., None]) -> None:
    """Signed by a member, and sound in itself: as from a machine that was restored with its voters."""

    async def story(there: Machines) -> None:
        first, second = (await share(there, "a", b"on record")).copies
        block = await there.block("a")
        third = next(node for node in NODES if node not in (first, second))
        for steward in there.stewards.values():
            await steward.learn()
        with there.stewards[third].store.write(block) as draft:
            draft.feed(b"another")
            draft.commit()
        another = there.file(third, block).read_bytes()
        for _ in range(2):
            there.file(first, block).write_bytes(another)
            assert await opened(there, first, "a") == b"on record"
            there.file(first, block).write_bytes(another)
            assert await there.stewards[first].scrub() == 1
            assert there.file(first, block).read_bytes() == there.file(second, block).read_bytes()
        assert there.stewards[first]._refused == {"block_stale": 4}

    tell(story)


def test_a_reader_whose_steward_dies_goes_on_at_another(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        text = bytes(range(256)) * 50_000
        first, _ = (await share(there, "a", text)).copies
        found = await there.sharing.get("acme", "a")
        parts = [await anext(found.pieces)]
        there.kill(first)
        parts += [piece async for piece in found.pieces]
        assert b"".join(parts) == text

    tell(story)


def test_a_reader_never_gets_half_of_one_version_and_half_of_another(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        first, _ = (await share(there, "a", b"1" * (12 * MIB))).copies
        found = await there.sharing.get("acme", "a")
        await anext(found.pieces)
        await share(there, "a", b"2" * (12 * MIB))
        there.kill(first)
        with pytest.raises(Unavailable, match="replaced by a later version"):
            await read(found.pieces)

    tell(story)


# Tending


def test_what_a_lost_machine_kept_is_copied_anew(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        for number in range(12):
            await share(there, f"b-{number}", b"%d" % number)
        there.kill("clu")
        await there.settle()
        for number in range(12):
            copies = await there.copies(f"b-{number}")
            assert len(copies) == 2 and "clu" not in copies
            for node in copies:
                assert await opened(there, node, f"b-{number}") == b"%d" % number
        await there.revive("clu")
        await there.settle()
        for number in range(12):
            assert await got(there, f"b-{number}") == b"%d" % number

    tell(story)


def test_a_machine_that_is_only_silent_for_a_moment_keeps_its_copies(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        copies = (await share(there, "a", b"x")).copies
        there.kill(copies[1])
        await there.settle()
        assert await there.copies("a") == copies

    tell(story, gone_seconds=60.0)


def test_a_machine_that_lost_its_disk_gets_its_copies_back(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        copies = (await share(there, "a", b"x")).copies
        there.file(copies[0], await there.block("a")).unlink()
        there.kill(copies[0])
        await there.revive(copies[0])
        await there.settle()
        assert there.file(copies[0], await there.block("a")).exists()

    tell(story, gone_seconds=60.0)


def test_a_drained_machine_gives_its_blocks_away(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        for number in range(8):
            await share(there, f"b-{number}", b"%d" % number)
        await there.voters.put("drained/sark", b"")
        await there.settle()
        await drain()
        for number in range(8):
            assert set(await there.copies(f"b-{number}")) == {"clu", "tron"}
        assert there.files("sark") == []
        assert set((await share(there, "later", b"x")).copies) == {"clu", "tron"}

    tell(story)


def test_a_machine_that_is_forgotten_is_not_waited_for(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        with pytest.raises(Conflict):
            await there.sharing.forget("clu")
        there.kill("clu")
        with pytest.raises(Unavailable):
            await share(there, "a", b"x")
        await there.sharing.forget("clu")
        assert set((await share(there, "a", b"x")).copies) == {"sark", "tron"}

    tell(story, copies=3)


def test_who_moves_copies_of_a_version_that_was_replaced_meanwhile_changes_nothing(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share(there, "a", b"older")
        older = await there.directory.find("acme", "a")
        assert older is not None
        later = await share(there, "a", b"later")
        assert not await there.directory.move(older, NODES)
        found = await there.directory.find("acme", "a")
        assert found is not None and found.record == later
        assert await there.directory.move(found, NODES[:1]) and await there.copies("a") == NODES[:1]

    tell(story)


def test_what_no_record_names_is_swept_a_day_later_and_nothing_else(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share(there, "kept", b"x")
        await share(there, "lost", b"y")
        await there.voters.delete("share/blocks/acme/lost")
        for node in NODES:
            await there.stewards[node].scrub()
        assert sum(len(there.files(node)) for node in NODES) == 4, "one that is being shared looks just like that"
        there.now += ORPHAN_SECONDS + 1
        for node in NODES:
            there.stewards[node]._taken.clear()
            await there.stewards[node].scrub()
        assert sum(len(there.files(node)) for node in NODES) == 2
        assert await got(there, "kept") == b"x"

    tell(story)


def test_a_copy_that_is_on_record_is_not_dropped_whoever_asks(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        copies = (await share(there, "a", b"x")).copies
        assert not await there.stewards[copies[0]].drop(await there.block("a"))
        assert there.file(copies[0], await there.block("a")).exists()

    tell(story)


def test_a_scrubber_finds_and_repairs_what_nobody_read(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        first, second = (await share(there, "a", b"x" * 3000)).copies
        block = await there.block("a")
        good = there.file(second, block).read_bytes()
        there.file(first, block).write_bytes(good[:2000] + b"\xff" + good[2001:])
        rubbish = there.folder / first / "share/blocks/files/00" / f"{'0' * 32}-{'0' * 15}1.block"
        rubbish.parent.mkdir(exist_ok=True)
        rubbish.write_bytes(b"rubbish")
        assert await there.sharing.scrub() == 1
        assert there.file(first, block).read_bytes() == good
        assert not rubbish.exists()
        assert await there.sharing.scrub() == 0
        standing = await there.stewards[first].describe()
        assert (standing.repaired, standing.blocks, sum(standing.refused.values())) == (1, 1, 1)

    tell(story)


# Keys


def states(there: Machines, node: str) -> list[str]:
    ring = there.stewards[node].keyring.ring("acme")
    assert ring is not None
    return [key.state for key in sorted(ring.keys, key=lambda key: key.number)]


def test_a_key_is_rotated_while_blocks_are_shared_and_read(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        for number in range(6):
            await share(there, f"b-{number}", b"%d" % number)
        old = there.stewards["sark"].keyring.ring("acme")
        assert old is not None
        await there.sharing.rotate("acme")
        reading = await there.sharing.get("acme", "b-0")
        for turn in range(6):
            for node in NODES:
                await there.stewards[node].tend()
            assert await got(there, f"b-{turn}") == b"%d" % turn
            await share(there, f"new-{turn}", b"new")
        assert await read(reading.pieces) == b"0"
        for node in NODES:
            assert states(there, node) == ["retired", "active"]
            assert there.stewards[node].store.under_key("acme", old.keys[0].key_id) == 0
            ring = there.stewards[node].keyring.ring("acme")
            assert ring is not None and not [key for key in ring.keys if key.state == "retired" and key.is_held]
        for number in range(6):
            for node in await there.copies(f"b-{number}"):
                assert await opened(there, node, f"b-{number}") == b"%d" % number

    tell(story)


def test_no_key_is_retired_that_another_machine_still_needs(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share(there, "a", b"x")
        tron = there.stewards["tron"]
        handle = await tron.begin("acme", "b", "data", "a/b", {})
        await tron.append(handle, 0, b"y")
        await there.sharing.rotate("acme")
        for _ in range(4):
            for node in ("clu", "sark"):
                await there.stewards[node].stay()
                await there.stewards[node].tend()
        assert states(there, "clu") == ["readable", "active"]
        await tron.finish(handle)
        for _ in range(3):
            await there.settle()
        assert states(there, "clu") == ["retired", "active"]
        assert await got(there, "b") == b"y"

    tell(story)


def test_a_machine_that_slept_through_a_rotation_catches_up(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        for number in range(6):
            await share(there, f"b-{number}", b"%d" % number)
        there.kill("clu")
        await there.sharing.rotate("acme")
        for _ in range(4):
            for node in ("sark", "tron"):
                await there.stewards[node].tend()
        assert states(there, "sark") == ["retired", "active"]
        await there.revive("clu")
        for _ in range(3):
            await there.settle()
        assert states(there, "clu") == ["retired", "active"]
        for number in range(6):
            for node in await there.copies(f"b-{number}"):
                assert await opened(there, node, f"b-{number}") == b"%d" % number

    tell(story, gone_seconds=60.0)


def test_two_stewards_that_make_a_tenants_first_key_agree_on_one(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await asyncio.gather(*(share(there, f"b-{number}", b"x") for number in range(8)))
        rings = {tuple(key.key_id for key in there.stewards[node].keyring.ring("acme").keys) for node in NODES}  # type: ignore[union-attr]
        assert len(rings) == 1 and len(next(iter(rings))) == 1

    tell(story)


def test_a_rotation_that_another_overtakes_is_made_of_its_keys(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older ring it would put another of the same generation in its place, and the machines' keys would part."""

    async def story(there: Machines) -> None:
        await share(there, "b", b"secret")
        first, other = there.stewards["sark"], there.stewards["clu"]
        real = there.voters.get

        async def overtaken(key: str, *arguments: bool) -> tuple[bytes, int] | None:
            if key == "share/keys/acme":
                monkeypatch.setattr(there.voters, "get", real)
                await other.rotate("acme")
            return await real(key, *arguments)

        monkeypatch.setattr(there.voters, "get", overtaken)
        await first.rotate("acme")
        rings = set()
        for node in NODES:
            await there.stewards[node].learn()
            ring = there.stewards[node].keyring.ring("acme")
            assert ring is not None
            rings.add((ring.generation, tuple((key.key_id, key.state) for key in ring.keys)))
        ((generation, keys),) = rings
        assert (generation, [state for _, state in keys]) == (3, ["readable", "readable", "active"])
        await there.settle()
        assert await got(there, "b") == b"secret"

    tell(story)


def test_who_is_no_member_under_the_cluster_key_is_believed_nothing(tell: Callable[..., None], tmp_path: Path) -> None:
    """A machine with another cluster key introduces itself; the others do not know it, and take none of its blocks."""

    async def story(there: Machines) -> None:
        (tmp_path / "mallory").mkdir(mode=0o700)
        stranger = Keyring(tmp_path / "mallory", "mallory", "Zq8Lw3Xn5Vb7Rt2Yp9Kc4Md6Hs1Jf0GuE8aT5iB3oW7")
        await there.voters.put(f"{INTRODUCED}mallory", stranger.introduction())
        await share(there, "a", b"x")
        assert "mallory" not in {one.node for one in there.stewards["sark"].keyring.writers()}
        stranger.install(stranger.draft_key("acme"))
        store = BlockStore(tmp_path / "mallory" / "blocks", stranger)
        block = BlockId("acme", "forged", await there.directory.reserve())
        with store.write(block) as draft:
            draft.feed(b"forged")
            forged = draft.commit()
        there.stewards["mallory"] = Steward(
            stranger, store, there.directory, there.reach_at(None), there.reach_at(None), there.settings
        )
        there.open_gate("mallory")
        with pytest.raises(Unavailable, match="no copy of the block can be had"):
            await there.stewards["sark"].take(block, forged.digest, ["mallory"])
        assert sum(len(there.files(node)) for node in NODES) == 2

    tell(story)


# Expelling


async def expel(there: Machines, node: str = "clu") -> int:
    left = await there.sharing.expel(node)
    there.up.discard(node)  # whose steward tends no more
    return left


async def settle_all(there: Machines) -> None:
    for _ in range(3):
        for node in sorted(there.up):
            await there.stewards[node].stay()
        await there.settle()
        await drain()


async def share_some(there: Machines, count: int = 12) -> dict[str, bytes]:
    wanted = {f"b-{number}": b"%d" % number * 9 for number in range(count)}
    for data_id, text in wanted.items():
        await share(there, data_id, text)
    return wanted


async def require(there: Machines, wanted: dict[str, bytes], nodes: tuple[str, ...] = ("sark", "tron")) -> None:
    """Every block is there, twice, on these machines, written and signed by one of them."""
    for data_id, text in wanted.items():
        entry = await there.directory.find("acme", data_id)
        assert entry is not None and set(entry.record.copies) <= set(nodes) and len(entry.record.copies) == 2
        for node in entry.record.copies:
            assert await opened(there, node, data_id) == text
            stored = there.stewards[node].store.find(await there.block(data_id))
            assert stored is not None and stored.header.writer == entry.record.writer in nodes
            assert stored.header.signer == entry.record.signer
    for node in nodes:
        assert len(there.files(node)) == len(wanted), "what gave way is gone"


def test_what_an_expelled_machine_wrote_is_sealed_anew_and_can_be_read_all_the_time(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        wanted = await share_some(there)
        record = await share(there, "kept", b"kept")
        before = {one.data_id: one.record for one in await there.directory.blocks("acme")}
        written = sum(record.writer == "clu" for record in before.values())
        assert written and await expel(there) == written
        for data_id, text in wanted.items():
            assert await got(there, data_id) == text
        await settle_all(there)
        wanted["kept"] = b"kept"
        await require(there, wanted)
        after = {one.data_id: one.record for one in await there.directory.blocks("acme")}
        for data_id, record in after.items():
            was = before[data_id]
            assert (record.created_at, record.length, record.media_type) == (was.created_at, was.length, was.media_type)
            assert (record.version > was.version) == (was.writer == "clu")
        (clu,) = [one for one in there.stewards["sark"].keyring.writers() if one.node == "clu"]
        assert clu.is_removed

    tell(story)


def test_what_an_expelled_machine_signs_from_then_on_is_refused(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share_some(there)
        clu, sark = there.stewards["clu"], there.stewards["sark"]
        await expel(there)
        there.up.add("clu")
        store = clu.store
        block = BlockId("acme", "forged", await there.directory.reserve())
        with store.write(block) as draft:
            draft.feed(b"forged")
            forged = draft.commit()
        raw = there.file("clu", block).read_bytes()
        with pytest.raises(WriterUnknown), sark.store.receive(block, forged.digest) as draft:
            draft.feed(raw)
            draft.commit()
        with pytest.raises(Unavailable, match="no copy of the block can be had"):
            await sark.take(block, forged.digest, ["clu"])
        await clu.learn()
        with pytest.raises(ConfigError, match="was removed"):
            await clu.begin("acme", "a", "data", "a/b", {})
        for work in (clu.stay, clu.tend):
            with pytest.raises(ConfigError, match="remove share/signing-key from its home"):
                await work()
        assert "clu" not in (await there.directory.view()).members

    tell(story)


def test_an_expelled_machine_is_answered_by_nobody_and_told_nothing(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share_some(there)
        reach = FaultyReach(there, CLIENT, 0, StewardMember(there, "clu"))
        await reach.call("sark", "describe")
        await there.sharing.expel("clu")
        for _ in range(2):  # in its session, and with a greeting
            with pytest.raises((Unavailable, ConfigError), match="was removed"):
                await reach.call("sark", "describe")
        with pytest.raises(WriterUnknown):
            await there.stewards["sark"]._reach.call("clu", "describe")

    tell(story)


def test_tenants_get_new_keys_when_a_machine_is_expelled(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        wanted = await share_some(there)
        (old,) = there.stewards["clu"].keyring.ring("acme").keys  # type: ignore[union-attr]
        await expel(there)
        await settle_all(there)
        for node in ("sark", "tron"):
            assert states(there, node) == ["retired", "active"]
            assert there.stewards[node].store.under_key("acme", old.key_id) == 0
        await require(there, wanted)

    tell(story)


def test_who_is_expelled_twice_is_expelled_and_who_is_not_known_is_said(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        wanted = await share_some(there)
        first = await expel(there)
        assert first == await expel(there) > 0
        generation = there.stewards["sark"].keyring.ring("acme").generation  # type: ignore[union-attr]
        await settle_all(there)
        assert await expel(there) == 0
        await require(there, wanted)
        assert there.stewards["sark"].keyring.ring("acme").generation == generation + 1  # type: ignore[union-attr]
        with pytest.raises(NotFound, match="no machine 'nobody'"):
            await there.sharing.expel("nobody")
        with pytest.raises(Conflict, match="cannot remove itself"):
            await there.stewards["sark"].expel("sark")

    tell(story)


def test_a_block_that_only_the_expelled_machine_had_keeps_nobody_from_the_end(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        for number in range(9):
            await share(there, f"b-{number}", b"x")
        alone = [one.data_id for one in await there.directory.blocks("acme") if one.record.copies == ("clu",)]
        assert 0 < len(alone) < 9 and await expel(there) == 0
        await settle_all(there)
        await settle_all(there)
        assert next(one for one in there.stewards["sark"].keyring.writers() if one.node == "clu").is_removed
        with pytest.raises(Unavailable):
            await got(there, alone[0])

    tell(story, copies=1)


def test_an_expelled_machine_that_wrote_nothing_knew_the_tenants_keys_too(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        data_id = next(f"b-{number}" for number in range(99) if rank(NODES, "acme", f"b-{number}")[0] != "clu")
        await share(there, data_id, b"x")
        assert await expel(there) == 0
        for _ in range(3):
            await settle_all(there)
        assert states(there, "sark") == states(there, "tron") == ["retired", "active"]
        assert await got(there, data_id) == b"x"

    tell(story, given=None)


def test_one_machine_alone_expels_nobody(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share(there, "a", b"x")
        with pytest.raises(Conflict, match="cannot expel itself"):
            await there.sharing.expel("sark")
        assert await got(there, "a") == b"x"

    tell(story, ("sark",))


def test_who_dies_while_it_seals_anew_loses_nothing(tell: Callable[..., None]) -> None:
    """At any of its calls: another, or itself after a start, goes on."""

    async def story(there: Machines) -> None:
        wanted = await share_some(there, 8)
        await expel(there)
        for turn in range(4):
            sark, calls = there.stewards["sark"], []

            def die(node: str, method: str, arguments: tuple[object, ...], calls=calls, turn=turn) -> None:  # type: ignore[no-untyped-def]
                calls.append(method)
                if len(calls) > turn:
                    raise ConnectionError("its machine lost power")

            there.refuse = die
            with suppress(ConnectionError, NexusError):
                await sark.tend()
            there.refuse = lambda node, method, arguments: None
            there.kill("sark")
            await drain()
            await there.revive("sark")
            for data_id, text in wanted.items():
                assert await got(there, data_id) == text
        await settle_all(there)
        for node in ("sark", "tron"):
            there.now += ORPHAN_SECONDS + 1
            there.stewards[node]._taken.clear()
            await there.stewards[node].scrub()
        await require(there, wanted)

    tell(story, gone_seconds=60.0)


def test_a_copy_on_a_machine_that_is_away_is_waited_for(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        wanted = await share_some(there)
        there.kill("tron")
        await expel(there)
        for _ in range(5):
            await there.stewards["sark"].tend()
        assert next(one for one in there.stewards["sark"].keyring.writers() if one.node == "clu").last is not None
        await there.revive("tron")
        await settle_all(there)
        assert next(one for one in there.stewards["sark"].keyring.writers() if one.node == "clu").is_removed
        await require(there, wanted)

    tell(story, gone_seconds=60.0)


def test_what_is_shared_while_the_old_version_is_sealed_anew_wins(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(there: Machines) -> None:
        await share_some(there)
        await expel(there)
        theirs = next(one for one in await there.directory.blocks("acme") if one.record.writer == "clu")
        node = next(one for one in theirs.record.copies if one != "clu")
        await share(there, theirs.data_id, b"later")
        assert not await there.stewards[node]._seal_anew(theirs, await there.directory.view())
        await drain()
        assert await got(there, theirs.data_id) == b"later"
        await settle_all(there)
        assert await got(there, theirs.data_id) == b"later"

    tell(story)


def test_an_expelled_machine_comes_back_under_another_key(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        wanted = await share_some(there)
        await expel(there)
        await settle_all(there)
        there.stewards["clu"].stop()
        with pytest.raises(ConfigError, match="remove share/signing-key"):
            await there.start("clu")
        (there.folder / "clu" / "share" / "signing-key").unlink()
        await there.start("clu")
        await settle_all(there)
        assert "clu" in (await there.directory.view()).usable
        for number in range(12):
            wanted[f"new-{number}"] = b"new"
            await share(there, f"new-{number}", b"new")
        for data_id, text in wanted.items():
            assert await got(there, data_id) == text
        assert any(one.record.writer == "clu" for one in await there.directory.blocks("acme"))

    tell(story)


# The cluster key


def secret_of(there: Machines, node: str) -> str:
    return (there.folder / node / "share-key").read_text().strip()


async def require_one_cluster_key(there: Machines, nodes: tuple[str, ...] = NODES) -> None:
    """All machines have the same, and no other, and nothing anywhere is under another one."""
    (secret,) = {secret_of(there, node) for node in nodes}
    wanted = ClusterKey(secret).key_id
    for node in nodes:
        assert list((there.folder / node / "share" / "cluster-keys").iterdir()) == []
        assert there.stewards[node].keyring.cluster_keys() == (wanted,)
        kept = [*(there.folder / node / "share").glob("keys/*"), *(there.folder / node / "share").glob("nodes/*")]
        assert {key_id_of(file.read_bytes()) for file in kept} == {wanted}
    for prefix in ("share/nodes/", "share/keys/", "share/cluster/"):
        assert {key_id_of(value) for _, value, _ in await there.voters.range(prefix)} == {wanted}


def test_the_cluster_key_is_changed_while_blocks_are_shared_and_read(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        wanted = await share_some(there, 4)
        before = secret_of(there, "sark")
        key_id = await there.sharing.rotate_cluster_key()
        with pytest.raises(Conflict, match="being changed already"):
            await there.stewards["clu"].rotate_cluster_key()
        for turn in range(4):
            for node in NODES:
                await there.stewards[node].tend()
                wanted[f"{node}-{turn}"] = b"while it changes"
                await share(there, f"{node}-{turn}", b"while it changes")
                tenant = f"tenant-{node}-{turn}"  # whose first key is under the one or the other
                await share(there, "a", tenant.encode(), tenant)
                for steward in there.stewards.values():
                    await steward.stay()
                assert await got(there, "a", tenant) == tenant.encode()
                assert await got(there, f"b-{turn}") == wanted[f"b-{turn}"]
        await settle_all(there)
        await require_one_cluster_key(there)
        assert ClusterKey(secret_of(there, "sark")).key_id == key_id != ClusterKey(before).key_id
        for data_id, text in wanted.items():
            for node in await there.copies(data_id):
                assert await opened(there, node, data_id) == text
        assert await there.sharing.rotate_cluster_key() != key_id
        await settle_all(there)
        await require_one_cluster_key(there)

    tell(story, given=None)


def test_a_machine_that_was_away_gets_the_cluster_key_when_it_returns(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        wanted = await share_some(there)
        there.kill("clu")
        old = secret_of(there, "clu")
        for _ in range(2):
            await there.sharing.rotate_cluster_key()
            for _ in range(4):
                for node in ("sark", "tron"):
                    await there.stewards[node].stay()
                    await there.stewards[node].tend()
        await require_one_cluster_key(there, ("sark", "tron"))
        assert secret_of(there, "clu") == old != secret_of(there, "sark")
        await there.revive("clu")
        await settle_all(there)
        await require_one_cluster_key(there)
        for data_id, text in wanted.items():
            for node in await there.copies(data_id):
                assert await opened(there, node, data_id) == text

    tell(story, given=None, gone_seconds=60.0)


def test_an_expelled_machine_never_gets_the_new_cluster_key_nor_the_tenants(tell: Callable[..., None]) -> None:
    """With all that its disk has, and all that the voters have."""

    async def story(there: Machines) -> None:
        wanted = await share_some(there)
        (known,) = there.stewards["clu"].keyring.ring("acme").keys  # type: ignore[union-attr]
        await expel(there)
        for _ in range(3):
            await settle_all(there)
        await require_one_cluster_key(there, ("sark", "tron"))
        await require(there, wanted)
        for node in ("sark", "tron"):
            assert states(there, node) == ["retired", "active"]
        stolen = ClusterKey(secret_of(there, "clu"))
        clu = there.stewards["clu"]
        for key, value, _ in [*await there.voters.range("share/keys/"), *await there.voters.range("share/nodes/")]:
            with pytest.raises(UpstreamInvalid):
                stolen.unseal("ring" if "keys" in key else "machine", value)
        await clu.learn()
        assert clu.keyring.ring("acme").active == known  # type: ignore[union-attr]
        for work in (clu.tend, clu.rotate_cluster_key):
            with suppress(ConfigError, Unavailable):
                await work()
        asking = FaultyReach(there, CLIENT, 0, StewardMember(there, "clu"))
        with pytest.raises((Unavailable, WriterUnknown)):
            await asking.call("sark", "hand_over", there.stewards["sark"].keyring.cluster_key_id)
        clu.stop()
        with pytest.raises(Unavailable, match=r"the cluster key is .* by now, and no machine hands it over"):
            await there.start("clu")
        assert ClusterKey(secret_of(there, "clu")).key_id == stolen.key_id

    tell(story, given=None)


def test_what_is_put_under_the_old_cluster_key_later_is_not_believed(tell: Callable[..., None]) -> None:
    """As by who has the disk of an expelled machine and makes it another key to sign with."""

    async def story(there: Machines) -> None:
        await share_some(there, 4)
        old = secret_of(there, "sark")
        await there.sharing.rotate_cluster_key()
        await there.stewards["clu"].tend()
        assert await there.voters.get("share/cluster/active") is not None
        (there.folder / "mallory").mkdir(mode=0o700)
        stranger = Keyring(there.folder / "mallory", "mallory", old)
        await there.voters.put(f"{INTRODUCED}mallory", stranger.introduction())
        await there.voters.put("share/keys/umbrella", stranger.draft_key("umbrella"))
        for node in NODES:
            await there.stewards[node].learn()
            assert len(there.stewards[node].keyring.cluster_keys()) == 2, "so it could read them"
            assert "mallory" not in {one.node for one in there.stewards[node].keyring.writers()}
            assert there.stewards[node].keyring.ring("umbrella") is None

    tell(story, given=None)


def test_a_cluster_key_that_was_lost_with_who_made_it_is_made_again(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share_some(there, 4)
        await there.stewards["clu"].rotate_cluster_key()
        there.kill("clu")
        await settle_all(there)
        await there.sharing.rotate_cluster_key()
        await settle_all(there)
        await require_one_cluster_key(there, ("sark", "tron"))
        await there.revive("clu")
        await settle_all(there)
        await require_one_cluster_key(there)

    tell(story, given=None)


def test_a_machine_that_keeps_no_blocks_has_the_cluster_key_changed_too(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share_some(there, 4)
        sharing = there.sharing
        assert await read((await sharing.get("acme", "b-0")).pieces)
        await sharing.rotate_cluster_key()
        for _ in range(2):
            await settle_all(there)
        await there.door(DESK).learn()
        assert secret_of(there, DESK) == secret_of(there, "sark")
        there.doors.clear()
        assert await got(there, "b-0")

    tell(story, given=None)


def test_the_cluster_key_is_not_used_before_every_machine_that_is_there_has_it(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share_some(there, 4)
        before = secret_of(there, "sark")

        def refuse(node: str, method: str, arguments: tuple[object, ...]) -> None:
            if node == "tron" and method == "holds":
                raise ConnectionError("it is busy")

        there.refuse = refuse
        await there.sharing.rotate_cluster_key()
        await settle_all(there)
        assert await there.voters.get("share/cluster/active") is None
        assert {secret_of(there, node) for node in NODES} == {before}
        there.refuse = lambda node, method, arguments: None
        await settle_all(there)
        await require_one_cluster_key(there)

    tell(story, given=None)


def test_a_cluster_key_in_the_settings_is_not_for_commands_to_change(tell: Callable[..., None]) -> None:
    async def story(there: Machines) -> None:
        await share_some(there, 4)
        with pytest.raises(Conflict, match=r"sharing\.key"):
            await there.sharing.rotate_cluster_key()

    tell(story)


# Everything at once


@pytest.mark.parametrize("seed", range(4))
def test_nothing_acknowledged_is_lost_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """More seeds: `python -m tests.bench.share --seeds 200`."""
    be_simple(monkeypatch)
    asyncio.run(World(tmp_path, seed).run())
