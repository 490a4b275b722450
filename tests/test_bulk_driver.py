"""What a bulk run says of itself, in a process of its own: `ray.serve` cannot be imported in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

CHILD = """
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import typer

from deployments import bulk
from nexus.audit_reading import read
from nexus.config import Config
from nexus.coordination import Alone
from nexus.jobs import Jobs, Outcome
from nexus.types import Principal

home = Path(sys.argv[1])
said, beaten = threading.Semaphore(0), threading.Event()


def is_said_thrice():
    for _ in range(3):
        assert said.acquire(timeout=30), "nobody says that the run works"


class Coordinator(Alone):
    def stay(self, worker):
        super().stay(worker)
        said.release()


class Slow(Jobs):
    def accept(self, *arguments, **named):
        is_said_thrice()
        return super().accept(*arguments, **named)

    def beat_job(self, job_id):
        assert beaten.wait(30)


def ingest(run, jobs, tasks, show):
    is_said_thrice()
    assert coordinator.working() == jobs.holders() != set()
    beaten.set()
    outcomes = [Outcome(task.job_id, task.number, "failed", "parse") for task in tasks]
    jobs.settle(outcomes)
    return outcomes


coordinator = Coordinator()
bulk.BEAT_SECONDS = 0.01
bulk.Coordination, bulk.Jobs, bulk._ingest = lambda: coordinator, Slow, ingest
bulk.load_config = lambda: Config(home=home)
bulk._connected = lambda config: nullcontext("")
bulk._plan = lambda *_: SimpleNamespace(accepted_at=0)
bulk._find_unchanged = lambda *_: {}
bulk._seen_by = lambda *_: frozenset()
bulk._prune = lambda *_: ["gone.md"]
try:
    bulk.main([str(home.parent / "note.md")], collection="default", prune=True, tenant="acme", as_json=False)
except typer.Exit:
    pass
assert coordinator.working() == set()
begun, ended = read(home)
assert (begun["kind"], begun["action"], begun["verdict"]) == ("command", "deployments.bulk", "begun")
assert begun["objects"] == ["tenant acme", "collection default", "--prune"] and ended["verdict"] == "done"
(job,) = Jobs(home).recent(Principal("acme", "bulk", bulk.PERMISSIONS), None, None, 10)
assert ended["objects"] == [*begun["objects"], job.job_id, "gone.md"]
print("all was as it should be")
"""

REFUSED = """
import json
import sys

from deployments import bulk
from nexus.errors import InvalidRequest

said = {}
for name in ("with a space", "n" * 65, "", "é"):
    try:
        bulk.app([sys.argv[1], "-c", name], standalone_mode=False)
    except InvalidRequest as error:
        said[name] = error.message
print(json.dumps(said))
"""


def run(*command: str, home: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "NEXUS_HOME": str(home)}, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_run_is_known_to_work_while_it_is_accepted_and_while_the_list_of_jobs_is_busy(tmp_path: Path) -> None:
    """Both may take longer than a lease: a million files, or somebody else's million."""
    (tmp_path / "note.md").write_text("a note")
    (home := tmp_path / "home").mkdir()
    done = run("-c", CHILD, str(home), home=home)
    assert done.stdout.endswith("all was as it should be\n"), done.stderr


def test_a_collection_that_nobody_could_ask_is_refused(tmp_path: Path) -> None:
    """All in one process: it takes seconds to start."""
    done = run("-c", REFUSED, str(tmp_path), home=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == 4
    for name, error in said.items():
        assert "collection's name" in error, name
