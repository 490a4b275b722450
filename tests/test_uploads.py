"""Hostile uploads, each made here and sent through the front door: what they get, and what they cost.

The numbers U1 to U10 are the rows of the list of bad uploads that these tests work through: names, sizes, archives,
PDF, XML, encodings, shapes, repetition, forms, and what is served back.
"""

import asyncio
import bz2
import copy
import gzip
import io
import json
import logging
import lzma
import os
import socket
import struct
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import psutil
import pytest
from httpx import Response
from starlette.types import ASGIApp, Message

from deployments.gateway import build
from nexus import parsing
from nexus.access import PERMISSIONS
from nexus.config import Config
from nexus.errors import UnsupportedMedia
from nexus.parsing import Limits, Parsers, detect
from nexus.types import Principal
from tests.conftest import Door
from tests.test_parsing import make_docx, make_pdf, needs_linux, repack

URL = "/rag/add_document"
SECRET = "root:"  # what stands in /etc/passwd


def upload(
    door: Door, name: str, content: bytes, kind: str = "application/octet-stream", tenant: str = "default"
) -> Response:
    return door.client.post(URL, files={"file": (name, content, kind)}, headers=door.headers(tenant))


def check_refused(answer: Response, status: int, code: str) -> str:
    """The problem's detail, which holds nothing of the server's."""
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert SECRET not in answer.text and "Traceback" not in answer.text
    return str(answer.json()["detail"])


def documents_of(door: Door, tenant: str = "default") -> list[dict]:
    return door.client.get("/rag/documents?limit=1000", headers=door.headers(tenant)).json()["documents"]


def stored_size(door: Door) -> int:
    """Bytes of the only document."""
    (document,) = door.lent.documents.documents(Principal("default", "tester", PERMISSIONS), None, "", 2)
    return document.size


def text_of(door: Door, name: str, content: bytes, kind: str | None = None) -> str:
    parsed = door.lent.ingestor.parsers.parse(name, content, kind)  # type: ignore[attr-defined]
    return "\n".join(block.text for block in parsed.blocks)


class Wire:
    """One request to an application, message by message, so that a test sees how much of it was taken."""

    def __init__(self, door: Door, max_body_bytes: int) -> None:
        config = Config(
            home=door.lent.config.home, http={"max_body_bytes": max_body_bytes, "allowed_hosts": ["testserver"]}
        )
        self.app: ASGIApp = build(replace(door.lent, config=config))
        self.key = door.headers()["authorization"].encode()
        self.taken = 0
        self.status = 0
        self.body = b""

    def post(self, kind: str, chunks: Iterable[bytes], length: bytes | None = None, leave: bool = False) -> int:
        """The status; `leave` hangs up after the last chunk instead of ending the body."""
        headers = [(b"host", b"testserver"), (b"authorization", self.key), (b"content-type", kind.encode())]
        headers += [(b"content-length", length)] if length is not None else []
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": URL, "raw_path": URL.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("testserver", 80),
        }  # fmt: skip
        end: Message = {"type": "http.disconnect"} if leave else {"type": "http.request", "body": b""}
        messages = ({"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks)
        self.taken = self.status = 0

        async def receive() -> Message:
            self.taken += 1
            return next(messages, end)

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            self.body = message.get("body", b"")

        asyncio.run(self.app(scope, receive, send))
        return self.status


FORM = "multipart/form-data; boundary=cut"
FILE_PART = b'--cut\r\ncontent-disposition: form-data; name="file"; filename="a.md"\r\n\r\n'
END = b"\r\n--cut--\r\n"


# U1: names


HOSTILE_NAMES = [
    "../../etc/passwd", "../../etc/cron.d/x.md", "..\\..\\x.md", "/etc/nexus-upload.md", "C:\\x.md", "\\\\host\\x.md",
    "con", "NUL.txt", "COM1.md", "%2e%2e%2f%2e%2e%2fx.md", "n" * 300 + ".md", "\u202efdp.exe.md", "emoji😀.md",
    "a/../../x.md", "~/x.md", "$(id).md", "x.md;rm -rf", "<script>alert(1)</script>.md", "..", ".", "-rf",
]  # fmt: skip


@pytest.mark.parametrize("way", ["form", "json"])
def test_u1_names_are_labels_and_nothing_is_written_under_them(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    below = tmp_path / "one" / "two" / "three"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)  # so that ../.. is a place where this test looks
    headers = door.headers()
    upload(door, "first.md", b"# first")
    before = sorted(tmp_path.rglob("*"))
    for name in [*HOSTILE_NAMES, str(tmp_path / "absolute.md")]:
        body = {"filename": name, "content": "# x\n\ntext"}
        form = {"data": {"filename": name}, "files": {"file": ("x.md", b"# x\n\ntext")}}
        answer = door.client.post(URL, headers=headers, **(form if way == "form" else {"json": body}))
        assert answer.status_code in (200, 201), (name, answer.text)
        assert len(bytes.fromhex(answer.json()["document_id"])) == 16
        shown = door.client.get(f"/rag/documents/{answer.json()['document_id']}", headers=headers)
        assert shown.json()["source"] == name
        assert "\u202e" not in shown.json()["title"]
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/etc/nexus-upload.md").exists()


@pytest.mark.parametrize("name", ["a\0.md", "a\r\nx: y.md", "a\x1b[31m.md", "n" * 1025, " "])
def test_u1_names_that_cannot_be_shown_are_refused(door: Door, name: str) -> None:
    answer = door.client.post(URL, data={"filename": name}, files={"file": ("x.md", b"x")}, headers=door.headers())
    check_refused(answer, 422, "invalid_request")


def test_u1_a_nul_in_the_name_of_the_part(door: Door) -> None:
    part = FILE_PART.replace(b"a.md", b"a\0.md") + b"text" + END
    headers = {**door.headers(), "content-type": FORM}
    check_refused(door.client.post(URL, content=part, headers=headers), 422, "invalid_request")


def test_u1_links_and_paths_in_a_tar_are_never_unpacked(door: Door) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        link = tarfile.TarInfo("link.md")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("../../x.md"))
    check_refused(upload(door, "a.tar", file.getvalue()), 415, "unsupported_media_type")


def test_u1_links_and_paths_in_an_office_file_are_never_unpacked(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = tmp_path / "one" / "two"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    file = io.BytesIO(repack(make_docx(), {"../../up.md": b"x", str(tmp_path / "absolute.md"): b"x"}))
    with zipfile.ZipFile(file, "a") as archive:
        link = zipfile.ZipInfo("word/link.xml")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    before = sorted(tmp_path.rglob("*"))
    answer = upload(door, "a.docx", file.getvalue())
    assert answer.status_code == 201 and SECRET not in answer.text
    assert sorted(tmp_path.rglob("*")) == before


# U2: sizes


SPOOLED = 1 << 20  # what a form keeps in memory before it goes to a temporary file


def open_temporary_files(folder: Path) -> list[int]:
    """Sizes of the files in a folder that this process holds open: they have no names there."""
    sizes = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/"):
                sizes.append(os.fstat(int(descriptor)).st_size)
        except OSError:  # the one that listed the folder
            continue
    return sizes


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@needs_linux
@pytest.mark.parametrize("kind", [FORM, "application/json"])
@pytest.mark.parametrize("length", [None, b"5", b"-1", b"x", b"\xb2"], ids=str)
def test_u2_a_body_without_end_is_cut_off_where_it_crosses_the_limit(
    door: Door, spool: Path, kind: str, length: bytes | None
) -> None:
    limit, chunk = 4 << 20, b"x" * (1 << 16)
    on_disk = 0

    def endless() -> Iterator[bytes]:
        nonlocal on_disk
        yield FILE_PART
        for _ in repeat(None):
            on_disk = max(on_disk, sum(open_temporary_files(spool)))
            yield chunk

    wire = Wire(door, limit)
    assert wire.post(kind, endless(), length) == 413
    assert json.loads(wire.body)["code"] == "too_large"
    assert wire.taken <= limit // len(chunk) + 2
    assert (on_disk > SPOOLED) == (kind == FORM)  # so this test sees the file
    assert on_disk <= limit
    assert not open_temporary_files(spool) and not list(spool.iterdir())
    assert documents_of(door) == []


@pytest.mark.parametrize("length", [b"4194305", str(100 << 30).encode(), b"9" * 5000])
def test_u2_an_announced_size_over_the_limit_is_refused_unread(door: Door, length: bytes) -> None:
    wire = Wire(door, 4 << 20)
    assert wire.post(FORM, repeat(b"x" * 1024), length) == 413
    assert wire.taken == 0


def test_u2_the_limit_itself_is_allowed_and_one_byte_more_is_not(door: Door) -> None:
    frame = len(b'{"filename":"a.md","content":""}')
    for size, status in ((2**20, 201), (2**20 + 1, 413)):
        body = b'{"filename":"a.md","content":"' + b"x" * (size - frame) + b'"}'
        wire = Wire(door, 2**20)
        assert len(body) == size
        assert wire.post("application/json", [body]) == status


@needs_linux
def test_u2_a_form_that_is_refused_for_another_reason_leaves_no_file(door: Door, spool: Path) -> None:
    wire = Wire(door, 8 << 20)
    other = END.replace(b"--\r\n", b"\r\n") + b'content-disposition: form-data; name="other"\r\n\r\nx' + END
    assert wire.post(FORM, [FILE_PART, *repeat(b"x" * (1 << 20), 3), other]) == 422
    assert not open_temporary_files(spool) and not list(spool.iterdir())


# U3: archives


def overlapping_zip(copies: int, kernel: int) -> bytes:
    """Many entries of one compressed part, as in the zip bomb of 42 kB that holds 5.5 GB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", bytes(kernel))
        for number in range(copies):
            entry = copy.copy(archive.filelist[0])
            entry.filename = f"word/{number}.xml"
            archive.filelist.append(entry)
    return file.getvalue()


def zip_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def make_xlsx() -> bytes:
    import openpyxl

    book, file = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["words"])
    book.save(file)
    return file.getvalue()


def make_pptx() -> bytes:
    import pptx

    deck, file = pptx.Presentation(), io.BytesIO()
    deck.slides.add_slide(deck.slide_layouts[0]).shapes.title.text = "words"
    deck.save(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("overlap.docx", lambda: overlapping_zip(540, 10 << 20)),
        ("entries.docx", lambda: repack(make_docx(), {f"{n}": b"" for n in range(10_001)})),
        ("ratio.docx", lambda: repack(make_docx(), {"word/zeros.bin": bytes(32 << 20)})),
        ("ratio.xlsx", lambda: repack(make_xlsx(), {"xl/zeros.bin": bytes(32 << 20)})),
        ("ratio.pptx", lambda: repack(make_pptx(), {"ppt/zeros.bin": bytes(32 << 20)})),
        ("ratio.docx", lambda: repack(make_docx(), {"word/document.xml": b"<a>" + b" " * (32 << 20) + b"</a>"})),
    ],
    ids=["overlap", "10,001 entries", "docx", "xlsx", "pptx", "the text itself"],
)
def test_u3_archives_over_the_limits(door: Door, name: str, make: Callable[[], bytes]) -> None:
    detail = check_refused(upload(door, name, make()), 422, "archive_limits_exceeded")
    assert "the limits are" in detail


def test_u3_an_archive_that_lies_about_its_sizes_gives_no_more_than_it_says(door: Door) -> None:
    text = b"<a>" + b" " * (64 << 20) + b"</a>"
    true, false = struct.pack("<I", len(text)), struct.pack("<I", 100)
    bomb = repack(make_docx(), {"word/document.xml": text})
    assert bomb.count(true) == 2  # before the part, and in the directory
    check_refused(upload(door, "lies.docx", bomb.replace(true, false)), 422, "document_unprocessable")


@pytest.mark.parametrize("name", ["42.zip", "42.docx", "42.md"])
def test_u3_a_zip_of_zips_is_not_opened(door: Door, name: str) -> None:
    nested = zip_of("0.zip", b"".join(zip_of(f"{n}.zip", zip_of("zeros", bytes(4 << 20))) for n in range(16)))
    assert "unpack it" in check_refused(upload(door, name, nested), 415, "unsupported_media_type")


def test_u3_an_archive_within_an_office_file_stays_closed(door: Door) -> None:
    inner = zip_of("inner.zip", overlapping_zip(540, 10 << 20))
    answer = upload(door, "a.docx", repack(make_docx(), {"word/embeddings/inner.zip": inner}))
    assert answer.status_code == 201


PNG_BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 50_000, 50_000, 8, 6, 0, 0, 0) + bytes(64)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.gz", gzip.compress(bytes(1 << 20))),
        ("a.md", gzip.compress(b"# text")),
        ("a.xz", lzma.compress(bytes(1 << 20))),
        ("a.bz2", bz2.compress(bytes(1 << 20))),
        ("a.zst", b"(\xb5/\xfd" + bytes(64)),
        ("a.png", PNG_BOMB),
        ("a.md", PNG_BOMB),
    ],
    ids=["gzip", "gzip-named-md", "xz", "bzip2", "zstandard", "png", "png-named-md"],  # gzip's bytes hold the time
)
def test_u3_compressed_files_and_pictures_are_not_opened(door: Door, name: str, content: bytes) -> None:
    check_refused(upload(door, name, content), 415, "unsupported_media_type")


def test_u3_a_picture_in_an_office_file_is_not_opened(door: Door) -> None:
    assert upload(door, "a.docx", repack(make_docx(), {"word/media/image1.png": PNG_BOMB})).status_code == 201


def test_u3_a_compressed_body_is_not_inflated(door: Door) -> None:
    body = gzip.compress(json.dumps({"filename": "a.md", "content": "x" * (8 << 20)}).encode())
    headers = {**door.headers(), "content-type": "application/json", "content-encoding": "gzip"}
    check_refused(door.client.post(URL, content=body, headers=headers), 400, "malformed_json")


def test_u3_an_svg_is_text_in_xml(door: Door) -> None:
    answer = upload(door, "a.svg", b'<?xml version="1.0"?><svg width="999999"><text>words</text></svg>')
    assert answer.status_code == 201
    assert documents_of(door)[0]["media_type"] in ("application/xml", "image/svg+xml")


# U4: PDF


def pdf(*objects: bytes, trailer: bytes = b"") -> bytes:
    """A PDF of these objects, the first of them its catalog; XREF in the trailer is the table's own place."""
    out, places = bytearray(b"%PDF-1.7\n"), []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = b"%d" % len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    out += b"trailer\n<</Size %d/Root 1 0 R%s>>\n" % (size, trailer.replace(b"XREF", start))
    return bytes(out + b"startxref\n" + start + b"\n%%EOF\n")


def stream(content: bytes, fields: bytes = b"") -> bytes:
    return b"<<%s/Length %d>>stream\n%s\nendstream" % (fields, len(content), content)


def deflated(pieces: Iterable[bytes], times: int) -> bytes:
    """A stream that was compressed several times over."""
    for _ in range(times):
        compress = zlib.compressobj(9)
        pieces = [b"".join([*map(compress.compress, pieces), compress.flush()])]
    return stream(b"".join(pieces), b"/Filter[%s]" % (b"/FlateDecode" * times))


WORDS = stream(b"BT /F 12 Tf 72 700 Td (Plain words of a page) Tj ET")
HELVETICA = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"


def page(
    *more: bytes, catalog: bytes = b"", kids: bytes = b"3 0 R", count: int = 1, content: bytes = WORDS,
    font: bytes = HELVETICA, trailer: bytes = b"",
) -> bytes:  # fmt: skip
    """A PDF of one page with some words; `more` are objects from 6 on."""
    return pdf(
        b"<</Type/Catalog/Pages 2 0 R%s>>" % catalog,
        b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, count),
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>",
        content, font, *more, trailer=trailer,
    )  # fmt: skip


COMPOSITE = (
    b"<</Type/Font/Subtype/Type0/BaseFont/X/Encoding/Identity-H/ToUnicode 6 0 R/DescendantFonts[<</Type/Font"
    b"/Subtype/CIDFontType2/BaseFont/X/CIDSystemInfo<</Registry(Adobe)/Ordering(Identity)/Supplement 0>>>>]>>"
)
BRANCH = b"<</Type/Pages/Parent 2 0 R/Count 10000/Kids[%s]>>"
PDFS: dict[str, Callable[[], bytes]] = {
    "circular /Prev": lambda: page(trailer=b"/Prev XREF"),
    "circular outline": lambda: page(
        b"<</Type/Outlines/First 7 0 R/Last 7 0 R/Count 1>>",
        b"<</Title(a)/Parent 6 0 R/Next 7 0 R/Prev 7 0 R/First 7 0 R/Last 7 0 R>>",
        catalog=b"/Outlines 6 0 R",
    ),
    "JavaScript": lambda: page(
        catalog=b"/OpenAction<</S/JavaScript/JS(canary; while \\(1\\) {})>>"
        b"/Names<</JavaScript<</Names[(a)<</S/JavaScript/JS(canary)>>]>>>>"
    ),
    "launch action": lambda: page(catalog=b"/OpenAction<</S/Launch/F(/bin/canary)>>"),
    "embedded file": lambda: page(
        stream(b"canary"),
        catalog=b"/Names<</EmbeddedFiles<</Names[(canary)<</Type/Filespec/F(canary)/EF<</F 6 0 R>>>>]>>>>",
    ),
    "XFA": lambda: page(deflated(repeat(b"<canary>" * (1 << 17), 100), 1), catalog=b"/AcroForm<</Fields[]/XFA 6 0 R>>"),
    "XMP with entities": lambda: page(
        stream(b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>', b"/Type/Metadata/Subtype/XML"),
        catalog=b"/Metadata 6 0 R",
    ),
    "deep arrays": lambda: page(catalog=b"/D " + b"[" * 200_000 + b"]" * 200_000),
}
PDF_BOMBS: dict[str, Callable[[], bytes]] = {
    "nested FlateDecode": lambda: page(content=deflated(repeat(bytes(1 << 20), 1536), 3)),
    "much text": lambda: page(content=deflated(repeat(WORDS * (1 << 14), 200), 2)),
    "RunLength": lambda: page(content=stream(b"\x81 " * (1 << 18) + b"\x80", b"/Filter/RunLengthDecode")),
    "1e6 pages claimed": lambda: page(count=10**6),
    "1e6 pages that are one": lambda: page(
        BRANCH % (b"7 0 R " * 100), BRANCH % (b"3 0 R " * 100), kids=b"6 0 R " * 100, count=10**6
    ),
    "a page tree in a circle": lambda: page(kids=b"2 0 R 3 0 R", count=10**6),
    "malformed Flate": lambda: page(content=stream(bytes(range(256)) * 3000, b"/Filter/FlateDecode")),
    "encrypted": lambda: make_pdf(encrypt="secret"),
}


@pytest.mark.parametrize("case", PDFS)
def test_u4_what_a_pdf_carries_beside_its_pages_is_left_alone(door: Door, case: str) -> None:
    content = PDFS[case]()
    assert upload(door, "a.pdf", content).status_code == 201
    assert text_of(door, "a.pdf", content) == "Plain words of a page"


@pytest.mark.parametrize("case", PDF_BOMBS)
def test_u4_pdfs_that_ask_for_too_much_end_in_their_worker(door: Door, case: str) -> None:
    check_refused(upload(door, "a.pdf", PDF_BOMBS[case]()), 422, "document_unprocessable")
    assert upload(door, "b.pdf", page()).status_code == 201  # the service goes on
    assert len(documents_of(door)) == 1


def test_u4_a_tounicode_map_of_all_numbers_ends(door: Door) -> None:
    ranges = b"1 beginbfrange\n<0000> <FFFFFFFF> <0041>\nendbfrange\n" * 10_000
    assert upload(door, "a.pdf", page(stream(ranges), font=COMPOSITE)).status_code in (201, 422)
    assert upload(door, "b.pdf", page()).status_code == 201


# U5: entities


WORD = b'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
LAUGHS = b"".join(b'<!ENTITY l%d "%s">' % (n, b"&l%d;" % (n - 1) * 10 if n else b"lol") for n in range(12))
BLOW_UP = b'<!ENTITY big "' + b"x" * 50_000 + b'">'


def entity(address: str) -> bytes:
    return f'<!ENTITY e SYSTEM "{address}">'.encode()


def doctyped(subset: bytes, use: bytes, root: bytes = b"x") -> bytes:
    return b'<?xml version="1.0"?><!DOCTYPE %s [%s]><%s>before %s</%s>' % (root, subset, root, use, root)


XXE: dict[str, Callable[[str], bytes]] = {
    "file": lambda _: doctyped(entity("file:///etc/passwd"), b"&e;"),
    "http": lambda address: doctyped(entity(address), b"&e;"),
    "parameter entity": lambda address: doctyped(b'<!ENTITY %% p SYSTEM "%s"> %%p;' % address.encode(), b""),
    "billion laughs": lambda _: doctyped(LAUGHS, b"&l11;"),
    "quadratic blow-up": lambda _: doctyped(BLOW_UP, b"&big;" * 50_000),
    "SVG": lambda address: doctyped(entity(address), b"<text>&e;</text>", b"svg"),
    "SVG with laughs": lambda _: doctyped(LAUGHS, b"<text>&l11;</text>", b"svg"),
    "RSS": lambda _: doctyped(entity("file:///etc/passwd"), b"<channel><title>&e;</title></channel>", b"rss"),
    "XMP": lambda _: doctyped(entity("file:///etc/passwd"), b"&e;", b"xmpmeta"),
    "UTF-16": lambda _: doctyped(LAUGHS, b"&l11;").decode().encode("utf-16"),
}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Nobody may connect to it: a test that ends with a visitor fails."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def address_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}/canary"


@pytest.mark.parametrize("case", XXE)
def test_u5_entities_are_refused_and_fetch_nothing(door: Door, listener: socket.socket, case: str) -> None:
    name = "a.svg" if case.startswith("SVG") else "a.xml"
    content = XXE[case](address_of(listener))
    assert "entit" in check_refused(upload(door, name, content), 422, "document_unprocessable")
    # Again in this process, which has the network that workers have not.
    assert "entit" in json.loads(parsing._read("a.xml", "application/xml", content, Limits()))["message"]


@pytest.mark.parametrize("part", ["word/document.xml", "word/styles.xml", "docProps/core.xml", "_rels/.rels"])
@pytest.mark.parametrize("padding", [0, 5000])
def test_u5_entities_in_office_files(door: Door, listener: socket.socket, part: str, padding: int) -> None:
    for subset, use in ((entity("file:///etc/passwd"), b"&e;"), (entity(address_of(listener)), b"&e;"),
                        (LAUGHS, b"&l11;")):  # fmt: skip
        root = b"w:document " + WORD if part == "word/document.xml" else b"x"
        body = b"<w:body><w:p><w:r><w:t>before %s</w:t></w:r></w:p></w:body>" % use if b"w:" in root else use
        xml = b"<!--%s--><!DOCTYPE x [%s]><%s>%s</%s>" % (b"x" * padding, subset, root, body, root.split()[0])
        content = repack(make_docx(), {part: xml})
        answer = upload(door, "a.docx", content)
        if padding == 0:
            assert "entities" in check_refused(answer, 422, "document_unprocessable")
        reply = parsing._read("a.docx", parsing._DOCX, content, Limits())
        assert SECRET.encode() not in reply and b"lol" not in reply


def test_u5_entities_in_sheets(door: Door, listener: socket.socket) -> None:
    sheet = b'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    for padding in (0, 5000):
        for subset, use in ((entity("file:///etc/passwd"), b"&e;"), (entity(address_of(listener)), b"&e;"),
                            (LAUGHS, b"&l11;")):  # fmt: skip
            cell = b'<sheetData><row><c t="inlineStr"><is><t>before %s</t></is></c></row></sheetData>' % use
            xml = b"<!--%s--><!DOCTYPE x [%s]><worksheet %s>%s</worksheet>" % (b"x" * padding, subset, sheet, cell)
            content = repack(make_xlsx(), {"xl/worksheets/sheet1.xml": xml})
            check_refused(upload(door, "a.xlsx", content), 422, "document_unprocessable")
            reply = parsing._read("a.xlsx", parsing._XLSX, content, Limits())
            assert SECRET.encode() not in reply and b"lol" not in reply


@pytest.mark.parametrize("name", ["a.xml", "a.svg", "a.html"])
def test_u5_addresses_in_a_document_are_not_visited(door: Door, listener: socket.socket, name: str) -> None:
    address = address_of(listener).encode()
    content = (
        b'<?xml version="1.0"?><?xml-stylesheet href="%b"?><!DOCTYPE svg SYSTEM "%b"><svg'
        b' xmlns:xi="http://www.w3.org/2001/XInclude" xsi:schemaLocation="x %b" xmlns:xsi="http://www.w3.org/2001/'
        b'XMLSchema-instance"><p>words</p><xi:include href="%b"/><xi:include href="file:///etc/passwd" parse="text"/>'
        b'<img src="%b"/></svg>' % ((address,) * 5)
    )
    assert upload(door, name, content).status_code in (201, 422)
    for media_type in ("application/xml", "text/html"):
        assert SECRET.encode() not in parsing._read(name, media_type, content, Limits())


# U6: encodings and types


GERMAN = "Die Prüfung der Größe überzeugt: schöne Möbel für müde Füße kosten 100 Euro."


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "utf-16", "utf-8-sig"])
def test_u6_what_is_declared_as_utf_8_and_is_not(door: Door, name: str, encoding: str) -> None:
    content = GERMAN.encode(encoding)
    assert upload(door, name, content, "text/plain; charset=utf-8").status_code == 201
    assert text_of(door, name, content, "text/plain; charset=utf-8") == GERMAN


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"\xc0\xaf\xc0\xae overlong", 0),
        (b"lone \xed\xa0\x80\xed\xb0\x80 surrogates", 5),
        (GERMAN.encode() * 9 + b" und \xe4\xf6\xfc", len(GERMAN.encode() * 9) + 5),
        (b"cut off " + "€".encode()[:2] + " then more ä".encode(), 8),
        (b"beyond \xf4\x90\x80\x80 unicode", 7),
    ],
    ids=["overlong", "surrogates", "mixed", "cut off", "beyond"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.json", "a.py"])
def test_u6_what_cannot_be_decoded_says_where(door: Door, name: str, content: bytes, place: int) -> None:
    detail = check_refused(upload(door, name, content, "text/plain"), 422, "document_unprocessable")
    assert f"at byte {place}:" in detail


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        (b"\x7fELF\x02\x01\x01" + bytes(200), 415),
        (b"MZ\x90\0" + bytes(200), 415),
        (b"GIF89a/*" + bytes(20) + b"*/=1;<script>alert(1)</script>", 415),
        (zip_of("a.md", b"# text"), 415),
        (b"\x7fELF\0" + b"words " * 1000, 415),  # as UTF-16 it would be words in Chinese
        (b"some words\0" + b"and more of them " * 1000, 415),
        (page(), "application/pdf"),
        (b"<!DOCTYPE html><script>1</script><p>words", "text/html"),
        (b"<!-- %PDF- -->\n<html><body>words", "text/html"),
        (repack(make_docx(), {}), parsing._DOCX),
    ],
    ids=[
        "ELF",
        "PE",
        "GIF and script",
        "zip",
        "ELF of words",
        "words and a zero",
        "PDF",
        "HTML",
        "HTML that speaks of PDF",
        "docx",
    ],
)
def test_u6_what_is_declared_as_text_and_is_not(door: Door, content: bytes, outcome: int | str) -> None:
    answer = upload(door, "a.txt", content, "text/plain")
    if isinstance(outcome, int):
        check_refused(answer, outcome, "unsupported_media_type")
    else:
        assert answer.status_code == 201, answer.text
        assert documents_of(door)[0]["media_type"] == outcome


# U7: shapes


MILLION = 10**6
SHAPES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "1e6 columns": ("a.csv", lambda: b",".join([b"a"] * MILLION) + b"\n" + b",".join([b"1"] * MILLION), ""),
    "1e6 empty columns": ("a.csv", lambda: b"," * MILLION + b"x", ""),
    "1e5 captions": ("a.csv", lambda: b"a\n" * 100_000, ""),
    "JSON lists": ("a.json", lambda: b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "JSON objects": ("a.json", lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "JSON left open": ("a.json", lambda: b"[" * MILLION, "nested too deeply"),
    "JSON lines": ("a.ndjson", lambda: b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "a JSON number": ("a.json", lambda: b"9" * MILLION, "damaged"),
    "quotes": ("a.md", lambda: b">" * MILLION + b" x", "no text"),
    "spaced quotes": ("a.md", lambda: b"> " * MILLION + b"x", "no text"),
    "paragraphs": ("a.html", lambda: b"<p>x</p>" * MILLION, "more than 400000 elements"),
    "open paragraphs": ("a.html", lambda: b"<p>x" * MILLION, "more than 400000 elements"),
    "items": ("a.html", lambda: b"<ul><li>x</li></ul>" * MILLION, "more than 400000 elements"),
    "tables": ("a.html", lambda: b"<table><tr><td>x</td></tr></table>" * MILLION, "more than 400000 elements"),
    "rows": ("a.html", lambda: b"<table>" + b"<TR><TD>x</TD></TR>" * MILLION, "more than 400000 elements"),
    "nested boxes": ("a.html", lambda: b"<div>" * MILLION, "more than 400000 elements"),
    "fewer nested boxes": ("a.html", lambda: b"<div>" * 300_000, "nested too deeply"),
    "ends of tags": ("a.html", lambda: b"</p>" * MILLION, "no text"),
    "HTML in mail": ("a.eml", lambda: b"Subject: x\nContent-Type: text/html\n\n" + b"<p>x" * MILLION, "elements"),
}


def worker_cpu_seconds(parsers: Parsers) -> float:
    """What all workers have used so far; they have ended."""
    zygotes = [psutil.Process(one.process.pid) for one in (parsers._plain, parsers._office) if one.process]
    assert zygotes
    while any(zygote.children() for zygote in zygotes):
        time.sleep(0.005)
    times = [zygote.cpu_times() for zygote in zygotes]
    return float(sum(one.children_user + one.children_system for one in times))


@needs_linux
@pytest.mark.parametrize("case", SHAPES)
def test_u7_shapes_end_within_five_seconds_of_cpu(case: str) -> None:
    name, make, reason = SHAPES[case]
    with Parsers(Limits(cpu_seconds=10)) as parsers:
        try:
            assert parsers.parse(name, make()).blocks and not reason
        except parsing.Unprocessable as error:
            assert reason and reason in error.message
        assert worker_cpu_seconds(parsers) < 5


@needs_linux
def test_u7_the_limit_of_cpu_ends_what_no_other_limit_does() -> None:
    with Parsers(Limits(cpu_seconds=1)) as parsers:
        with pytest.raises(parsing.Unprocessable, match="needed more than 1 s of CPU"):
            parsers.parse("a.md", b"> x\n" * MILLION)
        assert worker_cpu_seconds(parsers) < 2.5


@pytest.mark.parametrize(
    "content",
    [b"<!---->" * 580 + b"x", b"<!--" * 1000, b"<?xml " * 600, b"x-a:b\n" * 600, b"x:\n " * 1000, b" " * 4096,
     b"PK\x01\x02" * 200_000 + b"PK\5\6" + bytes(18), b"PK\3\4" + b"PK\x01\x02" * 200_000 + b"PK\5\6" + bytes(18)],
    ids=lambda content: str(content[:8]),
)  # fmt: skip
@pytest.mark.timeout(20)
def test_u7_looking_at_the_bytes_is_cheap(content: bytes) -> None:
    """No worker guards this: it happens where the request is."""
    try:
        assert detect("a.txt", content)
    except UnsupportedMedia as error:
        assert error.message


METADATA = ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"a": NaN}', '{"a": 1e999}', '{"a": %s}' % ("9" * 30)]


@pytest.mark.parametrize("metadata", METADATA, ids=lambda text: text[:20])
def test_u7_metadata_that_could_not_be_shown_again_is_refused(door: Door, metadata: str) -> None:
    form = {"files": {"file": ("a.md", b"# x")}, "data": {"metadata": metadata}}
    assert door.client.post(URL, headers=door.headers(), **form).status_code in (400, 422)
    body = b'{"filename": "a.md", "content": "x", "metadata": %s}' % metadata.encode()
    headers = {**door.headers(), "content-type": "application/json"}
    assert door.client.post(URL, content=body, headers=headers).status_code in (400, 422)
    assert documents_of(door) == []


# U8: again, and half


def test_u8_a_thousand_files_of_one_name_are_one_document(door: Door) -> None:
    headers = door.headers()
    answers = [
        door.client.post(URL, files={"file": ("a.md", b"# n%d" % (n // 10))}, headers=headers) for n in range(1000)
    ]
    assert [answer.status_code for answer in answers] == ([201] + [200] * 9) * 100
    assert len({answer.json()["document_id"] for answer in answers}) == 1
    assert len({answer.json()["version"] for answer in answers}) == 100
    (document,) = documents_of(door)
    assert document["title"] == "n99"


def test_u8_one_name_in_two_tenants_is_two_documents(door: Door) -> None:
    content = b"# One\n\nThe same words."
    first, second = (upload(door, "a.md", content, tenant=tenant) for tenant in ("one", "two"))
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["document_id"] != second.json()["document_id"]
    door.client.delete(f"/rag/documents/{first.json()['document_id']}", headers=door.headers("one"))
    assert [len(documents_of(door, tenant)) for tenant in ("one", "two")] == [0, 1]


@needs_linux
@pytest.mark.parametrize("kind", [FORM, "application/json"])
def test_u8_an_upload_given_up_half_way_leaves_nothing(
    door: Door, spool: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    wire = Wire(door, 8 << 20)
    start = FILE_PART if kind == FORM else b'{"filename": "a.md", "content": "'
    with caplog.at_level(logging.ERROR):
        wire.post(kind, [start, *repeat(b"x" * (1 << 20), 3)], b"%d" % (6 << 20), leave=True)
    assert wire.status != 201
    assert not caplog.records  # it is no fault of this service
    assert documents_of(door) == []
    assert not open_temporary_files(spool) and not list(spool.iterdir())


# U9: forms


PART = b'--cut\r\ncontent-disposition: form-data; name="%s"\r\n\r\n\r\n'
FORMS: dict[str, tuple[str, list[bytes], int]] = {
    "1e6 fields": (FORM, [PART % b"filename" * 1000], 400),
    "1e6 files": (FORM, [(FILE_PART + b"\r\n") * 1000], 400),
    "1e6 parts without a name": (FORM, [b"--cut\r\n\r\n\r\n" * 5000], 400),
    "1e6 parts with other headers": (FORM, [b"--cut\r\na: b\r\n\r\n\r\n" * 5000], 400),
    "no boundary": ("multipart/form-data", [PART % b"file" * 1000], 400),
    "an empty boundary": ("multipart/form-data; boundary=", [PART % b"file" * 1000], 400),
    "a huge boundary": ("multipart/form-data; boundary=" + "x" * 60_000, [PART % b"file" * 1000], 400),
    "a huge part header": (FORM, [FILE_PART[:-8], b"a" * (1 << 16)], 400),
    "a huge name of a header": (FORM, [b"--cut\r\n", b"a" * (1 << 16)], 400),
    "many part headers": (FORM, [b"--cut\r\n", b"a: b\r\n" * 10_000], 400),
    "a huge field": (FORM, [PART[:-2] % b"metadata", b"a" * (1 << 16)], 400),
}


@pytest.mark.parametrize("case", FORMS)
def test_u9_forms_are_refused_early(door: Door, case: str) -> None:
    kind, chunks, status = FORMS[case]
    wire = Wire(door, 64 << 20)
    assert wire.post(kind, (chunk for chunk in [*chunks[:-1], *repeat(chunks[-1], 1000)])) == status
    assert wire.taken <= (2 if case != "a huge field" else 20)
    assert documents_of(door) == []


@pytest.mark.parametrize(
    "filling", [b"x", b"\r\n", b"\r\n--cu", b"\r", b"-", b"\r\n--cut" + b"x"], ids=lambda filling: repr(filling)
)
@pytest.mark.parametrize("where", ["before", "within", "after"])
@pytest.mark.timeout(60)
def test_u9_what_fills_a_form_costs_what_its_size_costs(door: Door, filling: bytes, where: str) -> None:
    """Of 16 MiB; work that grew with the square of it would not end in time."""
    filler = [filling * ((1 << 16) // len(filling))] * 256
    form = {"before": [*filler, b"\r\n", FILE_PART, b"# words", END], "after": [FILE_PART, b"# words", END, *filler],
            "within": [FILE_PART, *filler, END]}[where]  # fmt: skip
    form.insert(0, b"") if where != "within" else form.insert(1, b"\x7fELF\0")  # refused before it is read
    wire = Wire(door, 64 << 20)
    assert wire.post(FORM, form) in (201, 400, 415, 422)


def test_u9_lines_like_a_boundary_in_the_content_are_content(door: Door) -> None:
    content = b"# words\n\n--cut\n\n--other--\n\n --cut--\n\nlast words"
    body = FILE_PART + content + END
    headers = {**door.headers(), "content-type": FORM}
    assert door.client.post(URL, content=body, headers=headers).status_code == 201
    assert stored_size(door) == len(content)


def test_u9_the_boundary_itself_in_the_content_ends_it(door: Door) -> None:
    body = FILE_PART + b"# words\r\n--cut\r\nsmuggled" + END
    headers = {**door.headers(), "content-type": FORM}
    check_refused(door.client.post(URL, content=body, headers=headers), 400, "invalid_request")


def test_u9_a_form_in_a_form_is_not_opened(door: Door) -> None:
    inner = b'--in\r\ncontent-disposition: form-data; name="collection"\r\n\r\nother\r\n--in--\r\n'
    part = FILE_PART[:-2] + b"content-type: multipart/mixed; boundary=in\r\n\r\n"
    headers = {**door.headers(), "content-type": FORM}
    answer = door.client.post(URL, content=part + inner + END, headers=headers)
    assert answer.status_code == 201
    assert [(d["source"], d["collection"]) for d in documents_of(door)] == [("a.md", "default")]
    assert stored_size(door) == len(inner)


def test_u9_the_form_parser_is_new_enough() -> None:
    from importlib.metadata import version

    assert tuple(map(int, version("python-multipart").split("."))) >= (0, 0, 27)


# U10: nothing is served back


def test_u10_no_answer_is_a_page_and_every_answer_says_not_to_guess(door: Door) -> None:
    headers = door.headers()
    hostile = b"<!DOCTYPE html><p>words</p><script>alert(1)</script>"
    added = upload(door, "a.html", hostile)
    identity = added.json()["document_id"]
    answers = [added, upload(door, "a.svg", b"<svg><script>alert(1)</script></svg>"), upload(door, "x", b"\x7fELF\0")]
    answers += [door.client.get(path, headers=headers) for path in (
        "/rag/documents", f"/rag/documents/{identity}", f"/rag/documents/{identity}/content", "/nothing", "/livez",
        "/openapi.json",
    )]  # fmt: skip
    answers += [door.client.post("/rag/search", json={"query": "words"}, headers=headers), door.client.get("/rag")]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"].partition(";")[0] in ("application/json", "application/problem+json")
