"""What a step that trains dense weights will take on this machine, said before anything runs: the original's texts and answers, steps, judging.

    step = units · (forward · (1 + BACKWARD + recomputed) + logits) + what the optimizer moves
    all  = original's texts + original's passes + judging before and after + steps · step

A forward pass's seconds are those that `lighten estimate --device this` predicts, from the rates that `lighten probe` measured. Left out: reading the
model and the text, and writing down the state.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from lighten.compress.answers import ROWS_AT_ONCE
from lighten.compress.distill_dense import JUDGED, TIMED
from lighten.compress.memory_plan import RELATED, ROW_TOKENS, SELF_LENGTH, SELF_PREFIX, STEP_TOKENS, TEXTS
from lighten.compress.spans import is_plain, plan_spans
from lighten.compress.walk import Batch, CalibrationSource
from lighten.cost.operators import Forward, Op, forward_operators
from lighten.cost.training import BACKWARD
from lighten.cost.workload import OPTIMIZER_STATE
from lighten.device.find import find_device
from lighten.device.profile import EngineProfile, Profile
from lighten.device.roofline import predict_time
from lighten.errors import DeviceError
from lighten.model import ModelSpec
from lighten.model.spec import Embedding, Linear
from lighten.recipe import Recipe, Step
from lighten.recipe.distill import DISTILLING, training_steps
from lighten.recipe.predict import specs_of
from lighten.units import format_seconds

LOGIT_PASSES, TOP_PASSES = 26, 16
"""Times that a training step reads or writes all its logits in float32, of whole distributions and of the largest logits: counted in
`distances.divergence`, a read or a write of a tensor of their shape each."""
JUDGING_PASSES = 14
"""The same without gradients."""
NORM_PASSES, MASK_PASSES = 3, 4.5
"""Times that clipping a step's gradients reads or writes them all; and that keeping zeros reads or writes gradients and weights, masks of one byte
among them (`training.Trainer.step`)."""
WHOLE = 4
"""Bytes of float32, in which weights and the optimizer's memory are kept."""


@dataclass(frozen=True, kw_only=True)
class TrainingTime:
    """Seconds of a step of a recipe, by what takes them; `low` and `high` of all are None where the probe does not know how it scatters.

    Attributes:
        rows: that the original answers.
        steps: that are done, or that fit into the minutes.
        writing_s: of the original, which writes texts of its own.
    """

    rows: int
    steps: int
    writing_s: float
    teacher_s: float
    step_s: float
    judging_s: float
    spread: float | None

    @property
    def seconds(self) -> float:
        return self.writing_s + self.teacher_s + self.judging_s + self.steps * self.step_s

    @property
    def low(self) -> float | None:
        return None if self.spread is None else self.seconds / self.spread

    @property
    def high(self) -> float | None:
        return None if self.spread is None else self.seconds * self.spread

    def as_json(self) -> dict[str, Any]:
        """What is kept of it."""
        return {"seconds": self.seconds, "low": self.low, "high": self.high, "steps": self.steps}

    def said(self, minutes: float | None) -> str:
        """In words. minutes: the budget, where that is one of time."""
        written = f"the original's own texts {format_seconds(self.writing_s)}, " if self.writing_s else ""
        parts = f"{written}the original's answers to {self.rows} rows {format_seconds(self.teacher_s)}, judging {format_seconds(self.judging_s)}"
        if minutes is not None:
            return f"about {self.steps} steps of {format_seconds(self.step_s)} fit into {minutes:g} min; {parts}"
        range_ = f", {format_seconds(self.low)} to {format_seconds(self.high)}" if self.low is not None else ""
        return f"about {format_seconds(self.seconds)}{range_}: {parts}, {self.steps} steps of {format_seconds(self.step_s)}"


def predict_times(
    recipe: Recipe, spec: ModelSpec, windows: CalibrationSource | None, *, threads: int
) -> tuple[list[TrainingTime | None], list[str]]:  # fmt: skip
    """The time of each step of a recipe, None where it is not known, and what is to be said of those that train dense weights.

    Args:
        spec: of the model before all steps.
        windows: the text; None: there is none, and a step that wants one will say so.
        threads: that the run has.

    Raises:
        LightenError: the text cannot be read, or is shorter than a row.
    """
    found: list[TrainingTime | None] = []
    said: list[str] = []
    for step, (before, _) in zip(recipe.steps, pairwise(specs_of(recipe, spec)), strict=True):
        time = None
        if (step.verb, step.method) in DISTILLING and windows is not None:
            rows, length = _rows_of(step, spec, windows(step["tokens"]))
            try:
                if step["parallel"] != "none":
                    raise DeviceError("several processes share this machine, and it was measured for one.")
                profile = find_device("this")
                time = predict_training(step, (before, spec), profile, rows=rows, length=length)
                other = f" (measured with {profile.threads} threads, this run has {threads})" if profile.threads != threads else ""
                said.append(f"{step}: predicted: {time.said(step['minutes'])}{other}")
            except DeviceError as error:
                said.append(f"{step}: how long it takes is not known before: {error}")
        found.append(time)
    return found, said


def predict_training(step: Step, models: tuple[ModelSpec, ModelSpec], profile: Profile, *, rows: int, length: int) -> TrainingTime:
    """What one step takes, on a machine that was measured.

    Args:
        models: student and teacher.
        rows, length: of the text, and the positions of each.

    Raises:
        DeviceError: torch was not measured in the type that the step computes in.
    """
    (student, teacher), engine = models, _engine(profile, step["dtype"])
    of_step = max(1, step["batch_tokens"] // length)
    logits = step.method == "logits"
    at_once = min(of_step, max(1, STEP_TOKENS // length) if logits else RELATED)
    machine = _Machine(profile=profile, engine=engine, step=step, length=length)
    judged = min(JUDGED, rows // 8) or rows
    judging = 2 * machine.judging(student, teacher, judged, at_once)
    writing, asking = machine.writing(teacher), machine.teacher(teacher, rows)
    one = machine.training(student, teacher, of_step, at_once)
    steps = training_steps(dict(step.arguments), step_tokens=of_step * length)
    if steps is None:
        steps = max(TIMED, int((60 * step["minutes"] - writing - asking - judging) / one))
    spread = engine.calibration.spread
    return TrainingTime(
        rows=rows, steps=steps, writing_s=writing, teacher_s=asking, step_s=one, judging_s=judging,
        spread=None if spread is None else math.exp(spread),
    )  # fmt: skip


def _engine(profile: Profile, dtype: str) -> EngineProfile:
    name = f"torch/{dtype}"
    if name not in profile.engines:
        raise DeviceError(f"engine {name} was not measured; measured: {', '.join(profile.engines)}. Run `lighten probe --engine {name}`.")
    return profile.engines[name]


def _rows_of(step: Step, spec: ModelSpec, batches: Sequence[Batch]) -> tuple[int, int]:
    """Rows, and positions of one in the mean, as `distill_dense` cuts them."""
    sizes = [np.shape(batch["input_ids"]) for batch in batches if "input_ids" in batch]
    if not sizes:
        plan_spans(step, {1: 1}, plain=False)
        return sum(len(next(iter(batch.values()))) for batch in batches), spec.fixed_len or 1
    own = min(SELF_LENGTH, spec.max_positions or SELF_LENGTH)
    sizes += [(-(-step["self_tokens"] // own), own)] if step["self_tokens"] else []
    rows: Counter[int] = Counter()
    for count, each in sizes:
        size = step["seq_len"] or min(ROW_TOKENS, each)
        rows[size] += count * (each // size)
    rows += Counter(plan_spans(step, rows, plain=is_plain(batches)))
    total = sum(rows.values())
    return max(1, total), max(1, sum(size * count for size, count in rows.items()) // max(1, total))


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """A step's work, in seconds of a measured engine."""

    profile: Profile
    engine: EngineProfile
    step: Step
    length: int

    def writing(self, spec: ModelSpec) -> float:
        """The original's own texts: a forward of the start, and one for each token after it, whose cache is half full on average."""
        length = min(SELF_LENGTH, spec.max_positions or SELF_LENGTH)
        count, start = -(-(self.step["self_tokens"] or 0) // length), min(SELF_PREFIX, length // 2)
        dtype = "bfloat16" if spec.dtype == "bfloat16" else "float32"
        engine = _engine(self.profile, dtype) if count else self.engine
        tokens = (
            Forward(batch_size=1, query_len=start, key_len=start, last_logits_only=True),
            Forward(batch_size=1, query_len=1, key_len=(start + length) // 2),
        )
        seconds = 0.0
        for texts in _parts(count, TEXTS):
            first, later = (
                predict_time(list(forward_operators(spec, replace(each, batch_size=texts), dtype)), engine, self.profile).seconds for each in tokens
            )
            seconds += first + (length - start - 1) * later
        return seconds

    def teacher(self, spec: ModelSpec, rows: int) -> float:
        """One pass over all rows, in float32 or the step's type; logits are made of the states later, unless the largest are kept."""
        keeps_states = self.step.method == "logits" and not self.step["top_k"]
        return sum(self._forward(spec, count, head=not keeps_states) for count in _parts(rows, ROWS_AT_ONCE))

    def judging(self, student: ModelSpec, teacher: ModelSpec, rows: int, at_once: int) -> float:
        return sum(
            self._forward(student, count) + self._answers(teacher, count) + self._logits(student, count, JUDGING_PASSES)
            for count in _parts(rows, at_once)
        )

    def training(self, student: ModelSpec, teacher: ModelSpec, rows: int, at_once: int) -> float:
        factor = 1 + BACKWARD + bool(self.step["recompute"])
        passes = TOP_PASSES if self.step["top_k"] else LOGIT_PASSES
        units = sum(
            factor * self._forward(student, count) + self._answers(teacher, count) + self._logits(student, count, passes)
            for count in _parts(rows, at_once)
        )
        held = sum(part.parameters for part in student.parts if isinstance(part, Linear | Embedding) and part.weight.sparsity > 0)
        state = 3 + 2 * OPTIMIZER_STATE[self.step["optimizer"]]
        return units + self._moving(WHOLE * ((state + NORM_PASSES) * student.total_parameters + MASK_PASSES * held))

    def _forward(self, spec: ModelSpec, rows: int, *, head: bool = True) -> float:
        return self._seconds([op for op in self._ops(spec, rows) if head or op.component != "head"])

    def _answers(self, teacher: ModelSpec, rows: int) -> float:
        """The teacher's logits, made of its kept states."""
        if self.step.method != "logits" or self.step["top_k"]:
            return 0.0
        return self._seconds([op for op in self._ops(teacher, rows) if op.component == "head"])

    def _logits(self, spec: ModelSpec, rows: int, passes: int) -> float:
        """What the distance of logits moves."""
        if self.step.method != "logits":
            return 0.0
        width = max((part.out_features for part in spec.parts if isinstance(part, Linear) and part.component == "head"), default=0)
        return self._moving(WHOLE * passes * rows * self.length * width)

    def _ops(self, spec: ModelSpec, rows: int) -> list[Op]:
        source = self.length if spec.is_encoder_decoder else 0
        return list(
            forward_operators(spec, Forward(batch_size=rows, query_len=self.length, key_len=self.length, source_len=source), self.step["dtype"])
        )

    def _seconds(self, ops: Sequence[Op]) -> float:
        return predict_time(ops, self.engine, self.profile).seconds if ops else 0.0

    def _moving(self, size: float) -> float:
        """Bytes that no cache holds, read and written."""
        return size / self.profile.bandwidth[-1].copy_bytes_per_s


def _parts(rows: int, size: int) -> list[int]:
    """
    >>> _parts(10, 4)
    [4, 4, 2]
    """
    return [min(size, rows - start) for start in range(0, rows, size)]
