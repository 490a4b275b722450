"""Clients who ask a thousand things, bad ones among them, and count what they were answered: what `/metrics` must say.

A request that the front door answered is counted exactly once. One that was under way when it was killed may have been
counted or not: its client never heard. One that began while there was none was not.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx

OURS = "content-security-policy"  # a header of all that Nexus answers, and of nothing that a proxy does

KINDS: Mapping[str, Callable[[httpx.Client, int], httpx.Response]] = {
    "search": lambda http, number: http.post("/rag/search", json={"query": f"wheel nut torque {number % 7}"}),
    "query": lambda http, number: http.post("/rag/query", json={"query": f"What clears E-21{number % 9}?"}),
    "chat": lambda http, number: http.post(
        "/v1/chat/completions",
        json={"model": "nexus-rag", "messages": [{"role": "user", "content": f"What clears E-21{number % 9}?"}]},
    ),
    "add": lambda http, number: http.post(
        "/rag/add_document", json={"filename": f"counted{number}.md", "content": f"# Counted\n\nNumber {number}."}
    ),
    "refused": lambda http, number: http.post("/rag/search", json={"query": "torque", "k": -1}),
    "stranger": lambda http, number: http.get("/rag/documents", headers={"authorization": "Bearer no key"}),
    "nowhere": lambda http, number: http.get(f"/nowhere/{number}"),
    "alive": lambda http, number: http.get("/livez"),
}
SHARES = ["search"] * 9 + ["query"] * 5 + ["chat"] * 2 + ["refused"] * 5 + ["stranger"] * 2 + ["nowhere"] + ["alive"]


@dataclass
class Clients:
    """What was answered by (kind, status), and how many of each kind were under way when the front door died."""

    connect: Callable[[], httpx.Client]
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    unheard: Counter[str] = field(default_factory=Counter)
    refused_by_others: Counter[str] = field(default_factory=Counter)
    is_dead: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, numbers: range) -> None:
        """One thing for each number, an addition for every hundredth; tried again until something answers."""
        with self.connect() as http:
            for number in numbers:
                kind = "add" if number % 50 == 7 else SHARES[number % len(SHARES)]
                while not self._ask_once(http, kind, number):
                    pass

    def _ask_once(self, http: httpx.Client, kind: str, number: int) -> bool:
        began_dead = self.is_dead.is_set()
        try:
            answer = KINDS[kind](http, number)
        except httpx.TransportError:
            answer = None
        with self.lock:
            if answer is not None and OURS in answer.headers:
                self.answered[kind, answer.status_code] += 1
                return True
            (self.refused_by_others if began_dead else self.unheard)[kind] += 1
        time.sleep(0.1)  # before it asks again
        return False

    def well(self, *kinds: str) -> int:
        """How many of these were answered as they should be."""
        return sum(count for (kind, status), count in self.answered.items() if kind in kinds and status < 300)


def read_metrics(http: httpx.Client) -> dict[str, float]:
    """Every sample, by its name and labels as they are written."""
    text = http.get("/metrics").raise_for_status().text
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}
