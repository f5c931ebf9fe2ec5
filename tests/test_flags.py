"""A plan in the words of four frameworks: what is written can be read by them, holds the plan's numbers, and what they cannot do is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model import ModelSpec, read_spec
from lighten.parallel.flags import FRAMEWORKS, can_express, plan_flags
from lighten.parallel.plan import Plan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1024, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTRAL: dict[str, Any] = LLAMA | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def spec_of(folder: Path, config: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(str(folder))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spec_of(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spec_of(tmp_path_factory.mktemp("mixtral"), MIXTRAL)


def training(**changes: Any) -> Workload:
    asked: dict[str, Any] = {
        "phase": "train", "batch_size": 64, "seq_len": 2048, "dtype": "bfloat16", "optimizer": "adamw", "master_weights": True, "attention": "flash",
    }  # fmt: skip
    return Workload(**(asked | changes))


def arguments(text: str) -> dict[str, str]:
    """Megatron-LM's arguments by name; a switch has the value ''."""
    pairs = (line.partition(" ") for line in text.splitlines())
    return {name: value for name, _, value in pairs}


def test_torchtitan_reads_degrees_that_multiply_out(llama: ModelSpec) -> None:
    plan = Plan(dp=8, tp=4, pp=2, cp=2, shard="zero3", shard_group=8, sequence_parallel=True, micro_batch_size=2)
    found = tomllib.loads(plan_flags(plan, llama, training(recompute="full"), "torchtitan").text)
    sizes = found["parallelism"]
    degrees = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "pipeline_parallel", "context_parallel")
    assert prod(sizes[f"{name}_degree"] for name in degrees) == plan.devices == 128
    assert sizes["data_parallel_shard_degree"] * sizes["context_parallel_degree"] == plan.shard_group
    assert sizes["fsdp_reshard_after_forward"] == "always"
    assert found["activation_checkpoint"] == {"mode": "full"}
    assert found["training"]["dtype"] == "float32"
    assert found["training"]["mixed_precision_param"] == "bfloat16"
    # a pipeline's micro-batches are pieces of the local batch: 64 sequences over 8 ranks, 2 at a time
    assert found["training"]["local_batch_size"] == 8
    assert sizes["pipeline_parallel_microbatch_size"] == 2


def test_torchtitan_accumulates_without_a_pipeline(llama: ModelSpec) -> None:
    found = tomllib.loads(plan_flags(Plan(dp=8, shard="zero3", micro_batch_size=2), llama, training(), "torchtitan").text)
    assert found["training"]["local_batch_size"] == 2
    assert found["training"]["global_batch_size"] // (2 * 8) == 4  # its own rule for the steps of accumulation


def test_torchtitan_names_the_layers_of_uneven_stages(llama: ModelSpec) -> None:
    plan = Plan(pp=3, dp=2, shard="zero3", micro_batch_size=1)
    pieces = tomllib.loads(plan_flags(plan, llama, training(), "torchtitan").text)["parallelism"]["module_fqns_per_model_part"]
    assert [len(piece) for piece in pieces] == [3 + 1, 3, 2 + 2]
    assert pieces[0][0] == "tok_embeddings"
    assert pieces[-1][-2:] == ["norm", "output"]


def test_torchtitan_counts_the_layers_of_even_stages(llama: ModelSpec) -> None:
    plan = Plan(pp=2, dp=2, schedule="interleaved", virtual_stages=4, shard="zero3", micro_batch_size=1)
    found = tomllib.loads(plan_flags(plan, llama, training(), "torchtitan").text)["parallelism"]
    assert found["pipeline_parallel_layers_per_stage"] == 1
    assert found["pipeline_parallel_schedule"] == "Interleaved1F1B"


def test_megatron_arguments(llama: ModelSpec) -> None:
    plan = Plan(
        dp=4, tp=4, pp=2, cp=2, shard="zero1", sequence_parallel=True, schedule="interleaved", virtual_stages=2, micro_batch_size=1,
        offload="optimizer", shard_group=4,
    )  # fmt: skip
    found = arguments(plan_flags(plan, llama, training(recompute="selective"), "megatron").text)
    assert found["--tensor-model-parallel-size"] == "4"
    assert found["--pipeline-model-parallel-size"] == "2"
    assert found["--num-virtual-stages-per-pipeline-rank"] == "2"
    assert found["--context-parallel-size"] == "2"
    assert found["--micro-batch-size"] == "1"
    assert found["--global-batch-size"] == "64"
    assert found["--seq-length"] == "2048"
    assert found["--recompute-granularity"] == "selective"
    assert found["--recompute-modules"] == "core_attn"
    assert found["--num-distributed-optimizer-instances"] == "2"  # 4 · 2 ranks hold two copies
    assert {"--sequence-parallel", "--use-distributed-optimizer", "--bf16", "--optimizer-cpu-offload", "--use-precision-aware-optimizer"} <= set(
        found
    )


def test_megatron_layout_of_uneven_stages(llama: ModelSpec) -> None:
    plan = Plan(pp=3, dp=2, micro_batch_size=1)
    layout = arguments(plan_flags(plan, llama, training(), "megatron").text)["--pipeline-model-parallel-layout"]
    stages = layout.split("|")
    assert [stage.count("t") for stage in stages] == [3, 3, 2]  # as lighten.parallel.rank.stage_blocks has it
    assert layout[0] == "E"
    assert layout[-1] == "L"


def test_megatron_fsdp_and_full_recompute(llama: ModelSpec) -> None:
    found = arguments(plan_flags(Plan(dp=8, shard="zero3", micro_batch_size=1), llama, training(recompute="full"), "megatron").text)
    assert found["--data-parallel-sharding-strategy"] == "optim_grads_params"
    assert found["--ckpt-format"] == "fsdp_dtensor"
    assert found["--recompute-method"] == "uniform"
    assert found["--recompute-num-layers"] == "1"


def test_megatron_experts(mixtral: ModelSpec) -> None:
    plan = Plan(dp=8, tp=2, ep=4, sequence_parallel=True, micro_batch_size=1)
    found = arguments(plan_flags(plan, mixtral, training(), "megatron").text)
    assert found["--expert-model-parallel-size"] == "4"
    assert found["--expert-tensor-parallel-size"] == "2"


@given(dp=st.sampled_from([1, 2, 4, 8]), tp=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]), shard=st.sampled_from(["none", "zero3"]))
def test_deepspeed_batches_multiply_out(llama: ModelSpec, dp: int, tp: int, micro: int, shard: Any) -> None:
    plan = Plan(dp=dp, tp=tp, shard=shard, micro_batch_size=micro)
    found = json.loads(plan_flags(plan, llama, training(), "deepspeed").text)
    world = plan.devices // found.get("tensor_parallel", {}).get("autotp_size", 1)
    assert found["train_batch_size"] == found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * world
    assert found["zero_optimization"]["stage"] == {"none": 0, "zero3": 3}[shard]


def test_deepspeed_offload_groups_and_experts(llama: ModelSpec, mixtral: ModelSpec) -> None:
    found = json.loads(plan_flags(Plan(dp=8, shard="zero3", shard_group=4, offload="optimizer"), llama, training(), "deepspeed").text)
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert found["zero_optimization"]["mics_shard_size"] == 4
    found = json.loads(plan_flags(Plan(dp=8, ep=4, shard="zero2"), mixtral, training(), "deepspeed").text)
    assert found["expert_parallel"] == {"enabled": True, "autoep_size": 4}
    pure = json.loads(plan_flags(Plan(dp=8, shard="zero1"), llama, training(master_weights=False), "deepspeed").text)
    assert pure["bf16"]["bf16_optimizer_states"] is True


def test_accelerate_sizes_multiply_out(llama: ModelSpec) -> None:
    plan = Plan(dp=8, tp=2, cp=2, shard="zero3", shard_group=8, micro_batch_size=2)
    flags = plan_flags(plan, llama, training(recompute="full"), "accelerate", devices_per_node=8)
    found = yaml.safe_load(flags.text)
    sizes = found["parallelism_config"]
    assert prod(sizes.values()) == found["num_processes"] == 32
    assert found["num_machines"] == 4
    assert sizes["parallelism_config_dp_shard_size"] * sizes["parallelism_config_cp_size"] == 8
    assert found["fsdp_config"]["fsdp_version"] == 2
    assert found["fsdp_config"]["fsdp_activation_checkpointing"] is True
    assert found["fsdp_config"]["fsdp_reshard_after_forward"] is True
    assert found["mixed_precision"] == "bf16"
    assert any("gradient_accumulation_steps=4" in line for line in flags.beside)


def test_accelerate_reads_its_file(llama: ModelSpec, tmp_path: Path) -> None:
    """accelerate's own reader refuses keys that it does not know."""
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    path = tmp_path / "plan.yaml"
    path.write_text(plan_flags(Plan(dp=4, tp=2, shard="zero3"), llama, training(), "accelerate").text)
    read = config_args.load_config_from_file(str(path))
    assert read.num_processes == 8
    assert read.parallelism_config["parallelism_config_tp_size"] == 2


def test_accelerate_without_sharding_is_ddp(llama: ModelSpec) -> None:
    found = yaml.safe_load(plan_flags(Plan(dp=4), llama, training(), "accelerate").text)
    assert found["distributed_type"] == "MULTI_GPU"
    assert "fsdp_config" not in found


REFUSED = [
    ("torchtitan", Plan(dp=8, shard="zero1"), {}, "shard=zero1, it shards gradients with the optimizer's state"),
    ("torchtitan", Plan(dp=4, tp=2, sequence_parallel=True), {}, "its DDP stands alone"),
    ("torchtitan", Plan(dp=4, cp=2, tp=1), {}, "whose ranks it always shards over"),
    ("torchtitan", Plan(tp=8, sequence_parallel=True), {}, "which runs in float32"),
    ("torchtitan", Plan(dp=4, cp=4, shard="zero3", shard_group=2), {}, "use a multiple of cp"),
    ("torchtitan", Plan(dp=4, tp=2, shard="zero3"), {}, "tp without sequence_parallel"),
    ("torchtitan", Plan(dp=8, shard="zero3", offload="optimizer"), {}, "it offloads weights, gradients and state together"),
    ("torchtitan", Plan(dp=8, shard="zero3"), {"recompute": "selective"}, "recompute=selective as the core of attention alone"),
    ("torchtitan", Plan(dp=8, shard="zero3"), {"dtype": "float16"}, "float16; use bfloat16"),
    ("torchtitan", Plan(dp=8, shard="zero3"), {"optimizer": "lion"}, "optimizer lion; it has adamw, adam"),
    ("torchtitan", Plan(dp=8, cp=4, shard="zero3"), {"seq_len": 1001}, "has to be a multiple of tp · 2 · cp"),
    ("torchtitan", Plan(dp=8, shard="zero3"), {"master_weights": False, "lora_rank": 8}, "lora_rank=8, it trains all weights"),
    ("megatron", Plan(dp=8), {"master_weights": False}, "pure bfloat16, it keeps float32 masters"),
    ("megatron", Plan(dp=4, pp=2, schedule="gpipe"), {}, "schedule=gpipe; it has 1f1b and interleaved"),
    ("megatron", Plan(dp=8, pp=4, schedule="interleaved", virtual_stages=2, micro_batch_size=8), {}, "which pp=4 has to divide"),
    ("megatron", Plan(dp=8, shard="zero3", offload="optimizer"), {}, "offload=optimizer with shard=zero3; it has it with zero1"),
    ("megatron", Plan(dp=8, shard="zero3"), {"optimizer": "lion"}, "its FSDP has adamw and sgd-momentum"),
    ("megatron", Plan(dp=8), {"optimizer": "adafactor"}, "optimizer adafactor; it has adamw"),
    ("deepspeed", Plan(dp=4, pp=2), {}, "pp=2, its pipelines are written in Python"),
    ("deepspeed", Plan(dp=4, cp=2), {}, "cp=2, it has no context parallelism"),
    ("deepspeed", Plan(dp=4, tp=2, sequence_parallel=True), {}, "sequence_parallel; its AutoTP has none"),
    ("deepspeed", Plan(dp=8, shard="zero1", shard_group=4), {}, "MiCS has groups with zero3"),
    ("deepspeed", Plan(dp=8, offload="optimizer"), {}, "offload=optimizer with shard=none; use zero1, zero2 or zero3"),
    ("deepspeed", Plan(dp=4, tp=2, ep=2), {}, "its experts are not split by tp"),
    ("deepspeed", Plan(dp=8, shard="zero3"), {"recompute": "selective"}, "recompute=selective; use none or full"),
    ("deepspeed", Plan(dp=8), {"master_weights": False}, "pure bfloat16 with shard=none, it keeps float32 masters"),
    ("accelerate", Plan(dp=4, pp=2), {}, "pp=2, it trains without pipelines"),
    ("accelerate", Plan(dp=4, ep=2), {}, "ep=2, it has no expert parallelism"),
    ("accelerate", Plan(dp=4, tp=2, sequence_parallel=True), {}, "sequence_parallel; its tensor parallelism is the model's own plan"),
    ("accelerate", Plan(dp=8, shard="zero1"), {}, "shard=zero1, FSDP2 shards gradients"),
    ("accelerate", Plan(dp=4, tp=2), {}, "shard=none with tp or cp"),
    ("accelerate", Plan(cp=2), {}, "whose ranks it always shards over"),
    ("accelerate", Plan(dp=4, cp=4, shard="zero3", shard_group=2), {}, "use a multiple of cp"),
    ("accelerate", Plan(dp=8, shard="zero3", offload="optimizer"), {}, "it offloads weights, gradients and state together"),
    ("accelerate", Plan(dp=8, shard="zero3"), {"recompute": "selective"}, "recompute=selective; use none or full"),
]  # fmt: skip


@pytest.mark.parametrize(("framework", "plan", "changes", "text"), REFUSED)
def test_what_cannot_be_expressed_is_refused(llama: ModelSpec, framework: str, plan: Plan, changes: dict[str, Any], text: str) -> None:
    workload = training(**changes)
    assert not can_express(plan, llama, workload, framework)
    with pytest.raises(WorkloadError, match=f"^{framework} cannot express this plan: ") as error:
        plan_flags(plan, llama, workload, framework)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_experts_need_sequence_parallelism_in_megatron(mixtral: ModelSpec) -> None:
    with pytest.raises(WorkloadError, match="experts with tp but without sequence_parallel"):
        plan_flags(Plan(dp=4, tp=2), mixtral, training(), "megatron")


def test_all_that_is_missing_is_said_at_once(llama: ModelSpec) -> None:
    with pytest.raises(WorkloadError, match=r"pp=2.*cp=2.*recompute=selective"):
        plan_flags(Plan(dp=2, pp=2, cp=2), llama, training(recompute="selective"), "deepspeed")


def test_unknown_framework_and_phase(llama: ModelSpec) -> None:
    with pytest.raises(WorkloadError, match="framework 'colossal' is not known; known: torchtitan, megatron, deepspeed, accelerate"):
        plan_flags(Plan(), llama, training(), "colossal")
    with pytest.raises(WorkloadError, match="deepspeed trains: a plan of phase prefill has no flags of it"):
        plan_flags(Plan(), llama, Workload(phase="prefill"), "deepspeed")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_batch_that_does_not_divide_is_one_line(llama: ModelSpec, framework: str) -> None:
    plan = Plan(dp=8, shard="zero3", micro_batch_size=3)
    with pytest.raises(WorkloadError, match="micro_batch_size=3 does not divide the 8 sequences of a rank"):
        plan_flags(plan, llama, training(), framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_device_is_a_plan_too(llama: ModelSpec, framework: str) -> None:
    assert plan_flags(Plan(), llama, training(), framework).text.endswith("\n")


def test_data_types(llama: ModelSpec) -> None:
    half = training(dtype="float16")
    assert json.loads(plan_flags(Plan(dp=8), llama, half, "deepspeed").text)["fp16"] == {"enabled": True}
    assert "--fp16" in arguments(plan_flags(Plan(dp=8), llama, half, "megatron").text)
    full = replace(training(master_weights=False), dtype="float32")
    found = tomllib.loads(plan_flags(Plan(dp=8, shard="zero2"), llama, full, "torchtitan").text)
    assert found["training"]["mixed_precision_param"] == "float32"
    assert found["parallelism"]["fsdp_reshard_after_forward"] == "never"
    pure = tomllib.loads(plan_flags(Plan(dp=8, shard="zero3"), llama, training(master_weights=False), "torchtitan").text)
    assert pure["training"]["dtype"] == "bfloat16"
