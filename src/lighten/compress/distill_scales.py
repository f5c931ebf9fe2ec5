"""The last step that wins most: codes stay, and what multiplies them is tuned until the model answers as the original does.

Group scales, norm weights and norm biases move by Adam down the distance of `teacher.py` (KL of the next token, for decoders). They are one
number in tens of weights, so few tokens suffice, and nothing grows in size or changes format. Zero points are whole numbers in every format
and stay.

Source: Chen et al. 2024 (arXiv:2407.11062), section 3.3, tune scales end to end under frozen codes; Hinton et al. 2015 (arXiv:1503.02531) for the
loss. Deviations: (1) norms move too; (2) scales and norms move relative to their size, under one learning rate; (3) each eighth
sample is held out, and where its distance did not fall, all stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.compress.grid import Quantized, Weight
from lighten.compress.skeleton import Skeleton, Source
from lighten.compress.student import Fixed, Latent, Offset, Scales, Student, has_real_scales
from lighten.compress.teacher import Sample, Teacher

_HELD_OUT = 8
CURVE_POINTS = 200
"""Of a loss curve that is kept: choice, more than a picture shows."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How long and how far.

    Attributes:
        steps: optimizer steps.
        learning_rate: share of its size that a norm, or a scale of 4-bit codes, moves in a step; scales of 2-bit codes move four times as
            much (`student.scale_factor`). Rises over the first tenth of the steps and falls linearly to 0.
        step_tokens: positions of a step, about.
        window: positions of a row that longer rows of plain tokens are cut to.
        seed: order of the samples.
    """

    steps: int
    learning_rate: float = 1e-3
    step_tokens: int = 1024
    window: int = 512
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be brought near to what.

    Attributes:
        skeleton: the module on the meta device; it is left so.
        source: the original's tensors.
        weights: what the steps so far made of tensors; those that they left need not be there.
        transposed: names of weights that the checkpoint stores as [I, O].
        batches: inputs that the original is asked on.
        folder: where its answers wait meanwhile, one hidden state a position.
        fixed_len: positions of a row that is no text, an image's patches.
        pruned: names of weights whose zeros stay.
        rounding: while it is entered, the module rounds the activations that the quantized model rounds.
        log: is told how it goes on.
        tell: is told in the end how it went, as JSON holds it.
    """

    skeleton: Skeleton
    source: Source
    weights: Mapping[str, Weight]
    transposed: frozenset[str] = frozenset()
    batches: Sequence[Sample]
    folder: Path
    fixed_len: int = 1
    pruned: frozenset[str] = frozenset()
    rounding: Callable[[], AbstractContextManager[None]] = nullcontext
    log: Callable[[str], None] = lambda line: None
    tell: Callable[[Mapping[str, Any]], None] = lambda said: None


Trained = Callable[[str, Quantized], Latent | None]
"""A quantized weight's name and itself → what trains it; None: it stays."""


def tune_scales(task: Task, settings: TuneSettings) -> dict[str, Weight]:
    """What changed: the same codes under other scales, other norms. Scales of 8 bits stay. Nothing, where held-out samples gain nothing."""

    def trained(name: str, weight: Quantized) -> Latent | None:
        return Scales(weight, dtype=task.skeleton.dtype) if has_real_scales(weight) else None

    return descend(task, start_latents(task, trained), settings)


def start_latents(task: Task, trained: Trained) -> dict[str, Latent]:
    """What stands for each tensor that moves or is expanded on use: quantized matrices of the blocks, and vectors of norms."""
    skeleton = task.skeleton
    in_blocks = {name for unit in skeleton.units if list(unit.module.children()) for name in skeleton.names_in(unit.module)}
    norms = set(_norm_tensors(skeleton))
    latents: dict[str, Latent] = {}
    for name in skeleton.places:
        weight = task.weights.get(name)
        if name in norms:
            tensor = task.source(name) if weight is None else weight
            assert isinstance(tensor, Tensor), "norms are not quantized"
            latents[name] = Offset(tensor, dtype=skeleton.dtype)
        elif name in in_blocks and weight is not None and not isinstance(weight, Tensor):
            latents[name] = trained(name, weight) or Fixed(weight, dtype=skeleton.dtype)
    return latents


def descend(
    task: Task, latents: Mapping[str, Latent], settings: TuneSettings, *, before_step: Callable[[float], None] = lambda left: None
) -> dict[str, Weight]:
    """Move the latents; what they are in the end, or nothing where the held-out samples are no nearer to the original (all samples,
    where there are too few to hold any out).

    Args:
        before_step: is told the share of the learning rate that the step has.
    """
    samples = list(cut(task.batches, step_tokens=settings.step_tokens, window=settings.window, fixed_len=task.fixed_len))
    with (
        Teacher(task.skeleton, task.source, samples, task.folder) as teacher,
        Student(task.skeleton, _now(task), latents, task.transposed) as student,
        task.rounding(),
    ):
        training, held_out = split(len(samples))
        judged, label = (held_out, "held-out samples") if held_out else (training, "all samples")
        before = _mean(student, teacher, judged)
        task.log(f"distance from the original on {label}: {before:.4f}")
        losses = _train(student, teacher, order(training, steps=settings.steps, seed=settings.seed), settings, before_step, task.log)
        behind = _mean(student, teacher, judged)
        task.log(f"distance from the original on {label}: {behind:.4f}")
    sizes = accumulate(positions(samples[index], task.fixed_len) for index in order(training, steps=settings.steps, seed=settings.seed))
    task.tell({
        "kept": behind < before, "steps": settings.steps, "warm_up": _warm_up(settings), "held_out": [before, behind], "teacher_passes": len(samples),
        "curve": thinned([(step, size, loss) for step, (size, loss) in enumerate(zip(sizes, losses, strict=True), start=1)]),
    })  # fmt: skip
    if not behind < before:
        task.log("that is not less than before: all stays as it was")
        return {}
    return {name: latent.finish() for name, latent in latents.items() if latent.leaves()}


def _train(
    student: Student, teacher: Teacher, indices: Iterator[int], settings: TuneSettings, before_step: Callable[[float], None],
    log: Callable[[str], None],
) -> list[float]:  # fmt: skip
    """The distance of each step's sample, before it."""
    found: list[float] = []
    leaves = [leaf for latent in student.latents.values() for leaf in latent.leaves()]
    optimizer = torch.optim.Adam(leaves, lr=settings.learning_rate, betas=(0.9, 0.95))
    warm_up = _warm_up(settings)
    for step, index in enumerate(indices):
        left = min(1, (step + 1) / warm_up) * (1 - step / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * left
        before_step(left)
        with student.ready():
            distance = teacher.descend(index)
        optimizer.step()
        optimizer.zero_grad()
        log(f"step {step + 1} of {settings.steps}: {distance:.4f}")
        found.append(distance)
    return found


def _warm_up(settings: TuneSettings) -> int:
    """Steps in which the learning rate rises: choice, a tenth; the first steps of Adam are the signs of one sample's gradient."""
    return max(1, settings.steps // 10)


def thinned(curve: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """At most `CURVE_POINTS` of the points, evenly, the last among them."""
    every = -(-len(curve) // CURVE_POINTS)
    return [point for place, point in enumerate(curve) if (len(curve) - 1 - place) % max(1, every) == 0]


def positions(sample: Sample, fixed_len: int) -> int:
    """Positions of a sample: its tokens, or `fixed_len` for each row of what is no text."""
    found = sample.get("input_ids", sample.get("decoder_input_ids"))
    return found.numel() if found is not None else fixed_len * len(next(iter(sample.values())))


def cut(batches: Sequence[Sample], *, step_tokens: int, window: int, fixed_len: int) -> Iterator[dict[str, Tensor]]:
    """Samples of about `step_tokens` positions. Rows of nothing but tokens are cut to windows, where their length is a multiple of it."""
    for batch in batches:
        found = dict(batch)
        ids = found.get("input_ids")
        if ids is not None and set(found) <= {"input_ids", "attention_mask"} and bool(found.get("attention_mask", torch.ones(1)).all()):
            found = {"input_ids": ids.reshape(-1, window) if ids.shape[1] % window == 0 else ids}
        first = next(iter(found.values()))
        rows = max(1, step_tokens * len(first) // positions(found, fixed_len))
        for start in range(0, len(first), rows):
            yield {name: value[start : start + rows] for name, value in found.items()}


def split(count: int) -> tuple[list[int], list[int]]:
    """(samples to train on, samples to judge on): each eighth judges, none of fewer than eight."""
    held_out = list(range(_HELD_OUT - 1, count, _HELD_OUT))
    return [index for index in range(count) if index not in held_out], held_out


def order(indices: Sequence[int], *, steps: int, seed: int) -> Iterator[int]:
    """`steps` of the indices: all of them in random order, then all in another."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, steps, len(indices)):
        for chosen in torch.randperm(len(indices), generator=generator).tolist()[: steps - start]:
            yield indices[chosen]


def _mean(student: Student, teacher: Teacher, indices: Sequence[int]) -> float:
    with student.ready():
        return sum(teacher.distance(index) for index in indices) / len(indices)


def _now(task: Task) -> Source:
    """Each tensor as it is now, in the checkpoint's orientation."""

    def read(name: str) -> Tensor:
        weight = task.weights.get(name)
        if weight is None or isinstance(weight, Tensor):
            return task.source(name) if weight is None else weight
        value = weight.dequantize()
        return value.T if name in task.transposed else value

    return read


def _norm_tensors(skeleton: Skeleton) -> Iterator[str]:
    """Vectors that belong to a module without matrices: weights and biases of norms."""
    for name, place in skeleton.places.items():
        path, _, leaf = place.key.rpartition(".")
        owner = skeleton.module.get_submodule(path)
        parameters = [parameter for parameter in owner._parameters.values() if parameter is not None]
        if leaf in owner._parameters and not list(owner.children()) and parameters and all(parameter.ndim == 1 for parameter in parameters):
            yield name
