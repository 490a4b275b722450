"""A reranker that reads query and text together: a sequence classifier with one label, in this process.

An address is `cross-encoder:PATH`, the folder of such a model as transformers or sentence-transformers
save it. Nothing is downloaded, and no code that comes with a model is run.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from nexus.errors import ConfigError, Unavailable, UpstreamInvalid
from nexus.registry import Task
from nexus.types import Vector

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

TASKS: tuple[Task, ...] = ("rerank",)
_SCHEME = "cross-encoder:"
_HOW = f"Give the folder of a sequence classifier with one label: {_SCHEME}/path/to/model. Nothing is downloaded."
_CPU_BATCH = 8  # pairs of similar length: little padding, and they stay in the cache
_GPU_BATCH = 64


class CrossEncoderReranker:
    """Pairs of query and text to scores. Safe for several threads, which take turns: each has all the cores."""

    def __init__(self, model: "CrossEncoder", name: str) -> None:
        self.name = name
        self._model = model
        self._batch = _GPU_BATCH if model.device.type == "cuda" else _CPU_BATCH
        self._lock = Lock()  # tokenizers refuse to be set up by two threads at once

    def rerank(self, query: str, texts: Sequence[str]) -> Vector:
        """Shape (len(texts),), float32, each in [0, 1]. Pairs too long for the model are cut at their end.

        Raises UpstreamInvalid for NaN, Unavailable when the device fails.
        """
        if not texts:
            return np.empty(0, dtype=np.float32)
        clean = [_without_surrogates(text) for text in (query, *texts)]
        pairs = [(clean[0], text) for text in clean[1:]]
        try:
            with self._lock:  # the library sorts the pairs by length and puts the scores back in order
                scores = self._model.predict(pairs, batch_size=self._batch, show_progress_bar=False)
        except RuntimeError as error:  # torch's: out of memory, or the device is gone
            raise Unavailable(f"the reranker {self.name!r} failed on its device; try again in a moment") from error
        found: Vector = np.asarray(scores, dtype=np.float32)
        if found.shape != (len(texts),) or not np.isfinite(found).all():
            raise UpstreamInvalid(f"the reranker {self.name!r} gave NaN or another number of scores than of texts")
        return found


def open(address: str, *, name: str | None = None, threads: int | None = None) -> CrossEncoderReranker:
    """Load the model at `cross-encoder:PATH`; ConfigError when there is none, or one of another kind.

    `threads` sets torch's number of threads for this whole process; None leaves it as it is.
    """
    value = address.removeprefix(_SCHEME)
    if value == address or not value:
        raise ConfigError(f"{address!r} is not {_SCHEME}PATH. {_HOW}")
    folder = Path(value).expanduser()
    _refuse_other_models(value, folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from sentence_transformers import CrossEncoder

    if threads is not None:
        torch.set_num_threads(threads)
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        is_new = torch.cuda.is_bf16_supported(including_emulation=False)
        device, dtype = "cuda", torch.bfloat16 if is_new else torch.float16
    try:
        model = CrossEncoder(
            str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs={"dtype": dtype},
            activation_fn=torch.nn.Sigmoid(),  # whatever the model's own is: it is put on the logits in its place
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The model {value!r} cannot be loaded: {_first_line(error)}. {_HOW}") from error
    return CrossEncoderReranker(model.eval(), name or folder.resolve().name)


def _refuse_other_models(value: str, folder: Path) -> None:
    """Raise ConfigError unless the folder says that it holds a sequence classifier with one label."""
    if not folder.is_dir():
        raise ConfigError(f"{value!r} is no existing folder. {_HOW}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"The folder given as {value!r} has no config.json. {_HOW}")
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"The config.json of {value!r} is not valid JSON. {_HOW}") from None
    if "auto_map" in config:
        raise ConfigError(f"The model {value!r} brings its own code, which is not run here. {_HOW}")
    kinds = config.get("architectures") or ["a model that does not say its kind"]
    if not kinds[0].endswith("ForSequenceClassification"):
        raise ConfigError(f"The model {value!r} is {kinds[0]}, which is no reranker. {_HOW}")
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise ConfigError(f"The model {value!r} has {labels} labels, a reranker has one. {_HOW}")


def _without_surrogates(text: str) -> str:
    """Half a surrogate pair is legal in a str, but not in UTF-8, which the tokenizer reads."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
