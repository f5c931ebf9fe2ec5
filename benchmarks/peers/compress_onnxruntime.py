"""ONNX Runtime: an encoder's weights to int8 by channel, its activations as they come. Run by benchmarks/compression.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compress_job
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from transformers import AutoModel

REQUIREMENTS = ("torch==2.13.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnxscript==0.7.2", "transformers==5.23.0")


class Hidden(torch.nn.Module):
    """input_ids, attention_mask → the last hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def export(job: compress_job.Job, file: Path) -> None:
    """The model as ONNX, batch and length left open."""
    model = Hidden(AutoModel.from_pretrained(job.model, dtype=torch.float32, attn_implementation="eager")).eval()
    example = (torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64))
    names = ("input_ids", "attention_mask")
    axes = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)} for name in names}
    torch.onnx.export(model, example, str(file), input_names=list(names), dynamic_shapes=axes, dynamo=True, external_data=False)


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    Path(job.artifact).mkdir(parents=True)
    plain, file = Path(job.artifact) / "plain.onnx", Path(job.artifact) / "model.onnx"
    export(job, plain)
    with meter.quantizing():
        quantize_dynamic(plain, file, per_channel=job.settings["per_channel"], extra_options={"DefaultTensorType": 1})
    plain.unlink()
    meter.saved()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    compress_job.write_embeddings(job, lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0])
    meter.report(job, "onnxruntime", {})


if __name__ == "__main__":
    main()
