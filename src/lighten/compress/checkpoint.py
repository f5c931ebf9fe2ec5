"""The tensors of a folder's safetensors files, each mapped into memory when it is asked for: address space and memory stay those of one tensor."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lighten.errors import ModelError
from lighten.model.read import BUFFERS, weight_files
from lighten.model.safetensors_header import own_name, read_header
from lighten.model.spec import TensorSpec

CHUNK_ELEMENTS = 2**22
"""Elements that are checked or converted at once (choice: 16 MB of float32, far above the cost of a call, far below a layer)."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    spec: TensorSpec


class Checkpoint:
    """The tensors of a folder in Hugging Face format, by name, in the order of its files and of their headers.

    A tensor that is read is a private view of its bytes in the file: what is written to it stays in memory, and its pages are the system's to
    drop. It is unmapped when the last reference to it goes.

    Raises:
        ModelError: no weights there, or a header that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, _Place] = {}
        self._checked: set[str] = set()
        for file in weight_files(folder):
            tensors = read_header(file)
            starts = _starts(file)
            self._places |= {tensor.name: _Place(file=file, offset=starts[tensor.name], spec=tensor) for tensor in tensors}

    @property
    def names(self) -> list[str]:
        """Without the buffers that older checkpoints saved."""
        return [name for name in self._places if not BUFFERS.search(name)]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def spec(self, name: str) -> TensorSpec:
        """Shape and type of a tensor, as the header states them."""
        return self._places[name].spec

    def __getitem__(self, name: str) -> Tensor:
        """The tensor.

        Raises:
            ModelError: it holds values that are not finite.
        """
        self.check(name)
        return self.mapped(name)

    def mapped(self, name: str) -> Tensor:
        """The tensor, not checked."""
        place = self._places[name]
        return map_tensor(place.file, place.offset, place.spec.shape, _dtype(place.spec))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, mapped without the others, and not checked."""
        place = self._places[name]
        first, *rest = place.spec.shape
        if not 0 <= start <= stop <= first:
            raise ModelError(f"{place.file}: tensor {name} has {first} rows, not {start} to {stop}.")
        row = math.prod(rest) * _dtype(place.spec).itemsize
        return map_tensor(place.file, place.offset + start * row, (stop - start, *rest), _dtype(place.spec))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in another type, in memory of its own; of the file no more than a chunk is resident meanwhile.

        Raises:
            ModelError: it holds values that are not finite.
        """
        made = torch.empty(self.spec(name).shape, dtype=dtype)
        flat, done, wrong = made.reshape(-1), 0, 0
        for chunk in self._chunks(name):
            wrong += _not_finite(chunk)
            flat[done : done + len(chunk)] = chunk
            done += len(chunk)
        self._refuse(name, wrong)
        return made

    def check(self, name: str) -> None:
        """Raises, where it was not checked before:
        ModelError: the tensor holds values that are not finite.
        """
        if name not in self._checked and _dtype(self.spec(name)).is_floating_point:
            self._refuse(name, sum(_not_finite(chunk) for chunk in self._chunks(name)))
        self._checked.add(name)

    def _refuse(self, name: str, wrong: int) -> None:
        if wrong:
            raise ModelError(f"{self._places[name].file}: tensor {name} holds {wrong} values that are not finite (NaN or infinite).")

    def _chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's elements, each piece mapped alone."""
        place, dtype = self._places[name], _dtype(self.spec(name))
        for start in range(0, place.spec.elements, CHUNK_ELEMENTS):
            count = min(CHUNK_ELEMENTS, place.spec.elements - start)
            yield map_tensor(place.file, place.offset + start * dtype.itemsize, (count,), dtype)


def check_finite(folder: Path) -> None:
    """Raises:
    ModelError: a tensor of the folder holds values that are not finite.
    """
    checkpoint = Checkpoint(folder)
    for name in checkpoint.names:
        checkpoint.check(name)


def map_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose values are the bytes of a file from `offset` on, mapped privately.

    Raises:
        ModelError: the file is shorter than that.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    before = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        try:
            window = mmap.mmap(file.fileno(), before + size, offset=offset - before, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise ModelError(f"{path}: truncated: bytes {offset} to {offset + size} are not there.") from error
    flat = torch.frombuffer(window, dtype=torch.uint8, count=size, offset=before)
    if before % dtype.itemsize:
        flat = flat.clone()  # the format does not promise that elements lie at multiples of their size
    return flat.view(dtype).reshape(shape)


def _not_finite(chunk: Tensor) -> int:
    if not chunk.is_floating_point():
        return 0
    return len(chunk) - int(torch.isfinite(chunk.float() if chunk.element_size() == 1 else chunk).sum())


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def _starts(path: Path) -> dict[str, int]:
    """Where each tensor begins in a file whose header was judged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {own_name(path, name): 8 + length + int(entry["data_offsets"][0]) for name, entry in entries.items()}
