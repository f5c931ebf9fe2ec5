"""Tuning what is left after quantization: scales and norms under frozen codes, codes by straight-through training, text to tune on.

Faults seeded by hand, each caught by a test below: (1) the gradient of a scale is the sum over the whole row instead of its group; (2) zero
points left out of a code's level; (3) the student held to itself instead of to the original; (4) codes moved up the gradient; (5) the mask of
a padded batch ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from lighten.compress.checkpoint import Checkpoint
from lighten.compress.distill_scales import Task, TuneSettings, cut, order, split, tune_scales
from lighten.compress.grid import QuantizedTensor, Weight
from lighten.compress.qat import train_codes
from lighten.compress.rtn import quantize_rtn
from lighten.compress.self_text import prefixes_of, sample_text
from lighten.compress.skeleton import Skeleton
from lighten.compress.student import Scales, Student, levels, with_scales
from lighten.compress.teacher import Teacher
from lighten.model.read import read_config

SETTINGS = TuneSettings(steps=8, learning_rate=1e-2, step_tokens=64, window=32)


class Case:
    """A tiny model's folder, its matrices of the blocks rounded, and inputs."""

    def __init__(self, folder: Path, config: Any, *, bits: int = 3, symmetric: bool = False, group_size: int = 16) -> None:
        self.folder = tiny_models.save(config, folder)
        self.checkpoint = Checkpoint(folder)
        self.skeleton = Skeleton(read_config(folder), {name: self.checkpoint.spec(name).shape for name in self.checkpoint.names}, dtype=torch.float32)
        in_units = {name for unit in self.skeleton.units if list(unit.module.children()) for name in self.skeleton.names_in(unit.module)}
        self.transposed = frozenset(name for name in in_units if ".c_" in name)
        self.weights: dict[str, Weight] = {}
        for name in sorted(in_units):
            tensor = self.checkpoint[name]
            if tensor.ndim == 2:
                rows = tensor.T if name in self.transposed else tensor
                self.weights[name] = quantize_rtn(rows, bits=bits, group_size=group_size, symmetric=symmetric)

    def source(self, name: str) -> Tensor:
        return self.checkpoint[name]

    def batches(self, rows: int = 16, length: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [{"input_ids": torch.randint(0, tiny_models.VOCAB, (rows, length), generator=generator)}]

    def distance(self, weights: Mapping[str, Weight], batches: list[dict[str, Tensor]]) -> float:
        """Of `weights`, expanded and loaded as any other checkpoint, by a plain computation."""
        ours, theirs = self.answers(weights, batches), self.answers({}, batches)
        if ours[0].shape[-1] != tiny_models.VOCAB:
            return sum(float((a - b).square().mean() / b.square().mean()) for a, b in zip(ours, theirs, strict=True)) / len(ours)
        each = [_divergence(b.log_softmax(-1), a.log_softmax(-1)) for a, b in zip(ours, theirs, strict=True)]
        return sum(each) / len(each)

    def answers(self, weights: Mapping[str, Weight], batches: list[dict[str, Tensor]]) -> list[Tensor]:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder)
        module = tiny_models.build(config)
        state = module.state_dict()
        for name in self.checkpoint.names:
            weight = weights.get(name, self.source(name))
            value = weight if isinstance(weight, Tensor) else weight.dequantize()
            state[name if name in state else f"{module.base_model_prefix}.{name}"].copy_(
                value.T if name in self.transposed and not isinstance(weight, Tensor) else value
            )
        with torch.no_grad():
            found = [module(**batch) for batch in batches]
        return [getattr(answer, "logits", None) if hasattr(answer, "logits") else answer.last_hidden_state for answer in found]


def scales_of(case: Case) -> dict[str, Scales]:
    return {name: Scales(weight, dtype=torch.float32) for name, weight in case.weights.items() if isinstance(weight, QuantizedTensor)}


def tune(case: Case, batches: list[dict[str, Tensor]], folder: Path, *, settings: TuneSettings = SETTINGS, **options: Any) -> dict[str, Weight]:
    codes, log = options.pop("codes", False), options.pop("log", lambda line: None)
    task = Task(skeleton=case.skeleton, source=case.source, weights=case.weights, transposed=case.transposed, batches=batches, folder=folder, log=log)
    return train_codes(task, settings, **options) if codes else tune_scales(task, settings)


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return Case(tmp_path / "llama", tiny_models.llama_config())


def gpt2_config() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        architectures=["GPT2LMHeadModel"], vocab_size=tiny_models.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
    )  # fmt: skip


CONFIGS = {"llama": tiny_models.llama_config, "gpt2": gpt2_config, "bert": tiny_models.bert_config}


@pytest.mark.parametrize("codes", [False, True], ids=["scales", "codes"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_distance_from_the_original_falls_on_the_text_and_formats_stay(family: str, codes: bool, tmp_path: Path) -> None:
    case = Case(tmp_path / family, CONFIGS[family]())
    batches = case.batches()
    found = tune(case, batches, tmp_path, codes=codes)
    assert case.distance({**case.weights, **found}, batches) < 0.8 * case.distance(case.weights, batches)
    assert {name for name, weight in found.items() if isinstance(weight, QuantizedTensor)} == set(case.weights)
    for name, weight in found.items():
        before = case.weights.get(name)
        if before is None:
            assert isinstance(weight, Tensor)
            assert weight.ndim == 1
            assert weight.dtype == case.source(name).dtype
            assert weight.isfinite().all()
            continue
        assert isinstance(weight, QuantizedTensor)
        assert isinstance(before, QuantizedTensor)
        assert weight.scale.dtype == torch.float16
        assert weight.scale.shape == before.scale.shape
        assert weight.scale.isfinite().all()
        assert (weight.bits, weight.group_size, weight.element) == (before.bits, before.group_size, before.element)
        assert weight.zero_point is not None
        assert before.zero_point is not None
        assert torch.equal(weight.zero_point, before.zero_point)
        assert weight.codes.dtype == torch.uint8
        assert int(weight.codes.max()) < 2**before.bits
        assert codes or torch.equal(weight.codes, before.codes)


def test_at_two_bits_training_codes_gets_further_than_scales_alone(tmp_path: Path) -> None:
    case = Case(tmp_path / "llama", tiny_models.llama_config(), bits=2, symmetric=True)
    batches = case.batches(rows=14)
    settings = TuneSettings(steps=24, learning_rate=1e-2, step_tokens=64, window=32)
    scales, codes = tune(case, batches, tmp_path, settings=settings), tune(case, batches, tmp_path, settings=settings, codes=True, code_rate=0.04)
    moved = [float((codes[name].codes != weight.codes).float().mean()) for name, weight in case.weights.items()]  # type: ignore[union-attr]
    assert all(0 < share < 0.5 for share in moved)
    assert case.distance({**case.weights, **codes}, batches) < 0.9 * case.distance({**case.weights, **scales}, batches)


@pytest.mark.parametrize("codes", [False, True], ids=["scales", "codes"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(codes: bool, llama: Case, tmp_path: Path) -> None:
    batches = llama.batches()
    first, again = tune(llama, batches, tmp_path, codes=codes), tune(llama, batches, tmp_path, codes=codes)
    other = tune(llama, batches, tmp_path, codes=codes, settings=TuneSettings(steps=8, learning_rate=1e-2, step_tokens=64, window=32, seed=1))
    assert all(torch.equal(_bytes(first[name]), _bytes(again[name])) for name in first)
    assert any(not torch.equal(_bytes(first[name]), _bytes(other[name])) for name in first)


def test_where_held_out_samples_get_worse_all_stays(llama: Case, tmp_path: Path) -> None:
    lines: list[str] = []
    wild = TuneSettings(steps=3, learning_rate=30.0, step_tokens=64, window=32)
    assert tune(llama, llama.batches(), tmp_path, settings=wild, log=lines.append) == {}
    assert "stays" in lines[-1]


def test_the_module_is_left_without_weights_and_with_its_own_forward(llama: Case, tmp_path: Path) -> None:
    tune(llama, llama.batches(), tmp_path)
    assert all(parameter.is_meta for parameter in llama.skeleton.module.parameters())
    assert all("forward" not in module.__dict__ for module in llama.skeleton.module.modules())
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_an_untouched_student_is_the_quantized_model_and_a_perfect_one_has_no_distance(llama: Case, tmp_path: Path) -> None:
    samples = list(cut(llama.batches(), step_tokens=64, window=32, fixed_len=1))
    with Teacher(llama.skeleton, llama.source, samples, tmp_path) as teacher:
        assert teacher.kind == "head"
        with Student(llama.skeleton, llama.source, {}, frozenset()) as student, student.ready():
            assert teacher.distance(0) == pytest.approx(0, abs=1e-6)
        with Student(llama.skeleton, llama.source, scales_of(llama), frozenset()) as student, student.ready():
            found = sum(teacher.distance(index) for index in range(len(samples))) / len(samples)
    assert found == pytest.approx(llama.distance(llama.weights, llama.batches()), rel=1e-4)


def test_the_gradient_of_a_scale_is_that_of_finite_differences(llama: Case, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    latent = scales_of(llama)[name]
    (leaf,) = latent.leaves()
    samples = list(cut(llama.batches(rows=2), step_tokens=64, window=32, fixed_len=1))
    with (
        Teacher(llama.skeleton, llama.source, samples, tmp_path) as teacher,
        Student(llama.skeleton, llama.source, {name: latent}, frozenset()) as student,
    ):
        with student.ready():
            teacher.descend(0)
        assert leaf.grad is not None
        for row, group in ((0, 0), (3, 2), (31, 3)):
            distances = []
            for change in (1e-2, -1e-2):
                with torch.no_grad():
                    leaf.zero_()
                    leaf[row, group] = change
                with student.ready():
                    distances.append(teacher.distance(0))
            assert float(leaf.grad[row, group]) == pytest.approx((distances[0] - distances[1]) / 2e-2, rel=0.03, abs=1e-6)


def test_padding_does_not_count(tmp_path: Path) -> None:
    case = Case(tmp_path / "bert", tiny_models.bert_config())
    (batch,) = case.batches(rows=2)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 20:] = 0
    distances = []
    for filler in (0, 7):
        ids = batch["input_ids"].clone()
        ids[:, 20:] = filler
        with Teacher(case.skeleton, case.source, [{"input_ids": ids, "attention_mask": mask}], tmp_path) as teacher:
            assert teacher.kind == "hidden"
            with Student(case.skeleton, case.source, scales_of(case), frozenset()) as student, student.ready():
                distances.append(teacher.distance(0))
    assert distances[0] == pytest.approx(distances[1], rel=1e-5)
    assert distances[0] > 0


def test_a_classifier_is_held_to_its_own_logits(tmp_path: Path) -> None:
    case = Case(tmp_path / "bert", tiny_models.bert_config("BertForSequenceClassification", num_labels=3))
    samples = list(cut(case.batches(rows=2), step_tokens=64, window=32, fixed_len=1))
    with Teacher(case.skeleton, case.source, samples, tmp_path) as teacher:
        assert teacher.kind == "logits"
        with Student(case.skeleton, case.source, scales_of(case), frozenset()) as student, student.ready():
            ours, theirs = case.answers(case.weights, samples)[0], case.answers({}, samples)[0]
            assert teacher.distance(0) == pytest.approx(_divergence(theirs.log_softmax(-1), ours.log_softmax(-1)), rel=1e-3)


def test_scales_of_eight_bits_stay(llama: Case, tmp_path: Path) -> None:
    name = next(iter(llama.weights))
    columns = llama.checkpoint.spec(name).shape[1]
    mxfp4 = QuantizedTensor(
        codes=torch.randint(0, 16, llama.checkpoint.spec(name).shape, dtype=torch.uint8), bits=4, group_size=32, element="e2m1", zero_point=None,
        scale=torch.full((llama.checkpoint.spec(name).shape[0], columns // 32), 122, dtype=torch.uint8),
    )  # fmt: skip
    llama.weights[name] = mxfp4
    assert name not in tune(llama, llama.batches(), tmp_path)
    assert name not in tune(llama, llama.batches(), tmp_path, codes=True)


def test_levels_and_scales_make_the_weight() -> None:
    torch.manual_seed(0)
    for symmetric in (True, False):
        weight = quantize_rtn(torch.randn(6, 32), bits=4, group_size=16, symmetric=symmetric)
        value = (levels(weight).float().reshape(6, 2, 16) * weight.scales()[..., None]).reshape(6, 32)
        assert torch.equal(value, weight.dequantize())
        assert torch.equal(with_scales(weight, weight.scales()).dequantize(), weight.dequantize())
    nvfp4 = QuantizedTensor(
        codes=torch.arange(16, dtype=torch.uint8)[None], scale=torch.full((1, 1), 2.0), zero_point=None, bits=4, group_size=16, element="e2m1",
        global_scale=torch.tensor([4.0]),
    )  # fmt: skip
    assert torch.equal(levels(nvfp4).float() * 0.5, nvfp4.dequantize())
    assert torch.equal(with_scales(nvfp4, nvfp4.scales() * 3).dequantize(), nvfp4.dequantize() * 3)


def test_samples_and_their_order() -> None:
    batch = {"input_ids": torch.arange(4 * 64).reshape(4, 64)}
    samples = list(cut([batch], step_tokens=64, window=32, fixed_len=1))
    assert [tuple(sample["input_ids"].shape) for sample in samples] == [(2, 32)] * 4
    assert torch.equal(torch.cat([sample["input_ids"].reshape(-1) for sample in samples]), torch.arange(256))
    masked = {**batch, "attention_mask": torch.zeros(4, 64, dtype=torch.long)}
    assert [set(sample) for sample in cut([masked], step_tokens=128, window=32, fixed_len=1)] == [{"input_ids", "attention_mask"}] * 2
    training, held_out = split(17)
    assert held_out == [7, 15]
    assert sorted(training + held_out) == list(range(17))
    met = list(order(training, steps=40, seed=0))
    assert len(met) == 40
    assert set(met[:15]) == set(training) == set(met[15:30])
    assert met[:15] != met[15:30]


def test_self_text_goes_on_from_the_calibration_text_and_follows_its_seed(llama: Case) -> None:
    rows = torch.arange(40).reshape(2, 20)
    prefixes = prefixes_of(rows, count=3, length=4)
    assert prefixes.tolist() == [[0, 1, 2, 3], [18, 19, 20, 21], [36, 37, 38, 39]]
    first, again, other = (sample_text(llama.skeleton, llama.source, prefixes, length=12, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (3, 12)
    assert torch.equal(first[:, :4], prefixes)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(parameter.is_meta for parameter in llama.skeleton.module.parameters())


def test_self_text_is_likely_under_the_original(llama: Case) -> None:
    text = sample_text(llama.skeleton, llama.source, torch.zeros(8, 1, dtype=torch.long), length=24, top_p=0.1)
    (logits,) = llama.answers({}, [{"input_ids": text}])
    chosen = logits[:, :-1].softmax(-1).gather(-1, text[:, 1:, None])
    assert float(chosen.mean()) > 5 / tiny_models.VOCAB


def _divergence(original: Tensor, ours: Tensor) -> float:
    return float((original.exp() * (original - ours)).sum(-1).mean())


def _bytes(weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    assert isinstance(weight, QuantizedTensor)
    return torch.cat([weight.codes.float().reshape(-1), weight.scale.float().reshape(-1)])
