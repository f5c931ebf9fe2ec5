"""llm-compressor: GPTQ, AWQ, RTN, and SmoothQuant followed by GPTQ, saved as compressed-tensors; SparseGPT and Wanda, saved densely.
Run by benchmarks/compression.py and benchmarks/pruning.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compress_job
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

REQUIREMENTS = ("torch==2.13.0", "llmcompressor==0.14.0.1")


def scheme(settings: dict[str, Any]) -> dict[str, Any]:
    """The one quantization group: all linears, and per-token dynamic int8 activations where they are asked for."""
    group = settings["group_size"]
    weights = {"num_bits": settings["bits"], "type": "int", "symmetric": settings["symmetric"], "strategy": "channel" if group is None else "group"}
    if group is not None:
        weights["group_size"] = group
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"targets": ["Linear"], "weights": weights, "input_activations": activations if settings.get("activations") else None}


def pruning(settings: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[settings["method"]]
    return [kind(sparsity=settings["sparsity"], mask_structure=settings["mask_structure"], targets=["Linear"], ignore=["re:.*lm_head"])]


def modifiers(settings: dict[str, Any]) -> list[Any]:
    """The recipe of a method, each modifier with its package's defaults."""
    if "mask_structure" in settings:
        return pruning(settings)
    groups = {"group_0": scheme(settings)}
    if settings["method"] == "rtn":
        return [QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    if settings["method"] == "awq":
        from llmcompressor.modifiers.awq import AWQModifier

        return [AWQModifier(config_groups=groups, ignore=["lm_head"])]
    chosen = [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    if settings["method"] == "smoothquant+gptq":
        from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=0.8), *chosen]
    return chosen


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    rows = compress_job.windows(job).tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    with meter.quantizing():
        oneshot(
            model=model, tokenizer=job.model, dataset=dataset, recipe=modifiers(job.settings), max_seq_length=len(rows[0]),
            num_calibration_samples=len(rows), shuffle_calibration_samples=False,
        )  # fmt: skip
    model.save_pretrained(job.artifact, save_compressed=True)
    meter.saved()
    linears = compress_job.linears_of(job.model)
    if "mask_structure" in job.settings:
        dense = model.state_dict()
        compress_job.write_dense(job, dense)
        meter.report(job, "llmcompressor", {"sparsity": compress_job.share_of_zeros(dense, linears)})
        return
    bits: dict[str, Any] = compress_job.counted_bits(Path(job.artifact), linears, code_bits=job.settings["bits"], symmetric=job.settings["symmetric"])
    from transformers import CompressedTensorsConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        job.artifact, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    compress_job.write_dense(job, loaded.state_dict())
    bits["int8_inputs"] = sorted(linears) if job.settings.get("activations") else []
    meter.report(job, "llmcompressor", bits)


if __name__ == "__main__":
    main()
