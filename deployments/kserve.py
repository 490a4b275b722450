"""KServe's inference requests and answers as bytes: tensors in JSON, or after it as they lie in memory.

A binary tensor has its size in `parameters.binary_data_size` and its bytes behind the JSON, in the order of
the inputs; the header `Inference-Header-Content-Length` says where the JSON ends. Nothing is believed: every
size is checked against its shape before anything is made of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import orjson
from numpy.typing import NDArray

from nexus.errors import CallerError, InvalidRequest

HEADER = "inference-header-content-length"
MAX_TENSORS = 256
MAX_DIMENSIONS = 32
MAX_NAME_CHARACTERS = 256
MAX_DIMENSION = 2**31 - 1
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Inference:
    """A request: the inputs in order, and which outputs are wanted, each as bytes (True) or in JSON.

    `outputs` is None for all of them, as `binary` says.
    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, bool] | None
    binary: bool
    request_id: str | None


def decode(body: bytes, announced: str | None) -> Inference:
    """Read a request; `announced` is the value of HEADER, if the request has it.

    Raises CallerError for what is no JSON and InvalidRequest with a pointer for anything else.
    """
    head, tail = _cut(body, announced)
    try:
        value = orjson.loads(head)
    except orjson.JSONDecodeError:
        raise CallerError("the request is not valid JSON", code="malformed_json") from None
    fields = _fields(value, {"id", "inputs", "outputs", "parameters"}, "")
    request_id = fields.get("id")
    if request_id is not None and not (isinstance(request_id, str) and len(request_id) <= MAX_NAME_CHARACTERS):
        raise InvalidRequest(f"an id is a text of at most {MAX_NAME_CHARACTERS} characters", pointer="/id")
    binary = _flag(fields, "binary_data_output", "") or False
    inputs: dict[str, NDArray[Any]] = {}
    offset = 0
    for number, one in enumerate(_list(fields.get("inputs"), "/inputs")):
        pointer = f"/inputs/{number}"
        name = _name(one, inputs, pointer)
        inputs[name], used = _read_tensor(one, tail[offset:] if announced is not None else None, pointer)
        offset += used
    if offset != len(tail):
        raise InvalidRequest(f"{len(tail) - offset} bytes follow the last binary tensor", pointer="/inputs")
    return Inference(inputs, _read_outputs(fields, binary), binary, request_id)


def encode(
    model: str, version: str, request: Inference, outputs: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, str]]:
    """The answer's body and its headers. Raises InvalidRequest for values that JSON cannot carry."""
    tensors: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for name, tensor in outputs.items():
        datatype = DATATYPES[tensor.dtype]
        shown: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(tensor.shape)}
        if request.binary if request.outputs is None else request.outputs[name]:
            raw = _pack(tensor) if datatype == "BYTES" else np.ascontiguousarray(tensor).tobytes()
            shown["parameters"] = {"binary_data_size": len(raw)}
            tails.append(raw)
        else:
            shown["data"] = _for_json(name, tensor, datatype)
        tensors.append(shown)
    answer: dict[str, Any] = {"model_name": model, "outputs": tensors}
    if version:
        answer["model_version"] = version
    if request.request_id is not None:
        answer["id"] = request.request_id
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tails:
        return head, {"content-type": "application/json"}
    return b"".join([head, *tails]), {"content-type": "application/octet-stream", HEADER: str(len(head))}


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


def _cut(body: bytes, announced: str | None) -> tuple[bytes, memoryview]:
    if announced is None:
        return body, memoryview(b"")
    if not (announced.isascii() and announced.isdecimal() and len(announced) < 18 and int(announced) <= len(body)):
        raise CallerError("Inference-Header-Content-Length does not fit the body: it is the length of its JSON")
    return body[: int(announced)], memoryview(body)[int(announced) :]


def _fields(value: object, known: set[str], pointer: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest("an object is wanted here", pointer=pointer)
    for name in value:
        if name not in known:
            raise CallerError("this field is not known here", pointer=f"{pointer}/{_escape(name)}")
    return value


def _escape(name: str) -> str:
    return name[:64].replace("~", "~0").replace("/", "~1")


def _list(value: object, pointer: str) -> list[Any]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_TENSORS:
        raise InvalidRequest(f"a list of 1 to {MAX_TENSORS} tensors is wanted here", pointer=pointer)
    return value


def _flag(fields: dict[str, Any], name: str, pointer: str) -> bool | None:
    """The one parameter that is known here, if it is given. Sequences, priorities and shared memory are not."""
    if fields.get("parameters") is None:
        return None
    value = _fields(fields["parameters"], {name}, f"{pointer}/parameters").get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest("true or false is wanted here", pointer=f"{pointer}/parameters/{name}")
    return value


def _name(one: object, taken: Mapping[str, object], pointer: str) -> str:
    name = one.get("name") if isinstance(one, dict) else None
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise InvalidRequest(f"a tensor has a name of 1 to {MAX_NAME_CHARACTERS} characters", pointer=f"{pointer}/name")
    if name in taken:
        raise InvalidRequest("this name is given twice", pointer=f"{pointer}/name")
    return name


def _read_outputs(fields: dict[str, Any], binary: bool) -> dict[str, bool] | None:
    if fields.get("outputs") is None:
        return None
    outputs: dict[str, bool] = {}
    for number, one in enumerate(_list(fields["outputs"], "/outputs")):
        pointer = f"/outputs/{number}"
        name = _name(_fields(one, {"name", "parameters"}, pointer), outputs, pointer)
        as_bytes = _flag(one, "binary_data", pointer)
        outputs[name] = binary if as_bytes is None else as_bytes
    return outputs


def _read_tensor(one: object, tail: memoryview | None, pointer: str) -> tuple[NDArray[Any], int]:
    """One input, and how many bytes of `tail` it used; None says that the request has no binary part."""
    fields = _fields(one, {"name", "shape", "datatype", "data", "parameters"}, pointer)
    datatype = fields.get("datatype")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise InvalidRequest(f"a datatype is one of {', '.join(DTYPES)}", pointer=f"{pointer}/datatype")
    shape = _read_shape(fields.get("shape"), f"{pointer}/shape")
    parameters = _fields(fields.get("parameters") or {}, {"binary_data_size"}, f"{pointer}/parameters")
    size = parameters.get("binary_data_size")
    if (size is None) == ("data" not in fields):
        raise InvalidRequest("a tensor has either `data` or a `binary_data_size`", pointer=pointer)
    if size is None:
        flat, used = _from_json(fields["data"], datatype, shape, f"{pointer}/data"), 0
    else:
        pointer = f"{pointer}/parameters/binary_data_size"
        if type(size) is not int or size < 0:
            raise InvalidRequest("a size is a whole number and not negative", pointer=pointer)
        if tail is None or size > len(tail):
            raise InvalidRequest("the body ends before this tensor does", pointer=pointer)
        flat, used = _from_bytes(tail[:size], datatype, math.prod(shape), pointer), size
    try:
        return flat.reshape(shape), used
    except ValueError:
        raise InvalidRequest("no tensor can have this shape", pointer=pointer) from None


def _read_shape(value: object, pointer: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise InvalidRequest(f"a shape is a list of at most {MAX_DIMENSIONS} numbers", pointer=pointer)
    for number, one in enumerate(value):
        if type(one) is not int or not 0 <= one <= MAX_DIMENSION:
            raise InvalidRequest(
                f"a dimension is a whole number from 0 to {MAX_DIMENSION}", pointer=f"{pointer}/{number}"
            )
    return tuple(value)


def _from_bytes(raw: memoryview, datatype: str, count: int, pointer: str) -> NDArray[Any]:
    if datatype == "BYTES":
        return _unpack(raw, count, pointer)
    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise InvalidRequest(f"the shape needs {count * dtype.itemsize} bytes and not {len(raw)}", pointer=pointer)
    if datatype == "BOOL" and not set(bytes(raw)) <= {0, 1}:
        raise InvalidRequest("a BOOL is a byte that is 0 or 1", pointer=pointer)
    return np.frombuffer(raw, dtype)


def _unpack(raw: memoryview, count: int, pointer: str) -> NDArray[Any]:
    """Texts, each behind its length: four bytes, the lowest first."""
    if count * 4 > len(raw):
        raise InvalidRequest(f"{count} texts need at least {count * 4} bytes and not {len(raw)}", pointer=pointer)
    texts = np.empty(count, object)
    offset = 0
    for number in range(count):
        (length,) = struct.unpack_from("<I", raw, offset) if offset + 4 <= len(raw) else (len(raw),)
        offset += 4 + length
        if offset > len(raw):
            raise InvalidRequest(f"text {number} goes beyond the end", pointer=pointer)
        texts[number] = bytes(raw[offset - length : offset])
    if offset != len(raw):
        raise InvalidRequest(f"{len(raw) - offset} bytes follow the last text", pointer=pointer)
    return texts


def _from_json(data: object, datatype: str, shape: tuple[int, ...], pointer: str) -> NDArray[Any]:
    if not isinstance(data, list):
        raise InvalidRequest("data is a list", pointer=pointer)
    flat = _flatten(data, shape, pointer) if any(type(one) is list for one in data) else data
    if len(flat) != math.prod(shape):
        raise InvalidRequest(f"the shape needs {math.prod(shape)} values and not {len(flat)}", pointer=pointer)
    dtype = DTYPES[datatype]
    wanted = {"b": {bool}, "O": {str}, "i": {int}, "u": {int}}.get(dtype.kind, {int, float})
    if not set(map(type, flat)) <= wanted:
        raise InvalidRequest(f"these are not values of the datatype {datatype}", pointer=pointer)
    if datatype == "BYTES":
        texts = np.empty(len(flat), object)
        texts[:] = [text.encode() for text in flat]
        return texts
    if dtype.kind in "iu" and flat:
        bounds = np.iinfo(dtype)
        if not (bounds.min <= min(flat) and max(flat) <= bounds.max):
            raise InvalidRequest(f"a value does not fit the datatype {datatype}", pointer=pointer)
        return np.array(flat, dtype)
    with np.errstate(over="ignore"):
        values = np.array(flat, np.bool_ if dtype.kind == "b" else np.float64).astype(dtype)
    if dtype.kind != "b" and not np.isfinite(values).all():
        raise InvalidRequest(f"a value does not fit the datatype {datatype}", pointer=pointer)
    return values


def _flatten(data: list[Any], shape: tuple[int, ...], pointer: str) -> list[Any]:
    """Nested lists, which must be of this very shape, row by row."""
    level = [data]
    for length in shape:
        if any(type(one) is not list or len(one) != length for one in level):
            raise InvalidRequest("the lists are not nested as the shape says", pointer=pointer)
        level = [item for one in level for item in one]
    return level


# ── writing ─────────────────────────────────────────────────────────────────────────────────────


def _pack(texts: NDArray[Any]) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts.ravel())


def _for_json(name: str, tensor: NDArray[Any], datatype: str) -> object:
    """The values in a row, as orjson writes them."""
    if datatype == "BYTES":
        try:
            return [text.decode() for text in tensor.ravel()]
        except UnicodeDecodeError:
            raise InvalidRequest(f"the output {name!r} holds bytes that are no text: {AS_BINARY}") from None
    if datatype in ("FP16", "BF16", "FP32", "FP64") and not np.isfinite(tensor).all():
        raise InvalidRequest(f"the output {name!r} holds NaN or infinity, which JSON cannot carry: {AS_BINARY}")
    flat = np.ascontiguousarray(tensor).ravel()
    return flat.astype(np.float32) if datatype in ("FP16", "BF16") else flat


AS_BINARY = "ask for it with the parameter binary_data"
