"""ONNX Runtime GenAI by its own model builder. Run by benchmarks/runtimes.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import runtime_job

REQUIREMENTS = ("torch==2.13.0", "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0", "transformers==5.23.0", "tokenizers")


class GenAI(runtime_job.Engine):
    """settings: precision, as the builder takes it: fp32, or int4 (codes of blocks, int4 products accumulated in int8 as is its default)."""

    PACKAGE = "onnxruntime-genai"

    def __init__(self, model: Path, work: Path, settings: dict[str, Any]) -> None:
        self.folder = work / "model"
        if not (self.folder / "genai_config.json").exists():
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(model), "-i", str(model), "-o", str(self.folder)]
            subprocess.run([*command, "-p", settings["precision"], "-e", "cpu", "-c", str(work / "cache")], check=True)
        asked = json.loads((self.folder / "genai_config.json").read_text())
        asked["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        (self.folder / "genai_config.json").write_text(json.dumps(asked, indent=1))
        self.model = genai.Model(str(self.folder))

    def _started(self, ids: Any, length: int) -> Any:
        asked = genai.GeneratorParams(self.model)
        asked.set_search_options(max_length=length, min_length=length, batch_size=len(ids), do_sample=False)
        return genai.Generator(self.model, asked)

    def logits(self, ids: Any) -> Any:
        generator = self._started(ids, ids.shape[1] + 1)
        generator.append_tokens(ids.astype(np.int32))
        return np.array(generator.get_output("logits"), np.float32)

    def generate(self, ids: Any, new_tokens: int) -> tuple[float, float]:
        generator = self._started(ids, ids.shape[1] + new_tokens)
        start = time.perf_counter()
        generator.append_tokens(ids.astype(np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    def files(self) -> int:
        return runtime_job.folder_bytes(self.folder, "*.onnx", "*.onnx.data")


if __name__ == "__main__":
    runtime_job.serve(GenAI)
