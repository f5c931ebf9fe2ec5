"""SparseGPT: columns are pruned from the first to the last, and what each one's zeros do to the outputs is made up for by the columns to come.

With the damped H = RᵀDR as in `gptq.py`, columns taken in their natural order, the best value of column i is w_i + Σ_j R_ij e_j over the columns j
that are done, e = w - ŵ, and setting it to 0 costs D_i times its square. The mask of a block goes by that cost, with the values that its columns
have while all of them are still free: w + R_bb⁻¹ R_b e.

Source: Frantar & Alistarh 2023 (arXiv:2301.00774), algorithm 1: the mask of each block of columns is chosen when the block is reached, n of each m
neighbours when these are. Deviations: none but the form, and what the damping is measured by (`gptq.factorize`).

Shape legend: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lighten.compress.gptq import DAMPINGS, HELD_OUT, Factor, factorize, layer_error
from lighten.compress.masks import Keep, keep_largest
from lighten.compress.statistics import InputStatistics, some_rows

BLOCK = 128
"""Columns whose mask is chosen at once. Source: the paper, section 3.4, B_s = 128."""


def prune_sparsegpt(
    weights: Mapping[str, Tensor], statistics: InputStatistics, keeps: Mapping[str, Keep], damping: float | None = None
) -> dict[str, Tensor]:
    """All weights that share an input, [O, I] each: exactly `keep.count` of each stay, updated.

    Args:
        damping: see `gptq.factorize`; None: that of its `DAMPINGS` with the least error on held-out rows, of some outputs.
    """
    hessian, held_out = statistics.hessian, statistics.held_out
    natural = torch.arange(len(hessian) - 1, -1, -1)
    if damping is None and held_out is not None:
        some = {name: some_rows(weight) for name, weight in weights.items()}

        def error(share: float) -> float:
            factor = factorize((1.0, hessian), damping=share, order=natural)
            return sum(float(layer_error(weight, prune(weight, factor, keeps[name]), held_out).sum()) for name, weight in some.items())

        damping = min(DAMPINGS, key=error)
    moments = [(1.0, hessian)] if held_out is None else [(1 - HELD_OUT, hessian), (HELD_OUT, held_out)]
    factor = factorize(*moments, damping=DAMPINGS[1] if damping is None else damping, order=natural)
    return {name: prune(weight, factor, keeps[name]) for name, weight in weights.items()}


def prune(weight: Tensor, factor: Factor, keep: Keep) -> Tensor:
    """[O, I] what stays, updated; of each block of columns its share, but for rounding.

    Args:
        factor: of H, in descending natural order (`factorize(..., order=...)`).
    """
    columns, residual = weight.T[factor.order].contiguous(), factor.residual[factor.order]
    error = torch.zeros_like(columns)
    width = keep.pattern[1] if keep.pattern is not None else BLOCK
    for end in range(len(columns), 0, -width):
        start = max(0, end - width)
        moved = factor.unit[start:end, end:] @ error[end:]
        alone = torch.linalg.solve_triangular(factor.unit[start:end, start:end], moved, upper=True, unitriangular=True)
        score = (columns[start:end] + alone).square() * residual[start:end, None]
        kept = _kept(score.T.flip(1), keep, first=len(columns) - end).flip(1).T
        for i in reversed(range(start, end)):
            target = columns[i] + moved[i - start] + factor.unit[i, i + 1 : end] @ error[i + 1 : end]
            error[i] = columns[i] - torch.where(kept[i - start], target, torch.zeros(()))
    pruned = torch.empty_like(columns)
    pruned[factor.order] = columns - error
    return pruned.T.contiguous()


def _kept(score: Tensor, keep: Keep, *, first: int) -> Tensor:
    """[O, B] which of a block's weights stay. first: the columns before it."""
    if keep.pattern is not None:
        return keep.mask(score)
    rows, columns = (1, score.shape[1]) if keep.scope == "row" else score.shape
    count = keep.count(rows, first + columns) - keep.count(rows, first)
    return keep_largest(score.reshape(-1, rows * columns), count=count).reshape(score.shape)
