"""The steps that a recipe may have, and each step's first reading: what it makes of a ModelSpec.

The second reading, what it makes of the weights, stands in `lighten.compress` under the same names; a test holds the two tables together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lighten.errors import RecipeError
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Embedding, Linear, ModelSpec, Part, WeightFormat

Arguments = Mapping[str, Any]
WIDTHS = (8, 4, 3, 2)
SCOPES = ("row", "layer", "global")
GROUPS = {"channel": PER_CHANNEL, "tensor": PER_TENSOR}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One argument of a step: which values it takes, in a test and in words; None as default: not given."""

    accepts: Callable[[Any], bool]
    says: str
    default: Any = None


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """A method: its arguments, and how it changes a spec.

    Attributes:
        predict: the step's reading on a spec; `selected` are the names of the weights that it changes.
        check: what is wrong with arguments taken together, or None.
        calibrated: whether doing it needs calibration text.
    """

    parameters: Mapping[str, Parameter]
    predict: Callable[[ModelSpec, Arguments], ModelSpec]
    check: Callable[[Arguments], str | None] = field(default=lambda arguments: None)
    calibrated: bool = False


def quantizable(part: Part, arguments: Arguments) -> bool:
    """Whether a quantizing or pruning step changes this part's weight.

    By default every linear but the head; `targets`, a regular expression searched in module names, narrows it; `embeddings=true` adds
    the embedding tables and the head. A head tied to an embedding follows that embedding.
    """
    if isinstance(part, Linear):
        found = arguments.get("embeddings", False) if part.component == "head" else True
    else:
        found = isinstance(part, Embedding) and arguments.get("embeddings", False)
    return bool(found) and bool(re.search(arguments.get("targets", ""), part.name))


def selected_names(spec: ModelSpec, arguments: Arguments) -> tuple[str, ...]:
    """Names of the modules whose weights a step changes, each stored weight once.

    Raises:
        RecipeError: `targets` matches none.
    """
    names = tuple(p.name for p in spec.parts if quantizable(p, arguments) and not (isinstance(p, Linear) and p.tied_to))
    if not names:
        raise RecipeError(f"targets={arguments.get('targets')!r} matches no weight of {spec.name} that this step changes.")
    return names


def change_weights(spec: ModelSpec, arguments: Arguments, change: Callable[[Linear | Embedding], WeightFormat]) -> ModelSpec:
    """The spec with `change(part)` as the format of each selected weight; a tied head takes its embedding's."""
    names = set(selected_names(spec, arguments))

    def changed(part: Part) -> Part:
        if isinstance(part, Linear | Embedding) and (part.name in names or (isinstance(part, Linear) and part.tied_to in names)):
            return replace(part, weight=change(part))
        return part

    return spec.with_parts(changed)


def columns_of(part: Linear | Embedding) -> int:
    return part.in_features if isinstance(part, Linear) else part.embedding_dim


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


# quantize


def group_columns(arguments: Arguments) -> int:
    """The `group_size` of a `WeightFormat`."""
    group = arguments["group_size"]
    return GROUPS[group] if isinstance(group, str) else int(group)


def _predict_rtn(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    group_size = group_columns(arguments)

    def format_of(part: Linear | Embedding) -> WeightFormat:
        refuse_quantized(part, "quantize(rtn)")
        columns = columns_of(part)
        if group_size > 0 and columns % group_size:
            fits = max(n for n in range(1, min(group_size, columns) + 1) if columns % n == 0)
            raise RecipeError(f"group_size={group_size} does not divide the {columns} columns of {part.name}; a divisor is {fits}.")
        return replace(part.weight, bits=arguments["bits"], group_size=group_size, symmetric=arguments["symmetric"])

    return change_weights(spec, arguments, format_of)


def _predict_activations(method: Literal["dynamic", "static"], *, embeddings: bool) -> Callable[[ModelSpec, Arguments], ModelSpec]:
    def predict(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
        def format_of(part: Linear | Embedding) -> WeightFormat:
            refuse_quantized(part, f"quantize({method})")
            return replace(part.weight, bits=arguments["bits"], group_size=PER_CHANNEL, symmetric=True, scale_dtype="float32", activations=method)

        return change_weights(spec, {"embeddings": embeddings, **arguments}, format_of)

    return predict


def refuse_quantized(part: Linear | Embedding, step: str) -> None:
    if part.weight.bits is not None:
        raise RecipeError(
            f"{step}: {part.name} is already quantized to {part.weight.bits} bits; put this step before quantize, or narrow its targets."
        )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value)) and not {'"', "'"} <= set(value)
    except (re.error, OverflowError, RecursionError):
        return False


LARGEST = 3e38
"""A threshold above float32's largest number (3.4e38, IEEE 754) would keep nothing."""

TARGETS = {"targets": Parameter(accepts=_is_regex, says="a regular expression searched in module names, with quotes of one kind at most")}
_EMBEDDINGS = {"embeddings": Parameter(accepts=lambda v: isinstance(v, bool), says="true or false", default=False)}
_INT8 = {"bits": Parameter(accepts=lambda v: is_whole(v) and v == 8, says="8", default=8)}

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
    ("quantize", "rtn"): StepKind(
        parameters={
            "bits": Parameter(accepts=lambda v: is_whole(v) and v in WIDTHS, says=f"one of {', '.join(map(str, WIDTHS))}", default=8),
            "group_size": Parameter(
                accepts=lambda v: v > 0 if is_whole(v) else isinstance(v, str) and v in GROUPS,
                says="a number of columns, channel or tensor", default="channel",
            ),
            "symmetric": Parameter(accepts=lambda v: isinstance(v, bool), says="true or false", default=False),
            **_EMBEDDINGS, **TARGETS,
        },
        predict=_predict_rtn,
    ),
    ("quantize", "dynamic"): StepKind(parameters={**_INT8, **_EMBEDDINGS}, predict=_predict_activations("dynamic", embeddings=False)),
    ("quantize", "static"): StepKind(parameters=_INT8, predict=_predict_activations("static", embeddings=True), calibrated=True),
}  # fmt: skip
"""(verb, method) → its kind. Names are the papers' or the field's: rtn is round-to-nearest; dynamic and static say how int8 activations get
their scale, as ONNX Runtime and NNCF use the words."""
