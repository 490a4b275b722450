"""The five moves of HADES: what is visible, to whom, when; over every document store (document_stores.py)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.errors import Conflict, Fenced, InvalidRequest, NotFound, Unavailable
from nexus.hades import Hades, chunks_of, document_id_of
from nexus.kept import unpack
from nexus.ports import IndexRow, Scope, Staged
from nexus.stores import memory, sqlite
from nexus.types import Piece, Principal, SearchRequest
from tests.conftest import ALICE, BOB, MALLORY, House, build_house
from tests.document_stores import STORES, Open, lose_chunk, place, spoil_kept, spoil_vector


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    with place(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture
def house(store: Open) -> Iterator[House]:
    documents = store()
    house = build_house(documents, memory.open("memory:"))
    yield house
    house.retriever.close()
    documents.close()


def found(house: House, query: str, who: Principal = ALICE, **fields: object) -> list[str]:
    """Texts of the hits; none when the collection is not there yet."""
    return [hit.text for hit in house.retriever.search(SearchRequest(query, **fields), who).hits]


def test_staged_is_invisible_and_published_is_visible(house: House) -> None:
    house.put("other.txt", "an unrelated text")
    document = house.describe("a.txt", ["gripper torque", "gripper speed"])
    epoch = house.stage(document, ["gripper torque", "gripper speed"])
    assert "gripper torque" not in found(house, "gripper")
    house.hades.publish([(document, epoch)])
    assert {"gripper torque", "gripper speed"} <= set(found(house, "gripper"))


def test_a_new_version_replaces_the_old_one_whole(house: House) -> None:
    house.put("a.txt", "old gripper one", "old gripper two", "old gripper three")
    house.put("a.txt", "new gripper one")
    assert found(house, "gripper") == ["new gripper one"]


def test_sequence_numbers_grow_by_one_and_as_of_sees_the_past(house: House) -> None:
    first = house.put("a.txt", "gripper version one")
    second = house.put("a.txt", "gripper version two")
    assert (first.opened, second.opened) == (1, 2)
    assert found(house, "gripper", as_of=1) == ["gripper version one"]
    assert found(house, "gripper", as_of=2) == ["gripper version two"]
    assert found(house, "gripper", as_of=0) == []


def test_a_then_b_then_a_again_keeps_a_true_history(house: House) -> None:
    for text in ("gripper A", "gripper B", "gripper A"):
        house.put("a.txt", text)
    assert [found(house, "gripper", as_of=s) for s in (1, 2, 3)] == [["gripper A"], ["gripper B"], ["gripper A"]]


def test_a_document_has_its_versions_until_they_are_vacuumed_for_who_may_read_it(house: House) -> None:
    def history(who: Principal = ALICE) -> list[tuple[str, int | None, int | None]]:
        versions = house.hades.documents.history(document.document_id, who)
        return [(one.version, one.opened, one.closed) for one in versions]

    document, other = house.put("a.txt", "gripper A"), house.put("b.txt", "gripper of another")
    changed = house.put("a.txt", "gripper B")
    house.put("a.txt", "gripper A")
    house.stage(house.describe("a.txt", ["gripper C"]), ["gripper C"])
    was = [(document.version, 4, None), (changed.version, 3, 4), (document.version, 1, 3)]
    assert history() == history(BOB) == was and history(MALLORY) == []
    house.hades.vacuum(-1, -1)
    assert {one[0] for one in history()} == {document.version}
    mine = house.put("a.txt", "gripper of alice", readers=frozenset({"alice"}))
    assert history()[0] == (mine.version, 5, None) and history(BOB) == []
    house.hades.delete([document.document_id], ALICE)
    assert history() == [] and len(house.hades.documents.history(other.document_id, BOB)) == 1


def test_a_later_begin_fences_the_earlier(house: House) -> None:
    slow = house.describe("a.txt", ["slow gripper"])
    slow_epoch = house.stage(slow, ["slow gripper"])
    house.put("a.txt", "quick gripper")
    with pytest.raises(Fenced):
        house.hades.publish([(slow, slow_epoch)])
    with pytest.raises(Fenced):
        house.hades.stage([Staged(slow, slow_epoch, [], [], house.embedder.embed([]))])
    assert found(house, "gripper") == ["quick gripper"]


def test_a_delete_fences_whoever_is_still_making_the_document(house: House) -> None:
    published = house.put("a.txt", "first gripper")
    late = house.describe("a.txt", ["late gripper"])
    epoch = house.stage(late, ["late gripper"])
    house.hades.delete([published.document_id], ALICE)
    with pytest.raises(Fenced):
        house.hades.publish([(late, epoch)])
    assert found(house, "gripper") == []


def test_a_batch_is_published_whole_or_not_at_all(house: House) -> None:
    house.put("base.txt", "something else")
    batch = []
    for name in ("a", "b", "c"):
        document = house.describe(f"{name}.txt", [f"gripper {name}"])
        batch.append((document, house.stage(document, [f"gripper {name}"])))
    fenced = [*batch[:2], (batch[2][0], batch[2][1] - 1)]
    with pytest.raises(Fenced):
        house.hades.publish(fenced)
    assert not any("gripper" in text for text in found(house, "gripper"))
    published = house.hades.publish(batch)
    assert [document.opened for document in published] == [2, 3, 4]


def test_a_version_with_chunks_missing_is_not_published(house: House) -> None:
    document = house.describe("a.txt", ["one", "two"])
    epoch = house.hades.begin(document)
    chunks = chunks_of(document, [Piece("one")])
    house.hades.stage([Staged(document, epoch, chunks, ["one"], house.embedder.embed(["one"]))])
    with pytest.raises(Conflict):
        house.hades.publish([(document, epoch)])


def test_staging_a_version_again_leaves_no_chunk_of_the_first_time(house: House) -> None:
    document = house.describe("a.txt", ["one", "two"])
    house.stage(document, ["one", "two"])
    shorter = replace(document, chunks=1)
    (published,) = house.hades.publish([(shorter, house.stage(shorter, ["one"]))])
    assert len(house.hades.documents.chunk_ids_of(published.document_id, published.version)) == published.chunks == 1


def test_deleted_is_gone_at_once_but_not_from_the_past(house: House) -> None:
    document = house.put("a.txt", "gripper manual")
    (gone,) = house.hades.delete([document.document_id], ALICE)
    assert gone.closed == 2
    assert found(house, "gripper") == []
    assert found(house, "gripper", as_of=1) == ["gripper manual"]
    with pytest.raises(NotFound):
        house.hades.delete([document.document_id], ALICE)


def test_a_receipt_is_complete_when_nothing_older_is_left(house: House) -> None:
    documents, made = house.hades.documents, [house.put("a.txt", text) for text in ("one", "two", "three")]
    house.hades.delete([made[0].document_id], ALICE)
    for purged, document in enumerate(made, 1):
        assert documents.retire(document, float("inf"), float("inf")) is not None and documents.purge(document)
        (receipt,) = documents.deletions(ALICE, document.document_id, 5)
        assert (receipt.versions, receipt.chunks, receipt.purged_at is None) == (purged, purged, purged < 3)


def test_another_tenant_sees_nothing_and_can_delete_nothing(house: House) -> None:
    document = house.put("a.txt", "gripper secret")
    with pytest.raises(NotFound):
        found(house, "gripper", MALLORY)
    house.put("x.txt", "wheel", who=MALLORY)
    assert found(house, "gripper", MALLORY) == ["wheel"]
    house.hades.delete([document_id_of("other", "default", "x.txt")], MALLORY)
    assert house.hades.documents.documents(MALLORY, None, None, 10) == []
    assert house.hades.documents.current(document.document_id, MALLORY) is None
    with pytest.raises(NotFound):
        house.hades.delete([document.document_id], MALLORY)
    assert found(house, "gripper") == ["gripper secret"]


def test_readers_limit_who_sees_a_document(house: House) -> None:
    house.put("a.txt", "gripper for alice", readers=frozenset({"alice"}))
    house.put("b.txt", "gripper for all")
    assert set(found(house, "gripper")) == {"gripper for alice", "gripper for all"}
    assert found(house, "gripper", BOB) == ["gripper for all"]


def test_where_readers_have_nobody_in_common_the_past_is_nobodys(house: House) -> None:
    house.put("a.txt", "gripper old", readers=frozenset({"alice"}))
    house.put("a.txt", "gripper new", readers=frozenset({"bob"}))
    carol = Principal("acme", "carol")
    assert [found(house, "gripper", who, as_of=1) for who in (ALICE, BOB, carol)] == [[], [], []]
    assert [found(house, "gripper", who) for who in (ALICE, BOB, carol)] == [[], ["gripper new"], []]


def test_the_same_source_in_two_tenants_is_two_documents(house: House) -> None:
    ours, theirs = house.put("a.txt", "gripper ours"), house.put("a.txt", "gripper theirs", who=MALLORY)
    assert ours.document_id != theirs.document_id
    assert (found(house, "gripper"), found(house, "gripper", MALLORY)) == (["gripper ours"], ["gripper theirs"])


def test_unchanged_content_is_recognised_and_its_metadata_brought_up_to_date(house: House) -> None:
    document = house.put("a.txt", "gripper", metadata={"robot": "HX-3"})
    again = house.describe("a.txt", ["gripper"], metadata={"robot": "HX-4"})
    assert house.hades.is_unchanged(again, ALICE) is not None
    current = house.hades.documents.current(document.document_id, ALICE)
    assert current is not None
    assert (current.metadata, current.opened) == ({"robot": "HX-4"}, 1)
    assert house.hades.is_unchanged(house.describe("a.txt", ["another"]), ALICE) is None


def test_vacuum_removes_what_nobody_needs_and_only_that(house: House) -> None:
    house.put("a.txt", "gripper one")
    house.put("a.txt", "gripper two")
    abandoned = house.describe("b.txt", ["never finished"])
    house.stage(abandoned, ["never finished"])
    assert house.hades.vacuum(keep_closed_seconds=3600, keep_staged_seconds=3600) == []
    removed = house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
    assert {(one.document.source, one.why, one.chunks) for one in removed} == {
        ("a.txt", "closed", 1), ("b.txt", "never published", 1)
    }  # fmt: skip
    assert found(house, "gripper") == ["gripper two"]
    index = house.hades.find_collection("default").index
    assert len(house.hades.vectors.chunk_ids(index)) == 1
    assert len(house.hades.documents.chunk_ids(index, published=False)) == 1


def test_vacuum_takes_what_was_closed_just_now_but_not_what_is_staged_again(house: House) -> None:
    first = house.put("a.txt", "gripper one")
    house.put("a.txt", "gripper two")
    again = house.describe("a.txt", ["gripper one"])
    epoch = house.stage(again, ["gripper one"])
    assert house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=60) == []
    house.hades.publish([(again, epoch)])
    removed = house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=60)
    assert [one.document.version for one in removed] == [house.describe("a.txt", ["gripper two"]).version]
    house.hades.delete([first.document_id], ALICE)
    assert len(house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=60)) == 1
    assert found(house, "gripper") == [] and house.hades.documents.chunk_ids("", published=False) == set()


def test_vacuum_leaves_a_version_that_came_back(house: House) -> None:
    for text in ("gripper A", "gripper B", "gripper A"):
        house.put("a.txt", text)
    house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
    assert found(house, "gripper") == ["gripper A"]
    assert house.hades.fsck() == []


def test_fsck_names_what_is_missing_and_what_is_left_over(house: House) -> None:
    document = house.put("a.txt", "gripper one", "gripper two")
    assert house.hades.fsck() == []
    index = house.hades.find_collection("default").index
    lost, left = house.hades.documents.chunk_ids_of(document.document_id, document.version)
    house.hades.vectors.delete(index, [lost])
    assert [(fault.kind, fault.ids) for fault in house.hades.fsck()] == [
        ("visible chunks that no search can find", (lost,))
    ]
    house.hades.delete([document.document_id], ALICE)
    assert house.hades.documents.retire(document, float("inf"), float("inf")) == [lost, left]
    assert house.hades.documents.purge(document)
    assert [(fault.kind, fault.ids) for fault in house.hades.fsck()] == [("vectors without a chunk", (left,))]


def test_repair_writes_missing_vectors_again_and_removes_orphans_without_a_model(house: House) -> None:
    document = house.put("a.txt", "gripper one", "gripper two", "gripper three")
    index = house.hades.find_collection("default").index
    chunk_ids = house.hades.documents.chunk_ids_of(document.document_id, document.version)
    scope = Scope(ALICE.tenant)
    before = dict(house.hades.vectors.search_text(index, "gripper two", 10, scope))
    house.hades.vectors.delete(index, chunk_ids[1:])
    house.hades.vectors.upsert(index, [IndexRow("stray", "d", ALICE.tenant, "gripper", house.embedder.embed(["x"])[0])])
    house.hades.repair(house.hades.fsck())
    assert house.hades.fsck() == []
    assert dict(house.hades.vectors.search_text(index, "gripper two", 10, scope)) == pytest.approx(before)
    assert found(house, "gripper two")[0] == "gripper two"


def test_fsck_names_chunks_that_are_not_whole(house: House) -> None:
    document = house.put("a.txt", "gripper one", "gripper two")
    first, second = house.hades.documents.chunk_ids_of(document.document_id, document.version)
    spoil_vector(house.hades.documents, first)
    assert [fault.ids for fault in house.hades.fsck()] == [(first,)]
    lose_chunk(house.hades.documents, second)
    assert {i for fault in house.hades.fsck() for i in fault.ids} == {document.document_id, first, second}


def test_what_chunks_were_cut_from_is_kept_with_the_version_and_goes_with_it(house: House) -> None:
    documents = house.hades.documents
    first, second = house.put("a.txt", "gripper one", "gripper two"), house.put("a.txt", "gripper three")
    for version, texts in ((first, ["gripper one", "gripper two"]), (second, ["gripper three"])):
        parsed = unpack(documents.kept(version.document_id, version.version) or b"")
        assert parsed is not None and [block.text for block in parsed.blocks] == texts
    assert documents.kept(first.document_id, "unknown") is None
    house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
    assert documents.kept(first.document_id, first.version) is None
    assert documents.kept(second.document_id, second.version) is not None


def test_fsck_names_what_is_kept_and_cannot_be_read(house: House) -> None:
    document = house.put("a.txt", "gripper one")
    house.put("b.txt", "gripper two")
    spoil_kept(house.hades.documents, document)
    assert [fault.ids for fault in house.hades.fsck()] == [(document.document_id,)]
    assert found(house, "gripper one")[0] == "gripper one"


def test_a_store_of_before_keeps_what_comes_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "MIGRATIONS", sqlite.MIGRATIONS[:5])
    sqlite.open("sqlite:", home=tmp_path).close()
    monkeypatch.undo()
    documents = sqlite.open("sqlite:", home=tmp_path)
    house = build_house(documents, memory.open("memory:"))
    document = house.put("a.txt", "gripper one")
    assert documents.kept(document.document_id, document.version) and house.hades.fsck() == []
    house.retriever.close()
    documents.close()


def test_a_full_disk_is_told_as_such_and_what_was_there_stays(tmp_path: Path) -> None:
    documents = sqlite.open("sqlite:", home=tmp_path)
    house = build_house(documents, memory.open("memory:"))
    house.put("a.txt", "gripper one")
    (pages,) = documents._connect().execute("PRAGMA page_count").fetchone()
    documents._connect().execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(Unavailable) as full:
        house.put("b.txt", *(f"gripper {number} {'x' * 2000}" for number in range(50)))
    assert full.value.code == "storage_full"
    assert found(house, "gripper") == ["gripper one"]
    documents._connect().execute("PRAGMA max_page_count = 1000000")
    house.put("b.txt", "gripper two")
    assert sorted(found(house, "gripper")) == ["gripper one", "gripper two"]
    house.retriever.close()
    documents.close()


def test_as_of_is_refused_for_moments_of_which_something_is_gone(house: House) -> None:
    house.put("a.txt", "gripper one")
    house.put("b.txt", "gripper other")
    house.put("a.txt", "gripper two")
    house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
    assert sorted(found(house, "gripper", as_of=3)) == ["gripper other", "gripper two"]
    with pytest.raises(InvalidRequest, match="the oldest that can be asked for is 3"):
        found(house, "gripper", as_of=2)


def test_an_upload_accepted_before_a_delete_does_not_bring_the_document_back(house: House) -> None:
    document = house.put("a.txt", "gripper one")
    house.hades.delete([document.document_id], ALICE)
    with pytest.raises(Fenced):
        house.hades.begin(document, accepted_at=1)
    house.hades.begin(document, accepted_at=2)


def test_a_publish_that_comes_twice_is_one_publish(house: House) -> None:
    document = house.describe("a.txt", ["gripper"])
    epoch = house.stage(document, ["gripper"])
    (first,), (second,) = house.hades.publish([(document, epoch)]), house.hades.publish([(document, epoch)])
    assert first.opened == second.opened == 1 == house.hades.find_collection("default", ALICE.tenant).sequence


def test_a_collection_is_not_mixed_with_another_embedder(house: House) -> None:
    house.put("a.txt", "gripper")
    other = Hades(house.hades.documents, house.hades.vectors, "another embedder", 64)
    with pytest.raises(Conflict, match="another model"):
        other.begin(house.describe("b.txt", ["x"]))


def test_listing_pages_through_all_documents_once(house: House) -> None:
    ids = {house.put(f"{n}.txt", f"gripper {n}").document_id for n in range(5)}
    documents, after, seen = house.hades.documents, None, []
    while page := documents.documents(ALICE, "default", after, 2):
        seen += [document.document_id for document in page]
        after = seen[-1]
    assert len(seen) == 5 and set(seen) == ids
    assert documents.documents(ALICE, "elsewhere", None, 10) == []


def test_a_store_of_a_newer_nexus_is_refused(tmp_path: Path) -> None:
    store = sqlite.open("sqlite:", home=tmp_path)
    with store._transaction() as db:
        db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(Exception, match="newer Nexus"):
        sqlite.open("sqlite:", home=tmp_path)


@pytest.mark.parametrize("store", [kind for kind in STORES if kind != "memory"], indirect=True)
def test_what_was_published_survives_reopening(store: Open) -> None:
    first = store()
    vectors = memory.open("memory:")
    house = build_house(first, vectors)
    document = house.put("a.txt", "gripper", metadata={"pages": 3})
    first.close()
    second = store()
    reopened = build_house(second, vectors)
    assert found(reopened, "gripper") == ["gripper"]
    assert second.current(document.document_id, ALICE) == replace(
        document, created_at=second.current(document.document_id, ALICE).created_at
    )
    second.close()
