"""Steps that quantize, tune what is quantized, or prepare weights for it: their arguments, and what they make of a ModelSpec.

Which codes a method chooses is its second reading's concern; on a spec rtn, hqq, gptq and awq give the same formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from lighten.errors import RecipeError
from lighten.model.quantized.kv import kv_format_for
from lighten.model.spec import PER_CHANNEL, Attention, Embedding, Linear, ModelSpec, Part, WeightFormat
from lighten.recipe.automatic import LIMITS, check_auto, predict_auto
from lighten.recipe.number_formats import (
    DYNAMIC,
    FORMAT,
    GROUP_SIZE,
    INT8,
    SYMMETRIC,
    check_activations,
    check_dynamic,
    grid_parameters,
    implied_grid,
    is_product,
    weight_format,
)
from lighten.recipe.words import (
    EMBEDDINGS,
    TARGETS,
    Arguments,
    Parameter,
    StepKind,
    change_weights,
    columns_of,
    is_count,
    is_flag,
    is_number,
    is_positive,
    one_of,
    refuse_quantized,
)

TOKENS = 32_768
"""Calibration tokens by default: choice, an eighth of what GPTQ's paper takes (arXiv:2210.17323, section 4: 128 sequences of 2,048). A text that has
fewer gives all that it has, and the log says how many."""
AUTO = "auto"
MOST_ROUNDS = 20
"""Choice: far beyond where another round of refining helps."""
CALIBRATION = {"tokens": Parameter(accepts=is_positive, says="a number of calibration tokens", default=TOKENS)}
_WHERE = {**EMBEDDINGS, **TARGETS}


# weights


def _predict_weights(method: str) -> Callable[[ModelSpec, Arguments], ModelSpec]:
    def predict(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
        def format_of(part: Linear | Embedding) -> WeightFormat:
            refuse_quantized(part, f"quantize({method})")
            return weight_format(arguments, columns_of(part), part.name, before=part.weight, product=is_product(part))

        return change_weights(spec, arguments, format_of)

    return predict


def _check_rtn(arguments: Arguments) -> str | None:
    if arguments["tokens"] != TOKENS and arguments["activations"] != "static":
        return f"tokens={arguments['tokens']} has no effect; rounding to nearest needs calibration for activations=static alone."
    return check_activations(arguments)


def _weights_kind(method: str, *, bits: int, group_size: int | str, calibrated: bool = True) -> StepKind:
    """A method that quantizes weights, with its own defaults."""
    return StepKind(
        parameters={
            **grid_parameters(bits=bits, group_size=group_size), **_WHERE, **FORMAT, **CALIBRATION,
        },
        predict=_predict_weights(method), implied=implied_grid, calibrated=calibrated,
        check=check_activations if calibrated else _check_rtn,
    )  # fmt: skip


def _gptq() -> StepKind:
    """What is done beside the paper's algorithm can be said, and left out."""
    kind = _weights_kind("gptq", bits=4, group_size=128)
    own = {
        "damping": Parameter(accepts=is_damping, says="auto, or a number above 0 up to 10", default=AUTO),
        "refine": Parameter(
            accepts=lambda v: is_count(v) and v <= MOST_ROUNDS, says=f"a number of rounds up to {MOST_ROUNDS}; without it by the width"
        ),
        "search": Parameter(accepts=is_flag, says="true or false", default=True),
    }
    return replace(kind, parameters={**kind.parameters, **own}, check=_check_gptq)


def is_damping(value: object) -> bool:
    return value == AUTO or (is_number(value) and 0 < value <= 10)  # type: ignore[operator]


def _check_gptq(arguments: Arguments) -> str | None:
    if not arguments["search"] and arguments["format"] != "int":
        return f"search=false goes with format=int; scales of {arguments['format']} are always searched."
    return check_activations(arguments)


def _hqq() -> StepKind:
    """Half-quadratic quantization has zero points, whole-number codes and no calibration."""
    own = grid_parameters(bits=4, group_size=64)
    return StepKind(parameters={"bits": own["bits"], "group_size": own["group_size"], **_WHERE}, predict=_predict_weights("hqq"))


# activations


def _predict_smoothed(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    return _predict_weights("smoothquant")(spec, {**arguments, **INT8})


def _is_alpha(value: object) -> bool:
    return value == AUTO or (is_number(value) and 0 <= value <= 1)  # type: ignore[operator]


def predict_by_runtime(method: Literal["dynamic", "static"], *, embeddings: bool) -> Callable[[ModelSpec, Arguments], ModelSpec]:
    def predict(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
        def format_of(part: Linear | Embedding) -> WeightFormat:
            refuse_quantized(part, f"quantize({method})")
            return replace(part.weight, bits=arguments["bits"], group_size=PER_CHANNEL, symmetric=True, scale_dtype="float32", activations=method)

        return change_weights(spec, {"embeddings": embeddings, **arguments}, format_of)

    return predict


# the cache


def _predict_cache(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """The weights stay as they are; `Recipe.kv_dtype` says what a workload's cache is stored in.

    Raises:
        RecipeError: a model without a cache, or groups that do not divide its heads.
    """
    if not any(isinstance(part, Attention) and part.causal for part in spec.parts):
        raise RecipeError(f"quantize(kv): {spec.name} has no causal attention, and so no cache of keys and values.")
    kv_format_for(spec, bits=arguments["bits"], group_size=arguments.get("group_size"))
    return spec


# rotation


def _predict_rotated(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
    """Every weight in its own format still; a head that is tied to the embedding becomes a weight of its own, for the last norm's weight is folded
    into the head alone.

    Whether a rotation passes through a model is seen in its traced graph, before any work on the weights.

    Raises:
        RecipeError: a quantized weight, or a pruned one.
    """
    for part in spec.parts:
        if isinstance(part, Linear | Embedding):
            refuse_quantized(part, "rotate(hadamard)")
            if part.weight.sparsity:
                raise RecipeError(f"rotate(hadamard): {part.name} is pruned and a rotation leaves no zeros; put this step before prune.")

    def untied(part: Part) -> Part:
        return replace(part, tied_to=None) if isinstance(part, Linear) and part.component == "head" and part.tied_to else part

    return replace(spec.with_parts(untied), config={**spec.config, "tie_word_embeddings": False})


# tuning


def _predict_tuned(method: str) -> Callable[[ModelSpec, Arguments], ModelSpec]:
    """The formats stay; the numbers in them change."""

    def predict(spec: ModelSpec, arguments: Arguments) -> ModelSpec:
        if not any(isinstance(part, Linear) and part.weight.bits is not None for part in spec.parts):
            raise RecipeError(f"distill({method}) tunes quantized weights and {spec.name} has none; put it after quantize.")
        if arguments.get("self_tokens") and not spec.is_decoder:
            raise RecipeError(f"distill({method}): self_tokens are written by a decoder, and {spec.name} is none; leave them out.")
        return spec

    return predict


def _tuning(method: str, *, steps: int, learning_rate: float) -> StepKind:
    return StepKind(
        parameters={
            "steps": Parameter(accepts=is_positive, says="a number of steps", default=steps),
            "learning_rate": Parameter(accepts=lambda v: is_number(v) and 0 < v < 1, says="a number between 0 and 1", default=learning_rate),
            "self_tokens": Parameter(accepts=is_count, says="a number of tokens that the original writes to be tuned on, or 0", default=0),
            **CALIBRATION,
        },
        predict=_predict_tuned(method), calibrated=True,
    )  # fmt: skip


QUANTIZING: dict[tuple[str, str], StepKind] = {
    ("quantize", "rtn"): _weights_kind("rtn", bits=8, group_size="channel", calibrated=False),
    ("quantize", "hqq"): _hqq(),
    ("quantize", "gptq"): _gptq(),
    ("quantize", "awq"): _weights_kind("awq", bits=4, group_size=128),
    ("quantize", "smoothquant"): StepKind(
        parameters={
            "alpha": Parameter(accepts=_is_alpha, says="a number from 0 to 1, or auto", default=0.5),
            "activations": one_of("dynamic", "static", default="dynamic"), **DYNAMIC, **_WHERE, **CALIBRATION,
        },
        predict=_predict_smoothed, calibrated=True, check=check_dynamic,
    ),
    ("quantize", "auto"): StepKind(
        parameters={
            **LIMITS, "group_size": replace(GROUP_SIZE, default=64), "symmetric": SYMMETRIC,
            "embeddings": replace(EMBEDDINGS["embeddings"], default=True), **TARGETS, **CALIBRATION,
        },
        predict=predict_auto, check=check_auto, calibrated=True,
    ),
    ("quantize", "kv"): StepKind(
        parameters={
            "bits": one_of(8, 4, default=8),
            "group_size": Parameter(accepts=is_positive, says="a number of channels of a head; without it a whole head"),
        },
        predict=_predict_cache,
    ),
    ("quantize", "dynamic"): StepKind(
        parameters={"bits": one_of(8, default=8), **EMBEDDINGS}, predict=predict_by_runtime("dynamic", embeddings=False)
    ),
    ("quantize", "static"): StepKind(
        parameters={"bits": one_of(8, default=8)}, predict=predict_by_runtime("static", embeddings=True), calibrated=True
    ),
    ("rotate", "hadamard"): StepKind(parameters={}, predict=_predict_rotated),
    ("distill", "scales"): _tuning("scales", steps=50, learning_rate=0.001),
    ("distill", "qat"): _tuning("qat", steps=100, learning_rate=0.001),
}  # fmt: skip
"""(verb, method) → its kind. Names are the papers' or the field's: rtn is round-to-nearest; hqq Badri & Shaji 2023; gptq arXiv:2210.17323; awq
arXiv:2306.00978; smoothquant arXiv:2211.10438; dynamic and static say how int8 activations get their scale, as ONNX Runtime and NNCF say it."""
