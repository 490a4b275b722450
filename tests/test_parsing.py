"""Bytes become blocks, and whatever a file does, it does in its own child process."""

import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from pathlib import Path

import pytest

from nexus import parsing
from nexus.errors import InvalidRequest, NexusError, Unavailable, Unprocessable, UnsupportedMedia
from nexus.parsing import Limits, Parsers, detect
from nexus.types import Block, Parsed
from tests.conftest import DATA

TRIAL = "application/x-trial"
# A zygote with one format more: the document says what its reader does.
TRIAL_ZYGOTE = """
import ctypes, json, os, signal, socket, sys, time
from nexus import parsing
def read_trial(content, draft):
    verb, _, argument = content.decode().partition(" ")
    match verb:
        case "hang": signal.pause()
        case "spin":
            while True: pass
        case "drip":
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(0, (1 << 16).to_bytes(8, "big"))
            while True: time.sleep(0.02); os.write(0, b"x")
        case "stop": os.kill(os.getpid(), signal.SIGSTOP)
        case "eat": held = [bytearray(1 << 20) for _ in range(1 << 20)]
        case "eat-in-c": ctypes.memset(ctypes.CDLL(None).malloc(1 << 33), 1, 1)
        case "crash": os.kill(os.getpid(), signal.SIGSEGV)
        case "exit": os._exit(3)
        case "raise": raise KeyError("/secret/path")
        case "shout": print("{}"); os.write(1, b"out"); os.write(2, b"err")
        case "flood": draft.add("text", "x" * (2 << 20))
        case "say": os.write(0, len(argument).to_bytes(8, "big") + argument.encode()); os._exit(0)
        case "announce": os.write(0, (1 << 62).to_bytes(8, "big")); signal.pause()
        case "write": os.write(os.open(argument, os.O_WRONLY), b"x")
        case "connect": socket.create_connection(("127.0.0.1", int(argument)), 5)
        case "visit":
            with open(argument) as pipe: pipe.read()
        case "tell":
            facts = {"environment": sorted(os.environ), "modules": sorted(sys.modules)}
            facts |= {"open": os.listdir("/proc/self/fd"), "limits": open("/proc/self/limits").read()}
            draft.add("text", json.dumps(facts))
    draft.add("text", "done " + verb)
parsing._READERS["application/x-trial"] = read_trial
parsing.serve()
"""
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="these limits and /proc are Linux's")


@pytest.fixture(scope="module")
def parsers() -> Iterator[Parsers]:
    with Parsers(Limits()) as parsers:
        yield parsers


@pytest.fixture(scope="module")
def trial() -> Iterator[Callable[[str], Parsed]]:
    with trial_parsers(Limits(memory_bytes=128 << 20, cpu_seconds=1, output_bytes=1 << 20)) as parsers:
        yield lambda text: try_out(parsers, text)


def trial_parsers(limits: Limits) -> Parsers:
    parsing._READERS.setdefault(TRIAL, parsing._read_text)
    parsers = Parsers(limits)
    parsers._plain.command = [sys.executable, "-P", "-c", TRIAL_ZYGOTE]
    return parsers


def try_out(parsers: Parsers, text: str) -> Parsed:
    return parsers.parse("trial", text.encode(), TRIAL)


def show(parsed: Parsed) -> list[tuple[object, ...]]:
    """Blocks as (kind, text, lines or page or level, whichever the format has)."""
    return [(b.kind, b.text, *filter(None, (b.level, b.page, b.first_line, b.last_line))) for b in parsed.blocks]


def wait_for_end(process: int) -> None:
    descriptor = os.pidfd_open(process)
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    assert poller.poll(20_000), f"process {process} goes on"
    os.close(descriptor)


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


# Formats


def test_markdown(parsers: Parsers) -> None:
    source = """---
title: The manual
tags: [a, b]
nested: {not: kept}
---

# First *heading*

Two lines
become one.

- one
  1. inner `code`
- two

  ```python
  x = 1

  y = 2
  ```

| a | b |
|---|---|
| 1 | [link](http://x) |

Setext
------

<div>raw <b>html</b><script>alert()</script></div>

![a picture](x.png)
"""
    parsed = parsers.parse("guide.md", source.encode())
    assert (parsed.title, parsed.media_type) == ("The manual", "text/markdown")
    assert parsed.metadata == {"title": "The manual", "tags": "a, b"}
    assert show(parsed) == [
        ("heading", "First heading", 1, 7, 7),
        ("text", "Two lines become one.", 9, 10),
        ("list", "- one\n  1. inner code\n- two", 12, 14),
        ("code", "x = 1\n\ny = 2", 17, 19),
        ("table", "a | b\n1 | link", 22, 24),
        ("heading", "Setext", 2, 26, 27),
        ("text", "raw html", 29, 29),
        ("text", "a picture", 31, 31),
    ]
    assert parsed.blocks[4].header


def test_a_rule_is_not_front_matter(parsers: Parsers) -> None:
    parsed = parsers.parse("a.md", b"---\njust: [text\n---\n\nmore")
    assert "more" in parsed.blocks[-1].text
    assert parsed.metadata == {}


def test_markup_left_open_in_markdown_hides_nothing(parsers: Parsers) -> None:
    source = (
        b"The <select> tag, ssh <user>@<host>.\n\n<div hidden>\n\nstays\n\n<your-name> is\n\n<script>\n\n<b>ends</b>"
    )
    parsed = parsers.parse("a.md", source)
    assert show(parsed) == [
        ("text", "The tag, ssh <user>@<host>.", 1, 1),
        ("text", "stays", 5, 5),
        ("text", "<your-name> is", 7, 7),
    ]


def test_plain_text(parsers: Parsers) -> None:
    parsed = parsers.parse("notes/day one.txt", b"first\r\nsecond\r\n\r\n\r\nthird")
    assert parsed.title == "day one"
    assert show(parsed) == [("text", "first\nsecond", 1, 2), ("text", "third", 5, 5)]


@pytest.mark.parametrize("name", ["settings.yaml", "settings.toml", "server.log", "notes.org"])
def test_other_text(parsers: Parsers, name: str) -> None:
    assert show(parsers.parse(name, b"a: 1\n  b: 2")) == [("text", "a: 1\n  b: 2", 1, 2)]


def test_restructured_text_keeps_words_and_drops_signs(parsers: Parsers) -> None:
    source = """.. redirect-from::

   Old/Page

Title with ``code``
===================

.. contents:: On this page

See :doc:`the page <../Other-Page>`, :doc:`/a/Some-Page`, :ref:`name <label>`, :class:`~pkg.Thing`,
`outside <http://x>`__, missing_ and |unknown|.

.. code-block:: bash
   :linenos:

   $ make

   $ make install

.. tabs::

   .. group-tab:: On ``Linux``

      Use apt.

.. note::

   Mind the gap.

.. versionadded:: 2.0

term
   Its meaning.

.. list-table::
   :header-rows: 1

   * - A
     - B
   * - x
     - y

Part
----

* one
* two

.. csv-table:: Sizes
   :header: Name, Size

   "one, or two", 1.5

.. toctree::

   First-Page
   Titled <Second>

.. include:: /etc/passwd
.. csv-table:: From a file
   :file: /etc/passwd

.. raw:: html

   <b>raw</b>
"""
    parsed = parsers.parse("page.rst", source.encode())
    assert parsed.title == "Title with code"
    assert show(parsed) == [
        ("heading", "Title with code", 1, 5, 5),
        ("text", "See the page, Some Page, name, Thing, outside, missing and unknown.", 10, 11),
        ("code", "$ make\n\n$ make install", 16, 18),
        ("text", "On Linux: Use apt.", 22, 24),
        ("text", "Note: Mind the gap.", 26, 28),
        ("text", "Added in version 2.0", 30, 30),
        ("text", "term: Its meaning.", 32, 33),
        ("table", "A | B\nx | y", 38, 41),
        ("heading", "Part", 2, 43, 43),
        ("list", "- one\n- two", 46, 47),
        ("text", "Sizes", 49, 49),
        ("table", "Name | Size\none, or two | 1.5", 49, 49),
        ("list", "- First Page\n- Titled", 56, 57),
    ]


def test_html(parsers: Parsers) -> None:
    source = """<!DOCTYPE html><html><head><title> A  page </title><style>p {}</style></head><body>
<nav>menu</nav><h1>Top <small>part</small></h1><p>f<b>oo</b> bar<br>next</p><script>alert()</script>
<ul><li>one<ul hidden><li>no</ul></li><li><p>two</p><p>more</p></li></ul><ol start=3><li>first</ol>
<div style="display: none">hidden</div><p aria-hidden=true>hidden</p>
<table><caption>Cap</caption><tr><th>h<th>i<tr><td>1<br>2<td>3</table>
<table><tr><td><h2>Laid out</h2><custom-tag>inline</custom-tag> text</td></tr></table>
<pre>a<br>  b</pre><dl><dt>term<dd>meaning</dl></body></html>"""
    parsed = parsers.parse("index.html", source.encode())
    assert parsed.title == "A page"
    assert show(parsed) == [
        ("heading", "Top part", 1),
        ("text", "foo bar\nnext"),
        ("list", "- one\n- two\n  more"),
        ("list", "3. first"),
        ("text", "Cap"),
        ("table", "h | i\n1 2 | 3"),
        ("heading", "Laid out", 2),
        ("text", "inline text"),
        ("code", "a\n  b"),
        ("text", "term: meaning"),
    ]


def test_html_takes_the_main_part_and_the_declared_charset(parsers: Parsers) -> None:
    page = '<html><meta charset="shift_jis"><body>around<main><p>日本語</main></body></html>'
    assert show(parsers.parse("a.html", page.encode("shift_jis"))) == [("text", "日本語")]


def make_pdf(encrypt: str | None = None, text: bool = True) -> bytes:
    from reportlab.pdfgen.canvas import Canvas

    file = io.BytesIO()
    canvas = Canvas(file, encrypt=encrypt)
    for page in (1, 2) if text else ():
        canvas.setFont("Helvetica", 20)
        canvas.drawString(72, 760, f"Chapter {page}")
        canvas.setFont("Helvetica", 11)
        lines = ["The first paragraph has", "two lines.", "", "The second one stands alone on its line."]
        for number, line in enumerate(lines):
            canvas.drawString(72, 720 - 14 * number, line)
        canvas.showPage()
    canvas.rect(10, 10, 50, 50, fill=1)
    canvas.save()
    return file.getvalue()


def test_pdf(parsers: Parsers) -> None:
    parsed = parsers.parse("book.pdf", make_pdf())
    assert parsed.title == "Chapter 1"
    assert show(parsed) == [
        ("heading", "Chapter 1", 1, 1),
        ("text", "The first paragraph has two lines.", 1),
        ("text", "The second one stands alone on its line.", 1),
        ("heading", "Chapter 2", 1, 2),
        ("text", "The first paragraph has two lines.", 2),
        ("text", "The second one stands alone on its line.", 2),
    ]


def test_pdf_with_a_password(parsers: Parsers) -> None:
    with pytest.raises(Unprocessable, match="protected by a password: remove it and add the file again"):
        parsers.parse("book.pdf", make_pdf(encrypt="secret"))


def test_pdf_of_pictures(parsers: Parsers) -> None:
    with pytest.raises(Unprocessable, match=r"only pictures, no text \(1 pages\): run text recognition"):
        parsers.parse("scan.pdf", make_pdf(text=False))


def make_docx() -> bytes:
    import docx
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    document = docx.Document()
    document.add_heading("Big", 0)
    document.add_heading("Part", 2)
    paragraph = document.add_paragraph("Some text")
    paragraph._p.append(parse_xml(f"<w:ins {nsdecls('w')}><w:r><w:t> added</w:t></w:r></w:ins>"))
    paragraph._p.append(parse_xml(f"<w:del {nsdecls('w')}><w:r><w:delText> removed</w:delText></w:r></w:del>"))
    box = f"<w:p {nsdecls('w')}><w:r><w:t>in a box</w:t></w:r></w:p>"
    both = "".join(f"<mc:{way}><w:txbxContent>{box}</w:txbxContent></mc:{way}>" for way in ("Choice", "Fallback"))
    mc = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    paragraph._p.append(parse_xml(f"<w:r {mc} {nsdecls('w')}><mc:AlternateContent>{both}</mc:AlternateContent></w:r>"))
    document.add_paragraph("one", style="List Bullet")
    document.add_paragraph("two", style="List Bullet")
    table = document.add_table(2, 2)
    for cell, text in zip((c for row in table.rows for c in row.cells), ["Name", "Size", "x", "1"], strict=True):
        cell.text = text
    content = f"<w:sdt {nsdecls('w')}><w:sdtContent>{box}</w:sdtContent></w:sdt>"
    document.element.body.insert(-1, parse_xml(content))
    document.core_properties.title = ""
    return save(document)


def save(document: object) -> bytes:
    file = io.BytesIO()
    document.save(file)  # type: ignore[attr-defined]
    return file.getvalue()


def test_docx(parsers: Parsers) -> None:
    parsed = parsers.parse("letter.docx", make_docx())
    assert parsed.title == "Big"
    assert show(parsed) == [
        ("heading", "Big", 1),
        ("heading", "Part", 2),
        ("text", "Some text added"),
        ("text", "in a box"),
        ("list", "- one\n- two"),
        ("table", "Name | Size\nx | 1"),
        ("text", "in a box"),
    ]
    assert parsed.blocks[5].header


def test_pptx(parsers: Parsers) -> None:
    import pptx

    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[1])
    slide.shapes.title.text = "Plan"
    slide.placeholders[1].text = "one\ntwo"
    slide.placeholders[1].text_frame.paragraphs[1].level = 1
    slide.notes_slide.notes_text_frame.text = "say hello"
    slide = deck.slides.add_slide(deck.slide_layouts[6])
    group = slide.shapes.add_group_shape().shapes.add_group_shape()
    group.shapes.add_textbox(0, 0, 9, 9).text_frame.text = "grouped"
    table = slide.shapes.add_table(2, 2, 0, 0, 9, 9).table
    for number, text in enumerate(["a", "b", "1", "2"]):
        table.cell(number // 2, number % 2).text = text
    parsed = parsers.parse("deck.pptx", save(deck))
    assert parsed.title == "Plan"
    assert show(parsed) == [
        ("heading", "Plan", 1, 1),
        ("list", "- one\n  - two", 1),
        ("text", "Notes: say hello", 1),
        ("heading", "Slide 2", 1, 2),
        ("text", "grouped", 2),
        ("table", "a | b\n1 | 2", 2),
    ]


def test_xlsx(parsers: Parsers) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.title = "Sales"
    for row in (["Our sales"], ["Item", None, "Price"], ["x", None, 1.0], [], ["y", None, 2.5], ["z", None, 3]):
        book.active.append(row)
    book.create_sheet("Empty")
    book.create_sheet("Other").append(["=1+1", "text"])
    parsed = parsers.parse("book.xlsx", save(book))
    assert parsed.title == "book"
    assert show(parsed) == [
        ("heading", "Sales", 1, 1),
        ("text", "Our sales", 1),
        ("table", "Item | Price\nx | 1", 1),
        ("table", "y | 2.5\nz | 3", 1),
        ("heading", "Other", 1, 3),
        ("text", "text", 3),
    ]
    assert [block.header for block in parsed.blocks if block.kind == "table"] == [True, False]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'name,note\nx,"one, ""two""\nthree"\n'),
        ("a.csv", 'name;note\nx;one, "two" three\n'),
        ("a.tsv", 'name\tnote\nx\tone, "two" three\n'),
    ],
)
def test_separated_values(parsers: Parsers, name: str, text: str) -> None:
    parsed = parsers.parse(name, text.encode())
    lines = text.count("\n")
    assert show(parsed) == [("table", 'name | note\nx | one, "two" three', 1, lines)]
    assert parsed.blocks[0].header


def test_json(parsers: Parsers) -> None:
    value = {"title": "Shop", "open": True, "none": None, "tags": ["a", 1],
             "owner": {"name": "Ann  B"}, "items": [{"id": 1, "at": [{"x": 0.5}]}, {"id": 2}]}  # fmt: skip
    parsed = parsers.parse("shop.json", json.dumps(value).encode())
    assert parsed.title == "Shop"
    assert [block.text for block in parsed.blocks] == [
        "title: Shop\nopen: true\ntags: a, 1",
        "owner.name: Ann B",
        "items[0].id: 1\nitems[0].at[0].x: 0.5",
        "items[1].id: 2",
    ]


def test_json_records(parsers: Parsers) -> None:
    records = [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]
    expected = ["id: 1\nname: x", "id: 2\nname: y"]
    assert [b.text for b in parsers.parse("a.json", json.dumps(records).encode()).blocks] == expected
    lines = "\n\n".join(map(json.dumps, records))
    assert show(parsers.parse("a.ndjson", lines.encode())) == [("text", expected[0], 1, 1), ("text", expected[1], 3, 3)]


DAMAGED = "größtenteils schöne Überraschungen für müde Füße ".encode() * 9 + b"\xff"  # UTF-8 but for one byte


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'{"a": 1,\n "b" 2}', "not valid at line 2, column 6"),
        ("a.ndjson", b'{"a": 1}\n{', "not valid at line 2, column 2"),
        ("a.xml", b"<a>\n<b></a>", "not valid: .*line 2"),
        ("a.docx", b"PK\3\4 cut", "damaged or cut short"),
        ("a.pdf", b"%PDF-1.7 cut", "damaged and cannot be opened"),
        ("a.txt", b" \n\t\n", "no text in it"),
        ("a.html", b"<script>x</script>", "no text in it"),
        ("a.txt", b"good start \xff\xfe\xfa middle \x80\x81 end \xc3(", "decoded at byte 11: save the file as UTF-8"),
        ("a.txt", DAMAGED, f"decoded at byte {len(DAMAGED) - 1}"),
        ("a.txt", b"\xc0\xaf overlong", "decoded at byte 0"),
        ("a.txt", b"lone \xed\xa0\x80 surrogate", "decoded at byte 5"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        ("a.json", b'{"a":' * 150 + b"1" + b"}" * 150, "nested too deeply"),
        ("a.html", b"<div>" * 3000 + b"x", "nested too deeply"),
    ],
)
def test_what_cannot_be_read_says_why(parsers: Parsers, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(Unprocessable, match=reason):
        parsers.parse(name, content)


def test_an_empty_file(parsers: Parsers) -> None:
    with pytest.raises(InvalidRequest, match="the file is empty"):
        parsers.parse("a.md", b"")


def test_mail(parsers: Parsers) -> None:
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = "Grüße", "ann@x.example", "bob@x.example"
    message.set_content("Hello\n\nBye\n")
    message.add_alternative("<p>HTML hello</p>", subtype="html")
    message.add_attachment(b"x", maintype="application", subtype="pdf", filename="plan.pdf")
    parsed = parsers.parse("m.eml", message.as_bytes())
    assert parsed.title == "Grüße"
    assert parsed.metadata == {"subject": "Grüße", "from": "ann@x.example", "to": "bob@x.example"}
    assert show(parsed) == [
        ("text", "From: ann@x.example\nTo: bob@x.example\nSubject: Grüße"),
        ("text", "Hello"),
        ("text", "Bye"),
        ("list", "Attachments:\n- plan.pdf"),
    ]


def test_mail_of_html_alone(parsers: Parsers) -> None:
    message = EmailMessage()
    message["Subject"] = "News"
    message.set_content("<h1>Top</h1><p>text", subtype="html")
    assert show(parsers.parse("m.eml", message.as_bytes()))[1:] == [("heading", "Top", 1), ("text", "text")]


def test_xml(parsers: Parsers) -> None:
    source = """<?xml version="1.0"?>
<!-- no --><list>
<item key="1"><name>x</name>
<size>2</size></item>
<para>Some <b>bold</b> text.</para></list>"""
    assert show(parsers.parse("a.xml", source.encode("utf-16"))) == [
        ("text", "item (key=1)\nname: x\nsize: 2", 3, 4),
        ("text", "Some bold text.", 5, 5),
    ]


def test_source_code(parsers: Parsers) -> None:
    source = b"import os\n\n\ndef f():\n    a = 1\n\n    return a\n\n\nclass C:\n    pass\n"
    parsed = parsers.parse("src/tool.py", source)
    assert (parsed.title, parsed.media_type) == ("tool.py", "text/x-python")
    assert show(parsed) == [
        ("code", "import os", 1, 1),
        ("code", "def f():\n    a = 1\n\n    return a", 4, 7),
        ("code", "class C:\n    pass", 10, 11),
    ]


# What the bytes are


@pytest.mark.parametrize(
    ("name", "content", "declared", "expected"),
    [
        ("a.html", b"%PDF-1.4 x", None, "application/pdf"),
        ("a.pdf", b"junk\n%PDF-1.4 x", None, "application/pdf"),
        ("a.pdf", b"<html><body>x", None, "text/html"),
        ("a.txt", b"\xef\xbb\xbf<!-- c -->\n<!DOCTYPE HTML>", None, "text/html"),
        ("a.pdf", b"plain words", "application/pdf", "text/plain"),
        ("a.txt", b"MIME-Version: 1.0\r\nSubject: x\r\n\r\nbody", None, "message/rfc822"),
        ("a.txt", b"<?xml version='1.0'?><a/>", None, "application/xml"),
        ("a.txt", b"MZ is how a text may begin", None, "text/plain"),
        ("a.py", b"x", "text/html", "text/x-python"),
        ("Makefile", b"all:", None, "text/x-makefile"),
        ("unknown", b"x", "text/markdown; charset=utf-8", "text/markdown"),
        ("unknown.zzz", b"x", "application/octet-stream", "text/plain"),
        ("A.MD", b"x", None, "text/markdown"),
        (".hidden.md", b"x", None, "text/markdown"),
        ("a.txt", "zwei Wörter".encode("utf-16-le"), None, "text/plain"),
    ],
)
def test_content_comes_before_the_name(name: str, content: bytes, declared: str | None, expected: str) -> None:
    assert detect(name, content, declared) == expected


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\x7fELF" + bytes(60), "a program"),
        ("a.md", b"MZ\x90\0" + bytes(60), "a program"),
        ("a.pdf", b"\x89PNG\r\n\x1a\n" + bytes(60), "a picture"),
        ("a.txt", b"some\0words\0and\0more" * 20, "binary data of an unknown kind, although it is called .txt"),
        ("a.txt", bytes(range(1, 32)) * 20, "binary data"),
        ("a.zip", b"PK\3\4" + bytes(60), "an archive: unpack it"),
        ("a.docx", b"PK\3\4" + bytes(26) + b"mimetypeapplication/vnd.oasis.opendocument.textPK\5\6" + bytes(18), "ODT"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Word 97-2003 document: save it as .docx"),
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le"), "password"),
        ("a.txt", b"{\\rtf1 text}", "RTF: save it as .docx"),
        ("a.ipynb", b'{"cells": []}', "a notebook: export it as Markdown"),
    ],
)
def test_unsupported_formats_are_named(name: str, content: bytes, reason: str) -> None:
    with pytest.raises(UnsupportedMedia, match=reason) as caught:
        detect(name, content)
    assert "What can be read: Markdown" in caught.value.message


def test_office_files_are_known_by_their_parts_not_their_name() -> None:
    assert detect("a.pptx", make_docx()) == parsing._DOCX


TEXTS = {
    "utf-8": "naïve café – Привет",
    "utf-16-le": "plain, but wide\nGrüße",
    "utf-16-be": "plain, but wide\nGrüße",
    "utf-32-be": "wider",
    "cp1252": "café naïve £100",
    "shift_jis": "日本語の文書です。",
    "gb18030": "你好，世界。这是一个测试文档。",
    "koi8_r": "Привет, мир! Это небольшой текст на русском языке.",
    "euc_kr": "안녕하세요. 이것은 한국어 텍스트입니다.",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_encodings(parsers: Parsers, encoding: str) -> None:
    assert [block.text for block in parsers.parse("a.txt", TEXTS[encoding].encode(encoding)).blocks] == [
        TEXTS[encoding]
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_marks_of_byte_order(parsers: Parsers, encoding: str) -> None:
    assert parsers.parse("a.txt", "日本 ok".encode(encoding)).blocks[0].text == "日本 ok"


def test_text_is_normalised_and_without_control_characters(parsers: Parsers) -> None:
    parsed = parsers.parse("a.txt", "e\u0301 \x07bell \x1b[31mred\x1b[0m \u202eevil\u202c \U000e0041tag".encode())
    assert parsed.blocks[0].text == "\u00e9 bell red evil tag"


@pytest.mark.parametrize(
    ("source", "title"),
    [("../../etc/passwd", "passwd"), ("C:\\x\\y.txt", "y"), ("/a/b/", "b"), ("..", "."), ("/", "untitled"),
     ("\u202etxt.exe\0", "txt"), ("n" * 500 + ".txt", "n" * 200), ("emoji 🎉.txt", "emoji 🎉")],
)  # fmt: skip
def test_names_are_only_names(parsers: Parsers, source: str, title: str) -> None:
    assert parsers.parse(source, b"text").title == title


# Hostile documents

LAUGHS = b"".join(b'<!ENTITY l%d "%s">' % (n, b"&l%d;" % (n - 1) * 10 if n else b"lol") for n in range(12))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("laughs.xml", b"<!DOCTYPE x [" + LAUGHS + b"]><x>&l11;</x>"),
        ("laughs.xml", b"<!DOCTYPE x [" + LAUGHS + b']><x a="&l11;">x</x>'),
        ("file.xml", b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>'),
        ("file.svg", b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>'),
    ],
)
def test_entities_are_refused(parsers: Parsers, name: str, content: bytes) -> None:
    with pytest.raises(Unprocessable, match="entit"):
        parsers.parse(name, content)


@pytest.mark.parametrize("padding", [0, 5000])
def test_entities_in_office_files_give_nothing(parsers: Parsers, padding: int) -> None:
    entity = b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    word = b'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    body = b"<w:body><w:p><w:r><w:t>before &e;</w:t></w:r></w:p></w:body>"
    xml = b"<!--" + b"x" * padding + b"-->" + entity + b"<w:document " + word + b">" + body + b"</w:document>"
    try:
        text = str(parsers.parse("a.docx", repack(make_docx(), {"word/document.xml": xml})).blocks)
    except Unprocessable as error:
        text = error.message
    assert "root:" not in text
    assert ("entities" if padding == 0 else "before") in text


def repack(archive: bytes, changes: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        parts = {name: old.read(name) for name in old.namelist()} | changes
        for name, data in parts.items():
            new.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize(
    "limits", [Limits(archive_ratio=20), Limits(archive_entries=20), Limits(archive_bytes=2 << 20)], ids=str
)
def test_archives_that_grow_too_large(limits: Limits) -> None:
    bomb = repack(make_docx(), {"word/zeros.bin": bytes(3 << 20), **{f"word/{n}": b"" for n in range(10)}})
    content = io.BytesIO(bomb).getvalue()
    with Parsers(limits) as parsers, pytest.raises(Unprocessable, match="unpacks to") as caught:
        parsers.parse("bomb.docx", content)
    assert caught.value.code == "archive_limits_exceeded"


ANCHORS = b"".join(b"b%d: &a%d [%s]\n" % (n, n, b"*a%d, " % (n - 1) * 9) for n in range(1, 20))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("quotes.md", b">" * 100_000 + b" x"),
        ("brackets.md", b"[" * 20_000),
        ("columns.csv", b",".join(b"c%d" % n for n in range(100_000))),
        ("tags.html", b"<p>x</p>" * 20_000),
        ("ticks.rst", b"`" * 10_000),
        ("parts.eml", b"Subject: x\nContent-Type: message/rfc822\n\n" * 1000),
        ("anchors.md", b"---\na: &a0 [x]\n" + ANCHORS + b"---\ntext"),
    ],
)
def test_pathological_documents_end(parsers: Parsers, name: str, content: bytes) -> None:
    try:
        assert parsers.parse(name, content).blocks
    except Unprocessable as error:
        assert error.message


# The guard


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        ("spin", "needed more than 1 s of CPU"),
        ("eat", "needed more than 128 MiB of memory"),
        ("eat-in-c", "crashed its parser .*128 MiB"),
        ("crash", r"crashed its parser \(SIGSEGV\)"),
        ("exit", r"crashed its parser \(exit 3\)"),
        ("flood", "more than 1 MiB of text"),
        ("raise", r"damaged, or not what it says it is \(KeyError\)"),
        ("say {}", "answer nonsense"),
        ("say ", "answer nonsense"),
        ("say not json", "answer nonsense"),
        ("say " + "[" * 9999, "answer nonsense"),
        ('say {"error": "SystemExit", "message": "x"}', "answer nonsense"),
        ('say {"title": "", "metadata": {}, "blocks": [["virus", "", 0, null, null, null, false]]}', "nonsense"),
        ('say {"title": "", "metadata": {}, "blocks": [["text", 1, 0, null, null, null, false]]}', "nonsense"),
        ('say {"title": "", "metadata": {}, "blocks": [["text", "", 0, null, null, null]]}', "nonsense"),
        ("say " + "x" * 1_100_000, "answer nonsense"),
        ("announce", "answer nonsense"),
    ],
    ids=lambda text: text[:20],
)
@needs_linux
def test_what_a_document_does_ends_in_its_worker(trial: Callable[[str], Parsed], verb: str, reason: str) -> None:
    with pytest.raises(Unprocessable, match=reason) as caught:
        trial(verb)
    assert "/secret" not in caught.value.message
    assert trial("shout").blocks[-1].text == "done shout"


@needs_linux
def test_a_worker_writes_to_no_file(trial: Callable[[str], Parsed], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("as it was")
    with pytest.raises(Unprocessable, match="OSError"):
        trial(f"write {target}")
    assert target.read_text() == "as it was"


def test_a_document_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_SLACK_SECONDS", 3600)  # the caller's own clock must not be what ends it
    with trial_parsers(Limits(wall_seconds=1.5)) as parsers:
        with pytest.raises(Unprocessable, match=r"needed more than 1\.5 s"):
            try_out(parsers, "hang")
        assert parsers._plain.process is not None and parsers._plain.process.poll() is None


def test_signals_that_the_host_blocks_or_ignores_still_end_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_SLACK_SECONDS", 3600)

    def start(parsers: Parsers) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGCHLD, signal.SIGXCPU})
        try_out(parsers, "shout")

    with ThreadPoolExecutor(1) as pool, trial_parsers(Limits(wall_seconds=1.5)) as parsers:
        before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
        pool.submit(start, parsers).result(timeout=60)
        signal.signal(signal.SIGALRM, before)
        parsed = pool.submit(try_out, parsers, "hang")
        with pytest.raises(Unprocessable, match=r"than 1\.5 s"):
            parsed.result(timeout=60)


@needs_linux
@pytest.mark.parametrize("verb", ["stop", "drip"])
def test_a_worker_that_stopped_its_own_clock(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    with trial_parsers(Limits()) as parsers:
        try_out(parsers, "shout")  # so that the zygote is there, and the caller's clock runs for the worker alone
        with monkeypatch.context() as patch, pytest.raises(Unprocessable, match="needed more than 60 s"):
            patch.setattr(parsing, "_SLACK_SECONDS", 0.5 - 60)
            try_out(parsers, verb)
        assert parsers._plain.process is not None
        left = set(children_of(parsers._plain.process.pid))
        for _ in range(200):  # each is a round through the zygote, which ends and buries those nobody waits for
            try_out(parsers, "shout")
            if left.isdisjoint(children_of(parsers._plain.process.pid)):
                break
        assert left.isdisjoint(children_of(parsers._plain.process.pid))


@needs_linux
def test_a_worker_has_little_to_take(trial: Callable[[str], Parsed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_SECRET", "canary")
    with trial_parsers(Limits()) as parsers:
        facts = json.loads(try_out(parsers, "tell").blocks[0].text)
    assert set(facts["environment"]) <= {"PATH", "LANG", "LC_CTYPE", "PYTHONPATH", "OPENBLAS_NUM_THREADS"}
    assert not {"torch", "ray", "fastapi"} & set(facts["modules"])
    assert len(facts["open"]) == 4  # its socket, /dev/null twice, and the listing itself
    for limit, value in (("Max file size", 0), ("Max core file size", 0), ("Max open files", 32), ("Max cpu time", 30)):
        assert re.search(rf"{limit} +{value} ", facts["limits"])


@needs_linux
def test_a_worker_has_no_network(trial: Callable[[str], Parsed]) -> None:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urn", "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a process leave the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(Unprocessable, match="OSError"):
            trial(f"connect {server.getsockname()[1]}")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_the_zygote_is_started_again(parsers: Parsers) -> None:
    parsers.parse("a.txt", b"x")
    first = parsers._plain.process.pid  # type: ignore[union-attr]
    os.kill(first, signal.SIGKILL)
    assert parsers.parse("a.txt", b"y").blocks[0].text == "y"
    assert parsers._plain.process.pid != first  # type: ignore[union-attr]


@needs_linux
def test_the_zygote_is_killed_while_a_document_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with trial_parsers(Limits()) as parsers, ThreadPoolExecutor(1) as pool:
        parsed = pool.submit(try_out, parsers, f"visit {pipe}")
        with pipe.open("w"):  # the worker is at work, and waits for what comes out of the pipe
            zygote = parsers._plain.process.pid  # type: ignore[union-attr]
            (worker,) = children_of(zygote)
            os.kill(zygote, signal.SIGKILL)
            wait_for_end(worker)
        pipe.write_text("x")  # the second attempt has come as far
        assert parsed.result(timeout=60).blocks


HOST = """
import sys
from nexus.parsing import Limits, Parsers
parsers = Parsers(Limits())
parsers.parse("a.txt", b"x")
print(parsers._plain.process.pid, flush=True)
sys.stdin.read()
"""


@needs_linux
def test_no_zygote_outlives_its_host() -> None:
    root = str(Path(parsing.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", HOST]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as host:
        assert host.stdout is not None
        zygote = int(host.stdout.readline())
        host.kill()
        wait_for_end(zygote)


@needs_linux
def test_close_ends_zygote_and_workers_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    parsers = trial_parsers(Limits())
    with ThreadPoolExecutor(1) as pool:
        parsed = pool.submit(try_out, parsers, f"visit {pipe}")
        with pipe.open("w"):
            zygote = parsers._plain.process.pid  # type: ignore[union-attr]
            (worker,) = children_of(zygote)
            parsers.close()
            wait_for_end(worker)
        with pytest.raises(Unavailable, match="closed"):
            parsed.result(timeout=60)
    with pytest.raises(Unavailable, match="closed"):
        parsers.parse("a.txt", b"x")
    assert os.listdir("/proc/self/fd") == before


def test_a_zygote_that_cannot_start() -> None:
    with Parsers(Limits()) as parsers:
        parsers._plain.command = [sys.executable, "-c", "raise SystemExit(1)"]
        with pytest.raises(Unavailable):
            parsers.parse("a.txt", b"x")


def test_many_threads_get_their_own_answers(parsers: Parsers) -> None:
    def parse(number: int) -> str:
        try:
            return parsers.parse(f"{number}.md", b"# n%d" % number if number % 5 else b" ").title
        except Unprocessable:
            return "none"

    with ThreadPoolExecutor(16) as pool:
        titles = list(pool.map(parse, range(100)))
    assert titles == [f"n{number}" if number % 5 else "none" for number in range(100)]


def test_a_large_document_both_ways(parsers: Parsers) -> None:
    text = "\n\n".join(f"paragraph {number} " + "x" * 2000 for number in range(2000))
    assert "\n\n".join(block.text for block in parsers.parse("a.txt", text.encode()).blocks) == text


def test_importing_the_parsers_is_light() -> None:
    command = "import sys, nexus.parsing; print(*sys.modules)"
    root = str(Path(parsing.__file__).parents[1])
    found = subprocess.run([sys.executable, "-c", command], env={"PYTHONPATH": root}, capture_output=True, check=True)
    assert not {"lxml", "docx", "pptx", "openpyxl", "docutils", "pypdfium2", "torch", "ray"} & set(
        found.stdout.decode().split()
    )


# Real files


def parse_all(parsers: Parsers, folder: Path, pattern: str, every: int = 1) -> dict[str, Parsed | NexusError]:
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())[::every]
    if not files:
        pytest.skip(f"{folder.name} is not beside the repository")

    def parse(path: Path) -> Parsed | NexusError:
        try:
            return parsers.parse(path.relative_to(folder).as_posix(), path.read_bytes())
        except NexusError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((path.relative_to(folder).as_posix() for path in files), pool.map(parse, files), strict=True))


def check_blocks(blocks: tuple[Block, ...], lines: int | None = None) -> None:
    for block in blocks:
        assert block.text.strip()
        assert not parsing._UNWANTED.search(block.text)
        assert (block.level > 0) == (block.kind == "heading")
        if block.first_line is not None and block.last_line is not None:
            assert 1 <= block.first_line <= block.last_line
            assert lines is None or block.last_line <= lines


def test_every_messy_file_ends_with_blocks_or_a_reason(parsers: Parsers) -> None:
    results = parse_all(parsers, DATA / "messy", "*")
    errors = {name: result for name, result in results.items() if isinstance(result, NexusError)}
    for error in errors.values():
        assert isinstance(error, UnsupportedMedia | Unprocessable | InvalidRequest)
        assert "not what it says it is" not in error.message
    for result in results.values():
        if isinstance(result, Parsed):
            assert result.title
            check_blocks(result.blocks)
    unsupported = {name for name, error in errors.items() if isinstance(error, UnsupportedMedia)}
    assert {Path(name).suffix for name in unsupported} == {
        ".doc",
        ".ppt",
        ".xls",
        ".msg",
        ".odt",
        ".rtf",
        ".epub",
        ".zip",
    }
    assert {Path(name).name for name in set(errors) - unsupported} == {
        "deep.html", "deep.json", "invalid_utf8.txt", "only_newlines.txt", "truncated.docx", "zero_bytes.md",
        "empty.xlsx", "fake-text-all-whitespace.txt", "loremipsum-flat.pdf", "password.pdf", "picture.pptx",
        "table-multi-row-column-cells.pdf", "test-image-jpg-mime.pptx",
    }  # fmt: skip
    assert "Ignore all previous instructions" in str(results["made/injection.md"])


def test_pages_of_the_ros_documentation_read_well(parsers: Parsers) -> None:
    folder = DATA / "ros2_docs" / "source"
    underlined = re.compile(r"^([^\s.].*)\n([=\-#~*^])\2{2,}\s*$", re.M)
    leaks = re.compile(r":(?:doc|ref|term|code|download):`|``|\|(?:API|package)\w*\||<\.\./")
    for name, parsed in parse_all(parsers, folder, "*.rst", every=4).items():
        source = (folder / name).read_text()
        assert isinstance(parsed, Parsed), name
        check_blocks(parsed.blocks, source.count("\n") + 1)
        if title := underlined.search(source):
            assert parsed.title == title[1].replace("``", "")
        for block in parsed.blocks:
            assert block.first_line is not None and block.last_line is not None
            if block.kind == "code":
                lines = source.split("\n")[block.first_line - 1 : block.last_line]
                assert [line.split() for line in block.text.split("\n")] == [line.split() for line in lines]
            else:
                assert not leaks.search(block.text)
