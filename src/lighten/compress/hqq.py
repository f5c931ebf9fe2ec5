"""Half-quadratic quantization: the zero point that makes the weights' own error sparse; no calibration.

    min over z of φ(W - s·(q - z)),   φ(x) = Σ|x|^p with p < 1,   q = the nearest codes on the grid of s and z

is split by an auxiliary error E: E = shrink(W - s·(q - z)), then z = mean of q - (W - E) / s over the group; β, the price of E, rises
in each round. The scale stays the one that spans the group.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", equations 2 to 6; the constants are those of the
authors' package. Deviations: (1) the zero point is rounded to a whole code, as the one convention of `lighten.compress.grid` asks, and codes
are chosen anew on that grid; (2) each group keeps the zero point of its least mean magnitude of error, and not the last one's of all.

Shape legend: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor, to_groups
from lighten.compress.rtn import quantize_rtn

NORM, BETA, BETA_GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20
"""p, the first β, its growth in a round, and rounds. Source: the authors' package, hqq 0.2, `optimize_weights_proximal`."""


def quantize_hqq(weight: Tensor, *, bits: int, group_size: int) -> QuantizedTensor:
    """An asymmetric grid whose mean magnitude of error is, in each group, no larger than round-to-nearest's.

    Args:
        weight: [O, I], finite; `group_size` divides I.
    """
    plain = quantize_rtn(weight, bits=bits, group_size=group_size, symmetric=False)
    assert plain.zero_point is not None, "an asymmetric grid has zero points"
    groups, top = to_groups(weight.float(), group_size), 2**bits - 1
    scale = plain.scale.float()[..., None]
    zero = best = plain.zero_point.float()[..., None]
    codes = _nearest(groups, scale, best, top)
    least, beta = (groups - (codes - best) * scale).abs().mean(-1, keepdim=True), BETA
    for _ in range(ROUNDS):
        levels = _nearest(groups, scale, zero, top)
        error = groups - (levels - zero) * scale
        wanted = groups - _shrink(error, beta)
        zero = (levels - wanted / scale).mean(-1, keepdim=True)
        whole = zero.round().clamp(0, top)
        tried = _nearest(groups, scale, whole, top)
        distance = (groups - (tried - whole) * scale).abs().mean(-1, keepdim=True)
        better = distance < least
        best, least, codes = torch.where(better, whole, best), torch.where(better, distance, least), torch.where(better, tried, codes)
        beta *= BETA_GROWTH
    return QuantizedTensor(
        codes=codes.to(torch.uint8).reshape(weight.shape), scale=plain.scale, zero_point=best[..., 0].to(torch.uint8),
        bits=bits, group_size=group_size,
    )  # fmt: skip


def _nearest(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return (groups / scale + zero).round_().clamp_(0, top)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold: the minimum over E of |E|^p + β/2 (E - error)², to first order."""
    magnitude = error.abs()
    less = (magnitude - magnitude.clamp(min=1e-30).pow(NORM - 1) / beta).clamp_(min=0)
    return less.copysign_(error)
