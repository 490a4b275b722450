"""Which pipelines answer here, and `execute` under the founding documents' path."""

from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from deployments.routes.caller import lent, permit, through
from deployments.shapes import Execute, reply, show_step
from nexus.errors import NotFound
from nexus.pipelines import chat
from nexus.pipelines import execute as steps
from nexus.ports import Generator
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
    here, trace_id = lent(request), request.state.request_id
    if body.template_name is not None:
        names = steps.steps_of_template(body.template_name, here.config.pipelines.templates)
    else:
        names = steps.steps_of_protocols(body.protocol_names or ())
    generator = _generator(request, body.model)
    asked = steps.Execution(names, body.initial_data, principal, body.max_tokens, session=trace_id)
    async with aclosing(steps.run(asked, chat.Tools(generator))) as results:
        done = [result async for result in results]
    return reply(
        {
            "template_name": body.template_name,
            "steps": [show_step(step) for step in done],
            "result": done[-1].result,
            "model": generator.name,
            "trace_id": trace_id,
        }
    )


def _generator(request: Request, model: str) -> Generator:
    """The generator of this name; for `auto`, the one that Nexus itself uses."""
    generator = lent(request).rag.generator
    if model not in ("auto", generator.name):
        known = f"there are auto, {generator.name}"
        raise NotFound(f"there is no model {model[:100]!r} here; {known}", pointer="/model", code="model_not_found")
    return generator
