"""Attention of an exported encoder as one operator of ONNX Runtime's own.

    softmax(Q Kᵀ · scale + mask) V,  Q, K, V [B, S, H · D]   becomes   com.microsoft.MultiHeadAttention
    where Q, K, V = x W + b of one x                         becomes   com.microsoft.Attention, one product for the three

ONNX Runtime fuses norms, biases and activation functions by itself when it loads a graph, but attention only in the form of older exporters. What is
not of exactly this form stays as it is: a mask that is more than which tokens are padding, positions inside of attention, shared key and value heads.

Source: onnxruntime's contrib operators, com.microsoft.MultiHeadAttention and com.microsoft.Attention.

Shape legend: B batch_size, S length, H heads, D columns of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lighten.formats.graph_inputs import ENCODER_INPUTS, HEADS_FIRST, KEYS_TURNED
from lighten.model.spec import Attention, ModelSpec

MASK = ENCODER_INPUTS[1]
PADDING = "attention_mask_int32"
"""The mask in the type that the operator takes."""
DOMAIN = "com.microsoft"
Array: TypeAlias = np.ndarray[Any, Any]


def fuse_attention(model: Any, spec: ModelSpec) -> int:
    """Put the operator in the place of every attention that has its form, in place.

    Args:
        model: an ONNX graph of an encoder, with `attention_mask` [B, S] among its inputs.

    Returns:
        how many there are.
    """
    from onnx import TensorProto, helper

    heads = {count for part in spec.parts if isinstance(part, Attention) for count in (part.num_attention_heads, part.num_key_value_heads)}
    if len(heads) != 1 or spec.is_decoder or MASK not in {each.name for each in model.graph.input}:
        return 0
    graph, fused = _Graph(model.graph), {}
    for softmax in [node for node in model.graph.node if node.op_type == "Softmax"]:
        if (found := graph.attention(softmax)) is not None:
            last, query, key, value, scale = found
            fused[last.output[0]] = helper.make_node(
                "MultiHeadAttention", [query, key, value, "", PADDING], [last.output[0]], f"{last.name}/attention", domain=DOMAIN,
                num_heads=min(heads), scale=scale, mask_filter_value=graph.filtered(softmax),
            )  # fmt: skip
            fused[last.output[0]].metadata_props.extend(softmax.metadata_props)
    if not fused:
        return 0
    cast = helper.make_node("Cast", [MASK], [PADDING], "padding", to=TensorProto.INT32)
    nodes = [cast, *(fused.get(node.output[0], node) for node in model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(needed(nodes, [output.name for output in model.graph.output]))
    declare(model)
    return len(fused)


def join_products(model: Any) -> int:
    """Put one product and its attention in the place of every attention whose query, key and value are sums of a constant and a product of one input,
    in place.

    Args:
        model: an ONNX graph after `fuse_attention`, with its weights.

    Returns:
        how many there are.
    """
    from onnx import helper, numpy_helper

    graph, values = model.graph, constants_of(model.graph)
    givers = {output: node for node in graph.node for output in node.output}
    reads = Counter(name for node in graph.node for name in node.input)
    joined = 0
    for node in graph.node:
        parts = [_weights_of(name, givers, reads, values) for name in node.input[:3]] if node.op_type == "MultiHeadAttention" else []
        found = [part for part in parts if part is not None]
        if len(found) < 3 or len({source for source, _, _ in found}) > 1 or len({weight.shape for _, weight, _ in found}) > 1:
            continue
        source, out, names = found[0][0], node.output[0], []
        for kind, arrays in (("weight", [weight for _, weight, _ in found]), ("bias", [bias for _, _, bias in found])):
            names.append(f"{out}_joined_{kind}")
            graph.initializer.append(numpy_helper.from_array(np.concatenate(arrays, axis=-1), names[-1]))
        told = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        one = helper.make_node("Attention", [source, *names, node.input[4]], [out], node.name, domain=DOMAIN, **told)
        one.metadata_props.extend(node.metadata_props)
        node.CopyFrom(one)
        joined += 1
    nodes = needed(list(graph.node), [output.name for output in graph.output])
    del graph.node[:]
    graph.node.extend(nodes)
    keep_read(graph)
    return joined


def _weights_of(value: str, givers: Mapping[str, Any], reads: Mapping[str, int], values: Mapping[str, Array]) -> tuple[str, Array, Array] | None:
    """x, W [I, O] and b [O] of a value that is x W + b and read once."""
    added = givers.get(value)
    if added is None or added.op_type != "Add" or reads[value] != 1:
        return None
    product, bias = next(((each, other) for each, other in (added.input, reversed(added.input)) if other in values), ("", ""))
    node = givers.get(product)
    if node is None or node.op_type != "MatMul" or reads[product] != 1 or node.input[1] not in values:
        return None
    weight = values[node.input[1]]
    return (node.input[0], weight, values[bias]) if weight.ndim == 2 and values[bias].shape == weight.shape[1:] else None


def constants_of(graph: Any) -> dict[str, Array]:
    """Its initializers, by name."""
    from onnx import numpy_helper

    return {each.name: numpy_helper.to_array(each) for each in graph.initializer}


def declare(model: Any) -> None:
    """Say that a graph has operators of ONNX Runtime's own."""
    from onnx import helper

    if DOMAIN not in {each.domain for each in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def keep_read(graph: Any) -> None:
    """Drop the constants that nothing reads."""
    read = {name for node in graph.node for name in node.input}
    kept = [each for each in graph.initializer if each.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


class _Graph:
    """Who gives and who reads each value."""

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        self._constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer if not i.dims or np.prod(i.dims) == 1}
        self._givers = {output: node for node in graph.node for output in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def attention(self, softmax: Any) -> tuple[Any, str, str, str, float] | None:
        """(the last of its nodes; query, key and value before they become heads; the scores' factor), of what has exactly the form."""
        added = self._giver(softmax.input[0], "Add")
        if added is None or not self._is_padding(added.input[1]):
            return None
        scaled = self._giver(added.input[0], "Mul")
        scores = self._giver(scaled.input[0], "MatMul") if scaled is not None and scaled.input[1] in self._constants else None
        mixed = self._reader(softmax.output[0], "MatMul")
        turned = self._reader(mixed.output[0], "Transpose") if mixed is not None and mixed.input[0] == softmax.output[0] else None
        last = self._reader(turned.output[0], "Reshape") if turned is not None and _order(turned) == HEADS_FIRST else None
        if scaled is None or scores is None or mixed is None or last is None:
            return None
        sides = (scores.input[0], HEADS_FIRST), (scores.input[1], KEYS_TURNED), (mixed.input[1], HEADS_FIRST)
        query, key, value = (self._before(heads, order) for heads, order in sides)
        if query is None or key is None or value is None:
            return None
        return last, query, key, value, float(self._constants[scaled.input[1]])

    def filtered(self, softmax: Any) -> float:
        """What is added to the scores of padding."""
        where = self._givers[self._givers[softmax.input[0]].input[1]]
        return float(self._constants[where.input[1]])

    def _before(self, heads: str, order: list[int]) -> str | None:
        """[B, S, H · D] of heads."""
        transpose = self._giver(heads, "Transpose")
        reshape = self._giver(transpose.input[0], "Reshape") if transpose is not None and _order(transpose) == order else None
        return None if reshape is None else str(reshape.input[0])

    def _is_padding(self, mask: str) -> bool:
        """Whether it is 0 for tokens, and something constant for padding: where(attention_mask == 0, c, 0), and nothing else."""
        where = self._givers.get(mask)
        if where is None or where.op_type != "Where" or not {where.input[1], where.input[2]} <= self._constants.keys():
            return False
        equal = self._givers.get(where.input[0])
        if equal is None or equal.op_type != "Equal" or float(self._constants.get(equal.input[1], np.ones(1)).reshape(())) != 0:
            return False
        shaped = self._givers.get(equal.input[0])
        return shaped is not None and shaped.op_type == "Unsqueeze" and shaped.input[0] == MASK and not float(self._constants[where.input[2]])

    def _giver(self, value: str, kind: str) -> Any | None:
        """What gives a value that is read once."""
        node = self._givers.get(value)
        return node if node is not None and node.op_type == kind and len(self._readers[value]) == 1 else None

    def _reader(self, value: str, kind: str) -> Any | None:
        """What alone reads a value."""
        found = self._readers.get(value, [])
        return found[0] if len(found) == 1 and found[0].op_type == kind else None


def _order(transpose: Any) -> list[int]:
    return next(([int(axis) for axis in each.ints] for each in transpose.attribute if each.name == "perm"), [])


def needed(nodes: list[Any], outputs: Sequence[str]) -> list[Any]:
    """Those that an output comes from, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
