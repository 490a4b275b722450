"""Athena over a real front door in this process: its door, its pages, and what others wrote shown as text."""

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from itsdangerous import URLSafeTimedSerializer
from markdown_it import MarkdownIt
from playwright.sync_api import Page as Tab
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect
from streamlit.testing.v1 import AppTest, app_test

from deployments.athena import drawing
from deployments.athena.client import Away, File, Nexus, Refused
from deployments.athena.door import Door, Guard, Settings, make_link
from deployments.athena.text import blocks, label, plain
from deployments.gateway import build
from nexus.access import PERMISSIONS
from tests import browsing
from tests.browsing import needs_chromium
from tests.conftest import Door as FrontDoor

MANUAL = "# Gripper\n\nThe gripper closes with a torque of 4 N·m. The gripper opens in two seconds.\n"
SOCKET = "ws://127.0.0.1:8501/_stcore/stream"
EVIL = "http://evil.example/"
HOSTILE = (
    f"# ![picture]({EVIL}a.png) <script>window.wasRun = 1</script>\n\n"
    f"The latch of the gripper is ![x]({EVIL}b.png) <img src={EVIL}c.png onerror='window.wasRun = 1'> opened by hand.\n"
    f"[a link](javascript:window.wasRun=1) and {EVIL}d and www.evil.example and <a href='{EVIL}e'>this</a>.\n"
    "$\\href{javascript:window.wasRun=1}{x}$ :red[red] :material/delete: \x1b[31mred\x1b[0m \u202egpj.exe\n\n"
    f"```mermaid\ngraph TD; A-->B; click A '{EVIL}f'\n```\n"
)


@pytest.fixture(scope="module", autouse=True)
def no_scripts_stay() -> Iterator[None]:
    main = sys.modules["__main__"]  # which Streamlit replaces by the script, and processes spawned later run first
    yield
    sys.modules["__main__"] = main
    app_test.TMP_DIR.cleanup()  # which Streamlit leaves to the end of the process, with a warning


@pytest.fixture(scope="module")
def url(shared_door: FrontDoor) -> Iterator[str]:
    with browsing.gateway(build(shared_door.lent)) as url:
        yield url


@pytest.fixture
def nexus(url: str, shared_door: FrontDoor) -> Iterator[Nexus]:
    """With a tenant of its own for each test."""
    nexus = Nexus(url, key_of(shared_door, f"t{time.monotonic_ns()}"))
    yield nexus
    nexus.close()


def key_of(door: FrontDoor, tenant: str, *permissions: str) -> str:
    return door.headers(tenant, "tester", *permissions)["authorization"].removeprefix("Bearer ")


def add(nexus: Nexus, *files: tuple[str, str], collection: str = "default") -> None:
    """Files as documents, once they are."""
    sent = [File(name, content.encode(), None) for name, content in files]
    job = nexus.announce(sent, collection)
    for _ in nexus.send(job["job_id"], sent, job["expected"]):
        pass
    deadline = time.monotonic() + 30
    while nexus.job(job["job_id"])["state"] == "running":
        assert time.monotonic() < deadline


# ── text ────────────────────────────────────────────────────────────────────────────────────────


def html_of(markdown: str) -> str:
    """What a reader of Markdown who allows everything makes of it."""
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown)


@pytest.mark.parametrize("text", [*HOSTILE.splitlines(), "a * b _ c ` d ~~e~~ # f", "1. x", "- x", "| a |", "\\"])
def test_a_label_is_read_as_it_is_written(text: str) -> None:
    made = html_of(label(text, 1000))
    assert re.fullmatch(r"(?s)(<p>[^<>]*</p>\n)?", made), made
    assert not re.search(r"(?i)://|www\.|:[a-z]+\[|:material", label(text, 1000).replace("\\", ""))


def test_a_label_shows_the_words_of_its_text_in_one_short_line() -> None:
    assert label("a\n b").replace("\\", "") == "a b"
    long = label("begin " + "x" * 500 + " end")
    assert len(long) < 140 and long.startswith("begin") and long.endswith("end")
    assert label("") == "\u200b"  # a label of nothing would have Streamlit take its own


def test_what_a_screen_obeys_is_taken_out() -> None:
    assert plain("a\x1b[31mb\x1b]0;title\x07c\x00d\u202ee\r\nf\tg") == "abc\ufffdd\ufffde\nf\tg"


def test_an_answer_is_blocks_of_plain_text() -> None:
    answer = "# Steps\n\nDo **this** [first](http://a.example):\n\n1. open\n2. close\n   - slowly\n\n"
    answer += "```sh\nls *\n```\n> said\n"
    assert list(blocks(answer)) == [
        ("heading", "Steps"), ("text", "Do this first (http://a.example):"),
        ("text", "1. open\n2. close\n   • slowly"), ("code", "ls *"), ("text", "│ said"),
    ]  # fmt: skip
    assert list(blocks("| a | b |\n|---|---|\n| one | 2 |")) == [("code", "a    b\none  2")]


def test_no_word_of_an_answer_is_lost() -> None:
    shown = " ".join(text for _, text in blocks(HOSTILE))
    for word in ("picture", EVIL + "a.png", "<script>", "onerror", EVIL + "d", "graph TD", "$\\href", ":red"):
        assert word in shown
    assert "\x1b" not in shown and "\u202e" not in shown


# ── the door ────────────────────────────────────────────────────────────────────────────────────


async def inside(request: object) -> PlainTextResponse:
    return PlainTextResponse("inside")


async def socket_inside(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("inside")
    await socket.close()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def behind(door: Door, host: str = "127.0.0.1:8501") -> TestClient:
    routes = [Route("/{path:path}", inside, methods=["GET", "POST"]), WebSocketRoute("/_stcore/stream", socket_inside)]
    app = Starlette(routes=routes, middleware=[Middleware(Guard, door=door)])
    return TestClient(app, base_url=f"http://{host}", follow_redirects=False)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def athenas(url: str, shared_door: FrontDoor, clock: Clock) -> Door:
    return Door(Settings(url, secret="s", lent_key=key_of(shared_door, "default")), clock)


def test_who_is_not_signed_in_sees_the_sign_in_page_and_nothing_else(athenas: Door) -> None:
    browser = behind(athenas)
    to_page = browser.get("/documents", headers={"accept": "text/html"})
    assert (to_page.status_code, to_page.headers["location"]) == (303, "/sign-in")
    for path in ("/static/js/index.js", "/_stcore/upload_file/x/y", "/media/x"):
        assert browser.get(path).status_code == 401
    assert browser.post("/_stcore/upload_file/x/y").status_code == 401
    with pytest.raises(WebSocketDisconnect), browser.websocket_connect(SOCKET):
        pass
    page = browser.get("/sign-in")
    assert page.status_code == 200 and "<form" in page.text and page.headers["cache-control"] == "no-store"
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_a_key_opens_the_door_for_its_browser(athenas: Door, shared_door: FrontDoor) -> None:
    browser = behind(athenas)
    key = key_of(shared_door, "acme")
    entered = browser.post("/sign-in", data={"key": f" {key} "})
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and key not in cookie
    assert browser.get("/documents").text == "inside"
    with browser.websocket_connect(SOCKET) as socket:
        assert socket.receive_text() == "inside"
    assert behind(athenas).get("/documents").status_code == 401
    assert browser.post("/sign-out").status_code == 303
    assert browser.get("/documents").status_code == 401


@pytest.mark.parametrize(
    ("key", "status", "words"),
    [
        ("nx_unknown", 401, "does not know"),
        ("", 422, "Give a key"),
        ("ü", 422, "Give a key"),
        ("x" * 9000, 413, "longer"),
    ],
)
def test_what_is_no_key_opens_nothing(athenas: Door, key: str, status: int, words: str) -> None:
    refused = behind(athenas).post("/sign-in", data={"key": key})
    assert (refused.status_code, words in refused.text, "set-cookie" in refused.headers) == (status, True, False)


def test_signing_in_while_nexus_is_away_says_so(athenas: Door) -> None:
    door = Door(replace(athenas.settings, nexus_url="http://127.0.0.1:9"))
    refused = behind(door).post("/sign-in", data={"key": "k"})
    assert refused.status_code == 503 and "does not answer at http://127.0.0.1:9" in refused.text


def test_a_link_lends_the_key_once_and_for_ten_minutes(athenas: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    link = make_link("http://127.0.0.1:8501", "s")
    browser = behind(athenas)
    assert browser.get(link).headers["location"] == "/"
    assert browser.get("/").text == "inside"
    assert behind(athenas).get(link).status_code == 403
    assert behind(athenas).get(make_link("http://127.0.0.1:8501", "another secret")).status_code == 403
    signed_at = time.time() - 601
    monkeypatch.setattr("itsdangerous.timed.TimestampSigner.get_timestamp", lambda self: int(signed_at))
    old = make_link("http://127.0.0.1:8501", "s")
    monkeypatch.undo()
    assert behind(athenas).get(old).status_code == 403


def test_without_a_key_to_lend_no_link_opens_anything(athenas: Door) -> None:
    for settings in (replace(athenas.settings, lent_key=""), replace(athenas.settings, secret="")):
        token = URLSafeTimedSerializer(settings.secret, salt="athena-link").dumps("x")
        assert behind(Door(settings)).get("/", params={"token": token}).status_code == 403


def test_a_browser_that_does_nothing_is_signed_out(athenas: Door, clock: Clock) -> None:
    browser = behind(athenas)
    browser.get(make_link("http://127.0.0.1:8501", "s"))
    clock.now += 11 * 3600
    assert browser.get("/").status_code == 200
    clock.now += 13 * 3600
    assert browser.get("/").status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8501", "127.0.0.1.evil.example", "", "[::2]:8501"])
def test_a_name_that_is_not_ours_reaches_nothing(athenas: Door, host: str) -> None:
    """DNS rebinding: a page of evil.example has its name point here."""
    browser = behind(athenas)
    browser.get(make_link("http://127.0.0.1:8501", "s"))
    assert browser.get("/sign-in", headers={"host": host}).status_code == 421
    with pytest.raises(WebSocketDisconnect), browser.websocket_connect(SOCKET, headers={"host": host}):
        pass


def test_pages_of_others_open_no_socket_and_send_nothing(athenas: Door) -> None:
    browser = behind(athenas)
    browser.get(make_link("http://127.0.0.1:8501", "s"))
    for origin in ("http://evil.example", "http://127.0.0.1:9000", "null"):
        assert browser.post("/sign-out", headers={"origin": origin}).status_code == 403
        with pytest.raises(WebSocketDisconnect), browser.websocket_connect(SOCKET, headers={"origin": origin}):
            pass
    with browser.websocket_connect(SOCKET, headers={"origin": "http://127.0.0.1:8501"}) as socket:
        assert socket.receive_text() == "inside"


def test_other_names_are_configured(athenas: Door) -> None:
    door = Door(replace(athenas.settings, hosts=("athena.example",), is_encrypted=True))
    browser = behind(door, "athena.example")
    entered = browser.get(make_link("http://athena.example", "s"))
    assert entered.status_code == 303 and "Secure" in entered.headers["set-cookie"]


# ── the way to Nexus ────────────────────────────────────────────────────────────────────────────


def test_a_nexus_that_is_away_is_away_and_no_error_of_ours() -> None:
    away = Nexus("http://127.0.0.1:9", "k")
    assert not away.is_there()
    for ask in (away.collections, lambda: list(away.chat([{"role": "user", "content": "x"}], "default"))):
        with pytest.raises(Away):
            ask()


def test_what_nexus_refuses_says_why(nexus: Nexus, url: str, shared_door: FrontDoor) -> None:
    with pytest.raises(Refused) as no_document:
        nexus.text_of("0" * 32)
    assert (no_document.value.status, no_document.value.detail) == (404, "no such document")
    with pytest.raises(Refused) as no_collection:
        list(nexus.chat([{"role": "user", "content": "x"}], "nowhere"))
    assert no_collection.value.status == 404
    reader = Nexus(url, key_of(shared_door, "default", "documents:read"))
    with pytest.raises(Refused) as forbidden:
        reader.delete("0" * 32)
    assert forbidden.value.status == 403
    reader.close()


def test_what_was_asked_too_often_is_not_asked_before_its_time(url: str, shared_door: FrontDoor) -> None:
    key, _ = shared_door.keys.create("slow", "t-slow", PERMISSIONS, requests_per_minute=1)
    nexus = Nexus(url, key)
    with pytest.raises(Refused) as first:
        for _ in range(50):
            nexus.collections()
    assert first.value.status == 429 and first.value.retry_after is not None
    nexus.url = "http://nowhere"
    nexus._http.close()  # whoever asked now would fail otherwise
    with pytest.raises(Refused) as second:
        nexus.documents(None, "", 1)
    assert second.value.status == 429 and 0 < (second.value.retry_after or 0) <= first.value.retry_after


def test_the_same_answer_comes_by_both_ways(nexus: Nexus) -> None:
    add(nexus, ("gripper.md", MANUAL))
    question = "How fast does the gripper open?"
    *pieces, whole = nexus.chat([{"role": "user", "content": question}], "default")
    *others, within = nexus.ask_within("a-session", question, "default")
    assert "".join(map(str, pieces)) == "".join(map(str, others)) == within["response"]
    assert [s["chunk_id"] for s in whole["sources"]] == [s["chunk_id"] for s in within["sources"]] != []


def test_why_is_asked_of_the_collection_as_it_was(nexus: Nexus) -> None:
    add(nexus, ("gripper.md", MANUAL))
    before = nexus.explain("gripper", "default", 1)
    add(nexus, ("other.md", "# Other\n\nAnother gripper.\n"))
    assert len(nexus.explain("gripper", "default", 1)["hits"]) == len(before["hits"]) == 1
    assert len(nexus.explain("gripper", "default", 10_000)["hits"]) == 2  # no such state: as it is now


# ── pages ───────────────────────────────────────────────────────────────────────────────────────


def open_page(nexus: Nexus, name: str) -> AppTest:
    page = AppTest.from_string(f"from deployments.athena import {name}\n{name}.draw()\n", default_timeout=20)
    page.session_state["nexus"] = nexus
    page.run()
    check(page)
    return page


def check(page: AppTest) -> None:
    assert not page.exception, page.exception


def words_of(page: AppTest) -> str:
    """All that is written on a page, without the signs that keep it text."""
    kinds = (page.text, page.markdown, page.caption, page.error, page.warning, page.title, page.info)
    return "\n".join(str(one.value) for kind in kinds for one in kind).replace("\\", "").replace("\u2060", "")


def test_chat_asks_and_shows_what_the_answer_rests_on(nexus: Nexus) -> None:
    add(nexus, ("gripper.md", MANUAL))
    page = open_page(nexus, "chat")
    assert "Nothing was asked yet" in words_of(page)
    page.chat_input[0].set_value("How fast does the gripper open?").run()
    check(page)
    assert "The gripper opens in two seconds" in words_of(page)
    (source,) = [one.label for one in page.expander]
    assert "**\\[1\\]** Gripper" in source
    (why,) = [button for button in page.button if "Why" in button.label]
    why.click().run()
    check(page)
    assert page.table and "By meaning" in page.table[0].value.columns


def test_chat_says_that_the_documents_do_not_answer(nexus: Nexus) -> None:
    add(nexus, ("gripper.md", MANUAL))
    page = open_page(nexus, "chat")
    page.chat_input[0].set_value("Who won the football match yesterday?").run()
    check(page)
    assert "do not answer" in words_of(page)


def test_a_session_is_told_what_is_said_in_it(nexus: Nexus) -> None:
    add(nexus, ("gripper.md", MANUAL))
    page = open_page(nexus, "chat")
    page.text_input(key="chat-session").set_value("shift-7").run()
    page.chat_input[0].set_value("How fast does the gripper open?").run()
    check(page)
    assert nexus.context_of("shift-7").startswith("user: How fast")


def test_pages_say_that_nexus_is_away() -> None:
    away = Nexus("http://127.0.0.1:9", "k")
    for name in ("chat", "upload", "documents"):
        assert "Nexus does not answer at `http://127.0.0.1:9`" in words_of(open_page(away, name))


@pytest.mark.parametrize(
    ("status", "after", "words"),
    [
        (401, None, "does not work"),
        (403, None, "may not"),
        (429, 7.0, "in 7 s"),
        (503, None, "is busy"),
        (404, None, "so"),
    ],
)
def test_pages_say_what_nexus_refused(nexus: Nexus, status: int, after: float | None, words: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def refuse(self: Nexus) -> None:
        raise Refused(status, f"so it says ![x]({EVIL})", after)

    monkeypatch.setattr(Nexus, "collections", refuse)
    page = open_page(nexus, "documents")
    assert words in words_of(page) and f"![x]({EVIL})" not in str(page.error[0].value)


def test_files_are_uploaded_and_each_says_what_became_of_it(nexus: Nexus) -> None:
    page = open_page(nexus, "upload")
    page.text_input(key="upload-new").set_value("arms")
    page.file_uploader[0].upload("gripper.md", MANUAL.encode(), "text/markdown")
    page.file_uploader[0].upload("tool.bin", b"\x7fELF\x02\x01\x01" + bytes(200), "application/octet-stream")
    page.run()
    (send,) = [button for button in page.button if button.label == "Add 2 files"]
    send.click().run()
    said = words_of(page)
    deadline = time.monotonic() + 60
    while "added, 1 passage" not in said or "failed: the file is a program" not in said:
        assert time.monotonic() < deadline, said
        page.run()
        check(page)
        said = words_of(page)
    assert [one["source"] for one in nexus.documents("arms", "", 10)["documents"]] == ["gripper.md"]


def test_documents_are_listed_page_by_page(nexus: Nexus) -> None:
    add(nexus, *((f"{n:02}.md", f"# Part {n:02}\n\nPart {n} is fine.\n") for n in range(23)))
    page = open_page(nexus, "documents")
    first = {one.label for one in page.button if one.label.startswith("Part")}
    next(one for one in page.button if one.label == "More").click().run()
    second = {one.label for one in page.button if one.label.startswith("Part")}
    assert (len(first), len(second), first & second) == (20, 3, set())
    next(one for one in page.button if one.label == "Back").click().run()
    assert {one.label for one in page.button if one.label.startswith("Part")} == first


def press(page: AppTest, label: str) -> None:
    next(one for one in page.button if one.label == label).click()
    page.run()
    check(page)


def test_jobs_are_shown_with_their_files_and_a_failed_one_is_tried_again(nexus: Nexus) -> None:
    assert "There are no jobs" in words_of(open_page(nexus, "jobs"))
    add(nexus, ("gripper.md", MANUAL), ("tool.md", ""))
    page = open_page(nexus, "jobs")
    assert "1 added, 1 failed in default" in words_of(page)
    page.button[0].click().run()
    check(page)
    assert {"gripper.md", "tool.md"} <= set(re.findall(r"\w+\.md", words_of(page)))
    (job,) = nexus.jobs(None, 5)["jobs"]
    before = nexus.job(job["job_id"])["files"][1]
    press(page, "Try again")
    deadline = time.monotonic() + 30
    while (now := nexus.job(job["job_id"])["files"][1])["state"] != "failed" or now["ended_at"] == before["ended_at"]:
        assert time.monotonic() < deadline
    press(page, "All jobs")
    assert "What became of its files" in words_of(page)


def test_a_job_is_cancelled_when_sure(nexus: Nexus) -> None:
    job = nexus.announce([File("late.md", b"# Late\n\nIt is late.\n")], "default")  # its bytes are not sent
    assert "1 more on their way" in words_of(open_page(nexus, "documents"))
    page = open_page(nexus, "jobs")
    page.button[0].click().run()
    press(page, "Cancel this job")
    assert nexus.job(job["job_id"])["state"] == "cancelled"
    assert "on their way" not in words_of(open_page(nexus, "documents"))
    assert "cancelled" in words_of(page)


def test_a_session_is_shown_told_more_asked_and_cleared(nexus: Nexus) -> None:
    add(nexus, ("gripper.md", MANUAL))
    nexus.tell("dock-7", "The gripper ![x](http://evil.example/x) waits.")
    page = open_page(nexus, "sessions")
    page.session_state["sessions"] = ["dock-7"]
    page.run()
    assert "![x](http://evil.example/x) waits" in page.text[0].value
    page.text_area[0].set_value("It is cold.")
    press(page, "Add to the context")
    assert nexus.context_of("dock-7").endswith("It is cold.")
    page.chat_input[0].set_value("How fast does the gripper open?").run()
    check(page)
    assert "The gripper opens in two seconds" in words_of(page)
    press(page, "Clear the session")
    assert nexus.context_of("dock-7") == "" and "told nothing yet" in words_of(page)


def test_a_name_that_no_session_can_have_is_refused_and_said(nexus: Nexus) -> None:
    page = open_page(nexus, "sessions")
    page.session_state["sessions"] = ["a b"]
    page.run()
    assert "a session id is 1 to 128 letters" in words_of(page)


def test_a_policy_is_shown_tried_and_done(shared_door: FrontDoor, url: str) -> None:
    nexus = Nexus(url, key_of(shared_door, "painters"))
    hot = Path(shared_door.lent.config.home) / "hot" / "painters"
    hot.mkdir(parents=True)
    (hot / "large.txt").write_text("x" * 2000)
    assert "There are no policies" in words_of(open_page(nexus, "policies"))
    rule = {
        "conditions": [{"field": "size", "operator": ">", "value": 1000}],
        "actions": [{"type": "move", "target": "cold"}],
    }
    nexus._ask("PUT", "/policies/large-to-cold", json=rule)
    page = open_page(nexus, "policies")
    press(page, "Show what it would do")
    assert "1 move planned · 1 of 1 files match" in words_of(page) and "hot → cold" in words_of(page)
    assert (hot / "large.txt").exists()
    press(page, "Yes, do it")
    assert "It did" in words_of(page) and not (hot / "large.txt").exists()
    nexus.close()


# ── the cluster ─────────────────────────────────────────────────────────────────────────────────

GIB = 2**30


def state(**fields: object) -> dict[str, object]:
    """What `GET /status` says of two machines, one of them away."""
    gpu = {
        "index": 0, "model": "H100", "memory_bytes": 80 * GIB, "taken_bytes": 20 * GIB, "planned": [],
        "claims": [{"holder": "generator-0@sark#a", "bytes": 40 * GIB}],
    }  # fmt: skip
    sark = {"name": "sark", "address": "192.0.2.1", "alive": True, "cpus": 8, "memory_bytes": 64 * GIB, "gpus": [gpu]}
    clu = {**sark, "name": "clu", "alive": False, "gpus": None}
    deployed = {
        "name": "generator-0@sark", "model": "large", "node": "sark", "status": "HEALTHY",
        "replicas": {"running": 2, "starting": 1}, "ongoing": 5, "queued": 3,
    }  # fmt: skip
    voters = [
        {"id": 1, "role": "leader", "term": 4, "lag": 0}, {"id": 2, "role": "follower", "term": 4, "lag": 7},
        {"id": 3, "role": "absent", "why": "no answer"},
    ]  # fmt: skip
    usual = {
        "nodes": [sark, clu], "deployments": [deployed], "coordinator": {"voters": voters}, "collections": [],
        "differences": [], "drained": [], "unknown": {}, "placement": None,
    }  # fmt: skip
    return {**usual, **fields}


def texts_of(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_has_every_machine_gpu_replica_queue_and_voter() -> None:
    picture = drawing.draw(state())
    said = texts_of(picture)
    for words in ("sark", "clu", "does not answer", "GPU 0  H100", "60 GiB of 80 GiB", "generator-0 · large",
                  "5 at work, 3 waiting", "leader, term 4", "7 behind", "away", "held by others"):  # fmt: skip
        assert words in said, words
    bars = {
        group.find("{*}title").text: float(group.find("{*}rect").get("width"))
        for group in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}g")
        if group.find("{*}title") is not None
    }
    assert bars["generator-0"] == pytest.approx(2 * bars["others"], rel=1e-2)


def test_names_in_the_picture_are_text() -> None:
    node = {**state()["nodes"][1], "name": "<script>alert(1)</script>&\x1b[31m", "address": '"><image href="x"/>'}
    picture = drawing.draw(state(nodes=[node]))
    tags = {element.tag.partition("}")[2] for element in ElementTree.fromstring(picture).iter()}
    assert tags <= {"svg", "g", "rect", "text", "line", "circle", "title"} and "\x1b" not in picture


def test_a_machine_alone_has_all_replicas_and_what_is_not_known_is_left_out() -> None:
    (sark, _) = state()["nodes"]
    alone = {**state()["deployments"][0], "name": "gateway", "node": None, "model": None}
    said = texts_of(drawing.draw(state(nodes=[{**sark, "gpus": []}], deployments=[alone], coordinator=None)))
    assert "gateway" in said and "Coordinator" not in said
    assert texts_of(drawing.draw(state(nodes=[], deployments=None, coordinator=None))) == []


def test_the_picture_of_the_models_says_how_each_does() -> None:
    model = {
        "name": "large", "place": "sark", "in_flight": 3, "first_token_seconds": 0.25, "tokens_per_second": 40.0,
        "success_rate": 0.5, "requests": 10, "failures": 4, "ejected_seconds": None,
    }  # fmt: skip
    idle = {
        **model,
        "name": "small",
        "place": "",
        "first_token_seconds": None,
        "tokens_per_second": None,
        "requests": 0,
    }
    said = texts_of(drawing.draw_models({"models": [model, idle]}))
    for words in ("large @ sark", "3", "250 ms", "40", "6 of 10 (50% of late)", "small", "–", "nothing was asked"):
        assert words in said, words


def test_the_cluster_page_draws_what_the_front_door_says(nexus: Nexus, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page(nexus, "cluster")
    assert "The machines are not known now" in words_of(page)  # this front door has nobody to ask
    differing = state(differences=["sark has 1 GPU, and 2 are described"], unknown={"gpus": "no answer"})
    monkeypatch.setattr(Nexus, "status", lambda self: differing)
    page.run()
    check(page)
    pictures = [one.proto.imgs[0] for one in page.get("image")]
    caption = pictures[0].caption.replace("\\", "")
    assert caption == "2 machines, away: clu, 1 GPU, 2 replicas, 3 voters, led by voter 1"
    assert "2 are described" in words_of(page) and "Not known: gpus (no answer)" in words_of(page)


# ── a browser ───────────────────────────────────────────────────────────────────────────────────


@needs_chromium
def test_hostile_documents_load_link_and_run_nothing(nexus: Nexus, url: str, tmp_path: Path) -> None:
    """In title, name, passage, answer and text: no request leaves, no script runs, no element is made of it."""
    name = f"![n]({EVIL}n.png) <img src={EVIL}m.png>.md"
    add(nexus, (name, HOSTILE))
    key = nexus._headers["authorization"].removeprefix("Bearer ")
    with browsing.athena(url, key, tmp_path / "log") as athena, browsing.chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(browsing.link(athena))
        ask(tab, "How is the latch of the gripper opened?")
        tab.get_by_test_id("stExpander").first.click()
        tab.get_by_text("opened by hand").first.wait_for()
        check_harmless(tab, asked, athena)
        tab.get_by_role("button", name="Why this answer?").click()
        tab.get_by_test_id("stTable").wait_for()
        check_harmless(tab, asked, athena)
        tab.keyboard.press("Escape")
        tab.get_by_role("link", name="Documents").click()
        tab.get_by_role("button", name="picture").click()
        tab.get_by_text("Show what was read of it").click()
        tab.get_by_test_id("stText").filter(has_text="opened by hand").wait_for()
        check_harmless(tab, asked, athena)


def ask(tab: Tab, question: str) -> None:
    box = tab.get_by_placeholder("Ask your documents")
    box.fill(question)
    box.press("Enter")
    tab.get_by_role("button", name="Why this answer?").wait_for()


def check_harmless(tab: Tab, asked: list[str], athena: str) -> None:
    made = tab.evaluate(
        "() => [...document.querySelectorAll('img, a, script, iframe, object, svg a')]"
        ".map(e => e.getAttribute('src') || e.getAttribute('href') || e.textContent || '')"
    )
    assert [one for one in made if "evil" in one or "javascript" in one or "wasRun" in one] == []
    assert tab.evaluate("() => window.wasRun") is None
    assert tab.locator(".katex, .mermaid, [data-testid=stMermaid]").count() == 0
    assert [one for one in asked if not one.startswith((athena, "data:", "blob:"))] == []
    assert "evil.example" in tab.content()  # it is shown, as text
