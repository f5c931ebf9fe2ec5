"""ONNX Runtime, fused by its transformers' optimizer and quantized by its own quantizer. Run by benchmarks/runtimes.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import runtime_job
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers import optimizer
from transformers import AutoModel

REQUIREMENTS = ("torch==2.13.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnxscript==0.7.2", "transformers==4.57.3", "sympy", "tokenizers")


class Hidden(torch.nn.Module):
    """input_ids, attention_mask → the last hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class OnnxRuntime(runtime_job.Engine):
    """settings: int8."""

    PACKAGE = "onnxruntime"

    def __init__(self, model: Path, work: Path, settings: dict[str, Any]) -> None:
        self.file = work / "model.onnx"
        if not self.file.exists():
            build(model, work, self.file, int8=settings["int8"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        self.session = onnxruntime.InferenceSession(str(self.file), options, providers=["CPUExecutionProvider"])

    def encode(self, ids: Any, mask: Any) -> Any:
        return self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    def files(self) -> int:
        return self.file.stat().st_size


def build(model: Path, work: Path, file: Path, *, int8: bool) -> None:
    """Exported by tracing with eager attention, which is what the optimizer's patterns know."""
    plain, fused = work / "plain.onnx", work / "fused.onnx"
    module = Hidden(AutoModel.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")).eval()
    example = (torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64))
    names, axes = ["input_ids", "attention_mask"], {0: "batch", 1: "length"}
    torch.onnx.export(
        module, example, str(plain), input_names=names, output_names=["last_hidden_state"], opset_version=17, dynamo=False,
        dynamic_axes=dict.fromkeys([*names, "last_hidden_state"], axes),
    )  # fmt: skip
    config = json.loads((model / "config.json").read_text())
    sizes = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
    made = optimizer.optimize_model(str(plain), model_type="bert", opt_level=99, only_onnxruntime=False, **sizes)
    print("fused:", made.get_fused_operator_statistics(), flush=True)
    made.save_model_to_file(str(fused if int8 else file))
    if int8:
        quantize_dynamic(fused, file, per_channel=True, extra_options={"DefaultTensorType": 1})
    plain.unlink()


if __name__ == "__main__":
    runtime_job.serve(OnnxRuntime)
