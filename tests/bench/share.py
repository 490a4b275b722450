"""Shared blocks: seconds per GiB sealed, opened, stored and wrapped anew, beside what no such thing can do without.

    python -m tests.bench.share             blocks of 64 MiB, then three stewards
    python -m tests.bench.share --mib 512
    python -m tests.bench.share --only-store        nothing that needs Ray
    python -m tests.bench.share --bits              flip every bit of a small block instead, and count what happens
    python -m tests.bench.share --seeds 200         so many worlds of random faults instead

In memory: AES-256-GCM and SHA-256 alone over pieces of 1 MiB, which are the least that a sealed and signed block costs,
then sealing and opening by nexus/envelope.py. On disk: a bare file written and synced, then the store of blocks
(nexus/blocks.py). Rounds alternate; medians. One thread. The ratios over the
least are of CPU seconds, which others on the machine disturb less.

Three stewards are Ray actors on nodes of this process's own cluster, two copies each: a block shared, read where a copy
is, and read where one is borrowed. Then 200 blocks are shared while a steward is killed (SIGKILL), and a node is lost:
how many of the acknowledged are not as they were, and how long it took until each had two copies again.
"""

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import argparse
import io
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nexus.blocks import BlockStore
from nexus.envelope import BlockId, BlockKey, Header, Sealer, read_envelope, read_segments, unwrap, verify
from nexus.keyring import Keyring
from tests.bench import stewards

ROUNDS = 5
MIB = 2**20
TENANT = "bench"
SMALL = 200  # blocks of 1 KiB, for what a block costs whatever is in it


class Bench:
    """One machine's keys and store, and what was sealed last."""

    def __init__(self, home: Path, pieces: Sequence[bytes]) -> None:
        self.pieces, self.home = pieces, home
        self.keyring = Keyring(home, "bench")
        self.keyring.install(self.keyring.draft_key(TENANT))
        self.store = BlockStore(home / "blocks", self.keyring)
        self.version = self.sealings = 0
        self.sealed = b""

    def encrypt_alone(self) -> None:
        cipher = AESGCM(bytes(32))
        for number, piece in enumerate(self.pieces):
            cipher.encrypt(number.to_bytes(12, "big"), piece, None)

    def hash_alone(self) -> None:
        state = sha256()
        for piece in self.pieces:
            state.update(piece)

    def seal(self) -> None:
        self.sealings += 1
        key = BlockKey(secrets.token_bytes(32))
        header = Header(
            TENANT, "sent", 1, "bench", self.keyring.fingerprint, 0, self.sealings, "data", 0.0, {},
            secrets.token_hex(7), key.commitment,
        )  # fmt: skip
        key_id, secret = self.keyring.active_key(TENANT)
        sealer = Sealer(
            header, key, lambda prelude: key.wrap(secret, key_id, prelude, secrets.token_bytes), self.keyring.sign
        )
        out = io.BytesIO()
        for piece in self.pieces:
            out.writelines(sealer.feed(piece))
        out.writelines(sealer.finish())
        self.sealed = out.getvalue()

    def open(self) -> None:
        file = io.BytesIO(self.sealed)
        parts = read_envelope(file)
        verify(file, parts, lambda header: self.keyring.verify_key(header.writer, header.signer))
        key = unwrap(parts, self.keyring.opening_key(TENANT, parts.wrap.key_id))
        assert sum(map(len, read_segments(file, parts, key))) == sum(map(len, self.pieces))

    def write_bare(self) -> None:
        path = self.home / "bare"
        with path.open("wb") as file:
            file.writelines(self.pieces)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()

    def write(self) -> None:
        self.version += 1
        with self.store.write(BlockId(TENANT, "b", self.version)) as draft:
            for piece in self.pieces:
                draft.feed(piece)
            draft.commit()

    def receive(self) -> None:
        with self.store.receive(BlockId(TENANT, "sent", 1)) as draft:
            for at in range(0, len(self.sealed), MIB):
                draft.feed(self.sealed[at : at + MIB])
            draft.commit()

    def read(self) -> None:
        with self.store.open(BlockId(TENANT, "b", self.version)) as reading:
            assert sum(map(len, reading)) == sum(map(len, self.pieces))

    def rewrap(self) -> None:
        for stored in list(self.store.blocks()):
            if stored.header.block != BlockId(TENANT, "b", self.version):
                self.store.delete(stored.header.block)
        self.keyring.install(self.keyring.draft_key(TENANT))
        assert self.store.rewrap(TENANT).count == 1

    def measure(self) -> dict[str, tuple[float, float]]:
        """(seconds, CPU seconds) per GiB of each step."""
        steps: dict[str, Callable[[], None]] = {
            "AES-256-GCM alone": self.encrypt_alone, "SHA-256 alone": self.hash_alone, "seal": self.seal,
            "open": self.open, "bare file, synced": self.write_bare, "write": self.write, "read": self.read,
            "receive": self.receive, "rewrap": self.rewrap,
        }  # fmt: skip
        clocks: dict[str, list[harness.Clock]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                with harness.Clock() as clock:
                    step()
                clocks[name].append(clock)
        gib = sum(map(len, self.pieces)) / 2**30
        return {
            name: (harness.median(one.wall for one in taken) / gib, harness.median(one.cpu for one in taken) / gib)
            for name, taken in clocks.items()
        }

    def measure_small(self) -> Mapping[str, float]:
        """Milliseconds per block of 1 KiB, written and read."""
        with harness.Clock() as writing:
            for number in range(SMALL):
                with self.store.write(BlockId(TENANT, f"s{number}", 1)) as draft:
                    draft.feed(bytes(1024))
                    draft.commit()
        with harness.Clock() as reading:
            for number in range(SMALL):
                with self.store.open(BlockId(TENANT, f"s{number}", 1)) as block:
                    assert sum(map(len, block)) == 1024
        return {"write_small_ms": writing.wall / SMALL * 1000, "read_small_ms": reading.wall / SMALL * 1000}


def measure_blocks(mib: int) -> dict[str, float]:
    """Print the table; the figures."""
    piece = os.urandom(MIB)
    with tempfile.TemporaryDirectory(prefix="nxb") as name:
        bench = Bench(Path(name), [piece] * mib)
        per_gib, small = bench.measure(), bench.measure_small()
        bench.store.close()
    harness.print_table(["step", "s per GiB", "CPU s per GiB"], [[name, *both] for name, both in per_gib.items()])
    wall, cpu = ({name: both[which] for name, both in per_gib.items()} for which in (0, 1))
    least = cpu["AES-256-GCM alone"] + cpu["SHA-256 alone"]
    steps = ("seal", "open", "write", "read", "receive", "rewrap")
    return {
        **{f"{step}_seconds_per_gib": wall[step] for step in steps},
        **{f"{step}_cpu_seconds_per_gib": cpu[step] for step in steps},
        "seal_over_least": cpu["seal"] / least,
        "open_over_least": cpu["open"] / least,
        "write_over_bare": wall["write"] / wall["bare file, synced"],
        **small,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64, help="of a block")
    parser.add_argument("--only-store", action="store_true", help="nothing that needs Ray")
    parser.add_argument("--bits", action="store_true", help="flip every bit of a small block instead")
    parser.add_argument("--seeds", type=int, default=0, help="so many worlds of random faults instead")
    asked = parser.parse_args(arguments)
    if asked.bits or asked.seeds:
        figures = stewards.flip_every_bit() if asked.bits else stewards.simulate(range(asked.seeds))
        harness.print_table(["what", "count"], [list(one) for one in figures.items()])
    else:
        figures = measure_blocks(asked.mib)
        if not asked.only_store:
            shared = stewards.measure_sharing(asked.mib)
            harness.print_table(["three stewards, two copies", "figure"], [list(one) for one in shared.items()])
            figures |= shared
    harness.print_result("share", figures, ("cryptography", "ray"))


if __name__ == "__main__":
    main()
