"""What models hold, told from their files: against what torch says, and against what vLLM's documentation counts."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import footprint
from cluster.footprint import of_checkpoint, of_encoder, of_gguf, read_tensors
from nexus.config import Engine
from nexus.errors import ConfigError
from nexus.models import sentence_transformer
from tests.tiny_encoders import write_cross_encoder
from tests.tiny_llama import write_llama
from tests.tiny_models import write_gguf

GIB = 2**30
MINILM = "sentence-transformer:all-MiniLM-L6-v2"
LLAMA_8B = {
    "model_type": "llama", "torch_dtype": "bfloat16", "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}  # fmt: skip


def write_header(file: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """A safetensors file with these tensors (dtype, shape, bytes), its data a hole that takes no room on disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return file


def matrix(rows: int, columns: int, dtype: str = "BF16", bytes_each: float = 2) -> tuple[str, list[int], int]:
    return dtype, [rows, columns], round(rows * columns * bytes_each)


def write_model(folder: Path, config: dict[str, Any], layers: int = 2, **extra: tuple[str, list[int], int]) -> Path:
    """A folder with a config.json and, of a model twice 1,024 wide, an embedding, layers and a head."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": matrix(6400, 1024), "lm_head.weight": matrix(6400, 1024)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = matrix(1024, 1024)
    write_header(folder / "model.safetensors", {**tensors, **extra})
    return folder


SMALL = {
    "torch_dtype": "bfloat16", "num_hidden_layers": 2, "num_attention_heads": 16, "hidden_size": 1024,
    "vocab_size": 6400, "max_position_embeddings": 4096,
}  # fmt: skip
EMBEDDING, LAYER = 6400 * 1024 * 2, 1024 * 1024 * 2


# ── against what is loaded ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("auto", 2)])
def test_the_weights_of_a_llama_are_those_that_torch_counts(tmp_path: Path, dtype: Any, size: int) -> None:
    from transformers import LlamaForCausalLM

    folder = write_llama(tmp_path / "llama", layers=3, hidden=256)
    numbers = sum(one.numel() for one in LlamaForCausalLM.from_pretrained(folder).parameters())
    predicted = of_checkpoint(folder, Engine(dtype=dtype))
    padding = 2 * (448 - 387) * 256  # the vocabulary and the head, to 64 rows
    assert predicted.weights == (numbers + padding) * size
    assert predicted.weights == pytest.approx(numbers * size, rel=0.1)
    assert predicted.cache_bytes_per_token == 3 * 2 * 4 * 64 * size


def test_an_embedder_takes_what_it_was_said_to(tmp_path: Path) -> None:
    """Its own process, once it is loaded, without a cluster of Ray and what working on texts adds."""
    script = (
        "import gc, psutil\nfrom ray import serve\nfrom nexus.models import sentence_transformer\n"
        f"model = sentence_transformer.open({MINILM!r}, threads=1)\n"
        "gc.collect()\nprint(psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    predicted = of_encoder(MINILM, "cpu").weights + footprint.PROCESS - footprint.RAY + footprint.TOKENIZER
    assert predicted == pytest.approx(int(done.stdout), rel=0.1)


def test_the_weights_of_an_encoder_are_those_that_torch_counts(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification, BertModel

    folder = sentence_transformer.find_model(MINILM)[1]
    numbers = sum(one.numel() for one in BertModel.from_pretrained(folder, add_pooling_layer=True).parameters())
    assert of_encoder(MINILM, "cpu").weights == pytest.approx(4 * numbers, rel=0.01)
    assert of_encoder(MINILM, "gpu").weights == of_encoder(MINILM, "cpu").weights
    path = write_cross_encoder(tmp_path / "reranker")
    numbers = sum(one.numel() for one in BertForSequenceClassification.from_pretrained(path).parameters())
    assert of_encoder(f"cross-encoder:{path}", "cpu").weights == pytest.approx(4 * numbers, rel=0.01)


def test_more_at_once_take_more() -> None:
    assert of_encoder(MINILM, "cpu", 8).overhead > of_encoder(MINILM, "cpu", 1).overhead
    one, eight = of_encoder(MINILM, "gpu", 1).overhead, of_encoder(MINILM, "gpu", 8).overhead
    assert eight - one == 7 * 2 * 32768 * (6 * 384 + 2 * 1536)


# ── against what others have counted ────────────────────────────────────────────────────────────


def test_the_cache_and_the_batch_of_llama_3_8b(tmp_path: Path) -> None:
    """vLLM reports 128 KiB a token and, with 256 sequences, a peak of 1.26 GiB (its pull request 10511)."""
    folder = write_model(tmp_path, LLAMA_8B)
    found = of_checkpoint(folder, Engine(max_sequences=256, compiled=False))
    assert found.cache_bytes_per_token == 128 * 2**10 and found.longest == 131072
    assert found.overhead / GIB == pytest.approx(1.26, rel=0.1)
    for sequences, graphs in ((256, 3 + 32 + 16), (64, 3 + 16)):  # CUDA graphs for 1, 2, 4, 8, 16 … sequences
        eager, compiled = (
            of_checkpoint(folder, Engine(max_sequences=sequences, compiled=one)) for one in (False, True)
        )
        assert compiled.overhead - eager.overhead == graphs * 32 * 384 * 2**10
    assert (found.divides_by, found.heads) == (8, 32)


def test_a_batch_goes_through_all_the_experts_it_asks(tmp_path: Path) -> None:
    def batch(**changed: int) -> int:
        return of_checkpoint(
            write_model(tmp_path, {**SMALL, **changed}), Engine(compiled=False, max_sequences=1)
        ).overhead

    dense, mixture = batch(intermediate_size=2048), batch(num_experts_per_tok=8, moe_intermediate_size=1024)
    assert dense == 2 * 4096 * (4 * 1024 + 3 * 2048)  # a batch is no longer than one sequence
    assert mixture == 2 * 4096 * (4 * 1024 + 3 * 8192)


@pytest.mark.parametrize(
    ("changed", "numbers", "divides_by"),
    [
        ({}, 2 * 16 * 64, 16),  # every head its own
        ({"num_key_value_heads": 4}, 2 * 4 * 64, 4),
        ({"num_key_value_heads": 4, "head_dim": 128}, 2 * 4 * 128, 4),
        ({"head_dim": None, "num_kv_heads": 2}, 2 * 2 * 64, 2),
        ({"multi_query": True}, 2 * 64, 1),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 576, 1),
    ],
)  # fmt: skip
def test_the_cache_by_the_kind_of_attention(
    tmp_path: Path, changed: dict[str, Any], numbers: int, divides_by: int
) -> None:
    found = of_checkpoint(write_model(tmp_path, {**SMALL, **changed}), Engine())
    assert (found.cache_bytes_per_token, found.divides_by) == (2 * numbers * 2, divides_by)


def test_the_cache_of_what_has_no_attention_or_looks_nowhere_back(tmp_path: Path) -> None:
    hybrid = {**SMALL, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    assert of_checkpoint(write_model(tmp_path, hybrid), Engine()).cache_bytes_per_token == 2 * 16 * 64 * 2
    assert of_checkpoint(write_model(tmp_path, {**SMALL, "model_type": "bert"}), Engine()).cache_bytes_per_token == 0


def test_a_language_model_inside_another(tmp_path: Path) -> None:
    nested = {
        "vision_config": {"hidden_size": 8},
        "torch_dtype": "bfloat16",
        "text_config": {**SMALL, "num_key_value_heads": 2},
    }
    seen = write_model(tmp_path, nested, **{"vision.layers.0.weight": matrix(64, 64)})
    found = of_checkpoint(seen, Engine())
    assert found.cache_bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert found.weights == 2 * EMBEDDING + 2 * LAYER + 64 * 64 * 2


@pytest.mark.parametrize(
    ("changed", "longest"),
    [
        ({}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 4096),
        ({"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
    ],
)
def test_the_longest_request_where_nobody_says(tmp_path: Path, changed: dict[str, Any], longest: int) -> None:
    folder = write_model(tmp_path, {**SMALL, **changed})
    assert of_checkpoint(folder, Engine()).longest == longest
    assert of_checkpoint(folder, Engine(max_model_len=100)).longest == 100


# ── dtypes, quantised weights, several GPUs ─────────────────────────────────────────────────────


def test_the_dtype_is_the_engines(tmp_path: Path) -> None:
    folder = write_model(tmp_path, SMALL)
    stored = 2 * EMBEDDING + 2 * LAYER
    assert of_checkpoint(folder, Engine()).weights == stored
    assert of_checkpoint(folder, Engine(dtype="float32")).weights == 2 * stored
    unsaid = write_model(tmp_path, {key: value for key, value in SMALL.items() if key != "torch_dtype"})
    assert of_checkpoint(unsaid, Engine()).weights == stored


def test_quantised_weights_keep_their_size(tmp_path: Path) -> None:
    packed = matrix(128, 1024, "I32", 4)
    config = {**SMALL, "quantization_config": {"quant_method": "awq"}}
    folder = write_model(tmp_path, config, **{"model.layers.0.mlp.down_proj.qweight": packed})
    assert of_checkpoint(folder, Engine(dtype="float32")).weights == 2 * (2 * EMBEDDING + 2 * LAYER) + 128 * 1024 * 4
    assert of_checkpoint(folder, Engine(quantization="fp8")).weights == 2 * EMBEDDING + 2 * LAYER + 128 * 1024 * 4
    plain = write_model(tmp_path, SMALL)
    assert of_checkpoint(plain, Engine(quantization="fp8")).weights == 2 * EMBEDDING + LAYER
    assert of_checkpoint(plain, Engine(quantization="awq")).weights == 2 * EMBEDDING + 2 * LAYER


def test_a_head_that_is_the_embedding_counts_once(tmp_path: Path) -> None:
    tied = write_model(tmp_path, {**SMALL, "tie_word_embeddings": True})
    assert of_checkpoint(tied, Engine()).weights == EMBEDDING + 2 * LAYER


def test_a_vocabulary_is_padded(tmp_path: Path) -> None:
    odd = write_model(tmp_path, {**SMALL, "vocab_size": 6401}, **{"x.weight": matrix(6401, 1024)})
    assert of_checkpoint(odd, Engine()).weights == 2 * EMBEDDING + 2 * LAYER + 6464 * 1024 * 2


def test_ranks_past_the_kv_heads_repeat_the_cache(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {**SMALL, "num_key_value_heads": 2})
    one, two, four = (of_checkpoint(folder, Engine(tensor_parallel=ranks)) for ranks in (1, 2, 4))
    assert one.cache_bytes_per_token == two.cache_bytes_per_token == four.cache_bytes_per_token // 2
    assert one.weights == four.weights and one.overhead > four.overhead and one.beside < four.beside


def test_the_largest_stage_of_a_pipeline_counts(tmp_path: Path) -> None:
    """Of three layers two are in one stage, with the embedding or with the head."""
    folder = write_model(tmp_path, {**SMALL, "num_hidden_layers": 3}, layers=3)
    found = of_checkpoint(folder, Engine(pipeline_parallel=2))
    assert found.weights == 2 * (2 * LAYER + EMBEDDING)
    assert found.cache_bytes_per_token == 2 * 2 * 2 * 16 * 64 * 2


def test_an_engine_on_a_cpu_has_processes_for_overhead(tmp_path: Path) -> None:
    found = of_checkpoint(write_model(tmp_path, SMALL), Engine(device="cpu"))
    assert (found.overhead, found.beside) == (3 * footprint.ENGINE_PROCESS, 0)
    assert footprint.cpu_cache(Engine(device="cpu", cpu_cache_bytes=3 * GIB + 1)) == 3 * GIB


# ── files ───────────────────────────────────────────────────────────────────────────────────────


def test_no_weight_is_read(tmp_path: Path) -> None:
    """Seventy gigabytes of holes are looked at in an instant."""
    folder = write_model(tmp_path, SMALL, **{f"model.layers.{n}.x": matrix(2**16, 2**16) for n in range(8)})
    assert of_checkpoint(folder, Engine()).weights > 64 * GIB


def test_a_model_in_several_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path, SMALL)
    write_header(folder / "model-2.safetensors", {"model.layers.0.b": matrix(1024, 1024)})
    write_header(folder / "consolidated.safetensors", {"layers.0.w2": matrix(1024, 1024)})  # the same by other names
    assert of_checkpoint(folder, Engine()).weights == 2 * EMBEDDING + 3 * LAYER
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert of_checkpoint(folder, Engine()).weights == 2 * EMBEDDING + 2 * LAYER
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"there is no model\.safetensors, which its index names"):
        of_checkpoint(folder, Engine())


def test_files_of_torch_count_by_their_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "pytorch_model-1.bin").write_bytes(bytes(3000))
    (tmp_path / "pytorch_model-2.bin").write_bytes(bytes(1000))
    (tmp_path / "training_args.bin").write_bytes(bytes(9000))
    (tmp_path / "optimizer.pt").write_bytes(bytes(9000))
    assert of_checkpoint(tmp_path, Engine()).weights == 4000
    assert of_checkpoint(tmp_path, Engine(dtype="float32")).weights == 8000


def test_a_folder_that_is_not_there_or_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'vllm:/m': there is no folder .*nowhere on this machine"):
        of_checkpoint(tmp_path / "nowhere", Engine(), "'vllm:/m'")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: No such file"):
        of_checkpoint(tmp_path, Engine())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        of_checkpoint(tmp_path, Engine())
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds no JSON object"):
        of_checkpoint(tmp_path, Engine())
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(ConfigError, match="there are no weights"):
        of_checkpoint(tmp_path, Engine())


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"])
def test_a_config_that_lacks_something(tmp_path: Path, key: str) -> None:
    folder = write_model(tmp_path, {name: value for name, value in SMALL.items() if name != key})
    with pytest.raises(ConfigError, match=f"has no {key}"):
        of_checkpoint(folder, Engine())
    without = write_model(tmp_path, {**SMALL, "max_position_embeddings": None})
    with pytest.raises(ConfigError, match="set max_model_len"):
        of_checkpoint(without, Engine())


def framed(header: bytes, data: int = 0) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        framed(b"{]"),
        framed(b"[]"),
        framed(b'{"a": 1}'),
        framed(b'{"a": {"dtype": "F32"}}'),
        framed(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', 35),
    ],
)
def test_a_damaged_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"'m': model\.safetensors is damaged or not whole"):
        list(read_tensors(tmp_path, "'m'"))


def test_a_file_that_is_cut_off_by_a_byte(tmp_path: Path) -> None:
    folder = write_model(tmp_path, SMALL)
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(ConfigError, match="damaged or not whole"):
        of_checkpoint(folder, Engine())


# ── GGUF, encoders ──────────────────────────────────────────────────────────────────────────────


def test_a_gguf_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", layers=3, width=64, heads=4)
    found = of_gguf(f"gguf:{file}", 4096)
    assert (found.weights, found.longest) == (file.stat().st_size, 4096)
    assert found.cache_bytes_per_token == 3 * 2 * 64 * 2


@pytest.mark.parametrize("kept", [5, 30, 100])
def test_a_gguf_file_that_is_cut_off(tmp_path: Path, kept: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"header of .* is damaged"):
        of_gguf(f"gguf:{file}", 4096)
    with pytest.raises(ConfigError, match="names no file"):
        of_gguf(f"gguf:{tmp_path}/none.gguf", 4096)


@pytest.mark.parametrize("scheme", ["sentence-transformer", "cross-encoder"])
def test_an_encoder_that_is_not_here(scheme: str) -> None:
    with pytest.raises(ConfigError, match=f"'{scheme}:/models/none': there is no folder /models/none on this machine"):
        of_encoder(f"{scheme}:/models/none", "cpu")
