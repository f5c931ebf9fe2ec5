"""A recipe's second reading: walk a checkpoint tensor by tensor and do each step on its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lighten.compress.checkpoint import Checkpoint as Checkpoint
from lighten.compress.checkpoint import check_finite as check_finite
from lighten.compress.grid import QuantizedTensor
from lighten.compress.magnitude import global_threshold, prune_pattern, prune_rows, prune_tensor, prune_threshold
from lighten.compress.rtn import quantize_rtn
from lighten.model.quantized import refuse_layouts
from lighten.model.spec import ModelSpec
from lighten.recipe import Recipe, Step
from lighten.recipe.steps import group_columns, parse_pattern, selected_names

Weight: TypeAlias = Tensor | QuantizedTensor
Change: TypeAlias = Callable[[Tensor], Weight]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What the recipe did to one weight: its zeros, and its error relative to the original, ‖W' - W‖ / ‖W‖ (Frobenius)."""

    name: str
    sparsity: float
    relative_error: float
    bits: int | None


def compress_weights(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> Iterator[tuple[str, Weight, LayerReport | None]]:
    """Each tensor of the checkpoint as the recipe leaves it, with a report of those that it changed; one is held at a time.

    Raises:
        ModelError: its weights are another method's codes.
        RecipeError: a step that is predicted alone.
    """
    recipe.require_done()
    refuse_layouts(spec.parts, spec.source)
    changes: list[tuple[frozenset[str], Change]] = []
    for step in recipe.steps:
        before = tuple(changes)
        names = _changed_tensors(spec, step)
        weights = partial(_selected, checkpoint, names, before)
        changes.append((names, METHODS[step.verb, step.method](step, weights)))
        spec = step.kind.predict(spec, dict(step.arguments))
    for name in checkpoint.names:
        original = checkpoint[name]
        changed = _through(name, original, changes)
        yield name, changed, None if changed is original else _report(name, original, changed)


def _selected(checkpoint: Checkpoint, names: frozenset[str], changes: tuple[tuple[frozenset[str], Change], ...]) -> Iterator[Tensor]:
    for name in sorted(names):
        weight = _through(name, checkpoint[name], changes)
        assert isinstance(weight, Tensor), "the reading on the spec refuses a step after quantize"
        yield weight


def _through(name: str, weight: Weight, changes: list[tuple[frozenset[str], Change]] | tuple[tuple[frozenset[str], Change], ...]) -> Weight:
    for names, change in changes:
        if name in names:
            assert isinstance(weight, Tensor), "the reading on the spec refuses a step after quantize"
            weight = change(weight)
    return weight


def _report(name: str, original: Tensor, changed: Weight) -> LayerReport:
    value = changed.dequantize() if isinstance(changed, QuantizedTensor) else changed.float()
    error = torch.linalg.vector_norm(value - original.float()) / torch.linalg.vector_norm(original.float()).clamp(min=1e-30)
    bits = changed.bits if isinstance(changed, QuantizedTensor) else None
    return LayerReport(name=name, sparsity=float((value == 0).float().mean()), relative_error=float(error), bits=bits)


def _changed_tensors(spec: ModelSpec, step: Step) -> frozenset[str]:
    """Names of the tensors that a step changes: all of them for a cast, else the selected modules' weights."""
    if step.verb == "cast":
        return frozenset(name for part in spec.parts for name in part.tensors())
    return frozenset(f"{name}.weight" for name in selected_names(spec, dict(step.arguments)))


# the methods: (step, the weights that it changes) → what it does to one weight


def _cast(step: Step, weights: Callable[[], Iterator[Tensor]]) -> Change:
    dtype: torch.dtype = getattr(torch, step.method)
    return lambda weight: weight.to(dtype)


def _magnitude(step: Step, weights: Callable[[], Iterator[Tensor]]) -> Change:
    if step["pattern"]:
        kept, of = parse_pattern(step["pattern"])
        return partial(prune_pattern, kept=kept, of=of)
    if step["threshold"]:
        return partial(prune_threshold, threshold=step["threshold"])
    if step["scope"] == "global":
        return partial(prune_threshold, threshold=global_threshold(weights, sparsity=step["sparsity"]))
    return partial(prune_rows if step["scope"] == "row" else prune_tensor, sparsity=step["sparsity"])


def _rtn(step: Step, weights: Callable[[], Iterator[Tensor]]) -> Change:
    group_size = group_columns(dict(step.arguments))
    return partial(quantize_rtn, bits=step["bits"], group_size=group_size, symmetric=step["symmetric"])


def _by_runtime(step: Step, weights: Callable[[], Iterator[Tensor]]) -> Change:
    """The runtime's own quantizer rounds these weights when the artifact is written, together with its activations."""
    return lambda weight: weight


METHODS: dict[tuple[str, str], Callable[[Step, Callable[[], Iterator[Tensor]]], Change]] = {
    **{("cast", dtype): _cast for dtype in ("float32", "float16", "bfloat16")},
    ("prune", "magnitude"): _magnitude,
    ("quantize", "rtn"): _rtn,
    ("quantize", "dynamic"): _by_runtime,
    ("quantize", "static"): _by_runtime,
}
