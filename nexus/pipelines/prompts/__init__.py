"""What generators are told, each text in a file of its own, and how data is fenced within it."""

import re
from importlib.resources import files


def read(name: str) -> str:
    """The text of one prompt: `answer` is answer.md."""
    return files(__name__).joinpath(f"{name}.md").read_text(encoding="utf-8").strip()


def read_steps() -> dict[str, str]:
    """The prompt of every step of `execute`, by the step's name: one file each."""
    names = (entry.name for entry in files(__name__).joinpath("steps").iterdir())
    found = sorted(name.removesuffix(".md") for name in names if name.endswith(".md"))
    return {name: read(f"steps/{name}") for name in found}


def fence(text: str, *tags: str) -> str:
    """Text that can neither close nor open one of these tags, whatever it says."""
    return re.sub(rf"<(?=\s*/?\s*(?:{'|'.join(tags)}))", "<\u200b", text, flags=re.IGNORECASE)


def fence_attribute(text: str, *tags: str) -> str:
    """The same for an attribute of a tag: it stays within its quotation marks and on one line."""
    return " ".join(fence(text, *tags).replace('"', "'").split())
