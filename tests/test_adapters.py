"""Adapters against the counts that papers and libraries publish, and against PEFT's and bitsandbytes' own tensors (read once, cited here)."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.cost.adapters import adapted_linears, adapter_dtype, adapter_parameters, adapter_shapes, frozen_bytes, quantized_bytes
from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model.families import describe
from lighten.model.spec import Embedding, Linear, ModelSpec, Norm, WeightFormat

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
QWEN_2_5_3B = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
}  # fmt: skip
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}


def spec_of(config: dict[str, Any], model_type: str = "llama", architecture: str = "LlamaForCausalLM") -> ModelSpec:
    raw = config | {"model_type": model_type}
    return ModelSpec(
        name="a model", family=model_type, architecture=architecture, source="", dtype="float32", config=raw, parts=describe(raw, architecture)
    )


def one_linear(rows: int, columns: int, **more: Any) -> Linear:
    return Linear(name="layers.0.mlp", component="mlp", in_features=columns, out_features=rows, **more)


def test_published_counts():
    # Lightning-AI/litgpt, tutorials/resource-tables.md: LoRA of rank 8 on queries and values of Llama-2-7B
    assert adapter_parameters(spec_of(LLAMA_2_7B), 8, "q_proj,v_proj") == 4_194_304
    # huggingface/peft, README: Qwen2.5-3B, rank 16 on PEFT's default targets; the attention's shapes are those of its config
    assert adapter_parameters(spec_of(QWEN_2_5_3B), 16, "q_proj,v_proj") == 3_686_400


@pytest.mark.parametrize(
    ("model_type", "architecture", "targets", "expected"),
    [
        ("llama", "LlamaForCausalLM", "all-linear", 4096),
        ("llama", "LlamaForCausalLM", "q_proj,v_proj", 896),
        ("bert", "BertForMaskedLM", "all-linear", 3840),
        ("bert", "BertForMaskedLM", "query,value", 1024),
        ("bert", "BertForSequenceClassification", "all-linear", 3840),
    ],
)
def test_a_tiny_model_has_the_adapters_that_peft_gives_it(model_type, architecture, targets, expected):
    # summed over `lora_` parameters of get_peft_model, PEFT 0.21.2 and transformers 5.23, rank 4
    more = {"num_key_value_heads": 4} if model_type == "bert" else {}
    bert = {"max_position_embeddings": 64, "type_vocab_size": 2} if model_type == "bert" else {}
    assert adapter_parameters(spec_of(TINY | more | bert, model_type, architecture), 4, targets) == expected


@settings(max_examples=30)
@given(rank=st.integers(1, 64), rows=st.integers(1, 300), columns=st.integers(1, 300), experts=st.integers(1, 5))
def test_an_adapter_is_two_thin_matrices_for_each_linear(rank, rows, columns, experts):
    part = one_linear(rows, columns, experts=experts, bias=True)
    spec = ModelSpec(name="", family="", architecture="", source="", dtype="float32", config={}, parts=(part,))
    shapes = adapter_shapes(spec, rank, "mlp")
    assert shapes == [(rank, columns), (rows, rank)] * experts
    assert adapter_parameters(spec, rank, "mlp") == experts * rank * (rows + columns) == sum(map(math.prod, shapes))


def test_shared_weights_get_one_adapter_and_the_output_none():
    parts = (
        Embedding(name="embed", component="embedding", num_embeddings=100, embedding_dim=8),
        one_linear(8, 8),
        Linear(name="layers.1.mlp", component="mlp", in_features=8, out_features=8, tied_to="layers.0.mlp"),
        Linear(name="head.dense", component="head", in_features=8, out_features=8),
        Linear(name="head.out", component="head", in_features=8, out_features=100),
    )
    spec = ModelSpec(name="", family="", architecture="", source="", dtype="float32", config={}, parts=parts)
    assert [part.name for part in adapted_linears(spec, "all-linear")] == ["layers.0.mlp", "head.dense"]


def test_a_target_that_no_linear_has_is_named_with_those_that_exist():
    with pytest.raises(WorkloadError, match=r"lora_targets: a model has no linear named qkv; it has: down_proj, gate_proj, k_proj, lm_head, o_proj"):
        adapter_parameters(spec_of(TINY), 4, "q_proj,qkv")


def test_part_of_a_name_is_no_target():
    with pytest.raises(WorkloadError, match="has no linear named proj"):
        adapter_parameters(spec_of(TINY), 4, "proj")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((256, 128), 17_996), ((100, 70), 4_706), ((33, 5), 1_182), ((1024, 300), 159_568)],
)
def test_four_bits_are_the_bytes_of_bitsandbytes_tensors(shape, expected):
    # bitsandbytes 0.50.2, quantize_4bit(quant_type="nf4", compress_statistics=True): the codes, their maxima, their mean and both codes;
    # for 256 x 128: 16384 + 512 + 8 + 4 + 64 + 1024
    assert quantized_bytes(one_linear(*shape), "bfloat16", 4) == expected


def test_without_double_quantization_the_maxima_are_float32():
    # the same library, compress_statistics=False: 16384 + 4 * 512 + 64
    assert quantized_bytes(one_linear(256, 128), "bfloat16", 4, double_quant=False) == 18_496


def test_double_quantization_costs_what_the_paper_says():
    # arXiv:2305.14314, section 3: 0.127 bits a parameter for the constants, beside 4 bits for the parameter
    bits = 8 * quantized_bytes(one_linear(16384, 16384), "bfloat16", 4) / 16384**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4) == pytest.approx(4.127, abs=1e-3)


def test_eight_bits_are_a_byte_a_value_and_a_float_a_row():
    assert quantized_bytes(one_linear(10, 7, bias=True), "float16", 8) == 70 + 40 + 20


def test_a_frozen_base_keeps_embeddings_norms_head_and_experts_in_its_type():
    parts = (
        Embedding(name="embed", component="embedding", num_embeddings=100, embedding_dim=64),
        Norm(name="layers.0.norm", component="norm", size=64, kind="rmsnorm"),
        Linear(name="layers.0.attn", component="attention", in_features=64, out_features=64),
        Linear(name="layers.0.gate", component="mlp", in_features=64, out_features=4),
        Linear(name="layers.0.experts.*.up", component="mlp", in_features=64, out_features=32, experts=4, experts_per_row=2),
        Linear(name="lm_head", component="head", in_features=64, out_features=100),
    )
    spec = ModelSpec(name="", family="", architecture="", source="", dtype="bfloat16", config={}, parts=parts)
    whole = 2 * (100 * 64 + 64 + 64 * 64 + 64 * 4 + 4 * 64 * 32 + 64 * 100)
    assert frozen_bytes(spec, "bfloat16", None) == whole
    assert frozen_bytes(spec, "bfloat16", 8) == whole - 2 * 64 * 64 + 64 * 64 + 4 * 64


def test_a_base_that_is_quantized_already_is_as_stored():
    part = one_linear(8, 64, weight=WeightFormat(bits=4, group_size=32))
    spec = ModelSpec(name="", family="", architecture="", source="", dtype="float16", config={}, parts=(part,))
    assert frozen_bytes(spec, "float16", None) == part.weight.stored_bytes(8, 64)


def test_adapters_of_16_bit_models_are_float32():
    assert (adapter_dtype("bfloat16"), adapter_dtype("float16"), adapter_dtype("float32")) == ("float32", "float32", "float32")
    assert adapter_dtype("float64") == "float64"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lora_rank": 0}, "lora_rank=0 is not positive"),
        ({"lora_targets": "q_proj"}, "lora_targets=q_proj has no effect without lora_rank"),
        ({"lora_rank": 8, "lora_targets": "q_proj,"}, "lora_targets='q_proj,' names no module"),
        ({"base_bits": 4}, "base_bits=4 needs lora_rank"),
        ({"base_bits": 3, "lora_rank": 8}, "base_bits=3 is not known; known: 4, 8"),
        ({"master_weights": True}, "master_weights has no effect with dtype=float32"),
        ({"master_weights": True, "dtype": "bfloat16", "lora_rank": 8}, "master_weights has no effect with lora_rank"),
        ({"cross_entropy": "liger"}, "cross_entropy='liger' is not known; known: full, chunked, fused"),
        ({"kept_by": "vllm"}, "kept_by=vllm has no effect in phase train; it has one in: decode, generate"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_one_line(options, text):
    with pytest.raises(WorkloadError, match=text):
        Workload(phase="train", optimizer="adamw", **options)


@pytest.mark.parametrize("options", [{"lora_rank": 8}, {"cross_entropy": "fused"}, {"master_weights": True, "dtype": "bfloat16"}])
def test_what_training_alone_has_is_refused_elsewhere(options):
    with pytest.raises(WorkloadError, match=rf"{next(iter(options))}=\w+ has no effect in phase prefill; it has one in: train\."):
        Workload(phase="prefill", **options)
    assert Workload(phase="train", optimizer="adamw", **options)


def test_a_base_of_other_bits_is_refused():
    with pytest.raises(WorkloadError, match="base_bits=2 is not known; known: 4, 8"):
        frozen_bytes(spec_of(TINY), "bfloat16", 2)
