"""Magnitude pruning: the smallest weights become 0.

Source: Han et al. 2015 (arXiv:1506.02626), section 3; n:m patterns: Mishra et al. 2021 (arXiv:2104.08378).

Shape legend: O rows, I columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lighten.compress.masks import Keep


def prune_magnitude(weight: Tensor, keep: Keep) -> Tensor:
    """[O, I] with all but the largest weights set to 0."""
    return weight * keep.mask(weight.abs())


def prune_threshold(weight: Tensor, *, threshold: float) -> Tensor:
    """Zeros the weights whose magnitude is below `threshold`."""
    return weight * (weight.abs() >= threshold)


def global_threshold(weights: Callable[[], Iterable[Tensor]], *, sparsity: float) -> float:
    """The magnitude below which `round(sparsity · count)` of all weights lie, exactly up to ties, holding one matrix at a time.

    The bit patterns of non-negative float32 numbers are ordered as the numbers are: a first pass counts their upper 16 bits, a second
    the lower 16 within the one bin where the rank falls.

    Args:
        weights: gives all matrices, each time it is called.
    """
    upper = sum((torch.bincount(_bits(w) >> 16, minlength=2**16) for w in weights()), torch.zeros(2**16, dtype=torch.int64))
    count = int(upper.sum())
    rank = round(sparsity * count)
    if rank == count:
        return math.inf
    bin_, below = _find(upper, rank)
    lower = torch.zeros(2**16, dtype=torch.int64)
    for weight in weights():
        bits = _bits(weight)
        lower += torch.bincount(bits[bits >> 16 == bin_] & 0xFFFF, minlength=2**16)
    last, _ = _find(lower, rank - below)
    return float(torch.tensor((bin_ << 16) + last, dtype=torch.int32).view(torch.float32))


def _bits(weight: Tensor) -> Tensor:
    return weight.abs().float().reshape(-1).view(torch.int32).long()


def _find(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the element of this rank (from 0), and how many lie in the bins before it."""
    ends = counts.cumsum(0)
    found = int(torch.searchsorted(ends, torch.tensor(rank), right=True))
    return found, int(ends[found] - counts[found])
