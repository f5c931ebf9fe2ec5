"""Steps that set weights to 0 one by one: their arguments, and what they make of a ModelSpec.

Which weights go is the second reading's concern; on a spec all methods leave the same number of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lighten.errors import RecipeError
from lighten.model.spec import Embedding, Linear, ModelSpec, WeightFormat
from lighten.recipe.quantize import AUTO, CALIBRATION, is_damping
from lighten.recipe.sparse import is_stacked, kept_weights, size_of, with_kept
from lighten.recipe.words import TARGETS, Arguments, Parameter, StepKind, change_weights, columns_of, is_number, one_of, refuse_quantized

LARGEST = 3e38
"""A threshold above float32's largest number (3.4e38, IEEE 754) would keep nothing."""


UNIFORM, BY_SENSITIVITY = "uniform", "sensitivity"
"""Every weight has the same share of zeros; or more of them are where they cost less."""
IN_FOLDER = ("torch", "torch-compile")
"""Runtimes whose artifact is a folder that lighten loads itself: it stores what is left of a pruned weight."""


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`2:4` → (2, 4): of each 4 neighbouring weights of a row, 2 stay.

    Source: Mishra et al. 2021 (arXiv:2104.08378), section 3.
    """
    kept, _, of = pattern.partition(":")
    return int(kept), int(of)


def is_pattern(value: Any) -> bool:
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", value) if isinstance(value, str) else None
    return bool(found) and int(found[1]) < int(found[2])  # type: ignore[index]


SPARSITY = Parameter(accepts=lambda v: is_number(v) and 0 < v < 1, says="the share of zeros, between 0 and 1")
PATTERN = Parameter(accepts=is_pattern, says="n:m such as 2:4, n of each m neighbours stay")
THRESHOLD = Parameter(accepts=lambda v: is_number(v) and 0 < v < LARGEST, says="a positive number; smaller weights become 0")


def _check(*ways: str, scope: str) -> Callable[[Arguments], str | None]:
    """Exactly one way of saying how many go, and a scope that has to do with it."""

    def check(arguments: Arguments) -> str | None:
        given = [name for name in ways if name in arguments]
        if len(given) != 1:
            return f"give exactly one of {', '.join(ways[:-1])} and {ways[-1]}; given: {', '.join(given) or 'none'}."
        if given != ["sparsity"] and arguments["scope"] != scope:
            return f"scope={arguments['scope']} has no effect with {given[0]}; it says over what a sparsity is counted."
        if arguments.get("allocation", UNIFORM) != UNIFORM and (given != ["sparsity"] or arguments["scope"] != "layer"):
            return f"allocation={arguments['allocation']} gives each layer a sparsity of its own; it goes with sparsity and scope=layer."
        return None

    return check


def _predict(method: str) -> Callable[[ModelSpec, Arguments], ModelSpec]:
    def predict(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
        pattern = parse_pattern(arguments["pattern"]) if "pattern" in arguments else None
        in_folder = arguments.get("runtime", IN_FOLDER[0]) in IN_FOLDER
        sparsity = 1 - pattern[0] / pattern[1] if pattern else float(arguments.get("sparsity", 0.0))  # a threshold's is seen on the weights alone

        def format_of(part: Linear | Embedding) -> WeightFormat:
            refuse_quantized(part, f"prune({method})")
            if pattern and columns_of(part) % pattern[1]:
                raise RecipeError(f"pattern={arguments['pattern']}: {pattern[1]} does not divide the {columns_of(part)} columns of {part.name}.")
            weight = replace(part.weight, sparsity=sparsity, pattern=pattern, kept=None)
            if not in_folder or "threshold" in arguments or is_stacked(part):
                return weight
            rows, columns = size_of(part)
            kept = kept_weights(rows, columns, sparsity=sparsity, by_row=arguments["scope"] == "row", pattern=pattern)
            return with_kept(weight, rows, columns, kept)

        return change_weights(spec, arguments, format_of)

    return predict


def _calibrated(method: str, *, scope: str, more: Mapping[str, Parameter]) -> StepKind:
    return StepKind(
        parameters={"sparsity": SPARSITY, "pattern": PATTERN, "scope": one_of("row", "layer", default=scope),
            "allocation": one_of(UNIFORM, BY_SENSITIVITY, default=UNIFORM), **more, **TARGETS, **CALIBRATION},
        predict=_predict(method), check=_check("sparsity", "pattern", scope=scope), calibrated=True,
    )  # fmt: skip


_DAMPING = {"damping": Parameter(accepts=is_damping, says="auto, or a number above 0 up to 10", default=AUTO)}

PRUNING: dict[tuple[str, str], StepKind] = {
    ("prune", "magnitude"): StepKind(
        parameters={
            "sparsity": SPARSITY, "threshold": THRESHOLD, "pattern": PATTERN, "scope": one_of("row", "layer", "global", default="layer"), **TARGETS
        },
        predict=_predict("magnitude"), check=_check("sparsity", "threshold", "pattern", scope="layer"),
    ),
    ("prune", "wanda"): _calibrated("wanda", scope="row", more={}),
    ("prune", "sparsegpt"): _calibrated("sparsegpt", scope="layer", more=_DAMPING),
    ("prune", "admm"): _calibrated("admm", scope="layer", more=_DAMPING),
}  # fmt: skip
"""(verb, method) → its kind. Names are the papers' or the field's: wanda arXiv:2306.11695; sparsegpt arXiv:2301.00774; admm arXiv:2401.02938."""
