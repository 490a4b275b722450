"""Session contexts: what a conversation has been told, kept by tenant and session id.

A context that outgrows its budget gives up its oldest entries, until half of the budget is free. As the rules of memory
say (config.Memory), they are dropped at once, or a model puts a summary in their place; while that cannot be had, the
context grows on, up to MAX_CONTEXT_CHARACTERS.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from nexus.config import Memory as Rules
from nexus.errors import InvalidRequest, NexusError, TooLarge
from nexus.ports import DocumentStore
from nexus.summaries import Summarise, gather
from nexus.types import Principal

log = logging.getLogger("nexus.sessions")

SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,127}")
MAX_CONTENT_CHARACTERS = 100_000
MAX_CONTEXT_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Sessions:
    """Contexts in a document store. Another tenant's session of the same name is another session."""

    documents: DocumentStore
    rules: Rules = field(default_factory=Rules)

    def add_context(self, principal: Principal, session_id: str, content: str) -> None:
        """Append to the context. Raises InvalidRequest, TooLarge."""
        check_session_id(session_id)
        if not content.strip():
            raise InvalidRequest("the content is empty", pointer="/content")
        if len(content) > MAX_CONTENT_CHARACTERS:
            raise TooLarge(f"a context entry has at most {MAX_CONTENT_CHARACTERS} characters", pointer="/content")
        turns = self.documents.turns(principal.tenant, session_id)
        if self.rules.compaction == "drop":
            old = choose_old([*turns, ("context", content)], self.rules.session_budget)
            if old:
                self.documents.replace_turns(principal.tenant, session_id, turns[:old], None)
        elif _length(turns) + len(content) > MAX_CONTEXT_CHARACTERS:
            raise TooLarge(f"the context of a session has at most {MAX_CONTEXT_CHARACTERS} characters; clear it first")
        self.documents.add_turn(principal.tenant, session_id, "context", content)

    async def compact(self, principal: Principal, session_id: str, summarise: Summarise) -> None:
        """Where summaries are wanted, put some in the place of the oldest entries of a context over its budget.

        What cannot be summarised stays, and so does all of a context that changed meanwhile. Raises Unavailable.
        """
        if self.rules.compaction == "drop":
            return
        tenant = principal.tenant
        turns = await asyncio.to_thread(self.documents.turns, tenant, session_id)
        old = turns[: choose_old(turns, self.rules.session_budget)]
        try:
            made = [
                await summarise([text for _, text in group], tenant) for group in gather(old, lambda one: len(one[1]))
            ]
        except NexusError as error:
            log.warning("a session is over its budget, and could not be summarised: %s", error.message)
            return
        if old:
            summary = ("summary", "\n".join(made))
            await asyncio.to_thread(self.documents.replace_turns, tenant, session_id, old, summary)

    def context(self, principal: Principal, session_id: str) -> str:
        """All that was added, in order, a line break between entries; empty for a new session."""
        check_session_id(session_id)
        return "\n".join(content for _, content in self.documents.turns(principal.tenant, session_id))

    def clear(self, principal: Principal, session_id: str) -> None:
        check_session_id(session_id)
        self.documents.clear_session(principal.tenant, session_id)


def choose_old(turns: Sequence[tuple[str, str]], budget: int) -> int:
    """How many of the first turns have to go: none within the budget, else so many that the rest is half of it.

    The last turn stays, whatever its length.
    """
    length = _length(turns)
    if length <= budget:
        return 0
    for number, (_, content) in enumerate(turns[:-1], 1):
        length -= len(content) + 1
        if length <= budget // 2:
            return number
    return len(turns) - 1


def _length(turns: Sequence[tuple[str, str]]) -> int:
    return len("\n".join(content for _, content in turns))


def check_session_id(session_id: str) -> None:
    """Raises InvalidRequest unless this is 1 to 128 of letters, digits and `_ . : -`."""
    if not SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(
            "a session id is 1 to 128 letters, digits, '_', '.', ':' or '-', and begins with a letter or digit",
            pointer="/session_id",
        )
