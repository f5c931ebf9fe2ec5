"""How far is the predicted memory of one rank of a plan from what lives in torch's own distributed run, and are its collectives those predicted?

python benchmarks/plan_truth.py --models llama gpt2 --width 256 1024

The truth is one rank under a fake process group, on fake tensors (tests/plan_runs.py): FSDP2 and HSDP (`fully_shard`), tensor parallelism
with and without sequence parallelism (`parallelize_module`), both together, and pipeline stages in the order of torch's schedules, of
transformers' classes with 64 values a head. Memory is the highest sum of live storages' bytes in the second step; a collective is its kind,
the bytes of its whole buffer, its ranks, and how often it runs. A model takes part in the plans that its class can run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from family_truth import spec_of
from memory_models import memory_config
from plan_runs import NAMES, run_plan, run_stage

from lighten.cost.workload import Workload
from lighten.model.spec import ModelSpec
from lighten.parallel.communication import collectives
from lighten.parallel.memory import rank_memory
from lighten.parallel.plan import Plan

MIB = 2**20
STAGED = ("bert", "gpt2", "llama", "qwen2", "qwen3")
LEARNED_POSITIONS = ("bert", "opt")
"""Whose modules add positions to whole sequences: no sequence parallelism."""
BFLOAT16_ALONE = ("mixtral",)
"""Whose grouped products have no kernel for fake tensors of another type."""


def plans(name: str) -> Iterator[Plan]:
    """The plans that a model's class can run."""
    yield Plan(dp=4, shard="zero3")
    yield Plan(dp=4, shard="zero3", shard_group=2)
    if NAMES[name].columns and name != "gemma":  # one key/value head, which DTensor does not split
        for sequence in (False, True) if name not in LEARNED_POSITIONS else (False,):
            yield Plan(tp=2, sequence_parallel=sequence)
            yield Plan(dp=2, tp=2, shard="zero3", sequence_parallel=sequence)
            yield Plan(dp=2, tp=2, shard="zero3", sequence_parallel=sequence, micro_batch_size=1)
    if name in STAGED:
        yield Plan(pp=2, micro_batch_size=2)
        yield Plan(pp=2, micro_batch_size=2, schedule="gpipe")
        yield Plan(pp=2, micro_batch_size=2, schedule="interleaved", virtual_stages=2)


def workloads(name: str, plan: Plan, length: int) -> Iterator[Workload]:
    """In float32, recomputed, and in bfloat16 with float32 masters, where these can be."""
    asked = Workload(phase="train", batch_size=8, seq_len=length, optimizer="adamw", dtype="bfloat16" if name in BFLOAT16_ALONE else "float32")
    yield asked
    if plan.pp == 1:
        yield replace(asked, recompute="full")
    if plan.shard == "zero3" and name not in BFLOAT16_ALONE:
        yield replace(asked, dtype="bfloat16", master_weights=True)


def title(plan: Plan) -> str:
    sizes = " ".join(f"{each}={getattr(plan, each)}" for each in ("dp", "tp", "pp") if getattr(plan, each) > 1)
    more = [plan.shard] * (plan.shard != "none") + ["hsdp"] * (plan.shard_group is not None) + ["sp"] * plan.sequence_parallel
    return " ".join([sizes, *more, *([plan.schedule] if plan.pp > 1 else []), *([f"micro={plan.micro_batch_size}"] if plan.micro_batch_size else [])])


def grade(name: str, width: int, plan: Plan, workload: Workload) -> Iterator[tuple[str, int, int, int, bool]]:
    """Each rank that differs: what it is, predicted and measured bytes, number of collectives, whether they are those predicted."""
    changes: dict[str, Any] = {"width": width, "layers": 4 if width < 512 else 8, "vocab_size": 4 * width}
    if plan.pp > 1:  # torch's stages share no weight
        changes["tie_word_embeddings"] = False
    spec: ModelSpec = spec_of(memory_config(name, **changes), memory_config(name).architectures[0])
    for stage in range(plan.pp):
        config = memory_config(name, **changes)
        live = run_stage(config, workload, plan, stage) if plan.pp > 1 else run_plan(config, workload, plan)
        sent: Counter[tuple[str, int, int]] = Counter()
        for each in collectives(spec, workload, plan, stage):
            sent[each.kind, each.bytes, each.size] += each.count
        predicted = rank_memory(spec, workload, plan, stage, received="all").peak
        yield title(plan) + (f" stage {stage}" if plan.pp > 1 else ""), predicted, live.peak, live.sent.total(), sent == live.sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--width", nargs="+", type=int, default=[256], help="hidden sizes: multiples of 256")
    parser.add_argument("--seq-len", type=int, default=128)
    arguments = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    mismatches = 0
    started = time.time()
    print(
        f"{'model':8} {'width':>5} {'type':9} {'recompute':9} {'plan':48} {'predicted':>10} {'measured':>10} {'ratio':>7} {'collectives':>11}  (MiB)"
    )
    for name in arguments.models:
        for width in arguments.width:
            for plan in plans(name):
                for workload in workloads(name, plan, arguments.seq_len):
                    for what, predicted, measured, count, same in grade(name, width, plan, workload):
                        ratio = predicted / measured
                        ratios.setdefault(kind_of(plan), []).append(abs(ratio - 1))
                        mismatches += not same
                        print(
                            f"{name:8} {width:5} {workload.dtype:9} {workload.recompute:9} {what:44} {predicted / MIB:9.2f} {measured / MIB:9.2f} "
                            f"{ratio:7.4f} {count:5} {'equal' if same else 'DIFFER'}",
                            flush=True,
                        )  # fmt: skip
    for kind, found in ratios.items():
        print(f"{kind:12} n={len(found):3}  median {statistics.median(found):.2%}  worst {max(found):.2%}")
    every = [error for found in ratios.values() for error in found]
    by_kind = {kind: {"worst": round(max(found), 5), "n": len(found)} for kind, found in ratios.items()}
    figures = {
        "memory_worst": round(max(every), 5), "memory_median": round(statistics.median(every), 6), "collective_mismatches": mismatches,
        "n": len(every), "by_kind": by_kind, "seconds": round(time.time() - started),
    }  # fmt: skip
    print(json.dumps(figures))


def kind_of(plan: Plan) -> str:
    if plan.pp > 1:
        return f"pp {plan.schedule}"
    return "fsdp2+tp" if plan.tp > 1 and plan.shard == "zero3" else "tp" if plan.tp > 1 else "hsdp" if plan.shard_group else "fsdp2"


if __name__ == "__main__":
    main()
