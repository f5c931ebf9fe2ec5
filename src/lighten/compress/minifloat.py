"""Floats of 8 and 4 bits as weights: fp8 (e4m3), mxfp4 and nvfp4 (both e2m1), encoded by rounding to the nearest, ties to the even code.

    fp8     one scale a row, group or tensor, of the format's `scale_dtype`
    mxfp4   32 columns share a power of two, stored as its exponent with a bias of 127
    nvfp4   16 columns share an e4m3 scale; all scales are divided by one float32, chosen so that the largest scale is e4m3's largest number

Source: Micikevicius et al. 2022 (arXiv:2209.05433), table 1, for e4m3; OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6, for e2m1 and
the power of two; compressed-tensors 0.15 for how the global scale of nvfp4 is meant and stored (held against it in tests/test_solvers.py).

Shape legend: O rows, I columns, G scales of a row.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lighten.compress.grid import E2M1_VALUES, QuantizedTensor, to_groups
from lighten.model.spec import WeightFormat

LARGEST = {"e4m3": 448.0, "e2m1": 6.0}
"""The largest number of an element. Source: the standards above."""

_CHUNK = 1 << 18  # elements searched at once: some copies of so many are made

_SHRINKS = (0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of the range that fp8's and nvfp4's scales are tried at; choice: the best of nvfp4 lies between .7 and 1 for normal weights."""


def round_to(element: str, x: Tensor) -> Tensor:
    """The nearest number of the element, ties to the even code; beyond its largest, that one. Float32 in and out."""
    top = LARGEST[element]
    x = x.clamp(-top, top)
    if element == "e4m3":
        return x.to(torch.float8_e4m3fn).float()
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return (x / step).round() * step


def round_array(element: str, x: npt.NDArray[np.float32]) -> None:
    """`round_to` in place. Adding and taking away a number whose last bit is worth the element's last bit leaves the nearest one."""
    mantissa_bits, least_normal = (3, 2.0**-6) if element == "e4m3" else (1, 1.0)
    power = (x.view(np.int32) & 0x7F800000).view(np.float32)  # 2**floor(log2(|x|))
    np.maximum(power, np.float32(least_normal), out=power)
    power *= np.float32(1.5 * 2 ** (23 - mantissa_bits))
    x += power
    x -= power
    np.minimum(x, np.float32(LARGEST[element]), out=x)
    np.maximum(x, np.float32(-LARGEST[element]), out=x)


def encode(element: str, values: Tensor) -> Tensor:
    """Bit patterns (uint8) of numbers that the element has; zero has no sign."""
    values = values + 0.0
    if element == "e4m3":
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    doubled = (values * 2).abs()  # 0, 1, 2, 3, 4, 6, 8 and 12 are the codes 0 to 7
    magnitude = torch.where(doubled <= 4, doubled, torch.where(doubled < 12, doubled / 2 + 2, 7.0))
    return (magnitude + 8 * (values < 0)).to(torch.uint8)


def decode(element: str, codes: Tensor) -> Tensor:
    """Float32 numbers of bit patterns."""
    if element == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    return torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])[codes.long()]


def nvfp4_global_scale(weights: Iterable[Tensor]) -> Tensor:
    """[1] float32: what nvfp4's scales are multiplied by before they become e4m3, so that the largest of them is e4m3's largest number.

    Args:
        weights: those that a runtime joins to one matrix, such as q, k and v, share one.
    """
    largest = max(float(weight.abs().max()) for weight in weights)
    share = LARGEST["e4m3"] * LARGEST["e2m1"] / largest if largest else float("inf")
    return torch.tensor([share if share < torch.finfo(torch.float32).max else 1.0])


def store_scale(scale: Tensor, format: WeightFormat, global_scale: Tensor | None) -> Tensor:
    """[O, G] what stands in the file for a float32 scale: the nearest number of the format's `scale_dtype` that is not 0.

    A power of two is rounded up or down to the nearest exponent, by the logarithm.
    """
    if format.scale_dtype == "uint8":
        return (torch.log2(scale.clamp(min=2.0**-127)).round() + 127).clamp(0, 254).to(torch.uint8)
    dtype: torch.dtype = getattr(torch, format.scale_dtype)
    largest, smallest = torch.finfo(dtype).max, 2.0**-9 if dtype == torch.float8_e4m3fn else torch.finfo(dtype).tiny
    scale = scale if global_scale is None else scale * global_scale
    return torch.where(scale == 0, 1.0, scale.clamp(smallest, largest)).to(dtype)


def quantize_float(weight: Tensor, *, format: WeightFormat, importance: Tensor | None = None, global_scale: Tensor | None = None) -> QuantizedTensor:
    """Each weight goes to the nearest number of the element times its group's scale.

    Without `importance` the scale is what maps the group's largest magnitude to the element's largest number; for mxfp4 the exponent is
    the one that OCP MX prescribes, floor(log2(largest)) - 2, after the largest is rounded to e2m1's precision, as compressed-tensors does.
    With it, the scale of least weighted squared error among `_SHRINKS` of that one, or among the three nearest exponents.

    Args:
        weight: [O, I], finite; the format's group divides I.
        importance: [I], the weight of each column's squared error.
        global_scale: nvfp4's; this weight's own by default.
    """
    groups = to_groups(weight.float(), format.group_size)
    if format.global_scale and global_scale is None:
        global_scale = nvfp4_global_scale([weight])
    scale = _plain_scale(groups.abs().amax(-1), format, global_scale)
    weights = None if importance is None else to_groups(importance.float().expand(weight.shape), format.group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    rows = max(1, _CHUNK // groups[0].numel())
    for start in range(0, len(groups), rows):
        chosen = slice(start, start + rows)
        if weights is not None:
            scale[chosen] = _search(groups[chosen], weights[chosen], scale[chosen], format, global_scale)
        level = groups[chosen] / _decoded(scale[chosen], global_scale)[..., None]
        round_array(format.element, level.numpy())
        codes[chosen] = encode(format.element, level)
    return QuantizedTensor(
        codes=codes.reshape(weight.shape), scale=scale, zero_point=None, bits=8 if format.element == "e4m3" else 4, group_size=format.group_size,
        element=format.element, global_scale=global_scale,
    )  # fmt: skip


def _plain_scale(largest: Tensor, format: WeightFormat, global_scale: Tensor | None) -> Tensor:
    if format.scale_dtype != "uint8":
        return store_scale(largest / LARGEST[format.element], format, global_scale)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa · 2**exponent, mantissa in [1/2, 1)
    exponent = exponent - 1 + (mantissa >= 0.875).int()  # e2m1 has one bit of mantissa: from 7/4 on, the largest rounds to the next power
    return torch.where(largest == 0, 127, exponent - 2 + 127).clamp(0, 254).to(torch.uint8)


def _search(groups: Tensor, importance: Tensor, plain: Tensor, format: WeightFormat, global_scale: Tensor | None) -> Tensor:
    """The candidate of least error, `plain` where several are."""
    candidates = [plain]
    if format.scale_dtype == "uint8":
        candidates += [(plain.int() + step).clamp(0, 254).to(torch.uint8) for step in (-1, 1)]
    else:
        largest = groups.abs().amax(-1) / LARGEST[format.element]
        candidates += [store_scale(largest * share, format, global_scale) for share in _SHRINKS]
    errors = torch.stack([_error(groups, importance, _decoded(candidate, global_scale), format.element) for candidate in candidates])
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[plain.element_size()]  # torch gathers no floats of 8 bits
    return torch.stack([candidate.view(raw) for candidate in candidates]).gather(0, errors.argmin(0, keepdim=True))[0].view(plain.dtype)


def _error(groups: Tensor, importance: Tensor, scale: Tensor, element: str) -> Tensor:
    level = groups / scale[..., None]
    rounded = level.clone()
    round_array(element, rounded.numpy())
    return rounded.sub_(level).square_().mul_(importance).sum(-1) * scale.square()


def _decoded(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    value = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    return value if global_scale is None else value / global_scale
