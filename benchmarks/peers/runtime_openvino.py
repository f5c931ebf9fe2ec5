"""OpenVINO and NNCF, from a traced encoder. Run by benchmarks/runtimes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import runtime_job
import torch
from transformers import AutoModel

REQUIREMENTS = ("torch==2.13.0", "nncf==3.4.0", "openvino==2026.4.1", "transformers==4.57.3", "tokenizers")


class Hidden(torch.nn.Module):
    """input_ids, attention_mask → the last hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class OpenVINO(runtime_job.Engine):
    """settings: int8 (NNCF's post-training quantization with its own defaults), precision: f32 or bf16."""

    PACKAGE = "openvino"

    def __init__(self, model: Path, work: Path, settings: dict[str, Any]) -> None:
        self.file = work / "model.xml"
        if not self.file.exists():
            build(model, self.file, int8=settings["int8"])
        hints = {"INFERENCE_PRECISION_HINT": settings["precision"], "INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
        self.request = ov.Core().compile_model(self.file, "CPU", hints).create_infer_request()

    def encode(self, ids: Any, mask: Any) -> Any:
        return self.request.infer({"input_ids": ids, "attention_mask": mask})[0]

    def files(self) -> int:
        return self.file.stat().st_size + self.file.with_suffix(".bin").stat().st_size


def build(model: Path, file: Path, *, int8: bool) -> None:
    module = Hidden(AutoModel.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")).eval()
    example = {name: torch.ones(2, 16, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    made = ov.convert_model(module, example_input=example, input=[ov.PartialShape([-1, -1])] * 2)
    for given, name in zip(made.inputs, ("input_ids", "attention_mask"), strict=True):
        given.get_tensor().set_names({name})
    if int8:
        from tokenizers import Tokenizer

        cut = Tokenizer.from_file(str(model / "tokenizer.json"))
        cut.enable_truncation(128)
        coded = [np.array([cut.encode(text).ids]) for text in calibration_texts(np.random.default_rng(0))]
        items = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in coded]
        made = nncf.quantize(made, nncf.Dataset(items), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(items))
    ov.save_model(made, file, compress_to_fp16=False)


def calibration_texts(random: Any) -> list[str]:
    """Three hundred passages of the standard library's prose, NNCF's own number of them."""
    from pydoc_data.topics import topics

    passages = [part.strip() for text in topics.values() for part in text.split("\n\n") if len(part.strip()) > 80]
    return [passages[place] for place in random.choice(len(passages), 300, replace=False)]


if __name__ == "__main__":
    runtime_job.serve(OpenVINO)
