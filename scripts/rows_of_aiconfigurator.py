"""The measured end-to-end serving rows that aiconfigurator-core ships, as rows of the published tables.

    pip download --no-deps aiconfigurator-core==0.12.0 && unzip aiconfigurator_core-*.whl -d UNPACKED
    python scripts/rows_of_aiconfigurator.py --package UNPACKED/aiconfigurator_core --output serving.csv --every 6

Source: aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), systems/silicon_sample.csv, and model_configs for the models' sizes. Kept are rows of one
server of whole replicas (mode agg, no attention data parallelism, within one node) of models whose architecture the sizes of a row can say.
The output's speed is that of a steady load: each request takes its time to first token and its tokens after that.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SOURCE = "aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0)"
COLUMNS = (
    "id", "model", "family", "params_total", "params_active", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "moe_ffn", "vocab",
    "n_experts", "top_k", "hardware", "n_devices", "tp", "pp", "framework", "weight_format", "weight_bits", "kv_dtype", "batch_or_concurrency", "batch_kind",
    "input_len", "output_len", "metric", "total_output_tok_s", "ttft_ms", "tpot_ms", "measured", "confidence", "source_repo_or_doc",
    "source_path_or_section", "note",
)  # fmt: skip
FIELDS = {
    "layers": ("num_hidden_layers",), "hidden": ("hidden_size",), "heads": ("num_attention_heads",), "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",), "ffn": ("intermediate_size",), "moe_ffn": ("moe_intermediate_size",), "vocab": ("vocab_size",),
    "n_experts": ("num_local_experts", "n_routed_experts", "num_experts"), "top_k": ("num_experts_per_tok",),
}  # fmt: skip
PLAIN = {"llama", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "minimax_m2", "kimi_k2"}
"""Model types whose attention is full in every layer, or said by the architecture, so that sizes describe them."""
BITS = {
    "fp8": ("FP8", 8.0),
    "fp8_block": ("FP8", 8.0),
    "nvfp4": ("FP4", 4.5),
    "int4_wo": ("int4 g128", 4.25),
    "": ("bf16", 16.0),
    "bfloat16": ("bf16", 16.0),
}


def sizes(config: Mapping[str, Any]) -> dict[str, str]:
    """Columns of a model's sizes."""
    text = config.get("text_config") or config
    found = {column: next((text[name] for name in names if text.get(name)), "") for column, names in FIELDS.items()}
    return {column: str(value) for column, value in found.items()}


def rows(package: Path, every: int) -> Iterator[dict[str, str]]:
    kept = 0
    with (package / "systems" / "silicon_sample.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            made = one(row, package / "model_configs")
            if made is None:
                continue
            kept += 1
            if kept % every == 0:
                yield made


def one(row: Mapping[str, str], configs: Path) -> dict[str, str] | None:
    path = configs / f"{row['model_path'].replace('/', '--')}_config.json"
    moe = row["moe_quant_mode"] or row["gemm_quant_mode"]
    alone = row["mode"] == "agg" and float(row["attention_dp_size"] or 1) <= 1 and float(row["pp_size"] or 1) == 1
    if not alone or not path.is_file() or moe not in BITS or not row["silicon_tpot_ms"] or not row["batch_size"]:
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = (config.get("text_config") or config).get("model_type", config.get("model_type"))
    devices = int(float(row["tp_size"]))
    if kind not in PLAIN or devices > 8:
        return None
    first, each = float(row["silicon_ttft_ms"]), float(row["silicon_tpot_ms"])
    requests, new = float(row["batch_size"]), int(row["osl"])
    form, bits = BITS[moe]
    return {
        **dict.fromkeys(COLUMNS, ""), **sizes(config), "id": row["id"], "model": row["model_path"].split("/")[-1],
        "hardware": row["system"].replace("_", "-"),
        "n_devices": str(devices), "tp": str(devices), "pp": "1", "framework": f"{row['backend']} {row['backend_version']}", "weight_format": form,
        "weight_bits": str(bits), "batch_or_concurrency": str(int(requests)), "batch_kind": "in-flight batching, fixed concurrency",
        "input_len": row["isl"], "output_len": row["osl"], "metric": "output tok/s of all requests",
        "total_output_tok_s": f"{requests * new / ((first + each * (new - 1)) / 1e3):.6g}", "ttft_ms": f"{first:.6g}", "tpot_ms": f"{each:.6g}",
        "measured": "measured", "confidence": "medium", "source_repo_or_doc": SOURCE, "source_path_or_section": "systems/silicon_sample.csv",
        "note": "total_output_tok_s derived from the time to first token and the time per token at this concurrency",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="keep each so-manieth row")
    arguments = parser.parse_args()
    made = list(rows(arguments.package, arguments.every))
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(made)
    print(f"{len(made)} rows")


if __name__ == "__main__":
    main()
