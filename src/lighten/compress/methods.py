"""What each step of a recipe does to the weights: one entry for each (verb, method) that is carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lighten.compress import awq, shrink, smoothquant
from lighten.compress.admm import prune_admm
from lighten.compress.awq import Rounder
from lighten.compress.block import Block, Subset
from lighten.compress.distill_dense import distill_dense
from lighten.compress.factorize import factorize_alone, factorize_correction, factorize_svd
from lighten.compress.fake_quant import STATIC_LARGEST, round_dynamic
from lighten.compress.ggml_search import quantize_ggml, quantize_ggml_together
from lighten.compress.gptq import GptqSettings, layer_error, quantize_gptq
from lighten.compress.grid import QuantizedTensor, Weight
from lighten.compress.hadamard import plan_rotation
from lighten.compress.hqq import quantize_hqq
from lighten.compress.magnitude import global_threshold, prune_magnitude, prune_threshold
from lighten.compress.masks import Keep
from lighten.compress.minifloat import quantize_float
from lighten.compress.reports import weights_of
from lighten.compress.rtn import quantize_rtn
from lighten.compress.scale_search import search_scales
from lighten.compress.scaling import job_mappings, scale_then
from lighten.compress.sparsegpt import prune_sparsegpt
from lighten.compress.stage import Change, Renewed, Stage
from lighten.compress.statistics import InputStatistics, bfloat16_units
from lighten.compress.vocabulary import require_vocabulary, shrink_vocabulary
from lighten.compress.walk import DoBlock, Job, Method, Run, change_weights, walk_blocks
from lighten.compress.wanda import prune_wanda
from lighten.compress.whole import allocate_then, prune_then, tune
from lighten.errors import RecipeError, UnsupportedFamily
from lighten.model.pooling import pools_first_token
from lighten.model.spec import Embedding, Linear, ModelSpec, WeightFormat
from lighten.model.tasks import task_of
from lighten.recipe import Recipe, Step
from lighten.recipe.prune import IN_FOLDER, parse_pattern
from lighten.recipe.quantize import AUTO
from lighten.recipe.sparse import with_counts
from lighten.recipe.steps import selected_names
from lighten.recipe.vocabulary import kept_rows

REPORTED_OUTPUTS = 256
"""Outputs of a layer, evenly spread, that its reported error is measured on: choice; on all of them it took 6 % of the walk (benchmarks/LOG.md)."""


def do_alone(job: Job, names: Iterable[str]) -> tuple[dict[str, Weight], list[dict[str, Any]]]:
    """Weights that no calibration row reaches, such as tables, or an expert that no token met: rounded on the grid of least error of the weight
    itself, factorized by it, or pruned by magnitude."""
    if job.step.verb == "factorize":
        return factorize_alone(job, names)
    alone = _prune_alone if job.step.verb == "prune" else _round_alone
    weights = {name: alone(job, name) for name in names}
    return weights, [{"name": name} for name in weights]


def _prune_alone(job: Job, name: str) -> Weight:
    keep = keep_of(job.step, job.formats[name].sparsity)
    return job.stored(name, prune_magnitude(job.matrix(name, job.value(name)), keep))


def _round_alone(job: Job, name: str) -> Weight:
    weight, format = job.value(name), job.formats[name]
    return round_alone(job.matrix(name, weight), format) if format.bits is not None else _as_float(weight, format)


def round_alone(weight: Tensor, format: WeightFormat) -> Weight:
    """[O, I] rounded to nearest on a searched grid."""
    if format.ggml_type is not None:
        return quantize_ggml(weight.float(), format.ggml_type)
    return search_scales(weight.float(), format=_own(format))


def _as_float(weight: Tensor, format: WeightFormat) -> Tensor:
    """A weight that a format has no codes for, such as one of 16 columns in blocks of 32."""
    dtype: torch.dtype = getattr(torch, format.dtype)
    return weight.to(dtype)


# weight by weight


def by_weight(make: Callable[[Job], Change]) -> Method:
    return lambda job: change_weights(job, make(job))


def _cast(job: Job) -> Change:
    dtype: torch.dtype = getattr(torch, job.step.method)
    return lambda name, weight: weight.to(dtype)


def keep_of(step: Step, sparsity: float | None = None) -> Keep:
    """What a pruning step's arguments ask of each weight. sparsity: of this weight, where it is not the step's."""
    if step["pattern"]:
        return Keep(pattern=parse_pattern(step["pattern"]))
    return Keep(sparsity=step["sparsity"] if sparsity is None else sparsity, scope=step["scope"])


def _magnitude(job: Job) -> Change:
    step = job.step
    prune: Callable[[Tensor], Tensor]
    if step["threshold"]:
        prune = partial(prune_threshold, threshold=step["threshold"])
    elif step["scope"] == "global":
        threshold = global_threshold(lambda: (job.value(name) for name in sorted(job.names)), sparsity=step["sparsity"])
        prune = partial(prune_threshold, threshold=threshold)
    else:
        prune = partial(prune_magnitude, keep=keep_of(step))

    def change(name: str, weight: Tensor) -> Tensor:
        if weight.ndim == 3:  # of all experts
            return torch.stack([change(name, expert) for expert in weight])
        return job.stored(name, prune(job.matrix(name, weight)))

    return change


def _prune_magnitude(job: Job) -> tuple[Stage, ModelSpec]:
    """A threshold leaves as many as it leaves: they are counted."""
    stage, spec = change_weights(job, _magnitude(job))
    if job.step["threshold"] or job.step["scope"] == "global":
        parts = [part for part in spec.parts if isinstance(part, Linear | Embedding) and not job.names.isdisjoint(weights_of(part))]
        kept = {part.name: max(int(_value(stage[name]).count_nonzero()) for name in weights_of(part)) for part in parts}
        spec = with_counts(spec, kept, in_folder=job.run.runtime in IN_FOLDER)
    return stage, spec


def _rtn(job: Job) -> Change:
    def change(name: str, weight: Tensor) -> Weight:
        format = job.formats[name]
        return _nearest(job.matrix(name, weight), format) if format.bits is not None else _as_float(weight, format)

    return change


def _nearest(weight: Tensor, format: WeightFormat) -> Weight:
    if format.ggml_type is not None:
        return quantize_ggml(weight.float(), format.ggml_type)
    if format.element != "int":
        return quantize_float(weight.float(), format=_own(format))
    assert format.bits is not None, "the reading on the spec gave it a width"
    return quantize_rtn(weight, bits=format.bits, group_size=format.group_size, symmetric=format.symmetric)


def _hqq(job: Job) -> Change:
    def change(name: str, weight: Tensor) -> Weight:
        format = job.formats[name]
        assert format.bits is not None, "the reading on the spec gave it a width"
        return quantize_hqq(job.matrix(name, weight).float(), bits=format.bits, group_size=format.group_size)

    return change


def _by_runtime(job: Job) -> tuple[Stage, ModelSpec]:
    """The runtime's own quantizer rounds these weights when the artifact is written, together with its activations: here none is touched."""
    return job.stage, job.after


# block by block


def by_block(do: DoBlock) -> Method:
    return lambda job: walk_blocks(job, do)


def each_subset(solve: Callable[[Job, Block, Subset, InputStatistics], Mapping[str, Weight]]) -> DoBlock:
    """A block's weights, all that share an input at once, in the order in which a forward meets them."""

    def do(job: Job, block: Block) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] = []
        for subset, statistics in block.in_turn():
            before = {name: block.weight(name) for name in subset.names}
            for name, weight in solve(job, block, subset, statistics).items():
                block.put(name, _with_input_scale(weight, statistics, job.formats[name]))
                value = job.matrix(name, weight) if isinstance(weight, Tensor) else weight.dequantize()
                reports.append({"name": name, "rows": statistics.rows, **_errors(before[name], value, statistics)})
        unreached = sorted(block.wanted - block.results.keys())
        if unreached:
            job.run.log(f"{block.name}: no calibration row reaches {', '.join(unreached)}; done by themselves")
            weights, said = do_alone(job, unreached)
            for name, weight in weights.items():
                block.put(name, weight)
            reports += [{**report, "rows": 0} for report in said]
        return reports

    return do


def _solve_gptq(job: Job, block: Block, subset: Subset, statistics: InputStatistics) -> Mapping[str, Weight]:
    settings = _gptq_settings(job.step) if job.step.method == "gptq" else GptqSettings()
    pruned = any(job.formats[name].sparsity for name in subset.names)
    settings = replace(settings, keep_zeros=pruned)
    found: dict[str, Weight] = {}
    by_format: dict[WeightFormat, list[str]] = {}
    for name in subset.names:
        by_format.setdefault(_own(job.formats[name]), []).append(name)
    for format, names in by_format.items():
        weights = {name: block.weight(name) for name in names}
        if format.bits is None:
            found |= {name: _as_float(block.tensor(name), format) for name in names}
        elif not statistics.rows:
            found |= {name: round_alone(weight, format) for name, weight in weights.items()}
        elif format.ggml_type is not None:
            found |= quantize_ggml_together(weights, format.ggml_type, statistics, settings)
        else:
            found |= quantize_gptq(weights, statistics, format, settings)
    return found


def _solve_pruned(job: Job, block: Block, subset: Subset, statistics: InputStatistics) -> Mapping[str, Weight]:
    weights = {name: block.weight(name) for name in subset.names}
    keeps = {name: keep_of(job.step, job.formats[name].sparsity) for name in weights}
    if not statistics.rows:
        pruned = {name: prune_magnitude(weight, keeps[name]) for name, weight in weights.items()}
    else:
        damping = job.step["damping"]
        settings = {} if damping is None else {"damping": None if damping == AUTO else damping}
        pruned = PRUNERS[job.step.method](weights, statistics, keeps, **settings)
    return {name: job.stored(name, weight) for name, weight in pruned.items()}


PRUNERS: dict[str, Callable[..., dict[str, Tensor]]] = {"wanda": prune_wanda, "sparsegpt": prune_sparsegpt, "admm": prune_admm}


def _gptq_settings(step: Step) -> GptqSettings:
    return GptqSettings(damping=None if step["damping"] == AUTO else step["damping"], refine=step["refine"], search=step["search"])


def _solve_nearest(job: Job, block: Block, subset: Subset, statistics: InputStatistics) -> Mapping[str, Weight]:
    return {name: _nearest(block.weight(name), job.formats[name]) for name in subset.names}


def _solve_clipped(job: Job, block: Block, subset: Subset, statistics: InputStatistics) -> Mapping[str, Weight]:
    """To the nearest, of each group's range as much as leaves the least error."""
    found: dict[str, Weight] = {}
    for name in subset.names:
        rounded, format = _rounder(job, name), job.formats[name]
        cut = awq.clip(block.weight(name), hessian=statistics.hessian, group_size=format.group_size, round_to=rounded)
        found[name] = _nearest(cut, format)
    return found


def _rounder(job: Job, name: str) -> Rounder:
    format = job.formats.get(name)
    return (lambda weight: _value(_nearest(weight, format))) if name in job.names and format is not None else (lambda weight: weight)


def _value(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def _awq(job: Job) -> tuple[Stage, ModelSpec]:
    return walk_blocks(job, scale_then(awq.search_scales, _rounder, each_subset(_solve_clipped), job_mappings(job)))


def _smoothquant(job: Job) -> tuple[Stage, ModelSpec]:
    step = job.step
    rounded = (
        partial(round_dynamic, element="int", zero_points=not step["symmetric_activations"], group_size=step["activation_group_size"])
        if step["activations"] == "dynamic" else None
    )  # fmt: skip
    choose = partial(smoothquant.smooth_scales, alpha=step["alpha"], round_inputs=rounded)
    return walk_blocks(job, scale_then(choose, _rounder, each_subset(_solve_gptq), job_mappings(job)))


def _own(format: WeightFormat) -> WeightFormat:
    """A format as the solvers compare it: what pruning left and how activations are computed with does not concern them."""
    return replace(format, sparsity=0.0, activations=None, activation_zero_points=False, activation_group_size=None)


def _with_input_scale(weight: Weight, statistics: InputStatistics, format: WeightFormat) -> Weight:
    if format.activations != "static" or not isinstance(weight, QuantizedTensor):
        return weight
    scale = (statistics.abs_max.amax() / STATIC_LARGEST[format.element]).clamp(min=torch.finfo(torch.float32).tiny)
    return replace(weight, input_scale=scale.reshape(1))


def _errors(before: Tensor, value: Tensor, statistics: InputStatistics) -> dict[str, float]:
    """Error of the output relative to the output, in root mean square, over at most `REPORTED_OUTPUTS` outputs; three digits of it.

    Args:
        before, value: [O, I].
    """
    step = -(-len(before) // REPORTED_OUTPUTS)
    before, value = before[::step], value[::step]

    def relative(hessian: Tensor) -> float:
        whole = layer_error(before, torch.zeros_like(before), hessian).sum()
        return float((layer_error(before, value, hessian).sum() / whole.clamp(min=1e-30)).clamp(min=0).sqrt())

    with bfloat16_units():
        found = {"output_error": relative(statistics.hessian)}
        return found | ({"held_out_error": relative(statistics.held_out)} if statistics.held_out is not None else {})


def _calibrated_where_static(make: Callable[[Job], Change], solve: DoBlock) -> Method:
    """A method that looks at weights alone, but where static activations want their scale."""

    def do(job: Job) -> tuple[Stage, ModelSpec]:
        return walk_blocks(job, solve) if job.step["activations"] == "static" else change_weights(job, make(job))

    return do


def _hadamard(job: Job) -> tuple[Stage, ModelSpec]:
    rotation = plan_rotation(job.graph, job.skeleton().places)
    rotation.check(job.value)
    return Renewed(before=job.stage, renewal=rotation), job.after


def require_possible(run: Run, spec: ModelSpec, recipe: Recipe) -> None:
    """Raises, before any work:
    UnsupportedFamily: a step on experts in one tensor of three dimensions that has to take it apart.
    TraceError: a step follows the model's graph, and its code cannot be followed without values.
    RecipeError: a rotation that does not pass through the model, or channels that the graph does not tell apart; labels that name tokens or their
        places, after tokens went.
    ModelError: a pooling of embeddings that is not known here.
    """
    _refuse_around_factors(recipe)
    _refuse_other_words(spec, recipe)
    if any((step.verb, step.method) == ("distill", "embeddings") for step in recipe.steps):
        pools_first_token(run.folder)
    cuts = [step for step in recipe.steps if (step.verb, step.method) == ("shrink", "vocab")]
    for step in cuts[:1]:
        require_vocabulary(run, spec, kept_rows(spec, dict(step.arguments)))
    for step in recipe.steps:
        _refuse_stacked(spec, step)
        if step.method in FOLLOW_THE_GRAPH:
            graph = run.graph(spec)
            if step.verb == "rotate":
                plan_rotation(graph)
        after = step.kind.predict(spec, {**dict(step.arguments), "runtime": recipe.runtime})
        if step.verb == "shrink" and step.method in ("ffn", "heads", "width"):
            shrink.require_cuts(partial(run.graph, spec), spec, after, f"{step.verb}({step.method})")
        spec = after


def _refuse_other_words(spec: ModelSpec, recipe: Recipe) -> None:
    """Raises:
    RecipeError: labels that name tokens, after a step that changes their numbers.
    """
    cut = False
    for step in recipe.steps:
        cut |= (step.verb, step.method) == ("shrink", "vocab")
        if cut and step["labels"] and task_of(spec) in ("next", "span"):
            raise RecipeError(f"{step}: labels name tokens or their places, which shrink(vocab) changes; put it after this step.")


FOLLOW_THE_GRAPH = ("awq", "smoothquant", "hadamard")
"""Methods that move numbers from one weight into another along the model's graph."""
SCALED = ("awq", "smoothquant")
"""Those that do so and quantize at once."""


WHOLE_TENSORS = {
    ("prune", "magnitude"), ("rotate", "hadamard"), ("quantize", "kv"), *(("shrink", what) for what in ("layers", "vocab", "heads", "width")),
}  # fmt: skip
"""Steps that leave experts in one tensor, or change all of them alike."""


def _refuse_stacked(spec: ModelSpec, step: Step) -> None:
    """Raises:
    UnsupportedFamily: a step that looks at each expert of those in one tensor.
    """
    stacked = {part.name: part for part in spec.parts if isinstance(part, Linear) and part.in_one_tensor}
    if not stacked or step.verb in ("cast", "distill") or (step.verb, step.method) in WHOLE_TENSORS:
        return
    by_target = step.verb in ("prune", "quantize", "factorize") and step.method not in FOLLOW_THE_GRAPH and "targets" in step.kind.parameters
    if by_target and stacked.keys().isdisjoint(selected_names(spec, dict(step.arguments))):
        return
    first = next(iter(next(iter(stacked.values())).tensors()))
    raise UnsupportedFamily(
        f"{step}: {spec.name} ({spec.architecture}) keeps the experts of a layer in one tensor ({first}), which this step does not take apart; "
        f"{'narrow its targets to other weights' if by_target else 'use another step'}. cast, prune(magnitude), distill, rotate and "
        "shrink of layers, heads, width and vocab can be done."
    )


def _refuse_around_factors(recipe: Recipe) -> None:
    """Raises:
    RecipeError: a step that cannot be done after factorize, or before a correction.
    """
    for number, step in enumerate(recipe.steps):
        before, after = recipe.steps[:number], recipe.steps[number + 1 :]
        if (step.verb, step.method) == ("shrink", "vocab"):
            if (other := next((each for each in after if each.method == "vocab"), None)) is not None:
                raise RecipeError(f"{other} cannot follow {step}: the original has other tokens; leave one of them out.")
            continue
        if step.verb != "factorize":
            continue
        if step.method == "correction" and (other := next((each for each in after if each.verb == "distill"), None)) is not None:
            raise RecipeError(f"{other} compares with the original, which has nothing in the place of what {step} adds; put it before.")
        if step.method == "correction" and (other := next((each for each in before if each.method in SCALED), None)) is not None:
            said = f"{step} is measured against the weights before they were quantized, which {other} scales"
            raise RecipeError(f"{said}; quantize by gptq, rtn or hqq.")


def moves_weights(step: Step) -> bool:
    """Whether weights after a step are not to be compared with those before, one by one."""
    return step.verb in ("rotate", "factorize", "shrink") or step.method in ("logits", "embeddings")


METHODS: dict[tuple[str, str], Method] = {
    **{("cast", dtype): by_weight(_cast) for dtype in ("float32", "float16", "bfloat16")},
    ("prune", "magnitude"): _prune_magnitude,
    **{("prune", method): prune_then(each_subset(_solve_pruned)) for method in PRUNERS},
    ("quantize", "rtn"): _calibrated_where_static(_rtn, each_subset(_solve_nearest)),
    ("quantize", "hqq"): by_weight(_hqq),
    ("quantize", "gptq"): by_block(each_subset(_solve_gptq)),
    ("quantize", "awq"): _awq,
    ("quantize", "smoothquant"): _smoothquant,
    ("quantize", "auto"): allocate_then(each_subset(_solve_gptq)),
    ("quantize", "kv"): lambda job: (job.stage, job.after),
    ("quantize", "dynamic"): _by_runtime,
    ("quantize", "static"): _by_runtime,
    ("rotate", "hadamard"): _hadamard,
    ("shrink", "vocab"): shrink_vocabulary,
    ("factorize", "svd"): factorize_svd(_errors),
    ("factorize", "correction"): factorize_correction(_errors),
    ("distill", "scales"): tune,
    ("distill", "qat"): tune,
    ("distill", "logits"): distill_dense,
    ("distill", "embeddings"): distill_dense,
    **shrink.METHODS,
}
