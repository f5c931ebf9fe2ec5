"""A training step's time: limits that it cannot pass, what each size of a plan does to it, sums that must hold, and bad input in one line."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.cost.workload import Workload
from lighten.device.catalog import read_device, with_network
from lighten.device.device import Device, Link
from lighten.errors import DeviceError, WorkloadError
from lighten.model.families import describe
from lighten.model.spec import ModelSpec
from lighten.parallel.plan import Plan
from lighten.parallel.step_time import (
    Pieces,
    Stack,
    Traffic,
    all_to_all_seconds,
    assemble,
    group_bytes_per_s,
    layer_pieces,
    load_training_rates,
    outline,
    range_factor,
    step_time,
    training_rates_from,
)

RATES = load_training_rates()
H100, A100 = read_device("h100-sxm"), read_device("a100-sxm-80gb")
LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
MIXTURE = {
    "model_type": "mixtral", "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def spec_of(config: dict[str, Any], architecture: str = "LlamaForCausalLM") -> ModelSpec:
    return ModelSpec(
        name="a model", family=config["model_type"], architecture=architecture, source="", dtype="bfloat16", config=config,
        parts=describe(config, architecture),
    )  # fmt: skip


LLAMA, MIXTRAL = spec_of(LLAMA_2_7B), spec_of(MIXTURE, "MixtralForCausalLM")


def training(batch_size: int = 64, **more: Any) -> Workload:
    sizes = {"seq_len": 2048, "dtype": "bfloat16", "optimizer": "adamw", "attention": "flash", "master_weights": True} | more
    return Workload(phase="train", batch_size=batch_size, **sizes)


def seconds(spec: ModelSpec, workload: Workload, plan: Plan, device: Device = H100, **more: Any) -> float:
    return step_time(spec, workload, plan, device, **more).seconds


# ---- what it counts ----


def test_outline_of_llama_has_its_published_parameters_and_products():
    found = outline(LLAMA, training())
    # 6,738,415,616 parameters (huggingface meta-llama/Llama-2-7b-hf), 2 · 32000 · 4096 + 4096 of them outside the blocks
    assert found.dense_parameters + found.ends_parameters == 6_738_415_616
    assert found.ends_parameters == 2 * 32000 * 4096 + 4096
    assert (found.layers, found.hidden, found.positions, found.vocabulary) == (32, 4096, 2048, 32000)
    products = sum(p.k * p.n * p.count for p in found.blocks.products)
    assert products == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def test_tensor_parallelism_divides_the_columns_of_the_first_products_and_the_rows_of_the_last():
    # arXiv:1909.08053, section 3: queries, keys, values, gate and up by columns, out and down by rows
    sides = {(p.k, p.n): p.splits for p in outline(LLAMA, training()).blocks.products}
    assert sides[4096, 11008] == "n"
    assert sides[11008, 4096] == "k"
    square = sorted(p.splits for p in outline(LLAMA, training()).blocks.products if p.k == p.n == 4096)
    assert square == ["k", "n"]


def test_model_flops_are_six_for_each_parameter_and_token_and_the_causal_half_of_attention():
    pieces = layer_pieces(LLAMA, training(1), Plan(), H100)
    products = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
    pairs = 2048 * 2049 // 2
    assert pieces.model_flops == pytest.approx(6 * products * 2048 + 3 * 4 * 32 * 4096 * pairs, rel=1e-9)


def test_experts_that_are_not_chosen_are_not_computed():
    every = spec_of(MIXTURE | {"num_experts_per_tok": 8}, "MixtralForCausalLM")
    two, eight = (layer_pieces(spec, training(1), Plan(), H100).model_flops for spec in (MIXTRAL, every))
    more = 6 * 2048 * 8 * 3 * 1024 * 3584 * (8 - 2)
    assert eight - two == pytest.approx(more, rel=1e-9)


# ---- limits ----


@pytest.mark.parametrize("device", ["h100-sxm", "a100-sxm-80gb", "b200", "tpu-v5p", "rtx-4090", "mi300x"])
@pytest.mark.parametrize("software", ["fused", "compiled", "eager", None])
def test_no_step_is_faster_than_the_device(device, software):
    found = step_time(LLAMA, training(8), Plan(), read_device(device), stack=Stack(software=software))
    assert 0.05 < found.mfu < 0.85
    assert found.low < found.seconds < found.high
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert min(found.parts.values()) > -1e-9


def test_range_widens_with_each_thing_that_is_not_said():
    factors = [range_factor(RATES, missing) for missing in ((), ("recompute",), ("recompute", "plan"), ("recompute", "plan", "shape"))]
    assert factors == sorted(factors)
    assert len(set(factors)) == 4
    said = step_time(LLAMA, training(), Plan(dp=8), H100)
    unsaid = step_time(LLAMA, training(), Plan(dp=8), H100, unsaid=("recompute",))
    assert unsaid.seconds == said.seconds
    assert unsaid.high > said.high


def test_software_that_is_not_known_lies_between_and_widens_the_range():
    known = [seconds(LLAMA, training(8), Plan(), stack=Stack(software=name)) for name in ("fused", "compiled", "eager")]
    unknown = step_time(LLAMA, training(8), Plan(), H100, stack=Stack(software=None))
    assert min(known) < unknown.seconds < max(known)
    assert unknown.high / unknown.seconds > range_factor(RATES)


# ---- what each choice does ----


@settings(max_examples=25)
@given(dp=st.sampled_from([1, 2, 8, 64]), tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2]))
def test_more_sequences_take_longer_and_more_than_one_device_never_halves_more_than_in_half(dp, tp, pp, micro):
    plan = Plan(dp=dp, tp=tp, pp=pp, micro_batch_size=micro, shard="zero1" if dp > 1 else "none", sequence_parallel=tp > 1)
    batch = 128 * micro
    once, twice = (step_time(LLAMA, training(size), plan, H100) for size in (batch, 2 * batch))
    assert once.seconds < twice.seconds < 2 * once.seconds + 1e-9
    alone = step_time(LLAMA, training(batch), Plan(micro_batch_size=micro), H100)
    assert once.seconds * plan.devices >= 0.95 * alone.seconds


def test_full_recomputation_adds_about_one_forward_pass():
    none, full = (seconds(LLAMA, training(8, recompute=name), Plan(micro_batch_size=1)) for name in ("none", "full"))
    assert 1.2 < full / none < 1.36


def test_selective_recomputation_costs_less_than_full():
    none, some, full = (seconds(LLAMA, training(8, recompute=name), Plan()) for name in ("none", "selective", "full"))
    assert none < some < full


def test_a_pipeline_waits_for_its_first_and_last_stage():
    # arXiv:2104.04473, section 2.2.1: (p - 1) / m of the ideal time; twice the stages on a device halve it
    parts = {
        stages: step_time(
            LLAMA, training(8), Plan(pp=4, micro_batch_size=1, virtual_stages=stages, schedule="interleaved" if stages > 1 else "1f1b"), H100
        ).parts
        for stages in (1, 2)
    }
    pieces = layer_pieces(LLAMA, training(8), Plan(pp=4, micro_batch_size=1), H100)
    waits = 8 * pieces.ends_s * (1 - 1 / 4)  # the head stands on the last stage alone
    mean = 8 * pieces.layer_s + pieces.ends_s / 4
    assert parts[1]["bubble"] == pytest.approx(3 * mean + waits)
    assert parts[2]["bubble"] == pytest.approx(1.5 * mean + waits)


def test_narrow_types_are_faster_and_not_by_more_than_their_peak():
    wide = seconds(LLAMA, training(8), Plan())
    narrow = seconds(LLAMA, training(8), Plan(), stack=Stack(linear_dtype="float8"))
    assert 1.1 < wide / narrow < 2.0


def test_attention_that_keeps_its_scores_is_slower():
    assert seconds(LLAMA, training(8, attention="eager"), Plan()) > 1.1 * seconds(LLAMA, training(8), Plan())


def test_sharding_weights_costs_traffic_and_sharding_the_optimizer_saves_its_time():
    none, one, three = (step_time(LLAMA, training(64), Plan(dp=64, shard=shard), H100).parts for shard in ("none", "zero1", "zero3"))
    assert one["optimizer"] == pytest.approx(none["optimizer"] / 64)
    assert three["communication"] > one["communication"]


def test_an_update_in_the_hosts_memory_is_slower_and_its_range_wider():
    # 0.25 s for 1e9 parameters on one host (arXiv:2101.06840, table 4): 6.74e9 of 30 bytes each at 128e9 bytes a second
    here, there = (step_time(LLAMA, training(8), Plan(offload=place), H100) for place in ("none", "optimizer"))
    assert there.parts["optimizer"] == pytest.approx(6_738_415_616 * 30 / 128e9)
    assert there.parts["optimizer"] > 10 * here.parts["optimizer"]
    assert there.high / there.seconds > here.high / here.seconds
    spread = step_time(LLAMA, training(8), Plan(dp=8, shard="zero1", offload="optimizer"), H100)  # eight devices share the host and the work
    assert spread.parts["optimizer"] == pytest.approx(there.parts["optimizer"])


def test_adapters_leave_out_the_gradients_of_frozen_weights():
    whole = step_time(LLAMA, training(8), Plan(), H100)
    adapted = step_time(LLAMA, training(8, lora_rank=8, master_weights=False), Plan(), H100)
    assert 0.6 < adapted.parts["compute"] / whole.parts["compute"] < 0.75
    assert adapted.parts["optimizer"] < whole.parts["optimizer"] / 100


def test_expert_parallelism_gives_each_expert_more_rows():
    alone, spread = (layer_pieces(MIXTRAL, training(8), Plan(dp=8, ep=ep, micro_batch_size=1), H100) for ep in (1, 8))
    assert spread.compute_s < alone.compute_s
    assert spread.layer_comm_s > alone.layer_comm_s == 0
    assert spread.expert_parameters == pytest.approx(alone.expert_parameters / 8)


# ---- links ----


def test_rings_inside_a_node_use_its_link_and_between_nodes_all_ports_of_a_node():
    inside, outside = H100.links[0].bytes_per_s * RATES.link_share, H100.links[1].bytes_per_s * RATES.network_share
    assert group_bytes_per_s(H100, 8, 1, RATES) == inside
    assert group_bytes_per_s(H100, 64, 1, RATES) == min(inside, 8 * outside)
    assert group_bytes_per_s(H100, 8, 8, RATES) == outside


def test_a_row_crosses_to_another_node_once():
    # one expert of two nodes: half of the rows leave; with all 16 experts chosen each row leaves once
    outside = H100.links[1].bytes_per_s * RATES.network_share
    assert all_to_all_seconds(H100, 16, 1, 1e12, 1, RATES) == pytest.approx(0.5e12 / outside)
    assert all_to_all_seconds(H100, 16, 1, 1e12, 16, RATES) == pytest.approx(
        max(1e12 / outside, 16e12 / (H100.links[0].bytes_per_s * RATES.link_share)), rel=1e-3
    )


# ---- arithmetic ----


def test_arithmetic_takes_arrays_and_gives_what_it_gives_for_each():
    pieces = layer_pieces(LLAMA, training(64), Plan(dp=8, micro_batch_size=1), H100)
    links = Traffic(dp_bytes_per_s=2e10, expert_dp_bytes_per_s=2e10, pp_bytes_per_s=4e10, memory_bytes_per_s=2e12, collective_s=1e-5)
    sizes = {
        "pp": [1, 2, 4, 32], "dp": [8, 4, 2, 1], "ep": [1, 1, 1, 1], "gathers": [1.0, 0.0, 1.0, 0.0],
        "sums": [1.0, 1.0, 1.0, 0.0], "shards": [8, 4, 1, 1],
        "micro_batches": [8, 16, 32, 64], "virtual_stages": [1, 2, 4, 1],
    }  # fmt: skip
    together = assemble(pieces, links, RATES, **{name: np.array(values) for name, values in sizes.items()})
    for i in range(4):
        one = assemble(pieces, links, RATES, **{name: values[i] for name, values in sizes.items()})
        for part, value in one.items():
            assert np.broadcast_to(together[part], 4)[i] == pytest.approx(value, abs=1e-12), part


def test_pieces_may_be_arrays_too():
    plans = [Plan(dp=8, tp=tp, micro_batch_size=1, sequence_parallel=tp > 1) for tp in (1, 2, 4)]
    found = [layer_pieces(LLAMA, training(64), plan, H100) for plan in plans]
    stacked = Pieces(**{each.name: np.array([getattr(pieces, each.name) for pieces in found]) for each in fields(Pieces)})  # type: ignore[arg-type]
    links = Traffic(dp_bytes_per_s=2e10, expert_dp_bytes_per_s=2e10, pp_bytes_per_s=math.inf, memory_bytes_per_s=2e12, collective_s=1e-5)
    sizes: dict[str, Any] = {"pp": 1, "dp": 8, "ep": 1, "gathers": 0.0, "sums": 0.0, "shards": 1, "micro_batches": 8, "virtual_stages": 1}
    together = assemble(stacked, links, RATES, **sizes)
    for i, pieces in enumerate(found):
        assert sum(np.broadcast_to(part, 3)[i] for part in together.values()) == pytest.approx(sum(assemble(pieces, links, RATES, **sizes).values()))


# ---- bad input ----


def test_what_is_refused():
    with pytest.raises(WorkloadError, match=r"phase prefill has no training step; use phase train"):
        layer_pieces(LLAMA, Workload(phase="prefill", batch_size=1, seq_len=8), Plan(), H100)
    with pytest.raises(WorkloadError, match=r"batch_size=10 does not divide over dp=4 ranks"):
        step_time(LLAMA, training(10), Plan(dp=4), H100)
    with pytest.raises(WorkloadError, match=r"pp=64 is more than the 32 layers of a model; use at most 32"):
        step_time(LLAMA, training(64), Plan(pp=64), H100)
    with pytest.raises(WorkloadError, match=r"software='slow' is not known; known: fused, compiled, eager"):
        Stack(software="slow")  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"a100-sxm-80gb has no known rate of float8 products"):
        step_time(LLAMA, training(8), Plan(), A100, stack=Stack(linear_dtype="float8"))
    with pytest.raises(DeviceError, match=r"no training rates named 'none' are known"):
        load_training_rates("none")
    with pytest.raises(DeviceError, match=r"training rates have no speed; they have: "):
        training_rates_from({"name": "x", "compute_share": {}, "speed": 1})


def test_devices_that_nothing_joins_are_refused():
    alone = replace(A100, links=(Link(name="a bridge", bytes_per_s=1e11, devices=2),))
    with pytest.raises(DeviceError, match=r"8 of a100-sxm-80gb cannot talk to each other: a bridge joins 2"):
        step_time(LLAMA, training(64), Plan(dp=8), alone)


# ---- published steps, which the constants were fitted to: that the code still reads them as the fit did ----


@pytest.mark.parametrize(
    ("plan", "batch", "recompute", "attention", "published"),
    [
        # arXiv:2205.05198, table 5: GPT of 22 B and 175 B parameters on A100, seconds of an iteration
        (Plan(tp=8, micro_batch_size=4, sequence_parallel=True), 4, "selective", "eager", 1.10),
        (Plan(tp=8, pp=8, micro_batch_size=1, sequence_parallel=True, schedule="interleaved", virtual_stages=3), 64, "selective", "eager", 13.75),
    ],
)
def test_published_steps_of_megatron_lie_in_their_range(plan, batch, recompute, attention, published):
    layers, width, heads = (48, 6144, 64) if plan.pp == 1 else (96, 12288, 96)
    config = {
        "model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": 51200, "n_positions": 2048, "n_inner": 4 * width,
    }  # fmt: skip
    found = step_time(
        spec_of(config, "GPT2LMHeadModel"), training(batch, dtype="float16", recompute=recompute, attention=attention), plan, A100
    )  # fmt: skip
    assert found.low < published < found.high


# ---- published rows as the tool's own types (benchmarks/published_rows.py) ----

ROW = {
    "id": "1", "model": "a name that says nothing", "hardware": "H100-SXM-80GB", "n_gpus": "8", "layers": "32", "hidden": "4096", "heads": "32",
    "kv_heads": "32", "head_dim": "128", "ffn": "11008", "vocab": "32000", "params_total": "6738415616", "seq_len": "2048", "precision": "bf16",
    "micro_batch": "1", "global_batch_seqs": "64", "framework": "FSDP", "act_ckpt": "full", "zero_stage": "3", "dp": "8", "tp": "1", "pp": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    return importlib.import_module("published_rows")


@pytest.mark.parametrize(
    ("sizes", "family", "parameters"),
    [
        ({}, "llama", 6_738_415_616),  # huggingface meta-llama/Llama-2-7b-hf
        # huggingface EleutherAI/pythia-6.9b: no gate, head and embedding apart
        ({"ffn": "16384", "vocab": "50432", "params_total": "6857302016"}, "gpt_neox", 6_857_302_016),
        # arXiv:2401.04088, mistralai/Mixtral-8x7B-v0.1
        (
            {
                "kv_heads": "8",
                "ffn": "14336",
                "n_experts": "8",
                "top_k": "2",
                "moe_ffn": "14336",
                "params_total": "46702792704",
                "params_active": "12879925248",
            },
            "mixtral",
            46_702_792_704,
        ),
    ],
)
def test_a_shape_without_a_known_name_finds_its_architecture_by_its_parameters(rows, sizes, family, parameters):
    spec, unsaid = rows.spec_of_row(ROW | sizes)
    assert (spec.family, spec.total_parameters, unsaid) == (family, parameters, ())


def test_a_size_without_a_shape_gives_a_typical_model_and_says_so(rows):
    spec, unsaid = rows.spec_of_row({"id": "1", "model": "Nobody-34B", "hardware": "x"})
    assert unsaid == ("shape",)
    assert spec.total_parameters == pytest.approx(34e9, rel=0.05)
    mixture, _ = rows.spec_of_row({"id": "1", "model": "Nobody-100B-A10B", "hardware": "x"})
    assert mixture.total_parameters == pytest.approx(100e9, rel=0.1)
    assert mixture.active_parameters == pytest.approx(10e9, rel=0.3)
    with pytest.raises(rows.NotGradable, match="the row gives neither the model's shape nor its number of parameters"):
        rows.spec_of_row({"id": "1", "model": "Nobody", "hardware": "x"})


def test_what_a_row_leaves_out_is_named(rows):
    assert rows.training_case(ROW).unsaid == ()
    bare = rows.training_case(
        {name: ROW[name] for name in ("id", "model", "hardware", "n_gpus", "params_total", "layers", "hidden", "heads", "ffn", "vocab")}
    )
    assert {"plan", "batch", "recompute", "length", "software", "precision"} <= set(bare.unsaid)


def test_numbers_are_read_strictly(rows):
    with pytest.raises(rows.NotGradable, match="seq_len 'long' is not a number"):
        rows.training_case(ROW | {"seq_len": "long"})
    with pytest.raises(rows.NotGradable, match=r"micro_batch '1\.5' is not a whole positive number"):
        rows.training_case(ROW | {"micro_batch": "1.5"})
    with pytest.raises(rows.NotGradable, match="precision 'ternary' is not known"):
        rows.training_case(ROW | {"precision": "ternary"})


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("1600Gbps RoCE/node", 200e9), ("NVLink/NVSwitch; 8x HDR IB", 200e9), ("NVLink; RoCE 400Gb/s per GPU", 400e9), ("4x200Gbps RDMA/node", 100e9),
        ("NVLink; 4x Omni-Path/node (JZ)", 50e9), ("NVLink", None), ("", None),
    ],
)  # fmt: skip
def test_a_network_in_words_is_bits_per_second_of_a_device(rows, text, bits):
    assert rows.network_bits_per_s(text) == bits


def test_a_step_is_read_from_the_best_figure_that_a_row_has(rows):
    case = rows.training_case(ROW)
    tokens = 64 * 2048
    assert rows.step_seconds(ROW | {"step_time_s": "3.5", "tokens_per_s": "1"}, case) == (3.5, ())
    assert rows.step_seconds(ROW | {"tokens_per_s": "32768"}, case) == (tokens / 32768, ())
    assert rows.step_seconds(ROW | {"samples_per_s": "16"}, case) == (4.0, ())
    # by the row's own FLOPs of a token, and with recomputing counted in
    counted = ROW | {"tflops_per_gpu": "200", "flops_per_token_implied_g": "45", "tflops_kind": "model"}
    assert rows.step_seconds(counted, case)[0] == pytest.approx(tokens * 45e9 / (8 * 200e12))
    assert rows.step_seconds(counted | {"tflops_kind": "hardware"}, case)[0] == pytest.approx(4 / 3 * tokens * 45e9 / (8 * 200e12))
    with pytest.raises(rows.NotGradable, match="the row gives no time"):
        rows.step_seconds(ROW, case)
    with pytest.raises(rows.NotGradable, match="a step's tokens are not known: its sequences' lengths are not given, or vary"):
        rows.step_seconds(ROW | {"step_time_s": "3.5", "note": "seq = longest sample (varies)"}, case)


def test_attention_is_counted_as_the_row_says(rows):
    case = rows.training_case(ROW)
    products = 6 * (32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096)
    full = 12 * 32 * 4096 * 2048
    for convention, attention in (("none", 0), ("full", full), ("causal_half", full * 2049 / 4096)):
        found, unsaid = rows.flops_per_token(ROW | {"attn_flops_convention_inferred": convention}, case)
        assert found == pytest.approx(products + attention)
        assert unsaid == ()
    assert rows.flops_per_token(ROW, rows.training_case(ROW | {"seq_len": "65536"}))[1] == ("flops",)


def test_gradients_are_sent_with_each_micro_batch_where_no_rank_holds_all_of_them():
    """ZeRO-1 sums them once a step, ZeRO-2 after each of the micro-batches; on a slow network that is what a step takes."""
    workload = Workload(phase="train", batch_size=64, seq_len=128, dtype="bfloat16", optimizer="adamw")
    slow = with_network(read_device("h100-sxm"), "1Gb/s")
    plans = {shard: Plan(dp=16, shard=shard, micro_batch_size=1) for shard in ("zero1", "zero2")}
    seconds = {shard: step_time(LLAMA, workload, plan, slow).parts["communication"] for shard, plan in plans.items()}
    assert seconds["zero2"] > 2 * seconds["zero1"]  # a gather and 4 sums instead of a gather and a sum


def test_wider_values_are_more_traffic():
    slow = with_network(read_device("h100-sxm"), "1Gb/s")
    narrow, wide = (
        step_time(LLAMA, Workload(phase="train", batch_size=16, seq_len=128, dtype=dtype, optimizer="adamw"), Plan(dp=16), slow).parts[
            "communication"
        ]
        for dtype in ("bfloat16", "float32")
    )
    assert wide == pytest.approx(2 * narrow, rel=0.1)
