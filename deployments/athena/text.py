"""Text that others wrote, shown as text: whatever is in it, nothing is loaded, linked or run.

Documents, models and file names are not ours. Streamlit reads the labels of widgets, messages and cells of tables as
Markdown, which loads pictures and makes links; so a label goes through `label`, and everything longer is `st.text` or
`st.code`, which read nothing. The server's Content-Security-Policy (door.py) is the second wall.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal

import streamlit as st
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

LONGEST_LABEL = 120
JOINER = "\u2060"  # of no width: parts what Markdown would make a link or a sign of
NOTHING = "\u200b"
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_JOINED = re.compile(r"(?<=[:@])(?=\S)|(?<=www)(?=\.)", re.IGNORECASE)
# What a screen obeys and does not show: control characters but tab and newline, and marks that turn the direction.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufff9-\ufffb]")
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")

Block = tuple[Literal["text", "heading", "code"], str]


def plain(text: str) -> str:
    """The text without what a screen obeys; what has no place in a text is shown as the sign for that."""
    return _UNSEEN.sub("\ufffd", _ANSI.sub("", text.replace("\r\n", "\n")))


def label(text: object, longest: int = LONGEST_LABEL) -> str:
    """A text for a place that reads Markdown: one line that reads as it is written, shortened in its middle."""
    line = " ".join(plain(str(text)).split())
    if len(line) > longest:
        half = longest // 2
        line = f"{line[:half].rstrip()}…{line[-half:].lstrip()}"
    return _PUNCTUATION.sub(r"\\\1", _JOINED.sub(JOINER, line)) or NOTHING


def code(text: str) -> str:
    """An address or a command of our own, for a place that reads Markdown."""
    return f"`{plain(text).replace('`', '')}`"


def show(text: str) -> None:
    """A text as it is, in lines."""
    st.text(plain(text), width="stretch")


def show_answer(text: str) -> None:
    """A model's text: paragraphs, lists, headings, code and tables of Markdown; all else of it stays as written."""
    for kind, block in blocks(text):
        if kind == "code":
            st.code(block, language=None, wrap_lines=True)
        elif kind == "heading":
            st.markdown(f"**{label(block, len(block))}**")
        else:
            show(block)


def blocks(text: str) -> Iterator[Block]:
    """What a text in Markdown is made of, in order, each block as plain text."""
    for node in SyntaxTreeNode(_MARKDOWN.parse(plain(text))).children:
        if node.type == "heading":
            yield "heading", _words(node)
        elif node.type in ("fence", "code_block"):
            yield "code", node.content.rstrip("\n")
        elif node.type == "table":
            yield "code", _table(node)
        else:
            yield "text", _lines(node)


def _lines(node: SyntaxTreeNode) -> str:
    """A block as lines: items have their marks, what is quoted has a bar."""
    if node.type in ("bullet_list", "ordered_list"):
        first = int(node.attrs.get("start", 1))
        marks = ("•" if node.type == "bullet_list" else f"{first + i}." for i in range(len(node.children)))
        return "\n".join(_indented(f"{mark} ", item) for mark, item in zip(marks, node.children, strict=True))
    if node.type == "blockquote":
        return "\n".join(f"│ {line}" for child in node.children for line in _lines(child).split("\n"))
    if node.type == "hr":
        return "———"
    return node.content.rstrip("\n") if node.type in ("fence", "code_block") else _words(node)


def _indented(mark: str, item: SyntaxTreeNode) -> str:
    lines = "\n".join(map(_lines, item.children)).split("\n")
    return "\n".join([mark + lines[0], *(" " * len(mark) + line for line in lines[1:])])


def _table(node: SyntaxTreeNode) -> str:
    rows = [[_words(cell) for cell in row.children] for part in node.children for row in part.children]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _words(node: SyntaxTreeNode) -> str:
    """The words of a line; a link and a picture are what is written there, with the address behind it."""
    said = "".join(map(_words, node.children)) if node.children else node.content if not node.is_root else ""
    if node.type in ("softbreak", "hardbreak"):
        return "\n"
    if node.type == "image":
        return f"[picture: {node.content}] ({node.attrs.get('src', '')})"
    address = str(node.attrs.get("href", "")) if node.type == "link" else ""
    return f"{said} ({address})" if address not in ("", said) else said


def join(parts: Sequence[object], between: str = " · ") -> str:
    """The parts that say something, in one line."""
    return between.join(str(part) for part in parts if part not in (None, ""))
