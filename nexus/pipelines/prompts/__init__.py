"""What generators are told, each text in a file of its own, and how data is fenced within it."""

import re
from importlib.resources import files

from nexus.reading import Reading


def read(name: str) -> str:
    """The text of one prompt: `answer` is answer.md."""
    return files(__name__).joinpath(f"{name}.md").read_text(encoding="utf-8").strip()


def read_steps() -> dict[str, str]:
    """The prompt of every step of `execute`, by the step's name: one file each."""
    names = (entry.name for entry in files(__name__).joinpath("steps").iterdir())
    found = sorted(name.removesuffix(".md") for name in names if name.endswith(".md"))
    return {name: read(f"steps/{name}") for name in found}


# What a chat template makes a role of: engines read these signs as their own wherever they stand in a message.
_OWN_SIGNS = (
    r"<(?=\||<?/?SYS>|/?(?:s|bos|eos|pad|unk|(?:start|end)_of_(?:turn|image|text)|im_(?:start|end))>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG)\])"
)
# Tags, orders of direction, signs of no width and controls: a model reads them, a person does not. Joiners stay.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_QUOTES = str.maketrans({sign: "'" for sign in '"＂“”„‟″〃'})
_ESCAPES = {"<": "&lt;", "[": "&#91;"}


def fence(text: str, *tags: str) -> str:
    """Text that can neither close nor open one of these tags, nor begin a turn, however it is disguised.

    What it says in signs that nobody sees is left out. The sign that would open a tag, or one that looks like it,
    is written as HTML writes it.
    """
    seen = _UNSEEN.sub("", text)
    reading = Reading(frozenset({"skeleton"}))
    reading.add(seen)
    reading.finish()
    view, done = reading.views["skeleton"], 0
    parts: list[str] = []
    for match in re.finditer(rf"<(?=[\s/]*(?:{'|'.join(tags)}))|{_OWN_SIGNS}", view.text, re.IGNORECASE):
        start, end = view.place(match.start()), view.place_after(match.end())
        if start >= done:
            parts += (reading.raw[done:start], _ESCAPES[match[0][0]])
            done = end
    return "".join([*parts, reading.raw[done:]])


def fence_attribute(text: str, *tags: str) -> str:
    """The same for an attribute of a tag: it stays within its quotation marks and on one line."""
    return " ".join(fence(text, *tags).translate(_QUOTES).split())
