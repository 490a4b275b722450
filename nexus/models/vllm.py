"""A language model in vLLM replicas of this cluster, `vllm:FOLDER#name`.

What can be said of such a model without an engine: whether its folder holds one, what it can do, and the
arguments its engine starts with. The replicas are actors (actors/vllm.py), which the application deploys.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from nexus.config import Engine, Served
from nexus.errors import ConfigError
from nexus.registry import Task

TASKS: tuple[Task, ...] = ("generate", "embed")
SCHEME = "vllm:"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's folder, the same on every machine, and whether the model takes pictures."""

    folder: Path
    sees_images: bool


def open(address: str) -> object:
    """Raises ConfigError: an engine has a process of its own, which only the cluster gives it."""
    raise ConfigError(f"{address!r} answers only in a running Nexus: `nexus up` makes its replicas")


def check(address: str) -> None:
    """Return if the folder holds a model and vLLM is installed here, else raise ConfigError. Loads neither."""
    read_checkpoint(address)
    if util.find_spec("vllm") is None:
        raise ConfigError(
            f"{address!r} needs vLLM, which is not installed: `make install-vllm`, or with GPUs `pip install vllm`"
            " of the version that requirements-vllm.lock names"
        )


def read_checkpoint(address: str) -> Checkpoint:
    """What the folder of an address says of its model. Raises ConfigError where it holds none that may run."""
    folder = Path(address.removeprefix(SCHEME).partition("#")[0])
    if not folder.is_absolute():
        raise ConfigError(f"{address!r}: the folder of a vLLM model is an absolute path, equal on every machine")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{address!r}: its config.json cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{address!r}: its config.json is not JSON") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{address!r}: its config.json is no JSON object")
    return Checkpoint(folder, any(key.startswith("vision") for key in config))


def engine_arguments(model: Served) -> dict[str, object]:
    """The fields of vLLM's AsyncEngineArgs and FrontendArgs that a configuration decides; the rest is vLLM's choice.

    Media is never fetched by the engine: the gateway hands pictures over as data.
    """
    engine: Engine = model.engine
    arguments: dict[str, object] = {
        "tensor_parallel_size": engine.tensor_parallel,
        "pipeline_parallel_size": engine.pipeline_parallel,
        "max_num_seqs": engine.max_sequences,
        "enable_prefix_caching": engine.prefix_caching,
        "enforce_eager": not engine.compiled,
        "seed": engine.seed,
        "dtype": engine.dtype,
        "trust_remote_code": engine.trust_remote_code,
        "allowed_media_domains": [],
        "disable_log_stats": False,
        "enable_log_requests": False,
        "enable_prompt_tokens_details": True,
    }
    if engine.device == "gpu":
        arguments["gpu_memory_utilization"] = engine.memory_utilization
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if engine.max_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = engine.max_batched_tokens
    if engine.quantization is not None:
        arguments["quantization"] = engine.quantization
    if engine.tool_parser is not None:
        arguments |= {"enable_auto_tool_choice": True, "tool_call_parser": engine.tool_parser}
    if model.task == "embed":
        arguments |= {"runner": "pooling", "enable_prefix_caching": False}
    return arguments


def environment(engine: Engine) -> Mapping[str, str]:
    """Variables of an engine's processes: nothing is downloaded, nothing is reported."""
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if engine.device == "cpu":
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(engine.cpu_cache_bytes / 2**30)))
    return variables
