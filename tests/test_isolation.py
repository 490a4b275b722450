"""Nobody sees another tenant's documents, nor one that they are no reader of: by 20,000 random cases, and by name.

The rows are those of notes/security.md: Q6 here and in the tests that stand beside what they are about

| row | proved by |
|---|---|
| Q6 shared cache, session id guess, edge A->B | the cases of `isolation.WAYS`, and the planted leaks, which they find |
| Q6 same answer for what is foreign and what is missing | `Request.twin` of the cases, and the tests below |
| Q6 prefix cache salted by tenant | system/test_inference.py, `..._and_another_tenant_does_not` |
| Q6 exports, backups | test_backup.py: a backup holds what the voters agree on, and no document |
| API1 document, job, session, collection, cursor, filter, batch, key | below |
| API1 source, idempotency key or session id of two tenants | test_publishing.py, test_jobs.py, test_gateway.py |
| LLM08 clause in the vector query, authority, cache key | below; test_stores.py `a_search_stays_within_its_scope` |
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus import cache
from nexus.errors import Conflict, NotFound
from nexus.hades import audience_of
from nexus.ports import Scope
from nexus.stores import memory, sqlite
from nexus.types import Hit, Message, Principal, Prompt, SearchRequest, content_digest
from tests import isolation
from tests.conftest import ALICE, BOB, MALLORY, Door, House

CASES = 20_000
PARTS = 10  # of the cases, so that a failure names its part, and no test is near its timeout


@pytest.mark.parametrize("part", range(PARTS))
def test_Q6_no_answer_holds_a_mark_of_what_its_asker_may_not_see(part: int) -> None:
    worlds = CASES // PARTS // isolation.CASES_PER_WORLD
    report = isolation.run_many(range(part * worlds, (part + 1) * worlds))
    assert not report.leaks, "\n".join(map(str, report.leaks))
    assert report.cases == CASES // PARTS
    assert set(report.kinds) == set(isolation.WAYS)
    found = {kind for kind, often in report.telling.items() if often}
    assert {"search", "query", "chat", "model", "session query", "documents", "document", "jobs"} <= found


# ── the cases find what is planted ──────────────────────────────────────────────────────────────


def _every_row(plant: pytest.MonkeyPatch) -> None:
    """The vector store does not ask whose a row is."""

    def rows(self: memory.MemoryVectors, index: str, scope: Scope) -> Any:
        wanted = None if scope.document_ids is None else set(scope.document_ids)
        every = self._indexes.get(index, {}).values()
        return iter([one for one in every if wanted is None or one[0].document_id in wanted])

    plant.setattr(memory.MemoryVectors, "_rows", rows)


def _no_tenant(plant: pytest.MonkeyPatch) -> None:
    """Nor does the authority."""
    _every_row(plant)
    plant.setattr(sqlite, "_verdict", lambda ours, may_read, is_open, *_: "visible" if is_open else "superseded")


def _one_cache_for_all(plant: pytest.MonkeyPatch) -> None:
    key_of = cache.key_of
    plant.setattr(cache, "key_of", lambda name, prompt, variant="": key_of(name, replace(prompt, tenant=""), variant))


def _no_readers(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(sqlite, "MAY_READ", "(:subject = :subject)")


def _one_jobs_list(plant: pytest.MonkeyPatch) -> None:
    plant.setattr("nexus.jobs.MAY_SEE", "(:tenant = :tenant AND :subject = :subject)")


def _one_session(plant: pytest.MonkeyPatch) -> None:
    turns = sqlite.SqliteDocuments.turns
    every = lambda self, tenant, session: [turn for one in isolation.TENANTS for turn in turns(self, one, session)]  # noqa: E731
    plant.setattr(sqlite.SqliteDocuments, "turns", every)


def _told_apart(plant: pytest.MonkeyPatch) -> None:
    """What is foreign is forbidden, and what is missing is not found."""
    from deployments.routes import documents

    class Telling(NotFound):
        code = "forbidden"

    def deny(message: str) -> NotFound:
        return Telling(message) if next(turns) else NotFound(message)

    turns = iter([one for _ in range(10_000) for one in (True, False)])
    plant.setattr(documents, "NotFound", deny)


@pytest.mark.parametrize(
    "plant", [_no_tenant, _one_cache_for_all, _no_readers, _one_jobs_list, _one_session, _told_apart],
    ids=lambda plant: plant.__name__.strip("_"),
)  # fmt: skip
def test_Q6_a_leak_that_is_planted_is_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert isolation.run_many(range(5)).leaks


def test_a_seed_makes_the_same_cases_again() -> None:
    first, second = isolation.run(7, 60), isolation.run(7, 60)
    assert (first.kinds, first.statuses, first.telling) == (second.kinds, second.statuses, second.telling)


# ── Q6 and API1, by name ────────────────────────────────────────────────────────────────────────


SECRET = "The gripper of the moon lander closes with 9 newton metres."
NO_ID = "0" * 32


@pytest.fixture
def ours(door: Door) -> dict[str, str]:
    """A document of acme that only its writer, ann, and ben read; returns its receipt."""
    body = {"filename": "moon.md", "content": SECRET, "collection": "lander", "readers": ["ben"]}
    answer = door.client.post("/rag/add_document", json=body, headers=door.headers("acme", "ann"))
    assert answer.status_code == 201, answer.text
    return answer.json()


def strangers(door: Door) -> dict[str, dict[str, str]]:
    """Of another tenant, and of the same but no reader."""
    return {"another tenant": door.headers("globex", "ann"), "no reader": door.headers("acme", "cas")}


def same(door: Door, method: str, path: str, foreign: str, headers: dict[str, str], **sent: Any) -> Any:
    """What a foreign id gets, which must be what one gets that was never there."""
    answers = []
    for id in (foreign, NO_ID):
        answer = door.client.request(method, path.format(id), headers=headers, **sent)
        answers.append((answer.status_code, answer.text.replace(id, "#").replace(answer.headers["x-request-id"], "#")))
    assert answers[0] == answers[1]
    return answers[0]


@pytest.mark.parametrize("stranger", ["another tenant", "no reader"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/rag/documents/{}"), ("DELETE", "/rag/documents/{}"), ("DELETE", "/rag/documents/{}?purge=true"),
        ("GET", "/rag/deletions/{}"), ("GET", "/rag/documents?after={}"),
    ],
)  # fmt: skip
def test_API1_a_foreign_document_is_answered_as_one_that_is_not_there(
    door: Door, ours: dict[str, str], stranger: str, method: str, path: str
) -> None:
    status, _ = same(door, method, path, ours["document_id"], strangers(door)[stranger])
    assert status == (404 if method == "DELETE" or "documents/" in path else 200)
    assert door.client.get(f"/rag/documents/{ours['document_id']}", headers=door.headers("acme", "ben")).is_success


@pytest.mark.parametrize("stranger", ["another tenant", "no reader"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/rag/jobs/{}"), ("GET", "/rag/jobs/{}?state=done&limit=0"), ("POST", "/rag/jobs/{}/cancel"),
        ("DELETE", "/rag/jobs/{}"), ("POST", "/rag/jobs/{}/files/0/retry"), ("GET", "/rag/jobs?after={}"),
    ],
)  # fmt: skip
def test_API1_a_foreign_job_is_answered_as_one_that_is_not_there(
    door: Door, ours: dict[str, str], stranger: str, method: str, path: str
) -> None:
    headers = strangers(door)[stranger]
    mine = {"files": [{"filename": "mine.md", "digest": NO_ID, "size": 1}]}
    assert door.client.post("/rag/jobs", json=mine, headers=headers).status_code == 202
    status, _ = same(door, method, path, ours["job_id"], headers)
    assert status == (200 if "after" in path else 404)


@pytest.mark.parametrize("stranger", ["another tenant", "no reader"])
def test_API1_bytes_for_a_foreign_job_are_not_taken(door: Door, ours: dict[str, str], stranger: str) -> None:
    files = {"0": ("x.md", b"x")}
    status, _ = same(door, "PUT", "/rag/jobs/{}/files", ours["job_id"], strangers(door)[stranger], files=files)
    assert status == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rag/search", {"query": "gripper", "collection": "{}"}),
        ("/rag/query", {"query": "gripper", "collection": "{}"}),
        ("/rag/query", {"query": "gripper", "collection": "{}", "stream": True}),
        ("/mcp/s/query", {"input": "gripper", "collection": "{}"}),
        ("/v1/chat/completions", {"model": "nexus-rag/{}", "messages": [{"role": "user", "content": "gripper"}]}),
    ],
)
def test_API1_a_foreign_collection_is_one_that_is_not_there(
    door: Door, ours: dict[str, str], path: str, body: dict[str, Any]
) -> None:
    headers = door.headers("globex", "ann")
    answers = []
    for name in ("lander", "nowhere"):
        filled = {key: value.format(name) if isinstance(value, str) else value for key, value in body.items()}
        answer = door.client.post(path, json=filled, headers=headers)
        assert answer.status_code == 404
        answers.append(answer.text.replace(name, "#").replace(answer.headers["x-request-id"], "#"))
    assert answers[0] == answers[1]


def test_Q6_names_of_foreign_collections_are_listed_nowhere(door: Door, ours: dict[str, str]) -> None:
    for who, headers in strangers(door).items():
        for path in ("/v1/models", "/status", "/rag/documents", "/rag/jobs", "/rag/deletions", "/report", "/metrics"):
            answer = door.client.get(path, headers=headers)
            assert answer.is_success and "lander" not in answer.text, (who, path)


def test_Q6_how_much_others_do_in_a_collection_of_the_same_name_shows_in_no_count(door: Door) -> None:
    headers, body = door.headers("globex", "ann"), {"filename": "a.md", "content": "The gripper."}
    door.client.post("/rag/add_document", json=body, headers=headers)
    before = door.client.post("/rag/search", json={"query": "gripper", "explain": True}, headers=headers).json()
    for number in range(3):
        door.house.put(f"{number}.md", "The gripper of others.")
    after = door.client.post("/rag/search", json={"query": "gripper", "explain": True}, headers=headers).json()
    del before["explain"]["seconds"], after["explain"]["seconds"]
    assert before == after and before["sequence"] == 1
    late = door.client.post("/rag/search", json={"query": "gripper", "as_of": 2}, headers=headers)
    assert late.status_code == 422 and "is only at 1" in late.text
    (collection,) = door.client.get("/status", headers=headers).json()["collections"]
    assert (collection["documents"], collection["chunks"], collection["sequence"]) == (1, 1, 1)


@pytest.mark.parametrize("path", ["/rag/search", "/rag/query"])
@pytest.mark.parametrize(
    "filters",
    [
        None, {"source": "moon.md"}, {"type": "in", "key": "source", "value": ["moon.md", "mine.md"]},
        {"type": "ne", "key": "source", "value": "nothing"}, {"tenant": "acme"}, {"readers": ["ben"]},
        {"type": "or", "filters": [{"source": "moon.md"}, {"source": "mine.md"}]},
    ],
)  # fmt: skip
def test_API1_a_filter_that_names_both_ones_own_and_foreign_documents_gets_ones_own(
    door: Door, ours: dict[str, str], path: str, filters: Any
) -> None:
    for headers in strangers(door).values():
        mine = {"filename": "mine.md", "content": "The gripper of mine closes.", "collection": "lander"}
        door.client.post("/rag/add_document", json=mine, headers=headers)
        asked = {"query": "gripper moon lander", "collection": "lander", "explain": True, "graph": "on"}
        answer = door.client.post(path, json=asked | ({"filters": filters} if filters else {}), headers=headers)
        assert answer.is_success and "moon lander closes" not in answer.text
        assert ours["document_id"] not in answer.text


def test_API1_a_batch_of_jobs_that_names_foreign_sources_touches_none(door: Door, ours: dict[str, str]) -> None:
    headers = door.headers("globex", "ann")
    files = [{"filename": name, "digest": NO_ID, "size": 1} for name in ("moon.md", "mine.md")]
    job = door.client.post("/rag/jobs", json={"files": files, "collection": "lander"}, headers=headers).json()
    assert job["expected"] == [0, 1]
    door.client.delete(f"/rag/jobs/{job['job_id']}", headers=headers)
    assert door.client.get(f"/rag/documents/{ours['document_id']}", headers=door.headers("acme", "ben")).is_success


def test_API1_who_may_not_read_a_document_cannot_replace_it_either(door: Door, ours: dict[str, str]) -> None:
    """A name is taken within a tenant: the refusal says no more than that."""
    body = {"filename": "moon.md", "content": "Nothing at all.", "collection": "lander"}
    answer = door.client.post("/rag/add_document", json=body, headers=door.headers("acme", "cas"))
    assert (answer.status_code, answer.json()["code"]) == (409, "name_taken")
    shown = door.client.get(f"/rag/documents/{ours['document_id']}", headers=door.headers("acme", "ben")).json()
    assert (shown["version"], shown["readers"]) == (ours["version"], ["ann", "ben"])


def test_a_document_added_again_keeps_its_readers_and_an_empty_list_opens_it(door: Door, ours: dict[str, str]) -> None:
    body = {"filename": "moon.md", "content": SECRET, "collection": "lander"}
    path, ann, cas = f"/rag/documents/{ours['document_id']}", door.headers("acme", "ann"), door.headers("acme", "cas")
    for content in (SECRET, SECRET + " And opens."):
        door.client.post("/rag/add_document", json=body | {"content": content}, headers=ann)
        assert door.client.get(path, headers=ann).json()["readers"] == ["ann", "ben"]
        assert door.client.get(path, headers=cas).status_code == 404
    door.client.post("/rag/add_document", json=body | {"content": SECRET + " And opens.", "readers": []}, headers=ann)
    assert door.client.get(path, headers=cas).json()["readers"] == []
    asked = {"query": "gripper of the moon lander", "collection": "lander"}
    assert door.client.post("/rag/search", json=asked, headers=cas).json()["hits"]


def test_readers_can_be_given_with_a_form_and_with_a_job(door: Door) -> None:
    ann, cas = door.headers("acme", "ann"), door.headers("acme", "cas")
    files = {"file": ("form.md", b"# Form\n\nBy form.\n")}
    added = door.client.post("/rag/add_document", files=files, data={"readers": '["ben"]'}, headers=ann)
    assert door.client.get(f"/rag/documents/{added.json()['document_id']}", headers=cas).status_code == 404
    content = b"# Job\n\nBy job.\n"
    announced = {"files": [{"filename": "job.md", "digest": content_digest(content), "size": 1}], "readers": ["ben"]}
    job = door.client.post("/rag/jobs", json=announced, headers=ann).json()
    door.client.put(f"/rag/jobs/{job['job_id']}/files", files={"0": ("job.md", content)}, headers=ann)
    assert door.client.get(f"/rag/jobs/{job['job_id']}", headers=cas).status_code == 404
    assert door.client.get(f"/rag/jobs/{job['job_id']}", headers=door.headers("acme", "ben")).is_success


@pytest.mark.parametrize(
    "readers", ["ann", [1], [""], ["a\nb"], ["x" * 256], [f"reader-{n}" for n in range(101)], {"ann": True}],
    ids=["a text", "a number", "empty", "a line break", "too long", "too many", "an object"],
)  # fmt: skip
def test_API3_readers_that_are_none_are_refused(door: Door, readers: object) -> None:
    body = {"filename": "a.md", "content": "x", "readers": readers}
    answer = door.client.post("/rag/add_document", json=body, headers=door.headers())
    assert answer.status_code == 422 and answer.json()["errors"][0]["pointer"].startswith("/readers")


def test_LLM08_the_store_itself_finds_no_row_of_other_readers(house: House) -> None:
    """The vector query has the clause: the authority's word is not needed for it."""
    house.put("a.txt", "gripper for alice", readers=frozenset({"alice"}))
    house.put("b.txt", "gripper for all")
    house.put("x.txt", "gripper of others", who=MALLORY)
    index = house.hades.find_collection("default").index
    for who, often in ((ALICE, 2), (BOB, 1), (MALLORY, 1)):
        scope = house.hades.scope("default", who)
        assert len(house.hades.vectors.search_text(index, "gripper", 10, scope)) == often
        assert len(house.hades.vectors.search_dense(index, house.embedder.embed(["x"])[0], 10, scope)) == often


def test_LLM08_the_authority_refuses_what_the_store_should_not_have_found(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.put("a.txt", "gripper for alice", readers=frozenset({"alice"}))
    house.put("b.txt", "gripper for all")
    house.put("x.txt", "gripper of others", who=MALLORY)
    _every_row(monkeypatch)
    for who, texts in ((BOB, {"gripper for all"}), (MALLORY, {"gripper of others"})):
        result = house.retriever.search(SearchRequest("gripper", explain=True), who)
        assert {hit.text for hit in result.hits} == texts
        assert len(result.explain["candidates"]) == 1


def test_who_is_no_reader_any_more_reads_no_earlier_version(house: House) -> None:
    document = house.put("a.txt", "gripper one")
    house.put("a.txt", "gripper two", readers=frozenset({"alice"}))
    house.put("a.txt", "gripper three")
    for as_of, alice, bob in ((1, 1, 0), (2, 1, 0), (3, 1, 1)):
        request = SearchRequest("gripper", as_of=as_of)
        found = [len(house.retriever.search(request, who).hits) for who in (ALICE, BOB)]
        assert found == [alice, bob], as_of
    assert house.hades.documents.current(document.document_id, BOB) is not None


def test_who_is_no_reader_any_more_sees_no_receipt_of_an_earlier_delete(house: House) -> None:
    document = house.put("a.txt", "gripper one")
    house.hades.delete([document.document_id], ALICE)
    assert len(house.hades.documents.deletions(BOB, None, 10)) == 1
    house.put("a.txt", "gripper two", readers=frozenset({"alice"}))
    assert [len(house.hades.documents.deletions(who, None, 10)) for who in (ALICE, BOB)] == [1, 0]


def test_readers_that_have_nobody_in_common_leave_the_past_to_nobody(house: House) -> None:
    house.put("a.txt", "gripper one", readers=frozenset({"bob"}))
    house.put("a.txt", "gripper two", readers=frozenset({"alice"}))
    request = SearchRequest("gripper", as_of=1)
    assert [house.retriever.search(request, who).hits for who in (ALICE, BOB)] == [(), ()]


def test_readers_changed_in_place_are_found_by_the_new_ones_alone(house: House) -> None:
    document = house.put("a.txt", "gripper", readers=frozenset({"alice"}))
    changed = replace(document, readers=frozenset({"alice", "bob"}))
    assert house.hades.is_unchanged(changed, ALICE).readers == {"alice", "bob"}
    assert len(house.retriever.search(SearchRequest("gripper"), BOB).hits) == 1
    house.hades.is_unchanged(document, ALICE)
    assert house.retriever.search(SearchRequest("gripper"), BOB).hits == ()
    assert house.hades.fsck() == []


def test_a_crash_between_the_stores_leaves_readers_that_both_allow(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = house.put("a.txt", "gripper")
    monkeypatch.setattr(house.hades.documents, "annotate", lambda _: (_ for _ in ()).throw(Conflict("no")))
    with pytest.raises(Conflict):
        house.hades.is_unchanged(replace(document, readers=frozenset({"alice"})), ALICE)
    monkeypatch.undo()
    assert house.retriever.search(SearchRequest("gripper"), BOB).hits == ()
    house.hades.is_unchanged(replace(document, readers=frozenset({"alice"})), ALICE)
    assert len(house.retriever.search(SearchRequest("gripper"), ALICE).hits) == 1


def test_Q6_no_name_of_a_tenant_is_that_of_somebodys_readers() -> None:
    """Else the keys of one tenant would find the rows of another's readers."""
    from nexus.access import NAME

    assert NAME.fullmatch(audience_of("acme", frozenset({"alice"}))) is None
    assert len(audience_of("t" * 64, frozenset({"alice"}))) <= 128
    assert audience_of("acme", frozenset({"a", "b"})) != audience_of("acme", frozenset({"ab"}))


@pytest.mark.parametrize("change", ["tenant", "readers", "version", "sequence"])
def test_LLM08_the_key_of_an_answer_is_of_its_tenant_readers_and_versions(change: str) -> None:
    hit = Hit("c", "d", "v1", 0, 0.5, 0.5, "text", "title", "a.md", (), None, None, None, {}, {}, ("ann",))
    prompt = Prompt((Message("user", "?"),), passages=(hit,), tenant="acme", sequence=1)
    others = {
        "tenant": replace(prompt, tenant="globex"), "sequence": replace(prompt, sequence=2),
        "readers": replace(prompt, passages=(replace(hit, readers=("ann", "ben")),)),
        "version": replace(prompt, passages=(replace(hit, version="v2"),)),
    }  # fmt: skip
    assert cache.key_of("m", prompt) == cache.key_of("m", replace(prompt, passages=(replace(hit, score=0.1),)))
    assert cache.key_of("m", prompt) != cache.key_of("m", others[change])


def test_Q6_an_idempotency_key_of_somebody_elses_hidden_job_tells_nothing_of_it(door: Door) -> None:
    body = {"files": [{"filename": "moon.md", "digest": NO_ID, "size": 1}], "readers": []}
    hidden = body | {"readers": ["ben"]}
    ann, cas = (door.headers("acme", name) | {"idempotency-key": "k"} for name in ("ann", "cas"))
    job = door.client.post("/rag/jobs", json=hidden, headers=ann).json()
    again = door.client.post("/rag/jobs", json=hidden, headers=cas)
    assert (again.status_code, again.json()["code"]) == (409, "idempotency_key_reused")
    assert job["job_id"] not in again.text
    globex = door.headers("globex", "ann") | {"idempotency-key": "k"}
    assert door.client.post("/rag/jobs", json=hidden, headers=globex).json()["job_id"] != job["job_id"]


def test_a_store_of_before_is_brought_to_sequences_of_its_tenants(tmp_path: Path) -> None:
    """What had one sequence for all goes on from it, for each tenant; documents and receipts stay open to all."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(tmp_path / "documents.db")) as db:
        for number, script in enumerate(sqlite.MIGRATIONS[:3], 1):
            db.executescript(script + f"; PRAGMA user_version = {number};")
        db.execute("INSERT INTO collections VALUES ('a','f','i',7,2)")
        row = ("d", "v", "acme", "a", "s", "t", "text/plain", "{}", '["ann"]', 1, 0, 1, 0.0, 0.0, None)
        db.execute(f"INSERT INTO versions VALUES ({','.join('?' * 15)})", row)
        db.execute("INSERT INTO spans (document_id, version, opened) VALUES ('d', 'v', 7)")
        db.commit()
    with closing(sqlite.open("sqlite:", home=tmp_path)) as documents:
        collection = documents.collection("a", "acme")
        assert (collection.sequence, collection.horizon, documents.collection("a", "globex")) == (7, 2, None)
        assert documents.audiences("a", Principal("acme", "ann")) == {frozenset({"ann"})}
        assert documents.audiences("a", Principal("acme", "ben")) == set()
