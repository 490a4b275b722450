"""`ray start`, for a raylet that does not wait for its dashboard agent.

Ray's own raylet waits 15 s for the agent to write down where it listens, and then ends itself. On a busy machine no
agent starts in that time, and none does when all begins anew: https://github.com/ray-project/ray/issues/65983. Whoever
starts a node here chose that port. Ray tells the agent alone; here the raylet, which has an option for it, is told.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ray._private import ray_constants, services
from ray.scripts.scripts import cli

PORT = "--dashboard-agent-listen-port="  # as `ray start` has it


def telling(start: Callable[..., Any], port: str) -> Callable[..., Any]:
    """Ray's `start_ray_process`, with a raylet that knows the agent's port."""

    def start_process(command: Sequence[str], process_type: str, *arguments: Any, **named: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_RAYLET:
            command = [*command, f"--dashboard_agent_listen_port={port}"]
        return start(command, process_type, *arguments, **named)

    return start_process


if __name__ == "__main__":
    (port,) = (word.removeprefix(PORT) for word in sys.argv if word.startswith(PORT))
    services.start_ray_process = telling(services.start_ray_process, port)
    cli()
