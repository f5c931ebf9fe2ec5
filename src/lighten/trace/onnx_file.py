"""Read an ONNX file's graph and the table of its tensors; the weights' bytes are counted and let go, those in other files are not opened."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lighten.errors import ModelError, RuntimeUnavailable

if TYPE_CHECKING:
    import onnx

MAX_FILE_BYTES = 2**31 - 1
"""A protobuf file holds less than 2 GiB; larger models keep their weights in files beside it. Source: protobuf's documented limit."""
KEPT_ELEMENTS = 1024
"""Larger tensors are let go: none of them says a shape."""

BITS = {
    "FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "DOUBLE": 64, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16, "INT32": 32, "UINT32": 32,
    "INT64": 64, "UINT64": 64, "BOOL": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8,
    "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8, "COMPLEX64": 64, "COMPLEX128": 128,
}  # fmt: skip
"""Type of a tensor → bits of an element; those below a byte are packed without gaps. Source: onnx.proto, TensorProto."""
NAMES = {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT8E4M3FN": "float8_e4m3fn", "FLOAT8E5M2": "float8_e5m2"}
"""The types whose usual names are not their own in lower case."""


def type_name(number: int) -> str:
    """The usual name of a type that a graph has by its number."""
    import onnx

    return next((NAMES.get(name, name.lower()) for name, value in onnx.TensorProto.DataType.items() if value == number), "undefined")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One constant of the graph.

    Attributes:
        type: its name in TensorProto, such as `FLOAT`.
        place: (file, offset) where it lies outside the graph's own file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    place: tuple[str, int] | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return math.ceil(self.elements * BITS[self.type] / 8)

    @property
    def dtype(self) -> str:
        return NAMES.get(self.type, self.type.lower())

    @property
    def is_float(self) -> bool:
        return "FLOAT" in self.type or self.type == "DOUBLE"


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A graph without its weights.

    Attributes:
        model: local functions put in their places, the data of large tensors taken out.
        tensors: initializers and constants by name, those of inner graphs too.
    """

    path: Path
    model: onnx.ModelProto = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def opsets(self) -> dict[str, int]:
        """Domain → version of its operators."""
        return {opset.domain: opset.version for opset in self.model.opset_import}


def require_onnx() -> None:
    """Raises:
    RuntimeUnavailable: the package that reads ONNX files is not installed.
    """
    from importlib.util import find_spec

    if find_spec("onnx") is None:
        raise RuntimeUnavailable("an ONNX file is read by the package onnx, which is not installed; pip install 'lighten[onnx]'.")


def read_onnx(path: Path) -> OnnxFile:
    """The graph of an ONNX file and the table of its tensors.

    Raises:
        RuntimeUnavailable: the package onnx is not installed.
        ModelError: no ONNX file, a truncated one, a tensor whose bytes are not those of its shape, or data in a file that is missing, too short
            or outside the model's folder.
    """
    require_onnx()
    import onnx
    from google.protobuf.message import DecodeError

    size = path.stat().st_size
    if not 0 < size <= MAX_FILE_BYTES:
        raise ModelError(f"{path}: {size} bytes are no ONNX file, which has 1 to {MAX_FILE_BYTES}.")
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: not an ONNX file, or a truncated one ({str(error).splitlines()[0]}).") from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path}: not an ONNX model: it has no operators.")
    _check_names(path, model.graph)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in _tensors(model.graph):
        tensors[name] = _stored(path, name, tensor)
        if tensors[name].elements > KEPT_ELEMENTS:
            _let_go(tensor)
        elif tensors[name].place is not None:
            _take_in(path, tensors[name], tensor)
    return OnnxFile(path=path, model=_inlined(path, model), tensors=tensors)


def _check_names(path: Path, graph: onnx.GraphProto) -> None:
    """Raises:
    ModelError: a node without outputs, or a name that is no text (protobuf then gives bytes).
    """
    for node in graph.node:
        if not node.output or not all(isinstance(name, str) for name in (node.op_type, node.domain, node.name, *node.input, *node.output)):
            raise ModelError(f"{path}: a {node.op_type!r} node has no outputs, or names that are not UTF-8: the file is damaged.")
    if not all(isinstance(each.name, str) for each in (*graph.input, *graph.output, *graph.initializer)):
        raise ModelError(f"{path}: names of its inputs or tensors are not UTF-8: the file is damaged.")


def _inlined(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the bodies of its local functions in their places."""
    import onnx.inliner

    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: its local functions do not fit together ({str(error).splitlines()[0]}).") from error


def _tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Initializers and the values of Constant nodes, by the names that they are used under; of inner graphs too."""
    for initializer in graph.initializer:
        yield initializer.name, initializer
    if graph.sparse_initializer:
        raise ModelError(f"{graph.sparse_initializer[0].values.name}: sparse initializers cannot be read; write them dense.")
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _tensors(inner)


def _stored(path: Path, name: str, tensor: onnx.TensorProto) -> StoredTensor:
    """A tensor's shape and type, its bytes checked."""
    import onnx

    types = {number: known for known, number in onnx.TensorProto.DataType.items()}
    kind = types.get(tensor.data_type, str(tensor.data_type))
    if kind == "STRING":
        return StoredTensor(name=name, shape=(0,), type="UINT8")
    if kind not in BITS or any(size < 0 for size in tensor.dims):
        raise ModelError(f"{path}: tensor {name!r} of type {kind} and shape {list(tensor.dims)} cannot be read; types: {', '.join(BITS)}.")
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    said = {entry.key: entry.value for entry in tensor.external_data} if external else {}
    place = (said.get("location", ""), _whole(path, name, said.get("offset", "0"))) if external else None
    stored = StoredTensor(name=name, shape=tuple(tensor.dims), type=kind, place=place)
    if place is not None:
        _check_external(path, stored, place, _whole(path, name, said.get("length", str(stored.bytes))))
    else:
        _check_inline(path, stored, tensor)
    return stored


def _whole(path: Path, name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ModelError(f"{path}: tensor {name!r} gives {text[:30]!r} as a place in another file, which is no whole number.")
    return int(text)


def _check_external(path: Path, stored: StoredTensor, place: tuple[str, int], length: int) -> None:
    location, offset = place
    inside = PurePosixPath(location.replace("\\", "/"))
    if not location or inside.is_absolute() or ".." in inside.parts or ":" in inside.parts[0]:
        raise ModelError(f"{path}: tensor {stored.name!r} lies in {location!r}, outside the model's folder, which is refused.")
    file = path.parent / location
    if not file.is_file():
        raise ModelError(f"{path}: tensor {stored.name!r} lies in {location}, which is missing beside it.")
    if length != stored.bytes:
        raise ModelError(f"{path}: tensor {stored.name!r} of shape {list(stored.shape)} takes {stored.bytes} bytes, but {length} of {location}.")
    if offset + length > (size := file.stat().st_size):
        raise ModelError(f"{path}: tensor {stored.name!r} ends at byte {offset + length} of {location}, which has {size}: it is truncated.")


def _check_inline(path: Path, stored: StoredTensor, tensor: onnx.TensorProto) -> None:
    typed = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    if tensor.raw_data:
        fits = len(tensor.raw_data) == stored.bytes
    else:
        given, bits = max(map(len, typed)), BITS[stored.type]
        complex_pair = 2 if stored.type.startswith("COMPLEX") else 1
        fits = given in {stored.elements * complex_pair, math.ceil(stored.elements * bits / 8) if bits < 8 else stored.elements * complex_pair}
    if not fits:
        raise ModelError(f"{path}: tensor {stored.name!r} of shape {list(stored.shape)} and type {stored.type} does not have the bytes of it.")


def _take_in(path: Path, stored: StoredTensor, tensor: Any) -> None:
    """Read a small tensor from its file into the graph: shapes are made of such."""
    assert stored.place is not None
    location, offset = stored.place
    with (path.parent / location).open("rb") as file:
        file.seek(offset)
        data = file.read(stored.bytes)
    _let_go(tensor)
    tensor.raw_data = data


def _let_go(tensor: Any) -> None:
    """Take a tensor's data out of the graph; its shape and type stay."""
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data", "data_location"):
        tensor.ClearField(name)
