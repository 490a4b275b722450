"""Nexus over HTTP, as Athena's pages speak it: with the key of whoever looks at them."""

import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

ASK_SECONDS = 60.0
LONG_SECONDS = 900.0  # a policy over all files, an answer of a slow model
CONNECT_SECONDS = 3.0
PING_SECONDS = 2.0
BATCH_BYTES = 8 * 2**20  # of files sent in one request
OPEN = ("expected", "queued", "running")  # of a file that has not ended

Page = dict[str, Any]


class Away(Exception):
    """Nothing answers at `url`, or what does is not Nexus."""

    def __init__(self, url: str) -> None:
        super().__init__(f"Nexus does not answer at {url}")
        self.url = url


@dataclass
class Refused(Exception):
    """An answer of 400 or more: its status, what it says, and after how many seconds it may be asked again."""

    status: int
    detail: str
    retry_after: float | None = None

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class File:
    """A file to be sent: its name, its bytes, and the media type that the browser gave it."""

    name: str
    content: bytes
    media_type: str | None = None


class Nexus:
    """One caller's way to a gateway. Every method raises Away and Refused."""

    def __init__(self, url: str, key: str, http: httpx.Client | None = None) -> None:
        """`http` is an own client in place of one to `url`; `key` is sent with either."""
        self.url = url
        self._headers = {"authorization": f"Bearer {key}"}
        patience = httpx.Timeout(ASK_SECONDS, connect=CONNECT_SECONDS)
        self._http = http or httpx.Client(base_url=url, timeout=patience, trust_env=False)
        self._too_often: tuple[Refused, float] | None = None  # the last 429, and when its time is over

    def close(self) -> None:
        self._http.close()

    # ── whether it is there, and what it knows ──────────────────────────────────────────────────

    def is_there(self) -> bool:
        """Whether the gateway answers now."""
        try:
            return self._http.get("/livez", timeout=PING_SECONDS).status_code == 200
        except httpx.HTTPError:
            return False

    def check_key(self) -> None:
        """Return if the key is one of this Nexus."""
        self._ask("GET", "/openapi.json")

    def status(self) -> Page:
        return self._ask("GET", "/status")

    def report(self) -> Page:
        return self._ask("GET", "/report")

    # ── questions ───────────────────────────────────────────────────────────────────────────────

    def chat(self, turns: Sequence[Mapping[str, str]], collection: str) -> Iterator[str | Page]:
        """Pieces of the answer to the last of these messages, then all that is known of it."""
        model = "nexus-rag" if collection == "default" else f"nexus-rag/{collection}"
        body = {"model": model, "messages": list(turns), "stream": True}
        for event in self._events("/v1/chat/completions", body):
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    yield choice["delta"]["content"]
            if "sources" in event:
                yield event

    def ask_within(self, session: str, question: str, collection: str) -> Iterator[str | Page]:
        """The same for a question that is answered with what a session was told."""
        body = {"query": question, "collection": collection, "session_id": session, "stream": True}
        for event in self._events("/rag/query", body):
            yield event.get("delta", event)

    def explain(self, query: str, collection: str, as_of: int) -> Page:
        """What a search finds for a query in the collection as it was: each candidate's places, and what became of it.

        Where that state is not kept any more, as it is now.
        """
        body = {"query": query, "collection": collection, "k": 50, "explain": True}
        try:
            return self._ask("POST", "/rag/search", json={**body, "as_of": as_of})
        except Refused as error:
            if error.status not in (400, 422):
                raise
        return self._ask("POST", "/rag/search", json=body)

    # ── documents ───────────────────────────────────────────────────────────────────────────────

    def collections(self) -> list[Page]:
        return list(self._ask("GET", "/rag/collections")["collections"])

    def documents(self, collection: str | None, after: str, limit: int) -> Page:
        """`documents`, and `next`: the cursor of the page behind this one, or None."""
        chosen = {} if collection is None else {"collection": collection}
        return self._ask("GET", "/rag/documents", params={**chosen, "after": after, "limit": limit})

    def text_of(self, document_id: str) -> str:
        return str(self._ask("GET", f"/rag/documents/{quote(document_id, safe='')}/text")["text"])

    def versions_of(self, document_id: str) -> list[Page]:
        """The latest first."""
        return list(self._ask("GET", f"/rag/documents/{quote(document_id, safe='')}/versions")["versions"])

    def delete(self, document_id: str) -> Page:
        return self._ask("DELETE", f"/rag/documents/{quote(document_id, safe='')}")

    # ── jobs ────────────────────────────────────────────────────────────────────────────────────

    def announce(self, files: Sequence[File], collection: str, readers: Sequence[str] | None = None) -> Page:
        """A job of these files; `expected` numbers those whose bytes are wanted."""
        listed = [_announced(file) for file in files]
        limited = {} if readers is None else {"readers": list(readers)}
        body = {"files": listed, "collection": collection, **limited}
        return self._ask("POST", "/rag/jobs", json=body, headers={"idempotency-key": uuid.uuid4().hex})

    def send(self, job_id: str, files: Sequence[File], expected: Iterable[int]) -> Iterator[int]:
        """Send the bytes of these files, some at a time; yields how many are there by then."""
        sent = 0
        for batch in _batches(files, expected):
            parts = [(str(number), (str(number), files[number].content)) for number in batch]
            self._ask("PUT", f"/rag/jobs/{job_id}/files", files=parts)
            sent += len(batch)
            yield sent

    def jobs(self, after: str | None, limit: int) -> Page:
        return self._ask("GET", "/rag/jobs", params={"limit": limit, **({} if after is None else {"after": after})})

    def running_jobs(self) -> list[Page]:
        return list(self._ask("GET", "/rag/jobs", params={"limit": 100, "state": "running"})["jobs"])

    def job(self, job_id: str, limit: int = 1000, after: int = -1) -> Page:
        """A job, with what became of each of its first files after this one."""
        return self._ask("GET", f"/rag/jobs/{quote(job_id, safe='')}", params={"limit": limit, "after": after})

    def cancel(self, job_id: str) -> Page:
        return self._ask("POST", f"/rag/jobs/{quote(job_id, safe='')}/cancel")

    def retry(self, job_id: str, number: int) -> Page:
        return self._ask("POST", f"/rag/jobs/{quote(job_id, safe='')}/files/{number}/retry")

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    def context_of(self, session: str) -> str:
        return str(self._ask("GET", f"/mcp/{quote(session, safe='')}/get_context")["context"])

    def tell(self, session: str, content: str) -> None:
        self._ask("POST", f"/mcp/{quote(session, safe='')}/add_context", json={"content": content})

    def clear(self, session: str) -> None:
        self._ask("DELETE", f"/mcp/{quote(session, safe='')}/clear_context")

    # ── policies ────────────────────────────────────────────────────────────────────────────────

    def policies(self) -> list[Page]:
        return list(self._ask("GET", "/policies")["policies"])

    def evaluate(self, policy: str, dry_run: bool, file: str | None = None) -> Page:
        """What a policy would do, or with `dry_run` false, what it did."""
        body = {"dry_run": dry_run, **({} if file is None else {"file": file})}
        return self._ask("POST", f"/policies/{quote(policy, safe='')}/evaluate", json=body, timeout=LONG_SECONDS)

    # ── the wire ────────────────────────────────────────────────────────────────────────────────

    def _ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, **arguments: Any) -> Page:
        self._keep_pace()
        try:
            response = self._http.request(method, path, headers={**self._headers, **(headers or {})}, **arguments)
        except httpx.HTTPError:
            raise Away(self.url) from None
        if response.status_code >= 400:
            raise self._refusal(response)
        try:
            answer: Page = response.json()
        except ValueError:
            raise Away(self.url) from None
        return answer

    def _events(self, path: str, body: Page) -> Iterator[Page]:
        """The server-sent events of an answer. One that says that it broke off raises Refused."""
        patience = httpx.Timeout(LONG_SECONDS, connect=CONNECT_SECONDS)
        self._keep_pace()
        try:
            with self._http.stream("POST", path, json=body, headers=self._headers, timeout=patience) as response:
                if response.status_code >= 400:
                    response.read()
                    raise self._refusal(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise Refused(500, str(event["error"]["message"]))
                        yield event
        except (httpx.HTTPError, ValueError):
            raise Away(self.url) from None

    def _keep_pace(self) -> None:
        """What was asked too often is not asked before its time is over: pages look again by themselves."""
        if self._too_often is not None:
            error, until = self._too_often
            if (left := until - time.monotonic()) > 0:
                raise Refused(error.status, error.detail, math.ceil(left))
            self._too_often = None

    def _refusal(self, response: httpx.Response) -> Exception:
        """What an answer of 400 or more means. What no Nexus says comes from whatever stands in front of none."""
        seconds = response.headers.get("retry-after", "")
        try:
            body = response.json()
            detail = body["error"]["message"] if "error" in body else body["detail"]
        except (ValueError, KeyError, TypeError):
            return Away(self.url)
        error = Refused(response.status_code, str(detail), float(seconds) if seconds.isdecimal() else None)
        if error.status == 429 and error.retry_after is not None:
            self._too_often = (error, time.monotonic() + error.retry_after)
        return error


def _announced(file: File) -> Page:
    """A file as a job announces it: by name, size, and the BLAKE2b of its bytes."""
    digest = hashlib.blake2b(file.content, digest_size=16).hexdigest()
    known = {"media_type": file.media_type} if file.media_type else {}
    return {"filename": file.name, "digest": digest, "size": len(file.content), **known}


def _batches(files: Sequence[File], expected: Iterable[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    held = 0
    for number in expected:
        size = len(files[number].content)
        if batch and held + size > BATCH_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(number)
        held += size
    if batch:
        yield batch
