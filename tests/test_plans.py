"""Plans: what a rank holds, sends and keeps in memory, held to torch's own distributed code under a fake process group (plan_runs.py)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

import pytest
from family_truth import spec_of as spec_from_config
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_models import MEMORY_MODELS, memory_config
from plan_runs import run_plan, run_stage
from transformers import PretrainedConfig

import lighten.parallel.replay
from lighten.cost.operators import forward_operators
from lighten.cost.passes import training_forward
from lighten.cost.tuning import memory_of
from lighten.cost.workload import Workload
from lighten.device.device import Device, Link
from lighten.errors import WorkloadError
from lighten.model.families import has_formula
from lighten.model.spec import ModelSpec, Norm
from lighten.parallel.communication import Collective, collectives, seconds, wire_bytes
from lighten.parallel.memory import rank_memory
from lighten.parallel.pipeline import bubble_fraction, in_flight
from lighten.parallel.plan import Plan
from lighten.parallel.rank import place, rank_operators, rank_spec, stage_blocks

WITHIN = 0.03
TRAIN = Workload(phase="train", batch_size=8, seq_len=64, optimizer="adamw")
LONG = replace(TRAIN, seq_len=256)
BF16 = replace(LONG, dtype="bfloat16", master_weights=True)


def model(name: str, **changes: Any) -> tuple[PretrainedConfig, ModelSpec]:
    config = memory_config(name, **({"width": 256, "layers": 3} | changes))
    return config, spec_from_config(config, config.architectures[0])


def sent(spec: ModelSpec, workload: Workload, plan: Plan, stage: int = 0) -> Counter[tuple[str, int, int]]:
    found: Counter[tuple[str, int, int]] = Counter()
    for each in collectives(spec, workload, plan, stage):
        found[each.kind, each.bytes, each.size] += each.count
    return found


# ---- truth ----


@pytest.mark.parametrize(
    ("name", "workload"),
    [
        ("llama", LONG), ("llama", BF16), ("qwen3", replace(LONG, recompute="full")), ("gpt2", TRAIN), ("bert", LONG),
        ("opt", replace(TRAIN, batch_size=12)), ("mixtral", replace(LONG, dtype="bfloat16")),
    ],
)  # fmt: skip
def test_fsdp2_keeps_the_bytes_and_sends_the_collectives_predicted(name: str, workload: Workload) -> None:
    config, spec = model(name, vocab_size=1000)
    plan = Plan(dp=4, shard="zero3")
    live = run_plan(config, workload, plan)
    assert rank_memory(spec, workload, plan).peak == pytest.approx(live.peak, rel=WITHIN)
    assert sent(spec, workload, plan) == live.sent


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", Plan(tp=2)), ("llama", Plan(tp=2, sequence_parallel=True)), ("qwen3", Plan(tp=4, sequence_parallel=False)), ("opt", Plan(tp=2)),
        ("bert", Plan(tp=2)), ("llama", Plan(tp=2, micro_batch_size=2)), ("qwen2", Plan(dp=2, tp=2, shard="zero3", sequence_parallel=True)),
        ("llama", Plan(dp=2, tp=2, shard="zero3", sequence_parallel=True, micro_batch_size=2)), ("bert", Plan(dp=2, tp=2, shard="zero3")),
        ("opt", Plan(dp=2, tp=2, shard="zero3")),
    ],
)  # fmt: skip
def test_tensor_parallelism_keeps_the_bytes_and_sends_the_collectives_predicted(name: str, plan: Plan) -> None:
    config, spec = model(name, vocab_size=1000, **({"width": 512, "intermediate_size": 1024} if plan.tp == 4 else {}))
    workload = replace(TRAIN, seq_len=128)
    live = run_plan(config, workload, plan)
    assert rank_memory(spec, workload, plan).peak == pytest.approx(live.peak, rel=WITHIN)
    assert sent(spec, workload, plan) == live.sent


@pytest.mark.parametrize(
    ("name", "schedule"), [("llama", "1f1b"), ("qwen3", "1f1b"), ("gpt2", "1f1b"), ("bert", "1f1b"), ("llama", "gpipe"), ("llama", "interleaved")]
)
def test_pipeline_stages_keep_the_bytes_and_send_the_tensors_predicted(name: str, schedule: Any) -> None:
    config, spec = model(name, layers=4, vocab_size=1000, tie_word_embeddings=False)
    plan = Plan(pp=2, micro_batch_size=2, schedule=schedule, virtual_stages=2 if schedule == "interleaved" else 1)
    for stage in range(2):
        live = run_stage(config, TRAIN, plan, stage)
        assert rank_memory(spec, TRAIN, plan, stage, received="all").peak == pytest.approx(live.peak, rel=WITHIN), stage
        assert sent(spec, TRAIN, plan, stage) == live.sent


# ---- what is conserved ----


def specs() -> list[ModelSpec]:
    found = []
    for name in MEMORY_MODELS:
        config = memory_config(name, width=256, layers=4)
        if has_formula(config.to_dict(), config.architectures[0]):
            found.append(spec_from_config(config, config.architectures[0]))
    return found


SPECS = specs()
SPLIT = [spec for spec in SPECS if spec.family != "mamba"]


@pytest.mark.parametrize("spec", SPLIT, ids=lambda spec: spec.family)
def test_tensor_parallel_ranks_together_hold_each_split_parameter_once(spec: ModelSpec) -> None:
    """Whole parts are held by each rank; the one key/value head of Gemma by all ranks that read it."""
    held = rank_spec(spec, Plan(tp=2))
    for each, mine in zip(place(spec), held.parts, strict=True):
        whole, share = each.part, mine
        if each.role == "whole":
            assert share == whole
            continue
        for name, shape in whole.tensors().items():
            elements, part = prod(shape), prod(share.tensors()[name])
            single = each.attention is not None and each.attention.num_key_value_heads == 1
            shared = len(shape) == 1 and (each.role == "row" or isinstance(whole, Norm))  # a bias behind a sum, a norm of each head
            assert part * 2 == elements or single or shared, name


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.is_encoder_decoder and spec.family != "clip"], ids=lambda spec: spec.family)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_stages_together_hold_the_model_and_a_tied_table_twice(spec: ModelSpec, pp: int) -> None:
    held = sum(rank_spec(spec, Plan(pp=pp), stage).total_parameters for stage in range(pp))
    tied = [part for part in spec.parts if getattr(part, "tied_to", None) and part.component == "head"]
    assert held == spec.total_parameters + sum(part.in_features * part.out_features for part in tied)  # type: ignore[attr-defined]


@given(
    spec=st.sampled_from([spec for spec in SPECS if spec.family in ("llama", "qwen2", "gpt2", "bert", "opt", "mixtral")]),
    tp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2, 4]), cp=st.sampled_from([1, 2]), sequence=st.booleans(),
)  # fmt: skip
@settings(max_examples=30)
def test_ranks_together_compute_the_flops_of_the_model(spec: ModelSpec, tp: int, pp: int, cp: int, sequence: bool) -> None:
    """All of them, where what every tensor-parallel rank computes again (a router, BERT's head without sequence parallelism) counts once."""
    plan = Plan(dp=2, tp=tp, pp=pp, cp=cp, micro_batch_size=1, sequence_parallel=sequence and tp > 1)
    workload = replace(TRAIN, batch_size=4)
    whole = sum(op.causal_flops for op in forward_operators(spec, training_forward(spec, workload), "float32"))
    ranks = 0
    for stage in range(pp):
        ops = rank_operators(spec, workload, plan, stage)
        ranks += sum(op.causal_flops for op in ops) * tp * cp * plan.dp * plan.micro_batches(4)
    again = [each.part for each in place(spec) if each.role == "whole" and (each.seen or not plan.sequence_parallel)]
    repeated = sum(
        op.causal_flops for op in forward_operators(replace(spec, parts=tuple(again)), training_forward(spec, workload), "float32")
    )  # fmt: skip
    assert ranks == whole + (tp - 1) * repeated


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)
def test_a_plan_of_one_device_is_the_memory_of_the_model(spec: ModelSpec) -> None:
    workload = replace(TRAIN, seq_len=spec.fixed_len or 64)
    assert rank_memory(spec, workload, Plan()) == memory_of(spec, workload)


@given(
    name=st.sampled_from(["llama", "gpt2", "bert", "mixtral", "gemma2"]), layers=st.integers(6, 12), tp=st.sampled_from([1, 2]),
    dp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2]), shard=st.sampled_from(["none", "zero1", "zero2", "zero3"]),
    recompute=st.sampled_from(["none", "full", "selective"]), micro=st.sampled_from([None, 1, 2]), attention=st.sampled_from(["eager", "sdpa"]),
)  # fmt: skip
@settings(max_examples=25)
def test_the_replay_of_a_few_blocks_gives_that_of_all(name: str, layers: int, **options: Any) -> None:
    _, spec = model(name, layers=layers)
    plan = Plan(tp=options["tp"], dp=options["dp"], pp=options["pp"], shard=options["shard"], micro_batch_size=options["micro"])
    workload = replace(TRAIN, recompute=options["recompute"], attention=options["attention"])
    quick = rank_memory(spec, workload, plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lighten.parallel.replay, "SHORT", layers)
        assert rank_memory(spec, workload, plan) == quick


def test_sharing_out_takes_what_the_zero_paper_says() -> None:
    """Rajbhandari et al. 2019 (arXiv:1910.02054), section 5 and figure 1: of 2 + 2 + 12 bytes a parameter, ZeRO-1 keeps 2 + 2 + 12/N."""
    _, spec = model("llama")
    workload = replace(TRAIN, batch_size=8, dtype="bfloat16", master_weights=True)
    values = spec.total_parameters
    shared = rank_memory(spec, workload, Plan(dp=4, shard="zero1"))
    assert shared.weights == 2 * values
    assert shared.optimizer == pytest.approx(12 * values / 4, rel=0.01)
    everything = rank_memory(spec, workload, Plan(dp=4, shard="zero3"))
    assert everything.weights + everything.optimizer == pytest.approx(12 * values / 4, rel=0.01)  # FSDP2: the float32 shard is the master


def test_sharing_out_sends_what_the_zero_paper_says() -> None:
    """Section 7: gradients and optimizer shared out send as much as an all-reduce, weights shared out too half as much again."""
    _, spec = model("llama", vocab_size=256, layers=8)

    def volume(shard: Any) -> float:
        return sum(each.count * wire_bytes(each) for each in collectives(spec, TRAIN, Plan(dp=4, shard=shard)))

    assert volume("zero1") == pytest.approx(volume("none"), rel=0.01)  # rows are rounded up to whole ones
    assert volume("zero3") == pytest.approx(1.5 * volume("none"), rel=0.01)


def test_sequence_parallelism_sends_as_much_as_tensor_parallelism() -> None:
    """Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.2; the gradients of norms and the embedding's output come with it."""
    _, spec = model("llama", layers=8)

    def forward(sequence: bool) -> float:
        plan = Plan(tp=2, sequence_parallel=sequence)
        return sum(each.count * wire_bytes(each) for each in collectives(spec, TRAIN, plan) if each.when == "forward" and each.of == "activations")

    branches = 2 * 8
    hidden = 8 * 64 * 256 * 4
    assert forward(False) == (branches + 1) * hidden  # one all-reduce behind each branch and the embedding
    assert forward(True) == (2 * (branches + 1)) * hidden / 2  # a gather before each branch and the head, a scatter behind each and the embedding


@pytest.mark.parametrize("tp", [1, 2])
def test_fused_kernels_keep_what_the_formula_of_megatron_says(tp: int) -> None:
    """Korthikanti et al. 2022 (arXiv:2205.05198), table 2: 34·s·b·h / t bytes a layer, 2 of the 34 for dropouts' masks."""
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    workload = replace(TRAIN, batch_size=4, seq_len=1024, attention="flash", dtype="bfloat16")
    plan = Plan(tp=tp, sequence_parallel=tp > 1)
    kept = [rank_memory(model("gpt2", layers=n, **dropouts)[1], workload, plan, kernels="fused").activations for n in (8, 9)]
    assert kept[1] - kept[0] == pytest.approx(32 * 4 * 1024 * 256 / tp, rel=0.005)


def test_experts_are_divided_and_rows_sent_to_them() -> None:
    _, spec = model("mixtral", layers=4)
    plan = Plan(dp=4, ep=4, shard="zero1")
    experts = sum(each.part.parameters for each in place(spec) if each.routed)
    assert rank_spec(spec, plan).total_parameters == spec.total_parameters - experts * 3 // 4
    found = [each for each in collectives(spec, TRAIN, plan) if each.group == "ep"]
    assert {each.kind for each in found} == {"all_to_all"}
    assert sum(each.count for each in found) == 4 * 4  # there and back, forward and backward, in each of 4 layers
    assert found[0].bytes == 2 * 64 * 2 * 256 * 4  # two sequences, two experts a row
    assert rank_memory(spec, TRAIN, plan).peak < rank_memory(spec, TRAIN, Plan(dp=4, shard="zero1")).peak


def test_offload_leaves_the_optimizer_to_the_host() -> None:
    _, spec = model("llama")
    assert rank_memory(spec, TRAIN, Plan(dp=2, shard="zero1", offload="optimizer")).optimizer == 0


# ---- pipelines and links ----


def test_bubbles_and_micro_batches_in_flight() -> None:
    """Narayanan et al. 2021 (arXiv:2104.04473), section 2.2."""
    assert bubble_fraction(Plan(pp=8), 32) == 7 / 32
    assert bubble_fraction(Plan(pp=8, schedule="interleaved", virtual_stages=2), 32) == 7 / 64
    assert [in_flight(Plan(pp=4), 8, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(Plan(pp=4), 2) == 2
    assert in_flight(Plan(pp=4, schedule="gpipe"), 8) == 8
    interleaved = Plan(pp=4, schedule="interleaved", virtual_stages=2)
    assert in_flight(interleaved, 8) == Fraction(2 * 3 + 4 + 1, 2)  # (1 + (pp - 1) / (pp · v)) as much as 1F1B, section 2.2 of arXiv:2205.05198
    assert in_flight(interleaved, 8) == 4 * (1 + Fraction(3, 4 * 2))


@given(blocks=st.integers(1, 130), pp=st.integers(1, 16), v=st.integers(1, 4))
def test_every_block_is_on_one_stage(blocks: int, pp: int, v: int) -> None:
    pp = max(pp, 2) if v > 1 else pp
    plan = Plan(pp=pp, virtual_stages=v, schedule="interleaved" if v > 1 else "1f1b")
    if pp * v > blocks:
        with pytest.raises(WorkloadError, match=f"needs {pp * v} blocks, the model has {blocks}; use at most {blocks} pieces"):
            stage_blocks(blocks, plan)
        return
    stages = stage_blocks(blocks, plan)
    assert sorted(i for pieces in stages for piece in pieces for i in piece) == list(range(blocks))
    sizes = [len(piece) for pieces in stages for piece in pieces]
    assert max(sizes) - min(sizes) <= 1


def test_seconds_go_over_the_links_that_a_group_spans() -> None:
    device = Device(
        name="d", full_name="D", vendor="v", kind="gpu", links=(Link(name="in", bytes_per_s=400e9, devices=8), Link(name="out", bytes_per_s=50e9))
    )
    one = Collective(kind="all_reduce", bytes=8 * 10**9, group="dp", size=8, count=1, when="backward", overlappable=True)
    assert seconds(one, device) == pytest.approx(2 * 7 / 8 * 8e9 / 400e9)
    far = replace(one, stride=8)  # one rank a node
    assert seconds(far, device) == pytest.approx(2 * 7 / 8 * 8e9 / 50e9)
    both = replace(one, size=32)  # four nodes of eight: each rank sends its eighth between nodes
    assert seconds(both, device) == pytest.approx(max(2 * 7 / 8 * 8e9 / 400e9, 2 * 3 / 4 * 1e9 / 50e9))
    assert seconds(replace(one, kind="send"), device) == pytest.approx(8e9 / 400e9)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("name", "plan", "workload", "text"),
    [
        ("llama", Plan(tp=3), TRAIN, "tp=3 does not divide the 4 attention heads of LlamaForCausalLM; use 1, 2, 4."),
        ("llama", Plan(tp=4), TRAIN, "tp=4 does not divide the 682 inner width of LlamaForCausalLM's MLP (model.layers.0.mlp.gate_proj); use 1, 2,"),
        ("llama", Plan(pp=4), TRAIN, "pp=4 with virtual_stages=1 needs 4 blocks, LlamaForCausalLM has 3; use at most 3 pieces."),
        ("llama", Plan(dp=2, ep=2), TRAIN, "ep=2: LlamaForCausalLM has no experts; use ep=1."),
        ("mixtral", Plan(dp=3, ep=3), replace(TRAIN, batch_size=9), "ep=3 does not divide the 4 experts of MixtralForCausalLM; use 1, 2, 4."),
        ("llama", Plan(dp=3), TRAIN, "batch_size=8 does not divide over dp=3 ranks; use a multiple of 3."),
        ("llama", Plan(dp=2, micro_batch_size=3), TRAIN, "micro_batch_size=3 does not divide the 4 sequences of a rank (batch_size=8, dp=2)."),
        ("llama", Plan(cp=3), TRAIN, "seq_len=64 does not divide over cp=3 ranks; use a multiple of 3."),
        ("llama", Plan(tp=2, sequence_parallel=True), replace(TRAIN, seq_len=63), "63 positions of a rank do not divide over tp=2; use a"),
        ("mamba", Plan(tp=2), TRAIN, "tp=2: backbone.layers.0.mixer.scan is a recurrence, whose split over ranks is not described; use tp=1."),
        ("t5", Plan(pp=2), TRAIN, "pp=2: T5ForConditionalGeneration has 2 streams of blocks (an encoder and a decoder); use pp=1."),
        ("t5", Plan(cp=2), TRAIN, "cp=2: T5ForConditionalGeneration has no one sequence of tokens to divide; use cp=1."),
        ("mamba", Plan(cp=2), TRAIN, "cp=2: MambaForCausalLM has recurrences, whose state goes from position to position; use cp=1."),
        ("llama", Plan(pp=2, schedule="interleaved", virtual_stages=2), replace(TRAIN, batch_size=3), "needs 4 blocks, LlamaForCausalLM has 3"),
        ("llama", Plan(dp=2), replace(TRAIN, lora_rank=8), "lora_rank=8 over 2 devices is not described; use one device."),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused_in_one_line(name: str, plan: Plan, workload: Workload, text: str) -> None:
    _, spec = model(name)
    with pytest.raises(WorkloadError) as caught:
        rank_memory(spec, workload, plan)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"virtual_stages": 2, "schedule": "interleaved"}, "virtual_stages=2 has no effect with pp=1."),
        ({"pp": 2, "virtual_stages": 2}, "schedule=1f1b with virtual_stages=2: interleaved has at least 2, others 1."),
        ({"sequence_parallel": True}, "sequence_parallel has no effect with tp=1."),
        ({"dp": 2, "ep": 4}, "ep=4 does not divide dp · cp = 2: experts are spread over data-parallel ranks."),
        ({"dp": 4, "shard": "zero3", "shard_group": 3}, "shard_group=3 needs --shard and has to divide dp · cp = 4."),
        ({"tp": 0}, "tp=0 is not positive."),
        ({"shard": "zero4"}, "shard='zero4' is not known; known: none, zero1, zero2, zero3."),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_in_one_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        Plan(**options)
    assert str(caught.value) == text


def test_other_mistakes_are_refused_in_one_line() -> None:
    _, spec = model("llama", layers=4)
    with pytest.raises(WorkloadError, match=r"stage=2 is none of the 2 stages, which count from 0\."):
        rank_spec(spec, Plan(pp=2), 2)
    with pytest.raises(
        WorkloadError, match=r"schedule=interleaved takes micro-batches in groups of pp=2, not 1; change the batch or micro_batch_size\."
    ):
        in_flight(Plan(pp=2, schedule="interleaved", virtual_stages=2), 1)
    with pytest.raises(WorkloadError, match="collectives of phase prefill are not described; phase train has them"):
        collectives(spec, Workload(phase="prefill", batch_size=2), Plan(dp=2))


def test_more_tensor_parallel_ranks_than_key_value_heads_hold_one_each() -> None:
    _, spec = model("llama", width=512, intermediate_size=1024, num_key_value_heads=2)
    held = {part.name: part for part in rank_spec(spec, Plan(tp=4)).parts}
    assert held["model.layers.0.self_attn.k_proj"].out_features == 64  # type: ignore[attr-defined]
    assert held["model.layers.0.self_attn.q_proj"].out_features == 128  # type: ignore[attr-defined]
    odd = model("llama", width=768, intermediate_size=1536, num_key_value_heads=4)[1]
    with pytest.raises(WorkloadError, match=r"tp=6 and the 4 key/value heads of LlamaForCausalLM: one has to divide the other; use 1, 2, 4\."):
        rank_spec(odd, Plan(tp=6))
