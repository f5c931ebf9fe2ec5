"""Activations of 8 bits, simulated in a float module: each input of a linear is rounded to its grid before the product.

The arithmetic is that of the `compressed-tensors` package at run time, so that both give the same logits:

    symmetric:      scale = largest magnitude / 127.5 (int8) or / 448 (fp8),   x ≈ round(x / scale) · scale
    zero points z:  scale = (largest - smallest) / 255, z = round(-128 - smallest / scale),   x ≈ (round(x / scale + z) - z) · scale

"dynamic" takes the grid of each token from the token itself (of each input of two dimensions, such as a pooler's, from all of it), or that of each
group of a token's columns;
"static" has one scale for all, from calibration.

Under autograd a rounded value has the gradient of the value itself (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).

Source: the `compressed-tensors` package 0.20, quantization/lifecycle/forward.py and quantization/utils/helpers.py.

Shape legend: B batch_size, S length, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lighten.errors import UnsupportedFamily
from lighten.model.spec import Linear, ModelSpec, WeightFormat

RANGES = {"int": (-128.0, 127.0), "e4m3": (-448.0, 448.0)}
"""Smallest and largest code. Source: Micikevicius et al. 2022 (arXiv:2209.05433), table 1, for e4m3."""

STATIC_LARGEST = {"int": 127, "e4m3": 448}
"""The code that the largest magnitude of static activations is given. Source: Nagel et al. 2021 (arXiv:2106.08295), section 2.2, for int8;
Micikevicius et al. 2022, table 1, for e4m3."""


def dynamic_scale(x: Tensor, *, element: str) -> Tensor:
    """[B, S, 1], the scale of each token of [B, S, I]; one scale where x has fewer dimensions."""
    low, high = RANGES[element]
    kept = tuple(range(2, x.ndim))
    largest = x.abs().amax(dim=kept, keepdim=True) if kept else x.abs().amax().reshape(1)
    scale = largest / ((high - low) / 2)
    return torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)


def dynamic_grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, 1] the scale and the int8 zero point of each token of [B, S, I], of which 0 is always a value; one of each where x has fewer
    dimensions."""
    low, high = RANGES["int"]
    kept = tuple(range(2, x.ndim))
    smallest, largest = (x.amin(kept, keepdim=True), x.amax(kept, keepdim=True)) if kept else (x.min().reshape(1), x.max().reshape(1))
    smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
    scale = (largest - smallest) / (high - low)
    scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)
    return scale, (low - smallest / scale).clamp(low, high).round()


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, element: str) -> Tensor:
    """x on the grid of 8-bit codes, less their zero point, times `scale`."""
    low, high = RANGES[element]
    scaled = x / scale if zero_point is None else x / scale + zero_point
    inside = scaled.clamp(low, high)
    rounded = inside.round() if element == "int" else inside.to(torch.float8_e4m3fn).to(x.dtype)
    if torch.is_grad_enabled() and scaled.requires_grad:
        rounded = scaled + (rounded - scaled).detach()
    return (rounded if zero_point is None else rounded - zero_point).to(scale.dtype) * scale


def simulate_activations(module: nn.Module, spec: ModelSpec, input_scales: Mapping[str, Tensor]) -> None:
    """Make the linears of a module round their inputs where the spec says that activations are quantized.

    Args:
        input_scales: of static activations, [1] by the checkpoint's name of the linear.

    Raises:
        UnsupportedFamily: weights that share a parameter with others (fused experts), whose inputs cannot be told apart.
    """
    _hook(module, spec, input_scales)


@contextmanager
def simulating(module: nn.Module, spec: ModelSpec, input_scales: Mapping[str, Tensor]) -> Iterator[None]:
    """The same while this lasts."""
    handles = _hook(module, spec, input_scales)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, spec: ModelSpec, input_scales: Mapping[str, Tensor]) -> list[RemovableHandle]:
    handles = []
    for name, part in quantized_inputs(module, spec).items():
        static = input_scales[part.name] if part.weight.activations == "static" else None
        round_input = partial(_round_input, weight=part.weight, static=static)
        handles.append(module.get_submodule(name).register_forward_pre_hook(round_input))
    return handles


def quantized_inputs(module: nn.Module, spec: ModelSpec) -> dict[str, Linear]:
    """The module's own name of each linear whose inputs are quantized."""
    from lighten.compress.skeleton import find_places

    parts = {part.name: part for part in spec.parts if isinstance(part, Linear) and part.weight.activations}
    if not parts:
        return {}
    shapes = {name: shape for part in parts.values() for name, shape in part.tensors().items() if name.endswith(".weight")}
    places = find_places(module, shapes)
    found: dict[str, Linear] = {}
    for name, part in parts.items():
        place = places.get(f"{name}.weight")
        if place is None and part.component not in ("head", "pooler"):  # an encoder's body is loaded without them
            raise UnsupportedFamily(f"{name}: its inputs cannot be quantized here; {type(module).__name__} has no linear of its own for it.")
        if place is not None and place.region is not None:
            raise UnsupportedFamily(f"{name}: its inputs cannot be quantized here; {type(module).__name__} keeps it in one tensor with others.")
        if place is not None:
            found[place.key.removesuffix(".weight")] = part
    return found


def _round_input(linear: nn.Module, inputs: tuple[Any, ...], *, weight: WeightFormat, static: Tensor | None) -> tuple[Any, ...]:
    x: Tensor = inputs[0]
    if static is not None:
        return (fake_quantize(x, static.to(x), element=weight.element), *inputs[1:])
    rounded = round_dynamic(x, element=weight.element, zero_points=weight.activation_zero_points, group_size=weight.activation_group_size)
    return (rounded, *inputs[1:])


def round_dynamic(x: Tensor, *, element: str, zero_points: bool, group_size: int | None = None) -> Tensor:
    """x rounded on a grid of its own for each token, or for each `group_size` columns of one; the grid counts as a constant to gradients."""
    if group_size is not None:
        return round_dynamic(x.reshape(-1, x.shape[-1] // group_size, group_size), element=element, zero_points=zero_points).reshape(x.shape)
    if zero_points:
        return fake_quantize(x, *dynamic_grid(x.detach()), element=element)
    return fake_quantize(x, dynamic_scale(x.detach(), element=element), element=element)
