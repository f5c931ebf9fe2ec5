"""The `compressed-tensors` layouts that lighten writes: the tensors that stand for one quantized weight, and the words for them in a config.

| format | codes | tensors beside the scales |
|---|---|---|
| pack-quantized | whole numbers of 1 to 8 bits | `weight_packed` int32 (codes without gaps, low bits first), `weight_shape`, `weight_zero_point` |
| int-quantized | int8 | `weight`, `weight_zero_point`, `input_scale` of static activations |
| float-quantized | float8_e4m3fn | `weight`, `input_scale` |
| nvfp4-pack-quantized | 4-bit floats, groups of 16 | `weight_packed` uint8 (two codes a byte, the lower half first), `weight_global_scale` |
| mxfp4-pack-quantized | 4-bit floats, groups of 32 | `weight_packed` uint8 |

Codes of 8 bits are stored as int8 where activations are quantized too, where the weight is an embedding's (a loader ties and reads its `weight`)
and where the grid is not symmetric: `transformers` 5.23 expects zero points that are not packed.

Source: the `compressed-tensors` package 0.20, compressors/{pack_quantized,naive_quantized,nvfp4,mxfp4}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from lighten.model.quantized.layouts import MxPackedLayout, NaiveLayout, Nvfp4Layout, PackedLayout
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Embedding, Layout, Linear, WeightFormat

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
TURNED = "transposed-"
"""Stands before a group's format where its weights are [out, in] codes of matrices that the model keeps as [in, out] (GPT-2's Conv1D).
`compressed-tensors` knows no such module and would leave it as it was drawn at random; a format that it does not know it refuses."""

STRATEGIES = {"tensor": PER_TENSOR, "channel": PER_CHANNEL}
STRATEGY_NAMES = {group_size: name for name, group_size in STRATEGIES.items()}
INT, FLOAT, NVFP4, MXFP4 = "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"

Shapes: TypeAlias = dict[str, tuple[tuple[int, ...], str]]
"""Tensor, without its module's name → (shape, element type)."""


def storage(part: Linear | Embedding) -> str:
    """The compressed-tensors format that a part's quantized weight is stored in, where its spec does not say a layout."""
    weight = part.weight
    if weight.element == "e4m3":
        return FLOAT
    if weight.element == "e2m1":
        return NVFP4 if weight.global_scale else MXFP4
    looked_up = isinstance(part, Embedding) or (part.tied_to is not None and part.component == "head")
    as_bytes = weight.activations or looked_up or (not weight.symmetric and weight.group_size != PER_TENSOR)
    return INT if weight.bits == 8 and as_bytes else FORMAT


def kind_of(part: Linear | Embedding) -> str | None:
    """The compressed-tensors format of a part's quantized weight; None: one that lighten does not read."""
    layout = part.weight.layout
    if layout is None:
        return storage(part)
    if isinstance(layout, PackedLayout):
        return FORMAT
    if isinstance(layout, NaiveLayout) and layout.own:
        return INT if layout.dtype == "int8" else FLOAT
    return None


def shares_codes(part: Linear | Embedding) -> bool:
    """Whether a head meets its embedding's codes under the name `weight`, and so needs their scales under its own name too."""
    return isinstance(part, Linear) and part.tied_to is not None and part.component == "head" and kind_of(part) in (INT, FLOAT)


def weight_tensors(kind: str, weight: WeightFormat, rows: int, columns: int) -> Shapes:
    """The tensors that stand for one quantized weight of rows × columns in a format, with their types."""
    found = layout_of(kind, weight).tensors(rows, columns, weight.scale_dtype)
    return {name.removeprefix("."): (shape, "float32" if name == ".input_scale" else dtype) for name, (shape, dtype) in found.items()}


def layout_of(kind: str, weight: WeightFormat) -> Layout:
    """The tensors of a weight in one of the formats above."""
    if kind == FORMAT:
        assert weight.bits is not None, "a weight that is not quantized has no packed form"
        return PackedLayout(bits=weight.bits, group_size=weight.group_size, symmetric=weight.symmetric)
    if kind == NVFP4:
        return Nvfp4Layout(inputs=False)
    if kind == MXFP4:
        return MxPackedLayout()
    strategy: Any = STRATEGY_NAMES.get(weight.group_size, "group")
    return NaiveLayout(
        dtype="int8" if kind == INT else "float8_e4m3fn", strategy=strategy, group_size=weight.group_size, zero_points=not weight.symmetric,
        static=weight.activations == "static", own=True,
    )  # fmt: skip


def packed_shapes(weight: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that stand for one quantized weight in pack-quantized."""
    return {name: shape for name, (shape, _) in weight_tensors(FORMAT, weight, rows, columns).items()}


def scheme(kind: str, weight: WeightFormat) -> dict[str, Any]:
    """What a config's group says of a weight: `weights`, `input_activations`, `output_activations` and `format`."""
    strategy = "tensor_group" if kind == NVFP4 else STRATEGY_NAMES.get(weight.group_size, "group")
    element = "int" if weight.element == "int" else "float"
    weights: dict[str, Any] = {"num_bits": weight.bits, "type": element, "symmetric": weight.symmetric, "strategy": strategy, "dynamic": False}
    if weight.group_size not in STRATEGY_NAMES:
        weights["group_size"] = weight.group_size
    if kind in (NVFP4, MXFP4):
        weights["scale_dtype"] = f"torch.{weight.scale_dtype}"
    inputs = None
    if weight.activations:
        dynamic = weight.activations == "dynamic"
        symmetric = not weight.activation_zero_points
        group = weight.activation_group_size
        strategy = "tensor" if not dynamic else "token" if group is None else "group"
        inputs = {"num_bits": 8, "type": element, "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}
        inputs |= {} if group is None else {"group_size": group}
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": kind}


def weight_format(kind: str, group: Mapping[str, Any], part: Linear | Embedding) -> WeightFormat:
    """The inverse of `scheme` for one part: without a layout where lighten itself would store it so.

    Raises:
        ValueError: fields that say nothing that is known.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    kind = kind.removeprefix(TURNED)
    if kind == "naive-quantized":
        kind = FLOAT if weights.get("type") == "float" else INT
    if kind in (NVFP4, MXFP4):
        return _float4_format(kind, weights, inputs)
    if kind == FORMAT:
        found = _packed_format(weights)
    elif kind in (INT, FLOAT):
        found = _byte_format(kind, weights, inputs)
    else:
        raise ValueError(f"format {kind!r} is not known; known: {', '.join((FORMAT, FLOAT, INT, 'naive-quantized', NVFP4, MXFP4))}")
    if found.layout is None and storage(replace(part, weight=found)) != kind:
        return replace(found, layout=layout_of(kind, found))
    return found


def _float4_format(kind: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> WeightFormat:
    group_size = 16 if kind == NVFP4 else 32
    scales = "float8_e4m3fn" if kind == NVFP4 else "uint8"
    found = WeightFormat(bits=4, group_size=group_size, element="e2m1", scale_dtype=scales, global_scale=kind == NVFP4)
    if inputs is None and (weights.get("group_size") or group_size) == group_size:
        return found
    return replace(found, layout=Nvfp4Layout(inputs=inputs is not None) if kind == NVFP4 else MxPackedLayout())


def _packed_format(weights: Mapping[str, Any]) -> WeightFormat:
    group_size = STRATEGIES.get(weights["strategy"], weights.get("group_size"))
    if not 1 <= weights["num_bits"] <= 8:
        raise ValueError(f"num_bits={weights['num_bits']}")
    return WeightFormat(bits=int(weights["num_bits"]), group_size=int(group_size or 0), symmetric=bool(weights["symmetric"]))


def _byte_format(kind: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> WeightFormat:
    strategy, element, bits = weights["strategy"], weights.get("type", "int"), _whole(weights, "num_bits")
    if strategy not in ("tensor", "channel", "group", "block") or element not in ("int", "float") or bits > 8 or (element == "float" and bits != 8):
        raise ValueError(f"{bits} bits of type {element} by {strategy}")
    block = _pair(weights.get("block_structure"), "block_structure") if strategy == "block" else (1, 1)
    group = _whole(weights, "group_size") if strategy == "group" else block[1] if strategy == "block" else STRATEGIES[strategy]
    if group < PER_CHANNEL or (strategy == "group" and group == 0):
        raise ValueError(f"group_size={group}")
    found = WeightFormat(
        bits=8, group_size=group, symmetric=bool(weights.get("symmetric", True)), element="int" if element == "int" else "e4m3",
        activations=None if inputs is None else "dynamic" if inputs.get("dynamic") else "static",
        activation_zero_points=inputs is not None and inputs.get("symmetric", True) is False,
        activation_group_size=_whole(inputs, "group_size") if inputs is not None and inputs.get("strategy") == "group" else None,
    )  # fmt: skip
    written = strategy != "block" and bits == 8 and (kind == INT) == (element == "int") and _is_written(inputs, str(element))
    if written and found.activations != "static":  # whose scales a layout counts
        return found
    layout = NaiveLayout(
        dtype="int8" if element == "int" else "float8_e4m3fn", strategy=strategy, group_size=group, block=block, zero_points=not found.symmetric,
        static=found.activations == "static", own=written,
    )  # fmt: skip
    return replace(found, layout=layout)


def _is_written(inputs: Mapping[str, Any] | None, element: str) -> bool:
    """Whether lighten writes and computes activations of this kind."""
    if inputs is None:
        return True
    dynamic = bool(inputs.get("dynamic"))
    known_strategy = inputs.get("strategy") in (("token", "group") if dynamic else ("tensor",))
    known_grid = inputs.get("symmetric", True) or (dynamic and element == "int")
    return bool(known_strategy and known_grid and inputs.get("num_bits") == 8 and inputs.get("type", "int") == element)


def _whole(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field}={value!r} is not a whole number")
    return value


def _pair(value: Any, field: str) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(each, int) and each > 0 for each in value):
        raise ValueError(f"{field}={value!r} is not a pair of positive whole numbers")
    return value[0], value[1]
