"""Attention of an exported encoder as one operator of ONNX Runtime's own.

    softmax(Q Kᵀ · scale + mask) V,  Q, K, V [B, S, H · D]   becomes   com.microsoft.MultiHeadAttention

ONNX Runtime fuses norms, biases and activation functions by itself when it loads a graph, but attention only in the form of older exporters. What is
not of exactly this form stays as it is: a mask that is more than which tokens are padding, positions inside of attention, shared key and value heads.

Source: onnxruntime's contrib operators, com.microsoft.MultiHeadAttention.

Shape legend: B batch_size, S length, H heads, D columns of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lighten.formats.graph_inputs import ENCODER_INPUTS, HEADS_FIRST, KEYS_TURNED
from lighten.model.spec import Attention, ModelSpec

MASK = ENCODER_INPUTS[1]
PADDING = "attention_mask_int32"
"""The mask in the type that the operator takes."""


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
                "MultiHeadAttention", [query, key, value, "", PADDING], [last.output[0]], f"{last.name}/attention", domain="com.microsoft",
                num_heads=min(heads), scale=scale, mask_filter_value=graph.filtered(softmax),
            )  # fmt: skip
            fused[last.output[0]].metadata_props.extend(softmax.metadata_props)
    if not fused:
        return 0
    cast = helper.make_node("Cast", [MASK], [PADDING], "padding", to=TensorProto.INT32)
    nodes = [cast, *(fused.get(node.output[0], node) for node in model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(_needed(nodes, [output.name for output in model.graph.output]))
    if "com.microsoft" not in {each.domain for each in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(fused)


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


def _needed(nodes: list[Any], outputs: list[str]) -> list[Any]:
    """Those that an output comes from, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
