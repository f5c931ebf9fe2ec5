"""Flat rules: one share of a peak for everything. Needs nothing but Python.

    training_time   (6 · active parameters + 12 · layers · heads · head_dim · length) FLOPs a token at 40 % of the dense peak of the row's precision;
                    of adapters 4 · active parameters + 8 · …, as a frozen weight has no gradient
    prefill         2 · active parameters FLOPs a token at 40 % of the peak; of the weights' own type where that is fp8 or fp4, else of fp16
    decode          weights and cached keys and values, read once a step at 70 % of the memory's bandwidth
    serving         prefill, then decode of the whole batch, neither below the time of its FLOPs at 40 %; the batch of a saturating load is what
                    90 % of the memory holds beside the weights, at most 2,048 sequences

Tensor parallelism adds bandwidths and peaks; layers in a row of devices do not, for one batch, and do for a saturating load.
A mixture's batch of b tokens reads the share 1 - (1 - top_k/experts)^b of its experts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

COMPUTE_SHARE = 0.40
BANDWIDTH_SHARE = 0.70
MEMORY_SHARE = 0.90
LARGEST_BATCH = 2048
Case = dict[str, Any]


class Cannot(Exception):
    """Why a case is not expressed."""


def peak(case: Case, precision: str) -> float:
    peaks = case["device"]["peak_flops_per_s"]
    if precision not in peaks:
        raise Cannot(f"no {precision} peak of {case['device']['name']}")
    return float(peaks[precision])


def training(case: Case) -> float:
    model, work = case["model"], case["work"]
    if not model["params_active"]:
        raise Cannot("parameters not known")
    if not model["layers"] or not model["heads"] or not model["head_dim"]:
        raise Cannot("heads and layers not known, so attention is not")
    attention = 2 * model["layers"] * model["heads"] * model["head_dim"] * work["seq_len"]
    passes = 2 if work["method"] in ("lora", "qlora") else 3
    flops = passes * (2 * model["params_active"] + 2 * attention) * work["tokens"]
    return float(flops / (work["n_gpus"] * COMPUTE_SHARE * peak(case, work["precision"])))


def inference_peak(case: Case) -> float:
    weights = case["work"]["weight_format"].lower()
    return peak(case, weights if weights in ("fp8", "fp4") else "fp16")


def weight_bytes(case: Case, batch: int) -> float:
    model, bits = case["model"], case["work"]["weight_bits"]
    if not model["n_experts"]:
        return float(model["params_total"] * bits / 8)
    if not model["params_active"]:
        raise Cannot("active parameters not known")
    each = (model["params_total"] - model["params_active"]) / (model["n_experts"] - model["top_k"])  # parameters of one expert in all layers
    read = model["n_experts"] * (1 - (1 - model["top_k"] / model["n_experts"]) ** batch)
    return float((model["params_total"] - model["n_experts"] * each + read * each) * bits / 8)


def cache_bytes(case: Case) -> float:
    """Of one token."""
    model = case["model"]
    return float(2 * model["layers"] * model["kv_heads"] * model["head_dim"] * (1 if case["work"]["kv_dtype"] == "fp8" else 2))


def step_seconds(case: Case, batch: int, width: int) -> float:
    """One step of generation, at the mean length of the context."""
    work = case["work"]
    if not case["device"]["bandwidth_bytes_per_s"]:
        raise Cannot(f"no bandwidth of {case['device']['name']}")
    context = work["input_len"] + work["output_len"] / 2
    moved = weight_bytes(case, batch) + batch * context * cache_bytes(case)
    return float(moved / (BANDWIDTH_SHARE * case["device"]["bandwidth_bytes_per_s"] * width))


def compute_seconds(case: Case, tokens: float, width: int) -> float:
    if not case["model"]["params_active"]:
        raise Cannot("active parameters not known")
    return float(2 * case["model"]["params_active"] * tokens / (COMPUTE_SHARE * inference_peak(case) * width))


def saturating_batch(case: Case) -> int:
    work, device = case["work"], case["device"]
    free = MEMORY_SHARE * device["memory_bytes"] * work["n_devices"] - case["model"]["params_total"] * work["weight_bits"] / 8
    held = int(free / (cache_bytes(case) * (work["input_len"] + work["output_len"])))
    if held < 1:
        raise Cannot("not one sequence fits in 90 % of the memory")
    return min(held, LARGEST_BATCH)


def serving(case: Case) -> float:
    work = case["work"]
    width = work["n_devices"] if work["saturated"] else work["tp"]
    batch = saturating_batch(case) if work["saturated"] else work["batch"]
    step = max(step_seconds(case, batch, width), compute_seconds(case, batch, width))
    seconds = compute_seconds(case, batch * work["input_len"], width) + work["output_len"] * step
    return float(batch * work["output_len"] / seconds)


def predict(case: Case) -> float:
    kind, work = case["kind"], case["work"]
    if kind == "training_time":
        return training(case)
    if kind == "serving":
        return serving(case)
    if kind == "prefill":
        return 1 / compute_seconds(case, 1, work["tp"])
    batch = work["batch"] or 1
    return float(batch / step_seconds(case, batch, work["tp"]))


def main() -> None:
    for line in sys.stdin:
        case = json.loads(line)
        answer: Case = {"id": case["id"], "kind": case["kind"]}
        try:
            answer["predicted"] = predict(case)
        except Cannot as reason:
            answer["cannot"] = str(reason)
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
