"""What Serve alone costs a request: an ingress that asks one deployment and answers with what that gave back.

`tests.bench.query` puts it beside a Nexus. The settings of Serve are those that Nexus runs under, and no line of Nexus
is on the way.
"""

import subprocess
import sys

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from cluster import bootstrap
from tests.running import ROOT, Running

NAME = "echo"


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
class Back:
    async def give(self, body: bytes) -> bytes:
        return body


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
class Echo:
    def __init__(self, back: DeploymentHandle) -> None:
        self._back = back

    async def __call__(self, request: Request) -> Response:
        return Response(await self._back.give.remote(await request.body()), media_type="application/json")


def start_beside(nexus: Running) -> str:
    """Its path, once it answers there."""
    environment = bootstrap.environment_of_head(nexus.home)
    command = [sys.executable, "-m", "tests.bench.echo", nexus.instance.ray_address]
    subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=True, capture_output=True)
    with nexus.http() as http:
        http.post(f"/{NAME}", json={}).raise_for_status()
    return f"/{NAME}"


def main(ray_address: str) -> None:
    ray.init(address=ray_address, namespace="nexus", log_to_driver=False, logging_level="ERROR")
    serve.run(Echo.bind(Back.bind()), name=NAME, route_prefix=f"/{NAME}")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(*sys.argv[1:])
