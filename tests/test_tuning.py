"""Training with adapters, masters and other losses against the storages that live when torch does the same on tiny Llamas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_truth import spec_of
from live_bytes import LiveBytes
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lighten.cost.adapters import adapter_parameters
from lighten.cost.cross_entropy import CHUNKS, loss_bytes
from lighten.cost.memory import workload_memory
from lighten.cost.tuning import memory_of, tuned_operators
from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model.spec import ModelSpec

CONFIG = {
    "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Adapted(torch.nn.Module):
    """A linear with an adapter, as PEFT 0.21 computes it (`peft/tuners/lora/layer.py`), without dropout."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = torch.nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
        self.lora_b = torch.nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        kept = result.dtype
        x = x.to(self.lora_a.weight.dtype)
        result = result + self.lora_b(self.lora_a(x)) * 2.0
        return result.to(kept)


def model_of(dtype: str, **more: Any) -> tuple[LlamaForCausalLM, ModelSpec]:
    config = LlamaConfig(**(CONFIG | more))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).train(), spec_of(config, "LlamaForCausalLM")


def adapt(model: LlamaForCausalLM, rank: int, targets: str) -> None:
    model.requires_grad_(False)
    for layer in model.model.layers:
        for holder in (layer.self_attn, layer.mlp):
            for name, child in list(holder.named_children()):
                if isinstance(child, torch.nn.Linear) and (targets == "all-linear" or name in targets.split(",")):
                    setattr(holder, name, Adapted(child, rank))


def lived(model: torch.nn.Module, step: Callable[[], torch.Tensor], ids: torch.Tensor) -> int:
    """The most bytes that live in a second step with AdamW."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    live = LiveBytes()
    with live:
        live.watch([*model.parameters(), *model.buffers(), ids], "there before")
        for _ in range(2):
            live.start_over()
            loss = step()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
    return live.peak


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear", "down_proj"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_torchs_to_the_byte_and_in_16_bits_nearly(dtype, targets):
    model, spec = model_of(dtype)
    adapt(model, 4, targets)
    ids = torch.zeros(2, 48, dtype=torch.long)
    truth = lived(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, ids)
    workload = Workload(phase="train", batch_size=2, seq_len=48, dtype=dtype, optimizer="adamw", lora_rank=4, lora_targets=targets, attention="sdpa")
    found = memory_of(spec, workload)
    assert found.peak == (truth if dtype == "float32" else pytest.approx(truth, rel=0.005))
    assert found.gradients <= 4 * adapter_parameters(spec, 4, targets)
    assert found.optimizer == 8 * adapter_parameters(spec, 4, targets) + 4 * sum("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chunked_loss_is_torchs_within_two_percent(dtype):
    model, spec = model_of(dtype, vocab_size=4000, num_hidden_layers=1)
    ids = torch.zeros(2, 64, dtype=torch.long)

    def loss_of(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model.lm_head(part).float(), target, reduction="sum")

    def step() -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        pieces = zip(hidden.flatten(0, 1).chunk(CHUNKS), ids.flatten().chunk(CHUNKS), strict=True)
        return sum((checkpoint(loss_of, part, target, use_reentrant=False) for part, target in pieces), torch.zeros(()))

    truth = lived(model, step, ids)
    found = memory_of(spec, Workload(phase="train", batch_size=2, seq_len=64, dtype=dtype, optimizer="adamw", cross_entropy="chunked"))
    assert found.peak == pytest.approx(truth, rel=0.02)


def test_a_plain_workload_is_workload_memory():
    _, spec = model_of("float32")
    for workload in (Workload(phase="train", optimizer="adamw", seq_len=32), Workload(phase="decode", seq_len=8, new_tokens=2)):
        assert memory_of(spec, workload) == workload_memory(spec, workload)


def test_masters_are_four_bytes_and_the_state_is_float32():
    _, spec = model_of("bfloat16")
    plain = Workload(phase="train", optimizer="adamw", dtype="bfloat16", seq_len=32)
    kept, found = workload_memory(spec, plain), memory_of(spec, replace(plain, master_weights=True))
    count, tensors = spec.total_parameters, sum(len(part.tensors()) for part in spec.parts)
    assert found.weights == kept.weights == 2 * count
    assert found.optimizer == 12 * count + 4 * tensors
    assert kept.optimizer == 4 * count + 4 * tensors


def test_a_fused_loss_has_the_heads_gradient_before_backward():
    _, spec = model_of("bfloat16", vocab_size=32_000)
    workload = {"phase": "train", "optimizer": "sgd", "dtype": "bfloat16", "seq_len": 64, "batch_size": 8}
    full, fused = (memory_of(spec, Workload(**workload, cross_entropy=kind)) for kind in ("full", "fused"))
    logits = loss_bytes("full", rows=512, vocab_size=32_000, hidden_size=32, dtype="bfloat16")
    assert full.activations + full.temporary > logits.backward * 0.9
    assert fused.peak < full.peak / 3
    assert fused.gradients >= 2 * 32_000 * 32


def test_a_quantized_base_weighs_what_adapters_say():
    _, spec = model_of("bfloat16")
    options = {"phase": "train", "optimizer": "adamw", "dtype": "bfloat16", "seq_len": 32, "lora_rank": 2}
    whole, narrow = memory_of(spec, Workload(**options)), memory_of(spec, Workload(**options, base_bits=8))
    assert narrow.weights < whole.weights
    assert whole.peak - narrow.peak == whole.weights - narrow.weights


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,k_proj,v_proj", "down_proj"])
def test_flops_of_a_step_with_adapters_are_torchs(targets):
    model, spec = model_of("float32")
    model.set_attn_implementation("eager")
    adapt(model, 4, targets)
    ids = torch.zeros(2, 48, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    workload = Workload(phase="train", batch_size=2, seq_len=48, optimizer="adamw", lora_rank=4, lora_targets=targets)
    assert sum(op.matmul_flops * times for op, times in tuned_operators(spec, workload)) == counter.get_total_flops()


def test_flops_of_a_step_without_adapters_are_three_forwards():
    _, spec = model_of("float32")
    found = tuned_operators(spec, Workload(phase="train", optimizer="sgd", seq_len=16))
    assert {times for op, times in found if op.matmul_flops} == {3}


@pytest.mark.parametrize(("kept_by", "tokens"), [("transformers-static", 39), ("vllm", 48), ("llama.cpp", 256)])
def test_another_keepers_cache_takes_the_place_of_the_growing_one(kept_by, tokens):
    _, spec = model_of("float16")
    found = memory_of(spec, Workload(phase="generate", seq_len=32, new_tokens=8, dtype="float16", kept_by=kept_by))
    assert found.kv_cache == 3 * tokens * 2 * 2 * 8 * 2


def test_recomputation_with_adapters_is_torchs():
    model, spec = model_of("float32", num_hidden_layers=8)
    adapt(model, 2, "q_proj,v_proj")
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    ids = torch.zeros(4, 48, dtype=torch.long)
    truth = lived(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, ids)
    options = {"phase": "train", "optimizer": "adamw", "seq_len": 48, "batch_size": 4, "lora_rank": 2, "lora_targets": "q_proj,v_proj"}
    found = memory_of(spec, Workload(**options, recompute="full"))
    assert found.peak == pytest.approx(truth, rel=0.02)
    assert found.peak < memory_of(spec, Workload(**options)).peak


def test_a_loss_by_pieces_needs_a_vocabulary():
    config = LlamaConfig(**CONFIG)
    spec = spec_of(config, "LlamaModel")
    with pytest.raises(WorkloadError, match="cross_entropy=fused needs logits at each position; LlamaModel has no such head"):
        memory_of(spec, Workload(phase="train", optimizer="adamw", seq_len=8, cross_entropy="fused"))
