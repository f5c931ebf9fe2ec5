"""Changes of basis that leave a model as it is, found in its graph.

As in `lighten.compress.mappings` the rows and columns of every parameter are named, and the names followed through the operators. Here a
set of names is sought that may be mixed with each other by any orthogonal matrix: every operator treats all of them alike. A sum asks both
sides for the same basis. A product with something that differs along the names sets them apart from each other: attention mixes positions
by head, so values may be turned within a head alone. An RMSNorm passes what is turned, for the sum of squares stays; a LayerNorm does so
too where the turn leaves the vector of ones, and with it the mean, in its place. A norm's weight does not commute with a turn, so it has to
be folded into all that reads it, which must be linears.

Shape legend: n names of a turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.compress.graph import Graph, Node, Value
from lighten.compress.mappings import ONE, PASS, RULES, Follower, Known, Matrix, Vector, compact, norm_arguments, roles_of

Names = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class TurnedEnd:
    """Rows or columns of a parameter that lie in a turned basis.

    Attributes:
        axis: -1 or -2 of a matrix, 0 of a vector.
        expert: the leading index, in a tensor of all experts.
        positions: [copies, n] indices along the axis; a value head that several query heads read has several copies.
        norm: the norm whose weight is folded into these columns first.
    """

    name: str
    axis: int
    expert: int | None
    positions: Tensor
    norm: str | None = None


@dataclass(frozen=True, kw_only=True)
class FoldedNorm:
    """A norm whose weight goes into its readers.

    Attributes:
        positions: [n] indices into the weight.
        offset: the model multiplies by (offset + weight).
    """

    name: str
    bias: str | None
    positions: Tensor
    offset: float


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One basis that may be changed.

    Attributes:
        size: n.
        keeps_ones: the turn must leave the vector of ones in its place.
        untied: parameters that are a table and a head at once and have to become two: the head's name → the table's.
    """

    size: int
    keeps_ones: bool
    ends: tuple[TurnedEnd, ...]
    norms: tuple[FoldedNorm, ...]
    untied: AnyMapping[str, str]

    @property
    def is_residual(self) -> bool:
        """Whether a norm reads it: the stream that all layers add to, or a latent between two linears."""
        return bool(self.norms) or self.keeps_ones


def find_turns(graph: Graph) -> tuple[Turn, ...]:
    """Every basis of a model that may be changed, in the order in which a forward pass meets them."""
    return tuple(_TurnFollower(graph).turns())


@dataclass(frozen=True)
class _Weighted:
    """A normalized tensor times the norm's weight: to be read by linears alone."""

    names: Tensor
    norm: str
    bias: str | None


@dataclass(frozen=True)
class _Squared:
    """Squares, whose sum over the names a turn leaves as it is."""

    names: Tensor


@dataclass(frozen=True)
class _Event:
    """Names that an operator treats alike, but for those of different index."""

    names: Names
    index: Names


class _TurnFollower(Follower):
    passes = PASS - {"aten.relu", "aten.leaky_relu", "aten.abs"}
    rules = RULES | {"aten.pow": "_power", "aten.square": "_power", "aten.embedding": "_look_up"}

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._events: list[_Event] = []
        self._even: list[Tensor] = []
        self._norms: dict[str, tuple[Tensor, str | None]] = {}
        self._reads: dict[tuple[str, int], str | None] = {}
        self._tables: set[str] = set()

    # ---- what is known of a value ----

    def _step(self, node: Node) -> None:
        super()._step(node)
        for value in node.outputs:
            known = self._known.get(value.index)
            if isinstance(known, Tensor):
                self._apart(known)
            elif isinstance(known, _Weighted):
                self._apart(known.names)

    def _fix(self, value: Any) -> None:
        known: Any = self._look(value)
        if isinstance(known, _Weighted | _Squared):
            self._factors.fix(known.names)
        else:
            super()._fix(value)

    def _read(self, value: Any) -> Tensor | None:
        known: Any = self._look(value)
        if isinstance(known, _Weighted | _Squared):
            self._fix(value)
            return None
        return super()._read(value)

    def _apart(self, names: Tensor, other: Any = None) -> None:
        """An operator treats the names alike, but for those that meet different parts of `other`."""
        axes = []
        if isinstance(other, Value):
            sizes = (1,) * (names.ndim - len(other.shape)) + other.shape
            axes = [axis for axis in range(names.ndim) if sizes[axis - names.ndim] != 1 and _varies(names, axis)]
        index = torch.zeros((), dtype=torch.int64)
        for axis in axes:
            along = torch.arange(names.shape[axis]).reshape([-1 if each == axis else 1 for each in range(names.ndim)])
            index = index * names.shape[axis] + along
        kept = names
        for axis in range(names.ndim):
            if axis not in axes and not _varies(kept, axis):
                kept = kept.narrow(axis, 0, 1)
        index = index.expand(kept.shape) if index.ndim == 0 else index.broadcast_to(kept.shape)
        self._events.append(_Event(*_distinct(kept.reshape(-1).numpy(), index.reshape(-1).numpy())))

    # ---- operators ----

    def _move(self, node: Node) -> Sequence[Known]:
        first: Any = self._look(node.args[0])
        if isinstance(first, _Weighted):
            return [_Weighted(names, first.norm, first.bias) for names in self._moved(node, first.names)]  # type: ignore[misc]
        if isinstance(first, _Squared):
            return self._unknown(node)
        return super()._move(node)

    def _multiply(self, node: Node) -> Sequence[Known]:
        left, right = node.args[:2]
        if left is right:
            return self._squares(left)
        vectors = [value for value in (left, right) if isinstance(self._look(value), Vector)]
        if len(vectors) == 2:
            return [None]
        if vectors:
            return [self._weigh(right if vectors[0] is left else left, vectors[0], None)]  # type: ignore[list-item]
        names = [self._read(value) for value in (left, right)]
        if names[0] is not None and names[1] is not None:
            return self._unknown(node)
        whole, other = (names[0], right) if names[0] is not None else (names[1], left)
        return [self._beside(node, whole, other)]

    def _beside(self, node: Node, names: Tensor | None, other: Any) -> Tensor | None:
        """The names of a value that is multiplied, divided or chosen by another that has none."""
        if names is None:
            return None
        names = names.expand(node.outputs[0].shape)
        self._apart(names, other)
        return names

    def _divide(self, node: Node) -> Sequence[Known]:
        self._fix(node.args[1])
        return [self._beside(node, self._read(node.args[0]), node.args[1])]

    def _where(self, node: Node) -> Sequence[Known]:
        return [self._beside(node, self._agreed(node.outputs[0], node.args[1:]), node.args[0])]

    def _masked_fill(self, node: Node) -> Sequence[Known]:
        if node.args[2] != 0:
            return self._unknown(node)
        return [self._beside(node, self._read(node.args[0]), node.args[1])]

    def _power(self, node: Node) -> Sequence[Known]:
        if node.name == "aten.pow" and node.args[1] != 2:
            return self._unknown(node)
        return self._squares(node.args[0])

    def _squares(self, value: Any) -> Sequence[Known]:
        names = self._read(value)
        return [None if names is None else _Squared(names)]  # type: ignore[list-item]

    def _sum(self, node: Node) -> Sequence[Known]:
        known: Any = self._look(node.args[0])
        axes = node.args[1] if len(node.args) > 1 else None
        if isinstance(known, _Squared):
            if axes is None or [axis % known.names.ndim for axis in axes] != [known.names.ndim - 1]:
                return self._unknown(node)
            self._apart(known.names, Value(index=-1, shape=(*known.names.shape[:-1], 1), dtype=torch.float32))
            return [None]
        names = self._read(node.args[0])
        if names is None or not axes or any(_varies(names, axis % names.ndim) for axis in axes):
            return self._unknown(node)
        return super()._sum(node)

    def _norm(self, node: Node) -> Sequence[Known]:
        x, weight, bias = norm_arguments(node)
        nothing: list[Known] = [None] * len(node.outputs)
        names = self._read(x)
        if names is None:
            return nothing
        if len(node.args[1]) != 1 or any(_varies(names, axis) for axis in range(names.ndim - 1)):
            return self._unknown(node)
        if node.name == "aten.native_layer_norm":
            self._even.append(names.reshape(-1, names.shape[-1])[0])
        made: Any = names if weight is None else self._weigh(x, weight, bias)
        return [made, *nothing[1:]]

    def _weigh(self, x: Any, weight: Value, bias: Value | None) -> _Weighted | None:
        """A normalized value times a norm's weight; what is not of that form is fixed."""
        names, vector, added = self._read(x), self._look(weight), self._look(bias)
        if names is None:
            return None
        fits = (
            isinstance(vector, Vector) and vector.names.ndim == 1 and len(vector.names) == names.shape[-1] and weight.shape[-1] == len(vector.names)
        )
        if not fits or (bias is not None and not isinstance(added, Vector)) or any(_varies(names, axis) for axis in range(names.ndim - 1)):
            self._fix(x)
            return None
        assert isinstance(vector, Vector)
        row, key = names.reshape(-1, names.shape[-1])[0], added.key if isinstance(added, Vector) else None
        before = self._norms.setdefault(vector.key, (row, key))
        if before[1] != key or self._offsets.setdefault(vector.key, vector.offset) != vector.offset:
            self._fix(x)
            return None
        self._factors.unite(before[0], row)
        return _Weighted(names, vector.key, key)

    def _look_up(self, node: Node) -> Sequence[Known]:
        table = self._look(node.args[0])
        if not isinstance(table, Matrix):
            return self._unknown(node)
        self._factors.fix(table.rows)
        self._tables.add(table.key)
        return [table.columns[0].expand(node.outputs[0].shape)]

    def _linear(self, x: Any, weight: Any, matrix: Matrix, *, turn: bool = False) -> Tensor | None:
        known: Any = self._look(x)
        norm = known.norm if isinstance(known, _Weighted) else None
        names = self._settled(known.names) if isinstance(known, _Weighted) else self._read(x)
        found = roles_of(matrix)
        if found is None:
            self._fix(x)
            self._fix(weight)
            return None
        inner, outer = found[0][..., :, 0], found[1][..., 0, :]
        if not isinstance(names, Tensor):
            self._factors.fix(inner)
        elif _varies(names, names.ndim - (1 if turn else 2)) or self._reads.setdefault((matrix.key, found[2]), norm) != norm:
            self._fix(x)
            self._factors.fix(inner)
        else:
            self._factors.unite(names.mT if turn else names, inner[..., None, :])
        rows = x.shape[-1] if turn else x.shape[-2]
        return outer[..., None, :].expand(*outer.shape[:-1], rows, outer.shape[-1])

    def _of_activations(self, left: Any, right: Any) -> Tensor | None:
        a, b = self._read(left), self._read(right)
        names, other, summed = (a, right, -1) if b is None else (b, left, -2)
        if (a is None) == (b is None) or names is None or _varies(names, names.ndim + summed):
            self._fix(left)
            self._fix(right)
            return None
        batch = Value(index=-1, shape=(*other.shape[:-2], 1, 1), dtype=other.dtype)
        self._apart(names, batch)
        if names is b:
            return b[..., :1, :].expand(*b.shape[:-2], left.shape[-2], b.shape[-1])
        return names[..., :1].expand(*names.shape[:-1], right.shape[-1])

    # ---- turns ----

    def turns(self) -> Iterator[Turn]:
        self._walk()
        ends = list(self._ends())
        marks = self._marks(ends)
        every = np.flatnonzero(marks)
        _, first, which, counts = np.unique(marks[every], return_index=True, return_inverse=True, return_counts=True)
        marks[every[counts[which] < 2]] = 0  # a name that nothing can be mixed with
        touched: dict[int, list[tuple[str, int, int | None, Names]]] = {}
        for end in ends:
            for mark in np.unique(marks[end[3]]):
                touched.setdefault(int(mark), []).append(end)
        starts = np.cumsum(counts) - counts
        together = every[np.argsort(which, kind="stable")]
        for kind in np.argsort(first):
            roots = together[starts[kind] : starts[kind] + counts[kind]]
            if len(roots) > 1 and (turn := self._turn(roots, touched.get(int(marks[roots[0]]), []))) is not None:
                yield turn

    def _ends(self) -> Iterator[tuple[str, int, int | None, Names]]:
        for (key, axis), names in self._axes.items():
            roots = self._factors.find(names).numpy()
            if roots.ndim == 1:
                yield key, axis, None, roots
            else:
                yield from ((key, axis, expert, row) for expert, row in enumerate(roots))

    def _marks(self, ends: Sequence[tuple[str, int, int | None, Names]]) -> Names:
        """One number for each name, the same for names that all operators and all parameters treat alike; 0 for what is fixed."""
        draw = np.random.default_rng(0)
        marks = np.zeros(self._factors.count, dtype=np.uint64)
        for end in ends:
            marks[np.unique(end[3])] += draw.integers(1, 2**63, dtype=np.uint64)
        for event in self._events:
            roots = self._factors.find(torch.from_numpy(event.names)).numpy()
            distinct, index = _distinct(roots, event.index)
            values = draw.integers(1, 2**63, size=int(index.max()) + 1, dtype=np.uint64)
            np.add.at(marks, distinct, values[index])
        marks[ONE] = 0
        return marks

    def _turn(self, roots: Names, touched: Sequence[tuple[str, int, int | None, Names]]) -> Turn | None:
        ends, norms, untied = [], [], {}
        for key, axis, expert, row in touched:
            positions = _positions(roots, row)
            if positions is None:
                return None
            norm = self._reads.get((key, axis))
            if key in self._tables and axis == -1 and norm is not None:
                heads = [
                    name for name in (key, *(alias for alias, first in self._graph.tied.items() if first == key)) if name not in self._graph.tables
                ]
                if not heads:
                    return None
                untied[heads[0]] = key
                ends.append(TurnedEnd(name=heads[0], axis=axis, expert=expert, positions=positions, norm=norm))
                norm = None
            ends.append(TurnedEnd(name=key, axis=axis, expert=expert, positions=positions, norm=norm))
        for name in dict.fromkeys(end.norm for end in ends if end.norm is not None):
            names, bias = self._norms[name]
            positions = _positions(roots, self._factors.find(names).numpy())
            if positions is None or len(positions) != 1:
                return None
            norms.append(FoldedNorm(name=name, bias=bias, positions=positions[0], offset=self._offsets.get(name, 0.0)))
        meets = [even for names in self._even if np.isin(roots, even := np.unique(self._factors.find(names).numpy())).any()]
        if len(ends) < 2 or all(end.axis == 0 for end in ends) or any(not np.array_equal(each, roots) for each in meets):
            return None
        return Turn(size=len(roots), keeps_ones=bool(meets), ends=tuple(ends), norms=tuple(norms), untied=untied)


def _distinct(names: Names, index: Names) -> tuple[Names, Names]:
    """The pairs of a name and its index, each once."""
    width = int(index.max(initial=0)) + 1
    pairs = np.unique(names * width + index)
    return pairs // width, pairs % width


def _varies(names: Tensor, axis: int) -> bool:
    if names.shape[axis] == 1 or names.stride(axis) == 0:
        return False
    kept = compact(names)
    return not bool((kept == kept.narrow(axis, 0, 1)).all())


def _positions(roots: Names, row: Names) -> Tensor | None:
    """[copies, n] where along a row each of the sorted roots stands; None where some stand there more often than others."""
    at = np.searchsorted(roots, row).clip(max=len(roots) - 1)
    inside = np.flatnonzero(roots[at] == row)
    order = inside[np.argsort(at[inside], kind="stable")]
    counts = np.bincount(at[inside], minlength=len(roots))
    if counts.min() != counts.max():
        return None
    return torch.from_numpy(order.reshape(len(roots), -1).T.copy())
