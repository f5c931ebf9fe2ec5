"""Activations of 8 bits, simulated in a float module: each input of a linear is rounded to its grid before the product.

The arithmetic is that of the `compressed-tensors` package at run time, so that both give the same logits:

    scale = largest magnitude / 127.5 (int8) or / 448 (fp8),   x ≈ round(x / scale) · scale

"dynamic" takes the scale of each token from the token itself (of each input of two dimensions, such as a pooler's, from all of it);
"static" has one for all, from calibration.

Source: the `compressed-tensors` package 0.20, quantization/lifecycle/forward.py and quantization/utils/helpers.py.

Shape legend: B batch_size, S length, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import UnsupportedFamily
from lighten.model.spec import Linear, ModelSpec

RANGES = {"int": (-128.0, 127.0), "e4m3": (-448.0, 448.0)}
"""Smallest and largest code. Source: Micikevicius et al. 2022 (arXiv:2209.05433), table 1, for e4m3."""


def dynamic_scale(x: Tensor, *, element: str) -> Tensor:
    """[B, S, 1], the scale of each token of [B, S, I]; one scale where x has fewer dimensions."""
    low, high = RANGES[element]
    kept = tuple(range(2, x.ndim))
    largest = x.abs().amax(dim=kept, keepdim=True) if kept else x.abs().amax().reshape(1)
    scale = largest / ((high - low) / 2)
    return torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)


def fake_quantize(x: Tensor, scale: Tensor, *, element: str) -> Tensor:
    """x on the grid of 8-bit codes times `scale`."""
    low, high = RANGES[element]
    scaled = (x / scale).clamp(low, high)
    rounded = scaled.round() if element == "int" else scaled.to(torch.float8_e4m3fn).to(x.dtype)
    return rounded.to(scale.dtype) * scale


def simulate_activations(module: nn.Module, spec: ModelSpec, input_scales: Mapping[str, Tensor]) -> None:
    """Make the linears of a module round their inputs where the spec says that activations are quantized.

    Args:
        input_scales: of static activations, [1] by the checkpoint's name of the linear.

    Raises:
        UnsupportedFamily: weights that share a parameter with others (fused experts), whose inputs cannot be told apart.
    """
    for name, part in _quantized_inputs(module, spec).items():
        linear = module.get_submodule(name)
        static = input_scales[part.name] if part.weight.activations == "static" else None
        linear.register_forward_pre_hook(partial(_round_input, element=part.weight.element, static=static))


def _quantized_inputs(module: nn.Module, spec: ModelSpec) -> dict[str, Linear]:
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


def _round_input(linear: nn.Module, inputs: tuple[Any, ...], *, element: str, static: Tensor | None) -> tuple[Any, ...]:
    x: Tensor = inputs[0]
    scale = dynamic_scale(x, element=element) if static is None else static.to(x.dtype)
    return (fake_quantize(x, scale, element=element), *inputs[1:])
