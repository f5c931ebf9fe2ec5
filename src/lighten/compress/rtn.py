"""Round-to-nearest: each weight to the closest point of a grid that spans its group."""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.compress.grid import QuantizedTensor, to_groups


def quantize_rtn(weight: Tensor, *, bits: int, group_size: int, symmetric: bool) -> QuantizedTensor:
    """Each weight goes to the nearest point of its group's grid. That is at most half a step away, or, where the scale's own rounding ends
    the grid before the largest weight, 3/4 of one; at the far end of a symmetric grid 17/16.

    Asymmetric: scale = (max - min) / (2**bits - 1) over the group and 0, zero_point = round(-min / scale), ties up.
    Symmetric: scale = extreme / -2**(bits - 1), where extreme is the weight of largest magnitude.

    Quantizing the result again gives the same codes: an asymmetric scale is rounded down to float16, so that both end codes are taken.
    (Where -min / scale lies within float32's rounding of a tie, the upper one may not be.)

    Scales are float16: below its smallest normal number, 6.1e-5, they are too coarse for these promises, and groups whose scale would
    be below 6e-8 become 0; above its largest, 65504, weights are cut off.

    Args:
        weight: [O, I], finite; `group_size` divides I.

    Source: Nagel et al. 2021 (arXiv:2106.08295), section 2.2 for the asymmetric grid; llama.cpp's Q4_0 for the signed symmetric scale.
    """
    groups = to_groups(weight.float(), group_size)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        extreme = torch.where(-low >= high, low, high)
        scale = _nonzero(_half(extreme / -middle))
        zero = torch.full_like(scale, middle, dtype=torch.float32)
    else:
        scale = _nonzero(_round_down((high - low) / top))
        zero = (-low / scale.float() + 0.5).floor().clamp(0, top)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    return QuantizedTensor(
        codes=codes.to(torch.uint8).reshape(weight.shape), scale=scale, zero_point=None if symmetric else zero.to(torch.uint8),
        bits=bits, group_size=group_size,
    )  # fmt: skip


def _round_down(scale: Tensor) -> Tensor:
    """The largest float16 not above `scale`; a float32's own rounding error does not count."""
    half = _half(scale)
    lower = (half.view(torch.int16) - (half > 0).to(torch.int16)).view(torch.float16)
    return torch.where(half.float() > scale * (1 + 2**-20), lower, half)


def _half(scale: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return scale.clamp(-largest, largest).half()


def _nonzero(scale: Tensor) -> Tensor:
    """1 where a group is all zeros: any scale stands for it."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
