"""A recipe's second reading: carry each step out on the weights, in bounded memory.

A step that looks at one weight at a time is done when that weight is asked for. A step that looks at what a layer is given walks the model
block by block, with the calibration forwards waiting before each (`suspend`), and what becomes of a block is journaled when it is done. A
step that looks at the whole model says itself how it goes. After the last step the tensors are asked for one by one.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lighten.compress.activations import SpillBuffer
from lighten.compress.block import Block
from lighten.compress.checkpoint import Checkpoint, check_finite
from lighten.compress.graph import Graph, record_graph
from lighten.compress.grid import Weight
from lighten.compress.journal import Journal
from lighten.compress.memory_plan import release_free
from lighten.compress.reports import LayerReport, reported, weights_of
from lighten.compress.skeleton import Skeleton, Unit
from lighten.compress.stage import Change, Changed, Journaled, Original, Stage, Timed, origin_of, rebased
from lighten.compress.suspend import Forwards
from lighten.errors import ModelError, RecipeError
from lighten.model.quantized import refuse_layouts
from lighten.model.spec import Embedding, Linear, ModelSpec, WeightFormat
from lighten.model.tasks import LABELS, task_of
from lighten.recipe import Recipe, Step
from lighten.recipe.steps import selected_names

__all__ = ["Checkpoint", "Done", "Job", "LayerReport", "Run", "check_finite", "compress_weights", "do_recipe"]

Batch: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
CalibrationSource: TypeAlias = Callable[[int], Sequence[Batch]]
"""How many tokens → batches of a forward's inputs by name, as many as there are up to that."""

HELD_OUT = 4
"""Each fourth batch only judges what the others choose: choice."""

TOKEN_INPUTS = ("input_ids", "decoder_input_ids")
"""Inputs of a forward that are tokens."""

BATCH_ROWS = 4
"""Sequences that run at once where no plan says otherwise: choice."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A recipe carried out.

    Attributes:
        spec: of the result. It is what the recipe predicted, but for widths that were chosen by what was measured.
        weights: each tensor, with a report of those that changed; one is held at a time.
        specs: after each step; what was measured is in them, as in `spec`.
        curves: how each step that trained weights went, as JSON holds it.
        side_files: what becomes of files beside the weights, by name; None: left out.
    """

    spec: ModelSpec
    weights: Iterator[tuple[str, Weight, LayerReport | None]]
    specs: tuple[ModelSpec, ...] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    side_files: Mapping[str, bytes | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all steps of a recipe share.

    Attributes:
        spec: of the model before all steps, whose tensors `original` has.
        tied: weights that the model shares with another: name → the name that the checkpoint has.
        written: tokens that the original wrote for a step: (length, whether what it became wrote in its place, starts) → them. Later steps that ask
            for the same take them.
        graphs: traced so far, by config.
        curves: what steps that trained weights told so far.
        side_files: what steps made of files beside the weights; None: left out.
        new_ids: where a step changed the vocabulary, each old token in new ones.
        old_ids: then the old token that each new one was.
    """

    folder: Path
    spec: ModelSpec
    original: Original
    journal: Journal
    calibration: CalibrationSource | None
    log: Callable[[str], None]
    batch_rows: int = BATCH_ROWS
    buffer_bytes: int | None = None
    blocks_once: bool = True
    compute_dtype: str | None = None
    runtime: str = "torch"
    tied: Mapping[str, str] = field(default_factory=dict)
    written: dict[tuple[int, bool, bytes], Tensor] = field(default_factory=dict)
    graphs: dict[str, Graph] = field(default_factory=dict)
    curves: list[Mapping[str, Any]] = field(default_factory=list)
    side_files: dict[str, bytes | None] = field(default_factory=dict)
    new_ids: dict[int, list[int]] = field(default_factory=dict)
    old_ids: list[int] = field(default_factory=list)

    def graph(self, spec: ModelSpec) -> Graph:
        """The traced graph of the model as some steps left it.

        Raises:
            TraceError: its code cannot be followed without values.
        """
        key = json.dumps(spec.config, sort_keys=True)
        if key not in self.graphs:
            self.graphs[key] = record_graph(spec.config, spec.architecture, source=str(self.folder), folder=self.folder)
        return self.graphs[key]

    def batches(self, tokens: int) -> list[dict[str, Tensor]]:
        """Calibration inputs of about so many tokens, `batch_rows` sequences each, or fewer where there would be no batch to hold out.

        Raises:
            RecipeError: there are none.
        """
        found = self.calibration(tokens) if self.calibration is not None else ()
        rows = [
            {name: self.in_new_ids(name, torch.from_numpy(np.asarray(value[row : row + 1]))) for name, value in batch.items()}
            for batch in found
            for row in range(_rows(batch))
        ]
        if not rows:
            raise RecipeError("this recipe looks at calibration inputs, and there are none.")
        size = max(1, min(self.batch_rows, len(rows) // HELD_OUT))
        groups: list[list[dict[str, Tensor]]] = []
        begun: dict[str, list[dict[str, Tensor]]] = {}
        for row in rows:  # of one shape together
            key = str(sorted((name, tuple(value.shape)) for name, value in row.items()))
            if key not in begun or len(begun[key]) == size:
                begun[key] = []
                groups.append(begun[key])
            begun[key].append(row)
        return [{name: torch.cat([row[name] for row in group]) for name in group[0]} for group in groups]

    def in_new_ids(self, name: str, value: Tensor) -> Tensor:
        """[1, S] tokens as the changed vocabulary spells them, as many; what it cannot spell is left out, and the row filled from its start."""
        if not self.new_ids or name not in word_inputs(self.spec):
            return value
        spelled = [each for old in value[0].tolist() for each in (self.new_ids[old] if old >= 0 else [old])] or [0]
        return torch.tensor([(spelled * value.shape[1])[: value.shape[1]]])

    def in_old_ids(self, row: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A forward's inputs as the original takes them: the same tokens by the ids that they had."""
        old = torch.tensor(self.old_ids)
        return {name: old[value] if self.old_ids and name in TOKEN_INPUTS else value for name, value in row.items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step that is to be done.

    Attributes:
        number: its place in the recipe, which is that of its pass in the journal.
        before, after: the spec that it meets, and that it leaves.
        stage: the tensors that it meets.
        reference: what tuning after a quantization compares with: the original, or, where steps changed its shapes, what they left of it.
        dense: what a correction is measured against: the original, or, where steps moved weights before they were quantized, what they left.
        only: the tensors that it changes, where its arguments do not select them.
    """

    run: Run
    number: int
    step: Step
    before: ModelSpec
    after: ModelSpec
    stage: Stage
    reference: Stage
    dense: Stage
    only: frozenset[str] | None = None

    @cached_property
    def names(self) -> frozenset[str]:
        """Tensors that the step changes: all for a cast, else the weights of the modules that it selects."""
        if self.only is not None:
            return self.only
        if self.step.verb == "cast":
            return frozenset(name for part in self.before.parts for name in part.tensors())
        selected = set(selected_names(self.before, dict(self.step.arguments)))
        return frozenset(name for part in self.before.parts if part.name in selected for name in weights_of(part))

    @cached_property
    def formats(self) -> Mapping[str, WeightFormat]:
        """How each weight is to be stored."""
        return {name: part.weight for part in self.after.parts if isinstance(part, Linear | Embedding) for name in weights_of(part)}

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Weights that the checkpoint stores as [I, O]."""
        return frozenset(name for part in self.before.parts if isinstance(part, Linear) and part.transposed for name in weights_of(part))

    def matrix(self, name: str, tensor: Tensor) -> Tensor:
        """[O, I] of a stored weight."""
        return tensor.T.contiguous() if name in self.transposed else tensor

    def stored(self, name: str, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix.T.contiguous() if name in self.transposed else matrix

    def value(self, name: str) -> Tensor:
        """A tensor as the steps before left it, dequantized, in the checkpoint's orientation."""
        found = self.stage[name]
        if isinstance(found, Tensor):
            return found
        return found.dequantize().T if name in self.transposed else found.dequantize()

    def skeleton(self, *, dtype: torch.dtype | None = None) -> Skeleton:
        """The model's module without its weights."""
        known = {name: shape for part in self.before.parts for name, shape in part.tensors().items()}
        shapes = {name: known.get(name) or _shape(self.stage, self.run.original.checkpoint, name) for name in self.stage.names}
        return Skeleton(self.before.config, shapes, dtype=dtype or self.dtype)

    @property
    def graph(self) -> Graph:
        """The traced graph of the model that the step meets."""
        return self.run.graph(self.before)

    @property
    def dtype(self) -> torch.dtype:
        """The type that forwards compute in."""
        found = self.run.compute_dtype or ("bfloat16" if self.before.dtype == "bfloat16" else "float32")
        dtype: torch.dtype = getattr(torch, found)
        return dtype


Method: TypeAlias = Callable[[Job], tuple[Stage, ModelSpec]]
"""Does a step: the tensors, and the spec, that it leaves."""

DoBlock: TypeAlias = Callable[[Job, Block], list[dict[str, Any]]]
"""Changes a block by `put`, and reports; it gets every block that holds one of the job's names."""


def do_recipe(  # noqa: PLR0913 - one keyword for each thing that a run may be given
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    folder: Path,
    journal: Journal,
    *,
    calibration: CalibrationSource | None = None,
    batch_rows: int = BATCH_ROWS,
    buffer_bytes: int | None = None,
    blocks_once: bool = True,
    compute_dtype: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Done:
    """Carry out the steps; what a pass finished before stays as it is.

    Args:
        folder: the model's, whose config names the class that is run.

    Raises:
        ModelError: its weights are another method's codes.
        RecipeError: a step that is predicted alone, or that this model cannot take.
    """
    from lighten.compress.methods import METHODS, moves_weights, require_possible

    recipe.require_done()
    refuse_layouts(spec.parts, spec.source)
    run = Run(
        folder=folder, spec=spec, original=Original(checkpoint=checkpoint), journal=journal, calibration=calibration, log=log, batch_rows=batch_rows,
        buffer_bytes=buffer_bytes, blocks_once=blocks_once, compute_dtype=compute_dtype, runtime=recipe.runtime,
        tied={f"{part.name}.weight": f"{part.tied_to}.weight" for part in spec.parts if isinstance(part, Linear) and part.tied_to},
    )  # fmt: skip
    require_possible(run, spec, recipe)
    stage: Stage = run.original
    reference: Stage = run.original
    dense: Stage = run.original
    specs: list[ModelSpec] = []
    for number, step in enumerate(recipe.steps):
        quantized = any(part.weight.bits for part in spec.parts if isinstance(part, Linear | Embedding))
        if has_other_shapes(spec, run.spec) and not quantized:
            reference = stage
        if not quantized and any(moves_weights(each) for each in recipe.steps[:number]):
            dense = stage
        after = step.kind.predict(spec, {**dict(step.arguments), "runtime": recipe.runtime})
        job = Job(run=run, number=number, step=step, before=spec, after=after, stage=stage, reference=reference, dense=dense)
        with journal.clock.counting(str(number)):
            made, spec = METHODS[step.verb, step.method](job)
        stage = stage if made is stage else Timed(before=made, clock=journal.clock, what=str(number))
        specs.append(spec)
        if quantized and has_other_shapes(spec, job.before):
            reference, dense = (rebased(stage, job.stage, each) for each in (reference, dense))
    weights = reported(run.original, run.spec, stage, spec)
    return Done(spec=spec, weights=weights, specs=tuple(specs), curves=tuple(run.curves), side_files=run.side_files)


def compress_weights(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> Iterator[tuple[str, Weight, LayerReport | None]]:
    """Each tensor of the checkpoint as a recipe without calibration leaves it, with a report of those that it changed; one is held at a time.

    Raises:
        ModelError: its weights are another method's codes.
        RecipeError: a step that is predicted alone, or that looks at text.
    """
    with tempfile.TemporaryDirectory(prefix="lighten-") as work, Journal.open(Path(work) / "journal", {}, resume=False) as journal:
        yield from do_recipe(checkpoint, spec, recipe, Path(spec.source), journal).weights


def walk_blocks(job: Job, do: DoBlock) -> tuple[Stage, ModelSpec]:
    """A pass over the blocks that hold the job's weights, each with the changed blocks before it in place; one is in memory at a time.

    Weights outside of every unit, such as embedding tables, come first: `do_alone` of `methods` is done to them.
    """
    from lighten.compress.methods import do_alone

    journal = job.run.journal
    skeleton = job.skeleton()
    inside = {name: unit.name for unit in skeleton.units for name in skeleton.names_in(unit.module)}
    tables = {name for part in job.before.parts if isinstance(part, Embedding) for name in part.tensors()}
    placed = {name: "outside" if name in tables or name not in inside else inside[name] for name in job.names}
    wanted: dict[str, set[str]] = {}
    for name, block in placed.items():
        wanted.setdefault(block, set()).add(name)
    if "outside" in wanted and not journal.has(job.number, "outside"):
        weights, reports = do_alone(job, sorted(wanted["outside"]))
        journal.write(job.number, "outside", weights, reports)
    last = max((index for index, unit in enumerate(skeleton.units) if unit.name in wanted), default=-1)
    todo = [unit.name for unit in skeleton.units if unit.name in wanted and not journal.has(job.number, unit.name)]
    if todo:
        _run_blocks(job, skeleton, do, {name: frozenset(names) for name, names in wanted.items()}, last)
    blocks = {name: block for block in wanted for name in journal.read(job.number, block).weights}
    return Journaled(before=job.stage, journal=journal, pass_index=job.number, blocks=blocks), job.after


def _run_blocks(job: Job, skeleton: Skeleton, do: DoBlock, wanted: Mapping[str, frozenset[str]], last: int) -> None:
    run, journal = job.run, job.run.journal
    place = {name: block for block, names in wanted.items() for name in names}

    def source(name: str) -> Tensor:
        block = place.get(name)
        if block is None or not journal.has(job.number, block):
            return job.value(name)
        return _stored_value(job, name, journal.read(job.number, block).weights[name])

    for module in skeleton.outside():
        skeleton.load_own(module, source)
    batches = [inputs_of(skeleton.module, batch) for batch in run.batches(job.step["tokens"])]
    held_out = [len(batches) > 1 and index % HELD_OUT == min(HELD_OUT, len(batches)) - 1 for index in range(len(batches))]
    pending = {unit.name for unit in skeleton.units[: last + 1] if unit.name in wanted}
    experts = {name for part in job.before.parts if isinstance(part, Linear) and part.experts > 1 for name in weights_of(part)}
    known_levels: dict[Any, Any] = {}
    with SpillBuffer(journal.scratch, limit_bytes=run.buffer_bytes) as buffer:
        forwards = Forwards(module=skeleton.module, units=skeleton.units, batches=batches, buffer=buffer)
        with forwards.running():
            while forwards.at is not None and pending:
                unit = forwards.at
                skeleton.load(unit.module, source)
                gone_on = False
                if unit.name in pending:
                    block = Block(
                        unit=unit, skeleton=skeleton, forwards=forwards, source=source, wanted=wanted[unit.name], transposed=job.transposed,
                        held_out=held_out, routed=not experts.isdisjoint(wanted[unit.name]), at_once=run.blocks_once, known_levels=known_levels,
                    )  # fmt: skip
                    _do_block(job, block, do)
                    pending.discard(unit.name)
                    gone_on = block.gone_on
                if pending and not gone_on:
                    forwards.go_on()
                skeleton.drop(unit.module)
                release_free()
    for name in sorted(pending):  # no forward comes there: a pooler that the output does not need
        unit = next(unit for unit in skeleton.units if unit.name == name)
        _do_unreached(job, unit, wanted[name])


def _do_block(job: Job, block: Block, do: DoBlock) -> None:
    """Do a block and journal it, or put what the journal has of it in place."""
    journal = job.run.journal
    if journal.has(job.number, block.name):
        for name, weight in journal.read(job.number, block.name).weights.items():
            block.put(name, weight)
        return
    job.run.log(f"{job.step.verb}({job.step.method}): {block.name}")
    reports = do(job, block)
    journal.write(job.number, block.name, block.results, reports)


def _do_unreached(job: Job, unit: Unit, names: frozenset[str]) -> None:
    from lighten.compress.methods import do_alone

    if job.run.journal.has(job.number, unit.name):
        return
    weights, reports = do_alone(job, sorted(names))
    job.run.log(f"{unit.name}: no calibration row reaches it; its weights are done by themselves")
    job.run.journal.write(job.number, unit.name, weights, [{**report, "rows": 0} for report in reports])


def inputs_of(module: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a module's forward takes of a batch, without labels, of which it would make a loss. Target tokens become the input of its decoder; an
    encoder-decoder that is given a text alone reads it again there, unless its head makes a decoder's input itself."""
    known = inspect.signature(module.forward).parameters.keys() - set(LABELS)
    given = {name: value.to(module.dtype) if value.is_floating_point() else value for name, value in batch.items() if name in known}
    if not module.config.is_encoder_decoder or "decoder_input_ids" in given or "decoder_input_ids" not in known:
        return given
    if type(module).__name__.endswith(("ForSequenceClassification", "ForQuestionAnswering")):
        return given
    if (labels := batch.get("labels")) is not None:
        given["decoder_input_ids"] = _shifted(module, labels)
        return given
    start = module.config.decoder_start_token_id or 0
    given["decoder_input_ids"] = batch.get("input_ids", torch.full((_rows(batch), 1), start))
    if "input_ids" in given and "attention_mask" in given:
        given["decoder_attention_mask"] = given["attention_mask"]
    return given


def _shifted(module: Any, labels: Tensor) -> Tensor:
    """What the decoder reads where it is to write `labels`, by the class's own rule.

    Raises:
        ModelError: the class has none, or its config lacks what it needs.
    """
    name = type(module).__name__
    try:
        if hasattr(module, "prepare_decoder_input_ids_from_labels"):
            found: Tensor = module.prepare_decoder_input_ids_from_labels(labels=labels)
        else:
            config = module.config
            found = sys.modules[type(module).__module__].shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    except (AttributeError, ValueError, TypeError) as error:
        raise ModelError(f"{name} does not say what its decoder reads before a target ({str(error).splitlines()[0]}).") from error
    return found


def labels_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a batch says is true of its rows."""
    return {name: batch[name] for name in LABELS if name in batch}


def word_inputs(spec: ModelSpec) -> tuple[str, ...]:
    """Names of inputs that are tokens of the model's vocabulary."""
    return ("input_ids", "decoder_input_ids", *(("labels",) if task_of(spec) == "target" else ()))


def original_value(job: Job, name: str) -> Tensor:
    """A tensor of the model before all steps; a head that a step untied has its table's."""
    return job.run.original.checkpoint[name if name in job.run.original.checkpoint else job.run.tied[name]]


def reference_value(job: Job, name: str) -> Tensor:
    """A tensor of what tuning compares with."""
    if job.reference is job.run.original:
        return original_value(job, name)
    found = job.reference[name if name in job.reference.names else job.run.tied[name]]
    assert isinstance(found, Tensor), "taken before anything was quantized"
    return found


def has_other_shapes(spec: ModelSpec, original: ModelSpec) -> bool:
    """Whether steps changed more of a config than that the head is a weight of its own."""
    left = [{key: value for key, value in each.config.items() if key != "tie_word_embeddings"} for each in (spec, original)]
    return left[0] != left[1]


def change_weights(job: Job, change: Change) -> tuple[Stage, ModelSpec]:
    """A step that looks at one weight at a time: it is done when the weight is asked for."""
    return Changed(before=job.stage, selected=job.names, change=change), job.after


def _stored_value(job: Job, name: str, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    return weight.dequantize().T if name in job.transposed else weight.dequantize()


def _shape(stage: Stage, checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    if (own := origin_of(stage, name)) in checkpoint:
        return tuple(checkpoint.spec(own).shape)
    found = stage[name]
    return tuple(found.shape if isinstance(found, Tensor) else found.dequantize().shape)


def _rows(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))
