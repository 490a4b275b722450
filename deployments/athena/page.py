"""What all pages have: the way to Nexus of whoever looks, the frame, and what is said when Nexus cannot help."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from deployments.athena import server
from deployments.athena.client import Away, Nexus, Refused
from deployments.athena.text import code, label

LOOK_SECONDS = 2.0  # between two looks at a Nexus that is away
EYES = (
    '<rect width="32" height="32" rx="8" fill="#1e6658"/>'
    '<g fill="none" stroke="#fff" stroke-width="2.2"><circle cx="11" cy="15" r="4.6"/><circle cx="21" cy="15" r="4.6"/>'
    '<path d="M14.4 19.2 16 22l1.6-2.8M7 8l4 2.6M25 8l-4 2.6" stroke-linecap="round"/></g>'
    '<g fill="#fff"><circle cx="11" cy="15" r="1.5"/><circle cx="21" cy="15" r="1.5"/></g>'
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" '
ICON = f'{SVG}viewBox="0 0 32 32">{EYES}</svg>'
LOGO = (
    f'{SVG}viewBox="0 0 132 32">{EYES}<text x="43" y="23.5" font-size="21" font-weight="600" fill="#1f2a30"'
    ' font-family="system-ui, sans-serif">Athena</text></svg>'
)
STYLE = """<style>
[data-testid="stHeader"] { background: transparent; }
[data-testid="stMainBlockContainer"] { padding: 2.2rem 2.5rem 3rem; max-width: 66rem; }
[data-testid="stSidebarUserContent"] { padding-bottom: 1rem; }
[data-testid="stText"] { white-space: pre-wrap; overflow-wrap: anywhere; }
h1 { padding-bottom: .1rem; }
button:focus-visible, a:focus-visible, summary:focus-visible { outline: 3px solid #8cc7b8 !important; }
[data-testid="stBottomBlockContainer"] { padding: .5rem 2.5rem 1.6rem; max-width: 66rem; }
[class*="st-key-row"] { border-bottom: 1px solid #e9edea; padding: .15rem 0; }
[class*="st-key-found"] { opacity: .78; }
[class*="st-key-empty"] { text-align: center; padding: 3.5rem 1rem; border: 1px dashed #cfd7d3; border-radius: 10px; }
[class*="st-key-empty"] p { color: #5b6970; }
</style>"""


def nexus() -> Nexus:
    """The way to Nexus with the key of whoever looks at this page; ends the page for who is not signed in."""
    if (given := st.session_state.get("nexus")) is not None:  # of a test, which has no browser
        return given
    door = server.door()
    found = None if door is None else door.nexus_of(st.context.cookies)
    if found is None:
        st.info("You are signed out. Load this page again to sign in.", icon=":material/lock:")
        st.stop()
    return found


def sign_out() -> None:
    if (door := server.door()) is not None:
        door.sign_out(st.context.cookies)
    st.session_state.clear()


def begin(title: str, about: str) -> None:
    """The head of a page."""
    st.title(title, anchor=False)
    st.caption(about)


@contextmanager
def asking() -> Iterator[None]:
    """Say what is wrong when Nexus is away or refuses, and end the page there."""
    try:
        yield
    except (Away, Refused) as error:
        tell(error)
        st.stop()


def tell(error: Away | Refused) -> None:
    """What went wrong and what to do. A Nexus that is away is looked for until it is back."""
    if isinstance(error, Away):
        st.warning(
            f"**Nexus does not answer at {code(error.url)}.** Start it with `nexus up`; this page goes on by itself"
            " once it is there.", icon=":material/cloud_off:",
        )  # fmt: skip
        _await_return(nexus())
        return
    icon = {401: ":material/key_off:", 403: ":material/lock:", 429: ":material/hourglass:", 503: ":material/hourglass:"}
    st.error(explain(error), icon=icon.get(error.status, ":material/error:"))


def explain(error: Away | Refused) -> str:
    """The same in a sentence of Markdown."""
    if isinstance(error, Away):
        return f"Nexus does not answer at {code(error.url)}; start it with `nexus up`."
    detail = label(error.detail, 500)
    wait = "in a moment" if error.retry_after is None else f"in {error.retry_after:.0f} s"
    if error.status == 401:
        return f"**Your key does not work here any more.** Sign out, then sign in with another. ({detail})"
    if error.status == 403:
        return f"**Your key may not do this.** {detail}"
    if error.status == 429:
        return f"**That was more than your key may ask for in so short a time.** Try again {wait}. ({detail})"
    if error.status == 503:
        return f"**Nexus is busy, or a part of it is starting.** Try again {wait}. ({detail})"
    return detail


@st.fragment(run_every=LOOK_SECONDS)
def _await_return(away: Nexus) -> None:
    if away.is_there():
        st.rerun()


def choose_collection(key: str, all_of_them: bool = False) -> str | None:
    """A choice among the collections that this key may read; None stands for all of them."""
    names = [one["name"] for one in nexus().collections()]
    options: list[str | None] = [None] if all_of_them else []
    options += names if all_of_them or "default" in names else ["default", *names]
    return st.selectbox("Collection", options, key=key, format_func=lambda name: name or "all collections")


def heads(widths: Sequence[float], names: Sequence[str]) -> None:
    """The heads of columns that are so wide."""
    for column, name in zip(st.columns(list(widths)), names, strict=True):
        column.caption(f"**{name}**")


def turn_page(cursors: list[Any], following: Any) -> None:
    """Buttons to the pages before and behind: a stack of cursors, of which the last is this page's."""
    if len(cursors) == 1 and following is None:
        return
    with st.container(horizontal=True, horizontal_alignment="right", vertical_alignment="center"):
        st.caption(f"Page {len(cursors)}", width="content")
        st.button("Back", disabled=len(cursors) == 1, icon=":material/chevron_left:", on_click=cursors.pop)
        st.button(
            "More", disabled=following is None, icon=":material/chevron_right:", on_click=cursors.append,
            args=(following,),
        )  # fmt: skip


def remember_session(name: str) -> None:
    """Sessions cannot be listed: those that this browser opened are offered again."""
    known: list[str] = st.session_state.setdefault("sessions", [])
    known[:] = [name, *(one for one in known if one != name)][:10]


def empty(words: str, more: str) -> None:
    """What a page shows that has nothing to show."""
    with st.container(key="empty"):
        st.markdown(f"**{words}**")
        st.markdown(more)


def moment(seconds: float | None) -> str:
    """Unix seconds as date and time, in UTC."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def passages(count: int) -> str:
    return "1 passage" if count == 1 else f"{count} passages"
