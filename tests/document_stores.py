"""The document stores that one suite is asked of: SQLite in memory and on disk, ArangoDB's double, a real server.

The real server is the one of NEXUS_TEST_ARANGO_URL, an administrator's address (`arango://root:…@host:8529/_`): each
test makes a database there, and removes it.
"""

import base64
import functools
import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus.arangodb import Place, create_database
from nexus.registry import open_interactions, open_part
from nexus.stores import arango, sqlite
from nexus.types import Document
from tests import arango_double

SERVER = os.environ.get("NEXUS_TEST_ARANGO_URL", "")
STORES = ("memory", "disk", "arango", *(("arango server",) if SERVER else ()))
MODULES = {"memory": sqlite, "disk": sqlite, "arango": arango, "arango server": arango}


@dataclass(frozen=True)
class Open:
    """Opens a store, as often as one likes: it is the same. `interactions` opens memory's beside it."""

    address: str
    home: Path

    def __call__(self, **options: object) -> Any:
        return open_part("stores", self.address, home=self.home, **options)

    def interactions(self) -> Any:
        return open_interactions(self.address, home=self.home)


_names = (f"test_{number}" for number in itertools.count())


@functools.cache
def the_double() -> arango_double.ArangoDouble:
    """One server for all tests of a process; each has databases of its own."""
    double = arango_double.ArangoDouble()
    double.start()
    return double


@contextmanager
def place(kind: str, home: Path) -> Iterator[Open]:
    """What opens this store, which is gone after."""
    if kind in ("memory", "disk"):
        yield Open("sqlite::memory:" if kind == "memory" else "sqlite:", home)
    elif kind == "arango":
        name = next(_names)
        address = the_double().create(name)
        yield Open(address, home)
        del the_double().databases[name]
    else:
        with database_of_a_server() as address:
            yield Open(address, home)


@contextmanager
def database_of_a_server() -> Iterator[str]:
    admin, name = Place.parse(SERVER), f"nexus_test_{uuid.uuid4().hex[:12]}"
    address = f"arango://{name}:secret@{admin.url.partition('//')[2]}/{name}"
    create_database(SERVER, address)
    yield address
    from arango.client import ArangoClient

    client = ArangoClient(admin.url)
    system: Any = client.db("_system", admin.user, admin.password)
    system.delete_database(name)
    system.delete_user(name)
    client.close()


# What a suite looks at, or spoils, behind a store's back.


def sources(documents: Any) -> dict[str, str]:
    """Where each document came from, by its id."""
    if isinstance(documents, sqlite.SqliteDocuments):
        with documents._reading() as db:
            return dict(db.execute("SELECT document_id, source FROM versions").fetchall())
    return dict(documents._database.aql("FOR v IN versions FILTER v.is_current IN [true, false] RETURN [v.document_id, v.source]"))  # noqa: E501  # fmt: skip


def edges(documents: Any) -> set[tuple[str, str]]:
    """(kind, target) of every edge."""
    if isinstance(documents, sqlite.SqliteDocuments):
        with documents._reading() as db:
            return set(db.execute("SELECT kind, target FROM edges").fetchall())
    with arango_double.scanning("edges"):
        return {(kind, target) for kind, target in documents._database.aql("FOR e IN edges RETURN [e.kind, e.target]")}


def spoil_vector(documents: Any, chunk_id: str) -> None:
    if isinstance(documents, sqlite.SqliteDocuments):
        with documents._transaction() as db:
            db.execute("UPDATE chunks SET vector = zeroblob(256) WHERE chunk_id = ?", (chunk_id,))
    else:
        documents._database.aql("UPDATE @key WITH {vector: @vector} IN chunks", key=chunk_id, vector="AAAA" * 85)


def spoil_kept(documents: Any, document: Document) -> None:
    """Change a byte of what the current version's chunks were cut from."""
    content = documents.kept(document.document_id, document.version)
    spoilt = content[:9] + bytes([content[9] ^ 1]) + content[10:]
    if isinstance(documents, sqlite.SqliteDocuments):
        with documents._transaction() as db:
            db.execute("UPDATE kept SET content = ? WHERE document_id = ?", (spoilt, document.document_id))
    else:
        key, told = f"{document.document_id}-{document.version}", base64.b64encode(spoilt).decode()
        documents._database.aql("UPDATE @key WITH {content: @content} IN kept", key=key, content=told)


def lose_chunk(documents: Any, chunk_id: str) -> None:
    if isinstance(documents, sqlite.SqliteDocuments):
        with documents._transaction() as db:
            db.execute("DELETE FROM chunks WHERE chunk_id = ?", (chunk_id,))
    else:
        documents._database.aql("REMOVE @key IN chunks", key=chunk_id)
