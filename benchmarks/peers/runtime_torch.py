"""torch: eager or compiled, in float32, bfloat16, or int8 by torchao. Run by benchmarks/runtimes.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import runtime_job
import torch
from transformers import AutoModel, AutoModelForCausalLM

REQUIREMENTS = ("torch==2.13.0", "torchao==0.18.0", "transformers==5.23.0", "tokenizers")


class Torch(runtime_job.Engine):
    """settings: dtype, compiled, and quantization: none, int8-dynamic or int8-weights."""

    PACKAGE = "torch"

    def __init__(self, model: Path, work: Path, settings: dict[str, Any]) -> None:
        self.size = runtime_job.folder_bytes(model, "*.safetensors")
        decoder = "CausalLM" in (model / "config.json").read_text()
        kind = AutoModelForCausalLM if decoder else AutoModel
        torch.set_num_threads(self.threads)
        self.module = kind.from_pretrained(model, dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa").eval()
        if settings.get("quantization", "none") != "none":
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

            kinds = {"int8-dynamic": Int8DynamicActivationInt8WeightConfig, "int8-weights": Int8WeightOnlyConfig}
            quantize_(self.module, kinds[settings["quantization"]]())
        if settings["compiled"]:
            self.module = torch.compile(self.module, dynamic=False)

    def encode(self, ids: Any, mask: Any) -> Any:
        with torch.inference_mode():
            return self.module(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.float().numpy()

    def logits(self, ids: Any) -> Any:
        with torch.inference_mode():
            return self.module(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()

    def generate(self, ids: Any, new_tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            told = self.module(input_ids=torch.from_numpy(ids), use_cache=True, logits_to_keep=1)
            last = told.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                told = self.module(input_ids=last, past_key_values=told.past_key_values, use_cache=True)
                last = told.logits[:, -1].argmax(-1, keepdim=True)
        return first - start, time.perf_counter() - first

    def files(self) -> int:
        return self.size


if __name__ == "__main__":
    runtime_job.serve(Torch)
