"""What finds something in a text whose end is still to come, so that where it was cut makes no difference.

A scanner says of each place at most once whether something begins there, and only when no more text could change
that. Everything that it finds is therefore of a bounded width. A rule's own pattern runs in RE2, in time linear in
the text whatever the pattern is; RE2 knows neither look-around nor back references, which is the price. The classes
`pii:…` are found by patterns and arithmetic of our own (Luhn for cards, ISO 7064 MOD 97-10 for IBANs), each bounded.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from re import _parser  # type: ignore[attr-defined]
from typing import Protocol

import re2

from nexus.errors import ConfigError

MOST_PATTERN = 1000  # characters of a pattern
MOST_WIDTH = 1024  # characters that one match may have
Span = tuple[int, int]


class Scanner(Protocol):
    """Finds spans of a text; never believes that the end of what it has is the end, unless `final`."""

    def scan(self, text: str, at: int, final: bool) -> tuple[list[Span], int]:
        """The spans that begin at or after `at`, in order, and from where on more text is needed to tell.

        Of the text before `at` one character is there, if there is any.
        """
        ...


@dataclass(frozen=True, slots=True)
class Windowed:
    """A scanner of what has at most `width` characters. `hold` says what may go on at a text's end, if it can tell."""

    find: Callable[[str, int], Iterator[Span]]
    width: int
    hold: Callable[[str, int], int] | None = None

    def scan(self, text: str, at: int, final: bool) -> tuple[list[Span], int]:
        known = len(text) if final else max(at, len(text) - self.width)
        if self.hold is not None and not final:
            known = max(known, self.hold(text, known))
        spans: list[Span] = []
        for start, end in self.find(text, at):
            if start >= known:
                break
            spans.append((start, end))
            at = end
        return spans, max(at, known)


# A rule's own pattern


def of_pattern(pattern: str) -> Windowed:
    """The scanner of a rule's expression. Raises ConfigError for one that is too long, too wide or not RE2's."""
    if len(pattern) > MOST_PATTERN:
        raise ConfigError(f"a pattern has at most {MOST_PATTERN} characters")
    return of_expression(pattern)


def of_expression(pattern: str) -> Windowed:
    """The scanner of a regular expression of any length. Raises ConfigError."""
    if "{," in pattern:
        raise ConfigError(f"the pattern {pattern[:50]!r} has {{,n}}, which engines read differently; write {{0,n}}")
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(pattern, options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what a later Python may read otherwise
            least, most = _parser.parse(pattern).getwidth()
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
        raise ConfigError(f"the pattern {pattern[:50]!r} is not one of RE2's: {reason}") from None
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"the pattern {pattern[:50]!r} cannot be read: {error}") from None
    if least == 0:
        raise ConfigError(f"the pattern {pattern[:50]!r} matches the empty text")
    if most > MOST_WIDTH:
        raise ConfigError(
            f"a match of the pattern {pattern[:50]!r} has no bound, or one over {MOST_WIDTH} characters;"
            " write {1,100} in place of + and *"
        )

    def find(text: str, at: int) -> Iterator[Span]:
        return (match.span() for match in compiled.finditer(text, at))

    return Windowed(find, most + 1)


# Classes


def of_class(name: str) -> Windowed:
    """The scanner of `pii:…`. Raises ConfigError for a class that is not known."""
    if name not in CLASSES:
        raise ConfigError(f"there is no class {name!r}; there are {', '.join(CLASSES)}")
    return CLASSES[name]


def run_of(belongs: Callable[[str], bool]) -> Callable[[str, int], int]:
    """Where a run of such characters begins that the text ends in."""

    def hold(text: str, least: int) -> int:
        start = len(text)
        while start > least and belongs(text[start - 1]):
            start -= 1
        return start

    return hold


MOST_LOCAL = 64  # octets of the part before the @ (RFC 5321, 4.5.3.1.1)
_LOCAL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~\-]+\Z")
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w\-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w\-])")


def _find_emails(text: str, at: int) -> Iterator[Span]:
    sign = text.find("@", at)
    while sign != -1:
        local = _LOCAL.search(text[max(at, sign - MOST_LOCAL) : sign])
        domain = _DOMAIN.match(text, sign + 1)
        if local and domain:
            at = domain.end()
            yield sign - len(local[0]), at
        sign = text.find("@", max(sign + 1, at))


# Abroad with + or 00; at home with a leading 0 and groups; three, three and four digits.
_PHONE = re.compile(
    r"(?<![\w+])(?:\+|00)[1-9](?:[ .\-/()]{0,2}\d){6,14}(?!\d)"
    r"|(?<!\w)\(?0\d{1,5}\)?(?:[ .\-/]{1,2}\d{2,10}){1,4}(?!\w)"
    r"|(?<!\w)\(?\d{3}\)?[ .\-]{1,2}\d{3}[ .\-]\d{4}(?!\w)"
)
_DATE = re.compile(r"\d{1,2}([./\- ])\d{1,2}\1\d{2,4}")
FEWEST_PHONE_DIGITS = 7


def _find_phones(text: str, at: int) -> Iterator[Span]:
    for match in _PHONE.finditer(text, at):
        digits = sum(char.isdigit() for char in match[0])
        if digits >= FEWEST_PHONE_DIGITS and not _DATE.match(match[0]):
            yield match.span()


_CARD_BEGIN = re.compile(r"(?<!\d)[2-6]")
CARD_DIGITS = range(13, 20)  # ISO/IEC 7812-1


def is_luhn(digits: str) -> bool:
    """Whether the last digit is right (ISO/IEC 7812-1, annex B)."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _find_cards(text: str, at: int) -> Iterator[Span]:
    while begin := _CARD_BEGIN.search(text, at):
        end = _end_of_card(text, begin.start())
        if end is not None:
            yield begin.start(), end
        at = end or begin.end()


def _end_of_card(text: str, start: int) -> int | None:
    """Where the longest number ends that is right and is followed by no digit."""
    best, digits, index = None, "", start
    while index < len(text) and len(digits) < CARD_DIGITS.stop - 1:
        if text[index].isdecimal():
            digits += text[index]
            is_last = index + 1 == len(text) or not text[index + 1].isdecimal()
            if is_last and len(digits) in CARD_DIGITS and is_luhn(digits):
                best = index + 1
        elif text[index] not in " .-" or not text[index - 1].isdecimal():
            break
        index += 1
    return best


_IBAN_BEGIN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?=[ \-]?[A-Za-z0-9])")
_IBAN_OPEN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{1,2}(?:[0-9]?|[0-9]{2}[A-Za-z0-9 \-]*)\Z")
IBAN_SIGNS = range(15, 35)  # ISO 13616


def is_iban(signs: str) -> bool:
    """Whether the check digits are right (ISO 7064, MOD 97-10)."""
    return int("".join(str(int(sign, 36)) for sign in signs[4:] + signs[:4])) % 97 == 1


def _find_ibans(text: str, at: int) -> Iterator[Span]:
    while begin := _IBAN_BEGIN.search(text, at):
        end = _end_of_iban(text, begin.start())
        if end is not None:
            yield begin.start(), end
        at = end or begin.end()


def _end_of_iban(text: str, start: int) -> int | None:
    best, signs, index = None, "", start
    while index < len(text) and len(signs) < IBAN_SIGNS.stop - 1:
        if text[index].isascii() and text[index].isalnum():
            signs += text[index]
            is_last = index + 1 == len(text) or not (text[index + 1].isascii() and text[index + 1].isalnum())
            if is_last and len(signs) in IBAN_SIGNS and is_iban(signs):
                best = index + 1
        elif text[index] not in " -" or len(signs) % 4 or text[index - 1] in " -":
            break
        index += 1
    return best


def _hold_iban(text: str, least: int) -> int:
    found = _IBAN_OPEN.search(text, least)
    return len(text) if found is None else found.start()


_KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"eyJ[\w\-]{8,2048}(?:\.[\w\-]{0,4096}){1,4}"  # a JWT, RFC 7519
    r"|nx_[A-Za-z0-9_]{16,256}"
    r"|(?:sk|pk|rk)[\-_][\w\-]{16,256}"
    r"|gh[pousr]_[A-Za-z0-9]{20,255}|github_pat_\w{20,255}|glpat-[\w\-]{20,255}"
    r"|xox[abeoprs]-[A-Za-z0-9\-]{10,255}"
    r"|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[\w\-]{35}|hf_[A-Za-z0-9]{20,255}|npm_[A-Za-z0-9]{36}"
    r")",
    re.ASCII,
)
MOST_KEY = 2048 + 4 * 4097 + 3


def _find_keys(text: str, at: int) -> Iterator[Span]:
    return (match.span() for match in _KEY.finditer(text, at))


CLASSES: dict[str, Windowed] = {
    "pii:email": Windowed(_find_emails, MOST_LOCAL + 1 + 8 * 64 + 24 + 1, run_of(lambda char: not char.isspace())),
    "pii:phone": Windowed(_find_phones, 64, run_of(lambda char: char.isdecimal() or char in " .-/()+")),
    "pii:card": Windowed(_find_cards, 2 * 19 + 1, run_of(lambda char: char.isdecimal() or char in " .-")),
    "pii:iban": Windowed(_find_ibans, 2 * 34 + 1, _hold_iban),
    "pii:key": Windowed(_find_keys, MOST_KEY + 1, run_of(lambda char: char.isalnum() or char in "_-.")),
}
