"""Programs at a few sizes → every size: each storage and each count as a polynomial in batch and length, the peak over all moments.

    size of a storage, FLOPs of a component = Σ c[i, j] · B^i · L^j,   i ≤ 1, j ≤ 2
    live(moment)                            = Σ over the storages that live then
    peak(B, L)                              = max over moments of live(moment)(B, L)

Births and deaths come in the same order at every size of a piece, so the phase of the peak need not be guessed: all moments are kept that
can be the fullest at some size. Polynomials come from programs at neighbouring sizes by finite differences, in whole numbers, and are held
against a program at a size that was not used. A batch of one runs other operators (nothing needs a copy), and so does a window that is
full: each is a piece of its own. Where no polynomial fits, `fit` says so and nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.cost.memory import MemoryBreakdown
from lighten.cost.workload import Workload
from lighten.errors import TraceError
from lighten.trace.program import KINDS, Followed, Program, Timeline

TERMS = 6
"""Of 1, L, L², B, B·L, B·L²; kept twice as large as they are, since a polynomial that is whole at whole sizes has halves at most."""
SAFE = 2**62
FIRST_LEN = 16
Whole = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Polynomials over one range of lengths, for a batch of one or for more.

    Attributes:
        single: of a batch of one.
        first, last: lengths.
        flops: name → coefficients [TERMS]: total, matmul, matmul/COMPONENT, and matmul_causal where it is known.
        moments: coefficients of what lives at each moment that can be the fullest, by kind: [moments, kinds, TERMS].
    """

    single: bool
    first: int
    last: int
    flops: dict[str, Whole]
    moments: Whole

    def holds(self, batch: int, length: int) -> bool:
        return self.single == (batch == 1) and self.first <= length <= self.last

    def at(self, batch: Whole, length: Whole) -> dict[str, NDArray[Any]]:
        """Each figure at each pair of a batch and a length, in whole numbers."""
        powers = self._powers(batch, length)
        found = {name: (powers @ coefficients.astype(powers.dtype)) // 2 for name, coefficients in self.flops.items()}
        live = powers @ self.moments.sum(axis=1).astype(powers.dtype).T  # [points, moments]
        fullest = live.argmax(axis=1)
        parts = (self.moments[fullest].astype(powers.dtype) * powers[:, None, :]).sum(axis=2) // 2
        found["peak"] = np.take_along_axis(live, fullest[:, None], axis=1)[:, 0] // 2
        return found | {kind: parts[:, index] for index, kind in enumerate(KINDS)}

    def _powers(self, batch: Whole, length: Whole) -> NDArray[Any]:
        """1, L, L², B, B·L, B·L² of each pair: [points, TERMS]; Python's integers where 64 bits could be too few."""
        b, n = int(batch.max()), int(length.max())
        largest = np.array([1, n, n * n, b, b * n, b * n * n], dtype=object)
        bound = max(int(abs(array.astype(object)).reshape(-1, TERMS).dot(largest).max()) for array in (*self.flops.values(), self.moments))
        if bound * len(KINDS) >= SAFE:
            batch, length = batch.astype(object), length.astype(object)
        return np.stack([length**0, length, length * length, batch, batch * length, batch * length * length], axis=1)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A model's costs in one kind of workload, for all sizes of its pieces.

    Attributes:
        facts: what does not depend on sizes: parameters by component, trainable and active ones, bytes of weights, layers.
        unknown_ops: names of operators whose FLOPs are not known.
    """

    facts: dict[str, Any]
    unknown_ops: tuple[str, ...]
    pieces: tuple[Piece, ...]

    def at(self, batch: Sequence[int] | Whole, length: Sequence[int] | Whole) -> dict[str, NDArray[Any]]:
        """Figures at each pair of a batch and a length; see `Piece.at`.

        Raises:
            TraceError: a size that no piece holds.
        """
        b, n = (np.ascontiguousarray(each, dtype=np.int64).ravel() for each in np.broadcast_arrays(batch, length))
        found: dict[str, NDArray[Any]] = {}
        left = np.ones(len(b), dtype=bool)
        for piece in self.pieces:
            inside = left & ((b == 1) == piece.single) & (n >= piece.first) & (n <= piece.last)
            if inside.any():
                for name, values in piece.at(b[inside], n[inside]).items():
                    found.setdefault(name, np.zeros(len(b), dtype=object))[inside] = values
                left &= ~inside
        if left.any():
            index = int(np.nonzero(left)[0][0])
            raise TraceError(f"batch {b[index]} × {n[index]} lies outside of what was followed.")
        return found

    def memory(self, batch: int, length: int) -> MemoryBreakdown:
        """Bytes at the fullest moment of one size."""
        found = self.at([batch], [length])
        return MemoryBreakdown(**{kind: int(found[kind][0]) for kind in KINDS})


def fit(followed: Followed, workload: Workload, *, batches: tuple[int, int], lengths: tuple[int, int]) -> Fitted:
    """Follow a model at a few sizes and fit what lies between the least and the most that are asked for.

    Args:
        workload: its batch and length are of no matter.
        batches, lengths: least and most.

    Raises:
        TraceError: no polynomial fits a piece; the text says which.
    """
    pieces, program = [], None
    for single in (True, False):
        if batches[0 if single else 1] > 1 or single:
            if single and batches[0] > 1:
                continue
            for first, last in _ranges(followed, lengths, workload):
                piece, program = _fit_piece(followed, workload, single=single, first=first, last=last)
                pieces.append(piece)
    assert program is not None
    facts = {
        "parameters": dict(program.parameters), "trainable_parameters": program.trainable_parameters,
        "active_parameters": program.active_parameters, "weight_bytes": program.weight_bytes, "layers": program.layers,
    }  # fmt: skip
    return Fitted(facts=facts, unknown_ops=tuple(program.unknown_ops), pieces=tuple(pieces))


def _ranges(followed: Followed, lengths: tuple[int, int], workload: Workload) -> list[tuple[int, int]]:
    """Runs of lengths between the model's breaks, from the least to the most."""
    if followed.fixed_len is not None:
        return [(lengths[0], lengths[1])]
    cuts = sorted({cut for each in followed.breaks for cut in (each, each + 1, each - workload.new_tokens) if lengths[0] < cut <= lengths[1]})
    edges = [lengths[0], *cuts, lengths[1] + 1]
    return [(first, after - 1) for first, after in pairwise(edges)]


def _fit_piece(followed: Followed, workload: Workload, *, single: bool, first: int, last: int) -> tuple[Piece, Program]:
    free = followed.fixed_len is None
    start = first if not free or last - first < 3 else max(first, min(FIRST_LEN, last - 3))
    lengths = [start] if not free else [start + step for step in range(min(3, last - first + 1))]
    batches = [1] if single else [2, 3]

    def program(batch: int, length: int) -> Program:
        return followed.follow(replace(workload, batch_size=batch, seq_len=length))

    grid = [[program(batch, length) for length in lengths] for batch in batches]
    whole = grid[0][0]
    _check_alike([program for row in grid for program in row], first, last)
    flops = {name: _newton([[_flops(each).get(name, 0) for each in row] for row in grid], batches[0], start) for name in _flops(whole)}
    moments = [_moments([[each.timelines[run] for each in row] for row in grid], batches[0], start) for run in range(len(whole.timelines))]
    piece = Piece(single=single, first=first, last=last, flops=flops, moments=_fullest(np.concatenate(moments)))
    _check(piece, program, 1 if single else 5, last if free else start)
    return piece, whole


def _flops(program: Program) -> dict[str, int]:
    found = {"total_flops": sum(op.flops * count for op, count in program.ops), "matmul": program.matmul_flops}
    for op, count in program.ops:
        if op.matmul_flops:
            found[f"matmul/{op.component}"] = found.get(f"matmul/{op.component}", 0) + op.matmul_flops * count
    causal = program.matmul_causal
    return found if causal is None else found | {"matmul_causal": causal}


def _check_alike(programs: Sequence[Program], first: int, last: int) -> None:
    if len({tuple(tuple(timeline.events) for timeline in program.timelines) for program in programs}) > 1:
        raise TraceError(f"lengths {first} to {last}: storages are born and die in another order at each size.")


def _moments(rows: Sequence[Sequence[Timeline]], batch: int, length: int) -> Whole:
    """Coefficients of what lives, by kind, after each birth that a death follows: [moments, kinds, TERMS]."""
    sizes = [[np.array([storage.bytes for storage in each.storages], dtype=np.int64) for each in row] for row in rows]
    coefficients = _newton(sizes, batch, length)  # [TERMS, storages]
    plain = rows[0][0]
    kinds = np.array([KINDS.index(storage.kind) for storage in plain.storages])
    events = np.array(plain.events)
    index = np.where(events >= 0, events, -1 - events)
    change = np.zeros((len(events), len(KINDS), TERMS), dtype=np.int64)
    change[np.arange(len(events)), kinds[index]] = coefficients.T[index] * np.where(events >= 0, 1, -1)[:, None]
    live = change.cumsum(axis=0)
    turns = np.append((events[:-1] >= 0) & (events[1:] < 0), events[-1] >= 0)
    return np.asarray(live[turns], dtype=np.int64)


def _newton(rows: Sequence[Sequence[Any]], batch: int, length: int) -> Any:
    """Twice the coefficients through values at batch, batch + 1 and length, + 1, + 2 (of a lower degree where there are fewer): [TERMS, …].

    >>> [int(c) for c in _newton([[1, 4, 9], [2, 8, 18]], 1, 1)]  # B · L²
    [0, 0, 0, 0, 0, 2]
    """
    found = []
    for row in rows:
        rise = row[1] - row[0] if len(row) > 1 else row[0] * 0
        bend = row[2] - 2 * row[1] + row[0] if len(row) > 2 else row[0] * 0
        found.append([2 * row[0] - 2 * rise * length + bend * length * (length + 1), 2 * rise - bend * (2 * length + 1), bend])
    slope = [after - before for before, after in zip(*found, strict=True)] if len(rows) > 1 else [value * 0 for value in found[0]]
    return np.array([*(value - batch * each for value, each in zip(found[0], slope, strict=True)), *slope], dtype=np.int64)


def _fullest(moments: Whole) -> Whole:
    """The moments that can be the fullest at some size: those that no other exceeds in every coefficient. Their order stays."""
    total = moments.sum(axis=1)
    _, first = np.unique(total, axis=0, return_index=True)
    kept: list[int] = []
    for index in sorted(first, key=lambda each: -int(total[each].astype(object).sum())):
        if not kept or not (total[kept] >= total[index]).all(axis=1).any():
            kept.append(int(index))
    return moments[sorted(kept)]


def _check(piece: Piece, program: Any, batch: int, length: int) -> None:
    truth: Program = program(batch, length)
    found = piece.at(np.array([batch]), np.array([length]))
    flops = _flops(truth)
    wrong = [name for name, value in (flops | {"peak": truth.memory.peak}).items() if int(found[name][0]) != value]
    if wrong:
        raise TraceError(f"lengths {piece.first} to {piece.last}: {', '.join(wrong)} is no polynomial of batch and length.")
