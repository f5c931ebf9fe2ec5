"""What each step of a recipe gave: numbers of a spec after it, as the recipe predicted it and as it was done, and what its pass measured. And what it
took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lighten.compress.clock import WRITING
from lighten.compress.journal import Journal
from lighten.compress.training_time import TrainingTime
from lighten.device.probe import cpu_name
from lighten.model.low_rank import CORRECTION, RANKS
from lighten.model.read import SIDE_FILES, weight_files
from lighten.model.spec import Embedding, Linear, ModelSpec
from lighten.recipe import Recipe
from lighten.recipe.predict import artifact_bytes, in_format, specs_of
from lighten.recipe.size import part_size

SAID = ("output_error", "held_out_error")
"""What passes over blocks report of each weight (`compress.walk.LayerReport`)."""

PREDICTED = ("parameters", "zeros", "size_bytes")


def spec_facts(spec: ModelSpec, runtime: str) -> dict[str, Any]:
    """What a spec says of the model after a step.

    `zeros` is the share of all parameters that pruning made zero; `bits` the mean width of the codes, None where nothing is quantized; `ranks` the
    least and the largest rank of what was factorized or corrected; `components` bytes by component, without what a file says of itself.
    """
    weights = [(part.weight, part.parameters) for part in spec.parts if isinstance(part, Linear | Embedding) and part.parameters]
    coded = [(weight.bits, count) for weight, count in weights if weight.bits is not None]
    ranks = [*spec.config.get(RANKS, {}).values(), *spec.config.get(CORRECTION, {}).values()]
    components: dict[str, int] = {}
    for part in spec.parts:
        if part.parameters:
            components[part.component] = components.get(part.component, 0) + part_size(part, spec.dtype, runtime)
    return {
        "parameters": spec.total_parameters,
        "zeros": sum(weight.sparsity * count for weight, count in weights) / max(1, spec.total_parameters),
        "bits": sum(bits * count for bits, count in coded) / sum(count for _, count in coded) if coded else None,
        "ranks": [min(ranks), max(ranks)] if ranks else None,
        "size_bytes": artifact_bytes(Recipe(runtime=runtime), spec), "components": components,
    }  # fmt: skip


def facts_before(spec: ModelSpec, recipe: Recipe, source: Path) -> dict[str, Any]:
    """The model before all steps; its size is that of its files, as they lie in its folder."""
    files = [*weight_files(source), *(source / name for name in SIDE_FILES if (source / name).is_file())]
    return spec_facts(in_format(spec, recipe.runtime), recipe.runtime) | {"size_bytes": sum(path.stat().st_size for path in files)}


def facts_of_steps(spec: ModelSpec, recipe: Recipe, done: Sequence[ModelSpec], journal: Journal) -> Iterator[dict[str, Any]]:
    """Of each step: what the recipe predicted before all work, what it became, and the mean of what its pass reported of the weights.

    Args:
        spec: before all steps.
        done: after each step, with what was measured in it.
    """
    _, *predicted = specs_of(recipe, spec)
    for number, (step, foreseen, after) in enumerate(zip(recipe.steps, predicted, done, strict=True)):
        reports, said = journal.reports(number), spec_facts(foreseen, recipe.runtime)
        yield {
            "step": str(step), **spec_facts(in_format(after, recipe.runtime), recipe.runtime), "predicted": {key: said[key] for key in PREDICTED},
            **{key: _mean(reports, key) for key in SAID},
        }  # fmt: skip


def run_facts(recipe: Recipe, journal: Journal, times: Sequence[TrainingTime | None], *, predicted_peak_bytes: int) -> dict[str, Any]:
    """How a run went: what differs from one run of the same to the next. Seconds are those of all its processes, and of a killed one up to its last
    finished block.

    Args:
        times: what each step was predicted to take; None where that was not known.
    """
    spent = journal.clock.spent()
    none: dict[str, Any] = {"seconds": 0.0, "peak_bytes": None}
    each = [spent.get(str(number), none) for number in range(len(recipe.steps))]
    steps = [
        {"step": str(step), "seconds": took["seconds"], "peak_memory_bytes": took["peak_bytes"], "predicted": time and time.as_json()}
        for step, took, time in zip(recipe.steps, each, times, strict=True)
    ]
    return {
        "seconds": sum(took["seconds"] for took in spent.values()), "writing_seconds": spent.get(WRITING, none)["seconds"],
        "peak_memory_bytes": journal.clock.peak_bytes, "predicted": {"peak_memory_bytes": predicted_peak_bytes}, "steps": steps,
        "resumed": journal.resumed, "processor": cpu_name(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _mean(reports: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Of the weights that say it; None where none does."""
    said = [float(report[key]) for report in reports if report.get(key) is not None]
    return sum(said) / len(said) if said else None
