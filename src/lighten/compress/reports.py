"""What a recipe did to each weight: its zeros, its bits, and how far it is from the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lighten.compress.grid import Weight
from lighten.compress.stage import Original, Stage, origin_of
from lighten.model.low_rank import CORRECTION, DOWN, RANKS, UP
from lighten.model.spec import Embedding, Linear, ModelSpec


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What the recipe did to one weight: its zeros, and its error relative to the original, ‖W' - W‖ / ‖W‖ (Frobenius).

    Attributes:
        relative_error: None where it has another shape than the original.
        shape: where it is not the original's.
        bits: width of its codes; None: it has none.
        output_error: error of up to 256 of the layer's outputs on the calibration rows that chose, relative to them; None where no row was looked at.
        held_out_error: the same on rows that were kept apart.
        rows: calibration rows that the codes were chosen by; 0: none reached it. None: the step looks at none.
    """

    name: str
    sparsity: float
    relative_error: float | None
    bits: int | None
    output_error: float | None = None
    held_out_error: float | None = None
    rows: int | None = None
    shape: tuple[int, ...] | None = None


def reported(original: Original, before: ModelSpec, stage: Stage, spec: ModelSpec) -> Iterator[tuple[str, Weight, LayerReport | None]]:
    """Each tensor as the steps left it, in the type that its spec says, with a report of those that changed; one is held at a time.

    Args:
        before: the spec before all steps.
        stage: the tensors after all steps, described by `spec`.
    """
    transposed = {name for part in spec.parts if isinstance(part, Linear) and part.transposed for name in weights_of(part)}
    known = set(original.names)
    own = {name: origin_of(stage, name) for name in stage.names}
    dtypes = {name: part.weight.dtype for part in spec.parts if isinstance(part, Linear | Embedding) for name in weights_of(part)}
    of_pairs = _low_rank_reports(original, before, stage, spec)
    for name in stage.names:
        weight = stage[name]
        if isinstance(weight, Tensor) and stage.touched(name) and weight.is_floating_point():
            weight = weight.to(getattr(torch, dtypes.get(name, spec.dtype))) + 0.0  # of a zero the sign is lost where zeros are not stored
        if name in of_pairs:
            yield name, weight, of_pairs[name]()
        elif own[name] not in known or not stage.touched(name):
            yield name, weight, None
        else:
            was = original.checkpoint[own[name]]
            matrix = was.T if name in transposed and not isinstance(weight, Tensor) else was
            yield name, weight, _report(name, matrix, weight, stage.said(name))


def _report(name: str, original: Tensor, changed: Weight, said: Mapping[str, Any]) -> LayerReport:
    value = changed.float() if isinstance(changed, Tensor) else changed.dequantize()
    bits = None if isinstance(changed, Tensor) else changed.bits
    more: dict[str, Any] = {key: said.get(key) for key in ("output_error", "held_out_error", "rows")}
    sparsity = float((value == 0).float().mean())
    if value.shape != original.shape:
        return LayerReport(name=name, sparsity=sparsity, relative_error=None, bits=bits, shape=tuple(value.shape), **more)
    error = torch.linalg.vector_norm(value - original.float()) / torch.linalg.vector_norm(original.float()).clamp(min=1e-30)
    return LayerReport(name=name, sparsity=sparsity, relative_error=float(error), bits=bits, **more)


def _low_rank_reports(original: Original, before: ModelSpec, stage: Stage, spec: ModelSpec) -> dict[str, Callable[[], LayerReport | None]]:
    """Tensor → the report that goes with it: of the whole weight with the second factor or correction, none with the weight that is corrected."""
    known = {part.name: part for part in before.parts if isinstance(part, Linear)}
    found: dict[str, Callable[[], LayerReport | None]] = {}
    for word, pair in ((RANKS, (DOWN, UP)), (CORRECTION, ("lora_A", "lora_B"))):
        for module in spec.config.get(word, {}):
            second = f"{module}.{pair[1]}.weight"
            part = known.get(origin_of(stage, second, whole=True).removesuffix(".weight"))
            if part is not None and stage.touched(second):
                found |= {f"{module}.weight": lambda: None} if word == CORRECTION else {}
                found[second] = partial(_low_rank_report, original, stage, (module, part), pair)
    return found


def _low_rank_report(original: Original, stage: Stage, linear: tuple[str, Linear], pair: tuple[str, str]) -> LayerReport:
    """Of a weight before all steps, against its two factors and what stands beside them.

    Args:
        linear: its name now, and as it was before all steps.
        pair: what the two linears are called, the one that is given the input first.
    """
    module, part = linear
    first, second = (stage[f"{module}.{each}.weight"] for each in pair)
    value, held = _dense(second) @ _dense(first), second
    if (name := f"{module}.weight") in stage.names:
        held = stage[name]
        value = value + (_dense(held).T if part.transposed and isinstance(held, Tensor) else _dense(held))
    was = original.checkpoint[f"{part.name}.weight"]
    found = _report(name, was.T if part.transposed else was, value, stage.said(f"{module}.{pair[1]}.weight"))
    return replace(found, bits=None if isinstance(held, Tensor) else held.bits)


def _dense(weight: Weight) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize()


def weights_of(part: Any) -> list[str]:
    """Names of a part's matrices: one for each expert."""
    if isinstance(part, Linear):
        return [name for name, shape in part.tensors().items() if part.is_weight(shape)]
    return list(part.tensors())
