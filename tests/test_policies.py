"""Policies over HTTP and at work by themselves: shown, carried out, recorded, counted, and kept apart by tenant."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments import policies
from nexus import enforcement
from nexus.audit_reading import read
from nexus.config import Config
from nexus.errors import ConfigError, InvalidRequest, Unavailable
from nexus.telemetry import exposition
from tests.anvil import PASSWORD, USER, Double
from tests.anvil import running as running_anvil
from tests.conftest import Door
from tests.test_image_hosts import Authority

COLD = {
    "conditions": [{"field": "file_size", "operator": ">", "value": 1000}],
    "actions": [{"type": "move", "target": "cold"}],
}


@pytest.fixture
def home(door: Door) -> Path:
    return Path(door.lent.config.home)


@pytest.fixture
def headers(door: Door) -> dict[str, str]:
    return door.headers("acme")


def store(home: Path, path: str, content: bytes, tier: str = "hot", tenant: str = "acme") -> Path:
    file = home / tier / tenant / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def put(door: Door, headers: dict[str, str], name: str, rule: dict[str, Any], status: int = 201) -> dict[str, Any]:
    answer = door.client.put(f"/policies/{name}", json=rule, headers=headers)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def evaluate(door: Door, headers: dict[str, str], name: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = door.client.post(f"/policies/{name}/evaluate", json=body, headers=headers)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def counted(name: str) -> dict[tuple[str, ...], float]:
    """The samples of a counter by the values of their labels, in the order of their names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition().decode())
        for sample in family.samples
        if sample.name == name
    }


class Counting:
    """How much a counter grew since this was made."""

    def __init__(self, name: str) -> None:
        self._name, self._before = name, counted(name)

    def grown(self) -> dict[tuple[str, ...], float]:
        now = counted(self._name)
        return {labels: more for labels, value in now.items() if (more := value - self._before.get(labels, 0.0))}


# ── kept ────────────────────────────────────────────────────────────────────────────────────────


def test_a_policy_is_made_read_replaced_listed_and_removed(door: Door, headers: dict[str, str]) -> None:
    made = put(door, headers, "cold", COLD)
    assert made == {
        "name": "cold", "description": "", "priority": 0, "enabled": True, "version": 1,
        "conditions": [{"field": "size", "operator": ">", "value": 1000}],
        "actions": [{"type": "move", "target": "cold"}],
    }  # fmt: skip
    shown = door.client.get("/policies/cold", headers=headers).json()
    assert shown == {key: value for key, value in made.items() if key != "version"}
    assert put(door, headers, "cold", {**shown, "priority": 5}, 200)["version"] == 2
    assert door.client.get("/policies", headers=headers).json() == {"policies": [{**shown, "priority": 5}]}
    assert door.client.delete("/policies/cold", headers=headers).json() == {"deleted": "cold"}
    assert door.client.get("/policies/cold", headers=headers).status_code == 404
    assert door.client.delete("/policies/cold", headers=headers).status_code == 404
    assert evaluate(door, headers, "cold", 404)["code"] == "not_found"


@pytest.mark.parametrize(
    ("rule", "pointer"),
    [
        ({"actions": []}, "/actions"),
        ({"actions": [{"type": "explode"}]}, "/actions/0/type"),
        ({"actions": [{"type": "move", "target": "moon"}]}, "/actions/0"),
        ({**COLD, "name": "warm"}, "/name"),
        ({**COLD, "conditions": [{"field": "file_size", "operator": "~", "value": 1}]}, "/conditions/0/operator"),
        ({**COLD, "conditions": {"any": []}}, "/conditions/any"),
        ({**COLD, "priority": 10**6}, "/priority"),
        ({**COLD, "secret": 1}, "/secret"),
    ],
)
def test_a_policy_that_is_none_is_refused_where_it_is_wrong(
    door: Door, headers: dict[str, str], rule: dict[str, Any], pointer: str
) -> None:
    answer = door.client.put("/policies/cold", json=rule, headers=headers)
    assert answer.status_code in (400, 422)
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert door.client.get("/policies", headers=headers).json() == {"policies": []}


def test_a_policy_has_a_plain_name(door: Door, headers: dict[str, str]) -> None:
    for name in ("a b", "-a", "x" * 65):
        assert door.client.put(f"/policies/{name}", json=COLD, headers=headers).status_code in (400, 422)


# ── evaluated ───────────────────────────────────────────────────────────────────────────────────


def test_one_file_as_in_the_founding_documents(door: Door, headers: dict[str, str], home: Path) -> None:
    put(door, headers, "test_policy", COLD)
    answer = evaluate(door, headers, "test_policy", file={"file_path": "/test/file.txt", "file_size": 2000})
    assert answer["policy_name"] == "test_policy"
    assert answer["actions"] == [
        {"action": "move", "file_path": "test/file.txt", "target": "cold", "status": "planned",
         "policy_name": "test_policy"},
    ]  # fmt: skip
    assert answer["metadata"] == {"file_path": "test/file.txt", "file_size": 2000}
    assert (answer["dry_run"], answer["result"]) == (True, "planned")
    small = evaluate(door, headers, "test_policy", file={"file_path": "/test/file.txt", "file_size": 1000})
    assert (small["actions"], small["result"]) == ([], "nothing")
    assert evaluate(door, headers, "test_policy", 404, file={"file_path": "x", "file_size": 2000}, dry_run=False)


def test_a_dry_run_changes_nothing_and_the_next_does_what_it_said(
    door: Door, headers: dict[str, str], home: Path
) -> None:
    large, small = store(home, "logs/large", b"x" * 2000), store(home, "small", b"x")
    put(door, headers, "cold", COLD)
    shown = evaluate(door, headers, "cold")
    assert [(one["file_path"], one["status"]) for one in shown["actions"]] == [("logs/large", "planned")]
    assert shown["metadata"]["files"] == 2 and shown["metadata"]["matched"] == 1
    assert shown["metadata"]["tiers"]["hot"] == {"added": 2, "changed": 0, "unchanged": 0, "missing": 0}
    assert large.exists() and not (home / "cold" / "acme").exists()
    done = evaluate(door, headers, "cold", dry_run=False)
    assert (done["result"], done["summary"]) == ("applied", {"move success": 1})
    assert [{**one, "status": "planned"} for one in done["actions"]] == shown["actions"]
    assert not large.exists() and small.exists()
    assert (home / "cold/acme/logs/large").read_bytes() == b"x" * 2000
    again = evaluate(door, headers, "cold", dry_run=False)
    assert (again["actions"], again["result"], again["metadata"]["matched"]) == ([], "nothing", 1)


def test_a_file_by_its_path_and_what_is_said_of_it_is_kept(door: Door, headers: dict[str, str], home: Path) -> None:
    store(home, "a.bag", b"x" * 10)
    put(door, headers, "of-a-robot", {
        "conditions": [{"field": "robot_id", "operator": "==", "value": "HX-3"}],
        "actions": [{"type": "move", "target": "cold"}],
    })  # fmt: skip
    assert evaluate(door, headers, "of-a-robot", 404, file="a.bag", dry_run=True)  # nobody has looked yet
    assert evaluate(door, headers, "of-a-robot")["actions"] == []
    said = {"file_path": "a.bag", "file_size": 10**9, "robot_id": "HX-3"}
    shown = evaluate(door, headers, "of-a-robot", file=said)
    assert shown["result"] == "planned" and shown["metadata"]["file_size"] == 10
    assert evaluate(door, headers, "of-a-robot", file="a.bag")["result"] == "nothing"
    done = evaluate(door, headers, "of-a-robot", file=said, dry_run=False)
    assert done["result"] == "applied" and done["metadata"]["tier"] == "cold"
    assert done["metadata"]["metadata"] == {"robot_id": "HX-3"}


def test_a_hold_of_another_policy_withholds_a_deletion(door: Door, headers: dict[str, str], home: Path) -> None:
    held, old = store(home, "held", b"h"), store(home, "old", b"o")
    put(door, headers, "expire", {"actions": [{"type": "delete"}]})
    put(door, headers, "keep", {
        "conditions": [{"field": "name", "operator": "==", "value": "held"}], "actions": [{"type": "hold"}],
    })  # fmt: skip
    done = evaluate(door, headers, "expire", dry_run=False)
    assert sorted((one["file_path"], one["status"]) for one in done["actions"]) == [
        ("held", "withheld"), ("old", "success"),
    ]  # fmt: skip
    assert held.exists() and not old.exists()


def test_a_hold_is_lifted_by_name_also_after_its_policy_is_gone(
    door: Door, headers: dict[str, str], home: Path
) -> None:
    file = store(home, "logs/held", b"h")
    put(door, headers, "keep", {"actions": [{"type": "hold"}]})
    put(door, headers, "expire", {"actions": [{"type": "delete"}]})
    evaluate(door, headers, "keep", dry_run=False)
    door.client.delete("/policies/keep", headers=headers)
    assert evaluate(door, headers, "expire", dry_run=False)["actions"][0]["status"] == "withheld"
    strangers, reader = door.headers("other"), door.headers("acme", "reader", "policies:read")
    for body, who, status in (
        ({"file": "logs/held"}, strangers, 404), ({"file": "logs/held"}, reader, 403), ({"file": "x"}, headers, 404),
        ({"file": "logs/held", "hold": "another"}, headers, 404), ({"file": "/logs/held"}, headers, 200),
        ({"file": "logs/held"}, headers, 404),
    ):  # fmt: skip
        answer = door.client.post("/policies/keep/release", json=body, headers=who)
        assert answer.status_code == status, answer.text
        if status == 200:
            assert answer.json()["released"] == "keep" and "holds" not in answer.json()["metadata"]
    assert evaluate(door, headers, "expire", dry_run=False)["summary"] == {"delete success": 1}
    assert not file.exists()
    door.lent.audit.flush()
    released = [line["objects"] for line in read(home) if line.get("action") == "release by policy keep"]
    assert released == [["logs/held"]]


def test_what_is_indexed_is_found(door: Door, headers: dict[str, str], home: Path) -> None:
    store(home, "manual.md", b"# Arm\n\nThe zebra gripper closes with a torque of 4 newton metres.\n")
    put(door, headers, "index", {"actions": [{"type": "index"}]})
    assert evaluate(door, headers, "index", dry_run=False)["summary"] == {"index success": 1}
    hits = door.client.post("/rag/search", json={"query": "zebra gripper torque"}, headers=headers).json()["hits"]
    assert [hit["source"] for hit in hits] == ["files/manual.md"]
    strangers = door.headers("other")
    found = door.client.post("/rag/search", json={"query": "zebra gripper"}, headers=strangers)
    assert found.status_code == 404  # they have no such collection


def test_a_tier_that_is_away_is_a_problem_and_no_fault(door: Door, headers: dict[str, str], home: Path) -> None:
    store(home, "a", b"a" * 2000)
    put(door, headers, "cold", COLD)
    (home / "cold").rmdir()
    shown = evaluate(door, headers, "cold")
    assert any("cold" in problem for problem in shown["metadata"]["problems"])
    done = evaluate(door, headers, "cold", dry_run=False)
    assert done["result"] == "failed" and done["actions"][0]["status"] == "failed"
    assert (home / "hot/acme/a").exists()
    assert str(home) not in str(done) and str(home) not in str(shown)


# ── who may, and what is recorded and counted ───────────────────────────────────────────────────


def test_another_tenants_policies_and_files_are_not_there(door: Door, headers: dict[str, str], home: Path) -> None:
    store(home, "a", b"a" * 2000)
    put(door, headers, "cold", COLD)
    evaluate(door, headers, "cold")
    strangers = door.headers("other")
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/evaluate")):
        body = {"json": {}} if method == "POST" else {}
        assert door.client.request(method, f"/policies/cold{path}", headers=strangers, **body).status_code == 404
    assert door.client.get("/policies", headers=strangers).json() == {"policies": []}
    put(door, strangers, "cold", {"actions": [{"type": "delete"}]})
    assert evaluate(door, strangers, "cold", dry_run=False)["metadata"]["files"] == 0
    assert evaluate(door, strangers, "cold", 404, file="a")
    assert (home / "hot/acme/a").exists()
    assert door.client.get("/policies/cold", headers=headers).json()["actions"][0]["type"] == "move"


def test_reading_is_not_doing(door: Door, headers: dict[str, str], home: Path) -> None:
    file = store(home, "a", b"a" * 2000)
    put(door, headers, "cold", COLD)
    put(door, headers, "index", {"actions": [{"type": "index"}]})
    reader, writer = (door.headers("acme", name, *what) for name, what in (
        ("reader", ("policies:read",)), ("writer", ("policies:read", "policies:write")),
    ))  # fmt: skip
    assert evaluate(door, reader, "cold")["result"] == "planned"
    assert evaluate(door, reader, "cold", 403, dry_run=False)
    assert file.exists()
    assert door.client.put("/policies/cold", json=COLD, headers=reader).status_code == 403
    assert door.client.put("/policies/new", json={"actions": [{"type": "index"}]}, headers=writer).status_code == 403
    assert evaluate(door, writer, "index", 403, dry_run=False)
    assert evaluate(door, writer, "cold", dry_run=False)["result"] == "applied"


def test_every_action_is_recorded_with_who_had_it_done(door: Door, headers: dict[str, str], home: Path) -> None:
    for name in ("a", "b"):
        store(home, name, name.encode() * 2000)
    put(door, headers, "cold", COLD)
    evaluate(door, headers, "cold")
    door.lent.audit.flush()
    assert not [line for line in read(home) if line.get("kind") == "policy"]
    evaluate(door, headers, "cold", dry_run=False)
    door.lent.audit.flush()
    lines = [line for line in read(home) if line.get("kind") == "policy"]
    assert [(line["action"], line["verdict"], line.get("objects")) for line in lines] == [
        ("evaluate by policy cold", "begun", None),
        ("move by policy cold", "success", ["a", "hot", "cold"]),
        ("move by policy cold", "success", ["b", "hot", "cold"]),
    ]
    assert {(line["tenant"], line["subject"]) for line in lines} == {("acme", "tester")}
    asked = [line for line in read(home) if line.get("action") == "POST /policies/{policy}/evaluate"]
    assert [line["verdict"] for line in asked] == ["begun", "done"]


def test_evaluations_and_movements_are_counted_exactly(door: Door, headers: dict[str, str], home: Path) -> None:
    evaluations, movements = Counting("policy_evaluations_total"), Counting("data_movements_total")
    for name in "abc":
        store(home, name, name.encode() * 2000)
    store(home, "c", b"another c", "cold")
    put(door, headers, "count-me", COLD)
    evaluate(door, headers, "count-me")
    assert movements.grown() == {}
    assert evaluate(door, headers, "count-me", dry_run=False)["summary"] == {"move failed": 1, "move success": 2}
    assert movements.grown() == {("hot", "success", "cold"): 2, ("hot", "failed", "cold"): 1}
    (home / "cold/acme/c").unlink()
    evaluate(door, headers, "count-me", dry_run=False)
    evaluate(door, headers, "count-me", dry_run=False)
    assert evaluations.grown() == {
        ("count-me", "planned"): 1, ("count-me", "failed"): 1, ("count-me", "applied"): 1, ("count-me", "nothing"): 1,
    }  # fmt: skip
    put(door, headers, "copy-me", {"actions": [{"type": "replicate", "count": 2}]})
    evaluate(door, headers, "copy-me", dry_run=False)
    assert movements.grown()["cold", "success", "hot"] == 3


def test_what_cannot_be_recorded_is_not_done(door: Door, headers: dict[str, str], home: Path) -> None:
    file = store(home, "a", b"a" * 2000)
    put(door, headers, "cold", COLD)
    enforcer = door.lent.policies.enforcer  # type: ignore[attr-defined]

    def refuse(events: object) -> None:
        raise InvalidRequest("the record is full")

    enforcer._record = refuse
    assert evaluate(door, headers, "cold", 422, dry_run=False)
    assert file.exists()


# ── by themselves ───────────────────────────────────────────────────────────────────────────────


def test_all_enabled_policies_of_all_tenants_are_carried_out(door: Door, headers: dict[str, str], home: Path) -> None:
    evaluations = Counting("policy_evaluations_total")
    store(home, "a", b"a" * 2000)
    store(home, "b", b"b" * 2000, tenant="other")
    put(door, headers, "cold", COLD)
    put(door, headers, "never", {"actions": [{"type": "delete"}], "enabled": False, "priority": 9})
    put(door, door.headers("other"), "tag-all", {"actions": [{"type": "tag", "add": ["seen"]}]})
    enforcer = door.lent.policies.enforcer  # type: ignore[attr-defined]
    done = enforcer.run()
    assert [(one.tenant, one.path, one.action, one.status) for one in done] == [
        ("acme", "a", "move", "success"), ("other", "b", "tag", "success"),
    ]  # fmt: skip
    assert evaluations.grown() == {("cold", "applied"): 1, ("tag-all", "applied"): 1}
    assert enforcer.run() == []
    assert (home / "cold/acme/a").exists() and (home / "hot/other/b").exists()


def test_one_tenants_fault_is_no_others(door: Door, headers: dict[str, str], home: Path) -> None:
    store(home, "a", b"a" * 2000)
    store(home, "b", b"b" * 2000, tenant="zeta")
    put(door, headers, "cold", COLD)
    put(door, door.headers("zeta"), "cold", COLD)
    enforcer = door.lent.policies.enforcer  # type: ignore[attr-defined]
    record = enforcer._record

    def refuse_acme(events: Any) -> None:
        if events[0].tenant == "acme":
            raise InvalidRequest("the record is full")
        record(events)

    enforcer._record = refuse_acme
    assert [(one.tenant, one.status) for one in enforcer.run()] == [("acme", "failed"), ("zeta", "success")]
    assert (home / "hot/acme/a").exists() and (home / "cold/zeta/b").exists()


# ── handed over to Hammerspace ──────────────────────────────────────────────────────────────────


@pytest.fixture
def anvil(tmp_path: Path) -> Iterator[tuple[Double, Config]]:
    authority = Authority(tmp_path, "localhost")
    with running_anvil(authority.server) as double:
        double.add_share("robots")
        share = f"hammerspace://localhost:{double.port}/robots?mount={tmp_path}/mnt"
        (tmp_path / "mnt").mkdir()
        (tmp_path / "disk").mkdir()
        yield (
            double,
            Config(
                home=tmp_path / "home",
                policies={"tiers": {
                    "fast": f"{share}#keep-online", "deep": f"{share}#place-on-object-volumes",
                    "disk": f"file:{tmp_path}/disk",
                    "elsewhere": f"{share}2#keep-online".replace("/robots?", "/maps?"),
                }},
                hammerspace={"username": USER, "password": PASSWORD, "ca_file": tmp_path / "server.pem"},
            ),
        )  # fmt: skip
        assert not double.violations


@pytest.fixture
def enforcer(anvil: tuple[Double, Config]) -> Iterator[enforcement.Enforcer]:
    config = anvil[1]
    homes = enforcement.Homes(Path(config.home), enforcement.open_tiers(config))
    opened = enforcement.Enforcer(homes, lambda events: None)
    yield opened
    opened.close()


WHO = enforcement.Principal("acme", "alice")


def test_files_are_requested_and_counted_once_they_are_where_they_were_wanted(
    anvil: tuple[Double, Config], enforcer: enforcement.Enforcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    movements = Counting("data_movements_total")
    mount = Path(anvil[1].home).parent / "mnt" / "acme"
    mount.mkdir()
    (mount / "a").write_bytes(b"a" * 2000)
    enforcer.put(WHO, "deep", {**COLD, "actions": [{"type": "move", "target": "deep"}]})
    done = enforcer.evaluate(WHO, enforcement.Order("deep", dry_run=False))
    assert [(one.path, one.status) for one in done.outcomes] == [("a", "requested")] and done.result == "applied"
    assert anvil[0].placed("robots", "/acme/a", {}) == {"place-on-object-volumes"}
    assert enforcer.evaluate(WHO, enforcement.Order("deep", dry_run=False)).outcomes == ()
    answers = iter([False, True])
    monkeypatch.setattr(enforcement.HammerspaceTier, "_is_aligned", lambda *_: next(answers))
    assert enforcer.poll() == [] and movements.grown() == {}
    assert [(one.path, one.status, one.target) for one in enforcer.poll()] == [("a", "success", "deep")]
    assert list(movements.grown()) == [("fast", "success", "deep")]
    assert (mount / "a").read_bytes() == b"a" * 2000


def test_a_policy_is_delegated_shown_first_and_taken_back_with_it(
    anvil: tuple[Double, Config], enforcer: enforcement.Enforcer
) -> None:
    double, _ = anvil
    enforcer.put(WHO, "deep", {**COLD, "actions": [
        {"type": "replicate", "targets": ["fast"]}, {"type": "move", "target": "deep"},
    ]})  # fmt: skip
    wanted = 'IF SIZE>1000 THEN {SLO("place-on-object-volumes"),SLO("keep-online")}'
    shown = enforcer.evaluate(WHO, enforcement.Order("deep", delegate=True))
    assert shown.metadata == {"expression": wanted} and not double.applied
    done = enforcer.evaluate(WHO, enforcement.Order("deep", dry_run=False, delegate=True))
    assert [(one.tier, one.state, one.reference) for one in done.delegated] == [("deep", "requested", wanted)]
    assert [double.objectives[name] for _, path, name in double.applied if path == "/acme"] == [wanted]
    enforcer.put(WHO, "deep", {**COLD, "actions": [{"type": "move", "target": "deep"}]})
    assert not double.applied  # the former rule is not kept any more
    enforcer.evaluate(WHO, enforcement.Order("deep", dry_run=False, delegate=True))
    assert len(double.applied) == 1
    enforcer.drop(WHO, "deep")
    assert not double.applied


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"actions": [{"type": "move", "target": "disk"}]}, "one Hammerspace share"),
        ({"actions": [{"type": "replicate", "targets": ["deep", "disk"]}]}, "one Hammerspace share"),
        (
            {"actions": [{"type": "move", "target": "deep"}, {"type": "replicate", "targets": ["elsewhere"]}]},
            "one Hammerspace share",
        ),
        ({"actions": [{"type": "replicate", "count": 2}]}, "by a count"),
        ({"actions": [{"type": "delete"}]}, "cannot delete"),
        (
            {"conditions": [{"field": "age", "operator": ">", "value": "30d"}],
             "actions": [{"type": "move", "target": "deep"}]},
            "unused",
        ),
    ],
)  # fmt: skip
def test_what_a_share_cannot_keep_is_refused(
    anvil: tuple[Double, Config], enforcer: enforcement.Enforcer, rule: dict[str, Any], told: str
) -> None:
    enforcer.put(WHO, "x", rule)
    with pytest.raises(InvalidRequest, match=told):
        enforcer.evaluate(WHO, enforcement.Order("x", dry_run=False, delegate=True))
    assert not anvil[0].applied


# ── configured ──────────────────────────────────────────────────────────────────────────────────


SHARE = "hammerspace://anvil/robots?mount=/mnt/robots#keep-online"


@pytest.mark.parametrize(
    ("tiers", "told"),
    [
        ({"a": "file:/data/x", "b": "file:/data/x/y"}, "lies within"),
        ({"a": SHARE, "b": "file:/mnt/robots/fast"}, "mounted"),
        ({"a": SHARE, "b": "file:///mnt"}, "mounted"),
        ({"a": "file:relative"}, "absolute"),
        ({"a": "nowhere://x"}, "nowhere"),
    ],
)
def test_tiers_that_cannot_be_are_refused_before_anything_starts(
    tmp_path: Path, tiers: dict[str, str], told: str
) -> None:
    account = {"username": USER, "password": PASSWORD}
    config = Config(home=tmp_path, policies={"tiers": tiers}, hammerspace=account)
    with pytest.raises(ConfigError, match=told):
        policies.check_tiers(config)


def test_a_tier_that_does_not_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "hot").mkdir()
    config = Config(home=tmp_path, policies={"tiers": {"hot": f"file:{tmp_path}/hot", "cold": f"file:{tmp_path}/no"}})
    policies.check_tiers(config)  # it may come back
    with pytest.raises(Unavailable, match="tier 'cold'"):
        enforcement.check_tiers(config, at_work=True)


@pytest.mark.parametrize(
    ("tiers", "told"),
    [
        ({"a": SHARE}, r"hammerspace\.username"),
        ({"a": SHARE, "b": "hammerspace://other/x?mount=/m#keep-online"}, "2 Anvils"),
        ({"a b": "file:/data"}, "pattern"),
    ],
)
def test_settings_of_tiers_that_contradict_are_refused(tmp_path: Path, tiers: dict[str, str], told: str) -> None:
    account = {"username": USER, "password": PASSWORD} if len(tiers) > 1 else {}
    with pytest.raises(ValueError, match=told) as raised:
        Config(home=tmp_path, policies={"tiers": tiers}, hammerspace=account)
    assert PASSWORD not in str(raised.value)


def test_the_password_is_in_no_settings_that_are_shown(tmp_path: Path) -> None:
    config = Config(home=tmp_path, hammerspace={"username": USER, "password": PASSWORD})
    assert PASSWORD not in config.model_dump_json() and PASSWORD not in repr(config)


# ── shown ───────────────────────────────────────────────────────────────────────────────────────


def test_an_evaluation_is_shown_a_line_for_each_file(door: Door, headers: dict[str, str], home: Path) -> None:
    store(home, "logs/large", b"x" * 2000)
    store(home, "bad\x1bname", b"x" * 3000)
    put(door, headers, "cold", COLD)
    shown = policies.lines(evaluate(door, headers, "cold"))
    assert shown == [
        "move       'bad\\x1bname'  hot → cold  planned",
        "move       logs/large  hot → cold  planned",
        "2 of 2 files match",
        "2 move planned",
        "nothing was changed; --apply does it",
    ]
    evaluate(door, headers, "cold", dry_run=False)
    assert policies.lines(evaluate(door, headers, "cold")) == ["2 of 2 files match", "nothing to do"]
