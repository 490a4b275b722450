"""Named steps over a caller's data, each seeing the results of those before it.

A step is a prompt in `prompts/steps/`, named as its file is; a template is an ordered list of steps. The
founding documents' protocols are steps by another spelling: ReasoningAndExplanationProtocol is
reasoning_and_explanation.
"""

import json
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass

from nexus.errors import InvalidRequest, NexusError, NotFound, UpstreamInvalid
from nexus.pipelines import chat, prompts
from nexus.pipelines.chat import Tools
from nexus.types import Message, Principal, Prompt, Usage

STEPS = prompts.read_steps()
MATERIAL = prompts.read("material")
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "analyze_only": ("analysis",),
    "full_analysis": ("analysis", "reasoning_and_explanation", "critique", "summary"),
}
MOST_STEPS = 8
_TAGS = ("data", "result")


@dataclass(frozen=True, slots=True)
class Execution:
    """Steps to take in order over some data: names of `STEPS`, and values that JSON can carry.

    `max_tokens` is for each step. Steps of one `session` prefer one replica.
    """

    steps: tuple[str, ...]
    data: Mapping[str, object]
    principal: Principal
    max_tokens: int | None = None
    session: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step made of the data, why its generation ended, and the seconds it took."""

    step: str
    result: str
    finish_reason: str
    seconds: float
    usage: Usage | None = None


async def run(request: Execution, tools: Tools) -> AsyncGenerator[StepResult]:
    """The result of each step as it is there. Closing this stops the step under way, and none follows.

    A step that fails, or has nothing to say, ends the run with an error of its own class that names it.
    """
    results: list[StepResult] = []
    for step in request.steps:
        started = time.perf_counter()
        prompt = Prompt(
            messages=render(step, request.data, results),
            max_tokens=request.max_tokens,
            tenant=request.principal.tenant,
            session=request.session,
        )
        try:
            generation = await chat.collect(prompt, tools)
        except NexusError as error:
            message = f"the step {step!r} failed: {error.message}"
            raise type(error)(message, pointer=error.pointer, code=error.code) from error
        if not generation.text.strip():
            ended = f"it ended with {generation.finish_reason!r}"
            raise UpstreamInvalid(f"the step {step!r} failed: the model said nothing ({ended}); raise max_tokens")
        spent = time.perf_counter() - started
        results.append(StepResult(step, generation.text.strip(), generation.finish_reason, spent, generation.usage))
        yield results[-1]


def render(step: str, data: Mapping[str, object], results: Sequence[StepResult]) -> tuple[Message, ...]:
    """The prompt of a step: its instructions, the same for everyone, then the data and the results so far."""
    given = [("data", "name", name, _as_text(value)) for name, value in data.items()]
    made = [("result", "step", result.step, result.result) for result in results]
    fenced = (
        f'<{tag} {attribute}="{prompts.fence_attribute(name, *_TAGS)}">\n\n{prompts.fence(text, *_TAGS)}\n\n</{tag}>'
        for tag, attribute, name, text in (*given, *made)
    )
    return (Message("system", f"{STEPS[step]}\n\n{MATERIAL}"), Message("user", "\n\n".join(fenced)))


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def steps_of_template(name: str, configured: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The steps of a template; a configured one is taken before a built-in one of its name. Raises NotFound."""
    templates = {**TEMPLATES, **configured}
    if name not in templates:
        known = ", ".join(sorted(templates))
        raise NotFound(f"there is no template {name[:100]!r}; there are {known}", pointer="/template_name")
    return templates[name]


def steps_of_protocols(names: Sequence[str]) -> tuple[str, ...]:
    """The steps of these names, in snake_case or as CamelCaseProtocol. Raises NotFound, InvalidRequest."""
    if not 0 < len(names) <= MOST_STEPS:
        raise InvalidRequest(f"1 to {MOST_STEPS} steps are taken, not {len(names)}", pointer="/protocol_names")
    return tuple(_step_named(name) for name in names)


def _step_named(name: str) -> str:
    step = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().removesuffix("_protocol")
    if step not in STEPS:
        known = ", ".join(STEPS)
        raise NotFound(f"there is no protocol or step {name[:100]!r}; there are {known}", pointer="/protocol_names")
    return step
