"""A Hammerspace share as a tier: what rules want becomes objectives, and the share moves the data in its own time.

    hammerspace://anvil.example:8443/SHARE?mount=/mnt/share#place-on-object-volumes

Files are seen where the share is mounted, each tenant's in a folder of its own, and stay there under their names
wherever their data are. To be on this tier is to be under its service level objectives, which the address names after
the `#`, separated by commas. So tiers of one share differ by them alone, and of a file that moves from one to another
nothing is copied here. What was asked is `requested`; it is `aligned` once the share itself says so, which it is asked
through the gateway file that it has in every folder (as hstk does); and `failed` where the Anvil refuses.

The objectives are the Anvil's own objects: `nexus home <SLOs>` and `nexus replica <SLOs>` at the paths of files, and
`nexus rule <tenant> <rule> <digest>` at a tenant's folder, which has the conditions of a rule compiled into it
(objectives.py). Each expression is validated by the Anvil before it is defined. Others' objectives are left alone.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import SecretStr

from nexus.anvil import SHARE_NAME, Anvil, Objective, Task
from nexus.conditions import Condition
from nexus.errors import ConfigError, InvalidRequest, NexusError, NotFound, Unavailable
from nexus.objectives import compile_rule
from nexus.ports import Found, Placement, Role, Tier, Unusable
from nexus.registry import open_tier
from nexus.tiers import check_path
from nexus.types import StoredFile, digest
from nexus.upstream import World

PORT = 8443
SLO = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.\-]{0,127}")
WANTED = "write hammerspace://anvil.example:8443/SHARE?mount=/mnt/share#place-on-object-volumes"
IS_ALIGNED = 'OVERALL_ALIGNMENT==ALIGNMENT("aligned")'
HOMES = "nexus home "  # the objectives of homes begin so
GATEWAY = ".fs_command_gateway"
DIVISION_SLASH = "\N{DIVISION SLASH}"  # what stands for a slash in a command
MOST_GATEWAY_CHARACTERS = 4096


@dataclass(frozen=True, slots=True)
class Address:
    """Which share of which Anvil, where it is mounted here, and what being on the tier means there."""

    host: str
    port: int
    share: str
    mount: str
    slos: tuple[str, ...]

    @property
    def place(self) -> tuple[str, int, str]:
        """Equal for two tiers of one share."""
        return self.host, self.port, self.share


def parse_address(address: str) -> Address:
    """Raises ConfigError that says what is wrong."""
    parts = urlsplit(address)
    try:
        port = parts.port or PORT
    except ValueError:
        raise ConfigError(f"the port of a Hammerspace tier is no port: {WANTED}") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError("a Hammerspace tier's address holds a credential: set hammerspace.username and .password")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    share, slos = unquote(parts.path.removeprefix("/")), tuple(unquote(slo) for slo in parts.fragment.split(","))
    if parts.scheme != "hammerspace" or not parts.hostname or not SHARE_NAME.fullmatch(share):
        raise ConfigError(f"a Hammerspace tier's address names an Anvil and one of its shares: {WANTED}")
    if set(query) != {"mount"} or not query["mount"].startswith("/"):
        raise ConfigError(f"a Hammerspace tier's address says where the share is mounted here, as a path: {WANTED}")
    if not all(SLO.fullmatch(slo) for slo in slos):
        raise ConfigError(f"a Hammerspace tier's address names service level objectives of the Anvil: {WANTED}")
    return Address(parts.hostname, port, share, query["mount"].rstrip("/") or "/", slos)


def check(address: str) -> None:
    """Return if this is an address of a Hammerspace tier, else raise ConfigError."""
    parse_address(address)


def open(
    address: str, *, name: str, siblings: Iterable[str] = (), username: str = "", password: SecretStr | None = None,
    ca_file: Path | None = None, task_seconds: float = 600.0, world: World | None = None, **ignored: Any,
) -> "HammerspaceTier":  # fmt: skip
    """The tier that rules call `name`; `siblings` are the names of other tiers of its share."""
    where = parse_address(address)
    if not username or password is None:
        raise ConfigError(f"the tier {name!r} needs hammerspace.username and hammerspace.password")
    anvil = Anvil(where.host, where.port, username, password, ca_file=ca_file, task_seconds=task_seconds, world=world)
    return HammerspaceTier(address, name, siblings, anvil, open_tier(f"file:{where.mount}"), world or World())


class MountedShare:
    """The files of a share, where it is mounted."""

    def __init__(self, files: Tier, anvil: Anvil) -> None:
        self._files, self._anvil = files, anvil

    def walk(self, tenant: str) -> Iterator[Found | Unusable]:
        return self._files.walk(tenant)

    def find(self, tenant: str, path: str) -> Found | None:
        return self._files.find(tenant, path)

    def read(self, tenant: str, path: str) -> Iterator[bytes]:
        return self._files.read(tenant, path)

    def write(self, tenant: str, path: str, chunks: Iterable[bytes], modified_at: float | None = None) -> Found:
        return self._files.write(tenant, path, chunks, modified_at)

    def remove(self, tenant: str, path: str, key: str) -> bool:
        return self._files.remove(tenant, path, key)

    def settle(self, tenant: str) -> None:
        self._files.settle(tenant)

    def discard(self, tenant: str, path: str) -> None:
        self._files.discard(tenant, path)

    def check(self) -> None:
        self._files.check()
        self._anvil.check()

    def close(self) -> None:
        self._anvil.close()
        self._files.close()


class HammerspaceTier(MountedShare):
    """A PlacingTier. What is read and written goes through the mount; only `place` and its like ask the Anvil."""

    def __init__(
        self, address: str, name: str, siblings: Iterable[str], anvil: Anvil, files: Tier, world: World
    ) -> None:
        super().__init__(files, anvil)
        self.address, self.name = address, name
        self._where = parse_address(address)
        self._reach = {name, *siblings}
        self._world = world

    @property
    def share(self) -> tuple[str, int, str]:
        """Equal for two tiers of one share."""
        return self._where.place

    # Where their data are

    def place(self, files: Sequence[StoredFile], role: Role) -> list[Placement]:
        """Put each file under this tier's objective of this role, as a home in place of any other tier's.

        Each that cannot be is `failed` with its reason; once the Anvil is away, the rest are not tried.
        """
        refusal: NexusError | None = None
        others: list[str] = []
        objective = self._objective_name(role)
        try:
            others = self._prepare(objective, role)
        except NexusError as error:
            refusal = error
        placed = []
        for file in files:
            asked = Placement(file.tenant, file.path, self.name, role, "requested", objective)
            if refusal is None:
                try:
                    asked = replace(asked, reference=self._place_one(file, objective, others))
                except NexusError as error:
                    asked = replace(asked, state="failed", reason=error.message)
                    refusal = error if isinstance(error, Unavailable) else None
            else:
                asked = replace(asked, state="failed", reason=refusal.message)
            placed.append(asked)
        return placed

    def look(self, placements: Sequence[Placement]) -> list[Placement]:
        """The same as they stand now: a task of the Anvil that ended badly has failed, and the share says the rest."""
        return [self._look_at(one) if one.state == "requested" else one for one in placements]

    def withdraw(self, files: Sequence[StoredFile], role: Role) -> None:
        """Take this tier's objective of this role off these files; their data may go where others want them."""
        objective = self._objective_name(role)
        for file in files:
            self._take_off(_path_of(file.tenant, file.path), objective)

    def delegate(
        self, tenant: str, rule: str, condition: Condition, also: Sequence["HammerspaceTier"] = (), dry_run: bool = True
    ) -> Placement:
        """Have the share itself keep a rule: its files on this tier, and copies on `also`, as they come and change.

        In place of what the same rule was before. A dry run has the expression validated and nothing more. The
        placement's `reference` is the expression. Raises InvalidRequest where the rule cannot be compiled.
        """
        slos = [slo for tier in (self, *also) for slo in tier._where.slos]
        expression = compile_rule(tenant, condition, list(dict.fromkeys(slos)))
        placement = Placement(tenant, "", self.name, "home", "requested", expression)
        self._anvil.validate(expression)
        if dry_run:
            return placement
        prefix = _rule_prefix(tenant, rule)
        objective = prefix + digest(expression)[:12]
        known = self._anvil.objectives()
        self._define(known, objective, expression, f"The rule {rule} of {tenant}, by Nexus")
        task = self._anvil.finish(self._anvil.set_objective(self._where.share, f"/{tenant}", objective))
        if not task.went_well:
            return replace(placement, state="requested" if task.is_under_way else "failed", reason=_told(task))
        for former in known:
            if former.name.startswith(prefix) and former.name != objective:
                self._take_off(f"/{tenant}", former.name)
        return placement

    def revoke(self, tenant: str, rule: str) -> int:
        """The share does not keep this rule any more; how many objectives of it there were."""
        former = [one.name for one in self._anvil.objectives() if one.name.startswith(_rule_prefix(tenant, rule))]
        for objective in former:
            self._take_off(f"/{tenant}", objective)
        return len(former)

    def _objective_name(self, role: Role) -> str:
        return f"nexus {role} {', '.join(self._where.slos)}"

    def _prepare(self, objective: str, role: Role) -> list[str]:
        """Have the objective of a role defined; for a home, the names of those of other homes."""
        known = self._anvil.objectives()
        slos = ",".join(f'SLO("{slo}")' for slo in self._where.slos)
        self._define(known, objective, f"IF IS_FILE THEN {{{slos}}}", f"A {role} of files, by Nexus")
        return [one.name for one in known if role == "home" and one.name.startswith(HOMES) and one.name != objective]

    def _define(self, known: Sequence[Objective], name: str, expression: str, comment: str) -> None:
        """Raises InvalidRequest where the Anvil does not want it, or has another of this name."""
        for one in known:
            if one.name == name:
                if one.expression and "".join(one.expression.split()) != "".join(expression.split()):
                    raise InvalidRequest(f"the Anvil has another objective {name!r}: remove or rename that one")
                return
        self._anvil.validate(expression)
        task = self._anvil.create_objective(name, comment, expression)
        if not task.went_well:
            raise InvalidRequest(f"the Anvil did not define the objective {name!r}: {_told(task)}")

    def _place_one(self, file: StoredFile, objective: str, others: Iterable[str]) -> str:
        """The reference of the placement: the objective, and the task where it became one."""
        if file.tier not in self._reach:
            raise InvalidRequest(
                f"it is on {file.tier!r}, which is no tier of this share: move it to {self.name!r} by way of a file"
                " tier, or configure both as tiers of one share"
            )
        at = _path_of(file.tenant, file.path)
        task = self._anvil.set_objective(self._where.share, at, objective)
        for other in others:
            self._take_off(at, other)
        return f"{objective}\n{task.uuid}" if task.is_under_way else objective

    def _take_off(self, at: str, objective: str) -> None:
        with suppress(NotFound, InvalidRequest):  # it was not applied there
            self._anvil.unset_objective(self._where.share, at, objective)

    def _look_at(self, placement: Placement) -> Placement:
        objective, _, task_name = placement.reference.partition("\n")
        try:
            if task_name:
                task = self._anvil.task(task_name)
                if task.is_under_way:
                    return placement
                if not task.went_well:
                    return replace(placement, state="failed", reason=_told(task))
            aligned = self._is_aligned(placement.tenant, placement.path)
        except (NotFound, InvalidRequest) as error:
            return replace(placement, state="failed", reason=error.message)
        except NexusError:  # the Anvil is away; there will be another look
            return placement
        return replace(placement, reference=objective, state="aligned") if aligned else placement

    def _is_aligned(self, tenant: str, path: str) -> bool:
        """What the share says of a file: it is asked with a command in a gateway file beside it, and answers in that.

        Raises NotFound where there is no such file, InvalidRequest where it cannot be asked.
        """
        check_path(path)
        file = Path(self._where.mount, tenant, path)
        if not file.name.isprintable() or "?" in file.name:
            raise InvalidRequest("the share cannot be asked about a name with '?' or a control character in it")
        if not file.is_file():
            raise NotFound("the file is not on the share any more")
        number = hex(int(self._world.random() * 10**8))
        gateway = file.parent / f"{GATEWAY} {number}"
        comment = f"{DIVISION_SLASH}*{number}*{DIVISION_SLASH}"  # so that no answer comes out of a cache
        command = f"./{file.name}?.eval {IS_ALIGNED}{comment}"
        try:
            gateway.write_text(command, encoding="utf-8")
            with gateway.open(encoding="utf-8", errors="replace") as answer:
                said = answer.read(MOST_GATEWAY_CHARACTERS)
        except OSError:
            raise Unavailable("the mount of the share does not answer") from None
        if said == command:  # an ordinary folder, which kept what was written
            gateway.unlink(missing_ok=True)
            raise InvalidRequest(f"the mount of the tier {self.name!r} is no Hammerspace share: mount it there")
        return said.strip().upper() == "TRUE"


def _path_of(tenant: str, path: str) -> str:
    return f"/{tenant}/{check_path(path)}"


def _rule_prefix(tenant: str, rule: str) -> str:
    return f"nexus rule {tenant} {rule} "  # names of tenants and rules have no spaces


def _told(task: Task) -> str:
    return f"the task of the Anvil is {task.status}" + (f": {task.message}" if task.message else "")
