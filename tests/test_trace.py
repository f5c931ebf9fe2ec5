"""Following models: held against PyTorch's own counter, the tracker of live storages, hand-worked modules, and golden figures."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import live_bytes
import pytest
import torch
from transformers import AutoConfig

import lighten
from lighten.cost.workload import Workload
from lighten.errors import LightenError, ModelError, TraceError, WorkloadError
from lighten.trace import cache
from lighten.trace.fit import fit
from lighten.trace.open import open_model
from lighten.trace.program import Storage, Timeline
from lighten.trace.torch_model import TransformersModel
from lighten.trace.torch_module import TorchModule, from_factory

TINY = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODE = Workload(phase="encode", batch_size=2, seq_len=12)
TRAIN = Workload(phase="train", batch_size=2, seq_len=12, optimizer="adamw", attention="eager")


def followed(model_type: str, architecture: str, **changes: Any) -> TransformersModel:
    return TransformersModel(AutoConfig.for_model(model_type, architectures=[architecture], **(TINY | changes)))


# ---- golden figures ----


@pytest.mark.parametrize(("length", "flops"), [(128, 35_559_309_312), (512, 155_826_782_208)])
def test_smollm2_has_the_flops_that_pytorch_counts(smollm2, length, flops):
    model = open_model(smollm2, method="trace")
    assert model.follow(Workload(phase="prefill", seq_len=length, attention="eager")).matmul_flops == flops
    assert model.follow(Workload(phase="prefill", seq_len=length)).matmul_flops == flops  # a fused kernel counts what its products would


def test_minilm_trains_in_the_bytes_that_live(minilm):
    """679,655,836 bytes, AdamW, float32, 4 × 256, second step: measured on real tensors."""
    program = open_model(minilm, method="trace").follow(replace(TRAIN, batch_size=4, seq_len=256))
    assert program.memory.peak == 679_655_836
    assert program.total_parameters == 22_713_216


# ---- against the tracker of live storages, which shares no code ----


@pytest.mark.parametrize(
    ("model_type", "architecture", "changes"),
    [("bert", "BertForMaskedLM", {}), ("llama", "LlamaForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True})],
)
@pytest.mark.parametrize("workload", [
    TRAIN, replace(TRAIN, attention="sdpa"), replace(TRAIN, optimizer="sgd"), replace(TRAIN, optimizer="adafactor"),
    replace(TRAIN, recompute="full"), replace(TRAIN, dtype="bfloat16"),
])  # fmt: skip
def test_a_training_step_is_followed_to_the_byte(model_type, architecture, changes, workload):
    model = followed(model_type, architecture, **changes)
    config = AutoConfig.for_model(model_type, architectures=[architecture], **(TINY | changes))
    truth = live_bytes.track(config, workload, fake=workload.optimizer != "adafactor")  # which reads norms off its tensors
    assert model.follow(workload).memory.peak == truth.peak


@pytest.mark.parametrize("phase", ["prefill", "decode", "generate"])
def test_a_generation_is_followed_to_the_byte(phase):
    workload = Workload(phase=phase, batch_size=2, seq_len=12, new_tokens=0 if phase == "prefill" else 5)
    model = followed("llama", "LlamaForCausalLM", num_key_value_heads=2)
    config = AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], **TINY, num_key_value_heads=2)
    truth = live_bytes.track(config, workload).peak
    assert abs(model.follow(workload).memory.peak - truth) <= 8 * workload.batch_size * workload.seq_len  # the prompt's ids may be gone


def test_selective_recomputation_keeps_no_scores_and_computes_them_again():
    """Korthikanti et al. 2022: the core of attention keeps its inputs; the scores' product runs twice, the last one not, for it saves nothing."""
    model = followed("llama", "LlamaForCausalLM")
    none, selective, full = (model.follow(replace(TRAIN, seq_len=64, recompute=kind)) for kind in ("none", "selective", "full"))
    scores = 2 * 2 * 4 * 64 * 64  # layers, sequences, heads
    assert selective.matmul_flops - none.matmul_flops == 2 * scores * 8
    assert full.memory.peak < selective.memory.peak < none.memory.peak
    with pytest.raises(WorkloadError, match="cannot be told apart"):
        lighten.estimate(net(), inputs=torch.zeros(4, 10), phase="train", recompute="selective")


# ---- FLOPs ----


def test_experts_count_those_that_a_token_meets():
    model = followed("mixtral", "MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    program = model.follow(Workload(phase="prefill", batch_size=2, seq_len=12))
    expert = 3 * 32 * 48
    assert program.total_parameters - (program.active_parameters or 0) == 2 * (4 - 2) * expert
    experts = sum(op.matmul_flops * count for op, count in program.ops if ".experts" in op.name)
    assert experts == 2 * 24 * 2 * 2 * expert  # 24 tokens, two experts each, two layers
    assert not program.unknown_ops


def test_steps_of_a_generation_add_up():
    model = followed("llama", "LlamaForCausalLM", num_hidden_layers=1)

    def flops(new: int, seq_len: int) -> int:
        return model.follow(Workload(phase="decode", batch_size=2, seq_len=seq_len, new_tokens=new)).matmul_flops

    for new in (3, 4):
        assert flops(new, 10) == sum(flops(1, 10 + step) for step in range(new))


def test_masked_scores_are_known_from_a_fused_kernel_alone():
    model = followed("llama", "LlamaForCausalLM")
    fused, eager = (model.follow(Workload(phase="prefill", batch_size=2, seq_len=12, attention=kind)) for kind in ("sdpa", "eager"))
    assert eager.matmul_causal is None
    pairs = 12 * 12 - 12 * 13 // 2  # scores of a sequence that are masked
    assert fused.matmul_causal == fused.matmul_flops - 2 * 2 * 4 * 2 * 8 * 2 * pairs  # two layers, two sequences, four heads, two products


def test_an_operator_of_ones_own_is_named_not_dropped():
    @torch.library.custom_op("lighten_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    found = lighten.estimate(Net(), inputs=torch.zeros(2, 3))
    assert any("lighten_tests.twice.default" in warning for warning in found.warnings)


# ---- modules ----


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 1))


def test_a_modules_figures_worked_by_hand():
    found = lighten.estimate(net(), inputs=torch.zeros(4, 10)).as_json()
    assert found["parameters"]["total"] == 10 * 20 + 20 + 20 + 1
    assert found["flops"]["matmul"] == 2 * 4 * (10 * 20 + 20)
    # weights, input, and at the fullest moment the first layer's output with the second's or the third's
    assert found["memory"]["peak"] == 4 * (241 + 40 + 80 + 80)
    assert found["method"] == "trace"
    assert found["labels"]["memory"] == "exact"


def test_a_live_module_is_neither_read_nor_changed():
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    lighten.estimate(module, inputs=torch.zeros(4, 10), phase="train")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_sizes_of_a_modules_inputs_can_be_asked_for():
    found = lighten.estimate(net(), inputs=torch.zeros(4, 10), batch_size=8)
    assert sum(found.matmul.values()) == 2 * 8 * (10 * 20 + 20)


def test_a_summary_shows_each_submodule():
    table = lighten.summary(net(), torch.zeros(4, 10))
    assert [(row.kind, row.parameters, row.flops) for row in table.rows if row.depth] == [
        ("Linear", 220, 1600), ("ReLU", 0, 80), ("Linear", 21, 160),
    ]  # fmt: skip
    whole = table.rows[0]
    assert (whole.parameters, whole.flops) == (241, 1840)
    assert "Linear" in str(table)


class Reads(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[: int(x.sum())]


@pytest.mark.parametrize(
    ("model", "inputs", "error", "text"),
    [
        (Reads(), torch.zeros(2, 3), TraceError, "could not be followed on tensors without memory"),
        (net(), None, TraceError, "give inputs"),
        (net(), [], TraceError, "inputs hold no tensor"),
        (net(), torch.zeros(4, 11), TraceError, "could not be followed"),
        (object(), None, ModelError, "no model"),
    ],
)
def test_what_cannot_be_followed_says_why_in_one_line(model, inputs, error, text):
    with pytest.raises(error, match=text) as caught:
        lighten.estimate(model, inputs=inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "text"), [
    ({"method": "formula"}, "method=formula"), ({"phase": "prefill"}, "phases: encode, train"), ({"method": "guess"}, "known: auto, formula, trace"),
    ({"recipe": "quantize(rtn, bits=4)"}, "takes no recipe"), ({"phase": "train", "recompute": "full"}, "no way to switch"),
])  # fmt: skip
def test_options_that_do_not_fit_a_module_are_refused(options, text):
    with pytest.raises(LightenError, match=text):
        lighten.estimate(net(), inputs=torch.zeros(4, 10), **options)


# ---- factories ----

FACTORY = """
import torch
def make():
    return torch.nn.Linear(10, 20), torch.zeros(4, 10)
def alone():
    return torch.nn.Linear(10, 20)
def fails():
    raise KeyError("of its own")
"""


def test_a_factory_is_called_and_followed(tmp_path, monkeypatch):
    (tmp_path / "made_by_tests.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    assert from_factory("made_by_tests:make").follow(Workload(phase="encode", batch_size=4, seq_len=10)).matmul_flops == 2 * 4 * 200
    for name, text in [("alone", "returned a Linear"), ("fails", "of its own"), ("missing", "missing")]:
        with pytest.raises(ModelError, match=text):
            from_factory(f"made_by_tests:{name}")
    with pytest.raises(ModelError, match="no_such_module"):
        from_factory("no_such_module:make")


# ---- fits ----


@pytest.mark.parametrize("workload", [
    TRAIN, Workload(phase="generate", new_tokens=2), Workload(phase="prefill", attention="eager"),
])  # fmt: skip
def test_a_fit_is_what_following_gives(workload):
    model = followed("llama", "LlamaForCausalLM", num_key_value_heads=2, num_hidden_layers=1)
    fitted = fit(model, workload, batches=(1, 40), lengths=(4, 200))
    for batch, length in [(1, 150), (7, 33), (40, 200)]:
        program = model.follow(replace(workload, batch_size=batch, seq_len=length))
        found = fitted.at([batch], [length])
        assert fitted.memory(batch, length) == program.memory
        assert int(found["matmul"][0]) == program.matmul_flops
        assert int(found["total_flops"][0]) == sum(op.flops * count for op, count in program.ops)
    with pytest.raises(TraceError, match="outside"):
        fitted.at([2], [201])


def test_what_is_no_polynomial_is_not_extrapolated():
    class Halves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, : x.shape[1] // 3] * 2

    with pytest.raises(TraceError, match="no polynomial"):
        fit(TorchModule(Halves(), torch.zeros(2, 12)), ENCODE, batches=(2, 8), lengths=(4, 64))


def test_a_known_model_needs_no_torch(tmp_path, monkeypatch):
    config = AutoConfig.for_model("fnet", architectures=["FNetForMaskedLM"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    followed_now = lighten.estimate(tmp_path, batch_size=3, seq_len=40)
    monkeypatch.setattr("lighten.trace.open._has_transformers", lambda: False)
    known = lighten.estimate(tmp_path, batch_size=3, seq_len=40)
    assert known.labels["memory"] == "extrapolated"
    assert (known.memory, known.matmul, known.total_flops) == (followed_now.memory, followed_now.matmul, followed_now.total_flops)
    assert known.spec.total_parameters == followed_now.spec.total_parameters
    assert any("FLOPs not known" in warning for warning in known.warnings)  # the Fourier transform
    with pytest.raises(WorkloadError, match="travels with lighten for these workloads alone: encode"):
        lighten.estimate(tmp_path, phase="train", optimizer="sgd")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"num_hidden_layers": 3}))
    with pytest.raises(LightenError, match="needs torch and transformers"):
        lighten.estimate(tmp_path)


# ---- timelines ----


def test_a_timelines_fullest_moment():
    storages = [Storage(bytes=size, kind=kind, module="", operator="") for size, kind in [(5, "weights"), (3, "activations"), (4, "temporary")]]
    timeline = Timeline(storages=storages, events=(0, 1, -2, 2))
    assert timeline.curve() == [5, 8, 5, 9]
    assert timeline.fullest() == 3
    assert [storage.bytes for storage in timeline.living(3)] == [5, 4]
    assert timeline.breakdown().temporary == 4


# ---- what is kept ----


def test_a_program_is_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTEN_HOME", str(tmp_path))
    model = followed("llama", "LlamaForCausalLM")
    first = cache.follow_once(model, TRAIN)
    (kept,) = (tmp_path / "traces").iterdir()
    monkeypatch.setattr(TransformersModel, "follow", lambda *_: pytest.fail("followed twice"))
    assert cache.follow_once(model, TRAIN) == replace(first, timelines=cache.follow_once(model, TRAIN).timelines)
    monkeypatch.undo()
    monkeypatch.setenv("LIGHTEN_HOME", str(tmp_path))
    kept.write_bytes(b"damaged")
    assert cache.follow_once(model, TRAIN).memory == first.memory
    assert cache.follow_once(model, replace(TRAIN, batch_size=3)).memory != first.memory
