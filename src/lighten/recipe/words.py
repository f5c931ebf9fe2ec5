"""What a step of a recipe is made of: its arguments, which weights it selects, and how it changes their formats in a ModelSpec."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lighten.errors import RecipeError
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, WeightFormat

Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One argument of a step: which values it takes, in a test and in words; None as default: not given.

    Attributes:
        at_most: an upper limit, written `name<=value` in a text.
    """

    accepts: Callable[[Any], bool]
    says: str
    default: Any = None
    at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """A method: its arguments, and how it changes a spec.

    Attributes:
        predict: the step's reading on a spec; read in a whole recipe, its arguments hold the recipe's `runtime` too.
        check: what is wrong with arguments taken together, or None.
        calibrated: whether doing it needs calibration text; static activations need it whatever the method.
        implied: the values that other arguments, which are given, leave no choice of.
    """

    parameters: Mapping[str, Parameter]
    predict: Callable[[ModelSpec, Arguments], ModelSpec]
    check: Callable[[Arguments], str | None] = field(default=lambda arguments: None)
    calibrated: bool = False
    implied: Callable[[Arguments], Arguments] = field(default=lambda arguments: {})


FEW_ROWS = 16
"""Rows of a table that is left as it is: one that has a row for each kind of token adds that row's rounding to all of them alike, where it does not
average out. Of what MiniLM's tables lose in 8 bits five sixths are from the 2 rows of one of them (benchmarks/tables_int8.py)."""


def quantizable(part: Part, arguments: Arguments) -> bool:
    """Whether a quantizing or pruning step changes this part's weight.

    By default every linear but the head; `targets`, a regular expression searched in module names, narrows it; `embeddings=true` adds
    the embedding tables of more than `FEW_ROWS` rows and the head. A head tied to an embedding follows that embedding.
    """
    if isinstance(part, Linear):
        found = arguments.get("embeddings", False) if part.component == "head" else True
    else:
        found = isinstance(part, Embedding) and part.num_embeddings > FEW_ROWS and arguments.get("embeddings", False)
    return bool(found) and bool(re.search(arguments.get("targets", ""), part.name))


def selected_parts(spec: ModelSpec, arguments: Arguments) -> tuple[Linear | Embedding, ...]:
    """The parts whose weights a step changes, each stored weight once.

    Raises:
        RecipeError: `targets` matches none.
    """
    found = tuple(
        part for part in spec.parts
        if isinstance(part, Linear | Embedding) and quantizable(part, arguments) and not (isinstance(part, Linear) and part.tied_to)
    )  # fmt: skip
    if not found:
        raise RecipeError(f"targets={arguments.get('targets')!r} matches no weight of {spec.name} that this step changes.")
    return found


def selected_names(spec: ModelSpec, arguments: Arguments) -> tuple[str, ...]:
    """Names of the modules whose weights a step changes, each stored weight once.

    Raises:
        RecipeError: `targets` matches none.
    """
    return tuple(part.name for part in selected_parts(spec, arguments))


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


def refuse_quantized(part: Linear | Embedding, step: str) -> None:
    if part.weight.bits is not None:
        raise RecipeError(
            f"{step}: {part.name} is already quantized to {part.weight.bits} bits; put this step before quantize, or narrow its targets."
        )


# values


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    return is_whole(value) and value > 0


def is_count(value: Any) -> bool:
    return is_whole(value) and value >= 0


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def one_of(*values: Any, default: Any = None) -> Parameter:
    """An argument that takes one of a few words or whole numbers."""
    return Parameter(
        accepts=lambda value: any(value == each and type(value) is type(each) for each in values),
        says=str(values[0]) if len(values) == 1 else f"one of {', '.join(map(str, values))}", default=default,
    )  # fmt: skip


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value)) and not {'"', "'"} <= set(value)
    except (re.error, OverflowError, RecursionError):
        return False


TARGETS = {"targets": Parameter(accepts=_is_regex, says="a regular expression searched in module names, with quotes of one kind at most")}
EMBEDDINGS = {"embeddings": Parameter(accepts=is_flag, says="true or false", default=False)}
