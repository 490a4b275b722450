"""What must be its owner's alone, and on disk: one check of a file's mode, and folders synced."""

import os
from pathlib import Path

from nexus.errors import ConfigError

OTHERS = 0o077  # what a group and everybody else may do with it


def require_private(path: Path) -> None:
    """Raises ConfigError for a file or folder that other users of this machine may use, and OSError for none."""
    if path.stat().st_mode & OTHERS:
        mode = "700" if path.is_dir() else "600"
        raise ConfigError(f"other users of this machine may read {path}: chmod {mode} {path}")


def sync_folder(folder: Path) -> None:
    """Put on disk which files a folder has: who made, renamed or removed one must do so. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
