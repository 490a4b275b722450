"""Which pipelines answer here, and `execute` under the founding documents' path."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from deployments import audited
from deployments.routes.caller import lent, permit, through
from deployments.shapes import Execute, reply, show_step
from deployments.streaming import while_listening
from nexus.pipelines import chat
from nexus.pipelines import execute as steps
from nexus.types import Principal

router = APIRouter(tags=["pipelines"])


@router.get("/pipelines")
async def list_pipelines(request: Request, principal: Principal = permit("infer")) -> Response:
    """The pipelines that answer here, and what `execute` can be asked for."""
    pipelines = lent(request).config.pipelines
    executes = "execute" in pipelines.enabled
    templates = {**steps.TEMPLATES, **pipelines.templates} if executes else {}
    return reply(
        {"pipelines": pipelines.enabled, "templates": templates, "steps": list(steps.STEPS) if executes else []}
    )


@router.post("/execute", dependencies=[through("execute")])
async def execute(request: Request, body: Execute, principal: Principal = permit("infer")) -> Response:
    """The result of each step, in order; of all of them, or an error that names the one that failed."""
    here, trace_id = lent(request), request.state.trace_id
    if body.template_name is not None:
        names = steps.steps_of_template(body.template_name, here.config.pipelines.templates)
    else:
        names = steps.steps_of_protocols(body.protocol_names or ())
    generator = here.rag.generator if body.model is None else here.generator(body.model)
    audited.note(request, model=generator.name)
    asked = steps.Execution(names, body.initial_data, principal, body.max_tokens)
    done = await while_listening(request, _all_of(steps.run(asked, chat.Tools(generator))))
    return reply(
        {
            "template_name": body.template_name,
            "steps": [show_step(step) for step in done],
            "result": done[-1].result,
            "model": generator.name,
            "trace_id": trace_id,
        }
    )


async def _all_of(results: AsyncGenerator[steps.StepResult]) -> list[steps.StepResult]:
    async with aclosing(results):
        return [result async for result in results]
