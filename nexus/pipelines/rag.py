"""An answer from the documents: retrieve, judge the evidence, generate, check the citations."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from nexus.errors import InvalidRequest, TryAgain, UpstreamInvalid
from nexus.grounding import assess, cite, find_unsupported
from nexus.pipelines import chat, prompts
from nexus.ports import Generator
from nexus.types import Answer, Delta, Evidence, Hit, Message, Principal, Prompt, SearchRequest, Usage

INSTRUCTIONS = prompts.read("answer")
REWRITE = prompts.read("rewrite")
NO_EVIDENCE = "The documents do not answer this question."  # as answer.md asks for it
REWRITING_TOKENS = 96
MOST_QUESTION_CHARACTERS = 400  # of a question worth rewriting, and of what comes of it
REMEMBERED_CHARACTERS = 8_000  # of the conversation, its end
_FENCES = ("passage", "conversation")
ANSWER_TEMPERATURE = 0.0  # what the passages say needs no invention


@dataclass(frozen=True, slots=True)
class Ask:
    """A question as the pipeline takes it. `context` is what the session was told before."""

    search: SearchRequest
    principal: Principal
    context: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    session: str = ""
    whole: bool = False  # nobody sees the pieces: an answer that breaks off may be begun again elsewhere


class Retrieve(Protocol):
    def __call__(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Awaitable[Evidence]:
        """Search, and widen the best hits into at most so many passages of so many tokens in all."""
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What the pipeline is lent, and its settings. `rewrite` is for generators that write words of their own.

    `admit` says how a text that is asked may go on, or raises ContentRefused (screening.py).
    """

    retrieve: Retrieve
    generator: Generator
    passages: int
    passage_tokens: int
    abstain_below: float
    rewrite: bool = False
    admit: Callable[[str], Awaitable[str]] | None = None


async def run(request: Ask, tools: Tools) -> AsyncGenerator[str | Answer]:
    """Pieces of the answer as they come, then the Answer itself, last and always."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    if tools.admit is not None:
        asked, told = await tools.admit(request.search.query), await tools.admit(request.context)
        request = replace(request, search=replace(request.search, query=asked), context=told)
    searched_for, usage = request.search.query, None
    if tools.rewrite and _can_be_rewritten(request):
        searched_for, usage = await _rewrite(request, tools)
        seconds["rewrite"] = time.perf_counter() - started
    search = replace(request.search, query=searched_for)
    evidence = await tools.retrieve(search, request.principal, tools.passages, tools.passage_tokens)
    seconds |= evidence.result.seconds
    spent_before = sum(seconds.values())
    judgement = assess(searched_for, evidence.result.by_score)
    generation = chat.Generation()
    reason: str | None
    if not evidence.passages:
        reason = judgement.reason or "nothing was found that may be shown"
    elif judgement.confidence < tools.abstain_below:
        reason = judgement.reason or "the evidence is weaker than this installation asks for"
    else:
        async with aclosing(_generate(request, evidence, tools)) as deltas:
            async for delta in deltas:
                generation.add(delta)
                if delta.text:
                    seconds.setdefault("first_token", time.perf_counter() - started)
                    yield delta.text
        reason = _find_refusal(generation)
    if reason is not None and not generation.text.strip():
        generation.add(Delta(NO_EVIDENCE))
        yield NO_EVIDENCE
    seconds["generate"] = time.perf_counter() - started - spent_before
    yield Answer(
        query=request.search.query,
        response=generation.text,
        sources=cite(evidence.passages, generation.text),
        confidence=judgement.confidence,
        abstained=reason is not None,
        reason=reason,
        sequence=evidence.result.sequence,
        searched_for=searched_for,
        seconds=seconds,
        unsupported_citations=find_unsupported(evidence.passages, generation.text),
        finish_reason=generation.finish_reason,
        usage=usage + generation.usage if usage and generation.usage else usage or generation.usage,
    )


async def collect(stream: AsyncIterator[str | Answer]) -> Answer:
    """The Answer at the end of a stream, for whoever does not want the pieces."""
    answer: Answer | None = None
    async for item in stream:
        if isinstance(item, Answer):
            answer = item
    assert answer is not None, "run() always ends with an Answer"
    return answer


async def _generate(request: Ask, evidence: Evidence, tools: Tools) -> AsyncGenerator[Delta]:
    lent, prompt = chat.Tools(tools.generator), _prompt(request, evidence)
    if request.whole:
        for delta in await chat.take(prompt, lent):
            yield delta
        return
    async with aclosing(chat.run(prompt, lent)) as deltas:
        async for delta in deltas:
            yield delta


def _find_refusal(generation: chat.Generation) -> str | None:
    """Why what was generated is no answer, for a person; None where it is one."""
    said = generation.text.strip(" \n\t\"'*")
    if not said and generation.finish_reason == "length":
        return "the model came to its limit of tokens before it said anything"
    if not said:
        return "no sentence of the passages answers the question"
    return "the model finds no answer in the passages" if said.rstrip(".") == NO_EVIDENCE.rstrip(".") else None


# The prompts


def _prompt(request: Ask, evidence: Evidence) -> Prompt:
    return Prompt(
        messages=render(request, evidence.passages),
        question=request.search.query,
        passages=tuple(evidence.passages),
        max_tokens=request.max_tokens,
        temperature=ANSWER_TEMPERATURE if request.temperature is None else request.temperature,
        seed=request.seed,
        stop=request.stop,
        tenant=request.principal.tenant,
        session=request.session,
        sequence=evidence.result.sequence,
    )


def render(request: Ask, passages: Sequence[Hit]) -> tuple[Message, ...]:
    """The prompt, its fixed part first so that an engine's prefix cache keeps it, the question last."""
    fenced = "\n".join(
        f'<passage n="{number}" title="{prompts.fence_attribute(hit.title, *_FENCES)}">\n'
        f"{prompts.fence(hit.text, *_FENCES)}\n</passage>"
        for number, hit in enumerate(passages, 1)
    )
    told = prompts.fence(request.context[-REMEMBERED_CHARACTERS:], *_FENCES)
    context = f"The conversation so far:\n<conversation>\n{told}\n</conversation>\n\n" if told else ""
    return (Message("system", INSTRUCTIONS), Message("user", f"{fenced}\n\n{context}Question: {request.search.query}"))


def _can_be_rewritten(request: Ask) -> bool:
    """Whether there is a conversation to understand the question by, and it is not a text by itself."""
    has_both = bool(request.context.strip() and request.search.query.strip())
    return has_both and len(request.search.query) <= MOST_QUESTION_CHARACTERS


async def _rewrite(request: Ask, tools: Tools) -> tuple[str, Usage | None]:
    """The question as it can be understood without the conversation, and what that cost; else as it was asked."""
    prompt = Prompt(
        messages=render_rewriting(request),
        max_tokens=REWRITING_TOKENS,
        temperature=0.0,
        seed=request.seed,
        tenant=request.principal.tenant,
        session=request.session,
    )
    try:
        generation = await chat.collect(prompt, chat.Tools(tools.generator))
    except (InvalidRequest, TryAgain, UpstreamInvalid):  # the question as asked finds something, too
        return request.search.query, None
    written = " ".join(generation.text.split()).strip("\"'")
    is_whole = generation.finish_reason == "stop" and 0 < len(written) <= MOST_QUESTION_CHARACTERS
    return written if is_whole else request.search.query, generation.usage


def render_rewriting(request: Ask) -> tuple[Message, ...]:
    """The prompt that asks for the question in other words."""
    told = prompts.fence(request.context[-REMEMBERED_CHARACTERS:], *_FENCES)
    asked = f"<conversation>\n{told}\n</conversation>\n\nQuestion: {request.search.query}"
    return (Message("system", REWRITE), Message("user", asked))
