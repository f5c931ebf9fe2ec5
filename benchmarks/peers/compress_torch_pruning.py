"""Torch-Pruning: inner features of the feed-forward layers go, as many in each block, by its group importances. Run by benchmarks/pruning.py."""

from __future__ import annotations

from typing import Any

import compress_job
import torch
import torch_pruning as tp
from transformers import AutoConfig, AutoModelForCausalLM

REQUIREMENTS = ("torch==2.13.0", "torch-pruning==1.6.1", "transformers==5.23.0")
IMPORTANCES = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}


def learn_gradients(model: Any, ids: torch.Tensor) -> None:
    """Gradients of the language model's loss, which Taylor's importance multiplies with the weights."""
    for row in ids:
        model(input_ids=row[None], labels=row[None]).loss.backward()


def prune(model: Any, ids: torch.Tensor, settings: dict[str, Any]) -> None:
    inner = [layer.mlp.gate_proj for layer in model.model.layers]
    pruner = tp.pruner.BasePruner(
        model, example_inputs={"input_ids": ids[:1, :16]}, importance=IMPORTANCES[settings["method"]](), pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(inner, settings["ffn"]), ignored_layers=[model.lm_head], round_to=settings["round_to"],
        forward_fn=lambda module, given: module(**given, use_cache=False).logits,
    )  # fmt: skip
    if settings["method"] == "taylor":
        learn_gradients(model, ids)
    pruner.step()
    model.zero_grad()


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    ids = compress_job.windows(job)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    with meter.quantizing():
        prune(model, ids, job.settings)
    sizes = {layer.mlp.gate_proj.out_features for layer in model.model.layers}
    config = AutoConfig.from_pretrained(job.model)
    (config.intermediate_size,) = sizes  # one config describes all blocks, or nothing loads what is saved
    model.config = config
    model.save_pretrained(job.artifact)
    meter.saved()
    dense = model.state_dict()
    compress_job.write_dense(job, dense, smaller=True)
    meter.report(job, "torch-pruning", {"sparsity": 0.0})


if __name__ == "__main__":
    main()
