"""Read the header of a safetensors file: names, types, shapes and offsets, without the data.

Layout: 8 bytes, the header's length as a little-endian integer; that many bytes of JSON; the tensors' bytes.
Source: the format's description in the `safetensors` project (README, "Format"); its limit of 100 MB a header is kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lighten.errors import ModelError
from lighten.model.low_rank import ADAPTER_PREFIX, CORRECTION_FILE
from lighten.model.spec import TensorSpec
from lighten.units import DTYPE_BITS

MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def read_header(path: Path) -> tuple[TensorSpec, ...]:
    """The tensors that a safetensors file holds, checked against the file's size.

    Raises:
        ModelError: empty, truncated or oversized header, not JSON, or a file shorter or longer than its tensors.
    """
    size = path.stat().st_size
    if size < 8:
        raise ModelError(f"{path}: {size} bytes are no safetensors file; it starts with 8 bytes that give the header's length.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        check_length(path, length, size)
        raw = file.read(length)
    return parse_header(path, raw, size)


def check_length(path: Path, length: int, size: int) -> None:
    """Raises:
    ModelError: a header of `length` bytes, which a file of `size` bytes cannot have.
    """
    if length > min(MAX_HEADER_BYTES, size - 8):
        limit = "the file" if length > size - 8 else f"the format's limit of {MAX_HEADER_BYTES} bytes"
        raise ModelError(f"{path}: its header claims {length} bytes, more than {limit}; the file is truncated or not safetensors.")


def parse_header(path: Path, raw: bytes, size: int) -> tuple[TensorSpec, ...]:
    """The tensors that the header `raw` of a file of `size` bytes describes.

    Raises:
        ModelError: not a header, or one that describes a file of another size.
    """
    tensors, data_bytes = _parse(path, raw)
    if 8 + len(raw) + data_bytes != size:
        state = "truncated" if size < 8 + len(raw) + data_bytes else "longer than its header says"
        raise ModelError(f"{path}: {state}: its header describes {8 + len(raw) + data_bytes} bytes, the file has {size}.")
    return tensors


def own_name(path: Path, name: str) -> str:
    """A tensor's name in the model; a correction's file has it with PEFT's prefix."""
    return name.removeprefix(ADAPTER_PREFIX) if path.name == CORRECTION_FILE else name


def _parse(path: Path, raw: bytes) -> tuple[tuple[TensorSpec, ...], int]:
    """The tensors, and the bytes of data that they take together."""
    try:
        entries: dict[str, Any] = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors, places = [], []
        for name, entry in entries.items():
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            tensor = TensorSpec(name=own_name(path, name), shape=shape, dtype=DTYPES[entry["dtype"]])
            if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in (*shape, start, end)):
                raise ModelError(f"{path}: tensor {name!r} has a shape or offset that is no whole number.")
            if math.prod(shape) * DTYPE_BITS[tensor.dtype] != 8 * (end - start):
                raise ModelError(f"{path}: tensor {name!r} of shape {list(shape)} and type {tensor.dtype} does not fill its {end - start} bytes.")
            tensors.append(tensor)
            places.append((start, end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: its safetensors header cannot be read ({type(error).__name__}: {error}).") from error
    return tuple(tensors), _end_of(path, places)


def _end_of(path: Path, places: list[tuple[int, int]]) -> int:
    """Where the last tensor ends.

    Raises:
        ModelError: tensors that overlap or leave a hole.
    """
    reached = 0
    for start, end in sorted(places):
        if start != reached:
            raise ModelError(f"{path}: its tensors overlap or leave a hole at byte {min(start, reached)} of its data.")
        reached = end
    return reached
