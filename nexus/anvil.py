"""The Anvil of a Hammerspace: its REST API, in the shapes that the vendor's own open clients use.

No specification is published. The shapes are those of the vendor's CSI driver (`hsclient.go`: the login, the cookie,
tasks, shares, `objective-set`), its Ansible playbooks (`objective-add.yml`, `share-create-update.yml`) and HammerSDK
(`objective-unset`). What is long is a task: 202 with a Location, asked after until it has ended or a deadline is past.
Of such a Location only the task's name is used: the credential goes to the host that was configured, and nowhere else.
"""

import re
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import orjson
from pydantic import SecretStr

from nexus.errors import ConfigError, Conflict, InvalidRequest, NotFound, Unavailable, UpstreamInvalid
from nexus.upstream import CONNECT_SECONDS, World, clean

BASE = "/mgmt/v1.2/rest"
MOST_BYTES = 8 * 2**20  # of an answer
POLL_SECONDS = 2.0  # between two looks at a task, at first
SLOW_POLL_SECONDS = 4.0
POLL_FAST_FOR_SECONDS = 30.0
UNDER_WAY = frozenset({"NONE", "EXECUTING", "VALIDATING"})
TASK_NAME = re.compile(r"[0-9A-Za-z\-]{1,64}")
SHARE_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,80}")


@dataclass(frozen=True, slots=True)
class Task:
    """Work of the Anvil: `status` is its own word, `message` what it says of it."""

    uuid: str
    status: str
    message: str = ""

    @property
    def is_under_way(self) -> bool:
        return self.status in UNDER_WAY

    @property
    def went_well(self) -> bool:
        return self.status == "COMPLETED"


@dataclass(frozen=True, slots=True)
class Share:
    """A share: its name, the path it exports, its state (PUBLISHED once it can be used) and its objectives by name."""

    name: str
    path: str
    state: str
    objectives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Objective:
    """A named rule of the Anvil. `expression` is empty where the Anvil does not tell it."""

    name: str
    expression: str


class Anvil:
    """One Anvil. All methods block and may be called by several threads at once.

    Each raises UpstreamInvalid when it is not trusted, refuses the credential or answers nonsense, Unavailable when it
    is away or too slow, InvalidRequest for what it refuses, NotFound for what it has not.
    """

    def __init__(
        self, host: str, port: int, username: str, password: SecretStr, *, ca_file: Path | None = None,
        timeout_seconds: float = 30.0, task_seconds: float = 600.0, world: World | None = None,
    ) -> None:  # fmt: skip
        """`ca_file` holds the authority that signed the Anvil's certificate, where the system does not know it."""
        self._origin = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        self._username, self._password = username, password.get_secret_value()
        self._timeout_seconds, self._task_seconds = timeout_seconds, task_seconds
        self._world = world or World()
        self._client = httpx.Client(
            verify=_trust(ca_file), trust_env=False, follow_redirects=False,
            timeout=httpx.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds)),
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "nexus"},
        )  # fmt: skip
        self._login_lock = threading.Lock()
        self._logins = 0

    def close(self) -> None:
        self._client.close()

    def check(self) -> None:
        """Return if the Anvil answers this user, else raise."""
        self._get("/cntl/state")

    def shares(self) -> list[Share]:
        return [_read_share(one) for one in _require_list(self._get("/shares"))]

    def share(self, name: str) -> Share | None:
        """The share of this name; None where there is none."""
        try:
            return _read_share(self._get(f"/shares/{_quoted(name)}"))
        except NotFound:
            return None

    def create_share(self, name: str, path: str, comment: str) -> Task:
        """Make a share, and its path where that is not there yet. Returns the task as it ended, or as it was last."""
        if not SHARE_NAME.fullmatch(name) or not path.startswith("/"):
            raise InvalidRequest("a share's name has 1 to 80 characters and no '/', and its path begins with one")
        body = {"name": name, "path": path, "comment": comment, "extendedInfo": {}, "exportOptions": []}
        return self.finish(self._begun(self._call("POST", "/shares?create-path=true", body)))

    def objectives(self) -> list[Objective]:
        return [
            Objective(_text(one, "name"), str(one.get("expression") or ""))
            for one in _require_list(self._get("/objectives"))
        ]

    def validate(self, expression: str) -> None:
        """Return if the Anvil understands this expression, else raise InvalidRequest with its words."""
        self._get(f"/objectives/validate/{_quoted(expression)}")

    def create_objective(self, name: str, comment: str, expression: str) -> Task:
        """Define an objective; the expression has been validated."""
        body = {
            "name": name, "comment": comment, "expression": expression, "basic": False,
            "extendedInfo": {"isAdvanced": "true"},
        }  # fmt: skip
        return self.finish(self._begun(self._call("POST", "/objectives", body)))

    def set_objective(self, share: str, path: str, objective: str) -> Task:
        """Apply an objective at a path of a share, which begins with a slash; it is not waited for.

        Data follow in their own time. Applied once more, nothing changes.
        """
        return self._begun(self._call("POST", _applying("objective-set", share, path, objective)))

    def unset_objective(self, share: str, path: str, objective: str) -> Task:
        """Take an objective off a path of a share; it is not waited for."""
        return self._begun(self._call("POST", _applying("objective-unset", share, path, objective)))

    def task(self, uuid: str) -> Task:
        """A task as it stands."""
        found = self._get(f"/tasks/{_quoted(uuid)}")
        if not isinstance(found, Mapping) or not isinstance(found.get("status"), str):
            raise self._nonsense("a task without a status")
        message = clean(str(found.get("statusMessage") or ""), (self._password, self._username))
        return Task(uuid, clean(found["status"]), message)

    def finish(self, task: Task) -> Task:
        """The task as it ended, or as it was last seen before the deadline: a look that fails is no end of it."""
        started = self._world.clock()
        while task.is_under_way:
            passed = self._world.clock() - started
            pause = POLL_SECONDS if passed < POLL_FAST_FOR_SECONDS else SLOW_POLL_SECONDS
            if passed + pause > self._task_seconds:
                break
            self._world.sleep(pause)
            with suppress(Unavailable):
                task = self.task(task.uuid)
        return task

    # How it is asked

    def _get(self, path: str) -> Any:
        response, body = self._call("GET", path)
        if response.status_code != 200:
            raise self._nonsense(f"status {response.status_code} where 200 was expected")
        return self._parse(body)

    def _parse(self, body: bytes) -> Any:
        try:
            return orjson.loads(body) if body else None
        except orjson.JSONDecodeError:
            raise self._nonsense("what is not JSON") from None

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[httpx.Response, bytes]:
        """One request, logged in first; after 401 or 403 once more with a new login."""
        if not self._logins:
            self._log_in(0)
        known = self._logins
        response, content = self._attempt(method, path, json=body)
        if response.status_code in (401, 403):
            self._log_in(known)
            response, content = self._attempt(method, path, json=body)
        if response.status_code in (200, 201, 202, 204):
            return response, content
        raise self._refusal(response.status_code, content)

    def _log_in(self, known: int) -> None:
        """A new session, unless another thread has had one since this one counted `known` of them."""
        with self._login_lock:
            if self._logins != known:
                return
            form = {"username": self._username, "password": self._password}
            response, content = self._attempt("POST", "/login", data=form)
            if response.status_code != 200:
                raise self._refusal(response.status_code, content)
            if not response.cookies:
                raise self._nonsense("a login without a session")
            self._logins += 1

    def _attempt(self, method: str, path: str, **what: Any) -> tuple[httpx.Response, bytes]:
        deadline = self._world.clock() + self._timeout_seconds
        body = bytearray()
        with self._reaching(), self._client.stream(method, self._origin + BASE + path, **what) as response:
            for data in response.iter_raw():
                body += data
                if len(body) > MOST_BYTES:
                    raise self._nonsense(f"more than {MOST_BYTES // 2**20} MiB")
                if self._world.clock() > deadline:
                    raise Unavailable("the Anvil did not answer in time; try again in a moment")
        return response, bytes(body)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise Unavailable("the Anvil did not answer in time; try again in a moment") from None
        except httpx.TransportError as error:
            if _is_of_certificate(error):
                raise UpstreamInvalid(
                    "the Anvil shows a certificate that nobody here vouches for: set hammerspace.ca_file to the"
                    " authority that signed it"
                ) from None
            raise Unavailable("the Anvil cannot be reached; try again in a moment") from None

    def _refusal(self, status: int, body: bytes) -> Exception:
        host = urlsplit(self._origin).hostname or ""
        session = tuple(cookie.value or "" for cookie in self._client.cookies.jar)
        said = clean(body.decode(errors="replace"), (self._password, self._username, host, *session))
        if status in (401, 403):
            return UpstreamInvalid(
                f"the Anvil refuses this user (status {status}): set hammerspace.username and hammerspace.password to"
                " one that may read shares and set objectives"
            )
        if status == 404:
            return NotFound("the Anvil has nothing of this name")
        if status == 409:
            return Conflict(f"the Anvil has something else of this name: {said}")
        if status in (400, 413, 414, 422):
            return InvalidRequest(f"the Anvil refuses this: {said or f'status {status}'}")
        if status in (408, 429) or status >= 500:
            return Unavailable(f"the Anvil failed (status {status}); try again in a moment")
        return self._nonsense(f"status {status}")

    def _nonsense(self, what: str) -> UpstreamInvalid:
        return UpstreamInvalid(f"the Anvil answered {what}")

    def _begun(self, answer: tuple[httpx.Response, bytes]) -> Task:
        """Of a call that is done at once, a task that is completed; else the one that was begun."""
        response, _ = answer
        if response.status_code != 202:
            return Task("", "COMPLETED")
        name = urlsplit(response.headers.get("location", "")).path.rstrip("/").rpartition("/")[2]
        if not TASK_NAME.fullmatch(name):
            raise self._nonsense("202 without the name of a task")
        return Task(name, "NONE")


def _trust(ca_file: Path | None) -> ssl.SSLContext:
    """Certificates are checked, always: by the system's authorities, or by those of the file alone."""
    if ca_file is None:
        return httpx.create_ssl_context()
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError):
        raise ConfigError("hammerspace.ca_file cannot be read as certificates in PEM") from None


def _is_of_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _applying(how: str, share: str, path: str, objective: str) -> str:
    return f"/shares/{_quoted(share)}/{how}?path={_quoted(path)}&objective-identifier={_quoted(objective)}"


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _require_list(found: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise UpstreamInvalid("the Anvil answered something else where a list was expected")
    return found


def _read_share(found: Any) -> Share:
    if not isinstance(found, Mapping):
        raise UpstreamInvalid("the Anvil answered something else where a share was expected")
    applied = found.get("objectives") or {}
    listed = applied.get("appliedObjectives") or [] if isinstance(applied, Mapping) else []
    return Share(
        _text(found, "name"), _text(found, "path"), _text(found, "shareState"),
        tuple(_text(one, "name") for one in _require_list(listed)),
    )  # fmt: skip


def _text(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    if not isinstance(value, str):
        raise UpstreamInvalid(f"the Anvil answered something without its {key!r}")
    return value
