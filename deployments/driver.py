"""A process of ours that speaks to the running cluster as a driver of its own."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import bootstrap
from cluster.bootstrap import Instance
from nexus.config import Config
from nexus.errors import Unavailable


def become_driver(config: Config, module: str, arguments: Sequence[str]) -> Instance:
    """The Nexus that runs here, once this process has the environment that Ray reads as it is imported.

    Where it has not, it begins anew with it, as this module with these arguments. Raises Unavailable.
    """
    instance = bootstrap.find_instance(Path(config.home))
    if instance is None or not bootstrap.processes_of(instance):
        raise Unavailable("no Nexus runs here; `nexus up` starts one")
    environment = bootstrap.driver_environment(config, instance)
    if not environment.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, **environment})
    return instance
