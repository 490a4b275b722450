"""Upload: many files at once, and what becomes of each."""

from collections.abc import Callable

import streamlit as st

from deployments.athena import page
from deployments.athena.client import OPEN, Away, File, Nexus, Page, Refused
from deployments.athena.text import label

LOOK_SECONDS = 2.0
SHOWN_FILES = 200
STATES = {
    "expected": ("hourglass_empty", "waits for its bytes"), "queued": ("schedule", "waits for its turn"),
    "running": ("sync", "is being read"), "done": ("check_circle", "added"), "unchanged": ("check", "unchanged"),
    "failed": ("error", "failed"), "cancelled": ("block", "cancelled"), "skipped": ("skip_next", "skipped"),
}  # fmt: skip


def draw() -> None:
    """The page."""
    nexus = page.nexus()
    page.begin("Upload", "Documents, tables, slides, code, mail: drop as many as you like.")
    count = st.session_state.setdefault("uploads", 0)
    with page.asking():
        chosen, new, readers = _choose_place()
    picked = st.file_uploader(
        "Files", accept_multiple_files=True, key=f"files-{count}", label_visibility="collapsed"
    )  # fmt: skip
    if st.button(_button(len(picked)), type="primary", icon=":material/upload:", disabled=not picked):
        files = [File(one.name, one.getvalue(), one.type or None) for one in picked]
        named = [name.strip() for name in readers.split(",") if name.strip()]
        if _send(nexus, files, new.strip() or chosen or "default", named or None):
            st.session_state["uploads"] = count + 1  # a new, empty place for files; those sent are let go
            st.rerun()
    if (job := st.session_state.get("upload-job")) is not None:
        _watch(nexus, job)


def _button(count: int) -> str:
    return f"Add {count} file{'s' * (count != 1)}" if count else "Add files"


def _choose_place() -> tuple[str | None, str, str]:
    """The collection among those that there are, a new one's name, and who may read what comes."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = page.choose_collection("upload-collection")
        new = st.text_input("… or a new one", key="upload-new", placeholder="its name", max_chars=64)
        readers = st.text_input(
            "Readers", key="upload-readers", placeholder="everybody of this tenant",
            help="Names of keys, with commas in between: for nobody else are these documents there.",
        )  # fmt: skip
    return chosen, new, readers


def _send(nexus: Nexus, files: list[File], collection: str, readers: list[str] | None) -> bool:
    """Announce files and send what is wanted of them; whether all of it is there."""
    bar = st.progress(0.0, "Comparing with what is there …")
    try:
        job = nexus.announce(files, collection, readers)
        st.session_state["upload-job"] = job["job_id"]
        wanted = job["expected"]
        for sent in nexus.send(job["job_id"], files, wanted):
            bar.progress(sent / len(wanted), f"{sent} of {len(wanted)} sent")
    except (Away, Refused) as error:
        bar.empty()
        page.tell(error)
        return False
    return True


@st.fragment(run_every=LOOK_SECONDS)
def _watch(nexus: Nexus, job_id: str) -> None:
    """The job's files as they are now, until each has ended; then nothing is asked any more."""
    seen: Page | None = st.session_state.get("upload-seen")
    job = seen if seen is not None and seen["job_id"] == job_id else None
    if job is None or job["state"] == "running":
        try:
            job = nexus.job(job_id, limit=SHOWN_FILES)
            st.session_state["upload-seen"] = job
        except (Away, Refused) as error:
            if job is None or not isinstance(error, Refused) or error.status != 429:
                st.warning(page.explain(error), icon=":material/cloud_off:")
                return
    st.progress(job["progress"], told_of(job))
    show_files(job["files"])
    if job["next"] is not None:
        st.caption(f"The first {SHOWN_FILES} of {job['total']} files; *Jobs* shows all of them.")


def ended(job: Page) -> int:
    """How many files of a job have ended."""
    return sum(count for state, count in job["counts"].items() if state not in OPEN)


def told_of(job: Page) -> str:
    """A job in a line: what it does, how much of it has ended, and how."""
    counts = [f"{count} {STATES[state][1]}" for state, count in job["counts"].items() if count and state not in OPEN]
    left = job["total"] - ended(job)
    more = f"{left} to go" if left else ""
    said = ", ".join([*counts, *([more] if more else [])])
    return label(f"{said} in {job['collection']}", 300)


def show_files(files: list[Page], offer: Callable[[Page], None] = lambda file: None) -> None:
    """Each file in a line, those that failed with the reason; `offer` may add to a line."""
    for file in files:
        icon, said = STATES[file["state"]]
        with st.container(key=f"row-file-{file['number']}"), st.container(horizontal=True):
            color = {"failed": "red", "done": "green", "unchanged": "green"}.get(file["state"], "gray")
            st.markdown(f":{color}[:material/{icon}:] {label(file['filename'])}", width="stretch")
            st.caption(f"{page.size(file['size'])} · {_said(file, said)}", width=420)
            offer(file)


def _said(file: Page, said: str) -> str:
    if file["reason"] and file["state"] in ("failed", "cancelled", "skipped"):
        return label(f"{said}: {file['reason']}", 300)
    if file["state"] == "running" and file["stage"]:
        return label(f"{said}: {file['stage']}, attempt {file['attempts']}")
    return f"{said}, {page.passages(file['chunks'])}" if "chunks" in file else said
