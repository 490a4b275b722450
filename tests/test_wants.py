"""From a configuration to what has to find a place: every deployment, and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from cluster import footprint
from cluster.inventory import configured
from cluster.placement import Want, place
from cluster.wants import wants_of
from nexus.config import Config
from nexus.errors import ConfigError
from tests.machines import recount
from tests.tiny_encoders import write_cross_encoder
from tests.tiny_llama import write_llama
from tests.tiny_models import write_gguf

GIB = 2**30
MACHINES = {
    "witness": {"address": "192.0.2.10", "cpus": 4, "memory": "16GiB", "labels": {"rack": "1"}},
    "sark": {
        "address": "192.0.2.11", "cpus": 64, "memory": "256GiB", "labels": {"rack": "2"},
        "gpus": [{"model": "H100", "memory": "80GiB", "count": 8}],
    },
    "clu": {
        "address": "192.0.2.12", "cpus": 64, "memory": "256GiB", "labels": {"rack": "2"},
        "gpus": [{"model": "H100", "memory": "80GiB", "count": 8}],
    },
}  # fmt: skip


def wanted(home: Path, **settings: Any) -> dict[str, Want]:
    return {want.name: want for want in wants_of(Config(home=home, **settings))}


def in_cluster(home: Path, **settings: Any) -> dict[str, Want]:
    return wanted(home, **{"ray": {"head": "witness"}, "nodes": MACHINES, **settings})


def test_one_machine_wants_its_parts_and_an_embedder(tmp_path: Path) -> None:
    found = wanted(tmp_path)
    assert [*found] == ["gateway", "retriever", "ingestor", "vectors", "embedder", "voter"]
    assert all((want.least, want.most, want.gpus, want.nodes) == (1, 1, 0, ()) for want in found.values())
    assert all(want.memory > 0 and not want.is_apart for want in found.values())
    assert found["embedder"].memory == found["embedder"].footprint.weights + found["embedder"].footprint.overhead
    assert "vectors" not in wanted(tmp_path, stores={"vectors": "milvus://127.0.0.1:19530"})


def test_what_has_the_stores_on_its_disk_is_on_the_head(tmp_path: Path) -> None:
    found = in_cluster(tmp_path)
    on_head = [name for name, want in found.items() if want.nodes == ("witness",)]
    assert on_head == ["gateway", "retriever", "ingestor", "vectors"]
    assert found["ingestor"].memory >= 2 * GIB  # two parsers with a limit of 1 GiB


def test_models_by_the_names_of_their_deployments(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llama")
    reranker = write_cross_encoder(tmp_path / "reranker")
    gguf = write_gguf(tmp_path / "tiny.gguf")
    served = [
        {"address": f"vllm:{llama}#llama", "nodes": ["sark"], "replicas": {"least": 2, "most": 4}},
        {"address": "openai:http://127.0.0.1:1/v1#other"},
        {"address": f"gguf:{gguf}", "context_length": 512},
        {"address": f"vllm:{llama}#vectors", "task": "embed", "replicas": {"least": 3}},
        {"address": "openai:http://127.0.0.1:1/v1#e", "task": "embed", "dimension": 8},
        {"address": "sentence-transformer:all-MiniLM-L6-v2", "name": "again", "task": "embed", "device": "gpu"},
        {"address": f"cross-encoder:{reranker}", "name": "cross", "task": "rerank", "device": "gpu"},
        {"address": "by-embedder:", "task": "rerank"},
    ]
    pool = {"embedder_replicas": {"least": 2, "most": 3}, "embedder_nodes": ["clu"], "embedder_device": "gpu"}
    found = in_cluster(tmp_path, models={"generator": "llama", "reranker": "cross", "served": served, **pool})
    models = [*found][4:-1]
    assert models == ["generator-0", "generator-2", "embedder", "embedder-1", "embedder-3", "reranker-0"]
    llm = found["generator-0"]
    assert (llm.least, llm.most, llm.nodes, llm.gpus, llm.gpu_share) == (2, 4, ("sark",), 1, 0.9)
    assert llm.footprint.weights > 0 and llm.footprint.longest == 2048 and llm.cpus == 1
    assert (found["embedder-1"].least, found["embedder-1"].most) == (3, 3)  # there are never fewer than the least
    embedder = found["embedder"]
    assert (embedder.least, embedder.most, embedder.nodes, embedder.gpus) == (2, 3, ("clu",), 1)
    assert embedder.gpu_share == 0 and embedder.footprint.weights > 80 * 10**6
    gguf_want = found["generator-2"]
    assert gguf_want.gpus == 0 and gguf_want.memory > gguf_want.footprint.overhead + gguf.stat().st_size
    assert found["reranker-0"].gpus == found["embedder-3"].gpus == 1


def test_the_sizes_of_an_engine(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llama")
    engine = {"tensor_parallel": 4, "pipeline_parallel": 2, "memory_utilization": 0.8, "max_model_len": 1000}
    large = in_cluster(tmp_path, models={"served": [{"address": f"vllm:{llama}#l", "engine": engine}]})["generator-1"]
    assert (large.gpus, large.stages, large.gpu_share, large.footprint.longest) == (8, 2, 0.8, 1000)
    assert large.memory == 10 * footprint.ENGINE_PROCESS + 8 * footprint.CUDA_PROCESS
    on_cpu = {"device": "cpu", "cpu_cache_bytes": 2 * GIB, "dtype": "float32"}
    small = in_cluster(tmp_path, models={"served": [{"address": f"vllm:{llama}#l", "engine": on_cpu}]})["generator-1"]
    assert (small.gpus, small.memory) == (0, small.footprint.weights + small.footprint.overhead + 2 * GIB)
    assert small.cache_tokens_of(0) == 2 * GIB // (2 * 2 * 128 * 4)


def test_an_embedder_that_is_somewhere_else_still_has_a_process(tmp_path: Path) -> None:
    found = wanted(tmp_path, models={"embedder": "openai:http://127.0.0.1:1/v1#e"})
    assert found["embedder"].memory == footprint.PROCESS and found["embedder"].footprint.weights == 0


def test_an_embedder_takes_as_much_as_it_works_on_at_once(tmp_path: Path) -> None:
    few = in_cluster(tmp_path, models={"embedder_threads": 2})["embedder"].memory
    many = in_cluster(tmp_path, models={"embedder_threads": 16})["embedder"].memory
    no_more = in_cluster(tmp_path, models={"embedder_threads": 64})["embedder"].memory
    assert few < many == no_more  # sixteen calls at once
    assert in_cluster(tmp_path)["embedder"].memory > few  # as many as the head has cores


@pytest.mark.parametrize(
    ("voters", "count", "each"),
    [
        ({}, 3, (("witness",), ("sark",), ("clu",))),  # three of three machines, where nobody says
        ({"voters": {1: {}, 2: {}}}, 2, ()),
        ({"voters": {1: {"nexus.io/node": "clu"}, 5: {}, 3: {"rack": "2"}}}, 3, (("clu",), ("sark", "clu"), ())),
    ],
)
def test_voters_are_where_their_labels_are(tmp_path: Path, voters: Any, count: int, each: Any) -> None:
    voter = in_cluster(tmp_path, coordinator=voters)["voter"]
    assert (voter.least, voter.most, voter.is_apart, voter.nodes_of_each) == (count, count, True, each)


def test_voters_on_one_machine_share_it(tmp_path: Path) -> None:
    voter = wanted(tmp_path, coordinator={"voters": {1: {}, 2: {"rack": "9"}, 3: {}}})["voter"]
    assert (voter.least, voter.is_apart, voter.nodes_of_each) == (3, False, ())


def test_a_voter_whose_labels_no_machine_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no machine of `nodes` has the labels of voter 2: \{'rack': '9'\}"):
        in_cluster(tmp_path, coordinator={"voters": {1: {}, 2: {"rack": "9"}}})


@pytest.mark.parametrize(
    "models",
    [
        {"served": [{"address": "vllm:/models/none#x"}]},
        {"served": [{"address": "cross-encoder:/models/none", "name": "x", "task": "rerank"}]},
        {"embedder": "sentence-transformer:/models/none"},
    ],
)
def test_a_model_that_is_not_on_this_machine(tmp_path: Path, models: Any) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder /models/none on this machine; plan on one"):
        in_cluster(tmp_path, models=models)


def test_what_is_wanted_can_be_placed(tmp_path: Path) -> None:
    served = [{"address": f"vllm:{write_llama(tmp_path / 'llama')}#l", "replicas": {"least": 2, "most": 3}}]
    config = Config(home=tmp_path, ray={"head": "witness"}, nodes=MACHINES, models={"served": served})
    inventory, wants = configured(config), wants_of(config)
    plan = place(inventory, wants)
    recount(inventory, wants, plan)
    assert not plan.refusals and len(plan.places) == len(wants) + 2 + 2
