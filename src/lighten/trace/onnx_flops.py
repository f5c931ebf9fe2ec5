"""FLOPs of an ONNX operator from the shapes of what it reads and makes: 2 per multiply-add of a product; the rest as `cost.operators` counts it.

Shape legend: B batch, S new positions, T positions attended to, K inner size of a product, H heads, D head size.
Source: the operators' definitions in docs/Operators.md of ONNX and docs/ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lighten.cost.operators import NORM_FLOPS, SOFTMAX_FLOPS, OpKind, sum_of_run
from lighten.trace.onnx_shapes import Shape, attribute

if TYPE_CHECKING:
    import onnx

Shapes: TypeAlias = list[Shape]


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one node computes.

    Attributes:
        causal_flops: without the scores that the operator itself masks; None where another node may mask them.
        rows, columns, outputs, products: as `Op` has them.
    """

    kind: OpKind
    matmul_flops: int = 0
    causal_flops: int | None = None
    other_flops: int = 0
    rows: int = 0
    columns: int = 0
    outputs: int = 0
    products: int = 0


MOVES = frozenset({
    "Reshape", "Transpose", "Slice", "Concat", "Cast", "CastLike", "Shape", "Size", "Unsqueeze", "Squeeze", "Gather", "GatherElements", "GatherND",
    "Expand", "Identity", "Constant", "ConstantOfShape", "Split", "Tile", "Flatten", "Range", "ScatterND", "ScatterElements", "Pad", "Trilu",
    "OneHot", "EyeLike", "NonZero", "Where", "Not", "And", "Or", "Xor", "Dropout", "DepthToSpace", "SpaceToDepth", "GatherBlockQuantized", "Compress",
    "SequenceConstruct", "SequenceAt", "ConcatFromSequence", "SplitToSequence", "IsNaN", "IsInf", "ReverseSequence", "BitwiseAnd", "BitwiseOr",
    "BitwiseNot", "TensorScatter",
})  # fmt: skip
"""Operators that move, choose or name values and compute none."""

ELEMENTWISE = {
    **dict.fromkeys((
        "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Erf", "Tanh", "Sigmoid", "Relu", "Neg", "Abs", "Reciprocal", "Max", "Min", "Sin",
        "Cos", "Gelu", "FastGelu", "Softplus", "Sign", "Floor", "Ceil", "Round", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "HardSigmoid", "Mod",
        "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "CumSum", "Softsign", "Celu", "Mean", "Sum", "BiasAdd", "QLinearSigmoid",
        "QLinearLeakyRelu", "Swish",
    ), 1),
    "BiasGelu": 2, "QuickGelu": 3, "HardSwish": 3, "Mish": 3, "Softmax": SOFTMAX_FLOPS, "LogSoftmax": SOFTMAX_FLOPS, "QLinearSoftmax": SOFTMAX_FLOPS,
    "RotaryEmbedding": 3, "QuantizeLinear": 2, "DequantizeLinear": 2, "DynamicQuantizeLinear": 4, "QLinearAdd": 4, "QLinearMul": 4,
}  # fmt: skip
"""Operations on each element that is made; a transcendental function counts as one, as profilers count it. (De)quantizing: scale and shift;
finding a dynamic scale: minimum and maximum beside them."""

REDUCTIONS = {
    "ReduceSum": 1, "ReduceMean": 1, "ReduceMax": 1, "ReduceMin": 1, "ReduceProd": 1, "ReduceL1": 2, "ReduceL2": 2, "ReduceSumSquare": 2,
    "ReduceLogSumExp": 2, "GlobalAveragePool": 1, "GlobalMaxPool": 1, "ArgMax": 1, "ArgMin": 1, "LpNormalization": 3,
}  # fmt: skip
"""Operations on each element that is read."""

NORMS = {
    "LayerNormalization": NORM_FLOPS["layernorm"], "SimplifiedLayerNormalization": NORM_FLOPS["rmsnorm"], "RMSNormalization": NORM_FLOPS["rmsnorm"],
    "SkipLayerNormalization": NORM_FLOPS["layernorm"] + 1, "SkipSimplifiedLayerNormalization": NORM_FLOPS["rmsnorm"] + 1,
    "EmbedLayerNormalization": NORM_FLOPS["layernorm"] + 2, "InstanceNormalization": NORM_FLOPS["groupnorm"],
    "GroupNormalization": NORM_FLOPS["groupnorm"], "GroupNorm": NORM_FLOPS["groupnorm"], "BatchNormalization": NORM_FLOPS["batchnorm"],
    "MeanVarianceNormalization": 6,
}  # fmt: skip
"""Operations on each element of the output; a skip adds one, the embedding's sums two."""


def count_node(node: onnx.NodeProto, read: Shapes, made: Shapes) -> Counted | None:
    """The FLOPs of a node; None where they are not known, for its operator or for its shapes.

    Args:
        read, made: shapes of its inputs and outputs in order, None where unknown or left out.
    """
    if node.op_type in MOVES:
        return Counted(kind="gather")
    out = made[0] if made else None
    if node.op_type in PRODUCTS:
        return PRODUCTS[node.op_type](node, read, made) if out is not None else None
    if node.op_type in REDUCTIONS:
        return None if read[0] is None else Counted(kind="elementwise", other_flops=REDUCTIONS[node.op_type] * math.prod(read[0]))
    if out is None:
        return None
    rows, columns = math.prod(out[:-1]), out[-1] if out else 1
    if node.op_type in NORMS:
        return Counted(kind="norm", other_flops=NORMS[node.op_type] * math.prod(out), rows=rows, columns=columns)
    if node.op_type in ELEMENTWISE:
        return Counted(kind="elementwise", other_flops=ELEMENTWISE[node.op_type] * math.prod(out), rows=rows, columns=columns)
    if node.op_type in ("AveragePool", "MaxPool"):
        return Counted(kind="elementwise", other_flops=math.prod(out) * math.prod(attribute(node, "kernel_shape", ())), rows=rows, columns=columns)
    return None


def _product(left: Shape, right: Shape, out: Shape, inner: int | None = None, bias: int = 0) -> Counted | None:
    """left × right = out; one product where the right side is a matrix, else one for each of the leading sizes."""
    if left is None or out is None or (right is None and inner is None):
        return None
    k = left[-1] if inner is None else inner
    outputs = out[-1] if out and (right is None or len(right) > 1) else 1
    single = right is None or len(right) <= 2
    flops = 2 * math.prod(out) * k
    return Counted(
        kind="linear", matmul_flops=flops, other_flops=bias * math.prod(out), rows=math.prod(out) // max(outputs, 1), columns=k, outputs=outputs,
        products=0 if single or right is None else math.prod(out[:-2]),
    )  # fmt: skip


def _at(left: int, right: int) -> Callable[[Any, Shapes, Shapes], Counted | None]:
    """A product of the inputs at two places."""
    return lambda node, read, made: _product(read[left], read[right], made[0])


def _gemm(node: Any, read: Shapes, made: Shapes, second: int = 1, bias_at: int = 2) -> Counted | None:
    left = read[0]
    if left is None or len(left) != 2:
        return None
    inner = left[0] if attribute(node, "transA", 0) else left[1]
    has_bias = len(node.input) > bias_at and node.input[bias_at] != ""
    return _product(left, read[second], made[0], inner, int(has_bias))


def _fused_matmul(node: Any, read: Shapes, made: Shapes) -> Counted | None:
    left = read[0]
    inner = left[-2] if left is not None and attribute(node, "transA", 0) and len(left) > 1 else None
    return _product(left, read[1], made[0], inner)


def _packed(node: Any, read: Shapes, made: Shapes) -> Counted | None:
    return _product(read[0], None, made[0], int(attribute(node, "K")))


def _conv(weight_at: int) -> Callable[[Any, Shapes, Shapes], Counted | None]:
    def count(node: Any, read: Shapes, made: Shapes) -> Counted | None:
        weight, out = read[weight_at], made[0]
        if weight is None or out is None:
            return None
        inner = math.prod(weight[1:])
        bias = weight_at == 1 and len(read) > 2 and node.input[2] != ""
        return Counted(
            kind="linear", matmul_flops=2 * math.prod(out) * inner, other_flops=math.prod(out) if bias else 0,
            rows=math.prod(out) // max(weight[0], 1), columns=inner, outputs=weight[0],
        )  # fmt: skip

    return count


def _conv_transpose(node: Any, read: Shapes, made: Shapes) -> Counted | None:
    given, weight = read[0], read[1]
    if given is None or weight is None:
        return None
    inner = math.prod(weight[1:])
    return Counted(
        kind="linear", matmul_flops=2 * math.prod(given) * inner, rows=math.prod(given) // max(given[1], 1), columns=given[1], outputs=inner
    )


def _einsum(node: Any, read: Shapes, made: Shapes) -> Counted | None:
    """One or two operands: each combination of indices is one multiply-add, or one multiplication where none is summed over."""
    equation = attribute(node, "equation", b"").decode().replace(" ", "")
    if any(shape is None for shape in read) or len(read) > 2 or "." in equation:
        return None
    given, _, result = equation.partition("->")
    sizes: dict[str, int] = {}
    for letters, shape in zip(given.split(","), read, strict=True):
        sizes |= dict(zip(letters, shape or (), strict=True))
    if "->" not in equation:
        result = "".join(letter for letter in sizes if given.count(letter) == 1)
    combinations = math.prod(sizes.values())
    summed = [letter for letter in sizes if letter not in result]
    if len(read) == 2 and summed:
        inner = math.prod(sizes[letter] for letter in summed)
        return Counted(kind="linear", matmul_flops=2 * combinations, rows=combinations // inner, columns=inner, outputs=1)
    return Counted(kind="elementwise", other_flops=combinations)


def scores(products: tuple[int, int], new: int, keys: int, sizes: tuple[int, int], *, causal: bool | None, window: int | None = None) -> Counted:
    """softmax(Q Kᵀ) V.

    Args:
        products: the batch, and heads of query.
        new, keys: positions that attend, and that are attended to.
        sizes: of a key head and of a value head.
        causal: whether it masks by itself what comes later; None where a mask that it is given may.
        window: keys that a query sees at most.
    """
    (batch, heads), pairs = products, new * keys
    if causal:
        pairs -= new * (new - 1) // 2
        if window is not None and 0 < window < keys:
            first = min(new, max(0, window - (keys - new)))
            pairs = sum_of_run(keys - new + 1, first) + (new - first) * window
    each = 2 * batch * heads * sum(sizes)
    return Counted(
        kind="attention", matmul_flops=each * new * keys, causal_flops=None if causal is None else each * pairs,
        other_flops=batch * heads * new * keys * SOFTMAX_FLOPS, rows=new, columns=keys, outputs=sizes[0], products=batch * heads,
    )  # fmt: skip


def _standard_attention(node: Any, read: Shapes, made: Shapes) -> Counted | None:
    """Attention of ONNX itself (opset 23): [B, H, S, D], or [B, S, H · D] with the heads as attributes."""
    if node.domain == "com.microsoft":
        return _fused_attention(node, read, made)
    query, key, value = read[:3]
    if query is None or key is None or value is None:
        return None
    if len(query) == 4:
        batch, heads, new, size = query
        keys, value_size = key[2], value[3]
    else:
        heads, kv_heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
        batch, new, size = query[0], query[1], query[2] // heads
        keys, value_size = key[1], value[2] // kv_heads
    past = read[4] if len(read) > 4 else None
    masked = len(read) > 3 and node.input[3] != ""
    causal = True if attribute(node, "is_causal", 0) else None if masked else False
    return scores((batch, heads), new, keys + (past[2] if past else 0), (size, value_size), causal=causal)


def _fused_attention(node: Any, read: Shapes, made: Shapes) -> Counted | None:
    """Attention and QAttention of ONNX Runtime: the projections of query, key and value, and the product of their heads."""
    given, weight, out = read[0], read[1], made[0]
    if given is None or weight is None or out is None:
        return None
    batch, length, inner = given
    heads, value = attribute(node, "num_heads"), out[2]
    sizes = attribute(node, "qkv_hidden_sizes")
    query = sizes[0] if sizes else weight[1] // 3
    present = made[1] if len(made) > 1 else None
    keys = present[3] if present else length
    causal = True if attribute(node, "unidirectional", 0) else None if len(node.input) > 3 and node.input[3] else False
    product = scores((batch, heads), length, keys, (query // heads, value // heads), causal=causal)
    projected = 2 * batch * length * inner * weight[1]
    return Counted(
        kind="attention", matmul_flops=product.matmul_flops + projected,
        causal_flops=None if product.causal_flops is None else product.causal_flops + projected,
        other_flops=product.other_flops + batch * length * weight[1], rows=length, columns=keys, outputs=query // heads, products=batch * heads,
    )  # fmt: skip


def _multi_head(node: Any, read: Shapes, made: Shapes) -> Counted | None:
    query, out = read[0], made[0]
    if query is None or out is None:
        return None
    heads = attribute(node, "num_heads")
    key = read[1] if len(read) > 1 else None
    present = made[1] if len(made) > 1 else None
    own = (key[2] if len(key) == 4 else key[1]) if key is not None else query[1]
    width = query[2] if len(query) == 3 else query[2] * query[4]
    if len(query) == 3 and key is not None and len(key) == 5:
        own = key[1]
    size = width // heads if key is not None or len(query) == 5 else out[2] // heads
    masked = len(node.input) > 4 and any(node.input[4:6])
    causal = True if attribute(node, "unidirectional", 0) else None if masked else False
    return scores((query[0], heads), query[1], present[2] if present else own, (size, out[2] // heads), causal=causal)


def _grouped_query(node: Any, read: Shapes, made: Shapes) -> Counted | None:
    """Causal by definition; the last `local_window_size` keys where that is given."""
    out, present = made[0], made[1] if len(made) > 1 else None
    if out is None:
        return None
    heads, window = attribute(node, "num_heads"), attribute(node, "local_window_size", -1)
    size = out[2] // heads
    turned = 3 * math.prod(out) if attribute(node, "do_rotary", 0) else 0
    found = scores(
        (out[0], heads), out[1], present[2] if present else out[1], (size, size), causal=True, window=window if window and window > 0 else None
    )
    return Counted(**{**vars(found), "other_flops": found.other_flops + turned})


def _recurrent(gates: int) -> Callable[[Any, Shapes, Shapes], Counted | None]:
    def count(node: Any, read: Shapes, made: Shapes) -> Counted | None:
        given, weight = read[0], read[1]
        if given is None or weight is None:
            return None
        hidden = attribute(node, "hidden_size", weight[1] // gates)
        rows = given[0] * given[1] * weight[0]
        return Counted(
            kind="linear", matmul_flops=2 * rows * gates * hidden * (weight[2] + hidden), other_flops=rows * hidden * 4 * gates,
            rows=rows, columns=weight[2] + hidden, outputs=gates * hidden,
        )  # fmt: skip

    return count


PRODUCTS: dict[str, Callable[[Any, Shapes, Shapes], Counted | None]] = {
    "MatMul": _at(0, 1), "MatMulInteger": _at(0, 1), "DynamicQuantizeMatMul": _at(0, 1), "MatMulIntegerToFloat": _at(0, 1),
    "QLinearMatMul": _at(0, 3), "FusedMatMul": _fused_matmul, "Gemm": _gemm, "FusedGemm": _gemm,
    "QGemm": lambda node, read, made: _gemm(node, read, made, second=3, bias_at=6), "MatMulNBits": _packed, "MatMulBnb4": _packed,
    "Conv": _conv(1), "FusedConv": _conv(1), "ConvInteger": _conv(1), "QLinearConv": _conv(3), "ConvTranspose": _conv_transpose, "Einsum": _einsum,
    "Attention": _standard_attention, "QAttention": _fused_attention, "MultiHeadAttention": _multi_head, "GroupQueryAttention": _grouped_query,
    "LSTM": _recurrent(4), "GRU": _recurrent(3), "RNN": _recurrent(1),
}  # fmt: skip
"""Operators with matrix products → what counts them."""
