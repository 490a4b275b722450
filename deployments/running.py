"""Bring the application up on a Ray head, and wait until it answers."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from cluster import bootstrap
from cluster.bootstrap import Instance
from nexus.config import Config
from nexus.errors import NexusError, Unavailable


def bring_up(config: Config, config_file: Path | None, wait_seconds: float) -> Instance:
    """Head, Serve, application, ready. On failure everything started is stopped again."""
    deadline = time.monotonic() + wait_seconds
    instance, environment = bootstrap.start_head(config)
    try:
        _deploy(config, instance, environment, config_file, deadline)
        await_ready(instance.url, deadline)
    except (NexusError, KeyboardInterrupt):
        bootstrap.stop(Path(config.home))
        raise
    return instance


def _deploy(
    config: Config, instance: Instance, environment: dict[str, str], config_file: Path | None, deadline: float
) -> None:
    """In a process of its own: it needs the head's environment, and `ray.init` may wait for ever."""
    log_file = Path(config.home) / "logs" / "deploy.log"
    command = [sys.executable, "-m", "deployments.app", instance.ray_address, str(instance.vectors_port)]
    if config_file is not None:
        command.append(str(config_file.absolute()))
    with log_file.open("wb") as log:
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
                timeout=max(1.0, deadline - time.monotonic()),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the application was not deployed in time; {log_file} says how far it came") from None
    if done.returncode:
        lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
        raise Unavailable(
            f"the application was not deployed ({lines[-1] if lines else 'no reason given'}); see {log_file}"
        )


def is_ready(url: str) -> bool:
    """Does `/readyz` say 200?"""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=6) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def await_ready(url: str, deadline: float) -> None:
    """Return once `/readyz` says 200. Raises Unavailable when it does not by the deadline (monotonic seconds)."""
    while not is_ready(url):
        if time.monotonic() > deadline:
            raise Unavailable(f"{url}/readyz is not ready yet; `nexus status` says which part is missing")
        time.sleep(0.2)
