"""Checkpoints whose weights are stored as packed codes: the `compressed-tensors` layout, format pack-quantized.

A quantized linear or embedding `name` is stored as `name.weight_packed` (int32, `32` codes in `bits` words, low bits first), `name.weight_scale`,
`name.weight_zero_point` where the grid is not symmetric, and `name.weight_shape`.
Source: the `compressed-tensors` package, compressors/pack_quantized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lighten.errors import ModelError
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Embedding, Linear, Part, WeightFormat

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
STRATEGIES = {"tensor": PER_TENSOR, "channel": PER_CHANNEL}


def quantized_parts(parts: tuple[Part, ...], quantization: Mapping[str, Any], source: str) -> tuple[Part, ...]:
    """The parts with the weight formats that a config's `quantization_config` states.

    Raises:
        ModelError: another method or format, or fields that cannot be read.
    """
    if not isinstance(quantization, Mapping):
        raise ModelError(f"{source}: its quantization_config is not a table.")
    if quantization.get("quant_method") != METHOD or quantization.get("format") != FORMAT:
        found = f"{quantization.get('quant_method')} / {quantization.get('format')}"
        raise ModelError(f"{source}: weights quantized as {found} cannot be read; {METHOD} / {FORMAT} can.")
    try:
        groups = [(_targets(group["targets"]), _format(group["weights"])) for group in quantization["config_groups"].values()]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, re.error) as error:
        raise ModelError(f"{source}: its quantization_config cannot be read ({type(error).__name__}: {error}).") from error

    def changed(part: Part) -> Part:
        for targets, weight in groups:
            if isinstance(part, Linear | Embedding) and _matches(part, targets):
                return replace(part, weight=weight)
        return part

    return tuple(changed(part) for part in parts)


def stored_tensors(part: Part) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint holds for a part, packed where its weight is quantized."""
    tensors = part.tensors()
    weight = f"{part.name}.weight"
    if not isinstance(part, Linear | Embedding) or part.weight.bits is None or weight not in tensors:
        return tensors
    rows, columns = tensors.pop(weight)
    return tensors | {f"{part.name}.{name}": shape for name, shape in packed_shapes(part.weight, rows, columns).items()}


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


def _targets(targets: Any) -> set[str]:
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError("targets is not a list of names")
    for target in targets:
        if target.startswith("re:"):
            re.compile(target[3:])
    return set(targets)


def _format(weights: Mapping[str, Any]) -> WeightFormat:
    group_size = STRATEGIES.get(weights["strategy"], weights.get("group_size"))
    if not 1 <= weights["num_bits"] <= 8:
        raise ValueError(f"num_bits={weights['num_bits']}")
    return WeightFormat(bits=int(weights["num_bits"]), group_size=int(group_size or 0), symmetric=bool(weights["symmetric"]))


def _matches(part: Linear | Embedding, targets: set[str]) -> bool:
    names = {part.name, type(part).__name__}
    if isinstance(part, Linear) and part.tied_to:
        names = {part.tied_to}
    return bool(names & targets) or any(re.match(t[3:], part.name) for t in targets if t.startswith("re:"))
