"""Memory in closed form, against the life of every storage in PyTorch and against figures from outside."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import OPTIMIZERS, LiveBytes, track
from transformers import BertConfig, DynamicCache, LlamaConfig, PretrainedConfig

from lighten.cost.memory import MemoryBreakdown, kv_cache_bytes, workload_memory
from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model.families import FAMILIES, describe
from lighten.model.spec import Linear, ModelSpec, Part, WeightFormat

HELD_AGAINST = torch.__version__.startswith("2.13.") and transformers.__version__ == "5.23.0"
TOLERANCE = 0.0 if HELD_AGAINST else 0.01
"""To the byte with the versions that the formulas were written against; within the promise with others."""

TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}


def bert(architecture: str = "BertModel", **changes: Any) -> BertConfig:
    return BertConfig(architectures=[architecture], **(TINY | {"max_position_embeddings": 128} | changes))


def llama(architecture: str = "LlamaForCausalLM", **changes: Any) -> LlamaConfig:
    options = TINY | {"max_position_embeddings": 4096, "num_key_value_heads": 2, "tie_word_embeddings": True} | changes
    return LlamaConfig(architectures=[architecture], **options)


# the published shapes of all-MiniLM-L6-v2 and SmolLM2-135M
MINILM = bert(vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, max_position_embeddings=512)
SMOLLM2 = llama(
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    head_dim=64,
)


def spec_of(config: PretrainedConfig) -> ModelSpec:
    raw, architecture = config.to_dict(), config.architectures[0]
    return ModelSpec(
        name=architecture, family=config.model_type, architecture=architecture, source="", dtype="float32",
        config=raw, parts=describe(raw, architecture),
    )  # fmt: skip


def check(config: PretrainedConfig, workload: Workload, tolerance: float = TOLERANCE) -> LiveBytes:
    live = track(config, workload, fake=config.hidden_size > 100)  # true tensors are faster where they are small
    assert workload_memory(spec_of(config), workload).peak == pytest.approx(live.peak, rel=tolerance, abs=0)
    return live


# Contract: every phase × attention × type and size, on the modules of transformers

SIZES = {"several": (3, 20), "one sequence": (1, 64), "short": (4, 8)}
PHASES: dict[str, dict[str, Any]] = {
    "prefill": {"phase": "prefill"},
    "decode": {"phase": "decode", "new_tokens": 5},
    "generate": {"phase": "generate", "new_tokens": 5},
    "generate one": {"phase": "generate", "new_tokens": 1},
    "train": {"phase": "train", "optimizer": "adamw"},
    "recompute": {"phase": "train", "optimizer": "sgd", "recompute": "full"},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("size", "dtype"), [("several", "float32"), ("one sequence", "float32"), ("short", "bfloat16")])
def test_llama_agrees_with_every_storage_of_a_run(phase: str, attention: Any, size: str, dtype: str) -> None:
    batch_size, seq_len = SIZES[size]
    check(llama(), Workload(**PHASES[phase], attention=attention, batch_size=batch_size, seq_len=seq_len, dtype=dtype))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("phase", ["encode", "train", "recompute"])
@pytest.mark.parametrize(("size", "dtype"), [("several", "float32"), ("one sequence", "float32"), ("short", "bfloat16")])
def test_bert_agrees_with_every_storage_of_a_run(phase: str, attention: Any, size: str, dtype: str) -> None:
    batch_size, seq_len = SIZES[size]
    options = PHASES.get(phase, {"phase": phase})
    tolerance = max(TOLERANCE, 0.0005) if phase == "recompute" else TOLERANCE  # one bias too many
    check(bert(), Workload(**options, attention=attention, batch_size=batch_size, seq_len=seq_len, dtype=dtype), tolerance)


OTHER_LABELS = ("ForQuestionAnswering", "ForPreTraining", "ForNextSentencePrediction", "ForMultipleChoice")
TO_THE_BYTE = (
    "BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification", "LlamaModel", "LlamaForCausalLM"
)  # fmt: skip


@pytest.mark.parametrize("architecture", [*FAMILIES["bert"].architectures, *FAMILIES["llama"].architectures])
def test_every_architecture_trains_in_the_memory_predicted(architecture: str) -> None:
    if architecture.endswith(OTHER_LABELS):
        pytest.skip("its loss takes more than one label, which the oracle does not give")
    config = llama(architecture, pad_token_id=0) if architecture.startswith("Llama") else bert(architecture, is_decoder="LMHead" in architecture)
    tolerance = TOLERANCE if architecture in TO_THE_BYTE else 0.01
    check(config, Workload(phase="train", batch_size=3, seq_len=20, optimizer="adamw", attention="eager"), tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_of_torch_holds_what_is_predicted(optimizer: str) -> None:
    check(llama(), Workload(phase="train", batch_size=1, seq_len=2, optimizer=optimizer))  # so short that the update is the fullest moment


VARIANTS = {
    "one key/value head": llama(num_key_value_heads=1),
    "as many key/value heads": llama(num_key_value_heads=4),
    "untied": llama(tie_word_embeddings=False),
    "biases": llama(attention_bias=True, mlp_bias=True),
    "wide heads": llama(head_dim=16),
    "relu": llama(hidden_act="relu"),
    "attention dropout": llama(attention_dropout=0.1),
    "no dropout": bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gelu_new": bert(hidden_act="gelu_new"),
}


@pytest.mark.parametrize(
    ("name", "attention", "batch_size"),
    [(n, a, b) for n, (a, b) in zip(VARIANTS, itertools.cycle([("eager", 1), ("sdpa", 3), ("eager", 3), ("sdpa", 1)]), strict=False)],
)
def test_variants_agree_in_training_and_inference(name: str, attention: Any, batch_size: int) -> None:
    config = VARIANTS[name]
    forward = "encode" if config.model_type == "bert" else "prefill"
    check(config, Workload(phase=forward, batch_size=batch_size, seq_len=40, attention=attention))
    check(config, Workload(phase="train", batch_size=batch_size, seq_len=40, attention=attention, optimizer="sgd"))


def test_recomputation_stops_where_nothing_more_is_saved() -> None:
    """In an MLP this narrow the block's last sums would be the fullest moment, but torch.utils.checkpoint does not come to them."""
    config = llama(intermediate_size=8, num_hidden_layers=1, vocab_size=20)
    check(config, Workload(phase="train", batch_size=8, seq_len=60, optimizer="sgd", recompute="full"))


# Real shapes


@pytest.mark.parametrize(("config", "peak"), [(MINILM, 679_655_836), (SMOLLM2, 3_971_507_272)], ids=["MiniLM", "SmolLM2"])
def test_training_peaks_known_from_outside(config: PretrainedConfig, peak: int) -> None:
    """AdamW, fp32, 4 × 256, eager, second step: live bytes of the real models, measured by another program before this package was."""
    workload = Workload(phase="train", batch_size=4, seq_len=256, attention="eager", optimizer="adamw")
    assert workload_memory(spec_of(config), workload).peak == peak
    assert track(config, workload).peak == pytest.approx(peak, rel=TOLERANCE, abs=0)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (MINILM, {"phase": "encode", "batch_size": 4, "seq_len": 256, "attention": "eager"}),
        (MINILM, {"phase": "train", "batch_size": 32, "seq_len": 512, "optimizer": "sgd", "dtype": "bfloat16"}),
        (SMOLLM2, {"phase": "prefill", "batch_size": 4, "seq_len": 256, "attention": "eager"}),
        (SMOLLM2, {"phase": "decode", "batch_size": 8, "seq_len": 2000, "new_tokens": 16, "dtype": "bfloat16"}),
        (SMOLLM2, {"phase": "generate", "batch_size": 1, "seq_len": 1000, "new_tokens": 16}),
    ],
    ids=lambda value: value["phase"] if isinstance(value, dict) else value.model_type,
)
def test_real_shapes_agree(config: PretrainedConfig, options: dict[str, Any]) -> None:
    check(config, Workload(**options))


# The oracle itself


@pytest.mark.parametrize(("config", "phase"), [(bert(), "train"), (llama(), "train"), (llama(), "prefill"), (llama(), "decode")])
def test_fake_tensors_live_as_true_ones_do(config: PretrainedConfig, phase: str) -> None:
    workload = Workload(**PHASES[phase], batch_size=2, seq_len=30)
    assert track(config, workload).peak == track(config, workload, fake=False).peak


def test_a_storage_is_counted_once_and_until_its_last_view_dies() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(10)
        part = whole[2:]
        assert live.now == 40
        del whole
        assert live.now == 40
        del part
    assert (live.now, live.peak) == (0, 40)


# Keys and values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_cache_is_as_large_as_a_real_one(dtype: str) -> None:
    config, shape = llama(), (3, 2, 17, 8)  # batch, key/value heads, tokens, head_dim
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(shape, dtype=getattr(torch, dtype)), torch.zeros(shape, dtype=getattr(torch, dtype)), layer)
    stored = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_cache_bytes(spec_of(config), batch_size=3, context_len=17, dtype=dtype) == stored


def test_kv_cache_of_llama_2_7b_is_half_a_megabyte_a_token() -> None:
    """2 GiB at its 4,096 tokens: by the product that Kwon et al. 2023 (arXiv:2309.06180, section 3) write out for a model of 13 B."""
    spec = spec_of(llama(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32))
    assert kv_cache_bytes(spec, batch_size=1, context_len=4096, dtype="float16") == 2 * 2**30


@given(batch_size=st.integers(1, 64), context_len=st.integers(1, 10_000), times=st.integers(2, 9))
def test_kv_cache_is_linear_in_batch_and_length(batch_size: int, context_len: int, times: int) -> None:
    once = kv_cache_bytes(SMALL["llama"], batch_size=batch_size, context_len=context_len, dtype="bfloat16")
    assert kv_cache_bytes(SMALL["llama"], batch_size=times * batch_size, context_len=context_len, dtype="bfloat16") == times * once
    assert kv_cache_bytes(SMALL["llama"], batch_size=batch_size, context_len=times * context_len, dtype="bfloat16") == times * once


def test_an_encoder_has_no_kv_cache() -> None:
    assert kv_cache_bytes(SMALL["bert"], batch_size=4, context_len=100, dtype="float32") == 0


def test_decode_holds_the_whole_cache_and_the_old_copy_of_what_it_extends() -> None:
    memory = workload_memory(SMALL["llama"], Workload(phase="decode", batch_size=2, seq_len=100, new_tokens=8))
    whole = kv_cache_bytes(SMALL["llama"], batch_size=2, context_len=108, dtype="float32")
    one_layer = whole // 2
    assert whole <= memory.kv_cache <= whole + one_layer // 2


def test_a_narrower_cache_is_smaller() -> None:
    workload = Workload(phase="decode", batch_size=2, seq_len=100, new_tokens=8)
    memory = workload_memory(SMALL["llama"], workload), workload_memory(SMALL["llama"], replace(workload, kv_dtype="float8_e4m3fn"))
    assert memory[0].kv_cache == 4 * memory[1].kv_cache


# Properties

SMALL = {"bert": spec_of(bert(max_position_embeddings=400)), "llama": spec_of(llama())}
workloads = st.builds(
    lambda family, phase, **sizes: (family, Workload(**({"phase": "encode"} if phase is None else PHASES[phase]), **sizes)),
    family=st.just("llama"),
    phase=st.sampled_from(list(PHASES)),
    batch_size=st.integers(1, 8),
    seq_len=st.integers(1, 300),
    attention=st.sampled_from(["eager", "sdpa", "flash"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
) | st.builds(
    lambda phase, **sizes: ("bert", Workload(**PHASES.get(phase, {"phase": phase}), **sizes)),
    phase=st.sampled_from(["encode", "train", "recompute"]),
    batch_size=st.integers(1, 8),
    seq_len=st.integers(1, 300),
    attention=st.sampled_from(["eager", "sdpa", "flash"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@given(case=workloads, more=st.integers(1, 50))
def test_memory_grows_with_batch_and_length(case: tuple[str, Workload], more: int) -> None:
    family, workload = case
    peak = workload_memory(SMALL[family], workload).peak
    assert workload_memory(SMALL[family], replace(workload, batch_size=workload.batch_size + more)).peak >= peak
    assert workload_memory(SMALL[family], replace(workload, seq_len=workload.seq_len + more)).peak >= peak


@given(case=workloads)
def test_parts_are_counted_once_and_none_is_left_behind(case: tuple[str, Workload]) -> None:
    family, workload = case
    memory = workload_memory(SMALL[family], workload)
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.kv_cache, memory.temporary]
    assert min(parts) >= 0
    assert memory.peak == sum(parts)
    assert memory.weights == SMALL[family].total_parameters * (4 if workload.dtype == "float32" else 2)
    assert workload_memory(SMALL[family], workload) == memory


@given(case=workloads.filter(lambda case: case[1].phase == "train"))
def test_recomputation_and_plain_descent_need_no_more(case: tuple[str, Workload]) -> None:
    family, workload = case
    plain = workload_memory(SMALL[family], replace(workload, recompute="none", optimizer="adamw"))
    assert workload_memory(SMALL[family], replace(workload, recompute="full", optimizer="adamw")).peak <= plain.peak
    assert workload_memory(SMALL[family], replace(workload, recompute="none", optimizer="sgd")).peak < plain.peak


def test_flash_is_the_fused_kernel() -> None:
    workload = Workload(phase="train", batch_size=2, seq_len=200, optimizer="sgd")
    fused = workload_memory(SMALL["llama"], replace(workload, attention="flash"))
    assert fused == workload_memory(SMALL["llama"], workload)
    scores = 2 * 4 * 200 * 200 * 4
    assert workload_memory(SMALL["bert"], replace(workload, attention="flash")).peak < workload_memory(SMALL["bert"], workload).peak - scores


def test_quantized_weights_shrink_what_holds_weights_alone() -> None:
    def quantize(part: Part) -> Part:
        return replace(part, weight=WeightFormat(bits=4, group_size=16)) if isinstance(part, Linear) and not part.tied_to else part

    spec, workload = SMALL["llama"], Workload(phase="prefill", batch_size=2, seq_len=10)
    before, after = workload_memory(spec, workload), workload_memory(spec.with_parts(quantize), workload)
    linear = sum(p.in_features * p.out_features for p in spec.parts if isinstance(p, Linear) and not p.tied_to)
    assert before.weights - after.weights == linear * 4 - (linear // 2 + linear // 16 * 2)  # codes of 4 bits, a float16 scale for 16
    assert (before.activations, before.temporary) == (after.activations, after.temporary)


def test_a_weight_in_two_factors_holds_its_inner_product_too() -> None:
    def factors(part: Part) -> list[Part]:
        if not (isinstance(part, Linear) and part.name.endswith(("q_proj", "up_proj"))):
            return [part]
        return [replace(part, name=f"{part.name}.0", out_features=6), replace(part, name=f"{part.name}.1", in_features=6)]

    spec = SMALL["llama"]
    thin = replace(spec, parts=tuple(factor for part in spec.parts for factor in factors(part)))
    workload = Workload(phase="train", batch_size=3, seq_len=50, optimizer="sgd")
    before, after = workload_memory(spec, workload), workload_memory(thin, workload)
    inner = 2 * 2 * 3 * 50 * 6 * 4  # two of them in each of two layers, saved for the second factor's gradient
    assert after.activations - before.activations == inner
    assert after.weights < before.weights


# Answers


def test_fits_is_certain_only_where_nothing_unknown_decides() -> None:
    known = MemoryBreakdown(weights=60, gradients=10, optimizer=20, activations=5, kv_cache=0, temporary=5, overhead=10)
    assert known.peak == 110
    assert known.fits(110) is True
    assert known.fits(109) is False
    assert replace(known, overhead=None).fits(99) is False
    assert replace(known, overhead=None).fits(100) is None


def test_a_phase_that_does_not_fit_is_refused() -> None:
    with pytest.raises(WorkloadError, match="is an encoder"):
        workload_memory(SMALL["bert"], Workload(phase="prefill"))
