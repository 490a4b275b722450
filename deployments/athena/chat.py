"""Chat: a conversation with the documents, kept in this page or in a session."""

import streamlit as st

from deployments.athena import page
from deployments.athena.answer import Turn, new_turn, show_turn, stream
from deployments.athena.client import Nexus

MOST_TURNS = 20  # of a conversation that go with a question


def draw() -> None:
    """The page."""
    nexus = page.nexus()
    page.begin("Chat", "Ask your documents. Every answer shows what it rests on.")
    with page.asking(), st.container(horizontal=True, vertical_alignment="bottom"):
        collection = page.choose_collection("chat-collection") or "default"
        session = st.text_input(
            "Session", key="chat-session", placeholder="none", max_chars=128,
            help="The name of a session: answers know what it was told, and it is told what is said here.",
        ).strip()  # fmt: skip
        st.button("New chat", icon=":material/add:", on_click=_turns().clear)
    question = st.chat_input("Ask your documents", submit_mode="stop", max_chars=8192)
    if not _turns() and not question:
        page.empty("Nothing was asked yet", "Type a question below. *Upload* takes the documents that answer it.")
    for number, turn in enumerate(_turns()):
        show_turn(nexus, turn, number)
    if question:
        _ask(nexus, question, collection, session)


def _turns() -> list[Turn]:
    turns: list[Turn] = st.session_state.setdefault("turns", [])
    return turns


def _ask(nexus: Nexus, question: str, collection: str, session: str) -> None:
    before = [message for turn in _turns()[-MOST_TURNS:] if turn["text"] for message in _messages(turn)]
    turn = new_turn(question, collection)
    _turns().append(turn)
    if session:
        page.remember_session(session)
        stream(turn, nexus.ask_within(session, question, collection))
    else:
        stream(turn, nexus.chat([*before, {"role": "user", "content": question}], collection))
    if session and turn["answer"] is not None:
        with page.asking():
            nexus.tell(session, f"user: {question}\nassistant: {turn['text']}")
    st.rerun()


def _messages(turn: Turn) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn["question"]}, {"role": "assistant", "content": turn["text"]}]
