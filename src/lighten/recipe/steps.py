"""The steps that a recipe may have, and each step's first reading: what it makes of a ModelSpec.

The second reading, what it makes of the weights, stands in `lighten.compress` under the same names; a test holds the two tables together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lighten.model.spec import Embedding, Linear, ModelSpec, Part
from lighten.recipe.distill import DISTILLING
from lighten.recipe.factorize import FACTORIZING
from lighten.recipe.number_formats import group_columns
from lighten.recipe.prune import PRUNING, is_pattern, parse_pattern
from lighten.recipe.quantize import QUANTIZING
from lighten.recipe.shrink import SHRINKING
from lighten.recipe.vocabulary import SHRINKING_VOCABULARY
from lighten.recipe.words import Arguments, Parameter, StepKind, refuse_quantized, selected_names

__all__ = ["STEPS", "Parameter", "StepKind", "group_columns", "is_pattern", "parse_pattern", "selected_names"]


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


STEPS: dict[tuple[str, str], StepKind] = {
    **{("cast", dtype): StepKind(parameters={}, predict=_predict_cast(dtype)) for dtype in ("float32", "float16", "bfloat16")},
    **PRUNING,
    **QUANTIZING,
    **SHRINKING,
    **DISTILLING,
    **FACTORIZING,
    **SHRINKING_VOCABULARY,
}  # fmt: skip
"""(verb, method) → its kind."""
