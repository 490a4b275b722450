"""Athena in a browser against a whole Nexus: files in, a question, its sources and why, a document out, and back."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect

from deployments.athena import starting
from tests.browsing import chromium, needs_chromium
from tests.running import ROOT, Running, free_port, running_nexus, until

pytestmark = [pytest.mark.system, pytest.mark.timeout(600), needs_chromium]

MANUALS = ROOT / "deployments" / "manuals"
QUESTION = "How do I clear an E-217 that stays latched?"


@pytest.fixture(scope="module")
def nexus() -> Iterator[Running]:
    with running_nexus(NEXUS_ATHENA__PORT=str(free_port())) as running:
        yield running


@contextmanager
def foreground(nexus: Running) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`nexus athena` as in a terminal, and the link that it prints."""
    with subprocess.Popen(
        [sys.executable, "-m", "deployments.cli", "athena"], cwd=ROOT, env=nexus.environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("Athena is at http://127.0.0.1:"), said
            url = said.split()[3]
            until(60, lambda: httpx.get(url.partition("/?")[0] + "/_stcore/health").status_code == 200)
            yield process, url
        finally:
            process.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def face(nexus: Running) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    with foreground(nexus) as running:
        yield running


@pytest.fixture(scope="module")
def tab(face: tuple["subprocess.Popen[str]", str]) -> Iterator[Tab]:
    """A page that is signed in, and has asked nobody but Athena by the end."""
    _, link = face
    expect.set_options(timeout=30_000)
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(link)
        expect(tab.get_by_text("Nothing was asked yet")).to_be_visible()
        yield tab
        origin = link.partition("/?")[0]
        assert [url for url in asked if not url.startswith((origin, "data:", "blob:"))] == []


def shoot(tab: Tab, name: str) -> None:
    """A picture for whoever wants to look at one: where ATHENA_SHOTS says."""
    if folder := os.environ.get("ATHENA_SHOTS"):
        tab.screenshot(path=Path(folder) / f"{name}.png")


def go(tab: Tab, name: str) -> None:
    tab.get_by_test_id("stSidebarNav").get_by_role("link", name=name, exact=True).click()
    expect(tab.get_by_role("heading", name=name, exact=True)).to_be_visible()


def test_three_files_are_uploaded_and_the_bad_one_says_why(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "tool.bin").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(200))
    go(tab, "Upload")
    tab.locator("input[type=file]").set_input_files(
        [MANUALS / "error-codes.md", MANUALS / "incident-report-ir-2041.pdf", tmp_path / "tool.bin"]
    )
    tab.get_by_role("button", name="Add 3 files").click()
    expect(tab.get_by_text("2 added, 1 failed")).to_be_visible()
    expect(tab.get_by_text("failed: the file is a program")).to_be_visible()
    shoot(tab, "upload")


def test_an_answer_shows_its_sources_and_why_it_is_so(tab: Tab) -> None:
    go(tab, "Chat")
    box = tab.get_by_placeholder("Ask your documents")
    box.fill(QUESTION)
    box.press("Enter")
    expect(tab.get_by_text("clear only with the service card").first).to_be_visible()
    source = tab.get_by_test_id("stExpander").filter(has_text="Error codes of the fleet").first
    source.locator("summary").press("Enter")  # by keyboard
    expect(source.get_by_test_id("stText")).to_contain_text("stay latched")
    expect(tab.get_by_text("Found as well, and not cited")).to_be_visible()
    shoot(tab, "chat")
    tab.get_by_role("button", name="Why this answer?").click()
    why = tab.get_by_role("dialog")
    expect(why.get_by_role("table")).to_contain_text(re.compile(r"cited \[\d\]"))
    expect(why.get_by_text("Removed", exact=True)).to_be_visible()
    shoot(tab, "why")
    tab.keyboard.press("Escape")
    expect(why).not_to_be_visible()


def test_a_document_is_looked_at_deleted_when_sure_and_gone(tab: Tab) -> None:
    go(tab, "Documents")
    tab.get_by_role("button", name="Incident report").click()
    card = tab.get_by_role("dialog")
    expect(card.get_by_text("application/pdf")).to_be_visible()
    delete = card.get_by_role("button", name="Delete")
    expect(delete).to_be_disabled()
    card.get_by_text("Show its versions").click()
    expect(card.get_by_text(re.compile(r"10 passages · since \d+ · current"))).to_be_visible()
    card.get_by_text("Show what was read of it").click()
    expect(card.get_by_test_id("stText").first).to_contain_text("IR-2041")
    shoot(tab, "document")
    card.get_by_text("Yes, delete it").click()
    delete.click()
    expect(tab.get_by_role("button", name="Incident report")).not_to_be_visible()
    expect(tab.get_by_role("button", name="Error codes of the fleet")).to_be_visible()
    shoot(tab, "documents")


def test_a_nexus_that_goes_away_is_missed_and_found_again(nexus: Running, tab: Tab) -> None:
    nexus.must("down")
    go(tab, "Chat")
    away = tab.get_by_text(f"Nexus does not answer at {nexus.url}").first
    expect(away).to_be_visible()
    shoot(tab, "away")
    nexus.must("up")
    expect(away).not_to_be_visible()
    expect(tab.get_by_text("clear only with the service card").first).to_be_visible()  # the conversation is still there


def test_ctrl_c_ends_it_and_nexus_up_serves_it_beside(
    nexus: Running, face: tuple["subprocess.Popen[str]", str]
) -> None:
    process, _ = face
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=30)
    assert (process.returncode, said.splitlines()[-1], "Traceback" in complained) == (0, "Athena is stopped.", False)
    assert json.loads(nexus.nexus("status", "--json").stdout)["athena"]["state"] == "not started"
    link = next(word for word in nexus.must("up", "--athena").split() if "/?token=" in word)
    found = starting.find(nexus.home)
    assert found is not None and nexus.json("status")["athena"] == {"state": "running", "url": found.url}
    assert (nexus.home / "run" / "athena.json").stat().st_mode & 0o077 == 0
    with httpx.Client() as browser:
        assert browser.get(link).status_code == 303
        assert browser.get(found.url, headers={"accept": "text/html"}).status_code == 200
    again = nexus.must("athena")
    assert found.url in again and link not in again
    nexus.must("down")
    assert not found.is_alive() and starting.find(nexus.home) is None
