"""A plan in the words of the frameworks that train by it: torchtitan, Megatron-LM, DeepSpeed, and accelerate with FSDP2.

Only what a plan decides is written: who holds what, batches, recomputation, data types. Paths, learning rates and the model are the user's.
A framework that would run something else than the plan says is refused, with everything in the plan that it has no word for.

Source: read on 2026-08-22: torchtitan 0.2.2 (`torchtitan/config/job_config.py`, `distributed/parallel_dims.py`; the last release that is
configured by TOML files), Megatron-LM (`megatron/training/arguments.py`, `core/model_parallel_config.py`), DeepSpeed
(`docs/_pages/config-json.md`, `runtime/zero/config.py`, `runtime/tensor_parallel/config.py`) and accelerate (`parallelism_config.py`,
`commands/launch.py`, `examples/torch_native_parallelism/configs`), each its main branch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from lighten.cost.workload import Workload
from lighten.errors import WorkloadError
from lighten.model.spec import Linear, ModelSpec
from lighten.parallel.plan import Plan
from lighten.parallel.rank import block_names, stage_blocks
from lighten.units import DTYPE_BITS


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A plan as one framework takes it.

    Attributes:
        text: the file's content: TOML (torchtitan), arguments (Megatron-LM), JSON (DeepSpeed) or YAML (accelerate).
        suffix: that a file of it usually has.
        beside: what the file cannot say and the training script has to do, one sentence each.
    """

    framework: str
    text: str
    suffix: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is to be written: a plan of a model's training step."""

    plan: Plan
    spec: ModelSpec
    workload: Workload
    devices_per_node: int | None

    @property
    def micro_batch(self) -> int:
        return self.plan.micro_batch(self.workload.batch_size)

    @property
    def micro_batches(self) -> int:
        return self.plan.micro_batches(self.workload.batch_size)

    @property
    def mixed(self) -> bool:
        """Computes in 16 bits, updates float32 copies."""
        return self.workload.master_weights

    @property
    def narrow(self) -> bool:
        return DTYPE_BITS[self.workload.dtype] < 32

    @property
    def has_experts(self) -> bool:
        return any(isinstance(part, Linear) and part.experts > 1 for part in self.spec.parts)

    @property
    def pieces(self) -> list[range]:
        """Layers of each piece of the pipeline, in the order in which a batch meets them."""
        stages = stage_blocks(len(block_names(self.spec)), self.plan, self.spec.name)
        return [stages[piece % self.plan.pp][piece // self.plan.pp] for piece in range(self.plan.pp * self.plan.virtual_stages)]

    @property
    def is_even(self) -> bool:
        return len({len(piece) for piece in self.pieces}) == 1

    @property
    def shard_over(self) -> int:
        """Ranks that FSDP shards over, which context-parallel ranks are among."""
        return 1 if self.plan.shard == "none" else self.plan.sharing_ranks

    def fsdp_sizes(self) -> tuple[int, int]:
        """Data-parallel ranks that hold copies, and those that one copy is shared out over, where context-parallel ranks share too."""
        shard = max(1, self.shard_over // self.plan.cp)
        return self.plan.dp // shard, shard


def plan_flags(plan: Plan, spec: ModelSpec, workload: Workload, framework: str, *, devices_per_node: int | None = None) -> Flags:
    """The plan as `framework` takes it.

    Args:
        devices_per_node: of a launcher's number of machines; None: all devices are in one.

    Raises:
        WorkloadError: no such framework, a phase that is no training, a batch that does not divide, or what the framework cannot express,
            all of it at once.
    """
    if framework not in FRAMEWORKS:
        raise WorkloadError(f"framework {framework!r} is not known; known: {', '.join(FRAMEWORKS)}.")
    if workload.phase != "train":
        raise WorkloadError(f"{framework} trains: a plan of phase {workload.phase} has no flags of it; use phase train.")
    asked = _Asked(plan=plan, spec=spec, workload=workload, devices_per_node=devices_per_node)
    write, refuse = FRAMEWORKS[framework]
    if missing := refuse(asked):
        raise WorkloadError(f"{framework} cannot express this plan: {'; '.join(missing)}.")
    return write(asked)


def can_express(plan: Plan, spec: ModelSpec, workload: Workload, framework: str) -> bool:
    """Whether `plan_flags` writes it."""
    asked = _Asked(plan=plan, spec=spec, workload=workload, devices_per_node=None)
    return not FRAMEWORKS[framework][1](asked)


# torchtitan

_RESHARD = {"zero3": "always", "zero2": "never"}
_TITAN_SCHEDULES = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "gpipe": "GPipe"}
_TITAN_OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam"}


def _refuse_torchtitan(asked: _Asked) -> list[str]:
    plan, workload = asked.plan, asked.workload
    missing = _no_adapters(workload)
    fsdp = asked.shard_over > 1
    if plan.shard == "zero1":
        missing.append("shard=zero1, it shards gradients with the optimizer's state (zero2) or all (zero3)")
    if not fsdp and plan.dp > 1 and plan.devices > plan.dp:
        missing.append("shard=none with tp, pp or cp, its DDP stands alone; use zero2 or zero3")
    if not fsdp and plan.cp > 1:
        missing.append("shard=none with cp, whose ranks it always shards over; use zero2 or zero3")
    if not fsdp and asked.mixed and plan.tp * plan.pp > 1:
        missing.append(f"{workload.dtype} with float32 masters and tp or pp but without sharding, which runs in float32; use zero2 or zero3")
    if plan.shard_group is not None and plan.shard_group % plan.cp:
        missing.append(f"shard_group={plan.shard_group}, it shards over all cp={plan.cp} ranks; use a multiple of cp")
    if plan.tp > 1 and not plan.sequence_parallel:
        missing.append("tp without sequence_parallel, which it always has")
    if plan.offload != "none":
        missing.append(f"offload={plan.offload}, it offloads weights, gradients and state together")
    if workload.recompute == "selective":
        missing.append("recompute=selective as the core of attention alone; use none or full")
    if workload.dtype == "float16":
        missing.append("float16; use bfloat16")
    if workload.optimizer not in _TITAN_OPTIMIZERS:
        missing.append(f"optimizer {workload.optimizer}; it has {', '.join(_TITAN_OPTIMIZERS)}")
    if workload.seq_len % (plan.tp * (2 * plan.cp if plan.cp > 1 else 1)):
        missing.append(f"seq_len={workload.seq_len}, which has to be a multiple of tp · 2 · cp")
    return missing


def _write_torchtitan(asked: _Asked) -> Flags:
    plan, workload = asked.plan, asked.workload
    replicate, shard = asked.fsdp_sizes()
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": replicate, "data_parallel_shard_degree": shard, "tensor_parallel_degree": plan.tp,
        "context_parallel_degree": plan.cp, "pipeline_parallel_degree": plan.pp,
    }  # fmt: skip
    if plan.shard in _RESHARD:
        parallelism["fsdp_reshard_after_forward"] = _RESHARD[plan.shard]
    if plan.pp > 1:
        parallelism |= {"pipeline_parallel_schedule": _TITAN_SCHEDULES[plan.schedule], "pipeline_parallel_microbatch_size": asked.micro_batch}
        parallelism |= _titan_stages(asked)
    if asked.has_experts:
        parallelism |= {"expert_parallel_degree": plan.ep, "expert_tensor_parallel_degree": plan.tp}
    in_16 = asked.narrow and not asked.mixed
    training: dict[str, Any] = {
        "local_batch_size": asked.micro_batch * (asked.micro_batches if plan.pp > 1 else 1), "global_batch_size": workload.batch_size,
        "seq_len": workload.seq_len, "dtype": "bfloat16" if in_16 else "float32", "mixed_precision_param": workload.dtype,
    }  # fmt: skip
    sections: dict[str, dict[str, Any]] = {
        "training": training, "parallelism": parallelism, "activation_checkpoint": {"mode": workload.recompute},
        "optimizer": {"name": _TITAN_OPTIMIZERS[str(workload.optimizer)]},
    }  # fmt: skip
    beside = ("merge these sections into a job file of torchtitan 0.2.2; later versions are configured in Python and count tokens for sequences",)
    return Flags(framework="torchtitan", text=_comments(beside) + _toml(sections), suffix=".toml", beside=beside)


def _titan_stages(asked: _Asked) -> dict[str, Any]:
    """Layers of each piece of the pipeline: by their number where all pieces have as many, else by name."""
    if asked.is_even:
        even = {"pipeline_parallel_first_stage_less_layers": 0, "pipeline_parallel_last_stage_less_layers": 0}
        return even | {"pipeline_parallel_layers_per_stage": len(asked.pieces[0])}
    names = [[f"layers.{layer}" for layer in piece] for piece in asked.pieces]
    return {"module_fqns_per_model_part": [["tok_embeddings", *names[0]], *names[1:-1], [*names[-1], "norm", "output"]]}


# Megatron-LM

_MEGATRON_OPTIMIZERS = {"adamw": "adam", "sgd-momentum": "sgd", "lion": "lion", "muon": "muon"}
_MEGATRON_FSDP = {"zero2": "optim_grads", "zero3": "optim_grads_params"}


def _refuse_megatron(asked: _Asked) -> list[str]:
    plan, workload = asked.plan, asked.workload
    missing = _no_adapters(workload)
    if asked.narrow and not asked.mixed:
        missing.append(f"pure {workload.dtype}, it keeps float32 masters; plan with them")
    if plan.schedule == "gpipe":
        missing.append("schedule=gpipe; it has 1f1b and interleaved")
    if plan.schedule == "interleaved" and asked.micro_batches % plan.pp:
        missing.append(f"interleaved with {asked.micro_batches} micro-batches, which pp={plan.pp} has to divide")
    if asked.has_experts and plan.tp > 1 and not plan.sequence_parallel:
        missing.append("experts with tp but without sequence_parallel")
    if plan.offload == "optimizer" and plan.shard != "zero1":
        missing.append(f"offload=optimizer with shard={plan.shard}; it has it with zero1")
    if plan.shard in _MEGATRON_FSDP and workload.optimizer not in ("adamw", "sgd-momentum"):
        missing.append(f"shard={plan.shard} with optimizer {workload.optimizer}; its FSDP has adamw and sgd-momentum")
    if workload.optimizer not in _MEGATRON_OPTIMIZERS:
        missing.append(f"optimizer {workload.optimizer}; it has {', '.join(_MEGATRON_OPTIMIZERS)}")
    if workload.dtype not in ("float32", "bfloat16", "float16"):
        missing.append(f"dtype {workload.dtype}")
    return missing


def _write_megatron(asked: _Asked) -> Flags:
    plan, workload = asked.plan, asked.workload
    lines = [
        f"--tensor-model-parallel-size {plan.tp}", f"--pipeline-model-parallel-size {plan.pp}", f"--context-parallel-size {plan.cp}",
        f"--micro-batch-size {asked.micro_batch}", f"--global-batch-size {workload.batch_size}", f"--seq-length {workload.seq_len}",
        f"--optimizer {_MEGATRON_OPTIMIZERS[str(workload.optimizer)]}",
    ]  # fmt: skip
    if not asked.is_even:
        lines.append(f"--pipeline-model-parallel-layout {_layout(asked.pieces)}")
    elif plan.virtual_stages > 1:
        lines.append(f"--num-virtual-stages-per-pipeline-rank {plan.virtual_stages}")
    if asked.has_experts:
        lines += [f"--expert-model-parallel-size {plan.ep}", f"--expert-tensor-parallel-size {plan.tp}"]
    if plan.sequence_parallel:
        lines.append("--sequence-parallel")
    lines += _megatron_sharding(plan)
    if workload.recompute == "full":
        lines += ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    elif workload.recompute == "selective":
        lines += ["--recompute-granularity selective", "--recompute-modules core_attn"]
    if workload.dtype == "bfloat16":
        lines += ["--bf16", "--grad-reduce-in-bf16"]
    elif workload.dtype == "float16":
        lines.append("--fp16")
    beside = (f"start {plan.devices} ranks: --world-size is theirs, and data parallelism what is left of it, dp={plan.dp}",)
    return Flags(framework="megatron", text="\n".join(lines) + "\n", suffix=".args", beside=beside)


def _megatron_sharding(plan: Plan) -> list[str]:
    ranks = plan.dp * plan.cp
    if plan.shard == "none":
        return ["--overlap-grad-reduce"] if ranks > 1 else []
    lines = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    if plan.shard in _MEGATRON_FSDP:
        lines += ["--use-megatron-fsdp", f"--data-parallel-sharding-strategy {_MEGATRON_FSDP[plan.shard]}", "--ckpt-format fsdp_dtensor"]
    if plan.sharing_ranks < ranks:
        lines.append(f"--num-distributed-optimizer-instances {ranks // plan.sharing_ranks}")
    if plan.offload == "optimizer":
        lines += ["--optimizer-cpu-offload", "--use-precision-aware-optimizer"]
    return lines


def _layout(pieces: list[range]) -> str:
    """Stages in Megatron-LM's letters (E embedding, t layer, L loss), where they do not all hold as many.

    >>> _layout([range(0, 2), range(2, 5), range(5, 7)])
    'Ett|ttt|ttL'
    """
    return "E" + "|".join("t" * len(piece) for piece in pieces) + "L"


# DeepSpeed

_STAGES = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def _refuse_deepspeed(asked: _Asked) -> list[str]:
    plan, workload = asked.plan, asked.workload
    missing = []
    if plan.pp > 1:
        missing.append(f"pp={plan.pp}, its pipelines are written in Python (PipelineModule), not configured")
    if plan.cp > 1:
        missing.append(f"cp={plan.cp}, it has no context parallelism (Ulysses exchanges heads, and is set up in Python)")
    if plan.sequence_parallel:
        missing.append("sequence_parallel; its AutoTP has none")
    if plan.shard_group is not None and (plan.shard != "zero3" or plan.ep > 1):
        missing.append(f"shard_group={plan.shard_group} with shard={plan.shard}, ep={plan.ep}; MiCS has groups with zero3 and ep=1")
    if plan.offload == "optimizer" and plan.shard == "none":
        missing.append("offload=optimizer with shard=none; use zero1, zero2 or zero3")
    if plan.ep > 1 and plan.tp > 1:
        missing.append(f"ep={plan.ep} with tp={plan.tp}, its experts are not split by tp")
    if workload.recompute == "selective":
        missing.append("recompute=selective; use none or full")
    if asked.narrow and not asked.mixed and (workload.dtype != "bfloat16" or plan.shard == "none"):
        missing.append(f"pure {workload.dtype} with shard={plan.shard}, it keeps float32 masters; pure bfloat16 works with zero1, zero2 or zero3")
    return missing


def _write_deepspeed(asked: _Asked) -> Flags:
    plan, workload = asked.plan, asked.workload
    zero: dict[str, object] = {"stage": _STAGES[plan.shard]}
    if plan.shard != "none":
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if plan.shard_group is not None:
        zero["mics_shard_size"] = plan.shard_group
    if plan.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, object] = {
        "train_batch_size": workload.batch_size, "train_micro_batch_size_per_gpu": asked.micro_batch,
        "gradient_accumulation_steps": asked.micro_batches, "zero_optimization": zero,
    }  # fmt: skip
    if workload.dtype == "bfloat16":
        config["bf16"] = {"enabled": True} | ({} if asked.mixed else {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True})
    elif workload.dtype == "float16":
        config["fp16"] = {"enabled": True}
    if plan.tp > 1:
        config["tensor_parallel"] = {"autotp_size": plan.tp}
    if plan.ep > 1:
        config["expert_parallel"] = {"enabled": True, "autoep_size": plan.ep}
    beside = [f"the optimizer ({workload.optimizer}) and its learning rate are the training script's"]
    if workload.recompute == "full":
        config["activation_checkpointing"] = {"partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False}
        beside.append("the model has to checkpoint each layer: gradient_checkpointing_enable() of transformers, or deepspeed.checkpointing")
    beside += _trained_adapters(workload)
    return Flags(framework="deepspeed", text=json.dumps(config, indent=2) + "\n", suffix=".json", beside=tuple(beside))


# accelerate


def _refuse_accelerate(asked: _Asked) -> list[str]:
    plan, workload = asked.plan, asked.workload
    missing = []
    if plan.pp > 1:
        missing.append(f"pp={plan.pp}, it trains without pipelines")
    if plan.ep > 1:
        missing.append(f"ep={plan.ep}, it has no expert parallelism")
    if plan.sequence_parallel:
        missing.append("sequence_parallel; its tensor parallelism is the model's own plan, without it")
    if plan.shard == "zero1":
        missing.append("shard=zero1, FSDP2 shards gradients with the optimizer's state (zero2) or all (zero3)")
    if asked.shard_over == 1 and plan.tp * plan.cp > 1 and plan.dp > 1:
        missing.append("shard=none with tp or cp; use zero2 or zero3")
    if asked.shard_over == 1 and plan.cp > 1:
        missing.append("shard=none with cp, whose ranks it always shards over; use zero2 or zero3")
    if plan.shard_group is not None and plan.shard_group % plan.cp:
        missing.append(f"shard_group={plan.shard_group}, it shards over all cp={plan.cp} ranks; use a multiple of cp")
    if plan.offload != "none":
        missing.append(f"offload={plan.offload}, it offloads weights, gradients and state together")
    if workload.recompute == "selective":
        missing.append("recompute=selective; use none or full")
    return missing


def _write_accelerate(asked: _Asked) -> Flags:
    plan, workload = asked.plan, asked.workload
    replicate, shard = asked.fsdp_sizes()
    fsdp = asked.shard_over > 1 or plan.tp > 1
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(workload.dtype, "no") if asked.mixed else "no"
    nodes = -(-plan.devices // asked.devices_per_node) if asked.devices_per_node else 1
    config: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "FSDP" if fsdp else "MULTI_GPU" if plan.dp > 1 else "NO",
        "downcast_bf16": "no", "machine_rank": 0, "main_training_function": "main", "mixed_precision": precision, "num_machines": nodes,
        "num_processes": plan.devices, "rdzv_backend": "static", "same_network": True, "use_cpu": False,
    }  # fmt: skip
    beside = [
        f"the training script loads batches of {asked.micro_batch} sequences of {workload.seq_len} tokens"
        f" and takes Accelerator(gradient_accumulation_steps={asked.micro_batches})"
    ]
    if fsdp:
        config["fsdp_config"] = {
            "fsdp_version": 2, "fsdp_reshard_after_forward": plan.shard == "zero3", "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_activation_checkpointing": workload.recompute == "full", "fsdp_offload_params": False,
            "fsdp_cpu_ram_efficient_loading": False, "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        }  # fmt: skip
        config["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": replicate, "parallelism_config_dp_shard_size": shard,
            "parallelism_config_tp_size": plan.tp, "parallelism_config_cp_size": plan.cp,
        }  # fmt: skip
    elif workload.recompute == "full":
        beside.append("the model has to checkpoint each layer: gradient_checkpointing_enable() of transformers")
    if nodes > 1:
        beside.append(f"each of the {nodes} machines sets its machine_rank, and all the same main_process_ip and main_process_port")
    if asked.narrow and not asked.mixed:
        beside.append(f"the training script loads the model in {workload.dtype}")
    beside += _trained_adapters(workload)
    text = _comments(tuple(beside)) + yaml.safe_dump(config, sort_keys=False)
    return Flags(framework="accelerate", text=text, suffix=".yaml", beside=tuple(beside))


# what they share


def _no_adapters(workload: Workload) -> list[str]:
    return [f"lora_rank={workload.lora_rank}, it trains all weights"] if workload.lora_rank is not None else []


def _trained_adapters(workload: Workload) -> list[str]:
    return [] if workload.lora_rank is None else [f"the training script adds adapters of rank {workload.lora_rank} to {workload.lora_targets}"]


def _comments(lines: tuple[str, ...]) -> str:
    return "".join(f"# {line}\n" for line in lines)


def _toml(sections: dict[str, dict[str, Any]]) -> str:
    """Sections of TOML; strings, whole numbers, truth values and lists of strings are written as JSON writes them."""
    blocks = ["\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]) for name, values in sections.items()]
    return "\n\n".join(blocks) + "\n"


FRAMEWORKS: dict[str, tuple[Callable[[_Asked], Flags], Callable[[_Asked], list[str]]]] = {
    "torchtitan": (_write_torchtitan, _refuse_torchtitan),
    "megatron": (_write_megatron, _refuse_megatron),
    "deepspeed": (_write_deepspeed, _refuse_deepspeed),
    "accelerate": (_write_accelerate, _refuse_accelerate),
}
"""Framework → what writes a plan for it, and what says why it cannot."""
