"""distill(logits) and distill(embeddings): all dense weights are trained until the model answers as the original does.

The student is the model as the steps before left it; zeros that they made stay zeros. The teacher is the original. It answers each row once, and its
answers wait on disk (`answers.py`), so that later epochs and resumed runs never ask it again. Each eighth row is held out, and where its distance did
not fall, all stays as it was.

Where a step before cut the vocabulary, the text is spelled in the tokens that are left, and the teacher is given the same tokens by their old ids; of
its distribution over all tokens that over those which are left is compared, with a sum of 1 again: p(token | one of those that are left).

What a run keeps in the journal's pass, in this order: `rows`, the text; `teacher`, where the answers lie; `plan`, how many steps; `training`, the
weights and the optimizer's memory of some step, replaced as it goes on; `all`, the result, after which the others go.

Source: Hinton et al. 2015 (arXiv:1503.02531) for the loss; Jiao et al. 2019 (arXiv:1909.10351) for hidden states and Wang et al. 2020
(arXiv:2002.10957) for attention; Park et al. 2019 (arXiv:1904.05068) for embeddings' relations.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lighten.compress.answers import Answers, Asking, Index, find_kind, record
from lighten.compress.distill_scales import positions, split, thinned
from lighten.compress.memory_plan import RELATED, ROW_TOKENS, STEP_TOKENS, release_free, reusing_memory
from lighten.compress.processes import Team, require_team
from lighten.compress.pupil import Objective, match_layers
from lighten.compress.reports import weights_of
from lighten.compress.skeleton import Skeleton
from lighten.compress.spans import is_plain, plan_spans, spans_of
from lighten.compress.stage import Journaled, Stage
from lighten.compress.teacher import Sample
from lighten.compress.training import Judged, Leader, Setup, State, Unit, rate_at
from lighten.compress.walk import Job, inputs_of, labels_of, original_value
from lighten.compress.whole import texts
from lighten.errors import OutputError, RecipeError, TextError
from lighten.model.pooling import pools_first_token
from lighten.model.spec import Embedding, Linear, ModelSpec
from lighten.model.tasks import IGNORED, task_of
from lighten.recipe.distill import MEMORIES, learning_rate, training_steps
from lighten.units import format_bytes, format_seconds

ROWS, TEACHER, PLAN, TRAINING, ALL = "rows", "teacher", "plan", "training", "all"
ANSWERS = "teacher.answers"
TIMED = 4
"""Steps whose time tells how many a budget of minutes allows; the first of them does not count (choice: it loads what the others have)."""
SAVE_SECONDS, SAVE_SHARE = 60.0, 10
"""Training is written down at most so often, and so that writing takes at most a tenth of the time: choice."""
SAID = 50
"""Lines of progress of a training: choice."""
JUDGED = 32
"""Rows that are held out, at most: choice; two passes over them cost less than a few steps."""


def distill_dense(job: Job) -> tuple[Stage, ModelSpec]:
    """The method of both steps."""
    journal = job.run.journal
    team = require_team(job.step["parallel"])
    if not journal.has(job.number, ALL):
        with reusing_memory():
            _Distillation(job, team).run()
        for block in (ROWS, TEACHER, PLAN, TRAINING):
            journal.forget(job.number, block)
        journal.file(job.number, ANSWERS).unlink(missing_ok=True)
    done = journal.read(job.number, ALL)
    job.run.curves.append(done.reports[0])
    return Journaled(before=job.stage, journal=journal, pass_index=job.number, blocks=dict.fromkeys(done.weights, ALL)), job.after


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is fixed before a training goes on for long.

    Attributes:
        steps: None while a budget of minutes is being turned into a number.
        warm_up: steps in which the learning rate rises.
        before: distance of the judged rows.
        accuracy: of them; None where no class is known of any.
    """

    steps: int | None
    warm_up: int
    before: float
    accuracy: float | None


class _Distillation:
    """One step's work, in the first process."""

    def __init__(self, job: Job, team: Team) -> None:
        self._job, self._team, self._journal = job, team, job.run.journal
        self._started = time.monotonic()
        self._said = f"distill({job.step.method})"
        run = job.run
        shapes = {name: tuple(run.original.checkpoint.spec(name).shape) for name in run.original.checkpoint.names}
        self._teacher = Skeleton(run.spec.config, shapes, dtype=torch.float32)
        self._teacher_shapes = shapes
        self._start = {name: _dense(job, name) for name in job.stage.names}  # what the steps before do to a weight is done once
        self._shapes = {name: tuple(value.shape) for name, value in self._start.items()}
        self._dtypes = {name: value.dtype for name, value in self._start.items()}
        self._student = Skeleton(job.before.config, self._shapes, dtype=torch.float32)
        self._words = run.old_ids if _gives_words(job.before, len(run.old_ids)) else []

    def run(self) -> None:
        """Train, and write the result to the journal."""
        self._rows, of_text = self._read_rows()
        training, judged = split(of_text)
        self._judged, self._label = (judged[:JUDGED], "held-out rows") if judged else (training, "all rows of the text")
        self._training = [*training, *range(of_text, len(self._rows))]
        self._answers = self._ask_teacher()
        self._positions = sum(map(self._length, self._rows))
        self._rows_of_a_step = max(1, int(self._job.step["batch_tokens"]) * len(self._rows) // self._positions)
        held = _held(self._job)
        self._check_space()
        release_free()
        setup = self._setup(held)
        leader = Leader.begin(setup, self._team, lambda name: self._start.pop(name).clone(), partial(original_value, self._job))
        self._start.clear()
        curve, plan = self._train(leader)
        judged_after = leader.judge(self._judging())
        after = judged_after.distance
        self._say_judged(judged_after)
        kept = after < plan.before
        if not kept:
            self._job.run.log(f"that is not less than before ({plan.before:.4f}): all stays as it was")
        weights = {name: value.to(self._dtypes[name]) for name, value in leader.weights().items()} if kept else {}
        report = {
            "step": str(self._job.step), "kept": kept, "steps": plan.steps, "warm_up": plan.warm_up, "held_out": [plan.before, after],
            "teacher_passes": self._answers.index.passes, "curve": thinned(curve),
        }  # fmt: skip
        if plan.accuracy is not None:
            report["accuracy"] = [plan.accuracy, judged_after.accuracy]
        leader.end()
        self._journal.write(self._job.number, ALL, weights, [report])

    # what is trained on

    def _read_rows(self) -> tuple[list[Sample], int]:
        """The text, a row a sample, then spans of those that are trained on, and how many are of the text itself. They are written down, for a
        decoder's own text takes long to be written again."""
        if not self._journal.has(self._job.number, ROWS):
            given = texts(self._job, self._teacher, original_value)
            batches = [inputs_of(self._student.module, batch) | labels_of(batch) for batch in given]
            self._require_labels(batches)
            rows = list(cut_rows(batches, length=self._job.step["seq_len"], said=self._said))
            named = {f"{place}/{name}": value for place, row in enumerate([*rows, *self._spans(batches, rows)]) for name, value in row.items()}
            self._journal.write(self._job.number, ROWS, named, [{"of_text": len(rows)}])
        found: dict[int, dict[str, Tensor]] = {}
        written = self._journal.read(self._job.number, ROWS)
        for key, value in written.weights.items():
            place, _, name = key.partition("/")
            assert isinstance(value, Tensor), "rows are tensors"
            found.setdefault(int(place), {})[name] = value
        return [found[place] for place in sorted(found)], written.reports[0]["of_text"]

    def _spans(self, batches: Sequence[Sample], rows: Sequence[Sample]) -> list[Sample]:
        """Spans of the rows that are trained on: what is held out is seen in none of them."""
        step = self._job.step
        plan = plan_spans(step, Counter(map(self._length, rows)), plain=is_plain(batches))
        if not plan:
            return []
        training, _ = split(len(rows))
        spans = spans_of([rows[place]["input_ids"][0] for place in training], plan, seed=step["seed"])
        if spans:
            lengths = " and ".join(str(each.shape[1]) for each in spans)
            self._job.run.log(f"beside the {len(rows)} rows of the text {sum(map(len, spans))} spans of it, of {lengths} tokens")
        return [{"input_ids": row[None]} for each in spans for row in each]

    def _require_labels(self, batches: Sequence[Sample]) -> None:
        """Raises:
        RecipeError: labels are asked for, and no row has any.
        """
        known = (value != IGNORED for batch in batches for value in labels_of(batch).values())
        if self._job.step["labels"] and not any(bool(each.any()) for each in known):
            raise RecipeError(f"{self._said}: labels={self._job.step['labels']} asks for what is true of the rows, and they have no labels.")

    def _ask_teacher(self) -> Answers:
        job, path = self._job, self._journal.file(self._job.number, ANSWERS)
        if not self._journal.has(job.number, TEACHER):
            start = time.monotonic()
            bfloat16 = job.step["dtype"] == "bfloat16"
            self._teacher.load(self._teacher.module, partial(original_value, job))
            rows = [job.run.in_old_ids(row) for row in self._rows]
            kind, answer = find_kind(self._teacher.module, rows[0], self._objective("logits" if job.step.method == "logits" else "embeddings"))
            self._require_choice(kind)
            computing = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if bfloat16 else nullcontext
            asking = Asking(
                module=self._teacher.module, objective=replace(self._objective(kind), answer=answer), top_k=job.step["top_k"] or 0,
                computing=computing, dtype=torch.bfloat16 if bfloat16 else torch.float32, words=torch.tensor(self._words) if self._words else None,
            )  # fmt: skip
            index = record(asking, rows, path)
            self._teacher.drop(self._teacher.module)
            self._journal.write(job.number, TEACHER, {}, [asdict(index)])
            said = f"{format_bytes(path.stat().st_size)} of answers on disk"
            job.run.log(f"the original answered {len(self._rows)} rows in {index.passes} passes, {format_seconds(time.monotonic() - start)}: {said}")
        said_index = self._journal.read(job.number, TEACHER).reports[0]
        return Answers(path, Index(**said_index))

    def _require_choice(self, kind: str) -> None:
        """Raises:
        RecipeError: options of distributions for a head that gives values.
        """
        step = self._job.step
        if kind == "values" and (step["top_k"] or step["temperature"] != 1.0):
            name = self._job.before.name
            raise RecipeError(f"{self._said}: temperature and top_k are for logits of a choice, and {name} gives values; leave them out.")

    def _objective(self, kind: Any) -> Objective:
        """What is compared; the layers of both by name."""
        step = self._job.step
        pairs = match_layers(self._student, self._teacher) if step["hidden"] or step["attention"] else []
        embeddings = kind == "embeddings"
        return Objective(
            kind=kind, temperature=step["temperature"] or 1.0, hidden=step["hidden"], attention=step["attention"] or 0.0,
            relational=step["relational"] or 0.0, labels=step["labels"] or 0.0, shifted=task_of(self._job.before) == "next",
            first_token=embeddings and pools_first_token(self._job.run.folder),
            layers=tuple(pairs) if step["hidden"] else (), attending=pairs[-1] if step["attention"] else None,
            causal=self._job.before.is_decoder or self._job.before.is_encoder_decoder,
        )  # fmt: skip

    def _setup(self, held: frozenset[str]) -> Setup:
        step, index = self._job.step, self._answers.index
        objective = replace(self._objective(index.kind), answer=index.answer, sizes=tuple(index.sizes))
        return Setup(
            config=self._job.before.config, shapes=self._shapes, teacher_config=self._job.run.spec.config, teacher_shapes=self._teacher_shapes,
            objective=objective, needs_head=index.kind == "head" and not step["top_k"], held=held, widths=self._widths(objective),
            optimizer=step["optimizer"], parallel=step["parallel"], dtype=step["dtype"], recompute=step["recompute"], embeddings=step["embeddings"],
            seed=step["seed"], words=tuple(self._words), routed=any(isinstance(part, Linear) and part.experts > 1 for part in self._job.before.parts),
        )  # fmt: skip

    def _widths(self, objective: Objective) -> dict[str, tuple[int, int]]:
        """Where the student's states are of another width than the teacher's: (its own, the teacher's)."""
        found = {}
        own = _state_widths(self._student, objective)
        for key, theirs in self._answers.widths().items():
            if (key.startswith("layer.") or key == "embedding") and own[key] != theirs:
                found[key] = (own[key], theirs)
        return found

    def _check_space(self) -> None:
        """Raises:
        OutputError: too little disk for two states of the training and its result.
        """
        size = sum(torch.Size(shape).numel() for shape in self._shapes.values())
        needed = 4 * size * (2 * (1 + MEMORIES[self._job.step["optimizer"]]) + 1)
        free = shutil.disk_usage(self._journal.folder).free
        if free < needed:
            raise OutputError(f"{self._journal.folder.parent} has {format_bytes(free)} free; {self._said} writes up to {format_bytes(needed)} there.")

    # training

    def _train(self, leader: Leader) -> tuple[list[tuple[int, int, float]], _Plan]:
        job, log = self._job, self._job.run.log
        curve, plan, first = self._begin(leader)
        pace, saved, spent = Pace(), time.monotonic(), 0.0
        rate = learning_rate(job.step.method, dict(job.step.arguments))
        step = first
        while plan.steps is None or step < plan.steps:
            units, tokens = self._units_of_step(step)
            begin = time.monotonic()
            share = rate_at(step, steps=plan.steps or plan.warm_up, warm_up=plan.warm_up, schedule=job.step["schedule"])
            loss, _ = leader.step(units, rate * share)
            pace.add(time.monotonic() - begin, tokens)
            curve.append((step + 1, (curve[-1][1] if curve else 0) + tokens, loss))
            step += 1
            if job.step["minutes"] is not None and first == 0 and step in looks(plan.steps):
                plan = self._fix_steps(leader, plan, pace, curve, step)
            if step - first == min(TIMED, plan.steps or TIMED):
                log(f"{plan.steps} steps of about {tokens} positions, {pace.said(plan.steps or step, step)}")
            if plan.steps is not None and (step % max(1, plan.steps // SAID) == 0 or step == plan.steps):
                log(f"step {step} of {plan.steps}: loss {loss:.4f}, {pace.said(plan.steps, step)}")
            now = time.monotonic()
            if plan.steps is not None and now - saved >= max(SAVE_SECONDS, SAVE_SHARE * spent) and step < plan.steps:
                self._save(leader.state(), step, curve)
                saved, spent = time.monotonic(), time.monotonic() - now
        return curve, plan

    def _begin(self, leader: Leader) -> tuple[list[tuple[int, int, float]], _Plan, int]:
        """Where the training stands: its curve so far, its plan, and the next step."""
        journal, number = self._journal, self._job.number
        if journal.has(number, TRAINING):
            found = journal.read(number, TRAINING)
            leader.restore({name: value for name, value in found.weights.items() if isinstance(value, Tensor)})
            said = found.reports[0]
            self._job.run.log(f"going on after step {said['step']}")
            return [tuple(point) for point in said["curve"]], self._read_plan(), said["step"]
        if not journal.has(number, PLAN):
            before = leader.judge(self._judging())
            steps = training_steps(dict(self._job.step.arguments), step_tokens=self._step_tokens())
            warm_up = TIMED if steps is None else max(1, steps // 10)
            plan = _Plan(steps=steps, warm_up=warm_up, before=before.distance, accuracy=before.accuracy)
            self._say_judged(before)
            if steps is None:
                return [], plan, 0
            self._write_plan(plan)
        return [], self._read_plan(), 0

    def _fix_steps(self, leader: Leader, plan: _Plan, pace: Pace, curve: list[tuple[int, int, float]], step: int) -> _Plan:
        """How many steps the minutes allow, after some that were timed; written down, so that a resumed run has as many."""
        left = 60 * self._job.step["minutes"] - (time.monotonic() - self._started) - pace.seconds * len(self._judged) / self._rows_of_a_step
        steps = step + max(0, int(left / pace.seconds))
        fixed = replace(plan, steps=steps)
        self._write_plan(fixed)
        if plan.steps is None:
            self._save(leader.state(), step, curve)
        elif abs(steps - plan.steps) > plan.steps // 10:
            self._job.run.log(f"{steps} steps, for they take {format_seconds(pace.seconds)} now")
        if steps == step:
            self._job.run.log(f"minutes<={self._job.step['minutes']} is over after the {step} steps that were timed")
        return fixed

    def _say_judged(self, found: Judged) -> None:
        distance = "distance from the original and from the labels" if self._job.step["labels"] else "distance from the original"
        right = "" if found.accuracy is None else f", {found.accuracy:.1%} of the classes right"
        self._job.run.log(f"{distance} on {self._label}: {found.distance:.4f}{right}")

    def _write_plan(self, plan: _Plan) -> None:
        self._journal.write(self._job.number, PLAN, {}, [asdict(plan)])

    def _read_plan(self) -> _Plan:
        return _Plan(**self._journal.read(self._job.number, PLAN).reports[0])

    def _save(self, state: State, step: int, curve: Sequence[tuple[int, int, float]]) -> None:
        self._journal.write(self._job.number, TRAINING, state, [{"step": step, "curve": list(curve)}])

    # units of work

    def _step_tokens(self) -> int:
        return self._rows_of_a_step * self._positions // len(self._rows)

    def _length(self, row: Sample) -> int:
        return max(1, positions(row, self._job.before.fixed_len or 1))

    def _units_of_step(self, step: int) -> tuple[list[Unit], int]:
        """A step's rows, taken from one random order of all after the other."""
        chosen = list(rows_of_step(self._training, step=step, count=self._rows_of_a_step, seed=self._job.step["seed"]))
        return self._units(chosen), sum(self._length(self._rows[row]) for row in chosen)

    def _judging(self) -> list[Unit]:
        return self._units(self._judged)

    def _units(self, rows: Sequence[int]) -> list[Unit]:
        """Rows of one shape together: few enough that each process gets some, unless texts are related to each other."""
        counts = {row: self._answers.count(row, self._rows[row]) for row in rows}
        total = sum(counts[row] for row in rows)
        found = []
        for _, group in groupby(sorted(rows, key=lambda row: str(_shapes(self._rows[row]))), key=lambda row: str(_shapes(self._rows[row]))):
            together = list(group)
            size = max(1, min(STEP_TOKENS // self._length(self._rows[together[0]]), -(-len(together) // self._team.size)))
            size = RELATED if self._job.step.method == "embeddings" else size
            for start in range(0, len(together), size):
                part = together[start : start + size]
                sample = {name: torch.cat([self._rows[row][name] for row in part]) for name in self._rows[part[0]]}
                found.append(Unit(sample=sample, target=self._answers.of(part), weight=sum(counts[row] for row in part) / total))
        return found


def looks(steps: int | None) -> list[int]:
    """After which steps of a budget in minutes their number is looked at: `TIMED`, and each twice the one before in the first half.

    >>> looks(None), looks(30), looks(5)
    ([4], [4, 8], [4])
    """
    found = [TIMED]
    while steps and 4 * found[-1] <= steps:
        found.append(2 * found[-1])
    return found


class Pace:
    """How fast a training goes, by its latest steps."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, int]] = []

    def add(self, seconds: float, tokens: int) -> None:
        self._taken = [*self._taken, (seconds, tokens)][-SAID:]

    @property
    def seconds(self) -> float:
        """Of a step; the first one, which loads what the others have, does not count where there are others."""
        counted = self._taken[1:] or self._taken
        return max(1e-9, sum(seconds for seconds, _ in counted) / len(counted))

    def said(self, steps: int, step: int) -> str:
        counted = self._taken[1:] or self._taken
        speed = sum(tokens for _, tokens in counted) / max(1e-9, sum(seconds for seconds, _ in counted))
        return f"{speed:.0f} positions/s, about {format_seconds(self.seconds * (steps - step))} left"


def cut_rows(batches: Sequence[Sample], *, length: int | None, said: str) -> Iterator[Sample]:
    """Single rows; those of nothing but tokens are cut to windows of `length`, or of at most `ROW_TOKENS`, and what is left over is dropped.

    Raises:
        TextError: rows shorter than the length that is asked for.
        RecipeError: a length asked for of rows that are not plain tokens.
    """
    for batch in batches:
        ids = batch.get("input_ids")
        labels = {name: value for name, value in labels_of(batch).items() if ids is not None and value.shape == ids.shape}
        others = set(batch) - {"input_ids", "attention_mask", *labels}
        plain = ids is not None and not others and bool(batch.get("attention_mask", torch.ones(1)).all())
        if not plain:
            if length is not None:
                raise RecipeError(f"{said}: seq_len={length} cuts rows of plain tokens, and these have {', '.join(batch)}; leave it out.")
            yield from ({name: value[row : row + 1] for name, value in batch.items()} for row in range(len(next(iter(batch.values())))))
            continue
        assert ids is not None, "plain rows are tokens"
        if length is not None and ids.shape[1] < length:
            raise TextError(f"{said}: seq_len={length} asks for longer rows than the text gives, {ids.shape[1]} tokens; give a longer text or less.")
        size = length or min(ROW_TOKENS, ids.shape[1])
        for row in range(len(ids)):
            for start in range(0, ids.shape[1] - size + 1, size):
                yield {name: value[row : row + 1, start : start + size] for name, value in {"input_ids": ids, **labels}.items()}


def rows_of_step(rows: Sequence[int], *, step: int, count: int, seed: int) -> Iterator[int]:
    """The rows of one step: each epoch has all of them in an order of its own, and steps go on where the last one ended."""
    for place in range(step * count, (step + 1) * count):
        epoch, index = divmod(place, len(rows))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed((seed << 20) + epoch))
        yield rows[int(order[index])]


def _gives_words(spec: ModelSpec, count: int) -> bool:
    """Whether the model's logits are of so many tokens, and not of classes."""
    return any(isinstance(part, Linear) and part.component == "head" and part.out_features == count for part in spec.parts)


def _held(job: Job) -> frozenset[str]:
    """Matrices whose zeros stay: those that are said to have some, and those that a step before changed."""
    found = set()
    for part in job.before.parts:
        if isinstance(part, Linear | Embedding):
            found |= {name for name in weights_of(part) if part.weight.sparsity > 0 or job.stage.touched(name)}
    return frozenset(found)


def _dense(job: Job, name: str) -> Tensor:
    found = job.stage[name]
    assert isinstance(found, Tensor), "the reading on the spec refuses this step after quantize"
    return found


def _state_widths(student: Skeleton, objective: Objective) -> dict[str, int]:
    """Width of the student's states by the key of a target, by its config."""
    module: Any = student.module
    width = int(module.config.get_text_config().hidden_size)
    return {"embedding": width} | {f"layer.{place}": width for place in range(len(objective.layers))}


def _shapes(row: Sample) -> list[tuple[str, tuple[int, ...]]]:
    return sorted((name, tuple(value.shape)) for name, value in row.items())
