"""aiconfigurator 0.12.0 (the packages `aiconfigurator` and `aiconfigurator-core`, Apache-2.0): serving by TensorRT-LLM, vLLM and SGLang, from
tables of kernel times that were measured on ten systems.

Settings: each row's own framework with its newest tables, weights and cache in the row's types, measured tables alone (`SILICON`), and its mix with
formulas (`HYBRID`) where these have a hole. A static batch is its static mode. A load that saturates is its mode for continuous batching with
TensorRT-LLM's default budget of 8,192 tokens a step and the largest batch up to 2,048 that it says fits (its check of the cache's room), or with the
prompt's length as budget, its own default, whichever it thinks faster. Gated dense decoders are given as Llama, mixtures as Mixtral or Qwen3.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]  # this file has the package's name

from aiconfigurator.cli.api import cli_estimate  # noqa: E402

SYSTEMS = {
    "A100 SXM 80GB": "a100_sxm",
    "A100 PCIe 80GB": "a100_pcie",
    "H100 SXM 80GB": "h100_sxm",
    "H100 PCIe 80GB": "h100_pcie",
    "H200 SXM 141GB": "h200_sxm",
    "B200 SXM": "b200_sxm",
    "B300 SXM": "b300_sxm",
    "GB200 (per GPU)": "gb200",
    "GB300 (per GPU)": "gb300",
    "L40S": "l40s",
    "L4": "l4",
    "A30": "a30",
    "RTX PRO 6000 Blackwell Server": "rtx_pro_6000_server",
}
BACKENDS = {"tensorrt-llm": "trtllm", "vllm": "vllm", "sglang": "sglang"}
GEMM = {"FP8": "fp8", "FP4": "nvfp4", "FP16": "bfloat16", "bf16": "bfloat16", "float16": "bfloat16"}
STEP_TOKENS = 8192  # TensorRT-LLM's default max_num_tokens
LARGEST_BATCH = 2048  # and max_batch_size
SHRINK = 0.85
Case = dict[str, Any]


class Cannot(Exception):
    """Why a case is not expressed."""


def config_of(model: Case) -> Case:
    """A config.json with the row's sizes, of an architecture that it knows."""
    if not all(model[name] for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "expert_ffn", "vocab")):
        raise Cannot("sizes of the model not known")
    config = {
        "hidden_size": model["hidden"],
        "num_hidden_layers": model["layers"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "head_dim": model["head_dim"],
        "vocab_size": model["vocab"],
        "intermediate_size": model["expert_ffn"],
        "max_position_embeddings": 1 << 20,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
    }
    if not model["gated"]:
        raise Cannot("no architecture of it has a feed-forward that is not gated")
    if not model["n_experts"]:
        return config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if model["n_experts"] <= 8:
        experts = {"num_local_experts": model["n_experts"], "num_experts_per_tok": model["top_k"]}
        return config | experts | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    experts = {"num_experts": model["n_experts"], "num_experts_per_tok": model["top_k"], "moe_intermediate_size": model["expert_ffn"]}
    return config | experts | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def folder_of(model: Case, root: Path) -> str:
    config = json.dumps(config_of(model), sort_keys=True)
    folder = root / f"{hash(config) & (1 << 60) - 1:x}"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(config, encoding="utf-8")
    return str(folder)


def settings(case: Case, root: Path) -> Case:
    """What all of a case's estimates have in common."""
    work, name = case["work"], case["device"]["name"]
    backend = next((known for word, known in BACKENDS.items() if word in work["framework"].lower()), None)
    if backend is None:
        raise Cannot("not a server that it knows: TensorRT-LLM, vLLM, SGLang")
    if name not in SYSTEMS:
        raise Cannot(f"no system for {name}")
    if work["weight_format"] not in GEMM:
        raise Cannot(f"no weights in {work['weight_format']}")
    if work["pp"] > 1 and work["pp"] * work["tp"] != work["n_devices"]:
        raise Cannot("devices that the plan does not use")
    gemm = GEMM[work["weight_format"]]
    common = {
        "model_path": folder_of(case["model"], root),
        "system_name": SYSTEMS[name],
        "backend_name": backend,
        "isl": max(1, work["input_len"]),
        "osl": max(2, work["output_len"]),
        "tp_size": work["tp"],
        "pp_size": work["pp"],
        "gemm_quant_mode": gemm,
        "kvcache_quant_mode": "fp8" if work["kv_dtype"] == "fp8" else "bfloat16",
    }
    if case["model"]["n_experts"]:
        ep = work.get("moe_ep") or 1
        common |= {"moe_quant_mode": gemm, "moe_ep_size": ep, "moe_tp_size": work["tp"] // ep}
    return common


def estimate(common: Case, **more: Any) -> Any:
    """Its estimate from measured tables, else with formulas in their holes."""
    for mode in ("SILICON", "HYBRID"):
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                return cli_estimate(**common, database_mode=mode, **more)
        except Exception as error:  # of many kinds, and each is one reason
            if "OOM" in str(error):
                raise Cannot("says that it does not fit") from error
            failure = error
    raise Cannot(f"fails with {type(failure).__name__}: {str(failure).splitlines()[0][:70] if str(failure) else ''}")


def largest_batch(case: Case) -> int:
    """More sequences than fit: where its own check of the cache's room begins."""
    model, work, device = case["model"], case["work"], case["device"]
    free = device["memory_bytes"] * work["n_devices"] - model["params_total"] * work["weight_bits"] / 8
    each = 2 * model["layers"] * model["kv_heads"] * model["head_dim"] * (1 if work["kv_dtype"] == "fp8" else 2)
    return max(1, min(LARGEST_BATCH, int(free / (each * (work["input_len"] + work["output_len"])))))


def saturated(case: Case, common: Case) -> float:
    """Generated tokens a second of the largest batch that it says fits."""
    batch, last = largest_batch(case), Cannot("says that it does not fit")
    budget = max(STEP_TOKENS, case["work"]["input_len"])
    while batch >= 1:
        try:
            found = estimate(common, mode="agg", batch_size=batch, ctx_tokens=budget)
        except Cannot as reason:
            if "fit" not in str(reason):
                raise
            found, last = None, reason
        if found is not None and not found.kv_cache_warning:
            other = estimate(common, mode="agg", batch_size=batch)
            return float(max(found.raw["tokens/s"], other.raw["tokens/s"]))
        batch = int(batch * SHRINK)
    raise last


def predict(case: Case, root: Path) -> float:
    if case["kind"] == "training_time":
        raise Cannot("inference alone")
    common, work = settings(case, root), case["work"]
    if work["saturated"]:
        return saturated(case, common)
    batch, output = work["batch"] or 1, work["output_len"]
    if work.get("continuous"):
        found = estimate(common, mode="agg", batch_size=batch, ctx_tokens=max(STEP_TOKENS, work["input_len"]))
        return float(found.raw["tokens/s"])
    if case["kind"] == "prefill":
        return float(batch * work["input_len"] / estimate(common, mode="static_ctx", batch_size=batch).ttft * 1e3)
    if case["kind"] == "decode":
        return float(batch / estimate(common, mode="static_gen", batch_size=batch).tpot * 1e3)
    found = estimate(common, mode="static", batch_size=batch)
    return float(batch * output / (found.ttft + found.tpot * max(0, output - 1)) * 1e3)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            case = json.loads(line)
            answer: Case = {"id": case["id"], "kind": case["kind"]}
            try:
                answer["predicted"] = predict(case, Path(folder))
            except Cannot as reason:
                answer["cannot"] = str(reason)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
