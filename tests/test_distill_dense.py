"""Training of dense weights against the original's answers: losses, zeros, resumption, one teacher for all epochs, several processes.

Faults put in by hand, each caught: the squared temperature left out; the bucket of the rest left out of the top-k loss; pruned weights not masked;
a resumed run that starts its optimizer anew; the order of rows begun anew on resume; a second pass of the teacher on resume; gradients of two
processes taken as half of what they are; a unit that only keeps processes in step counted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from any_architecture import calibration, save_architecture
from torch import Tensor

from lighten.cli.main import main
from lighten.compress import answers, distill_dense, training
from lighten.compress.checkpoint import Checkpoint
from lighten.compress.distances import (
    TopLogits,
    cosine_distance,
    divergence,
    keep_top,
    pooled,
    relation_distance,
    relational_distance,
    state_distance,
)
from lighten.compress.distill_dense import Pace, cut_rows, rows_of_step
from lighten.compress.distill_scales import CURVE_POINTS, thinned
from lighten.compress.journal import Journal
from lighten.compress.lion import Lion
from lighten.compress.pupil import MOST_LAYERS, mapped
from lighten.compress.training import make_optimizer, rate_at
from lighten.compress.walk import Done, do_recipe
from lighten.errors import LightenError, RecipeError, TextError
from lighten.formats.safetensors_folder import expanded_weights
from lighten.model.source import read_spec
from lighten.recipe import apply_recipe, parse_recipe
from lighten.recipe.distill import LEARNING_RATES, MEMORIES

Rows = list[dict[str, np.ndarray[Any, Any]]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_architecture("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_architecture("bert", tmp_path_factory.mktemp("models") / "bert")


def rows(count: int = 32, length: int = 16, seed: int = 3) -> Callable[[int], Rows]:
    ids = np.random.default_rng(seed).integers(4, 64, (count, length))
    return lambda tokens: [{"input_ids": ids}]


@contextmanager
def done(folder: Path, text: str, work: Path, *, resume: bool = False, **options: Any) -> Iterator[Done]:
    options = {"calibration": rows(), "batch_rows": 2} | options
    with Journal.open(work, {}, resume=resume) as journal:
        yield do_recipe(Checkpoint(folder), read_spec(folder), parse_recipe(text), folder, journal, **options)


def weights(folder: Path, text: str, work: Path, **options: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    with done(folder, text, work, **options) as found:
        return {name: weight.clone() for name, weight, _ in found.weights if isinstance(weight, Tensor)}, found.curves[0]


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- distances ----


def brute_divergence(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """By the formula, one position and one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for z, ours in zip(target.double(), logits.double(), strict=True):
        p, q = (z / temperature).exp(), (ours / temperature).exp()
        p, q = p / p.sum(), q / q.sum()
        for a, b in zip(p, q, strict=True):
            total = total + temperature**2 * a * (a / b).log()
    return total


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_divergence_is_the_formula_with_its_squared_temperature_and_so_is_its_gradient(temperature: float) -> None:
    target, logits = draw(3, 7), draw(3, 7, seed=1).requires_grad_()
    found = divergence(target, logits, temperature=temperature)
    expected = brute_divergence(target, logits, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    (true,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(gradient, true.float(), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_largest_of_all_logits_give_the_whole_divergence(temperature: float) -> None:
    target, logits = draw(5, 9), draw(5, 9, seed=1).requires_grad_()
    top = keep_top(target, count=99, temperature=temperature)
    assert top.values.shape == (5, 9)
    one, other = divergence(top, logits, temperature=temperature), divergence(target, logits, temperature=temperature)
    assert one.item() == pytest.approx(other.item(), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(one, logits)[0], torch.autograd.grad(other, logits)[0], atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_largest_logits_and_one_bucket_are_a_distribution(count: int) -> None:
    target, logits = draw(4, 9), draw(4, 9, seed=1).requires_grad_()
    temperature = 2.0
    found = divergence(keep_top(target, count=count, temperature=temperature), logits, temperature=temperature)
    p, q = (target / temperature).softmax(-1).double(), (logits.double() / temperature).softmax(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        chosen = p[row].argsort(descending=True)[:count]
        rest = [column for column in range(9) if column not in chosen.tolist()]
        expected = expected + (p[row, chosen] * (p[row, chosen] / q[row, chosen]).log()).sum()
        expected = expected + p[row, rest].sum() * (p[row, rest].sum() / q[row, rest].sum()).log()
    assert found.item() == pytest.approx(temperature**2 * expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    (true,) = torch.autograd.grad(temperature**2 * expected, logits)
    assert torch.allclose(gradient, true.float(), atol=1e-5)


def test_a_student_that_is_sure_of_another_token_has_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[500.0, 0.0, 0.0, 0.0]]).requires_grad_()
    top = keep_top(torch.tensor([[0.0, 0.0, 3.0, 0.0]]), count=1, temperature=1.0)
    found = divergence(TopLogits(values=top.values, ids=torch.tensor([[0]], dtype=torch.int32), log_sum=top.log_sum), logits, temperature=1.0)
    assert torch.isfinite(found)
    assert torch.isfinite(torch.autograd.grad(found, logits)[0]).all()


def test_embeddings_that_are_turned_and_scaled_keep_their_relations_and_lose_their_cosine() -> None:
    theirs = draw(6, 8)
    turn = torch.linalg.qr(draw(8, 8, seed=2)).Q
    assert float(relational_distance(theirs, 3 * theirs @ turn)) == pytest.approx(0, abs=1e-9)
    assert float(cosine_distance(theirs, 3 * theirs)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(theirs, theirs @ turn)) > 0.1


def test_relations_are_the_formula() -> None:
    theirs, ours = draw(5, 8), draw(5, 3, seed=1)

    def apart(vectors: Tensor) -> dict[tuple[int, int], float]:
        unit = [vector / vector.norm() for vector in vectors.double()]
        found = {(a, b): float((unit[a] - unit[b]).norm()) for a in range(5) for b in range(a + 1, 5)}
        mean = sum(found.values()) / len(found)
        return {pair: value / mean for pair, value in found.items()}

    one, other = apart(theirs), apart(ours)
    gaps = [abs(one[pair] - other[pair]) for pair in one]
    huber = [gap**2 / 2 if gap <= 1 else gap - 0.5 for gap in gaps]
    assert float(relational_distance(theirs, ours)) == pytest.approx(sum(huber) / len(huber), rel=1e-5)
    assert float(relational_distance(theirs[:2], ours[:2])) == 0


def test_states_count_where_the_mask_says_so_relative_to_their_size() -> None:
    theirs, counts = draw(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    ours = theirs.clone()
    ours[~counts] += 100
    assert float(state_distance(theirs, ours, counts, size=2.0)) == 0
    ours[0, 0] += 1
    assert float(state_distance(theirs, ours, counts, size=2.0)) == pytest.approx(1 / 3 / 2)


def test_attention_is_compared_across_widths_and_heads_and_never_with_what_comes_later() -> None:
    theirs, counts = draw(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    assert float(relation_distance(theirs, theirs, counts, heads=2, causal=True)) == pytest.approx(0, abs=1e-6)
    ours = draw(2, 5, 4, seed=1)
    first = torch.tensor([[True, False, False, False, False]] * 2)
    assert float(relation_distance(theirs, ours, first, heads=2, causal=True)) == pytest.approx(0, abs=1e-6)  # the first position sees itself alone
    assert float(relation_distance(theirs, ours, counts, heads=2, causal=False)) > 0.01


def test_a_text_is_pooled_over_what_counts() -> None:
    states, counts = draw(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    assert torch.allclose(pooled(states, counts, first_token=False)[0], states[0, :2].mean(0))
    assert torch.equal(pooled(states, counts, first_token=True), states[:, 0])


# ---- layers, order, rates ----


def test_layers_of_a_shallower_student_are_spread_over_the_teachers() -> None:
    assert mapped(4, 12) == [2, 5, 8, 11]
    assert mapped(12, 12) == list(range(12))
    assert all(mapped(n, total)[-1] == total - 1 and len(set(mapped(n, total))) == n for total in range(1, 40) for n in range(1, total + 1))
    assert MOST_LAYERS == 4


def test_each_epoch_has_each_row_once_and_any_step_is_found_without_the_steps_before() -> None:
    numbers = [2, 3, 5, 7, 11, 13, 17]
    taken = [row for step in range(7) for row in rows_of_step(numbers, step=step, count=3, seed=5)]
    assert [sorted(taken[start : start + 7]) for start in (0, 7, 14)] == [numbers] * 3
    assert taken[:7] != taken[7:14]
    assert list(rows_of_step(numbers, step=4, count=3, seed=5)) == taken[12:15]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_and_falls(schedule: str) -> None:
    found = [rate_at(step, steps=50, warm_up=5, schedule=schedule) for step in range(50)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later <= before for before, later in pairwise(found[5:]))
    assert 0 < found[-1] < 0.05


def test_lion_is_the_papers_program() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    optimizer, momentum = Lion([weight], lr=0.1), torch.zeros(3)
    expected = weight.detach().clone()
    for gradient in (torch.tensor([0.3, -1.0, 0.0]), torch.tensor([-0.1, 2.0, 0.0])):
        weight.grad = gradient.clone()
        optimizer.step()
        expected = expected - 0.1 * torch.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient
    assert torch.allclose(weight, expected)


def test_every_optimizer_has_a_learning_rate_and_its_memory_is_counted() -> None:
    for name in LEARNING_RATES:
        weight = torch.nn.Parameter(torch.ones(8, 4))
        optimizer = make_optimizer(name, [weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        numbers = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.ndim)
        assert numbers <= MEMORIES[name] * weight.numel()
    assert LEARNING_RATES.keys() == MEMORIES.keys()


def test_a_long_curve_keeps_its_end() -> None:
    curve = [(step, 10 * step, 1.0) for step in range(1, 1002)]
    assert thinned(curve)[-1] == curve[-1]
    assert len(thinned(curve)) <= CURVE_POINTS
    assert thinned(curve[:7]) == curve[:7]


# ---- whole steps ----

PRUNED = "prune(magnitude, sparsity=0.5) | distill(logits, steps=12, batch_tokens=64, learning_rate=0.003, tokens=512"


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_the_distance_falls_and_zeros_stay_exactly_where_they_were(llama: Path, tmp_path: Path, optimizer: str) -> None:
    rate = {"sgd": 0.02, "adafactor": 0.02, "lion": 0.001}.get(optimizer, 0.003)
    text = PRUNED.replace("learning_rate=0.003", f"learning_rate={rate}, optimizer={optimizer}") + ")"
    found, said = weights(llama, text, tmp_path / "work")
    pruned, _ = pruned_only(llama, "prune(magnitude, sparsity=0.5)", tmp_path / "pruned")
    assert said["kept"]
    assert said["held_out"][1] < said["held_out"][0]
    matrices = [name for name, weight in found.items() if weight.ndim == 2 and "embed" not in name]
    assert matrices
    assert all(torch.equal(found[name] == 0, pruned[name] == 0) for name in matrices)
    assert all(not torch.equal(found[name], pruned[name]) for name in found)  # tables and norms are trained too


def pruned_only(folder: Path, text: str, work: Path) -> tuple[dict[str, Tensor], Any]:
    with done(folder, text, work) as found:
        return {name: weight.clone() for name, weight, _ in found.weights if isinstance(weight, Tensor)}, found


def test_zeros_of_a_threshold_stay_too(llama: Path, tmp_path: Path) -> None:
    """How many there are is not in the spec."""
    pruned, _ = pruned_only(llama, "prune(magnitude, threshold=0.05)", tmp_path / "pruned")
    found, _ = weights(llama, PRUNED.replace("sparsity=0.5", "threshold=0.05") + ")", tmp_path / "work")
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0.1 < float((pruned[name] == 0).float().mean()) < 0.9
    assert torch.equal(found[name] == 0, pruned[name] == 0)


def test_tables_stay_where_that_is_asked_for(llama: Path, tmp_path: Path) -> None:
    found, _ = weights(llama, f"{PRUNED}, embeddings=false)", tmp_path / "work")
    assert torch.equal(found["model.embed_tokens.weight"], Checkpoint(llama)["model.embed_tokens.weight"])


def test_an_unchanged_model_is_at_no_distance_and_stays(llama: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found, report = weights(llama, "distill(logits, steps=2, batch_tokens=64)", tmp_path / "work", log=said.append)
    assert report["held_out"][0] == pytest.approx(0, abs=1e-6)
    assert not report["kept"]
    assert any("all stays as it was" in line for line in said)
    assert all(torch.equal(weight, Checkpoint(llama)[name]) for name, weight in found.items())


def test_recomputed_blocks_give_the_same_training(llama: Path, tmp_path: Path) -> None:
    one, first = weights(llama, f"{PRUNED}, hidden=0.5, attention=0.5)", tmp_path / "one")
    other, second = weights(llama, f"{PRUNED}, hidden=0.5, attention=0.5, recompute=true)", tmp_path / "other")
    assert [point[2] for point in first["curve"]] == pytest.approx([point[2] for point in second["curve"]], rel=1e-5)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_bfloat16_computes_near_float32_and_keeps_its_weights_in_float32(llama: Path, tmp_path: Path) -> None:
    one, first = weights(llama, f"{PRUNED})", tmp_path / "one")
    other, second = weights(llama, f"{PRUNED}, dtype=bfloat16)", tmp_path / "other")
    assert second["held_out"][0] == pytest.approx(first["held_out"][0], rel=0.05)
    assert second["held_out"][1] == pytest.approx(first["held_out"][1], rel=0.1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert other[name].dtype == torch.float32
    assert not torch.equal(other[name], other[name].bfloat16().float())
    assert not torch.equal(one[name], other[name])


def test_all_logits_as_the_largest_train_as_whole_distributions_do(llama: Path, tmp_path: Path) -> None:
    _, first = weights(llama, f"{PRUNED}, temperature=2.0)", tmp_path / "one")
    _, second = weights(llama, f"{PRUNED}, temperature=2.0, top_k=64)", tmp_path / "other")
    assert [point[2] for point in first["curve"]] == pytest.approx([point[2] for point in second["curve"]], rel=1e-3)
    _, third = weights(llama, f"{PRUNED}, temperature=2.0, top_k=4)", tmp_path / "third")
    assert 0 < third["held_out"][0] < first["held_out"][0]  # a bucket hides differences


def test_embeddings_are_brought_near_by_cosine_and_relations(bert: Path, tmp_path: Path) -> None:
    text = "prune(magnitude, sparsity=0.5) | distill(embeddings, steps=20, batch_tokens=256, learning_rate=0.002, hidden=0.2)"
    found, said = weights(bert, text, tmp_path / "work")
    assert said["held_out"][1] < 0.6 * said["held_out"][0]
    assert float((found["encoder.layer.0.output.dense.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


# ---- one teacher ----


def test_later_epochs_and_resumed_runs_never_ask_the_teacher(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = answers._ask
    monkeypatch.setattr(answers, "_ask", lambda asking, batch: asked.append(1) or ask(asking, batch))
    monkeypatch.setattr(distill_dense, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(distill_dense, "SAVE_SHARE", 0)
    text = PRUNED.replace("steps=12", "steps=40") + ")"
    taken: list[int] = []
    step = training.Trainer.step

    def interrupted(self: Any, units: Any, rate: float) -> Any:
        taken.append(1)
        if len(taken) == 25:  # three epochs of 28 rows, 4 a step, are over
            raise KeyboardInterrupt
        return step(self, units, rate)

    monkeypatch.setattr(training.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt), done(llama, text, tmp_path / "work"):
        pass
    assert len(asked) == 8  # 32 rows, 4 at once
    found, said = weights(llama, text, tmp_path / "work", resume=True)
    assert len(asked) == 8
    assert said["teacher_passes"] == 8
    assert len(taken) == 25 + 16
    monkeypatch.setattr(training.Trainer, "step", step)
    whole, uninterrupted = weights(llama, text, tmp_path / "whole")
    assert equal(found, whole)
    assert said == json.loads(json.dumps(uninterrupted))


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_a_run_that_is_gone_on_with_ends_in_the_same_bytes(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    monkeypatch.setattr(distill_dense, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(distill_dense, "SAVE_SHARE", 0)
    text = PRUNED + f", optimizer={optimizer})"
    whole, _ = weights(llama, text, tmp_path / "whole")
    write = Journal.write

    def killed(self: Journal, number: int, block: str, *given: Any) -> None:
        write(self, number, block, *given)
        if block == "training" and given[1][0]["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", killed)
    with pytest.raises(KeyboardInterrupt), done(llama, text, tmp_path / "work"):
        pass
    monkeypatch.setattr(Journal, "write", write)
    found, _ = weights(llama, text, tmp_path / "work", resume=True)
    assert equal(found, whole)
    assert [path.name for path in (tmp_path / "work" / "pass-01").iterdir()] == ["all.block"]  # nothing of the training stays


def test_a_budget_of_minutes_keeps_its_steps_when_it_is_resumed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    text = PRUNED.replace("steps=12", "minutes<=0.02") + ")"
    write = Journal.write

    def killed(self: Journal, number: int, block: str, *given: Any) -> None:
        write(self, number, block, *given)
        if block == "training":
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", killed)
    with pytest.raises(KeyboardInterrupt), done(llama, text, tmp_path / "work"):
        pass
    monkeypatch.setattr(Journal, "write", write)
    with Journal.open(tmp_path / "work", {}, resume=True) as journal:
        steps = journal.read(1, "plan").reports[0]["steps"]
    assert steps >= 4
    _, report = weights(llama, text, tmp_path / "work", resume=True, log=said.append)
    assert report["steps"] == steps
    assert any(line.startswith("going on after step 4") for line in said)


def test_a_step_that_meets_a_row_twice_is_a_mean_all_the_same(bert: Path, tmp_path: Path) -> None:
    """28 rows are trained on: once, twice and ten times in a step."""
    first = [
        weights(bert, f"prune(magnitude, sparsity=0.5) | distill(embeddings, steps=1, batch_tokens={16 * count}, relational=0, span_tokens=0)",
                tmp_path / str(count))[1]["curve"][0][2]
        for count in (28, 56, 280)
    ]  # fmt: skip
    assert first[1] == pytest.approx(first[0], rel=1e-4)
    assert first[2] == pytest.approx(first[0], rel=1e-4)


def test_a_training_has_the_rate_of_its_method(llama: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    highest: list[float] = []
    step = training.Leader.step

    def spy(self: training.Leader, units: Any, rate: float) -> Any:
        highest[-1] = max(highest[-1], rate)
        return step(self, units, rate)

    monkeypatch.setattr(training.Leader, "step", spy)
    for folder, method in ((llama, "logits"), (bert, "embeddings")):
        highest.append(0.0)
        weights(folder, f"prune(magnitude, sparsity=0.5) | distill({method}, steps=10, batch_tokens=64)", tmp_path / method)
    assert highest == [pytest.approx(1e-4), pytest.approx(5e-4)]


def test_the_steps_of_a_budget_of_minutes_follow_the_pace(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Pace, "seconds", property(lambda pace: 0.5 if len(pace._taken) < 8 else 20.0))
    _, report = weights(llama, PRUNED.replace("steps=12", "minutes<=1") + ")", tmp_path / "work", log=said.append)
    assert 8 < report["steps"] < 12
    assert len(report["curve"]) == report["steps"]
    assert f"{report['steps']} steps, for they take 20 s now" in said


# ---- a student of another shape ----


class Shrunk:
    """What a step that removes blocks leaves: a stage and a spec of its own."""

    def __init__(self, before: Any, kept: Callable[[str], str | None], cut: Callable[[str, Tensor], Tensor] = lambda name, value: value) -> None:
        self._before, self._cut = before, cut
        self._from = {new: name for name in before.names if (new := kept(name)) is not None}

    @property
    def names(self) -> list[str]:
        return list(self._from)

    def __getitem__(self, name: str) -> Tensor:
        return self._cut(name, self._before[self._from[name]])

    def touched(self, name: str) -> bool:
        return False

    def said(self, name: str) -> Mapping[str, Any]:
        return {}


def shrunk_job(folder: Path, student: Path, text: str, work: Path, stage: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A distillation of a stage whose spec is that of another folder."""
    from lighten.compress.stage import Original
    from lighten.compress.walk import Job, Run

    (step,) = parse_recipe(text).steps
    spec = read_spec(student)
    with Journal.open(work, {}, resume=False) as journal:
        run = Run(
            folder=folder, spec=read_spec(folder), original=Original(checkpoint=Checkpoint(folder)), journal=journal, calibration=rows(),
            log=lambda line: None,
        )  # fmt: skip
        job = Job(run=run, number=0, step=step, before=spec, after=spec, stage=stage(run.original), reference=run.original, dense=run.original)
        after, _ = distill_dense.distill_dense(job)
        return {name: after[name].clone() for name in after.names}, dict(run.curves[0])


def test_a_student_of_fewer_blocks_learns_from_mapped_ones(tmp_path: Path) -> None:
    teacher = save_architecture("llama", tmp_path / "teacher", num_hidden_layers=4)
    student = save_architecture("llama", tmp_path / "student", num_hidden_layers=2)

    def kept(name: str) -> str | None:
        place = name.split(".")[2] if "layers" in name else None
        return name if place in (None, "0") else name.replace(".3.", ".1.") if place == "3" else None

    text = "distill(logits, steps=20, batch_tokens=64, learning_rate=0.003, hidden=0.3, attention=0.3)"
    found, said = shrunk_job(teacher, student, text, tmp_path / "work", lambda before: Shrunk(before, kept))
    assert said["held_out"][1] < 0.9 * said["held_out"][0]
    assert "model.layers.1.mlp.up_proj.weight" in found
    assert not any(".layers.2." in name for name in found)


def test_a_narrower_student_learns_through_projections_that_are_dropped(tmp_path: Path) -> None:
    teacher = save_architecture("llama", tmp_path / "teacher")
    student = save_architecture("llama", tmp_path / "student", hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=8)
    shapes = {name: Checkpoint(student).spec(name).shape for name in Checkpoint(student).names}

    def cut(name: str, value: Tensor) -> Tensor:
        return value[tuple(slice(0, size) for size in shapes[name])].clone()

    text = "distill(logits, steps=20, batch_tokens=64, learning_rate=0.003, hidden=0.3, attention=0.3)"
    found, said = shrunk_job(teacher, student, text, tmp_path / "work", lambda before: Shrunk(before, lambda name: name, cut))
    assert said["held_out"][1] < 0.9 * said["held_out"][0]
    assert {name: tuple(value.shape) for name, value in found.items()} == {name: tuple(shape) for name, shape in shapes.items()}


# ---- several processes, and kills ----

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
OFTEN = """
import sys
from lighten.cli.main import main
from lighten.compress import distill_dense
distill_dense.SAVE_SECONDS, distill_dense.SAVE_SHARE = 0.0, 0
sys.exit(main(sys.argv[1:]))
"""


def command(model: Path, recipe: str, out: Path, *more: str) -> list[str]:
    return ["compress", str(model), "--recipe", recipe, "-o", str(out), *more]


def curve_of(out: Path) -> list[float]:
    return [point[2] for point in json.loads((out / "lighten.json").read_text())["curves"][0]["curve"]]


@pytest.fixture(scope="module")
def text_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a tokenizer."""
    return tiny_models.save(tiny_models.llama_config(), tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(("parallel", "batch"), [("ddp", 32), ("fsdp", 96)])
def test_two_processes_have_the_loss_of_one(text_llama: Path, tmp_path: Path, parallel: str, batch: int) -> None:
    """Of one row a step, which leaves nothing for the second, and of three."""
    training_said = f"distill(logits, steps=5, batch_tokens={batch}, seq_len=32, tokens=1024, hidden=0.3, learning_rate=0.003"
    recipe = f"prune(magnitude, sparsity=0.5) | {training_said}"
    assert main(command(text_llama, f"{recipe})", tmp_path / "one")) == 0
    launched = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
    ]
    more = command(text_llama, f"{recipe}, parallel={parallel})", tmp_path / "two")
    ran = subprocess.run(
        [*launched, "lighten", *more], capture_output=True, text=True, timeout=120, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert curve_of(tmp_path / "two") == pytest.approx(curve_of(tmp_path / "one"), abs=1e-3)
    one, two = (dict(expanded_weights(tmp_path / name, read_spec(tmp_path / name))) for name in ("one", "two"))
    assert torch.equal(one["model.layers.0.mlp.up_proj.weight"] == 0, two["model.layers.0.mlp.up_proj.weight"] == 0)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("line", ["step 2 of", "step 7 of"])
def test_a_killed_run_ends_in_the_same_weights(text_llama: Path, tmp_path: Path, line: str) -> None:
    recipe = "prune(magnitude, sparsity=0.5) | distill(logits, steps=9, batch_tokens=64, seq_len=32, tokens=1024, learning_rate=0.003)"
    assert main(command(text_llama, recipe, tmp_path / "whole")) == 0
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    begun = [sys.executable, "-c", OFTEN, *command(text_llama, recipe, tmp_path / "killed")]
    run = subprocess.Popen(begun, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT | threads)
    assert run.stderr is not None
    for said in run.stderr:
        if said.startswith(line):
            run.send_signal(signal.SIGKILL)
            break
    run.stderr.read()
    run.stderr.close()
    assert run.wait() == -signal.SIGKILL
    assert main(command(text_llama, recipe, tmp_path / "killed", "--resume")) == 0
    one, other = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one.names)
    assert (tmp_path / "whole" / "lighten.json").read_text() == (tmp_path / "killed" / "lighten.json").read_text()


# ---- what is refused ----

REFUSED = {
    "distill(logits, steps=5, minutes<=2)": "give at most one of steps, train_tokens, minutes; given: steps, minutes.",
    "distill(logits, train_tokens=5, steps=2)": "give at most one of steps, train_tokens, minutes; given: steps, train_tokens.",
    "distill(logits, minutes=2)": "distill(logits): minutes is written minutes<=value.",
    "distill(logits, optimizer=rmsprop)": "optimizer is one of adamw, adam, sgd, adafactor, lion.",
    "distill(embeddings, top_k=5)": "distill(embeddings) has no argument top_k",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_said_is_one_line(text: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(text)
    assert REFUSED[text] in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("llama", "quantize(rtn) | distill(logits)", "trains dense weights and model.layers.0.self_attn.q_proj is quantized to 8 bits"),
        ("llama", "distill(embeddings)", "gives logits and no embeddings; use distill(logits)"),
        ("bert", "distill(logits)", "has no head that gives logits; use distill(embeddings)"),
        ("t5", "distill(logits, self_tokens=64)", "self_tokens are written by a decoder"),
        ("mixtral", "distill(logits, parallel=fsdp)", "chooses among experts; use parallel=ddp"),
        ("llama", "distill(logits, parallel=fsdp, optimizer=adafactor)", "use parallel=ddp or optimizer=adamw"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_on_its_spec(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        apply_recipe(parse_recipe(text), read_spec(save_architecture(name, tmp_path / "model")))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("llama", "distill(logits, seq_len=512)", "seq_len=512 asks for longer rows than the text gives, 16 tokens"),
        ("llama", "distill(logits, parallel=ddp)", "start them by `torchrun --nproc-per-node 2 -m lighten compress …`"),
        ("mamba", "distill(logits, attention=1)", "which MambaForCausalLM does not call in its last block; leave attention out"),
        ("vit", "distill(embeddings, seq_len=8)", "seq_len=8 cuts rows of plain tokens, and these have pixel_values; leave it out"),
    ],
)
def test_a_text_or_a_way_that_does_not_fit_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    folder = save_architecture(name, tmp_path / "model")
    with pytest.raises(LightenError) as error, done(folder, text, tmp_path / "work", calibration=calibration(name)):
        pass
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_processes_without_a_step_that_is_spread_are_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert main(command(llama, "quantize(rtn)", tmp_path / "out")) == 2
    assert "no step of quantize(rtn) @ torch is spread over them; say parallel=ddp or parallel=fsdp in it." in capsys.readouterr().err


def test_rows_are_cut_and_what_is_left_over_is_dropped() -> None:
    ids = torch.arange(70).reshape(2, 35)
    found = list(cut_rows([{"input_ids": ids}], length=16, said="distill"))
    assert [row["input_ids"].tolist()[0] for row in found] == [list(range(start, start + 16)) for start in (0, 16, 35, 51)]
    with pytest.raises(TextError):
        list(cut_rows([{"input_ids": ids}], length=36, said="distill"))
    masked = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 35, [1] * 30 + [0] * 5])}
    assert [row["input_ids"].shape for row in cut_rows([masked], length=None, said="distill")] == [(1, 35)] * 2
