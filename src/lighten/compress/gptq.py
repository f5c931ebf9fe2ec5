"""GPTQ: columns are rounded one after another, and what each one's rounding does to the layer's output is made up for by the columns to come.

The error of a row's output is (w - ŵ)ᵀ H (w - ŵ) with H the mean of x xᵀ. With H = RᵀDR, R unit upper triangular, it is

    Σ_i D_i (e_i + Σ_{j>i} R_ij e_j)²,   e = w - ŵ,

so where columns are taken from the last to the first, each one's best real value is w_i + Σ_{j>i} R_ij e_j, and the code nearest to it is
taken. That is GPTQ's answer to the digit (Chee et al., theorem 6), and needs one Cholesky factorization and no inverse.

Source: Frantar et al. 2023 (arXiv:2210.17323), algorithm 1; Chee et al. 2023 (arXiv:2307.13304), section 3, for this form of it.
Deviations: (1) columns are taken by descending H_ii, while groups stay neighbours and their scales are chosen beforehand, so no column has
to say its group; (2) the scales come from `search_scales`, weighted by D_i, of which the error is made when later columns make up for what
they can; (3) of a list of dampings the one is taken that is to have the least error on held-out rows, whose moments then join the others'; (4) a
column that is always 0 is rounded to the nearest and not set to 0; (5) scales and codes are then refined in turn, see `refit_scales` and
`refine_codes`.

Shape legend: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor
from lighten.compress.minifloat import decode, encode, nvfp4_global_scale, round_array
from lighten.compress.rtn import quantize_rtn
from lighten.compress.scale_search import search_scales
from lighten.compress.statistics import InputStatistics, some_rows
from lighten.errors import ModelError
from lighten.model.spec import PER_TENSOR, WeightFormat

Floats: TypeAlias = npt.NDArray[np.float32]

DAMPINGS = (0.03, 0.1, 0.3)
"""Shares that are tried as damping. Choice: of single ones .1 is the best with 4,096 rows and .03 with 20,480; .01 and 1 seldom are
(benchmarks/solver_choices.py)."""

HELD_OUT = 0.25
"""The share of calibration rows that is held out; the block's runner keeps each fourth."""

_LEAST_DAMPING = 1e-4  # share of the mean of H_ii: choice, float32's rounding of sums of some thousand rows is some 1e-6 of it
_MORE_DAMPING = tuple(10.0**power for power in range(7))  # up to a hundred times the mean, where any finite H is positive definite
_ZERO = np.float32(0)
_ROUNDS = {2: 3, 3: 2, 4: 1, 5: 1, 6: 1, 8: 1}
"""Rounds of refitting scales and refining codes, by bits: choice, each costs as much as GPTQ itself. On text that chose nothing the first lowers the
error by 3 % at 3 and 4 bits and 6 % at 2, each next one by at most 2 % (benchmarks/solver_choices.py)."""
_REFIT_ROWS = 512  # refitted at once: some copies of so many rows of the weight are made
_REFIT_ELEMENTS = 1 << 24  # of their systems of equations, 64 MiB

_BLOCK = 32  # columns between two matrix products


@dataclass(frozen=True, kw_only=True)
class GptqSettings:
    """How much is done beside plain GPTQ; `GptqSettings(damping=0.01, refine=0, search=False)` is that alone, columns by descending H_ii.

    Attributes:
        damping: see `factorize`; None: chosen on held-out rows, which choose codes too where nothing is held out.
        refine: rounds of refitting scales and refining codes; None: as many as the width is worth.
        search: whole-number codes have searched scales and not those that span a group.
        keep_zeros: weights that are 0 stay 0, as pruned ones should.
    """

    damping: float | None = None
    refine: int | None = None
    search: bool = True
    keep_zeros: bool = False

    def rounds(self, bits: int | None) -> int:
        return _ROUNDS.get(bits or 0, 0) if self.refine is None else self.refine


DEFAULT = GptqSettings()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that each weight may take: level(code) · scale + offset.

    Attributes:
        scale: [O, G] float32, not 0; its columns serve I / G neighbouring columns of the weight each.
        offset: [O, G] float32, or None for 0.
        levels: how many whole numbers from 0 on a code may be; or the numbers [L] that codes stand for, ascending; or a float, whose bit
            patterns codes are.
        zeros: [O, I] weights that stay exactly 0, where the grid has a 0: pruned ones. None: none has to.
    """

    scale: Tensor
    offset: Tensor | None
    levels: int | Tensor | Literal["e4m3", "e2m1"]
    zeros: Tensor | None = None

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Grid:
        """The grid that a weight's codes are on; one scale of a whole tensor becomes one of each row."""
        scale = weight.scales().expand(weight.codes.shape[0], -1)
        if weight.element != "int":
            return cls(scale=scale, offset=None, levels=weight.element)
        zero = torch.tensor(float(2 ** (weight.bits - 1))) if weight.zero_point is None else weight.zero_point.float()
        return cls(scale=scale, offset=-zero * scale, levels=2**weight.bits)

    def rows(self, chosen: Tensor) -> Grid:
        """The grid of some rows."""
        offset, zeros = (None if each is None else each[chosen] for each in (self.offset, self.zeros))
        return Grid(scale=self.scale[chosen], offset=offset, levels=self.levels, zeros=zeros)

    def values(self, codes: Tensor) -> Tensor:
        """[O, I] float32 that codes stand for."""
        if isinstance(self.levels, Tensor):
            levels = self.levels[codes.long()]
        else:
            levels = codes.float() if isinstance(self.levels, int) else decode(self.levels, codes)
        groups = levels.reshape(*self.scale.shape, -1) * self.scale[..., None]
        return (groups if self.offset is None else groups + self.offset[..., None]).reshape(codes.shape)


@dataclass(frozen=True, kw_only=True)
class Factor:
    """H of one input, damped and factorized; all weights that have the input share it.

    Attributes:
        moments: H = the sum of share · [I, I] over these pairs, which are not copied.
        added: [I] what damping adds to H's diagonal.
        order: [I] columns; they are rounded from the last to the first.
        unit: [I, I] in that order, unit upper triangular R; what lies below the diagonal has no meaning.
        residual: [I] D: what of each column's mean square the columns that are rounded after it cannot make up for.
    """

    moments: tuple[tuple[float, Tensor], ...]
    added: Tensor
    order: Tensor
    unit: Tensor
    residual: Tensor

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


def factorize(*moments: tuple[float, Tensor], damping: float, order: Tensor | None = None) -> Factor:
    """The factor of H = the sum of share · [I, I]. One [I, I] lives on in it; while it is made, there are two.

    Args:
        damping: what is added to H_ii, as a share of the geometric mean of H_ii and its mean over i, besides 1e-4 of the latter. Where
            float32 cannot factorize the sum, ten times as much is added, and so on.
        order: [I] columns, of which the last is rounded first; None: by ascending H_ii.

    Raises:
        ModelError: the moments are not finite.
    """
    diagonal = sum((share * moment.diagonal() for share, moment in moments), torch.zeros(len(moments[0][1])))
    mean = diagonal.mean()
    order = diagonal.argsort(stable=True) if order is None else order
    for more in _MORE_DAMPING if mean.isfinite() else ():
        added = (damping * (diagonal * mean).sqrt() + _LEAST_DAMPING * mean) * more
        added = torch.where(diagonal > 0, added, mean if mean > 0 else torch.tensor(1.0))
        unit = sum_of(moments, order).index_select(1, order)
        unit.diagonal().add_(added[order])
        _, failed = torch.linalg.cholesky_ex(unit, upper=True, out=(unit, torch.empty((), dtype=torch.int32)))
        if not int(failed):
            root = unit.diagonal().clone()
            residual = torch.empty_like(root).index_copy_(0, order, root.square())
            return Factor(moments=moments, added=added, order=order, unit=unit.div_(root[:, None]), residual=residual)
    raise ModelError(
        f"gptq: over the calibration text, the {len(diagonal)} inputs of a layer hold values that are not finite, or whose squares float32 cannot "
        "hold; quantize(rtn) needs no inputs, and cast(float32) before this step computes them in a wider type."
    )


def first_factor(statistics: InputStatistics, damping: float | None = None) -> Factor:
    """The factor that scales are searched with, before there is a grid that could choose a damping: damped by the middle of `DAMPINGS`.

    Args:
        damping: a settled one, for which all rows count.
    """
    if damping is not None:
        return _of_all_rows(statistics, damping)
    return factorize((1.0, statistics.hessian), damping=DAMPINGS[1])


def _of_all_rows(statistics: InputStatistics, damping: float) -> Factor:
    if statistics.held_out is None:
        return factorize((1.0, statistics.hessian), damping=damping)
    return factorize((1 - HELD_OUT, statistics.hessian), (HELD_OUT, statistics.held_out), damping=damping)


def choose_factor(weight: Tensor, codes: Tensor, grid: Grid, statistics: InputStatistics, *, first: Factor | None = None) -> Factor:
    """The damping of `DAMPINGS` that gives the least error on held-out rows, and then the factor of all rows, held-out ones too.

    No codes are tried: GPTQ leaves R e = δ, δ what rounding left of each column's target, which is taken to be what it leaves of the weight.
    Without held-out rows it is the first factor.

    Args:
        weight: [O, I], of which at most 128 rows are taken.
        codes: [O, I], the nearest ones.
        first: `first_factor(statistics)`, where it was made already.
    """
    first = first_factor(statistics) if first is None else first
    if statistics.held_out is None:
        return first
    chosen = some_rows(torch.arange(len(weight)))
    rounding, held_out = (weight[chosen] - grid.rows(chosen).values(codes[chosen])).T, statistics.held_out

    def error(factor: Factor) -> float:
        left = torch.linalg.solve_triangular(factor.unit, rounding[factor.order], upper=True, unitriangular=True)
        return float(layer_error(torch.empty_like(left).index_copy_(0, factor.order, left).T, torch.zeros(()), held_out).sum())

    low, middle, high = DAMPINGS
    errors = {middle: error(first)}
    del first
    errors[high] = error(factorize((1.0, statistics.hessian), damping=high))
    if errors[middle] <= errors[high]:
        errors[low] = error(factorize((1.0, statistics.hessian), damping=low))
    best = min(errors, key=lambda damping: errors[damping])
    return _of_all_rows(statistics, best)


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

    Source: Behdin et al. 2023 (arXiv:2309.01885), QuantEase's coordinate descent.
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


def refit_scales(weight: Tensor, codes: Tensor, factor: Factor, grid: Grid, *, dtype: torch.dtype) -> Grid:
    """A row's scales that together give the least error under the damped H while codes stay, rounded to `dtype`.

    Rows whose error would not be less keep theirs. Offsets are zero points: they change in proportion.

    Args:
        weight: [O, I]; codes, grid: as elsewhere.
    """
    hessian, count = factor.hessian(), grid.scale.shape[1]
    rows = max(1, min(_REFIT_ROWS, _REFIT_ELEMENTS // count**2))
    scale = grid.scale.clone()
    for start in range(0, len(weight), rows):
        chosen = torch.arange(start, min(start + rows, len(weight)))
        own, values = grid.rows(chosen), grid.rows(chosen).values(codes[chosen])
        unscaled = values.reshape(len(chosen), count, -1) / own.scale[..., None]
        pull = ((weight[chosen] - values) @ hessian).reshape(unscaled.shape).mul_(unscaled).sum(-1)
        curvature = _curvature(unscaled, hessian)
        ridge = curvature.diagonal(dim1=1, dim2=2).mean(-1) * 1e-6 + 1e-30  # a group of zeros has no curvature
        damped = curvature + torch.eye(count) * ridge[:, None, None]
        moved = (own.scale + torch.linalg.solve(damped, pull)).to(dtype).float() - own.scale
        gain = 2 * (moved * pull).sum(-1) - ((curvature @ moved[..., None])[..., 0] * moved).sum(-1)
        better = (gain > 0) & ((own.scale + moved).abs() > torch.finfo(dtype).tiny).all(-1)  # also not where a scale overflowed
        scale[chosen] += torch.where(better[:, None], moved, torch.zeros_like(moved))
    offset = None if grid.offset is None else grid.offset / grid.scale * scale
    return replace(grid, scale=scale, offset=offset)


def _curvature(unscaled: Tensor, hessian: Tensor) -> Tensor:
    """[n, G, G] uᵀHv over the columns of each two groups, of [n, G, C]."""
    rows, count, columns = unscaled.shape
    result = torch.empty(rows, count, count)
    for g in range(count):
        later = slice(g * columns, None)
        seen = (unscaled[:, g] @ hessian[g * columns : (g + 1) * columns, later]).reshape(rows, count - g, columns)
        result[:, g, g:] = result[:, g:, g] = seen.mul_(unscaled[:, g:]).sum(-1)
    return result


def corrected(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """[O, I] the weight whose outputs on inputs x̂ of the changed model come nearest to those of `weight` on the original ones, x:

        W + W (C - H) (H + damping)⁻¹,   C the mean of x x̂ᵀ

    It follows the rows that it sees closely: where it was tried (benchmarks/LOG.md), that of other rows rose.

    Source: Li et al. 2025 (arXiv:2504.02692) and Zhang et al. 2025 (arXiv:2505.11695), for the objective; here it is damped towards W.

    Args:
        cross: [I, I] C.
        factor: of the same rows' H alone.
    """
    ((share, hessian),) = factor.moments
    missing = (weight @ cross).sub_(weight @ hessian, alpha=share)
    solved = torch.linalg.solve_triangular(factor.unit.T, missing.T[factor.order], upper=False, unitriangular=True)
    solved /= factor.residual[factor.order, None]
    solved = torch.linalg.solve_triangular(factor.unit, solved, upper=True, unitriangular=True)
    return weight + torch.empty_like(solved).index_copy_(0, factor.order, solved).T


def quantize_gptq(
    weights: Mapping[str, Tensor], statistics: InputStatistics, format: WeightFormat, settings: GptqSettings = DEFAULT
) -> dict[str, QuantizedTensor]:
    """All weights that share an input.

    Args:
        weights: [O, I] each, finite; the format's group divides I.
        statistics: where they hold `cross`, the codes are of the weights that make up for what earlier layers' codes changed.
    """
    first = first_factor(statistics, settings.damping)
    if statistics.cross is not None:
        weights = {name: corrected(weight.float(), statistics.cross, first) for name, weight in weights.items()}
    found = _with_scales(weights, first.residual, format, search=settings.search)
    sizes = [len(weight) for weight in weights.values()]
    joined = torch.cat([weight.float() for weight in weights.values()])
    grid = replace(_joined([Grid.of(weight) for weight in found.values()]), zeros=joined == 0 if settings.keep_zeros else None)
    nearest = torch.cat([weight.codes for weight in found.values()])
    factor = first if settings.damping is not None else choose_factor(joined, nearest, grid, statistics, first=first)
    del first, nearest
    codes = gptq_codes(joined, factor, grid)
    for _ in range(settings.rounds(format.bits)):
        if _refits(format):
            grid = refit_scales(joined, codes, factor, grid, dtype=getattr(torch, format.scale_dtype))
        codes = refine_codes(joined, codes, factor, grid)
    parts, scales = torch.split(codes, sizes), torch.split(grid.scale, sizes)
    return {
        name: replace(weight, codes=part, scale=scale.to(weight.scale.dtype) if _refits(format) else weight.scale)
        for (name, weight), part, scale in zip(found.items(), parts, scales, strict=True)
    }


def _with_scales(weights: Mapping[str, Tensor], importance: Tensor, format: WeightFormat, *, search: bool) -> dict[str, QuantizedTensor]:
    """The nearest codes, on scales of least weighted error, or on those that span each group."""
    if not search and format.element == "int":
        assert format.bits is not None, "a format to quantize to has a width"
        bits, group_size, symmetric = format.bits, format.group_size, format.symmetric
        return {name: quantize_rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric) for name, weight in weights.items()}
    shared = nvfp4_global_scale(weights.values()) if format.global_scale else None
    return {name: search_scales(weight.float(), format=format, importance=importance, global_scale=shared) for name, weight in weights.items()}


def _refits(format: WeightFormat) -> bool:
    """Whether a scale can be moved by itself, and by little."""
    return format.group_size != PER_TENSOR and format.scale_dtype in ("float16", "bfloat16", "float32")


def _joined(grids: list[Grid]) -> Grid:
    offsets = [grid.offset for grid in grids if grid.offset is not None]
    return Grid(scale=torch.cat([grid.scale for grid in grids]), offset=torch.cat(offsets) if offsets else None, levels=grids[0].levels)


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
        self._zeros = None if grid.zeros is None else grid.zeros.T[order].contiguous().numpy()
        self._found = torch.empty(self.weight.shape, dtype=torch.uint8)
        if isinstance(grid.levels, Tensor):
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
        moved, levels = wrong if old is None else old.numpy(), np.empty_like(wanted)
        for i in reversed(range(len(wanted))):
            target = wanted[i]
            if i + 1 < len(wanted):
                target += pull[i, i + 1 :] @ moved[i + 1 :]
            value = self._round(self._groups[start + i], target, levels[i])
            if self._zeros is not None:
                self._clear(self._zeros[start + i], self._groups[start + i], value, levels[i])
            np.subtract(weight[i], value, out=wrong[i])
            if old is not None:
                np.subtract(wrong[i], moved[i], out=moved[i])
        found = torch.from_numpy(levels)
        self._found[start : start + len(targets)] = encode(self._levels, found) if isinstance(self._levels, str) else found

    def _round(self, group: int, target: Floats, level: Floats) -> Floats:
        """[O] the nearest values, in the memory of the target; `level` becomes their whole number, number of a float, or place in a codebook."""
        np.divide(target, self._scale[group], out=level)
        if self._shift is not None:
            level -= self._shift[group]
        number = level
        if isinstance(self._levels, int):
            np.rint(level, out=level)
            np.maximum(level, _ZERO, out=level)
            np.minimum(level, np.float32(self._levels - 1), out=level)
        elif isinstance(self._levels, str):
            round_array(self._levels, level)
        else:
            places = np.searchsorted(self._edges, level)
            level[:], number = places, self._numbers[places]
        np.multiply(number, self._scale[group], out=target)
        if self._offset is not None:
            target += self._offset[group]
        return target

    def _clear(self, zeros: npt.NDArray[np.bool_], group: int, value: Floats, level: Floats) -> None:
        """The values that stay 0, and what stands for 0, which is on the grid to the last bit."""
        value[zeros] = 0
        if isinstance(self._levels, Tensor):
            level[zeros] = int(np.abs(self._numbers).argmin())
        else:
            level[zeros] = 0 if self._shift is None else np.rint(-self._shift[group][zeros])

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
