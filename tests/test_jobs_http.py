"""Jobs through the front door: announced, sent, looked at, cancelled, tried again; and deleted with a receipt."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from httpx import Response
from typer.testing import CliRunner

from deployments import cli, client
from nexus.errors import InvalidRequest, Unprocessable
from nexus.types import Principal, content_digest
from tests.conftest import Door
from tests.test_gateway import MANUAL, add, check_problem

OURS = Principal("default", "tester")
HUGE = "9" * 40


@pytest.fixture
def headers(door: Door) -> dict[str, str]:
    return door.headers()


@pytest.fixture(autouse=True)
def no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that is asked here ends in a fault of the gateway."""
    yield
    assert [one.getMessage() for one in caplog.get_records("call") if one.name == "nexus.gateway"] == []


def about(name: str, content: str, **fields: object) -> dict:
    return {
        "filename": name, "digest": content_digest(content.encode()), "size": len(content.encode()), **fields
    }  # fmt: skip


def announce(door: Door, headers: dict[str, str], *files: dict, **fields: object) -> Response:
    return door.client.post("/rag/jobs", json={"files": list(files), **fields}, headers=headers)


def send(door: Door, headers: dict[str, str], job_id: str, contents: dict[object, str]) -> Response:
    files = [(str(number), ("file", content.encode())) for number, content in contents.items()]
    return door.client.put(f"/rag/jobs/{job_id}/files", files=files, headers=headers)


def files_of(door: Door, headers: dict[str, str], job_id: str, query: str = "") -> list[dict]:
    return door.client.get(f"/rag/jobs/{job_id}{query}", headers=headers).json()["files"]


def end_of(door: Door, headers: dict[str, str], job_id: str) -> dict:
    """The job once every file of it has ended."""
    for file in files_of(door, headers, job_id):
        door.client.portal.call(door.lent.ingestor.finish, job_id, file["number"])
    return door.client.get(f"/rag/jobs/{job_id}", headers=headers).json()


def let_pass(door: Door, seconds: float) -> None:
    """Put all that was stored so far so many seconds into the past; what was staged just now is never purged."""
    db = door.house.hades.documents._connect()
    db.execute("UPDATE versions SET staged_at = staged_at - ?", (seconds,))
    db.execute("UPDATE spans SET closed_at = closed_at - ?", (seconds,))


# ── a job ───────────────────────────────────────────────────────────────────────────────────────


def test_files_are_announced_sent_and_added(door: Door, headers: dict[str, str]) -> None:
    texts = {f"{n}.md": f"{MANUAL}It is number {n}." for n in range(3)}
    answer = announce(door, headers, *[about(name, text, metadata={"n": name}) for name, text in texts.items()])
    job = answer.json()
    assert (answer.status_code, job["state"], job["total"], job["expected"]) == (202, "running", 3, [0, 1, 2])
    assert (job["counts"], job["progress"], job["collection"]) == ({"expected": 3}, 0, "default")
    for number, text in enumerate(texts.values()):
        sent = send(door, headers, job["job_id"], {number: text})
        assert (sent.status_code, sent.json()) == (202, {"received": 1})
    ended = end_of(door, headers, job["job_id"])
    assert (ended["state"], ended["counts"], ended["progress"]) == ("done", {"done": 3}, 1)
    assert (ended["reason"], ended["seconds_left"], ended["under_way"], ended["stuck"]) == (None, 0, [], [])
    files = files_of(door, headers, job["job_id"])
    assert [(file["number"], file["filename"], file["state"]) for file in files] == [
        (number, name, "done") for number, name in enumerate(texts)
    ]
    shown = door.client.get(f"/rag/documents/{files[1]['document_id']}", headers=headers).json()
    assert (shown["source"], shown["metadata"], shown["version"]) == ("1.md", {"n": "1.md"}, files[1]["version"])
    assert files_of(door, headers, job["job_id"], "?after=0&limit=1")[0]["number"] == 1
    assert files_of(door, headers, job["job_id"], "?state=failed") == []
    listed = door.client.get("/rag/jobs?state=done", headers=headers).json()
    assert ([one["job_id"] for one in listed["jobs"]], listed["next"]) == ([job["job_id"]], None)


def test_unchanged_files_have_ended_and_are_not_asked_for(door: Door, headers: dict[str, str]) -> None:
    receipt = add(door, "a.md", headers=headers)
    job = announce(door, headers, about("a.md", MANUAL, metadata={"robot": "HX-3"}), about("b.md", MANUAL)).json()
    assert (job["expected"], job["counts"], job["state"]) == ([1], {"unchanged": 1, "expected": 1}, "running")
    file = files_of(door, headers, job["job_id"])[0]
    assert (file["state"], file["version"], file["attempts"]) == ("unchanged", receipt["version"], 0)
    shown = door.client.get(f"/rag/documents/{receipt['document_id']}", headers=headers).json()
    assert shown["metadata"] == {"robot": "HX-3"}
    again = announce(door, headers, about("a.md", MANUAL, metadata={"robot": "HX-3"})).json()
    assert (again["expected"], again["state"], again["progress"]) == ([], "done", 1)


def test_one_name_twice_in_a_job_is_one_document_and_the_last_one_wins(door: Door, headers: dict[str, str]) -> None:
    job = announce(door, headers, about("a.md", MANUAL), about("a.md", "# Second\n\nThe second text.")).json()
    assert job["expected"] == [0, 1]
    assert send(door, headers, job["job_id"], {0: MANUAL, 1: "# Second\n\nThe second text."}).status_code == 202
    assert end_of(door, headers, job["job_id"])["counts"] == {"done": 2}
    (document,) = door.client.get("/rag/documents", headers=headers).json()["documents"]
    assert document["title"] == "Second"


def test_a_file_that_changed_is_named_and_the_others_are_added(door: Door, headers: dict[str, str]) -> None:
    job = announce(door, headers, about("a.md", MANUAL), about("b.md", MANUAL)).json()
    send(door, headers, job["job_id"], {0: MANUAL + "changed", 1: MANUAL})
    assert end_of(door, headers, job["job_id"])["counts"] == {"done": 1, "failed": 1}
    changed = files_of(door, headers, job["job_id"])[0]
    assert (changed["code"], changed["stage"]) == ("changed", "upload")


def test_a_job_announced_twice_with_one_key_is_one_job(door: Door, headers: dict[str, str]) -> None:
    keyed = {**headers, "idempotency-key": "k"}
    first, second = (announce(door, keyed, about("a.md", MANUAL)).json() for _ in range(2))
    assert first["job_id"] == second["job_id"] and second["expected"] == [0]
    answer = announce(door, keyed, about("b.md", MANUAL))
    assert check_problem(answer, 409, "/rag/jobs")["code"] == "idempotency_key_reused"


def test_a_cancelled_job_takes_and_adds_nothing_more(door: Door, headers: dict[str, str]) -> None:
    for number, how in enumerate((lambda path: door.client.post(f"{path}/cancel", headers=headers),
                                  lambda path: door.client.delete(path, headers=headers))):  # fmt: skip
        job = announce(door, headers, about(f"{number}.md", MANUAL)).json()
        answer = how(f"/rag/jobs/{job['job_id']}")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert send(door, headers, job["job_id"], {0: MANUAL}).status_code == 202
        assert end_of(door, headers, job["job_id"])["counts"] == {"cancelled": 1}
    assert door.client.get("/rag/documents", headers=headers).json()["documents"] == []


def test_a_failed_file_is_tried_again_with_the_bytes_that_were_kept(
    door: Door, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> object:
        raise Unprocessable("not today")

    with monkeypatch.context() as patched:
        patched.setattr(door.lent.ingestor.parsers, "parse", broken)
        job = announce(door, headers, about("a.md", MANUAL)).json()
        send(door, headers, job["job_id"], {0: MANUAL})
        ended = end_of(door, headers, job["job_id"])
    assert (ended["state"], bool(ended["reason"])) == ("failed", True)
    (file,) = files_of(door, headers, job["job_id"])
    assert (file["reason"], file["stage"], file["code"]) == ("not today", "parse", "document_unprocessable")
    path = f"/rag/jobs/{job['job_id']}/files/0/retry"
    again = door.client.post(path, headers=headers)
    assert (again.status_code, again.json()["state"]) == (202, "running")
    assert end_of(door, headers, job["job_id"])["state"] == "done"
    check_problem(door.client.post(path, headers=headers), 409, path)
    assert len(door.client.get("/rag/documents", headers=headers).json()["documents"]) == 1


def test_jobs_are_listed_in_pages(door: Door, headers: dict[str, str]) -> None:
    made = [announce(door, headers, about(f"{n}.md", MANUAL)).json()["job_id"] for n in range(3)]
    first = door.client.get("/rag/jobs?limit=2", headers=headers).json()
    second = door.client.get(f"/rag/jobs?limit=2&after={first['next']}", headers=headers).json()
    assert [job["job_id"] for job in first["jobs"] + second["jobs"]] == made[::-1]
    assert second["next"] is None


# ── a single document ───────────────────────────────────────────────────────────────────────────


def test_who_does_not_want_to_wait_gets_the_job(door: Door, headers: dict[str, str]) -> None:
    body = {"filename": "a.md", "content": MANUAL}
    answer = door.client.post("/rag/add_document", json=body, headers={**headers, "prefer": "respond-async"})
    assert (answer.status_code, answer.json()["total"]) == (202, 1)
    assert end_of(door, headers, answer.json()["job_id"])["state"] == "done"
    assert add(door, "a.md", headers=headers)["message"] == "Document unchanged"


def test_one_key_is_one_document_and_one_answer(door: Door, headers: dict[str, str]) -> None:
    keyed = {**headers, "idempotency-key": "k"}
    first, second = add(door, "a.md", headers=keyed), add(door, "a.md", headers=keyed)
    assert first == second and first["job_id"]
    body = {"filename": "a.md", "content": "# Else\n\nSomething else.\n"}
    answer = door.client.post("/rag/add_document", json=body, headers=keyed)
    assert check_problem(answer, 409, "/rag/add_document")["code"] == "idempotency_key_reused"
    theirs = {**door.headers("other"), "idempotency-key": "k"}
    assert door.client.post("/rag/add_document", json=body, headers=theirs).status_code == 201
    assert len(door.client.get("/rag/jobs", headers=headers).json()["jobs"]) == 1


def test_one_key_with_a_file_that_failed_fails_the_same_way(door: Door, headers: dict[str, str]) -> None:
    keyed, body = {**headers, "idempotency-key": "k"}, {"filename": "a.md", "content": ""}
    answers = [door.client.post("/rag/add_document", json=body, headers=keyed) for _ in range(2)]
    first, second = (check_problem(answer, 422, "/rag/add_document") for answer in answers)
    assert first["detail"] == second["detail"]


@pytest.mark.parametrize("key", ["", "k" * 256, "a\tb"])
def test_keys_that_are_none(door: Door, headers: dict[str, str], key: str) -> None:
    body, keyed = {"filename": "a.md", "content": MANUAL}, {**headers, "idempotency-key": key}
    check_problem(door.client.post("/rag/add_document", json=body, headers=keyed), 422, "/rag/add_document")


def test_a_file_cancelled_while_its_sender_waits_is_answered(
    door: Door, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = door.lent.ingestor.parsers.parse

    def cancel_first(*arguments: object) -> object:
        (job,) = door.lent.jobs.recent(OURS, None, None, 10)
        door.lent.jobs.cancel(job.job_id, OURS)
        return parse(*arguments)

    monkeypatch.setattr(door.lent.ingestor.parsers, "parse", cancel_first)
    body = {"filename": "a.md", "content": MANUAL}
    answer = door.client.post("/rag/add_document", json=body, headers=headers)
    assert check_problem(answer, 409, "/rag/add_document")["code"] == "cancelled"
    assert door.client.get("/rag/documents", headers=headers).json()["documents"] == []


# ── deleting, and keeping clean ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("purge", [False, True])
def test_a_deleted_document_leaves_a_receipt(door: Door, headers: dict[str, str], purge: bool) -> None:
    document_id = add(door, "a.md", headers=headers)["document_id"]
    chunks = add(door, "a.md", MANUAL + "More.\n", headers=headers)["chunks"]
    let_pass(door, 3600)
    gone = door.client.delete(f"/rag/documents/{document_id}?purge={purge}".lower(), headers=headers)
    receipt = gone.json()["receipt"]
    assert (gone.status_code, gone.json()["deleted"], receipt["document_id"]) == (200, True, document_id)
    assert (receipt["source"], receipt["deleted_by"], receipt["sequence"]) == ("a.md", "tester", 3)
    assert receipt["uploads"] == 0
    counts = (2, 2 * chunks, 2 * chunks) if purge else (0, 0, 0)
    store, vectors = receipt["purged"]["document store"], receipt["purged"]["vector store"]
    assert (store["versions"], store["chunks"], vectors["vectors"]) == counts
    assert (receipt["purged_at"] is not None) == purge
    receipt.pop("uploads")
    for path in ("/rag/deletions", f"/rag/deletions/{document_id}"):
        assert door.client.get(path, headers=headers).json() == {"deletions": [receipt]}
        assert door.client.get(path, headers=door.headers("other")).json() == {"deletions": []}
    assert door.client.post("/rag/fsck", headers=headers).json() == {"clean": True, "faults": []}


def test_deleting_drops_the_bytes_of_failed_uploads(
    door: Door, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document_id = add(door, "a.md", headers=headers)["document_id"]

    def broken(*_: object) -> object:
        raise Unprocessable("not today")

    monkeypatch.setattr(door.lent.ingestor.parsers, "parse", broken)
    body = {"filename": "a.md", "content": MANUAL + "More.\n"}
    assert door.client.post("/rag/add_document", json=body, headers=headers).status_code == 422
    gone = door.client.delete(f"/rag/documents/{document_id}", headers=headers)
    assert gone.json()["receipt"]["uploads"] == 1
    job_id = door.client.get("/rag/jobs?state=failed", headers=headers).json()["jobs"][0]["job_id"]
    path = f"/rag/jobs/{job_id}/files/0/retry"
    assert "no longer kept" in check_problem(door.client.post(path, headers=headers), 409, path)["detail"]


def test_upkeep_is_for_administrators(door: Door, headers: dict[str, str]) -> None:
    add(door, "a.md", headers=headers)
    add(door, "a.md", MANUAL + "More.\n", headers=headers)
    let_pass(door, 600)
    plain = door.headers("default", "plain", "documents:read", "documents:write")
    for path in ("/rag/fsck", "/rag/vacuum"):
        assert "admin" in check_problem(door.client.post(path, headers=plain), 403, path)["detail"]
    assert door.client.post("/rag/fsck?repair=true", headers=headers).json()["clean"] is True
    assert door.client.post("/rag/vacuum?keep_seconds=3600", headers=headers).json()["versions"] == 0
    vacuumed = door.client.post("/rag/vacuum", headers=headers).json()
    assert (vacuumed["versions"], vacuumed["why"]) == (1, {"closed": 1})
    for keep in ("-1", "nan", "soon"):
        check_problem(door.client.post(f"/rag/vacuum?keep_seconds={keep}", headers=headers), 422, "/rag/vacuum")


# ── who may, and what cannot be meant ───────────────────────────────────────────────────────────


def test_another_tenants_job_is_not_there(door: Door, headers: dict[str, str]) -> None:
    job_id = announce(door, headers, about("a.md", MANUAL)).json()["job_id"]
    theirs, path = door.headers("other"), f"/rag/jobs/{job_id}"
    for method, place in (
        ("GET", path), ("DELETE", path), ("POST", f"{path}/cancel"),
        ("POST", f"{path}/files/0/retry"),
    ):  # fmt: skip
        unknown = place.replace(job_id, "0" * 32)
        answers = [door.client.request(method, one, headers=theirs) for one in (place, unknown)]
        first, second = (check_problem(a, 404, p) for a, p in zip(answers, (place, unknown), strict=True))
        assert first["detail"] == second["detail"]
    check_problem(send(door, theirs, job_id, {0: MANUAL}), 404, f"{path}/files")
    assert door.client.get("/rag/jobs", headers=theirs).json() == {"jobs": [], "next": None}
    assert door.client.get(f"/rag/jobs?after={job_id}", headers=theirs).json() == {"jobs": [], "next": None}
    assert files_of(door, headers, job_id)[0]["state"] == "expected"


def test_who_only_reads_cannot_write(door: Door, headers: dict[str, str]) -> None:
    job_id = announce(door, headers, about("a.md", MANUAL)).json()["job_id"]
    reader, path = door.headers("default", "reader", "documents:read"), f"/rag/jobs/{job_id}"
    check_problem(announce(door, reader, about("a.md", MANUAL)), 403, "/rag/jobs")
    check_problem(send(door, reader, job_id, {0: MANUAL}), 403, f"{path}/files")
    check_problem(door.client.delete(path, headers=reader), 403, path)
    assert door.client.get(path, headers=reader).status_code == 200


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"digest": "z" * 32}, 422), ({"digest": "0" * 31}, 422), ({"digest": "A" * 32}, 422), ({"digest": None}, 422),
        ({"size": -1}, 422), ({"size": 10**30}, 422), ({"size": 2**63}, 422), ({"size": 1.5}, 422),
        ({"filename": ""}, 422), ({"filename": "  "}, 422), ({"filename": "a\x00b"}, 422),
        ({"filename": "n" * 1025}, 422),
        ({"media_type": "t" * 129}, 422), ({"metadata": [1]}, 422), ({"metadata": {"k": "x" * 20_000}}, 422),
        ({"owner": "me"}, 400),
    ],
)  # fmt: skip
def test_files_that_cannot_be_announced(door: Door, headers: dict[str, str], change: dict, status: int) -> None:
    answer = announce(door, headers, about("good.md", MANUAL), {**about("a.md", MANUAL), **change})
    problem = check_problem(answer, status, "/rag/jobs")
    assert problem["errors"][0]["pointer"].startswith("/files/1/")
    assert door.client.get("/rag/jobs", headers=headers).json()["jobs"] == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"files": []}, 422), ({}, 422), ({"files": None}, 422), ({"files": [1]}, 422), ([], 422),
        ({"files": [about("a.md", MANUAL)], "collection": "../x"}, 422), ({"files": [], "x": 1}, 400),
    ],
)  # fmt: skip
def test_jobs_that_cannot_be_announced(door: Door, headers: dict[str, str], body: object, status: int) -> None:
    check_problem(door.client.post("/rag/jobs", json=body, headers=headers), status, "/rag/jobs")


@pytest.mark.parametrize(
    ("field", "status"), [("-1", 422), ("1.5", 422), ("first", 422), ("", 422), ("7", 404), (HUGE, 422), ("²", 422)]
)
def test_numbers_that_are_no_file_of_the_job(door: Door, headers: dict[str, str], field: str, status: int) -> None:
    job_id = announce(door, headers, about("a.md", MANUAL)).json()["job_id"]
    answer = send(door, headers, job_id, {0: MANUAL, field: MANUAL})
    if field:
        check_problem(answer, status, f"/rag/jobs/{job_id}/files")
    else:  # a part without a name is no form
        assert answer.status_code in (400, 422)
    assert files_of(door, headers, job_id)[0]["state"] == "expected"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "application/json", 415), (b"text", "text/plain", 415), (b"", "", 415),
        (b"--x", "multipart/form-data", 400), (b"nothing", "multipart/form-data; boundary=x", 400),
        (b'--x\r\nContent-Disposition: form-data; name="0"\r\n\r\ntext\r\n--x--\r\n',
         "multipart/form-data; boundary=x", 422),
    ],
)  # fmt: skip
def test_bodies_that_are_no_files(door: Door, headers: dict[str, str], content: bytes, kind: str, status: int) -> None:
    job_id = announce(door, headers, about("a.md", MANUAL)).json()["job_id"]
    path = f"/rag/jobs/{job_id}/files"
    answer = door.client.put(path, content=content, headers={**headers, "content-type": kind})
    check_problem(answer, status, path)


@pytest.mark.parametrize(
    ("method", "place", "status"),
    [
        ("POST", "/files/-1/retry", 422), ("POST", "/files/7/retry", 404), ("POST", f"/files/{HUGE}/retry", 422),
        ("POST", "/files/first/retry", 422), ("POST", "/files/0/retry", 409), ("GET", "?after=-2", 422),
        ("GET", "?limit=-1", 422), ("GET", "?limit=10001", 422), ("GET", f"?after={HUGE}", 422),
        ("GET", "?state=nonsense", 200),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_meant(
    door: Door, headers: dict[str, str], method: str, place: str, status: int
) -> None:
    job_id = announce(door, headers, about("a.md", MANUAL)).json()["job_id"]
    path = f"/rag/jobs/{job_id}{place}"
    answer = door.client.request(method, path, headers=headers)
    if status == 200:
        assert (answer.status_code, answer.json()["files"], answer.json()["next"]) == (200, [], None)
    else:
        check_problem(answer, status, path.partition("?")[0])


@pytest.mark.parametrize("query", ["state=nonsense", "limit=0", "limit=1001", f"after={'x' * 65}", "limit=ten"])
def test_lists_that_cannot_be_meant(door: Door, headers: dict[str, str], query: str) -> None:
    check_problem(door.client.get(f"/rag/jobs?{query}", headers=headers), 422, "/rag/jobs")


def test_a_full_disk_is_507_and_nothing_was_accepted(
    door: Door, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every connection that the gateway's threads make may grow the file by nothing."""
    connect = door.lent.jobs._connect

    def full() -> object:
        db = connect()
        db.execute("PRAGMA max_page_count = 1")  # SQLite makes of it what the file has now
        return db

    with monkeypatch.context() as patched:
        patched.setattr(door.lent.jobs, "_connect", full)
        body = {"filename": "a.md", "content": MANUAL * 5000}
        answer = door.client.post("/rag/add_document", content=json.dumps(body), headers=headers | {
            "content-type": "application/json"})  # fmt: skip
        assert check_problem(answer, 507, "/rag/add_document")["code"] == "storage_full"
        assert door.client.get("/rag/jobs", headers=headers).json()["jobs"] == []


# ── the command line ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def add_as_ann(door: Door, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`nexus add` with these arguments, at this door and with a key of ann's."""
    ann = door.headers("acme", "ann")

    def request(self: client.Client, method: str, path: str, **arguments: object) -> Response:
        answer: Response = door.client.request(method, path, headers=ann, **arguments)
        if answer.is_error:
            raise client._error(answer)
        return answer

    monkeypatch.setattr(client.Client, "_request", request)
    return lambda *arguments: CliRunner().invoke(cli.app, ["add", "--json", *map(str, arguments)])


def readers_seen(door: Door, who: str) -> list[list[str]]:
    listed = door.client.get("/rag/documents", headers=door.headers("acme", who)).json()["documents"]
    return [document["readers"] for document in listed]


def test_the_command_line_says_for_whom_documents_are(
    door: Door, add_as_ann: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "manuals"
    folder.mkdir()
    for name in ("a.md", "b.md"):
        (folder / name).write_text(MANUAL)
    limited = ["ann", "ben", "cas"]
    assert add_as_ann(folder, "--readers", "ben, cas").exit_code == 0
    assert [readers_seen(door, who) for who in ("ben", "dan")] == [[limited] * 2, []]
    again = json.loads(add_as_ann(folder).stdout)
    assert again["counts"] == {"unchanged": 2} and readers_seen(door, "ben") == [limited] * 2
    add_as_ann(folder / "a.md", "--readers", "dan")
    assert [sorted(readers_seen(door, who)) for who in ("ben", "dan")] == [[limited], [["ann", "dan"]]]
    assert add_as_ann(folder, "--everybody").exit_code == 0
    assert [readers_seen(door, who) for who in ("ben", "dan")] == [[[], []]] * 2


@pytest.mark.parametrize(
    "readers",
    [("--readers", ""), ("--readers", " "), ("--readers", "ann,,ben"), ("--readers", "ann", "--everybody"),
     ("--readers", "x" * 256), ("--readers", "a\tb")],
    ids=["empty", "blank", "a gap", "both", "too long", "a tab"],
)  # fmt: skip
def test_readers_without_a_name_open_nothing(
    door: Door, add_as_ann: Callable[..., Result], tmp_path: Path, readers: tuple[str, ...]
) -> None:
    """`--readers "$TEAM"` with nothing in it must not be everybody."""
    (tmp_path / "a.md").write_text(MANUAL)
    assert isinstance(add_as_ann(tmp_path / "a.md", *readers).exception, InvalidRequest)
    assert readers_seen(door, "ann") == []
