"""`nexus plan`: what is printed, for people and for programs, with and without a Nexus that runs."""

import io
import json
import re
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cluster.inventory import Inventory, Node, configured
from cluster.placement import Place, Plan, Refusal, decode, encode
from cluster.plan import make_way
from deployments import cli, planning
from deployments.cluster_state import Agreed, Deployed, Joined
from deployments.gateway import build
from nexus.config import load_config
from nexus.errors import ConfigError, UpstreamInvalid
from tests.conftest import Door
from tests.test_status import Observer, on_a_port

GIB = 2**30
Command = Callable[..., tuple[int, str, str]]


def write_model(folder: Path, size: int, **fields: object) -> Path:
    """A model of which only the headers are there: `size` bytes of weights, 64 KiB of cache for each token."""
    folder.mkdir(parents=True)
    values: dict[str, object] = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "num_hidden_layers": 16,
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32_000,
        "intermediate_size": 8192, "max_position_embeddings": 16_384, **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("modules.json", "tokenizer.json"):
        (folder / name).write_text("[]")
    tensor = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + size)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """The worked example, a tenth as large: two machines with eight GPUs each, and a witness."""
    gpus = [{"model": "H100", "memory": "8GiB", "count": 8}]
    large, small = write_model(tmp_path / "large", 14 * GIB), write_model(tmp_path / "small", int(1.6 * GIB))
    encoder = {"model_type": "xlm-roberta", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}
    embedder, reranker = (write_model(tmp_path / name, GIB // 4, **encoder) for name in ("bge-m3", "reranker"))
    return {
        "home": str(tmp_path / "home"),
        "ray": {"head": "witness"},
        "nodes": {
            "witness": {"address": "192.0.2.10", "cpus": 16, "memory": "64GiB"},
            "sark": {"address": "192.0.2.11", "cpus": 112, "memory": "190GiB", "gpus": gpus},
            "clu": {"address": "192.0.2.12", "cpus": 112, "memory": "190GiB", "gpus": gpus},
        },
        "models": {
            "embedder": f"sentence-transformer:{embedder}", "embedder_device": "gpu",
            "embedder_replicas": {"least": 2, "most": 2},
            "generator": "large",
            "reranker": "bge-reranker",
            "served": [
                {
                    "address": f"vllm:{large}#large", "replicas": {"least": 2, "most": 2},
                    "engine": {"tensor_parallel": 4, "max_model_len": 8192, "memory_utilization": 0.8},
                },
                {
                    "address": f"vllm:{small}#small", "replicas": {"least": 2, "most": 2},
                    "engine": {"max_model_len": 4096, "memory_utilization": 0.5},
                },
                {
                    "address": f"cross-encoder:{reranker}", "name": "bge-reranker", "task": "rerank", "device": "gpu",
                    "replicas": {"least": 2, "most": 2},
                },
            ],
        },
    }  # fmt: skip


@pytest.fixture
def file(settings: dict[str, Any], tmp_path: Path) -> Path:
    return write(settings, tmp_path)


def write(settings: Mapping[str, Any], folder: Path) -> Path:
    (folder / "nexus.yaml").write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    return folder / "nexus.yaml"


@pytest.fixture
def nexus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `nexus plan …`: exit code, what it printed, what it complained of."""
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nexus", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def read(nexus: Command, *arguments: object) -> dict[str, Any]:
    code, out, err = nexus(*arguments, "--json")
    assert (code, err) == (0, "")
    shown: dict[str, Any] = json.loads(out)
    return shown


def words(line: str) -> str:
    return " ".join(line.split())


# ── the worked example ──────────────────────────────────────────────────────────────────────────


def test_every_replica_is_shown_on_its_machine_and_gpus(nexus: Command, file: Path) -> None:
    shown = read(nexus, "--config", file)
    assert [(node["node"], len(node["gpus"])) for node in shown["nodes"]] == [("witness", 0), ("sark", 8), ("clu", 8)]
    assert shown["refusals"] == []
    for node in shown["nodes"][1:]:
        found: dict[str, list[int]] = {}
        for gpu in node["gpus"]:
            for one in gpu["replicas"]:
                found.setdefault(one["deployment"], []).append(gpu["gpu"])
        assert {name: len(gpus) for name, gpus in found.items()} == {
            "generator-0": 4, "generator-1": 1, "embedder": 1, "reranker-0": 1,
        }  # fmt: skip
    without = [{one["deployment"] for one in node["replicas"]} for node in shown["nodes"]]
    assert without == [{"gateway", "retriever", "ingestor", "vectors", "voter"}, {"voter"}, {"voter"}]


def test_memory_adds_up(nexus: Command, file: Path) -> None:
    for node in read(nexus, "--config", file)["nodes"]:
        everywhere = {(one["deployment"], one["replica"]): one for one in node["replicas"]}
        for gpu in node["gpus"]:
            held = sum(one["bytes"] for one in gpu["replicas"])
            assert gpu["left_bytes"] == gpu["memory_bytes"] - gpu["taken_bytes"] - held >= 0
            everywhere |= {(one["deployment"], one["replica"]): one for one in gpu["replicas"]}
        assert node["cpus_left"] == pytest.approx(node["cpus"] - sum(one["cpus"] for one in everywhere.values()))
        left = node["memory_bytes"] - sum(one["memory_bytes"] for one in everywhere.values())
        assert node["memory_left_bytes"] == left >= 0


def test_a_replica_is_told_with_its_weights_cache_and_what_it_can_serve(nexus: Command, file: Path) -> None:
    shown = {
        one["deployment"]: one for gpu in read(nexus, "--config", file)["nodes"][1]["gpus"] for one in gpu["replicas"]
    }
    large, small, embedder = shown["generator-0"], shown["generator-1"], shown["embedder"]
    assert (large["model"], small["model"], embedder["model"]) == ("large", "small", "bge-m3")
    assert large["weights_bytes"] == 14 * GIB // 4 and len(large["gpus"]) == 4
    assert small["weights_bytes"] == pytest.approx(1.6 * GIB, rel=0.001)
    for one in (large, small):
        assert one["bytes"] == one["weights_bytes"] + one["cache_bytes"] + one["overhead_bytes"]
        parts = len(one["gpus"])
        assert one["cache_tokens"] == pytest.approx(parts * one["cache_bytes"] / 2**16, rel=0.001)
    assert large["concurrency"] == round(large["cache_tokens"] / 8192, 1)
    assert small["concurrency"] == round(small["cache_tokens"] / 4096, 1)
    assert (embedder["cache_bytes"], embedder["cache_tokens"], embedder["concurrency"]) == (0, 0, None)
    assert embedder["bytes"] >= embedder["weights_bytes"] > 0


def test_people_read_the_same(nexus: Command, file: Path) -> None:
    shown = read(nexus, "--config", file)
    code, out, err = nexus("--config", file)
    assert (code, err) == (0, "")
    assert "\x1b" not in out  # no terminal
    lines = out.splitlines()
    assert max(map(len, lines)) <= 110
    text = [words(line) for line in lines]
    for node in shown["nodes"]:
        (line,) = (line for line in text if line.startswith(f"{node['node']} ({node['address']})"))
        assert f"{node['cpus_left']:g} of {node['cpus']:g} CPUs" in line
        assert (
            f"{node['memory_left_bytes'] / GIB:.1f} GiB of {node['memory_bytes'] / GIB:.1f} GiB of memory left" in line
        )
    gpu = next(gpu for gpu in shown["nodes"][1]["gpus"] if gpu["replicas"])
    (one,) = gpu["replicas"]
    row = (
        f"{gpu['gpu']} H100 8.0 GiB {one['bytes'] / GIB:.1f} GiB generator-0 (large) {gpu['left_bytes'] / GIB:.1f} GiB"
    )
    assert text.count(row) == 2  # once on each machine
    sizes = [f"{4 * one[kind] / GIB:.1f}" for kind in ("bytes", "weights_bytes", "cache_bytes", "overhead_bytes")]
    model = f"generator-0 (large) 4 {' '.join(sizes)} {one['cache_tokens']:,} {one['concurrency']:g}"
    assert text.count(model) == 1
    assert any(line.startswith("without a GPU: ") and "gateway" in line for line in text)


def test_a_narrow_terminal_breaks_no_number_in_two(file: Path) -> None:
    config = load_config(file)
    shown = planning.describe(config, planning.draw(config, planning.Told()))
    screen = io.StringIO()
    planning.print_plan(shown, Console(file=screen, force_terminal=True, width=80, markup=False, highlight=False))
    lines = [re.sub("\x1b[^m]*m", "", line) for line in screen.getvalue().splitlines()]
    tables = [line for line in lines if " left" not in line[-20:] or "GPU" in line]
    assert max(len(line.rstrip()) for line in tables if "without a GPU" not in line) <= 80
    assert sum("GiB" in line and bool(re.search(r"\d GiB\s*$", line)) for line in lines) == 16


def test_one_machine_without_nodes_is_planned_too(nexus: Command, tmp_path: Path) -> None:
    shown = read(nexus, "--config", write({"home": str(tmp_path / "home")}, tmp_path))
    (node,) = shown["nodes"]
    assert node["node"] == "local" and {one["deployment"] for one in node["replicas"]} >= {"gateway", "embedder"}
    embedder = next(one for one in node["replicas"] if one["deployment"] == "embedder")
    assert embedder["model"] == "all-MiniLM-L6-v2" and embedder["bytes"] >= embedder["weights_bytes"] > 50 * 2**20
    code, out, _ = nexus("--config", tmp_path / "nexus.yaml")
    assert code == 0 and "embedder (all-MiniLM-L6-v2) 0 " in words(out)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


def test_what_has_no_place_is_refused_with_what_would_help(
    nexus: Command, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["models"]["served"][0]["replicas"] = {"least": 5, "most": 5}
    code, out, err = nexus("--config", write(settings, tmp_path))
    assert code == 1 and "sark" in out
    assert len(err.splitlines()) == 1 and err.startswith("no place for generator-0: ")
    code, out, err = nexus("--config", tmp_path / "nexus.yaml", "--json")
    (refusal,) = json.loads(out)["refusals"]
    assert code == 1 and refusal["deployment"] == "generator-0"
    assert refusal["reason"] in err and refusal["remedy"] in err
    with pytest.raises(ConfigError, match="generator-0") as caught:
        planning.plan_for(load_config(tmp_path / "nexus.yaml"), None, None)
    assert refusal["reason"] in caught.value.message and refusal["remedy"] in caught.value.message


def test_a_model_that_is_not_there_is_one_line(nexus: Command, settings: dict[str, Any], tmp_path: Path) -> None:
    settings["models"]["served"][0]["address"] = "vllm:/nonexistent/large#large"
    code, out, err = nexus("--config", write(settings, tmp_path))
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1


# ── the plan that is kept ───────────────────────────────────────────────────────────────────────


def test_what_is_drained_and_what_is_not_seen_is_left_out(file: Path) -> None:
    config = load_config(file)
    described = configured(config)
    assert [node.name for node in planning.inventory_for(config, None, ("clu",)).nodes] == ["witness", "sark"]
    taken = replace(described["sark"].gpus[0], taken=7 * GIB)
    seen = Inventory((described["witness"], replace(described["sark"], gpus=(taken, *described["sark"].gpus[1:]))))
    real = planning.inventory_for(config, seen, ())
    assert [node.name for node in real.nodes] == ["witness", "sark"] and real["sark"].gpus[0].taken == 7 * GIB
    plan = planning.plan_for(config, replace(seen, nodes=(*seen.nodes, described["clu"])), None)
    assert not [place for place in plan.places if place.node == "sark" and 0 in place.gpus]


def test_a_plan_comes_back_as_it_was_kept(file: Path) -> None:
    plan = planning.plan_for(load_config(file), None, None)
    assert decode(encode(plan)) == plan
    refused = Plan((), (Refusal("a", "b", "c"),))
    assert decode(encode(refused)) == refused
    older = json.dumps({"places": [{"want": "a", "replica": 0, "node": "n", "gpus": [1], "gone": 1}]}).encode()
    assert decode(older) == Plan((Place("a", 0, "n", (1,)),))  # of a version with other fields
    for rubbish in (b"", b"{", b"[]", b"{}", b'{"places": 1}'):
        with pytest.raises(UpstreamInvalid, match="placement"):
            decode(rubbish)


def test_what_is_in_force_stays_where_it_is(file: Path) -> None:
    config = load_config(file)
    plan = planning.plan_for(config, None, None)
    swapped = {"sark": "clu", "clu": "sark", "witness": "witness"}
    other = Plan(tuple(replace(place, node=swapped[place.node]) for place in plan.places if place.want != "voter"))
    kept = planning.plan_for(config, None, other)
    assert set(kept.places) >= {place for place in other.places if place.gpus}


# ── where Nexus runs ────────────────────────────────────────────────────────────────────────────


def joined(node: Node) -> Joined:
    """With all its GPUs."""
    labels = {"nexus.io/gpus": "-".join(str(gpu.index) for gpu in node.gpus)} if node.gpus else {}
    return Joined(node.name, node.address, True, labels, node.cpus, node.memory)


@pytest.fixture
def observer(file: Path) -> Observer:
    """Of a cluster that is as described and runs its plan."""
    config, observer = load_config(file), Observer()
    described = configured(config)
    observer.says = {
        "joined": [joined(node) for node in described.nodes],
        "inventory": described, "deployed": [Deployed("gateway@witness", "HEALTHY", 1, 0)],
        "agreed": Agreed(planning.plan_for(config, None, None)),
    }  # fmt: skip
    return observer


@pytest.fixture
def running(door: Door, observer: Observer, file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Observer]:
    """Its front door on a port, and the command line's way to it."""
    app = build(replace(door.lent, config=load_config(file), observer=observer))
    with on_a_port(app, door, monkeypatch):
        yield observer


def occupy(observer: Observer, name: str, gpu: int, taken: int) -> None:
    def changed(node: Node) -> Node:
        gpus = tuple(replace(one, taken=taken) if one.index == gpu else one for one in node.gpus)
        return replace(node, gpus=gpus) if node.name == name else node

    observer.says["inventory"] = Inventory(tuple(map(changed, observer.says["inventory"].nodes)))


def test_what_others_hold_of_a_gpu_is_shown_and_planned_around(nexus: Command, file: Path, running: Observer) -> None:
    occupy(running, "sark", 0, 6 * GIB)
    shown = read(nexus, "--config", file)
    gpu = shown["nodes"][1]["gpus"][0]
    assert (gpu["taken_bytes"], gpu["replicas"], gpu["left_bytes"]) == (6 * GIB, [], 2 * GIB)
    code, out, _ = nexus("--config", file)
    assert code == 0 and "0 H100 8.0 GiB 6.0 GiB held by others 2.0 GiB" in map(words, out.splitlines())


def test_nothing_changes_where_nothing_did(nexus: Command, file: Path, running: Observer) -> None:
    shown = read(nexus, "--config", file, "--diff")
    count = len(running.says["agreed"].plan.places)
    assert shown == {"added": [], "removed": [], "moved": [], "resized": [], "unchanged": count}
    assert nexus("--config", file, "--diff") == (0, f"{count} unchanged\n", "")


def test_whoever_must_make_room_moves_and_the_others_stay(nexus: Command, file: Path, running: Observer) -> None:
    plan = running.says["agreed"].plan
    (place,) = (one for one in plan.places if one.want == "generator-1" and one.node == "sark")
    occupy(running, "sark", place.gpus[0], 8 * GIB)
    shown = read(nexus, "--config", file, "--diff")
    moved = {one["from"]["want"]: one for one in shown["moved"]}
    beside = {one.want for one in plan.places if one.node == "sark" and place.gpus[0] in one.gpus}
    assert set(moved) == beside and shown["added"] == shown["removed"] == []
    assert shown["unchanged"] == len(plan.places) - len(moved)
    change = moved["generator-1"]
    assert (change["from"]["node"], change["from"]["gpus"]) == ("sark", list(place.gpus)) != (
        change["to"]["node"], change["to"]["gpus"],
    )  # fmt: skip
    _, out, _ = nexus("--config", file, "--diff")
    to = f"{change['to']['node']} GPU {change['to']['gpus'][0]}"
    assert f"moved generator-1 on sark GPU {place.gpus[0]} -> {to}" in map(words, out.splitlines())


def test_what_comes_goes_and_grows_is_told(
    nexus: Command, settings: dict[str, Any], running: Observer, tmp_path: Path
) -> None:
    served = settings["models"]["served"]
    served[1]["engine"]["memory_utilization"] = 0.6
    served[2]["replicas"] = {"least": 1, "most": 1}
    settings["models"]["embedder_replicas"] = {"least": 3, "most": 3}
    file = write(settings, tmp_path)
    shown = read(nexus, "--config", file, "--diff")
    assert [one["want"] for one in shown["added"]] == ["embedder"]
    assert [one["want"] for one in shown["removed"]] == ["reranker-0"]
    grown = [one for one in shown["resized"] if one["to"]["want"] == "generator-1"]
    assert len(grown) == 2 and all(one["from"]["gpu_bytes"] < one["to"]["gpu_bytes"] for one in grown)
    lines = [words(line) for line in nexus("--config", file, "--diff")[1].splitlines()]
    assert any(line.startswith("added embedder on ") for line in lines)
    assert any(line.startswith("removed reranker-0 on ") for line in lines)
    sizes = [f"{grown[0][one]['gpu_bytes'] / GIB:.1f} GiB" for one in ("from", "to")]
    assert sum(line.startswith("resized generator-1 on ") and line.endswith(" -> ".join(sizes)) for line in lines) == 2


def test_what_would_be_refused_is_not_compared(
    nexus: Command, settings: dict[str, Any], running: Observer, tmp_path: Path
) -> None:
    settings["models"]["served"][0]["replicas"] = {"least": 5, "most": 5}
    code, out, err = nexus("--config", write(settings, tmp_path), "--diff", "--json")
    assert code == 1 and "no place for generator-0" in err and json.loads(out)["refusals"]


def test_a_drained_machine_is_left_out_and_named(nexus: Command, file: Path, running: Observer) -> None:
    running.says["agreed"] = replace(running.says["agreed"], drained=["clu"])
    code, out, err = nexus("--config", file, "--json")
    assert code == 0  # of what one machine is too small for, one replica stays
    assert [node["node"] for node in json.loads(out)["nodes"]] == ["witness", "sark"]
    assert err == "note: clu is drained: nothing goes there\n"


def test_a_machine_that_is_away_is_planned_as_described_and_named(
    nexus: Command, file: Path, running: Observer
) -> None:
    occupy(running, "clu", 0, 8 * GIB)
    running.says["joined"] = [replace(one, is_alive=one.name != "clu") for one in running.says["joined"]]
    code, out, err = nexus("--config", file, "--diff")
    assert (code, out) == (0, f"{len(running.says['agreed'].plan.places)} unchanged\n")
    assert err == "note: clu does not answer: it is planned as described\n"


def test_a_gpu_that_a_machine_joined_without_is_shown_and_not_planned(
    nexus: Command, file: Path, running: Observer
) -> None:
    assert any(place.node == "sark" and 0 in place.gpus for place in running.says["agreed"].plan.places)
    running.says["joined"] = [
        replace(one, labels={"nexus.io/gpus": "1-2-3-4-5-6-7"}) if one.name == "sark" else one
        for one in running.says["joined"]
    ]
    gpus = read(nexus, "--config", file)["nodes"][1]["gpus"]
    assert [gpu["left_out"] for gpu in gpus] == [True] + 7 * [False] and gpus[0]["replicas"] == []
    _, out, _ = nexus("--config", file)
    assert "0 H100 8.0 GiB left out when the machine joined 8.0 GiB" in map(words, out.splitlines())


def test_a_machine_that_does_not_say_what_it_has_counts_as_described(
    nexus: Command, file: Path, running: Observer
) -> None:
    whole = running.says["inventory"]
    running.says["inventory"] = Inventory(tuple(node for node in whole.nodes if node.name != "clu"))
    code, out, err = nexus("--config", file, "--diff")
    assert (code, out) == (0, f"{len(running.says['agreed'].plan.places)} unchanged\n")
    assert err == "note: clu does not say which GPUs it has: they are as described\n"
    running.away.add("joined")
    code, out, err = nexus("--config", file, "--diff")
    assert (code, out) == (0, f"{len(running.says['agreed'].plan.places)} unchanged\n")
    assert err == "note: the machines are as described: joined is away\n"


def test_without_a_plan_in_force_there_is_nothing_to_compare_with(
    nexus: Command, file: Path, running: Observer
) -> None:
    running.says["agreed"] = Agreed(None)
    code, out, err = nexus("--config", file, "--diff")
    assert (code, out) == (1, "") and "no plan is in force" in err
    running.away.add("agreed")
    code, out, err = nexus("--config", file, "--diff")
    assert (code, out, err) == (1, "", "error: agreed is away\n")
    assert nexus("--config", file)[0] == 0


def test_where_no_nexus_runs_there_is_no_diff(nexus: Command, file: Path) -> None:
    code, out, err = nexus("--config", file, "--diff")
    assert (code, out) == (1, "") and err.startswith("error: no Nexus runs here")


def test_a_nexus_that_does_not_answer_stops_the_diff_and_not_the_plan(
    nexus: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("NEXUS_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    code, out, err = nexus("--config", file, "--diff")
    assert (code, out) == (1, "") and err.startswith("error: no Nexus answers")
    code, out, err = nexus("--config", file)
    assert code == 0 and "sark" in out and err.startswith("note: the machines are as described: no Nexus answers")


def test_a_drained_machine_keeps_its_voter_and_of_the_models_one_replica_stays_elsewhere(file: Path) -> None:
    config = load_config(file)
    plan = planning.plan_for(config, None, None)
    assert {place.node for place in plan.places if place.want == "voter"} == {"witness", "sark", "clu"}
    drained = planning.plan_for(config, None, plan, {"clu"})
    assert {place.node for place in drained.places} == {"witness", "sark"}
    assert {place.node for place in drained.places if place.want == "voter"} == {"witness", "sark"}
    counts = Counter(place.want for place in drained.places)
    assert counts["generator-0"] == 1, "for which one machine has room once"
    assert counts["embedder"] == counts["reranker-0"] == 2
    assert planning.plan_for(config, None, drained, {"clu"}) == drained
    assert {one.node for one in drained.places if one.want == "embedder"} == {"sark"}
    resumed = planning.plan_for(config, None, make_way(drained, "clu"))
    for want in ("embedder", "reranker-0", "generator-0"):
        assert {one.node for one in resumed.places if one.want == want} == {"sark", "clu"}, want
    assert make_way(resumed, "clu") == resumed and make_way(drained, "sark") == drained
    with pytest.raises(ConfigError, match="gateway"):
        planning.plan_for(config, None, plan, {"witness"})
