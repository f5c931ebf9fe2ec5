"""The one convention for quantized weights, for every method and every file.

    weight ≈ (code - zero_point) · scale,   code a whole number in [0, 2**bits - 1]

`zero_point` is a whole number, so a weight of exactly 0 is on the grid: pruned weights stay pruned. A symmetric grid has its zero point
at the middle code 2**(bits - 1); its scale may be negative, so that the weight of largest magnitude always takes code 0, the end of the
longer side (as GGML's Q4_0 and NNCF do).

Shape legend: O rows (output features), I columns (input features), G scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lighten.model.spec import PER_CHANNEL, PER_TENSOR


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """Codes and their grid.

    Attributes:
        codes: [O, I] uint8.
        scale: [O, G] in the type that it is stored in; [1, 1] where one scale serves the tensor.
        zero_point: [O, G] uint8, or None on a symmetric grid.
        bits: code width.
        group_size: columns of a scale, or `PER_CHANNEL`, `PER_TENSOR`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """[O, I] float32: (code - zero_point) · scale."""
        middle = torch.tensor(2 ** (self.bits - 1), dtype=torch.float32)
        zero = middle if self.zero_point is None else self.zero_point.float()[..., None]
        groups = to_groups(self.codes.float(), self.group_size)
        return ((groups - zero) * self.scale.float()[..., None]).reshape(self.codes.shape)


def to_groups(weight: Tensor, group_size: int) -> Tensor:
    """[O, I] → [O, G, columns of a group], or [1, 1, O·I] by tensor."""
    if group_size == PER_TENSOR:
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], -1, weight.shape[1] if group_size == PER_CHANNEL else group_size)
