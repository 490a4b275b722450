"""Model Context Protocol over streamable HTTP: one address, to which every message is a request of its own."""

from __future__ import annotations

from typing import cast

import httpx
from fastapi import APIRouter, Request, Response
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import mcp_server
from deployments.audited import DENIALS
from deployments.routes.caller import lent, permit
from nexus.errors import UnsupportedMedia
from nexus.types import Principal, media_type_of

HERE = "http://127.0.0.1"  # the name by which the application within knows itself; nothing is sent there
HOSTS_ARE_CHECKED = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # by middleware.Hosts, for all

router = APIRouter(tags=["mcp"])


@router.post("/mcp")
async def answer(request: Request, principal: Principal = permit()) -> Response:
    """One JSON-RPC message of the Model Context Protocol. What each tool may do, the routes that it asks decide."""
    if media_type_of(request.headers.get("content-type")) != "application/json":
        raise UnsupportedMedia("send a JSON-RPC message as application/json")
    return _Exchange(_server(request), lent(request).config.http.max_body_bytes)


def _server(request: Request) -> MCPServer:
    """One for all requests of an application: it holds nothing of any of them."""
    app = request.app
    if not hasattr(app.state, "mcp_server"):
        app.state.mcp_server = mcp_server.build(lambda context: _within(app, context))
    return cast(MCPServer, app.state.mcp_server)


def _within(app: ASGIApp, context: Context) -> httpx.AsyncClient:
    """A client of the application within its layers, as the caller of this request, who has passed them."""
    state = context.request_context.request.scope["state"]

    async def as_the_caller(scope: Scope, receive: Receive, send: Send) -> None:
        audited = state["audited"]
        audited["action"] = f"{scope['method']} {scope['path']}"  # what the record names before POST /mcp

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in {*DENIALS, 404}:
                audited["is_denied"] = True  # which the tool tells in an answer of 200
            await send(message)

        await app({**scope, "state": state}, receive, send_noting)

    transport = httpx.ASGITransport(as_the_caller, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=HERE, timeout=None)


class _Exchange(Response):
    """The protocol's own answer to one request."""

    def __init__(self, server: MCPServer, max_bytes: int) -> None:
        super().__init__()
        self._server, self._max_bytes = server, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        manager = StreamableHTTPSessionManager(
            self._server._lowlevel_server, stateless=True, security_settings=HOSTS_ARE_CHECKED,
            max_request_body_size=self._max_bytes,
        )  # fmt: skip
        # Blanks around a header's value are none of it (RFC 9110, 5.5), and not every server takes them away.
        headers = [(name, value.strip(b" \t")) for name, value in scope["headers"]]
        async with manager.run():
            await manager.handle_request({**scope, "headers": headers}, receive, send)
