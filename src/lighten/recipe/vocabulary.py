"""shrink(vocab): the rows of an embedding, and of a head, that no text needs. The reading on a ModelSpec.

What of a model has a row for each token is what its description gives another size when its config has another `vocab_size`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from lighten.errors import RecipeError
from lighten.model.families import describe
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, Table
from lighten.recipe.quantize import CALIBRATION
from lighten.recipe.words import Arguments, Parameter, StepKind, is_number, is_positive, refuse_quantized

TILE = 8
"""Rows that a ratio leaves are a multiple of this, for tensor cores' sake. Source: NVIDIA, Matrix Multiplication Background User's Guide, section
"Requirements to Use Tensor Cores": multiples of 16 bytes, 8 values of 2 bytes. `keep` is taken at its word."""


def kept_rows(spec: ModelSpec, arguments: Arguments) -> int:
    """Tokens that stay.

    Raises:
        RecipeError: no `vocab_size` in the model's config, or not fewer than it has.
    """
    size = spec.config.get("vocab_size")
    if not isinstance(size, int):
        raise RecipeError(f"shrink(vocab): the config of {spec.name} names no vocab_size; it has no vocabulary of its own to cut.")
    rows = int(arguments["keep"]) if "keep" in arguments else min(size, TILE * math.ceil(round(size * (1 - arguments["ratio"]), 6) / TILE))
    if rows >= size:
        raise RecipeError(f"shrink(vocab): {spec.name} has {size} tokens, and {rows} are to stay; keep fewer.")
    return rows


def sliced_tensors(before: ModelSpec, after: ModelSpec) -> dict[str, int]:
    """Tensor → the dimension that has a row for each token, of all that a shrunk vocabulary makes smaller."""
    shapes = {name: shape for part in after.parts for name, shape in part.tensors().items()}
    return {
        name: next(place for place, (one, other) in enumerate(zip(shape, shapes[name], strict=True)) if one != other)
        for part in before.parts for name, shape in part.tensors().items() if shape != shapes[name]
    }  # fmt: skip


def _predict(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """Every weight in its own format still.

    Raises:
        RecipeError: as `kept_rows`; a table that is quantized.
    """
    config = {**spec.config, "vocab_size": kept_rows(spec, arguments)}
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    described = describe(plain, spec.architecture)
    assert [part.name for part in described] == [part.name for part in spec.parts], "a step that changes a model's form says so in its config"
    parts = tuple(_as_before(new, old) for new, old in zip(described, spec.parts, strict=True))
    for new, old in zip(parts, spec.parts, strict=True):
        if isinstance(old, Linear | Embedding) and new.tensors() != old.tensors():
            refuse_quantized(old, "shrink(vocab)")
    if not any(isinstance(new, Embedding) and new != old for new, old in zip(parts, spec.parts, strict=True)):
        raise RecipeError(f"shrink(vocab): {spec.name} looks up no table with a row for each of its tokens.")
    return replace(spec, parts=parts, config=config, tensors=None)


def _as_before(new: Part, old: Part) -> Part:
    """A part of the smaller model, stored as it was."""
    if isinstance(new, Linear) and isinstance(old, Linear):
        return replace(new, weight=old.weight, tied_to=old.tied_to)
    if isinstance(new, Embedding) and isinstance(old, Embedding):
        return replace(new, weight=old.weight)
    return replace(new, dtype=old.dtype) if isinstance(new, Table) and isinstance(old, Table) else new


def _check(arguments: Arguments) -> str | None:
    given = [name for name in ("keep", "ratio") if name in arguments]
    return None if len(given) == 1 else f"give exactly one of keep and ratio; given: {', '.join(given) or 'none'}."


SHRINKING_VOCABULARY: dict[tuple[str, str], StepKind] = {
    ("shrink", "vocab"): StepKind(
        parameters={
            "keep": Parameter(accepts=is_positive, says="a number of tokens that stay"),
            "ratio": Parameter(accepts=lambda v: is_number(v) and 0 < v < 1, says="the share that goes, between 0 and 1; a multiple of 8 stays"),
            **CALIBRATION,
        },
        predict=_predict, check=_check, calibrated=True,
    ),
}  # fmt: skip
"""(verb, method) → its kind."""
