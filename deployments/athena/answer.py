"""An answer: as it comes, what it rests on, and why it is that one."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import TypedDict

import streamlit as st

from deployments.athena import page
from deployments.athena.client import Away, Nexus, Page, Refused
from deployments.athena.text import join, label, plain, show, show_answer
from deployments.listing import place_of

DRAW_SECONDS = 0.05  # between two looks of a text that comes
SHOWN_HITS = 12


class Turn(TypedDict):
    """A question and what came of it. `answer` is all that is known of it, None until then."""

    question: str
    collection: str
    text: str
    answer: Page | None
    wrong: str


def new_turn(question: str, collection: str) -> Turn:
    return Turn(question=question, collection=collection, text="", answer=None, wrong="")


def stream(turn: Turn, pieces: Iterator[str | Page]) -> None:
    """Show an answer as it comes, and keep it in its turn. What came of one that is stopped stays there."""
    with st.chat_message("user", avatar=":material/person:"):
        show(turn["question"])
    with st.chat_message("assistant", avatar=page.ICON):
        place = st.empty()
        place.caption("Looking it up …")
        drawn = 0.0
        try:
            for piece in pieces:
                if not isinstance(piece, str):
                    turn["answer"] = piece
                    continue
                turn["text"] += piece
                if time.monotonic() - drawn > DRAW_SECONDS:
                    place.text(plain(turn["text"]))
                    drawn = time.monotonic()
        except (Away, Refused) as error:
            turn["wrong"] = page.explain(error)


# ── showing ─────────────────────────────────────────────────────────────────────────────────────


def show_turn(nexus: Nexus, turn: Turn, number: int) -> None:
    """A question, its answer and what that rests on. `number` tells the turns of a page apart."""
    with st.chat_message("user", avatar=":material/person:"):
        show(turn["question"])
    with st.chat_message("assistant", avatar=page.ICON):
        show_answer(turn["text"])
        if turn["wrong"]:
            st.error(turn["wrong"], icon=":material/error:")
        elif turn["answer"] is None:
            st.caption("This answer was stopped.")
        else:
            _show_evidence(nexus, turn, turn["answer"], number)


def _show_evidence(nexus: Nexus, turn: Turn, answer: Page, number: int) -> None:
    cited = [source for source in answer["sources"] if source["cited"]]
    found = [source for source in answer["sources"] if not source["cited"]]
    with st.container(horizontal=True, vertical_alignment="center"):
        _show_confidence(answer)
        if st.button("Why this answer?", key=f"why-{number}", type="tertiary", icon=":material/help:"):
            _show_why(nexus, turn, answer)
    if answer["invalid_citations"]:
        named = ", ".join(f"[{one}]" for one in answer["invalid_citations"])
        st.warning(f"The answer names {label(named)}, which is no source of it.", icon=":material/warning:")
    for source in cited:
        _show_source(source, ":material/format_quote:")
    if found:
        with st.container(key=f"found-{number}"):
            st.caption(f"Found as well, and not cited ({len(found)})")
            for source in found:
                _show_source(source, ":material/search:")


def _show_confidence(answer: Page) -> None:
    confidence = answer["confidence"]
    if answer["abstained"]:
        st.badge("The documents do not answer this", icon=":material/do_not_disturb_on:", color="orange")
        if answer["reason"]:
            st.caption(label(answer["reason"], 300))
    color = "green" if confidence >= 0.7 else "orange" if confidence >= 0.4 else "gray"
    st.badge(f"Confidence {confidence:.0%}", color=color)
    if answer["rewritten_query"]:
        st.caption(f"Searched for: {label(answer['rewritten_query'], 200)}")


def _show_source(source: Page, icon: str) -> None:
    title = join([source["title"] or source["source"], place_of(source)])
    with st.expander(f"**\\[{source['number']}\\]** {label(title)}", icon=icon):
        if source["heading"]:
            st.caption(label(" › ".join(source["heading"]), 300))
        show(source["text"])
        st.caption(label(join([source["source"], f"score {source['score']:.3f}"]), 300))
        if source.get("flags"):
            st.caption(f"Content rules found in it: {label(', '.join(source['flags']))}")


# ── why ─────────────────────────────────────────────────────────────────────────────────────────


@st.dialog("Why this answer", width="large")
def _show_why(nexus: Nexus, turn: Turn, answer: Page) -> None:
    """The passages in the order in which they were judged best, and what was left out before."""
    with page.asking():
        why = nexus.explain(answer["rewritten_query"] or turn["question"], turn["collection"], answer["sequence"])
    numbers = {source["chunk_id"]: source for source in answer["sources"]}
    explained = why["explain"]
    st.caption(
        "Two routes look for passages: by meaning, and by words. Their places (#) and scores are weighed into one"
        " score. The best passages are read; those that the answer rests on are cited."
    )
    rows = [_row(hit, numbers) for hit in why["hits"][:SHOWN_HITS]]
    if rows:
        st.table(rows, border="horizontal", hide_index=True)
    removed = Counter(one["removed_by"] for one in explained["candidates"] if one["removed_by"])
    told = ", ".join(f"{count} × {by}" for by, count in removed.most_common()) or "nothing"
    graph, reranked = explained["graph"], explained["rerank"]
    reached = f"{len(graph['reached'])} asked, too" if graph["reached"] else "none asked"
    _fact("Removed", told)
    _fact("Connected documents", f"{reached}; {graph['why']}")
    _fact("Reranked", f"{'yes' if reranked['applied'] else 'no'}; {reranked['why']}")
    _fact(
        "Confidence",
        f"{answer['confidence']:.0%}{'; abstained: ' + str(answer['reason']) if answer['abstained'] else ''}",
    )


def _fact(name: str, said: str) -> None:
    head, body = st.columns((1, 4))
    head.caption(name)
    body.caption(label(said, 400))


def _row(hit: Page, numbers: dict[str, Page]) -> dict[str, str]:
    source = numbers.get(hit["chunk_id"])
    use = "not read" if source is None else f"cited [{source['number']}]" if source["cited"] else "read"
    said = {
        "Passage": join([hit["title"] or hit["source"], place_of(hit)]), "Use": use, "Score": f"{hit['score']:.3f}",
        "By meaning": _place_on(hit["routes"].get("dense")), "By words": _place_on(hit["routes"].get("text")),
    }  # fmt: skip
    return {name: label(value, 70) for name, value in said.items()}


def _place_on(route: Page | None) -> str:
    return "–" if route is None else f"#{route['rank']} ({route['score']:.3f})"
