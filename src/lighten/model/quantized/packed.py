"""The `compressed-tensors` layout, format pack-quantized: the one that lighten writes.

A quantized linear or embedding `name` is stored as `name.weight_packed` (int32, `32` codes in `bits` words, low bits first), `name.weight_scale`,
`name.weight_zero_point` where the grid is not symmetric, and `name.weight_shape`.
Source: the `compressed-tensors` package, compressors/pack_quantized.
"""

from __future__ import annotations

import math

from lighten.model.spec import PER_CHANNEL, PER_TENSOR, WeightFormat

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
STRATEGIES = {"tensor": PER_TENSOR, "channel": PER_CHANNEL}


def packed_shapes(weight: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that stand for one quantized weight."""
    bits = weight.bits
    assert bits is not None, "a weight that is not quantized has no packed form"
    groups = 1 if weight.group_size == PER_TENSOR else weight.scales(rows, columns) // rows
    scales: tuple[int, ...] = (1,) if weight.group_size == PER_TENSOR else (rows, groups)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (rows, math.ceil(columns * bits / 32)), "weight_scale": scales, "weight_shape": (2,),
    }  # fmt: skip
    if not weight.symmetric:
        shapes["weight_zero_point"] = scales if weight.group_size == PER_TENSOR else (math.ceil(rows * bits / 32), groups)
    return shapes
