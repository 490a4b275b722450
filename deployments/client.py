"""Nexus over HTTP, as the command line speaks it."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx

from cluster import bootstrap
from nexus.config import Config, load_config
from nexus.errors import InvalidRequest, NexusError, NotFound, RateLimited, TimedOut, Unauthenticated, Unavailable

SEARCH_SECONDS = 60.0
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # between attempts while a part is away; the answer may ask for longer ones
LONGEST_PAUSE = 30.0
MOST_PAUSED = 120.0  # in all, until a request has its turn
KINDS: dict[int, type[NexusError]] = {
    401: Unauthenticated, 404: NotFound, 429: RateLimited, 503: Unavailable, 504: TimedOut,
}  # fmt: skip


class Client:
    """One connection pool to a running Nexus. Raises the NexusError that its answer tells of."""

    def __init__(self, config: Config | None = None, tell: Callable[[str], None] | None = None) -> None:
        """To the Nexus of these settings; by default of those of this home. `tell` hears why there is a wait."""
        self.url, key = whereabouts(load_config() if config is None else config)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._tell, self._told = tell, set[str]()
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=SEARCH_SECONDS, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def asynchronous(self) -> httpx.AsyncClient:
        """A pool of its own to the same Nexus, with the same key, for an event loop."""
        patience = httpx.Timeout(SEARCH_SECONDS)
        return httpx.AsyncClient(base_url=self.url, headers=self._http.headers, timeout=patience, trust_env=False)

    def call(self, method: str, path: str, **arguments: Any) -> tuple[int, Any]:
        """The status and the JSON of an answer below 400."""
        response = self._request(method, path, **arguments)
        try:
            return response.status_code, response.json()
        except ValueError:
            raise _error(response) from None

    def download(self, method: str, path: str) -> bytes:
        """The bytes of an answer below 400."""
        return self._request(method, path).content

    def stream(self, path: str, seconds: float) -> Iterator[bytes]:
        """The bytes of an answer below 400, piece by piece."""
        try:
            with self._http.stream("GET", path, timeout=seconds) as response:
                if response.status_code >= 400:
                    response.read()
                    raise _error(response)
                yield from response.iter_bytes(2**20)
        except httpx.HTTPError:
            raise Unavailable(f"{self.url} does not answer, or broke off; try again") from None

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TimeoutException:
            raise Unavailable(f"{self.url} did not answer in time; `nexus status` says how it is") from None
        except httpx.HTTPError:
            raise Unavailable(f"no Nexus answers at {self.url}; `nexus up` starts one") from None
        if response.status_code >= 400:
            raise _error(response)
        return response

    def coordinator(self) -> dict[str, Any] | None:
        """The voters, as `GET /coordinator` tells of them; None when it does not."""
        try:
            answer: dict[str, Any] = self.call("GET", "/coordinator", timeout=20)[1]
        except NexusError:
            return None
        return answer

    def status(self) -> dict[str, Any]:
        """Machines, GPUs, replicas and the plan in force, as `GET /status` tells of them."""
        answer: dict[str, Any] = self.call("GET", "/status", timeout=20)[1]
        return answer

    def announce(
        self, files: Sequence[Mapping[str, object]], collection: str, readers: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Make a job of files; `expected` in the answer numbers those whose bytes are wanted."""
        limited = {} if readers is None else {"readers": list(readers)}
        body = {"files": list(files), "collection": collection, **limited}
        answer: dict[str, Any] = self._patiently("POST", "/rag/jobs", json=body)
        return answer

    def send(self, job_id: str, files: Mapping[int, bytes]) -> None:
        """Bytes of announced files; when this returns they are on the disk over there."""
        parts = [(str(number), (str(number), content)) for number, content in files.items()]
        self._patiently("PUT", f"/rag/jobs/{job_id}/files", files=parts)

    def job(self, job_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._patiently("GET", f"/rag/jobs/{job_id}", params={"limit": 0})
        return answer

    def files(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Every file of a job, page by page."""
        after: int | None = -1
        while after is not None:
            page = self._patiently("GET", f"/rag/jobs/{job_id}", params={"after": after, "limit": 10_000})
            yield from page["files"]
            after = page["next"]

    def _patiently(self, method: str, path: str, **arguments: Any) -> Any:
        """Again after a pause while a part is away: sending twice is sending once."""
        for pause in PAUSES:
            try:
                return self._in_turn(method, path, **arguments)
            except Unavailable as error:
                self._say(error)
                time.sleep(max(pause, min(error.retry_after or 0.0, LONGEST_PAUSE)))
        return self._in_turn(method, path, **arguments)

    def _in_turn(self, method: str, path: str, **arguments: Any) -> Any:
        """Again when the answer says, while this is more than may be asked for in so short a time: for so long at most.

        What was refused was not done, so this is for every request.
        """
        paused = 0.0
        while True:
            try:
                return self.call(method, path, **arguments)[1]
            except RateLimited as error:
                pause = error.retry_after or PAUSES[0]
                paused += pause
                if paused > MOST_PAUSED:
                    raise
                self._say(error)
            time.sleep(pause)

    def _say(self, error: NexusError) -> None:
        """Why it takes longer, once for each reason."""
        if self._tell is not None and error.code not in self._told:
            self._told.add(error.code)
            self._tell(f"waiting: {error.message}")

    def parts(self) -> dict[str, str]:
        """The state of each part as `/readyz?verbose` tells it; none when nothing answers."""
        try:
            states: dict[str, str] = self._http.get("/readyz?verbose", timeout=10).json().get("parts", {})
        except (httpx.HTTPError, ValueError):
            return {"gateway": "does not answer"}
        return {"gateway": "ready", **states}

    def remove(self, document_id: str) -> None:
        """Once this returns, the document is gone."""
        with suppress(NotFound):
            self._in_turn("DELETE", f"/rag/documents/{document_id}")

    def documents(self, collection: str | None = None) -> Iterator[dict[str, Any]]:
        """Every current document, page by page."""
        after = ""
        while True:
            query = {"limit": 1000, "after": after, **({"collection": collection} if collection else {})}
            page = self._in_turn("GET", "/rag/documents", params=query)
            yield from page["documents"]
            if page["next"] is None:
                return
            after = page["next"]


def _error(response: httpx.Response) -> NexusError:
    try:
        body = response.json()
        detail, code = str(body["detail"]), str(body["code"])
    except (ValueError, KeyError, TypeError):
        detail, code = f"the answer was {response.status_code} and not one of Nexus", "unexpected"
    error = KINDS.get(response.status_code, InvalidRequest)(detail, code=code)
    seconds = response.headers.get("retry-after", "")
    error.retry_after = float(seconds) if seconds.isdecimal() else None
    return error


def whereabouts(config: Config) -> tuple[str, str | None]:
    """Where the Nexus of these settings answers, and the key that is found for it: the environment's go first."""
    home = Path(config.home)
    instance = bootstrap.find_instance(home)
    url = os.environ.get("NEXUS_URL") or (instance.url if instance else config.url)
    return url, os.environ.get("NEXUS_API_KEY") or read_admin_key(home)


def read_admin_key(home: Path) -> str | None:
    """The key that `nexus up` made for this user, if it did."""
    file = home / "admin-key"
    return file.read_text().strip() if file.is_file() else None
