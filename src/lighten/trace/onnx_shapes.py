"""Follow shapes through an ONNX graph at one size: each node's outputs from its inputs, and the few values that say shapes themselves.

The operators of ONNX bring their own shape inference, which is asked node by node with the values that are known so far; so no shape stays
symbolic. Runtimes' own operators (`com.microsoft`) bring none: those that are known here have a rule each. A value whose shape cannot be told is
`None`, and so is what follows from it.

Source of the rules: docs/ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lighten.errors import TraceError
from lighten.trace.onnx_file import KEPT_ELEMENTS, OnnxFile

if TYPE_CHECKING:
    import onnx

Shape: TypeAlias = tuple[int, ...] | None

MICROSOFT = "com.microsoft"
FOLDED = frozenset({
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten", "Floor", "Gather", "GatherND",
    "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal",
    "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "ScatterND", "Sign", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile",
    "Transpose", "Trilu", "Unsqueeze", "Where", "CumSum", "NonZero", "Round", "ScatterElements", "ReduceMean", "TopK", "OneHot", "Pad",
    "Xor", "ArgMax",
})  # fmt: skip
"""Operators that are computed where all they read is known: what shapes are made of."""


@dataclass(kw_only=True)
class Values:
    """What is known of each value of a graph.

    Attributes:
        types: type and shape, where they are known.
        data: the values themselves, of small ones that do not depend on the input.
    """

    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        """The shape of a value; None where it is not known."""
        found = self.types.get(name)
        if found is None or not found.tensor_type.HasField("shape"):
            return None
        dims = found.tensor_type.shape.dim
        return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else None

    def element_type(self, name: str) -> int:
        """The number of a value's element type; 0 where it is not known."""
        found = self.types.get(name)
        return found.tensor_type.elem_type if found is not None else 0


def follow_shapes(file: OnnxFile, inputs: Mapping[str, tuple[int, ...]]) -> Values:
    """What is known of each value where the graph's inputs have the given shapes.

    Raises:
        TraceError: a node that reads a value which nothing before it makes, or sizes that do not fit together.
    """
    from onnx import numpy_helper

    graph, values = file.model.graph, Values()
    for name, stored in file.tensors.items():
        values.types[name] = tensor_type(_number_of(stored.type), stored.shape)
    for given in graph.input:
        if given.name in inputs:
            values.types[given.name] = tensor_type(given.type.tensor_type.elem_type, inputs[given.name])
    for initializer in graph.initializer:
        if file.tensors[initializer.name].elements <= KEPT_ELEMENTS and _has_data(initializer):
            values.data[initializer.name] = numpy_helper.to_array(initializer)
    for node in graph.node:
        for name in node.input:
            if name and name not in values.types:
                raise TraceError(f"{file.path}: {node.op_type} {node.name!r} reads {name!r}, which nothing before it makes.")
        try:
            _follow(file, node, values)
        except UNFIT as error:
            raise unfit(file, node, error) from error
    return values


UNFIT = (TypeError, IndexError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError)
"""What a node raises whose attributes or inputs are not those of its operator."""


def unfit(file: OnnxFile, node: onnx.NodeProto, error: Exception) -> TraceError:
    """The error of a node whose attributes or inputs are not those of its operator."""
    said = (str(error).splitlines() or [""])[0]
    return TraceError(f"{file.path}: {node.op_type} {node.name!r} lacks an input or an attribute, or has another's ({type(error).__name__}: {said}).")


def tensor_type(element_type: int, shape: Shape) -> onnx.TypeProto:
    """The type of a tensor; without a shape where that is None."""
    from onnx import helper

    return helper.make_tensor_type_proto(element_type, shape)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    from onnx import helper

    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _number_of(kind: str) -> int:
    import onnx

    return int(onnx.TensorProto.DataType.Value(kind))


def _has_data(tensor: onnx.TensorProto) -> bool:
    """Whether a small tensor's values are in the graph's own file."""
    return tensor.data_location != 1 and tensor.data_type != 8


def _follow(file: OnnxFile, node: onnx.NodeProto, values: Values) -> None:
    """Set the types of a node's outputs, and their values where those are known."""
    found = _own_rule(node, values) if node.domain == MICROSOFT else _inferred(file, node, values)
    for name in node.output:
        if name:
            values.types[name] = found.get(name) or tensor_type(0, None)
    for name, value in _computed(file, node, values).items():
        values.data[name] = value
        values.types[name] = tensor_type(_number_of_array(value), value.shape)


def _inferred(file: OnnxFile, node: onnx.NodeProto, values: Values) -> dict[str, onnx.TypeProto]:
    """The types of a node's outputs as its operator's own inference tells them; none where it has none or not enough is known."""
    from onnx import checker, defs, numpy_helper, shape_inference

    read = [name for name in node.input if name]
    if not defs.has(node.op_type, node.domain):
        return _same_shape(node, values)
    if any(values.element_type(name) == 0 for name in read):
        return {}
    try:
        schema = defs.get_schema(node.op_type, file.opsets.get(node.domain, 1), node.domain)
        data = {name: numpy_helper.from_array(np.array(values.data[name], order="C"), name) for name in read if name in values.data}
        return shape_inference.infer_node_outputs(
            schema, node, {name: values.types[name] for name in read}, data, opset_imports=list(file.model.opset_import)
        )
    except (shape_inference.InferenceError, checker.ValidationError, defs.SchemaError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise TraceError(f"{file.path}: {node.op_type} {node.name!r} cannot take these sizes ({said}).") from error


def _computed(file: OnnxFile, node: onnx.NodeProto, values: Values) -> dict[str, Any]:
    """The outputs of a node that reads only what is known; empty where it does not, or is too large."""
    if node.op_type in ("Shape", "Size"):
        shape = values.shape(node.input[0])
        if shape is None:
            return {}
        part = shape[slice(attribute(node, "start", 0), attribute(node, "end"))]
        return {node.output[0]: np.array(part if node.op_type == "Shape" else math.prod(shape), dtype=np.int64)}
    if node.op_type == "Constant":
        value = _constant(node)
        return {} if value is None or value.size > KEPT_ELEMENTS or value.dtype == object else {node.output[0]: value}
    read = [name for name in node.input if name]
    if node.domain not in ("", "ai.onnx") or node.op_type not in FOLDED or not read or any(name not in values.data for name in read):
        return {}
    if any((shape := values.shape(name)) is None or math.prod(shape) > KEPT_ELEMENTS for name in node.output if name):
        return {}
    return _run(file, node, values)


def _constant(node: onnx.NodeProto) -> Any:
    from onnx import numpy_helper

    for each in node.attribute:
        if each.name == "value":
            small = math.prod(each.t.dims) <= KEPT_ELEMENTS and _has_data(each.t)
            return numpy_helper.to_array(each.t) if small else None
        if each.name in ("value_int", "value_ints"):
            return np.array(each.i if each.name == "value_int" else list(each.ints), dtype=np.int64)
        if each.name in ("value_float", "value_floats"):
            return np.array(each.f if each.name == "value_float" else list(each.floats), dtype=np.float32)
    return None


def _run(file: OnnxFile, node: onnx.NodeProto, values: Values) -> dict[str, Any]:
    """What onnx's reference implementation makes of a node."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    read = list(dict.fromkeys(name for name in node.input if name))
    inputs = [helper.make_value_info(name, values.types[name]) for name in read]
    outputs = [helper.make_value_info(name, values.types[name]) for name in node.output if name]
    alone = helper.make_model(helper.make_graph([node], "node", inputs, outputs), opset_imports=list(file.model.opset_import))
    try:
        made = ReferenceEvaluator(alone).run(None, {name: values.data[name] for name in read})
    except Exception:  # noqa: BLE001 - the reference lacks an operator or a type: the value stays unknown, and what needs it says so
        return {}
    return {output.name: np.asarray(value) for output, value in zip(outputs, made, strict=True)}


def _number_of_array(value: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(value.dtype))


# ---- operators without an inference of their own ----


def _same_shape(node: onnx.NodeProto, values: Values) -> dict[str, onnx.TypeProto]:
    """The shape of the first input for the operators that ONNX Runtime keeps in ONNX's own domain; nothing for others."""
    same = ("SimplifiedLayerNormalization",)
    return {node.output[0]: values.types[node.input[0]]} if node.op_type in same else {}


def _own_rule(node: onnx.NodeProto, values: Values) -> dict[str, onnx.TypeProto]:
    rule = _RULES.get(node.op_type)
    if rule is None:
        return {}
    shapes = [values.shape(name) if name else None for name in node.input]
    made = rule(node, shapes)
    found = {}
    for place, (name, shape) in enumerate(zip(node.output, made, strict=False)):
        number = _output_type(node, place, values)
        if name:
            found[name] = tensor_type(number, shape)
    return found


def _output_type(node: onnx.NodeProto, place: int, values: Values) -> int:
    """The element type of an output: that of the codes for operators on codes, else of the first input of floats."""
    if node.op_type in _CODES_FROM:
        at = _CODES_FROM[node.op_type]
        return values.element_type(node.input[at]) if len(node.input) > at and node.input[at] else _FLOAT if node.op_type == "QGemm" else _UINT8
    if node.op_type == "EmbedLayerNormalization" and place == 1:
        return _INT32
    numbers = [values.element_type(name) for name in node.input if name]
    return next((number for number in numbers if number in _FLOATS), numbers[0] if numbers else 0)


def _first(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    return [shapes[0]] * len(node.output)


def _product(left: Shape, right: Shape) -> Shape:
    if left is None or right is None or len(left) < 1 or len(right) < 1:
        return None
    if len(right) == 1:
        return left[:-1]
    batch = np.broadcast_shapes(left[:-2], right[:-2])
    return (*batch, *left[-2:-1], right[-1])


def _turned(shape: Shape, turn: Any) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if shape is not None and turn and len(shape) > 1 else shape


def _fused_matmul(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    return [_product(_turned(shapes[0], attribute(node, "transA", 0)), _turned(shapes[1], attribute(node, "transB", 0)))]


def _quantized_matmul(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    return [_product(shapes[0], shapes[1])]


def _qgemm(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    return [_product(_turned(shapes[0], attribute(node, "transA", 0)), _turned(shapes[3], attribute(node, "transB", 0)))]


def _packed(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    """A product with a weight of N outputs that is packed in blocks."""
    return [(*shapes[0][:-1], attribute(node, "N")) if shapes[0] else None]


def _gathered(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    """GatherBlockQuantized, whose scales say how many blocks a row has: twice those of its elements where each holds two codes."""
    table, indices, scales = shapes[:3]
    if table is None or indices is None or scales is None:
        return [None]
    axis = attribute(node, "gather_axis", 0)
    codes = 2 if math.ceil(table[-1] / attribute(node, "block_size", 128)) < scales[-1] else 1
    return [(*table[:axis], *indices, *table[axis + 1 : -1], table[-1] * codes)]


def _attention(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    """Attention and QAttention: [B, S, inputs] → [B, S, hidden], present [2, B, heads, P + S, head size]."""
    if shapes[0] is None or len(shapes) < 2 or shapes[1] is None:
        return [None] * len(node.output)
    batch, length = shapes[0][:2]
    sizes = attribute(node, "qkv_hidden_sizes")
    hidden = sizes[2] if sizes else shapes[1][-1] // 3
    heads = attribute(node, "num_heads")
    past = next((shape for name, shape in zip(node.input[4:], shapes[4:], strict=True) if name and shape and len(shape) == 5), None)
    return [(batch, length, hidden), (2, batch, heads, length + (past[3] if past else 0), hidden // heads)]


def _multi_head(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    """MultiHeadAttention: query [B, S, hidden], key [B, T, hidden], value [B, T, hidden of values] (or [B, heads, T, head size])."""
    query, key, value = (*shapes, None, None)[:3]
    if query is None:
        return [None] * len(node.output)
    if len(query) == 5:  # packed [B, S, heads, 3, head size]
        return [(query[0], query[1], query[2] * query[4])]
    heads = attribute(node, "num_heads")
    width = query[2] if value is None else value[1] * value[3] if len(value) == 4 else value[2]
    if key is None:
        return [(*query[:2], width)]
    own = key[2] if len(key) == 4 else key[1]
    past = shapes[6] if len(shapes) > 6 else None
    total = own + (past[2] if past else 0)
    return [(*query[:2], width), (query[0], heads, total, query[2] // heads), (query[0], heads, total, width // heads)]


def _grouped_query(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    """GroupQueryAttention: query [B, S, heads · size], or all of query, key and value in one; past [B, kv heads, P, size]."""
    query = shapes[0]
    if query is None:
        return [None] * len(node.output)
    heads, kv_heads = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
    packed = len(shapes) < 2 or shapes[1] is None
    size = query[2] // (heads + 2 * kv_heads) if packed else query[2] // heads
    past = shapes[3] if len(shapes) > 3 else None
    present = (query[0], kv_heads, query[1] + (past[2] if past else 0), size)
    return [(query[0], query[1], heads * size), present, present]


def _skip_norm(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    """Output, mean and inverse deviation (not used in inference), and the sum of input and skip."""
    return [shapes[0], (0,), (0,), shapes[0]]


def _embed_norm(node: onnx.NodeProto, shapes: list[Shape]) -> list[Shape]:
    table = shapes[2]
    if shapes[0] is None or table is None:
        return [None] * len(node.output)
    return [(*shapes[0], table[1]), (shapes[0][0],), (*shapes[0], table[1])]


_RULES: dict[str, Callable[[Any, list[Shape]], list[Shape]]] = {
    "MatMulNBits": _packed, "MatMulBnb4": _packed, "FusedMatMul": _fused_matmul, "DynamicQuantizeMatMul": _quantized_matmul,
    "MatMulIntegerToFloat": _quantized_matmul, "QGemm": _qgemm, "GatherBlockQuantized": _gathered, "Attention": _attention, "QAttention": _attention,
    "MultiHeadAttention": _multi_head, "GroupQueryAttention": _grouped_query, "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm, "EmbedLayerNormalization": _embed_norm, "RotaryEmbedding": _first, "Gelu": _first,
    "FastGelu": _first, "BiasGelu": _first, "QuickGelu": _first, "FusedGemm": lambda node, shapes: [
        _product(_turned(shapes[0], attribute(node, "transA", 0)), _turned(shapes[1], attribute(node, "transB", 0)))
    ],
    "QLinearAdd": lambda node, shapes: [_broadcast(shapes[0], shapes[3])], "QLinearMul": lambda node, shapes: [_broadcast(shapes[0], shapes[3])],
    "QLinearSigmoid": _first, "QLinearLeakyRelu": _first, "QLinearSoftmax": _first, "QuantizeLinear": _first, "DequantizeLinear": _first,
    "BiasAdd": _first, "GroupNorm": _first,
}  # fmt: skip
"""Operator → shapes of its outputs from those of its inputs."""

_CODES_FROM = {
    "QGemm": 8, "QLinearAdd": 0, "QLinearMul": 0, "QLinearSigmoid": 0, "QLinearLeakyRelu": 0, "QLinearSoftmax": 0, "QuantizeLinear": 2,
}  # fmt: skip
"""Operator that makes codes → the input of their type: other codes, or their zero point."""
_FLOAT, _UINT8, _INT32, _FLOATS = 1, 2, 6, (1, 10, 11, 16)
"""Numbers of TensorProto: float32, uint8, int32; float32, float16, float64 and bfloat16."""


def _broadcast(left: Shape, right: Shape) -> Shape:
    return None if left is None or right is None else tuple(np.broadcast_shapes(left, right))
