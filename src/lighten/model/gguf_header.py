"""Read the header of a GGUF file: its metadata, and its table of tensors, without the data.

Layout, little endian: magic, version, number of tensors, number of metadata entries; the entries; for each tensor its name, dimensions (the
fastest first), type and offset; padding; the tensors' bytes. The file is mapped, not read, and every count and length in it is held against
what the file can hold before anything is made of it.

Source: docs/gguf.md of the ggml project. Its limits of a key (65,535 bytes) and of dimensions (4) are kept.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.errors import ModelError
from lighten.model.ggml_types import GGML_NAMES, GGML_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_KEY_BYTES = 65_535
MAX_ENTRIES = 200_000
"""Tensors, or metadata entries: a hundred times what any model is known to have."""
MAX_STRINGS = 10_000_000
"""Strings of an array: vocabularies and their merges have some 10**6."""
KEPT_VALUES = 10_000
"""Longer arrays are told by their length alone; those that describe layers are shorter."""
KEPT_BYTES = 1_000_000
"""A longer text is told by its length alone."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class GgufArray:
    """An array of the metadata; `values` is None where it is too long to be kept, or not of numbers."""

    length: int
    values: tuple[Any, ...] | None


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor.

    Attributes:
        shape: the slowest dimension first, as PyTorch gives it: the reverse of the file's.
        type: of ggml, such as `Q4_K`.
        offset: of its bytes, from where the data begins.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """As stored, exact."""
        return GGML_TYPES[self.type].stored_bytes(self.elements // self.shape[-1], self.shape[-1])


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    path: Path
    version: int
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: tuple[GgufTensor, ...] = field(repr=False)


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensors of a GGUF file, checked against the file's size.

    Raises:
        ModelError: no GGUF file, another version or byte order, a count or length that the file cannot hold, an unknown type, or a file
            that is shorter than its tensors.
    """
    size = path.stat().st_size
    if size < 24:
        raise ModelError(f"{path}: {size} bytes are no GGUF file, whose header takes at least 24.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return _Reader(path, mapped, size).header()


class _Reader:
    """A place in a mapped file, moved on by each read."""

    def __init__(self, path: Path, mapped: mmap.mmap, size: int) -> None:
        self.path, self.mapped, self.size, self.at = path, mapped, size, 0

    def header(self) -> GgufHeader:
        self._check_magic()
        version = self._version()
        tensors, entries = self._number("Q"), self._number("Q")
        self._check_count(tensors, 24, "tensors")
        self._check_count(entries, 13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._name("metadata entry", MAX_KEY_BYTES)
            if key in metadata:
                raise self._error(f"its metadata has {key!r} twice")
            metadata[key] = self._value(self._number("I"), key)
        table = tuple(self._tensor() for _ in range(tensors))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise self._error(f"its alignment {alignment!r} is not a multiple of 8")
        self._check_places(table, -(-self.at // alignment) * alignment)
        return GgufHeader(path=self.path, version=version, metadata=metadata, tensors=table)

    def _check_magic(self) -> None:
        found = self.mapped[:4]
        if found != MAGIC:
            older = {b"ggml", b"lmgg", b"ggjt", b"tjgg", b"ggla", b"fmgg", b"ggmf"}
            kind = "an older format of ggml; convert the model anew with llama.cpp's convert_hf_to_gguf.py" if found in older else "not a GGUF file"
            raise ModelError(f"{self.path}: it starts with {found!r}, not {MAGIC!r}: {kind}.")
        self.at = 4

    def _version(self) -> int:
        version: int = self._number("I")
        if version in VERSIONS:
            return version
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = f"is of big endian (version {swapped})" if swapped <= 9 else f"is of version {version}"
        raise ModelError(f"{self.path}: this GGUF file {kind}; versions 2 and 3 in little endian are read: convert the model anew.")

    def _error(self, fact: str) -> ModelError:
        return ModelError(f"{self.path}: {fact} (at byte {self.at} of {self.size}); the file is truncated, damaged or no GGUF file.")

    def _take(self, count: int, what: str) -> int:
        """The place of the next `count` bytes, which are passed over."""
        start = self.at
        if count > self.size - start:
            raise self._error(f"{what} of {count} bytes is more than is left of the file")
        self.at = start + count
        return start

    def _number(self, form: str) -> Any:
        place = self._take(struct.calcsize(form), "a number")
        return struct.unpack_from(f"<{form}", self.mapped, place)[0]

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count > MAX_ENTRIES or count * least_bytes > self.size - self.at:
            raise self._error(f"it claims {count} {what}, more than it can hold")

    def _name(self, what: str, most: int) -> str:
        length = self._number("Q")
        if not 0 < length <= most:
            raise self._error(f"the name of a {what} claims {length} bytes; 1 to {most} can be")
        place = self._take(length, f"the name of a {what}")
        try:
            return self.mapped[place : place + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"the name of a {what} is not UTF-8") from error

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            length = self._number("Q")
            place = self._take(length, f"the text {key!r}")
            return self.mapped[place : place + length].decode("utf-8", "replace") if length <= KEPT_BYTES else f"a text of {length} bytes"
        if kind == _ARRAY and depth < MAX_DIMS:
            return self._array(key, depth)
        raise self._error(f"the metadata entry {key!r} is of type {kind}, which does not exist" if kind != _ARRAY else f"{key!r} is nested too deep")

    def _array(self, key: str, depth: int) -> GgufArray:
        kind, length = self._number("I"), self._number("Q")
        if kind in _NUMBERS:
            form = _NUMBERS[kind]
            place = self._take(length * struct.calcsize(form), f"the array {key!r}")
            kept = struct.unpack_from(f"<{length}{form}", self.mapped, place) if length <= KEPT_VALUES else None
            return GgufArray(length=length, values=kept)
        if length > MAX_STRINGS or length * 8 > self.size - self.at:
            raise self._error(f"the array {key!r} claims {length} entries, more than it can hold")
        if kind == _STRING:
            for _ in range(length):
                self._take(self._number("Q"), f"a text of {key!r}")
        else:
            for _ in range(length):
                self._value(kind, key, depth + 1)
        return GgufArray(length=length, values=None)

    def _tensor(self) -> GgufTensor:
        name = self._name("tensor", MAX_KEY_BYTES)
        dims = self._number("I")
        if not 1 <= dims <= MAX_DIMS:
            raise self._error(f"tensor {name!r} claims {dims} dimensions; 1 to {MAX_DIMS} can be")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        number, offset = self._number("I"), self._number("Q")
        if number not in GGML_NAMES:
            raise self._error(f"tensor {name!r} is of type {number}, which is not known; known: {', '.join(GGML_TYPES)}")
        kind = GGML_TYPES[GGML_NAMES[number]]
        if min(shape) < 1 or math.prod(shape) >= 2**62:
            raise self._error(f"tensor {name!r} has the impossible shape {list(shape)}")
        if shape[-1] % kind.block:
            raise self._error(f"tensor {name!r} of shape {list(shape)} is no whole number of blocks of {kind.block} in {GGML_NAMES[number]}")
        return GgufTensor(name=name, shape=shape, type=GGML_NAMES[number], offset=offset)

    def _check_places(self, tensors: tuple[GgufTensor, ...], start: int) -> None:
        """Raises:
        ModelError: a name that is there twice, tensors that overlap, or that reach beyond the file.
        """
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self._error("two of its tensors have one name")
        reached = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < reached:
                raise self._error(f"tensor {tensor.name!r} begins at byte {tensor.offset} of the data, within the one before it")
            reached = tensor.offset + tensor.bytes
        if start + reached > self.size:
            raise ModelError(f"{self.path}: truncated: its header describes {start + reached} bytes, the file has {self.size}.")
