"""Rewrites of an OpenVINO graph that change no value: query, key and value become one product; what scales or divides goes where weights are.

Shape legend: B batch_size, S length, I columns (input features), O rows of a weight, H heads, D columns of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lighten.formats.graph_inputs import HEADS_FIRST, KEYS_TURNED

Array: TypeAlias = np.ndarray[Any, Any]

JOINED_FIRST = [2, 0, 3, 1, 4]
"""[B, S, 3, H, D] → [3, B, H, S, D]."""


def constant_of(output: Any) -> Array | None:
    """The values of a constant of floats; None: it is something else."""
    node = output.get_node()
    if node.get_type_name() != "Constant" or node.get_element_type().to_string() not in ("f32", "f16", "bf16"):
        return None
    return np.array(node.data, np.float32)


def make_constant(values: Array) -> Any:
    import openvino

    return openvino.op.Constant(np.ascontiguousarray(values, np.float32))


def _is_product(node: Any) -> bool:
    """Whether it is x W or x Wᵀ, W a constant."""
    if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
        return False
    weight = constant_of(node.input_value(1))
    return weight is not None and weight.ndim == 2 and constant_of(node.input_value(0)) is None


def find_products(model: Any) -> list[Any]:
    """In the order of the graph."""
    return [node for node in model.get_ordered_ops() if _is_product(node)]


def weight_of(node: Any) -> Array:
    """[O, I] of a product."""
    values = constant_of(node.input_value(1))
    assert values is not None, "the weight of a product is constant"
    return values if node.get_attributes()["transpose_b"] else values.T.copy()


def bias_of(product: Any) -> Any | None:
    """Where a sum that alone reads the product takes its other summand, a constant [O]."""
    targets = list(product.output(0).get_target_inputs())
    if len(targets) != 1 or targets[0].get_node().get_type_name() != "Add":
        return None
    other = targets[0].get_node().input(1 - targets[0].get_index())
    bias = constant_of(other.get_source_output())
    return other if bias is not None and bias.shape == (outputs_of(product),) else None


def outputs_of(product: Any) -> int:
    """O."""
    return int(product.get_output_partial_shape(0)[-1].get_length())


def join_heads(model: Any) -> int:
    """Products with biases that share an input and become heads, query, key and value, become one product, in place.

    All are turned at once, [B, S, 3, H, D] → [3, B, H, S, D], of which each is a part that nobody has to copy.

    Returns:
        how many there are.
    """
    from openvino import opset13 as op

    by_source: dict[tuple[str, int], list[_Heads]] = {}
    for node in find_products(model):
        if (heads := _heads_of(node)) is not None:
            source = node.input_value(0)
            by_source.setdefault((source.get_node().get_friendly_name(), source.get_index()), []).append(heads)
    joined = [group for group in by_source.values() if len(group) > 1 and len({heads.weight.shape for heads in group}) == 1]
    for group in joined:
        rows, width = group[0].weight.shape[0], group[0].width
        product = op.matmul(group[0].product.input_value(0), make_constant(np.concatenate([heads.weight for heads in group])), False, True)
        product.set_friendly_name("+".join(heads.product.get_friendly_name() for heads in group))
        added = op.add(product, make_constant(np.concatenate([heads.bias for heads in group])))
        shaped = op.reshape(added, op.constant([0, 0, len(group), rows // width, width], np.int64), True)
        parts = op.split(op.transpose(shaped, op.constant(JOINED_FIRST, np.int64)), op.constant(0, np.int64), len(group))
        for place, heads in enumerate(group):
            part = op.squeeze(parts.output(place), op.constant([0], np.int64))
            turned = part if _order(heads.transpose) == HEADS_FIRST else op.transpose(part, op.constant([0, 1, 3, 2], np.int64))
            heads.transpose.output(0).replace(turned.output(0))
    return len(joined)


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """x Wᵀ + bias that becomes heads.

    Attributes:
        weight: [H · D, I].
        bias: [H · D].
        transpose: what gives the heads, [B, H, S, D] or [B, H, D, S].
        width: D.
    """

    product: Any
    weight: Array
    bias: Array
    transpose: Any
    width: int


def _heads_of(product: Any) -> _Heads | None:
    if (bias := bias_of(product)) is None:
        return None
    shaped = only_reader(bias.get_node(), "Reshape")
    if shaped is None or (width := shaped.get_output_partial_shape(0)[-1]).is_dynamic:
        return None
    transpose = only_reader(shaped, "Transpose")
    if transpose is None or _order(transpose) not in (HEADS_FIRST, KEYS_TURNED):
        return None
    values = bias.get_source_output().get_node().data
    return _Heads(product=product, weight=weight_of(product), bias=values, transpose=transpose, width=width.get_length())


def only_reader(node: Any, kind: str) -> Any | None:
    """What alone reads a value, as its first input; None: it is of another kind, or they are several."""
    targets = list(node.output(0).get_target_inputs())
    return targets[0].get_node() if len(targets) == 1 and targets[0].get_index() == 0 and targets[0].get_node().get_type_name() == kind else None


def divide_source(source: Any, scales: Array) -> Any | None:
    """source / scales [I] at no cost: of a norm, x · weight + bias, both are divided beside it; of attention's heads, what gives their values.

    None: its source is neither.
    """
    return _divided_norm(source, scales) or _divided_heads(source, scales)


def _divided_norm(source: Any, scales: Array) -> Any | None:
    from openvino import opset13 as op

    add = source.get_node()
    if add.get_type_name() != "Add" or (bias := constant_of(add.input_value(1))) is None:
        return None
    multiply = add.input_value(0).get_node()
    if multiply.get_type_name() != "Multiply" or (weight := constant_of(multiply.input_value(1))) is None:
        return None
    return op.add(op.multiply(multiply.input_value(0), make_constant(weight / scales)), make_constant(bias / scales)).output(0)


def _divided_heads(source: Any, scales: Array) -> Any | None:
    """Attention's output mixes rows of values and no columns: it is divided where a value's weight and bias are."""
    heads = _upstream(source, "Reshape", "Transpose", "MatMul")
    if heads is None or _order(heads[1]) != HEADS_FIRST or heads[2].get_attributes()["transpose_b"]:
        return None
    return source if _divide_heads(heads[2].input_value(1), scales) else None


def scale_queries(model: Any) -> int:
    """What multiplies queries by keys goes into the queries' weights and biases, in place.

    Returns:
        in how many places.
    """
    done = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply" or (factor := constant_of(node.input_value(1))) is None or factor.size != 1:
            continue
        scores = _upstream(node.input_value(0), "MatMul")
        if scores is not None and _divide_heads(scores[0].input_value(0), 1 / factor.reshape(-1)):
            node.output(0).replace(scores[0].output(0))
            done += 1
    return done


def _divide_heads(heads: Any, scales: Array) -> bool:
    """Divide heads [B, H, S, D] by scales [I] where the weight and the bias are that they come from, in place; whether that can be done."""
    number, parts = 0, 1
    if (path := _upstream(heads, "Transpose", "Reshape", "Add")) is not None:
        alike = _order(path[0]) == HEADS_FIRST
    elif (path := _upstream(heads, "Squeeze", "Split", "Transpose", "Reshape", "Add")) is not None:
        alike = _order(path[2]) == JOINED_FIRST
        number, parts = path[0].input_value(0).get_index(), path[1].get_output_size()
    else:
        return False
    product = next((each.get_node() for each in path[-1].input_values() if each.get_node().get_type_name() == "MatMul"), None)
    if not alike or product is None or (bias := bias_of(product)) is None:
        return False
    rows = outputs_of(product) // parts
    divisor = np.ones(rows * parts, np.float32)
    divisor[number * rows :][:rows] = scales
    weight = product.input(1)
    if weight.get_source_output().get_node().get_type_name() == "Multiply":  # codes by scales
        weight = weight.get_source_output().get_node().input(1)
    for place, by in ((bias, divisor), (weight, divisor[:, None] if product.get_attributes()["transpose_b"] else divisor)):
        place.replace_source_output(make_constant(place.get_source_output().get_node().data / by).output(0))
    return True


def _order(transpose: Any) -> list[int]:
    return [int(axis) for axis in transpose.input_value(1).get_node().data]


def _upstream(output: Any, *kinds: str) -> list[Any] | None:
    """The operators that give a value, each the first input of the next, where nothing else reads them; None: they are others."""
    found = []
    for kind in kinds:
        node = output.get_node()
        if node.get_type_name() != kind or len(output.get_target_inputs()) != 1:
            return None
        found.append(node)
        output = node.input_value(0)
    return found
