"""What a weight is stored as: the recipe's words for it, and the WeightFormat that they give a weight of so many columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lighten.errors import RecipeError
from lighten.model.ggml_types import GGML_TYPES, RECIPE_TYPES, ggml_fallback, ggml_format
from lighten.model.spec import PER_CHANNEL, PER_TENSOR, Linear, WeightFormat
from lighten.recipe.words import Arguments, Parameter, is_flag, is_positive, one_of

WIDTHS = (8, 6, 4, 3, 2)
GROUPS = {"channel": PER_CHANNEL, "tensor": PER_TENSOR}
INT8 = {"bits": 8, "group_size": "channel", "symmetric": True}
"""What int8 activations are computed with: products of int8 whose scales leave the sum (Xiao et al. 2022, arXiv:2211.10438, section 3)."""


@dataclass(frozen=True, kw_only=True)
class FloatFormat:
    """A format of 8- or 4-bit floats: everything of it is fixed."""

    bits: int
    group_size: int
    element: Literal["e4m3", "e2m1"]
    scale_dtype: str
    global_scale: bool = False


FLOATS = {
    "fp8": FloatFormat(bits=8, group_size=PER_CHANNEL, element="e4m3", scale_dtype="float32"),
    "mxfp4": FloatFormat(bits=4, group_size=32, element="e2m1", scale_dtype="uint8"),
    "nvfp4": FloatFormat(bits=4, group_size=16, element="e2m1", scale_dtype="float8_e4m3fn", global_scale=True),
}
"""Source: Micikevicius et al. 2022 (arXiv:2209.05433) for e4m3; OCP Microscaling Formats (MX) v1.0, section 5.2 for mxfp4; the `compressed-tensors`
package's nvfp4-pack-quantized for nvfp4."""
FORMATS = ("int", *FLOATS, *RECIPE_TYPES)

WIDTH = {"bits": one_of(*WIDTHS, default=4)}
GROUP_SIZE = Parameter(
    accepts=lambda value: is_positive(value) or (isinstance(value, str) and value in GROUPS), says="a number of columns, channel or tensor"
)
SYMMETRIC = Parameter(accepts=is_flag, says="true or false", default=False)
DYNAMIC = {
    "symmetric_activations": Parameter(accepts=is_flag, says="true or false"),
    "activation_group_size": Parameter(accepts=is_positive, says="a number of columns of an input; without it a whole token"),
}
"""Of dynamic activations. Where nothing is said, those of int8 have zero points: int8 GEMMs take one for each token as a sum of each row's codes
(vLLM's since its pull request 7271), and most inputs are not centred."""
FORMAT = {"format": one_of(*FORMATS, default="int"), "activations": one_of("none", "dynamic", "static", default="none"), **DYNAMIC}


def grid_parameters(*, bits: int, group_size: int | str) -> dict[str, Parameter]:
    """Width, group and symmetry, with a method's own defaults."""
    return {"bits": one_of(*WIDTHS, default=bits), "group_size": replace(GROUP_SIZE, default=group_size), "symmetric": SYMMETRIC}


def implied_grid(arguments: Arguments) -> Arguments:
    """Width, group and symmetry where the format, or int8 activations, leave no choice of them."""
    word = arguments.get("format", "int")
    if word in FLOATS:
        kind = FLOATS[word]
        return {"bits": kind.bits, "group_size": "channel" if kind.group_size == PER_CHANNEL else kind.group_size, "symmetric": True}
    if word in RECIPE_TYPES:
        found = _ggml(word, columns=COMMON_MULTIPLE)
        return {"bits": found["bits"], "group_size": found["group_size"], "symmetric": found.get("symmetric", True)}
    if arguments.get("activations", "none") not in ("dynamic", "static"):
        return {}
    return INT8 if arguments.get("activation_group_size") is None else {name: INT8[name] for name in ("bits", "symmetric")}


COMMON_MULTIPLE = 256
"""Columns that every type of ggml divides (`QK_K` of ggml-common.h)."""


def check_activations(arguments: Arguments) -> str | None:
    word, activations = arguments["format"], arguments["activations"]
    if activations != "none" and word not in ("int", "fp8"):
        return f"activations={activations} go with 8-bit weights; use format=int or format=fp8."
    return check_dynamic(arguments)


def check_dynamic(arguments: Arguments) -> str | None:
    if arguments.get("activation_group_size") is not None and arguments["activations"] != "dynamic":
        return "activation_group_size is said of activations=dynamic."
    if arguments.get("symmetric_activations") is not None and (arguments["activations"] != "dynamic" or arguments.get("format", "int") != "int"):
        return "symmetric_activations is said of int8 activations=dynamic; all others are symmetric."
    return None


def weight_format(arguments: Arguments, columns: int, name: str, *, before: WeightFormat | None = None, product: bool = True) -> WeightFormat:
    """How a weight of so many columns is stored by a step with these arguments.

    A group that does not divide the columns gives way to a smaller one (`dividing_group`), a ggml type whose blocks do not to the one that
    llama.cpp takes then; `lighten.recipe.notes` says so.

    Args:
        name: of the module, for the refusal.
        before: its format until now.
        product: it is multiplied with activations: a linear's weight, not a table that is looked up.

    Raises:
        RecipeError: a format of fixed groups that do not divide the columns.
    """
    word = arguments.get("format", "int")
    before = replace(before or WeightFormat(), kept=None)
    if word in RECIPE_TYPES:
        return replace(before, **_ggml(word, columns))
    activations = arguments.get("activations", "none")
    said = activations if activations != "none" and product else None
    inputs: dict[str, Any] = {"activations": said}
    if said == "dynamic" and (wanted := arguments.get("activation_group_size")) is not None:
        inputs["activation_group_size"] = dividing_group(columns, wanted)
    if word in FLOATS:
        kind = FLOATS[word]
        if kind.group_size > 0 and columns % kind.group_size:
            raise RecipeError(
                f"format={word} has groups of {kind.group_size}, which do not divide the {columns} columns of {name}; "
                "use format=int or fp8 there, or narrow targets."
            )
        return replace(
            before, bits=kind.bits, group_size=kind.group_size, symmetric=True, element=kind.element, scale_dtype=kind.scale_dtype,
            global_scale=kind.global_scale, **inputs,
        )  # fmt: skip
    group = group_columns(arguments)
    group = dividing_group(columns, group) if group > 0 else group
    return replace(
        before, bits=arguments["bits"], group_size=group, symmetric=arguments.get("symmetric", False),
        activation_zero_points=said == "dynamic" and not arguments.get("symmetric_activations"), **inputs,
    )  # fmt: skip


def group_columns(arguments: Arguments) -> int:
    """The `group_size` that is asked for, as a `WeightFormat` says it."""
    group = arguments["group_size"]
    return GROUPS[group] if isinstance(group, str) else int(group)


def dividing_group(columns: int, wanted: int) -> int:
    """`wanted` where it divides the columns; else the largest smaller divisor that is a multiple of 32, else of 16, else of 8, else any.

    Kernels take groups of a multiple of 16 or 32 weights.

    >>> [dividing_group(576, wanted) for wanted in (64, 128, 100, 30)], dividing_group(50, 16)
    ([64, 96, 96, 16], 10)
    """
    if columns % wanted == 0:
        return wanted
    divisors = [size for size in range(1, min(wanted, columns) + 1) if columns % size == 0]
    return next(max(found) for multiple in (32, 16, 8, 1) if (found := [size for size in divisors if size % multiple == 0]))


def fallback_of(arguments: Arguments, part_columns: int) -> tuple[str, str] | None:
    """Why it is not taken as asked, and what is taken instead, in words; None where it is."""
    word = arguments.get("format", "int")
    if word in RECIPE_TYPES:
        asked = RECIPE_TYPES[word]
        found = ggml_fallback(asked, part_columns)
        return None if found == asked else (f"blocks of {GGML_TYPES[asked].block} of format={word} do not divide", f"ggml's {found}")
    group = group_columns(arguments) if word == "int" else 0
    if group <= 0 or part_columns % group == 0:
        return None
    return f"group_size={group} does not divide", f"groups of {dividing_group(part_columns, group)}"


def input_fallback_of(arguments: Arguments, part_columns: int) -> tuple[str, str] | None:
    """The same of the groups that dynamic activations have."""
    group = arguments["activation_group_size"]
    if part_columns % group == 0:
        return None
    return f"activation_group_size={group} does not divide", f"inputs in groups of {dividing_group(part_columns, group)}"


def is_product(part: object) -> bool:
    """Whether a part's own stored weight is multiplied with activations."""
    return isinstance(part, Linear) and part.tied_to is None


def _ggml(word: str, columns: int) -> dict[str, Any]:
    return dict(ggml_format(RECIPE_TYPES[word], columns))
