"""`serve deploy` of the file that ships, on a Ray head that is there: Nexus answers, and through Caddy as well."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from cluster import bootstrap
from nexus.config import load_config
from tests.running import ROOT, Running, free_port, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Ray's head alone, in a home with settings, and nothing of Nexus on it."""
    running = Running(tmp_path / "home", free_port())
    running.home.mkdir(mode=0o700)
    settings = {"http": {"port": running.port}, "ray": {"dashboard_port": 0}}
    (running.home / "nexus.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("NEXUS_HOME", str(running.home))
    config = load_config()
    bootstrap.prepare_home(running.home)
    try:
        bootstrap.start_head(config)
        yield running
    finally:
        bootstrap.stop(running.home)


def serve_deploy(running: Running, file: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": bootstrap.ray_token(running.home)}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "serve"), "deploy", str(file), "--address", running.instance.dashboard],
        cwd=ROOT, env={**running.environment, **token}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@contextmanager
def caddy(running: Running, folder: Path) -> Iterator[str]:
    """The proxy with the file that ships, but for its ports; its address."""
    site, tls = free_port(), free_port()
    text = (ROOT / "deployments" / "compose" / "Caddyfile").read_text()
    for shipped, here in (("8080", site), ("8443", tls), ("127.0.0.1:8000", f"127.0.0.1:{running.port}")):
        assert shipped in text
        text = text.replace(shipped, str(here))
    (folder / "Caddyfile").write_text(text)
    url = f"http://localhost:{site}"
    environment = {"NEXUS_SITE": url, "NEXUS_EMAIL": "nobody@localhost", "HOME": str(folder)}
    with (folder / "caddy.log").open("wb") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "caddy"), "run", "--config", str(folder / "Caddyfile")],
            env={**environment, "PATH": os.environ["PATH"]}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        until(60, lambda: httpx.get(f"{url}/livez", trust_env=False, timeout=10).status_code == 200)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_the_file_for_serve_deploys_nexus(head: Running, tmp_path: Path) -> None:
    shipped = yaml.safe_load((ROOT / "deployments" / "serve.yaml").read_text())
    shipped["http_options"]["port"] = head.port
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(shipped))
    serve_deploy(head, file)
    until(400, lambda: httpx.get(f"{head.url}/readyz", trust_env=False, timeout=10).status_code == 200)

    made = head.json("key", "create", "ops")
    (head.home / "admin-key").write_text(made["key"])
    with head.http() as http:
        note = {"filename": "note.md", "content": "# Bay 3\n\nAnn looks after bay 3."}
        assert http.post("/rag/add_document", json=note).status_code == 201
        answer = http.post("/rag/query", json={"query": "Who looks after bay 3?"}).json()
    assert "Ann" in answer["response"] and answer["sources"]

    with caddy(head, tmp_path) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as front:
        assert [front.get(path).status_code for path in ("/metrics", "/-/routes", "/rag/documents")] == [404, 404, 401]
        front.headers["authorization"] = f"Bearer {head.key}"
        question = {"role": "user", "content": "Who looks after bay 3?"}
        streamed = front.post(
            "/v1/chat/completions", json={"model": "nexus-rag", "messages": [question], "stream": True}
        )
        assert streamed.status_code == 200 and streamed.text.rstrip().endswith("data: [DONE]")
    assert head.key not in (tmp_path / "caddy.log").read_text()

    before = {process.pid for process in head.processes("ray::ServeReplica:nexus")}
    serve_deploy(head, file)
    until(60, lambda: httpx.get(f"{head.url}/readyz", trust_env=False, timeout=10).status_code == 200)
    assert before and {process.pid for process in head.processes("ray::ServeReplica:nexus")} == before
