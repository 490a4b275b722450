"""Session contexts: what a conversation has been told, kept by tenant and session id."""

import re
from dataclasses import dataclass

from nexus.errors import InvalidRequest, TooLarge
from nexus.ports import DocumentStore
from nexus.types import Principal

SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,127}")
MAX_CONTENT_CHARACTERS = 100_000
MAX_CONTEXT_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Sessions:
    """Contexts in a document store. Another tenant's session of the same name is another session."""

    documents: DocumentStore

    def add_context(self, principal: Principal, session_id: str, content: str) -> None:
        """Append to the context. Raises InvalidRequest, TooLarge."""
        check_session_id(session_id)
        if not content.strip():
            raise InvalidRequest("the content is empty", pointer="/content")
        if len(content) > MAX_CONTENT_CHARACTERS:
            raise TooLarge(f"a context entry has at most {MAX_CONTENT_CHARACTERS} characters", pointer="/content")
        if len(self.context(principal, session_id)) + len(content) > MAX_CONTEXT_CHARACTERS:
            raise TooLarge(f"the context of a session has at most {MAX_CONTEXT_CHARACTERS} characters; clear it first")
        self.documents.add_turn(principal.tenant, session_id, "context", content)

    def context(self, principal: Principal, session_id: str) -> str:
        """All that was added, in order, a line break between entries; empty for a new session."""
        check_session_id(session_id)
        return "\n".join(content for _, content in self.documents.turns(principal.tenant, session_id))

    def clear(self, principal: Principal, session_id: str) -> None:
        check_session_id(session_id)
        self.documents.clear_session(principal.tenant, session_id)


def check_session_id(session_id: str) -> None:
    """Raises InvalidRequest unless this is 1 to 128 of letters, digits and `_ . : -`."""
    if not SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(
            "a session id is 1 to 128 letters, digits, '_', '.', ':' or '-', and begins with a letter or digit",
            pointer="/session_id",
        )
