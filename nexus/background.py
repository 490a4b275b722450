"""Work that is begun within a request and shared, or goes on after it."""

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

Result = TypeVar("Result")


def begin_in_background(work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
    """A task in a context of its own, so that it does not end with the request that began it.

    Ray and Serve keep in the context which request a call belongs to: with a request that is cancelled, all calls made
    on its behalf are, too, by whatever task.
    """
    return asyncio.create_task(work, context=Context())


def has_failed(task: "asyncio.Task[Any]") -> bool:
    """Whether it ended without a result."""
    return task.done() and (task.cancelled() or task.exception() is not None)
