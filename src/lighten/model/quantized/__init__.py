"""Checkpoints of quantized weights: what a config's `quantization_config` says of each weight, and the tensors that stand for it."""

from __future__ import annotations

from lighten.model.quantized.methods import METHODS, quantized_parts
from lighten.model.quantized.packed import (
    FLOAT,
    FORMAT,
    INT,
    METHOD,
    MXFP4,
    NVFP4,
    STRATEGIES,
    TURNED,
    kind_of,
    packed_shapes,
    scheme,
    shares_codes,
    storage,
)
from lighten.model.quantized.stored import quantization_leftover, refuse_layouts, scale_names, stored_tensors, typed_tensors, with_stored_scales

__all__ = [
    "FLOAT", "FORMAT", "INT", "METHOD", "METHODS", "MXFP4", "NVFP4", "STRATEGIES", "TURNED", "kind_of", "packed_shapes", "quantization_leftover",
    "quantized_parts", "refuse_layouts", "scale_names", "scheme", "shares_codes", "storage", "stored_tensors", "typed_tensors", "with_stored_scales",
]  # fmt: skip
