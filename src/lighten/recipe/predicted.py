"""Steps that are read on a ModelSpec and not yet carried out: what they would give is predicted, `lighten compress` refuses them.

Each has the name and the arguments that it will have when it is done. A step that is done stands in `lighten.recipe.steps` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lighten.errors import RecipeError
from lighten.model.spec import Attention, ModelSpec, Part
from lighten.recipe.steps import STEPS
from lighten.recipe.words import (
    Arguments,
    Parameter,
    StepKind,
    is_whole,
)


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
