"""What is asked and answered, kept in memory by itself where `memory.record` says so; else nothing is done here.

It is kept under the name of whoever asked, before the answer's end is sent. That it cannot be kept harms no answer: the
log says so. Of an answer from documents their ids are kept, and none of what they say but what the answer quotes.
"""

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import Request

from deployments.routes.caller import lent
from nexus.errors import NexusError
from nexus.memory import Draft
from nexus.types import Answer, Delta, Principal

log = logging.getLogger("nexus.gateway")


async def remembering_answer(
    request: Request, principal: Principal, stream: AsyncGenerator[str | Answer], user: str | None = None
) -> AsyncGenerator[str | Answer]:
    """The same stream, whose answer is kept."""
    started = time.perf_counter()
    async with aclosing(stream) as items:
        async for item in items:
            if isinstance(item, Answer):
                documents = tuple(dict.fromkeys(source.hit.document_id for source in item.sources))
                draft = Draft(
                    item.query, item.response, documents, item.confidence, lent(request).rag.generator.name,
                    latency_ms=_since(started), user=user,
                    metadata={"abstained": item.abstained, "sequence": item.sequence},
                )  # fmt: skip
                await _keep(request, principal, draft)
            yield item


async def remembering_deltas(
    request: Request, principal: Principal, draft: Draft, stream: AsyncGenerator[Delta]
) -> AsyncGenerator[Delta]:
    """The same generation, which is kept as what this draft was answered, once it has ended."""
    started = time.perf_counter()
    seen: list[Delta] = []
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            seen.append(delta)
            yield delta
    await remember_deltas(request, principal, draft, seen, started)


async def remember_deltas(
    request: Request, principal: Principal, draft: Draft, deltas: Sequence[Delta], started: float
) -> None:
    """Keep a whole generation, its first choice, as what this draft was answered."""
    said = "".join(delta.text for delta in deltas if delta.choice == 0)
    draft = Draft(draft.query, said, model=draft.model, latency_ms=_since(started), user=draft.user)
    await _keep(request, principal, draft)


def _since(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 1)


async def _keep(request: Request, principal: Principal, draft: Draft) -> None:
    here = lent(request)
    if not here.config.memory.record or not draft.response.strip():
        return
    try:
        await here.memory.keep(principal, draft)
    except NexusError as error:
        log.warning("what was answered could not be kept in memory: %s", error.code)
