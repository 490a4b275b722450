"""Spans: what a request waited for, as one tree over all processes that worked on it, sent to a collector over OTLP.

Without `telemetry.otlp_endpoint` a span is nothing, and costs next to nothing; still the request's id, and a trace that
the caller belongs to, go along from process to process. With it, a thread sends what has ended (exporting.py).
"""

import atexit
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from contextvars import Context
from functools import partial
from typing import ParamSpec, TypeVar

from opentelemetry import context, trace
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nexus import logs
from nexus.config import Telemetry
from nexus.errors import NexusError
from nexus.types import Delta, Prompt
from nexus.vocabulary import FINISHED, FIRST_PIECE, INPUT, OUTPUT, TOKENS_IN, TOKENS_OUT, Attributes, of_generation

Item = TypeVar("Item")
Result = TypeVar("Result")
P = ParamSpec("P")

REQUEST_ID = "request_id"
END_SECONDS = 2.0  # that the end of a process waits for its last spans

_propagator = TraceContextTextMapPropagator()
_nothing: AbstractContextManager[Span] = nullcontext(INVALID_SPAN)
_tracer: trace.Tracer | None = None
_end: Callable[[], None] | None = None
_records_text = False


def begin(settings: Telemetry, role: str, node: str = "") -> None:
    """From now on this process's spans are sent, if the settings say where to."""
    global _tracer, _end, _records_text
    end()
    if settings.otlp_endpoint is None:
        return
    from nexus.exporting import open_tracer  # with an HTTP client and more, which only who exports needs

    _tracer, _end = open_tracer(settings, role, node)
    _records_text = settings.record_text


def end(seconds: float = END_SECONDS) -> None:
    """Send what waits, for so long at most; there are no spans from now on."""
    global _tracer, _end
    if _end is not None:
        sending = threading.Thread(target=_end, name="last spans", daemon=True)
        sending.start()
        sending.join(seconds)
    _tracer = _end = None


atexit.register(end)


# ── spans ───────────────────────────────────────────────────────────────────────────────────────


def span(
    name: str, attributes: Attributes | None = None, kind: SpanKind = SpanKind.INTERNAL
) -> AbstractContextManager[Span]:
    """A block as a part of the request that is worked on; its attributes may be set while it lasts."""
    return _nothing if _tracer is None or _is_left_out() else _recorded(_tracer, name, attributes, kind)


def _is_left_out() -> bool:
    """Whether the trace that is worked on is one that is not recorded."""
    found = trace.get_current_span().get_span_context()
    return found.is_valid and not found.trace_flags.sampled


@contextmanager
def _recorded(tracer: trace.Tracer, name: str, attributes: Attributes | None, kind: SpanKind) -> Iterator[Span]:
    with tracer.start_as_current_span(
        name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as made:
        try:
            yield made
        except Exception as error:
            _note_error(made, error)
            raise


def ignore(made: Span, item: object) -> None:
    """An item says nothing of its stream."""


async def streamed(
    name: str, items: AsyncGenerator[Item], attributes: Attributes, note: Callable[[Span, Item], None] = ignore
) -> AsyncGenerator[Item]:
    """The items, and a span from the first wait to the end; `note` may say of each what the span should tell.

    The span is that of whoever makes the items, not of whoever takes them.
    """
    if _tracer is None or _is_left_out():
        async with aclosing(items):
            async for item in items:
                yield item
        return
    made = _tracer.start_span(name, attributes=attributes)
    within = trace.set_span_in_context(made)
    try:
        async with aclosing(items):
            while True:
                before = context.attach(within)
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                finally:
                    context.detach(before)
                note(made, item)
                yield item
    except Exception as error:
        _note_error(made, error)
        raise
    finally:
        made.end()


def _note_error(made: Span, error: Exception) -> None:
    """Which kind it was: its words may hold somebody's text.

    Whatever it is, it is raised again. A request that was given up (CancelledError, GeneratorExit) has none.
    """
    kind = error.code if isinstance(error, NexusError) else type(error).__name__
    made.set_attribute("error.type", kind)
    made.set_status(StatusCode.ERROR, kind)


def generated(model: str, place: str, prompt: Prompt, deltas: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
    """A generator's deltas, and a span of them: the model, the seconds to the first, and what all of it cost."""
    if _tracer is None or _is_left_out():
        return deltas
    said: list[str] = []
    started = time.perf_counter()

    def note(made: Span, delta: Delta) -> None:
        if delta.text and not said:
            made.set_attribute(FIRST_PIECE, time.perf_counter() - started)
        if delta.text and (_records_text or not said):
            said.append(delta.text)
        if delta.finish_reason:
            made.set_attribute(FINISHED, [delta.finish_reason])
            made.set_attributes(text(OUTPUT, "".join(said)))
        if delta.usage is not None:
            made.set_attributes({TOKENS_IN: delta.usage.prompt, TOKENS_OUT: delta.usage.completion})

    asked = text(INPUT, prompt.messages[-1].text) if prompt.messages else {}
    return streamed(f"chat {model}", deltas, {**of_generation(model, place), **asked}, note)


def text(name: str, value: str) -> Attributes:
    """A text as an attribute, where the settings allow it."""
    return {name: value} if _records_text else {}


def records_text() -> bool:
    return _records_text


# ── from task to thread, and from process to process ────────────────────────────────────────────


def trace_id() -> str:
    """Of the trace that is worked on here, as 32 digits; "" for none."""
    found = trace.get_current_span().get_span_context()
    return trace.format_trace_id(found.trace_id) if found.is_valid else ""


def within(work: Callable[P, Result]) -> Callable[P, Result]:
    """The work, to be done in a thread, for the request that is worked on here; of the rest of this context it is free.

    What Serve keeps there would have whatever the work begins end with the request.
    """
    request_id, current = logs.request_id(), context.get_current()

    def do(*arguments: P.args, **more: P.kwargs) -> Result:
        if request_id:
            logs.bind(request_id)
        context.attach(current)
        return work(*arguments, **more)

    return partial(Context().run, do)


def done_for(
    told: Sequence[Mapping[str, str]], name: str, attributes: Attributes, work: Callable[[], Result]
) -> Result:
    """What the work returns, done at once for the requests that were told of: a span in the trace of each.

    What is asked of others on the way belongs to the first.
    """
    return Context().run(_do_for, told, name, attributes, work)


def _do_for(told: Sequence[Mapping[str, str]], name: str, attributes: Attributes, work: Callable[[], Result]) -> Result:
    take_up(told[0])
    if _tracer is None:
        return work()
    made = [_tracer.start_span(name, _propagator.extract(one), attributes=attributes) for one in told]
    context.attach(trace.set_span_in_context(made[0]))
    try:
        return work()
    except Exception as error:
        for one in made:
            _note_error(one, error)
        raise
    finally:
        for one in made:
            one.end()


def carried() -> dict[str, str]:
    """What the next process is told of this request: its id, and W3C trace context where there is a trace."""
    told = {REQUEST_ID: request_id} if (request_id := logs.request_id()) else {}
    if trace.get_current_span().get_span_context().is_valid:
        _propagator.inject(told)
    return told


def take_up(told: Mapping[str, str]) -> None:
    """Go on in this task with the request that another process was told of."""
    if request_id := told.get(REQUEST_ID):
        logs.bind(request_id)
    if "traceparent" in told:
        context.attach(_propagator.extract(told))
