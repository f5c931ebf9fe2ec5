"""The serving runs that aiconfigurator-core's wheel ships (Apache-2.0), as rows with the columns of inference.csv.

    python benchmarks/peers/aiconfigurator_rows.py FOLDER [--every 5] > inference.csv

FOLDER is `aiconfigurator_core` of the unpacked wheel: `systems/silicon_sample.csv` are the runs, `model_configs` the models' sizes. Taken are runs
of one pool of workers (not prefill and decode apart), with one rank of attention's data parallelism, a stated concurrency, and a model that the
columns express: dense or a mixture, one kind of attention over all layers without a latent cache. A closed loop of C users generates

    C · output / (time to first token + (output - 1) · time per output token)   tokens a second

`--every N` takes each N-th of these.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

PLAIN = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM", "MiniMaxM2ForCausalLM")
HARDWARE = {
    "a100_sxm": "A100-SXM-80GB",
    "h100_sxm": "H100-SXM-80GB",
    "h200_sxm": "H200-SXM-141GB",
    "b200_sxm": "B200-SXM-180GB",
    "b300_sxm": "B300-SXM",
    "gb200": "GB200",
    "gb300": "GB300",
    "l40s": "L40S-48GB",
}
FORMATS = {"fp8": ("FP8", 8), "fp4": ("FP4", 4.5), "bf16": ("bf16", 16), "": ("bf16", 16)}
"""Its precision → the format's name, and bits with scales (16 values of fp4 share one byte). Empty: the checkpoint's own type, bf16 in those rows."""
FRAMEWORKS = {"trtllm": "TensorRT-LLM", "vllm": "vLLM", "sglang": "SGLang"}
COLUMNS = (
    "id", "model", "family", "params_total", "params_active", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "n_experts",
    "top_k", "hardware", "device_mem_gb", "device_mem_bw_gbs", "n_devices", "tp", "pp", "framework", "weight_format", "weight_bits",
    "kv_dtype", "activation_dtype", "batch_or_concurrency", "batch_kind", "input_len", "output_len", "metric", "prefill_tok_s", "decode_tok_s",
    "decode_tok_s_per_seq", "total_output_tok_s", "latency_ms", "ttft_ms", "tpot_ms", "achieved_bw_gbs", "memory_gb", "mem_unit",
    "model_file_gib", "measured", "confidence", "source_repo_or_doc", "source_path_or_section", "source_commit", "note", "moe_ep",
)  # fmt: skip


def sizes_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """Columns of a model's sizes; None where they do not express it."""
    if config.get("architectures", [""])[0] not in PLAIN:
        return None
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    experts = config.get("num_local_experts") or config.get("num_experts")
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    attention = hidden * head * (2 * heads + 2 * config["num_key_value_heads"])
    tables = (1 if config.get("tie_word_embeddings") else 2) * hidden * config["vocab_size"]
    layers, chosen = config["num_hidden_layers"], config.get("num_experts_per_tok")
    total = layers * (attention + (experts or 1) * 3 * hidden * width) + tables
    active = layers * (attention + (chosen or 1) * 3 * hidden * width) + tables if experts else None
    return {
        "params_total": total, "params_active": active, "layers": layers, "hidden": hidden, "heads": heads, "kv_heads": config["num_key_value_heads"],
        "head_dim": head, "ffn": width, "vocab": config["vocab_size"], "n_experts": experts, "top_k": chosen if experts else None,
    }  # fmt: skip


def row_of(run: dict[str, str], sizes: dict[str, Any]) -> dict[str, Any] | None:
    """A run as a row; None where it is none of those taken."""
    users = re.search(r"silicon_concurrency=(\d+)", run["silicon_data_source"])
    whole = run["mode"] == "agg" and float(run["attention_dp_size"] or 1) == 1 and run["precision"] in FORMATS and run["system"] in HARDWARE
    if not users or not whole or "wip=True" in run["silicon_data_source"] or not run["tp_size"]:
        return None
    first, each, output = float(run["silicon_ttft_ms"]), float(run["silicon_tpot_ms"]), int(run["osl"])
    label, bits = FORMATS[run["precision"]]
    experts = float(run["moe_ep_size"] or 1)
    return sizes | {
        "id": run["id"], "model": run["model_path"].split("/")[-1], "hardware": HARDWARE[run["system"]], "n_devices": int(float(run["tp_size"])),
        "tp": int(float(run["tp_size"])), "pp": 1, "framework": f"{FRAMEWORKS[run['backend']]} {run['backend_version']}", "weight_format": label,
        "weight_bits": bits, "batch_or_concurrency": int(users[1]), "batch_kind": "in-flight batching, closed loop", "input_len": int(run["isl"]),
        "output_len": output, "metric": "output tok/s, derived from TTFT and TPOT", "ttft_ms": first, "tpot_ms": each,
        "total_output_tok_s": round(int(users[1]) * output / (first + (output - 1) * each) * 1e3, 3), "measured": "measured", "confidence": "medium",
        "source_repo_or_doc": "ai-dynamo/aiconfigurator", "source_path_or_section": "aiconfigurator-core 0.12.0, systems/silicon_sample.csv",
        "moe_ep": int(experts) if sizes["n_experts"] and experts > 1 else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take each N-th")
    given = parser.parse_args()
    models = {}
    for path in sorted((given.folder / "model_configs").glob("*_config.json")):
        models[path.name.removesuffix("_config.json").replace("--", "/")] = sizes_of(json.loads(path.read_text("utf-8")))
    with (given.folder / "systems" / "silicon_sample.csv").open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    found = [row for run in runs if (sizes := sizes_near(run["model_path"], models)) and (row := row_of(run, sizes))]
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found[:: given.every])
    return 0


def sizes_near(name: str, models: dict[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """Sizes of the model of this name, or of one whose last part differs only in what follows the size: an instruction-tuned or quantized twin."""
    if name in models:
        return models[name]
    last = re.sub(r"^Meta-", "", name.split("/")[-1])
    for known, sizes in models.items():
        other = re.sub(r"^Meta-", "", known.split("/")[-1])
        if last.startswith(f"{other}-") or other.startswith(f"{last}-"):
            return sizes
    return None


if __name__ == "__main__":
    sys.exit(main())
