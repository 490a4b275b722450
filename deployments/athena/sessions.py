"""Sessions: what one was told, more of that, and questions that are answered with it."""

import streamlit as st

from deployments.athena import page
from deployments.athena.answer import Turn, new_turn, show_turn, stream
from deployments.athena.client import Nexus
from deployments.athena.text import show

MOST_CHARACTERS = 100_000


def draw() -> None:
    """The page."""
    nexus = page.nexus()
    page.begin("Sessions", "What a session was told, and questions that are answered with it.")
    with page.asking(), st.container(horizontal=True):
        session = _choose()
        collection = page.choose_collection("session-collection") or "default"
    if not session:
        page.empty("No session is open", "Type the name of one above. A new name begins a new session.")
        return
    with page.asking():
        context = nexus.context_of(session)
        page.remember_session(session)
        _show_context(nexus, session, context)
        _offer_telling(nexus, session)
    turns: list[Turn] = st.session_state.setdefault(f"session-turns-{session}", [])
    question = st.chat_input("Ask with this context", submit_mode="stop", max_chars=8192)
    for number, turn in enumerate(turns):
        show_turn(nexus, turn, number)
    if question:
        turns.append(new_turn(question, collection))
        stream(turns[-1], nexus.ask_within(session, question, collection))
        st.rerun()


def _choose() -> str:
    known: list[str] = st.session_state.setdefault("sessions", [])
    chosen = st.selectbox(
        "Session", known, index=0 if known else None, accept_new_options=True, placeholder="its name",
        help="Those that were opened here before are in the list.",
    )  # fmt: skip
    return (chosen or "").strip()


def _show_context(nexus: Nexus, session: str, context: str) -> None:
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown("**Context**", width="stretch")
            st.caption(f"{len(context)} characters", width="content")
            with st.popover("Clear", icon=":material/delete:", type="tertiary", disabled=not context):
                st.markdown("What this session was told is forgotten.")
                if st.button("Clear the session", type="primary"):
                    with page.asking():
                        nexus.clear(session)
                    st.rerun()
        if context:
            with st.container(height=220, border=False):
                show(context)
        else:
            st.caption("This session was told nothing yet.")


def _offer_telling(nexus: Nexus, session: str) -> None:
    with st.form("tell", clear_on_submit=True, border=False):
        told = st.text_area(
            "Tell it more", max_chars=MOST_CHARACTERS, height=80, placeholder="What its answers are to know"
        )
        if st.form_submit_button("Add to the context", icon=":material/add:") and told.strip():
            with page.asking():
                nexus.tell(session, told)
            st.rerun()
