"""The embedder in int8: its vectors, its graph in the cache, the choice of a precision, and whose collection it is."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from nexus import embedders, precision, quantized
from nexus.chunking import ChunkSettings
from nexus.config import Config
from nexus.errors import ConfigError, Conflict
from nexus.hades import Hades
from nexus.ingest import Ingestor
from nexus.models import sentence_transformer
from nexus.models.sentence_transformer import SentenceTransformerEmbedder
from nexus.parsing import Limits, Parsers
from nexus.ports import InputType, LiveIndex
from nexus.retrieval import RetrievalSettings, Retriever
from nexus.types import INT8, SearchRequest, Vectors, model_of
from tests.conftest import ALICE, House
from tests.tiny_encoders import save_tiny
from tests.words import WordEmbedder

RUN = subprocess.run
ADDRESS = "sentence-transformer:all-MiniLM-L6-v2"
TEXTS = [
    "", "a", "?", "Restart the service.", "How do I reset my password?", "3.14159 2.71828 1.41421",
    "Ein Satz auf Deutsch über Größe und Maß.", "Данные хранятся на диске.", "def add(a, b):\n    return a + b",
    "| torque | 110 Nm |\n| pitch | 1.5 mm |", "The wheel nuts of the trailer need 110 Nm of torque.",
    "Nitric oxide synthase inhibitors lower the pressure in a small group of patients. " * 4,
    "The pump stops when the tank is full and starts again below the lower mark. " * 40,
]  # fmt: skip


@pytest.fixture(scope="module")
def reduced() -> SentenceTransformerEmbedder:
    return sentence_transformer.open(ADDRESS, threads=1, precision="int8")


@pytest.fixture(scope="module")
def exact() -> SentenceTransformerEmbedder:
    return sentence_transformer.open(ADDRESS, threads=1, precision="fp32")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return quantized.cache_folder()


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    return lambda pooling: save_tiny(tmp_path_factory.mktemp(pooling) / "tiny-bert", BertModel, config, pooling)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.sum(left * right, axis=1)


# Vectors


def test_they_are_nearly_those_of_fp32(
    reduced: SentenceTransformerEmbedder, exact: SentenceTransformerEmbedder
) -> None:
    found = reduced.embed(TEXTS)
    assert found.shape == (len(TEXTS), reduced.dimension) == (len(TEXTS), 384) and found.dtype == np.float32
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert cosines(found, exact.embed(TEXTS)).min() >= 0.97
    assert (reduced.precision, exact.precision) == ("int8", "fp32")
    assert (reduced.max_tokens, reduced.count_tokens(TEXTS)) == (exact.max_tokens, exact.count_tokens(TEXTS))


def test_a_vector_does_not_depend_on_its_neighbours(reduced: SentenceTransformerEmbedder) -> None:
    together = reduced.embed(TEXTS)
    assert np.array_equal(together, np.concatenate([reduced.embed([text]) for text in TEXTS]))
    assert np.array_equal(together[::-1], reduced.embed(TEXTS[::-1]))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_model_in_a_folder_is_pooled_as_it_says(tiny_bert: Callable[[str], Path], cache: Path, pooling: str) -> None:
    address = f"sentence-transformer:{tiny_bert(pooling)}"
    expected = sentence_transformer.open(address, precision="fp32").embed(TEXTS)
    assert cosines(sentence_transformer.open(address, precision="int8").embed(TEXTS), expected).min() >= 0.98
    (graph,) = cache.glob("int8-*.onnx")
    assert graph.stat().st_mode & 0o077 == 0


def test_what_is_no_plain_bert_is_refused(tmp_path: Path, cache: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    folder = save_tiny(tmp_path / "distil", DistilBertModel, config, "mean")
    with pytest.raises(ConfigError, match=r"'distil' is not a BERT encoder.*models\.precision"):
        sentence_transformer.open(f"sentence-transformer:{folder}", precision="int8")


def test_a_graph_that_does_not_agree_is_refused(
    tiny_bert: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bert("mean")
    make = quantized.make_graph
    monkeypatch.setattr(quantized, "make_graph", lambda *given: make(*given[:-1], given[-1][::-1]))
    with pytest.raises(ConfigError, match="cosine"):
        sentence_transformer.open(f"sentence-transformer:{folder}", precision="int8")


def test_rounding_is_never_worse_than_by_the_largest_weight_alone() -> None:
    weight = np.random.default_rng(5).standard_t(3, size=(1536, 40)).astype(np.float32)
    weight[:, 7] = 0
    rounded, scales = quantized.quantize(weight)
    plain = np.maximum(np.abs(weight).max(axis=0), 1e-30) / 64
    errors = ((rounded * scales - weight) ** 2).sum(axis=0)
    others = ((np.rint(weight / plain) * plain - weight) ** 2).sum(axis=0)
    assert rounded.dtype == np.int8 and np.abs(rounded).max() == 64
    assert (errors <= others * 1.0001).all() and errors.sum() < others.sum()
    assert np.isfinite(scales).all() and not rounded[:, 7].any()


def test_from_the_cache_it_needs_no_torch(reduced: SentenceTransformerEmbedder) -> None:
    script = f"""
import sys
from nexus.models import sentence_transformer
print(sentence_transformer.open({ADDRESS!r}, precision="int8").embed(["hello world"]).shape)
print(sorted({{"torch", "transformers", "onnx"}} & sys.modules.keys()))
"""
    done = RUN([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(1, 384)", "[]"]


# The cache


def test_what_is_kept_is_made_once(cache: Path) -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"the graph"

    assert [quantized.keep("it", make) for _ in range(3)] == [b"the graph"] * 3
    assert len(made) == 1
    assert [path.name for path in cache.iterdir()] == ["it"], "and nothing half-written is left"


@pytest.mark.parametrize(
    "harm",
    [lambda it: b"", lambda it: it[:10], lambda it: it[:-1], lambda it: it + b"x", lambda it: it[:-1] + b"X"],
    ids=["empty", "torn at its head", "torn", "longer", "another byte"],
)
def test_a_damaged_file_is_made_anew(cache: Path, harm: Callable[[bytes], bytes]) -> None:
    quantized.keep("it", lambda: b"the graph")
    path = cache / "it"
    path.write_bytes(harm(path.read_bytes()))
    assert quantized.keep("it", lambda: b"another") == b"another"
    assert quantized.keep("it", lambda: b"a third") == b"another"


def test_where_nothing_can_be_written_it_is_made_each_time(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert quantized.keep("it", lambda: b"the graph") == b"the graph"
    assert quantized.keep("it", lambda: b"another") == b"another"


def test_several_processes_at_once_each_get_a_whole_one(cache: Path) -> None:
    script = """
import sys
from nexus import quantized
for turn in range(20):
    found = quantized.keep("it", lambda: sys.argv[1].encode() * 2_000_000)
    assert len(found) == 2_000_000 and len(set(found)) == 1
    (quantized.cache_folder() / "it").unlink(missing_ok=True)
"""
    started = [subprocess.Popen([sys.executable, "-c", script, name]) for name in "abc"]
    assert [one.wait() for one in started] == [0, 0, 0]
    assert list(cache.iterdir()) == [], "and nothing half-written is left"


def test_other_libraries_other_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = quantized.name_of("model@1")
    assert quantized.name_of("model@1") == before != quantized.name_of("model@2")
    monkeypatch.setattr(quantized.metadata, "version", lambda name: "9.9")
    assert quantized.name_of("model@1") != before


# The choice


def trial(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """In place of the trial, some Python."""
    monkeypatch.setattr(
        precision.subprocess, "run", lambda command, **rest: RUN([sys.executable, "-c", script], **rest)
    )


def choose() -> tuple[str | None, list[str]]:
    """What is chosen then, and what was told."""
    told: list[str] = []
    precision.choose(ADDRESS, told.append)
    return precision.chosen(ADDRESS), told


@pytest.mark.parametrize("chosen", ["int8", "bf16"])
def test_it_is_tried_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    trial(monkeypatch, f"print('a word before'); print('{json.dumps({'chosen': chosen, 'int8_over_bf16': 2.0})}')")
    assert choose() == (chosen, ["Trying once whether all-MiniLM-L6-v2 is faster in int8 here …"])
    trial(monkeypatch, "raise SystemExit(1)")
    assert choose() == (chosen, [])


@pytest.mark.parametrize(
    "script",
    [
        "raise RuntimeError('no such operator')", "import os; os.abort()", "", "print('no JSON')",
        "print('{\"chosen\": \"int4\"}')", "print('[]')",
    ],
)  # fmt: skip
def test_a_trial_that_fails_changes_nothing_and_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    trial(monkeypatch, script)
    with caplog.at_level(logging.WARNING):
        assert choose()[0] is None
    assert len(caplog.records) == 1 and "stays at bf16" in caplog.text
    trial(monkeypatch, 'print(\'{"chosen": "int8"}\')')
    assert choose()[0] == "int8"


def test_a_trial_that_takes_too_long_changes_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "TRIAL_SECONDS", 0.1)
    trial(monkeypatch, "import time; time.sleep(60)")
    assert choose()[0] is None and "could not be tried" in caplog.text


def test_a_damaged_choice_is_made_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(monkeypatch, 'print(\'{"chosen": "int8"}\')')
    choose()
    (kept,) = cache.glob("precision-*.json")
    kept.write_bytes(kept.read_bytes()[:-3])
    trial(monkeypatch, 'print(\'{"chosen": "bf16"}\')')
    assert choose()[0] == "bf16" and len(choose()[1]) == 0


@pytest.mark.parametrize(("times", "chosen"), [(3.0, "int8"), (precision.WORTH, "int8"), (1.1, "bf16"), (0.5, "bf16")])
def test_the_trial_chooses_by_speed(
    tiny_bert: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], times: float, chosen: str,
) -> None:  # fmt: skip
    seen: list[str] = []
    monkeypatch.setattr(
        precision, "speed_over", lambda one, other: (seen.extend([one.fingerprint, other.fingerprint]), times)[1]
    )
    precision.main(f"sentence-transformer:{tiny_bert('mean')}")
    assert json.loads(capsys.readouterr().out)["chosen"] == chosen
    assert seen == [seen[1] + INT8, seen[1]]


def test_the_trial_measures_what_each_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Taking:
        def __init__(self, passages: float, questions: float) -> None:
            self.passages, self.questions = passages, questions

        def embed(self, texts: Sequence[str]) -> None:
            clock[0] += self.questions if len(texts) == 1 else self.passages

    monkeypatch.setattr(precision.time, "thread_time", lambda: clock[0])
    assert precision.speed_over(Taking(1.0, 1.0), Taking(3.0, 3.0)) == pytest.approx(3)
    assert precision.speed_over(Taking(5.0, 1.0), Taking(5.0, 4.0)) == pytest.approx(2)
    assert precision.speed_over(Taking(8.0, 1.0), Taking(2.0, 4.0)) == pytest.approx(1)


def test_what_cannot_be_kept_is_not_chosen(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    trial(monkeypatch, 'print(\'{"chosen": "int8"}\')')
    assert choose()[0] is None and "cannot be kept" in caplog.text


@pytest.mark.parametrize(("kept", "expected"), [("int8", "int8"), ("bf16", "bf16"), (None, "bf16")])
def test_only_auto_of_an_embedder_of_ours_on_a_cpu_is_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str | None, expected: str
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(precision, "chosen", lambda address: kept)
    monkeypatch.setattr(precision, "choose", lambda address, tell: tried.append(address))
    served = [
        {"address": "sentence-transformer:/a", "task": "embed", "name": "a"},
        {"address": "sentence-transformer:/b", "task": "embed", "name": "b", "precision": "fp32"},
        {"address": "sentence-transformer:/c", "task": "embed", "name": "c", "device": "gpu"},
        {"address": "openai:http://localhost:1#d", "task": "embed", "name": "d"},
        {"address": "extractive:", "name": "e"},
    ]
    config = Config(home=tmp_path, models={"served": served})
    models = precision.resolved(config).models
    assert [models.precision, *(one.precision for one in models.served)] == [expected, expected, "fp32", *["auto"] * 3]
    assert [one.precision for one in models.of_task("embed")][:2] == [expected, expected]
    precision.settle(config, print)
    assert tried == [ADDRESS, "sentence-transformer:/a"]
    for settings in ({"embedder_device": "gpu"}, {"precision": "bf16"}, {"precision": "int8"}):
        said = Config(home=tmp_path, models=settings)
        assert precision.resolved(said).models == said.models
        precision.settle(said, pytest.fail)
    assert len(tried) == 2


def test_a_model_that_is_elsewhere_is_not_tried(cache: Path) -> None:
    precision.choose("sentence-transformer:/nowhere", pytest.fail)
    assert precision.chosen("sentence-transformer:/nowhere") is None


def test_what_cannot_be_read_is_not_tried(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("modules.json", "tokenizer.json"):
        (tmp_path / file).write_text("{ damaged")
    precision.choose(f"sentence-transformer:{tmp_path}", pytest.fail)
    assert precision.chosen(f"sentence-transformer:{tmp_path}") is None
    monkeypatch.setattr(precision, "LIBRARIES", ("a-library-that-is-missing",))
    precision.choose(ADDRESS, pytest.fail)
    assert precision.chosen(ADDRESS) is None


# Collections keep theirs


def test_an_index_is_asked_with_the_kind_that_made_it(
    tmp_path: Path, exact: SentenceTransformerEmbedder, reduced: SentenceTransformerEmbedder
) -> None:
    assert reduced.fingerprint == exact.fingerprint + INT8
    assert model_of(reduced.fingerprint) == model_of(exact.fingerprint) == exact.fingerprint
    others = embedders.of_config(Config(home=tmp_path, models={"precision": "int8"}), threads=1)
    configured = others.open(ADDRESS)
    for made_by in (exact, reduced):
        found = others.of(LiveIndex("index", made_by.fingerprint, ADDRESS, 384))
        assert found.fingerprint == made_by.fingerprint
        assert cosines(found.embed(TEXTS[:3]), made_by.embed(TEXTS[:3])).min() >= 0.999
    assert configured is others.of(LiveIndex("index", reduced.fingerprint, ADDRESS, 384))
    with pytest.raises(Conflict) as refused:
        others.of(LiveIndex("index", exact.fingerprint + "+int4", ADDRESS, 384))
    assert refused.value.code == "embedder_changed"


class Turned(WordEmbedder):
    """The other vectors of the same model: whoever compares both kinds finds the worst first."""

    fingerprint = WordEmbedder.fingerprint + INT8

    def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        return -super().embed(texts, input_type)


def open_kind(address: str, fingerprint: str | None) -> WordEmbedder:
    return WordEmbedder() if fingerprint == WordEmbedder.fingerprint else Turned()


def test_a_collection_goes_on_with_the_kind_it_began_with(house: House) -> None:
    """Also one of a time in which nobody noted embedders."""
    house.put("valves.md", "The valve opens at four bar.", "Bananas are yellow.")
    documents, vectors = house.hades.documents, house.hades.vectors
    hades = Hades(documents, vectors, Turned.fingerprint, Turned.dimension, embedder="words:")
    others = embedders.Embedders(open_kind)
    retriever = Retriever(hades, Turned(), RetrievalSettings(), None, others)
    request = SearchRequest("which valve opens", embedding_weight=1.0, text_weight=0.0)
    best = retriever.search(request, ALICE).hits[0]
    assert "valve" in best.text and best.cosine > 0
    steps = Ingestor(hades, Parsers(Limits()), Turned().embed, lambda texts: [1] * len(texts), ChunkSettings(), others)
    own, _ = hades.written("default")
    assert own.fingerprint == WordEmbedder.fingerprint
    assert np.array_equal(steps.embed_for(own, ["valve"]), WordEmbedder().embed(["valve"]))
    assert hades.open_collection("new").fingerprint == Turned.fingerprint
    assert np.array_equal(steps.embed_for(hades.written("new")[0], ["valve"]), Turned().embed(["valve"]))
    retriever.close()


def test_a_collection_of_another_model_is_refused_as_ever(house: House) -> None:
    house.put("valves.md", "The valve opens at four bar.")
    hades = Hades(house.hades.documents, house.hades.vectors, "another" + INT8, 4, embedder="words:")
    with pytest.raises(Conflict) as refused:
        hades.find_collection("default")
    assert refused.value.code == "embedder_changed"
