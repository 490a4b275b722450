"""Homes: every file has exactly one, copies are verified, holds hold, and what is indexed goes with its file."""

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from nexus import homes as homes_module
from nexus.errors import ConfigError, Conflict, InvalidRequest, NotFound, Unavailable
from nexus.hades import document_id_of
from nexus.homes import DATABASE, LOCK_FILE, HadesIndexer, Homes
from nexus.policy import MAX_RULES, Plan, converge, parse_rule, plan
from nexus.ports import Placement, Tier
from nexus.registry import open_tier
from nexus.tiers import PARTIAL
from nexus.tiers.filesystem import LocalTier
from nexus.types import FileOutcome, SearchRequest, StoredFile
from tests.conftest import ALICE, House, build_steps

NOW = 1_800_000_000.0


@dataclass
class Place:
    """Homes over three folders, and what is really in these."""

    root: Path
    homes: Homes

    def put(self, tier: str, path: str, content: bytes | str = b"bytes", tenant: str = "acme") -> None:
        file = self.root / tier / tenant / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def there(self, tenant: str = "acme") -> dict[str, list[str]]:
        """Every file that lies in any folder, with the tiers that have it; whatever Nexus left beside, too."""
        found: dict[str, list[str]] = {}
        for tier in self.homes.tiers:
            top = self.root / tier / tenant
            for file in sorted(top.rglob("*")) if top.exists() else ():
                if file.is_file():
                    found.setdefault(file.relative_to(top).as_posix(), []).append(tier)
        return found

    def file(self, path: str = "run.bag", tenant: str = "acme") -> StoredFile:
        return self.homes.file(tenant, path)

    def intents(self) -> int:
        with self.homes._reading() as db:
            (count,) = db.execute("SELECT count(*) FROM intents").fetchone()
            return int(count)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    for name in ("hot", "warm", "cold"):
        (tmp_path / name).mkdir()
    tiers = {name: open_tier(f"file:{tmp_path}/{name}") for name in ("hot", "warm", "cold")}
    opened = Homes(tmp_path / "home", tiers)
    yield Place(tmp_path, opened)
    opened.close()


@pytest.fixture
def one(place: Place) -> Place:
    """With one file, which is known."""
    place.put("hot", "run.bag")
    place.homes.scan("acme", "hot")
    return place


def statuses(outcomes: Sequence[FileOutcome]) -> list[tuple[str, str, str]]:
    return [(one.path, one.status, one.reason) for one in outcomes]


def succeed(outcomes: Sequence[FileOutcome]) -> None:
    assert [one.status for one in outcomes] == ["success"] * len(outcomes), statuses(outcomes)


# ── looking at tiers ────────────────────────────────────────────────────────────────────────────


def test_a_look_at_a_tier_finds_what_is_new_changed_and_missing(place: Place) -> None:
    for number in range(300):  # more than a batch
        place.put("hot", f"{number:03}.txt", f"file {number}")
    first = place.homes.scan("acme", "hot")
    assert (first.added, first.changed, first.unchanged, first.missing, first.problems) == (300, 0, 0, (), ())
    second = place.homes.scan("acme", "hot")
    assert (second.added, second.changed, second.unchanged) == (0, 0, 300)
    before = place.file("007.txt")
    assert (before.tier, before.size, before.media_type, len(before.checksum)) == ("hot", 6, "text/plain", 32)
    place.put("hot", "007.txt", "changed")
    place.put("hot", "new.txt")
    (place.root / "hot" / "acme" / "008.txt").unlink()
    third = place.homes.scan("acme", "hot")
    assert (third.added, third.changed, third.unchanged, third.missing) == (1, 1, 298, ("008.txt",))
    assert place.file("007.txt").checksum != before.checksum
    assert len(place.homes.files("acme")) == 301  # what is missing is still known


def test_a_tier_that_is_away_makes_nothing_missing(one: Place) -> None:
    (one.root / "hot").rename(one.root / "unmounted")
    with pytest.raises(Unavailable):
        one.homes.scan("acme", "hot")
    assert one.file().tier == "hot"
    with pytest.raises(InvalidRequest, match="there are hot, warm, cold"):
        one.homes.scan("acme", "tape")


def test_a_file_that_is_also_somewhere_else_is_told_and_left(one: Place) -> None:
    one.put("cold", "run.bag", "another")
    found = one.homes.scan("acme", "cold")
    assert [(problem.path, problem.reason) for problem in found.problems] == [("run.bag", "it lives on 'hot'")]
    assert found.added == 0 and one.file().tier == "hot"
    assert one.homes.faults("acme") == ["'run.bag' on 'cold': it lives on 'hot'"]


def test_tenants_have_files_of_their_own(one: Place) -> None:
    one.put("hot", "run.bag", "theirs", tenant="other")
    one.homes.scan("other", "hot")
    assert one.homes.tenants() == ["acme", "other"]
    succeed(one.homes.delete([one.file(tenant="other")]))
    assert one.there() == {"run.bag": ["hot"]} and one.there("other") == {}
    with pytest.raises(NotFound):
        one.homes.file("other", "run.bag")


def test_what_is_known_of_a_file_besides(one: Place) -> None:
    described = one.homes.describe("acme", "run.bag", {"robot_id": "HX-3", "year": 2025}, used_at=NOW)
    assert described.metadata == {"robot_id": "HX-3", "year": 2025} and described.used_at == NOW
    one.put("hot", "run.bag", "changed")
    one.homes.scan("acme", "hot")
    assert one.file().metadata == {"robot_id": "HX-3", "year": 2025}
    with pytest.raises(InvalidRequest):
        one.homes.describe("acme", "run.bag", {"nested": {}})
    with pytest.raises(NotFound):
        one.homes.describe("acme", "no.bag", {})


def test_what_is_gone_is_forgotten_when_people_say_so(one: Place) -> None:
    with pytest.raises(Conflict, match="is on tier"):
        one.homes.forget("acme", "run.bag")
    (one.root / "hot" / "acme" / "run.bag").unlink()
    one.homes.hold([one.file()], "case")
    with pytest.raises(Conflict, match="case"):
        one.homes.forget("acme", "run.bag")
    one.homes.release("acme", "run.bag", "case")
    one.homes.forget("acme", "run.bag")
    assert one.homes.files("acme") == []


def test_a_copy_becomes_the_home_of_what_is_gone_from_its_own(one: Place) -> None:
    succeed(one.homes.replicate([one.file()], frozenset({"cold"})))
    (one.root / "hot/acme/run.bag").unlink()
    assert one.homes.scan("acme", "hot").missing == ("run.bag",)
    one.put("cold", "run.bag", "rotten")
    with pytest.raises(Conflict, match="not whole"):
        one.homes.forget("acme", "run.bag")
    one.put("cold", "run.bag")
    file = one.homes.forget("acme", "run.bag")
    assert file is not None and (file.tier, file.replicas) == ("cold", frozenset())
    succeed(one.homes.move([file], "hot"))
    assert one.there() == {"run.bag": ["hot"]} and one.homes.faults("acme") == []


# ── moving ──────────────────────────────────────────────────────────────────────────────────────


def test_a_move_gives_another_home_and_leaves_nothing_behind(one: Place) -> None:
    before = one.file()
    (outcome,) = one.homes.move([before], "cold")
    assert (outcome.status, outcome.source, outcome.target) == ("success", "hot", "cold")
    assert one.there() == {"run.bag": ["cold"]}
    assert one.file() == replace(before, tier="cold")
    assert one.intents() == 0 and one.homes.faults("acme") == []
    succeed(one.homes.move([before], "cold"))  # again: it is there
    assert one.homes.scan("acme", "cold").unchanged == 1


def test_odd_names_move_as_any_other(place: Place) -> None:
    names = ["new\nline", "star*?[x]", "日本語/ü", "a'b\"c", "-rf", " lead", "%2e%2e", "\u202egnp"]
    for name in names:
        place.put("hot", name, name)
    assert place.homes.scan("acme", "hot").added == len(names)
    succeed(place.homes.move(place.homes.files("acme"), "warm"))
    assert place.there() == {name: ["warm"] for name in sorted(names)}
    assert place.homes.faults("acme") == []


def test_a_file_that_changed_since_it_was_looked_at_stays(one: Place) -> None:
    before = one.file()
    one.put("hot", "run.bag", "precious")
    (outcome,) = one.homes.move([before], "cold")
    assert (outcome.status, outcome.code) == ("failed", "conflict")
    assert one.there() == {"run.bag": ["hot"]} and one.intents() == 0
    one.homes.scan("acme", "hot")
    (outcome,) = one.homes.move([before], "cold")
    assert "plan again" in outcome.reason
    succeed(one.homes.move([one.file()], "cold"))
    assert (one.root / "cold/acme/run.bag").read_text() == "precious"


def test_a_file_that_changes_while_it_is_copied_keeps_its_home(one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def meddle(point: str) -> None:
        if point == "homes.inside_copy":
            one.put("hot", "run.bag", "precious")

    monkeypatch.setattr("nexus.tiers.filesystem.pass_through", meddle)
    (outcome,) = one.homes.move([one.file()], "cold")
    assert (outcome.status, "while it was copied" in outcome.reason) == ("failed", True)
    assert one.there() == {"run.bag": ["hot"]}
    assert (one.root / "hot/acme/run.bag").read_text() == "precious"


def test_a_file_that_changes_just_before_it_would_be_removed_is_not(
    one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddle(point: str) -> None:
        if point == "homes.before_remove":
            one.put("hot", "run.bag", "precious")

    monkeypatch.setattr(homes_module, "pass_through", meddle)
    succeed(one.homes.move([one.file()], "cold"))
    assert one.there() == {"run.bag": ["hot", "cold"]}
    assert (one.root / "hot/acme/run.bag").read_text() == "precious"
    assert one.homes.scan("acme", "hot").problems[0].reason == "it lives on 'cold'"


def test_rotten_bytes_are_not_spread(one: Place) -> None:
    file = one.root / "hot" / "acme" / "run.bag"
    with one.homes._transaction() as db:
        db.execute("UPDATE files SET checksum = ?", ("0" * 32,))
    (outcome,) = one.homes.move([one.file()], "cold")
    assert outcome.status == "failed" and "written down" in outcome.reason
    assert one.there() == {"run.bag": ["hot"]} and file.read_bytes() == b"bytes"
    assert one.homes.faults("acme") == ["'run.bag' on 'hot': its bytes are others"]


def test_another_file_of_that_name_is_not_written_over(one: Place) -> None:
    one.put("cold", "run.bag", "foreign")
    (outcome,) = one.homes.move([one.file()], "cold")
    assert outcome.status == "failed" and "another file" in outcome.reason
    assert (one.root / "cold/acme/run.bag").read_text() == "foreign" and one.file().tier == "hot"
    one.put("cold", "run.bag", "bytes")  # the very same may be taken for the copy
    succeed(one.homes.move([one.file()], "cold"))
    assert one.there() == {"run.bag": ["cold"]}


def test_one_file_fails_alone(place: Place) -> None:
    for name in ("a", "b", "c"):
        place.put("hot", name, name)
    place.homes.scan("acme", "hot")
    files = place.homes.files("acme")
    (place.root / "hot/acme/b").unlink()
    outcomes = place.homes.move([*files, replace(files[0], path="unknown")], "warm")
    assert [(one.path, one.status) for one in outcomes] == [
        ("a", "success"), ("b", "failed"), ("c", "success"), ("unknown", "failed")
    ]  # fmt: skip
    assert place.there() == {"a": ["warm"], "c": ["warm"]} and place.intents() == 0
    (outcome,) = place.homes.move(files[:1], "tape")
    assert outcome.status == "failed" and "no tier 'tape'" in outcome.reason


def test_a_tier_that_is_away_is_waited_for(one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is made; what is needless now cannot be removed, and stays written down until it can."""

    def unmount(point: str) -> None:
        if point == "homes.before_remove" and (one.root / "hot").exists():
            (one.root / "hot").rename(one.root / "unmounted")

    monkeypatch.setattr(homes_module, "pass_through", unmount)
    succeed(one.homes.move([one.file()], "cold"))
    monkeypatch.undo()
    assert one.intents() == 1 and one.homes.recover() == 1
    (outcome,) = one.homes.move([one.file()], "warm")
    assert outcome.status == "failed" and "waits for tier 'hot'" in outcome.reason
    (one.root / "unmounted").rename(one.root / "hot")
    succeed(one.homes.move([one.file()], "warm"))
    assert one.there() == {"run.bag": ["warm"]} and one.intents() == 0


def test_a_copy_outlives_a_power_cut_before_it_counts(one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is synced before the switch, what was removed before that is forgotten."""
    seen: list[tuple[str, str, int]] = []
    for name, tier in one.homes.tiers.items():
        settle = tier.settle

        def noted(tenant: str, name: str = name, settle: Callable[[str], None] = settle) -> None:
            settle(tenant)
            seen.append((name, one.file().tier, one.intents()))

        monkeypatch.setattr(tier, "settle", noted)
    succeed(one.homes.move([one.file()], "cold"))
    assert seen == [("cold", "hot", 1), ("hot", "cold", 1)] and one.intents() == 0


def test_a_tier_that_goes_away_in_the_middle_is_told_and_made_good(one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(tenant: str) -> None:
        raise Unavailable("away")

    monkeypatch.setattr(one.homes.tiers["cold"], "settle", away)
    (outcome,) = one.homes.move([one.file()], "cold")
    assert (outcome.status, outcome.reason) == ("failed", "away") and one.file().tier == "hot"
    one.put("hot", "other.bag", "other")
    one.homes.scan("acme", "hot")
    succeed(one.homes.move([one.file("other.bag")], "warm"))  # others need not wait
    monkeypatch.undo()
    assert one.homes.recover() == 0
    assert one.there() == {"run.bag": ["cold"], "other.bag": ["warm"]} and one.homes.faults("acme") == []


@pytest.mark.parametrize(("foreign", "tier"), [("another", "hot"), ("bytes", "cold")])
def test_after_a_crash_only_the_very_same_bytes_are_taken_for_the_copy(
    one: Place, monkeypatch: pytest.MonkeyPatch, foreign: str, tier: str
) -> None:
    class Crash(RuntimeError):
        pass

    def crash(point: str) -> None:
        raise Crash

    monkeypatch.setattr("nexus.tiers.filesystem.pass_through", crash)
    with pytest.raises(Crash):
        one.homes.move([one.file()], "cold")
    monkeypatch.undo()
    assert one.intents() == 1
    one.put("cold", "run.bag", foreign)  # where the copy would have been
    assert one.homes.recover() == 0
    assert one.file().tier == tier
    assert (one.root / tier / "acme" / "run.bag").read_bytes() == b"bytes"
    assert (one.root / "cold" / "acme" / "run.bag").read_text() == foreign


def test_two_tiers_in_one_place_are_refused(tmp_path: Path) -> None:
    for other in ("/data", "/data/", "/data/below", "///data/below", "/data2/../data/below", "/data//below"):
        with pytest.raises(ConfigError, match="lies within"):
            Homes(tmp_path, {"a": open_tier("file:/data"), "b": open_tier(f"file:{other}")})
    with pytest.raises(ConfigError, match="lies within"):
        Homes(tmp_path, {"a": open_tier("file:/data"), "b": open_tier("local:/data/below")})
    Homes(tmp_path, {"a": open_tier("file:/data"), "b": open_tier("file:/data2")}).close()


def test_a_link_that_makes_two_tiers_one_place_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "real" / "acme").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    (tmp_path / "real/acme/run.bag").write_text("bytes")
    homes = Homes(tmp_path / "home", {name: open_tier(f"file:{tmp_path}/{name}") for name in ("real", "alias")})
    homes.scan("acme", "real")
    (outcome,) = homes.move(homes.files("acme"), "alias")
    assert outcome.status == "failed" and "same place" in outcome.reason
    assert (tmp_path / "real/acme/run.bag").read_text() == "bytes"
    homes.close()


def test_a_move_between_a_disk_and_another_kind_of_storage(tmp_path: Path) -> None:
    (tmp_path / "hot").mkdir()
    tiers = {"hot": open_tier(f"file:{tmp_path}/hot"), "far": open_tier(f"memory://{uuid.uuid4().hex}")}
    homes = Homes(tmp_path / "home", tiers)
    place = Place(tmp_path, homes)
    place.put("hot", "a/star*.bag", os.urandom(3 * 2**20))
    homes.scan("acme", "hot")
    for target in ("far", "hot", "far"):
        succeed(homes.move(homes.files("acme"), target))
        assert place.there() == ({"a/star*.bag": ["hot"]} if target == "hot" else {})
        assert homes.faults("acme") == []
    assert homes.scan("acme", "far").unchanged == 1
    homes.close()


# ── replicas ────────────────────────────────────────────────────────────────────────────────────


def test_replicas_are_on_exactly_the_tiers_that_are_wanted(one: Place) -> None:
    succeed(one.homes.replicate([one.file()], frozenset({"warm", "cold", "hot"})))
    assert one.there() == {"run.bag": ["hot", "warm", "cold"]}
    assert one.file().replicas == {"warm", "cold"} and one.homes.faults("acme") == []
    succeed(one.homes.replicate([one.file()], frozenset({"cold"})))
    assert one.there() == {"run.bag": ["hot", "cold"]} and one.file().replicas == {"cold"}
    succeed(one.homes.move([one.file()], "cold"))  # the replica becomes the home
    assert one.there() == {"run.bag": ["cold"]} and one.file().replicas == frozenset()
    assert one.homes.faults("acme") == [] and one.intents() == 0


def test_a_replica_that_rots_is_found_and_never_becomes_the_home(one: Place) -> None:
    succeed(one.homes.replicate([one.file()], frozenset({"cold"})))
    one.put("cold", "run.bag", "rotten")
    assert one.homes.faults("acme") == ["'run.bag' on 'cold': its bytes are others"]
    assert one.homes.scan("acme", "cold").problems[0].reason == "the copy here of what lives on 'hot' was changed"
    (outcome,) = one.homes.move([one.file()], "cold")
    assert outcome.status == "failed" and one.file().tier == "hot"
    assert (one.root / "hot/acme/run.bag").read_bytes() == b"bytes"


def test_copies_of_what_a_file_was_before_are_no_copies(one: Place) -> None:
    succeed(one.homes.replicate([one.file()], frozenset({"cold"})))
    one.put("hot", "run.bag", "changed")
    one.homes.scan("acme", "hot")
    assert one.file().replicas == frozenset() and one.there() == {"run.bag": ["hot"]}


# ── deleting, holding, tagging ──────────────────────────────────────────────────────────────────


def test_a_deleted_file_is_nowhere(one: Place) -> None:
    one.homes.tag([one.file()], frozenset({"a"}), frozenset())
    succeed(one.homes.replicate([one.file()], frozenset({"cold"})))
    file = one.file()
    succeed(one.homes.delete([file]))
    assert one.there() == {} and one.homes.files("acme") == [] and one.intents() == 0
    one.put("hot", "run.bag", "another")
    one.homes.scan("acme", "hot")
    assert one.file().tags == frozenset()  # a new file, and no memory of the old one
    (outcome,) = one.homes.delete([file])
    assert outcome.status == "failed" and one.there() == {"run.bag": ["hot"]}


def test_a_hold_that_came_after_the_plan_still_holds(one: Place) -> None:
    planned = plan([parse_rule({"name": "expiry", "actions": [{"type": "delete"}]})], one.homes.files("acme"), NOW)
    succeed(one.homes.hold([one.file()], "case 17"))
    (outcome,) = converge(planned, one.homes)
    assert (outcome.status, outcome.code, outcome.reason, outcome.rule) == ("failed", "held", "held: case 17", "expiry")
    assert one.there() == {"run.bag": ["hot"]}
    succeed(one.homes.move([one.file()], "cold"))
    assert one.file().holds == {"case 17"}
    with pytest.raises(NotFound, match="case 18"):
        one.homes.release("acme", "run.bag", "case 18")
    one.homes.release("acme", "run.bag", "case 17")
    succeed(one.homes.delete([one.file()]))
    assert one.there() == {}


@pytest.mark.parametrize("is_held", [True, False])
def test_what_a_held_file_was_before_stays_where_there_was_a_copy(one: Place, is_held: bool) -> None:
    succeed(one.homes.replicate([one.file()], frozenset({"cold"})))
    if is_held:
        succeed(one.homes.hold([one.file()], "case 17"))
    one.put("hot", "run.bag", "written over")
    one.homes.scan("acme", "hot")
    assert one.there() == {"run.bag": ["hot", "cold"] if is_held else ["hot"]}
    assert one.file().replicas == frozenset()
    told = [problem.path for problem in one.homes.scan("acme", "cold").problems]
    assert told == (["run.bag"] if is_held else [])


def test_a_file_that_changed_is_not_deleted(one: Place) -> None:
    file = one.file()
    one.put("hot", "run.bag", "precious")
    (outcome,) = one.homes.delete([file])
    assert outcome.status == "failed" and one.there() == {"run.bag": ["hot"]}


def test_tags(one: Place) -> None:
    succeed(one.homes.tag([one.file()], frozenset({"a", "b"}), frozenset()))
    (outcome,) = one.homes.tag([one.file()], frozenset({"c"}), frozenset({"a", "z"}))
    assert outcome.target == "+c -a -z" and one.file().tags == {"b", "c"}


# ── the index ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def indexed(house: House, one: Place) -> Iterator[tuple[House, Place]]:
    steps = build_steps(house)
    one.homes._indexer = HadesIndexer(steps)
    yield house, one


def found(house: House, query: str, who: object = ALICE) -> list[tuple[str, str]]:
    result = house.retriever.search(SearchRequest(query), who)  # type: ignore[arg-type]
    return [(hit.source, hit.text) for hit in result.hits]


def test_what_is_indexed_is_found_and_goes_with_its_file(indexed: tuple[House, Place]) -> None:
    house, place = indexed
    place.put("hot", "notes/gripper.md", "# Gripper\n\nThe gripper jams when it is cold.\n")
    place.homes.scan("acme", "hot")
    place.homes.describe("acme", "notes/gripper.md", {"robot_id": "HX-3"})
    rule = parse_rule(
        {"name": "library", "actions": [{"type": "index"}, {"type": "move", "target": "warm"}],
         "conditions": [{"field": "suffix", "operator": "==", "value": ".md"}]}
    )  # fmt: skip
    succeed(converge(plan([rule], place.homes.files("acme"), NOW, list(place.homes.tiers)), place.homes))
    assert [source for source, _ in found(house, "gripper jams")] == ["files/notes/gripper.md"]
    document = house.hades.documents.current(document_id_of("acme", "default", "files/notes/gripper.md"), ALICE)
    assert document is not None and document.metadata == {"robot_id": "HX-3"}
    assert plan([rule], place.homes.files("acme"), NOW, list(place.homes.tiers)) == Plan()
    place.put("warm", "notes/gripper.md", "# Gripper\n\nThe gripper was replaced.\n")
    place.homes.scan("acme", "warm")
    again = plan([rule], place.homes.files("acme"), NOW, list(place.homes.tiers))
    assert [(one.action, one.path) for one in again.outcomes()] == [("index", "notes/gripper.md")]
    succeed(converge(again, place.homes))
    assert "replaced" in found(house, "gripper")[0][1]
    succeed(place.homes.delete([place.file("notes/gripper.md")]))
    assert found(house, "gripper") == []


def test_a_file_that_cannot_be_indexed_fails_alone_and_is_no_part_of_the_index(indexed: tuple[House, Place]) -> None:
    house, place = indexed
    place.put("hot", "good.txt", "The gripper jams.")
    place.put("hot", "bad\nname.txt", "The gripper jams.")
    place.put("hot", "bad.pdf", b"\x00\x01nothing")
    place.homes.scan("acme", "hot")
    files = [file for file in place.homes.files("acme") if file.path != "run.bag"]
    outcomes = place.homes.index(files, "default", None)
    assert [(one.path, one.status) for one in outcomes] == [
        ("bad\nname.txt", "failed"), ("bad.pdf", "failed"), ("good.txt", "success")
    ]  # fmt: skip
    assert [source for source, _ in found(house, "gripper")] == ["files/good.txt"]
    assert [bool(file.indexed) for file in place.homes.files("acme")] == [False, False, True, False]


def test_only_readers_find_what_is_indexed_for_them(indexed: tuple[House, Place]) -> None:
    house, place = indexed
    place.put("hot", "secret.txt", "The gripper is secret.")
    place.homes.scan("acme", "hot")
    succeed(place.homes.index([place.file("secret.txt")], "default", frozenset({"bob"})))
    assert found(house, "gripper") == []
    assert found(house, "gripper", replace(ALICE, subject="bob"))
    place.put("hot", "secret.txt", "The gripper is still secret.")
    place.homes.scan("acme", "hot")
    succeed(place.homes.index([place.file("secret.txt")], "default", frozenset({"bob"})))
    succeed(place.homes.delete([place.file("secret.txt")]))
    assert not found(house, "gripper", replace(ALICE, subject="bob"))


def test_a_crash_between_delete_and_unindex_is_made_good(
    indexed: tuple[House, Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    house, place = indexed
    place.put("hot", "good.txt", "The gripper jams.")
    place.homes.scan("acme", "hot")
    succeed(place.homes.index([place.file("good.txt")], "default", None))

    class Crash(RuntimeError):
        pass

    def crash(point: str) -> None:
        if point == "homes.after_switch":
            raise Crash

    monkeypatch.setattr(homes_module, "pass_through", crash)
    with pytest.raises(Crash):
        place.homes.delete([place.file("good.txt")])
    monkeypatch.undo()
    assert found(house, "gripper") and place.there() == {"good.txt": ["hot"], "run.bag": ["hot"]}
    assert place.homes.recover() == 0
    assert not found(house, "gripper") and place.there() == {"run.bag": ["hot"]}


def test_what_a_former_nexus_had_still_to_take_out_of_the_index_is_taken_out(indexed: tuple[House, Place]) -> None:
    house, place = indexed
    place.put("hot", "good.txt", "The gripper jams.")
    place.homes.scan("acme", "hot")
    succeed(place.homes.index([place.file("good.txt")], "default", None))
    with place.homes._transaction() as db:
        db.execute("DROP INDEX indexed_unsure")
        db.execute("DELETE FROM files")
        db.execute("PRAGMA user_version = 1")
    assert found(house, "gripper")
    again = Homes(place.root / "home", place.homes.tiers, place.homes._indexer)
    again.recover()
    again.close()
    assert not found(house, "gripper")


def test_an_index_that_is_away_is_waited_for_and_nothing_else_is(
    indexed: tuple[House, Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    house, place = indexed
    place.put("hot", "good.txt", "The gripper jams.")
    place.homes.scan("acme", "hot")
    succeed(place.homes.index([place.file("good.txt")], "default", None))

    def away(*_: object) -> None:
        raise Unavailable("away")

    monkeypatch.setattr(house.hades, "delete", away)
    succeed(place.homes.delete([place.file("good.txt")]))
    succeed(place.homes.move([place.file()], "cold"))
    assert found(house, "gripper") and place.there() == {"run.bag": ["cold"]}
    monkeypatch.undo()
    place.homes.recover()
    assert not found(house, "gripper")


def test_without_an_index_nothing_is_indexed(one: Place) -> None:
    (outcome,) = one.homes.index([one.file()], "default", None)
    assert outcome.status == "failed" and one.file().indexed == {}


def test_what_is_too_large_is_not_read_into_memory(
    indexed: tuple[House, Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, place = indexed
    monkeypatch.setattr(homes_module, "MAX_INDEXED_BYTES", 4)
    (outcome,) = place.homes.index([place.file()], "default", None)
    assert (outcome.status, outcome.code) == ("failed", "too_large")


# ── tiers that place files by themselves ────────────────────────────────────────────────────────


@dataclass
class Placing(LocalTier):
    """A share that moves files by itself, when it comes to it."""

    root: str
    says: Literal["requested", "aligned", "failed"] = "requested"
    asked: list[tuple[str, str]] = field(default_factory=list)
    withdrawn: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__("placing:", self.root)

    def place(self, files: Sequence[StoredFile], role: Literal["home", "replica"]) -> list[Placement]:
        self.asked += [(file.path, role) for file in files]
        return [Placement(file.tenant, file.path, "?", role, self.says, "task 7", "no room") for file in files]

    def look(self, placements: Sequence[Placement]) -> list[Placement]:
        assert all(one.reference == "task 7" for one in placements)
        return [replace(one, state=self.says, reason="no room" * (self.says == "failed")) for one in placements]

    def withdraw(self, files: Sequence[StoredFile], role: Literal["home", "replica"]) -> None:
        self.withdrawn += [(file.path, role) for file in files]


@pytest.fixture
def share(tmp_path: Path) -> Iterator[tuple[Place, Placing]]:
    (tmp_path / "hot").mkdir()
    placing = Placing(f"{tmp_path}/hot")
    tiers: Mapping[str, Tier] = {"hot": open_tier(f"file:{tmp_path}/hot"), "share": placing}
    homes = Homes(tmp_path / "home", tiers)
    place = Place(tmp_path, homes)
    place.put("hot", "run.bag")
    homes.scan("acme", "hot")
    yield place, placing
    homes.close()


SINK = parse_rule({"name": "sink", "actions": [{"type": "move", "target": "share"}]})


def test_a_placing_tier_is_asked_once_and_looked_at_until_it_is_done(share: tuple[Place, Placing]) -> None:
    place, placing = share
    (outcome,) = converge(plan([SINK], place.homes.files("acme"), NOW), place.homes)
    assert outcome.status == "requested" and placing.asked == [("run.bag", "home")]
    assert (place.file().tier, place.file().bound_for, place.file().home) == ("hot", "share", "share")
    assert plan([SINK], place.homes.files("acme"), NOW) == Plan()
    succeed(place.homes.move([place.file()], "share"))  # asked already: nothing is asked again
    assert place.homes.poll() == [] and len(placing.asked) == 1
    placing.says = "aligned"
    assert [(one.action, one.status, one.target) for one in place.homes.poll()] == [("move", "success", "share")]
    assert (place.file().tier, place.file().bound_for) == ("share", "")
    assert (place.root / "hot/acme/run.bag").exists()  # it is the share's to move, and no business of ours
    assert place.homes.poll() == [] and place.homes.faults("acme") == []
    succeed(place.homes.delete([place.file()]))
    assert not (place.root / "hot/acme/run.bag").exists()


def test_a_placing_tier_that_fails_is_asked_again_by_the_next_plan(share: tuple[Place, Placing]) -> None:
    place, placing = share
    placing.says = "failed"
    (outcome,) = converge(plan([SINK], place.homes.files("acme"), NOW), place.homes)
    assert (outcome.status, outcome.reason) == ("failed", "no room") and place.file().bound_for == ""
    placing.says = "requested"
    converge(plan([SINK], place.homes.files("acme"), NOW), place.homes)
    placing.says = "failed"
    assert [(one.status, one.reason) for one in place.homes.poll()] == [("failed", "no room")]
    assert place.file().home == "hot" and plan([SINK], place.homes.files("acme"), NOW).actions


def test_what_is_on_its_way_is_called_back(share: tuple[Place, Placing]) -> None:
    place, placing = share
    place.homes.move([place.file()], "share")
    back = parse_rule({"name": "back", "actions": [{"type": "move", "target": "hot"}]})
    succeed(converge(plan([back], place.homes.files("acme"), NOW), place.homes))
    assert placing.withdrawn == [("run.bag", "home")] and place.file().home == "hot"
    assert plan([back], place.homes.files("acme"), NOW) == Plan() and place.homes.poll() == []


def test_a_placing_tier_that_is_away_fails_its_files_and_no_others(
    share: tuple[Place, Placing], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, placing = share

    def away(*_: object) -> list[Placement]:
        raise Unavailable("away")

    place.homes.move([place.file()], "share")
    for call in ("place", "look", "withdraw"):
        monkeypatch.setattr(placing, call, away)
    assert place.homes.poll() == [] and place.file().bound_for == "share"
    (outcome,) = place.homes.move([place.file()], "hot")
    assert (outcome.status, outcome.reason) == ("failed", "away") and place.file().bound_for == "share"
    place.put("hot", "other.bag", "other")
    place.homes.scan("acme", "hot")
    (outcome,) = place.homes.move([place.file("other.bag")], "share")
    assert (outcome.status, outcome.code) == ("failed", "unavailable")


def test_a_move_to_the_disk_that_a_share_is_mounted_from_loses_nothing(share: tuple[Place, Placing]) -> None:
    place, placing = share
    placing.says = "aligned"
    succeed(place.homes.move([place.file()], "share"))
    assert place.file().tier == "share"
    (outcome,) = place.homes.move([place.file()], "hot")
    assert outcome.status == "failed" and "same place" in outcome.reason
    assert (place.root / "hot/acme/run.bag").read_bytes() == b"bytes"


def test_replicas_of_a_placing_tier_are_its_own_business(share: tuple[Place, Placing]) -> None:
    place, placing = share
    (outcome,) = place.homes.replicate([place.file()], frozenset({"share"}))
    assert outcome.status == "requested" and placing.asked == [("run.bag", "replica")]
    assert place.file().replicas == {"share"} and place.file().bound_for == ""
    placing.says = "aligned"
    assert [one.action for one in place.homes.poll()] == ["replicate"]
    succeed(place.homes.replicate([place.file()], frozenset()))
    assert place.file().replicas == frozenset() and (place.root / "hot/acme/run.bag").exists()
    assert placing.withdrawn == [("run.bag", "replica")]


def test_a_file_is_wanted_on_one_tier_of_a_share_only(share: tuple[Place, Placing]) -> None:
    place, placing = share
    other = Placing(f"{place.root}/hot")
    place.homes.tiers["other"] = other
    place.homes.move([place.file()], "share")
    (outcome,) = place.homes.move([place.file()], "other")
    assert outcome.status == "requested" and place.file().home == "other"
    assert placing.withdrawn == [("run.bag", "home")] and other.withdrawn == []
    other.says = "aligned"
    assert [one.target for one in place.homes.poll()] == ["other"] and place.file().tier == "other"


# ── rules ───────────────────────────────────────────────────────────────────────────────────────


def test_rules_are_kept_by_tenant_with_their_version(place: Place) -> None:
    rule = parse_rule({"name": "sink", "actions": [{"type": "move", "target": "cold"}]})
    assert place.homes.put_rule("acme", rule, "alice") == 1
    assert place.homes.put_rule("acme", replace(rule, priority=3), "alice") == 2
    assert place.homes.rule("acme", "sink") == replace(rule, priority=3)
    assert place.homes.rules("acme") == [replace(rule, priority=3)] and place.homes.rules("other") == []
    assert place.homes.tenants() == ["acme"]
    for call in (place.homes.rule, place.homes.drop_rule):
        with pytest.raises(NotFound):
            call("other", "sink")
    place.homes.drop_rule("acme", "sink")
    with pytest.raises(NotFound):
        place.homes.rule("acme", "sink")
    with pytest.raises(InvalidRequest, match="no tier 'tape'"):
        place.homes.put_rule(
            "acme", parse_rule({"name": "x", "actions": [{"type": "move", "target": "tape"}]}), "alice"
        )
    with pytest.raises(InvalidRequest, match="remove one first"):
        for number in range(MAX_RULES + 1):
            place.homes.put_rule("acme", replace(rule, name=f"r{number}"), "alice")


# ── several at once ─────────────────────────────────────────────────────────────────────────────


def test_threads_that_move_the_same_files_make_no_second_home(place: Place) -> None:
    for number in range(60):
        place.put("hot", f"{number}", os.urandom(99))
    place.homes.scan("acme", "hot")
    files = place.homes.files("acme")
    threads = [
        threading.Thread(target=place.homes.move, args=(files[start:] + files[:start], target))
        for start, target in ((0, "warm"), (20, "cold"), (40, "hot"), (10, "warm"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(map(len, place.there().values())) == {1} and len(place.there()) == 60
    assert place.homes.faults("acme") == [] and place.intents() == 0


HOLD_THE_LOCK = """
import fcntl, sys
with open(sys.argv[1], "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_works_at_a_time_and_any_may_read(one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(one.root / "home" / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        monkeypatch.setattr(homes_module, "LOCK_SECONDS", 0.05)
        with pytest.raises(Unavailable, match="another process"):
            one.homes.move([one.file()], "cold")
        assert one.file().tier == "hot"
        other.communicate()
    succeed(one.homes.move([one.file()], "cold"))


def test_the_journal_says_when_it_cannot_be_used(tmp_path: Path) -> None:
    homes = Homes(tmp_path, {})
    homes.check()
    homes.close()
    with pytest.raises(Unavailable):
        homes.check()
    assert (tmp_path / DATABASE).exists() and not (tmp_path / PARTIAL).exists()
