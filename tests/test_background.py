"""What one request begins and others share does not end with it."""

import asyncio
import warnings
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import TaskCancelledError

from nexus.background import begin_in_background, has_failed
from nexus.config import Config
from nexus.errors import Unavailable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `ray.serve` uses what pydantic will remove
    from actors import ingestor
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


class Enforcer:
    """Notes what it is asked for; `enough` is set once that was this much."""

    def __init__(self, most: int) -> None:
        self.asked: list[str] = []
        self._most, self._loop, self.enough = most, asyncio.get_running_loop(), asyncio.Event()

    def _note(self, what: str) -> list[Any]:
        self.asked.append(what)
        if len(self.asked) >= self._most:
            self._loop.call_soon_threadsafe(self.enough.set)
        if len(self.asked) == 2:
            raise Unavailable("a tier is away")
        return []

    def poll(self) -> list[Any]:
        return self._note("poll")

    def run(self) -> list[Any]:
        return self._note("run")


@pytest.mark.parametrize(
    ("every", "asked"),
    [(None, ["poll"] * 6), (25.0, ["poll"] * 4 + ["run"] + ["poll"] * 3 + ["run"])],
)  # fmt: skip
def test_policies_are_carried_out_when_it_is_time_and_tiers_are_asked_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float | None, asked: list[str]
) -> None:
    moments = iter(range(0, 10_000, 10))  # ten seconds pass between two looks at the clock
    monkeypatch.setattr(ingestor, "time", SimpleNamespace(monotonic=lambda: float(next(moments))))
    monkeypatch.setattr(ingestor, "POLL_SECONDS", 0.0)

    async def run() -> list[str]:
        host = Ingestor(Config(home=tmp_path, policies={"every_seconds": every}), "milvus:127.0.0.1:1", Pool())
        enforcer = Enforcer(len(asked))
        keeping = asyncio.create_task(host._keep_policies(enforcer))  # type: ignore[arg-type]
        await enforcer.enough.wait()
        keeping.cancel()
        return enforcer.asked[: len(asked)]

    assert asyncio.run(run()) == asked


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
