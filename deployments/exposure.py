"""What of an installation others could reach or read: its files, ports, versions, and who Ray lets in."""

import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from cluster import bootstrap
from cluster.bootstrap import Instance
from nexus.config import Config
from nexus.errors import ConfigError
from nexus.private_files import require_private
from nexus.versions import FLOORS, check_versions

SECRETS = ("*-token", "*-key", "access.db*", "memory.db*", "*secret*", "*.pem", "*.key")  # in the home
WIDE_BY_RAY = ("haproxy", "ray::ServeRepl")  # these bind every interface whatever they are told: docs/operate.md
ASK_SECONDS = 5.0


def versions(config: Config) -> str:
    """Raises ConfigError for a part with a known hole."""
    check_versions()
    return f"{', '.join(FLOORS)}: none below its floor"


def files(config: Config) -> str:
    """Raises ConfigError for a secret that other users of this machine could read, or a home they could enter."""
    home = Path(config.home)
    secrets = sorted({file for pattern in SECRETS for file in home.glob(pattern) if file.is_file()})
    for file in (home, *secrets):
        if file.exists():
            require_private(file)
    return f"the home and {len(secrets)} secrets in it are their owner's alone"


def mode(config: Config) -> str:
    """Raises ConfigError where keys are accepted that stand in the settings."""
    access = config.access.mode
    if config.access.development_keys:
        raise ConfigError(
            f"{len(config.access.development_keys)} development keys are accepted as they stand in the settings: make"
            " real ones with `nexus key create`, and take access.development_keys out"
        )
    return f"{access}, no development keys"


def ray(config: Config) -> str:
    """Raises ConfigError where Ray lets in who has no token, or its dashboard is not on loopback."""
    instance = _running(config)
    if instance is None:
        return "not running; it will ask for the token"
    require_private(Path(config.home) / "ray-token")
    address = urlsplit(instance.dashboard)
    if address.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(f"Ray's dashboard listens on {address.hostname}: it must be on loopback")
    if (status := _status_without_token(instance)) not in (401, 403):
        raise ConfigError(f"Ray's dashboard answers {status} to who has no token: stop Nexus with `nexus down`")
    return f"asks for its token; its dashboard is on loopback ({address.port})"


def _status_without_token(instance: Instance) -> int:
    try:
        with urllib.request.urlopen(f"{instance.dashboard.rstrip('/')}/api/jobs/", timeout=ASK_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError as error:
        raise ConfigError(f"Ray's dashboard does not answer: {error}") from None


def listening(config: Config) -> str:
    """Raises ConfigError for a port that other machines reach and that is not meant to be."""
    instance = _running(config)
    if instance is None:
        return "not running"
    wide = [one for one in ports_of(bootstrap.processes_of(instance)) if not _is_loopback(one[1])]
    unexpected = [
        f"{name} on {host}:{port}"
        for name, host, port in wide
        if not name.startswith(WIDE_BY_RAY) and not (config.nodes or port == config.http.port)
    ]
    if unexpected:
        raise ConfigError(f"other machines reach {', '.join(unexpected)}: stop Nexus with `nexus down`")
    ports = ", ".join(str(port) for _, _, port in wide)
    return f"on loopback but {ports}, which the firewall has to close" if ports else "all on loopback"


def ports_of(processes: Iterable[psutil.Process]) -> list[tuple[str, str, int]]:
    """(process name, address, port) of everything that listens for TCP, by port."""
    found = set()
    for process in processes:
        try:
            listening = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            found |= {(process.name(), str(one.laddr.ip), int(one.laddr.port)) for one in listening}
        except psutil.Error:  # it has ended, or is somebody else's
            continue
    return sorted(found, key=lambda one: (one[2], one))


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "::ffff:127.0.0.1")


def _running(config: Config) -> Instance | None:
    instance = bootstrap.find_instance(Path(config.home))
    return instance if instance and bootstrap.processes_of(instance) else None
