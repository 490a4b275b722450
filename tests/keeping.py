"""A machine's work with its blocks, for tests that kill it in the middle: every order may be given again."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexus.blocks import BlockStore
from nexus.envelope import BlockId
from nexus.keyring import Keyring
from tests.sealing import SECRET, TENANT

SHARED, VERSIONS, KEYS = 3, 2, 3  # data ids, versions of each, and keys of the tenant when all is done


@contextmanager
def opened(home: Path) -> Iterator[BlockStore]:
    """The machine as it starts: it takes the ring that the coordinator has before it opens its store."""
    keyring = Keyring(home, "sark", SECRET)
    agree(home, keyring)
    for record in sorted((home / "others").glob("*")):
        keyring.meet(record.read_bytes())
    store = BlockStore(home / "share" / "blocks", keyring)
    try:
        yield store
    finally:
        store.close()


def agree(home: Path, keyring: Keyring, draft: bytes | None = None) -> None:
    """Have the coordinator, a file here, take a draft, and install what it has."""
    place = home / "coordinator"
    if draft is None and not place.exists():
        draft = keyring.draft_key(TENANT)
    if draft is not None:
        part = home / "coordinator.part"
        part.write_bytes(draft)
        part.replace(place)
    keyring.install(place.read_bytes())


def content(data_id: str, version: int) -> bytes:
    return f"{data_id} version {version} ".encode() * 1000


def note(home: Path, **what: object) -> None:
    """Acknowledge."""
    with (home / "acknowledged").open("a") as log:
        log.write(json.dumps(what) + "\n")


def noted(home: Path) -> list[dict[str, Any]]:
    log = home / "acknowledged"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def share(home: Path, store: BlockStore, data_id: str) -> None:
    """Versions until there are enough that are acknowledged; one of a number that a kill took is not given again."""
    mine = [one["version"] for one in noted(home) if one.get("shared") == data_id]
    while len(mine) < VERSIONS:
        version = max([0, *mine, *store.versions(TENANT, data_id)]) + 1
        with store.write(BlockId(TENANT, data_id, version)) as draft:
            draft.feed(content(data_id, version))
            stored = draft.commit()
        note(home, shared=data_id, version=version, digest=stored.digest)
        mine.append(version)
    for older in store.versions(TENANT, data_id):
        if older < max(mine):
            store.delete(BlockId(TENANT, data_id, older))


def replicate(home: Path, store: BlockStore) -> None:
    """Take what a peer sends: files named by data id."""
    taken = [one.get("taken") for one in noted(home)]
    for sent in sorted(file for file in (home / "sent").iterdir() if file.name not in taken):
        with store.receive(BlockId(TENANT, sent.name, 1)) as draft:
            draft.feed(sent.read_bytes())
            stored = draft.commit()
        note(home, taken=sent.name, digest=stored.digest)


def rotate(home: Path, store: BlockStore) -> None:
    """New keys until there have been enough, with none but the last left."""
    keyring = store.keyring
    while True:
        store.rewrap(TENANT)
        for key in keyring.ring(TENANT).keys:
            if key.state == "readable":
                agree(home, keyring, keyring.draft_retirement(TENANT, key.key_id))
            elif key.state == "retired" and key.is_held:
                store.retire_key(TENANT, key.key_id)
        left = [key for key in keyring.ring(TENANT).keys if key.state == "readable" or key.is_held]
        if len(keyring.ring(TENANT).keys) >= KEYS and len(left) == 1:
            return
        if len(left) == 1:
            agree(home, keyring, keyring.draft_key(TENANT))


def work(home: Path, environment: dict[str, str]) -> None:
    """All of it, in this process."""
    os.environ.update(environment)
    with opened(home) as store:
        replicate(home, store)
        for number in range(SHARED):
            share(home, store, f"d{number}")
        rotate(home, store)
