"""Hammerspace as a tier: files placed, looked after and withdrawn, and rules that the share keeps itself."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from nexus.conditions import parse_condition
from nexus.errors import ConfigError, InvalidRequest, Unavailable
from nexus.ports import Placement
from nexus.tiers import hammerspace
from nexus.tiers.hammerspace import HammerspaceTier, parse_address
from nexus.types import StoredFile
from nexus.upstream import World
from tests import anvil as doubles
from tests.anvil import PASSWORD, USER, Double, gateway
from tests.test_image_hosts import Authority

WORK = 12_345_678
LARGE = parse_condition([{"field": "file_size", "operator": ">", "value": 1000}])


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Path]:
    folder = tmp_path_factory.mktemp("anvil")
    return Authority(folder, "localhost"), folder / "server.pem"


@pytest.fixture
def double(authority: tuple[Authority, Path]) -> Iterator[Double]:
    with doubles.running(authority[0].server) as running:
        running.add_share("robots")
        yield running
        assert not running.violations


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    (tmp_path / "acme" / "logs").mkdir(parents=True)
    return tmp_path


class Share:
    """Tiers of one share of one double."""

    def __init__(self, double: Double, mount: Path, ca_file: Path) -> None:
        self.double, self.mount, self._ca_file = double, mount, ca_file
        self.opened: list[HammerspaceTier] = []

    def tier(self, name: str, *slos: str, world: World | None = None) -> HammerspaceTier:
        address = f"hammerspace://localhost:{self.double.port}/robots?mount={self.mount}#{','.join(slos)}"
        tier = hammerspace.open(
            address, name=name, siblings={"hot", "cold"}, username=USER, password=SecretStr(PASSWORD),
            ca_file=self._ca_file, world=world or World(random=lambda: WORK / 10**8, sleep=lambda seconds: None),
        )  # fmt: skip
        self.opened.append(tier)
        return tier

    def file(self, path: str, tier: str = "hot", content: bytes = b"x") -> StoredFile:
        (self.mount / "acme" / path).write_bytes(content)
        return StoredFile("acme", path, tier, len(content))

    def slos_of(self, file: StoredFile) -> set[str]:
        path = f"/{file.tenant}/{file.path}"
        return self.double.placed("robots", path, {"path": path, "size": file.size})


@pytest.fixture
def share(double: Double, mount: Path, authority: tuple[Authority, Path]) -> Iterator[Share]:
    made = Share(double, mount, authority[1])
    yield made
    for tier in made.opened:
        tier.close()


def requested(*files: StoredFile, tier: str = "cold", slos: str = "place-on-object-volumes") -> list[Placement]:
    return [Placement(f.tenant, f.path, tier, "home", "requested", f"nexus home {slos}") for f in files]


def test_files_are_under_the_objective_of_the_tier_that_was_asked_last(share: Share) -> None:
    cold, hot = share.tier("cold", "place-on-object-volumes"), share.tier("hot", "keep-online")
    files = [share.file("logs/a.bag"), share.file("b ü?#&.bag")]
    assert cold.place(files, "home") == requested(*files)
    assert [share.slos_of(file) for file in files] == [{"place-on-object-volumes"}] * 2
    back = hot.place([replace(files[0], tier="cold")], "home")
    assert back == requested(files[0], tier="hot", slos="keep-online")
    assert [share.slos_of(file) for file in files] == [{"keep-online"}, {"place-on-object-volumes"}]
    assert cold.place(files[:1], "home") == requested(files[0])
    assert share.slos_of(files[0]) == {"place-on-object-volumes"}


def test_the_objective_is_validated_and_defined_once(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    file = share.file("a")
    cold.place([file], "home")
    cold.place([file], "home")
    share.tier("again", "place-on-object-volumes").place([file], "home")
    assert share.double.objectives == {
        "nexus home place-on-object-volumes": 'IF IS_FILE THEN {SLO("place-on-object-volumes")}'
    }
    assert share.double.asked.count("POST /objectives") == 1


def test_a_replica_stands_beside_the_home_and_can_be_withdrawn(share: Share) -> None:
    cold, second = share.tier("cold", "place-on-object-volumes"), share.tier("second", "place-on-second-site")
    file = share.file("a")
    cold.place([file], "home")
    assert [one.state for one in second.place([file], "replica")] == ["requested"]
    assert share.slos_of(file) == {"place-on-object-volumes", "place-on-second-site"}
    for _ in range(2):
        second.withdraw([file], "replica")
    assert share.slos_of(file) == {"place-on-object-volumes"}


def test_what_is_on_another_tier_than_of_this_share_fails_alone(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    elsewhere, here = share.file("a", tier="s3"), share.file("b")
    failed, placed = cold.place([elsewhere, here], "home")
    assert (failed.state, placed.state) == ("failed", "requested")
    assert "'s3'" in failed.reason and not share.slos_of(elsewhere)


def test_an_slo_that_the_anvil_has_not_fails_every_file_with_its_words(share: Share) -> None:
    tier = share.tier("cold", "place-on-the-moon")
    placed = tier.place([share.file("a"), share.file("b")], "home")
    assert [one.state for one in placed] == ["failed", "failed"]
    assert "place-on-the-moon" in placed[0].reason
    assert not share.double.objectives and not share.double.applied


def test_an_objective_of_this_name_that_says_something_else_is_left_alone(share: Share) -> None:
    share.double.objectives["nexus home place-on-object-volumes"] = 'IF SIZE>1 THEN {SLO("keep-online")}'
    (failed,) = share.tier("cold", "place-on-object-volumes").place([share.file("a")], "home")
    assert failed.state == "failed" and "another objective" in failed.reason
    assert not share.double.applied


def test_once_the_anvil_is_away_the_rest_is_not_tried(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    files = [share.file(name) for name in "abc"]
    cold.place(files[:1], "home")
    asked = len(share.double.asked)
    known = b'[{"name": "nexus home place-on-object-volumes"}]'
    share.double.broken += [(200, known), (200, b""), (503, b"")]  # the objectives, and what the first two are answered
    placed = cold.place(files, "home")
    assert [one.state for one in placed] == ["requested", "failed", "failed"]
    assert len(share.double.asked) == asked + 3


def test_a_file_is_aligned_once_the_share_says_so(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    file = share.file("logs/a b.bag")
    placed = cold.place([file], "home")
    with gateway(share.mount / "acme" / "logs", WORK, {"a b.bag": "FALSE\n"}) as asked:
        assert cold.look(placed) == placed
    assert len(asked) == 1 and asked[0].startswith('./a b.bag?.eval OVERALL_ALIGNMENT==ALIGNMENT("aligned")')
    assert "/*" not in asked[0]
    with gateway(share.mount / "acme" / "logs", WORK, {"a b.bag": "TRUE\n"}):
        assert cold.look(placed) == [replace(placed[0], state="aligned")]


@pytest.mark.parametrize("said", ["", "#ERROR: no such word\n", "TRUE FALSE\n", "1" * 100_000])
def test_no_other_word_of_the_share_is_alignment(share: Share, said: str) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    placed = cold.place([share.file("a")], "home")
    with gateway(share.mount / "acme", WORK, {"a": said}):
        assert cold.look(placed) == placed


def test_what_has_ended_is_not_asked_about_again(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    (placed,) = cold.place([share.file("a")], "home")
    ended = [replace(placed, state="aligned"), replace(placed, state="failed", reason="as it was")]
    asked = len(share.double.asked)
    assert cold.look(ended) == ended
    assert len(share.double.asked) == asked


def test_an_order_that_became_a_task_is_followed_to_its_end(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    files = [share.file("a"), share.file("b")]
    cold.place(files[:1], "home")  # the objective is defined
    share.double.as_tasks += [[("EXECUTING", ""), ("COMPLETED", "")], [("HALTED", "no room on the volumes")]]
    good, bad = placed = cold.place(files, "home")
    assert cold.look(placed)[0] == good  # the first look finds it under way
    with gateway(share.mount / "acme", WORK, {"a": "TRUE"}):
        aligned, failed = cold.look([good, bad])
    assert aligned.state == "aligned"
    assert failed.state == "failed" and "HALTED" in failed.reason and "no room" in failed.reason


def test_a_mount_that_is_no_share_is_found_out_and_left_clean(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    placed = cold.place([share.file("a")], "home")
    (looked,) = cold.look(placed)
    assert looked.state == "failed" and "no Hammerspace share" in looked.reason
    assert os.listdir(share.mount / "acme") == ["logs", "a"] or sorted(os.listdir(share.mount / "acme")) == [
        "a",
        "logs",
    ]


def test_a_file_that_went_and_one_that_cannot_be_asked_about_fail(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    gone, odd = share.file("a"), share.file("x?.eval 1")
    placed = cold.place([gone, odd], "home")
    (share.mount / "acme" / "a").unlink()
    assert [one.state for one in cold.look(placed)] == ["failed", "failed"]
    assert sorted(os.listdir(share.mount / "acme")) == ["logs", "x?.eval 1"]


def test_while_the_anvil_is_away_what_was_asked_stays_asked(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    file = share.file("a")
    cold.place([file], "home")
    share.double.as_tasks.append([("EXECUTING", "")])
    placed = cold.place([file], "home")
    share.double.broken.append((503, b""))
    assert cold.look(placed) == placed


def test_files_are_read_and_written_where_the_share_is_mounted(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    written = cold.write("acme", "new/one", [b"ab", b"c"])
    cold.settle("acme")
    assert (share.mount / "acme/new/one").read_bytes() == b"abc" == b"".join(cold.read("acme", "new/one"))
    assert [found.path for found in cold.walk("acme")] == ["new/one"]
    found = cold.find("acme", "new/one")
    assert found is not None and found.key == written.key
    assert cold.remove("acme", "new/one", written.key) and cold.find("acme", "new/one") is None
    cold.discard("acme", "new/one")
    cold.check()
    share.double.broken.append((503, b""))
    with pytest.raises(Unavailable):
        cold.check()


# ── rules that the share keeps ──────────────────────────────────────────────────────────────────


def test_a_rule_is_handed_to_the_share_in_place_of_what_it_was(share: Share) -> None:
    cold, second = share.tier("cold", "place-on-object-volumes"), share.tier("second", "place-on-second-site")
    share.double.objectives["mine"] = 'IF IS_FILE THEN {SLO("keep-online")}'
    share.double.applied.append(("robots", "/acme", "mine"))
    other = cold.delegate("acme", "large-too", LARGE, dry_run=False)
    placed = cold.delegate("acme", "large", LARGE, [second], dry_run=False)
    assert placed.state == "requested"
    assert placed.reference == 'IF SIZE>1000 THEN {SLO("place-on-object-volumes"),SLO("place-on-second-site")}'
    (objective,) = [name for _, _, name in share.double.applied if name.startswith("nexus rule acme large ")]
    assert share.double.objectives[objective] == placed.reference
    smaller = parse_condition([{"field": "file_size", "operator": ">", "value": 500}])
    changed = cold.delegate("acme", "large", smaller, [second], dry_run=False)
    kept = {share.double.objectives[name] for share_, path, name in share.double.applied if path == "/acme"}
    assert kept == {changed.reference, other.reference, share.double.objectives["mine"]}
    again = cold.delegate("acme", "large", LARGE, [second], dry_run=False)
    assert again.reference == placed.reference
    kept = {share.double.objectives[name] for _, path, name in share.double.applied if path == "/acme"}
    assert kept == {again.reference, other.reference, share.double.objectives["mine"]}
    assert cold.revoke("acme", "large") == 2
    kept = {share.double.objectives[name] for _, path, name in share.double.applied if path == "/acme"}
    assert kept == {other.reference, share.double.objectives["mine"]}


def test_a_dry_run_has_the_rule_validated_and_changes_nothing(share: Share) -> None:
    placed = share.tier("cold", "place-on-object-volumes").delegate("acme", "large", LARGE)
    assert placed.reference in share.double.validated
    assert not share.double.objectives and not share.double.applied
    with pytest.raises(InvalidRequest, match="place-on-the-moon"):
        share.tier("moon", "place-on-the-moon").delegate("acme", "large", LARGE)


def test_a_rule_that_has_no_expression_is_refused_before_anything_is_asked(share: Share) -> None:
    cold = share.tier("cold", "place-on-object-volumes")
    with pytest.raises(InvalidRequest, match="checksums") as raised:
        cold.delegate("acme", "x", parse_condition([{"field": "checksum", "operator": "==", "value": "0" * 32}]))
    assert raised.value.code == "not_compilable"
    assert not share.double.asked


def test_a_rule_whose_task_failed_has_failed(share: Share) -> None:
    share.double.as_tasks.append([("EXECUTING", ""), ("CANCELLED", "by the operator")])
    placed = share.tier("cold", "place-on-object-volumes").delegate("acme", "large", LARGE, dry_run=False)
    assert placed.state == "failed" and "CANCELLED: by the operator" in placed.reason


# ── addresses ───────────────────────────────────────────────────────────────────────────────────


def test_an_address_says_which_share_where_it_is_mounted_and_what_for() -> None:
    one = parse_address("hammerspace://anvil.example/big%20share?mount=/mnt/x/#place-on-a,place-on-b c")
    assert (one.host, one.port, one.share, one.mount) == ("anvil.example", 8443, "big share", "/mnt/x")
    assert one.slos == ("place-on-a", "place-on-b c")
    assert one.place == parse_address("hammerspace://ANVIL.example:8443/big share?mount=/mnt/y#keep-online").place


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hammerspace://nexus:secret@anvil/share?mount=/m#keep-online", "hammerspace.username"),
        ("hammerspace:///share?mount=/m#keep-online", "names an Anvil"),
        ("hammerspace://anvil?mount=/m#keep-online", "names an Anvil"),
        ("hammerspace://anvil/a/b?mount=/m#keep-online", "names an Anvil"),
        ("hammerspace://anvil:99999/a?mount=/m#keep-online", "port"),
        ("hammerspace://anvil/share#keep-online", "mounted"),
        ("hammerspace://anvil/share?mount=m#keep-online", "mounted"),
        ("hammerspace://anvil/share?mount=/m&x=1#keep-online", "mounted"),
        ("hammerspace://anvil/share?mount=/m", "service level"),
        ('hammerspace://anvil/share?mount=/m#keep-online,a")', "service level"),
    ],
)
def test_an_address_that_is_none_is_refused_with_a_reason(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        hammerspace.check(address)
    assert "secret" not in raised.value.message


def test_a_tier_without_a_credential_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hammerspace\.username"):
        hammerspace.open("hammerspace://anvil/share?mount=/m#keep-online", name="cold")
