"""Steps that are read on a ModelSpec and not yet carried out: what they would give is predicted, `lighten compress` refuses them.

Each has the name and the arguments that it will have when it is done. A step that is done stands in `lighten.recipe.steps` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lighten.errors import RecipeError
from lighten.model.spec import Attention, Embedding, Linear, ModelSpec, Part, WeightFormat
from lighten.recipe.steps import STEPS, is_pattern, parse_pattern
from lighten.recipe.words import (
    TARGETS,
    Arguments,
    Parameter,
    StepKind,
    change_weights,
    columns_of,
    is_whole,
    refuse_quantized,
)
from lighten.units import DTYPE_BITS

Stored = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, kw_only=True)
class SparseLayout:
    """n of each m neighbours of a row: the n values, and for each of them its place in ⌈log2 m⌉ bits.

    `values` [O, I·n/m], `places` uint8 [O, I·n/m · ⌈log2 m⌉ / 8].

    Source: Mishra et al. 2021 (arXiv:2104.08378), section 3.1 and figure 2: 2-bit indices of 2:4.
    """

    kept: int
    of: int
    dtype: str

    def tensors(self, rows: int, columns: int, scale_dtype: str) -> Stored:
        values = columns * self.kept // self.of
        places = (values * (self.of - 1).bit_length() + 7) // 8
        return {".values": ((rows, values), self.dtype), ".places": ((rows, places), "uint8")}


def is_packed(weight: WeightFormat) -> bool:
    """Whether a weight is stored without its zeros."""
    return isinstance(weight.layout, SparseLayout)


# n of each m neighbours


def _predict_packed(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    kept, of = parse_pattern(arguments["pattern"])

    def format_of(part: Linear | Embedding) -> WeightFormat:
        refuse_quantized(part, "prune(sparsegpt)")
        if columns_of(part) % of:
            raise RecipeError(f"pattern={arguments['pattern']}: {of} does not divide the {columns_of(part)} columns of {part.name}.")
        layout = SparseLayout(kept=kept, of=of, dtype=part.weight.dtype)
        return replace(part.weight, bits=DTYPE_BITS[part.weight.dtype], sparsity=1 - kept / of, layout=layout)

    return change_weights(spec, arguments, format_of)


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
    ("prune", "sparsegpt"): StepKind(
        parameters={
            "pattern": Parameter(accepts=is_pattern, says="n:m such as 2:4, n of each m neighbours stay", default="2:4"),
            **TARGETS,
        },
        predict=_predict_packed, calibrated=True,
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
