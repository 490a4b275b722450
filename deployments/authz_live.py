"""The same matrix tried out on the Nexus that runs here, by HTTP: only what reads, and what has to be refused.

Two tenants with a document, a job, a session, a block and an interaction each are made for it, and their keys; all of
it is removed again.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deployments.authz import (
    CANARIES,
    ROLES,
    SESSION,
    TENANTS,
    World,
    block_of,
    policy_of,
    told,
    told_policy,
    values_of,
)
from nexus.access import MOST_PER_MINUTE, PERMISSIONS, KeyRing
from nexus.errors import Unavailable

SECONDS = 300.0  # for one request; a document is read and embedded in it
KEY_SECONDS = 3600.0  # a key that was left behind ends by itself


@dataclass(frozen=True)
class Sent:
    """Things that their owners sent over HTTP, made once. Only the session is put right again before each try: a
    caller who names a stranger's has one of that name in their own tenant."""

    client: httpx.AsyncClient
    owners: Mapping[str, str]  # keys by tenant
    made: dict[str, Mapping[str, str]] = field(default_factory=dict)

    async def make(self, tenant: str) -> Mapping[str, str]:
        if tenant not in self.made:
            name = f"{CANARIES[tenant]}.md"
            document = await self._ask(tenant, "POST", "/rag/add_document", {"filename": name, "content": told(tenant)})
            file = {"filename": f"to-come-{name}", "digest": "0" * 32, "size": 1}
            job = await self._ask(tenant, "POST", "/rag/jobs", {"files": [file]})
            await self._ask(tenant, "PUT", f"/share/{block_of(tenant)}", told(tenant))
            await self._ask(tenant, "PUT", f"/policies/{policy_of(tenant)}", told_policy(tenant))
            asked = {"query": told(tenant), "response": told(tenant), "user": CANARIES[tenant]}
            kept = await self._ask(tenant, "POST", "/memory/store", asked)
            ids = document["document_id"], job["job_id"], kept["interaction_id"]
            self.made[tenant] = values_of(tenant, *ids)
        if await self._context(tenant) != told(tenant):
            await self._ask(tenant, "DELETE", f"/mcp/{SESSION}/clear_context")
            await self._ask(tenant, "POST", f"/mcp/{SESSION}/add_context", {"content": told(tenant)})
        return self.made[tenant]

    async def harm(self, tenant: str, values: Mapping[str, str]) -> str:
        key = {"x-api-key": self.owners[tenant]}
        if (await self.client.get(f"/rag/documents/{values['document_id']}", headers=key)).status_code == 404:
            return "a stranger deleted a document"
        if (await self._ask(tenant, "GET", f"/rag/jobs/{values['job_id']}"))["state"] != "running":
            return "a stranger ended a job"
        if await self._ask(tenant, "GET", f"/share/{block_of(tenant)}") != told(tenant):
            return "a stranger changed a block"
        recalled = await self._ask(tenant, "POST", "/memory/retrieve", {"filters": {"user": CANARIES[tenant]}})
        if not recalled["interactions"]:
            return "a stranger deleted an interaction"
        if (await self.client.get(f"/policies/{policy_of(tenant)}", headers=key)).status_code == 404:
            return "a stranger deleted a policy"
        return "" if await self._context(tenant) == told(tenant) else "a stranger changed a session"

    async def _context(self, tenant: str) -> str:
        return str((await self._ask(tenant, "GET", f"/mcp/{SESSION}/get_context"))["context"])

    async def remove(self) -> None:
        for tenant, values in self.made.items():
            await self._ask(tenant, "DELETE", f"/rag/jobs/{values['job_id']}")
            await self._ask(tenant, "DELETE", f"/rag/documents/{values['document_id']}?purge=true")
            await self._ask(tenant, "DELETE", f"/policies/{values['policy']}")
            await self._ask(tenant, "DELETE", f"/mcp/{SESSION}/clear_context")
            for owner in TENANTS:  # whoever named a stranger's block made one of that name in their own tenant
                key = {"x-api-key": self.owners[tenant]}
                await self.client.delete(f"/share/{block_of(owner)}", headers=key)
            await self._ask(tenant, "DELETE", f"/memory/interactions?user={CANARIES[tenant]}")

    async def _ask(self, tenant: str, method: str, path: str, body: object = None) -> Any:
        headers = {"x-api-key": self.owners[tenant]}
        answer = await self.client.request(method, path, json=body, headers=headers)
        if answer.status_code >= 400:
            raise Unavailable(f"{method} {path} was answered {answer.status_code}, so nothing can be tried out")
        return answer.json()


@asynccontextmanager
async def running(url: str, home: Path) -> AsyncIterator[World]:
    """The gateway at this URL, whose home is on this machine. Raises Unavailable."""
    ring = KeyRing(home)
    ids: list[str] = []

    def make(name: str, tenant: str, permissions: frozenset[str]) -> str:
        text, key = ring.create(name, tenant, permissions, KEY_SECONDS, requests_per_minute=MOST_PER_MINUTE)
        ids.append(key.id)
        return text

    try:
        keys = {role: make(role.replace(" ", "-"), *known) for role, known in ROLES.items() if known}
        owners = {tenant: make("owner", tenant, PERMISSIONS) for tenant in TENANTS}
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False) as client:
            things = Sent(client, owners)
            try:
                yield World(client, things, keys, only_harmless=True)
            finally:
                await things.remove()
    except httpx.HTTPError as error:
        raise Unavailable(f"no Nexus answers at {url} ({type(error).__name__}); `nexus up` starts one") from None
    finally:
        for id in ids:
            ring.revoke(id)
        ring.close()
