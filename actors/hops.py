"""A process of its own: what it logs goes where all of Nexus does, and it goes on with the request of who asks.

A method that is called from another process is told, as `of`, which request that is (deployments/remote.py tells it).
Each request has a task of its own there, so what is taken up is never put down.
"""

import inspect
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import ray

from cluster.inventory import NODE_LABEL
from nexus import logs, tracing
from nexus.config import Telemetry
from nexus.tracing import take_up

# Of what Serve itself logs; ours, with a line for each request, is in a file of its own (nexus/logs.py). Serve would
# gather a thousand lines of requests, and write them all while the loop waits.
LOGGING = {"encoding": "JSON", "enable_access_log": False}
Actor = TypeVar("Actor", bound=type)


def begin(role: str, settings: Telemetry | None = None) -> None:
    """Log, and trace, as this role if this is an actor's own process; in another's, as a test, do nothing."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    home = os.environ.get("NEXUS_HOME")
    node = ray.get_runtime_context().get_node_labels().get(NODE_LABEL, "")
    logs.begin(role, Path(home) if home else None, node)
    if settings is not None:
        tracing.begin(settings, role, node)


def hop(actor: Actor) -> Actor:
    """A class whose public coroutines and streams take `of`: what `tracing.carried` gave to whoever calls."""
    for name, method in list(vars(actor).items()):
        if name.startswith("_"):
            continue
        if inspect.isasyncgenfunction(method):
            setattr(actor, name, _streaming(method))
        elif inspect.iscoroutinefunction(method):
            setattr(actor, name, _answering(method))
    return actor


def _answering(method: Any) -> Any:
    @wraps(method)
    async def call(self: Any, *arguments: Any, of: Mapping[str, str] | None = None, **more: Any) -> Any:
        take_up(of or {})
        return await method(self, *arguments, **more)

    return call


def _streaming(method: Any) -> Any:
    @wraps(method)
    async def call(self: Any, *arguments: Any, of: Mapping[str, str] | None = None, **more: Any) -> AsyncGenerator[Any]:
        take_up(of or {})
        async with aclosing(method(self, *arguments, **more)) as items:
            async for item in items:
                yield item

    return call
