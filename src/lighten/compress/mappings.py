"""Scales that can move from one layer into the next without changing what the model computes, found in its graph.

Each parameter is thought to be multiplied by free factors: a vector element by element, a matrix by one factor a row and one a column. The
factors are followed through the operators of a forward pass. A sum or a softmax, a residual or an output fixes what passes through it: the
factors of both sides of a sum must agree, those before a softmax must be 1. What is still free at the end may be chosen at will: dividing
the rows of its producers and multiplying the columns of its consumers leaves every output as it is.

    norm → all linears that read it             (nothing else may read it)
    up → act(gate) · up → down                  (the gate's own factor is fixed by its activation)
    value → attention → output                  (one factor for all query heads of a key/value head)
    linear → ReLU → linear                      (the factors are positive)

Operators that are not known fix all that they read, so a mapping may be missed, but none that is found is wrong.

Source: the equivalences are those of SmoothQuant (arXiv:2211.10438, eq. 3) and AWQ (arXiv:2306.00978, section 3.2), which list them by hand.

Shape legend: O rows (output features), I columns (input features), C channels of a mapping, E experts in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as AnyMapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lighten.compress.graph import Graph, Node, Value
from lighten.compress.skeleton import Place

ONE = 0
"""The factor that is 1."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The part of a tensor that takes part in a mapping.

    Attributes:
        name: the tensor's name.
        axis: the axis of the tensor, as it is stored, along which the factors lie.
        channel: [size of that axis] which channel of the mapping an index belongs to; -1: none, it stays as it is.
        expert: the leading index that is meant, in a tensor of all experts.
        offset: the model multiplies by (offset + w), such as Gemma's 1 + w.
    """

    name: str
    axis: int
    channel: Tensor
    expert: int | None = None
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """Factors s [C], all positive, that may be chosen at will: producers are divided by them and consumers multiplied.

    Attributes:
        kind: whether a normalization produces the channels, or a linear.
        producers: norm weights and biases, rows and biases of linears.
        consumers: columns of linears.
    """

    kind: Literal["norm", "linear"]
    channels: int
    producers: tuple[Channels, ...]
    consumers: tuple[Channels, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that change with the scales."""
        return tuple(dict.fromkeys(end.name for end in (*self.producers, *self.consumers)))


def find_mappings(graph: Graph, places: AnyMapping[str, Place] | None = None) -> tuple[Mapping, ...]:
    """Every mapping of a model, in the order in which a forward pass meets the first producer of each.

    Args:
        places: where the checkpoint's tensors lie in the module; the mappings then have the checkpoint's names, else the module's.
    """
    found = Follower(graph).follow()
    return tuple(found) if places is None else tuple(_by_checkpoint(found, places, graph.tied))


def fold(mapping: Mapping, scales: Tensor, tensors: AnyMapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a mapping with its scales moved from the producers into the consumers, in the types that they had.

    Args:
        scales: [C], positive.
        tensors: by name, in the checkpoint's orientation.
    """
    changed = {name: tensors[name].float() for name in mapping.names}
    for end in mapping.producers:
        changed[end.name] = _scaled(changed[end.name], end, 1 / scales.float())
    for end in mapping.consumers:
        changed[end.name] = _scaled(changed[end.name], end, scales.float())
    return {name: tensor.to(tensors[name].dtype) for name, tensor in changed.items()}


def spread(end: Channels, values: Tensor, *, rest: float = 1.0) -> Tensor:
    """[size of the axis] the value of each index's channel; `rest` where it has none."""
    return torch.where(end.channel >= 0, values[end.channel.clamp(min=0)], torch.full((), rest, dtype=values.dtype))


def gather(end: Channels, values: Tensor, channels: int, *, how: Literal["mean", "amax"]) -> Tensor:
    """[C] of [size of the axis] values: their mean or maximum over the indices of each channel; 0 of a channel that this end has no part in."""
    inside = end.channel >= 0
    return torch.zeros(channels, dtype=values.dtype).scatter_reduce_(0, end.channel[inside], values[inside], how, include_self=False)


def _scaled(tensor: Tensor, end: Channels, factors: Tensor) -> Tensor:
    along = spread(end, factors)
    part = tensor if end.expert is None else tensor[end.expert]
    shape = [-1 if axis == end.axis % part.ndim else 1 for axis in range(part.ndim)]
    made = (part + end.offset) * along.reshape(shape) - end.offset
    if end.expert is None:
        return made
    tensor = tensor.clone()
    tensor[end.expert] = made
    return tensor


# ---- factors ----


class Factors:
    """Names of factors, some of which must be equal (union-find); `ONE` is the factor 1."""

    def __init__(self) -> None:
        self._parent = np.arange(1024)
        self.count = 1

    def new(self, *shape: int) -> Tensor:
        """Free factors, each equal to itself alone."""
        first = self.count
        self.count += int(np.prod(shape))
        if self.count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * self.count)])
        return torch.arange(first, self.count).reshape(shape)

    def find(self, names: Tensor) -> Tensor:
        """One name for all that are equal."""
        return torch.from_numpy(self._find(names.numpy()))

    def _find(self, names: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        above: np.ndarray[Any, Any] = self._parent[names]
        while not np.array_equal(higher := self._parent[above], above):
            above = higher
        return above

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Make the factors equal, one by one."""
        a, b = np.broadcast_arrays(left.numpy(), right.numpy())
        pairs = np.unique(np.stack([a.reshape(-1), b.reshape(-1)]), axis=1)
        while True:
            pairs = self._find(pairs)
            pairs = pairs[:, pairs[0] != pairs[1]]
            if not pairs.size:
                return
            np.minimum.at(self._parent, pairs.max(0), pairs.min(0))

    def fix(self, names: Tensor) -> None:
        """They are 1."""
        self.unite(compact(names), torch.tensor(ONE))


def compact(names: Tensor) -> Tensor:
    """The same names, without what repeats itself along an axis of stride 0."""
    for axis in range(names.ndim):
        if names.stride(axis) == 0:
            names = names.narrow(axis, 0, 1)
    return names


# ---- what is known of a tensor ----


@dataclass(frozen=True)
class Vector:
    """A parameter of one dimension, perhaps moved about, not yet used."""

    key: str
    names: Tensor
    offset: float = 0.0


@dataclass(frozen=True)
class Matrix:
    """A parameter of two dimensions or, with one matrix an expert, of three: the factors along its last two, each spread over the whole."""

    key: str
    rows: Tensor
    columns: Tensor


Known: TypeAlias = "Tensor | Vector | Matrix | None"
"""What multiplies a tensor, element by element; None: nothing."""

PASS = {"aten._to_copy", "aten.clone", "aten.detach", "aten.alias", "aten.neg", "aten.relu", "aten.leaky_relu", "aten.abs", "aten.contiguous",
        "aten.lift_fresh", "aten.lift_fresh_copy"}  # fmt: skip
"""Operators with f(s · x) = s · f(x) for every s > 0."""
MOVE = {"aten.view", "aten._unsafe_view", "aten.reshape", "aten.permute", "aten.transpose", "aten.t", "aten.unsqueeze", "aten.squeeze",
        "aten.expand", "aten.slice", "aten.select", "aten.split", "aten.split_with_sizes", "aten.unbind", "aten.cat", "aten.stack", "aten.repeat",
        "aten.flip", "aten.roll", "aten.chunk", "aten.narrow", "aten.constant_pad_nd"}  # fmt: skip
"""Operators that move elements and do nothing else to them."""
RULES = {
    "aten.add": "_add", "aten.sub": "_add", "aten.where": "_where", "aten.masked_fill": "_masked_fill", "aten.mul": "_multiply",
    "aten.div": "_divide", "aten.sum": "_sum", "aten.mean": "_sum", "aten.mm": "_product", "aten.bmm": "_product",
    "aten.addmm": "_product", "aten.baddbmm": "_product",
    **dict.fromkeys(("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm"), "_norm"),
    **dict.fromkeys(("aten.new_empty", "aten.new_zeros", "aten.new_ones", "aten.new_full"), "_constant"),
    **dict.fromkeys(("aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.full_like"), "_constant"),
}  # fmt: skip
"""Operator → the method of `Follower` that follows factors through it."""


class Follower:
    """Follows the factors through a graph."""

    passes: AbstractSet[str] = PASS
    rules: AnyMapping[str, str] = RULES

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._factors = Factors()
        self._known: dict[int, Known] = {}
        self._axes: dict[tuple[str, int], Tensor] = {}
        self._roles: dict[tuple[str, int], str] = {}
        self._offsets: dict[str, float] = {}

    def follow(self) -> list[Mapping]:
        """The mappings."""
        self._walk()
        return list(_grouped(self._axes, self._roles, self._offsets, self._factors.find))

    def _walk(self) -> None:
        last = self._graph.last_uses()
        for number, node in enumerate(self._graph.nodes):
            self._step(node)
            for value in (*node.inputs, *node.outputs):
                if last.get(value.index, -1) <= number and value.index not in self._graph.parameters and value not in self._graph.outputs:
                    self._known.pop(value.index, None)
        self._end()

    def _end(self) -> None:
        """What the model gives stays as it is."""
        for value in self._graph.outputs:
            self._fix(value)

    def _step(self, node: Node) -> None:
        if not any(self._look(value) is not None for value in node.inputs):
            made: Sequence[Known] = [None] * len(node.outputs)
        elif node.op._schema.is_mutable:
            made = self._unknown(node)
        else:
            made = self._rule(node)(node)
        for value, known in zip(node.outputs, made, strict=True):
            self._known[value.index] = self._settled(known)

    def _rule(self, node: Node) -> Callable[[Node], Sequence[Known]]:
        if node.name in self.passes:
            return lambda node: [self._look(node.args[0])]
        if node.name in MOVE:
            return self._move
        rule: Callable[[Node], Sequence[Known]] = getattr(self, self.rules.get(node.name, "_unknown"))
        return rule

    # ---- what is known of a value ----

    def _look(self, value: Any) -> Known:
        if not isinstance(value, Value):
            return None
        if value.index in self._graph.parameters and value.index not in self._known:
            self._known[value.index] = self._parameter(self._graph.parameters[value.index], value.shape)
        return self._known.get(value.index)

    def _parameter(self, key: str, shape: tuple[int, ...]) -> Known:
        if len(shape) == 1:
            self._axes[key, 0] = names = self._factors.new(*shape)
            self._roles[key, 0] = "producer"
            return Vector(key, names)
        if len(shape) not in (2, 3):
            return None
        *experts, rows, columns = shape
        self._axes[key, -2], self._axes[key, -1] = self._factors.new(*experts, rows), self._factors.new(*experts, columns)
        return Matrix(key, self._axes[key, -2].unsqueeze(-1).expand(shape), self._axes[key, -1].unsqueeze(-2).expand(shape))

    def _settled(self, known: Known) -> Known:
        """None where all factors are 1 already."""
        if not isinstance(known, Tensor):
            return known
        settled = self._factors.find(compact(known).contiguous())
        return settled.expand(known.shape) if bool((settled != ONE).any()) else None

    def _fix(self, value: Any) -> None:
        """All factors of a value are 1."""
        known = self._look(value)
        if isinstance(known, Matrix):
            self._factors.fix(known.rows)
            self._factors.fix(known.columns)
        elif isinstance(known, Vector):
            self._factors.fix(known.names)
        elif known is not None:
            self._factors.fix(known)

    def _read(self, value: Any) -> Tensor | None:
        """The factors of a value that is used element by element; a matrix that is so used keeps its own."""
        known = self._look(value)
        if isinstance(known, Vector):
            if self._offsets.setdefault(known.key, known.offset) != known.offset:
                self._factors.fix(known.names)
            return self._settled(known.names)  # type: ignore[return-value]
        if isinstance(known, Matrix):
            self._fix(value)
            return None
        return self._settled(known)  # type: ignore[return-value]

    # ---- operators ----

    def _unknown(self, node: Node) -> Sequence[Known]:
        """An operator that nothing is known of: what it reads stays as it is."""
        for value in node.inputs:
            self._fix(value)
        return [None] * len(node.outputs)

    def _constant(self, node: Node) -> Sequence[Known]:
        """An operator that takes no more than the shape of what it reads."""
        return [None]

    def _move(self, node: Node) -> Sequence[Known]:
        first = self._look(node.args[0])
        try:
            if isinstance(first, Vector):
                return [Vector(first.key, names, first.offset) for names in self._moved(node, first.names)]
            if isinstance(first, Matrix):
                both = zip(self._moved(node, first.rows), self._moved(node, first.columns), strict=True)
                return [Matrix(first.key, rows, columns) for rows, columns in both]
            if isinstance(node.args[0], list | tuple):
                parts = [self._read(value) for value in node.args[0]]
                whole = [torch.full(value.shape, ONE) if part is None else part for value, part in zip(node.args[0], parts, strict=True)]
                return self._moved(node, whole)
            assert isinstance(first, Tensor)
            return self._moved(node, first)
        except RuntimeError:  # factors that are spread over an axis cannot be viewed in every shape
            return self._unknown(node)

    @staticmethod
    def _moved(node: Node, first: Any) -> list[Tensor]:
        op = torch.ops.aten.reshape.default if node.name in ("aten.view", "aten._unsafe_view") and isinstance(first, Tensor) else node.op
        made = op(first, *node.args[1:], **{key: value for key, value in node.kwargs.items() if key != "memory_format"})
        return [made] if isinstance(made, Tensor) else list(made)

    def _add(self, node: Node) -> Sequence[Known]:
        left, right = node.args[0], node.args[1]
        first = self._look(left)
        if isinstance(first, Vector) and not isinstance(right, Value) and node.name == "aten.add" and not node.kwargs:
            return [Vector(first.key, first.names, first.offset + float(right))]
        if not isinstance(right, Value) and right != 0:
            return self._unknown(node)
        return [self._agreed(node.outputs[0], [left, right])]

    def _agreed(self, out: Value, values: Sequence[Any]) -> Tensor | None:
        """The factors of a sum, whose terms' must be equal."""
        names = [self._read(value) for value in values if isinstance(value, Value)]
        whole = [torch.tensor(ONE) if each is None else each for each in names]
        for each in whole[1:]:
            self._factors.unite(whole[0], each)
        return reduce(lambda one, other: one if one.ndim else other, whole).expand(out.shape)

    def _where(self, node: Node) -> Sequence[Known]:
        return [self._agreed(node.outputs[0], node.args[1:])]

    def _masked_fill(self, node: Node) -> Sequence[Known]:
        if node.args[2] != 0:
            return self._unknown(node)
        known = self._read(node.args[0])
        return [None if known is None else known.expand(node.outputs[0].shape)]

    def _multiply(self, node: Node) -> Sequence[Known]:
        left, right = (self._read(value) for value in node.args[:2])
        if left is not None and right is not None:
            bare = [value for value in node.args[:2] if isinstance(self._look(value), Vector)]
            if len(bare) != 1:
                return self._unknown(node)
            self._fix(bare[0])
            left, right = (None if value is bare[0] else known for value, known in zip(node.args[:2], (left, right), strict=True))
        known = right if left is None else left
        return [None if known is None else known.expand(node.outputs[0].shape)]

    def _divide(self, node: Node) -> Sequence[Known]:
        self._fix(node.args[1])
        known = self._read(node.args[0])
        return [None if known is None else known.expand(node.outputs[0].shape)]

    def _sum(self, node: Node) -> Sequence[Known]:
        known, given = self._read(node.args[0]), node.args[1] if len(node.args) > 1 else None
        if known is None or not given:
            return self._unknown(node)
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        for axis in sorted((axis % known.ndim for axis in given), reverse=True):
            first = known.narrow(axis, 0, 1)
            self._factors.unite(first, known)
            known = first if keep else first.squeeze(axis)
        return [known]

    def _norm(self, node: Node) -> Sequence[Known]:
        x, weight, bias = norm_arguments(node)
        self._fix(x)
        out, *more = node.outputs
        factors = self._read(weight) if weight is not None else None
        if bias is not None:
            self._factors.unite(torch.tensor(ONE) if factors is None else factors, self._read_or_one(bias))
        return [None if factors is None else factors.expand(out.shape), *[None] * len(more)]

    def _read_or_one(self, value: Any) -> Tensor:
        found = self._read(value)
        return torch.tensor(ONE) if found is None else found

    def _product(self, node: Node) -> Sequence[Known]:
        """A product of matrices: `mm`, `bmm`, and those that add to it."""
        added = node.name in ("aten.addmm", "aten.baddbmm")
        left, right = node.args[1:3] if added else node.args[:2]
        out = self._of_two(left, right)
        if not added:
            return [out]
        if node.kwargs:
            self._fix(node.args[0])
        if out is None or (bias := self._read(node.args[0])) is None:
            self._fix(node.args[0])
            if out is not None:
                self._factors.fix(out)
            return [None]
        self._factors.unite(out, bias)
        return [out]

    def _of_two(self, left: Any, right: Any) -> Tensor | None:
        a, b = self._look(left), self._look(right)
        if isinstance(b, Matrix) and not isinstance(a, Matrix):
            return self._linear(left, right, b)
        if isinstance(a, Matrix) and not isinstance(b, Matrix):
            turned = Matrix(a.key, a.rows.mT, a.columns.mT)
            out = self._linear(right, left, turned, turn=True)
            return None if out is None else out.mT
        return self._of_activations(left, right)

    def _linear(self, x: Any, weight: Any, matrix: Matrix, *, turn: bool = False) -> Tensor | None:
        """x [..., T, K] times a parameter [..., K, N]: the factors along K absorb those of x, those along N are the output's."""
        found = roles_of(matrix)
        if found is None or not self._has_role(matrix.key, *found[2:]):
            self._fix(x)
            self._fix(weight)
            return None
        inner, outer = found[0][..., :, 0], found[1][..., 0, :]
        known = self._read(x)
        if known is None:
            self._factors.fix(inner)
        else:
            self._factors.unite(known.mT if turn else known, inner[..., None, :])
        rows = x.shape[-1] if turn else x.shape[-2]
        return outer[..., None, :].expand(*outer.shape[:-1], rows, outer.shape[-1])

    def _has_role(self, key: str, consumed: int, produced: int) -> bool:
        """Whether a parameter is used in one way alone."""
        return self._roles.setdefault((key, consumed), "consumer") == "consumer" and self._roles.setdefault((key, produced), "producer") == "producer"

    def _of_activations(self, left: Any, right: Any) -> Tensor | None:
        """[..., M, K] times [..., K, N] where one side has no factors: those of the other must agree along K."""
        a, b = self._read(left), self._read(right)
        if (a is None) == (b is None):
            self._fix(left)
            self._fix(right)
            return None
        if b is not None:
            self._factors.unite(b[..., :1, :], b)
            return b[..., :1, :].expand(*b.shape[:-2], left.shape[-2], b.shape[-1])
        assert a is not None
        self._factors.unite(a[..., :1], a)
        return a[..., :1].expand(*a.shape[:-1], right.shape[-1])


def norm_arguments(node: Node) -> tuple[Value, Value | None, Value | None]:
    """Input, weight and bias of a normalization over the last axis."""
    weight = node.args[2] if len(node.args) > 2 else None
    bias = node.args[3] if node.name == "aten.native_layer_norm" else None
    return node.args[0], weight, bias


def roles_of(matrix: Matrix) -> tuple[Tensor, Tensor, int, int] | None:
    """(factors along the axis that is summed over, those along the other, and which axes of the parameter they are) of [..., K, N]."""
    found = []
    for inner, outer, axes in ((matrix.rows, matrix.columns, (-2, -1)), (matrix.columns, matrix.rows, (-1, -2))):
        if inner.ndim >= 2 and _is_spread(inner, -1) and _is_spread(outer, -2):
            found.append((inner, outer, *axes))
    return found[0] if len(found) == 1 else None


def _is_spread(names: Tensor, axis: int) -> bool:
    return names.shape[axis] == 1 or names.stride(axis) == 0


# ---- mappings ----


@dataclass(frozen=True)
class _End:
    """The factors along one axis of one parameter, or of one expert of it."""

    key: str
    axis: int
    expert: int | None
    role: str
    roots: np.ndarray[Any, Any]


def _grouped(
    axes: AnyMapping[tuple[str, int], Tensor], roles: AnyMapping[tuple[str, int], str], offsets: AnyMapping[str, float],
    find: Callable[[Tensor], Tensor],
) -> Iterator[Mapping]:  # fmt: skip
    """One mapping for all free factors that have to do with the same ends."""
    ends = [end for (key, axis), names in axes.items() if (key, axis) in roles for end in _ends(key, axis, roles[key, axis], find(names).numpy())]
    count = 1 + max((int(end.roots.max()) for end in ends), default=ONE)
    draw = np.random.default_rng(0)
    marks = np.zeros(count, dtype=np.int64)
    takes = {role: np.zeros(count, dtype=bool) for role in ("producer", "consumer")}
    for end in ends:
        roots = np.unique(end.roots)
        marks[roots] ^= draw.integers(1, 2**62)
        takes[end.role][roots] = True
    free = takes["producer"] & takes["consumer"]
    free[ONE] = False
    marks[~free] = 0
    touched: dict[int, list[_End]] = {}
    for end in ends:
        for mark in np.unique(marks[end.roots]):
            touched.setdefault(int(mark), []).append(end)
    every = np.flatnonzero(free)
    kinds, first, which = np.unique(marks[every], return_index=True, return_inverse=True)
    for kind in np.argsort(first):
        yield _mapping(every[which == kind], touched[int(kinds[kind])], offsets)


def _ends(key: str, axis: int, role: str, roots: np.ndarray[Any, Any]) -> Iterator[_End]:
    if roots.ndim == 1:
        yield _End(key, axis, None, role, roots)
    else:
        yield from (_End(key, axis, expert, role, row) for expert, row in enumerate(roots))


def _mapping(roots: np.ndarray[Any, Any], ends: Sequence[_End], offsets: AnyMapping[str, float]) -> Mapping:
    sides: dict[str, list[Channels]] = {"producer": [], "consumer": []}
    for end in ends:
        at = np.searchsorted(roots, end.roots).clip(max=len(roots) - 1)
        channel = torch.from_numpy(np.where(roots[at] == end.roots, at, -1))
        sides[end.role].append(Channels(name=end.key, axis=end.axis, channel=channel, expert=end.expert, offset=offsets.get(end.key, 0.0)))
    kind: Literal["norm", "linear"] = "linear" if any(end.axis != 0 for end in sides["producer"]) else "norm"
    return Mapping(kind=kind, channels=len(roots), producers=tuple(sides["producer"]), consumers=tuple(sides["consumer"]))


def _by_checkpoint(found: Sequence[Mapping], places: AnyMapping[str, Place], tied: AnyMapping[str, str]) -> Iterator[Mapping]:
    """The mappings with the names of checkpoint tensors; one whose parameters the checkpoint does not have is left out."""
    named = names_by_key(places, tied)
    for mapping in found:
        sides = [[part for end in side for part in parts_of(end, named.get(end.name, []))] for side in (mapping.producers, mapping.consumers)]
        if all(end.name in named for end in (*mapping.producers, *mapping.consumers)):
            yield Mapping(kind=mapping.kind, channels=mapping.channels, producers=tuple(sides[0]), consumers=tuple(sides[1]))


def names_by_key(places: AnyMapping[str, Place], tied: AnyMapping[str, str]) -> dict[str, list[tuple[str, Place]]]:
    """The checkpoint tensors that lie in each parameter, by the parameter's first name."""
    named: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        named.setdefault(tied.get(place.key, place.key), []).append((name, place))
    return named


def parts_of(end: Channels, named: Sequence[tuple[str, Place]]) -> Iterator[Channels]:
    """What an end is of each checkpoint tensor that lies in its parameter."""
    for name, place in named:
        expert, channel = end.expert, end.channel
        if place.region is not None:
            along = place.region[end.axis]
            channel = channel[along]
            if end.expert is not None:
                experts = place.region[0]
                if not experts.start <= end.expert < experts.stop:
                    continue
                expert = None if experts.stop - experts.start == 1 else end.expert - experts.start
        if bool((channel >= 0).any()):
            yield Channels(name=name, axis=end.axis, channel=channel, expert=expert, offset=end.offset)
