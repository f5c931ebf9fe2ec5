"""Structured removal carried out: which channels, blocks or experts go, and the smaller tensors.

Inner features and heads go block by block: those whose loss the layer behind them can make up for best, and that layer is solved for anew
(`structured`), so that the next block is chosen on what the smaller ones before it give. Channels that one norm runs over, such as the stream
between the blocks, are chosen once for the whole model; the blocks are then seen with zeros in their place. Shapes change at the end, when a
tensor is asked for (`smaller`).

Where an RMSNorm's channels D become D', the mean over fewer, with eps · D/D' and a weight times √(D/D'), is what it was over all with zeros:

    w √(D/D') x / √(Σx²/D' + eps D/D')  =  w x / √(Σx²/D + eps)

A LayerNorm's mean and variance over fewer channels are not those over all with zeros: there the same factor is right only where the mean is 0.

Source: block influence, ShortGPT (arXiv:2403.03853, eq. 1); the score of a channel of the stream, Wanda's |w| ‖x‖ (arXiv:2306.11695, eq. 1), as a
share of each layer's output; that experts are judged by how much they are routed to and put out, REAP (arXiv:2510.13999, eq. 9), here without the
router's weight, which is inside of the module.

Shape legend: O rows (output features), I columns (input features), C channels of a set, D channels of the stream, T tokens of a batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lighten.compress.admm import Spectrum
from lighten.compress.block import Block, Subset
from lighten.compress.channels import ChannelSet, find_sets
from lighten.compress.graph import Graph
from lighten.compress.look import look_at_blocks
from lighten.compress.mappings import Channels, names_by_key
from lighten.compress.reports import weights_of
from lighten.compress.skeleton import Place, Skeleton
from lighten.compress.smaller import Masked, Smaller, joined
from lighten.compress.stage import Stage
from lighten.compress.statistics import InputStatistics
from lighten.compress.structured import damped, group_costs, keep_groups, refit
from lighten.compress.walk import Job, walk_blocks
from lighten.compress.width_constants import constant_factors
from lighten.errors import RecipeError
from lighten.model.low_rank import DOWN, RANKS, UP
from lighten.model.spec import Attention, Embedding, Linear, ModelSpec, Norm, block_name
from lighten.recipe.prune import IN_FOLDER
from lighten.recipe.shrink import keep_blocks, kept_count, origin_of, spread_evenly, stacks_of
from lighten.recipe.sparse import with_counts

CHOICE = "choice"
"""The journal's block of what is chosen for the whole model."""

# ---- which sets become smaller ----


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A set that loses channels.

    Attributes:
        kept: how many channels stay.
        consumers: weights of linears that sum over it, and the channel of each of their columns.
        local: all of it lies in one block, and no norm runs over it.
    """

    set: ChannelSet
    kept: int
    consumers: Mapping[str, Tensor]
    local: bool


def plan_cuts(graph: Graph, places: Mapping[str, Place], before: ModelSpec, after: ModelSpec, step: str) -> tuple[Cut, ...]:
    """The sets that have to become smaller so that a model has the shapes of another spec.

    Raises:
        RecipeError: the graph does not tell which rows and columns go together.
    """
    try:
        return _plan(find_sets(graph, places), before, after, step)
    except RecipeError:
        if not any(isinstance(part, Attention) and part.num_key_value_heads == 1 for part in before.parts):
            raise
    return _plan(find_sets(graph, places, grouped=False), before, after, step)


def _plan(sets: Sequence[ChannelSet], before: ModelSpec, after: ModelSpec, step: str) -> tuple[Cut, ...]:
    old, new = _shapes(before), _shapes(after)
    changed = {
        (name, axis - len(shape)): (size, smaller)
        for name, shape in old.items() if name in new
        for axis, (size, smaller) in enumerate(zip(shape, new[name], strict=True)) if size != smaller
    }  # fmt: skip
    found = []
    for each in sets:
        counts = {_kept_channels(end, changed, each.channels) for end in each.ends if end.name in new and (end.name, end.axis) in changed}
        if not counts:
            continue
        kept = counts.pop()
        whole = all((end.name, end.axis) in changed for end in each.ends if end.name in new)
        if counts or kept is None or not whole:
            raise RecipeError(_not_told(step, before, each.ends[0].name))
        found.append(_cut(each, kept, before, {name: len(shape) for name, shape in old.items()}))
    covered = {(end.name, end.axis) for cut in found for end in cut.set.ends}
    if missing := sorted(name for name, axis in changed if (name, axis) not in covered):
        raise RecipeError(_not_told(step, before, missing[0]))
    return tuple(found)


def _not_told(step: str, spec: ModelSpec, name: str) -> str:
    return f"{step}: the graph of {spec.name} ({spec.architecture}) does not tell which rows or columns of {name} go together with what else."


def _kept_channels(end: Channels, changed: Mapping[tuple[str, int], tuple[int, int]], channels: int) -> int | None:
    """Channels that stay where an axis gets its new size; None: that is no whole number of them."""
    size, smaller = changed[end.name, end.axis]
    each = torch.bincount(end.channel[end.channel >= 0], minlength=channels)
    if len(end.channel) != size or bool((end.channel < 0).any()) or bool((each != each[0]).any()) or smaller % int(each[0]):
        return None
    return smaller // int(each[0])


def _cut(each: ChannelSet, kept: int, before: ModelSpec, ranks: Mapping[str, int]) -> Cut:
    linears = {name for part in before.parts if isinstance(part, Linear) for name in weights_of(part)}
    consumers = {
        end.name: end.channel for end in each.ends if (end.name, end.axis) in each.consumers and end.name in linears and ranks[end.name] == 2
    }
    blocks = {_block_of(end.name) for end in each.ends}
    return Cut(set=each, kept=kept, consumers=consumers, local=not each.normed and len(blocks) == 1 and len(consumers) == 1)


def _block_of(name: str) -> str | None:
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else None


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {name: shape for part in spec.parts for name, shape in part.tensors().items()}


# ---- channels ----


def shrink_channels(job: Job) -> tuple[Stage, ModelSpec]:
    """shrink(ffn), shrink(heads) and shrink(width)."""
    cuts = plan_cuts(job.graph, job.skeleton().places, job.before, job.after, _said(job))
    scales = _scales(job, cuts)
    journal = job.run.journal
    if not journal.has(job.number, CHOICE):
        chosen = _choose_at_once(job, {index: cut for index, cut in enumerate(cuts) if not cut.local})
        journal.write(job.number, CHOICE, {}, [{"cut": index, "kept": kept.tolist()} for index, kept in chosen.items()])
    kept = _kept_in(job, [CHOICE])
    zeros = joined(
        (end.name, end.axis, _indices(end, kept[index], gone=True)) for index, cut in enumerate(cuts) if cut.set.normed for end in cut.set.ends
    )
    refitted = {name: index for index, cut in enumerate(cuts) if not cut.set.normed for name in cut.consumers}
    stage: Stage = Masked(before=job.stage, zeros=zeros) if zeros else job.stage
    if refitted:
        seen = replace(job, stage=stage, only=frozenset(refitted))
        stage, _ = walk_blocks(seen, partial(_refit_block, cuts=cuts, refitted=refitted, given=kept))
        kept = _kept_in(job, [CHOICE, *journal.blocks(job.number)])
    for index, cut in enumerate(cuts):
        if index not in kept:  # no calibration row reaches it
            kept[index] = _best(_weight_scores(job, cut), cut.kept)
    return replace(_cut_down(job, stage, cuts, kept), scales=scales), job.after


def _said(job: Job) -> str:
    return f"{job.step.verb}({job.step.method})"


def _kept_in(job: Job, blocks: Sequence[str]) -> dict[int, Tensor]:
    """What the journal has of the channels that stay, by the number of the cut."""
    reports = (report for block in blocks for report in job.run.journal.read(job.number, block).reports)
    return {int(report["cut"]): torch.tensor(report["kept"], dtype=torch.int64) for report in reports if "cut" in report}


def _indices(end: Channels, kept: Tensor, *, gone: bool = False) -> Tensor:
    """Indices of an axis that stay, or that go."""
    stays = torch.isin(end.channel, kept)
    return (~stays if gone else stays).nonzero().flatten()


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` highest scores, rising; of equal ones the lower."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _cut_down(job: Job, stage: Stage, cuts: Sequence[Cut], kept: Mapping[int, Tensor]) -> Smaller:
    """The tensors of the smaller model. What its spec does not name, such as a copy of a tied table, is left out where it would have to change."""
    known = _shapes(job.after)
    ends = [(end, index) for index, cut in enumerate(cuts) for end in cut.set.ends]
    changed = {end.name for end, _ in ends}
    names = [name for name in stage.names if name in known or name not in changed]
    indices = joined((end.name, end.axis, _indices(end, kept[index])) for end, index in ends)
    return Smaller(before=stage, sources={name: name for name in names}, cuts=indices)


def _scales(job: Job, cuts: Sequence[Cut]) -> dict[str, tuple[float, float]]:
    """What the weight of each norm over fewer channels is multiplied by, and what makes up for numbers that follow from their count.

    Raises:
        RecipeError: a norm has no weight, or such a number is not made up for.
    """
    after = {part.name: part for part in job.after.parts if isinstance(part, Norm)}
    normed = [cut for cut in cuts if cut.set.normed]
    factors: dict[str, float] = {}
    for part in job.before.parts:
        if isinstance(part, Norm) and part.size != after[part.name].size:
            if not part.affine:
                raise RecipeError(f"{_said(job)}: {part.name} has no weight to take up that its mean is over fewer channels.")
            factors[f"{part.name}.weight"] = math.sqrt(part.size / after[part.name].size)
    if normed:
        named = names_by_key(job.skeleton().places, job.graph.tied)
        made_up = constant_factors(job.graph, job.run.graph(job.after), (job.before.config, job.after.config), _said(job))
        for key, factor in made_up.items():
            for name, _ in named.get(key, []):
                factors[name] = factors.get(name, 1.0) * factor
    offsets = {end.name: end.offset for cut in normed for end in cut.set.ends}
    return {name: (factor, offsets.get(name, 0.0)) for name, factor in factors.items()}


# block by block


def _refit_block(job: Job, block: Block, *, cuts: Sequence[Cut], refitted: Mapping[str, int], given: Mapping[int, Tensor]) -> list[dict[str, Any]]:
    """The layers of a block that read what becomes fewer, each solved for anew on what stays."""
    reports: list[dict[str, Any]] = []
    for subset, statistics in block.in_turn():
        for name in subset.names:
            index = refitted[name]
            cut = cuts[index]
            weight, groups = block.weight(name), cut.consumers[name]
            hessian = statistics.hessian if statistics.rows else torch.eye(len(groups))
            kept = given[index] if index in given else keep_groups(_judged(job, block, name), hessian, groups, count=cut.kept)
            stays = torch.isin(groups, kept)
            made = _refit_zeros(weight, hessian, stays) if job.formats[name].sparsity else refit(weight, hessian, stays)
            block.put(name, job.stored(name, made).to(block.source(name).dtype))
            reports += [{"cut": index, "kept": kept.tolist()}, {"name": name, "rows": statistics.rows, **_errors(weight, made, statistics)}]
    return reports


def _judged(job: Job, block: Block, name: str) -> Tensor:
    """[O, I] what makes the outputs that are judged: a weight, or both factors where it is the first of two."""
    weight, module = block.weight(name), name.removesuffix(f".{DOWN}.weight")
    return block.weight(f"{module}.{UP}.weight") @ weight if module in job.before.config.get(RANKS, {}) else weight


def _refit_zeros(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The same where steps before set weights to 0: these stay 0."""
    matrix = damped(hessian)
    return Spectrum.of(matrix).refitted(weight.float(), (weight != 0) & kept, damping=0.0)


def _errors(before: Tensor, made: Tensor, statistics: InputStatistics) -> dict[str, float]:
    """Root of the output's mean square error relative to the output, on the rows that chose and on those that were held out."""

    def relative(hessian: Tensor) -> float:
        change = made - before
        wrong, whole = (change @ hessian * change).sum(), (before @ hessian * before).sum()
        return float((wrong / whole.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).sqrt())

    found = {"output_error": relative(statistics.hessian)} if statistics.rows else {}
    return found | ({"held_out_error": relative(statistics.held_out)} if statistics.held_out is not None else {})


# for the whole model at once


def _choose_at_once(job: Job, cuts: Mapping[int, Cut]) -> dict[int, Tensor]:
    """Of sets that reach through several blocks: the channels of the highest scores, summed over all layers that read them."""
    readers = {name: index for index, cut in cuts.items() for name in cut.consumers}
    totals = {index: torch.zeros(cut.set.channels, dtype=torch.float64) for index, cut in cuts.items()}
    seen: set[str] = set()
    for block in look_at_blocks(job, frozenset(readers)) if readers else ():
        for subset, statistics in _inputs(block):
            for name in subset.names:
                cut = cuts[readers[name]]
                totals[readers[name]] += _reader_scores(_judged(job, block, name), statistics, cut.consumers[name], cut)
                seen.add(name)
    for index, cut in cuts.items():
        if seen.isdisjoint(cut.consumers):
            totals[index] = _weight_scores(job, cut)
    return {index: _best(totals[index], cut.kept) for index, cut in cuts.items()}


def _inputs(block: Block) -> Iterator[tuple[Subset, InputStatistics]]:
    for level in block.levels() if block.wanted else ():
        yield from block.statistics(level)


def _reader_scores(weight: Tensor, statistics: InputStatistics, groups: Tensor, cut: Cut) -> Tensor:
    """[C] how much of a layer's output hangs on each channel.

    Where a norm runs over the channels what goes cannot be made up for by this layer alone: ‖w‖² · mean of x², as a share of all; else as
    `structured` has it.
    """
    if not cut.set.normed:
        return group_costs(weight, statistics.hessian, groups)
    energy = torch.linalg.vector_norm(weight, dim=0).double() ** 2 * statistics.hessian.diagonal().double()
    total = torch.zeros(cut.set.channels, dtype=torch.float64).index_add(0, groups, energy)
    return total / total.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _weight_scores(job: Job, cut: Cut) -> Tensor:
    """[C] of channels whose readers no calibration row reaches: the product of what writes and what reads them, in sums of squares."""
    sides = {False: torch.zeros(cut.set.channels, dtype=torch.float64), True: torch.zeros(cut.set.channels, dtype=torch.float64)}
    for end in cut.set.ends:
        value = job.value(end.name).float()
        squares = torch.linalg.vector_norm(value.movedim(end.axis, 0).flatten(1) if value.ndim > 1 else value[:, None], dim=1).double() ** 2
        sides[(end.name, end.axis) in cut.set.consumers].index_add_(0, end.channel, squares)
    given = [side for side in sides.values() if bool(side.any())]
    return torch.stack(given).prod(0) if given else sides[False]


# ---- blocks ----


def shrink_layers(job: Job) -> tuple[Stage, ModelSpec]:
    """shrink(layers): the blocks that change the stream least go."""
    stacks = stacks_of(job.before.parts)
    counts = {stack: kept_count(len(blocks), dict(job.step.arguments)) for stack, blocks in stacks.items()}
    if not job.run.journal.has(job.number, CHOICE):
        job.run.journal.write(job.number, CHOICE, {}, [{"kept": {stack: list(kept) for stack, kept in _choose_blocks(job, stacks, counts).items()}}])
    found: Mapping[str, list[int]] = job.run.journal.read(job.number, CHOICE).reports[0]["kept"]
    kept = {stack: tuple(places) for stack, places in found.items()}
    return _without_blocks(job, stacks, kept), keep_blocks(job.before, kept)


def _choose_blocks(job: Job, stacks: Mapping[str, list[str]], counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    if job.step["by"] == "even":
        return {stack: spread_evenly(len(blocks), counts[stack]) for stack, blocks in stacks.items()}
    if job.step["by"] == "last":
        return {stack: tuple(range(counts[stack])) for stack in stacks}
    influence = measure_influence(job, [block for blocks in stacks.values() for block in blocks])
    for block, value in influence.items():
        job.run.log(f"{_said(job)}: {block} turns its input by {value:.4f} (1 - cosine)")
    return {
        stack: tuple(_best(torch.tensor([influence[block] for block in blocks], dtype=torch.float64), counts[stack]).tolist())
        for stack, blocks in stacks.items()
    }  # fmt: skip


def measure_influence(job: Job, blocks: Sequence[str]) -> dict[str, float]:
    """By block: 1 - the cosine between what a token is before it and after it, the mean over all calibration tokens.

    Raises:
        RecipeError: a block that no forward comes to, or that does not give what it is given.
    """
    sums = {block: [0.0, 0] for block in blocks}

    def listen(skeleton: Skeleton) -> None:
        for unit in skeleton.units:
            for block in {_block_of(name) for name in skeleton.names_in(unit.module)} & sums.keys():
                unit.module.register_forward_hook(_adding_turns(sums[str(block)]), with_kwargs=True)

    for _ in look_at_blocks(job, frozenset(), prepare=listen):
        pass
    if unseen := [block for block, (_, count) in sums.items() if not count]:
        raise RecipeError(f"{_said(job)}: the influence of {unseen[0]} cannot be measured; by=even and by=last look at nothing.")
    return {block: total / count for block, (total, count) in sums.items()}


def _adding_turns(sums: list[Any]) -> Callable[..., None]:
    """A hook that adds what a block does to its input: [T, D] before and after."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        after = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and after is not None and leaf.shape == after.shape)
        before = next(given, None)
        if after is not None and before is not None:
            turned = 1 - nn.functional.cosine_similarity(before.detach().double(), after.detach().double(), dim=-1)
            sums[0] += float(turned.sum())
            sums[1] += turned.numel()

    return hook


def _without_blocks(job: Job, stacks: Mapping[str, list[str]], kept: Mapping[str, tuple[int, ...]]) -> Smaller:
    """The tensors of the blocks that stay under their new numbers; what the first block alone has stays with it."""
    names = job.stage.names
    renamed = {f"{stack}.{new}": stacks[stack][old] for stack, places in kept.items() for new, old in enumerate(places)}
    numbers = {old: new for new, old in renamed.items()}
    gone = {block for blocks in stacks.values() for block in blocks} - numbers.keys()
    sources = {}
    for name in names:
        block = _block_of(name) or ""
        if block in numbers:
            sources[numbers[block] + name.removeprefix(block)] = name
        elif block not in gone:
            sources[name] = name
    known = set(names)
    needed = [name for part in keep_blocks(job.before, kept).parts for name in part.tensors()]
    sources |= {name: origin_of(name, renamed, known) for name in needed if name not in sources}
    return Smaller(before=job.stage, sources=sources)


# ---- experts ----


def shrink_experts(job: Job) -> tuple[Stage, ModelSpec]:
    """shrink(experts): those go that are routed to least and put out least; the router loses their rows."""
    layers = _expert_layers(job.before)
    if not job.run.journal.has(job.number, CHOICE):
        kept = _choose_experts(job, layers)
        job.run.journal.write(job.number, CHOICE, {}, [{"kept": {block: places.tolist() for block, places in kept.items()}}])
    found: Mapping[str, list[int]] = job.run.journal.read(job.number, CHOICE).reports[0]["kept"]
    sources = {name: name for name in job.stage.names}
    for part in job.before.parts:
        if isinstance(part, Linear) and part.experts > 1:
            places = found[str(block_name(part))]
            for name in part.tensors():
                del sources[name]
            sources |= {name: _renumbered(part.name, name, places) for name in replace(part, experts=len(places)).tensors()}
    return Smaller(before=job.stage, sources=sources, cuts=joined(_router_cuts(job, found))), job.after


def _expert_layers(spec: ModelSpec) -> dict[str, Linear]:
    """By block: the last projection of its experts."""
    return {str(block_name(part)): part for part in spec.parts if isinstance(part, Linear) and part.experts > 1}


def _choose_experts(job: Job, layers: Mapping[str, Linear]) -> dict[str, Tensor]:
    """By block: the experts that stay, rising. Score: tokens that are routed to it times the root mean square of what it puts out."""
    names = {name: (block, number) for block, part in layers.items() for number, name in enumerate(weights_of(part))}
    scores = {block: torch.zeros(part.experts, dtype=torch.float64) for block, part in layers.items()}
    for look in look_at_blocks(job, frozenset(names)):
        for subset, statistics in _inputs(look):
            for name in subset.names:
                block, number = names[name]
                weight = look.weight(name).double()
                scores[block][number] = statistics.rows * float((weight @ statistics.hessian.double() * weight).sum().clamp(min=0).sqrt())
    after = _expert_counts(job)
    return {block: _best(values, after[block]) for block, values in scores.items()}


def _expert_counts(job: Job) -> dict[str, int]:
    counts = {str(block_name(part)): part.experts for part in job.after.parts if isinstance(part, Linear) and "*" in part.name}
    return {block: counts[block] for block in _expert_layers(job.before)}


def _renumbered(pattern: str, name: str, places: Sequence[int]) -> str:
    """The tensor that stands under a new number, by its old name."""
    start = pattern.index("*")
    number, _, rest = name[start:].partition(".")
    return f"{name[:start]}{places[int(number)]}.{rest}"


def _router_cuts(job: Job, kept: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, int, Tensor]]:
    """The axis of each tensor that has an entry for each expert."""
    new = _shapes(job.after)
    for part in job.before.parts:
        if isinstance(part, Linear) and part.experts > 1:
            continue
        for name, shape in part.tensors().items():
            for axis, (size, smaller) in enumerate(zip(shape, new[name], strict=True)):
                if size != smaller:
                    yield name, axis, torch.tensor(kept[str(block_name(part))])


def _recounted(method: Callable[[Job], tuple[Stage, ModelSpec]]) -> Callable[[Job], tuple[Stage, ModelSpec]]:
    """The same, and the zeros of pruned weights are counted in what is left of them."""

    def do(job: Job) -> tuple[Stage, ModelSpec]:
        stage, spec = method(job)
        pruned = [part for part in spec.parts if isinstance(part, Linear | Embedding) and part.weight.sparsity and part.weight.bits is None]
        kept = {part.name: max(_values_in(stage, name) for name in weights_of(part)) for part in pruned if weights_of(part)}
        return stage, with_counts(spec, kept, in_folder=job.run.runtime in IN_FOLDER)

    return do


def _values_in(stage: Stage, name: str) -> int:
    weight = stage[name]
    assert isinstance(weight, Tensor), "it has no codes"
    return int(weight.count_nonzero())


METHODS: dict[tuple[str, str], Callable[[Job], tuple[Stage, ModelSpec]]] = {
    **{("shrink", what): _recounted(shrink_channels) for what in ("ffn", "heads", "width")},
    ("shrink", "layers"): _recounted(shrink_layers),
    ("shrink", "experts"): _recounted(shrink_experts),
}


def require_cuts(graph: Callable[[], Graph], before: ModelSpec, after: ModelSpec, step: str) -> None:
    """Raises:
    RecipeError: a step on channels that the graph does not tell apart.
    """
    places = Skeleton(before.config, _shapes(before), dtype=torch.float32).places
    plan_cuts(graph(), places, before, after, step)
