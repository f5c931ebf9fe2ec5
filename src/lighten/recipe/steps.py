"""The steps that a recipe may have, and each step's first reading: what it makes of a ModelSpec.

The second reading, what it makes of the weights, stands in `lighten.compress` under the same names; a test holds the two tables together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lighten.errors import RecipeError
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, WeightFormat
from lighten.recipe.factorize import FACTORIZING
from lighten.recipe.number_formats import group_columns
from lighten.recipe.quantize import QUANTIZING
from lighten.recipe.vocabulary import SHRINKING_VOCABULARY
from lighten.recipe.words import TARGETS, Arguments, Parameter, StepKind, change_weights, columns_of, is_number, refuse_quantized, selected_names

__all__ = ["STEPS", "Parameter", "StepKind", "group_columns", "is_pattern", "parse_pattern", "selected_names"]

SCOPES = ("row", "layer", "global")


# cast


def _predict_cast(dtype: str) -> Callable[[ModelSpec, Arguments], ModelSpec]:
    def predict(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
        def changed(part: Part) -> Part:
            if not isinstance(part, Linear | Embedding):
                return part
            refuse_quantized(part, f"cast({dtype})")
            return replace(part, weight=replace(part.weight, dtype=dtype))

        return replace(spec.with_parts(changed), dtype=dtype)

    return predict


# prune


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`2:4` → (2, 4): of each 4 neighbouring weights of a row, 2 stay.

    Source: Mishra et al. 2021 (arXiv:2104.08378), section 3.
    """
    kept, _, of = pattern.partition(":")
    return int(kept), int(of)


def is_pattern(value: Any) -> bool:
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", value) if isinstance(value, str) else None
    return bool(found) and int(found[1]) < int(found[2])  # type: ignore[index]


def _check_magnitude(arguments: Arguments) -> str | None:
    given = [name for name in ("sparsity", "threshold", "pattern") if name in arguments]
    if len(given) != 1:
        return f"give exactly one of sparsity, threshold and pattern; given: {', '.join(given) or 'none'}."
    if given != ["sparsity"] and arguments["scope"] != "layer":
        return f"scope={arguments['scope']} has no effect with {given[0]}; it says over what a sparsity is counted."
    return None


def _predict_magnitude(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    if "pattern" in arguments:
        kept, of = parse_pattern(arguments["pattern"])
        sparsity = 1 - kept / of
    else:
        sparsity = float(arguments.get("sparsity", 0.0))  # how many a threshold zeroes is not known before the weights are seen

    def format_of(part: Linear | Embedding) -> WeightFormat:
        refuse_quantized(part, "prune(magnitude)")
        if "pattern" in arguments and columns_of(part) % of:
            raise RecipeError(f"pattern={arguments['pattern']}: {of} does not divide the {columns_of(part)} columns of {part.name}.")
        return replace(part.weight, sparsity=sparsity)

    return change_weights(spec, arguments, format_of)


LARGEST = 3e38
"""A threshold above float32's largest number (3.4e38, IEEE 754) would keep nothing."""

STEPS: dict[tuple[str, str], StepKind] = {
    **{("cast", dtype): StepKind(parameters={}, predict=_predict_cast(dtype)) for dtype in ("float32", "float16", "bfloat16")},
    ("prune", "magnitude"): StepKind(
        parameters={
            "sparsity": Parameter(accepts=lambda v: is_number(v) and 0 < v < 1, says="the share of zeros, between 0 and 1"),
            "threshold": Parameter(accepts=lambda v: is_number(v) and 0 < v < LARGEST, says="a positive number; smaller weights become 0"),
            "pattern": Parameter(accepts=is_pattern, says="n:m such as 2:4, n of each m neighbours stay"),
            "scope": Parameter(accepts=lambda v: v in SCOPES, says=f"one of {', '.join(SCOPES)}", default="layer"),
            **TARGETS,
        },
        predict=_predict_magnitude,
        check=_check_magnitude,
    ),
    **QUANTIZING,
    **FACTORIZING,
    **SHRINKING_VOCABULARY,
}  # fmt: skip
"""(verb, method) → its kind."""
