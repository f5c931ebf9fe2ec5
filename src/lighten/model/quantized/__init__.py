"""Checkpoints of quantized weights: what a config's `quantization_config` says of each weight, and the tensors that stand for it."""

from __future__ import annotations

from lighten.model.quantized.methods import METHODS, quantized_parts
from lighten.model.quantized.packed import FORMAT, METHOD, STRATEGIES, packed_shapes
from lighten.model.quantized.stored import quantization_leftover, refuse_layouts, scale_names, stored_tensors, with_stored_scales

__all__ = [
    "FORMAT", "METHOD", "METHODS", "STRATEGIES", "packed_shapes", "quantization_leftover", "quantized_parts", "refuse_layouts", "scale_names",
    "stored_tensors", "with_stored_scales",
]  # fmt: skip
