"""Jobs: what was accepted, how far it is, what became of each file; cancelled, or a file tried again."""

from collections.abc import Callable

import streamlit as st

from deployments.athena import page
from deployments.athena.client import Away, Nexus, Page, Refused
from deployments.athena.text import label
from deployments.athena.upload import show_files, told_of

LOOK_SECONDS = 4.0
PER_PAGE = 10
FILES_PER_PAGE = 100
COLORS = {"running": "orange", "done": "green", "failed": "red", "cancelled": "gray"}
WIDTHS = (1.9, 1.1, 2.2, 4.0)


def draw() -> None:
    """The page."""
    page.begin("Jobs", "What is being added, what was, and what failed.")
    if st.session_state.get("job") is None:
        _watch_all()
    else:
        _watch_one(st.session_state["job"])


def _choose(job_id: str | None) -> None:
    st.session_state["job"] = job_id
    st.session_state["job-files"] = [-1]


@st.fragment(run_every=LOOK_SECONDS)
def _watch_all() -> None:
    nexus = page.nexus()
    cursors: list[str | None] = st.session_state.setdefault("job-cursors", [None])
    with page.asking():
        listed = nexus.jobs(cursors[-1], PER_PAGE)
    if not listed["jobs"] and len(cursors) == 1:
        page.empty("There are no jobs", "*Upload* makes one, as do `nexus add` and `ray job submit`.")
        return
    page.heads(WIDTHS, ("Begun (UTC)", "State", "Progress", "What became of its files"))
    for job in listed["jobs"]:
        with st.container(key=f"row-{job['job_id']}"):
            begun, state, progress, told = st.columns(WIDTHS, vertical_alignment="center")
            name = page.moment(job["created_at"])
            if begun.button(name, key=f"job-{job['job_id']}", type="tertiary", help="Show its files"):
                _choose(job["job_id"])
                st.rerun()
            state.badge(job["state"], color=COLORS[job["state"]])
            progress.progress(job["progress"])
            told.caption(told_of(job))
    page.turn_page(cursors, listed["next"])


@st.fragment(run_every=LOOK_SECONDS)
def _watch_one(job_id: str) -> None:
    nexus = page.nexus()
    cursors: list[int] = st.session_state["job-files"]
    with page.asking():
        job = nexus.job(job_id, FILES_PER_PAGE, cursors[-1])
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("All jobs", icon=":material/arrow_back:", type="tertiary"):
            _choose(None)
            st.rerun()
        st.badge(job["state"], color=COLORS[job["state"]])
        st.caption(f"begun {page.moment(job['created_at'])} UTC", width="stretch")
        if job["state"] == "running":
            _offer_cancelling(nexus, job)
    st.progress(job["progress"], told_of(job))
    _tell_pace(job)
    show_files(job["files"], lambda file: _offer_retry(nexus, job, file))
    page.turn_page(cursors, job["next"])


def _tell_pace(job: Page) -> None:
    if job["state"] == "running" and job["seconds_left"]:
        st.caption(f"{job['rate']:.1f} files a second; about {job['seconds_left']:.0f} s left")
    if job["reason"]:
        st.caption(label(job["reason"], 300))
    for file in job["stuck"]:
        st.warning(
            f"{label(file['filename'])} is in {label(file['stage'] or '?')} for long.", icon=":material/schedule:"
        )


def _offer_cancelling(nexus: Nexus, job: Page) -> None:
    with st.popover("Cancel", icon=":material/block:", type="tertiary"):
        st.markdown("What has not ended is given up; what was added stays.")
        if st.button("Cancel this job", type="primary"):
            _do(lambda: nexus.cancel(job["job_id"]))


def _offer_retry(nexus: Nexus, job: Page, file: Page) -> None:
    if file["state"] == "failed":
        name = f"retry-{file['number']}"
        if st.button("Try again", key=name, type="tertiary", icon=":material/refresh:"):
            _do(lambda: nexus.retry(job["job_id"], file["number"]))


def _do(what: Callable[[], object]) -> None:
    try:
        what()
    except (Away, Refused) as error:
        st.toast(page.explain(error), icon=":material/error:")
    else:
        st.rerun()
