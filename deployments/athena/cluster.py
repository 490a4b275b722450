"""Cluster: machines, GPUs by owner, replicas with their queues, and the coordinator, as a picture that goes on."""

import streamlit as st

from deployments.athena import drawing, page
from deployments.athena.client import Page
from deployments.athena.text import label

LOOK_SECONDS = 10.0


def draw() -> None:
    """The page."""
    page.begin("Cluster", "Machines, who holds what of their GPUs, what runs there, and how it does.")
    _watch()


@st.fragment(run_every=LOOK_SECONDS)
def _watch() -> None:
    nexus = page.nexus()
    with page.asking():
        state, report = nexus.status(), nexus.report()
    for sentence in state["differences"]:
        st.warning(label(sentence, 400), icon=":material/warning:")
    if state["nodes"] is None:
        page.empty("The machines are not known now", label(state["unknown"].get("nodes", ""), 300))
    else:
        st.image(drawing.draw(state), caption=_in_words(state), width="stretch")
    st.subheader("Models", anchor=False)
    st.image(drawing.draw_models(report), caption=_models_in_words(report), width="stretch")
    _show_collections(state)
    for part, why in state["unknown"].items():
        if part != "nodes":
            st.caption(label(f"Not known: {part} ({why})", 300))


def _in_words(state: Page) -> str:
    """What the picture shows, for who does not see it."""
    nodes = state["nodes"]
    away = [node["name"] for node in nodes if not node["alive"]]
    gpus = [gpu for node in nodes for gpu in node["gpus"] or ()]
    replicas = sum(one["replicas"]["running"] for one in state["deployments"] or ())
    voters = (state["coordinator"] or {}).get("voters", ())
    leader = [str(one["id"]) for one in voters if one["role"] == "leader"]
    parts = [
        _count(len(nodes), "machine"), f"away: {', '.join(away)}" if away else "", _count(len(gpus), "GPU"),
        _count(replicas, "replica"), _count(len(voters), "voter"), f"led by voter {leader[0]}" if leader else "",
    ]  # fmt: skip
    return label(", ".join(part for part in parts if part), 400)


def _models_in_words(report: Page) -> str:
    named = [f"{one['name']} works on {one['in_flight']}" for one in report["models"]]
    return label(", ".join(named), 400)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _show_collections(state: Page) -> None:
    if not state["collections"]:
        return
    st.subheader("Collections", anchor=False)
    rows = [
        {"Collection": label(one["name"]), "Documents": str(one["documents"]), "Passages": str(one["chunks"]),
         "Sequence": str(one["sequence"])}
        for one in state["collections"]
    ]  # fmt: skip
    st.table(rows, border="horizontal", hide_index=True)
