"""Numbers in a model's code that follow from its width, such as √D times the embedding or 1/√D before a tied head: found by holding the graph of the
smaller model to that of the larger one, and made up for in the weights before them.

Where c becomes c' the tensor that is multiplied is c/c' of what it was: a table of embeddings, or the weight of a norm. A table that is the head
too is then undone in the norm before the head.

Shape legend: D channels of the stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lighten.compress.graph import Graph, Node, Value
from lighten.compress.mappings import MOVE, PASS
from lighten.compress.skeleton import build_module
from lighten.errors import RecipeError

PRODUCTS = ("aten.mm", "aten.bmm", "aten.addmm")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a value is made of by moves alone: the rows of a table, or the output of a norm, by the parameter's name."""

    key: str
    is_table: bool


def constant_factors(before: Graph, after: Graph, configs: tuple[Mapping[str, Any], Mapping[str, Any]], step: str) -> dict[str, float]:
    """Parameter → what it is multiplied by so that the smaller model's numbers give what the larger one's gave.

    Raises:
        RecipeError: a number that follows from the width where no table and no norm is before it.
    """
    ratios = dict(_changed(before, after, configs, step))
    if not ratios:
        return {}
    found = _Sources(before)
    factors: dict[str, float] = {}
    scaled_tables: dict[str, list[float]] = {}
    for number, ratio in ratios.items():
        source = found.of(before.nodes[number].inputs[0])
        if source is None:
            raise RecipeError(f"{step}: the model multiplies by a number that follows from its width where no norm and no table is before it.")
        if source.is_table:
            scaled_tables.setdefault(source.key, []).append(ratio)
        else:
            factors[source.key] = factors.get(source.key, 1.0) * ratio
    for key, each in scaled_tables.items():
        ratio = each[0]
        if set(each) != {ratio} or len(each) != found.lookups(key):
            raise RecipeError(f"{step}: {key} is multiplied by a number that follows from the width in some places alone.")
        factors[key] = ratio
        for x in found.products_with(key):
            norm = found.of(x)
            if norm is None or norm.is_table:
                raise RecipeError(f"{step}: {key} is multiplied by a number that follows from the width, and read where no norm is before it.")
            factors[norm.key] = factors.get(norm.key, 1.0) / ratio
    return factors


def _changed(before: Graph, after: Graph, configs: tuple[Mapping[str, Any], Mapping[str, Any]], step: str) -> Iterator[tuple[int, float]]:
    """Number of a node that multiplies or divides by another number in the smaller model → old over new."""
    pair = [[(number, node) for number, node in enumerate(graph.nodes) if node.name not in MOVE | PASS] for graph in (before, after)]
    if len(pair[0]) != len(pair[1]) or any(one.name != other.name for (_, one), (_, other) in zip(*pair, strict=True)):
        raise RecipeError(f"{step}: the smaller model would run other operators than the model does.")
    old, new = (_buffers(config) if graph.buffers else {} for config, graph in zip(configs, (before, after), strict=True))
    old_made, new_made = _Sources(before), _Sources(after)
    for (number, one), (_, other) in zip(*pair, strict=True):  # copies and views come and go with sizes of 1
        if one.name in ("aten.mul", "aten.div"):
            values = _number(one, old_made, old), _number(other, new_made, new)
            if values[0] is not None and values[1] is not None and values[0] != values[1]:
                yield number, values[0] / values[1] if one.name == "aten.mul" else values[1] / values[0]


def _number(node: Node, made: _Sources, buffers: Mapping[str, Tensor]) -> float | None:
    """The number that a node multiplies by; None: it is none."""
    second = node.args[1]
    if isinstance(second, int | float):
        return float(second)
    if isinstance(second, Value) and not second.shape:
        name = made.buffer(second)
        return float(buffers[name]) if name is not None and name in buffers else None
    return None


def _buffers(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Buffers of one number, with their values."""
    module = build_module(config, dtype=torch.float32)
    return {name: buffer for name, buffer in module.named_buffers() if buffer.ndim == 0 and not buffer.is_meta}


class _Sources:
    """What the values of a graph were made of."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made = {value.index: node for node in graph.nodes for value in node.outputs}
        self._uses = Counter(value.index for node in graph.nodes for value in node.inputs)

    def of(self, value: Value) -> _Source | None:
        """The table or norm whose output a value is, perhaps moved or multiplied by a number."""
        node = self._origin(value)
        if node is None:
            return None
        if node.name == "aten.embedding":
            key = self._parameter(node.args[0])
            return None if key is None else _Source(key=key, is_table=True)
        if node.name in ("aten.native_layer_norm", "aten._fused_rms_norm"):
            key = self._parameter(node.args[2]) if node.args[2] is not None else None
            return None if key is None or (len(node.args) > 3 and isinstance(node.args[3], Value)) else _Source(key=key, is_table=False)
        keys = [key for each in node.inputs if node.name == "aten.mul" and (key := self._parameter(each)) is not None]
        return _Source(key=keys[0], is_table=False) if len(keys) == 1 else None

    def products_with(self, key: str) -> Iterator[Value]:
        """What is multiplied with a parameter."""
        for node in self._graph.nodes:
            if node.name in PRODUCTS:
                left, right = node.args[-2:]
                if self._parameter(right) == key:
                    yield left

    def lookups(self, key: str) -> int:
        """How often rows of a table are looked up."""
        return sum(node.name == "aten.embedding" and self._parameter(node.args[0]) == key for node in self._graph.nodes)

    def buffer(self, value: Value) -> str | None:
        """The name of the buffer that a value is, perhaps cast."""
        while (node := self._made.get(value.index)) is not None and node.name in PASS | MOVE and isinstance(node.args[0], Value):
            value = node.args[0]
        return self._graph.buffers.get(value.index)

    def _origin(self, value: Value) -> Node | None:
        """The node that made a value that nothing else reads, before it was moved or multiplied by a number."""
        while self._uses[value.index] == 1 and (node := self._made.get(value.index)) is not None:
            times = node.name in ("aten.mul", "aten.div") and (not isinstance(node.args[1], Value) or not node.args[1].shape)
            if not times and (node.name not in PASS | MOVE or not isinstance(node.args[0], Value)):
                return node
            value = node.args[0]
        return None

    def _parameter(self, value: Any) -> str | None:
        """The parameter that a value is, perhaps cast, turned, or with 1 added to it as Gemma's norms have it."""
        while isinstance(value, Value):
            if value.index in self._graph.parameters:
                return self._graph.parameters[value.index]
            node = self._made.get(value.index)
            plus = node is not None and node.name == "aten.add" and not isinstance(node.args[1], Value)
            if node is None or not (plus or node.name in PASS | MOVE):
                return None
            value = node.args[0]
        return None
