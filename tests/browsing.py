"""Athena for tests: its own server over some gateway, and a browser that looks at it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, sync_playwright
from starlette.types import ASGIApp

from deployments.athena.door import make_link
from tests.running import ROOT, free_port, until

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SECRET = "of-a-test"
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: `make browser` installs it, or: apt-get install chromium"
)


@contextmanager
def gateway(app: ASGIApp) -> Iterator[str]:
    """The URL of a front door that listens while the block runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        serving.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            serving.join()


@contextmanager
def athena(nexus_url: str, lent_key: str, log: Path) -> Iterator[str]:
    """The URL of an Athena that lends a key to whoever has a link signed with SECRET."""
    port = free_port()
    told = {"nexus_url": nexus_url, "port": port, "hosts": [], "secret": SECRET, "lent_key": lent_key}
    environment = {**os.environ, "ATHENA_SETTINGS": json.dumps(told)}
    command = [sys.executable, "-m", "deployments.athena.server"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        url = f"http://127.0.0.1:{port}"
        until(60, lambda: httpx.get(f"{url}/_stcore/health").status_code == 200)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window, with nothing of anybody's in it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def link(url: str) -> str:
    return make_link(url, SECRET)
