"""Policies: rules over files, what each would do now, and having it done."""

import json
from collections.abc import Mapping
from typing import Any

import streamlit as st

from deployments.athena import page
from deployments.athena.client import Nexus, Page
from deployments.athena.text import label

SHOWN_ACTIONS = 200
COLORS = {"planned": "orange", "done": "green", "failed": "red", "skipped": "gray", "unchanged": "gray"}
WIDTHS = (4.2, 1.2, 3.6, 1.4)


def draw() -> None:
    """The page."""
    nexus = page.nexus()
    page.begin("Policies", "Rules that move, copy, index, tag, hold and delete files: shown first, then done.")
    with page.asking():
        found = sorted(nexus.policies(), key=lambda policy: (-policy["priority"], policy["name"]))
    if not found:
        page.empty("There are no policies", "`nexus policy put NAME FILE` makes one.")
        return
    by_name = {policy["name"]: policy for policy in found}
    with st.container(width=420):
        name = st.selectbox("Policy", list(by_name), key="policy")
    _show(by_name[name])
    _evaluate(nexus, name)


def _show(policy: Page) -> None:
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{label(policy['name'])}**", width="content")
            st.badge("enabled" if policy["enabled"] else "disabled", color="green" if policy["enabled"] else "gray")
            st.caption(f"priority {policy['priority']}")
        if policy["description"]:
            st.caption(label(policy["description"], 400))
        for action in policy["actions"]:
            st.markdown(f":material/bolt: {label(_action(action))}")
        with st.expander("As it is written", icon=":material/data_object:"):
            st.code(json.dumps(policy, indent=2, ensure_ascii=False), language="json", wrap_lines=True)


def _action(action: Mapping[str, Any]) -> str:
    details = (f"{key} {_listed(value)}" for key, value in action.items() if key != "type" and value)
    return " · ".join([str(action["type"]), *details])


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ── what it does ────────────────────────────────────────────────────────────────────────────────


def _evaluate(nexus: Nexus, name: str) -> None:
    """A dry run on demand; having it done only after one of the same policy, and only when sure."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        file = st.text_input("Only this file", key="policy-file", placeholder="all files").strip() or None
        asked = st.button("Show what it would do", icon=":material/preview:", type="primary")
    if asked:
        with page.asking(), st.spinner("Looking at the files …"):
            _remember(name, file, nexus.evaluate(name, True, file))
    seen = st.session_state.get("evaluation")
    if seen is None or seen["of"] != [name, file]:
        return
    shown = seen["shown"]
    _show_evaluation(shown)
    if shown["dry_run"] and shown["actions"]:
        with st.popover("Do it", icon=":material/play_arrow:"):
            st.markdown("What is shown above is done now, to the files themselves.")
            if st.button("Yes, do it", type="primary"):
                with page.asking(), st.spinner("Doing it …"):
                    _remember(name, file, nexus.evaluate(name, False, file))
                st.rerun()


def _remember(name: str, file: str | None, shown: Page) -> None:
    st.session_state["evaluation"] = {"of": [name, file], "shown": shown}


def _show_evaluation(shown: Page) -> None:
    sums = ", ".join(f"{count} {what}" for what, count in shown["summary"].items()) or "nothing to do"
    facts = shown["metadata"]
    of_files = f" · {facts['matched']} of {facts['files']} files match" if "files" in facts else ""
    st.markdown(f"**{'It would do' if shown['dry_run'] else 'It did'}:** {label(sums + of_files, 300)}")
    for problem in facts.get("problems", ()):
        st.warning(label(problem, 300), icon=":material/warning:")
    if shown["actions"]:
        page.heads(WIDTHS, ("File", "Action", "Change", "State"))
    for number, action in enumerate(shown["actions"][:SHOWN_ACTIONS]):
        with st.container(key=f"row-action-{number}"):
            file, what, change, state = st.columns(WIDTHS, vertical_alignment="center")
            file.markdown(label(action["file_path"], 60))
            what.caption(label(action["action"]))
            change.caption(label(_change(action), 80))
            state.badge(label(action["status"]), color=COLORS.get(action["status"], "gray"))
            if action.get("reason"):
                st.caption(label(action["reason"], 300))
    if len(shown["actions"]) > SHOWN_ACTIONS:
        st.caption(f"The first {SHOWN_ACTIONS} of {sum(shown['summary'].values())}; `nexus policy evaluate` has all.")


def _change(action: Mapping[str, str]) -> str:
    target = action.get("target", "")
    return f"{action.get('source') or '?'} → {target}" if action["action"] in ("move", "replicate") else target
