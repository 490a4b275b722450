"""A BERT encoder as an int8 graph of ONNX Runtime: made once from the model's own files, and kept for every process.

Weights have a scale per output channel and 7 bits: processors without VNNI add two products of 8 bits in 16, which
overflows with the 8th (onnxruntime.ai/docs/performance/model-optimizations/quantization.html, `reduce_range`), and so
every processor computes the same. The 8th would bring little, for most of the error is in the activations: MiniLM's
passages are 0.9951 like those of fp32 with it, 0.9938 without. A column's scale is the one of least squared error,
which cuts a few outliers off.
Activations are measured while it runs, over the tensor; so one sequence is given at a time: its vector would else
depend on its neighbours. That needs no padding and no mask, and is as fast as any batch.

A graph carries the fp32 vectors of some texts. Whoever opens it embeds these texts and compares.
"""

import base64
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from nexus.types import Vectors, digest

FORM = "3"  # of the graph; another one is made anew
LIBRARIES = ("onnx", "onnxruntime")

_MOST = 64
_CUTS = np.arange(0.6, 1.01, 0.04)  # of a channel's largest weight
_EXPECTED = "expected"  # among the metadata of a graph
_DIGEST_BYTES = 16
_MICROSOFT = "com.microsoft"  # the operators of ONNX Runtime's own

Floats = NDArray[np.float32]
Read = Callable[[str], Floats]


def cache_folder() -> Path:
    """Where things are that can be made again, in the user's cache (XDG_CACHE_HOME)."""
    return user_cache_path("nexus")


def keep(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, or gave before under this name. A file that is damaged, or not whole, is made anew.

    Several processes may do so at once. Where nothing can be written, it is made for this process alone.
    """
    path = cache_folder() / name
    with suppress(OSError):
        known, content = _split(path.read_bytes())
        if known == blake2b(content, digest_size=_DIGEST_BYTES).digest():
            return content
    content = make()
    with suppress(OSError):
        write_whole(path, blake2b(content, digest_size=_DIGEST_BYTES).digest() + content)
    return content


def _split(stored: bytes) -> tuple[bytes, bytes]:
    return stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]


def write_whole(path: Path, content: bytes) -> None:
    """The file is there as a whole, or as it was before. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def name_of(fingerprint: str) -> str:
    """What the graph of a model is called in the cache."""
    return f"int8-{digest(FORM, fingerprint, *(metadata.version(name) for name in LIBRARIES))}.onnx"


class QuantizedEncoder:
    """An int8 graph, loaded. Threads may call it at once; each computes on its own core."""

    batch_tokens = 1

    def __init__(self, graph: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        stored = base64.b64decode(self._session.get_modelmeta().custom_metadata_map[_EXPECTED])
        dimension = self._session.get_outputs()[0].shape[1]
        self.expected: Vectors = np.frombuffer(stored, dtype=np.float32).reshape(-1, dimension)

    def __call__(self, sequences: Sequence[NDArray[np.int64]]) -> Vectors:
        """One row per sequence, not yet of unit length."""
        return np.concatenate([self._session.run(None, {"ids": sequence[None]})[0] for sequence in sequences])


# Making the graph


def make_graph(config: Any, read: Read, pooling: Literal["mean", "cls"], expected: Vectors) -> bytes:
    """The graph of a plain BERT: `config` is its config.json, `read` gives its weights by name.

    Its input `ids` has shape (1, length), its output `rows` (1, hidden). `expected` is what it carries.
    """
    from onnx import helper

    graph = _Graph(read, config.get("layer_norm_eps", 1e-12))
    states = graph.embed()
    for number in range(config["num_hidden_layers"]):
        states = graph.layer(f"encoder.layer.{number}", states, config["num_attention_heads"])
    if pooling == "mean":
        graph.add("ReduceMean", [states], "rows", axes=[1], keepdims=0)
    else:
        graph.add("Gather", [states, graph.constant("first", np.array(0))], "rows", axis=1)
    model = helper.make_model(
        graph.close(config["hidden_size"]),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(_MICROSOFT, 1)],
        ir_version=8,
    )
    helper.set_model_props(model, {_EXPECTED: base64.b64encode(expected.astype(np.float32).tobytes()).decode()})
    return bytes(model.SerializeToString())


class _Graph:
    """Nodes and weights, in the order in which they are computed. Every value is called by its node."""

    def __init__(self, read: Read, epsilon: float) -> None:
        self._read = read
        self._epsilon = epsilon
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def add(self, operator: str, inputs: Sequence[str], name: str, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(operator, inputs, [name], domain=domain, **attributes))
        return name

    def constant(self, name: str, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self._weights.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self._read(name))

    def matrix(self, name: str, weight: Floats) -> list[str]:
        """A matrix of shape (inputs, outputs) in int8, its scales and its zero points."""
        rounded, scales = quantize(weight)
        zeros = np.zeros(len(scales), dtype=np.int8)
        return [
            self.constant(f"{name}.int8", rounded),
            self.constant(f"{name}.scale", scales),
            self.constant(f"{name}.zero", zeros),
        ]

    def embed(self) -> str:
        from onnx import TensorProto

        prefix = "embeddings"
        words = self.constant("words", self._read(f"{prefix}.word_embeddings.weight").astype(np.float16))
        # Every text is of type 0, so that row joins the positions.
        types = self._read(f"{prefix}.token_type_embeddings.weight")[0]
        places = self.constant("places", self._read(f"{prefix}.position_embeddings.weight") + types)
        zero, one, two = (self.constant(f"at{number}", np.array([number])) for number in range(3))
        found = self.add("Cast", [self.add("Gather", [words, "ids"], "found")], "exact", to=TensorProto.FLOAT)
        length = self.add("Slice", [self.add("Shape", ["ids"], "shape"), one, two, zero], "length")
        placed = self.add("Add", [found, self.add("Slice", [places, zero, length, zero], "placed")], "sum")
        norms = [self.weight(f"{prefix}.LayerNorm.{part}") for part in ("weight", "bias")]
        return self.add("LayerNormalization", [placed, *norms], "embedded", epsilon=self._epsilon, axis=-1)

    def layer(self, name: str, states: str, heads: int) -> str:
        """One transformer layer (Vaswani et al. 2017, section 3.1; post-norm as in BERT)."""
        attention = f"{name}.attention"
        mixed = self._attend(attention, states, heads)
        states = self._join(f"{attention}.output", mixed, states)
        wide = self._product(f"{name}.intermediate.dense", states)
        bent = self.add("BiasGelu", [wide, self.weight(f"{name}.intermediate.dense.bias")], f"{name}.gelu", _MICROSOFT)
        return self._join(f"{name}.output", bent, states)

    def _attend(self, name: str, states: str, heads: int) -> str:
        from onnx import helper

        parts = [f"{name}.self.{part}" for part in ("query", "key", "value")]
        weight, scale, zero = self.matrix(
            f"{name}.self", np.concatenate([self._read(f"{part}.weight").T for part in parts], axis=1)
        )
        bias = self.constant(f"{name}.bias", np.concatenate([self._read(f"{part}.bias") for part in parts]))
        measured = [f"{name}.{part}" for part in ("rounded", "rounded.scale", "rounded.zero")]
        self._nodes.append(helper.make_node("DynamicQuantizeLinear", [states], measured))
        inputs = [measured[0], weight, bias, measured[1], scale, "", measured[2], zero]
        return self.add("QAttention", inputs, f"{name}.mixed", _MICROSOFT, num_heads=heads)

    def _product(self, name: str, states: str, *bias: str) -> str:
        weight = self.matrix(name, self._read(f"{name}.weight").T)
        return self.add("DynamicQuantizeMatMul", [states, *weight, *bias], f"{name}.product", _MICROSOFT)

    def _join(self, name: str, states: str, skipped: str) -> str:
        """The layer's output with what went round it, normalised: SkipLayerNormalization takes four times as long."""
        product = self._product(f"{name}.dense", states, self.weight(f"{name}.dense.bias"))
        whole = self.add("Add", [product, skipped], f"{name}.sum")
        norms = [self.weight(f"{name}.LayerNorm.{part}") for part in ("weight", "bias")]
        return self.add("LayerNormalization", [whole, *norms], f"{name}.joined", epsilon=self._epsilon, axis=-1)

    def close(self, hidden: int) -> Any:
        from onnx import TensorProto, helper

        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "length"])
        rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [1, hidden])
        return helper.make_graph(self._nodes, "bert", [ids], [rows], self._weights)


def quantize(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """A matrix of shape (inputs, outputs) as whole numbers within 7 bits, and the scale of each output."""
    largest = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny * _MOST)
    best = largest / _MOST
    least = np.full(len(best), np.inf)
    for cut in _CUTS:
        scale = largest * cut / _MOST
        error = ((_round(weight, scale) * scale - weight) ** 2).sum(axis=0)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    best = best.astype(np.float32)
    return _round(weight, best).astype(np.int8), best


def _round(weight: Floats, scale: Floats) -> Floats:
    rounded: Floats = np.clip(np.rint(weight / scale), -_MOST, _MOST)
    return rounded
