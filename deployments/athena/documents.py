"""Documents: what there is, page by page; one of them looked at, and deleted."""

import streamlit as st

from deployments.athena import page
from deployments.athena.client import Nexus, Page
from deployments.athena.text import join, label, show
from deployments.athena.upload import ended

PER_PAGE = 20
SHOWN_CHARACTERS = 20_000
WIDTHS = (4.6, 1.6, 1.2, 1.1, 1.7)


def draw() -> None:
    """The page."""
    nexus = page.nexus()
    page.begin("Documents", "What is indexed, and who may read it.")
    cursors: list[str] = st.session_state.setdefault("cursors", [""])
    with page.asking():
        with st.container(width=280):
            collection = page.choose_collection("documents-collection", all_of_them=True)
        if st.session_state.get("listed-collection") != collection:
            st.session_state["listed-collection"] = collection
            cursors[:] = [""]
        listed = nexus.documents(collection, cursors[-1], PER_PAGE)
        coming = sum(job["total"] - ended(job) for job in nexus.running_jobs())
    if coming:
        st.info(f"{coming} more on their way; *Jobs* shows how far they are.", icon=":material/sync:")
    if not listed["documents"] and len(cursors) == 1:
        page.empty("There are no documents here", "*Upload* takes some, as does `nexus add FOLDER`.")
        return
    page.heads(WIDTHS, ("Title", "Collection", "State", "Passages", "Added (UTC)"))
    for document in listed["documents"]:
        _row(nexus, document)
    page.turn_page(cursors, listed["next"])


def _row(nexus: Nexus, document: Page) -> None:
    with st.container(key=f"row-{document['document_id']}"):
        title, collection, state, passages, added = st.columns(WIDTHS, vertical_alignment="center")
        name = label(document["title"] or document["source"], 60)
        wants_more = title.button(name, key=f"open-{document['document_id']}", type="tertiary")
        collection.caption(label(document["collection"], 24))
        state.badge("indexed", color="green")
        passages.caption(str(document["chunks"]))
        added.caption(page.moment(document["created_at"]))
        if wants_more:
            _open(nexus, document)


@st.dialog("Document", width="large")
def _open(nexus: Nexus, document: Page) -> None:
    st.markdown(f"**{label(document['title'] or document['source'], 200)}**")
    facts = {
        "File": document["source"], "Collection": document["collection"], "Kind": document["media_type"],
        "Size": join([page.size(document["bytes"]), page.passages(document["chunks"])]),
        "Version": join([document["version"], f"sequence {document['sequence']}", page.moment(document["created_at"])]),
        "Readers": ", ".join(document["readers"]) or "everybody of this tenant",
        "Id": document["document_id"],
    }  # fmt: skip
    facts |= {name: str(value) for name, value in document["metadata"].items()}
    for name, value in facts.items():
        head, said = st.columns((1, 5))
        head.caption(label(name, 40))
        said.caption(label(value, 300))
    if st.toggle("Show its versions", key=f"versions-{document['document_id']}"):
        _show_versions(nexus, document)
    if st.toggle("Show what was read of it", key=f"read-{document['document_id']}"):
        _show_text(nexus, document)
    _offer_deletion(nexus, document)


def _show_versions(nexus: Nexus, document: Page) -> None:
    with page.asking():
        versions = nexus.versions_of(document["document_id"])
    for version in versions:
        until = "current" if version["until"] is None else f"found until sequence {version['until']}"
        facts = [version["version"], page.moment(version["created_at"]), page.size(version["bytes"])]
        st.caption(label(join([*facts, page.passages(version["chunks"]), f"since {version['sequence']}", until]), 300))
    if len(versions) == 1:
        st.caption("It was not changed yet, or what it was before is erased.")


def _show_text(nexus: Nexus, document: Page) -> None:
    with page.asking():
        text = nexus.text_of(document["document_id"])
    with st.container(height=260, border=True):
        show(text[:SHOWN_CHARACTERS])
    if len(text) > SHOWN_CHARACTERS:
        st.caption(f"The first {SHOWN_CHARACTERS} of {len(text)} characters.")


def _offer_deletion(nexus: Nexus, document: Page) -> None:
    """Twice asked: once deleted, nobody sees it again."""
    st.divider()
    with st.container(horizontal=True, vertical_alignment="center"):
        sure = st.checkbox("Yes, delete it: nobody will find it any more.", key=f"sure-{document['document_id']}")
        if st.button("Delete", icon=":material/delete:", disabled=not sure, type="primary"):
            with page.asking():
                nexus.delete(document["document_id"])
            st.toast(f"Deleted: {label(document['title'] or document['source'])}", icon=":material/delete:")
            st.rerun()
