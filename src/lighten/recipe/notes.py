"""What a recipe does otherwise than it says on a model, in sentences that are printed before any work."""

from __future__ import annotations

from collections.abc import Callable

from lighten.model.ggml_types import OFFSET
from lighten.model.spec import Embedding, Linear, ModelSpec
from lighten.recipe.number_formats import fallback_of, input_fallback_of
from lighten.recipe.predict import apply_step
from lighten.recipe.recipe import Recipe, Step
from lighten.recipe.words import Arguments, columns_of, selected_parts


def notes(recipe: Recipe, spec: ModelSpec) -> list[str]:
    """One sentence for each thing that is not done to the letter: groups and blocks that do not divide a weight's columns, a head that is untied,
    widths that are measured.

    Raises:
        RecipeError: a step that this model cannot take.
    """
    found: list[str] = []
    for step in recipe.steps:
        after = apply_step(step, spec, recipe.runtime)
        if step.verb == "quantize" and step["group_size"] is not None and step.method != "kv":
            found += _fallbacks(step, spec, fallback_of)
        if filled := _filled(spec, after):
            found.append(f"{step}: {_several(filled)} {'were' if len(filled) > 1 else 'was'} pruned, and this format has no exact 0.")
        if step["activation_group_size"] is not None:
            found += _fallbacks(step, spec, input_fallback_of)
        if (step.verb, step.method) == ("quantize", "auto"):
            found.append(f"{step}: which weight gets which width is measured when it is done; what stands here is the widest that fits, evenly.")
        if (step.verb, step.method) == ("factorize", "svd") and step["energy"]:
            found.append(f"{step}: ranks are known when it is done; what stands here is every weight whole, the most that can be left.")
        if (step.verb, step.method) == ("factorize", "svd") and step["ratio"]:
            found.append(f"{step}: which weight gets which rank is measured when it is done; what stands here has as many parameters, spread evenly.")
        if step.verb == "rotate" and any(_untied(spec)):
            found.append(f"{step}: {', '.join(_untied(spec))} becomes a weight of its own, for the last norm's weight is folded into it alone.")
        spec = after
    return found


def _fallbacks(step: Step, spec: ModelSpec, fallback: Callable[[Arguments, int], tuple[str, str] | None]) -> list[str]:
    """What stands in for a group or a block, for each number of columns that it does not divide."""
    arguments = dict(step.arguments)
    names: dict[tuple[int, str, str], list[str]] = {}
    for part in selected_parts(spec, arguments):
        if (words := fallback(arguments, columns_of(part))) is not None:
            names.setdefault((columns_of(part), *words), []).append(part.name)
    return [
        f"{why} the {columns} columns of {_several(parts)}, which {'get' if len(parts) > 1 else 'gets'} {taken}."
        for (columns, why, taken), parts in names.items()
    ]


def _filled(before: ModelSpec, after: ModelSpec) -> list[str]:
    """Pruned weights that a step gives a type of ggml whose groups have offsets."""
    pairs = ((one.weight, other.weight, one.name) for one, other in zip(before.parts, after.parts, strict=False)
             if isinstance(one, Linear | Embedding) and isinstance(other, Linear | Embedding))  # fmt: skip
    return [name for one, other, name in pairs if one.sparsity and one.ggml_type is None and other.ggml_type in OFFSET]


def _several(names: list[str]) -> str:
    more = len(names) - 1
    return names[0] + (f" and {more} other{'s' if more > 1 else ''}" if more else "")


def _untied(spec: ModelSpec) -> list[str]:
    return [part.name for part in spec.parts if isinstance(part, Linear) and part.component == "head" and part.tied_to]
