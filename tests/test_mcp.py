"""Model Context Protocol: the official client against the front door, over HTTP and over standard input and output."""

import asyncio
import http.client
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import httpx2
import pytest
import uvicorn
from mcp import Client, MCPError
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from deployments.gateway import build
from nexus.access import PERMISSIONS
from tests.conftest import Door

TOOLS = {
    "search", "fetch", "ask", "list_collections", "add_document", "delete_document", "add_context", "get_context",
    "clear_context",
}  # fmt: skip
READING = {"search", "fetch", "ask", "list_collections", "get_context"}
DESTROYING = {"delete_document", "clear_context"}
MANUAL = "# Gripper\n\nThe gripper closes with a torque of 4 Nm.\n\n# Charger\n\nThe charger gives 48 V to the robot.\n"
MODES = ["auto", "legacy"]  # of 2026-07-28, and with the handshake of before


@dataclass(frozen=True)
class Served:
    """A door behind a real server."""

    url: str
    door: Door

    def key(self, tenant: str = "default", *permissions: str, **limits: int) -> str:
        key, _ = self.door.keys.create("assistant", tenant, frozenset(permissions) or PERMISSIONS, **limits)
        return key

    @asynccontextmanager
    async def client(self, key: str, mode: str = "auto") -> AsyncIterator[Client]:
        async with (
            httpx2.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=60) as pool,
            Client(streamable_http_client(f"{self.url}/mcp", http_client=pool), mode=mode) as client,
        ):
            yield client

    def post(self, body: object, **headers: str) -> httpx.Response:
        """One message as it is, without a client that tidies it up."""
        accept = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json", "authorization": f"Bearer {self.key()}", **accept, **headers}
        return httpx.post(f"{self.url}/mcp", content=content, headers=given, trust_env=False, timeout=60)


@pytest.fixture
def served(door: Door) -> Iterator[Served]:
    config = uvicorn.Config(build(door.lent), ws="none", lifespan="off", log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        started = threading.Event()
        server_started = server.startup

        async def startup(sockets: list[socket.socket] | None = None) -> None:
            await server_started(sockets)
            started.set()

        server.startup = startup  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        assert started.wait(30)
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", door)
        server.should_exit = True
        thread.join()


def told(result: Any) -> Any:
    """What a tool answered: the same as text and as a structure."""
    (item,) = result.content
    if not result.is_error:
        assert json.loads(item.text) == result.structured_content
        return result.structured_content
    return item.text


async def call(client: Client, tool: str, **arguments: object) -> Any:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, told(result)
    return told(result)


async def refusal(client: Client, tool: str, **arguments: object) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return str(told(result))


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


# ── what there is ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
def test_every_tool_says_what_it_takes_gives_and_does(served: Served, mode: str) -> None:
    async def main() -> None:
        async with served.client(served.key(), mode) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert tools.keys() == TOOLS
            for name, tool in tools.items():
                assert tool.title and tool.description and tool.output_schema and tool.annotations
                assert tool.annotations.read_only_hint == (name in READING)
                assert bool(tool.annotations.destructive_hint) == (name in DESTROYING)
            for name, required in (("search", ["query"]), ("fetch", ["id"]), ("ask", ["question"])):
                assert tools[name].input_schema["required"] == required  # with nothing else an assistant can call them
            templates = (await client.list_resource_templates()).resource_templates
            assert {t.uri_template for t in templates} == {
                "nexus://documents/{document_id}", "nexus://collections/{name}",
            }  # fmt: skip
            (prompt,) = (await client.list_prompts()).prompts
            rendered = await client.get_prompt(prompt.name, {"question": "How strong is it?"})
            assert "How strong is it?" in rendered.messages[0].content.text
            assert "abstains" in str(client.instructions)

    run(main)


@pytest.mark.parametrize("mode", MODES)
def test_a_document_is_added_found_read_asked_and_deleted(served: Served, mode: str) -> None:
    steps: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        assert message and message.startswith("manual.md: ")
        steps.append(progress)

    async def main() -> None:
        async with served.client(served.key(), mode) as client:
            arguments = {"filename": "manual.md", "content": MANUAL, "metadata": {"robot_id": "tron"}}
            added = told(await client.call_tool("add_document", arguments, progress_callback=note))
            assert steps and steps == sorted(set(steps))
            assert not added["unchanged"] and added["chunks"] > 0
            assert (await call(client, "add_document", **arguments))["unchanged"]

            found = await call(client, "search", query="torque of the gripper")
            assert found["results"][0].keys() >= {"id", "title", "url", "text"}
            assert {one["id"] for one in found["results"]} == {added["document_id"]}
            none = await call(client, "search", query="torque of the gripper", filters={"robot_id": "sark"})
            assert none["results"] == []
            one = await call(client, "search", query="torque", k=1)
            assert len(one["results"]) == 1

            read = await call(client, "fetch", id=added["document_id"])
            assert read.keys() == {"id", "title", "text", "url", "metadata"}
            assert "Gripper" in read["text"] and "torque of 4 Nm" in read["text"] and "48 V" in read["text"]
            assert read["metadata"]["robot_id"] == "tron" and read["url"] == "manual.md"

            answer = await call(client, "ask", question="What torque does the gripper close with?")
            assert "4 Nm" in answer["answer"] and not answer["abstained"] and 0 < answer["confidence"] <= 1
            assert added["document_id"] in {source["id"] for source in answer["sources"] if source["cited"]}

            (size,) = (await call(client, "list_collections"))["collections"]
            assert (size["name"], size["documents"], size["chunks"]) == ("default", 1, added["chunks"])
            resource = await client.read_resource(f"nexus://documents/{added['document_id']}")
            assert resource.contents[0].text == read["text"]
            listed = json.loads((await client.read_resource("nexus://collections/default")).contents[0].text)
            assert [one["url"] for one in listed["documents"]] == ["manual.md"]

            deleted = await call(client, "delete_document", document_id=added["document_id"])
            assert deleted["document_id"] == added["document_id"]
            assert (await call(client, "search", query="torque of the gripper"))["results"] == []
            assert "no such document" in await refusal(client, "fetch", id=added["document_id"])

    run(main)


def test_a_session_is_told_things_and_forgets_them(served: Served) -> None:
    async def main() -> None:
        async with served.client(served.key()) as client:
            await call(client, "add_context", session_id="s-1", content="The robot is TRON-7.")
            assert "TRON-7" in (await call(client, "get_context", session_id="s-1"))["context"]
            await call(client, "clear_context", session_id="s-1")
            assert (await call(client, "get_context", session_id="s-1"))["context"] == ""
            for id in ("", "a/b", "../../rag/documents", "a b", "x" * 200, "ä?#%2F"):
                assert "a session id" in await refusal(client, "get_context", session_id=id), id

    run(main)


# ── who may ─────────────────────────────────────────────────────────────────────────────────────


def test_another_tenants_document_is_not_there(served: Served) -> None:
    async def main() -> None:
        async with served.client(served.key("acme")) as ours, served.client(served.key("rivals")) as theirs:
            added = await call(ours, "add_document", filename="secret.md", content=MANUAL)
            await call(ours, "add_context", session_id="s", content="ours alone")
            id = added["document_id"]
            missing = await refusal(theirs, "fetch", id="0" * 32)
            assert await refusal(theirs, "fetch", id=id) == missing
            assert await refusal(theirs, "delete_document", document_id=id) == missing.replace(
                "fetch", "delete_document"
            )
            assert "no collection" in await refusal(theirs, "search", query="gripper torque")
            assert (await call(theirs, "list_collections"))["collections"] == []
            assert (await call(theirs, "get_context", session_id="s"))["context"] == ""
            with pytest.raises(MCPError, match="no such document"):
                await theirs.read_resource(f"nexus://documents/{id}")
            assert (await call(ours, "fetch", id=id))["url"] == "secret.md"

    run(main)


def test_requests_at_once_are_each_their_own_callers(served: Served) -> None:
    async def main() -> None:
        names = [f"tenant-{number}" for number in range(6)]

        async def use(name: str) -> None:
            async with served.client(served.key(name)) as client:
                await call(client, "add_document", filename="mine.md", content=f"The gripper belongs to {name} alone.")
                for _ in range(4):
                    found = await call(client, "search", query="whom does the gripper belong to")
                    assert [name in one["text"] for one in found["results"]] == [True]

        await asyncio.gather(*map(use, names))

    run(main)


def test_a_key_may_here_what_it_may_elsewhere(served: Served) -> None:
    async def main() -> None:
        async with served.client(served.key("acme", "documents:read")) as reader:
            said = await refusal(reader, "add_document", filename="a.md", content="x")
            assert "documents:write" in said
            assert "documents:write" in await refusal(reader, "delete_document", document_id="0" * 32)
            assert "sessions:write" in await refusal(reader, "add_context", session_id="s", content="x")
            assert (await call(reader, "list_collections"))["collections"] == []

    run(main)


def test_a_key_that_may_only_write_is_not_told_that_nothing_was_added(served: Served) -> None:
    async def main() -> None:
        async with served.client(served.key("acme", "documents:write")) as writer:
            said = await refusal(writer, "add_document", filename="a.md", content=MANUAL)
            assert "a.md was accepted and will be added" in said and "documents:read" in said

    run(main)


def test_a_message_costs_one_request_whatever_it_asks(served: Served) -> None:
    headers = {"authorization": f"Bearer {served.key('acme', requests_per_minute=3)}"}
    message = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "list_collections", "arguments": {}},
    }
    answers = [served.post(message, **headers) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert int(answers[-1].headers["retry-after"]) > 0


def test_what_was_done_is_recorded_as_it_is_elsewhere(served: Served) -> None:
    async def main() -> None:
        async with served.client(served.key("acme")) as client:
            added = await call(client, "add_document", filename="a.md", content=MANUAL)
            await call(client, "search", query="gripper torque")
            await call(client, "delete_document", document_id=added["document_id"])

    run(main)
    served.door.lent.audit.flush()
    from nexus.audit_reading import read

    lines = [line for line in read(served.door.lent.config.home) if "POST /mcp" in line["action"]]
    by_action = {line["action"]: line for line in lines}
    searched = by_action["POST /rag/search: POST /mcp"]
    assert searched["documents"] and searched["tenant"] == "acme" and searched["kind"] == "answer"
    deletion = next(line for action, line in by_action.items() if action.startswith("DELETE /rag/documents/"))
    assert deletion["kind"] == "privileged" and deletion["verdict"] == "done"


def test_what_was_denied_is_recorded_though_it_is_told_in_an_answer(served: Served) -> None:
    async def main() -> None:
        async with served.client(served.key("acme", "documents:read")) as reader:
            await refusal(reader, "add_document", filename="a.md", content="x")
            await refusal(reader, "fetch", id="1" * 32)
            await call(reader, "list_collections")

    run(main)
    served.door.lent.audit.flush()
    from nexus.audit_reading import read

    lines = [line for line in read(served.door.lent.config.home) if "POST /mcp" in line["action"]]
    assert [(line["kind"], line["verdict"], line["action"], line["reason"]) for line in lines] == [
        ("denied", "denied", "POST /rag/add_document: POST /mcp", "forbidden"),
        ("denied", "denied", f"GET /rag/documents/{'1' * 32}/text: POST /mcp", "not_found"),
    ]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


def test_without_a_key_there_is_nothing(served: Served) -> None:
    answer = served.post({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, authorization="Bearer nx_none")
    assert answer.status_code == 401 and answer.headers["www-authenticate"]
    assert "result" not in answer.text


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [(b"{", 400, -32700), (b"[]", 400, -32602), (b'{"jsonrpc": "2.0"}', 400, -32602), (b"", 400, -32700),
     (b'{"jsonrpc": "2.0", "id": 1, "method": "no/such"}', 200, -32601),
     (b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {}}', 200, -32602)],
)  # fmt: skip
def test_what_is_no_message_is_answered_in_the_protocols_words(
    served: Served, body: bytes, status: int, code: int
) -> None:
    answer = served.post(body)
    assert answer.status_code == status, answer.text
    text = answer.text.partition("data: ")[2] or answer.text
    assert json.loads(text)["error"]["code"] == code, text


def test_blanks_around_a_headers_value_are_none_of_it(served: Served) -> None:
    body = {
        "jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": {
            "name": "list_collections", "arguments": {}, "_meta": {
                "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                "io.modelcontextprotocol/clientCapabilities": {},
            },
        },
    }  # fmt: skip
    sent = {
        "accept": "application/json, text/event-stream", "content-type": "application/json",
        "mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "authorization": f"Bearer {served.key()}",
    }  # fmt: skip
    for name, status in (("list_collections", 200), ("  list_collections \t", 200), ("list_ collections", 400)):
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/mcp", json.dumps(body), {**sent, "mcp-name": name})
        assert connection.getresponse().status == status, name
        connection.close()


def test_headers_that_say_otherwise_than_the_body_are_refused(served: Served) -> None:
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {},
    }  # fmt: skip
    params = {"name": "list_collections", "arguments": {}, "_meta": meta}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    said = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": "list_collections"}
    assert served.post(message, **said).json()["result"]["structuredContent"] == {"collections": []}
    assert served.post(message, **{**said, "mcp-name": "fetch"}).json()["error"]["code"] == -32020
    meta["io.modelcontextprotocol/protocolVersion"] = "2031-01-01"
    assert served.post(message, **{**said, "mcp-protocol-version": "2031-01-01"}).json()["error"]["code"] == -32022


def test_there_is_one_address_and_no_detour_to_it(served: Served) -> None:
    key = {"authorization": f"Bearer {served.key()}"}
    with httpx.Client(base_url=served.url, headers=key, trust_env=False, timeout=60) as client:
        assert client.post("/mcp/", json={}).status_code == 404  # and no redirect, which would lose the key
        for method in ("GET", "DELETE", "PUT"):
            answer = client.request(method, "/mcp")
            assert answer.status_code == 405 and answer.headers["allow"] == "POST"
        rebound = client.post("/mcp", json={}, headers={"host": "evil.example"})
        assert rebound.status_code == 400 and rebound.json()["code"] == "host_not_allowed"
        assert client.post("/mcp", json={}, headers={"origin": "https://evil.example"}).status_code == 403
        assert client.post("/mcp", content=b"{}", headers={"content-type": "text/xml"}).status_code == 415
        large = client.post("/mcp", content=b" " * (2**20 + 1), headers={"content-type": "application/json"})
        assert large.status_code == 413


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [("search", {}, "query"), ("search", {"query": "x", "k": 0}, "k"), ("search", {"query": ""}, "query"),
     ("search", {"query": "x" * 100_000}, "query"),
     ("search", {"query": "x", "filters": {"a": {"$where": 1}}}, "a filter value"),
     ("search", {"query": "x", "collection": "../x"}, "collection"), ("fetch", {"id": "../keys"}, "no such document"),
     ("fetch", {"id": "%2e%2e%2fkeys"}, "no such document"), ("fetch", {"id": "x" * 65}, "no such document"),
     ("get_context", {"session_id": "."}, "session id"), ("clear_context", {"session_id": ".."}, "session id"),
     ("add_context", {"session_id": "..", "content": "x"}, "session id"),
     ("get_context", {"session_id": ""}, "session id"), ("get_context", {"session_id": "../x"}, "session id"),
     ("get_context", {"session_id": ".x"}, "session id"),
     ("add_document", {"filename": "", "content": "x"}, "filename"),
     ("add_document", {"filename": "a.exe", "content": "\x00\x01"}, "a.exe")],
)  # fmt: skip
def test_a_wrong_argument_is_told_to_the_model(
    served: Served, tool: str, arguments: dict[str, object], said: str
) -> None:
    async def main() -> None:
        async with served.client(served.key()) as client:
            await call(client, "add_document", filename="a.md", content=MANUAL)
            message = await refusal(client, tool, **arguments)
            assert said in message and "Traceback" not in message and "/tmp" not in message, message

    run(main)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("add_document", '{"filename": "a.md", "content": "x", "metadata": {"a": #}}'),
     ("search", '{"query": "x", "filters": {"a": #}}'), ("search", '{"query": "x", "k": #}')],
)  # fmt: skip
def test_a_number_that_is_none_is_refused_plainly(served: Served, tool: str, arguments: str, number: str) -> None:
    message = '{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "%s", "arguments": %s}}'
    answer = served.post((message % (tool, arguments.replace("#", number))).encode())
    if answer.status_code == 400:  # what no JSON can hold
        assert number in ("NaN", "Infinity") and answer.json()["error"]["code"] == -32700
        return
    line = next(line for line in answer.text.splitlines() if line.startswith(("data:", "{")))
    result = json.loads(line.removeprefix("data:"))["result"]
    assert result["isError"], result
    (said,) = result["content"]
    assert "finite" in said["text"] and "Traceback" not in said["text"], said


# ── over standard input and output ──────────────────────────────────────────────────────────────


def test_over_stdio_the_same_tools_ask_the_same_nexus(served: Served) -> None:
    environment = {"NEXUS_URL": served.url, "NEXUS_API_KEY": served.key("acme"), "NEXUS_HOME": "/nonexistent/home"}
    command = StdioServerParameters(command=sys.executable, args=["-m", "deployments.cli", "mcp"], env=environment)

    async def main() -> None:
        async with Client(command) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
            added = await call(client, "add_document", filename="a.md", content=MANUAL)
            (first, *_) = (await call(client, "search", query="gripper torque"))["results"]
            assert first["id"] == added["document_id"]
            assert "no such document" in await refusal(client, "fetch", id="0" * 32)

    run(main)


def test_over_stdio_a_nexus_that_is_away_is_told_plainly() -> None:
    environment = {"NEXUS_URL": "http://127.0.0.1:9", "NEXUS_API_KEY": "nx_x", "NEXUS_HOME": "/nonexistent/home"}
    command = StdioServerParameters(command=sys.executable, args=["-m", "deployments.cli", "mcp"], env=environment)

    async def main() -> None:
        async with Client(command) as client:
            assert "no Nexus answers" in await refusal(client, "list_collections")

    run(main)
