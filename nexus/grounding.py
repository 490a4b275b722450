"""How far an answer stands on the documents: its confidence, and the passages it cites.

`assess` is a logistic model of what can be read off the ranked hits alone. Most is said by the share
of the question that one sentence covers, by the best cosine, by how far the best BM25 score leads the
others (an answer stands out from its neighbourhood), and by whether both routes agree on a hit. The
fused score is not used: it is made for order, and its size means nothing.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nexus.chunking import sentences
from nexus.terms import extract_terms
from nexus.types import Hit, Source

JUDGED_HITS = 8
BEST_HITS = 3  # a sentence of these must cover the query, and on one of these the routes must agree
AGREED_RANK = 5
FEWEST_COMPARED = 4  # with fewer hits a lead over the others says nothing, and the usual one is assumed
WEAK_BELOW = 0.9
LOOSE_COSINE = 0.4
NAMED_WORDS = 3


@dataclass(frozen=True, slots=True)
class Weights:
    """Log odds: without any evidence, and for each unit of a feature; 0 where a search cannot know it."""

    base: float
    cosine: float
    cosine_lead: float
    text_lead: float
    coverage: float
    agreement: float


# Fitted by `python -m tests.bench.confidence --fit`: logistic regression over scifact (train) and
# chunking_eval with all-MiniLM-L6-v2, answerable and unanswerable questions weighing the same, once for
# each choice of routes. Another embedder has other cosines and wants its own fit.
BOTH_ROUTES = Weights(-5.34, cosine=4.19, cosine_lead=0.0, text_lead=3.37, coverage=2.52, agreement=0.80)
DENSE_ROUTE = Weights(-4.03, cosine=3.29, cosine_lead=7.14, text_lead=0.0, coverage=3.59, agreement=0.0)
TEXT_ROUTE = Weights(-3.25, cosine=0.0, cosine_lead=0.0, text_lead=4.11, coverage=4.65, agreement=0.0)
USUAL_COSINE_LEAD = 0.08
USUAL_TEXT_LEAD = 0.33

# Words that ask rather than name: a passage without them lacks nothing.
_ASKING = frozenset(
    extract_terms(
        "about again all also am any anything back been before being come each else every explain far"
        " find from get give go going got had happen has have having he her here his its just keep"
        " know let like list long made make many may me mean mention might more most much must my need"
        " new now only or our out over per please put question same say shall she show so some"
        " something still take tell than them thing through too under up us use using via want way"
        " were while whose within without your"
    )
)
_NAME = re.compile(r"\w+(?:[-./]\w+)*")
_JOINT = re.compile(r"[-./_]")
_MOST_JOINED = 6
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_CITATION = re.compile(r"\[(\d{1,4}(?:\s*[,;]\s*\d{1,4})*)\]")


@dataclass(frozen=True, slots=True)
class Judgement:
    """A probability in [0, 1] that the hits answer the query, and what speaks against it, for a person.

    `reason` is there whenever the confidence is below 0.9.
    """

    confidence: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class Features:
    """What can be read off ranked hits.

    `cosine` is the best, `cosine_lead` how far it is above the mean of the others; `text_lead` is the
    same of BM25, as a share of the best. `coverage` is the weighted share of the query's terms in the
    one sentence (with its title and headings) that has most of them, among the best hits. `agreement` is 1
    where a best hit is among the first of both routes. `missing` are words of the query in no hit.
    """

    cosine: float
    cosine_lead: float
    text_lead: float
    coverage: float
    agreement: float
    missing: tuple[str, ...]


def assess(query: str, hits: Sequence[Hit]) -> Judgement:
    """How probably the hits answer the query, were every second query answerable.

    Looks at the best 8 hits, in the order given, which must be that of their fused score: so the weights
    were fitted, and so a confidence means the same whether a reranker answered, failed or is not there.
    Which routes were asked is read off the hits: each names the routes that found it, and a cosine other
    than 0 comes of the dense one.
    """
    if not hits:
        return Judgement(0.0, "nothing was found")
    features, weights = measure(query, hits), weights_for(hits)
    confidence = weigh(features, weights)
    return Judgement(confidence, _reason(features, weights) if confidence < WEAK_BELOW else None)


def weigh(features: Features, weights: Weights) -> float:
    """The probability that the features stand for an answer."""
    odds = (
        weights.base
        + weights.cosine * features.cosine
        + weights.cosine_lead * features.cosine_lead
        + weights.text_lead * features.text_lead
        + weights.coverage * features.coverage
        + weights.agreement * features.agreement
    )
    return 1 / (1 + math.exp(-odds))


def weights_for(hits: Sequence[Hit]) -> Weights:
    """The weights that belong to the routes these hits came by."""
    has_text = any("text" in hit.routes for hit in hits)
    has_dense = any("dense" in hit.routes or hit.cosine for hit in hits)
    if has_text and has_dense:
        return BOTH_ROUTES
    return DENSE_ROUTE if has_dense else TEXT_ROUTE


def measure(query: str, hits: Sequence[Hit]) -> Features:
    """The features of the best hits, of which there must be at least one."""
    hits = hits[:JUDGED_HITS]
    names = [find_mentions(" ".join((hit.title, *hit.heading))) for hit in hits]
    mentions = [find_mentions(hit.text) | name for hit, name in zip(hits, names, strict=True)]
    wanted = wanted_terms(query)
    # A term that many of the hits share tells them apart the least; one that none has counts in full.
    weights = {
        term: weigh_term(term) * (1.3 - sum(term in mentioned for mentioned in mentions) / JUDGED_HITS)
        for term in wanted
    }
    coverage = max(
        _share(weights, find_mentions(sentence) | name)
        for hit, name in zip(hits[:BEST_HITS], names, strict=False)
        for sentence in sentences(hit.text) or [""]
    )
    missing = sorted(wanted.keys() - frozenset().union(*mentions), key=lambda term: (-weights[term], term))
    cosine, cosine_lead = _lead([hit.cosine for hit in hits])
    bm25, text_lead = _lead([hit.routes["text"].score if "text" in hit.routes else 0.0 for hit in hits])
    enough = len(hits) >= FEWEST_COMPARED
    return Features(
        cosine=cosine,
        cosine_lead=cosine_lead if enough else USUAL_COSINE_LEAD,
        text_lead=text_lead / bm25 if enough and bm25 > 0 else USUAL_TEXT_LEAD if bm25 > 0 else 0.0,
        coverage=coverage,
        agreement=float(any(_is_agreed(hit) for hit in hits[:BEST_HITS])),
        missing=tuple(dict.fromkeys(wanted[term] for term in missing)),
    )


def wanted_terms(query: str) -> dict[str, str]:
    """The terms an answer should mention, each with the words of the query that it stands for.

    Stems of content words; and where words and numbers are joined to a name, as in E-414 or 4.11.2,
    the name itself. Words that only ask are left out, unless there are no others.
    """
    wanted: dict[str, str] = {}
    for match in _NAME.finditer(unicodedata.normalize("NFKC", query)):
        name = _joined(_JOINT.split(match[0]))
        if name and len(name) > 1:
            wanted.setdefault(name, match[0])
        for word in _JOINT.split(match[0]):
            for term in extract_terms(word):
                wanted.setdefault(term, match[0] if name else word)
    return {term: words for term, words in wanted.items() if term not in _ASKING} or wanted


def find_mentions(text: str) -> frozenset[str]:
    """Every term and name in a text, as `wanted_terms` writes them, however a name is joined."""
    mentioned = set(extract_terms(text))
    for match in _NAME.finditer(unicodedata.normalize("NFKC", text)):
        parts = _JOINT.split(match[0])[:_MOST_JOINED]
        for start in range(len(parts) - 1):
            for end in range(start + 2, len(parts) + 1):
                mentioned.add(_joined(parts[start:end]))
    mentioned.discard("")
    return frozenset(mentioned)


def _joined(parts: Sequence[str]) -> str:
    """The name that some parts make, "" where none of them has a digit: well-known is two words."""
    name = "".join(parts).lower()
    return name if any(sign.isdigit() for sign in name) else ""


def weigh_term(term: str) -> float:
    """How much a term tells: names and numbers most, then the longer words, which are rarer."""
    if any(sign.isdigit() for sign in term):
        return 2.0 if len(term) > 1 else 0.5
    return min(len(term), 9) / 6


def _share(weights: Mapping[str, float], mentioned: frozenset[str]) -> float:
    whole = sum(weights.values())
    return sum(weight for term, weight in weights.items() if term in mentioned) / whole if whole else 0.0


def _lead(scores: Sequence[float]) -> tuple[float, float]:
    """The best score, and how far it is above the mean of the others."""
    best, *others = sorted(scores, reverse=True)
    return best, best - sum(others) / len(others) if others else best


def _is_agreed(hit: Hit) -> bool:
    places = [hit.routes[name].rank for name in ("dense", "text") if name in hit.routes]
    return len(places) == 2 and max(places) <= AGREED_RANK


def _reason(features: Features, weights: Weights) -> str:
    if features.missing and features.coverage < 0.7:
        return f"no passage mentions {_listed(features.missing[:NAMED_WORDS])}"
    if weights.cosine and features.cosine < LOOSE_COSINE:
        return "the best passage is only loosely related to the question"
    if features.coverage < 0.5:
        return "the words of the question stand in different places, not together"
    return "no passage stands out from the others"


def _listed(words: Sequence[str]) -> str:
    quoted = [f"'{word[:40]}'" for word in words]
    return " or ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


def cited_numbers(response: str) -> set[int]:
    """The n of every [n] and [n, m] in a response; those in Markdown code are indices, not citations."""
    lists = _CITATION.findall(_CODE.sub("", response))
    return {int(number) for numbers in lists for number in re.findall(r"\d+", numbers)}


def cite(passages: Sequence[Hit], response: str) -> tuple[Source, ...]:
    """Each passage as a source, numbered from 1; cited when the response refers to its number."""
    cited = cited_numbers(response)
    return tuple(Source(number, hit, number in cited) for number, hit in enumerate(passages, 1))


def find_unsupported(passages: Sequence[Hit], response: str) -> tuple[int, ...]:
    """The numbers, ascending, that a response cites although no passage has them."""
    return tuple(sorted(number for number in cited_numbers(response) if not 0 < number <= len(passages)))
