"""`nexus backup` and `nexus restore`: a home in one file, and a home made of such a file again."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster import backup as snapshots
from cluster import bootstrap
from deployments.auditing import recorded
from deployments.client import Client
from deployments.upkeep import opened_memory, opened_stores
from nexus import archive
from nexus.archive import Contents
from nexus.config import Config, load_config
from nexus.errors import AlreadyRunning, ConfigError, Conflict, InvalidRequest, Unprocessable
from nexus.hades import Hades
from nexus.jobs import examine
from nexus.ports import KeptElsewhere
from nexus.private_files import sync_folder
from nexus.registry import open_interactions, open_part

SETTINGS = "nexus.yaml"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore made: from which archive, how many chunks can be found, and where what was there before is."""

    contents: Contents
    chunks: int
    aside: Path | None


def back_up(config: Config, file: Path) -> Contents:
    """Write all stores, as they are at one moment, into one file; what is in it. Raises NexusError."""
    home = Path(config.home)
    if not home.is_dir():
        raise InvalidRequest(f"there is nothing in {home}: no Nexus was started there")
    bootstrap.prepare_home(home)
    # Under the lock nothing is started or stopped meanwhile: the coordinator's disk has one reader.
    with _opened_elsewhere(config) as elsewhere, bootstrap.lock_home(home), recorded(config, "nexus backup", str(file)):
        return archive.pack(home, file, lambda: _snapshot(config), elsewhere)


def bring_back(file: Path, home: Path, replace: bool, tell: Callable[[str], None]) -> Restored:
    """Until the new home is whole and checked, the old one stays as it is. Raises NexusError."""
    if not file.is_file():
        raise InvalidRequest(f"there is no archive {file}")
    home.parent.mkdir(parents=True, exist_ok=True)
    draft = home.with_name(f"{home.name}.restoring")
    with _alone_in(home.parent):
        _require_place(home, replace)
        shutil.rmtree(draft, ignore_errors=True)  # of a restore that was cut short
        contents = archive.unpack(file, draft)
        tell(f"unpacked {len(contents.members)} files, all whole; making the index of vectors again …")
        if not replace and (home / SETTINGS).is_file():
            shutil.copy(home / SETTINGS, draft / SETTINGS)  # which was put there for this machine
        config = _settings_of(draft)
        _load_elsewhere(config)
        _begin_coordinator(config)
        chunks = _make_index(config, replace)
        with recorded(config, "nexus restore", str(file)):
            return Restored(contents, chunks, _put_in_place(draft, home))


def _settings_of(draft: Path) -> Config:
    """The settings that the new home will have, for where it is now."""
    settings = draft / SETTINGS
    return load_config(settings if settings.is_file() else None).model_copy(update={"home": draft})


@contextmanager
def _opened_elsewhere(config: Config) -> Iterator[dict[str, KeptElsewhere]]:
    """The stores whose rows are not in the home, by the names of their files. Raises ConfigError for one without."""
    address = config.stores.documents
    with ExitStack() as stack:
        opened: dict[str, KeptElsewhere] = {}
        if address != "sqlite:":
            for name, open_it in (
                ("documents.jsonl", partial(open_part, "stores")),
                ("memory.jsonl", open_interactions),
            ):
                store = stack.enter_context(closing(open_it(address, home=Path(config.home))))
                if not isinstance(store, KeptElsewhere):
                    raise ConfigError(
                        f"the documents are in {address.partition(':')[0]}, outside of the home, where an archive does"
                        " not reach: back that store up with its own tools, and the rest of the home as files"
                    )
                opened[name] = store
        yield opened


def _load_elsewhere(config: Config) -> None:
    """What the archive holds of stores outside of the home. Raises ConfigError where the settings name other stores."""
    folder = Path(config.home) / archive.ELSEWHERE
    with _opened_elsewhere(config) as elsewhere:
        there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        if there != set(elsewhere):
            kept = "outside of the home" if there else "in the home"
            raise ConfigError(
                f"the documents of this archive were kept {kept}, and stores.documents is"
                f" {config.stores.documents.partition(':')[0]}: set it as it was, or --replace by what the archive has"
            )
        for name, store in elsewhere.items():
            with (folder / name).open("rb") as lines:
                store.restore(lines)
    shutil.rmtree(folder, ignore_errors=True)


def _snapshot(config: Config) -> bytes | None:
    """What the machines agree on: asked of the coordinator where Nexus runs, else read from the one voter's disk."""
    home = Path(config.home)
    if bootstrap.is_running(home):
        with Client(config) as nexus:
            return nexus.download("POST", "/coordinator/snapshot")
    from actors import coordinator  # with all of Ray: not at every start of the command line

    held = coordinator.read_alone(home / coordinator.FOLDER)
    return None if held is None else snapshots.write(held)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise AlreadyRunning(f"another `nexus restore` works in {folder}; wait for it") from None
    finally:
        os.close(descriptor)


def _require_place(home: Path, replace: bool) -> None:
    if not home.exists():
        return
    if bootstrap.is_running(home):
        raise AlreadyRunning("Nexus runs: `nexus down` first, on every machine")
    if not replace and archive.has_state(home, besides=(SETTINGS,)):
        raise Conflict(f"there is a Nexus in {home} already: --replace moves it aside, or set NEXUS_HOME to another")
    if home.is_mount():
        raise ConfigError(f"{home} is a mount point, which cannot be moved aside: set NEXUS_HOME to a folder in it")


def _begin_coordinator(config: Config) -> None:
    from actors import coordinator  # with all of Ray

    file = Path(config.home) / archive.SNAPSHOT
    if file.exists():
        held = snapshots.read(file.read_bytes())
        coordinator.restore(held, Path(config.home) / coordinator.FOLDER, config.voters)
        file.unlink()


def _make_index(config: Config, replace: bool) -> int:
    """Write every vector into the vector store; how many chunks can be found then. Raises Unprocessable, Conflict."""
    with opened_stores(config) as (hades, jobs), opened_memory(config) as memory:
        if not replace:
            _require_no_others(hades)
        jobs.revive(jobs.holders())  # whoever held them works in no home of now
        faults = examine(hades, jobs, repair=True, memory=memory)
        if faults:
            named = "; ".join(f"{len(fault.ids)} {fault.kind}" for fault in faults)
            raise Unprocessable(f"the archive is whole, what it holds is not: {named}. It is laid out in {config.home}")
        indexes = {collection.index for collection in hades.documents.collections()}
        return sum(len(hades.documents.chunk_ids(index, published=True)) for index in indexes)


def _require_no_others(hades: Hades) -> None:
    """Raises Conflict where a vector server holds what this archive does not: to be repaired is to lose that."""
    others = 0
    for collection in hades.documents.collections():
        own, beside = hades.written(collection.name)
        for live in (own, *beside):
            known = hades.documents.chunk_ids(live.index, published=False)
            others += len(hades.vectors.chunk_ids(live.index) - known)
    if others:
        raise Conflict(
            f"the vector store has {others} rows that this archive does not know, of a later Nexus or of another one:"
            " name another database in stores.vectors, or --replace, which removes them"
        )


def _put_in_place(draft: Path, home: Path) -> Path | None:
    """The new home by one rename; where the old one was moved to."""
    aside = None
    if home.exists():
        if archive.has_state(home, besides=()):
            aside = archive.beside(home)
            home.rename(aside)
        else:
            shutil.rmtree(home)
    draft.rename(home)
    sync_folder(home.parent)
    return aside
