"""Write a safetensors file tensor by tensor, in any order: the header is known beforehand, each tensor goes to its place.

Layout: 8 bytes, the header's length as a little-endian integer; the header, JSON filled up with spaces to a multiple of 8 bytes; the tensors'
bytes by type and name. The bytes are those that the `safetensors` library writes; tests/test_packed.py holds them to it.
Source: the `safetensors` project, README ("Format") and safetensors/src/tensor.rs (the order of types).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lighten.model.safetensors_header import DTYPES
from lighten.model.spec import TensorSpec
from lighten.units import dtype_bytes

CODES = {name: code for code, name in DTYPES.items()}
ORDER = (
    "int64", "float64", "float32", "int32", "bfloat16", "float16", "int16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool",
)  # fmt: skip
"""Types in the order in which the library lays them out, so that each tensor is aligned to its element."""
METADATA = {"format": "pt"}
"""What `transformers` asks a file to say of itself."""


def tensor_bytes(tensor: TensorSpec) -> int:
    return round(math.prod(tensor.shape) * dtype_bytes(tensor.dtype))


def header_of(tensors: Iterable[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of these tensors, and each tensor's place after them."""
    entries: dict[str, object] = {"__metadata__": METADATA}
    places, end = {}, 0
    for tensor in sorted(tensors, key=lambda tensor: (ORDER.index(tensor.dtype), tensor.name)):
        places[tensor.name], end = end, end + tensor_bytes(tensor)
        entries[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [places[tensor.name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


class SafetensorsWriter:
    """A file that is filled tensor by tensor. Its size is taken on disk when it is opened; what is not yet written reads as zeros."""

    def __init__(self, path: Path, tensors: Iterable[TensorSpec]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        header, self._places = header_of(self._tensors.values())
        self._start = len(header)
        self._file: IO[bytes] = path.open("wb")
        self._file.write(header)
        self._file.truncate(self._start + sum(map(tensor_bytes, self._tensors.values())))
        self.missing = set(self._tensors)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor to its place, of the shape and type that the header says."""
        said = self._tensors[name]
        found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert found == (said.shape, said.dtype), f"{name} is {found}, the header says {(said.shape, said.dtype)}"
        self._file.seek(self._start + self._places[name])
        if tensor.numel():
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.missing.discard(name)

    def close(self) -> None:
        self._file.close()


def split(groups: Iterable[list[TensorSpec]], shard_bytes: int) -> list[list[TensorSpec]]:
    """The tensors in files of at most `shard_bytes` of data each, in order; those of one group stay together, alone where they are larger."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for group in groups:
        size = sum(map(tensor_bytes, group))
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return shards


def write_index(folder: Path, shards: Mapping[str, list[TensorSpec]], index: str) -> None:
    """`model.safetensors.index.json`: which file holds which tensor."""
    total = sum(tensor_bytes(tensor) for tensors in shards.values() for tensor in tensors)
    places = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n")
