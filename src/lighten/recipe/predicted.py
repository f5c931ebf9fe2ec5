"""Steps that are read on a ModelSpec and not yet carried out: what they would give is predicted, `lighten compress` refuses them.

Each has the name and the arguments that it will have when it is done. A step that is done stands in `lighten.recipe.steps` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lighten.errors import RecipeError
from lighten.model.spec import Attention, Elementwise, Linear, ModelSpec, Norm, Part, block_name
from lighten.recipe.steps import STEPS
from lighten.recipe.words import (
    Arguments,
    Parameter,
    StepKind,
    is_number,
    is_whole,
    refuse_quantized,
)

Stored = dict[str, tuple[tuple[int, ...], str]]


# structured pruning

TILE = 8
"""Features that are left are a multiple of this, for tensor cores' sake. Source: NVIDIA, Matrix Multiplication Background User's Guide,
section "Requirements to Use Tensor Cores": multiples of 16 bytes, 8 values of 2 bytes."""


@dataclass(frozen=True, kw_only=True)
class _FeedForward:
    """One pair of projections: the places of its parts in the spec, from the first projection into `width` features to the one back."""

    first: int
    last: int
    width: int


def kept_features(width: int, sparsity: float) -> int:
    """Inner features that structured pruning leaves.

    >>> kept_features(14336, 0.25), kept_features(100, 0.5), kept_features(4, 0.5)
    (10752, 56, 4)
    """
    return min(width, TILE * math.ceil(round(width * (1 - sparsity), 6) / TILE))


def _feed_forwards(spec: ModelSpec) -> Iterator[_FeedForward]:
    """Each `mlp` projection back to the hidden state, with the projections since the last one that lead into its input, alone or side by side."""
    open_: dict[str | None, list[int]] = {}
    for index, part in enumerate(spec.parts):
        if not isinstance(part, Linear) or part.component != "mlp":
            continue
        before = open_.setdefault(block_name(part), [])
        into = [place for place in before if _leads_into(spec.parts[place], part)]
        if into:
            yield _FeedForward(first=into[0], last=index, width=part.in_features)
            before.clear()
        else:
            before.append(index)


def _leads_into(first: Part, last: Linear) -> bool:
    widths = (last.in_features, 2 * last.in_features)  # gate and up in one
    same = isinstance(first, Linear) and first.experts == last.experts
    return same and isinstance(first, Linear) and first.in_features == last.out_features and first.out_features in widths


def _predict_structured(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """Each feed-forward layer, an expert too, loses a share of its inner features; attention and the hidden state stay as they are."""
    parts = list(spec.parts)
    found = list(_feed_forwards(spec))
    if not found:
        raise RecipeError(f"prune(structured): {spec.name} has no feed-forward layers whose inner features can be told.")
    for layer in found:
        kept = kept_features(layer.width, float(arguments["sparsity"]))
        for index in range(layer.first, layer.last + 1):
            parts[index] = _narrowed(parts[index], layer.width, kept, last=index == layer.last)
    return replace(spec, parts=tuple(parts), tensors=None)


def _narrowed(part: Part, width: int, kept: int, *, last: bool) -> Part:
    if isinstance(part, Linear):
        refuse_quantized(part, "prune(structured)")
        if last:
            return replace(part, in_features=kept)
        return replace(part, out_features=part.out_features // width * kept) if part.out_features in (width, 2 * width) else part
    if isinstance(part, Elementwise | Norm) and part.size % width == 0:  # of several experts at once, a multiple
        return replace(part, size=part.size // width * kept)
    return part


# a student


def _predict_student(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """The first blocks of each stack alone: a share `depth` of them, rounded up. Which blocks a student starts from is training's concern."""
    stacks: dict[str, dict[str, list[Part]]] = {}
    for part in spec.parts:
        if (block := block_name(part)) is not None:
            stacks.setdefault(block.rpartition(".")[0], {}).setdefault(block, []).append(part)
    for stack, blocks in stacks.items():
        if len({_hidden(parts) for parts in blocks.values()}) > 1:
            raise RecipeError(f"distill(student): the blocks of {stack} have different widths; a stack of equal blocks can lose some.")
    kept = {block for blocks in stacks.values() for block in list(blocks)[: math.ceil(round(len(blocks) * float(arguments["depth"]), 6))]}
    if not kept or len(kept) == sum(map(len, stacks.values())):
        raise RecipeError(f"distill(student): depth={arguments['depth']} of {spec.name}'s {len(kept)} blocks leaves all of them.")
    parts = tuple(part for part in spec.parts if (block := block_name(part)) is None or block in kept)
    return replace(spec, parts=parts, tensors=None)


def _hidden(parts: list[Part]) -> int | None:
    return next((part.in_features for part in parts if isinstance(part, Linear)), None)


# a window


def _predict_window(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """Each query sees its last `size` keys, and a cache keeps no more.

    Source: Beltagy et al. 2020 (arXiv:2004.05150); Jiang et al. 2023 (arXiv:2310.06825), section 2.
    """
    size = int(arguments["size"])

    def changed(part: Part) -> Part:
        if isinstance(part, Attention) and part.causal and not part.is_cross and (part.window is None or part.window > size):
            return replace(part, window=size, windowed_cache=True)
        return part

    if not any(changed(part) is not part for part in spec.parts):
        raise RecipeError(f"shrink(window): {spec.name} has no causal attention over more than {size} keys.")
    return spec.with_parts(changed)


PREDICTED: dict[tuple[str, str], StepKind] = {
    ("prune", "structured"): StepKind(
        parameters={
            "sparsity": Parameter(accepts=lambda v: is_number(v) and 0 < v < 1, says="the share of inner features that go, 0 to 1", default=0.25)
        },
        predict=_predict_structured, calibrated=True,
    ),
    ("distill", "student"): StepKind(
        parameters={
            "depth": Parameter(accepts=lambda v: is_number(v) and 0 < v < 1, says="the share of blocks that stay, between 0 and 1", default=0.5)
        },
        predict=_predict_student, calibrated=True,
    ),
    ("shrink", "window"): StepKind(
        parameters={"size": Parameter(accepts=lambda v: is_whole(v) and v > 0, says="a positive number of keys", default=4096)},
        predict=_predict_window,
    ),
}  # fmt: skip
"""(verb, method) → its kind."""

KINDS: Mapping[tuple[str, str], StepKind] = {**PREDICTED, **STEPS}


def require_done(said: str, key: tuple[str, str]) -> None:
    """Raises:
    RecipeError: a step that is predicted alone.
    """
    if key not in STEPS:
        known = ", ".join(f"{verb}({method})" for verb, method in STEPS)
        raise RecipeError(f"{said} is predicted alone: lighten estimate, advise and compare read it; these steps can be carried out: {known}.")
