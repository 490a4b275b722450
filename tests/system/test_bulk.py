"""Many files at once on a whole Nexus: jobs, bulk runs on Ray Data, and what is left after kills."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

import psutil
import pytest

from cluster import bootstrap
from tests.running import ROOT, Running, running_nexus, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

DAMAGED = {".pdf": b"%PDF-1.7\nnothing that follows is a PDF", ".docx": b"PK\x03\x04 cut short"}


@pytest.fixture(scope="module")
def nexus() -> Iterator[Running]:
    with running_nexus() as running:
        yield running


def write_notes(folder: Path, count: int, sentences: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        facts = " ".join(f"Station {number} keeps {part} spare hinges on shelf {part}." for part in range(sentences))
        (folder / f"{number:04}.md").write_text(f"# Station {number}\n\n{facts}\n")
    return folder


def submit(nexus: Running, *arguments: str) -> "subprocess.Popen[str]":
    """The documented way into the cluster."""
    environment = {
        **nexus.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": bootstrap.ray_token(nexus.home),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", nexus.instance.dashboard,
        "--working-dir", ".", "--", "python", "-m", "deployments.bulk", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def bulk(nexus: Running, *arguments: str) -> dict[str, object]:
    """A bulk run from start to end, without the detour over a job; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "deployments.bulk", *arguments, "--json"], cwd=ROOT, env=nexus.environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sources(nexus: Running, collection: str) -> dict[str, str]:
    """Every document of a collection by name, with its version."""
    found, after = {}, ""
    with nexus.http() as http:
        while after is not None:
            query = {"collection": collection, "limit": 1000, "after": after}
            page = http.get("/rag/documents", params=query).raise_for_status().json()
            found |= {document["source"]: document["version"] for document in page["documents"]}
            after = page["next"]
    return found


def expect_clean(nexus: Running) -> None:
    nexus.must("vacuum")
    assert nexus.json("fsck") == {"clean": True, "faults": []}


def test_of_a_thousand_files_twenty_are_damaged_and_fail_alone(nexus: Running, tmp_path: Path) -> None:
    folder = write_notes(tmp_path / "notes", 980)
    for number in range(20):
        suffix = (".pdf", ".docx")[number % 2]
        (folder / f"damaged{number}{suffix}").write_bytes(DAMAGED[suffix] + bytes([number]))
    added = nexus.json("add", str(folder), "-c", "thousand")
    assert added["counts"] == {"added": 980, "failed": 20}
    assert all(one["reason"] and one["stage"] == "parse" for one in added["files"] if one["outcome"] == "failed")
    with nexus.http() as http:
        job = http.get(f"/rag/jobs/{added['job_id']}").raise_for_status().json()
        failed = http.get(f"/rag/jobs/{added['job_id']}", params={"state": "failed"}).json()["files"]
    assert (job["state"], job["counts"], job["progress"]) == ("done", {"done": 980, "failed": 20}, 1.0)
    assert len(failed) == 20
    assert nexus.json("search", "spare hinges of station 17", "-c", "thousand")["hits"]
    expect_clean(nexus)


def test_a_second_time_nothing_is_done_and_of_few_changes_only_those(nexus: Running, tmp_path: Path) -> None:
    folder = write_notes(tmp_path / "notes", 300)
    assert nexus.json("add", str(folder), "-c", "synced")["counts"] == {"added": 300}
    before = sources(nexus, "synced")
    with nexus.http() as http:
        sequence = http.post("/rag/search", json={"query": "hinges", "collection": "synced"}).json()["sequence"]
        chunks = http.get("/metrics").text.split("ingest_chunks_total ")[1].split()[0]
    assert nexus.json("add", str(folder), "-c", "synced")["counts"] == {"unchanged": 300}
    assert bulk(nexus, str(folder), "-c", "synced")["counts"] == {"unchanged": 300}
    with nexus.http() as http:
        assert http.post("/rag/search", json={"query": "hinges", "collection": "synced"}).json()["sequence"] == sequence
        assert http.get("/metrics").text.split("ingest_chunks_total ")[1].split()[0] == chunks
    for number in (3, 5, 7):
        (folder / f"{number:04}.md").write_text(f"# Station {number}\n\nIt was closed down.\n")
    for number in (11, 13):
        (folder / f"{number:04}.md").unlink()
    (folder / "0017.md").rename(folder / "seventeen.md")
    assert bulk(nexus, str(folder), "-c", "synced", "--prune")["counts"] == {"added": 4, "removed": 3, "unchanged": 294}
    after = sources(nexus, "synced")
    changed = {Path(name).name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {*(f"{number:04}.md" for number in (3, 5, 7, 11, 13, 17)), "seventeen.md"}
    expect_clean(nexus)


def test_a_submitted_job_reports_each_bad_file_and_leaves_no_trace_of_it(nexus: Running, tmp_path: Path) -> None:
    folder = write_notes(tmp_path / "notes", 20)
    (folder / "damaged.pdf").write_bytes(DAMAGED[".pdf"])
    (folder / "empty.txt").write_bytes(b"")
    with submit(nexus, str(folder), "-c", "submitted") as job:
        printed, _ = job.communicate(timeout=300)
    assert job.returncode != 0, "a file failed"
    assert "20 added, 2 failed in 'submitted'" in printed and "damaged.pdf (parse)" in printed
    assert {Path(name).suffix for name in sources(nexus, "submitted")} == {".md"}
    with submit(nexus, "/nowhere/at/all") as job:
        printed, _ = job.communicate(timeout=300)
    assert job.returncode != 0 and "no file or folder" in printed and "Traceback" not in printed


@pytest.mark.parametrize("victim", ["driver", "Embed", "Commit", "nexus:vectors"])
def test_a_kill_during_a_bulk_run_costs_little_and_loses_nothing(nexus: Running, tmp_path: Path, victim: str) -> None:
    collection = f"killed-{victim.replace(':', '-')}"
    folder = write_notes(tmp_path / "notes", 130, sentences=40)
    command = [sys.executable, "-m", "deployments.bulk", str(folder), "-c", collection]
    with subprocess.Popen(
        command, cwd=ROOT, env=nexus.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as run:
        until(120, lambda: len(sources(nexus, collection)) > 20, longest_pause=0.1)
        if victim == "driver":
            run.kill()
        else:
            (process,) = nexus.processes(victim)
            os.kill(process.pid, SIGKILL)
        run.communicate(timeout=300)
    assert run.returncode == (-SIGKILL if victim == "driver" else 0), "it goes on without the part that died"
    done = len(sources(nexus, collection))
    again = bulk(nexus, str(folder), "-c", collection)
    assert again["counts"].get("unchanged", 0) == done, "what was done is not done again"
    assert sum(again["counts"].values()) == len(sources(nexus, collection)) == 130
    expect_clean_but_running(nexus)


def expect_clean_but_running(nexus: Running) -> None:
    """A dead driver's job is ended once its lease is over; until then it may be named."""
    nexus.must("vacuum")
    faults = nexus.json("fsck")["faults"]
    assert [fault for fault in faults if fault["fault"] != "jobs that nobody works on"] == []


def test_after_everything_was_killed_an_accepted_job_ends_by_itself(nexus: Running, tmp_path: Path) -> None:
    folder = write_notes(tmp_path / "notes", 200, sentences=40)
    adding = subprocess.Popen(
        [sys.executable, "-m", "deployments.cli", "add", str(folder), "-c", "survives"], cwd=ROOT,
        env=nexus.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(60, lambda: 20 < len(sources(nexus, "survives")) < 150, longest_pause=0.1)
    everything = [*bootstrap.processes_of(nexus.instance), psutil.Process(adding.pid)]
    for blow in (psutil.Process.suspend, psutil.Process.kill):  # all at once: none lives to see another die
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                blow(process)
    adding.wait()
    nexus.must("up")  # a run that crashed never blocks the next
    assert nexus.must("status").startswith("Nexus is ready")
    (job,) = [job for job in nexus.json("jobs")["jobs"] if job["collection"] == "survives"]
    with nexus.http() as http:
        until(120, lambda: http.get(f"/rag/jobs/{job['job_id']}").raise_for_status().json()["state"] == "done")
    assert nexus.json("jobs", job["job_id"])["counts"] == {"done": 200}
    assert len(sources(nexus, "survives")) == 200
    with nexus.http() as http:  # the jobs of drivers killed before are ended, too
        until(90, lambda: http.post("/rag/fsck").raise_for_status().json()["clean"])


def test_a_deleted_text_is_found_nowhere_after_vacuum(nexus: Running, tmp_path: Path) -> None:
    canary, other = "xylomancy-4417", "brontide-9023"
    note = tmp_path / "note.md"
    note.write_text(f"# Access\n\nThe word of the day is {other}.\n")
    nexus.must("add", str(note), "-c", "secret")
    note.write_text(f"# Access\n\nThe word of the day is {canary}. See also station 5.\n")
    nexus.must("add", str(note), "-c", "secret")
    question = {"query": f"word of the day {canary} {other}", "collection": "secret", "explain": True, "graph": "on"}
    with nexus.http() as http:
        assert canary in http.post("/rag/search", json=question).text.replace(question["query"], "")
        assert other in http.post("/rag/search", json={**question, "as_of": 1}).text
    removed = nexus.json("remove", str(note))
    document_id, sequence = removed["document_id"], removed["sequence"]
    nexus.must("vacuum")
    with nexus.http() as http:
        answers = [
            http.post("/rag/search", json={**question, "as_of": moment} if moment is not None else question)
            for moment in (None, *range(sequence + 1))
        ]
        answers += [
            http.post("/rag/query", json={**question, "session_id": "s"}),
            http.post("/mcp/s/query", json={"input": question["query"], "collection": "secret"}),
            http.get("/mcp/s/get_context"),
            http.get("/rag/documents", params={"collection": "secret"}),
            http.get(f"/rag/documents/{document_id}"),
            http.get("/rag/jobs"),
            http.get("/metrics"),
            http.post("/v1/chat/completions", json={
                "model": "nexus-rag/secret", "messages": [{"role": "user", "content": "What is the word of the day?"}],
            }),
        ]  # fmt: skip
        jobs = http.get("/rag/jobs").json()["jobs"]
        answers += [http.get(f"/rag/jobs/{job['job_id']}") for job in jobs if job["collection"] == "secret"]
        (receipt,) = http.get(f"/rag/deletions/{document_id}").json()["deletions"]
    for answer in answers:
        text = answer.text.replace(json.dumps(question["query"]), "")
        assert canary not in text and other not in text, answer.request.url
    assert receipt["purged_at"] and receipt["purged"] == {
        "document store": {"versions": 2, "chunks": 2}, "vector store": {"vectors": 2}
    }  # fmt: skip
