"""How much memory a model takes, told from its files: headers and config.json, no weight is read.

Of each GPU, an engine has to find room in `memory_utilization` of its memory for

    weights / GPUs + overhead + KV cache

    weights    what the files hold, as vLLM keeps it: floating-point numbers in the dtype of the engine (`auto`: that
               of the checkpoint, but two bytes for four), quantised ones as they are, vocabularies padded to 64 rows.
               Of a pipeline, what its largest stage holds.
    KV cache   per token and layer 2 * KV heads * head size numbers, or one latent where attention is multi-head
               latent; on each tensor-parallel rank its heads, at least one
    overhead   the larger of what one batch of T tokens needs on its way through a layer, and what S sequences need
               when their next tokens are drawn, and the CUDA graphs:
               max(bytes * T * (4 * hidden + 3 * width / ranks), 40 * S * vocabulary) + graphs * layers * 384 KiB

The 40 bytes are those of logits, their sorted copies, indices and probabilities: with 256 sequences and Llama 3 8B
vLLM reports a peak of 1.26 GiB on one GPU and on each of two, and this says the same. Beside that share, which vLLM
does not count, are the CUDA context and, where GPUs talk to each other, NCCL's buffers. On a CPU, overhead is the
processes themselves, as measured (tests/bench/footprint.py).
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cluster.plan import Footprint
from nexus.config import Engine
from nexus.errors import ConfigError
from nexus.models import gguf, sentence_transformer
from nexus.models.vllm import environment

MIB, GIB = 2**20, 2**30
RAY = 48 * MIB  # of a worker of Ray, with Serve and what it has mapped of the object store
PROCESS = 384 * MIB + RAY  # Python, torch and Ray: a replica before it loads a model
CUDA_PROCESS = 1536 * MIB  # what CUDA's libraries and weights on their way to a GPU add to a process
ENGINE_PROCESS = 640 * MIB  # of vLLM in host memory: the replica, its core and each worker are one each
TOKENIZER = 32 * MIB
KERNELS = 272 * MIB  # of oneDNN for all lengths of texts, and what glibc keeps
WORKING = 9  # bytes per token of a batch and number of a layer's states, on a CPU
CPU_TOKENS = 2048  # of a batch of a small model on a CPU
GPU_TOKENS = 32_768  # of a batch of a small model on a GPU
GGUF_BUFFERS = 256 * MIB  # of llama.cpp, for a batch
CONTEXT = 512 * MIB  # of CUDA on a GPU, with torch's kernels
COMMUNICATION = 512 * MIB  # NCCL's buffers
GRAPH = 384 * 2**10  # of one CUDA graph and layer; vLLM reports 0.16 to 0.4 MiB
DRAWING = 40  # bytes per sequence and word of the vocabulary
BATCH = {"gpu": 8192, "cpu": 2048}  # tokens, where the engine chooses
VOCABULARY_ROWS = 64
HEADER_BYTES = 100 * MIB  # the most that the format allows

CROSS_ENCODER = "cross-encoder:"

Device = Literal["gpu", "cpu"]
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "half": 2, "float": 4}
QUANTIZED_WHILE_LOADING = {"fp8": 1.0, "bitsandbytes": 0.5625}  # bytes per number of a layer's matrices
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler)[^/]*$")
LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.\d+\.")
FIRST = re.compile(r"embed|wte|wpe|vision|visual")  # what the first stage of a pipeline has
WITHOUT_CACHE = {"bert", "roberta", "xlm-roberta", "modernbert", "distilbert", "nomic_bert", "new"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a header says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: int  # bytes

    @property
    def numbers(self) -> int:
        return prod(self.shape)


# Engines


def of_checkpoint(folder: Path, engine: Engine, name: str = "") -> Footprint:
    """What one replica of a vLLM engine takes. `name` is how messages call the model, by default its folder.

    Raises ConfigError where the folder holds no model, a damaged one, or one whose config.json lacks something.
    """
    config = Architecture.read(folder, name or str(folder))
    tensors = list(read_tensors(folder, config.name))
    size = _dtype_bytes(config, tensors, engine)
    gpus = engine.tensor_parallel * engine.pipeline_parallel
    longest = engine.max_model_len or config.longest
    if engine.device == "cpu":
        overhead, beside = host_memory(engine), 0
    else:
        overhead = _overhead(config, engine, longest, size)
        beside = CONTEXT + (COMMUNICATION if gpus > 1 else 0)
    weights = _stage(config, _weights(folder, config, tensors, engine, size), engine)
    per_token = _cache_of_token(config, engine, size)
    return Footprint(weights, overhead, per_token, longest, beside, config.divides_by, config.heads)


def host_memory(engine: Engine) -> int:
    """Of the processes of one replica, beside weights and cache on a CPU."""
    workers = engine.tensor_parallel * engine.pipeline_parallel
    return (workers + 2) * ENGINE_PROCESS + (workers * CUDA_PROCESS if engine.device == "gpu" else 0)


def cpu_cache(engine: Engine) -> int:
    """Bytes that an engine on a CPU keeps for its KV cache: whole GiB, as vLLM is told."""
    return int(environment(engine)["VLLM_CPU_KVCACHE_SPACE"]) * GIB


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a config.json says, under whichever of its keys; of a model that sees or hears, its language part."""

    name: str
    values: Mapping[str, Any]  # of the whole
    text: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str) -> "Architecture":
        """Raises ConfigError."""
        values = _read_config(folder, name)
        nested = next(
            (values[key] for key in ("text_config", "llm_config", "language_config") if key in values), values
        )
        return cls(name, values, nested if isinstance(nested, Mapping) else values)

    def number(self, *keys: str, default: int | None = None) -> int:
        """The first of these that is there. Raises ConfigError where none is and there is no default."""
        for key in keys:
            value = self.text.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                return int(value)
        if default is None:
            raise ConfigError(f"{self.name}: its config.json has no {keys[0]}, without which its memory is unknown")
        return default

    @property
    def layers(self) -> int:
        return self.number("num_hidden_layers", "n_layer", "num_layers", "n_layers")

    @property
    def cached_layers(self) -> int:
        """Those whose attention looks back."""
        kinds = self.text.get("layer_types")
        if not isinstance(kinds, list):
            return self.layers
        return sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)

    @property
    def hidden(self) -> int:
        return self.number("hidden_size", "n_embd", "d_model", "dim")

    @property
    def heads(self) -> int:
        return self.number("num_attention_heads", "n_head", "n_heads", "num_heads")

    @property
    def vocabulary(self) -> int:
        return self.number("vocab_size")

    @property
    def is_latent(self) -> bool:
        return bool(self.text.get("kv_lora_rank"))

    @property
    def divides_by(self) -> int:
        """KV heads: all heads, where attention is neither grouped nor has one for all."""
        if self.is_latent:
            return 1
        if self.text.get("multi_query") and not self.text.get("new_decoder_architecture"):
            return 1
        keys = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "n_kv_heads")
        return self.number(*keys, default=self.heads)

    @property
    def numbers_per_head(self) -> int:
        """What the cache keeps of one token, head and layer."""
        if self.is_latent:
            return self.number("kv_lora_rank") + self.number("qk_rope_head_dim", default=0)
        size = self.number("head_dim", "hidden_size_per_head", default=0)
        return 2 * (size or self.hidden // self.heads)

    @property
    def width(self) -> int:
        """Of what is between a layer's two matrices, of a mixture that of all experts asked."""
        dense = self.number("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * self.hidden)
        asked = self.number("num_experts_per_tok", "moe_topk", default=0)
        return max(dense, asked * self.number("moe_intermediate_size", default=dense)) if asked else dense

    @property
    def longest(self) -> int:
        """How many tokens vLLM takes where nobody says."""
        keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
        found = [int(self.text[key]) for key in keys if isinstance(self.text.get(key), int)]
        if not found:
            raise ConfigError(f"{self.name}: its config.json has no {keys[0]}; set max_model_len")
        scaling = self.text.get("rope_scaling") or self.text.get("rope_parameters")
        scaling = scaling if isinstance(scaling, Mapping) else {}
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind == "longrope":
            return self.number("original_max_position_embeddings", default=min(found))
        return int(min(found) * (scaling.get("factor") or 1) if kind in ("linear", "dynamic") else min(found))


def _dtype_bytes(config: Architecture, tensors: list[Tensor], engine: Engine) -> int:
    """Of one number, as the engine calculates."""
    if engine.dtype != "auto":
        return DTYPES[engine.dtype]
    known = (part.get(key) for part in (config.values, config.text) for key in ("dtype", "torch_dtype"))
    stated = next((str(value).removeprefix("torch.") for value in known if value), None)
    if stated in DTYPES:
        return min(2, DTYPES[stated])
    stored = [FLOATS[tensor.dtype] for tensor in tensors if tensor.dtype in FLOATS]
    return min(2, max(stored, default=4))


def _weights(folder: Path, config: Architecture, tensors: list[Tensor], engine: Engine, size: int) -> dict[str, float]:
    """Bytes as the engine keeps them, by the name of the tensor."""
    if not tensors:
        return {"": _pickled(folder, config) * size}
    is_tied = bool(config.values.get("tie_word_embeddings", config.text.get("tie_word_embeddings", False)))
    is_quantized = any("quantization_config" in part for part in (config.values, config.text))
    smaller = None if is_quantized else QUANTIZED_WHILE_LOADING.get(engine.quantization or "")
    vocabulary = config.vocabulary
    found: dict[str, float] = {}
    for tensor in tensors:
        if is_tied and tensor.name.endswith("lm_head.weight"):
            continue
        kept = tensor.numbers * size if tensor.dtype in FLOATS else tensor.stored
        if smaller and len(tensor.shape) == 2 and LAYER.search(tensor.name) and tensor.dtype in FLOATS:
            found[tensor.name] = tensor.numbers * smaller
        elif len(tensor.shape) == 2 and tensor.shape[0] == vocabulary:
            rows = ceil(vocabulary / VOCABULARY_ROWS) * VOCABULARY_ROWS
            found[tensor.name] = kept * rows / vocabulary
        else:
            found[tensor.name] = kept
    return found


def _stage(config: Architecture, weights: Mapping[str, float], engine: Engine) -> int:
    """Bytes over all GPUs, were each stage of the pipeline like the largest."""
    stages = engine.pipeline_parallel
    if stages == 1:
        return round(sum(weights.values()))
    layered = sum(size for name, size in weights.items() if LAYER.search(name))
    first = sum(size for name, size in weights.items() if not LAYER.search(name) and FIRST.search(name))
    last = sum(weights.values()) - layered - first
    return round(stages * (layered * ceil(config.layers / stages) / config.layers + max(first, last)))


def _cache_of_token(config: Architecture, engine: Engine, size: int) -> int:
    """Bytes of the KV cache over all GPUs, where each stage is like the largest."""
    if config.values.get("model_type") in WITHOUT_CACHE:
        return 0
    ranks, stages = engine.tensor_parallel, engine.pipeline_parallel
    heads = max(1, config.divides_by // ranks)
    return ceil(config.cached_layers / stages) * stages * heads * ranks * config.numbers_per_head * size


def _overhead(config: Architecture, engine: Engine, longest: int, size: int) -> int:
    tokens = engine.max_batched_tokens or min(BATCH["gpu"], engine.max_sequences * longest)
    batch = size * tokens * (4 * config.hidden + 3 * config.width / engine.tensor_parallel)
    drawing = DRAWING * min(engine.max_sequences, tokens) * config.vocabulary
    captured = min(2 * engine.max_sequences, 512)  # sizes 1, 2, 4, by eights to 256, by sixteens to 512
    graphs = 3 + min(captured, 256) // 8 + max(0, captured - 256) // 16 if engine.compiled else 0
    return round(max(batch, drawing) + graphs * config.layers / engine.pipeline_parallel * GRAPH)


# Small models


def of_encoder(address: str, device: Device, at_once: int = 1) -> Footprint:
    """What a process with an embedder or reranker of ours takes while it works on `at_once` batches.

    On a CPU the weights have four bytes a number, also where they are two later: both are there while they are
    compared. Raises ConfigError as `of_checkpoint` does.
    """
    if address.startswith(CROSS_ENCODER):
        folder = Path(address.removeprefix(CROSS_ENCODER)).expanduser()
    else:
        value = address.partition(":")[2]
        if "/" in value:
            require_folder(Path(value).expanduser(), repr(address))
        folder = sentence_transformer.find_model(address)[1]
    config = Architecture.read(folder, repr(address))
    tensors = list(read_tensors(folder, config.name))
    numbers = sum(tensor.numbers for tensor in tensors) or _pickled(folder, config)
    if device == "gpu":
        states = 2 * GPU_TOKENS * (6 * config.hidden + 2 * config.width)
        return Footprint(4 * numbers, CONTEXT + at_once * states)
    working = WORKING * CPU_TOKENS * (6 * config.hidden + 2 * config.width)
    return Footprint(4 * numbers, PROCESS + TOKENIZER + KERNELS + at_once * working)


def of_gguf(address: str, context_length: int) -> Footprint:
    """What a process with a GGUF model takes: its file, the KV cache in two bytes a number, and the process.

    Raises ConfigError where there is no such file, or one without an architecture.
    """
    file = gguf.find_file(address)
    with file.open("rb") as stream:
        try:
            said = _read_gguf(stream)
            kind = said["general.architecture"]
            layers, hidden, heads = (
                int(said[f"{kind}.{key}"]) for key in ("block_count", "embedding_length", "attention.head_count")
            )
            kept = int(said.get(f"{kind}.attention.head_count_kv", heads))
            size = int(said.get(f"{kind}.attention.key_length", hidden // heads))
        except (struct.error, KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"the header of {address!r} is damaged, or has no model: {error}") from None
    return Footprint(file.stat().st_size, PROCESS + GGUF_BUFFERS, 4 * layers * kept * size, context_length)


# Files


def read_tensors(folder: Path, name: str) -> Iterator[Tensor]:
    """Of all safetensors files that a model is loaded from; none where it has no such file. Raises ConfigError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = _read_json(index, name).get("weight_map")
        if not isinstance(parts, dict):
            raise ConfigError(f"{name}: {index.name} has no weight_map")
        files = [folder / part for part in sorted(set(parts.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
        whole = [file for file in files if not file.name.startswith("consolidated")]  # else the same weights twice
        files = whole or files
    for file in files:
        yield from _read_header(file, name)


def _read_header(file: Path, name: str) -> Iterator[Tensor]:
    """https://huggingface.co/docs/safetensors: the length of the header in 8 bytes, the header as JSON, the tensors."""
    damaged = f"{name}: {file.name} is damaged or not whole; copy it anew"
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length if length <= HEADER_BYTES else 0))
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        spans = [(*map(int, value["data_offsets"]),) for value in entries.values()]
        tensors = [
            Tensor(key, str(value["dtype"]), tuple(map(int, value["shape"])), end - start)
            for (key, value), (start, end) in zip(entries.items(), spans, strict=True)
        ]
        size = file.stat().st_size
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no {file.name}, which its index names") from None
    except OSError as error:
        raise ConfigError(f"{name}: {file.name} cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(damaged) from None
    if size < 8 + length + max((end for _, end in spans), default=0):
        raise ConfigError(damaged)
    yield from tensors


def _pickled(folder: Path, config: Architecture) -> int:
    """How many numbers the files of torch hold, by their size. Raises ConfigError where there are none."""
    files = [file for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)]
    sizes = [file.stat().st_size for file in files if not NOT_WEIGHTS.search(file.name)]
    if not sizes:
        raise ConfigError(f"{config.name}: there are no weights in {folder} (*.safetensors, *.bin or *.pt)")
    stated = str(config.values.get("dtype") or config.values.get("torch_dtype") or "float32").removeprefix("torch.")
    return sum(sizes) // DTYPES.get(stated, 4)


def require_folder(folder: Path, name: str) -> None:
    """Raises ConfigError where a model's folder is not on this machine."""
    if not folder.is_dir():
        raise ConfigError(
            f"{name}: there is no folder {folder} on this machine; plan on one that has the model, or copy it here"
        )


def _read_config(folder: Path, name: str) -> Mapping[str, Any]:
    require_folder(folder, name)
    return _read_json(folder / "config.json", name)


def _read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name}: {file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{name}: {file} is not JSON") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: {file} holds no JSON object")
    return values


# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: types of values by number, 8 is a text and 9 a list
_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_TEXT, _GGUF_LIST = 8, 9


def _read_gguf(stream: BinaryIO) -> dict[str, Any]:
    """The key-value pairs at the beginning of a GGUF file; of lists only the first value."""

    def read(kind: str) -> Any:
        (value,) = struct.unpack(f"<{kind}", stream.read(struct.calcsize(f"<{kind}")))
        return value

    def read_text() -> str:
        if (length := read("Q")) > HEADER_BYTES:
            raise ValueError(f"a text of {length} bytes")
        return stream.read(length).decode()

    def read_value(kind: int) -> Any:
        if kind == _GGUF_TEXT:
            return read_text()
        if kind == _GGUF_LIST:
            of, count = read("I"), read("Q")
            if of == _GGUF_LIST:
                raise ValueError("a list of lists")
            values = [read_value(of) for _ in range(count)]
            return values[0] if values else None
        return read(_GGUF_NUMBERS[kind])

    stream.read(4 + 4 + 8)  # magic, version, number of tensors
    return {read_text(): read_value(read("I")) for _ in range(read("Q"))}
