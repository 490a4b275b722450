"""What must be its owner's alone: one check of a file's mode, and one sentence about it."""

from pathlib import Path

from nexus.errors import ConfigError

OTHERS = 0o077  # what a group and everybody else may do with it


def require_private(path: Path) -> None:
    """Raises ConfigError for a file or folder that other users of this machine may use, and OSError for none."""
    if path.stat().st_mode & OTHERS:
        mode = "700" if path.is_dir() else "600"
        raise ConfigError(f"other users of this machine may read {path}: chmod {mode} {path}")
