"""The rows of bad uploads, U1 to U10 of notes/security.md: where each of their cases is proved, and what was missing.

| row | cases | proved in tests/test_uploads.py, unless said otherwise |
|---|---|---|
| U1 | paths, drives, devices, escapes, long, reversed, emoji | `u1_names_are_labels_and_nothing_is_written_...` |
| U1 | NUL, line breaks, escape sequences, too long | `u1_names_that_cannot_be_shown_are_refused`, `u1_a_nul_in_...` |
| U1 | links and paths in tar and zip | `u1_links_and_paths_in_a_tar_...`, `u1_links_and_paths_in_an_office_file_...` |
| U1 | all of them by way of a job | below |
| U2 | limit + 1, wrong length, without end, 100 GB announced | `u2_...`; by way of a job below |
| U2 | temporary files are gone | `u2_a_form_that_is_refused_...`, `u8_an_upload_given_up_half_way_leaves_nothing` |
| U3 | overlap, 10,001 entries, ratio, office files, lies, nested | `u3_archives_over_...`, `u3_an_archive_...` |
| U3 | gzip, xz, bzip2, zstd, PNG bomb, SVG, compressed body | `u3_compressed_files_...`, `u3_an_svg_...` |
| U4 | Flate, RunLength, XFA, /Prev, outlines, ToUnicode, XMP, pages | `PDFS`, `PDF_BOMBS`, `u4_a_tounicode_map_...` |
| U4 | memory, CPU, clock, network, files of the worker | test_parsing.py `what_a_document_does_ends_in_its_worker` |
| U5 | file, http, parameter entities, laughs, blow-up, SVG, RSS, XMP | `XXE`; `u5_entities_in_office_files` |
| U6 | declared otherwise, overlong, surrogates, mixed, polyglots | `u6_...` |
| U7 | columns, depth, quotes, tags, within 5 s of CPU | `SHAPES`, `u7_looking_at_the_bytes_is_cheap` |
| U8 | 1,000 of one name, twice, two tenants, given up half way | `u8_...`; in one job below |
| U9 | 1e6 parts, no boundary, in the content, huge header, nested | `FORMS`, `u9_...`; by way of a job below |
| U10 | served back | `u10_no_answer_is_a_page_...`; no route gives bytes back, below |
"""

import json
from itertools import repeat
from pathlib import Path

import pytest

from nexus.types import content_digest
from tests.conftest import Door
from tests.routes import ROUTES, SAMPLES
from tests.test_uploads import (
    END,
    FORM,
    HOSTILE_NAMES,
    Wire,
    documents_of,
    open_temporary_files,
    spool,  # noqa: F401  # a fixture
)
from tests.test_uploads import needs_linux as needs_linux

PART = b'--cut\r\ncontent-disposition: form-data; name="%s"; filename="x"\r\n\r\n'
CONTENT = b"# Words\n\nOf a file.\n"


def announce(door: Door, *names: str, content: bytes = CONTENT) -> str:
    """The id of a job of these files, all with this content."""
    files = [{"filename": name, "digest": content_digest(content), "size": len(content)} for name in names]
    answer = door.client.post("/rag/jobs", json={"files": files}, headers=door.headers())
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


class JobWire(Wire):
    """The same wire to the bytes of a job."""

    def __init__(self, door: Door, limit: int, job_id: str) -> None:
        super().__init__(door, limit)
        inner = self.app

        async def redirected(scope, receive, send):  # type: ignore[no-untyped-def]
            path = f"/rag/jobs/{job_id}/files"
            await inner({**scope, "method": "PUT", "path": path, "raw_path": path.encode()}, receive, send)

        self.app = redirected


def test_U1_names_of_a_job_s_files_are_labels_and_nothing_is_written_under_them(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = tmp_path / "one" / "two" / "three"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    job_id = announce(door, *HOSTILE_NAMES)
    before = {path for path in tmp_path.rglob("*") if not path.name.startswith(("jobs.db", "access.db"))}
    files = {str(number): (name, CONTENT) for number, name in enumerate(HOSTILE_NAMES)}
    sent = door.client.put(f"/rag/jobs/{job_id}/files", files=files, headers=door.headers())
    assert (sent.status_code, sent.json()) == (202, {"received": len(HOSTILE_NAMES)})
    shown = door.client.get(f"/rag/jobs/{job_id}", headers=door.headers()).json()
    assert [file["filename"] for file in shown["files"]] == HOSTILE_NAMES
    after = {path for path in tmp_path.rglob("*") if not path.name.startswith(("jobs.db", "access.db"))}
    assert after == before


@pytest.mark.parametrize("name", ["a\0.md", "a\r\nx: y.md", "a\x1b[31m.md", "n" * 1025, " ", ""], ids=repr)
def test_U1_a_name_that_cannot_be_shown_is_refused_with_its_place_in_the_list(door: Door, name: str) -> None:
    files = [{"filename": one, "digest": "0" * 32, "size": 1} for one in ("good.md", name)]
    answer = door.client.post("/rag/jobs", json={"files": files}, headers=door.headers())
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/files/1/filename"
    assert door.client.get("/rag/jobs", headers=door.headers()).json()["jobs"] == []


FIELDS = ["../0", "-1", "0x0", "\u0660", "1e3", "9" * 16, "file", "", "0 OR 1=1"]


@pytest.mark.parametrize("field", FIELDS, ids=repr)
def test_U1_a_field_that_is_no_number_of_a_file_is_refused(door: Door, field: str) -> None:
    job_id = announce(door, "a.md")
    files = {field: ("a.md", CONTENT)}
    answer = door.client.put(f"/rag/jobs/{job_id}/files", files=files, headers=door.headers())
    assert answer.status_code in (404, 422), answer.text
    assert documents_of(door) == []


@needs_linux
@pytest.mark.parametrize("length", [None, b"5", b"-1", b"x"], ids=str)
def test_U2_bytes_of_a_job_without_end_are_cut_off_where_they_cross_the_limit(
    door: Door, spool: Path, length: bytes | None  # noqa: F811
) -> None:  # fmt: skip
    limit, chunk = 4 << 20, b"x" * (1 << 16)
    wire = JobWire(door, limit, announce(door, "a.md"))
    assert wire.post(FORM, [PART % b"0", *repeat(chunk, 1000)], length) == 413
    assert wire.taken <= limit // len(chunk) + 2
    assert not open_temporary_files(spool) and not list(spool.iterdir())


def test_U2_more_bytes_than_were_announced_fail_the_file_and_no_other(door: Door) -> None:
    job_id = announce(door, "a.md", "b.md")
    files = {"0": ("a.md", CONTENT), "1": ("b.md", CONTENT + b"more")}
    door.client.put(f"/rag/jobs/{job_id}/files", files=files, headers=door.headers())
    shown = door.client.get(f"/rag/jobs/{job_id}", headers=door.headers()).json()
    assert (shown["files"][1]["state"], shown["files"][1]["code"]) == ("failed", "changed")
    assert shown["files"][0]["state"] != "failed"


def test_U8_many_files_of_one_name_in_one_job_are_one_document(door: Door) -> None:
    job_id = announce(door, *["a.md"] * 40)
    files = {str(number): ("a.md", CONTENT) for number in range(40)}
    assert door.client.put(f"/rag/jobs/{job_id}/files", files=files, headers=door.headers()).status_code == 202
    door.client.portal.call(door.lent.ingestor.finish, job_id, 39)  # type: ignore[union-attr]
    shown = door.client.get(f"/rag/jobs/{job_id}?limit=0", headers=door.headers()).json()
    assert shown["counts"] == {"done": 1, "unchanged": 39}
    assert len(documents_of(door)) == 1


FORMS: dict[str, list[bytes]] = {
    "1e6 files of one number": [(PART % b"0" + b"\r\n") * 1000],
    "1e6 fields": [PART.replace(b'; filename="x"', b"") % b"0" * 1000],
    "1e6 parts without a name": [b"--cut\r\n\r\n\r\n" * 5000],
    "a huge part header": [(PART % b"0")[:-4], b"a" * (1 << 16)],
    "many part headers": [b"--cut\r\n", b"a: b\r\n" * 10_000],
}


@pytest.mark.parametrize("case", FORMS)
def test_U9_forms_of_a_job_s_bytes_are_refused_early(door: Door, case: str) -> None:
    *first, last = FORMS[case]
    wire = JobWire(door, 64 << 20, announce(door, "a.md"))
    assert wire.post(FORM, (chunk for chunk in [*first, *repeat(last, 1000)])) in (400, 422)
    assert wire.taken <= 3


@pytest.mark.parametrize("kind", ["multipart/form-data", "application/json", "text/plain"])
def test_U9_bytes_of_a_job_that_are_no_form_are_refused(door: Door, kind: str) -> None:
    wire = JobWire(door, 1 << 20, announce(door, "a.md"))
    assert wire.post(kind, [PART % b"0" + CONTENT + END]) in (400, 415)
    assert json.loads(wire.body)["code"] in ("invalid_request", "unsupported_media_type")


def test_U10_no_route_gives_back_the_bytes_of_an_upload(door: Door) -> None:
    """What a browser might run, a page or a picture with scripts, is shown to it by nobody: every GET is asked."""
    hostile = b"<!DOCTYPE html><p>words</p><script>alert('canary')</script><!-- canary -->"
    headers = door.headers()
    added = door.client.post("/rag/add_document", files={"file": ("a.html", hostile)}, headers=headers).json()
    known = {"document_id": added["document_id"], "job_id": added["job_id"], "number": "0"}
    gets = [route for route in ROUTES if route.method == "GET"]
    assert len(gets) > 20
    for route in gets:
        answer = door.client.get(route.address({**SAMPLES, **known}), headers=headers)
        assert "canary" not in answer.text, route.path
        assert not answer.headers.get("content-type", "").startswith(("text/html", "image/"))
