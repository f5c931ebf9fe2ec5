"""Inference over published devices: sums of passes, how a model is shared out, batching in flight, ranges, what is refused, published speeds."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.cost.operators import Forward, forward_operators
from lighten.cost.workload import Workload
from lighten.device.catalog import read_device, with_devices_per_node
from lighten.device.device import Device, Link
from lighten.errors import DeviceError, WorkloadError
from lighten.model.read import config_spec
from lighten.model.spec import Linear, ModelSpec, WeightFormat
from lighten.parallel.device_pass import Collective, check_split, device_pass, exchange_terms, expected_experts, folded
from lighten.parallel.serving import (
    STACKS,
    Deployment,
    decode_work,
    flight_work,
    inference_time,
    largest_concurrency,
    limits_on,
    loaded,
    memory_needed,
    prefill_work,
    serve,
    static_work,
    types_of,
)

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
"""Source: the published config.json of Llama 3.1 8B."""
LLAMA_2_7B = LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}
MIXTRAL: dict[str, Any] = LLAMA_8B | {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 512, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "kv_lora_rank": 512, "q_lora_rank": None, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
BERT: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip


def spec_of(config: dict[str, Any], dtype: str = "bfloat16") -> ModelSpec:
    return loaded(config_spec(config, name=str(config["model_type"]), source="test"), dtype)


def deployment(spec: ModelSpec, *, stack: str = "engine", dtype: str = "bfloat16", tp: int = 1, pp: int = 1) -> Deployment:
    return Deployment(types=types_of(spec, dtype), stack=STACKS[stack], tp=tp, pp=pp)


H100 = read_device("h100-sxm")
SPEC = spec_of(LLAMA_8B)


def workload(phase: str = "generate", **more: Any) -> Workload:
    sizes = {"batch_size": 1, "seq_len": 512, "new_tokens": 128 if phase in ("decode", "generate") else 0, "dtype": "bfloat16"}
    return Workload(phase=phase, **(sizes | more))  # type: ignore[arg-type]


# ---- passes ----


@pytest.mark.parametrize("config", [LLAMA_8B, MIXTRAL, DEEPSEEK, BERT])
def test_folding_keeps_every_operator(config: dict[str, Any]) -> None:
    spec = config_spec(config, name="x", source="test")
    once = folded(spec)
    assert sum(once.times) == len(spec.parts)
    forward = Forward(batch_size=2, query_len=16, key_len=16)
    whole = sum(op.flops for op in forward_operators(spec, forward, "bfloat16"))
    assert whole == sum(times * op.flops for op, times in zip(forward_operators(once.spec, forward, "bfloat16"), once.times, strict=True))


def test_one_device_computes_what_the_model_does() -> None:
    forward = Forward(batch_size=2, query_len=64, key_len=64)
    work = device_pass(SPEC, forward, dtype="bfloat16")
    assert sum(count * op.matmul_flops for op, count in work.ops) == sum(op.matmul_flops for op in forward_operators(SPEC, forward, "bfloat16"))
    assert work.collectives == ()


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_tensor_parallel_devices_share_the_products(tp: int) -> None:
    forward = Forward(batch_size=2, query_len=64, key_len=64)
    whole, part = (device_pass(SPEC, forward, dtype="bfloat16", tp=size) for size in (1, tp))
    flops = [sum(count * op.matmul_flops for op, count in work.ops) for work in (whole, part)]
    weights = [sum(count * op.weight_bytes for op, count in work.ops if op.kind == "linear") for work in (whole, part)]
    assert flops[1] == pytest.approx(flops[0] / tp, rel=1e-3)
    assert weights[1] == pytest.approx(weights[0] / tp, rel=1e-3)
    # two all-reduces a layer of the hidden states. Source: Megatron-LM (arXiv:1909.08053), section 3
    assert part.collectives == (Collective(kind="reduce", size_bytes=2 * 64 * 4096 * 2, count=64),)


def test_key_heads_are_copied_where_there_are_fewer_than_devices() -> None:
    forward = Forward(batch_size=1, query_len=1, key_len=8192)

    def cache(tp: int) -> float:
        return sum(count * op.activation_bytes for op, count in device_pass(SPEC, forward, dtype="bfloat16", tp=tp).ops if op.kind == "attention")

    assert cache(8) == pytest.approx(cache(1) / 8, rel=0.01)
    assert cache(32) == pytest.approx(cache(8), rel=0.01)


def test_experts_of_a_batch_are_those_that_it_is_expected_to_touch() -> None:
    spec = spec_of(MIXTRAL)

    def read(batch: int) -> float:
        ops = device_pass(spec, Forward(batch_size=batch, query_len=1, key_len=128), dtype="bfloat16").ops
        return sum(count * op.weight_bytes for op, count in ops if op.kind == "linear")

    experts = [part for part in spec.parts if isinstance(part, Linear) and part.experts > 1]
    one = sum(part.weight.stored_bytes(part.out_features, part.in_features) for part in experts)
    assert read(4) - read(1) == pytest.approx((expected_experts(8, 2, 4) - 2) * one, rel=1e-3)
    assert read(4096) - read(1) == pytest.approx(6 * one, rel=1e-3)


@given(experts=st.integers(2, 256), chosen=st.integers(1, 8), tokens=st.integers(1, 4096))
def test_expected_experts_are_at_least_those_of_one_token_and_at_most_all(experts: int, chosen: int, tokens: int) -> None:
    chosen = min(chosen, experts)
    found = expected_experts(experts, chosen, tokens)
    assert chosen - 1e-9 <= found <= min(experts, chosen * tokens) + 1e-9


def test_a_step_reads_the_latent_and_not_what_it_expands_to() -> None:
    spec = spec_of(DEEPSEEK)
    forward = Forward(batch_size=1, query_len=1, key_len=4096)
    engine = device_pass(spec, forward, dtype="bfloat16")
    kept = sum(count * op.activation_bytes for op, count in engine.ops if op.kind == "attention")
    # Source: DeepSeek-V2 (arXiv:2405.04434), table 1: a latent of 512 and a rotary key of 64 values for each token and layer
    assert kept == pytest.approx(4 * 4096 * 576 * 2, rel=0.05)
    naive = sum(op.matmul_flops for op in forward_operators(spec, forward, "bfloat16"))
    assert sum(count * op.matmul_flops for op, count in engine.ops) < naive / 10


def test_a_narrow_cache_is_read_in_half_the_bytes() -> None:
    forward = Forward(batch_size=1, query_len=1, key_len=65536)
    wide, narrow = (
        sum(c * op.activation_bytes for op, c in device_pass(SPEC, forward, dtype="bfloat16", kv_dtype=kv).ops if op.kind == "attention")
        for kv in (None, "float8_e4m3fn")
    )
    assert narrow == pytest.approx(wide / 2, rel=0.01)


# ---- exchanges ----

NODE = dataclasses.replace(
    H100, links=(Link(name="NVLink4", bytes_per_s=450e9, devices=8), Link(name="InfiniBand", bytes_per_s=50e9)), memory_bytes=80 * 2**30
)


def test_an_all_reduce_moves_what_a_ring_does() -> None:
    terms = exchange_terms(Collective(kind="reduce", size_bytes=1e9, count=1), 8, NODE)
    assert terms["near_wire"] == pytest.approx(2 * 7 / 8 * 1e9 / 450e9)
    assert terms["far_wire"] == 0


def test_between_nodes_each_device_exchanges_its_share() -> None:
    terms = exchange_terms(Collective(kind="reduce", size_bytes=1e9, count=1), 16, NODE)
    assert terms["far_wire"] == pytest.approx(2 * 1 / 2 * (1e9 / 8) / 50e9)
    assert exchange_terms(Collective(kind="reduce", size_bytes=1e9, count=1), 1, NODE) == dict.fromkeys(terms, 0.0)


# ---- works ----


def test_a_prompt_in_chunks_is_the_same_work_as_whole() -> None:
    whole = prefill_work(SPEC, 1, 4096, deployment(SPEC))
    chunked = prefill_work(SPEC, 1, 4096, deployment(SPEC, stack="ggml"))
    flops = [sum(n * c * op.causal_flops for n, each in work.passes for op, c in each.ops) for work in (whole, chunked)]
    assert flops[1] == pytest.approx(flops[0], rel=0.01)
    assert whole.tokens == chunked.tokens == 4096


def test_a_static_batch_is_its_prompts_and_its_steps() -> None:
    one = deployment(SPEC)
    static = static_work(SPEC, 4, 512, 128, one)
    assert static.tokens == 4 * 128
    assert static.passes == prefill_work(SPEC, 4, 512, one).passes + decode_work(SPEC, 4, 512, 127, one).passes


def test_in_flight_each_step_carries_the_prompts_that_enter() -> None:
    work = flight_work(SPEC, 100, 1000, 100, deployment(SPEC))
    step = sum(count * op.matmul_flops for op, count in work.passes[0][1].ops if op.kind == "linear")
    per_token = sum(
        op.matmul_flops for op in forward_operators(SPEC, Forward(batch_size=1, query_len=1, key_len=1), "bfloat16") if op.kind == "linear"
    )
    assert step == pytest.approx(per_token * (100 + 1000), rel=0.15)  # logits of the last position of a prompt alone
    assert work.tokens == 100


# ---- answers ----


@pytest.mark.parametrize("phase", ["prefill", "decode", "generate"])
def test_seconds_lie_in_their_range_and_sum_up(phase: str) -> None:
    found = inference_time(SPEC, workload(phase), H100)
    assert found.low < found.seconds < found.high
    assert sum(found.by_bound.values()) == pytest.approx(found.seconds)
    assert found.bound_by == ("compute" if phase == "prefill" else "memory")
    assert json.loads(json.dumps(found.as_json()))["phase"] == phase


def test_generation_is_prefill_and_the_steps_after_it() -> None:
    found = inference_time(SPEC, workload(new_tokens=100), H100)
    assert found.prefill_s is not None
    assert found.step_s is not None
    assert found.seconds == pytest.approx(found.prefill_s + 99 * found.step_s)


def test_an_encoder_is_timed_on_a_device_that_was_never_probed() -> None:
    spec = config_spec(BERT, name="bert", source="test")
    found = inference_time(spec, Workload(phase="encode", batch_size=8, seq_len=128, dtype="float16"), H100)
    assert found.step_s is None
    assert found.tokens_per_second == pytest.approx(8 * 128 / found.seconds)


def test_narrow_weights_are_computed_in_their_type_and_said_so() -> None:
    spec = SPEC.with_parts(lambda part: dataclasses.replace(part, weight=WeightFormat(dtype="float8_e4m3fn")) if isinstance(part, Linear) else part)
    assert types_of(spec, "bfloat16").products == "float8_e4m3fn"
    narrow, wide = (inference_time(one, workload("prefill", seq_len=8192), H100) for one in (spec, SPEC))
    assert narrow.seconds < wide.seconds
    assert any("float8_e4m3fn" in said for said in narrow.assumptions)


@settings(max_examples=15)
@given(batch=st.integers(1, 64), length=st.integers(16, 4096), more=st.integers(1, 64))
def test_more_sequences_take_longer_and_give_no_less(batch: int, length: int, more: int) -> None:
    one, other = (inference_time(SPEC, workload("decode", batch_size=size, seq_len=length, new_tokens=16), H100) for size in (batch, batch + more))
    assert other.seconds >= one.seconds
    assert other.tokens_per_second >= one.tokens_per_second * 0.999


def test_more_devices_are_faster_by_less_than_their_number() -> None:
    one, eight = (inference_time(SPEC, workload("prefill", seq_len=8192), NODE, tp=tp).seconds for tp in (1, 8))
    assert one / 8 < eight < one


# ---- a server ----


def test_a_server_holds_what_fits() -> None:
    found = serve(SPEC, H100, input_len=1000, output_len=1000)
    assert H100.memory_bytes is not None
    assert found.concurrency == found.largest_concurrency
    assert found.output_tokens_per_s == pytest.approx(found.concurrency / found.tpot_s)
    assert found.total_tokens_per_s == pytest.approx(2 * found.output_tokens_per_s)
    # a token of Llama 3.1 8B is 2 · 32 layers · 8 heads · 128 values of 2 bytes
    assert found.cache_bytes_per_sequence == pytest.approx(2000 * 131072, rel=0.01)
    held = found.largest_concurrency * found.cache_bytes_per_sequence
    assert 0.9 * 0.9 * (H100.memory_bytes - found.weight_bytes) < held <= 0.9 * (H100.memory_bytes - found.weight_bytes)
    document = json.loads(json.dumps(found.as_json()))
    assert document["output_tokens_per_s_low"] < found.output_tokens_per_s < document["output_tokens_per_s_high"]


def test_fewer_requests_wait_less_and_give_less() -> None:
    few, many = (serve(SPEC, H100, input_len=512, output_len=512, concurrency=size) for size in (4, 64))
    assert few.tpot_s < many.tpot_s
    assert few.ttft_s < many.ttft_s
    assert few.output_tokens_per_s < many.output_tokens_per_s


def test_one_request_more_does_not_fit() -> None:
    spec, one = spec_of(LLAMA_2_7B), deployment(spec_of(LLAMA_2_7B))
    small = dataclasses.replace(H100, memory_bytes=24 * 2**30)
    most = largest_concurrency(spec, small, 4096, one)
    each = memory_needed(spec, 3, 4096, one) - memory_needed(spec, 2, 4096, one)
    free = small.memory_bytes - memory_needed(spec, 2, 4096, one) + 2 * each
    assert most * each <= 0.9 * free < (most + 2) * each


def test_latent_caches_have_no_heads_to_share_out() -> None:
    spec = spec_of(DEEPSEEK)
    one, four = (memory_needed(spec, 513, 4096, deployment(spec, tp=tp)) - memory_needed(spec, 1, 4096, deployment(spec, tp=tp)) for tp in (1, 4))
    assert four == pytest.approx(one, rel=0.02)


# ---- speeds that others measured; the constants were fitted to rows like these, so the range has to hold them ----


@pytest.mark.parametrize(
    ("device", "config", "weight", "stack", "phase", "measured"),
    [
        # Source: llama.cpp discussion 4167, the table of Apple chips: LLaMA 7B, tg128 and pp512
        ("m2-ultra-76", LLAMA_2_7B, WeightFormat(dtype="float16"), "ggml", "decode", 41.02),
        ("m2-ultra-76", LLAMA_2_7B, WeightFormat(ggml_type="Q4_0"), "ggml", "decode", 94.27),
        ("m2-ultra-76", LLAMA_2_7B, WeightFormat(dtype="float16"), "ggml", "prefill", 1401.85),
        ("m1-max-32", LLAMA_2_7B, WeightFormat(ggml_type="Q8_0"), "ggml", "decode", 40.20),
        # Source: XiongjieDai/GPU-Benchmarks-on-LLM-Inference, README of May 2024: Llama 3 8B, tg 512
        ("rtx-4090", LLAMA_8B, WeightFormat(dtype="float16"), "ggml", "decode", 54.84),
    ],
)
def test_the_range_holds_published_speeds(device: str, config: dict[str, Any], weight: WeightFormat, stack: str, phase: str, measured: float) -> None:
    spec = spec_of(config, "float16").with_parts(lambda part: dataclasses.replace(part, weight=weight) if isinstance(part, Linear) else part)
    asked = workload(phase, dtype="float16", seq_len=512 if phase == "prefill" else 1, new_tokens=0 if phase == "prefill" else 128)
    found = inference_time(spec, asked, read_device(device), stack=stack)
    assert asked.tokens / found.high < measured < asked.tokens / found.low


# ---- what is refused ----


@pytest.mark.parametrize(("tp", "pp", "message"), [
    (3, 1, r"^tp=3 does not divide the 32 attention heads of llama; use one of 1, 2, 4, 8, 16, 32\.$"),
    (1, 33, r"^pp=33: llama has 32 layers; use no more stages than layers\.$"),
    (0, 1, r"^tp=0, pp=1: both have to be positive\.$"),
])  # fmt: skip
def test_plans_that_do_not_fit_the_model(tp: int, pp: int, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        check_split(SPEC, tp=tp, pp=pp)
    with pytest.raises(WorkloadError, match=message):
        inference_time(SPEC, workload(), H100, tp=tp, pp=pp)


def test_training_is_no_inference() -> None:
    with pytest.raises(WorkloadError, match=r"^phase train is no inference; ask for its step time instead\.$"):
        inference_time(SPEC, Workload(phase="train", optimizer="adamw", seq_len=16, dtype="bfloat16"), H100)


def test_software_that_is_not_known() -> None:
    with pytest.raises(DeviceError, match=r"^no kind of inference software is called 'cobol'; known: engine, ggml, local, eager\.$"):
        inference_time(SPEC, workload(), H100, stack="cobol")


def test_a_device_without_the_type() -> None:
    with pytest.raises(DeviceError, match=r"has no known rate of bfloat16 products; its known types: "):
        inference_time(SPEC, workload(), read_device("m1-max-32"))


def test_a_device_without_links_serves_alone() -> None:
    lonely = Device(name="lonely", full_name="", vendor="", kind="gpu", peak_flops_per_s={"bfloat16": 1e14}, bandwidth_bytes_per_s=1e12)
    with pytest.raises(DeviceError, match=r"^2 of lonely cannot talk to each other: no link of it is known\.$"):
        inference_time(SPEC, workload(), lonely, tp=2)
    with pytest.raises(
        DeviceError, match=r"^lonely: its memory is not known, so how many requests fit is not either; describe it in a device file\.$"
    ):
        serve(SPEC, lonely, input_len=8, output_len=8)


@pytest.mark.parametrize(("asked", "message"), [
    ({"input_len": 0, "output_len": 8}, r"^input_len=0, output_len=8, concurrency=None: all have to be positive\.$"),
    ({"input_len": 8, "output_len": 8, "concurrency": 10**6}, r"^concurrency=1000000: no more than \d+ requests of 16 tokens fit on 1 h100-sxm\.$"),
])  # fmt: skip
def test_loads_that_cannot_be(asked: dict[str, int], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        serve(SPEC, H100, **asked)  # type: ignore[arg-type]


def test_a_server_that_does_not_fit_one_request() -> None:
    with pytest.raises(
        DeviceError, match=r"^llama with one request of 16 tokens needs 16\.\d GB on each of 1 rtx-3060, .*use more devices, fewer bits"
    ):
        serve(SPEC, read_device("rtx-3060"), input_len=8, output_len=8)


def test_an_encoder_serves_no_requests() -> None:
    with pytest.raises(WorkloadError, match=r"^bert is no decoder; a server of requests needs one that generates\. Use phase encode"):
        serve(config_spec(BERT, name="bert", source="test"), H100, input_len=8, output_len=8, dtype="float16")


def test_codes_are_multiplied_as_integers_where_the_software_and_the_device_do_that() -> None:
    spec = SPEC.with_parts(lambda part: dataclasses.replace(part, weight=WeightFormat(ggml_type="Q4_0")) if isinstance(part, Linear) else part)
    wide, narrow = limits_on(read_device("rtx-4090"), deployment(spec, stack="ggml", dtype="float16"))
    assert narrow.type_class == "bit8"
    assert wide.product_flops_per_s == read_device("rtx-4090").peak("float16_acc16")
    assert {one.type_class for one in limits_on(read_device("m2-ultra-76"), deployment(spec, stack="ggml", dtype="float16"))} == {"bit16"}


def test_no_range_reaches_below_what_the_data_sheet_allows():
    """The weights of a large model pass through memory once a step; the low end of the range is no faster than that."""
    for name in ("h100-sxm", "rtx-4090", "l4", "m2-ultra-76"):
        device = read_device(name)
        found = inference_time(SPEC, Workload(phase="decode", seq_len=128, new_tokens=1, dtype="float16"), device)
        weights = sum(part.parameters for part in SPEC.parts if isinstance(part, Linear)) * 2
        assert weights / device.bandwidth() <= found.low <= found.seconds <= found.high


def test_devices_alone_in_their_nodes_are_far_from_each_other():
    decode = Workload(phase="decode", seq_len=128, new_tokens=1, dtype="bfloat16")
    near, far = (inference_time(SPEC, decode, with_devices_per_node(read_device("h100-sxm"), count), tp=8).seconds for count in (8, 1))
    assert far > 1.5 * near
