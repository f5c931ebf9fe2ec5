"""Channels of a model that can only go together, found in its graph: inner features, heads, channels of the stream.

Each index along each axis of a parameter has a label. The labels are followed through the operators of a forward pass; where two meet, neither
can go without the other, and they become one.

    element by element   labels of both sides are united, index by index; a side that is repeated along an axis where the other has several labels
                         (the weight of a norm of each head, a rotary table) stays, and what it is as long as goes as a whole or not at all
    x Wᵀ                 the labels of x and of the columns of W are united; the rows of W label the result
    Q Kᵀ                 what is summed over goes as a whole: a head; queries that share a key are one group with it
    P V                  the labels of the probabilities (a head) and of its values are united
    norm                 keeps labels; a set of channels that one sum runs over is `normed`, for there zeros count
    views, slices, cat   move labels

An operator that is not known fixes all that it reads: a channel may be missed, but none that is found holds less than it should.

Source: dependency graphs of structured pruning, Fang et al. 2023 (arXiv:2301.12900); deviation: labels of single indices take the place of rules
for kinds of layers, so that fused projections and grouped heads need none.

Shape legend: O rows (output features), I columns (input features), K summed features, H heads, d size of a head, C channels of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.compress.graph import Graph, Node, Value
from lighten.compress.mappings import (
    MOVE,
    ONE,
    PASS,
    RULES,
    Channels,
    Factors,
    Follower,
    Known,
    Matrix,
    Vector,
    compact,
    names_by_key,
    norm_arguments,
    parts_of,
    roles_of,
)
from lighten.compress.skeleton import Place

FIXED = ONE
"""The label of what stays."""
MADE = {"aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.scalar_tensor", *(name for name, rule in RULES.items() if rule == "_constant")}
"""Operators that make a tensor of one number."""


@dataclass(frozen=True, kw_only=True)
class ChannelSet:
    """Channels of which any may go, each with all that belongs to it.

    Attributes:
        channels: how many, C.
        ends: the axes of tensors that they lie along; an index of -1 stays.
        consumers: (tensor, axis) that a product sums over.
        normed: one norm runs over all of them.
    """

    channels: int
    ends: tuple[Channels, ...]
    consumers: frozenset[tuple[str, int]]
    normed: bool


def find_sets(graph: Graph, places: AnyMapping[str, Place], *, grouped: bool = True) -> tuple[ChannelSet, ...]:
    """Every set of channels, in the order of the module's parameters, with the checkpoint's names.

    Args:
        grouped: query heads that share a key and value head go with it; else they go alone, and the shared one stays.
    """
    return tuple(_Labels(graph, grouped=grouped).sets(places))


class _Labels(Follower):
    """Follows the labels through a graph."""

    passes = PASS - {"aten.neg", "aten.relu", "aten.leaky_relu", "aten.abs"}
    rules: AnyMapping[str, str] = {
        **{name: rule for name, rule in RULES.items() if rule in ("_product", "_norm", "_constant")},
        **dict.fromkeys(("aten.sum", "aten.mean", "aten.amax", "aten.var", "aten.linalg_vector_norm"), "_reduce"),
        **dict.fromkeys(("aten._softmax", "aten._log_softmax"), "_softmax"),
        "aten.convolution": "_convolve", "aten.embedding": "_embed", "aten.index": "_index",
    }  # fmt: skip

    def __init__(self, graph: Graph, *, grouped: bool) -> None:
        super().__init__(graph)
        self._grouped = grouped
        self._consumed: set[tuple[str, int]] = set()
        self._normed: list[Tensor] = []
        self._uniform: dict[int, Tensor] = {}
        kernels = (node.args[1] for node in graph.nodes if node.name == "aten.convolution")
        self._kernels = {graph.parameters[value.index] for value in kernels if value.index in graph.parameters}

    def sets(self, places: AnyMapping[str, Place]) -> Iterator[ChannelSet]:
        """The sets that are found."""
        self._walk()
        normed = {int(label) for labels in self._normed for label in np.unique(self._factors.find(labels).numpy())} - {FIXED}
        named = names_by_key(places, self._graph.tied)
        roots = {end: self._factors.find(labels).numpy() for end, labels in self._axes.items()}
        for labels, ends in _together(roots):
            parts = [(end, part) for end in ends for part in parts_of(end, named.get(end.name, []))]
            if parts:
                yield ChannelSet(
                    channels=len(labels), ends=tuple(replace(part, offset=self._offsets.get(end.name, 0.0)) for end, part in parts),
                    consumers=frozenset((part.name, part.axis) for end, part in parts if (end.name, end.axis) in self._consumed),
                    normed=not normed.isdisjoint(labels),
                )  # fmt: skip

    def _end(self) -> None:
        """What the model gives may become smaller."""

    # ---- what is known of a value ----

    def _parameter(self, key: str, shape: tuple[int, ...]) -> Known:
        if len(shape) == 1:
            self._axes[key, -1] = names = self._factors.new(*shape)
            return Vector(key, names)
        if not shape:
            return None
        rows, columns = (-len(shape), 1 - len(shape)) if key in self._kernels else (-2, -1)
        matrices = shape[:-2] if rows == -2 else ()
        spread = []
        for axis in (rows, columns):
            self._axes[key, axis] = labels = self._factors.new(*matrices, shape[axis])
            after = [1] * (-1 - axis)
            before = [1] * (len(shape) - len(matrices) - 1 - len(after))
            spread.append(labels.reshape(*matrices, *before, shape[axis], *after).expand(shape))
        return Matrix(key, *spread)

    def _step(self, node: Node) -> None:
        pointwise = torch.Tag.pointwise in node.op.tags
        if not any(self._look(value) is not None for value in node.inputs):
            self._follow_constant(node, pointwise)
        if node.op._schema.is_mutable and pointwise and any(self._look(value) is not None for value in node.inputs):
            self._known[node.outputs[0].index] = self._settled(self._pointwise(node)[0])  # the changed value is the output too
        else:
            super()._step(node)

    def _follow_constant(self, node: Node, pointwise: bool) -> None:
        """Along which axes a value without labels is the same throughout, so that it may be made in any size: those of stride 0."""
        shapes = [out.shape for out in node.outputs]
        if node.name in MADE:
            found = [torch.zeros(()).expand(shape) for shape in shapes]
        elif pointwise and len(shapes) == 1:
            found = [torch.zeros(np.broadcast_shapes(*map(self._extent, node.inputs))).expand(shapes[0])]
        elif node.name in MOVE | self.passes and node.inputs == [node.args[0]] and node.args[0].index in self._uniform:
            before = self._uniform[node.args[0].index]
            found = [before] if node.name in self.passes else self._moved(node, before)
        else:
            return
        self._uniform |= {out.index: each for out, each in zip(node.outputs, found, strict=True)}

    def _extent(self, value: Value) -> tuple[int, ...]:
        """The shape of a value without what repeats itself; of one with labels, its own."""
        found = self._uniform.get(value.index)
        if found is None:
            return value.shape
        return tuple(1 if stride == 0 else size for size, stride in zip(found.shape, found.stride(), strict=True))

    def _rule(self, node: Node) -> Callable[[Node], Sequence[Known]]:
        known = node.name in self.passes or node.name in self.rules
        return self._pointwise if torch.Tag.pointwise in node.op.tags and not known else super()._rule(node)

    def _read(self, value: Any) -> Tensor | None:
        """The labels of a value that is used element by element; a matrix that is so used has those of its columns."""
        known = self._look(value)
        if isinstance(known, Vector):
            self._offsets[known.key] = known.offset
            return self._settled(known.names)  # type: ignore[return-value]
        if isinstance(known, Matrix):
            self._factors.fix(known.rows)
            return self._settled(known.columns)  # type: ignore[return-value]
        return self._settled(known)  # type: ignore[return-value]

    def _varies(self, labels: Tensor, axis: int) -> bool:
        """Whether there are several labels along an axis."""
        if labels.shape[axis] == 1 or labels.stride(axis) == 0:
            return False
        found = self._factors.find(compact(labels).contiguous())
        return bool((found != found.narrow(axis, 0, 1)).any())

    def _merge(self, labels: Tensor, axis: int) -> None:
        """What lies along an axis goes as a whole."""
        if labels.stride(axis) != 0:
            thin = compact(labels)
            self._factors.unite(thin.narrow(axis, 0, 1), thin)

    def _unite(self, left: Tensor, right: Tensor) -> None:
        """Of the same shape."""
        for axis in range(left.ndim):
            if left.stride(axis) == 0 and right.stride(axis) == 0:
                left, right = left.narrow(axis, 0, 1), right.narrow(axis, 0, 1)
        self._factors.unite(left, right)

    # ---- operators ----

    def _pointwise(self, node: Node) -> Sequence[Known]:
        first, out = self._look(node.args[0]), node.outputs[0].shape
        if isinstance(first, Vector) and node.name == "aten.add" and not isinstance(node.args[1], Value) and not node.kwargs:
            return [Vector(first.key, first.names, first.offset + float(node.args[1]))]
        shapes = [(1,) * (len(out) - len(value.shape)) + self._extent(value) for value in node.inputs]
        labels = [None if (known := self._read(value)) is None else known.expand(out) for value in node.inputs]
        weak = [index for index, each in enumerate(labels) if each is not None and self._is_repeated(shapes[index], labels, index)]
        for index in weak:
            self._factors.fix(labels[index])  # type: ignore[arg-type]
            labels[index] = None
        kept = [each for each in labels if each is not None]
        for other in kept[1:]:
            self._unite(kept[0], other)
        if not kept:
            return [None] * len(node.outputs)
        for shape, each in zip(shapes, labels, strict=True):
            for axis, size in enumerate(shape):
                if each is None and size > 1:
                    self._merge(kept[0], axis)
        return [min(kept, key=lambda each: sum(stride == 0 for stride in each.stride()))]

    def _is_repeated(self, shape: tuple[int, ...], labels: Sequence[Tensor | None], index: int) -> bool:
        """Whether a value is repeated along an axis where another has several labels."""
        others = [other for place, other in enumerate(labels) if place != index and other is not None]
        return any(size == 1 and other.shape[axis] > 1 and self._varies(other, axis) for axis, size in enumerate(shape) for other in others)

    def _reduce(self, node: Node) -> Sequence[Known]:
        known, given = self._read(node.args[0]), node.args[1] if len(node.args) > 1 else None
        if node.name == "aten.linalg_vector_norm":
            given = node.args[2] if len(node.args) > 2 else None
        if known is None or not given or len(node.outputs) != 1:
            return self._unknown(node)
        axes = {axis % known.ndim for axis in ([given] if isinstance(given, int) else given)}
        if any(self._varies(known, axis) for axis in axes):
            if not any(self._varies(known, axis) for axis in range(known.ndim) if axis not in axes):
                self._normed.append(compact(known))
                return [None]
            for axis in axes:
                self._merge(known, axis)
        out = node.outputs[0].shape
        for axis in sorted(axes, reverse=True):
            known = known.narrow(axis, 0, 1) if len(out) == len(node.args[0].shape) else known.select(axis, 0)
        return [known]

    def _softmax(self, node: Node) -> Sequence[Known]:
        known = self._read(node.args[0])
        if known is None or self._varies(known, node.args[1] % known.ndim):
            return self._unknown(node)
        return [known]

    def _norm(self, node: Node) -> Sequence[Known]:
        x, *given = norm_arguments(node)
        known, vectors = self._read(x), [self._read(value) for value in given if value is not None]
        shape = node.outputs[0].shape
        if known is None:
            return self._unknown(node)
        if any(self._varies(known, axis) for axis in range(known.ndim - 1)):  # of each head by itself
            self._merge(known, -1)
            for vector in vectors:
                self._fix_labels(vector)
        else:
            self._normed.append(compact(known))
            for vector in vectors:
                self._unite(known, (torch.tensor(FIXED) if vector is None else vector).expand(shape))
        return [known, *[None] * (len(node.outputs) - 1)]

    def _fix_labels(self, labels: Tensor | None) -> None:
        if labels is not None:
            self._factors.fix(labels)

    def _convolve(self, node: Node) -> Sequence[Known]:
        x, kernel, bias = node.args[:3]
        weight, groups = self._look(kernel), node.args[8]
        if not isinstance(weight, Matrix) or node.args[6]:
            return self._unknown(node)
        outer, inner = weight.rows.flatten(1)[:, 0], weight.columns[0].flatten(1)[:, 0]
        known = self._read(x)
        along = None if known is None else known[0].flatten(1)[:, 0]
        if groups == len(outer) == x.shape[1] and along is not None:  # one input channel each
            self._factors.unite(along, outer)
        elif groups == 1 and along is not None:
            self._factors.unite(along, inner)
            self._consumed.add((weight.key, 1 - weight.rows.ndim))
        elif groups == 1:
            self._factors.fix(inner)
        else:
            return self._unknown(node)
        if bias is not None:
            self._factors.unite(outer, self._read_or_one(bias))
        out = node.outputs[0].shape
        return [outer.reshape(1, -1, *[1] * (len(out) - 2)).expand(out)]

    def _embed(self, node: Node) -> Sequence[Known]:
        """Rows are looked up; which is left to their values."""
        table = self._look(node.args[0])
        if not isinstance(table, Matrix):
            return self._unknown(node)
        return [table.columns[0].expand(node.outputs[0].shape)]

    def _index(self, node: Node) -> Sequence[Known]:
        """Positions or rows of a table are picked; the last axis stays whole."""
        known, shape = self._look(node.args[0]), node.outputs[0].shape
        if isinstance(known, Matrix):
            known = known.columns if known.columns.ndim == 2 else None
        whole = isinstance(known, Tensor) and len(node.args[1]) < known.ndim and not any(self._varies(known, axis) for axis in range(known.ndim - 1))
        if not isinstance(known, Tensor) or not whole:
            return self._unknown(node)
        return [known[(0,) * (known.ndim - 1)].expand(shape)]

    def _linear(self, x: Any, weight: Any, matrix: Matrix, *, turn: bool = False) -> Tensor | None:
        found = roles_of(matrix)
        if found is None or matrix.rows.ndim > 2:
            self._fix(x)
            self._fix(weight)
            return None
        inner, outer, axis, _ = found[0][:, 0], found[1][0, :], *found[2:]
        known = self._read(x)
        rows = x.shape[-1] if turn else x.shape[-2]
        shape = (*x.shape[:-2], rows, len(outer))
        if known is None:
            self._factors.fix(inner)
            return outer.expand(shape)
        known = known.mT if turn else known
        if any(self._varies(known, place) for place in range(known.ndim - 1)):  # one weight for several heads
            self._merge(known, -1)
            self._factors.fix(inner)
            self._factors.fix(outer)
            return known[..., :1].expand(shape)
        self._unite(known, inner.expand(known.shape))
        self._consumed.add((matrix.key, axis))
        return outer.expand(shape)

    def _of_activations(self, left: Any, right: Any) -> Tensor | None:
        """[..., M, K] times [..., K, N]: what is summed over goes as a whole, with what it meets."""
        a, b = self._read(left), self._read(right)
        shape = (*left.shape[:-1], right.shape[-1])
        if a is None or b is None:
            return self._of_one(a, b, shape)
        if self._varies(a, -2):  # rows of several heads in one matrix
            self._factors.fix(a)
            self._factors.fix(b)
            return None
        if not self._grouped and (alone := self._of_distinct(a, b, shape)) is not None:
            return alone
        for axis, labels in ((-1, a), (-2, b)):
            self._merge(labels, axis)
        first, second = a[..., :1, :1].expand(shape), b[..., :1, :].expand(shape)
        self._merge(second, -1)
        self._unite(first, second)
        return second

    def _of_one(self, a: Tensor | None, b: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """One side has no labels: what the other sums over goes as a whole."""
        if a is not None:
            self._merge(a, -1)
            return a[..., :1].expand(shape)
        if b is not None:
            self._merge(b, -2)
            return b[..., :1, :].expand(shape)
        return None

    def _of_distinct(self, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Where one side is the same for all heads and the other is not, that one stays; the other goes as a whole."""
        several = [any(self._varies(labels, axis) for axis in range(labels.ndim - 2)) for labels in (a, b)]
        if several[0] == several[1]:
            return None
        other, own = (b, a) if several[0] else (a, b)
        self._factors.fix(other)
        self._merge(own, -1)
        self._merge(own, -2)
        return own[..., :1, :1].expand(shape)


@dataclass(frozen=True)
class _Axis:
    """The labels along one axis of one parameter, or of one matrix of it."""

    key: str
    axis: int
    expert: int | None
    roots: np.ndarray[Any, Any]


def _together(roots: AnyMapping[tuple[str, int], np.ndarray[Any, Any]]) -> Iterator[tuple[list[int], list[Channels]]]:
    """Labels that some axis holds side by side, and all axes that hold any of them."""
    axes = [
        _Axis(key, axis, number if found.ndim > 1 and found.shape[0] > 1 else None, row)
        for (key, axis), found in roots.items()
        for number, row in enumerate(found.reshape(-1, found.shape[-1]))
    ]
    beside = Factors()
    beside.new(1 + max((int(each.roots.max()) for each in axes if len(each.roots)), default=0))
    for each in axes:
        free = np.unique(each.roots[each.roots != FIXED])
        if len(free):
            beside.unite(torch.from_numpy(free[:1]), torch.from_numpy(free))
    members: dict[int, list[_Axis]] = {}
    for each in axes:
        free = each.roots[each.roots != FIXED]
        if len(free):
            members.setdefault(int(beside.find(torch.from_numpy(free[:1]))), []).append(each)
    for found in members.values():
        labels = reduce(np.union1d, (each.roots[each.roots != FIXED] for each in found))
        ends = []
        for each in found:
            at = np.searchsorted(labels, each.roots).clip(max=len(labels) - 1)
            channel = torch.from_numpy(np.where(labels[at] == each.roots, at, -1))
            ends.append(Channels(name=each.key, axis=each.axis, channel=channel, expert=each.expert))
        yield labels.tolist(), ends
