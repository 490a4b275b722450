"""The coordinator beside what it could be: committed puts, over bare fsyncs on the same disk and over etcd, in one run.

    python -m tests.bench.coordinator                 puts, watches, and 100 kills of the leader
    python -m tests.bench.coordinator --kills 0       without the kills, which take minutes

etcd is Debian's `etcd-server`, on loopback, asked over gRPC. "64 clients" are 64 tasks that put one after another
and share what a process shares: our client, or a channel to etcd. Rounds alternate between the two.
A kill is SIGKILL to the leader's process under the load of eight tasks; what is timed is how long after it the next
write was acknowledged.
"""

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from statistics import median

import grpc
import httpx
import ray

from actors.coordinator import Client, Placement, connect, find_voter, start
from cluster.voter import Pace
from nexus.errors import Unavailable
from tests.bench.harness import percentile, print_result, print_table
from tests.running import free_port, until

ROUNDS = 3
SECONDS = 4.0  # of one round
VALUE = b"v" * 100
PACE = Pace(tick_seconds=0.015)  # an election begins after 150 to 300 ms without a leader
WATCHED = 200
Put = Callable[[str, bytes], Awaitable[object]]


def fsyncs_per_second(folder: Path) -> float:
    """Append as much as a put is, and make it durable, again and again."""
    began, count = time.perf_counter(), 0
    with (folder / "bare").open("wb", buffering=0) as file:
        while time.perf_counter() - began < SECONDS / 2:
            file.write(bytes(200))
            os.fdatasync(file.fileno())
            count += 1
    return count / (time.perf_counter() - began)


async def puts_per_second(put: Put, clients: int) -> float:
    count, ends = 0, time.perf_counter() + SECONDS

    async def work(number: int) -> None:
        nonlocal count
        while time.perf_counter() < ends:
            await put(f"bench/{number}", VALUE)
            count += 1

    began = time.perf_counter()
    await asyncio.gather(*map(work, range(clients)))
    return count / (time.perf_counter() - began)


@contextmanager
def etcd(members: int, folder: Path) -> Iterator[str]:
    """The client address of the first of so many members."""
    ports = [(free_port(), free_port()) for _ in range(members)]
    cluster = ",".join(f"m{i}=http://127.0.0.1:{peer}" for i, (_, peer) in enumerate(ports))
    processes = []
    try:
        for i, (client, peer) in enumerate(ports):
            command = [
                "etcd",
                "--name",
                f"m{i}",
                "--data-dir",
                str(folder / f"etcd-{members}-{i}"),
                "--initial-cluster",
            ]
            command += [cluster, "--initial-cluster-state", "new", "--logger", "zap", "--log-outputs", "/dev/null"]
            for role, port in (("client", client), ("peer", peer)):
                kind = "initial-advertise-peer" if role == "peer" else "advertise-client"
                command += [f"--listen-{role}-urls", f"http://127.0.0.1:{port}"]
                command += [f"--{kind}-urls", f"http://127.0.0.1:{port}"]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        address = f"http://127.0.0.1:{ports[0][0]}"
        until(60, lambda: httpx.get(f"{address}/health").json()["health"] == "true")
        yield address
    finally:
        for process in processes:
            process.terminate()
            process.wait(30)


@asynccontextmanager
async def etcd_client(address: str) -> AsyncIterator[Put]:
    """One gRPC channel; a PutRequest is its two fields, each shorter than 128 bytes, so it is written by hand."""
    async with grpc.aio.insecure_channel(address.removeprefix("http://")) as channel:
        call = channel.unary_unary("/etcdserverpb.KV/Put")

        async def put(key: str, value: bytes) -> None:
            name = key.encode()
            await call(b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([len(value)]) + value)

        yield put


async def compare(voters: int, nexus: Client, folder: Path) -> dict[tuple[int, str], float]:
    """Median puts per second of each, with one and with 64 clients."""
    rates: dict[tuple[int, str], list[float]] = {}
    with etcd(voters, folder) as address:
        async with etcd_client(address) as put_to_etcd:
            for _ in range(ROUNDS):
                for clients in (1, 64):
                    for name, put in (("nexus", nexus.put), ("etcd", put_to_etcd)):
                        rates.setdefault((clients, name), []).append(await puts_per_second(put, clients))
    return {key: median(values) for key, values in rates.items()}


async def watch_delays(client: Client) -> list[float]:
    """Milliseconds from a put's acknowledgement to the watcher's event, negative where it came first."""
    seen: dict[str, float] = {}
    start_at = await client.put("watched/start", b"")

    async def look() -> None:
        async for event in client.watch("watched/", start_at + 1):
            seen[event.key] = time.perf_counter()
            if len(seen) == WATCHED:
                return

    watcher = asyncio.create_task(look())
    put = {}
    for number in range(WATCHED):
        await client.put(f"watched/{number}", VALUE)
        put[f"watched/{number}"] = time.perf_counter()
    await watcher
    return [(seen[key] - put[key]) * 1000 for key in put]


async def kill_leaders(client: Client, kills: int) -> list[float]:
    """Milliseconds from each kill to the next write acknowledged. Asserts that nothing was lost or done twice."""
    acknowledged: list[float] = []
    written: list[str] = []
    increments = [0] * 4
    over = asyncio.Event()

    async def write(number: int) -> None:
        while not over.is_set():
            key = f"kept/{number}/{len(written)}"
            with suppress(Unavailable):
                await client.put(key, b"")
                acknowledged.append(time.perf_counter())
                written.append(key)

    async def count(number: int) -> None:
        """Nobody else sets this key, so each compare must succeed: one applied twice would fail the next."""
        revision = 0
        while not over.is_set():
            answer = await client.compare_and_set(f"count/{number}", revision, str(increments[number] + 1).encode())
            assert answer is not None, "an increment was applied twice, or one was lost"
            revision, increments[number] = answer, increments[number] + 1
            acknowledged.append(time.perf_counter())

    tasks = [asyncio.create_task(write(n)) for n in range(4)] + [asyncio.create_task(count(n)) for n in range(4)]
    took = []
    for _ in range(kills):
        leader = await settled(client)
        handle = await asyncio.to_thread(find_voter, leader)
        pid = await handle.__ray_call__.remote(lambda self: os.getpid())
        killed = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        while not acknowledged or acknowledged[-1] < killed + 0.002:  # what was on its way does not count
            await asyncio.sleep(0.002)
        took.append((next(at for at in acknowledged if at >= killed + 0.002) - killed) * 1000)
    over.set()
    await asyncio.gather(*tasks)
    there = {key for key, _, _ in await client.range("kept/")}
    assert there.issuperset(written), f"{len(set(written) - there)} acknowledged writes are lost"
    for number, value in enumerate(increments):
        assert await client.get(f"count/{number}") is not None
        held = (await client.get(f"count/{number}"))[0]
        assert int(held) == value, f"counter {number} is {held!r}, and {value} were acknowledged"
    print(f"{kills} kills, {len(written) + sum(increments)} writes acknowledged, none lost, none twice")
    return took


async def settled(client: Client) -> int:
    """The leader, once all three are level with it."""
    while True:
        statuses = await client.status()
        leaders = [one for one in statuses if one.progress]
        if len(statuses) == 3 and len(leaders) == 1:
            progress = leaders[0].progress
            if all(one.state == "replicate" for one in progress.values()):
                return leaders[0].id
        await asyncio.sleep(0.05)


async def measure(folder: Path, kills: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    bare = fsyncs_per_second(folder)
    rows: list[list[object]] = []
    for word, voters in (("one", 1), ("three", 3)):
        await start({id: Placement() for id in range(1, voters + 1)}, folder / word, PACE)
        client = await connect()
        await client.put("bench/first", b"")
        rates = await compare(voters, client, folder)
        for clients in (1, 64):
            ours, theirs = rates[clients, "nexus"], rates[clients, "etcd"]
            figures[f"puts_over_fsync_{clients}_{word}"] = ours / bare
            figures[f"puts_over_etcd_{clients}_{word}"] = ours / theirs
            rows.append([word, clients, bare, theirs, ours, ours / theirs])
        delays = await watch_delays(client)
        figures |= {f"watch_ms_p50_{word}": median(delays), f"watch_ms_p99_{word}": percentile(delays, 0.99)}
        if voters == 3 and kills:
            took = await kill_leaders(client, kills)
            figures |= {"failover_ms_p50": median(took), "failover_ms_p99": percentile(took, 0.99)}
        end_voters(voters)
    print_table(["voters", "clients", "fsyncs/s", "etcd puts/s", "nexus puts/s", "ratio"], rows)
    return figures


def end_voters(voters: int) -> None:
    for id in range(1, voters + 1):
        if handle := find_voter(id):
            ray.kill(handle)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of the leader")
    kills = parser.parse_args(arguments).kills
    if shutil.which("etcd") is None:
        parser.exit(2, "etcd is not here: it is Debian's package etcd-server\n")
    with tempfile.TemporaryDirectory(prefix="nxb") as name:
        ray.init(namespace="nexus", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        figures = asyncio.run(measure(Path(name), kills))
        ray.shutdown()
    print_result("coordinator", figures, ("ray",))


if __name__ == "__main__":
    main()
