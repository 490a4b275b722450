"""A collector of traces, as small as it can be: OTLP over HTTP, every span kept as it came."""

import gzip
import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Got:
    """A span that came, its ids as hexadecimal digits."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    role: str  # of the process that made it
    process: int
    project: str
    start: int
    end: int
    attributes: dict[str, Any]
    status: str

    @property
    def kind(self) -> str:
        return str(self.attributes.get("openinference.span.kind", ""))


@dataclass
class Collector:
    """Where it listens, and what has come; it answers with `status`."""

    url: str = ""
    status: int = 200
    spans: list[Got] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)  # the headers of each
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, headers: dict[str, str], body: bytes) -> int:
        with self._changed:
            self.requests.append(headers)
            if self.status == 200:
                self.spans += read(body)
            self._changed.notify_all()
            return self.status

    def wait_for(self, trace_id: str, wanted: Set[tuple[str, str]], seconds: float = 30) -> list[Got]:
        """The spans of this trace, once one of each wanted role and name has come. Raises AssertionError."""

        def missing() -> Set[tuple[str, str]]:
            return wanted - {(one.role, one.name) for one in self.of(trace_id)}

        with self._changed:
            self._changed.wait_for(lambda: not missing(), seconds)
            found = self.of(trace_id)
            assert not missing(), f"not here: {missing()}, but {sorted((one.role, one.name) for one in found)}"
        return found

    def of(self, trace_id: str) -> list[Got]:
        return [one for one in self.spans if one.trace_id == trace_id]


def read(body: bytes) -> list[Got]:
    """What an exporter sent."""
    sent = ExportTraceServiceRequest.FromString(body)
    found = []
    for process in sent.resource_spans:
        about = {one.key: value_of(one.value) for one in process.resource.attributes}
        for scope in process.scope_spans:
            found += [
                Got(
                    one.name, one.trace_id.hex(), one.span_id.hex(), one.parent_span_id.hex(),
                    str(about.get("nexus.role", "")), int(about.get("process.pid", 0)),
                    str(about.get("openinference.project.name", "")),
                    one.start_time_unix_nano, one.end_time_unix_nano,
                    {each.key: value_of(each.value) for each in one.attributes}, one.status.message,
                )
                for one in scope.spans
            ]  # fmt: skip
    return found


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


def root_of(spans: Sequence[Got]) -> Got:
    """The one span whose parent did not come; every other is below it. Raises AssertionError."""
    ids = {one.span_id for one in spans}
    roots = [one for one in spans if one.parent_id not in ids]
    assert len(roots) == 1, [one.name for one in roots]
    return roots[0]


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """A collector on a port of loopback."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            headers = {"path": self.path} | {name.lower(): value for name, value in self.headers.items()}
            self.send_response(collector.take(headers, body))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Tests say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        collector.url = f"http://127.0.0.1:{server.server_address[1]}"
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        try:
            yield collector
        finally:
            server.shutdown()
            serving.join()
