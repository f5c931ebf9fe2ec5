"""What a training step keeps of each parameter, by part, in the ways of mixing 16 and 32 bits that people call mixed precision.

n values, m of them in weights and biases of linears and convolutions; e bytes of an element of `dtype`, g of a gradient's;
s(type) bytes of the optimizer's state of that type

            weights   gradients   master    optimizer   casts
pure        n·e       n·g         0         s(dtype)    0        all in one type
autocast    n·4       n·4         0         s(float32)  m·e      torch.autocast: parameters are float32, each operator casts
master      n·e       n·g         n·4       s(float32)  0        Megatron-LM, DeepSpeed: a float32 copy that the optimizer updates
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from lighten.cost.optimizer_state import Shape, state_bytes
from lighten.errors import WorkloadError
from lighten.model.spec import Conv, Linear, ModelSpec
from lighten.units import DTYPE_BITS, dtype_bytes

Precision = Literal["pure", "autocast", "master"]
PRECISIONS = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class ParameterBytes:
    """Bytes that stay through a training step, by part.

    Attributes:
        weights: the parameters that the forward pass reads.
        gradients: one of each parameter.
        master: float32 copies that the optimizer updates.
        optimizer: its state.
    """

    weights: int
    gradients: int
    master: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def parameter_bytes(
    precision: Precision, optimizer: str, shapes: Iterable[Shape], dtype: str, *, others: Iterable[Shape] = (), gradient_dtype: str | None = None
) -> ParameterBytes:
    """Bytes of parameters, gradients and optimizer state; those of autocast's copies are `cast_bytes`.

    Args:
        shapes, others: of all trained tensors, as `state_bytes` takes them.
        dtype: the type of the forward pass: bfloat16 or float16 for autocast and master.
        gradient_dtype: of pure and master; None: `dtype`. Megatron-LM adds bfloat16's up in float32.

    Source: Rajbhandari et al. 2019 (arXiv:1910.02054), section 3.1: 2 + 2 + 12 bytes a parameter with Adam and float16;
    `BF16_Optimizer` of DeepSpeed; `--accumulate-allreduce-grads-in-fp32` of Megatron-LM: 2 + 4 + 12.

    Raises:
        WorkloadError: the precision or optimizer is not known, or the type is no narrower than float32 where that is the point.

    >>> parameter_bytes("master", "adamw", [(1000, 1000)], "float16").total / 1000**2  # and 4 bytes of a step count
    16.000004
    """
    if precision not in PRECISIONS:
        raise WorkloadError(f"precision {precision!r} is not known; known: {', '.join(PRECISIONS)}.")
    if precision != "pure" and DTYPE_BITS[dtype] >= 32:
        raise WorkloadError(f"precision {precision} has no effect with dtype={dtype}, which is no narrower than float32; use bfloat16 or float16.")
    if precision == "autocast" and gradient_dtype not in (None, "float32"):
        raise WorkloadError(f"gradient_dtype={gradient_dtype} cannot be with precision autocast: gradients of float32 parameters are float32.")
    mine, rest = list(shapes), list(others)
    count = sum(math.prod(shape) for shape in (*mine, *rest))
    held = "float32" if precision == "autocast" else dtype
    kept = dtype if precision == "pure" else "float32"
    return ParameterBytes(
        weights=round(count * dtype_bytes(held)),
        gradients=round(count * dtype_bytes(gradient_dtype or held)),
        master=round(count * dtype_bytes("float32")) if precision == "master" else 0,
        optimizer=state_bytes(optimizer, mine, kept, others=rest),
    )


def cast_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the low-precision copies that autocast makes of float32 weights and keeps until its region ends, or backward has used them.

    Weights and biases of linears and convolutions, a tied head's too; not norms and embeddings.

    Source: `cached_cast` of aten/src/ATen/autocast_mode.cpp, checked in tests/test_precision.py.
    """
    count = 0
    for part in spec.parts:
        if isinstance(part, Linear | Conv):
            count += part.parameters
        if isinstance(part, Linear) and part.tied_to is not None and part.component == "head":
            count += part.out_features * part.in_features
    return round(count * dtype_bytes(dtype))
