"""Steps that look at the whole model at once: widths by measured sensitivity, and tuning what is quantized against the original.

Weights come block by block here too; what tuning changes, all codes among it, is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from lighten.compress.allocate import choose_formats
from lighten.compress.distill_scales import Task, TuneSettings, tune_scales
from lighten.compress.fake_quant import simulating
from lighten.compress.grid import QuantizedTensor, Weight
from lighten.compress.memory_plan import SELF_LENGTH, SELF_PREFIX, SENSITIVITY_WINDOW, release_free
from lighten.compress.qat import train_codes
from lighten.compress.ratios import choose_kept
from lighten.compress.reports import weights_of
from lighten.compress.self_text import prefixes_of, sample_text
from lighten.compress.sensitivity import Sensitivity, measure_sensitivity, option_errors
from lighten.compress.skeleton import Skeleton
from lighten.compress.stage import Journaled, Stage
from lighten.compress.walk import DoBlock, Job, inputs_of, reference_value, walk_blocks
from lighten.model.spec import Embedding, Linear, ModelSpec, WeightFormat
from lighten.model.tasks import LABELS
from lighten.recipe.automatic import Budget, budget, with_formats
from lighten.recipe.number_formats import dividing_group
from lighten.recipe.prune import IN_FOLDER, UNIFORM
from lighten.recipe.sparse import size_of, with_counts

PROBE_BITS, PROBE_GROUP = 4, 64
"""How each weight is rounded to measure what its rounding costs; other widths follow from it. Choice: the commonest format."""
SENSITIVITY_TOKENS = 2048
"""Tokens of the backward passes. Two passes differ from eight by 16 % of a weight's sensitivity, where a bit more or less changes it by
a factor of four: SmolLM2-135M, benchmarks/LOG.md."""

ALL = "all"


def allocate_then(do: DoBlock) -> Callable[[Job], tuple[Stage, ModelSpec]]:
    """Choose each weight's width under the step's limit, then quantize block by block."""

    def method(job: Job) -> tuple[Stage, ModelSpec]:
        limits = budget(job.before, {**dict(job.step.arguments), "runtime": job.run.runtime})
        journal = job.run.journal
        if not journal.has(job.number, "allocation"):
            formats = choose_formats(limits, _errors(job, limits))
            places = {name: [option.format for option in limits.options[name]].index(format) for name, format in formats.items()}
            journal.write(job.number, "allocation", {}, [{"option": places}])
        chosen: dict[str, int] = journal.read(job.number, "allocation").reports[0]["option"]
        formats = {name: limits.options[name][place].format for name, place in chosen.items()}
        return walk_blocks(replace(job, after=with_formats(job.before, formats)), do)

    return method


def prune_then(do: DoBlock) -> Callable[[Job], tuple[Stage, ModelSpec]]:
    """Choose how many zeros each weight gets, where they are not to be spread evenly, then prune block by block."""

    def method(job: Job) -> tuple[Stage, ModelSpec]:
        if job.step["allocation"] == UNIFORM:
            return walk_blocks(job, do)
        journal = job.run.journal
        if not journal.has(job.number, "allocation"):
            parts = [part for part in job.before.parts if isinstance(part, Linear | Embedding) and not job.names.isdisjoint(weights_of(part))]
            tensors = {part.name: weights_of(part) for part in parts}
            sizes = {part.name: prod(size_of(part)) for part in parts}
            seen = _seen(job, tensors)
            kept = choose_kept(sizes, job.step["sparsity"], seen, tensors, lambda name: job.matrix(name, job.value(name)))
            journal.write(job.number, "allocation", {}, [{"kept": kept}])
        kept = journal.read(job.number, "allocation").reports[0]["kept"]
        return walk_blocks(replace(job, after=with_counts(job.after, kept, in_folder=job.run.runtime in IN_FOLDER)), do)

    return method


def _errors(job: Job, limits: Budget) -> dict[str, list[float]]:
    """What each weight's options cost."""
    tensors = {part.name: weights_of(part) for part in job.before.parts if part.name in limits.options}
    return option_errors(limits, _seen(job, tensors), job.value, tensors, matrix=job.matrix)


def _seen(job: Job, tensors: Mapping[str, Sequence[str]]) -> dict[str, Sensitivity]:
    """What a few backward passes tell of each matrix of some modules."""
    skeleton = job.skeleton(dtype=torch.bfloat16)
    shapes = {name: job.matrix(name, job.value(name)).shape for names in tensors.values() for name in names}
    probes = {name: WeightFormat(bits=PROBE_BITS, group_size=dividing_group(shape[1], PROBE_GROUP), symmetric=True) for name, shape in shapes.items()}
    job.run.log("measuring what an error in each weight costs")
    return measure_sensitivity(skeleton, job.value, _short(job, skeleton), probes, matrix=job.matrix)


def _short(job: Job, skeleton: Skeleton) -> list[dict[str, Any]]:
    """Single sequences of at most `SENSITIVITY_WINDOW` positions, cut where they are plain tokens."""
    found = []
    for batch in job.run.batches(min(SENSITIVITY_TOKENS, job.step["tokens"])):
        used = {name: value for name, value in batch.items() if name not in LABELS or not job.before.is_decoder}
        rows = [{name: value[row : row + 1] for name, value in used.items()} for row in range(len(next(iter(used.values()))))]
        for row in rows:
            pieces = torch.split(row["input_ids"], SENSITIVITY_WINDOW, dim=1) if row.keys() == {"input_ids"} else ()
            found += [{"input_ids": piece} for piece in pieces if piece.shape[1] > 1] or [row]
    return [inputs_of(skeleton.module, row) for row in found]


def tune(job: Job) -> tuple[Stage, ModelSpec]:
    """distill(scales) and distill(qat)."""
    journal = job.run.journal
    if not journal.has(job.number, ALL):
        release_free()
        skeleton = job.skeleton()
        changed = {name: job.stage[name] for name in job.stage.names if job.stage.touched(name)}
        told: list[Mapping[str, Any]] = []
        task = Task(
            skeleton=skeleton, source=partial(reference_value, job), weights=changed,
            transposed=job.transposed, batches=[inputs_of(skeleton.module, batch) for batch in texts(job, skeleton, reference_value)],
            folder=journal.scratch, fixed_len=job.before.fixed_len or 1, pruned=pruned_names(job.before),
            rounding=partial(simulating, skeleton.module, job.before, _input_scales(changed)),
            log=job.run.log, tell=told.append,
        )  # fmt: skip
        settings = TuneSettings(steps=job.step["steps"], learning_rate=job.step["learning_rate"])
        done: Mapping[str, Weight] = tune_scales(task, settings) if job.step.method == "scales" else train_codes(task, settings)
        reports = [{"step": str(job.step), **said} for said in told]
        journal.write(job.number, ALL, {name: _as_stored(job, name, weight) for name, weight in done.items()}, reports)
    found = journal.read(job.number, ALL)
    job.run.curves.extend(found.reports)
    names = found.weights
    return Journaled(before=job.stage, journal=journal, pass_index=job.number, blocks=dict.fromkeys(names, ALL)), job.after


def pruned_names(spec: ModelSpec) -> frozenset[str]:
    """The weights whose zeros are to stay."""
    found = (part for part in spec.parts if isinstance(part, Linear | Embedding) and part.weight.sparsity > 0)
    return frozenset(name for part in found for name in weights_of(part))


def texts(job: Job, skeleton: Skeleton, value: Callable[[Job, str], Tensor]) -> list[dict[str, Tensor]]:
    """The calibration text, and as many tokens of the original's own as are asked for, as the vocabulary that is left spells them.

    Args:
        skeleton: of the original, or of what stands for it.
        value: its tensors, `original_value` or `reference_value`.
    """
    batches = job.run.batches(job.step["tokens"])
    length = min(SELF_LENGTH, job.before.max_positions or SELF_LENGTH)
    if count := -(-(job.step["self_tokens"] or 0) // length):
        stream = torch.cat([batch["input_ids"].reshape(-1) for batch in batches])
        starts = prefixes_of(stream, count=count, length=min(SELF_PREFIX, len(stream), length // 2))
        written = job.run.written
        own = value is reference_value and job.reference is not job.run.original
        if (key := (length, own, starts.numpy().tobytes())) not in written:
            job.run.log(f"the original writes {count} texts of {length} tokens")
            asked = starts if own else job.run.in_old_ids({"input_ids": starts})["input_ids"]
            found = sample_text(skeleton, partial(value, job), asked, length=length)
            written[key] = found if own else torch.cat([job.run.in_new_ids("input_ids", row[None]) for row in found])
        batches.append({"input_ids": written[key]})
    return batches


def _input_scales(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The scale of static activations by the name of the linear."""
    scales = {name: weight.input_scale for name, weight in weights.items() if isinstance(weight, QuantizedTensor)}
    return {name.removesuffix(".weight"): scale for name, scale in scales.items() if scale is not None}


def _as_stored(job: Job, name: str, weight: Weight) -> Weight:
    before = job.stage[name]
    return weight.to(before.dtype) if isinstance(weight, Tensor) and isinstance(before, Tensor) else weight
