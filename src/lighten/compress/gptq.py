"""GPTQ: columns are rounded one after another, and what each one's rounding does to the layer's output is made up for by the columns to come.

The error of a row's output is (w - ŵ)ᵀ H (w - ŵ) with H the mean of x xᵀ. With H = RᵀDR, R unit upper triangular, it is

    Σ_i D_i (e_i + Σ_{j>i} R_ij e_j)²,   e = w - ŵ,

so where columns are taken from the last to the first, each one's best real value is w_i + Σ_{j>i} R_ij e_j, and the code nearest to it is
taken. That is GPTQ's answer to the digit (Chee et al., theorem 6), and needs one Cholesky factorization and no inverse.

Source: Frantar et al. 2023 (arXiv:2210.17323), algorithm 1; Chee et al. 2023 (arXiv:2307.13304), section 3, for this form of it.
Deviations: (1) columns are taken by descending H_ii, while groups stay neighbours and their scales are chosen beforehand, so no column has
to say its group; (2) the scales come from `search_scales`, weighted by H_ii; (3) of a list of dampings the one is taken that has the least
error on held-out rows; (4) a column that is always 0 is rounded to the nearest and not set to 0; (5) codes are then refined, see `refine`.

Shape legend: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.compress.minifloat import codebook, nvfp4_global_scale
from lighten.compress.scale_search import search_scales
from lighten.compress.statistics import InputStatistics
from lighten.model.spec import WeightFormat

Floats: TypeAlias = npt.NDArray[np.float32]
Codes: TypeAlias = npt.NDArray[np.uint8]

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares that are tried as damping; choice, around the 0.01 of GPTQ's own code. Measured on SmolLM2's linears with 3,072 and 15,360 rows: the
best is 0.03, 0.1 or 0.3."""

HELD_OUT = 0.25
"""The share of calibration rows that is held out; the block's runner keeps each fourth."""

_LEAST_DAMPING = 1e-4  # share of the mean of H_ii, below which float32's rounding of H would count
_ZERO = np.float32(0)

_BLOCK = 32  # columns between two matrix products
_JUDGED_ROWS = 256  # rows that a damping is chosen on, evenly spread


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that each weight may take: level(code) · scale + offset.

    Attributes:
        scale: [O, G] float32, not 0; its columns serve I / G neighbouring columns of the weight each.
        offset: [O, G] float32, or None for 0.
        levels: how many whole numbers from 0 on a code may be, or the numbers [L] that codes stand for, ascending.
    """

    scale: Tensor
    offset: Tensor | None
    levels: int | Tensor

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Grid:
        """The grid that a weight's codes are on; one scale of a whole tensor becomes one of each row."""
        scale = weight.scales().expand(weight.codes.shape[0], -1)
        if weight.element != "int":
            return cls(scale=scale, offset=None, levels=codebook(weight.element)[0])
        zero = torch.tensor(float(2 ** (weight.bits - 1))) if weight.zero_point is None else weight.zero_point.float()
        return cls(scale=scale, offset=-zero * scale, levels=2**weight.bits)

    def rows(self, chosen: Tensor) -> Grid:
        """The grid of some rows."""
        return Grid(scale=self.scale[chosen], offset=None if self.offset is None else self.offset[chosen], levels=self.levels)

    def values(self, codes: Tensor) -> Tensor:
        """[O, I] float32 that codes stand for."""
        levels = codes.float() if isinstance(self.levels, int) else self.levels[codes.long()]
        groups = levels.reshape(*self.scale.shape, -1) * self.scale[..., None]
        return (groups if self.offset is None else groups + self.offset[..., None]).reshape(codes.shape)


@dataclass(frozen=True, kw_only=True)
class Factor:
    """H of one input, damped and factorized; all weights that have the input share it.

    Attributes:
        moments: H = the sum of share · [I, I] over these pairs, which are not copied.
        added: [I] what damping adds to H's diagonal.
        order: [I] columns by ascending H_ii; they are rounded from the last to the first.
        unit: [I, I] in that order, unit upper triangular R; what lies below the diagonal has no meaning.
    """

    moments: tuple[tuple[float, Tensor], ...]
    added: Tensor
    order: Tensor
    unit: Tensor

    def pulls(self, start: int, end: int) -> Tensor:
        """[end - start, I] of the damped H: rows `start` to `end` of the order, each divided by its diagonal element, which becomes 0."""
        chosen = self.order[start:end]
        rows = sum_of(self.moments, chosen)
        diagonal = rows[torch.arange(len(chosen)), chosen] + self.added[chosen]
        rows[torch.arange(len(chosen)), chosen] = 0
        return rows.div_(diagonal[:, None]).index_select(1, self.order)

    def hessian(self) -> Tensor:
        """[I, I] the damped H, made anew, in the weight's own order."""
        hessian = sum_of(self.moments)
        hessian.diagonal().add_(self.added)
        return hessian


def sum_of(moments: tuple[tuple[float, Tensor], ...], rows: Tensor | None = None) -> Tensor:
    """Rows of the weighted sum, in new memory."""
    (share, first), *others = moments
    total = first * share if rows is None else first.index_select(0, rows).mul_(share)
    for share, other in others:
        total.add_(other if rows is None else other.index_select(0, rows), alpha=share)
    return total


def factorize(*moments: tuple[float, Tensor], damping: float) -> Factor:
    """The factor of H = the sum of share · [I, I]. One [I, I] lives on in it; while it is made, there are two.

    Args:
        damping: what is added to H_ii, as a share of the geometric mean of H_ii and its mean over i. Where float32 cannot factorize the
            sum, ten times as much is added.
    """
    diagonal = sum((share * moment.diagonal() for share, moment in moments), torch.zeros(len(moments[0][1])))
    mean = diagonal.mean()
    order = diagonal.argsort(stable=True)
    while True:
        added = damping * (diagonal * mean).sqrt() + _LEAST_DAMPING * mean
        added = torch.where(diagonal > 0, added, mean if mean > 0 else torch.tensor(1.0))
        unit = sum_of(moments, order).index_select(1, order)
        unit.diagonal().add_(added[order])
        _, failed = torch.linalg.cholesky_ex(unit, upper=True, out=(unit, torch.empty((), dtype=torch.int32)))
        if not int(failed):
            unit /= unit.diagonal().clone()[:, None]
            return Factor(moments=moments, added=added, order=order, unit=unit)
        damping *= 10


def choose_factor(weight: Tensor, grid: Grid, statistics: InputStatistics, *, dampings: tuple[float, ...] = DAMPINGS) -> Factor:
    """The damping that gives the least error on held-out rows, and then the factor of all rows, held-out ones too.

    Without held-out rows the damping is the first that is not below 0.03.

    Args:
        weight: [O, I], of which at most 256 rows are tried.
        dampings: ascending; after the first that is worse than the one before, no more are tried.
    """
    if statistics.held_out is None:
        return factorize((1.0, statistics.hessian), damping=next((d for d in dampings if d >= 0.03), dampings[-1]))
    chosen = torch.linspace(0, len(weight) - 1, min(len(weight), _JUDGED_ROWS)).round().long()
    sample, sampled = weight[chosen], grid.rows(chosen)
    best, least = dampings[0], torch.inf
    for damping in dampings:
        factor = factorize((1.0, statistics.hessian), damping=damping)
        values = sampled.values(gptq_codes(sample, factor, sampled))
        error = float(layer_error(sample, values, statistics.held_out).sum())
        if error >= least:
            break
        best, least = damping, error
    return factorize((1 - HELD_OUT, statistics.hessian), (HELD_OUT, statistics.held_out), damping=best)


def layer_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """[O] (w - ŵ)ᵀ H (w - ŵ): the mean squared error of each output."""
    error = weight - approximation
    return ((error @ hessian) * error).sum(-1)


def gptq_codes(weight: Tensor, factor: Factor, grid: Grid) -> Tensor:
    """[O, I] uint8 codes on a given grid.

    Where H is a multiple of the identity they are the nearest ones.

    Args:
        weight: [O, I] float32.
    """
    columns = _Columns(weight, factor.order, grid)
    error = torch.empty_like(columns.weight)
    for start, end in _blocks(len(error)):
        targets = columns.weight[start:end]
        targets = torch.addmm(targets, factor.unit[start:end, end:], error[end:]) if end < len(error) else targets.clone()
        columns.round_block(start, targets, factor.unit[start:end, start:end], error[start:end])
    return columns.codes()


def refine_codes(weight: Tensor, codes: Tensor, factor: Factor, grid: Grid, *, sweeps: int = 1) -> Tensor:
    """Codes whose error under the damped H is no larger: column by column, each takes the code that is best while all others stay.

    Source: Behdin et al. 2023 (arXiv:2309.01885), equations 8 and 9 (QuantEase's coordinate descent).
    """
    columns = _Columns(weight, factor.order, grid)
    error = columns.weight - grid.values(codes).T[factor.order]
    for _ in range(sweeps):
        for start, end in _blocks(len(error)):
            pulls = factor.pulls(start, end)
            old = error[start:end].clone()
            columns.round_block(start, torch.addmm(columns.weight[start:end], pulls, error), pulls[:, start:end], error[start:end], old=old)
    return columns.codes()


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    """Start and end of each block of columns, the last first."""
    return ((start, min(start + _BLOCK, columns)) for start in reversed(range(0, columns, _BLOCK)))


def quantize_gptq(weights: Mapping[str, Tensor], statistics: InputStatistics, format: WeightFormat) -> dict[str, QuantizedTensor]:
    """All weights that share an input.

    Args:
        weights: [O, I] each, finite; the format's group divides I.
    """
    shared = nvfp4_global_scale(weights.values()) if format.global_scale else None
    importance = statistics.hessian.diagonal()
    found = {name: search_scales(weight.float(), format=format, importance=importance, global_scale=shared) for name, weight in weights.items()}
    grids = [Grid.of(weight) for weight in found.values()]
    grid = Grid(
        scale=torch.cat([grid.scale for grid in grids]), offset=_joined([grid.offset for grid in grids]), levels=grids[0].levels,
    )  # fmt: skip
    joined = torch.cat([weight.float() for weight in weights.values()])
    factor = choose_factor(joined, grid, statistics)
    codes = gptq_codes(joined, factor, grid)
    codes = refine_codes(joined, codes, factor, grid, sweeps=3)
    if format.element != "int":
        codes = codebook(format.element)[1][codes.long()]
    parts = torch.split(codes, [len(weight) for weight in weights.values()])
    return {name: replace(weight, codes=part) for (name, weight), part in zip(found.items(), parts, strict=True)}


def _joined(offsets: list[Tensor | None]) -> Tensor | None:
    known = [offset for offset in offsets if offset is not None]
    return torch.cat(known) if known else None


class _Columns:
    """The weight transposed to rows of columns in a factor's order, and the rounding of one block of them.

    The loop over columns is numpy's: a call of it costs a third of torch's, and there are ten a column.
    """

    def __init__(self, weight: Tensor, order: Tensor, grid: Grid) -> None:
        self.weight = weight.T[order].contiguous()
        self._order, self._levels = order, grid.levels
        self._groups = (order // (weight.shape[1] // grid.scale.shape[1])).tolist()
        self._scale = grid.scale.T.contiguous().numpy()
        self._offset = None if grid.offset is None else grid.offset.T.contiguous().numpy()
        self._shift = None if self._offset is None else self._offset / self._scale
        self._found = torch.empty(self.weight.shape, dtype=torch.uint8)
        self._numbers, self._edges = np.empty(0), np.empty(0)
        if not isinstance(grid.levels, int):
            self._numbers, self._edges = grid.levels.numpy(), _edges(grid.levels).numpy()

    def round_block(self, start: int, targets: Tensor, coefficients: Tensor, error: Tensor, *, old: Tensor | None = None) -> None:
        """Round columns, the last first; each one's error pulls at those before it.

        Args:
            start: the block's first column.
            targets: [B, O] what each column would be without the others of the block; overwritten.
            coefficients: [B, B] above whose diagonal stands how much a column moves by the error of a later one.
            error: [B, O] becomes w - ŵ.
            old: [B, O] the part of the error that is in `targets` already.
        """
        weight, wanted, pull, wrong = (tensor.numpy() for tensor in (self.weight[start : start + len(targets)], targets, coefficients, error))
        found = self._found[start : start + len(targets)].numpy()
        moved = wrong if old is None else old.numpy()
        for i in reversed(range(len(wanted))):
            target = wanted[i]
            if i + 1 < len(wanted):
                target += pull[i, i + 1 :] @ moved[i + 1 :]
            value = self._round(self._groups[start + i], target, found[i])
            np.subtract(weight[i], value, out=wrong[i])
            if old is not None:
                np.subtract(wrong[i], moved[i], out=moved[i])

    def _round(self, group: int, level: Floats, found: Codes) -> Floats:
        """[O] the nearest values, in the memory of the target; their codes go to `found`."""
        level /= self._scale[group]
        if self._shift is not None:
            level -= self._shift[group]
        if isinstance(self._levels, int):
            np.rint(level, out=level)
            np.maximum(level, _ZERO, out=level)
            np.minimum(level, np.float32(self._levels - 1), out=level)
            np.copyto(found, level, casting="unsafe")
        else:
            places = np.searchsorted(self._edges, level)
            np.copyto(found, places, casting="unsafe")
            np.take(self._numbers, places, out=level)
        level *= self._scale[group]
        if self._offset is not None:
            level += self._offset[group]
        return level

    def codes(self) -> Tensor:
        """[O, I] of all columns rounded last."""
        natural = torch.empty_like(self._found)
        natural[self._order] = self._found
        return natural.T.contiguous()


def _edges(levels: Tensor) -> Tensor:
    """[L - 1] where the nearest level changes; a tie goes to the level at an even distance from 0's, which is the even code of a float."""
    middles = (levels[1:] + levels[:-1]) / 2
    lower_is_even = (torch.arange(len(middles)) - levels.abs().argmin()) % 2 == 0
    return torch.where(lower_is_even, middles, torch.nextafter(middles, torch.tensor(-torch.inf)))
