"""What memory keeps: found by whom it belongs to alone, gone without a trace, and whole after any crash."""

import os
import random
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus import failpoints
from nexus.errors import Unavailable
from nexus.filters import parse_filter
from nexus.ports import InteractionStore
from nexus.registry import open_interactions
from nexus.types import Forgotten, Interaction, digest
from tests.document_stores import STORES, place
from tests.remembered import EMBEDDER, NOW, SUMMARY, PlainInteractions, compact, random_unit

CANARY = "canary-4b1d-of-alice"
DAY = 86_400.0


def interaction(number: int, **fields: Any) -> Interaction:
    given: dict[str, Any] = {
        "interaction_id": digest("test", str(number)), "tenant": "acme", "subject": "app", "user": "alice",
        "query": f"question {number}", "response": f"answer {number}", "created_at": NOW + number,
    }  # fmt: skip
    return Interaction(**given | fields)


@pytest.fixture(params=[kind for kind in STORES if kind != "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InteractionStore]:
    with place(request.param, tmp_path) as opens, closing(opens.interactions()) as opened:
        yield opened


def ids(found: list[Interaction]) -> list[str]:
    return [one.interaction_id for one in found]


def bytes_in(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def test_what_is_kept_comes_back_as_it_was(store: InteractionStore) -> None:
    kept = interaction(
        1, context=("a", "b"), confidence=0.5, model="m", gpu_utilization=71.5, latency_ms=12.5,
        metadata={"type": "context", "n": [1, {"x": None}]}, query="tür\u2028", response="",
    )  # fmt: skip
    store.add(kept, random_unit(1), "f")
    assert store.load("acme", [kept.interaction_id]) == [kept] == store.recent("acme", "app", None, 5)
    assert store.usage() == {"acme": kept.size} and store.damaged() == []


def test_what_is_nearest_is_found_first_and_only_among_vectors_of_one_embedder(store: InteractionStore) -> None:
    for number in range(9):
        store.add(interaction(number), random_unit(number), "new" if number % 3 else "old")
    store.add(interaction(9), None, "")
    found = store.nearest("acme", "app", None, random_unit(4), "new", 2)
    assert found[0][0] == interaction(4) and found[0][1] == pytest.approx(1) and found[1][1] < 0.999
    assert len(store.nearest("acme", "app", None, random_unit(4), "new", 99)) == 6
    assert store.count_stale("acme", "app", "new") == 4
    assert {one.interaction_id for one in store.stale("new", 99)} == {digest("test", str(n)) for n in (0, 3, 6, 9)}
    store.embed({interaction(n).interaction_id: random_unit(n) for n in (0, 3, 6, 9, 77)}, "new")
    assert store.count_stale("acme", "app", "new") == 0 and store.stale("new", 9) == []
    assert store.nearest("acme", "app", None, random_unit(9), "new", 1)[0][0] == interaction(9)
    assert store.nearest("acme", "app", None, random_unit(0), "old", 9) == []


def test_a_vector_that_is_none_is_told_and_taken_away_to_be_made_anew(store: InteractionStore) -> None:
    for number in range(3):
        store.add(interaction(number), random_unit(number), "f")
    store.embed({interaction(1).interaction_id: 2 * random_unit(1)}, "f")
    assert store.damaged() == [interaction(1).interaction_id] and store.stale("f", 9) == []
    store.repair()
    assert store.damaged() == [] and store.stale("f", 9) == [interaction(1)]
    assert len(store.nearest("acme", "app", None, random_unit(0), "f", 9)) == 2


METADATA = (
    {}, {"lot": 1}, {"lot": "1"}, {"lot": True}, {"lot": 3, "type": "context"}, {"lot": None},
    {"user": "alice", "kind": "summary", "latency_ms": 99, "model_used": "m"},  # by these names the interaction's own
)  # fmt: skip
TENANTS, SUBJECTS, USERS = ("acme", "globex"), ("app", "ben"), ("alice", "bob")
CONDITIONS = (
    None, {"type": "context"}, {"lot": 3}, {"lot": [1, "1", True]}, {"user": "alice"}, {"kind": "summary"},
    {"type": "gt", "key": "latency_ms", "value": 20}, {"type": "ne", "key": "lot", "value": 1},
    {"type": "lte", "key": "timestamp", "value": NOW + 20}, {"type": "lt", "key": "user", "value": "b"},
    {"type": "or", "filters": [{"model_used": "m"}, {"type": "gte", "key": "confidence", "value": 0.5}]},
    {"type": "nin", "key": "model_used", "value": ["m", "n"]}, {"type": "gt", "key": "lot", "value": "0"},
    {"tenant": "globex"}, {"subject": "ben"}, {"metadata": "{}"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "seed"), [("memory", seed) for seed in range(12)] + [(kind, 12) for kind in STORES if "arango" in kind]
)
def test_whatever_is_done_it_is_as_the_plainest_store_and_nothing_of_others_is_seen(
    tmp_path: Path, kind: str, seed: int
) -> None:
    """Of two tenants with two subjects each, which name the same users; all answers of both stores, step by step."""
    rng, plain = random.Random(seed), PlainInteractions()
    with place(kind, tmp_path) as opens, closing(opens.interactions()) as store:
        for number in range(120):
            _step(rng, number, (plain, store))
        assert store.damaged() == [] and len(plain.kept) > 5


def _step(rng: random.Random, number: int, stores: tuple[Any, Any]) -> None:
    plain = stores[0]
    tenant, subject, user = rng.choice(TENANTS), rng.choice(SUBJECTS), rng.choice(USERS)
    who, known = (tenant, rng.choice((subject, subject, None))), [*plain.kept, *plain.parts, digest("none")]
    some = rng.sample(known, min(len(known), rng.randint(1, 3)))
    kind = rng.choices(("add", "replace", "drop", "delete", "forget", "embed"), (60, 12, 5, 8, 1, 5))[0]
    vector = rng.choice((random_unit(number), random_unit(number), None))
    made = interaction(
        number, tenant=tenant, subject=subject, user=user, model=rng.choice((None, "m", "n")),
        confidence=rng.choice((None, 0.2, 0.9)), latency_ms=rng.choice((None, 10, 30.5)),
        metadata=rng.choice(METADATA),
        created_at=NOW + rng.randint(0, 40),
    )  # fmt: skip
    if kind == "replace":
        own = [id for id, one in plain.kept.items() if one.kind == "interaction" and one.tenant == tenant]
        some, made = rng.sample(own, min(len(own), 2)) + some[: rng.random() < 0.3], replace(made, kind="summary")
    moves = {
        "add": lambda s: s.add(made, vector, "f"),
        "replace": lambda s: bool(some) and s.replace(tenant, list(dict.fromkeys(some)), made, vector, "f"),
        "drop": lambda s: s.drop(tenant, some),
        "delete": lambda s: s.delete(*who, some[0]),
        "forget": lambda s: s.forget(*who, user),
        "embed": lambda s: s.embed({id: random_unit(number) for id in some}, "f"),
    }
    condition = rng.choice(CONDITIONS)
    tree = None if condition is None else parse_filter(condition)
    answers = []
    for store in stores:
        done = moves[kind](store)
        recent = store.recent(tenant, subject, tree, 5)
        near = store.nearest(tenant, subject, tree, random_unit(number), "f", 5)
        assert {(one.tenant, one.subject) for one in [*recent, *(one for one, _ in near)]} <= {(tenant, subject)}
        shown = [(one, pytest.approx(cosine, abs=1e-5)) for one, cosine in near] if store is plain else near
        counts = store.count_stale(tenant, subject, "f"), store.usage(), store.load(tenant, sorted(some))
        lists = [store.oldest(tenant, kind, 4) for kind in ("interaction", "summary")]
        answers.append((done, recent, shown, counts, lists, {one.interaction_id for one in store.stale("f", 999)}))
    assert answers[0] == answers[1], kind


def test_a_summary_goes_with_any_of_what_it_was_made_of(store: InteractionStore) -> None:
    for number in range(3):
        store.add(interaction(number), None, "")
    summary = interaction(9, kind="summary", response=SUMMARY)
    assert store.replace("acme", ids([interaction(0), interaction(1)]), summary, random_unit(1), "f")
    assert set(ids(store.recent("acme", "app", None, 9))) == set(ids([summary, interaction(2)]))
    part = interaction(1).interaction_id
    assert store.delete("globex", None, part) == Forgotten(0, 0) == store.delete("acme", "ben", part)
    assert store.delete("acme", "app", part) == Forgotten(0, 1)
    assert ids(store.recent("acme", "app", None, 9)) == [interaction(2).interaction_id]


def test_what_was_deleted_meanwhile_is_in_no_summary(store: InteractionStore) -> None:
    for number in range(2):
        store.add(interaction(number), None, "")
    store.delete("acme", "app", interaction(0).interaction_id)
    summary = interaction(9, kind="summary")
    assert not store.replace("acme", ids([interaction(0), interaction(1)]), summary, None, "")
    assert store.recent("acme", "app", None, 9) == [interaction(1)]


@pytest.mark.parametrize("how", ["drop", "replace"])
def test_what_fails_within_a_move_leaves_everything_as_it_was(
    store: InteractionStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    kept = [interaction(number) for number in range(3)]
    for number, one in enumerate(kept):
        store.add(one, random_unit(number), "f")
    moves = {
        "drop": lambda: store.drop("acme", ids(kept[:2])),
        "replace": lambda: store.replace("acme", ids(kept[:2]), interaction(9, kind="summary"), None, ""),
    }
    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "_active", {f"memory.inside_{how}": failpoints._Failpoint("raise", 0, 1)})
        with pytest.raises(failpoints.FailpointReached):
            moves[how]()
    assert store.load("acme", ids(kept)) == kept and store.damaged() == []
    assert moves[how]() and store.load("acme", ids(kept)) == kept[2:]


@pytest.mark.parametrize("how", ["forget", "delete", "drop", "replace"])
def test_nothing_of_what_is_deleted_stays_in_any_file(tmp_path: Path, how: str) -> None:
    with closing(open_interactions("sqlite:", home=tmp_path)) as store:
        secret = interaction(1, query=CANARY, response=CANARY * 300, context=(CANARY,), metadata={"a": CANARY})
        for number in (0, 2, 3):
            store.add(interaction(number, user="bob", response="other " * 50), random_unit(number), "f")
        store.add(secret, EMBEDDER.embed([CANARY])[0], "f")
        vector = EMBEDDER.embed([CANARY])[0].tobytes()
        assert CANARY.encode() in bytes_in(tmp_path) and vector in bytes_in(tmp_path)
        moves = {
            "forget": lambda: store.forget("acme", "app", "alice"),
            "delete": lambda: store.delete("acme", "app", secret.interaction_id),
            "drop": lambda: store.drop("acme", [secret.interaction_id]),
            "replace": lambda: store.replace("acme", [secret.interaction_id], interaction(9, kind="summary"), None, ""),
        }
        assert moves[how]()
        assert CANARY.encode() not in bytes_in(tmp_path) and vector not in bytes_in(tmp_path)
        assert b"other other" in bytes_in(tmp_path) and len(store.recent("acme", "app", None, 9)) >= 3


def test_who_reads_meanwhile_keeps_the_log_only_until_the_next_time(tmp_path: Path) -> None:
    with closing(open_interactions("sqlite:", home=tmp_path)) as store:
        store.add(interaction(1, query=CANARY), None, "")
        with closing(sqlite3.connect(tmp_path / "memory.db")) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT COUNT(*) FROM interactions").fetchone()
            assert store.forget("acme", "app", "alice") == Forgotten(1, 0)
            reader.execute("ROLLBACK")
        store.clear_log()
        assert CANARY.encode() not in bytes_in(tmp_path)


def test_the_file_is_its_owners_alone_and_its_damage_is_told(tmp_path: Path) -> None:
    with closing(open_interactions("sqlite:", home=tmp_path)) as store:
        assert (tmp_path / "memory.db").stat().st_mode & 0o777 == 0o600
        store.add(interaction(1), random_unit(1), "f")
        store.add(interaction(2), random_unit(2), "f")
        store.check()
        with closing(sqlite3.connect(tmp_path / "memory.db", isolation_level=None)) as db:
            db.execute("UPDATE vectors SET vector = zeroblob(32) WHERE ordinal = 2")
        assert store.damaged() == [interaction(2).interaction_id] and store.count_stale("acme", "app", "f") == 0
        store.repair()
        assert store.damaged() == [] and store.stale("f", 9) == [interaction(2)]
    with pytest.raises(Unavailable):
        store.check()


# ── a crash ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("how", "failpoint", "summaries"),
    [
        ("summarise", "memory.before_replace", 0), ("summarise", "memory.inside_replace", 0),
        ("summarise", "memory.before_replace:kill@2", 1), ("summarise", "memory.inside_replace:kill@2", 1),
        ("drop", "memory.inside_drop", 0),
    ],
)  # fmt: skip
def test_a_crash_in_the_middle_of_compaction_loses_nothing(
    tmp_path: Path, how: str, failpoint: str, summaries: int
) -> None:
    """Each interaction is there or in exactly one summary, and the next run does what was left."""
    names = {interaction(n).interaction_id: "alice" if n % 2 else "bob" for n in range(10)}
    with closing(open_interactions("sqlite:", home=tmp_path)) as store:
        for number in range(10):
            old = interaction(number, created_at=NOW - 9 * DAY + number, user="alice" if number % 2 else "bob")
            store.add(old, random_unit(number), EMBEDDER.fingerprint)
    kill = failpoint if ":" in failpoint else f"{failpoint}:kill"
    assert os.WTERMSIG(_compact(tmp_path, how, kill)) == signal.SIGKILL
    with closing(open_interactions("sqlite:", home=tmp_path)) as store:
        left = store.recent("acme", "app", None, 99)
        made = [one for one in left if one.kind == "summary"]
        gone = {user for one in made for user in [one.user]}
        assert len(made) == summaries and store.damaged() == []
        assert {one.interaction_id for one in left if one.kind == "interaction"} == {
            id for id, user in names.items() if user not in gone
        }
    assert _compact(tmp_path, how, "") == 0
    with closing(open_interactions("sqlite:", home=tmp_path)) as store:
        left = store.recent("acme", "app", None, 99)
        assert sorted((one.user, one.response) for one in left) == (
            [] if how == "drop" else [("alice", SUMMARY), ("bob", SUMMARY)]
        )


def _compact(home: Path, how: str, failpoint: str) -> int:
    """The exit status of a process that compacts, and may be killed at this point."""
    child = os.fork()
    if child == 0:
        try:
            os.environ |= {"NEXUS_TESTING": "1", "NEXUS_FAILPOINT": failpoint}
            failpoints._active = None
            compact(home, how)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]
