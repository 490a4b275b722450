"""Marks of a text that speaks to the model instead of the reader: `prompt-injection` among the content rules.

They are marks and no proof: a manual on security has them, too. That is why they are flagged by default, and why no
answer's safety rests on them: retrieved text is fenced (pipelines/prompts), and decides nothing.
"""

import base64
import binascii
import re
from collections.abc import Iterator

from nexus.reading import ViewName, read
from nexus.scanners import Scanner, Span, Windowed, of_expression, run_of

KIND = "prompt-injection"

_VERBS = "(?:ignore|disregard|forget|override|bypass|neglect|dismiss|do not follow|don't follow|stop following)"
_EARLIER = "(?:previous|prior|above|earlier|preceding|foregoing|existing|original|initial|system)"
_ORDERS = "(?:instruction|prompt|rule|direction|command|message|context|guideline|order|constraint)s?"
_ROLES = "(?:system|assistant|user|human|developer|tool|model|ai)"

_PHRASES = (  # a blank stands for one to four
    rf"\b{_VERBS} (?:(?:all|any|every|the|your|of|these|those|my|and) ){{0,4}}"
    rf"(?:{_EARLIER} (?:and \w{{1,20}} )?){{1,2}}{_ORDERS}\b",
    rf"\b{_VERBS} (?:everything|anything|all|what) (?:you (?:were|have been) told|(?:(?:is|was) )?(?:above|before))",
    r"\byou are (?:now|no longer) (?:an?|the|in|bound)\b",
    r"\b(?:new|updated|real|actual|secret) (?:system )?(?:instructions?|prompt)\s{0,4}:",
    r"\b(?:reveal|print|repeat|show|output|leak) (?:me )?(?:your|the) (?:(?:hidden|full|entire|initial|secret) )?"
    r"(?:system prompt|instructions|initial prompt)\b",
    r"\b(?:do not|don't|never) (?:tell|inform|alert) the user\b",
    r"\bignoriere(?:n sie)? (?:(?:alle|die|deine|ihre) ){0,3}(?:vorherigen|bisherigen|obigen|vorigen|früheren) "
    r"(?:anweisungen|instruktionen|befehle|regeln)",
    r"\b(?:ignorez?|oubliez?) (?:(?:toutes|les|tes|vos) ){0,3}(?:instructions|consignes|règles) "
    r"(?:précédentes|antérieures|ci-dessus)",
    r"\b(?:ignora|ignore|olvida|olvide|esquece|dimentica) (?:(?:todas|tutte|las|as|le|tus|suas) ){0,3}"
    r"(?:instrucciones|instruções|istruzioni|reglas) (?:anteriores|previas|precedenti|prévias)",
    r"(?:игнорируй(?:те)?|забудь(?:те)?) (?:(?:все|свои|эти) ){0,3}(?:предыдущие|прежние|предшествующие) "
    r"(?:инструкции|указания|правила)",
    r"(?:忽略|无视|忽視|無視)(?:掉)?(?:所有|一切|全部)?(?:之前|以上|先前|上述|前面)的?(?:所有|一切|全部)?"
    r"(?:指令|指示|说明|命令|規則|规则|提示)",
    r"(?:以前|これまで|上記|前述|先)の(?:すべての|全ての)?(?:指示|命令|ルール)を(?:すべて)?(?:無視|忘れ)",
)
_MARKERS = (
    r"<\|[^<>|\n]{1,40}\|>",
    r"\[/?INST\]|<</?SYS>>|\[/?(?:SYSTEM_PROMPT|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]",
    r"</?(?:start|end)_of_turn>",
    rf"</?\s{{0,4}}(?:passage|context|conversation|documents?|sources?|{_ROLES}|instructions?|prompt)\s{{0,4}}/?>",
    rf"(?:^|\n)[#*>\s]{{0,8}}{_ROLES}(?:\s{{1,4}}(?:prompt|message|instructions?|override))?[*]{{0,2}}\s{{0,4}}:\s",
    r"(?:^|\n)#{2,4} {1,4}(?:instruction|response|system)s?\s{0,2}:",
    r"!\[[^\]\n]{0,200}\]\(\s{0,4}<?https?://[^)\s]{1,300}[?&][^)\s=]{0,60}=",
    rf"<!--[^>]{{0,300}}\b(?:{_VERBS}|instructions?|assistant|system|prompt|you must|language model)\b[^>]{{0,300}}",
)

_HIDDEN = re.compile(
    "(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]{1,64}"  # tags, but of a flag's emoji
    "|(?<=\U0001f3f4)[\U000e0020-\U000e007f]{8,64}"
    "|[\u202d\u202e]"
    "|[\u200b\u2060-\u2064\ufeff\ufe00-\ufe0f]{4,64}"
)
_ENCODED = re.compile(r"[A-Za-z0-9+/_\-]{24,1024}={0,2}")
_MOST_ENCODED = 1024 + 2

_PARTS = (*(phrase.replace(" ", r"\s{1,4}") for phrase in _PHRASES), *_MARKERS)
_WORDS = of_expression("(?i)" + "|".join(f"(?:{part})" for part in _PARTS))


def _find_hidden(text: str, at: int) -> Iterator[Span]:
    return iter(()) if text.isascii() else (match.span() for match in _HIDDEN.finditer(text, at))


def _find_encoded(text: str, at: int) -> Iterator[Span]:
    return (match.span() for match in _ENCODED.finditer(text, at) if has_phrase(_decoded(match[0])))


def _decoded(encoded: str) -> str:
    """What base64 says, in either alphabet, padded or not."""
    digits = encoded.rstrip("=").translate(str.maketrans("-_", "+/"))
    whole = digits[:-1] if len(digits) % 4 == 1 else digits
    try:
        return base64.b64decode(whole + "=" * (-len(whole) % 4)).decode(errors="replace")
    except binascii.Error:
        return ""


def has_phrase(text: str) -> bool:
    """Whether a text, as it reads, has words that speak to a model."""
    views: tuple[ViewName, ...] = ("plain", "skeleton")
    return any(_WORDS.scan(read(text, view), 0, True)[0] for view in views)


SCANNERS: tuple[tuple[Scanner, ViewName], ...] = (
    (_WORDS, "plain"),
    (_WORDS, "skeleton"),
    (Windowed(_find_hidden, 65), "raw"),
    (Windowed(_find_encoded, _MOST_ENCODED + 1, run_of(lambda char: char.isalnum() or char in "+/_-=")), "raw"),
)
