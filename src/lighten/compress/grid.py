"""The one convention for quantized weights, for every method and every file.

    weight ≈ (code - zero_point) · scale,   code a whole number in [0, 2**bits - 1]

`zero_point` is a whole number, so a weight of exactly 0 is on the grid: pruned weights stay pruned. A symmetric grid has its zero point
at the middle code 2**(bits - 1); its scale may be negative, so that the weight of largest magnitude always takes code 0, the end of the
longer side (as GGML's Q4_0 and NNCF do).

Where the element is a float of 8 or 4 bits, the code is its bit pattern and there is no zero point:

    weight ≈ float(code) · scale / global_scale,   global_scale 1 but for nvfp4

Shape legend: O rows (output features), I columns (input features), G scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from lighten.model.spec import PER_CHANNEL, PER_TENSOR

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 of a 4-bit float stand for; bit 3 is the sign. Source: OCP Microscaling Formats (MX) v1.0, section 5.3.3."""


class Quantized(Protocol):
    """A weight in some format of codes."""

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    def dequantize(self) -> Tensor:
        """[O, I] float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """Codes and their grid.

    Attributes:
        codes: [O, I] uint8.
        scale: [O, G] in the type that it is stored in; [1, 1] where one scale serves the tensor. Where its type is uint8 (mxfp4) it is the
            exponent of a power of two, with a bias of 127.
        zero_point: [O, G] uint8, or None on a symmetric grid and for floats.
        bits: code width.
        group_size: columns of a scale, or `PER_CHANNEL`, `PER_TENSOR`.
        element: what a code is.
        global_scale: [1] float32 by which all scales are divided.
        input_scale: [1] the scale of static 8-bit activations that this weight is computed with.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    element: Literal["int", "e4m3", "e2m1"] = "int"
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """[O, I] float32."""
        groups = to_groups(self._values(), self.group_size)
        return (groups * self.scales()[..., None]).reshape(self.codes.shape)

    def scales(self) -> Tensor:
        """[O, G] float32, what a code is multiplied by."""
        scale = torch.exp2(self.scale.float() - 127) if self.scale.dtype == torch.uint8 else self.scale.float()
        return scale if self.global_scale is None else scale / self.global_scale

    def _values(self) -> Tensor:
        """[O, I] float32: the codes' values before the scale."""
        if self.element == "e4m3":
            return self.codes.view(torch.float8_e4m3fn).float()
        if self.element == "e2m1":
            both = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
            return both[self.codes.long()]
        middle = torch.tensor(2 ** (self.bits - 1), dtype=torch.float32)
        zero = middle if self.zero_point is None else self.zero_point.float()[..., None]
        return (to_groups(self.codes.float(), self.group_size) - zero).reshape(self.codes.shape)


Weight: TypeAlias = Tensor | Quantized
"""What a step leaves of a tensor."""


def to_groups(weight: Tensor, group_size: int) -> Tensor:
    """[O, I] → [O, G, columns of a group], or [1, 1, O·I] by tensor."""
    if group_size == PER_TENSOR:
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], -1, weight.shape[1] if group_size == PER_CHANNEL else group_size)
