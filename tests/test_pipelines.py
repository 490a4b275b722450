"""Question to answer, a conversation, and named steps, over generators that say what a test wrote down."""

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.config import load_config
from nexus.errors import (
    ConfigError,
    InvalidRequest,
    NexusError,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
    UpstreamInvalid,
)
from nexus.models import extractive
from nexus.pipelines import chat, execute, prompts, rag
from nexus.types import (
    Answer,
    Delta,
    Evidence,
    Hit,
    Message,
    Principal,
    Prompt,
    RouteScore,
    SearchRequest,
    SearchResult,
    Usage,
)

READER = Principal("acme", "alice")
PUMP = "The pump in bay 4 runs at 40 bar. Its seal was replaced in May."
TOLD = "user: Which pump leaks?\nassistant: The pump in bay 4."


@dataclass
class Scripted:
    """A generator that answers with the next of its scripts: deltas in order, an error raised where one stands."""

    scripts: list[Sequence[Delta | str | Exception]]
    name: str = "scripted"
    sees_images: bool = False
    asked: list[Prompt] = field(default_factory=list)
    closed: int = 0

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        self.asked.append(prompt)
        try:
            for item in self.scripts[len(self.asked) - 1]:
                if isinstance(item, Exception):
                    raise item
                yield item if isinstance(item, Delta) else Delta(item)
        finally:
            self.closed += 1

    async def check(self) -> None: ...


def passage(text: str, title: str = "Pump") -> Hit:
    routes = {"dense": RouteScore(1, 0.9), "text": RouteScore(1, 9.0)}
    return Hit("c", "d", "v", 0, 1.0, 0.9, text, title, "s", (), None, None, None, {}, routes)


@dataclass
class Shelf:
    """A retriever with the same passages for every query; it remembers what was searched for."""

    passages: tuple[Hit, ...] = (passage(PUMP), passage("The wheel is round."))
    searched: list[SearchRequest] = field(default_factory=list)

    async def __call__(self, request: SearchRequest, principal: Principal, passages: int, tokens: int) -> Evidence:
        self.searched.append(request)
        return Evidence(SearchResult(self.passages, 7, {"search": 0.0}), self.passages)


def ask(
    generator: Scripted, question: str = "What pressure does the pump in bay 4 run at?", context: str = "",
    shelf: Shelf | None = None, rewrite: bool = True, abstain_below: float = 0.0, **fields: object,
) -> Answer:  # fmt: skip
    tools = rag.Tools(shelf or Shelf(), generator, 5, 500, abstain_below, rewrite)
    request = rag.Ask(SearchRequest(question), READER, context, **fields)  # type: ignore[arg-type]

    async def go() -> Answer:
        said = [item async for item in rag.run(request, tools)]
        *pieces, answer = said
        assert isinstance(answer, Answer) and "".join(map(str, pieces)) == answer.response
        return answer

    return asyncio.run(go())


# ── rewriting ───────────────────────────────────────────────────────────────────────────────────

FOLLOW_UP = "What pressure does it run at?"
WHOLE = "What pressure does the pump in bay 4 run at?"


def test_a_follow_up_is_searched_as_a_whole_question_and_answered_as_asked() -> None:
    generator, shelf = Scripted([[f' "{WHOLE}" \n', Delta(finish_reason="stop")], ["40 bar [1]."]]), Shelf()
    answer = ask(generator, FOLLOW_UP, TOLD, shelf)
    assert [request.query for request in shelf.searched] == [WHOLE]
    assert (answer.query, answer.searched_for, answer.response) == (FOLLOW_UP, WHOLE, "40 bar [1].")
    rewriting, answering = generator.asked
    assert answering.question == FOLLOW_UP and answering.messages[-1].text.endswith(f"Question: {FOLLOW_UP}")
    assert rewriting.temperature == 0 and rewriting.max_tokens == rag.REWRITING_TOKENS
    assert rewriting.passages == () and TOLD in rewriting.messages[-1].text
    assert rewriting.messages[-1].text.endswith(FOLLOW_UP)
    assert "rewrite" in answer.seconds


def test_the_rest_of_the_search_stays_as_it_was() -> None:
    shelf, generator = Shelf(), Scripted([[WHOLE], ["x [1]"]])
    tools = rag.Tools(shelf, generator, 5, 500, 0.0, rewrite=True)
    search = SearchRequest(FOLLOW_UP, k=3, collection="arms", as_of=2)
    asyncio.run(rag.collect(rag.run(rag.Ask(search, READER, TOLD), tools)))
    assert shelf.searched == [replace(search, query=WHOLE)]


def test_the_evidence_is_judged_by_what_was_searched() -> None:
    alone = ask(Scripted([["x"]]), FOLLOW_UP, TOLD, rewrite=False)
    rewritten = ask(Scripted([[WHOLE], ["x"]]), FOLLOW_UP, TOLD)
    assert rewritten.confidence == ask(Scripted([["x"]]), WHOLE).confidence > alone.confidence


@pytest.mark.parametrize(
    "script",
    [
        [Unavailable("away")], [Overloaded("full")], [UpstreamInvalid("nonsense")], [InvalidRequest("too long")],
        ["What pr", Unavailable("away")], [], [" \n "], ['""'], ["w" * 401],
        ["What pressure does", Delta(finish_reason="length")], [Delta(WHOLE, finish_reason="content_filter")],
    ],
)  # fmt: skip
def test_without_a_usable_rewriting_the_question_is_searched_as_asked(script: list) -> None:
    generator, shelf = Scripted([script, ["40 bar [1]."]]), Shelf()
    answer = ask(generator, FOLLOW_UP, TOLD, shelf)
    assert [request.query for request in shelf.searched] == [FOLLOW_UP]
    assert (answer.searched_for, answer.response, answer.abstained) == (FOLLOW_UP, "40 bar [1].", False)
    assert generator.closed == 2


def test_a_fault_of_ours_is_not_taken_for_a_failed_rewriting() -> None:
    with pytest.raises(ZeroDivisionError):
        ask(Scripted([[ZeroDivisionError()], ["x"]]), FOLLOW_UP, TOLD)


@pytest.mark.parametrize(
    ("question", "context", "rewrite"),
    [(WHOLE, "", True), (WHOLE, " \n", True), (FOLLOW_UP, TOLD, False), ("why? " * 100, TOLD, True)],
)
def test_what_stands_alone_costs_no_generation(question: str, context: str, rewrite: bool) -> None:
    generator, shelf = Scripted([["40 bar [1]."]]), Shelf()
    answer = ask(generator, question, context, shelf, rewrite)
    assert (len(generator.asked), shelf.searched[0].query, answer.searched_for) == (1, question, question)
    assert "rewrite" not in answer.seconds


def test_of_a_long_conversation_the_end_is_remembered() -> None:
    generator = Scripted([[WHOLE], ["x"]])
    ask(generator, FOLLOW_UP, "FIRST " + "word " * 5000 + "LAST")
    told = generator.asked[0].messages[-1].text
    assert "LAST" in told and "FIRST" not in told and len(told) < rag.REMEMBERED_CHARACTERS + 200


# ── the prompt ──────────────────────────────────────────────────────────────────────────────────


def test_the_head_of_the_prompt_is_the_same_for_every_request() -> None:
    first, second = Scripted([[WHOLE], ["x"]]), Scripted([["y"], ["y"]])
    ask(first, FOLLOW_UP, TOLD)
    ask(second, "Who?", "other", Shelf((passage("Other", 'T"'),)), seed=3, max_tokens=9, temperature=1.0)
    for one, other in zip(first.asked, second.asked, strict=True):
        assert one.messages[0] == other.messages[0] and one.messages[0].role == "system"
    assert [prompt.messages[0].text for prompt in first.asked] == [rag.REWRITE, rag.INSTRUCTIONS]


def test_after_the_head_come_passages_conversation_and_question() -> None:
    (_, user) = rag.render(rag.Ask(SearchRequest("Q?"), READER, "CONTEXT"), [passage("ONE"), passage("TWO")])
    places = [user.text.index(word) for word in ("ONE", "TWO", "CONTEXT", "Question: Q?")]
    assert places == sorted(places)


def test_the_sentence_of_no_evidence_is_the_one_that_is_asked_for() -> None:
    assert rag.NO_EVIDENCE in rag.INSTRUCTIONS.splitlines()


def test_quotation_marks_of_a_passage_stay() -> None:
    (_, user) = rag.render(rag.Ask(SearchRequest("Q?"), READER), [passage('say "stop"', 'The "red"\nbook')])
    assert 'say "stop"' in user.text and "title=\"The 'red' book\"" in user.text


HOSTILE = st.lists(
    st.sampled_from(
        ["<", "</", "< / ", ">", '"', "\n", " ", "passage", "PASSage", "conversation", "data", "resulT", "x"]
    )
).map("".join)


@given(HOSTILE, HOSTILE, HOSTILE)
def test_passages_and_conversations_cannot_leave_their_fence(text: str, title: str, told: str) -> None:
    request = rag.Ask(SearchRequest("Q?"), READER, told)
    (_, user) = rag.render(request, [passage(text, title)])
    tags = re.findall(r"<\s*/?\s*passage[^\n]*", user.text, re.IGNORECASE)
    assert len(tags) == 2 and tags[1] == "</passage>"
    assert re.fullmatch(r'<passage n="1" title="[^"]*">', tags[0])
    (_, rewriting) = rag.render_rewriting(request)
    assert len(re.findall(r"<\s*/?\s*conversation", rewriting.text, re.IGNORECASE)) == 2


@given(HOSTILE, HOSTILE, HOSTILE)
def test_data_and_results_cannot_leave_their_fence(name: str, value: str, result: str) -> None:
    done = execute.StepResult("analysis", result, "stop", 0.0)
    (_, user) = execute.render("summary", {name: value, "nested": [value]}, [done])
    tags = re.findall(r"<\s*/?\s*(?:data|result)[^\n]*", user.text, re.IGNORECASE)
    assert len(tags) == 6 and tags[1] == tags[3] == "</data>" and tags[5] == "</result>"
    assert re.fullmatch(r'<data name="[^"]*">', tags[0]) and tags[4] == '<result step="analysis">'


@given(HOSTILE)
def test_a_fence_changes_nothing_but_what_opens_a_tag(text: str) -> None:
    assert prompts.fence(text, "data", "passage").replace("&lt;", "<") == text


def test_every_prompt_is_a_file_that_ships() -> None:
    shipped = {entry.name for entry in files("nexus.pipelines.prompts").iterdir()}
    assert {"answer.md", "rewrite.md", "material.md", "steps"} <= shipped
    assert all(execute.STEPS.values()) and all(set(steps) <= set(execute.STEPS) for steps in execute.TEMPLATES.values())


# ── what an answer says of itself ───────────────────────────────────────────────────────────────


def test_citations_are_checked_against_what_was_given() -> None:
    answer = ask(Scripted([["40 bar [1], ", "as said [9, 3] and [0]. `x[5]`"]]))
    assert [(source.number, source.cited) for source in answer.sources] == [(1, True), (2, False)]
    assert answer.unsupported_citations == (0, 3, 9)
    assert ask(Scripted([["40 bar [1][2]."]])).unsupported_citations == ()


@pytest.mark.parametrize("wrapped", ["{}", " {}\n", '"{}"', "**{}**"])
def test_a_model_that_finds_no_answer_abstains(wrapped: str) -> None:
    said = wrapped.format(rag.NO_EVIDENCE)
    answer = ask(Scripted([[said[:9], said[9:], Delta(finish_reason="stop")]]))
    assert (answer.abstained, answer.reason) == (True, "the model finds no answer in the passages")
    assert answer.response == said and not any(source.cited for source in answer.sources)


def test_the_sentence_within_an_answer_is_no_abstention() -> None:
    answer = ask(Scripted([[f"40 bar [1]. On the rest: {rag.NO_EVIDENCE}"]]))
    assert not answer.abstained and answer.reason is None and answer.sources[0].cited


def test_weak_evidence_is_not_put_to_the_model() -> None:
    generator = Scripted([])
    answer = ask(generator, abstain_below=1.0)
    assert (answer.response, answer.abstained, answer.finish_reason) == (rag.NO_EVIDENCE, True, "stop")
    assert answer.reason and generator.asked == [] and answer.usage is None


@pytest.mark.parametrize(("finish", "words"), [("stop", "no sentence"), ("length", "limit of tokens")])
def test_a_model_that_says_nothing_abstains_and_says_why(finish: str, words: str) -> None:
    answer = ask(Scripted([[Delta(finish_reason=finish)]]))
    assert (answer.response, answer.abstained, answer.finish_reason) == (rag.NO_EVIDENCE, True, finish)
    assert words in (answer.reason or "")


def test_an_answer_says_that_it_was_cut_off() -> None:
    answer = ask(Scripted([["40 b", Delta(finish_reason="length")]]))
    assert (answer.response, answer.finish_reason, answer.abstained) == ("40 b", "length", False)


@pytest.mark.parametrize(
    ("rewriting", "answering", "total"),
    [
        (Usage(30, 5), Usage(100, 7, 64), Usage(130, 12, 64)),
        (None, Usage(100, 7), Usage(100, 7)), (Usage(30, 5), None, Usage(30, 5)), (None, None, None),
    ],
)  # fmt: skip
def test_usage_is_of_rewriting_and_answering(
    rewriting: Usage | None, answering: Usage | None, total: Usage | None
) -> None:
    scripts = [[WHOLE, Delta(usage=rewriting)], ["40 bar [1].", Delta(finish_reason="stop"), Delta(usage=answering)]]
    assert ask(Scripted(scripts), FOLLOW_UP, TOLD).usage == total


def test_a_caller_who_leaves_stops_the_generation() -> None:
    async def go() -> int:
        generator = Scripted([["one", "two"]])
        stream = rag.run(rag.Ask(SearchRequest("Q?"), READER), rag.Tools(Shelf(), generator, 5, 500, 0.0))
        assert await anext(stream) == "one"
        await stream.aclose()
        return generator.closed

    assert asyncio.run(go()) == 1


def test_errors_of_the_generator_arrive_as_they_are() -> None:
    with pytest.raises(Overloaded, match="full"):
        ask(Scripted([["40", Overloaded("full")]]))


# ── a conversation ──────────────────────────────────────────────────────────────────────────────


def quote(*turns: tuple[str, str], **fields: object) -> str:
    messages = tuple(Message(role, text) for role, text in turns)  # type: ignore[arg-type]
    prompt = Prompt(messages, **fields)  # type: ignore[arg-type]
    generation = asyncio.run(chat.collect(prompt, chat.Tools(extractive.open("extractive:"))))
    assert generation.finish_reason == "stop"
    return generation.text


def test_a_chat_is_what_the_generator_makes_of_it() -> None:
    script = [Delta("a"), Delta("b", choice=1), Delta("c", finish_reason="length"), Delta(usage=Usage(1, 2))]
    generator, prompt = Scripted([script, script]), Prompt((Message("user", "hi"),))

    async def go() -> tuple[list[Delta], chat.Generation]:
        tools = chat.Tools(generator)
        return [delta async for delta in chat.run(prompt, tools)], await chat.collect(prompt, tools)

    deltas, whole = asyncio.run(go())
    assert deltas == script and generator.asked == [prompt, prompt]
    assert (whole.text, whole.finish_reason, whole.usage) == ("ac", "length", Usage(1, 2))


def test_the_extractive_generator_quotes_the_conversation_without_citations() -> None:
    said = quote(("user", PUMP), ("assistant", "Noted."), ("user", "What pressure does the pump run at?"))
    assert said == "The pump in bay 4 runs at 40 bar."


def test_it_quotes_the_message_that_asks() -> None:
    expected = "The pump in bay 4 runs at 40 bar."
    assert quote(("user", f"{PUMP} What pressure does the pump run at?")) == expected
    assert quote(text=f"{PUMP} What pressure does the pump run at?") == expected


@pytest.mark.parametrize(
    "turns",
    [
        [], [("user", "")], [("user", "hello")], [("user", "What pressure does the pump run at?")],
        [("system", PUMP), ("user", "What pressure does the pump run at?")],
        [("user", "hello"), ("assistant", extractive.NOTHING_TO_QUOTE),
         ("user", "What do documents and this conversation say?")],
        [("user", "What pressure does the pump run at?"), ("user", "What pressure does the pump run at now?")],
    ],
)  # fmt: skip
def test_where_nothing_answers_it_says_what_it_is(turns: list) -> None:
    assert quote(*turns) == extractive.NOTHING_TO_QUOTE


def test_a_conversation_quotes_code_without_an_empty_end() -> None:
    said = quote(("user", "```\ncolcon build --symlink\n```\n\nHow is symlink given to colcon build?"))
    assert said == "```\ncolcon build --symlink\n```"


# ── steps ───────────────────────────────────────────────────────────────────────────────────────


def perform(generator: Scripted, *steps: str, **data: object) -> list[execute.StepResult]:
    request = execute.Execution(steps, data or {"user_input": "test"}, READER, max_tokens=50, session="s")

    async def go() -> list[execute.StepResult]:
        return [result async for result in execute.run(request, chat.Tools(generator))]

    return asyncio.run(go())


def test_steps_go_in_order_and_each_sees_what_was_before() -> None:
    scripts = [["FIRST\n"], ["SEC", "OND", Delta(finish_reason="length"), Delta(usage=Usage(1, 2))], ["THIRD"]]
    generator = Scripted(scripts)
    results = perform(generator, "analysis", "critique", "summary", user_input="INPUT", depth={"a": [1, "é"]})
    assert [(r.step, r.result, r.finish_reason) for r in results] == [
        ("analysis", "FIRST", "stop"), ("critique", "SECOND", "length"), ("summary", "THIRD", "stop"),
    ]  # fmt: skip
    assert results[1].usage == Usage(1, 2) and all(result.seconds >= 0 for result in results)
    seen = [
        [word in prompt.messages[1].text for word in ("INPUT", '{"a": [1, "é"]}', "FIRST", "SECOND", "THIRD")]
        for prompt in generator.asked
    ]
    assert seen == [[True, True, False, False, False], [True, True, True, False, False], [True] * 4 + [False]]
    for prompt, step in zip(generator.asked, ("analysis", "critique", "summary"), strict=True):
        assert prompt.messages[0].text == f"{execute.STEPS[step]}\n\n{execute.MATERIAL}"
        assert (prompt.max_tokens, prompt.tenant, prompt.session) == (50, "acme", "s")


@pytest.mark.parametrize("kind", [Overloaded, Unavailable, UpstreamInvalid, InvalidRequest, TooLarge])
def test_a_failed_step_ends_the_run_under_its_own_name(kind: type[NexusError]) -> None:
    generator = Scripted([["FIRST"], ["SEC", kind("no room", pointer="/x", code="odd")], ["THIRD"]])
    with pytest.raises(kind, match="the step 'critique' failed: no room") as caught:
        perform(generator, "analysis", "critique", "summary")
    assert (type(caught.value), caught.value.pointer, caught.value.code) == (kind, "/x", "odd")
    assert len(generator.asked) == generator.closed == 2


def test_a_step_that_says_nothing_has_failed() -> None:
    with pytest.raises(UpstreamInvalid, match=r"'analysis'.*'length'.*max_tokens"):
        perform(Scripted([[" ", Delta(finish_reason="length")]]), "analysis", "summary")


def test_a_run_can_be_left_between_steps_and_within_one() -> None:
    reached = asyncio.Event()

    class Slow(Scripted):
        async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
            self.asked.append(prompt)
            try:
                yield Delta("x")
                if len(self.asked) == 2:
                    reached.set()
                    await asyncio.Event().wait()
            finally:
                self.closed += 1

    async def between() -> Slow:
        generator = Slow([])
        run = execute.run(execute.Execution(("analysis", "summary"), {"a": 1}, READER), chat.Tools(generator))
        await anext(run)
        await run.aclose()
        return generator

    async def within() -> Slow:
        generator = Slow([])
        run = execute.run(execute.Execution(("analysis",) * 3, {"a": 1}, READER), chat.Tools(generator))
        await anext(run)
        task = asyncio.create_task(anext(run))  # type: ignore[arg-type]
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return generator

    left, cut = asyncio.run(between()), asyncio.run(within())
    assert (len(left.asked), left.closed) == (1, 1)
    assert (len(cut.asked), cut.closed) == (2, 2)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("ReasoningAndExplanationProtocol", "reasoning_and_explanation"), ("AnalysisProtocol", "analysis"),
        ("reasoning_and_explanation", "reasoning_and_explanation"), ("analysis_protocol", "analysis"),
        ("Summary", "summary"), ("critique", "critique"),
    ],
)  # fmt: skip
def test_protocols_are_steps_by_another_spelling(name: str, step: str) -> None:
    assert execute.steps_of_protocols([name]) == (step,)


def test_templates_are_built_in_or_configured() -> None:
    assert execute.steps_of_template("analyze_only", {}) == ("analysis",)
    full = execute.steps_of_template("full_analysis", {})
    assert full == ("analysis", "reasoning_and_explanation", "critique", "summary")
    assert execute.steps_of_template("analyze_only", {"analyze_only": ("summary",)}) == ("summary",)


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(NotFound, match="'x'; there are analyze_only, full_analysis, mine"):
        execute.steps_of_template("x", {"mine": ("summary",)})
    for name in ("DreamProtocol", "Protocol", "", "../answer", "steps/analysis"):
        with pytest.raises(NotFound, match="there are analysis, critique, reasoning_and_explanation, summary"):
            execute.steps_of_protocols(["analysis", name])
    for names in ([], ["summary"] * 9):
        with pytest.raises(InvalidRequest, match="1 to 8 steps"):
            execute.steps_of_protocols(names)
    assert len(execute.steps_of_protocols(["summary"] * 8)) == 8


def test_configured_templates_and_pipelines_must_exist(tmp_path: Path) -> None:
    file = tmp_path / "nexus.yaml"
    file.write_text("pipelines: {templates: {brief: [AnalysisProtocol, summary]}}")
    assert load_config(file, {}).pipelines.templates == {"brief": ("analysis", "summary")}
    for setting, words in (
        ("templates: {brief: [dream]}", "no protocol or step 'dream'"),
        ("templates: {brief: []}", "1 to 8 steps"),
        ("enabled: [rag, prompts]", "no pipeline 'prompts'; there are chat, execute, rag"),
    ):
        file.write_text(f"pipelines: {{{setting}}}")
        with pytest.raises(ConfigError, match=words):
            load_config(file, {})


@pytest.mark.parametrize(
    ("settings", "rewrites"),
    [
        ("{}", False),
        ("models: {generator: 'openai:http://127.0.0.1:1/v1#m'}", True),
        ("{models: {generator: 'openai:http://127.0.0.1:1/v1#m'}, pipelines: {rewrite_queries: false}}", False),
        ("models: {generator: m, served: [{address: 'extractive:'}, {address: 'vllm:/w#m'}]}", True),
        ("models: {generator: extractive, served: [{address: 'extractive:'}, {address: 'vllm:/w#m'}]}", False),
        ("models: {generator: auto, served: [{address: 'vllm:/w#m'}, {address: 'extractive:'}]}", False),
        ("models: {generator: auto, served: [{address: 'vllm:/w#m'}, {address: 'vllm:/w#n'}]}", True),
    ],
)
def test_only_models_that_write_rewrite(tmp_path: Path, settings: str, rewrites: bool) -> None:
    file = tmp_path / "nexus.yaml"
    file.write_text(settings)
    assert load_config(file, {}).rewrites is rewrites
