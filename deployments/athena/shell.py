"""The script that Streamlit runs for each look at Athena: the frame, and in it the page that was chosen."""

import streamlit as st

from deployments.athena import chat, cluster, documents, jobs, page, policies, sessions, upload
from deployments.athena.text import code

st.set_page_config("Athena", page.ICON, layout="wide", initial_sidebar_state="expanded")
st.html(page.STYLE)
st.logo(page.LOGO, size="large", icon_image=page.ICON)
chosen = st.navigation(
    {
        "Ask": [
            st.Page(chat.draw, title="Chat", icon=":material/forum:", url_path="chat", default=True),
            st.Page(sessions.draw, title="Sessions", icon=":material/history_edu:", url_path="sessions"),
        ],
        "Documents": [
            st.Page(upload.draw, title="Upload", icon=":material/upload_file:", url_path="upload"),
            st.Page(documents.draw, title="Documents", icon=":material/description:", url_path="documents"),
            st.Page(jobs.draw, title="Jobs", icon=":material/conveyor_belt:", url_path="jobs"),
        ],
        "Operate": [
            st.Page(cluster.draw, title="Cluster", icon=":material/hub:", url_path="cluster"),
            st.Page(policies.draw, title="Policies", icon=":material/rule:", url_path="policies"),
        ],
    }
)
with st.sidebar:
    way = page.nexus()
    st.caption(f"Nexus at {code(way.url)}")
    st.button("Sign out", icon=":material/logout:", type="tertiary", on_click=page.sign_out)
chosen.run()
