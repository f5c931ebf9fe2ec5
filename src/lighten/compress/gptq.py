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

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.compress.minifloat import codebook, nvfp4_global_scale
from lighten.compress.scale_search import search_scales
from lighten.compress.statistics import InputStatistics
from lighten.model.spec import WeightFormat

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Shares of the mean of H_ii that are tried as its damping; choice, around the 0.01 of GPTQ's own code."""

_BLOCK = 32  # columns between two matrix products; measured: 16 to 64 are equally fast
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
        hessian: [I, I] undamped.
        added: [I] what damping adds to its diagonal.
        order: [I] columns by ascending H_ii; they are rounded from the last to the first.
        unit: [I, I] in that order, unit upper triangular; below the diagonal lies nothing of meaning.
    """

    hessian: Tensor
    added: Tensor
    order: Tensor
    unit: Tensor


def factorize(hessian: Tensor, *, damping: float) -> Factor:
    """Besides the statistics, one [I, I] copy lives in the result, and another while it is made.

    Args:
        hessian: [I, I], positive semidefinite up to rounding.
        damping: share of the mean of H_ii that is added to the diagonal. Where float32 cannot factorize the sum, ten times as much is.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    order = diagonal.argsort(stable=True)
    while True:
        added = torch.full_like(diagonal, damping * mean).where(diagonal > 0, torch.tensor(mean or 1.0))
        unit = hessian[order][:, order]
        unit.diagonal().add_(added[order])
        unit, failed = torch.linalg.cholesky_ex(unit, upper=True)
        if not int(failed):
            unit /= unit.diagonal().clone()[:, None]
            return Factor(hessian=hessian, added=added, order=order, unit=unit)
        damping *= 10


def choose_factor(weight: Tensor, grid: Grid, statistics: InputStatistics, *, dampings: tuple[float, ...] = DAMPINGS) -> Factor:
    """The factor whose damping gives the least error on held-out rows, judged on at most 256 rows of the weight; without held-out rows the
    damping is 0.01, as in GPTQ's own code.
    """
    if statistics.held_out is None:
        return factorize(statistics.hessian, damping=0.01)
    chosen = torch.linspace(0, len(weight) - 1, min(len(weight), _JUDGED_ROWS)).round().long()
    sample, sampled = weight[chosen], grid.rows(chosen)
    best, least = None, torch.inf
    for damping in dampings:
        factor = factorize(statistics.hessian, damping=damping)
        values = sampled.values(gptq_codes(sample, factor, sampled))
        error = float(layer_error(sample, values, statistics.held_out).sum())
        if error < least:
            best, least = factor, error
        else:
            break
    assert best is not None, "the first damping's error is finite"
    return best


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
    error, count = columns.weight.clone(), len(columns.weight)  # rows of `error` below `start` are still the weight
    for start in reversed(range(0, count, _BLOCK)):
        end = min(start + _BLOCK, count)
        targets = error[start:end]
        if end < count:
            targets = torch.addmm(targets, factor.unit[start:end, end:], error[end:])
        for i in reversed(range(start, end)):
            target = targets[i - start]
            if i + 1 < end:
                target = torch.addmv(target, error[i + 1 : end].T, factor.unit[i, i + 1 : end])
            torch.sub(columns.weight[i], columns.round(i, target), out=error[i])
    return columns.codes()


def refine_codes(weight: Tensor, codes: Tensor, factor: Factor, grid: Grid, *, sweeps: int) -> Tensor:
    """Codes whose error under the damped H is no larger: column by column, by descending H_ii, each takes the code that is best while all
    others stay.

    Source: Behdin et al. 2023 (arXiv:2309.01885), equations 8 and 9 (QuantEase's coordinate descent).
    """
    columns = _Columns(weight, factor.order, grid)
    hessian = factor.hessian[factor.order][:, factor.order]
    hessian.diagonal().add_(factor.added[factor.order])
    diagonal = hessian.diagonal().tolist()
    values = grid.values(codes).T[factor.order].contiguous()
    error = columns.weight - values
    for _ in range(sweeps):
        for start in reversed(range(0, len(error), _BLOCK)):
            end = min(start + _BLOCK, len(error))
            pull = hessian[start:end] @ error
            for i in reversed(range(start, end)):
                now = columns.round(i, torch.add(values[i], pull[i - start], alpha=1 / diagonal[i]))
                moved = values[i] - now
                pull.addr_(hessian[start:end, i], moved)
                values[i] = now
                error[i] += moved
    return columns.codes()


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
    """The weight transposed to rows of columns in a factor's order, and the rounding of one column."""

    def __init__(self, weight: Tensor, order: Tensor, grid: Grid) -> None:
        self.weight = weight.T[order].contiguous()
        self._order, self._grid = order, grid
        self._groups = (order // (weight.shape[1] // grid.scale.shape[1])).tolist()
        self._scale = grid.scale.T.contiguous()
        self._offset = None if grid.offset is None else grid.offset.T.contiguous()
        self._found = torch.empty(self.weight.shape, dtype=torch.uint8)
        self._shift = None if self._offset is None else self._offset / self._scale
        self._edges = None if isinstance(grid.levels, int) else _edges(grid.levels)

    def round(self, i: int, target: Tensor) -> Tensor:
        """[O] the values nearest to `target`; their codes are kept."""
        group = self._groups[i]
        level = target / self._scale[group]
        if self._shift is not None:
            level.sub_(self._shift[group])
        if isinstance(self._grid.levels, int):
            level.round_().clamp_(0, self._grid.levels - 1)
            self._found[i] = level
        else:
            assert self._edges is not None, "a codebook has edges"
            code = torch.bucketize(level, self._edges)
            self._found[i] = code
            level = self._grid.levels[code]
        level.mul_(self._scale[group])
        return level if self._offset is None else level.add_(self._offset[group])

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
