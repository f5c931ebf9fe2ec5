"""Half-quadratic quantization: the grid whose error is sparse, many weights near a code and few far off; no calibration.

    min over the grid of φ(W - s·(q - z)),   φ(x) = Σ|x|^p with p < 1,   q = the nearest codes

is split by an auxiliary error E: E = shrink(W - s·(q - z)), then the grid is the least-squares one for W - E and the codes q; β, the price of
E, rises in each round.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", equations 2 to 6; the constants are those of the
authors' package. Deviations: (1) the zero point is rounded to a whole code, as the one convention of `lighten.compress.grid` asks; (2) the
scale moves too, for a zero point that may only move by whole codes hardly does; (3) E is measured in steps of the first grid, so that β means
the same for weights of any size; (4) each group keeps the grid of least φ that it met.

Shape legend: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor, to_groups
from lighten.compress.rtn import quantize_rtn

NORM, BETA, BETA_GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20
"""p, the first β, its growth in a round, and rounds. Source: the defaults of the authors' package, `optimize_weights_proximal_legacy`."""


def quantize_hqq(weight: Tensor, *, bits: int, group_size: int) -> QuantizedTensor:
    """An asymmetric grid whose φ is, in each group, no larger than round-to-nearest's.

    Args:
        weight: [O, I], finite; `group_size` divides I.
    """
    plain = quantize_rtn(weight, bits=bits, group_size=group_size, symmetric=False)
    assert plain.zero_point is not None, "an asymmetric grid has zero points"
    groups, top = to_groups(weight.float(), group_size), 2**bits - 1
    step = scale = best_scale = plain.scale.float()[..., None]
    zero = best_zero = plain.zero_point.float()[..., None]
    least, beta = torch.full_like(step, torch.inf), BETA
    for _ in range(ROUNDS + 1):
        codes = _nearest(groups, scale, zero, top)
        error = (groups - (codes - zero) * scale) / step
        distance = error.abs().pow(NORM).mean(-1, keepdim=True)
        better = distance < least
        least = torch.where(better, distance, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        scale, zero = _least_squares(groups - _shrink(error, beta) * step, codes, scale, zero, top)
        beta *= BETA_GROWTH
    return QuantizedTensor(
        codes=_nearest(groups, best_scale, best_zero, top).to(torch.uint8).reshape(weight.shape), scale=best_scale[..., 0].half(),
        zero_point=best_zero[..., 0].to(torch.uint8), bits=bits, group_size=group_size,
    )  # fmt: skip


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return (groups / scale + zero).round_().clamp_(0, top)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold: the minimum over E of |E|^p + β/2 (E - error)², to first order."""
    magnitude = error.abs()
    less = (magnitude - magnitude.clamp(min=1e-30).pow(NORM - 1) / beta).clamp_(min=0)
    return less.copysign_(error)


def _least_squares(wanted: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The whole zero point nearest to that of the line through codes and wanted weights, and the best float16 scale with it; what codes do not
    determine stays."""
    code, middle = codes.mean(-1, keepdim=True), wanted.mean(-1, keepdim=True)
    slope = ((codes - code) * (wanted - middle)).sum(-1, keepdim=True) / (codes - code).square().sum(-1, keepdim=True)
    moved = (code - middle / slope).round()
    zero = torch.where(moved.isfinite(), moved, zero).clamp(0, top)
    levels = codes - zero
    fitted = ((levels * wanted).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)).half().float()
    return torch.where(fitted.isfinite() & (fitted > 0), fitted, scale), zero
