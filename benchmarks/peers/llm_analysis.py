"""llm-analysis 0.2.2 (the package `llm-analysis`, Apache-2.0): training steps and inference of decoders by FLOPs, bytes and efficiencies.

Settings are its own advice where one has not measured (its README, "How to Set FLOPS and Memory Efficiency"): 0.5 of the FLOPs for training, 0.7
for inference, 0.9 of the memory's bandwidth. It knows a feed-forward of two matrices: a gated one of width f is given as 3/2 f, which has the same
weights. The device is made of the row's figures. It says when a model does not fit by its own count, and then gives no time; where a row does not
say what it recomputes, the least that fits by that count is taken.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]  # this file has the package's name

from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis  # noqa: E402
from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig, ParallelismConfig  # noqa: E402

TRAINING_EFFICIENCY, INFERENCE_EFFICIENCY, MEMORY_EFFICIENCY = 0.5, 0.7, 0.9
MESSAGE_LATENCY_S = 8e-6  # of its own files of GPUs
RECOMPUTE = {"full": ActivationRecomputation.FULL, "selective": ActivationRecomputation.SELECTIVE, "none": ActivationRecomputation.NONE}
UNSAID = (ActivationRecomputation.NONE, ActivationRecomputation.SELECTIVE, ActivationRecomputation.FULL)
TRAINING_BITS = {"fp4": 4, "fp8": 8, "bf16": 16, "fp16": 16}
Case = dict[str, Any]


class Cannot(Exception):
    """Why a case is not expressed."""


def model_config(case: Case, length: int) -> ModelConfig:
    model = case["model"]
    if not all(model[name] for name in ("layers", "hidden", "heads", "kv_heads", "expert_ffn", "vocab")):
        raise Cannot("sizes of the model not known")
    width = round(model["expert_ffn"] * (1.5 if model["gated"] else 1))
    return ModelConfig(
        name="case", num_layers=model["layers"], n_head=model["heads"], hidden_dim=model["hidden"], vocab_size=model["vocab"], max_seq_len=length,
        num_key_value_heads=model["kv_heads"], ffn_embed_dim=width, expansion_ratio=width / model["hidden"],
        moe_num_experts=model["n_experts"] or 1, moe_top_k=model["top_k"] or 1,
    )  # fmt: skip


def gpu_config(case: Case) -> GPUConfig:
    device = case["device"]
    peaks = device["peak_flops_per_s"]
    if "fp16" not in peaks or not device["bandwidth_bytes_per_s"] or not device["memory_bytes"]:
        raise Cannot(f"no fp16 peak, memory or bandwidth of {device['name']}")
    return GPUConfig(
        name="case", mem_per_GPU_in_GB=device["memory_bytes"] / 1e9, hbm_bandwidth_in_GB_per_sec=device["bandwidth_bytes_per_s"] / 1e9,
        intra_node_bandwidth_in_GB_per_sec=(device["link_bytes_per_s"] or 16e9) / 1e9, intra_node_min_message_latency=MESSAGE_LATENCY_S,
        peak_fp16_TFLOPS=peaks["fp16"] / 1e12, peak_i8_TFLOPS=peaks.get("fp8", peaks.get("int8", 2 * peaks["fp16"])) / 1e12,
        peak_i4_TFLOPS=peaks.get("fp4", 4 * peaks["fp16"]) / 1e12,
    )  # fmt: skip


def training(case: Case) -> float:
    work = case["work"]
    if work["precision"] not in TRAINING_BITS:
        raise Cannot(f"no data type for {work['precision']}: 4, 8 or 16 bits")
    if work["method"] in ("lora", "qlora", "pruning"):
        raise Cannot(f"no {work['method']}")
    bits = TRAINING_BITS[work["precision"]]
    tp, pp = work["tp"] or 1, work["pp"] or 1
    dp = work["n_gpus"] // (tp * pp)  # context parallelism is not known to it: those devices count as copies
    micro = work["micro_batch"] or 1
    sequences = work["tokens"] / work["seq_len"]
    analysis = LLMAnalysis(
        model_config(case, work["seq_len"]), gpu_config(case), DtypeConfig(name="case", weight_bits=bits, activation_bits=bits, embedding_bits=16),
        ParallelismConfig(tp_size=tp, pp_size=pp, dp_size=dp, ep_size=1, sp_size=tp if work["sequence_parallel"] else 1),
        flops_efficiency=TRAINING_EFFICIENCY, hbm_memory_efficiency=MEMORY_EFFICIENCY,
    )  # fmt: skip
    tried = [RECOMPUTE[work["recompute"]]] if work["recompute"] in RECOMPUTE else UNSAID
    for recompute in tried:
        try:
            found = analysis.training(
                batch_size_per_gpu=micro, gradient_accumulation_steps=1, seq_len=work["seq_len"], ds_zero=DSZeRO(work["zero_stage"] or 0),
                activation_recomputation=recompute, mlp_gated_linear_units=bool(case["model"]["gated"]),
            )  # fmt: skip
        except AssertionError:
            if recompute is tried[-1]:
                raise
            continue
        break
    return float(found["latency_per_micro_batch"] * sequences / (micro * dp))


def inference(case: Case) -> float:
    work = case["work"]
    if work["batch"] is None:
        raise Cannot("does not choose the batch of a saturating load")
    if not case["model"]["n_experts"] and work["pp"] > 1:
        raise Cannot("no pipeline of layers in inference")
    weights = 4 if work["weight_bits"] < 6 else 8 if work["weight_bits"] < 12 else 16
    activations = 8 if work["weight_format"] in ("FP8", "FP4") else 16
    total = max(1, work["input_len"]) + work["output_len"]
    analysis = LLMAnalysis(
        model_config(case, total), gpu_config(case), DtypeConfig(name="case", weight_bits=weights, activation_bits=activations, embedding_bits=16),
        ParallelismConfig(tp_size=work["tp"], pp_size=1, dp_size=1, sp_size=1), flops_efficiency=INFERENCE_EFFICIENCY,
        hbm_memory_efficiency=MEMORY_EFFICIENCY,
    )  # fmt: skip
    found = analysis.inference(
        batch_size_per_gpu=work["batch"], seq_len=max(1, work["input_len"]), num_tokens_to_generate=max(1, work["output_len"]),
        kv_cache_dtype_bytes=1 if work["kv_dtype"] == "fp8" else 2,
    )  # fmt: skip
    names = {"prefill": "prefill_tokens_per_sec", "decode": "decode_tokens_per_sec", "serving": "total_tokens_per_sec"}
    return float(found[names[case["kind"]]])


def predict(case: Case) -> float:
    try:
        value = training(case) if case["kind"] == "training_time" else inference(case)
    except AssertionError as error:
        fits = "memory" in str(error) or "batch" in str(error)
        raise Cannot("says that it does not fit" if fits else f"asserts: {str(error)[:60] or 'its own check of FLOPs'}") from error
    if not math.isfinite(value):
        raise Cannot("gives no finite number")
    return value


def main() -> None:
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        case = json.loads(line)
        answer: Case = {"id": case["id"], "kind": case["kind"]}
        try:
            answer["predicted"] = predict(case)
        except Cannot as reason:
            answer["cannot"] = str(reason)
        except (UnboundLocalError, TypeError, ZeroDivisionError, ValueError) as error:
            answer["cannot"] = f"fails with {type(error).__name__}: {str(error)[:60]}"
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
