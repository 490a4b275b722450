"""What machines are described as, what they say of themselves, and every way in which the two differ."""

import importlib.util
import inspect
import ipaddress
import json
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import inventory
from cluster.inventory import NODE_LABEL, UNNOTICED_BYTES, Gpu, Inventory, Node, configured, differences, look, real
from nexus.config import Config, load_config

ROOT = Path(__file__).parent.parent
DOUBLE = Path(__file__).parent / "nvml"
EXAMPLE = ROOT / "cluster" / "sark-clu.yaml"
GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives this machine GPUs, as NVML would report them."""
    monkeypatch.setitem(sys.modules, "pynvml", load_module(DOUBLE / "pynvml.py"))
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "gpus.json"))

    def describe(*gpus: dict[str, object], **errors: str) -> None:
        (tmp_path / "gpus.json").write_text(json.dumps({"gpus": gpus, "errors": errors}))

    describe()
    return describe


def card(**fields: object) -> dict[str, object]:
    return {"name": H100, "total": 80 * GIB, **fields}


def process(pid: int, gib: float | None) -> dict[str, object]:
    return {"pid": pid, "memory": None if gib is None else int(gib * GIB)}


def load(tmp_path: Path, text: str) -> Config:
    (tmp_path / "nexus.yaml").write_text(text)
    return load_config(tmp_path / "nexus.yaml", {})


# ── as their owner describes them ───────────────────────────────────────────────────────────────


def test_gpus_are_numbered_in_the_order_in_which_they_are_described(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
ray: {head: two}
nodes:
  two:
    address: 192.0.2.2
    cpus: 8.5
    memory: 64GiB
    labels: {rack: a}
    disks: {/data: 1TiB}
    gpus: [{model: A100, memory: 40GiB, count: 2}, {memory: 16GiB}]
  one: {address: 192.0.2.1, cpus: 2, memory: 4GiB}
""",
    )
    cards = (Gpu(0, "A100", 40 * GIB), Gpu(1, "A100", 40 * GIB), Gpu(2, "GPU", 16 * GIB))
    two = Node("two", "192.0.2.2", 8.5, 64 * GIB, cards, {"rack": "a"}, {"/data": 1024 * GIB})
    assert configured(config) == Inventory((two, Node("one", "192.0.2.1", 2, 4 * GIB)))


def test_without_machines_in_the_settings_there_is_this_one(machine: Machine, tmp_path: Path) -> None:
    machine(card(used=30 * GIB, compute=[process(7, 10), process(8, 20)]))
    config = Config(home=tmp_path / "not" / "yet" / "made")
    (node,) = configured(config, is_ours=lambda pid: pid == 8).nodes
    assert (node.name, node.address, node.gpus) == ("local", "127.0.0.1", (Gpu(0, H100, 80 * GIB, 10 * GIB),))
    assert list(node.disks) == [str(config.home)]
    assert node.disks[str(config.home)] == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.1)
    assert configured(config)["local"].gpus[0].taken == 30 * GIB, "nobody is ours unless it is said"


def test_the_worked_example_is_a_whole_configuration() -> None:
    config = load_config(EXAMPLE, {})
    seen = configured(config)
    assert {node.name: len(node.gpus) for node in seen.nodes} == {"witness": 0, "sark": 8, "clu": 8}
    assert {gpu.memory for node in seen.nodes for gpu in node.gpus} == {80 * GIB}
    assert config.ray.head == "witness"
    documentation = ipaddress.ip_network("192.0.2.0/24")  # RFC 5737
    assert all(ipaddress.ip_address(node.address) in documentation for node in seen.nodes)
    assert sorted(labels[NODE_LABEL] for labels in config.coordinator.voters.values()) == ["clu", "sark", "witness"]
    large, small = config.models.of_task("generate")
    assert (large.called, large.engine.tensor_parallel, large.replicas.least) == ("large", 4, 2)
    assert (small.called, small.engine.tensor_parallel, small.replicas.least) == ("small", 1, 2)
    assert config.models.of_task("rerank")[0].device == config.models.embedder_device == "gpu"


def test_the_worked_example_ships() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cluster"]
    assert EXAMPLE in [file for pattern in shipped for file in EXAMPLE.parent.glob(pattern)]


# ── as they say themselves ──────────────────────────────────────────────────────────────────────


def test_this_machine_says_what_it_has(machine: Machine, tmp_path: Path) -> None:
    node = look("here", "192.0.2.7", disks=[tmp_path, "/"])
    assert (node.name, node.address, node.gpus, node.labels) == ("here", "192.0.2.7", (), {})
    assert 0 < node.cpus <= (psutil.cpu_count() or 1)
    assert 0 < node.memory <= psutil.virtual_memory().total
    assert node.disks.keys() == {str(tmp_path), "/"}


def test_gpus_are_in_the_order_of_nvml_and_what_is_reserved_is_nobodys(machine: Machine) -> None:
    machine(card(), card(name="NVIDIA L40S", total=45 * GIB, reserved=GIB))
    assert look("here", "x").gpus == (Gpu(0, H100, 80 * GIB), Gpu(1, "NVIDIA L40S", 44 * GIB))


OURS = 7


@pytest.mark.parametrize(
    ("holders", "used", "taken"),
    [
        ([], 0, 0),
        ([process(OURS, 30)], 30, 0),
        ([process(8, 20)], 20, 20),
        ([process(OURS, 30), process(8, 20), process(9, 1)], 51, 21),
        ([process(8, 0.25)], 0.25, 0.25),
        ([process(8, 20)], 20.5, 20),  # the rest is the driver's
        ([process(OURS, 30)], 72, 42),  # by somebody that NVML does not list
        ([], 42, 42),
        ([process(OURS, 30), process(8, None)], 72, 42),  # by somebody of whom it cannot tell
        ([process(8, None)], 0.5, 0.5),
        ([process(OURS, None)], 30, 0),
        ([process(OURS, None), process(8, 20)], 50, 20),
        ([process(OURS, None), process(8, None)], 50, 50),  # whose it is cannot be told, so it is not counted on
    ],
)
def test_taken_is_what_others_hold(machine: Machine, holders: list[object], used: float, taken: float) -> None:
    machine(card(used=int(used * GIB), compute=holders))
    (gpu,) = look("here", "x", is_ours=lambda pid: pid == OURS).gpus
    assert gpu.taken == taken * GIB


def test_a_process_that_draws_counts_and_one_that_also_computes_counts_once(machine: Machine) -> None:
    machine(card(used=12 * GIB, compute=[process(8, 10)], graphics=[process(8, 10), process(9, 2)]))
    assert look("here", "x").gpus[0].taken == 12 * GIB


@pytest.mark.parametrize("error", ["NotSupported", "NoPermission", "FunctionNotFound"])
def test_where_the_driver_lists_no_processes_all_that_is_used_is_taken(machine: Machine, error: str) -> None:
    lists = ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3")
    machine(card(used=42 * GIB, errors=dict.fromkeys(lists, error)))
    assert look("here", "x").gpus == (Gpu(0, H100, 80 * GIB, 42 * GIB),)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"is_divided": True}, "GPU 1 is divided by MIG and left out; `nvidia-smi -i 1 -mig 0`"),
        ({"errors": {"nvmlDeviceGetHandleByIndex": "GpuIsLost"}}, "GPU 1 cannot be read (GPU is lost)"),
        ({"errors": {"nvmlDeviceGetMemoryInfo": "NotSupported"}}, "GPU 1 cannot be read (Not Supported)"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_left_out_and_the_log_says_why(
    machine: Machine, caplog: pytest.LogCaptureFixture, fault: dict[str, object], words: str
) -> None:
    machine(card(is_divided=False), card(**fault), card())
    assert [gpu.index for gpu in look("here", "x").gpus] == [0, 2]
    assert words in caplog.text


@pytest.mark.parametrize("error", ["LibraryNotFound", "DriverNotLoaded"])
def test_a_machine_without_a_driver_is_normal(machine: Machine, caplog: pytest.LogCaptureFixture, error: str) -> None:
    machine(card(), nvmlInit=error)
    assert look("here", "x").gpus == ()
    assert not caplog.records


def test_a_machine_without_the_bindings_is_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert look("here", "x").gpus == ()


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_driver_that_does_not_answer_costs_the_gpus_only(
    machine: Machine, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    machine(card(), **{function: "LibRmVersionMismatch"})
    assert look("here", "x").gpus == ()
    assert "version mismatch" in caplog.text


@pytest.mark.parametrize("errors", [{}, {"nvmlDeviceGetCount": "LibRmVersionMismatch"}])
def test_nvml_is_shut_down_again(machine: Machine, errors: dict[str, str]) -> None:
    machine(card(), **errors)
    look("here", "x")
    import pynvml

    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to CPUs")
def test_another_process_sees_the_same_and_only_the_cpus_it_may_use(machine: Machine) -> None:
    machine(card(used=20 * GIB, compute=[process(8, 20)]))
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from cluster.inventory import look; node = look('there', 'x'); print(node.cpus, node.gpus[0].taken)"
    )
    path = os.pathsep.join([str(DOUBLE), str(ROOT)])
    shown = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert shown.stdout.split() == ["1", str(20 * GIB)], shown.stderr


def test_control_groups_limit_what_there_is(tmp_path: Path) -> None:
    inner = tmp_path / "system.slice" / "nexus.service"
    inner.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("4:memory:/old\n0::/system.slice/nexus.service\n")
    assert inventory._limits(tmp_path, own) == (math.inf, math.inf)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner / "memory.max").write_text("max\n")
    assert inventory._limits(tmp_path, own) == (math.inf, math.inf)
    (inner / "cpu.max").write_text("250000 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner / "memory.max").write_text("1073741824\n")
    (inner.parent / "memory.max").write_text("max\n")
    assert inventory._limits(tmp_path, own) == (1.5, GIB)
    assert inventory._limits(tmp_path, tmp_path / "no Linux") == (math.inf, math.inf)
    own.write_text("0::/\n")
    (tmp_path / "memory.max").write_text("4096\n")
    assert inventory._limits(tmp_path, own) == (math.inf, 4096)


def test_look_keeps_to_its_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(str(64 * 2**20))
    monkeypatch.setattr(inventory, "CGROUPS", tmp_path)
    monkeypatch.setattr(inventory, "OWN_CGROUP", tmp_path / "own")
    node = look("here", "x")
    assert (node.cpus, node.memory) == (0.5, 64 * 2**20)


# ── one against the other ───────────────────────────────────────────────────────────────────────

SARK = Node(
    "sark", "192.0.2.11", 112, 1024 * GIB, tuple(Gpu(index, "H100", 80 * GIB) for index in range(4)),
    {"rack": "2"}, {"/data": 100 * GIB},
)  # fmt: skip
WITNESS = Node("witness", "192.0.2.10", 4, 16 * GIB)
WANTED = Inventory((SARK, WITNESS))
REPORTED = replace(SARK, labels={}, gpus=tuple(Gpu(index, H100, int(79.1 * GIB), 200 * 2**20) for index in range(4)))


def seen(**fields: object) -> Inventory:
    return Inventory((replace(REPORTED, **fields), WITNESS))


def cards(**changes: Gpu) -> tuple[Gpu, ...]:
    return tuple(changes.get(f"_{gpu.index}", gpu) for gpu in REPORTED.gpus)


def test_what_is_as_described_or_better_is_not_mentioned() -> None:
    assert differences(WANTED, seen()) == []
    more = seen(cpus=256, memory=2048 * GIB, disks={"/data": 1024 * GIB, "/": GIB}, labels={"anything": "else"})
    assert differences(WANTED, more) == []
    assert differences(WANTED, seen(memory=int(0.95 * 1024 * GIB), disks={})) == []


@pytest.mark.parametrize(
    ("there", "node", "what", "words"),
    [
        (Inventory((WITNESS,)), "sark", "machine", "sark (192.0.2.11) has not joined: run `nexus node start` there"),
        (
            Inventory((*seen().nodes, Node("tron", "192.0.2.66", 1, GIB))), "tron", "machine",
            "tron (192.0.2.66) has joined and is not described: add it as nodes.tron",
        ),
        (seen(cpus=64), "sark", "cpus", "sark has 64 CPUs, not 112: set nodes.sark.cpus to 64"),
        (seen(memory=512 * GIB), "sark", "memory", "sark has 512.0GiB of memory, not 1.0TiB"),
        (seen(disks={"/data": 99 * GIB}), "sark", "disk", "/data on sark has 99.0GiB free, not 100.0GiB: make room"),
        (seen(gpus=cards()[:1]), "sark", "gpus", "sark has 1 usable GPUs, not 4, and no GPUs 1, 2, 3: `nvidia-smi`"),
        (
            seen(gpus=(cards()[0], *cards()[2:])), "sark", "gpus",
            "sark has 3 usable GPUs, not 4, and no GPU 1: `nvidia-smi` there says why",
        ),
        (
            seen(gpus=(*cards(), Gpu(4, H100, 80 * GIB))), "sark", "gpus",
            "sark also has GPU 4, which Nexus leaves alone: add to nodes.sark.gpus what it may use",
        ),
        (
            seen(gpus=cards(_1=Gpu(1, "NVIDIA A100", 80 * GIB), _2=Gpu(2, "NVIDIA A100", 80 * GIB))), "sark", "model",
            "GPUs 1, 2 of sark: NVIDIA A100, not H100: correct nodes.sark.gpus",
        ),
        (
            seen(gpus=cards(_3=Gpu(3, H100, 40 * GIB))), "sark", "gpu memory",
            "GPU 3 of sark: 40.0GiB of memory, not 80.0GiB: correct nodes.sark.gpus",
        ),
        (
            seen(gpus=cards(_2=Gpu(2, H100, 80 * GIB, 20 * GIB))), "sark", "taken",
            "others hold 20.0GiB of GPU 2 of sark, around which Nexus plans: to have it, end the processes",
        ),
    ],
)  # fmt: skip
def test_each_difference_says_what_where_and_what_to_do(there: Inventory, node: str, what: str, words: str) -> None:
    (difference,) = differences(WANTED, there)
    assert (difference.node, difference.what) == (node, what)
    assert words in difference.sentence


@pytest.mark.parametrize(
    ("described", "reported", "same"),
    [
        ("GPU", H100, True),
        ("H100", H100, True),
        ("nvidia h100 80gb hbm3", H100, True),
        ("A100", "NVIDIA A100-SXM4-80GB", True),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("H100", "NVIDIA A100-SXM4-80GB", False),
    ],
)
def test_a_model_may_be_described_in_short(described: str, reported: str, same: bool) -> None:
    wanted, there = (Inventory((Node("a", "x", 1, 1, (Gpu(0, model, GIB),)),)) for model in (described, reported))
    assert (differences(wanted, there) == []) == same


SIZES = st.integers(0, 2**41)
GPUS = st.lists(st.builds(Gpu, st.just(0), st.sampled_from(["GPU", "H100", H100]), SIZES, SIZES), max_size=4).map(
    lambda gpus: tuple(replace(gpu, index=index) for index, gpu in enumerate(gpus))
)
NODES = st.builds(
    Node, st.sampled_from(["sark", "clu", "witness"]), st.sampled_from(["192.0.2.1", "192.0.2.2"]),
    st.floats(0.5, 256), SIZES, GPUS, st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
    st.dictionaries(st.sampled_from(["/", "/data"]), SIZES),
)  # fmt: skip
INVENTORIES = st.lists(NODES, max_size=3, unique_by=lambda node: node.name).map(lambda nodes: Inventory(tuple(nodes)))


@settings(deadline=None)
@given(INVENTORIES)
def test_equal_inventories_do_not_differ(one: Inventory) -> None:
    assert differences(one, one) == []
    assert real(one, one) == one


@settings(deadline=None)
@given(INVENTORIES, INVENTORIES)
def test_what_is_real_is_described_and_there(wanted: Inventory, there: Inventory) -> None:
    usable = real(wanted, there)
    assert [node.name for node in usable.nodes] == [
        node.name for node in wanted.nodes if node.name in {other.name for other in there.nodes}
    ]
    for node in usable.nodes:
        described, reported = wanted[node.name], there[node.name]
        assert set(node.gpus) <= set(reported.gpus)
        assert {gpu.index for gpu in node.gpus} == {
            gpu.index for gpu in described.gpus if gpu.index in {other.index for other in reported.gpus}
        }
        assert node.cpus == min(described.cpus, reported.cpus)
        assert node.memory == min(described.memory, reported.memory)
        assert (node.labels, node.address) == (described.labels, described.address)
        assert node.disks.keys() == described.disks.keys()
        assert all(node.disks[at] <= min(described.disks[at], reported.disks.get(at, 2**62)) for at in node.disks)


def test_a_gpu_with_somebody_else_on_it_is_not_usable() -> None:
    taken = (0, UNNOTICED_BYTES, UNNOTICED_BYTES + 1, 70 * GIB, 5)
    node = Node("sark", "x", 1, 1, tuple(Gpu(index, H100, 80 * GIB, size) for index, size in enumerate(taken)))
    assert inventory.usable_gpus(node) == (0, 1, 4)
    assert inventory.usable_gpus(WITNESS) == ()


# ── the double is as strict as what it stands for ───────────────────────────────────────────────


def load_module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pynvml", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", module)  # where the real one looks for itself
        spec.loader.exec_module(module)
    return module


def test_the_double_has_nothing_that_nvml_has_not(machine: Machine) -> None:
    double = load_module(DOUBLE / "pynvml.py")
    package = load_module(Path(str(distribution("nvidia-ml-py").locate_file("pynvml.py"))))
    names = [name for name in vars(double) if name.lower().startswith("nvml")]
    assert len([name for name in names if inspect.isfunction(getattr(double, name))]) == 10
    for name in names:
        mine, theirs = getattr(double, name), getattr(package, name)
        if inspect.isfunction(mine):
            assert inspect.signature(mine) == inspect.signature(theirs), name
        elif isinstance(mine, type) and mine is not double.NVMLError:
            assert issubclass(theirs, package.NVMLError)
            assert (mine().value, str(mine())) == (theirs().value, str(theirs())), name
        elif mine is not double.NVMLError:
            assert mine == theirs, name
    machine(card(compute=[process(1, 1)]))
    double.nvmlInit()
    handle = double.nvmlDeviceGetHandleByIndex(0)
    memory = double.nvmlDeviceGetMemoryInfo(handle, version=double.nvmlMemory_v2)
    assert set(vars(memory)) <= {name for name, _ in package.c_nvmlMemory_v2_t._fields_}
    (holder,) = double.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    assert all(hasattr(holder, name) for name, _ in package.c_nvmlProcessInfo_v3_t._fields_[:2])


def test_the_double_refuses_what_nvml_refuses(machine: Machine, tmp_path: Path) -> None:
    double = load_module(DOUBLE / "pynvml.py")
    for call in (double.nvmlShutdown, double.nvmlDeviceGetCount, lambda: double.nvmlDeviceGetHandleByIndex(0)):
        with pytest.raises(double.NVMLError_Uninitialized):
            call()
    machine(card())
    double.nvmlInit()
    with pytest.raises(double.NVMLError_InvalidArgument):
        double.nvmlDeviceGetHandleByIndex(1)
    with pytest.raises(double.NVMLError_InvalidArgument):
        double.nvmlDeviceGetName("GPU 0")
    handle = double.nvmlDeviceGetHandleByIndex(0)
    double.nvmlShutdown()
    with pytest.raises(double.NVMLError_Uninitialized):
        double.nvmlDeviceGetName(handle)
    machine(card(memory=1))
    with pytest.raises(TypeError, match="memory"):
        double.nvmlInit()
