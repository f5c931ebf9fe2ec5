"""A recipe's first reading: what the model becomes, before any weight is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lighten.errors import RecipeError
from lighten.model.read import FLOAT_DTYPES
from lighten.model.spec import Embedding, Linear, ModelSpec, Part, part_weight_bytes
from lighten.recipe.options import check_model
from lighten.recipe.recipe import Recipe, Step
from lighten.recipe.size import CONTAINER_BASE_BYTES, CONTAINER_BYTES, artifact_size
from lighten.recipe.targets import RUNTIMES, carries, refuse_mixture
from lighten.units import dtype_bytes

__all__ = [
    "CONTAINER_BASE_BYTES", "CONTAINER_BYTES", "apply_recipe", "apply_step", "artifact_bytes", "compute_dtype", "in_format", "loaded_weight_bytes",
    "specs_of",
]  # fmt: skip


CACHES_CODES = ("torch",)
"""Runtimes whose cache of keys and values lighten makes itself."""


def apply_recipe(recipe: Recipe, spec: ModelSpec) -> ModelSpec:
    """The spec after all steps, checked against what the runtime carries.

    Raises:
        RecipeError: a step that this model or the runtime cannot take; what exists is named.
    """
    kind = RUNTIMES[recipe.runtime]
    before, *after = specs_of(recipe, spec)
    spec = after[-1] if after else before
    given = {part.name: part.weight for part in before.parts if isinstance(part, Linear | Embedding)} if not kind.exported else {}
    check_model(dict(recipe.options), spec, coded_cache=recipe.kv_dtype is not None)
    if recipe.kv_dtype is not None and recipe.runtime not in CACHES_CODES:
        raise RecipeError(f"runtime {recipe.runtime} has a cache of its own; quantize(kv) is for {', '.join(CACHES_CODES)}.")
    for part in spec.parts:
        if not isinstance(part, Linear | Embedding) or part.weight == given.get(part.name):
            continue  # as the checkpoint has it, which is no artifact of ours
        if not carries(recipe.runtime, part.weight, decoder=spec.is_decoder):
            raise RecipeError(
                f"runtime {recipe.runtime} cannot carry {part.name} as {format_text(part)}; "
                f"it carries {' and '.join(kind.stored)} weights, and {kind.formats}."
            )
    refuse_mixture(recipe.runtime, spec)
    return spec


def specs_of(recipe: Recipe, spec: ModelSpec) -> Iterator[ModelSpec]:
    """The spec as the runtime's format has it, and after each step.

    Raises:
        RecipeError: a step that this model cannot take.
    """
    spec = in_format(spec, recipe.runtime)
    yield spec
    for step in recipe.steps:
        spec = apply_step(step, spec, recipe.runtime)
        yield spec


def in_format(spec: ModelSpec, runtime: str) -> ModelSpec:
    """A spec as a runtime's format has it: in float32 where it is exported and the format does not store its type."""
    kind = RUNTIMES[runtime]
    return _widened(spec, kind.stored) if kind.exported else spec


def apply_step(step: Step, spec: ModelSpec, runtime: str) -> ModelSpec:
    """The spec after one step of a recipe for a runtime.

    Raises:
        RecipeError: a step that this model cannot take.
    """
    return step.kind.predict(spec, {**dict(step.arguments), "runtime": runtime})


def _widened(spec: ModelSpec, stored: tuple[str, ...]) -> ModelSpec:
    """A checkpoint as an export writes it: in float32 where the format does not store its type. What a step asks for is not widened."""

    def widened(part: Part) -> Part:
        if isinstance(part, Linear | Embedding) and part.weight.bits is None and part.weight.dtype in set(FLOAT_DTYPES) - set(stored):
            return replace(part, weight=replace(part.weight, dtype="float32"))
        return part

    return replace(spec.with_parts(widened), dtype=spec.dtype if spec.dtype in stored else "float32")


def format_text(part: Linear | Embedding) -> str:
    """A weight's format in words."""
    weight = part.weight
    if weight.bits is None:
        return weight.dtype
    if weight.ggml_type is not None:
        return f"ggml's {weight.ggml_type}"
    codes = "codes" if weight.element == "int" else f"floats ({weight.element})"
    group = {-1: "by channel", 0: "by tensor"}.get(weight.group_size, f"by groups of {weight.group_size}")
    inputs = "int8" if weight.element == "int" else "fp8"
    if not weight.activations:
        return f"{weight.bits}-bit {codes} {group}"
    asymmetric = "asymmetric " if weight.activation_zero_points else ""
    by = "" if weight.activation_group_size is None else f" by groups of {weight.activation_group_size}"
    return f"{weight.bits}-bit {codes} {group} with {weight.activations} {asymmetric}{inputs} activations{by}"


def compute_dtype(recipe: Recipe, spec: ModelSpec) -> str:
    """The type that the runtime computes in: the recipe's word, else that of the weights where the runtime computes in it, else its default."""
    kind = RUNTIMES[recipe.runtime]
    types = kind.types_on(recipe.device)
    return recipe.dtype or (spec.dtype if spec.dtype in types else types[0])


def artifact_bytes(recipe: Recipe, spec: ModelSpec) -> int:
    """Bytes on disk of the artifact of a spec that `apply_recipe` gave: weights as stored, side files, and the container's own description."""
    return artifact_size(spec, recipe.runtime)


def loaded_weight_bytes(recipe: Recipe, spec: ModelSpec) -> int:
    """Bytes of the weights at the fullest moment of loading them.

    torch expands every code to the type that it computes in, and holds the expanded tensors until the module has its own copies.
    """
    if recipe.runtime not in ("torch", "torch-compile"):
        return sum(part_weight_bytes(part, spec.dtype) for part in spec.parts)
    quantized = any(isinstance(part, Linear | Embedding) and part.weight.bits is not None for part in spec.parts)
    return round((2 if quantized else 1) * spec.total_parameters * dtype_bytes(compute_dtype(recipe, spec)))
