"""Which constants of an ONNX graph are weights, how many parameters they hold, and what they belong to."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lighten.trace.components import component_of
from lighten.trace.onnx_file import OnnxFile, StoredTensor, type_name
from lighten.trace.onnx_shapes import attribute

if TYPE_CHECKING:
    import onnx

BUFFERS = re.compile(r"(inv_freq|position_ids|masked_bias|cos_cache\w*|sin_cache\w*|causal_mask|attn_mask|attention_mask)(_\d+)?$")
"""Names of float tables that modules keep beside their parameters."""
GENERIC = re.compile(r"^(val_\d+|onnx::.*|\d+|_?const\w*|constant\w*)$", re.IGNORECASE)
"""Names that exporters make up for weights that they transposed or folded."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Under which torch's exporter notes the module that a node comes from."""

CODES_AT = {
    "DequantizeLinear": (0,), "Gather": (0,), "GatherBlockQuantized": (0,), "MatMulInteger": (1,), "ConvInteger": (1,), "MatMulNBits": (1,),
    "MatMulBnb4": (1,), "QAttention": (1,), "DynamicQuantizeMatMul": (1,), "MatMulIntegerToFloat": (1,), "QLinearMatMul": (3,),
    "QLinearConv": (3, 8), "QGemm": (3, 6), "QLinearAdd": (0, 3), "QLinearMul": (0, 3),
}  # fmt: skip
"""Operator → the inputs that take the codes of a quantized weight."""
SCALES_AT = {
    "DequantizeLinear": (1, 2), "QuantizeLinear": (1, 2), "GatherBlockQuantized": (2, 3), "MatMulInteger": (2, 3), "ConvInteger": (2, 3),
    "MatMulNBits": (2, 3), "MatMulBnb4": (2,), "QAttention": (3, 4, 6, 7), "DynamicQuantizeMatMul": (2, 3), "MatMulIntegerToFloat": (2, 3, 4, 5),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7), "QLinearConv": (1, 2, 4, 5, 6, 7), "QGemm": (1, 2, 4, 5, 7, 8), "QLinearAdd": (1, 2, 4, 5, 6, 7),
    "QLinearMul": (1, 2, 4, 5, 6, 7), "QLinearSigmoid": (1, 2, 3, 4), "QLinearLeakyRelu": (1, 2, 3, 4), "QLinearSoftmax": (1, 2, 3, 4),
}  # fmt: skip
"""Operator → the inputs that take scales and zero points, which are bytes of the weights but no parameters."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor that the graph computes with.

    Attributes:
        parameters: that it stands for; 0 for scales and zero points.
        component: of the model that it belongs to.
        dtype: that it is computed with in, where it is cast before anything else.
    """

    tensor: StoredTensor
    parameters: int
    component: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class _Use:
    node: onnx.NodeProto
    place: int


def find_weights(file: OnnxFile) -> dict[str, Weight]:
    """The weights of a graph by name, those that lie in one place of a file once.

    A weight is a constant that some node reads and that holds floats, or codes where an operator takes those. Left out: constants of one
    element (epsilons, scales of scores; a parameter of one element is taken for one too), whole numbers that are no codes (shapes, axes,
    indices, masks), and tables that are no parameters (`BUFFERS`). Two constants with equal values in two places are two weights.
    """
    uses: dict[str, list[_Use]] = {}
    for node in _nodes(file.model.graph):
        for place, name in enumerate(node.input):
            uses.setdefault(name, []).append(_Use(node=node, place=place))
    paths = module_paths(file.model.graph)
    dynamic = {node.output[1] for node in _nodes(file.model.graph) if node.op_type == "DynamicQuantizeLinear"}
    found: dict[str, Weight] = {}
    places: set[tuple[str, int]] = set()
    for name, tensor in file.tensors.items():
        read = list(_reads(name, uses))
        kind = _parameters(tensor, read, dynamic)
        if kind is None or (tensor.place is not None and tensor.place in places):
            continue
        if tensor.place is not None:
            places.add(tensor.place)
        found[name] = Weight(tensor=tensor, parameters=kind, component=_component(tensor, read, paths), dtype=_computed_type(tensor, read))
    return found


def _reads(name: str, uses: Mapping[str, list[_Use]]) -> Iterator[_Use]:
    """What reads a value: as it is, in another type or in another shape."""
    for use in uses.get(name, []):
        yield use
        if use.node.op_type in ("Cast", "Reshape") and use.place == 0:
            yield from uses.get(use.node.output[0], [])


FAR = 4
"""Nodes between an integer product and the bias that is added to it: MatMulInteger, Cast, Mul, Reshape, Add."""


def module_paths(graph: onnx.GraphProto) -> dict[str, str]:
    """First output of each node → the module that it comes from; where its exporter noted none, that of what reads it, `FAR` nodes on at most.

    Quantizers put nodes of their own in the place of a product, with no note; the bias that is added to it still has one.
    """
    readers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, node)
    found: dict[str, tuple[str, int]] = {}
    for node in reversed(graph.node):
        path = _noted_path(node)
        far = 0
        if not path and (reader := next((readers[name] for name in node.output if name in readers), None)) is not None:
            path, far = found.get(reader.output[0], ("", 0))
            far += 1
        found[node.output[0]] = (path, far) if far <= FAR else ("", 0)
    return {name: path for name, (path, _) in found.items()}


def _noted_path(node: onnx.NodeProto) -> str:
    """The module that a node comes from, as its exporter noted it; empty where it did not.

    Source: `SCOPES` of torch.onnx's exporter; names such as `/model/layers.0/self_attn/MatMul` of the one before it.
    """
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, RecursionError):
                continue
            return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
    return node.name.strip("/").rpartition("/")[0].replace("/", ".") if "/" in node.name else ""


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of those inside it."""
    for node in graph.node:
        yield node
        for each in node.attribute:
            for inner in ([each.g] if each.HasField("g") else []) + list(each.graphs):
                yield from _nodes(inner)


def _parameters(tensor: StoredTensor, uses: list[_Use], dynamic: set[str]) -> int | None:
    """How many parameters a constant stands for; 0 for scales; None where it is no weight."""
    for use in uses:
        if use.place in CODES_AT.get(use.node.op_type, ()) and not tensor.is_float and (use.node.op_type != "Gather" or tensor.type not in _INDICES):
            return _codes(tensor, use.node) if tensor.elements > 1 else None
    if any(use.place in SCALES_AT.get(use.node.op_type, ()) or _is_scale_product(use, dynamic) for use in uses):
        return 0
    if not uses or not tensor.is_float or tensor.elements <= 1 or BUFFERS.search(tensor.name):
        return None
    return tensor.elements


def _computed_type(tensor: StoredTensor, uses: list[_Use]) -> str:
    first = uses[0].node
    return type_name(attribute(first, "to", 1)) if first.op_type == "Cast" else tensor.dtype


_INDICES = frozenset({"INT64", "INT32", "BOOL"})


def _codes(tensor: StoredTensor, node: onnx.NodeProto) -> int:
    """Codes in a tensor that packs them in its own way, or one an element."""
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):
        return int(attribute(node, "K") * attribute(node, "N"))
    if node.op_type == "GatherBlockQuantized" and tensor.type == "UINT8":
        return tensor.elements * 8 // int(attribute(node, "bits", 4))
    return tensor.elements


def _is_scale_product(use: _Use, dynamic: set[str]) -> bool:
    """Whether a node multiplies the scale of a weight by that of a dynamically quantized input."""
    return use.node.op_type == "Mul" and any(name in dynamic for name in use.node.input)


def _component(tensor: StoredTensor, uses: list[_Use], paths: Mapping[str, str]) -> str:
    """What a weight belongs to: a table that is looked up, else by the module that reads it or its own name."""
    if any(use.node.op_type in ("Gather", "GatherBlockQuantized", "EmbedLayerNormalization") and use.place in (0, 2, 3, 4) for use in uses):
        return "embedding"
    own, is_matrix = component_of(_module(tensor.name)), len(tensor.shape) > 1
    if not GENERIC.match(tensor.name) and own != "other":
        return own
    near = [component_of(paths.get(use.node.output[0], "")) for use in uses]
    return next((found for found in near if found not in (("other", "norm") if is_matrix else ("other",))), "other")


def _module(name: str) -> str:
    """`a.b` of `a.b.weight` and of `a.b.weight_quantized`."""
    return re.sub(r"\.(weight|bias|gamma|beta)\w*$", "", name)


def weight_bytes(weights: Mapping[str, Weight]) -> int:
    """Bytes of the weights as stored, with their scales and zero points."""
    return sum(weight.tensor.bytes for weight in weights.values())


def parameters_by_component(weights: Mapping[str, Weight]) -> dict[str, int]:
    """Parameters by component."""
    found: dict[str, int] = {}
    for weight in weights.values():
        if weight.parameters:
            found[weight.component] = found.get(weight.component, 0) + weight.parameters
    return found


def numbered_blocks(paths: list[str]) -> int:
    """How many numbered blocks the paths lie in: `layer.3` of an encoder and of a decoder are two."""
    found = {match[0] for path in paths if (match := re.search(r"^.*?(?:^|\.)(?:layers?|blocks?|h)\.\d+(?=\.|$)", path))}
    return len(found)


def largest_type(weights: Mapping[str, Weight]) -> str:
    """The float type in which the graph computes: that of most floats among its weights and scales."""
    counts: dict[str, int] = {}
    for weight in weights.values():
        if weight.tensor.is_float and math.prod(weight.tensor.shape) > 0:
            counts[weight.dtype] = counts.get(weight.dtype, 0) + weight.tensor.elements
    return max(counts, key=counts.__getitem__) if counts else "float32"
