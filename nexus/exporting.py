"""Spans on their way to the collector: in a queue that holds so many and no more, and out of it on a thread.

A collector that is away costs spans, and two lines in the log: one as it goes, one as it is back. Meanwhile no request
is recorded, but for those of a moment now and then, which it is tried with.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased

from nexus import __version__
from nexus.config import Telemetry
from nexus.vocabulary import PROJECT

log = logging.getLogger("nexus.tracing")

QUEUED_SPANS = 4096
BATCH_SPANS = 512
BATCH_SECONDS = 1.0
EXPORT_SECONDS = 5.0  # for one batch, tries included
REST_SECONDS = 15.0  # without a try, once a batch could not be sent
# They would say each time what `Exporter` says once.
TALKATIVE = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")


def open_tracer(settings: Telemetry, role: str, node: str) -> tuple[trace.Tracer, Callable[[], None]]:
    """A tracer whose spans are sent, and how to send what is left and end.

    It is the process's global one, too, for libraries that bring spans along (mcp), unless there is one already.
    """
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    about: dict[str, str | int] = {
        "service.name": "nexus", "service.version": __version__, "nexus.role": role, PROJECT: settings.project,
        "process.pid": os.getpid(),
    }  # fmt: skip
    exporter = Exporter(settings)
    sampler = WhileHeard(exporter, settings.sampling)
    provider = TracerProvider(
        sampler=ParentBased(sampler, remote_parent_sampled=sampler),
        resource=Resource(about | ({"host.name": node} if node else {})),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(exporter, QUEUED_SPANS, 1000 * BATCH_SECONDS, BATCH_SPANS, 1000 * EXPORT_SECONDS)
    )
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(provider)
    return provider.get_tracer("nexus", __version__), provider.shutdown


class Exporter(SpanExporter):
    """Sends spans to the collector of the settings. While that is away, spans are lost, and it is tried now and then.

    Called by one thread.
    """

    def __init__(self, settings: Telemetry, clock: Callable[[], float] = time.monotonic) -> None:
        self._sender = OTLPSpanExporter(settings.traces_url, headers=settings.headers, timeout=EXPORT_SECONDS)
        self._clock = clock
        self._lost = 0
        self._is_trying = False
        self._rests_until: float | None = None  # None while it is there

    def is_heard(self) -> bool:
        """Whether what is recorded now may be taken. Any thread may ask."""
        until = self._rests_until
        return until is None or not (self._is_trying or self._clock() < until)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._rests_until is not None and self._clock() < self._rests_until:
            return self._lose(spans)
        self._is_trying = True
        try:
            result = self._sender.export(spans)
        finally:
            self._is_trying = False
        if result is not SpanExportResult.SUCCESS:
            if self._rests_until is None:
                log.warning("the collector of traces takes no spans; they are lost until it does")
            self._rests_until = self._clock() + REST_SECONDS
            return self._lose(spans)
        if self._rests_until is not None:
            log.warning("the collector of traces takes spans again; %d were lost", self._lost)
            self._rests_until, self._lost = None, 0
        return SpanExportResult.SUCCESS

    def _lose(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._lost += len(spans)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self._sender.shutdown()  # type: ignore[no-untyped-call]


class WhileHeard(Sampler):
    """Of all traces a share is recorded, by their ids, so that all processes decide alike; none that nobody takes."""

    def __init__(self, exporter: Exporter, share: float) -> None:
        self._exporter, self._share = exporter, TraceIdRatioBased(share)

    def should_sample(
        self, parent_context: context.Context | None, trace_id: int, name: str, *more: Any, **further: Any
    ) -> SamplingResult:
        if not self._exporter.is_heard():
            return SamplingResult(Decision.DROP)
        return self._share.should_sample(parent_context, trace_id, name, *more, **further)

    def get_description(self) -> str:
        return self._share.get_description()
