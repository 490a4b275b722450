"""What a process of Nexus has to say, as one JSON object a line, with the request and the trace that it belongs to.

Modules log with `logging.getLogger("nexus.…")`, as anywhere; `begin` decides what becomes of it. All processes of a
machine write into one file of its home, so that a request id finds the whole of a request there, whoever worked on it.
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import structlog
from opentelemetry import trace

from nexus import __version__

NAME = "nexus"
FILE = "logs/nexus.jsonl"  # in the home; older lines are in nexus.jsonl.1 to .4
FILE_BYTES = 16 * 2**20
OLDER_FILES = 4
MOST_CHARACTERS = 8_000  # of a message or another field: what is longer is the text of somebody
MOST_TRACEBACK = 32_000
OF_OTHERS = frozenset({"message", "asctime"})  # which other handlers leave in a record

Event = MutableMapping[str, Any]

# What ends a line for some reader, moves a terminal's cursor, or turns the direction of writing. JSON escapes the rest.
_DECEIVING = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_SECRETS = re.compile(
    r"(?P<known>nx_(?:dev_|live_)?[A-Za-z0-9]{12})_[A-Za-z0-9_]{20,}"  # a key of ours: its public part stays
    r"|eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*"  # a token
    r"|(?i:(?P<scheme>bearer|basic)\s+)[A-Za-z0-9+/._~\-]{8,}=*"
    r'|(?P<address>://)[^/\s:@"]*:[^/\s@"]+@'
)


def begin(role: str, home: Path | None, node: str = "", **about: object) -> None:
    """From now on everything that this process logs goes to its machine's file, or without a home to stderr.

    `role` is what the process does: gateway, retriever, voter, … Messages of libraries are taken from WARNING on, ours
    from INFO on. A second call takes the place of the first.
    """
    root = logging.getLogger()
    for handler in [one for one in root.handlers if one.name == NAME]:
        root.removeHandler(handler)
    made: logging.Handler = logging.StreamHandler() if home is None else logging.StreamHandler(SharedFile(home / FILE))
    made.name = NAME
    made.setFormatter(formatter({"service": NAME, "version": __version__, "role": role, "node": node, **about}))
    root.addHandler(made)
    logging.getLogger("nexus").setLevel(logging.INFO)


def formatter(about: Mapping[str, object]) -> logging.Formatter:
    """Records as lines of JSON; `about` says in each which process it was."""
    constant = {name: value for name, value in {**about, "process": os.getpid()}.items() if value != ""}

    def introduce(_: Any, __: str, event: Event) -> Event:
        told = {name: value for name, value in event.items() if not name.startswith("_") and name not in OF_OTHERS}
        return {**told, **constant}

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.contextvars.merge_contextvars,
            _name_trace,
            introduce,
            structlog.processors.format_exc_info,
            _shorten,
            structlog.processors.JSONRenderer(serializer=_to_line),
        ],
    )


def bind(request_id: str) -> None:
    """What is logged from here on, in this task and what it begins, is about this request."""
    structlog.contextvars.bind_contextvars(request_id=request_id)


def request_id() -> str:
    """The request that is worked on here; "" for none."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def _name_trace(_: Any, __: str, event: Event) -> Event:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def _shorten(_: Any, __: str, event: Event) -> Event:
    for name, value in event.items():
        if isinstance(value, str):
            most = MOST_TRACEBACK if name == "exception" else MOST_CHARACTERS
            if len(value) > most:
                event[name] = f"{value[: most // 2]} … {value[-most // 2 :]}"
    return event


def _hide(found: re.Match[str]) -> str:
    if known := found["known"]:
        return f"{known}_…"
    if scheme := found["scheme"]:
        return f"{scheme} …"
    return f"{found['address']}…@" if found["address"] else "…"


def _to_line(event: Event, **_: Any) -> str:
    """JSON that is one line for every reader, valid UTF-8 whatever was logged, and without what opens a door."""
    line = json.dumps(event, ensure_ascii=False, default=str)
    line = _SECRETS.sub(_hide, line)
    line = _DECEIVING.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
    return line.encode("utf-8", "backslashreplace").decode()  # a lone surrogate, as JSON writes it, too


class SharedFile:
    """A file that several processes append to: each line is one write, and whoever finds it full puts it aside.

    It is what a `logging.StreamHandler` writes to. That handler sees to it that a disk that is full, or away, costs
    lines and nothing else.
    """

    def __init__(self, file: Path, most_bytes: int = FILE_BYTES, older: int = OLDER_FILES) -> None:
        self.file, self.most_bytes, self.older = file, most_bytes, older
        self._descriptor: int | None = None

    def write(self, line: str) -> None:
        """Raises OSError."""
        os.write(self._opened(), line.encode())

    def flush(self) -> None:
        """Each write is one already."""

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        if self._descriptor is not None and not self._is_current(self._descriptor):
            self.close()  # another process put it aside
        if self._descriptor is None:
            self._descriptor = self._open()
        if os.fstat(self._descriptor).st_size >= self.most_bytes:
            self._put_aside(self._descriptor)
            self.close()
            self._descriptor = self._open()
        return self._descriptor

    def _open(self) -> int:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _is_current(self, descriptor: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.file), os.fstat(descriptor))
        return False

    def _put_aside(self, descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # goes with the descriptor
        if not self._is_current(descriptor):
            return
        names = [self.file, *(self.file.with_name(f"{self.file.name}.{n}") for n in range(1, self.older + 1))]
        for newer, older in reversed(list(pairwise(names))):
            with suppress(FileNotFoundError):
                newer.replace(older)
