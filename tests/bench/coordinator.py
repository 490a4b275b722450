"""The coordinator beside what it could be: committed puts, over bare fsyncs on the same disk and over etcd, in one run.

    python -m tests.bench.coordinator                 puts, watches, 100 kills of the leader, 100,000 keys
    python -m tests.bench.coordinator --kills 0       without the kills, which take minutes
    python -m tests.bench.coordinator --keys 0        without the many keys
    python -m tests.bench.coordinator --only-keys     nothing else; needs no etcd

etcd is Debian's `etcd-server`, on loopback, asked over gRPC. "64 clients" are 64 tasks that put one after another
and share what a process shares: our client, or a channel to etcd. Rounds alternate between the two.
A kill is SIGKILL to the leader's process under the load of eight tasks; what is timed is how long after it the next
write was acknowledged.
The many keys are put through one client into three voters; then come a snapshot of them, a follower killed and
restarted by Ray, and a new voter that begins with an empty disk in the place of one removed.
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
from typing import Any

import grpc
import httpx
import psutil
import ray

from actors.coordinator import Client, Operator, Placement, connect, find_voter, start
from cluster.raft import Status
from cluster.voter import Pace
from nexus.errors import Unavailable
from tests.bench.harness import percentile, print_result, print_table
from tests.running import free_port, until

ROUNDS = 3
SECONDS = 4.0  # of one round
VALUE = b"v" * 100
PACE = Pace(tick_seconds=0.015)  # an election begins after 150 to 300 ms without a leader
WATCHED = 200
FILLERS = 512  # tasks that put one key after another
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
        pid = await process_of(leader)
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


async def process_of(voter: int) -> int:
    handle = await asyncio.to_thread(find_voter, voter)
    pid: int = await handle.__ray_call__.remote(lambda self: os.getpid())
    return pid


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


# Many keys


async def memory_of(voter: int) -> float:
    """MiB resident."""
    return psutil.Process(await process_of(voter)).memory_info().rss / 2**20


async def fill(client: Client, keys: int) -> None:
    numbers = iter(range(keys))

    async def work() -> None:
        for number in numbers:
            await client.put(f"many/{number:07}", VALUE)

    await asyncio.gather(*(work() for _ in range(FILLERS)))


async def longest_put(client: Client, is_over: asyncio.Event) -> float:
    """Milliseconds that the slowest put took, of one after another."""
    longest = 0.0
    while not is_over.is_set():
        began = time.perf_counter()
        await client.put("beside", VALUE)
        longest = max(longest, time.perf_counter() - began)
    return longest * 1000


async def answers(voter: int, client: Client) -> Status:
    """What it says of itself, as soon as it does."""
    while True:
        for status in await client.status():
            if status.id == voter:
                return status
        await asyncio.sleep(0.01)


async def comes_back(voter: int, client: Client) -> None:
    """Return once it answers, and has applied all that was committed then."""
    await answers(voter, client)
    goal = (await client.leader()).commit
    while (await answers(voter, client)).applied < goal:
        await asyncio.sleep(0.01)


class Step:
    """What is measured while one thing is done to voters that are written to."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.rows: list[list[object]] = []
        self.figures: dict[str, float] = {}

    async def time(self, name: str, work: Awaitable[Any]) -> Any:
        """What the work returns. A put after another goes on beside it."""
        term, is_over, began = (await self._client.leader()).term, asyncio.Event(), time.perf_counter()
        beside = asyncio.create_task(longest_put(self._client, is_over))
        result = await work
        seconds = time.perf_counter() - began
        is_over.set()
        longest, elections = await beside, (await self._client.leader()).term - term
        self.rows.append([name, seconds, longest, elections])
        self.figures |= {f"keys_{name}_s": seconds, f"keys_{name}_put_ms_max": longest}
        return result


async def measure_keys(folder: Path, keys: int) -> dict[str, float]:
    """Seconds of what a coordinator with so many keys does, and MiB of its voters."""
    await start({id: Placement() for id in range(1, 4)}, folder, PACE)
    client, operator, weights = await connect(), Operator(folder, PACE), {}
    leader = await settled(client)
    killed, removed = (id for id in (1, 2, 3) if id != leader)
    step = Step(client)
    weights["before"] = await memory_of(leader)
    await step.time("fill", fill(client, keys))
    weights["filled"] = await memory_of(leader)
    snapshot = await step.time("snapshot", operator.snapshot())
    weights["snapshot"] = await memory_of(leader)
    os.kill(await process_of(killed), signal.SIGKILL)
    await step.time("restart", comes_back(killed, client))
    weights["restarted"] = await memory_of(killed)
    await operator.remove(removed)
    await step.time("catch_up", operator.add(4, {}))
    weights["new"] = await memory_of(4)
    end_voters(4)
    size = len(snapshot.data) / 2**20
    print_table([f"{keys} keys", "s", "slowest put ms", "elections"], step.rows)
    print_table(["voter", "MiB"], [["(the snapshot's bytes)", size], *map(list, weights.items())])
    return step.figures | {f"keys_mib_{name}": mib for name, mib in weights.items()} | {"keys_snapshot_mib": size}


async def measure_puts(folder: Path, kills: int) -> dict[str, float]:
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
    parser.add_argument("--keys", type=int, default=100_000, help="put, carried in a snapshot, caught up with")
    parser.add_argument("--only-keys", action="store_true", help="nothing else")
    asked = parser.parse_args(arguments)
    if shutil.which("etcd") is None and not asked.only_keys:
        parser.exit(2, "etcd is not here: it is Debian's package etcd-server\n")
    with tempfile.TemporaryDirectory(prefix="nxb") as name:
        ray.init(namespace="nexus", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        figures: dict[str, float] = {}
        if not asked.only_keys:
            figures |= asyncio.run(measure_puts(Path(name), asked.kills))
        if asked.keys:
            figures |= asyncio.run(measure_keys(Path(name) / "keys", asked.keys))
        ray.shutdown()
    print_result("coordinator", figures, ("ray",))


if __name__ == "__main__":
    main()
