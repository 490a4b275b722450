"""What one request begins and others share does not end with it."""

import asyncio
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import TaskCancelledError

from nexus.background import begin_in_background, has_failed
from nexus.config import Config
from nexus.errors import Unavailable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `ray.serve` uses what pydantic will remove
    from actors.ingestor import Ingestor
    from deployments.remote import Remote

REQUEST: ContextVar[str] = ContextVar("REQUEST", default="none")  # as Serve keeps it


class Pool:
    """Embedders of which the first call is cancelled, as Serve does to calls of a request that was given up."""

    def __init__(self) -> None:
        self.asked_by: list[str] = []

    async def describe(self) -> dict[str, object]:
        self.asked_by.append(REQUEST.get())
        if len(self.asked_by) == 1:
            raise asyncio.CancelledError
        raise Unavailable("the embedder loads its model")

    async def embed(self, texts: Any) -> Any:
        raise AssertionError


def test_an_opening_that_was_cancelled_is_begun_again(tmp_path: Path) -> None:
    pool = Pool()

    async def run() -> None:
        ingestor = Ingestor(Config(home=tmp_path), "milvus:127.0.0.1:1", pool)
        REQUEST.set("the first")
        with pytest.raises(asyncio.CancelledError):
            await ingestor.ready()
        REQUEST.set("the second")
        with pytest.raises(Unavailable, match="loads its model"):
            await ingestor.ready()

    asyncio.run(run())
    assert pool.asked_by == ["none", "none"]  # on behalf of no request: the opening is everybody's


def test_a_call_that_serve_cancelled_can_be_made_again() -> None:
    class Handle:
        async def _cancelled(self) -> None:
            raise TaskCancelledError  # of which Serve makes its own kind

        @property
        def ready(self) -> Any:
            handle = self

            class Method:
                def remote(self) -> Any:
                    return handle._cancelled()

            return Method()

    with pytest.raises(Unavailable, match="try again"):
        asyncio.run(Remote(Handle()).ready())  # type: ignore[arg-type]


def test_who_has_failed() -> None:
    async def run() -> None:
        async def give(error: BaseException | None) -> None:
            if error is not None:
                raise error

        for error, expected in [(None, False), (ValueError(), True), (asyncio.CancelledError(), True)]:
            task = begin_in_background(give(error))
            assert not has_failed(task)  # not yet
            await asyncio.wait({task})
            assert has_failed(task) is expected

    asyncio.run(run())
