"""What spans cost a question over HTTP: without tracing, with a collector, and with one that is away, side by side.

    python -m tests.bench.tracing            starts three Nexuses over the shipped manuals

Each question goes to all three, and then once more in the opposite order, which is another one every time: so a busy
moment of the machine falls on all alike. A ratio is the median over all questions of what one took over what the one
without tracing took next to it, with its standard error; `again_over_off` compares that one's second answers with its
first, and says what the noise is. The collector is a process of its own. CPU time is that of all processes of a Nexus.
"""

from tests.bench import harness  # isort: skip  (first: it pins the threads)

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import median, quantiles

import httpx

from tests.running import ROOT, Running, free_port, running_nexus

ROUNDS = 10
MANUALS = ROOT / "deployments" / "manuals"
PACKAGES = ("ray", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http", "structlog")
WAYS = ("off", "live", "dead")


def listen() -> None:
    """A collector, as its own process: it says its address, and how many spans came once its input ends."""
    from tests.collector import collecting

    with collecting() as collector:
        print(collector.url, flush=True)
        sys.stdin.read()
        print(len(collector.spans), flush=True)


@contextmanager
def collector_elsewhere() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", "from tests.bench.tracing import listen; listen()"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


def start(stack: ExitStack, settings: Mapping[str, str]) -> Running:
    """A Nexus with the manuals in it."""
    nexus: Running = stack.enter_context(running_nexus(500, **settings))
    nexus.must("add", str(MANUALS), timeout=500)
    return nexus


def ask(http: httpx.Client, question: str) -> float:
    """Milliseconds to the whole answer."""
    started = time.perf_counter()
    http.post("/rag/query", json={"query": question}).raise_for_status()
    return 1000 * (time.perf_counter() - started)


def measure(asked: Mapping[str, httpx.Client], questions: list[str]) -> dict[str, list[tuple[float, float]]]:
    """For each way, what every question took the first time and the second."""
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(-1, ROUNDS):
        for place, question in enumerate(questions):
            first = (number + place) % len(WAYS)
            order = WAYS[first:] + WAYS[:first]
            forth = {way: ask(asked[way], question) for way in order}
            back = {way: ask(asked[way], question) for way in reversed(order)}
            if number >= 0:  # the first round warms up
                for way in WAYS:
                    spent[way].append((forth[way], back[way]))
    return spent


def ratio(some: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The median of the pairs' ratios, and its standard error, of the middle half as of a normal distribution."""
    ratios = [one / other for one, other in zip(some, others, strict=True)]
    lower, middle, upper = quantiles(ratios, n=4)
    return middle, 1.2533 * (upper - lower) / 1.349 / len(ratios) ** 0.5


def main() -> None:
    found = json.loads((ROOT / "tests" / "manuals_questions.json").read_text())
    questions = [one["question"] for one in found][:20]
    with ExitStack() as stack, collector_elsewhere() as collector:
        assert collector.stdout is not None and collector.stdin is not None
        live = collector.stdout.readline().strip()
        settings = {
            "off": {}, "live": {"NEXUS_TELEMETRY__OTLP_ENDPOINT": live},
            "dead": {"NEXUS_TELEMETRY__OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"},
        }  # fmt: skip
        with ThreadPoolExecutor(len(WAYS)) as starting:
            started = dict(zip(WAYS, starting.map(lambda way: start(stack, settings[way]), WAYS), strict=True))
        clients = {way: stack.enter_context(nexus.http()) for way, nexus in started.items()}
        before = {way: nexus.cpu_seconds() for way, nexus in started.items()}
        spent = measure(clients, questions)
        used = {way: nexus.cpu_seconds() - before[way] for way, nexus in started.items()}
        time.sleep(2)  # the last batch of the live one
        collector.stdin.close()
        spans = int(collector.stdout.readline())
    requests = 2 * (ROUNDS + 1) * len(questions)
    p50 = {way: median(map(sum, spent[way])) / 2 for way in WAYS}
    cpu = {way: 1000 * used[way] / requests for way in WAYS}
    over = {way: ratio([*map(sum, spent[way])], [*map(sum, spent["off"])]) for way in WAYS[1:]}
    over["again"] = ratio([back for _, back in spent["off"]], [forth for forth, _ in spent["off"]])
    rows = [(way, p50[way], *over.get(way, (1.0, 0.0)), cpu[way]) for way in WAYS]
    rows.append(("again", p50["off"], *over["again"], cpu["off"]))
    harness.print_table(["tracing", "p50 ms", "over off", "standard error", "CPU ms"], rows)
    figures = {
        **{f"{way}_ms": p50[way] for way in WAYS}, **{f"{way}_cpu_ms": cpu[way] for way in WAYS},
        **{f"{way}_over_off": figure for way, (figure, _) in over.items()},
        **{f"{way}_error": error for way, (_, error) in over.items()}, "spans_per_question": spans / requests,
    }  # fmt: skip
    harness.print_result("tracing", figures, PACKAGES)


if __name__ == "__main__":
    main()
