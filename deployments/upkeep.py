"""`nexus fsck` and `nexus vacuum`: asked of the running service, or done here when none runs."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cluster import bootstrap
from cluster.catalog import Catalog
from deployments.auditing import recorded
from deployments.client import Client
from nexus.config import Config, load_config
from nexus.coordination import Alone
from nexus.errors import Conflict
from nexus.hades import Hades
from nexus.jobs import Jobs, examine
from nexus.ports import InteractionStore
from nexus.registry import open_interactions, open_part


def fsck(repair: bool) -> dict[str, Any]:
    """What `POST /rag/fsck` answers."""
    config = load_config()
    if bootstrap.is_running(Path(config.home)):
        with Client() as nexus:
            answer: dict[str, Any] = nexus.call("POST", "/rag/fsck", params={"repair": repair}, timeout=None)[1]
            return answer
    with opened_stores(config) as (hades, jobs), opened_memory(config) as memory:
        from deployments.shapes import show_faults  # with all of FastAPI: not at every start of the command line

        with recorded(config, "nexus fsck --repair") if repair else nullcontext():
            return show_faults(examine(hades, jobs, repair, memory))


def vacuum(keep_seconds: float) -> dict[str, Any]:
    """What `POST /rag/vacuum` answers."""
    config = load_config()
    if bootstrap.is_running(Path(config.home)):
        with Client() as nexus:
            query = {"keep_seconds": keep_seconds}
            answer: dict[str, Any] = nexus.call("POST", "/rag/vacuum", params=query, timeout=None)[1]
            return answer
    with opened_stores(config) as (hades, _), recorded(config, "nexus vacuum"):
        from deployments.shapes import show_removed  # with all of FastAPI: not at every start of the command line

        return show_removed(hades.vacuum(keep_seconds, keep_staged_seconds=0))


@contextmanager
def opened_stores(config: Config) -> Iterator[tuple[Hades, Jobs]]:
    """The stores, opened here: nobody else has them open. No model is needed to compare rows.

    Which index and which embedder a collection has, the coordinator's disk says: it may not be the configured one.
    """
    home = Path(config.home)
    bootstrap.prepare_home(home)
    with bootstrap.lock_home(home):
        embedder = open_part("models", config.models.embedder, threads=1)
        documents = open_part("stores", config.stores.documents, home=home)
        vectors = open_part("stores", config.stores.vectors, home=home)
        jobs = Jobs(home)
        try:
            agreed = _agreed(home)
            yield Hades(documents, vectors, embedder.fingerprint, embedder.dimension, agreed), jobs
        finally:
            for store in (jobs, vectors, documents):
                store.close()


def _agreed(home: Path) -> Alone:
    """The live indexes that the only voter's disk names; of several voters, one disk does not tell."""
    from actors import coordination, coordinator  # with all of Ray: not at every start of the command line

    agreed, catalog = Alone(), Catalog()
    try:
        held = coordinator.read_alone(home / coordinator.FOLDER)
    except Conflict:
        held = None
    if held is not None:
        catalog.restore(held.data)
        for key, value, _ in catalog.range(coordination.COLLECTIONS):
            agreed.point(key.removeprefix(coordination.COLLECTIONS), coordination.read_live(value))
    return agreed


def opened_memory(config: Config) -> "closing[InteractionStore]":
    """What memory keeps, opened here."""
    return closing(open_interactions(config.stores.documents, home=Path(config.home)))
