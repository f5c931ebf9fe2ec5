"""A model's costs as functions of two sizes, so that a point of a sweep takes microseconds and is equal to what is computed directly.

FLOPs and the bytes of each moment of a pass are polynomials in batch and length, of degree 1 in the batch and 2 in the length, as long as
the same operators run: a sliding window that is full, a batch of one that needs no copy, a single position begin another piece. The peak is
the largest of its moments, so that on one piece it is the largest of a few polynomials:

    f(B, L) = max over moments m of Σ c_m[i, j] · B^i · L^j,   i ≤ 1, j ≤ 2

The polynomials come from finite differences of direct computations at neighbouring sizes, which are whole numbers, so nothing is rounded.
Each is then held against direct computations: at the edges of the piece, on a grid, at random, and wherever two polynomials cross, since
a moment that was not seen would show there first. Where they disagree, either a moment was missing, and its polynomial is added, or another
piece begins, and the border is found by bisection. What cannot be covered is computed directly, point by point.
A moment that leads only between the sizes that are checked would be missed; these lie close (`_grid`), and no property test found one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lighten.cost.flops import workload_flops
from lighten.cost.memory import MemoryBreakdown
from lighten.cost.operators import Forward, forward_operators
from lighten.cost.tuning import memory_of
from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model.spec import ModelSpec

Axis: TypeAlias = Literal["seq_len", "new_tokens"]
Size: TypeAlias = tuple[int, int]
"""Batch and length."""
Exact: TypeAlias = Callable[[Workload], Mapping[str, int]]
"""A workload's figures, computed directly: any FLOPs by name, and `peak` with the parts of `MemoryBreakdown` that make it."""
Figures: TypeAlias = dict[str, NDArray[Any]]

MEMORY = frozenset({"peak", *(part.name for part in fields(MemoryBreakdown))})
DIRECT = 48
"""Points at most that are computed one by one: fewer than what fitting computes."""
BUDGET = 150
"""Pieces and moments after which no more are looked for, since the figures are then no polynomials (a size that is rounded): what is not covered
by then is computed directly. A model with windows and recomputation takes about 20."""
WIDER = 4
"""Points that are asked for one by one are covered up to so many times their largest size."""
ROWS = 3
"""Batch sizes (or lengths) at most that are each fitted as a row of its own: a polynomial in two sizes needs as many rows to be checked."""
SAFE = 2**62
"""Sums below this are computed in 64-bit integers, others in Python's own."""


def exact_costs(spec: ModelSpec, workload: Workload) -> dict[str, int]:
    """FLOPs (`total_flops`, `matmul`, `matmul_causal`, `matmul/COMPONENT`) and memory (`peak` and its parts) of a workload, computed directly.

    Raises:
        WorkloadError: the phase does not fit the model.
    """
    memory = memory_of(spec, workload)
    return workload_flops(spec, workload) | {"peak": memory.peak} | known_parts(memory)


def known_parts(memory: MemoryBreakdown) -> dict[str, int]:
    """The parts of a breakdown that are known."""
    return {name: value for name, value in asdict(memory).items() if value is not None}


def crossover_seq_len(spec: ModelSpec) -> int | None:
    """The least length at which a forward pass spends at least as many FLOPs on attention's own products, which grow with the square of the
    length, as on all its other matrix products; None where there are none that grow so, or where they never do.
    """

    def overtaken(length: int) -> bool:
        forward = Forward(batch_size=1, query_len=length, key_len=length, source_len=length if spec.is_encoder_decoder else 0)
        square = rest = 0
        for op in forward_operators(spec, forward, spec.dtype):
            if op.kind == "attention":
                square += op.matmul_flops
            else:
                rest += op.matmul_flops
        return 0 < square >= rest

    if spec.fixed_len is not None:
        return None
    high = 1
    while not overtaken(high):
        high *= 2
        if high > 2**40:
            return None
    low = high // 2  # not overtaken, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if overtaken(middle) else (middle, high)
    return high


def compile_costs(spec: ModelSpec, workload: Workload, *, axis: Axis = "seq_len") -> Costs:
    """Costs of a workload as a function of its batch and of one length; kept with the spec, so that asking again costs nothing.

    Args:
        workload: its `batch_size` and the length of `axis` are of no matter.
        axis: which length is the function's second argument.
    """
    cache: dict[tuple[Axis, Workload], Costs] = spec.__dict__.setdefault("_compiled_costs", {})
    sizeless = with_sizes(workload, axis, (1, 1))
    if (axis, sizeless) not in cache:
        cache[axis, sizeless] = Costs(lambda asked: exact_costs(spec, asked), sizeless, axis=axis)
    return cache[axis, sizeless]


def with_sizes(workload: Workload, axis: Axis, size: Size) -> Workload:
    """The workload with a batch and a length."""
    batch, length = size
    return replace(workload, batch_size=batch, new_tokens=length) if axis == "new_tokens" else replace(workload, batch_size=batch, seq_len=length)


@dataclass(frozen=True, kw_only=True)
class _Box:
    """Batches b0 to b1 and lengths l0 to l1, both ends included."""

    b0: int
    b1: int
    l0: int
    l1: int

    def holds(self, size: Size) -> bool:
        return self.b0 <= size[0] <= self.b1 and self.l0 <= size[1] <= self.l1

    def cut(self, *, batch: int | None = None, length: int | None = None) -> tuple[_Box, _Box]:
        """Two boxes, the second of which begins at the batch or the length."""
        if batch is not None:
            return replace(self, b1=batch - 1), replace(self, b0=batch)
        assert length is not None
        return replace(self, l1=length - 1), replace(self, l0=length)


_Polynomial: TypeAlias = tuple[int, ...]
"""Twice the coefficients of 1, L, L², B, B·L, B·L²: whole numbers, since a polynomial that is whole at whole sizes has halves at most."""
_Vector: TypeAlias = tuple[_Polynomial, ...]


def _value(polynomial: _Polynomial, size: Size) -> int:
    batch, length = size
    a, b, c, d, e, f = polynomial
    return ((c * length + b) * length + a + batch * ((f * length + e) * length + d)) // 2


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A box and the polynomials whose largest is the figure there; none where it is computed directly."""

    box: _Box
    candidates: tuple[_Vector, ...]


class Costs:
    """Figures of a workload at any batch and length, equal to those computed directly.

    Attributes:
        computed: how many sizes were computed directly so far.
    """

    def __init__(self, exact: Exact, workload: Workload, *, axis: Axis = "seq_len") -> None:
        self._exact, self._workload, self._axis = exact, workload, axis
        self._known: dict[Size, dict[str, int]] = {}
        self._surfaces: list[_Surface] = []
        self._missed: set[Size] = set()

    @property
    def computed(self) -> int:
        return len(self._known)

    def at(self, batch: NDArray[Any] | Sequence[int] | int, length: NDArray[Any] | Sequence[int] | int) -> Figures:
        """Each figure at each pair of a batch and a length, broadcast against each other: int64 where all fit, else Python's integers.

        Raises:
            WorkloadError: a size that the model does not take.
        """
        b, n = (np.ascontiguousarray(array, dtype=np.int64) for array in np.broadcast_arrays(batch, length))
        shape, b, n = b.shape, b.ravel(), n.ravel()
        distinct = set(zip(b.tolist(), n.tolist(), strict=True))
        if len(distinct) > DIRECT:
            self._cover(_boxes(sorted({size[0] for size in distinct}), sorted({size[1] for size in distinct})))
        else:
            for size in distinct:
                self._direct(size)
        found: dict[str, NDArray[Any]] = {}
        for surface in self._surfaces:
            found |= surface.at(b, n)
        return {name: values.reshape(shape) for name, values in found.items()}

    def point(self, batch: int, length: int) -> dict[str, int]:
        """The figures at one size, in microseconds once enough sizes were asked for to be worth fitting.

        Raises:
            WorkloadError: a size that the model does not take.
        """
        size = (batch, length)
        if size in self._known:
            return dict(self._known[size])
        found: dict[str, int] = {}
        for surface in self._surfaces:
            values = surface.point(size)
            if values is None:
                break
            found |= values
        else:
            if self._surfaces:
                return found
        self._missed.add(size)
        if len(self._missed) > DIRECT:
            missed, self._missed = self._missed, set()
            batches, lengths = (self._widened(sizes, index) for index, sizes in enumerate(zip(*missed, strict=True)))
            self._cover(_whole(batches, lengths))
        return dict(self._direct(size))

    def _widened(self, sizes: Iterable[int], index: int) -> list[int]:
        """The sizes in order, and the largest times `WIDER` where the model takes it: the next to be asked for is likely to be larger."""
        found = sorted(set(sizes))
        try:
            self._direct((1, WIDER * found[-1]) if index else (WIDER * found[-1], 1))
        except WorkloadError:
            return found
        return [*found, WIDER * found[-1]]

    def _direct(self, size: Size) -> dict[str, int]:
        if size not in self._known:
            self._known[size] = dict(self._exact(with_sizes(self._workload, self._axis, size)))
            if not self._surfaces:
                names = tuple(self._known[size])
                groups = (tuple(n for n in names if n not in MEMORY), tuple(sorted((n for n in names if n in MEMORY), key=lambda n: n != "peak")))
                self._surfaces = [_Surface(self._direct, group, largest="peak" in group) for group in groups if group]
        return self._known[size]

    def _cover(self, boxes: Iterable[_Box]) -> None:
        for box in boxes:
            self._direct((box.b0, box.l0))
            for surface in self._surfaces:
                surface.cover(box)


def _boxes(batches: Sequence[int], lengths: Sequence[int]) -> Iterator[_Box]:
    """Boxes that hold all pairs; few rows one by one."""
    if len(batches) <= ROWS:
        for batch in batches:
            yield from _whole([batch], lengths)
    elif len(lengths) <= ROWS:
        for length in lengths:
            yield from _whole(batches, [length])
    else:
        yield from _whole(batches, lengths)


def _whole(batches: Sequence[int], lengths: Sequence[int]) -> Iterator[_Box]:
    """Boxes from the first to the last: a batch of one and a length of one apart, for which many operators are others."""
    for b0, b1 in _one_apart(batches):
        for l0, l1 in _one_apart(lengths):
            yield _Box(b0=b0, b1=b1, l0=l0, l1=l1)


def _one_apart(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(1, 1), (sizes[1], sizes[-1])] if sizes[0] == 1 and len(sizes) > 1 else [(sizes[0], sizes[-1])]


@dataclass
class _Surface:
    """Figures over boxes, as pieces. `largest`: the first is a maximum over moments, and the others are of the moment that has it."""

    direct: Callable[[Size], dict[str, int]]
    names: tuple[str, ...]
    largest: bool
    pieces: list[_Piece] = field(default_factory=list)
    covered: list[_Box] = field(default_factory=list)
    spent: int = 0

    def sample(self, size: Size) -> tuple[int, ...]:
        figures = self.direct(size)
        return tuple(figures.get(name, 0) for name in self.names)

    # ---- fitting ----

    def cover(self, box: _Box) -> None:
        """Fit a box, unless one that was fitted before holds it."""
        if not any(before.holds((box.b0, box.l0)) and before.holds((box.b1, box.l1)) for before in self.covered):
            self.spent = 0
            self.pieces = [*self._fit(box), *self.pieces]
            self.covered.append(box)

    def _fit(self, box: _Box) -> list[_Piece]:
        self.spent += 1
        if self.spent > BUDGET:
            return [_Piece(box=box, candidates=())]
        if box.b1 - box.b0 <= 1 and box.l1 - box.l0 <= 2:
            return [_Piece(box=box, candidates=(self._differences(box, (box.b0, box.l0)),))]
        found: dict[_Vector, Size] = {}
        for corner in ((box.b0, box.l0), (box.b1, box.l1))[: 1 + self.largest]:
            if vector := self._near(box, corner):
                found.setdefault(vector, corner)
        if not found:
            return self._halves(box, (box.b0, box.l0))
        while (wrong := self._wrong(box, list(found))) is not None:
            self.spent += 1
            if self.spent > BUDGET:
                return [_Piece(box=box, candidates=())]
            offender = next((vector for vector in found if self._breaks(vector, wrong)), None)
            if offender is not None:
                first, second = box.cut(**self._border(offender, found[offender], wrong))
                return [*self._fit(first), *self._fit(second)]
            vector = self._near(box, wrong)
            if vector is None or vector in found:
                return self._halves(box, wrong)
            found[vector] = wrong
        return [_Piece(box=box, candidates=tuple(found))]

    def _halves(self, box: _Box, size: Size) -> list[_Piece]:
        """Fit the box in two parts, cut before a size whose neighbours lie on several polynomials, or behind it where it is the first: between
        its batch and the next where its row is one polynomial, since then moments change from batch to batch, else between its length and the next.
        """
        batch, length = size
        row = range(min(length, max(box.l0, box.l1 - 3)), min(length + 3, box.l1) + 1)
        if box.b1 > box.b0 and (box.l1 == box.l0 or self._is_one(row, batch)):
            first, second = box.cut(batch=max(batch, box.b0 + 1))
        else:
            first, second = box.cut(length=max(length, box.l0 + 1))
        return [*self._fit(first), *self._fit(second)]

    def _is_one(self, lengths: range, batch: int) -> bool:
        """Whether the third differences of a row are 0."""
        rows = zip(*(self.sample((batch, length)) for length in lengths), strict=True)
        return all(len(v) < 4 or v[3] - 3 * v[2] + 3 * v[1] - v[0] == 0 for v in rows)

    def _breaks(self, vector: _Vector, size: Size) -> bool:
        """Whether a polynomial does not hold at a size: a moment can be less than the peak, but not more."""
        values, truth = tuple(_value(polynomial, size) for polynomial in vector), self.sample(size)
        return values[0] > truth[0] if self.largest else values != truth

    def _wrong(self, box: _Box, candidates: list[_Vector]) -> Size | None:
        for size in self._checks(box, candidates):
            truth = self.sample(size)
            if max(_value(vector[0], size) for vector in candidates) != truth[0]:
                return size
            best = [values for vector in candidates if (values := tuple(_value(p, size) for p in vector))[0] == truth[0]]
            if truth not in best:
                return size
        return None

    def _border(self, vector: _Vector, good: Size, bad: Size) -> dict[str, int]:
        """Where another piece begins between a size at which a polynomial holds and one at which it does not, by bisection."""
        corner = (good[0], bad[1])
        along_length = corner != good and self._breaks(vector, corner)
        holds, fails = (good[1], bad[1]) if along_length else (good[0], bad[0])
        while abs(fails - holds) > 1:
            middle = (holds + fails) // 2
            broken = self._breaks(vector, (good[0], middle) if along_length else (middle, bad[1]))
            holds, fails = (holds, middle) if broken else (middle, fails)
        return {"length" if along_length else "batch": max(holds, fails)}

    def _near(self, box: _Box, size: Size) -> _Vector | None:
        """The polynomials that hold at a size and around it; None where its neighbours lie on several."""
        truth = self.sample(size)
        batch = max(box.b0, min(size[0], box.b1 - 1))
        for shift in (0, -2, -1, 3, -5):
            length = max(box.l0, min(size[1] + shift, box.l1 - 2))
            vector = self._differences(box, (batch, length))
            guards = [(batch, length + 3), (batch, length - 1), (batch + 2, length), (batch - 1, length + 1)]
            inside = [guard for guard in guards if box.holds(guard)]
            held = {(b, n): tuple(_value(p, (b, n)) for p in vector) for b, n in [size, *(inside[:1] + inside[-1:])]}
            if held[size] == truth and all(self.sample(each) == values for each, values in held.items()):
                return vector
        return None

    def _differences(self, box: _Box, start: Size) -> _Vector:
        """The polynomials through up to 2 × 3 neighbouring sizes of the box, by Newton's forward differences."""
        batch, length = start
        lengths = range(length, min(length + 2, box.l1) + 1)
        rows = [[self.sample((b, n)) for n in lengths] for b in range(batch, min(batch + 1, box.b1) + 1)]
        return tuple(_newton([[values[index] for values in row] for row in rows], start) for index in range(len(self.names)))

    def _checks(self, box: _Box, candidates: Sequence[_Vector]) -> Iterator[Size]:
        """Sizes at which a box is held against direct computations."""
        batches, lengths = _ends_and_middle(box.b0, box.b1), _ends_and_middle(box.l0, box.l1)
        for batch in batches:
            yield from ((batch, length) for length in lengths)
        if self.largest:
            for batch in batches:
                yield from ((batch, length) for length in _crossings(candidates, box.l0, box.l1, lambda length, b=batch: (b, length)))  # type: ignore[misc]
            for length in lengths:
                yield from ((batch, length) for batch in _crossings(candidates, box.b0, box.b1, lambda batch, n=length: (batch, n)))  # type: ignore[misc]
        for batch in {box.b0, box.b1}:
            yield from ((batch, length) for length in _grid(box.l0, box.l1))
        chance = random.Random(f"{box}")
        yield from ((round(_between(box.b0, box.b1, chance.random())), round(_between(box.l0, box.l1, chance.random()))) for _ in range(4))

    # ---- evaluation ----

    def point(self, size: Size) -> dict[str, int] | None:
        """The figures at a size; None where it is not covered, or two moments are equally full and it is not known which comes first."""
        for piece in self.pieces:
            if piece.box.holds(size):
                if not piece.candidates:
                    return None
                values = [tuple(_value(polynomial, size) for polynomial in vector) for vector in piece.candidates]
                most = max(value[0] for value in values)
                best = {value for value in values if value[0] == most}
                return dict(zip(self.names, best.pop(), strict=True)) if len(best) == 1 else None
        return None

    def at(self, batch: NDArray[Any], length: NDArray[Any]) -> Figures:
        """The figures at each pair of a batch and a length."""
        found: NDArray[Any] = np.zeros((len(self.names), len(batch)), dtype=self._width(batch, length))
        left = np.ones(len(batch), dtype=bool)
        for piece in self.pieces:
            box = piece.box
            inside = left & (batch >= box.b0) & (batch <= box.b1) & (length >= box.l0) & (length <= box.l1)
            if piece.candidates and inside.any():
                (chosen,) = np.nonzero(inside)
                sure = self._evaluate(piece, batch[chosen], length[chosen], found, chosen)
                left[chosen[sure]] = False
        for index in np.nonzero(left)[0]:
            found[:, index] = self.sample((int(batch[index]), int(length[index])))
        return {name: _narrow(values) for name, values in zip(self.names, found, strict=True)}

    def _width(self, batch: NDArray[Any], length: NDArray[Any]) -> type:
        """int64 where every figure surely fits, else Python's integers."""
        vectors = [vector for piece in self.pieces for vector in piece.candidates]
        covered = all(piece.candidates for piece in self.pieces) and bool(vectors)
        return np.int64 if covered and _bound(vectors, batch, length) < SAFE else object

    def _evaluate(self, piece: _Piece, batch: NDArray[Any], length: NDArray[Any], found: NDArray[Any], chosen: NDArray[Any]) -> NDArray[Any]:
        """Write a piece's figures into `found`; which of them are sure: no other moment is as full with other parts."""
        powers = _powers(piece.candidates, batch, length)
        firsts = np.stack([_apply([vector[0]], powers)[0] for vector in piece.candidates])
        most = firsts.max(axis=0)
        sure = np.ones(len(batch), dtype=bool)
        winner = firsts.argmax(axis=0)
        for index, vector in enumerate(piece.candidates):
            (mine,) = np.nonzero(winner == index)
            if len(mine):
                found[:, chosen[mine]] = _apply(vector, powers[:, mine])
            (tied,) = np.nonzero((firsts[index] == most) & (winner != index))
            if len(tied):
                sure[tied] &= (_apply(vector, powers[:, tied]) == found[:, chosen[tied]]).all(axis=0)
        return sure


def _newton(rows: Sequence[Sequence[int]], start: Size) -> _Polynomial:
    """The polynomial through values at start, start + 1 in batch, and + 1, + 2 in length; of a lower degree where there are fewer.

    >>> _newton([[1, 4, 9], [2, 8, 18]], (1, 1))  # B · L²
    (0, 0, 0, 0, 0, 2)
    """
    batch, n = start
    of_length: list[tuple[int, int, int]] = []
    for row in rows:
        first = row[1] - row[0] if len(row) > 1 else 0
        second = row[2] - 2 * row[1] + row[0] if len(row) > 2 else 0
        of_length.append((2 * row[0] - 2 * first * n + second * n * (n + 1), 2 * first - second * (2 * n + 1), second))
    rise = [after - before for before, after in zip(*of_length, strict=True)] if len(rows) > 1 else [0, 0, 0]
    return (*(value - batch * slope for value, slope in zip(of_length[0], rise, strict=True)), *rise)


def _ends_and_middle(low: int, high: int) -> list[int]:
    return sorted({low, round(_between(low, high, 0.5)), high})


def _between(low: int, high: int, part: float) -> float:
    """A size between two, on a log scale."""
    return math.exp((1 - part) * math.log(low) + part * math.log(high))


def _grid(low: int, high: int) -> list[int]:
    """Sizes between two, each at most half as large again as the one before."""
    steps = max(1, math.ceil(math.log(high / low, 1.5)))
    return sorted({round(_between(low, high, step / steps)) for step in range(steps + 1)})


def _crossings(candidates: Sequence[_Vector], low: int, high: int, size: Callable[[int], Size]) -> list[int]:
    """Along a line, the sizes beside each border between two polynomials that are the largest there."""
    found: set[int] = set()
    steps = sorted({round(_between(low, high, part / 64)) for part in range(65)})

    def largest(at: int) -> int:
        values = [_value(vector[0], size(at)) for vector in candidates]
        return values.index(max(values))

    for left, right in pairwise(steps) if len(candidates) > 1 else ():
        before, after = largest(left), largest(right)
        if before == after:
            continue
        while right - left > 1:
            middle = (left + right) // 2
            left, right = (middle, right) if largest(middle) == before else (left, middle)
        found |= {left, right}
    return sorted(found)


def _bound(candidates: Iterable[_Vector], batch: NDArray[Any], length: NDArray[Any]) -> int:
    """What no partial sum of a polynomial exceeds."""
    b, n = int(batch.max()), int(length.max())
    sizes = (1, n, n * n, b, b * n, b * n * n)
    sums = (sum(abs(c) * size for c, size in zip(polynomial, sizes, strict=True)) for vector in candidates for polynomial in vector)
    return max(sizes[-1], *sums)


def _powers(candidates: Sequence[_Vector], batch: NDArray[Any], length: NDArray[Any]) -> NDArray[Any]:
    """1, L, L², B, B·L, B·L² of each size, in Python's integers where a sum could exceed 64 bits."""
    if _bound(candidates, batch, length) >= SAFE:
        batch, length = batch.astype(object), length.astype(object)
    return np.stack([length**0, length, length * length, batch, batch * length, batch * length * length])


def _apply(polynomials: Sequence[_Polynomial], powers: NDArray[Any]) -> NDArray[Any]:
    found = np.zeros((len(polynomials), powers.shape[1]), dtype=powers.dtype)
    for row, polynomial in zip(found, polynomials, strict=True):
        for coefficient, power in zip(polynomial, powers, strict=True):
            if coefficient:
                row += coefficient * power
    return found // 2


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """As 64-bit integers where all fit."""
    return values.astype(np.int64) if values.dtype == object and (not len(values) or int(abs(values).max()) < 2**63) else values
