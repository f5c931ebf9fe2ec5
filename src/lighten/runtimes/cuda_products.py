"""Products that a CUDA device has instructions for: fp8 codes on both sides, and weights that are left with two of four neighbours.

    y = s_x s_W (x / s_x)₈ (W / s_W)₈ᵀ + b,   ( )₈ the nearest e4m3, s_x by token or static, s_W by row

is what `simulate_activations` does in floats, in one product of codes.

Source: https://docs.pytorch.org/docs/stable/sparse.html#sparse-semi-structured-tensors, which needs 8.0 of compute capability; fp8's instructions
came with 8.9 (CUDA C++ Programming Guide, "Compute Capabilities").

Shape legend: B batch_size, S length, M tokens (B·S), I columns, O rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.compress.fake_quant import RANGES, dynamic_scale, quantized_inputs
from lighten.compress.grid import QuantizedTensor
from lighten.formats.safetensors_folder import StoredWeights
from lighten.formats.torch_model import input_scales
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Linear, ModelSpec

FP8_CAPABILITY, SPARSE_CAPABILITY = (8, 9), (8, 0)
FP8_TILE = 16
"""O and I are multiples of it in a product of fp8."""
SPARSE_TILE = (32, 64)
"""O and I are multiples of these in a product of 2:4 weights, by both libraries that torch has for it."""


class Float8Linear(nn.Module):
    """A linear whose inputs and weights are multiplied as codes of e4m3, accumulated in float32.

    Args:
        weight: [O, I] of e4m3 by row or by tensor.
        bias: [O].
        input_scale: [1] of static activations; None: of each token its own.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, input_scale: Tensor | None) -> None:
        super().__init__()
        rows = len(weight.codes)
        self.register_buffer("codes", weight.codes.view(torch.float8_e4m3fn))
        self.register_buffer("scale", weight.scales().expand(rows, 1).T.contiguous())
        self.register_buffer("input_scale", input_scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O] in the type of x."""
        scale = dynamic_scale(x, element="e4m3") if self.input_scale is None else self.input_scale.to(x.dtype)
        codes = (x / scale).clamp(*RANGES["e4m3"]).to(torch.float8_e4m3fn).flatten(0, -2)  # [M, I]
        by_token = scale.float().expand(*x.shape[:-1], 1).reshape(-1, 1).contiguous()  # [M, 1]
        y: Tensor = torch._scaled_mm(codes, self.codes.T, scale_a=by_token, scale_b=self.scale, out_dtype=torch.bfloat16)
        y = y.to(x.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def put_cuda_products(module: nn.Module, folder: Path, spec: ModelSpec) -> tuple[str, ...]:
    """Exchange what the device of a module has instructions for; what it has none for, or what has another shape, stays expanded.

    Returns:
        What was put in: "fp8", "2:4".
    """
    capability = torch.cuda.get_device_capability(next(module.parameters()).device)
    put = []
    if capability >= FP8_CAPABILITY and put_fp8(module, folder, spec):
        put.append("fp8")
    if capability >= SPARSE_CAPABILITY and _put_sparse(module):
        put.append("2:4")
    return tuple(put)


def put_fp8(module: nn.Module, folder: Path, spec: ModelSpec) -> int:
    """Exchange the linears whose weights and inputs are e4m3; how many."""
    static, stored, count = input_scales(folder, spec), StoredWeights(folder, spec), 0
    for name, part in quantized_inputs(module, spec).items():
        linear = module.get_submodule(name)
        if not (_is_fp8(part) and isinstance(linear, nn.Linear)):
            continue
        weight = stored[f"{part.name}.weight"]
        assert isinstance(weight, QuantizedTensor), "of e4m3"
        bias = None if linear.bias is None else linear.bias.detach()
        parent, _, own = name.rpartition(".")
        put = Float8Linear(weight, bias, static.get(part.name)).to(linear.weight.device)
        setattr(module.get_submodule(parent), own, put)
        count += 1
    return count


def _is_fp8(part: Linear) -> bool:
    weight = part.weight
    by_row = weight.group_size in (PER_CHANNEL, PER_TENSOR) and weight.activation_group_size is None and not weight.global_scale
    return weight.element == "e4m3" and by_row and not part.transposed and not (part.out_features % FP8_TILE or part.in_features % FP8_TILE)


def _put_sparse(module: nn.Module) -> int:
    """Exchange the weights that are left with two of four neighbours; how many."""
    found = [linear for linear in module.modules() if isinstance(linear, nn.Linear) and multiplies_sparse(linear.weight)]
    for linear in found:
        compressed: Any = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        linear.weight = nn.Parameter(compressed, requires_grad=False)
    return len(found)


def multiplies_sparse(weight: Tensor) -> bool:
    """Whether a weight [O, I] has zeros, shape and type that a device multiplies as 2:4."""
    rows, columns = weight.shape
    if weight.dtype not in (torch.float16, torch.bfloat16) or rows % SPARSE_TILE[0] or columns % SPARSE_TILE[1]:
        return False
    return bool(((weight.reshape(rows, -1, 4) != 0).sum(-1) <= 2).all())
