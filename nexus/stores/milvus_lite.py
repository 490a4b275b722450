"""Milvus Lite: the vector store of one machine, a small server over one folder.

`milvus-lite:` opens the folder in this process; only one process at a time can. In a cluster one
actor is that process (`serve`), and the others reach it as `milvus-lite://127.0.0.1:PORT`.
"""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from nexus.errors import ConfigError, Unavailable
from nexus.stores.milvus import MilvusVectors, Target

FOLDER = "vectors"
WORKERS = 8


def open(address: str, *, home: Path | None = None) -> MilvusVectors:
    """`milvus-lite:` needs a home; `milvus-lite://HOST:PORT` needs a server there."""
    parts = urlsplit(address)
    if parts.hostname:
        return MilvusVectors(Target(f"http://{parts.hostname}:{parts.port}", lite=True))
    if home is None:
        raise ConfigError("'milvus-lite:' needs a home to keep its folder in")
    port, stop = serve(home, 0)
    return MilvusVectors(Target(f"http://127.0.0.1:{port}", lite=True), on_close=stop)


def serve(home: Path, port: int) -> tuple[int, Callable[[], None]]:
    """Start the server on a loopback port (0: any free one); returns the port and how to stop it."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread
    from milvus_lite.exceptions import DataDirLockedError

    folder = home / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    try:
        server, database, bound = start_server_in_thread(str(folder), "127.0.0.1", port, WORKERS)
    except DataDirLockedError as error:
        raise Unavailable("the vector store's folder is still in use by another process") from error
    for name in database.list_collections():
        database.get_collection(name).load()  # a reopened collection answers no search until it is loaded

    def stop() -> None:
        server.stop(grace=2).wait()
        database.close()

    return bound, stop
