"""Bytes become text, each document in its own guarded child process.

`Parsers` keeps a clean process, the zygote (`python -m nexus.parsing`). It has loaded the format libraries, runs
one thread, has no secrets in its environment and, where Linux allows it, no network. For every document it forks a
worker, which limits itself, reads the bytes from a socket of its own, answers in JSON and exits. The zygote watches:
it tells the caller how each worker ended, and ends those that nobody waits for. Whatever a hostile file does, it does
in its worker.

There are two zygotes, each from its first document on: a fork copies the page tables of all that was loaded, and PDF
and office files need libraries that are more than half of that.

A reader fills a `_Draft` with blocks. Markdown and reStructuredText become HTML that carries line numbers, so one walk
makes blocks of all that people write. To add a format, write a reader and name it in `_SUFFIXES` and `_READERS`.
"""

import codecs
import csv
import ctypes
import email
import email.policy
import gc
import io
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from html import escape
from importlib import import_module  # most format libraries have no types, and only the zygote loads them
from itertools import groupby, islice, pairwise, takewhile
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, get_args
from urllib.parse import urlsplit

from nexus.errors import InvalidRequest, NexusError, Unavailable, Unprocessable, UnsupportedMedia
from nexus.types import Block, BlockKind, Parsed, media_type_of

PARSER = "nexus-2"  # part of every version: another value makes every document be read again

ENDED = "parser_ended"  # no store is away then: waiting and trying again would go on for ever

_MEMORY_EXIT = 70  # how a worker says that it ran out of memory, when it can say nothing else
_SLACK_SECONDS = 30.0  # what the caller waits beyond the worker's own clock
_JSON_LEVELS = 100
_MOST_LINKS, _LONGEST_LINK = 1000, 1024
_HTML_ELEMENTS = 400_000  # about 12 microseconds each
_NONSENSE = "the file made its parser answer nonsense: it may be hostile"

_Lines = tuple[int | None, int | None]  # first and last, inclusive, from 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What one document may take. `memory_bytes` is what its worker may add to what it starts with; the archive
    limits are for formats that are ZIP files: bytes out per byte in, parts, and bytes out."""

    memory_bytes: int = 1 << 30
    cpu_seconds: float = 30.0
    wall_seconds: float = 60.0
    output_bytes: int = 64 << 20
    archive_ratio: int = 100
    archive_entries: int = 10_000
    archive_bytes: int = 512 << 20


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


class _Draft:
    """The blocks of one document, while a reader collects them in reading order.

    As it walks, a reader sets `page`, `depth` (of lists), `marker` (of the next item) and `label` (words that belong
    before the next paragraph). A paragraph joins the open list where there is one.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.stem = name.rpartition(".")[0] or name
        self.title, self.marker, self.label = "", "", ""
        self.metadata: dict[str, str] = {}
        self.links: dict[str, None] = {}
        self.blocks: list[Block] = []
        self.page: int | None = None
        self.label_line: int | None = None
        self.depth = 0
        self._items: list[tuple[str, _Lines]] = []

    def add(
        self, kind: BlockKind, text: str, lines: _Lines = (None, None), level: int = 0, header: bool = False
    ) -> None:
        self.paragraph("") if kind != "text" else None  # a label with nothing after it stands alone
        self.close_list()
        if text.strip():
            self.blocks.append(Block(kind, text, level, self.page, *lines, header))

    def paragraph(self, text: str, lines: _Lines = (None, None)) -> None:
        if self.label:
            text, lines = self.label + text, (self.label_line or lines[0], lines[1] or self.label_line)
        text, self.label, self.label_line = text.strip(), "", None
        if text and self.depth:
            indent = "  " * (self.depth - 1)
            self._items.append((indent + (self.marker or "  ") + text.replace("\n", f"\n{indent}  "), lines))
            self.marker = ""
        elif text:
            self.add("text", text, lines)

    def table(self, rows: Iterable[Iterable[str]], lines: _Lines = (None, None), header: bool | None = None) -> None:
        """Rows become lines, without rows and columns that are empty. Where nobody knows of a `header`, leading rows of
        one cell are captions, and then a first row of words in all columns is a header."""
        kept = [cells for row in rows if any(cells := [" ".join(cell.split()) for cell in row])]
        used = sorted({number for row in kept for number, cell in enumerate(row) if cell})
        kept = [[row[number] for number in used if number < len(row)] for row in kept]
        if header is None:
            first, last = lines
            captions = list(takewhile(lambda row: sum(map(bool, row)) == 1, kept))
            for caption in captions:
                self.add("text", "".join(caption), (first, first))
                first = first + 1 if first else None
            kept, lines = kept[len(captions) :], (first, last)
            full = len(kept) > 1 and len(kept[0]) == len(used)
            header = full and all(re.search(r"[^\W\d]", cell) for cell in kept[0])
        self.add("table", "\n".join(" | ".join(row).rstrip(" |") for row in kept), lines, header=header)

    def link(self, reference: str | None) -> None:
        target = _target(reference or "")
        if target and target == _target(target) and len(self.links) < _MOST_LINKS:
            self.links.setdefault(target)

    def close_list(self) -> None:
        if self._items:
            numbers = [number for _, lines in self._items for number in lines if number]
            lines = (min(numbers, default=None), max(numbers, default=None))
            self.blocks.append(Block("list", "\n".join(text for text, _ in self._items), 0, self.page, *lines))
            self._items = []


def _target(reference: str) -> str:
    """Where a hyperlink leads, without query and fragment; '' where no other document can be: mail, scripts, data."""
    try:
        parts = urlsplit(_clean(reference).strip())
    except ValueError:  # brackets that hold no address
        return ""
    is_web = parts.scheme in ("http", "https") and parts.netloc
    is_relative = not parts.scheme and not parts.netloc and parts.path
    target = parts._replace(query="", fragment="").geturl() if is_web or is_relative else ""
    return target if len(target) <= _LONGEST_LINK else ""


# What the bytes are

_READABLE = "Markdown, text, reStructuredText, HTML, PDF, DOCX, PPTX, XLSX, CSV, TSV, JSON, EML, XML, YAML, source code"
_DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
_PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
_XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
_BINARY = ("application/pdf", _DOCX, _PPTX, _XLSX)
_SUFFIXES = {
    "md": "text/markdown", "markdown": "text/markdown", "rst": "text/x-rst", "rest": "text/x-rst",
    "txt": "text/plain", "text": "text/plain", "log": "text/plain", "org": "text/org",
    "yaml": "application/yaml", "yml": "application/yaml", "toml": "application/toml",
    "html": "text/html", "htm": "text/html", "xhtml": "text/html", "xml": "application/xml",
    "pdf": "application/pdf", "docx": _DOCX, "pptx": _PPTX, "xlsx": _XLSX,
    "csv": "text/csv", "tsv": "text/tab-separated-values", "eml": "message/rfc822",
    "json": "application/json", "ndjson": "application/x-ndjson", "jsonl": "application/x-ndjson",
}  # fmt: skip
_ARCHIVE = "an archive: unpack it and add the files in it"
_REFUSED = {
    b"\x7fELF": "a program", b"MZ": "a program", b"\xcf\xfa\xed\xfe": "a program", b"\xca\xfe\xba\xbe": "a program",
    b"\x89PNG": "a picture (PNG)", b"\xff\xd8\xff": "a picture (JPEG)", b"GIF8": "a picture (GIF)",
    b"II*\0": "a picture (TIFF)", b"MM\0*": "a picture (TIFF)", b"RIFF": "a picture, a sound or a film (RIFF)",
    b"PK": _ARCHIVE, b"\x1f\x8b": _ARCHIVE, b"BZh": _ARCHIVE, b"\xfd7zXZ": _ARCHIVE, b"(\xb5/\xfd": _ARCHIVE,
    b"7z\xbc\xaf": _ARCHIVE, b"Rar!": _ARCHIVE, b"SQLite format 3\0": "a database: export its tables as CSV",
    b"PAR1": "a Parquet table: export it as CSV", b"%!PS": "PostScript: convert it to PDF",
    b"{\\rtf": "RTF: save it as .docx",
}  # fmt: skip
_OTHERS = {
    "doc": "a Word 97-2003 document: save it as .docx", "xls": "an Excel 97-2003 workbook: save it as .xlsx",
    "ppt": "a PowerPoint 97-2003 presentation: save it as .pptx", "msg": "an Outlook message: save it as .eml",
    "ipynb": "a notebook: export it as Markdown",
}  # fmt: skip
_ZIPPED = {
    b"opendocument.text": "ODT: save it as .docx", b"opendocument.spreadsheet": "ODS: save it as .xlsx",
    b"opendocument.presentation": "ODP: save it as .pptx", b"epub+zip": "EPUB: convert it to HTML or PDF",
}  # fmt: skip
# Atomic, since this runs outside a worker: comments that could each end later would be tried in every combination.
_HTML_START = re.compile(rb"(?:<\?xml[^>]*>\s*)?(?>(?:<!--.*?-->\s*)*)<(?:!doctype html|html)\b", re.S)
_MAIL_START = re.compile(
    rb"(?:from [^\n]*\n)?(?:(?:mime-version|message-id|received|return-path|delivered-to|x-[\w-]+|from|to|subject|date"
    rb"|content-type):[^\n]*\n(?:[ \t][^\n]*\n)*){2}"
)


def detect(source: str, content: bytes, declared: str | None = None) -> str:
    """The media type of some bytes: from the bytes, else from the name's suffix, else as `declared`.

    Raises UnsupportedMedia, naming the format, where nothing here reads it.
    """
    name = _name_of(source)
    suffix = name.rpartition(".")[2].lower()
    by_name = _SUFFIXES.get(suffix, "")
    start = content[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"%PDF-") or (by_name == "application/pdf" and b"%PDF-" in content[:1024]):
        return "application/pdf"
    if content.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _detect_zip(content, by_name)
    if content.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        if "EncryptedPackage".encode("utf-16-le") in content:
            raise _unsupported("protected by a password: remove it and add the file again")
        raise _unsupported(_OTHERS.get(suffix, "an old Office file: save it in a current format"))
    binary = _is_binary(content)
    for magic, what in _REFUSED.items():
        if content.startswith(magic) and (binary or magic[:1] in b"{%"):
            raise _unsupported(what)
    if binary:
        raise _unsupported(f"binary data of an unknown kind{f', although it is called .{suffix}' if by_name else ''}")
    if suffix == "ipynb":
        raise _unsupported(_OTHERS[suffix])
    letters = start.replace(b"\0", b"").lower()
    if _HTML_START.match(letters):
        return "text/html"
    if by_name in ("", "text/plain") and letters.startswith(b"<?xml"):
        return "application/xml"
    if by_name in ("", "text/plain") and _MAIL_START.match(letters.replace(b"\r", b"")):
        return "message/rfc822"
    said = media_type_of(declared)
    said = said if said in _READERS and said not in _BINARY else ""
    return ("text/plain" if by_name in _BINARY else by_name) or _source_code_type(name) or said or "text/plain"


def _detect_zip(content: bytes, by_name: str) -> str:
    """Look at the names in the directory of the archive, which stands at its end; unpack nothing."""
    end = content.rfind(b"PK\x05\x06", -(1 << 17))
    start = int.from_bytes(content[end + 16 : end + 20], "little") if end >= 0 else len(content)
    main = re.compile(rb"PK\x01\x02.{42}(word/document|ppt/presentation|xl/workbook)\d*\.xml", re.S)
    if found := main.search(content, start):
        return {b"w": _DOCX, b"p": _PPTX, b"x": _XLSX}[found[1][:1]]
    if end < 0 and by_name in _BINARY[1:]:
        return by_name  # cut short: its reader says so
    raise _unsupported(next((what for mark, what in _ZIPPED.items() if mark in content[30:200]), _ARCHIVE))


def _source_code_type(name: str) -> str:
    lexer = import_module("pygments.lexers").find_lexer_class_for_filename(name)
    if lexer is None or lexer.name == "Text only":
        return ""
    return str(next(iter(lexer.mimetypes), f"text/x-{lexer.aliases[0]}"))


def _unsupported(what: str) -> UnsupportedMedia:
    return UnsupportedMedia(f"the file is {what}. What can be read: {_READABLE}")


def _name_of(source: str) -> str:
    return _clean(re.split(r"[/\\]", source.rstrip("/\\"))[-1]).strip()[:200] or "untitled"


def _is_binary(content: bytes) -> bool:
    sample = content[:8192]
    if sample.startswith(tuple(_MARKS)) or (b"\0" in sample and _guess_wide(content)):
        return False
    odd = len(sample.translate(None, bytes(range(32, 256)) + b"\b\t\n\f\r\x1b"))
    return b"\0" in sample or odd * 20 > len(sample)


# Characters

_MARKS = {  # the longer first
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_PAIRED = ["cp932", "euc_jp", "gb18030", "big5", "cp949"]
_SINGLE = ["cp1252", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp874"]
_WESTERN = re.compile("[\0-\x7fÀ-ÿŒœŠšŽžŸ“”‘’„‚–—…€£§°«»©®™•·¿¡ºª´½²³µ]*")
# Colours of a terminal, control characters, lone surrogates, and marks that hide text from a reader or turn it around.
_UNWANTED = re.compile(
    "\x1b\\[[0-9;]*m|[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2028\u2029\u202a-\u202e\u2060\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", _UNWANTED.sub("", text))


def _decode(content: bytes, declared: str = "") -> str:
    """The text, its lines ended by \\n alone. Raises Unprocessable with the place of the first bad byte."""
    encodings = [encoding for mark, encoding in _MARKS.items() if content.startswith(mark)][:1]
    if not encodings and b"\0" in content[:8192]:
        encodings = [_guess_wide(content)]
    if not encodings:
        with suppress(LookupError):  # whoever declared it may have invented it
            declared = codecs.lookup(declared or "utf-8").name
            encodings = ["cp1252"] if declared in ("iso8859-1", "ascii") else [declared]
        encodings = list(dict.fromkeys(["utf-8", *encodings] if "cp1252" in encodings else [*encodings, "utf-8"]))
    place = 0
    for encoding in filter(None, encodings):
        try:
            return re.sub("\r\n?", "\n", content.decode(encoding))
        except UnicodeDecodeError as error:
            place = error.start
    if "utf-8" in encodings and (encoding := _guess_code_page(content)):
        return re.sub("\r\n?", "\n", content.decode(encoding))
    raise Unprocessable(f"the text cannot be decoded at byte {place}: save the file as UTF-8 and add it again")


def _guess_wide(content: bytes) -> str:
    """UTF-16 or UTF-32 without a mark: the reading with the fewest alphabets in it, or ''."""
    sample = content[:4096]
    nuls, letters = sample.count(0), len(sample.translate(None, bytes(range(128, 256)) + bytes(range(9))))
    if nuls * 4 < len(sample) and letters * 10 > (len(sample) - nuls) * 9:
        return ""  # narrow text with a few zeros in it would become wide nonsense
    alphabets: dict[str, int] = {}
    for encoding, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
        with suppress(UnicodeDecodeError):
            text = content[: min(4096, len(content) // width * width)].decode(encoding)
            strange = sum(unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\t\n\r\f" for c in text)
            plain, crossed = sum(c < "\u0100" for c in text), sum(not ord(c) & 0xFF for c in text)
            if strange * 50 <= len(text) and crossed * 1.5 < plain:
                alphabets[encoding] = len({ord(c) >> 8 for c in text})
    return min(alphabets, key=lambda encoding: alphabets[encoding], default="")


def _guess_code_page(content: bytes) -> str:
    """The code page that reads as a language, or ''. A guess no better than others is none, except cp1252.

    Where most letters are good UTF-8, the file is damaged UTF-8. A few odd bytes can tell cp1252, and nothing else.
    """
    odd = sum(byte > 127 for byte in content)
    if sum(byte > 127 for byte in content.decode(errors="ignore").encode()) * 2 > odd:
        return ""
    matches = list(import_module("charset_normalizer").from_bytes(content, cp_isolation=_PAIRED + _SINGLE))
    best = [m for m in matches if (m.chaos, m.coherence) == (matches[0].chaos, matches[0].coherence)]
    if any("cp1252" in m.could_be_from_charset for m in best):
        return "cp1252" if _WESTERN.fullmatch(content.decode("cp1252", "replace")) else ""
    sure = best and odd > 8 and (best[0].coherence > 0 or len(best) == 1 or best[0].encoding in _PAIRED)
    return str(best[0].encoding) if sure else ""


# Text, code, tables and records


def _read_text(content: bytes, draft: _Draft) -> None:
    draft.blocks.extend(_paragraphs(_decode(content)))


def _paragraphs(text: str) -> Iterator[Block]:
    for filled, group in groupby(enumerate(text.split("\n"), 1), key=lambda pair: bool(pair[1].strip())):
        lines = list(group)
        if filled:
            yield Block("text", "\n".join(line for _, line in lines), first_line=lines[0][0], last_line=lines[-1][0])


def _read_code(content: bytes, draft: _Draft) -> None:
    """Cut where a line after an empty one begins at the margin: that is where definitions begin."""
    lines = _decode(content).rstrip().split("\n")
    draft.title = draft.name
    inner = range(1, len(lines))
    cuts = [0, *(i for i in inner if not lines[i - 1].strip() and lines[i][:1].strip(" \t})]")), len(lines)]
    for start, end in pairwise(cuts):
        text = "\n".join(lines[start:end]).rstrip()
        draft.add("code", text, (start + 1, start + 1 + text.count("\n")))


def _read_csv(content: bytes, draft: _Draft) -> None:
    text = _decode(content)
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise Unprocessable(f"the table cannot be read at line {reader.line_num}: {error}") from error
    draft.table(rows, (1, text.rstrip("\n").count("\n") + 1))


def _delimiter(text: str) -> str:
    """The character that cuts most of the first rows into the same number of cells, and more than one."""
    sample = text[:20_000].split("\n")[:50]

    def evenness(mark: str) -> tuple[int, int]:
        widths = Counter(len(row) for row in csv.reader(sample, delimiter=mark) if len(row) > 1)
        return max(((times, width) for width, times in widths.items()), default=(0, 0))

    return max(",\t;|", key=evenness)


def _read_json(content: bytes, draft: _Draft) -> None:
    """Lines `path: value`; each record of a list and each part of an object is a block."""
    value = _json_value(_decode(content))
    if isinstance(value, dict) and isinstance(value.get("title"), str):
        draft.title = value["title"]
    part = re.compile(r"(?:[^.\[:]*\[\d+\]|[^.\[:]+(?=\.))?")
    for _, lines in groupby(_flatten("", value), key=lambda line: part.match(line)[0]):  # type: ignore[index]
        draft.add("text", "\n".join(re.sub(r"^\[\d+\](?:\.|: )?", "", line) for line in lines))


def _read_ndjson(content: bytes, draft: _Draft) -> None:
    for number, line in enumerate(_decode(content).split("\n"), 1):
        if line.strip():
            draft.add("text", "\n".join(_flatten("", _json_value(line, number))), (number, number))


def _json_value(text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise Unprocessable(f"the JSON is not valid at {place}: {error.msg}") from error


def _flatten(path: str, value: Any, level: int = 1) -> Iterator[str]:
    if level > _JSON_LEVELS:
        raise RecursionError
    items = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flatten(f"{path}.{key}" if path else key, part, level + 1)
    elif any(isinstance(item, dict | list) for item in items):
        for number, part in enumerate(items):
            yield from _flatten(f"{path}[{number}]", part, level + 1)
    else:
        words = ", ".join(item if isinstance(item, str) else json.dumps(item) for item in items if item is not None)
        words = re.sub(r"[ \t]{2,}", " ", words.strip())
        if words:
            yield f"{path}: {words}" if path else words


def _read_xml(content: bytes, draft: _Draft) -> None:
    """Neighbours without children become lines `name: text`; an element of text and elements is a paragraph."""
    etree = import_module("lxml.etree")
    declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)", content)
    source = _decode(content, declared[1].decode() if declared else "").encode()
    safely = {"resolve_entities": False, "no_network": True, "load_dtd": False, "huge_tree": False}
    parser = etree.XMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, **safely)
    try:
        root = etree.fromstring(source, parser)
    except etree.XMLSyntaxError as error:
        raise Unprocessable(f"the XML is not valid: {error.msg}") from error
    dtd = root.getroottree().docinfo.internalDTD
    if dtd is not None and any(dtd.iterentities()):
        raise Unprocessable("the XML declares entities, which are never resolved: put their text in their place")
    leaves: list[tuple[str, int]] = []
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        mixed = len(element) and any(text and text.strip() for text in (element.text, *(c.tail for c in element)))
        if leaves and (mixed or len(element)):
            draft.add("text", "\n".join(line for line, _ in leaves), (leaves[0][1], leaves[-1][1]))
            leaves.clear()
        if event == "start" and mixed:
            draft.add("text", " ".join("".join(element.itertext()).split()), (element.sourceline, element.sourceline))
            walk.skip_subtree()
        elif event == "start" and (line := _xml_line(element)):
            leaves.append((line, element.sourceline))
    draft.add("text", "\n".join(line for line, _ in leaves), (root.sourceline, root.sourceline))


def _xml_line(element: Any) -> str:
    known = ", ".join(f"{key.rpartition('}')[2]}={value}" for key, value in element.attrib.items())
    text = " ".join((element.text or "").split())
    name = element.tag.rpartition("}")[2] + (f" ({known})" if known else "")
    return f"{name}: {text}" if text else (name if known else "")


# What people write: Markdown, reStructuredText and HTML


@cache
def _markdown() -> Any:
    return import_module("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])


def _read_markdown(content: bytes, draft: _Draft) -> None:
    markdown = _markdown()
    tokens = markdown.parse(_take_front_matter(_UNWANTED.sub("", _decode(content)), draft))
    for token in tokens:
        first, last = (token.map[0] + 1, token.map[1]) if token.map else (0, 0)
        if token.type in ("fence", "code_block"):
            first += token.type == "fence"
            last = first + token.content.rstrip("\n").count("\n")
        if first:
            token.attrJoin("class", f"lines-{first}-{last}")
        if token.type == "html_block":
            inner = token.content if _is_html(token.content) else escape(token.content)
            token.content = _balance(f'<div class="lines-{first}-{last}">{inner}</div>')
        for part in token.children or ():
            if part.type == "html_inline" and not _is_html(part.content):
                part.type = "text"  # <such> a placeholder
            elif part.type == "html_inline" and not part.content.startswith("<br"):
                part.content = ""  # it may stand alone, and hide the rest of the document
    _add_html(draft, markdown.renderer.render(tokens, markdown.options, {}))


def _is_html(text: str) -> bool:
    found = re.match(r"\s*</?([a-zA-Z][\w-]*)", text)
    return not found or found[1].lower() in import_module("lxml.html.defs").tags


def _balance(fragment: str) -> str:
    """HTML in which all that was opened is closed, so that it stays by itself."""
    html = import_module("lxml.html")
    return "".join(html.tostring(part, encoding="unicode") for part in html.document_fromstring(fragment).body)


def _take_front_matter(text: str, draft: _Draft) -> str:
    """Move YAML between `---` lines to the metadata. Empty lines stay in its place, so the rest keeps its numbers."""
    found = re.match(r"---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", text, re.S)
    yaml = import_module("yaml")
    fields = None
    with suppress(yaml.YAMLError, ValueError):  # then it is no front matter, but a rule and some text
        fields = yaml.safe_load(found[1]) if found else None
    if not found or not isinstance(fields, dict):
        return text
    for key, value in fields.items():
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str | int | float) or hasattr(item, "isoformat") for item in items):
            draft.metadata[str(key)] = ", ".join(map(str, items))
    draft.title = draft.metadata.get("title", "")
    return "\n" * found[0].count("\n") + text[found.end() :]


_RST_NATIVE = _names(
    "attention caution danger error hint important note tip warning admonition list-table csv-table table image figure"
    " topic sidebar replace unicode role default-role container compound epigraph highlights pull-quote parsed-literal"
    " line-block class"
)
_RST_CODE = _names("math code code-block sourcecode prompt testcode testsetup testoutput doctest")
_RST_DROPPED = _names(
    "contents redirect-from literalinclude include raw graphviz digraph mermaid uml plantuml meta highlight index video"
    " youtube currentmodule sectnum target-notes header footer title date"
)
_RST_TESTS = _names("only ifconfig")  # their argument is for the builder, not the reader
_RST_SAID = {
    "seealso": "See also", "deprecated": "Deprecated since version", "versionadded": "Added in version",
    "versionchanged": "Changed in version",
}  # fmt: skip
_RST_SETTINGS = {
    "report_level": 5, "halt_level": 5, "warning_stream": False, "_disable_config": True, "embed_stylesheet": False,
    "file_insertion_enabled": False, "raw_enabled": False, "doctitle_xform": False, "docinfo_xform": False,
    "syntax_highlight": "none", "math_output": "LaTeX", "initial_header_level": 1, "stylesheet_path": "",
}  # fmt: skip


def _read_rst(content: bytes, draft: _Draft) -> None:
    core, nodes = import_module("docutils.core"), import_module("docutils.nodes")
    text = _decode(content)
    settings = {**_RST_SETTINGS, "line_length_limit": len(text) + 1}
    tree = core.publish_doctree(text, settings_overrides=settings)
    located = (nodes.TextElement, nodes.list_item, nodes.Admonition, nodes.image)
    suffix = draft.name.removeprefix(draft.stem) or ".rst"  # of the pages that Sphinx names without one
    reached = 0
    for node in list(tree.findall(nodes.Element)):
        name, line = node.tagname, node.line
        draft.link(f"{node['page']}{suffix}" if node.get("page") else node.get("refuri"))
        if name == "system_message":
            node.parent.remove(node)
        elif name == "problematic":  # a reference to nothing here: keep its words, not its signs
            node.parent.replace(node, nodes.Text(re.sub(r"^[`|*]*(.+?)[`|*_]*$", r"\1", node.astext())))
        elif line and line >= reached and isinstance(node, located) and not isinstance(node, nodes.Inline):
            reached = line  # a smaller number counts from somewhere else, as in a csv-table
            line -= name == "title" and node.parent.tagname == "section"  # docutils counts the line under a title
            text = node.astext() if name == "literal_block" else node.rawsource
            last = line + (text.count("\n") if isinstance(node, nodes.TextElement) else 0)
            node["classes"].append(f"lines-{line}-{last}")
    _add_html(draft, core.publish_from_doctree(tree, writer="html5", settings_overrides=settings).decode())


def _patch_docutils() -> None:
    """Teach docutils to keep the words of every directive and role that only Sphinx knows."""
    nodes, rst = import_module("docutils.nodes"), import_module("docutils.parsers.rst")
    find_directive, find_role = rst.directives.directive, rst.roles.role

    def run(self: Any) -> list[Any]:
        name, content = self.name.lower(), self.content
        argument = " ".join([_RST_SAID.get(name, ""), *self.arguments]).strip() if name not in _RST_TESTS else ""
        box = nodes.container()
        if name in _RST_DROPPED or "hidden" in self.options:
            return []
        if name in _RST_CODE:
            formula = self.arguments if name == "math" else []
            box = nodes.literal_block("", "\n".join([*formula, *content]))
            box.line = self.lineno if formula else self.content_offset + 1
        elif name == "toctree":
            entries = [nodes.list_item("", nodes.paragraph("", _role_words("doc", entry))) for entry in content]
            for number, entry in enumerate(entries, self.content_offset + 1):
                entry.line = number
            box = nodes.bullet_list("", *entries)
        else:
            words, _ = self.state.inline_text(argument, self.lineno)
            title = nodes.paragraph("", "", *words, classes=["admonition-title"] if content else [])
            title.line = self.lineno
            box += title if argument else []
            self.state.nested_parse(content, self.content_offset, box, match_titles=True)
        return [box]

    any_option = type("AnyOption", (dict,), {"__missing__": lambda self, key: str})(name=str)
    lenient = type("Lenient", (rst.Directive,), {
        "optional_arguments": 1, "final_argument_whitespace": True, "has_content": True,
        "option_spec": any_option, "run": run,
    })  # fmt: skip

    def lenient_role(name: str, raw: str, text: str, *_: Any, **__: Any) -> tuple[list[Any], list[Any]]:
        text = text.replace("\0", "")
        return [nodes.inline(raw, _role_words(name, text), page=_role_target(text) if name == "doc" else "")], []

    bare = type("Bare", (lenient,), {"optional_arguments": 0, "option_spec": None})

    def directive(name: str, *context: Any) -> Any:
        known = name.lower() in _RST_NATIVE
        return find_directive(name, *context) if known else (bare if name == "tabs" else lenient, [])

    def role(name: str, *context: Any) -> Any:
        known = name.lower() in rst.roles._roles or (name and name.lower() in rst.roles._role_registry)
        return find_role(name, *context) if known else (lenient_role, [])

    rst.directives.directive, rst.roles.role = directive, role


def _role_words(role: str, text: str) -> str:
    """What a reader would see: of `title <target>` the title, of a page its name, of `~a.b` the b."""
    if titled := re.fullmatch(r"(.+?)\s*<[^<>]*>", text, re.S):
        return titled[1]
    if role == "doc":
        return text.rstrip("/").rpartition("/")[2].replace("-", " ").replace("_", " ")
    return text.rpartition(".")[2] if text.startswith("~") else text.lstrip("!")


def _role_target(text: str) -> str:
    """The target of `title <target>`, or of a target alone; nothing of one that says it is no link."""
    titled = re.fullmatch(r".+?<([^<>]*)>", text, re.S)
    return "" if text.startswith("!") else (titled[1] if titled else text).strip()


_HTML_SKIPPED = _names("head nav script style noscript template svg iframe object button select textarea")
_HTML_BLOCKS = _names(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption figure"
    " footer form h1 h2 h3 h4 h5 h6 head header hgroup hr html legend li main menu nav ol p pre search section summary"
    " table tbody td tfoot th thead tr ul"
)
_LINES = re.compile(r"\blines-(\d+)-(\d+)")


def _read_html(content: bytes, draft: _Draft) -> None:
    declared = re.search(rb"<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)", content[:4096], re.I)
    _add_html(draft, _decode(content, declared[1].decode() if declared else ""))


def _add_html(draft: _Draft, text: str) -> None:
    if next(islice(re.finditer("<[a-zA-Z]", text), _HTML_ELEMENTS, None), None):
        raise Unprocessable(f"the page has more than {_HTML_ELEMENTS} elements: split it")
    etree, html = import_module("lxml.etree"), import_module("lxml.html")
    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=False)
    root = etree.fromstring(_UNWANTED.sub("", text).encode() or b"<p>", parser)
    if any(error.type_name == "ERR_RESOURCE_LIMIT" for error in parser.error_log):
        raise RecursionError
    if root is None:
        return
    mains = root.xpath("//main|//*[@role='main']")
    title = " ".join((root.findtext(".//title") or "").split())
    draft.title = draft.title or (title if title != "<string>" else "")
    _HtmlWalk(draft).over(etree.iterwalk(mains[0] if len(mains) == 1 else root, events=("start", "end")))
    draft.close_list()


class _HtmlWalk:
    """Makes blocks of elements, without recursion: a page may be nested deeper than Python's stack."""

    def __init__(self, draft: _Draft) -> None:
        self._draft = draft
        self._words: list[str] = []
        self._numbers: list[int] = []  # of the next item in each open list; 0 where items have none
        self._level = 0
        self._is_label = False
        self._lines: _Lines = (None, None)

    def over(self, walk: Any) -> None:
        skipped = None
        for event, element in walk:
            tag = element.tag if isinstance(element.tag, str) else "template"
            if tag in _HTML_BLOCKS:
                self._flush()
            if event == "end":
                if element is not skipped:
                    self._leave(tag)
                self._write(element.tail)
            elif tag in _HTML_SKIPPED or _is_hidden(element) or self._take_whole(tag, element):
                skipped = element
                walk.skip_subtree()
            else:
                self._enter(tag, element)

    def _write(self, text: str | None) -> None:
        if text:
            self._words.append(re.sub(r"\s", " ", text))

    def _enter(self, tag: str, element: Any) -> None:
        names = element.get("class", "")
        if names and (found := _LINES.search(names)):
            self._lines = int(found[1]), int(found[2])
        if tag in ("ul", "ol"):
            self._draft.paragraph("")  # a label before a list is a line of its own
            self._draft.depth += 1
            start = element.get("start", "1")
            self._numbers.append((int(start) if start.isdecimal() else 1) if tag == "ol" else 0)
        elif tag == "li" and self._numbers:
            self._draft.marker = f"{self._numbers[-1]}. " if self._numbers[-1] else "- "
            self._numbers[-1] += bool(self._numbers[-1])
        elif tag == "a":
            self._draft.link(element.get("href"))
        elif tag == "br":
            self._words.append("\n")
        elif tag == "img" and element.get("alt") != element.get("src"):
            self._write(element.get("alt"))
        if tag in _HTML_BLOCKS:
            self._level = int(tag[1]) if tag[0] == "h" and tag[1:].isdigit() else self._level
            self._is_label = tag == "dt" or "admonition-title" in names
        self._write(element.text)

    def _leave(self, tag: str) -> None:
        if tag in ("ul", "ol"):
            self._numbers.pop()
            self._draft.depth -= 1
            if not self._draft.depth:
                self._draft.close_list()
        self._level = 0 if tag in _HTML_BLOCKS else self._level

    def _flush(self) -> None:
        rows = (" ".join(row.split()) for row in "".join(self._words).split("\n")) if self._words else ()
        text = "\n".join(row for row in rows if row)
        self._words.clear()
        if self._level:
            self._draft.add("heading", text.replace("\n", " "), self._lines, self._level)
        elif self._is_label and text:
            self._draft.label_line = self._draft.label_line or self._lines[0]
            self._draft.label += f"{text.rstrip(':')}: "
        else:
            self._draft.paragraph(text, self._lines) if text else None
        self._is_label = False

    def _take_whole(self, tag: str, element: Any) -> bool:
        if tag not in ("pre", "table"):
            return False
        marked = [_LINES.search(names) for names in element.xpath("descendant-or-self::*/@class")]
        numbers = [int(number) for found in marked if found for number in found.groups()]
        lines = (min(numbers, default=None), max(numbers, default=None))
        if tag == "pre":
            for line_break in element.iter("br"):
                line_break.tail = "\n" + (line_break.tail or "")
            self._draft.add("code", "".join(element.itertext()).strip("\n"), lines)
            self._link_all(element)
            return True
        rows = _html_rows(element)
        if rows and (caption := element.find("caption")) is not None:
            self._draft.add("text", _words_in(caption), (lines[0], lines[0]))
        if rows:
            self._draft.table(rows, lines, header=bool(element.xpath("boolean(.//th)")) or None)
            self._link_all(element)
        return bool(rows)

    def _link_all(self, element: Any) -> None:
        for anchor in element.iter("a"):
            self._draft.link(anchor.get("href"))


def _is_hidden(element: Any) -> bool:
    style = element.get("style", "").replace(" ", "").lower()
    marks = ("hidden" in element.attrib, element.get("aria-hidden") == "true", element.get("role") == "navigation")
    return any(marks) or "display:none" in style or "visibility:hidden" in style


def _html_rows(table: Any) -> list[list[str]]:
    """The cells of a table that holds data; [] for one that only arranges a page."""
    if table.xpath("boolean(.//table|.//h1|.//h2|.//h3|.//pre|.//form)"):
        return []
    rows = [[_words_in(cell) for cell in row.xpath("./td|./th")] for row in table.iter("tr")]
    return rows if table.xpath("boolean(.//th)") or sum(len(row) > 1 for row in rows) > 1 else []


def _words_in(element: Any) -> str:
    parts = element.xpath(".//text()[not(ancestor::script|ancestor::style)]")
    breaks = _HTML_BLOCKS | {"br"}
    return "".join(f" {part}" if part.getparent().tag in breaks else part for part in parts)


# Pages, slides, sheets and letters


@dataclass(slots=True)
class _PageLine:
    """A line of a page: the height of its letters, and its box in points from the bottom left."""

    text: str
    size: float
    left: float
    right: float
    top: float
    bottom: float  # of the last letter: a word divided at the end of a line makes one line of two
    level: int = 0  # of a heading


def _read_pdf(content: bytes, draft: _Draft) -> None:
    pdfium = import_module("pypdfium2")
    try:
        document = pdfium.PdfDocument(content)
    except pdfium.PdfiumError as error:
        locked = "protected by a password: remove it and add the file again"
        reason = locked if "assword" in str(error) else "damaged and cannot be opened: print it to a new PDF"
        raise Unprocessable(f"the PDF is {reason}") from error
    title = document.get_metadata_value("Title")
    draft.title = "" if title.lower() == "untitled" else title
    pages = [_page_lines(document[number]) for number in range(len(document))]
    lines = [line for page in pages for line in page]
    if not lines:
        raise Unprocessable(f"the PDF holds only pictures, no text ({len(pages)} pages): run text recognition on it")
    sizes: Counter[int] = Counter()
    for line in lines:
        sizes[round(line.size)] += len(line.text)
    usual = sizes.most_common(1)[0][0]
    headings = [line for line in lines if line.size >= 1.2 * usual and _may_be_heading(line)]
    if 4 * sum(len(line.text) for line in headings) > sizes.total():
        headings = []  # a poster: size says nothing about structure
    ranks = sorted({round(line.size) for line in headings}, reverse=True)
    for line in headings:
        line.level = min(ranks.index(round(line.size)) + 1, 4)
    for draft.page, page in enumerate(pages, 1):
        _add_page(page, draft)


def _may_be_heading(line: _PageLine) -> bool:
    upright = abs(line.top - line.bottom) < 2 * line.size
    return upright and len(line.text) < 150 and re.search(r"^(?!.*(?:@|://)).*[^\W\d]{3}", line.text) is not None


def _page_lines(page: Any) -> list[_PageLine]:
    raw = import_module("pypdfium2.raw")
    text_page = page.get_textpage()
    letters = "".join(chr(raw.FPDFText_GetUnicode(text_page, i)) for i in range(text_page.count_chars()))
    lines: list[_PageLine] = []
    first, last = raw.FS_RECTF(), raw.FS_RECTF()
    for found in re.finditer(r"[^\n]*\S[^\n]*", letters):
        text = found[0].rstrip()
        start, end = found.start() + len(text) - len(text.lstrip()), found.start() + len(text) - 1
        raw.FPDFText_GetLooseCharBox(text_page, start, first)
        raw.FPDFText_GetLooseCharBox(text_page, end, last)
        size = raw.FPDFText_GetFontSize(text_page, start)
        size = size if size > 2 else first.top - first.bottom  # scaled by a matrix, which this size leaves out
        line = _PageLine(text.strip(), size, first.left, last.right, first.top, last.bottom)
        before = lines[-1] if lines else line
        overlap = min(before.top, line.top) - max(before.bottom, line.bottom)
        if lines and overlap > 0.5 * min(before.size, line.size) and line.left >= before.right - 1:
            before.text += (" " if line.left - before.right > 0.1 * before.size else "") + line.text
            before.right = line.right
        else:
            lines.append(line)
    text_page.close()
    page.close()
    return lines


def _add_page(lines: list[_PageLine], draft: _Draft) -> None:
    """Lines become paragraphs by their distance, indent and rank."""
    drops = sorted(drop for a, b in pairwise(lines) if 0 < (drop := a.bottom - b.bottom) < 4 * b.size)
    usual = drops[len(drops) // 4] if drops else 0.0
    groups: list[list[_PageLine]] = []
    for line in lines:
        if groups and not _begins_paragraph(groups[-1][-1], line, usual):
            groups[-1].append(line)
        else:
            groups.append([line])
    for group in groups:
        text = group[0].text
        for before, line in pairwise(group):
            text += ("\n" if not line.level and before.right < line.right - 4 * line.size else " ") + line.text
        level = group[0].level if len(text) < 200 else 0
        draft.add("heading" if level else "text", text, level=level)


def _begins_paragraph(before: _PageLine, line: _PageLine, usual: float) -> bool:
    drop = before.bottom - line.top + line.size
    indented = 0.8 * line.size < line.left - before.left < 5 * line.size
    apart = before.level != line.level or not 0 < drop < 1.4 * max(usual, line.size)
    return apart or indented or bool(re.match(r"[•▪◦●‣–*-]\s|\d{1,2}[.)]\s", line.text))


def _check_archive(content: bytes, limits: Limits) -> None:
    """Refuse a ZIP file that would grow too large, or whose XML declares a document type: office files have none."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries)
            most = min(limits.archive_bytes, max(limits.archive_ratio * len(content), 1 << 20))
            if len(entries) > limits.archive_entries or size > most:
                why = f"{size} bytes in {len(entries)} parts; the limits are {most} and {limits.archive_entries}"
                raise Unprocessable(f"the file unpacks to {why}: split it", code="archive_limits_exceeded")
            for entry in entries:
                if entry.filename.endswith((".xml", ".rels")):
                    with archive.open(entry) as part:
                        if b"<!DOCTYPE" in part.read(4096).replace(b"\0", b""):
                            raise Unprocessable("the file declares XML entities, which are never resolved")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise Unprocessable("the file is damaged or cut short: open it in its own program and save it again") from error


def _own_title(properties: Any) -> str:
    """The title that its author gave an office file, not the one that a library gives all of them."""
    title = str(properties.title or "")
    return "" if title in ("Word Document", "PowerPoint Presentation") else title


def _read_docx(content: bytes, draft: _Draft) -> None:
    _check_archive(content, draft.limits)
    document = import_module("docx").Document(io.BytesIO(content))
    draft.title = _own_title(document.core_properties)
    levels: dict[str, int] = {}  # style -> level of a heading, or 0 for a list
    for style in document.styles:
        named = re.fullmatch(r"Heading (\d)|Title|List (?:Bullet|Number).*", style.name or "")
        outline = style.element.find(".//{*}outlineLvl")
        if named:
            levels[style.style_id] = int(named[1] or style.name == "Title")
        elif outline is not None and int(outline.values()[0]) < 9:
            levels[style.style_id] = int(outline.values()[0]) + 1
    _walk_docx(document.element.body, draft, levels)


def _walk_docx(parent: Any, draft: _Draft, levels: dict[str, int]) -> None:
    for element in parent.iterchildren("{*}p", "{*}tbl", "{*}sdt", "{*}sdtContent", "{*}customXml", "{*}ins"):
        kind = element.tag.rpartition("}")[2]
        if kind == "tbl":
            rows = (row.iterchildren("{*}tc", "{*}sdt") for row in element.iterchildren("{*}tr"))
            draft.table([" ".join(map(_docx_text, cell.iter("{*}p"))) for cell in row] for row in rows)
        elif kind == "p":
            _add_docx_paragraph(element, draft, levels)
            for box in element.iter("{*}txbxContent"):
                if next(box.iterancestors("{*}Fallback"), None) is None:
                    _walk_docx(box, draft, levels)
        else:
            _walk_docx(element, draft, levels)


def _add_docx_paragraph(element: Any, draft: _Draft, levels: dict[str, int]) -> None:
    style = element.find("{*}pPr/{*}pStyle")
    level = levels.get(style.values()[0]) if style is not None else None
    depth = element.find("{*}pPr/{*}numPr/{*}ilvl")
    if level:
        draft.add("heading", " ".join(_docx_text(element).split()), level=level)
    else:
        draft.depth, draft.marker = (int(depth.values()[0]) + 1 if depth is not None else int(level == 0)), "- "
        draft.paragraph(_docx_text(element))
        draft.depth = 0


def _docx_text(paragraph: Any) -> str:
    """The paragraph's own words: without text boxes in it, and without what a tracked change took away."""
    signs = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
    words = []
    for part in paragraph.iter("{*}t", "{*}tab", "{*}br", "{*}cr", "{*}noBreakHyphen"):
        if next(part.iterancestors("{*}p", "{*}moveFrom", "{*}pPr")) is paragraph:
            words.append(signs.get(part.tag.rpartition("}")[2], part.text or ""))
    return "".join(words)


def _read_pptx(content: bytes, draft: _Draft) -> None:
    _check_archive(content, draft.limits)
    deck = import_module("pptx").Presentation(io.BytesIO(content))
    draft.title = _own_title(deck.core_properties)
    for draft.page, slide in enumerate(deck.slides, 1):
        title = slide.shapes.title
        name = " ".join(title.text_frame.text.split()) if title is not None else ""
        draft.title = draft.title or name
        start = len(draft.blocks)
        _walk_slide((shape for shape in slide.shapes if title is None or shape.shape_id != title.shape_id), draft)
        notes = slide.notes_slide.notes_text_frame if slide.has_notes_slide else None
        if notes is not None and notes.text.strip():
            draft.add("text", f"Notes: {notes.text}")
        if name or len(draft.blocks) > start:
            draft.blocks.insert(start, Block("heading", name or f"Slide {draft.page}", 1, draft.page))
    draft.title = draft.title or draft.stem


def _walk_slide(shapes: Iterable[Any], draft: _Draft) -> None:
    for shape in shapes:
        if hasattr(shape, "shapes"):
            _walk_slide(shape.shapes, draft)
        elif shape.has_text_frame:
            paragraphs = [paragraph for paragraph in shape.text_frame.paragraphs if paragraph.text.strip()]
            for paragraph in paragraphs:
                draft.depth, draft.marker = (paragraph.level + 1, "- ") if len(paragraphs) > 1 else (0, "")
                draft.paragraph(paragraph.text.replace("\v", "\n"))
            draft.depth = 0
            draft.close_list()
        elif getattr(shape, "has_table", False):
            draft.table([[cell.text for cell in row.cells] for row in shape.table.rows])


def _read_xlsx(content: bytes, draft: _Draft) -> None:
    _check_archive(content, draft.limits)
    book = import_module("openpyxl").load_workbook(io.BytesIO(content), read_only=True, data_only=True)
    draft.title = _own_title(book.properties) or draft.stem
    for draft.page, sheet in enumerate(book.worksheets, 1):
        sheet.reset_dimensions()  # a sheet may claim a million empty rows
        rows = ([_cell_text(value) for value in row] for row in sheet.iter_rows(values_only=True))
        tables = [list(group) for filled, group in groupby(rows, key=any) if filled]
        if tables:
            draft.add("heading", sheet.title, level=1)
        for table in tables:  # what empty rows keep apart
            draft.table(table)


def _cell_text(value: object) -> str:
    text = "" if value is None else str(value)
    return text.removesuffix(".0" if isinstance(value, float) else " 00:00:00")


def _read_mail(content: bytes, draft: _Draft) -> None:
    wide = b"\0" in content
    message = email.message_from_bytes(_decode(content).encode() if wide else content, policy=email.policy.default)
    fields = {name: " ".join(str(message[name] or "").split()) for name in ("From", "To", "Cc", "Date", "Subject")}
    draft.title = fields["Subject"]
    draft.metadata = {name.lower(): value for name, value in fields.items() if value}
    draft.add("text", "\n".join(f"{name}: {value}" for name, value in fields.items() if value))
    for kind in ("plain", "html"):
        body = message.get_body((kind,))
        payload = body.get_payload(decode=True) if body is not None else b""
        if body is not None and isinstance(payload, bytes) and payload.strip():
            text = _decode(payload, body.get_content_charset(""))
            if kind == "plain":
                draft.blocks += [replace(block, first_line=None, last_line=None) for block in _paragraphs(text)]
            else:
                _add_html(draft, text)
            break
    names = [f"- {part.get_filename()}" for part in message.walk() if part.get_filename()]
    draft.add("list", "\n".join(["Attachments:", *names]) if names else "")


_READERS: dict[str, Callable[[bytes, _Draft], None]] = {
    "text/markdown": _read_markdown, "text/x-rst": _read_rst, "text/html": _read_html, "text/plain": _read_text,
    "text/org": _read_text, "application/yaml": _read_text, "application/toml": _read_text,
    "application/pdf": _read_pdf, _DOCX: _read_docx, _PPTX: _read_pptx, _XLSX: _read_xlsx,
    "text/csv": _read_csv, "text/tab-separated-values": _read_csv, "application/json": _read_json,
    "application/x-ndjson": _read_ndjson, "application/xml": _read_xml, "message/rfc822": _read_mail,
}  # fmt: skip


# The worker: read one document and answer


def _read(name: str, media_type: str, content: bytes, limits: Limits) -> bytes:
    """A document as the reply to its caller. MemoryError passes; everything else is a verdict on the document."""
    draft = _Draft(name, limits)
    try:
        _READERS.get(media_type, _read_code)(content, draft)  # source code has many media types and one reader
        draft.add("heading", "")  # which closes what is open
        blocks = [block for block in map(_tidy, draft.blocks) if block.text]
        if not blocks:
            raise Unprocessable("the file has no text in it")
        headings = (block.text for block in blocks if block.kind == "heading")
        reply: dict[str, Any] = {
            "title": (_clean(" ".join(draft.title.split())) or next(headings, "") or draft.stem)[:500],
            "metadata": {_clean(key): _clean(value) for key, value in draft.metadata.items()},
            "blocks": [[b.kind, b.text, b.level, b.page, b.first_line, b.last_line, b.header] for b in blocks],
            "links": list(draft.links),
        }
    except NexusError as error:
        reply = {"error": type(error).__name__, "message": error.message, "code": error.code}
    except RecursionError:
        reply = {"error": "Unprocessable", "message": "the file is nested too deeply: flatten it and add it again"}
    except MemoryError:
        raise
    except Exception as error:  # in a supervised child: whatever a library raises, the file made it do so
        why = f"the file is damaged, or not what it says it is ({type(error).__name__}): save it again"
        reply = {"error": "Unprocessable", "message": why}
    data = json.dumps(reply).encode()
    if len(data) > limits.output_bytes:
        why = f"the file holds more than {limits.output_bytes >> 20} MiB of text: split it"
        data = json.dumps({"error": "Unprocessable", "message": why}).encode()
    return data


def _tidy(block: Block) -> Block:
    text = _clean("\n".join(line.rstrip() for line in block.text.split("\n")))
    return replace(block, text=text.strip("\n") if block.kind == "code" else text.strip())


def _send(channel: socket.socket, *parts: bytes) -> None:
    for part in parts:
        channel.sendall(len(part).to_bytes(8, "big"))
        channel.sendall(part)


def _receive(channel: socket.socket, most: int, deadline: float = float("inf")) -> bytes:
    """One part, of at most `most` bytes, before the deadline (of time.monotonic).

    Raises EOFError when the other side ends first, ValueError when it announces more, and TimeoutError.
    """
    data = bytearray()
    wanted = 8
    while len(data) < wanted:
        if deadline < float("inf"):
            channel.settimeout(max(0.001, deadline - time.monotonic()))
        some = channel.recv(min(1 << 20, wanted - len(data)))
        data += some
        if len(data) == wanted == 8:
            wanted += int.from_bytes(data, "big")
        if not some:
            raise EOFError
        if wanted > most + 8:
            raise ValueError(wanted)
    return bytes(data[8:])


def _work(channel: int, limits: Limits) -> NoReturn:
    """The life of a worker: close every door but one, take the limits on, read, answer, exit."""
    try:
        gc.disable()  # it ends with this document, and its memory is limited
        signal.set_wakeup_fd(-1)
        os.dup2(channel, 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)
        os.closerange(3, 4096)
        _limit_self(limits)
        with socket.socket(fileno=0) as caller:
            header = json.loads(_receive(caller, 1 << 20))
            _send(caller, _read(header["name"], header["media_type"], _receive(caller, 1 << 40), limits))
        os._exit(0)
    except MemoryError:
        os._exit(_MEMORY_EXIT)
    except BaseException:  # a forked child must never return into its parent's loop
        os._exit(1)


def _limit_self(limits: Limits) -> None:
    def lower(kind: int, most: int, slack: int = 0) -> None:
        hard = resource.getrlimit(kind)[1]
        most, end = (value if hard < 0 else min(value, hard) for value in (most, most + slack))
        resource.setrlimit(kind, (most, end))

    with suppress(OSError, ValueError):  # a system without /proc, or without this limit
        lower(resource.RLIMIT_AS, _address_space() + limits.memory_bytes)
    lower(resource.RLIMIT_CPU, max(1, round(limits.cpu_seconds)), slack=1)  # a signal, and one second later the end
    lower(resource.RLIMIT_FSIZE, 0)
    lower(resource.RLIMIT_NOFILE, 32)
    lower(resource.RLIMIT_CORE, 0)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds)  # its signal ends C code too
    if sys.platform == "linux":
        _of_libc("prctl")(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the zygote


def _address_space() -> int:
    """Bytes that this process has mapped. Raises OSError where there is no /proc."""
    about = os.open("/proc/self/statm", os.O_RDONLY)  # a file object of Python's would touch a hundred pages more
    try:
        return int(os.read(about, 128).split()[0]) * resource.getpagesize()
    finally:
        os.close(about)


@cache
def _of_libc(name: str) -> Any:
    """A function of the C library: looked up by the zygote, so that no worker has to."""
    return ctypes.CDLL(None)[name]


# The zygote: a worker for each document


def serve() -> NoReturn:
    """Be a zygote: take documents from the socket that is standard input, until that closes."""
    limits = Limits(**json.loads(sys.argv[1]))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the caller may have blocked some, and limits speak in signals
    for number in (signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides when to end, and closes the socket
    _WARM[sys.argv[2]](limits)
    _settle_down()
    ended, ending = socket.socketpair()
    ending.setblocking(False)
    signal.set_wakeup_fd(ending.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    door = socket.socket(fileno=os.dup(0))
    poller = select.poll()
    poller.register(door, select.POLLIN)
    poller.register(ended, select.POLLIN)
    workers: dict[int, int] = {}  # the socket that hears how a worker ended -> the worker
    while True:
        events = dict(poller.poll())
        for verdict in events.keys() & workers.keys():  # nobody waits for this one any more
            os.kill(workers[verdict], signal.SIGKILL)
            poller.unregister(verdict)
        if ended.fileno() in events:
            ended.recv(4096)
            _reap(poller, workers)
        if door.fileno() in events and not _admit(door, limits, poller, workers):
            for worker in workers.values():
                os.kill(worker, signal.SIGKILL)
            os._exit(0)


def _admit(door: socket.socket, limits: Limits, poller: select.poll, workers: dict[int, int]) -> bool:
    message, received, _, _ = socket.recv_fds(door, 1, 2)
    with suppress(OSError):  # no process or no descriptor to be had: the caller sees its sockets close
        if len(received) == 2:
            channel, verdict = received
            worker = os.fork()
            if worker == 0:
                _work(channel, limits)
            workers[verdict] = worker
            poller.register(verdict, 0)  # that the other side hung up is always told
            received = [channel]
    for descriptor in received:
        os.close(descriptor)
    return bool(message)


def _reap(poller: select.poll, workers: dict[int, int]) -> None:
    for verdict, worker in list(workers.items()):
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            with suppress(BrokenPipeError):  # the caller has left
                os.write(verdict, os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
            with suppress(KeyError):
                poller.unregister(verdict)
            del workers[verdict]
            os.close(verdict)


# One of everything: what a reader loads and compiles at its first use, the zygote has then, and no worker again.
_SAMPLES = {
    "text/markdown": "---\na: b\n---\n# c\n\n* d `e` [f](g)\n\n1. h\n\n| i |\n|---|\n| j |\n\n```py\nk\n```\n\n> l\n",
    "text/x-rst": "a\n=\n\n.. note:: b\n\n.. code-block:: sh\n\n   c\n\n.. list-table::\n\n   * - d\n\n.. image:: e\n"
    "\n:doc:`f <g>` ``h`` *i* `j <k>`__\n\n* l\n\n1. m\n\nn\n  o\n\n::\n\n  p\n\n== ==\nq  r\n== ==\ns  t\n== ==\n",
    "text/html": "<p>a<table><tr><td>b</table>",
    "application/xml": "<a><b>c</b></a>",
    "message/rfc822": "From: a\nTo: b\n\nc\n",
}


def _warm_plain(limits: Limits) -> None:
    """Load and exercise what workers need for what people write, so that each begins with it."""
    import_module("charset_normalizer")
    _patch_docutils()
    for media_type, sample in _SAMPLES.items():
        _read("warm", media_type, sample.encode(), limits)


def _warm_office(limits: Limits) -> None:
    """Load what workers need for PDF and office files."""
    for library in ("docx", "openpyxl", "pptx", "pypdfium2"):
        import_module(library)


_WARM = {"plain": _warm_plain, "office": _warm_office}


def _settle_down() -> None:
    """What is there now stays: workers share it. Then leave the network."""
    if sys.platform == "linux":
        _of_libc("prctl")
        if _of_libc("unshare")(0x10000000 | 0x40000000):  # CLONE_NEWUSER, CLONE_NEWNET
            print("nexus.parsing: this system does not let parsers leave the network", file=sys.stderr)
    gc.collect()
    gc.freeze()


# The caller


class Parsers:
    """Reads documents in guarded child processes. Threads may share one."""

    def __init__(self, limits: Limits) -> None:
        self._plain, self._office = _Zygote("plain", limits), _Zygote("office", limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the zygotes and their workers. Whoever waits for a document gets Unavailable."""
        self._plain.close()
        self._office.close()

    def parse(self, source: str, content: bytes, media_type: str | None = None) -> Parsed:
        """The title and the blocks of a document, in reading order.

        `source` is its name: its suffix counts, and it is the title of last resort. `media_type` is what the sender
        says it is. Raises InvalidRequest for an empty file, UnsupportedMedia for a format that nothing here reads,
        Unprocessable for a file that its parser cannot read within the limits, and Unavailable when no child process
        can be had.
        """
        if not content:
            raise InvalidRequest("the file is empty: nothing was added")
        kind = detect(source, content, media_type)
        header = json.dumps({"name": _name_of(source), "media_type": kind}).encode()
        zygote = self._office if kind in _BINARY else self._plain
        reply = zygote.ask(header, content) or zygote.ask(header, content)  # again where it was killed
        if not reply:
            raise Unavailable("the process that reads documents ended twice over this file", code=ENDED)
        return _parsed(reply, kind)


class _Zygote:
    """The process that forks a worker for each document, as its caller has it; it starts with the first document."""

    def __init__(self, kind: Literal["plain", "office"], limits: Limits) -> None:
        self._kind, self._limits = kind, limits
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._door: socket.socket | None = None
        self._closed = False
        self.command = [sys.executable, "-P", "-m", "nexus.parsing"]

    def close(self) -> None:
        """End it and its workers; it does not start again."""
        with self._lock:
            self._closed = True
            self._stop()

    def ask(self, header: bytes, content: bytes) -> bytes:
        """The worker's reply; nothing when the zygote went away before it could say how the worker ended."""
        mine, theirs = socket.socketpair()
        verdict, judge = socket.socketpair()
        with mine, verdict:
            with theirs, judge:
                self._hand_over(theirs, judge)
            deadline = time.monotonic() + self._limits.wall_seconds + _SLACK_SECONDS
            mine.settimeout(deadline - time.monotonic())
            try:
                with suppress(BrokenPipeError, ConnectionResetError):  # it ended early, or said all it had to say
                    _send(mine, header, content)
                with suppress(EOFError, ConnectionResetError):
                    return _receive(mine, self._limits.output_bytes, deadline) or b"nothing"
                verdict.settimeout(max(0.001, deadline - time.monotonic()))
                code = verdict.recv(4)
            except TimeoutError:
                raise Unprocessable(self._reason(-signal.SIGALRM)) from None
            except ValueError:
                raise Unprocessable(_NONSENSE) from None
        if code:
            raise Unprocessable(self._reason(int.from_bytes(code, "big", signed=True)))
        return b""

    def _hand_over(self, *ends: socket.socket) -> None:
        with self._lock:
            for _ in range(2):
                if self._closed:
                    raise Unavailable("the parsers are closed")
                if self.process is None or self._door is None or self.process.poll() is not None:
                    self._door = self._start()
                with suppress(BrokenPipeError, ConnectionResetError):  # it was killed just now
                    socket.send_fds(self._door, [b"."], [end.fileno() for end in ends])
                    return
                self._stop()
        raise Unavailable("the process that reads documents cannot be started: its log says why")

    def _start(self) -> socket.socket:
        self._stop()
        roots = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, roots)), "OPENBLAS_NUM_THREADS": "1"}
        command = [*self.command, json.dumps(asdict(self._limits)), self._kind]
        door, stdin = socket.socketpair()
        with stdin:
            self.process = subprocess.Popen(command, stdin=stdin.fileno(), stdout=subprocess.DEVNULL, env=environment)
        return door

    def _stop(self) -> None:
        if self._door is not None:
            self._door.close()
        if self.process is not None:
            self.process.wait()
        self._door = self.process = None

    def _reason(self, exit_code: int) -> str:
        limits = self._limits
        memory = f"more than {limits.memory_bytes >> 20} MiB of memory"
        how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit {exit_code}"
        needs = {
            -signal.SIGXCPU: f"more than {limits.cpu_seconds:g} s of CPU",
            -signal.SIGALRM: f"more than {limits.wall_seconds:g} s",
            -signal.SIGKILL: memory,  # by the system, which does so when memory ends
            _MEMORY_EXIT: memory,
        }
        if exit_code in needs:
            return f"the file needed {needs[exit_code]}: split or simplify it"
        return f"the file crashed its parser ({how}): it is damaged, or needs {memory}; save it again"


def _parsed(reply: bytes, media_type: str) -> Parsed:
    """A reply as a value. A worker that met a hostile file may say anything, so every field is checked."""
    verdicts = {error.__name__: error for error in (InvalidRequest, Unprocessable, UnsupportedMedia)}
    types: tuple[Any, ...] = (str, int, int | None, int | None, int | None, bool)
    try:
        answer = json.loads(reply)
        if "error" in answer:
            raise verdicts[answer["error"]](str(answer["message"]), code=answer.get("code"))
        for kind, *fields in answer["blocks"]:
            if kind not in get_args(BlockKind) or not all(isinstance(f, t) for f, t in zip(fields, types, strict=True)):
                raise ValueError
        links = answer["links"]
        if not isinstance(links, list) or len(set(links)) < len(links) or len(links) > _MOST_LINKS:
            raise ValueError
        if not all(isinstance(link, str) and link and _target(link) == link for link in links):
            raise ValueError
        blocks = tuple(Block(*block) for block in answer["blocks"])
        metadata = {str(k): str(v) for k, v in answer["metadata"].items()}
        return Parsed(str(answer["title"]), media_type, blocks, metadata, tuple(links))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Unprocessable(_NONSENSE) from None


if __name__ == "__main__":
    serve()
