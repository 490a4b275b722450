"""Bring the application up on a Ray head, and wait until it answers."""

import time
import urllib.error
import urllib.request
from pathlib import Path

from cluster import bootstrap
from cluster.bootstrap import Instance
from deployments.app import APPLICATION, build
from nexus.config import Config
from nexus.errors import Unavailable


def bring_up(config: Config, wait_seconds: float) -> Instance:
    """Head, Serve, application, ready. On failure everything started is stopped again."""
    instance = bootstrap.start_head(config)
    try:
        _deploy(config, instance)
        await_ready(instance.url, wait_seconds)
    except BaseException:
        bootstrap.stop(Path(config.home))
        raise
    return instance


def _deploy(config: Config, instance: Instance) -> None:
    import ray
    from ray import serve

    ray.init(address=instance.ray_address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": config.http.host, "port": config.http.port, "keep_alive_timeout_s": 90},
        )
        serve.run(build(config, instance.vectors_port), name=APPLICATION, route_prefix="/", blocking=False)
    finally:
        ray.shutdown()


def is_ready(url: str) -> bool:
    """Does `/readyz` say 200?"""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=6) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def await_ready(url: str, seconds: float) -> None:
    """Return once `/readyz` says 200. Raises Unavailable when it does not in time."""
    deadline = time.monotonic() + seconds
    while not is_ready(url):
        if time.monotonic() > deadline:
            raise Unavailable(f"{url}/readyz was not ready within {seconds:.0f} s; `nexus status` says which part is missing")
        time.sleep(0.2)
