"""A coordinator's snapshot as a file to keep: all that the voters agreed on, but not who they were."""

import hashlib

from msgpack import packb, unpackb

from cluster.catalog import Catalog, Unreadable
from cluster.raft import Members, Snapshot
from nexus.errors import InvalidRequest

_MAGIC = b"nexus-coordinator-1\n"


def write(snapshot: Snapshot) -> bytes:
    """What `read` takes."""
    content: bytes = packb((snapshot.index, snapshot.term, snapshot.data))
    return _MAGIC + hashlib.blake2b(content).digest() + content


def read(file: bytes) -> Snapshot:
    """Of no members. Raises InvalidRequest for what is no such file, or not whole, or of another version."""
    digest, content = file[len(_MAGIC) : len(_MAGIC) + 64], file[len(_MAGIC) + 64 :]
    if not file.startswith(_MAGIC):
        raise InvalidRequest("this is no snapshot of a coordinator: `nexus coordinator snapshot FILE` makes one")
    if hashlib.blake2b(content).digest() != digest:
        raise InvalidRequest("this snapshot is damaged or not whole: take another copy of it")
    index, term, data = unpackb(content)
    try:
        Catalog().restore(data)
    except Unreadable as error:
        raise InvalidRequest("another version of Nexus wrote this snapshot: restore it with that one") from error
    return Snapshot(index, term, Members(frozenset()), data)
